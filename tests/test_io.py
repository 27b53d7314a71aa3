"""Record readers and trunk reads: native against Python, direct against buffered."""

import ctypes
import errno
import functools
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors

from edgemoe.runtime import core
from edgemoe.runtime import io as record_io
from edgemoe.runtime.checksum import crc32c
from edgemoe.runtime.errors import EdgeMoeError, FormatError, NotFoundError, UsageError
from edgemoe.runtime.files import open_raw
from edgemoe.runtime.format import PAGE_BYTES, QuantSpec, RecordLayout, record_name
from edgemoe.runtime.headers import TensorEntry, encode_header, read_header
from edgemoe.runtime.index import ExpertRecord

BACKENDS = ["reference"] + (["native"] if core.lib else [])
SPECS = [
    QuantSpec(4, 32, "sym"),
    QuantSpec(2, 64, "asym"),
    QuantSpec(16, 0, "bf16"),
    QuantSpec(3, 64, "sym"),
]
HIDDEN, WIDTH = 64, 128


@pytest.fixture(params=[*BACKENDS, *(["native threads"] if core.lib else [])])
def backend(request, monkeypatch):
    """A backend; the native one with io_uring where it is allowed, and with reader threads."""
    name, _, threads = request.param.partition(" ")
    if threads:
        with_threads = functools.partial(record_io.RecordReader, method="threads")
        monkeypatch.setattr(record_io, "RecordReader", with_threads)
    return name


def write_records(path: Path, num_records: int = 12, seed: int = 0):
    """An experts file of random bytes, records of different sizes; returns records and bytes."""
    rng = np.random.default_rng(seed)
    layouts = [
        RecordLayout(SPECS[i % 4], SPECS[(i // 2) % 4], HIDDEN, WIDTH) for i in range(num_records)
    ]
    tensors = [
        (record_name(0, i), "U8", [layout.num_bytes], layout.num_bytes)
        for i, layout in enumerate(layouts)
    ]
    header = encode_header(tensors, {"format": "edgemoe"}, PAGE_BYTES)
    offset = len(header)
    records, contents = [], []
    with open(path, "wb") as file:
        file.write(header)
        for layout in layouts:
            data = rng.integers(0, 256, layout.num_bytes, dtype=np.uint8)
            sums = (crc32c(data[: layout.down_offset]), crc32c(data[layout.down_offset :]))
            records.append(ExpertRecord(offset, layout, sums))
            contents.append(data)
            file.write(data.tobytes())
            offset += layout.num_bytes
        file.flush()
        os.fsync(file.fileno())  # dirty pages would stay in the page cache
    return records, contents


@pytest.fixture
def experts(tmp_path):
    path = tmp_path / "experts.safetensors"
    return path, *write_records(path)


class Slots:
    """One place in an arena for every record."""

    def __init__(self, records, backend=None):
        self.sizes = [record.num_bytes for record in records]
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)])
        self.arena = record_io.Arena(int(self.offsets[-1]), backend)

    def addresses(self, keys):
        return np.array([self.arena.address + self.offsets[k] for k in keys], dtype=np.uint64)

    def bytes_of(self, key):
        return self.arena.view(int(self.offsets[key]), self.sizes[key])


def submit(reader, slots, keys):
    reader.submit(np.array(keys, dtype=np.int32), slots.addresses(keys))


def direct_or_skip(path, records, backend=None):
    try:
        return record_io.RecordReader(path, records, io="direct", backend=backend)
    except UsageError as error:
        pytest.skip(f"direct I/O refused here: {error.why}")


