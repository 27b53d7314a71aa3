"""The records of a store by key: flat tables, so that a step looks things up by number. Floor 0."""

from collections.abc import Mapping

from .errors import RecordError
from .index import ExpertRecord
from .io import failure_text


class RecordTable:
    """Keys count the records in (layer, expert) order; places count the MoE layers."""

    def __init__(self, records: Mapping[tuple[int, int], ExpertRecord]) -> None:
        ordered = sorted(records.items())
        self.names = [name for name, _ in ordered]  # (layer, expert) by key
        self.layouts = [record.layout for _, record in ordered]
        self.num_bytes = [record.num_bytes for _, record in ordered]
        self.first_key: dict[int, int] = {}
        self.num_experts: dict[int, int] = {}
        for key, (layer, _) in enumerate(self.names):
            self.first_key.setdefault(layer, key)
            self.num_experts[layer] = self.num_experts.get(layer, 0) + 1
        self.place_of_layer = {layer: place for place, layer in enumerate(self.first_key)}
        self.place_of_key = [self.place_of_layer[layer] for layer, _ in self.names]
        self.width = {layer: self.layouts[key].width for layer, key in self.first_key.items()}

    def __len__(self) -> int:
        return len(self.names)

    def failure(self, key: int, status: int) -> RecordError:
        """The error for a read of record `key` that ended with this negative status."""
        layer, expert = self.names[key]
        return RecordError(
            layer, expert, failure_text(status), "edgemoe verify lists every damaged record"
        )
