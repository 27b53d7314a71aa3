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
    parser.add_argument(
        "--keep",
        type=_shares,
        default=[],
        metavar="X,Y",
        help="and with this share of each layer's experts, those most picked in the first half of "
        "the tokens; counted on the other half",
    )
    parser.add_argument("--plot", metavar="FILE.svg", help="hit rate over budget (needs [plot])")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    if not args.files:
        raise UsageError("no trace given", "", "edgemoe trace record STORE --out NAME.trace")
    open_output()
    if args.plot is not None:
        from .draw import need_matplotlib

        need_matplotlib(args.plot)
    words = args.budgets or BUDGETS.split(",")
    documents = []
    for file in args.files:
        trace = load(file)
        documents.append(describe(trace, file, args.policy, words))
        documents[-1]["sets"] = [kept(trace, share, args.policy, words) for share in args.keep]
    if args.plot is not None:
        from .draw import replayed

        replayed(documents, args.plot)
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
    from ..quant.progress import open_progress
    from ..runtime.replay import REPLAYED, Demand, recall, replay

    demand = Demand(trace)
    if demand.is_prefill:
        note(f"{file}: no decoded tokens; the prefill is replayed token by token")
    table_bytes, cycle_bytes = trace.table_bytes, trace.cycle_bytes
    capacities = [budget_bytes(word, table_bytes) for word in words]
    names, outcomes, progress = policies or REPLAYED, {}, open_progress()
    progress.start("replay", len(names) + 1, unit="steps")
    for name in names:
        outcomes[name] = replay(demand, name, capacities)
        progress.advance(1)
    recalls = recall(demand)
    progress.advance(1)
    progress.close()
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
            for name, by_place in recalls.items()
        },
    }


def figures(outcome: "Outcome") -> dict[str, Any]:
    return {
        "hit_rate": outcome.hit_rate,
        "hits": outcome.hits,
        "misses": outcome.misses,
        "bytes_per_token": outcome.bytes_per_token,
    }


def _shares(text: str) -> list[float]:
    from .prune_task import share

    return [share(word) for word in options.word_list(text)]


def kept(
    trace: "Trace", keep: float, policies: list[str] | None, words: list[str]
) -> dict[str, Any]:
    """A set from one half of the trace on the other, as one JSON object; by the first policy."""
    from ..quant.trace_masks import half_mask
    from ..runtime.policy import DEFAULT_POLICY

    capacities = [budget_bytes(word, trace.table_bytes) for word in words]
    found = half_mask(trace, keep, (policies or [DEFAULT_POLICY])[0], capacities)
    outcomes = ("full", "drawn_anew", "left_out")
    return {
        "keep": keep,
        "policy": found.full[0].policy,
        "num_chosen_on": found.num_chosen_on,
        "num_tested_on": found.num_tested_on,
        "num_kept": list(found.num_kept),
        "removed_picks": found.removed_picks,
        **{name: [figures(each) for each in getattr(found, name)] for name in outcomes},
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
    parts = [head, table(rows, header), f"recall of the next demand: {predictors}"]
    parts += [_text_of_set(each, header[1:]) for each in document["sets"]]
    return "\n\n".join(parts)


def _text_of_set(found: dict[str, Any], header: list[str]) -> str:
    """Reads of the full routing over those with the set, in both readings of the picks that go."""
    rows = [
        [f"hit, {name}", *(f"{each['hit_rate']:.3f}" for each in found[key])]
        for name, key in (("full", "full"), ("set", "drawn_anew"))
    ]
    for name, key in (("drawn anew", "drawn_anew"), ("left out", "left_out")):
        pairs = zip(found["full"], found[key], strict=True)
        reads = [(a["bytes_per_token"], b["bytes_per_token"]) for a, b in pairs]
        fewer = (f"{a / b:.2f}" if b else "-" for a, b in reads)
        rows.append([f"fewer reads, lost picks {name}", *fewer])
    return (
        f"{found['keep']:.0%} of the experts stay, chosen on {found['num_chosen_on']} tokens, "
        f"counted on the other {found['num_tested_on']}: {found['removed_picks']:.1%} of the picks "
        f"go ({found['policy']})\n\n{table(rows, ['', *header])}"
    )
