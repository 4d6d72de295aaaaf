"""Events whose fields are printed in place of KVM's text, turned into that text.

``trace-cmd report -R``, ftrace's ``fields`` option, perf trace and scripts of bpftrace print the fields of an event's
record, each in its own way: ``icr_low=253``, ``icr_low=0xfd (253)``, ``icr_low: 253``, ``icr_low=fd``. What the numbers
mean is the same; tracepoints/text.py has the text that KVM prints for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from fastexit import layout as L
from fastexit import regs as R
from fastexit.tracepoints.names import exception_text, user_text
from fastexit.tracepoints.releases import numbers
from fastexit.tracepoints.text import Source, formats, text

Fields = Mapping[str, int]

_RELEASE = numbers("6.12.0")
"""Whose texts are written: those with the most fields that are in all records."""
_U64 = (1 << 64) - 1
_FAILED = b"[FAILED TO PARSE]"

_FIELD = re.compile(
    rb"(\w+)(?:=|: ?)(?:0x([0-9a-fA-F]+)(?: \(-?\d+\))?|(?:'.'|\S*?)?\((-?\d+)\)|(-?[0-9a-fA-F]+))(?=[\s,)]|$)",
    re.DOTALL,
)
_BEGINS = re.compile(rb"(?:\[FAILED TO PARSE\] *)?\w+=\S")
_LETTERS = re.compile(rb"(?<=[=])(?!0x)[0-9a-f]*[a-f][0-9a-f]*(?=\s|$)")
_HEX = {"ecx", "apicid", "dest_id", "error_code"}
"""Fields that KVM's text has in hexadecimal without 0x, and so trace-cmd report -R."""
_ALIASES = {"dest": "dest_id", "dst": "dest_id", "msr": "ecx", "index": "ecx", "value": "data", "icr": "icr_low"}
"""What scripts call fields."""


def in_fields(payload: bytes) -> bool:
    """True where an event's text is a list of ``name=value``."""
    return _BEGINS.match(payload) is not None


def in_hex(lines: bytes) -> bool:
    """True where numbers without 0x have letters: a script printed all of them in hexadecimal, as none of KVM's do."""
    return any(b"icr" in lines[found.start() - 12 : found.start()] for found in _LETTERS.finditer(lines))


def told(name: bytes, payload: bytes, *, decimal: bool = False, hexadecimal: bool = False) -> bytes | None:
    """The body of an event from its fields; None where it is not known or a field that it needs is missing.

    Numbers without 0x are ``decimal``, ``hexadecimal``, or else as KVM's own text has the field. perf trace, which is
    ``decimal``, leaves out fields that are 0.
    """
    make = _MAKERS.get(name)
    if make is None:
        return None
    fields: dict[str, int] = _Zeros() if decimal else {}
    for field, prefixed, bracketed, bare in _FIELD.findall(payload.replace(_FAILED, b"")):
        key = field.decode()
        radix = 16 if hexadecimal or not decimal and (key in _HEX and name != b"kvm_inj_exception") else 10
        try:
            value = int(prefixed, 16) if prefixed else int(bracketed) if bracketed else int(bare, radix)
        except ValueError:
            return None
        if abs(value) > _U64:
            return None
        fields[key] = value
    for alias, key in _ALIASES.items():
        if alias in fields and key not in fields:
            fields[key] = fields[alias]
    try:
        said = make(fields)
    except KeyError:
        return None
    return said.encode() if said else None


class _Zeros(dict[str, int]):
    """Fields of which those that are 0 are left out."""

    def __missing__(self, key: str) -> int:
        if not self:
            raise KeyError(key)
        return 0


def _say(event: int, vcpu: int, *words: int, svm: bool = False) -> str | None:
    template = formats(_RELEASE).get(event)
    if template is None:
        return None
    source = Source(_RELEASE, svm, lambda vcpu: 0)
    return text(template, source, event, vcpu, [*(word & _U64 for word in words), 0, 0, 0, 0, 0, 0, 0])


def _ipi(f: Fields) -> str | None:
    return _say(L.TP_APIC_IPI, 0, f["icr_low"], f["dest_id"])


def _accept_word(f: Fields) -> int:
    return f["vec"] & 0xFF | f["dm"] & R.ICR_DM | (R.ICR_TRIGGER if f["tm"] else 0)


def _accept(f: Fields) -> str | None:
    return _say(L.TP_ACCEPT_IRQ, 0, f["apicid"], _accept_word(f))


def _apicv_accept(f: Fields) -> str | None:
    return _say(L.TP_APICV_ACCEPT_IRQ, 0, f["apicid"], _accept_word(f))


def _apic(f: Fields) -> str | None:
    return _say(L.TP_APIC_WRITE if f["rw"] else L.TP_APIC_READ, 0, f["reg"], f["val"])


def _msr(f: Fields) -> str | None:
    return _say(L.TP_MSR_WRITE if f["write"] else L.TP_MSR_READ, 0, f["ecx"], f["data"], f.get("exception", 0))


def _eoi(f: Fields) -> str | None:
    return _say(L.TP_EOI, f["apicid"], L.NONE if f["vector"] < 0 else f["vector"])


def _pv_eoi(f: Fields) -> str | None:
    return _say(L.TP_PV_EOI, f["apicid"], L.NONE if f["vector"] < 0 else f["vector"])


_VMX, _SVM = 1, 2


def _exit(f: Fields) -> str | None:
    svm = f.get("isa", _VMX) == _SVM
    words = (f["exit_reason"], f.get("guest_rip", 0), f.get("info1", 0), f.get("info2", 0))
    return _say(L.TP_EXIT, f.get("vcpu_id", 0), *words, f.get("intr_info", 0), f.get("error_code", 0), svm=svm)


