"""What each tracepoint says, release by release: the text that a kernel prints for one record of the trace ring.

Models: the TP_printk formats of arch/x86/kvm/trace.h and include/trace/events/kvm.h, with the names of names.py. A
format holds from its release until the next one of the same event, on the line of all releases: what a stable series
got is there for that series alone. Before the first, the event did not exist and prints nothing. A release in a table
is the first one that was read or seen with the text. One word is the model's own: pi_desc_addr, a host address in KVM,
is the descriptor's place in the machine's memory, in bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from fastexit import hyperv as HV
from fastexit import layout as L
from fastexit import regs as R
from fastexit.tracepoints.names import exception_text, inhibits, reason_text, user_text
from fastexit.tracepoints.releases import Numbers, held, numbers

_U32 = 0xFFFF_FFFF
_EINTR = 4

Fields = dict[str, Any]


class Source(NamedTuple):
    """Where a record comes from: ``release`` is the kernel whose texts the machine prints."""

    release: Numbers
    svm: bool
    descriptor: Callable[[int], int]
    """vCPU id -> place of its posted-interrupt descriptor, in bytes."""


# ---------------------------------------------------------------------------------------------------------- the formats

_PI = "PI is {state} for irq {irq}, vcpu {target}, gsi: 0x{gsi:x}, gvec: 0x{2:x}"
_EXIT = "vcpu {vcpu} reason {reason} rip 0x{1:x} "
_EXIT_INFO = "info1 0x{2:016x} info2 0x{3:016x} intr_info 0x{4:08x} error_code 0x{5:08x}"

_CALL = "0x{repeats:x} idx 0x{first:x} in 0x{1:x} out 0x{2:x}"
_FLUSH = "processor_mask 0x{0:x} address_space 0x{1:x} flags 0x{2:x}"
_FLUSH_EX = "valid_bank_mask 0x{0:x} format 0x{1:x} address_space 0x{2:x} flags 0x{3:x}"
_STIMER = "vcpu_id {vcpu} timer {0}"
_REDIR = "dst {dst:x} vec {vector} ({mode}|{dest}|{trigger}{masked})"

FORMATS: dict[int, dict[str, str]] = {
    L.TP_ENTRY: {
        "5.4": "kvm_entry: vcpu {vcpu}",
        "5.10": "kvm_entry: vcpu {vcpu}, rip 0x{0:x}",
        "6.1.149": "kvm_entry: vcpu {vcpu}, rip 0x{0:x}{immediate}",
        "6.2": "kvm_entry: vcpu {vcpu}, rip 0x{0:x}",
        "6.6.103": "kvm_entry: vcpu {vcpu}, rip 0x{0:x}{immediate}",
        "6.7": "kvm_entry: vcpu {vcpu}, rip 0x{0:x}",
        "6.12": "kvm_entry: vcpu {vcpu}, rip 0x{0:x}{immediate}",
        "6.16": "kvm_entry: vcpu {vcpu}, rip 0x{0:x} intr_info 0x{1:08x} error_code 0x{error:08x}{immediate}",
    },
    L.TP_EXIT: {
        "5.4": f"kvm_exit: {_EXIT}info {{2:x}} {{3:x}}",
        "5.10": f"kvm_exit: {_EXIT}{_EXIT_INFO}",
        "6.16": f"kvm_exit: {_EXIT}{_EXIT_INFO} requests 0x{{requests:016x}}",
    },
    L.TP_MSR_READ: {"5.4": "kvm_msr: msr_read {0:x} = 0x{1:x}{gp}"},
    L.TP_MSR_WRITE: {"5.4": "kvm_msr: msr_write {0:x} = 0x{1:x}{gp}"},
    L.TP_APIC_READ: {
        "5.4": "kvm_apic: apic_read {register} = 0x{low:x}",
        "6.1": "kvm_apic: apic_read {register} = 0x{1:x}",
    },
    L.TP_APIC_WRITE: {
        "5.4": "kvm_apic: apic_write {register} = 0x{low:x}",
        "6.1": "kvm_apic: apic_write {register} = 0x{1:x}",
    },
    L.TP_APIC_IPI: {"5.4": "kvm_apic_ipi: {text}"},
    L.TP_ACCEPT_IRQ: {"5.4": "kvm_apic_accept_irq: {text}"},
    L.TP_APICV_ACCEPT_IRQ: {"6.1": "kvm_apicv_accept_irq: {text}"},
    L.TP_EOI: {"5.4": "kvm_eoi: apicid {vcpu:x} vector {vector}"},
    L.TP_PV_EOI: {"5.4": "kvm_pv_eoi: apicid {vcpu:x} vector {vector}"},
    L.TP_INJ_VIRQ: {
        "5.4": "kvm_inj_virq: irq {0}",
        "6.1": "kvm_inj_virq: {kind} 0x{0:x}{again}",
    },
    L.TP_INJ_EXCEPTION: {
        "5.4": "kvm_inj_exception: {name} (0x0)",
        "5.10": "kvm_inj_exception: {name} (0x0){again}",
        "6.1": "kvm_inj_exception: {name}{error}{again}",
    },
    L.TP_MSI_SET_IRQ: {"5.4": "kvm_msi_set_irq: dst {1:x} vec {vector} ({mode}|{dest}|{trigger}{hint})"},
    L.TP_FAST_MMIO: {"5.4": "kvm_fast_mmio: fast mmio at gpa 0x{0:x}"},
    L.TP_HV_TIMER_STATE: {"5.4": "kvm_hv_timer_state: vcpu_id {vcpu:x} hv_timer {0:x}"},
    L.TP_WAIT_LAPIC_EXPIRE: {"5.4": "kvm_wait_lapic_expire: vcpu {vcpu}: delta {delta} ({side})"},
    L.TP_APICV_INHIBIT_CHANGED: {
        "5.6": "kvm_apicv_update_request: {request} bit={reason}",
        "6.1": "kvm_apicv_inhibit_changed: {change} reason={reason}, inhibits=0x{inhibits:x}",
        "6.12": "kvm_apicv_inhibit_changed: {change} reason={reason}, inhibits=0x{inhibits:x}{names}",
    },
    L.TP_AVIC_INCOMPLETE_IPI: {
        "5.4": "kvm_avic_incomplete_ipi: vcpu={vcpu}, icrh:icrl=0x{high:08x}:{low:08x}, id={1}, index={2}",
    },
    L.TP_AVIC_DOORBELL: {"6.1": "kvm_avic_doorbell: vcpuid={0}, apicid={1}"},
    L.TP_AVIC_KICK_VCPU_SLOWPATH: {
        "6.1": "kvm_avic_kick_vcpu_slowpath: icrh:icrl=0x{high:06x}:{low:08x}, index={1}",
    },
    L.TP_USERSPACE_EXIT: {"5.4": "kvm_userspace_exit: reason {why} ({number})"},
    L.TP_PI_IRTE_UPDATE: {
        "5.4": f"kvm_pi_irte_update: VT-d {_PI}, pi_desc_addr: 0x{{descriptor:x}}",
        "6.12": f"kvm_pi_irte_update: {_PI}, pi_desc_addr: 0x{{descriptor:x}}",
        "6.18": f"kvm_pi_irte_update: {_PI}",
    },
    L.TP_HYPERCALL: {"5.4": "kvm_hypercall: nr 0x{nr:x} a0 0x{a0:x} a1 0x{a1:x} a2 0x{a2:x} a3 0x{a3:x}"},
    L.TP_SET_IRQ: {"5.4": "kvm_set_irq: gsi {0} level {level} source {2}"},
    L.TP_IOAPIC_SET_IRQ: {"5.4": f"kvm_ioapic_set_irq: pin {{1}} {_REDIR}{{coalesced}}"},
    L.TP_IOAPIC_DELAYED_EOI_INJ: {"5.4": f"kvm_ioapic_delayed_eoi_inj: {_REDIR}"},
    L.TP_PIC_SET_IRQ: {"5.4": "kvm_pic_set_irq: chip {chip} pin {pin} ({trigger}{masked}){coalesced}"},
    L.TP_ACK_IRQ: {"5.4": "kvm_ack_irq: irqchip {chip} pin {1}"},
    L.TP_PIO: {"5.4": "kvm_pio: pio_{way} at 0x{port:x} size {size} count {count} val 0x{value:x} {more}"},
    L.TP_HV_HYPERCALL: {
        "5.4": f"kvm_hv_hypercall: code 0x{{code:x}} {{fast}} cnt {_CALL}",
        "6.1": f"kvm_hv_hypercall: code 0x{{code:x}} {{fast}} var_cnt 0x{{variable:x}} rep_cnt {_CALL}",
    },
    L.TP_HV_HYPERCALL_DONE: {"5.15": "kvm_hv_hypercall_done: result 0x{0:x}"},
    L.TP_HV_SEND_IPI: {"5.4": "kvm_hv_send_ipi: vector {0:x} processor_mask 0x{1:x}"},
    L.TP_HV_SEND_IPI_EX: {"5.4": "kvm_hv_send_ipi_ex: vector {0:x} format {1:x} valid_bank_mask 0x{2:x}"},
    L.TP_HV_FLUSH_TLB: {
        "5.4": f"kvm_hv_flush_tlb: {_FLUSH}",
        "6.6": f"kvm_hv_flush_tlb: {_FLUSH} ",
    },
    L.TP_HV_FLUSH_TLB_EX: {
        "5.4": f"kvm_hv_flush_tlb_ex: {_FLUSH_EX}",
        "6.6": f"kvm_hv_flush_tlb_ex: {_FLUSH_EX} ",
    },
    L.TP_HV_NOTIFY_ACKED_SINT: {"5.4": "kvm_hv_notify_acked_sint: vcpu_id {vcpu} sint {0}"},
    L.TP_HV_SYNIC_SET_IRQ: {"5.4": "kvm_hv_synic_set_irq: vcpu_id {vcpu} sint {0} vector {1} ret {result}"},
    L.TP_HV_SYNIC_SEND_EOI: {"5.4": "kvm_hv_synic_send_eoi: vcpu_id {vcpu} vector {0}"},
    L.TP_HV_SYNIC_SET_MSR: {"5.4": "kvm_hv_synic_set_msr: vcpu_id {vcpu} msr 0x{0:x} data 0x{1:x} host {2}"},
    L.TP_HV_STIMER_SET_CONFIG: {"5.4": f"kvm_hv_stimer_set_config: {_STIMER} config 0x{{1:x}} host {{2}}"},
    L.TP_HV_STIMER_SET_COUNT: {"5.4": f"kvm_hv_stimer_set_count: {_STIMER} count {{1}} host {{2}}"},
    L.TP_HV_STIMER_START_PERIODIC: {"5.4": f"kvm_hv_stimer_start_periodic: {_STIMER} time_now {{1}} exp_time {{2}}"},
    L.TP_HV_STIMER_START_ONE_SHOT: {"5.4": f"kvm_hv_stimer_start_one_shot: {_STIMER} time_now {{1}} count {{2}}"},
    L.TP_HV_STIMER_CALLBACK: {"5.4": f"kvm_hv_stimer_callback: {_STIMER}"},
    L.TP_HV_STIMER_CLEANUP: {"5.4": f"kvm_hv_stimer_cleanup: {_STIMER}"},
    L.TP_HV_STIMER_EXPIRATION: {
        "5.4": f"kvm_hv_stimer_expiration: {_STIMER} direct {{1}} send result {{result}}",
    },
}
"""Event -> release from which a format holds -> the format.

