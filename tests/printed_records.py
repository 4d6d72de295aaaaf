"""Rows of every event, drawn at random, with the line that a kernel prints for each and what has to be read of it."""

from __future__ import annotations

from random import Random
from typing import Any

from fastexit.records.columns import Event, Flag

MODES = ("Fixed", "LowPrio", "SMI", "Res3", "NMI", "INIT", "SIPI", "ExtINT")
SHORTHANDS = ("dst", "self", "all", "all-but-self")
REGISTERS = {"APIC_EOI": 0xB0, "APIC_ICR": 0x300, "APIC_ICR2": 0x310, "APIC_TMICT": 0x380, "0x3f8": 0x3F8, "3f8": 0x3F8}
REASONS = ("MSR_WRITE", "hlt", "EPT_VIOLATION FAILED_VMENTRY 0x8000", "UNKNOWN (0x123)", "0x7f", "EXIT_EXCP_GP")
ALL_ONES = (1 << 64) - 1

Fields = dict[str, Any]


def u64(r: Random) -> int:
    return r.choice((0, 1, r.getrandbits(8), r.getrandbits(32), r.getrandbits(63), r.getrandbits(64), ALL_ONES))


def u32(r: Random) -> int:
    return u64(r) & 0xFFFF_FFFF


def vector(r: Random) -> int:
    return r.getrandbits(8)


def vcpu(r: Random) -> int:
    return r.choice((0, 1, 15, 255, 4095, 0x7FFF))


def either(r: Random, *texts: str) -> tuple[int, str]:
    i = r.randrange(len(texts))
    return i, texts[i]


def exit_(r: Random) -> tuple[str, Fields]:
    reason, rip, one, two, intr, error, n = r.choice(REASONS), u64(r), u64(r), u64(r), u32(r), u32(r), vcpu(r)
    long = f"info1 0x{one:016x} info2 0x{two:016x} intr_info 0x{intr:08x} error_code 0x{error:08x}"
    infos = {"a": rip, "b": one, "c": two}
    return r.choice(
        (
            (f"reason {reason} rip 0x{rip:x} info {one:x} {two:x}", {"name": reason} | infos),
            (f"vcpu {n} reason {reason} rip 0x{rip:x} info {one:x} {two:x}", {"name": reason, "vcpu": n} | infos),
            (
                f"vcpu {n} reason {reason} rip 0x{rip:x} {long}",
                {"name": reason, "vcpu": n, "d": intr | error << 32} | infos,
            ),
            (
                f"vcpu {n} reason {reason} rip 0x{rip:x} {long} requests 0x{u64(r):016x}",
                {"name": reason, "vcpu": n, "d": intr | error << 32} | infos,
            ),
            (f"reason {reason}", {"name": reason}),
            (f"reason {reason} rip 0x{rip:x} info1 {one:x}", {"name": reason, "a": rip, "b": one}),
            (f"reason {reason} rip 0x{rip:x}", {"name": reason, "a": rip}),
        )
    )


def entry(r: Random) -> tuple[str, Fields]:
    n, rip = vcpu(r), u64(r)
    more = r.choice(("", "[immediate exit]", " intr_info 0x800000ec error_code 0x00000000", " [immediate exit]"))
    at = f"vcpu {n}{r.choice((',', ''))} rip 0x{rip:x}{more}", {"vcpu": n, "a": rip}
    return r.choice(((f"vcpu {n}", {"vcpu": n}), at))


def msr(r: Random) -> tuple[str, Fields]:
    index, value, (write, way), fault = u32(r), u64(r), either(r, "read", "write"), r.getrandbits(1)
    row = {"a": index, "b": value, "c": write, "d": fault}
    return f"msr_{way} {index:x} = 0x{value:x}{' (#GP)' * fault}", row


def apic(r: Random) -> tuple[str, Fields]:
    register, value, (write, way) = r.choice(list(REGISTERS)), u64(r), either(r, "read", "write")
    return f"apic_{way} {register} = 0x{value:x}", {"a": REGISTERS[register], "b": value, "c": write, "name": register}