@pytest.mark.parametrize("io", record_io.IO_MODES)
def test_reads_every_record(experts, backend, io):
    path, records, contents = experts
    reader = (
        direct_or_skip(path, records, backend)
        if io == "direct"
        else record_io.RecordReader(path, records, depth=3, io=io, backend=backend)
    )
    with reader:
        slots = Slots(records, backend)
        assert list(reader.status) == [record_io.ABSENT] * len(records)
        keys = list(np.random.default_rng(1).permutation(len(records)))
        submit(reader, slots, keys)
        for key in range(len(records)):
            assert reader.wait(key) == record_io.READY
            np.testing.assert_array_equal(slots.bytes_of(key), contents[key])
        assert list(reader.status) == [record_io.READY] * len(records)
        stats = reader.stats()
        assert stats["num_reads"] == len(records)
        assert stats["num_bytes"] == sum(record.num_bytes for record in records)
        assert stats["read_s"] > 0 and stats["cpu_s"] > 0
        assert reader.io_note.startswith("direct, " if reader.is_direct else "buffered, reader ")
        if io == "buffered":
            assert reader.io_note == "buffered, reader threads: as asked"


def test_handle_is_native_only(experts, backend):
    path, records, _ = experts
    with record_io.RecordReader(path, records, backend=backend) as reader:
        assert (reader.handle is not None) == (backend == "native")


def test_direct_refused_is_said(experts, backend, monkeypatch):
    path, records, _ = experts
    if backend == "native":
        real = core.lib.em_store_open_files

        def refuse(paths, num_paths, table, num, depth, mode, with_threads, error):
            if mode == 1:
                error.value = -errno.EINVAL
                return None
            return real(paths, num_paths, table, num, depth, mode, with_threads, error)

        monkeypatch.setattr(core.lib, "em_store_open_files", refuse)
    else:
        from edgemoe.runtime import python_reader

        def refuse(path, direct):
            if direct:
                raise OSError(errno.EINVAL, "Invalid argument")
            return open_raw(path, direct)

        monkeypatch.setattr(python_reader, "open_raw", refuse)
    with record_io.RecordReader(path, records, backend=backend) as reader:
        assert not reader.is_direct
        assert reader.io_note == "buffered, reader threads: direct I/O refused (Invalid argument)"
    with pytest.raises(UsageError, match="direct I/O"):
        record_io.RecordReader(path, records, io="direct", backend=backend)


@pytest.mark.parametrize("section", ["gate_up", "down", "padding"])
def test_flipped_byte_is_found(experts, backend, section):
    path, records, contents = experts
    bad = 5
    layout = records[bad].layout
    place = {
        "gate_up": 100,
        "down": layout.down_offset + layout.down_bytes - 1,
        "padding": layout.num_bytes - 1,
    }[section]
    with open(path, "r+b") as file:
        file.seek(records[bad].offset + place)
        file.write(bytes([contents[bad][place] ^ 0x10]))
    with record_io.RecordReader(path, records, backend=backend) as reader:
        slots = Slots(records, backend)
        submit(reader, slots, range(len(records)))
        found = [reader.wait(key) for key in range(len(records))]
        expected = [record_io.READY] * len(records)
        expected[bad] = record_io.ERR_CRC
        assert found == expected
        # A record that failed stays suspect; one that is repaired is read like any other.
        submit(reader, slots, [bad])
        assert reader.wait(bad) == record_io.ERR_CRC
        with open(path, "r+b") as file:
            file.seek(records[bad].offset + place)
            file.write(bytes([contents[bad][place]]))
            file.flush()
            os.fsync(file.fileno())
        submit(reader, slots, [bad])
        assert reader.wait(bad) == record_io.READY
    assert record_io.failure_text(record_io.ERR_CRC) == "checksum mismatch"


@pytest.mark.parametrize("io", ["auto", "buffered"])
@pytest.mark.parametrize("cut", [1, PAGE_BYTES, PAGE_BYTES + 100])
def test_truncation_while_open(experts, backend, io, cut):
    path, records, contents = experts
    with record_io.RecordReader(path, records, io=io, backend=backend) as reader:
        slots = Slots(records, backend)
        last = len(records) - 1
        submit(reader, slots, [last])
        assert reader.wait(last) == record_io.READY
        reader.status[last] = record_io.ABSENT
        os.truncate(path, path.stat().st_size - cut)
        submit(reader, slots, [0, last])
        assert reader.wait(0) == record_io.READY
        assert reader.wait(last) == record_io.ERR_SHORT
        np.testing.assert_array_equal(slots.bytes_of(0), contents[0])
        os.truncate(path, 0)
        submit(reader, slots, [1])
        assert reader.wait(1) == record_io.ERR_SHORT
    assert "ends inside" in record_io.failure_text(record_io.ERR_SHORT)


