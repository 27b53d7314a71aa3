"""The executor that shows what it computes: the same outputs, and figures that a loop agrees on."""

import numpy as np
import pytest
from stores import HIDDEN, NUM_EXPERTS, make_store
from test_executor import BACKENDS, Rig, make_steps

from edgemoe.runtime import kernels, reference
from edgemoe.runtime.observe import ObservingExecutor


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("observe") / "tiny.edgemoe")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("share", (0.2, 1.0))  # several waves, and one
def test_what_is_observed_is_what_was_computed(index, backend, share):
    capacity = max(int(share * index.expert_bytes), 4 * index.max_record_bytes)
    steps = make_steps((40, 2))
    with Rig(index, capacity, backend=backend) as rig:
        plain = rig.run(steps)
        seen = []
        rig.executor = ObservingExecutor(rig.executor, lambda o: seen.append(copied(o)))
        observed = rig.run(steps)
        assert all(np.array_equal(a, b) for a, b in zip(plain, observed, strict=True))
        for step, found in zip(steps, seen, strict=True):
            check(index, rig, step, found)


def copied(o) -> dict:
    fields = ("experts", "begins", "tokens", "weights", "norms", "hidden_square")
    return {"layer": o.layer, **{name: getattr(o, name).copy() for name in fields}}


def check(index, rig, step, found) -> None:
    layer, x, ids, weights = step
    assert found["layer"] == layer
    assert found["experts"].tolist() == sorted(set(ids.flatten().tolist()))
    for i, expert in enumerate(found["experts"].tolist()):
        tokens, slots = (ids == expert).nonzero()
        pairs = slice(found["begins"][i], found["begins"][i + 1])
        assert found["tokens"][pairs].tolist() == tokens.tolist()
        np.testing.assert_array_equal(found["weights"][pairs], weights[tokens, slots])
        key = layer * NUM_EXPERTS + expert
        rig.cache.begin_layer(layer)
        rig.cache.hint([key])
        rig.cache.wait(key)
        record, layout = rig.cache.view(key), rig.cache.table.layouts[key]
        gate, up, down = kernels.unpack_record(record, layout)
        rig.cache.release([key])
        inputs = x[tokens]
        h = reference.silu(inputs @ gate.T) * (inputs @ up.T)
        norms = np.linalg.norm(h @ down.T, axis=-1)
        assert inputs.shape[1] == HIDDEN
        # The native path quantizes activations to int8.
        np.testing.assert_allclose(found["norms"][pairs], norms, rtol=0.05, atol=0.02 * norms.max())
        square = np.square(h).sum(axis=0)
        worst = np.abs(found["hidden_square"][i] - square).max()
        assert worst <= 0.05 * square.max()
