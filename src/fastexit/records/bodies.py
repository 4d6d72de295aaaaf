"""An event by its name, which says how the text behind it is read. All of it is compiled."""

from __future__ import annotations

import numpy as np

from fastexit.jit.bytesaddressed import load_byte
from fastexit.jit.declare import kernel
from fastexit.records import accesses, block, chips, exits, interrupts, switches
from fastexit.records.block import Kind
from fastexit.records.tokens import (
    CLASSES,
    COLON,
    DIGIT_ZERO,
    LONGEST_NAME,
    NINE,
    ONE,
    WORDLIKE,
    ZERO,
    entry,
    literal,
    rest,
    skip,
    text,
    without_kvm,
)

U = np.uint64
LAST_HEAD, NAME, VCPU, EVENT_NAME = U(block.LAST_HEAD), U(block.NAME), U(block.VCPU), U(block.EVENT_NAME)
NAME_INDEX, NAME_KIND, NAME_EVENT = U(block.NAME_INDEX), U(block.NAME_KIND), U(block.NAME_EVENT)
TORN = text(b": kvm_")
A, B, C, D, WHO, WHERE, WHAT = U(1), U(2), U(3), U(4), U(5), U(6), U(7)
K_OTHER, K_NAMED, K_KVM = U(Kind.OTHER), U(Kind.NAMED), U(Kind.KVM)
K_EXIT, K_ENTRY, K_MSR, K_APIC, K_IPI = U(Kind.EXIT), U(Kind.ENTRY), U(Kind.MSR), U(Kind.APIC), U(Kind.IPI)
K_ACCEPT, K_EOI, K_INJ_VIRQ, K_INJ_EXCEPTION = U(Kind.ACCEPT), U(Kind.EOI), U(Kind.INJ_VIRQ), U(Kind.INJ_EXCEPTION)
K_SET_IRQ, K_IOAPIC, K_DELAYED_EOI, K_MSI = U(Kind.SET_IRQ), U(Kind.IOAPIC), U(Kind.DELAYED_EOI), U(Kind.MSI)
K_PIC, K_ACK, K_PIO, K_MMIO, K_FAST_MMIO = U(Kind.PIC), U(Kind.ACK), U(Kind.PIO), U(Kind.MMIO), U(Kind.FAST_MMIO)
K_HYPERCALL, K_HV_HYPERCALL, K_HV_SEND_IPI = U(Kind.HYPERCALL), U(Kind.HV_HYPERCALL), U(Kind.HV_SEND_IPI)
K_INHIBIT, K_INHIBIT_REQUEST = U(Kind.INHIBIT), U(Kind.INHIBIT_REQUEST)
K_NESTED_VMEXIT, K_NESTED_INTR = U(Kind.NESTED_VMEXIT), U(Kind.NESTED_INTR)
K_USERSPACE, K_WAKEUP, K_HALT_POLL = U(Kind.USERSPACE), U(Kind.WAKEUP), U(Kind.HALT_POLL)
K_PAGE_FAULT, K_CPUID, K_CR = U(Kind.PAGE_FAULT), U(Kind.CPUID), U(Kind.CR)
K_INCOMPLETE_IPI, K_UNACCELERATED, K_DOORBELL = U(Kind.INCOMPLETE_IPI), U(Kind.UNACCELERATED), U(Kind.DOORBELL)
K_HV_TIMER, K_PI_IRTE, K_SMM, K_SWITCH = U(Kind.HV_TIMER), U(Kind.PI_IRTE), U(Kind.SMM), U(Kind.SWITCH)
FLAG_MASK = U(0xFF)


