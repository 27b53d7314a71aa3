"""A store as the source of another one: experts dequantized, the trunk taken over as it is."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..models import load_module, parse_config
from ..runtime.checksum import crc32c
from ..runtime.errors import EdgeMoeError, RecordError, UsageError
from ..runtime.format import RecordLayout
from ..runtime.headers import TensorEntry, read_header
from ..runtime.index import EXPERTS_FILE, STORE_FILE, TRUNK_FILE, ExpertRecord, load_index
from .checkpoint import Checkpoint
from .sources import Source

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = {"bf16": "BF16", "fp16": "F16"}


class StoreSource:
    """An open store with the face of a `Checkpoint`. Raises what `load_index` raises.

    `chosen`: for a store of variants, the record number of each expert that shall stand for it.
    """

    unused: tuple[str, ...] = ()

    def __init__(
        self, path: str | Path, chosen: Mapping[tuple[int, int], int] | None = None
    ) -> None:
        self.path = Path(path)
        self.index = load_index(self.path)
        if self.index.is_derived:
            raise UsageError(
                f"`{self.path}` was made of a pruned set, or by merging",
                "",
                "convert the full store, then compact or merge",
            )
        self.config = self.index.config
        self.args = parse_config(self.config)
        self.module = load_module(self.args.model_type)
        self.files: dict[str, dict[str, TensorEntry]] = {}
        for name in (EXPERTS_FILE, TRUNK_FILE):
            with open(self.path / name, "rb") as file:
                self.files[name] = read_header(file, name)[0]
        self._chosen = chosen
        self._opened = open(self.path / EXPERTS_FILE, "rb", buffering=0)  # noqa: SIM115

    @property
    def is_choice(self) -> bool:
        """Whether the experts are chosen records of a store of variants."""
        return self._chosen is not None

    def identity(self) -> str:
        """What must be equal for the same experts to come out, beside the weight files."""
        return (self.path / STORE_FILE).read_text(encoding="utf-8") + json.dumps(
            sorted((self._chosen or {}).items())
        )

    # ---- experts --------------------------------------------------------------------------------

    def _record(self, layer: int, expert: int) -> ExpertRecord:
        number = expert if self._chosen is None else self._chosen[layer, expert]
        return self.index.records[layer, number]

    def expert_bytes(self, layer: int, expert: int) -> int:
        return self._record(layer, expert).num_bytes

    def expert_dtypes(self, layer: int, expert: int) -> tuple[frozenset[str], str]:
        """The dtypes of (gate and up, down); quantized ones are fp32 once they are dequantized."""
        layout = self._record(layer, expert).layout
        gate_up, down = (_DTYPES.get(spec.mode, "F32") for spec in (layout.gate_up, layout.down))
        return frozenset({gate_up}), down

    def record(self, layer: int, expert: int, layout: RecordLayout) -> np.ndarray | None:
        """The expert's record u8 where it is stored in this very layout, else None."""
        stored = self._record(layer, expert)
        return self._read(layer, expert, stored) if stored.layout == layout else None

    def expert(self, layer: int, expert: int) -> "tuple[Tensor, Tensor, Tensor]":
        """(gate [F, D], up [F, D], down [D, F]) fp32 of one routed expert."""
        import torch

        from ..runtime import kernels

        stored = self._record(layer, expert)
        parts = kernels.unpack_record(self._read(layer, expert, stored), stored.layout)
        gate, up, down = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts)
        return gate, up, down

    def _read(self, layer: int, expert: int, stored: ExpertRecord) -> np.ndarray:
        data = np.empty(stored.num_bytes, np.uint8)
        view, done = memoryview(data), 0
        while done < len(view):
            try:
                count = os.preadv(self._opened.fileno(), [view[done:]], stored.offset + done)
            except OSError as error:
                raise EdgeMoeError(f"`{EXPERTS_FILE}` cannot be read", str(error)) from error
            if not count:
                raise RecordError(layer, expert, f"`{EXPERTS_FILE}` ends inside it")
            done += count
        middle = stored.layout.down_offset
        if (crc32c(data[:middle]), crc32c(data[middle:])) != stored.crc32c:
            raise RecordError(
                layer,
                expert,
                f"`{self.path / EXPERTS_FILE}`: wrong checksum",
                f"edgemoe verify {self.path} lists every damaged record",
            )
        return data

    # ---- trunk ----------------------------------------------------------------------------------

    def trunk_entries(self) -> list[tuple[str, Source]]:
        """Name and place of every trunk tensor in file order; `shape` is that of the matrix."""
        found = []
        entries = sorted(self.files[TRUNK_FILE].items(), key=lambda item: item[1].offset)
        for name, entry in entries:
            packed = self.index.packed_trunk.get(name)
            shape = entry.shape if packed is None else (packed.rows, packed.cols)
            found.append((name, Source(name, TRUNK_FILE, entry.dtype, shape, entry.offset)))
        return found

    def trunk_bytes(self, name: str, block_bytes: int) -> Iterator[np.ndarray]:
        """The stored bytes of a trunk tensor in blocks."""
        entry = self.files[TRUNK_FILE][name]
        with open(self.path / TRUNK_FILE, "rb") as file:
            file.seek(entry.offset)
            for begin in range(0, entry.num_bytes, block_bytes):
                yield np.frombuffer(
                    file.read(min(block_bytes, entry.num_bytes - begin)), dtype=np.uint8
                )

    def router_names(self) -> set[str]:
        return {self.module.router_name(layer) for layer in self.args.moe_layers}

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> "StoreSource":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


WeightSource = Checkpoint | StoreSource


def is_store(path: str | Path) -> bool:
    """Whether a folder is a store rather than a checkpoint."""
    return (Path(path) / STORE_FILE).is_file()


def open_source(path: str | Path) -> WeightSource:
    """A checkpoint folder, or a store. Raises what either raises."""
    return StoreSource(path) if is_store(path) else Checkpoint(path)


def source_origin(source: WeightSource) -> dict[str, Any]:
    """For store.json: how the source of a store was itself made, or its chosen variants were."""
    if not isinstance(source, StoreSource):
        return {}
    if not source.is_choice:
        return {"source_store": source.index.plan}
    kept = ("calibration", "source_store")
    return {name: source.index.plan[name] for name in kept if name in source.index.plan}
