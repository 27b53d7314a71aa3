"""Factored records: low-rank neurons beside dense ones, in the core, the twin and the index."""

import dataclasses

import kernel_cases as cases
import numpy as np
import pytest
import torch
from test_moe_step import exact_moe, twin

from edgemoe.runtime import core, kernels, reference
from edgemoe.runtime.errors import UsageError
from edgemoe.runtime.format import PAGE_BYTES, Factors, QuantSpec, RecordLayout

native = pytest.mark.skipif(core.lib is None, reason="native core not built")
HIDDEN, WIDTH = 128, 160
SPECS = (QuantSpec(8, 32, "sym"), QuantSpec(4, 32, "asym"), QuantSpec(2, 32, "sym"))


def layouts() -> list[RecordLayout]:
    """Factored in several formats, with and without dense neurons, and two that are not."""
    wide, thin, _ = SPECS
    bf16 = cases.SIXTEEN[0]
    parts = [
        (wide, wide, Factors(32, 32, wide)),
        (thin, wide, Factors(0, 64, thin)),
        (wide, thin, None),
        (bf16, bf16, Factors(64, 32, bf16)),
        (thin, bf16, Factors(96, 64, SPECS[2])),
        (bf16, wide, Factors(128, 32, bf16)),
        (wide, wide, Factors(0, 160, wide)),
        (bf16, bf16, None),
    ]
    return [RecordLayout(a, b, HIDDEN, WIDTH, factors) for a, b, factors in parts]


def some_experts(seed: int = 1) -> list[cases.Expert]:
    rng = np.random.default_rng(seed)
    return [cases.Expert(rng, layout) for layout in layouts()]


def test_the_layout_adds_up():
    layout = RecordLayout(*[QuantSpec(16, 0, "bf16")] * 2, 128, 160, Factors(32, 64, SPECS[0]))
    assert (layout.inner, layout.num_factored, layout.row_floats) == (96, 128, 160 + 3 * 64)
    assert layout.gate_up_bytes == 2 * 96 * 128 * 2
    (u_gate, u_up, v_down), u_bytes = layout.factor_places, SPECS[0].matrix_bytes(128, 64)
    assert u_gate == (layout.gate_up_bytes, 128, 64)
    assert u_up == (layout.gate_up_bytes + u_bytes, 128, 64)
    assert v_down == (layout.gate_up_bytes + 2 * u_bytes, 64, 128)
    end = v_down[0] + SPECS[0].matrix_bytes(64, 128)
    assert 0 <= layout.down_offset - end < PAGE_BYTES and layout.down_offset % PAGE_BYTES == 0
    assert layout.down_bytes == 128 * 96 * 2
    plain = RecordLayout(SPECS[0], SPECS[0], 128, 160)
    assert plain.inner == plain.row_floats == 160 and plain.factor_places == ()


@pytest.mark.parametrize("dense, rank", [(16, 32), (0, 48), (160, 32), (192, 32), (-32, 32)])
def test_a_layout_that_cannot_be_is_refused(dense, rank):
    with pytest.raises(UsageError, match="cannot be stored"):
        RecordLayout(SPECS[0], SPECS[0], 128, 160, Factors(dense, rank, SPECS[0]))


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=native)])
def test_a_record_gives_its_parts_back(backend):
    for expert in some_experts():
        dense = expert.layout.factors.dense if expert.layout.factors else WIDTH
        gate, up, down = kernels.unpack_record(expert.record, expert.layout, backend)
        assert gate.shape == up.shape == (WIDTH, HIDDEN) and down.shape == (HIDDEN, WIDTH)
        np.testing.assert_allclose(gate[:dense], expert.gate[:dense], rtol=1e-6)
        np.testing.assert_allclose(down[:, :dense], expert.down[:, :dense], rtol=1e-6)
        if expert.factors:
            u_gate, u_up, v_down = expert.factors
            np.testing.assert_allclose(gate[dense:], u_gate @ expert.gate[dense:], atol=1e-5)
            np.testing.assert_allclose(up[dense:], u_up @ expert.up[dense:], atol=1e-5)
            np.testing.assert_allclose(down[:, dense:], expert.down[:, dense:] @ v_down, atol=1e-5)


@native
@pytest.mark.parametrize("num_tokens", (1, 9, 90))  # one, tiles, panels where there are some
def test_factored_experts_match_the_float64_sum_and_the_twin(num_tokens):
    rng = np.random.default_rng(4)
    experts = some_experts()
    x = rng.normal(size=(num_tokens, HIDDEN)).astype(np.float32)
    pairs = [p or [(0, 1.0)] for p in cases.mixed_pairs(rng, len(experts), num_tokens)]
    with kernels.ThreadPool(2) as pool:
        y, status, _ = cases.run_moe(experts, pairs, x, pool)
    assert status == 0
    exact = exact_moe(experts, pairs, x)
    assert np.abs(y - exact).max() <= 3e-3 * np.abs(exact).max()  # h may round to the next int8
    near = twin(experts, pairs, x)
    assert np.abs(y - near).max() <= 0.03 * np.abs(near).max()


