"""Arenas and checksums: native against Python."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.runtime import core
from edgemoe.runtime.checksum import crc32c
from edgemoe.runtime.errors import EdgeMoeError, UsageError
from edgemoe.runtime.memory import Arena

BACKENDS = ["reference"] + (["native"] if core.lib else [])


@pytest.mark.parametrize("backend", BACKENDS)
def test_arena(backend):
    with Arena(3_000_000, backend) as arena:
        assert arena.address % (2 << 20) == 0
        view = arena.view(1_000_000, 2_000_000)
        assert view.ctypes.data == arena.address + 1_000_000
        view[:] = 7
        assert arena.view(999_999, 2)[0] == 0 and arena.view(999_999, 2)[1] == 7
        for offset, num_bytes in [(0, 3_000_001), (-1, 4), (3_000_000, 1)]:
            with pytest.raises(UsageError):
                arena.view(offset, num_bytes)
    assert view[-1] == 7  # a view keeps the memory
    with pytest.raises(UsageError):
        arena.view(0, 1)
    with pytest.raises(UsageError):
        Arena(0, backend)
    with pytest.raises(EdgeMoeError, match="no memory"):
        Arena(1 << 60, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_crc32c_known_values(backend):
    assert crc32c(b"123456789", backend=backend) == 0xE3069283
    assert crc32c(bytes(32), backend=backend) == 0x8A9136AA
    assert crc32c(b"\xff" * 32, backend=backend) == 0x62A8AB43
    assert crc32c(b"", 5, backend=backend) == 5


@given(st.binary(max_size=40_000), st.integers(0, 40_000))
@settings(max_examples=30, deadline=None)
def test_crc32c_chains_and_agrees(data, cut):
    whole = [crc32c(data, backend=name) for name in BACKENDS]
    parts = [crc32c(data[cut:], crc32c(data[:cut], backend=b), backend=b) for b in BACKENDS]
    assert len(set(whole + parts)) == 1
