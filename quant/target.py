"""What a plan that is found shall meet, and the widths it chooses from. No torch."""

from dataclasses import dataclass, replace

from ..runtime.amounts import format_bytes
from ..runtime.errors import UsageError
from ..runtime.format import RecordLayout
from .options import ExpertSpec
from .plan import ConversionPlan

PLANNERS = ("fast", "edgemoe")
# By planner. Down loses most (docs/decisions.md), so it gets another bit before gate and up do.
WIDTHS = {
    "fast": ("2", "2a64/2a32", "2a64/3a32", "2a64/4a32", "3a64/4a32", "4", "8"),
    "edgemoe": ("2", "3", "4", "8"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """What a plan shall meet: exactly one of a measured loss (the rise of perplexity over experts
    at the widest width, .02 is 2 %), bytes of both weight files, or bits a weight of the experts.
    """

    max_loss: float | None = None
    size_bytes: int | None = None
    bpw: float | None = None
    planner: str = "fast"
    widths: tuple[str, ...] = ()  # such as "3" and "2g32"; none: those of the planner

    def __post_init__(self) -> None:
        given = [value for value in (self.max_loss, self.size_bytes, self.bpw) if value is not None]
        if len(given) != 1:
            raise UsageError(
                "`--bits auto` needs one target",
                f"{len(given)} were given",
                "give one of --max-loss 2%, --size 4GiB, --bpw 3.0",
            )
        if self.planner not in PLANNERS:
            raise UsageError(f"no planner `{self.planner}`", f"expected one of {PLANNERS}")
        if self.planner == "edgemoe" and self.max_loss is None:
            raise UsageError(
                "`--planner edgemoe` needs `--max-loss`",
                "it fills up to a measured loss",
                "use --max-loss, or the fast planner",
            )
        if len(self.variants(None)) < 2:
            raise UsageError("`--widths` needs two widths or more", f"got {list(self.widths)}")

    def variants(self, group_size: int | str | None) -> tuple[ExpertSpec, ...]:
        """The specs to choose from, narrowest first, in groups of `group_size` where it is given
        and a width says nothing else. At 8 bits rounding to nearest is enough.

        Raises UsageError for a width that cannot be.
        """
        given = self.widths or WIDTHS[self.planner if group_size is None else "edgemoe"]
        return tuple(sorted({_spec(width, group_size) for width in given}, key=_bits))

    def max_bytes(self, plan: ConversionPlan) -> int | None:
        """Bytes that the records may take; raises UsageError where not even the narrowest fit."""
        narrowest = sum(
            layout.num_bytes
            for (_, number), layout in plan.layouts.items()
            if number % plan.num_variants == 0
        )
        num_experts = len(plan.layouts) // plan.num_variants
        most = None
        if self.bpw is not None:
            first = next(iter(plan.layouts.values()))
            most = int(self.bpw * num_experts * num_weights(first) / 8)
        if self.size_bytes is not None:
            header = len(plan.experts_header) // plan.num_variants + 4096
            most = self.size_bytes - plan.trunk_bytes - header
        if most is not None and most < narrowest:
            first = next(iter(plan.layouts.values()))
            least = 8 * narrowest / num_experts / num_weights(first)
            raise UsageError(
                "no plan is that small",
                f"{num_experts} experts at the narrowest width take {format_bytes(narrowest)} "
                f"({least:.2f} bits a weight), the trunk {format_bytes(plan.trunk_bytes)}",
                "give a larger --size or --bpw, or fewer --trunk-bits",
            )
        return most


def _spec(width: str, group_size: int | str | None) -> ExpertSpec:
    """A width as a spec, in groups of `group_size` where it says nothing else."""
    spec = ExpertSpec.of(width)
    if spec.bits == 16:
        raise UsageError(f"no width `{width}`", "expected 2, 3, 4 or 8, or such as 2g32")
    quantizer = "calibrated" if min(spec.bits, spec.of_down.bits) < 8 else "nearest"
    size = group_size if spec.group_size is None else spec.group_size
    return replace(spec, group_size=size, quantizer=quantizer)


def _bits(spec: ExpertSpec) -> float:
    """Bits of a weight, roughly: to sort by."""

    def of(part: ExpertSpec) -> float:
        return part.bits + (32 if part.mode == "asym" else 16) / float(part.group_size or 64)

    return (2 * of(spec) + of(spec.of_down)) / 3


def num_weights(layout: RecordLayout) -> int:
    return 3 * layout.hidden * layout.width
