"""The commands that answer, on a tiny store that the command line itself has converted."""

import json
from pathlib import Path

import pytest
from cli_small import Cli, caller, make

from edgemoe.cli import options
from edgemoe.runtime import core

pytestmark = pytest.mark.skipif(core.lib is None, reason="native core not built")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def store(made: tuple[Path, Path]) -> Path:
    return made[1]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return caller(capfd, monkeypatch)


# ---- run ----------------------------------------------------------------------------------------


def test_run_prints_the_answer_and_nothing_else(run: Cli, store: Path) -> None:
    code, out, err = run("run", store, "the router", "-n", 8)
    assert (code, err) == (0, "")
    assert out.endswith("\n")
    again = run("run", store, "-n", 8, stdin="the router\n")
    assert again == (0, out, "")
    assert run("run", "-m", store, "the router", "-n", 8) == again
    assert run("run", store, "-", "-n", 8, stdin="the router") == again


def test_the_prompt_may_come_after_the_options(run: Cli, store: Path) -> None:
    first = run("run", store, "the router", "-n", 4)
    assert run("run", store, "-n", 4, "the router") == first
    assert first[0] == 0


def test_run_json_is_one_object(run: Cli, store: Path) -> None:
    code, out, err = run("run", store, "the router", "-n", 6, "--json", "--logprobs", 2)
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["model"] == "tiny"
    assert 0 < len(answer["token_ids"]) <= 6
    assert answer["finish_reason"] in ("length", "stop")
    assert answer["stats"]["generated_tokens"] == len(answer["token_ids"])
    assert answer["stats"]["hits"] + answer["stats"]["misses"] > 0
    assert answer["engine"]["backend"] == "native"
    assert len(answer["logprobs"]) == len(answer["token_ids"])
    assert all(len(each["top_logprobs"]) >= 2 for each in answer["logprobs"])
    plain = run("run", store, "the router", "-n", 6)[1]
    assert plain.removesuffix("\n") == answer["text"].removesuffix("\n")
    other = json.loads(run("run", store, "values", "--raw", "-n", 6, "--json")[1])
    assert other["output_hash"] != answer["output_hash"]


def test_run_raw_has_no_template(run: Cli, store: Path) -> None:
    raw = json.loads(run("run", store, "the", "--raw", "-n", 1, "--json")[1])
    chat = json.loads(run("run", store, "the", "-n", 1, "--json")[1])
    system = json.loads(run("run", store, "the", "-n", 1, "--json", "--system", "be kind")[1])
    tokens = [each["stats"]["prompt_tokens"] for each in (raw, chat, system)]
    assert tokens[0] < tokens[1] < tokens[2]


def test_run_takes_sampling_and_stop(run: Cli, store: Path) -> None:
    sample = ("run", store, "the", "-n", 12, "--temperature", 1.5, "--json", "--seed")
    first, second, third = (json.loads(run(*sample, seed)[1]) for seed in (1, 1, 2))
    assert first["token_ids"] == second["token_ids"] != third["token_ids"]
    text = json.loads(run("run", store, "the", "-n", 12, "--json")[1])["text"]
    letters = [letter for letter in text if letter.isalpha()]
    stop = letters[len(letters) // 2]
    stopped = json.loads(run("run", store, "the", "-n", 12, "--json", "--stop", stop)[1])
    assert stopped["text"] == text[: text.index(stop)]
    assert stopped["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--memory", "10MiB"], 3, "below the floor"),
        (["--memory", "lots"], 2, "`lots` is no amount of memory"),
        (["--context", "100000"], 2, "--context 256 or less"),
        (["--temperature", "-1"], 2, "temperature"),
        (["--top-p", "nan"], 2, "top_p"),
    ],
)
def test_run_refuses(run: Cli, store: Path, arguments: list[str], code: int, said: str) -> None:
    got, out, err = run("run", store, "hello", *arguments)
    assert (got, out) == (code, "")
    assert said in err and "next:" in err


