"""CRC-32C of expert records: the core's, or a NumPy twin with the same bits. Floor 0."""

import functools
from typing import Any

import numpy as np

from . import core

_POLY = 0x82F63B78  # bit-reversed Castagnoli polynomial
_LANE_BYTES = 1024  # the twin runs this many steps over all lanes of the data at once


def crc32c(data: Any, seed: int = 0, backend: str | None = None) -> int:
    """CRC-32C of a contiguous buffer. Seeds chain: crc32c(b, crc32c(a)) == crc32c(a + b)."""
    view = np.frombuffer(data, dtype=np.uint8)
    if (backend or core.BACKEND) == "native":
        return int(core.lib.em_crc32c(seed, view.ctypes.data, view.size))
    return _crc32c_numpy(view, seed)


@functools.cache
def _byte_table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(_POLY), table >> 1)
    return table.astype(np.uint32)


@functools.cache
def _shift_tables() -> list[list[int]]:
    """tables[i][b]: what byte i of a CRC becomes behind _LANE_BYTES zero bytes."""
    values = np.arange(256, dtype=np.uint32)
    crcs = np.concatenate([values << np.uint32(8 * i) for i in range(4)])
    for _ in range(_LANE_BYTES):
        crcs = (crcs >> np.uint32(8)) ^ _byte_table()[crcs & 255]
    return crcs.reshape(4, 256).tolist()


def _crc32c_numpy(data: np.ndarray, seed: int) -> int:
    table = _byte_table()
    crc = seed ^ 0xFFFFFFFF
    num_lanes = data.size // _LANE_BYTES
    if num_lanes:
        body = data[: num_lanes * _LANE_BYTES].reshape(num_lanes, _LANE_BYTES)
        lanes = np.zeros(num_lanes, dtype=np.uint32)
        for column in np.ascontiguousarray(body.T):
            lanes = (lanes >> np.uint32(8)) ^ table[(lanes ^ column) & 255]
        t0, t1, t2, t3 = _shift_tables()
        for lane in lanes.tolist():
            crc = t0[crc & 255] ^ t1[crc >> 8 & 255] ^ t2[crc >> 16 & 255] ^ t3[crc >> 24] ^ lane
    entries = table.tolist()
    for byte in data[num_lanes * _LANE_BYTES :].tolist():
        crc = (crc >> 8) ^ entries[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF
