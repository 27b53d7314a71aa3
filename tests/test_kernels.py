"""Packing and linear layers against float64, and their promises on bits."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import kernel_cases as cases
import numpy as np
import pytest

from edgemoe.runtime import core, kernels, reference
from edgemoe.runtime.errors import EdgeMoeError, UsageError
from edgemoe.runtime.format import QuantSpec

native = pytest.mark.skipif(core.lib is None, reason="native core not built")
BACKENDS = [pytest.param("native", marks=native), "reference"]
ALL = cases.QUANTIZED + cases.SIXTEEN
some = pytest.mark.parametrize("spec", ALL, ids=cases.label)


def matrix_of(part, rows, cols, spec, backend=None) -> kernels.PackedMatrix:
    data = cases.pack(part, spec)
    return kernels.PackedMatrix.from_packed(data, rows, cols, spec, backend)


@pytest.fixture(scope="module")
def pools():
    made = [None, kernels.ThreadPool(1), kernels.ThreadPool(2), kernels.ThreadPool(5)]
    yield made
    for pool in made[1:]:
        pool.close()


@some
@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_are_what_the_layout_says(spec: QuantSpec, backend: str):
    rng = np.random.default_rng(1)
    for rows, groups in ((37, 3), (16, 1), (32, 2)):
        cols = groups * (spec.group_size or 6)
        part = cases.random_part(rng, rows, cols, spec)
        packed = cases.pack(part, spec, backend)
        assert packed.tobytes() == cases.expected_tiles(part, rows, cols, spec).tobytes()
        weights = kernels.unpack(packed, rows, cols, spec, backend)
        np.testing.assert_array_equal(weights, cases.weights_of(part, spec).astype(np.float32))
        matrix = matrix_of(part, rows, cols, spec, backend)
        ids = np.array([rows - 1, 0, 5])
        np.testing.assert_array_equal(matrix.rows_of(ids), weights[ids])


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_16bit_words_survive(backend: str):
    words = np.arange(65536, dtype=np.uint16).reshape(64, 1024)
    for spec in cases.SIXTEEN:
        values = kernels.unpack(kernels.pack_16bit(words, spec, backend), 64, 1024, spec, backend)
        with np.errstate(invalid="ignore"):
            expected = cases.weights_of(words, spec).astype(np.float32)
        np.testing.assert_array_equal(values, expected)  # NaN equals NaN here


@pytest.mark.parametrize("backend", BACKENDS)
def test_records_round_trip(backend: str):
    rng = np.random.default_rng(2)
    for expert in cases.mixed_experts(rng):
        layout = expert.layout
        parts = kernels.unpack_record(expert.record, layout, backend)
        for part, weights in zip(parts, (expert.gate, expert.up, expert.down), strict=True):
            np.testing.assert_array_equal(part, weights.astype(np.float32))
        assert not expert.record[layout.gate_up_bytes : layout.down_offset].any()
        assert not expert.record[layout.down_offset + layout.down_bytes :].any()


@native
@some
def test_linear_against_float64(spec: QuantSpec, pools):
    rng = np.random.default_rng(3)
    for rows, groups in ((37, 3), (64, 4)):
        cols = groups * (spec.group_size or 50)
        part = cases.random_part(rng, rows, cols, spec)
        x = (rng.normal(size=(13, cols)) * 10.0 ** rng.integers(-6, 6, (13, 1))).astype(np.float32)
        bias = rng.normal(size=rows).astype(np.float32)
        y = matrix_of(part, rows, cols, spec).linear(x, bias, pools[2])
        exact = cases.activations(x, spec) @ cases.weights_of(part, spec).T + bias
        error = np.abs(y - exact).max(axis=1) / np.abs(exact).max(axis=1)
        assert error.max() <= 2e-6


@some
def test_reference_linear_against_float64(spec: QuantSpec):
    rng = np.random.default_rng(4)
    rows, cols = 37, 3 * (spec.group_size or 50)
    part = cases.random_part(rng, rows, cols, spec)
    x = rng.normal(size=(3, cols)).astype(np.float32)
    y = matrix_of(part, rows, cols, spec, "reference").linear(x)
    exact = x.astype(np.float64) @ cases.weights_of(part, spec).T
    np.testing.assert_allclose(y, exact, atol=2e-6 * np.abs(exact).max())


@native
@some
def test_a_row_has_the_same_bits_in_every_batch(spec: QuantSpec, pools):
    rng = np.random.default_rng(6)
    rows, cols, num_tokens = 80, 5 * (spec.group_size or 26), 23
    matrix = matrix_of(cases.random_part(rng, rows, cols, spec), rows, cols, spec)
    x = rng.normal(size=(num_tokens, cols)).astype(np.float32)
    alone = np.concatenate([matrix.linear(x[t : t + 1]) for t in range(num_tokens)])
    for pool in pools:
        for size in (2, 3, 7, 8, 15, num_tokens):
            parts = [matrix.linear(x[t : t + size], None, pool) for t in range(0, 23, size)]
            assert np.array_equal(np.concatenate(parts), alone)
    turned = np.arange(num_tokens)[::-1]
    assert np.array_equal(matrix.linear(x[turned], None, pools[2])[turned], alone)


@native
@some
def test_extreme_values(spec: QuantSpec, pools):
    rng = np.random.default_rng(7)
    rows, cols = 16, 2 * (spec.group_size or 64)
    matrix = matrix_of(cases.random_part(rng, rows, cols, spec), rows, cols, spec)
    x = rng.normal(size=(8, cols)).astype(np.float32)
    usual = matrix.linear(x)
    x[0] = 0
    x[1, 3], x[2, 4], x[3, 5] = np.nan, np.inf, -np.inf
    x[4], x[5], x[6] = 1e-45, 3e38, -3e38
    y = matrix.linear(x, None, pools[2])
    assert (y[0] == 0).all()
    assert not np.isfinite(y[1:4]).any()
    assert (np.abs(y[4]) < 1e-40).all()
    np.testing.assert_array_equal(y[7], usual[7])
    assert matrix.linear(np.zeros((0, cols), np.float32)).shape == (0, rows)


@native
@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("mode", ("sym", "asym"))
def test_largest_codes_and_activations_do_not_saturate(bits: int, mode: str):
    rows, cols, spec = 16, 128, QuantSpec(bits, 32, mode)
    for code in (0, (1 << bits) - 1):
        codes = np.full((rows, cols), code, dtype=np.uint8)
        ones = np.ones((rows, cols // 32), dtype=np.float16)
        part = codes, ones, None if mode == "sym" else -ones
        for x in (np.ones((1, cols), np.float32), -np.ones((1, cols), np.float32)):
            y = matrix_of(part, rows, cols, spec).linear(x)
            exact = x.astype(np.float64) @ cases.weights_of(part, spec).T
            np.testing.assert_allclose(y, exact, rtol=1e-6)


@native
@some
def test_every_number_of_tokens_has_the_bits_of_one(spec: QuantSpec, pools):
    rng = np.random.default_rng(17)
    for rows, groups in ((70, 5), (48, 1), (80, 21)):  # one block of columns, several, odd tails
        cols = groups * (spec.group_size or 26)
        matrix = matrix_of(cases.random_part(rng, rows, cols, spec), rows, cols, spec)
        x = rng.normal(size=(150, cols)).astype(np.float32)
        x[3], x[9], x[20] = 0, x[9] * 1e30, x[20] * 1e-30
        bias = rng.normal(size=rows).astype(np.float32)
        x = x
        alone = np.concatenate([matrix.linear(x[t : t + 1], bias) for t in range(len(x))])
        for num in (*range(2, 34), 63, 128, 129, 150):
            assert np.array_equal(matrix.linear(x[:num], bias, pools[2]), alone[:num]), num


@native
def test_every_instruction_set_gives_the_same_bits():
    program = Path(cases.__file__)
    levels = {}
    for level in ("scalar", "avx2", "avxvnni", "avx512vnni", "amx"):
        env = os.environ | {"EDGEMOE_ISA": level, "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        done = subprocess.run(
            [sys.executable, program], env=env, capture_output=True, text=True, check=True
        )
        result = json.loads(done.stdout)
        if result["isa"] == level:
            assert done.stderr == ""
            levels[level] = result["digests"]
        else:
            assert f"`EDGEMOE_ISA={level}` is unknown or not available" in done.stderr
    assert "scalar" in levels
    for level, digests in levels.items():
        assert digests == levels["scalar"], level


@native
def test_a_pool_may_be_shared_by_threads(pools):
    rng = np.random.default_rng(13)
    spec = QuantSpec(4, 64, "sym")
    matrix = matrix_of(cases.random_part(rng, 256, 256, spec), 256, 256, spec)
    x = rng.normal(size=(4, 256)).astype(np.float32)
    expected = matrix.linear(x)
    wrong = []

    def call() -> None:
        for _ in range(50):
            if not np.array_equal(matrix.linear(x, None, pools[2]), expected):
                wrong.append(1)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_arguments_are_named(backend: str):
    spec = QuantSpec(4, 64, "sym")
    codes, scales = np.zeros((16, 64), np.uint8), np.zeros((16, 1), np.float16)
    matrix = kernels.PackedMatrix.from_16bit(np.zeros((16, 8), dtype=kernels.BF16), backend)
    with pytest.raises(UsageError, match="not a multiple of 64"):
        kernels.pack_codes(codes[:, :32], scales, None, spec, backend)
    with pytest.raises(UsageError, match="mins"):
        kernels.pack_codes(codes, scales, scales, spec, backend)
    with pytest.raises(UsageError, match="expected fp16"):
        kernels.pack_codes(codes, scales[:8], None, spec, backend)
    with pytest.raises(UsageError, match="activations"):
        matrix.linear(np.zeros((2, 7), np.float32))
    with pytest.raises(UsageError, match="not all in 0 .. 15"):
        matrix.rows_of(np.array([3, 16]))
    with pytest.raises(EdgeMoeError):
        kernels.ThreadPool(0)


def test_large_reference_matrices_warn_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "_warned", False)
    monkeypatch.setattr(reference, "LARGE_WEIGHTS", 100)
    matrix = kernels.PackedMatrix.from_16bit(np.zeros((16, 8), dtype=kernels.BF16), "reference")
    with pytest.warns(UserWarning, match="slow") as caught:
        matrix.linear(np.zeros((1, 8), np.float32))
        matrix.linear(np.zeros((1, 8), np.float32))
    assert len(caught) == 1