def ipi(r: Random) -> tuple[str, Fields]:
    dst, vec, mode, short = u32(r), vector(r), r.randrange(8), r.randrange(4)
    (logical, dest), (assertion, level) = either(r, "physical", "logical"), either(r, "de-assert", "assert")
    trigger, edge = either(r, "edge", "level")
    low = vec | mode << 8 | logical << 11 | assertion << 14 | trigger << 15 | short << 18
    text = f"dst {dst:x} vec {vec} ({MODES[mode]}|{dest}|{level}|{edge}|{SHORTHANDS[short]})"
    return text, {"a": dst, "b": low}


def accept(r: Random) -> tuple[str, Fields]:
    n, vec, mode, (trigger, edge), again = (
        vcpu(r),
        vector(r),
        r.randrange(8),
        either(r, "edge", "level"),
        r.getrandbits(1),
    )
    row = {"vcpu": n, "a": n, "b": vec, "c": mode << 8 | trigger << 15, "d": again}
    return f"apicid {n:x} vec {vec} ({MODES[mode]}|{edge}){' (coalesced)' * again}", row


def eoi(r: Random) -> tuple[str, Fields]:
    n, vec = vcpu(r), r.choice((-1, vector(r)))
    return f"apicid {n:x} vector {vec}", {"vcpu": n, "a": n, "b": vec & ALL_ONES}


def inject(r: Random) -> tuple[str, Fields]:
    vec, (soft, kind), again = vector(r), either(r, "IRQ", "Soft/INTn"), r.getrandbits(1)
    new = f"{kind} 0x{vec:x}{' [reinjected]' * again}", {"a": vec, "b": soft, "c": again}
    return r.choice((new, (f"irq {vec}", {"a": vec})))


def exception(r: Random) -> tuple[str, Fields]:
    name, code, again = r.choice(("#GP", "#PF", "0x1e")), u32(r), r.getrandbits(1)
    coded = r.getrandbits(1)
    text = f"{name}{f' (0x{code:x})' * coded}{' [reinjected]' * again}"
    return text, {"name": name, "a": code * coded, "c": again}


def set_irq(r: Random) -> tuple[str, Fields]:
    gsi, level, source = u32(r), r.choice((-1, 0, 1)), vector(r)
    return f"gsi {gsi} level {level} source {source}", {"a": gsi, "b": level & ALL_ONES, "c": source}


def redirection(r: Random) -> tuple[int, str]:
    vec = vector(r)
    dest, trigger = r.choice(("physical", "logical")), r.choice(("edge", "level"))
    return vec, f"vec {vec} ({r.choice(MODES)}|{dest}|{trigger}"


def ioapic(r: Random) -> tuple[str, Fields]:
    pin, dst, again, (vec, text) = r.randrange(24), vector(r), r.getrandbits(1), redirection(r)
    masked = r.choice(("", "|masked"))
    row = {"a": pin, "b": vec, "c": dst, "d": again, "name": "kvm_ioapic_set_irq"}
    return f"pin {pin} dst {dst:x} {text}{masked}){' (coalesced)' * again}", row


def delayed(r: Random) -> tuple[str, Fields]:
    dst, (vec, text) = vector(r), redirection(r)
    row = {"a": ALL_ONES, "b": vec, "c": dst, "name": "kvm_ioapic_delayed_eoi_inj"}
    return f"dst {dst:x} {text}{r.choice(('', '|masked'))})", row


def msi(r: Random) -> tuple[str, Fields]:
    dst, (vec, text) = u64(r), redirection(r)
    return f"dst {dst:x} {text}{r.choice(('', '|rh'))})", {"a": dst, "b": vec}


def pic(r: Random) -> tuple[str, Fields]:
    chip, pin, masked, again = r.getrandbits(1), r.randrange(8), r.getrandbits(1), r.getrandbits(1)
    text = f"chip {chip} pin {pin} ({r.choice(('edge', 'level'))}{'|masked' * masked}){' (coalesced)' * again}"
    return text, {"a": chip << 3 | pin, "c": masked, "d": again}


def ack(r: Random) -> tuple[str, Fields]:
    chip, pin = r.choice(("PIC master", "PIC slave", "IOAPIC", "7")), r.randrange(24)
    return f"irqchip {chip} pin {pin}", {"name": chip, "a": pin}


