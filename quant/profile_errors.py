"""What every expert's output loses when its weights are rounded: measured on real inputs.

A few tokens of every text stand for it: every fourth one of each 64th window. The sums are over
those tokens, so that the sums of two texts add up to those of both. One more pass over these
windows, in which every expert is rounded once at each width.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..runtime.format import RecordLayout
from ..runtime.profile import Profile
from ..runtime.profile_sums import ERROR_BITS
from .layer_pass import expert_hidden
from .layouts import expert_layouts
from .options import ConvertOptions, ExpertSpec
from .pack import in_order
from .passes import GROUP_TOKENS, Passes, groups
from .progress import Progress
from .quantize import dequantize, quantize
from .store_source import StoreSource

if TYPE_CHECKING:
    from ..engine import Engine
    from ..models.args import ModelArgs
    from ..runtime.observe import Observation

EVERY_WINDOW, EVERY_TOKEN = 64, 4


def error_bytes(args: "ModelArgs", workers: int) -> int:
    """Bytes in memory while errors are measured: the inputs of a group's pairs, and of the expert
    of each worker its weights, as they are and rounded, with what rounding them takes."""
    pairs = GROUP_TOKENS // EVERY_TOKEN * args.top_k
    return 4 * args.hidden * (2 * pairs + workers * 4 * 3 * args.expert_width)


def sampled(texts: Sequence[Sequence[list[int]]]) -> list[list[int]]:
    """The windows to measure on, of texts in windows."""
    return [window for windows in texts for window in windows[::EVERY_WINDOW]]


class ErrorSums:
    """Adds to the `error_*` sums of a profile while an engine runs windows; `observe` is told of
    every layer, `windows` runs them."""

    def __init__(self, engine: "Engine", profile: Profile, workers: int) -> None:
        self._source = StoreSource(engine.path)
        self._profile, self._workers = profile, workers
        options = ConvertOptions(variants=tuple(ExpertSpec(bits) for bits in ERROR_BITS))
        self._layouts = expert_layouts(self._source, options, [])
        self._layer: int | None = None
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []
        for sums in profile.layers.values():
            sums.error_count = np.zeros(sums.num_experts, dtype=np.int64)
            sums.output_square_sum = np.zeros(sums.num_experts)
            sums.error_square_sum = np.zeros((sums.num_experts, len(ERROR_BITS)))

    def run(self, passes: Passes, windows: Sequence[list[int]], progress: Progress) -> None:
        """Run the windows; whoever observes the engine hands everything on to `observe`."""
        progress.start("errors", sum(map(len, windows)), unit="tok")
        for group in groups(windows):
            passes.routes(group, progress.advance)
            self._finish_layer()

    def observe(self, o: "Observation") -> None:
        if o.layer != self._layer:
            self._finish_layer()
            self._layer = o.layer
        pairs = np.flatnonzero(o.tokens % EVERY_TOKEN == 0)
        experts = np.repeat(o.experts, np.diff(o.begins))[pairs]
        tokens = torch.from_numpy(o.tokens[pairs].astype(np.int64))
        weights = torch.from_numpy(o.weights[pairs].copy())
        self._seen.append((torch.from_numpy(o.x)[tokens], torch.from_numpy(experts), weights))

    def _finish_layer(self) -> None:
        """Measure the experts of the layer that was seen last."""
        if not self._seen:
            return
        x, experts, weights = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen = []
        sums, layer = self._profile.layers[self._layer], self._layer
        present = experts.unique().tolist()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums do not depend on how many there are
        try:
            make = partial(self._errors, layer, x, experts, weights)
            for expert, found in zip(present, in_order(make, present, self._workers), strict=True):
                sums.error_count[expert] += found[0]
                sums.output_square_sum[expert] += found[1]
                sums.error_square_sum[expert] += found[2]
        finally:
            torch.set_num_threads(threads)

    def _errors(
        self, layer: int, x: Tensor, experts: Tensor, weights: Tensor, expert: int
    ) -> tuple[int, float, NDArray[np.float64]]:
        """Of one expert: tokens, squares of its weighted outputs, and of what each width loses."""
        chosen = experts == expert
        x, factors = x[chosen], weights[chosen][:, None]
        parts = self._source.expert(layer, expert)
        exact = _output(x, *parts)
        lost = []
        for number in range(len(ERROR_BITS)):
            layout = self._layouts[layer, expert * len(ERROR_BITS) + number]
            away = exact - _output(x, *_rounded(parts, layout))
            lost.append(float((away * factors).square().sum(dtype=torch.float64)))
        square = float((exact * factors).square().sum(dtype=torch.float64))
        return len(x), square, np.array(lost)

    def close(self) -> None:
        self._source.close()


def _output(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return expert_hidden(x, gate, up) @ down.T


def _rounded(parts: tuple[Tensor, Tensor, Tensor], layout: RecordLayout) -> list[Tensor]:
    specs = (layout.gate_up, layout.gate_up, layout.down)
    return [dequantize(quantize(p, spec), spec) for p, spec in zip(parts, specs, strict=True)]
