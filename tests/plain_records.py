"""Lines of a trace as rows, slow and obvious: one regular expression an event. The judge of records.scan.

It reads canonical lines, as ftrace and `perf script` print them, and shares the declarations of records.columns alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from fastexit.records.columns import NO_TIME, RECORD, Event, Flag, Recording, Thread, Unreadable

MAX64 = (1 << 64) - 1
LONGEST_WORD = 64

MODES = {b"Fixed": 0, b"LowPrio": 1, b"SMI": 2, b"Res3": 3, b"NMI": 4, b"INIT": 5, b"SIPI": 6, b"ExtINT": 7}
SHORTHANDS = {b"dst": 0, b"self": 1, b"all": 2, b"all-but-self": 3}
REGISTERS = {
    b"APIC_" + name: offset
    for name, offset in {
        **{b"ID": 0x20, b"LVR": 0x30, b"TASKPRI": 0x80, b"ARBPRI": 0x90, b"PROCPRI": 0xA0, b"EOI": 0xB0},
        **{b"RRR": 0xC0, b"LDR": 0xD0, b"DFR": 0xE0, b"SPIV": 0xF0, b"ISR": 0x100, b"TMR": 0x180, b"IRR": 0x200},
        **{b"ESR": 0x280, b"ICR": 0x300, b"ICR2": 0x310, b"LVTT": 0x320, b"LVTTHMR": 0x330, b"LVTPC": 0x340},
        **{b"LVT0": 0x350, b"LVT1": 0x360, b"LVTERR": 0x370, b"TMICT": 0x380, b"TMCCT": 0x390, b"TDCR": 0x3E0},
        **{b"SELF_IPI": 0x3F0, b"EFEAT": 0x400, b"ECTRL": 0x410},
    }.items()
}

HEAD = re.compile(
    rb"\[(?P<cpu>\d+)\][ \t]*(?:(?P<flags>[!-9;-Z\\^-~]{4,8})[ \t]+)?"
    rb"(?P<seconds>\d+)\.(?P<fraction>\d{1,9}):[ \t]+(?P<body>[^ \t].*)",
    re.DOTALL,
)
HIGHEST_CPU, HIGHEST_SECONDS = 0x7FFF, 9_223_372_035
FTRACE = re.compile(rb"[ \t]*(?P<comm>.*)-(?P<pid>\d+)[ \t]*(?:\( *(?P<tgid>\d+|-+)\))?[ \t]*", re.DOTALL)
PERF = re.compile(rb"[ \t]*(?P<comm>.*)[ \t](?:(?P<tgid>\d+)/)?(?P<pid>\d+)[ \t]*", re.DOTALL)
REASON = re.compile(rb"([^\x00-\x20]+(?:[ \t]+(?!rip[ \t])[^\x00-\x20]+)*?)(?:[ \t]+(rip[ \t].*)|[ \t\r]*)", re.DOTALL)
NAMED = re.compile(rb"(?:[A-Za-z_]\w*:)?(?P<name>[A-Za-z_]\w*)(?=:(?!\w))", re.ASCII)
VCPU_NAMES = (
    re.compile(r"CPU (\d+)/KVM"),
    re.compile(r"(?:.*[^A-Za-z0-9])?vcpu[ _:#-]?(\d+)", re.IGNORECASE),
)


class Refused(Exception):
    """The line cannot be read."""


def pattern(text: str) -> re.Pattern[bytes]:
    """``%x`` hex, ``%d`` decimal, ``%s`` with a sign, ``%w`` a word, ``%$`` the end, a blank any number."""
    for short, long in {
        " ": r"[\t ]+",
        "%x": r"(?:0x)?([0-9a-fA-F]+)(?![0-9A-Za-z_])",
        "%d": r"([0-9]+)(?![0-9A-Za-z_])",
        "%s": r"(-?[0-9]+)(?![0-9A-Za-z_])",
        "%w": r"([^\x00-\x20]+)",
        "%$": r"[\t\x20\r]*\Z",
    }.items():
        text = text.replace(short, long)
    return re.compile(text.encode(), re.DOTALL)


def number(text: bytes, base: int) -> int:
    value = int(text, base)
    if value > MAX64:
        raise Refused
    return value


def hexa(text: bytes | None) -> int:
    return number(text, 16) if text is not None else 0


def deci(text: bytes | None) -> int:
    return number(text, 10) if text is not None else 0


def signed(text: bytes) -> int:
    value = int(text)
    if not -(1 << 63) <= value <= MAX64:
        raise Refused
    return value & MAX64


def small(value: int) -> int:
    """A vCPU's number, which has to fit its column."""
    if value > 0x7FFF:
        raise Refused
    return value


