"""Where weights lie in the files of a checkpoint. No torch."""

from dataclasses import dataclass
from math import prod

from ..runtime.format import DTYPE_BYTES

READABLE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # safetensors dtype to torch's


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
