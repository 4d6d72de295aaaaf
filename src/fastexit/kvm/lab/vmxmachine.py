"""The emulated machine of the VMX lab: Bochs' process, a disk that carries requests, a port that brings answers.

Models: nothing. No network, no display, no root.
"""

from __future__ import annotations

import os
import selectors
import signal
import struct
import subprocess
import tempfile
import time
import weakref
from contextlib import ExitStack
from pathlib import Path

from fastexit.kvm.host import KvmUnavailable
from fastexit.kvm.lab import vmxboot
from fastexit.kvm.lab.bochs import Tree
from fastexit.kvm.lab.initramfs import init_program, initramfs
from fastexit.kvm.lab.kernels import MODULES, Kernel, directory
from fastexit.kvm.lab.lastwords import last_words

BOOT_SECONDS = 200.0
"""Of the emulator's CPU time: some ten to thirty."""
SECTOR = 512
MAGIC = 0x5854_4146
INIT = "vmxinit.c"
MARK = "@"
ANSWER_SECONDS = 30.0
"""Of the emulator's own CPU time, however busy this machine is; a program takes less than one."""
LOOK_SECONDS = 2.0
"""How long nothing may be said before its CPU time is looked at."""


class Machine:
    """A running machine; `ask` gives its init work. A context manager, and ended when nobody holds it.

    Args:
        kernel: what it boots. tree: the Bochs that runs it. cpus: its processors. quantum: how many ticks a halted
            processor counts for. parameters: module parameters, such as ``{"kvm-intel": "enable_apicv=0"}``.

    KvmUnavailable, in one line, where the kernel does not come up.
    """

    def __init__(
        self,
        kernel: Kernel,
        tree: Tree | None = None,
        *,
        cpus: int = 4,
        quantum: int = 16,
        parameters: dict[str, str] | None = None,
        kernel_options: str = "",
    ) -> None:
        tree = tree or Tree()
        self.kernel = kernel
        self.cpus = cpus
        given = parameters or {}
        init = init_program(directory(), INIT, ("-pthread",))
        modules = [(f"{name}.ko", kernel.module(name), given.get(name, "")) for name in MODULES["vmx"]]
        held = ExitStack()
        self._finalizer = weakref.finalize(self, held.close)
        try:
            scratch = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="fastexit-lab-")))
            images = vmxboot.place(kernel, initramfs(init, modules), scratch, extra=kernel_options)
            (scratch / "bochsrc").write_text(vmxboot.configuration(tree.bios, scratch, images, cpus, quantum))
            self._mailbox = os.open(scratch / "mailbox", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            held.callback(os.close, self._mailbox)
            os.ftruncate(self._mailbox, vmxboot.MAILBOX_BYTES)
            self._process = _Emulated(tree.command("-q", "-f", str(scratch / "bochsrc")), tree.environment(), scratch)
            held.callback(self._process.end)
            self._asked = 0
            began = time.monotonic()
            self._process.until("ready", BOOT_SECONDS)
            self.boot_seconds: float = time.monotonic() - began
        except BaseException:
            self._finalizer()
            raise

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, request: bytes, seconds: float = ANSWER_SECONDS) -> list[str]:
        """Lines of an answer, without their mark; KvmUnavailable when the machine is gone or does not answer.

        ``seconds`` are of the emulator's CPU time.
        """
        if len(request) > vmxboot.MAILBOX_BYTES - SECTOR:
            raise ValueError(f"a request of {len(request)} bytes does not fit the mailbox")
        self._asked += 1
        os.pwrite(self._mailbox, request, SECTOR)
        os.pwrite(self._mailbox, struct.pack("<III", MAGIC, self._asked, len(request)), 0)
        self._process.go(True)
        answer = self._process.until(f"done {self._asked}", seconds)
        self._process.go(False)
        return answer

    def close(self) -> None:
        """Ends the machine; twice does no harm."""
        self._finalizer()


class _Emulated:
    """Bochs' process and what it prints. It knows no Machine, so that one can be collected."""

    def __init__(self, command: list[str], environment: dict[str, str], scratch: Path) -> None:
        self._scratch = scratch
        with (scratch / "stderr").open("wb") as said:
            self._process = subprocess.Popen(
                command,
                env=environment,
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
            )
        assert self._process.stdout is not None
        self._out = self._process.stdout.fileno()
        os.set_blocking(self._out, False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._out, selectors.EVENT_READ)
        self._rest = b""
        self._lines: list[str] = []

    def until(self, word: str, seconds: float) -> list[str]:
        """Lines up to the marked one that begins with ``word``, which comes within so much of the process' CPU time."""
        due = self._spent() + seconds
        while True:
            for n, line in enumerate(self._lines):
                if line == MARK + word:
                    found, self._lines = self._lines[:n], self._lines[n + 1 :]
                    return found
                if line.startswith(f"{MARK}fail"):
                    raise KvmUnavailable(0, f"the lab's machine: {line[6:]}")
            self._read(due, word)

    def go(self, on: bool) -> None:
        """Lets it run, or stops it: one that has nothing to do takes a whole processor all the same."""
        self._process.send_signal(signal.SIGCONT if on else signal.SIGSTOP)

    def _spent(self) -> float:
        """CPU time of the process: fields utime and stime of /proc/PID/stat."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _read(self, due: float, word: str) -> None:
        while not self._selector.select(LOOK_SECONDS):
            if self._spent() > due:
                raise KvmUnavailable(0, f"the lab's machine does not answer ({word}): {self._last()}")
        data = os.read(self._out, 1 << 20)
        if not data:
            raise KvmUnavailable(0, f"the lab's machine ended: {self._last()}")
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._lines += [line.decode(errors="replace") for line in lines]

    def _last(self) -> str:
        """What was said last by Bochs' log, on its stderr or by the kernel."""
        console, log, said = (self._scratch / name for name in ("console", "log", "stderr"))
        return last_words(console, log, said, console) or "nothing was said"

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        self._selector.close()
        assert self._process.stdout is not None
        self._process.stdout.close()
