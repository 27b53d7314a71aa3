"""Calibration on a real engine: sums as of a plain loop, that add up, and that survive a kill."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from stores_small import make_store

from edgemoe import Engine
from edgemoe.cli import main
from edgemoe.quant.calibrate import Collector, Text, calibrate, sums_bytes
from edgemoe.quant.passes import Passes, groups
from edgemoe.quant.progress import Silent
from edgemoe.quant.quantize import dequantize, quantize
from edgemoe.quant.scores import score_profile, usage
from edgemoe.quant.store_source import StoreSource
from edgemoe.runtime import core
from edgemoe.runtime.errors import UsageError
from edgemoe.runtime.format import QuantSpec
from edgemoe.runtime.profile import Profile, profile_path
from edgemoe.runtime.profile_sums import ERROR_BITS, STATES, TENSORS
from edgemoe.runtime.reference import softmax

BACKENDS = ["reference"] + (["native"] if core.lib else [])
COUNTS = ("hard_count", "next_count", "token_count", "error_count")
REALS = ("soft_count", "weight_sum", "reap_sum", "logit_gram", "input_square_sum")
REALS += ("hidden_square_sum", "output_square_sum", "error_square_sum")


def text(name: str, num_tokens: int, seed: int) -> Text:
    """Token ids of which each depends on the one before, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    ids = [int(rng.integers(400))]
    for jump in rng.integers(0, 6, num_tokens - 1).tolist():
        ids.append((ids[-1] * 7 + jump) % 400)
    return Text(name, name, ids)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("calibrate"))


@pytest.fixture
def engine(store):
    with Engine.from_pretrained(store) as engine:
        yield engine


def assert_same(a: Profile, b: Profile, rtol: float = 0.0) -> None:
    assert a.num_tokens == b.num_tokens and list(a.layers) == list(b.layers)
    for layer, sums in a.layers.items():
        other = b.layers[layer]
        for name in COUNTS:
            np.testing.assert_array_equal(getattr(sums, name), getattr(other, name))
        for name in REALS:
            # Errors come from fp32 products, whose rounding depends on how many rows there are.
            close = 1e-5 if rtol and name.endswith("_square_sum") else rtol
            np.testing.assert_allclose(getattr(sums, name), getattr(other, name), rtol=close)
        for name in STATES:
            for part in ("key", "expert", "count"):
                ours, theirs = getattr(sums, name), getattr(other, name)
                np.testing.assert_array_equal(getattr(ours, part), getattr(theirs, part))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_are_those_of_the_whole_text_at_once(store, backend):
    """All windows in one array, float64; the collector has them in chunks, pairs and layers."""
    windows = [text("a", 130, 1).ids, text("b", 70, 2).ids]
    with Engine.from_pretrained(store, backend=backend) as engine:
        collector = Collector(engine)
        collector.add(windows, lambda _: None)
        seen = {}
        with engine.steps() as layers:
            plain = type(engine._executor).__bases__[0].run  # without the observer
            for layer in engine.args.moe_layers:
                seen[layer] = []

            def run(layer, x, ids, weights):
                seen[layer].append((x.copy(), ids.astype(np.int64), weights.copy()))
                return plain(engine._executor, layer, x, ids, weights)

            engine._executor.run = run
            for window in windows:
                kv_cache = Passes(engine)._kv_cache
                layers.run(np.array(window), kv_cache, None)
            routers = {layer: layers.weights[layer].router for layer in seen}
        profile = collector.profile
        assert profile.num_tokens == 200
        for layer, parts in seen.items():
            sums = profile.layers[layer]
            x, ids, weights = (np.concatenate(part) for part in zip(*parts, strict=True))
            chosen = np.eye(8)[ids]  # [T, K, E]
            assert sums.hard_count.tolist() == chosen.sum((0, 1)).tolist()
            assert sums.hard_count.sum() == 200 * engine.args.top_k
            logits = routers[layer].linear(x).astype(np.float64)
            expected = {
                "soft_count": softmax(logits).sum(0),
                "logit_gram": logits.T @ logits,
                "weight_sum": (chosen * weights[..., None]).sum((0, 1)),
                "input_square_sum": chosen.sum(1).T @ np.square(x.astype(np.float64)),
            }
            for name, value in expected.items():
                atol = 1e-7 * np.abs(value).max()
                np.testing.assert_allclose(getattr(sums, name), value, rtol=2e-6, atol=atol)
            assert (sums.reap_sum[sums.hard_count > 0] > 0).all()
            assert (sums.hidden_square_sum[sums.hard_count > 0].sum(-1) > 0).all()


