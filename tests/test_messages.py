"""Messages between processes: what is sent arrives, and nothing else is accepted."""

import dataclasses
from typing import get_type_hints

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.engine import messages
from moeyard.engine.messages import MESSAGES, VERSION, MessageError, TokenDelta, VersionError, decode, encode

ints = st.integers(-(2**63), 2**64 - 1)
plain = st.recursive(
    st.none() | st.booleans() | ints | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | ints, inner, max_size=3),
    max_leaves=8,
)
VALUES = {
    int: ints,
    float: st.floats(allow_nan=False),
    str: st.text(),
    bool: st.booleans(),
    type(None): st.none(),
    list: st.lists(plain, max_size=3),
    list[int]: st.lists(ints, max_size=5),
    list[str]: st.lists(st.text(), max_size=5),
    list[list[int]]: st.lists(st.lists(ints, max_size=3), max_size=3),
    dict: st.dictionaries(st.text() | ints, plain, max_size=3),
}


def value_of(hint):
    """A strategy for a field's annotation."""
    options = getattr(hint, "__args__", ()) if isinstance(hint, type(int | None)) else (hint,)
    return st.one_of(*(VALUES.get(o, VALUES.get(getattr(o, "__origin__", o))) for o in options))


def built(cls):
    return st.builds(cls, **{name: value_of(hint) for name, hint in get_type_hints(cls).items()})


any_message = st.one_of(*(built(cls) for cls in MESSAGES.values()))


@settings(deadline=None)
@given(any_message)
def test_round_trip(message):
    assert decode(encode(message)) == message


@settings(deadline=None)
@given(built(TokenDelta))
def test_delta_round_trip(delta):
    sent = messages.Tokens(deltas=[messages.pack_delta(delta)])
    assert messages.unpack_delta(decode(encode(sent)).deltas[0]) == delta


@settings(deadline=None)
@given(any_message, st.data())
def test_tampered_bytes_are_refused_or_a_message(message, data):
    good = encode(message)
    at = data.draw(st.integers(0, len(good) - 1))
    bad = good[:at] + data.draw(st.binary(max_size=4)) + good[at + data.draw(st.integers(0, 4)) :]
    try:
        again = decode(bad)
    except MessageError:
        return
    assert decode(encode(again)) == again


@settings(deadline=None)
@given(st.binary(max_size=64))
def test_noise_is_refused(data):
    with pytest.raises(MessageError):
        decode(data + b"\xc1")  # a byte that msgpack never uses


def array(*values):
    return msgpack.packb(list(values))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (array(VERSION + 1, 4, 1), f"version {VERSION + 1}"),
        (array(True, 4, 1), "version True"),
        (array(1.0, 4, 1), "version 1.0"),
        (array(None, 4, 1), "version None"),
    ],
)
def test_other_versions(data, text):
    with pytest.raises(VersionError, match=text):
        decode(data)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (array(VERSION, 99, 1), "unknown message tag 99"),
        (array(VERSION, True, {}), "unknown message tag True"),
        (array(VERSION, "4", 1), "unknown message tag '4'"),
        (array(VERSION, [4], 1), "unknown message tag"),
        (array(VERSION, 4), "Ping has 0 fields"),
        (array(VERSION, 4, 1, 2), "Ping has 2 fields"),
        (array(VERSION, 4, "1"), "Ping.number is str; it must be int"),
        (array(VERSION, 4, True), "Ping.number is bool"),
        (array(VERSION, 2, "a", [1, "b"], {}, "", []), "Submit.prompt_ids must hold only int"),
        (array(VERSION, 2, "a", [1, True], {}, "", []), "Submit.prompt_ids must hold only int"),
        (array(VERSION, 3, ["a", 1]), "Abort.request_ids must hold only str"),
        (array(VERSION), "an array of version"),
        (msgpack.packb({"version": 1}), "an array of version"),
        (msgpack.packb([VERSION, 4, 1])[:-1], "not msgpack"),
        (msgpack.packb([VERSION, 4, 1]) + b"\x00", "not msgpack"),
        (b"\x91" * 5000, "not msgpack"),
        (b"\x93\x01\x04\xa1\xff", "not msgpack"),
    ],
)
def test_refused_with_a_reason(data, text):
    with pytest.raises(MessageError, match=text):
        decode(data)


@pytest.mark.parametrize("values", [[], None, "delta", ["a", [1]], ["a", ["x"], None, "", None, 0, 0.0, 0.0, ""]])
def test_bad_deltas(values):
    with pytest.raises(MessageError):
        messages.unpack_delta(values)


def test_size_limit_on_both_sides(monkeypatch):
    message = messages.Submit(request_id="a", prompt_ids=list(range(1000)), params={})
    data = encode(message)
    monkeypatch.setattr(messages, "MAX_BYTES", len(data) - 1)
    with pytest.raises(MessageError, match="Submit takes"):
        encode(message)
    with pytest.raises(MessageError, match="the limit is"):
        decode(data)


@pytest.mark.parametrize("salt", ["\ud800", "a\udfff"])
def test_half_a_surrogate_pair_cannot_be_sent(salt):
    with pytest.raises(MessageError, match="Submit cannot be sent"):
        encode(messages.Submit(request_id="a", prompt_ids=[1], params={}, cache_salt=salt))


def test_integers_above_64_bits_cannot_be_sent():
    with pytest.raises(MessageError, match="Ping cannot be sent"):
        encode(messages.Ping(number=2**64))


def test_every_message_is_registered_once():
    classes = [c for c in vars(messages).values() if dataclasses.is_dataclass(c) and isinstance(c, type)]
    assert sorted(c.__name__ for c in [*MESSAGES.values(), TokenDelta]) == sorted(c.__name__ for c in classes)
