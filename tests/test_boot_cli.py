"""``fastexit boot``: what it refuses, exit codes, JSON, traces, and how it treats the user's terminal and input."""

from __future__ import annotations

import fcntl
import json
import lzma
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bareguest import out, wrmsr
from fastexit.adapters.kvmhost import host, memory, multiboot, userland
from fastexit.adapters.kvmhost.tracefile import HEAD, TraceFile
from fastexit.cli import boot, main
from fastexit.kvm import device
from fastexit.trace.replay import replay
from real_kvm import kvm

AT = memory.MIB
COMMAND = [sys.executable, "-m", "fastexit", "boot"]
SECONDS = 60
CODE = 7


def program(code: bytes) -> bytes:
    """A multiboot program of machine code for 32 bits."""
    flags = multiboot.WANTS_ADDRESSES
    head = struct.pack("<III", multiboot.MAGIC, flags, -(multiboot.MAGIC + flags) & 0xFFFF_FFFF)
    return head + struct.pack("<5I", AT, AT, 0, 0, AT + 32) + code


def say(text: str) -> bytes:
    return b"".join(out(0x3F8, byte) for byte in text.encode())


END = out(0xF4, CODE) + b"\xf4\xeb\xfd"
HELLO = program(say("hello\n") + END)
SPIN = program(say("ready\n") + b"\xeb\xfe")
SLEEP = program(say("ready\n") + b"\xfa\xf4\xeb\xfd")
FAULT = program(say("ready\n") + b"\x0f\x0b")
# Receive interrupts on, so that bytes come; IN LSR; TEST AL, 1; JZ; IN; CMP AL, 'q'; JE; OUT; JMP; OUT F4.
ECHO = program(
    say("ready\n")
    + out(0x3F9, 1)
    + b"\x66\xba\xfd\x03\xec\xa8\x01\x74\xf7\x66\xba\xf8\x03\xec\x3c\x71\x74\x03\xee\xeb\xeb\xe6\xf4\xf4"
)
X2APIC = b"\xb9\x1b\x00\x00\x00\x0f\x32\x0d\x00\x04\x00\x00\x0f\x30" + wrmsr(0x80F, 0x1FF)
IPIS = program(X2APIC + b"".join(wrmsr(0x830, 0x4_0041) for _ in range(20)) + END)
IPI_AND_SPIN = program(X2APIC + wrmsr(0x830, 0x4_0041) + say("ready\n") + b"\xeb\xfe")
IPI_AND_TALK = program(X2APIC + wrmsr(0x830, 0x4_0041) + say("ready\n") + out(0x3F8, ord("x")) + b"\xeb\xf5")


