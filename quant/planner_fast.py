"""A plan from errors measured one by one: minutes where measuring every plan takes hours.

The loss of a plan is predicted as the sum over its experts of (a layer's weight) x (the expert's
output error at its width, over the tokens routed to it). Errors are measured on real inputs; the
weight of a layer is what a whole layer at the narrowest width costs, measured, over its summed
errors. Widths are then bought where a byte saves most: along the convex hull of each expert's
(bytes, cost), which is the Lagrangian optimum for every size on the way. Knows numbers only.
"""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .bitplan import Key

Choice = dict[Key, int]


@dataclass(frozen=True)
class Costs:
    """By expert, a value for each width in ascending bits: predicted loss, bytes of the record."""

    loss: Mapping[Key, Sequence[float]]
    num_bytes: Mapping[Key, Sequence[int]]

    def total_loss(self, choice: Mapping[Key, int]) -> float:
        return sum(self.loss[key][width] for key, width in choice.items())

    def total_bytes(self, choice: Mapping[Key, int]) -> int:
        return sum(self.num_bytes[key][width] for key, width in choice.items())


def hull(loss: Sequence[float], num_bytes: Sequence[int]) -> list[int]:
    """The widths worth having: bytes rise, loss falls, and each step saves less a byte than the
    one before."""
    kept: list[int] = []
    for width in sorted(range(len(loss)), key=lambda w: (num_bytes[w], loss[w])):
        if kept and loss[width] >= loss[kept[-1]]:
            continue
        while len(kept) > 1 and _rate(loss, num_bytes, kept[-2], kept[-1]) <= _rate(
            loss, num_bytes, kept[-1], width
        ):
            kept.pop()
        kept.append(width)
    return kept


def _rate(loss: Sequence[float], num_bytes: Sequence[int], a: int, b: int) -> float:
    """Loss saved by a byte, from width a to the wider b."""
    return (loss[a] - loss[b]) / max(1, num_bytes[b] - num_bytes[a])


def upgrades(costs: Costs) -> tuple[Choice, list[tuple[Key, int]]]:
    """The cheapest choice, and every step to the best one, the most worthwhile byte first."""
    hulls = {key: hull(costs.loss[key], costs.num_bytes[key]) for key in sorted(costs.loss)}
    start = {key: widths[0] for key, widths in hulls.items()}
    heap: list[tuple[float, Key, int]] = []

    def push(key: Key, at: int) -> None:
        widths = hulls[key]
        if at + 1 < len(widths):
            rate = _rate(costs.loss[key], costs.num_bytes[key], widths[at], widths[at + 1])
            heapq.heappush(heap, (-rate, key, at))

    for key in hulls:
        push(key, 0)
    steps = []
    while heap:
        _, key, at = heapq.heappop(heap)
        steps.append((key, hulls[key][at + 1]))
        push(key, at + 1)
    return start, steps


def within_bytes(costs: Costs, max_bytes: int) -> Choice | None:
    """A choice of at most `max_bytes` with little predicted loss; None where none fits.

    Steps are taken in their order; one that does not fit any more is passed over, with the later
    ones of its expert. What room that leaves goes to single changes of any kind. Never worse than
    a uniform choice that fits.
    """
    choice, steps = upgrades(costs)
    total = costs.total_bytes(choice)
    if total > max_bytes:
        return None
    passed: set[Key] = set()
    for key, width in steps:
        more = costs.num_bytes[key][width] - costs.num_bytes[key][choice[key]]
        if key in passed or total + more > max_bytes:
            passed.add(key)
            continue
        choice[key], total = width, total + more
    while True:
        change = _best_change(costs, choice, max_bytes - total)
        if change is None:
            break
        key, width = change
        total += costs.num_bytes[key][width] - costs.num_bytes[key][choice[key]]
        choice[key] = width
    num_widths = len(next(iter(costs.loss.values())))
    uniform = [dict.fromkeys(choice, width) for width in range(num_widths)]
    fitting = [each for each in uniform if costs.total_bytes(each) <= max_bytes]
    return min([choice, *fitting], key=costs.total_loss)


def _best_change(costs: Costs, choice: Choice, room: int) -> tuple[Key, int] | None:
    """The change of one expert's width that fits into `room` bytes and saves most."""
    best, found = 0.0, None
    for key, current in sorted(choice.items()):
        for width, loss in enumerate(costs.loss[key]):
            more = costs.num_bytes[key][width] - costs.num_bytes[key][current]
            saved = costs.loss[key][current] - loss
            if more <= room and saved > best:
                best, found = saved, (key, width)
    return found


def within_loss(
    costs: Costs, measure: Callable[[Choice], float], max_loss: float
) -> tuple[Choice, float, int]:
    """The fewest steps whose measured loss is within `max_loss`, by bisection: the choice, its
    measured loss and the number of measurements. The best choice where even that is beyond."""
    start, steps = upgrades(costs)

    def after(count: int) -> Choice:
        return {**start, **dict(steps[:count])}

    losses: dict[int, float] = {}

    def loss(count: int) -> float:
        if count not in losses:
            losses[count] = measure(after(count))
        return losses[count]

    beyond, within = -1, len(steps)
    if loss(within) > max_loss:
        return after(within), loss(within), len(losses)
    while within - beyond > 1:
        middle = (within + beyond) // 2
        if loss(middle) <= max_loss:
            within = middle
        else:
            beyond = middle
    return after(within), loss(within), len(losses)
