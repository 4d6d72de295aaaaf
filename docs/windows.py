"""The tables of docs/windows.md: by which door a Windows guest reaches its APIC, who takes it fast, what it costs.

Which door Windows takes is what its CPUID offers and what public reports show; everything else is asked of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import NamedTuple

import fastexit as fx
from fastexit import hyperv as HV
from fastexit import regs as R
from fastexit.costs.meter import TimedOutcome
from fastexit.costs.vcpu import TimedVcpu
from fastexit.outcome import Path
from fastexit.profile import NEWEST, PROFILES

COSTS, IPIV_COSTS = "skylake-retpoline", "ipiv-host"
KERNELS = ("seed-v3", "5.8", NEWEST)
VECTOR, SINT_VECTOR = 0x2F, 0x95
IF = 1 << 9
EVERYBODY = 0b1110
"""Of four vCPUs, all but the sender, as a set of VP indices."""

Act = Callable[[fx.Vcpu], tuple[TimedOutcome, ...]]
"""What the guest does, as the CPU executes it: one outcome an instruction."""


def page_ipi(v: fx.Vcpu) -> tuple[TimedOutcome, ...]:
    return _timed(v.hw_mmio_write(R.APIC_ICR2, 1 << R.XAPIC_DEST_SHIFT), v.hw_mmio_write(R.APIC_ICR, VECTOR))


def page_eoi(v: fx.Vcpu) -> tuple[TimedOutcome, ...]:
    _in_service(v)
    return _timed(v.hw_mmio_write(R.APIC_EOI, 0))


def x2apic_ipi(v: fx.Vcpu) -> tuple[TimedOutcome, ...]:
    return _timed(v.hw_wrmsr(R.MSR_X2APIC_ICR, fx.icr(dest=1, vector=VECTOR)))


def x2apic_eoi(v: fx.Vcpu) -> tuple[TimedOutcome, ...]:
    _in_service(v)
    return _timed(v.hw_wrmsr(R.MSR_X2APIC_EOI, 0))


def synthetic_ipi(v: fx.Vcpu) -> tuple[TimedOutcome, ...]:
    """Hyper-V's ICR takes the destination of the sender's APIC mode; the page's here."""
    return _timed(v.hw_wrmsr(HV.MSR_HV_ICR, 1 << 32 + R.XAPIC_DEST_SHIFT | VECTOR))


def synthetic_eoi(v: fx.Vcpu) -> tuple[TimedOutcome, ...]:
    _in_service(v)
    return _timed(v.hw_wrmsr(HV.MSR_HV_EOI, 0))


def hypercall_ipi(v: fx.Vcpu) -> tuple[TimedOutcome, ...]:
    status = v.hv_hypercall(HV.HvCall.SEND_IPI | HV.HV_CALL_FAST, VECTOR, EVERYBODY)
    assert status == HV.HvStatus.SUCCESS
    assert isinstance(v, TimedVcpu)
    assert v.timed is not None
    return (v.timed,)


def stimer(v: fx.Vcpu) -> tuple[TimedOutcome, ...]:
    """Windows's tick: a one-shot, armed by the count."""
    return _timed(v.hw_wrmsr(HV.MSR_HV_STIMER0_CONFIG + 1, 1 << 40))


def _in_service(v: fx.Vcpu) -> None:
    """An interrupt that the CPU delivers by itself, if it can: what EOI costs depends on it."""
    v.rflags |= IF
    v.machine.signal_msi(R.APIC_DEFAULT_PHYS_BASE, VECTOR)
    v.hw_notify()
    v.hw_deliver()


def _timed(*outcomes: fx.Outcome) -> tuple[TimedOutcome, ...]:
    assert all(isinstance(outcome, TimedOutcome) for outcome in outcomes)
    return outcomes  # type: ignore[return-value]


class Use(NamedTuple):
    """How one kind of access is made: the text of its cell and what the guest does, if it does anything by an exit."""

    text: str
    act: Act | None = None


BY_PAGE = Use("xAPIC page", page_ipi), Use("xAPIC page", page_eoi)
TRAPPED = Use("xAPIC page, exit behind it (APIC_WRITE)", page_ipi)
VAPIC = Use("MSR 0x40000071", synthetic_ipi)
BY_CPU, BY_CPU_X2APIC = Use("by the CPU", page_eoi), Use("by the CPU", x2apic_eoi)
ASSIST = Use("none where the assist page says so, else MSR 0x40000070", synthetic_eoi)
NO_ASSIST = Use("MSR 0x40000070: the assist page is of no use with APICv", synthetic_eoi)
DEVICE = Use("HPET, RTC or LAPIC timer")
STIMER = Use("MSRs 0x400000B0 to 0x400000B7", stimer)


