"""KV caches for sessions, and the expert cache that makes room for them. Floor 3."""

import weakref
from typing import TYPE_CHECKING

from .preflight import line_bytes
from .runtime.amounts import format_bytes
from .runtime.errors import BudgetError

if TYPE_CHECKING:
    from .engine import Engine
    from .kv_cache import KVCache
    from .session import Session


class KVLending:
    """The plan holds one KV cache; further ones are taken from what is unused, then from the expert
    cache, which has it back when a session ends. The engine's lock is its caller's to hold."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = weakref.proxy(engine)
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    def lend(self, session: "Session") -> "KVCache":
        """Raises BudgetError where too little would be left for experts."""
        from .kv_cache import KVCache

        engine = self._engine
        self._resize_cache(len(self._sessions) + 1)
        self._sessions.add(session)
        kv_cache = KVCache.for_model(engine.args, engine.context, engine.config.kv_bits)
        kv_cache.resize(kv_cache.room_for(1))  # the first token would touch all of a full layout
        return kv_cache

    def take_back(self, session: "Session") -> None:
        """The session has ended."""
        self._sessions.discard(session)
        if not self._engine.closed:
            self._resize_cache(len(self._sessions))

    def _resize_cache(self, num_sessions: int) -> None:
        engine = self._engine
        if engine.config.memory_bytes is None:
            return
        plan, kv_bytes = engine.plan, line_bytes(engine.plan, "KV cache")
        extra = max(0, (num_sessions - 1) * kv_bytes - line_bytes(plan, "unused"))
        capacity = engine._full_capacity - extra
        if extra and capacity < plan.min_cache_bytes:
            raise BudgetError(
                f"no memory for {num_sessions} sessions at once",
                f"each has a KV cache of {format_bytes(kv_bytes)}",
                "close one, or give a larger --memory or a shorter --context",
            )
        if engine.governed is not None:
            engine.governed.set_most(capacity)
            return
        if engine.lent_memory is not None:
            engine.lent_memory.share(capacity, num_sessions)
        elif capacity != engine.cache.capacity_bytes:
            engine.cache.trim(capacity)
