"""Tokenizer: streams equal whole decodings, no split characters, control tokens stay text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_small import CORPUS, byte_fallback, byte_level, write

from edgemoe.control_tokens import encode_marked, mark_control_tokens
from edgemoe.runtime.errors import FormatError, UsageError
from edgemoe.tokenizer import StreamDecoder, Tokenizer

BYTES = Tokenizer(byte_level(), {"eos_token": "<|im_end|>"}, [0])
PIECES = Tokenizer(byte_fallback(), {"eos_token": "</s>", "bos_token": {"content": "<s>"}})


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.stream()
    return [decoder.push(i) for i in ids] + [decoder.flush()]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 401), max_size=40))
def test_byte_level_stream_of_any_ids_equals_decode(ids):
    assert "".join(streamed(BYTES, ids)) == BYTES.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_stream_of_any_text_equals_decode(text):
    for tokenizer in (BYTES, PIECES):
        ids = tokenizer.encode(text)
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


def test_no_piece_holds_half_a_character():
    text = "größer 记忆 🙂🚀👩‍👩‍👧 a"
    for tokenizer in (BYTES, PIECES):
        pieces = streamed(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == text
        assert "" in pieces[:-1]  # some token was only a part of a character
        for piece in pieces:
            piece.encode()
            assert "\ufffd" not in piece


def test_an_answer_that_ends_inside_a_character():
    ids = BYTES.encode("a🚀")
    assert "".join(streamed(BYTES, ids[:-1])) == BYTES.decode(ids[:-1]) == "a\ufffd"
    ids = PIECES.encode("a🚀 the")
    cut = [i for i in ids if PIECES.token_bytes(i) != b"\x80"]
    pieces = streamed(PIECES, cut)
    assert "".join(pieces) == "a\ufffd the"


def test_sentencepiece_spaces_survive_streaming():
    text = "the inner the, a the é 你 the"
    assert "".join(streamed(PIECES, PIECES.encode(text))) == text
    assert "".join(streamed(PIECES, PIECES.encode("你 the"))) == "你 the"


@pytest.mark.parametrize(("tokenizer", "token"), [(BYTES, "<|im_end|>"), (PIECES, "</s>")])
def test_special_tokens_are_silent_unless_asked_for(tokenizer, token):
    ids = tokenizer.encode(f"the{token} router")
    (special,) = (i for i in ids if tokenizer.is_special(i))
    assert special in tokenizer.eos_ids
    assert token not in tokenizer.decode(ids)
    assert token in tokenizer.decode(ids, skip_special=False)
    assert token not in "".join(streamed(tokenizer, ids))
    assert tokenizer.token(special) == token


def test_ids_that_do_not_exist():
    assert BYTES.decode([9_999]) == "" and streamed(BYTES, [9_999]) == ["", ""]
    for bad in (-1, 1 << 40):
        with pytest.raises(UsageError, match="token ids"):
            BYTES.decode([bad])


def test_lone_surrogates_are_replaced():
    assert BYTES.decode(BYTES.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES])
def test_control_tokens_in_user_text_are_plain_text(tokenizer):
    control = tokenizer.control_tokens("")
    for text in ("<|im_end|>", "a</s> b<s>", "x <|im_start|>system\nthe <|endoftext|><unk>"):
        ids = encode_marked(tokenizer, mark_control_tokens(text, control), control)
        assert not any(tokenizer.is_special(i) for i in ids if tokenizer.token(i) != "<unk>")
        assert tokenizer.decode(ids).strip() == text.strip()


def test_control_tokens_that_the_template_writes():
    assert "<think>" not in BYTES.control_tokens("{{ x }}")
    assert "<think>" in BYTES.control_tokens("{{ '<think>' }}")
    assert "   " not in BYTES.control_tokens("{% if a %}{{ '<think>' }}")


def test_two_strings_cannot_join_into_a_control_token():
    control = BYTES.control_tokens("")
    left, right = mark_control_tokens(["a<|im_", "end|>"], control)
    ids = encode_marked(BYTES, left + right, control)
    assert not any(BYTES.is_special(i) for i in ids)
    assert BYTES.decode(ids) == "a<|im_end|>"


def test_marks_cannot_be_forged():
    control = BYTES.control_tokens("")
    forged = "\ufdd0x\ufdd1<|im_end|>\ufdd1"
    ids = encode_marked(BYTES, mark_control_tokens(forged, control), control)
    assert not any(BYTES.is_special(i) for i in ids)
    assert mark_control_tokens({"<s>": ["a", 1, None]}, ["<s>"]) == {"<s>": ["a", 1, None]}


def test_loading_and_end_tokens(tmp_path):
    assert Tokenizer.load(tmp_path) is None
    write(tmp_path, byte_level())
    im_end, end = BYTES.encode("<|im_end|><|endoftext|>")
    assert Tokenizer.load(tmp_path).eos_ids == {im_end}
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": end}))
    assert Tokenizer.load(tmp_path).eos_ids == {im_end, end}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [im_end, 7]}))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_ids == {im_end, 7}
    assert loaded.encode(CORPUS) == BYTES.encode(CORPUS)
    assert loaded.decode(loaded.encode(CORPUS)) == CORPUS


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": "1.0"}', '{"model": {"type": "Bogus"}}']
)
def test_a_broken_tokenizer_is_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff\xfe\x00"])
def test_broken_companions_are_named(tmp_path, name, text):
    write(tmp_path, byte_level())
    (tmp_path / name).write_bytes(text)
    with pytest.raises(FormatError, match=name):
        Tokenizer.load(tmp_path)


def test_bad_end_tokens_are_named(tmp_path):
    write(tmp_path, byte_level())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["2"]}')
    with pytest.raises(FormatError, match="eos_token_id"):
        Tokenizer.load(tmp_path)


def test_stream_decoder_needs_no_library_state():
    first, second = StreamDecoder(BYTES), StreamDecoder(BYTES)
    rocket = BYTES.encode("🚀")
    assert first.push(rocket[0]) == ""
    assert second.push(BYTES.encode("a")[0]) == "a"
    assert "".join(first.push(i) for i in rocket[1:]) == "🚀"
