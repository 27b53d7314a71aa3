"""`edgemoe bench MODEL`: speed, reads, memory at several budgets, and what the machine allows."""

import argparse
from pathlib import Path

from ..runtime.errors import UsageError
from . import options, sets_arms
from .render import open_output
from .reports import add_report_options, check_report_options, print_report

DESCRIPTION = """Measure decode, prefill, time to first token, reads, hits, stalls and peak memory.

All arms run in this process, one after the other, round by round, so that a slow minute of the
machine hits all alike. An engine is opened for each arm and round, warmed up, measured and closed;
the peaks include opening it. What storage and memory can do is measured right before and right
after. Decoding is greedy and of exactly -n tokens."""
EPILOG = """A percentage is of the memory with which every expert stays resident; `floor` is the
least that works. Random prompts touch every expert alike, so that hits say nothing about text: they
are for finding limits, and labelled in the output.

  edgemoe bench NAME.edgemoe --memory floor,25%,50%,100% -p 512 -n 128 -r 3
  edgemoe bench NAME.edgemoe --sets code --text code.txt --plot code.svg
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
    options.add_routing_options(parser)
    parser.add_argument(
        "--throttle",
        type=options.rate,
        metavar="RATE",
        help="read as from a drive of this rate, such as 50MB/s",
    )
    sets_arms.add_arguments(parser)
    _add_ablation(parser)
    add_report_options(parser)


def _add_ablation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ablation", "MODEL may be a checkpoint folder here")
    group.add_argument(
        "--ablation",
        action="store_true",
        help="the schemes of the EdgeMoE paper side by side instead of budgets: docs/ablation.md",
    )
    group.add_argument("--work", metavar="DIR", help="keep the derived stores here (reused)")
    group.add_argument("--prepare", action="store_true", help="only make those stores")
    group.add_argument(
        "--rates", type=options.rates, metavar="LIST", help="default: 50MB/s,550MB/s,1500MB/s"
    )
    group.add_argument("--arms", type=options.word_list, metavar="LIST", help="only these arms")
    group.add_argument(
        "--share",
        type=float,
        default=0.25,
        metavar="X",
        help="our expert cache, as a share of all experts at 4 bits; with --sets, of the full "
        "model's (default: 0.25)",
    )
    group.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        metavar="S",
        help="so many tokens at each rate as take about this long (default: 2)",
    )
    group.add_argument(
        "--warm-up", type=int, default=32, metavar="N", help="tokens before those (default: 32)"
    )
    group.add_argument(
        "--mixed", metavar="STORE", help="of the same model, instead of one by --bits auto"
    )
    group.add_argument(
        "--max-loss", default="2%", metavar="P", help="of the mixed widths (default: 2%%)"
    )
    group.add_argument(
        "--recall",
        type=float,
        default=0.8,
        metavar="X",
        help="with --replay: share of the next layers' experts that guesses name (default: 0.8)",
    )
    group.add_argument(
        "--eval-tokens",
        type=options.count,
        default=4096,
        metavar="N",
        help="for the loss; with --sets, of each text (default: 4096)",
    )


def run(args: argparse.Namespace) -> int:
    path = Path(options.model_path(args) or options.bundled_model())
    check_report_options(args)
    open_output()
    is_report = bool(args.sets or args.others)
    if args.plot is not None:
        from .draw import need_matplotlib

        if not is_report:
            raise UsageError("--plot draws what --sets measures", "", "give --sets NAME")
        need_matplotlib(args.plot)
    if is_report and args.ablation:
        raise UsageError("--sets and --ablation are two reports", "", "one at a time")
    if args.prepare and not args.ablation:
        raise UsageError("--prepare goes with --ablation")
    if args.prepare:
        from .bench_ablation import prepare

        for index in prepare(path, args).values():
            print(index.path, flush=True)
        return 0
    if is_report:
        from .bench_sets import measure
        from .sets_report import tables
    elif args.ablation:
        from .ablation_report import tables
        from .bench_ablation import measure
    else:
        from .bench_arms import measure
        from .bench_report import tables

    document = measure(path, args)
    if args.plot is not None:
        from .draw import sets

        sets(document, args.plot)
    print_report(document, args, lambda: tables(document, markdown=args.markdown or is_report))
    return 0
