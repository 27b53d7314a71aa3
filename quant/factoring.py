"""Experts as low-rank factors beside some dense neurons: the bodies of MC-SMoE (2310.01334).

MC-SMoE stores a merged matrix as U V + S, S being zero but for some neurons. Where a neuron has a
row (of gate and up) or column (of down) in S, U V + S can be anything there, so its weights are
stored as they are, and U V stands for the other neurons only: no rank is spent on the dense ones.
The authors choose S by gradients and train; here both follow from the weights, and from how large
what they meet is: the dense neurons are those that lose most, in turns with the best factors of
the rest. F neurons, D hidden, S dense, R rank.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..runtime.errors import UsageError
from ..runtime.format import ACT_GROUP, GROUP_SIZES, Factors, QuantSpec, RecordLayout, round_up
from .merge_bodies import Body

DEFAULT_RANK = 32  # MC-SMoE's
DEFAULT_DENSE = 0.1  # the share of S that its pruning leaves
_TURNS = 8


@dataclass(frozen=True, slots=True)
class Factoring:
    """How bodies are factored; `whole_layers` are left as they are."""

    dense: int
    rank: int
    whole_layers: frozenset[int] = frozenset()

    def layout(self, layer: int, whole: RecordLayout) -> RecordLayout:
        """The layout of a record that was `whole`."""
        if layer in self.whole_layers:
            return whole
        factored = whole.width - self.dense
        factors = Factors(
            self.dense, self.rank, _fitting(_fitting(whole.gate_up, self.rank), factored)
        )
        return replace(whole, down=_fitting(whole.down, self.dense + self.rank), factors=factors)


def _fitting(spec: QuantSpec, cols: int) -> QuantSpec:
    """`spec` in the largest groups, no larger than its own, that divide `cols` columns."""
    if spec.is_16bit:
        return spec
    sizes = [size for size in GROUP_SIZES if size <= spec.group_size and cols % size == 0]
    return replace(spec, group_size=max(sizes))


def choose_factoring(
    whole: RecordLayout,
    rank: int | float | None,
    dense_share: float | None,
    num_bytes: int | float | None,
    whole_layers: frozenset[int] = frozenset(),
) -> Factoring:
    """What the options ask of bodies that were `whole`, in the units that can be stored.

    `rank`: a number, or as a float a share of the smaller of D and F. `num_bytes` instead: the
    largest rank whose record has no more bytes, or as a float no more than that share of them.
    Raises UsageError where nothing is saved or nothing fits.
    """
    width, smaller = whole.width, min(whole.width, whole.hidden)
    dense = round_up(
        int(width * (DEFAULT_DENSE if dense_share is None else dense_share)), ACT_GROUP
    )
    if num_bytes is None:
        wanted = DEFAULT_RANK if rank is None else rank
        found = wanted * smaller if isinstance(wanted, float) else wanted
        ranks = [max(ACT_GROUP, round_up(int(found), ACT_GROUP))]
        most = whole.num_bytes - 1
    else:
        ranks = list(range(smaller // ACT_GROUP * ACT_GROUP, 0, -ACT_GROUP)) or [ACT_GROUP]
        most = num_bytes
        if isinstance(num_bytes, float):
            most = int(num_bytes * whole.num_bytes)
    for each in ranks:
        factoring = Factoring(dense, each, whole_layers)
        found = factoring.layout(-1, whole).num_bytes
        if found <= most:
            return factoring
    raise UsageError(
        f"{dense} dense neurons and rank {ranks[-1]} save nothing"
        if num_bytes is None
        else f"no rank makes a body of {most} bytes with {dense} dense neurons",
        f"a body has {whole.num_bytes} bytes whole, {found} then",
        "give a smaller --rank or --dense-neurons",
    )


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean squares of what goes into an expert `[D]` and into its down projection `[F]`."""

    inputs: Tensor
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class FactoredBody:
    """The matrices of a factored record, stacked as there; its neurons in another order than the
    body's, dense ones first."""

    gate: Tensor  # [S + R, D]
    up: Tensor  # [S + R, D]
    down: Tensor  # [D, S + R]
    u_gate: Tensor  # [F - S, R]
    u_up: Tensor  # [F - S, R]
    v_down: Tensor  # [R, F - S]


