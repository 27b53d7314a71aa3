"""The header of a safetensors file, which says where its tensors are: written and checked. Floor 0.

Eight bytes of length, little-endian, then JSON: by tensor its dtype, shape, and first and last byte
of the data behind the header. The tensors follow one another without a hole.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from .errors import FormatError
from .format import round_up

MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit


def encode_header(
    tensors: Sequence[tuple[str, str, Sequence[int], int]],
    metadata: Mapping[str, str],
    align: int = 8,
) -> bytes:
    """The length word and JSON header of a safetensors file, padded so that data starts on `align`.

    `tensors` are (name, safetensors dtype, shape, num_bytes) in file order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape, num_bytes in tensors:
        end = offset + num_bytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (round_up(8 + len(text), align) - 8 - len(text))
    return struct.pack("<Q", len(text)) + text


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file; `offset` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
DTYPE_BYTES |= {"U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}


def read_header(file: BinaryIO, name: str) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Parse and check a safetensors header; returns the tensors by name and the metadata.

    Raises FormatError where the file is truncated, overlaps, has holes or is no safetensors file.
    """
    file.seek(0, 2)
    file_bytes = file.tell()
    file.seek(0)
    word = file.read(8)
    if len(word) < 8:
        raise FormatError(f"`{name}` is no safetensors file", f"it has {len(word)} bytes")
    (length,) = struct.unpack("<Q", word)
    if length > MAX_HEADER_BYTES or 8 + length > file_bytes:
        raise FormatError(
            f"`{name}` is damaged", f"its header claims {length} bytes, the file has {file_bytes}"
        )
    try:
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        tensors = {key: _entry(value, 8 + length) for key, value in header.items()}
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise FormatError(f"`{name}` is damaged", f"its header does not parse: {error}") from error
    position = 8 + length
    for key, entry in sorted(tensors.items(), key=lambda item: item[1].offset):
        if entry.offset != position:
            raise FormatError(f"`{name}` is damaged", f"tensor `{key}` overlaps or leaves a hole")
        position += entry.num_bytes
    if position != file_bytes:
        raise FormatError(
            f"`{name}` is truncated or too long", f"expected {position} bytes, got {file_bytes}"
        )
    return tensors, metadata


def _entry(value: Mapping[str, Any], data_start: int) -> TensorEntry:
    begin, end = (int(offset) for offset in value["data_offsets"])
    shape = tuple(int(size) for size in value["shape"])
    dtype = str(value["dtype"])
    count = 1
    for size in shape:
        count *= size
    if begin < 0 or any(size < 0 for size in shape):
        raise ValueError("negative size")
    if dtype in DTYPE_BYTES and count * DTYPE_BYTES[dtype] != end - begin:
        raise ValueError(f"shape {list(shape)} of {dtype} does not fill {end - begin} bytes")
    return TensorEntry(dtype, shape, data_start + begin, end - begin)
