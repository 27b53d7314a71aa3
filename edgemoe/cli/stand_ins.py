"""`edgemoe stand-ins STORE`: second records of its experts at fewer bits, beside the store."""

import argparse
import json

from ..runtime.amounts import format_bytes
from . import convert_auto, options
from .convert import CALIBRATION_TOKENS
from .render import open_output

USAGE = "%(prog)s STORE [options]"
EPILOG = """Written into the store as stand-ins.safetensors, for --stand-in of run, chat, bench and
eval (docs/routing.md). They are made from the store's own records unless --from names the
checkpoint, or a store of more bits. What was there before is replaced.

  edgemoe stand-ins olmoe.edgemoe --calibration text.txt
  edgemoe chat olmoe.edgemoe --memory 4GiB --stand-in 0.6
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="STORE", help="a folder NAME.edgemoe")
    parser.add_argument(
        "--bits",
        default="2",
        metavar="2|3|4",
        help="of the stand-ins (default: 2), or such as 2g32 or 2a64/3a32; see edgemoe convert",
    )
    parser.add_argument(
        "--from", dest="origin", metavar="SOURCE", help="a checkpoint folder, or a store"
    )
    parser.add_argument(
        "--quantizer",
        choices=("nearest", "search", "calibrated"),
        default="calibrated",
        help="how weights are rounded (default: calibrated)",
    )
    parser.add_argument(
        "--calibration",
        action="append",
        metavar="FILE",
        help="a text like those the model will read, or token ids as .npy; repeatable",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=options.count,
        default=CALIBRATION_TOKENS,
        metavar="N",
        help="at most, all texts together (default: 64k)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    options.existing(args.source)
    options.existing(args.origin, "a folder with a Hugging Face checkpoint, or a store", "")
    open_output()
    from ..quant.options import ConvertOptions, ExpertSpec
    from ..quant.progress import open_progress
    from ..quant.stand_ins import make_stand_ins
    from ..runtime.index import load_index

    index = load_index(args.source)
    spec = ExpertSpec.of(args.bits, args.quantizer)
    chosen = ConvertOptions(
        spec.bits, spec.group_size, mode=spec.mode, quantizer=spec.quantizer, down=spec.down
    )
    calibration = None
    if args.calibration or args.quantizer == "calibrated":
        calibration = convert_auto.read_calibration(args)
    path = make_stand_ins(args.source, chosen, args.origin, calibration, open_progress())
    document = {
        "store": str(args.source),
        "path": str(path),
        "bytes": path.stat().st_size,
        "expert_bytes": index.expert_bytes,
        "bits": spec.label,
    }
    if args.json:
        print(json.dumps(document, indent=1))
    else:
        share = 100 * document["bytes"] / document["expert_bytes"]
        size, full = format_bytes(document["bytes"]), format_bytes(index.expert_bytes)
        print(f"wrote {path}: {size}, {share:.0f} % of the experts' {full}")
        print(f"try: edgemoe chat {args.source} --memory 4GiB --stand-in 0.6")
    return 0
