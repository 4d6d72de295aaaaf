"""Commands run inside a lab's machine: what comes along, what is missing in one line, output, input, signals, ends."""

from __future__ import annotations

import json
import marshal
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import MAGIC_NUMBER, source_hash
from pathlib import Path

import llvmlite.binding as ll
import pytest

from fastexit import cli
from fastexit.cli import kernels as command_line
from fastexit.jit import cache
from fastexit.kvm.lab import hostfiles, initramfs, inside, kernels
from strategies import JIT
from test_lab import WHY_NO_LAB, entries, lab_is_there, one_line

once = pytest.mark.skipif(not JIT, reason="the same in compiled mode")


# ----------------------------------------------------------------------------------------------------- what comes along


@pytest.fixture
def tree(tmp_path: Path) -> hostfiles.Tree:
    package = tmp_path / "deep" / "package"
    (package / "tests").mkdir(parents=True)
    (package / "tests" / "test_it.py").write_text("0\n")
    (package / "module.py").write_text("X = 1\n")
    (package / "broken.py").write_text("no Python\n")
    (tmp_path / "program").write_bytes(b"#!/bin/sh\n")
    (tmp_path / "program").chmod(0o755)
    (tmp_path / "second").symlink_to("program")
    (tmp_path / "first").symlink_to(tmp_path / "second")
    made = hostfiles.Tree()
    made.add(package)
    made.add(tmp_path / "first")
    return made


def test_files_keep_their_paths_and_links_lead_where_they_did(tree: hostfiles.Tree, tmp_path: Path) -> None:
    found = {f"/{name}": (mode, data) for name, mode, data, _ in entries(initramfs.cpio(tree.entries()))}
    assert found[f"{tmp_path}/program"] == (initramfs.PROGRAM, b"#!/bin/sh\n")
    assert found[f"{tmp_path}/second"] == (initramfs.LINK, b"program")
    assert found[f"{tmp_path}/first"] == (initramfs.LINK, os.fsencode(tmp_path / "second"))
    assert found[f"{tmp_path}/deep/package/module.py"] == (initramfs.FILE, b"X = 1\n")
    assert not [name for name in found if "test_it" in name]


def test_folders_come_before_what_is_in_them(tree: hostfiles.Tree) -> None:
    seen: set[str] = set()
    for entry in tree.entries():
        assert os.path.dirname(entry.name) in seen | {""}
        assert entry.name not in seen
        seen.add(entry.name)


def test_byte_code_comes_along_and_is_compared_with_nothing(tree: hostfiles.Tree, tmp_path: Path) -> None:
    found = {f"/{name}": data for name, _, data, _ in entries(initramfs.cpio(tree.entries()))}
    (code,) = [data for name, data in found.items() if "/module.c" in name]
    assert code[:4] == MAGIC_NUMBER
    assert int.from_bytes(code[4:8], "little") == 1  # by hash, which nobody checks
    assert code[8:16] == source_hash(b"X = 1\n")
    names: dict[str, int] = {}
    exec(marshal.loads(code[16:]), names)
    assert names["X"] == 1
    assert not [name for name in found if "/broken.c" in name]


def test_a_change_makes_another_archive_and_two_are_kept(tree: hostfiles.Tree, tmp_path: Path) -> None:
    where, made = tmp_path / "kept", []
    for size in range(4):
        (tmp_path / "program").write_bytes(b"#" * size)
        made.append(hostfiles.archive(tree, where, "a"))
        os.utime(made[-1], (size, size))
        assert hostfiles.archive(tree, where, "a") == made[-1]
        os.utime(made[-1], (size, size))
    assert len(set(made)) == 4
    assert sorted(where.iterdir()) == sorted(made[-2:])


