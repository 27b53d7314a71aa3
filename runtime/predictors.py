"""Predictors of the experts that a layer will want, and how good they are. Floor 1.

The twins of the core's predictors (prefetch.h): a predictor gives scores [T, E] of one MoE layer
for T tokens, from what is known before that layer's router has spoken; the likeliest is the one
with the largest score. `recall` says which share of the experts wanted is among the n likeliest.

- `previous`: the experts of the same layer at the token before
- `profile`: EdgeMoE's tables (paper 1.4) with back-off, see runtime/transitions.py
- `router`: the layer's own router on the residual of the layer before (its scores come from
  edgemoe/models/lookahead.py)
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .profile import Profile

PREDICTORS = ("none", "previous", "profile", "router")


def likeliest(scores: NDArray[np.floating], n: int) -> NDArray[np.int64]:
    """The n experts with the largest scores [T, E] of each token, [T, n], the likeliest first; of
    equal ones the lowest ids."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :n]


def recall(scores: NDArray[np.floating], chosen: NDArray[np.integer], n: int) -> float:
    """Share of the choices [T, K], -1: none, that are among the n likeliest by scores [T, E]."""
    guessed = likeliest(scores, n)
    found = (guessed[:, :, None] == chosen[:, None, :]).any(axis=1)
    return float(found[chosen >= 0].mean())


def previous_scores(routes: NDArray[np.integer], num_experts: int) -> NDArray[np.float32]:
    """Scores [T - 1, E] of the tokens from the second on, from the choices [T, K] of one layer."""
    scores = np.zeros((len(routes) - 1, num_experts + 1), dtype=np.float32)  # the last: of none
    np.put_along_axis(scores, routes[:-1].astype(np.int64), 1.0, axis=1)
    return scores[:, :-1]


def profile_scores(
    profile: Profile,
    place: int,
    routes: NDArray[np.integer],
    tokens: NDArray[np.integer] | None = None,
) -> NDArray[np.float32]:
    """Scores [T - 1, E] of the tokens from the second on, of the MoE layer at `place`, from the
    choices [T, places, K] of consecutive tokens and their ids [T], None: not known."""
    tables = profile.tables(place)
    flat = routes.reshape(-1, routes.shape[2])  # in the order of running
    num_places = routes.shape[1]
    at = np.arange(1, len(routes)) * num_places + place
    rows = [
        tables.scores(
            flat[i - 1],
            flat[i - 2] if i >= 2 else None,
            None if tokens is None else int(tokens[i // num_places]),
        )
        for i in at
    ]
    return np.array(rows, dtype=np.float32).reshape(len(at), len(tables.popularity))


@dataclass(frozen=True, slots=True)
class Recall:
    """How one predictor does at one layer. `at`, `shuffled`: n -> recall, with the scores of the
    token and with those of another one."""

    predictor: str
    layer: int
    at: dict[int, float]
    shuffled: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        at = {str(n): value for n, value in self.at.items()}
        shuffled = {str(n): value for n, value in self.shuffled.items()}
        return {
            "predictor": self.predictor,
            "layer": self.layer,
            "recall": at,
            "shuffled": shuffled,
        }


def score(
    predictor: str,
    layer: int,
    scores: NDArray[np.floating],
    chosen: NDArray[np.integer],
    ns: Iterable[int],
    seed: int = 0,
) -> Recall:
    """Recall of scores [T, E] for the choices [T, K], and of those of other tokens as a control:
    what a predictor reaches that knows the layer but not the token."""
    shift = int(np.random.default_rng(seed).integers(1, max(2, len(scores))))
    others = np.roll(scores, shift, axis=0)
    sizes = sorted(set(ns))
    return Recall(
        predictor,
        layer,
        {n: recall(scores, chosen, n) for n in sizes},
        {n: recall(others, chosen, n) for n in sizes},
    )


def score_texts(
    texts: Sequence[NDArray[np.integer]],
    tokens: Sequence[NDArray[np.integer] | None],
    layers: Sequence[int],
    num_experts: Sequence[int],
    ns: Iterable[int],
    profile: Profile | None = None,
) -> list[Recall]:
    """Recall of `previous` and, with a profile, `profile` and `popularity`, by layer. `texts`:
    choices [T, places, K] of consecutive tokens each, `tokens` their ids or None; the first token
    of a text is not scored."""
    found = []
    for place, layer in enumerate(layers):
        chosen = np.concatenate([routes[1:, place] for routes in texts])
        every: dict[str, list[NDArray[np.float32]]] = {"previous": []}
        for routes, ids in zip(texts, tokens, strict=True):
            every["previous"].append(previous_scores(routes[:, place], num_experts[place]))
            if profile is not None:
                tables = profile_scores(profile, place, routes, ids)
                row = profile.popularity(place).astype(np.float32)
                every.setdefault("profile", []).append(tables)
                every.setdefault("popularity", []).append(np.tile(row, (len(tables), 1)))
        for name, scores in every.items():
            found.append(score(name, layer, np.concatenate(scores), chosen, ns))
    return found


def noisy_oracle(
    routes: NDArray[np.integer],
    num_experts: Sequence[int],
    right: float | NDArray[np.floating],
    seed: int = 0,
) -> NDArray[np.int32]:
    """Guesses [T, places, K] for the core's `guesses`: each of the choices `routes` [T, places, K]
    with the probability `right` (or [K], one for each rank), else another expert that the token
    does not choose. 1: the oracle; 0: always wrong, as long as a layer has experts enough."""
    rng = np.random.default_rng(seed)
    guesses = np.array(routes, dtype=np.int32)
    for place, count in enumerate(num_experts):
        chosen = guesses[:, place].copy()
        noise = rng.random((len(chosen), count))
        rows, columns = (chosen >= 0).nonzero()
        noise[rows, chosen[rows, columns]] = np.inf
        wrong = np.argsort(noise, axis=1)[:, : chosen.shape[1]]
        is_wrong = np.take_along_axis(noise, wrong, axis=1) < np.inf
        keeps = rng.random(chosen.shape) < right
        guesses[:, place] = np.where(keeps | (chosen < 0), chosen, np.where(is_wrong, wrong, -1))
    return guesses
