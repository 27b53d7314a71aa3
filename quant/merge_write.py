"""A store of merged experts: bodies averaged one group at a time, resumable, checked, renamed.

An expert that stays alone is copied byte for byte. A merged one is averaged from what its members'
records hold, or from the 16-bit weights of `checkpoint`, and stored in the widest format among its
members. Routers stay as they are where an index map says which expert a row stands for.
"""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..runtime.errors import UsageError
from ..runtime.format import PAGE_BYTES, record_name
from ..runtime.headers import encode_header
from ..runtime.index import (
    EXPERTS_FILE,
    TRUNK_FILE,
    ExpertRecord,
    StoreIndex,
    load_index,
    save_index,
)
from ..runtime.profile import Profile
from .checkpoint import Checkpoint
from .disk import need_room
from .factoring import Factoring
from .journal import Crcs, Partial, check_target, finish_published, kept_for_later, partial_path
from .merge import Merge
from .merge_records import Layouts, MergedRecords, merged_layouts
from .merge_trunk import write_trunk
from .progress import Progress, Silent
from .readback import check_experts, sha256_of
from .store_source import StoreSource, WeightSource

WRITER_VERSION = 1  # raise it when the same merge gives other bytes
_BLOCK_BYTES = 16 << 20
_DISK_MARGIN_BYTES = 32 << 20


