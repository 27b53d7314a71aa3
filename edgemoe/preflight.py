"""Everything that can refuse a store before its weights are read. Floor 3; imports no torch itself.

From cheap to expensive: index, model arguments, the plan with the usual allowance for the runtime;
then the libraries and the tokenizer are loaded and the plan is made again with what is resident.
"""

import ctypes
import sys
from dataclasses import dataclass
from pathlib import Path

from .active_set import ActiveSet, find_set, plan_with_set
from .config import DEFAULT_CONTEXT, EngineConfig
from .models import store_args
from .models.args import ModelArgs
from .routing import Prepared, prepare, stand_ins_of
from .runtime.amounts import MIB, format_bytes
from .runtime.budget import MemoryPlan, ModelDims, make_plan
from .runtime.errors import BudgetError, FormatError, UsageError
from .runtime.footprint import TORCH_RUNTIME_BYTES, usual_runtime_bytes
from .runtime.format import PAGE_BYTES, round_up
from .runtime.index import ExpertRecord, StoreIndex, load_index
from .runtime.process import process_memory
from .tokenizer import Tokenizer

# Resident bytes vary a little from run to run, and a floor that an error has named must work.
_MEASURE_STEP = 32 * MIB
_PROFILE_BYTES = 32 * MIB  # the tables of a profile that guesses are made by


@dataclass(frozen=True, slots=True)
class Preflight:
    """A store that fits. `tokenizer` None: token ids only."""

    path: Path
    index: StoreIndex
    args: ModelArgs
    plan: MemoryPlan
    active_set: ActiveSet | None
    routing: Prepared
    stand_ins: dict[tuple[int, int], ExpertRecord] | None
    tokenizer: Tokenizer | None


def preflight(path: Path, config: EngineConfig) -> Preflight:
    """Check and plan. Raises BudgetError below the floor, and what a wrong store deserves."""
    index = load_index(path)
    args = store_args(index)
    check_index(index, args)
    stand_ins = stand_ins_of(config.routing, index)
    context = context_of(args, config)
    dims = dims_of(args)
    active = None
    if config.set is not None:
        active = find_set(index, args, config.set, config.set_mode, config.set_threshold)

    def plan_now() -> MemoryPlan:
        def plan_for(budget: int | None) -> MemoryPlan:
            runtime = runtime_bytes(index, config)
            return make_plan(index, dims, budget, context, config.kv_bits, runtime_bytes=runtime)

        plan = plan_for(config.memory_bytes)
        if config.memory_bytes is None and config.set_mode == "hard":  # the set alone can stay
            plan = plan_for(plan_with_set(plan, index, active).resident_budget_bytes)
        return plan

    plan = plan_now()
    import_runtime(config)
    tokenizer = Tokenizer.load(path)
    routing = prepare(config.routing, index, args, active)
    release_free_memory()
    if runtime_bytes(index, config) > plan.lines[0].num_bytes:
        plan = plan_now()
    return Preflight(path, index, args, plan, active, routing, stand_ins, tokenizer)


