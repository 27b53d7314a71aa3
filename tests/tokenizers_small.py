"""Small real tokenizers for tests: byte-level BPE as OLMoE and Qwen have, BPE with byte fallback as
Mixtral has."""

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

CORPUS = (
    "the router picks a few experts for every token and the trunk stays in memory\n"
    "def mean(values):\n    return sum(values) / len(values)\n"
    "Ein größerer Speicher hilft. 记忆 很 小。 naïve café 🙂🚀 <|user|> user assistant system\n"
) * 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_level(vocab: int = 400) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - 2,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("   ", special=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """SentencePiece's way: a space is U+2581, unknown characters are byte tokens."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁"] + [chr(code) for code in range(97, 123)] + list(".,!?0123456789é")
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("e", "r"), ("▁", "a"), ("i", "n")]
    pieces += [left + right for left, right in merges]
    model = models.BPE(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in pieces[:3]])
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, template: str | None = CHATML) -> None:
    """The tokenizer files of a checkpoint."""
    tokenizer.save(str(folder / "tokenizer.json"))
    names = tokenizer.get_vocab()
    eos = "<|im_end|>" if "<|im_end|>" in names else "</s>"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"content": eos, "special": True},
        "bos_token": "<s>" if "<s>" in names else None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
