"""`--bits auto`: a store of variants, a plan found on it by measuring, and the store of that plan.

1. Every expert at every width, in one calibrated pass (NAME.edgemoe.variants, beside the target).
2. The planner (planner_fast.py or planner_edgemoe.py) chooses, by losses on text that nothing was
   calibrated on: every eighth window, or a text given for it.
3. The chosen records become the store, byte by byte; the variants are removed.
Each step goes on or is repeated with the same result after an interruption.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..runtime.errors import EdgeMoeError, UsageError
from ..runtime.index import load_index
from .bitplan import BitPlan, Key
from .calibrated import Calibration
from .convert import convert, num_cpus
from .errors_by_width import errors_by_width
from .evaluate import Figures, Losses
from .journal import check_target
from .options import ConvertOptions
from .plan import ConversionPlan, plan_conversion
from .planner_edgemoe import edgemoe_plan
from .planner_fast import Costs, within_bytes, within_loss
from .progress import Progress, Silent
from .remembered import Remembered
from .store_source import StoreSource, open_source
from .target import Target, num_weights
from .variants import VariantModel
from .windows import Window

MEASURED_FILE = "measured.jsonl"  # in the store of variants
HELD_OUT_EVERY = 8  # windows of the calibration text


def convert_auto(
    source: str | Path,
    out: str | Path,
    options: ConvertOptions,
    target: Target,
    calibration: Calibration,
    validation: Sequence[Window],
    progress: Progress | None = None,
    on_plan: Callable[[BitPlan], None] | None = None,
) -> Path:
    """Find a plan for `target` and convert by it; `on_plan` hears of it before it is followed.

    `options` say group size and trunk bits. `validation` must not be among the windows of the
    calibration. Raises what `convert` raises, and UsageError for a target that cannot be met.
    """
    progress, out = progress or Silent(), Path(out)
    check_target(out)
    variants = ConvertOptions(
        group_size=options.group_size,
        trunk_bits=options.trunk_bits,
        variants=target.variants(options.group_size),
    )
    wanted = plan_conversion(source, variants)
    most = target.max_bytes(wanted)
    path = out.with_name(out.name + ".variants")
    if not _is_made(path, wanted, calibration):
        if path.exists():
            raise UsageError(
                f"`{path}` is of another conversion", "", f"start anew after: rm -r {path}"
            )
        convert(source, path, variants, progress, calibration=calibration)
    plan, choice = find_plan(source, path, variants, target, validation, most, progress)
    if on_plan is not None:
        on_plan(plan)
    chosen = {key: key[1] * len(variants.variants) + variant for key, variant in choice.items()}
    made = StoreSource(path, chosen)
    store = convert(
        made,
        out,
        ConvertOptions(trunk_bits=made.index.plan["trunk_bits"], plan=plan),
        progress,
    )
    shutil.rmtree(path)
    return store


def _is_made(path: Path, wanted: ConversionPlan, calibration: Calibration) -> bool:
    """Whether an interrupted run has left exactly these variants."""
    try:
        found = load_index(path).plan
    except EdgeMoeError:
        return False
    return found == {**wanted.to_json(), "calibration": calibration.to_json()}


def find_plan(
    source: str | Path,
    path: Path,
    variants: ConvertOptions,
    target: Target,
    validation: Sequence[Window],
    max_bytes: int | None,
    progress: Progress,
) -> tuple[BitPlan, dict[Key, int]]:
    """The plan for a target on the store of variants at `path`, and the variant of each expert."""
    with VariantModel(path, validation, num_cpus()) as model:
        if target.planner == "edgemoe":
            choice, report = _edgemoe(model, path, target, progress)
        else:
            with open_source(source) as opened, StoreSource(path) as records:
                windows = [window.ids for window in validation]
                errors = errors_by_width(opened, records, variants, windows, num_cpus(), progress)
            choice, report = _fast(model, errors, target, max_bytes, progress)
        before = model.num_evaluations
        figures = Figures.of(model.losses(choice))
        specs = {key: model.variants[variant] for key, variant in choice.items()}
        num_bytes = sum(model.record_bytes(key, variant) for key, variant in choice.items())
        weights = sum(num_weights(r.layout) for r in model.index.records.values())
    found: dict[str, Any] = {
        "planner": target.planner,
        "target": {name: value for name, value in asdict(target).items() if value is not None},
        "loss_percent": figures.rise_percent,
        "loss_error_percent": figures.rise_error_percent,
        "kl": figures.kl,
        "perplexity": figures.perplexity,
        "reference_perplexity": figures.other_perplexity,
        "validation_tokens": figures.num_tokens,
        "expert_bytes": num_bytes,
        "bpw": 8 * num_bytes * len(model.variants) / weights,
        "num_evaluations": before,
        **report,
    }
    return BitPlan(f"auto {target.planner}", specs, found), choice


def _edgemoe(
    model: VariantModel, path: Path, target: Target, progress: Progress
) -> tuple[dict[Key, int], dict[str, Any]]:
    measure = Remembered(path / MEASURED_FILE, model.identity, model.perplexity)
    if measure.num_known:
        progress.note(f"going on: {measure.num_known} plans are measured")
    started: list[str] = []

    def tell(phase: str, done: int, total: int) -> None:
        if phase == "experts":
            if not started:
                progress.start("experts alone", total, unit="plans")
                started.append(phase)
            progress.advance(1)

    found = edgemoe_plan(
        model.keys,
        model.num_variants,
        measure,
        target.max_loss,
        model.set_base,
        tell,
    )
    return found.choice, found.report


def _fast(
    model: VariantModel,
    errors: dict[Key, list[float]],
    target: Target,
    max_bytes: int | None,
    progress: Progress,
) -> tuple[dict[Key, int], dict[str, Any]]:
    weights = _layer_weights(model, errors, progress)
    costs = Costs(
        {key: [weights[key[0]] * error for error in errors[key]] for key in model.keys},
        {
            key: [model.record_bytes(key, variant) for variant in range(model.num_variants)]
            for key in model.keys
        },
    )
    report: dict[str, Any] = {"layer_weights": {str(k): v for k, v in weights.items()}}
    if max_bytes is not None:
        choice = within_bytes(costs, max_bytes)
        assert choice is not None  # Target.max_bytes has refused what is too small
    else:
        choice, _, _ = within_loss(costs, lambda plan: _rise(model.losses(plan)), target.max_loss)
    return choice, {"predicted_kl": costs.total_loss(choice), **report}


def _layer_weights(
    model: VariantModel, errors: dict[Key, list[float]], progress: Progress
) -> dict[int, float]:
    """By layer: the divergence from the reference with the layer at the narrowest width, over its
    summed errors. At least a thousandth of the largest: a layer is never free."""
    widest = {key: model.num_variants - 1 for key in model.keys}
    model.set_base(widest)
    layers = model.args.moe_layers
    progress.start("layers alone", len(layers), unit="plans")
    found = {}
    for layer in layers:
        narrow = {key: 0 for key in model.keys if key[0] == layer}
        kl = float(model.losses({**widest, **narrow}).kl.mean())
        found[layer] = kl / max(1e-30, sum(errors[key][0] for key in narrow))
        progress.advance(1)
    least = max(1e-30, max(found.values()) / 1000)
    return {layer: max(value, least) for layer, value in found.items()}


def _rise(losses: Losses) -> float:
    """The relative rise of perplexity over the reference."""
    return math.expm1(float((losses.nll - losses.other_nll).mean()))
