"""What a process holds before it reads weights: the runtime line of a plan. Floor 0, without NumPy.

Measured with CPython 3.11 on Linux: 39 MiB of interpreter, NumPy, tokenizer library, core and the
modules of a run; 2 KiB for each record; 11 times its file for a tokenizer of 50,000 or 152,000
tokens. The allowance is above that by what a command and its output bring with them.
"""

from .amounts import MIB
from .format import round_up
from .index import StoreIndex

RUNTIME_BYTES = 56 * MIB  # interpreter, NumPy, core, and what a command brings with it
TORCH_RUNTIME_BYTES = 320 * MIB  # the same where torch was imported, with what it computes
RECORD_BYTES = 2 << 10  # of a record's entries in tables
TOKENIZER_TIMES = 12  # a loaded tokenizer's bytes over those of its file


def usual_runtime_bytes(index: StoreIndex) -> int:
    """The allowance for a process that runs this store, without torch."""
    tokenizer = index.path / "tokenizer.json"
    file_bytes = tokenizer.stat().st_size if tokenizer.is_file() else 0
    known = RECORD_BYTES * len(index.records) + TOKENIZER_TIMES * file_bytes
    return RUNTIME_BYTES + round_up(known, MIB)
