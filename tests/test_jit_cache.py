"""Compiled kernels on disk: used again, never stale, never in the way.

Every case runs a copy of the package with two small kernels of its own, each in a fresh interpreter.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fastexit
from fastexit.jit import declare

pytestmark = pytest.mark.skipif(not declare.JIT, reason="nothing is compiled")

LEAF = """
from fastexit import regs
from ..jit.declare import kernel

@kernel("u8(u8)")
def leaf(x):
    return x * 2 + {bit}
"""
PROBE = """
from ..jit.declare import entry, kernel
from .leaf import leaf

@entry
@kernel("u8(u8)")
def probe(x):
    return leaf(x)
"""
RUN = """
from fastexit.jit import declare
from fastexit.kernels import probe
compiled = []
declare._progress = lambda name, *_: compiled.append(name)
print(declare.load("probe")(20), *compiled)
"""
COMPILED, CACHED = " probe.probe leaf.leaf", ""


class Copy:
    """A copy of the package, and where its compiled kernels go."""

    def __init__(self, where: Path) -> None:
        self.package = where / "package" / "fastexit"
        self.cache = where / "cache"
        shutil.copytree(Path(fastexit.__file__).parent, self.package, ignore=shutil.ignore_patterns("__pycache__"))
        self.write("kernels/leaf.py", LEAF.format(bit="regs.PROBE"))
        self.write("kernels/probe.py", PROBE)
        self.append("regs.py", "\nPROBE = 1\n")

    def write(self, name: str, text: str) -> None:
        (self.package / name).write_text(text)

    def append(self, name: str, text: str) -> None:
        with (self.package / name).open("a") as file:
            file.write(text)

    def start(self, before: str = "", code: str = RUN, **changes: str) -> subprocess.Popen:
        env = os.environ | {"FASTEXIT_CACHE_DIR": str(self.cache), "PYTHONPATH": str(self.package.parent)} | changes
        return subprocess.Popen([sys.executable, "-c", before + code], env=env, stdout=subprocess.PIPE, text=True)

    def run(self, before: str = "", code: str = RUN, **changes: str) -> str:
        """What the entry returned and which kernels were compiled for it."""
        return self.finish(self.start(before, code, **changes))

    @staticmethod
    def finish(process: subprocess.Popen) -> str:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        return output.rstrip("\n")

    def files(self) -> list[Path]:
        return sorted(path for path in self.cache.rglob("*") if path.is_file())


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """A copy whose kernels are on disk."""
    copy = Copy(tmp_path_factory.mktemp("warm"))
    assert copy.run() == f"41{COMPILED}"
    assert copy.run() == f"41{CACHED}"
    return copy


@pytest.mark.long
def test_edits_are_noticed(copy: Copy) -> None:
    assert copy.run() == f"41{COMPILED}"
    copy.write("kernels/leaf.py", LEAF.format(bit="3"))
    assert copy.run() == f"43{COMPILED}"
    copy.write("kernels/leaf.py", LEAF.format(bit="regs.PROBE"))
    copy.append("regs.py", "PROBE = 9\n")
    assert copy.run() == f"49{COMPILED}"
    copy.append("kernels/lapic.py", "# a kernel that the entry does not even reach\n")
    assert copy.run() == f"49{COMPILED}"
    assert len(copy.files()) == 1


EDITED = """
import pathlib, sys
from fastexit.jit import declare
leaf = pathlib.Path(declare.__file__).parents[1] / "kernels" / "leaf.py"
text = leaf.read_text()
leaf.write_text(text.replace("regs.PROBE", "77"))
sys.dont_write_bytecode = True
from fastexit.kernels import probe
print(declare.load("probe")(20))
leaf.write_text(text)
"""


def test_an_edit_while_a_process_runs_is_not_kept(copy: Copy) -> None:
    """Code of a source that was there for a moment does not stand for the source that is there now."""
    assert copy.run(code=EDITED) == "117"
    assert copy.run() == f"41{COMPILED}"


@pytest.mark.parametrize("how", ["inlined", "apart"])
@pytest.mark.parametrize("switch", ["NUMBA_DEBUGINFO", "NUMBA_OPT"])
def test_numbas_switches(copy: Copy, switch: str, how: str) -> None:
    """Neither stops a compilation that inlines a kernel by force, or keeps it out of its callers."""
    leaf = LEAF.replace("import kernel", f"import {how}, kernel").replace("@kernel", f"@{how}\n@kernel")
    copy.write("kernels/leaf.py", leaf.format(bit="1"))
    assert copy.run(**{switch: "1"}) == f"41{COMPILED}"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-1], id="truncated"),
        pytest.param(
            lambda data: data[: len(data) // 2] + b"\0" * 64 + data[len(data) // 2 + 64 :],
            id="overwritten",
            marks=pytest.mark.long,
        ),
        pytest.param(lambda data: b"", id="empty"),
    ],
)
def test_damaged_file_is_replaced(warm: Copy, damage: Callable[[bytes], bytes]) -> None:
    (file,) = warm.files()
    file.write_bytes(damage(file.read_bytes()))
    assert warm.run() == f"41{COMPILED}"
    assert warm.run() == f"41{CACHED}"


def test_two_processes_on_a_cold_cache(copy: Copy) -> None:
    both = [copy.start(), copy.start()]
    assert {copy.finish(process) for process in both} <= {f"41{COMPILED}", f"41{CACHED}"}
    assert len(copy.files()) == 1
    assert copy.run() == f"41{CACHED}"


THREADS = """
import threading
from fastexit.jit import declare
from fastexit.kernels import probe
compiled, found = [], []
declare._progress = lambda name, *_: compiled.append(name)
begin = threading.Barrier(3)
def first():
    begin.wait()
    found.append(declare.load("probe"))
