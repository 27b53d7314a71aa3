"""Engine options: checked once, from arguments, then the environment, then defaults."""

import pytest

from edgemoe.config import EngineConfig, num_cores
from edgemoe.runtime import core
from edgemoe.runtime.errors import UsageError


def test_defaults():
    config = EngineConfig.make({})
    assert (config.memory_bytes, config.context, config.policy) == (None, None, "forecast")
    assert config.threads == num_cores() >= 1
    assert config.backend == core.BACKEND
    with pytest.raises(AttributeError):
        config.policy = "lru"


def test_arguments_win_over_the_environment():
    environment = {
        "EDGEMOE_MEMORY": "2GiB",
        "EDGEMOE_CONTEXT": "128",
        "EDGEMOE_POLICY": "lru",
        "EDGEMOE_KV_BITS": "32",
        "EDGEMOE_THREADS": "",
    }
    config = EngineConfig.make(environment, policy="lfu", context=None)
    assert config.memory_bytes == 2 << 30 and config.context == 128
    assert (config.policy, config.kv_bits) == ("lfu", 32)
    assert EngineConfig.make({}, memory=123).memory_bytes == 123


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"policy": "random"}, "policy"),
        ({"io": "mmap"}, "io"),
        ({"kv_bits": 4}, "kv_bits"),
        ({"backend": "cuda"}, "backend"),
        ({"context": 0}, "context"),
        ({"context": "many"}, "context"),
        ({"threads": -1}, "threads"),
        ({"threads": 1000}, "threads"),
        ({"cache_bytes": -1}, "cache_bytes"),
        ({"memory": "lots"}, "lots"),
        ({"memory": 0}, "0"),
        ({"speed": 1}, "speed"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(UsageError, match=f"`{name}`"):
        EngineConfig.make({}, **options)


def test_bad_environment_is_named():
    with pytest.raises(UsageError, match="`EDGEMOE_THREADS`"):
        EngineConfig.make({"EDGEMOE_THREADS": "two"})
    with pytest.raises(UsageError, match="`policy`"):
        EngineConfig.make({"EDGEMOE_POLICY": "best"})
