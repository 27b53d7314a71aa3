"""Conversion end to end: what is in the store, what is refused. Interruptions: test_resume.py."""

import filecmp
import io
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny_checkpoint import CONFIGS, config_of, make_checkpoint, weights_of

from edgemoe.models import load_module
from edgemoe.quant.convert import convert
from edgemoe.quant.journal import Partial, partial_path
from edgemoe.quant.options import ConvertOptions
from edgemoe.quant.plan import plan_conversion
from edgemoe.quant.progress import Silent, open_progress
from edgemoe.quant.quantize import dequantize, quantize
from edgemoe.runtime import kernels
from edgemoe.runtime.amounts import parse_bytes
from edgemoe.runtime.errors import BudgetError, NotFoundError, UsageError
from edgemoe.runtime.format import PAGE_BYTES, QuantSpec
from edgemoe.runtime.headers import read_header
from edgemoe.runtime.index import EXPERTS_FILE, TRUNK_FILE, StoreIndex, load_index


def record_of(index: StoreIndex, layer: int, expert: int) -> np.ndarray:
    record = index.records[layer, expert]
    with open(index.path / EXPERTS_FILE, "rb") as file:
        file.seek(record.offset)
        return np.frombuffer(file.read(record.num_bytes), np.uint8).copy()


def same_files(first: Path, second: Path) -> bool:
    names = sorted(file.name for file in first.iterdir())
    if names != sorted(file.name for file in second.iterdir()):
        return False
    return filecmp.cmpfiles(first, second, names, shallow=False)[0] == names


@pytest.mark.parametrize("group_size", (None, 32, 64, "channel"))
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_records_stand_for_the_quantized_experts(
    tmp_path: Path, bits: int, group_size: int | str | None
) -> None:
    wide = {"intermediate_size": 128, "hidden_size": 192}
    path = make_checkpoint(tmp_path / "hf", **wide, num_hidden_layers=2)
    expected = weights_of(config_of("olmoe", **wide, num_hidden_layers=2))
    out = convert(path, tmp_path / "a.edgemoe", ConvertOptions(bits, group_size))
    index = load_index(out)
    groups = {None: (64, 64), 32: (32, 32), 64: (64, 64), "channel": (64, 128)}[group_size]
    specs = [QuantSpec(bits, size, "sym") for size in (groups[0], *groups)]
    module = load_module("olmoe")
    for (layer, expert), record in index.records.items():
        assert [record.layout.gate_up, record.layout.down] == specs[1:]
        data = record_of(index, layer, expert)
        assert record.offset % PAGE_BYTES == 0 and record.num_bytes % PAGE_BYTES == 0
        middle = record.layout.down_offset
        assert record.crc32c == (kernels.crc32c(data[:middle]), kernels.crc32c(data[middle:]))
        found = kernels.unpack_record(data, record.layout)
        for matrix, proj, spec in zip(found, ("gate", "up", "down"), specs, strict=True):
            weight = expected[module.expert_tensor(layer, expert, proj)]
            found_codes = quantize(weight, spec, group_size == "channel")
            np.testing.assert_array_equal(matrix, dequantize(found_codes, spec).numpy())


