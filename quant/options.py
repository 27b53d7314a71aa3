"""What a user may choose about a conversion, checked. No torch."""

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..runtime.errors import UsageError
from ..runtime.format import BITS, GROUP_SIZES

if TYPE_CHECKING:
    from .bitplan import BitPlan

DEFAULT_BITS = 4
DEFAULT_GROUP_SIZE = 64  # quantize.py says why, and why every width is symmetric by default
DEFAULT_TRUNK_BITS = 8  # half the resident bytes of 16; docs/decisions.md has the price
EXPERT_MODES = ("sym", "asym", "nf4")
QUANTIZERS = ("nearest", "absmax", "search", "calibrated")  # docs/quantization.md
TRUNK_BITS = (4, 8, 16)
_WIDTH = re.compile(r"(?P<bits>\d+)(?:(?P<mode>[ga])(?P<group>\d+)?)?")
_LETTERS = {"g": "sym", "a": "asym"}


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """How the experts it is given to are quantized.

    `group_size` is 32, 64, 128, "channel" (one scale a row), or None: 64 where it divides; absmax
    has one scale a row always. `mode` is how codes become weights, "nf4" at 4 bits only. `down`:
    another width for the down projection, written as in `of`. Raises UsageError for a value that
    is none of these, or does not go with another.
    """

    bits: int = DEFAULT_BITS
    group_size: int | str | None = None
    mode: str = "sym"
    quantizer: str = "nearest"
    down: str | None = None

    @classmethod
    def of(cls, width: str, quantizer: str = "nearest") -> "ExpertSpec":
        """`3`; `2g32`, in groups of 32; `2a64`, asymmetric in groups of 64; `2g32/3a32`, gate and
        up as the first and down as the second. Raises UsageError for anything else."""
        wide, slash, down = width.partition("/")
        found = _WIDTH.fullmatch(wide)
        if found is None or (slash and not _WIDTH.fullmatch(down)):
            raise UsageError(f"no width `{width}`", "expected such as 3, 2g32, 2a64 or 2g32/3a32")
        group = int(found["group"]) if found["group"] else None
        mode = _LETTERS[found["mode"] or "g"]
        return cls(int(found["bits"]), group, mode, quantizer, down or None)

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
        if self.mode == "asym" and (self.bits == 16 or self.quantizer == "absmax"):
            raise UsageError(
                "`--mode asym` is not possible here",
                "16 bits have no codes, and absmax has codes symmetric around zero",
                "leave it out",
            )
        if self.down is not None:
            if 16 in (self.bits, self.of_down.bits) or self.per_channel:
                raise UsageError(
                    f"`{self.label}` is not possible", "both parts have group scales, or neither"
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
    def of_down(self) -> "ExpertSpec":
        """What the down projection gets."""
        if self.down is None:
            return self
        found = ExpertSpec.of(self.down, self.quantizer)
        group_size = self.group_size if found.group_size is None else found.group_size
        return replace(found, group_size=group_size)

    @property
    def label(self) -> str:
        """Such as `3`, `2g32`, `2a64/3`, as `of` reads it; groups where they were asked for."""
        group = "" if self.group_size is None else self.group_size
        letter = "a" if self.mode == "asym" else "g" if group else ""
        return f"{self.bits}{letter}{group}" + (f"/{self.down}" if self.down else "")


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
    down: str | None = None
    plan: "BitPlan | None" = None
    variants: tuple[ExpertSpec, ...] = field(default=())

    def __post_init__(self) -> None:
        _one_of(self.trunk_bits, TRUNK_BITS, "--trunk-bits")
        assert self.spec is not None  # checks the rest

    @property
    def spec(self) -> ExpertSpec:
        """What every expert gets without a plan."""
        return ExpertSpec(self.bits, self.group_size, self.mode, self.quantizer, self.down)

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
