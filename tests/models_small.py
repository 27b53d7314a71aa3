"""Tiny random transformers models, one per option, and the same model run by edgemoe.

Weights are rounded to bf16, so that a 16-bit store holds them exactly. Matrices are scaled to keep
activations near 1 and logits far apart, which the initial values of the library do not.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from edgemoe.kv_cache import KVCache
from edgemoe.models import parse_config
from edgemoe.models.causal_lm import CausalLM
from edgemoe.runtime.executor import Executor
from edgemoe.runtime.kernels import ThreadPool
from edgemoe.runtime.memory import Arena
from edgemoe.runtime.native_cache import make_cache
from edgemoe.runtime.store import Store

CLASSES = {
    "olmoe": (transformers.OlmoeForCausalLM, transformers.OlmoeConfig),
    "qwen2_moe": (transformers.Qwen2MoeForCausalLM, transformers.Qwen2MoeConfig),
    "qwen3_moe": (transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig),
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig),
}
BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "eos_token_id": None,
    "pad_token_id": None,
    "bos_token_id": None,
}
QWEN = {"intermediate_size": 96, "moe_intermediate_size": 32, "num_experts": 8}
PER_TYPE: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 32, "num_experts": 8},
    "qwen2_moe": {**QWEN, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {**QWEN, "head_dim": 32},
    "mixtral": {"intermediate_size": 64, "num_local_experts": 8},
}


@dataclass(frozen=True)
class Case:
    """One option of one architecture. `fused`: the checkpoint holds one 3-D tensor per layer."""

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    fused: bool = False
    fp32: bool = False


def make_model(case: Case, seed: int = 0) -> transformers.PreTrainedModel:
    model_class, config_class = CLASSES[case.model_type]
    config = config_class(**(BASE | PER_TYPE[case.model_type] | case.options))
    config._attn_implementation = "eager"
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.3 * noise if name.endswith("bias") else 1 + 0.2 * noise)
            else:
                scale = 4.0 if name.endswith("gate.weight") else 1.0  # decided routers
                weight.copy_(noise * scale / weight.shape[-1] ** 0.5)
            if not case.fp32:
                weight.copy_(weight.to(torch.bfloat16))
    return model


def save_checkpoint(model: transformers.PreTrainedModel, case: Case, path: Path) -> None:
    dtype = torch.float32 if case.fp32 else torch.bfloat16
    state = {name: value.to(dtype) for name, value in model.state_dict().items()}
    model.save_pretrained(path, state_dict=state, save_original_format=not case.fused)


class Running:
    """A store with everything it needs to run; all experts resident."""

    def __init__(self, path: Path, backend: str, num_threads: int = 2) -> None:
        self.store = Store(path, backend=backend)
        self.args = parse_config(self.store.index.config)
        num_bytes = self.store.index.expert_bytes
        self.arena = Arena(num_bytes, backend)
        self.cache = make_cache(
            self.store.reader, self.arena, num_bytes, self.store.index.records, backend=backend
        )
        self.pool = ThreadPool(num_threads)
        executor = Executor(
            self.cache, self.pool, backend, hidden=self.args.hidden, top_k=self.args.top_k
        )
        self.model = CausalLM(self.args, self.store.trunk_tensor, executor, self.pool, backend)

    def kv_cache(self, capacity: int = 160, kv_bits: int = 32) -> KVCache:
        return KVCache.for_model(self.args, capacity, kv_bits)

    def close(self) -> None:
        self.store.close()
        self.pool.close()
        self.arena.close()


def greedy(running: Running, prompt: list[int], num_tokens: int) -> tuple[np.ndarray, list[int]]:
    """The logits of the prompt `[T, vocab]`, and the greedy continuation, token by token."""
    kv_cache = running.kv_cache()
    logits = running.model.forward(prompt, kv_cache, logits="all")
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < num_tokens:
        tokens.append(int(running.model.forward(tokens[-1:], kv_cache).argmax()))
    return logits, tokens


@torch.no_grad()
def oracle(model: transformers.PreTrainedModel, prompt: list[int], num_tokens: int):
    """The same two from transformers."""
    output = model(torch.tensor([prompt]), use_cache=True)
    logits, past = output.logits[0], output.past_key_values
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < num_tokens:
        output = model(torch.tensor([tokens[-1:]]), past_key_values=past, use_cache=True)
        tokens.append(int(output.logits[0, -1].argmax()))
    return logits.numpy(), tokens
