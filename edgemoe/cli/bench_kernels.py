"""`edgemoe bench kernels`: the experts' kernels on cold weights, against a sweep of the memory."""

import argparse
import json
import os
import subprocess
import sys
from typing import Any

from ..runtime.amounts import MIB
from ..runtime.errors import EdgeMoeError, UsageError
from ..runtime.format import BITS, GROUP_SIZES, MODES, QuantSpec
from . import options
from .render import note, open_output
from .reports import add_report_options, check_report_options, print_report

DESCRIPTION = """Measure the kernels of the native core on random experts. Needs no model.

For each format and instruction set, one MoE layer of 8 experts is decoded over and over, through
the same call as in an engine, its experts taken in random order from a pool that no cache holds.
After each, a plain sweep reads as many bytes of the same pool: the roof. One thread is timed by its
own processor time, more by the clock."""
EPILOG = """Each instruction set runs in a process of its own, since it is chosen once in a process;
they take turns. A fraction of its roof depends little on what else the machine does, GB/s do.

  edgemoe bench kernels --formats 4-sym-64,2-sym-64 --threads 1,2
  edgemoe bench kernels --formats all --isa avx2
"""
LEVELS = ("amx", "avx512vnni", "avxvnni", "avx2", "neon-i8mm", "neon-dotprod", "scalar")
SHAPES = {"olmoe": (2048, 1024), "qwen3-30b": (2048, 768)}  # hidden, expert width
DEFAULT_FORMATS = "2-sym-64,3-sym-64,4-sym-32,4-sym-64,4-asym-64,4-nf4-64,8-sym-64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--formats",
        type=formats,
        default=DEFAULT_FORMATS,
        metavar="LIST",
        help="BITS-MODE-GROUP,.., bf16, or all (default: the usual ones)",
    )
    parser.add_argument(
        "--isa", type=options.word_list, metavar="LIST", help="default: all but scalar"
    )
    parser.add_argument(
        "--shape",
        type=shape,
        default="olmoe",
        metavar="NAME|HIDDENxWIDTH",
        help=f"of an expert: {', '.join(SHAPES)}, or e.g. 4096x1536 (default: olmoe)",
    )
    parser.add_argument(
        "--pool", type=options.size, default=512 * MIB, metavar="SIZE", help="default: 512MiB"
    )
    parser.add_argument("--threads", type=options.counts, metavar="LIST", help="default: 1,cores")
    parser.add_argument(
        "--tokens",
        type=options.counts,
        default=[8, 32, 128],
        metavar="LIST",
        help="prefill rows: tokens of each expert (default: 8,32,128)",
    )
    parser.add_argument(
        "-r", "--repeats", type=options.count, default=7, metavar="N", help="default: 7"
    )
    add_report_options(parser)


def formats(text: str) -> list[QuantSpec]:
    """`4-sym-64,8-asym-128,4-nf4-64,bf16`, or `all`."""
    if text == "all":
        text = ",".join(
            [f"{b}-{mode}-{g}" for b in BITS[:4] for mode in MODES[:2] for g in GROUP_SIZES]
            + [f"4-nf4-{g}" for g in GROUP_SIZES]
            + ["bf16", "fp16"]
        )
    found = []
    for word in options.word_list(text):
        parts = word.split("-")
        try:
            bits, mode, group = ("16", word, "0") if len(parts) == 1 else parts
            found.append(QuantSpec(int(bits), int(group), mode))
        except (ValueError, EdgeMoeError) as error:
            raise UsageError(f"`{word}` is no format", str(error), "write 4-sym-64") from error
    if not found:
        raise UsageError("no formats given", "the list is empty", "write 4-sym-64")
    return found


def shape(text: str) -> tuple[int, int]:
    """Hidden size and expert width."""
    if text in SHAPES:
        return SHAPES[text]
    hidden, _, width = text.partition("x")
    if hidden.isdigit() and width.isdigit() and int(hidden) and int(width):
        return int(hidden), int(width)
    raise UsageError(
        f"`{text}` is no shape of an expert", f"expected {', '.join(SHAPES)} or HIDDENxWIDTH"
    )


def run(args: argparse.Namespace) -> int:
    from ..config import num_cores
    from ..runtime import core

    check_report_options(args)
    if core.lib is None:
        raise EdgeMoeError(
            "there is nothing to measure", "the native core is not built", "install edgemoe anew"
        )
    open_output()
    args.threads = args.threads or sorted({1, num_cores()})
    document = measure(args)
    from .bench_kernels_report import tables

    print_report(document, args, lambda: tables(document, args.markdown))
    return 0


class Child:
    """A process that measures one instruction set; see `bench_kernels_child`."""

    def __init__(self, isa: str, args: argparse.Namespace, pool_bytes: int) -> None:
        self.isa = isa
        environment = os.environ | {"EDGEMOE_ISA": isa}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        hidden, width = args.shape
        program = f"{__package__}.bench_kernels_child"
        self.process = subprocess.Popen(
            [sys.executable, "-m", program, str(hidden), str(width), str(pool_bytes)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.found = self._answer()["isa"]

    def ask(self, spec: QuantSpec, num_threads: int, num_tokens: int) -> dict[str, Any]:
        request = spec.to_json() | {"threads": num_threads, "tokens": num_tokens}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise EdgeMoeError(
                f"the measurement of `{self.isa}` ended early",
                f"exit code {self.process.wait()}",
                "lower --pool",
            )
        answer = json.loads(line)
        if "error" in answer:
            raise EdgeMoeError(*answer["error"])
        return answer

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All rows with all their repetitions."""
    import psutil

    from .bench_limits import machine

    wanted = args.isa or [level for level in LEVELS if level != "scalar"]
    free = psutil.virtual_memory().available
    pool_bytes = min(args.pool, free // (2 * len(wanted)))
    if pool_bytes < args.pool:
        note(f"note: pools of {pool_bytes // MIB} MiB, since {free // MIB} MiB are free")
    children: list[Child] = []
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    try:
        for isa in wanted:
            child = Child(isa, args, pool_bytes)
            children.append(child)
            if child.found != isa:
                if args.isa:
                    raise UsageError(f"this machine has no `{isa}`", f"it has `{child.found}`")
                children.pop().close()
        for spec in args.formats:
            for _ in range(args.repeats):
                for num_tokens in (1, *args.tokens):
                    for child in children:
                        for num_threads in args.threads:
                            key = (child.isa, spec, num_threads, num_tokens)
                            row = rows.setdefault(key, row_of(*key))
                            row["rounds"].append(child.ask(spec, num_threads, num_tokens))
    finally:
        for child in children:
            child.close()
    hidden, width = args.shape
    return {
        "machine": machine(),
        "hidden": hidden,
        "width": width,
        "pool_bytes": pool_bytes,
        "repeats": args.repeats,
        "rows": list(rows.values()),
    }


def row_of(isa: str, spec: QuantSpec, num_threads: int, num_tokens: int) -> dict[str, Any]:
    return spec.to_json() | {
        "isa": isa,
        "threads": num_threads,
        "tokens": num_tokens,
        "rounds": [],
    }
