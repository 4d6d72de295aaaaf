"""Threads and names of a trace, by the bytes that lines have for them: what the scanner asks Python, once for each."""

from __future__ import annotations

import re

from fastexit import regs as R
from fastexit.records.block import Kind
from fastexit.records.columns import Event, Thread
from fastexit.trace.threadnames import vcpu_in

MOST_NAMES = 1 << 16
"""Names beyond are -1: honest traces have some hundred."""
MOST_THREADS = 1 << 18
"""Lines of threads beyond have none."""

_FTRACE = re.compile(rb"[ \t]*(?P<comm>.*)-(?P<pid>\d+)[ \t]*(?:\( *(?P<tgid>\d+|-+)\))?[ \t]*", re.DOTALL)
_PERF = re.compile(rb"[ \t]*(?P<comm>.*)[ \t](?:(?P<tgid>\d+)/)?(?P<pid>\d+)[ \t]*", re.DOTALL)
_HIGHEST_PID = 0x7FFF_FFFF

KINDS: dict[bytes, tuple[Kind, Event]] = {
    b"kvm_exit": (Kind.EXIT, Event.EXIT),
    b"kvm_entry": (Kind.ENTRY, Event.ENTRY),
    b"kvm_msr": (Kind.MSR, Event.MSR),
    b"kvm_apic": (Kind.APIC, Event.APIC),
    b"kvm_apic_ipi": (Kind.IPI, Event.APIC_IPI),
    b"kvm_apic_accept_irq": (Kind.ACCEPT, Event.ACCEPT),
    b"kvm_apicv_accept_irq": (Kind.ACCEPT, Event.APICV_ACCEPT),
    b"kvm_eoi": (Kind.EOI, Event.EOI),
    b"kvm_pv_eoi": (Kind.EOI, Event.PV_EOI),
    b"kvm_inj_virq": (Kind.INJ_VIRQ, Event.INJ_VIRQ),
    b"kvm_inj_exception": (Kind.INJ_EXCEPTION, Event.INJ_EXCEPTION),
    b"kvm_set_irq": (Kind.SET_IRQ, Event.SET_IRQ),
    b"kvm_ioapic_set_irq": (Kind.IOAPIC, Event.IOAPIC_SET_IRQ),
    b"kvm_ioapic_delayed_eoi_inj": (Kind.DELAYED_EOI, Event.IOAPIC_SET_IRQ),
    b"kvm_msi_set_irq": (Kind.MSI, Event.MSI_SET_IRQ),
    b"kvm_pic_set_irq": (Kind.PIC, Event.PIC_SET_IRQ),
    b"kvm_ack_irq": (Kind.ACK, Event.ACK_IRQ),
    b"kvm_pio": (Kind.PIO, Event.PIO),
    b"kvm_mmio": (Kind.MMIO, Event.MMIO),
    b"kvm_fast_mmio": (Kind.FAST_MMIO, Event.MMIO),
    b"kvm_hypercall": (Kind.HYPERCALL, Event.HYPERCALL),
    b"kvm_hv_hypercall": (Kind.HV_HYPERCALL, Event.HV_HYPERCALL),
    b"kvm_hv_send_ipi": (Kind.HV_SEND_IPI, Event.HV_SEND_IPI),
    b"kvm_hv_send_ipi_ex": (Kind.HV_SEND_IPI, Event.HV_SEND_IPI),
    b"kvm_apicv_inhibit_changed": (Kind.INHIBIT, Event.APICV_INHIBIT),
    b"kvm_apicv_update_request": (Kind.INHIBIT_REQUEST, Event.APICV_INHIBIT),
    b"kvm_nested_vmexit": (Kind.NESTED_VMEXIT, Event.NESTED_VMEXIT),
    b"kvm_nested_vmexit_inject": (Kind.NESTED_INJECT, Event.NESTED_VMEXIT),
    b"kvm_nested_intercepts": (Kind.NESTED_INTERCEPTS, Event.NESTED_VMEXIT),
    b"kvm_nested_intr_vmexit": (Kind.NESTED_INTR, Event.NESTED_VMEXIT),
    b"kvm_nested_vmenter": (Kind.NAMED, Event.NESTED_ENTRY),
    b"kvm_nested_vmrun": (Kind.NAMED, Event.NESTED_ENTRY),
    b"kvm_userspace_exit": (Kind.USERSPACE, Event.USERSPACE_EXIT),
    b"kvm_vcpu_wakeup": (Kind.WAKEUP, Event.WAKEUP),
    b"kvm_halt_poll_ns": (Kind.HALT_POLL, Event.HALT_POLL),
    b"kvm_page_fault": (Kind.PAGE_FAULT, Event.PAGE_FAULT),
    b"kvm_cpuid": (Kind.CPUID, Event.CPUID),
    b"kvm_cr": (Kind.CR, Event.CR),
    b"kvm_avic_incomplete_ipi": (Kind.INCOMPLETE_IPI, Event.AVIC),
    b"kvm_avic_unaccelerated_access": (Kind.UNACCELERATED, Event.AVIC),
    b"kvm_avic_doorbell": (Kind.DOORBELL, Event.AVIC),
    b"kvm_hv_timer_state": (Kind.HV_TIMER, Event.HV_TIMER),
    b"kvm_pi_irte_update": (Kind.PI_IRTE, Event.PI_IRTE),
    b"kvm_smm_transition": (Kind.SMM, Event.SMM),
    b"kvm_enter_smm": (Kind.SMM, Event.SMM),
    b"sched_switch": (Kind.SWITCH, Event.SCHED_SWITCH),
}
_FAMILIES = (
    (b"kvm_hv_", Kind.KVM, Event.HV),
    (b"kvm_avic_", Kind.KVM, Event.AVIC),
    (b"kvm_nmi", Kind.KVM, Event.NMI),
    (b"kvm_", Kind.KVM, Event.OTHER_KVM),
)
REGISTERS: dict[bytes, int] = {name.encode(): offset for offset, name in R.REGISTER_NAMES.items()}