def vector(text: bytes, base: int = 10) -> int:
    value = number(text, base)
    if value > 0xFF:
        raise Refused
    return value


def word32(text: bytes | None) -> int:
    value = hexa(text)
    if value >> 32:
        raise Refused
    return value


def mode(text: bytes) -> int:
    if text not in MODES:
        raise Refused
    return MODES[text] << 8


def name(text: bytes) -> bytes:
    if len(text) > LONGEST_WORD:
        raise Refused
    return text


Row = dict[str, Any]
READERS: dict[bytes, tuple[Event, list[tuple[re.Pattern[bytes], Callable[..., Row]]]]] = {}


def reads(event: Event, names: str, *texts: str) -> Callable[[Callable[..., Row]], Callable[..., Row]]:
    def declare(function: Callable[..., Row]) -> Callable[..., Row]:
        for each in names.split():
            _, readers = READERS.setdefault(each.encode(), (event, []))
            readers += [(pattern(text), function) for text in texts]
        return function

    return declare


@reads(Event.EXIT, "kvm_exit", r"(?:vcpu %d )?reason (.*)")
def _exit(vcpu: bytes | None, rest: bytes) -> Row:
    row: Row = {"vcpu": small(deci(vcpu)) if vcpu else -1}
    found = REASON.fullmatch(rest)
    if not found:
        raise Refused
    row["name"] = name(found[1])
    if found[2] is None:
        return row
    at = pattern("rip %x(.*)").fullmatch(found[2])
    if not at:
        raise Refused
    row["a"] = hexa(at[1])
    if old := re.match(rb"[ \t]+info[ \t]+(.*)", at[2], re.DOTALL):
        infos = pattern(r"%x(.*)").fullmatch(old[1])
        if not infos:
            raise Refused
        row["b"] = hexa(infos[1])
        if re.match(rb"[ \t]+[0-9a-fA-F]", infos[2]):
            second = pattern(r" %x.*").fullmatch(infos[2])
            if not second:
                raise Refused
            row["c"] = hexa(second[1])
        return row
    rest = at[2]
    values = []
    for word in b"info1", b"info2", b"intr_info", b"error_code":
        label = re.match(rb"[ \t]+" + word + rb"[ \t]+(.*)", rest, re.DOTALL)
        if not label:
            break
        value = pattern("%x(.*)").fullmatch(label[1])
        if not value:
            raise Refused
        values.append(value[1])
        rest = value[2]
    one, two, intr, error = [*values, None, None, None, None][:4]
    return row | {"b": hexa(one), "c": hexa(two), "d": word32(intr) | word32(error) << 32}


@reads(Event.ENTRY, "kvm_entry", r"vcpu %d,? rip %x.*", r"vcpu %d(?!,? rip ).*")
def _entry(vcpu: bytes, rip: bytes | None = None) -> Row:
    return {"vcpu": small(deci(vcpu)), "a": hexa(rip)}


@reads(Event.MSR, "kvm_msr", r"msr_(read|write) %x = %x( \(#GP\))?%$")
def _msr(way: bytes, msr: bytes, value: bytes, fault: bytes | None) -> Row:
    return {"a": hexa(msr), "b": hexa(value), "c": int(way == b"write"), "d": int(fault is not None)}


@reads(Event.APIC, "kvm_apic", r"apic_(read|write) %w = %x%$")
def _apic(way: bytes, register: bytes, value: bytes) -> Row:
    offset = REGISTERS.get(name(register))
    if offset is None:
        bare = re.fullmatch(rb"(?:0x)?([0-9a-fA-F]+)", register)
        if not bare:
            raise Refused
        offset = hexa(bare[1])
    return {"a": offset, "b": hexa(value), "c": int(way == b"write"), "name": register}