def test_two_runs_merge_to_the_joint_run(engine, tmp_path):
    first, second = text("a", 1_500, 1), text("b", 700, 2)
    alone = [
        calibrate(engine, [part], tmp_path / f"{part.name}.safetensors") for part in (first, second)
    ]
    joint = calibrate(engine, [first, second], tmp_path / "joint.safetensors")
    assert_same(alone[0].merge(alone[1]), joint, rtol=1e-9)
    assert joint.num_tokens == 2_200
    # In the file second moments are fp32.
    added = calibrate(
        engine,
        [second],
        tmp_path / "sum.safetensors",
        base=Profile.load(tmp_path / "a.safetensors"),
    )
    assert_same(added, joint, rtol=1e-6)
    assert_same(Profile.load(tmp_path / "sum.safetensors"), joint, rtol=1e-6)
    assert [each["name"] for each in added.texts] == ["a", "b"]


def test_errors_are_those_of_rounded_experts(engine, tmp_path):
    """Of the tokens at 0, 4, 8, ... of the first window; by a plain loop over tokens."""
    part = text("a", 1_100, 1)
    profile = calibrate(engine, [part], tmp_path / "p.safetensors")
    seen = {}

    def note(o):
        pairs = zip(np.repeat(o.experts, np.diff(o.begins)), o.tokens, o.weights, strict=True)
        seen[o.layer] = [(int(e), float(w), o.x[int(t)].copy()) for e, t, w in pairs if t % 4 == 0]

    engine.observe(note)
    Passes(engine).routes([part.ids[:512]])
    with StoreSource(engine.path) as source:
        for layer, rows in seen.items():
            sums = profile.layers[layer]
            expected = np.zeros((sums.num_experts, 1 + len(ERROR_BITS)))
            for expert, weight, x in rows:
                gate, up, down = (each.double() for each in source.expert(layer, expert))
                made = [(gate, up, down)]
                for bits in ERROR_BITS:
                    spec = QuantSpec(bits, 64 if engine.args.hidden % 64 == 0 else 32, "sym")
                    made.append(
                        [dequantize(quantize(e.float(), spec), spec).double() for e in made[0]]
                    )
                x = torch.from_numpy(x).double()
                y = [d @ (torch.nn.functional.silu(g @ x) * (u @ x)) * weight for g, u, d in made]
                squares = [
                    float(each.square().sum()) for each in (y[0], *(y[0] - z for z in y[1:]))
                ]
                expected[expert] += squares
            assert sums.error_count.sum() == 128 * engine.args.top_k
            np.testing.assert_allclose(sums.output_square_sum, expected[:, 0], rtol=1e-4)
            np.testing.assert_allclose(sums.error_square_sum, expected[:, 1:], rtol=1e-4)
            errors = sums.error_square_sum.sum(0) / sums.output_square_sum.sum()
            assert 1 > errors[0] > 2 * errors[1] > 4 * errors[2] > 0


def test_observing_changes_no_logit(engine):
    ids = text("a", 300, 1).ids
    before = engine.session().logits(ids)
    Collector(engine).add([ids], lambda _: None)
    assert np.array_equal(engine.session().logits(ids), before)


def test_the_budget_changes_no_sum(store, engine, tmp_path):
    part = text("a", 900, 3)
    least = engine.plan.min_cache_bytes
    large = calibrate(engine, [part], tmp_path / "large.safetensors")
    with Engine.from_pretrained(store, cache_bytes=least) as small:
        assert_same(calibrate(small, [part], tmp_path / "small.safetensors"), large)