def test_this_python_and_what_fastexit_needs_are_there() -> None:
    tree = hostfiles.python()
    packages = hostfiles.requirements()
    assert {"numpy", "llvmlite", "cffi", "rich"} <= set(packages)
    assert "pytest" not in packages
    assert os.path.abspath(sys.executable) in tree.files.keys() | tree.links.keys()
    assert os.path.realpath(sys.executable) in tree.files
    for module in (os.__file__, ll.__file__, json.__file__):
        assert module in tree.files
    assert [name for name in tree.files if "/libc.so" in name]


# -------------------------------------------------------------------------------------------------- kernels for any CPU


@pytest.mark.parametrize(
    ("told", "shared"),
    [
        ({}, False),
        ({"NUMBA_CPU_NAME": "generic"}, True),
        ({"NUMBA_CPU_NAME": "znver1"}, False),
        ({"NUMBA_CPU_NAME": "znver1", "NUMBA_CPU_FEATURES": "+avx2"}, True),
        (inside.ANY_CPU, True),
    ],
)
def test_who_is_told_a_cpu_shares_its_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: dict[str, str], shared: bool
) -> None:
    """What numba makes of these settings does not depend on this CPU, and features that it is not told do."""
    for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_DISABLE_JIT", "FASTEXIT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FASTEXIT_CACHE_DIR", str(tmp_path))
    directory: Callable[[], Path] = cache.cache_directory.__wrapped__
    here = directory()
    features = ll.get_host_cpu_features()
    features["a-feature-of-another-cpu"] = True
    monkeypatch.setattr(ll, "get_host_cpu_name", lambda: "another-cpu")
    monkeypatch.setattr(ll, "get_host_cpu_features", lambda: features)
    assert (directory() == here) == shared


# ---------------------------------------------------------------------------------------------------- the command line


def test_words_of_the_command_are_its_own() -> None:
    assert command_line.split(["kernels", "run", "6.1", "--cpus", "2", "--", "a", "--", "--cpus"]) == (
        ["kernels", "run", "6.1", "--cpus", "2"],
        ["a", "--", "--cpus"],
    )
    assert command_line.split(["walk", "--", "a"]) == (["walk", "--", "a"], [])


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["6.1"], "no command to run"),
        (["--", "true"], "either a version"),
        (["6.1", "--cpus", "0", "--", "true"], "--cpus 0"),
        (["6.1", "--memory", "12", "--", "true"], "--memory 12"),
        (["6.1", "--timeout", "0", "--", "true"], "--timeout"),
        (["6.1", "--", "no-such-program"], "no program 'no-such-program'"),
        (["6.1", "--with", "/nowhere/x", "--", "true"], "no file or folder '/nowhere/x'"),
    ],
)
def test_what_cannot_be_run_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], why: str
) -> None:
    monkeypatch.setattr(kernels, "find", lambda version: None)
    monkeypatch.setattr(inside, "program", lambda: "qemu")
    assert cli.main(["kernels", "run", *options]) == 2
    assert why in one_line(capsys.readouterr().err)


def test_no_emulator_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "find", lambda version: None)
    monkeypatch.setenv("PATH", "")
    assert cli.main(["kernels", "run", "6.1", "--", "true"]) == 2
    assert "no qemu-system-x86_64 here" in one_line(capsys.readouterr().err)


# ------------------------------------------------------------------------------------------------------- real kernels

TALKS = """
import os, sys
with open(sys.argv[1]) as brought, open("made", "w") as made:
    made.write(brought.read() + sys.stdin.read())
print(os.uname().release, os.cpu_count(), os.getcwd(), os.path.exists("/dev/kvm"))
print("to stderr", file=sys.stderr)
sys.exit(3)
"""


def run(*words: str, input: bytes = b"", **options: object) -> subprocess.CompletedProcess[bytes]:
    version = kernels.cached()[0].version
    command = [sys.executable, "-m", "fastexit", "kernels", "run", version, *words]
    return subprocess.run(command, input=input, capture_output=True, check=False, **options)  # type: ignore[call-overload,no-any-return]


