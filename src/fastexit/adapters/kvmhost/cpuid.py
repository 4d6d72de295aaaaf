"""The guest's CPUID: what KVM supports, without what only an in-kernel irqchip could do, and each vCPU's own ids.

Models: nothing. SDM 2A (leaves 1, 4, 0xB, 0x15, 0x1F), APM 3 (0x8000_0008, 0x8000_001E), and the kernel's
Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from typing import Any

from fastexit.kvm import host as H
from fastexit.kvm import ioctl as K
from fastexit.kvm.device import Device

X2APIC, DEADLINE, HYPERVISOR = 1 << 21, 1 << 24, 1 << 31
"""Of leaf 1, ECX."""
APIC, HTT = 1 << 9, 1 << 28
"""Of leaf 1, EDX."""
KVM_SIGNATURE, KVM_FEATURES = 0x4000_0000, 0x4000_0001
KVM_CLOCKS = 1 << 0 | 1 << 3 | 1 << 24
"""kvmclock by its old and its new MSRs, and that it is stable."""
KVM_NO_DELAY = 1 << 1
CRYSTAL_HZ = 25_000_000
VENDOR_INTEL = b"GenuineIntel"
LEAVES = 256


def supported(device: Device, system: int) -> Any:
    """KVM_GET_SUPPORTED_CPUID."""
    return H.supported_cpuid(device, system)


def vendor(table: Any) -> bytes:
    """The CPU vendor's name."""
    for entry in table.entries[0 : table.nent]:
        if entry.function == 0:
            return b"".join(int(word).to_bytes(4, "little") for word in (entry.ebx, entry.edx, entry.ecx))
    return b""


def guest(
    table: Any,
    apic_id: int,
    vcpus: int,
    *,
    x2apic: bool,
    deadline: bool,
    in_kernel: bool,
    tsc_khz: int = 0,
) -> Any:
    """The table for one vCPU: a ``struct cpuid_table``.

    ``tsc_khz``: the guest's TSC is not the host's: leaf 0x15 tells it, and kvmclock, which would tell another, is gone.
    """
    made = K.ffi.new("struct cpuid_table *")
    K.ffi.memmove(made, table, K.ffi.sizeof("struct cpuid_table"))
    shift = max(vcpus - 1, 0).bit_length()
    kept = 0
    for number in range(table.nent):
        entry = made.entries[kept]
        K.ffi.memmove(K.ffi.addressof(entry), K.ffi.addressof(table.entries, number), K.ffi.sizeof(entry))
        leaf = entry.function
        if leaf in (0xB, 0x1F) or (tsc_khz and leaf in (0x15, 0x16)):
            continue
        if leaf == 0:
            entry.eax = max(entry.eax, 0x15 if tsc_khz else 0xB)
        elif leaf == 1:
            entry.ebx = entry.ebx & 0xFFFF | min(1 << shift, 0xFF) << 16 | (apic_id & 0xFF) << 24
            entry.ecx = entry.ecx & ~(X2APIC | DEADLINE) | X2APIC * x2apic | DEADLINE * deadline | HYPERVISOR
            entry.edx = entry.edx & ~HTT | APIC | (HTT if vcpus > 1 else 0)
        elif leaf == 4:
            entry.eax = entry.eax & 0x3FFF | min((1 << shift) - 1, 0x3F) << 26
        elif leaf == 0x8000_0008:
            entry.ecx = entry.ecx & ~0xF0FF | shift << 12 | min(vcpus - 1, 0xFF)
        elif leaf == 0x8000_001E:
            entry.eax, entry.ebx, entry.ecx = apic_id, apic_id & 0xFF, 0
        elif leaf == KVM_FEATURES and not in_kernel:
            entry.eax &= KVM_NO_DELAY if tsc_khz else KVM_CLOCKS | KVM_NO_DELAY
        elif leaf == KVM_FEATURES and tsc_khz:
            entry.eax &= ~KVM_CLOCKS
        kept += 1
    kept = _topology(made, kept, apic_id, vcpus, shift)
    if tsc_khz:
        entry = _add(made, kept, 0x15)
        entry.eax, entry.ebx, entry.ecx = 1, max(1, tsc_khz * 1000 // CRYSTAL_HZ), CRYSTAL_HZ
        kept += 1
    made.nent = kept
    return made


def _add(table: Any, at: int, leaf: int, index: int = 0) -> Any:
    entry = table.entries[at]
    K.ffi.memmove(K.ffi.addressof(entry), bytes(K.ffi.sizeof(entry)), K.ffi.sizeof(entry))
    entry.function, entry.index = leaf, index
    return entry


def _topology(table: Any, at: int, apic_id: int, vcpus: int, shift: int) -> int:
    """Leaf 0xB: a core a vCPU, all in one package."""
    for index, (bits, count, kind) in enumerate(((0, 1, 1), (shift, vcpus, 2), (0, 0, 0))):
        entry = _add(table, at, 0xB, index)
        entry.flags = 1  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        entry.eax, entry.ebx, entry.ecx, entry.edx = bits, count, kind << 8 | index, apic_id
        at += 1
    return at
