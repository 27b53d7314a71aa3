"""The hit curves of `edgemoe trace replay` as a picture; matplotlib is an extra."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..runtime.errors import UsageError


def need_matplotlib(path: str) -> None:
    """Raises UsageError where there is nothing to draw with, or nowhere to write to."""
    if find_spec("matplotlib") is None:
        raise UsageError(
            "--plot needs matplotlib",
            "it is not installed",
            'python -m pip install "edgemoe[plot]", or use --json',
        )
    if Path(path).suffix not in (".svg", ".png", ".pdf"):
        raise UsageError(f"`{path}` is no picture", "expected a name ending with .svg, .png, .pdf")
    if not Path(path).absolute().parent.is_dir():
        raise UsageError(f"`{path}` cannot be written", "its folder is not there")


def plot(documents: list[dict[str, Any]], path: str) -> None:
    """One panel for each trace: hit rate over the share of all experts, one line a policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(documents), figsize=(5.5 * len(documents), 4), squeeze=False, layout="constrained"
    )
    for panel, document in zip(panels[0], documents, strict=True):
        order = sorted(range(len(document["budgets"])), key=lambda i: _share(document, i))
        shares = [100 * _share(document, i) for i in order]
        for name, row in document["policies"].items():
            rates = [row[i]["hit_rate"] for i in order]
            panel.plot(shares, rates, "k--" if name == "belady" else ".-", label=name)
        panel.axvline(100 * document["cycle_share"], color="grey", lw=0.8, ls=":")
        panel.set(title=document["model"], xlabel="% of all experts in the pool", ylim=(0, 1))
        panel.set_ylabel("hit rate (dotted: what one token needs)")
        panel.set_xscale("log")
        panel.legend()
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    try:
        figure.savefig(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
        pyplot.close(figure)


def _share(document: dict[str, Any], number: int) -> float:
    return document["budgets"][number]["share"]