@lab_is_there
@once
def test_a_command_has_its_files_input_output_and_end(tmp_path: Path) -> None:
    (tmp_path / "brought").write_text("brought ")
    given = bytes(range(97, 123)) * 100  # more than a frame
    done = run(
        *("--cpus", "2", "--fetch", "made", "--fetch", "nowhere", "--", "python", "-c", TALKS, "brought"),
        input=given,
        cwd=tmp_path,
    )
    assert done.returncode == 3
    assert done.stdout.decode().split() == [kernels.cached()[0].release, "2", str(tmp_path), "True"]
    assert done.stderr.decode().splitlines() == ["to stderr", "fastexit: the command left no file 'nowhere'"]
    assert (tmp_path / "made").read_bytes() == b"brought " + given
    assert sorted(path.name for path in tmp_path.iterdir()) == ["brought", "made"]


@lab_is_there
@once
def test_interrupts_are_the_commands_and_time_is_limited() -> None:
    """One that listens to ^C ends as it wants; one that does not is ended when its time is over."""
    program = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, lambda *_: print('heard', flush=True))\n"
        "print('begun', flush=True)\n"
        "while True: time.sleep(1)"
    )
    version = kernels.cached()[0].version
    command = [sys.executable, "-m", "fastexit", "kernels", "run", version, "--timeout", "15", "--"]
    with subprocess.Popen([*command, "python", "-c", program], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as one:
        assert one.stdout is not None
        assert one.stdout.readline() == b"begun\n"
        one.send_signal(signal.SIGINT)
        assert one.stdout.readline() == b"heard\n"
        began = time.monotonic()
        assert one.wait() == inside.TIMED_OUT
        assert time.monotonic() - began < 60


@lab_is_there
@once
def test_a_command_that_dies_says_of_what() -> None:
    assert run("--", "python", "-c", "import os; os.kill(os.getpid(), 9)").returncode == 128 + signal.SIGKILL


@pytest.mark.long
@pytest.mark.parametrize("kind", ["msr", "guest", "runs"])
@pytest.mark.parametrize("version", [kernel.version for kernel in kernels.cached()])
@pytest.mark.skipif(WHY_NO_LAB is not None, reason=WHY_NO_LAB or "")
def test_models_are_like_an_ordinary_host(version: str, kind: str, tmp_path: Path) -> None:
    """The kernel's own /dev/kvm, by ioctls of a process beside it."""
    with (tmp_path / "report").open("wb+") as out:
        command = ["fastexit", "verify", "--kind", kind, "--ops", "1000", "--json"]
        ended = inside.run(kernels.find(version), command, stdout=out, seconds=600)
        out.seek(0)
        report = json.load(out)
    assert ended.code == 0
    assert report["agreed"]
    assert report["host"]["module"] == "kvm_amd"
    assert not report["host"]["nrips"]


CHURN = """
import threading, time
from fastexit.adapters.kvmhost.memory import MIB, Memory
from fastexit.adapters.kvmhost.vm import Vm
from fastexit.kvm.device import LOCAL

end = time.monotonic() + 60

def busy():
    while time.monotonic() < end:
        sum(range(1000))

threading.Thread(target=busy).start()
made = 0
while time.monotonic() < end:
    vm = Vm(Memory(2 * MIB), in_kernel=False, device=LOCAL)
    vm.vcpu(0)
    vm.close()
    made += 1
print(made)
"""


@pytest.mark.long
@pytest.mark.skipif(WHY_NO_LAB is not None, reason=WHY_NO_LAB or "")
def test_machines_come_and_go_beside_a_busy_cpu(tmp_path: Path) -> None:
    """The kernel rewrites its code for the first and last vCPU of a kind; the other CPU may be about to run it."""
    with (tmp_path / "made").open("wb+") as out:
        command = ["python", "-c", CHURN]
        ended = inside.run(kernels.find("6.12"), command, cpus=2, memory_mib=2048, stdout=out, seconds=300)
        out.seek(0)
        made = int(out.read())
    assert ended.code == 0
    assert made > 50
