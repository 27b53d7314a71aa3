"""Collects the statistics of one answer while it is drawn. Floor 3."""

import time
from typing import TYPE_CHECKING, Any

from .models.rules import RoutingCounts
from .stats import GenerationStats

if TYPE_CHECKING:
    from .engine import Engine


class Meter:
    """One answer's; `Engine.charge` tells what belongs to it."""

    def __init__(self, engine: "Engine", prompt_tokens: int, encode_s: float) -> None:
        self._engine = engine
        self.prompt_tokens, self.cached_tokens, self.generated_tokens = prompt_tokens, 0, 0
        self.seed: int | None = None
        self._start = time.perf_counter() - encode_s
        self._prefill_s = 0.0
        self._first = self._last = 0.0
        self._result: GenerationStats | None = None
        self._guesses_before = engine.prefetch.stats()
        self._routed_before = engine.routing_counts() if engine.routing else None
        names = ("hits", "misses", "bytes_read", "stall_s", "compute_s", "native_s", "guessed")
        self._sums = dict.fromkeys(names, 0)

    def add(self, step: Any) -> None:
        """Count what the engine did for this answer."""
        for name in self._sums:
            self._sums[name] += getattr(step, name)

    def prefilled(self) -> None:
        self._prefill_s = time.perf_counter() - self._start
        self._engine.charge(None)
        self._sums["native_s"] = 0  # of a prompt of one token

    def drew_token(self) -> None:
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self.generated_tokens += 1

    def finish(self) -> GenerationStats:
        """The statistics; they do not change after the first call."""
        if self._result is None:
            if self._engine.charged is self:
                self._engine.charge(None)
            self._result = self._stats()
        return self._result

    def _stats(self) -> GenerationStats:
        change, routed = self._engine.routing, RoutingCounts()
        if change is not None and not change.routing.is_plain:
            routed = self._engine.routing_counts() - (self._routed_before or routed)
        return GenerationStats(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            generated_tokens=self.generated_tokens,
            ttft_s=max(0.0, self._first - self._start) if self._first else 0.0,
            prefill_s=self._prefill_s,
            decode_s=self._last - self._first,
            memory_bytes=self._engine.memory_bytes(),
            peak_memory_bytes=self._engine.peak_memory_bytes(),
            budget_bytes=self._engine.plan.budget_bytes,
            seed=self.seed,
            routing=None if change is None else change.label,
            active_experts=routed.mean_active,
            dropped=routed.num_dropped,
            stand_ins=routed.num_stand_ins,
            prefetch=self._engine.prefetch.report(since=self._guesses_before),
            **self._sums,
        )
