"""Does prefetching ever lose, and does it gain where it can? Over budgets, drives and routings.

    python tools/prefetch_grid.py --work DIR --out grid.json \
        --trace qwen3-30b-a3b.npz --trace gpt-oss-120b.npz

Budgets are shares of all expert records, drives are emulated by the reader's throttle. The demo
model decodes a text with its own routers and the predictor that edgemoe takes by default. A trace
is replayed on a store of its first layers (`--layers`), experts and top-k with records of
`--record` bytes, made in --work; since such a store's routers know nothing of the recorded routing,
the guesses are the recorded experts of the next layers, the heaviest first, each replaced by
another one with a probability that grows with the rank and is 1 - `--recall` on average (routers
looking one layer ahead: .58 to .92 in the literature, .96 for the heaviest).

Three engines, each with an expert cache, a drive and a context of its own, are fed the same tokens
in turn, in all orders: without guesses (`off`), with them (`on`), and with perfect ones (`oracle`:
what the next layer will demand, through the same gate). So one token is a pair, what wrong guesses
do to the cache stays with those who guess, and a machine that slows down slows all. Each arm has a
third of its tokens on each engine, since where an engine's memory lies makes it 1-5 % faster.
Tokens at full speed without guesses, then some for the gate to settle, go before. Told for each
cell: time with guesses over time without, the most extreme tokens left out at both ends (`TRIM`),
its 99 % interval (bootstrap over runs of tokens), the same for the oracle, and the share of time
for which the drive was idle without guesses. A cell loses when its interval lies above 1; it is
then measured again, and loses when that interval does, too. `--control` compares `off` to `off`.
Cells that are in --out already are not measured again; `--show` prints the tables of --out.
"""

import argparse
import hashlib
import json
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from edgemoe.cli.bench_limits import machine
from edgemoe.cli.render import markdown
from edgemoe.cli.replay import Routing, fit, token_id
from edgemoe.cli.text import TEXT
from edgemoe.engine import DEMO, Engine
from edgemoe.kv_cache import KVCache
from edgemoe.runtime.amounts import format_rate, parse_bytes, parse_rate
from edgemoe.runtime.index import STORE_FILE, load_index
from edgemoe.runtime.predictors import noisy_oracle
from edgemoe.runtime.prefetch import AUTO, GIVEN, Prefetcher
from edgemoe.runtime.trace import Trace

BUDGETS = tuple(range(10, 100, 10))  # percent
RATES = (50_000_000, 550_000_000, 1_500_000_000, 0)  # 0: as fast as the drive is
ARMS = ("off", "on", "oracle")
MIN_TOKENS = 12  # that are measured
CONTEXT = 256
SETTLING_TOKENS, SETTLING = 64, 0.2  # of a new gate, or this share of a cell: whichever is less
RETURNING = (8, 0.1)  # tokens, or seconds, after a change of lanes
NUM_PASSES = 4  # over a trace, with other experts in the places of the recorded ones
TRIM = 0.05  # of the pairs, at each end
MAX_RUNS, RUN_TOKENS = 60, 5  # that are drawn
NUM_RESAMPLES, TAIL = 2000, 0.005


@dataclass(slots=True)
class Workload:
    """Tokens, their routes and the guesses for them where these are given."""

    name: str
    store: Path
    tokens: list[int]
    routes: Routing | None = None
    guesses: np.ndarray | None = None  # int32 [T, places, n]


