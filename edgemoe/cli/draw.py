"""Every picture that a command draws; matplotlib is an extra."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from ..runtime.amounts import format_bytes
from ..runtime.errors import UsageError
from ..runtime.outputs import need_place, replacing

ENDINGS = (".svg", ".png", ".pdf")
_LEAST_KL = 1e-5  # what is drawn for less, on a logarithmic axis


def need_matplotlib(path: str) -> None:
    """Raises UsageError where there is nothing to draw with, or nowhere to write to."""
    if find_spec("matplotlib") is None:
        raise UsageError(
            "--plot needs matplotlib",
            "it is not installed",
            'python -m pip install "edgemoe[plot]", or use --json',
        )
    if Path(path).suffix not in ENDINGS:
        raise UsageError(
            f"`{path}` is no picture", f"expected a name ending with {', '.join(ENDINGS)}"
        )
    need_place(path)


@contextmanager
def _figure(path: str, rows: int, columns: int, width: float, height: float) -> Iterator[Any]:
    """A figure and its panels [rows][columns]; written to `path` as a whole at the end."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # words stay words
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    try:
        yield figure, panels
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150)
    finally:
        pyplot.close(figure)


def replayed(documents: Sequence[dict[str, Any]], path: str) -> None:
    """Of `trace replay`: a panel for each trace, hit rate over the share of all experts."""
    with _figure(path, 1, len(documents), 5.5, 4) as (_, panels):
        for panel, document in zip(panels[0], documents, strict=True):
            budgets = document["budgets"]
            order = sorted(range(len(budgets)), key=lambda i: budgets[i]["share"])
            shares = [100 * budgets[i]["share"] for i in order]
            for name, row in document["policies"].items():
                rates = [row[i]["hit_rate"] for i in order]
                panel.plot(shares, rates, "k--" if name == "belady" else ".-", label=name)
            panel.axvline(100 * document["cycle_share"], color="grey", lw=0.8, ls=":")
            panel.set(title=document["model"], ylabel="hit rate", ylim=(0, 1))
            panel.set_xlabel("% of all experts in memory (dotted: what one token needs)")
            _ticks(panel, shares)
            panel.legend()


def compared(document: dict[str, Any], path: str) -> None:
    """Of `trace compare`: the two curves in one panel."""
    with _figure(path, 1, 1, 6.5, 4.5) as (_, panels):
        (panel,) = panels[0]
        for curve in document["curves"]:
            budgets = sorted(curve["budgets"], key=lambda each: each["share"])
            shares = [100 * each["share"] for each in budgets]
            name = f"{Path(curve['file']).stem}, {curve['policy']}"
            panel.plot(shares, [each["hit_rate"] for each in budgets], ".-", label=name)
        panel.set(xlabel="% of all experts in memory", ylabel="hit rate", ylim=(0, 1))
        _ticks(panel, shares)
        panel.legend()


def sets(document: dict[str, Any], path: str) -> None:
    """Of `bench --sets`: hits and reads over the cache, speed, and what it costs."""
    rows, whole = document["rows"], document["rows"][0]["expert_bytes"]
    with _figure(path, 2, 2, 6.5, 4.2) as (figure, panels):
        (hits, reads), (speed, price) = panels
        for row in rows:
            shares = [100 * each["bytes"] / whole for each in row["curve"]]
            style = {"ls": "--", "color": "black"} if row is rows[0] else {"ls": "-"}
            style |= {"marker": ".", "label": row["arm"]}
            hits.plot(shares, [each["hit_rate"] for each in row["curve"]], **style)
            kib = [each["bytes_per_token"] / 1024 for each in row["curve"]]
            reads.plot(shares, kib, **style)
        cached = 100 * document["expert_cache_share"]
        for panel in (hits, reads):
            panel.axvline(cached, color="grey", lw=0.8, ls=":")
            panel.set_xlabel("expert cache, % of the full model's experts")
            _ticks(panel, shares)
        hits.set(ylabel="hit rate", ylim=(0, 1.02))
        hits.legend(fontsize="small")
        reads.set(ylabel="read per token, KiB", ylim=(0, None))
        _bars_of_speed(speed, rows)
        _points_of_price(price, rows)
        cache = format_bytes(document["expert_cache_bytes"])
        figure.suptitle(f"{document['model']}, expert cache {cache} ({cached:.0f} %, dotted)")


def _bars_of_speed(panel: Any, rows: list[dict[str, Any]]) -> None:
    """Median tokens/s with the range of the rounds, labelled with what limits it."""
    from .sets_report import limiter_of, values

    speeds = [values(row, "decode_tokens_per_s") for row in rows]
    middle = [median(each) for each in speeds]
    spread = [
        [mid - min(each) for mid, each in zip(middle, speeds, strict=True)],
        [max(each) - mid for mid, each in zip(middle, speeds, strict=True)],
    ]
    places = range(len(rows))
    panel.barh(places, middle, xerr=spread, color="C0", alpha=0.7, error_kw={"lw": 1, "capsize": 3})
    panel.set_yticks(places, [row["arm"] for row in rows])
    panel.invert_yaxis()
    panel.set(
        xlabel="tokens/s, median and range of the rounds", xlim=(0, 1.25 * max(map(max, speeds)))
    )
    for place, row, each in zip(places, rows, speeds, strict=True):
        panel.text(1.02 * max(each), place, limiter_of(row), va="center", fontsize="small")


def _points_of_price(panel: Any, rows: list[dict[str, Any]]) -> None:
    """KL from the full model, in its own domain and elsewhere."""
    from .sets_report import OTHER

    changed = [row for row in rows if row["losses"]["text"]["kl"] is not None]
    for name, marker in zip(OTHER, "os", strict=True):
        if name not in rows[0]["losses"]:
            continue
        kl = [max(row["losses"][name]["kl"], _LEAST_KL) for row in changed]
        panel.plot(kl, range(len(changed)), marker, label=OTHER[name], ms=8, alpha=0.8)
    panel.set_yticks(range(len(changed)), [row["arm"] for row in changed])
    panel.margins(y=0.2)
    panel.invert_yaxis()
    panel.grid(axis="y", lw=0.5)
    panel.set(xlabel="KL from the full model, nats a token", xscale="log")
    panel.legend(fontsize="small")


def _ticks(panel: Any, shares: Sequence[float]) -> None:
    """A logarithmic axis with the sizes themselves on it."""
    panel.set_xscale("log")
    panel.set_xticks(shares, [f"{share:.3g}" for share in shares], fontsize="small")
    panel.minorticks_off()
