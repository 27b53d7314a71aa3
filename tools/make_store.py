"""Write a store of a true shape with random weights and realistic routing, without a checkpoint.

    python tools/make_store.py --shape qwen3-30b-a3b --out qwen3-30b-a3b.edgemoe --trunk-bits 4
    python tools/make_store.py --like gpt-oss-120b.npz --fraction 0.01 --out small.edgemoe

`--like TRACE` takes layers, experts and top-k of a recorded routing, for `edgemoe bench --replay`,
and hidden size and expert width such that a record has that share of the recorded one's bytes.
`--set KEY=VALUE` changes config.json of any shape.

For shapes whose checkpoint would not fit on the disk (61 GB for this one; the store has 17 GB).
Trunk, routers and their calibration are those of `make_checkpoint.py`; quantizer, layout and the
checks are those of `edgemoe convert`. Only `--pool` different experts are made and quantized (32 by
default) and dealt to the layers in turn: every record has its own bytes on disk and its own place
in the cache, but several hold the same weights. Speed, hits and memory are those of the shape; the
text that such a model writes says nothing, which holds for all random weights.

Holds the 16-bit trunk in memory (3.1 GB for this shape).
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import repeat
from math import sqrt
from pathlib import Path

import torch
from make_checkpoint import write_small_files
from random_checkpoint import model
from random_checkpoint.maker import Expert, Maker
from random_checkpoint.shapes import SHAPES
from torch import Tensor

from edgemoe.models.names import spellings
from edgemoe.quant.checkpoint import SINGLE_FILE, Checkpoint
from edgemoe.quant.convert import finish_store, write_trunk
from edgemoe.quant.disk import OutputFile
from edgemoe.quant.identity import fingerprint
from edgemoe.quant.journal import Partial, check_target, partial_path
from edgemoe.quant.options import DEFAULT_GROUP_SIZE, ConvertOptions, ExpertSpec
from edgemoe.quant.pack import Record, pack_expert
from edgemoe.quant.plan import make_plan
from edgemoe.quant.progress import Progress, Silent
from edgemoe.quant.sources import Source
from edgemoe.runtime.format import RecordLayout
from edgemoe.runtime.headers import encode_header
from edgemoe.runtime.index import EXPERTS_FILE, save_index
from edgemoe.runtime.trace import Trace

POOL = 32
STRIDE = 7  # a layer's deal begins so many experts further on than that of the layer before


class Described(Checkpoint):
    """A checkpoint of which only the description is on disk; trunk weights come from `made`."""

    def __init__(self, path: Path, made: dict[str, Tensor]) -> None:
        super().__init__(path)
        self._made = made

    def read_blocks(self, source: Source, block_bytes: int, multiple: int) -> Iterator[Tensor]:
        """Rows of a trunk tensor, as `Checkpoint.read_blocks` gives them."""
        tensor = self._made[source.name]
        row_bytes = max(1, tensor.nbytes // max(1, tensor.shape[0]))
        step = max(multiple, block_bytes // row_bytes // multiple * multiple)
        for begin in range(0, tensor.shape[0], step):
            yield tensor[begin : begin + step]


def describe(path: Path, config: dict[str, object], maker: Maker) -> None:
    """A checkpoint folder whose one shard is a header and a hole as large as the weights."""
    path.mkdir(parents=True)
    write_small_files(path, config)
    args, table = maker.args, maker.module.TRUNK
    shapes: dict[str, tuple[int, ...]] = {
        spellings(table, "embed")[0]: (args.vocab, args.hidden),
        spellings(table, "norm")[0]: (args.hidden,),
        spellings(table, "lm_head")[0]: (args.vocab, args.hidden),
    }
    for layer in range(args.num_layers):
        shapes |= dict(maker.names(layer).values())
        for expert in range(args.num_experts):
            shapes |= maker.expert_shapes(layer, expert)
    sizes = [(name, "BF16", shape, 2 * _count(shape)) for name, shape in shapes.items()]
    header = encode_header(sizes, {"format": "pt"})
    with open(path / SINGLE_FILE, "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(size[3] for size in sizes))


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def dealt(layer: int, expert: int, pool: int) -> int:
    """Which expert of the pool a record holds."""
    return (expert + layer * STRIDE) % pool


def config_like(trace: Trace, record_bytes: float, bits: int) -> dict[str, object]:
    """config.json of a store on which the trace can be replayed, with records of about so many
    bytes: a square expert, heads of 64."""
    bpw = 16.0 if bits == 16 else bits + 16 / DEFAULT_GROUP_SIZE
    side = max(64, 64 * round(sqrt(record_bytes * 8 / bpw / 3) / 64))
    heads = side // 64
    return SHAPES["qwen3-30b-a3b"] | {
        "head_dim": 64,
        "hidden_size": side,
        "intermediate_size": side,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": side,
        "num_attention_heads": heads,
        "num_experts": int(trace.num_experts.max()),
        "num_experts_per_tok": trace.experts.shape[2],
        "num_hidden_layers": trace.num_places,
        "num_key_value_heads": max(n for n in range(1, 9) if heads % n == 0),
        "vocab_size": 2048,
    }


def make_store(
    config: dict[str, object],
    out: Path,
    options: ConvertOptions,
    *,
    pool: int = POOL,
    seed: int = 0,
    threads: int = 2,
    progress: Progress | None = None,
) -> list[float]:
    """Write the store `out` for a model of this config.json; returns the hit rates, averaged over
    the layers."""
    config = dict(config)
    check_target(out)
    shutil.rmtree(partial_path(out), ignore_errors=True)  # what an interrupted run has left
    described = out.with_name(out.name + ".described")
    shutil.rmtree(described, ignore_errors=True)
    maker, made = Maker(config, seed, threads), {}
    try:
        describe(described, config, maker)
        with Described(described, made) as checkpoint, torch.inference_mode():
            plan = make_plan(checkpoint, options)
            plan.notes.append(f"random weights; {pool} different experts, dealt to all layers")
            partial = Partial.open(out, fingerprint(checkpoint, options))
            try:
                file = partial.open_file(EXPERTS_FILE, plan.experts_header, 0)
                try:
                    spec = options.spec
                    rates = _layers(maker, made, plan.layouts, spec, partial, file, pool)
                finally:
                    file.close()
                write_trunk(checkpoint, plan, partial, progress or Silent())
                made.clear()
                save_index(finish_store(checkpoint, plan, partial, progress or Silent()))
                partial.publish()
            finally:
                partial.close()
    finally:
        maker.pool.shutdown()
        shutil.rmtree(described, ignore_errors=True)
    return [sum(column) / len(rates) for column in zip(*rates, strict=True)]


def _layers(
    maker: Maker,
    made: dict[str, Tensor],
    layouts: dict[tuple[int, int], RecordLayout],
    spec: ExpertSpec,
    partial: Partial,
    file: OutputFile,
    pool: int,
) -> list[list[float]]:
    """Make all layers and write their experts; the trunk goes into `made`."""
    args, table = maker.args, maker.module.TRUNK
    begin, rates = time.monotonic(), []
    made[spellings(table, "embed")[0]] = torch.cat(list(maker.embedding()))
    experts: list[Expert] = []
    records: list[Record] = []
    for layer in range(args.num_layers):
        slots = maker.attention(layer)
        routing = maker.routing(slots)
        names = maker.names(layer)
        made |= {names[slot][0]: tensor for slot, tensor in slots.items()}
        if not experts:  # the spread of the first layer's routing weights serves all
            down = model.down_std(args, routing.weights)
            experts = list(maker.experts(layer, pool, down))
            same = repeat(layouts[args.moe_layers[0], 0]), repeat(spec)
            records = list(maker.pool.map(pack_expert, experts, *same))
        chosen = [dealt(layer, expert, pool) for expert in range(args.num_experts)]
        for _ in maker.mix(layer, routing, (experts[number] for number in chosen)):
            pass
        for number in chosen:
            file.write(records[number][0])
        file.sync()
        partial.layer_to_crcs[layer] = [records[number][1] for number in chosen]
        partial.save()
        rates.append(maker.hit_rates(routing))
        text = "/".join(f"{rate:.2f}" for rate in rates[-1])
        print(f"layer {layer}: LRU hits {text}, {time.monotonic() - begin:.0f} s", flush=True)
    made[spellings(table, "norm")[0]] = torch.ones(args.hidden, dtype=torch.bfloat16)
    made[spellings(table, "lm_head")[0]] = torch.cat(list(maker.head()))
    return rates


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--shape", choices=sorted(SHAPES))
    kind.add_argument("--like", type=Path, metavar="TRACE", help="a store to replay this trace on")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the trace's record size")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--trunk-bits", type=int, default=8)
    parser.add_argument("--pool", type=int, default=POOL)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="keep only the first N layers")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if given.like:
        trace = Trace.load(given.like)
        record_bytes = given.fraction * float(trace.expert_bytes.mean())
        config = config_like(trace, record_bytes, given.bits)
    else:
        config = dict(SHAPES[given.shape])
    for text in given.set:
        key, _, value = text.partition("=")
        config[key] = json.loads(value)
    if given.layers:
        config["num_hidden_layers"] = given.layers
    options = ConvertOptions(bits=given.bits, trunk_bits=given.trunk_bits)
    rates = make_store(
        config,
        given.out,
        options,
        pool=given.pool,
        seed=given.seed,
        threads=given.threads,
    )
    print("LRU hit rate with 1/4, 1/2, 3/4 of the experts: " + json.dumps(rates))
    return 0


if __name__ == "__main__":
    sys.exit(main())
