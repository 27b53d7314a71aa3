"""Pruned sets: which experts of a store a task keeps. Floor 0, without torch or numpy.

A set is a file, `STORE/sets/NAME.json`, beside weights that it does not change:

- `format` "edgemoe-set", `version` 1, `name`
- `fingerprint` of the checkpoint (its routers), `tokenizer_sha256` of the store it was made with
- `method` and its `parameters`, for people
- `layers`: by number of the MoE layer in the model, every one of them: `num_experts` of the full
  layer; `kept`, the ids of the experts that stay, ascending, as many as the layer needs (layers may
  differ); optionally `pick_share`, the share of the layer's picks that each of them had

`resolve` also mixes sets: `a+b` keeps what one of them keeps, `a&b` what both keep.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import FormatError, NotFoundError, UsageError
from .outputs import write_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FORMAT = "edgemoe-set"
VERSION = 1
SET_FOLDER = "sets"
SET_MODES = ("exact", "soft", "hard")  # what they mean: edgemoe/active_set.py
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class SetOwner:
    """What a set must go together with: a store, in the numbers that sets are about."""

    fingerprint: str
    tokenizer_sha256: str | None
    num_experts: Mapping[int, int]  # by MoE layer
    top_k: int


@dataclass(frozen=True, slots=True)
class ExpertSet:
    """The kept experts by MoE layer, ids ascending, and where they come from."""

    name: str
    kept: Mapping[int, tuple[int, ...]]
    num_experts: Mapping[int, int]
    fingerprint: str
    tokenizer_sha256: str | None = None
    method: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    pick_share: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    @property
    def num_kept(self) -> int:
        return sum(map(len, self.kept.values()))

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """The kept (layer, expert), ascending."""
        return [(layer, expert) for layer, ids in sorted(self.kept.items()) for expert in ids]

    def shares_of(self, layer: int) -> dict[int, float]:
        """Share of the layer's picks by kept expert; 0 where it was not noted."""
        ids = self.kept[layer]
        return dict(zip(ids, self.pick_share.get(layer) or (0.0,) * len(ids), strict=True))

    def masks(self) -> "dict[int, NDArray[np.uint8]]":
        """u8 [E] by layer: 1 is kept."""
        import numpy as np

        masks = {}
        for layer, ids in self.kept.items():
            masks[layer] = np.zeros(self.num_experts[layer], dtype=np.uint8)
            masks[layer][list(ids)] = 1
        return masks

    def by_use(self) -> list[tuple[int, int]]:
        """The kept (layer, expert), those with most picks first, of every layer as many."""
        ranked = []
        for layer, ids in sorted(self.kept.items()):
            shares = self.shares_of(layer)
            order = sorted(ids, key=lambda expert, shares=shares: (-shares[expert], expert))
            ranked += [(rank, layer, expert) for rank, expert in enumerate(order)]
        return [(layer, expert) for _, layer, expert in sorted(ranked)]

    def check(self, owner: SetOwner) -> None:
        """Raises UsageError where the set cannot be used with this store."""
        name = f"set `{self.name}`"
        if self.fingerprint != owner.fingerprint:
            raise UsageError(
                f"{name} belongs to another checkpoint",
                f"its fingerprint is {self.fingerprint or 'missing'}, "
                f"that of this store {owner.fingerprint}",
                "make one for this store: edgemoe prune STORE",
            )
        if self.tokenizer_sha256 != owner.tokenizer_sha256:
            raise UsageError(
                f"{name} was made with another tokenizer",
                f"sha256 {self.tokenizer_sha256}, that of this store {owner.tokenizer_sha256}",
                "make one for this store: edgemoe prune STORE",
            )
        if not self.num_kept:
            raise UsageError(f"{name} is empty", "it keeps no expert")
        if set(self.kept) != set(owner.num_experts):
            raise UsageError(
                f"{name} is not about the layers of this store",
                f"expected layers {sorted(owner.num_experts)}, got {sorted(self.kept)}",
            )
        for layer, ids in sorted(self.kept.items()):
            num_experts = owner.num_experts[layer]
            unknown = [expert for expert in ids if not 0 <= expert < num_experts]
            if unknown or self.num_experts.get(layer) != num_experts:
                got = (
                    f"expert {unknown[0]}" if unknown else f"{self.num_experts.get(layer)} experts"
                )
                raise UsageError(
                    f"{name}: layer {layer} has no such experts",
                    f"expected {num_experts}, numbered from 0, got {got}",
                )
            if list(ids) != sorted(set(ids)):
                raise UsageError(
                    f"{name}: the ids of layer {layer} do not ascend", f"got {list(ids)[:8]}"
                )
            if len(ids) < owner.top_k:
                raise UsageError(
                    f"{name} leaves too few experts in layer {layer}",
                    f"{len(ids)}, and every token needs {owner.top_k}",
                    "keep more",
                )