def pio(r: Random) -> tuple[str, Fields]:
    port, size, value, (write, way) = r.getrandbits(16), r.choice((1, 2, 4)), u32(r), either(r, "read", "write")
    old = f"pio_{way} at 0x{port:x} size {size} count 1", {"a": port, "c": write, "d": size}
    new = f"{old[0]} val 0x{value:x} {r.choice(('', '(...)'))}", old[1] | {"b": value}
    return r.choice((old, new))


def mmio(r: Random) -> tuple[str, Fields]:
    kind, length, gpa, value = r.choice(("read", "unsatisfied-read", "write")), r.choice((1, 2, 4, 8)), u64(r), u64(r)
    row = {"a": gpa, "b": value, "c": int(kind == "write"), "d": length}
    return f"mmio {kind} len {length} gpa 0x{gpa:x} val 0x{value:x}", row


def fast_mmio(r: Random) -> tuple[str, Fields]:
    gpa = u64(r)
    return f"fast mmio at gpa 0x{gpa:x}", {"a": gpa, "c": 1}


def hypercall(r: Random) -> tuple[str, Fields]:
    nr, a0, a1, a2, a3 = (u64(r) for _ in range(5))
    return f"nr 0x{nr:x} a0 0x{a0:x} a1 0x{a1:x} a2 0x{a2:x} a3 0x{a3:x}", {"a": nr, "b": a0, "c": a1, "d": a2}


def hv_hypercall(r: Random) -> tuple[str, Fields]:
    code, given, out, (fast, way) = r.getrandbits(16), u64(r), u64(r), either(r, "slow", "fast")
    count = r.choice(("cnt 0x0", "var_cnt 0x2 rep_cnt 0x1"))
    row = {"a": code, "b": given, "c": out, "d": fast}
    return f"code 0x{code:x} {way} {count} idx 0x0 in 0x{given:x} out 0x{out:x}", row


def hv_send(r: Random) -> tuple[str, Fields]:
    vec, mask = u32(r), u64(r)
    return f"vector {vec:x} processor_mask 0x{mask:x}", {"a": vec, "b": mask, "name": "kvm_hv_send_ipi"}


def hv_send_ex(r: Random) -> tuple[str, Fields]:
    vec, form, mask = u32(r), u64(r), u64(r)
    row = {"a": vec, "b": mask, "c": form, "name": "kvm_hv_send_ipi_ex"}
    return f"vector {vec:x} format {form:x} valid_bank_mask 0x{mask:x}", row


def inhibit(r: Random) -> tuple[str, Fields]:
    (given, what), reason, every = either(r, "cleared", "set"), r.randrange(14), u64(r)
    text = f"{what} reason={reason}, inhibits=0x{every:x}{r.choice(('', ' HYPERV|ABSENT'))}"
    return text, {"a": given, "b": every, "name": str(reason)}


def request(r: Random) -> tuple[str, Fields]:
    (off, what), bit = either(r, "activate", "deactivate"), r.randrange(6)
    return f"{what} bit={bit}", {"a": off, "b": off << bit, "d": 1, "name": str(bit)}


def nested(r: Random) -> tuple[str, Fields]:
    reason, n = r.choice(("EPT_VIOLATION", "msr", "EXTERNAL_INTERRUPT")), vcpu(r)
    tail = "ext_inf1: 0x0000000000000000 ext_inf2: 0x0000000000000000 ext_int: 0x00000000 ext_int_err: 0x00000000"
    return r.choice(
        (
            (f"rip: 0x{u64(r):016x} reason: {reason} {tail}", {"name": reason}),
            (f"vcpu {n} reason {reason} rip 0x{u64(r):x} info1 0x0", {"name": reason, "vcpu": n}),
            (f"rip {u64(r):x} reason {reason} info1 0 info2 0 int_info 0 int_info_err 0", {"name": reason}),
        )
    )


def nested_inject(r: Random) -> tuple[str, Fields]:
    text, row = nested(r)
    return text, row | {"c": 1}


