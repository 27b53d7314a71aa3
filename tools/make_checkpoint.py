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
from concurrent.futures import ThreadPoolExecutor
from math import prod, sqrt
from pathlib import Path

import torch
from random_checkpoint import model
from random_checkpoint.shapes import SHAPES
from random_checkpoint.tokenizer import SPECIAL, write_tokenizer
from torch import Tensor

from edgemoe.models import load_module
from edgemoe.models.names import layer_slots, spellings
from edgemoe.quant.journal import OutputFile
from edgemoe.runtime.format import encode_header

NUM_CALIBRATION = 512  # tokens whose mean calibrates the routers
NUM_MEASURED = 384  # tokens after them, on which hit rates are counted
_ROWS = 4096  # of the embedding and the head, made at once


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


class Maker:
    """Makes one checkpoint in order; `hidden` [T, D] is what the tokens have become."""

    def __init__(self, config: dict[str, object], path: Path, seed: int, threads: int) -> None:
        self.module = load_module(str(config["model_type"]))
        self.args = self.module.parse(config)
        self.shards = Shards(path, self.args.num_layers + 2)
        self.gaussian = model.Gaussian(seed)
        self.pool = ThreadPoolExecutor(threads)
        self.threads = threads
        generator = torch.Generator().manual_seed(seed)
        count = NUM_CALIBRATION + NUM_MEASURED
        self.tokens = torch.randint(self.args.vocab - len(SPECIAL), (count,), generator=generator)
        self.hidden = torch.empty(count, self.args.hidden)

    def embedding(self) -> None:
        args = self.args
        common = self.gaussian.matrix((args.hidden,), model.EMBED_RMS, 0, 0)

        def blocks() -> Iterator[Tensor]:
            for begin in range(0, args.vocab, _ROWS):
                rows = min(_ROWS, args.vocab - begin)
                noise = self.gaussian.matrix((rows, args.hidden), model.EMBED_RMS, 0, 1, begin)
                block = (noise.float() + common.float()).to(torch.bfloat16)
                mine = (self.tokens >= begin) & (self.tokens < begin + rows)
                self.hidden[mine] = block[self.tokens[mine] - begin].float()
                yield block

        name = spellings(self.module.TRUNK, "embed")[0]
        self.shards.write({name: (args.vocab, args.hidden)}, blocks())

    def layer(self, layer: int) -> list[float]:
        """Make, run and write one layer; returns the hit rates of three LRU caches."""
        args, module = self.args, self.module
        trunk = {
            slot: (spellings(module.TRUNK, slot, layer)[0], shape)
            for slot, shape in layer_slots(args, layer)
        }
        made: dict[str, Tensor] = {}
        for number, (slot, (_, shape)) in enumerate(trunk.items()):
            if len(shape) == 1:
                made[slot] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                std = model.unit_std(shape[1])
                made[slot] = self.gaussian.matrix(shape, std, 1, layer, number)
        x = model.rms_norm(self.hidden, args.rms_eps)
        names = ("layer.q", "layer.k", "layer.v")
        inner = model.attention_inner(args, x, *(made[name] for name in names))
        scale = model.BLOCK_RMS / float(inner.square().mean().sqrt())
        made["layer.o"] = (made["layer.o"].float() * scale).to(torch.bfloat16)
        self.hidden += inner @ made["layer.o"].float().T
        x = model.rms_norm(self.hidden, args.rms_eps)
        router = model.calibrate_router(made["layer.router"], x[:NUM_CALIBRATION])
        made["layer.router"] = router
        ids, weights = model.route(args, router, x)
        shapes = dict(trunk.values())
        wide, tall = (args.expert_width, args.hidden), (args.hidden, args.expert_width)
        for expert in range(args.num_experts):
            for proj, shape in (("gate", wide), ("up", wide), ("down", tall)):
                shapes[module.expert_tensor(layer, expert, proj)] = shape

        def tensors() -> Iterator[Tensor]:
            yield from made.values()
            total = torch.zeros_like(self.hidden)
            for expert, matrices in enumerate(self._experts(layer, model.down_std(args, weights))):
                token, slot = (ids == expert).nonzero(as_tuple=True)
                out = model.expert_output(x[token], *matrices)
                total.index_add_(0, token, out * weights[token, slot, None])
                yield from matrices
            self.hidden += total

        self.shards.write(shapes, tensors())
        if not torch.isfinite(self.hidden).all():
            raise AssertionError(f"layer {layer}: hidden states are not finite")
        capacities = [args.num_experts * quarters // 4 for quarters in (1, 2, 3)]
        return [model.lru_hit_rate(ids, size, NUM_CALIBRATION) for size in capacities]

    def _experts(self, layer: int, down: float) -> Iterator[list[Tensor]]:
        """The matrices of every expert in order; the next ones are made meanwhile."""
        args = self.args
        wide, tall = (args.expert_width, args.hidden), (args.hidden, args.expert_width)
        std = model.unit_std(args.hidden)

        def make(expert: int) -> list[Tensor]:
            kinds = ((wide, std), (wide, std), (tall, down))
            return [
                self.gaussian.matrix(shape, spread, 2, layer, expert, proj)
                for proj, (shape, spread) in enumerate(kinds)
            ]

        waiting = [self.pool.submit(make, e) for e in range(min(self.threads, args.num_experts))]
        for expert in range(args.num_experts):
            matrices = waiting.pop(0).result()
            if expert + self.threads < args.num_experts:
                waiting.append(self.pool.submit(make, expert + self.threads))
            yield matrices
            del matrices

    def head(self) -> None:
        args, table = self.args, self.module.TRUNK
        mean = model.rms_norm(self.hidden, args.rms_eps).mean(0)
        mean /= mean.norm()
        std = model.LOGIT_STD / sqrt(args.hidden)

        def blocks() -> Iterator[Tensor]:
            yield torch.ones(args.hidden, dtype=torch.bfloat16)
            for begin in range(0, args.vocab, _ROWS):
                shape = (min(_ROWS, args.vocab - begin), args.hidden)
                block = self.gaussian.matrix(shape, std, 3, begin).float()
                yield (block - torch.outer(block @ mean, mean)).to(torch.bfloat16)

        shapes = {spellings(table, "norm")[0]: (args.hidden,)}
        shapes[spellings(table, "lm_head")[0]] = (args.vocab, args.hidden)
        self.shards.write(shapes, blocks())
        self.shards.close()


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
    vocab = int(config["vocab_size"])
    config["eos_token_id"] = config["pad_token_id"] = write_tokenizer(partial, vocab)
    generation = {"eos_token_id": config["eos_token_id"], "do_sample": False}
    for name, document in (("config.json", config), ("generation_config.json", generation)):
        (partial / name).write_text(json.dumps(document, indent=2), encoding="utf-8")
    maker = Maker(config, partial, seed, threads)
    begin, rates = time.monotonic(), []
    with torch.inference_mode():
        maker.embedding()
        for layer in range(maker.args.num_layers):
            rates.append(maker.layer(layer))
            text = "/".join(f"{rate:.2f}" for rate in rates[-1])
            rms = float(maker.hidden.square().mean().sqrt())
            elapsed = time.monotonic() - begin
            print(
                f"layer {layer}: LRU hits {text}, hidden rms {rms:.3f}, {elapsed:.0f} s", flush=True
            )
        maker.head()
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