@reads(
    Event.APIC_IPI,
    "kvm_apic_ipi",
    r"dst %x vec %d \((\w+)\|(physical|logical)\|(assert|de-assert)\|(edge|level)\|([\w-]+)\)%$",
)
def _ipi(dst: bytes, vec: bytes, dm: bytes, dest: bytes, level: bytes, trigger: bytes, shorthand: bytes) -> Row:
    if shorthand not in SHORTHANDS:
        raise Refused
    low = vector(vec) | mode(dm) | (dest == b"logical") << 11 | (level == b"assert") << 14
    return {"a": hexa(dst), "b": low | (trigger == b"level") << 15 | SHORTHANDS[shorthand] << 18}


@reads(Event.ACCEPT, "kvm_apic_accept_irq", r"apicid %x vec %d \((\w+)\|(edge|level)\)( \(coalesced\))?%$")
@reads(Event.APICV_ACCEPT, "kvm_apicv_accept_irq", r"apicid %x vec %d \((\w+)\|(edge|level)\)( \(coalesced\))?%$")
def _accept(apicid: bytes, vec: bytes, dm: bytes, trigger: bytes, coalesced: bytes | None) -> Row:
    number = small(hexa(apicid))
    how = mode(dm) | (trigger == b"level") << 15
    return {"vcpu": number, "a": number, "b": vector(vec), "c": how, "d": int(coalesced is not None)}


@reads(Event.EOI, "kvm_eoi", r"apicid %x vector %s%$")
@reads(Event.PV_EOI, "kvm_pv_eoi", r"apicid %x vector %s%$")
def _eoi(apicid: bytes, vec: bytes) -> Row:
    number = small(hexa(apicid))
    if not -1 <= int(vec) <= 0xFF:
        raise Refused
    return {"vcpu": number, "a": number, "b": int(vec) & MAX64}


@reads(Event.INJ_VIRQ, "kvm_inj_virq", r"(IRQ|Soft/INTn) %x( \[reinjected\])?%$")
def _inject(kind: bytes, vec: bytes, again: bytes | None) -> Row:
    return {"a": vector(vec, 16), "b": int(kind != b"IRQ"), "c": int(again is not None)}


@reads(Event.INJ_VIRQ, "kvm_inj_virq", r"irq %d%$")
def _inject_old(vec: bytes) -> Row:
    return {"a": vector(vec)}


@reads(Event.INJ_EXCEPTION, "kvm_inj_exception", r"%w(?: \(%x\))?( \[reinjected\])?%$")
def _exception(exception: bytes, code: bytes | None, again: bytes | None) -> Row:
    return {"name": name(exception), "a": hexa(code), "c": int(again is not None)}


@reads(Event.SET_IRQ, "kvm_set_irq", r"gsi %d level %s source %d%$")
def _set_irq(gsi: bytes, level: bytes, source: bytes) -> Row:
    return {"a": deci(gsi), "b": signed(level), "c": deci(source)}


@reads(
    Event.IOAPIC_SET_IRQ,
    "kvm_ioapic_set_irq",
    r"pin %d dst %x vec %d \((\w+)\|(?:physical|logical)\|(?:edge|level)(?:\|masked)?\)( \(coalesced\))?%$",
)
def _ioapic(pin: bytes, dst: bytes, vec: bytes, dm: bytes, coalesced: bytes | None) -> Row:
    mode(dm)
    return {"a": deci(pin), "b": vector(vec), "c": hexa(dst), "d": int(coalesced is not None), "name": True}


@reads(
    Event.IOAPIC_SET_IRQ,
    "kvm_ioapic_delayed_eoi_inj",
    r"dst %x vec %d \((\w+)\|(?:physical|logical)\|(?:edge|level)(?:\|masked)?\)%$",
)
def _delayed(dst: bytes, vec: bytes, dm: bytes) -> Row:
    mode(dm)
    return {"a": MAX64, "b": vector(vec), "c": hexa(dst), "name": True}


