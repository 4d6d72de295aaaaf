"""The running kernel's own KVM tracepoints, for the calling thread: what a model's trace lines are held against.

Models: nothing. Events go to a tracefs instance of our own, so that nobody else's tracing changes; the root instance
and its buffers stay as they are. Spec: Documentation/trace/ftrace.rst and events.rst, fsopen(2), fsmount(2).
"""

from __future__ import annotations

import errno
import os
import re
import weakref
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cffi import FFI

EVENTS = (
    *("kvm_apic", "kvm_apic_ipi", "kvm_apic_accept_irq", "kvm_eoi", "kvm_msi_set_irq"),
    *("kvm_set_irq", "kvm_ioapic_set_irq", "kvm_ioapic_delayed_eoi_inj", "kvm_pic_set_irq", "kvm_ack_irq"),
)
"""What every local APIC and the VM's irqchip emit, whoever runs the guest."""

MARK = "tracing_mark_write"
"""The event that a mark shows as."""

MOUNTS = Path("/proc/self/mounts")

_ffi = FFI()
_ffi.cdef("long syscall(long number, ...);")
_libc: Any = _ffi.dlopen(None)
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_FSCONFIG_CMD_CREATE = 6
_CLOEXEC = 1

_READ_BYTES = 1 << 16
_NAME = re.compile(r"fastexit-(\d+)-\d+")
_ESCAPED = re.compile(rb"\\([0-7]{3})")
"""How the kernel writes a blank, a tab, a line end or a backslash of a mounted directory's name."""
_THREAD = re.compile(r".*-(\d+) +\[\d+\]", re.DOTALL)
_LOST = re.compile(r"CPU:\d+ \[LOST (?:(\d+) )?EVENTS\]")
_OPTIONS = ("disable_on_free", "overwrite", "markers", "norecord-cmd", "noevent-fork")
"""norecord-cmd, for names of commands go into a table that all instances share."""


class TraceUnavailable(OSError):
    """The kernel's tracepoints cannot be read here; its text is one line that says why."""

    def __str__(self) -> str:
        return self.strerror or "no usable tracefs"


class TraceLost(RuntimeError):
    """Events were lost: what was read is not all that happened."""


def lines_of_interest(lines: Iterable[str], events: Iterable[str] = EVENTS) -> list[str]:
    """Those of ``event: payload`` lines that belong to ``events``, in order."""
    wanted = frozenset(events)
    return [line for line in lines if line.partition(":")[0] in wanted]