def kind_of(name: bytes) -> tuple[Kind, Event]:
    """How the text of an event is read, and what it is in a row."""
    known = KINDS.get(name)
    if known is None:
        known = next((found[1:] for found in _FAMILIES if name.startswith(found[0])), (Kind.OTHER, Event.OTHER))
    return known


class Words:
    """Threads and names by number, each told once."""

    def __init__(self) -> None:
        self.threads: list[Thread] = []
        self.names: list[str] = []
        self.vcpu_of: list[int] = []
        self.too_many: bool = False
        """More names than are kept, or more threads."""
        self._by_pid: dict[int, int] = {}
        self._by_name: dict[bytes, int] = {}

    def name(self, text: bytes) -> int:
        """The number of a name; -1 for one too many."""
        number = self._by_name.get(text)
        if number is None:
            if len(self.names) >= MOST_NAMES:
                self.too_many = True
                return -1
            number = self._by_name[text] = len(self.names)
            self.names.append(text.decode("utf-8", "replace"))
        return number

    def thread(self, head: bytes) -> int | None:
        """The number of the thread that a line begins with, -1 for one too many, or None where nothing says one.

        A thread has one number, whatever a trace calls it: "<...>" until its name is known, the name of its process
        until it has its own.
        """
        found = _FTRACE.fullmatch(head) or _PERF.fullmatch(head)
        if found is None or b"\0" in head:
            return None
        pid, told = int(found["pid"]), found["tgid"] or b"-"
        tgid = -1 if told.startswith(b"-") else int(told)
        if max(pid, tgid) > _HIGHEST_PID:
            return None
        comm = found["comm"].strip(b" \t").decode("utf-8", "replace")
        number = self._by_pid.get(pid)
        if number is None:
            if len(self.threads) >= MOST_THREADS:
                self.too_many = True
                return -1
            number = self._by_pid[pid] = len(self.threads)
            self.threads.append(Thread(pid, tgid, comm))
            self.vcpu_of.append(vcpu_in(comm))
            return number
        known = self.threads[number]
        vcpu = vcpu_in(comm)
        if known.comm == "<...>" or vcpu >= 0 > self.vcpu_of[number]:
            known = known._replace(comm=comm)
            self.vcpu_of[number] = vcpu
        if known.tgid < 0:
            known = known._replace(tgid=tgid)
        self.threads[number] = known
        return number