def intercepts(r: Random) -> tuple[str, Fields]:
    return "cr_read: 0010 cr_write: 0010 excp: 00060042 intercepts: fd407dc0 00000001 00000000", {"c": 2}


def nested_entry(r: Random) -> tuple[str, Fields]:
    rips = f"rip: 0x{u64(r):016x} vmcb: 0x0000000000000000 nested_rip: 0x{u64(r):016x} int_ctl: 0x00000000"
    return rips, {"name": "kvm_nested_vmenter"}


def userspace(r: Random) -> tuple[str, Fields]:
    reason, code = r.choice((("KVM_EXIT_IO", 2), ("restart", 4), ("error", 11), ("0x2a", 42)))
    return f"reason {reason} ({code})", {"name": reason}


def wakeup(r: Random) -> tuple[str, Fields]:
    (waited, what), ns, (valid, how) = either(r, "poll", "wait"), u64(r) >> 1, either(r, "invalid", "valid")
    new = f"{what} time {ns} ns, polling {how}", {"a": ns, "b": waited, "c": valid}
    return r.choice((new, (f"{what} time {ns} ns", {"a": ns, "b": waited})))


def halt_poll(r: Random) -> tuple[str, Fields]:
    n, new, old, (grow, how) = vcpu(r), u32(r), u32(r), either(r, "shrink", "grow")
    return f"vcpu {n}: halt_poll_ns {new} ({how} {old})", {"vcpu": n, "a": new, "b": old, "c": grow}


def page_fault(r: Random) -> tuple[str, Fields]:
    n, gpa, code = vcpu(r), u64(r), u64(r)
    old = f"address {gpa:x} error_code {code:x}", {"a": gpa, "b": code}
    new = f"vcpu {n} rip 0x{u64(r):x} address 0x{gpa:016x} error_code 0x{code:x}", {"vcpu": n, "a": gpa, "b": code}
    return r.choice((old, new))


def cpuid(r: Random) -> tuple[str, Fields]:
    leaf, sub = u32(r), u32(r)
    tail = " rax 0 rbx 0 rcx 0 rdx 0, cpuid entry found"
    return r.choice(
        ((f"func {leaf:x} idx {sub:x}{tail}", {"a": leaf, "b": sub}), (f"func {leaf:x}{tail}", {"a": leaf}))
    )


def cr(r: Random) -> tuple[str, Fields]:
    number, value, (write, way) = r.randrange(9), u64(r), either(r, "read", "write")
    return f"cr_{way} {number:x} = 0x{value:x}", {"a": number, "b": value, "c": write}


def incomplete(r: Random) -> tuple[str, Fields]:
    n, high, low, why = vcpu(r), u32(r), u32(r), r.randrange(5)
    text = f"vcpu={n}, icrh:icrl=0x{high:08x}:{low:08x}, id={why}, index={r.getrandbits(8)}"
    return text, {"vcpu": n, "a": high << 32 | low, "b": why, "name": "kvm_avic_incomplete_ipi"}


def unaccelerated(r: Random) -> tuple[str, Fields]:
    n, offset, (write, way), vec = vcpu(r), r.getrandbits(12), either(r, "read", "write"), vector(r)
    how, register = r.choice(("trap", "fault")), r.choice(("APIC_LDR", "0x3a0"))
    text = f"vcpu={n}, offset=0x{offset:x}({register}), {how}, {way}, vec=0x{vec:x}"
    return text, {"vcpu": n, "a": offset, "b": vec, "c": write, "name": "kvm_avic_unaccelerated_access"}


def doorbell(r: Random) -> tuple[str, Fields]:
    n, apicid = vcpu(r), u32(r)
    return f"vcpuid={n}, apicid={apicid}", {"vcpu": n, "a": apicid, "name": "kvm_avic_doorbell"}


def hv_timer(r: Random) -> tuple[str, Fields]:
    n, used = vcpu(r), r.getrandbits(1)
    return f"vcpu_id {n:x} hv_timer {used:x}", {"vcpu": n, "a": used}