threads = [threading.Thread(target=first) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(found), len({id(function) for function in found}), found[0](20), *compiled)
"""


def test_threads_share_one_compilation(warm: Copy) -> None:
    """Threads that need an entry first, together, get one function, compiled or linked once."""
    assert warm.run(code=THREADS, FASTEXIT_CACHE="0") == f"3 1 41{COMPILED}"
    assert warm.run(code=THREADS) == f"3 1 41{CACHED}"


FORKS = """
import os, threading, time
from fastexit.jit import declare
from fastexit.kernels import probe
import logging  # whose hook is younger than the import of kernels, as where numba imports it
begun = threading.Event()
def progress(name, *_):
    begun.set()
    time.sleep(0.3)
    logging.getLogger(name)  # takes logging's lock, as numba does
declare._progress = progress
thread = threading.Thread(target=declare.load, args=("probe",))
thread.start()
begun.wait()
child = os.fork()
if not child:
    os._exit(declare.load("probe")(20))
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_waits_for_a_compilation(warm: Copy) -> None:
    """Otherwise the child would wait for a thread that it does not have."""
    assert warm.run(code=FORKS, FASTEXIT_CACHE="0") == "41"


AGAIN = """
from fastexit.jit import declare
from fastexit.kernels import probe
refused = []
def progress(*_):
    try:
        declare._compile({"probe": declare.ENTRIES["probe"]})
    except RuntimeError as error:
        refused.append(str(error))
declare._progress = progress
print(declare.load("probe")(20), len(refused), refused[0])
"""


@pytest.mark.long
def test_a_compilation_within_a_compilation_is_refused(warm: Copy) -> None:
    said = "kernels are being compiled by this thread already"
    assert warm.run(code=AGAIN, FASTEXIT_CACHE="0").startswith(f"41 2 {said}")


INTERRUPTED = """
import gc
from fastexit.jit import declare
from fastexit.kernels import probe
from numba.core.registry import cpu_target
context = cpu_target.typing_context
refresh, context.refresh = context.refresh, lambda: 1 / 0
try:
    declare.load("probe")
except ZeroDivisionError:
    print(gc.isenabled())
context.refresh = refresh
print(declare.load("probe")(20), gc.isenabled())
"""


def test_an_interruption_leaves_garbage_collection_on(warm: Copy) -> None:
    assert warm.run(code=INTERRUPTED, FASTEXIT_CACHE="0") == "True\n41 True"


@pytest.mark.parametrize("stderr", ["None", "type('Tee', (), {'flush': print})()", "open('/dev/null', 'w')"])
def test_any_stderr_will_do(warm: Copy, stderr: str) -> None:
    """None, without isatty, closed: who tells the user must not stop what is told."""
    before = f"import sys; sys.stderr = {stderr}\nif hasattr(sys.stderr, 'close'): sys.stderr.close()\n"
    code = "from fastexit.jit import declare\nfrom fastexit.kernels import probe\nprint(declare.load('probe')(20))"
    assert warm.run(before, code, FASTEXIT_CACHE="0") == "41"


