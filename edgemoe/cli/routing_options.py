"""Options that change the routes of a token."""

import argparse
from typing import Any


def add_routing_options(parser: Any) -> None:
    """What changes the routes of a token; docs/routing.md."""
    group = parser.add_argument_group("routing (each of these changes the output)")
    group.add_argument(
        "--active-experts", type=int, metavar="N", help="of a token and layer, up to top-k"
    )
    group.add_argument(
        "--router-top-p",
        type=float,
        metavar="X",
        help="no more experts of a token than hold this share of the router's softmax",
    )
    group.add_argument(
        "--tune", metavar="WHAT", help="LAYER:EXPERT=off,LAYER:EXPERT=GAIN, or a file that says so"
    )
    group.add_argument(
        "--compressed-experts",
        metavar="FILE",
        help="thetas: half of top-k, or --active-experts, are computed, the others scale the input",
    )
    group.add_argument(
        "--drop-cold",
        type=float,
        metavar="X",
        help="leave out an expert that is not in memory and has less than this share of a token",
    )
    group.add_argument(
        "--max-dropped", type=float, metavar="X", help="share of all experts (default: 0.25)"
    )


_FIELDS = {  # option -> field of `Routing`
    "active_experts": "active_experts",
    "router_top_p": "top_p",
    "tune": "tune",
    "compressed_experts": "compressed",
    "drop_cold": "drop_cold",
    "max_dropped": "max_dropped",
}


def routing_argument(args: argparse.Namespace) -> dict[str, Any]:
    """`routing` of `Engine.from_pretrained` where some option asks for it."""
    values = {field: getattr(args, name, None) for name, field in _FIELDS.items()}
    if all(value is None for value in values.values()):
        return {}
    from ..routing import Routing

    return {"routing": Routing(**values)}