def demo(text: str | None) -> Workload:
    """The bundled model on a text."""
    from edgemoe.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(DEMO)
    return Workload("demo", DEMO, tokenizer.encode(Path(text).read_text() if text else TEXT))


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

    def __init__(self, workload: Workload, most: int, context: int) -> None:
        self.workload, self.context = workload, context
        self.engine = Engine.from_pretrained(
            workload.store,
            context=context,
            cache_bytes=most,
            prefetch="none",
            warm_start="off",
        )
        self.most = self.engine.cache.capacity_bytes
        self.none = Prefetcher("none", len(self.engine.args.moe_layers))
        self.kv_cache = KVCache.for_model(self.engine.args, context, self.engine.config.kv_bits)

    def begin(self, capacity: int, warm_up: range) -> None:
        """An expert cache with the same records; tokens at full speed without guesses."""
        engine = self.engine
        engine.use_prefetch(self.none)
        engine.reader.throttle(0)
        engine.cache.trim(0)
        engine.cache.trim(capacity)
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
            "idle_share": 1 - self.busy_s / total,
            "open_share": guesses.open_share,
            "wasted_bytes": guesses.wasted_bytes,
            "hash": self.digest.hexdigest()[:16],
            "seconds": [round(each, 7) for each in self.seconds],
        }