def test_nf4_experts(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf")
    expected = weights_of(config_of("olmoe"))
    options = ConvertOptions(mode="nf4", trunk_bits=4)
    plan = plan_conversion(path, options)
    assert "4 bit nf4, groups of 32" in "\n".join(plan.lines())
    index = load_index(convert(path, tmp_path / "a.edgemoe", options))
    assert index.plan["mode"] == "nf4"
    assert {packed.spec.mode for packed in index.packed_trunk.values()} == {"sym"}
    for (layer, expert), record in index.records.items():
        spec = record.layout.down
        assert spec == QuantSpec(4, spec.group_size, "nf4")
        _, _, found = kernels.unpack_record(record_of(index, layer, expert), record.layout)
        weight = expected[load_module("olmoe").expert_tensor(layer, expert, "down")]
        np.testing.assert_array_equal(found, dequantize(quantize(weight, spec), spec).numpy())
    with pytest.raises(UsageError, match="nf4.* not possible with `--bits 3`"):
        ConvertOptions(bits=3, mode="nf4")


@pytest.mark.parametrize(
    ("dtype", "mode"),
    ((torch.bfloat16, "bf16"), (torch.float16, "fp16"), (torch.float32, "bf16")),
    ids=str,
)
def test_16_bit_experts_are_kept(tmp_path: Path, dtype: torch.dtype, mode: str) -> None:
    path = make_checkpoint(tmp_path / "hf", dtype=dtype)
    expected = weights_of(config_of("olmoe"), dtype)
    options = ConvertOptions(bits=16)
    rounded = [note for note in plan_conversion(path, options).notes if "rounded" in note]
    assert bool(rounded) == (dtype == torch.float32)
    index = load_index(convert(path, tmp_path / "a.edgemoe", options))
    stored = torch.bfloat16 if mode == "bf16" else torch.float16
    for (layer, expert), record in index.records.items():
        assert record.layout.down == QuantSpec(16, 0, mode)
        found = kernels.unpack_record(record_of(index, layer, expert), record.layout)
        for matrix, proj in zip(found, ("gate", "up", "down"), strict=True):
            weight = expected[load_module("olmoe").expert_tensor(layer, expert, proj)]
            np.testing.assert_array_equal(matrix, weight.to(stored).float().numpy())


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("trunk_bits", (4, 16))
def test_layouts_and_shards_give_the_same_store(
    tmp_path: Path, model_type: str, trunk_bits: int
) -> None:
    options = ConvertOptions(trunk_bits=trunk_bits)
    cuts = {"one": (False, 1), "sharded": (False, 3), "fused": (True, 1), "both": (True, 2)}
    stores = [
        convert(
            make_checkpoint(tmp_path / name, model_type, fused=fused, num_shards=num_shards),
            tmp_path / f"{name}.edgemoe",
            options,
        )
        for name, (fused, num_shards) in cuts.items()
    ]
    assert all(same_files(stores[0], other) for other in stores[1:])
    assert not list(tmp_path.glob("*.partial"))


def test_threads_give_the_same_store(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf")
    one = convert(path, tmp_path / "one.edgemoe", num_threads=1)
    assert same_files(one, convert(path, tmp_path / "five.edgemoe", num_threads=5))


def test_weight_files_are_plain_safetensors(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf", "qwen2_moe")
    out = convert(path, tmp_path / "a.edgemoe", ConvertOptions(trunk_bits=16))
    index = load_index(out)
    with safe_open(out / EXPERTS_FILE, "np") as file:
        assert sorted(file.keys()) == sorted(f"layers.{a}.experts.{b}" for a, b in index.records)
        for layer, expert in index.records:
            found = file.get_tensor(f"layers.{layer}.experts.{expert}")
            assert np.array_equal(found, record_of(index, layer, expert))
    with open(out / EXPERTS_FILE, "rb") as raw:
        entries, _ = read_header(raw, EXPERTS_FILE)
    assert all(entry.offset % PAGE_BYTES == 0 for entry in entries.values())
    expected = weights_of(config_of("qwen2_moe"))
    with safe_open(out / TRUNK_FILE, "pt") as file:
        names = set(file.keys())
        assert names == {name for name in expected if ".experts." not in name}
        assert all(torch.equal(file.get_tensor(name), expected[name]) for name in names)


@pytest.mark.parametrize("trunk_bits", (4, 8))
def test_packed_trunk(tmp_path: Path, trunk_bits: int) -> None:
    shape = {"vocab_size": 1000, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16}
    path = make_checkpoint(tmp_path / "hf", "qwen3_moe", **shape)
    expected = weights_of(config_of("qwen3_moe", **shape))
    options = ConvertOptions(trunk_bits=trunk_bits)
    notes = plan_conversion(path, options).notes
    index = load_index(convert(path, tmp_path / "a.edgemoe", options))
    kept = {name for name in expected if ".experts." not in name} - index.packed_trunk.keys()
    # 48 columns are no multiple of 32, and what is small or sensitive is never packed.
    odd = {name for name in kept if name.endswith("o_proj.weight")}
    assert len(odd) == 3 and any("3 trunk matrices stay 16 bits" in note for note in notes)
    assert all("norm" in name or "mlp.gate." in name for name in kept - odd)
    with safe_open(index.path / TRUNK_FILE, "pt") as file:
        for name, tensor in index.packed_trunk.items():
            data = file.get_tensor(name).numpy()
            assert tensor.spec == QuantSpec(trunk_bits, 64, "sym")
            found = kernels.unpack(data, tensor.rows, tensor.cols, tensor.spec)
            weight = dequantize(quantize(expected[name], tensor.spec), tensor.spec)
            np.testing.assert_array_equal(found, weight.numpy())
        for name in kept:
            assert torch.equal(file.get_tensor(name), expected[name])


def test_fp32_trunk(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf", dtype=torch.float32)
    expected = weights_of(config_of("olmoe"), torch.float32)
    options = ConvertOptions(trunk_bits=16)
    assert any("fp32 trunk matrices" in note for note in plan_conversion(path, options).notes)
    out = convert(path, tmp_path / "a.edgemoe", options)
    with safe_open(out / TRUNK_FILE, "pt") as file:
        for name in file.keys():
            small = "norm" in name or "mlp.gate." in name
            wanted = expected[name] if small else expected[name].bfloat16()
            assert torch.equal(file.get_tensor(name), wanted)


def test_the_plan_is_what_happens(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf", "mixtral")
    for name in ("generation_config.json", "chat_template.jinja", "model.py"):
        (path / name).write_text(name)
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    plan = plan_conversion(path, ConvertOptions(trunk_bits=8))
    out = convert(path, tmp_path / "a.edgemoe", ConvertOptions(trunk_bits=8))
    assert (out / EXPERTS_FILE).stat().st_size == plan.experts_bytes
    assert (out / TRUNK_FILE).stat().st_size == plan.trunk_bytes
    assert sum(row.num_weights for row in plan.rows) == sum(
        weight.numel() for weight in weights_of(config_of("mixtral")).values()
    )
    assert plan.lines()[len(plan.rows) + 1].startswith("total")
    for file in plan.copied:
        assert (out / file).read_bytes() == (path / file).read_bytes()
    assert not (out / "model.py").exists()
    assert load_index(out).plan == json.loads(json.dumps(plan.to_json()))
    assert set(load_index(out).sha256) == {
        file.relative_to(out).as_posix()
        for file in out.rglob("*")
        if file.is_file() and file.name != "store.json"
    }


# ---- progress -----------------------------------------------------------------------------------


def test_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = io.StringIO()
    progress = open_progress(stream)
    progress.start("experts", 10_000_000_000, 2_000_000_000)
    for _ in range(6):
        now += 2.0
        progress.advance(200_000_000)
    assert stream.getvalue() == (  # one line in 5 seconds; earlier work is not counted as speed
        "experts: 2,600 of 10,000 MB, 100 MB/s, 1:14 left\n"
        "experts: 3,200 of 10,000 MB, 100 MB/s, 1:08 left\n"
    )
    progress.start("trunk", 5_000_000)
    progress.note("hello")
    now += 1.0
    progress.advance(5_000_000)
    progress.close()
    assert stream.getvalue().endswith("left\nhello\ntrunk: 5 of 5 MB, 5 MB/s\n")


def test_a_bar_on_a_terminal(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = open_progress(stream)
    convert(make_checkpoint(tmp_path / "hf"), tmp_path / "a.edgemoe", progress=progress)
    progress.note("no [markup] here")
    for word in ("experts", "trunk", "check", "kB", "[markup]"):
        assert word in stream.getvalue()


def test_every_phase_adds_up(tmp_path: Path) -> None:
    phases: list[list] = []

    class Recorder(Silent):
        def start(self, phase: str, total_bytes: int, done_bytes: int = 0) -> None:
            phases.append([phase, total_bytes, done_bytes])

        def advance(self, num_bytes: int) -> None:
            phases[-1][2] += num_bytes

    convert(make_checkpoint(tmp_path / "hf"), tmp_path / "a.edgemoe", progress=Recorder())
    assert [phase[0] for phase in phases] == ["experts", "trunk", "check"]
    assert all(total == done > 0 for _, total, done in phases)


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad", ({"bits": 5}, {"group_size": 48}, {"group_size": "row"}, {"trunk_bits": 2})
)
def test_impossible_options(bad: dict) -> None:
    with pytest.raises(UsageError, match="expected one of"):
        ConvertOptions(**bad)


def test_a_group_that_does_not_fit(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf")  # experts 32 wide
    with pytest.raises(UsageError, match="use --group-size 32"):
        convert(path, tmp_path / "a.edgemoe", ConvertOptions(4, 64))
    odd = make_checkpoint(tmp_path / "odd", intermediate_size=48)
    with pytest.raises(UsageError, match="use --bits 16"):
        convert(odd, tmp_path / "a.edgemoe")
    assert load_index(convert(odd, tmp_path / "a.edgemoe", ConvertOptions(bits=16))).records


def test_an_existing_target_is_never_touched(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf")
    target = tmp_path / "a.edgemoe"
    target.mkdir()
    with pytest.raises(UsageError, match="already exists"):
        convert(path, target)
    target.rmdir()
    target.symlink_to(tmp_path / "gone")
    with pytest.raises(UsageError, match="already exists"):
        convert(path, target)
    with pytest.raises(NotFoundError, match="no folder"):
        convert(path, tmp_path / "no" / "a.edgemoe")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.edgemoe", "hf"]


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_checkpoint(tmp_path / "hf")
    needed = plan_conversion(path).output_bytes
    usage = type(shutil.disk_usage(tmp_path))(10**9, 10**9 - 5000, 5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(BudgetError, match=r"needs .* more, 4.88 KiB are free") as caught:
        convert(path, tmp_path / "a.edgemoe")
    said = caught.value.why.split("needs ")[1].split(" more")[0]
    assert parse_bytes(said) >= needed and caught.value.exit_code == 3
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="no folder locks on Windows")
def test_one_conversion_at_a_time(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf")
    target = tmp_path / "a.edgemoe"
    holder = Partial.open(target, {"options": [4, None, 16]})
    with pytest.raises(UsageError, match="another conversion is running"):
        convert(path, target)
    holder.discard()
    assert load_index(convert(path, target)).records


def test_a_strange_partial_folder_is_not_touched(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf")
    target = tmp_path / "a.edgemoe"
    partial_path(target).mkdir()
    (partial_path(target) / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="notes.txt.*rm -r"):
        convert(path, target)
    (partial_path(target) / "journal.json").write_text('{"fingerprint": 1}')
    with pytest.raises(UsageError, match="does not parse"):
        convert(path, target)
    assert (partial_path(target) / "notes.txt").read_text() == "mine"
