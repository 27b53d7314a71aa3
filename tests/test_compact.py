"""A store made of a set: the same bits as the full store with that set in hard mode."""

import shutil

import numpy as np
import pytest
import torch
from sets_small import make_set
from stores_small import make_store
from tiny_checkpoint import make_checkpoint

from edgemoe.cli import main
from edgemoe.engine import Engine
from edgemoe.models.fingerprint import checkpoint_fingerprint
from edgemoe.quant.compact import compact
from edgemoe.quant.convert import convert
from edgemoe.quant.plan import ConvertOptions
from edgemoe.runtime import core
from edgemoe.runtime.errors import FormatError, UsageError
from edgemoe.runtime.index import load_index
from edgemoe.session import Session

KEPT = {0: (0, 2, 5, 6), 1: (1, 2, 3, 7), 2: (0, 4)}
PROMPT = list(range(40, 90))


def logits_of(path, num_tokens: int = 10, **options) -> np.ndarray:
    """Logits of a prompt's last token and of a greedy answer."""
    ids, rows = list(PROMPT), []
    with Engine.from_pretrained(path, context=64, **options) as engine, Session(engine) as session:
        for _ in range(num_tokens):
            rows.append(session.logits(ids))
            ids.append(int(rows[-1].argmax()))
    return np.stack(rows)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = make_store(tmp_path_factory.mktemp("compact"))
    make_set(path, "code", KEPT)
    return path


@pytest.fixture(scope="module")
def small(path, tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "code.edgemoe"
    compact(path, "code", out)
    return out


@pytest.mark.skipif(core.lib is None, reason="native core not built")
def test_the_sliced_model_is_the_masked_one_bit_for_bit(path, small):
    """papers R8; streamed from a cache of one layer's records, and resident."""
    masked = logits_of(path, set="code", set_mode="hard")
    record = load_index(path).max_record_bytes
    assert np.array_equal(logits_of(small), masked)
    assert np.array_equal(logits_of(small, cache_bytes=2 * record), masked)
    assert not np.array_equal(logits_of(path), masked)


@pytest.mark.skipif(core.lib is None, reason="native core not built")
@pytest.mark.parametrize("model_type", ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_every_architecture(tmp_path, model_type, dtype):
    """Renormalised weights, shared experts, dense layers, routers in 16 and 32 bits."""
    source = make_checkpoint(tmp_path / "checkpoint", model_type, dtype)
    (source / "tokenizer.json").unlink()
    options = ConvertOptions(bits=4, group_size=32)
    path = convert(source, tmp_path / "full.edgemoe", options)
    layers = list(load_index(path).layer_to_num_experts)
    make_set(path, "some", {layer: ((0, 2, 3), (1, 3), (0, 1))[layer] for layer in layers})
    compact(path, "some", tmp_path / "some.edgemoe")
    masked = logits_of(path, 4, set="some", set_mode="hard")
    assert np.array_equal(logits_of(tmp_path / "some.edgemoe", 4), masked)


def test_the_reference_backend_runs_it(path, small):
    masked = logits_of(path, 2, set="code", set_mode="hard", backend="reference")
    assert np.allclose(logits_of(small, 2, backend="reference"), masked, atol=1e-4)


def test_what_is_in_it(path, small):
    index, full = load_index(small), load_index(path)
    assert index.kept == KEPT and index.config == full.config
    assert index.layer_to_num_experts == {0: 4, 1: 4, 2: 2}
    assert index.expert_bytes == sum(
        full.records[layer, expert].num_bytes for layer, ids in KEPT.items() for expert in ids
    )
    for layer, ids in KEPT.items():
        for number, expert in enumerate(ids):
            assert index.records[layer, number].crc32c == full.records[layer, expert].crc32c
    assert index.plan["set"]["name"] == "code"
    assert checkpoint_fingerprint(index) != checkpoint_fingerprint(full)
    assert main(["verify", str(small), "--tokens", "4"]) == 0


@pytest.mark.skipif(core.lib is None, reason="native core not built")
def test_the_core_opens_it_alone(small):
    """The index of the core, which other programs use."""
    index = core.lib.em_index_open(str(small).encode(), None, 0)
    try:
        assert [index.contents.layers[i].num_experts for i in range(3)] == [4, 4, 2]
        assert core.lib.em_index_key(index, 2, 1) == 9
    finally:
        core.lib.em_index_close(index)


def test_a_set_of_the_small_store(small, tmp_path):
    """It is a store like any other: it can have sets, by its own numbers."""
    copy = tmp_path / "copy.edgemoe"
    shutil.copytree(small, copy)
    make_set(copy, "few", {0: (0, 1, 3), 1: (0, 1), 2: (0, 1)})
    with Engine.from_pretrained(copy, set="few", set_mode="hard", context=64) as engine:
        assert len(engine.generate(PROMPT).token_ids) > 0


def test_the_command(path, tmp_path, capsys):
    out = tmp_path / "code.edgemoe"
    assert main(["prune", str(path), "--set", "code", "--compact", str(out)]) == 0
    assert "10 experts" in capsys.readouterr().out and load_index(out).kept == KEPT
    assert main(["prune", str(path), "--set", "code", "--compact", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["prune", str(path), "--set", "code"]) == 2
    assert main(["prune", str(path), "--compact", str(out)]) == 2


def test_a_failure_leaves_nothing(path, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("edgemoe.quant.compact._copy_trunk", fail)
    with pytest.raises(OSError, match="No space"):
        compact(path, "code", tmp_path / "x.edgemoe")
    assert not list(tmp_path.iterdir())


def test_a_small_store_is_not_made_smaller_or_mistaken(path, small, tmp_path):
    with pytest.raises(UsageError, match="made of a set itself"):
        compact(small, "code", tmp_path / "y.edgemoe")
    with pytest.raises(UsageError, match="made of a pruned set"):
        convert(small, tmp_path / "y.edgemoe", ConvertOptions(bits=4, group_size=32))
    copy = tmp_path / "copy.edgemoe"
    shutil.copytree(small, copy)
    text = (copy / "store.json").read_text(encoding="utf-8")
    assert '"kept"' in text
    (copy / "store.json").write_text(text.replace('"kept"', '"kept_not"'), encoding="utf-8")
    with pytest.raises(FormatError, match="config.json and store.json disagree"):
        Engine.from_pretrained(copy)
    broken = text.replace('"kept": {\n  "0": [\n   0,', '"kept": {\n  "0": [\n   1,\n   0,')
    assert broken != text
    (copy / "store.json").write_text(broken, encoding="utf-8")
    with pytest.raises(FormatError, match="`kept` does not name its experts"):
        load_index(copy)
