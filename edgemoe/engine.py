"""The public face: a store opened under one memory budget, and what it is asked to do. Floor 3.

Opening goes from cheap to expensive, so that what cannot work is refused early (preflight.py). The
budget bounds the process: what it holds above the plan once the trunk is loaded is taken from the
expert cache.
"""

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .active_set import ActiveSet, find_set, mask_routers, plan_with_set, warm_up
from .chat_template import ChatTemplate, TemplateWorker
from .config import EngineConfig
from .kv_lending import KVLending
from .loaded_model import LoadedModel
from .preflight import Preflight, preflight
from .report import engine_report, notes_on
from .routing import Change, Routing, apply, counts_of, prepare
from .runtime.errors import NotFoundError, TemplateError, UsageError
from .sampling import SamplingParams
from .stats import memory_bytes, peak_memory_bytes
from .tokenizer import Tokenizer
from .tokenizer_files import eos_ids, read_json

if TYPE_CHECKING:
    from .kv_cache import KVCache
    from .models.rules import RoutingCounts
    from .session import Completion, Event, Prompt, Session

DEMO = Path(__file__).with_name("demo") / "demo.edgemoe"


class Engine(LoadedModel):
    """A model with its tokenizer, its templates and its routing, shared by sessions. Made by
    `from_pretrained`; serves one thread at a time. Close it, or use it as a context manager."""

    def __init__(self, config: EngineConfig, checked: Preflight) -> None:
        self.config, self.path, self._full_plan = config, checked.path, checked.plan
        self.active_set: ActiveSet | None = checked.active_set  # changed by `use_set`
        self._routing, self._prepared = config.routing, checked.routing
        self._change = Change.of(self.active_set, self._routing)
        self._stand_ins = checked.stand_ins
        self.plan = plan_with_set(checked.plan, checked.index, self.active_set)
        self.context = self.plan.context
        self.tokenizer: Tokenizer | None = checked.tokenizer
        self.eos_ids = frozenset(eos_ids(checked.path))  # where there is no tokenizer to ask
        self._template: ChatTemplate | TemplateError | None = None
        self.template_worker = TemplateWorker()
        self._kv_lending = KVLending(self)
        self._session: Session | None = None
        super().__init__(checked, self.plan, config)
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        self._resources.callback(self.template_worker.close)
        self.notes += notes_on(self)
        if not self._routing.is_plain:
            apply(self._prepared, self._model, self._executor)
        if self.active_set is not None:
            mask_routers(self._model, self.active_set)
            warm_up(self.cache, self.active_set, self.args.top_k)
        elif self.config.warm_start != "off":
            self._begin_warm_start()

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
        return cls(config, preflight(Path(path), config))

    # ---- what it is ----------------------------------------------------------------------------

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template; raises TemplateError where there is none."""
        if self._template is None:
            try:
                self._template = ChatTemplate.load(self.path, self.config.chat_template)
                if self.lent_memory is not None:
                    with self._lock, self._interrupt.deferred():
                        self.lent_memory.end_template()
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

    # ---- the routes of tokens -------------------------------------------------------------------

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
            self._routing, self._prepared = routing, prepared
            self._change = Change.of(self.active_set, routing)

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

    # ---- sessions ------------------------------------------------------------------------------

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
        self._session = None
        super().close()
