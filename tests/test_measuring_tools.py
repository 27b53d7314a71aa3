"""The measuring programs' own logic: control groups, token files, GGUF names, tables."""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path[:0] = [str(TOOLS), str(TOOLS / "peers")]

import make_gguf  # noqa: E402
import measure  # noqa: E402
import prefetch_grid  # noqa: E402
import side_by_side  # noqa: E402
import watch_memory  # noqa: E402
from random_checkpoint.shapes import SHAPES  # noqa: E402

from edgemoe.runtime.headers import encode_header  # noqa: E402


def written(root: Path) -> dict[str, str]:
    """What lies in the one group of each controller, and of the root itself."""
    found = {}
    for file in root.rglob("*"):
        if file.is_file():
            parts = file.relative_to(root).parts
            found["/".join(part for part in parts if part[:8] != "edgemoe-")] = file.read_text()
    return found


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    for controller in ("memory", "blkio"):
        (tmp_path / controller).mkdir()
    group = watch_memory.ControlGroup(1 << 30, ("254:0", 500_000_000), root=tmp_path)
    with_files = group.__enter__()
    with_files.enter()
    pid = written(tmp_path)["memory/cgroup.procs"]
    assert written(tmp_path) == {
        "memory/memory.limit_in_bytes": str(1 << 30),
        "memory/cgroup.procs": pid,
        "blkio/blkio.throttle.read_bps_device": "254:0 500000000",
        "blkio/cgroup.procs": pid,
    }


def test_control_groups_of_version_2(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory io")
    group = watch_memory.ControlGroup(1 << 30, ("254:0", 500_000_000), root=tmp_path)
    group.__enter__()
    assert written(tmp_path) == {
        "cgroup.controllers": "cpu memory io",
        "cgroup.subtree_control": "+memory +io",
        "memory.max": str(1 << 30),
        "io.max": "254:0 rbps=500000000",
    }
    (group.paths[0] / "memory.peak").write_text("123\n")
    (group.paths[0] / "memory.events").write_text("low 0\nhigh 0\nmax 7\noom 0\n")
    (group.paths[0] / "memory.stat").write_text("anon 5\nfile 9\n")
    assert group.stat() == {"group_peak": 123, "limit_hits": 7}
    assert group.page_cache() == 9


def test_no_limit_makes_no_group(tmp_path: Path) -> None:
    with watch_memory.ControlGroup(root=tmp_path) as group:
        group.enter()
    assert group.paths == [] and group.stat() == {} and not list(tmp_path.iterdir())


def test_read_ahead_is_put_back(tmp_path: Path) -> None:
    (tmp_path / "queue").mkdir()
    file = tmp_path / "queue" / "read_ahead_kb"
    file.write_text("8192\n")
    with pytest.raises(KeyboardInterrupt), watch_memory.ReadAhead(tmp_path, 128 << 10):
        assert file.read_text() == "128"
        raise KeyboardInterrupt
    assert file.read_text() == "8192\n"


@pytest.mark.parametrize("is_partition", [False, True])
def test_limits_are_of_the_whole_disk(tmp_path: Path, is_partition: bool) -> None:
    number = tmp_path.stat().st_dev
    name = f"{watch_memory.os.major(number)}:{watch_memory.os.minor(number)}"
    disk = tmp_path / "devices" / "sda"
    folder = disk / "sda1" if is_partition else disk
    folder.mkdir(parents=True)
    (disk / "dev").write_text("8:0\n")
    if is_partition:
        (folder / "partition").write_text("1\n")
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / name).symlink_to(folder)
    assert watch_memory.disk_of(tmp_path, tmp_path / "block") == (disk.resolve(), "8:0")
    with pytest.raises(SystemExit, match="lies on no disk"):
        watch_memory.disk_of(tmp_path, tmp_path / "devices")


def test_rates() -> None:
    assert watch_memory.rate("500MB/s") == 500_000_000 == watch_memory.rate("500MB")


def test_rounds_feed_the_same_tokens_to_everybody() -> None:
    fed: list[list[int]] = []

    def feed(ids: Sequence[int]) -> list[int]:
        fed.append(list(ids))
        return [ids[-1] + 1, 5]

    found = measure.run_rounds(
        feed, lambda: fed.append([]), [1, 2, 3], list(range(10, 22)), 2, warm_up=True
    )
    warm = [[], [1, 2, 3], *([token] for token in range(10, 18))]
    whole = [[], [1, 2, 3], *([token] for token in range(10, 22))]
    assert fed == warm + whole + whole
    assert len(found["prefill_tokens_per_s"]) == len(found["decode_tokens_per_s"]) == 2
    assert [len(steps) for steps in found["step_s"]] == [12, 12]
    assert found["logits"] == [22.0, 5.0]


