"""Experts quantized by what goes into them: layer by layer, each from the inputs of its own tokens.

An expert's moments sum over the tokens routed to it, weighted by the square of routing weight over
the length of the token's hidden state behind the layer: so much its error turns what the next norm
sees. Unweighted, a few tokens with huge states decide everything. `down` is first fitted to, and
then rounded for, the inputs that the rounded gate and up give it. An expert that too few tokens
were routed to also sees other tokens of the layer (`_filled`).

Hidden states are those of the source: what is quantized does not change the inputs of later layers,
so that records do not depend on each other, on the plan, or on where a conversion was interrupted.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime import kernels
from ..runtime.format import QuantSpec, RecordLayout
from .gptq import Curvature, quantize_calibrated, stretched
from .layer_pass import LayerPass, Share, expert_hidden
from .options import ExpertSpec
from .pack import Record, checked, coded, in_order, pack_expert
from .plan import ConversionPlan
from .quantize import Quantized, dequantize
from .store_source import WeightSource

CORRECTION_DAMPING = 0.03  # of the mean diagonal; .01 to .1 are alike
MIN_TOKENS = 256  # of an expert, below which it also sees others of the layer


@dataclass(frozen=True)
class Calibration:
    """The text to calibrate on: windows of token ids, and what to call it."""

    windows: Sequence[Sequence[int]]
    texts: Sequence[str] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(window) for window in self.windows)

    @property
    def digest(self) -> str:
        """sha256 of the windows."""
        data = hashlib.sha256()
        for window in self.windows:
            data.update(np.array([len(window), *window], dtype="<i8").tobytes())
        return data.hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {"num_tokens": self.num_tokens, "sha256": self.digest, "texts": list(self.texts)}


@dataclass(frozen=True, slots=True)
class _Job:
    """One expert of a layer, its tokens, and which records it shall become."""

    layer: int
    share: Share
    numbers: list[int]


def calibrated_records(
    source: WeightSource,
    plan: ConversionPlan,
    todo: Sequence[tuple[int, int]],
    workers: int,
    calibration: Calibration,
) -> Iterator[tuple[tuple[int, int], Record]]:
    """The records of `todo` in their order. Layers before the first of them are computed through;
    after the last nothing is."""
    numbers: dict[int, list[int]] = {}
    for layer, number in todo:
        numbers.setdefault(layer, []).append(number)
    last = max(numbers)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # an expert a thread: sums do not depend on how many there are
    try:
        with LayerPass(source, plan.trunk, plan.layouts, calibration.windows, workers) as text:
            for layer, inputs, parts, scale in text.layers(source, last, workers):
                jobs: dict[int, _Job] = {}
                for number in numbers.get(layer, ()):
                    expert = number // plan.num_variants
                    share = parts[expert]
                    share = Share(share.expert, share.tokens, share.weights * scale[share.tokens])
                    jobs.setdefault(expert, _Job(layer, share, [])).numbers.append(number)
                make = partial(_records, source, plan, inputs)
                for job, records in zip(
                    jobs.values(), in_order(make, list(jobs.values()), workers), strict=True
                ):
                    for number, record in zip(job.numbers, records, strict=True):
                        yield (layer, number), record
                    del records
    finally:
        torch.set_num_threads(threads)


def _records(source: WeightSource, plan: ConversionPlan, normed: Tensor, job: _Job) -> list[Record]:
    """The records of one expert."""
    layer, expert = job.layer, job.share.expert
    layouts = {number: plan.layouts[layer, number] for number in job.numbers}
    found: dict[int, Record] = {}
    for number, layout in layouts.items():
        stored = source.record(layer, expert, layout)
        if stored is not None:
            found[number] = checked(stored, layout)
    left = [number for number in job.numbers if number not in found]
    if left:
        gate, up, down = (part.float() for part in source.expert(layer, expert))
        kinds = [(layouts[number], plan.spec_of(layer, number)) for number in left]
        records = expert_records((gate, up, down), normed, job.share, kinds)
        found |= zip(left, records, strict=True)
    return [found[number] for number in job.numbers]


def expert_records(
    weights: tuple[Tensor, Tensor, Tensor],
    normed: Tensor,
    share: Share,
    kinds: Sequence[tuple[RecordLayout, ExpertSpec]],
) -> list[Record]:
    """The records of one expert (gate, up, down fp32), given its share of `normed` `[N, D]`."""
    gate, up, down = weights
    tokens, factors = _filled(normed, share)
    x = normed[tokens]
    importance, inputs = None, _Inputs(weights, x, factors)
    records = []
    for layout, spec in kinds:
        if spec.quantizer == "calibrated" and not layout.gate_up.is_16bit:
            front = inputs.front(layout.gate_up)
            tall = coded(front.down(layout.down))
            record = kernels.pack_record(*front.packed, tall, layout)
            records.append(checked(record, layout))
            continue
        if spec.quantizer == "search" and importance is None:
            hidden = expert_hidden(x, gate, up)
            importance = tuple((part * factors).square().sum(0) for part in (x, hidden))
        records.append(pack_expert(weights, layout, spec, importance))
    return records


class _Inputs:
    """What an expert's tokens say about its matrices: x `[n, D]`, factors `[n, 1]`."""

    def __init__(self, weights: tuple[Tensor, Tensor, Tensor], x: Tensor, factors: Tensor) -> None:
        gate, up, self._down = weights
        self._wide = torch.cat((gate, up))
        self._x, self._factors = x, factors
        self._fronts: dict[QuantSpec, _Front] = {}
        self._curvature: Curvature | None = None

    def front(self, spec: QuantSpec) -> "_Front":
        """Gate and up by `spec`, made once for all that have it."""
        if spec not in self._fronts:
            self._fronts[spec] = self._make_front(spec)
        return self._fronts[spec]

    def _make_front(self, spec: QuantSpec) -> "_Front":
        if self._curvature is None:
            scaled = self._x * self._factors
            self._curvature = Curvature(scaled.T @ scaled)
            exact = expert_hidden(self._x, *self._wide.chunk(2)).mul_(self._factors)
            self._exact, self._output_power = exact, (exact @ self._down.T).square().sum(0)
        found = quantize_calibrated(self._wide, spec, self._curvature)
        hidden = expert_hidden(self._x, *dequantize(found, spec).chunk(2)).mul_(self._factors)
        moments = hidden.T @ hidden
        cross = (hidden.T @ self._exact) @ self._down.T
        rows = len(self._wide) // 2
        packed = [
            tuple(None if part is None else part[half] for part in coded(found))
            for half in (slice(0, rows), slice(rows, None))
        ]
        wanted = _corrected(self._down, cross, moments)
        return _Front(packed, wanted, Curvature(moments), cross, self._output_power)


