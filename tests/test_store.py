"""An open store: keys, trunk tensors, checks, and damage of every kind told by name."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from stores import damage_record, make_store, trunk_names

from edgemoe.runtime import core, kernels
from edgemoe.runtime import store as store_module
from edgemoe.runtime.errors import EdgeMoeError, FormatError, NotFoundError, RecordError
from edgemoe.runtime.format import QuantSpec, record_name
from edgemoe.runtime.headers import encode_header
from edgemoe.runtime.index import (
    EXPERTS_FILE,
    STORE_FILE,
    TRUNK_FILE,
    PackedTensor,
    load_index,
    save_index,
)
from edgemoe.runtime.io import ERR_CRC, READY, Arena
from edgemoe.runtime.memory import Pile
from edgemoe.runtime.packing import BF16, to_bf16
from edgemoe.runtime.store import Store, file_sha256

BACKENDS = ["reference"] + (["native"] if core.lib else [])


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def index(tmp_path):
    return make_store(tmp_path / "tiny.edgemoe", num_layers=3, num_experts=4)


def test_keys_follow_layer_and_expert(index, backend):
    with Store(index.path, backend=backend) as store:
        assert store.pairs == [(layer, expert) for layer in range(3) for expert in range(4)]
        assert store.layer_first_key == {0: 0, 1: 4, 2: 8}
        assert [store.key(*pair) for pair in store.pairs] == list(range(12))
        assert store.records == [index.records[pair] for pair in store.pairs]
        for layer, expert in [(3, 0), (0, 4), (0, -1), (-1, 0)]:
            with pytest.raises(NotFoundError, match="no expert record"):
                store.key(layer, expert)


def test_reads_what_safetensors_reads(index, backend):
    with (
        Store(index.path, backend=backend) as store,
        safe_open(index.path / EXPERTS_FILE, framework="np") as file,
        Arena(index.max_record_bytes, backend) as arena,
    ):
        for key, (layer, expert) in enumerate(store.pairs):
            store.reader.submit(np.array([key]), np.array([arena.address], dtype=np.uint64))
            assert store.reader.wait(key) == READY
            expected = file.get_tensor(record_name(layer, expert))
            np.testing.assert_array_equal(arena.view(0, expected.size), expected)


def write_trunk(index, tensors):
    """Replace the trunk by `tensors` (name -> array)."""
    names = {"float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8"}
    entries, data = [], []
    for name, tensor in tensors.items():
        raw = tensor.tobytes()
        dtype = "BF16" if tensor.dtype == BF16 else names[str(tensor.dtype)]
        entries.append((name, dtype, list(tensor.shape), len(raw)))
        data.append(raw)
    (index.path / TRUNK_FILE).write_bytes(encode_header(entries, {}) + b"".join(data))


def test_trunk_tensors(index, backend):
    rng = np.random.default_rng(0)
    spec = QuantSpec(8, 32, "sym")
    codes = rng.integers(0, 256, (48, 64), dtype=np.uint8)
    scales = rng.uniform(0.01, 0.02, (48, 2)).astype(np.float16)
    packed = kernels.pack_codes(codes, scales, None, spec)
    tensors = {
        "norm": rng.normal(size=7).astype(np.float32),
        "linear": to_bf16(rng.normal(size=(3, 5))),
        "half": rng.normal(size=(2, 3, 4)).astype(np.float16),
        "ids": np.arange(5),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "packed": packed,
    }
    write_trunk(index, tensors)
    index.packed_trunk["packed"] = PackedTensor(48, 64, spec)
    save_index(index)
    with Store(index.path, backend=backend) as store:
        assert trunk_names(index.path) == list(tensors)
        assert store.trunk_entry("linear").shape == (3, 5)
        for name in list(tensors)[:-1]:
            found = store.trunk_tensor(name)
            assert found.dtype == tensors[name].dtype and np.array_equal(found, tensors[name])
        matrix = store.trunk_tensor("packed")
        assert isinstance(matrix, kernels.PackedMatrix)
        expected = scales.astype(np.float32).repeat(32, 1) * (codes.astype(np.float32) - 128)
        np.testing.assert_array_equal(matrix.dequantize(), expected)
        with pytest.raises(NotFoundError, match="no tensor `other`"):
            store.trunk_tensor("other")


def test_trunk_that_contradicts_the_index(index):
    index.packed_trunk["embed"] = PackedTensor(24, 64, QuantSpec(8, 32, "sym"))
    save_index(index)
    with pytest.raises(FormatError, match="disagree"):
        Store(index.path)
    index.packed_trunk = {"other": PackedTensor(24, 64, QuantSpec(8, 32, "sym"))}
    save_index(index)
    with pytest.raises(FormatError, match="`other`"):
        Store(index.path)


def test_verify_names_every_damaged_record(index, backend):
    with Store(index.path, backend=backend) as store:
        assert list(store.verify()) == [(*pair, True) for pair in store.pairs]
        assert list(store.verify_files()) == [(EXPERTS_FILE, True), (TRUNK_FILE, True)]
    damage_record(index, 1, 2)
    damage_record(index, 2, 3)
    with Store(index.path, backend=backend) as store:
        bad = [(layer, expert) for layer, expert, ok in store.verify() if not ok]
        assert bad == [(1, 2), (2, 3)]
        assert list(store.verify_files()) == [(EXPERTS_FILE, False), (TRUNK_FILE, True)]
        with pytest.raises(RecordError, match=r"layers\.1\.experts\.2") as caught:
            store.check(store.key(1, 2), ERR_CRC)
        assert (caught.value.layer, caught.value.expert) == (1, 2)
        assert "checksum mismatch" in caught.value.why
        store.check(0, READY)


def test_verify_looks_again(index, backend):
    """A record that was read well once and then decays on disk is found."""
    with Store(index.path, backend=backend) as store:
        assert all(ok for *_, ok in store.verify())
        damage_record(index, 0, 0)
        assert [ok for *_, ok in store.verify()].count(False) == 1


def test_verify_can_be_left(index, backend):
    with Store(index.path, backend=backend) as store:
        for _ in range(20):  # with a read in flight
            assert next(store.verify()) == (0, 0, True)


def test_damaged_trunk(index):
    with open(index.path / TRUNK_FILE, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with Store(index.path) as store:
        assert dict(store.verify_files()) == {EXPERTS_FILE: True, TRUNK_FILE: False}


def test_truncated_while_open(index, backend):
    with Store(index.path, backend=backend) as store:
        os.truncate(index.path / EXPERTS_FILE, store.records[6].offset + 4096)
        assert [ok for *_, ok in store.verify()] == [True] * 6 + [False] * 6
        with pytest.raises(RecordError, match="short file"):
            with Arena(index.max_record_bytes, backend) as arena:
                store.reader.submit(np.array([6]), np.array([arena.address], dtype=np.uint64))
                store.check(6, store.reader.wait(6))
        os.truncate(index.path / TRUNK_FILE, 100)
        with pytest.raises(FormatError, match="truncated"):
            store.trunk_tensor("embed")
    for name in (EXPERTS_FILE, TRUNK_FILE):
        with pytest.raises(FormatError, match=name):
            Store(index.path)
        os.remove(index.path / name)
        with pytest.raises(FormatError, match=f"no `{name}`"):
            Store(index.path)
        (index.path / name).write_bytes(b"")
        with pytest.raises(FormatError, match="no safetensors file"):
            Store(index.path)
        make_store(index.path.parent / f"fresh-{name}", num_layers=3, num_experts=4)
        os.replace(index.path.parent / f"fresh-{name}" / name, index.path / name)


@pytest.mark.parametrize("name", [EXPERTS_FILE, TRUNK_FILE])
def test_a_missing_weight_file_is_named(index, name):
    (index.path / name).unlink()
    with pytest.raises(FormatError, match=f"has no `{name}`"):
        load_index(index.path)


def test_deleted_while_open(index, backend):
    with Store(index.path, backend=backend) as store:
        embed = store.trunk_tensor("embed")
        for file in index.path.iterdir():
            file.unlink()
        assert np.array_equal(store.trunk_tensor("embed"), embed)
        with Arena(index.max_record_bytes, backend) as arena:
            store.reader.submit(np.array([3]), np.array([arena.address], dtype=np.uint64))
            assert store.reader.wait(3) == READY
        with pytest.raises(NotFoundError, match=EXPERTS_FILE):
            next(store.verify())
        with pytest.raises(NotFoundError, match=EXPERTS_FILE):
            list(store.verify_files())


def change(path, **changes):
    document = json.loads(path.read_text())
    document.update(changes)
    path.write_text(json.dumps(document))


def test_stores_that_do_not_open(index, tmp_path):
    with pytest.raises(NotFoundError, match="no store"):
        Store(tmp_path / "nothing")
    with pytest.raises(NotFoundError, match="no edgemoe store"):
        Store(tmp_path)
    change(index.path / STORE_FILE, format_version=3)
    with pytest.raises(FormatError, match="format version 3.*up to version 2"):
        Store(index.path)
    change(index.path / STORE_FILE, format_version=1, format="other")
    with pytest.raises(FormatError, match="does not describe"):
        Store(index.path)
    change(index.path / STORE_FILE, format="edgemoe", hidden=128)
    with pytest.raises(FormatError, match="disagree"):
        Store(index.path)


def test_sha256_of_a_file(tmp_path, monkeypatch):
    import hashlib

    monkeypatch.setattr(store_module, "_BLOCK_BYTES", 1000)
    data = bytes(range(256)) * 20
    (tmp_path / "file").write_bytes(data)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


@pytest.fixture(scope="module")
def fuzz_index(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz") / "tiny.edgemoe"
    return make_store(path, num_layers=2, num_experts=2)


ODD_VALUES = [None, -1, 0, 1, 3, 10**30, 1.5, float("inf"), float("nan"), "x", "", "1", [], {}]
ODD_VALUES += [[1], [None], {"a": 1}, True, [[0, 0, 0, 0]], {"0": {"width": 64, "experts": []}}]


def mutated(value, random):
    """A JSON value with one place changed, removed, doubled or put under another name."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.15:
        return random.choice(ODD_VALUES)
    value = value.copy()
    place = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
    kind = random.random()
    if kind < 0.1:
        del value[place]
    elif kind < 0.2 and isinstance(value, dict):
        value[random.choice(["x", "1", "-1", "00"])] = value[place]
    elif kind < 0.2:
        value.append(value[place])
    else:
        value[place] = mutated(value[place], random)
    return value


