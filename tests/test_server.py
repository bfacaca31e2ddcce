"""The HTTP server over a front end without an engine: real clients, a real uvicorn, every endpoint."""

import asyncio
import concurrent.futures
import json
import logging
import re
import socket
import threading

import httpx
import openai
import pytest

from moeyard.engine.messages import Stats
from moeyard.launch import server as module
from moeyard.launch import sse
from moeyard.launch.frontend import RequestError

from .fake_frontend import MAX_MODEL_LEN, FakeFrontEnd, error_of, serving, until

TIMEOUT = 20.0  # a bound for what should come at once
PROMPT = "def main(argv):"
SNOWMAN = "x = '\u2603\U0001f600'"


@pytest.fixture(scope="module")
def server():
    with serving(FakeFrontEnd()) as running:
        yield running


@pytest.fixture
def frontend(server):
    """The server's front end, as new."""
    observer = server.frontend.observer
    server.frontend.__init__()
    server.frontend.observer = observer
    return server.frontend


@pytest.fixture
def http(server, frontend):
    with httpx.Client(base_url=server.url, timeout=TIMEOUT) as client:
        yield client


@pytest.fixture
def client(server, frontend):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=TIMEOUT, max_retries=0) as client:
        yield client


def ids_of(frontend, text):
    return frontend.tokenizer(text)["input_ids"]


def repeated(frontend, text, n, start=0):
    """What the fake front end answers to `text` with `n` tokens."""
    ids = ids_of(frontend, text)
    return frontend.tokenizer.decode([ids[(start + k) % len(ids)] for k in range(n)])


def events(text):
    """The `data:` values of an SSE body; its last one must be [DONE]."""
    messages = [part.strip() for part in text.split("\n\n") if part and not part.startswith(":")]
    assert all(message.startswith("data: ") for message in messages), text
    assert messages[-1] == "data: [DONE]"
    return [json.loads(message.removeprefix("data: ")) for message in messages[:-1]]


# Completions through the openai client


def test_completion(client, frontend):
    answer = client.completions.create(model="fake", prompt=PROMPT, max_tokens=4)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert answer.choices[0].text == repeated(frontend, PROMPT, 4)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(ids_of(frontend, PROMPT))
    assert answer.usage.completion_tokens == 4
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 4
    assert answer.usage.prompt_tokens_details.cached_tokens == 1


def test_completion_takes_16_tokens_by_default(client):
    assert client.completions.create(model="fake", prompt=PROMPT).usage.completion_tokens == 16


def test_several_prompts_have_groups_of_choices(client, frontend):
    prompts = [PROMPT, "x = 1", "import os"]
    answer = client.completions.create(model="fake", prompt=prompts, max_tokens=3, n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    expected = [repeated(frontend, prompt, 3, start) for prompt in prompts for start in range(2)]
    assert [choice.text for choice in answer.choices] == expected
    assert answer.usage.prompt_tokens == sum(len(ids_of(frontend, p)) for p in prompts)
    assert answer.usage.completion_tokens == 18
    assert len({call[0] for call in frontend.calls}) == 3


def test_token_ids_as_prompts(client, frontend):
    ids = [ids_of(frontend, PROMPT), ids_of(frontend, "x = 1")]
    one = client.completions.create(model="fake", prompt=ids[0], max_tokens=3)
    assert one.choices[0].text == repeated(frontend, PROMPT, 3)
    two = client.completions.create(model="fake", prompt=ids, max_tokens=3, echo=True)
    assert two.choices[1].text == "x = 1" + repeated(frontend, "x = 1", 3)


@pytest.mark.parametrize("stream", [False, True])
def test_echo(http, frontend, stream):
    body = {"prompt": PROMPT, "max_tokens": 3, "echo": True, "stream": stream}
    answer = http.post("/v1/completions", json=body)
    chunks = events(answer.text) if stream else [answer.json()]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == PROMPT + repeated(frontend, PROMPT, 3)


def test_stop_strings_and_reason(client):
    answer = client.completions.create(model="fake", prompt=PROMPT, stop=["zzz", "argv"], max_tokens=50)
    assert answer.choices[0].text == "def main("
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == "argv"
    kept = client.completions.create(
        model="fake", prompt=PROMPT, stop="argv", extra_body={"include_stop_str_in_output": True}
    )
    assert kept.choices[0].text == "def main(argv"


def test_completion_logprobs(client, frontend):
    answer = client.completions.create(model="fake", prompt=PROMPT, max_tokens=4, logprobs=5)
    logprobs = answer.choices[0].logprobs
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.token_logprobs == [0.0, -0.25, -0.5, -0.75]
    offsets = [0]
    for token in logprobs.tokens[:-1]:
        offsets.append(offsets[-1] + len(token))
    assert logprobs.text_offset == offsets
    assert all(
        len(top) == 5 and token in top for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True)
    )
    assert min(logprobs.top_logprobs[0].values()) == -9999.0, "JSON has no infinity"
    alone = client.completions.create(model="fake", prompt=PROMPT, max_tokens=2, logprobs=0).choices[0].logprobs
    assert alone.top_logprobs == [{"def": 0.0}, {" main": -0.25}]