class Stopping(Silent):
    """Interrupts the calibration after so many tokens."""

    def __init__(self, num_tokens: int) -> None:
        self.left, self.notes = num_tokens, []

    def advance(self, num: int) -> None:
        self.left -= num
        if self.left < 0:
            raise KeyboardInterrupt

    def note(self, line: str) -> None:
        self.notes.append(line)


def test_an_interrupted_run_goes_on_to_the_same_sums(engine, tmp_path):
    parts, out = [text("a", 9_000, 1), text("b", 6_000, 2)], tmp_path / "p.safetensors"
    whole = calibrate(engine, parts, tmp_path / "whole.safetensors")
    stopping = Stopping(10_000)
    with pytest.raises(KeyboardInterrupt):
        calibrate(engine, parts, out, progress=stopping, save_every_s=0)
    assert not out.exists() and Path(f"{out}.part").exists()
    assert any("goes on" in line for line in stopping.notes)
    again = Stopping(10**9)
    resumed = calibrate(engine, parts, out, progress=again, save_every_s=0)
    assert any("going on" in line for line in again.notes)
    assert again.left > 10**9 - 15_000 + 4_000  # not everything ran again
    assert_same(resumed, whole)
    assert [each.name for each in sorted(tmp_path.iterdir())] == [
        "p.safetensors",
        "whole.safetensors",
    ]


