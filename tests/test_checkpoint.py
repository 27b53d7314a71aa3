"""Reading checkpoints: every architecture, layout and dtype, and every way to be damaged."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoint import CONFIGS, config_of, make_checkpoint, weights_of

from edgemoe.models import load_module
from edgemoe.quant.checkpoint import Checkpoint
from edgemoe.quant.convert import convert
from edgemoe.runtime.errors import (
    CheckpointError,
    EdgeMoeError,
    NotFoundError,
    UnsupportedModelError,
    UsageError,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("fused", (False, True), ids=("per-expert", "fused"))
def test_experts_are_read_back(tmp_path: Path, model_type: str, fused: bool) -> None:
    path = make_checkpoint(tmp_path / "hf", model_type, fused=fused, num_shards=2)
    expected = weights_of(config_of(model_type))
    module = load_module(model_type)
    with Checkpoint(path) as checkpoint:
        for layer in checkpoint.args.moe_layers:
            for expert in range(checkpoint.args.num_experts):
                names = [module.expert_tensor(layer, expert, p) for p in ("gate", "up", "down")]
                for found, name in zip(checkpoint.expert(layer, expert), names, strict=True):
                    assert torch.equal(found, expected[name])
        assert checkpoint.unused == []
        for name, source in checkpoint.trunk.items():
            assert torch.equal(checkpoint.read(source), expected[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_shards", (1, 3))
def test_dtypes_and_shards(tmp_path: Path, dtype: torch.dtype, num_shards: int) -> None:
    path = make_checkpoint(tmp_path / "hf", dtype=dtype, num_shards=num_shards)
    expected = weights_of(config_of("olmoe"), dtype)
    with Checkpoint(path) as checkpoint:
        found = checkpoint.read(GATE)
        assert found.dtype == dtype and torch.equal(found, expected[GATE])
        blocks = list(checkpoint.read_blocks(checkpoint.source(GATE), 1, 16))
        assert [block.shape[0] for block in blocks] == [16, 16]
        assert torch.equal(torch.cat(blocks), expected[GATE])


def test_fused_layout_reads_only_the_slice(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf", fused=True)
    with Checkpoint(path) as checkpoint:
        reads: list[int] = []
        pread = checkpoint._pread

        def counted(descriptor: int, view: memoryview, offset: int) -> int:
            reads.append(len(view))
            return pread(descriptor, view, offset)

        checkpoint._pread = counted  # type: ignore[method-assign]
        weights = checkpoint.expert(0, 3)
        assert sum(reads) == sum(weight.nbytes for weight in weights)


def test_unused_tensors_are_named(tmp_path: Path) -> None:
    def add(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    with Checkpoint(make_checkpoint(tmp_path / "hf", change=add)) as checkpoint:
        assert checkpoint.unused == ["model.layers.0.self_attn.rotary_emb.inv_freq"]


# ---- damage -------------------------------------------------------------------------------------


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def truncate(path: Path) -> str:
    shard = path / "model-00002-of-00003.safetensors"
    with open(shard, "rb+") as file:
        file.truncate(shard.stat().st_size - 64)
    return shard.name


def cut_header(path: Path) -> str:
    (path / "model-00001-of-00003.safetensors").write_bytes(b"\x10\x00\x00")
    return "model-00001-of-00003.safetensors"


def huge_header(path: Path) -> str:
    shard = path / "model-00001-of-00003.safetensors"
    shard.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    return shard.name


def remove_shard(path: Path) -> str:
    (path / "model-00003-of-00003.safetensors").unlink()
    return "model-00003-of-00003.safetensors"


def wrong_index(path: Path) -> str:
    """The index names a tensor that its shard does not hold."""

    def change(index: dict) -> None:
        files = sorted(set(index["weight_map"].values()))
        index["weight_map"][GATE] = next(f for f in files if f != index["weight_map"][GATE])

    edit_json(path / "model.safetensors.index.json", change)
    return GATE


def index_outside(path: Path) -> str:
    change = {GATE: "../secret.safetensors"}
    edit_json(
        path / "model.safetensors.index.json", lambda index: index["weight_map"].update(change)
    )
    return "../secret.safetensors"


def index_malformed(path: Path) -> str:
    (path / "model.safetensors.index.json").write_text("{'weight_map': ")
    return "model.safetensors.index.json"


def no_weight_map(path: Path) -> str:
    (path / "model.safetensors.index.json").write_text("[]")
    return "model.safetensors.index.json"


def forget_tensor(path: Path) -> str:
    edit_json(path / "model.safetensors.index.json", lambda index: index["weight_map"].pop(GATE))
    return GATE


def no_weights(path: Path) -> str:
    (path / "model.safetensors.index.json").unlink()
    (path / "pytorch_model.bin").write_bytes(b"")
    return "pytorch_model.bin"


def no_config(path: Path) -> str:
    (path / "config.json").unlink()
    return "config.json"


def config_malformed(path: Path) -> str:
    (path / "config.json").write_text("{")
    return "config.json"


def config_is_a_list(path: Path) -> str:
    (path / "config.json").write_text("[" * 100_000)
    return "config.json"


@pytest.mark.parametrize(
    "damage",
    (
        truncate,
        cut_header,
        huge_header,
        remove_shard,
        wrong_index,
        index_outside,
        index_malformed,
        no_weight_map,
        forget_tensor,
        no_weights,
        no_config,
        config_malformed,
        config_is_a_list,
    ),
)
def test_damage_is_named_and_nothing_is_written(
    tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    path = make_checkpoint(tmp_path / "hf", num_shards=3)
    name = damage(path)
    with pytest.raises(CheckpointError) as caught:
        convert(path, tmp_path / "out.edgemoe")
    assert name in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [path]


def edit_tensor(path: Path, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    weights = load_file(path / "model.safetensors")
    changed = change(weights.pop(GATE))
    if changed is not None:
        weights[GATE] = changed
    save_file(weights, path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    (
        (lambda weight: None, "missing"),
        (lambda weight: weight[:16].clone(), r"shape \[16, 64\].*expected \[32, 64\]"),
        (lambda weight: weight.T.contiguous(), r"shape \[64, 32\]"),
        (lambda weight: weight.to(torch.int8), "dtype `I8`"),
        (lambda weight: weight.to(torch.float8_e4m3fn), "dtype `F8_E4M3`"),
        (lambda weight: weight.to(torch.float64), "dtype `F64`"),
        (
            lambda weight: weight.index_put((torch.tensor(3),), torch.tensor(torch.nan).bfloat16()),
            "NaN",
        ),
        (
            lambda weight: weight.index_put((torch.tensor(5),), torch.tensor(torch.inf).bfloat16()),
            "NaN or infinite.*64 of 2048",
        ),
    ),
    ids=("missing", "rows", "transposed", "int8", "fp8", "fp64", "nan", "inf"),
)
def test_bad_tensors_are_named_and_nothing_is_left(
    tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor | None], said: str
) -> None:
    path = make_checkpoint(tmp_path / "hf")
    edit_tensor(path, change)
    with pytest.raises(CheckpointError, match=said) as caught:
        convert(path, tmp_path / "out.edgemoe")
    assert GATE in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [path]


def test_nan_in_the_trunk_is_named(tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.norm.weight"][7] = -torch.inf

    path = make_checkpoint(tmp_path / "hf", change=change)
    with pytest.raises(CheckpointError, match=r"`model.norm.weight`.*1 of 64.*\[7\]"):
        convert(path, tmp_path / "out.edgemoe")
    assert sorted(tmp_path.iterdir()) == [path]


def test_large_finite_weights_are_no_damage(tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[GATE][:] = 3e38

    with Checkpoint(make_checkpoint(tmp_path / "hf", change=change)) as checkpoint:
        assert float(checkpoint.read(GATE).float().min()) > 2e38


@pytest.mark.parametrize(
    ("changes", "said"),
    (
        ({"model_type": "llama"}, "llama"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_experts": None}, "num_experts"),
    ),
    ids=("architecture", "quantized", "activation", "missing-key"),
)
def test_unsupported_models(tmp_path: Path, changes: dict, said: str) -> None:
    path = make_checkpoint(tmp_path / "hf")
    edit_json(path / "config.json", lambda config: config.update(changes))
    with pytest.raises(UnsupportedModelError, match=said):
        convert(path, tmp_path / "out.edgemoe")
    assert sorted(tmp_path.iterdir()) == [path]


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nowhere"):
        Checkpoint(tmp_path / "nowhere")
    path = make_checkpoint(tmp_path / "hf")
    store = convert(path, tmp_path / "out.edgemoe")
    with pytest.raises(UsageError, match="already an edgemoe store"):
        Checkpoint(store)


def test_a_shard_that_shrinks_while_read(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf")
    with Checkpoint(path) as checkpoint:
        with open(path / "model.safetensors", "rb+") as file:
            file.truncate(4096)
        with pytest.raises(EdgeMoeError, match="ends inside tensor"):
            for key in checkpoint._experts:
                checkpoint.expert(*key)
