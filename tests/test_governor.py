"""The knee finder: what it does with recorded signals, what it reads, and the cache it resizes."""

from pathlib import Path

import numpy as np
import pytest
from stores_small import make_store

from edgemoe import Engine
from edgemoe.config import EngineConfig
from edgemoe.runtime.governor import INTERVAL_S, Governor, Signals
from edgemoe.runtime.index import load_index
from edgemoe.runtime.pressure import Pressure, auto_budget, read_pressure
from edgemoe.sampling import SamplingParams

LEAST, MOST, AVAILABLE = 100, 1_600, 16_000


class Rig:
    """Time goes on in looks of one second; the share of it that is stall is a function of the
    capacity."""

    def __init__(self, start: int, stall_of=lambda capacity: 0.5, **signs) -> None:
        self.now = self.busy = self.stall = self.stalled = 0.0
        self.faults, self.available, self.stall_of = 0, AVAILABLE, stall_of
        self.governor = Governor(LEAST, MOST, start, self.signals())

    def signals(self) -> Signals:
        pressure = Pressure(self.faults, self.stalled, self.available)
        return Signals(self.now, self.busy, self.stall, pressure)

    def look(self, faults: int = 0, stalled_s: float = 0.0, busy: float = 1.0) -> int:
        self.now += INTERVAL_S
        self.busy += busy
        self.stall += busy * self.stall_of(self.governor.capacity)
        self.faults += faults
        self.stalled += stalled_s
        assert self.governor.is_due(self.now)
        capacity = self.governor.step(self.signals())
        assert LEAST <= capacity <= self.governor.most
        return capacity

    def looks(self, num: int) -> list[int]:
        return [self.look() for _ in range(num)]


def test_it_grows_slowly_while_stall_falls_and_never_above_the_budget():
    rig = Rig(400, lambda capacity: 1 - capacity / 2_000)
    sizes = rig.looks(60)
    assert max(b - a for a, b in zip(sizes, sizes[1:], strict=False)) <= MOST / 16
    assert sizes[-1] == MOST and sizes == sorted(sizes)


def test_it_stops_at_the_knee():
    rig = Rig(400, lambda capacity: max(0.3, 1 - capacity / 1_200))  # no better beyond 840
    sizes = rig.looks(120)
    assert 800 <= sizes[-1] <= 1_100 and sizes[-1] == sizes[60]
    rig.stall_of = lambda capacity: max(0.3, 1.3 - capacity / 1_600)  # another text
    assert max(rig.looks(60)) > sizes[-1]


def test_it_does_not_take_memory_that_saves_no_time():
    rig = Rig(400, lambda capacity: 0.001)
    assert set(rig.looks(60)) == {400}
    idle = Rig(400)
    assert {idle.look(busy=0.01) for _ in range(60)} == {400}


@pytest.mark.parametrize("sign", [{"faults": 500}, {"stalled_s": 0.5}])
def test_it_shrinks_at_once_and_waits_longer_each_time(sign):
    rig = Rig(MOST, lambda capacity: 1 - capacity / 2_000)
    assert rig.look(**sign) == MOST * 3 // 4
    waits = []
    for _ in range(3):
        before, count = rig.governor.capacity, 0
        while rig.look() == before:
            count += 1
        waits.append(count)
        rig.look(**sign)
    assert waits[0] >= 9 and waits[1] > 1.5 * waits[0] and waits[2] > 1.5 * waits[1]
    for _ in range(40):
        rig.look(**sign)
    assert rig.governor.capacity == LEAST and rig.governor.reason


def test_it_gives_back_at_once_what_is_missing():
    rig = Rig(MOST)
    rig.available = AVAILABLE // 16 - 900
    assert rig.look() == MOST - 900
    rig.available = 0
    assert rig.look() == LEAST


def test_a_few_faults_are_no_shortage():
    rig = Rig(MOST)
    assert {rig.look(faults=3, stalled_s=0.001) for _ in range(20)} == {MOST}


