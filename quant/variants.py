"""Plans measured without writing a store for each: one store of all variants, and a model on it.

The store of variants has a record for every expert at every width, made in one pass over the source
(`ConvertOptions.variants`). The model is the engine's own: trunk, layers, executor, expert cache; a
plan only says which record stands for an expert, so that its losses are those of the store that the
plan would become, bit for bit. No engine opens such a store.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil

from ..kv_cache import KVCache
from ..models import parse_config
from ..models.causal_lm import CausalLM
from ..models.steps import Routed
from ..runtime.errors import FormatError
from ..runtime.executor import Executor
from ..runtime.format import PAGE_BYTES
from ..runtime.io import Arena
from ..runtime.kernels import ThreadPool
from ..runtime.native_cache import make_cache
from ..runtime.store import Store
from .bitplan import Key
from .evaluate import Losses, Sums
from .options import ExpertSpec
from .progress import Progress, Silent
from .windows import Window

Choice = Mapping[Key, int]  # the variant of every expert, by number
_KEPT_BYTES = 1 << 30  # of hidden states of the base, so that later layers need not start over


class VariantModel:
    """Losses of any choice of variants over some windows. Close it.

    `reference` (a uniform choice of the last variant, the widest) is what losses are compared with.
    """

    def __init__(self, path: str | Path, windows: Sequence[Window], num_threads: int) -> None:
        self._resources = ExitStack()
        try:
            self._open(Path(path), num_threads)
        except BaseException:
            self._resources.close()
            raise
        self._windows = windows
        self._kv_cache = KVCache.for_model(self.args, max(len(w.ids) for w in windows), 16)
        self.num_evaluations = 0
        self._base: Choice | None = None
        self._kept: dict[int, list[np.ndarray]] = {}  # by layer: x of every window in front of it
        self._reference: list[np.ndarray] | None = None
        self._reference = self._states({key: self.num_variants - 1 for key in self.keys})
        self.reference = self._losses(self._reference)

    def _open(self, path: Path, num_threads: int) -> None:
        store = Store(path)
        self._resources.callback(store.close)
        self.index = store.index
        self.args = args = parse_config(self.index.config)
        self.variants = [ExpertSpec(**spec) for spec in self.index.plan.get("variants", ())]
        if not self.variants:
            raise FormatError(f"`{path}` is no store of variants")
        pool = ThreadPool(num_threads)
        self._resources.callback(pool.close)
        self._experts = _Chosen(self.num_variants)
        self._model = CausalLM(args, store.trunk_tensor, self._experts, pool)
        wanted = min(self.index.expert_bytes, psutil.virtual_memory().available // 2)
        least = 2 * args.top_k * self.index.max_record_bytes
        arena = Arena(max(wanted, least) // PAGE_BYTES * PAGE_BYTES)
        self._resources.callback(arena.close)
        self._resources.callback(store.close)  # no read outlives its memory
        cache = make_cache(store.reader, arena, arena.num_bytes, self.index.records)
        self._resources.callback(cache.close)
        self._experts.executor = Executor(cache, pool, hidden=args.hidden, top_k=args.top_k)

    @property
    def num_variants(self) -> int:
        return len(self.variants)

    @property
    def keys(self) -> list[Key]:
        """(layer, expert) of every expert."""
        args = self.args
        return [(layer, e) for layer in args.moe_layers for e in range(args.num_experts)]

    def record_bytes(self, key: Key, variant: int) -> int:
        """Bytes of the record that would stand for an expert."""
        return self.index.records[key[0], key[1] * self.num_variants + variant].num_bytes

    def losses(self, choice: Choice, progress: Progress | None = None) -> Losses:
        """Losses of a choice, beside those of the reference and the divergence from it.

        Begins at the first layer where the choice differs from the base.
        """
        self.num_evaluations += 1
        return self._losses(self._states(choice, progress or Silent()))

    def perplexity(self, choice: Choice) -> float:
        """The perplexity of a choice alone, in half the time of its losses."""
        self.num_evaluations += 1
        return math.exp(self._losses(self._states(choice), compared=False).nll.mean())

    @property
    def identity(self) -> str:
        """What figures depend on beside a choice: the records, and the windows."""
        made = hashlib.sha256(json.dumps([self.index.plan, self.index.sha256]).encode())
        for window in self._windows:
            made.update(json.dumps([window.first, window.ids]).encode())
        return made.hexdigest()

    def set_base(self, choice: Choice) -> None:
        """Keep the hidden states of a choice; those measured next differ from it in little."""
        args = self.args
        num_tokens = sum(len(window.ids) for window in self._windows)
        if args.num_layers * num_tokens * args.hidden * 4 <= _KEPT_BYTES:
            self._base, self._kept = None, {}
            self._states(choice, keep=True)
            self._base = dict(choice)

    def _states(
        self, choice: Choice, progress: Progress | None = None, keep: bool = False
    ) -> list[np.ndarray]:
        """x `[T, D]` of every window behind the last layer."""
        first = 0
        if self._base is not None:
            changed = [key[0] for key in choice if choice[key] != self._base[key]]
            first = min(changed, default=self.args.num_layers - 1)
        self._experts.choose(choice, self.args.num_experts)
        steps, args = self._model.steps, self.args
        found = []
        for number, window in enumerate(self._windows):
            self._kv_cache.trim(0)
            if first:
                x = self._kept[first][number].copy()
            else:
                x = steps.embed(np.array(window.ids))
            routed = Routed.room(args, len(x))
            for layer in range(first, args.num_layers):
                if keep:
                    self._kept.setdefault(layer, []).append(x.copy())
                steps.attend(layer, x, self._kv_cache, routed, np.array(window.ids))
                y = self._experts.run(layer, *routed) if layer in args.moe_layers else None
                steps.finish(layer, x, routed, y)
            found.append(x)
            if progress is not None:
                progress.advance(len(x))
        return found

    def _losses(self, states: list[np.ndarray], compared: bool = True) -> Losses:
        sums = Sums(compared)
        for number, window in enumerate(self._windows):
            logits = self._model.steps.logits(states[number])
            other = self._model.steps.logits(self._reference[number]) if compared else None
            sums.add(window, 0, logits, other)
        return sums.losses()

    def close(self) -> None:
        self._model = None
        self._resources.close()

    def __enter__(self) -> "VariantModel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Chosen:
    """The executor of a store of variants, asked for experts and giving their chosen records.

    Records of an expert lie side by side, so that the order of experts, in which outputs are added,
    is that of every plan's own store.
    """

    def __init__(self, num_variants: int) -> None:
        self.executor: Executor | None = None
        self._num_variants = num_variants
        self._records: dict[int, np.ndarray] = {}

    def choose(self, choice: Choice, num_experts: int) -> None:
        layers = {layer for layer, _ in choice}
        self._records = {
            layer: np.array(
                [e * self._num_variants + choice[layer, e] for e in range(num_experts)],
                dtype=np.int32,
            )
            for layer in layers
        }

    def run(
        self, layer: int, x: np.ndarray, expert_ids: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        return self.executor.run(layer, x, self._records[layer][expert_ids], weights)

    @property
    def table(self) -> object:
        return self.executor.table

    @property
    def cache(self) -> object:
        return self.executor.cache
