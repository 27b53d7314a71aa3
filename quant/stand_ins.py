"""The file of second records of a store's experts at fewer bits (runtime/stand_ins.py).

From the store's own records, or from what they were made of: the checkpoint, a store of more bits.
Written under a temporary name, synced and renamed; what was there before is replaced.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import torch

from ..models.fingerprint import checkpoint_fingerprint
from ..runtime.amounts import format_bytes
from ..runtime.errors import BudgetError, UsageError
from ..runtime.headers import read_header
from ..runtime.index import TRUNK_FILE, StoreIndex, load_index
from ..runtime.stand_ins import STAND_INS_FILE, encode_stand_ins
from .calibrated import Calibration, calibrated_records
from .checkpoint import Checkpoint
from .convert import num_cpus, plain_records
from .disk import DISK_FULL
from .options import ConvertOptions
from .plan import ConversionPlan, make_plan
from .progress import Progress, Silent
from .store_source import StoreSource, WeightSource, open_source

_IN_FLIGHT_BYTES = 512 << 20  # of experts as they came
_MARGIN_BYTES = 16 << 20


def make_stand_ins(
    store: str | Path,
    options: ConvertOptions,
    source: str | Path | None = None,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    num_threads: int | None = None,
) -> Path:
    """Write the stand-ins of `store` and return their path. `source`: a checkpoint or a store of
    the same model to make them from; None: the store itself.

    Raises UsageError where they would not be smaller, for another model, and for a store that was
    made of another by leaving out or merging; BudgetError for a disk that is too small.
    """
    index, progress = load_index(store), progress or Silent()
    if index.is_derived:
        raise UsageError(
            f"`{store}` was made of a pruned set, or by merging", "stand-ins are of a full store"
        )
    num_threads = num_threads or num_cpus()
    with open_source(source or store) as opened:
        if source is not None:
            _check_source(index, opened)
        plan = make_plan(opened, options, calibration and calibration.to_json())
        _check_sizes(index, plan)
        made = {
            "from": "store" if isinstance(opened, StoreSource) else "checkpoint",
            "bits": options.spec.label,
            "quantizer": options.quantizer,
            "calibration": plan.calibration,
        }
        header = encode_stand_ins(plan.layouts, checkpoint_fingerprint(index), made)
        num_bytes = len(header) + sum(layout.num_bytes for layout in plan.layouts.values())
        _check_disk(index.path, num_bytes)
        sizes = {pair: opened.expert_bytes(*pair) for pair in plan.layouts}
        workers = max(1, min(num_threads, _IN_FLIGHT_BYTES // max(sizes.values())))
        todo = list(plan.layouts)
        if calibration is None:
            records = plain_records(opened, plan, todo, workers)
        else:
            records = calibrated_records(opened, plan, todo, workers, calibration)
        target = index.path / STAND_INS_FILE
        partial = target.with_name(target.name + ".partial")
        crcs = []
        progress.start("stand-ins", sum(sizes.values()))
        try:
            with open(partial, "wb") as file:
                file.write(header)
                for pair, (record, crc) in records:
                    file.write(record)
                    crcs.append(crc)
                    progress.advance(sizes[pair])
                file.write(np.array(crcs, dtype="<u4").tobytes())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise BudgetError(
                f"the disk is full while writing `{target.name}`",
                os.strerror(error.errno),
                "free some space and run the same command again",
            ) from error
        finally:
            partial.unlink(missing_ok=True)
            progress.close()
    return target


def _check_source(index: StoreIndex, source: WeightSource) -> None:
    """UsageError where the experts of `source` are not those of the store."""
    if isinstance(source, StoreSource):
        is_same = checkpoint_fingerprint(source.index) == checkpoint_fingerprint(index)
    else:
        is_same = _routers(source) == _stored_routers(index, source)
    if not is_same:
        raise UsageError(
            f"`{source.path}` is not the model of `{index.path}`",
            "their routers differ",
            "give what the store was made of, or leave --from out",
        )


def _routers(source: Checkpoint) -> dict[str, bytes]:
    return {
        name: source.read(source.trunk[name]).view(-1).view(torch.uint8).numpy().tobytes()
        for name in source.router_names()
    }


def _stored_routers(index: StoreIndex, source: Checkpoint) -> dict[str, bytes]:
    """Those of the store that are called as the routers of `source`, as they are stored."""
    path = index.path / TRUNK_FILE
    found = {}
    with open(path, "rb") as file:
        tensors, _ = read_header(file, str(path))
        for name in source.router_names() & tensors.keys():
            file.seek(tensors[name].offset)
            found[name] = file.read(tensors[name].num_bytes)
    return found


def _check_sizes(index: StoreIndex, plan: ConversionPlan) -> None:
    """UsageError where stand-ins of this plan are of other shapes or not smaller."""
    own, theirs = index.records, plan.layouts
    shapes = [
        {pair: (layout.hidden, layout.width) for pair, layout in layouts.items()}
        for layouts in ({pair: each.layout for pair, each in own.items()}, theirs)
    ]
    if shapes[0] != shapes[1]:
        raise UsageError(f"the experts of `{index.path}` have other shapes than these")
    if not any(theirs[pair].num_bytes < record.num_bytes for pair, record in own.items()):
        size = format_bytes(max(layout.num_bytes for layout in theirs.values()))
        raise UsageError(
            f"stand-ins of {size} are not smaller than the records of `{index.path}`",
            "there is nothing to gain",
            "choose fewer --bits",
        )


def _check_disk(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _MARGIN_BYTES:
        raise BudgetError(
            f"the stand-ins of `{folder}` do not fit on the disk",
            f"they take {format_bytes(num_bytes)}, {format_bytes(free)} are free",
        )
