"""Conversions that are killed, run out of disk, or must stay within a little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import make_checkpoint

from edgemoe.quant.checkpoint import Checkpoint
from edgemoe.quant.convert import convert
from edgemoe.quant.disk import OutputFile
from edgemoe.quant.journal import JOURNAL_FILE, partial_path
from edgemoe.quant.options import ConvertOptions
from edgemoe.runtime.errors import FormatError, NotFoundError, RecordError, UsageError
from edgemoe.runtime.headers import encode_header
from edgemoe.runtime.index import EXPERTS_FILE, load_index

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="kills forks and reads /proc: Linux only"
)


def child(*arguments: object) -> Any:
    """Run conversion_child.py and return what it printed."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("conversion_child.py"), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf", num_hidden_layers=4)
    report = child("kill", path, tmp_path, 11, 4)
    runs = report["runs"]
    by_event = [run for run in runs if isinstance(run["point"], int)]
    assert len(by_event) == 19 and all(run["killed"] for run in by_event)
    assert [run for run in runs if run["opened_wrong"]] == []
    assert [run for run in runs if run["redone"]] == []
    assert [run for run in runs if not run["resumed"] or not run["same"] or run["left"]] == []
    # The points reach from before the first layer to after the last.
    assert {len(run["finished"]) for run in by_event} >= {0, 1, 2, 3, 4}


class Interrupted(Exception):
    pass


def same_store(first: Path, second: Path) -> bool:
    """Whether two stores hold the same bytes."""
    names = sorted(file.name for file in first.iterdir())
    return names == sorted(file.name for file in second.iterdir()) and all(
        (first / name).read_bytes() == (second / name).read_bytes() for name in names
    )


def interrupt(
    monkeypatch: pytest.MonkeyPatch, path: Path, target: Path, layer: int, **options: Any
) -> None:
    """Start a conversion that fails when it comes to `layer`."""
    read = Checkpoint.expert

    def failing(self: Checkpoint, at: int, expert: int) -> Any:
        if at == layer:
            raise Interrupted
        return read(self, at, expert)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "expert", failing)
        with pytest.raises(Interrupted):
            convert(path, target, ConvertOptions(**options))


def test_an_unfinished_folder_is_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_checkpoint(tmp_path / "hf")
    target = tmp_path / "a.edgemoe"
    interrupt(monkeypatch, path, target, layer=2)
    assert not target.exists()
    with pytest.raises(NotFoundError, match="no edgemoe store"):
        load_index(partial_path(target))


def test_other_options_or_sources_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint(tmp_path / "hf")
    target = tmp_path / "a.edgemoe"
    interrupt(monkeypatch, path, target, layer=1, bits=4)
    with pytest.raises(UsageError, match=r"--bits 4, now 8.*rm -r .*a.edgemoe.partial"):
        convert(path, target, ConvertOptions(bits=8))
    status = (path / "model.safetensors").stat()
    os.utime(path / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(UsageError, match="the checkpoint has changed since"):
        convert(path, target)
    os.utime(path / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load_index(convert(path, target)).records


def test_a_flipped_byte_in_finished_layers_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint(tmp_path / "hf")
    target = tmp_path / "a.edgemoe"
    interrupt(monkeypatch, path, target, layer=2)
    written = partial_path(target) / EXPERTS_FILE
    with open(written, "rb+") as file:
        file.seek(written.stat().st_size - 5000)  # in the last expert of layer 1
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 16]))
    with pytest.raises(RecordError, match=r"layers\.1\.experts\.3.*differ.*rm -r"):
        convert(path, target)
    assert not target.exists()
    with open(written, "rb+") as file:
        file.truncate(10_000)
    with pytest.raises(FormatError, match="shorter than its journal says"):
        convert(path, target)


def test_disk_full_is_one_clear_error(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf")
    target = tmp_path / "a.edgemoe"
    whole = convert(path, tmp_path / "whole.edgemoe")
    found = child("starve", path, target, 64 * 1024)
    assert (found["error"], found["code"]) == ("BudgetError", 3)
    assert "disk is full" in found["text"] and "goes on where it stopped" in found["text"]
    check_resumable(path, target, whole)


def check_resumable(path: Path, target: Path, whole: Path) -> None:
    assert not target.exists()
    finished = json.loads((partial_path(target) / JOURNAL_FILE).read_text())["layers"]
    assert 0 < len(finished) < 3
    with pytest.raises(NotFoundError):
        load_index(partial_path(target))
    convert(path, target)
    for file in whole.iterdir():
        assert (target / file.name).read_bytes() == file.read_bytes()


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "hf")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip("may not mount a small tmpfs")
    try:
        found = child("starve", path, disk / "a.edgemoe", 0)
        assert (found["error"], found["code"]) == ("BudgetError", 3)
        assert "No space left" in found["text"]
        whole = convert(path, tmp_path / "whole.edgemoe")
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        check_resumable(path, disk / "a.edgemoe", whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


LARGE = {
    "model_type": "olmoe",
    "attention_bias": False,
    "clip_qkv": None,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 6,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 16384,
}


def write_large(path: Path) -> int:
    """A checkpoint of 690 MB whose weights repeat one random block; returns its bytes."""
    from edgemoe.models import load_module
    from edgemoe.models.names import trunk_shapes

    path.mkdir()
    (path / "config.json").write_text(json.dumps(LARGE))
    module = load_module("olmoe")
    args = module.parse(LARGE)
    shapes = {names[0]: shape for names, shape in trunk_shapes(args, module.TRUNK).items()}
    for layer in range(args.num_layers):
        for expert in range(args.num_experts):
            for proj, shape in (
                ("gate", (2048, 1024)),
                ("up", (2048, 1024)),
                ("down", (1024, 2048)),
            ):
                shapes[module.expert_tensor(layer, expert, proj)] = shape
    sizes = [(name, "BF16", shape, 2 * torch.Size(shape).numel()) for name, shape in shapes.items()]
    block = (torch.randn(1 << 22) * 0.02).bfloat16().view(torch.uint8).numpy()
    file = OutputFile(path / "model.safetensors", encode_header(sizes, {}), 0)
    for *_, num_bytes in sizes:
        for begin in range(0, num_bytes, block.size):
            file.write(block[: min(block.size, num_bytes - begin)])
    file.sync()
    file.close()
    return (path / "model.safetensors").stat().st_size


def test_memory_stays_far_below_the_checkpoint(tmp_path: Path) -> None:
    """690 MB are converted in the memory of a few experts (12.6 MB each), and left uncached."""
    num_bytes = write_large(tmp_path / "hf")
    assert num_bytes > 690e6
    found = child("measure", tmp_path / "hf", tmp_path / "a.edgemoe", 4)
    assert 12e6 < found["growth_bytes"] < 150e6
    mounts = subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True)
    if mounts.stdout.strip() != "tmpfs":  # which is page cache all through
        assert found["cached_bytes"] < 32e6
    assert len(load_index(tmp_path / "a.edgemoe").records) == 48
