"""A Hugging Face checkpoint on disk: its configuration, and its tensors read one at a time.

Opening reads config.json and the headers of the shards, checks that every tensor the model needs is
there with its shape and dtype, and imports no torch. Weights are read with one positioned read each
and dropped from the page cache soon after. Both layouts of experts end here: one tensor per matrix,
or one 3-D tensor per layer of which only the slice of an expert is read. Knows no quantization.
"""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..models import load_module, parse_config
from ..models.names import table_names, trunk_shapes
from ..runtime.errors import CheckpointError, EdgeMoeError, FormatError, NotFoundError, UsageError
from ..runtime.headers import TensorEntry, read_header
from .sources import AGAIN, INTEGERS, READABLE, TORCH_NAMES, Source, refuse_not_finite

if TYPE_CHECKING:
    from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_CACHED_BYTES = 64 << 20  # of page cache


class Checkpoint:
    """Raises NotFoundError, CheckpointError or UnsupportedModelError before any weight is read."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, int] = {}
        self._num_cached_bytes = 0
        self._lock = threading.Lock()
        if not self.path.is_dir():
            raise NotFoundError(
                f"no checkpoint at `{self.path}`", "expected a folder with config.json"
            )
        if (self.path / "store.json").exists():
            what, why = f"`{self.path}` is already an edgemoe store", "expected a checkpoint"
            raise UsageError(what, why, f"edgemoe inspect {self.path} shows what it holds")
        self.config = _read_json(self.path / "config.json")
        self.args = parse_config(self.config)
        self.module = load_module(self.args.model_type)
        self._tables = table_names(self.args, self.module.TRUNK)
        self.files: dict[str, dict[str, TensorEntry]] = {}
        self.tensors = self._locate()
        self._experts = {
            (layer, expert): self._expert_sources(layer, expert)
            for layer in self.args.moe_layers
            for expert in range(self.args.num_experts)
        }
        self.trunk, self.unused = self._trunk()

    # ---- what is there --------------------------------------------------------------------------

    def _locate(self) -> dict[str, tuple[str, TensorEntry]]:
        """Every tensor by name, with its shard."""
        if (self.path / SINGLE_FILE).is_file():
            names = dict.fromkeys(self._header(SINGLE_FILE), SINGLE_FILE)
        elif (self.path / INDEX_FILE).is_file():
            names = self._weight_map()
        else:
            others = sorted(file.name for file in self.path.glob("*.bin"))
            raise CheckpointError(
                f"`{self.path}` has no weights",
                f"expected `{SINGLE_FILE}` or `{INDEX_FILE}`"
                + (f", got `{others[0]}`" if others else ""),
                "edgemoe reads safetensors only",
            )
        located: dict[str, tuple[str, TensorEntry]] = {}
        for name, file in names.items():
            entry = self._header(file).get(name)
            if entry is None:
                raise CheckpointError(
                    f"tensor `{name}` is missing", f"the index says it is in `{file}`", AGAIN
                )
            located[name] = (file, entry)
        return located

    def _weight_map(self) -> dict[str, str]:
        weight_map = _read_json(self.path / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"`{INDEX_FILE}` has no `weight_map`", "", AGAIN)
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
                raise CheckpointError(
                    f"`{INDEX_FILE}` is malformed",
                    f"`{name}` points to `{file}`; expected the name of a file beside it",
                    AGAIN,
                )
        for file in sorted(set(weight_map.values())):
            self._header(file)
        return weight_map

    def _header(self, file: str) -> dict[str, TensorEntry]:
        if file not in self.files:
            try:
                with open(self.path / file, "rb") as opened:
                    self.files[file] = read_header(opened, file)[0]
            except FileNotFoundError:
                raise CheckpointError(
                    f"shard `{file}` is missing", f"`{INDEX_FILE}` names it", AGAIN
                ) from None
            except FormatError as error:
                raise CheckpointError(error.what, error.why, AGAIN) from error
            except OSError as error:
                raise CheckpointError(f"`{file}` cannot be read", str(error)) from error
        return self.files[file]

    def source(self, name: str, shape: Sequence[int] | None = None) -> Source:
        """Where a tensor lies; CheckpointError unless it is there, readable and of `shape`."""
        if name not in self.tensors:
            raise CheckpointError(
                f"tensor `{name}` is missing", f"config.json says {self._what()}", AGAIN
            )
        file, entry = self.tensors[name]
        dtypes = INTEGERS if name in self._tables else READABLE
        if entry.dtype not in dtypes:
            raise CheckpointError(
                f"tensor `{name}` has dtype `{entry.dtype}`",
                f"expected {', '.join(dtypes)}",
                "convert from the checkpoint before it was quantized",
            )
        if shape is not None and entry.shape != tuple(shape):
            raise CheckpointError(
                f"tensor `{name}` has shape {list(entry.shape)}",
                f"expected {list(shape)}, as config.json says {self._what()}",
                AGAIN,
            )
        return Source(name, file, entry.dtype, entry.shape, entry.offset)

    def _what(self) -> str:
        args = self.args
        return (
            f"{args.num_layers} layers of {args.num_experts} experts, hidden size {args.hidden}, "
            f"expert width {args.expert_width}"
        )

    def expert_sources(self, layer: int, expert: int) -> tuple[Source, Source, Source]:
        """(gate [F, D], up [F, D], down [D, F])."""
        return self._experts[layer, expert]

    def _expert_sources(self, layer: int, expert: int) -> tuple[Source, Source, Source]:
        module, args = self.module, self.args
        hidden, width = args.hidden, args.expert_width
        fused = module.fused_gate_up(layer)
        if fused not in self.tensors:
            wide, tall = (width, hidden), (hidden, width)
            gate, up, down = (
                self.source(module.expert_tensor(layer, expert, proj), shape)
                for proj, shape in (("gate", wide), ("up", wide), ("down", tall))
            )
            return gate, up, down
        num_experts = args.num_experts
        both = self.source(fused, (num_experts, 2 * width, hidden)).rows(expert, expert + 1)
        down = self.source(module.fused_down(layer), (num_experts, hidden, width))
        both = Source(both.name, both.file, both.dtype, (2 * width, hidden), both.offset)
        one = down.rows(expert, expert + 1)
        one = Source(one.name, one.file, one.dtype, (hidden, width), one.offset)
        return both.rows(0, width), both.rows(width, 2 * width), one

    def _trunk(self) -> tuple[dict[str, Source], list[str]]:
        """Every tensor but routed experts, by its released name; the names the model does not use.

        Raises CheckpointError for the first one that is missing or has another shape.
        """
        used = {source.name for sources in self._experts.values() for source in sources}
        trunk: dict[str, Source] = {}
        for spellings, shape in trunk_shapes(self.args, self.module.TRUNK).items():
            found = [name for name in spellings if name in self.tensors]
            source = self.source((*found, *spellings)[0], shape)
            trunk[spellings[0]] = source
            used.add(source.name)
        return trunk, sorted(self.tensors.keys() - used)

    def expert_bytes(self, layer: int, expert: int) -> int:
        """Bytes of the three matrices of an expert, as they are stored."""
        return sum(source.num_bytes for source in self._experts[layer, expert])

    def expert_dtypes(self, layer: int, expert: int) -> tuple[frozenset[str], str]:
        """The dtypes of (gate and up, down)."""
        gate, up, down = self._experts[layer, expert]
        return frozenset({gate.dtype, up.dtype}), down.dtype

    def record(self, layer: int, expert: int, layout: Any) -> None:
        """No expert of a checkpoint is stored as a record."""

    def identity(self) -> str:
        """What must be equal for the same store to come out, beside the shards."""
        return json.dumps(self.config, sort_keys=True)

    def router_names(self) -> set[str]:
        return {self.module.router_name(layer) for layer in self.args.moe_layers}

    # ---- reading --------------------------------------------------------------------------------

    def read(self, source: Source | str) -> "Tensor":
        """The weights as they are stored; CheckpointError where one is NaN or infinite."""
        import torch

        if isinstance(source, str):
            source = self.source(source)
        weight = torch.empty(source.shape, dtype=getattr(torch, TORCH_NAMES[source.dtype]))
        self._read_into(weight.view(-1).view(torch.uint8).numpy(), source)
        # A sum is one fast pass and carries every NaN and infinity; it may overflow by itself, so
        # only a suspicious one is looked at closely. Parts are below torch's limit for threads.
        parts = weight.view(-1).split(1 << 14)
        sums = torch.stack([part.sum(dtype=torch.float32) for part in parts])
        if not torch.isfinite(sums).all():
            refuse_not_finite(weight, source)
        return weight

    def read_blocks(self, source: Source, block_bytes: int, multiple: int) -> Iterator["Tensor"]:
        """A tensor in runs of rows, each a multiple of `multiple` rows (but the last)."""
        row_bytes = max(1, source.num_bytes // max(1, source.shape[0]))
        step = max(multiple, block_bytes // row_bytes // multiple * multiple)
        for begin in range(0, source.shape[0], step):
            yield self.read(source.rows(begin, min(begin + step, source.shape[0])))

    def expert(self, layer: int, expert: int) -> tuple["Tensor", "Tensor", "Tensor"]:
        """(gate [F, D], up [F, D], down [D, F]) of one routed expert."""
        gate, up, down = self.expert_sources(layer, expert)
        return self.read(gate), self.read(up), self.read(down)

    def _read_into(self, buffer: Any, source: Source) -> None:
        view = memoryview(buffer)
        descriptor = self._open(source.file)
        done = 0
        while done < len(view):
            try:
                count = self._pread(descriptor, view[done : done + (1 << 30)], source.offset + done)
            except OSError as error:  # not the checkpoint's fault: what is converted so far stays
                raise EdgeMoeError(f"`{source.file}` cannot be read", str(error)) from error
            if count == 0:
                raise CheckpointError(
                    f"`{source.file}` ends inside tensor `{source.name}`",
                    "it was shortened while being read",
                    AGAIN,
                )
            done += count
        self._forget(len(view))

    def _forget(self, num_bytes: int) -> None:
        """Count what was read, and now and then drop the files from the page cache."""
        if not hasattr(os, "posix_fadvise"):
            return
        with self._lock:
            self._num_cached_bytes += num_bytes
            if self._num_cached_bytes < _MAX_CACHED_BYTES:
                return
            self._num_cached_bytes = 0
            # Whole files: the kernel keeps any large page that a smaller range only touches.
            for descriptor in self._files.values():
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def _pread(self, descriptor: int, view: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(descriptor, [view], offset)
        with self._lock:
            os.lseek(descriptor, offset, os.SEEK_SET)
            data = os.read(descriptor, len(view))
        view[: len(data)] = data
        return len(data)

    def _open(self, file: str) -> int:
        with self._lock:
            if file not in self._files:
                flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
                self._files[file] = os.open(self.path / file, flags)
            return self._files[file]

    def close(self) -> None:
        self._forget(_MAX_CACHED_BYTES)
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = f"`{path.parent}` has no `{path.name}`"
        why = "expected a Hugging Face checkpoint folder"
        raise CheckpointError(what, why, "check the path, or " + AGAIN) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"`{path}` does not parse", str(error), AGAIN) from error
    if not isinstance(document, dict):
        raise CheckpointError(f"`{path}` does not hold a JSON object", "", AGAIN)
    return document
