"""The arms of `bench --ablation`: what each keeps in memory, reads, and when. docs/ablation.md."""

from dataclasses import dataclass

from ..runtime.index import StoreIndex

RATES = (50_000_000, 550_000_000, 1_500_000_000)
REFERENCE, SHARED = "16", "4"  # stores: of the loss, and what --share is a share of
MIN_TOKENS, MAX_TOKENS = 2, 64


@dataclass(frozen=True, slots=True)
class Arm:
    """One scheme. `store`: which of the derived stores. `keeps`: the expert cache: `all`, the
    `share` asked for, or as many `layers` as a number says, each of one token's experts."""

    name: str
    store: str
    keeps: str
    prefetch: str = "none"
    policy: str = "lru"
    streams: bool = False

    @property
    def is_resident(self) -> bool:
        return self.keeps == "all"

    @property
    def is_warm(self) -> bool:
        """Whether what was read for one token may serve a later one."""
        return self.keeps == "share" and not self.streams


ARMS = (
    Arm("IO-FREE", "16", "all"),
    Arm("IO-QFREE", "8", "all"),
    Arm("IO-EXP", "16", "1"),
    Arm("IO-QEXP", "4", "1"),
    Arm("STI-like", "4", "share", streams=True),
    Arm("+bits", "mixed", "1"),
    Arm("+preload", "mixed", "2", prefetch="auto"),
    Arm("+cache", "mixed", "share", prefetch="auto", policy="cycle"),
    Arm("+forecast (ours)", "mixed", "share", prefetch="auto", policy="forecast"),
)
BASELINE, BEST = "IO-EXP", "+forecast (ours)"
ORDER = (BASELINE, "IO-QEXP", BEST, "IO-FREE")  # slowest first, as it should be
PAPER_GAIN = 3.22  # papers.md 1.7: IO-EXP over EdgeMoE, Switch base-8 on a Jetson TX2


def capacity(arm: Arm, index: StoreIndex, top_k: int, share_bytes: int) -> int:
    """Bytes of an arm's expert cache."""
    if arm.keeps == "all":
        return index.expert_bytes
    if arm.keeps == "share":
        return share_bytes
    return int(arm.keeps) * top_k * index.max_record_bytes


def bytes_per_token(arm: Arm, index: StoreIndex, top_k: int, hit_rate: float = 0.5) -> float:
    """What an arm is expected to read for a token; `hit_rate`: of those that keep records."""
    if arm.is_resident:
        return 0.0
    if arm.streams:
        return float(index.expert_bytes)
    counts = index.layer_to_num_experts
    read = top_k * sum(
        index.expert_bytes / len(index.records) for _ in counts
    )  # every layer has as many
    return read * (1 - hit_rate) if arm.is_warm else read


def num_tokens(expected_bytes: float, rate: int, seconds: float, available: int) -> int:
    """Tokens that take about `seconds` on a drive of this rate, 2 to 64 (one where that takes ten
    times as long)."""
    most = min(MAX_TOKENS, available)
    if not expected_bytes:
        return most
    wanted = int(seconds * rate / expected_bytes)
    if wanted < 1 and MIN_TOKENS * expected_bytes / rate > 10 * seconds:
        return 1
    return max(min(MIN_TOKENS, most), min(most, wanted))
