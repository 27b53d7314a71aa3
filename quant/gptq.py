"""Quantization that knows its inputs: each rounding error is pushed into columns not yet rounded.

GPTQ (Frantar et al., 2023) for groups of columns: W [rows, cols] becomes codes so that W X and its
stand-in differ least on real inputs X, of which only the moments H = sum x x^T are needed. Columns
are taken by falling H[j, j]. The scales are fixed before, from the weights as they are
(`scales.search_scales`), so that the columns of a group may be taken at different times; with 2 and
3 bits they are then fitted anew to the codes, all groups of a row together, by least squares.
Knows tensors and a QuantSpec; no file, no model.
"""

import torch
from torch import Tensor

from ..runtime.format import QuantSpec
from .quantize import Quantized
from .scales import MAX_FP16, search_scales

DAMPING = 0.01  # of the mean diagonal, added to it
_BLOCK = 64  # columns whose errors are pushed on together
_MAX_REFIT_BITS = 3  # at 4 bits it gains 3 % of the error, at 2 bits 18 %
_REFIT_FLOATS = 1 << 22  # of temporaries


class Curvature:
    """What the moments H of some inputs say about rounding, factored once for every width.

    `moments` fp32 `[cols, cols]`, symmetric, positive semidefinite; overwritten. A column that no
    input ever uses may be rounded in any way.
    """

    def __init__(self, moments: Tensor, damping: float = DAMPING) -> None:
        diagonal = moments.diagonal()
        self.importance = diagonal.clone()
        mean = float(diagonal.mean())
        diagonal.add_(damping * mean if mean > 0 else 1.0)
        self.moments = moments
        self.order = torch.argsort(diagonal, descending=True, stable=True)
        lower = torch.linalg.cholesky(moments[self.order][:, self.order])
        # Its row j: what an error in column j, at j in the order, does to the columns after it.
        self.upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def quantize_calibrated(weight: Tensor, spec: QuantSpec, curvature: Curvature) -> Quantized:
    """Codes and scales of a symmetric `spec` for fp32 `weight` `[rows, cols]`."""
    rows, cols = weight.shape
    spec.check_shape(rows, cols)
    scales = search_scales(weight, spec, curvature.importance)
    half, top = 1 << (spec.bits - 1), (1 << spec.bits) - 1
    order, upper = curvature.order, curvature.upper
    by_column = scales.float().repeat_interleave(spec.group_size, 1).t()[order].contiguous()
    inverse = torch.where(by_column == 0, by_column, by_column.reciprocal())
    left = weight.t()[order].contiguous()  # [cols, rows]: a column lies in one piece
    codes = torch.empty((cols, rows), dtype=torch.uint8)
    for begin in range(0, cols, _BLOCK):
        end = min(begin + _BLOCK, cols)
        part, errors = left[begin:end], torch.empty((end - begin, rows))
        for at, number in enumerate(range(begin, end)):
            code = torch.mul(part[at], inverse[number]).round_().add_(half).clamp_(0, top)
            codes[number] = code
            torch.addcmul(part[at], code.sub_(half), by_column[number], value=-1, out=errors[at])
            errors[at].div_(upper[number, number])
            part[at + 1 :].addr_(upper[number, number + 1 : end], errors[at], alpha=-1)
        left[end:].addmm_(upper[begin:end, end:].t(), errors, alpha=-1)
    out = torch.empty((rows, cols), dtype=torch.uint8)
    out[:, order] = codes.t()
    if spec.bits <= _MAX_REFIT_BITS:
        scales = _refit(weight, out, scales, spec, curvature.moments)
    return Quantized(out, scales, None)


def _refit(
    weight: Tensor, codes: Tensor, scales: Tensor, spec: QuantSpec, moments: Tensor
) -> Tensor:
    """The fp16 scales `[rows, groups]` with the least (w - w^)^T H (w - w^) for these codes."""
    rows, cols = weight.shape
    groups, size = scales.shape[1], spec.group_size
    by_group = moments.view(groups, size, cols)
    fitted = torch.empty_like(scales)
    step = max(1, _REFIT_FLOATS // (groups * cols))
    for row in range(0, rows, step):
        part = slice(row, row + step)
        signed = (codes[part].float() - (1 << (spec.bits - 1))).view(-1, groups, size)
        pushed = torch.einsum("rgj,gjc->rgc", signed, by_group)  # [rows, groups, cols]
        left = torch.einsum("rghj,rhj->rgh", pushed.view(-1, groups, groups, size), signed)
        right = torch.einsum("rgc,rc->rg", pushed, weight[part])
        # A group of zero codes has no say: its scale stays what it was.
        empty = left.diagonal(dim1=1, dim2=2) == 0
        left += torch.diag_embed(torch.where(empty, 1.0, 0.0))
        found, info = torch.linalg.solve_ex(left, right)
        bad = empty | (info != 0)[:, None] | ~torch.isfinite(found) | (found.abs() > MAX_FP16)
        fitted[part] = torch.where(bad, scales[part].float(), found).to(torch.float16)
    return fitted
