"""KVM's tracepoints of a machine: the ring as records, and as ftrace text.

Models: kvm_entry, kvm_exit, kvm_msr, kvm_apic, kvm_apic_ipi, kvm_apic_accept_irq, kvm_apicv_accept_irq, kvm_eoi,
kvm_msi_set_irq and kvm_inj_virq in the text of 6.18. Kernels write records only while tracing is on; off, the cost is a
test of one bit. When the ring is full, later records are counted, not kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from fastexit import layout as L
from fastexit import regs as R
from fastexit.reasons import VMX_FAILED_VMENTRY, SvmExit, VmxExit

if TYPE_CHECKING:
    from fastexit.machine import Machine

RECORD = np.dtype([("event", "<u4"), ("vcpu", "<i4"), ("args", "<u8", (7,))])
"""One record: event is layout.TP_*, vcpu the index of its vCPU (-1: none), args what the event prints."""

NAMES = {
    L.TP_ENTRY: "kvm_entry",
    L.TP_EXIT: "kvm_exit",
    L.TP_MSR_READ: "kvm_msr",
    L.TP_MSR_WRITE: "kvm_msr",
    L.TP_APIC_READ: "kvm_apic",
    L.TP_APIC_WRITE: "kvm_apic",
    L.TP_APIC_IPI: "kvm_apic_ipi",
    L.TP_ACCEPT_IRQ: "kvm_apic_accept_irq",
    L.TP_APICV_ACCEPT_IRQ: "kvm_apicv_accept_irq",
    L.TP_EOI: "kvm_eoi",
    L.TP_MSI_SET_IRQ: "kvm_msi_set_irq",
    L.TP_INJ_VIRQ: "kvm_inj_virq",
    L.TP_APICV_INHIBIT_CHANGED: "kvm_apicv_inhibit_changed",
    L.TP_AVIC_INCOMPLETE_IPI: "kvm_avic_incomplete_ipi",
    L.TP_AVIC_DOORBELL: "kvm_avic_doorbell",
    L.TP_AVIC_KICK_VCPU_SLOWPATH: "kvm_avic_kick_vcpu_slowpath",
}

_SHORTHANDS = ("dst", "self", "all", "all-but-self")


def _mode(icr: int) -> str:
    return R.DeliveryMode(icr >> R.ICR_DM_SHIFT & 7).name


def _trigger(icr: int) -> str:
    return "level" if icr & R.ICR_TRIGGER else "edge"


def _dest_mode(icr: int) -> str:
    return "logical" if icr & R.ICR_LOGICAL else "physical"


def ipi_text(icr: int, dest: int) -> str:
    """Text of kvm_apic_ipi."""
    level = "assert" if icr & R.ICR_LEVEL else "de-assert"
    shorthand = _SHORTHANDS[icr >> R.ICR_SHORTHAND_SHIFT & 3]
    return f"dst {dest:x} vec {icr & 0xFF} ({_mode(icr)}|{_dest_mode(icr)}|{level}|{_trigger(icr)}|{shorthand})"


def accept_text(apic_id: int, icr: int) -> str:
    """Text of kvm_apic_accept_irq and kvm_apicv_accept_irq."""
    return f"apicid {apic_id:x} vec {icr & 0xFF} ({_mode(icr)}|{_trigger(icr)})"


def _inhibit_text(reason: int, on: int, inhibits: int) -> str:
    names = "|".join(why.name for why in R.Inhibit if inhibits >> why & 1)
    return f"{'set' if on else 'cleared'} reason={reason}, inhibits=0x{inhibits:x}{' ' if names else ''}{names}"


def _register(offset: int) -> str:
    return R.REGISTER_NAMES.get(offset, f"0x{offset:x}")


class Trace:
    """``machine.trace``: switch on, read as records or text, clear."""

    def __init__(self, machine: Machine) -> None:
        self._mem = machine.mem
        self._words = machine.words
        self._svm = bool(machine.mem[L.H_CONFIG] & L.CONFIG_SVM)

    @property
    def enabled(self) -> bool:
        """Whether kernels write records."""
        return bool(self._mem[L.H_CONFIG] & L.CONFIG_TRACE)

    def enable(self) -> None:
        """Switch tracing on."""
        self._mem[L.H_CONFIG] |= L.CONFIG_TRACE

    def disable(self) -> None:
        """Switch tracing off; what was recorded stays."""
        self._mem[L.H_CONFIG] &= ~L.CONFIG_TRACE

    def clear(self) -> None:
        """Forget all records."""
        self._mem[L.H_TRACE_HEAD] = 0

    def __len__(self) -> int:
        return min(self._mem[L.H_TRACE_HEAD], L.TRACE_CAPACITY)

    @property
    def lost(self) -> int:
        """Records that did not fit since the last clear."""
        return max(self._mem[L.H_TRACE_HEAD] - L.TRACE_CAPACITY, 0)

    def records(self) -> np.ndarray:
        """A copy of the records since the last clear, dtype RECORD, oldest first."""
        raw = self._words[L.TRACE : L.TRACE + len(self) * L.TRACE_STRIDE].reshape(-1, L.TRACE_STRIDE)
        out = np.empty(len(raw), dtype=RECORD)
        out["event"] = raw[:, 0] & np.uint64(0xFF)
        out["vcpu"] = (raw[:, 0] >> np.uint64(8)).astype(np.uint32).astype(np.int64) - 1
        out["args"] = raw[:, 1:]
        for event, used in _ARGUMENTS.items():
            out["args"][out["event"] == event, used:] = 0  # what an older record left there
        return out

    def lines(self) -> list[str]:
        """``event: payload`` of every record, as ftrace prints it after the time stamp."""
        return [f"{NAMES[event]}: {self._payload(event, vcpu, args)}" for event, vcpu, args in self._each()]

    def text(self) -> str:
        """All records as ftrace text. The model has no clock: a record's number serves as its microsecond."""
        out = []
        for n, (event, vcpu, args) in enumerate(self._each()):
            task = f"vcpu{vcpu}" if vcpu >= 0 else "host"
            seconds, micros = divmod(n, 1_000_000)
            name, payload = NAMES[event], self._payload(event, vcpu, args)
            out.append(
                f"{task:>16}-{1000 + vcpu:<7} [{max(vcpu, 0):03d}] ..... {seconds:5d}.{micros:06d}: {name}: {payload}"
            )
        return "\n".join(out) + ("\n" if out else "")

    def __iter__(self) -> Iterator[str]:
        return iter(self.lines())

    def _each(self) -> Iterator[tuple[int, int, list[int]]]:
        for record in self.records():
            yield int(record["event"]), int(record["vcpu"]), record["args"].tolist()

    def _payload(self, event: int, vcpu: int, a: list[int]) -> str:
        vcpu_id = self._mem[L.KVM + vcpu * L.KVM_STRIDE + L.K_VCPU_ID] if vcpu >= 0 else 0
        return _PAYLOADS[event](self, vcpu_id, a)

    def _entry(self, vcpu_id: int, a: list[int]) -> str:
        return f"vcpu {vcpu_id}, rip 0x{a[0]:x} intr_info 0x{a[1]:08x} error_code 0x{a[2]:08x}"

    def _exit(self, vcpu_id: int, a: list[int]) -> str:
        return (
            f"vcpu {vcpu_id} reason {self._reason(a[0])} rip 0x{a[1]:x} info1 0x{a[2]:016x} info2 0x{a[3]:016x} "
            f"intr_info 0x{a[4]:08x} error_code 0x{a[5]:08x} requests 0x{a[6]:016x}"
        )

    def _reason(self, reason: int) -> str:
        if self._svm:
            return SvmExit(reason).name.lower() if reason in _SVM_REASONS else f"0x{reason:x}"
        basic = reason & 0xFFFF
        name = VmxExit(basic).name if basic in _VMX_REASONS else f"0x{basic:x}"
        return name + (" FAILED_VMENTRY" if reason & VMX_FAILED_VMENTRY else "")

    def _msr(self, verb: str, a: list[int]) -> str:
        return f"msr_{verb} {a[0]:x} = 0x{a[1]:x}{' (#GP)' if a[2] else ''}"


