"""Published before/after figures, and the same exits run on the model: what docs/cost-model.md compares.

Each Pair says how it is measured on the model, which constant was calibrated on it if any, and why it misses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import fastexit as fx
from fastexit.costs.meter import TimedOutcome
from fastexit.costs.profile import cost_profile

IPI = fx.icr(dest=1, vector=0xFD)
IF = 1 << 9
TIMER_VECTOR = 0xE0


def booted(kernel: str, costs: str, fastpath: bool = True, x2apic: bool = True, **options: Any) -> fx.Machine:
    """Four vCPUs in the guest."""
    m = fx.Machine(vcpus=4, kernel=kernel, costs=costs, **options)
    if x2apic:
        m.boot_x2apic()
    m.fastpath = fastpath
    for v in m.vcpus:
        if not x2apic:
            v.mmio_write(0xF0, 0x1FF)
        m.dispatcher.start_run(v)
    for v in m.vcpus:
        v.exit(
            fx.SvmExit.CPUID if m.vendor == "svm" else fx.VmxExit.CPUID
        )  # whoever had to scan for a new APIC map is in the guest again
    return m


def ipi(kernel: str, costs: str, fastpath: bool, **options: Any) -> TimedOutcome:
    """One unicast IPI to a running vCPU, posted."""
    return booted(kernel, costs, fastpath, **options).vcpus[0].wrmsr(0x830, IPI)


def until_sent(kernel: str, costs: str, fastpath: bool, **options: Any) -> float:
    """Cycles until it has left."""
    return ipi(kernel, costs, fastpath, **options).cycles_ipi


def between_lines(kernel: str, costs: str, fastpath: bool, **options: Any) -> float:
    """us from kvm_exit to kvm_entry, as ``perf kvm stat`` counts an exit: in these kernels both lines are late, from
    handle_exit to the VM entry, so a fast handler is over when the clock starts."""
    charges = ipi(kernel, costs, fastpath, **options).charges
    steps = [charge.step for charge in charges]
    first, last = steps.index("handle_exit"), steps.index("vm_entry")
    return cost_profile(costs).ns(sum(charge.cycles for charge in charges[first:last])) / 1000


def round_trip(reason: int, costs: str, kernel: str = "5.6") -> float:
    """Cycles of an exit that does next to nothing."""
    v = booted(kernel, costs, retpoline=False).vcpus[0]
    return (v.hypercall(99) if reason == fx.VmxExit.VMCALL else v.exit(reason)).cycles


def tscdeadline_exits(kernel: str, costs: str, fastpath: bool, apicv: bool) -> tuple[TimedOutcome, int]:
    """WRMSR TSC_DEADLINE with a time that has passed, and cycles of the EOI behind the interrupt."""
    m = booted(kernel, costs, fastpath, apicv=apicv)
    v = m.vcpus[0]
    v.wrmsr(0x832, TIMER_VECTOR | 2 << 17)
    m.set_time(1_000_000)
    v.rflags |= IF
    out = v.wrmsr(0x6E0, 1)
    vector = v.hw_deliver() if apicv else v.injected
    assert vector == TIMER_VECTOR, (kernel, vector)
    v.rflags &= ~IF
    return out, v.hw_wrmsr(0x80B, 0).cycles


def tscdeadline_immed(kernel: str, costs: str, fastpath: bool, apicv: bool) -> float:
    """Cycles of that WRMSR, up to the end of the guest's interrupt handler."""
    out, eoi = tscdeadline_exits(kernel, costs, fastpath, apicv)
    return out.cycles + cost_profile(costs)["guest_irq"] + eoi


def tscdeadline_injected_at_once(costs: str) -> float:
    """The same without APICv, if the fast handler injects by itself and re-enters: put together, no kernel does it.

    5.8's re-entry with APICv, which sets IRR without a call through a pointer, looks for the event and injects it.
    """
    profile = cost_profile(costs)
    out, _ = tscdeadline_exits("5.8", costs, True, apicv=True)
    _, eoi = tscdeadline_exits("5.8", costs, True, apicv=False)
    injection = profile["event_check"] + profile["inject"] + 2 * profile["vendor_call"]
    return out.cycles - profile["vendor_call"] + injection + profile["guest_irq"] + eoi


def ipi_test(kernel: str, costs: str, ipiv: bool, x2apic: bool = True) -> float:
    """Cycles of kvm-unit-tests' ``ipi`` with a target that polls: until its handler is done and the sender is back."""
    m = booted(kernel, costs, x2apic=x2apic, ipiv=ipiv)
    profile, v = m.costs, m.vcpus[0]
    if x2apic:
        out, before = v.hw_wrmsr(0x830, IPI), 0
    else:
        before = v.hw_mmio_write(0x310, 1 << 24).cycles
        out = v.hw_mmio_write(0x300, 0xFD)
    there = out.cycles_ipi + profile["flight"] + profile["posted"] + profile["guest_irq"] + profile["hw_access"]
    return before + max(there, out.cycles)


