"""An executor that shows what its experts computed: what calibration measures. Floor 1.

The outputs are those of the plain executor, bit for bit; it is slower by what is measured. Only
`run` is observed: a token that the core decodes by itself does not come by here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .executor import Executor
from .waves import Wave


@dataclass(frozen=True, slots=True)
class Observation:
    """One layer's experts and T tokens; arrays are good until the next one. The pairs of n experts,
    ascending, lie at begins[i] .. begins[i + 1]; P pairs in all."""

    layer: int
    x: np.ndarray  # fp32 [T, D]
    expert_ids: np.ndarray  # [T, K]; -1: none
    experts: NDArray[np.int64]  # [n]
    begins: NDArray[np.int64]  # [n + 1]
    tokens: NDArray[np.int32]  # [P]
    weights: NDArray[np.float32]  # [P] routing weights
    norms: NDArray[np.float32]  # [P] L2 norm of the expert's output, without the weight
    hidden_square: NDArray[np.float32]  # [n, F] squares of what went into down, over the pairs


class ObservingExecutor(Executor):
    """Takes the place of `executor`, which must not be used any more, and calls `observer` after
    every `run`."""

    def __init__(self, executor: Executor, observer: Callable[[Observation], None]) -> None:
        super().__init__(**executor.made_with)
        self._observer, self._observe = observer, self._show_expert
        self._norms = np.zeros(len(self._pair_token), dtype=np.float32)
        self._hidden_square = np.zeros((0, 0), dtype=np.float32)
        self._groups: tuple[list[int], NDArray[np.int64]] = [], np.zeros(1, dtype=np.int64)

    def run(
        self,
        layer: int,
        x: np.ndarray,
        expert_ids: np.ndarray,
        routing_weights: np.ndarray,
    ) -> np.ndarray:
        y = super().run(layer, x, expert_ids, routing_weights)
        keys, begins = self._groups
        num_pairs = int(begins[-1])
        self._observer(
            Observation(
                layer,
                x,
                expert_ids,
                np.array(keys, dtype=np.int64) - self.table.first_key[layer],
                begins,
                self._pair_token[:num_pairs],
                self._pair_weight[:num_pairs],
                self._norms[:num_pairs],
                self._hidden_square,
            )
        )
        return y

    def _group(self, layer: int, *routes: Any) -> tuple[list[int], np.ndarray]:
        self._num_shown = 0
        self._groups = keys, _ = super()._group(layer, *routes)
        self._hidden_square = np.zeros((len(keys), self.table.width[layer]), dtype=np.float32)
        return self._groups

    def _compute(
        self,
        layer: int,
        x: np.ndarray,
        y: np.ndarray,
        wave: Wave,
        begins: np.ndarray,
    ) -> None:
        first = int(begins[wave.begin])
        self._args.pair_norm = self._norms[first:].ctypes.data
        self._args.hidden_square = self._hidden_square[wave.begin :].ctypes.data
        super()._compute(layer, x, y, wave, begins)

    def _show_expert(self, h: np.ndarray, outputs: np.ndarray) -> None:
        """The reference backend shows expert after expert."""
        begins, i = self._groups[1], self._num_shown
        self._norms[int(begins[i]) : int(begins[i + 1])] = np.linalg.norm(outputs, axis=-1)
        self._hidden_square[i] = np.square(h).sum(axis=0)
        self._num_shown += 1
