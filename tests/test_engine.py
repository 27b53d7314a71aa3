"""The engine on a tiny random store: one number, lossless streaming, refusals, reports."""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
from stores_small import make_store

import edgemoe.engine
from edgemoe.config import EngineConfig
from edgemoe.engine import Engine
from edgemoe.preflight import preflight
from edgemoe.runtime import core
from edgemoe.runtime.errors import (
    BudgetError,
    FormatError,
    NotFoundError,
    RecordError,
    UnsupportedModelError,
    UsageError,
)
from edgemoe.runtime.footprint import TORCH_RUNTIME_BYTES
from edgemoe.runtime.index import load_index
from edgemoe.sampling import SamplingParams
from edgemoe.session import Session

ROOT = Path(__file__).resolve().parent.parent
needs_core = pytest.mark.skipif(core.lib is None, reason="native core not built")
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("engine"))


@pytest.fixture
def copy(path, tmp_path):
    target = tmp_path / "copy.edgemoe"
    shutil.copytree(path, target)
    return target


PROMPT = "the router picks a few experts for every token and the trunk stays in memory\n"


def greedy_hash(path, num_tokens=256, prompt=PROMPT, **options) -> tuple[str, list[int]]:
    """sha256 of all logits of a greedy answer, and its tokens."""
    digest = hashlib.sha256()
    with Engine.from_pretrained(path, **options) as engine, Session(engine) as session:
        ids = session.encode(prompt)
        num_prompt = len(ids)
        for _ in range(num_tokens):
            logits = session.logits(ids)
            digest.update(logits.tobytes())
            ids.append(int(logits.argmax()))
        assert engine.cache.resident_bytes <= engine.cache.capacity_bytes
    return digest.hexdigest(), ids[num_prompt:]


@needs_core
def test_logits_are_bit_identical_across_budgets_policies_and_threads(path):
    """{floor, twice the floor, all resident} x policies x threads, 256 greedy tokens."""
    index = load_index(path)
    floor = 2 * index.max_record_bytes
    everything = index.expert_bytes
    expected, tokens = greedy_hash(path, cache_bytes=everything, threads=1)
    assert len(set(tokens)) > 20  # an answer that wanders, so that routing changes
    cases = [*itertools.product((floor, 2 * floor), ("lru", "fifo", "lfu", "cycle", "forecast"))]
    cases += [(everything, "forecast")]  # nothing is evicted, so that one policy is all of them
    for (cache_bytes, policy), threads in zip(cases, itertools.cycle((2, 1, 3)), strict=False):
        got, _ = greedy_hash(path, cache_bytes=cache_bytes, policy=policy, threads=threads)
        assert got == expected, (cache_bytes, policy, threads)


def test_the_reference_streams_losslessly(path):
    index = load_index(path)
    options = {"backend": "reference", "num_tokens": 6, "prompt": "the router"}
    expected, _ = greedy_hash(path, cache_bytes=index.expert_bytes, **options)
    got, _ = greedy_hash(path, cache_bytes=2 * index.max_record_bytes, policy="lru", **options)
    assert got == expected


def test_a_budget_below_the_floor_is_refused_and_the_named_one_works(path):
    with pytest.raises(BudgetError) as refused:
        Engine.from_pretrained(path, memory="1MiB")
    assert refused.value.exit_code == 3
    named = refused.value.next_step.split("--memory ")[1].split(" ")[0]
    with Engine.from_pretrained(path, memory=named) as engine:
        completion = engine.generate(CHAT, SamplingParams(max_tokens=4))
        assert len(completion.token_ids) == 4
    floor = refused.value.floor_bytes
    with pytest.raises(BudgetError):
        Engine.from_pretrained(path, memory=floor - 1)


def run_python(code: str, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("EDGEMOE_")}
    environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_refusal_comes_before_the_weights(path):
    """What turns the trunk into weights is not even imported."""
    code = """
import sys
from edgemoe import EdgeMoeError, Engine
try:
    Engine.from_pretrained(sys.argv[1], memory="100MiB")
except EdgeMoeError as error:
    print(type(error).__name__, "edgemoe.models.causal_lm" in sys.modules)
"""
    assert run_python(code, str(path)).split() == ["BelowFloorError", "False"]


