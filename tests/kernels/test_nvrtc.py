"""The kernels compile without a warning for each GPU they are meant for, and are kept where only their user writes."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from forebay.kernels import nvrtc
from forebay.kernels.nvrtc import ARCHITECTURES, CompileError, cached_kernels, compile_kernels

KERNELS = 16
REPORT = re.compile(
    r"Function properties for (\w+)\n.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r".*?Used (\d+) registers"
)
INFORMATION = re.compile(r"ptxas info |ptxas +\. ")  # lines of a log that nobody has to look at
UNUSED = "__device__ void planted() { int unused; }\n"


def remarks(log: str) -> list[str]:
    """Lines of a compiler's log that are not its plain report: warnings, first of all."""
    return [line for line in log.splitlines() if line.strip() and not INFORMATION.match(line)]


# --- the compiler --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiler() -> None:
    """cupy and the library it compiles with; neither needs a GPU."""
    try:
        from cupy.cuda import nvrtc as library

        library.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"nothing to compile CUDA with: {type(error).__name__}: {error}")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.usefixtures("compiler")
def test_kernels_compile_without_a_remark(architecture: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Kernels of 16-byte accesses, which move nearly all bytes, spill nothing: a spill is traffic to memory."""
    compiled = compile_kernels(architecture)
    assert remarks(compiled.log) == []
    assert compiled.cubin.startswith(b"\x7fELF")
    report = {name: [int(number) for number in numbers] for name, *numbers in REPORT.findall(compiled.log)}
    assert len(report) == KERNELS
    told = [
        f"{name} {registers}" + (f" (stack {stack} B, spills {stores}+{loads} B)" if stack else "")
        for name, (stack, stores, loads, registers) in sorted(report.items())
    ]
    with capsys.disabled():
        print(f"\nsm_{architecture}, {len(compiled.cubin)} bytes, registers: {', '.join(told)}")
    spilling = {name for name, (_, stores, loads, _) in report.items() if stores or loads}
    assert not {name for name in spilling if "_16" in name}


@pytest.mark.usefixtures("compiler")
def test_warning_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a log in which warnings cannot be found would let all of them pass."""
    unit, *headers = nvrtc.source_texts()
    monkeypatch.setattr(nvrtc, "source_texts", lambda: (unit + UNUSED, *headers))
    found = remarks(compile_kernels("80").log)
    assert any("warning" in line and "unused" in line for line in found), found


@pytest.mark.usefixtures("compiler")
def test_refused_source_is_an_error_with_the_compilers_words(monkeypatch: pytest.MonkeyPatch) -> None:
    unit, *headers = nvrtc.source_texts()
    monkeypatch.setattr(nvrtc, "source_texts", lambda: (unit + "int planted = nothing_of_this_name;\n", *headers))
    with pytest.raises(CompileError, match=r"(?s)sm_90.*nothing_of_this_name"):
        compile_kernels("90")


@pytest.mark.usefixtures("compiler")
def test_real_kernels_are_kept_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached_kernels("90", tmp_path)
    monkeypatch.setattr(nvrtc, "compile_kernels", lambda architecture: pytest.fail("compiled again"))
    assert cached_kernels("90", tmp_path) == first


# --- the cache, over a compiler that only counts -------------------------------------------------------------------


class CountingCompiler(ModuleType):
    """Stands for `cupy.cuda.nvrtc`: each program is new machine code."""

    NVRTCError = RuntimeError

    def __init__(self) -> None:
        super().__init__("nvrtc")
        self.version = (13, 0)
        self.alive: list[int] = []
        self.options: list[tuple[str, ...]] = []

    def getVersion(self) -> tuple[int, int]:
        return self.version

    def createProgram(self, source: str, name: str, headers: list[bytes], names: list[bytes]) -> int:
        assert [name, *(header.decode() for header in names)] == list(nvrtc.SOURCES)
        self.alive.append(len(self.options) + 1)
        return self.alive[-1]

    def compileProgram(self, program: int, options: tuple[str, ...]) -> None:
        self.options.append(options)

    def getCUBIN(self, program: int) -> bytes:
        return b"machine code %d" % program

    def getProgramLog(self, program: int) -> str:
        return "log\0"

    def destroyProgram(self, program: int) -> None:
        self.alive.remove(program)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> CountingCompiler:
    compiler = CountingCompiler()
    package, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    package.cuda, cuda.nvrtc = cuda, compiler  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", package)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    return compiler


def only_file(directory: Path) -> Path:
    (path,) = directory.iterdir()
    return path


def test_kept_kernels_are_not_compiled_again(counting: CountingCompiler, tmp_path: Path) -> None:
    directory = tmp_path / "not" / "there"
    assert cached_kernels("90", directory) == b"machine code 1"
    assert cached_kernels("90", directory) == b"machine code 1"
    assert len(counting.options) == 1
    assert not counting.alive


def test_kernels_are_kept_in_a_directory_of_the_users_own(counting: CountingCompiler, tmp_path: Path) -> None:
    """Who can write there chooses what this process runs."""
    directory = tmp_path / "kernels"
    cached_kernels("90", directory)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert only_file(directory).stat().st_mode & 0o777 == 0o600


def test_each_architecture_has_its_own_kernels(counting: CountingCompiler, tmp_path: Path) -> None:
    assert cached_kernels("80", tmp_path) != cached_kernels("90", tmp_path)
    assert [options[-1] for options in counting.options] == [f"--gpu-architecture=sm_{n}" for n in (80, 90)]


@pytest.mark.parametrize("index", range(len(nvrtc.SOURCES)))
def test_other_source_is_compiled_anew(
    counting: CountingCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    """A header counts as the unit does."""
    cached_kernels("90", tmp_path)
    texts = list(nvrtc.source_texts())
    texts[index] += "\n"
    monkeypatch.setattr(nvrtc, "source_texts", lambda: tuple(texts))
    assert cached_kernels("90", tmp_path) == b"machine code 2"


def test_other_compiler_compiles_anew(counting: CountingCompiler, tmp_path: Path) -> None:
    cached_kernels("90", tmp_path)
    counting.version = (13, 1)
    assert cached_kernels("90", tmp_path) == b"machine code 2"


@pytest.mark.parametrize("kept", [b"", b"short", b"\0" * 32, "cut", "flipped", "longer"])
def test_torn_or_changed_file_is_compiled_again_and_replaced(
    counting: CountingCompiler, tmp_path: Path, kept: bytes | str
) -> None:
    cached_kernels("90", tmp_path)
    path = only_file(tmp_path)
    sound = path.read_bytes()
    damaged = {"cut": sound[:-1], "flipped": bytes([sound[0] ^ 1]) + sound[1:], "longer": sound + b"\0"}
    path.write_bytes(damaged[kept] if isinstance(kept, str) else kept)
    assert cached_kernels("90", tmp_path) == b"machine code 2"
    assert cached_kernels("90", tmp_path) == b"machine code 2"


def test_file_of_somebody_else_is_not_run(
    counting: CountingCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cached_kernels("90", tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert cached_kernels("90", tmp_path) == b"machine code 2"
    assert "belongs to somebody else" in caplog.text


def test_directory_that_cannot_be_written_costs_only_the_compiling(
    counting: CountingCompiler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file stands in its way: that stops the superuser as well."""
    (tmp_path / "file").touch()
    directory = tmp_path / "file" / "kernels"
    assert cached_kernels("90", directory) == b"machine code 1"
    assert cached_kernels("90", directory) == b"machine code 2"
    assert "cannot be kept" in caplog.text


def test_write_that_breaks_off_leaves_nothing_behind(
    counting: CountingCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, or a directory where the file should go."""

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    assert cached_kernels("90", tmp_path) == b"machine code 1"
    assert list(tmp_path.iterdir()) == []


def test_without_cupy_the_import_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("cupy", "cupy.cuda"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="cupy"):
        cached_kernels("90", tmp_path)