@reads(
    Event.MSI_SET_IRQ, "kvm_msi_set_irq", r"dst %x vec %d \((\w+)\|(?:physical|logical)\|(?:edge|level)(?:\|rh)?\)%$"
)
def _msi(dst: bytes, vec: bytes, dm: bytes) -> Row:
    mode(dm)
    return {"a": hexa(dst), "b": vector(vec)}


@reads(Event.PIC_SET_IRQ, "kvm_pic_set_irq", r"chip %d pin %d \((?:edge|level)(\|masked)?\)( \(coalesced\))?%$")
def _pic(chip: bytes, pin: bytes, masked: bytes | None, coalesced: bytes | None) -> Row:
    if deci(chip) > 1 or deci(pin) > 7:
        raise Refused
    return {"a": deci(chip) << 3 | deci(pin), "c": int(masked is not None), "d": int(coalesced is not None)}


@reads(Event.ACK_IRQ, "kvm_ack_irq", r"irqchip (PIC master|PIC slave|[^\x00-\x20]+) pin %d%$")
def _ack(chip: bytes, pin: bytes) -> Row:
    return {"name": name(chip), "a": deci(pin)}


@reads(Event.PIO, "kvm_pio", r"pio_(read|write) at %x size %d count %d(?: val %x)?(?: \(\.\.\.\))?%$")
def _pio(way: bytes, port: bytes, size: bytes, count: bytes, value: bytes | None) -> Row:
    deci(count)
    return {"a": hexa(port), "b": hexa(value), "c": int(way == b"write"), "d": deci(size)}


@reads(Event.MMIO, "kvm_mmio", r"mmio (unsatisfied-read|read|write) len %d gpa %x val %x%$")
def _mmio(way: bytes, length: bytes, gpa: bytes, value: bytes) -> Row:
    return {"a": hexa(gpa), "b": hexa(value), "c": int(way == b"write"), "d": deci(length)}


@reads(Event.MMIO, "kvm_fast_mmio", r"fast mmio at gpa %x%$")
def _fast_mmio(gpa: bytes) -> Row:
    return {"a": hexa(gpa), "c": 1}


@reads(Event.HYPERCALL, "kvm_hypercall", r"nr %x a0 %x a1 %x a2 %x a3 %x%$")
def _hypercall(nr: bytes, a0: bytes, a1: bytes, a2: bytes, a3: bytes) -> Row:
    hexa(a3)
    return {"a": hexa(nr), "b": hexa(a0), "c": hexa(a1), "d": hexa(a2)}


@reads(
    Event.HV_HYPERCALL,
    "kvm_hv_hypercall",
    r"code %x (fast|slow) var_cnt %x rep_cnt %x idx %x in %x out %x%$",
)
def _hv_hypercall(code: bytes, way: bytes, var: bytes, count: bytes, index: bytes, given: bytes, out: bytes) -> Row:
    _ = hexa(var), hexa(count), hexa(index)
    return {"a": hexa(code), "b": hexa(given), "c": hexa(out), "d": int(way == b"fast")}


@reads(Event.HV_HYPERCALL, "kvm_hv_hypercall", r"code %x (fast|slow) cnt %x idx %x in %x out %x%$")
def _hv_hypercall_old(code: bytes, way: bytes, count: bytes, index: bytes, given: bytes, out: bytes) -> Row:
    return _hv_hypercall(code, way, b"0", count, index, given, out)


@reads(Event.HV_SEND_IPI, "kvm_hv_send_ipi kvm_hv_send_ipi_ex", r"vector %x processor_mask %x%$")
def _hv_send(vec: bytes, mask: bytes) -> Row:
    return {"a": hexa(vec), "b": hexa(mask), "name": True}


@reads(Event.HV_SEND_IPI, "kvm_hv_send_ipi kvm_hv_send_ipi_ex", r"vector %x format %x valid_bank_mask %x%$")
def _hv_send_ex(vec: bytes, form: bytes, mask: bytes) -> Row:
    return {"a": hexa(vec), "b": hexa(mask), "c": hexa(form), "name": True}


