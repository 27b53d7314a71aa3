"""One expert becomes the bytes of its record, by a spec; and threads that keep their order."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from torch import Tensor

from ..runtime import kernels
from ..runtime.checksum import crc32c
from ..runtime.format import QuantSpec, RecordLayout
from .factoring import FactoredBody
from .options import ExpertSpec
from .quantize import Quantized, quantize, quantize_absmax, to_16bit
from .scales import quantize_searched

Record = tuple[np.ndarray, tuple[int, int]]  # its bytes, the crc32c of its sections
USES_INPUTS = ("search", "calibrated")  # quantizers that read the moments of an expert's inputs

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


def pack_expert(
    weights: tuple[Tensor, Tensor, Tensor],
    layout: RecordLayout,
    spec: ExpertSpec,
    importance: tuple[Tensor, Tensor] | None = None,
) -> Record:
    """The record of (gate [F, D], up [F, D], down [D, F]) by any quantizer but the calibrated one.

    `importance`: mean squares of the inputs of gate and up `[D]` and of down `[F]`.
    """
    gate, up, down = weights
    wide, tall = importance or (None, None)
    parts = (
        _coded(gate, layout.gate_up, spec, wide),
        _coded(up, layout.gate_up, spec, wide),
        _coded(down, layout.down, spec.of_down, tall),
    )
    return checked(kernels.pack_record(*parts, layout), layout)


def pack_factored(body: FactoredBody, layout: RecordLayout, spec: ExpertSpec) -> Record:
    """The record of a factored body."""
    front, back = layout.gate_up, layout.factors.spec
    parts = (
        _coded(body.gate, front, spec, None),
        _coded(body.up, front, spec, None),
        _coded(body.down, layout.down, spec.of_down, None),
    )
    factors = [_coded(part, back, spec, None) for part in (body.u_gate, body.u_up, body.v_down)]
    return checked(kernels.pack_record(*parts, layout, factors=factors), layout)


def checked(record: np.ndarray, layout: RecordLayout) -> Record:
    """A record and the crc32c of its two sections with their padding."""
    middle = layout.down_offset
    return record, (crc32c(record[:middle]), crc32c(record[middle:]))


def _coded(
    weight: Tensor, stored: QuantSpec, spec: ExpertSpec, importance: Tensor | None
) -> np.ndarray | tuple[np.ndarray, ...]:
    """What the packer takes: u16 words, or (codes, scales, mins or None)."""
    if stored.is_16bit:
        return to_16bit(weight, stored.mode).numpy()
    if spec.quantizer == "absmax":
        return coded(quantize_absmax(weight, stored))
    if spec.quantizer == "search":
        return coded(quantize_searched(weight, stored, importance))
    return coded(quantize(weight, stored, spec.per_channel))


def coded(found: Quantized) -> tuple[np.ndarray, ...]:
    """(codes, scales, mins or None) as arrays."""
    codes, scales, mins = found
    return codes.numpy(), scales.numpy(), None if mins is None else mins.numpy()


def in_order(
    make: Callable[[_Item], _Made], items: Sequence[_Item], workers: int
) -> Iterator[_Made]:
    """`make` of every item in their order, by as many threads, each at most one item ahead."""
    pool = ThreadPoolExecutor(workers)
    try:
        ahead = deque(pool.submit(make, item) for item in items[:workers])
        for number in range(workers, workers + len(items)):
            made = ahead.popleft().result()
            if number < len(items):
                ahead.append(pool.submit(make, items[number]))
            yield made
            del made
    finally:
        pool.shutdown(cancel_futures=True)
