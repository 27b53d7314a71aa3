"""The records of a store by key: flat tables, so that a step looks things up by number. Floor 0."""

from collections.abc import Mapping

from .errors import RecordError
from .index import ExpertRecord
from .io import failure_text


class RecordTable:
    """Keys count the records in (layer, expert) order; places count the MoE layers.

    With stand-ins (stand_ins.py) those of a layer follow its experts, each E behind its own.
    """

    def __init__(self, records: Mapping[tuple[int, int], ExpertRecord]) -> None:
        ordered = sorted(records.items())
        self.names = [name for name, _ in ordered]  # (layer, expert) by key
        self.own_keys = [key for key, (_, record) in enumerate(ordered) if not record.file]
        self.layouts = [record.layout for _, record in ordered]
        self.num_bytes = [record.num_bytes for _, record in ordered]
        self.first_key: dict[int, int] = {}
        self.num_experts: dict[int, int] = {}
        self.first_stand_in: dict[int, int] = {}  # empty: there are none
        for key, ((layer, _), record) in enumerate(ordered):
            if record.file:
                self.first_stand_in.setdefault(layer, key)
                continue
            self.first_key.setdefault(layer, key)
            self.num_experts[layer] = self.num_experts.get(layer, 0) + 1
        self.place_of_layer = {layer: place for place, layer in enumerate(self.first_key)}
        self.place_of_key = [self.place_of_layer[layer] for layer, _ in self.names]
        self.width = {layer: self.layouts[key].width for layer, key in self.first_key.items()}
        self.max_row_floats = max((layout.row_floats for layout in self.layouts), default=0)

    def __len__(self) -> int:
        return len(self.names)

    def stand_in_step(self, layer: int) -> int:
        """How far the stand-in of a record lies behind it, in keys."""
        return self.first_stand_in[layer] - self.first_key[layer]

    def failure(self, key: int, status: int) -> RecordError:
        """The error for a read of record `key` that ended with this negative status."""
        layer, expert = self.names[key]
        text, hint = failure_text(status), "edgemoe verify lists every damaged record"
        if expert >= self.num_experts[layer]:
            expert -= self.num_experts[layer]
            text = f"its stand-in: {text}"
        return RecordError(layer, expert, text, hint)
