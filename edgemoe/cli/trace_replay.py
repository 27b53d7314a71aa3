"""`edgemoe trace replay FILE...`: recorded routings through policies, pools and predictors."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.amounts import format_bytes, parse_bytes
from ..runtime.errors import UsageError
from . import options
from .render import as_json, note, open_output, table

if TYPE_CHECKING:
    from ..runtime.replay import Outcome
    from ..runtime.trace import Trace

USAGE = "%(prog)s FILE [FILE ...] [options]"
BUDGETS = "1%,3%,5%,8%,12.5%,25%,50%,75%"
BUDGETS_HELP = "default: " + BUDGETS.replace("%", "%%")
EPILOG = """A budget is a share of all experts (3%) or an amount (2GiB) of one pool for all layers,
cold at the first decoded token. Those marked with * do not hold what one token needs. `belady`
knows the future: no eviction hits more. A .npz with the same arrays is read too (docs/trace.md).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE", help="trace files")
    parser.add_argument(
        "--policy", type=options.word_list, metavar="A,B", help="default: all, and belady"
    )
    parser.add_argument(
        "--budgets",
        type=options.word_list,
        metavar="X,Y",
        help=BUDGETS_HELP,
    )
    parser.add_argument("--plot", metavar="FILE.svg", help="hit rate over budget (needs [plot])")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    if not args.files:
        raise UsageError("no trace given", "", "edgemoe trace record STORE --out NAME.trace")
    open_output()
    if args.plot is not None:
        from .trace_plot import need_matplotlib

        need_matplotlib(args.plot)
    words = args.budgets or BUDGETS.split(",")
    documents = [describe(load(file), file, args.policy, words) for file in args.files]
    if args.plot is not None:
        from .trace_plot import plot

        plot(documents, args.plot)
    if args.json:
        print(json.dumps(as_json({"traces": documents}), indent=1, allow_nan=False))
    else:
        print("\n\n".join(text(document) for document in documents))
    return 0


def load(file: str) -> "Trace":
    from ..runtime.trace import Trace

    return Trace.load(file)


def budget_bytes(word: str, table_bytes: int) -> int:
    """`3%` of the table or `2GiB`, in bytes. Raises UsageError."""
    if word.endswith("%"):
        try:
            share = float(word[:-1]) / 100
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise UsageError(f"`{word}` is no budget", "expected more than 0% and at most 100%")
        return int(share * table_bytes)
    return parse_bytes(word)


def describe(
    trace: "Trace", file: str, policies: list[str] | None, words: list[str]
) -> dict[str, Any]:
    """Everything `replay` says of one trace, as one JSON object."""
    from ..runtime.replay import REPLAYED, Demand, recall, replay

    demand = Demand(trace)
    if demand.is_prefill:
        note(f"{file}: no decoded tokens; the prefill is replayed token by token")
    table_bytes, cycle_bytes = trace.table_bytes, trace.cycle_bytes
    capacities = [budget_bytes(word, table_bytes) for word in words]
    outcomes = {name: replay(demand, name, capacities) for name in policies or REPLAYED}
    return {
        "file": str(file),
        "model": trace.model or Path(file).stem,
        "num_steps": trace.num_steps,
        "num_replayed": demand.num_steps,
        "num_demands": demand.num_demands,
        "num_places": trace.num_places,
        "num_experts": trace.num_experts.tolist(),
        "top_k": trace.experts.shape[2],
        "table_bytes": table_bytes,
        "cycle_bytes": cycle_bytes,
        "cycle_share": cycle_bytes / table_bytes,
        "floor_bytes": demand.floor_bytes,
        "budgets": [
            {
                "budget": word,
                "bytes": capacity,
                "share": capacity / table_bytes,
                "below_cycle": capacity < cycle_bytes,
                "below_floor": capacity < demand.floor_bytes,
            }
            for word, capacity in zip(words, capacities, strict=True)
        ],
        "policies": {name: [figures(each) for each in row] for name, row in outcomes.items()},
        "predictors": {
            name: {"recall": _mean(by_place), "by_place": by_place.tolist()}
            for name, by_place in recall(demand).items()
        },
    }


def figures(outcome: "Outcome") -> dict[str, Any]:
    return {
        "hit_rate": outcome.hit_rate,
        "hits": outcome.hits,
        "misses": outcome.misses,
        "bytes_per_token": outcome.bytes_per_token,
    }


def _mean(values: Any) -> float:
    known = values[values == values]
    return float(known.mean()) if len(known) else 0.0


def text(document: dict[str, Any]) -> str:
    budgets, policies = document["budgets"], document["policies"]
    experts = sorted(set(document["num_experts"]))
    head = (
        f"{document['model']} ({document['file']}): {document['num_replayed']} tokens, "
        f"{document['num_places']} layers, {document['top_k']} of "
        f"{'-'.join(map(str, sorted({experts[0], experts[-1]})))} experts, "
        f"{format_bytes(document['table_bytes'])}; one token needs "
        f"{document['cycle_share']:.1%} of them, {format_bytes(int(document['cycle_bytes']))}"
    )
    header = ["hit rate", *(f"{100 * b['share']:.3g} %{'*' * b['below_cycle']}" for b in budgets)]
    rows: list[list[str]] = [["", *(format_bytes(b["bytes"]) for b in budgets)]]
    rows += [[name, *(f"{r['hit_rate']:.3f}" for r in row)] for name, row in policies.items()]
    best = next((name for name in policies if name != "belady"), None)
    if best is not None:
        reads = (format_bytes(int(r["bytes_per_token"])) for r in policies[best])
        rows.append([f"{best}: read per token", *reads])
    predictors = ", ".join(
        f"{name} {each['recall']:.3f}" for name, each in document["predictors"].items()
    )
    return f"{head}\n\n{table(rows, header)}\n\nrecall of the next demand: {predictors}"
