"""The core's own C++ test program: on this machine, level by level, and on emulated 64-bit Arm."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLCHAIN = ROOT / "tests" / "native" / "aarch64.cmake"
ARM_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"


def missing(*programs: str) -> str:
    """A reason to skip, naming what is not installed; empty where all are."""
    names = [name for name in programs if shutil.which(name) is None]
    return f"not installed: {', '.join(names)}" if names else ""


def build(folder: Path, *options: str) -> Path:
    """Build the test program without optimization: compiling the kernels would take minutes."""
    if reason := missing("cmake"):
        pytest.skip(reason)
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    launcher = ["-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"] if shutil.which("ccache") else []
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), *generator, *launcher]
    configure += ["-DCMAKE_BUILD_TYPE=Debug", "-DEM_BUILD_TESTS=ON", *options]
    jobs = str(os.cpu_count() or 1)
    target = "edgemoe_core_tests"
    for command in (configure, ["cmake", "--build", folder, "-j", jobs, "--target", target]):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return folder / "tests" / "native" / target


def run(command: list[str], isa: str = "") -> tuple[str, str]:
    """(instruction set, digest of all results) of a run in which no test failed."""
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "EDGEMOE_ISA": isa}
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    (found,) = re.findall(r"isa (\S+), digest ([0-9a-f]{16})", result.stdout)
    return found


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("not installed: a C++ compiler")
    return build(tmp_path_factory.mktemp("native"))


def test_every_level_of_this_machine(program: Path) -> None:
    best, digest = run([str(program)])
    for isa in {"scalar", "avx2", best} if best.startswith("avx") else {"scalar", best}:
        assert run([str(program)], isa) == (isa, digest)


def test_a_test_that_is_not_there_fails(program: Path) -> None:
    assert subprocess.run([program, "no such test"], capture_output=True).returncode == 1


def test_every_level_of_emulated_arm(program: Path, tmp_path: Path) -> None:
    if reason := missing(ARM_COMPILER, EMULATOR):
        pytest.skip(reason)
    options = [f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}", "-DCMAKE_EXE_LINKER_FLAGS=-static"]
    other = build(tmp_path, *options)
    _, digest = run([str(program)])
    command = [EMULATOR, "-cpu", "max", str(other)]
    for isa in ("neon-i8mm", "neon-dotprod", "scalar"):
        assert run(command, isa) == (isa, digest)
    assert run([EMULATOR, "-cpu", "cortex-a72", str(other)]) == ("scalar", digest)
