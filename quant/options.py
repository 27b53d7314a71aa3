"""What a user may choose about a conversion, checked. No torch."""

from dataclasses import dataclass

from ..runtime.errors import UsageError
from ..runtime.format import BITS, GROUP_SIZES

DEFAULT_BITS = 4
DEFAULT_GROUP_SIZE = 64  # quantize.py says why, and why every width is symmetric by default
DEFAULT_TRUNK_BITS = 8  # half the resident bytes of 16; docs/decisions.md has the price
EXPERT_MODES = ("sym", "nf4")
TRUNK_BITS = (4, 8, 16)


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """`group_size` is 32, 64, 128, "channel" (one scale a row), or None: 64 where it divides.

    `mode` is how expert codes become weights, "nf4" at 4 bits only; the trunk is symmetric.
    Raises UsageError for a value that is none of these.
    """

    bits: int = DEFAULT_BITS
    group_size: int | str | None = None
    trunk_bits: int = DEFAULT_TRUNK_BITS
    mode: str = "sym"

    def __post_init__(self) -> None:
        for value, allowed, name in (
            (self.bits, BITS, "--bits"),
            (self.group_size, (None, *GROUP_SIZES, "channel"), "--group-size"),
            (self.trunk_bits, TRUNK_BITS, "--trunk-bits"),
            (self.mode, EXPERT_MODES, "--mode"),
        ):
            if value not in allowed:
                choices = ", ".join(str(choice) for choice in allowed if choice is not None)
                raise UsageError(f"`{name} {value}` is not possible", f"expected one of {choices}")
        if self.mode == "nf4" and self.bits != 4:
            raise UsageError(
                f"`--mode nf4` is not possible with `--bits {self.bits}`",
                "its 16 levels take 4 bits",
                "use --bits 4, or leave --mode out",
            )
