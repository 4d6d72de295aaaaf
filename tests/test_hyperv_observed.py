"""What Windows guests saw on three kernels, told from outside: public names alone, trace lines as text.

Sources: runs of kvm_amd of 6.1.176, 6.12.95 and 7.2.13 in emulated machines, whose answers and lines these are.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest

import fastexit as fx

KERNELS = ("6.1", "6.12", "7.3")
OS_ID, HYPERCALL, VP_INDEX = 0x4000_0000, 0x4000_0001, 0x4000_0002
EOI, ICR, TPR, ASSIST = 0x4000_0070, 0x4000_0071, 0x4000_0072, 0x4000_0073
SCONTROL, SVERSION, SIEFP, SIMP, EOM, SINT0 = (
    0x4000_0080,
    0x4000_0081,
    0x4000_0082,
    0x4000_0083,
    0x4000_0084,
    0x4000_0090,
)
CONFIG0, COUNT0 = 0x4000_00B0, 0x4000_00B1
FAST = 1 << 16
PAGE = 0x6000
AUTO_EOI, MASKED = 1 << 17, 1 << 16
NOISE = ("kvm_entry", "kvm_exit", "kvm_fpu", "kvm_userspace_exit", "kvm_inj_virq", "kvm_inj_exception")


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def guest(kernel: str, *, x2apic: bool = False, vcpus: int = 2, synic: int = 0, **options: Any) -> fx.Machine:
    """Guests of Hyper-V's on SVM that run, their APICs enabled; lines are kept from here on."""
    m = fx.Machine(vcpus, kernel=kernel, vendor="svm", **{"hyperv": True, "apicv": False} | options)
    if x2apic:
        m.boot_x2apic()
    for v in m.vcpus:
        if not x2apic:
            v.mmio_write(0xF0, 0x1FF)
            v.real_mode = False
        if synic:
            v.enable_synic(synic)
    m.vcpus[0].wrmsr(OS_ID, 0x8100_0000_0000)
    m.trace.enable()
    m.trace.clear()
    return m


def told(m: fx.Machine) -> list[str]:
    """Lines since the last look but for entries, exits and injections."""
    lines = [line for line in m.trace.lines() if line.partition(":")[0] not in NOISE]
    m.trace.clear()
    return lines


def take(v: fx.Vcpu) -> int | None:
    """The guest opens its interrupt window: the vector that comes then."""
    v.rflags |= 0x200
    v.exit(fx.SvmExit.INTERRUPT)
    v.rflags &= ~0x200
    return v.injected


