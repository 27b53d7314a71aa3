"""Records what the routers of an engine choose, step by step. Floor 3."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .models.fingerprint import checkpoint_fingerprint
from .runtime.errors import UsageError
from .runtime.trace import DECODE, NO_EXPERT, PREFILL, Trace

if TYPE_CHECKING:
    from .engine import Engine
    from .sampling import SamplingParams
    from .session import Prompt


class Recorder:
    """Collects steps of one engine; `trace()` at any time gives those that were finished."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._layers = list(engine.cache.table.first_key)
        self._rows: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in self._layers]
        self._phases: list[int] = []

    def read(self, ids: Sequence[int]) -> None:
        """Record a text as if it had been decoded token by token, in windows of the context: the
        routes of a token are the same either way, bit for bit."""
        with self._engine.session() as session:
            for begin in range(0, len(ids), self._engine.context):
                session.reset()
                part = list(ids[begin : begin + self._engine.context])
                self._watch(lambda part=part: session.logits(part), DECODE)

    def answer(self, prompt: "Prompt", params: "SamplingParams") -> str:
        """Record a prompt, then the answer to it; returns the answer."""
        text = []
        with self._engine.session() as session:
            events = session.stream(prompt, params)
            event = self._watch(lambda: next(events), PREFILL)
            while event is not None:
                text.append(event.text)
                event = self._watch(lambda: next(events, None), DECODE)
        return "".join(text)

    def trace(self) -> Trace:
        """Raises UsageError where no step was finished."""
        if not self._phases:
            raise UsageError("nothing was recorded", "no token went through the layers")
        engine = self._engine
        index = engine._index
        shape = (len(self._phases), len(self._layers), engine.args.top_k)
        experts = np.full(shape, NO_EXPERT, dtype=np.int32)
        weights = np.zeros(shape, dtype=np.float32)
        for place, rows in enumerate(self._rows):
            for array, parts in zip((experts, weights), zip(*rows, strict=True), strict=True):
                part = np.concatenate(parts)[: len(self._phases)]
                array[:, place, : part.shape[1]] = part
        table = engine.cache.table
        sizes = np.array(table.num_bytes, dtype=np.int64)[table.own_keys]
        num_experts = np.array([table.num_experts[layer] for layer in self._layers])
        first = np.concatenate(([0], np.cumsum(num_experts)[:-1]))
        largest = np.maximum.reduceat(sizes, first)
        is_even = np.array_equal(sizes, np.repeat(largest, num_experts))
        return Trace(
            experts=experts,
            weights=weights,
            phase=np.array(self._phases, dtype=np.int8),
            num_experts=num_experts,
            expert_bytes=largest,
            record_bytes=None if is_even else sizes,
            model=index.path.name.removesuffix(".edgemoe"),
            metadata={
                "fingerprint": checkpoint_fingerprint(index),
                "tokenizer_sha256": index.sha256.get("tokenizer.json", ""),
                "layers": ",".join(map(str, self._layers)),
            },
        )

    def _watch(self, run: Any, phase: int) -> Any:
        """Run what feeds tokens; its steps are kept when it has ended."""
        collected: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

        def on_route(layer: int, ids: np.ndarray, weights: np.ndarray) -> None:
            found = (ids.astype(np.int32), weights.copy())
            collected.setdefault(layer, []).append(found)

        self._engine.on_route = on_route
        try:
            result = run()
        finally:
            self._engine.on_route = None
        if collected:
            for rows, layer in zip(self._rows, self._layers, strict=True):
                rows += collected[layer]
            self._phases += [phase] * sum(len(ids) for ids, _ in collected[self._layers[0]])
        return result
