"""A conversion plan for people: one row per class of tensors. Decides nothing. No torch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..runtime.amounts import format_count
from ..runtime.format import QuantSpec


@dataclass(frozen=True, slots=True)
class PlanRow:
    """One class of tensors. `storage` says in words how they are stored."""

    name: str
    num_tensors: int
    num_weights: int
    source_bytes: int
    output_bytes: int
    storage: str

    @property
    def bpw(self) -> float:
        """Bits per weight, scales and padding included."""
        return 8 * self.output_bytes / max(1, self.num_weights)


HASH_TABLES = "experts by token id"  # of hash-routed layers
_CLASSES: tuple[tuple[str, Callable[[str, int], bool]], ...] = (
    ("norms, biases", lambda name, num_axes: num_axes < 2),
    ("embedding, head", lambda name, num_axes: "embed" in name or "lm_head" in name),
    ("attention", lambda name, num_axes: "attn" in name),
    ("shared expert", lambda name, num_axes: "shared_expert" in name),
)


def class_of(name: str, num_axes: int) -> str:
    """The class of a trunk tensor that is no router."""
    return next((label for label, test in _CLASSES if test(name, num_axes)), "dense layers")


def storage_text(kinds: Iterable[QuantSpec | str]) -> str:
    """How some tensors are stored: quantized by a spec, or as a safetensors dtype."""
    return ", ".join(
        sorted({kind.lower() if isinstance(kind, str) else _spec_text(kind) for kind in kinds})
    )


def _spec_text(spec: QuantSpec) -> str:
    if spec.is_16bit:
        return spec.mode
    return f"{spec.bits} bit {spec.mode}, groups of {spec.group_size}"


def table(rows: list[PlanRow]) -> list[str]:
    """The rows and their total as aligned lines of plain text."""
    counts = (sum(row.num_tensors for row in rows), sum(row.num_weights for row in rows))
    sizes = (sum(row.source_bytes for row in rows), sum(row.output_bytes for row in rows))
    cells = [("", "tensors", "weights", "now", "store", "bpw", "stored as")]
    for row in [*rows, PlanRow("total", *counts, *sizes, "")]:
        cells.append(
            (
                row.name,
                f"{row.num_tensors:,}",
                format_count(row.num_weights),
                _size(row.source_bytes),
                _size(row.output_bytes),
                f"{row.bpw:.2f}",
                row.storage,
            )
        )
    widths = [max(len(line[column]) for line in cells) for column in range(6)]
    lines = []
    for line in cells:
        numbers = [line[column].rjust(widths[column]) for column in range(1, 6)]
        lines.append("  ".join([line[0].ljust(widths[0]), *numbers, line[6]]).rstrip())
    return lines


def _size(num_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes} B"
