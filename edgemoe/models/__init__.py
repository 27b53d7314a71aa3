"""Model wiring: one file per `model_type` of a checkpoint's config.json. Floor 2.

Parsing a configuration and naming tensors needs no NumPy; `causal_lm` and what it imports do.
"""

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

from ..runtime.errors import UnsupportedModelError
from ..runtime.index import StoreIndex
from .args import ModelArgs

MODEL_TYPES = ("olmoe", "qwen2_moe", "qwen3_moe", "mixtral")


def load_module(model_type: str) -> ModuleType:
    """The module of a `model_type`; UnsupportedModelError where there is none."""
    if model_type not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"`model_type` `{model_type}` is not supported",
            f"edgemoe runs {', '.join(MODEL_TYPES)}",
            "choose a checkpoint of one of these architectures",
        )
    return import_module(f".{model_type}", __name__)


def store_args(index: StoreIndex) -> ModelArgs:
    """The arguments of a store's model: those of its config.json, with the experts it holds."""
    args = parse_config(index.config)
    if not index.is_derived:
        return args
    kept = {layer: len(ids) for layer, ids in index.kept.items()}
    return replace(args, kept_experts=kept, bodies=index.layer_to_bodies)


def parse_config(config: Mapping[str, Any]) -> ModelArgs:
    """The arguments of a checkpoint's config.json, by its `model_type`."""
    if "model_type" not in config:
        raise UnsupportedModelError(
            "`model_type` is missing from config.json",
            f"edgemoe runs {', '.join(MODEL_TYPES)}",
            "take the config.json that the checkpoint was published with",
        )
    return load_module(str(config["model_type"])).parse(config)