{0}, {1} ... are the record's arguments, {vcpu} the id of its vCPU, the other names what _FIELDS makes of them. Where a
record packs things into one argument, layout.py says beside the event how.
"""

ARGUMENTS = {
    L.TP_EXIT: 7,
    L.TP_EOI: 1,
    L.TP_PV_EOI: 1,
    L.TP_FAST_MMIO: 1,
    L.TP_HV_TIMER_STATE: 1,
    L.TP_WAIT_LAPIC_EXPIRE: 1,
    L.TP_APIC_READ: 2,
    L.TP_APIC_WRITE: 2,
    L.TP_APIC_IPI: 2,
    L.TP_ACCEPT_IRQ: 2,
    L.TP_APICV_ACCEPT_IRQ: 2,
    L.TP_AVIC_DOORBELL: 2,
    L.TP_AVIC_KICK_VCPU_SLOWPATH: 2,
    L.TP_USERSPACE_EXIT: 2,
    L.TP_HYPERCALL: 6,
    L.TP_IOAPIC_DELAYED_EOI_INJ: 1,
    L.TP_ACK_IRQ: 2,
    L.TP_HV_HYPERCALL_DONE: 1,
    L.TP_HV_SEND_IPI: 2,
    L.TP_HV_FLUSH_TLB_EX: 4,
    L.TP_HV_NOTIFY_ACKED_SINT: 1,
    L.TP_HV_SYNIC_SEND_EOI: 1,
    L.TP_HV_STIMER_CALLBACK: 1,
    L.TP_HV_STIMER_CLEANUP: 1,
}
"""How many of a record's arguments mean something; 3 for the events that are not here."""

