"""The C example of the documentation, compiled as C99, computes what Python computes."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import edgemoe
from edgemoe.runtime import core, kernels
from edgemoe.runtime.cache import ExpertCache
from edgemoe.runtime.executor import Executor
from edgemoe.runtime.io import Arena
from edgemoe.runtime.store import Store

DOCS = Path(__file__).resolve().parent.parent / "docs"
HEADERS = DOCS.parent / "runtime" / "csrc"
DEMO = Path(edgemoe.__file__).parent / "demo" / "demo.edgemoe"
NUM_EXPERTS = 4  # as in the example
pytestmark = pytest.mark.skipif(core.lib is None, reason="native core not built")


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("not installed: a C compiler")
    target = tmp_path_factory.mktemp("example") / "decode_layer"
    library = Path(core.library_path)
    command = [compiler, "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{HEADERS}"]
    command += [str(DOCS / "decode_layer.c"), str(library), f"-Wl,-rpath,{library.parent}"]
    subprocess.run([*command, "-o", str(target)], check=True)
    return target


def test_the_example_computes_what_python_does(example: Path) -> None:
    result = subprocess.run([example, DEMO], capture_output=True, text=True, check=True)
    with Store(DEMO) as store:
        records, hidden = store.index.records, store.index.hidden
        capacity = NUM_EXPERTS * store.index.max_record_bytes
        arena, pool = Arena(capacity, "native"), kernels.ThreadPool(1)
        cache = ExpertCache(store.reader, arena, capacity, records, "cycle")
        executor = Executor(cache, pool, "native", hidden=hidden, top_k=NUM_EXPERTS, chunk=1)
        x = (np.arange(hidden) * 37 % 101 - 50).astype(np.float32) / np.float32(50)
        ids = np.arange(NUM_EXPERTS).reshape(1, -1)
        weights = np.full((1, NUM_EXPERTS), 1 / NUM_EXPERTS, dtype=np.float32)
        y = executor.run(0, x.reshape(1, -1), ids, weights)
        pool.close()
    crc = kernels.crc32c(y.view("uint8").reshape(-1))
    assert result.stdout.split()[-1] == f"{crc:08x}"
    assert f"y[0] {y[0, 0].item():g}," in result.stdout


@pytest.mark.parametrize("arguments", [[], ["nowhere"], [str(DOCS)]])
def test_the_example_refuses_what_is_no_store(example: Path, arguments: list[str]) -> None:
    result = subprocess.run([example, *arguments], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: no store: ") and not result.stdout
