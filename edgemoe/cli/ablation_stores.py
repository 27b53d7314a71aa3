"""The stores that the arms of an ablation run on, derived once from one model into a folder."""

import argparse
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from ..runtime.index import EXPERTS_FILE, STORE_FILE, TRUNK_FILE, StoreIndex, load_index
from .render import note

KINDS = ("16", "8", "4", "mixed")
ABOUT = {
    "16": "16 bits",
    "8": "8 bits, a scale a row",
    "4": "4 bits, a scale a row (MoQE)",
    "mixed": "mixed widths",
}
_CROPPED = ".cropped"  # what the stores of the first layers are made of


def derive(
    source: Path,
    folder: Path,
    layers: int | None,
    mixed: Callable[[Path, Path], None],
    given: Path | None = None,
    kinds: Collection[str] = KINDS,
) -> dict[str, StoreIndex]:
    """The index of each of `kinds` of stores, made in `folder` where it is not there yet; goes on
    where a run before was interrupted.

    `mixed(source, out)` makes the one of mixed widths, unless it is `given`. `layers`: of the first
    layers only. Raises BudgetError where the disk is too small for all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = source.name.removesuffix(".edgemoe") + (f"-{layers}-layers" if layers else "")
    targets = {kind: folder / f"{stem}-{kind}.edgemoe" for kind in KINDS if kind in kinds}
    if given is not None:
        targets["mixed"] = given
        load_index(given)
    missing = [kind for kind, path in targets.items() if not (path / STORE_FILE).is_file()]
    if missing and layers is not None:
        source = _cropped(source, folder / f"{stem}{_CROPPED}", layers)
    if missing:
        _make({kind: targets[kind] for kind in missing}, source, folder, mixed)
    if source.name.endswith(_CROPPED) and not any(folder.glob("*.partial")):
        shutil.rmtree(source)  # its bytes are in the others
    return {kind: load_index(path) for kind, path in targets.items()}


def _make(
    targets: dict[str, Path], source: Path, folder: Path, mixed: Callable[[Path, Path], None]
) -> None:
    from ..quant.convert import convert
    from ..quant.disk import need_room
    from ..quant.options import ConvertOptions
    from ..quant.plan import plan_conversion

    options = {
        "16": ConvertOptions(bits=16),
        "8": ConvertOptions(bits=8, group_size="channel"),
        "4": ConvertOptions(bits=4, group_size="channel"),
    }
    needed = sum(
        plan_conversion(source, options.get(kind, options["4"])).output_bytes for kind in targets
    )
    step = "name another folder with --work, or fewer layers with --replay-layers"
    needed -= sum(_written_bytes(target) for target in targets.values())
    need_room(folder, needed, f"what is missing of {len(targets)} stores", step)
    for kind, target in targets.items():
        note(f"making {target.name}: {ABOUT[kind]}")
        if kind == "mixed":
            mixed(source, target)
        else:
            convert(source, target, options[kind])


def _written_bytes(target: Path) -> int:
    """What an interrupted conversion has left to go on with."""
    from ..quant.journal import partial_path

    files = (partial_path(target) / name for name in (EXPERTS_FILE, TRUNK_FILE))
    return sum(file.stat().st_size for file in files if file.exists())


def _cropped(source: Path, target: Path, layers: int) -> Path:
    from ..quant.crop import crop_store

    if not (target / STORE_FILE).is_file():
        note(f"making {target.name}: the first {layers} layers")
        crop_store(source, target, layers)
    return target


def work_folder(args: argparse.Namespace, source: Path) -> Path:
    """--work, or a folder beside the model."""
    if args.work is not None:
        return Path(args.work)
    return source.resolve().parent / f"{source.name.removesuffix('.edgemoe')}.ablation"
