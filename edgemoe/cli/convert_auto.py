"""`edgemoe convert --bits auto`: the options of a plan that is found, and what is calibrated on."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import UsageError
from . import options
from .render import note

if TYPE_CHECKING:
    from ..quant.bitplan import BitPlan
    from ..quant.calibrated import Calibration
    from ..quant.windows import Window

VALIDATION_TOKENS = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--max-loss, --size, --bpw, and how the plan is found."""
    group = parser.add_argument_group("with --bits auto")
    group.add_argument(
        "--max-loss",
        type=share_of_one,
        metavar="2%",
        help="the smallest store whose perplexity on held-out text rises by no more",
    )
    group.add_argument(
        "--size", type=options.size, metavar="SIZE", help="of both weight files, such as 4GiB"
    )
    group.add_argument("--bpw", type=float, metavar="X", help="bits a weight of the experts")
    group.add_argument(
        "--planner",
        choices=("fast", "edgemoe"),
        help="by each expert's measured error, or by measuring a plan for every expert "
        "(default: fast)",
    )
    group.add_argument(
        "--widths",
        type=options.word_list,
        metavar="LIST",
        help="to choose from, as for --bits (default: 2 to 4 bits, down with more, and 8)",
    )
    group.add_argument(
        "--validation",
        action="append",
        metavar="FILE",
        help="held-out text to measure on (default: one window in 8 of --calibration)",
    )


def is_wanted(args: argparse.Namespace) -> bool:
    """Whether a plan shall be found; raises UsageError for options that only go with that."""
    if args.bits == "auto":
        for name in ("plan", "quantizer", "mode"):
            if getattr(args, name) is not None:
                raise UsageError(
                    f"`--bits auto` and `--{name}` do not go together",
                    "a plan is found, calibrated and symmetric",
                    "leave one of them out",
                )
        return True
    for name in ("max_loss", "size", "bpw", "planner", "widths", "validation"):
        if getattr(args, name) is not None:
            raise UsageError(
                f"`--{name.replace('_', '-')}` goes with `--bits auto` only",
                "nothing else looks for a plan",
                "add --bits auto, or leave it out",
            )
    return False


def run(args: argparse.Namespace) -> int:
    """Find a plan, print it, and convert by it."""
    from ..quant.auto import HELD_OUT_EVERY, convert_auto
    from ..quant.calibrated import Calibration
    from ..quant.options import ConvertOptions
    from ..quant.progress import open_progress
    from ..quant.target import Target
    from ..quant.windows import Window

    if args.dry_run:
        raise UsageError(
            "`--bits auto` has no dry run",
            "its plan is found by measuring",
            "use --save-plan FILE, and --plan FILE --dry-run later",
        )
    target = Target(
        args.max_loss,
        args.size,
        args.bpw,
        args.planner or "fast",
        tuple(args.widths or ()),
    )
    group_size = args.group_size
    if group_size not in (None, "channel"):
        group_size = int(group_size)
    given: dict[str, Any] = {"group_size": group_size, "trunk_bits": args.trunk_bits}
    chosen = ConvertOptions(**{name: value for name, value in given.items() if value is not None})
    calibration = read_calibration(args)
    if args.validation:
        validation = _read(args, args.validation, VALIDATION_TOKENS)
    else:
        windows = calibration.windows
        validation = [Window(list(ids), 1) for ids in windows[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]]
        kept = [ids for n, ids in enumerate(windows) if n % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
        calibration = Calibration(kept, calibration.texts)
    if not validation or not calibration.windows:
        raise UsageError(
            "too little text to calibrate and to measure",
            f"{calibration.num_tokens} tokens and {len(validation)} windows are left for them",
            "give more with --calibration, or --validation FILE",
        )

    def on_plan(plan: "BitPlan") -> None:
        if args.json:
            print(json.dumps(plan.to_json(), indent=1), flush=True)
        else:
            print("\n".join(plan.lines()), flush=True)
        if args.save_plan is not None:
            plan.save(args.save_plan)

    path = convert_auto(
        args.source,
        args.out,
        chosen,
        target,
        calibration,
        validation,
        open_progress(),
        on_plan,
    )
    note(f'wrote {path}; try: edgemoe run {path} "Hello"')
    return 0


def read_calibration(args: argparse.Namespace) -> "Calibration":
    """The text of --calibration in windows, or texts of this Python's library."""
    from ..quant.calibrated import Calibration
    from ..quant.windows import share
    from ..tokenizer import Tokenizer

    if args.calibration:
        windows = _read(args, args.calibration, args.calibration_tokens)
        names = tuple(Path(path).name for path in args.calibration)
        return Calibration([window.ids for window in windows], names)
    from ..quant.default_text import standard_texts

    tokenizer = Tokenizer.load(Path(args.source))
    if tokenizer is None:
        raise UsageError(
            "nothing to calibrate on",
            "this model came without a tokenizer.json",
            "give token ids: --calibration FILE.npy",
        )
    note(
        "note: no --calibration: calibrated on prose and code of this Python's library; text like "
        "what the model will read is better"
    )
    texts = [tokenizer.encode(text) for text in standard_texts()]
    windows = share(texts, args.calibration_tokens)
    return Calibration([window.ids for window in windows], ("this Python's library",))


def _read(args: argparse.Namespace, paths: list[str], num_tokens: int) -> "list[Window]":
    from ..quant.windows import read_windows
    from ..tokenizer import Tokenizer

    are_tokens = all(Path(path).suffix == ".npy" for path in paths)
    tokenizer = None if are_tokens else Tokenizer.load(Path(args.source))
    return read_windows(paths, tokenizer, num_tokens)


def share_of_one(text: str) -> float:
    """`2%` or `0.02` as 0.02."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 10:
        raise argparse.ArgumentTypeError(f"expected a share such as 2% or 0.02, got `{text}`")
    return value
