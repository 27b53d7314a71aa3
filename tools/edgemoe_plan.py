"""EdgeMoE's choice of bit-widths run to the end on a model, and checked: hours on a large one.

    python tools/edgemoe_plan.py CHECKPOINT --calibration FILE ... --text FILE ... --folder DIR

Measures the loss of every uniform width, of every expert alone at the lower width of the bracket,
and of the plans on the way to the largest K. Then checks what the algorithm promises: the two
widths bracket the loss, the plan is within it, one expert more is not, evaluations are no more
than E L + |B| + O(log(E L)), and the plan and the one with one expert more lose the same again on a
model opened anew, from the first layer on. What was measured is kept in DIR: the same command goes
on after an interruption, and once more in seconds.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from edgemoe.cli.convert_auto import share_of_one
from edgemoe.cli.options import count
from edgemoe.quant.auto import MEASURED_FILE
from edgemoe.quant.calibrated import Calibration
from edgemoe.quant.convert import convert, num_cpus
from edgemoe.quant.options import ConvertOptions, ExpertSpec
from edgemoe.quant.planner_edgemoe import Found, edgemoe_plan
from edgemoe.quant.progress import Progress, open_progress
from edgemoe.quant.remembered import Remembered
from edgemoe.quant.target import WIDTHS
from edgemoe.quant.variants import VariantModel
from edgemoe.quant.windows import Window, read_windows
from edgemoe.tokenizer import Tokenizer


def specs(quantizer: str) -> tuple[ExpertSpec, ...]:
    """The planner's widths; rounding to nearest where nothing else is worth it."""
    calibrated = quantizer == "calibrated"
    return tuple(
        ExpertSpec.of(width, "nearest" if calibrated and width == "8" else quantizer)
        for width in WIDTHS["edgemoe"]
    )


def search(
    path: Path, windows: list[Window], max_loss: float, progress: Progress
) -> tuple[Found, int]:
    """The plan, and how many of its measurements were known from an earlier run."""
    with VariantModel(path, windows, num_cpus()) as model:
        measure = Remembered(path / MEASURED_FILE, model.identity, model.perplexity)
        known = measure.num_known
        progress.start("experts alone", len(model.keys), unit="plans")

        def tell(phase: str, done: int, total: int) -> None:
            if phase == "experts":
                progress.advance(1)

        found = edgemoe_plan(
            model.keys, model.num_variants, measure, max_loss, model.set_base, tell
        )
        return found, known


def checks(found: Found, path: Path, windows: list[Window], max_loss: float) -> dict[str, Any]:
    """What was promised, each with whether it holds."""
    report, keys = found.report, sorted(found.choice)
    most = len(keys) + len(WIDTHS["edgemoe"]) + math.ceil(math.log2(len(keys))) + 1
    with VariantModel(path, windows, num_cpus()) as model:
        reference = model.perplexity(dict.fromkeys(keys, model.num_variants - 1))
        holds = {
            "loss within": found.loss <= max_loss,
            "measured again": model.perplexity(found.choice) / reference - 1 == found.loss,
            "few evaluations": report["num_evaluations"] <= most,
        }
        if "order" in report:
            losses, low, high = report["uniform_losses"], report["low"], report["high"]
            order = [tuple(key) for key in report["order"]]
            more = {**found.choice, order[report["num_low"]]: low}
            holds |= {
                "widths bracket it": losses[high] <= max_loss < losses[low] and high == low + 1,
                "one more is beyond": report["loss_of_one_more"] > max_loss,
                "one more measured again": model.perplexity(more) / reference - 1
                == report["loss_of_one_more"],
                "least sensitive first": order
                == sorted(keys, key=lambda k: (report["sensitivities"][f"{k[0]}.{k[1]}"], k)),
                "low ones are the first": {k for k in keys if found.choice[k] == low}
                == set(order[: report["num_low"]]),
            }
    return holds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a checkpoint folder")
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--calibration-tokens", type=count, default=65536)
    parser.add_argument("--text", action="append", required=True, help="to measure losses on")
    parser.add_argument("--tokens", type=count, default=8192)
    parser.add_argument("--max-loss", type=share_of_one, default=0.02)
    parser.add_argument("--quantizer", choices=("absmax", "calibrated"), default="calibrated")
    parser.add_argument("--folder", type=Path, required=True, help="keeps what was measured")
    args = parser.parse_args()
    progress, began = open_progress(), time.monotonic()
    tokenizer = Tokenizer.load(args.source)
    text = read_windows(args.calibration, tokenizer, args.calibration_tokens)
    windows = read_windows(args.text, tokenizer, args.tokens)
    path = args.folder / f"{args.quantizer}.variants"
    if not path.exists():
        args.folder.mkdir(parents=True, exist_ok=True)
        calibration = Calibration([window.ids for window in text], tuple(args.calibration))
        options = ConvertOptions(variants=specs(args.quantizer))
        convert(args.source, path, options, progress, calibration=calibration)
    made = time.monotonic()
    found, known = search(path, windows, args.max_loss, progress)
    searched = time.monotonic()
    holds = checks(found, path, windows, args.max_loss)
    progress.close()
    figures = {
        "max_loss": args.max_loss,
        "loss": found.loss,
        "tokens": sum(window.num_scored for window in windows),
        "variants_s": made - began,
        "search_s": searched - made,
        "measured_before": known,
        **{k: v for k, v in found.report.items() if k not in ("order", "sensitivities")},
        "checks": holds,
    }
    print(json.dumps(figures, indent=1))
    broken = [name for name, is_kept in holds.items() if not is_kept]
    if broken:
        raise SystemExit("not what was promised: " + ", ".join(broken))


if __name__ == "__main__":
    main()
