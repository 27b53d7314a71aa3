"""Pruned sets as files: saved, loaded, mixed; every way in which one can be wrong."""

import json
from dataclasses import replace

import numpy as np
import pytest
from sets_small import make_set, owner
from stores_small import make_store

from edgemoe.engine import Engine
from edgemoe.runtime.errors import FormatError, NotFoundError, UsageError
from edgemoe.runtime.sets import load_set, mix, resolve, save_set, set_names, set_path

KEPT = {0: (0, 2, 5), 1: (1, 2, 3, 7), 2: (4, 6)}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = make_store(tmp_path_factory.mktemp("sets"))
    shares = {0: (0.2, 0.5, 0.3), 1: (0.1, 0.2, 0.3, 0.4), 2: (0.5, 0.5)}
    make_set(path, "code", KEPT, pick_share=shares, parameters={"keep": "40%"})
    make_set(path, "prose", {0: (0, 1), 1: (1, 3), 2: (4, 5, 6)})
    return path


def test_a_set_comes_back_as_it_was_saved(path):
    expert_set = load_set(path, "code")
    assert expert_set.kept == KEPT and expert_set.num_kept == 9
    assert expert_set.parameters == {"keep": "40%"} and expert_set.method == "by hand"
    assert expert_set.masks()[0].tolist() == [1, 0, 1, 0, 0, 1, 0, 0]
    assert set_names(path) == ["code", "prose"]
    assert expert_set.by_use()[:5] == [(0, 2), (1, 7), (2, 4), (0, 5), (1, 3)]
    files = sorted(file.name for file in set_path(path, "code").parent.iterdir())
    assert files == ["code.json", "prose.json"]


def test_sets_mix(path):
    of = owner(path)
    assert resolve(path, "code+prose", of).kept == {
        0: (0, 1, 2, 5),
        1: (1, 2, 3, 7),
        2: (4, 5, 6),
    }
    both = resolve(path, "code + prose & code", of)
    assert both.kept == KEPT and both.name == "code+prose&code"
    assert both.pick_share[1] == load_set(path, "code").pick_share[1]
    with pytest.raises(UsageError, match="too few experts in layer 0; 1, and every token needs 2"):
        resolve(path, "code&prose", of)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": dict.fromkeys(range(3), ())}, "is empty"),
        ({"kept": {}}, "is empty"),
        ({"kept": {0: (0, 1), 1: (0, 1)}}, r"layers of this store; expected layers \[0, 1, 2\]"),
        ({"kept": KEPT | {1: (3,)}}, "too few experts in layer 1; 1, and every token needs 2"),
        ({"kept": KEPT | {1: (3, 8)}}, "layer 1 has no such experts; expected 8, .* got expert 8"),
        ({"kept": KEPT | {1: (-1, 3)}}, "got expert -1"),
        ({"kept": KEPT | {1: (3, 3)}}, "do not ascend"),
        ({"num_experts": {0: 8, 1: 9, 2: 8}}, "layer 1 has no such experts"),
        ({"fingerprint": "0" * 32}, "belongs to another checkpoint"),
        ({"tokenizer_sha256": "0" * 64}, "another tokenizer"),
    ],
)
def test_a_set_that_does_not_fit_is_refused(path, change, message):
    wrong = replace(load_set(path, "code"), name="wrong", pick_share={}, **change)
    with pytest.raises(UsageError, match=message):
        wrong.check(owner(path))
    save_set(path, wrong)
    try:
        with pytest.raises(UsageError, match=message):
            Engine.from_pretrained(path, set="wrong", set_mode="hard")
    finally:
        set_path(path, "wrong").unlink()


def test_a_set_of_another_store_is_refused(path, tmp_path):
    """The same shape, other routers."""
    other = make_store(tmp_path, num_attention_heads=4)
    target = set_path(other, "code")
    target.parent.mkdir()
    target.write_bytes(set_path(path, "code").read_bytes())
    with pytest.raises(UsageError, match="another checkpoint"):
        Engine.from_pretrained(other, set="code")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "{}",
        '{"format": "something", "version": 1}',
        '{"format": "edgemoe-set", "version": 1, "layers": {"a": {}}}',
        '{"format": "edgemoe-set", "version": 1, "layers": {"0": {"kept": [1.5]}}}',
    ],
)
def test_a_file_that_is_no_set_is_refused(path, text):
    target = set_path(path, "broken")
    target.write_text(text, encoding="utf-8")
    try:
        with pytest.raises(FormatError, match="is no pruned set"):
            load_set(path, "broken")
    finally:
        target.unlink()


def test_a_newer_version_is_refused(path):
    document = json.loads(set_path(path, "code").read_text(encoding="utf-8"))
    target = set_path(path, "newer")
    target.write_text(json.dumps(document | {"version": 2}), encoding="utf-8")
    try:
        with pytest.raises(FormatError, match="set version 2"):
            load_set(path, "newer")
    finally:
        target.unlink()


def test_names(path):
    with pytest.raises(NotFoundError, match="no set `cod`.*there are: code, prose"):
        load_set(path, "cod")
    for name in ("", "../code", ".hidden", "a b", "a+b", "code\n"):
        with pytest.raises(UsageError, match="cannot be the name of a set"):
            load_set(path, name)


def test_a_mixture_takes_the_larger_share(path):
    code = load_set(path, "code")
    other = replace(code, kept={0: (0, 5), 1: (1,), 2: (4,)}, pick_share={0: (0.6, 0.1)})
    mixed = mix(code, other, "+")
    assert mixed.pick_share[0] == (0.6, 0.5, 0.3)
    assert np.isclose(sum(mixed.pick_share[1]), 1)
