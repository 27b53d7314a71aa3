"""Quantization that knows its inputs: each rounding error is pushed into columns not yet rounded.

GPTQ (Frantar et al., 2023) for groups of columns: W [rows, cols] becomes codes so that W X and its
stand-in differ least on real inputs X, of which only the moments H = sum x x^T are needed. Columns
are taken by falling H[j, j]. The grids are fixed before, from the weights as they are
(`scales.search_grid`), so that the columns of a group may be taken at different times. Then, in
turns, all grids of a row are fitted to its codes by least squares, and every code goes to where
the error (w - w^) H (w - w^)^T is least with all others as they are, column by column (coordinate
descent: Behdin et al., QuantEase, 2023). But for fp16, no turn makes that error larger.
Knows tensors and a QuantSpec; no file, no model.
"""

import torch
from torch import Tensor

from ..runtime.format import QuantSpec
from .quantize import Quantized, dequantize
from .scales import MAX_FP16, Grid, search_grid, to_fp16

# Of the mean diagonal, added to it. Inputs will be off by the rounding of the layers before: with
# .1 an expert loses 5 % less on exact inputs, and the model 4 % more.
DAMPING = 0.4
_BLOCK = 64  # columns whose errors are pushed on together
_TURNS = {2: 2, 3: 2, 4: 0, 8: 0}  # by bits
_MAX_STRETCH = 1.4
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
        self.ordered = moments[self.order][:, self.order]
        lower = torch.linalg.cholesky(self.ordered)
        # Its row j: what an error in column j, at j in the order, does to the columns after it.
        self.upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)


def quantize_calibrated(weight: Tensor, spec: QuantSpec, curvature: Curvature) -> Quantized:
    """Codes and scales of a symmetric or asymmetric `spec` for fp32 `weight` `[rows, cols]`."""
    spec.check_shape(*weight.shape)
    grid = search_grid(weight, spec, curvature.importance)
    # From here on transposed and in order: a column lies in one piece.
    turned = weight.t()[curvature.order].contiguous()
    codes = _round(turned, _columns(grid, spec, curvature), spec, curvature)
    for _ in range(_TURNS[spec.bits]):
        grid = _refit(weight, _in_place(codes, curvature), grid, spec, curvature.moments)
        codes = _descend(turned, codes, _columns(grid, spec, curvature), spec, curvature)
    if _TURNS[spec.bits]:
        grid = _refit(weight, _in_place(codes, curvature), grid, spec, curvature.moments)
    return grid.quantized(_in_place(codes, curvature).to(torch.uint8), spec)


def stretched(found: Quantized, spec: QuantSpec, cross: Tensor, power: Tensor) -> Quantized:
    """With every row made longer until what comes out is of the right length in the mean: sum of
    y y^ = sum of y y, over inputs x^ and the outputs y that there should be.

    What loses least is too short, by as much as it loses, in all experts alike: an error that adds
    up over experts and layers where others cancel. `cross` `[cols, rows]`: sum of x^ y; `power`
    `[rows]`: sum of y y.
    """
    reached = (dequantize(found, spec).t() * cross).sum(0)
    factor = (power / reached.clamp_min(1e-30)).clamp_(1.0, _MAX_STRETCH)
    scales, mins = (
        None if part is None else to_fp16(part.float() * factor[:, None]).to(torch.float16)
        for part in (found.scales, found.mins)
    )
    return Quantized(found.codes, scales, mins)


def _columns(grid: Grid, spec: QuantSpec, curvature: Curvature) -> Grid:
    """The grid of every weight, `[cols, rows]` in order."""
    wide = (part.repeat_interleave(spec.group_size, 1).t() for part in grid)
    return Grid(*(part[curvature.order].contiguous() for part in wide))


def _in_place(codes: Tensor, curvature: Curvature) -> Tensor:
    """`[rows, cols]` of `[cols, rows]` in order."""
    out = torch.empty(codes.shape[::-1])
    out[:, curvature.order] = codes.t()
    return out


