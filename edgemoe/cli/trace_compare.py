"""`edgemoe trace compare A [B]`: two recorded routings, or two policies on one of them."""

import argparse
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.errors import UsageError
from . import options
from .render import as_json, open_output, table
from .trace_replay import BUDGETS, BUDGETS_HELP, budget_bytes, figures, load

if TYPE_CHECKING:
    from ..runtime.trace import Trace

USAGE = """%(prog)s A B [options]
       %(prog)s A --policy X,Y [options]"""
EPILOG = """`reused`: share of a token's experts that the token before it used as well, by layer on
average. `top fifth`: share of all picks that goes to the fifth of the experts used most. For two
traces of one model: `usage`, the cosine of how often each expert is used, layer by layer;
`hot overlap`, how many of the fifth used most are the same; and, where both have as many steps,
`agreement`, the share of picks that are the same in the same step.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", metavar="FILE", help="one or two trace files")
    parser.add_argument(
        "--policy",
        type=options.word_list,
        metavar="X[,Y]",
        help="two for one trace, one for two (default: the engine's)",
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
    from ..runtime.policy import DEFAULT_POLICY

    wanted = {1: 2, 2: 1}.get(len(args.files))
    policies = args.policy or ([DEFAULT_POLICY] if wanted == 1 else [])
    if wanted is None or len(policies) != wanted:
        raise UsageError(
            "expected two traces, or one trace and two policies",
            f"got {len(args.files)} traces and {len(policies)} policies",
            "edgemoe trace compare A B, or: edgemoe trace compare A --policy lru,forecast",
        )
    open_output()
    if args.plot is not None:
        from .draw import need_matplotlib

        need_matplotlib(args.plot)
    traces = [load(file) for file in args.files]
    document: dict[str, Any] = {
        "traces": [
            {"file": str(file), "model": trace.model, **consistency(trace)}
            for file, trace in zip(args.files, traces, strict=True)
        ],
        "curves": curves(traces, args.files, policies, args.budgets or BUDGETS.split(",")),
    }
    if len(traces) == 2:
        document["overlap"] = overlap(*traces)
    if args.plot is not None:
        from .draw import compared

        compared(document, args.plot)
    print(json.dumps(as_json(document), indent=1) if args.json else _text(document))
    return 0


def consistency(trace: "Trace") -> dict[str, float | int]:
    """How much a routing repeats itself."""
    used = _used(trace)
    picks = used.sum(axis=(0, 1))
    reused = [(step[1:] & step[:-1]).sum() for step in np.moveaxis(used, 1, 0)]
    after_first = used[1:].sum()
    experts = int(trace.num_experts.sum())
    counts = np.sort(used.sum(axis=0)[_real(trace)])[::-1]
    return {
        "num_steps": trace.num_steps,
        "picks": int(picks.sum()),
        "reused": float(sum(reused) / after_first) if after_first else 0.0,
        "top_fifth": float(counts[: max(1, experts // 5)].sum() / max(1, counts.sum())),
        "never_used": float((counts == 0).mean()),
    }


def overlap(a: "Trace", b: "Trace") -> dict[str, float] | None:
    """How alike two routings of one model are; None where the shapes are not those of one model."""
    if not np.array_equal(a.num_experts, b.num_experts):
        return None
    used = _used(a), _used(b)
    counts = [each.sum(axis=0).astype(np.float64) for each in used]
    norms = np.linalg.norm(counts[0], axis=1) * np.linalg.norm(counts[1], axis=1)
    cosine = (counts[0] * counts[1]).sum(axis=1)[norms > 0] / norms[norms > 0]
    real = _real(a)
    most = max(1, int(real.sum()) // 5)
    hot = [set(np.argsort(-each[real], kind="stable")[:most].tolist()) for each in counts]
    found = {
        "usage": float(cosine.mean()) if len(cosine) else 0.0,
        "hot_overlap": len(hot[0] & hot[1]) / most,
    }
    if a.num_steps == b.num_steps:
        both = (used[0] & used[1]).sum()
        found["agreement"] = float(both / max(1, max(used[0].sum(), used[1].sum())))
    return found


def curves(
    traces: "list[Trace]", files: list[str], policies: list[str], words: list[str]
) -> list[dict[str, Any]]:
    """Hit rate over budget for each trace and policy; budgets are shares of each trace's table."""
    from ..runtime.replay import Demand, replay

    found = []
    for trace, file in zip(traces, files, strict=True):
        demand = Demand(trace)
        capacities = [budget_bytes(word, trace.table_bytes) for word in words]
        for policy in policies:
            outcomes = replay(demand, policy, capacities)
            found.append(
                {
                    "file": str(file),
                    "policy": policy,
                    "budgets": [
                        {
                            "budget": word,
                            "bytes": capacity,
                            "share": capacity / trace.table_bytes,
                            **figures(outcome),
                        }
                        for word, capacity, outcome in zip(words, capacities, outcomes, strict=True)
                    ],
                }
            )
    return found


def _used(trace: "Trace") -> np.ndarray:
    """[steps, places, most experts] bool"""
    used = np.zeros((*trace.experts.shape[:2], int(trace.num_experts.max()) + 1), dtype=np.bool_)
    np.put_along_axis(used, trace.experts.astype(np.int64), True, axis=2)  # -1: the last column
    return used[:, :, :-1]


def _real(trace: "Trace") -> np.ndarray:
    """[places, most experts] bool: where there is an expert."""
    return np.arange(int(trace.num_experts.max())) < trace.num_experts[:, None]


def _text(document: dict[str, Any]) -> str:
    rows = [
        (t["file"], t["num_steps"], *(f"{t[n]:.3f}" for n in ("reused", "top_fifth", "never_used")))
        for t in document["traces"]
    ]
    parts = [table(rows, ("trace", "tokens", "reused", "top fifth", "never used"))]
    alike = document.get("overlap")
    if alike:
        names = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in alike.items())
        parts.append(f"alike: {names}")
    elif "overlap" in document:
        parts.append("alike: not comparable, the layers have different numbers of experts")
    first, second = document["curves"]
    header = ["hit rate", *(f"{100 * b['share']:.3g} %" for b in first["budgets"])]
    lines = [
        [f"{c['file']}, {c['policy']}", *(f"{b['hit_rate']:.3f}" for b in c["budgets"])]
        for c in (first, second)
    ]
    pairs = zip(first["budgets"], second["budgets"], strict=True)
    lines.append(["difference", *(f"{b['hit_rate'] - a['hit_rate']:+.3f}" for a, b in pairs)])
    parts.append(table(lines, header))
    return "\n\n".join(parts)