def test_what_the_system_does_not_tell_is_not_asked():
    nothing = Pressure(None, None, None)
    governor = Governor(LEAST, MOST, 400, Signals(0, 0, 0, nothing))
    for second in range(1, 60):
        governor.step(Signals(second, second, second * 0.5, nothing))
    assert governor.num_shrinks == 0 and governor.capacity > 400


# ---- what it reads -----------------------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = "MemTotal: 8000 kB\nMemFree: 100 kB\nMemAvailable: 3000 kB\n"
STAT = "12 (a name) of) R 1 2 3 4 5 6 7 8 77 10 11"


def test_signs_are_read_where_linux_has_them(tmp_path):
    files = {
        "proc/self/stat": STAT,
        "proc/meminfo": MEMINFO,
        "proc/pressure/memory": "some avg10=0.00 avg60=0.00 total=2500000\nfull total=1\n",
    }
    assert read_pressure(write(tmp_path, files)) == Pressure(77, 2.5, 3000 * 1024)


@pytest.mark.parametrize(
    "files",
    [
        {
            "proc/self/cgroup": "0::/box\n",
            "sys/fs/cgroup/box/memory.max": "1000000",
            "sys/fs/cgroup/box/memory.current": "900000",
            "sys/fs/cgroup/box/memory.stat": "anon 5\ninactive_file 300000\n",
        },
        {
            "proc/self/cgroup": "9:memory:/box\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "1000000",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "900000",
            "sys/fs/cgroup/memory/box/memory.stat": "inactive_file 1\ntotal_inactive_file 300000\n",
        },
    ],
)
def test_a_control_group_has_its_own_memory_left(tmp_path, files):
    root = write(tmp_path, files | {"proc/meminfo": MEMINFO})
    assert read_pressure(root).available_bytes == 400_000


def test_this_system_tells_something():
    found = read_pressure()
    assert found.available_bytes > 0
    assert auto_budget() > found.available_bytes // 2


# ---- the cache ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("governor"))


def test_auto_memory_asks_for_the_governor():
    config = EngineConfig.make({}, memory="auto")
    assert config.find_knee and config.memory_bytes > 0
    assert not EngineConfig.make({}, memory="4GiB").find_knee
    assert EngineConfig.make({"EDGEMOE_MEMORY": "auto"}).find_knee


def test_the_cache_follows_and_no_logit_changes(store, monkeypatch):
    ids = list(range(100))
    with Engine.from_pretrained(store) as engine:
        expected = engine.session().logits(ids)
        assert engine.report()["knee"] is None
    size = load_index(store).max_record_bytes
    with Engine.from_pretrained(store, memory="auto") as engine:
        governor, cache = engine.governed.governor, engine.cache
        assert governor.most == cache.capacity_bytes == engine.report()["knee"]["capacity_bytes"]
        assert np.array_equal(engine.session().logits(ids), expected)
        monkeypatch.setattr(governor, "is_due", lambda now: True)
        for wanted in (6 * size, 3 * governor.least, 20 * size, governor.most):

            def step(signals, wanted=wanted):
                governor.capacity = wanted
                return wanted

            monkeypatch.setattr(governor, "step", step)
            session = engine.session()
            assert np.array_equal(session.logits(ids), expected)
            session.close()
            assert cache.capacity_bytes == wanted // 4096 * 4096
            assert cache.resident_bytes <= cache.capacity_bytes


def test_decoded_tokens_are_looked_at_too(store, monkeypatch):
    with Engine.from_pretrained(store, memory="auto") as engine:
        looks = []
        monkeypatch.setattr(engine.governed.governor, "is_due", lambda now: True)
        monkeypatch.setattr(
            engine.governed.governor,
            "step",
            lambda signals: looks.append(signals) or engine.cache.capacity_bytes,
        )
        engine.generate([1, 2, 3], SamplingParams(max_tokens=5))
        assert len(looks) == 5  # the prompt and four tokens that were fed
        assert looks[-1].busy_s > looks[0].busy_s > 0 and looks[-1].stall_s >= 0
