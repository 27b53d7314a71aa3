"""Round-to-nearest quantization against its own promises and against the packed tiles."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.quant.quantize import Quantized, dequantize, quantize, to_16bit
from edgemoe.runtime import kernels
from edgemoe.runtime.errors import UsageError
from edgemoe.runtime.format import GROUP_SIZES, NF4_LEVELS, QuantSpec

SPECS = [
    QuantSpec(bits, group_size, mode)
    for bits in (2, 3, 4, 8)
    for group_size in GROUP_SIZES
    for mode in ("sym", "asym")
]
NF4 = [QuantSpec(4, group_size, "nf4") for group_size in GROUP_SIZES]


def gaussian(rows: int, cols: int, seed: int = 0, std: float = 0.02) -> torch.Tensor:
    return torch.randn((rows, cols), generator=torch.Generator().manual_seed(seed)) * std


def relative_error(weight: torch.Tensor, spec: QuantSpec) -> float:
    found = dequantize(quantize(weight, spec), spec)
    return float((found - weight.float()).square().mean() / weight.float().square().mean())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_every_weight_is_within_a_step(spec: QuantSpec) -> None:
    weight = gaussian(48, 384)
    codes, scales, mins = quantized = quantize(weight, spec)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 1 << spec.bits
    assert scales.dtype == torch.float16 and scales.shape == (48, 384 // spec.group_size)
    assert (mins is None) == (spec.mode == "sym")
    step = scales.float().abs().repeat_interleave(spec.group_size, dim=1)
    error = (dequantize(quantized, spec) - weight).abs()
    # Half a step; a whole one at the end of the range that the symmetric codes do not reach.
    inside = (codes > 0) & (codes < (1 << spec.bits) - 1)
    assert (error[inside] <= 0.501 * step[inside]).all()
    assert (error <= 1.01 * step).all()


@pytest.mark.parametrize("spec", NF4, ids=str)
def test_nf4_takes_the_nearest_level(spec: QuantSpec) -> None:
    weight = gaussian(48, 384)
    codes, scales, mins = quantized = quantize(weight, spec)
    assert mins is None and int(codes.max()) == 15 and int(codes.min()) == 0
    levels = torch.tensor(NF4_LEVELS, dtype=torch.float32)
    scale = scales.float().repeat_interleave(spec.group_size, dim=1)
    choices = scale.unsqueeze(-1) * levels  # [rows, cols, 16]
    nearest = (choices - weight.unsqueeze(-1)).abs().amin(-1)
    error = (dequantize(quantized, spec) - weight).abs()
    torch.testing.assert_close(error, nearest, rtol=1e-5, atol=1e-8)
    largest = weight.abs().view(48, -1, spec.group_size).amax(-1)
    torch.testing.assert_close(scales.float() * 127, largest, rtol=1e-3, atol=0.0)


def test_nf4_levels_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    values = functional.get_4bit_type("nf4", device="cpu").tolist()
    assert [round(127 * value) for value in values] == list(NF4_LEVELS)


def test_nf4_beats_even_steps_where_tails_are_heavy() -> None:
    """The reason to choose it; on Gaussian weights the two are within a tenth."""
    generator = torch.Generator().manual_seed(11)
    draws = torch.randn((6, 512, 1024), generator=generator)
    weight = draws[0] / (draws[1:].square().mean(0)).sqrt()  # Student's t, 5 degrees of freedom
    even, table = QuantSpec(4, 64, "sym"), QuantSpec(4, 64, "nf4")
    assert relative_error(weight, table) < 0.75 * relative_error(weight, even)


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
def test_symmetric_meets_the_largest_weight_of_either_sign(bits: int) -> None:
    spec = QuantSpec(bits, 32, "sym")
    for sign in (1.0, -1.0):
        weight = gaussian(16, 64, seed=bits)
        weight[:, ::32] = sign * 0.25
        quantized = quantize(weight, spec)
        assert (quantized.codes[:, ::32] == 0).all()
        assert torch.equal(dequantize(quantized, spec)[:, ::32], weight[:, ::32])


@pytest.mark.parametrize("spec", [*(spec for spec in SPECS if spec.mode == "sym"), *NF4], ids=str)
def test_quantizing_twice_changes_nothing(spec: QuantSpec) -> None:
    once = dequantize(quantize(gaussian(16, 256), spec), spec)
    assert torch.equal(dequantize(quantize(once, spec), spec), once)


@pytest.mark.parametrize("spec", SPECS + NF4, ids=str)
def test_tiles_stand_for_the_same_weights(spec: QuantSpec) -> None:
    codes, scales, mins = quantized = quantize(gaussian(40, 384, seed=3), spec)
    parts = codes.numpy(), scales.numpy(), None if mins is None else mins.numpy()
    packed = kernels.pack_codes(*parts, spec)
    assert packed.size == spec.matrix_bytes(40, 384)
    found = torch.from_numpy(kernels.unpack(packed, 40, 384, spec))
    torch.testing.assert_close(found, dequantize(quantized, spec), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bits", (2, 3, 4))
def test_symmetric_beats_asymmetric_of_the_same_size(bits: int) -> None:
    """The reason for the default mode."""
    small, large = QuantSpec(bits, 32, "sym"), QuantSpec(bits, 64, "asym")
    assert small.matrix_bytes(256, 1024) == large.matrix_bytes(256, 1024)
    weight = gaussian(256, 1024, seed=5)
    assert relative_error(weight, small) < relative_error(weight, large)


@pytest.mark.parametrize(
    ("bits", "expected"), ((2, 0.156), (3, 0.0368), (4, 0.00905), (8, 3.48e-5))
)
def test_error_on_gaussian_weights(bits: int, expected: float) -> None:
    found = relative_error(gaussian(512, 1024, seed=7), QuantSpec(bits, 64, "sym"))
    assert math.isclose(found, expected, rel_tol=0.05)


EXTREMES = (0.0, -0.0, 1e-38, -1e-9, 3e-8, 1.0, -7.5, 6e4, -3e5, 1e7, 3e38, -3e38)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SPECS + NF4),
    st.lists(st.sampled_from(EXTREMES), min_size=1, max_size=6),
    st.sampled_from((torch.float32, torch.bfloat16)),
)
def test_no_scale_overflows(spec: QuantSpec, values: list[float], dtype: torch.dtype) -> None:
    weight = torch.tensor(values).repeat(256)[: 2 * spec.group_size].view(2, -1).to(dtype)
    found = dequantize(quantize(weight, spec), spec)
    assert torch.isfinite(found).all()
    if float(weight.abs().max()) <= 6e4:  # everything fp16 scales can say
        bound = float(weight.float().abs().max()) / (1 << (spec.bits - 1)) + 6e-8 * (1 << spec.bits)
        if spec.mode == "nf4":
            bound = float(weight.float().abs().max()) * 0.16 + 6e-8 * 127  # half the widest gap
        if spec.mode == "asym":
            low, high = float(weight.min()), float(weight.max())
            bound = (high - low) / ((1 << spec.bits) - 1) + 1e-3 * abs(low) + 1e-6
        assert float((found - weight.float()).abs().max()) <= 1.01 * bound


def test_a_group_of_zeros_stays_zero() -> None:
    for spec in SPECS + NF4:
        weight = gaussian(16, 256)
        weight[3] = 0
        assert not dequantize(quantize(weight, spec), spec)[3].any()


def test_blocks_do_not_show() -> None:
    """A matrix larger than one block is quantized as its rows are."""
    spec = QuantSpec(4, 64, "sym")
    weight = gaussian(100, 2048)
    whole = quantize(weight, spec)
    rows = [quantize(weight[row : row + 1], spec) for row in range(100)]
    assert torch.equal(whole.codes, torch.cat([row.codes for row in rows]))
    assert torch.equal(whole.scales, torch.cat([row.scales for row in rows]))


def test_wrong_group_is_refused() -> None:
    with pytest.raises(UsageError, match="64"):
        quantize(gaussian(16, 96), QuantSpec(4, 64, "sym"))


def test_16_bit_words() -> None:
    weight = gaussian(16, 64)
    for dtype, mode in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        as_is = weight.to(dtype)
        assert np.array_equal(
            to_16bit(as_is, mode).numpy(), as_is.view(torch.int16).numpy().view(np.uint16)
        )
    # 1 + 2^-8 lies between two bf16 numbers: ties go to the even one.
    ties = torch.tensor([[1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]])
    words = to_16bit(ties, "bf16").view(torch.bfloat16).float()
    assert words.tolist() == [[1.0, 1 + 2**-6, 1 + 2**-7]]


def test_dequantize_by_hand() -> None:
    codes = torch.arange(32, dtype=torch.uint8).view(1, 32) % 16
    scales = torch.tensor([[0.5]], dtype=torch.float16)
    spec = QuantSpec(4, 32, "sym")
    expected = [(code % 16 - 8) * 0.5 for code in range(32)]
    assert dequantize(Quantized(codes, scales, None), spec).tolist() == [expected]
