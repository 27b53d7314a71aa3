"""Text to tokens and back, with the `tokenizers` library. Floor 3; knows no model.

`StreamDecoder` turns tokens into text one at a time and never shows half a character: byte
tokens are decoded byte by byte, others by the difference of two decodings.
A store without tokenizer.json runs on token ids; `Tokenizer.load` returns None then, and the engine
says so.
"""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from .runtime.errors import FormatError, UsageError
from .tokenizer_files import eos_ids, read_json, token_text

TOKENIZER_FILE = "tokenizer.json"
_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A loaded tokenizer.json with the special tokens of the model around it."""

    def __init__(self, backend: Any, config: dict[str, Any], ends: Iterable[int] = ()) -> None:
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self._added: dict[int, tuple[str, bool]] = {
            int(key): (token.content, token.special) for key, token in added.items()
        }
        self._special_ids = {key for key, (_, special) in self._added.items() if special}
        self.bos_id = self._id_of(config.get("bos_token"))
        eos_id = self._id_of(config.get("eos_token"))
        self.eos_ids: frozenset[int] = frozenset([*ends, *([] if eos_id is None else [eos_id])])
        kinds = _decoder_kinds(backend.decoder)
        self._is_byte_level = kinds == ["ByteLevel"]
        self.has_byte_fallback = "ByteFallback" in kinds

    @classmethod
    def load(cls, path: Path) -> "Tokenizer | None":
        """The tokenizer of a store; None where it has no tokenizer.json. Raises FormatError."""
        file = Path(path) / TOKENIZER_FILE
        if not file.is_file():
            return None
        from tokenizers import Tokenizer as Backend

        try:
            backend = Backend.from_file(str(file))
        except BaseException as error:  # a panic of the Rust side is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise FormatError(
                f"`{file}` is damaged", str(error), "copy it again from the checkpoint"
            ) from error
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, read_json(path / "tokenizer_config.json"), eos_ids(path))

    def _id_of(self, token: Any) -> int | None:
        text = token_text(token)
        return None if text is None else self._backend.token_to_id(text)

    def token(self, token_id: int) -> str:
        """One token as text, special ones included; bytes that are no text show as U+FFFD."""
        return self.decode_all([token_id])

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Tokens of `text`; control tokens in it control. With `add_special_tokens` as a raw prompt
        starts (a BOS token where the tokenizer adds one)."""
        return self._backend.encode(_clean(text), add_special_tokens=add_special_tokens).ids

    def encode_inside(self, text: str, *, plain: bool) -> list[int]:
        """Tokens of a piece from the middle of a text; `plain` ignores the added tokens.

        SentencePiece tokenizers put a space before the start of a text: encoding after a newline
        and removing it again keeps that away.
        """
        encode = self._encode_plain if plain else self.encode
        newline = self.encode("\n")
        ids = encode("\n" + text)
        ids = ids[len(newline) :] if ids[: len(newline)] == newline else encode(text)
        whole = self._backend.token_to_id(text) if plain else None
        if whole is not None and whole in ids:  # the model itself knows the token: spell it
            return [i for part in text for i in self._encode_plain(part)]
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        text, backend = _clean(text), self._backend
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        parts = [text]
        if backend.pre_tokenizer is not None:
            parts = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for part in parts for token in backend.model.tokenize(part)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids` [n]. Raises UsageError for ids that are negative or too large to exist."""
        if skip_special:
            ids = [i for i in ids if i not in self._special_ids]
        return self.decode_all(ids)

    def decode_all(self, ids: Sequence[int]) -> str:
        """Text of `ids` with the special tokens spelt out."""
        try:
            return self._backend.decode(list(ids), skip_special_tokens=False)
        except (OverflowError, TypeError) as error:
            raise UsageError("bad token ids", str(error)) from error

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes a token stands for, b"" without such a token; None where bytes do not tell."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            table = _byte_of_char()
            try:
                return bytes([table[char] for char in token])
            except KeyError:  # an added token stands for its own text
                return token.encode()
        match = _BYTE_TOKEN.fullmatch(token) if self.has_byte_fallback else None
        return bytes([int(match[1], 16)]) if match else None

    def control_tokens(self, template: str) -> list[str]:
        """Tokens that must not control from inside a user's string: the special ones, and added
        tokens that the chat template writes."""
        return sorted(
            text for text, special in self._added.values() if special or (text and text in template)
        )

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def stream(self) -> "StreamDecoder":
        """A decoder for one answer."""
        return StreamDecoder(self)


class StreamDecoder:
    """Text of an answer as its tokens arrive; joined, it is what `decode` gives for all of them.

    Bytes that are no UTF-8 become U+FFFD as soon as that is certain.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._context: list[int] = []  # tokens last shown: some tokens depend on their neighbour
        self._pending: list[int] = []  # tokens not shown yet

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" for special tokens and parts of a character."""
        if self._tokenizer.is_special(token_id):
            return ""
        piece = self._tokenizer.token_bytes(token_id)
        if piece is None:
            return self._end_bytes() + self._difference(token_id)
        self._pending.append(token_id)
        text = self._utf8.decode(piece)
        if not self._utf8.getstate()[0]:
            if "\ufffd" not in text:  # half a character is no context, it would spoil the next one
                self._context = self._pending
            self._pending = []
        return text

    def flush(self) -> str:
        """The rest at the end of the answer; U+FFFD where it ends inside a character."""
        rest = self._end_bytes()
        return rest + self._show() if self._pending else rest

    def _end_bytes(self) -> str:
        if not self._utf8.getstate()[0]:
            return ""
        self._pending = []
        return self._utf8.decode(b"", final=True)

    def _difference(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._tokenizer.decode_all(self._context + self._pending)
        # At most four bytes make a character, so a fifth token with an open end is not waiting.
        waiting = not self._tokenizer.has_byte_fallback and text.endswith("\ufffd")
        return "" if waiting and len(self._pending) < 5 else self._show()

    def _show(self) -> str:
        before = self._tokenizer.decode_all(self._context)
        text = self._tokenizer.decode_all(self._context + self._pending)
        self._context, self._pending = self._pending, []
        return text[len(before) :]


def _decoder_kinds(decoder: Any) -> list[str]:
    """Type names of a decoder, in order, with sequences opened."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return [part["type"] for part in state.get("decoders", [state])]


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet of GPT-2: printable Latin-1 stands for itself, the rest from 256."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + n): byte for n, byte in enumerate(others)}


def _clean(text: str) -> str:
    """Lone surrogates (broken terminals, JSON escapes) as U+FFFD, since no tokenizer takes them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
