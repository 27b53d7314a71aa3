"""What an engine runs on, from cheap to expensive: files, threads, trunk, experts. Floor 3."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import EngineConfig
from .interrupts import DeferredInterrupt, InterruptibleExperts
from .lent_memory import LentMemory
from .preflight import Preflight, cache_capacity, dims_of, release_free_memory
from .runtime.budget import MemoryPlan
from .runtime.format import PAGE_BYTES

if TYPE_CHECKING:
    from .models.causal_lm import CausalLM
    from .runtime.cache_base import CacheBase
    from .runtime.executor import Executor
    from .runtime.io import Arena, RecordReader
    from .runtime.prefetch import Prefetcher


@dataclass(frozen=True, slots=True)
class Opened:
    """Closed by the ExitStack that `open_all` was given. `capacity_bytes`: of the expert cache, as
    the plan has it; `notes`: what is not as planned."""

    reader: "RecordReader"
    model: "CausalLM"
    experts: InterruptibleExperts
    arena: "Arena"
    cache: "CacheBase"
    executor: "Executor"
    prefetch: "Prefetcher"
    capacity_bytes: int
    lent_memory: LentMemory | None
    notes: list[str]


def open_all(
    checked: Preflight,
    plan: MemoryPlan,
    config: EngineConfig,
    interrupt: DeferredInterrupt,
    resources: ExitStack,
) -> Opened:
    """Load the trunk, and make the expert cache of what memory is left by `plan`.

    Raises BudgetError where that is too little. What was opened until then is in `resources`.
    """
    from .models.causal_lm import CausalLM
    from .runtime.executor import Executor
    from .runtime.io import Arena
    from .runtime.kernels import ThreadPool
    from .runtime.native_cache import make_cache
    from .runtime.store import Store

    args, index = checked.args, checked.index
    store = Store(checked.path, io=config.io, backend=config.backend, stand_ins=checked.stand_ins)
    resources.callback(store.close)
    store.reader.throttle(config.throttle or 0)
    pool = ThreadPool(config.threads)
    resources.callback(pool.close)
    experts = InterruptibleExperts(interrupt)
    model = CausalLM(args, store.trunk_tensor, experts, pool, config.backend)
    release_free_memory()
    capacity, notes = cache_capacity(plan, config)
    is_bound = config.memory_bytes is not None and config.cache_bytes is None
    lent_memory = None
    if is_bound and not config.find_knee and model.is_native:
        lent_memory = LentMemory(plan, index, dims_of(args), capacity)
    room = lent_memory.room_bytes if lent_memory else 0
    arena = Arena(max(capacity + room, PAGE_BYTES), config.backend)
    resources.callback(arena.close)
    resources.callback(store.close)  # last in, first out: no read outlives its memory
    cache = make_cache(
        store.reader, arena, capacity, store.record_of, config.policy, config.backend
    )
    resources.callback(cache.close)
    experts.executor = executor = Executor(
        cache, pool, config.backend, hidden=args.hidden, top_k=args.top_k, chunk=plan.chunk
    )
    if index.layer_to_bodies:
        model.set_bodies(index.layer_to_bodies)
    prefetch = _make_prefetch(checked, config)
    resources.callback(prefetch.close)
    model.guess_with(prefetch)
    return Opened(
        reader=store.reader,
        model=model,
        experts=experts,
        arena=arena,
        cache=cache,
        executor=executor,
        prefetch=prefetch,
        capacity_bytes=capacity,
        lent_memory=lent_memory,
        notes=notes,
    )


def _make_prefetch(checked: Preflight, config: EngineConfig) -> "Prefetcher":
    from .runtime.prefetch import Prefetcher
    from .runtime.profile import profile_path
    from .runtime.profile_parts import read_tables

    name, profile = config.prefetch, None
    if config.backend != "native":
        name = "none"
    elif name == "profile" and profile_path(checked.path).is_file():
        profile = read_tables(profile_path(checked.path))
        profile.check_model(checked.index.layer_to_num_experts, checked.args.top_k)
    return Prefetcher(name, len(checked.args.moe_layers), profile)
