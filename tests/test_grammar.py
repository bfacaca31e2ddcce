"""Structured output: whatever the logits are, the text is JSON that matches the schema."""

from __future__ import annotations

import json
import math
import pathlib
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moeyard
from moeyard.engine.grammar import GrammarCompiler
from moeyard.engine.params import SamplingParams
from moeyard.engine.sampling import SequenceSampler, sample

pytest.importorskip("llguidance", reason="needs llguidance (pip install 'moeyard[serve]')")
jsonschema_rs = pytest.importorskip("jsonschema_rs", reason="needs jsonschema-rs, which schemathesis brings")

V_PADDED = 4224


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    path = pathlib.Path(moeyard.__file__).parent / "engine" / "reference_model"
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, len(tokenizer))


def allowed(grammar):
    return set(np.flatnonzero(np.unpackbits(grammar.mask(), bitorder="little")).tolist())


def generate(tokenizer, grammars, seed=0, prefer="", max_tokens=700, **options):
    """Texts and samplers of one batch under random logits; the tokens in `prefer` are made likely."""
    vocab_size, noise = len(tokenizer), torch.Generator().manual_seed(seed)
    params = SamplingParams(max_tokens=max_tokens, **options)
    eos = frozenset([tokenizer.eos_token_id])
    made = [SequenceSampler(params, [], vocab_size, eos, seed + i, g) for i, g in enumerate(grammars)]
    likely = [token for text in prefer.split() for token in tokenizer.encode(text, add_special_tokens=False)]
    while live := [s for s in made if not s.finish_reason]:
        logits = torch.randn(len(live), V_PADDED, generator=noise) * 3
        logits[:, likely] += 12
        for s, got in zip(live, sample(logits, live), strict=True):
            assert not got.error
            s.advance(got.token_id)
    return [tokenizer.decode([t for t in s.output_ids if t not in eos]) for s in made], made


SCHEMAS: dict[str, dict[str, Any]] = {
    "enum": {"enum": ["red", "green", 3, None, {"deep": [1]}]},
    "integer": {"type": "integer", "minimum": -20, "maximum": 1300},
    "string": {"type": "string", "minLength": 2, "maxLength": 9},
    "pattern": {"type": "string", "pattern": "^[a-c]{2,4}-[0-9]{3}$"},
    "date": {"type": "string", "format": "date"},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "colour": {"enum": ["red", "green"]},
        },
        "required": ["name", "age", "colour"],
        "additionalProperties": False,
    },
    "nested": {
        "type": "object",
        "properties": {
            "points": {
                "type": "array",
                "maxItems": 3,
                "items": {
                    "type": "object",
                    "properties": {"x": {"type": "integer", "maximum": 99, "minimum": -99}, "tag": {"const": "p"}},
                    "required": ["x", "tag"],
                    "additionalProperties": False,
                },
            },
            "either": {"anyOf": [{"type": "null"}, {"type": "string", "maxLength": 3}]},
        },
        "required": ["points", "either"],
        "additionalProperties": False,
    },
    "reference": {
        "$defs": {"leaf": {"type": "object", "properties": {"v": {"enum": [1, 2]}}, "required": ["v"]}},
        "type": "object",
        "properties": {"left": {"$ref": "#/$defs/leaf"}, "right": {"$ref": "#/$defs/leaf"}},
        "required": ["left", "right"],
        "additionalProperties": False,
    },
}
SCHEMAS["reference"]["$defs"]["leaf"]["additionalProperties"] = False


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.5}, {"top_p": 0.6, "top_k": 50}])
def test_random_logits_give_valid_json(name, options, tokenizer, compiler):
    schema = SCHEMAS[name]
    grammars = [compiler.compile_json_schema(json.dumps(schema)) for _ in range(4)]
    texts, made = generate(tokenizer, grammars, seed=len(name), **options)
    for text, s in zip(texts, made, strict=True):
        assert s.finish_reason == "stop" and s.stop_token is None, text
        assert jsonschema_rs.is_valid(schema, json.loads(text)), text


leaves = st.one_of(
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-9, 9),
        st.integers(0, 99),
    ),
    st.builds(lambda n: {"type": "string", "maxLength": n}, st.integers(0, 4)),
    st.lists(st.one_of(st.integers(-5, 5), st.text(max_size=3), st.none()), min_size=1, max_size=4).map(
        lambda v: {"enum": v}
    ),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["null", "boolean"]}]),
)


