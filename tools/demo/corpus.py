"""Build the three training domains and encode them: dialogues, Python source, prose.

Everything comes from this folder's generators or from the running interpreter's own standard
library, so nothing is downloaded.
"""

from __future__ import annotations

import argparse
import ast
import random
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from dialogues import Dialogues
from stories import long_story
from tokenizer import END_OF_TEXT, render
from tokenizers import Tokenizer

DOMAINS = ("dialogue", "code", "prose")
SKIPPED = ("test", "tests", "idle_test", "site-packages", "encodings", "__pycache__", "idlelib")


def source_files() -> list[Path]:
    """Python files of the standard library, without tests and tables."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [
        path
        for path in sorted(root.rglob("*.py"))
        if not set(path.relative_to(root).parts) & set(SKIPPED)
        and path.stat().st_size < 200_000
        and path.name not in ("topics.py", "pydoc_data.py")
    ]
    if not found:
        raise SystemExit(f"no standard library source under `{root}`: this interpreter has none")
    return found


def is_held_out(key: str) -> bool:
    """Whether a document is kept for evaluation (one in twenty, by its name)."""
    return zlib.crc32(key.encode()) % 20 == 0


def code(split: str) -> Iterator[str]:
    """Source files of one split."""
    for path in source_files():
        if is_held_out(path.name) == (split == "held"):
            yield path.read_text(encoding="utf-8", errors="replace")


def real_prose(split: str) -> Iterator[str]:
    """The language reference of `pydoc`, and long docstrings of the standard library."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        if is_held_out(name) == (split == "held"):
            yield text.strip()
    for path in source_files():
        if is_held_out(path.name) != (split == "held"):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        except (SyntaxError, ValueError):
            continue
        docs = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text) > 120:
                    docs.append(text)
        if docs:
            yield "\n\n".join(docs)


def stories(split: str, count: int, seed: int) -> Iterator[str]:
    """Generated stories; the held-out ones come from another seed."""
    rng = random.Random(f"{split}-{seed}")
    for _ in range(count):
        yield long_story(rng)


def dialogues(count: int, seed: int | str) -> Iterator[str]:
    """Generated dialogues as text."""
    source = Dialogues(random.Random(f"dialogue-{seed}"))
    for _ in range(count):
        yield render(source.dialogue())


def documents(domain: str, split: str, seed: int, size: int) -> Iterator[str]:
    """The documents of one domain and split; `size` counts generated dialogues."""
    held = split == "held"
    if domain == "dialogue":
        yield from dialogues(size // 100 if held else size, f"{split}-{seed}")
    elif domain == "code":
        yield from code(split)
    else:
        docs = list(real_prose(split)) + list(stories(split, size // (1000 if held else 10), seed))
        random.Random(seed).shuffle(docs)
        yield from docs


def sample_texts(seed: int) -> Iterator[str]:
    """What the tokenizer is trained on: about equal parts of the three domains."""
    yield from dialogues(20_000, f"tokenizer-{seed}")
    for i, text in enumerate(code("train")):
        if i % 3 == 0:
            yield text
    yield from real_prose("train")
    yield from stories("tokenizer", 3000, seed)


def encode(folder: Path, tokenizer: Tokenizer, seed: int, size: int) -> None:
    """Write `DOMAIN.SPLIT.bin` (uint16 ids) and `DOMAIN.SPLIT.npy` (document starts)."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    folder.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        for split in ("train", "held"):
            ids: list[np.ndarray] = []
            starts, total = [], 0
            docs = list(documents(domain, split, seed, size))
            for first in range(0, len(docs), 1000):
                for item in tokenizer.encode_batch(docs[first : first + 1000]):
                    ids.append(np.array([*item.ids, end], dtype=np.uint16))
                    starts.append(total)
                    total += len(ids[-1])
            stem = folder / f"{domain}.{split}"
            np.concatenate(ids).tofile(stem.with_name(stem.name + ".bin"))
            np.save(stem.with_name(stem.name + ".npy"), np.array(starts, dtype=np.int64))
            print(f"{domain} {split}: {len(docs)} documents, {total} tokens", flush=True)


def main() -> None:
    """Encode the corpus with a tokenizer that `tokenizer.py` wrote."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the token files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of tokenizer.json")
    parser.add_argument("--dialogues", type=int, default=120_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    encode(args.out, tokenizer, args.seed, args.dialogues)


if __name__ == "__main__":
    main()
