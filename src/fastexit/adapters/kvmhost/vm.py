"""A VM of this machine's KVM, and its vCPUs' files: memory, CPUID, and which accesses leave to user space.

Models: nothing. Without an in-kernel irqchip KVM refuses x2APIC registers, which is an exit here
(KVM_CAP_X86_USER_SPACE_MSR); what KVM would answer by itself, though it has no APIC, is denied by an MSR filter.
"""

from __future__ import annotations

import mmap
from typing import Any

from fastexit import regs as R
from fastexit.adapters.kvmhost.memory import Memory
from fastexit.kvm import ioctl as K
from fastexit.kvm.device import LOCAL, Device, KvmUnavailable

TSS_AT = 0xFFFB_D000
"""Three pages below the firmware that KVM on old Intel CPUs wants for real mode."""
MSR_EXITS = 7
"""KVM_MSR_EXIT_REASON_INVAL, UNKNOWN and FILTER."""
HYPERV_MSRS = 0x4000_0000, 0x200
SYNC_REGS = 1
"""KVM_SYNC_X86_REGS."""
WANTED = {
    K.CAP_X86_USER_SPACE_MSR: "KVM_CAP_X86_USER_SPACE_MSR (Linux 5.10)",
    K.CAP_X86_MSR_FILTER: "KVM_CAP_X86_MSR_FILTER (Linux 5.10)",
    K.CAP_SYNC_REGS: "KVM_CAP_SYNC_REGS (Linux 4.17)",
}


class Vm:
    """KVM_CREATE_VM with memory, and with ``in_kernel`` its irqchip and PIT; close it at the end.

    KvmUnavailable where there is no KVM, or one that lacks something.
    """

    def __init__(self, memory: Memory, *, in_kernel: bool, hyperv: bool = False, device: Device = LOCAL) -> None:
        self.device: Device = device
        self.memory: Memory = memory
        self._files: list[int] = []
        try:
            self.system: int = self._file(device.open())
            self.fd: int = self._file(K.call(self.system, K.CREATE_VM))
            for cap, name in WANTED.items():
                if not self.has(cap):
                    raise KvmUnavailable(0, f"this KVM has no {name}")
            self.run_bytes: int = K.call(self.system, K.GET_VCPU_MMAP_SIZE)
            K.call(self.fd, K.SET_TSS_ADDR, TSS_AT)
            if in_kernel:
                K.call(self.fd, K.CREATE_IRQCHIP)
                K.call(self.fd, K.CREATE_PIT2, K.ffi.new("struct kvm_pit_config *"))
            else:
                K.enable_cap(self.fd, K.CAP_X86_USER_SPACE_MSR, MSR_EXITS)
                self._filter(hyperv)
            for slot in memory.slots():
                K.call(self.fd, K.SET_USER_MEMORY_REGION, slot)
        except BaseException:
            self.close()
            raise

    def has(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION."""
        return K.call(self.fd, K.CHECK_EXTENSION, cap)

    def _file(self, fd: int) -> int:
        self._files.append(fd)
        return fd

    def _filter(self, hyperv: bool) -> None:
        """KVM_X86_SET_MSR_FILTER: what belongs to the APIC, or would move the clock that its timer counts in."""
        both, write = R.MSR_FILTER_READ | R.MSR_FILTER_WRITE, R.MSR_FILTER_WRITE
        denied = [(both, R.MSR_APICBASE, 1), (both, R.MSR_TSC_DEADLINE, 1)]
        denied += [(write, R.MSR_TSC, 1), (write, R.MSR_TSC_ADJUST, 1)]
        if hyperv:
            denied.append((both, *HYPERV_MSRS))
        table, keep = K.ffi.new("struct kvm_msr_filter *"), []
        for entry, (flags, first, count) in zip(table.ranges, denied, strict=False):
            keep.append(K.ffi.new("uint8_t[]", (count + 63) // 64 * 8))
            entry.flags, entry.base, entry.nmsrs, entry.bitmap = flags, first, count, keep[-1]
        K.call(self.fd, K.X86_SET_MSR_FILTER, table)

    def vcpu(self, apic_id: int) -> tuple[int, Any]:
        """KVM_CREATE_VCPU: its file descriptor, and its ``struct kvm_run``."""
        fd = self._file(K.call(self.fd, K.CREATE_VCPU, apic_id))
        area = mmap.mmap(fd, self.run_bytes)
        run = K.ffi.from_buffer("struct kvm_run *", area)  # which keeps the area
        run.kvm_valid_regs = SYNC_REGS
        return fd, run

    def irq_line(self, gsi: int, level: int) -> None:
        """KVM_IRQ_LINE, where the irqchip is the kernel's."""
        K.call(self.fd, K.IRQ_LINE, K.ffi.new("struct kvm_irq_level *", {"irq": gsi, "level": level}))

    def close(self) -> None:
        """Gives every file back. A run area, and its vCPU with it, goes with the last reference to `kvm_run`."""
        while self._files:
            self.device.close(self._files.pop())
        self.system = self.fd = K.CLOSED
