"""The command line without a model: parsing, exit codes, errors, tables, reading turns."""

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from edgemoe import cli
from edgemoe.cli import bench_memory, chat_input, options, render
from edgemoe.cli.command_line import parse
from edgemoe.runtime.errors import BudgetError, NotFoundError, UsageError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("EDGEMOE_")]:
        monkeypatch.delenv(name)


def run_fresh(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plan", "--help"]])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from edgemoe.cli import main
code = main({arguments!r})
heavy = {{"torch", "numpy", "transformers", "bitsandbytes", "rich"}} & set(sys.modules)
print("loaded:", sorted(heavy), file=sys.stderr)
sys.exit(code)"""
    done = run_fresh(code)
    assert done.returncode == 0, done.stderr
    assert "loaded: []" in done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_help(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: edgemoe {name}")
    assert max(map(len, (cli.help_text() + out).splitlines())) <= 80
    assert cli.main(["help", *name.split()]) == 0
    assert capsys.readouterr().out == out


def test_a_command_of_two_words_wins_over_its_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "bench all", cli.COMMANDS["inspect"])
    for words, name in ((["bench", "all"], "bench all"), (["bench"], "bench")):
        assert cli.main([*words, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"usage: edgemoe {name} [MODEL]")
    assert cli.main(["bench", "missing"]) == 4
    assert cli.main(["bench", "all", "missing"]) == 4


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "usage: edgemoe COMMAND"),
        (["chta"], 2, "did you mean `chat`?"),
        (["--frobnicate"], 2, "unknown option `--frobnicate`"),
        (["run", "--frobnicate", "hello"], 2, "unrecognized arguments: --frobnicate"),
        (["run", "--policy", "clairvoyant", "hello"], 2, "invalid choice: 'clairvoyant'"),
        (["run", "--context", "0", "hello"], 2, "expected a positive whole number, got `0`"),
        (["run", "hello", "--raw", "--system", "x"], 2, "--system has no place in a raw prompt"),
        (["run", "hello", "--logprobs", "2"], 2, "--logprobs needs --json"),
        (["run", "  "], 2, "the prompt is empty"),
        (["run", "missing.edgemoe", "hello"], 4, "no model at `missing.edgemoe`"),
        (["run", "missing.edgemoe/", "hello"], 4, "no model at `missing.edgemoe/`"),
        (["chat", "missing"], 4, "no model at `missing`"),
        (["chat", "a", "-m", "b"], 2, "two models given"),
        (["inspect", "missing"], 4, "no model at `missing`"),
        (["verify", "missing"], 4, "no model at `missing`"),
        (["bench", "missing"], 4, "no model at `missing`"),
        (["plan", "missing"], 4, "no model at `missing`"),
        (["convert", "missing", "--out", "x.edgemoe"], 4, "missing"),
        (["convert", "missing"], 2, "no --out given"),
    ],
)
def test_mistakes_are_three_lines_and_a_code(
    arguments: list[str],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 3 or not arguments
    assert not list(tmp_path.iterdir())


def test_a_lone_word_of_run_is_a_prompt_unless_it_is_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "some-folder"
    folder.mkdir()
    assert options.looks_like_model(str(folder))
    assert options.looks_like_model("not-there.edgemoe")
    assert options.looks_like_model("not-there.edgemoe/")
    assert not options.looks_like_model("What is an expert?")
    assert not options.looks_like_model("x" * 100_000)
    assert not options.looks_like_model("zero\0byte")


def parse_run(*arguments: str) -> SimpleNamespace:
    from edgemoe.cli import run

    return parse("run", "about", run, arguments)


def test_environment_fills_in_and_a_flag_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEMOE_MEMORY", "3GiB")
    monkeypatch.setenv("EDGEMOE_KV_BITS", "32")
    monkeypatch.setenv("EDGEMOE_CONTEXT", "8k")
    monkeypatch.setenv("EDGEMOE_JSON", "yes")
    monkeypatch.setenv("EDGEMOE_STOP", "END")
    args = parse_run("hello")
    assert (args.memory, args.kv_bits, args.context, args.json) == (3 << 30, 32, 8192, True)
    assert options.sampling_arguments(args) == {"stop": ("END",)}
    args = parse_run("hello", "--memory", "1GiB", "--kv-bits", "16")
    assert (args.memory, args.kv_bits) == (1 << 30, 16)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("EDGEMOE_KV_BITS", "12"),
        ("EDGEMOE_CONTEXT", "many"),
        ("EDGEMOE_JSON", "perhaps"),
        ("EDGEMOE_POLICY", "best"),
        ("EDGEMOE_SET_THRESHOLD", "high"),
    ],
)
def test_a_wrong_variable_is_named(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=f"`{variable}` is `{value}`") as caught:
        parse_run("hello")
    assert caught.value.why.startswith("expected ")


def test_model_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEMOE_MODEL", str(tmp_path))
    assert options.model_path(parse_run()) == str(tmp_path)
    monkeypatch.setenv("EDGEMOE_MODEL", "gone.edgemoe")
    with pytest.raises(NotFoundError):
        options.model_path(parse_run())
    assert options.model_path(parse_run(str(tmp_path))) == str(tmp_path)


def test_every_kind_of_error_has_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert render.report_error(BudgetError("a budget\nof `1 B`", "b", "c")) == 3
    assert capsys.readouterr().err == "edgemoe: a budget of `1 B`\n  why:  b\n  next: c\n"
    assert render.report_error(FileNotFoundError(2, "no", "x.json")) == 4
    assert render.report_error(MemoryError()) == 1
    assert render.report_error(OSError(28, "No space left on device", "f")) == 3
    assert "free some disk space" in capsys.readouterr().err
    assert render.report_error(ZeroDivisionError("division by zero")) == 1
    assert "internal error: ZeroDivisionError" in capsys.readouterr().err


def test_an_error_always_says_what_next(capsys: pytest.CaptureFixture[str]) -> None:
    render.report_error(UsageError("a", "b"))
    assert capsys.readouterr().err.splitlines()[-1].startswith("  next: edgemoe COMMAND --help")


def test_an_error_cannot_draw_on_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    render.report_error(BudgetError("\x1b[2Jevil\rname"))
    assert capsys.readouterr().err == "edgemoe:  [2Jevil name\n"


def test_an_unexpected_error_has_no_traceback_unless_debugging(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(args: object) -> int:
        raise ZeroDivisionError("division by zero")

    from edgemoe.cli import run

    monkeypatch.setattr(run, "run", explode)
    assert cli.main(["run", "hello"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("EDGEMOE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["run", "hello"])


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    from edgemoe.cli import run

    monkeypatch.setattr(run, "run", interrupt)
    assert cli.main(["run", "hello"]) == 130


def test_closed_streams_are_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert cli.main(["inspect"]) == 0
    assert cli.main(["run"]) == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows pipes report a closed reader differently")
def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m edgemoe --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", f"sleep 0; {command}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert done.stdout.strip() in ("0", "1")  # the help may have been written before `true` left


def test_broken_pipe_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
import sys
from edgemoe import cli
from edgemoe.cli import run
def broken(args): raise BrokenPipeError
run.run = broken
sys.exit(cli.main(["run", "hello"]))"""
    done = run_fresh(code)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def turns(*lines: str) -> list[str | None]:
    rest = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    result = []
    while not result or result[-1] is not None:
        result.append(chat_input.read_turn(read))
    return result


def test_turns_are_lines_or_fenced() -> None:
    assert turns("one", "", "two") == ["one", "", "two", None]
    assert turns('"""', "a", "", "b", '"""', "c") == ["a\n\nb", "c", None]
    assert turns('"""a', 'b"""') == ["a\nb", None]
    assert turns('"""one line"""') == ["one line", None]
    assert turns('"""never', "closed") == ["never\nclosed", None]
    assert turns() == [None]


def test_table_lines_up() -> None:
    text = render.table([("a", 1), ("bbb", 22)], ("name", "n"))
    assert text == "name   n\n----  --\na      1\nbbb   22"
    assert render.markdown([("a", 1)], ("name", "n")) == "| name | n |\n|---|---:|\n| a | 1 |"


def test_output_hash_is_the_sequence() -> None:
    assert render.output_hash([1, 2, 3]) == render.output_hash([1, 2, 3])
    assert render.output_hash([1, 2, 3]) != render.output_hash([1, 3, 2])
    assert len(render.output_hash([])) == 16


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and mincore")
def test_peak_memory_sees_a_peak(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(3_000_001))
    with bench_memory.PeakMemory([file]) as before:
        pass
    with bench_memory.PeakMemory([file]) as peak:
        block = bytearray(64 << 20)
        block[::4096] = b"x" * len(block[::4096])
    assert peak.rss_bytes >= before.rss_bytes + (60 << 20)
    assert peak.anonymous_bytes is not None and peak.anonymous_bytes > 60 << 20
    assert peak.page_cache_bytes is not None
    assert peak.page_cache_bytes in range(0, 3_004_417)
    del block


def test_a_pasted_colour_does_not_end_the_chat() -> None:
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("a\x1b[31mb\r")
        assert chat_input._editor().prompt() == "ab"


@pytest.mark.parametrize("command", ["run", "chat", "plan"])
def test_a_wrong_amount_names_the_variable_it_came_from(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEMOE_MEMORY", "much")
    assert cli.main([command, "--help"]) == 2
    error = capsys.readouterr().err
    assert "`EDGEMOE_MEMORY` is `much`" in error and "write 4GiB" in error


@pytest.mark.parametrize("has_core", [True, False])
def test_a_sweep_reads_all_its_memory(has_core: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgemoe.cli import bench_limits
    from edgemoe.runtime import core

    if has_core and core.lib is None:
        pytest.skip("no native core")
    if not has_core:
        monkeypatch.setattr(core, "lib", None)
        monkeypatch.setattr(core, "BACKEND", "reference")
    monkeypatch.setattr(bench_limits, "sweep_bytes", lambda: 16 << 20)
    with closing(bench_limits.MemorySweep(2)) as sweep:
        assert sweep.best(1) > 0
        with sweep.running() as rate:
            pass
        assert rate() >= 0
