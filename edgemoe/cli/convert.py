"""`edgemoe convert SOURCE --out NAME.edgemoe`: a checkpoint, or a store, becomes a store."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..runtime.errors import UsageError
from . import convert_auto, options
from .render import note, open_output

if TYPE_CHECKING:
    from ..quant.bitplan import BitPlan
    from ..quant.options import ConvertOptions

USAGE = "%(prog)s SOURCE --out NAME.edgemoe [options]"
EPILOG = """The plan is printed first; --dry-run stops there and reads no weights. Interrupted at
any moment, the same command goes on where it was. SOURCE is a Hugging Face folder, or a store of
more bits, whose trunk is taken over as it is.

  edgemoe convert OLMoE-1B-7B --out olmoe.edgemoe --bits 4
  edgemoe convert OLMoE-1B-7B --out o3.edgemoe --bits 3 --calibration text.txt
  edgemoe convert OLMoE-1B-7B --out olmoe-m.edgemoe --bits auto --max-loss 2%
"""
CALIBRATION_TOKENS = 65536


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a checkpoint folder, or a store")
    parser.add_argument("--out", metavar="NAME.edgemoe", help="the store to write; must not exist")
    add_format_options(parser)
    group = parser.add_argument_group("quality")
    group.add_argument(
        "--quantizer",
        choices=("nearest", "absmax", "search", "calibrated"),
        help="how weights are rounded (default: calibrated with --calibration, else nearest)",
    )
    group.add_argument(
        "--calibration",
        action="append",
        metavar="FILE",
        help="a text like those the model will read, or token ids as .npy; repeatable",
    )
    group.add_argument(
        "--calibration-tokens",
        type=options.count,
        default=CALIBRATION_TOKENS,
        metavar="N",
        help="at most, all texts together (default: 64k)",
    )
    group.add_argument(
        "--plan", metavar="FILE", help="bits of every expert: a file, experts-int8 or moqe"
    )
    group.add_argument("--save-plan", metavar="FILE", help="write the plan that is followed")
    convert_auto.add_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    parser.add_argument("--json", action="store_true", help="the plan as one JSON object")


def add_format_options(parser: argparse.ArgumentParser) -> None:
    """--bits, --mode, --group-size, --trunk-bits: how a store would be stored."""
    group = parser.add_argument_group("format")
    group.add_argument(
        "--bits",
        type=_bits,
        metavar="2|3|4|8|16|auto",
        help="of the experts (default: 4), or such as 2a64/3a32: gate and up 2 bits, asymmetric in "
        "groups of 64, down 3 bits in groups of 32; auto finds a plan for --max-loss, --size or "
        "--bpw",
    )
    group.add_argument(
        "--mode",
        choices=("sym", "asym", "nf4"),
        help="of expert codes: even steps around zero, or from a least value that a group has, or "
        "the 16 levels of NormalFloat4 (default: sym)",
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


def _bits(text: str) -> int | str:
    if text == "auto":
        return text
    if text in ("2", "3", "4", "8", "16"):
        return int(text)
    if text[0] in "2348" and any(letter in text for letter in "ga/"):
        return text
    raise argparse.ArgumentTypeError(
        f"expected 2, 3, 4, 8, 16, auto, or such as 2a64/3a32, got `{text}`"
    )


def format_options(args: argparse.Namespace, **more: Any) -> "ConvertOptions":
    """The `ConvertOptions` that the flags name."""
    from ..quant.options import ConvertOptions, ExpertSpec

    given = {name: getattr(args, name) for name in ("bits", "mode", "group_size", "trunk_bits")}
    if given["group_size"] not in (None, "channel"):
        given["group_size"] = int(given["group_size"])
    if isinstance(args.bits, str) and args.bits != "auto":
        spec = ExpertSpec.of(args.bits)
        for name in ("mode", "group_size"):
            if given[name] is not None:
                raise UsageError(
                    f"`--bits {args.bits}` and `--{name.replace('_', '-')}` do not go together",
                    "the width says it",
                )
        given |= {name: getattr(spec, name) for name in ("bits", "mode", "group_size", "down")}
    given |= more
    return ConvertOptions(**{name: value for name, value in given.items() if value is not None})


def run(args: argparse.Namespace) -> int:
    if args.out is None and not args.dry_run:
        raise UsageError("no --out given", "a store needs a name", "--out NAME.edgemoe")
    options.existing(
        args.source, "a folder with a Hugging Face checkpoint, or a store", "check the path"
    )
    open_output()
    from ..quant.plan import plan_conversion
    from ..quant.store_source import is_store

    if args.trunk_bits is not None and is_store(args.source):
        raise UsageError(
            "`--trunk-bits` is not possible with a store as the source",
            "its trunk is taken over as it is",
            "leave it out, or convert the checkpoint",
        )
    if convert_auto.is_wanted(args):
        return convert_auto.run(args)
    calibrated = "calibrated" if args.calibration else None
    chosen = format_options(
        args, quantizer=args.quantizer or (None if args.plan else calibrated), plan=_plan(args)
    )
    plan = plan_conversion(args.source, chosen)
    if args.json:
        print(json.dumps(plan.to_json(), indent=1), flush=True)
    else:
        print("\n".join(plan.lines()), flush=True)
    if args.save_plan is not None:
        plan.bit_plan().save(args.save_plan)
    if args.dry_run:
        return 0
    from ..quant.convert import convert
    from ..quant.progress import open_progress

    needs_text = any(spec.quantizer == "calibrated" for spec in chosen.all_specs)
    calibration = None
    if args.calibration or needs_text:
        calibration = convert_auto.read_calibration(args)
    path = convert(args.source, args.out, chosen, open_progress(), calibration=calibration)
    note(f'wrote {path}; try: edgemoe run {path} "Hello"')
    return 0


def _plan(args: argparse.Namespace) -> "BitPlan | None":
    """The plan that --plan names."""
    if args.plan is None:
        return None
    from ..quant.bitplan import NAMED, BitPlan, named
    from ..quant.layouts import expert_keys
    from ..quant.store_source import open_source

    if args.plan in NAMED:
        with open_source(args.source) as source:
            return named(args.plan, expert_keys(source), args.bits)
    for name in ("bits", "mode", "group_size", "quantizer"):
        if getattr(args, name) is not None:
            raise UsageError(
                f"`--{name.replace('_', '-')}` and `--plan {args.plan}` do not go together",
                "the plan says how every expert is stored",
            )
    return BitPlan.load(args.plan)