@kernel("u8(words, u8, u8, u8)")
def body(m, kind, p, r):
    """The text behind an event's name, by its kind."""
    if kind == K_EXIT:
        return exits.exit_(m, p, r)
    if kind == K_ENTRY:
        return exits.enter(m, p, r)
    if kind == K_MSR:
        return accesses.msr(m, p, r)
    if kind == K_APIC:
        return interrupts.apic(m, p, r)
    if kind == K_IPI:
        return interrupts.ipi(m, p, r)
    if kind == K_ACCEPT:
        return interrupts.accept(m, p, r)
    if kind == K_EOI:
        return interrupts.eoi(m, p, r)
    if kind == K_INJ_VIRQ:
        return interrupts.inject(m, p, r)
    if kind == K_INJ_EXCEPTION:
        return interrupts.exception(m, p, r)
    if kind == K_SET_IRQ:
        return chips.set_irq(m, p, r)
    if kind == K_IOAPIC:
        return chips.ioapic(m, p, r)
    if kind == K_DELAYED_EOI:
        return chips.delayed_eoi(m, p, r)
    if kind == K_MSI:
        return chips.msi(m, p, r)
    if kind == K_PIC:
        return chips.pic(m, p, r)
    if kind == K_ACK:
        return chips.ack(m, p, r)
    if kind == K_PIO:
        return accesses.pio(m, p, r)
    if kind == K_MMIO:
        return accesses.mmio(m, p, r)
    if kind == K_FAST_MMIO:
        return accesses.fast_mmio(m, p, r)
    if kind == K_HYPERCALL:
        return accesses.hypercall(m, p, r)
    if kind == K_HV_HYPERCALL:
        return accesses.hv_hypercall(m, p, r)
    if kind == K_HV_SEND_IPI:
        return interrupts.hv_send_ipi(m, p, r)
    if kind == K_INHIBIT:
        return interrupts.inhibit(m, p, r)
    if kind == K_INHIBIT_REQUEST:
        return interrupts.inhibit_request(m, p, r)
    if kind >= K_NESTED_VMEXIT and kind <= K_NESTED_INTR:
        m[r + C] = kind - K_NESTED_VMEXIT
        return exits.nested(m, p, r)
    if kind == K_USERSPACE:
        return exits.userspace(m, p, r)
    if kind == K_WAKEUP:
        return exits.wakeup(m, p, r)
    if kind == K_HALT_POLL:
        return exits.halt_poll(m, p, r)
    if kind == K_PAGE_FAULT:
        return exits.page_fault(m, p, r)
    if kind == K_CPUID:
        return accesses.cpuid(m, p, r)
    if kind == K_CR:
        return accesses.control_register(m, p, r)
    if kind == K_INCOMPLETE_IPI:
        return interrupts.incomplete_ipi(m, p, r)
    if kind == K_UNACCELERATED:
        return interrupts.unaccelerated(m, p, r)
    if kind == K_DOORBELL:
        return interrupts.doorbell(m, p, r)
    if kind == K_HV_TIMER:
        return interrupts.hv_timer(m, p, r)
    if kind == K_PI_IRTE:
        return chips.irte(m, p, r)
    if kind == K_SMM:
        return accesses.smm(m, p, r)
    if kind == K_SWITCH:
        return switches.switch(m, p, r)
    if kind == K_KVM:
        return exits.generic(m, p, r)
    m[NAME] = m[EVENT_NAME]
    return rest(p)


@kernel("u8(words, u8, u8)")
def event(m, p, r):
    """An event from its name on. p is at something that is no blank; the result is a line end, or 0."""
    begin = p
    c = load_byte(p)
    if m[CLASSES + c] & WORDLIKE and c - DIGIT_ZERO > NINE:
        while m[CLASSES + load_byte(p)] & WORDLIKE:
            p += ONE
        if load_byte(p) == COLON:
            c = load_byte(p + ONE)
            if m[CLASSES + c] & WORDLIKE == ZERO:
                return named(m, begin, p, r)
            if c - DIGIT_ZERO > NINE:  # perf's kvm:kvm_exit
                begin = p + ONE
                p = begin
                while m[CLASSES + load_byte(p)] & WORDLIKE:
                    p += ONE
                if load_byte(p) == COLON and m[CLASSES + load_byte(p + ONE)] & WORDLIKE == ZERO:
                    return named(m, begin, p, r)
        p = begin
    m[r + WHAT] = ZERO
    return ZERO if rest(p) == ZERO else without_kvm(p)


@kernel("u8(words, u8, u8, u8)")
def named(m, begin, colon, r):
    """An event whose name is known to be one."""
    if colon - begin > LONGEST_NAME or literal(colon, TORN):
        return ZERO
    e = entry(m, begin, colon - begin)
    if e == ZERO:
        return ZERO
    m[EVENT_NAME] = m[e + NAME_INDEX]
    m[r + WHAT] = m[e + NAME_EVENT] & FLAG_MASK
    return body(m, m[e + NAME_KIND], skip(colon + ONE), r)