class KernelTrace:
    """KVM's tracepoints while this is open; a context manager, and closed by itself when nobody holds it any more.

    Args:
        events: names of KVM's events; TraceUnavailable for one that the kernel lacks. None: those of EVENTS that it
            has, see the attribute ``events``.
        buffer_kib: ring buffer a CPU. What does not fit between two reads is lost, and `read` says so; what is lost for
            rarer reasons, the end of the with statement.

    `TraceUnavailable` (an OSError) where tracefs cannot be used, which takes root. Only threads that opened a trace or
    called `follow` are seen.

    Lines come in the order in which they happened, even from a thread that changes CPUs: each CPU has a buffer in which
    records lie in order, trace_pipe always gives the record with the smallest stamp of all buffers, and stamps come
    from one atomic counter (trace_clock "counter"), not from clocks that CPUs disagree about. A record that a thread
    has written is there for its next read.

    Closing removes the instance. When the process is killed, the kernel closes its files, which switches this instance
    off and frees its buffers (free_buffer, disable_on_free); the empty directory goes when somebody opens the next
    trace. Nothing is mounted anywhere: where no tracefs is, an unattached mount lives as long as its file descriptor.
    """

    def __init__(self, events: Iterable[str] | None = None, *, buffer_kib: int = 1024) -> None:
        self._held = _Held()
        self._finalizer = weakref.finalize(self, self._held.release)
        try:
            root = self._held.keep(_tracefs())
            self.events: tuple[str, ...] = _known(root, events)
            remove_stale(root)
            self._instance = self._held.make(root)
            # before anything else that is kept open: what is left behind by a killed process shall cost nothing
            for option in _OPTIONS:
                self._write("trace_options", option)
            self._held.keep(os.open("free_buffer", os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._instance))
            self._write("trace_clock", "counter")
            self._write("buffer_size_kb", buffer_kib)
            self._marker = self._open("trace_marker", os.O_WRONLY)
            self._pipe = self._open("trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
            self.follow()
            for event in self.events:
                self._write(f"events/kvm/{event}/enable", 1)
        except OSError as error:
            self._finalizer()
            if isinstance(error, TraceUnavailable):
                raise
            raise _unavailable(error) from error
        except BaseException:
            self._finalizer()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            unseen = self._counted("commit overrun", "dropped events") if kind is None and self._finalizer.alive else 0
        finally:
            self.close()
        if unseen:
            raise TraceLost(f"lost {unseen} events that never got into the buffer")

    def __repr__(self) -> str:
        return f"<KernelTrace {' '.join(self.events)}>"

    def close(self) -> None:
        """Removes the instance and gives back every file; twice does no harm."""
        self._finalizer()

    def follow(self) -> None:
        """The calling thread's events count from here.

        What was not read yet is forgotten, so nobody may be reading. The kernel wants to know a thread by its number in
        the first pid namespace, which need not be ours: a mark tells.
        """
        self._drain()
        self._write("trace_options", "context-info")
        try:
            self.mark("who")
            line = self._drain()
        finally:
            self._write("trace_options", "nocontext-info")
        found = _THREAD.match(line)
        if found is None:
            raise TraceUnavailable(0, f"no usable tracefs: a mark shows as {line!r}, without its thread")
        self._write("set_event_pid", found[1])

    def mark(self, text: str) -> None:
        """A line ``tracing_mark_write: text`` among the events, of which lines of interest have none.

        ValueError for text of more than one line, or longer than the kernel takes (4096 bytes).
        """
        data = text.encode()
        if "\n" in text or not text or os.write(self._marker, data) != len(data):
            raise ValueError(f"a mark is one line that the kernel takes whole, not {text[:40]!r}")

    def read(self) -> list[str]:
        """``event: payload`` of what happened since the last read; TraceLost when the buffer did not hold all of it."""
        lines = self._drain().splitlines()
        if any(line.startswith("CPU:") for line in lines):
            lost = [found for found in map(_LOST.fullmatch, lines) if found]
            if lost:
                raise TraceLost(f"lost {sum(int(found[1] or 1) for found in lost)} events: read more often")
        return lines

    def clear(self) -> None:
        """Forgets what was not read yet, losses too."""
        self._drain()

    def lost(self) -> int:
        """Events that were overwritten or never got into a buffer, since the trace is open, even if forgotten."""
        return self._counted("overrun", "commit overrun", "dropped events")

    def _counted(self, *names: str) -> int:
        """What the counters of all CPUs add up to."""
        total = 0
        for cpu in _names("per_cpu", self._instance):
            for line in self._text(f"per_cpu/{cpu}/stats").splitlines():
                name, _, number = line.partition(": ")
                total += int(number) if name in names else 0
        return total

    def _drain(self) -> str:
        parts = []
        while True:
            try:
                part = os.read(self._pipe, _READ_BYTES)
            except BlockingIOError:
                break
            parts.append(part)
        return b"".join(parts).decode()

    def _open(self, name: str, flags: int) -> int:
        return self._held.keep(os.open(name, flags | os.O_CLOEXEC, dir_fd=self._instance))

    def _write(self, name: str, value: str | int) -> None:
        """Never truncates: that would empty a list of threads."""
        fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._instance)
        try:
            os.write(fd, str(value).encode())
        finally:
            os.close(fd)

    def _text(self, name: str) -> str:
        with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._instance)) as file:
            return file.read()


