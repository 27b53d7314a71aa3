"""Loads the native core with ctypes; BACKEND tells whether it or the reference runs. Floor 0."""

import ctypes
import sys
from ctypes import (  # a second line, or it takes eleven
    POINTER,
    c_char_p,
    c_float,
    c_int32,
    c_int64,
    c_uint32,
    c_uint64,
    c_void_p,
)
from pathlib import Path

from . import format as layout
from .core_cache import (
    CacheConfig,
    CacheDemand,
    CacheStats,
    PlaceTables,
    PrefetchOptions,
    PrefetchStats,
)
from .core_decoder import (
    DecodeArgs,
    Format,
    KvCache,
    Model,
    RoutingRule,
    RoutingStats,
)

ABI_VERSION = 6  # em_abi_version() this file was written for
ERR_ROOM, ERR_STOPPED = -10004, -10005
_FILE = {"win32": "edgemoe_core.dll", "darwin": "libedgemoe_core.dylib"}.get(
    sys.platform, "libedgemoe_core.so"
)


class Record(ctypes.Structure):
    """em_record."""

    _fields_ = [
        ("offset", c_int64),
        ("num_bytes", c_int64),
        ("down_offset", c_int64),
        ("gate_up", Format),
        ("down", Format),
        ("crc_gate_up", c_uint32),
        ("crc_down", c_uint32),
        ("file", c_int32),
        ("factors", Format),
        ("dense", c_int32),
        ("rank", c_int32),
    ]

    def describe(self, layout: layout.RecordLayout) -> None:
        """Set all but the place in the file and the checksums."""
        self.num_bytes, self.down_offset = layout.num_bytes, layout.down_offset
        self.gate_up, self.down = Format.of(layout.gate_up), Format.of(layout.down)
        if layout.factors is not None:
            self.factors = Format.of(layout.factors.spec)
            self.dense, self.rank = layout.factors.dense, layout.factors.rank


class IndexLayer(ctypes.Structure):
    """em_layer."""

    _fields_ = [
        *((name, c_int64) for name in ("layer", "num_experts", "width", "first_key", "num_rows")),
        ("bodies", POINTER(c_int32)),
    ]


class Index(ctypes.Structure):
    """em_index."""

    _fields_ = [
        *((name, c_int64) for name in ("hidden", "num_layers", "num_records", "max_record_bytes")),
        ("layers", POINTER(IndexLayer)),
        ("records", POINTER(Record)),
        ("experts_path", c_char_p),
    ]


class StoreStats(ctypes.Structure):
    """em_store_stats."""

    _fields_ = [
        *((name, c_int64) for name in ("num_reads", "num_requests", "num_bytes")),
        ("cancelled_bytes", c_int64),
        ("priority_bytes", c_int64 * 3),
        *((name, c_int64) for name in ("read_ns", "cpu_ns", "crc_ns")),
        *((name, c_int64) for name in ("throttle_bytes_per_s", "throttle_busy_ns", "idle_ns")),
    ]


class MoeArgs(ctypes.Structure):
    """em_moe_args."""

    _fields_ = [
        *((name, c_int64) for name in ("num_tokens", "hidden", "width", "num_experts")),
        *(
            (name, c_void_p)
            for name in ("x", "y", "keys", "data")
            + ("pair_begin", "pair_token", "pair_weight", "workspace")
            + ("pair_norm", "hidden_square")
        ),
        ("stall_ns", c_int64),
        ("failed", c_int64),
    ]


