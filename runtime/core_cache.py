"""The structures of the core's expert cache and of its guesses; see edgemoe_core.h. Floor 0."""

import ctypes
from ctypes import c_char_p, c_double, c_float, c_int32, c_int64, c_void_p


class CacheConfig(ctypes.Structure):
    """em_cache_config."""

    _fields_ = [
        ("arena", c_void_p),
        *((name, c_int64) for name in ("arena_bytes", "capacity_bytes")),
        ("first_keys", c_void_p),
        ("num_places", c_int64),
        ("policy", c_char_p),
        *((name, c_double) for name in ("half_life", "max_moved_per_byte")),
    ]


class CacheDemand(ctypes.Structure):
    """em_cache_demand."""

    _fields_ = [(name, c_int64) for name in ("num_hits", "num_misses", "num_bytes", "num_guessed")]


class CacheStats(ctypes.Structure):
    """em_cache_stats."""

    _fields_ = [
        *((name, c_int64) for name in ("capacity_bytes", "resident_bytes", "pinned_bytes")),
        *((name, c_int64) for name in ("num_resident", "num_evictions", "moved_bytes")),
        *((name, c_int64) for name in ("native_ns", "decide_ns", "guess_ns", "submit_ns")),
        *((name, c_int64) for name in ("num_foreseen", "num_foreseen_in_time")),
    ]


class StateTable(ctypes.Structure):
    """em_state_table."""

    _fields_ = [
        ("num_states", c_int64),
        *((name, c_void_p) for name in ("key", "total", "begin", "expert", "count")),
    ]


class PlaceTables(ctypes.Structure):
    """em_place_tables."""

    _fields_ = [
        ("popularity", c_void_p),
        ("pairwise", c_void_p),
        ("paths", StateTable),
        ("tokens", StateTable),
    ]


class PrefetchOptions(ctypes.Structure):
    """em_prefetch_options."""

    _fields_ = [
        ("predictor", c_int32),
        ("depth", c_int32),
        ("is_forced", c_int32),
        ("back_off", c_float),
        ("num_places", c_int64),
        ("tables", ctypes.POINTER(PlaceTables)),
    ]


class PrefetchStats(ctypes.Structure):
    """em_prefetch_stats."""

    _fields_ = [
        (name, c_int64)
        for name in (
            *("num_layers", "num_open", "num_guesses", "guess_bytes"),
            *("num_in_time", "num_late", "num_dropped", "num_failed", "wasted_bytes"),
        )
    ]
