"""Where weights lie in the files of a checkpoint. No torch."""

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ..runtime.errors import CheckpointError
from ..runtime.headers import DTYPE_BYTES

if TYPE_CHECKING:
    from torch import Tensor

AGAIN = "download the checkpoint again, or compare it with the released one"

INTEGERS = {"I64": "int64", "I32": "int32"}  # of the tables of hash-routed layers
READABLE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors dtype to torch's
TORCH_NAMES = READABLE | INTEGERS


@dataclass(frozen=True, slots=True)
class Source:
    """A contiguous run of weights: a tensor, some of its rows, or one expert of a 3-D tensor."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    def rows(self, begin: int, end: int) -> "Source":
        """Rows `begin` .. `end` - 1 along the first axis."""
        size = prod(self.shape[1:])
        offset = self.offset + begin * size * DTYPE_BYTES[self.dtype]
        return Source(self.name, self.file, self.dtype, (end - begin, *self.shape[1:]), offset)


def refuse_not_finite(weight: "Tensor", source: Source) -> None:
    """Raise CheckpointError where a weight is NaN or infinite."""
    import torch

    bad = ~torch.isfinite(weight)
    count = int(bad.sum())
    if count:
        first = [int(part) for part in bad.nonzero()[0]]
        raise CheckpointError(
            f"tensor `{source.name}` holds NaN or infinite weights",
            f"{count} of {weight.numel()}, the first at {first} of the part read",
            AGAIN,
        )