@pytest.fixture(autouse=True)
def interrupts_are_heard() -> Iterator[None]:
    """In the background of a shell SIGINT is ignored, by nohup SIGHUP, and would be by the processes begun here."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def image(tmp_path: Path) -> Callable[[bytes], str]:
    def made(data: bytes) -> str:
        path = tmp_path / "image"
        path.write_bytes(data)
        return str(path)

    return made


def refused(capfd: pytest.CaptureFixture[str], *args: str) -> str:
    """The one line on stderr of a command that ends with exit code 2, and says nothing else."""
    try:
        code = main(["boot", *args])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    said = capfd.readouterr()
    assert (code, said.out) == (2, "")
    lines = [line for line in said.err.splitlines() if not line.startswith((" ", "usage:"))]
    assert len(lines) == 1, said.err
    return lines[0]


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["nowhere"], "'nowhere': No such file or directory"),
        ([""], "IMAGE is empty"),
        (["/"], "'/': Is a directory"),
        (["0.1"], "kernel '0.1' is not in the cache"),
        (["IMAGE", "--initrd", "nowhere"], "'nowhere': No such file or directory"),
        (["IMAGE", "--initrd", "IMAGE", "--run", "true"], "--run needs the initrd that is made here"),
        (["IMAGE", "--vcpus", "0"], "'0' is not a number of vCPUs from 1 to 64"),
        (["IMAGE", "--vcpus", "65"], "'65' is not a number of vCPUs from 1 to 64"),
        (["IMAGE", "--memory", "1"], "'1' is not a size in MiB from 2 to 65536"),
        (["IMAGE", "--memory", "much"], "'much' is not a size in MiB"),
        (["IMAGE", "--seconds", "0"], "'0' is not a number of seconds above 0"),
        (["IMAGE", "--kernel", "3.0"], "3.0"),
        (["IMAGE", "--trace", "/nowhere/trace"], "--trace: cannot write to '/nowhere'"),
        (["IMAGE", "--trace", "/"], "--trace: cannot write to '/'"),
        (
            ["IMAGE", "--irqchip", "kernel", "--trace", "t"],
            "--irqchip kernel: --trace: for the irqchip of fastexit alone",
        ),
        (["IMAGE", "--irqchip", "kernel", "--apicv", "--hyperv"], "--apicv, --hyperv: for the irqchip of fastexit"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(args: list[str], why: str, image: Callable[[bytes], str], capfd: pytest.CaptureFixture[str]) -> None:
    made = image(HELLO)
    assert why in refused(capfd, *[made if word == "IMAGE" else word for word in args])


def test_an_endless_image_is_not_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(boot, "MOST_BYTES", 1 << 20)
    assert "'/dev/zero' has more than 1 MiB" in refused(capfd, "/dev/zero")


def test_no_kvm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, image: Callable[[bytes], str], capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(device, "DEVICE", str(tmp_path / "kvm"))
    assert "this machine has no KVM, or its module is not loaded" in refused(capfd, image(HELLO))


def test_limits_are_the_hosts() -> None:
    assert boot.MOST_VCPUS == host.MOST_VCPUS
    assert (boot.LEAST_MIB, boot.MOST_MIB) == (memory.LEAST // memory.MIB, memory.MOST // memory.MIB)


@kvm
@pytest.mark.parametrize(
    ("data", "args", "why"),
    [
        (b"", [], "neither a Linux kernel (bzImage, vmlinux) nor a multiboot program"),
        (bytes(10_000), [], "neither a Linux kernel (bzImage, vmlinux) nor a multiboot program"),
        (b"\x7fELF\2" + bytes(100), [], "not an ELF program for x86"),
        (HELLO[:16], [], "the multiboot header is cut off"),
        (HELLO[:32], [], "its entry 0x100020 is in nothing that is loaded"),
        (HELLO, ["--run", "true"], "--run is for Linux kernels"),
        (HELLO, ["--initrd", "IMAGE", "--memory", "2"], ""),
    ],
    ids=["empty", "zeros", "elf", "header", "nothing", "run", "too big"],
)
def test_images_that_are_none(
    data: bytes, args: list[str], why: str, image: Callable[[bytes], str], capfd: pytest.CaptureFixture[str]
) -> None:
    if not why:
        data += bytes(2 * memory.MIB)
        why = "the guest has"
    made = image(data)
    assert why in refused(capfd, made, *[made if word == "IMAGE" else word for word in args])


@kvm
def test_no_busybox_for_a_kernel(
    monkeypatch: pytest.MonkeyPatch, image: Callable[[bytes], str], capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(userland, "PLACES", ())
    assert "neither a Linux kernel" in refused(capfd, image(bytes(10_000)))
    assert "no static busybox for an initramfs" in refused(capfd, image(b"\x7fELF\2" + bytes(100)))


# ------------------------------------------------------------------------------------------------------ how it ends


def booted(capfd: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    code = main(["boot", *args])
    said = capfd.readouterr()
    return code, said.out, said.err


@kvm
def test_exit_code_by_port(image: Callable[[bytes], str], capfd: pytest.CaptureFixture[str]) -> None:
    code, said, errors = booted(capfd, image(HELLO))
    assert (code, errors) == (CODE, "")
    assert said.startswith("hello\n")
    assert re.search(r"^exit port after \d+\.\d s", said, re.MULTILINE)
    assert "fastexit like" in said
    assert len([line for line in said.splitlines() if "exit IO" in line]) == 1
    assert booted(capfd, image(HELLO), "--quiet") == (CODE, "hello\n", "")
    assert booted(capfd, image(HELLO), "--quiet", "--irqchip", "kernel") == (CODE, "hello\n", "")


@kvm
def test_json_is_alone_on_stdout(image: Callable[[bytes], str], capfd: pytest.CaptureFixture[str]) -> None:
    code, said, errors = booted(capfd, image(IPIS), "--json", "--vcpus", "2")
    told = json.loads(said)
    assert (code, told["code"], told["ended"]) == (CODE, CODE, "exit port")
    assert told["vcpus"][0]["icr_writes"] == 20
    assert [row["vcpu"] for row in told["vcpus"]] == [0, 1]
    assert {row["ipis"] for row in told["kernels"]} == {20}
    assert errors == ""
    code, said, errors = booted(capfd, image(HELLO), "--json")
    assert (json.loads(said)["schema"], errors) == ("fastexit.boot/1", "hello\n")


@kvm
@pytest.mark.parametrize("data", [SPIN, SLEEP], ids=["spins", "sleeps"])
def test_time_is_up(data: bytes, image: Callable[[bytes], str], capfd: pytest.CaptureFixture[str]) -> None:
    for seconds in "0.3", "3", "30":  # one that is over before the guest got a processor shows nothing
        code, said, errors = booted(capfd, image(data), "--seconds", seconds, "--json")
        if errors == "ready\n":
            break
    told = json.loads(said)
    assert (code, told["ended"], told["code"]) == (124, "time is up", 124)
    assert errors == "ready\n"


@kvm
def test_triple_fault_is_one_line(image: Callable[[bytes], str], capfd: pytest.CaptureFixture[str]) -> None:
    code, said, errors = booted(capfd, image(FAULT), "--quiet")
    assert (code, said) == (1, "ready\n")
    assert errors.startswith("fastexit: triple fault of vCPU 0: RIP 0x10:0x1000")
    assert len(errors.splitlines()) == 1


@kvm
@pytest.mark.parametrize("packed", ["", ".xz", ".gz"])
def test_trace_is_read_again(
    packed: str, tmp_path: Path, image: Callable[[bytes], str], capfd: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / f"trace{packed}"
    code, said, _ = booted(capfd, image(IPIS), "--trace", str(trace), "--json")
    told = json.loads(said)["trace"]
    assert (code, told["file"], told["lost"]) == (CODE, str(trace), 0)
    assert told["lines"] > 20
    found = replay(str(trace))
    assert (found.mismatches, found.lines) == ([], told["lines"] + HEAD.count("\n"))
    assert main(["replay", str(trace), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["mismatches"] == []
    assert main(["report", str(trace), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)


@kvm
def test_a_long_trace_is_announced_and_written_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, image: Callable[[bytes], str], capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(boot, "MANY", 20)
    code, _, errors = booted(capfd, image(IPIS), "--trace", str(tmp_path / "trace"))
    assert (code, len(errors.splitlines())) == (CODE, 1)
    assert errors.endswith("more lines of the trace\n")
    closed: list[TraceFile] = []

    def interrupted(self: TraceFile) -> None:
        closed.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(TraceFile, "_write", interrupted)
    code, _, errors = booted(capfd, image(IPIS), "--trace", str(tmp_path / "trace"), "--quiet")
    assert (code, errors, len(closed)) == (130, "fastexit: interrupted\n", 1)


# ----------------------------------------------------------------------------------------------- terminal and input


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100"}


class Pty:
    """A terminal with a process at it: all that it shows, and its settings."""

    def __init__(self, command: list[str]) -> None:
        self.ours, self.theirs = os.openpty()
        self.before = termios.tcgetattr(self.theirs)
        self.process = subprocess.Popen(
            command,
            stdin=self.theirs,
            stdout=self.theirs,
            stderr=self.theirs,
            env=environment(),
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        self.shown = ""
        os.set_blocking(self.ours, False)

    def look(self) -> str:
        """What has been shown since the beginning."""
        try:
            while data := os.read(self.ours, 4096):
                self.shown += data.decode()
        except OSError:
            pass
        return self.shown

    def wait_for(self, text: str) -> None:
        self.until(lambda: text in self.look())

    def until(self, true: Callable[[], bool]) -> None:
        ends = time.monotonic() + SECONDS
        while not true():
            assert time.monotonic() < ends, self.shown
            time.sleep(0.01)

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def echoes(self) -> bool:
        return bool(termios.tcgetattr(self.theirs)[3] & termios.ECHO)

    def ended(self) -> int:
        """The exit code; what the terminal was set to is set again."""
        self.until(lambda: self.look() is None or self.process.poll() is not None)
        code = self.process.wait()
        self.look()
        assert termios.tcgetattr(self.theirs) == self.before
        return code

    def hang_up(self) -> None:
        """The window is closed: whoever is at the terminal gets SIGHUP, and nothing can be written any more."""
        for end in self.theirs, self.ours:
            os.close(end)
        self.ours = self.theirs = -1

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.ours >= 0:
            os.close(self.ours)
            os.close(self.theirs)


@pytest.fixture
def at_terminal(image: Callable[[bytes], str]) -> Iterator[Callable[..., Pty]]:
    open_ones: list[Pty] = []

    def started(data: bytes, *args: str, command: list[str] = COMMAND) -> Pty:
        open_ones.append(Pty([*command, image(data), *args]))
        return open_ones[-1]

    yield started
    for pty in open_ones:
        pty.close()


@kvm
def test_typed_bytes_are_the_guests(at_terminal: Callable[..., Pty]) -> None:
    pty = at_terminal(ECHO, "--quiet")
    pty.wait_for("ready")
    pty.until(lambda: not pty.echoes())
    pty.type("abc\rq")
    assert pty.ended() == ord("q")
    assert pty.shown.replace("\r\n", "\n") == "ready\nabc\r"


@kvm
@pytest.mark.parametrize("data", [SPIN, SLEEP], ids=["spins", "sleeps"])
def test_control_c_ends_it_and_tells(data: bytes, at_terminal: Callable[..., Pty]) -> None:
    pty = at_terminal(data)
    pty.wait_for("ready")
    pty.until(lambda: not pty.echoes())
    pty.type("\x03")
    assert pty.ended() == 130
    assert "interrupted after" in pty.shown
    assert pty.shown.rstrip().endswith("fastexit: interrupted")
    assert "Traceback" not in pty.shown


AT_A_MOMENT = """
import os, signal, sys, termios, threading, time

