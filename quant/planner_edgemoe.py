"""EdgeMoE's choice of bit-widths (2308.14352): every expert is measured, nothing is modelled.

1. Every width alone: the adjacent pair of widths (low, high) that brackets the tolerable loss P.
2. Sensitivity: the loss with one expert at the low width and all others at the high one, for each.
3. The K least sensitive experts at the low width, the rest at the high one: the largest K whose
   loss is within P, by bisection between K = 0 (within) and K = all (not within); both K and K + 1
   are measured. E L + |B| + log2(E L) evaluations in all.
Knows numbers only: the metric is whatever `measure` gives, such as perplexity on held-out text.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..runtime.errors import UsageError
from .bitplan import Key

Choice = Mapping[Key, int]
Measure = Callable[[Choice], float]


@dataclass(frozen=True, slots=True)
class Found:
    """A choice of widths (numbers, ascending bits), and how it was found (JSON values)."""

    choice: dict[Key, int]
    loss: float  # relative rise of the metric over the reference's
    report: dict[str, Any] = field(default_factory=dict)


def edgemoe_plan(
    keys: Sequence[Key],
    num_widths: int,
    measure: Measure,
    max_loss: float,
    on_base: Callable[[Choice], None] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Found:
    """The mixed plan with the most experts at the lower width whose loss is within `max_loss`.

    `measure(choice)` is a metric that falls with quality (perplexity); the loss is its relative
    rise over the widest uniform plan. `on_base` hears of the choice that the sensitivities are
    small changes of. Raises UsageError where `max_loss` is negative.
    """
    if max_loss < 0:
        raise UsageError(f"a loss of {max_loss:.2%} cannot be asked for", "expected 0 or more")
    keys, count = sorted(keys), 0
    tell = progress or (lambda phase, done, total: None)

    def metric(choice: Choice) -> float:
        nonlocal count
        count += 1
        return measure(choice)

    uniform = [dict.fromkeys(keys, width) for width in range(num_widths)]
    metrics = []
    for width, choice in enumerate(uniform):
        tell("widths", width, num_widths)
        metrics.append(metric(choice))
    losses = [value / metrics[-1] - 1 for value in metrics]
    high = num_widths - 1
    while high and losses[high - 1] <= max_loss:
        high -= 1
    report: dict[str, Any] = {"uniform_losses": losses, "reference_metric": metrics[-1]}
    if not high:
        report |= {"num_low": len(keys), "num_evaluations": count, "sensitivities": {}}
        return Found(uniform[0], losses[0], report)
    low = high - 1
    if on_base is not None:
        on_base(uniform[high])
    sensitivity: dict[Key, float] = {}
    for number, key in enumerate(keys):
        tell("experts", number, len(keys))
        sensitivity[key] = metric({**uniform[high], key: low}) / metrics[-1] - 1
    order = sorted(keys, key=lambda key: (sensitivity[key], key))

    def filled(num_low: int) -> dict[Key, int]:
        return {**uniform[high], **dict.fromkeys(order[:num_low], low)}

    within, beyond = 0, len(keys)
    loss_within, loss_beyond = losses[high], losses[low]
    while beyond - within > 1:
        tell("fill", within, len(keys))
        middle = (within + beyond) // 2
        loss = metric(filled(middle)) / metrics[-1] - 1
        if loss <= max_loss:
            within, loss_within = middle, loss
        else:
            beyond, loss_beyond = middle, loss
    report |= {
        "low": low,
        "high": high,
        "num_low": within,
        "loss_of_one_more": loss_beyond,
        "num_evaluations": count,
        "order": [list(key) for key in order],
        "sensitivities": {f"{layer}.{e}": sensitivity[layer, e] for layer, e in keys},
    }
    return Found(filled(within), loss_within, report)
