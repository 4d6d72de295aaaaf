"""What VMMs call the threads of their vCPUs."""

from __future__ import annotations

import re

_VCPU = re.compile(r"CPU (?P<qemu>\d+)/KVM|(?:.*[^A-Za-z0-9])?(?i:vcpu)[ _:#-]?(?P<other>\d+)")
_HIGHEST_VCPU = 0x7FFF


def vcpu_in(comm: str) -> int:
    """The vCPU that a thread's name tells, or -1.

    QEMU says "CPU 2/KVM", Firecracker "fc_vcpu 2", crosvm "crosvm_vcpu2", Cloud Hypervisor "vcpu2", kvmtool
    "kvm-vcpu-2".

    >>> vcpu_in("CPU 2/KVM"), vcpu_in("fc_vcpu 12"), vcpu_in("vhost-123")
    (2, 12, -1)
    """
    found = _VCPU.fullmatch(comm)
    number = int(found["qemu"] or found["other"]) if found else -1
    return number if number <= _HIGHEST_VCPU else -1
