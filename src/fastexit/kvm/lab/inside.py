"""Commands of this machine run inside a lab's: there a kernel's own kvm_amd is an ordinary /dev/kvm.

Models: nothing. The machine boots from memory alone: an archive with this Python, fastexit and what the command names.
Its files are copies, so nothing that it writes is written here. Output, input and signals go by ports that every kernel
has without a module.
"""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

import fastexit
from fastexit.kvm.host import KvmUnavailable
from fastexit.kvm.lab import hostfiles
from fastexit.kvm.lab.initramfs import FILE, Entry, first_entries, init_program, parts
from fastexit.kvm.lab.kernels import Kernel, directory
from fastexit.kvm.lab.qemu import Emulated, modules_of, plain, program

MEMORY_MIB = 2048
LEAST_MIB = 1536
"""The files are there twice while the kernel unpacks them."""
CPUS = 1
BEGIN_SECONDS = 600.0
"""Until the command begins; some ten on a quiet machine."""
TIMED_OUT = 124
"""What timeout(1) says."""
PATIENCE = 3
"""So many ^C end the machine, whatever the command does."""
OURS = "FASTEXIT_", "NUMBA_", "PYTHON"
KEPT = "HOME", "LANG", "PATH", "TERM", "COLUMNS", "LINES", "NO_COLOR"
CACHE = "/inside/cache"
PORTS = {"output": 0xE9, "errors": 0xEA, "told": 0xEB, "files": 0xEC}
FRAME_BYTES = 255
ANY_CPU = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
"""Kernels compiled here must run on the emulated CPU."""
_COMPILE = "from fastexit.jit.declare import cache_directory, warmup; warmup(); print(cache_directory())"


@dataclass
class Ended:
    """How a command ended: its exit code, 128 and the signal's number, or 124 when its time was over."""

    code: int
    seconds: float
    """From the command's beginning."""
    boot_seconds: float
    files: dict[str, bytes] = field(default_factory=dict)
    """What was asked for and is there, by name."""


def run(
    kernel: Kernel,
    command: Sequence[str],
    *,
    cpus: int = CPUS,
    memory_mib: int = MEMORY_MIB,
    seconds: float | None = None,
    files: Iterable[str | Path] = (),
    fetch: Iterable[str | Path] = (),
    environment: Mapping[str, str] | None = None,
    terminal: bool = False,
    stdin: IO[bytes] | int | None = None,
    stdout: IO[bytes] | int = 1,
    stderr: IO[bytes] | int = 2,
) -> Ended:
    """Boot a kernel with this machine's files in it, run a command there, and end it.

    Args:
        kernel: what `kernels.find` or `kernels.own` gives.
        command: "fastexit" and "python" are those here; files that it names come along, programs with their libraries.
        cpus: the machine's.
        memory_mib: the machine's.
        seconds: after so long the machine is ended.
        files: files and folders that come along.
        fetch: files that are wanted afterwards, by their paths.
        environment: more for the command.
        terminal: whether it gets one.
        stdin: where its input comes from, nothing by default.
        stdout: where its output goes.
        stderr: where its errors go.

    KvmUnavailable, an OSError of one line, where there is no emulator or the kernel does not come up; FileNotFoundError
    for a command that is not here.
    """
    emulator = program()
    own = _environment(environment or {})
    tree, words = _tree(command, files, own.get("PATH", os.defpath))
    wanted = [os.path.abspath(path) for path in fetch]
    python = hostfiles.archive(hostfiles.python(), directory(), "inside")
    kept = [] if own.get("NUMBA_DISABLE_JIT", "0") != "0" else _compiled()
    with ExitStack() as held:
        scratch = Path(held.enter_context(tempfile.TemporaryDirectory(prefix=".inside-", dir=directory())))
        notes = {
            "argv": _strings(words),
            "environ": _strings(f"{name}={value}" for name, value in own.items()),
            "cwd": os.fsencode(os.getcwd()),
            "fetch": _strings(wanted),
        }
        if terminal:
            size = shutil.get_terminal_size()
            notes["terminal"] = b"%d %d" % (size.lines, size.columns)
        with (scratch / "initramfs").open("wb") as out:
            with python.open("rb") as first:
                shutil.copyfileobj(first, out, 1 << 24)
            init = init_program(directory(), "inside.c")
            made: set[str] = set()
            cwd = hostfiles.folders(f"{os.getcwd()}/x", made)
            out.writelines(parts([*first_entries(init, modules_of(kernel)), *cwd, *tree.entries()]))
            inside = hostfiles.folders(f"{CACHE}/x/y", set())
            out.writelines(parts([*inside, *(Entry(f"inside/{name}", FILE, data) for name, data in notes.items())]))
            out.writelines(parts([*_cache_entries(kept)]))
        session = _Session(held, stdout, stderr, stdin)
        chardevs = [part for name, port in PORTS.items() for part in session.port(name, port)]
        emulated = Emulated(
            [emulator, *plain(kernel, scratch, cpus=cpus, memory_mib=memory_mib), *session.frames(), *chardevs],
            scratch,
            session.theirs(),
            apart=True,
        )
        held.callback(emulated.end)
        session.begin()
        if terminal and stdin is not None:
            held.enter_context(_by_keys(_fd(stdin)))
        return session.attend(kernel, emulated, seconds)


