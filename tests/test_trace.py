"""Trace files: what is written comes back, .npz goes through, what is no trace is refused."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from edgemoe.runtime.errors import EdgeMoeError, FormatError, NotFoundError
from edgemoe.runtime.trace import Trace


def arrays(steps: int = 6, num_experts: tuple[int, ...] = (8, 5, 8), k: int = 2) -> dict:
    rng = np.random.default_rng(3)
    experts = np.stack(
        [[rng.permutation(n)[:k] for n in num_experts] for _ in range(steps)]
    ).astype(np.int16)
    experts[0, 1] = -1
    return {
        "experts": experts,
        "weights": rng.random(experts.shape).astype(np.float32),
        "phase": np.array([0, 0] + [1] * (steps - 2), dtype=np.int8),
        "expert_bytes": np.array([4096, 8192, 4096]),
        "num_experts": np.array(num_experts),
    }


def test_what_is_written_comes_back(tmp_path):
    trace = Trace(**arrays(), model="tiny", metadata={"store": "abc"})
    trace.save(tmp_path / "a.trace")
    again = Trace.load(tmp_path / "a.trace")
    for name in ("experts", "weights", "phase", "expert_bytes", "num_experts"):
        assert np.array_equal(getattr(trace, name), getattr(again, name))
    assert again.model == "tiny" and again.metadata == {"store": "abc"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.trace"]


def test_keys_and_bytes_count_as_a_store_does():
    trace = Trace(**arrays())
    keys = trace.keys()
    assert keys.shape == trace.experts.shape and (keys[0, 1] == -1).all()
    assert np.array_equal(keys[2], trace.experts[2] + np.array([[0], [8], [13]]))
    assert trace.num_keys == 21 and trace.place_of_key.tolist() == [0] * 8 + [1] * 5 + [2] * 8
    assert trace.table_bytes == 8 * 4096 + 5 * 8192 + 8 * 4096
    assert trace.cycle_bytes == 2 * (4096 + 8192 + 4096)


def test_records_of_one_place_may_differ(tmp_path):
    sizes = np.arange(1, 22) * 4096
    trace = Trace(**arrays(), record_bytes=sizes)
    trace.save(tmp_path / "a.trace")
    assert Trace.load(tmp_path / "a.trace").table_bytes == sizes.sum()


def test_a_npz_of_any_shape_goes_through(tmp_path):
    given = arrays(k=5, num_experts=(9, 9, 9))
    given |= {"num_experts": np.array(9), "model": np.array("Some-Model-9E")}
    np.savez_compressed(tmp_path / "t.npz", **given)
    trace = Trace.load(tmp_path / "t.npz")
    assert trace.model == "Some-Model-9E" and trace.num_experts.tolist() == [9, 9, 9]
    assert np.array_equal(trace.experts, given["experts"])
    del given["weights"], given["phase"]
    np.savez(tmp_path / "t.npz", **given)
    trace = Trace.load(tmp_path / "t.npz")
    assert trace.weights is None and trace.phase.all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": np.zeros((6, 3, 2))}, "`experts` are no integers.*float64"),
        ({"experts": np.zeros((6, 6), dtype=np.int16)}, "`experts` has the wrong shape"),
        ({"experts": np.zeros((0, 3, 2), dtype=np.int16)}, "no steps"),
        ({"experts": np.full((6, 3, 2), -2, dtype=np.int16)}, "step 0, place 0.*no expert -2"),
        ({"experts": np.full((6, 3, 2), 8, dtype=np.int64)}, "no expert 8.*0 to 7"),
        ({"experts": np.full((6, 3, 2), 1 << 40)}, "`experts` are out of range"),
        ({"weights": np.zeros((6, 3, 1), dtype=np.float32)}, "`weights` has the wrong shape"),
        ({"weights": np.full((6, 3, 2), np.nan, dtype=np.float32)}, "`weights` are not finite"),
        ({"weights": np.zeros((6, 3, 2), dtype=np.int8)}, "`weights` are no floats"),
        ({"phase": np.array([0, 1, 2, 1, 1, 1], dtype=np.int8)}, "`phase` are out of range"),
        ({"phase": np.zeros(5, dtype=np.int8)}, "`phase` has the wrong shape"),
        ({"expert_bytes": np.array([4096, 0, 4096])}, "`expert_bytes` are out of range"),
        ({"expert_bytes": np.array([4096, 4096])}, "`expert_bytes` has the wrong shape"),
        ({"num_experts": np.array([8, 5, 1 << 30])}, "`num_experts` are out of range"),
        ({"num_experts": np.array(["8"])}, "`num_experts` are no integers"),
        ({"record_bytes": np.ones(20, dtype=np.int64)}, "`record_bytes`"),
        ({"experts": np.array([[[0], [1, 2]]], dtype=object)}, "damaged or odd"),
    ],
)
def test_a_wrong_array_is_named(tmp_path, change, message):
    np.savez(tmp_path / "t.npz", **arrays() | change)
    with pytest.raises(FormatError, match=message) as caught:
        Trace.load(tmp_path / "t.npz")
    assert "t.npz" in str(caught.value)


@pytest.mark.parametrize("name", ["experts", "num_experts", "expert_bytes"])
def test_a_missing_array_is_named(tmp_path, name):
    given = arrays()
    del given[name]
    np.savez(tmp_path / "t.npz", **given)
    with pytest.raises(FormatError, match=f"no array `{name}`"):
        Trace.load(tmp_path / "t.npz")


@pytest.mark.parametrize("ending", ["npz", "trace"])
def test_damaged_files_are_refused_whatever_is_cut_or_flipped(tmp_path, ending):
    path = tmp_path / f"t.{ending}"
    if ending == "npz":
        np.savez_compressed(path, **arrays())
    else:
        Trace(**arrays()).save(path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for length in [0, 1, 3, 4, 7, 8, 9, *rng.integers(10, len(whole), 20)]:
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError):
            Trace.load(path)
    for position in rng.integers(0, len(whole), 200):
        broken = bytearray(whole)
        broken[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        try:
            Trace.load(path)  # a routing weight may differ unseen
        except EdgeMoeError:
            pass


def test_other_files_are_no_traces(tmp_path: Path):
    save_file({"experts": np.zeros((1, 1, 1), dtype=np.int16)}, tmp_path / "other.safetensors")
    with pytest.raises(FormatError, match="not a trace"):
        Trace.load(tmp_path / "other.safetensors")
    meta = {"format": "edgemoe-trace", "version": "9"}
    save_file({"experts": np.zeros((1, 1, 1), dtype=np.int16)}, tmp_path / "new.trace", meta)
    with pytest.raises(FormatError, match="version 9"):
        Trace.load(tmp_path / "new.trace")
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(FormatError, match="neither"):
        Trace.load(tmp_path / "text.txt")
    with pytest.raises(NotFoundError, match="edgemoe trace record"):
        Trace.load(tmp_path / "none.trace")
