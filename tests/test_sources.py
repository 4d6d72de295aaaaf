"""Where traces come from: standard input, compressed files, the recorders' own formats; and streams that never end."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import shutil
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastexit.trace import BUNDLED, TraceError, files, packed, recorders
from fastexit.trace.reader import TraceReader
from fastexit.trace.text import TraceText

LINE = "       CPU 0/KVM-7     [001] .....   5.{:06}: kvm_apic_accept_irq: apicid 1 vec 253 (Fixed|edge)\n"
TEXT = "".join(LINE.format(i) for i in range(5000)).encode()


def zstandard(data: bytes) -> bytes:
    packer = pytest.importorskip("zstandard")
    return bytes(packer.ZstdCompressor(write_checksum=True).compress(data))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "bz2": bz2.compress,
    "zst": zstandard,
}


def read(path: Path | str) -> TraceReader:
    reader = TraceReader(path)
    for _ in reader.batches():
        pass
    return reader


@pytest.mark.parametrize("kind", PACKERS)
def test_compressed_files(kind: str, tmp_path: Path) -> None:
    pack = PACKERS[kind]
    path = tmp_path / f"trace.{kind}"
    path.write_bytes(pack(TEXT[: len(TEXT) // 2]) + pack(TEXT[len(TEXT) // 2 :]))
    reader = read(path)
    assert (reader.events, reader.problems, reader.notes) == (5000, [], [])


@pytest.mark.parametrize("kind", PACKERS)
def test_a_cut_file_gives_what_it_has(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"trace.{kind}"
    whole = PACKERS[kind](os.urandom(40_000).hex().encode() + b"\n" + TEXT)
    path.write_bytes(whole[: len(whole) - 40])
    assert "cut short" in read(path).problems[-1]


@pytest.mark.parametrize("kind", PACKERS)
def test_a_damaged_file_is_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"trace.{kind}"
    data = bytearray(PACKERS[kind](os.urandom(100_000).hex().encode() + b"\n" + TEXT))
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    path.write_bytes(data)
    assert "damaged" in read(path).problems[-1]


def test_zstd_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    path = tmp_path / "trace.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfdrest")
    with pytest.raises(
        TraceError, match=r"trace.zst: zstd-compressed: pip install zstandard, or run `zstd -d"
    ) as error:
        TraceText(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pack", [bytes, lzma.compress])
def test_standard_input(pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(pack(TEXT))))
    reader = TraceReader("-")
    assert [sum(len(batch.events) for batch in reader.batches()) for _ in range(2)] == [5000, 5000]
    assert reader.problems == []


def test_nothing_on_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO()))
    with pytest.raises(TraceError, match="-: the file is empty"):
        TraceReader("-")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"PK\x03\x04rest", "zip archive"),
        (b"\x7fELFrest", "a program"),
        (b"\xff\xfek\0v\0m\0", "iconv"),
        (b"a.txt".ljust(257, b"\0") + b"ustar\x0000", "tar archive"),
    ],
)
def test_what_is_no_trace(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(data)
    with pytest.raises(TraceError, match=said):
        TraceText(path)


# ------------------------------------------------------------------------------------------------- recorders' own files


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Puts a program in front of all others; returns where it can write."""

    def make(name: str, script: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        program = folder / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setenv("SAID", str(tmp_path / "said"))
        return tmp_path / "said"

    return make


DAT, DATA = b"\x17\x08Dtracing6\0rest", b"PERFILE2rest"


@pytest.mark.parametrize("name", ["trace.dat", "-rf; touch x.dat", "--help"])
@pytest.mark.parametrize("pack", [bytes, lzma.compress])
def test_trace_cmd_prints_its_file(
    name: str, pack: Callable[[bytes], bytes], tool: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Whatever the file is called: the tool is not told its name."""
    (tmp_path / "text").write_bytes(b"cpus=2\n" + TEXT)
    said = tool(
        "trace-cmd", f'printf "%s\\n" "$@" >"$SAID"; cmp -s "$4" {tmp_path}/whole || exit 3; cat {tmp_path}/text'
    )
    (tmp_path / "whole").write_bytes(DAT)
    path = tmp_path / name
    path.write_bytes(pack(DAT))
    reader = TraceReader(path)
    assert [sum(len(batch.events) for batch in reader.batches()) for _ in range(2)] == [5001, 5001]
    assert (reader.events, reader.problems, reader.text.shape) == (5000, [], "trace-cmd report")
    report, nanoseconds, option, argument = said.read_text().split()
    assert (report, nanoseconds, option) == ("report", "-t", "-i")
    assert argument.startswith("/dev/fd/")


def test_perf_prints_its_file_with_the_fields_it_has(tool: Callable[[str, str], Path], tmp_path: Path) -> None:
    """A file without CPUs cannot be printed with them, and is printed without."""
    said = tool(
        "perf",
        'printf "%s " "$@" >>"$SAID"; case "$*" in *cpu*) echo no cpu >&2; exit 255;; esac\n'
        "echo '  vcpu 7  5.000001: kvm:kvm_eoi: apicid 0 vector -1'",
    )
    path = tmp_path / "perf.data"
    path.write_bytes(DATA)
    reader = read(path)
    assert (reader.events, reader.problems) == (1, [])
    assert said.read_text().count("script -f --ns") == 2


@pytest.mark.parametrize(
    ("data", "name", "said"),
    [
        (DAT, "trace-cmd", "install trace-cmd, or run `trace-cmd report"),
        (DATA, "perf", "install linux-perf, or run `perf"),
    ],
)
def test_without_the_tool(data: bytes, name: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "trace.bin"
    path.write_bytes(data)
    with pytest.raises(TraceError, match=f"trace.bin: .*{name} is not installed: {said}") as error:
        TraceText(path)
    assert "\n" not in str(error.value)


def test_a_tool_that_fails_says_why(tool: Callable[[str, str], Path], tmp_path: Path) -> None:
    tool("trace-cmd", r'printf "\n bad \033[31mheader\nmore\n" >&2; exit 1')
    path = tmp_path / "trace.dat"
    path.write_bytes(DAT)
    with pytest.raises(TraceError, match=r"`trace-cmd report FILE` cannot read: bad \?\[31mheader$"):
        TraceText(path)


def test_a_tool_that_prints_nothing(tool: Callable[[str, str], Path], tmp_path: Path) -> None:
    tool("trace-cmd", "exit 0")
    path = tmp_path / "trace.dat"
    path.write_bytes(DAT)
    with pytest.raises(TraceError, match="it ended with code 0"):
        TraceText(path)


def test_a_tool_that_prints_without_end(
    tool: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(recorders, "FREE_BYTES", 1 << 20)
    tool("trace-cmd", "exec yes")
    path = tmp_path / "trace.dat"
    path.write_bytes(DAT)
    with pytest.raises(TraceError, match="it printed more than 1,0.* bytes"):
        TraceText(path)


def test_what_perf_records_here(tmp_path: Path) -> None:
    if not shutil.which("perf"):
        pytest.skip("perf is not installed")
    path = tmp_path / "perf.data"
    command = ["perf", "record", "-q", "-e", "sched:sched_process_exec", "-o", path, "true"]
    if subprocess.run(command, capture_output=True).returncode or not path.exists():
        pytest.skip("perf cannot record tracepoints here")
    reader = read(path)
    assert reader.text.shape == "perf script" or reader.events
    assert reader.problems == []


# ---------------------------------------------------------------------------------------------------------- without end


def peak(path: Path) -> tuple[TraceReader, int]:
    """What is read, and the most memory that it took."""
    tracemalloc.start()
    try:
        reader = read(path)
        return reader, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", PACKERS)
@pytest.mark.parametrize("filling", [b"\0", b"a", b"kvm"])
def test_bombs(kind: str, filling: bytes, tmp_path: Path) -> None:
    """A hundred megabytes of one line that come from next to nothing."""
    piece = PACKERS[kind](filling * ((1 << 24) // len(filling)))
    path = tmp_path / "bomb"
    path.write_bytes(PACKERS[kind](TEXT[:-1]) + piece * 8)
    reader, most = peak(path)
    assert len(reader.problems) in (1, 2)
    assert "unpacks to more than 500 times its size" in reader.problems[-1]
    assert reader.events in (4999, 5000)
    assert most < 64 << 20


def test_a_real_trace_is_no_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "FREE_BYTES", 1 << 10)
    assert read(BUNDLED).problems == []


def test_a_line_of_100_megabytes_is_one_unreadable_line(tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    with path.open("wb") as file:
        file.write(TEXT)
        for _ in range(100):
            file.write(b"kvm_msr: " * ((1 << 20) // 9))
        file.write(b"\n" + TEXT)
    reader, most = peak(path)
    assert reader.events == 10_000
    assert reader.lines == 10_001
    assert reader.text.unreadable_count == 1
    assert ":5001: not ftrace text" in reader.problems[0]
    assert most < 24 << 20


def test_long_lines_that_are_cut_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The line end may come in the block in which a line becomes too long, or in the next one, or never."""
    monkeypatch.setattr(files, "_LONGEST_LINE", 1 << 14)
    monkeypatch.setattr(files, "CHUNK_BYTES", 1 << 12)
    path = tmp_path / "trace.txt"
    for size in (*range((1 << 14) - 3, (1 << 14) + 3), 5 << 12, (5 << 12) + 1):
        path.write_bytes(TEXT[:1000] + b"x" * size + b"\n" + TEXT + b"y" * size)
        reader = read(path)
        whole = len(TEXT[:1000].split(b"\n")) - 1
        assert reader.events == 5000 + whole
        assert reader.lines == 5000 + whole + 2


@pytest.fixture(autouse=True)
def no_open_files() -> Iterator[None]:
    """What was kept in files without a name is let go."""
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before + 1
