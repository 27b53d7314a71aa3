"""The house plan: every module stands on one floor and imports only its own floor or lower ones."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    0: """runtime: __init__ budget core errors extents format index io kernels reference""",
    1: """runtime: cache executor policy store""",
    2: """edgemoe: kv_cache models""",
    3: """edgemoe: chat_template config engine sampling session stats template_worker tokenizer""",
    4: """quant: *""",
    5: """edgemoe: __init__ __main__ cli""",
}
SOURCE_LIMIT = 300  # lines; a file above it needs a reason, given here
LONGER: dict[str, str] = {}


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


def imported(path: Path) -> set[str]:
    """Dotted names below `edgemoe` that a file imports, at any depth of its code."""
    here = dotted(path).split(".")
    package = here if path.name == "__init__.py" else here[:-1]
    if path == ROOT / "edgemoe" / "__init__.py":
        package = []
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {
                name.removeprefix("edgemoe.") for name in names if name.startswith("edgemoe.")
            }
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif (node.module or "").split(".")[0] == "edgemoe":
                base = []
            else:
                continue
            module = (node.module or "").split(".") if node.module else []
            base = base + (module if node.level else module[1:])
            for alias in node.names:
                inner = [*base, alias.name]
                is_module = (
                    (ROOT / Path(*inner)).with_suffix(".py").is_file()
                    or (ROOT / "edgemoe" / Path(*inner)).with_suffix(".py").is_file()
                    or (ROOT / "edgemoe" / Path(*inner)).is_dir()
                    or (ROOT / Path(*inner)).is_dir()
                )
                found.add(".".join(inner if is_module or not base else base))
    return {name for name in found if name}


def test_every_module_has_a_floor() -> None:
    homeless = [dotted(path) for path in modules() if floor_of(dotted(path)) is None]
    assert not homeless


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_only_go_down(path: Path) -> None:
    own = floor_of(dotted(path))
    climbing = {name: floor_of(name) for name in imported(path) if (floor_of(name) or 0) > own}
    assert not climbing, f"{dotted(path)} stands on floor {own}"


def test_the_rule_sees_an_import_that_climbs(tmp_path: Path) -> None:
    """The guard itself: a floor-0 file that imports the engine is found."""
    source = ROOT / "runtime" / "format.py"
    climbing = tmp_path / "format.py"
    climbing.write_text(source.read_text() + "\nfrom ..engine import Engine\n")
    tree = ast.parse(climbing.read_text())
    node = tree.body[-1]
    assert isinstance(node, ast.ImportFrom) and node.level == 2
    assert floor_of("engine") == 3 and floor_of("runtime.format") == 0


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    name = str(path.relative_to(ROOT))
    assert lines <= SOURCE_LIMIT or name in LONGER, f"{name} has {lines} lines"


@pytest.mark.parametrize("name", ["edgemoe", "runtime", "quant", "tools"])
def test_no_utils(name: str) -> None:
    assert not [path for path in (ROOT / name).rglob("util*.py")]
