"""Planned memory that is not in use, in which experts lie meanwhile. Floor 3.

A prompt of 512 tokens needs tens of MiB of buffers, a decoded token next to nothing. The buffers
lie behind the expert cache, in the same arena, and between prompts the cache grows over them: no
page goes back to the system to come again. What lies elsewhere is lent until it is needed, and goes
back to the system before that: keys and values of tokens to come, a few hundred tokens at a time,
and what is planned for the process that renders chat templates.
"""

import sys
from collections.abc import Callable
from weakref import WeakKeyDictionary

from .kv_cache import KVCache
from .runtime.budget import MemoryPlan, ModelDims, prompt_buffers
from .runtime.cache_base import CacheBase
from .runtime.format import PAGE_BYTES
from .runtime.index import StoreIndex
from .runtime.memory import HUGE_PAGE_BYTES, Arena

# Of buffers: where the executor's workspace lies, then where the core's scratch lies and its bytes;
# None: each in memory of its own.
UseMemory = Callable[[int | None, int | None, int], None]


class LentMemory:
    """Lends the expert cache the room for the buffers of a prompt, and what else is idle.

    The cache has `capacity` bytes of its arena when nothing is lent; the arena `room_bytes` more.
    Buffers lie right behind the cache, wherever that ends. Its size is changed between prompts
    (`begin_token`): else memory in use would be given away, and other memory kept.
    """

    def __init__(self, plan: MemoryPlan, index: StoreIndex, dims: ModelDims, capacity: int) -> None:
        self._index, self._dims, self._chunk = index, dims, plan.chunk
        lines = {line.name: line.num_bytes for line in plan.lines}
        most_bytes = max(0, plan.max_cache_bytes - capacity) // PAGE_BYTES * PAGE_BYTES
        self._most_tokens = min(plan.chunk, plan.context)
        self._prompt_bytes = sum(self._buffers(self._most_tokens))
        if self._prompt_bytes > min(most_bytes, lines["activations"]):
            self._prompt_bytes = 0
        self._template_bytes = lines["chat template"]
        # Elsewhere memory does not go back to the system before the process ends.
        self._kv_bytes = self._kv_line = lines["KV cache"] if sys.platform == "linux" else 0
        most = self._prompt_bytes + self._template_bytes + self._kv_bytes
        self.room_bytes = min(most, most_bytes)
        self._capacity, self._end = capacity, capacity + self.room_bytes
        self._held: WeakKeyDictionary[KVCache, int] = WeakKeyDictionary()  # bytes
        self._kv_view: object = None  # of the last token's KV cache, which it does not keep alive
        self._idle_bytes, self._num_tokens = self._now_idle(), self._most_tokens

    def serve(self, cache: CacheBase, arena: Arena, use: UseMemory) -> None:
        """Begin to lend."""
        self._cache, self._use = cache, use
        self._start = arena.address
        self._prepare(self._most_tokens)

    @property
    def lent_bytes(self) -> int:
        """What the cache has now above what it may keep."""
        return self._cache.capacity_bytes - self._capacity

    def is_ready(self, kv_cache: KVCache) -> bool:
        """Whether `begin_token` would change nothing."""
        is_known = kv_cache.view is self._kv_view and kv_cache.offset < kv_cache.room
        return is_known and self._num_tokens == 1

    def begin_token(self, kv_cache: KVCache) -> None:
        """The next step is one token of this KV cache."""
        self.hold(kv_cache, kv_cache.offset + 1)
        self._kv_view = kv_cache.view
        self._prepare(1)

    def begin_prompt(self, num_tokens: int, kv_cache: KVCache) -> None:
        """The next step is so many tokens of this KV cache."""
        self.hold(kv_cache, kv_cache.offset + num_tokens)
        num_tokens = min(num_tokens, self._most_tokens)
        if num_tokens > self._num_tokens:
            self._prepare(num_tokens)

    def hold(self, kv_cache: KVCache, num_tokens: int, *, no_more: bool = False) -> None:
        """Have room for so many tokens in this KV cache; `no_more`: give back what is beyond."""
        room = max(kv_cache.room_for(num_tokens), kv_cache.offset) if self._kv_line else 0
        is_new = kv_cache not in self._held
        if not room or not (is_new or room > kv_cache.room or no_more and room < kv_cache.room):
            return
        if room < kv_cache.room:
            kv_cache.resize(room)
        self._held[kv_cache] = kv_cache.held_bytes(room)
        self._change()
        if room > kv_cache.room:
            kv_cache.resize(room)

    def share(self, capacity: int, num_kv_caches: int) -> None:
        """The cache may keep so much from now on, and so many KV caches are planned."""
        self._change(capacity, max(1, num_kv_caches) * self._kv_line)

    def end_template(self) -> None:
        """A process renders chat templates, from now on."""
        self._template_bytes = 0
        self._change()

    def begin_layers(self) -> None:
        """From now on layers run without telling of tokens and KV caches."""
        if self._kv_line:
            self._kv_line = 0
            self._change(self._capacity, 0)
            for kv_cache in self._held:
                kv_cache.resize(kv_cache.capacity)
        self._prepare(self._most_tokens)

    def _now_idle(self) -> int:
        """Bytes that are lent also while a prompt has all of its buffers."""
        begin = self._capacity + self._prompt_bytes
        num_bytes = self._template_bytes + max(0, self._kv_bytes - sum(self._held.values()))
        num_bytes = min(num_bytes, self._end - begin)
        if self._kv_line:  # a huge page of which a part goes back may stay in memory as a whole
            num_bytes -= min(num_bytes, (begin + num_bytes) % HUGE_PAGE_BYTES)
        return num_bytes

    def _change(self, capacity: int | None = None, kv_bytes: int | None = None) -> None:
        """Lend what is idle now; memory that is not goes back to the system."""
        self._prepare(1)  # all of it is the cache's
        self._capacity = self._capacity if capacity is None else capacity
        self._kv_bytes = self._kv_bytes if kv_bytes is None else kv_bytes
        self._idle_bytes = self._now_idle()
        self._lend(self._idle_bytes + self._prompt_bytes, keeps_memory=False)

    def _buffers(self, num_tokens: int) -> tuple[int, int]:
        return prompt_buffers(self._dims, self._index, num_tokens, self._chunk)

    def _prepare(self, num_tokens: int) -> None:
        if num_tokens == 1 or not self._prompt_bytes:
            self._use(None, None, 0)
            self._lend(self._idle_bytes + self._prompt_bytes)
        else:
            workspace_bytes, scratch_bytes = self._buffers(num_tokens)
            spare_bytes = self._prompt_bytes - workspace_bytes - scratch_bytes
            self._lend(self._idle_bytes + spare_bytes)
            begin = self._start + self._cache.capacity_bytes
            self._use(begin, begin + workspace_bytes, scratch_bytes)
        self._num_tokens = num_tokens

    def _lend(self, num_bytes: int, keeps_memory: bool = True) -> None:
        if num_bytes != self.lent_bytes:
            self._cache.trim(self._capacity + num_bytes, keeps_memory=keeps_memory)
