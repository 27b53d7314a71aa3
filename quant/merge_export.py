"""Merged experts as a Hugging Face checkpoint, to be trained: UNCURL's form (2409.01483).

Every layer has as many experts, and its router is new and random. config.json says so
(`untrained_routers`), and so does a store that is converted from it, which no engine runs: training
comes first, and whoever has trained takes the word out of config.json.
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..runtime.errors import UsageError
from ..runtime.headers import DTYPE_BYTES, encode_header
from .checkpoint import SINGLE_FILE, Checkpoint
from .disk import need_room
from .merge import Merge
from .merge_bodies import merged_body
from .plan import copied_files
from .progress import Progress, Silent
from .sources import READABLE, Source

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # as config.json may spell it
_BLOCK_BYTES = 16 << 20


def export_merged(
    checkpoint: str | Path,
    merge: Merge,
    out: str | Path,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write the merged experts of `checkpoint`, its trunk and random routers (by `seed`, as spread
    as the old ones) as a checkpoint folder; returns its path.

    Works in `out` + `.partial`, which is renamed at the end and removed on failure. Raises
    UsageError where layers differ or `out` exists, BudgetError where the disk is too small.
    """
    out, progress = Path(out), progress or Silent()
    counts = {len(each.groups) for each in merge.values()}
    if len(counts) > 1:
        raise UsageError(
            "a checkpoint has as many experts in every layer",
            f"these would have {min(counts)} to {max(counts)}",
            "leave --keep-first-layer out",
        )
    if out.exists():
        raise UsageError(f"`{out}` is there already", "", "give another name, or remove it")
    with Checkpoint(checkpoint) as source:
        plan = _plan(source, merge)
        total = sum(num_bytes for *_, num_bytes in plan)
        need_room(out.parent, total + _BLOCK_BYTES, "the checkpoint")
        folder = out.with_name(out.name + ".partial")
        folder.mkdir()
        try:
            progress.start("export", total)
            with open(folder / SINGLE_FILE, "wb") as file:
                file.write(encode_header(plan, {"format": "pt"}))
                _write(file, source, merge, plan, seed, progress)
                file.flush()
                os.fsync(file.fileno())
            for name in copied_files(source.path):
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source.path / name, folder / name)
            names = {name: counts.copy().pop() for name in _COUNTS if name in source.config}
            config = source.config | names | {"untrained_routers": True}
            (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
            os.replace(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return out


def _plan(source: Checkpoint, merge: Merge) -> list[tuple[str, str, tuple[int, ...], int]]:
    """Name, dtype, shape and bytes of every tensor, the trunk first."""
    routers = {source.module.router_name(layer): layer for layer in merge}
    plan = []
    for name, entry in source.trunk.items():
        shape = entry.shape
        if name in routers:
            shape = (len(merge[routers[name]].groups), *shape[1:])
        plan.append((name, entry.dtype, shape))
    for layer, each in merge.items():
        for number, group in enumerate(each.groups):
            parts = source.expert_sources(layer, group.head)
            for proj, part in zip(("gate", "up", "down"), parts, strict=True):
                name = source.module.expert_tensor(layer, number, proj)
                plan.append((name, part.dtype, part.shape))
    # Wide dtypes first, so that every tensor is aligned to its own.
    plan.sort(key=lambda item: -DTYPE_BYTES[item[1]])
    return [(name, dtype, shape, _num_bytes(dtype, shape)) for name, dtype, shape in plan]


def _num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return Source("", "", dtype, shape, 0).num_bytes


def _write(
    file: BinaryIO,
    source: Checkpoint,
    merge: Merge,
    plan: list[tuple[str, str, tuple[int, ...], int]],
    seed: int,
    progress: Progress,
) -> None:
    routers = {source.module.router_name(layer): layer for layer in merge}
    experts = {
        source.module.expert_tensor(layer, number, proj): (layer, number, part)
        for layer, each in merge.items()
        for number in range(len(each.groups))
        for part, proj in enumerate(("gate", "up", "down"))
    }
    rng = torch.Generator().manual_seed(seed)
    made: tuple[tuple[int, int] | None, tuple[Tensor, ...]] = (None, ())
    for name, dtype, shape, num_bytes in plan:
        if name in experts:
            layer, number, part = experts[name]
            if made[0] != (layer, number):
                group = merge[layer].groups[number]
                read = partial(source.expert, layer)
                made = (layer, number), merged_body(group, read)
            blocks = [made[1][part].to(getattr(torch, READABLE[dtype]))]
        elif name in routers:
            spread = float(source.read(source.trunk[name]).float().std())
            rows = torch.randn(shape, generator=rng) * spread
            blocks = [rows.to(getattr(torch, READABLE[dtype]))]
        else:
            blocks = source.read_blocks(source.trunk[name], _BLOCK_BYTES, 1)
        for block in blocks:
            file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        progress.advance(num_bytes)
