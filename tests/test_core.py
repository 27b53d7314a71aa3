"""The C interface and its ctypes face: complete, versioned, plain C."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from edgemoe.runtime import core

HEADER = Path(__file__).resolve().parent.parent / "runtime" / "csrc" / "edgemoe_core.h"
native = pytest.mark.skipif(core.lib is None, reason="native core not built")


def without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)


def test_every_function_of_the_header_has_a_signature():
    text = without_comments(HEADER.read_text())
    declared = dict(re.findall(r"EM_API [\w\s*]*?\b(em_\w+)\(([^;]*)\);", text))
    assert len(declared) > 15
    assert set(declared) == set(core._SIGNATURES)
    for name, parameters in declared.items():
        count = 0 if parameters.strip() == "void" else parameters.count(",") + 1
        assert count == len(core._SIGNATURES[name][1]), name


def test_every_constant_of_the_header_is_compared():
    (line,) = re.findall(r"EM_API extern const int32_t ([^;]*);", HEADER.read_text())
    assert {name.strip() for name in line.split(",")} == set(core._CONSTANTS)
    (version,) = re.findall(r"#define EM_ABI_VERSION (\d+)", HEADER.read_text())
    assert int(version) == core.ABI_VERSION


@pytest.mark.parametrize("compiler", ("gcc", "clang"))
def test_header_is_plain_c(compiler: str, tmp_path: Path):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    source = tmp_path / "use.c"
    source.write_text(f'#include "{HEADER}"\nint32_t f(void) {{ return em_abi_version(); }}\n')
    command = [compiler, "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-c", str(source)]
    subprocess.run([*command, "-o", str(tmp_path / "use.o")], check=True)


@native
def test_structures_have_the_sizes_of_c(tmp_path: Path):
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    names = {"em_format": core.Format, "em_record": core.Record}
    names |= {"em_store_stats": core.StoreStats, "em_moe_args": core.MoeArgs}
    lines = [f'#include "{HEADER}"', "#include <stddef.h>"]
    for name, mirror in names.items():
        lines.append(f'_Static_assert(sizeof({name}) == {core.ctypes.sizeof(mirror)}, "{name}");')
        for field, *_ in mirror._fields_:
            at = getattr(mirror, field).offset
            lines.append(f'_Static_assert(offsetof({name}, {field}) == {at}, "{name}.{field}");')
    source = tmp_path / "sizes.c"
    source.write_text("\n".join(lines) + "\n")
    subprocess.run(["gcc", "-c", str(source), "-o", str(tmp_path / "sizes.o")], check=True)


@native
@pytest.mark.parametrize("name", ("ABI_VERSION", *core._CONSTANTS))
def test_another_version_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    if name == "ABI_VERSION":
        monkeypatch.setattr(core, name, core.ABI_VERSION + 1)
    else:
        monkeypatch.setitem(core._CONSTANTS, name, core._CONSTANTS[name] + 1)
    with pytest.raises(ImportError, match="expected .* got .* rebuild it"):
        core._load()


@native
def test_library_needs_neither_python_nor_torch():
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    command = ["nm", "-D", core.library_path]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    symbols = [line.split()[-1] for line in lines]  # without addresses, which may read as c10
    assert "em_moe_run" in symbols
    pattern = re.compile(r"^_?Py[A-Z_]|torch|at::|c10")
    assert [name for name in symbols if pattern.search(name)] == []


@native
def test_isa_is_one_of_the_levels():
    assert core.lib.em_isa() in (
        *(b"scalar", b"avx2", b"avxvnni", b"avx512vnni", b"amx"),
        *(b"neon-dotprod", b"neon-i8mm"),
    )
