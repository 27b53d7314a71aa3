"""The command line, called in this process, and a tiny store that it has converted itself."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_checkpoint import make_checkpoint
from tokenizers_small import byte_level, write

from edgemoe import cli

LAYERS, EXPERTS = 3, 8
Cli = Callable[..., tuple[int, str, str]]


def make(folder: Path) -> tuple[Path, Path]:
    """A checkpoint, and the store of it."""
    checkpoint = make_checkpoint(
        folder / "tiny",
        vocab_size=400,
        num_experts=EXPERTS,
        num_hidden_layers=LAYERS,
        max_position_embeddings=256,
    )
    write(checkpoint, byte_level())
    store = folder / "tiny.edgemoe"
    assert cli.main(["convert", str(checkpoint), "--out", str(store)]) == 0
    return checkpoint, store


def caller(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Calls the command line without options from the environment; returns exit code, standard
    output and standard error."""
    for name in [name for name in os.environ if name.startswith("EDGEMOE_")]:
        monkeypatch.delenv(name)

    def call(*arguments: object, stdin: str | bytes = "") -> tuple[int, str, str]:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        capfd.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call
