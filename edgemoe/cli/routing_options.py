"""Options that change the routes of a token."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..runtime.errors import UsageError

if TYPE_CHECKING:
    from ..routing import Routing


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
    group.add_argument(
        "--stand-in",
        type=float,
        metavar="X",
        help="an expert that is not in memory and comes when more than this share of a token has "
        "gone, most weight first, is computed from its record at fewer bits (edgemoe stand-ins)",
    )


_FIELDS = {  # option -> field of `Routing`
    "active_experts": "active_experts",
    "router_top_p": "top_p",
    "tune": "tune",
    "compressed_experts": "compressed",
    "drop_cold": "drop_cold",
    "max_dropped": "max_dropped",
    "stand_in": "stand_in",
}


def routing_argument(args: argparse.Namespace) -> dict[str, Any]:
    """`routing` of `Engine.from_pretrained` where some option asks for it."""
    values = {field: getattr(args, name, None) for name, field in _FIELDS.items()}
    if all(value is None for value in values.values()):
        return {}
    from ..routing import Routing

    return {"routing": Routing(**values)}


def routing_of(words: Sequence[str]) -> "Routing":
    """`OPTION VALUE ...`, as on the command line without its dashes."""
    from ..routing import Routing

    values: dict[str, Any] = {}
    for name, value in zip(words[::2], [*words[1::2], None], strict=False):
        field = _FIELDS.get(name.replace("-", "_"))
        if field is None or value is None:
            known = ", ".join(each.replace("_", "-") for each in _FIELDS)
            raise UsageError(f"`{name}` cannot be set so", f"expected one of {known} and a value")
        try:
            kind = {"active_experts": int, "tune": str, "compressed": str}.get(field, float)
            values[field] = kind(value)
        except ValueError:
            raise UsageError(f"`{name}`: `{value}` is no number") from None
    return Routing(**values)
