"""What one measured run of an arm comes to: speeds, reads, and the share of the limits it reached.

Plain arithmetic on what was counted; nothing is measured here.
"""

from typing import Any

from .decode import Decoded

GB = 1e9


def speeds(decoded: Decoded, prompt_tokens: int) -> dict[str, Any]:
    """Speeds and reads. `dispatch_s_per_token` is what a step took outside of the core, Python and
    the decisions of the expert cache; `guess_s` and `submit_s` are inside. None where the core does
    not run whole tokens."""
    steps = sorted(decoded.step_s)
    count = max(1, len(steps))
    demand = sum(decoded.decode[name] for name in ("hits", "misses", "guessed"))
    native_s, decide_s = decoded.decode["native_s"], decoded.decode["decide_s"]
    python_s = decoded.decode_s - native_s - decide_s

    def of_core(seconds: float) -> float | None:
        return seconds / count if native_s else None

    return {
        "ttft_s": decoded.prefill_s,
        "prefill_tokens_per_s": prompt_tokens / decoded.prefill_s,
        "prefill_bytes_read": decoded.prefill["bytes_read"],
        "decode_tokens_per_s": len(steps) / decoded.decode_s if steps else None,
        "step_p50_s": steps[len(steps) // 2] if steps else None,
        "step_p95_s": steps[len(steps) * 95 // 100] if steps else None,
        "hit_rate": decoded.decode["hits"] / demand if demand else None,
        "guessed_rate": decoded.decode["guessed"] / demand if demand else None,
        "misses_per_token": decoded.decode["misses"] / count,
        "bytes_read_per_token": decoded.decode["bytes_read"] / count,
        "stall_s_per_token": decoded.decode["stall_s"] / count,
        "stall_share": decoded.decode["stall_s"] / decoded.decode_s if steps else None,
        "dispatch_s_per_token": of_core(python_s + decide_s),
        "python_s_per_token": of_core(python_s),
        "decide_s_per_token": of_core(decide_s),
        "guess_s_per_token": of_core(decoded.decode["guess_s"]),
        "submit_s_per_token": of_core(decoded.decode["submit_s"]),
    }


def reader_cost(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """CPU seconds per GB that the reader took between two of its statistics, and of checksums."""
    num_bytes = after["num_bytes"] - before["num_bytes"]
    spent = {name: after[name] - before[name] for name in ("cpu_s", "crc_s")}
    if num_bytes < GB / 100:  # too little to divide by
        return {"reader_cpu_s_per_gb": None, "crc_s_per_gb": None}
    return {
        "reader_cpu_s_per_gb": spent["cpu_s"] / num_bytes * GB,
        "crc_s_per_gb": spent["crc_s"] / num_bytes * GB,
    }


def joined_limits(first: dict[str, Any], last: dict[str, Any]) -> dict[str, Any]:
    """The limits of a run, from what was measured right before and right after it: of drives, which
    change, the mean; of memory, which something else can only slow, the larger rate."""
    mean = {
        name: (first[name] + last[name]) / 2 if isinstance(first[name], float) else first[name]
        for name in first
    }
    memory = "dram_bytes_per_s"
    return mean | {memory: max(first[memory], last[memory])}


def bounds(result: dict[str, Any], limits: dict[str, Any], touched: float) -> dict[str, Any]:
    """Both bounds of a decoded token, in seconds, and the share of the larger one in its time.

    `touched`: bytes of weights and KV cache that a token goes through.
    """
    stored = result["bytes_read_per_token"] / limits["storage_bytes_per_s"]
    walked = touched / limits["dram_bytes_per_s"]
    speed = result["decode_tokens_per_s"]
    return {
        "storage_bound_s": stored,
        "dram_bound_s": walked,
        "reached": None if speed is None else max(stored, walked) * speed,
        "prefill_storage_bound_s": result["prefill_bytes_read"] / limits["storage_bytes_per_s"],
    }


def beside_control(result: dict[str, Any], control: dict[str, Any]) -> dict[str, Any]:
    """The same tokens with every record in memory, and how well reads and compute overlapped: the
    larger of reading alone and of computing alone, over the time that both took together."""
    speed, alone = result["decode_tokens_per_s"], control["decode_tokens_per_s"]
    longest = max(result["storage_bound_s"], 1 / alone) if alone else None
    prefill = max(result["prefill_storage_bound_s"], control["ttft_s"])
    return {
        "no_read_tokens_per_s": alone,
        "overlapped": longest * speed if longest and speed else None,
        "prefill_no_read_tokens_per_s": control["prefill_tokens_per_s"],
        "prefill_overlapped": prefill / result["ttft_s"],
    }
