"""Calibrated conversion of the bundled model: what it loses, from a store, resumed, by a plan."""

import json
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pytest
import torch
from test_resume import Interrupted, same_store
from tiny_checkpoint import CONFIGS, make_checkpoint

from edgemoe import Engine
from edgemoe.cli import main
from edgemoe.engine import DEMO
from edgemoe.quant import calibrated
from edgemoe.quant.bitplan import BitPlan, named
from edgemoe.quant.calibrated import Calibration
from edgemoe.quant.convert import convert
from edgemoe.quant.evaluate import Figures, evaluate
from edgemoe.quant.journal import partial_path
from edgemoe.quant.options import ConvertOptions, ExpertSpec
from edgemoe.quant.plan import plan_conversion
from edgemoe.quant.store_source import StoreSource
from edgemoe.quant.windows import Window, cut
from edgemoe.runtime.errors import FormatError, UsageError
from edgemoe.runtime.index import load_index
from edgemoe.runtime.store import Store
from edgemoe.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def prose() -> tuple[Calibration, list[Window]]:
    """Text of a kind that the bundled model knows: some to calibrate, some to measure."""
    tokenizer = Tokenizer.load(DEMO)
    ids = tokenizer.encode("\n".join(topics.topics[name] for name in sorted(topics.topics)))
    windows = cut(ids, 256)
    return Calibration([w.ids for w in windows[:24:2]], ("topics",)), windows[1:10:2]


@pytest.mark.parametrize("bits", (2, 3))
def test_quantizers_in_order(
    tmp_path: Path, prose: tuple[Calibration, list[Window]], bits: int
) -> None:
    """Held-out text, two layers at few bits: calibrated loses less than searched scales, those less
    than absmax by row. All layers: tools/quantizer_table.py."""
    calibration, windows = prose
    keys = load_index(DEMO).records
    found = []
    for quantizer in ("calibrated", "search", "absmax"):
        low = ExpertSpec(bits, quantizer=quantizer)
        specs = {key: low if key[0] in (0, 1) else ExpertSpec(8) for key in keys}
        options = ConvertOptions(plan=BitPlan(quantizer, specs))
        path = convert(DEMO, tmp_path / quantizer, options, calibration=calibration)
        with Engine.from_pretrained(path) as engine, Engine.from_pretrained(DEMO) as full:
            found.append(Figures.of(evaluate(engine, windows, full)))
    print([(figures.perplexity, figures.kl) for figures in found])
    for measure in ("perplexity", "kl"):
        calibrated, searched, absmax = (getattr(figures, measure) for figures in found)
        assert calibrated < searched < absmax


def test_a_store_is_a_source(tmp_path: Path) -> None:
    """Experts that keep their layout and the trunk are taken over byte by byte."""
    full = load_index(DEMO)
    specs = {key: ExpertSpec(8 if sum(key) % 2 else 3) for key in full.records}
    out = convert(DEMO, tmp_path / "mixed", ConvertOptions(plan=BitPlan("mixed", specs)))
    index = load_index(out)
    assert (out / "trunk.safetensors").read_bytes() == (DEMO / "trunk.safetensors").read_bytes()
    with StoreSource(DEMO) as before, StoreSource(out) as after:
        for key, record in index.records.items():
            same = record.layout == full.records[key].layout
            assert same == (specs[key].bits == 8)
            if same:
                taken = after.record(*key, record.layout)
                assert np.array_equal(taken, before.record(*key, record.layout))
            else:
                for a, b in zip(after.expert(*key), before.expert(*key), strict=True):
                    assert 0 < float((a - b).square().mean()) < 0.1 * float(b.square().mean())
    assert index.plan["source_store"] == full.plan
    with Store(out) as store:
        assert all(good for *_, good in store.verify())
    assert BitPlan.from_json(index.plan["bit_plan"]).specs == specs


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_architecture_is_calibrated(tmp_path: Path, model_type: str) -> None:
    """Dense layers and shared experts on the way; experts without a token; any number of threads;
    and an interruption in the middle gives the same bytes."""
    path = make_checkpoint(tmp_path / "hf", model_type, num_hidden_layers=3)
    windows = [[(7 * i + j * j) % 128 for j in range(24)] for i in range(3)]
    calibration = Calibration(windows)
    options = ConvertOptions(3, quantizer="calibrated")
    one = convert(path, tmp_path / "one", options, num_threads=1, calibration=calibration)
    two = convert(path, tmp_path / "two", options, num_threads=3, calibration=calibration)
    assert same_store(one, two)
    assert load_index(one).plan["calibration"]["num_tokens"] == 72
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrated, "expert_records", fail_at(5))
        with pytest.raises(Interrupted):
            convert(path, tmp_path / "late", options, calibration=calibration)
    finished = json.loads((partial_path(tmp_path / "late") / "journal.json").read_text())
    assert len(finished["layers"]) == 1
    with pytest.raises(UsageError, match="--calibration"):
        convert(path, tmp_path / "late", options, calibration=Calibration(windows[1:]))
    assert same_store(one, convert(path, tmp_path / "late", options, calibration=calibration))


