"""A model in memory and what runs its layers, for one caller at a time. Floor 3.

It knows no text: tokens go in and logits come out. Whoever feeds tokens is charged for what the
expert cache does for them; what surrounds a step (memory that is lent meanwhile, the size of the
cache, Ctrl-C) is seen to here.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from .config import EngineConfig
from .governed_cache import GovernedCache
from .interrupts import DeferredInterrupt
from .last_run import save_last_run
from .opening import open_all
from .preflight import Preflight
from .runtime.budget import MemoryPlan
from .runtime.errors import UsageError
from .warm_start import WarmStart, expected_use

if TYPE_CHECKING:
    import numpy as np

    from .kv_cache import KVCache
    from .meter import Meter
    from .models.moe import OnRoute
    from .models.steps import Steps
    from .runtime.executor import Executor, StepStats
    from .runtime.observe import Observation
    from .runtime.prefetch import Prefetcher

_NOTHING = nullcontext()
Self = TypeVar("Self", bound="LoadedModel")


class LoadedModel:
    """Trunk, expert cache and executor of a store. A lock makes all threads but one wait."""

    def __init__(self, checked: Preflight, plan: MemoryPlan, config: EngineConfig) -> None:
        self.args, self._index = checked.args, checked.index
        self.chunk_tokens = plan.chunk
        self.closed = False
        self.on_route: OnRoute | None = None  # told of every router that has spoken
        self.charged: Meter | None = None
        self.warm_start: WarmStart | None = None
        self._lock, self._interrupt = threading.RLock(), DeferredInterrupt()
        with ExitStack() as resources:
            opened = open_all(checked, plan, config, self._interrupt, resources)
            self.reader, self.cache, self.prefetch = opened.reader, opened.cache, opened.prefetch
            self._model, self._experts = opened.model, opened.experts
            self._executor, self._full_capacity = opened.executor, opened.capacity_bytes
            self.notes = [*plan.notes, *opened.notes]
            self.lent_memory = opened.lent_memory
            if self.lent_memory is not None:
                self.lent_memory.serve(self.cache, opened.arena, self._use_memory)
            self.governed: GovernedCache | None = None
            if config.find_knee:
                self.governed = GovernedCache(self.cache, plan.min_cache_bytes)
            self._resources = resources.pop_all()  # what fails before gives all back

    def _use_memory(self, workspace: int | None, scratch: int | None, scratch_bytes: int) -> None:
        """Lay the buffers of steps there; see lent_memory.py."""
        self._executor.use_workspace(workspace)
        self._model.use_memory(scratch, scratch_bytes)

    @property
    def decode(self) -> str:
        """What runs the layers: `native` or `reference`."""
        return self._model.decode

    # ---- before the first token ----------------------------------------------------------------

    def _begin_warm_start(self) -> None:
        use, sources, notes = expected_use(self._index, self.args.top_k)
        self.notes += notes
        self.warm_start = WarmStart(self.cache, use, sources, self._lock)

    def warm_up(self) -> int:
        """Wait until the warm start has read what it knows to be wanted and what fits; returns its
        bytes. For whoever has time before the first request: without this it goes on meanwhile."""
        if self.warm_start is None:
            return 0
        self.warm_start.finish()
        return self.warm_start.num_bytes

    def _be_ready(self) -> None:
        """Experts are about to be wanted."""
        if self.closed:
            raise UsageError("this engine is closed")
        if self.warm_start is not None:
            self.warm_start.stop()

    # ---- tokens --------------------------------------------------------------------------------

    def forward(
        self, token_ids: Sequence[int], kv_cache: "KVCache", logits: str = "last", **options: Any
    ) -> "np.ndarray":
        """Append tokens to a KV cache; see `CausalLM.forward`. Ctrl-C comes between two layers."""
        self._be_ready()
        options.setdefault("on_route", self.on_route)
        with self._lock, self.governed or _NOTHING:
            if self._model.decodes(token_ids, logits):  # the core minds Ctrl-C itself
                self._begin_token(kv_cache)
                return self._model.forward(token_ids, kv_cache, logits, **options)
            with self._interrupt.deferred():
                if self.lent_memory is not None:
                    self.lent_memory.begin_prompt(len(token_ids), kv_cache)
                else:
                    kv_cache.make_room(kv_cache.offset + len(token_ids))
                return self._model.forward(token_ids, kv_cache, logits, **options)

    def step(self, token_id: int, kv_cache: "KVCache") -> "tuple[np.ndarray, int | None]":
        """Append one token; see `CausalLM.step`."""
        if self.closed:
            raise UsageError("this engine is closed")
        if not self._model.is_native or self.on_route is not None:
            return self.forward([token_id], kv_cache)[0], None
        with self._lock:
            if self.lent_memory is not None or kv_cache.offset >= kv_cache.room:
                self._begin_token(kv_cache)
            if self.governed is None:  # a null context of Python is slow where memory is cold
                return self._model.step(token_id, kv_cache)
            with self.governed:
                return self._model.step(token_id, kv_cache)

    def _begin_token(self, kv_cache: "KVCache") -> None:
        if self.lent_memory is None:
            if kv_cache.offset >= kv_cache.room:
                with self._interrupt.deferred():
                    kv_cache.make_room(kv_cache.offset + 1)
        elif not self.lent_memory.is_ready(kv_cache):
            with self._interrupt.deferred():
                self.lent_memory.begin_token(kv_cache)

    def make_room(self, kv_cache: "KVCache", num_tokens: int) -> None:
        """A prompt will bring a KV cache to so many tokens: experts leave the memory for them at
        once, and have that beyond."""
        self._be_ready()
        with self._lock, self._interrupt.deferred():
            if self.lent_memory is not None:
                self.lent_memory.hold(kv_cache, num_tokens, no_more=True)
            else:
                kv_cache.make_room(num_tokens)

    @contextmanager
    def steps(self) -> "Iterator[Steps]":
        """The layers, for whoever runs one layer of many texts before the next. Ctrl-C comes
        between two layers' experts."""
        self._be_ready()
        with self._lock, self._interrupt.deferred():
            if self.lent_memory is not None:
                self.lent_memory.begin_layers()
            yield self._model._layers

    def observe(self, observer: "Callable[[Observation], None]") -> None:
        """Call `observer` with what the experts compute for two tokens or more, to calibrate: it
        cannot be taken back. Outputs stay the same, bit for bit."""
        from .runtime.observe import ObservingExecutor

        self.use_executor(lambda executor: ObservingExecutor(executor, observer))

    def use_executor(self, make: "Callable[[Executor], Executor]") -> None:
        """Put the executor that `make` makes of the present one in its place, for good: it runs
        the experts of prompts, and of tokens that are not given as a list of one."""
        cold, stand_ins = self._executor.cold, self._executor.stand_ins
        self._experts.executor = self._executor = make(self._executor)
        self._executor.cold, self._executor.stand_ins = cold, stand_ins

    def use_prefetch(self, prefetch: "Prefetcher") -> None:
        """Guess by this one from the next token on. The one before stays its owner's to close."""
        self.prefetch = prefetch
        self._model.guess_with(prefetch)

    def take_step_stats(self) -> "StepStats":
        """Demand on the expert cache since the last call, without that of answers."""
        self.charge(None)
        return self._executor.take_stats()

    def charge(self, meter: "Meter | None") -> None:
        """Let what the expert cache does from now on be this answer's; what it did until now goes
        to the answer before, None: to nobody."""
        if self.charged is not meter:
            with self._lock:
                stats = self._executor.take_stats()
                if self.charged is not None:
                    self.charged.add(stats)
                self.charged = meter

    # ---- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """Give back memory, threads and files. May be called again."""
        if self.closed:
            return
        has_run = self.warm_start is not None and self.warm_start.is_over
        if self.warm_start is not None:
            self.warm_start.stop()
        with self._lock:
            self.closed = True
            if has_run:
                resident = self.cache.resident_mask()[self.cache.table.own_keys]
                save_last_run(self._index, resident)
            self._model = None
            self._resources.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
