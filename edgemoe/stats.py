"""What one answer cost: times, expert cache, memory. Floor 3; returned beside the tokens.

Definitions. TTFT: from the request (rendering and encoding included) to the first token. Decode
speed: (n - 1) / (t_last - t_first), so prefill has no part in it; TPOT is its inverse. Hits and
misses count demanded expert records only, one per expert, layer and step; those that a guess has
brought are neither.
"""

from dataclasses import asdict, dataclass
from typing import Any

from .runtime.process import process_memory

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """Statistics of one answer. Memory is that of the whole process at its end, and its peak."""

    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, kept from the turn before
    generated_tokens: int = 0
    ttft_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0  # first to last token
    native_s: float = 0.0  # of decode_s inside the core; 0 on the reference path
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    stall_s: float = 0.0  # nothing could be computed for want of a record
    compute_s: float = 0.0  # in experts
    guessed: int = 0  # demanded records, neither hits nor misses: a guess had begun to read them
    prefetch: dict[str, Any] | None = None  # the predictor and its guesses; runtime/prefetch.py
    memory_bytes: int = 0
    peak_memory_bytes: int = 0
    budget_bytes: int | None = None
    seed: int | None = None
    routing: str | None = None  # what changed the output: `set code, hard`, `3 active experts`
    active_experts: float | None = None  # then: of a token and layer, mean
    dropped: int = 0  # records that were left out since they were not in memory
    stand_ins: int = 0  # experts computed at fewer bits since they were not in memory

    @property
    def tokens_per_s(self) -> float:
        """Decode speed; 0 below two tokens."""
        if self.generated_tokens < 2 or self.decode_s <= 0:
            return 0.0
        return (self.generated_tokens - 1) / self.decode_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        return self.decode_s / max(1, self.generated_tokens - 1)

    @property
    def dispatch_s(self) -> float:
        """Of decode_s outside the core: Python, sampling, text, the expert cache's decisions."""
        return max(0.0, self.decode_s - self.native_s) if self.native_s else 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens that were computed, not kept, per second."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def hit_rate(self) -> float:
        """Share of demanded records that were in memory; 0 without demand."""
        return self.hits / max(1, self.hits + self.misses + self.guessed)

    def footer(self) -> str:
        """`412 tok · 11.3 tok/s · TTFT 0.9 s · hit 81 % · 4.9/6.0 GiB`."""
        parts = [f"{self.generated_tokens} tok"]
        if self.tokens_per_s:
            parts.append(f"{self.tokens_per_s:.1f} tok/s")
        parts.append(f"TTFT {self.ttft_s:.1f} s")
        if self.hits + self.misses:
            parts.append(f"hit {100 * self.hit_rate:.0f} %")
        budget = "" if self.budget_bytes is None else f"/{self.budget_bytes / GIB:.1f}"
        parts.append(f"{self.memory_bytes / GIB:.1f}{budget} GiB")
        if self.routing:
            parts.append(self.routing)
        if self.active_experts is not None:
            parts.append(f"{self.active_experts:.2f} experts a layer")
        if self.dropped:
            parts.append(f"{self.dropped} dropped")
        if self.stand_ins:
            parts.append(f"{self.stand_ins / max(1, self.generated_tokens):.1f} stand-ins a token")
        return " · ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Fields and derived figures as plain JSON values."""
        derived = ("tokens_per_s", "tpot_s", "dispatch_s", "prefill_tokens_per_s", "hit_rate")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def memory_bytes(worker_pid: int | None = None) -> int:
    """Resident bytes of this process and of its template worker now."""
    return process_memory().rss_bytes + _resident_bytes(worker_pid)


def peak_memory_bytes(worker_pid: int | None = None) -> int:
    """The largest resident bytes of this process so far, with those of its template worker now."""
    memory = process_memory()
    return (memory.peak_rss_bytes or memory.rss_bytes) + _resident_bytes(worker_pid)


def _resident_bytes(pid: int | None) -> int:
    if pid is None:
        return 0
    import psutil

    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.Error:  # it has just ended
        return 0