CONTEXT_COLUMNS = {"5.4": 4, "5.13": 5}
"""Characters in front of a time stamp: interrupts, rescheduling, interrupt context, preemption, and since 5.13
migration."""
_NOT_PREEMPTED = L.TP_HV_TIMER_STATE, L.TP_AVIC_DOORBELL
"""Events that are traced with preemption off (once more), whoever comes that way."""


@lru_cache(maxsize=64)  # every machine asks, and most are of few releases
def formats(release: Numbers) -> Mapping[int, str]:
    """Event -> format, for the events that a release has."""
    found = {event: held(table, release) for event, table in FORMATS.items()}
    return {event: text for event, text in found.items() if text is not None}


def context_text(event: int, word: int, columns: int) -> str:
    """The context of a record as ftrace shows it on a host that counts preemption: "d..1." where interrupts are off.

    What makes a host reschedule or migrate is not modelled, nor the context of its own interrupts. A wait that is
    traced behind the exit is so with interrupts off once more, whatever the window before it let in.
    """
    depth = bool(word & L.TRACE_PREEMPT_OFF) + (event in _NOT_PREEMPTED)
    irqs = "d" if word & L.TRACE_IRQS_OFF or event == L.TP_WAIT_LAPIC_EXPIRE else "."
    return f"{irqs}..{depth or '.'}".ljust(columns, ".")


