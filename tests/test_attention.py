"""Attention and RMS norm of the core against float64, and their bits across every free choice."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.runtime import core

pytestmark = pytest.mark.skipif(core.lib is None, reason="native core not built")


def to_bf16(values: np.ndarray) -> np.ndarray:
    """fp32 -> bf16 words, rounded to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(words: np.ndarray) -> np.ndarray:
    return (words.astype(np.uint32) << 16).view(np.float32)


class Case:
    """Random queries and a filled KV cache; what lies behind the last key is NaN."""

    def __init__(self, tokens, heads, kv_heads, head_dim, position, kv_bits, window=0, seed=0):
        rng = np.random.default_rng(seed)
        self.shape = (tokens, heads, kv_heads, head_dim)
        self.position, self.window, self.kv_bits = position, window, kv_bits
        self.capacity = position + tokens + 3
        self.scale = head_dim**-0.5
        self.q = rng.standard_normal((tokens, heads, head_dim), dtype=np.float32) * 2
        kv = rng.standard_normal((2, kv_heads, self.capacity, head_dim), dtype=np.float32)
        kv[:, :, position + tokens :] = np.nan
        self.scales = None
        if kv_bits == 8:
            kv[:, :, position + tokens :] = 0
            self.scales = np.abs(kv).max(-1) / 127
            self.scales[:, :, position + tokens :] = np.nan
            self.kv = np.rint(kv / np.maximum(np.abs(kv).max(-1) / 127, 1e-9)[..., None])
            self.kv = self.kv.astype(np.int8)
            self.kv_values = self.kv * self.scales[..., None]
        else:
            self.kv = kv if kv_bits == 32 else to_bf16(kv)
            self.kv_values = kv if kv_bits == 32 else from_bf16(self.kv)

    def run(self, num_threads=1, first=0, last=None):
        """Tokens first..last in one call, as [tokens, heads, head_dim]."""
        tokens, heads, kv_heads, head_dim = self.shape
        last = tokens if last is None else last
        q = np.ascontiguousarray(self.q[first:last])
        out = np.full_like(q, 7)
        pool = core.lib.em_pool_create(num_threads)
        status = core.lib.em_attention(
            pool,
            q.ctypes.data,
            self.kv[0].ctypes.data,
            self.kv[1].ctypes.data,
            *([None] * 2 if self.scales is None else [part.ctypes.data for part in self.scales]),
            self.kv_bits,
            last - first,
            heads,
            kv_heads,
            head_dim,
            self.capacity,
            self.position + first,
            self.window,
            self.scale,
            out.ctypes.data,
        )
        core.lib.em_pool_destroy(pool)
        assert status == 0
        return out

    def expected(self):
        tokens, heads, kv_heads, _ = self.shape
        keys, values = self.kv_values.astype(np.float64)
        out = np.empty(self.q.shape)
        for t in range(tokens):
            end = self.position + t + 1
            begin = max(0, end - self.window) if self.window else 0
            for h in range(heads):
                kv_head = h // (heads // kv_heads)
                scores = keys[kv_head, begin:end] @ self.q[t, h].astype(np.float64) * self.scale
                weights = np.exp(scores - scores.max())
                out[t, h] = weights / weights.sum() @ values[kv_head, begin:end]
        return out


CASES = [
    # tokens, heads, kv_heads, head_dim, position, window
    (1, 4, 4, 128, 0, 0),
    (1, 4, 4, 128, 300, 0),
    (1, 8, 1, 64, 77, 0),
    (13, 4, 2, 64, 0, 0),
    (37, 6, 2, 128, 50, 0),
    (20, 4, 4, 32, 40, 5),
    (20, 8, 2, 96, 100, 48),
    (9, 4, 2, 40, 21, 0),  # head dimension that is no multiple of 16
    (9, 2, 2, 7, 3, 4),
    (3, 2, 2, 256, 33, 1),
]


