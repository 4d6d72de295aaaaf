"""The table of docs/lenient.md: where the manual and KVM differ, register by register, each asked of the model.

A row's story is what is done to a machine with two vCPUs, in the words of docs/apic-protocol.md; what its last line
comes to is shown, and a #GP on the way, for the profile ``sdm`` and for every kernel generation. Sections are those of
SDM vol. 3A in the editions whose chapter 10 is the APIC; later ones count the same sections as 11.x or 12.x.
"""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

import fastexit as fx
from fastexit import regs as R
from fastexit.outcome import GeneralProtection, Outcome
from fastexit.profile import PROFILES, SDM

SAME = "the same"
"""What the manual's profile and every generation do alike."""
X2APIC, XAPIC = "x2apic", "xapic"


class Row(NamedTuple):
    """One rule. ``sdm`` and ``kvm`` say it in words, ``guests`` who counts on KVM's way, ``story`` asks."""

    register: str
    section: str
    sdm: str
    kvm: str
    story: str
    guests: str = ""


ROWS = (
    Row(
        "ID",
        "10.12.1.2",
        "read-only in x2APIC mode: a write faults",
        SAME,
        "x2apic; wrmsr 0 0x802 1",
    ),
    Row(
        "TPR",
        "10.12.1.3",
        "bits 31:8 are reserved and fault in x2APIC mode",
        "they are dropped",
        "x2apic; wrmsr 0 0x808 0x1f0; rdmsr 0 0x808",
    ),
    Row("TPR, xAPIC", "10.8.3.1", "bits 31:8 read as 0", SAME, "xapic; write 0 0x80 0x1f0; read 0 0x80"),
    Row(
        "EOI",
        "10.12.1.2",
        "anything but 0 faults in x2APIC mode, and nothing ends",
        "whatever is written ends an interrupt",
        "x2apic; wrmsr 0 0x83f 0x41; ack 0; wrmsr 0 0x80b 1; rdmsr 0 0x812",
    ),
    Row("EOI", "10.12.1.2", "a read faults in x2APIC mode", SAME, "x2apic; rdmsr 0 0x80b"),
    Row("LDR", "10.12.10.2", "derived from the id and read-only in x2APIC mode", SAME, "x2apic; wrmsr 1 0x80d 2"),
    Row("LDR, xAPIC", "10.6.2.2", "bits 23:0 read as 0", SAME, "xapic; write 0 0xd0 0x1234567; read 0 0xd0"),
    Row("DFR", "10.12.1.2", "no register in x2APIC mode", SAME, "x2apic; rdmsr 0 0x80e"),
    Row("DFR, xAPIC", "10.6.2.2", "bits 27:0 read as 1", SAME, "xapic; write 0 0xe0 0; read 0 0xe0"),
    Row(
        "SVR",
        "10.12.1.3",
        "bits 31:13, 11 and 10 are reserved, and 9 where there is no focus checking; they fault",
        "they are dropped, bit 9 is kept",
        "x2apic; wrmsr 0 0x80f 0x21ff; rdmsr 0 0x80f",
    ),
    Row(
        "SVR, xAPIC",
        "10.9",
        "bit 9 reads as 0 where there is no focus checking",
        "it is kept",
        "xapic; write 0 0xf0 0x3ff; read 0 0xf0",
        "Linux sets it where it finds no table of processors, and does not read it back",
    ),
    Row(
        "SVR",
        "10.4.7.2",
        "software-disabled: entries of the LVT are masked",
        SAME,
        "x2apic; wrmsr 0 0x832 0x41; wrmsr 0 0x80f 0xff; rdmsr 0 0x832",
    ),  # fmt: skip
    Row("ESR", "10.5.3", "anything but 0 faults in x2APIC mode", SAME, "x2apic; wrmsr 0 0x828 1"),
    Row(
        "ESR",
        "10.5.3",
        "an IPI with a vector below 16: send illegal vector, at the sender",
        "no error is ever logged, ESR stays 0",
        "x2apic; wrmsr 0 0x830 0x100000005; wrmsr 0 0x828 0; rdmsr 0 0x828",
        "Linux prints a line at each error interrupt: under KVM it never does",
    ),
    Row(
        "ESR",
        "10.5.3",
        "... and receive illegal vector at whom it reaches",
        "as above",
        "x2apic; wrmsr 0 0x830 0x100000005; wrmsr 1 0x828 0; rdmsr 1 0x828",
    ),
    Row(
        "ESR",
        "10.5.3",
        "a self-IPI with such a vector is both; a write shows what was logged since the last one",
        "as above",
        "x2apic; wrmsr 0 0x83f 5; wrmsr 0 0x828 0; rdmsr 0 0x828",
    ),
    Row(
        "ESR, xAPIC",
        "10.5.3, table 10-1",
        "an access to a register that there is not: illegal register address",
        "it vanishes; a load leaves its destination alone",
        "xapic; write 0 0x40 1; write 0 0x280 0; read 0 0x280",
    ),
    Row(
        "IRR",
        "10.5.2",
        "vectors below 16 never get there",
        "16 bits of IRR more; class 0 is never above PPR, so nobody takes them",
        "x2apic; wrmsr 0 0x830 0x100000005; rdmsr 1 0x820",
    ),
    Row(
        "ICR",
        "10.12.9",
        "reserved bits fault in x2APIC mode",
        "kept at first, as written; later they fault",
        "x2apic; wrmsr 0 0x830 0x1001000fd; rdmsr 0 0x830",
        "nobody: they came to fault in stable kernels",
    ),
    Row(
        "ICR",
        "10.12.9",
        "bit 12, delivery status in xAPIC mode, is reserved in x2APIC mode",
        "it is dropped",
        "x2apic; wrmsr 0 0x830 0x1000010fd; rdmsr 0 0x830",
    ),
    Row(
        "ICR, xAPIC",
        "10.6.1",
        "reserved bits read as 0",
        "they read as written",
        "xapic; write 0 0x300 0x1020fd; read 0 0x300",
    ),
    Row(
        "ICR, xAPIC",
        "10.6.1",
        "delivery status is read-only; an IPI that has left reads 0",
        SAME,
        "xapic; write 0 0x300 0x10fd; read 0 0x300",
        "Linux polls it before it sends, and waits as long as it reads 1",
    ),
    Row("ICR2", "10.12.1.2", "no register in x2APIC mode", SAME, "x2apic; wrmsr 0 0x831 0"),
    Row(
        "LVT, timer",
        "10.12.1.3",
        "reserved bits fault in x2APIC mode, 11:8 among them",
        "they are dropped",
        "x2apic; wrmsr 0 0x832 0x741; rdmsr 0 0x832",
    ),
    Row(
        "LVT, timer",
        "10.5.1",
        "delivery status is read-only and 0 where nothing waits",
        "it is kept as written",
        "x2apic; wrmsr 0 0x832 0x1041; rdmsr 0 0x832",
    ),
    Row(
        "LVT, thermal",
        "10.12.1.3",
        "bits 15:13 fault in x2APIC mode",
        "they are dropped",
        "x2apic; wrmsr 0 0x833 0x2041; rdmsr 0 0x833",
    ),
    Row(
        "LVT, LINT0",
        "10.5.1",
        "remote IRR is read-only",
        "it is kept as written",
        "x2apic; wrmsr 0 0x835 0xc700; rdmsr 0 0x835",
    ),
    Row(
        "LVT, LINT0",
        "10.4.7.1",
        "masked after a reset, as all entries are",
        "ExtINT and open on the BSP (KVM_X86_QUIRK_LINT0_REENABLED)",
        "read 0 0x350",
        "firmware that takes the PIC's interrupts and does not open LINT0",
    ),
    Row(
        "LVT, error",
        "10.5.3",
        "the first error since ESR was written is its interrupt",
        "it never comes",
        "x2apic; wrmsr 0 0x837 0xfe; wrmsr 0 0x83f 5; pending 0",
    ),
    Row(
        "TDCR",
        "10.12.1.3",
        "bit 2 and bits 31:4 fault in x2APIC mode",
        "read as written at first, dropped later",
        "x2apic; wrmsr 0 0x83e 0x1f; rdmsr 0 0x83e",
    ),
    Row(
        "TMICT",
        "10.5.4",
        "any period",
        "periodic timers have a shortest period, 200 us (min_timer_period_us)",
        "x2apic; wrmsr 0 0x832 0x20041; wrmsr 0 0x83e 0xb; wrmsr 0 0x838 1000; due",
        "hosts: a guest could keep one busy with its timer alone",
    ),
    Row(
        "LVT, timer",
        "10.5.1",
        "a timer that runs out while it is masked interrupts nobody",
        "the tick waits, and is an interrupt once the entry is open",
        "x2apic; wrmsr 0 0x832 0x10041; wrmsr 0 0x838 100; time 1000; wrmsr 0 0x832 0x41; pending 0",
    ),
    Row(
        "SELF IPI",
        "10.12.11",
        "bits 31:8 are reserved and fault",
        "an IPI all the same at first; later they fault",
        "x2apic; wrmsr 0 0x83f 0x1041; pending 0",
    ),
    Row(
        "SELF IPI",
        "10.12.11",
        "leaves the ICR alone",
        "an ICR write at first, which can be read back",
        "x2apic; wrmsr 0 0x83f 0x41; rdmsr 0 0x830",
    ),
    Row(
        "bits 63:32",
        "10.12.1.2",
        "reserved in every x2APIC register but the ICR; they fault",
        "ignored at first; later they fault",
        "x2apic; wrmsr 0 0x838 0x100000001",
    ),
    Row("MSRs that are no register", "10.12.1.2", "fault", SAME, "x2apic; rdmsr 0 0x804"),
    Row(
        "APICBASE",
        "10.12.5.1",
        "EXTD without EN, xAPIC from x2APIC mode, x2APIC mode from disabled: fault",
        SAME,
        "x2apic; wrmsr 0 0x1b 0xfee00900",
        "Linux leaves x2APIC mode by way of disabled, which is allowed",
    ),
    Row(
        "APICBASE",
        "10.12.5.1",
        "disabled and enabled again: all registers but the id begin anew",
        "they are as they were",
        "x2apic; wrmsr 0 0x808 0x40; wrmsr 0 0x1b 0xfee00100; wrmsr 0 0x1b 0xfee00900; read 0 0x80",
    ),
    Row(
        "the page",
        "10.12.2",
        "x2APIC mode: no APIC is behind it",
        "a load gives all ones, a store vanishes (KVM_X86_QUIRK_LAPIC_MMIO_HOLE); else it is user space's",
        "x2apic; read 0 0x20",
    ),
    Row(
        "destination 0xFF",
        "10.12.9, 10.12.10",
        "a message's 0xFF is an x2APIC id like others",
        "everybody, unless user space asks for the manual's way (KVM_CAP_X2APIC_API)",
        "x2apic; msi 0xfeeff000 0x41; pending 1",
        "guests in x2APIC mode without interrupt remapping, whose IOAPIC has 8-bit destinations",
    ),
)
"""In the order of the page, then what is of no register."""


