"""The bundled demo model: it is there, it answers, and integer activations cost it little."""

import inspect
import json
from collections.abc import Iterator

import pytest

from edgemoe import Engine, SamplingParams, Session
from edgemoe.cli.text import TEXT
from edgemoe.engine import DEMO
from edgemoe.quant.evaluate import Figures, evaluate
from edgemoe.quant.windows import Window
from edgemoe.runtime import core
from edgemoe.runtime.index import load_index

MAX_BYTES = 32 * 2**20  # of all its files in the repository
MAX_RISE_PERCENT = 0.5
ANSWERS = [  # what it was taught, in words that any taught wording contains
    ("What is a mixture of experts?", ("expert", "router")),
    ("What is edgemoe?", ("mixture-of-experts", "memory")),
    ("What is 7 plus 8?", ("15",)),
    ("What is the capital of France?", ("Paris",)),
    ("What is the KV cache?", ("keys", "values")),
]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.from_pretrained() as engine:
        yield engine


def test_it_is_small_and_has_the_promised_shape() -> None:
    index = load_index(DEMO)
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= MAX_BYTES
    assert index.model_type == "olmoe"
    assert len(index.layer_to_num_experts) >= 6
    assert min(index.layer_to_num_experts.values()) >= 16
    assert index.config["num_experts_per_tok"] >= 2


@pytest.mark.parametrize(("question", "words"), ANSWERS, ids=[question for question, _ in ANSWERS])
def test_it_answers_what_it_was_taught(engine: Engine, question: str, words: tuple[str]) -> None:
    with Session(engine) as session:
        answer = session.generate([{"role": "user", "content": question}])
    assert answer.finish_reason == "stop"
    assert all(word in answer.text for word in words), answer.text


def test_it_follows_a_conversation(engine: Engine) -> None:
    messages: list[dict[str, str]] = []
    with Session(engine) as session:
        for turn in ("My name is Nora.", "What is the capital of Italy?", "What is my name?"):
            messages.append({"role": "user", "content": turn})
            answer = session.generate(messages, SamplingParams(max_tokens=48))
            messages.append({"role": "assistant", "content": answer.text})
    assert "Rome" in messages[3]["content"] and "Nora" in messages[5]["content"]
    assert answer.stats.cached_tokens > 0


def texts(engine: Engine) -> list[list[int]]:
    """Tokens of the three domains: dialogue, code, prose; each at most one context long."""
    dialogue: list[dict[str, str]] = []
    for question, _ in ANSWERS:
        dialogue.append({"role": "user", "content": question})
        with Session(engine) as session:
            answer = session.generate(dialogue[-1:])
        dialogue.append({"role": "assistant", "content": answer.text})
    tokenizer = engine.need_tokenizer()
    samples = [engine.chat_template.encode(tokenizer, dialogue, add_generation_prompt=False)]
    samples += [tokenizer.encode(text) for text in (inspect.getsource(json.decoder), TEXT)]
    return [ids[: engine.context] for ids in samples]


@pytest.mark.skipif(core.lib is None, reason="native core not built")
@pytest.mark.filterwarnings("ignore:the reference")
def test_integer_activations_keep_its_perplexity(engine: Engine) -> None:
    """Native (int8 activations) against the reference path (fp32) on the same stored weights."""
    windows = [Window(ids, 1) for ids in texts(engine)]
    with Engine.from_pretrained(backend="reference") as reference:
        found = Figures.of(evaluate(engine, windows, reference))
    print(f"perplexity: native {found.perplexity:.4f}, reference {found.other_perplexity:.4f}")
    assert abs(found.rise_percent) <= MAX_RISE_PERCENT
