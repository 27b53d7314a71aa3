"""Does prefetching ever lose, and does it gain where it can? Over budgets, drives and routings.

    python tools/prefetch_grid.py --work DIR --out grid.json \
        --trace qwen3-30b-a3b.npz --trace gpt-oss-120b.npz

Budgets are shares of all expert records, drives are emulated by the reader's throttle. A model (the
demo model, or --model) decodes a text with its own routers and the default predictor. A trace
is replayed on a store of its first layers (`--layers`), experts and top-k with records of
`--record` bytes, made in --work; since such a store's routers know nothing of the recorded routing,
the guesses are the recorded experts of the next layers, the heaviest first, each replaced by
another one with a probability that grows with the rank and is 1 - `--recall` on average (routers
looking one layer ahead: .58 to .92 in the literature, .96 for the heaviest).

Three engines, new for each cell, each with an expert cache, a drive and a context of its own, are
fed the same tokens in turn, in all orders: without guesses (`off`), with them (`on`), and with
perfect ones (`oracle`: what the next layer will demand, through the same gate). So one token is a
pair, what wrong guesses do to the cache stays with those who guess, and a machine that slows down
slows all. Each arm has four of twelve turns on each engine, since where an engine's memory lies
makes it faster or slower. Tokens at full speed without guesses, then some for the gate to settle,
go before each. Told for a cell: time with guesses over time without, the most extreme tokens left
out at both ends (`TRIM`), its 99 % interval (Student's t over the turns), the same for the oracle,
and the share of time for which the drive was idle without guesses. A cell loses when its interval
lies above 1; it is then measured again, and loses when that interval does, too. `--control`
compares `off` to `off`. Cells that are in --out already are not measured again; `--show` prints the
tables of --out.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from prefetch_bench import NUM_TURNS, Bench, decoded, traced

from edgemoe.cli.bench_limits import machine
from edgemoe.cli.render import markdown
from edgemoe.engine import DEMO
from edgemoe.runtime.amounts import format_rate, parse_bytes, parse_rate

BUDGETS = tuple(range(10, 100, 10))  # percent
RATES = (50_000_000, 550_000_000, 1_500_000_000, 0)  # 0: as fast as the drive is
TRIM = 0.05  # of the pairs, at each end
STUDENT = {12: 3.106}[NUM_TURNS]  # t of 99 %, two-sided, by one more than its degrees of freedom


def cell_of(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a cell keeps: its arms, the ratios of those with guesses, [estimate, low, high], and
    whether outputs were the same."""
    off = np.array(arms["off"]["seconds"])
    return {
        "arms": arms,
        "tokens": len(off),
        "on": ratio(np.array(arms["on"]["seconds"]), off, arms["off"]["turn_lengths"]),
        "oracle": ratio(np.array(arms["oracle"]["seconds"]), off, arms["off"]["turn_lengths"]),
        "identical": len({arm["hash"] for arm in arms.values()}) == 1,
    }


def ratio(on: np.ndarray, off: np.ndarray, turn_lengths: list[int]) -> list[float]:
    """Time of the tokens `on` over that of `off` [T]: the geometric mean over turns, and its 99 %
    interval (Student's t). Pairs whose difference is among the most extreme ones are left out."""
    count = len(on)
    order = np.argsort(on - off, kind="stable")
    num_cut = int(TRIM * count)
    kept = np.ones(count, dtype=bool)
    kept[order[:num_cut]] = kept[order[count - num_cut :]] = False
    begins = np.cumsum([0, *turn_lengths[:-1]])
    kept |= np.repeat(np.add.reduceat(kept, begins) == 0, turn_lengths)  # no turn without tokens
    sums = [np.add.reduceat(each * kept, begins) for each in (on, off)]
    logs = np.log(sums[0] / sums[1])
    half = STUDENT * logs.std(ddof=1) / np.sqrt(len(logs))
    return [float(np.exp(logs.mean() + by)) for by in (0.0, -half, half)]


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
    parser.add_argument("--model", type=Path, default=DEMO, help="a store (default: the demo)")
    parser.add_argument("--traces-only", action="store_true")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--text", help="for the model, instead of the built-in one")
    parser.add_argument("--record", type=parse_bytes, default=512 << 10, help="bytes of a record")
    parser.add_argument("--layers", type=int, default=4, help="of a trace, from the first on")
    parser.add_argument("--recall", type=float, default=0.8)
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), metavar="PERCENT")
    parser.add_argument("--rates", type=_rate, nargs="+", default=list(RATES), metavar="RATE")
    parser.add_argument("--seconds", type=float, default=7.0, help="of a cell, roughly")
    parser.add_argument("--warm-up", type=int, default=24, help="tokens before each turn")
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
    workloads = [] if given.traces_only else [decoded(given.model, given.text)]
    for path in given.trace:
        workloads.append(
            traced(path, given.work, given.record, given.layers, given.recall, given.seed)
        )
    for workload in workloads:
        found = document["workloads"].setdefault(workload.name, {})
        left = [(b, r) for b, r in cells(given) if f"{b}@{r}" not in found]
        if not left:
            continue
        bench = Bench(workload)
        begin = time.monotonic()
        for number, (budget, rate) in enumerate(left):
            settings = (budget, rate, given.seconds, given.warm_up, given.control)
            cell = cell_of(bench.run(*settings))
            if cell["on"][1] > 1:
                cell["again"] = cell_of(bench.run(*settings))
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
    print(tables(document))
    return 0


def _rate(text: str) -> int:
    return 0 if text in ("0", "none") else parse_rate(text)


if __name__ == "__main__":
    sys.exit(main())