@pytest.mark.parametrize("kv_bits", [32, 16, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_float64_rounded(case, kv_bits):
    tokens, heads, kv_heads, head_dim, position, window = case
    data = Case(tokens, heads, kv_heads, head_dim, position, kv_bits, window)
    np.testing.assert_allclose(data.run(2), data.expected(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("kv_bits", [32, 16, 8])
@pytest.mark.parametrize("case", [case for case in CASES if case[0] > 1], ids=str)
def test_rows_do_not_depend_on_company(case, kv_bits):
    tokens, heads, kv_heads, head_dim, position, window = case
    data = Case(tokens, heads, kv_heads, head_dim, position, kv_bits, window)
    whole = data.run().tobytes()
    for num_threads in (2, 3):
        assert data.run(num_threads).tobytes() == whole
    for step in (1, 2, 5):
        parts = [data.run(1, t, min(t + step, tokens)) for t in range(0, tokens, step)]
        assert np.concatenate(parts).tobytes() == whole


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_random_shapes(data):
    kv_heads = data.draw(st.integers(1, 3))
    case = Case(
        tokens=data.draw(st.integers(1, 20)),
        heads=kv_heads * data.draw(st.integers(1, 5)),
        kv_heads=kv_heads,
        head_dim=data.draw(st.sampled_from([2, 16, 24, 48, 64, 80, 128, 144])),
        position=data.draw(st.integers(0, 90)),
        kv_bits=data.draw(st.sampled_from([8, 16, 32])),
        window=data.draw(st.sampled_from([0, 1, 3, 16, 50, 1000])),
        seed=data.draw(st.integers(0, 1000)),
    )
    whole = case.run(2)
    np.testing.assert_allclose(whole, case.expected(), rtol=0, atol=3e-6)
    cut = data.draw(st.integers(0, case.shape[0]))
    parts = [case.run(1, 0, cut), case.run(3, cut)]
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_large_scores_and_nan():
    data = Case(1, 2, 2, 64, 100, 32)
    data.q *= 1000  # weights of all keys but the best vanish
    np.testing.assert_allclose(data.run(), data.expected(), rtol=0, atol=1e-4)
    data.kv[0, 1, 50] = np.nan
    out = data.run()
    assert np.isnan(out[0, 1]).all(), "a NaN in the keys must be seen"
    assert np.isfinite(out[0, 0]).all()


def test_bad_arguments_are_refused():
    data = Case(2, 4, 2, 16, 4, 32)
    tokens, heads, kv_heads, head_dim = data.shape
    good = [data.q.ctypes.data, data.kv[0].ctypes.data, data.kv[1].ctypes.data, None, None, 32]
    good += [tokens, heads, kv_heads, head_dim, data.capacity, data.position, 0, 1.0]
    out = np.zeros_like(data.q)
    for place, value in [
        *((5, 8), (5, 4), (7, 5), (8, 0), (9, 0), (10, 5), (11, -1), (12, -1), (0, None))
    ]:
        arguments = list(good)
        arguments[place] = value
        assert core.lib.em_attention(None, *arguments, out.ctypes.data) < 0, place
    assert not out.any()
    assert core.lib.em_attention(None, *good, out.ctypes.data) == 0


ISA_PROGRAM = """
import sys, zlib
import numpy as np
from edgemoe.runtime import core
sys.path.insert(0, sys.argv[1])
from test_attention import CASES, Case
sums = [
    zlib.crc32(Case(*case[:5], bits, case[5]).run(2).tobytes())
    for case in CASES for bits in (8, 16, 32)
]
print(core.lib.em_isa().decode(), *sums)
"""


def test_instruction_sets_agree():
    """Every level that this machine has gives the same bits."""
    results = {}
    for isa in ("scalar", "avx2", "avxvnni", "avx512vnni", "amx"):
        answer = subprocess.run(
            [sys.executable, "-c", ISA_PROGRAM, os.path.dirname(__file__)],
            env={**os.environ, "EDGEMOE_ISA": isa},
            capture_output=True,
            text=True,
            check=True,
        )
        used, *sums = answer.stdout.split()
        results[used] = sums
    assert "scalar" in results
    assert len({tuple(sums) for sums in results.values()}) == 1, results.keys()


def rms_norm(x, weight, eps):
    y = np.empty_like(x)
    core.lib.em_rms_norm(
        x.ctypes.data, weight.ctypes.data, x.shape[0], x.shape[1], eps, y.ctypes.data
    )
    return y


@pytest.mark.parametrize("cols", [1, 16, 40, 128, 2048])
def test_rms_norm(cols):
    rng = np.random.default_rng(cols)
    x = rng.standard_normal((7, cols), dtype=np.float32) * 50
    x[3] = 0
    weight = rng.standard_normal(cols, dtype=np.float32)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * weight
    found = rms_norm(x, weight, 1e-5)
    np.testing.assert_allclose(found, expected, rtol=5e-7, atol=1e-30)
    for t in range(7):
        assert rms_norm(x[t : t + 1].copy(), weight, 1e-5).tobytes() == found[t].tobytes()
    core.lib.em_rms_norm(x.ctypes.data, weight.ctypes.data, 7, cols, 1e-5, x.ctypes.data)
    assert x.tobytes() == found.tobytes()  # in place
