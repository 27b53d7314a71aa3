"""`edgemoe convert HF_DIR --out NAME.edgemoe`: a checkpoint becomes a store."""

import argparse
import json

from ..runtime.errors import UsageError
from .options import existing
from .render import note, open_output

USAGE = "%(prog)s HF_DIR --out NAME.edgemoe [options]"
EPILOG = """The plan is printed first; --dry-run stops there and reads no weights. Interrupted at
any moment, the same command goes on where it was.

  edgemoe convert OLMoE-1B-7B --out olmoe.edgemoe --bits 4
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="HF_DIR", help="folder with config.json and safetensors")
    parser.add_argument("--out", metavar="NAME.edgemoe", help="the store to write; must not exist")
    add_format_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--json", action="store_true", help="the plan as one JSON object")


def add_format_options(parser: argparse.ArgumentParser) -> None:
    """--bits, --mode, --group-size, --trunk-bits: how a store would be stored."""
    group = parser.add_argument_group("format")
    group.add_argument(
        "--bits", type=int, choices=(2, 3, 4, 8, 16), help="of the experts (default: 4)"
    )
    group.add_argument(
        "--mode",
        choices=("sym", "nf4"),
        help="of expert codes: even steps, or the 16 levels of NormalFloat4 (default: sym)",
    )
    group.add_argument(
        "--group-size",
        choices=("32", "64", "128", "channel"),
        help="columns that share a scale (default: 64, or what divides the columns)",
    )
    group.add_argument(
        "--trunk-bits",
        type=int,
        choices=(4, 8, 16),
        help="of everything that is not a routed expert (default: 8)",
    )


def format_options(args: argparse.Namespace) -> object:
    """The `ConvertOptions` that the flags name."""
    from ..quant.plan import ConvertOptions

    given = {name: getattr(args, name) for name in ("bits", "mode", "group_size", "trunk_bits")}
    if given["group_size"] not in (None, "channel"):
        given["group_size"] = int(given["group_size"])
    return ConvertOptions(**{name: value for name, value in given.items() if value is not None})


def run(args: argparse.Namespace) -> int:
    if args.out is None and not args.dry_run:
        raise UsageError("no --out given", "a store needs a name", "--out NAME.edgemoe")
    existing(args.source, "a folder with a Hugging Face checkpoint", "check the path")
    open_output()
    from ..quant.plan import plan_conversion

    options = format_options(args)
    plan = plan_conversion(args.source, options)
    if args.json:
        print(json.dumps(plan.to_json(), indent=1), flush=True)
    else:
        print("\n".join(plan.lines()), flush=True)
    if args.dry_run:
        return 0
    from ..quant.convert import convert
    from ..quant.progress import open_progress

    path = convert(args.source, args.out, options, open_progress())
    note(f'wrote {path}; try: edgemoe run {path} "Hello"')
    return 0
