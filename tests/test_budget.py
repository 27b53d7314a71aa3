"""Amounts of memory, memory plans, and what the system says about memory."""

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import HIDDEN, WIDTHS, make_store

from edgemoe.runtime import core
from edgemoe.runtime.amounts import GIB, MIB, format_bytes, format_rate, parse_bytes
from edgemoe.runtime.budget import (
    BelowFloorError,
    ModelDims,
    kv_cache_bytes,
    make_plan,
    moe_workspace_bytes,
    wave_pairs,
)
from edgemoe.runtime.errors import BudgetError, UsageError
from edgemoe.runtime.footprint import usual_runtime_bytes
from edgemoe.runtime.process import MemoryLimit, memory_limit, process_memory

DIMS = ModelDims(
    num_layers=4,
    hidden=HIDDEN,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab=1000,
    top_k=2,
    expert_width=max(WIDTHS),
)
PLENTY = MemoryLimit(1 << 50, "this machine")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("budget") / "tiny.edgemoe")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4GiB", 4 << 30),
        ("4 gib", 4 << 30),
        ("4G", 4 << 30),
        ("1.5g", 3 << 29),
        ("500MB", 500_000_000),
        ("500MiB", 500 << 20),
        ("0.5k", 512),
        (".5kB", 500),
        ("1T", 1 << 40),
        ("4096", 4096),
        ("123b", 123),
        (4096, 4096),
        ("2.GiB", 2 << 30),
        ("0.1MB", 100_000),
    ],
)
def test_amounts_are_read(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "4GiBs", "-1G", "0", "0.1", "nan", "1e9", "inf", "4 G B", "１GiB", "1,5G", 0, -4]
    + [True, None, "9" * 30, "1.2.3G"],
)
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(UsageError, match="is no amount of memory") as error:
        parse_bytes(text)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        ((1 << 20) - 1024, "1023 KiB"),
        (1024, "1.00 KiB"),
        (3 << 29, "1.50 GiB"),
        (100 << 20, "100 MiB"),
        (1000 << 20, "1000 MiB"),
        ((1 << 30) - 1, "1.00 GiB"),
        ((1 << 20) - 1, "1.00 MiB"),
        (99_999 << 10, "97.7 MiB"),
        (1 << 62, "4194304 TiB"),
        (-(2 << 30), "-2.00 GiB"),
    ],
)
def test_amounts_are_written(num_bytes, text):
    assert format_bytes(num_bytes) == text


@settings(deadline=None)
@given(st.integers(1, 1 << 50))
def test_what_is_written_reads_back_to_three_digits(num_bytes):
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.006)


@pytest.mark.parametrize(
    ("rate", "text"),
    [(550e6, "550 MB/s"), (1.2621e9, "1,262 MB/s"), (9.9999e9, "10.0 GB/s"), (26.4e9, "26.4 GB/s")],
)
def test_rates_are_written_as_drives_are_sold(rate, text):
    assert format_rate(rate) == text


def line(plan, name):
    (found,) = [entry for entry in plan.lines if entry.name == name]
    return found.num_bytes


@settings(deadline=None)
@given(extra=st.integers(0, 2 << 20), context=st.integers(1, 9000), runtime=st.integers(0, 1 << 30))
def test_lines_add_up_to_the_budget_and_the_cache_gets_the_rest(index, extra, context, runtime):
    def plan_for(budget):
        return make_plan(index, DIMS, budget, context, runtime_bytes=runtime, limit=PLENTY)

    floor = plan_for(None).floor_bytes
    plan = plan_for(floor + extra)
    assert sum(entry.num_bytes for entry in plan.lines) == plan.budget_bytes == floor + extra
    assert all(entry.num_bytes >= 0 for entry in plan.lines)
    assert plan.floor_bytes == floor == sum(entry.num_bytes for entry in plan.floor_lines)
    assert plan.min_cache_bytes <= plan.cache_bytes <= plan.max_cache_bytes
    assert plan.cache_bytes % 4096 == 0
    assert line(plan, "headroom") >= max(32 * MIB, 0.02 * plan.budget_bytes)
    assert line(plan, "KV cache") == kv_cache_bytes(DIMS, context, 16)
    assert line(plan, "runtime") == runtime
    with pytest.raises(BelowFloorError):
        plan_for(floor - 1)