def test_deleted_while_open(experts, backend):
    path, records, contents = experts
    with record_io.RecordReader(path, records, backend=backend) as reader:
        path.unlink()
        slots = Slots(records, backend)
        submit(reader, slots, [3])
        assert reader.wait(3) == record_io.READY
        np.testing.assert_array_equal(slots.bytes_of(3), contents[3])


def test_open_errors(tmp_path, experts, backend):
    path, records, _ = experts
    with pytest.raises(NotFoundError, match="missing.safetensors"):
        record_io.RecordReader(tmp_path / "missing.safetensors", records, backend=backend)
    with pytest.raises(UsageError, match="unknown io"):
        record_io.RecordReader(path, records, io="mmap", backend=backend)
    with pytest.raises(UsageError, match="reads at a time"):
        record_io.RecordReader(path, records, depth=0, backend=backend)
    shifted = [ExpertRecord(100, records[0].layout, (0, 0))]
    with pytest.raises(FormatError, match="page"):
        record_io.RecordReader(path, shifted, backend=backend)
    with pytest.raises(EdgeMoeError):  # a folder opens for reading and then refuses
        reader = record_io.RecordReader(tmp_path, records, io="buffered", backend=backend)
        slots = Slots(records, backend)
        submit(reader, slots, [0])
        status = reader.wait(0)
        reader.close()
        raise EdgeMoeError(record_io.failure_text(status))


@pytest.mark.parametrize("io", ["auto", "buffered"])
def test_read_error_has_a_name(experts, backend, io):
    path, records, _ = experts
    with record_io.RecordReader(path, records, io=io, backend=backend) as reader:
        # Nothing is mapped at the lowest page: the system refuses the copy with EFAULT.
        reader.submit(np.array([0]), np.array([PAGE_BYTES], dtype=np.uint64))
        assert reader.wait(0) == -errno.EFAULT
        slots = Slots(records, backend)
        submit(reader, slots, [0, 1])
        assert [reader.wait(0), reader.wait(1)] == [record_io.READY] * 2
        assert "Bad address" in record_io.failure_text(-errno.EFAULT)


def test_submit_is_all_or_nothing(experts, backend):
    path, records, _ = experts
    with record_io.RecordReader(path, records, backend=backend) as reader:
        slots = Slots(records, backend)
        good = slots.addresses([0, 1])
        for keys, addresses in [
            ([0, len(records)], good),
            ([0, -1], good),
            ([0, 0], good),
            ([0, 1], good + np.array([0, 512], dtype=np.uint64)),
            ([0, 1], good * np.array([1, 0], dtype=np.uint64)),
            ([0, 1], good[:1]),
        ]:
            with pytest.raises(UsageError):
                reader.submit(np.array(keys), addresses)
            assert reader.status[0] == record_io.ABSENT
        reader.submit(np.array([], dtype=np.int32), np.array([], dtype=np.uint64))
        assert reader.stats()["num_reads"] == 0
        assert reader.wait(len(records)) == record_io.ERR_ARG


