"""A byte-level BPE tokenizer of any size, made by program: it cuts text finely, and loses nothing.

Its merges are not learned: letter pairs, then a space before two of them, then pairs of pairs. So
every byte string has tokens and every token has text, which is all that random weights ask for.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

SPECIAL = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"  # by frequency in English, so that common pairs come first


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte, as byte-level BPE defines it."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def _merges() -> Iterator[tuple[str, str]]:
    space = _byte_letters()[ord(" ")]
    pairs = [a + b for a in _LETTERS for b in _LETTERS]
    yield from ((space, letter) for letter in _LETTERS)
    yield from ((pair[0], pair[1]) for pair in pairs)
    yield from ((space + letter, pair) for letter in _LETTERS for pair in pairs)
    yield from ((first, second) for first in pairs for second in pairs)


def write_tokenizer(path: Path, vocab_size: int) -> int:
    """Write tokenizer.json and tokenizer_config.json into `path`; returns the id of end-of-text."""
    tokens = _byte_letters()
    num_merges = vocab_size - len(tokens) - len(SPECIAL)
    merges = list(islice(_merges(), num_merges))
    if num_merges < 0 or len(merges) < num_merges:
        raise ValueError(f"a vocabulary of {vocab_size} cannot be made")
    tokens += [first + second for first, second in merges] + list(SPECIAL)
    vocab = {token: number for number, token in enumerate(tokens)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": vocab[token], "content": token, **flags, "special": True} for token in SPECIAL
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "eos_token": SPECIAL[0],
        "pad_token": SPECIAL[0],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return vocab[SPECIAL[0]]
