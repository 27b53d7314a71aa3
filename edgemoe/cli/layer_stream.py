"""Layer streaming as STI does it: every expert of a layer is read, whichever are wanted. Floor 5.

The reads of a part of the next layer go on while one is computed; what the memory holds beyond two
such parts stays resident, from the first layer on. The outputs are those of the engine's own
executor, bit for bit.
"""

import time
from itertools import pairwise

import numpy as np

from ..runtime.executor import Executor
from ..runtime.waves import Wave

Part = list[int]  # keys of a run of records of one layer


class LayerStream(Executor):
    """Takes the place of `executor`, which must not be used any more, in the whole of its expert
    cache. Demand is counted as it comes to the cache: whole layers."""

    def __init__(self, executor: Executor) -> None:
        super().__init__(**executor.made_with)
        table, capacity = self.table, self.cache.capacity_bytes
        size = max(table.num_bytes)
        layers = [
            list(range(first, first + table.num_experts[layer]))
            for layer, first in table.first_key.items()
        ]
        largest = max(len(keys) for keys in layers)
        self._num_resident = max(0, capacity // size - 2 * largest)
        step = max(1, min(largest, capacity // size // 2))
        self._parts: dict[int, list[Part]] = {}  # by layer
        for layer, keys in zip(table.first_key, layers, strict=True):
            streamed = [key for key in keys if key >= self._num_resident]
            runs = range(0, len(streamed), step)
            self._parts[layer] = [streamed[begin : begin + step] for begin in runs]
        order = [part for parts in self._parts.values() for part in parts]
        self._next = {part[0]: after for part, after in pairwise([*order, *order[:1]])}
        self._asked: Part | None = None  # pinned, being read
        for key in range(self._num_resident):
            self.cache.hint([key])  # never released

    def run(
        self,
        layer: int,
        x: np.ndarray,
        expert_ids: np.ndarray,
        routing_weights: np.ndarray,
    ) -> np.ndarray:
        self._check(layer, x, expert_ids, routing_weights)
        x = np.ascontiguousarray(x)
        y = np.zeros_like(x)
        keys, begins = self._group(layer, expert_ids, routing_weights)
        self.cache.begin_layer(layer)
        held = sum(key < self._num_resident for key in keys)
        if held:
            self._compute(layer, x, y, Wave(0, held, keys[:held], None), begins)
        for part in self._parts[layer]:
            if self._asked is not part:
                self._ask(part)
            following = self._next[part[0]]
            if following is not part:
                self._ask(following)
            last = held + sum(key <= part[-1] for key in keys[held:])
            if last > held:
                self._compute(layer, x, y, Wave(held, last, keys[held:last], None), begins)
            held = last
            begin = time.perf_counter()
            for key in part:
                self.cache.reader.wait(key)
            self._add_times(layer, time.perf_counter() - begin, 0.0)
            self.cache.release(part)
        return y

    def _ask(self, part: Part) -> None:
        self.cache.hint(part)
        self._asked = part
