"""Plans that are found: EdgeMoE's algorithm to the letter, the fast planner, the command."""

import itertools
import json
import math
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoint import make_checkpoint

from edgemoe import Engine
from edgemoe.cli import main
from edgemoe.cli.convert_auto import read_calibration
from edgemoe.engine import DEMO
from edgemoe.quant import auto
from edgemoe.quant.bitplan import BitPlan
from edgemoe.quant.calibrated import Calibration
from edgemoe.quant.convert import convert
from edgemoe.quant.evaluate import evaluate
from edgemoe.quant.options import ConvertOptions, ExpertSpec
from edgemoe.quant.planner_edgemoe import edgemoe_plan
from edgemoe.quant.planner_fast import Costs, hull, upgrades, within_bytes, within_loss
from edgemoe.quant.remembered import Remembered
from edgemoe.quant.store_source import StoreSource
from edgemoe.quant.variants import VariantModel
from edgemoe.quant.windows import Window
from edgemoe.runtime.errors import UsageError
from edgemoe.runtime.index import load_index

# Whole numbers of 2^-20, so that sums and differences are exact.
SENSITIVITIES = st.lists(st.integers(1, 9999), min_size=2, max_size=40, unique=True)


class Planted:
    """A metric of 1, raised by what each expert costs at the lowest of three widths, and by an
    eighth of that at the middle one; counts how often it is asked."""

    def __init__(self, sensitivities: list[int]) -> None:
        self.cost = {(n % 3, n): value * 2.0**-20 for n, value in enumerate(sensitivities)}
        self.calls = 0

    def __call__(self, choice: Any) -> float:
        self.calls += 1
        return 1 + sum(self.cost[key] * (1, 0.125, 0)[w] for key, w in choice.items())


@settings(max_examples=60, deadline=None)
@given(SENSITIVITIES, st.floats(0, 1.2))
def test_edgemoe_fills_up_to_the_loss(sensitivities: list[int], share: float) -> None:
    planted = Planted(sensitivities)
    keys = list(planted.cost)
    max_loss = share * sum(planted.cost.values())
    found = edgemoe_plan(keys, 3, planted, max_loss)
    report, count = found.report, len(keys)
    assert planted.calls == report["num_evaluations"]
    assert planted.calls <= count + 3 + math.ceil(math.log2(count)) + 1
    assert found.loss == planted(found.choice) - 1 <= max_loss
    num_low = report["num_low"]
    if "order" not in report:  # the narrowest width is within the loss
        assert num_low == count and set(found.choice.values()) == {0}
        return
    order = [tuple(key) for key in report["order"]]
    assert [key[1] for key in order] == sorted(range(count), key=lambda n: sensitivities[n])
    low = report["low"]
    assert {key for key, width in found.choice.items() if width == low} == set(order[:num_low])
    one_more = {**found.choice, order[num_low]: low}
    assert planted(one_more) - 1 == report["loss_of_one_more"]
    assert report["loss_of_one_more"] > max_loss
    assert edgemoe_plan(reversed(keys), 3, planted, max_loss) == found


def test_a_search_goes_on_with_what_it_measured(tmp_path: Path) -> None:
    """Stopped in the middle of a line; and nothing is taken over from other text."""
    path, sensitivities = tmp_path / "measured.jsonl", list(range(1, 30))
    whole = Planted(sensitivities)
    keys = list(whole.cost)
    expected = edgemoe_plan(keys, 3, whole, 1e-4)

    def stopping(choice: Any) -> float:
        if first.calls == 20:
            raise KeyboardInterrupt
        return first(choice)

    first = Planted(sensitivities)
    with pytest.raises(KeyboardInterrupt):
        edgemoe_plan(keys, 3, Remembered(path, "a", stopping), 1e-4)
    path.write_text(path.read_text()[:-9])
    second = Planted(sensitivities)
    remembered = Remembered(path, "a", second)
    assert remembered.num_known == 19
    assert edgemoe_plan(keys, 3, remembered, 1e-4) == expected
    assert second.calls == whole.calls - 19
    again = Remembered(path, "a", second)
    assert edgemoe_plan(keys, 3, again, 1e-4) == expected and again.num_known == whole.calls
    assert second.calls == whole.calls - 19
    assert Remembered(path, "b", second).num_known == 0


def test_a_loss_that_cannot_be_asked_for() -> None:
    with pytest.raises(UsageError, match="-1.00%"):
        edgemoe_plan([(0, 0)], 2, Planted([1]), -0.01)