def irte(r: Random) -> tuple[str, Fields]:
    n, irq, gsi, vec, (given, what) = (
        r.choice((-1, vcpu(r))),
        u32(r),
        u32(r),
        vector(r),
        either(r, "disabled", "enabled and being updated"),
    )
    text = f"PI is {what} for irq {irq}, vcpu {n}, gsi: 0x{gsi:x}, gvec: 0x{vec:x}"
    row = {"vcpu": n, "a": gsi, "b": vec, "c": given, "d": irq}
    return r.choice(("", "VT-d ")) + text + r.choice(("", f", pi_desc_addr: 0x{u64(r):x}")), row


def smm(r: Random) -> tuple[str, Fields]:
    n, (entering, what) = vcpu(r), either(r, "leaving", "entering")
    return f"vcpu {n}: {what} SMM, smbase 0x{u64(r):x}", {"vcpu": n, "a": entering}


def switch(r: Random) -> tuple[str, Fields]:
    old, new = r.choice(("CPU 0/KVM", "a b", "x: y", "swapper/3")), r.choice(("kworker/1:2-ev", "z=1", "CPU 1/KVM"))
    before, after, state = r.getrandbits(22), r.getrandbits(22), r.choice(("S", "R", "R+", "D|K"))
    row = {"a": before, "b": after, "c": int(state[0] == "R")}
    fields = f"prev_comm={old} prev_pid={before} prev_prio=120 prev_state={state} ==> next_comm={new} next_pid={after}"
    return r.choice(((f"{fields} next_prio=-5", row), (f"{old}:{before} [120] {state} ==> {new}:{after} [49]", row)))


def wait_expire(r: Random) -> tuple[str, Fields]:
    n = vcpu(r)
    return f"vcpu {n}: delta {r.randrange(-99, 99)} (early)", {"vcpu": n, "name": "kvm_wait_lapic_expire"}


def synic(r: Random) -> tuple[str, Fields]:
    n = vcpu(r)
    return f"vcpu_id {n} sint 2 vector 81 ret 0", {"vcpu": n, "name": "kvm_hv_synic_set_irq"}


def galog(r: Random) -> tuple[str, Fields]:
    return f"vmid={u32(r)}, vcpuid={vcpu(r)}", {"name": "kvm_avic_ga_log"}


def nmi(r: Random) -> tuple[str, Fields]:
    return "", {"name": "kvm_nmi_inj"}


def foreign(r: Random) -> tuple[str, Fields]:
    return r.choice(("", "comm=x pid=1", "a: b: c", "[003] 1.5: x")), {"name": "rcu_utilization"}


