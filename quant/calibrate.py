"""Statistics of a model on text, collected with the real engine: a `Profile`.

Sums are kept in float64 and saved at intervals, so that a run that was killed goes on to the same
sums. Beside the engine it holds the sums, hidden states of one group of windows (passes.py), and
the tokens of the texts.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..runtime.budget import CHUNK
from ..runtime.errors import EdgeMoeError, UsageError
from ..runtime.index import EXPERTS_FILE, StoreIndex
from ..runtime.profile import Profile
from ..runtime.transitions import ALL_ENTRIES, MAX_ENTRIES
from .convert import num_cpus
from .passes import GROUP_TOKENS, Passes, groups
from .profile_errors import ErrorSums, error_bytes, sampled
from .progress import Progress, Silent
from .windows import cut, even_shares, read_tokens

if TYPE_CHECKING:
    from ..engine import Engine
    from ..models.args import ModelArgs
    from ..models.trunk import Linear
    from ..runtime.observe import Observation

SAVE_EVERY_S = 30.0
_REALS = {"soft_count": "E", "weight_sum": "E", "reap_sum": "E", "logit_gram": "EE"}
_REALS |= {"input_square_sum": "ED", "hidden_square_sum": "EF"}


@dataclass(frozen=True, slots=True)
class Text:
    """A text as tokens."""

    name: str
    sha256: str
    ids: list[int]

    @classmethod
    def read(cls, path: str | Path, tokenizer: Any) -> "Text":
        """Raises what `read_tokens` raises."""
        ids = read_tokens(path, tokenizer)
        return cls(Path(path).name, hashlib.sha256(Path(path).read_bytes()).hexdigest(), ids)


def read_texts(
    paths: Sequence[str | Path], tokenizer: Any, num_tokens: int | None = None
) -> list[Text]:
    """The texts, each cut to its even share of `num_tokens`; UsageError where none is left."""
    texts = [Text.read(path, tokenizer) for path in paths]
    counts = even_shares([len(text.ids) for text in texts], num_tokens)
    kept = [
        Text(text.name, text.sha256, text.ids[:count])
        for text, count in zip(texts, counts, strict=True)
        if count > 1
    ]
    if not kept:
        names = ", ".join(f"`{path}`" for path in paths)
        raise UsageError(f"there is no text in {names}", "expected at least two tokens")
    return kept


def sums_bytes(args: "ModelArgs") -> int:
    """Bytes of a profile in memory while it is collected, and of a group's hidden states."""
    experts, layers = args.num_experts, len(args.moe_layers)
    reals = experts * (args.hidden + args.expert_width + 3 * experts + 4)
    tables = 2 * ALL_ENTRIES * 14 + 60 * MAX_ENTRIES  # and while two of them are joined
    tokens = 4 * (GROUP_TOKENS + 4 * CHUNK) * args.hidden
    return layers * 8 * reals + tables + tokens + error_bytes(args, num_cpus())


def calibrate(
    engine: "Engine",
    texts: Sequence[Text],
    out: str | Path,
    *,
    window: int = 512,
    name: str | None = None,
    fingerprint: str = "",
    base: Profile | None = None,
    progress: Progress | None = None,
    save_every_s: float = SAVE_EVERY_S,
) -> Profile:
    """Run `texts` through the engine and write the profile to `out`; with `base`, the sum of both.

    Goes on where an equal run was stopped, by the file `out` + `.part`, which is removed at the
    end. Raises what the engine raises; what was saved until then stays.
    """
    out, progress = Path(out), progress or Silent()
    by_text = [[w.ids for w in cut(text.ids, min(window, engine.context))] for text in texts]
    windows = [ids for part in by_text for ids in part]
    collector = Collector(engine, name, fingerprint)
    work = groups(windows)
    request = _request(engine._index, texts, window, len(windows))
    part = Path(f"{out}.part")
    done = collector.resume(part, request, progress)
    total, tokens = sum(map(len, windows)), collector.profile.num_tokens
    progress.start("calibrate", total, tokens, unit="tok")
    saved = time.monotonic()
    try:
        for number, group in enumerate(work[done:], start=done + 1):
            collector.add(group, progress.advance)
            if number < len(work) and time.monotonic() - saved >= save_every_s:
                collector.save(part, request, number)
                saved = time.monotonic()
        collector.add_errors(sampled(by_text), progress)
    except KeyboardInterrupt:
        if part.exists():
            progress.note("stopped; the same command goes on from what was saved last")
        raise
    profile = collector.profile
    profile.texts = [
        {"name": text.name, "sha256": text.sha256, "tokens": len(text.ids)} for text in texts
    ]
    if base is not None:
        profile = base.merge(profile)
    profile.validate()
    profile.save(out)
    part.unlink(missing_ok=True)
    return profile