@native
def test_16bit_factors_match_the_twin_and_the_product():
    rng = np.random.default_rng(6)
    bf16, fp16 = cases.SIXTEEN
    experts = [
        cases.Expert(rng, RecordLayout(a, b, HIDDEN, WIDTH, Factors(dense, rank, a)))
        for a, b, dense, rank in ((bf16, bf16, 32, 32), (fp16, bf16, 0, 96))
    ]
    x = rng.normal(size=(19, HIDDEN)).astype(np.float32)
    pairs = cases.mixed_pairs(rng, len(experts), len(x))
    y, status, _ = cases.run_moe(experts, pairs, x)
    near = twin(experts, pairs, x)
    assert status == 0 and np.abs(y - near).max() <= 2e-6 * max(1, np.abs(near).max())
    whole = torch.zeros(x.shape)  # the same, of the weights multiplied out
    for expert, part in zip(experts, pairs, strict=True):
        parts = kernels.unpack_record(expert.record, expert.layout)
        gate, up, down = map(torch.from_numpy, parts)
        for t, weight in part:
            row = torch.from_numpy(x[t])
            whole[t] += weight * (down @ (torch.nn.functional.silu(gate @ row) * (up @ row)))
    assert np.abs(y - whole.numpy()).max() <= 1e-5 * max(1, np.abs(near).max())


@native
def test_factored_experts_have_the_same_bits_for_every_batch_and_thread_count():
    rng = np.random.default_rng(10)
    experts = some_experts()
    num_tokens = 300  # more pairs than one batch of intermediate rows holds
    x = rng.normal(size=(num_tokens, HIDDEN)).astype(np.float32)
    pairs = cases.mixed_pairs(rng, len(experts), num_tokens)
    together, status, _ = cases.run_moe(experts, pairs, x)
    assert status == 0
    for threads in (2, 3):
        with kernels.ThreadPool(threads) as pool:
            y, status, _ = cases.run_moe(experts, pairs, x, pool)
            assert status == 0 and y.tobytes() == together.tobytes()
    for t in (0, 7, 299):
        own = [[(0, w) for token, w in part if token == t] for part in pairs]
        y, status, _ = cases.run_moe(experts, own, x[t : t + 1])
        assert status == 0 and y.tobytes() == together[t : t + 1].tobytes()


@native
def test_what_calibration_collects_is_that_of_the_neurons():
    rng = np.random.default_rng(3)
    experts = some_experts()
    x = rng.normal(size=(30, HIDDEN)).astype(np.float32)
    pairs = [[(t, 1.0) for t in range(30)] for _ in experts]
    squares = np.zeros((len(experts), WIDTH), dtype=np.float32)
    _, status, _ = cases.run_moe(experts, pairs, x, hidden_square=squares)
    seen = []
    listed = [(e.record, e.layout, np.arange(30), np.ones(30, np.float32)) for e in experts]
    reference.experts_forward(x, listed, np.zeros_like(x), lambda h, _: seen.append(h))
    assert status == 0
    for own, h in zip(squares, seen, strict=True):
        expected = np.square(h).sum(axis=0)
        assert np.abs(own - expected).max() <= 0.03 * expected.max()


@native
def test_a_record_that_does_not_add_up_is_refused():
    layout = layouts()[0]
    expert = cases.Expert(np.random.default_rng(0), layout)
    x = np.ones((1, HIDDEN), dtype=np.float32)
    assert cases.run_moe([expert], [[(0, 1.0)]], x)[1] == 0
    for change in ({"dense": 48}, {"rank": -32}, {"dense": -32}, {"dense": WIDTH}):
        wrong = cases.Expert.__new__(cases.Expert)
        wrong.record = expert.record
        wrong.layout = _Described(layout, change)
        assert cases.run_moe([wrong], [[(0, 1.0)]], x)[1] < 0, change


class _Described:
    """A layout whose factors are not checked."""

    def __init__(self, layout: RecordLayout, change: dict[str, int]) -> None:
        self._layout = layout
        self.factors = _Loose(**(dataclasses.asdict(layout.factors) | change))
        self.factors.spec = layout.factors.spec

    def __getattr__(self, name: str):
        return getattr(self._layout, name)


class _Loose:
    def __init__(self, **values: int) -> None:
        self.__dict__.update(values)
