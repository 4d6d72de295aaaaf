"""The tracepoints of one exit: their order in every generation, and silence while tracing is off."""

from __future__ import annotations

import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit.profile import as_of, since
from generations import kernels
from traced import booted

KERNELS = fx.profiles()
VENDORS = ("vmx", "svm")
ICR = 0x830

EXIT, ENTRY, IPI, ACCEPT, WRITE, MSR, ICR2 = "exit", "entry", "ipi", "accept", "write", "msr", "icr2"
FAST_ORDER = {
    "vmx": {
        "seed-v3": (WRITE, IPI, ACCEPT, MSR, EXIT, ENTRY),
        "5.7": (IPI, ACCEPT, WRITE, MSR, EXIT, ENTRY),
        "5.8": (EXIT, IPI, ACCEPT, WRITE, MSR, ENTRY),
        "6.18": (EXIT, ACCEPT, IPI, WRITE, MSR, ENTRY),
    },
    "svm": {
        "5.6": (WRITE, IPI, ACCEPT, MSR, EXIT, ENTRY),
        "5.7": (IPI, ACCEPT, WRITE, MSR, EXIT, ENTRY),
        "6.6": (EXIT, IPI, ACCEPT, WRITE, MSR, ENTRY),
        "6.18": (EXIT, ACCEPT, IPI, WRITE, MSR, ENTRY),
    },
}
TWO_HALVES = (EXIT, ICR2, WRITE, IPI, ACCEPT, MSR, ENTRY)
ONE_WORD = (EXIT, IPI, ACCEPT, WRITE, MSR, ENTRY)
GENERIC_ORDER = {k: ONE_WORD if since(k, "6.1") else TWO_HALVES for k in KERNELS}
KINDS = {
    "kvm_exit": EXIT,
    "kvm_entry": ENTRY,
    "kvm_apic_ipi": IPI,
    "kvm_apic_accept_irq": ACCEPT,
    "kvm_apic": WRITE,
    "kvm_msr": MSR,
}


def kinds(m: fx.Machine) -> tuple[str, ...]:
    return tuple(ICR2 if "APIC_ICR2" in line else KINDS[line.split(":")[0]] for line in m.trace.lines())


def line(m: fx.Machine, event: str) -> str:
    """The only line of an event."""
    (found,) = (text for text in m.trace.lines() if text.startswith(f"{event}:"))
    return found


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_fast_order(kernel: str, vendor: str) -> None:
    """A fast ICR write leaves its lines in its generation's order, vendor by vendor."""
    m = booted(kernel, vendor)
    order = as_of(FAST_ORDER[vendor], kernel)
    out = m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert out.path is (fx.Path.FAST if order else fx.Path.SLOW)
    assert kinds(m) == (order or GENERIC_ORDER[kernel])


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_generic_order(kernel: str, vendor: str) -> None:
    """The generic path traces kvm_exit first, the IPI before its acceptance, and ICR2 while it was a register."""
    m = booted(kernel, vendor)
    m.fastpath = False
    assert m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD)).path is fx.Path.SLOW
    assert kinds(m) == GENERIC_ORDER[kernel]


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_posted_acceptance_follows(kernel: str, vendor: str) -> None:
    """With APICv each accept line is followed at once by its apicv line, with the same text; from 6.1."""
    m = booted(kernel, vendor, apicv=True)
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    lines = m.trace.lines()
    at = lines.index("kvm_apic_accept_irq: apicid 1 vec 253 (Fixed|edge)")
    apicv = [i for i, text in enumerate(lines) if text == "kvm_apicv_accept_irq: apicid 1 vec 253 (Fixed|edge)"]
    assert apicv == ([at + 1] if since(kernel, "6.1") else [])


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_host_write_order(kernel: str, vendor: str) -> None:
    """KVM_SET_MSRS sends the same IPI without kvm_exit, kvm_entry and kvm_msr."""
    m = booted(kernel, vendor)
    m.vcpus[0].set_msr(ICR, fx.icr(dest=1, vector=0xFD))
    assert kinds(m) == tuple(kind for kind in GENERIC_ORDER[kernel] if kind not in (EXIT, ENTRY, MSR))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("fast", [True, False])
def test_written_value(kernel: str, fast: bool) -> None:
    """kvm_apic shows 32 raw bits, 32 bits without busy, or all 64, by generation; kvm_msr what the guest wrote."""
    m = booted(kernel)
    m.fastpath = fast
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD, busy=True))
    raw = not since(kernel, "5.7" if fast else "6.1")
    value = 0x10FD if raw else 0x1000000FD if since(kernel, "6.1") else 0xFD
    assert f"kvm_apic: apic_write APIC_ICR = {value:#x}" in m.trace.lines()
    assert line(m, "kvm_msr") == "kvm_msr: msr_write 830 = 0x1000010fd"


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_reentry_is_traced_from_5_15(kernel: str) -> None:
    """kvm_entry moved into the vendors' run function after 5.10: only then does a re-entry show."""
    m = booted(kernel)
    assert m.vcpus[0].set_msr(0x832, 0x400EC)
    m.vcpus[0].wrmsr(0x808, 0)
    m.trace.clear()
    out = m.vcpus[0].wrmsr(0x6E0, 1 << 40)
    entries = sum(text.startswith("kvm_entry:") for text in m.trace.lines())
    assert out.reentered is since(kernel, "5.8")
    assert entries == (0 if kernel in kernels("5.8", before="5.15") else 1)