def costs_of(data: st.DataObject, count: int) -> Costs:
    loss, num_bytes = {}, {}
    for n in range(count):
        values = data.draw(st.lists(st.floats(0, 1), min_size=3, max_size=3))
        loss[0, n] = sorted(values, reverse=True)
        num_bytes[0, n] = [2, 3, 5]
    return Costs(loss, num_bytes)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.data())
def test_bytes_go_where_they_save_most(count: int, data: st.DataObject) -> None:
    costs = costs_of(data, count)
    keys = list(costs.loss)
    everything = [
        dict(zip(keys, widths, strict=True)) for widths in itertools.product(range(3), repeat=count)
    ]
    start, steps = upgrades(costs)
    choice = dict(start)
    for key, width in [*steps, (keys[0], None)]:
        # Every choice on the way is the best of its size: the Lagrangian optimum.
        room = costs.total_bytes(choice)
        best = min(costs.total_loss(each) for each in everything if costs.total_bytes(each) <= room)
        assert costs.total_loss(choice) == pytest.approx(best)
        if width is not None:
            choice[key] = width
    for room in range(2 * count - 1, 5 * count + 1):
        found = within_bytes(costs, room)
        if room < 2 * count:
            assert found is None
            continue
        assert costs.total_bytes(found) <= room
        uniform = [dict.fromkeys(keys, w) for w in range(3)]
        fitting = [each for each in uniform if costs.total_bytes(each) <= room]
        assert costs.total_loss(found) <= min(map(costs.total_loss, fitting)) + 1e-12


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.floats(0, 4), st.data())
def test_the_smallest_within_a_measured_loss(count: int, most: float, data: Any) -> None:
    costs = costs_of(data, count)
    choice, loss, measured = within_loss(costs, lambda c: 1.5 * costs.total_loss(c), most)
    start, steps = upgrades(costs)
    assert measured <= math.ceil(math.log2(len(steps) + 1)) + 2
    best = 1.5 * costs.total_loss({**start, **dict(steps)})
    assert loss == 1.5 * costs.total_loss(choice) and (loss <= most or loss == best)
    taken = sum(1 for key, width in steps if choice[key] >= width)
    if loss <= most and taken:  # one step less is not within it
        fewer = {**start, **dict(steps[: taken - 1])}
        assert 1.5 * costs.total_loss(fewer) > most


def test_the_hull_leaves_out_what_never_pays() -> None:
    assert hull([1.0, 0.9, 0.1, 0.1], [1, 2, 3, 4]) == [0, 2]
    assert hull([1.0, 0.2, 0.1], [1, 2, 3]) == [0, 1, 2]
    assert hull([0.0, 0.0], [1, 2]) == [0]


# ---- on a real, tiny model ----------------------------------------------------------------------


def tokens(seed: int, count: int = 96) -> list[int]:
    return np.random.default_rng(seed).integers(0, 128, count).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def sharpen(weights: dict[str, torch.Tensor]) -> None:
        for name, weight in weights.items():
            weight.mul_(20 if weight.ndim == 1 else 80 if "mlp.gate." in name else 4)

    path = tmp_path_factory.mktemp("planned") / "hf"
    make_checkpoint(path, "qwen2_moe", change=sharpen, num_hidden_layers=4, num_experts=8)
    (path / "tokenizer.json").unlink()
    return path


def test_a_choice_loses_what_its_store_loses(checkpoint: Path, tmp_path: Path) -> None:
    """To the last bit, from the first layer or from the base."""
    calibration = Calibration([tokens(1), tokens(2)])
    variants = (ExpertSpec(2, quantizer="calibrated"), ExpertSpec(4, quantizer="search"))
    variants += (ExpertSpec(8),)
    options = ConvertOptions(variants=variants)
    path = convert(checkpoint, tmp_path / "variants", options, calibration=calibration)
    windows = [Window(tokens(3), 1), Window(tokens(4, 50), 20)]
    with VariantModel(path, windows, 2) as model:
        keys = model.keys
        choice = {key: sum(key) % 3 for key in keys}
        found = model.losses(choice)
        model.set_base({**choice, keys[-1]: 0, keys[-2]: 0})
        assert torch.equal(model.losses(choice).nll, found.nll)
        assert torch.equal(model.losses(choice).kl, found.kl)
        widest = model.losses(dict.fromkeys(keys, 2))
        assert not widest.kl.any() and torch.equal(widest.nll, widest.other_nll)
    plan = BitPlan("chosen", {key: variants[variant] for key, variant in choice.items()})
    chosen = StoreSource(path, {key: 3 * key[1] + variant for key, variant in choice.items()})
    store = convert(chosen, tmp_path / "chosen", ConvertOptions(plan=plan))
    direct = convert(
        checkpoint, tmp_path / "direct", ConvertOptions(plan=plan), calibration=calibration
    )
    name = "experts.safetensors"
    assert (store / name).read_bytes() == (direct / name).read_bytes()
    with Engine.from_pretrained(store) as engine:
        assert torch.equal(evaluate(engine, windows).nll, found.nll)


