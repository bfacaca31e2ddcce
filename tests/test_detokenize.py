"""Incremental detokenisation against decoding everything at once; stop strings against a search of the whole text."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeyard.engine.resolve import resolve_model
from moeyard.launch.detokenize import MAX_HELD_TOKENS, Detokenizer, StopMatcher, TextStream, Vocabulary

no_deadline = settings(deadline=None)  # a busy machine is not a failure


@cache
def byte_level():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_model(""))


@cache
def metaspace():
    """A tokenizer of the other family: words begin with U+2581, unknown characters become byte tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", *"abcdefgh", "\u2581a", "\u2581b", "ab", "cd"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("\u2581", "a"), ("\u2581", "b"), ("a", "b"), ("c", "d")]
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


texts = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("ab cdé☃😀\u2581\n")))


@pytest.mark.parametrize("make", [byte_level, metaspace])
@no_deadline
@given(prompt=texts, text=texts)
def test_pieces_join_to_the_whole(make, prompt, text):
    tokenizer = make()
    prompt_ids = encode(tokenizer, prompt)
    ids = encode(tokenizer, text)
    stream = TextStream(Vocabulary(tokenizer), prompt_ids, skip_special_tokens=True)
    pieces = [stream.push(i) for i in ids]
    whole = tokenizer.decode(prompt_ids + ids, skip_special_tokens=True)
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    if whole.startswith(before):  # not when the first token changes how the prompt ends
        assert "".join(pieces) + stream.flush() == whole[len(before) :]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@no_deadline
@given(st.lists(st.integers(0, 4095), max_size=60))
def test_random_tokens_join_to_the_whole(ids):
    tokenizer = byte_level()
    stream = TextStream(Vocabulary(tokenizer), [5], skip_special_tokens=True)
    text = "".join(stream.push(i) for i in ids) + stream.flush()
    assert text == tokenizer.decode(ids, skip_special_tokens=True)


def test_incomplete_character_is_held_then_flushed():
    tokenizer = byte_level()
    ids = encode(tokenizer, "a😀")
    stream = TextStream(Vocabulary(tokenizer), [], skip_special_tokens=True)
    assert [stream.push(i) for i in ids] == ["a", *[""] * (len(ids) - 2), "😀"]
    assert [stream.push(i) for i in ids[:-1]] == ["a", *[""] * (len(ids) - 2)]
    assert set(stream.flush()) == {"\ufffd"}


def test_garbage_does_not_grow_the_window():
    tokenizer = byte_level()
    lead = encode(tokenizer, "é")[0]
    lengths = []
    vocabulary = Vocabulary(tokenizer)
    decode = vocabulary.decode
    vocabulary.decode = lambda ids, skip: lengths.append(len(ids)) or decode(ids, skip)
    stream = TextStream(vocabulary, [], skip_special_tokens=True)
    text = "".join(stream.push(lead) for _ in range(500)) + stream.flush()
    assert text == "\ufffd" * 500
    assert max(lengths) <= 2 * MAX_HELD_TOKENS + 2


@pytest.mark.parametrize(("skip", "wanted"), [(True, "ab"), (False, "a<|endoftext|>b")])
def test_special_tokens(skip, wanted):
    tokenizer = byte_level()
    (a,), (b,) = encode(tokenizer, "a"), encode(tokenizer, "b")
    detokenizer = Detokenizer(Vocabulary(tokenizer), [a], skip_special_tokens=skip)
    for i in (a, tokenizer.eos_token_id, b):
        detokenizer.push(i)
    detokenizer.finish()
    assert detokenizer.text == wanted


def test_text_of_one_token_keeps_its_space():
    words = Vocabulary(metaspace())
    assert words.text_of(words.tokenizer.convert_tokens_to_ids("\u2581a")) == " a"
    words = Vocabulary(byte_level())
    assert words.text_of(encode(words.tokenizer, "x def")[1]) == " def"


def test_without_a_tokenizer_there_is_no_text():
    detokenizer = Detokenizer(Vocabulary(None), [1, 2])
    detokenizer.push(7)
    detokenizer.finish()
    assert detokenizer.text == "" and Vocabulary(None).text_of(7) == ""


def cut(text, stops, include):
    """The oracle: the first position where a stop string is complete; of several there, the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


small = st.text("ab", max_size=12)


@no_deadline
@given(st.lists(small), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3), st.booleans())
def test_stop_strings_in_any_segmentation(pieces, stops, include):
    matcher = StopMatcher(stops, include=include)
    wanted, stop = cut("".join(pieces), stops, include)
    shown = ""
    for piece in pieces:
        shown += matcher.push(piece)
        assert wanted.startswith(shown)
        if matcher.stop is not None:
            break
    shown += matcher.flush()
    assert (shown, matcher.stop) == (wanted, stop)


@no_deadline
@given(text=st.text("ab é☃", max_size=20), stops=st.lists(st.text("ab é☃", min_size=1, max_size=4), max_size=3))
def test_stop_strings_over_tokens(text, stops):
    tokenizer = byte_level()
    detokenizer = Detokenizer(Vocabulary(tokenizer), [5], stops=stops)
    wanted, stop = cut(text, stops, include=False)
    for i in encode(tokenizer, text):
        detokenizer.push(i)
        assert wanted.startswith(detokenizer.text)
        if detokenizer.stop is not None:
            break
    detokenizer.finish()
    assert (detokenizer.text, detokenizer.stop) == (wanted, stop)


def test_no_stop_string_is_looked_for_before_min_tokens():
    tokenizer = byte_level()
    detokenizer = Detokenizer(Vocabulary(tokenizer), [5], stops=["b"])
    for i, token in enumerate(encode(tokenizer, "b b")):
        detokenizer.push(token, search=i >= 1)
    assert (detokenizer.text, detokenizer.stop) == ("b ", "b")
