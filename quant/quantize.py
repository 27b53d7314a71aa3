"""Round-to-nearest quantization of one matrix, in groups of columns or by row, and its inverse.

Knows tensors and a `QuantSpec`; knows no file, no model and no packing (`runtime/kernels.py`).

Which mode. Symmetric by default. The scale of a group is its value of largest magnitude, sign kept,
divided by -2^(bits-1): that value gets code 0 and is met exactly, and all 2^bits codes are used,
where the usual max|w| / (2^(bits-1) - 1) wastes one. Mean squared error relative to the weights'
variance (Gaussian / Student t, 5 degrees of freedom / rows and columns of unequal spread):

    bits  sym, G 32          sym, G 64          asym (min, max), G 64   max|w|, G 64
    2     .131 .174 .156     .156 .232 .197     .203 .306 .254          .516 .553 .549
    3     .030 .046 .038     .037 .065 .049     .037 .056 .046          .063 .110 .085
    4     .0074 .0116 .0093  .0090 .0165 .0122  .0080 .0122 .0101       .0116 .0214 .0158
    8     2.8e-5 4.5e-5 3.6e-5  3.5e-5 6.4e-5 4.7e-5  2.8e-5 4.2e-5 3.5e-5  3.5e-5 6.5e-5 4.8e-5

A minimum costs as much room as a second scale, so `asym` with G 64 has the size of `sym` with G 32,
which is better at 2, 3 and 4 bits and equal at 8; and it saves the kernel one multiply-add.
NF4 (scale max|w| / 127, nearest level) has the bytes of `sym` and, at G 64, .0085 .0110 .0111 where
`sym` has .0090 .0165 .0166 (Student t and unequal spread drawn anew): better where tails are heavy.
Groups of 64 by default: halving them costs .25 bit and gains 19-41 % of error, about what .25 bit
more of code would gain (41 %), so smaller groups do not pay before the codes are 2 bits wide.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.format import NF4_LEVELS, QuantSpec

_MAX_FP16 = 65504.0
_LEVELS = torch.tensor(NF4_LEVELS, dtype=torch.float32)
_BETWEEN = (_LEVELS[1:] + _LEVELS[:-1]) / 2
# Below torch's limit for threads: the callers run one expert per thread, where threads inside an
# operation only wait for each other (5x slower beside another busy process), and 128 KiB of fp32
# temporaries stay in the second-level cache.
_BLOCK_WEIGHTS = (1 << 15) - 1


class Quantized(NamedTuple):
    """`codes` u8 [rows, cols]; `scales` and `mins` fp16 [rows, cols / G]; `mins` only if asym."""

    codes: Tensor
    scales: Tensor
    mins: Tensor | None


def quantize(weight: Tensor, spec: QuantSpec, per_channel: bool = False) -> Quantized:
    """Quantize a finite bf16, fp16 or fp32 matrix [rows, cols] to `spec` (2, 3, 4 or 8 bits).

    `per_channel`: a row has one scale, found over all its columns and repeated for every group.

    Codes are chosen for the scale as it is stored (fp16), so rounding it costs nothing twice. A
    group of zeros, or one whose scale is too small for fp16, becomes zeros (asym: its minimum); a
    scale too large for fp16 saturates. Raises UsageError where groups do not divide the columns.
    """
    rows, cols = weight.shape
    spec.check_shape(rows, cols)
    size = cols if per_channel else spec.group_size
    groups = cols // size
    codes = torch.empty((rows, cols), dtype=torch.uint8)
    scales = torch.empty((rows, groups), dtype=torch.float16)
    mins = torch.empty((rows, groups), dtype=torch.float16) if spec.mode == "asym" else None
    step = max(1, _BLOCK_WEIGHTS // cols)
    for row in range(0, rows, step):
        part = slice(row, row + step)
        block = weight[part].to(torch.float32).view(-1, groups, size)
        out = codes[part].view(block.shape)
        if spec.mode == "nf4":
            _quantize_nf4(block, out, scales[part])
        elif mins is None:
            _quantize_sym(block, spec.bits, out, scales[part])
        else:
            _quantize_asym(block, spec.bits, out, scales[part], mins[part])
    repeats = cols // spec.group_size // groups
    if repeats > 1:
        scales = scales.repeat_interleave(repeats, 1)
        mins = None if mins is None else mins.repeat_interleave(repeats, 1)
    return Quantized(codes, scales, mins)


def quantize_absmax(weight: Tensor, spec: QuantSpec) -> Quantized:
    """EdgeMoE's quantizer (2308.14352, and MoQE's and ExpertsInt8's): one scale a row.

    scale = max|w| / (2^(bits-1) - 1) as fp16, codes symmetric around zero; so 2 bits have the three
    levels -scale, 0, scale. |w - w^| <= scale / 2 for the scale as it is stored: where rounding it
    to fp16 would break that, it is the next fp16 up. A row of zeros stays zeros. Raises UsageError
    where groups do not divide the columns.
    """
    rows, cols = weight.shape
    spec.check_shape(rows, cols)
    top = (1 << (spec.bits - 1)) - 1
    codes = torch.empty((rows, cols), dtype=torch.uint8)
    scales = torch.empty((rows, 1), dtype=torch.float16)
    step = max(1, _BLOCK_WEIGHTS // cols)
    for row in range(0, rows, step):
        part = slice(row, row + step)
        block = weight[part].to(torch.float32)
        largest = block.abs().amax(-1, keepdim=True)
        scale = (largest / top).clamp_(max=_MAX_FP16).to(torch.float16)
        short = scale.float() * (top + 0.5) < largest
        up = torch.where(scale == _MAX_FP16, scale, (scale.view(torch.int16) + 1).view(scale.dtype))
        scales[part] = torch.where(short, up, scale)
        work = block * _inverse(scales[part])
        codes[part] = work.round_().clamp_(-top, top).add_(top + 1)
    return Quantized(codes, scales.repeat_interleave(cols // spec.group_size, 1), None)


def _quantize_sym(block: Tensor, bits: int, codes: Tensor, scales: Tensor) -> None:
    half = 1 << (bits - 1)
    low, high = block.amin(-1), block.amax(-1)  # 5x faster than aminmax
    extreme = torch.where(high > -low, high, low)
    scales.copy_((extreme / -half).clamp_(-_MAX_FP16, _MAX_FP16))
    inverse = _inverse(scales)
    work = block * inverse.unsqueeze(-1)
    codes.copy_(work.round_().add_(half).clamp_(0, 2 * half - 1))


def _quantize_nf4(block: Tensor, codes: Tensor, scales: Tensor) -> None:
    scales.copy_((block.abs().amax(-1) / -NF4_LEVELS[0]).clamp_(max=_MAX_FP16))
    work = block * _inverse(scales).unsqueeze(-1)
    codes.copy_(torch.bucketize(work, _BETWEEN, out_int32=True))


def _quantize_asym(block: Tensor, bits: int, codes: Tensor, scales: Tensor, mins: Tensor) -> None:
    top = (1 << bits) - 1
    low, high = block.amin(-1), block.amax(-1)
    mins.copy_(low.clamp(-_MAX_FP16, _MAX_FP16))
    base = mins.to(torch.float32)
    scales.copy_(((high - base) / top).clamp_(0.0, _MAX_FP16))
    work = (block - base.unsqueeze(-1)).mul_(_inverse(scales).unsqueeze(-1))
    codes.copy_(work.round_().clamp_(0, top))


def _inverse(scales: Tensor) -> Tensor:
    """1 / scale in fp32, and 0 where the scale is 0, which sends every weight to zero."""
    scale = scales.to(torch.float32)
    return torch.where(scale == 0, scale, scale.reciprocal())


def dequantize(quantized: Quantized, spec: QuantSpec) -> Tensor:
    """The fp32 matrix [rows, cols] that `quantized` stands for: what the kernels compute with."""
    codes, scales, mins = quantized
    groups = scales.shape[1]
    value = codes.to(torch.float32).view(codes.shape[0], groups, -1)
    scale = scales.to(torch.float32).unsqueeze(-1)
    if spec.mode == "nf4":
        value = _LEVELS[codes.to(torch.int32)].view(value.shape) * scale
    elif mins is None:
        value = (value - (1 << (spec.bits - 1))) * scale
    else:
        value = value * scale + mins.to(torch.float32).unsqueeze(-1)
    return value.view(codes.shape)


def to_16bit(weight: Tensor, mode: str) -> Tensor:
    """The u16 words of a matrix in `mode` bf16 or fp16, as they came where the dtype already fits.

    Other dtypes are rounded to nearest even; the conversion plan says so.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[mode]
    if weight.dtype == dtype:
        return weight.contiguous().view(torch.uint16)
    out = torch.empty(weight.shape, dtype=dtype)
    flat = weight.reshape(-1)
    for source, target in zip(
        flat.split(_BLOCK_WEIGHTS), out.view(-1).split(_BLOCK_WEIGHTS), strict=True
    ):
        target.copy_(source)
    return out.view(torch.uint16)
