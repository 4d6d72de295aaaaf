"""Where ioctls go: the /dev/kvm of this machine, or anything with the face of `Device`.

Models: nothing. `Oracle`, its vCPUs and `Host` know a device and no more, so a kernel in another machine, to which
ioctls are carried, is compared by the same code.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastexit.kvm import guest as G
from fastexit.kvm import ioctl as K

DEVICE = "/dev/kvm"
MODULES = Path("/sys/module")
CPUINFO = Path("/proc/cpuinfo")
PROC_VERSION = Path("/proc/version")


class KvmUnavailable(OSError):
    """/dev/kvm is not there, not ours to open, or too old; its text is one line that says which."""

    def __str__(self) -> str:
        return self.strerror or "no usable KVM"


class Device:
    """KVM of this machine."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return DEVICE

    def open(self) -> int:
        """A file descriptor of /dev/kvm; KvmUnavailable where it cannot be had."""
        try:
            return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            hint = {
                "FileNotFoundError": "this machine has no KVM, or its module is not loaded",
                "PermissionError": "join the group that owns it, or run as root",
            }.get(type(error).__name__, "KVM cannot be used here")
            raise KvmUnavailable(error.errno, f"no usable {DEVICE}: {error.strerror}; {hint}") from None

    @contextmanager
    def opened(self) -> Iterator[int]:
        """/dev/kvm, open for as long as it is needed."""
        fd = self.open()
        try:
            yield fd
        finally:
            self.close(fd)

    def close(self, fd: int) -> None:
        """Closes what CREATE_VM, CREATE_VCPU or `open` gave."""
        os.close(fd)

    def call(self, fd: int, request: int, argument: Any = None) -> int:
        """One ioctl, as `fastexit.kvm.ioctl.call`."""
        return K.call(fd, request, argument)

    def calls(self, fd: int, asked: Sequence[tuple[int, Any]]) -> None:
        """Several ioctls that change nothing, each a request and its argument."""
        for request, argument in asked:
            self.call(fd, request, argument)

    def enable_cap(self, fd: int, cap: int, argument: int) -> None:
        """KVM_ENABLE_CAP of a VM with one argument."""
        enable = K.ffi.new("struct kvm_enable_cap *", {"cap": cap, "args": [argument]})
        self.call(fd, K.ENABLE_CAP, enable)

    def memory(self, vm: int) -> G.Memory:
        """Memory for a VM's guests."""
        return G.Memory(vm)

    def guest(self, vcpu: int, memory: G.Memory, run_bytes: int) -> G.Guest:
        """What runs programs on a vCPU."""
        return G.Guest(vcpu, memory, run_bytes)

    def created(self, vm: int, vcpu: int) -> None:
        """A vCPU is complete; whoever looks at many at once wants to know."""

    def watch(self, vm: int, *, states: bool) -> None:
        """What will be asked of all vCPUs behind each operation: pages and events, with ``states`` mp_state, too.

        A device that is far away brings the answers along.
        """

    def wait(self, seconds: float) -> None:
        """Lets time pass."""
        time.sleep(seconds)

    def eventfd(self) -> int:
        """An eventfd that nobody waits for: `signal` adds to it, `drain` takes what there is."""
        return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def signal(self, vm: int, fd: int, count: int = 1) -> None:
        """Adds to an eventfd, which does something to a VM."""
        os.eventfd_write(fd, count)

    def drain(self, fd: int) -> int:
        """What an eventfd has counted, which is 0 then."""
        try:
            return os.eventfd_read(fd)
        except BlockingIOError:
            return 0

    def text(self, path: Path) -> str | None:
        """A file of the kernel's, or None."""
        try:
            return path.read_text()
        except OSError:
            return None

    def exists(self, path: Path) -> bool:
        """Whether there is such a file or directory."""
        return path.exists()

    def release(self) -> str:
        """The kernel's release."""
        return os.uname().release

    def version(self) -> str:
        """Upstream's version with its patch level, where the kernel tells it; else ""."""
        return upstream(self.text(PROC_VERSION) or "")


def upstream(text: str) -> str:
    """The version that a distribution's kernel names in /proc/version, else "".

    >>> upstream("Linux version 6.1.0-57-cloud-amd64 (gcc-12 (Debian 12.2.0-14)) #1 SMP Debian 6.1.192-3 (2026-10-01)")
    '6.1.192'
    """
    debian, plain = r"#\d+ [^#]*Debian (\d+\.\d+\.\d+)", r"Linux version (\d+\.\d+\.[1-9]\d*)"
    found = re.search(debian, text) or re.match(plain, text)
    return found[1] if found else ""


LOCAL = Device()
