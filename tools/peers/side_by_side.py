"""edgemoe and llama.cpp on one model, one machine, one hour: a table with medians and ratios.

    python tools/make_checkpoint.py --shape olmoe-1b-7b --out olmoe-1b-7b
    edgemoe convert olmoe-1b-7b --out olmoe.edgemoe --trunk-bits 4
    pip install llama-cpp-python gguf
    python tools/peers/make_gguf.py olmoe-1b-7b --out olmoe.gguf --types Q4_0,Q4_K_M
    python tools/peers/side_by_side.py --store olmoe.edgemoe \\
        --gguf olmoe-Q4_0.gguf,olmoe-Q4_K_M.gguf
    python tools/peers/side_by_side.py --store olmoe.edgemoe --gguf olmoe-Q4_0.gguf \\
        --limits 75%,50%,33%,25% --decode 64 --peer-decode 24
    ... the same with --read-limit 500MB/s

Each measurement is a process of its own, and rounds go through all of them in turn, so that a slow
minute hits all alike. All are given the same uniformly random token ids; the continuation is fed
token by token. Resident rows: a warm-up round in the process, then `--repeats` measured ones.

With `--limits` (shares of the first GGUF's size, or sizes; Linux, root) each process runs in a
fresh control group, where anonymous memory and page cache count, after the page cache was dropped,
and the disk's read-ahead is 128 KiB as on most machines; edgemoe gets the limit as its budget,
llama.cpp maps its file without repacking, which is its way to run there. There the first round
counts, cold as it is, and decoding is timed from the `--settle`th token on.

Needs psutil beside the two engines. The peer may live in another environment: `--peer-python`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import correlation, median
from typing import Any

from measure import random_tokens

HERE = Path(__file__).resolve().parent
WATCH = HERE.parent / "watch_memory.py"
READ_AHEAD = "128KiB"
NUM_SPECIAL = 4  # ids at the end of the vocabulary that no text has
HEADER = (
    "limit",
    "engine",
    "prefill tok/s",
    "decode tok/s",
    "prefill ratio",
    "decode ratio",
    "anonymous",
    "page cache",
    "read",
    "load s",
)


@dataclass(slots=True)
class Arm:
    """One engine in one mode under one limit (None: all memory); `rounds` has its results."""

    limit: str
    limit_bytes: int | None
    engine: str
    command: list[str]
    rounds: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""


def parse_limit(word: str, model_bytes: int) -> int | None:
    """`none`, a share of the model's bytes such as 25%, or a size in bytes, kB, MB or GB."""
    if word == "none":
        return None
    units = {"%": model_bytes / 100, "MiB": 1 << 20, "GiB": 1 << 30, "MB": 1e6, "GB": 1e9}
    for unit, scale in units.items():
        if word.endswith(unit):
            return int(float(word.removesuffix(unit)) * scale)
    return int(word)


def make_arms(options: argparse.Namespace, tokens: Path, with_peer: bool) -> Iterator[Arm]:
    """All arms, in the order of a round."""
    ggufs = [Path(name) for name in options.gguf.split(",")]
    given = ["--tokens", str(tokens), "--threads", str(options.threads)]
    ours = [sys.executable, str(HERE / "run_edgemoe.py"), str(options.store), *given]
    for limit in options.limits.split(","):
        num_bytes = parse_limit(limit, ggufs[0].stat().st_size)
        if num_bytes is None:
            rounds = ["--repeats", str(options.repeats)]
            yield Arm(limit, None, "edgemoe", [*ours, *rounds])
            peers = [(gguf, mode) for gguf in ggufs for mode in options.modes.split(",")]
        else:
            rounds = ["--no-warm-up", "--decode", str(options.peer_decode or options.decode)]
            cold = ["--no-warm-up", "--memory", str(num_bytes)]
            yield Arm(limit, num_bytes, "edgemoe", [*ours, *cold])
            peers = [(ggufs[0], "mmap")]
        for gguf, mode in peers if with_peer else ():
            program = [options.peer_python, str(HERE / "run_llama_cpp.py"), str(gguf)]
            name = f"llama.cpp {gguf.stem.rpartition('-')[2]} {mode}"
            yield Arm(limit, num_bytes, name, [*program, "--mode", mode, *given, *rounds])