def text(template: str, source: Source, event: int, vcpu_id: int, words: list[int]) -> str | None:
    """One line, or None for a record that this kernel has no line for."""
    make = _FIELDS.get(event)
    fields = make(source, words) if make else {}
    return None if fields is None else template.format(*words, vcpu=vcpu_id, **fields)


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


# -------------------------------------------------------------------- what formats name, made from a record's arguments


def _entry(source: Source, a: list[int]) -> Fields:
    return {"error": a[2] & _U32, "immediate": "[immediate exit]" if a[2] >> 32 else ""}


def _exit(source: Source, a: list[int]) -> Fields:
    return {"reason": reason_text(a[0], source.svm, source.release), "requests": a[6] & ~R.REQ_SIGNAL}


def _msr(source: Source, a: list[int]) -> Fields:
    return {"gp": " (#GP)" if a[2] else ""}


def _apic(source: Source, a: list[int]) -> Fields:
    return {"register": R.REGISTER_NAMES.get(a[0], f"0x{a[0]:x}"), "low": a[1] & _U32}


def _ipi(source: Source, a: list[int]) -> Fields:
    return {"text": ipi_text(a[0], a[1])}


def _accept(source: Source, a: list[int]) -> Fields:
    return {"text": accept_text(a[0], a[1])}


