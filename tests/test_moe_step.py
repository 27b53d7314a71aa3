"""The experts of one layer in the core: against float64 and the twin, and its promises on bits."""

import ctypes
from pathlib import Path

import kernel_cases as cases
import numpy as np
import pytest

from edgemoe.runtime import core, kernels, reference
from edgemoe.runtime.format import RecordLayout
from edgemoe.runtime.index import ExpertRecord
from edgemoe.runtime.io import ABSENT, ERR_ARG, ERR_CRC, READING, Arena, RecordReader

pytestmark = pytest.mark.skipif(core.lib is None, reason="native core not built")


@pytest.fixture(scope="module")
def pools():
    made = [None, kernels.ThreadPool(1), kernels.ThreadPool(2), kernels.ThreadPool(5)]
    yield made
    for pool in made[1:]:
        pool.close()


def twin(experts, pairs, x) -> np.ndarray:
    y = np.zeros(x.shape, dtype=np.float32)
    listed = (
        (
            expert.record,
            expert.layout,
            np.array([t for t, _ in part], dtype=np.int64),
            np.array([w for _, w in part], dtype=np.float32),
        )
        for expert, part in zip(experts, pairs, strict=True)
    )
    reference.experts_forward(x, listed, y)
    return y


def exact_moe(experts, pairs, x) -> np.ndarray:
    y = np.zeros(x.shape)
    for expert, part in zip(experts, pairs, strict=True):
        for t, weight in part:
            y[t] += np.float32(weight) * expert.forward(x[t : t + 1])[0]
    return y


def test_experts_with_mixed_formats(pools):
    rng = np.random.default_rng(8)
    experts = cases.mixed_experts(rng)
    x = rng.normal(size=(19, 128)).astype(np.float32)
    pairs = cases.mixed_pairs(rng, len(experts), len(x))
    y, status, args = cases.run_moe(experts, pairs, x, pools[2])
    assert (status, args.failed) == (0, -1)
    exact = exact_moe(experts, pairs, x)
    assert np.abs(y - exact).max() <= 2e-3 * np.abs(exact).max()  # h may round to the next int8
    near = twin(experts, pairs, x)
    assert np.abs(y - near).max() <= 0.03 * np.abs(near).max()