def factor_body(body: Body, dense: int, rank: int, moments: Moments | None = None) -> FactoredBody:
    """The factors of a body; `moments` weigh what is lost."""
    gate, up, down = (part.double() for part in body)
    inputs, per_row = _scales(gate, up, down, moments)
    parts = [
        (gate, inputs, per_row[0]),
        (up, inputs, per_row[1]),
        (down.T, torch.ones(len(down), dtype=torch.float64), per_row[2]),
    ]
    nobody = torch.zeros(len(gate), dtype=torch.bool)
    starts = [sum(_lost(*part, nobody, rank) for part in parts)]
    # Neurons that are much larger than others take the factors for themselves.
    starts.append(
        sum((w * columns * rows[:, None]).square().sum(dim=1) for w, columns, rows in parts)
    )
    best, least = nobody, float("inf")
    for start in starts if dense else ():
        chosen = _chosen(start, dense)
        for _ in range(_TURNS):
            lost = sum(_lost(*part, chosen, rank) for part in parts)
            total = float(lost[~chosen].sum())
            if total < least:
                best, least = chosen, total
            following = _chosen(lost, dense)
            if bool((following == chosen).all()):
                break
            chosen = following
    return _stacked(parts, best, rank)


def _scales(
    gate: Tensor, up: Tensor, down: Tensor, moments: Moments | None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Weights of the columns `[D]` of gate and up, and of the neurons `[F]` in gate, up and down:
    how much of an error there reaches the output, to first order."""
    reach = down.norm(dim=0)
    if moments is None:
        ones = torch.ones(len(gate), dtype=torch.float64)
        return torch.ones(gate.shape[1], dtype=torch.float64), (reach, reach, ones)
    inputs = moments.inputs.double().clamp_min(0).sqrt()
    hidden = moments.hidden.double().clamp_min(0).sqrt()
    inputs = inputs.clamp_min(1e-3 * float(inputs.max()) or 1.0)
    hidden = hidden.clamp_min(1e-3 * float(hidden.max()) or 1.0)
    ups = (up * inputs).norm(dim=1).clamp_min(1e-30)
    return inputs, (reach * ups / 2, reach * hidden / ups, hidden)


def _chosen(lost: Tensor, dense: int) -> Tensor:
    """The `dense` neurons that lose most, as a mask `[F]`."""
    mask = torch.zeros(len(lost), dtype=torch.bool)
    mask[lost.sort(descending=True, stable=True).indices[:dense]] = True
    return mask


def _basis(weight: Tensor, columns: Tensor, rows: Tensor, rank: int) -> Tensor:
    """The rows `[R, m]`, orthonormal, that span what is largest in weight `[n, m]`, weighted."""
    return torch.linalg.svd(weight * columns * rows[:, None], full_matrices=False).Vh[:rank]


def _lost(weight: Tensor, columns: Tensor, rows: Tensor, chosen: Tensor, rank: int) -> Tensor:
    """What each neuron loses `[F]` if it is factored, those that are not chosen being so."""
    basis, scaled = _basis(weight[~chosen], columns, rows[~chosen], rank), weight * columns
    rest = scaled - (scaled @ basis.T) @ basis
    return (rest * rows[:, None]).square().sum(dim=1)


def _factors(weight: Tensor, columns: Tensor, rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U `[n, R]` and V `[R, m]` whose product is nearest to weight `[n, m]`, weighted."""
    basis = _basis(weight, columns, rows, rank)
    u, v = weight.new_zeros(len(weight), rank), weight.new_zeros(rank, weight.shape[1])
    u[:, : len(basis)] = (weight * columns) @ basis.T
    v[: len(basis)] = basis / columns
    # A column of U and its row of V equally large, since either shares scales with its neighbours.
    sizes = u.norm(dim=0).clamp_min(1e-30), v.norm(dim=1).clamp_min(1e-30)
    balance = (sizes[1] / sizes[0]).sqrt()
    return u * balance, v / balance[:, None]


def _stacked(parts: list[tuple[Tensor, Tensor, Tensor]], chosen: Tensor, rank: int) -> FactoredBody:
    us, fronts = [], []
    for weight, columns, rows in parts:
        u, v = _factors(weight[~chosen], columns, rows[~chosen], rank)
        us.append(u.float())
        fronts.append(torch.cat([weight[chosen], v]).float())
    gate, up, down = fronts
    u_gate, u_up, u_down = us
    # Of down the neurons are columns: its U takes the part of V_d, its V of U_d.
    return FactoredBody(gate, up, down.T.contiguous(), u_gate, u_up, u_down.T.contiguous())
