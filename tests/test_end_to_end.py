"""The real `openai` client against the real server on the embedded checkpoint, endpoint by endpoint."""

import json
import time

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoTokenizer

from moeyard.engine.resolve import EMBEDDED
from moeyard.launch.demo import KEY, running_server

WAIT_SECONDS = 60


@pytest.fixture(scope="module")
def url():
    with running_server() as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def model(client):
    (only,) = client.models.list().data
    assert only.root
    return only.id


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120) as http:
        yield http


def gauges(http):
    """Every sample of /metrics by name, labels dropped."""
    text = http.get("/metrics").text
    return {s.name: s.value for family in text_string_to_metric_families(text) for s in family.samples}


def until(condition):
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_completion_and_stream_agree(client, model):
    options = {"model": model, "prompt": "def main(", "temperature": 0, "max_tokens": 24}
    whole = client.completions.create(**options)
    assert whole.usage.completion_tokens == 24 and whole.choices[0].finish_reason == "length"
    stream = client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24


def test_chat_streams_a_role_with_the_first_token(client, model):
    messages = [{"role": "user", "content": "Write a loop."}]
    options = {"model": model, "messages": messages, "temperature": 0, "max_completion_tokens": 16}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content


def test_choices_seeds_and_logprobs(client, model):
    options = {
        "model": model,
        "prompt": "import ",
        "n": 3,
        "seed": 5,
        "temperature": 1.0,
        "max_tokens": 12,
        "logprobs": 2,
    }
    first, again = (client.completions.create(**options) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) > 1
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    logprobs = first.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 12
    assert "".join(logprobs.tokens) == texts[0]
    assert all(value <= 0 for value in logprobs.token_logprobs)


def test_stop_strings_end_the_text(client, model):
    options = {"model": model, "prompt": "def main(", "temperature": 0, "max_tokens": 40}
    free = client.completions.create(**options).choices[0].text
    stop = free[10:13]
    stopped = client.completions.create(**options, stop=[stop]).choices[0]
    assert stopped.text == free[: free.index(stop)]
    assert stopped.finish_reason == "stop"


def test_json_schema(client, model):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 10}, "count": {"type": "integer", "maximum": 99}},
        "required": ["name", "count"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "Name and count."}],
        response_format={"type": "json_schema", "json_schema": {"name": "thing", "schema": schema}},
        max_tokens=150,
        seed=1,
    )
    assert set(json.loads(answer.choices[0].message.content)) == {"name", "count"}


def test_prefixes_are_reused_and_salts_are_not(client, model):
    prompt = "class Queue:\n    def __init__(self):\n" * 6
    options = {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 0}

    def cached(**extra):
        usage = client.completions.create(**options, extra_body=extra).usage
        return usage.prompt_tokens_details.cached_tokens

    cached()
    assert cached() > 0
    assert cached(cache_salt="mine") == 0
    assert cached(cache_salt="mine") > 0


def test_tokenize_and_back(http, model):
    text = "def main():\n    pass"
    tokens = http.post("/tokenize", json={"model": model, "prompt": text}).json()["tokens"]
    assert tokens == AutoTokenizer.from_pretrained(EMBEDDED)(text)["input_ids"]
    assert http.post("/detokenize", json={"model": model, "tokens": tokens}).json()["prompt"] == text


def test_state_endpoints(http):
    assert http.get("/health").status_code == http.get("/ready").status_code == 200
    assert http.get("/version").json()["version"]
    layers = http.get("/moe/experts").json()["layers"]
    assert len(layers) == 8 and all(len(layer["counts"]) == 32 for layer in layers)


def test_refusals_name_the_field(client, model):
    with pytest.raises(openai.BadRequestError, match="no_such_field"):
        client.completions.create(model=model, prompt="x", extra_body={"no_such_field": 1})
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=model, prompt=[1] * 3000, max_tokens=1)
    assert error.value.code == "context_length_exceeded" and "3000" in str(error.value)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="x")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_many_prompts_in_one_call(client, model):
    """More prompt tokens than the queue holds, as one call: admitted once, and answered in order."""
    prompts = [[7, i % 50, 9, 11] * 150 for i in range(230)]
    assert sum(map(len, prompts)) > 131072
    answer = client.completions.create(model=model, prompt=prompts, max_tokens=1, temperature=0)
    assert [choice.index for choice in answer.choices] == list(range(230))


def test_a_client_that_leaves_frees_everything(client, model, http):
    stream = client.completions.create(model=model, prompt="x = ", max_tokens=1500, stream=True)
    next(iter(stream))
    until(lambda: gauges(http)["moeyard:num_requests_running"] == 1)
    stream.close()
    until(lambda: gauges(http)["moeyard:num_requests_running"] == 0)
    until(lambda: gauges(http)["moeyard:kv_cache_usage_perc"] == 0)


def test_metrics_count_what_was_done(client, model, http):
    def done():
        seen = gauges(http)
        return seen["moeyard:generation_tokens_total"], seen["moeyard:time_to_first_token_seconds_count"]

    until(lambda: gauges(http)["moeyard:num_requests_running"] == 0)
    time.sleep(0.5)
    tokens, requests = done()
    client.completions.create(model=model, prompt="x = ", max_tokens=7, extra_body={"ignore_eos": True})
    until(lambda: done() == (tokens + 7, requests + 1))
    text = http.get("/metrics").text
    assert "moe_expert_balancedness{" in text and "moe_expert_top_share{" in text