def test_streamed_completion_is_the_whole_one_in_pieces(client):
    options = dict(model="fake", prompt=[SNOWMAN, PROMPT], max_tokens=20, n=2, logprobs=1, stop=["zzz"])
    whole = client.completions.create(**options)
    texts, reasons = [""] * 4, [None] * 4
    logprobs: list = [[] for _ in range(4)]
    offsets: list = [[] for _ in range(4)]
    for chunk in client.completions.create(**options, stream=True):
        for choice in chunk.choices:
            assert reasons[choice.index] is None, "nothing after the end"
            texts[choice.index] += choice.text
            logprobs[choice.index] += choice.logprobs.token_logprobs
            offsets[choice.index] += choice.logprobs.text_offset
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert "\u2603\U0001f600" in texts[0]
    assert logprobs == [choice.logprobs.token_logprobs for choice in whole.choices]
    assert offsets == [choice.logprobs.text_offset for choice in whole.choices]
    assert reasons == ["length"] * 4


# Chat


def test_chat(client, frontend):
    answer = client.chat.completions.create(
        model="fake",
        messages=[{"role": "system", "content": "a"}, {"role": "user", "content": PROMPT}],
        max_completion_tokens=5,
    )
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.role == "assistant"
    rendered = f"a\n{PROMPT}\n"
    assert frontend.calls[0][3] == rendered
    assert answer.choices[0].message.content == repeated(frontend, rendered, 5)
    # The answer can be sent back as history.
    client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "a"}, answer.choices[0].message, {"role": "user", "content": "b"}],
        max_tokens=1,
    )


def test_chat_is_bounded_by_the_model_only(client, frontend):
    answer = client.chat.completions.create(model="fake", messages=[{"role": "user", "content": PROMPT}])
    assert answer.usage.total_tokens == MAX_MODEL_LEN
    assert frontend.calls[0][1].max_tokens is None
    assert frontend.calls[0][1].temperature == 1.0


def test_text_parts_are_joined(http, frontend):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}], "max_tokens": 1})
    assert frontend.calls[0][3] == "a\nb\n"


def test_chat_template_variables(http, frontend):
    frontend.tokenizer = FakeFrontEnd().tokenizer.__class__.from_pretrained(frontend.tokenizer.name_or_path)
    frontend.tokenizer.chat_template = (
        "{% if fail %}{{ raise_exception('no such mood') }}{% endif %}"
        "{{ messages[0].content }}|{{ mood }}|{{ add_generation_prompt }}|{{ messages[0].name }}"
    )
    body = {"messages": [{"role": "user", "content": "a", "name": "Ada"}], "max_tokens": 1}
    http.post("/v1/chat/completions", json=body | {"chat_template_kwargs": {"mood": "calm"}}).raise_for_status()
    assert frontend.calls[0][3] == "a|calm|True|Ada"
    http.post("/v1/chat/completions", json=body | {"add_generation_prompt": False}).raise_for_status()
    assert frontend.calls[1][3] == "a||False|Ada"
    refused = http.post("/v1/chat/completions", json=body | {"chat_template_kwargs": {"fail": True}})
    assert "no such mood" in error_of(refused, 400)["message"]
    frontend.tokenizer.chat_template = None
    assert "chat template" in error_of(http.post("/v1/chat/completions", json=body), 400)["message"]


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": SNOWMAN}], max_tokens=8, logprobs=True, top_logprobs=2
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    assert content[1].logprob == -0.25
    assert bytes(content[0].bytes).decode() == content[0].token
    assert any(entry.bytes is None for entry in content), "part of a character has no bytes that its text could tell"
    assert [len(entry.top_logprobs) for entry in content] == [2] * 8


