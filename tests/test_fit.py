"""`prune --fit`: a model of Qwen3-30B-A3B's routing (128 experts a layer, 8 of them a token) in a
budget that holds half of its experts; a process of its own, as a user has it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sets_small import owner
from tiny_checkpoint import make_checkpoint
from tokenizers_small import CHATML, byte_level, write

from edgemoe.cli import main
from edgemoe.cli.plan import store_plan
from edgemoe.quant.convert import convert
from edgemoe.quant.options import ConvertOptions
from edgemoe.runtime import core
from edgemoe.runtime.index import load_index
from edgemoe.runtime.profile import Profile
from edgemoe.runtime.sets import load_set

pytestmark = pytest.mark.skipif(core.lib is None, reason="native core not built")
ROOT = Path(__file__).resolve().parent.parent
LAYERS, EXPERTS, TOP_K = 4, 128, 8


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a profile of a task that uses some experts much and others hardly."""
    folder = tmp_path_factory.mktemp("fit")
    source = make_checkpoint(
        folder / "source",
        "qwen3_moe",
        num_hidden_layers=LAYERS,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        hidden_size=256,
        moe_intermediate_size=128,
        vocab_size=400,
        max_position_embeddings=512,
    )
    (source / "tokenizer.json").unlink()
    write(source, byte_level(400), CHATML)
    path = convert(source, folder / "qwen3.edgemoe", ConvertOptions(bits=4, group_size=32))
    of, rng = owner(path), np.random.default_rng(0)
    profile = Profile.empty(
        of.num_experts, TOP_K, fingerprint=of.fingerprint, tokenizer=of.tokenizer_sha256
    )
    noise = rng.gumbel(size=(2000, LAYERS, EXPERTS)) + 2 * rng.standard_normal((LAYERS, EXPERTS))
    profile.add_routes(np.sort(np.argsort(-noise, axis=-1)[..., :TOP_K], axis=-1))
    profile.save(path / "profiles" / "task.safetensors")
    return path


def test_a_set_that_fits_reads_nothing_inside_its_budget(path: Path) -> None:
    index = load_index(path)
    whole = store_plan(index, None, 256, 16).resident_budget_bytes
    budget = whole - index.expert_bytes // 2
    words = ["--profile", "task", "--method", "frequency", "--name", "fits", "--context", "256"]
    assert main(["prune", str(path), *words, "--fit", str(budget)]) == 0
    made = load_set(path, "fits")
    per_layer = [len(ids) for ids in made.kept.values()]
    assert LAYERS * EXPERTS // 4 < made.num_kept < LAYERS * EXPERTS
    assert max(per_layer) - min(per_layer) <= 1 and min(per_layer) >= TOP_K
    picks = [sum(made.pick_share[layer]) for layer in made.kept]
    assert min(picks) > len(made.kept[0]) / EXPERTS  # what is picked most has stayed

    def run(*options: str) -> dict:
        command = [sys.executable, "-m", "edgemoe", "run", path, "what is kept?", "--json"]
        command += ["-n", 48, "--context", 256, "--memory", budget, *options]
        done = subprocess.run(
            [str(word) for word in command],
            capture_output=True,
            text=True,
            env={"PYTHONPATH": str(ROOT), "PATH": ""},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    full, fits = run("--warm-start", "off"), run("--set", "fits", "--set-mode", "hard")
    assert full["stats"]["bytes_read"] > 0 and not full["engine"]["resident"]
    assert fits["stats"]["bytes_read"] == fits["stats"]["misses"] == 0
    assert fits["stats"]["hits"] > 0 and fits["stats"]["routing"] == "set fits, hard"
    assert fits["engine"]["resident"] and fits["stats"]["peak_memory_bytes"] <= budget