def test_state_of_another_run_is_not_taken_over(engine, tmp_path):
    out = tmp_path / "p.safetensors"
    with pytest.raises(KeyboardInterrupt):
        calibrate(engine, [text("a", 9_000, 1)], out, progress=Stopping(5_000), save_every_s=0)
    other = Stopping(10**9)
    profile = calibrate(engine, [text("b", 500, 2)], out, progress=other)
    assert profile.num_tokens == 500 and any("starting over" in line for line in other.notes)
    Path(f"{out}.part").write_bytes(b"not a profile")
    damaged = Stopping(10**9)
    assert calibrate(engine, [text("b", 500, 2)], out, progress=damaged).num_tokens == 500
    assert any("starting over" in line for line in damaged.notes)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_run_goes_on_to_the_same_sums(store, engine, tmp_path):
    ids, out = text("a", 30_000, 1), tmp_path / "p.safetensors"
    np.save(tmp_path / "a.npy", np.array(ids.ids))
    code = (
        "import sys; from edgemoe import Engine; from edgemoe.quant.calibrate import *\n"
        "store, ids, out = sys.argv[1:]\n"
        "engine = Engine.from_pretrained(store)\n"
        "calibrate(engine, [Text('a', 'a', np.load(ids).tolist())], out, save_every_s=0)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, store, tmp_path / "a.npy", out])
    part = Path(f"{out}.part")
    try:
        deadline = time.monotonic() + 60
        while not part.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        child.kill()
        child.wait()
    assert part.exists() and not out.exists()
    progress = Stopping(10**9)
    resumed = calibrate(engine, [ids], out, progress=progress)
    assert any("going on" in line for line in progress.notes)
    assert_same(resumed, calibrate(engine, [ids], tmp_path / "whole.safetensors"))


def test_groups_hold_whole_windows():
    made = groups([[0] * n for n in (512, 512, 100, 512)], 1024)
    assert [[len(ids) for ids in group] for group in made] == [[512, 512], [100, 512]]


# ---- scores ------------------------------------------------------------------------------------


def test_tables_beat_the_marginal_and_their_shuffled_control(engine, tmp_path):
    profile = calibrate(engine, [text("a", 12_000, 1)], tmp_path / "p.safetensors")
    held = [text("b", 512, 9).ids, text("c", 300, 8).ids]
    rows = score_profile(profile, Passes(engine).routes(held), held)
    assert [(row.layer, row.n) for row in rows] == [(n, k) for n in range(3) for k in (2, 4)]
    for row in rows[::2]:  # of 2 of 8; 4 of 8 are easy to guess
        recall = row.recall
        assert recall["all"] > recall["popularity"] + 0.05
        assert recall["all"] > recall["shuffled"] + 0.05
        assert recall["token"] > recall["popularity"] + 0.05
        assert 0 <= row.known <= 1


def test_usage_of_a_skewed_layer():
    profile = Profile.empty({0: 8}, top_k=1)
    routes = np.array([0] * 12 + [1] * 2 + [2, 3], dtype=np.int16)[:, None, None]
    profile.add_routes(routes)
    (row,) = usage(profile)
    assert (row.unused, row.most, row.top_25, row.top_50) == (4, 0.75, 14 / 16, 1.0)
    assert 1 < row.effective < 4


# ---- the command -------------------------------------------------------------------------------


@pytest.fixture
def texts(tmp_path):
    for name, seed, count in (("a", 1, 2_000), ("b", 2, 1_000), ("held", 3, 600)):
        np.save(tmp_path / f"{name}.npy", np.array(text(name, count, seed).ids))
    return tmp_path


def test_the_command_writes_adds_and_scores(store, texts, capsys):
    target = profile_path(store, "task")
    base = ["calibrate", str(store), "--name", "task", "--json"]
    assert main([*base, "--text", str(texts / "a.npy")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["num_tokens"] == 2_000 and Path(document["profile"]) == target
    assert len(document["layers"]) == 3 and "recall" not in document
    assert main([*base, "--text", str(texts / "b.npy")]) == 2  # there is one
    assert "--add" in capsys.readouterr().err
    assert main([*base, "--add", "--text", str(texts / "b.npy")]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 3_000
    assert Profile.load(target).num_tokens == 3_000
    assert main([*base, "--holdout", str(texts / "held.npy")]) == 0  # scores what is there
    document = json.loads(capsys.readouterr().out)
    assert document["num_tokens"] == 3_000 and len(document["recall"]) == 6
    assert main([*base[:-1], "--replace", "--tokens", "500", "--text", str(texts / "a.npy")]) == 0
    out = capsys.readouterr().out
    assert "500 tokens of a.npy" in out and "top 25 %" in out


def test_texts_are_read_before_anything_is_counted(store, texts, capsys):
    (texts / "empty.txt").touch()
    out = texts / "p.safetensors"
    command = ["calibrate", str(store), "--text", str(texts / "a.npy"), "--out", str(out)]
    assert main([*command, "--holdout", str(texts / "empty.txt")]) == 2
    assert f"there is no text in `{texts / 'empty.txt'}`" in capsys.readouterr().err
    assert not out.exists()


def test_the_command_takes_a_checkpoint(store, texts, capsys):
    source = store.parent / "source"
    out = texts / "p.safetensors"
    assert main(["calibrate", str(source), "--text", str(texts / "a.npy"), "--out", str(out)]) == 0
    capsys.readouterr()
    profile = Profile.load(out)
    with Engine.from_pretrained(store) as engine:
        profile.check_model(engine._index.layer_to_num_experts, engine.args.top_k)
    assert profile.num_tokens == 2_000
    assert [p.name for p in store.parent.iterdir() if "calibrate" in p.name] == []


def test_the_budget_covers_the_sums(store, texts, capsys):
    with Engine.from_pretrained(store) as engine:
        assert sums_bytes(engine.args) > sum(
            np.prod([8 if c in "Ee" else 64 for c in letters]) * 8 * 3
            for _, letters in TENSORS.values()
        )
    command = ["calibrate", str(store), "--text", str(texts / "a.npy"), "--name", "x"]
    assert main([*command, "--memory", "1MiB"]) == 3
    assert "calibration itself takes" in capsys.readouterr().err


def test_a_text_without_tokens_is_refused(engine, tmp_path):
    from edgemoe.quant.calibrate import read_texts

    np.save(tmp_path / "empty.npy", np.array([1]))
    with pytest.raises(UsageError, match="no text"):
        read_texts([tmp_path / "empty.npy"], engine.tokenizer)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_text_of_another_vocabulary_is_refused(store, tmp_path, backend):
    with Engine.from_pretrained(store, backend=backend) as engine:
        wrong = engine.args.vocab
        with pytest.raises(UsageError, match=f"token id {wrong} is not in the vocabulary"):
            calibrate(engine, [Text("wrong", "wrong", [0, wrong, 1])], tmp_path / "p.safetensors")