EVENTS = {
    **{"kvm_exit": (Event.EXIT, exit_), "kvm_entry": (Event.ENTRY, entry), "kvm_msr": (Event.MSR, msr)},
    **{"kvm_apic": (Event.APIC, apic), "kvm_apic_ipi": (Event.APIC_IPI, ipi), "kvm_eoi": (Event.EOI, eoi)},
    **{"kvm_apic_accept_irq": (Event.ACCEPT, accept), "kvm_apicv_accept_irq": (Event.APICV_ACCEPT, accept)},
    **{"kvm_pv_eoi": (Event.PV_EOI, eoi), "kvm_inj_virq": (Event.INJ_VIRQ, inject)},
    **{"kvm_inj_exception": (Event.INJ_EXCEPTION, exception), "kvm_set_irq": (Event.SET_IRQ, set_irq)},
    **{"kvm_ioapic_set_irq": (Event.IOAPIC_SET_IRQ, ioapic), "kvm_msi_set_irq": (Event.MSI_SET_IRQ, msi)},
    **{"kvm_ioapic_delayed_eoi_inj": (Event.IOAPIC_SET_IRQ, delayed), "kvm_pic_set_irq": (Event.PIC_SET_IRQ, pic)},
    **{"kvm_ack_irq": (Event.ACK_IRQ, ack), "kvm_pio": (Event.PIO, pio), "kvm_mmio": (Event.MMIO, mmio)},
    **{"kvm_fast_mmio": (Event.MMIO, fast_mmio), "kvm_hypercall": (Event.HYPERCALL, hypercall)},
    **{"kvm_hv_hypercall": (Event.HV_HYPERCALL, hv_hypercall), "kvm_hv_send_ipi": (Event.HV_SEND_IPI, hv_send)},
    **{"kvm_hv_send_ipi_ex": (Event.HV_SEND_IPI, hv_send_ex), "kvm_cr": (Event.CR, cr)},
    **{"kvm_apicv_inhibit_changed": (Event.APICV_INHIBIT, inhibit), "kvm_cpuid": (Event.CPUID, cpuid)},
    **{"kvm_apicv_update_request": (Event.APICV_INHIBIT, request), "kvm_nested_vmexit": (Event.NESTED_VMEXIT, nested)},
    **{"kvm_nested_vmexit_inject": (Event.NESTED_VMEXIT, nested_inject)},
    **{"kvm_nested_intercepts": (Event.NESTED_VMEXIT, intercepts)},
    **{"kvm_nested_vmenter": (Event.NESTED_ENTRY, nested_entry)},
    **{"kvm_userspace_exit": (Event.USERSPACE_EXIT, userspace), "kvm_vcpu_wakeup": (Event.WAKEUP, wakeup)},
    **{"kvm_halt_poll_ns": (Event.HALT_POLL, halt_poll), "kvm_page_fault": (Event.PAGE_FAULT, page_fault)},
    **{"kvm_avic_incomplete_ipi": (Event.AVIC, incomplete), "kvm_avic_doorbell": (Event.AVIC, doorbell)},
    **{"kvm_avic_unaccelerated_access": (Event.AVIC, unaccelerated), "kvm_avic_ga_log": (Event.AVIC, galog)},
    **{"kvm_hv_timer_state": (Event.HV_TIMER, hv_timer), "kvm_pi_irte_update": (Event.PI_IRTE, irte)},
    **{"kvm_smm_transition": (Event.SMM, smm), "sched_switch": (Event.SCHED_SWITCH, switch)},
    **{"kvm_wait_lapic_expire": (Event.OTHER_KVM, wait_expire), "kvm_hv_synic_set_irq": (Event.HV, synic)},
    **{"kvm_nmi_inj": (Event.NMI, nmi), "rcu_utilization": (Event.OTHER, foreign)},
}

THREADS = (("CPU 0/KVM", 100, 99), ("fc_vcpu 1", 101, -1), ("a-b [3] c", 7, 7), ("<...>", 4_000_000, -1))
CONTEXTS = {
    "": 0,
    "....": Flag.TOLD,
    "d..1.": Flag.TOLD | Flag.IRQS_OFF,
    "dNh1.": Flag.TOLD | Flag.IRQS_OFF | Flag.NEED_RESCHED | Flag.HARDIRQ,
    "D.Zff2": Flag.TOLD | Flag.IRQS_OFF | Flag.HARDIRQ,
    "..s1....": Flag.TOLD | Flag.HARDIRQ,
}


def printed(r: Random, event: str = "") -> tuple[str, Fields]:
    """A line, and the row that it is, with the thread as (pid, vCPU) and the name as text."""
    event = event or r.choice(list(EVENTS))
    kind, make = EVENTS[event]
    text, fields = make(r)
    comm, pid, tgid = r.choice(THREADS)
    cpu, seconds, fraction = r.choice((0, 7, 255)), r.choice((0, 1, 1907374, 9_000_000_000)), r.getrandbits(19)
    context = r.choice(list(CONTEXTS))
    digits = r.choice((6, 9))
    time = f"{seconds}.{fraction:0{digits}d}"
    if r.random() < 0.3:
        head = f"{comm:>16} {pid:>6} [{cpu:03}] {time}: {r.choice(('kvm:', ''))}"
        context = ""
    else:
        process = r.choice(("", f" ({tgid:>7})" if tgid >= 0 else " (-------)"))
        head = f"{comm:>16}-{pid:<7}{process} [{cpu:03}] {context} {time}: "
    row = {"time": seconds * 10**9 + fraction * 10 ** (9 - digits), "a": 0, "b": 0, "c": 0, "d": 0, "vcpu": -1}
    row |= {"name": None, "event": int(kind), "flags": int(CONTEXTS[context]), "cpu": cpu, "thread": pid}
    return f"{head}{event}: {text}", row | fields
