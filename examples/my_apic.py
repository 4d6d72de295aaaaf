#!/usr/bin/env python3
"""A local APIC, x2APIC mode alone: fastexit verify --against examples/my_apic.py --well-formed"""

import sys

TPR, EOI, SVR, ICR, SELF_IPI, LVT = 0x808, 0x80B, 0x80F, 0x830, 0x83F, range(0x832, 0x838)
LVTS = dict(zip(LVT, (0x700FF, 0x107FF, 0x107FF, 0x1A7FF, 0x1A7FF, 0x100FF)))
KEPT = {TPR: 0xFF, SVR: 0x1FF, 0x838: 0xFFFFFFFF, 0x83E: 0xB} | LVTS
RESET = {0x803: 0x1050014, TPR: 0, 0x80E: 0xFFFFFFFF, SVR: 0xFF, 0x828: 0, ICR: 0} | dict.fromkeys(LVT, 0x10000)


class Apic:
    def __init__(self, number):
        self.id, self.base, self.irr, self.isr = number, 0xFEE00800 | (number == 0) << 8, set(), set()
        self.msr, self.ldr = dict.fromkeys(KEPT, 0) | RESET, number >> 4 << 16 | 1 << number % 16

    def rdmsr(self, msr):
        if msr in range(0x810, 0x828):  # ISR, TMR, IRR: 32 vectors each
            return sum(1 << v % 32 for v in (self.isr, (), self.irr)[msr - 0x810 >> 3] if v // 32 == msr % 8)
        at, ppr = self.base >> 10 & 1, max(self.msr[TPR], max(self.isr, default=0) & 0xF0, key=lambda p: p >> 4)
        shown = {0x1B: self.base, 0x802: self.id << 24 * (1 - at), 0x80A: ppr, 0x80D: self.ldr * at}
        return shown.get(msr, self.msr.get(msr, "gp"))

    def wrmsr(self, msr, value):
        if msr == 0x1B:
            self.base = value  # there is no way back out of x2APIC mode here
        elif msr == EOI:
            self.isr.discard(max(self.isr, default=None))
        elif msr in (ICR, SELF_IPI):
            self.msr[ICR] = value if msr == ICR else self.msr[ICR]
            self.send(value if msr == ICR else value | 1 << 18)
        else:
            off = 0 if (value if msr == SVR else self.msr[SVR]) & 0x100 else 0x10000  # then entries are masked
            self.msr |= {msr: value & KEPT.get(msr, 0)}
            self.msr |= {lvt: self.msr[lvt] | off for lvt in LVT}

    def ack(self):
        if (top := self.pending()) != "none":
            self.irr, self.isr = self.irr - {top}, self.isr | {top}
        return top

    def pending(self):
        top = max(self.irr, default=0)
        return top if top >> 4 > self.rdmsr(0x80A) >> 4 else "none"

    def lapic(self):
        shown = [self.rdmsr(msr) for msr in range(0x800, 0x840)]
        return b"".join((0 if value == "gp" else value).to_bytes(16, "little") for value in shown).hex()

    def send(self, icr):
        for apic in apics:
            logical = icr >> 48 == apic.ldr >> 16 and icr >> 32 & apic.ldr & 0xFFFF
            hit = icr >> 32 == 0xFFFFFFFF or (logical if icr & 1 << 11 else icr >> 32 == apic.id)
            hit = (hit, apic is self, True, apic is not self)[icr >> 18 & 3]
            if hit and apic.msr[SVR] & 0x100 and icr >> 8 & 7 == 0:
                apic.irr.add(icr & 0xFF)


for line in sys.stdin:
    word, *rest = line.split()
    if word == "hello":
        said = "1 my_apic wrmsr rdmsr lapic msi pending ack"
    elif word == "machine":
        apics, said = [Apic(int(number)) for number in rest[0].split(",")], ""
    elif word == "msi":
        address, data = (int(text, 0) for text in rest)
        said = apics[0].send(data | (address >> 12 & 0xFF | address >> 32 & ~0xFF) << 32)
    else:
        said = getattr(apics[int(rest[0])], word)(*(int(text, 0) for text in rest[1:]))
    print("gp" if said == "gp" else f"ok {'' if said is None else said}".strip(), flush=True)