@pytest.mark.parametrize(
    "target", (["--bpw", "16"], ["--max-loss", "1%"], ["--max-loss", "1%", "--planner", "edgemoe"])
)
def test_the_command_finds_a_plan(
    checkpoint: Path, tmp_path: Path, capsys: Any, target: list[str]
) -> None:
    for seed, name in enumerate(("calibration", "validation")):
        np.save(tmp_path / f"{name}.npy", np.array(tokens(seed, 1500)))
    out, saved = tmp_path / "out", str(tmp_path / "plan.json")
    words = ["convert", str(checkpoint), "--out", str(out), "--bits", "auto", *target, "--json"]
    words += ["--calibration", str(tmp_path / "calibration.npy"), "--save-plan", saved]
    words += ["--validation", str(tmp_path / "validation.npy"), "--group-size", "32"]
    assert main([*words, "--widths", "2,4,8"]) == 0
    found = BitPlan.from_json(json.loads(capsys.readouterr().out))
    assert found == BitPlan.load(saved)
    index = load_index(out)
    assert {key: r.layout.down.bits for key, r in index.records.items()} == {
        key: spec.bits for key, spec in found.specs.items()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["calibration.npy", "validation.npy", "out", "plan.json"]
    )
    assert index.plan["calibration"]["num_tokens"] == 1500
    weights = sum(3 * r.layout.hidden * r.layout.width for r in index.records.values())
    assert found.found["bpw"] == pytest.approx(8 * index.expert_bytes / weights)
    if "--bpw" in target:
        assert found.found["bpw"] <= 16
    else:
        assert found.found["loss_percent"] <= 1


def test_an_interrupted_search_goes_on_with_its_variants(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    np.save(tmp_path / "text.npy", np.array(tokens(5, 9 * 512)))
    words = ["convert", str(checkpoint), "--out", str(tmp_path / "out"), "--bits", "auto"]
    words += ["--bpw", "16", "--widths", "2,4", "--calibration", str(tmp_path / "text.npy")]
    with monkeypatch.context() as patch:
        patch.setattr(auto, "find_plan", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(words) == 130
    made = (tmp_path / "out.variants" / "experts.safetensors").stat().st_mtime_ns
    assert main([*words, "--trunk-bits", "4"]) == 2  # variants of another conversion
    assert "another conversion" in capsys.readouterr().err
    seen = []
    find = auto.find_plan

    def finding(source: Path, path: Path, *rest: Any) -> Any:
        seen.append((path / "experts.safetensors").stat().st_mtime_ns)
        return find(source, path, *rest)

    monkeypatch.setattr(auto, "find_plan", finding)
    assert main(words) == 0 and seen == [made]
    assert not (tmp_path / "out.variants").exists()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "plan `auto fast`" in capsys.readouterr().out


def test_text_where_none_is_given(capsys: Any) -> None:
    args = Namespace(source=str(DEMO), calibration=None, calibration_tokens=3000)
    calibration = read_calibration(args)
    assert "note: no --calibration" in capsys.readouterr().err
    assert calibration.num_tokens == 3000 and len(calibration.windows) == 6
    assert read_calibration(args).digest == calibration.digest


def test_targets_that_cannot_be(checkpoint: Path, tmp_path: Path) -> None:
    words = ["convert", str(checkpoint), "--out", str(tmp_path / "out"), "--bits"]
    np.save(tmp_path / "text.npy", np.array(tokens(0, 9000)))
    text = ["--calibration", str(tmp_path / "text.npy")]
    for wrong in (
        ["auto", *text],
        ["auto", "--bpw", "3", "--size", "1GiB", *text],
        ["auto", "--bpw", "1", *text],
        ["auto", "--size", "20KiB", *text],
        ["auto", "--bpw", "4", "--planner", "edgemoe", *text],
        ["auto", "--bpw", "4", "--plan", "moqe", *text],
        ["auto", "--max-loss", "much", *text],
        ["auto", "--bpw", "16", "--widths", "4", *text],
        ["4", "--bpw", "4"],
    ):
        assert main([*words, *wrong]) == 2, wrong
    assert not list(tmp_path.glob("out*"))
