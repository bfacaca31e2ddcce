"""`moeyard generate` over a stand-in for the model: what it asks for and what it prints."""

import sys
import types

import pytest

from moeyard.__main__ import main
from moeyard.engine.params import SamplingParams
from moeyard.launch.outputs import CompletionOutput, RequestOutput


class Tokenizer:
    chat_template = "yes"

    def apply_chat_template(self, messages, *, add_generation_prompt, tokenize):
        assert add_generation_prompt and not tokenize
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"

    def __call__(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return types.SimpleNamespace(input_ids=[ord(c) for c in text])


class FakeLLM:
    """Answers "one two three"; keeps what it was asked."""

    last: "FakeLLM"

    def __init__(self, **options):
        self.options, self.calls, self.closed = options, [], False
        self.tokenizer = Tokenizer()
        FakeLLM.last = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def default_params(self):
        return SamplingParams(temperature=0.6, top_p=0.9)

    def stream(self, prompt, params):
        self.calls.append(("stream", prompt, params))
        for text in ("one", "one two", "one two", "one two three"):
            yield self._output(text)

    def generate(self, prompt, params):
        self.calls.append(("generate", prompt, params))
        return [self._output("one two three")]

    def _output(self, text):
        outputs = [CompletionOutput(index=0, text=text)]
        return RequestOutput(request_id="r", prompt=None, prompt_token_ids=[], outputs=outputs)


@pytest.fixture(autouse=True)
def fake_llm(monkeypatch):
    module = types.ModuleType("moeyard.launch.llm")
    vars(module)["LLM"] = FakeLLM
    monkeypatch.setitem(sys.modules, "moeyard.launch.llm", module)


@pytest.mark.parametrize(
    ("option", "method"), [((), "stream"), (("--stream",), "stream"), (("--no-stream",), "generate")]
)
def test_prints_the_text_once(option, method, capsys):
    assert main(["generate", "def main(", *option]) == 0
    assert capsys.readouterr().out == "one two three\n"
    assert FakeLLM.last.closed
    ((used, prompt, params),) = FakeLLM.last.calls
    assert (used, prompt) == (method, "def main(")
    assert params == SamplingParams(temperature=0.6, top_p=0.9, max_tokens=128)


def test_options_reach_the_sampler_and_the_engine():
    argv = "--max-tokens 7 --temperature 0 --top-p 0.5 --top-k 3 --seed 9 --model m --dtype float32 --no-progress"
    assert main(["generate", "p", *argv.split()]) == 0
    params = FakeLLM.last.calls[0][2]
    assert params == SamplingParams(max_tokens=7, temperature=0, top_p=0.5, top_k=3, seed=9)
    options = FakeLLM.last.options
    assert (options["model"], options["dtype"], options["progress"]) == ("m", "float32", False)


def test_chat_goes_through_the_template(capsys):
    assert main(["generate", "hi", "--chat"]) == 0
    assert FakeLLM.last.calls[0][1] == {"prompt_token_ids": [ord(c) for c in "<user>hi<assistant>"]}


def test_chat_without_a_template_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(Tokenizer, "chat_template", None)
    assert main(["generate", "hi", "--chat"]) == 2
    assert capsys.readouterr().err == "moeyard: error: --chat: the checkpoint has no chat template; leave --chat out\n"


def test_a_bad_sampling_value_is_an_error(capsys):
    assert main(["generate", "hi", "--top-p", "2"]) == 2
    assert "top_p is 2.0; it must be above 0" in capsys.readouterr().err
    assert FakeLLM.last.closed


def test_every_sampling_option_reaches_the_request():
    words = "--min-p 0.1 --stop a --stop b --stop-token-ids 5 --ignore-eos --min-tokens 2 --frequency-penalty 0.5"
    assert main(["generate", "x", *words.split()]) == 0
    ((_, _, given),) = FakeLLM.last.calls
    assert (given.min_p, given.stop, given.stop_token_ids) == (0.1, ("a", "b"), (5,))
    assert (given.ignore_eos, given.min_tokens, given.frequency_penalty) == (True, 2, 0.5)
    assert (given.temperature, given.max_tokens) == (0.6, 128)
