"""What every quantizer loses at every width: bytes, perplexity and KL against 16-bit experts.

    python tools/quantizer_table.py CHECKPOINT --calibration FILE ... --text FILE ... [--tokens 55k]

All variants of all experts are made in one pass over the checkpoint and measured over the same
windows of held-out text by the engine's own kernels, paired with the experts as they came.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgemoe.cli.options import count
from edgemoe.quant.calibrated import Calibration
from edgemoe.quant.convert import convert, num_cpus
from edgemoe.quant.evaluate import Figures
from edgemoe.quant.options import ConvertOptions, ExpertSpec
from edgemoe.quant.progress import open_progress
from edgemoe.quant.variants import VariantModel
from edgemoe.quant.windows import Window, read_windows
from edgemoe.tokenizer import Tokenizer

SPECS = (
    *(ExpertSpec(bits, quantizer="absmax") for bits in (2, 3, 4, 8)),
    *(ExpertSpec(bits) for bits in (2, 3, 4, 8)),
    *(ExpertSpec(bits, quantizer="search") for bits in (2, 3, 4)),
    *(ExpertSpec(bits, quantizer="calibrated") for bits in (2, 3, 4)),
    *(
        ExpertSpec.of(width, "calibrated")
        for width in ("2a64", "2a64/2a32", "2a64/3a32", "2a64/4a32", "3a64/4a32")
    ),
)


def rows(
    source: Path, calibration: Calibration, windows: list[Window], folder: Path
) -> Iterator[dict[str, Any]]:
    """One row for each of SPECS: what it takes, and what it loses."""
    options = ConvertOptions(variants=(*SPECS, ExpertSpec(16)))
    path = convert(source, folder / "all", options, open_progress(), calibration=calibration)
    with VariantModel(path, windows, num_cpus()) as model:
        weights = sum(3 * r.layout.hidden * r.layout.width for r in model.index.records.values())
        weights //= model.num_variants
        for variant, spec in enumerate(SPECS):
            figures = Figures.of(model.losses(dict.fromkeys(model.keys, variant)))
            num_bytes = sum(model.record_bytes(key, variant) for key in model.keys)
            yield {
                "quantizer": spec.quantizer,
                "width": spec.label,
                "expert_bytes": num_bytes,
                "unpadded_bytes": sum(_unpadded(model, key, variant) for key in model.keys),
                "bpw": 8 * num_bytes / weights,
                **asdict(figures),
            }


def _unpadded(model: VariantModel, key: tuple[int, int], variant: int) -> int:
    """Bytes of a record without the padding of its two parts."""
    layout = model.index.records[key[0], key[1] * model.num_variants + variant].layout
    return layout.gate_up_bytes + layout.down_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a checkpoint folder")
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--calibration-tokens", type=count, default=65536)
    parser.add_argument("--text", action="append", required=True, help="held out from all else")
    parser.add_argument("--tokens", type=count, default=56320)
    parser.add_argument("--folder", type=Path, help="for the variants (default: a temporary one)")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    tokenizer = Tokenizer.load(args.source)
    text = read_windows(args.calibration, tokenizer, args.calibration_tokens)
    calibration = Calibration([window.ids for window in text], tuple(args.calibration))
    windows = read_windows(args.text, tokenizer, args.tokens)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for row in rows(args.source, calibration, windows, Path(folder)):
            if args.json:
                print(json.dumps(row), flush=True)
                continue
            print(
                f"{row['quantizer']:<10} {row['width']:<9} bits  {row['bpw']:.2f} bpw  "
                f"{row['expert_bytes']:>12,} B  perplexity {row['perplexity']:.4f} "
                f"({row['rise_percent']:+.3f} ± {row['rise_error_percent']:.3f} %)  "
                f"KL {row['kl']:.5f} ± {row['kl_error']:.5f}  same first {row['agreement']:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
