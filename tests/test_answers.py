"""Conversations with expected answers: the file, what counts as right, what counts as the same."""

import json
from pathlib import Path

import pytest
from stores_small import make_store

from edgemoe.engine import DEMO, Engine
from edgemoe.quant.answers import Answered, Conversation, hold, read_conversations, score
from edgemoe.runtime.errors import FormatError, NotFoundError
from edgemoe.session import Session

ASKED = [Conversation((("a?", "A."), ("b?", "B."))), Conversation((("c?", "C."),))]


def test_right_is_letter_by_letter_and_same_is_token_by_token() -> None:
    full = [Answered(("A.", "B."), (1, 2, 3, 4)), Answered(("D.",), (5, 6))]
    held = [Answered((" A.\n", "b."), (1, 2, 9)), Answered(("C.",), (5, 6))]
    own, other = score(ASKED, held, full), score(ASKED, full, full)
    assert (own.num_right, own.num_answers, own.num_all_right) == (2, 3, 1)
    assert (own.num_same, own.num_conversations) == (1, 2)
    assert (own.mean_same_tokens, own.mean_tokens) == (2.0, 3.0)
    assert (other.num_right, other.num_same, other.mean_same_tokens) == (2, 2, 3.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no questions"),
        ("[1]", "line 1, is no conversation"),
        ('{"turns": []}', "no turns"),
        ('{"turns": [{"question": "a", "answer": "b"}]}\n{"turns": [{"question": "a"}]}', "line 2"),
        ('{"turns": [{"question": "a", "answer": 3}]}', "expected a text, got 3"),
        ('{"turns": [{"question": "a", "answer": "b"}], "system": 1}', "expected a text"),
    ],
)
def test_a_file_that_holds_no_questions(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(FormatError, match=message):
        read_conversations(file)
    with pytest.raises(NotFoundError, match="no questions at"):
        read_conversations(tmp_path / "missing.jsonl")


def test_what_finds_no_room_is_wrong(tmp_path: Path) -> None:
    """A short context: the later questions are not asked, and counted."""
    turns = tuple((f"question number {i}?", "no answer of a model like this") for i in range(6))
    with Engine.from_pretrained(make_store(tmp_path), context=160) as engine:
        with Session(engine) as session:
            (held,) = hold(session, [Conversation(turns, "be brief")])
    assert len(held.answers) == 6 and held.answers[-1] == "" and held.token_ids
    assert score([Conversation(turns)], [held], [held]).num_right == 0


def test_the_demo_model_answers_long_conversations() -> None:
    """The list that comes with it: 64 tokens and more in each, and mostly right."""
    asked = read_conversations(DEMO.with_name("questions.jsonl"))
    with Engine.from_pretrained(context=512) as engine, Session(engine) as session:
        held = hold(session, asked[:3])
    assert all(len(each.token_ids) >= 64 for each in held)
    found = score(asked[:3], held, held)
    assert found.num_answers == 24 and found.num_right >= 21
    lines = DEMO.with_name("questions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len({json.dumps(json.loads(line)) for line in lines}) == len(asked)
