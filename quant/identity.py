"""What must be equal for two conversions to give the same bytes. No torch."""

import hashlib
import json
import struct
from dataclasses import asdict
from typing import Any

from ..runtime.format import FORMAT_VERSION
from .options import ConvertOptions
from .store_source import WeightSource

WRITER_VERSION = 3  # raise it when the same input and options give other bytes


def fingerprint(
    source: WeightSource, options: ConvertOptions, calibration: str | None = None
) -> dict[str, Any]:
    """What must be equal for two runs to give the same bytes: options, sources, writer.

    `calibration`: the digest of the tokens that were calibrated on.
    """
    files: dict[str, list[Any]] = {}
    for name in sorted(source.files):
        path = source.path / name
        status = path.stat()
        with open(path, "rb") as file:
            word = file.read(8)
            header = file.read(struct.unpack("<Q", word)[0])
        files[name] = [status.st_size, status.st_mtime_ns, hashlib.sha256(header).hexdigest()]
    plan = options.plan.to_json() if options.plan is not None else None
    return {
        "writer_version": [WRITER_VERSION, FORMAT_VERSION],
        "options": {
            "--bits": options.spec.label if options.down else options.bits,
            "--group-size": options.group_size,
            "--trunk-bits": options.trunk_bits,
            "--mode": options.mode,
            "--quantizer": options.quantizer,
            "--plan": None if plan is None else _digest(json.dumps(plan, sort_keys=True)),
            "--calibration": calibration,
            "variants": [asdict(spec) for spec in options.variants],
        },
        "config": _digest(source.identity()),
        "files": files,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
