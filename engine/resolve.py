"""What the user calls a model, turned into a directory."""

from __future__ import annotations

import re
from pathlib import Path

EMBEDDED = Path(__file__).resolve().parent / "reference_model"
"""The small trained checkpoint that ships in the package."""

_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "tokenizer*", "merges.txt", "vocab.txt"]
_NOT_READ = ["*/*", "consolidated*"]  # other formats and duplicates of the same weights
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_model(model: str, revision: str | None = None, *, remote_code: bool = False) -> Path:
    """The checkpoint's directory: the embedded one for "", a directory itself, or a Hub id's snapshot.

    A snapshot is downloaded to the Hub's cache, with progress bars; `remote_code` takes the checkpoint's Python files
    too. Raises ValueError, in one line that says what to do, when there is no such checkpoint.
    """
    path = Path(model).expanduser() if model else EMBEDDED
    if path.exists():
        if revision is not None:
            raise ValueError(f"revision is for Hub ids, and {path} is a directory; leave revision out")
        return _checked(path)
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1 or "\\" in model
    if looks_like_path or not _HUB_ID.fullmatch(model):
        raise ValueError(f"model: there is no directory {model!r}; give a checkpoint directory or a Hub id")
    return _checked(_download(model, revision, remote_code))


def _checked(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"model: {path} is a file; give the directory that holds config.json and the weights")
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model: {path} has no config.json; give a directory in the Hugging Face format"
            " (config.json, *.safetensors, tokenizer.json)"
        )
    return path


def _download(model: str, revision: str | None, remote_code: bool) -> Path:
    from huggingface_hub import errors, snapshot_download

    name = model if revision is None else f"{model} (revision {revision})"
    patterns = [*_FILES, "*.py"] if remote_code else _FILES
    try:
        path = snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=_NOT_READ)
    except errors.GatedRepoError:
        reason = "it is gated: accept its terms on the Hub, then log in with `hf auth login`"
    except errors.RepositoryNotFoundError:
        reason = "there is no such directory, and no such public repository; check the spelling or `hf auth login`"
    except errors.RevisionNotFoundError:
        reason = "the repository has no such revision; check --revision"
    except errors.LocalEntryNotFoundError:
        reason = "there is no such directory, and the Hub cannot be reached; check the network or give a directory"
    except errors.HFValidationError:
        reason = "it is neither a directory nor a Hub id (owner/name)"
    except (errors.HfHubHTTPError, OSError) as error:
        reason = "the download failed: " + " ".join(str(error).split())
    else:
        return Path(path)
    raise ValueError(f"model {name}: {reason}")
