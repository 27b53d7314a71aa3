"""A loaded model: trunk, expert cache and what runs them, under one memory budget. Floor 3.

Opening goes from cheap to expensive, so that what cannot work is refused early (preflight.py). The
budget bounds the process: what it holds above the plan once the trunk is loaded is taken from the
expert cache.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .active_set import ActiveSet, find_set, mask_routers, plan_with_set, warm_up
from .chat_template import ChatTemplate, TemplateWorker
from .config import EngineConfig
from .governed_cache import GovernedCache
from .interrupts import DeferredInterrupt
from .kv_lending import KVLending
from .last_run import save_last_run
from .lent_memory import LentMemory
from .opening import open_all
from .preflight import Preflight, preflight
from .report import engine_report, notes_on
from .routing import Change, Routing, apply, counts_of, prepare
from .runtime.errors import NotFoundError, TemplateError, UsageError
from .sampling import SamplingParams
from .stats import memory_bytes, peak_memory_bytes
from .tokenizer import Tokenizer
from .tokenizer_files import eos_ids, read_json
from .warm_start import WarmStart, expected_use

if TYPE_CHECKING:
    import numpy as np

    from .kv_cache import KVCache
    from .meter import Meter
    from .models.moe import OnRoute
    from .models.rules import RoutingCounts
    from .models.steps import Steps
    from .runtime.executor import Executor, StepStats
    from .runtime.observe import Observation
    from .runtime.prefetch import Prefetcher
    from .session import Completion, Event, Prompt, Session

_NOTHING = nullcontext()
DEMO = Path(__file__).with_name("demo") / "demo.edgemoe"


class Engine:
    """Weights and expert cache, shared by its sessions. Made by `from_pretrained`; serves one
    thread at a time (a lock makes others wait). Close it, or use it as a context manager."""

    def __init__(self, config: EngineConfig, checked: Preflight) -> None:
        self.config, self.path, self._full_plan = config, checked.path, checked.plan
        self.active_set: ActiveSet | None = checked.active_set  # changed by `use_set`
        self._routing, self._prepared = config.routing, checked.routing
        self._change = Change.of(self.active_set, self._routing)
        self.args, self._index = checked.args, checked.index
        self._stand_ins = checked.stand_ins
        self.plan = plan_with_set(checked.plan, self._index, self.active_set)
        self.context, self.chunk_tokens = self.plan.context, self.plan.chunk
        self.tokenizer: Tokenizer | None = checked.tokenizer
        self.eos_ids = frozenset(eos_ids(checked.path))  # where there is no tokenizer to ask
        self.notes: list[str] = list(self.plan.notes)
        self.closed = False
        self.on_route: OnRoute | None = None  # told of every router that has spoken
        self._template: ChatTemplate | TemplateError | None = None
        self.template_worker = TemplateWorker()
        self._interrupt = DeferredInterrupt()
        self._lock = threading.RLock()
        self.charged: Meter | None = None
        self._kv_lending = KVLending(self)
        self._session: Session | None = None
        self.warm_start: WarmStart | None = None
        self.governed: GovernedCache | None = None
        self.lent_memory: LentMemory | None = None
        self._resources = ExitStack()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        memory: str | int | None = None,
        context: int | None = None,
        policy: str | None = None,
        prefetch: str | None = None,
        threads: int | None = None,
        backend: str | None = None,
        kv_bits: int | None = None,
        io: str | None = None,
        cache_bytes: int | None = None,
        throttle: str | int | None = None,
        chat_template: str | Path | None = None,
        warm_start: str | None = None,
        set: str | None = None,
        set_mode: str | None = None,
        set_threshold: float | None = None,
        routing: Routing | None = None,
    ) -> "Engine":
        """Open a store (None: the bundled demo model); `memory` such as "4GiB" bounds the process.
        `set`, `set_mode` and `set_threshold` as in `use_set`; `routing` as in `use_routing`.

        Raises BudgetError where the budget is below the floor, before any weight is read;
        NotFoundError, FormatError, UnsupportedModelError, UsageError.
        """
        config = EngineConfig.make(
            memory=memory,
            context=context,
            policy=policy,
            prefetch=prefetch,
            threads=threads,
            backend=backend,
            kv_bits=kv_bits,
            io=io,
            cache_bytes=cache_bytes,
            throttle=throttle,
            chat_template=chat_template,
            warm_start=warm_start,
            set=set,
            set_mode=set_mode,
            set_threshold=set_threshold,
            routing=routing,
        )
        if path is None:
            path = DEMO
            if not path.is_dir():
                raise NotFoundError(
                    "the bundled demo model is not there",
                    f"expected it at `{DEMO}`",
                    "name a store: edgemoe chat NAME.edgemoe",
                )
        checked = preflight(Path(path), config)
        engine = cls(config, checked)
        try:
            engine._load(checked)
        except BaseException:
            engine.close()
            raise
        return engine

    # ---- opening -------------------------------------------------------------------------------

    def _load(self, checked: Preflight) -> None:
        opened = open_all(checked, self.plan, self.config, self._interrupt, self._resources)
        self.reader, self.cache, self.prefetch = opened.reader, opened.cache, opened.prefetch
        self._model, self._experts = opened.model, opened.experts
        self._executor, self._full_capacity = opened.executor, opened.capacity_bytes
        self.notes += opened.notes
        self.lent_memory = opened.lent_memory
        if self.lent_memory is not None:
            self.lent_memory.serve(self.cache, opened.arena, self._use_memory)
        if self.config.find_knee:
            self.governed = GovernedCache(self.cache, self.plan.min_cache_bytes)
        self.notes += notes_on(self)
        if not self._routing.is_plain:
            apply(self._prepared, self._model, self._executor)
        if self.active_set is not None:
            mask_routers(self._model, self.active_set)
            warm_up(self.cache, self.active_set, self.args.top_k)
        elif self.config.warm_start != "off":
            use, sources, notes = expected_use(self._index, self.args.top_k)
            self.notes += notes
            self.warm_start = WarmStart(self.cache, use, sources, self._lock)

    def _use_memory(self, workspace: int | None, scratch: int | None, scratch_bytes: int) -> None:
        """Lay the buffers of steps there; see lent_memory.py."""
        self._executor.use_workspace(workspace)
        self._model.use_memory(scratch, scratch_bytes)

    # ---- what it is ----------------------------------------------------------------------------

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template; raises TemplateError where there is none."""
        if self._template is None:
            try:
                self._template = ChatTemplate.load(self.path, self.config.chat_template)
                if self.lent_memory is not None:
                    with self._lock, self._interrupt.deferred():
                        self.lent_memory.end_idle()
                self._template.worker = self.template_worker
            except TemplateError as error:
                self._template = error
        if isinstance(self._template, TemplateError):
            raise self._template
        return self._template

    @property
    def generation_config(self) -> dict[str, Any]:
        """The model's `generation_config.json`, for `SamplingParams.from_config`."""
        return read_json(self.path / "generation_config.json")

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer; raises UsageError where the store has none."""
        if self.tokenizer is None:
            raise UsageError(
                "this store has no tokenizer",
                f"`{self.path}` holds no tokenizer.json",
                "prompt with token ids, or convert a checkpoint that has one",
            )
        return self.tokenizer

    def memory_bytes(self) -> int:
        """Resident bytes of this process and its template worker now."""
        return memory_bytes(self.template_worker.pid)

    def peak_memory_bytes(self) -> int:
        """The largest resident bytes of this process so far, and of its template worker now."""
        return peak_memory_bytes(self.template_worker.pid)

    def report(self) -> dict[str, Any]:
        """What runs and how, and `notes` on everything that is not as asked, as JSON values."""
        return engine_report(self)

    @property
    def decode(self) -> str:
        """What runs the layers: `native` or `reference`."""
        return self._model.decode

    @property
    def routing(self) -> Change | None:
        """What changes the routes of tokens, and so the output; None: nothing does."""
        return self._change

    def routing_counts(self) -> "RoutingCounts":
        """How many experts tokens went through since the start, where `routing` is not None."""
        return counts_of(self._model, self._executor)

    def use_routing(self, routing: Routing | None) -> None:
        """From the next token on, choose experts by this; None: as the model does. Raises
        UsageError, NotFoundError, FormatError; then nothing has changed."""
        if self.closed:
            raise UsageError("this engine is closed")
        with self._lock, self._interrupt.deferred():
            routing = routing or Routing()
            if routing.stand_in is not None and self._stand_ins is None:
                raise UsageError(
                    "this engine has no stand-ins",
                    "they are opened with it",
                    "open it with a routing that has `stand_in`",
                )
            prepared = prepare(routing, self._index, self.args, self.active_set)
            apply(prepared, self._model, self._executor)
            self._routing, self._change = routing, Change.of(self.active_set, routing)

    def use_set(
        self, name: str | None, mode: str = "exact", threshold: float | None = None
    ) -> None:
        """From the next token on, run with the set `NAME`, `A+B` or `A&B` of the store in `mode`
        exact, soft or hard (active_set.py); None: with the full model. Nothing is loaded again but
        experts. Raises UsageError, NotFoundError, FormatError; then nothing has changed."""
        self._be_ready()
        with self._lock, self._interrupt.deferred():
            active = None
            if name is not None:
                active = find_set(self._index, self.args, name, mode, threshold)
                prepare(self._routing, self._index, self.args, active)
            mask_routers(self._model, active)
            self.active_set, self._change = active, Change.of(active, self._routing)
            self.plan = plan_with_set(self._full_plan, self._index, active)
            if active is not None:
                warm_up(self.cache, active, self.args.top_k)

    def _be_ready(self) -> None:
        """Experts are about to be wanted."""
        if self.closed:
            raise UsageError("this engine is closed")
        if self.warm_start is not None:
            self.warm_start.stop()

    # ---- running -------------------------------------------------------------------------------

    def forward(
        self, token_ids: Sequence[int], kv_cache: "KVCache", logits: str = "last", **options: Any
    ) -> "np.ndarray":
        """Append tokens to a KV cache; see `CausalLM.forward`. Ctrl-C comes between two layers."""
        self._be_ready()
        options.setdefault("on_route", self.on_route)
        with self._lock, self.governed or _NOTHING:
            if self._model.decodes(token_ids, logits):  # the core minds Ctrl-C itself
                self._begin_token()
                return self._model.forward(token_ids, kv_cache, logits, **options)
            with self._interrupt.deferred():
                self._begin_prompt(len(token_ids))
                return self._model.forward(token_ids, kv_cache, logits, **options)

    def step(self, token_id: int, kv_cache: "KVCache") -> "tuple[np.ndarray, int | None]":
        """Append one token; see `CausalLM.step`."""
        if self.closed:
            raise UsageError("this engine is closed")
        if not self._model.is_native or self.on_route is not None:
            return self.forward([token_id], kv_cache)[0], None
        with self._lock:
            if self.lent_memory is not None:
                self._begin_token()
            if self.governed is None:  # a null context of Python is slow where memory is cold
                return self._model.step(token_id, kv_cache)
            with self.governed:
                return self._model.step(token_id, kv_cache)

    def _begin_token(self) -> None:
        if self.lent_memory is not None and not self.lent_memory.is_for_token:
            with self._interrupt.deferred():
                self.lent_memory.begin_token()

    def _begin_prompt(self, num_tokens: int) -> None:
        if self.lent_memory is not None:
            self.lent_memory.begin_prompt(num_tokens)

    @contextmanager
    def steps(self) -> "Iterator[Steps]":
        """The layers, for whoever runs one layer of many texts before the next. Ctrl-C comes
        between two layers' experts."""
        self._be_ready()
        with self._lock, self._interrupt.deferred():
            self._begin_prompt(self.chunk_tokens)
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

    def warm_up(self) -> int:
        """Wait until the warm start has read what it knows to be wanted and what fits; returns its
        bytes. For whoever has time before the first request: without this it goes on meanwhile."""
        if self.warm_start is None:
            return 0
        self.warm_start.finish()
        return self.warm_start.num_bytes

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

    def lend_kv_cache(self, session: "Session") -> "KVCache":
        """A KV cache for a session; see kv_lending.py. Raises BudgetError."""
        if self.closed:
            raise UsageError("this engine is closed")
        with self._lock, self._interrupt.deferred():
            return self._kv_lending.lend(session)

    def return_kv_cache(self, session: "Session") -> None:
        """The session needs its KV cache no more."""
        with self._lock, self._interrupt.deferred():
            self._kv_lending.take_back(session)

    def session(self) -> "Session":
        """A new session."""
        from .session import Session

        return Session(self)

    @property
    def own_session(self) -> "Session":
        """The session of `stream` and `generate`, made when first used."""
        if self._session is None:
            self._session = self.session()
        return self._session

    def stream(
        self, prompt: "Prompt", params: SamplingParams | None = None, **options: Any
    ) -> "Generator[Event, None, None]":
        """Answer in the engine's own session; see `Session.stream`."""
        return self.own_session.stream(prompt, params, **options)

    def generate(
        self, prompt: "Prompt", params: SamplingParams | None = None, **options: Any
    ) -> "Completion":
        """Answer in the engine's own session; see `Session.generate`."""
        return self.own_session.generate(prompt, params, **options)

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
            self.template_worker.close()
            self._session = self._model = None
            self._resources.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