def test_streamed_chat(client, frontend):
    stream = client.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": SNOWMAN}],
        max_tokens=12,
        n=2,
        logprobs=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1
    last = chunks.pop()
    assert last.choices == []
    assert last.usage.completion_tokens == 24
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert own[0].delta.content, "the role comes with the first token"
        assert all(choice.delta.role is None for choice in own[1:])
        text = "".join(choice.delta.content for choice in own)
        assert text == repeated(frontend, SNOWMAN + "\n", 12, index)
        assert sum(len(choice.logprobs.content) for choice in own) == 12
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["length"]
        assert len(own) < 12, "tokens without text are sent with the next that has some"


def test_first_token_without_text_is_sent_at_once(http, frontend):
    frontend.gate = threading.Event()
    ids = ids_of(frontend, "\U0001f600")
    body = {"prompt": ids, "max_tokens": 4, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        first = json.loads(next(lines).removeprefix("data: "))
        assert first["choices"][0]["text"] == ""
        frontend.gate.set()
        text = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {"))
    assert text == "\U0001f600"


def test_usage_in_every_chunk(http):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": PROMPT, "max_tokens": 4, "stream": True, "stream_options": options}
    chunks = events(http.post("/v1/completions", json=body).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 4 and counts[0] >= 1


def test_async_client(server, frontend):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.create(
                model="fake", messages=[{"role": "user", "content": PROMPT}], max_tokens=6
            )
            stream = await client.completions.create(model="fake", prompt=PROMPT, max_tokens=6, stream=True)
            text = "".join([chunk.choices[0].text async for chunk in stream])
            return (await whole).choices[0].message.content, text

    whole, text = asyncio.run(ask())
    assert whole == repeated(frontend, PROMPT + "\n", 6)
    assert text == repeated(frontend, PROMPT, 6)


# Sampling fields


def test_fields_reach_the_sampler(http, frontend):
    body = {
        "prompt": PROMPT, "n": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7,
        "repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.3, "logit_bias": {"5": -1},
        "stop": ["x"], "stop_token_ids": [9], "include_stop_str_in_output": True, "ignore_eos": True,
        "min_tokens": 1, "max_tokens": 3, "logprobs": 2, "skip_special_tokens": False,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "integer"}}},
        "cache_salt": "salt",
    }  # fmt: skip
    http.post("/v1/completions", json=body).raise_for_status()
    _, params, salt, prompt = frontend.calls[0]
    assert salt == "salt" and prompt == PROMPT
    special = {"prompt", "cache_salt", "response_format", "logit_bias", "stop", "stop_token_ids"}
    for name in set(body) - special:
        assert getattr(params, name) == body[name], name
    assert params.logit_bias == {5: -1.0}
    assert params.stop == ("x",) and params.stop_token_ids == (9,)
    assert json.loads(params.json_schema) == {"type": "integer"}


def test_defaults_of_the_checkpoint_lie_under_the_body(http, frontend):
    frontend.defaults = {"temperature": 0.25, "top_k": 20}
    http.post("/v1/completions", json={"prompt": PROMPT, "top_k": 3, "temperature": None}).raise_for_status()
    assert (frontend.calls[0][1].temperature, frontend.calls[0][1].top_k) == (0.25, 3)


def test_json_object_and_parse(client, frontend):
    client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "a"}], response_format={"type": "json_object"}, max_tokens=1
    )
    assert json.loads(frontend.calls[0][1].json_schema) == {"type": "object"}
    client.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "a"}], response_format={"type": "text"}, max_tokens=1
    )
    assert frontend.calls[1][1].json_schema is None


