"""Group scales that make the quantization error least: tried candidates, then least squares.

The usual scale meets a group's extreme value exactly. At 2 and 3 bits a smaller scale, which cuts
the extreme off, often has less error in sum, and more so where columns weigh differently.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime.format import QuantSpec
from .quantize import Quantized

MAX_FP16 = 65504.0
_BLOCK_WEIGHTS = 1 << 15  # temporaries that stay in the second-level cache
# Shares of the extreme value (asymmetric: of half the range) that get the outermost codes, by bits.
_SHARES = {
    2: (1.0, 0.9, 0.8, 0.72, 0.65, 0.58, 0.52, 0.46, 0.4),
    3: (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64, 0.58),
    4: (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.74),
    8: (1.0,),
}


class Grid(NamedTuple):
    """What codes stand for, by row and group: w^ = lows + steps * code. Both fp32 `[rows, groups]`
    with values of fp16; of a symmetric spec lows is -2^(bits-1) steps."""

    steps: Tensor
    lows: Tensor

    @classmethod
    def symmetric(cls, steps: Tensor, bits: int) -> "Grid":
        return cls(steps, steps * -(1 << (bits - 1)))

    def codes(self, block: Tensor, top: int) -> Tensor:
        """The nearest codes, fp32, of `[..., groups, size]`."""
        inverse = torch.where(self.steps == 0, self.steps, self.steps.reciprocal())
        shifted = block - self.lows[..., None]
        return shifted.mul_(inverse[..., None]).round_().clamp_(0, top)

    def quantized(self, codes: Tensor, spec: QuantSpec) -> Quantized:
        """With codes u8 `[rows, cols]`, as it is stored."""
        mins = self.lows.to(torch.float16) if spec.mode == "asym" else None
        return Quantized(codes, self.steps.to(torch.float16), mins)


def search_grid(weight: Tensor, spec: QuantSpec, importance: Tensor | None = None) -> Grid:
    """The grid of fp32 `weight` `[rows, cols]`, symmetric or asymmetric, with the least
    sum_j importance[j] (w_j - w^_j)^2 in each group; `importance` `[cols]` >= 0, None: all alike.

    The sign of a symmetric scale is part of the search: it says which end has one code more.
    """
    rows, cols = weight.shape
    groups, size = cols // spec.group_size, spec.group_size
    steps, lows = torch.empty((2, rows, groups))
    share = torch.ones(1) if importance is None else importance.float().view(1, groups, size)
    # A group that no input uses counts as if all its columns were used alike.
    share = torch.where(share.sum(-1, keepdim=True) > 0, share, torch.ones_like(share))
    rows_at_once = max(1, _BLOCK_WEIGHTS // cols)
    for row in range(0, rows, rows_at_once):
        part = slice(row, row + rows_at_once)
        block = weight[part].float().view(-1, groups, size)
        search = _search_asym if spec.mode == "asym" else _search_sym
        steps[part], lows[part] = search(block, spec.bits, share.expand(1, groups, size))
    return Grid(steps, lows)


def quantize_searched(weight: Tensor, spec: QuantSpec, importance: Tensor | None) -> Quantized:
    """Round a matrix to nearest with the scales of `search_grid`; 2 to 8 bits."""
    rows, cols = weight.shape
    spec.check_shape(rows, cols)
    grid = search_grid(weight, spec, importance)
    codes = torch.empty((rows, cols), dtype=torch.uint8)
    step = max(1, _BLOCK_WEIGHTS // cols)
    for row in range(0, rows, step):
        part = slice(row, row + step)
        block = weight[part].float().view(-1, cols // spec.group_size, spec.group_size)
        found = Grid(grid.steps[part], grid.lows[part]).codes(block, (1 << spec.bits) - 1)
        codes[part] = found.view(-1, cols)
    return grid.quantized(codes, spec)


def _search_sym(block: Tensor, bits: int, share: Tensor) -> Grid:
    half = 1 << (bits - 1)
    low, high = block.amin(-1), block.amax(-1)
    extreme = torch.where(high > -low, high, low)
    best = _Best(block, share, bits)
    for first in (extreme / -half, extreme / (half - 1) if half > 1 else extreme):
        for part in _SHARES[bits]:
            grid = Grid.symmetric(to_fp16(first * part), bits)
            for _ in range(2):
                signed = best.offer(grid).sub_(half)
                weighted = signed * share
                below = (weighted * signed).sum(-1)
                fitted = (weighted * block).sum(-1) / below
                grid = Grid.symmetric(to_fp16(torch.where(below > 0, fitted, grid.steps)), bits)
    return best.grid


def _search_asym(block: Tensor, bits: int, share: Tensor) -> Grid:
    low, high = block.amin(-1), block.amax(-1)
    weight, first = share.sum(-1), (share * block).sum(-1)
    best = _Best(block, share, bits)
    base = to_fp16(low)
    best.offer(Grid(to_fp16((high - base) / ((1 << bits) - 1)), base))
    for middle in ((low + high) / 2, first / weight):
        for part in _SHARES[bits]:
            reach = (high - low) * (part / 2)
            grid = Grid(to_fp16(reach * 2 / ((1 << bits) - 1)), to_fp16(middle - reach))
            for _ in range(2):
                codes = best.offer(grid)
                weighted = codes * share
                mean, square = weighted.sum(-1), (weighted * codes).sum(-1)
                below = weight * square - mean * mean
                steps = (weight * (weighted * block).sum(-1) - mean * first) / below
                steps = to_fp16(torch.where(below > 1e-6 * weight * square, steps, grid.steps))
                grid = Grid(steps, to_fp16((first - steps * mean) / weight))
    return best.grid


class _Best:
    """The best grid so far of every group."""

    def __init__(self, block: Tensor, share: Tensor, bits: int) -> None:
        self._block, self._share, self._top = block, share, (1 << bits) - 1
        zero = torch.zeros(block.shape[:-1])
        self.grid, self._error = Grid(zero, zero), torch.full_like(zero, torch.inf)

    def offer(self, grid: Grid) -> Tensor:
        """The codes that a grid gives."""
        codes = grid.codes(self._block, self._top)
        away = torch.addcmul(
            self._block - grid.lows[..., None], codes, grid.steps[..., None], value=-1
        )
        error = away.square_().mul_(self._share).sum(-1)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.grid = Grid(
            *(torch.where(better, new, old) for new, old in zip(grid, self.grid, strict=True))
        )
        return codes


def to_fp16(values: Tensor) -> Tensor:
    """Rounded to values of fp16, in fp32."""
    return values.clamp(-MAX_FP16, MAX_FP16).to(torch.float16).float()