def test_discarded_interrupts_are_traced_as_accepted() -> None:
    """The accept line comes even when the interrupt is dropped: level without assert, software-disabled, ExtINT."""
    m = booted()
    m.vcpus[2].set_msr(0x80F, 0xFF)
    m.trace.clear()
    for value in (
        fx.icr(dest=1, vector=0x41, trigger_level=True),
        fx.icr(dest=2, vector=0x42),
        fx.icr(dest=1, vector=0x43, delivery=7),
    ):
        assert m.vcpus[0].wrmsr(ICR, value).accepted == 0
    accepts = [text for text in m.trace.lines() if "accept_irq" in text]
    assert accepts == [
        "kvm_apic_accept_irq: apicid 1 vec 65 (Fixed|level)",
        "kvm_apic_accept_irq: apicid 2 vec 66 (Fixed|edge)",
        "kvm_apic_accept_irq: apicid 1 vec 67 (ExtINT|edge)",
    ]


def test_posted_twice_is_traced_twice() -> None:
    """A vector that is posted already still gets its apicv line."""
    m = booted(apicv=True)
    for _ in range(2):
        m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0x41))
    assert m.trace.lines().count("kvm_apicv_accept_irq: apicid 1 vec 65 (Fixed|edge)") == 2


def test_upper_half_faults_before_any_apic_line() -> None:
    """Bits 63:32 of a register fault ahead of the kvm_apic line; a non-zero ESR faults behind it."""
    m = booted()
    m.vcpus[0].wrmsr(0x80B, 1 << 32)
    assert not any(text.startswith("kvm_apic:") for text in m.trace.lines())
    m.trace.clear()
    m.vcpus[0].wrmsr(0x828, 1)
    assert line(m, "kvm_apic") == "kvm_apic: apic_write APIC_ESR = 0x1"


def test_first_entry_precedes_the_first_exit() -> None:
    """A vCPU that was in user space enters the guest before it can exit."""
    m = fx.Machine(vcpus=1)
    m.trace.enable()
    m.vcpus[0].exit(fx.VmxExit.EXTERNAL_INTERRUPT)
    assert [text.split(":")[0] for text in m.trace.lines()] == ["kvm_entry", "kvm_exit", "kvm_entry"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("apicv", [True, False])
def test_off_means_no_record(kernel: str, apicv: bool) -> None:
    """While tracing is off nothing is written, whatever happens; switched off again it keeps what it has."""
    m = fx.Machine(vcpus=3, kernel=kernel, apicv=apicv)
    m.boot_x2apic()

    def live() -> None:
        for value in (0x1000000FD, fx.icr(vector=0x41, shorthand=2), fx.icr(dest=1, delivery=4), 0x2000):
            m.vcpus[0].wrmsr(ICR, value)
        m.vcpus[0].set_msr(0x80B, 0)
        m.vcpus[0].get_msr(0x802)
        m.signal_msi(0xFEE0_1000, 0x52)
        m.vcpus[1].exit(fx.VmxExit.EXTERNAL_INTERRUPT)

    live()
    assert not m.trace.enabled
    assert (len(m.trace), m.trace.lines(), m.trace.text(), m.mem[L.H_TRACE_HEAD]) == (0, [], "", 0)
    m.trace.enable()
    live()
    recorded = m.trace.lines()
    assert len(recorded) > 10
    m.trace.disable()
    live()
    assert m.trace.lines() == recorded
    m.trace.clear()
    assert list(m.trace) == []


def test_full_ring_counts_what_it_loses() -> None:
    """When the ring is full, later records are counted and nothing is overwritten."""
    m = booted()
    m.mem[L.H_TRACE_HEAD] = L.TRACE_CAPACITY - 2
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    assert (len(m.trace), m.trace.lost) == (L.TRACE_CAPACITY, 4)
    assert m.trace.records()["event"][-2:].tolist() == [L.TP_EXIT, L.TP_ACCEPT_IRQ]
    assert m.trace.records()["event"][0] == 0


def test_records_tell_where_and_what() -> None:
    """Records name event, vCPU and arguments; time only goes forward in the text."""
    m = booted()
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0xFD))
    records = m.trace.records()
    assert records["event"].tolist() == [
        L.TP_EXIT,
        L.TP_ACCEPT_IRQ,
        L.TP_APIC_IPI,
        L.TP_APIC_WRITE,
        L.TP_MSR_WRITE,
        L.TP_ENTRY,
    ]
    assert records["args"][4][:2].tolist() == [0x830, 0x1000000FD]
    stamps = [float(text.split(": ")[0].split()[-1]) for text in m.trace.text().splitlines()]
    assert stamps == sorted(set(stamps))