def test_neutral_values_are_accepted(http):
    body = {
        "model": "fake", "messages": [{"role": "user", "content": "a", "tool_calls": None, "refusal": None}],
        "max_tokens": 1, "max_completion_tokens": 1, "tools": [], "tool_choice": "none", "parallel_tool_calls": True,
        "user": "u", "store": False, "metadata": {"a": "b"}, "stop": None, "n": None, "logprobs": False,
        "stream": False, "stream_options": None, "seed": None, "response_format": None,
    }  # fmt: skip
    http.post("/v1/chat/completions", json=body).raise_for_status()
    more = {"prompt": "a", "suffix": "", "best_of": 2, "n": 2, "echo": False, "logprobs": None, "max_tokens": 1}
    http.post("/v1/completions", json=more).raise_for_status()


CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
TEXT = {"prompt": "a", "max_tokens": 1}


@pytest.mark.parametrize(
    ("path", "change", "param"),
    [
        ("chat", {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ("chat", {"tool_choice": "required"}, "tool_choice"),
        ("chat", {"store": True}, "store"),
        ("chat", {"functions": []}, "functions"),
        ("chat", {"max_completion_tokens": 2}, "max_completion_tokens"),
        ("chat", {"max_tokens": None, "max_completion_tokens": 0}, "max_completion_tokens"),
        ("chat", {"top_logprobs": 2}, "top_logprobs"),
        ("chat", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat", {"logprobs": 1}, "logprobs"),
        ("chat", {"messages": []}, "messages"),
        ("chat", {"messages": None}, "messages"),
        ("chat", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("chat", {"messages": [{"role": "king", "content": "a"}]}, "messages[0].role"),
        ("chat", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ("chat", {"messages": [{"role": "user", "content": "a", "mood": 1}]}, "messages[0].mood"),
        ("chat", {"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ("chat", {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ("chat", {"prompt": "a"}, "prompt"),
        ("completions", {"suffix": "s"}, "suffix"),
        ("completions", {"best_of": 3}, "best_of"),
        ("completions", {"echo": True, "logprobs": 1}, "echo"),
        ("completions", {"logprobs": 21}, "logprobs"),
        ("completions", {"logprobs": True}, "logprobs"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [[1], "a"]}, "prompt"),
        ("completions", {"prompt": [1.0]}, "prompt"),
        ("completions", {"prompt": [True]}, "prompt"),
        ("completions", {"prompt": [-1]}, "prompt"),
        ("completions", {"prompt": [4096]}, "prompt"),
        ("completions", {"prompt": "a " * MAX_MODEL_LEN}, "prompt"),
        ("completions", {"prompt": ""}, "prompt"),
        ("completions", {"n": 0}, "n"),
        ("completions", {"n": 65}, "n"),
        ("completions", {"n": "2"}, "n"),
        ("completions", {"max_tokens": 0}, "max_tokens"),
        ("completions", {"min_tokens": 2}, "min_tokens"),
        ("completions", {"temperature": -1}, "temperature"),
        ("completions", {"top_p": 0}, "top_p"),
        ("completions", {"top_k": 2**63}, "top_k"),
        ("completions", {"seed": 2**64}, "seed"),
        ("completions", {"stop": ["a"] * 17}, "stop"),
        ("completions", {"stop": [""]}, "stop"),
        ("completions", {"stop_token_ids": [5000]}, "stop_token_ids"),
        ("completions", {"logit_bias": {"a": 1}}, "logit_bias"),
        ("completions", {"logit_bias": {"1": 101}}, "logit_bias"),
        ("completions", {"logit_bias": {"5000": 1}}, "logit_bias"),
        ("completions", {"logit_bias": [1]}, "logit_bias"),
        ("completions", {"stream_options": {"include_usage": True}}, "stream_options"),
        ("completions", {"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ("completions", {"response_format": {"type": "yaml"}}, "response_format.type"),
        ("completions", {"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ("completions", {"temprature": 1}, "temprature"),
        ("completions", {"stream": "yes"}, "stream"),
    ],
)
def test_refused_bodies_name_the_field(http, path, change, param):
    url, body = ("/v1/chat/completions", CHAT) if path == "chat" else ("/v1/completions", TEXT)
    http.post(url, json=body).raise_for_status()
    error = error_of(http.post(url, json=body | change), 400)
    assert error["param"] == param
    assert param.split(".")[-1] in error["message"] or param == "prompt"


def test_unknown_field_names_the_nearest(client):
    with pytest.raises(openai.BadRequestError, match="unknown field temprature; did you mean temperature") as caught:
        client.completions.create(model="fake", prompt="a", extra_body={"temprature": 1})
    assert caught.value.code == "unknown_field"


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        (b"{", "application/json", "not valid JSON"),
        (b"", "application/json", "JSON object"),
        (b"null", "application/json", "JSON object"),
        (b"[1]", "application/json", "JSON object"),
        (b'"a"', "application/json", "JSON object"),
        (b"\xff\xfe{}", "application/json", ""),
        (b"[" * 100_000, "application/json", ""),
        (b'{"prompt": "a"}', "text/plain", "Content-Type"),
        (b"prompt=a", "application/x-www-form-urlencoded", "Content-Type"),
        (b'{"prompt": "\\ud800"}', "application/json", "Unicode"),
        (b'{"prompt": "a", "stop": "\\ud800"}', "application/json", "Unicode"),
        (b'{"prompt": "a", "cache_salt": "\\ud800"}', "application/json", "Unicode"),
        (b'{"prompt": "a", "\\ud800": 1}', "application/json", ""),
        (b'{"prompt": "a", "temperature": NaN}', "application/json", "temperature"),
        (b'{"prompt": "a", "temperature": 1e999}', "application/json", "temperature"),
        (b'{"prompt": "a", "n": 1' + b"0" * 5000 + b"}", "application/json", ""),
    ],
)
def test_malformed_bodies(http, content, kind, says):
    error = error_of(http.post("/v1/completions", content=content, headers={"content-type": kind}), 400)
    assert says in error["message"]


# The other endpoints


def test_models(client, http):
    models = client.models.list().data
    assert [model.id for model in models] == ["fake"]
    assert models[0].root == "models/fake" and models[0].max_model_len == MAX_MODEL_LEN
    assert client.models.retrieve("fake").id == "fake"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_wrong_model_is_not_found(client):
    for create in (
        lambda: client.completions.create(model="other", prompt="a"),
        lambda: client.chat.completions.create(model="other", messages=[{"role": "user", "content": "a"}]),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            create()
        assert caught.value.code == "model_not_found" and caught.value.param == "model"


def test_tokenize_and_back(http, frontend):
    answer = http.post("/tokenize", json={"model": "fake", "prompt": SNOWMAN, "add_special_tokens": False}).json()
    assert answer == {
        "tokens": ids_of(frontend, SNOWMAN),
        "count": len(ids_of(frontend, SNOWMAN)),
        "max_model_len": MAX_MODEL_LEN,
    }
    assert http.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": SNOWMAN}
    chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]}).json()
    assert chat["tokens"] == ids_of(frontend, "a\n")
    error_of(http.post("/tokenize", json={}), 400)
    error_of(http.post("/tokenize", json={"prompt": "a", "messages": CHAT["messages"]}), 400)
    error_of(http.post("/tokenize", json={"prompt": "a", "add_generation_prompt": True}), 400)
    error_of(http.post("/detokenize", json={"tokens": [4096]}), 400)
    error_of(http.post("/detokenize", json={"tokens": [-1]}), 400)


def test_checkpoint_without_tokenizer(http, frontend):
    frontend.tokenizer = None
    error_of(http.post("/v1/completions", json=TEXT), 400)
    error_of(http.post("/v1/chat/completions", json=CHAT), 400)
    error_of(http.post("/detokenize", json={"tokens": [1]}), 400)


def test_state_of_the_engine(http, frontend):
    ready = frontend.ready
    assert http.get("/health").json() == {"status": "ok", "ranks": {"0": "ok"}, "trouble": ""}
    assert http.get("/ready").status_code == 200
    assert http.get("/version").json()["version"]

    frontend.ready, frontend.alive = None, False
    assert http.get("/health").json() == {"status": "loading", "ranks": {"0": "loading"}, "trouble": ""}
    loading = http.post("/v1/completions", json=TEXT)
    assert error_of(loading, 503)["code"] == "loading" and int(loading.headers["retry-after"]) >= 1
    error_of(http.get("/ready"), 503)
    error_of(http.get("/v1/models"), 503)

    frontend.ready, frontend.dead_reason = ready, "killed by SIGKILL"
    for answer in (http.get("/health"), http.get("/ready"), http.post("/v1/completions", json=TEXT)):
        error = error_of(answer, 503)
        assert error["code"] == "engine_dead" and "SIGKILL" in error["message"]
    assert http.get("/metrics").status_code == 200

    frontend.alive, frontend.draining = True, True
    for answer in (http.get("/health"), http.get("/ready"), http.post("/v1/completions", json=TEXT)):
        assert error_of(answer, 503)["code"] == "shutting_down"


def test_expert_load():
    frontend = FakeFrontEnd()
    with serving(frontend) as server, httpx.Client(base_url=server.url) as http:
        check_expert_load(http, frontend)


def check_expert_load(http, frontend):
    assert http.get("/moe/experts").json() == {"layers": []}
    frontend.observer.on_stats(Stats(expert_counts=[[1, 3, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0]]))
    frontend.observer.on_stats(Stats())
    even = {"assignments": 8, "balancedness": 1.0, "top_expert": 0, "top_share": 0.25}
    skewed = {"assignments": 4, "balancedness": pytest.approx(1 / 3), "top_expert": 1, "top_share": 0.75}
    assert http.get("/moe/experts").json()["layers"] == [
        skewed | {"layer": 0, "counts": [1, 3, 0, 0]},
        even | {"layer": 1, "counts": [2, 2, 2, 2]},
    ]


def test_errors_of_the_router(http):
    error_of(http.get("/v1/nothing"), 404)
    refused = http.get("/v1/completions")
    error_of(refused, 405)
    assert refused.headers["allow"] == "POST"


def test_too_large_bodies(http):
    error_of(http.post("/v1/completions", content=b" " * (32 * 2**20 + 1)), 413)
    pieces = (b" " * 2**20 for _ in range(33))
    error_of(http.post("/v1/completions", content=pieces, headers={"content-type": "application/json"}), 413)
    fits = b'{"prompt": "a"' + b" " * (32 * 2**20 - 15) + b"}"
    assert http.post("/v1/completions", content=fits, headers={"content-type": "application/json"}).status_code == 200


def test_a_bug_of_ours_is_a_500_with_an_id(http, frontend, monkeypatch):
    monkeypatch.setattr(frontend, "default_params", lambda: 1 / 0)
    answer = http.post("/v1/completions", json=TEXT)
    error = error_of(answer, 500)
    assert "division" not in error["message"] and answer.headers["x-request-id"]


# Request ids, keys, overload


def test_request_ids(http, frontend):
    answer = http.post("/v1/completions", json=TEXT, headers={"x-request-id": "my-id.7"})
    assert answer.headers["x-request-id"] == "my-id.7"
    assert answer.json()["id"] == "cmpl-my-id.7" == frontend.calls[0][0]
    made = [http.get(path).headers["x-request-id"] for path in ("/health", "/nothing")]
    assert made[0] and made[0] != made[1]
    dirty = http.get("/health", headers={"x-request-id": "a b\t<c>" + "d" * 500}).headers["x-request-id"]
    assert dirty.startswith("abcd") and len(dirty) == 128
    assert http.post("/v1/completions", content=b"{", headers={"x-request-id": "bad"}).headers["x-request-id"] == "bad"


def test_ids_in_use_are_made_unique(server, http, frontend):
    frontend.gate = threading.Event()

    def ask(_):
        return httpx.post(
            f"{server.url}/v1/completions",
            json=TEXT | {"max_tokens": 3},
            headers={"x-request-id": "same"},
            timeout=TIMEOUT,
        )

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(ask, i) for i in range(3)]
        until(lambda: len(frontend.calls) == 3)
        frontend.gate.set()
        bodies = [answer.result().json() for answer in answers]
    ids = {body["id"] for body in bodies}
    assert len(ids) == 3 and all(name.startswith("cmpl-same") for name in ids)
    assert ask(0).json()["id"] == "cmpl-same", "free again"


def test_api_key():
    frontend = FakeFrontEnd()
    with serving(frontend, api_key="secret") as server, httpx.Client(base_url=server.url) as http:
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
            for path in ("/v1/models", "/moe/experts", "/admin/placement", "/nothing"):
                answer = http.get(path, headers=header)
                assert error_of(answer, 401)["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer" and answer.headers["x-request-id"]
            error_of(http.post("/v1/completions", json=TEXT, headers=header), 401)
            error_of(http.post("/tokenize", json={"prompt": "a"}, headers=header), 401)
        for path in ("/health", "/ready", "/version", "/metrics", "/openapi.json"):
            assert http.get(path).status_code == 200
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0)
        assert client.models.list().data[0].id == "fake"
        assert not frontend.calls


def test_what_can_never_be_served_is_a_400_even_when_the_queue_is_full(client, frontend, monkeypatch):
    def full(tokens):
        raise RequestError("the queue is full", status=503, code="queue_full", retry_after=7)

    def too_long(prompt_ids, params):
        raise RequestError("too long", status=400, param="prompt", code="context_length_exceeded")

    monkeypatch.setattr(frontend, "admit", full)
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model=frontend.model_name, prompt="x")
    monkeypatch.setattr(frontend, "check", too_long)
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=frontend.model_name, prompt="x")
    assert error.value.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue_is_a_503_with_retry_after(client, frontend, stream):
    frontend.refusal = RequestError("the queue is full", status=503, code="queue_full", retry_after=7)
    with pytest.raises(openai.InternalServerError) as caught:
        client.completions.create(model="fake", prompt="a", stream=stream)
    assert caught.value.status_code == 503 and caught.value.code == "queue_full"
    assert caught.value.response.headers["retry-after"] == "7"


def test_refusals_of_a_stream_come_as_a_status(http):
    body = {"prompt": ["a", "a " * MAX_MODEL_LEN], "stream": True}
    assert error_of(http.post("/v1/completions", json=body), 400)["code"] == "context_length_exceeded"


# Streams that break, clients that go


@pytest.mark.parametrize("stream", [False, True])
def test_failure_in_the_middle(http, frontend, stream):
    frontend.fail_after = 2
    answer = http.post("/v1/completions", json=TEXT | {"max_tokens": 9, "stream": stream})
    if not stream:
        assert error_of(answer, 503)["code"] == "engine_dead"
        return
    assert answer.status_code == 200
    *chunks, last = events(answer.text)
    assert chunks and all(chunk["choices"] for chunk in chunks)
    assert last["error"]["code"] == "engine_dead" and "engine died" in last["error"]["message"]


def test_the_openai_client_raises_on_an_error_event(client, frontend):
    frontend.fail_after = 2
    seen = []
    with pytest.raises(openai.APIError, match="engine died"):
        seen.extend(client.completions.create(model="fake", prompt="a", max_tokens=9, stream=True))


def test_a_bug_in_a_stream_is_an_error_event(http, frontend, monkeypatch):
    frontend.pause = 0.01
    made = frontend._made

    def broken(index, token_ids, *rest):
        return made(index, token_ids, *rest) if len(token_ids) < 3 else 1 / 0

    monkeypatch.setattr(frontend, "_made", broken)
    *_, last = events(http.post("/v1/completions", json=TEXT | {"max_tokens": 9, "stream": True}).text)
    assert last["error"]["type"] == "server_error" and "division" not in last["error"]["message"]


@pytest.mark.parametrize("gate_at", [0, 1])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_aborts(server, frontend, stream, gate_at):
    frontend.gate, frontend.gate_at = threading.Event(), gate_at
    body = json.dumps({"prompt": ["a b", "c d"], "n": 2, "max_tokens": 9, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    address = server.server.servers[0].sockets[0].getsockname()
    with socket.create_connection(address, TIMEOUT) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        if stream and gate_at:
            received = b""
            while b"data: " not in received:
                received += connection.recv(2**16)
        until(lambda: len(frontend.running) == 2)
    assert frontend.abort_seen.wait(TIMEOUT)
    until(lambda: not frontend.running)
    assert len(frontend.aborted) == 2
    frontend.gate.set()
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_an_aborted_id_is_free_again(server, http, frontend):
    frontend.gate = threading.Event()
    header = {"x-request-id": "same"}
    with http.stream(
        "POST", "/v1/completions", json=TEXT | {"max_tokens": 9, "stream": True}, headers=header
    ) as answer:
        next(answer.iter_lines())
    assert frontend.abort_seen.wait(TIMEOUT)
    frontend.gate.set()
    assert http.post("/v1/completions", json=TEXT, headers=header).json()["id"] == "cmpl-same"


def test_pings_in_silence(http, frontend, monkeypatch):
    monkeypatch.setattr(sse, "PING_SECONDS", 0.02)
    frontend.gate = threading.Event()
    with http.stream("POST", "/v1/completions", json=TEXT | {"max_tokens": 3, "stream": True}) as answer:
        lines = []
        for line in answer.iter_lines():
            lines.append(line)
            if lines.count(": ping") == 2:
                frontend.gate.set()
    assert lines.count(": ping") >= 2
    assert len(events("\n".join(lines))) >= 2


def test_a_slow_reader_costs_no_memory_and_loses_nothing(http, frontend):
    """Outputs that were not sent yet are replaced by newer ones; the text is complete all the same."""
    with http.stream("POST", "/v1/completions", json={"prompt": PROMPT, "max_tokens": 400, "stream": True}) as answer:
        until(lambda: frontend.calls and not frontend.running)  # all is generated before the first read
        text = "".join(event["choices"][0]["text"] for event in events(answer.read().decode()))
    assert text == repeated(frontend, PROMPT, 400)


# The wire contract of `vllm bench serve`


def bench_events(response):
    """As that client reads: messages parted by a blank line, comments skipped, `data: ` cut, [DONE] not parsed."""
    buffer = ""
    for piece in response.iter_text():
        buffer += piece
        while "\n\n" in buffer:
            message, buffer = buffer.split("\n\n", 1)
            message = message.strip()
            if message and not message.startswith(":"):
                data = message.removeprefix("data: ")
                yield None if data == "[DONE]" else json.loads(data)
    assert not buffer.strip()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_vllm_bench_serve(http, frontend, path):
    card = http.get("/v1/models").json()["data"][0]
    assert card["id"] and card["root"]
    tokens = http.post("/tokenize", json={"model": card["id"], "prompt": PROMPT, "add_special_tokens": False}).json()
    text = http.post("/detokenize", json={"model": card["id"], "tokens": tokens["tokens"]}).json()["prompt"]
    payload = {
        "model": card["id"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
    }
    if path.endswith("chat/completions"):
        content = [{"type": "text", "text": text}]
        payload |= {"messages": [{"role": "user", "content": content}], "max_completion_tokens": 8}
    else:
        payload |= {"prompt": text, "max_tokens": 8, "logprobs": None, "repetition_penalty": 1.0}
    headers = {"x-request-id": "bench-0", "authorization": "Bearer unused"}
    with http.stream("POST", path, json=payload, headers=headers) as response:
        assert response.status_code == 200
        received = list(bench_events(response))
    assert received[-1] is None, "[DONE] ends it"
    with_choices = [event for event in received[:-1] if event.get("choices")]
    first = with_choices[0]["choices"][0]
    assert first.get("text") or first["delta"]["content"], "what is timed as the first token is one"
    usage = [event for event in received[:-1] if not event.get("choices")]
    assert len(usage) == 1 and usage[0]["usage"]["completion_tokens"] == 8
    pieces = [event["choices"][0] for event in with_choices]
    produced = "".join(piece["text"] if "text" in piece else piece["delta"]["content"] for piece in pieces)
    source = text if path == "/v1/completions" else text + "\n"
    assert produced == repeated(frontend, source, 8)


def test_log_lines_have_time_level_and_name(monkeypatch, capsys):
    root, ours = logging.getLogger(), logging.getLogger("moeyard")
    levels = root.level, ours.level
    monkeypatch.setattr(root, "handlers", [])
    try:
        module._log_to_stderr()
        logging.getLogger("moeyard.frontend").info("a rank was lost")
        logging.getLogger("httpx").info("a library's progress")
        logging.getLogger("uvicorn.error").warning("a library's warning")
    finally:
        root.setLevel(levels[0])
        ours.setLevel(levels[1])
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    lines = rf"{time} INFO moeyard.frontend: a rank was lost\n{time} WARNING uvicorn.error: a library's warning\n"
    assert re.fullmatch(lines, capsys.readouterr().err)
