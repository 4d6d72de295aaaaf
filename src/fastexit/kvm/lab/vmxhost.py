"""What the KVM of a VMX lab's machine is: a `Host`, from its parameters, its capabilities and one IPI to nobody.

Models: nothing. host.py's other experiments run guests of user space's own; what they ask is the same in every
kvm_intel: an injected interrupt stays in service, and the fast path is there from the first generation on.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Protocol

from fastexit import regs as R
from fastexit.kvm import host as H
from fastexit.kvm import ioctl as K
from fastexit.kvm.lab.kernels import Kernel
from fastexit.kvm.lab.vmxwire import Answer, Op, Request
from fastexit.layout import MAX_VCPU_ID, MAX_VCPUS

INTEL, KVM = "kvm_intel", "kvm"
CAPS = (
    K.CAP_X86_SMM,
    K.CAP_DISABLE_QUIRKS2,
    K.CAP_X86_APIC_BUS_CYCLES_NS,
    K.CAP_MAX_VCPUS,
    K.CAP_MAX_VCPU_ID,
    K.CAP_X2APIC_API,
)
DEFAULTS = {"vector_hashing": "Y", "min_timer_period_us": "200", "pi_inject_timer": "N", "ignore_msrs": "N"}
SYSTEM, ENTRIES = -2, 256
_HEAD, _ENTRY = struct.Struct("<II"), struct.Struct("<I8xI24x")
"""struct kvm_cpuid2, and of struct kvm_cpuid_entry2 function and EAX: index and flags stand between them."""


class Asked(Protocol):
    """What carries requests to a machine's init."""

    def ask(self, request: bytes, seconds: float = ...) -> list[str]: ...


def texts(machine: Asked, parameters: Mapping[str, str]) -> dict[str, str]:
    """Values of module parameters, ``name -> module/parameter``; those that the kernel lacks are left out."""
    asked = Request()
    for place in parameters.values():
        module, _, name = place.partition("/")
        asked.file(f"/sys/module/{module}/parameters/{name}")
    answer = Answer.of(machine.ask(bytes(asked)))
    found = zip(parameters, ("".join(lines).strip() for lines in answer.files), strict=True)
    return {name: text for name, text in found if text}


def of(machine: Asked, kernel: Kernel) -> H.Host:
    """The KVM of a machine that runs ``kernel``."""
    said = DEFAULTS | texts(machine, {name: f"{KVM}/{name}" for name in DEFAULTS} | {"apicv": f"{INTEL}/enable_apicv"})
    found = _Asked(machine)
    caps, api = found.caps, found.caps[K.CAP_X2APIC_API]
    api_split = _Asked(machine, split=True).caps[K.CAP_X2APIC_API]
    return H.Host(
        release=kernel.release,
        kernel=H.generation(kernel.version),
        module=INTEL,
        api=R.X2ApicApi(api & 15) & ~R.X2ApicApi.ENABLE_SUPPRESS_EOI_BROADCAST,
        api_split=R.X2ApicApi(api_split & 15),
        icr_split=found.icr_split,
        fastpath=True,
        eoi_at_injection=False,
        vector_hashing=said["vector_hashing"] == "Y",
        min_timer_period_us=int(said["min_timer_period_us"]),
        pi_inject_timer=said["pi_inject_timer"] in ("Y", "1"),
        ignore_msrs=said["ignore_msrs"] in ("Y", "1"),
        apicv=said.get("apicv") == "Y",
        smm=bool(caps[K.CAP_X86_SMM]),
        cmci=bool(found.mce & K.MCG_CMCI_P),
        quirks=caps[K.CAP_DISABLE_QUIRKS2],
        bus_cycles=bool(caps[K.CAP_X86_APIC_BUS_CYCLES_NS]),
        max_vcpus=min(caps[K.CAP_MAX_VCPUS], MAX_VCPUS),
        max_vcpu_id=min(caps[K.CAP_MAX_VCPU_ID], MAX_VCPU_ID + 1),
        version=kernel.version,
        maxphyaddr=found.address_bits,
    )


class _Asked:
    """What a VM said of itself and of its kernel: capabilities, how an x2APIC's ICR is kept, what CPUs may have."""

    def __init__(self, machine: Asked, split: bool = False) -> None:
        asked = Request()
        asked.vm([0], [0], split=split)
        for cap in CAPS:
            asked.add(Op.HAS, cap)
        asked.ioctl(SYSTEM, K.X86_GET_MCE_CAP_SUPPORTED, bytes(8))
        asked.ioctl(SYSTEM, K.GET_SUPPORTED_CPUID, _HEAD.pack(ENTRIES, 0) + bytes(ENTRIES * _ENTRY.size))
        base = R.APIC_DEFAULT_PHYS_BASE | R.APICBASE_BSP | R.APICBASE_EN | R.APICBASE_EXTD
        for msr, value in ((R.MSR_APICBASE, base), (R.MSR_X2APIC_ICR, R.icr(H.NOWHERE, 0xFD))):
            asked.ioctl(0, K.SET_MSRS, struct.pack("<IIIIQ", 1, 0, msr, 0, value))
        asked.ioctl(0, K.GET_LAPIC, bytes(R.LAPIC_PAGE_BYTES))
        *has, mce, cpuid, _, _, page = Answer.of(machine.ask(bytes(asked))).ioctls
        self.caps = {cap: max(0, result) for cap, (result, _) in zip(CAPS, has, strict=True)}
        self.mce = int.from_bytes(mce[1], "little")
        self.icr_split = not any(page[1][R.APIC_ICR + 4 : R.APIC_ICR + 8])
        count, _ = _HEAD.unpack_from(cpuid[1])
        entries = [_ENTRY.unpack_from(cpuid[1], _HEAD.size + _ENTRY.size * n) for n in range(count)]
        bits = [eax & 0xFF for function, eax in entries if function == H.CPUID_ADDRESS_SIZES]
        self.address_bits = int(bits[0]) if bits else 36