class _Held:
    """What one trace holds and how to let go of it: files first, for a directory in use cannot go.

    It knows no KernelTrace, so that one that nobody holds any more can be collected.
    """

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.release = self._stack.close

    def keep(self, fd: int) -> int:
        self._stack.callback(os.close, fd)
        return fd

    def make(self, root: int) -> int:
        """A new instance: a file descriptor of its directory."""
        name = _make(root)
        self._stack.callback(_remove, root, name)
        return self.keep(_directory(f"instances/{name}", root))


def _make(root: int) -> str:
    """The name of a new instance. Another pid namespace may have a process with our number."""
    for n in count():
        with suppress(FileExistsError):
            os.mkdir(f"instances/fastexit-{os.getpid()}-{n}", dir_fd=root)
            break
    return f"fastexit-{os.getpid()}-{n}"


def _remove(root: int, name: str) -> None:
    """One that a forked child still has open refuses, and goes when that child closes it or is gone."""
    with suppress(OSError):
        os.rmdir(f"instances/{name}", dir_fd=root)


def remove_stale(root: int) -> None:
    """Removes instances of processes that are gone; one that is in use refuses, whoever has it."""
    for name in _names("instances", root):
        found = _NAME.fullmatch(name)
        if found and not Path(f"/proc/{found[1]}").exists():
            with suppress(OSError):
                os.rmdir(f"instances/{name}", dir_fd=root)


def _known(root: int, events: Iterable[str] | None) -> tuple[str, ...]:
    """The events to enable, all of which exist."""
    try:
        there = frozenset(_names("events/kvm", root))
    except FileNotFoundError:
        raise TraceUnavailable(errno.ENOENT, "this kernel has no KVM tracepoints, or KVM is not loaded") from None
    wanted = tuple(event for event in EVENTS if event in there) if events is None else tuple(events)
    missing = [event for event in wanted if event not in there]
    if missing or not wanted:
        raise TraceUnavailable(errno.ENOENT, f"this kernel has no tracepoint {' '.join(missing or EVENTS)}")
    return wanted


def _tracefs() -> int:
    """A file descriptor of tracefs: of one that is mounted, else of a mount that is attached nowhere.

    A second mount can reset the owner and the mode of the first one's files on older kernels.
    """
    try:
        for mount in filter(None, MOUNTS.read_bytes().split(b"\n")):
            _, place, kind, *_ = mount.split(b" ")
            if kind == b"tracefs":
                return _directory(_ESCAPED.sub(lambda found: bytes([int(found[1], 8)]), place))
        context = _call(_FSOPEN, _ffi.from_buffer(b"tracefs\0"), _CLOEXEC)
        try:
            _call(_FSCONFIG, context, _FSCONFIG_CMD_CREATE, _ffi.NULL, _ffi.NULL, 0)
            return _call(_FSMOUNT, context, _CLOEXEC, 0)
        finally:
            os.close(context)
    except OSError as error:
        raise _unavailable(error) from None


def _unavailable(error: OSError) -> TraceUnavailable:
    """The kernel's refusal in one line, with what it takes where that is known."""
    hint = {errno.EPERM: "; it takes root", errno.EACCES: "; it takes root", errno.ENODEV: "; none in this kernel"}
    code = error.errno or 0
    return TraceUnavailable(code, f"no usable tracefs: {os.strerror(code)}{hint.get(code, '')}")


def _call(number: int, *arguments: Any) -> int:
    """One system call: what it returns; OSError with the kernel's errno."""
    result: int = _libc.syscall(number, *(_ffi.cast("long", a) if isinstance(a, int) else a for a in arguments))
    if result < 0:
        raise OSError(_ffi.errno, os.strerror(_ffi.errno))
    return result


def _directory(path: str | bytes, root: int | None = None) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)


def _names(path: str, root: int) -> list[str]:
    fd = _directory(path, root)
    try:
        return os.listdir(fd)
    finally:
        os.close(fd)
