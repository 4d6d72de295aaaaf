"""KernelTrace: what it reads, in which order, what it says when it cannot, and that nothing of it stays.

What needs the kernel's tracepoints skips where there are none and says why.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastexit.kvm import KvmUnavailable, Oracle, tracefs
from fastexit.kvm.tracefs import KernelTrace, TraceLost, TraceUnavailable, lines_of_interest

ICR = 0x830
IPI = 0x1_0000_40FD
LINES = [
    "kvm_apic_ipi: dst 1 vec 253 (Fixed|physical|assert|edge|dst)",
    "kvm_apic_accept_irq: apicid 1 vec 253 (Fixed|edge)",
    "kvm_apic: apic_write APIC_ICR = 0x1000040fd",
]
SECONDS = 30


def unusable() -> str | None:
    """Why there is nothing to trace here; None when there is."""
    try:
        with KernelTrace(), Oracle(1):
            return None
    except (KvmUnavailable, TraceUnavailable) as error:
        return str(error)


UNUSABLE = unusable()


def kvm(test):  # type: ignore[no-untyped-def]
    return pytest.mark.kvm(pytest.mark.skipif(UNUSABLE is not None, reason=UNUSABLE or "")(test))


@pytest.fixture
def vm() -> Iterator[Oracle]:
    with Oracle(2) as made:
        made.boot_x2apic()
        yield made


@pytest.fixture
def root() -> Iterator[int]:
    """The tracefs that all instances are in."""
    fd = tracefs._tracefs()
    yield fd
    os.close(fd)


def instances(root: int, process: int) -> list[str]:
    """Names of a process's instances."""
    return [name for name in tracefs._names("instances", root) if name.startswith(f"fastexit-{process}-")]


def read(root: int, name: str) -> str:
    with open(os.open(name, os.O_RDONLY, dir_fd=root)) as file:
        return file.read().strip()


