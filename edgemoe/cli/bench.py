"""`edgemoe bench MODEL`: speed, reads, memory at several budgets, and what the machine allows."""

import argparse
import json
from pathlib import Path

from ..runtime.errors import UsageError
from . import options
from .render import note, open_output

DESCRIPTION = """Measure decode, prefill, time to first token, reads, hits, stalls and peak memory.

All arms run in this process, one after the other, round by round, so that a slow minute of the
machine hits all alike. An engine is opened for each arm and round, warmed up, measured and closed;
the peaks include opening it. What storage and memory can do is measured right before and right
after. Decoding is greedy and of exactly -n tokens."""
EPILOG = """A percentage is of the memory with which every expert stays resident; `floor` is the
least that works. Random prompts touch every expert alike, so that hits say nothing about text: they
are for finding limits, and labelled in the output.

  edgemoe bench NAME.edgemoe --memory floor,25%,50%,100% -p 512 -n 128 -r 3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "-p",
        "--prompt-tokens",
        type=options.count,
        metavar="N",
        help="default: 512, or what the context of the model has room for",
    )
    parser.add_argument(
        "-n", "--tokens", type=options.count, default=128, metavar="N", help="default: 128"
    )
    parser.add_argument(
        "-r", "--repeats", type=options.count, default=3, metavar="N", help="default: 3"
    )
    parser.add_argument(
        "--memory",
        type=options.word_list,
        metavar="LIST",
        help="budgets: sizes, percentages, `floor` (default: floor,50%%,100%%)",
    )
    parser.add_argument(
        "--no-control",
        dest="control",
        action="store_false",
        help="do not decode the same tokens with every expert in memory beside (needs that memory)",
    )
    parser.add_argument("--prompts", choices=("real", "random"), default="real")
    parser.add_argument("--text", metavar="FILE", help="take real prompts from this text")
    parser.add_argument(
        "--replay", metavar="TRACE", help="take the routing of a trace instead of the routers'"
    )
    parser.add_argument(
        "--replay-layers", type=options.count, metavar="N", help="of its first N layers only"
    )
    parser.add_argument("--context", type=options.count, metavar="N", help="default: -p plus -n")
    parser.add_argument("--policy", choices=options.POLICIES, default=options.POLICIES[0])
    options.add_prefetch_option(parser)
    parser.add_argument("--threads", type=options.count, metavar="N", help="compute threads")
    options.add_set_options(parser)
    options.add_numeric_options(parser)
    parser.add_argument(
        "--throttle",
        type=options.rate,
        metavar="RATE",
        help="read as from a drive of this rate, such as 50MB/s",
    )
    parser.add_argument("--markdown", action="store_true", help="Markdown tables")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="JSON into FILE, or instead of tables"
    )


def run(args: argparse.Namespace) -> int:
    path = Path(options.model_path(args) or options.bundled_model())
    target = None if args.json in (None, "-") else Path(args.json)
    if target is not None and target.is_dir():
        raise UsageError(f"--json would write to the folder `{target}`", "", "--json=FILE")
    open_output()
    from .bench_arms import measure
    from .bench_report import tables

    document = measure(path, args)
    if args.json == "-":
        print(json.dumps(document, indent=1))
        return 0
    if target is not None:
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        temporary.replace(target)
        note(f"wrote {target}")
    print(tables(document, markdown=args.markdown))
    return 0
