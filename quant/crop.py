"""The first layers of a store as a store of their own: for measurements at a size that fits.

The records and the trunk are copied as they are; the model that results says nothing sensible.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from ..models import load_module, parse_config
from ..models.names import trunk_shapes
from ..runtime.errors import UsageError
from ..runtime.format import PAGE_BYTES, record_name
from ..runtime.headers import encode_header, read_header
from ..runtime.index import EXPERTS_FILE, TRUNK_FILE, load_index, save_index
from ..runtime.store import file_sha256
from .disk import need_room
from .plan import copied_files

_BLOCK_BYTES = 8 << 20
_MARGIN_BYTES = 32 << 20


def crop_store(source: str | Path, out: str | Path, num_layers: int) -> Path:
    """Write the first `num_layers` layers of the store `source` as the store `out`.

    Raises UsageError where `out` is there or the store has fewer layers, BudgetError where the disk
    is too small.
    """
    index, target = load_index(source), Path(out)
    if target.exists():
        raise UsageError(f"`{target}` already exists", "", "choose another folder")
    config = index.config | {"num_hidden_layers": num_layers}
    args = parse_config(config)
    if num_layers > parse_config(index.config).num_layers:
        raise UsageError(f"`{source}` has no {num_layers} layers")
    kept = {key: value for key, value in sorted(index.records.items()) if key[0] < num_layers}
    if not kept:
        raise UsageError(f"the first {num_layers} layers of `{source}` have no experts")
    spellings = trunk_shapes(args, load_module(args.model_type).TRUNK)
    names = {name for each in spellings for name in each}
    with open(index.path / TRUNK_FILE, "rb") as file:
        entries, _ = read_header(file, TRUNK_FILE)
    trunk = sorted((e for e in entries.items() if e[0] in names), key=lambda e: e[1].offset)
    size = sum(record.num_bytes for record in kept.values()) + _MARGIN_BYTES
    size += sum(entry.num_bytes for _, entry in trunk)
    need_room(target.parent, size, next_step="free some space, or take fewer layers")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in copied_files(index.path):
        (partial / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(index.path / name, partial / name)
    (partial / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    sizes = [(record_name(*key), "U8", [r.num_bytes], r.num_bytes) for key, r in kept.items()]
    header = encode_header(sizes, {"format": "edgemoe"}, PAGE_BYTES)
    offset, records = len(header), {}
    for key, record in kept.items():
        records[key] = replace(record, offset=offset)
        offset += record.num_bytes
    runs = [(record.offset, record.num_bytes) for record in kept.values()]
    _copy(index.path / EXPERTS_FILE, partial / EXPERTS_FILE, header, runs)
    sizes = [(name, e.dtype, list(e.shape), e.num_bytes) for name, e in trunk]
    header = encode_header(sizes, {"format": "edgemoe"}, PAGE_BYTES)
    runs = [(entry.offset, entry.num_bytes) for _, entry in trunk]
    _copy(index.path / TRUNK_FILE, partial / TRUNK_FILE, header, runs)
    files = [file.relative_to(partial) for file in partial.rglob("*") if file.is_file()]
    save_index(
        replace(
            index,
            path=partial,
            config=config,
            records=records,
            packed_trunk={k: v for k, v in index.packed_trunk.items() if k in names},
            sha256={file.as_posix(): file_sha256(partial / file) for file in files},
            plan=index.plan | {"notes": [f"the first {num_layers} layers of {index.path.name}"]},
        )
    )
    partial.rename(target)
    return target


def _copy(source: Path, target: Path, header: bytes, runs: list[tuple[int, int]]) -> None:
    with open(source, "rb") as file, open(target, "wb") as out:
        out.write(header)
        for offset, num_bytes in runs:
            for block in _blocks(file, offset, num_bytes):
                out.write(block)


def _blocks(file: BinaryIO, offset: int, num_bytes: int) -> Iterator[bytes]:
    file.seek(offset)
    while num_bytes > 0:
        block = file.read(min(num_bytes, _BLOCK_BYTES))
        if not block:
            raise UsageError(f"`{file.name}` is too short")
        yield block
        num_bytes -= len(block)
