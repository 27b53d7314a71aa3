"""The oracle of the wiring: transformers on tiny random models, one per architecture and option.

16-bit experts and trunk are exact copies, so the reference path differs from transformers only by
the order of fp32 additions: at most 1e-3 in the logits (they span about +-4), and the same greedy
tokens. With quantized experts the oracle computes with our own dequantized weights.
"""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")  # not in a plain installation

from models_small import (  # noqa: E402
    CLASSES,
    PER_TYPE,
    Case,
    Running,
    greedy,
    make_model,
    oracle,
    save_checkpoint,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402

from edgemoe.models import parse_config  # noqa: E402
from edgemoe.models.causal_lm import CausalLM  # noqa: E402
from edgemoe.models.layers import sigmoid, silu  # noqa: E402
from edgemoe.models.rope import frequencies  # noqa: E402
from edgemoe.quant.convert import convert  # noqa: E402
from edgemoe.quant.plan import ConvertOptions  # noqa: E402
from edgemoe.runtime import core, kernels  # noqa: E402
from edgemoe.runtime.budget import CHUNK, kv_head_bytes  # noqa: E402
from edgemoe.runtime.errors import FormatError, RecordError, UsageError  # noqa: E402

TOLERANCE = 1e-3
PROMPT = np.random.default_rng(7).integers(0, 128, 40).tolist()
NUM_GREEDY = 64

native = pytest.mark.skipif(core.lib is None, reason="native core not built")

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 64,
        "short_factor": [1.0 + n / 16 for n in range(16)],
        "long_factor": [2.0 + n for n in range(16)],
    },
}
ROPES = {name: values | {"rope_theta": 10000.0} for name, values in ROPES.items()}

