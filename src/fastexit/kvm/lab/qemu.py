"""The emulated machine of a lab: QEMU's TCG, which has AMD's SVM, so a kernel's own kvm_amd runs guests in it.

Models: nothing. No KVM below, no root, no network, no disk.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from fastexit.kvm.host import KvmUnavailable
from fastexit.kvm.lab.initramfs import init_program, initramfs
from fastexit.kvm.lab.kernels import MODULES, Kernel, directory
from fastexit.kvm.lab.lastwords import last_words
from fastexit.kvm.lab.wire import BYTES, Answer, Record, Wire, WireBroken

EMULATOR = "qemu-system-x86_64"
CPU = "EPYC,+svm,+npt"
BOOT_SECONDS = 600.0
"""Five on a quiet machine; one that is busy with other things, two dozen of them perhaps, gets its time."""
ENDING_SECONDS = 10.0
PARAMETERS = {"kvm-amd": "avic=0 vgif=0 nrips=0"}
"""What the emulated CPU does not have, or has in a way that is nobody's."""
EXACT = ("-icount", "shift=0,sleep=off")
"""The machine's clock counts instructions, 1 ns each; halting jumps to the next timer."""
ACCELERATOR = "tcg,thread=single"
"""CPUs take turns in one thread. With a thread each, one translates code while another rewrites it, as the kernel does
for its static keys when virtual machines come and go, and runs what was never there: an oops, or a CPU that waits for
ever.
"""
COMMAND_LINE = "console=ttyS0 panic=-1 quiet mitigations=off no_timer_check"
"""A machine that a busy host keeps from running misses ticks, which the kernel's check takes for a broken timer."""


def program(emulator: str = EMULATOR) -> str:
    """Where QEMU is; KvmUnavailable, in one line, where it is not."""
    found = shutil.which(emulator)
    if found is None:
        raise KvmUnavailable(2, f"no {emulator} here: the lab needs QEMU (Debian: qemu-system-x86)")
    return found


def modules_of(kernel: Kernel) -> list[tuple[str, bytes, str]]:
    """What a machine with AMD's CPU loads: names, contents, parameters."""
    return [(f"{name}.ko", kernel.module(name), PARAMETERS.get(name, "")) for name in MODULES["svm"]]


def plain(kernel: Kernel, scratch: Path, *, cpus: int, memory_mib: int, cpu: str = CPU) -> list[str]:
    """QEMU's arguments for any machine of a lab: ``scratch`` has its initramfs, and gets what its console says."""
    return [
        *("-M", "q35", "-accel", ACCELERATOR, "-cpu", cpu, "-smp", str(cpus), "-m", str(memory_mib)),
        *("-nodefaults", "-nographic", "-no-reboot", "-no-user-config"),
        *("-kernel", str(kernel.image), "-initrd", str(scratch / "initramfs")),
        *("-append", COMMAND_LINE),
        *("-chardev", f"file,id=console,path={scratch / 'console'}", "-serial", "chardev:console"),
    ]


class Machine:
    """A running machine; ``wire`` carries records to its init. A context manager, and ended when nobody holds it.

    Args:
        kernel: what it boots. exact: its clock counts instructions. memory_mib: its memory. cpus: how many it has.
        emulator: QEMU's program. cpu: its -cpu.

    KvmUnavailable, in one line, where there is no emulator, or the kernel does not come up.
    """

    def __init__(
        self,
        kernel: Kernel,
        *,
        exact: bool = False,
        memory_mib: int = 512,
        cpus: int = 1,
        emulator: str = EMULATOR,
        cpu: str = CPU,
    ) -> None:
        found = program(emulator)
        self.kernel = kernel
        init = init_program(directory())
        modules = modules_of(kernel)
        held = ExitStack()
        self._finalizer = weakref.finalize(self, held.close)
        try:
            shared = "/dev/shm" if Path("/dev/shm").is_dir() else None
            scratch = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="fastexit-lab-", dir=shared)))
            (scratch / "initramfs").write_bytes(initramfs(init, modules))
            memory = os.open(scratch / "memory", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            held.callback(os.close, memory)
            os.ftruncate(memory, BYTES)
            ours, theirs = socket.socketpair()
            held.callback(ours.close)
            with theirs:
                arguments = [
                    *plain(kernel, scratch, cpus=cpus, memory_mib=memory_mib, cpu=cpu),
                    *("-chardev", f"socket,id=bell,fd={theirs.fileno()}", "-serial", "chardev:bell"),
                    *("-object", f"memory-backend-file,id=m,share=on,size={BYTES},mem-path={scratch / 'memory'}"),
                    *("-device", "ivshmem-plain,memdev=m"),
                    *(EXACT if exact else ()),
                ]
                emulated = Emulated([found, *arguments], scratch, [theirs.fileno()])
            held.callback(emulated.end)
            self.wire: Wire = (_Dozing if exact else _Attended)(memory, ours, emulated)
            held.callback(self.wire.close)
            self.boot_seconds: float = self._boot()
        except BaseException:
            self._finalizer()
            raise

    def _boot(self) -> float:
        """Waits until the init answers: how long that took."""
        began = time.monotonic()
        try:
            self.wire.wait_for_machine(BOOT_SECONDS)
        except WireBroken as error:
            raise KvmUnavailable(0, f"kernel {self.kernel.release} did not come up: {error}") from None
        return time.monotonic() - began

    def close(self) -> None:
        """Ends the machine; twice does no harm."""
        self._finalizer()


class Emulated:
    """QEMU's process, and what it and its kernel say. It knows no Machine, so that one can be collected.

    ``apart``: ^C at the terminal is not for it.
    """

    def __init__(self, command: list[str], scratch: Path, fds: Iterable[int], *, apart: bool = False) -> None:
        self._console, self._said = scratch / "console", scratch / "stderr"
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                pass_fds=tuple(fds),
                start_new_session=apart,
            )

    def end(self) -> None:
        """Ends it, whatever it does."""
        self._process.kill()
        self._process.wait()

    def tell(self, what: signal.Signals) -> None:
        """A signal for the process, if there is one."""
        self._process.send_signal(what)

    def why_ended(self) -> str:
        """The same of a machine that has let go of its connections."""
        try:
            self._process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            return f"{EMULATOR} lives, but closed its ports"
        return self.why_gone() or ""

    def why_gone(self) -> str | None:
        """None while the machine runs, else one line of what it said last."""
        if self._process.poll() is None:
            return None
        return last_words(self._console, self._said) or f"{EMULATOR} ended with {self._process.returncode}"


class _Attended(Wire):
    """The wire of a machine whose clock is everybody's."""

    def __init__(self, memory: int, bell: socket.socket, emulated: Emulated) -> None:
        super().__init__(memory, lambda: bell.send(b"!"), emulated.why_gone)
        self._emulated = emulated


class _Dozing(_Attended):
    """The wire of a machine that stands still while nobody asks.

    Its clock counts instructions, so nothing is missed; idle it would jump from timer to timer on a CPU of the host's.
    """

    def trip(self, records: Sequence[Record], seconds: float = 60.0) -> list[Answer]:
        self._emulated.tell(signal.SIGCONT)
        try:
            return super().trip(records, seconds)
        finally:
            self._emulated.tell(signal.SIGSTOP)