@given(st.randoms(use_true_random=False), st.data())
@settings(max_examples=150, deadline=None)
def test_fuzzed_index(fuzz_index, random, data):
    """Whatever happens to the JSON of a store: it opens, or one of our errors comes out."""
    name = data.draw(st.sampled_from([STORE_FILE, EXPERTS_FILE, "config.json"]))
    path = fuzz_index.path / name
    original = path.read_bytes()
    length = int.from_bytes(original[:8], "little") if name == EXPERTS_FILE else 0
    text = original[8 : 8 + length] if length else original
    if data.draw(st.booleans()):
        text = json.dumps(mutated(json.loads(text), random)).encode()
    else:
        place = random.randrange(len(text))
        text = text[:place] + data.draw(st.binary(max_size=3)) + text[place + 1 :]
    if length:
        text = text.ljust(length)
        text = len(text).to_bytes(8, "little") + text + original[8 + length :]
    try:
        path.write_bytes(text)
        index = load_index(fuzz_index.path)
        assert all(0 <= crc < 1 << 32 for record in index.records.values() for crc in record.crc32c)
    except EdgeMoeError:
        pass
    finally:
        path.write_bytes(original)


def test_infinity_is_no_size(fuzz_index):
    original = (fuzz_index.path / STORE_FILE).read_text()
    try:
        for key, value in [("hidden", float("inf")), ("hidden", 0), ("specs", [1])]:
            change(fuzz_index.path / STORE_FILE, **{key: value})
            with pytest.raises(FormatError, match="malformed"):
                load_index(fuzz_index.path)
    finally:
        (fuzz_index.path / STORE_FILE).write_text(original)


def test_a_pile_hands_out_what_was_not_handed_out():
    pile = Pile(arena_bytes=8 << 20)
    sizes = (100, 3 << 20, (2 << 20) + 5, 4 << 20, 20 << 20, 2 << 20)
    pieces = [pile.take(size) for size in sizes]
    for i, piece in enumerate(pieces):
        piece[:] = i + 1
    for i, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
        assert piece.size == size and piece.ctypes.data % 64 == 0
        assert (piece == i + 1).all()