class Collector:
    """Adds groups of windows to a profile."""

    def __init__(self, engine: "Engine", name: str | None = None, fingerprint: str = "") -> None:
        self._engine, self._passes = engine, Passes(engine)
        args, index = engine.args, engine._index
        tokenizer = index.sha256.get("tokenizer.json", "")
        num_experts = index.layer_to_num_experts
        self.profile = Profile.empty(
            num_experts, args.top_k, name=name, fingerprint=fingerprint, tokenizer=tokenizer
        )
        for sums in self.profile.layers.values():
            sizes = {"E": sums.num_experts, "D": args.hidden, "F": args.expert_width}
            for each, letters in _REALS.items():
                setattr(sums, each, np.zeros([sizes[letter] for letter in letters]))
        with engine.steps() as layers:
            self._routers = {layer: layers.weights[layer].router for layer in num_experts}
        self._bodies = engine._model.bodies
        self._observer: Callable[[Observation], None] | None = None
        engine.observe(lambda o: self._observer and self._observer(o))

    def add(self, windows: Sequence[list[int]], advance: Callable[[int], None]) -> None:
        """Run a group of windows and count everything."""
        self._observer = self._count
        try:
            routes = self._passes.routes(windows, advance)
        finally:
            self._observer = None
        self.profile.add_routes(*routes, token_ids=windows)

    def add_errors(self, windows: Sequence[list[int]], progress: Progress) -> None:
        """Measure what rounding costs every expert, on these windows: at the end of a run."""
        if self._engine._index.is_derived:
            progress.note("errors of rounding are not measured: experts were left out or merged")
            return
        errors = ErrorSums(self._engine, self.profile, num_cpus())
        self._observer = errors.observe
        try:
            errors.run(self._passes, windows, progress)
        finally:
            self._observer = None
            errors.close()

    def save(self, path: Path, request: str, num_done: int) -> None:
        self.profile.resume = {"request": request, "groups": num_done}
        self.profile.save(path, exact=True)
        self.profile.resume = None

    def resume(self, path: Path, request: str, progress: Progress) -> int:
        """Take over the sums of an unfinished run; returns the groups that are done."""
        if not path.is_file():
            return 0
        try:
            found = Profile.load(path)
            state = found.resume or {}
            if state.get("request") == request:
                found.resume = None
                self.profile = found
                progress.note(f"going on: {found.num_tokens:,} tokens are done")
                return int(state["groups"])
            progress.note(f"starting over: `{path}` is of other texts or options")
        except EdgeMoeError as error:
            progress.note(f"starting over: {error}")
        return 0

    def _count(self, o: "Observation") -> None:
        sums = self.profile.layers[o.layer]
        num_experts = sums.num_experts
        expert_of_pair = np.repeat(o.experts, np.diff(o.begins))
        weights = o.weights.astype(np.float64)
        sums.weight_sum += np.bincount(expert_of_pair, weights, num_experts)
        sums.reap_sum += np.bincount(expert_of_pair, weights * o.norms, num_experts)
        sums.hidden_square_sum[o.experts] += o.hidden_square
        x, expert_ids = torch.from_numpy(o.x), torch.from_numpy(o.expert_ids)
        sums.input_square_sum += input_squares(x, expert_ids, num_experts).numpy()
        soft, gram = logit_sums(self._routers[o.layer], o.x, self._bodies.get(o.layer))
        sums.soft_count += soft.numpy()
        sums.logit_gram += gram.numpy()


def input_squares(x: Tensor, expert_ids: Tensor, num_experts: int) -> Tensor:
    """Per expert, the sum of squares of the inputs of the tokens that chose it: x `[T, D]`,
    expert_ids `[T, K]`, -1: none -> fp32 `[E, D]`."""
    chosen = torch.zeros(len(x), 1 + num_experts)
    chosen.scatter_(1, expert_ids.long() + 1, 1.0)
    return chosen[:, 1:].T @ x.square()


def logit_sums(
    router: "Linear", x: NDArray[np.float32], bodies: NDArray[np.int32] | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of the router's softmax `[E]`, and H^T H `[E, E]` of its logits, in float64. With
    `bodies` i32 [rows], of the bodies: their logit is the logsumexp of that of their rows."""
    logits = torch.from_numpy(router.linear(x)).double()
    shares = torch.softmax(logits, dim=-1)
    if bodies is not None:
        of_body = [torch.from_numpy(np.flatnonzero(bodies == b)) for b in range(bodies.max() + 1)]
        shares = torch.stack([shares[:, rows].sum(dim=-1) for rows in of_body], dim=-1)
        logits = torch.stack([logits[:, rows].logsumexp(dim=-1) for rows in of_body], dim=-1)
    return shares.sum(dim=0), logits.T @ logits


def _request(index: StoreIndex, texts: Sequence[Text], window: int, num_windows: int) -> str:
    """Names what a run does; an unfinished one of the same name is gone on with."""
    parts = [index.sha256.get(EXPERTS_FILE), [(t.sha256, len(t.ids)) for t in texts]]
    return hashlib.sha256(json.dumps([parts, window, num_windows]).encode()).hexdigest()
