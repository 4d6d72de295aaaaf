"""A KVM that emulates ring 0 in software, at a few million instructions a second: what a guest needs there.

Models: nothing. kvm_pvm is such a KVM. Its emulator lacks some instructions, which the guest must not use or the
host has to do, and its guests would serve nothing but their ticks if time went on as it does outside.
"""

from __future__ import annotations

from fastexit.kvm import device as D
from fastexit.kvm.device import Device

MODULE = "kvm_pvm"
SLOWER = 10
"""How many times slower the guest is told that time goes: its TSC is said to be so much faster than it is, and its
APIC's bus is so much slower than KVM's. The PIT and the clock in CMOS go as ever."""
LACKING = "noxsave nosmap clearcpuid=129,137,141,151,153,308"
"""XSAVE, SMAP, PCLMULQDQ, SSSE3, CMPXCHG16B, POPCNT and AES, which its emulator does not have, as Linux' parameters:
guests see the CPU's own feature bits there, whatever KVM_SET_CPUID2 says."""


def is_slow(device: Device) -> bool:
    """Whether the machine's KVM is one."""
    return device.exists(D.MODULES / MODULE)


def parameters(tsc_khz: int) -> str:
    """What a Linux kernel has to be told there: its TSC's frequency, for it would measure another, and more."""
    return f"tsc_early_khz={tsc_khz * SLOWER} lpj=100000 mitigations=off nokaslr {LACKING}"