def test_without_a_budget_every_expert_is_resident(index):
    plan = make_plan(index, DIMS, limit=PLENTY)
    assert plan.cache_bytes == plan.max_cache_bytes == index.expert_bytes
    assert plan.is_resident and plan.num_cached_experts == 32
    assert plan.budget_bytes == plan.resident_budget_bytes
    less = make_plan(index, DIMS, plan.budget_bytes - 4096, limit=PLENTY)
    assert not less.is_resident and less.cache_bytes < plan.cache_bytes
    more = make_plan(index, DIMS, plan.budget_bytes + GIB, limit=PLENTY)
    assert more.is_resident and line(more, "unused") > 0.9 * GIB


def test_the_floor_holds_the_largest_records_of_one_layer(index):
    plan = make_plan(index, DIMS, limit=PLENTY)
    assert plan.min_cache_bytes == 2 * index.max_record_bytes
    wider = make_plan(index, replace(DIMS, top_k=3), limit=PLENTY)
    assert wider.min_cache_bytes == 3 * index.max_record_bytes
    assert wider.floor_bytes > plan.floor_bytes


def test_what_costs_more_raises_the_floor(index):
    def floor(**options):
        dims = replace(DIMS, **{k: options.pop(k) for k in list(options) if hasattr(DIMS, k)})
        return make_plan(index, dims, limit=PLENTY, **options).floor_bytes

    plain = floor()
    for more in (
        {"context": 9000},
        {"kv_bits": 32},
        {"chunk": 1024},
        {"runtime_bytes": usual_runtime_bytes(index) + MIB},
        {"template_bytes": 64 * MIB},
        {"vocab": 100_000},
        {"dense_width": 4096},
        {"num_layers": 8},
    ):
        assert floor(**more) > plain, more