class Pair(NamedTuple):
    """A published pair, how the model does the same, and what is to be said about the difference.

    ``calibrates`` names the side or the difference that a constant was fitted to, and the constant; "" is a prediction
    throughout. ``published`` may lack its sides when only the difference is known.
    """

    title: str
    unit: str
    before: float | None
    after: float | None
    difference: float
    source: str
    profile: str
    modelled: Callable[[bool], float]
    calibrates: str
    remark: str


FAST_PATH_V1 = "Message-Id 1573283135-5502-1-git-send-email-wanpengli@tencent.com"
DEADLINE = "cover letter 1587468026-15753-1-git-send-email-wanpengli@tencent.com"
DEADLINE_V3 = "cover letter 1587709364-19090-1-git-send-email-wanpengli@tencent.com"
DEADLINE_V4 = "cover letter 1588055009-12677-1-git-send-email-wanpengli@tencent.com"
IPIV = "IPI virtualization series v4 (v1: Message-Id 20210716064808.14757-1-guang.zeng@intel.com)"
RETPOLINE, OFF, IPIV_HOST = "skylake-retpoline", "skylake-mitigations-off", "ipiv-host"

BETWEEN_LINES = (
    "`perf kvm stat` counts from the kvm_exit line to the kvm_entry line, and the time that perf takes to write a "
    "record is inside; the model has no cost for it. "
)

