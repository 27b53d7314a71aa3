"""Guesses of the core: which predictor, and what came of them. Floor 1.

While the core decodes a token, a predictor (runtime/predictors.py) tells it which records the next
layers may want; absent ones are read while the drive would idle, as long as a gate that measures
gain and cost lets them. The design is in docs/prefetch.md, the mechanism in csrc/prefetch.h. The
reference path has none: it asks for the records of one layer at a time and hides nothing behind
them.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from . import core
from .core_cache import PlaceTables as CoreTables
from .core_cache import PrefetchOptions, PrefetchStats
from .errors import UsageError
from .predictors import PREDICTORS
from .profile import Profile
from .transitions import BACK_OFF, PlaceTables

AUTO = "auto"
CHOICES = (AUTO, *PREDICTORS)
GIVEN = "given"  # guesses come with every token: replay, tests
_NUMBERS = {"previous": 1, "profile": 2, "router": 3, GIVEN: 4}  # em_prefetch_options.predictor
DEPTH = 1  # two layers ahead, fewer guesses are right and more are read in vain
_COLUMNS = {
    "key": np.uint64,
    "total": np.float32,
    "begin": np.int64,
    "expert": np.int32,
    "count": np.float32,
}


@dataclass(frozen=True, slots=True)
class GuessStats:
    """Sums since the start. A guess: a record of which reading began before it was demanded."""

    num_layers: int = 0  # of which a predicted record was absent
    num_open: int = 0  # of those: a guess was read, so the gate was open
    num_guesses: int = 0
    guess_bytes: int = 0
    num_in_time: int = 0  # whole when they were demanded
    num_late: int = 0  # still being read when they were demanded
    num_dropped: int = 0  # not wanted, and not read to the end
    num_failed: int = 0
    wasted_bytes: int = 0  # read, and dropped or evicted before anybody wanted them

    def __sub__(self, other: "GuessStats") -> "GuessStats":
        names = [each.name for each in fields(self)]
        return GuessStats(*(getattr(self, name) - getattr(other, name) for name in names))

    @property
    def open_share(self) -> float:
        """Share of the layers for which the gate let a guess through."""
        return self.num_open / max(1, self.num_layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return values | {"open_share": self.open_share}


class Prefetcher:
    """One engine's guesses. `handle` is what `em_decode` takes, None: there are none.

    `num_places`: MoE layers. `is_forced`: every guess is read, whatever it costs. Raises UsageError
    where `profile` is asked for and there is none.
    """

    def __init__(
        self,
        predictor: str,
        num_places: int,
        profile: Profile | None = None,
        depth: int = DEPTH,
        is_forced: bool = False,
    ) -> None:
        self.predictor = "router" if predictor == AUTO else predictor
        self.handle: int | None = None
        self._final = GuessStats()
        if self.predictor == "none":
            return
        options = PrefetchOptions(
            predictor=_NUMBERS[self.predictor],
            depth=depth,
            is_forced=is_forced,
            back_off=BACK_OFF,
            num_places=num_places,
        )
        if self.predictor == "profile":
            if profile is None:
                raise UsageError(
                    "there is no profile to predict by",
                    "--prefetch profile needs the statistics of some text",
                    "edgemoe calibrate STORE --text FILE makes them, or use --prefetch router",
                )
            self._kept = [profile.tables(place) for place in range(num_places)]
            self._tables = (CoreTables * num_places)(*map(_core_tables, self._kept))
            options.tables = self._tables
        self._lib = core.lib
        self.handle = core.lib.em_prefetch_create(options)
        if not self.handle:
            raise UsageError(f"the core refused to guess by `{predictor}`", f"depth {depth}")

    def stats(self) -> GuessStats:
        """What came of the guesses so far."""
        if self.handle:
            now = PrefetchStats()
            self._lib.em_prefetch_get_stats(self.handle, now)
            self._final = GuessStats(*(getattr(now, name) for name, _ in now._fields_))
        return self._final

    def report(self, since: GuessStats = GuessStats()) -> dict[str, Any]:
        """The predictor and what came of its guesses since then, as JSON values."""
        return {"predictor": self.predictor, **(self.stats() - since).to_dict()}

    def close(self) -> None:
        """Give the core's tables back; `stats` stay."""
        if self.handle:
            self.stats()
            self._lib.em_prefetch_destroy(self.handle)
            self.handle = None

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._lib.em_prefetch_destroy(self.handle)


def _core_tables(tables: PlaceTables) -> CoreTables:
    """Pointers into arrays that the caller keeps."""
    result = CoreTables(
        popularity=_address(tables.popularity, np.float32),
        pairwise=_address(tables.pairwise, np.float32),
    )
    for name in ("paths", "tokens"):
        states, table = getattr(tables, name), getattr(result, name)
        table.num_states = len(states.key)
        for column, dtype in _COLUMNS.items():
            setattr(table, column, _address(getattr(states, column), dtype))
    return result


def _address(array: np.ndarray, dtype: type) -> int:
    if array.dtype != dtype or not array.flags.c_contiguous:
        raise TypeError(f"expected contiguous {np.dtype(dtype)}, got {array.dtype}")
    return array.ctypes.data
