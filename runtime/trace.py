"""Recorded routings: which experts every token of a text was routed to. Floor 0.

A trace file is a safetensors file (docs/trace.md); `load` also reads the same arrays from a .npz.
A step is one token, a place is one MoE layer in the order in which they run.
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, NotFoundError
from .outputs import replacing

PREFILL, DECODE = 0, 1
NO_EXPERT = -1
FORMAT, VERSION = "edgemoe-trace", "1"
_MAX_BYTES = 4 << 30  # of the arrays; a small compressed file may claim any size


@dataclass(slots=True)
class Trace:
    """One recorded routing. S steps, P places, K the largest number of experts of a row."""

    experts: NDArray[np.int32]  # [S, P, K]; -1: none
    weights: NDArray[np.float32] | None  # [S, P, K] routing weights as used; None: not recorded
    phase: NDArray[np.int8]  # [S]; 0 prefill, 1 decode
    num_experts: NDArray[np.int64]  # [P]
    expert_bytes: NDArray[np.int64]  # [P]; of the largest record of the place
    record_bytes: NDArray[np.int64] | None = None  # by key; None: all of a place are equal
    model: str = ""
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def num_steps(self) -> int:
        return self.experts.shape[0]

    @property
    def num_places(self) -> int:
        return self.experts.shape[1]

    @property
    def num_keys(self) -> int:
        """Experts of all places. Keys count them in (place, expert) order, as in a store."""
        return int(self.num_experts.sum())

    @property
    def first_key(self) -> NDArray[np.int64]:
        """[P]"""
        return np.concatenate(([0], np.cumsum(self.num_experts)[:-1]))

    @property
    def place_of_key(self) -> NDArray[np.int64]:
        return np.repeat(np.arange(self.num_places), self.num_experts)

    @property
    def bytes_of_key(self) -> NDArray[np.int64]:
        if self.record_bytes is not None:
            return self.record_bytes
        return np.repeat(self.expert_bytes, self.num_experts)

    @property
    def table_bytes(self) -> int:
        """All expert records of the model."""
        return int(self.bytes_of_key.sum())

    @property
    def cycle_bytes(self) -> float:
        """Mean of the records that one decoded token (where there is none: one step) needs."""
        steps = self.experts[self.phase == DECODE]
        rows = steps if len(steps) else self.experts
        used = (rows != NO_EXPERT).sum(axis=2).mean(axis=0)
        return float((used * self.bytes_of_key[self.first_key]).sum())

    def keys(self) -> NDArray[np.int64]:
        """Keys [S, P, K] of the experts; -1: none."""
        keys = self.experts.astype(np.int64) + self.first_key[:, None]
        return np.where(self.experts == NO_EXPERT, NO_EXPERT, keys)

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read a trace file, safetensors or .npz.

        Raises NotFoundError, and FormatError for what is damaged or no trace.
        """
        path = Path(path)
        if not path.is_file():
            raise NotFoundError(f"no trace at `{path}`", "", "edgemoe trace record makes one")
        read = _read_npz if _is_zip(path) else _read_safetensors
        try:
            arrays, metadata = read(path)
            return _from_arrays(arrays, metadata)
        except MemoryError as error:
            raise FormatError(f"`{path}` is too large a trace for this memory") from error
        except FormatError as error:
            raise FormatError(f"`{path}`: {error.what}", error.why, error.next_step) from error

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: to a temporary name, then renamed."""
        from safetensors.numpy import save

        small = self.experts.max(initial=0) <= np.iinfo(np.int16).max
        tensors = {
            "experts": self.experts.astype(np.int16 if small else np.int32),
            "phase": self.phase,
            "num_experts": self.num_experts,
            "expert_bytes": self.expert_bytes,
        }
        if self.weights is not None:
            tensors["weights"] = self.weights
        if self.record_bytes is not None:
            tensors["record_bytes"] = self.record_bytes
        metadata = {**self.metadata, "format": FORMAT, "version": VERSION, "model": self.model}
        data = save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata)
        with replacing(path) as temporary:
            temporary.write_bytes(data)


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def _read_npz(path: Path) -> tuple[dict[str, NDArray], dict[str, str]]:
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _MAX_BYTES:
                raise FormatError("the arrays are too large", f"more than {_MAX_BYTES} bytes")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (FormatError, MemoryError):
        raise
    except Exception as error:  # zipfile and NumPy raise a dozen kinds on damaged files
        raise FormatError("a damaged or odd .npz file", str(error)) from error
    model = arrays.pop("model", np.array(""))
    return arrays, {"model": str(model) if model.ndim == 0 else ""}


def _read_safetensors(path: Path) -> tuple[dict[str, NDArray], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("format") != FORMAT:
                raise FormatError("not a trace", f"expected the format `{FORMAT}` in its metadata")
            if metadata.get("version") != VERSION:
                found = metadata.get("version")
                raise FormatError(
                    f"a trace of version {found}", f"this edgemoe reads {VERSION}", "update edgemoe"
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise FormatError("neither a safetensors nor a .npz file", str(error)) from error
    return arrays, {k: v for k, v in metadata.items() if k not in ("format", "version")}


def _from_arrays(arrays: dict[str, NDArray], metadata: dict[str, str]) -> Trace:
    missing = {"experts", "num_experts", "expert_bytes"} - arrays.keys()
    if missing:
        raise FormatError(f"no array `{min(missing)}`", "", "see docs/trace.md")
    experts = _integers(arrays, "experts", np.int32)
    if experts.ndim != 3 or not experts.size:
        raise FormatError(
            "`experts` holds no steps" if experts.ndim == 3 else "`experts` has the wrong shape",
            f"expected [steps, places, k], got {list(experts.shape)}",
        )
    num_steps, num_places, _ = experts.shape
    weights = arrays.get("weights")
    if weights is not None and weights.dtype.kind != "f":
        raise FormatError("`weights` are no floats", f"got {weights.dtype}")
    phase = np.full(num_steps, DECODE, dtype=np.int8)
    if "phase" in arrays:
        phase = _integers(arrays, "phase", np.int8)
    places = {name: _integers(arrays, name, np.int64) for name in ("num_experts", "expert_bytes")}
    for name, value in places.items():
        if value.size == 1:
            places[name] = np.full(num_places, value.reshape(-1)[0])
    record_bytes = None
    if "record_bytes" in arrays:
        record_bytes = _integers(arrays, "record_bytes", np.int64)
    return Trace(
        experts=experts,
        weights=None if weights is None else weights.astype(np.float32),
        phase=phase,
        num_experts=places["num_experts"],
        expert_bytes=places["expert_bytes"],
        record_bytes=record_bytes,
        model=metadata.pop("model", ""),
        metadata=metadata,
    )


def _integers(arrays: dict[str, NDArray], name: str, dtype: Callable) -> NDArray:
    value, limits = arrays[name], np.iinfo(dtype)
    if value.dtype.kind not in "iu":
        raise FormatError(f"`{name}` are no integers", f"got {value.dtype}")
    if value.size and not limits.min <= int(value.min()) <= int(value.max()) <= limits.max:
        raise FormatError(f"`{name}` are out of range", f"from {value.min()} to {value.max()}")
    return value.astype(dtype)


def _check(trace: Trace) -> None:
    """Raises FormatError where the arrays do not go together."""
    num_steps, num_places, _ = trace.experts.shape
    expected: list[tuple[str, NDArray | None, tuple[int, ...]]] = [
        ("weights", trace.weights, trace.experts.shape),
        ("phase", trace.phase, (num_steps,)),
        ("num_experts", trace.num_experts, (num_places,)),
        ("expert_bytes", trace.expert_bytes, (num_places,)),
    ]
    for name, value, shape in expected:
        if value is not None and value.shape != shape:
            raise FormatError(
                f"`{name}` has the wrong shape", f"expected {list(shape)}, got {list(value.shape)}"
            )
    for name, value, low, high in (
        ("phase", trace.phase, PREFILL, DECODE),
        ("num_experts", trace.num_experts, 1, 1 << 20),
        ("expert_bytes", trace.expert_bytes, 1, 1 << 40),
    ):
        if value.min() < low or value.max() > high:
            raise FormatError(
                f"`{name}` are out of range", f"expected {low} to {high}, got {list(value[:4])}"
            )
    if trace.record_bytes is not None:
        if trace.record_bytes.shape != (trace.num_keys,) or trace.record_bytes.min() < 1:
            raise FormatError("`record_bytes` do not go with `num_experts`")
    limit = trace.num_experts[:, None]
    wrong = (trace.experts < NO_EXPERT) | (trace.experts >= limit)
    if wrong.any():
        step, place, k = np.argwhere(wrong)[0]
        raise FormatError(
            f"step {step}, place {place}: there is no expert {trace.experts[step, place, k]}",
            f"expected -1 (none) or 0 to {trace.num_experts[place] - 1}",
        )
    if trace.weights is not None and not np.isfinite(trace.weights).all():
        raise FormatError("`weights` are not finite")
