"""The store of mixed widths that "+bits" and what follows it run on."""

import argparse
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np

from ..runtime.errors import EdgeMoeError
from .render import note


def mixed_store(args: argparse.Namespace) -> Callable[[Path, Path], None]:
    """Makes the store: with the plan of `convert --bits auto`; for a trace, whose weights say
    nothing, with those least used in it, which take half of the picks, at 2 bits, others at 4."""
    if args.replay is not None:
        return lambda source, out: _by_usage(source, out, args)
    return lambda source, out: _by_loss(source, out, args)


def _by_loss(source: Path, out: Path, args: argparse.Namespace) -> None:
    from . import main

    words = ["convert", str(source), "--out", str(out), "--bits", "auto"]
    with redirect_stdout(sys.stderr):  # the plan, of which the answer is not made
        code = main([*words, "--max-loss", args.max_loss])
    if code:
        raise EdgeMoeError("the store of mixed widths was not made", f"convert gave {code}")


def _by_usage(source: Path, out: Path, args: argparse.Namespace) -> None:
    from ..quant.bitplan import BitPlan
    from ..quant.convert import convert
    from ..quant.options import ConvertOptions, ExpertSpec
    from ..runtime.index import load_index
    from .replay import fit

    index = load_index(source)
    routes = fit(args.replay, index, args.replay_layers).decoded
    low, high = ExpertSpec(2), ExpertSpec(4)
    specs = {}
    for place, (layer, num_experts) in enumerate(index.layer_to_num_experts.items()):
        counts = np.bincount(routes.ids[:, place].reshape(-1), minlength=num_experts)
        order = np.argsort(counts, kind="stable")
        is_low = np.cumsum(counts[order]) <= counts.sum() / 2
        for expert, seldom in zip(order.tolist(), is_low.tolist(), strict=True):
            specs[layer, expert] = low if seldom else high
    num_low = sum(spec is low for spec in specs.values())
    note(f"{num_low} of {len(specs)} experts, the least used, at 2 bits, the others at 4")
    convert(source, out, ConvertOptions(plan=BitPlan("half of the picks", specs)))