def _eoi(source: Source, a: list[int]) -> Fields:
    return {"vector": -1 if a[0] == L.NONE else a[0]}


def _inject(source: Source, a: list[int]) -> Fields:
    return {"kind": "Soft/INTn" if a[1] else "IRQ", "again": " [reinjected]" if a[2] else ""}


def _exception(source: Source, a: list[int]) -> Fields | None:
    """An exception that is delivered again has a line since 5.10."""
    if a[2] and source.release < numbers("5.10"):
        return None
    return {
        "name": exception_text(a[0], source.release),
        "error": " (0x0)" if a[1] else "",
        "again": " [reinjected]" if a[2] else "",
    }


def _msi(source: Source, a: list[int]) -> Fields:
    return {
        "vector": a[0] & 0xFF,
        "mode": _mode(a[0]),
        "dest": _dest_mode(a[0]),
        "trigger": _trigger(a[0]),
        "hint": "|rh" if a[2] else "",
    }


def _set_irq(source: Source, a: list[int]) -> Fields:
    """What user space gave as a level is an int."""
    return {"level": (a[1] & _U32) - (a[1] >> 31 & 1) * (_U32 + 1)}


_COALESCED = " (coalesced)"


def _redir(source: Source, a: list[int]) -> Fields:
    """A redirection entry; "coalesced" is what KVM calls a result of 0, whatever its reason."""
    return {
        "dst": a[0] >> R.REDIR_DEST_SHIFT,
        "vector": a[0] & 0xFF,
        "mode": _mode(a[0]),
        "dest": _dest_mode(a[0]),
        "trigger": _trigger(a[0]),
        "masked": "|masked" if a[0] & R.REDIR_MASK else "",
        "coalesced": _COALESCED if a[2] else "",
    }


def _pic(source: Source, a: list[int]) -> Fields:
    pin = a[0] & 7
    return {
        "chip": a[0] >> 8 & 0xFF,
        "pin": pin,
        "trigger": "level" if a[1] >> pin & 1 else "edge",
        "masked": "|masked" if a[2] >> pin & 1 else "",
        "coalesced": _COALESCED if a[0] & L.TRACE_COALESCED else "",
    }


_CHIPS = ("PIC master", "PIC slave", "IOAPIC")


def _ack(source: Source, a: list[int]) -> Fields:
    return {"chip": _CHIPS[a[0]] if a[0] < len(_CHIPS) else f"0x{a[0]:x}"}


def _pio(source: Source, a: list[int]) -> Fields:
    """Of a string instruction's values the first alone is printed."""
    size, count = a[1] & 0xFF, a[1] >> 8 & _U32
    return {
        "way": "write" if a[0] & L.TRACE_PIO_WRITE else "read",
        "port": a[0] & 0xFFFF,
        "size": size,
        "count": count,
        "value": a[2] & (0xFF if size == 1 else 0xFFFF if size == 2 else _U32),
        "more": "(...)" if count > 1 else "",
    }


def _expire(source: Source, a: list[int]) -> Fields:
    delta = a[0] - (a[0] >> 63 << 64)
    return {"delta": delta, "side": "early" if delta < 0 else "late"}


def _inhibit(source: Source, a: list[int]) -> Fields | None:
    """No line for a reason that this release did not know. Up to 5.15 only the first one and the last one had one."""
    known = inhibits(source.release)
    if a[0] not in known:
        return None
    held = [reason for reason in known if a[2] >> reason & 1]
    if source.release < numbers("6.1") and [reason for reason in held if reason != a[0]]:
        return None
    return {
        "change": "set" if a[1] else "cleared",
        "request": "deactivate" if a[1] else "activate",
        "reason": known.index(a[0]),
        "inhibits": sum(1 << known.index(reason) for reason in held),
        "names": " " + "|".join(reason.name for reason in held) if held else "",
    }


