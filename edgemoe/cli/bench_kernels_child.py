"""The measuring half of `bench kernels`: one instruction set, one request a line on standard input.

`python -m edgemoe.cli.bench_kernels_child HIDDEN WIDTH POOL_BYTES` answers each request, a JSON
object, with one: one repetition of one format, number of threads and number of tokens per expert.
"""

import ctypes
import hashlib
import json
import random
import sys
import time
from statistics import median
from typing import Any

import numpy as np

from ..runtime import core
from ..runtime.errors import EdgeMoeError
from ..runtime.format import QuantSpec, RecordLayout
from ..runtime.kernels import ThreadPool, pack_record
from ..runtime.memory import Arena

NUM_EXPERTS = 8  # of one layer
REPETITION_S = 0.04
DISTINCT = 4  # packing is slow; equal bytes at other addresses are as cold


class Bench:
    """A pool of packed experts, in the format of the last request."""

    def __init__(self, hidden: int, width: int, pool_bytes: int) -> None:
        self.hidden, self.width = hidden, width
        self.arena = Arena(pool_bytes)
        self.pools: dict[int, ThreadPool] = {}
        self.spec: QuantSpec | None = None
        self.position = 0  # in self.order
        self.swept = 0  # bytes of the pool
        self.hashes: dict[int, str] = {}  # of the output, by number of tokens

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        spec = QuantSpec.from_json(request)
        if spec != self.spec:
            self._fill(spec)
        num_threads, num_tokens = request["threads"], request["tokens"]
        if num_threads not in self.pools:
            self.pools[num_threads] = ThreadPool(num_threads)
        pool = self.pools[num_threads].handle
        # One thread never waits: its processor time leaves out what others took from it.
        self.clock = time.thread_time if num_threads == 1 else time.perf_counter
        if num_tokens not in self.hashes:
            self.hashes[num_tokens] = self._hash(pool, num_tokens)
        result = {"output_hash": self.hashes[num_tokens]}
        return result | (self._decode(pool) if num_tokens == 1 else self._prefill(pool, num_tokens))

    def _fill(self, spec: QuantSpec) -> None:
        layout = RecordLayout(spec, spec, self.hidden, self.width)
        count = self.arena.num_bytes // layout.num_bytes
        if count < 2 * NUM_EXPERTS:
            raise EdgeMoeError(
                f"a pool of {self.arena.num_bytes} bytes holds {count} experts of this format",
                "they would not be cold",
                "raise --pool",
            )
        rng = np.random.default_rng(0)
        shapes = [(self.width, self.hidden)] * 2 + [(self.hidden, self.width)]
        for i in range(count):
            slot = self.arena.view(i * layout.num_bytes, layout.num_bytes)
            if i < DISTINCT:
                slot[:] = pack_record(*(_random_part(rng, shape, spec) for shape in shapes), layout)
            else:
                first = i % DISTINCT * layout.num_bytes
                slot[:] = self.arena.view(first, layout.num_bytes)
        self.spec, self.layout = spec, layout
        # One order, walked in a circle: an expert returns when all others have passed.
        self.order = list(range(count))
        random.Random(1).shuffle(self.order)
        self.position = self.swept = 0
        self.hashes = {}
        self.records = (core.Record * count)()
        for record in self.records:
            record.describe(layout)

    def _next(self) -> list[int]:
        """The experts of the next layer, ascending."""
        if self.position + NUM_EXPERTS > len(self.order):
            self.position = 0
        self.position += NUM_EXPERTS
        return sorted(self.order[self.position - NUM_EXPERTS : self.position])

    def _decode(self, pool: int) -> dict[str, Any]:
        num_bytes = NUM_EXPERTS * self.layout.num_bytes
        layers = [Layer(self, self._next(), 1)]
        slow = layers[0].run(pool)
        layers += [Layer(self, self._next(), 1) for _ in range(min(int(REPETITION_S / slow), 400))]
        # Layer by layer, and medians: an interruption then spoils a slice of each, not the ratio.
        kernel_s, sweep_s = (
            median(times)
            for times in zip(
                *((x.run(pool), self._sweep(pool, num_bytes)) for x in layers), strict=True
            )
        )
        return {
            "bytes_per_s": num_bytes / kernel_s,
            "roof_bytes_per_s": num_bytes / sweep_s,
            "fraction": sweep_s / kernel_s,
            "layer_s": kernel_s,
        }

    def _sweep(self, pool: int, num_bytes: int) -> float:
        """Seconds to read `num_bytes`, a multiple of 4096, of the pool; next time those behind."""
        if self.swept + num_bytes > self.arena.num_bytes:
            self.swept = 0
        address, self.swept = self.arena.address + self.swept, self.swept + num_bytes
        begin = self.clock()
        core.lib.em_memory_sweep(pool, address, num_bytes)
        return self.clock() - begin

    def _prefill(self, pool: int, num_tokens: int) -> dict[str, Any]:
        seconds = Layer(self, self._next(), num_tokens).run(pool)
        macs = 3 * NUM_EXPERTS * num_tokens * self.hidden * self.width
        return {"macs_per_s": macs / seconds, "layer_s": seconds}

    def _hash(self, pool: int, num_tokens: int) -> str:
        layer = Layer(self, list(range(NUM_EXPERTS)), num_tokens)
        layer.run(pool)
        return hashlib.sha256(layer.y.tobytes()).hexdigest()[:16]


