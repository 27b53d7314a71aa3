"""Ctrl-C only where the engine is consistent: between two layers. Floor 3.

A KeyboardInterrupt may be raised between any two steps of Python, also in the middle of the expert
cache's accounting. While a model runs, a signal is therefore noted, and delivered at the next safe
point, a layer later.
"""

import inspect
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

# Without the wrapper that makes an enum of every handler: it runs twice for each token.
_set_handler = inspect.unwrap(signal.signal)
_get_handler = inspect.unwrap(signal.getsignal)


class DeferredInterrupt:
    """One per engine; serves the main thread, the only one that Python interrupts."""

    def __init__(self) -> None:
        self._pending: Callable[[], None] | None = None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Note SIGINT inside the block; deliver it at `safe_point`, or after the block."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handler = _get_handler(signal.SIGINT)
        if not callable(handler):  # ignored, or left to the system
            yield
            return

        def note(number: int, frame: Any) -> None:
            if self._pending is None:
                self._pending = lambda: handler(number, frame)
            else:  # insisted on: the layer may never end
                self._pending = None
                handler(number, frame)

        _set_handler(signal.SIGINT, note)
        try:
            yield
        finally:
            _set_handler(signal.SIGINT, handler)
        self.safe_point()

    def safe_point(self) -> None:
        """Run the handler of a signal that was noted; the usual one raises KeyboardInterrupt."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending()


class InterruptibleExperts:
    """The executor as the wiring sees it: a noted Ctrl-C is delivered before it is asked for
    anything that takes long."""

    def __init__(self, interrupt: DeferredInterrupt) -> None:
        self.executor: Any = None
        self._interrupt = interrupt

    def run(self, layer: int, x: np.ndarray, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        self._interrupt.safe_point()
        return self.executor.run(layer, x, ids, weights)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executor, name)
