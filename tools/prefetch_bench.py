"""Tokens in turn without guesses, with guesses and with perfect ones: what prefetch_grid shows."""

import hashlib
import sys
import time
from array import array
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np

from edgemoe.cli.replay import Routing, fit, token_id
from edgemoe.cli.text import TEXT
from edgemoe.engine import Engine
from edgemoe.kv_cache import KVCache
from edgemoe.runtime.index import STORE_FILE, load_index
from edgemoe.runtime.predictors import noisy_oracle
from edgemoe.runtime.prefetch import AUTO, GIVEN, Prefetcher
from edgemoe.runtime.trace import Trace

ARMS = ("off", "on", "oracle")
NUM_TURNS = 12  # each arm goes through all lanes four times
CONTEXT = 128
SETTLING_TOKENS, SETTLING = 64, 0.2  # of a new gate, or this share of a cell: whichever is less
RETURNING = (8, 0.1)  # tokens, or seconds, after a change of lanes
NUM_PASSES = 8  # over a trace, with other experts in the places of the recorded ones


@dataclass(slots=True)
class Workload:
    """Tokens, their routes and the guesses for them where these are given."""

    name: str
    store: Path
    tokens: list[int]
    routes: Routing | None = None
    guesses: np.ndarray | None = None  # int32 [T, places, n]


def decoded(store: Path, text: str | None) -> Workload:
    """A model on a text, with its own routers and the predictor that edgemoe takes by default."""
    from edgemoe.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(store)
    if tokenizer is None:
        raise SystemExit(f"`{store}` has no tokenizer")
    return Workload(store.stem, store, tokenizer.encode(Path(text).read_text() if text else TEXT))


def traced(
    path: Path, work: Path, record_bytes: int, num_layers: int, recall: float, seed: int
) -> Workload:
    """The first layers of a trace on a store that is made for them where it is not there."""
    from make_store import config_like, make_store

    from edgemoe.quant.options import ConvertOptions

    num_layers = min(num_layers, Trace.load(path).num_places)
    store = work / f"{path.stem}-{num_layers}x{record_bytes}.edgemoe"
    if not (store / STORE_FILE).is_file():
        work.mkdir(parents=True, exist_ok=True)
        config = config_like(Trace.load(path), record_bytes, 4)
        config["num_hidden_layers"] = num_layers
        with redirect_stdout(sys.stderr):
            make_store(config, store, ConvertOptions(), pool=8)
    index = load_index(store)
    recorded = fit(path, index, num_layers)
    routes = passes(recorded.prompt + recorded.decoded, list(index.layer_to_num_experts.values()))
    order = np.argsort(-routes.weights, axis=2, kind="stable")
    heaviest_first = np.take_along_axis(routes.ids, order, 2)
    num_ranks = heaviest_first.shape[2]
    ranks = (np.arange(num_ranks) + 0.5) / num_ranks
    num_experts = list(index.layer_to_num_experts.values())
    guesses = noisy_oracle(heaviest_first, num_experts, 1 - 2 * (1 - recall) * ranks, seed)
    vocab = int(index.config["vocab_size"])
    tokens = [token_id(i, vocab) for i in range(len(routes))]
    return Workload(path.stem, store, tokens, routes, guesses)


def passes(routes: Routing, num_experts: list[int]) -> Routing:
    """NUM_PASSES times these routes, each time with the experts' numbers shifted, so that no policy
    knows them from the time before."""
    ids, weights = [], []
    for number in range(NUM_PASSES):
        shift = number * np.array(num_experts)[None, :, None] // NUM_PASSES
        moved = (routes.ids + shift) % np.array(num_experts)[None, :, None]
        order = np.argsort(moved, axis=2)
        ids.append(np.take_along_axis(moved, order, 2).astype(np.int32))
        weights.append(np.take_along_axis(routes.weights, order, 2))
    return Routing(np.concatenate(ids), np.concatenate(weights))


class Lane:
    """An engine of its own on a workload: trunk, expert cache, drive and context."""

    def __init__(self, workload: Workload, capacity: int, context: int) -> None:
        self.workload, self.context = workload, context
        self.engine = Engine.from_pretrained(
            workload.store,
            context=context,
            cache_bytes=capacity,
            prefetch="none",
            warm_start="off",
        )
        self.capacity = self.engine.cache.capacity_bytes
        self.none = Prefetcher("none", len(self.engine.args.moe_layers))
        self.kv_cache = KVCache.for_model(self.engine.args, context, self.engine.config.kv_bits)

    def begin(self, warm_up: range) -> None:
        """An expert cache with the same records; tokens at full speed without guesses."""
        engine = self.engine
        engine.use_prefetch(self.none)
        engine.reader.throttle(0)
        engine.cache.trim(0)
        engine.cache.trim(self.capacity)
        engine.cache.preload()
        for at in warm_up:
            self.feed(at)

    def feed(self, at: int, guesses: np.ndarray | None = None) -> Any:
        """Logits of one token; its routes are given where the workload has some."""
        work, options = self.workload, {}
        if work.routes is not None:
            options["forced"] = (work.routes.ids[at], work.routes.weights[at])
        if guesses is not None:
            options["guesses"] = guesses[at]
        if at % self.context == 0:  # routes then depend on the token alone
            self.kv_cache.trim(0)
        return self.engine.forward([work.tokens[at]], self.kv_cache, **options)