class Layer:
    """The arguments of one em_moe_run: every token goes to every expert."""

    def __init__(self, bench: Bench, experts: list[int], num_tokens: int) -> None:
        hidden, width, num_pairs = bench.hidden, bench.width, len(experts) * num_tokens
        rng = np.random.default_rng(2)
        keys = np.array(experts, dtype=np.int32)
        floats = core.lib.em_moe_workspace_floats(num_tokens, num_pairs, hidden, width)
        self.y = np.zeros((num_tokens, hidden), dtype=np.float32)
        self.arrays = {
            "x": rng.standard_normal((num_tokens, hidden), dtype=np.float32),
            "y": self.y,
            "keys": keys,
            "data": np.uint64(bench.arena.address)
            + keys.astype(np.uint64) * np.uint64(bench.layout.num_bytes),
            "pair_begin": np.arange(len(experts) + 1, dtype=np.int64) * num_tokens,
            "pair_token": np.tile(np.arange(num_tokens, dtype=np.int32), len(experts)),
            "pair_weight": np.full(num_pairs, 1 / len(experts), dtype=np.float32),
            "workspace": np.empty(floats, dtype=np.float32),
        }
        self.args = core.MoeArgs(
            num_tokens=num_tokens, hidden=hidden, width=width, num_experts=len(experts)
        )
        for name, array in self.arrays.items():
            setattr(self.args, name, array.ctypes.data)
        self.records, self.clock = bench.records, bench.clock
        self.pointer = ctypes.byref(self.args)

    def run(self, pool: int) -> float:
        """Seconds of the call."""
        begin = self.clock()
        status = core.lib.em_moe_run(pool, None, self.records, self.pointer)
        seconds = self.clock() - begin
        if status:
            raise EdgeMoeError("`em_moe_run` failed", f"status {status}")
        return seconds


def _random_part(rng: np.random.Generator, shape: tuple[int, int], spec: QuantSpec) -> Any:
    """One projection as `pack_record` takes it, its weights about 1 / sqrt(columns)."""
    rows, cols = shape
    size = 1 / cols**0.5
    if spec.is_16bit:
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(size)
        if spec.mode == "fp16":
            return values.astype(np.float16).view(np.uint16)
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    codes = rng.integers(0, 1 << spec.bits, shape, dtype=np.uint8)
    top = 64 if spec.mode == "nf4" else 1 << (spec.bits - 1)
    scales = (rng.random((rows, cols // spec.group_size)) + 0.5) * (size / top)
    mins = -scales * top if spec.mode == "asym" else None
    return codes, scales.astype(np.float16), None if mins is None else mins.astype(np.float16)


def main() -> None:
    bench = Bench(*map(int, sys.argv[1:4]))
    print(json.dumps({"isa": core.lib.em_isa().decode()}), flush=True)
    for line in sys.stdin:
        try:
            answer = bench.answer(json.loads(line))
        except EdgeMoeError as error:
            answer = {"error": [error.what, error.why, error.next_step]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
