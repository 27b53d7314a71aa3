"""Pictures drawn in a process of their own: matplotlib would weigh on tests of memory."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """import json, sys
from edgemoe.cli import draw
for kind, document, path in json.load(sys.stdin):
    draw.need_matplotlib(path)
    getattr(draw, kind)(document, path)
"""


def drawn(folder: Path, **documents: Any) -> dict[str, str]:
    """The text of an SVG of every document, by the name of what draws it; each is drawn as PNG,
    too. Skips by name where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    orders = [
        (kind, document, str(folder / f"{kind}.{ending}"))
        for kind, document in documents.items()
        for ending in ("svg", "png")
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(orders),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        Path(path).name for _, _, path in orders
    )
    for kind in documents:
        assert (folder / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    texts = {kind: (folder / f"{kind}.svg").read_text(encoding="utf-8") for kind in documents}
    assert all(text.startswith("<?xml") for text in texts.values())
    return texts
