"""Files that are written whole or not at all."""

import os
from pathlib import Path

import pytest

from edgemoe.runtime.errors import EdgeMoeError, NotFoundError
from edgemoe.runtime.outputs import need_place, replacing, write_json


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a b.json"
    write_json(path, {"a": 1})
    assert path.read_text() == '{\n "a": 1\n}\n'
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="No space") as caught, replacing(path) as temporary:
        assert temporary.suffix == ".json" and temporary.parent == tmp_path
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(path)
    assert path.read_text() == '{\n "a": 1\n}\n' and list(tmp_path.iterdir()) == [path]


def test_a_place_is_looked_at_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_place(tmp_path / "a")
    need_place(tmp_path / "profiles" / "a", makes_folder=True)
    with pytest.raises(NotFoundError, match="its folder is not there"):
        need_place(tmp_path / "profiles" / "a")
    with pytest.raises(EdgeMoeError, match="it is a folder"):
        need_place(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(EdgeMoeError, match="read-only"):
        need_place(tmp_path / "a")
