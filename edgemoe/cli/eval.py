"""`edgemoe eval STORE [STORE2] --text FILE ...`: perplexity, and how far two stores are apart."""

import argparse
import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import UsageError
from . import options
from .render import note, open_output, table
from .routing_options import add_routing_options

if TYPE_CHECKING:
    from ..engine import Engine
    from ..quant.evaluate import Figures

USAGE = "%(prog)s [STORE] [STORE2] --text FILE ... [options]"
EPILOG = """Every token but the first of a text is scored once, by the tokens before it in its
window. With a second store, usually the same model at more bits, both read the same windows: mean
KL divergence from STORE2, and how often both put the same token first. A .npy file holds token ids.
--set and the routing are for STORE alone: what they cost is measured against the same store twice.

  edgemoe eval o3.edgemoe o8.edgemoe --text wiki.txt --tokens 50k
  edgemoe eval o.edgemoe o.edgemoe --set code --set-mode hard --text code.txt
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", nargs="?", metavar="STORE", help="default: the bundled model")
    parser.add_argument("other", nargs="?", metavar="STORE2", help="to compare STORE with")
    add_text_options(parser)
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--memory",
        type=options.size,
        metavar="SIZE",
        help="bound of the whole process, such as 4GiB; two stores share it",
    )
    group.add_argument("--threads", type=options.count, metavar="N", help="compute threads")
    options.add_set_options(group)
    options.add_numeric_options(group)
    add_routing_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def add_text_options(parser: argparse.ArgumentParser) -> None:
    """What is read: --text, --tokens, --window, --stride."""
    group = parser.add_argument_group("text")
    group.add_argument(
        "--text", action="append", metavar="FILE", help="a text, or token ids as .npy; repeatable"
    )
    group.add_argument(
        "--tokens", type=options.count, metavar="N", help="at most, all texts together (50k)"
    )
    group.add_argument(
        "--window", type=options.count, metavar="N", help="tokens of a window (default: 512)"
    )
    group.add_argument(
        "--stride",
        type=options.count,
        metavar="N",
        help="tokens from one window to the next (default: half a window)",
    )


def run(args: argparse.Namespace) -> int:
    if not args.text:
        raise UsageError("no --text given", "nothing to measure", "--text FILE, a held-out text")
    path = options.existing(args.store) or options.bundled_model()
    other_path = options.existing(args.other)
    open_output()
    from ..quant.evaluate import Figures, evaluate
    from ..quant.progress import open_progress
    from ..quant.windows import WINDOW_TOKENS, read_windows

    size = args.window or WINDOW_TOKENS
    with ExitStack() as stack:
        engine = _open(path, size, args, None if other_path is None else 0.5)
        stack.callback(engine.close)
        windows = read_windows(
            args.text, engine.tokenizer, args.tokens, size, args.stride or max(1, size // 2)
        )
        other = None
        if other_path is not None:
            other = stack.enter_context(_open(other_path, size, args, 1.0, engine))
        progress = open_progress()
        stack.callback(progress.close)
        figures = Figures.of(evaluate(engine, windows, other, progress, args.kv_bits))
        peak, routing = engine.peak_memory_bytes(), engine.routing
        counts = engine.routing_counts() if routing else None
    document = {
        "store": str(path),
        "other": None if other_path is None else str(other_path),
        "routing": None if routing is None else routing.label,
        "mean_active_experts": counts and counts.mean_active,
        "dropped": counts and counts.num_dropped,
        "stand_ins": counts and counts.num_stand_ins,
        "window": size,
        "stride": args.stride or max(1, size // 2),
        "num_windows": len(windows),
        **asdict(figures),
        "peak_memory_bytes": peak,
    }
    print(json.dumps(document, indent=1) if args.json else _text(document, figures))
    return 0


def _open(
    path: str | Path,
    size: int,
    args: argparse.Namespace,
    share: float | None,
    first: "Engine | None" = None,
) -> "Engine":
    """An engine for windows of `size` tokens.

    Two engines share --memory: the first gets half of it, the second what the first will not use.
    """
    from ..engine import Engine

    given: dict[str, Any] = options.engine_arguments(args) | {"warm_start": "off"}
    memory = given.pop("memory", None)
    if first is not None:  # of two, only STORE runs with a set and another routing
        for name in ("set", "set_mode", "set_threshold", "routing"):
            given.pop(name, None)
    if memory is not None:
        given["memory"] = int(memory * (share or 1.0))
        if first is not None:
            given["memory"] -= max(0, first.plan.budget_bytes - first.memory_bytes())
    engine = Engine.from_pretrained(path, context=size, **given)
    for line in engine.report().get("notes", ()):
        note(f"note: {Path(path).name}: {line}")
    return engine


def _text(document: dict[str, Any], figures: "Figures") -> str:
    labels = (Path(document["store"]).name, document["routing"])
    rows = [
        (
            ", ".join(filter(None, labels)),
            f"{figures.perplexity:.4f} ± {figures.perplexity_error:.4f}",
        )
    ]
    header = ["store", "perplexity"]
    if document["other"] is not None:
        header += ["rise", "KL", "same first token"]
        rows[0] += (
            f"{figures.rise_percent:+.3f} ± {figures.rise_error_percent:.3f} %",
            f"{figures.kl:.5f} ± {figures.kl_error:.5f}",
            f"{100 * figures.agreement:.2f} %",
        )
        rows.append((Path(document["other"]).name, f"{figures.other_perplexity:.4f}", "", "", ""))
    stated = f"windows of {document['window']} tokens every {document['stride']}"
    return f"{table(rows, header)}\n{figures.num_tokens:,} tokens scored, {stated}"
