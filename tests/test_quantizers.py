"""The papers' quantizer to the letter, searched scales, and rounding that knows its inputs."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgemoe.quant import calibrated, gptq
from edgemoe.quant.gptq import Curvature, quantize_calibrated
from edgemoe.quant.options import ConvertOptions, ExpertSpec
from edgemoe.quant.pack import pack_expert
from edgemoe.quant.quantize import dequantize, quantize, quantize_absmax
from edgemoe.quant.scales import quantize_searched
from edgemoe.runtime import kernels
from edgemoe.runtime.errors import UsageError
from edgemoe.runtime.format import PAGE_BYTES, QuantSpec, RecordLayout, round_up

SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = st.sampled_from([2, 3, 4, 8])


def random_matrix(seed: int, rows: int, cols: int) -> Tensor:
    """Rows of very different sizes, tails, a row and a group of zeros."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(4, (rows, cols)) * 10 ** rng.uniform(-4, 2, (rows, 1))
    weight[rng.integers(rows)] = 0
    weight[rng.integers(rows), :32] = 0
    return torch.from_numpy(weight.astype(np.float32))


def error(weight: Tensor, stand_in: Tensor, moments: Tensor) -> float:
    """sum over rows of (w - w^)^T H (w - w^), in float64."""
    lost = (weight - stand_in).double()
    return float(((lost @ moments.double()) * lost).sum())


@settings(max_examples=60, deadline=None)
@given(SEEDS, WIDTHS, st.sampled_from([32, 64, 128]))
def test_absmax_is_within_half_a_step(seed: int, bits: int, group: int) -> None:
    weight = random_matrix(seed, 24, 128)
    spec = QuantSpec(bits, group, "sym")
    codes, scales, _ = found = quantize_absmax(weight, spec)
    top = 2 ** (bits - 1) - 1
    by_row = scales.float()
    assert torch.equal(by_row, by_row[:, :1].expand_as(by_row))  # one scale a row
    assert int(codes.min()) >= 1 and int(codes.max()) <= 2 * top + 1  # symmetric: code 0 is unused
    lost = (weight.double() - dequantize(found, spec).double()).abs()
    assert (lost <= by_row[:, :1].double() / 2 * (1 + 1e-6)).all()
    expected = weight.abs().amax(1) / top
    normal = expected > 2.0**-14  # fp16 keeps 11 bits of it
    ratio = by_row[normal, 0] / expected[normal]
    assert ((ratio - 1).abs() <= 2.0**-10).all()
    assert not dequantize(found, spec)[weight.abs().amax(1) == 0].any()


def test_a_row_of_zeros_stays_zeros() -> None:
    weight = torch.zeros(16, 64)
    for bits in (2, 3, 4, 8):
        spec = QuantSpec(bits, 64, "sym")
        curvature = Curvature(torch.zeros(64, 64))
        for found in (
            quantize_absmax(weight, spec),
            quantize_searched(weight, spec, None),
            quantize_searched(weight, spec, torch.zeros(64)),
            quantize_calibrated(weight, spec, curvature),
        ):
            assert not dequantize(found, spec).any()


@pytest.mark.parametrize("bits", (2, 3, 4, 8))
@pytest.mark.parametrize("group", (32, 64, 128, "channel"))
def test_stored_bytes_are_those_of_the_formula(bits: int, group: int | str) -> None:
    hidden, width = 256, 128
    quantizer = "absmax" if group == "channel" else "search"
    columns = 128 if group == "channel" else group
    layout = RecordLayout(
        QuantSpec(bits, columns, "sym"), QuantSpec(bits, columns, "sym"), hidden, width
    )
    spec = ExpertSpec(bits, None if group == "channel" else group, quantizer=quantizer)
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn((2, width, hidden), generator=generator)
    down = torch.randn((hidden, width), generator=generator)
    record, _ = pack_expert((gate, up, down), layout, spec)
    # Codes, and one line of 64 bytes with the fp16 scales of 16 rows for every pair of groups.
    sections = (
        (2 * width, hidden),
        (hidden, width),
    )
    expected = sum(
        round_up(rows * cols * bits // 8 + rows // 16 * -(-(cols // columns) // 2) * 64, PAGE_BYTES)
        for rows, cols in sections
    )
    assert record.nbytes == layout.num_bytes == expected
    found = kernels.unpack_record(record, layout)
    for matrix, weight in zip(found, (gate, up, down), strict=True):
        assert np.abs(matrix - weight.numpy()).mean() < 0.8


@settings(max_examples=30, deadline=None)
@given(SEEDS, WIDTHS, st.sampled_from(["sym", "asym"]))
def test_searched_scales_are_never_worse(seed: int, bits: int, mode: str) -> None:
    weight = random_matrix(seed, 16, 128)
    spec = QuantSpec(bits, 64, mode)
    importance = torch.from_numpy(np.random.default_rng(seed).exponential(1, 128) ** 3).float()
    plain = dequantize(quantize(weight, spec), spec)
    for share in (None, importance):
        moments = torch.eye(128) if share is None else torch.diag(share)
        found = dequantize(quantize_searched(weight, spec, share), spec)
        # fp16 rounds the searched scale as well: a thousandth of the error at most.
        assert error(weight, found, moments) <= error(weight, plain, moments) * 1.001 + 1e-12


def real_inputs(seed: int, cols: int, generator: torch.Generator) -> Tensor:
    """Columns that depend on each other, and one that no input uses."""
    mixing = torch.randn((cols, cols), generator=generator)
    inputs = torch.randn((600, cols), generator=generator) @ mixing * 0.1
    inputs[:, 5] = 0
    return inputs


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.sampled_from([2, 3, 4]), st.sampled_from(["sym", "asym"]))
def test_calibrated_rounding_loses_less_on_its_inputs(seed: int, bits: int, mode: str) -> None:
    generator = torch.Generator().manual_seed(seed % 2**31)
    inputs = real_inputs(seed, 128, generator)
    weight = torch.randn((48, 128), generator=generator)
    moments = inputs.T @ inputs
    spec = QuantSpec(bits, 32, mode)
    searched = dequantize(quantize_searched(weight, spec, moments.diagonal().clone()), spec)
    found = dequantize(quantize_calibrated(weight, spec, Curvature(moments.clone())), spec)
    assert error(weight, found, moments) < 0.8 * error(weight, searched, moments)


