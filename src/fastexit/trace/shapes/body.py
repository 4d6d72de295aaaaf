"""What a line says of an event, as KVM's own text says it, whatever form the tool gave it."""

from __future__ import annotations

import re

from fastexit.trace.events import UNREADABLE, parse
from fastexit.trace.shapes import fields
from fastexit.trace.shapes.line import LINE

SYSTEM = re.compile(rb"[a-z]\w*:(?=[a-z]\w*:)")
"""The event's system, which perf prints in front of its name."""
NAME = re.compile(rb"[a-zA-Z_]\w*:")

_NAMELESS = (
    (re.compile(rb"msr_(?:read|write) \w+ = "), b"kvm_msr"),
    (re.compile(rb"apic_(?:read|write) \w+ = "), b"kvm_apic"),
    (re.compile(rb"dst \w+ vec \d+ \(\w+\|\w+\|(?:de-)?assert\|"), b"kvm_apic_ipi"),
    (re.compile(rb"apicid \w+ vec \d+ \("), b"kvm_apic_accept_irq"),
    (re.compile(rb"apicid \w+ vector -?\d+$"), b"kvm_eoi"),
    (re.compile(rb"(?:vcpu \d+ )?reason (?!KVM_EXIT)\w+ rip 0x"), b"kvm_exit"),
    (re.compile(rb"vcpu \d+(?:,? rip 0x\w+.*)?$"), b"kvm_entry"),
    (re.compile(rb"mmio (?:unsatisfied-read|read|write) len "), b"kvm_mmio"),
    (re.compile(rb"dst \w+ vec \d+ \(\w+\|\w+\|(?:edge|level)"), b"kvm_msi_set_irq"),
    (re.compile(rb"(?:wait|poll) time \d+ ns, polling "), b"kvm_vcpu_wakeup"),
    (re.compile(rb"vcpu \d+: halt_poll_ns "), b"kvm_halt_poll_ns"),
    (re.compile(rb"vcpu \d+: delta -?\d+ \("), b"kvm_wait_lapic_expire"),
    (re.compile(rb"vcpu_id \w+ hv_timer [01]$"), b"kvm_hv_timer_state"),
    (re.compile(rb"vcpu \d+ rip 0x\w+ address 0x"), b"kvm_page_fault"),
    (re.compile(rb"func \w+ idx \w+ rax "), b"kvm_cpuid"),
    (re.compile(rb"(?:un)?load$"), b"kvm_fpu"),
    (re.compile(rb"#[A-Z]{2}(?: \(0x\w+\))?(?: \[reinjected\])?$"), b"kvm_inj_exception"),
    (re.compile(rb"gsi \d+ level -?\d source \d+$"), b"kvm_set_irq"),
    (re.compile(rb"pin \d+ dst \w+ vec \d+ \("), b"kvm_ioapic_set_irq"),
    (re.compile(rb"chip [01] pin \d \("), b"kvm_pic_set_irq"),
    (re.compile(rb"irqchip \w.* pin \d+$"), b"kvm_ack_irq"),
    (re.compile(rb"reason KVM_EXIT_\w+ \(\d+\)$"), b"kvm_userspace_exit"),
    (re.compile(rb"pio_(?:read|write) at 0x"), b"kvm_pio"),
    (re.compile(rb"cr_(?:read|write) \w+ = 0x"), b"kvm_cr"),
    (re.compile(rb"(?:IRQ 0x[0-9a-f]+|irq \d+)(?: \[reinjected\])?$"), b"kvm_inj_virq"),
)
"""Texts that only one event has, for lines without the event's name."""


_REMARK = re.compile(rb"\s+(?:<|//|# |\xe2\x86\x90).*$")
"""What somebody wrote behind a line: ``<-- here``, ``// why``."""


def in_fields(body: bytes) -> bool:
    """True for an event of KVM whose fields are printed in place of its text."""
    name, _, payload = body.partition(b":")
    return name.startswith(b"kvm_") and fields.in_fields(payload.lstrip())


def from_fields(body: bytes, *, hexadecimal: bool) -> bytes | None:
    """KVM's text for such an event; None where nobody knows it."""
    name, _, payload = body.partition(b":")
    return fields.told(name, payload, hexadecimal=hexadecimal)


def named(body: bytes) -> bytes:
    """The text of an event without the event's name, with it where it can be told."""
    return next((name + b": " + body for text, name in _NAMELESS if text.match(body)), body)


def readable(body: bytes) -> bool:
    """True where an event can be made of it, and of one line only: two writers may have torn each other's."""
    return b": kvm_" not in body and parse(body) is not UNREADABLE


def whole(line: bytes) -> bool:
    """True for a canonical line whose event can be read."""
    match = LINE.fullmatch(line)
    return match is not None and readable(match["body"])


def told(body: bytes, args: bytes = b"", *, hexadecimal: bool = False) -> bytes | None:
    """KVM's text of an event; None where it cannot be read.

    ``args`` are the fields that perf trace prints, if any; ``hexadecimal`` says how a script prints numbers.
    """
    body = SYSTEM.sub(b"", body, count=1)
    if args:
        body = fields.told(body.partition(b":")[0], args, decimal=True) or body
    elif in_fields(body):
        body = from_fields(body, hexadecimal=hexadecimal) or body
    elif not NAME.match(body):
        body = named(body)
    if readable(body):
        return body
    bare = b" ".join(_REMARK.sub(b"", body).split())
    return bare if bare != body and readable(bare) else None
