"""Files that change routes: gains of single experts, thetas of compressed ones. Floor 3.

- tuning: JSON, `{"experts": {"LAYER:EXPERT": GAIN or "off", ...}}`, optionally with the
  `fingerprint` of its checkpoint
- thetas: safetensors, `layers.{layer}.theta` [E, D] for every layer with experts
"""

import json
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .models.args import ModelArgs
from .models.fingerprint import checkpoint_fingerprint
from .runtime.errors import FormatError, NotFoundError, UsageError
from .runtime.files import read_trunk_tensor
from .runtime.headers import read_header
from .runtime.index import StoreIndex
from .runtime.packing import NUMPY_DTYPES, to_fp32

_REALS = ("F64", "F32", "F16", "BF16")


def read_tuning(text: str, index: StoreIndex, args: ModelArgs) -> dict[int, NDArray[np.float32]]:
    """Gains by layer, fp32 [E], of `LAYER:EXPERT=off,LAYER:EXPERT=GAIN` or a file."""
    if "=" in text and not Path(text).exists():
        pairs = [part.partition("=")[::2] for part in text.split(",") if part.strip()]
        values: dict[str, object] = {name.strip(): value.strip() for name, value in pairs}
    else:
        values = _read_tuning_file(Path(text), index)
    gains: dict[int, NDArray[np.float32]] = {}
    for name, value in values.items():
        layer, expert = _expert(name, args)
        row = gains.setdefault(layer, np.ones(args.experts_of(layer), dtype=np.float32))
        row[expert] = _gain(name, value)
    if not gains:
        raise UsageError(f"`{text}` tunes no expert", "expected LAYER:EXPERT=off or =GAIN")
    return gains


def _read_tuning_file(path: Path, index: StoreIndex) -> dict[str, object]:
    if not path.is_file():
        raise NotFoundError(
            f"no tuning at `{path}`", "", "name a file, or LAYER:EXPERT=off,LAYER:EXPERT=GAIN"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        experts = document["experts"]
        found = document.get("fingerprint")
        if not isinstance(experts, dict):
            raise TypeError("`experts` is no object")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"`{path}` is no tuning file", str(error), "see docs/routing.md for its form"
        ) from error
    if found is not None and found != checkpoint_fingerprint(index):
        raise UsageError(
            f"`{path}` was made for another checkpoint", "the fingerprints of the routers differ"
        )
    return experts


def _expert(name: str, args: ModelArgs) -> tuple[int, int]:
    try:
        layer, expert = map(int, name.split(":"))
    except ValueError:
        raise UsageError(f"`{name}` names no expert", "expected LAYER:EXPERT") from None
    if layer not in args.moe_layers:
        raise UsageError(f"`{name}`: layer {layer} has no experts")
    if not 0 <= expert < args.experts_of(layer):
        raise UsageError(
            f"`{name}`: there is no such expert",
            f"layer {layer} has experts 0 to {args.experts_of(layer) - 1}",
        )
    return layer, expert


def _gain(name: str, value: object) -> float:
    try:
        gain = 0.0 if value == "off" else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        gain = -1.0
    if not 0 <= gain < math.inf:
        raise UsageError(f"`{name}`: {value!r} is no gain", "expected `off` or a number from 0 up")
    return gain


def read_thetas(path: Path, index: StoreIndex, args: ModelArgs) -> dict[int, np.ndarray]:
    """fp32 `[E, D]` by layer."""
    if not path.is_file():
        raise NotFoundError(f"no thetas at `{path}`", "", "name a safetensors file")
    thetas = {}
    try:
        with open(path, "rb", buffering=0) as file:
            tensors, metadata = read_header(file, str(path))
            for layer in args.moe_layers:
                name, expected = f"layers.{layer}.theta", (args.experts_of(layer), args.hidden)
                if name not in tensors:
                    raise FormatError(f"`{path}` has no tensor `{name}`", "every layer needs one")
                entry = tensors[name]
                if tuple(entry.shape) != expected or entry.dtype not in _REALS:
                    raise FormatError(
                        f"`{path}`: `{name}` does not go with this model",
                        f"expected real numbers {list(expected)}, got {entry.dtype} "
                        f"{list(entry.shape)}",
                    )
                data = read_trunk_tensor(file, entry).view(NUMPY_DTYPES[entry.dtype])
                thetas[layer] = np.ascontiguousarray(to_fp32(data).reshape(expected))
    except OSError as error:
        raise FormatError(f"`{path}` cannot be read", str(error)) from error
    found = metadata.get("fingerprint")
    if found is not None and found != checkpoint_fingerprint(index):
        raise UsageError(
            f"`{path}` was made for another checkpoint", "the fingerprints of the routers differ"
        )
    return thetas