def irr(v: fx.Vcpu, vector: int, base: int = 0x200) -> bool:
    page = v.get_lapic()
    return bool(page[base + vector // 32 * 16 + vector // 8 % 4] >> vector % 8 & 1)


def read(v: fx.Vcpu, msr: int) -> int | None:
    """RDMSR: None for #GP."""
    try:
        return v.rdmsr(msr)
    except fx.GeneralProtection:
        return None


# ------------------------------------------------------------------------------------------- EOI, ICR and TPR by MSR


def test_icr_by_msr_in_xapic_mode(kernel: str) -> None:
    m = guest(kernel)
    v = m.vcpus[0]
    v.wrmsr(ICR, 0x0100_0000_0000_1041)
    assert told(m) == [
        "kvm_apic_ipi: dst 1 vec 65 (Fixed|physical|de-assert|edge|dst)",
        "kvm_apic_accept_irq: apicid 1 vec 65 (Fixed|edge)",
        "kvm_apic: apic_write APIC_ICR = 0x100000000000041",
        "kvm_msr: msr_write 40000071 = 0x100000000001041",
    ]
    assert read(v, ICR) == 0x0100_0000_0000_0041
    assert told(m) == ["kvm_msr: msr_read 40000071 = 0x100000000000041"]
    assert struct.unpack_from("<I", v.get_lapic(), 0x310) == (0x0100_0000,)


def test_icr_by_msr_means_bits_63_to_56_or_63_to_32(kernel: str) -> None:
    m = guest(kernel, vcpus=3)
    m.vcpus[1].wrmsr(ICR, 0x0000_0002_0000_0041)
    assert [irr(v, 0x41) for v in m.vcpus] == [True, False, False]
    m = guest(kernel, vcpus=3, x2apic=True)
    m.vcpus[1].wrmsr(ICR, 0x0200_0000_0000_0051)
    assert told(m)[0] == "kvm_apic_ipi: dst 2000000 vec 81 (Fixed|physical|de-assert|edge|dst)"
    assert not any(irr(v, 0x51) for v in m.vcpus)


@pytest.mark.parametrize("value", [0x2000, 0x1_0000, 0x2_0000, 0x10_0000, 0x8000_0000])
def test_reserved_bits_of_the_icr_are_refused(kernel: str, value: int) -> None:
    m = guest(kernel)
    v = m.vcpus[0]
    assert v.wrmsr(ICR, value | 0x41).fault is fx.Fault.GP
    assert told(m) == [f"kvm_msr: msr_write 40000071 = {value | 0x41:#x} (#GP)"]
    assert not v.set_msr(ICR, value | 0x41)
    assert told(m) == []


def test_eoi_and_tpr_by_msr(kernel: str) -> None:
    m = guest(kernel)
    v = m.vcpus[0]
    v.wrmsr(EOI, 5)
    assert told(m) == [
        "kvm_apic: apic_write APIC_EOI = 0x5",
        "kvm_eoi: apicid 0 vector -1",
        "kvm_msr: msr_write 40000070 = 0x5",
    ]
    assert read(v, EOI) is None
    assert told(m) == ["kvm_msr: msr_read 40000070 = 0x0 (#GP)"]
    v.wrmsr(TPR, 0x1F0)
    assert told(m) == ["kvm_apic: apic_write APIC_TASKPRI = 0x1f0", "kvm_msr: msr_write 40000072 = 0x1f0"]
    assert read(v, TPR) == 0xF0
    assert told(m) == ["kvm_apic: apic_read APIC_TASKPRI = 0xf0", "kvm_msr: msr_read 40000072 = 0xf0"]
    for msr in (EOI, TPR):
        assert v.wrmsr(msr, 1 << 32).fault is fx.Fault.GP
        assert told(m) == [f"kvm_msr: msr_write {msr:x} = 0x100000000 (#GP)"]


def test_user_space_ends_and_sends_too(kernel: str) -> None:
    m = guest(kernel)
    v = m.vcpus[1]
    m.signal_msi(0xFEE0_1000, 0x61)
    assert take(v) == 0x61
    m.trace.clear()
    assert v.set_msr(EOI, 0)
    assert told(m) == ["kvm_apic: apic_write APIC_EOI = 0x0", "kvm_eoi: apicid 1 vector 97"]
    assert v.get_msr(EOI) is None
    assert v.set_msr(ICR, 0x42)
    assert irr(m.vcpus[0], 0x42)
    assert (v.get_msr(ICR), v.get_msr(TPR)) == (0x42, 0)


def test_they_work_with_the_apic_off(kernel: str) -> None:
    """Software-disabled or globally: it still sends, and its vectors below 16 are set."""
    m = guest(kernel)
    v = m.vcpus[0]
    v.mmio_write(0xF0, 0xFF)
    v.wrmsr(ICR, 0x0100_0000_0000_0005)
    v.set_msr(0x1B, 0xFEE0_0100)
    v.wrmsr(ICR, 0x0100_0000_0000_0041)
    assert (irr(m.vcpus[1], 5), irr(m.vcpus[1], 0x41)) == (True, True)
    assert not v.wrmsr(TPR, 0x20).fault


# ------------------------------------------------------------------------------------------------------ hypercalls


def test_send_ipi_fast(kernel: str) -> None:
    """In the order of creation, without kvm_apic_ipi, whatever the APIC ids; the sender's ICR stays."""
    m = fx.Machine(apic_ids=[9, 4, 2], boot_cpu_id=9, kernel=kernel, vendor="svm", hyperv=True, apicv=False)
    for v in m.vcpus:
        v.mmio_write(0xF0, 0x1FF)
        v.real_mode = False
    v = m.vcpus[0]
    v.wrmsr(OS_ID, 1)
    m.trace.enable()
    assert v.hv_hypercall(0xB | FAST, 0x41, 0b110) == 0
    assert told(m) == [
        "kvm_hv_hypercall: code 0xb fast var_cnt 0x0 rep_cnt 0x0 idx 0x0 in 0x41 out 0x6",
        "kvm_hv_send_ipi: vector 41 processor_mask 0x6",
        "kvm_apic_accept_irq: apicid 4 vec 65 (Fixed|edge)",
        "kvm_apic_accept_irq: apicid 2 vec 65 (Fixed|edge)",
        "kvm_hv_hypercall_done: result 0x0",
    ]
    assert v.get_msr(ICR) == 0


@pytest.mark.parametrize(
    ("control", "given", "mask", "status", "lines"),
    [
        (0xB | FAST, 0x0F, 1, 3, 3),
        (0xB | FAST, 0x10, 1, 0, 4),
        (0xB | FAST, 0x100, 1, 3, 3),
        (0xB | FAST, 1 << 32 | 0x41, 1, 3, 2),
        (0xB | FAST | 1 << 17, 0x41, 1, 3, 2),
        (0xB | FAST | 1 << 32, 0x41, 1, 3, 2),
        (0xB | FAST | 1 << 48, 0x41, 1, 3, 2),
        (0xB | FAST | 1 << 31, 0x41, 1, 3, 2),
        (0xB | FAST, 0x41, 0, 0, 3),
        (0xB | FAST, 0x41, 1 << 63, 0, 3),
        (0xB, 1 << 45, 0, 3, 2),
        (0x8, 0, 0, 0, 2),
        (0x8 | FAST, 0, 0, 0, 2),
        (0x8 | 1 << 17, 0, 0, 3, 2),
        (0x8 | 1 << 32, 0, 0, 3, 2),
        (0x5C, 0, 0, 3, 2),
        (0x5D | FAST, 0, 0, 3, 2),
        (0x77, 0, 0, 2, 2),
    ],
)
def test_statuses(kernel: str, control: int, given: int, mask: int, status: int, lines: int) -> None:
    m = guest(kernel)
    assert m.vcpus[0].hv_hypercall(control, given, mask) == status
    assert len(told(m)) == lines


def test_slow_input_is_anywhere_and_its_reserved_word_is_ignored(kernel: str) -> None:
    m = guest(kernel)
    at = PAGE + 0x1000 - 7
    m.guest_memory[at : at + 16] = struct.pack("<IIQ", 0x41, 0xDEAD, 0b10)
    assert m.vcpus[0].hv_hypercall(0xB, at) == 0
    assert irr(m.vcpus[1], 0x41)


def ex(count: int) -> int:
    return 0x15 | FAST | count << 17


@pytest.mark.parametrize(
    ("control", "given", "form", "xmm", "status", "reached"),
    [
        (ex(1), 0x41, 0, (1, 0b10), 0, [False, True]),
        (ex(1), 0x7F << 32 | 0x41, 0, (1, 0b11), 0, [True, True]),
        (ex(0), 0x41, 1, (0,), 0, [True, True]),
        (ex(0), 0x41, 1, (1,), 3, [False, False]),
        (ex(1), 0x41, 1, (1,), 0, [True, True]),
        (ex(0), 5, 0, (0,), 0, [False, False]),
        (ex(0), 5, 1, (0,), 3, [False, False]),
        (ex(1), 0x41, 7, (1, 1), 0, [True, False]),
        (ex(2), 0x41, 0, (0b101, 0b10, 0b01), 0, [False, True]),
        (ex(1), 0x41, 0, (0b10, 0b11), 0, [False, False]),
        (ex(11), 0x41, 0, ((1 << 11) - 1, 1, *[0] * 10), 0, [True, False]),
        (ex(12), 0x41, 0, ((1 << 12) - 1, 1, *[0] * 10), 3, [False, False]),
        (ex(2), 0x41, 0, (1, 0b11), 3, [False, False]),
        (ex(1) | 1 << 32, 0x41, 0, (1, 1), 3, [False, False]),
    ],
)
def test_send_ipi_to_a_set(
    kernel: str, control: int, given: int, form: int, xmm: tuple[int, ...], status: int, reached: list[bool]
) -> None:
    m = guest(kernel)
    assert m.vcpus[0].hv_hypercall(control, given, form, xmm) == status
    assert [irr(v, given & 0xFF) for v in m.vcpus] == reached


def test_two_with_one_vp_index_both_get_it(kernel: str) -> None:
    m = guest(kernel, vcpus=3)
    for i in (1, 2):
        assert m.vcpus[i].set_msr(VP_INDEX, 5)
    assert m.vcpus[0].wrmsr(VP_INDEX, 7).fault is fx.Fault.GP
    assert m.vcpus[0].hv_hypercall(0xB | FAST, 0x41, 1 << 5) == 0
    assert [irr(v, 0x41) for v in m.vcpus] == [False, True, True]


def test_denied_comes_before_undefined(kernel: str) -> None:
    everything = sum(int(one) for one in fx.hyperv.HvFeature)
    without = {
        "xmm": everything & ~int(fx.hyperv.HvFeature.XMM_INPUT),
        "ipi": everything & ~int(fx.hyperv.HvFeature.CLUSTER_IPI) & ~int(fx.hyperv.HvFeature.XMM_INPUT),
    }
    m = guest(kernel, hyperv="enforce", hyperv_features=without["ipi"])
    assert m.vcpus[0].hv_hypercall(ex(1), 0x41, 0, (1, 1)) == 6
    assert [line.partition(":")[0] for line in told(m)] == ["kvm_hv_hypercall", "kvm_hv_hypercall_done"]
    m = guest(kernel, hyperv="enforce", hyperv_features=without["xmm"])
    with pytest.raises(fx.InvalidOpcode, match="#UD"):
        m.vcpus[0].hv_hypercall(ex(1), 0x41, 0, (1, 1))


# ---------------------------------------------------------------------------------------------------- MSRs and pages


def test_the_hypercall_msr_needs_a_name(kernel: str) -> None:
    m = guest(kernel)
    v = m.vcpus[0]
    v.wrmsr(OS_ID, 0)
    assert not v.wrmsr(HYPERCALL, PAGE | 1).fault
    assert read(v, HYPERCALL) == 0
    v.wrmsr(OS_ID, 1)
    v.wrmsr(HYPERCALL, PAGE | 1)
    assert bytes(m.guest_memory[PAGE : PAGE + 4]) == bytes.fromhex("0f01d9c3")
    assert v.wrmsr(HYPERCALL, 1 << 45 | 1).fault is fx.Fault.GP
    v.wrmsr(OS_ID, 0)
    assert read(v, HYPERCALL) == PAGE


def test_the_assist_page(kernel: str) -> None:
    m = guest(kernel)
    v = m.vcpus[0]
    m.guest_memory[0x11000:0x11008] = b"\xff" * 8
    v.wrmsr(ASSIST, 0x11FF1)
    assert read(v, ASSIST) == 0x11FF1
    assert bytes(m.guest_memory[0x11000:0x11008]) == bytes(4) + b"\xff" * 4
    assert v.wrmsr(ASSIST, 1 << 45 | 1).fault is fx.Fault.GP
    assert read(v, ASSIST) == 0x11FF1
    assert not v.wrmsr(ASSIST, 1 << 45).fault


def test_an_eoi_without_an_exit(kernel: str) -> None:
    m = guest(kernel)
    v = m.vcpus[0]
    v.wrmsr(ASSIST, PAGE | 1)
    m.signal_msi(0xFEE0_0000, 0x61)
    assert take(v) == 0x61
    assert m.guest_memory[PAGE] == 1
    m.guest_memory[PAGE] = 0
    m.trace.clear()
    v.wrmsr(EOI, 0)
    assert told(m) == [
        "kvm_eoi: apicid 0 vector 97",
        "kvm_pv_eoi: apicid 0 vector 97",
        "kvm_apic: apic_write APIC_EOI = 0x0",
        "kvm_eoi: apicid 0 vector -1",
        "kvm_msr: msr_write 40000070 = 0x0",
    ]
    m.signal_msi(0xFEE0_0000, 0x62)
    assert take(v) == 0x62
    m.trace.clear()
    v.wrmsr(EOI, 0)
    assert told(m)[1] == "kvm_eoi: apicid 0 vector 98"
    assert m.guest_memory[PAGE] == 0, "the exit took the offer back"


# ------------------------------------------------------------------------------------------------------------ SynIC


def test_synic_begins_enabled_and_says_so_in_its_lines(kernel: str) -> None:
    m = guest(kernel, synic=1)
    v = m.vcpus[0]
    assert [read(v, msr) for msr in (SCONTROL, SVERSION, SIEFP, SIMP, EOM, SINT0 + 7)] == [1, 1, 0, 0, 0, 0x1_0000]
    m.trace.clear()
    v.wrmsr(EOM, 0xFFFF)
    assert told(m) == [
        "kvm_hv_synic_set_msr: vcpu_id 0 msr 0x40000084 data 0xffff host 0",
        *(f"kvm_hv_notify_acked_sint: vcpu_id 0 sint {n}" for n in range(16)),
        "kvm_msr: msr_write 40000084 = 0xffff",
    ]
    assert v.wrmsr(SVERSION, 2).fault is fx.Fault.GP
    assert told(m) == [
        "kvm_hv_synic_set_msr: vcpu_id 0 msr 0x40000081 data 0x2 host 0",
        "kvm_msr: msr_write 40000081 = 0x2 (#GP)",
    ]
    assert v.wrmsr(SINT0, 15).fault is fx.Fault.GP
    assert not v.wrmsr(SINT0, MASKED | 15).fault


def test_a_simp_write_leaves_with_everything_done(kernel: str) -> None:
    m = guest(kernel, synic=1)
    v = m.vcpus[0]
    m.guest_memory[PAGE : PAGE + 8] = b"\xff" * 8
    outcome = v.wrmsr(SIMP, PAGE | 1)
    assert outcome.user is fx.KvmExit.HYPERV
    assert bytes(m.guest_memory[PAGE : PAGE + 8]) == bytes(8)
    assert v.get_msr(SIMP) == PAGE | 1
    assert told(m)[-1] == f"kvm_msr: msr_write 40000083 = {PAGE | 1:#x}"
    m = guest(kernel, synic=2)
    m.guest_memory[PAGE : PAGE + 8] = b"\xff" * 8
    m.vcpus[0].wrmsr(SIMP, PAGE | 1)
    assert bytes(m.guest_memory[PAGE : PAGE + 8]) == b"\xff" * 8


def test_a_sint_line(kernel: str) -> None:
    m = guest(kernel, synic=1)
    v = m.vcpus[1]
    v.wrmsr(SINT0 + 3, 0x70)
    m.set_gsi_routing([("hv_sint", 20, 1, 3), ("hv_sint", 21, 1, 4), ("hv_sint", 22, 1, 99), ("hv_sint", 23, 9, 3)])
    m.trace.clear()
    assert m.irq_line(20, 1) == 1
    assert told(m) == [
        "kvm_set_irq: gsi 20 level 1 source 0",
        "kvm_apic_accept_irq: apicid 1 vec 112 (Fixed|edge)",
        "kvm_hv_synic_set_irq: vcpu_id 1 sint 3 vector 112 ret 1",
    ]
    assert [m.irq_line(20, 1), m.irq_line(20, 0), *(m.irq_line(gsi, 1) for gsi in (21, 22, 23))] == [1, -1, -1, -1, -1]


def test_the_eoi_of_a_sint_by_msr(kernel: str) -> None:
    m = guest(kernel, synic=1)
    v = m.vcpus[0]
    for n in (5, 2):
        v.wrmsr(SINT0 + n, 0x70)
    m.signal_msi(0xFEE0_0000, 0x70)
    assert take(v) == 0x70
    m.trace.clear()
    v.wrmsr(EOI, 0)
    assert told(m) == [
        "kvm_apic: apic_write APIC_EOI = 0x0",
        "kvm_eoi: apicid 0 vector 112",
        "kvm_hv_synic_send_eoi: vcpu_id 0 vector 112",
        "kvm_hv_notify_acked_sint: vcpu_id 0 sint 2",
        "kvm_hv_notify_acked_sint: vcpu_id 0 sint 5",
        "kvm_msr: msr_write 40000070 = 0x0",
    ]


def test_auto_eoi_ends_the_interrupted_one_by_the_next_write(kernel: str) -> None:
    m = guest(kernel, synic=1)
    v = m.vcpus[0]
    v.wrmsr(SINT0 + 2, 0x50 | AUTO_EOI)
    m.signal_msi(0xFEE0_0000, 0x40)
    assert take(v) == 0x40
    m.signal_msi(0xFEE0_0000, 0x50)
    assert take(v) == 0x50
    assert (irr(v, 0x50), irr(v, 0x50, 0x100), irr(v, 0x40, 0x100)) == (False, False, True)
    assert v.get_lapic()[0xA0] == 0x40, "PPR is that of the lower one"
    m.trace.clear()
    v.wrmsr(EOI, 0)
    assert told(m)[1] == "kvm_eoi: apicid 0 vector 64"


# ----------------------------------------------------------------------------------------------------------- timers


def test_config_and_count(kernel: str) -> None:
    m = guest(kernel, synic=1)
    v = m.vcpus[0]
    v.wrmsr(CONFIG0, 9)
    assert read(v, CONFIG0) == 9
    v.wrmsr(CONFIG0, 1)
    assert read(v, CONFIG0) == 0
    v.wrmsr(CONFIG0, 3 << 16 | 8)
    v.wrmsr(COUNT0, 1 << 40)
    assert read(v, CONFIG0) == 3 << 16 | 9
    v.wrmsr(COUNT0, 0)
    assert read(v, CONFIG0) == 3 << 16 | 8
    v.set_msr(COUNT0, 1 << 40)
    assert read(v, CONFIG0) == 3 << 16 | 8, "user space's count enables nothing"


def test_a_direct_timer_of_the_past(kernel: str) -> None:
    m = guest(kernel, synic=1)
    v = m.vcpus[0]
    m.set_time(1_000_000)
    v.wrmsr(CONFIG0, 1 << 12 | 0x45 << 4 | 8)
    m.trace.clear()
    v.wrmsr(COUNT0, 1)
    assert told(m) == [
        "kvm_hv_stimer_set_count: vcpu_id 0 timer 0 count 1 host 0",
        "kvm_hv_stimer_cleanup: vcpu_id 0 timer 0",
        "kvm_msr: msr_write 400000b1 = 0x1",
        "kvm_apic_accept_irq: apicid 0 vec 69 (Fixed|edge)",
        "kvm_hv_stimer_expiration: vcpu_id 0 timer 0 direct 1 send result 0",
        "kvm_hv_stimer_cleanup: vcpu_id 0 timer 0",
    ]
    assert read(v, CONFIG0) == 1 << 12 | 0x45 << 4 | 8, "it is no longer enabled"


def test_a_message_and_the_one_that_finds_its_slot_taken(kernel: str) -> None:
    m = guest(kernel, synic=2)
    v = m.vcpus[0]
    m.set_time(5_000_000)
    v.wrmsr(SIMP, PAGE | 1)
    v.wrmsr(SINT0 + 4, 0x71)
    v.wrmsr(CONFIG0, 4 << 16 | 8)
    m.trace.clear()
    v.wrmsr(COUNT0, 7)
    assert told(m)[-4:] == [
        "kvm_apic_accept_irq: apicid 0 vec 113 (Fixed|edge)",
        "kvm_hv_synic_set_irq: vcpu_id 0 sint 4 vector 113 ret 1",
        "kvm_hv_stimer_expiration: vcpu_id 0 timer 0 direct 0 send result 0",
        "kvm_hv_stimer_cleanup: vcpu_id 0 timer 0",
    ]
    slot = PAGE + 4 * 256
    message = bytes(m.guest_memory[slot : slot + 40])
    assert struct.unpack("<IBBHQIIQQ", message) == (0x8000_0010, 24, 0, 0, 0, 0, 0, 7, 50_000)
    v.wrmsr(COUNT0, 8)
    assert told(m)[-1] == "kvm_hv_stimer_expiration: vcpu_id 0 timer 0 direct 0 send result -11"
    assert m.guest_memory[slot + 5] == 1
    m.guest_memory[slot : slot + 4] = bytes(4)
    v.wrmsr(EOM, 0)
    assert "kvm_hv_stimer_expiration: vcpu_id 0 timer 0 direct 0 send result 0" in told(m)


def test_timers_without_a_synic_can_be_read_only(kernel: str) -> None:
    m = guest(kernel)
    v = m.vcpus[0]
    assert (read(v, CONFIG0), v.get_msr(COUNT0)) == (0, 0)
    assert v.wrmsr(CONFIG0, 0).fault is fx.Fault.GP
    assert (v.set_msr(CONFIG0, 0), v.set_msr(CONFIG0, 1)) == (True, False)
    assert read(v, SCONTROL) is None
    assert v.get_msr(SCONTROL) == 0
    for msr in (0x4000_00A0, 0x4000_00B8, 0x4000_00F0):
        assert (read(v, msr), v.get_msr(msr)) == (None, None)


def test_without_hyperv_in_its_cpuid(kernel: str) -> None:
    m = fx.Machine(1, kernel=kernel, vendor="svm", apicv=False)
    m.trace.enable()
    v = m.vcpus[0]
    assert v.wrmsr(ICR, 0x41).fault is fx.Fault.GP
    assert told(m) == ["kvm_msr: msr_write 40000071 = 0x41 (#GP)"]
    assert v.set_msr(OS_ID, 1)
    assert v.get_msr(OS_ID) == 1


def test_a_kernel_without_hyperv() -> None:
    """As /dev/kvm of a 6.18 without CONFIG_KVM_HYPERV answered: every access is refused, by every door."""
    m = fx.Machine(1, kernel="6.18", kvm_hyperv=False)
    v = m.vcpus[0]
    registers = (*range(SCONTROL, EOM + 1), *range(SINT0, SINT0 + 16), *range(CONFIG0, CONFIG0 + 8))
    for msr in (*range(OS_ID, OS_ID + 4), EOI, ICR, TPR, ASSIST, *registers):
        assert (v.get_msr(msr), v.set_msr(msr, 0), read(v, msr)) == (None, False, None)
        assert v.wrmsr(msr, 0).fault is fx.Fault.GP
    for version in (1, 2):
        with pytest.raises(ValueError, match="CONFIG_KVM_HYPERV"):
            v.enable_synic(version)
    with pytest.raises(ValueError, match="CONFIG_KVM_HYPERV"):
        m.set_gsi_routing([("hv_sint", 20, 0, 2)])
