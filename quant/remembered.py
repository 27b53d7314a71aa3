"""Figures of choices, kept in a file: a search that was stopped goes on with what it has measured.

One JSON value a line. The first says what was measured on; each further one is the digest of a
choice and its figure, appended as it is measured. A last line that was cut off is ignored.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from .bitplan import Key

Choice = Mapping[Key, int]


class Remembered:
    """`measure`, asked once for every choice, also by later runs with the same `identity`."""

    def __init__(self, path: Path, identity: str, measure: Callable[[Choice], float]) -> None:
        self._path, self._measure = path, measure
        self._known = _read(path, identity)
        lines = [identity, *([digest, figure] for digest, figure in self._known.items())]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    @property
    def num_known(self) -> int:
        return len(self._known)

    def __call__(self, choice: Choice) -> float:
        digest = hashlib.sha256(repr(sorted(choice.items())).encode()).hexdigest()
        if digest not in self._known:
            self._known[digest] = self._measure(choice)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps([digest, self._known[digest]]) + "\n")
        return self._known[digest]


def _read(path: Path, identity: str) -> dict[str, float]:
    """What a file of this identity holds; nothing where there is none, or another's."""
    if not path.is_file():
        return {}
    first, *lines = path.read_text(encoding="utf-8").split("\n")
    if first != json.dumps(identity):
        return {}
    # Behind the last line feed is nothing, or half a line.
    return dict(json.loads(line) for line in lines[:-1])
