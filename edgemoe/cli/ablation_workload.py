"""What the arms of an ablation decode: a text through the model's own routers, or a trace.

The tokens are given beforehand, so that arms of different widths go through the same ones.
"""

import argparse
import hashlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.errors import UsageError
from ..runtime.index import StoreIndex
from ..runtime.predictors import noisy_oracle
from .decode import Decoded, counters
from .replay import Routing, fit, token_id
from .text import TEXT

if TYPE_CHECKING:
    from ..engine import Engine

PROMPT_TOKENS, TEXT_TOKENS = 32, 128
EVAL_WINDOW = 512


class Workload:
    """Tokens, the first `prompt_tokens` of them in one go, and recorded routes of them or None."""

    def __init__(self, index: StoreIndex, args: argparse.Namespace) -> None:
        from ..models import parse_config

        model = parse_config(index.config)
        self._args, self._text = args, None
        self.routes: Routing | None = None
        if args.replay is not None:
            recorded = fit(args.replay, index, args.replay_layers)
            self.routes = recorded.prompt + recorded.decoded
            self.tokens = [token_id(i, model.vocab) for i in range(len(self.routes))]
            self.prompt_tokens = max(1, len(recorded.prompt))
            self.about = "; ".join([f"replays {args.replay}", *recorded.notes])
        else:
            self._text = _read_text(index, args.text, model.vocab)
            count = min(PROMPT_TOKENS + TEXT_TOKENS, model.max_context)
            self.tokens = [self._text[i % len(self._text)] for i in range(count)]
            self.prompt_tokens = PROMPT_TOKENS
            self.about = f"{args.text or 'the built-in text'} through the model's own routers"
        self.guesses: np.ndarray | None = None
        if self.routes is not None:
            num_experts = list(index.layer_to_num_experts.values())
            self.guesses = noisy_oracle(self.routes.ids, num_experts, args.recall)
        self.model_top_k = model.top_k
        self.top_k = model.top_k if self.routes is None else self.routes.ids.shape[2]
        self.context = len(self.tokens)

    @property
    def available(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - self.prompt_tokens

    def cut_prompt(self, num_tokens: int) -> None:
        """Leave out the first tokens of the prompt, so that so many remain."""
        left_out = max(0, self.prompt_tokens - num_tokens)
        if left_out:
            self.tokens = self.tokens[left_out:]
            self.prompt_tokens -= left_out
            if self.routes is not None and self.guesses is not None:
                self.routes, self.guesses = self.routes[left_out:], self.guesses[left_out:]

    def open(self, engine: "Engine", layerwise: bool, guesses: bool) -> None:
        """What the following calls run on. `layerwise`: tokens go layer by layer, as prompts do.
        `guesses`: the engine is to guess, by what it was opened with or what a trace needs."""
        from ..kv_cache import KVCache
        from ..runtime.prefetch import GIVEN, Prefetcher

        self._engine, self._layerwise = engine, layerwise
        self._guesses = guesses and self.guesses is not None
        if self._guesses:
            engine.use_prefetch(Prefetcher(GIVEN, len(engine.args.moe_layers)))
        self._kv_cache = KVCache.for_model(engine.args, engine.context, engine.config.kv_bits)

    def begin(self) -> Decoded:
        """Empty the context and feed the prompt."""
        self._kv_cache.trim(0)
        self._engine.take_step_stats()
        result = Decoded()
        begin = time.perf_counter()
        logits = self._feed(self.prompt_tokens)
        result.prefill_s = time.perf_counter() - begin
        result.prefill = counters(self._engine.take_step_stats())
        result.logits_hash = hashlib.sha256(logits).hexdigest()
        return result

    def go_on(self, count: int) -> Decoded:
        """Feed so many further tokens, one at a time."""
        digest = hashlib.sha256()
        self._engine.take_step_stats()
        result = Decoded(decode=dict.fromkeys(counters(self._engine.take_step_stats()), 0))
        for _ in range(count):
            begin = time.perf_counter()
            logits = self._feed(1)
            result.step_s.append(time.perf_counter() - begin)
            for name, value in counters(self._engine.take_step_stats()).items():
                result.decode[name] += value
            digest.update(logits)
        result.logits_hash = digest.hexdigest()
        return result

    def checked(self, count: int) -> str:
        """A hash of the logits of the prompt and of some tokens after it."""
        first = self.begin().logits_hash
        both = first + self.go_on(min(count, self.available)).logits_hash
        return hashlib.sha256(both.encode()).hexdigest()[:16]

    def _feed(self, count: int) -> Any:
        at = self._kv_cache.offset
        tokens, options = self.tokens[at : at + count], {}
        if self.routes is not None:
            part = self.routes[at : at + count]
            one = count == 1
            options["forced"] = (part.ids[0], part.weights[0]) if one else (part.ids, part.weights)
            if self._guesses and one:
                options["guesses"] = self.guesses[at]
        # A list of one token is what the core decodes by itself.
        return self._engine.forward(
            tuple(tokens) if self._layerwise else tokens, self._kv_cache, **options
        )

    def losses(self, stores: dict[str, StoreIndex], reference: str) -> dict[str, Any]:
        """Perplexity of each store, and its rise over that of the reference; nothing for a trace,
        whose weights mean nothing."""
        if self._text is None:
            return {}
        from ..engine import Engine
        from ..quant.evaluate import Figures, evaluate
        from ..quant.windows import cut

        size = min(EVAL_WINDOW, self._args.eval_tokens)
        windows = cut(self._text[: self._args.eval_tokens], size)
        options: dict[str, Any] = {"context": size, "warm_start": "off", "prefetch": "none"}
        found: dict[str, Any] = {}
        with Engine.from_pretrained(stores[reference].path, **options) as other:
            for kind, index in stores.items():
                with Engine.from_pretrained(index.path, **options) as engine:
                    figures = Figures.of(evaluate(engine, windows, other))
                found[kind] = asdict(figures)
        return found


def _read_text(index: StoreIndex, path: str | None, vocab: int) -> list[int]:
    """Token ids of --text (a text, or .npy), or of the built-in text."""
    from ..quant.windows import read_tokens
    from ..tokenizer import Tokenizer

    tokenizer = Tokenizer.load(index.path)
    if path is not None:
        ids = read_tokens(Path(path), tokenizer)
    elif tokenizer is None:
        raise UsageError("no text without a tokenizer", f"`{index.path}` has none", "use --replay")
    else:
        ids = tokenizer.encode(TEXT)
    if len(ids) < 2:
        raise UsageError(f"`{path}` holds no text")
    if max(ids) >= vocab:
        raise UsageError(f"`{path}` holds token {max(ids)}", f"the model has {vocab} tokens")
    return ids
