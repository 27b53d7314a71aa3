"""Choosing the next token from a row of logits. Floor 3; knows no model and no text.

Order of operations, that of transformers' `generate`: repetition penalty (tokens of prompt and
answer), presence and frequency penalty (tokens of the answer, as in the OpenAI interface), then
either the largest value (temperature 0; ties go to the lowest id) or temperature, top-k, top-p,
min-p and a draw. llama.cpp applies the temperature last, so its top-p and min-p see a flatter or
sharper distribution than these. Log probabilities are those of the model: taken before any of this.

NumPy is imported where it is used: parameters must be cheap to make.
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from .runtime.errors import EdgeMoeError, UsageError

if TYPE_CHECKING:
    import numpy as np

_RANGES: dict[str, tuple[float, float, str]] = {  # closed intervals
    "temperature": (0.0, math.inf, "0 (greedy) or more"),
    "top_p": (0.0, 1.0, "0 to 1"),
    "min_p": (0.0, 1.0, "0 to 1"),
    "repetition_penalty": (1e-6, math.inf, "more than 0; 1 is none"),
    "presence_penalty": (-math.inf, math.inf, "a finite number; 0 is none"),
    "frequency_penalty": (-math.inf, math.inf, "a finite number; 0 is none"),
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an answer is drawn and where it ends. Raises UsageError naming the field that is wrong.

    `max_tokens` None means: until the context is full. `top_k` 0, `top_p` 1 and `min_p` 0 are off.
    `seed` None draws a fresh one. `stop` strings end the answer and are not part of it.
    `logprobs` n > 0 reports the chosen token and the n most probable ones.
    """

    max_tokens: int | None = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int = 0

    def __post_init__(self) -> None:
        for name, (least, most, meaning) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise _bad(name, meaning, value)
            if not math.isfinite(value) or not least <= value <= most:
                raise _bad(name, meaning, value)
            object.__setattr__(self, name, float(value))
        for name in ("max_tokens", "top_k", "logprobs"):
            value = getattr(self, name)
            if name == "max_tokens" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise _bad(name, "a whole number, 0 or more", value)
        if self.seed is not None and (
            isinstance(self.seed, bool) or not isinstance(self.seed, int)
        ):
            raise _bad("seed", "a whole number", self.seed)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(s, str) and s for s in stop):
            raise _bad("stop", "strings that are not empty", self.stop)
        object.__setattr__(self, "stop", tuple(stop))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **changes: Any) -> "SamplingParams":
        """Defaults of a `generation_config.json`, with `changes` (None means unchanged) on top."""
        values: dict[str, Any] = {}
        if config.get("do_sample"):
            values = {
                name: config.get(name, default)
                for name, default in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0))
            }
            values["min_p"] = config.get("min_p") or 0.0
        values["repetition_penalty"] = config.get("repetition_penalty") or 1.0
        known = {item.name for item in fields(cls)}
        for name, value in changes.items():
            if name not in known:
                raise UsageError(
                    f"unknown sampling parameter `{name}`",
                    next_step=f"known are {', '.join(sorted(known))}",
                )
            if value is not None:
                values[name] = value
        return cls(**{name: value for name, value in values.items() if value is not None})


_SHORTLIST = 4096  # tokens that nearly always hold top_p of the probability


def _bad(name: str, expected: str, got: object) -> UsageError:
    return UsageError(f"bad sampling parameter `{name}`", f"expected {expected}, got {got!r}")


def _not_finite() -> EdgeMoeError:
    return EdgeMoeError(
        "the model computed logits that are not finite",
        "a damaged store, or weights that overflow",
        "check the store with: edgemoe verify STORE",
    )


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token; log probabilities only where they were asked for, most probable first."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


def penalize_repetition(logits: "np.ndarray", ids: "np.ndarray", penalty: float) -> "np.ndarray":
    """Divide positive and multiply negative logits of `ids` [n] by `penalty`; logits [vocab]."""
    import numpy as np

    result, seen = logits.copy(), logits[ids]
    result[ids] = np.where(seen < 0, seen * penalty, seen / penalty)
    return result


def keep_top_k(logits: "np.ndarray", top_k: int) -> "np.ndarray":
    """-inf for everything below the k-th largest value; ties of that value are kept."""
    import numpy as np

    place = logits.size - min(top_k, logits.size)
    least = np.partition(logits, place)[place]
    return np.where(logits < least, np.float32(-np.inf), logits)


def keep_top_p(logits: "np.ndarray", top_p: float) -> "np.ndarray":
    """-inf for all but the smallest set of most probable tokens whose sum reaches `top_p`."""
    import numpy as np

    probabilities = _softmax(logits)
    ids, tail = np.arange(logits.size), 0.0
    if logits.size > _SHORTLIST:
        # Sorting a whole vocabulary takes longer than a small model does for a token.
        listed = np.argpartition(probabilities, -_SHORTLIST)[-_SHORTLIST:]
        rest = 1 - float(probabilities[listed].sum(dtype=np.float64))
        if rest < 1 - top_p - 1e-4:  # everything that is not listed goes, rounding included
            ids, tail = np.sort(listed), rest
    order = np.argsort(-probabilities[ids], kind="stable")  # ties: lowest id first
    ids = ids[order[::-1]]
    remove = probabilities[ids].cumsum(dtype=np.float64) + tail <= 1 - top_p
    remove[-1] = False
    kept = ids[~remove]
    result = np.full_like(logits, -np.inf)
    result[kept] = logits[kept]
    return result


