"""One number bounds the process: what the budget is spent on, line by line. Floor 0, without torch.

A plan is made before any weight is read. Its fixed lines are what a step needs whatever happens;
the rest of the budget is the expert cache. The floor is the least budget that works.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .amounts import MIB, format_bytes, parse_bytes
from .buffers import moe_workspace_bytes, prompt_buffers, wave_pairs
from .errors import BudgetError
from .footprint import usual_runtime_bytes
from .format import PAGE_BYTES, TILE_ROWS, round_up
from .headers import TensorEntry, read_header
from .index import TRUNK_FILE, StoreIndex
from .process import MemoryLimit, ProcessMemory, memory_limit, process_memory

__all__ = [
    "BelowFloorError",
    "MemoryLimit",
    "MemoryPlan",
    "ModelDims",
    "PlanLine",
    "ProcessMemory",
    "format_bytes",
    "kv_cache_bytes",
    "kv_head_bytes",
    "make_plan",
    "memory_limit",
    "moe_workspace_bytes",
    "parse_bytes",
    "process_memory",
    "prompt_buffers",
    "wave_pairs",
    "with_headroom",
]

TEMPLATE_BYTES = 32 * MIB  # the process that renders chat templates
MIN_HEADROOM_BYTES = 32 * MIB
HEADROOM_SHARE = 0.02
CHUNK = 512  # tokens of one prefill chunk


@dataclass(frozen=True, slots=True)
class ModelDims:
    """The sizes of a model that memory depends on."""

    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    top_k: int
    expert_width: int  # the widest expert
    dense_width: int = 0  # the widest dense or shared-expert feed-forward; 0: none


@dataclass(frozen=True, slots=True)
class PlanLine:
    name: str
    num_bytes: int
    explanation: str


@dataclass(frozen=True)
class MemoryPlan:
    """How a budget is spent; `lines` add up to `budget_bytes`, the expert cache being the last."""

    lines: tuple[PlanLine, ...]
    budget_bytes: int
    floor_bytes: int
    floor_lines: tuple[PlanLine, ...]
    cache_bytes: int
    min_cache_bytes: int
    max_cache_bytes: int  # all experts
    resident_budget_bytes: int  # the least budget that keeps every expert in memory
    num_experts: int
    context: int
    kv_bits: int
    chunk: int
    notes: tuple[str, ...] = field(default=())

    @property
    def is_resident(self) -> bool:
        """Whether every expert stays in memory."""
        return self.cache_bytes >= self.max_cache_bytes

    @cached_property
    def num_cached_experts(self) -> int:
        """About how many records the expert cache holds."""
        if not self.max_cache_bytes:
            return 0
        return min(self.num_experts, self.num_experts * self.cache_bytes // self.max_cache_bytes)

    def table(self) -> list[str]:
        """The plan as lines of text, the floor and the notes at the end."""
        return [
            *_table(self.lines, "budget", self.budget_bytes),
            f"floor (the least budget that runs): {format_bytes(self.floor_bytes)}",
            f"all {self.num_experts} experts in memory: {format_bytes(self.resident_budget_bytes)}",
            *(f"note: {note}" for note in self.notes),
        ]


class BelowFloorError(BudgetError):
    """A budget below the floor. `table` is the floor, line by line."""

    def __init__(self, budget_bytes: int, floor_bytes: int, lines: Sequence[PlanLine]) -> None:
        parts = " + ".join(f"{line.name} {format_bytes(line.num_bytes)}" for line in lines)
        super().__init__(
            f"--memory {format_bytes(budget_bytes)} is below the floor of "
            f"{format_bytes(floor_bytes)}",
            f"it needs {parts}",
            f"give --memory {-(-floor_bytes // MIB)}MiB or more, or a shorter --context",
        )
        self.floor_bytes = floor_bytes
        self.table = _table(lines, "floor", floor_bytes)


def make_plan(
    index: StoreIndex,
    dims: ModelDims,
    budget_bytes: int | None = None,
    context: int = 4096,
    kv_bits: int = 16,
    chunk: int = CHUNK,
    runtime_bytes: int | None = None,
    *,
    template_bytes: int = TEMPLATE_BYTES,
    limit: MemoryLimit | None = None,
) -> MemoryPlan:
    """Spend `budget_bytes` (None: enough for every expert) on a store; reads headers only.

    `runtime_bytes`: resident before weights are read, None: `usual_runtime_bytes`. `limit`: what
    the system allows, asked of it where None. Raises BelowFloorError.
    """
    if runtime_bytes is None:
        runtime_bytes = usual_runtime_bytes(index)
    trunk_bytes, largest_bytes = _trunk_bytes(index)
    kv_bytes = kv_cache_bytes(dims, context, kv_bits)
    fixed = [
        PlanLine("runtime", runtime_bytes, "interpreter, libraries, tokenizer, native core"),
        PlanLine("trunk", trunk_bytes, "every weight that is not a routed expert"),
        PlanLine("KV cache", kv_bytes, f"{context} tokens at {kv_bits} bits"),
        PlanLine(
            "activations",
            _activation_bytes(dims, context, chunk, index),
            f"chunks of {chunk} tokens, workspace of the experts",
        ),
        PlanLine("chat template", template_bytes, "the process that renders it"),
    ]
    fixed_bytes = sum(line.num_bytes for line in fixed)
    max_cache_bytes = index.expert_bytes
    min_cache_bytes = min(dims.top_k * index.max_record_bytes, max_cache_bytes)
    # While the trunk is loaded, its largest tensor is there twice; memory that the later lines use
    # only afterwards counts towards it.
    later = kv_bytes + fixed[3].num_bytes + template_bytes + min_cache_bytes
    loading = PlanLine(
        "loading", max(0, largest_bytes - later), "the largest trunk tensor, while it is read"
    )
    floor_bytes = with_headroom(fixed_bytes + min_cache_bytes + loading.num_bytes)
    resident_bytes = max(floor_bytes, with_headroom(fixed_bytes + max_cache_bytes))
    least = PlanLine("expert cache", min_cache_bytes, f"{dims.top_k} largest records: one layer")
    floor_headroom = floor_bytes - fixed_bytes - min_cache_bytes - loading.num_bytes
    floor_lines = [*fixed, PlanLine("headroom", floor_headroom, _HEADROOM_TEXT), least]
    if loading.num_bytes:
        floor_lines.insert(2, loading)
    budget = resident_bytes if budget_bytes is None else budget_bytes
    if budget < floor_bytes:
        raise BelowFloorError(budget, floor_bytes, floor_lines)
    headroom_bytes = _headroom(budget)
    cache_bytes = min(budget - fixed_bytes - headroom_bytes, max_cache_bytes)
    cache_bytes = cache_bytes // PAGE_BYTES * PAGE_BYTES
    num_experts = len(index.records)
    num_cached = num_experts * cache_bytes // max_cache_bytes if max_cache_bytes else 0
    share = f"{100 * num_cached / num_experts:.0f} %" if num_experts else "no experts"
    experts = f"{num_cached} of {num_experts} experts{index.rows_text}, {share}"
    unused = budget - fixed_bytes - headroom_bytes - cache_bytes
    headroom = PlanLine("headroom", headroom_bytes, _HEADROOM_TEXT)
    lines = [*fixed, headroom, PlanLine("expert cache", cache_bytes, experts)]
    if unused >= MIB:
        lines.insert(-1, PlanLine("unused", unused, "every expert is in memory without it"))
    elif unused:
        lines[-2] = PlanLine("headroom", headroom_bytes + unused, _HEADROOM_TEXT)
    return MemoryPlan(
        lines=tuple(lines),
        budget_bytes=budget,
        floor_bytes=floor_bytes,
        floor_lines=tuple(floor_lines),
        cache_bytes=cache_bytes,
        min_cache_bytes=min_cache_bytes,
        max_cache_bytes=max_cache_bytes,
        resident_budget_bytes=resident_bytes,
        num_experts=num_experts,
        context=context,
        kv_bits=kv_bits,
        chunk=chunk,
        notes=_notes(budget, budget_bytes is None, limit or memory_limit()),
    )


_HEADROOM_TEXT = "allocator and what is not counted"


def kv_cache_bytes(dims: ModelDims, context: int, kv_bits: int) -> int:
    """Keys and values of every layer for `context` tokens."""
    num_heads = dims.num_layers * dims.num_kv_heads * context
    return num_heads * kv_head_bytes(dims.head_dim, kv_bits)


def kv_head_bytes(head_dim: int, kv_bits: int) -> int:
    """Key and value of one token and head; int8 has a scale of 4 bytes for each."""
    return 2 * (head_dim * kv_bits // 8 + (4 if kv_bits == 8 else 0))


def _activation_bytes(dims: ModelDims, context: int, chunk: int, index: StoreIndex) -> int:
    """An upper estimate of what one chunk needs, whose buffers the core keeps, and of logits."""
    tokens = min(chunk, context)
    num_experts = max(index.layer_to_num_rows.values(), default=0)
    per_token = 6 * dims.hidden  # residual, normed, output, int8 copy, temporaries
    attention = dims.num_heads * dims.head_dim
    attention += 2 * dims.num_kv_heads * dims.head_dim
    router = 4 * num_experts + 4 * dims.top_k
    per_token += 3 * attention + 3 * dims.dense_width + router
    logits = 6 * dims.vocab  # of one token, and what sampling makes of them
    workspace, _ = prompt_buffers(dims, index, tokens, chunk)
    return round_up(4 * (tokens * per_token + logits) + workspace, PAGE_BYTES)


def _trunk_bytes(index: StoreIndex) -> tuple[int, int]:
    """(bytes of the trunk in memory, bytes of the largest tensor that is repacked when loaded)."""
    path = index.path / TRUNK_FILE
    with open(path, "rb") as file:
        tensors, _ = read_header(file, str(path))
    total = largest = 0
    for name, entry in tensors.items():
        if name in index.packed_trunk:
            total += entry.num_bytes
        else:
            total += _resident_bytes(entry)
            largest = max(largest, entry.num_bytes)
    return round_up(total, PAGE_BYTES), largest


def _resident_bytes(entry: TensorEntry) -> int:
    """A 16-bit matrix is kept in tiles of 16 rows; what is no matrix is kept as fp32."""
    if len(entry.shape) < 2:
        count = entry.shape[0] if entry.shape else 1
        return max(entry.num_bytes, 4 * count)
    rows = math.prod(entry.shape[:-1])
    return entry.num_bytes // max(rows, 1) * round_up(rows, TILE_ROWS)


def _headroom(budget_bytes: int) -> int:
    return max(MIN_HEADROOM_BYTES, math.ceil(HEADROOM_SHARE * budget_bytes))


def with_headroom(num_bytes: int) -> int:
    """The least budget whose part without headroom is `num_bytes`."""
    budget = max(num_bytes + MIN_HEADROOM_BYTES, math.ceil(num_bytes / (1 - HEADROOM_SHARE)))
    while budget - _headroom(budget) < num_bytes:
        budget += 1
    return budget


def _notes(budget: int, is_default: bool, limit: MemoryLimit) -> tuple[str, ...]:
    if budget <= limit.num_bytes + PAGE_BYTES:  # the system rounds a limit down to a page
        return ()
    asked = "keeping every expert in memory takes" if is_default else "--memory asks for"
    return (
        f"{asked} {format_bytes(budget)}, above the {format_bytes(limit.num_bytes)} of "
        f"{limit.source}: expect swapping or a kill; give a smaller --memory",
    )


def _table(lines: Sequence[PlanLine], total: str, total_bytes: int) -> list[str]:
    rows = [(line.name, format_bytes(line.num_bytes), line.explanation) for line in lines]
    rows.append((total, format_bytes(total_bytes), ""))
    name = max(len(row[0]) for row in rows)
    size = max(len(row[1]) for row in rows)
    return [f"{row[0]:<{name}}  {row[1]:>{size}}  {row[2]}".rstrip() for row in rows]
