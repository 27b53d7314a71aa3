"""Keeps control tokens in the users' strings from controlling. Floor 3; pure text and ids.

A chat template writes control tokens such as <|im_end|>; the same characters in a user's message
are text. They are marked before the template runs, and what is marked is encoded without the
tokenizer's added tokens: the method of transformers' `sanitize_control_tokens`, id for id.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

MARK_BEGIN, MARK_END = "\ufdd0", "\ufdd1"  # noncharacters: no text may interchange them


def mark_control_tokens(value: Any, control: Sequence[str]) -> Any:
    """`value` with every control token in its strings (not its keys) between two marks.

    A string that ends like a control token begins gets a lone mark, so that a template that joins
    two strings cannot complete it.
    """
    if isinstance(value, str):
        text = value.replace(MARK_BEGIN, "").replace(MARK_END, "")
        if not control:
            return text
        text = _any_of(control).sub(f"{MARK_BEGIN}\\g<0>{MARK_END}", text)
        if any(text.endswith(token[:n]) for token in control for n in range(1, len(token))):
            text += MARK_END
        return text
    if isinstance(value, Mapping):
        return {key: mark_control_tokens(item, control) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mark_control_tokens(item, control) for item in value]
    return value


def encode_marked(tokenizer: "Tokenizer", text: str, control: Sequence[str]) -> list[int]:
    """Tokens of a rendered text: what stands between marks as plain text, lone marks as nothing."""
    if MARK_BEGIN not in text and MARK_END not in text:
        return tokenizer.encode(text)
    inner = _any_of(control).pattern
    pieces = re.split(f"{MARK_BEGIN}({inner}){MARK_END}|[{MARK_BEGIN}{MARK_END}]", text)
    ids = tokenizer.encode(pieces[0])
    for number, piece in enumerate(pieces[1:], 1):
        if piece:  # odd places hold marked tokens, None for a lone mark
            ids += tokenizer.encode_inside(piece, plain=number % 2 == 1)
    return ids


def _any_of(control: Sequence[str]) -> "re.Pattern[str]":
    return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")