_ARGUMENTS = {event: 7 if event == L.TP_EXIT else 3 for event in NAMES}
"""How many of a record's arguments the event writes."""

_SVM_REASONS = frozenset(int(r) for r in SvmExit)
_VMX_REASONS = frozenset(int(r) for r in VmxExit)

_PAYLOADS: dict[int, Callable[[Trace, int, list[int]], str]] = {
    L.TP_ENTRY: Trace._entry,
    L.TP_EXIT: Trace._exit,
    L.TP_MSR_READ: lambda t, i, a: t._msr("read", a),
    L.TP_MSR_WRITE: lambda t, i, a: t._msr("write", a),
    L.TP_APIC_READ: lambda t, i, a: f"apic_read {_register(a[0])} = 0x{a[1]:x}",
    L.TP_APIC_WRITE: lambda t, i, a: f"apic_write {_register(a[0])} = 0x{a[1]:x}",
    L.TP_APIC_IPI: lambda t, i, a: ipi_text(a[0], a[1]),
    L.TP_ACCEPT_IRQ: lambda t, i, a: accept_text(a[0], a[1]),
    L.TP_APICV_ACCEPT_IRQ: lambda t, i, a: accept_text(a[0], a[1]),
    L.TP_EOI: lambda t, i, a: f"apicid {i:x} vector {-1 if a[0] == L.NONE else a[0]}",
    L.TP_MSI_SET_IRQ: lambda t, i, a: (
        f"dst {a[1]:x} vec {a[0] & 0xFF} ({_mode(a[0])}|{_dest_mode(a[0])}|{_trigger(a[0])}{'|rh' if a[2] else ''})"
    ),
    L.TP_INJ_VIRQ: lambda t, i, a: f"IRQ 0x{a[0]:x}",
    L.TP_APICV_INHIBIT_CHANGED: lambda t, i, a: _inhibit_text(*a[:3]),
    L.TP_AVIC_INCOMPLETE_IPI: lambda t, i, a: (
        f"vcpu={i}, icrh:icrl=0x{a[0] >> 32:08x}:{a[0] & 0xFFFF_FFFF:08x}, id={a[1]}, index={a[2]}"
    ),
    L.TP_AVIC_DOORBELL: lambda t, i, a: f"vcpuid={a[0]}, apicid={a[1]}",
    L.TP_AVIC_KICK_VCPU_SLOWPATH: lambda t, i, a: (
        f"icrh:icrl=0x{a[0] >> 32:06x}:{a[0] & 0xFFFF_FFFF:08x}, index={a[1]}"
    ),
}