@reads(Event.APICV_INHIBIT, "kvm_apicv_inhibit_changed", r"(set|cleared) reason=%d, inhibits=%x.*")
def _inhibit(what: bytes, reason: bytes, inhibits: bytes) -> Row:
    deci(reason)
    return {"a": int(what == b"set"), "b": hexa(inhibits), "name": name(reason)}


@reads(Event.APICV_INHIBIT, "kvm_apicv_update_request", r"(activate|deactivate) bit=%d%$")
def _request(what: bytes, bit: bytes) -> Row:
    if deci(bit) > 63:
        raise Refused
    off = what == b"deactivate"
    return {"a": int(off), "b": off << deci(bit), "d": 1, "name": name(bit)}


NESTED = "kvm_nested_vmexit kvm_nested_vmexit_inject kvm_nested_intercepts kvm_nested_intr_vmexit".split()


def _nested(body: bytes) -> Row:
    reason = re.search(rb"(?<![A-Za-z0-9_])reason:?[ \t]+([^\x00-\x20]+)", body)
    return {"vcpu": named_vcpu(body), "name": name(reason[1]) if reason else -1}


for _number, _name in enumerate(NESTED):
    reads(Event.NESTED_VMEXIT, _name, r"(.*)")(lambda body, n=_number: _nested(body) | {"c": n})


@reads(Event.NESTED_ENTRY, "kvm_nested_vmenter kvm_nested_vmrun", r".*")
def _nested_entry() -> Row:
    return {"name": True}


@reads(Event.USERSPACE_EXIT, "kvm_userspace_exit", r"reason %w(?: \(%s\))?%$")
def _userspace(reason: bytes, code: bytes | None) -> Row:
    if code is not None:
        signed(code)
    return {"name": name(reason)}


@reads(Event.WAKEUP, "kvm_vcpu_wakeup", r"(wait|poll) time %d ns(?:, polling (valid|invalid))?%$")
def _wakeup(what: bytes, ns: bytes, valid: bytes | None) -> Row:
    return {"a": deci(ns), "b": int(what == b"wait"), "c": int(valid == b"valid")}


@reads(Event.HALT_POLL, "kvm_halt_poll_ns", r"vcpu %d: halt_poll_ns %d \((grow|shrink) %d\)%$")
def _halt_poll(vcpu: bytes, new: bytes, what: bytes, old: bytes) -> Row:
    return {"vcpu": small(deci(vcpu)), "a": deci(new), "b": deci(old), "c": int(what == b"grow")}


@reads(Event.PAGE_FAULT, "kvm_page_fault", r"(?:vcpu %d rip %x )?address %x error_code %x%$")
def _page_fault(vcpu: bytes | None, rip: bytes | None, gpa: bytes, code: bytes) -> Row:
    hexa(rip)
    return {"vcpu": small(deci(vcpu)) if vcpu else -1, "a": hexa(gpa), "b": hexa(code)}


@reads(Event.CPUID, "kvm_cpuid", r"func %x idx %x.*", r"func %x(?! idx ).*")
def _cpuid(leaf: bytes, subleaf: bytes | None = None) -> Row:
    return {"a": hexa(leaf), "b": hexa(subleaf)}


@reads(Event.CR, "kvm_cr", r"cr_(read|write) %x = %x%$")
def _cr(way: bytes, register: bytes, value: bytes) -> Row:
    return {"a": hexa(register), "b": hexa(value), "c": int(way == b"write")}


@reads(Event.AVIC, "kvm_avic_incomplete_ipi", r"vcpu=%d, icrh:icrl=%x:%x, id=%d, index=%d%$")
def _incomplete(vcpu: bytes, high: bytes, low: bytes, why: bytes, index: bytes) -> Row:
    deci(index)
    return {"vcpu": small(deci(vcpu)), "a": word32(high) << 32 | word32(low), "b": deci(why), "name": True}


