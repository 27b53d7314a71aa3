"""Groups of experts that are alike: similarities, and spectral clustering without training.

UNCURL (2409.01483): experts whose router logits point the same way over the tokens of a task are
alike; the eigenvectors of the similarities' graph Laplacian, by k-means, are the groups. E experts.
"""

import numpy as np
from numpy.typing import NDArray

_RESTARTS = 16
_ITERATIONS = 100


def logit_similarity(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """(1 + cosine) / 2 of the columns of the router's logits H, from their Gram matrix H^T H
    `[E, E]`; 1/2 to a column of zeros."""
    norms = np.sqrt(np.maximum(np.diagonal(gram), 0.0))
    norms[norms == 0] = np.inf
    cosine = np.clip(gram / np.outer(norms, norms), -1.0, 1.0)
    np.fill_diagonal(cosine, 1.0)
    return (1.0 + (cosine + cosine.T) / 2) / 2


def spectral_clusters(
    similarity: NDArray[np.float64], count: int, seed: int = 0
) -> NDArray[np.int64]:
    """The cluster of every expert `[E]`, 0 to count - 1, none of them empty, numbered as their
    first members come. `similarity` `[E, E]`: symmetric, not negative. The same for the same seed.
    """
    size = len(similarity)
    if not 1 <= count <= size:
        raise ValueError(f"{size} experts cannot be {count} clusters")
    if count == size:
        return np.arange(size)
    root = 1.0 / np.sqrt(np.maximum(similarity.sum(axis=1), 1e-300))
    # Smallest of I - D^-1/2 S D^-1/2 are largest of the second term.
    _, vectors = np.linalg.eigh(similarity * np.outer(root, root))
    points = vectors[:, size - count :]
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    return k_means(points / np.maximum(lengths, 1e-300), count, seed)


def k_means(points: NDArray[np.float64], count: int, seed: int = 0) -> NDArray[np.int64]:
    """The cluster of every point of `[n, d]`, none empty: the best of some starts (k-means++)."""
    rng = np.random.default_rng(seed)
    best, best_spread = None, np.inf
    for _ in range(_RESTARTS):
        labels, spread = _one_run(points, _starts(points, count, rng))
        if spread < best_spread - 1e-12:
            best, best_spread = labels, spread
    return _in_order(best)


def _starts(
    points: NDArray[np.float64], count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    chosen = [int(rng.integers(len(points)))]
    nearest = np.full(len(points), np.inf)
    while len(chosen) < count:
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
        nearest[chosen] = 0.0
        total = nearest.sum()
        if total > 1e-18:
            chosen.append(int(rng.choice(len(points), p=nearest / total)))
        else:  # fewer different points than clusters
            chosen.append(int(np.setdiff1d(np.arange(len(points)), chosen)[0]))
    return points[chosen].copy()


def _one_run(
    points: NDArray[np.float64], centres: NDArray[np.float64]
) -> tuple[NDArray[np.int64], float]:
    labels = None
    for _ in range(_ITERATIONS):
        squares = ((points[:, None] - centres[None]) ** 2).sum(axis=2)
        found = squares.argmin(axis=1)
        distance = squares[np.arange(len(points)), found]
        _fill(found, distance, len(centres))
        if labels is not None and np.array_equal(found, labels):
            break
        labels = found
        centres = np.stack([points[labels == each].mean(axis=0) for each in range(len(centres))])
    return labels, float(((points - centres[labels]) ** 2).sum())


def _fill(labels: NDArray[np.int64], distance: NDArray[np.float64], count: int) -> None:
    """Give an empty cluster the point that is farthest from its own, of clusters of two or more."""
    for empty in np.setdiff1d(np.arange(count), labels):
        sizes = np.bincount(labels, minlength=count)
        farthest = int(np.where(sizes[labels] > 1, distance, -1.0).argmax())
        labels[farthest], distance[farthest] = empty, 0.0


def _in_order(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    _, first, found = np.unique(labels, return_index=True, return_inverse=True)
    number = np.empty(len(first), dtype=np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[found]
