"""The trunk of a store of merged experts: as it is, or with a row for every merged expert in the
routers."""

import os
from pathlib import Path

import torch
from torch import Tensor

from ..runtime.errors import FormatError
from ..runtime.format import PAGE_BYTES
from ..runtime.headers import encode_header, read_header
from ..runtime.index import TRUNK_FILE
from .merge import LayerMerge, Merge
from .merge_bodies import merged_rows
from .store_source import StoreSource

_BLOCK_BYTES = 16 << 20
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write_trunk(own: StoreSource, merge: Merge, target: Path, router: str) -> None:
    """Write the trunk of `own` to `target`, synced; see `write_merged` for `router`."""
    with open(own.path / TRUNK_FILE, "rb") as file:
        tensors, metadata = read_header(file, TRUNK_FILE)
    routers = {}
    if router != "index-map":
        routers = {own.module.router_name(layer): groups for layer, groups in merge.items()}
    entries, new = [], {}
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].offset):
        shape, num_bytes = entry.shape, entry.num_bytes
        if name in routers:
            if name in own.index.packed_trunk:
                raise FormatError(f"the router `{name}` is packed", "its rows cannot be merged")
            stored = bytearray(b"".join(own.trunk_bytes(name, _BLOCK_BYTES)))
            rows = torch.frombuffer(stored, dtype=_TORCH[entry.dtype]).reshape(shape)
            new[name] = _router(rows, routers[name])
            shape, num_bytes = tuple(new[name].shape), new[name].nbytes
        entries.append((name, entry.dtype, shape, num_bytes))
    with open(target, "wb") as out:
        out.write(encode_header(entries, metadata, PAGE_BYTES))
        for name, *_ in entries:
            if name in new:
                out.write(new[name].view(torch.uint8).numpy().tobytes())
                continue
            for block in own.trunk_bytes(name, _BLOCK_BYTES):
                out.write(block.data)
        out.flush()
        os.fsync(out.fileno())


def _router(rows: Tensor, merge: LayerMerge) -> Tensor:
    """rows `[E, D]` -> one for each group, of the same dtype."""
    every = rows.float()
    new = torch.stack([merged_rows(group, every) for group in merge.groups])
    return new.to(rows.dtype).contiguous()