def test_random_tokens_repeat(tmp_path: Path) -> None:
    made = measure.random_tokens(100, 6, 3, seed=4)
    assert made == measure.random_tokens(100, 6, 3, seed=4) != measure.random_tokens(100, 6, 3, 5)
    (tmp_path / "tokens.json").write_text(json.dumps(made))
    prompt, continuation = measure.read_tokens(tmp_path / "tokens.json")
    assert (len(prompt), len(continuation)) == (6, 3)
    assert all(0 <= token < 100 for token in prompt + continuation)


# ---- GGUF --------------------------------------------------------------------------------------


def test_gguf_holds_every_tensor_of_the_checkpoint_once() -> None:
    config = SHAPES["tiny"]
    tensors = make_gguf.gguf_tensors(config)
    parts = [part for _, names in tensors for part in names]
    layers, experts = config["num_hidden_layers"], config["num_experts"]
    assert len(set(parts)) == len(parts) == 3 + layers * (9 + 3 * experts)
    names = dict(tensors)
    assert len(names) == 3 + layers * 12
    assert names["blk.3.attn_q_norm.weight"] == ["model.layers.3.self_attn.q_norm.weight"]
    stacked = names["blk.2.ffn_down_exps.weight"]
    assert stacked[5] == "model.layers.2.mlp.experts.5.down_proj.weight" and len(stacked) == experts


def test_gguf_data_are_the_bits_of_the_checkpoint(tmp_path: Path) -> None:
    bits = np.array([[0x3F80, 0xC000], [0x0001, 0x7F7F]], dtype="<u2")  # 1, -2, and extremes
    names = ["a.weight", "b.weight", "x_norm.weight"]
    header = encode_header([(name, "BF16", (2, 2), 8) for name in names], {})
    shard = tmp_path / "model-1.safetensors"
    shard.write_bytes(header + bits.tobytes() + bits[::-1].tobytes() + bits.tobytes())
    index = {"weight_map": dict.fromkeys(names, shard.name)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    checkpoint = make_gguf.Checkpoint(tmp_path)
    both = make_gguf.tensor_data(checkpoint, "blk.0.ffn_up_exps.weight", names[:2])
    assert both.dtype == np.uint8 and both.shape == (2, 2, 4)
    assert both.tobytes() == bits.tobytes() + bits[::-1].tobytes()
    wide = make_gguf.tensor_data(checkpoint, "blk.0.attn_norm.weight", names[2:])
    assert wide.dtype == np.float32 and wide[0].tolist() == [1.0, -2.0]
    assert (wide.view(np.uint32) >> 16 == bits).all()


def test_gguf_names_of_the_quantized_files() -> None:
    found = list(make_gguf.targets(Path("a/olmoe.gguf"), ["Q4_0", "Q4_K_M"]))
    assert found == [("Q4_0", Path("a/olmoe-Q4_0.gguf")), ("Q4_K_M", Path("a/olmoe-Q4_K_M.gguf"))]


# ---- side by side ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "expected"),
    [("none", None), ("25%", 1000), ("2MiB", 2 << 20), ("1.5GB", 1_500_000_000), ("77", 77)],
)
def test_limits(word: str, expected: int | None) -> None:
    assert side_by_side.parse_limit(word, 4000) == expected


def test_arms_of_a_round(tmp_path: Path) -> None:
    for name in ("m-Q4_0.gguf", "m-Q4_K_M.gguf"):
        (tmp_path / name).write_bytes(bytes(1000))
    files = f"{tmp_path / 'm-Q4_0.gguf'},{tmp_path / 'm-Q4_K_M.gguf'}"
    options = Namespace(gguf=files, threads=2, store=tmp_path, limits="none,50%", repeats=3)
    vars(options).update(decode=64, peer_decode=24, modes="repack,mmap", peer_python="py")
    arms = list(side_by_side.make_arms(options, Path("tokens.json"), with_peer=True))
    assert [(arm.limit_bytes, arm.engine) for arm in arms] == [
        (None, "edgemoe"),
        (None, "llama.cpp Q4_0 repack"),
        (None, "llama.cpp Q4_0 mmap"),
        (None, "llama.cpp Q4_K_M repack"),
        (None, "llama.cpp Q4_K_M mmap"),
        (500, "edgemoe"),
        (500, "llama.cpp Q4_0 mmap"),
    ]
    assert arms[5].command[-2:] == ["--memory", "500"]
    assert "--no-warm-up" in arms[6].command and "--no-warm-up" not in arms[1].command
    alone = side_by_side.make_arms(options, Path("tokens.json"), with_peer=False)
    assert {arm.engine for arm in alone} == {"edgemoe"}


def result(prefill: float, steps: list[float]) -> dict[str, object]:
    outside = {"anonymous": 10**9, "page_cache": 2 * 10**9, "file_backed": 0, "read": 3 * 10**9}
    speed = [len(steps) / sum(steps)]
    measured = {"prefill_tokens_per_s": [prefill], "decode_tokens_per_s": speed, "step_s": [steps]}
    return measured | {"load_s": 1.0, "outside": outside, "logits": [7.0, 8.0, 9.0]}