def _round(turned: Tensor, grid: Grid, spec: QuantSpec, curvature: Curvature) -> Tensor:
    """GPTQ: codes fp32 `[cols, rows]`."""
    cols, rows = turned.shape
    top, upper = (1 << spec.bits) - 1, curvature.upper
    inverse = torch.where(grid.steps == 0, grid.steps, grid.steps.reciprocal())
    left, codes = turned.clone(), torch.empty((cols, rows))
    for begin in range(0, cols, _BLOCK):
        end = min(begin + _BLOCK, cols)
        part, errors = left[begin:end], torch.empty((end - begin, rows))
        for at, number in enumerate(range(begin, end)):
            shifted = torch.sub(part[at], grid.lows[number])
            code = torch.mul(shifted, inverse[number], out=codes[number])
            code.round_().clamp_(0, top)
            torch.addcmul(shifted, code, grid.steps[number], value=-1, out=errors[at])
            errors[at].div_(upper[number, number])
            part[at + 1 :].addr_(upper[number, number + 1 : end], errors[at], alpha=-1)
        left[end:].addmm_(upper[begin:end, end:].t(), errors, alpha=-1)
    return codes


def _descend(
    turned: Tensor, codes: Tensor, grid: Grid, spec: QuantSpec, curvature: Curvature
) -> Tensor:
    """One sweep over all columns from `codes`, each set to its best with the others as they are."""
    cols, rows = turned.shape
    top, moments = (1 << spec.bits) - 1, curvature.ordered
    inverse = torch.where(grid.steps == 0, grid.steps, grid.steps.reciprocal())
    known = torch.addcmul(grid.lows, codes, grid.steps)
    slope = moments @ (turned - known)  # half of what the error falls by a rise of w^
    codes = torch.empty_like(codes)
    for begin in range(0, cols, _BLOCK):
        end = min(begin + _BLOCK, cols)
        part, moved = slope[begin:end], torch.empty((end - begin, rows))
        for at, number in enumerate(range(begin, end)):
            wanted = torch.add(known[number], part[at], alpha=1 / float(moments[number, number]))
            code = torch.mul(wanted.sub_(grid.lows[number]), inverse[number], out=codes[number])
            code.round_().clamp_(0, top)
            reached = torch.addcmul(grid.lows[number], code, grid.steps[number])
            torch.sub(reached, known[number], out=moved[at])
            part[at + 1 :].addr_(moments[number, number + 1 : end], moved[at], alpha=-1)
        slope[end:].addmm_(moments[end:, begin:end], moved, alpha=-1)
    return codes


def _refit(weight: Tensor, codes: Tensor, grid: Grid, spec: QuantSpec, moments: Tensor) -> Grid:
    """The grid with the least (w - w^) H (w - w^)^T for these codes `[rows, cols]`: of a row all
    groups together, a step for each and, of an asymmetric spec, a low."""
    rows, cols = weight.shape
    groups, size = grid.steps.shape[1], spec.group_size
    is_asym = spec.mode == "asym"
    by_group = moments.view(groups, size, cols)
    ones = by_group.sum(1)  # what a low of one pushes into every column, [groups, cols]
    both = ones.view(groups, groups, size).sum(-1)
    steps, lows = torch.empty_like(grid.steps), torch.empty_like(grid.lows)
    rows_at_once = max(1, _REFIT_FLOATS // (groups * cols))
    for row in range(0, rows, rows_at_once):
        part = slice(row, row + rows_at_once)
        block = codes[part] if is_asym else codes[part] - (1 << (spec.bits - 1))
        block = block.view(-1, groups, size)
        pushed = torch.einsum("rgj,gjc->rgc", block, by_group)  # [rows, groups, cols]
        shaped = pushed.view(-1, groups, groups, size)
        left = torch.einsum("rghj,rhj->rgh", shaped, block)
        right = torch.einsum("rgc,rc->rg", pushed, weight[part])
        if is_asym:
            mixed, count = shaped.sum(-1), len(block)
            above = torch.cat((left, mixed), 2)
            below = torch.cat((mixed.transpose(1, 2), both.expand(count, -1, -1)), 2)
            left = torch.cat((above, below), 1)
            right = torch.cat((right, weight[part] @ ones.t()), 1)
        # Where codes say nothing about a value (all zero, all alike) it must not run away.
        diagonal = left.diagonal(dim1=1, dim2=2)
        is_empty = diagonal[:, :groups] <= 0
        left = left + torch.diag_embed(torch.where(diagonal > 0, 1e-6 * diagonal, 1.0))
        found, info = torch.linalg.solve_ex(left, right)
        found = torch.where((info != 0)[:, None] | (found.abs() > MAX_FP16), torch.nan, found)
        is_bad = ~torch.isfinite(found).all(1, keepdim=True)
        steps[part] = torch.where(is_bad | is_empty, grid.steps[part], to_fp16(found[:, :groups]))
        if is_asym:
            lows[part] = torch.where(is_bad, grid.lows[part], to_fp16(found[:, groups:]))
    return Grid(steps, lows) if is_asym else Grid.symmetric(steps, spec.bits)
