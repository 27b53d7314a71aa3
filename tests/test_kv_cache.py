"""The KV cache by hand-sized examples."""

import numpy as np
import pytest
import torch

from edgemoe.kv_cache import KVCache
from edgemoe.runtime.budget import kv_head_bytes
from edgemoe.runtime.errors import UsageError
from edgemoe.runtime.packing import BF16, to_bf16, to_fp32


def step(cache: KVCache, layer: int, num_tokens: int, start: float) -> np.ndarray:
    keys = np.arange(num_tokens * 2 * 4, dtype=np.float32).reshape(num_tokens, 2, 4) + start
    cache.append(layer, keys, -keys)
    return keys


def test_a_step_is_stored_behind_the_last_one():
    cache = KVCache(num_layers=2, num_kv_heads=2, head_dim=4, capacity=5, kv_bits=32)
    first = [step(cache, layer, 3, 100.0 * layer) for layer in range(2)]
    assert cache.offset == 0  # a step that fails in the middle leaves no trace
    cache.advance(3)
    second = step(cache, 1, 2, 7.0)
    keys, values = cache.append(1, second, -second)
    cache.advance(2)
    assert cache.offset == 5 and keys.shape == (2, 5, 4) and keys.flags.c_contiguous
    expected = np.concatenate((first[1], second)).swapaxes(0, 1)
    assert np.array_equal(keys, expected) and np.array_equal(values, -expected)
    other, _ = cache.append(0, np.empty((0, 2, 4)), np.empty((0, 2, 4)))
    assert np.array_equal(other[:, :3], first[0].swapaxes(0, 1))


def test_trim_forgets_the_end():
    cache = KVCache(1, 2, 4, capacity=4, kv_bits=32)
    kept = step(cache, 0, 3, 0.0)
    cache.advance(3)
    cache.trim(1)
    new = step(cache, 0, 1, 50.0)
    keys, _ = cache.append(0, new, new)
    assert cache.offset == 1
    assert np.array_equal(keys[:, :2], np.concatenate((kept[:1], new)).swapaxes(0, 1))
    with pytest.raises(UsageError, match="trim"):
        cache.trim(2)
    with pytest.raises(UsageError, match="trim"):
        cache.trim(-1)


def test_16_bits_round_to_the_nearest():
    cache = KVCache(1, 1, 2, capacity=1, kv_bits=16)
    x = np.array(
        [[[1.00390625, 3.141592]]], dtype=np.float32
    )  # a tie, and a number between two bf16
    keys, values = cache.append(0, x, -x)
    assert keys.dtype == BF16
    assert to_fp32(keys).flatten().tolist() == [1.0, 3.140625]
    assert to_fp32(values).flatten().tolist() == [-1.0, -3.140625]


def test_bf16_is_that_of_torch():
    bits = np.random.default_rng(2).integers(0, 1 << 32, 4096, dtype=np.uint32)
    ends = [0, 1, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F7F8000, 0x3F808000, 0x3F818000]
    x = np.concatenate([bits, np.array(ends, dtype=np.uint32)]).view(np.float32)
    expected = torch.from_numpy(x).bfloat16().float().numpy()
    np.testing.assert_array_equal(to_fp32(to_bf16(x)), expected)
    assert np.array_equal(to_bf16(expected), to_bf16(to_fp32(to_bf16(expected))))


def test_8_bits_are_within_half_a_step_of_the_largest():
    cache = KVCache(2, 3, 16, capacity=5, kv_bits=8)
    keys = 10 * np.random.default_rng(1).normal(size=(4, 3, 16)).astype(np.float32)
    keys[2, 1] = 0
    stored, _ = cache.append(1, keys, -keys)
    key_scales, value_scales = cache.scales(1)
    assert stored.dtype == np.int8 and np.array_equal(key_scales[:, :4], value_scales[:, :4])
    got = (stored * key_scales[..., None])[:, :4].swapaxes(0, 1)
    step = np.abs(keys).max(-1, keepdims=True) / 127
    assert (np.abs(got - keys) <= step * 0.5001).all()
    assert np.array_equal(got[2, 1], np.zeros(16))
    assert KVCache(1, 1, 2, capacity=1, kv_bits=16).scales(0) == (None, None)


@pytest.mark.parametrize("kv_bits", [8, 16, 32])
def test_another_room_keeps_what_is_stored(kv_bits):
    cache = KVCache(2, 3, 16, capacity=40, kv_bits=kv_bits)
    random, stored = np.random.default_rng(0), []
    for room in (9, 40, 10, 17, 14, 15):
        before = [[part[:, : cache.offset].copy() for part in each] for each in stored]
        cache.resize(room)
        assert cache.room == cache.view.capacity == room
        keys, nothing = random.normal(size=(2, 2, 3, 16)).astype(np.float32), np.empty((0, 3, 16))
        now = [(*cache.append(layer, nothing, nothing), *cache.scales(layer)) for layer in (0, 1)]
        now = [[part for part in each if part is not None] for each in now]
        for old, new in zip(before, now, strict=bool(before)):
            for one, other in zip(old, new, strict=True):
                assert other.shape[1] == room and np.array_equal(other[:, : cache.offset], one)
        stored = now
        for layer in (0, 1):
            cache.append(layer, keys[layer], -keys[layer])
        cache.advance(2)
    with pytest.raises(UsageError, match="expected 12 to 40"):
        cache.resize(11)
    with pytest.raises(UsageError, match="16 tokens have no room"):
        cache.append(0, np.zeros((4, 3, 16)), np.zeros((4, 3, 16)))


def test_room_grows_in_steps_and_counts_whole_huge_pages():
    cache = KVCache(16, 16, 128, capacity=4096)  # 128 KiB a token
    assert [cache.room_for(n) for n in (1, 228, 229, 3640, 4096)] == [256, 256, 512, 4096, 4096]
    assert cache.held_bytes(256) == 32 << 20 and cache.held_bytes(257) == 34 << 20
    small = KVCache(1, 2, 8, capacity=1000)
    assert small.room_for(1) == 1000 and small.held_bytes(3) == small.num_bytes


@pytest.mark.parametrize("kv_bits, head_bytes", [(8, 8 + 4), (16, 16), (32, 32)])
def test_the_size_is_known_beforehand(kv_bits, head_bytes):
    cache = KVCache(3, 2, 8, capacity=10, kv_bits=kv_bits)
    expected = 3 * 2 * 2 * 10 * head_bytes
    assert cache.num_bytes == 3 * 2 * 10 * kv_head_bytes(8, kv_bits) == expected


def test_overflow_names_the_context_length():
    cache = KVCache(1, 1, 2, capacity=4, kv_bits=32)
    cache.append(0, np.zeros((3, 1, 2)), np.zeros((3, 1, 2)))
    cache.advance(3)
    with pytest.raises(UsageError, match="3 of the 4 tokens of the context length"):
        cache.append(0, np.zeros((2, 1, 2)), np.zeros((2, 1, 2)))
    with pytest.raises(UsageError, match="context length"):
        cache.advance(2)
    assert cache.offset == 3
    cache.check_room(1)


def test_impossible_caches():
    with pytest.raises(UsageError, match="kv_bits"):
        KVCache(1, 1, 2, capacity=4, kv_bits=4)
    with pytest.raises(UsageError, match="0 tokens"):
        KVCache(1, 1, 2, capacity=0)
