"""Planned memory that is not in use, in which experts lie meanwhile. Floor 3.

A prompt of 512 tokens needs tens of MiB of buffers, a decoded token next to nothing. The buffers
lie behind the expert cache, in the same arena, and between prompts the cache grows over them: no
page goes back to the system to come again. So it is with what is planned for the process that
renders chat templates, until there is one.
"""

from collections.abc import Callable

from .runtime.budget import MemoryPlan, ModelDims, prompt_buffers
from .runtime.cache import ExpertCache
from .runtime.format import PAGE_BYTES
from .runtime.index import StoreIndex
from .runtime.memory import Arena
from .runtime.native_cache import NativeCache

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
        self._idle_bytes = min(lines["chat template"], most_bytes - self._prompt_bytes)
        self.room_bytes = self._prompt_bytes + self._idle_bytes
        self.lent_bytes, self._num_tokens = 0, self._most_tokens

    def serve(self, cache: ExpertCache | NativeCache, arena: Arena, use: UseMemory) -> None:
        """Begin to lend."""
        self._cache, self._use = cache, use
        self._start = arena.address
        self._prepare(self._most_tokens)

    @property
    def is_for_token(self) -> bool:
        """Whether the next step must be of one token."""
        return self._num_tokens == 1

    def begin_token(self) -> None:
        """From now on single tokens are decoded."""
        self._prepare(1)

    def begin_prompt(self, num_tokens: int) -> None:
        """Make room for a step of so many tokens."""
        num_tokens = min(num_tokens, self._most_tokens)
        if num_tokens > self._num_tokens:
            self._prepare(num_tokens)

    def end_idle(self) -> None:
        """What was idle is going to be used, from now on."""
        self.begin_token()
        self._idle_bytes = 0
        self._lend(self._prompt_bytes, keeps_memory=False)

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
            capacity = max(0, self._cache.capacity_bytes - self.lent_bytes + num_bytes)
            self._cache.trim(capacity, keeps_memory=keeps_memory)
            self.lent_bytes = num_bytes
