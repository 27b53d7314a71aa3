"""Greedy decoding of an exact number of tokens, with a hash of every logit: what verify and bench
share. There is no end of text here: a measured or compared run has the length it was asked for.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Decoded:
    """Tokens, what they cost, and a hash of the fp32 logits of every step.

    `prefill` and `decode` hold demand and time as `StepStats` names them.
    """

    token_ids: list[int] = field(default_factory=list)
    logits_hash: str = ""
    prefill_s: float = 0.0
    step_s: list[float] = field(default_factory=list)  # one per token after the first
    prefill: dict[str, float] = field(default_factory=dict)
    decode: dict[str, float] = field(default_factory=dict)

    @property
    def decode_s(self) -> float:
        return sum(self.step_s)


def greedy(session: Any, prompt: Sequence[int], num_tokens: int) -> Decoded:
    """Decode `num_tokens` tokens after the token ids of `prompt`."""
    result, digest, engine = Decoded(), hashlib.sha256(), session.engine
    engine.take_step_stats()  # what others did before is not ours
    begin = time.perf_counter()
    logits = session.logits(prompt)
    token = int(logits.argmax())
    result.prefill_s = time.perf_counter() - begin
    result.prefill = counters(engine.take_step_stats())
    while True:
        result.token_ids.append(token)
        digest.update(logits)
        if len(result.token_ids) >= num_tokens:
            break
        begin = time.perf_counter()
        logits, best = session.step(token)
        token = int(logits.argmax()) if best is None else best
        result.step_s.append(time.perf_counter() - begin)
    result.decode = counters(engine.take_step_stats())
    result.logits_hash = digest.hexdigest()
    return result


def counters(step: Any) -> dict[str, float]:
    """The demand and the times of `Engine.take_step_stats` that a run adds up."""
    return asdict(step)


def text_tokens(tokenizer: Any, text: str, num_tokens: int, start: int = 0) -> list[int]:
    """`num_tokens` tokens of a text from token `start` on; it begins again where it ends."""
    ids = tokenizer.encode(text)
    return [ids[(start + i) % len(ids)] for i in range(num_tokens)]
