"""Checkpoint in, store out: one expert at a time, resumable, checked, renamed at the end.

Follows a `ConversionPlan`. The order on disk is the order of work: experts by (layer, expert), then
the trunk, then the small files, then a pass that reads everything back and compares every checksum,
then store.json, then the rename. In memory are a few experts, less than a layer.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..runtime import kernels
from ..runtime.errors import UsageError
from ..runtime.format import TILE_ROWS
from ..runtime.index import (
    EXPERTS_FILE,
    TRUNK_FILE,
    ExpertRecord,
    PackedTensor,
    StoreIndex,
    save_index,
)
from .calibrated import Calibration, calibrated_records
from .disk import need_room
from .hash_tables import check_tables
from .identity import fingerprint
from .journal import Crcs, Partial, check_target, finish_published, kept_for_later, partial_path
from .layouts import TrunkItem
from .options import ConvertOptions
from .pack import USES_INPUTS, Record, checked, coded, in_order, pack_expert
from .plan import ConversionPlan, make_plan
from .progress import Progress, Silent
from .quantize import quantize, to_16bit
from .readback import check_experts, sha256_of
from .store_source import StoreSource, WeightSource, open_source

_IN_FLIGHT_BYTES = 512 << 20  # of experts as they came
_BLOCK_BYTES = 16 << 20  # of the trunk
_DISK_MARGIN_BYTES = 32 << 20  # store.json, the journal, the file system's own tables


def convert(
    source: str | Path | StoreSource,
    out: str | Path,
    options: ConvertOptions | None = None,
    progress: Progress | None = None,
    num_threads: int | None = None,
    calibration: Calibration | None = None,
) -> Path:
    """Convert `source`, a checkpoint folder or a store, to the store `out` and return its path.

    Goes on where an equal, interrupted conversion stopped. With `calibration` the searched scales
    weigh the inputs that its text gives every expert; the calibrated quantizer needs it. Raises
    CheckpointError for damaged input (nothing is left behind), UsageError for a target that is
    there or options that do not fit, BudgetError for a disk that is too small or full (what was
    written is kept for the next run).
    """
    target, options = Path(out), options or ConvertOptions()
    progress, num_threads = progress or Silent(), num_threads or num_cpus()
    with source if isinstance(source, StoreSource) else open_source(source) as checkpoint:
        if calibration is None:
            _refuse_calibrated(checkpoint, options)
        elif not any(spec.quantizer in USES_INPUTS for spec in options.all_specs):
            calibration = None  # nothing would be done with it
        plan = make_plan(checkpoint, options, calibration and calibration.to_json())
        wanted = fingerprint(checkpoint, options, calibration and calibration.digest)
        if finish_published(target, wanted):
            return target
        check_target(target)
        check_tables(checkpoint)
        _check_disk(target, plan, checkpoint.path)
        partial = Partial.open(target, wanted)
        with closing(progress), kept_for_later(partial, progress):
            _write_experts(checkpoint, plan, partial, progress, num_threads, calibration)
            write_trunk(checkpoint, plan, partial, progress)
            index = finish_store(checkpoint, plan, partial, progress)
            save_index(index)
            partial.publish()
    return target


def _refuse_calibrated(source: WeightSource, options: ConvertOptions) -> None:
    if isinstance(source, StoreSource) and source.is_choice:
        return  # its records are done
    if any(spec.quantizer == "calibrated" for spec in options.all_specs):
        raise UsageError(
            "the calibrated quantizer needs a text",
            "it rounds by what the inputs of each expert are",
            "give --calibration FILE, or another --quantizer",
        )


def num_cpus() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_disk(target: Path, plan: ConversionPlan, source: Path) -> None:
    copied = sum((source / file).stat().st_size for file in plan.copied)
    needed = plan.output_bytes + copied + _DISK_MARGIN_BYTES
    files = (partial_path(target) / name for name in (EXPERTS_FILE, TRUNK_FILE))
    needed -= sum(file.stat().st_size for file in files if file.exists())
    step = "free some space, or choose fewer --bits or another --out"
    need_room(target.parent, needed, next_step=step)


# ---- experts ------------------------------------------------------------------------------------


def _write_experts(
    checkpoint: WeightSource,
    plan: ConversionPlan,
    partial: Partial,
    progress: Progress,
    num_threads: int,
    calibration: Calibration | None,
) -> None:
    sizes = {
        (layer, number): checkpoint.expert_bytes(layer, number // plan.num_variants)
        for layer, number in plan.layouts
    }
    done = [key for key in plan.layouts if key[0] in partial.layer_to_crcs]
    todo = [key for key in plan.layouts if key[0] not in partial.layer_to_crcs]
    if done:
        layers = len(partial.layer_to_crcs)
        progress.note(f"going on: {layers} of {len(checkpoint.args.moe_layers)} layers are done")
    progress.start("experts", sum(sizes.values()), sum(sizes[key] for key in done))
    written = sum(plan.layouts[key].num_bytes for key in done)
    file = partial.open_file(EXPERTS_FILE, plan.experts_header, written)
    # As many as there are threads, but few enough that wide experts do not add up to a layer.
    workers = max(1, min(num_threads, _IN_FLIGHT_BYTES // max(sizes.values())))
    crcs: Crcs = []
    try:
        if calibration is None or not todo:
            records = plain_records(checkpoint, plan, todo, workers)
        else:
            records = calibrated_records(checkpoint, plan, todo, workers, calibration)
        for (layer, number), (record, pair) in records:
            file.write(record)
            crcs.append(pair)
            progress.advance(sizes[layer, number])
            del record
            if number == checkpoint.args.num_experts * plan.num_variants - 1:
                file.sync()
                partial.layer_to_crcs[layer] = crcs
                partial.save()
                crcs = []
    finally:
        file.close()


def plain_records(
    source: WeightSource, plan: ConversionPlan, keys: list[tuple[int, int]], workers: int
) -> Iterator[tuple[tuple[int, int], Record]]:
    """Packed experts in the order of `keys`; `workers` threads each read and pack a whole one."""

    def make(key: tuple[int, int]) -> Record:
        layer, number = key
        expert, layout = number // plan.num_variants, plan.layouts[key]
        stored = source.record(layer, expert, layout)
        if stored is not None:
            return checked(stored, layout)
        return pack_expert(source.expert(layer, expert), layout, plan.spec_of(layer, number))

    yield from zip(keys, in_order(make, keys, workers), strict=True)


# ---- trunk and the rest -------------------------------------------------------------------------


def write_trunk(
    checkpoint: WeightSource, plan: ConversionPlan, partial: Partial, progress: Progress
) -> None:
    done = plan.trunk[: partial.num_trunk_tensors]
    finished = sum(item.source_bytes for item in done)
    total = sum(item.source_bytes for item in plan.trunk)
    progress.start("trunk", total, finished)
    written = sum(item.num_bytes for item in done)
    file = partial.open_file(TRUNK_FILE, plan.trunk_header, written)
    unsynced = 0
    try:
        for number, item in enumerate(plan.trunk[len(done) :], len(done) + 1):
            for data in _trunk_blocks(checkpoint, item, progress.advance):
                file.write(data)
            unsynced += item.num_bytes
            if unsynced >= file.sync_every_bytes or number == len(plan.trunk):
                file.sync()
                partial.num_trunk_tensors, unsynced = number, 0
                partial.save()
    finally:
        file.close()


def _trunk_blocks(
    checkpoint: WeightSource, item: TrunkItem, advance: Callable[[int], None]
) -> Iterator[np.ndarray]:
    """The stored bytes of a trunk tensor, in runs of rows so that a large one is never whole."""
    multiple = TILE_ROWS if item.spec else 1
    if isinstance(checkpoint, StoreSource):
        for data in checkpoint.trunk_bytes(item.name, _BLOCK_BYTES):
            yield data
            advance(data.nbytes)
        return
    for block in checkpoint.read_blocks(item.source, _BLOCK_BYTES, multiple):
        if item.spec is not None:
            codes, scales, mins = coded(quantize(block, item.spec))
            yield kernels.pack_codes(codes, scales, mins, item.spec)
        elif item.dtype == "I32":
            yield _bytes_of(block.int())
        elif item.dtype != item.source.dtype:
            yield to_16bit(block, "bf16").numpy()
        else:
            yield _bytes_of(block)
        advance(block.nbytes)


def _bytes_of(block: Tensor) -> np.ndarray:
    return block.reshape(-1).view(torch.uint8).numpy()


def finish_store(
    checkpoint: WeightSource, plan: ConversionPlan, partial: Partial, progress: Progress
) -> StoreIndex:
    """Copy the small files, read everything back, and make the index."""
    records: dict[tuple[int, int], ExpertRecord] = {}
    offset = len(plan.experts_header)
    for (layer, expert), layout in plan.layouts.items():
        crcs = partial.layer_to_crcs[layer][expert]
        records[layer, expert] = ExpertRecord(offset, layout, crcs)
        offset += layout.num_bytes
    for file in plan.copied:
        (partial.path / file).parent.mkdir(exist_ok=True)
        _copy(checkpoint.path / file, partial.path / file)
    copied = sum((partial.path / file).stat().st_size for file in plan.copied)
    progress.start("check", plan.output_bytes + copied)
    sha256 = {EXPERTS_FILE: check_experts(partial.path, plan.experts_header, records, progress)}
    for name in (TRUNK_FILE, *(file.as_posix() for file in plan.copied)):
        sha256[name] = sha256_of(partial.path / name, progress)
    packed = {
        item.name: PackedTensor(item.source.shape[0], item.source.shape[1], item.spec)
        for item in plan.trunk
        if item.spec is not None
    }
    return StoreIndex(
        path=partial.path,
        config=checkpoint.config,
        hidden=plan.hidden,
        records=records,
        packed_trunk=packed,
        sha256=sha256,
        plan=plan.to_json(),
        untrained_routers=checkpoint.config.get("untrained_routers") is True,
    )


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    with open(target, "rb+") as file:
        os.fsync(file.fileno())
