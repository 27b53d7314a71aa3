"""The extents of an arena: exact accounting, no overlap, compaction that does what it says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.runtime.extents import Extents, Move
from edgemoe.runtime.format import PAGE_BYTES as PAGE

sizes = st.integers(1, 9)


def free_extents(extents: Extents) -> list[tuple[int, int]]:
    """(offset, bytes) of every free extent, in address order."""
    return sorted((start, end - start) for start, end in extents._free_by_start.items())


def layout(extents: Extents) -> list[tuple[int, int, bool]]:
    """(offset, bytes, is_block) of everything, in address order."""
    blocks = [(*block, True) for block in extents.blocks()]
    return sorted(blocks + [(*free, False) for free in free_extents(extents)])


def check(extents: Extents, model: dict[int, int]) -> None:
    """Blocks and free extents tile the arena, neighbours that are free are one."""
    position, was_free = 0, False
    for offset, num_bytes, is_block in layout(extents):
        assert offset == position and num_bytes > 0 and num_bytes % PAGE == 0
        assert is_block or not was_free
        position, was_free = offset + num_bytes, not is_block
    assert position == extents.num_bytes
    assert dict(extents.blocks()) == model
    assert extents.used_bytes == sum(model.values())
    assert extents.free_bytes == extents.num_bytes - extents.used_bytes


@settings(max_examples=150, deadline=None)
@given(
    num_pages=st.integers(1, 40),
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("take"), sizes),
            st.tuples(st.just("free"), st.integers(0, 99)),
            st.tuples(st.just("join"), sizes),
            st.tuples(st.just("size"), st.integers(1, 50)),
        ),
        max_size=60,
    ),
    data=st.data(),
)
def test_any_history_keeps_exact_accounts(num_pages, actions, data):
    extents, model = Extents(num_pages * PAGE), {}
    for action, value in actions:
        if action == "take":
            fitting = [size for _, size in free_extents(extents) if size >= value * PAGE]
            offset = extents.allocate(value * PAGE)
            assert (offset is None) == (not fitting)
            if offset is not None:
                model[offset] = value * PAGE
        elif action == "free" and model:
            offset = sorted(model)[value % len(model)]
            assert extents.free(offset) == model.pop(offset)
        elif action == "join":
            fixed = {offset for offset in model if data.draw(st.booleans())}
            check_plan(extents, model, value * PAGE, fixed)
        elif action == "size":
            end = max((offset + size for offset, size in model.items()), default=0)
            if value * PAGE >= end:
                extents.resize(value * PAGE)
            else:
                with pytest.raises(ValueError, match="beyond"):
                    extents.resize(value * PAGE)
        check(extents, model)


def check_plan(extents, model, num_bytes, fixed):
    moves = extents.plan(num_bytes, fixed)
    if not fixed:
        assert (moves is None) == (extents.free_bytes < num_bytes)
    if moves is None:
        return
    assert not fixed & {move.source for move in moves}
    memory = bytearray(extents.num_bytes // PAGE)  # a page of a block carries the block's number
    names = {}
    for name, (offset, size) in enumerate(sorted(model.items()), start=1):
        names[name] = size
        memory[offset // PAGE : (offset + size) // PAGE] = bytes([name]) * (size // PAGE)
    for move in moves:
        source, target, size = move.source // PAGE, move.target // PAGE, move.num_bytes // PAGE
        memory[target : target + size] = memory[source : source + size]
        model[move.target] = model.pop(move.source)
    extents.apply(moves)
    assert any(size >= num_bytes for _, size in free_extents(extents))
    held = [set(memory[o // PAGE : (o + s) // PAGE]) for o, s in sorted(model.items())]
    assert [names[name] for (name,) in held] == [s for _, s in sorted(model.items())]


def brute_force_cost(blocks, num_bytes, end, fixed):
    """Least bytes to move: try every run of consecutive blocks."""
    edges = [0] + [offset + size for offset, size in blocks]
    starts = [offset for offset, _ in blocks] + [end]
    best = None
    for i in range(len(blocks) + 1):
        for j in range(i, len(blocks) + 1):
            moved = blocks[i:j]
            gap = starts[j] - edges[i] - sum(size for _, size in moved)
            if gap >= num_bytes and not any(offset in fixed for offset, _ in moved):
                cost = sum(size for _, size in moved)
                best = cost if best is None else min(best, cost)
    return best


@settings(max_examples=100, deadline=None)
@given(
    taken=st.lists(sizes, min_size=1, max_size=9),
    freed=st.sets(st.integers(0, 8)),
    fixed=st.sets(st.integers(0, 8)),
    wanted=sizes,
)
def test_the_plan_moves_the_fewest_bytes(taken, freed, fixed, wanted):
    extents = Extents((sum(taken) + 3) * PAGE)
    offsets = [extents.allocate(size * PAGE) for size in taken]
    for number in freed:
        if number < len(offsets):
            extents.free(offsets[number])
    still = {offsets[number] for number in fixed if number < len(offsets)}
    moves = extents.plan(wanted * PAGE, still)
    best = brute_force_cost(extents.blocks(), wanted * PAGE, extents.num_bytes, still)
    assert (None if moves is None else sum(move.num_bytes for move in moves)) == best


def test_best_fit_takes_the_smallest_extent_that_holds():
    extents = Extents(20 * PAGE)
    a, _, c, _ = (extents.allocate(size * PAGE) for size in (4, 1, 2, 1))
    extents.free(a)
    extents.free(c)
    assert extents.allocate(2 * PAGE) == c
    assert extents.allocate(3 * PAGE) == a
    assert extents.allocate(13 * PAGE) is None
    assert extents.allocate(12 * PAGE, below=19 * PAGE) is None
    assert extents.allocate(12 * PAGE, below=20 * PAGE) == 8 * PAGE


def test_a_free_extent_that_holds_needs_no_move():
    extents = Extents(4 * PAGE)
    extents.allocate(PAGE)
    assert extents.plan(3 * PAGE) == []
    assert extents.plan(4 * PAGE) is None


def test_wrong_calls_are_refused():
    extents = Extents(4 * PAGE)
    with pytest.raises(ValueError, match="multiple"):
        extents.allocate(100)
    with pytest.raises(ValueError, match="at least one"):
        extents.allocate(0)
    with pytest.raises(KeyError):
        extents.free(0)
    block = extents.allocate(PAGE)
    with pytest.raises(ValueError, match="does not describe"):
        extents.apply([Move(block, 0, 2 * PAGE)])
