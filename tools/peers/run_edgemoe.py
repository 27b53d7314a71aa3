"""Measure edgemoe as `run_llama_cpp.py` measures llama.cpp: the same tokens, the same clock.

    python tools/peers/run_edgemoe.py olmoe.edgemoe --tokens tokens.json --memory 2GiB

One process per measurement; one JSON line on standard output. Without `--memory` every expert stays
resident, and is read while the engine opens.
"""

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import read_tokens, report, run_rounds

COUNTED = ("hits", "misses", "bytes_read", "stall_s")


class Runner:
    """One engine and one session; `costs` has the counters of every call since the last reset."""

    def __init__(self, path: Path, memory: str | None, threads: int, context: int) -> None:
        from edgemoe.engine import Engine
        from edgemoe.session import Session

        begin = time.perf_counter()
        self.engine = Engine.from_pretrained(
            path, memory=memory, context=context, threads=threads, warm_start="off"
        )
        if memory is None:
            self.engine.cache.preload()
        self._session = Session(self.engine)
        self.load_s = time.perf_counter() - begin
        self._tokens: list[int] = []
        self.costs: list[dict[str, float]] = []

    def reset(self) -> None:
        """Forget all tokens; what the expert cache holds stays."""
        self._tokens, self.costs = [], []
        self._session.reset()
        self.engine.take_step_stats()

    def feed(self, ids: Sequence[int]) -> Any:
        """Append tokens; the fp32 logits [vocab] after the last."""
        self._tokens.extend(ids)
        logits = self._session.logits(self._tokens)
        step = self.engine.take_step_stats()
        self.costs.append({name: getattr(step, name) for name in COUNTED})
        return logits


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--tokens", type=Path, required=True, help="JSON, see measure.py")
    parser.add_argument("--memory", help="the budget (default: every expert stays)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--decode", type=int, help="decode only the first N of the continuation")
    parser.add_argument("--no-warm-up", dest="warm_up", action="store_false")
    options = parser.parse_args(arguments)
    prompt, continuation = read_tokens(options.tokens)
    continuation = continuation[: options.decode]
    context = len(prompt) + len(continuation) + 8
    runner = Runner(options.store, options.memory, options.threads, context)
    found = run_rounds(
        runner.feed, runner.reset, prompt, continuation, options.repeats, options.warm_up
    )
    decode = runner.costs[1:]
    total = {name: sum(cost[name] for cost in decode) for name in COUNTED}
    usage = resource.getrusage(resource.RUSAGE_SELF)
    report(
        {
            "engine": "edgemoe",
            "file": options.store.name,
            "file_bytes": sum(file.stat().st_size for file in options.store.iterdir()),
            "mode": "resident" if options.memory is None else "streamed",
            "threads": options.threads,
            "load_s": runner.load_s,
            **found,
            "prefill_bytes_read": runner.costs[0]["bytes_read"],
            "bytes_read_per_token": total["bytes_read"] / max(1, len(decode)),
            "stall_s_per_token": total["stall_s"] / max(1, len(decode)),
            "hit_rate": total["hits"] / max(1, total["hits"] + total["misses"]),
            "major_faults": usage.ru_majflt,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "notes": list(runner.engine.notes),
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
