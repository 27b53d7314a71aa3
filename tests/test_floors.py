"""The house plan: every module stands on one floor and imports only its own floor or lower ones."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    0: """runtime: __init__ amounts budget checksum control_group core core_cache
        core_decoder errors extents
        files footprint format headers index io outputs buffers
        kernels memory packing process python_reader read_tasks records reference slots
        sets throttle trace
        waves
        profile profile_parts profile_sums transitions governor pressure""",
    1: """runtime: cache cache_base holds executor native_cache policy store
        policy_forecast policy_guard policy_lowest policy_memory policy_s3fifo replay
        observe predictors prefetch cold stand_ins""",
    2: """edgemoe: kv_cache models""",
    3: """edgemoe: active_set chat_template config control_tokens engine interrupts meter preflight
        loaded_model opening kv_lending recorder report routing routing_files sampling session
        stats stop_strings template_worker tokenizer tokenizer_files last_run warm_start
        governed_cache lent_memory""",
    4: """quant: *""",
    5: """edgemoe: __init__ __main__ cli""",
}
SOURCE_LIMIT = 300  # lines


def modules() -> list[Path]:
    folders = (ROOT / name for name in ("edgemoe", "runtime", "quant"))
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def dotted(path: Path) -> str:
    """Name below `edgemoe`: runtime/cache.py -> runtime.cache, edgemoe/cli/run.py -> cli.run."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "edgemoe":
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def floor_of(name: str) -> int | None:
    """Floor of a dotted name, by its folder and first module."""
    folder = name.split(".")[0] if name.split(".")[0] in ("runtime", "quant") else "edgemoe"
    module = name.removeprefix(folder + ".").split(".")[0] if name != folder else "__init__"
    for floor, row in FLOORS.items():
        where, names = row.split(": ")
        if where == folder and (names == "*" or module in names.split()):
            return floor
    return None


def imported(source: str, name: str, is_package: bool) -> set[str]:
    """Dotted names below `edgemoe` that a module imports, at any depth of its code."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("edgemoe.")]
            found |= {name.removeprefix("edgemoe.") for name in names}
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".") if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + module
            elif module[0] == "edgemoe":
                base = module[1:]
            else:
                continue
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def climbing(source: str, name: str, is_package: bool = False) -> set[str]:
    """Imports that stand on a higher floor than the module itself."""
    own = floor_of(name)
    return {
        found for found in imported(source, name, is_package) if (floor_of(found) or 0) > (own or 0)
    }


def test_every_module_has_a_floor() -> None:
    homeless = [dotted(path) for path in modules() if floor_of(dotted(path)) is None]
    assert not homeless


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_only_go_down(path: Path) -> None:
    name = dotted(path)
    if name == "__init__":
        return  # the public names of the package: imported lazily, by string
    assert not climbing(path.read_text(encoding="utf-8"), name, path.name == "__init__.py")


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("runtime.format", "from ..engine import Engine"),
        ("runtime.cache", "def late():\n    from ..models.args import ModelArgs"),
        ("models.olmoe", "import edgemoe.quant.convert"),
        ("engine", "from .cli import main"),
    ],
)
def test_an_import_that_climbs_is_seen(name: str, source: str) -> None:
    assert climbing(source, name)


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= SOURCE_LIMIT, f"{path.relative_to(ROOT)} has {lines} lines"


@pytest.mark.parametrize("name", ["edgemoe", "runtime", "quant", "tools"])
def test_no_utils(name: str) -> None:
    assert not [path for path in (ROOT / name).rglob("util*.py")]