def keep_min_p(logits: "np.ndarray", min_p: float) -> "np.ndarray":
    """-inf for tokens less probable than `min_p` times the most probable one."""
    import numpy as np

    probabilities = _softmax(logits)
    return np.where(probabilities < min_p * probabilities.max(), np.float32(-np.inf), logits)


def _softmax(logits: "np.ndarray") -> "np.ndarray":
    from .runtime.reference import softmax

    return softmax(logits)


@dataclass(slots=True)
class Sampler:
    """Draws the tokens of one answer; `seed` is the one in use, so that a run can be repeated."""

    params: SamplingParams
    prompt: Sequence[int] = ()
    seed: int = field(init=False)
    _random: random.Random = field(init=False, repr=False)
    _answer: dict[int, int] = field(init=False, repr=False, default_factory=dict)
    _seen: set[int] = field(init=False, repr=False)
    _is_greedy: bool = field(init=False, repr=False)  # the largest logit, and nothing else asked

    def __post_init__(self) -> None:
        given = self.params.seed
        self.seed = random.SystemRandom().getrandbits(32) if given is None else given
        # The stream of random.Random for a seed is the same in every Python and on every machine.
        self._random = random.Random(self.seed)
        self._seen = set(self.prompt) if self.params.repetition_penalty != 1 else set()
        params = self.params
        is_penalized = params.repetition_penalty != 1 or (
            params.presence_penalty or params.frequency_penalty
        )
        self._is_greedy = not (is_penalized or params.temperature > 0 or params.logprobs)

    def choose(self, logits: "np.ndarray", best_id: int | None = None) -> Choice:
        """The next token for fp32 `logits` [vocab]; remembered for the penalties.

        `best_id`: the lowest id of the largest, where that is known; -1 where that is not finite.
        """
        if self._is_greedy and best_id is not None:
            if best_id < 0:
                raise _not_finite()
            return Choice(best_id)
        penalized = self._penalize(logits)
        token_id = int(penalized.argmax())  # the lowest of equal ids
        if not math.isfinite(penalized[token_id]):
            raise _not_finite()
        if self.params.temperature > 0:
            token_id = self._draw(penalized)
        self._answer[token_id] = self._answer.get(token_id, 0) + 1
        if self.params.repetition_penalty != 1:
            self._seen.add(token_id)
        return self._report(logits, token_id)

    def _penalize(self, logits: "np.ndarray") -> "np.ndarray":
        params = self.params
        if not (self._seen or params.presence_penalty or params.frequency_penalty):
            return logits
        import numpy as np

        if self._seen:
            ids = np.array(sorted(self._seen))
            logits = penalize_repetition(logits, ids, params.repetition_penalty)
        if self._answer and (params.presence_penalty or params.frequency_penalty):
            ids = np.array(list(self._answer))
            counts = np.array(list(self._answer.values()), dtype=np.float32)
            logits = logits.copy()
            logits[ids] -= params.presence_penalty + params.frequency_penalty * counts
        return logits

    def _draw(self, logits: "np.ndarray") -> int:
        params = self.params
        import numpy as np

        with np.errstate(over="ignore"):
            logits = logits / np.float32(params.temperature)
        if not math.isfinite(logits.max()):  # a temperature so small that the quotient overflows
            return int(logits.argmax())
        ids = None
        for keep, value, is_off in (
            (keep_top_k, params.top_k, params.top_k == 0),
            (keep_top_p, params.top_p, params.top_p == 1),
            (keep_min_p, params.min_p, params.min_p == 0),
        ):
            if not is_off:
                logits = keep(logits, value)
                kept = np.flatnonzero(np.isfinite(logits))
                logits, ids = logits[kept], kept if ids is None else ids[kept]
        cumulative = _softmax(logits.astype(np.float64)).cumsum()
        # A draw lies in [0, total): the first token whose sum exceeds it has a probability above 0.
        draw = self._random.random() * float(cumulative[-1])
        place = int((cumulative <= draw).sum())
        place = min(place, logits.size - 1)
        return place if ids is None else int(ids[place])

    def _report(self, logits: "np.ndarray", token_id: int) -> Choice:
        if not self.params.logprobs:
            return Choice(token_id)
        import numpy as np

        shifted = logits - logits.max()
        logprobs = shifted - np.log(np.exp(shifted).sum())
        count = min(self.params.logprobs, logprobs.size)
        least = np.partition(logprobs, -count)[-count]
        ids = np.flatnonzero(logprobs >= least)
        ids = ids[(-logprobs[ids]).argsort(kind="stable")][:count]  # ties: lowest id first
        pairs = zip(ids.tolist(), logprobs[ids].tolist(), strict=True)
        return Choice(token_id, float(logprobs[token_id]), tuple(pairs))
