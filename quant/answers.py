"""Questions with known answers, asked in long conversations: what perplexity does not show.

A file of JSON lines, one conversation each: `{"turns": [{"question": ..., "answer": ...}, ...]}`,
optionally with `"system"`. The model's own answers stay in the conversation, so that one that
strays has to go on from there. An answer is right where it is the expected one, letter by letter
without the white space around it: greedy, up to the end token. An answer gets as many tokens as the
longest expected one and a few more; one that runs on is wrong. What finds no room in the context is
wrong, too.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import FormatError, NotFoundError
from ..sampling import SamplingParams
from .windows import read_text

if TYPE_CHECKING:
    from ..session import Session

_MORE_TOKENS = 8  # that an answer may have above the longest expected one


@dataclass(frozen=True, slots=True)
class Conversation:
    """Questions and expected answers, in order."""

    turns: tuple[tuple[str, str], ...]
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """One conversation as a model held it: its answers, and all tokens that it drew."""

    answers: tuple[str, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Answers against those expected, conversations against another model's."""

    num_answers: int
    num_right: int
    num_conversations: int
    num_all_right: int  # conversations without a wrong answer
    num_same: int  # conversations that are the other model's to the last token
    mean_tokens: float  # drawn in a conversation by the other model
    mean_same_tokens: float  # of these until the first difference


def read_conversations(path: str | Path) -> list[Conversation]:
    """Raises NotFoundError, and FormatError naming the line that is wrong."""
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"no questions at `{path}`", "expected a file of JSON lines")
    found = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
            turns = tuple(
                (_text(turn["question"]), _text(turn["answer"])) for turn in document["turns"]
            )
            system = document.get("system")
            if not turns:
                raise ValueError("no turns")
            found.append(Conversation(turns, None if system is None else _text(system)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(
                f"`{path}`, line {number}, is no conversation",
                f"{type(error).__name__}: {error}",
                'expected {"turns": [{"question": "...", "answer": "..."}]}',
            ) from error
    if not found:
        raise FormatError(f"`{path}` holds no questions", "it has no line")
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected a text, got {value!r}")
    return value


def hold(session: "Session", conversations: Sequence[Conversation]) -> list[Answered]:
    """Have every conversation, greedily. Raises UsageError without a tokenizer, TemplateError."""
    tokenizer = session.engine.need_tokenizer()
    expected = [answer for each in conversations for _, answer in each.turns]
    longest = max(len(tokenizer.encode(answer)) for answer in expected)
    params = SamplingParams(max_tokens=longest + _MORE_TOKENS, temperature=0.0)
    held = []
    for conversation in conversations:
        session.reset()
        messages: list[dict[str, str]] = []
        if conversation.system is not None:
            messages.append({"role": "system", "content": conversation.system})
        answers, ids = [], []
        for question, _ in conversation.turns:
            messages.append({"role": "user", "content": question})
            prompt = session.engine.chat_template.encode(tokenizer, messages)
            if len(prompt) + params.max_tokens > session.engine.context:
                break
            completion = session.generate(prompt, params)
            answers.append(completion.text)
            ids += completion.token_ids
            messages.append({"role": "assistant", "content": completion.text})
        missing = len(conversation.turns) - len(answers)
        held.append(Answered((*answers, *[""] * missing), tuple(ids)))
    return held


def score(
    conversations: Sequence[Conversation], held: Sequence[Answered], other: Sequence[Answered]
) -> Score:
    """What `held` is worth; `other` is the same held by the model to compare with."""
    right = [
        [
            answer.strip() == expected.strip()
            for answer, (_, expected) in zip(each.answers, asked.turns, strict=True)
        ]
        for asked, each in zip(conversations, held, strict=True)
    ]
    pairs = list(zip(held, other, strict=True))
    return Score(
        num_answers=sum(map(len, right)),
        num_right=sum(map(sum, right)),
        num_conversations=len(pairs),
        num_all_right=sum(map(all, right)),
        num_same=sum(each.token_ids == theirs.token_ids for each, theirs in pairs),
        mean_tokens=sum(len(theirs.token_ids) for _, theirs in pairs) / len(pairs),
        mean_same_tokens=sum(_alike(each.token_ids, theirs.token_ids) for each, theirs in pairs)
        / len(pairs),
    )


def _alike(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens before the first difference."""
    for count, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return count
    return min(len(first), len(second))
