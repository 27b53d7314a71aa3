"""Perplexity and distance: windows that score every token once, and figures that can be checked."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import stores_small
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgemoe import Engine, Session
from edgemoe.cli import main
from edgemoe.cli.text import TEXT
from edgemoe.engine import DEMO
from edgemoe.quant.evaluate import Figures, evaluate
from edgemoe.quant.windows import Window, cut, read_tokens, read_windows, share
from edgemoe.runtime.errors import FormatError, NotFoundError, UsageError
from edgemoe.tokenizer import Tokenizer


@given(st.integers(2, 200), st.integers(2, 40), st.data())
def test_every_token_but_the_first_is_scored_once(
    count: int, size: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, size))
    windows = cut(list(range(count)), size, stride)
    scored = [token for window in windows for token in window.ids[window.first :]]
    if stride < size:
        assert scored == list(range(1, count))
    else:  # the first token of every window has nothing before it
        assert scored == [token for token in range(1, count) if token % size]
    assert all(len(window.ids) <= size and window.first >= 1 for window in windows)
    # All but the first window leave what they share with the one before as context.
    assert all(window.first >= size - stride for window in windows[1:] if len(window.ids) == size)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=5), st.integers(2, 120))
def test_texts_share_the_tokens(lengths: list[int], num_tokens: int) -> None:
    texts = [[number] * length for number, length in enumerate(lengths)]
    windows = share(texts, num_tokens, 1000)
    found = [len(window.ids) for window in windows]
    assert sum(found) <= min(num_tokens, sum(lengths))
    if sum(lengths) <= num_tokens:
        assert found == [length for length in lengths if length > 1]


def test_losses_are_those_of_the_logits() -> None:
    with Engine.from_pretrained(context=64) as engine:
        ids = engine.need_tokenizer().encode(TEXT)[:61]
        windows = cut(ids, 24, 10)
        found = evaluate(engine, windows).nll
        expected = []
        for window in windows:
            for at in range(window.first, len(window.ids)):
                with Session(engine) as session:
                    logits = torch.from_numpy(session.logits(window.ids[:at])).double()
                expected.append(-float(torch.log_softmax(logits, -1)[window.ids[at]]))
        assert len(expected) == 60
        assert found.tolist() == pytest.approx(expected, abs=1e-12)
        figures = Figures.of(evaluate(engine, windows, engine))
    assert figures.perplexity == pytest.approx(math.exp(np.mean(expected)))
    assert (figures.rise_percent, figures.agreement) == (0.0, 1.0)
    assert figures.kl == pytest.approx(0, abs=1e-12)


def test_the_distance_of_two_models(tmp_path: Path) -> None:
    first = stores_small.make_store(tmp_path / "a", bits=2)
    second = stores_small.make_store(tmp_path / "b", bits=8)
    windows = [Window(list(range(3, 40)), 1)]
    with Engine.from_pretrained(first) as a, Engine.from_pretrained(second) as b:
        losses = evaluate(a, windows, b)
        p, q = (
            torch.stack([_logits(engine, windows[0].ids[:at]) for at in range(1, 37)]).double()
            for engine in (a, b)
        )
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    kl = torch.nn.functional.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(losses.kl, kl)
    assert losses.kl.min() > 0
    assert torch.equal(losses.agrees, (p.argmax(-1) == q.argmax(-1)).double())


def _logits(engine: Engine, ids: list[int]) -> torch.Tensor:
    with Session(engine) as session:
        return torch.from_numpy(session.logits(ids))


def test_texts_and_token_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two", encoding="utf-8")
    np.save(tmp_path / "ids.npy", np.arange(9, dtype=np.uint16))
    np.save(tmp_path / "square.npy", np.zeros((2, 2), np.int64))
    assert read_tokens(tmp_path / "ids.npy", None) == list(range(9))
    for name, error in (("no.txt", NotFoundError), ("square.npy", FormatError)):
        with pytest.raises(error):
            read_tokens(tmp_path / name, None)
    with pytest.raises(UsageError, match="without a tokenizer.json"):
        read_tokens(tmp_path / "a.txt", None)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(FormatError, match="no UTF-8 text; byte 3 is 0xe9"):
        read_tokens(tmp_path / "latin.txt", Tokenizer.load(DEMO))
    with pytest.raises(UsageError, match="nothing|no text"):
        read_windows([tmp_path / "ids.npy"], None, num_tokens=1)
    with pytest.raises(UsageError, match="stride"):
        cut([1, 2, 3], 4, 5)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    words = ["eval", str(DEMO), str(DEMO), "--text", str(text), "--tokens", "200"]
    assert main([*words, "--window", "64", "--json"]) == 0
    output = capsys.readouterr()
    document = json.loads(output.out)
    assert (document["window"], document["stride"], document["num_tokens"]) == (64, 32, 199)
    assert document["perplexity"] == document["other_perplexity"] > 1
    assert document["agreement"] == 1 and "tok" in output.err
    assert main(["eval", "--text", str(text), "--tokens", "200", "--window", "64"]) == 0
    assert f"{document['perplexity']:.4f}" in capsys.readouterr().out
    assert main(["eval", str(DEMO)]) == 2