class Setup(NamedTuple):
    """One common configuration of a Windows guest. ``auto_eoi``: a SINT of its SynIC ends its interrupts by itself."""

    title: str
    ipi: Use
    eoi: Use
    timer: Use
    x2apic: bool = False
    apicv: bool = False
    ipiv: bool = False
    hyperv: bool = True
    synic: bool = False
    auto_eoi: bool = False


SETUPS = (
    Setup("nothing of Hyper-V, no APICv", *BY_PAGE, DEVICE, hyperv=False),
    Setup(
        "nothing of Hyper-V, APICv",
        TRAPPED,
        BY_CPU,
        DEVICE,
        apicv=True,
        hyperv=False,
    ),
    Setup("hv-vapic, no APICv", VAPIC, ASSIST, DEVICE),
    Setup("hv-vapic, APICv", VAPIC, NO_ASSIST, DEVICE, apicv=True),
    Setup("hv-vapic + hv-ipi: a set of vCPUs", Use("hypercall 0x0b, fast", hypercall_ipi), ASSIST, DEVICE),
    Setup(
        "hv-vapic + hv-synic + hv-stimer on a host with APICv",
        VAPIC,
        Use("none of SINTs with auto-EOI, which switch APICv off; else as with hv-vapic", synthetic_eoi),
        STIMER,
        apicv=True,
        synic=True,
        auto_eoi=True,
    ),
    Setup(
        "hv-avic: APIC MSRs not recommended, auto-EOI deprecated; hv-stimer; APICv",
        TRAPPED,
        BY_CPU,
        STIMER,
        apicv=True,
        synic=True,
    ),
    Setup(
        "the same with x2APIC",
        Use("MSR 0x830", x2apic_ipi),
        BY_CPU_X2APIC,
        STIMER,
        x2apic=True,
        apicv=True,
        synic=True,
    ),
    Setup(
        "the same with x2APIC and IPI virtualization",
        Use("by the CPU", x2apic_ipi),
        BY_CPU_X2APIC,
        STIMER,
        x2apic=True,
        apicv=True,
        ipiv=True,
        synic=True,
    ),
)


def vcpu(setup: Setup, kernel: str, costs: str) -> fx.Vcpu:
    """The sender: one of four vCPUs in the guest, which is a Windows that has started."""
    m = fx.Machine(
        vcpus=4, kernel=kernel, costs=costs, apicv=setup.apicv, ipiv=setup.ipiv, hyperv=setup.hyperv, retpoline=True
    )
    if setup.x2apic:
        m.boot_x2apic()
    for v in m.vcpus:
        v.real_mode = False
        if not setup.x2apic:
            v.mmio_write(R.APIC_SPIV, 0x1FF)
        if setup.synic:
            v.enable_synic(2)
            v.set_msr(HV.MSR_HV_SINT0 + 3, SINT_VECTOR | (HV.HV_SINT_AUTO_EOI if setup.auto_eoi else 0))
            v.set_msr(HV.MSR_HV_STIMER0_CONFIG, HV.HV_STIMER_AUTO_ENABLE | 3 << HV.HV_STIMER_SINT_SHIFT)
        if setup.hyperv and v is m.vcpus[0]:
            v.set_msr(HV.MSR_HV_GUEST_OS_ID, 1)
        m.dispatcher.start_run(v)
    for v in m.vcpus:
        v.exit(fx.VmxExit.CPUID)  # whoever had to scan for a new APIC map is in the guest again
    return m.vcpus[0]


def _done(setup: Setup, use: Use, kernel: str, costs: str = COSTS) -> tuple[TimedOutcome, ...]:
    assert use.act is not None
    outcomes = use.act(vcpu(setup, kernel, costs))
    assert not any(outcome.fault for outcome in outcomes), (setup.title, use.text, kernel)
    return outcomes


def _serves(setup: Setup, kernel: str) -> bool:
    """IPI virtualization came with 5.19."""
    return not setup.ipiv or fx.profiles().index(kernel) >= fx.profiles().index("6.1")


def _exits(outcomes: tuple[TimedOutcome, ...]) -> list[TimedOutcome]:
    """Those that the CPU did not carry out by itself."""
    return [outcome for outcome in outcomes if outcome.path is not Path.HARDWARE]


def _who(setup: Setup, use: Use) -> str:
    """Which generations take it fast, and which have no exit, in words."""
    if use.act is None:
        return "-"
    found: dict[str, str] = {}
    for kernel in PROFILES:
        if _serves(setup, kernel):
            outcomes = _done(setup, use, kernel)
            exits = _exits(outcomes)
            fast = all(outcome.path is Path.FAST for outcome in exits)
            found[kernel] = "no exit" if not exits else "yes" if fast else "no"
    runs = [(answer, [kernel for kernel, _ in run]) for answer, run in groupby(found.items(), lambda item: item[1])]
    if len(runs) == 1:
        return {"yes": "all", "no": "none", "no exit": "no exit"}[runs[0][0]]
    return "; ".join(f"{names[0]} to {names[-1]}: {answer}" for answer, names in runs)