def check_name(name: str) -> str:
    """`name`, where it can be that of a set; raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"`{name}` cannot be the name of a set",
            "expected letters, digits, dots, dashes, underscores",
        )
    return name


def check_threshold(threshold: float, mode: str) -> float:
    """`threshold`, where it can be that of a set in this mode; raises UsageError."""
    if mode != "soft":
        raise UsageError(
            "a threshold stands for soft sets only", f"the mode is {mode}", "--set-mode soft"
        )
    if isinstance(threshold, bool) or not isinstance(threshold, int | float):
        raise UsageError("bad option `set_threshold`", f"expected a number, got {threshold!r}")
    if not 0 <= threshold <= 1:
        raise UsageError("bad option `set_threshold`", f"expected 0 to 1, got {threshold:g}")
    return float(threshold)


def set_path(store: str | Path, name: str) -> Path:
    """Where a set of this name lies; raises UsageError for what is no name."""
    return Path(store) / SET_FOLDER / f"{check_name(name)}.json"


def set_names(store: str | Path) -> list[str]:
    """The names of a store's sets, sorted."""
    return sorted(path.stem for path in (Path(store) / SET_FOLDER).glob("*.json"))


def save_set(store: str | Path, expert_set: ExpertSet) -> Path:
    """Write `STORE/sets/NAME.json`: to a temporary name, then renamed. Returns its path."""
    target = set_path(store, expert_set.name)
    layers: dict[str, dict[str, Any]] = {}
    for layer, ids in sorted(expert_set.kept.items()):
        entry = {"num_experts": expert_set.num_experts[layer], "kept": list(ids)}
        if layer in expert_set.pick_share:
            entry["pick_share"] = [round(share, 9) for share in expert_set.pick_share[layer]]
        layers[str(layer)] = entry
    document = {
        "format": FORMAT,
        "version": VERSION,
        "name": expert_set.name,
        "fingerprint": expert_set.fingerprint,
        "tokenizer_sha256": expert_set.tokenizer_sha256,
        "method": expert_set.method,
        "parameters": dict(expert_set.parameters),
        "layers": layers,
    }
    target.parent.mkdir(exist_ok=True)
    write_json(target, document)
    return target


def load_set(store: str | Path, name: str) -> ExpertSet:
    """Read one set. Raises NotFoundError, or FormatError for what is no set."""
    path = set_path(store, name)
    if not path.is_file():
        names = set_names(store)
        raise NotFoundError(
            f"no set `{name}` in `{store}`",
            f"there are: {', '.join(names)}" if names else "it has no sets",
            "edgemoe prune makes one",
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError(f"format `{document['format']}`")
        version = int(document["version"])
        if version > VERSION:
            raise FormatError(
                f"`{path}` has set version {version}",
                f"this edgemoe reads up to version {VERSION}",
                "install a newer edgemoe, or make the set again",
            )
        return _parse(name, document)
    except OSError as error:
        raise FormatError(f"`{path}` cannot be read", str(error.strerror)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"`{path}` is no pruned set", f"{type(error).__name__}: {error}", "make it again"
        ) from error


def _parse(name: str, document: Mapping[str, Any]) -> ExpertSet:
    kept, num_experts, pick_share = {}, {}, {}
    for key, entry in document["layers"].items():
        layer = int(key)
        kept[layer] = tuple(_integer(expert) for expert in entry["kept"])
        num_experts[layer] = _integer(entry["num_experts"])
        if "pick_share" in entry:
            pick_share[layer] = tuple(float(share) for share in entry["pick_share"])
            if len(pick_share[layer]) != len(kept[layer]):
                raise ValueError(f"layer {layer}: `pick_share` and `kept` differ in length")
    tokenizer = document["tokenizer_sha256"]
    return ExpertSet(
        name,
        kept,
        num_experts,
        str(document["fingerprint"]),
        None if tokenizer is None else str(tokenizer),
        str(document.get("method", "")),
        dict(document.get("parameters", {})),
        pick_share,
    )


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"expected a whole number, got {value!r}")
    return value


def resolve(store: str | Path, expression: str, owner: SetOwner) -> ExpertSet:
    """The set that `NAME`, `A+B` (union) or `A&B` (intersection) means, from left to right.

    Raises what `load_set` and `ExpertSet.check` raise, for each of the sets and for the mixture.
    """
    words = re.split(r"([+&])", expression.replace(" ", ""))
    result = load_set(store, words[0])
    result.check(owner)
    for operator, name in zip(words[1::2], words[2::2], strict=True):
        other = load_set(store, name)
        other.check(owner)
        result = mix(result, other, operator)
        result.check(owner)
    return result


def mix(first: ExpertSet, second: ExpertSet, operator: str) -> ExpertSet:
    """The union (`+`) or intersection (`&`) of two sets of the same store, layer by layer."""
    kept, pick_share = {}, {}
    for layer, ids in first.kept.items():
        ours, theirs = set(ids), set(second.kept[layer])
        kept[layer] = tuple(sorted(ours | theirs if operator == "+" else ours & theirs))
        shares: dict[int, float] = {}
        for each in (first, second):
            for expert, share in zip(
                each.kept[layer], each.pick_share.get(layer, ()), strict=False
            ):
                shares[expert] = max(share, shares.get(expert, 0.0))
        pick_share[layer] = tuple(shares.get(expert, 0.0) for expert in kept[layer])
    return replace(
        first,
        name=f"{first.name}{operator}{second.name}",
        kept=kept,
        pick_share=pick_share,
        method="mixed",
        parameters={"sets": [first.name, second.name], "operator": operator},
    )
