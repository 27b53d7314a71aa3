"""Write a GGUF of an OLMoE checkpoint and quantize it with llama.cpp, so that both run one model.

    pip install llama-cpp-python gguf
    python tools/peers/make_gguf.py olmoe-1b-7b --out olmoe.gguf --types Q4_0,Q4_K_M

Writes olmoe-Q4_0.gguf and olmoe-Q4_K_M.gguf beside each other; the 16-bit file that they are made
from (13.8 GB for the true shape) is removed at the end unless `--keep`. The checkpoint is a folder
as `tools/make_checkpoint.py` writes it: bf16 shards with one tensor per expert. Matrices keep their
rows as they are (llama.cpp rotates the halves of a head for this architecture, as the checkpoint
does); the experts of a layer are stacked, norms and routers widened to fp32 as llama.cpp expects.
"""

import argparse
import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ARCHITECTURE = "olmoe"
WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}
OF_EXPERTS = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
}
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K_S": 14, "Q4_K_M": 15}  # llama_ftype


def gguf_tensors(config: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Names in the GGUF file, in order, and the checkpoint's tensors that are stacked in each."""
    found = [(theirs, [ours]) for ours, theirs in WHOLE.items()]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        found += [
            (f"blk.{layer}.{theirs}.weight", [f"{prefix}{ours}.weight"])
            for ours, theirs in IN_LAYER.items()
        ]
        for ours, theirs in OF_EXPERTS.items():
            experts = range(config["num_experts"])
            names = [f"{prefix}mlp.experts.{expert}.{ours}.weight" for expert in experts]
            found.append((f"blk.{layer}.{theirs}.weight", names))
    return found


class Checkpoint:
    """The bf16 tensors of a folder of safetensors shards, mapped and read when asked for."""

    def __init__(self, path: Path) -> None:
        index = json.loads((path / "model.safetensors.index.json").read_text(encoding="utf-8"))
        self._shard_of: dict[str, str] = index["weight_map"]
        self._path, self._shard, self._header = path, "", {}
        self._data = np.empty(0, np.uint8)
        self.config = json.loads((path / "config.json").read_text(encoding="utf-8"))

    def bits(self, name: str) -> np.ndarray:
        """The bf16 values as uint16, in the shape of the tensor."""
        shard = self._shard_of[name]
        if shard != self._shard:
            data = np.memmap(self._path / shard, np.uint8, "r")
            num_bytes = int(data[:8].view("<u8")[0])
            self._header = json.loads(bytes(data[8 : 8 + num_bytes]))
            self._data, self._shard = data[8 + num_bytes :], shard
        entry = self._header[name]
        if entry["dtype"] != "BF16":
            raise SystemExit(f"`{name}` is {entry['dtype']}; expected BF16")
        begin, end = entry["data_offsets"]
        return self._data[begin:end].view("<u2").reshape(entry["shape"])


def keeps_fp32(name: str) -> bool:
    """Vectors and routers are fp32 in every GGUF."""
    return "norm" in name or "ffn_gate_inp" in name


def tensor_data(checkpoint: Checkpoint, name: str, parts: list[str]) -> np.ndarray:
    """fp32, or bf16 as bytes (the last axis twice as long), which is what the writer takes."""
    bits = checkpoint.bits(parts[0])
    if len(parts) > 1:
        bits = np.stack([checkpoint.bits(part) for part in parts])
    if keeps_fp32(name):
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(bits).view(np.uint8)


def write_gguf(checkpoint: Checkpoint, path: Path) -> None:
    """The whole model in 16 bits; memory holds the experts of one projection of one layer."""
    import gguf

    config = checkpoint.config
    if config["model_type"] != ARCHITECTURE:
        raise SystemExit(f"`{config['model_type']}`: only {ARCHITECTURE} can be written")
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_name("edgemoe random weights")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _add_vocabulary(writer, checkpoint)
    tensors = gguf_tensors(config)
    for name, parts in tensors:
        shape, stacked = list(checkpoint.bits(parts[0]).shape), [len(parts)][len(parts) == 1 :]
        wide = keeps_fp32(name)
        kind = gguf.GGMLQuantizationType.F32 if wide else gguf.GGMLQuantizationType.BF16
        shape = stacked + shape
        if not wide:
            shape[-1] *= 2  # given in bytes
        num_bytes = int(np.prod(shape)) * (4 if wide else 1)
        dtype = np.dtype(np.float32 if wide else np.uint8)
        writer.add_tensor_info(name, shape, dtype, num_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, parts in tensors:
        writer.write_tensor_data(tensor_data(checkpoint, name, parts))
    writer.close()


def _add_vocabulary(writer: Any, checkpoint: Checkpoint) -> None:
    """The byte-level vocabulary as it came; llama.cpp calls its kind gpt2."""
    import gguf

    document = json.loads((checkpoint._path / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = dict(document["model"]["vocab"])
    control = {each["id"] for each in document["added_tokens"] if each["special"]}
    tokens |= {each["content"]: each["id"] for each in document["added_tokens"]}
    texts = {number: text for text, number in tokens.items()}
    size = checkpoint.config["vocab_size"]
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([texts.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types(
        [
            kinds.UNUSED if number not in texts else kinds.CONTROL if number in control else 1
            for number in range(size)
        ]
    )
    merges = document["model"]["merges"]
    writer.add_token_merges([each if isinstance(each, str) else " ".join(each) for each in merges])
    writer.add_eos_token_id(checkpoint.config["eos_token_id"])
    writer.add_bos_token_id(checkpoint.config["eos_token_id"])
    writer.add_add_bos_token(False)


def quantize(source: Path, target: Path, kind: str, threads: int) -> None:
    """What `llama-quantize SOURCE TARGET KIND` does."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread, params.ftype = threads, FILE_TYPES[kind]
    partial = target.with_name(target.name + ".partial")
    names = str(source).encode(), str(partial).encode()
    if llama_cpp.llama_model_quantize(*names, ctypes.byref(params)):
        raise SystemExit(f"llama.cpp could not write {target}")
    partial.rename(target)


def targets(out: Path, kinds: list[str]) -> Iterator[tuple[str, Path]]:
    """`olmoe.gguf` and Q4_0 -> olmoe-Q4_0.gguf."""
    for kind in kinds:
        yield kind, out.with_name(f"{out.name.removesuffix('.gguf')}-{kind}.gguf")


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="NAME.gguf, the 16-bit file")
    parser.add_argument("--types", default="Q4_0,Q4_K_M", help=f"of {', '.join(FILE_TYPES)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="keep the 16-bit file")
    options = parser.parse_args(arguments)
    kinds = [kind for kind in options.types.split(",") if kind]
    unknown = [kind for kind in kinds if kind not in FILE_TYPES]
    if unknown:
        parser.error(f"unknown type {unknown[0]}; known are {', '.join(FILE_TYPES)}")
    if not options.out.exists():
        partial = options.out.with_name(options.out.name + ".partial")
        write_gguf(Checkpoint(options.checkpoint), partial)
        partial.rename(options.out)
    for kind, target in targets(options.out, kinds):
        if not target.exists():
            quantize(options.out, target, kind, options.threads)
        print(f"{target}: {target.stat().st_size} bytes")
    if not options.keep:
        options.out.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
