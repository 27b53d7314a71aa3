"""`prune --method`, which merges experts into a store of their own."""

import json

import pytest
from merge_small import FAMILIES, make_families, write_text

from edgemoe.cli import main
from edgemoe.engine import Engine
from edgemoe.runtime import core
from edgemoe.runtime.index import load_index

native = pytest.mark.skipif(core.lib is None, reason="native core not built")
PROMPT = list(range(40, 90))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_families(tmp_path_factory.mktemp("families"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.npy")


@native
@pytest.mark.parametrize("method", ["uncurl", "msmoe", "diversify"])
def test_the_command_finds_the_families(tmp_path, text, capsys, method):
    """Members differ by 5 % noise in weights and rows; M-SMoE is given as many dominant experts of
    each layer as there are families, and must not tear one apart that has no dominant member."""
    noisy = make_families(tmp_path / method, noise=0.05, row_noise=0.05)
    out = tmp_path / f"{method}.edgemoe"
    arguments = ["prune", str(noisy), "--method", method, "--experts", "4", "--text", str(text)]
    assert main([*arguments, "--no-keep-first-layer", "--out", str(out), "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert "made for training" in captured.err and "merged" in captured.err
    assert document["num_merged"] == 12 and document["merged_bytes"] < document["expert_bytes"]
    for groups in document["groups"].values():
        found = {tuple(group) for group in groups}
        if method == "msmoe":
            heads = [set(group) for group in found]
            for family in FAMILIES:  # together, or each a dominant expert of its own
                together = any(set(family) <= group for group in heads)
                assert together or len([g for g in heads if g & set(family)]) == 2
        else:
            assert found == set(FAMILIES)
    for row in document["rows"]:
        assert row["set_hit_rate"] >= row["full_hit_rate"]
    index = load_index(out)
    assert index.plan["merge"]["method"] == method and bool(index.kept) == (method == "diversify")
    with Engine.from_pretrained(out, context=64) as engine:
        assert len(engine.generate(PROMPT).token_ids) > 0


@native
def test_a_dry_run_writes_nothing(path, text, tmp_path, capsys):
    profile = str(text.with_name("profile.safetensors"))
    command = ["calibrate", str(path), "--text", str(text), "--out", profile]
    assert main([*command, "--tokens", "200"]) == 0
    arguments = ["prune", str(path), "--method", "uncurl", "--keep", "50%", "--profile", profile]
    assert main([*arguments, "--dry-run"]) == 0
    captured = capsys.readouterr()  # the first layer stays whole, as in both papers
    assert "merges 24 experts into 16" in captured.out and "first MoE layer" not in captured.err
    assert main([*arguments, "--dry-run", "--no-keep-first-layer"]) == 0
    captured = capsys.readouterr()
    assert "merges 24 experts into 12" in captured.out and "first MoE layer" in captured.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "uncurl", "--keep", "50%"], "need a store of their own"),
        (["--method", "uncurl", "--fit", "4GiB", "--out", "x"], "`--fit` does not go with"),
        (["--method", "msmoe", "--keep", "50%", "--out", "x", "--global"], "differ by themselves"),
        (["--method", "uncurl", "--keep", "50%", "--out", "x", "--name", "y"], "`--name` does not"),
        (["--method", "diversify", "--keep", "50%", "--out", "x"], "needs a text"),
        (["--method", "reap", "--keep", "50%", "--name", "x", "--out", "y"], "`--out` does not go"),
        (
            ["--method", "msmoe", "--keep", "50%", "--out", "x", "--router", "untrained"],
            "expected index-map",
        ),
        (
            ["--method", "uncurl", "--keep", "50%", "--out", "x", "--router", "untrained"],
            "random routers are for training",
        ),
        (["--method", "uncurl", "--keep", "50%", "--out", "."], "already exists"),
        (["--method", "uncurl", "--keep", "50%", "--out", "x"], "no profile"),
    ],
)
def test_command_lines_that_cannot_be_meant(path, capsys, words, message):
    assert main(["prune", str(path), *words]) in (2, 4)
    assert message in capsys.readouterr().err