PAIRS = (
    Pair(
        "v1 of the fast path, right behind the VM exit: until the IPI leaves",
        "cycles",
        None,
        None,
        -330,
        FAST_PATH_V1,
        RETPOLINE,
        lambda after: until_sent("5.8" if after else "seed-v3", RETPOLINE, after, retpoline=False),
        "`vendor_call` and `dispatch_indirect` of skylake-retpoline, on the difference",
        "5.8 stands for v1, whose hook was there too. Published as 330 and more.",
    ),
    Pair(
        "v2 and v3, in handle_exit_irqoff: until the IPI leaves",
        "cycles",
        None,
        None,
        -200,
        "commit 1e9e2622a149",
        RETPOLINE,
        lambda after: until_sent("seed-v3", RETPOLINE, after, retpoline=False),
        "",
        "Published as 200 and more. The position of the hook costs what steps 13 and 14 do.",
    ),
    Pair(
        "hackbench, average MSR_WRITE, retpolines",
        "us",
        1.08,
        0.58,
        -0.50,
        FAST_PATH_V1,
        RETPOLINE,
        lambda after: between_lines("5.8" if after else "seed-v3", RETPOLINE, after, retpoline=False),
        "",
        BETWEEN_LINES
        + "The two averages are of different regimes: by the mail's own columns (5,417,390 exits at 1.08 us are "
        "16.31 % of the time, 6,726,109 at 0.58 us are 62.18 %) all other exits, HLT and its sleep among them, fell "
        "from 30 s to 2.4 s. It seems that before, more writes had a sleeper to wake, at 0.6 us each (`wake`); the "
        "model's IPI goes to a running target on both sides. What share had to wake is not published. Compare the "
        "next row.",
    ),
    Pair(
        "hackbench, shortest MSR_WRITE, retpolines",
        "us",
        0.69,
        0.48,
        -0.21,
        FAST_PATH_V1,
        RETPOLINE,
        lambda after: between_lines("5.8" if after else "seed-v3", RETPOLINE, after, retpoline=False),
        "",
        BETWEEN_LINES + "Both sides are too short by the same 0.38 us, so the difference is what can be compared.",
    ),
    Pair(
        "hackbench, average MSR_WRITE, mitigations=off",
        "us",
        0.73,
        0.40,
        -0.33,
        FAST_PATH_V1,
        OFF,
        lambda after: between_lines("5.8" if after else "seed-v3", OFF, after, retpoline=False),
        "",
        "As with retpolines; the share of the time is not published here.",
    ),
    Pair(
        "hackbench, shortest MSR_WRITE, mitigations=off",
        "us",
        0.38,
        0.30,
        -0.08,
        FAST_PATH_V1,
        OFF,
        lambda after: between_lines("5.8" if after else "seed-v3", OFF, after, retpoline=False),
        "",
        "Missed by a factor of two. Each is one exit out of millions, in steps of 0.01 us; that the shortest one found "
        "ON set and sent no notification (150 cycles, 0.06 us) is possible and not known.",
    ),
    Pair(
        "tscdeadline_immed, APICv, v1 of that series",
        "cycles",
        2919,
        2467.75,
        -451.25,
        DEADLINE,
        RETPOLINE,
        lambda after: tscdeadline_immed("5.8" if after else "5.7", RETPOLINE, after, apicv=True),
        "",
        "Both sides lack some 700 cycles, and so does row 10 on its side before: whatever the timer, the guest's "
        "handler and the test's loop take beyond `timer` and `guest_irq`. Which of them is not known, and no constant "
        "is fitted to it.",
    ),
    Pair(
        "tscdeadline_immed, APICv, v3",
        "cycles",
        2885,
        2431.25,
        -453.75,
        DEADLINE_V3,
        RETPOLINE,
        lambda after: tscdeadline_immed("5.8" if after else "5.7", RETPOLINE, after, apicv=True),
        "",
        "Three days later: the same before, measured again.",
    ),
    Pair(
        "tscdeadline_immed, APICv, v4",
        "cycles",
        3028.50,
        2494.75,
        -533.75,
        DEADLINE_V4,
        RETPOLINE,
        lambda after: tscdeadline_immed("5.8" if after else "5.7", RETPOLINE, after, apicv=True),
        "",
        "v4 is nearest to what 5.8 has. Over rows 7 to 9, a week apart, the side before differs by 5 %, the difference "
        "by 18 %: no model can be held to less.",
    ),
    Pair(
        "tscdeadline_immed, no APICv, v1, against 5.8 as it was released",
        "cycles",
        4780.75,
        3851,
        -929.75,
        DEADLINE,
        RETPOLINE,
        lambda after: tscdeadline_immed("5.8" if after else "5.7", RETPOLINE, after, apicv=False),
        "`mitigation_exit` and `mitigation_entry` of skylake-retpoline, together, on this side before less that of row "
        "7: one exit more, EOI's, and an injection",
        "Not the same code. v1 injected in the fast handler and re-entered (Message-Id "
        "1587632507-18997-2-git-send-email-wanpengli@tencent.com says so of v2), which was dropped: from v3 on and in "
        "5.8 the expired timer leaves a request behind, and the exit goes all the way around. v4 meant to switch the "
        "fast path off without APICv, as of no use there (Message-Id "
        "1588055009-12677-3-git-send-email-wanpengli@tencent.com), and later covers have no figure without APICv. 5.8 "
        "saves MSR emulation and dispatch, and nothing else: that is the modelled difference.",
    ),
    Pair(
        "tscdeadline_immed, no APICv, v1, its injection put together from the stages",
        "cycles",
        4780.75,
        3851,
        -929.75,
        DEADLINE,
        RETPOLINE,
        lambda after: (
            tscdeadline_injected_at_once(RETPOLINE) if after else tscdeadline_immed("5.7", RETPOLINE, False, False)
        ),
        "",
        "What v1 measured: re-entry at once, with the injection in the fast handler. No generation has it, so it is no "
        "run of the dispatcher. Some 350 cycles remain unexplained; the saving is twice that with APICv, although the "
        "steps skipped are the same but for serving one request.",
    ),
    Pair(
        "kvm-unit-tests ipi, x2APIC, with IPI virtualisation",
        "cycles",
        4337.85,
        3644.80,
        -693.05,
        IPIV,
        IPIV_HOST,
        lambda after: ipi_test("6.1", IPIV_HOST, ipiv=after),
        "`flight`, `posted` and `guest_irq` of ipiv-host, together, on the figure after",
        "The difference is the exit up to the notification less what the CPU needs for the same: predicted.",
    ),
    Pair(
        "kvm-unit-tests ipi, xAPIC, with IPI virtualisation",
        "cycles",
        6059,
        4713,
        -1346,
        IPIV,
        IPIV_HOST,
        lambda after: ipi_test("6.1", IPIV_HOST, ipiv=after, x2apic=False),
        "",
        "The figure after lacks 1000 cycles as well, so xAPIC mode costs the guest something that neither side of the "
        "model has: accesses to the page around the write of the ICR, perhaps. The exit itself (APIC_WRITE, never "
        "fast) is too cheap here by some 550 cycles.",
    ),
    Pair(
        "exit round trip, CPUID (before and after the TR reload went)",
        "cycles",
        1313,
        1291,
        -22,
        "commit b7ffc44d5b2e",
        OFF,
        lambda after: round_trip(fx.VmxExit.CPUID, OFF),
        "`vm_exit` + `vm_entry` of skylake-mitigations-off, on the figure after",
        "The change itself is below the model's resolution: no generation has it.",
    ),
    Pair(
        "exit round trip, VMCALL (the same change)",
        "cycles",
        1195,
        1181,
        -14,
        "commit b7ffc44d5b2e",
        OFF,
        lambda after: round_trip(fx.VmxExit.VMCALL, OFF),
        "",
        "The figure after is predicted; the change is no generation's.",
    ),
)
