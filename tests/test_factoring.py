"""Bodies of MC-SMoE: what is chosen and factored, and stores of such bodies."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from merge_small import output_of, random_body, write_text
from test_merge_store import logits_of
from test_native_index import native_error
from tiny_checkpoint import make_checkpoint
from tokenizers_small import CHATML, byte_level, write

from edgemoe.cli import main
from edgemoe.quant.convert import convert
from edgemoe.quant.factoring import Factoring, Moments, choose_factoring, factor_body
from edgemoe.quant.merge import Group, LayerMerge
from edgemoe.quant.merge_write import write_merged
from edgemoe.quant.options import ConvertOptions
from edgemoe.runtime import core
from edgemoe.runtime.errors import FormatError, UsageError
from edgemoe.runtime.format import Factors, QuantSpec, RecordLayout
from edgemoe.runtime.index import load_index
from edgemoe.runtime.reference import whole_body

native = pytest.mark.skipif(core.lib is None, reason="native core not built")
WIDTH, HIDDEN, EXPERTS = 128, 64, 4
BF16, INT8 = QuantSpec(16, 0, "bf16"), QuantSpec(8, 64, "sym")


def multiplied(found, dense: int, rank: int):
    """(gate, up, down) of a factored body, fp32."""
    width = dense + len(found.u_gate)
    layout = RecordLayout(BF16, BF16, found.gate.shape[1], width, Factors(dense, rank, BF16))
    parts = (found.gate, found.up, found.down, found.u_gate, found.u_up, found.v_down)
    return tuple(map(torch.from_numpy, whole_body([part.numpy() for part in parts], layout)))


def loss(body, found, x) -> float:
    exact = output_of(body, x)
    return float((output_of(found, x) - exact).norm() / exact.norm())


# ---- factors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", (0, 32))
def test_full_rank_is_the_dense_body(dense):
    body, x = random_body(1, WIDTH, HIDDEN), torch.randn(20, HIDDEN)
    found = multiplied(factor_body(body, dense, HIDDEN), dense, HIDDEN)
    assert loss(body, found, x) <= 1e-5
    short = multiplied(factor_body(body, dense, 32), dense, 32)
    assert loss(body, short, x) > 0.05


@pytest.mark.parametrize("size", (1.0, 4.0))
def test_planted_low_rank_and_dense_neurons_are_found(size):
    """96 neurons of rank 32, and 32 at random that are not, of the same size and larger."""
    rng = torch.Generator().manual_seed(7)
    place = torch.randperm(WIDTH, generator=rng)[:32]
    body = []
    for number, shape in enumerate([(WIDTH, 96)] * 3):
        left = torch.randn(shape[0], 32, generator=rng)
        weight = left @ torch.randn(32, shape[1], generator=rng) / 32**0.5
        weight[place] = size * torch.randn(32, shape[1], generator=rng)
        body.append((weight.T if number == 2 else weight).contiguous() / 10)
    found = multiplied(factor_body(tuple(body), 32, 32), 32, 32)
    x = torch.randn(20, 96, generator=rng)
    assert loss(body, found, x) <= 1e-5
    planted = {tuple(row) for row in body[0][place].tolist()}
    assert {tuple(row) for row in found[0][:32].tolist()} == planted
    without = multiplied(factor_body(tuple(body), 0, 32), 0, 32)
    assert loss(body, without, x) > 0.05


def test_moments_put_the_error_where_it_matters_less():
    body = random_body(3, WIDTH, HIDDEN)
    rng = torch.Generator().manual_seed(4)
    size = torch.logspace(0.5, -1.5, HIDDEN)[torch.randperm(HIDDEN, generator=rng)]
    x = torch.randn(400, HIDDEN, generator=rng) * size
    gate, up, _ = body
    hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    moments = Moments(x.square().mean(dim=0), hidden.square().mean(dim=0))
    test = torch.randn(400, HIDDEN, generator=rng) * size
    plain = loss(body, multiplied(factor_body(body, 32, 32), 32, 32), test)
    weighed = loss(body, multiplied(factor_body(body, 32, 32, moments), 32, 32), test)
    assert weighed < 0.6 * plain


def test_neurons_and_inputs_that_nobody_saw_are_no_trouble():
    body = random_body(5, WIDTH, HIDDEN)
    body[2][:, :8] = 0
    moments = Moments(torch.zeros(HIDDEN), torch.zeros(WIDTH))
    for each in (None, moments):
        found = factor_body(body, 32, 64, each)
        assert loss(body, multiplied(found, 32, 64), torch.randn(9, HIDDEN)) <= 1e-4


def test_what_is_asked_for_becomes_what_can_be_stored():
    whole = RecordLayout(INT8, INT8, 2048, 1024)
    assert choose_factoring(whole, None, None, None) == Factoring(128, 32)  # 10 %, to 32
    assert choose_factoring(whole, 0.25, 0.05, None) == Factoring(64, 256)
    half = choose_factoring(whole, None, None, 0.5)
    assert half.layout(0, whole).num_bytes <= whole.num_bytes / 2
    more = replace(half, rank=half.rank + 32)
    assert more.layout(0, whole).num_bytes > whole.num_bytes / 2
    assert choose_factoring(whole, None, None, whole.num_bytes // 2) == half
    layout = replace(half, whole_layers=frozenset({3})).layout
    assert layout(3, whole) == whole and layout(2, whole).factors.dense == 128
    odd = Factoring(32, 96).layout(0, RecordLayout(INT8, INT8, 2048, 192))
    assert (odd.down.group_size, odd.factors.spec.group_size) == (64, 32)
    for arguments in ((1024, None, None), (None, None, 0.01), (None, 1.0, None)):
        with pytest.raises(UsageError):
            choose_factoring(whole, *arguments)


# ---- stores -------------------------------------------------------------------------------------


def make_store(folder, bits: int):
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_attention_heads": 2,
        "num_experts": EXPERTS,
        "vocab_size": 416,
        "max_position_embeddings": 512,
        "norm_topk_prob": True,
    }
    source = make_checkpoint(folder / "source", "olmoe", **sizes)
    (source / "tokenizer.json").unlink()
    write(source, byte_level(400), CHATML)
    return convert(source, folder / f"{bits}.edgemoe", ConvertOptions(bits=bits, group_size=32))


def pairs():
    groups = (Group(0, (0, 2), (0.75, 0.25)), Group(1, (1, 3), (0.5, 0.5)))
    return {layer: LayerMerge(groups) for layer in range(3)}


def singles():
    groups = tuple(Group(expert, (expert,), (1.0,)) for expert in range(EXPERTS))
    return {layer: LayerMerge(groups) for layer in range(3)}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("plain"), 8)


@pytest.fixture(scope="module")
def factored(path, tmp_path_factory):
    out = tmp_path_factory.mktemp("factored") / "factored.edgemoe"
    write_merged(path, pairs(), out, factoring=Factoring(32, 32, frozenset({0})))
    return out


def test_the_index_says_what_is_factored(path, factored):
    index = load_index(factored)
    assert len(index.records) == 6 and index.num_factored == 4 and index.is_derived
    assert [index.records[layer, 0].layout.factors for layer in range(3)] == [
        None,
        *[Factors(32, 32, QuantSpec(8, 32, "sym"))] * 2,
    ]
    assert index.records[1, 0].num_bytes < index.records[0, 0].num_bytes
    assert json.loads((factored / "store.json").read_text())["format_version"] == 2
    assert json.loads((path / "store.json").read_text())["format_version"] == 1


@native
def test_the_native_index_reads_alike(factored):
    index = core.lib.em_index_open(str(factored).encode(), None, 0)
    for key, (_, record) in enumerate(sorted(load_index(factored).records.items())):
        own, factors = index.contents.records[key], record.layout.factors
        assert (own.offset, own.num_bytes) == (record.offset, record.num_bytes)
        assert own.down_offset == record.layout.down_offset
        assert (own.dense, own.rank) == ((factors.dense, factors.rank) if factors else (0, 0))
        if factors:
            assert bytes(own.factors) == bytes(core.Format.of(factors.spec))
    core.lib.em_index_close(index)


@native
@pytest.mark.parametrize(
    "row",
    [
        lambda row: row[:6],
        lambda row: [*row, 0],
        lambda row: [*row[:4], 9, *row[5:]],
        lambda row: [*row[:4], -1, *row[5:]],
        lambda row: [*row[:5], 0, row[6]],
        lambda row: [*row[:5], 16, row[6]],
        lambda row: [*row[:5], -32, row[6]],
        lambda row: [*row[:6], 64],
        lambda row: [*row[:6], 0],
        lambda row: [*row[:6], -32],
        lambda row: [*row[:6], 1 << 40],
        lambda row: row[:4],
    ],
)
def test_an_index_that_does_not_add_up_is_refused(factored, tmp_path, row):
    copy = tmp_path / "copy"
    shutil.copytree(factored, copy)
    document = json.loads((copy / "store.json").read_text())
    experts = document["layers"]["1"]["experts"]
    assert len(experts[0]) == 7
    experts[0] = row(experts[0])
    (copy / "store.json").write_text(json.dumps(document))
    with pytest.raises(FormatError):
        load_index(copy)
    assert native_error(copy)


@native
def test_every_budget_and_thread_count_gives_the_same_bits(factored):
    expected = logits_of(factored)
    largest = load_index(factored).max_record_bytes
    for options in ({"cache_bytes": 2 * largest}, {"threads": 1}, {"threads": 3}):
        assert np.array_equal(logits_of(factored, **options), expected), options


@native
def test_the_twin_and_the_core_agree(path, tmp_path):
    """At 16 bits, where the core does not round activations."""
    plain, out = make_store(tmp_path, 16), tmp_path / "out.edgemoe"
    write_merged(plain, pairs(), out, factoring=Factoring(32, 32))
    found, near = logits_of(out), logits_of(out, backend="reference")
    assert np.abs(found - near).max() <= 2e-2 * np.abs(near).max()


@native
def test_full_rank_is_the_store_that_was_not_factored(tmp_path):
    plain = make_store(tmp_path, 16)
    for name, factoring in (("whole", None), ("full", Factoring(0, 64)), ("low", Factoring(0, 32))):
        write_merged(plain, singles(), tmp_path / f"{name}.edgemoe", factoring=factoring)
    whole, full, low = (logits_of(tmp_path / f"{n}.edgemoe") for n in ("whole", "full", "low"))
    assert np.abs(full - whole).max() <= 0.02 * np.abs(whole).max()  # factors are bf16
    assert np.abs(low - whole).max() > 3 * np.abs(full - whole).max()


@native
def test_the_command_writes_inspects_and_verifies(path, tmp_path, capsys):
    text, out = write_text(tmp_path / "text.npy"), tmp_path / "out.edgemoe"
    words = ["prune", str(path), "--method", "mc-smoe", "--keep", "50%", "--text", str(text)]
    assert main([*words, "--out", str(out), "--rank", "50%", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    index = load_index(out)
    assert document["merged_bytes"] == index.expert_bytes
    assert (document["factors"]["dense"], document["factors"]["rank"]) == (32, 32)
    assert document["factors"]["whole_layers"] == [0] and index.num_factored == 4
    assert index.plan["merge"]["rank"] == 32 and index.plan["merge"]["method"] == "mc-smoe"
    assert main(["inspect", str(out), "--layers"]) == 0
    assert "32 dense neurons, the others of rank 32" in capsys.readouterr().out
    assert main(["verify", str(out)]) == 0
    assert main(["verify", str(out), "--tokens", "8"]) == 0
    capsys.readouterr()
    assert main([*words, "--dry-run", "--body-size", "90%"]) == 0
    assert "as products of rank" in capsys.readouterr().out
    profile = tmp_path / "p.safetensors"  # of the factored store itself
    assert main(["calibrate", str(out), "--text", str(text), "--out", str(profile)]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "msmoe", "--rank", "32"], "`--rank` does not go with `--method msmoe`"),
        (["--method", "reap", "--body-size", "50%"], "`--body-size` does not go with"),
        (["--method", "mc-smoe", "--rank", "32", "--body-size", "50%"], "two ways"),
        (["--method", "mc-smoe", "--router", "merged"], "expected index-map"),
    ],
)
def test_command_lines_that_cannot_be_meant(path, tmp_path, capsys, words, message):
    words = [*words, "--keep", "50%"]
    words += ["--name", "x"] if "reap" in words else ["--out", str(tmp_path / "x.edgemoe")]
    assert main(["prune", str(path), *words]) in (2, 4)
    assert message in capsys.readouterr().err


def test_a_rank_that_saves_nothing_is_refused(path, tmp_path, capsys):
    text = write_text(tmp_path / "text.npy")
    words = ["prune", str(path), "--method", "mc-smoe", "--keep", "50%", "--text", str(text)]
    assert main([*words, "--dry-run", "--rank", "64", "--dense-neurons", "75%"]) == 2
    assert "save nothing" in capsys.readouterr().err