class Arm:
    """Tokens of one way to guess, in one lane after the other, and what they took."""

    def __init__(self, name: str, lane: Lane, given: np.ndarray | None, oracle: np.ndarray) -> None:
        # Every arm hands some over, since that takes time.
        self.name, self.guesses = name, given if name == "on" and given is not None else oracle
        predictor = GIVEN if name == "oracle" or given is not None else AUTO
        if name == "off":
            predictor = "none"
        self.prefetch = Prefetcher(predictor, len(lane.engine.args.moe_layers))
        self.digest, self.seconds = hashlib.sha256(), array("d")
        self.turn_lengths: list[int] = []  # tokens of `seconds`
        self.busy_s = self.stall_s = 0.0
        self.num_bytes = self.num_hits = self.num_guessed = self.num_demanded = 0

    def enter(self, lane: Lane, rate: int) -> None:
        self.lane = lane
        lane.engine.use_prefetch(self.prefetch)
        lane.engine.reader.throttle(rate)

    def feed(self, at: int, is_measured: bool) -> None:
        engine = self.lane.engine
        engine.take_step_stats()
        before = engine.reader.stats()
        begin = time.perf_counter()
        logits = self.lane.feed(at, self.guesses)
        seconds = time.perf_counter() - begin
        step, after = engine.take_step_stats(), engine.reader.stats()
        self.digest.update(logits)
        if not is_measured:
            return
        self.seconds.append(seconds)
        self.num_bytes += after["num_bytes"] - before["num_bytes"]
        self.busy_s += seconds - (after["idle_s"] - before["idle_s"])
        self.stall_s += step.stall_s
        self.num_hits += step.hits
        self.num_guessed += step.guessed
        self.num_demanded += step.hits + step.misses + step.guessed

    def figures(self) -> dict[str, Any]:
        count, total = len(self.seconds), sum(self.seconds)
        guesses = self.prefetch.stats()
        return {
            "tpot_s": total / count,
            "bytes_per_token": self.num_bytes / count,
            "hit_rate": self.num_hits / self.num_demanded,
            "guessed_rate": self.num_guessed / self.num_demanded,
            "stall_share": self.stall_s / total,
            "idle_share": min(1.0, 1 - self.busy_s / total),
            "open_share": guesses.open_share,
            "wasted_bytes": guesses.wasted_bytes,
            "hash": self.digest.hexdigest()[:16],
            "turn_lengths": self.turn_lengths,
            "seconds": [round(each, 7) for each in self.seconds],
        }


class Bench:
    """Cells of one workload, each with as many new lanes as arms: a cache learns from the tokens,
    and would know them when they come again."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.expert_bytes = load_index(workload.store).expert_bytes
        self.context = min(CONTEXT, len(workload.tokens))
        self.oracle = workload.routes.ids if workload.routes else self._own_routes()

    def _own_routes(self) -> np.ndarray:
        """What the model's routers choose: int32 [T, places, K]."""
        routes: list[list[np.ndarray]] = []
        lane = Lane(self.workload, self.expert_bytes // 2, self.context)
        lane.engine.on_route = lambda layer, ids, weights: routes[-1].append(np.array(ids[0]))
        for at in range(len(self.workload.tokens)):
            routes.append([])
            lane.feed(at)
        lane.engine.close()
        return np.array(routes, dtype=np.int32)

    def run(
        self, budget: int, rate: int, seconds: float, num_warm_up: int, is_control: bool
    ) -> dict[str, Any]:
        """One cell: tokens in all lanes for about so long, and what they say."""
        workload, length = self.workload, len(self.workload.tokens)
        capacity = int(self.expert_bytes * budget / 100)
        lanes = [Lane(workload, capacity, self.context) for _ in ARMS]
        arms = [
            Arm("off" if is_control else name, lanes[0], workload.guesses, self.oracle)
            for name in ARMS
        ]
        orders = list(permutations(arms))
        at = number = 0
        for turn in range(NUM_TURNS):
            first_at = -(-at // self.context) * self.context
            if first_at + num_warm_up >= length:
                first_at = 0
            at = first_at + num_warm_up
            for place, arm in enumerate(arms):
                lane = lanes[(place + turn) % len(arms)]
                lane.begin(range(first_at, at))
                arm.enter(lane, rate)
            settling = (SETTLING_TOKENS, SETTLING * seconds) if turn == 0 else RETURNING
            begin, first, end = time.perf_counter(), number, None
            num_measured = 0
            while num_measured == 0 or time.perf_counter() < end:
                now = time.perf_counter()
                if end is None and (number - first >= settling[0] or now - begin > settling[1]):
                    end = now + seconds / NUM_TURNS
                for arm in orders[number % len(orders)]:
                    arm.feed(at, end is not None)
                num_measured += end is not None
                number += 1
                at = (at + 1) % length
            for arm in arms:
                arm.turn_lengths.append(num_measured)
        found = {name: arm.figures() for name, arm in zip(ARMS, arms, strict=True)}
        for arm in arms:
            arm.lane.engine.use_prefetch(arm.lane.none)
            arm.prefetch.close()
        for lane in lanes:
            lane.engine.close()
        return found
