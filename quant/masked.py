"""One engine as several models: the full one, and each of its pruned sets."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..active_set import ActiveSet, mask_routers
from .passes import Passes

if TYPE_CHECKING:
    from ..engine import Engine
    from ..kv_cache import KVCache
    from ..models.args import ModelArgs


@contextmanager
def routed_by(engine: "Engine", active: ActiveSet | None) -> Iterator[None]:
    """Let the routers choose by this set (None: by the full model), whatever else the engine runs
    with; no expert is read for it in advance."""
    mask_routers(engine._model, active)
    try:
        yield
    finally:
        mask_routers(engine._model, engine.active_set)


class Masked:
    """An engine as the model that it is with a set; others may use the engine in between."""

    def __init__(self, engine: "Engine", active: ActiveSet | None) -> None:
        self._engine, self._active = engine, active

    @property
    def args(self) -> "ModelArgs":
        return self._engine.args

    def forward(
        self, token_ids: Sequence[int], kv_cache: "KVCache", logits: str = "last"
    ) -> np.ndarray:
        """As `Engine.forward`."""
        with routed_by(self._engine, self._active):
            return self._engine.forward(token_ids, kv_cache, logits)

    def routes(self, windows: Sequence[list[int]]) -> NDArray[np.int16]:
        """The choices for all windows in a row, [T, places, K]."""
        with routed_by(self._engine, self._active):
            return np.concatenate(Passes(self._engine).routes(windows))