def test_no_place_for_a_cache(warm: Copy, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    assert warm.run(FASTEXIT_CACHE_DIR=str(in_the_way)) == f"41{COMPILED}"
    read_only = tmp_path / "directory"
    read_only.mkdir(mode=0o500)
    assert warm.run(FASTEXIT_CACHE_DIR=str(read_only)) == f"41{COMPILED}"


def test_read_only_home(warm: Copy, tmp_path: Path) -> None:
    """Nothing can be made below a file, not even by root."""
    home = tmp_path / "home"
    home.write_text("")
    assert warm.run(FASTEXIT_CACHE_DIR="", XDG_CACHE_HOME="", HOME=str(home)) == f"41{COMPILED}"


def test_read_only_install(copy: Copy) -> None:
    """The package runs where nothing can be written, and nothing is."""
    parts = [copy.package, *copy.package.rglob("*")]
    for path in parts:
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        assert copy.run(PYTHONDONTWRITEBYTECODE="1") == f"41{COMPILED}"
        assert copy.run(PYTHONDONTWRITEBYTECODE="1") == f"41{CACHED}"
        assert {copy.package, *copy.package.rglob("*")} == set(parts)
    finally:
        for path in parts:
            path.chmod(0o700 if path.is_dir() else 0o600)


def test_who_waits_at_a_terminal_is_told(copy: Copy) -> None:
    """A progress line on a terminal's stderr, gone at the end; not a byte for programs, and none from the cache."""
    load = "from fastexit.jit import declare; from fastexit.kernels import probe; declare.load('probe')"
    env = os.environ | {"PYTHONPATH": str(copy.package.parent), "FASTEXIT_CACHE_DIR": str(copy.cache)}

    def terminal() -> str:
        ours, theirs = os.openpty()
        subprocess.run([sys.executable, "-c", load], env=env, stderr=theirs, timeout=60, check=True)
        os.write(theirs, b"!")
        shown = ""
        while not shown.endswith("!"):
            shown += os.read(ours, 10_000).decode()
        os.close(ours)
        os.close(theirs)
        return shown

    silent = subprocess.run(
        [sys.executable, "-c", load], env=env | {"FASTEXIT_CACHE": "0"}, stderr=subprocess.PIPE, timeout=60, check=True
    )
    assert silent.stderr == b""
    first = terminal()
    assert "compiling kernels, once: 0 of 2" in first
    assert first.endswith("\r\x1b[K!")
    assert terminal() == "!"


def test_read_only_cache_is_read(warm: Copy) -> None:
    (file,) = warm.files()
    file.chmod(0o400)
    file.parent.chmod(0o500)
    try:
        assert warm.run() == f"41{CACHED}"
    finally:
        file.parent.chmod(0o700)
        file.chmod(0o600)


def test_switched_off(warm: Copy, tmp_path: Path) -> None:
    assert warm.run(FASTEXIT_CACHE="0") == f"41{COMPILED}"
    assert warm.run(FASTEXIT_CACHE="0", FASTEXIT_CACHE_DIR="", XDG_CACHE_HOME=str(tmp_path)) == f"41{COMPILED}"
    assert list(tmp_path.iterdir()) == []


def test_default_place(warm: Copy, tmp_path: Path) -> None:
    warm.run(FASTEXIT_CACHE_DIR="", XDG_CACHE_HOME="", HOME=str(tmp_path))
    assert len(list(tmp_path.glob(".cache/fastexit/*/fastexit.kernels.probe"))) == 1


def test_a_warm_cache_needs_no_numba(warm: Copy) -> None:
    """What makes the first exit of a process quick: numba is imported to compile only."""
    look = "import sys\nprint('numba' in sys.modules)"
    assert warm.run(code=RUN + look) == f"41{CACHED}\nFalse"
    assert warm.run(code=RUN + look, FASTEXIT_CACHE="0") == f"41{COMPILED}\nTrue"


@pytest.mark.skipif(declare.cache_directory() is None, reason="nothing is kept")
def test_warming_up_from_the_cache_needs_no_numba() -> None:
    warm_up = "import sys, fastexit; fastexit.warmup(); print('numba' in sys.modules)"
    for _ in range(2):  # the first may compile
        done = subprocess.run(
            [sys.executable, "-c", warm_up], stdout=subprocess.PIPE, text=True, timeout=120, check=True
        )
    assert done.stdout == "False\n"


BOUNDED = """
from ..jit.declare import entry, kernel, open_words

@kernel("u8(words, u8)")
def word(m, i):
    return m[i]

@entry
@kernel("u8(u8, u8)")
def probe(address, i):
    return word(open_words(address, 2), i)
"""
RUN_BOUNDED = """
import builtins, ctypes, sys
from fastexit.jit import declare
from fastexit.kernels import probe
compiled = []
declare._progress = lambda name, *_: compiled.append(name)
words = (ctypes.c_uint64 * 2)(7, 41)
call = declare.load("probe")
refused = 0
before = sys.getrefcount(builtins), sys.getrefcount(IndexError)
for _ in range(100):
    try:
        call(ctypes.addressof(words), 2)
    except IndexError:
        refused += 1
kept = (sys.getrefcount(builtins), sys.getrefcount(IndexError)) != before
print(call(ctypes.addressof(words), 1), refused, kept, *compiled)
"""


def test_checked_bounds_come_from_the_cache(copy: Copy) -> None:
    """Kernels that may raise do, also where another process compiled them, and no reference stays behind."""
    copy.write("kernels/probe.py", BOUNDED)
    assert copy.run(code=RUN_BOUNDED, NUMBA_BOUNDSCHECK="1") == "41 100 False probe.probe probe.word"
    assert copy.run(code=RUN_BOUNDED, NUMBA_BOUNDSCHECK="1") == "41 100 False"
