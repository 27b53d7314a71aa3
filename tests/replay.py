"""Replays of a demand trace in a cache of equal records: the oracle of the expert cache's tests.

A trace is a list of (layer, keys): the records that one layer of one token needs at once.
"""

import heapq

import numpy as np

from edgemoe.runtime.policy import Policy

Trace = list[tuple[int, list[int]]]
_NEVER = 1 << 60


def belady_hits(trace: Trace, capacity: int) -> int:
    """Hits of the best eviction there is: what is needed furthest in the future goes."""
    uses: dict[int, list[int]] = {}
    for time in range(len(trace) - 1, -1, -1):
        for key in trace[time][1]:
            uses.setdefault(key, []).append(time)
    next_use: dict[int, int] = {}  # of what is resident
    furthest: list[tuple[int, int]] = []
    hits = 0
    for _, keys in trace:
        hits += sum(key in next_use for key in keys)
        missing = [key for key in keys if key not in next_use]
        for key in keys:
            uses[key].pop()
            next_use[key] = uses[key][-1] if uses[key] else _NEVER
        kept = []
        while len(next_use) > capacity:
            time, key = heapq.heappop(furthest)
            if key in keys:
                kept.append((time, key))
            elif next_use.get(key) == -time:
                del next_use[key]
        for entry in [*kept, *((-next_use[key], key) for key in keys)]:
            heapq.heappush(furthest, entry)
        assert len(next_use) <= capacity or len(missing) > capacity
    return hits


def replay_hits(trace: Trace, capacity: int, policy: Policy, num_keys: int) -> int:
    """Hits of a policy; a new token starts where the layer does not grow."""
    resident: set[int] = set()
    blocked = np.ones(num_keys, dtype=np.bool_)
    hits, step, last_layer = 0, 0, -1
    for layer, keys in trace:
        step += layer <= last_layer
        last_layer = layer
        hits += sum(key in resident for key in keys)
        missing = [key for key in keys if key not in resident]
        blocked[keys] = True
        policy.expect(np.array(keys))
        for key in missing:
            if len(resident) >= capacity:
                victim = policy.victim(layer, blocked)
                resident.remove(victim)
                blocked[victim] = True
                policy.remove(victim)
            resident.add(key)
        policy.touch(np.array(keys), step)
        for key in missing:
            policy.insert(key)
        blocked[list(resident)] = False
    return hits


def skewed_trace(
    num_tokens: int, num_layers: int, num_experts: int, top_k: int, seed: int = 0
) -> Trace:
    """Every layer prefers some experts, and for stretches of 40 tokens some others."""
    rng = np.random.default_rng(seed)
    base = rng.gumbel(size=(num_layers, num_experts)) * 1.2
    trace = []
    for token in range(num_tokens):
        if token % 40 == 0:
            mood = rng.gumbel(size=base.shape) * 0.8
        scores = base + mood + rng.gumbel(size=base.shape)
        for layer in range(num_layers):
            chosen = np.sort(np.argpartition(-scores[layer], top_k)[:top_k])
            trace.append((layer, (layer * num_experts + chosen).tolist()))
    return trace
