"""What a user may choose about a conversion, checked. No torch."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..runtime.errors import UsageError
from ..runtime.format import BITS, GROUP_SIZES

if TYPE_CHECKING:
    from .bitplan import BitPlan

DEFAULT_BITS = 4
DEFAULT_GROUP_SIZE = 64  # quantize.py says why, and why every width is symmetric by default
DEFAULT_TRUNK_BITS = 8  # half the resident bytes of 16; docs/decisions.md has the price
EXPERT_MODES = ("sym", "nf4")
QUANTIZERS = ("nearest", "absmax", "search", "calibrated")  # docs/quantization.md
TRUNK_BITS = (4, 8, 16)


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """How the experts it is given to are quantized.

    `group_size` is 32, 64, 128, "channel" (one scale a row), or None: 64 where it divides; absmax
    has one scale a row always. `mode` is how codes become weights, "nf4" at 4 bits only. Raises
    UsageError for a value that is none of these, or does not go with another.
    """

    bits: int = DEFAULT_BITS
    group_size: int | str | None = None
    mode: str = "sym"
    quantizer: str = "nearest"

    def __post_init__(self) -> None:
        for value, allowed, name in (
            (self.bits, BITS, "--bits"),
            (self.group_size, (None, *GROUP_SIZES, "channel"), "--group-size"),
            (self.mode, EXPERT_MODES, "--mode"),
            (self.quantizer, QUANTIZERS, "--quantizer"),
        ):
            _one_of(value, allowed, name)
        if self.mode == "nf4" and (self.bits != 4 or self.quantizer != "nearest"):
            other = f"--bits {self.bits}" if self.bits != 4 else f"--quantizer {self.quantizer}"
            raise UsageError(
                f"`--mode nf4` is not possible with `{other}`",
                "its 16 levels take 4 bits and are rounded to nearest",
                "use --bits 4, or leave --mode out",
            )
        if self.per_channel and self.quantizer in ("search", "calibrated"):
            raise UsageError(
                f"`--quantizer {self.quantizer}` is not possible with one scale a row",
                "it looks for the best scale of each group",
                "use --group-size 32, 64 or 128",
            )

    @property
    def per_channel(self) -> bool:
        """Whether a row of a matrix has one scale."""
        return self.group_size == "channel" or self.quantizer == "absmax"

    @property
    def label(self) -> str:
        """Such as `3`, `2 g32`: the width, and the groups where they were asked for."""
        return f"{self.bits}" if self.group_size is None else f"{self.bits} g{self.group_size}"


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """The spec of every expert, unless `plan` has one for each; the trunk is symmetric.

    `variants` stores every expert once for each of these specs instead (planners measure on such a
    store; no engine opens it).
    """

    bits: int = DEFAULT_BITS
    group_size: int | str | None = None
    trunk_bits: int = DEFAULT_TRUNK_BITS
    mode: str = "sym"
    quantizer: str = "nearest"
    plan: "BitPlan | None" = None
    variants: tuple[ExpertSpec, ...] = field(default=())

    def __post_init__(self) -> None:
        _one_of(self.trunk_bits, TRUNK_BITS, "--trunk-bits")
        assert self.spec is not None  # checks the rest

    @property
    def spec(self) -> ExpertSpec:
        """What every expert gets without a plan."""
        return ExpertSpec(self.bits, self.group_size, self.mode, self.quantizer)

    def specs_of(self, layer: int, expert: int) -> tuple[ExpertSpec, ...]:
        """The specs of the records of one expert: one, or all variants."""
        if self.variants:
            return self.variants
        return (self.plan.specs[layer, expert] if self.plan is not None else self.spec,)

    @property
    def all_specs(self) -> set[ExpertSpec]:
        """Every spec that occurs."""
        if self.variants:
            return set(self.variants)
        return set(self.plan.specs.values()) if self.plan is not None else {self.spec}


def _one_of(value: object, allowed: tuple[object, ...], name: str) -> None:
    if value not in allowed:
        choices = ", ".join(str(choice) for choice in allowed if choice is not None)
        raise UsageError(f"`{name} {value}` is not possible", f"expected one of {choices}")
