"""Second records of the experts at fewer bits, read where the first is absent and weighs little.
Floor 1; docs/routing.md.

They lie beside the store's own in `stand-ins.safetensors`: one U8 tensor per expert under the name
of its record, laid out as in experts.safetensors; then `crc32c`, U32 [records, 2], of their
sections. The metadata names the checkpoint (`fingerprint`), the quantization (`gate_up`, `down`)
and how the file was made (`plan`).

In an engine that has them the stand-in of expert e of a layer with E experts is its record E + e.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import FormatError, NotFoundError, UsageError
from .format import PAGE_BYTES, QuantSpec, RecordLayout, record_name
from .headers import encode_header, read_header
from .index import ExpertRecord, StoreIndex

STAND_INS_FILE = "stand-ins.safetensors"
_FORMAT, _VERSION, _CRC = "edgemoe-stand-ins", 1, "crc32c"
Records = Mapping[tuple[int, int], ExpertRecord]


@dataclass(slots=True)
class StandInRule:
    """Of a token's experts, most weight first, an absent one is computed as its stand-in where the
    weights before it are more than the share `after` of all (HOBBIT, 2411.01433, T1), if that is
    smaller; the first never is. The twin of `Decoder::stand_in`. None: none is."""

    after: float | None = None
    num_used: int = 0

    def keys_of(
        self,
        keys: list[int],
        weights: NDArray[np.float32],
        addresses: Callable[[Sequence[int]], Sequence[int]],
        num_bytes: Sequence[int],
        step: int,
    ) -> list[int]:
        """The records of one token, whose `keys` [n] have routing weights [n]; the stand-in of a
        key is `step` behind it. `num_bytes`: of all records."""
        shares = weights.astype(np.float64)
        order = np.argsort(-weights, kind="stable").tolist()
        limit = float(np.float32(self.after)) * float(np.add.accumulate(shares[order])[-1])
        found, is_there, before = list(keys), addresses(keys), 0.0
        for k in order:
            is_smaller = num_bytes[keys[k] + step] < num_bytes[keys[k]]
            if before > limit and is_smaller and not is_there[k]:
                found[k] += step
                self.num_used += 1
            before += float(shares[k])
        return found


def encode_stand_ins(
    layouts: Mapping[tuple[int, int], RecordLayout], fingerprint: str, plan: Mapping[str, Any]
) -> bytes:
    """The header of the file for records of these layouts, which are in (layer, expert) order and
    of one quantization. Raises UsageError where they are not."""
    specs = {(layout.gate_up, layout.down) for layout in layouts.values()}
    if len(specs) != 1:
        raise UsageError("stand-ins have one quantization", f"{len(specs)} were asked for")
    gate_up, down = specs.pop()
    metadata = {"format": _FORMAT, "version": str(_VERSION), "fingerprint": fingerprint}
    metadata |= {"gate_up": json.dumps(gate_up.to_json()), "down": json.dumps(down.to_json())}
    tensors = [
        (record_name(*pair), "U8", [layout.num_bytes], layout.num_bytes)
        for pair, layout in layouts.items()
    ]
    tensors.append((_CRC, "U32", [len(layouts), 2], 8 * len(layouts)))
    return encode_header(tensors, metadata | {"plan": json.dumps(plan)}, PAGE_BYTES)


def read_stand_ins(index: StoreIndex, fingerprint: str) -> dict[tuple[int, int], ExpertRecord]:
    """The stand-ins of a store whose checkpoint has this fingerprint, by (layer, expert). Reads no
    weights.

    Raises NotFoundError where it has none, UsageError for those of another model, FormatError for a
    file that is damaged or has other shapes.
    """
    path = index.path / STAND_INS_FILE
    try:
        with open(path, "rb") as file:
            tensors, metadata = read_header(file, str(path))
            if metadata.get("format") != _FORMAT or metadata.get("version") != str(_VERSION):
                raise FormatError(f"`{path}` holds no stand-ins that this edgemoe reads")
            if metadata.get("fingerprint") != fingerprint:
                raise UsageError(
                    f"`{path}` has the stand-ins of another model",
                    "its fingerprint is that of another checkpoint",
                    f"make them anew: edgemoe stand-ins {index.path}",
                )
            sums = tensors.pop(_CRC, None)
            if sums is None or (sums.dtype, sums.shape) != ("U32", (len(index.records), 2)):
                raise FormatError(f"`{path}` is damaged", f"it has no `{_CRC}` of every record")
            file.seek(sums.offset)
            crcs = np.frombuffer(file.read(sums.num_bytes), dtype="<u4").reshape(-1, 2).tolist()
    except FileNotFoundError as error:
        raise NotFoundError(
            f"`{index.path}` has no stand-ins",
            f"expected `{STAND_INS_FILE}`",
            f"edgemoe stand-ins {index.path} makes them",
        ) from error
    except OSError as error:
        raise FormatError(f"`{path}` cannot be read", str(error.strerror)) from error
    try:
        specs = [QuantSpec.from_json(json.loads(metadata[name])) for name in ("gate_up", "down")]
        layouts = {
            pair: RecordLayout(*specs, record.layout.hidden, record.layout.width)
            for pair, record in sorted(index.records.items())
        }
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise FormatError(
            f"`{path}` is damaged", f"its metadata does not parse: {error}"
        ) from error
    found = {}
    for (pair, layout), (gate_up, down) in zip(layouts.items(), crcs, strict=True):
        entry = tensors.pop(record_name(*pair), None)
        if entry is None or (entry.dtype, entry.num_bytes) != ("U8", layout.num_bytes):
            raise FormatError(
                f"`{path}` does not go with the store",
                f"record `{record_name(*pair)}` is not there or has another size",
                f"make them anew: edgemoe stand-ins {index.path}",
            )
        if entry.offset % PAGE_BYTES:
            raise FormatError(f"`{path}`: a record is not on page boundaries")
        found[pair] = ExpertRecord(entry.offset, layout, (gate_up, down), file=1)
    if tensors:
        raise FormatError(
            f"`{path}` does not go with the store", f"it has {len(tensors)} more records"
        )
    return found


def with_stand_ins(records: Records, stand_ins: Records) -> dict[tuple[int, int], ExpertRecord]:
    """Both, the stand-in of expert e of a layer with E experts as its record E + e."""
    counts: dict[int, int] = {}
    for layer, _ in records:
        counts[layer] = counts.get(layer, 0) + 1
    moved = {(layer, counts[layer] + expert): each for (layer, expert), each in stand_ins.items()}
    return dict(records) | moved
