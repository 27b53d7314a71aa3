"""How an engine is opened: validated once, at the border. Floor 3; imports no torch.

A value that is not given comes from the environment (EDGEMOE_MEMORY, _CONTEXT, _POLICY, _PREFETCH,
_THREADS, _BACKEND, _KV_BITS, _IO, _CHAT_TEMPLATE, _WARM_START, _SET, _SET_MODE, _SET_THRESHOLD),
else from the default.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .routing import Routing
from .runtime import core
from .runtime.amounts import parse_bytes, parse_rate
from .runtime.errors import UsageError
from .runtime.io import IO_MODES
from .runtime.policy import DEFAULT_POLICY, POLICIES
from .runtime.prefetch import AUTO as AUTO_PREDICTOR
from .runtime.prefetch import CHOICES
from .runtime.pressure import auto_budget
from .runtime.sets import SET_MODES, check_threshold

DEFAULT_CONTEXT = 4096
WARM_STARTS = ("auto", "off")
AUTO = "auto"  # as `memory`


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of `Engine.from_pretrained`. Raises UsageError naming the one that is wrong.

    `memory_bytes` None: as much as keeps every expert resident. `context` None: what the model was
    trained for, 4096 at most. `threads` None: one per core. `cache_bytes`: less expert cache than
    the budget allows, for measurements. `throttle`: emulate a drive of so many bytes per second.
    `find_knee`: stay below the budget where memory gets short (governor.py); memory "auto" asks for
    it. `warm_start` "off": read no expert before it is wanted, keep nothing for the next engine.
    """

    memory_bytes: int | None = None
    context: int | None = None
    policy: str = DEFAULT_POLICY
    prefetch: str = AUTO_PREDICTOR
    threads: int = 0  # after validation at least 1
    backend: str = ""  # after validation "native" or "reference"
    kv_bits: int = 16
    io: str = "auto"
    cache_bytes: int | None = None
    throttle: int | None = None
    chat_template: str | None = None
    warm_start: str = "auto"
    find_knee: bool = False
    set: str | None = None
    set_mode: str = "exact"
    set_threshold: float | None = None
    routing: Routing = Routing()

    def __post_init__(self) -> None:
        if not self.threads:
            object.__setattr__(self, "threads", num_cores())
        if not self.backend:
            object.__setattr__(self, "backend", core.BACKEND)
        _one_of("policy", self.policy, POLICIES)
        _one_of("prefetch", self.prefetch, CHOICES)
        _one_of("io", self.io, IO_MODES)
        _one_of("warm_start", self.warm_start, WARM_STARTS)
        _one_of("kv_bits", self.kv_bits, (8, 16, 32))
        _one_of("backend", self.backend, ("native", "reference"))
        _one_of("set_mode", self.set_mode, SET_MODES)
        if self.backend == "native" and core.lib is None:
            raise UsageError(
                "the native core is not there",
                "no shared library was built or found",
                "reinstall edgemoe, or use --backend reference",
            )
        for name, least in (
            ("memory_bytes", 1),
            ("context", 1),
            ("threads", 1),
            ("cache_bytes", 0),
            ("throttle", 1),
        ):
            value = getattr(self, name)
            if value is not None and (not _is_int(value) or value < least):
                raise UsageError(
                    f"bad option `{name}`",
                    f"expected a whole number from {least} up, got {value!r}",
                )
        if self.set is None and (self.set_mode != "exact" or self.set_threshold is not None):
            raise UsageError(
                "a set mode without a set", "", "name one with --set, made by edgemoe prune"
            )
        if self.set_threshold is not None:
            check_threshold(self.set_threshold, self.set_mode)
        if self.threads > 256:
            raise UsageError("bad option `threads`", f"expected 256 or fewer, got {self.threads}")

    @classmethod
    def make(cls, environment: Mapping[str, str] | None = None, **given: Any) -> "EngineConfig":
        """From keyword arguments of `from_pretrained` (None: not given) and the environment."""
        environment = os.environ if environment is None else environment
        values = {name: value for name, value in given.items() if value is not None}
        known = {"memory", *(item.name for item in fields(cls))} - {"memory_bytes"}
        for name in values:
            if name not in known:
                raise UsageError(
                    f"unknown option `{name}`", f"known are {', '.join(sorted(known))}"
                )
        for name in known - {"cache_bytes", "throttle", "find_knee", "routing"}:
            text = environment.get(f"EDGEMOE_{name.upper()}")
            if text and name not in values:
                values[name] = _from_text(name, text)
        if values.get("memory") == AUTO:
            values["memory_bytes"], values["find_knee"] = auto_budget(), True
            del values["memory"]
        if "memory" in values:
            values["memory_bytes"] = parse_bytes(values.pop("memory"))
        if isinstance(values.get("cache_bytes"), str):
            values["cache_bytes"] = parse_bytes(values["cache_bytes"])
        if isinstance(values.get("throttle"), str):
            values["throttle"] = parse_rate(values["throttle"])
        if "chat_template" in values:
            values["chat_template"] = os.fspath(values["chat_template"])
        return cls(**values)


def num_cores() -> int:
    """Physical cores this process may use; a second thread of a core adds nothing here."""
    import psutil

    limits = [psutil.cpu_count(logical=False), os.cpu_count(), _cpu_quota()]
    if hasattr(os, "sched_getaffinity"):
        limits.append(len(os.sched_getaffinity(0)))
    return max(1, min(limit for limit in limits if limit))


def _cpu_quota() -> int | None:
    """Whole cores that a container may use; None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # another system, or "max"
        return None


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(name: str, value: Any, choices: Any) -> None:
    if value not in choices:
        listed = ", ".join(map(str, choices))
        raise UsageError(f"bad option `{name}`", f"expected one of {listed}, got {value!r}")


def _from_text(name: str, text: str) -> Any:
    if name not in ("context", "threads", "kv_bits", "set_threshold"):
        return text
    kind, meaning = (float, "a number") if name == "set_threshold" else (int, "a whole number")
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"`EDGEMOE_{name.upper()}` is `{text}`", f"expected {meaning}") from None