@dataclass(frozen=True, slots=True)
class _Front:
    """Gate and up as the packer takes them, and what they make of down: the weights to round, the
    curvature of its inputs, and the outputs that there should be (`gptq.stretched`)."""

    packed: list[Any]
    wanted: Tensor
    curvature: Curvature
    cross: Tensor
    power: Tensor

    def down(self, spec: QuantSpec) -> Quantized:
        found = quantize_calibrated(self.wanted, spec, self.curvature)
        return stretched(found, spec, self.cross, self.power)


def _corrected(down: Tensor, cross: Tensor, moments: Tensor) -> Tensor:
    """`down` `[D, F]`, moved to make up for the rounding in front of it: what comes nearest to its
    own outputs on the inputs that it gets. `cross` `[F, D]`: sum of those inputs x outputs;
    `moments` `[F, F]` of those inputs."""
    damped = moments.clone()
    mean = float(moments.diagonal().mean())
    damped.diagonal().add_(CORRECTION_DAMPING * mean if mean > 0 else 1.0)
    lost = cross - moments @ down.T
    return torch.cholesky_solve(lost, torch.linalg.cholesky(damped)).T.contiguous().add_(down)


def _filled(normed: Tensor, share: Share) -> tuple[Tensor, Tensor]:
    """Tokens int64 `[m]` and factors fp32 `[m, 1]` that an expert's moments sum over.

    Those routed to it count by their routing weight. Where they are fewer than MIN_TOKENS, tokens
    spread over the layer stand in for the missing ones with half of the mean factor.
    """
    _, tokens, weights = share
    missing = min(MIN_TOKENS, len(normed)) - len(tokens)
    if missing <= 0:
        return tokens, weights[:, None]
    others = torch.linspace(0, len(normed) - 1, missing).long()
    typical = float(weights.mean()) if len(weights) else 1.0
    factors = torch.cat((weights, torch.full((missing,), 0.5 * typical)))
    return torch.cat((tokens, others)), factors[:, None]