def answer(kernel: str, story: str) -> str:
    """What the last line of a story comes to on a machine of a kernel, or of the manual."""
    m = fx.Machine(vcpus=2, kernel=kernel, apicv=False, hv_timer=False, threads=False)
    for v in m.vcpus:
        v.set_mp_state(R.MP_RUNNABLE)
    said = [_said(m, *line.split()) for line in story.split("; ")]
    return f"#GP, then {said[-1]}" if "#GP" in said[:-1] else said[-1]


def _said(m: fx.Machine, word: str, *rest: str) -> str:
    numbers = [int(text, 0) for text in rest]
    if word == X2APIC:
        m.boot_x2apic()
        return "ok"
    if word == XAPIC:
        return str([v.mmio_write(R.APIC_SPIV, 0x1FF) for v in m.vcpus])
    if word == "msi":
        return str(m.signal_msi(*numbers))
    if word == "due":
        due = m.next_timer()
        return "never" if due is None else f"in {due - m.time:,} ns"
    if word == "time":
        return str(m.set_time(*numbers))
    vcpu, arguments = m.vcpus[numbers[0]], numbers[1:]
    names = {"write": "mmio_write", "read": "mmio_read"}
    if word == "pending":
        vcpu.settle()
    try:
        result = getattr(vcpu, names.get(word, word))(*arguments)
    except GeneralProtection:
        return "#GP"
    if isinstance(result, Outcome):
        return "#GP" if result.fault else "ok"
    if word == "read" and vcpu.user_mmio is not None:
        return "user space's"
    return "none" if result is None else f"{int(result):#x}"


