"""The stores that the arms of an ablation run on, derived once from one model into a folder."""

import argparse
from collections.abc import Callable
from pathlib import Path

from ..runtime.index import STORE_FILE, StoreIndex, load_index
from .render import note

KINDS = ("16", "8", "4", "mixed")
ABOUT = {
    "16": "16 bits",
    "8": "8 bits, a scale a row",
    "4": "4 bits, a scale a row (MoQE)",
    "mixed": "mixed widths",
}


def derive(
    source: Path,
    folder: Path,
    layers: int | None,
    mixed: Callable[[Path, Path], None],
    given: Path | None = None,
) -> dict[str, StoreIndex]:
    """The index of each kind of store, made in `folder` where it is not there yet.

    `mixed(source, out)` makes the one of mixed widths, unless it is `given`. `layers`: of the first
    layers only. Raises BudgetError where the disk is too small for all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if layers is not None:
        source = _cropped(source, folder, layers)
    from ..quant.convert import convert
    from ..quant.journal import need_room
    from ..quant.options import ConvertOptions
    from ..quant.plan import plan_conversion

    options = {
        "16": ConvertOptions(bits=16),
        "8": ConvertOptions(bits=8, group_size="channel"),
        "4": ConvertOptions(bits=4, group_size="channel"),
    }
    stem = source.name.removesuffix(".edgemoe")
    targets = {kind: folder / f"{stem}-{kind}.edgemoe" for kind in KINDS}
    if given is not None:
        targets["mixed"] = given
        load_index(given)
    missing = [kind for kind, path in targets.items() if not (path / STORE_FILE).is_file()]
    needed = sum(
        plan_conversion(source, options.get(kind, options["4"])).output_bytes for kind in missing
    )
    step = "name another folder with --work, or fewer layers with --replay-layers"
    need_room(folder, needed, f"what is missing of {len(missing)} arms", step)
    for kind in missing:
        note(f"making {targets[kind].name}: {ABOUT[kind]}")
        if kind == "mixed":
            mixed(source, targets[kind])
        else:
            convert(source, targets[kind], options[kind])
    return {kind: load_index(path) for kind, path in targets.items()}


def _cropped(source: Path, folder: Path, layers: int) -> Path:
    from ..quant.crop import crop_store

    stem = source.name.removesuffix(".edgemoe")
    target = folder / f"{stem}-{layers}-layers.edgemoe"
    if not (target / STORE_FILE).is_file():
        note(f"making {target.name}: the first {layers} layers")
        crop_store(source, target, layers)
    return target


def work_folder(args: argparse.Namespace, source: Path) -> Path:
    """--work, or a folder beside the model."""
    if args.work is not None:
        return Path(args.work)
    return source.resolve().parent / f"{source.name.removesuffix('.edgemoe')}.ablation"
