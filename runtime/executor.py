"""Runs the routed experts of one layer: hint, wait, compute, release. Floor 1.

The (token, expert) pairs are grouped by expert in ascending id and cut into waves, contiguous runs
of experts whose records fit into the expert cache; the next wave is being read while one is
computed. Outputs are added in ascending expert id whatever was resident and wherever a wave ends,
so y has the same bits for every capacity, policy and number of threads.
"""

import ctypes
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import core
from .budget import moe_workspace_bytes, wave_pairs
from .cache_base import COMPUTE_NS, STALL_NS, CacheBase
from .cold import ColdRule
from .errors import EdgeMoeError, UsageError
from .format import RecordLayout
from .memory import Arena
from .stand_ins import StandInRule
from .waves import Wave, cut_waves

if TYPE_CHECKING:
    from .kernels import ThreadPool


@dataclass(slots=True)
class StepStats:
    """Demand and time since the last `take_stats`. A hit or miss is one record in one `run`."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    stall_s: float = 0.0  # nothing could be computed for want of a record
    compute_s: float = 0.0
    native_s: float = 0.0  # of decoded tokens: in the core, stalls, experts, reads included
    guessed: int = 0  # demanded records that a guess had brought or begun to read
    decide_s: float = 0.0  # of decoded tokens: decisions of the expert cache, not in native_s
    guess_s: float = 0.0  # in native_s: making guesses
    submit_s: float = 0.0  # handing reads to the system, of decoded tokens in native_s


class Executor:
    """Computes expert outputs through one expert cache. Serves one thread at a time.

    `chunk` is the largest number of tokens in one `run`; the workspace is allocated for it here.
    """

    def __init__(
        self,
        cache: CacheBase,
        pool: "ThreadPool | None" = None,
        backend: str | None = None,
        *,
        hidden: int,
        top_k: int,
        chunk: int = 512,
    ) -> None:
        # For another that is to take this one's place.
        self.made_with: dict[str, Any] = {"cache": cache, "pool": pool, "backend": backend}
        self.made_with |= {"hidden": hidden, "top_k": top_k, "chunk": chunk}
        self.cache, self._pool = cache, pool
        self._hidden, self._chunk, self._top_k = hidden, chunk, top_k
        self._backend = backend or core.BACKEND
        self.table = table = cache.table
        max_experts = max(table.num_experts.values(), default=0)
        self._max_pairs = wave_pairs(chunk, top_k)
        self._keys = np.empty(max_experts, dtype=np.int32)
        self._data = np.empty(max_experts, dtype=np.uint64)
        self._pair_begin = np.empty(max_experts + 1, dtype=np.int64)
        self._pair_token = np.empty(chunk * top_k, dtype=np.int32)
        self._pair_weight = np.empty(chunk * top_k, dtype=np.float32)
        self._token_address = self._pair_token.ctypes.data
        self._weight_address = self._pair_weight.ctypes.data
        self._one_each = np.arange(top_k + 1)  # where each expert has one pair
        self._observe = None  # of observe.py
        self.cold, self.stand_ins = ColdRule(), StandInRule()  # for one token at a time
        self._told, self._told_core_s = cache.place_stats.sum(axis=0), cache.core_s
        self._args = core.MoeArgs()
        if self._backend == "native":
            num_bytes = moe_workspace_bytes(chunk, self._max_pairs, hidden, table.max_row_floats)
            self._workspace = Arena(max(num_bytes, 1), "native")
            self._args.hidden = hidden
            self._args.keys = self._keys.ctypes.data
            self._args.data = self._data.ctypes.data
            self._args.pair_begin = self._pair_begin.ctypes.data
            self._args.workspace = self._workspace.address
            self._args_pointer = ctypes.byref(self._args)

    def use_workspace(self, address: int | None) -> None:
        """Lay the workspace there from now on, of which the caller minds the size; None: back into
        memory of our own."""
        self._args.workspace = self._workspace.address if address is None else address

    def take_stats(self) -> StepStats:
        """The statistics since the last call, which start again at zero."""
        told, told_core_s = self._told, self._told_core_s
        self._told = sums = self.cache.place_stats.sum(axis=0)
        self._told_core_s = core_s = self.cache.core_s
        hits, misses, num_bytes, stall_ns, compute_ns, guessed = (sums - told).tolist()
        native_s, decide_s, guess_s, submit_s = (core_s - told_core_s).tolist()
        return StepStats(
            hits,
            misses,
            num_bytes,
            stall_ns * 1e-9,
            compute_ns * 1e-9,
            native_s,
            guessed,
            decide_s,
            guess_s,
            submit_s,
        )

    def _add_times(self, layer: int, stall_s: float, compute_s: float) -> None:
        row = self.cache.place_stats[self.table.place_of_layer[layer]]
        row[STALL_NS] += int(stall_s * 1e9)
        row[COMPUTE_NS] += int(compute_s * 1e9)

    def run(
        self,
        layer: int,
        x: np.ndarray,
        expert_ids: np.ndarray,
        routing_weights: np.ndarray,
    ) -> np.ndarray:
        """y[t] = sum over k of routing_weights[t, k] * expert(expert_ids[t, k])(x[t]).

        x [T, D] fp32, expert_ids [T, K] integers (distinct within a token; -1: none, whose weight
        counts for nothing), routing_weights [T, K] fp32; returns [T, D] fp32. Each record is read
        at most once. Raises
        RecordError for a record that cannot be read (the executor stays usable), BudgetError where
        the largest record does not fit into the expert cache.
        """
        num_tokens, top_k = expert_ids.shape
        self._check(layer, x, expert_ids, routing_weights)
        x = np.ascontiguousarray(x)
        y = np.zeros_like(x)
        if not num_tokens * top_k:
            return y
        ids, weights = expert_ids, routing_weights
        if self.cold.share and num_tokens == 1:
            first_key = self.table.first_key[layer]
            step = self.table.stand_in_step(layer) if self.stand_ins.after is not None else 0
            row = self.cold.left_of(ids[0], weights[0], self.cache.addresses, first_key, step)
            ids, weights = (part[None] for part in row)
        keys, begins = self._group(layer, ids, weights)
        if not keys:
            self.cache.begin_layer(layer, num_tokens)
            return y
        if self.stand_ins.after is not None and num_tokens == 1:
            keys = self.stand_ins.keys_of(
                keys,
                self._pair_weight[: len(keys)],
                self.cache.addresses,
                self.table.num_bytes,
                self.table.stand_in_step(layer),
            )
        waves = cut_waves(
            keys,
            None if num_tokens == 1 else begins,
            self.table.num_bytes,
            self.cache.capacity_bytes,
            self._max_pairs,
        )
        self.cache.begin_layer(
            layer, num_tokens, keys if len(waves) > 1 else (), ids if num_tokens > 1 else None
        )
        compute = self._compute if self._backend == "native" else self._compute_reference
        held: list[Wave] = []
        try:
            for number, wave in enumerate(waves):
                if not held:
                    self.cache.hint(wave.keys, wave.counts)
                    held.append(wave)
                if number + 1 < len(waves):
                    following = waves[number + 1]
                    if self.cache.try_hint(following.keys, following.counts) is not None:
                        held.append(following)
                compute(layer, x, y, wave, begins)
                self.cache.release(held.pop(0).keys)
        finally:
            for wave in held:
                self.cache.release(wave.keys)
        return y

    def _check(self, layer: int, x: np.ndarray, ids: np.ndarray, w: np.ndarray) -> None:
        num_tokens = ids.shape[0]
        if layer not in self.table.first_key:
            raise UsageError(f"layer {layer} has no expert records in this store")
        if num_tokens > self._chunk or ids.shape[1] > self._top_k:
            raise UsageError(
                f"expected at most {self._chunk} tokens in one run and {self._top_k} experts each, "
                f"got {num_tokens} and {ids.shape[1]}"
            )
        if x.shape != (num_tokens, self._hidden) or ids.shape != w.shape:
            raise UsageError(
                f"x {tuple(x.shape)}, expert_ids {tuple(ids.shape)} and routing_weights "
                f"{tuple(w.shape)} do not go together with a hidden size of {self._hidden}"
            )
        for name, part in (("x", x), ("routing_weights", w)):
            if part.dtype != np.float32:
                raise UsageError(f"`{name}`: expected fp32, got {part.dtype}")

    def _group(
        self, layer: int, expert_ids: np.ndarray, routing_weights: np.ndarray
    ) -> tuple[list[int], np.ndarray]:
        """Sort the pairs by expert, then token; returns the keys, ascending, and where the pairs of
        each begin, [n + 1]."""
        num_tokens, top_k = expert_ids.shape
        ids = expert_ids.reshape(-1)
        order = ids.argsort(kind="stable")
        ids = ids[order]
        num_experts = self.table.num_experts[layer]
        if ids[0] < -1 or ids[-1] >= num_experts:
            raise UsageError(
                f"layer {layer} has no expert {ids[0] if ids[0] < -1 else ids[-1]}",
                f"expected 0 to {num_experts - 1}, or -1 for none",
            )
        if ids[0] < 0:
            num_none = int(np.searchsorted(ids, 0))
            ids, order = ids[num_none:], order[num_none:]
            if not len(ids):
                return [], self._one_each[:1]
        self._pair_token[: len(ids)] = order // top_k
        self._pair_weight[: len(ids)] = routing_weights.reshape(-1)[order]
        keys = (ids + self.table.first_key[layer]).tolist()
        if num_tokens == 1 and len(set(keys)) == len(keys):
            return keys, self._one_each[: len(keys) + 1]
        edges = (ids[1:] != ids[:-1]).nonzero()[0] + 1
        begins = np.concatenate(([0], edges, [len(ids)]))
        return [keys[begin] for begin in begins[:-1]], begins

    def _compute(
        self,
        layer: int,
        x: np.ndarray,
        y: np.ndarray,
        wave: Wave,
        begins: np.ndarray,
    ) -> None:
        cache, args = self.cache, self._args
        count, first = len(wave.keys), int(begins[wave.begin])
        self._keys[:count] = wave.keys
        self._data[:count] = cache.addresses(wave.keys)
        np.subtract(begins[wave.begin : wave.end + 1], first, out=self._pair_begin[: count + 1])
        args.num_tokens, args.width, args.num_experts = x.shape[0], self.table.width[layer], count
        args.x, args.y = x.ctypes.data, y.ctypes.data
        args.pair_token = self._token_address + 4 * first
        args.pair_weight = self._weight_address + 4 * first
        args.stall_ns, args.failed = 0, -1
        start = time.perf_counter()
        status = core.lib.em_moe_run(
            self._pool.handle if self._pool is not None else None,
            cache.reader.handle,
            None,
            self._args_pointer,
        )
        elapsed = time.perf_counter() - start
        if status < 0:
            if args.failed < 0:
                raise EdgeMoeError(f"the core refused to run layer {layer}", f"status {status}")
            raise self.table.failure(wave.keys[args.failed], status)
        stall = args.stall_ns * 1e-9
        self._add_times(layer, stall, elapsed - stall)

    def _compute_reference(
        self,
        layer: int,
        x: np.ndarray,
        y: np.ndarray,
        wave: Wave,
        begins: np.ndarray,
    ) -> None:
        from . import reference

        tokens, weights, stall_s = self._pair_token, self._pair_weight, 0.0

        def experts() -> Iterator[tuple[np.ndarray, RecordLayout, np.ndarray, np.ndarray]]:
            nonlocal stall_s
            for i, key in enumerate(wave.keys, start=wave.begin):
                start = time.perf_counter()
                self.cache.wait(key)
                stall_s += time.perf_counter() - start
                pairs = slice(int(begins[i]), int(begins[i + 1]))
                yield self.cache.view(key), self.table.layouts[key], tokens[pairs], weights[pairs]

        start = time.perf_counter()
        reference.experts_forward(x, experts(), y, self._observe)
        self._add_times(layer, stall_s, time.perf_counter() - start - stall_s)