def doors() -> str:
    """By which door, and the generations whose fast path takes it."""
    rows = [
        "| the guest has | one IPI goes by | fast in | EOI goes by | fast in | timer goes by | fast in |",
        "|---|---|---|---|---|---|---|",
    ]
    for setup in SETUPS:
        cells = [f"{use.text} | {_who(setup, use)}" for use in (setup.ipi, setup.eoi, setup.timer)]
        rows.append(f"| {setup.title} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cycles(setup: Setup, kernel: str, costs: str) -> str:
    if not _serves(setup, kernel):
        return "-"
    outcomes = _done(setup, setup.ipi, kernel, costs)
    *before, last = outcomes
    earlier = sum(outcome.cycles or 0 for outcome in before)
    assert last.cycles_ipi is not None, (setup.title, kernel)
    return f"{earlier + last.cycles_ipi:,} / {earlier + (last.cycles or 0):,}"


def cycles() -> str:
    """Cycles until the IPI has left, and until the guest runs again."""
    columns = [(kernel, COSTS) for kernel in KERNELS] + [(NEWEST, IPIV_COSTS)]
    rows = [
        "| the guest has | exits of an IPI | " + " | ".join(f"{kernel}, {costs}" for kernel, costs in columns) + " |",
        "|---|---|" + "---|" * len(columns),
    ]
    for setup in SETUPS:
        exits = len(_exits(_done(setup, setup.ipi, NEWEST)))
        cells = [
            "-" if setup.ipiv and costs != IPIV_COSTS else _cycles(setup, kernel, costs) for kernel, costs in columns
        ]
        rows.append(f"| {setup.title} | {exits} | {' | '.join(cells)} |")
    return "\n".join(rows)


def patch() -> str:
    """What a fast handler for Hyper-V's ICR would have been worth, generation by generation."""
    vapic = next(setup for setup in SETUPS if setup.title == "hv-vapic, no APICv")
    x2apic = Setup("", Use("", x2apic_ipi), DEVICE, DEVICE, x2apic=True)
    rows = [
        "| kernel | MSR 0x40000071, as it is | MSR 0x830, fast: what it could cost | saved until the IPI leaves "
        "| saved of the exit |",
        "|---|---|---|---|---|",
    ]
    for kernel in PROFILES:
        (now,), (then,) = _done(vapic, vapic.ipi, kernel), _done(x2apic, x2apic.ipi, kernel)
        assert then.path is Path.FAST, kernel
        sides = [(now.cycles_ipi or 0, now.cycles or 0), (then.cycles_ipi or 0, then.cycles or 0)]
        texts = [f"{ipi:,} / {whole:,}" for ipi, whole in sides]
        saved = [f"{was - would:,}" for was, would in zip(*sides, strict=True)]
        rows.append(f"| {kernel} | {' | '.join(texts)} | {' | '.join(saved)} |")
    return "\n".join(rows)


class Measured(NamedTuple):
    """One published measurement: a Windows guest with a 3D game, 5 s, Intel. Times in ms, of an exit in us."""

    what: str
    exits: int
    handling: int
    parts: tuple[tuple[str, int, float | None], ...]


PUBLISHED = (
    Measured(
        "Hyper-V with stimer; SynIC switches APICv off",
        787_803,
        1_611,
        (("EXTERNAL_INTERRUPT", 471_831, 2.34), ("MSR_WRITE", 238_932, 1.56)),
    ),
    Measured(
        "nothing of Hyper-V, APICv", 342_788, 716, (("APIC_WRITE", 255_152, 1.42), ("EPT_MISCONFIG", 39_967, None))
    ),
    Measured(
        "APIC MSRs recommended, auto-EOI deprecated, APICv stays on",
        1_027_227,
        1_436,
        (("MSR_WRITE", 924_045, 1.26), ("VMCALL", 17_819, 4.2)),
    ),
    Measured(
        "APIC MSRs not recommended, auto-EOI deprecated, stimer, APICv",
        219_802,
        369,
        (("APIC_WRITE", 172_232, 1.48), ("VMCALL", 6_971, None)),
    ),
    Measured("hypervisor hidden, APICv", 255_363, 400, (("APIC_WRITE", 200_482, None), ("EOI_INDUCED", 5_066, None))),
)


def published() -> str:
    """What was measured on real machines, with shares worked out."""
    least = min(PUBLISHED, key=lambda m: m.handling)
    rows = [
        "| measured | exits | time in handlers | times the least | most of them |",
        "|---|---|---|---|---|",
    ]
    for m in PUBLISHED:
        parts = "; ".join(
            f"{name} {n:,} ({100 * n / m.exits:.1f} %{f', {us} us each' if us else ''})" for name, n, us in m.parts
        )
        rows.append(f"| {m.what} | {m.exits:,} | {m.handling:,} ms | {m.handling / least.handling:.1f} | {parts} |")
    return "\n".join(rows)
