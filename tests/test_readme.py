"""The README's tree names every module, and the folders and links that it names are there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("edgemoe", "edgemoe/models", "edgemoe/cli", "runtime", "quant")


def tree() -> dict[str, set[str]]:
    """Folder -> the words that the README says about it."""
    block = README.split("## Where things are")[1].split("```")[1]
    words: dict[str, set[str]] = {}
    top = folder = ""
    for line in block.splitlines()[1:]:
        first = re.match(r"( *)([a-z_]+)/ ", line)
        if first:
            top = first[2] if not first[1] else top
            folder = first[2] if not first[1] else f"{top}/{first[2]}"
        elif line.startswith("  ") and not line.startswith("   "):
            folder = top
        words.setdefault(folder, set()).update(re.findall(r"\w+", line))
    return words


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_tree_names_every_module(folder: str) -> None:
    modules = {path.stem for path in (ROOT / folder).glob("[!_]*.py")}
    assert not modules - tree()[folder]


def test_the_tree_names_every_folder() -> None:
    assert all((ROOT / folder).is_dir() for folder in tree())
    assert {*FOLDERS, "tests", "tools", "docs", "runtime/csrc", "edgemoe/demo"} <= set(tree())


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
