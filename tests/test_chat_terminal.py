"""`edgemoe chat` and `edgemoe run` on a pseudo-terminal, with a process behind it."""

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from tiny_checkpoint import make_checkpoint
from tokenizers_small import byte_level, write

from edgemoe.runtime import core

if os.name == "nt":
    pytest.skip("Windows has no pseudo-terminals of this kind", allow_module_level=True)
import pty  # noqa: E402

pytestmark = pytest.mark.skipif(core.lib is None, reason="native core not built")
ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 120.0  # a limit for a machine that is very busy; nothing waits this long
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
PROMPT = ">>>"
# input() on a terminal without cursor movement, and prompt_toolkit on one that has it.
EDITORS = [
    {"TERM": "dumb"},
    pytest.param(
        {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        marks=pytest.mark.skipif(
            find_spec("prompt_toolkit") is None, reason="prompt_toolkit is not installed"
        ),
    ),
]


class Terminal:
    """A process on a pseudo-terminal; `text` is all it has shown."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("EDGEMOE_")}
        inherited |= {"PYTHONPATH": str(ROOT), "TERM": "dumb", **environment}
        self._screen, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edgemoe", *map(str, arguments)],
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=inherited,
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(terminal)
        self.text = ""
        self._seen = 0

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def expect(self, pattern: str) -> str:
        """Read until `pattern` is on the screen behind what was expected before."""
        end = time.monotonic() + PATIENCE_S
        while not (found := re.compile(pattern).search(self.text, self._seen)):
            left = end - time.monotonic()
            if left <= 0 or not self._read(left):
                raise AssertionError(f"`{pattern}` did not appear in:\n{self.text}")
        self._seen = found.end()
        return found.group()

    def interrupt(self) -> None:
        """Ctrl-C at the prompt: once the process sleeps there, since readline loses a signal that
        comes while it prepares the terminal."""
        process, before = psutil.Process(self.process.pid), None
        while process.status() != psutil.STATUS_SLEEPING or process.cpu_times()[:2] != before:
            before = process.cpu_times()[:2]
            time.sleep(0.2)
        self.type("\x03")

    def finish(self) -> int:
        """Read to the end; returns the exit code."""
        while self._read(PATIENCE_S):
            pass
        return self.process.wait(PATIENCE_S)

    def _read(self, seconds: float) -> bool:
        if not select.select([self._screen], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._screen, 65536)
        except OSError:  # the process has left its terminal
            return False
        self.text += ESCAPE.sub("", data.decode(errors="replace"))
        return bool(data)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._screen)


def _own_terminal() -> None:
    """Make the terminal on standard input that of this session, so that Ctrl-C is a signal."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a long context, whose greedy answers do not end by themselves."""
    from edgemoe import cli

    folder = tmp_path_factory.mktemp("terminal")
    checkpoint = make_checkpoint(
        folder / "tiny", vocab_size=400, num_experts=8, max_position_embeddings=32768
    )
    write(checkpoint, byte_level())
    path = folder / "tiny.edgemoe"
    assert cli.main(["convert", str(checkpoint), "--out", str(path)]) == 0
    return path


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.close()


@pytest.mark.parametrize("editor", EDITORS)
def test_a_conversation(store: Path, terminals: list[Terminal], editor: dict[str, str]) -> None:
    chat = Terminal("chat", store, "-n", 5, **editor)
    terminals.append(chat)
    chat.expect("tiny · /help for help")
    chat.expect(PROMPT)
    chat.type("the router\r")
    chat.expect(r"5 tok · [\d.]+ tok/s · TTFT [\d.]+ s · hit \d+ % · [\d.]+/[\d.]+ GiB")
    chat.expect(PROMPT)
    chat.type("/stats\r")
    chat.expect("expert cache")
    chat.expect("so far: 1 answer, 5 tokens")
    chat.expect(PROMPT)
    chat.type("/nonsense\r")
    chat.expect("unknown command `/nonsense`")
    chat.type('"""one\r')
    chat.expect(r"\.\.\.")
    chat.type('two"""\r')
    chat.expect("5 tok ")
    chat.expect(PROMPT)
    chat.type("/bye\r" if editor["TERM"] == "dumb" else "\x04")  # Ctrl-D leaves as well
    assert chat.finish() == 0
    assert "Traceback" not in chat.text


@pytest.mark.parametrize("editor", EDITORS)
def test_the_first_control_c_stops_the_answer_and_the_second_leaves(
    store: Path, terminals: list[Terminal], editor: dict[str, str]
) -> None:
    chat = Terminal("chat", store, "-n", 30000, "--context", 32000, **editor)
    terminals.append(chat)
    chat.expect(PROMPT)
    chat.type("the router\r")
    chat.expect(r"\n[^\n]{20}")  # the answer has begun
    chat.type("\x03")
    chat.expect("stopped; Ctrl-C again leaves")
    tokens = int(chat.expect(r"\d+ tok ·").split()[0])
    assert 0 < tokens < 30000
    chat.expect(PROMPT)
    chat.interrupt()
    assert chat.finish() == 130
    assert "Traceback" not in chat.text


def test_a_stopped_conversation_goes_on(store: Path, terminals: list[Terminal]) -> None:
    chat = Terminal("chat", store, "-n", 30000, "--context", 32000)
    terminals.append(chat)
    chat.expect(PROMPT)
    chat.type("the router\r")
    chat.expect(r"\n[^\n]{20}")
    chat.type("\x03")
    chat.expect("stopped")
    chat.expect(PROMPT)
    chat.type("/set max_tokens 4\r")
    chat.expect("max_tokens = 4")
    chat.expect(PROMPT)
    chat.type("and the trunk\r")
    chat.expect("4 tok ·")
    chat.expect(PROMPT)
    chat.interrupt()  # something was said in between: this one only warns
    chat.expect("Ctrl-C again leaves")
    chat.expect(PROMPT)
    chat.interrupt()
    assert chat.finish() == 130


def test_control_c_ends_run_with_130(store: Path, terminals: list[Terminal]) -> None:
    run = Terminal("run", store, "the router", "-n", 30000, "--context", 32000, TERM="xterm")
    terminals.append(run)
    run.expect("loading ...\r")
    run.expect(r"[^\n]{3}")
    run.type("\x03")
    assert run.finish() == 130
    assert "Traceback" not in run.text


def test_run_without_a_prompt_says_so(store: Path, terminals: list[Terminal]) -> None:
    run = Terminal("run", store)
    terminals.append(run)
    run.expect("standard input is a terminal")
    assert run.finish() == 2
