"""The random checkpoints: true shapes, a working tokenizer, and routing as it is promised."""

import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from edgemoe.models import load_module
from edgemoe.models.names import trunk_shapes
from edgemoe.quant.checkpoint import Checkpoint
from edgemoe.quant.convert import convert
from edgemoe.quant.options import ConvertOptions
from edgemoe.runtime.errors import UsageError
from edgemoe.runtime.index import load_index

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

from make_checkpoint import main, make_checkpoint  # noqa: E402
from make_store import dealt, make_store  # noqa: E402
from random_checkpoint import model  # noqa: E402
from random_checkpoint.shapes import SHAPES  # noqa: E402
from random_checkpoint.tokenizer import write_tokenizer  # noqa: E402

TARGET = (0.36, 0.70, 0.90)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    path = tmp_path_factory.mktemp("made") / "tiny"
    return path, make_checkpoint("tiny", path)


@pytest.mark.parametrize(
    ("shape", "billions"),
    (("olmoe-1b-7b", 6.92), ("qwen3-30b-a3b", 30.53), ("mixtral-8x7b", 46.70)),
)
def test_shapes_are_the_released_ones(shape: str, billions: float) -> None:
    module = load_module(SHAPES[shape]["model_type"])
    args = module.parse(SHAPES[shape])
    trunk = sum(prod(size) for size in trunk_shapes(args, module.TRUNK).values())
    experts = args.num_layers * args.num_experts * 3 * args.hidden * args.expert_width
    assert round((trunk + experts) / 1e9, 2) == billions


def test_routing_is_as_uneven_as_in_real_models(tiny: tuple[Path, list[float]]) -> None:
    for found, wanted in zip(tiny[1], TARGET, strict=True):
        assert abs(found - wanted) < 0.05


def test_transformers_routes_the_same_way(tiny: tuple[Path, list[float]]) -> None:
    """The calibrating forward pass is the model: another implementation finds the same hits."""
    transformers = pytest.importorskip("transformers")
    found = transformers.AutoModelForCausalLM.from_pretrained(tiny[0], dtype=torch.float32)
    generator = torch.Generator().manual_seed(99)  # other tokens than those of the calibration
    tokens = torch.randint(1000, (1, 896), generator=generator)
    with torch.inference_mode():
        out = found(tokens, output_router_logits=True)
    assert torch.isfinite(out.logits).all()
    assert 1.0 < float(out.logits.std()) < 4.0
    # The head leans to no token: the likeliest next ones differ.
    assert out.logits[0].argmax(-1).unique().numel() > 200
    ids = [torch.softmax(logits, -1).topk(8).indices for logits in out.router_logits]
    for size, wanted in zip((16, 32, 48), TARGET, strict=True):
        rates = [model.lru_hit_rate(layer, size, 512) for layer in ids]
        assert abs(sum(rates) / len(rates) - wanted) < 0.06


def test_the_same_seed_gives_the_same_bytes(tiny: tuple[Path, list[float]], tmp_path: Path) -> None:
    make_checkpoint("tiny", tmp_path / "again", threads=1)
    other = make_checkpoint("tiny", tmp_path / "other", seed=1, layers=1)
    files = sorted(file.name for file in tiny[0].iterdir())
    assert files == sorted(file.name for file in (tmp_path / "again").iterdir())
    for name in files:
        assert (tiny[0] / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    name = "model-00002-of-0000{}.safetensors"
    first, second = tiny[0] / name.format(6), tmp_path / "other" / name.format(3)
    assert first.read_bytes() != second.read_bytes() and len(other) == 3


def test_it_converts(tiny: tuple[Path, list[float]], tmp_path: Path) -> None:
    with Checkpoint(tiny[0]) as checkpoint:
        assert checkpoint.unused == []
    assert len(load_index(convert(tiny[0], tmp_path / "a.edgemoe")).records) == 4 * 64


def test_a_store_without_a_checkpoint_is_what_convert_makes(tmp_path: Path) -> None:
    make_checkpoint("tiny", tmp_path / "hf", layers=1)
    options = ConvertOptions(trunk_bits=4)
    convert(tmp_path / "hf", tmp_path / "a.edgemoe", options)
    config = SHAPES["tiny"] | {"num_hidden_layers": 1}
    make_store(config, tmp_path / "b.edgemoe", options, pool=64)
    files = sorted(file.name for file in (tmp_path / "a.edgemoe").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "b.edgemoe").iterdir())
    for name in set(files) - {"store.json"}:  # which says that the experts are dealt
        first, second = (tmp_path / store / name for store in ("a.edgemoe", "b.edgemoe"))
        assert first.read_bytes() == second.read_bytes(), name


def test_a_store_deals_its_experts_to_the_layers(tmp_path: Path) -> None:
    config = SHAPES["tiny"] | {"num_hidden_layers": 2}
    rates = make_store(config, tmp_path / "a.edgemoe", ConvertOptions(), pool=16)
    assert all(abs(found - wanted) < 0.06 for found, wanted in zip(rates, TARGET, strict=True))
    index = load_index(tmp_path / "a.edgemoe")
    crcs = [[index.records[layer, expert].crc32c for expert in range(64)] for layer in (0, 1)]
    assert len({*crcs[0], *crcs[1]}) == 16 and crcs[0] != crcs[1]
    for layer in (0, 1):
        assert crcs[layer] == [crcs[0][dealt(layer, expert, 16)] for expert in range(64)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.edgemoe"]
    with pytest.raises(UsageError, match="already exists"):
        make_store(config, tmp_path / "a.edgemoe", ConvertOptions())


@pytest.mark.parametrize("size", (512, 50304, 151936))
def test_tokenizer_has_its_size_and_loses_nothing(tmp_path: Path, size: int) -> None:
    end = write_tokenizer(tmp_path, size)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == size
    assert tokenizer.token_to_id("<|endoftext|>") == end
    text = "The naïve fox — 狐 🦊\n\tdef f(x): return x**2  # done\x00"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert len(tokenizer.encode("the experts of a layer").ids) < 22
    assert all(tokenizer.id_to_token(number) for number in range(size))


def test_calibration_sets_the_skew_from_either_side() -> None:
    generator = torch.Generator().manual_seed(0)
    router = torch.randn((64, 128), generator=generator) * 0.1
    common = torch.randn(128, generator=generator)
    for size in (0.05, 1.0, 5.0):
        x = torch.randn((512, 128), generator=generator) + size * common
        fixed = model.calibrate_router(router, x)
        logits = x @ fixed.T
        skew = float((fixed @ x.mean(0)).std() / logits.std(0).mean())
        assert abs(skew - model.SKEW) < 0.01


def test_lru_hit_rate_by_hand() -> None:
    ids = torch.tensor([[0, 1], [0, 2], [1, 0], [2, 3]])
    # Capacity 2, counted from token 1: 0 hits, 2 misses (1 goes); 1 misses (0 goes), 0 misses
    # (2 goes); 2 and 3 miss.
    assert model.lru_hit_rate(ids, 2, 1) == 1 / 6
    assert model.lru_hit_rate(ids, 4, 0) == 4 / 8


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="already exists"):
        main(["--shape", "tiny", "--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
