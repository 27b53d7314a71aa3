"""A bit plan: which expert is stored how. A plain object, printed, saved and used again. No torch.

{"format": "edgemoe-bit-plan", "version": 1, "name": "fast",
 "specs": [{"bits": 2, "group_size": null, "mode": "sym", "quantizer": "calibrated"}, ...],
 "experts": {"0": [1, 1, 0, ...], ...},      per layer: the spec of each expert, by number
 "found": {...}}                             how it was found: targets, losses, evaluations
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..runtime.errors import FormatError, NotFoundError, UsageError
from ..runtime.outputs import write_json
from .options import ExpertSpec

NAMED = ("experts-int8", "moqe")
_FORMAT = "edgemoe-bit-plan"
Key = tuple[int, int]  # (layer, expert)


@dataclass(frozen=True)
class BitPlan:
    """A spec for every expert of a model, and how it was found (JSON values)."""

    name: str
    specs: Mapping[Key, ExpertSpec]
    found: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        kinds = sorted(set(self.specs.values()), key=_order)
        layers: dict[str, list[int]] = {}
        for (layer, _), spec in sorted(self.specs.items()):
            layers.setdefault(str(layer), []).append(kinds.index(spec))
        return {
            "format": _FORMAT,
            "version": 1,
            "name": self.name,
            "specs": [asdict(spec) for spec in kinds],
            "experts": layers,
            "found": dict(self.found),
        }

    @classmethod
    def from_json(cls, document: Any, where: str = "the plan") -> "BitPlan":
        """Raises FormatError for what is no plan, UsageError for a spec that cannot be."""
        try:
            if document["format"] != _FORMAT or document["version"] != 1:
                raise ValueError(f"it is no {_FORMAT} of version 1")
            kinds = [ExpertSpec(**spec) for spec in document["specs"]]
            specs = {
                (int(layer), expert): kinds[number]
                for layer, numbers in document["experts"].items()
                for expert, number in enumerate(numbers)
            }
            if any(number < 0 for numbers in document["experts"].values() for number in numbers):
                raise ValueError("negative number of a spec")
            return cls(str(document["name"]), specs, dict(document.get("found", {})))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise FormatError(
                f"{where} is no bit plan", str(error), "edgemoe convert --save-plan writes one"
            ) from error

    def save(self, path: str | Path) -> None:
        """Write it as JSON: to a temporary name, then renamed."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> "BitPlan":
        """Raises NotFoundError, and what `from_json` raises."""
        path = Path(path)
        if not path.is_file():
            raise NotFoundError(
                f"no plan at `{path}`",
                f"expected a file, or one of {', '.join(NAMED)}",
                "edgemoe convert --bits auto --save-plan FILE makes one",
            )
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise FormatError(f"`{path}` does not parse", str(error)) from error
        return cls.from_json(document, f"`{path}`")

    def check_covers(self, keys: Iterable[Key]) -> None:
        """Raise UsageError unless the plan is for exactly these experts."""
        wanted = set(keys)
        if self.specs.keys() == wanted:
            return
        missing, extra = sorted(wanted - self.specs.keys()), sorted(self.specs.keys() - wanted)
        why = f"it has no expert {missing[0]}" if missing else f"it names expert {extra[0]}"
        raise UsageError(
            "this plan is for another model", f"{why} of {len(wanted)}", "make a plan for this one"
        )

    def lines(self) -> list[str]:
        """For people: how many experts have which width, in all and by layer, and how found."""
        counts = Counter(spec.label for spec in self.specs.values())
        labels = sorted(counts)
        total = ", ".join(f"{counts[label]} at {label} bits" for label in labels)
        lines = [f"plan `{self.name}`: {total}"]
        layers = sorted({layer for layer, _ in self.specs})
        if len(labels) > 1:
            width = max(len(label) for label in (*labels, "layer"))
            head = "  ".join(label.rjust(max(width, 4)) for label in labels)
            lines.append(f"  layer  {head}")
            for layer in layers:
                row = Counter(spec.label for key, spec in self.specs.items() if key[0] == layer)
                cells = "  ".join(str(row[label]).rjust(max(width, 4)) for label in labels)
                lines.append(f"  {layer:>5}  {cells}")
        for name, value in self.found.items():
            if isinstance(value, str | int | float):
                shown = f"{value:.4g}" if isinstance(value, float) else value
                lines.append(f"  {name.replace('_', ' ')}: {shown}")
        return lines


def uniform(name: str, keys: Iterable[Key], spec: ExpertSpec) -> BitPlan:
    """Every expert alike."""
    return BitPlan(name, dict.fromkeys(keys, spec))


def named(name: str, keys: Iterable[Key], bits: int | None = None) -> BitPlan:
    """`experts-int8` (Jamba-1.5, 2408.12570): one int8 scale a row, max|w| / 127, no calibration.
    `moqe` (2310.02410): experts only, symmetric absmax a row, 2, 3 or 4 bits (default 4)."""
    if name == "experts-int8":
        if bits not in (None, 8):
            raise UsageError(f"`--plan experts-int8` has 8 bits, got --bits {bits}")
        return uniform(name, keys, ExpertSpec(8, quantizer="absmax"))
    if name == "moqe":
        if bits not in (None, 2, 3, 4):
            raise UsageError(f"`--plan moqe` has 2, 3 or 4 bits, got --bits {bits}")
        return uniform(name, keys, ExpertSpec(bits or 4, quantizer="absmax"))
    raise UsageError(f"no plan is called `{name}`", f"known are {', '.join(NAMED)}")


def _order(spec: ExpertSpec) -> tuple[Any, ...]:
    return spec.bits, str(spec.group_size), spec.mode, spec.quantizer, spec.down or ""