def test_run_names_the_floor_line_by_line_and_the_named_budget_works(run: Cli, store: Path) -> None:
    code, _, err = run("run", store, "hello", "--memory", "10MiB", "-n", 1)
    assert code == 3
    for line in ("runtime", "trunk", "KV cache", "activations", "headroom", "expert cache"):
        assert f"\n    {line} " in err
    least = err.split("--memory ")[2].split()[0]
    assert run("run", store, "hello", "--memory", least, "-n", 1)[0] == 0


def test_run_needs_text(run: Cli, store: Path) -> None:
    assert run("run", store)[0] == 2
    code, _, err = run("run", store, stdin=b"\xff\xfe\x00")
    assert code == 2 and "not UTF-8" in err


def test_run_says_what_is_not_as_asked(run: Cli, store: Path) -> None:
    code, _, err = run("run", store, "a", "-n", 1, "--backend", "reference")
    assert code == 0
    assert "note: the slow reference runs, as asked" in err
    code, _, err = run("run", store, "a", "-n", 1, "-v")
    assert "backend: native" in err and " tok " in err


# ---- chat ---------------------------------------------------------------------------------------


def test_chat_answers_each_line_of_a_pipe(run: Cli, store: Path) -> None:
    code, out, err = run("chat", store, "-n", 4, stdin="the router\n\nthe trunk\n")
    assert code == 0
    assert ">>>" not in out + err
    footers = [line for line in err.splitlines() if " tok " in line and "TTFT" in line]
    assert len(footers) == 2
    first = run("run", store, "the router", "-n", 4)[1]
    assert out.startswith(first)


def test_chat_commands(run: Cli, store: Path) -> None:
    script = """the
/help
/set temperature 0.5
/set seed 3
/set nonsense 1
/set top_p 7
/system be kind
/regen
/stats
/nonsense
/clear
/regen
/system off
\"\"\"two
lines\"\"\"
/bye
never asked
"""
    code, out, err = run("chat", store, "-n", 4, stdin=script)
    assert code == 2  # what went wrong in a pipe is not forgotten
    assert "/regen  " in err
    assert "temperature = 0.5" in err
    assert "unknown setting `nonsense`" in err
    assert "top_p" in err.split("nonsense`")[1]
    assert "system message: be kind" in err
    assert "system message: none" in err
    assert "expert cache " in err and "so far: 2 answers, 8 tokens" in err
    assert "unknown command `/nonsense`" in err
    assert "new conversation" in err
    assert "nothing to answer again" in err
    assert len([line for line in err.splitlines() if "TTFT" in line]) == 3


def test_chat_keeps_the_prefix(run: Cli, store: Path) -> None:
    _, _, err = run("chat", store, "-n", 4, stdin="the router\nand the trunk\n/stats\n")
    line = next(line for line in err.splitlines() if line.startswith("last answer"))
    prompt, kept = int(line.split()[2]), int(line.split("(")[1].split()[0])
    assert 0 < kept < prompt


def test_chat_survives_a_question_that_is_too_long(run: Cli, store: Path) -> None:
    script = "x" * 2000 + "\nthe router\n"
    code, out, err = run("chat", store, "-n", 4, stdin=script)
    assert code == 2
    assert "the context holds 256" in err and "next: /clear starts a new conversation" in err
    assert out == run("run", store, "the router", "-n", 4)[1]


def test_chat_says_what_cut_an_answer(run: Cli, store: Path) -> None:
    err = run("chat", store, "-n", 300, "--context", 64, stdin="the router\n")[2]
    assert "(cut where 64 tokens of context end; /clear starts anew)" in err
    err = run("chat", store, "-n", 4, stdin="the router\n")[2]
    assert "(cut at its length limit; /set max_tokens N allows more)" in err


def test_options_name_what_the_engine_has() -> None:
    from edgemoe.config import EngineConfig
    from edgemoe.runtime.policy import POLICIES
    from edgemoe.sampling import SamplingParams

    assert set(options.POLICIES) == set(POLICIES)
    for policy in options.POLICIES:
        EngineConfig.make({}, policy=policy)
    for predictor in options.PREDICTORS:
        EngineConfig.make({}, prefetch=predictor)
    fields = set(SamplingParams.__dataclass_fields__)
    assert set(options.SAMPLING) == fields - {"stop", "logprobs"}