@pytest.mark.parametrize("num_tokens", (1, 19, 90))  # one, tiles, panels where there are some
def test_norms_and_second_moments_are_those_of_the_twin(num_tokens: int, pools):
    rng = np.random.default_rng(3)
    experts = cases.mixed_experts(rng)
    x = rng.normal(size=(num_tokens, 128)).astype(np.float32)
    pairs = [p or [(0, 1.0)] for p in cases.mixed_pairs(rng, len(experts), num_tokens)]
    begin = np.cumsum([0] + [len(part) for part in pairs])
    plain, _, _ = cases.run_moe(experts, pairs, x, pools[2])
    norms = np.full(begin[-1] + 4, -1, dtype=np.float32)
    squares = np.zeros((len(experts), 128), dtype=np.float32)
    y, status, _ = cases.run_moe(
        experts, pairs, x, pools[2], pair_norm=norms, hidden_square=squares
    )
    assert status == 0 and (norms[begin[-1] :] == -1).all()
    assert y.tobytes() == plain.tobytes()
    expected_norms, expected_squares = [], []
    for expert, part in zip(experts, pairs, strict=True):
        inputs = x[[t for t, _ in part]]
        a = cases.activations(inputs, expert.layout.gate_up)
        gate, up = a @ expert.gate.T, a @ expert.up.T
        h = gate / (1 + np.exp(-gate)) * up
        expected_squares.append((h**2).sum(axis=0))
        expected_norms += np.linalg.norm(expert.forward(inputs), axis=1).tolist()
    np.testing.assert_allclose(norms[: begin[-1]], expected_norms, rtol=2e-3)
    np.testing.assert_allclose(squares, expected_squares, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", (48, 64, 16))
def test_16bit_experts_match_the_twin(width: int, pools):
    rng = np.random.default_rng(9)
    layouts = [RecordLayout(spec, spec, 96, width) for spec in cases.SIXTEEN]
    layouts.append(RecordLayout(cases.SIXTEEN[0], cases.SIXTEEN[1], 96, width))
    experts = [cases.Expert(rng, layout) for layout in layouts]
    x = rng.normal(size=(9, 96)).astype(np.float32)
    pairs = cases.mixed_pairs(rng, len(experts), len(x))
    y, status, _ = cases.run_moe(experts, pairs, x, pools[2])
    near = twin(experts, pairs, x)
    assert status == 0
    assert np.abs(y - near).max() <= 2e-6 * max(1, np.abs(near).max())


def test_experts_have_the_same_bits_for_every_batch_and_thread_count(pools):
    rng = np.random.default_rng(10)
    experts = cases.mixed_experts(rng)
    num_tokens = 300  # more pairs than one batch of intermediate rows holds
    x = rng.normal(size=(num_tokens, 128)).astype(np.float32)
    pairs = cases.mixed_pairs(rng, len(experts), num_tokens)
    together, status, _ = cases.run_moe(experts, pairs, x, pools[2])
    assert status == 0
    for pool in (pools[0], pools[3]):
        assert cases.run_moe(experts, pairs, x, pool)[0].tobytes() == together.tobytes()
    for t in (0, 7, num_tokens - 1):
        own = [[(0, w) for token, w in part if token == t] for part in pairs]
        alone, _, _ = cases.run_moe(experts, own, x[t : t + 1], pools[2])
        assert alone[0].tobytes() == together[t].tobytes()


def test_experts_of_few_and_of_many_tokens_agree(pools):
    rng = np.random.default_rng(14)
    experts = cases.mixed_experts(rng, 640, 256)
    x = rng.normal(size=(140, 640)).astype(np.float32)
    x[2], x[5] = 0, x[5] * 1e20
    for num in (5, 6, 15, 16, 17, 33, 140):
        pairs = [[(t, 0.5) for t in range(max(0, num - i))] for i in range(len(experts))]
        together, status, _ = cases.run_moe(experts, pairs, x[:num], pools[2])
        assert status == 0
        for t in range(num):
            own = [[(0, w) for token, w in part if token == t] for part in pairs]
            alone, _, _ = cases.run_moe(experts, own, x[t : t + 1])
            assert alone[0].tobytes() == together[t].tobytes(), (num, t)


class Stored:
    """Experts in a file, as a reader sees them, and an arena for all of them."""

    def __init__(self, experts: list[cases.Expert], folder: Path) -> None:
        self.file = folder / "records"
        self.file.write_bytes(b"".join(expert.record.tobytes() for expert in experts))
        ends = np.cumsum([expert.layout.num_bytes for expert in experts])
        self.offsets = np.concatenate(([0], ends[:-1])).astype(np.uint64)
        self.keys = np.arange(len(experts), dtype=np.int32)
        self.records = []
        for offset, expert in zip(self.offsets.tolist(), experts, strict=True):
            sections = np.split(expert.record, [expert.layout.down_offset])
            crcs = tuple(kernels.crc32c(part) for part in sections)
            self.records.append(ExpertRecord(offset, expert.layout, crcs))
        self.arena = Arena(int(ends[-1]), "native")
        self.addresses = np.uint64(self.arena.address) + self.offsets

    def reader(self, io: str = "auto") -> RecordReader:
        return RecordReader(self.file, self.records, 2, io, "native")

    def submit(self, reader: RecordReader, part: slice) -> None:
        reader.submit(self.keys[part], self.addresses[part])


@pytest.fixture
def streamed(tmp_path: Path):
    rng = np.random.default_rng(11)
    experts = cases.mixed_experts(rng)
    x = rng.normal(size=(5, 128)).astype(np.float32)
    stored = Stored(experts, tmp_path)
    yield experts, cases.mixed_pairs(rng, len(experts), len(x)), x, stored
    stored.arena.close()


@pytest.mark.parametrize("io", ("auto", "buffered"))
def test_streamed_experts_have_the_bits_of_resident_ones(io: str, streamed, pools):
    experts, pairs, x, stored = streamed
    resident, _, _ = cases.run_moe(experts, pairs, x, pools[2])
    for num_present in (0, 3):
        with stored.reader(io) as reader:
            for key in range(num_present):
                stored.submit(reader, slice(key, key + 1))
                reader.wait(key)
            stored.submit(reader, slice(num_present, None))
            y, status, args = cases.run_moe(
                experts, pairs, x, pools[2], reader.handle, stored.addresses
            )
            assert (status, args.failed) == (0, -1)
            assert args.stall_ns >= 0
            assert y.tobytes() == resident.tobytes()


def test_more_streamed_pairs_than_rows_have_the_bits_of_resident_ones(streamed, pools):
    experts, _, _, stored = streamed
    rng = np.random.default_rng(13)
    x = rng.normal(size=(300, 128)).astype(np.float32)
    pairs = cases.mixed_pairs(rng, len(experts), len(x))
    assert sum(map(len, pairs)) > 2 * len(x)  # more than are held at a time
    resident, _, _ = cases.run_moe(experts, pairs, x, pools[2])
    with stored.reader() as reader:
        stored.submit(reader, slice(None, None, -1))
        y, status, _ = cases.run_moe(experts, pairs, x, pools[2], reader.handle, stored.addresses)
        assert status == 0 and y.tobytes() == resident.tobytes()


@pytest.mark.parametrize("section", ("gate_up", "down"))
def test_a_damaged_record_is_named_and_nothing_stays_in_flight(section: str, streamed, pools):
    experts, pairs, x, stored = streamed
    damaged = bytearray(stored.file.read_bytes())
    section_offset = experts[2].layout.down_offset if section == "down" else 0
    damaged[int(stored.offsets[2]) + section_offset + 100] ^= 4
    stored.file.write_bytes(damaged)
    with stored.reader() as reader:
        stored.submit(reader, slice(None))
        _, status, args = cases.run_moe(
            experts, pairs, x, pools[2], reader.handle, stored.addresses
        )
        assert args.failed == 2
        assert status == reader.status[2] == ERR_CRC
        assert not (reader.status == READING).any()


def test_a_record_nobody_asked_for_is_refused(streamed, pools):
    experts, pairs, x, stored = streamed
    with stored.reader() as reader:
        stored.submit(reader, slice(1, None))
        _, status, args = cases.run_moe(
            experts, pairs, x, pools[2], reader.handle, stored.addresses
        )
        assert (status, args.failed, reader.status[0]) == (ERR_ARG, 0, ABSENT)
        assert not (reader.status == READING).any()


def test_wrong_arguments_are_refused():
    rng = np.random.default_rng(12)
    experts = cases.mixed_experts(rng)[:1]
    y, status, args = cases.run_moe(experts, [[]], np.ones((1, 128), np.float32))
    assert status == 0 and not y.any()
    args.hidden = 100  # no multiple of 16
    assert core.lib.em_moe_run(None, None, None, ctypes.byref(args)) == ERR_ARG
    args.hidden = 128  # but neither a store nor records
    assert core.lib.em_moe_run(None, None, None, ctypes.byref(args)) == ERR_ARG
