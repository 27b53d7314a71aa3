"""A hard set as a store of its own: the records it keeps, and the routers' rows for them.

The routers choose alike: with the same kernels the logits are, bit for bit, those of the full store
with the set in hard mode. config.json stays as it came; `kept` in store.json says which experts of
the checkpoint the layers hold, and how many each (layers may differ).
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..active_set import check_tables, owner_of
from ..models import load_module, store_args
from ..models.names import spellings
from ..runtime.errors import FormatError, UsageError
from ..runtime.format import PAGE_BYTES, record_name
from ..runtime.headers import TensorEntry, encode_header, read_header
from ..runtime.index import (
    EXPERTS_FILE,
    STORE_FILE,
    TRUNK_FILE,
    ExpertRecord,
    StoreIndex,
    load_index,
    save_index,
)
from ..runtime.sets import resolve
from ..runtime.store import file_sha256
from .disk import need_room
from .progress import Progress, Silent

_BLOCK_BYTES = 4 << 20
_MARGIN_BYTES = 16 << 20
Part = tuple[int, int]  # offset and length in the source file


def compact(
    store: str | Path, name: str, out: str | Path, progress: Progress | None = None
) -> StoreIndex:
    """Write the store `out` of the set `name` (or `A+B`, `A&B`) of `store`; returns its index.

    Works in `out` + `.partial`, which is renamed at the end and removed on failure. Raises
    UsageError where `out` exists, BudgetError where the disk is too small, and what `resolve` does.
    """
    out, progress = Path(out), progress or Silent()
    index = load_index(store)
    if index.is_derived:
        raise UsageError(
            f"`{store}` was made of a set itself, or by merging", "", "take the full store"
        )
    args = store_args(index)
    expert_set = resolve(store, name, owner_of(index, args))
    check_tables(args, expert_set)
    if out.exists():
        raise UsageError(f"`{out}` is there already", "", "give another name, or remove it")
    needed = sum(index.records[pair].num_bytes for pair in expert_set.pairs)
    needed += (index.path / TRUNK_FILE).stat().st_size + _MARGIN_BYTES
    out.parent.mkdir(parents=True, exist_ok=True)
    need_room(out.parent, needed)
    partial = out.with_name(out.name + ".partial")
    partial.mkdir()
    try:
        progress.start("copy", needed - _MARGIN_BYTES)
        records = _copy_experts(index, expert_set.pairs, partial, progress)
        _copy_trunk(index, dict(expert_set.kept), partial, progress)
        for file in set(index.sha256) - {EXPERTS_FILE, TRUNK_FILE, STORE_FILE}:
            shutil.copy2(index.path / file, partial / file)
        plan = index.plan | {
            "set": {
                "name": expert_set.name,
                "method": expert_set.method,
                "parameters": dict(expert_set.parameters),
                "fingerprint": expert_set.fingerprint,
            }
        }
        sha256 = {file: file_sha256(partial / file) for file in sorted(index.sha256)}
        save_index(
            StoreIndex(
                partial,
                index.config,
                index.hidden,
                records,
                index.packed_trunk,
                sha256,
                plan,
                dict(expert_set.kept),
            )
        )
        load_index(partial)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return load_index(out)


def _copy_experts(
    index: StoreIndex, pairs: list[tuple[int, int]], target: Path, progress: Progress
) -> dict[tuple[int, int], ExpertRecord]:
    """Write the records of `pairs`, each layer numbered from 0 again; returns where they are."""
    source, numbers, places = [], [], {}
    for layer, expert in pairs:
        number = places.get(layer, 0)
        places[layer] = number + 1
        numbers.append((layer, number))
        source.append(index.records[layer, expert])
    header = encode_header(
        [
            (record_name(*pair), "U8", [record.num_bytes], record.num_bytes)
            for pair, record in zip(numbers, source, strict=True)
        ],
        _metadata(index.path / EXPERTS_FILE),
        PAGE_BYTES,
    )
    parts = [(record.offset, record.num_bytes) for record in source]
    _write(index.path / EXPERTS_FILE, parts, header, target / EXPERTS_FILE, progress)
    records, offset = {}, len(header)
    for pair, record in zip(numbers, source, strict=True):
        records[pair] = ExpertRecord(offset, record.layout, record.crc32c)
        offset += record.num_bytes
    return records


def _copy_trunk(
    index: StoreIndex, kept: dict[int, tuple[int, ...]], target: Path, progress: Progress
) -> None:
    """Write the trunk with the routers' rows of the kept experts."""
    path, table = index.path / TRUNK_FILE, load_module(index.model_type).TRUNK
    with open(path, "rb") as file:
        tensors, metadata = read_header(file, str(path))
    routers = {spellings(table, "layer.router", layer)[0]: ids for layer, ids in kept.items()}
    entries, parts = [], []
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].offset):
        rows = list(_rows(name, entry, routers.get(name), index))
        shape = entry.shape if name not in routers else (len(rows), *entry.shape[1:])
        entries.append((name, entry.dtype, shape, sum(length for _, length in rows)))
        parts += rows
    _write(path, parts, encode_header(entries, metadata), target / TRUNK_FILE, progress)


def _rows(
    name: str, entry: TensorEntry, ids: tuple[int, ...] | None, index: StoreIndex
) -> Iterator[Part]:
    """A tensor whole, or those of its rows."""
    if ids is None:
        yield entry.offset, entry.num_bytes
        return
    if name in index.packed_trunk:
        raise FormatError(f"the router `{name}` is packed", "its rows cannot be taken apart")
    row_bytes = entry.num_bytes // entry.shape[0]
    for row in ids:
        yield entry.offset + row * row_bytes, row_bytes


def _write(source: Path, parts: list[Part], header: bytes, out: Path, progress: Progress) -> None:
    """A header and parts of another file, synced."""
    with open(source, "rb") as reader, open(out, "wb") as writer:
        writer.write(header)
        for offset, length in parts:
            reader.seek(offset)
            while length:
                block = reader.read(min(length, _BLOCK_BYTES))
                if not block:
                    raise FormatError(f"`{source}` is truncated")
                writer.write(block)
                progress.advance(len(block))
                length -= len(block)
        writer.flush()
        os.fsync(writer.fileno())


def _metadata(path: Path) -> dict[str, str]:
    with open(path, "rb") as file:
        return read_header(file, str(path))[1]