@reads(
    Event.AVIC,
    "kvm_avic_unaccelerated_access",
    r"vcpu=%d, offset=%x\([^\x00-\x20)]*\), (?:trap|fault), (read|write), vec=%x%$",
)
def _unaccelerated(vcpu: bytes, offset: bytes, way: bytes, vec: bytes) -> Row:
    return {
        "vcpu": small(deci(vcpu)),
        "a": hexa(offset),
        "b": hexa(vec),
        "c": int(way == b"write"),
        "name": True,
    }


@reads(Event.AVIC, "kvm_avic_doorbell", r"vcpuid=%d, apicid=%d%$")
def _doorbell(vcpu: bytes, apicid: bytes) -> Row:
    return {"vcpu": small(deci(vcpu)), "a": deci(apicid), "name": True}


@reads(Event.HV_TIMER, "kvm_hv_timer_state", r"vcpu_id %x hv_timer %x%$")
def _hv_timer(vcpu: bytes, used: bytes) -> Row:
    return {"vcpu": small(hexa(vcpu)), "a": hexa(used)}


@reads(
    Event.PI_IRTE,
    "kvm_pi_irte_update",
    r"(?:VT-d )?PI is (enabled and being updated|disabled) for irq %d, vcpu %s, gsi: %x, gvec: %x"
    r"(?:, pi_desc_addr: %x)?%$",
)
def _irte(what: bytes, irq: bytes, vcpu: bytes, gsi: bytes, vec: bytes, descriptor: bytes | None) -> Row:
    hexa(descriptor)
    target = signed(vcpu)
    row = {"vcpu": -1 if target == MAX64 else small(target), "a": hexa(gsi), "b": vector(vec, 16), "d": deci(irq)}
    return row | {"c": int(what != b"disabled")}


@reads(Event.SMM, "kvm_smm_transition kvm_enter_smm", r"vcpu %d: (entering|leaving) SMM, smbase %x%$")
def _smm(vcpu: bytes, what: bytes, smbase: bytes) -> Row:
    hexa(smbase)
    return {"vcpu": small(deci(vcpu)), "a": int(what == b"entering")}


@reads(
    Event.SCHED_SWITCH,
    "sched_switch",
    r"prev_comm=.* prev_pid=%d prev_prio=%s prev_state=%w ==> next_comm=.* next_pid=%d next_prio=%s%$",
    r".*:%d \[%s\] %w ==> .*:%d \[%s\]%$",
)
def _switch(before: bytes, prio: bytes, state: bytes, after: bytes, next_prio: bytes) -> Row:
    _ = signed(prio), signed(next_prio)
    return {"a": deci(before), "b": deci(after), "c": int(state.startswith(b"R"))}


def named_vcpu(body: bytes) -> int:
    """The vCPU that a text begins with, as far as it does."""
    found = re.match(rb"vcpu(?:_id)?(?:[ \t]+|=)([0-9]+)(?![0-9A-Za-z_])", body)
    return int(found[1]) if found and int(found[1]) <= 0x7FFF else -1


def read_body(body: bytes) -> tuple[Event, Row]:
    found = NAMED.match(body)
    if b"\0" in body or b": kvm_" in body[found.end() if found else 0 :]:
        raise Refused
    if not found:
        if b" kvm_" in body:
            raise Refused
        return Event.OTHER, {}
    event = name(found["name"])
    payload = body[found.end() + 1 :].lstrip(b" \t")
    if event in READERS:
        kind, readers = READERS[event]
        for text, make in readers:
            if match := text.fullmatch(payload):
                row = make(*match.groups())
                return kind, row | {"name": event if row.get("name") is True else row.get("name", -1)}
        raise Refused
    if event.startswith(b"kvm_hv_"):
        return Event.HV, {"name": event, "vcpu": named_vcpu(payload)}
    if event.startswith(b"kvm_avic_"):
        return Event.AVIC, {"name": event, "vcpu": named_vcpu(payload)}
    if event.startswith(b"kvm_nmi"):
        return Event.NMI, {"name": event, "vcpu": named_vcpu(payload)}
    if event.startswith(b"kvm_"):
        return Event.OTHER_KVM, {"name": event, "vcpu": named_vcpu(payload)}
    return Event.OTHER, {"name": event}