def runtime_bytes(index: StoreIndex, config: EngineConfig) -> int:
    """The plan's allowance for the runtime: the usual one, or what this process holds if more."""
    usual_bytes = usual_runtime_bytes(index)
    if "torch" in sys.modules:
        usual_bytes = max(usual_bytes, TORCH_RUNTIME_BYTES)
    if config.prefetch == "profile":
        usual_bytes += _PROFILE_BYTES
    resident_bytes = process_memory().rss_bytes
    if resident_bytes <= usual_bytes:
        return usual_bytes
    return round_up(resident_bytes + _MEASURE_STEP // 4, _MEASURE_STEP)


def cache_capacity(plan: MemoryPlan, config: EngineConfig) -> tuple[int, list[str]]:
    """Bytes for the expert cache once the trunk is resident, and notes: the plan's, less what the
    process holds above it. Raises BudgetError where too little is left."""
    capacity, notes = plan.cache_bytes, []
    planned = line_bytes(plan, "runtime") + line_bytes(plan, "trunk")
    # Half of the headroom is for what varies from run to run, the other half for later.
    excess = process_memory().rss_bytes - planned - line_bytes(plan, "headroom") // 2
    if config.memory_bytes is not None and excess > 0:
        capacity = (capacity - excess) // PAGE_BYTES * PAGE_BYTES
        more = f"the process holds {format_bytes(excess)} more than planned"
        notes.append(f"{more}; the expert cache is smaller by that")
        if capacity < plan.min_cache_bytes:
            least = plan.budget_bytes + plan.min_cache_bytes - capacity
            raise BudgetError(
                f"--memory {format_bytes(plan.budget_bytes)} is too small for this process",
                more,
                f"give --memory {least // MIB + 16}MiB or more",
            )
    if config.cache_bytes is not None:
        if config.cache_bytes < plan.min_cache_bytes:
            raise BudgetError(
                f"an expert cache of {config.cache_bytes} bytes is too small",
                f"one layer needs {plan.min_cache_bytes}",
            )
        capacity = min(capacity, config.cache_bytes // PAGE_BYTES * PAGE_BYTES)
    return capacity, notes


def line_bytes(plan: MemoryPlan, name: str) -> int:
    """Bytes of a line of the plan."""
    return sum(line.num_bytes for line in plan.lines if line.name == name)


def dims_of(args: ModelArgs) -> ModelDims:
    """The sizes that the memory plan depends on."""
    return ModelDims(
        num_layers=args.num_layers,
        hidden=args.hidden,
        num_heads=args.num_heads,
        num_kv_heads=args.num_kv_heads,
        head_dim=args.head_dim,
        vocab=args.vocab,
        top_k=args.top_k,
        expert_width=args.expert_width,
        dense_width=max(args.dense_width, args.shared_width),
    )


def context_of(args: ModelArgs, config: EngineConfig) -> int:
    """Tokens of the KV cache. Raises UsageError above what the model was trained for."""
    if config.context is None:
        return min(DEFAULT_CONTEXT, args.max_context)
    if config.context > args.max_context:
        raise UsageError(
            f"a context of {config.context} tokens is too long for this model",
            f"it was trained for {args.max_context}",
            f"give --context {args.max_context} or less",
        )
    return config.context


def check_index(index: StoreIndex, args: ModelArgs) -> None:
    """Raises FormatError where the records are not those of the model in config.json, UsageError
    where the routers know nothing yet."""
    if index.untrained_routers:
        raise UsageError(
            f"`{index.path}` cannot run yet: its routers are random",
            "it was exported to be trained (`untrained_routers` in config.json)",
            "train it, take the word out and convert again; --router index-map needs no training",
        )
    num_experts = index.layer_to_num_experts
    wrong = ""
    if index.hidden != args.hidden:
        wrong = f"hidden size {args.hidden} and {index.hidden}"
    elif tuple(num_experts) != args.moe_layers:
        wrong = f"MoE layers {list(args.moe_layers)} and {list(num_experts)}"
    else:
        for (layer, expert), record in index.records.items():
            num_rows = len(index.layer_to_bodies.get(layer, ())) or args.experts_of(layer)
            if (num_experts[layer], num_rows) != (args.bodies_of(layer), args.experts_of(layer)):
                found = num_rows if layer in index.layer_to_bodies else num_experts[layer]
                wrong = f"{args.experts_of(layer)} experts and {found} in layer {layer}"
            elif record.layout.width != args.expert_width:
                wrong = (
                    f"expert width {args.expert_width} and {record.layout.width} in record "
                    f"`layers.{layer}.experts.{expert}`"
                )
    if wrong:
        raise FormatError(
            f"`{index.path}`: config.json and store.json disagree",
            wrong,
            "convert the checkpoint again",
        )


def import_runtime(config: EngineConfig) -> None:
    """Load the libraries, so that their memory can be measured."""
    from .models import causal_lm  # noqa: F401
    from .runtime import executor  # noqa: F401

    # The core brings its own threads; those of torch would only compete for the same cores.
    torch = sys.modules.get("torch")
    if torch is not None and config.backend == "native":
        torch.set_num_threads(1)


def release_free_memory() -> None:
    """Give memory that the allocator keeps for later back to the system, where that is possible."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
    if trim is not None:
        trim(0)