def _entry(f: Fields) -> str | None:
    return _say(L.TP_ENTRY, f["vcpu_id"], f.get("rip", 0))


def _virq(f: Fields) -> str | None:
    number = f["irq"] if "irq" in f else f["vector"]
    return _say(L.TP_INJ_VIRQ, 0, number, f.get("soft", 0), f.get("reinjected", 0))


def _exception(f: Fields) -> str:
    error = f" (0x{f['error_code']:x})" if f["has_error"] else ""
    again = " [reinjected]" if f.get("reinjected", 0) else ""
    return f"kvm_inj_exception: {exception_text(f['exception'], _RELEASE)}{error}{again}"


def _set_irq(f: Fields) -> str | None:
    return _say(L.TP_SET_IRQ, 0, f["gsi"], f["level"], f["irq_source_id"])


def _ioapic(f: Fields) -> str | None:
    return _say(L.TP_IOAPIC_SET_IRQ, 0, f["e"], f["pin"], f["coalesced"])


def _msi(f: Fields) -> str | None:
    address, data = f["address"], f["data"]
    dest = address >> 12 & 0xFF | address >> 32 & 0xFFFF_FF00
    word = data & (R.ICR_VECTOR | R.ICR_DM | R.ICR_TRIGGER) | (R.ICR_LOGICAL if address & 4 else 0)
    return _say(L.TP_MSI_SET_IRQ, 0, word, dest, address >> 3 & 1)


def _pic(f: Fields) -> str | None:
    place = (f["chip"] & 0xFF) << 8 | f["pin"] & 7 | (L.TRACE_COALESCED if f["coalesced"] else 0)
    return _say(L.TP_PIC_SET_IRQ, 0, place, f["elcr"], f["imr"])


def _ack(f: Fields) -> str | None:
    return _say(L.TP_ACK_IRQ, 0, f["irqchip"], f["pin"])


def _pio(f: Fields) -> str | None:
    way = L.TRACE_PIO_WRITE if f["rw"] else 0
    return _say(L.TP_PIO, 0, way | f["port"] & 0xFFFF, f["size"] & 0xFF | f["count"] << 8, f.get("val", 0))


def _mmio(f: Fields) -> str:
    way = ("unsatisfied-read", "read", "write")[min(f["type"] & 3, 2)]
    return f"kvm_mmio: mmio {way} len {f['len']} gpa 0x{f['gpa']:x} val 0x{f['val']:x}"


def _userspace(f: Fields) -> str:
    if f["errno"] < 0:
        return f"kvm_userspace_exit: reason {'restart' if f['errno'] == -4 else 'error'} ({-f['errno']})"
    return f"kvm_userspace_exit: reason {user_text(f['reason'], _RELEASE)} ({f['reason']})"


def _hypercall(f: Fields) -> str | None:
    return _say(L.TP_HYPERCALL, 0, f["nr"], f["a0"], f["a1"], f["a2"], f["a3"], 1)


def _hv_timer(f: Fields) -> str | None:
    return _say(L.TP_HV_TIMER_STATE, f["vcpu_id"], f["hv_timer_in_use"])


def _cr(f: Fields) -> str:
    return f"kvm_cr: cr_{'write' if f['rw'] else 'read'} {f['cr']:x} = 0x{f['val']:x}"


def _fpu(f: Fields) -> str:
    return f"kvm_fpu: {'load' if f['load'] else 'unload'}"


def _wakeup(f: Fields) -> str:
    waited = "wait" if f["waited"] else "poll"
    return f"kvm_vcpu_wakeup: {waited} time {f['ns']} ns, polling {'valid' if f['valid'] else 'invalid'}"


def _page_fault(f: Fields) -> str:
    rip, address = f["guest_rip"], f["fault_address"]
    return (
        f"kvm_page_fault: vcpu {f['vcpu_id']} rip 0x{rip:x} address 0x{address:016x} error_code 0x{f['error_code']:x}"
    )


def _inhibit(f: Fields) -> str:
    change = "set" if f["set"] else "cleared"
    return f"kvm_apicv_inhibit_changed: {change} reason={f['reason']}, inhibits=0x{f['inhibits']:x}"


_MAKERS: dict[bytes, Callable[[Fields], str | None]] = {
    b"kvm_apic_ipi": _ipi,
    b"kvm_apic_accept_irq": _accept,
    b"kvm_apicv_accept_irq": _apicv_accept,
    b"kvm_apic": _apic,
    b"kvm_msr": _msr,
    b"kvm_eoi": _eoi,
    b"kvm_pv_eoi": _pv_eoi,
    b"kvm_exit": _exit,
    b"kvm_entry": _entry,
    b"kvm_inj_virq": _virq,
    b"kvm_inj_exception": _exception,
    b"kvm_set_irq": _set_irq,
    b"kvm_ioapic_set_irq": _ioapic,
    b"kvm_msi_set_irq": _msi,
    b"kvm_pic_set_irq": _pic,
    b"kvm_ack_irq": _ack,
    b"kvm_pio": _pio,
    b"kvm_mmio": _mmio,
    b"kvm_userspace_exit": _userspace,
    b"kvm_hypercall": _hypercall,
    b"kvm_hv_timer_state": _hv_timer,
    b"kvm_cr": _cr,
    b"kvm_fpu": _fpu,
    b"kvm_vcpu_wakeup": _wakeup,
    b"kvm_page_fault": _page_fault,
    b"kvm_apicv_inhibit_changed": _inhibit,
}