def test_many_submits_while_waiting(experts, backend):
    path, records, contents = experts
    with record_io.RecordReader(path, records, depth=4, backend=backend) as reader:
        slots = Slots(records, backend)
        rng = np.random.default_rng(7)
        failures = []

        def waiter(seed):
            for key in np.random.default_rng(seed).integers(0, len(records), 300):
                if reader.wait(int(key)) < 0:
                    failures.append(key)

        waiters = [threading.Thread(target=waiter, args=(seed,)) for seed in range(3)]
        for thread in waiters:
            thread.start()
        num_submitted = 0
        for _ in range(60):
            chosen = [k for k in rng.permutation(len(records))[:5] if reader.status[k] != 1]
            for key in chosen:
                reader.status[key] = record_io.ABSENT
                slots.bytes_of(key)[:] = 0
            submit(reader, slots, chosen)
            num_submitted += len(chosen)
            for key in chosen[::-1][:2]:
                assert reader.wait(int(key)) == record_io.READY
                np.testing.assert_array_equal(slots.bytes_of(key), contents[key])
        for thread in waiters:
            thread.join()
        for key in range(len(records)):
            reader.wait(key)
        assert not failures
        assert reader.stats()["num_reads"] == num_submitted


def test_close_with_reads_queued(experts, backend):
    path, records, contents = experts
    slots = Slots(records, backend)
    reader = record_io.RecordReader(path, records, depth=1, backend=backend)
    submit(reader, slots, range(len(records)))
    reader.close()
    reader.close()
    for key, status in enumerate(reader.status):  # read whole, or not at all
        assert status in (record_io.ABSENT, record_io.READY)
        if status == record_io.READY:
            np.testing.assert_array_equal(slots.bytes_of(key), contents[key])


def cached_pages(path: Path) -> int:
    """Pages of a file in the page cache (mincore of a mapping that is never touched)."""
    size = path.stat().st_size
    num_pages = -(-size // mmap.PAGESIZE)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), size) as mapping:
        array = np.frombuffer(mapping, dtype=np.uint8)
        resident = (ctypes.c_ubyte * num_pages)()
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(array.ctypes.data)
        assert libc.mincore(address, ctypes.c_size_t(size), resident) == 0
        del array
    return sum(value & 1 for value in resident)


@pytest.fixture
def uncached(experts):
    path, records, contents = experts
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("no posix_fadvise: the page cache cannot be emptied here")
    record_io.drop_page_cache(path)
    if cached_pages(path):
        pytest.skip("this file system keeps its pages (memory-backed)")
    return path, records, contents


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_page_cache_stays_empty(uncached, backend, io):
    path, records, _ = uncached
    path.read_bytes()
    assert cached_pages(path) > 0, "the check itself must be able to see cached pages"
    record_io.drop_page_cache(path)
    reader = (
        direct_or_skip(path, records, backend)
        if io == "direct"
        else record_io.RecordReader(path, records, io=io, backend=backend)
    )
    with reader:
        slots = Slots(records, backend)
        submit(reader, slots, range(len(records)))
        assert all(reader.wait(key) == record_io.READY for key in range(len(records)))
        largest = max(record.num_bytes for record in records) // PAGE_BYTES
        # Buffered: neighbours of a read that is still going on may share a large folio.
        assert cached_pages(path) <= (0 if io == "direct" else largest)


def test_trunk_tensor_leaves_no_cache(uncached):
    path, records, contents = uncached
    with open(path, "rb", buffering=0) as file:
        tensors, _ = read_header(file, str(path))
        data = record_io.read_trunk_tensor(file, tensors[record_name(0, 2)])
        assert data.ctypes.data % 64 == 0
        np.testing.assert_array_equal(data, contents[2])
        end = path.stat().st_size
        with pytest.raises(FormatError, match="truncated"):
            record_io.read_trunk_tensor(file, TensorEntry("U8", (9,), end - 4, 9))
    record_io.drop_page_cache(path)
    assert cached_pages(path) == 0


def test_safetensors_reads_the_file(experts):
    path, records, contents = experts
    with safetensors.safe_open(path, framework="np") as file:
        assert sorted(file.keys()) == sorted(record_name(0, i) for i in range(len(records)))
        for key, content in enumerate(contents):
            np.testing.assert_array_equal(file.get_tensor(record_name(0, key)), content)
    assert all(record.offset % PAGE_BYTES == 0 for record in records)