from fastexit.adapters.kvmhost.host import KvmHost
from fastexit.cli import signals
from fastexit.cli.parser import main

owner, name, number, times, pause, signals.IMPATIENT = eval(sys.argv.pop(1))
real = getattr(owner, name)


def and_then(*args, **kwargs):
    done = real(*args, **kwargs)
    if owner is not threading.Thread or args[0].name == "vcpu0":
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(pause)
    return done


setattr(owner, name, and_then)

sys.exit(main(["boot", *sys.argv[1:]]))
"""


@kvm
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("moment", ["termios, 'tcsetattr'", "threading.Thread, 'start'", "threading.Thread, 'join'"])
def test_a_signal_at_any_moment_ends_it_in_order(
    moment: str, number: str, at_terminal: Callable[..., Pty], tmp_path: Path
) -> None:
    """While the terminal is set, or set again, vCPUs begun or waited for: what was told a second time among them."""
    command = [sys.executable, "-c", AT_A_MOMENT, f"{moment}, signal.{number}, 1, 0, {SECONDS}"]
    trace = tmp_path / "trace.xz"
    over = moment.endswith("'join'")
    pty = at_terminal(IPI_AND_SPIN, "--trace", str(trace), *["--seconds", "1"] * over, command=command)
    assert pty.ended() == (124 if over else 128 + getattr(signal, number))
    assert ("time is up after" if over else "interrupted after") in pty.shown
    assert f"in {trace}" in pty.shown.replace("\r\n", "")
    assert "Traceback" not in pty.shown
    assert lzma.open(trace).read()  # whole, and of a guest that may have had no time for an exit


@kvm
def test_control_c_once_more_waits_for_nothing(at_terminal: Callable[..., Pty]) -> None:
    """A second one, and not the same key held down, ends a clean-up that takes long."""
    command = [sys.executable, "-c", AT_A_MOMENT, "KvmHost, '_stop', signal.SIGINT, 9, 0.1, 0.2"]
    pty = at_terminal(SPIN, "--seconds", "0.1", command=command)
    assert pty.ended() == 130
    assert pty.shown.endswith("fastexit: interrupted\r\n")
    assert "Traceback" not in pty.shown


@kvm
def test_sigterm_ends_it_in_order(at_terminal: Callable[..., Pty], tmp_path: Path) -> None:
    trace = tmp_path / "trace.xz"
    pty = at_terminal(IPI_AND_SPIN, "--trace", str(trace))
    pty.wait_for("ready")
    pty.until(lambda: not pty.echoes())
    pty.process.terminate()
    assert pty.ended() == 143
    assert f"in {trace}" in pty.shown.replace("\r\n", "")
    assert "Traceback" not in pty.shown
    assert replay(str(trace)).mismatches == []


@kvm
@pytest.mark.parametrize("options", [["--quiet"], []], ids=["quiet", "tells"])
@pytest.mark.parametrize("data", [IPI_AND_SPIN, IPI_AND_TALK], ids=["spins", "prints"])
def test_a_closed_terminal_leaves_a_whole_trace(
    data: bytes, options: list[str], at_terminal: Callable[..., Pty], tmp_path: Path
) -> None:
    """Also where the guest finds that nothing can be written any more before SIGHUP comes."""
    trace = tmp_path / "trace.xz"
    pty = at_terminal(data, "--trace", str(trace), *options)
    pty.wait_for("ready")
    pty.until(lambda: not pty.echoes())
    pty.hang_up()
    assert pty.process.wait(SECONDS) == 128 + signal.SIGHUP
    report = replay(str(trace))
    assert (report.mismatches, report.problems) == ([], [])


@kvm
def test_terminal_is_given_back_behind_an_error(at_terminal: Callable[..., Pty]) -> None:
    assert at_terminal(FAULT).ended() == 1


IN_BACKGROUND = """
import os, signal, sys
child = os.fork()
if not child:
    os.setpgid(0, 0)
    os.execv(sys.executable, [sys.executable, "-m", "fastexit", "boot", *sys.argv[1:]])
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
signal.signal(signal.SIGUSR1, lambda *_: os.tcsetpgrp(0, child))
while True:
    _, status = os.waitpid(child, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        print("stopped by", os.WSTOPSIG(status), flush=True)
        os.kill(child, signal.SIGKILL)
    else:
        os.tcsetpgrp(0, os.getpgrp())
        sys.exit(os.waitstatus_to_exitcode(status))
"""
FOR_A_WHILE = ["--quiet", "--seconds", str(SECONDS)]
"""Nobody else ends a guest in a group of its own if the test fails."""


@kvm
def test_in_the_background_it_runs_and_leaves_the_terminal_alone(at_terminal: Callable[..., Pty]) -> None:
    pty = at_terminal(HELLO, *FOR_A_WHILE, command=[sys.executable, "-c", IN_BACKGROUND])
    assert pty.ended() == CODE
    assert pty.shown == "hello\r\n"


@kvm
def test_what_comes_to_the_foreground_is_typed_to(at_terminal: Callable[..., Pty]) -> None:
    pty = at_terminal(ECHO, *FOR_A_WHILE, command=[sys.executable, "-c", IN_BACKGROUND])
    pty.wait_for("ready")
    pty.type("q\n")
    time.sleep(0.3)
    assert pty.process.poll() is None
    pty.process.send_signal(signal.SIGUSR1)
    assert pty.ended() == ord("q")


def piped(image: str, *args: str, **streams: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, image, *args], capture_output=True, text=True, env=environment(), timeout=SECONDS, **streams
    )


@kvm
def test_a_pipe_is_read_to_its_end(image: Callable[[bytes], str]) -> None:
    done = piped(image(ECHO), "--quiet", input="x" * 1000 + "q")
    assert (done.returncode, done.stdout, done.stderr) == (ord("q"), "ready\n" + "x" * 1000, "")
    for seconds in "0.5", "5", "50":
        done = piped(image(ECHO), "--quiet", "--seconds", seconds, input="no end")
        if done.stdout.endswith("no end"):
            break
    assert (done.returncode, done.stdout, done.stderr) == (124, "ready\nno end", "")


@kvm
def test_a_silent_pipe_keeps_nobody(image: Callable[[bytes], str]) -> None:
    reads, writes = os.pipe()
    try:
        done = piped(image(HELLO), "--quiet", stdin=reads)
    finally:
        os.close(reads)
        os.close(writes)
    assert (done.returncode, done.stdout, done.stderr) == (CODE, "hello\n", "")


@kvm
def test_no_input_at_all(image: Callable[[bytes], str]) -> None:
    done = piped(image(HELLO), "--quiet", stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout, done.stderr) == (CODE, "hello\n", "")
    done = piped(image(HELLO), "--quiet", preexec_fn=lambda: os.close(0))
    assert (done.returncode, done.stdout, done.stderr) == (CODE, "hello\n", "")


@kvm
def test_a_reader_that_has_seen_enough(image: Callable[[bytes], str]) -> None:
    """As head: the console's pipe breaks, and that is no error."""
    talks = program(out(0x3F8, ord("x")) + b"\xeb\xf5")
    with subprocess.Popen(
        [*COMMAND, image(talks), "--quiet"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10) == b"x" * 10
        process.stdout.close()
        assert process.wait(SECONDS) == 0
        assert process.stderr.read() == b""


@kvm
def test_a_reader_that_reads_no_more_keeps_nobody(image: Callable[[bytes], str]) -> None:
    """The console's pipe is full, and ^C ends the guest all the same."""
    talks = program(b"\x66\xba\xf8\x03\xb0x\xb9\x00\x00\x02\x00\xee\xe2\xfd" + END)
    reads, writes = os.pipe()
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, 4096)
    with subprocess.Popen(
        [*COMMAND, image(talks), "--quiet"], stdout=writes, stderr=subprocess.PIPE, env=environment()
    ) as process:
        assert process.stderr is not None
        os.close(writes)
        try:
            before, ends = -1, time.monotonic() + SECONDS
            while (there := waiting(reads)) != before or not there:
                assert time.monotonic() < ends
                before = there
                time.sleep(1)
            process.send_signal(signal.SIGINT)
            assert process.wait(SECONDS) == 130
            assert process.stderr.read() == b"fastexit: interrupted\n"
        finally:
            process.kill()
            os.close(reads)


def waiting(fd: int) -> int:
    """Bytes that wait in a pipe."""
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)