def _strings(texts: Iterable[str]) -> bytes:
    return b"".join(os.fsencode(text) + b"\0" for text in texts)


def _environment(more: Mapping[str, str]) -> dict[str, str]:
    """What the command's is made of: little of this process's, for most is about this machine."""
    own = {name: value for name, value in os.environ.items() if name in KEPT or name.startswith(OURS)}
    package = str(Path(fastexit.__file__).parents[1])
    return (
        own
        | ANY_CPU
        | {"FASTEXIT_CACHE_DIR": CACHE, "PYTHONPATH": package, "PYTHONDONTWRITEBYTECODE": "1", "LC_ALL": "C.UTF-8"}
        | {"PATH": f"{os.path.dirname(sys.executable)}:{own.get('PATH', os.defpath)}"}
        | dict(more)
    )


def _tree(command: Sequence[str], files: Iterable[str | Path], path: str) -> tuple[hostfiles.Tree, list[str]]:
    """What comes along for a command, and the command with its program's path."""
    if not command:
        raise ValueError("no command to run")
    name, *rest = command
    tree = hostfiles.Tree()
    tree.add(Path(fastexit.__file__).parent)
    if name == "fastexit":
        words = [sys.executable, "-m", "fastexit", *rest]
    elif name in ("python", "python3"):
        words = [sys.executable, *rest]
    else:
        found = shutil.which(name, path=path)
        if found is None:
            raise FileNotFoundError(f"no program {name!r} here")
        words = [os.path.abspath(found), *rest]
        tree.add(Path(words[0]))
    for given in files:
        if not os.path.exists(given):
            raise FileNotFoundError(f"no file or folder {str(given)!r} to take along")
        tree.add(Path(given))
    for word in rest:
        if word and os.path.isfile(word):
            tree.add(Path(word))
    tree.add_libraries()
    return tree, words


def _compiled() -> list[Path]:
    """Kernels compiled for any CPU, which takes a minute after a change of theirs."""
    own = os.environ | ANY_CPU | {"FASTEXIT_CACHE_DIR": str(directory() / "inside")}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(fastexit.__file__).parents[1]), own.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, "-c", _COMPILE], env=own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"kernels cannot be compiled for the machine: {done.stderr.strip().splitlines()[-1]}")
    where = Path(done.stdout.strip())
    return sorted(where.iterdir()) if where.is_dir() else []


def _cache_entries(kept: Sequence[Path]) -> Iterable[Entry]:
    made = {"/inside", CACHE}
    for path in kept:
        name = f"{CACHE}/{path.parent.name}/{path.name}"
        yield from hostfiles.folders(name, made)
        yield Entry(name[1:], FILE, path.read_bytes())


# ------------------------------------------------------------------------------------------------------------ the host


