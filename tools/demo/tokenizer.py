"""Train the demo model's byte-level BPE tokenizer and write it in the Hugging Face layout."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, SYSTEM, USER, ASSISTANT, END = (
    "<|endoftext|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
SPECIAL = (END_OF_TEXT, SYSTEM, USER, ASSISTANT, END)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def render(messages: list[dict[str, str]], *, prompt: bool = False) -> str:
    """The text of a dialogue, as the chat template gives it."""
    text = "".join(f"<|{m['role']}|>{m['content']}{END}" for m in messages)
    return text + ASSISTANT if prompt else text


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` entries whose first ids are the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write the tokenizer, its configuration and the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": END_OF_TEXT, "eos_token": END, "pad_token": END_OF_TEXT}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
    }
    _write(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    extra = {"additional_special_tokens": [SYSTEM, USER, ASSISTANT]}
    _write(folder / "special_tokens_map.json", json.dumps(named | extra, indent=2) + "\n")
    _write(folder / "chat_template.jinja", CHAT_TEMPLATE)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Train on the texts that `corpus.py` generates."""
    from corpus import sample_texts

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer.json")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    save(train(sample_texts(args.seed), args.vocab_size), args.out, 1024)


if __name__ == "__main__":
    main()
