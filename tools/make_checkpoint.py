"""Write a random-weight checkpoint of a true shape, with realistic routing, without any download.

    python tools/make_checkpoint.py --shape olmoe-1b-7b --out DIR [--seed N] [--layers N]

Shapes: olmoe-1b-7b (13.8 GB), qwen3-30b-a3b (61 GB), mixtral-8x7b (93 GB), tiny. `--layers` keeps
the first layers only. One shard per layer, bf16, per-expert tensors, named as in the released
checkpoints; config.json with the released values; a byte-level tokenizer made by program.

How routing becomes realistic: random tokens are run through the model while it is written, layer by
layer. Attention is made and run; the router is calibrated on what it will see (the method is in
`random_checkpoint/model.py`); each expert is made, run on the tokens it is chosen for, and written.
Memory holds one attention block and a few experts. Printed for each layer, on tokens that took no
part in the calibration: the hit rate of an LRU of 1/4, 1/2 and 3/4 of the experts.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import chain
from math import prod
from pathlib import Path

import torch
from random_checkpoint import model
from random_checkpoint.maker import Maker
from random_checkpoint.shapes import SHAPES
from random_checkpoint.tokenizer import write_tokenizer
from torch import Tensor

from edgemoe.models import load_module
from edgemoe.models.names import spellings
from edgemoe.quant.disk import OutputFile
from edgemoe.runtime.headers import encode_header


class Shards:
    """Writes numbered shards one after the other, and their index at the end."""

    def __init__(self, path: Path, num_shards: int) -> None:
        self.path, self._num_shards = path, num_shards
        self._weight_map: dict[str, str] = {}
        self._num_done = self._num_bytes = 0

    def write(self, shapes: dict[str, tuple[int, ...]], tensors: Iterator[Tensor]) -> None:
        """One shard. `tensors` gives the bf16 data of `shapes` in order, in pieces of any size."""
        self._num_done += 1
        name = f"model-{self._num_done:05}-of-{self._num_shards:05}.safetensors"
        sizes = [(key, "BF16", shape, 2 * prod(shape)) for key, shape in shapes.items()]
        file = OutputFile(self.path / name, encode_header(sizes, {"format": "pt"}), 0)
        written = 0
        for tensor in tensors:
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())
            written += tensor.nbytes
        file.sync()
        file.close()
        if written != sum(size[3] for size in sizes):
            raise AssertionError(f"{name}: wrote {written} bytes")
        self._num_bytes += written
        self._weight_map |= dict.fromkeys(shapes, name)

    def close(self) -> None:
        index = {"metadata": {"total_size": self._num_bytes}, "weight_map": self._weight_map}
        text = json.dumps(index, indent=1)
        (self.path / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def write_layer(maker: Maker, shards: Shards, layer: int) -> list[float]:
    """Make, run and write one layer; returns the hit rates of three LRU caches."""
    made = maker.attention(layer)
    routing = maker.routing(made)
    shapes = dict(maker.names(layer).values())
    for expert in range(maker.args.num_experts):
        shapes |= maker.expert_shapes(layer, expert)
    down = model.down_std(maker.args, routing.weights)

    def tensors() -> Iterator[Tensor]:
        yield from made.values()
        for matrices in maker.mix(
            layer, routing, maker.experts(layer, maker.args.num_experts, down)
        ):
            yield from matrices

    shards.write(shapes, tensors())
    return maker.hit_rates(routing)


def write_small_files(path: Path, config: dict[str, object]) -> None:
    """Tokenizer, config.json and generation_config.json; end of text goes into `config`."""
    end = write_tokenizer(path, int(str(config["vocab_size"])))
    config["eos_token_id"] = config["pad_token_id"] = end
    generation = {"eos_token_id": end, "do_sample": False}
    for name, document in (("config.json", config), ("generation_config.json", generation)):
        (path / name).write_text(json.dumps(document, indent=2), encoding="utf-8")


def make_checkpoint(
    shape: str, out: Path, seed: int = 0, layers: int | None = None, threads: int = 2
) -> list[float]:
    """Write the checkpoint folder `out`; returns the hit rates, averaged over the layers."""
    config = dict(SHAPES[shape])
    if layers:
        config["num_hidden_layers"] = layers
    if out.exists():
        raise SystemExit(f"`{out}` already exists")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_small_files(partial, config)
    maker = Maker(config, seed, threads)
    args, table = maker.args, maker.module.TRUNK
    shards = Shards(partial, args.num_layers + 2)
    begin, rates = time.monotonic(), []
    with torch.inference_mode():
        embed = {spellings(table, "embed")[0]: (args.vocab, args.hidden)}
        shards.write(embed, maker.embedding())
        for layer in range(args.num_layers):
            rates.append(write_layer(maker, shards, layer))
            text = "/".join(f"{rate:.2f}" for rate in rates[-1])
            rms = float(maker.hidden.square().mean().sqrt())
            elapsed = time.monotonic() - begin
            print(
                f"layer {layer}: LRU hits {text}, hidden rms {rms:.3f}, {elapsed:.0f} s", flush=True
            )
        last = {spellings(table, "norm")[0]: (args.hidden,)}
        last[spellings(table, "lm_head")[0]] = (args.vocab, args.hidden)
        shards.write(last, chain([torch.ones(args.hidden, dtype=torch.bfloat16)], maker.head()))
        shards.close()
    maker.pool.shutdown()
    partial.rename(out)
    return [sum(column) / len(rates) for column in zip(*rates, strict=True)]


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="keep only the first N layers")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rates = make_checkpoint(
        options.shape, options.out, options.seed, options.layers, options.threads
    )
    experts = load_module(SHAPES[options.shape]["model_type"]).parse(SHAPES[options.shape])
    sizes = "/".join(str(experts.num_experts * quarters // 4) for quarters in (1, 2, 3))
    found = "/".join(f"{rate:.3f}" for rate in rates)
    print(f"LRU hit rate with {sizes} of {experts.num_experts} experts: {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
