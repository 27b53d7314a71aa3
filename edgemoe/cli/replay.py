"""Recorded routing in the place of the routers: a trace fitted to a store, and run by an engine.

Everything but the choice of experts is real: reads, kernels, record sizes, attention over the
context. The tokens fed are numbers without meaning, so that the logits say nothing but that two
runs did the same arithmetic.
"""

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.errors import UsageError
from .decode import Decoded, counters

if TYPE_CHECKING:
    from ..kv_cache import KVCache
    from ..runtime.index import StoreIndex
    from ..runtime.trace import Trace

_STRIDE = 7919  # between the ids of the tokens fed: a prime, so that they differ


@dataclass(frozen=True, slots=True)
class Routing:
    """Routes of some tokens: expert ids int32 [T, places, K], ascending, weights fp32 alike."""

    ids: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, steps: slice) -> "Routing":
        return Routing(self.ids[steps], self.weights[steps])

    def __add__(self, other: "Routing") -> "Routing":
        ids, weights = (self.ids, other.ids), (self.weights, other.weights)
        return Routing(np.concatenate(ids), np.concatenate(weights))


@dataclass(frozen=True, slots=True)
class Recorded:
    """A trace as a store can run it: the steps of its prompt and the decoded ones."""

    prompt: Routing
    decoded: Routing
    notes: list[str]


def fit(path: str | Path, index: "StoreIndex", num_places: int | None = None) -> Recorded:
    """The trace at `path` for a store; `num_places`: only its first layers.

    Raises UsageError where the store has other layers, too few experts, or a smaller top-k.
    """
    from ..models import parse_config
    from ..runtime.trace import DECODE, PREFILL, Trace

    trace = Trace.load(path)
    num_experts, top_k = list(index.layer_to_num_experts.values()), parse_config(index.config).top_k
    wanted = min(num_places or trace.num_places, trace.num_places)
    _, _, recorded_k = trace.experts.shape
    wrong = None
    if len(num_experts) != wanted:
        wrong = f"{wanted} layers with experts are to be replayed, the store has {len(num_experts)}"
    elif any(has < needs for has, needs in zip(num_experts, trace.num_experts, strict=False)):
        wrong = f"it was recorded of {int(trace.num_experts.max())} experts a layer, the store has "
        wrong += f"{min(num_experts)}"
    elif recorded_k > top_k:
        wrong = f"it has {recorded_k} experts a token, the store computes {top_k} at most"
    if wrong:
        raise UsageError(
            f"the trace `{path}` does not fit `{index.path}`",
            wrong,
            f"python tools/make_store.py --like {path} --layers {wanted} --out NAME.edgemoe makes "
            "a store that fits; --replay-layers N replays the first layers only",
        )
    ids, weights, notes = _complete(trace, wanted)
    if wanted < trace.num_places:
        notes.append(f"only the first {wanted} of {trace.num_places} layers are replayed")
    routing = Routing(ids, weights)
    prompt, decoded = (
        Routing(routing.ids[trace.phase == phase], routing.weights[trace.phase == phase])
        for phase in (PREFILL, DECODE)
    )
    if not len(decoded):
        raise UsageError(f"the trace `{path}` has no decoded tokens", "all its steps are a prompt")
    return Recorded(prompt, decoded, notes)


def _complete(trace: "Trace", num_places: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Every place of every step with K different experts, ascending; what had to be filled in.

    A place that was not recorded takes the experts of the nearest later step (or earlier one) at
    the same place: often a prompt's last layer, which some engines compute for the last token only.
    """
    ids = trace.experts[:, :num_places].copy()
    num_steps, _, top_k = ids.shape
    weights = np.full(ids.shape, 1 / top_k, dtype=np.float32)
    if trace.weights is not None:
        weights = trace.weights[:, :num_places].copy()
    is_whole = (ids >= 0).all(axis=2)
    steps = np.arange(num_steps)
    num_filled = 0
    for place in np.flatnonzero(~is_whole.all(axis=0)):
        whole = np.flatnonzero(is_whole[:, place])
        if not len(whole):
            raise UsageError(
                f"the trace has no step in which all experts of layer place {place} are recorded"
            )
        missing = np.flatnonzero(~is_whole[:, place])
        after = np.searchsorted(whole, steps[missing])
        source = whole[np.minimum(after, len(whole) - 1)]
        ids[missing, place], weights[missing, place] = ids[source, place], weights[source, place]
        num_filled += len(missing)
    order = np.argsort(ids, axis=2)
    ids, weights = np.take_along_axis(ids, order, 2), np.take_along_axis(weights, order, 2)
    if (np.diff(ids, axis=2) <= 0).any():
        raise UsageError("the trace names an expert twice in one layer of one step")
    notes = []
    if num_filled:
        notes.append(
            f"{num_filled} of {num_steps * num_places} layers of tokens were not recorded and take "
            "the experts of the next token there"
        )
    return ids.astype(np.int32), weights.astype(np.float32), notes


def token_id(position: int, vocab: int) -> int:
    """The token fed at a position."""
    return position * _STRIDE % vocab


def replay(engine: Any, kv_cache: "KVCache", prompt: Routing | None, decoded: Routing) -> Decoded:
    """Run the prompt, if there is one, in one go, then each step; like `decode.greedy`, but that
    the likeliest tokens are noted and not fed."""
    result, digest, vocab = Decoded(), hashlib.sha256(), engine.args.vocab
    engine.take_step_stats()
    if prompt is not None and len(prompt):
        tokens = [token_id(kv_cache.offset + i, vocab) for i in range(len(prompt))]
        begin = time.perf_counter()
        logits = engine.forward(tokens, kv_cache, forced=(prompt.ids, prompt.weights))
        result.prefill_s = time.perf_counter() - begin
        result.prefill = counters(engine.take_step_stats())
        digest.update(logits)
    result.decode = dict.fromkeys(counters(engine.take_step_stats()), 0)
    for step in range(len(decoded)):
        token = token_id(kv_cache.offset, vocab)
        begin = time.perf_counter()
        logits = engine.forward(
            [token], kv_cache, forced=(decoded.ids[step], decoded.weights[step])
        )
        result.step_s.append(time.perf_counter() - begin)
        for name, value in counters(engine.take_step_stats()).items():
            result.decode[name] += value
        result.token_ids.append(int(logits.argmax()))
        digest.update(logits)
    result.logits_hash = digest.hexdigest()
    return result