def answers(row: Row) -> dict[str, str]:
    """What every generation answers, oldest first, and the manual's profile."""
    return {kernel: answer(kernel, row.story) for kernel in (*PROFILES, SDM.name)}


def spans(found: dict[str, str]) -> str:
    """Answers of generations, runs of the same one told once."""
    runs = [(said, [kernel for kernel, _ in run]) for said, run in groupby(found.items(), key=lambda one: one[1])]
    if len(runs) == 1:
        return f"`{runs[0][0]}`"
    last = len(runs) - 1
    return "; ".join(
        f"from {kernels[0]} `{said}`" if n == last
        else f"{kernels[0]} `{said}`" if len(kernels) == 1
        else f"{kernels[0]} to {kernels[-1]} `{said}`"
        for n, (said, kernels) in enumerate(runs)
    )  # fmt: skip


def table() -> str:
    """Every row, with what was asked and answered."""
    lines = [
        "| register | the manual | KVM | asked | `sdm` | kernels | who counts on it |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        found = answers(row)
        sdm = found.pop(SDM.name)
        lines.append(
            f"| {row.register} | {row.sdm} ({row.section}) | {row.kvm} | `{row.story}` "
            f"| `{sdm}` | {spans(found)} | {row.guests} |"
        )
    return "\n".join(lines)


SECTIONS = {"registers": table}