@needs_core
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_stays_under_the_floor_it_was_given(path):
    code = """
import sys
from edgemoe import EdgeMoeError, Engine, SamplingParams
try:
    Engine.from_pretrained(sys.argv[1], memory="1MiB")
except EdgeMoeError as error:
    floor = error.floor_bytes
with Engine.from_pretrained(sys.argv[1], memory=floor) as engine:
    messages = [{"role": "user", "content": "the router " * 100}]
    stats = engine.generate(messages, SamplingParams(max_tokens=40)).stats
    print(stats.peak_memory_bytes, stats.budget_bytes, stats.memory_bytes, engine.notes)
"""
    peak, budget, now, notes = run_python(code, str(path)).split(maxsplit=3)
    assert int(now) <= int(peak) <= int(budget)
    assert notes.strip() == "[]"


@needs_core
def test_an_answer_needs_no_torch():
    code = """
import sys
from edgemoe import Engine, SamplingParams
with Engine.from_pretrained(context=256) as engine:
    options = {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1}
    params = SamplingParams(max_tokens=8, seed=1, logprobs=2, **options)
    answer = engine.generate([{"role": "user", "content": "Hello"}], params)
    print(len(answer.token_ids) > 1, sorted({"torch", "transformers", "scipy"} & set(sys.modules)))
"""
    assert run_python(code).split(maxsplit=1) == ["True", "[]\n"]


def test_import_loads_neither_torch_nor_numpy():
    code = """
import sys
import edgemoe
print(sorted({"torch", "numpy", "tokenizers", "jinja2", "psutil"} & set(sys.modules)))
from edgemoe import EdgeMoeError, SamplingParams
SamplingParams(temperature=0.5)
print(sorted({"torch", "numpy", "transformers"} & set(sys.modules)))
from edgemoe import Engine, Session
print(sorted({"torch", "transformers", "bitsandbytes"} & set(sys.modules)))
"""
    assert run_python(code).split() == ["[]", "[]", "[]"]


def test_more_resident_memory_than_planned_shrinks_the_expert_cache(path):
    """This test process holds more than the usual allowance; ballast makes sure of it."""
    ballast = bytearray(TORCH_RUNTIME_BYTES)
    checked = preflight(path, EngineConfig.make({}))
    runtime = checked.plan.lines[0]
    assert runtime.name == "runtime" and runtime.num_bytes > len(ballast)
    with pytest.raises(BudgetError, match="floor"):
        Engine.from_pretrained(path, memory=runtime.num_bytes)


def test_report(path):
    with Engine.from_pretrained(path, policy="lru", threads=1, io="buffered") as engine:
        report = engine.report()
        json.dumps(report)
        assert report["backend"] == core.BACKEND
        assert (report["policy"], report["threads"], report["context"]) == ("lru", 1, 512)
        assert report["direct"] is False and "buffered" in report["io"]
        assert report["resident"] and report["expert_cache_bytes"] == report["expert_bytes"]
        assert report["chat_template"] == "chat_template.jinja"
        assert report["floor_bytes"] <= report["budget_bytes"]
        assert not [n for n in report["notes"] if "reads" in n]  # buffered was asked for
    with Engine.from_pretrained(path, backend="reference") as engine:
        assert any("reference" in note for note in engine.report()["notes"])


@needs_core
def test_closing_gives_the_weights_back(path):
    engine = Engine.from_pretrained(path)
    engine.generate(CHAT, SamplingParams(max_tokens=2))
    layers = weakref.ref(engine._model._layers)
    engine.close()
    assert layers() is None  # at once, though nobody collected cycles


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc on this system")
def test_opening_that_fails_late_gives_everything_back(path, monkeypatch):
    def fail(*_):
        raise MemoryError

    def open_files():
        return [
            link for fd in Path("/proc/self/fd").iterdir() if "edgemoe" in (link := _target(fd))
        ]

    monkeypatch.setattr("edgemoe.loaded_model.GovernedCache", fail)
    before, threads = open_files(), threading.active_count()
    with pytest.raises(MemoryError) as failed:
        Engine.from_pretrained(path, memory="auto")
    assert failed.traceback  # by which all that was made is still known
    assert (open_files(), threading.active_count()) == (before, threads)


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except FileNotFoundError:  # closed meanwhile
        return ""


@needs_core
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_a_call_leaves_its_thread_where_it_may_run(path):
    before = os.sched_getaffinity(0)
    with Engine.from_pretrained(path, threads=2) as engine:
        engine.generate(CHAT, SamplingParams(max_tokens=3))
        assert os.sched_getaffinity(0) == before


