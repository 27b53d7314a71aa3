"""The arms of `bench --sets`: the full model, sets by mode, other routes, other stores of it."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import UsageError
from . import options
from .routing_options import routing_argument

if TYPE_CHECKING:
    from ..active_set import ActiveSet
    from ..routing import Routing
    from ..runtime.index import StoreIndex

FULL = "full"
USUAL_MODES = ("soft", "hard")


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run the model. `active`: a set of the store it belongs to; None: nothing."""

    name: str
    index: "StoreIndex"
    active: "ActiveSet | None" = None
    options: dict[str, Any] = field(default_factory=dict)  # of Engine.from_pretrained

    @property
    def path(self) -> Path:
        return self.index.path

    @property
    def kept(self) -> "dict[int, tuple[int, ...]] | None":
        """The full model's experts that stay, by layer; None: all, or nobody knows."""
        if self.active is not None:
            return dict(self.active.expert_set.kept)
        return self.index.kept or None

    @property
    def num_experts(self) -> int:
        """Experts that may be read."""
        if self.active is not None and self.active.mode == "hard":
            return self.active.expert_set.num_kept
        return len(self.index.records)

    @property
    def expert_bytes(self) -> int:
        """Bytes of the experts that may be read."""
        if self.active is not None and self.active.mode == "hard":
            pairs = self.active.expert_set.pairs
            return sum(self.index.records[pair].num_bytes for pair in pairs)
        return self.index.expert_bytes

    @property
    def routing(self) -> "Routing | None":
        """What else changes its routes."""
        return self.options.get("routing")

    @property
    def is_lossless(self) -> bool:
        """Whether its output is to be the full model's, bit for bit."""
        return self.name == FULL or (self.active is not None and not self.active.changes_output)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `--sets` alone has."""
    group = parser.add_argument_group("pruned sets", "the report of docs/sets.md")
    group.add_argument(
        "--sets",
        type=options.word_list,
        metavar="LIST",
        help="the full model against sets of the store: NAME (soft and hard), NAME:hard, "
        "NAME:soft:0.2, NAME:exact",
    )
    group.add_argument(
        "--with",
        dest="others",
        action="append",
        metavar="STORE",
        help="and against another store of the model, such as a compacted or merged one; "
        "repeatable",
    )
    group.add_argument(
        "--other-text", metavar="FILE", help="text of another domain than --text, for its price"
    )
    group.add_argument(
        "--questions",
        metavar="FILE",
        help="conversations with the answers that are expected, as JSON lines",
    )
    group.add_argument(
        "--curve-tokens",
        type=options.count,
        default=1024,
        metavar="N",
        help="of --text, for the hit rates by budget (default: 1024)",
    )
    group.add_argument("--plot", metavar="FILE.png", help="or .svg, .pdf: a picture of it all")


def make_arms(path: Path, args: argparse.Namespace) -> list[Arm]:
    """The full model first. Raises UsageError, NotFoundError and FormatError for what is no arm."""
    from ..models import store_args
    from ..runtime.index import load_index

    index = load_index(path)
    arms = [Arm(FULL, index)]
    for word in args.sets or ():
        arms += _of_set(word, index, store_args(index))
    given = routing_argument(args)
    if given:
        arms.append(Arm(given["routing"].label, index, None, given))
    for other in args.others or ():
        arms.append(_of_store(Path(str(options.existing(other))), index))
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two arms are called `{name}`", "", "name each once")
    return arms


def _of_set(word: str, index: "StoreIndex", model: Any) -> list[Arm]:
    from ..active_set import find_set

    name, *rest = word.split(":")
    threshold = None
    if len(rest) > 1:
        try:
            threshold = float(rest[1])
        except ValueError:
            rest = [*rest, ""]
    if len(rest) > 2:
        raise UsageError(
            f"`{word}` is no set with a mode", "expected NAME, NAME:hard or NAME:soft:0.2"
        )
    arms = []
    for mode in rest[:1] or USUAL_MODES:
        active = find_set(index, model, name, mode, threshold)
        given = {"set": name, "set_mode": mode, "set_threshold": threshold}
        arms.append(Arm(active.label.removeprefix("set "), index, active, given))
    return arms


def _of_store(path: Path, first: "StoreIndex") -> Arm:
    """A store that the same tokens can be given to."""
    from ..models import parse_config
    from ..runtime.index import load_index

    index = load_index(path)
    vocabularies = [parse_config(each.config).vocab for each in (first, index)]
    tokenizers = [each.sha256.get("tokenizer.json") for each in (first, index)]
    if vocabularies[0] != vocabularies[1] or tokenizers[0] != tokenizers[1]:
        raise UsageError(
            f"`{path}` cannot be compared with `{first.path}`",
            "it has another vocabulary or tokenizer",
            "give stores of one model",
        )
    return Arm(path.name.removesuffix(".edgemoe"), index)
