"""Reads the trunk's tensors into the form the wiring computes with, checking every shape."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..runtime.errors import FormatError
from ..runtime.format import TILE_ROWS
from ..runtime.kernels import PackedMatrix, ThreadPool
from ..runtime.memory import Pile
from ..runtime.packing import BF16, to_bf16, to_fp32
from . import names
from .args import ModelArgs
from .hash_routing import table_fault

# Gives a stored tensor by its name, raising where there is none (`Store.trunk_tensor`); packed ones
# in the pile, where one is given.
ReadTensor = Callable[[str, Pile | None], np.ndarray | PackedMatrix]


class Linear(Protocol):
    """What the wiring asks of a matrix `[rows, cols]`."""

    rows: int
    cols: int

    def linear(
        self, x: np.ndarray, bias: np.ndarray | None = None, pool: ThreadPool | None = None
    ) -> np.ndarray: ...  # [T, cols] -> [T, rows]


class Fp32Matrix:
    """A small fp32 matrix (a router of an fp32 checkpoint) without loss, on the 16-bit kernel.

    24 bits of mantissa are three times 8: w = high + middle + low, each of them a bf16.
    """

    def __init__(self, weight: np.ndarray, backend: str | None) -> None:
        self.rows, self.cols = weight.shape
        parts, rest = [], weight
        for _ in range(3):
            parts.append(to_bf16(rest))
            rest = rest - to_fp32(parts[-1])
        self.parts = [PackedMatrix.from_16bit(part, backend) for part in parts]

    def linear(
        self, x: np.ndarray, bias: np.ndarray | None = None, pool: ThreadPool | None = None
    ) -> np.ndarray:
        high, middle, low = (part.linear(x, None, pool) for part in self.parts)
        y = high + (middle + low)
        return y if bias is None else y + bias


class Rows:
    """Matrices of one input, their rows one after the other."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts = list(parts)
        self.rows, self.cols = sum(part.rows for part in parts), parts[0].cols

    def linear(
        self, x: np.ndarray, bias: np.ndarray | None = None, pool: ThreadPool | None = None
    ) -> np.ndarray:
        y = np.concatenate([part.linear(x, None, pool) for part in self.parts], axis=-1)
        return y if bias is None else y + bias


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The trunk of one layer; None where the model has no such part. `gate_up` and `down` are the
    dense MLP of a layer without a router, else the shared expert."""

    input_norm: np.ndarray
    post_norm: np.ndarray
    qkv: Linear
    qkv_bias: np.ndarray | None
    q_norm: np.ndarray | None
    k_norm: np.ndarray | None
    output: Linear
    output_bias: np.ndarray | None
    router: Linear | None
    experts_of_token: np.ndarray | None  # of a hash-routed layer, i32 [vocab, K], rows ascending
    gate_up: Linear | None
    down: Linear | None
    shared_weight: Linear | None


class Trunk:
    """The trunk of one model, by slot (see `names.py`)."""

    def __init__(
        self, args: ModelArgs, table: names.Names, read: ReadTensor, backend: str | None
    ) -> None:
        self._table, self._read, self._backend = table, read, backend
        self._shapes = {(slot, layer): shape for slot, layer, shape in names.trunk_slots(args)}
        self._pile = Pile(backend)

    def layer(self, layer: int) -> LayerWeights:
        """All parts of one layer."""

        def matrix(slot: str) -> Linear | None:
            return self.matrix(slot, layer) if (slot, layer) in self._shapes else None

        is_dense = ("layer.router", layer) not in self._shapes
        prefix = "layer." if is_dense else "layer.shared_"
        has_mlp = (f"{prefix}down", layer) in self._shapes
        return LayerWeights(
            input_norm=self.vector("layer.input_norm", layer),
            post_norm=self.vector("layer.post_norm", layer),
            qkv=self.stacked(("layer.q", "layer.k", "layer.v"), layer),
            qkv_bias=self.stacked_vector(("layer.q_bias", "layer.k_bias", "layer.v_bias"), layer),
            q_norm=self.stacked_vector(("layer.q_norm",), layer),
            k_norm=self.stacked_vector(("layer.k_norm",), layer),
            output=self.matrix("layer.o", layer),
            output_bias=self.stacked_vector(("layer.o_bias",), layer),
            router=matrix("layer.router"),
            experts_of_token=self._table_of(layer),
            gate_up=self.stacked((f"{prefix}gate", f"{prefix}up"), layer) if has_mlp else None,
            down=matrix(f"{prefix}down"),
            shared_weight=matrix("layer.shared_weight"),
        )

    def _table_of(self, layer: int) -> np.ndarray | None:
        if ("layer.experts_of_token", layer) not in self._shapes:
            return None
        name, table = self._stored("layer.experts_of_token", layer)
        num_experts, _ = self._shapes["layer.router", layer]
        if fault := table_fault(table, num_experts):
            raise FormatError(
                f"the table `{name}` cannot be routed by", fault, "convert the checkpoint again"
            )
        return np.ascontiguousarray(np.sort(table, axis=1), dtype=np.int32)

    def vector(self, slot: str, layer: int = -1) -> np.ndarray:
        """A norm or a bias, fp32 `[n]`, contiguous."""
        _, value = self._stored(slot, layer)
        return np.ascontiguousarray(to_fp32(value))

    def embedding(self, slot: str) -> PackedMatrix:
        """A matrix whose rows can be looked up."""
        name, value = self._stored(slot, -1, self._pile)
        if isinstance(value, PackedMatrix):
            return value
        if value.dtype not in (BF16, np.float16):
            raise FormatError(
                f"tensor `{name}` is stored as {value.dtype}",
                "expected 16 bits or tiles",
                "convert the checkpoint again",
            )
        return PackedMatrix.from_16bit(value, self._backend, self._pile)

    def matrix(self, slot: str, layer: int = -1) -> Linear:
        """A linear; the small ones (routers) may also be stored in fp32."""
        return self._matrix(slot, layer, self._pile)

    def _matrix(self, slot: str, layer: int, pile: Pile | None) -> Linear:
        _, value = self._stored(slot, layer, pile)
        if isinstance(value, PackedMatrix):
            return value
        if value.dtype == np.float32:
            return Fp32Matrix(value, self._backend)
        return PackedMatrix.from_16bit(value, self._backend, pile)

    def stacked(self, slots: Sequence[str], layer: int) -> Linear:
        """Several matrices of one input as one, which is one call instead of several.

        Tiles hold whole rows, so matrices of one format are joined by joining their bytes.
        """
        parts = [self._matrix(slot, layer, None) for slot in slots]
        first = parts[0]
        if not all(
            isinstance(part, PackedMatrix) and part.spec == first.spec and not part.rows % TILE_ROWS
            for part in parts
        ):
            return Rows(parts)
        data = self._pile.take(sum(part.num_bytes for part in parts))
        np.concatenate([part.data for part in parts], out=data)
        rows = sum(part.rows for part in parts)
        return PackedMatrix.from_packed(data, rows, first.cols, first.spec, self._backend)

    def stacked_vector(self, slots: Sequence[str], layer: int) -> np.ndarray | None:
        """Norms or biases of one input as one, or None where the model has none."""
        if (slots[0], layer) not in self._shapes:
            return None
        return np.concatenate([self.vector(slot, layer) for slot in slots])

    def _stored(
        self, slot: str, layer: int, pile: Pile | None = None
    ) -> tuple[str, np.ndarray | PackedMatrix]:
        name = names.spellings(self._table, slot, layer)[0]  # a store uses the released names
        value = self._read(name, pile)
        packed = isinstance(value, PackedMatrix)
        expected = self._shapes[slot, layer]
        got = (value.rows, value.cols) if packed else tuple(value.shape)
        if got != expected:
            raise FormatError(
                f"tensor `{name}` has the wrong shape",
                f"expected {list(expected)}, got {list(got)}",
                "convert the checkpoint again",
            )
        return name, value
