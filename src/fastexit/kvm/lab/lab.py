"""A lab: one kernel of a generation, booted, and VMs of its KVM.

Models: nothing.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from fastexit.checks import one_of
from fastexit.kvm import host as H
from fastexit.kvm.judge import Judge
from fastexit.kvm.lab import kernels
from fastexit.kvm.lab.device import LabDevice
from fastexit.kvm.lab.qemu import Machine
from fastexit.kvm.lab.trace import LabTrace
from fastexit.kvm.oracle import Oracle

if TYPE_CHECKING:
    from fastexit.kvm.twins import Twins

SESSIONS = 32
"""Machines that are compared at a time: their records go over together."""
EXACT_SESSIONS = 4
"""Where a story goes over by itself: enough that the kernel has one while models are busy with others."""


class Lab:
    """A real kernel in an emulated machine; a context manager.

    Args:
        version: a series (6.1), a version (6.1.192) or a release of a kernel in the cache (`fastexit kernels get`).
        vendor: whose CPU the machine has; with "vmx" what one gets is a `VmxLab`, which has no `oracle`.
        image, modules: a kernel of one's own instead of a cached one. exact: the machine's clock counts instructions.
        apicv: kvm_intel's enable_apicv, with vendor "vmx" alone (default: on).

    ``kernel`` is what was booted, ``host`` what its KVM is. `KvmUnavailable` and `KernelMissing`, both OSErrors of one
    line, where emulator or kernel are missing.
    """

    def __new__(cls, version: str | None = None, *, vendor: str = "svm", **_: Any) -> Lab:
        """The vendor's own sort of lab."""
        if cls is Lab and vendor == "vmx":
            from fastexit.kvm.lab.vmx import VmxLab

            return super().__new__(VmxLab)
        return super().__new__(cls)

    def __init__(
        self,
        version: str | None = None,
        *,
        vendor: str = "svm",
        image: str | Path | None = None,
        modules: str | Path | None = None,
        exact: bool = False,
        apicv: bool | None = None,
    ) -> None:
        self.vendor: str = one_of(vendor, "vendor", ("svm", "vmx"))
        if apicv is not None:
            raise ValueError("apicv: SVM's is AVIC, which the emulated machine has not")
        self._find(version, image, modules)
        self.version = version
        self.exact = exact
        self._lock = threading.Lock()
        self._other: Lab | None = None
        self.machine: Any = Machine(self.kernel, exact=exact)
        self.device: LabDevice = LabDevice(self.machine.wire, f"/dev/kvm of the lab's {self.kernel.release}")

    def _find(self, version: str | None, image: str | Path | None, modules: str | Path | None) -> None:
        """The kernel that is asked for."""
        if (image is None) != (modules is None):
            raise ValueError("a kernel of one's own is an image and its modules: give both")
        if (version is None) == (image is None):
            raise ValueError("give either a version or an image")
        self.kernel: kernels.Kernel = (
            kernels.find(version) if version is not None else kernels.own(str(image), str(modules))
        )

    @cached_property
    def host(self) -> H.Host:
        """What the kernel's KVM is, found by the same experiments as on this machine."""
        return H.of(self.device)

    def oracle(self, vcpus: int | None = None, **keywords: Any) -> Oracle:
        """A VM of the lab's kernel: `Oracle`'s keywords, and its face."""
        return Oracle(vcpus, device=self.device, host=self.host, **keywords)

    def trace(self) -> LabTrace:
        """The kernel's tracepoints."""
        return LabTrace(self.device)

    def judge(self) -> Judge:
        """What `verify` compares the model with."""
        name = self.kernel.version if self.version is not None else self.kernel.release
        opened = f"fx.kvm.Lab({self._arguments()})"
        return Judge(
            self.oracle,
            self.host,
            f"Linux {name} in the lab",
            "",
            f"{opened} as lab, lab.oracle(**KEYWORDS) as real",
            ("other=lab", f"{opened} as lab"),
            trace=self.trace,
            sessions=EXACT_SESSIONS if self.exact else SESSIONS,
            inside=nullcontext if self.exact else self.device.turnstile.inside,
            special={"timers": self._timers, "traces": self._traces, "hyperv": self._hyperv},
        )

    def _timers(self) -> tuple[type[Twins], Judge]:
        """Timers are compared on a machine whose clock counts instructions: this one, or another one."""
        from fastexit.kvm.lab.exact import ExactTimers

        return ExactTimers, self._exact().judge()

    def _hyperv(self) -> tuple[type[Twins], Judge]:
        """Windows guests' timers are due at a time, and a tick of the kernel's ends what needs no EOI: not here."""
        from fastexit.kvm.lab.hyperv import HypervTwins

        return HypervTwins, self._exact().judge()

    def _exact(self) -> Lab:
        """This lab, or another one of its kernel, whose clock counts instructions."""
        with self._lock:
            if not self.exact and self._other is None:
                self._other = Lab(**self._keywords() | {"exact": True})
        return self._other or self

    def _traces(self) -> tuple[type[Twins], Judge]:
        """Here whole traces can be compared: nobody else is in the machine."""
        from fastexit.kvm.lab.traces import TraceTwins

        return TraceTwins, self.judge()

    def _keywords(self) -> dict[str, Any]:
        """What makes this lab again."""
        kernel: dict[str, Any] = {"image": str(self.kernel.image), "modules": str(self.kernel.modules)}
        if self.version is not None:
            kernel = {"version": self.kernel.version}
        return kernel | {"vendor": self.vendor} | ({"exact": True} if self.exact else {})

    def _arguments(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._keywords().items())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Lab {self.kernel.release}, {self.vendor}>"

    def close(self) -> None:
        """Ends the machine; twice does no harm."""
        if self._other is not None:
            self._other.close()
        self.machine.close()
