"""Measure llama.cpp on one GGUF in one load mode: prefill, then decode at the prompt's length.

    python tools/peers/run_llama_cpp.py olmoe-Q4_0.gguf --tokens tokens.json --mode repack

One process per measurement; one JSON line on standard output. `side_by_side.py` makes the token
file and runs this beside edgemoe. Needs `pip install llama-cpp-python` (built from source, it uses
every instruction set of the machine that built it).

modes   file is     weights in an interleaved layout
repack  mapped      yes, in anonymous memory: what llama.cpp does by default, and its fastest
copy    read        yes
mmap    mapped      no: weights are used where they lie, the way to run with less memory than file
read    read        no
direct  direct I/O  no
"""

import argparse
import ctypes
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measure import read_tokens, report, run_rounds

# mode -> (enum llama_load_mode by its name, weights repacked)
MODES = {
    "repack": ("MMAP", True),
    "copy": ("NONE", True),
    "mmap": ("MMAP", False),
    "read": ("NONE", False),
    "direct": ("DIRECT_IO", False),
}


class Engine:
    """One model and one context of llama.cpp through its C interface."""

    def __init__(self, path: Path, mode: str, threads: int, context: int) -> None:
        import llama_cpp

        self._lib = llama_cpp
        self.buffers: list[str] = []
        self._logger = llama_cpp.llama_log_callback(self._log)  # kept: the library holds a pointer
        llama_cpp.llama_log_set(self._logger, None)
        llama_cpp.llama_backend_init()
        load_mode, repacked = MODES[mode]
        params = llama_cpp.llama_model_default_params()
        if hasattr(params, "load_mode"):
            params.load_mode = getattr(llama_cpp, f"LLAMA_LOAD_MODE_{load_mode}")
        elif load_mode == "DIRECT_IO":
            raise SystemExit("this llama-cpp-python has no direct I/O")
        else:
            params.use_mmap = load_mode == "MMAP"
        params.use_extra_bufts = repacked
        begin = time.perf_counter()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise SystemExit(f"llama.cpp could not load {path}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = context, 512, 512
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise SystemExit("llama.cpp could not make a context")
        self.load_s = time.perf_counter() - begin
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def _log(self, level: int, text: bytes, _: Any) -> None:
        line = text.decode(errors="replace").strip()
        if "buffer size" in line:
            self.buffers.append(" ".join(line.split(":", 1)[-1].split()))

    def reset(self) -> None:
        """Forget all tokens."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def feed(self, ids: Sequence[int]) -> Any:
        """Append tokens; the fp32 logits [vocab] after the last, valid until the next call."""
        import numpy as np

        tokens = (self._lib.llama_token * len(ids))(*ids)
        status = self._lib.llama_decode(
            self._context, self._lib.llama_batch_get_one(tokens, len(ids))
        )
        if status:
            raise SystemExit(f"llama_decode failed with {status}")
        pointer = self._lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(
            ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocab,)
        )

    def system(self) -> str:
        """The instruction sets of this build."""
        return self._lib.llama_print_system_info().decode().strip()


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--tokens", type=Path, required=True, help="JSON, see measure.py")
    parser.add_argument("--mode", choices=sorted(MODES), default="repack")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--decode", type=int, help="decode only the first N of the continuation")
    parser.add_argument("--no-warm-up", dest="warm_up", action="store_false")
    options = parser.parse_args(arguments)
    prompt, continuation = read_tokens(options.tokens)
    continuation = continuation[: options.decode]
    try:
        engine = Engine(
            options.gguf, options.mode, options.threads, len(prompt) + len(continuation) + 8
        )
    except ImportError as error:
        raise SystemExit(f"{error}: pip install llama-cpp-python") from error
    found = run_rounds(
        engine.feed, engine.reset, prompt, continuation, options.repeats, options.warm_up
    )
    usage = resource.getrusage(resource.RUSAGE_SELF)
    report(
        {
            "engine": "llama.cpp",
            "file": options.gguf.name,
            "file_bytes": options.gguf.stat().st_size,
            "mode": options.mode,
            "threads": options.threads,
            "load_s": engine.load_s,
            **found,
            "major_faults": usage.ru_majflt,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "buffers": engine.buffers,
            "system": engine.system(),
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
