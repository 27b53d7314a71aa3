"""Experts averaged into one: their neurons are brought into one order first.

A gated expert down(silu(gate x) * (up x)) does the same with its F neurons in any order, which is
one permutation of the rows of gate and up and of the columns of down. Two experts are compared in
the order of neurons in which they are most alike (UNCURL 2409.01483, M-SMoE 2310.01334). M-SMoE's
code brings all experts of a layer into the order of one of them; the order of the expert that they
are merged into loses less (docs/sets.md).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .assignment import best_assignment
from .merge import Group

Body = tuple[Tensor, Tensor, Tensor]  # gate [F, D], up [F, D], down [D, F], fp32
Orders = dict[int, Tensor]  # by member: which of its neurons is where, int64 [F]


def neuron_order(target: Body, body: Body) -> Tensor:
    """int64 `[F]`: for every neuron of `target` the one of `body` that takes its place, so that the
    sum of the products of all weights is largest."""
    scores = target[0] @ body[0].T
    scores.addmm_(target[1], body[1].T).addmm_(target[2].T, body[2])
    return torch.from_numpy(best_assignment(scores.numpy()))


def ordered(body: Body, order: Tensor) -> Body:
    """`body`, its neurons in this order: the same function."""
    gate, up, down = body
    return gate[order], up[order], down[:, order]


def merged_body(group: Group, read: Callable[[int], Body], orders: Orders | None = None) -> Body:
    """The average of a group by its weights, every member in the order of neurons of the head,
    which go into `orders`. In memory are three experts.

    Differences from the head are averaged, so that equal members give the head bit for bit.
    """
    head = fp32(read(group.head))
    orders = {} if orders is None else orders
    orders[group.head] = torch.arange(len(head[0]))
    total = tuple(part.clone() for part in head)
    for expert, weight in zip(group.members, group.weights, strict=True):
        if expert == group.head or not weight:
            continue
        member = fp32(read(expert))
        orders[expert] = neuron_order(head, member)
        member = ordered(member, orders[expert])
        for sum_, part, base in zip(total, member, head, strict=True):
            sum_.add_(part - base, alpha=weight)
    return total


def merged_rows(group: Group, rows: Tensor) -> Tensor:
    """The row of the router of a group, fp32 `[D]`, from rows fp32 `[E, D]`."""
    head = rows[group.head]
    weights = torch.tensor(group.weights)[:, None]
    return head + ((rows[list(group.members)] - head) * weights).sum(dim=0)


def fp32(body: Body) -> Body:
    return tuple(part.float() for part in body)
