"""No body whatever makes the server fail: from its own OpenAPI document, and from valid bodies with parts replaced."""

import json

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moeyard.launch.protocol import Body, ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

from .fake_frontend import FakeFrontEnd, serving

STATUSES = {200, 400, 401, 404, 405, 413}
quick = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def server():
    with serving(FakeFrontEnd()) as running:
        yield running


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=20) as client:
        yield client


@pytest.fixture(scope="module")
def document(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def check(response):
    assert response.status_code in STATUSES, f"{response.status_code}: {response.text}"
    if response.status_code >= 400:
        error = json.loads(response.text)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert response.headers.get("x-request-id")


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_openapi_document(document, mode):
    tried = 0
    for operation in document.get_all_operations():
        operation = operation.ok()
        if mode.is_negative and operation.method == "get":
            continue  # nothing to get wrong

        @quick
        @given(case=operation.as_strategy(generation_mode=mode))
        def call(case):
            check(case.call(timeout=20))

        call()
        tried += 1
    assert tried == (5 if mode.is_negative else 13)


def test_the_document_has_every_endpoint_and_no_422(http):
    paths = http.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/{name}",
        "/tokenize",
        "/detokenize",
        "/health",
        "/ready",
        "/version",
        "/metrics",
        "/moe/experts",
        "/admin/placement",
    }
    for operations in paths.values():
        for operation in operations.values():
            assert "422" not in operation["responses"] and "default" in operation["responses"]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["user", "text", "json_object", "fake", "\ud800", "<|endoftext|>", "{{ 1/0 }}", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
VALID: dict[str, tuple[type[Body], dict]] = {
    "/v1/chat/completions": (ChatRequest, {"messages": [{"role": "user", "content": "a b c"}], "max_tokens": 3}),
    "/v1/completions": (CompletionRequest, {"prompt": ["a b", "c"], "max_tokens": 3}),
    "/tokenize": (TokenizeRequest, {"prompt": "a b"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [1, 2]}),
}


@pytest.mark.parametrize("path", VALID)
@settings(quick, max_examples=70)
@given(data=st.data())
def test_replaced_fields(http, path, data):
    model, body = VALID[path]
    names = st.sampled_from([*sorted(model.model_fields), "", "unknown"])
    body = body | data.draw(st.dictionaries(names, json_values, max_size=3))
    content = json.dumps(body).encode()
    check(http.post(path, content=content, headers={"content-type": "application/json"}))


@settings(quick, max_examples=70)
@given(
    content=st.binary(max_size=40)
    | st.text(max_size=40).map(str.encode)
    | json_values.map(lambda v: json.dumps(v).encode())
)
def test_any_bytes(http, content):
    for kind in ("application/json", "text/plain"):
        check(http.post("/v1/completions", content=content, headers={"content-type": kind}))


part = st.dictionaries(st.sampled_from(["type", "text", "image_url"]), json_values, max_size=3)
message = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "king"]) | json_values,
        "content": st.text(max_size=5) | st.lists(part, max_size=3) | json_values,
        "name": json_values,
        "tool_calls": json_values,
    },
)


@settings(quick, max_examples=70)
@given(messages=st.lists(message, max_size=3), kwargs=st.dictionaries(st.text(max_size=12), json_values, max_size=2))
def test_messages(http, messages, kwargs):
    body = {"messages": messages, "chat_template_kwargs": kwargs, "max_tokens": 1}
    content = json.dumps(body).encode()
    check(http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"}))