def _object(properties, required):
    names = [name for name, wanted in zip(properties, required, strict=False) if wanted]
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(lambda items, n: {"type": "array", "items": items, "maxItems": n}, inner, st.integers(0, 3)),
        st.builds(
            _object,
            st.dictionaries(st.text('ab "\\é', min_size=1, max_size=3), inner, max_size=3),
            st.lists(st.booleans(), min_size=3, max_size=3),
        ),
    ),
    max_leaves=4,
)


@given(schema=schemas, seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_random_schemas(tokenizer, compiler, schema, seed):
    texts, made = generate(tokenizer, [compiler.compile_json_schema(json.dumps(schema))] * 1, seed=seed)
    assert made[0].finish_reason == "stop"
    assert jsonschema_rs.is_valid(schema, json.loads(texts[0]))


def test_without_a_grammar_random_logits_are_not_json(tokenizer):
    texts, _ = generate(tokenizer, [None], max_tokens=20)
    with pytest.raises(ValueError):
        json.loads(texts[0])


def test_json_object_mode(tokenizer, compiler):
    """Free JSON has no bound of its own: closing tokens are made likely."""
    grammars = [compiler.compile_json_schema('{"type": "object"}') for _ in range(6)]
    texts, made = generate(tokenizer, grammars, prefer='" } ] "} "]')
    assert all(isinstance(json.loads(text), dict) for text in texts)
    assert all(s.finish_reason == "stop" for s in made)


def test_a_batch_may_mix_grammars(tokenizer, compiler):
    mixed = [compiler.compile_json_schema(json.dumps(SCHEMAS[name])) for name in ("enum", "array")]
    texts, _ = generate(tokenizer, [mixed[0], None, mixed[1]], max_tokens=60)
    assert json.loads(texts[0]) in SCHEMAS["enum"]["enum"]
    assert isinstance(json.loads(texts[2]), list)


def test_the_end_token_is_for_complete_output_only(tokenizer, compiler):
    grammar = compiler.compile_json_schema('{"type": "integer"}')
    assert tokenizer.eos_token_id not in allowed(grammar)
    grammar.advance(tokenizer.encode("7")[0])
    assert tokenizer.eos_token_id in allowed(grammar) and not grammar.finished
    grammar.advance(tokenizer.eos_token_id)
    assert grammar.finished and grammar.error == ""


def test_other_end_tokens(tokenizer):
    compiler = GrammarCompiler(tokenizer, len(tokenizer), eos_ids=[1, 5, 999_999])
    grammar = compiler.compile_json_schema('{"const": 7}')
    grammar.advance(tokenizer.encode("7")[0])
    assert {1, 5} <= allowed(grammar) or grammar.finished
    assert tokenizer.eos_token_id not in allowed(grammar)


def test_complete_output_ends_even_with_ignore_eos(tokenizer, compiler):
    for schema in ({"const": {"a": 1}}, {"type": "integer", "maximum": 9, "minimum": 0}):
        grammars = [compiler.compile_json_schema(json.dumps(schema))]
        texts, made = generate(tokenizer, grammars, max_tokens=40, ignore_eos=True)
        assert made[0].finish_reason == "stop"
        assert jsonschema_rs.is_valid(schema, json.loads(texts[0]))


def test_max_tokens_cuts_the_output(tokenizer, compiler):
    grammars = [compiler.compile_json_schema(json.dumps(SCHEMAS["object"]))]
    _, made = generate(tokenizer, grammars, max_tokens=3)
    assert made[0].finish_reason == "length" and len(made[0].output_ids) == 3


def test_white_space_is_bounded(tokenizer, compiler):
    """A model that wants nothing but white space still finishes; indented JSON is still allowed."""
    blank = [t for t in range(len(tokenizer)) if tokenizer.decode([t]).strip(" \n\t\r") == ""]
    schema = json.dumps(SCHEMAS["array"])
    s = SequenceSampler(
        SamplingParams(temperature=0.0, max_tokens=1000),
        [],
        len(tokenizer),
        frozenset([tokenizer.eos_token_id]),
        0,
        compiler.compile_json_schema(schema),
    )
    logits = torch.zeros(1, len(tokenizer))
    logits[:, blank] = 9
    while not s.finish_reason:
        s.advance(sample(logits, [s])[0].token_id)
    assert s.finish_reason == "stop"
    for text in (json.dumps([True, False], indent=4), json.dumps([True, False]), "[true,false]"):
        grammar = compiler.compile_json_schema(schema)
        for token in tokenizer.encode(text, add_special_tokens=False):
            assert token in allowed(grammar), text
            grammar.advance(token)
        assert grammar.finished


def test_each_output_has_its_own_position(tokenizer, compiler):
    schema = json.dumps({"enum": ["aa", "bb"]})
    first, second = compiler.compile_json_schema(schema), compiler.compile_json_schema(schema)
    start = allowed(second)
    first.advance(tokenizer.encode('"')[0])
    assert allowed(first) != start and allowed(second) == start
    assert allowed(compiler.compile_json_schema(schema)) == start


def test_compiled_schemas_are_kept_and_bounded(tokenizer, monkeypatch):
    from moeyard.engine import grammar

    monkeypatch.setattr(grammar, "_CACHED_SCHEMAS", 2)
    compiler = GrammarCompiler(tokenizer, len(tokenizer))
    compiled = []
    original = compiler._compile

    def recorded(text):
        compiled.append(text)
        return original(text)

    monkeypatch.setattr(compiler, "_compile", recorded)
    one, two, three = ('{"const": 1}', '{"const": 2}', '{"const": 3}')
    for text in (one, one, two, one, three, one, two):
        compiler.compile_json_schema(text)
    assert compiled == [one, two, three, two]


def test_a_token_that_is_not_allowed_is_an_error_of_the_row(tokenizer, compiler):
    grammar = compiler.compile_json_schema('{"type": "object"}')
    s = SequenceSampler(SamplingParams(max_tokens=9), [], len(tokenizer), frozenset(), 0, grammar)
    s.advance(tokenizer.encode("x")[0])
    got = sample(torch.zeros(1, len(tokenizer)), [s])[0]
    assert got.token_id == -1 and got.error.startswith("json_schema: ") and "grammar" in got.error


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("null", "must be a JSON object"),
        ("[]", "must be a JSON object"),
        ("false", "must be a JSON object"),
        ('{"x-guidance": {"nonsense": 1}}', "nonsense"),
        ('{"type": "foo"}', "foo"),
        ('{"uniqueItems": true}', "uniqueItems"),
        ('{"not": {"type": "string"}}', "not"),
        ('{"$ref": "#/nowhere"}', "nowhere"),
        ('{"type": "integer", "minimum": 5, "maximum": 3}', "minimum"),
        ('{"type": "string", "pattern": "(?=a)b"}', "look-ahead"),
    ],
)
def test_a_bad_schema_names_the_field_and_the_reason(compiler, text, reason):
    with pytest.raises(ValueError, match="json_schema") as error:
        compiler.compile_json_schema(text)
    assert reason in str(error.value)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"json_schema: .* tokenizer"):
        GrammarCompiler("not a tokenizer", 10).compile_json_schema("{}")


def test_without_llguidance_the_error_says_what_to_install(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r"json_schema needs llguidance: pip install 'moeyard\[serve\]'"):
        GrammarCompiler(tokenizer, len(tokenizer)).compile_json_schema("{}")


def test_tokens_without_text_are_never_allowed(tokenizer):
    grammar = GrammarCompiler(tokenizer, V_PADDED).compile_json_schema('{"type": "string"}')
    grammar.advance(tokenizer.encode('"')[0])
    assert len(grammar.mask()) * 8 >= V_PADDED
    assert max(allowed(grammar)) < len(tokenizer)


def test_logprobs_are_of_the_logits_before_the_grammar(tokenizer, compiler):
    params = SamplingParams(temperature=0.0, logprobs=1)
    s = SequenceSampler(params, [], len(tokenizer), frozenset(), 0, compiler.compile_json_schema('{"const": 1}'))
    got = sample(torch.zeros(1, len(tokenizer)), [s])[0]
    assert tokenizer.decode([got.token_id]) == "1"
    assert got.logprob == pytest.approx(-math.log(len(tokenizer)), abs=1e-5)
