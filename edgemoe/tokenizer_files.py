"""The small JSON files that come with a tokenizer. Floor 3; imports no tokenizer library."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .runtime.errors import FormatError


def read_json(path: Path) -> dict[str, Any]:
    """An optional JSON object, {} where the file is absent. Raises FormatError if it is broken."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(
            f"`{path}` is damaged", f"it is no JSON: {error}", "copy it again from the checkpoint"
        ) from error
    if not isinstance(value, dict):
        raise FormatError(f"`{path}` is damaged", "expected a JSON object")
    return value


def token_text(value: Any) -> str | None:
    """A special token as tokenizer_config.json gives it: a text or {"content": text}."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def eos_ids(path: Path) -> list[int]:
    """End tokens that `generation_config.json` names (one or a list), else `config.json`."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(path / name).get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if value is not None:
            if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
                raise FormatError(
                    f"`{path / name}` has a bad `eos_token_id`",
                    f"expected an id or a list of ids, got {value!r}",
                )
            return ids
    return []