def read_flags(text: bytes | None) -> int:
    if text is None:
        return 0
    flags = Flag.TOLD | (Flag.IRQS_OFF if text[:1] in b"dD" else 0) | (Flag.NEED_RESCHED if text[1:2] != b"." else 0)
    return flags | (Flag.HARDIRQ if set(text[2:]) & set(b"hHsZz") else 0)


class Plain:
    """Reads lines into a Recording."""

    def __init__(self) -> None:
        self.recording = Recording("-", [])
        self.rows: list[dict[str, Any]] = []
        self.names: dict[bytes, int] = {}
        self.threads: dict[int, int] = {}

    def name(self, text: bytes) -> int:
        if text not in self.names:
            self.names[text] = len(self.names)
            self.recording.names.append(text.decode("utf-8", "replace"))
        return self.names[text]

    def thread(self, who: bytes) -> int:
        found = FTRACE.fullmatch(who) or PERF.fullmatch(who)
        if not found or len(who) > 200 or b"\0" in who:
            raise Refused
        pid, tgid = int(found["pid"]), found["tgid"] or b"-"
        process = -1 if tgid.startswith(b"-") else int(tgid)
        if max(pid, process) >> 31:
            raise Refused
        comm = found["comm"].strip(b" \t").decode("utf-8", "replace")
        threads = self.recording.threads
        if pid not in self.threads:
            self.threads[pid] = len(threads)
            threads.append(Thread(pid, process, comm))
            self.recording.vcpu_of.append(vcpu_in(comm))
        at = self.threads[pid]
        known = threads[at]
        named = known.comm
        if known.comm == "<...>" or (vcpu_in(comm) >= 0 > vcpu_in(known.comm)):
            named = comm
        threads[at] = Thread(pid, known.tgid if known.tgid >= 0 else process, named)
        self.recording.vcpu_of[at] = vcpu_in(named)
        return at

    def line(self, number: int, line: bytes) -> None:
        try:
            self.rows.append(self._row(number, line))
        except Refused:
            self.recording.unreadable_count += 1
            self.recording.unreadable.append(Unreadable(number, line[:80].decode("utf-8", "replace")))

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        for bracket in re.finditer(rb"(?<=[ \t])\[", line):
            head = HEAD.fullmatch(line, bracket.start())
            if head and int(head["cpu"]) <= HIGHEST_CPU and int(head["seconds"]) <= HIGHEST_SECONDS:
                break
        else:
            raise Refused
        thread = self.thread(line[: bracket.start()])
        event, row = read_body(head["body"])
        text = row.get("name", -1)
        time = int(head["seconds"]) * 1_000_000_000 + int(head["fraction"].ljust(9, b"0"))
        blank = {"time": time, "line": number, "thread": thread, "cpu": int(head["cpu"])}
        blank |= {"a": 0, "b": 0, "c": 0, "d": 0, "vcpu": -1, "event": int(event), "flags": read_flags(head["flags"])}
        return blank | row | {"name": self.name(text) if isinstance(text, bytes) else -1}


def vcpu_in(comm: str) -> int:
    """The vCPU that a thread's name tells, or -1."""
    for known in VCPU_NAMES:
        if (found := known.fullmatch(comm)) and int(found[1]) <= 0x7FFF:
            return int(found[1])
    return -1


def read_lines(lines: Iterable[bytes], path: str = "-") -> Recording:
    """A Recording with one block; blank lines and comments are no events and not unreadable either."""
    plain = Plain()
    recording = plain.recording
    recording.path = path
    for number, line in enumerate(lines, 1):
        recording.lines = number
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        if line.strip(b" \t\r") and not line.startswith(b"#"):
            plain.line(number, line)
    rows = np.zeros(len(plain.rows), RECORD)
    for i, row in enumerate(plain.rows):
        for key, value in row.items():
            rows[i][key] = value
    recording.blocks = [rows]
    recording.shape = "ftrace text"
    return recording


def read_text(text: bytes, path: str = "-") -> Recording:
    """A Recording of a whole text."""
    return read_lines(text.splitlines(keepends=True) if b"\r" not in text else text.split(b"\n"), path)


__all__ = ["NO_TIME", "read_lines", "read_text", "vcpu_in"]
