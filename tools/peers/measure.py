"""What every engine of a side-by-side run is put through: the same tokens, the same clock.

A token file is JSON: {"prompt": [ids], "continuation": [ids]}. The continuation is fed token by
token whatever the engine would have said (teacher forcing), so that all engines decode one text.
"""

import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WARM_UP_TOKENS = 8

KEPT_LOGITS = 4096  # of the last token: enough to see whether two engines run one model

Feed = Callable[[Sequence[int]], Any]  # appends tokens; returns the logits after the last


def random_tokens(vocab: int, prompt: int, continuation: int, seed: int) -> dict[str, list[int]]:
    """Uniformly random ids: no locality beyond the popularity of the experts."""
    generator = random.Random(seed)
    ids = [generator.randrange(vocab) for _ in range(prompt + continuation)]
    return {"prompt": ids[:prompt], "continuation": ids[prompt:]}


def read_tokens(path: Path) -> tuple[list[int], list[int]]:
    """Prompt and continuation of a token file."""
    document = json.loads(path.read_text(encoding="utf-8"))
    return document["prompt"], document["continuation"]


def run_rounds(
    feed: Feed,
    reset: Callable[[], None],
    prompt: Sequence[int],
    continuation: Sequence[int],
    repeats: int,
    warm_up: bool,
) -> dict[str, Any]:
    """Prefill the prompt and decode the continuation `repeats` times.

    The warm-up is an unmeasured round of the whole prompt and a few tokens. Returns tokens per
    second of every round, the seconds of every decoded token, and the first logits after the last.
    """
    prefill, decode, steps = [], [], []
    for turn in range(-1 if warm_up else 0, repeats):
        reset()
        times = [time.perf_counter()]
        tokens = continuation if turn >= 0 else continuation[:WARM_UP_TOKENS]
        for ids in (prompt, *([token] for token in tokens)):
            logits = feed(ids)
            times.append(time.perf_counter())
        if turn < 0:
            continue
        took = [end - begin for begin, end in zip(times, times[1:], strict=False)]
        prefill.append(len(prompt) / took[0])
        if continuation:
            decode.append(len(continuation) / sum(took[1:]))
            steps.append(took[1:])
    return {
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": decode,
        "step_s": steps,
        "logits": [float(value) for value in logits[:KEPT_LOGITS]],
    }


def report(document: dict[str, Any]) -> None:
    """One JSON line on standard output."""
    print(json.dumps(document), flush=True)