def write_merged(
    store: str | Path,
    merge: Merge,
    out: str | Path,
    *,
    router: str = "index-map",
    checkpoint: str | Path | None = None,
    factoring: Factoring | None = None,
    profile: Profile | None = None,
    provenance: dict[str, Any] | None = None,
    progress: Progress | None = None,
    num_threads: int = 1,
) -> StoreIndex:
    """Write the store `out` of the merged experts of `store`; returns its index.

    `router`: `index-map` keeps all rows, `merged` averages those of a group. `factoring`: bodies
    become factors, whose errors `profile` weighs. `provenance` goes into store.json. Goes on where
    an equal merge was interrupted. Raises UsageError, CheckpointError, BudgetError.
    """
    target, progress = Path(out), progress or Silent()
    with StoreSource(store) as own, _bodies_of(own, checkpoint) as bodies:
        wanted = _identity(own, bodies, merge, router, factoring, profile)
        if finish_published(target, wanted):
            return load_index(target)
        check_target(target)
        layouts = merged_layouts(own.index, merge, factoring)
        records = MergedRecords(own, bodies, merge, layouts, factoring, profile)
        header = _experts_header(layouts)
        _check_disk(target, own.index, layouts)
        partial = Partial.open(target, wanted)
        with kept_for_later(partial, progress):
            _write_experts(records, partial, header, progress, num_threads)
            write_trunk(own, merge, partial.path / TRUNK_FILE, router)
            for name in set(own.index.sha256) - {EXPERTS_FILE, TRUNK_FILE}:
                (partial.path / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(own.path / name, partial.path / name)
            index = _index(own.index, merge, layouts, partial, header, router, progress)
            index.plan = index.plan | {"merge": (provenance or {}) | _groups_json(merge, router)}
            save_index(index)
            partial.publish()
    return load_index(target)


def _bodies_of(own: StoreSource, checkpoint: str | Path | None) -> WeightSource:
    """What is averaged. Raises UsageError for a checkpoint that the store was not made of."""
    if checkpoint is None:
        return StoreSource(own.path)
    source = Checkpoint(checkpoint)
    wrong = "config.json differs" if source.args != own.args else ""
    for layer in own.args.moe_layers if not wrong else ():
        name = own.module.router_name(layer)
        rows = source.read(source.trunk[name]).reshape(-1).view(torch.uint8).numpy()
        if b"".join(own.trunk_bytes(name, _BLOCK_BYTES)) != rows.tobytes():
            wrong = f"the router of layer {layer} differs"
            break
    if wrong:
        source.close()
        raise UsageError(
            f"`{own.path}` was not made of `{checkpoint}`", wrong, "give its own checkpoint"
        )
    return source


def _identity(
    own: StoreSource,
    bodies: WeightSource,
    merge: Merge,
    router: str,
    factoring: Factoring | None,
    profile: Profile | None,
) -> dict[str, Any]:
    """What must be equal for two runs to give the same bytes."""
    groups = {layer: asdict(each) for layer, each in merge.items()}
    files = {}
    for source in (own, bodies):
        for name in sorted(source.files):
            status = (source.path / name).stat()
            files[f"{type(source).__name__} {name}"] = [status.st_size, status.st_mtime_ns]
    return {
        "writer_version": [WRITER_VERSION, "merge"],
        "options": {
            "groups": hashlib.sha256(json.dumps(groups).encode()).hexdigest(),
            "--router": router,
            "bodies": type(bodies).__name__,
            "factors": None if factoring is None else [factoring.dense, factoring.rank],
            "profile": None if factoring is None else _moments_hash(profile),
        },
        "files": files,
    }


def _moments_hash(profile: Profile | None) -> str | None:
    digest = hashlib.sha256()
    for sums in profile.layers.values() if profile is not None else ():
        for part in (sums.input_square_sum, sums.hidden_square_sum):
            digest.update(b"" if part is None else part.astype("<f4").tobytes())
    return digest.hexdigest()


def _experts_header(layouts: Layouts) -> bytes:
    entries = [
        (record_name(*key), "U8", [layout.num_bytes], layout.num_bytes)
        for key, layout in layouts.items()
    ]
    return encode_header(entries, {"format": "edgemoe"}, PAGE_BYTES)


def _check_disk(target: Path, index: StoreIndex, layouts: Layouts) -> None:
    needed = sum(layout.num_bytes for layout in layouts.values()) + _DISK_MARGIN_BYTES
    needed += (index.path / TRUNK_FILE).stat().st_size
    written = partial_path(target) / EXPERTS_FILE
    needed -= written.stat().st_size if written.exists() else 0
    need_room(target.parent, needed)


# ---- experts ------------------------------------------------------------------------------------


def _write_experts(
    records: MergedRecords, partial: Partial, header: bytes, progress: Progress, num_threads: int
) -> None:
    merge, layouts = records.merge, records.layouts
    todo = [layer for layer in merge if layer not in partial.layer_to_crcs]
    sizes = {layer: merge[layer].num_experts for layer in merge}
    if len(todo) < len(merge):
        progress.note(f"going on: {len(merge) - len(todo)} of {len(merge)} layers are done")
    done = sum(sizes[layer] for layer in merge if layer not in todo)
    progress.start("experts", sum(sizes.values()), done, unit="experts")
    written = sum(layout.num_bytes for (layer, _), layout in layouts.items() if layer not in todo)
    file = partial.open_file(EXPERTS_FILE, header, written)
    try:
        for layer in todo:
            crcs: Crcs = []
            for count, (record, pair) in records.of_layer(layer, num_threads):
                file.write(record)
                crcs.append(pair)
                progress.advance(count)
            file.sync()
            partial.layer_to_crcs[layer] = crcs
            partial.save()
    finally:
        file.close()


# ---- the rest ------------------------------------------------------------------------------------


def _index(
    own: StoreIndex,
    merge: Merge,
    layouts: Layouts,
    partial: Partial,
    header: bytes,
    router: str,
    progress: Progress,
) -> StoreIndex:
    """The index of what was written, after everything was read back."""
    records, offset = {}, len(header)
    for (layer, number), layout in layouts.items():
        records[layer, number] = ExpertRecord(offset, layout, partial.layer_to_crcs[layer][number])
        offset += layout.num_bytes
    names = sorted(set(own.sha256) - {EXPERTS_FILE})
    progress.start("check", offset + sum((partial.path / name).stat().st_size for name in names))
    sha256 = {EXPERTS_FILE: check_experts(partial.path, header, records, progress)}
    sha256 |= {name: sha256_of(partial.path / name, progress) for name in names}
    index = StoreIndex(
        partial.path, own.config, own.hidden, records, own.packed_trunk, sha256, own.plan
    )
    if router == "index-map":
        index.layer_to_bodies = {
            layer: each.bodies
            for layer, each in merge.items()
            if len(each.groups) < each.num_experts
        }
    else:
        index.kept = {layer: each.heads for layer, each in merge.items()}
    return index


def _groups_json(merge: Merge, router: str) -> dict[str, Any]:
    groups = {str(layer): [list(g.members) for g in each.groups] for layer, each in merge.items()}
    return {"router": router, "groups": groups}
