"""The native index against the Python one: the same records, and no store that only it believes."""

import ctypes
import json
import shutil
from pathlib import Path

import pytest

import edgemoe
from edgemoe.runtime import core
from edgemoe.runtime.errors import EdgeMoeError
from edgemoe.runtime.index import load_index

DEMO = Path(edgemoe.__file__).parent / "demo" / "demo.edgemoe"
pytestmark = pytest.mark.skipif(core.lib is None, reason="native core not built")


def native_error(path: Path) -> str:
    """What the native index has against a folder; empty where it opens."""
    error = ctypes.create_string_buffer(200)
    index = core.lib.em_index_open(str(path).encode(), error, len(error))
    core.lib.em_index_close(index)
    assert bool(index) != bool(error.value)
    return error.value.decode()


def test_the_demo_store_reads_alike() -> None:
    expected = load_index(DEMO)
    index = core.lib.em_index_open(str(DEMO).encode(), None, 0)
    found = index.contents
    assert found.hidden == expected.hidden
    assert found.max_record_bytes == expected.max_record_bytes
    assert Path(found.experts_path.decode()) == DEMO / "experts.safetensors"
    layers = found.layers[: found.num_layers]
    assert {layer.layer: layer.num_experts for layer in layers} == expected.layer_to_num_experts
    assert found.num_records == len(expected.records)
    for key, ((layer, expert), record) in enumerate(sorted(expected.records.items())):
        native, layout = found.records[key], record.layout
        assert core.lib.em_index_key(index, layer, expert) == key
        assert (native.offset, native.num_bytes) == (record.offset, record.num_bytes)
        assert native.down_offset == layout.down_offset
        assert (native.crc_gate_up, native.crc_down) == record.crc32c
        for name, spec in (("gate_up", layout.gate_up), ("down", layout.down)):
            assert bytes(getattr(native, name)) == bytes(core.Format.of(spec)), name
    core.lib.em_index_close(index)


@pytest.mark.parametrize("change", ["none", "width", "expert", "version", "spec", "shorter"])
def test_what_python_refuses_is_refused(change: str, tmp_path: Path) -> None:
    for name in ("config.json", "store.json", "experts.safetensors", "trunk.safetensors"):
        shutil.copy(DEMO / name, tmp_path)
    document = json.loads((tmp_path / "store.json").read_text())
    if change == "width":
        document["layers"]["1"]["width"] += 64
    elif change == "expert":
        document["layers"]["1"]["experts"].pop()
    elif change == "version":
        document["format_version"] = 99
    elif change == "spec":
        document["layers"]["1"]["experts"][0][1] = len(document["specs"])
    elif change == "shorter":
        with open(tmp_path / "experts.safetensors", "r+b") as file:
            file.truncate(file.seek(0, 2) - 4096)
    (tmp_path / "store.json").write_text(json.dumps(document, indent=None, ensure_ascii=True))
    if change == "none":
        load_index(tmp_path)
        assert not native_error(tmp_path)
        return
    with pytest.raises(EdgeMoeError):
        load_index(tmp_path)
    assert native_error(tmp_path)
