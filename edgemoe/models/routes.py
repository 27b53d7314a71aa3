"""From a router's scores to the routes of a token: the twin of csrc/routing.cpp. Floor 2.

The order: softmax over the rows that masks and gains leave; the largest `active_experts` of them,
of equal ones the lowest; of those the shortest run that adds up to more than `top_p`; weights,
divided where the model does; gains; rows of one body summed up, null experts dropped.
"""

import torch
from torch import Tensor

from .rules import Rule

NO_BODY = -1


def choose(
    rule: Rule,
    scores: Tensor,
    rows: Tensor,
    top_k: int,
    renormalise: bool,
    bodies: Tensor | None = None,
    gains: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """scores `[T, n]`, a softmax over the router's rows `rows` int64 `[n]`, ascending -> routes:
    bodies int64 `[T, K]`, ascending, then -1, and routing weights fp32 `[T, K]`, then 0.

    `bodies` int64 `[E]`: what each row stands for, -1: nothing (a null expert). `gains` fp32 `[E]`.
    """
    count = min(rule.active_experts or top_k, scores.shape[1])
    weights, order = scores.sort(dim=-1, descending=True, stable=True)
    weights, chosen = weights[:, :count], rows[order[:, :count]]
    found = chosen if bodies is None else bodies[chosen]
    is_used = found >= 0
    if renormalise:  # over what has a body; top-p spreads nothing over those that stay
        weights = weights / weights.where(is_used, torch.zeros(())).sum(dim=-1, keepdim=True)
    if 0 < rule.top_p < 1:
        before = scores.gather(-1, order[:, :count]).double().cumsum(dim=-1)
        is_used[:, 1:] &= before[:, :-1] <= float(torch.tensor(rule.top_p))
    if gains is not None:
        weights = weights * gains[chosen]
    chosen, order = chosen.sort(dim=-1)  # weights of one body are added in the order of rows
    weights, found, is_used = (part.gather(-1, order) for part in (weights, found, is_used))
    num_bodies = int(rows[-1]) + 1 if bodies is None else int(bodies.max()) + 1
    found = found.where(is_used, num_bodies)  # one column more, for what is not used
    sums = torch.zeros(len(scores), num_bodies + 1).scatter_add_(1, found, weights)
    is_active = torch.zeros(len(scores), num_bodies + 1, dtype=torch.bool)
    is_active.scatter_(1, found, True)[:, num_bodies] = False
    places = torch.arange(num_bodies + 1).where(is_active, num_bodies).sort(dim=-1).values
    ids = torch.full((len(scores), top_k), num_bodies)
    ids[:, : places.shape[1]] = places[:, :top_k]
    is_none = ids == num_bodies
    return ids.masked_fill(is_none, NO_BODY), sums.gather(-1, ids).masked_fill(is_none, 0.0)


def input_scale(rule: Rule, scores: Tensor, rows: Tensor, top_k: int, theta: Tensor) -> Tensor:
    """What the input of a token's experts is multiplied with, `[T, D]`: 1 + sum of a (theta - 1)
    over its auxiliary ones, a being the share of each among them; thetas of 1 change no bit.
    scores, rows as in `choose`; theta fp32 `[E, D]`."""
    active = rule.active_experts or top_k
    order = scores.argsort(dim=-1, descending=True, stable=True)
    order = order[:, active : active + rule.num_auxiliary]
    shares = scores.gather(-1, order)
    shares = shares / shares.sum(dim=-1, keepdim=True)
    return 1.0 + (shares[:, :, None] * (theta[rows[order]] - 1.0)).sum(dim=1)