class _Session:
    """This side of the ports and of the serial line."""

    def __init__(
        self, held: ExitStack, stdout: IO[bytes] | int, stderr: IO[bytes] | int, stdin: IO[bytes] | int | None
    ) -> None:
        self._held = held
        self._theirs: list[socket.socket] = []
        self._ours: dict[str, socket.socket] = {}
        self._to = {"output": _fd(stdout), "errors": _fd(stderr)}
        self._stdin = None if stdin is None else _fd(stdin)
        self._told = b""
        self._given = bytearray()
        self._began: float | None = None
        self._code: int | None = None
        self._interrupts = 0
        self._selector = held.enter_context(selectors.DefaultSelector())

    def _pair(self, name: str) -> str:
        """QEMU's end of a connection, as a chardev."""
        ours, theirs = socket.socketpair()
        self._held.callback(ours.close)
        self._held.callback(theirs.close)
        self._ours[name] = ours
        self._theirs.append(theirs)
        return f"socket,id={name},fd={theirs.fileno()}"

    def port(self, name: str, port: int) -> list[str]:
        """QEMU's arguments for a port that bytes come from."""
        return ["-chardev", self._pair(name), "-device", f"isa-debugcon,iobase={port:#x},chardev={name}"]

    def frames(self) -> list[str]:
        """QEMU's arguments for the second serial line."""
        return ["-chardev", self._pair("frames"), "-serial", "chardev:frames"]

    def theirs(self) -> list[int]:
        """File descriptors that QEMU inherits."""
        return [end.fileno() for end in self._theirs]

    def begin(self) -> None:
        """QEMU has its ends."""
        for end in self._theirs:
            end.close()
        for name in PORTS:
            self._selector.register(self._ours[name], selectors.EVENT_READ, name)

    def attend(self, kernel: Kernel, emulated: Emulated, seconds: float | None) -> Ended:
        """Until the command has ended, or its time is over."""
        started = time.monotonic()
        with ExitStack() as held:
            if threading.current_thread() is threading.main_thread():
                before = signal.signal(signal.SIGINT, self._interrupted)
                held.callback(signal.signal, signal.SIGINT, before)
            while self._code is None:
                now = time.monotonic()
                if self._began is None and now - started > BEGIN_SECONDS:
                    raise KvmUnavailable(0, f"kernel {kernel.release} did not come up in {BEGIN_SECONDS:.0f} s")
                if self._began is not None and seconds is not None and now - self._began > seconds:
                    self._code = TIMED_OUT
                    break
                if self._interrupts >= PATIENCE or (self._interrupts and self._began is None):
                    raise KeyboardInterrupt
                self._once(kernel, emulated)
        began = self._began if self._began is not None else time.monotonic()
        return Ended(self._code, time.monotonic() - began, began - started, _files(bytes(self._given)))

    def _once(self, kernel: Kernel, emulated: Emulated) -> None:
        """What has come since."""
        for key, _ in self._selector.select(0.25):
            if key.data == "input":
                self._pass_input()
                continue
            try:
                data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
            except ConnectionError:
                data = b""
            if not data:
                raise KvmUnavailable(0, f"the machine of kernel {kernel.release} ended: {emulated.why_ended()}")
            if key.data == "told":
                self._hear(data)
            elif key.data == "files":
                self._given += data
            else:
                _write(self._to[key.data], data)
        if self._code is not None:
            self._drain()

    def _drain(self) -> None:
        """What was written before the end."""
        for name in ("output", "errors", "files"):
            end = self._ours[name]
            end.setblocking(False)
            while True:
                try:
                    data = end.recv(1 << 16)
                except OSError:
                    break
                if not data:
                    break
                if name == "files":
                    self._given += data
                else:
                    _write(self._to[name], data)

    def _hear(self, data: bytes) -> None:
        *lines, self._told = (self._told + data).split(b"\n")
        for line in lines:
            if line == b"began":
                self._began = time.monotonic()
                if self._stdin is None:
                    self._ours["frames"].sendall(b"e\0")
                self._want_input()
            elif line == b"ack":
                self._want_input()
            elif line.startswith(b"exit "):
                self._code = int(line[5:])

    def _want_input(self) -> None:
        """The last frame was taken: the next may be read."""
        if self._stdin is None:
            return
        try:
            self._selector.register(self._stdin, selectors.EVENT_READ, "input")
        except PermissionError:  # a file can always be read
            self._pass_input()

    def _pass_input(self) -> None:
        assert self._stdin is not None
        with suppress(KeyError):
            self._selector.unregister(self._stdin)
        data = os.read(self._stdin, FRAME_BYTES)
        self._ours["frames"].sendall(b"d" + bytes((len(data),)) + data if data else b"e\0")

    def _interrupted(self, _number: int, _frame: FrameType | None) -> None:
        """^C is the command's; one that does not listen is ended with its machine."""
        self._interrupts += 1
        if self._began is not None:
            self._ours["frames"].sendall(b"s\1" + bytes((signal.SIGINT,)))


@contextmanager
def _by_keys(fd: int) -> Iterator[None]:
    """A terminal gives each key as it is struck and echoes none: the machine's own does that. ^C stays a signal."""
    if not os.isatty(fd):
        yield
        return
    before = termios.tcgetattr(fd)
    now = termios.tcgetattr(fd)
    now[3] &= ~(termios.ECHO | termios.ICANON)
    try:
        termios.tcsetattr(fd, termios.TCSADRAIN, now)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _fd(file: IO[bytes] | int) -> int:
    return file if isinstance(file, int) else file.fileno()


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _files(data: bytes) -> dict[str, bytes]:
    """Files that the machine gave: name, size, bytes."""
    found: dict[str, bytes] = {}
    while data:
        name, size, rest = data.split(b"\0", 2)
        length = int(size)
        found[os.fsdecode(name)], data = rest[:length], rest[length:]
    return found