class Bench:
    """As many lanes as arms, on one workload."""

    def __init__(self, workload: Workload, share: float) -> None:
        self.workload = workload
        self.expert_bytes = load_index(workload.store).expert_bytes
        most = int(share * self.expert_bytes)
        self.context = min(CONTEXT, len(workload.tokens))
        self.lanes = [Lane(workload, most, self.context) for _ in ARMS]
        self.oracle = workload.routes.ids if workload.routes else self._own_routes()

    def _own_routes(self) -> np.ndarray:
        """What the model's routers choose: int32 [T, places, K]."""
        routes: list[list[np.ndarray]] = []
        lane = self.lanes[0]
        lane.engine.on_route = lambda layer, ids, weights: routes[-1].append(np.array(ids[0]))
        for at in range(len(lane.workload.tokens)):
            routes.append([])
            lane.feed(at)
        lane.engine.on_route = None
        return np.array(routes, dtype=np.int32)

    def arm(self, name: str) -> Arm:
        return Arm(name, self.lanes[0], self.workload.guesses, self.oracle)

    def run(
        self, budget: int, rate: int, seconds: float, num_warm_up: int, is_control: bool
    ) -> dict[str, Any]:
        """One cell: tokens in all lanes for about so long, and what they say."""
        capacity = min(int(self.expert_bytes * budget / 100), self.lanes[0].most)
        length = len(self.workload.tokens)
        arms = [self.arm("off" if is_control else name) for name in ARMS]
        orders = list(permutations(arms))
        at = number = num_measured = 0
        for turn in range(len(arms)):
            first_at = -(-at // self.context) * self.context
            if first_at + num_warm_up + MIN_TOKENS > length:
                first_at = 0
            at = first_at + num_warm_up
            for place, arm in enumerate(arms):
                lane = self.lanes[(place + turn) % len(arms)]
                lane.begin(capacity, range(first_at, at))
                arm.enter(lane, rate)
            start, first = time.perf_counter(), number
            settling = (SETTLING_TOKENS, SETTLING * seconds) if turn == 0 else RETURNING
            left = seconds / len(arms)
            is_measured = False
            while True:
                elapsed = time.perf_counter() - start
                is_settled = number - first >= settling[0] or elapsed > settling[1]
                is_measured = is_measured or is_settled
                if elapsed > left and num_measured >= MIN_TOKENS * (turn + 1) // len(arms):
                    break
                for arm in orders[number % len(orders)]:
                    arm.feed(at, is_measured)
                num_measured += is_measured
                number += 1
                at = (at + 1) % length
        found = {name: arm.figures() for name, arm in zip(ARMS, arms, strict=True)}
        for arm in arms:
            arm.lane.engine.use_prefetch(arm.lane.none)
            arm.prefetch.close()
        return {"arms": found, **figures(found)}

    def close(self) -> None:
        for lane in self.lanes:
            lane.engine.close()


def figures(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Ratios of the arms with guesses, [estimate, low, high], and whether outputs were the same."""
    off = np.array(arms["off"]["seconds"])
    return {
        "tokens": len(off),
        "on": ratio(np.array(arms["on"]["seconds"]), off),
        "oracle": ratio(np.array(arms["oracle"]["seconds"]), off),
        "identical": len({arm["hash"] for arm in arms.values()}) == 1,
    }


def ratio(on: np.ndarray, off: np.ndarray) -> list[float]:
    """Time of the tokens `on` over that of `off`, and its 99 % bootstrap interval over runs of
    tokens. Pairs [T] whose difference is among the most extreme ones are left out."""
    count = len(on)
    num_runs = max(MIN_TOKENS, min(MAX_RUNS, count // RUN_TOKENS))
    order = np.argsort(on - off, kind="stable")
    num_cut = int(TRIM * count)
    kept = np.ones(count, dtype=bool)
    kept[order[:num_cut]] = kept[order[count - num_cut :]] = False
    runs = np.array_split(np.arange(count), num_runs)
    sums = np.array([[(each * kept)[run].sum() for each in (on, off)] for run in runs])
    drawn = sums[np.random.default_rng(0).integers(0, num_runs, (NUM_RESAMPLES, num_runs))].sum(1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (TAIL, 1 - TAIL))
    return [float(sums[:, 0].sum() / sums[:, 1].sum()), float(low), float(high)]


def loses(cell: dict[str, Any]) -> bool:
    """Slower by more than noise, in the second measurement too where there is one."""
    return cell["on"][1] > 1 and cell.get("again", cell)["on"][1] > 1


def gains(cell: dict[str, Any], arm: str) -> bool:
    """Faster by more than noise."""
    return cell[arm][2] < 1


def cells(given: argparse.Namespace) -> Iterator[tuple[int, int]]:
    for rate in given.rates:
        for budget in given.budgets:
            yield budget, rate


def tables(document: dict[str, Any]) -> str:
    """For each drive ratios, those of perfect guesses, and idle time; the verdict."""
    columns = ("", "drive", "")
    rows: list[tuple[str, ...]] = []
    budgets = [int(word) for word in document["budgets"]]
    for name, found in document["workloads"].items():
        for rate in document["rates"]:
            cells = [found.get(f"{budget}@{rate}") for budget in budgets]
            drive = format_rate(rate) if rate else "as it is"
            rows += [
                (name, drive, "guesses", *(_cell(cell, "on") for cell in cells)),
                ("", "", "perfect", *(_cell(cell, "oracle") for cell in cells)),
                ("", "", "idle", *(_idle(cell) for cell in cells)),
            ]
            name = ""
    table = markdown(rows, (*columns, *(f"{budget} %" for budget in budgets)))
    return f"{table}\n\n{verdict(document)}"


def _cell(cell: dict[str, Any] | None, arm: str) -> str:
    if cell is None:
        return ""
    text = f"{cell[arm][0]:.2f}"
    if arm == "on" and loses(cell):
        return f"{text} (slower)"
    return f"**{text}**" if gains(cell, arm) else text


def _idle(cell: dict[str, Any] | None) -> str:
    return f"{100 * cell['arms']['off']['idle_share']:.0f} %" if cell else ""


def verdict(document: dict[str, Any]) -> str:
    """Sentences on all cells: how many lose, how many can gain, and what is gained there."""
    every = [
        (f"{name} {key.replace('@', ' % at ')}", cell)
        for name, found in document["workloads"].items()
        for key, cell in found.items()
    ]
    can = [cell for _, cell in every if gains(cell, "oracle")]
    lost = [label for label, cell in every if loses(cell)]
    widths = [(cell["on"][2] - cell["on"][1]) / 2 for _, cell in every]
    lines = [
        f"Of {len(every)} cells {len(lost)} lose by more than noise and "
        f"{sum(gains(cell, 'on') for _, cell in every)} gain by more; perfect guesses gain in "
        f"{len(can)}. Half of an interval is {median(widths):.3f} wide (median)."
    ]
    if can:
        on, best = (float(np.mean([cell[arm][0] for cell in can])) for arm in ("on", "oracle"))
        lines.append(
            f"Where perfect guesses gain, guesses gain by more than noise in "
            f"{sum(gains(cell, 'on') for cell in can)}: {on:.3f} on average, perfect ones "
            f"{best:.3f}, {(1 - on) / (1 - best):.2f} of that gain."
        )
    rest = [cell["on"][0] for _, cell in every if not gains(cell, "oracle")]
    if rest:
        lines.append(f"Where they do not, {float(np.mean(rest)):.3f} on average.")
    identical = all(cell["identical"] for _, cell in every)
    lines.append("Outputs are identical in all arms." if identical else "OUTPUTS DIFFER.")
    return "\n".join(lines + [f"- slower: {label} B/s" for label in lost])


def save(path: Path, document: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="for the stores of the traces")
    parser.add_argument("--trace", type=Path, action="append", default=[])
    parser.add_argument("--no-demo", action="store_true")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--text", help="for the demo model, instead of the built-in one")
    parser.add_argument("--record", type=parse_bytes, default=512 << 10, help="bytes of a record")
    parser.add_argument("--layers", type=int, default=4, help="of a trace, from the first on")
    parser.add_argument("--recall", type=float, default=0.8)
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), metavar="PERCENT")
    parser.add_argument("--rates", type=_rate, nargs="+", default=list(RATES), metavar="RATE")
    parser.add_argument("--seconds", type=float, default=7.0, help="of a cell, roughly")
    parser.add_argument("--warm-up", type=int, default=16, help="tokens before it")
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.show:
        print(tables(json.loads(given.out.read_text(encoding="utf-8"))))
        return 0
    if given.trace and given.work is None:
        raise SystemExit("--trace needs --work DIR, for the stores of the traces")
    kept = ("text", "record", "layers", "recall", "seconds", "warm_up", "control", "seed")
    options = {name: str(getattr(given, name)) for name in kept}
    document: dict[str, Any] = {"options": options, "machine": machine(), "workloads": {}}
    if given.out.is_file():
        document = json.loads(given.out.read_text(encoding="utf-8"))
        if document["options"] != options:
            raise SystemExit(f"`{given.out}` is of other options; choose another --out")
    document |= {"budgets": given.budgets, "rates": given.rates}
    workloads = [] if given.no_demo else [demo(given.text)]
    for path in given.trace:
        workloads.append(
            traced(path, given.work, given.record, given.layers, given.recall, given.seed)
        )
    for workload in workloads:
        found = document["workloads"].setdefault(workload.name, {})
        left = [(b, r) for b, r in cells(given) if f"{b}@{r}" not in found]
        if not left:
            continue
        bench = Bench(workload, max(given.budgets) / 100)
        begin = time.monotonic()
        try:
            for number, (budget, rate) in enumerate(left):
                settings = (budget, rate, given.seconds, given.warm_up, given.control)
                cell = bench.run(*settings)
                if cell["on"][1] > 1:
                    cell["again"] = bench.run(*settings)
                found[f"{budget}@{rate}"] = cell
                save(given.out, document)
                on, oracle = (
                    f"{middle:.3f} ({low:.3f}-{high:.3f})"
                    for middle, low, high in (cell["on"], cell["oracle"])
                )
                print(
                    f"{workload.name} {budget} % {rate / 1e6:.0f} MB/s: {on}, perfect {oracle}, "
                    f"{cell['tokens']} tokens of {1e3 * cell['arms']['off']['tpot_s']:.2f} ms; "
                    f"{number + 1} of {len(left)}, {time.monotonic() - begin:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
        finally:
            bench.close()
    print(tables(document))
    return 0


def _rate(text: str) -> int:
    return 0 if text in ("0", "none") else parse_rate(text)


if __name__ == "__main__":
    sys.exit(main())
