"""What a model makes of a text: perplexity, and how far two models are apart. Runs the real engine.

Losses are negative log-likelihoods in nats, computed in float64 from the engine's fp32 logits. Two
models are compared token by token over the same windows, so that the text's own spread cancels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..kv_cache import KVCache
from ..models.args import ModelArgs
from ..runtime.errors import UsageError
from .progress import Progress, Silent
from .windows import Window

_LOGITS_BYTES = 32 << 20  # of fp32 logits at once; the engine's plan has no line for them
_ROW_TOKENS = 64  # whose float64 probabilities are in memory together


class Model(Protocol):
    """What is measured: an `Engine`, or anything that runs like one."""

    args: ModelArgs

    def forward(self, token_ids: Sequence[int], kv_cache: KVCache, logits: str) -> np.ndarray: ...


@dataclass(slots=True)
class Losses:
    """One value for every scored token, float64 `[n]`; `kl` and `agrees` where two were compared.

    `kl` is the divergence of the measured model's distribution from the other's, sum of
    p_other (log p_other - log p); `agrees` is 1.0 where both put the same token first.
    """

    nll: Tensor
    other_nll: Tensor | None = None
    kl: Tensor | None = None
    agrees: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """Losses in numbers. Errors are standard errors over tokens, which are not independent."""

    num_tokens: int
    perplexity: float
    perplexity_error: float
    other_perplexity: float | None = None
    rise_percent: float | None = None  # of the perplexity over the other's, paired
    rise_error_percent: float | None = None
    kl: float | None = None
    kl_error: float | None = None
    agreement: float | None = None  # share of tokens where the likeliest token is the same

    @classmethod
    def of(cls, losses: Losses) -> "Figures":
        count = len(losses.nll)
        perplexity = math.exp(losses.nll.mean())
        own = (count, perplexity, perplexity * _error(losses.nll))
        if losses.other_nll is None or losses.kl is None or losses.agrees is None:
            return cls(*own)
        change = losses.nll - losses.other_nll
        return cls(
            *own,
            other_perplexity=math.exp(losses.other_nll.mean()),
            rise_percent=100 * math.expm1(change.mean()),
            rise_error_percent=100 * _error(change),
            kl=float(losses.kl.mean()),
            kl_error=_error(losses.kl),
            agreement=float(losses.agrees.mean()),
        )


def evaluate(
    model: Model,
    windows: Sequence[Window],
    other: Model | None = None,
    progress: Progress | None = None,
    kv_bits: int = 16,
) -> Losses:
    """The losses of `model` over `windows`, and with `other` its distance from that model.

    Raises UsageError where the two do not have the same vocabulary.
    """
    if other is None:
        return compare(model, (), windows, progress, kv_bits)[0]
    return compare(other, (model,), windows, progress, kv_bits)[1]


def compare(
    reference: Model,
    models: Sequence[Model],
    windows: Sequence[Window],
    progress: Progress | None = None,
    kv_bits: int = 16,
) -> list[Losses]:
    """The losses of `reference` over `windows`, then those of each model and its distance from the
    reference. One engine may be several of them. Raises UsageError for different vocabularies."""
    progress = progress or Silent()
    every = [reference, *models]
    for model in models:
        if model.args.vocab != reference.args.vocab:
            raise UsageError(
                "these two models cannot be compared",
                f"their vocabularies have {model.args.vocab} and {reference.args.vocab} tokens",
                "give two stores of one model",
            )
    size = max(len(window.ids) for window in windows)
    caches = [KVCache.for_model(each.args, size, kv_bits) for each in every]
    sums = [Sums(number > 0) for number in range(len(every))]
    step = max(1, _LOGITS_BYTES // (4 * reference.args.vocab))
    changes = [getattr(each, "routing", None) for each in every]
    if any(change is not None and change.routing.depends_on_memory for change in changes):
        step = 1  # it is decoding that differs
    progress.start("tokens", sum(len(window.ids) for window in windows), unit="tok")
    for window in windows:
        for cache in caches:
            cache.trim(0)
        for begin in range(0, len(window.ids), step):
            part = window.ids[begin : begin + step]
            # A copy: a token alone leaves its logits in a place that the next one takes.
            first = reference.forward(part, caches[0], "all").copy()
            sums[0].add(window, begin, first)
            for model, cache, own in zip(models, caches[1:], sums[1:], strict=True):
                own.add(window, begin, model.forward(part, cache, "all"), first)
            progress.advance(len(part))
    return [each.losses() for each in sums]


@dataclass(slots=True)
class Sums:
    """Collects the losses of chunks."""

    compared: bool
    nll: list[Tensor] = field(default_factory=list)
    other_nll: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    agrees: list[Tensor] = field(default_factory=list)

    def add(
        self, window: Window, begin: int, logits: np.ndarray, other: np.ndarray | None = None
    ) -> None:
        """Logits `[T, vocab]` of the tokens at `begin` ..; each predicts the token after it."""
        first = max(window.first - 1 - begin, 0)
        end = min(len(logits), len(window.ids) - 1 - begin)
        targets = torch.tensor(window.ids[begin + 1 : begin + 1 + end])
        for at in range(first, end, _ROW_TOKENS):
            rows = slice(at, min(at + _ROW_TOKENS, end))
            log_p = _log_softmax(logits[rows])
            index = targets[rows][:, None]
            self.nll.append(-log_p.gather(1, index)[:, 0])
            if other is None:
                continue
            log_q = _log_softmax(other[rows])
            self.other_nll.append(-log_q.gather(1, index)[:, 0])
            self.kl.append((log_q.exp() * (log_q - log_p)).sum(-1))
            same = logits[rows].argmax(-1) == other[rows].argmax(-1)
            self.agrees.append(torch.from_numpy(same).double())

    def losses(self) -> Losses:
        nll = torch.cat(self.nll)
        if not self.compared:
            return Losses(nll)
        return Losses(nll, torch.cat(self.other_nll), torch.cat(self.kl), torch.cat(self.agrees))


def _log_softmax(logits: np.ndarray) -> Tensor:
    return torch.log_softmax(torch.from_numpy(logits).double(), -1)


def _error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else 0.0
