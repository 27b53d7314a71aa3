"""edgemoe: run mixture-of-experts models larger than memory."""

from pathlib import Path as _Path
from typing import Any as _Any

__version__ = "0.1.0"

# In the source tree, runtime/ and quant/ sit beside this package; in a wheel they sit inside it.
_root = str(_Path(__file__).resolve().parent.parent)
if _root not in __path__ and (_Path(_root) / "runtime" / "csrc").is_dir():
    __path__.append(_root)

_PUBLIC = {
    "Engine": "engine",
    "Session": "session",
    "SamplingParams": "sampling",
    "EdgeMoeError": "runtime.errors",
}
__all__ = ["Engine", "Session", "SamplingParams", "EdgeMoeError", "__version__"]


def __getattr__(name: str) -> _Any:
    """Public names are imported on first use, so that `import edgemoe` stays quick."""
    if name not in _PUBLIC:
        raise AttributeError(f"module `edgemoe` has no attribute `{name}`")
    from importlib import import_module

    return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