@settings(max_examples=10, deadline=None)
@given(SEEDS, st.sampled_from([2, 3]), st.sampled_from(["sym", "asym"]))
def test_every_turn_loses_less(seed: int, bits: int, mode: str) -> None:
    """Fitting grids to codes and moving codes on a grid: each lowers the error that both share."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    inputs = real_inputs(seed, 128, generator)
    weight = torch.randn((48, 128), generator=generator)
    curvature = Curvature(inputs.T @ inputs)
    spec, errors = QuantSpec(bits, 32, mode), []
    with pytest.MonkeyPatch.context() as patch:
        for turns in range(4):
            patch.setitem(gptq._TURNS, bits, turns)
            found = dequantize(quantize_calibrated(weight, spec, curvature), spec)
            errors.append(error(weight, found, curvature.moments))
    assert errors[1] < 0.95 * errors[0]
    for before, after in itertools.pairwise(errors):
        assert after <= before * 1.001  # fp16


def test_down_makes_up_for_gate_and_up() -> None:
    """With all of the rounding in front of it known, the fitted matrix loses less than down."""
    generator = torch.Generator().manual_seed(1)
    exact = torch.randn((500, 64), generator=generator)
    rounded = 0.8 * exact + 0.3 * exact.roll(1, 1) + 0.1 * torch.randn((500, 64))
    down = torch.randn((32, 64), generator=generator)
    moments = rounded.T @ rounded
    fitted = calibrated._corrected(down, rounded.T @ exact @ down.T, moments)

    def lost(matrix: Tensor) -> float:
        return float((exact @ down.T - rounded @ matrix.T).square().sum())

    assert lost(fitted) < 0.3 * lost(down)
    moments = exact.T @ exact
    torch.testing.assert_close(calibrated._corrected(down, moments @ down.T, moments), down)
    none = torch.zeros(64, 64)
    assert torch.equal(calibrated._corrected(down, none @ down.T, none), down)


@pytest.mark.parametrize("mode", ("sym", "asym"))
def test_stretched_rows_are_right_in_the_mean(mode: str) -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = real_inputs(2, 128, generator)
    weight = torch.randn((48, 128), generator=generator)
    weight[7] = 0
    spec, moments = QuantSpec(2, 64, mode), inputs.T @ inputs
    found = quantize_calibrated(weight, spec, Curvature(moments.clone()))
    outputs = inputs @ weight.T
    longer = gptq.stretched(found, spec, inputs.T @ outputs, outputs.square().sum(0))
    shares = [
        (outputs * (inputs @ dequantize(each, spec).T)).sum(0) / outputs.square().sum(0)
        for each in (found, longer)
    ]
    used = torch.arange(48) != 7
    assert (shares[0][used] < 0.99).float().mean() > 0.9
    torch.testing.assert_close(shares[1][used], torch.ones(47), rtol=2e-3, atol=0)
    assert not dequantize(longer, spec)[7].any()


@pytest.mark.parametrize("quantizer", ("nearest", "search"))
def test_both_parts_have_their_own_format(quantizer: str) -> None:
    spec = ExpertSpec.of("2a64/4g32", quantizer)
    layout = RecordLayout(QuantSpec(2, 64, "asym"), QuantSpec(4, 32, "sym"), 64, 128)
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn((2, 128, 64), generator=generator)
    down = torch.randn((64, 128), generator=generator)
    record, _ = pack_expert((gate, up, down), layout, spec)
    found = kernels.unpack_record(record, layout)
    for matrix, weight, most in zip(found, (gate, up, down), (0.5, 0.5, 0.1), strict=True):
        assert np.abs(matrix - weight.numpy()).mean() < most


def test_widths_in_words() -> None:
    for width in ("3", "2g32", "2a64", "4a", "2a64/3a32", "3/4"):
        assert ExpertSpec.of(width).label == width
    spec = ExpertSpec.of("2g32/4a", "search")
    assert spec.of_down == ExpertSpec(4, 32, "asym", "search")
    assert ExpertSpec(3, quantizer="search").of_down == ExpertSpec(3, quantizer="search")
    for wrong in ("", "5", "2x64", "2g48", "2/16", "16/4", "2/3/4", "16a", "2a64/"):
        with pytest.raises(UsageError):
            ExpertSpec.of(wrong)
    for wrong in ("2a", "2/3"):
        with pytest.raises(UsageError):
            ExpertSpec.of(wrong, "absmax")


def test_curvature_that_says_nothing_is_rounding_to_nearest() -> None:
    """With independent inputs there is nothing to push an error into."""
    weight = random_matrix(3, 32, 64)
    spec = QuantSpec(4, 32, "sym")
    found = quantize_calibrated(weight, spec, Curvature(torch.eye(64)))
    expected = quantize_searched(weight, spec, None)
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(dequantize(found, spec), dequantize(expected, spec))


def test_specs_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="nf4.*search"):
        ConvertOptions(bits=4, mode="nf4", quantizer="search")
    with pytest.raises(UsageError, match="one scale a row"):
        ConvertOptions(group_size="channel", quantizer="calibrated")
    with pytest.raises(UsageError, match="--quantizer"):
        ConvertOptions(quantizer="best")
