"""Does prefetching ever lose? Pairs of runs, with and without, over budgets, drives and routings.

    python tools/prefetch_grid.py --work DIR --out grid.json \
        --trace qwen3-30b-a3b.npz --trace gpt-oss-120b.npz

Budgets are shares of all expert records, drives are emulated by the reader's throttle. The demo
model decodes a text with its own routers and the predictor that edgemoe takes by default. A trace
is replayed on a store of its first layers (`--layers`), experts and top-k with records of
`--record` bytes, made in --work; since such a store's routers know nothing of the recorded routing,
the guesses are the recorded experts of the next layers, the heaviest first, each replaced by
another one with a probability that grows with the rank and is 1 - `--recall` on average (routers
looking one layer ahead: .58 to .92 in the literature, .96 for the heaviest).

A pair is the same tokens twice, with guesses and without, in the order ABBA; each run begins with
an expert cache filled in the same way and some tokens at full speed; runs of 64
tokens, or two seconds, go before, for the gate to settle. Told for each cell: the median
over the pairs of time with over time without, its 99 % bootstrap interval, a sign test, and how
long the drive was busy without guesses. A cell loses when its interval lies above 1; it is then
measured again, and loses when that interval does, too. `--control` compares without to without.
Cells that are in --out already are not measured again.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from math import comb
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
MIN_TOKENS, MAX_TOKENS = 3, 24
SETTLING_TOKENS, SETTLING_S = 64, 2.0  # of a new gate before it is measured: whichever is less
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
    routes = recorded.prompt + recorded.decoded
    order = np.argsort(-routes.weights, axis=2, kind="stable")
    heaviest_first = np.take_along_axis(routes.ids, order, 2)
    num_ranks = heaviest_first.shape[2]
    ranks = (np.arange(num_ranks) + 0.5) / num_ranks
    num_experts = list(index.layer_to_num_experts.values())
    guesses = noisy_oracle(heaviest_first, num_experts, 1 - 2 * (1 - recall) * ranks, seed)
    vocab = int(index.config["vocab_size"])
    tokens = [token_id(i, vocab) for i in range(len(routes))]
    return Workload(path.stem, store, tokens, routes, guesses)


class Bench:
    """One engine on a workload; every run begins alike."""

    def __init__(self, workload: Workload, share: float, num_warm_up: int) -> None:
        index = load_index(workload.store)
        self.workload, self.num_warm_up = workload, num_warm_up
        self.expert_bytes = index.expert_bytes
        context = num_warm_up + MAX_TOKENS
        most = int(share * self.expert_bytes)
        self.engine = Engine.from_pretrained(
            workload.store,
            context=context,
            cache_bytes=most,
            prefetch="none",
            warm_start="off",
        )
        self.most = self.engine.cache.capacity_bytes
        places = len(self.engine.args.moe_layers)
        self.predictor = AUTO if workload.guesses is None else GIVEN
        self.none, self.prefetch = Prefetcher("none", places), Prefetcher(self.predictor, places)
        self.kv_cache = KVCache.for_model(self.engine.args, context, self.engine.config.kv_bits)

    def renew(self) -> None:
        """A gate that has seen nothing yet."""
        self.engine.use_prefetch(self.none)
        self.prefetch.close()
        self.prefetch = Prefetcher(self.predictor, len(self.engine.args.moe_layers))

    def run(self, first: int, count: int, rate: int, capacity: int, guess: bool) -> dict[str, Any]:
        """Tokens `first` .. after a warm-up with those before them."""
        engine, cache = self.engine, self.engine.cache
        engine.use_prefetch(self.none)
        engine.reader.throttle(0)
        cache.trim(0)
        cache.trim(capacity)
        cache.preload()
        self.kv_cache.trim(0)
        for at in range(first - self.num_warm_up, first):
            self._feed(at)
        engine.use_prefetch(self.prefetch if guess else self.none)
        engine.reader.throttle(rate)
        engine.take_step_stats()
        before, digest = engine.reader.stats(), hashlib.sha256()
        begin = time.perf_counter()
        for at in range(first, first + count):
            digest.update(self._feed(at))
        seconds = time.perf_counter() - begin
        step, after = engine.take_step_stats(), engine.reader.stats()
        return {
            "tpot_s": seconds / count,
            "bytes_per_token": (after["num_bytes"] - before["num_bytes"]) / count,
            "hit_rate": step.hits / max(1, step.hits + step.misses + step.guessed),
            "in_time_rate": step.guessed / max(1, step.hits + step.misses + step.guessed),
            "stall_share": step.stall_s / seconds,
            "busy_share": (after["throttle_busy_s"] - before["throttle_busy_s"]) / seconds,
            "hash": digest.hexdigest()[:16],
        }

    def _feed(self, at: int) -> Any:
        work, options = self.workload, {}
        if work.routes is not None:
            options["forced"] = (work.routes.ids[at], work.routes.weights[at])
            options["guesses"] = work.guesses[at]
        return self.engine.forward([work.tokens[at]], self.kv_cache, **options)

    def close(self) -> None:
        self.engine.close()


def measure(
    bench: Bench, budget: int, rate: int, repeats: int, seconds: float, control: bool
) -> dict[str, Any]:
    """Pairs of one cell, and what they say."""
    capacity = min(int(bench.expert_bytes * budget / 100), bench.most)
    length = len(bench.workload.tokens)
    probe = bench.run(bench.num_warm_up, MIN_TOKENS, rate, capacity, False)
    count = max(MIN_TOKENS, min(MAX_TOKENS, int(seconds / probe["tpot_s"])))
    last = length - count
    places = np.linspace(bench.num_warm_up, last, repeats).astype(int)
    pairs: list[dict[str, Any]] = []
    bench.renew()
    settling = min(SETTLING_TOKENS, SETTLING_S / probe["tpot_s"])
    for first in places[: int(settling / count) + 1].tolist():
        bench.run(first, count, rate, capacity, not control)
    for turn, first in enumerate(places.tolist()):
        runs: dict[bool, dict[str, Any]] = {}
        for guess in (True, False) if turn % 2 == 0 else (False, True):
            is_on = guess and not control
            runs[guess] = bench.run(first, count, rate, capacity, is_on)
        pairs.append({"on": runs[True], "off": runs[False]})
    return {"tokens": count, "pairs": pairs, **figures(pairs)}


def figures(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the pairs, the interval of the ratio, and the sign test."""
    ratios = [pair["on"]["tpot_s"] / pair["off"]["tpot_s"] for pair in pairs]
    low, high = interval(ratios)
    return {
        "ratio": median(ratios),
        "low": low,
        "high": high,
        "slower": sum(ratio > 1 for ratio in ratios),
        "sign_p": sign_test(ratios),
        "identical": all(pair["on"]["hash"] == pair["off"]["hash"] for pair in pairs),
        **{
            f"{name}_{arm}": median(pair[arm][name] for pair in pairs)
            for name in ("tpot_s", "bytes_per_token", "hit_rate", "stall_share", "busy_share")
            for arm in ("on", "off")
        },
    }


