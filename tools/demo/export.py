"""Write a trained checkpoint as a Hugging Face OLMoE folder."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from model import DemoConfig, DemoModel
from safetensors.torch import load_file, save_file
from tokenizer import ASSISTANT, END, END_OF_TEXT
from tokenizers import Tokenizer
from torch import Tensor

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# Answers were trained in rows of at most this many tokens.
CONTEXT = 512


def load_checkpoint(path: Path) -> DemoModel:
    """The model of a checkpoint that `train.py` wrote."""
    state = torch.load(path, weights_only=True, map_location="cpu")
    model = DemoModel(DemoConfig(num_layers=state["num_layers"]))
    model.load_state_dict(state["model"])
    return model.eval()


def load_folder(folder: Path) -> DemoModel:
    """The model of a folder that `export` wrote, in fp32."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = DemoModel(DemoConfig(num_layers=values["num_hidden_layers"]))
    saved = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, tensor in tensors(model).items():
            tensor.copy_(saved[name])
    return model.eval()


def tensors(model: DemoModel) -> dict[str, Tensor]:
    """All weights under their Hugging Face names."""
    out = {"model.embed_tokens.weight": model.embed, "model.norm.weight": model.norm.weight}
    width = model.cfg.expert_width
    for i, layer in enumerate(model.layers):
        at = f"model.layers.{i}."
        for j, name in enumerate(("q_proj", "k_proj", "v_proj")):
            out[f"{at}self_attn.{name}.weight"] = layer.qkv[j]
        out[f"{at}self_attn.o_proj.weight"] = layer.out
        out[f"{at}self_attn.q_norm.weight"] = layer.q_norm.weight
        out[f"{at}self_attn.k_norm.weight"] = layer.k_norm.weight
        out[f"{at}input_layernorm.weight"] = layer.input_norm.weight
        out[f"{at}post_attention_layernorm.weight"] = layer.post_norm.weight
        out[f"{at}mlp.gate.weight"] = layer.router
        for e in range(model.cfg.num_experts):
            expert = f"{at}mlp.experts.{e}."
            out[f"{expert}gate_proj.weight"] = layer.gate_up[e, :width]
            out[f"{expert}up_proj.weight"] = layer.gate_up[e, width:]
            out[f"{expert}down_proj.weight"] = layer.down[e]
    return {name: tensor.detach() for name, tensor in out.items()}


def config(cfg: DemoConfig, ids: dict[str, int], dtype: str) -> dict[str, object]:
    """The contents of `config.json`."""
    return {
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "clip_qkv": None,
        "eos_token_id": ids[END],
        "hidden_act": "silu",
        "hidden_size": cfg.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": cfg.expert_width,
        "max_position_embeddings": CONTEXT,
        "model_type": "olmoe",
        "norm_topk_prob": False,
        "num_attention_heads": cfg.num_heads,
        "num_experts": cfg.num_experts,
        "num_experts_per_tok": cfg.top_k,
        "num_hidden_layers": cfg.num_layers,
        "num_key_value_heads": cfg.num_heads,
        "output_router_logits": False,
        "pad_token_id": ids[END_OF_TEXT],
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": cfg.rope_theta,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": cfg.vocab_size,
    }


def export(model: DemoModel, tokenizer: Path, out: Path, dtype: str) -> None:
    """Write configuration, weights and tokenizer to the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    vocabulary = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    ids = {name: vocabulary.token_to_id(name) for name in (END, END_OF_TEXT, ASSISTANT)}
    _json(out / "config.json", config(model.cfg, ids, dtype))
    generation = {
        "do_sample": False,
        "eos_token_id": [ids[END], ids[END_OF_TEXT]],
        "max_new_tokens": 128,
        "pad_token_id": ids[END_OF_TEXT],
    }
    _json(out / "generation_config.json", generation)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).resolve() != (out / name).resolve():
            shutil.copyfile(tokenizer / name, out / name)
    kept = {n: t.to(getattr(torch, dtype)).contiguous() for n, t in tensors(model).items()}
    temporary = out / "model.safetensors.tmp"
    save_file(kept, temporary, metadata={"format": "pt"})
    temporary.chmod(0o644)
    temporary.replace(out / "model.safetensors")


def check(out: Path) -> float:
    """Largest difference between our logits and those of transformers, both in fp32."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ours = load_folder(out)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, ours.cfg.vocab_size, (2, 96), generator=generator)
    with torch.no_grad():
        hidden, _, _ = ours(tokens)
        return float((ours.logits(hidden) - theirs(tokens).logits).abs().max())


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Export a checkpoint; with --check also compare with transformers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint.pt")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of tokenizer.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--check", action="store_true", help="compare with transformers")
    args = parser.parse_args()
    model = load_checkpoint(args.checkpoint)
    export(model, args.tokenizer, args.out, args.dtype)
    print(f"wrote {args.out}")
    if args.check:
        difference = check(args.out)
        print(f"largest logit difference from transformers: {difference:.2e}")
        if difference >= 1e-3:
            raise SystemExit("the exported model does not agree with transformers")


if __name__ == "__main__":
    main()
