"""A store that is open: its index, its record reader, its trunk tensors, its checks. Floor 1."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import EdgeMoeError, FormatError, NotFoundError, RecordError
from .files import advise, read_some, read_trunk_tensor
from .headers import TensorEntry, read_header
from .index import EXPERTS_FILE, TRUNK_FILE, ExpertRecord, StoreIndex, load_index
from .io import DEFAULT_DEPTH, READY, Arena, RecordReader, failure_text
from .memory import Pile
from .packing import NUMPY_DTYPES
from .stand_ins import STAND_INS_FILE, with_stand_ins

if TYPE_CHECKING:
    from .kernels import PackedMatrix

_BLOCK_BYTES = 8 << 20


class Store:
    """A store folder, open for reading.

    Records are ordered by (layer, expert); a key is a position in that order. Raises what
    `load_index` and `RecordReader` raise, and FormatError for a trunk that contradicts the index.
    `stand_ins`: those of its experts (stand_ins.py), as further records.
    """

    def __init__(
        self,
        path: str | Path,
        depth: int = DEFAULT_DEPTH,
        io: str = "auto",
        backend: str | None = None,
        stand_ins: Mapping[tuple[int, int], ExpertRecord] | None = None,
    ) -> None:
        self.path = Path(path)
        self.index: StoreIndex = load_index(self.path)
        self.record_of = with_stand_ins(self.index.records, stand_ins or {})
        self.pairs: list[tuple[int, int]] = sorted(self.record_of)
        self.records: list[ExpertRecord] = [self.record_of[pair] for pair in self.pairs]
        self._more_paths = [self.path / STAND_INS_FILE] if stand_ins else []
        self.layer_first_key: dict[int, int] = {}
        for key, (layer, _) in enumerate(self.pairs):
            self.layer_first_key.setdefault(layer, key)
        self._backend = backend
        self._depth = depth
        self._io = io
        trunk = self.path / TRUNK_FILE
        try:
            # Kept open: a store that is replaced on disk stays readable to the end.
            self._trunk_file = open(trunk, "rb", buffering=0)  # noqa: SIM115
        except FileNotFoundError as error:
            raise FormatError(
                f"`{self.path}` is incomplete", f"it has no `{TRUNK_FILE}`"
            ) from error
        except OSError as error:
            raise FormatError(f"`{trunk}` cannot be read", str(error.strerror)) from error
        try:
            self._trunk, _ = read_header(self._trunk_file, str(trunk))
            self._check_trunk()
            self.reader = self._open_reader()
        except BaseException:
            self._trunk_file.close()
            raise

    def _open_reader(self) -> RecordReader:
        return RecordReader(
            self.path / EXPERTS_FILE,
            self.records,
            self._depth,
            self._io,
            self._backend,
            more_paths=self._more_paths,
        )

    def key(self, layer: int, expert: int) -> int:
        """The key of a record; raises NotFoundError."""
        key = self.layer_first_key.get(layer, len(self.pairs)) + expert
        if expert < 0 or key >= len(self.pairs) or self.pairs[key] != (layer, expert):
            raise NotFoundError(f"`{self.path}` has no expert record ({layer}, {expert})")
        return key

    def check(self, key: int, status: int) -> None:
        """Raise RecordError for a negative status of record `key`."""
        if status < 0:
            layer, expert = self.pairs[key]
            raise RecordError(
                layer,
                expert,
                f"`{self.path / EXPERTS_FILE}`: {failure_text(status)}",
                f"edgemoe verify {self.path} lists every damaged record; then convert or copy "
                "the store again",
            )

    # Trunk.

    def trunk_entry(self, name: str) -> TensorEntry:
        """dtype, shape and size of a trunk tensor; raises NotFoundError."""
        try:
            return self._trunk[name]
        except KeyError:
            raise NotFoundError(f"`{self.path / TRUNK_FILE}` has no tensor `{name}`") from None

    def trunk_tensor(self, name: str, pile: Pile | None = None) -> "np.ndarray | PackedMatrix":
        """Read one trunk tensor: a PackedMatrix where the store packed it, else an array.

        A PackedMatrix lies in the pile where one is given. Nothing is kept; asking twice reads
        twice. Raises NotFoundError, FormatError.
        """
        entry = self.trunk_entry(name)
        if name not in self.index.packed_trunk and entry.dtype not in NUMPY_DTYPES:
            raise FormatError(f"trunk tensor `{name}` has unknown dtype `{entry.dtype}`")
        packed = self.index.packed_trunk.get(name)
        own = None if packed is None else pile
        data = read_trunk_tensor(self._trunk_file, entry, own)
        if packed is not None:
            from .kernels import PackedMatrix

            return PackedMatrix.from_packed(
                data, packed.rows, packed.cols, packed.spec, self._backend
            )
        return data.view(NUMPY_DTYPES[entry.dtype]).reshape(entry.shape)

    def _check_trunk(self) -> None:
        for name, packed in self.index.packed_trunk.items():
            entry = self._trunk.get(name)
            expected = packed.spec.matrix_bytes(packed.rows, packed.cols)
            if entry is None or (entry.dtype, entry.num_bytes) != ("U8", expected):
                raise FormatError(
                    f"`{self.path / TRUNK_FILE}` and the index disagree",
                    f"expected `{name}` with {expected} packed bytes",
                )

    # Checks.

    def verify(self) -> Iterator[tuple[int, int, bool]]:
        """Read every record again and compare both checksums; yields (layer, expert, ok).

        Memory: two records. A file that cannot be opened any more raises; a record that cannot be
        read is not ok.
        """
        if not self.records:
            return
        slot_bytes = max(record.num_bytes for record in self.records)
        # A reader of its own: the open one checks a record only the first time it reads it. It is
        # closed before the memory that it writes to.
        with (
            Arena(2 * slot_bytes, self._backend) as arena,
            self._open_reader() as reader,
        ):
            addresses = np.array([arena.address, arena.address + slot_bytes], dtype=np.uint64)
            keys = np.arange(len(self.records), dtype=np.int32)
            reader.submit(keys[:2], addresses[: len(keys[:2])])
            for key, (layer, expert) in enumerate(self.pairs):
                status = reader.wait(key)
                following = keys[key + 2 : key + 3]
                if following.size:
                    reader.submit(following, addresses[key % 2 : key % 2 + 1])
                yield layer, expert, status == READY

    def verify_files(self) -> Iterator[tuple[str, bool]]:
        """Compare every file that has a sha256 in the index; yields (file name, ok)."""
        for name, expected in sorted(self.index.sha256.items()):
            yield name, file_sha256(self.path / name) == expected

    def close(self) -> None:
        self.reader.close()
        self._trunk_file.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def file_sha256(path: Path) -> str:
    """sha256 of a file as hex; leaves none of it in the page cache. Raises NotFoundError."""
    digest = hashlib.sha256()
    block = np.empty(_BLOCK_BYTES, dtype=np.uint8)
    offset = 0
    try:
        with open(path, "rb", buffering=0) as file:
            while got := read_some(file, block, offset):
                digest.update(block[:got])
                advise(file, offset, got, "POSIX_FADV_DONTNEED")
                offset += got
    except FileNotFoundError as error:
        raise NotFoundError(f"no file `{path}`") from error
    except (OSError, ValueError) as error:  # ValueError: no such name can be
        raise EdgeMoeError(f"`{path}` cannot be read", str(error)) from error
    return digest.hexdigest()