_P, _I32, _I64 = c_void_p, c_int32, c_int64
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "em_abi_version": (_I32, []),
    "em_isa": (c_char_p, []),
    "em_crc32c": (c_uint32, [c_uint32, _P, _I64]),
    "em_pool_create": (_P, [_I32]),
    "em_pool_destroy": (None, [_P]),
    "em_matrix_bytes": (_I64, [_I64, _I64, Format]),
    "em_pack_codes": (_I32, [_P, _P, _P, _I64, _I64, Format, _P]),
    "em_pack_16bit": (_I32, [_P, _I64, _I64, _P]),
    "em_unpack_rows": (_I32, [_P, _I64, _I64, Format, _I64, _I64, _P]),
    "em_linear": (_I32, [_P, _P, _I64, _I64, Format, _P, _I64, _P, _P]),
    "em_rms_norm": (None, [_P, _P, _I64, _I64, c_float, _P]),
    "em_attention": (
        _I32,
        [_P, _P, _P, _P, _P, _P, _I32, *[_I64] * 7, c_float, _P],
    ),
    "em_arena_create": (_P, [_I64]),
    "em_arena_destroy": (None, [_P, _I64]),
    "em_memory_sweep": (c_uint64, [_P, _P, _I64]),
    "em_index_open": (POINTER(Index), [c_char_p, c_char_p, _I64]),
    "em_index_close": (None, [POINTER(Index)]),
    "em_index_key": (_I32, [POINTER(Index), _I64, _I64]),
    "em_store_open": (_P, [c_char_p, POINTER(Record), _I64, _I32, _I32, _I32, POINTER(c_int32)]),
    "em_store_open_files": (
        _P,
        [POINTER(c_char_p), _I32, POINTER(Record), _I64, *[_I32] * 3, POINTER(c_int32)],
    ),
    "em_store_close": (None, [_P]),
    "em_store_is_direct": (_I32, [_P]),
    "em_store_uring": (_I32, [_P]),
    "em_store_status": (POINTER(c_int32), [_P]),
    "em_store_landed_ns": (POINTER(c_int64), [_P]),
    "em_store_submit": (_I32, [_P, _I64, _P, _P, _I32]),
    "em_store_promote": (_I32, [_P, _I64, _P, _I32]),
    "em_store_cancel": (_I32, [_P, _I64, _P]),
    "em_store_wait": (_I32, [_P, _I32]),
    "em_store_pump": (None, [_P]),
    "em_store_throttle": (_I32, [_P, _I64]),
    "em_store_get_stats": (None, [_P, POINTER(StoreStats)]),
    "em_cache_create": (_P, [_P, POINTER(CacheConfig)]),
    "em_cache_destroy": (None, [_P]),
    "em_cache_begin_layer": (_I32, [_P, _I64, _I64, _I64, _P]),
    "em_cache_route": (_I32, [_P, _I64, _I64, _P]),
    "em_cache_hint": (_I32, [_P, _I64, _P, _P, POINTER(CacheDemand)]),
    "em_cache_release": (_I32, [_P, _I64, _P]),
    "em_cache_foresee": (_I64, [_P, _I64, _P, _I64]),
    "em_cache_seed": (_I32, [_P, _I64, _P, _P]),
    "em_cache_preload": (_I64, [_P, _I64, _P, _P]),
    "em_cache_settle": (None, [_P]),
    "em_cache_resize": (_I32, [_P, _I64, _I32]),
    "em_cache_addresses": (POINTER(c_uint64), [_P]),
    "em_cache_place_stats": (POINTER(c_int64), [_P]),
    "em_cache_get_stats": (None, [_P, POINTER(CacheStats)]),
    "em_moe_workspace_floats": (_I64, [_I64, _I64, _I64, _I64]),
    "em_moe_run": (_I32, [_P, _P, POINTER(Record), POINTER(MoeArgs)]),
    "em_decoder_create": (_P, [POINTER(Model), _P]),
    "em_decoder_destroy": (None, [_P]),
    "em_decoder_use_memory": (_I32, [_P, _P, _I64]),
    "em_decoder_set_mask": (_I32, [_P, _I64, _P, c_float]),
    "em_decoder_set_bodies": (_I32, [_P, _I64, _P]),
    "em_decoder_set_gains": (_I32, [_P, _I64, _P]),
    "em_decoder_set_routing": (_I32, [_P, POINTER(RoutingRule)]),
    "em_decoder_set_theta": (_I32, [_P, _I64, _P]),
    "em_decoder_expert_inputs": (_I32, [_P, _I64, _P, _P]),
    "em_decoder_get_routing_stats": (None, [_P, POINTER(RoutingStats)]),
    "em_decoder_embed": (_I32, [_P, _I64, _P, _P]),
    "em_decoder_attend": (_I32, [_P, _I64, POINTER(KvCache), _P, _P, _I64, *[_P] * 5]),
    "em_decoder_finish": (_I32, [_P, _I64, _I64, _P, _P, _P]),
    "em_decoder_logits": (_I32, [_P, _I64, _P, _P]),
    "em_profile_scores": (
        None,
        [POINTER(PlaceTables), c_float, _I64, _P, _I64, _P, *[_I64] * 2, _P],
    ),
    "em_prefetch_create": (_P, [POINTER(PrefetchOptions)]),
    "em_prefetch_destroy": (None, [_P]),
    "em_prefetch_get_stats": (None, [_P, POINTER(PrefetchStats)]),
    "em_decode": (_I32, [_P, _P, POINTER(DecodeArgs)]),
}
_CONSTANTS = {
    "em_format_version": layout.FORMAT_VERSION,
    "em_page_bytes": layout.PAGE_BYTES,
    "em_tile_rows": layout.TILE_ROWS,
    "em_line_bytes": layout.LINE_BYTES,
    "em_act_group": layout.ACT_GROUP,
}


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    # Not Path(__file__).parent: an editable install leaves Python files in the source tree and puts
    # the library into site-packages; only the package's __path__ names both folders.
    for folder in sys.modules[__package__].__path__:
        path = Path(folder, _FILE)
        if path.is_file():
            return _declare(ctypes.CDLL(str(path)), path), str(path)
    return None, None


def _declare(library: ctypes.CDLL, path: Path) -> ctypes.CDLL:
    found = library.em_abi_version()
    if found != ABI_VERSION:
        raise ImportError(f"`{path}`: expected ABI {ABI_VERSION}, got {found}; rebuild it")
    for name, expected in _CONSTANTS.items():
        value = c_int32.in_dll(library, name).value
        if value != expected:
            raise ImportError(f"`{path}`: expected {name} {expected}, got {value}; rebuild it")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


lib, library_path = _load()
BACKEND = "native" if lib else "reference"
