"""What the user may call a model, and what is said when there is none. The Hub is a stand-in: no network."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from httpx import Request, Response
from huggingface_hub import errors

from moeyard.engine.resolve import EMBEDDED, resolve_model


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Records what is asked of the Hub; `answer` is the snapshot, or the exception to raise."""

    hub = SimpleNamespace(answer=tmp_path, calls=[])

    def snapshot_download(name, **options):
        hub.calls.append((name, options))
        if isinstance(hub.answer, Exception):
            raise hub.answer
        return str(hub.answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (tmp_path / "config.json").write_text("{}")
    return hub


def test_the_embedded_checkpoint_is_complete():
    assert resolve_model("") == EMBEDDED
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in EMBEDDED.iterdir()}


def test_a_directory_is_itself(hub, monkeypatch):
    assert resolve_model(str(hub.answer)) == hub.answer
    monkeypatch.setenv("HOME", str(hub.answer.parent))
    assert resolve_model(f"~/{hub.answer.name}") == hub.answer
    monkeypatch.chdir(hub.answer.parent)
    assert resolve_model(hub.answer.name) == Path(hub.answer.name)
    assert hub.calls == []


def test_directories_that_are_no_checkpoint(tmp_path):
    (tmp_path / "file").write_text("")
    for name, text in ((tmp_path, r"has no config\.json"), (tmp_path / "file", "is a file; give the directory")):
        with pytest.raises(ValueError, match=text):
            resolve_model(str(name))


def test_a_directory_has_no_revision(hub):
    with pytest.raises(ValueError, match="revision is for Hub ids"):
        resolve_model(str(hub.answer), "main")
    with pytest.raises(ValueError, match="revision is for Hub ids"):
        resolve_model("", "main")


@pytest.mark.parametrize(
    "name", ["./a", "../a", "/nowhere/a", "~/nowhere-a", "a/b/c", "a\\b", "a b/c", "a/b:c", ".", "/"]
)
def test_paths_that_are_not_there_ask_nobody(hub, name):
    with pytest.raises(ValueError) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value) and hub.calls == []


def test_a_hub_id(hub):
    assert resolve_model("owner/name", "v2") == hub.answer
    ((name, options),) = hub.calls
    assert name == "owner/name" and options["revision"] == "v2"
    allowed, ignored = options["allow_patterns"], options["ignore_patterns"]
    files = ["model-00001-of-2.safetensors", "config.json", "tokenizer.model", "chat_template.jinja", "merges.txt"]
    other = ["pytorch_model.bin", "model.gguf", "modeling.py", "README.md", "original/a.safetensors"]
    taken = huggingface_hub.utils.filter_repo_objects(files + other, allow_patterns=allowed, ignore_patterns=ignored)
    assert list(taken) == files
    resolve_model("owner/name", remote_code=True)
    assert "*.py" in hub.calls[1][1]["allow_patterns"]


def http_error(kind):
    return kind("two\nlines", response=Response(404, request=Request("GET", "https://example.org")))


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (http_error(errors.GatedRepoError), "it is gated.*hf auth login"),
        (http_error(errors.RepositoryNotFoundError), "no such public repository"),
        (http_error(errors.RevisionNotFoundError), "no such revision"),
        (errors.LocalEntryNotFoundError("offline"), "the Hub cannot be reached"),
        (errors.HFValidationError("bad"), "neither a directory nor a Hub id"),
        (http_error(errors.HfHubHTTPError), "the download failed: two lines"),
        (OSError("disk\nfull"), "the download failed: disk full"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, error, text):
    hub.answer = error
    with pytest.raises(ValueError, match=rf"^model owner/name \(revision r\): .*{text}") as caught:
        resolve_model("owner/name", "r")
    assert "\n" not in str(caught.value)


def test_a_snapshot_without_a_configuration(hub):
    (hub.answer / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        resolve_model("owner/name")
