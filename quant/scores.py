"""What a profile says about a model, and how well its tables predict text they have not seen."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.predictors import previous_scores, recall
from ..runtime.profile import Profile
from ..runtime.transitions import path_keys


@dataclass(frozen=True, slots=True)
class Usage:
    """How unevenly one layer uses its experts. `effective`: as many equally used ones would have
    the same entropy; `top_25`, `top_50`: share of the choices that go to that share of experts."""

    layer: int
    num_experts: int
    effective: float
    most: float  # share of tokens that choose the most wanted expert
    unused: int
    top_25: float
    top_50: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def usage(profile: Profile) -> list[Usage]:
    """One row for each MoE layer."""
    rows = []
    for layer, sums in profile.layers.items():
        counts = np.sort(sums.hard_count)[::-1].astype(np.float64)
        share = counts / max(1.0, counts.sum())
        seen = share[share > 0]
        number = len(counts)
        rows.append(
            Usage(
                layer,
                number,
                effective=float(np.exp(-(seen * np.log(seen)).sum())),
                most=float(counts[0] / max(1, profile.num_tokens)),
                unused=int((counts == 0).sum()),
                top_25=float(share[: -(-number // 4)].sum()),
                top_50=float(share[: -(-number // 2)].sum()),
            )
        )
    return rows


PREDICTORS = ("popularity", "previous", "pairs", "token", "order2", "all", "shuffled")


@dataclass(frozen=True, slots=True)
class Scores:
    """Recall at `n` of one layer by predictor: the share of the chosen experts among the n most
    likely. `popularity` is the marginal; `previous` the choices of the token before; `pairs`,
    `token` and `order2` one kind of table each; `all` what `PlaceTables` makes of them; `shuffled`
    the same, predicted for another token: a control, which knows the layer but not the token.
    `known`: share of states that the table had."""

    layer: int
    n: int
    recall: dict[str, float]
    known: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def score_profile(
    profile: Profile,
    texts: Sequence[NDArray[np.integer]],
    token_ids: Sequence[Sequence[int]],
    seed: int = 0,
) -> list[Scores]:
    """Recall at K and 2 K on texts [T, places, K]; the first token of each is not scored."""
    rows, top_k = [], profile.top_k
    num_places = len(profile.layers)
    ids = np.concatenate([np.asarray(part[1:]) for part in token_ids])
    shuffle = np.random.default_rng(seed).permutation(len(ids))
    for place, (layer, sums) in enumerate(profile.layers.items()):
        tables, number = profile.tables(place), sums.num_experts
        chosen = np.concatenate([routes[1:, place] for routes in texts])
        before, active = (_earlier(texts, place - back, num_places) for back in (2, 1))
        scores = {
            "popularity": np.broadcast_to(tables.popularity, (len(chosen), number)),
            "previous": np.concatenate([previous_scores(r[:, place], number) for r in texts]),
            "pairs": tables.score_rows(active),
            "token": tables.score_rows(None, None, ids),
            "order2": tables.score_rows(active, before),
            "all": tables.score_rows(active, before, ids),
        }
        scores["shuffled"] = scores["all"][shuffle]
        known = float(np.isin(path_keys(before, active), tables.paths.key).mean())
        for n in (top_k, min(2 * top_k, number)):
            found = {name: recall(values, chosen, n) for name, values in scores.items()}
            rows.append(Scores(layer, n, found, known))
    return rows


def _earlier(
    texts: Sequence[NDArray[np.integer]], place: int, num_places: int
) -> NDArray[np.integer]:
    """The choices at `place` of each token but the first of every text; below 0: of the token
    before."""
    back, at = divmod(place, num_places)
    return np.concatenate([routes[1 + back : len(routes) + back, at] for routes in texts])