def _halves(source: Source, a: list[int]) -> Fields:
    return {"low": a[0] & _U32, "high": a[0] >> 32}


def _userspace(source: Source, a: list[int]) -> Fields:
    if a[1]:
        return {"why": "restart" if a[1] == _EINTR else "error", "number": a[1]}
    return {"why": user_text(a[0], source.release), "number": a[0]}


def _irte(source: Source, a: list[int]) -> Fields | None:
    """An entry that goes to no single vCPU names -1; that had no line before 6.18."""
    target = a[1] >> 32
    if target == _U32 and source.release < numbers("6.18"):
        return None
    return {
        "state": "enabled and being updated" if a[0] >> 32 else "disabled",
        "irq": a[0] & _U32,
        "gsi": a[1] & _U32,
        "target": -1 if target == _U32 else target,
        "descriptor": source.descriptor(target),
    }


def _hypercall(source: Source, a: list[int]) -> Fields:
    """Registers of a guest that is not in long mode are cut to 32 bits before the line since 7.2, behind it before."""
    mask = L.NONE if a[5] or source.release < numbers("7.2") else _U32
    return {name: value & mask for name, value in zip(("nr", "a0", "a1", "a2", "a3"), a, strict=False)}


def _hv_hypercall(source: Source, a: list[int]) -> Fields:
    return {
        "code": a[0] & HV.HV_CALL_CODE,
        "fast": "fast" if a[0] & HV.HV_CALL_FAST else "slow",
        "variable": a[0] >> HV.HV_CALL_VAR_COUNT_SHIFT & (1 << HV.HV_CALL_VAR_COUNT_BITS) - 1,
        "repeats": a[0] >> HV.HV_CALL_REP_COUNT_SHIFT & (1 << HV.HV_CALL_REP_COUNT_BITS) - 1,
        "first": a[0] >> HV.HV_CALL_REP_START_SHIFT & (1 << HV.HV_CALL_REP_START_BITS) - 1,
    }


def _hv_result(source: Source, a: list[int]) -> Fields:
    """What came of raising a SINT or sending a message: a number or minus an errno."""
    return {"result": a[2] - (a[2] >> 63 << 64)}


_FIELDS: dict[int, Callable[[Source, list[int]], Fields | None]] = {
    L.TP_SET_IRQ: _set_irq,
    L.TP_IOAPIC_SET_IRQ: _redir,
    L.TP_IOAPIC_DELAYED_EOI_INJ: _redir,
    L.TP_PIC_SET_IRQ: _pic,
    L.TP_ACK_IRQ: _ack,
    L.TP_PIO: _pio,
    L.TP_HYPERCALL: _hypercall,
    L.TP_HV_HYPERCALL: _hv_hypercall,
    L.TP_HV_SYNIC_SET_IRQ: _hv_result,
    L.TP_HV_STIMER_EXPIRATION: _hv_result,
    L.TP_ENTRY: _entry,
    L.TP_EXIT: _exit,
    L.TP_MSR_READ: _msr,
    L.TP_MSR_WRITE: _msr,
    L.TP_APIC_READ: _apic,
    L.TP_APIC_WRITE: _apic,
    L.TP_APIC_IPI: _ipi,
    L.TP_ACCEPT_IRQ: _accept,
    L.TP_APICV_ACCEPT_IRQ: _accept,
    L.TP_EOI: _eoi,
    L.TP_PV_EOI: _eoi,
    L.TP_INJ_VIRQ: _inject,
    L.TP_INJ_EXCEPTION: _exception,
    L.TP_MSI_SET_IRQ: _msi,
    L.TP_WAIT_LAPIC_EXPIRE: _expire,
    L.TP_APICV_INHIBIT_CHANGED: _inhibit,
    L.TP_AVIC_INCOMPLETE_IPI: _halves,
    L.TP_AVIC_KICK_VCPU_SLOWPATH: _halves,
    L.TP_USERSPACE_EXIT: _userspace,
    L.TP_PI_IRTE_UPDATE: _irte,
}
