"""What a guest did, when it is over: plain values, for JSON and for tables.

Models: nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastexit.adapters.kvmhost.modelled import ModelVcpu

if TYPE_CHECKING:
    from fastexit.adapters.kvmhost.host import KvmHost

SCHEMA = "fastexit.boot/1"


def summary(host: KvmHost, seconds: float) -> dict[str, Any]:
    """Everything that was counted; ``vcpus`` has a row for each, ``kernels`` one for each generation."""
    told: dict[str, Any] = {
        "schema": SCHEMA,
        "ended": host.ended.reason if host.ended else "running",
        "detail": host.ended.detail if host.ended else "",
        "code": host.ended.code if host.ended else 0,
        "seconds": round(seconds, 3),
        "irqchip": "kernel" if host.in_kernel else "fastexit",
        "slow_host": host.slow,
        "vcpus": [vcpu_summary(host, vcpu.index) for vcpu in host.vcpus],
        "completed_instructions": dict(host.completed),
        "unknown_msrs": {hex(msr): count for msr, count in sorted(host.unknown_msrs.items())},
        "unclaimed_ports": {hex(port): count for port, count in sorted(host.ports.unclaimed.items())},
    }
    if not host.in_kernel:
        machine = host.machine
        told |= {"kernel": machine.release, "vendor": machine.vendor, "apicv": machine.apicv}
        told["kernels"] = [
            {"kernel": row.kernel, "fast": row.fast, "ipis": row.total, "refusals": row.refusals}
            for row in host.recorder.generations()
        ]
    return told


def vcpu_summary(host: KvmHost, index: int) -> dict[str, Any]:
    """One vCPU's counts."""
    vcpu = host.vcpus[index]
    told: dict[str, Any] = {
        "vcpu": index,
        "exits": {reason.name: count for reason, count in vcpu.exits.most_common()},
        "kicked": vcpu.kicked,
    }
    if isinstance(vcpu, ModelVcpu):
        recorder = host.recorder
        told |= {
            "interrupts": sum(vcpu.taken.values()),
            "eois": recorder.eois[index],
            "icr_writes": recorder.icr_writes[index],
            "deadlines": recorder.deadlines[index],
            "paths": {path.name.lower(): count for path, count in recorder.paths[index].items()},
            "vectors": {hex(vector): count for vector, count in sorted(vcpu.taken.items())},
            "external": {hex(vector): count for vector, count in sorted(vcpu.external.items())},
            "events": dict(vcpu.events),
        }
    return told
