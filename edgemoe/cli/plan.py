"""`edgemoe plan MODEL`: what a memory budget would be spent on. Reads headers, without torch."""

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..runtime.amounts import format_bytes
from ..runtime.errors import NotFoundError
from . import options
from .convert import add_format_options, format_options
from .render import note, open_output

EPILOG = """MODEL is a store, or a folder with a Hugging Face checkpoint, which is planned as the
store that edgemoe convert would make of it. Exit code 3 where the budget is below the floor.

  edgemoe plan NAME.edgemoe --memory 4GiB --context 8k
  edgemoe plan HF_DIR --memory 4GiB --bits 3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser, "a store or a checkpoint folder (default: bundled model)")
    parser.add_argument(
        "--memory", type=options.size, metavar="SIZE", help="default: what keeps every expert"
    )
    parser.add_argument("--context", type=options.count, metavar="N", help="tokens (8k is 8192)")
    parser.add_argument("--kv-bits", type=int, choices=(8, 16, 32), default=16, help="default: 16")
    options.add_set_options(parser)
    add_format_options(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    path = Path(options.model_path(args) or options.bundled_model())
    open_output()
    from ..runtime.budget import BelowFloorError

    try:
        plan = plan_of(path, args)
        if args.set is not None:
            plan = _with_set(plan, path, args)
    except BelowFloorError as error:
        if args.json:
            print(json.dumps({"fits": False, "floor_bytes": error.floor_bytes}), flush=True)
        raise
    second = _stand_ins(path)
    if args.json:
        document = asdict(plan) | {"fits": True, "num_cached_experts": plan.num_cached_experts}
        document["stand_ins"] = second
        print(json.dumps(document, indent=1))
    else:
        print("\n".join(plan.table()))
        if second is not None and "error" not in second:
            size, each = (format_bytes(second[name]) for name in ("bytes", "record_bytes"))
            print(f"with --stand-in: stand-ins of {each} ({size} on disk) share the expert cache")
    return 0


def _stand_ins(path: Path) -> dict[str, Any] | None:
    """What `inspect` says of the stand-ins of a store."""
    from ..runtime.index import STORE_FILE, load_index
    from .inspect import stand_ins_of

    return stand_ins_of(load_index(path)) if (path / STORE_FILE).is_file() else None


def plan_of(path: Path, args: argparse.Namespace) -> Any:
    """The memory plan of a store or of what a checkpoint would become."""
    from ..runtime.index import STORE_FILE, load_index

    if (path / STORE_FILE).is_file():
        return store_plan(load_index(path), args.memory, args.context, args.kv_bits)
    if not (path / "config.json").is_file():
        raise NotFoundError(
            f"`{path}` is neither a store nor a checkpoint",
            f"it has neither `{STORE_FILE}` nor `config.json`",
            "check the path",
        )
    from ..quant.plan import plan_conversion
    from ..runtime.index import TRUNK_FILE, ExpertRecord, PackedTensor, StoreIndex

    conversion = plan_conversion(path, format_options(args))
    for line in conversion.notes:
        note(f"note: {line}")
    records = {key: ExpertRecord(0, layout, (0, 0)) for key, layout in conversion.layouts.items()}
    packed = {
        item.name: PackedTensor(*item.source.shape, item.spec)
        for item in conversion.trunk
        if item.spec is not None
    }
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    # The planner reads the trunk's header: give it the header that convert would write, in front of
    # a hole of the right length.
    with tempfile.TemporaryDirectory(prefix="edgemoe-plan-") as folder:
        with open(Path(folder, TRUNK_FILE), "wb") as file:
            file.write(conversion.trunk_header)
            file.truncate(conversion.trunk_bytes)
        if (path / "tokenizer.json").is_file():  # its size is in the plan
            shutil.copy(path / "tokenizer.json", folder)
        index = StoreIndex(Path(folder), config, conversion.hidden, records, packed)
        return store_plan(index, args.memory, args.context, args.kv_bits)


def _with_set(plan: Any, path: Path, args: argparse.Namespace) -> Any:
    """The plan of a store that runs with a set; a hard one needs no memory for other experts."""
    from ..active_set import find_set, plan_with_set
    from ..models import store_args
    from ..runtime.index import load_index

    index = load_index(path)
    mode = args.set_mode or "exact"
    active = find_set(index, store_args(index), args.set, mode, args.set_threshold)
    if args.memory is None:
        enough = plan_with_set(plan, index, active).resident_budget_bytes
        plan = store_plan(index, enough, args.context, args.kv_bits)
    return plan_with_set(plan, index, active)


def store_plan(index: Any, memory: str | int | None, context: int | None, kv_bits: int) -> Any:
    """The plan that an engine would make for these options, from headers alone."""
    from ..config import EngineConfig
    from ..models import parse_config
    from ..preflight import context_of, dims_of
    from ..runtime.budget import make_plan

    config = EngineConfig.make(memory=memory, context=context, kv_bits=kv_bits)
    model = parse_config(index.config)
    length = context_of(model, config)
    return make_plan(index, dims_of(model), config.memory_bytes, length, config.kv_bits)