def interval(ratios: list[float], seed: int = 0) -> tuple[float, float]:
    """99 % bootstrap interval of the median."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(np.array(ratios), (NUM_RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (TAIL, 1 - TAIL))
    return float(low), float(high)


def sign_test(ratios: list[float]) -> float:
    """Probability of as uneven a split by chance, both sides."""
    count = sum(ratio != 1 for ratio in ratios)
    more = max(sum(ratio > 1 for ratio in ratios), sum(ratio < 1 for ratio in ratios))
    tail = sum(comb(count, k) for k in range(more, count + 1)) / 2**count if count else 1.0
    return min(1.0, 2 * tail)


def loses(cell: dict[str, Any]) -> bool:
    """Slower by more than noise, in the second measurement too where there is one."""
    return cell["low"] > 1 and cell.get("again", cell)["low"] > 1


def cells(given: argparse.Namespace) -> Iterator[tuple[int, int]]:
    for rate in given.rates:
        for budget in given.budgets:
            yield budget, rate


def tables(document: dict[str, Any]) -> str:
    """One table for each workload, and the verdict."""
    parts, lost, gained = [], [], []
    columns = ("drive", "budget", "ratio", "99 %", "slower", "busy", "stall", "hit", "ms off")
    for name, found in document["workloads"].items():
        rows = []
        for key, cell in found.items():
            budget, rate = (int(word) for word in key.split("@"))
            drive = format_rate(rate) if rate else "unthrottled"
            rows.append(
                (
                    drive,
                    f"{budget} %",
                    f"{cell['ratio']:.3f}",
                    f"{cell['low']:.3f}-{cell['high']:.3f}",
                    f"{cell['slower']}/{len(cell['pairs'])}",
                    f"{100 * cell['busy_share_off']:.0f} %" if rate else "-",
                    f"{100 * cell['stall_share_off']:.0f} %",
                    f"{100 * cell['hit_rate_off']:.0f} > {100 * cell['hit_rate_on']:.0f} %",
                    f"{1e3 * cell['tpot_s_off']:.2f}",
                )
            )
            label = f"{name} {budget} % {drive} ({cell['ratio']:.3f})"
            lost += [label] if loses(cell) else []
            gained += [label] if cell["high"] < 1 else []
        parts.append(f"{name}\n\n" + markdown(rows, columns))
    count = sum(len(found) for found in document["workloads"].values())
    identical = all(c["identical"] for f in document["workloads"].values() for c in f.values())
    parts.append(
        f"of {count} cells {len(gained)} gain and {len(lost)} lose by more than noise"
        + "".join(f"\n- loses: {label}" for label in lost)
        + ("\noutputs identical in all pairs" if identical else "\nOUTPUTS DIFFER")
    )
    return "\n\n".join(parts)


def save(path: Path, document: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="for the stores of the traces")
    parser.add_argument("--trace", type=Path, action="append", default=[])
    parser.add_argument("--no-demo", action="store_true")
    parser.add_argument("--text", help="for the demo model, instead of the built-in one")
    parser.add_argument("--record", type=parse_bytes, default=512 << 10, help="bytes of a record")
    parser.add_argument("--layers", type=int, default=4, help="of a trace, from the first on")
    parser.add_argument("--recall", type=float, default=0.8)
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), metavar="PERCENT")
    parser.add_argument("--rates", type=_rate, nargs="+", default=list(RATES), metavar="RATE")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.25, help="of a run, roughly")
    parser.add_argument("--warm-up", type=int, default=16, help="tokens before it")
    parser.add_argument("--control", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    options = {k: str(v) for k, v in vars(given).items() if k not in ("out", "trace", "no_demo")}
    document: dict[str, Any] = {"options": options, "machine": machine(), "workloads": {}}
    if given.out.is_file():
        document = json.loads(given.out.read_text(encoding="utf-8"))
        if document["options"] != options:
            raise SystemExit(f"`{given.out}` is of other options; choose another --out")
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
        bench = Bench(workload, max(given.budgets) / 100, given.warm_up)
        begin = time.monotonic()
        try:
            for number, (budget, rate) in enumerate(left):
                settings = (budget, rate, given.repeats, given.seconds, given.control)
                cell = measure(bench, *settings)
                if cell["low"] > 1:
                    cell["again"] = measure(bench, *settings)
                found[f"{budget}@{rate}"] = cell
                save(given.out, document)
                elapsed = time.monotonic() - begin
                print(
                    f"{workload.name} {budget} % {rate / 1e6:.0f} MB/s: {cell['ratio']:.3f} "
                    f"({cell['low']:.3f}-{cell['high']:.3f}), {number + 1} of {len(left)}, "
                    f"{elapsed:.0f} s",
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