def test_a_large_trunk_tensor_needs_room_while_it_is_read(tmp_path):
    """Its 16-bit copy is repacked: for a moment it is there twice."""
    index = make_store(tmp_path / "wide.edgemoe")
    small = make_plan(index, DIMS, limit=PLENTY)
    from edgemoe.runtime.headers import encode_header
    from edgemoe.runtime.index import TRUNK_FILE

    shape = (1 << 20, HIDDEN)
    header = encode_header([("embed", "F16", shape, 2 * shape[0] * shape[1])], {})
    with open(index.path / TRUNK_FILE, "wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * shape[0] * shape[1])
    large = make_plan(index, DIMS, limit=PLENTY)
    tensor = 2 * shape[0] * shape[1]
    assert line(large, "trunk") == tensor
    assert large.floor_bytes - small.floor_bytes > 1.5 * tensor
    assert "loading" in {entry.name for entry in large.floor_lines}
    plan = make_plan(index, DIMS, large.floor_bytes, limit=PLENTY)
    assert sum(entry.num_bytes for entry in plan.lines) == large.floor_bytes
    assert plan.cache_bytes == plan.max_cache_bytes  # loading is over when the cache fills


def test_below_the_floor_the_error_tells_the_least_budget_line_by_line(index):
    with pytest.raises(BudgetError) as caught:
        make_plan(index, DIMS, 100 * MIB, limit=PLENTY)
    error = caught.value
    assert error.exit_code == 3
    assert "--memory 100 MiB is below the floor" in error.what
    for name in ("runtime", "trunk", "KV cache", "activations", "headroom", "expert cache"):
        assert name in error.why
        assert any(row.startswith(name) for row in error.table)
    least = parse_bytes(re.search(r"--memory (\S+)", error.next_step)[1])
    assert error.floor_bytes <= least < error.floor_bytes + MIB
    assert make_plan(index, DIMS, least, limit=PLENTY).budget_bytes == least


def test_the_table_is_aligned_text(index):
    plan = make_plan(index, DIMS, limit=PLENTY)
    rows = plan.table()
    body = rows[: len(plan.lines) + 1]
    ends = {re.match(r".*?\d (B|[KMG]iB)", row).end() for row in body}
    assert len(ends) == 1
    assert body[-1].startswith("budget")
    assert any(format_bytes(plan.floor_bytes) in row for row in rows if row.startswith("floor"))
    assert "32 of 32 experts, 100 %" in "\n".join(rows)
    assert not [row for row in rows if row.startswith("note")]


def test_a_budget_above_what_the_system_allows_is_said_aloud(index):
    limit = MemoryLimit(512 * MIB, "this container or control group")
    rows = make_plan(index, DIMS, 2 * GIB, limit=limit).table()
    (note,) = [row for row in rows if row.startswith("note: ")]
    assert "2.00 GiB" in note and "512 MiB" in note and "container" in note
    (note,) = make_plan(index, DIMS, limit=MemoryLimit(MIB, "this machine")).notes
    assert "every expert" in note and "this machine" in note


def test_a_limit_rounded_down_to_a_page_is_not_exceeded(index):
    limit = MemoryLimit(GIB, "this container or control group")
    assert not make_plan(index, DIMS, GIB + 4096, limit=limit).notes
    assert make_plan(index, DIMS, GIB + 4097, limit=limit).notes


@pytest.mark.skipif(core.lib is None, reason="native core not built")
def test_the_workspace_is_what_the_core_says():
    pairs = wave_pairs(512, 8)
    floats = core.lib.em_moe_workspace_floats(512, pairs, 2048, 768)
    assert moe_workspace_bytes(512, pairs, 2048, 768) == 4 * floats > 0


# ---- the system ---------------------------------------------------------------------------


def test_process_memory_agrees_with_psutil():
    held = np.ones(64 << 20, dtype=np.uint8)
    memory = process_memory()
    rss = psutil.Process().memory_info().rss
    assert memory.rss_bytes == pytest.approx(rss, rel=0.1)
    assert memory.peak_rss_bytes >= memory.rss_bytes >= held.nbytes
    if sys.platform == "linux":
        assert memory.anonymous_bytes >= held.nbytes
        assert memory.anonymous_bytes + memory.file_bytes <= memory.rss_bytes
    held_bytes = held.nbytes
    del held
    later = process_memory()
    # Linux adds up its counters late, so that the peak may be a little behind.
    assert later.peak_rss_bytes >= 0.95 * memory.rss_bytes
    assert later.rss_bytes <= memory.rss_bytes - held_bytes // 2


def test_process_memory_without_proc(tmp_path):
    memory = process_memory(tmp_path / "absent")
    assert memory.rss_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)
    resource = pytest.importorskip("resource")
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    assert memory.peak_rss_bytes == pytest.approx(peak, rel=0.1)
    assert memory.anonymous_bytes is None


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "sys/fs/cgroup/"
V1 = "sys/fs/cgroup/memory/"


@pytest.mark.parametrize(
    ("files", "num_bytes"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", V2 + "memory.max": "max\n"}, None),
        ({"proc/self/cgroup": "0::/\n", V2 + "memory.max": "1048576\n"}, 1 << 20),
        # the tightest of the groups above us counts
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                V2 + "a/b/memory.max": "max\n",
                V2 + "a/memory.max": "3000000\n",
                V2 + "memory.max": "5000000\n",
            },
            3_000_000,
        ),
        # the host's path, as a container without its own namespace sees it
        ({"proc/self/cgroup": "0::/docker/123\n", V2 + "memory.max": "2000000\n"}, 2_000_000),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/user\n",
                V1 + "user/memory.limit_in_bytes": "4000000\n",
                V1 + "memory.limit_in_bytes": "9223372036854771712\n",
            },
            4_000_000,
        ),
        ({"proc/self/cgroup": "4:memory:/\n", V1 + "memory.limit_in_bytes": "oops\n"}, None),
        ({"proc/self/cgroup": "no colons\n\n"}, None),
    ],
)
def test_the_limit_of_the_control_group_is_found(tmp_path, files, num_bytes):
    limit = memory_limit(write_tree(tmp_path, files), physical_bytes=1 << 30)
    if num_bytes is None:
        assert limit == MemoryLimit(1 << 30, "this machine")
    else:
        assert limit.num_bytes == num_bytes and "container" in limit.source


@pytest.mark.skipif(not os.path.exists("/proc/self/cgroup"), reason="needs Linux")
def test_the_limit_here_is_plausible():
    assert 1 << 27 < memory_limit().num_bytes <= psutil.virtual_memory().total
