"""Text as windows of tokens: what is measured and calibrated on. No torch.

A window is fed from its first token with an empty KV cache. Its last tokens are scored, each by the
tokens before it in the window; the ones in front are context only, unless it is the first window of
a text. So every token of a text but its first is scored once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.errors import FormatError, NotFoundError, UsageError

WINDOW_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Window:
    """Token ids, of which all from `first` on are scored; `first` is at least 1."""

    ids: list[int]
    first: int

    @property
    def num_scored(self) -> int:
        return len(self.ids) - self.first


def cut(ids: Sequence[int], size: int = WINDOW_TOKENS, stride: int | None = None) -> list[Window]:
    """The windows of one text: `size` tokens each, every one `stride` tokens after the last.

    `stride` None is `size`: no token is fed twice. Raises UsageError for sizes that cannot be.
    """
    stride = size if stride is None else stride
    if size < 2 or not 1 <= stride <= size:
        raise UsageError(
            f"windows of {size} tokens every {stride} cannot be meant",
            "expected at least 2 tokens, and a stride from 1 to the window",
        )
    windows, scored = [], 1
    for begin in range(0, max(1, len(ids)), stride):
        part = list(ids[begin : begin + size])
        first = max(1, scored - begin)
        if first < len(part):
            windows.append(Window(part, first))
            scored = begin + len(part)
        if begin + size >= len(ids):
            break
    return windows


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises FormatError for another: its tokens would mean nothing."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"`{path}` is no UTF-8 text",
            f"byte {error.start} is {error.object[error.start]:#04x}",
            "save it as UTF-8",
        ) from error


def read_tokens(path: str | Path, tokenizer: Any) -> list[int]:
    """Token ids of a UTF-8 text file, or those that a `.npy` file holds as they are.

    Raises NotFoundError, FormatError for a file that is neither, UsageError without a tokenizer.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"no text at `{path}`", "expected a text file, or token ids as .npy")
    if path.suffix == ".npy":
        import numpy as np

        try:
            ids = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise FormatError(f"`{path}` holds no array", str(error)) from error
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise FormatError(
                f"`{path}` holds no token ids",
                f"expected one row of integers, got {ids.dtype} {list(ids.shape)}",
            )
        return ids.tolist()
    if tokenizer is None:
        raise UsageError(
            f"`{path}` cannot be read as tokens",
            "this model came without a tokenizer.json",
            "give token ids as a .npy file",
        )
    return tokenizer.encode(read_text(path))


def share(
    texts: Sequence[Sequence[int]],
    num_tokens: int | None = None,
    size: int = WINDOW_TOKENS,
    stride: int | None = None,
) -> list[Window]:
    """Windows of every text; with `num_tokens`, of the same share of each from its beginning."""
    counts = even_shares([len(ids) for ids in texts], num_tokens)
    parts = [ids[:count] for ids, count in zip(texts, counts, strict=True)]
    return [window for ids in parts for window in cut(ids, size, stride)]


def even_shares(lengths: Sequence[int], num_tokens: int | None) -> list[int]:
    """How many tokens of each text are read, `num_tokens` of all together at most (None: all).

    A text shorter than its share leaves the rest to the others.
    """
    if num_tokens is None:
        return list(lengths)
    counts = [0] * len(lengths)
    for turn, number in enumerate(sorted(range(len(lengths)), key=lengths.__getitem__)):
        counts[number] = min(lengths[number], num_tokens // (len(lengths) - turn))
        num_tokens -= counts[number]
    return counts


def read_windows(
    paths: Sequence[str | Path],
    tokenizer: Any,
    num_tokens: int | None = None,
    size: int = WINDOW_TOKENS,
    stride: int | None = None,
) -> list[Window]:
    """`share` of the texts at `paths`; UsageError where that leaves nothing to score."""
    texts = [read_tokens(path, tokenizer) for path in paths]
    windows = share(texts, num_tokens, size, stride)
    if not windows:
        names = ", ".join(f"`{path}`" for path in paths)
        raise UsageError(f"no text to measure in {names}", "expected at least two tokens")
    return windows
