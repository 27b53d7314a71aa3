"""The fingerprint of a store names its checkpoint, whatever the bits."""

import pytest
from stores_small import make_store
from tiny_checkpoint import make_checkpoint

from edgemoe.models.fingerprint import checkpoint_fingerprint
from edgemoe.quant.convert import convert
from edgemoe.quant.plan import ConvertOptions
from edgemoe.runtime.index import load_index


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("source") / "checkpoint", "qwen2_moe")


def test_stores_of_one_checkpoint_share_it(source, tmp_path):
    prints = {
        checkpoint_fingerprint(load_index(convert(source, tmp_path / f"{bits}.edgemoe", options)))
        for bits, options in {
            4: ConvertOptions(bits=4, group_size=32),
            8: ConvertOptions(bits=8, group_size=32, trunk_bits=8),
        }.items()
    }
    assert len(prints) == 1 and len(prints.pop()) == 32


def test_another_router_makes_another(source, tmp_path):
    """One element of one router, all else equal."""

    def nudge(weights) -> None:
        weights["model.layers.2.mlp.gate.weight"][1, 3] += 1

    other = make_checkpoint(tmp_path / "other", "qwen2_moe", change=nudge)
    options = ConvertOptions(bits=4, group_size=32)
    first = checkpoint_fingerprint(load_index(convert(source, tmp_path / "a.edgemoe", options)))
    second = checkpoint_fingerprint(load_index(convert(other, tmp_path / "b.edgemoe", options)))
    assert first != second != checkpoint_fingerprint(load_index(make_store(tmp_path / "c")))