CASES = {
    "olmoe": Case("olmoe"),
    "olmoe clip bias tied renormalised": Case(
        "olmoe",
        {
            "clip_qkv": 0.8,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "norm_topk_prob": True,
        },
    ),
    "qwen2_moe": Case("qwen2_moe", {"num_experts_per_tok": 3}),
    "qwen2_moe dense and sliding layers": Case(
        "qwen2_moe",
        {
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "qkv_bias": False,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 3,
        },
    ),
    "qwen3_moe": Case("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3_moe bias sliding yarn": Case(
        "qwen3_moe",
        {
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "rope_parameters": ROPES["yarn"],
            "num_experts_per_tok": 3,
        },
    ),
    "qwen3_moe fused": Case("qwen3_moe", {"norm_topk_prob": True}, fused=True),
    "mixtral": Case("mixtral"),
    "mixtral sliding llama3 tied": Case(
        "mixtral",
        {
            "sliding_window": 8,
            "head_dim": 32,
            "rope_parameters": ROPES["llama3"],
            "tie_word_embeddings": True,
        },
    ),
    "mixtral narrow keys": Case("mixtral", {"num_key_value_heads": 1, "head_dim": 8}),
    "mixtral fused linear": Case("mixtral", {"rope_parameters": ROPES["linear"]}, fused=True),
}


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """Matrices this small lose more to torch's threads than they win."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Store and transformers model of a case and its bits, made once."""
    made = {}

    def get(case: Case, **options):
        key = (repr(case), *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            model = make_model(case)
            save_checkpoint(model, case, folder / "checkpoint")
            options = {"bits": 16, "trunk_bits": 16} | options
            path = convert(
                folder / "checkpoint", folder / "tiny.edgemoe", ConvertOptions(**options)
            )
            made[key] = (path, model)
        return made[key]

    return get


@pytest.fixture
def running():
    """Opens stores and closes them after the test."""
    opened = []

    def get(path, backend="reference", **options):
        opened.append(Running(path, backend, **options))
        return opened[-1]

    yield get
    for one in opened:
        one.close()


@torch.no_grad()
def load_dequantized(model, store) -> None:
    """Replace the weights of a transformers model by what the store holds."""
    for (layer, expert), record in store.index.records.items():
        data = np.fromfile(
            store.path / "experts.safetensors", np.uint8, record.num_bytes, offset=record.offset
        )
        gate, up, down = map(torch.from_numpy, kernels.unpack_record(data, record.layout))
        experts = model.model.layers[layer].mlp.experts
        experts.gate_up_proj[expert] = torch.cat((gate, up))
        experts.down_proj[expert] = down
    state = model.state_dict()
    for name in store.index.packed_trunk:
        state[name].copy_(torch.from_numpy(store.trunk_tensor(name).dequantize()))


def row_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Relative error of the median row: a router that decides otherwise moves single rows far."""
    return float(
        np.median(np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1))
    )


# ---- reference path against transformers --------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_16_bits_agree_with_transformers(name, stores, running):
    path, model = stores(CASES[name])
    expected, expected_tokens = oracle(model, PROMPT, NUM_GREEDY)
    got, tokens = greedy(running(path), PROMPT, NUM_GREEDY)
    assert np.abs(expected).max() > 1  # logits that differ from each other
    assert len(set(expected_tokens)) > 2
    assert np.abs(got - expected).max() <= TOLERANCE
    assert tokens == expected_tokens


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=native)])
@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral narrow keys"])
def test_an_fp32_checkpoint_keeps_its_small_matrices(name, backend, stores, running):
    """Experts and large matrices are rounded to bf16; routers and fewer than 16 rows are not."""
    case = replace(CASES[name], fp32=True)
    path, _ = stores(case)
    model = make_model(case)
    exact = oracle(model, PROMPT, 1)[0]
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if weight.ndim > 1 and not weight_name.endswith("gate.weight") and len(weight) >= 16:
                weight.copy_(weight.bfloat16())
            elif weight.ndim == 3:  # experts, however few
                weight.copy_(weight.bfloat16())
    expected, expected_tokens = oracle(model, PROMPT, NUM_GREEDY)
    got, tokens = greedy(running(path, backend), PROMPT, NUM_GREEDY)
    assert np.abs(got - expected).max() <= TOLERANCE and tokens == expected_tokens
    assert np.abs(exact - expected).max() > TOLERANCE


@pytest.mark.parametrize("options", [{"bits": 4, "group_size": 32}, {"bits": 8}], ids=str)
@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "qwen3_moe", "mixtral"])
def test_quantized_experts_agree_with_the_dequantized_model(name, options, stores, running):
    path, _ = stores(CASES[name], **options)
    ours = running(path)
    model = make_model(CASES[name])
    exact = oracle(model, PROMPT, 1)[0]
    load_dequantized(model, ours.store)
    expected, expected_tokens = oracle(model, PROMPT, NUM_GREEDY)
    got, tokens = greedy(ours, PROMPT, NUM_GREEDY)
    assert np.abs(got - expected).max() <= TOLERANCE and tokens == expected_tokens
    assert np.abs(exact - expected).max() > 10 * TOLERANCE  # else the test would prove nothing


@pytest.mark.parametrize("trunk_bits", [4, 8])
def test_a_quantized_trunk_agrees_with_the_dequantized_model(trunk_bits, stores, running):
    case = CASES["olmoe clip bias tied renormalised" if trunk_bits == 4 else "qwen2_moe"]
    path, _ = stores(case, bits=4, group_size=32, trunk_bits=trunk_bits)
    ours = running(path)
    assert "model.embed_tokens.weight" in ours.store.index.packed_trunk
    model = make_model(case)
    load_dequantized(model, ours.store)
    expected, expected_tokens = oracle(model, PROMPT, NUM_GREEDY)
    got, tokens = greedy(ours, PROMPT, NUM_GREEDY)
    assert np.abs(got - expected).max() <= TOLERANCE and tokens == expected_tokens


# ---- rotary types -------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [60, 500])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_agree_with_transformers(name, capacity):
    _, config_class = CLASSES["qwen3_moe"]
    config = config_class(
        **PER_TYPE["qwen3_moe"],
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_parameters=dict(ROPES[name]),
    )
    rope = parse_config(config.to_dict()).rope
    expected, factor = ROPE_INIT_FUNCTIONS[rope.kind](config, seq_len=capacity)
    np.testing.assert_allclose(frequencies(rope, capacity), expected.double(), rtol=3e-7)
    assert rope.attention_factor == pytest.approx(factor)


@pytest.mark.parametrize(
    "name, positions, capacity",
    [("dynamic", 32, 40), ("longrope", 128, 64), ("longrope", 128, 65)],
    ids=["dynamic beyond", "longrope short", "longrope long"],
)
def test_types_that_depend_on_the_length_follow_the_capacity(
    name, positions, capacity, stores, running
):
    """Where the prompt fills the context, that is what transformers computes."""
    case = Case(
        "qwen3_moe",
        {"rope_parameters": ROPES[name], "max_position_embeddings": positions},
    )
    path, model = stores(case)
    ours = running(path)
    assert ours.args.max_context >= capacity
    prompt = (PROMPT + PROMPT)[:capacity]
    got = ours.model.forward(prompt, ours.kv_cache(capacity), logits="all")
    assert np.abs(got - oracle(model, prompt, 1)[0]).max() <= TOLERANCE
    plain = ours.model.forward(prompt, ours.kv_cache(capacity + 60), logits="all")
    assert (np.abs(got - plain).max() > 10 * TOLERANCE) == (capacity <= 64)


# ---- native path --------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("name", CASES)
def test_native_16_bits_agree_with_transformers(name, stores, running):
    path, model = stores(CASES[name])
    expected, expected_tokens = oracle(model, PROMPT, NUM_GREEDY)
    got, tokens = greedy(running(path, "native"), PROMPT, NUM_GREEDY)
    assert np.abs(got - expected).max() <= TOLERANCE and tokens == expected_tokens


# Activations are rounded to 8 bits per 32 columns before a quantized product. On these models the
# median row moves by 0.010 to 0.015 with quantized experts, by 0.020 to 0.030 with the trunk too.
NEAR_EXPERTS, NEAR_ALL = 0.025, 0.05


@native
@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "group_size": 32},
        {"bits": 8},
        {"bits": 4, "group_size": 32, "trunk_bits": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "qwen3_moe", "mixtral"])
def test_native_quantized_is_near_the_reference(name, options, stores, running):
    path, _ = stores(CASES[name], **options)
    slow, fast = running(path), running(path, "native")
    expected = slow.model.forward(PROMPT, slow.kv_cache(), logits="all")
    got = fast.model.forward(PROMPT, fast.kv_cache(), logits="all")
    near = NEAR_ALL if "trunk_bits" in options else NEAR_EXPERTS
    assert 1e-3 < row_error(got, expected) < near


PIECES = ([40], [1] * 40, [7, 1, 30, 2], [39, 1])


@native
@pytest.mark.parametrize("kv_bits", [32, 16, 8])
@pytest.mark.parametrize(
    "name, options",
    [
        ("olmoe", {"bits": 4, "group_size": 32}),
        ("qwen2_moe", {"bits": 8, "trunk_bits": 8}),
        ("qwen2_moe dense and sliding layers", {"bits": 4, "group_size": 32}),
        ("qwen3_moe", {}),
        ("mixtral sliding llama3 tied", {"bits": 8}),
    ],
    ids=str,
)
def test_native_logits_do_not_depend_on_how_a_prompt_is_split(
    name, options, kv_bits, stores, running
):
    path, _ = stores(CASES[name], **options)
    results = []
    for pieces, num_threads in zip(PIECES, (2, 1, 3, 2), strict=True):
        ours = running(path, "native", num_threads=num_threads)
        kv_cache, rows, begin = ours.kv_cache(48, kv_bits), [], 0
        for length in pieces:
            rows.append(ours.model.forward(PROMPT[begin : begin + length], kv_cache, "all"))
            begin += length
        results.append(np.concatenate(rows))
    for other in results[1:]:
        assert np.array_equal(results[0], other)


@native
def test_chunks_are_not_seen_in_the_logits(stores, running):
    path, _ = stores(CASES["qwen2_moe"], bits=4, group_size=32)
    ours = running(path, "native")
    prompt = (PROMPT * 14)[: CHUNK + 5]
    whole = ours.model.forward(prompt, ours.kv_cache(600), logits="all")
    kv_cache = ours.kv_cache(600)
    first = ours.model.forward(prompt[:300], kv_cache, logits="all")
    assert ours.model.forward(prompt[300:514], kv_cache, logits="none").shape == (0, 128)
    last = ours.model.forward(prompt[514:], kv_cache)
    assert kv_cache.offset == len(prompt)
    assert np.array_equal(whole[:300], first) and np.array_equal(whole[-1:], last)


@native
def test_trimming_and_going_on_gives_the_same_bits(stores, running):
    path, _ = stores(CASES["olmoe"], bits=4, group_size=32)
    ours = running(path, "native")
    kv_cache = ours.kv_cache(kv_bits=16)
    expected = ours.model.forward(PROMPT, kv_cache)
    ours.model.forward(PROMPT[:20], kv_cache)
    kv_cache.trim(25)
    assert np.array_equal(ours.model.forward(PROMPT[25:], kv_cache), expected)


def test_exponentials_depend_on_their_own_element_only():
    x = 20 * np.random.default_rng(3).normal(size=(9, 37)).astype(np.float32)
    for function, plain in ((silu, torch.nn.functional.silu), (sigmoid, torch.sigmoid)):
        whole = function(x)
        np.testing.assert_allclose(whole, plain(torch.from_numpy(x)), rtol=1e-6, atol=1e-30)
        assert all(np.array_equal(function(x[n : n + 1]), whole[n : n + 1]) for n in range(9))
    assert silu(np.array([-1000.0, 0.0, 1000.0])).tolist() == [0.0, 0.0, 1000.0]


# ---- what is asked of it ------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=native)])
def test_the_routing_is_told_when_asked(backend, stores, running):
    path, model = stores(CASES["qwen3_moe"])  # layer 1 is dense
    ours, seen, single = running(path, backend), [], []
    kv_cache = ours.kv_cache()
    ours.model.forward(PROMPT[:-1], kv_cache, on_route=lambda *routing: seen.append(routing))
    ours.model.forward(PROMPT[-1:], kv_cache, on_route=lambda *routing: single.append(routing))
    assert [layer for layer, _, _ in seen] == [layer for layer, _, _ in single] == [0, 2]
    with torch.no_grad():
        routed = model(torch.tensor([PROMPT]), output_router_logits=True).router_logits
    for (_, *first), (_, *last), logits in zip(seen, single, routed, strict=True):
        ids, weights = (np.concatenate(parts) for parts in zip(first, last, strict=True))
        values, expected = torch.topk(torch.softmax(logits.float(), -1), 2)
        expected, order = expected.sort(dim=-1)
        assert ids.dtype == np.int64 and np.array_equal(ids, expected)
        values = (values / values.sum(-1, keepdim=True)).gather(-1, order)
        np.testing.assert_allclose(weights, values, rtol=1e-5, atol=1e-6)


def test_bad_steps_are_refused_and_leave_the_context_alone(stores, running):
    path, _ = stores(CASES["olmoe"])
    ours = running(path)
    kv_cache = ours.kv_cache(capacity=4)
    ours.model.forward([1, 2], kv_cache)
    for ids, words in (
        ([1, 2, 3], "2 of the 4 tokens of the context length"),
        ([128], "token id 128 is not in the vocabulary"),
        ([-1], "token id -1"),
        ([], "at least one token"),
    ):
        with pytest.raises(UsageError, match=words):
            ours.model.forward(ids, kv_cache)
    with pytest.raises(UsageError, match="`logits` must be"):
        ours.model.forward([1], kv_cache, logits="some")
    assert kv_cache.offset == 2


def test_a_damaged_record_fails_the_step_and_leaves_the_context_alone(stores, running, tmp_path):
    path, _ = stores(CASES["olmoe"])
    copy = shutil.copytree(path, tmp_path / "damaged.edgemoe")
    layer, expert = 2, 5
    offset = running(copy).store.index.records[layer, expert].offset
    with open(copy / "experts.safetensors", "r+b") as file:
        file.seek(offset + 100)
        file.write(b"damage")
    ours = running(copy)
    kv_cache = ours.kv_cache(600)
    ours.model.forward(PROMPT[:1], kv_cache)
    with pytest.raises(RecordError, match="layers.2.experts.5"):
        ours.model.forward((PROMPT * 14)[: CHUNK + 5], kv_cache)
    assert kv_cache.offset == 1


def test_a_trunk_of_the_wrong_shape_is_named(stores, running):
    path, _ = stores(CASES["olmoe"])
    ours = running(path)

    def read(name, pile):
        value = ours.store.trunk_tensor(name, pile)
        return value[:, :32] if name.endswith("1.self_attn.o_proj.weight") else value

    with pytest.raises(FormatError, match=r"layers.1.self_attn.o_proj.*\[64, 64\], got \[64, 32\]"):
        CausalLM(ours.args, read, None, ours.pool, "reference")


@pytest.mark.parametrize("backend", ["reference", pytest.param("native", marks=native)])
@pytest.mark.parametrize("kv_bits", [16, 8])
def test_a_small_kv_cache_is_near(kv_bits, backend, stores, running):
    path, _ = stores(CASES["qwen3_moe"])
    ours = running(path, backend)
    exact = ours.model.forward(PROMPT, ours.kv_cache(kv_bits=32), logits="all")
    kv_cache = ours.kv_cache(kv_bits=kv_bits)
    assert kv_cache.num_bytes == 3 * 2 * 160 * kv_head_bytes(32, kv_bits)
    rounded = ours.model.forward(PROMPT, kv_cache, logits="all")
    assert 1e-4 < row_error(rounded, exact) < 2e-2


@native
@pytest.mark.parametrize("name", ["olmoe", "mixtral narrow keys"])
def test_int8_keys_and_values_are_those_of_the_reference(name, stores, running):
    """Both round the same way: logits differ by a few numbers on the edge between two steps."""
    path, _ = stores(CASES[name])
    slow, fast = running(path), running(path, "native")
    expected = slow.model.forward(PROMPT, slow.kv_cache(kv_bits=8), logits="all")
    got = fast.model.forward(PROMPT, fast.kv_cache(kv_bits=8), logits="all")
    exact = fast.model.forward(PROMPT, fast.kv_cache(kv_bits=32), logits="all")
    assert row_error(got, expected) < row_error(got, exact) / 3