def run_arm(arm: Arm, options: argparse.Namespace) -> None:
    """One process; its result and what was seen from outside go into `arm.rounds`."""
    watch = [sys.executable, str(WATCH), "--on", str(options.store)]
    if arm.limit_bytes is not None:
        watch += ["--limit", str(arm.limit_bytes), "--read-ahead", READ_AHEAD, "--drop-caches"]
    if options.read_limit:
        watch += ["--read-limit", options.read_limit]
    command = [*watch, "--", *arm.command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        arm.failure = f"not done in {options.timeout} s"
        return
    if done.returncode:
        reason = "killed for memory" if done.returncode == 137 else ""
        arm.failure = reason or f"exit {done.returncode}: {done.stderr.strip()[-300:]}"
        return
    result = json.loads(done.stdout.splitlines()[-1])
    arm.rounds.append(result | {"outside": json.loads(done.stderr.splitlines()[-1])})


def samples(arm: Arm, name: str, settle: int) -> list[float]:
    """All measured speeds of an arm; of decoding, from token `settle` on where it started cold."""
    if name == "decode_tokens_per_s" and arm.limit_bytes is not None:
        steps = [step[settle:] for each in arm.rounds for step in each["step_s"]]
        return [len(step) / sum(step) for step in steps if step]
    return [value for each in arm.rounds for value in each[name]]


def table(arms: list[Arm], settle: int) -> str:
    """Markdown; ratios are edgemoe's median over the peer's in the same row group."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---" + "|---:" * (len(HEADER) - 2) + "|"]
    ours = {arm.limit: arm for arm in arms if arm.engine == "edgemoe"}
    for arm in arms:
        if not arm.rounds:
            lines.append(f"| {arm.limit} | {arm.engine} | {arm.failure} " + "| " * 7 + "|")
            continue
        speeds, ratios = [], []
        for name in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            mine, base = samples(arm, name, settle), samples(ours[arm.limit], name, settle)
            speeds.append(_speed(mine))
            share = f"{median(base) / median(mine):.2f}" if base and mine else ""
            ratios.append("" if arm is ours[arm.limit] else share)
        outside = [each["outside"] for each in arm.rounds]
        anonymous = max(each["anonymous"] for each in outside)
        cached = max(each.get("page_cache", each["file_backed"]) for each in outside)
        read = median(each["read"] for each in outside)
        load = median(each["load_s"] for each in arm.rounds)
        limit = arm.limit
        if arm.limit_bytes is not None:
            limit += f" = {arm.limit_bytes / 1e6:.0f} MB"
        cells = (limit, arm.engine, *speeds, *ratios)
        sizes = (f"{value / 1e9:.2f} GB" for value in (anonymous, cached, read))
        lines.append("| " + " | ".join((*cells, *sizes, f"{load:.1f}")) + " |")
    return "\n".join(lines)


def _speed(values: list[float]) -> str:
    if not values:
        return "-"
    spread = " ".join(f"{value:.3g}" for value in values)
    return f"{median(values):.1f} ({spread})" if len(values) > 1 else f"{values[0]:.1f}"


def agreement(arms: list[Arm], decode: int) -> str:
    """Correlation of the logits after the last token with those of edgemoe.

    Two ways to round one model to 4 bits correlate at about .8 where the weights are random, which
    have no margin between tokens; a wrong conversion does not correlate at all.
    """
    lists = {
        arm.engine: arm.rounds[-1]["logits"]
        for arm in arms
        if arm.rounds and len(arm.rounds[-1]["step_s"][-1]) == decode
    }
    if "edgemoe" not in lists or len(lists) < 2:
        return ""
    mine = lists.pop("edgemoe")
    parts = [f"{engine} {correlation(mine, theirs):.2f}" for engine, theirs in lists.items()]
    return "correlation of logits with edgemoe: " + ", ".join(parts)


def can_limit() -> str:
    """Why control groups cannot be used here; empty where they can."""
    if not sys.platform.startswith("linux"):
        return "control groups are a Linux feature"
    return "" if os.geteuid() == 0 else "control groups need root"


def has_peer(python: str) -> bool:
    """Whether that Python has llama.cpp."""
    code = "import importlib.util as u; raise SystemExit(u.find_spec('llama_cpp') is None)"
    return subprocess.run([python, "-c", code]).returncode == 0


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--gguf", required=True, help="one or more, with commas between")
    parser.add_argument("--limits", default="none", help="such as none,75%%,50%%,2GiB")
    parser.add_argument("--read-limit", help="throttle reading, such as 500MB/s")
    parser.add_argument("--modes", default="repack,mmap", help="of llama.cpp without a limit")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--peer-decode", type=int, help="tokens for a limited peer, if fewer")
    parser.add_argument("--settle", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="in one resident process")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one process")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--json", type=Path, help="all results, as a JSON file")
    options = parser.parse_args(arguments)
    limits = options.limits.split(",")
    refusal = can_limit()
    if refusal and (options.read_limit or limits != ["none"]):
        print(f"skipped: every limited row, since {refusal}", file=sys.stderr)
        options.limits, options.read_limit = "none", None
        if "none" not in limits:
            return 1
    with_peer = has_peer(options.peer_python)
    if not with_peer:
        print("skipped: llama.cpp; pip install llama-cpp-python, or --peer-python", file=sys.stderr)
    vocab = json.loads((options.store / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    ids = random_tokens(vocab - NUM_SPECIAL, options.prompt, options.decode, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder, "tokens.json")
        tokens.write_text(json.dumps(ids), encoding="utf-8")
        arms = list(make_arms(options, tokens, with_peer))
        for turn in range(options.rounds):
            for arm in arms:
                if not arm.failure:
                    print(
                        f"round {turn + 1}: {arm.limit} {arm.engine}", file=sys.stderr, flush=True
                    )
                    run_arm(arm, options)
    if options.json:
        rows = [
            {"limit": arm.limit, "limit_bytes": arm.limit_bytes, "engine": arm.engine}
            | {"rounds": arm.rounds, "failure": arm.failure}
            for arm in arms
        ]
        settings = {key: str(value) for key, value in vars(options).items()}
        options.json.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1))
    throttle = f", reads throttled to {options.read_limit}" if options.read_limit else ""
    print(
        f"{options.prompt} random prompt tokens, {options.decode} decoded at that context, "
        f"{options.threads} threads{throttle}\n"
    )
    print(table(arms, options.settle))
    print("\n" + agreement(arms, options.decode))
    return 0


if __name__ == "__main__":
    sys.exit(main())
