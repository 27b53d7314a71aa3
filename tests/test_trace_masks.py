"""A set from one half of a recording on the other: what goes, and what both readings would read."""

import json
from pathlib import Path

import numpy as np
import pytest

from edgemoe.cli import main
from edgemoe.quant.trace_masks import half_mask
from edgemoe.runtime.errors import UsageError
from edgemoe.runtime.trace import DECODE, PREFILL, Trace

EXPERT_BYTES = 100


def trace_of(experts: np.ndarray, phase: int = DECODE) -> Trace:
    """Two layers of eight experts."""
    return Trace(
        experts=experts.astype(np.int32),
        weights=None,
        phase=np.full(len(experts), phase, dtype=np.int8),
        num_experts=np.array([8, 8]),
        expert_bytes=np.array([EXPERT_BYTES, EXPERT_BYTES]),
        model="planted",
    )


def planted() -> np.ndarray:
    """[40, 2, 2]: the first half uses experts 0 to 3 of each layer, the second half also 7, in a
    quarter of its picks of the first layer."""
    rng = np.random.default_rng(0)
    experts = np.sort(rng.random((40, 2, 4)).argsort(axis=-1)[..., :2], axis=-1)
    experts[20::2, 0, 1] = 7
    return experts


@pytest.mark.parametrize("phase", [DECODE, PREFILL])
def test_the_set_of_the_first_half_meets_the_second(phase: int) -> None:
    """A pool of all experts: what is read is what was never wanted before."""
    found = half_mask(trace_of(planted(), phase), 0.5, "lru", [16 * EXPERT_BYTES, 600])
    assert (found.num_chosen_on, found.num_tested_on) == (20, 20)
    assert found.num_kept == (4, 4) and found.removed_picks == pytest.approx(10 / 80)
    full, anew, left_out = (rows[0] for rows in (found.full, found.drawn_anew, found.left_out))
    assert full.misses == 1 and full.bytes_read == EXPERT_BYTES and full.num_steps == 20
    assert anew.misses == left_out.misses == 0
    assert full.hits + full.misses == anew.hits == 80 and left_out.hits == 70
    small = [rows[1].bytes_read for rows in (found.full, found.drawn_anew, found.left_out)]
    assert small[0] > small[1] > small[2] > 0


def test_all_experts_kept_change_nothing() -> None:
    found = half_mask(trace_of(planted()), 1.0, "forecast", [600])
    assert found.removed_picks == 0 and found.full == found.drawn_anew == found.left_out


def test_what_cannot_be_halved_or_kept_is_refused() -> None:
    with pytest.raises(UsageError, match="too short"):
        half_mask(trace_of(planted()[:1]), 0.5, "lru", [600])
    with pytest.raises(UsageError, match="1 of 8 experts cannot stay; every token needs 2"):
        half_mask(trace_of(planted()), 0.125, "lru", [600])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "planted.trace"
    trace_of(planted()).save(file)
    words = ["trace", "replay", str(file), "--policy", "lru", "--budgets", "40%,100%"]
    assert main([*words, "--keep", "50%,75%", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)["traces"][0]["sets"]
    assert (first["keep"], second["keep"]) == (0.5, 0.75) and first["policy"] == "lru"
    assert second["removed_picks"] <= first["removed_picks"] == pytest.approx(10 / 80)
    assert main([*words, "--keep", "50%"]) == 0
    text = capsys.readouterr().out
    assert "50% of the experts stay, chosen on 20 tokens, counted on the other 20" in text
    assert "fewer reads, lost picks drawn anew" in text
    assert main([*words, "--keep", "much"]) == 2
    assert "expected a share" in capsys.readouterr().err
