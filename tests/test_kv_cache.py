"""The KV cache by hand-sized examples."""

import pytest
import torch

from edgemoe.kv_cache import KVCache
from edgemoe.runtime.errors import UsageError


def step(cache: KVCache, layer: int, num_tokens: int, start: float) -> torch.Tensor:
    keys = torch.arange(num_tokens * 2 * 4, dtype=torch.float32).reshape(num_tokens, 2, 4) + start
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
    assert cache.offset == 5 and keys.shape == (2, 5, 4) and keys.is_contiguous()
    expected = torch.cat((first[1], second)).transpose(0, 1)
    assert torch.equal(keys, expected) and torch.equal(values, -expected)
    other, _ = cache.append(0, torch.empty(0, 2, 4), torch.empty(0, 2, 4))
    assert torch.equal(other[:, :3], first[0].transpose(0, 1))


def test_trim_forgets_the_end():
    cache = KVCache(1, 2, 4, capacity=4, kv_bits=32)
    kept = step(cache, 0, 3, 0.0)
    cache.advance(3)
    cache.trim(1)
    new = step(cache, 0, 1, 50.0)
    keys, _ = cache.append(0, new, new)
    assert cache.offset == 1
    assert torch.equal(keys[:, :2], torch.cat((kept[:1], new)).transpose(0, 1))
    with pytest.raises(UsageError, match="trim"):
        cache.trim(2)
    with pytest.raises(UsageError, match="trim"):
        cache.trim(-1)


def test_16_bits_round_to_the_nearest():
    cache = KVCache(1, 1, 2, capacity=1, kv_bits=16)
    x = torch.tensor([[[1.00390625, 3.141592]]])  # a tie, and a number between two bf16
    keys, values = cache.append(0, x, -x)
    assert keys.dtype == torch.bfloat16
    assert keys.flatten().tolist() == [1.0, 3.140625]
    assert values.flatten().tolist() == [-1.0, -3.140625]


def test_8_bits_are_within_half_a_step_of_the_largest():
    cache = KVCache(2, 3, 16, capacity=5, kv_bits=8)
    keys = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(1)) * 10
    keys[2, 1] = 0
    stored, _ = cache.append(1, keys, -keys)
    key_scales, value_scales = cache.scales(1)
    assert stored.dtype == torch.int8 and torch.equal(key_scales[:, :4], value_scales[:, :4])
    got = (stored.float() * key_scales[..., None])[:, :4].transpose(0, 1)
    step = keys.abs().amax(-1, keepdim=True) / 127
    assert ((got - keys).abs() <= step * 0.5001).all()
    assert torch.equal(got[2, 1], torch.zeros(16))
    assert KVCache(1, 1, 2, capacity=1, kv_bits=16).scales(0) == (None, None)


@pytest.mark.parametrize("kv_bits, head_bytes", [(8, 8 + 4), (16, 16), (32, 32)])
def test_the_size_is_known_beforehand(kv_bits, head_bytes):
    cache = KVCache(3, 2, 8, capacity=10, kv_bits=kv_bits)
    expected = 3 * 2 * 2 * 10 * head_bytes
    assert cache.num_bytes == KVCache.bytes_for(3, 2, 8, 10, kv_bits) == expected


def test_overflow_names_the_context_length():
    cache = KVCache(1, 1, 2, capacity=4, kv_bits=32)
    cache.append(0, torch.zeros(3, 1, 2), torch.zeros(3, 1, 2))
    cache.advance(3)
    with pytest.raises(UsageError, match="3 of the 4 tokens of the context length"):
        cache.append(0, torch.zeros(2, 1, 2), torch.zeros(2, 1, 2))
    with pytest.raises(UsageError, match="context length"):
        cache.advance(2)
    assert cache.offset == 3
    cache.check_room(1)


def test_impossible_caches():
    with pytest.raises(UsageError, match="kv_bits"):
        KVCache(1, 1, 2, capacity=4, kv_bits=4)
    with pytest.raises(UsageError, match="0 tokens"):
        KVCache(1, 1, 2, capacity=0)