def fail_at(count: int) -> Any:
    """`expert_records` that is interrupted at its call number `count`, from 0."""
    real, calls = calibrated.expert_records, []

    def failing(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) > count:
            raise Interrupted
        return real(*arguments)

    return failing


def test_an_expert_without_tokens_sees_the_layer() -> None:
    normed = torch.randn((1000, 8))
    tokens, factors = calibrated._filled(
        normed, calibrated.Share(0, torch.empty(0, dtype=torch.int64), torch.empty(0))
    )
    assert len(tokens) == len(set(tokens.tolist())) == calibrated.MIN_TOKENS
    assert (factors == 0.5).all()
    many = calibrated.Share(0, torch.arange(400), torch.rand(400))
    tokens, factors = calibrated._filled(normed, many)
    assert torch.equal(tokens, many.tokens) and torch.equal(factors[:, 0], many.weights)


# ---- plans --------------------------------------------------------------------------------------


def test_plans_by_name() -> None:
    keys = [(layer, expert) for layer in range(2) for expert in range(3)]
    assert set(named("experts-int8", keys).specs.values()) == {ExpertSpec(8, quantizer="absmax")}
    assert set(named("moqe", keys, 2).specs.values()) == {ExpertSpec(2, quantizer="absmax")}
    for name, bits in (("experts-int8", 4), ("moqe", 8), ("other", None)):
        with pytest.raises(UsageError):
            named(name, keys, bits)


def test_a_plan_is_saved_and_used_again(tmp_path: Path, capsys: Any) -> None:
    keys = list(load_index(DEMO).records)
    specs = {key: ExpertSpec((2, 3, 4, 8)[key[1] % 4], quantizer="search") for key in keys}
    plan = BitPlan("by hand", specs, {"loss": 0.5})
    plan.save(tmp_path / "plan.json")
    assert BitPlan.load(tmp_path / "plan.json") == plan
    again = str(tmp_path / "again.json")
    words = ["convert", str(DEMO), "--plan", str(tmp_path / "plan.json"), "--save-plan", again]
    assert main([*words, "--out", str(tmp_path / "store"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert BitPlan.load(again) == plan == BitPlan.from_json(document["bit_plan"])
    index = load_index(tmp_path / "store")
    assert {key: r.layout.down.bits for key, r in index.records.items()} == {
        key: spec.bits for key, spec in specs.items()
    }
    assert main([*words, "--dry-run"]) == 0
    assert "48 at 2 bits, 48 at 3 bits, 48 at 4 bits, 48 at 8 bits" in capsys.readouterr().out
    for option in ("--bits", "4"), ("--quantizer", "nearest"):
        assert main([*words, "--dry-run", *option]) == 2
    assert main(["convert", str(DEMO), "--plan", "experts-int8", "--dry-run"]) == 0
    assert "192 at 8 bits" in capsys.readouterr().out


def test_plans_that_do_not_fit(tmp_path: Path) -> None:
    small = make_checkpoint(tmp_path / "hf")
    keys = list(load_index(DEMO).records)
    plan = BitPlan("big", dict.fromkeys(keys, ExpertSpec()))
    with pytest.raises(UsageError, match="another model"):
        plan_conversion(small, ConvertOptions(plan=plan))
    (tmp_path / "bad.json").write_text('{"format": "edgemoe-bit-plan", "version": 1}')
    with pytest.raises(FormatError, match="no bit plan"):
        BitPlan.load(tmp_path / "bad.json")
    with pytest.raises(UsageError, match="needs a text"):
        convert(small, tmp_path / "out", ConvertOptions(quantizer="calibrated"))