def test_closing(path):
    engine = Engine.from_pretrained(path)
    session = Session(engine)
    stream = session.stream(CHAT, SamplingParams(max_tokens=5))
    next(stream)
    pid = engine.template_worker.pid
    engine.close()
    engine.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    for use in (
        lambda: engine.generate([1]),
        lambda: Session(engine),
        lambda: session.generate([1]),
        lambda: next(stream),
    ):
        with pytest.raises(UsageError, match="closed"):
            use()
    session.close()


def test_the_bundled_demo_is_missed_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(edgemoe.engine, "DEMO", tmp_path / "demo.edgemoe")
    with pytest.raises(NotFoundError, match="bundled demo"):
        Engine.from_pretrained()


@needs_core
def test_further_sessions_pay_with_expert_cache(path):
    params = SamplingParams(max_tokens=20)
    with Engine.from_pretrained(path, context=64) as free:
        expected = free.generate([1, 2, 3], params).token_ids
        budget = free.plan.resident_budget_bytes
    with Engine.from_pretrained(path, context=64, memory=budget) as engine:
        first = Session(engine)
        whole = engine.cache.capacity_bytes
        assert first.generate([1, 2, 3], params).token_ids == expected
        with Session(engine) as second:
            kv_bytes = 2 * 3 * 2 * 32 * 64 * 2  # keys and values, layers, heads, width, context
            unused = budget - sum(line.num_bytes for line in engine.plan.lines)
            assert engine.cache.capacity_bytes == whole - kv_bytes and unused == 0
            assert second.generate([1, 2, 3], params).token_ids == expected
            assert first.generate([1, 2, 3], params).token_ids == expected
            others = [Session(engine) for _ in range(4)]
            with pytest.raises(BudgetError, match="7 sessions"):
                Session(engine)
            del others  # a session that is forgotten gives its memory back, too
            Session(engine).close()
        assert engine.cache.capacity_bytes == whole
    with Engine.from_pretrained(path, context=64, memory=budget + (8 << 20)) as engine:
        sessions = [Session(engine) for _ in range(8)]
        assert engine.cache.capacity_bytes == whole and len(sessions) == 8


# ---- stores that are wrong -------------------------------------------------------------------


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@needs_core
def test_a_flipped_byte_is_named_by_layer_and_expert(copy):
    index = load_index(copy)
    with open(copy / "experts.safetensors", "r+b") as file:
        for expert in range(8):
            file.seek(index.records[1, expert].offset + 200)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 16]))
    with Engine.from_pretrained(copy) as engine, Session(engine) as session:
        for _ in range(2):
            with pytest.raises(RecordError, match=r"layers\.1\.experts\.\d") as caught:
                session.generate([1, 2, 3])
            assert caught.value.layer == 1
            assert session.tokens == [] and engine.cache.pinned_bytes == 0


def test_other_architectures_and_versions_are_refused(copy):
    edit_json(copy / "config.json", model_type="mamba")
    with pytest.raises(UnsupportedModelError, match="`mamba`"):
        Engine.from_pretrained(copy)
    edit_json(copy / "store.json", format_version=99)
    with pytest.raises(FormatError, match="99"):
        Engine.from_pretrained(copy)
    (copy / "store.json").unlink()
    with pytest.raises(NotFoundError, match=r"store\.json"):
        Engine.from_pretrained(copy)
    with pytest.raises(NotFoundError):
        Engine.from_pretrained(copy / "nowhere")


@pytest.mark.parametrize(
    "change",
    [{"num_experts": 4}, {"intermediate_size": 128}, {"num_hidden_layers": 2}, {"hidden_size": 32}],
)
def test_a_config_of_another_model_is_refused(copy, change):
    edit_json(copy / "config.json", **change)
    with pytest.raises(FormatError, match="disagree"):
        Engine.from_pretrained(copy)


def test_a_truncated_trunk_is_refused(copy):
    file = copy / "trunk.safetensors"
    os.truncate(file, file.stat().st_size - 64)
    with pytest.raises(FormatError, match="trunk"):
        Engine.from_pretrained(copy)


def test_a_context_the_model_was_not_trained_for_is_refused(path):
    with pytest.raises(UsageError, match="512"):
        Engine.from_pretrained(path, context=513)
    with Engine.from_pretrained(path, context=16) as engine:
        assert engine.context == 16
        with pytest.raises(UsageError, match="17 tokens"):
            engine.generate([1] * 17)


def test_an_expert_cache_below_one_layer_is_refused(path):
    with pytest.raises(BudgetError, match="expert cache"):
        Engine.from_pretrained(path, cache_bytes=4096)