def child(code: str) -> subprocess.Popen[str]:
    """A Python that runs ``code``, which says "open" when it is where the test wants it."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


OPEN = """import signal, time
from fastexit.kvm.tracefs import KernelTrace
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has inherited that it is ignored
"""


def test_lines_of_interest() -> None:
    lines = ["kvm_exit: vcpu 0 reason HLT", *LINES, "kvm_msr: msr_write 830 = 0x1000040fd", "tracing_mark_write: x"]
    assert lines_of_interest(lines) == LINES
    assert lines_of_interest(lines, ["kvm_apic"]) == LINES[2:]


@kvm
def test_reads_what_happened_since_the_last_read(vm: Oracle) -> None:
    with KernelTrace() as trace:
        assert trace.events == tracefs.EVENTS
        assert trace.read() == []
        vm.vcpus[0].set_msr(ICR, IPI)
        assert trace.read() == LINES
        vm.signal_msi(0xFEE0_1000, 0x8052)
        assert trace.read() == [
            "kvm_msi_set_irq: dst 1 vec 82 (Fixed|physical|level)",
            "kvm_apic_accept_irq: apicid 1 vec 82 (Fixed|level)",
        ]
        vm.vcpus[0].set_msr(0x80B, 0)
        trace.clear()
        assert trace.read() == []
        assert trace.lost() == 0


@kvm
def test_reads_the_named_events_only(vm: Oracle) -> None:
    with KernelTrace(["kvm_apic_ipi"]) as trace:
        vm.vcpus[0].set_msr(ICR, IPI)
        assert trace.read() == LINES[:1]


@kvm
def test_marks_lie_between_events(vm: Oracle) -> None:
    with KernelTrace() as trace:
        trace.mark("before: 1")
        vm.vcpus[0].set_msr(ICR, IPI)
        trace.mark("behind: 2")
        assert trace.read() == ["tracing_mark_write: before: 1", *LINES, "tracing_mark_write: behind: 2"]
        for text in ("", "two\nlines", "x" * (1 << 16)):
            with pytest.raises(ValueError, match="a mark is one line"):
                trace.mark(text)


@kvm
def test_order_holds_from_cpu_to_cpu(vm: Oracle) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one CPU only")
    try:
        with KernelTrace() as trace:
            vectors = [0x20 + n % 0xD0 for n in range(100)]
            for n, vector in enumerate(vectors):
                os.sched_setaffinity(0, {cpus[n % len(cpus)]})
                vm.signal_msi(0xFEE0_1000, vector)
            lines = trace.read()
            assert "[counter]" in read(trace._instance, "trace_clock")
    finally:
        os.sched_setaffinity(0, cpus)
    assert [int(line.split(" vec ")[1].split()[0]) for line in lines] == [v for v in vectors for _ in range(2)]


@kvm
def test_loss_is_an_error(vm: Oracle) -> None:
    with KernelTrace(buffer_kib=8) as trace:
        for _ in range(2000):
            vm.vcpus[0].set_msr(ICR, IPI)
        with pytest.raises(TraceLost, match=r"lost \d+ events"):
            trace.read()
        assert trace.lost() > 0
        assert trace.read() == []
        vm.vcpus[0].set_msr(ICR, IPI)
        assert trace.read() == LINES


@kvm
def test_loss_that_no_read_sees_is_an_error_at_the_end(root: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = KernelTrace._text
    monkeypatch.setattr(KernelTrace, "_text", lambda *of: real(*of).replace("commit overrun: 0", "commit overrun: 3"))
    with pytest.raises(ZeroDivisionError), KernelTrace() as trace:
        raise ZeroDivisionError
    with pytest.raises(TraceLost, match=r"lost \d+ events"), KernelTrace() as trace:
        assert trace.read() == []
    with KernelTrace() as trace:
        trace.close()
    assert instances(root, os.getpid()) == []


@kvm
def test_follows_the_threads_that_ask(vm: Oracle) -> None:
    def other(follow: bool) -> None:
        if follow:
            trace.follow()
        vm.vcpus[0].set_msr(ICR, IPI)

    with KernelTrace() as trace:
        for follow in (False, True):
            thread = threading.Thread(target=other, args=(follow,))
            thread.start()
            thread.join()
            assert trace.read() == LINES * follow
        vm.vcpus[0].set_msr(ICR, IPI)
        assert trace.read() == LINES


@kvm
def test_changes_nothing_of_others(root: int, vm: Oracle) -> None:
    shared = "set_event set_event_pid trace_options trace_clock buffer_size_kb tracing_on trace".split()

    def look() -> list[str]:
        return [Path("/proc/self/mounts").read_text(), *(read(root, name) for name in shared)]

    before = look()
    with KernelTrace():
        vm.vcpus[0].set_msr(ICR, IPI)
        assert look() == before
    assert look() == before


@kvm
def test_takes_a_tracefs_that_is_mounted(
    root: int, vm: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"none /nowhere tmpfs rw 0 0\nnodev /proc/self/\\146d/{root} tracefs rw 0 0\n")
    monkeypatch.setattr(tracefs, "MOUNTS", mounts)
    monkeypatch.setattr(tracefs, "_call", None)
    with KernelTrace() as trace:
        vm.vcpus[0].set_msr(ICR, IPI)
        assert trace.read() == LINES


@kvm
def test_two_at_once(vm: Oracle, root: int) -> None:
    with KernelTrace() as one, KernelTrace() as other:
        assert len(instances(root, os.getpid())) == 2
        vm.vcpus[0].set_msr(ICR, IPI)
        assert one.read() == other.read() == LINES


# -------------------------------------------------------------------------------------------------- what stays: nothing


@kvm
def test_closes_behind_an_error(root: int) -> None:
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError), KernelTrace() as trace:
        raise ZeroDivisionError
    trace.close()
    with pytest.raises(TraceUnavailable, match="no usable tracefs: Invalid argument"):
        KernelTrace(buffer_kib=-1)
    forgotten = KernelTrace()
    del forgotten
    assert instances(root, os.getpid()) == []
    assert len(os.listdir("/proc/self/fd")) == files


@kvm
@pytest.mark.parametrize("how", ["with KernelTrace():\n    ", "trace = KernelTrace()\n"])
def test_closes_on_interrupt(root: int, how: str) -> None:
    process = child(f"{OPEN}{how}print('open', flush=True); [time.sleep(0.05) for _ in range(20 * {SECONDS})]")
    assert len(instances(root, process.pid)) == 1
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=SECONDS)[1]
    assert instances(root, process.pid) == []


@kvm
def test_a_killed_one_leaves_an_empty_directory_until_the_next(root: int) -> None:
    process = child(f"{OPEN}trace = KernelTrace()\nprint('open', flush=True); time.sleep({SECONDS})")
    (name,) = instances(root, process.pid)
    with KernelTrace():  # the living are left alone
        assert instances(root, process.pid) == [name]
    assert int(read(root, f"instances/{name}/buffer_size_kb")) >= 1024
    process.kill()
    process.communicate(timeout=SECONDS)
    assert read(root, f"instances/{name}/tracing_on") == "0"
    assert int(read(root, f"instances/{name}/buffer_size_kb")) < 64
    with KernelTrace():
        assert instances(root, process.pid) == []


@kvm
def test_takes_another_number_where_one_is_taken(root: int) -> None:
    name = f"instances/fastexit-{os.getpid()}-0"
    os.mkdir(name, dir_fd=root)
    try:
        with KernelTrace():
            assert len(instances(root, os.getpid())) == 2
        assert instances(root, os.getpid()) == [name.partition("/")[2]]
    finally:
        os.rmdir(name, dir_fd=root)


@kvm
def test_a_forked_child_leaves_it_alone(vm: Oracle, root: int) -> None:
    with KernelTrace() as trace:
        code = os.fork()
        if not code:
            trace.close()
            os._exit(0)
        os.waitpid(code, 0)
        assert len(instances(root, os.getpid())) == 1
        vm.vcpus[0].set_msr(ICR, IPI)
        assert trace.read() == LINES
    assert instances(root, os.getpid()) == []


@kvm
def test_a_forked_child_that_stays_longest_removes_it(root: int) -> None:
    wait, go = os.pipe()
    with KernelTrace() as trace:
        code = os.fork()
        if not code:
            os.close(go)
            os.read(wait, 1)
            trace.close()
            os._exit(0)
    assert len(instances(root, os.getpid())) == 1
    os.close(wait)
    os.close(go)
    os.waitpid(code, 0)
    assert instances(root, os.getpid()) == []


# ------------------------------------------------------------------------------------------------------------- refusals


def refused(code: str) -> str:
    """The one line with which a Python that runs ``code`` is refused a trace."""
    code = (
        f"{OPEN}import os\nfrom fastexit.kvm import tracefs\n{code}\n"
        "try: KernelTrace()\nexcept tracefs.TraceUnavailable as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS, check=True)
    assert out.stdout.count("\n") == 1
    return out.stdout


def test_refuses_who_is_not_root() -> None:
    """A mounted tracefs denies permission, a mount is not permitted; no module is loaded behind setuid, whose file an
    ordinary user may be unable to read."""
    leave = "os.getuid() or os.setuid(65534)\n"
    assert re.fullmatch(
        "no usable tracefs: (Operation not permitted|Permission denied); it takes root\n", refused(leave)
    )


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES])
@pytest.mark.parametrize("call", ["open", "mkdir"])
def test_says_that_it_takes_root(call: str, number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whether the directory is closed, or open and nothing can be made in it."""
    for name in tracefs.EVENTS:
        (tmp_path / "tracing" / "events" / "kvm" / name).mkdir(parents=True)
    (tmp_path / "tracing" / "instances").mkdir()
    mounts = tmp_path / "mounts"
    mounts.write_text(f"nodev {tmp_path}/tracing tracefs rw 0 0\n")
    monkeypatch.setattr(tracefs, "MOUNTS", mounts)

    def refuse(*_args: object, **_options: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as closed:
        closed.setattr(tracefs.os, call, refuse)
        with pytest.raises(TraceUnavailable) as error:
            KernelTrace()
    assert str(error.value) == f"no usable tracefs: {os.strerror(number)}; it takes root"


@pytest.mark.parametrize("name", ["plain", "two words", "back\\slash", "tab\there", "Spuren \u00e4\u00f6"])
def test_a_mounted_tracefs_is_found_by_any_name(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """/proc/self/mounts writes blanks, tabs and backslashes in octal, and every other byte as it is."""
    place = tmp_path / name
    place.mkdir()
    escaped = "".join(f"\\{ord(c):03o}" if c in " \t\\" else c for c in str(place))
    mounts = tmp_path / "mounts"
    mounts.write_text(f"nodev {escaped} tracefs rw 0 0\n")
    monkeypatch.setattr(tracefs, "MOUNTS", mounts)
    fd = tracefs._tracefs()
    try:
        assert os.path.samestat(os.fstat(fd), place.stat())
    finally:
        os.close(fd)


def test_refuses_a_kernel_without_tracefs() -> None:
    call = "def call(*_): raise OSError(19, 'No such device')"
    broken = f"{call}\ntracefs._call = call\ntracefs.MOUNTS = tracefs.Path('/dev/null')"
    assert "no usable tracefs: No such device; none in this kernel" in refused(broken)


@kvm
def test_refuses_what_the_kernel_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TraceUnavailable, match="no tracepoint kvm_nothing$"):
        KernelTrace(["kvm_apic", "kvm_nothing"])
    mounts = tmp_path / "mounts"
    mounts.write_text(f"nodev {tmp_path} tracefs rw 0 0\n")
    monkeypatch.setattr(tracefs, "MOUNTS", mounts)
    with pytest.raises(TraceUnavailable, match="KVM is not loaded"):
        KernelTrace()
    (tmp_path / "events" / "kvm" / "kvm_entry").mkdir(parents=True)
    with pytest.raises(TraceUnavailable, match="no tracepoint kvm_apic kvm_apic_ipi"):
        KernelTrace()