def test_table_has_medians_and_ratios() -> None:
    arms = [
        side_by_side.Arm("25%", 10**9, "edgemoe", [], [result(100, [9.0, 0.1, 0.1])] * 3),
        side_by_side.Arm("25%", 10**9, "llama.cpp Q4_0 mmap", [], [result(50, [9.0, 0.4, 0.4])]),
        side_by_side.Arm("none", None, "edgemoe", [], [result(100, [0.1, 0.3])]),
        side_by_side.Arm("none", None, "llama.cpp Q4_0 repack", [], [], "killed for memory"),
    ]
    lines = side_by_side.table(arms, settle=1).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert {len(row) for row in cells} == {len(side_by_side.HEADER)}
    assert cells[2][:4] == ["25% = 1000 MB", "edgemoe", "100.0 (100 100 100)", "10.0 (10 10 10)"]
    assert cells[3][2:6] == ["50.0", "2.5", "2.00", "4.00"]
    assert cells[3][6:] == ["1.00 GB", "2.00 GB", "3.00 GB", "1.0"]
    assert cells[4][3] == "5.0"  # a warm run counts every token
    assert cells[5][2] == "killed for memory"


def test_agreement_is_a_correlation_after_as_many_tokens() -> None:
    arms = [side_by_side.Arm("none", None, name, []) for name in ("edgemoe", "x", "y")]
    for arm, steps in zip(arms, ([1.0, 1.0], [1.0, 1.0], [1.0]), strict=True):
        arm.rounds.append(result(1, steps))
    arms[1].rounds[0]["logits"] = [-14.0, -16.0, -18.0]
    assert side_by_side.agreement(arms, 2) == "correlation of logits with edgemoe: x -1.00"
    assert side_by_side.agreement(arms[:1], 2) == ""


def test_limited_rows_are_skipped_aloud(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(side_by_side, "can_limit", lambda: "control groups need root")
    words = ["--store", "s", "--gguf", "g", "--limits", "50%"]
    assert side_by_side.main(words) == 1
    assert "skipped: every limited row" in capsys.readouterr().err


def test_a_ratio_is_told_from_noise_that_both_arms_share() -> None:
    rng = np.random.default_rng(0)
    off = rng.uniform(1, 3, 400) * (1 + np.sin(np.arange(400) / 30))  # tokens and machine
    noise = rng.normal(0, 0.02, 400) * off
    hiccups = np.where(np.arange(400) % 50 == 0, 20, 0)
    turns = [30] * 11 + [70]
    middle, low, high = prefetch_grid.ratio(0.97 * off + noise + hiccups, off, turns)
    assert low < 0.97 < high and abs(middle - 0.97) < 0.01 and high < 1
    middle, low, high = prefetch_grid.ratio(off + noise, off, turns)
    assert low < 1 < high and high - low < 0.02


def test_an_interval_knows_that_engines_differ() -> None:
    off = np.random.default_rng(0).uniform(1, 3, 400)
    turns = np.array([30] * 11 + [70])
    faster = np.repeat([0.95, 1.05, 1.0] * 4, turns)  # by the engine of the turn
    middle, low, high = prefetch_grid.ratio(off * faster, off, turns.tolist())
    assert low < 1 < high and abs(middle - 1) < 0.01 and high - low > 0.05


def test_turns_of_one_token_each_count() -> None:
    on, off = np.ones(24), np.ones(24)
    on[3] = 50  # among the most extreme, and all that there is of its turn
    middle, low, high = prefetch_grid.ratio(on, off, [1, 1, 1, 1, 13, *[1] * 7])
    assert 1 < middle < high and low < 1


def cell(on: tuple[float, float, float], perfect: tuple[float, float, float]) -> dict:
    return {
        "on": list(on),
        "oracle": list(perfect),
        "identical": True,
        "arms": {"off": {"idle_share": 0.5}},
    }


def test_the_table_tells_what_can_be_gained_and_what_is() -> None:
    none, gain, loss = (0.99, 0.98, 1.01), (0.9, 0.89, 0.91), (1.05, 1.02, 1.08)
    found = {"10@0": cell(gain, (0.8, 0.79, 0.81)), "20@0": cell(none, none)}
    found["10@50000000"] = cell(loss, gain)
    document = {"budgets": [10, 20], "rates": [50_000_000, 0], "workloads": {"demo": found}}
    text = prefetch_grid.tables(document)
    assert "| demo | 50 MB/s | guesses | 1.05 (slower) |  |" in text
    assert "|  | as it is | guesses | **0.90** | 0.99 |" in text and "| 50 % | 50 % |" in text
    assert "Of 3 cells 1 lose by more than noise and 1 gain" in text
    assert "0.975 on average, perfect ones 0.850, 0.17 of that gain" in text
    found["10@50000000"]["again"] = cell(none, gain)
    assert "0 lose" in prefetch_grid.verdict(document)
