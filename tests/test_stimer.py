"""Synthetic timers: when they start, fire and are served, what they send, and what keeps them from sending.

Expected lines, messages and results are those of real kernels (6.1.176, 6.12.95, 7.2.13), with other times.
"""

from __future__ import annotations

import struct
from typing import Any

import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.hyperv import (
    HV_STIMER_AUTO_ENABLE,
    HV_STIMER_DIRECT,
    HV_STIMER_ENABLED,
    HV_STIMER_PERIODIC,
    MSR_HV_EOM,
    MSR_HV_SIMP,
    MSR_HV_SINT0,
    MSR_HV_STIMER0_CONFIG,
    HvFeature,
)

CONFIG, COUNT = MSR_HV_STIMER0_CONFIG, MSR_HV_STIMER0_CONFIG + 1
ON, PERIODIC, AUTO = HV_STIMER_ENABLED, HV_STIMER_PERIODIC, HV_STIMER_AUTO_ENABLE
SINT2 = 2 << 16
DIRECT = HV_STIMER_DIRECT | 0x71 << 4
SIMP = 0x5000
SLOT2 = SIMP + 2 * 256
VECTOR = 0x61
NOW = 10_000_000
"""The reference clock, in 100 ns, at which tests begin."""


def guest(kernel: str = "6.12", **options: Any) -> fx.Machine:
    """Two vCPUs that run, with a SynIC whose SINT 2 has a vector; the guest takes interrupts."""
    m = fx.Machine(**({"vcpus": 2, "hyperv": True, "apicv": False, "kernel": kernel} | options))
    m.boot_x2apic()
    for v in m.vcpus:
        v.enable_synic(2)
        assert v.set_msr(MSR_HV_SIMP, SIMP | 1)
        assert v.set_msr(MSR_HV_SINT0 + 2, VECTOR)
        v.rflags |= r.RFLAGS_IF
    m.set_time(NOW * 100)
    for v in m.vcpus:
        assert v.run() or v.wrmsr(0x80B, 0)
    m.trace.enable()
    return m


def timer_lines(m: fx.Machine) -> list[str]:
    """What was traced since the last time, without exits, entries and vcpu_id."""
    left_out = ("kvm_exit", "kvm_entry", "kvm_apic:", "kvm_eoi")
    lines = [line for line in m.trace.lines() if not line.startswith(left_out)]
    m.trace.clear()
    return [line.replace("vcpu_id 0 ", "").removeprefix("kvm_hv_") for line in lines]


def pass_time(m: fx.Machine, ticks: int) -> list[tuple[int, fx.Outcome]]:
    """So many 100 ns go by, and vCPU 0 exits."""
    happened = m.set_time(m.time + 100 * ticks)
    m.vcpus[0].wrmsr(0x80B, 0)
    return happened


def config(v: fx.Vcpu) -> int | None:
    return v.get_msr(CONFIG)


def test_one_shot() -> None:
    """Armed by the next entry, fired by the clock with a kick, served by the entry behind that, and off then."""
    m = guest()
    v = m.vcpus[0]
    v.wrmsr(COUNT, NOW + 500)
    v.wrmsr(CONFIG, ON | SINT2)
    assert timer_lines(m) == [
        "stimer_set_count: timer 0 count 10000500 host 0",
        "stimer_cleanup: timer 0",
        "kvm_msr: msr_write 400000b1 = 0x989874",
        "stimer_set_config: timer 0 config 0x20001 host 0",
        "stimer_cleanup: timer 0",
        "kvm_msr: msr_write 400000b0 = 0x20001",
        "stimer_start_one_shot: timer 0 time_now 10000000 count 10000500",
    ]
    assert m.next_timer() == (NOW + 500) * 100
    assert pass_time(m, 499) == []
    m.trace.clear()
    ((index, out),) = pass_time(m, 1)
    assert (index, out.effects) == (0, fx.Effect.KICK)
    assert timer_lines(m) == [
        "stimer_callback: timer 0",
        "kvm_msr: msr_write 80b = 0x0",
        "kvm_apic_accept_irq: apicid 0 vec 97 (Fixed|edge)",
        "synic_set_irq: sint 2 vector 97 ret 1",
        "stimer_expiration: timer 0 direct 0 send result 0",
        "stimer_cleanup: timer 0",
        "kvm_inj_virq: IRQ 0x61",
    ]
    assert (config(v), m.next_timer()) == (SINT2, None)


def test_message() -> None:
    """40 bytes are written: type, size, flags, sender, the timer, when it was due and when it came."""
    m = guest()
    m.guest_memory[SLOT2 + 5 : SLOT2 + 256] = b"\xaa" * 251
    m.vcpus[0].wrmsr(COUNT + 6, NOW + 500)
    m.vcpus[0].wrmsr(CONFIG + 6, ON | SINT2)
    pass_time(m, 700)
    expected = bytes.fromhex("10000080 18 00 0000 0000000000000000 03000000 00000000")
    assert bytes(m.guest_memory[SLOT2 : SLOT2 + 40]) == expected + struct.pack("<QQ", NOW + 500, NOW + 700)
    assert bytes(m.guest_memory[SLOT2 + 40 : SLOT2 + 256]) == b"\xaa" * 216


def test_one_shot_in_the_past() -> None:
    """No start line: it asks for another round, in which it runs out, and the interrupt is in the same entry."""
    m = guest()
    v = m.vcpus[0]
    v.wrmsr(CONFIG, AUTO | SINT2)
    m.trace.clear()
    v.wrmsr(COUNT, 5)
    assert timer_lines(m) == [
        "stimer_set_count: timer 0 count 5 host 0",
        "stimer_cleanup: timer 0",
        "kvm_msr: msr_write 400000b1 = 0x5",
        "kvm_apic_accept_irq: apicid 0 vec 97 (Fixed|edge)",
        "synic_set_irq: sint 2 vector 97 ret 1",
        "stimer_expiration: timer 0 direct 0 send result 0",
        "stimer_cleanup: timer 0",
        "kvm_inj_virq: IRQ 0x61",
    ]
    assert config(v) == AUTO | SINT2


def test_periodic_keeps_its_phase() -> None:
    """Ticks that were missed are skipped, and the next one is where it would have been."""
    m = guest()
    v = m.vcpus[0]
    v.wrmsr(COUNT, 1000)
    v.wrmsr(CONFIG, ON | PERIODIC | DIRECT)
    assert m.next_timer() == (NOW + 1000) * 100
    pass_time(m, 1000)
    assert m.next_timer() == (NOW + 2000) * 100
    m.trace.clear()
    pass_time(m, 3500)
    assert timer_lines(m) == [
        "stimer_callback: timer 0",
        "kvm_msr: msr_write 80b = 0x0",
        "kvm_apic_accept_irq: apicid 0 vec 113 (Fixed|edge)",
        "stimer_expiration: timer 0 direct 1 send result 0",
        "stimer_start_periodic: timer 0 time_now 10004500 exp_time 10005000",
        "kvm_inj_virq: IRQ 0x71",
    ]
    assert (config(v), m.next_timer()) == (ON | PERIODIC | DIRECT, (NOW + 5000) * 100)


def test_periodic_on_its_tick() -> None:
    """A tick that is served on the very tick of a later one goes a whole period on."""
    m = guest()
    m.vcpus[0].wrmsr(COUNT, 1000)
    m.vcpus[0].wrmsr(CONFIG, ON | PERIODIC | DIRECT)
    pass_time(m, 3000)
    assert m.next_timer() == (NOW + 4000) * 100


def test_slot_taken() -> None:
    """A one-shot asks for EOM by the slot's flag and stays enabled; a periodic tick is lost, silently."""
    m = guest()
    v = m.vcpus[0]
    m.guest_memory[SLOT2] = 1
    v.wrmsr(COUNT, 5)
    v.wrmsr(CONFIG, ON | SINT2)
    assert "stimer_expiration: timer 0 direct 0 send result -11" in timer_lines(m)
    assert (m.guest_memory[SLOT2 + 5], config(v), m.next_timer()) == (1, ON | SINT2, None)
    v.wrmsr(COUNT + 2, 1000)
    v.wrmsr(CONFIG + 2, ON | PERIODIC | SINT2)
    m.guest_memory[SLOT2 + 5] = 0
    m.trace.clear()
    pass_time(m, 1000)
    lines = timer_lines(m)
    assert "stimer_expiration: timer 1 direct 0 send result 0" in lines
    assert not any(line.startswith("kvm_apic_accept_irq") for line in lines)
    assert m.guest_memory[SLOT2 + 5] == 0


def test_retried_by_eom() -> None:
    """Only EOM, and EOI of the SINT's vector, look for timers that are stuck."""
    m = guest()
    v = m.vcpus[0]
    m.guest_memory[SLOT2] = 1
    v.wrmsr(COUNT, 5)
    v.wrmsr(CONFIG, ON | SINT2)
    m.guest_memory[SLOT2] = 0
    v.wrmsr(0x808, 0)
    assert config(v) == ON | SINT2
    m.trace.clear()
    v.wrmsr(MSR_HV_EOM, 0)
    assert "stimer_expiration: timer 0 direct 0 send result 0" in timer_lines(m)
    assert (config(v), m.guest_memory[SLOT2]) == (SINT2, 0x10)


def test_masked_sint() -> None:
    """The message is written all the same, and stands in its own way then; unmasking alone does not help."""
    m = guest()
    v = m.vcpus[0]
    v.wrmsr(MSR_HV_SINT0 + 2, 1 << 16 | VECTOR)
    v.wrmsr(COUNT, 5)
    v.wrmsr(CONFIG, ON | SINT2)
    assert "stimer_expiration: timer 0 direct 0 send result -2" in timer_lines(m)
    assert (m.guest_memory[SLOT2], config(v)) == (0x10, ON | SINT2)
    v.wrmsr(MSR_HV_SINT0 + 2, VECTOR)
    assert not any("expiration" in line for line in timer_lines(m))
    v.wrmsr(MSR_HV_EOM, 0)
    assert "stimer_expiration: timer 0 direct 0 send result -11" in timer_lines(m)


@pytest.mark.parametrize(("simp", "result"), [(SIMP, -2), (1 << 40 | 1, -14)])
def test_no_message_page(simp: int, result: int) -> None:
    """ENOENT while SIMP is off, EFAULT where its page is not the guest's memory."""
    m = guest()
    v = m.vcpus[0]
    v.set_msr(MSR_HV_SIMP, simp)
    v.wrmsr(COUNT, 5)
    v.wrmsr(CONFIG, ON | SINT2)
    assert f"stimer_expiration: timer 0 direct 0 send result {result}" in timer_lines(m)


def test_apic_is_off() -> None:
    """A direct tick is not taken (1), a message's interrupt is not either (EFAULT): both stay enabled and stuck."""
    m = guest()
    v = m.vcpus[0]
    v.set_msr(r.MSR_APICBASE, 0xFEE0_0000)
    v.wrmsr(COUNT, 5)
    v.wrmsr(CONFIG, ON | DIRECT)
    v.wrmsr(COUNT + 2, 5)
    v.wrmsr(CONFIG + 2, ON | SINT2)
    lines = timer_lines(m)
    assert "stimer_expiration: timer 0 direct 1 send result 1" in lines
    assert "stimer_expiration: timer 1 direct 0 send result -14" in lines
    assert config(v) == ON | DIRECT


@pytest.mark.parametrize("vector", [0, 5, 15])
def test_direct_to_a_reserved_vector(vector: int) -> None:
    """Nobody minds."""
    m = guest()
    v = m.vcpus[0]
    v.wrmsr(COUNT, 5)
    v.wrmsr(CONFIG, ON | HV_STIMER_DIRECT | vector << 4)
    assert config(v) == HV_STIMER_DIRECT | vector << 4
    assert m.mem[L.VEC + L.VEC_IRR] >> vector & 1


# ----------------------------------------------------------------------------------------------------------- registers


def test_sint_0() -> None:
    """It is no SINT for a timer that was enabled; one that was not is enabled with it."""
    m = guest()
    v = m.vcpus[0]
    v.wrmsr(CONFIG, ON | AUTO)
    assert config(v) == ON | AUTO
    v.wrmsr(CONFIG, ON)
    assert config(v) == 0
    v.wrmsr(CONFIG, ON)
    v.wrmsr(CONFIG, ON | DIRECT)
    assert config(v) == ON | DIRECT


def test_count_by_guest_and_host() -> None:
    """The guest's COUNT switches off or, by itself, on; user space's touches nothing else."""
    m = guest()
    v = m.vcpus[0]
    v.set_msr(CONFIG, AUTO | SINT2)
    v.set_msr(COUNT, NOW + 500)
    assert config(v) == AUTO | SINT2
    v.wrmsr(COUNT, NOW + 500)
    assert config(v) == ON | AUTO | SINT2
    v.set_msr(COUNT, 0)
    assert config(v) == ON | AUTO | SINT2
    v.wrmsr(COUNT, 0)
    assert config(v) == AUTO | SINT2


def test_all_bits_are_kept() -> None:
    """Lazy and reserved bits read back; nothing is made of them."""
    m = guest()
    value = L.NONE & ~(ON | PERIODIC)
    m.vcpus[0].wrmsr(CONFIG, value)
    assert m.vcpus[0].rdmsr(CONFIG) == value


def test_without_synic() -> None:
    """Readable, not writable, not even with zeroes; user space may write zeroes."""
    m = fx.Machine(2, hyperv=True, apicv=False)
    m.boot_x2apic()
    v = m.vcpus[0]
    for msr in (CONFIG, COUNT, CONFIG + 6, COUNT + 6):
        assert (v.rdmsr(msr), v.wrmsr(msr, 0).fault) == (0, fx.Fault.GP)
        assert (v.set_msr(msr, 0), v.set_msr(msr, 1)) == (True, False)


def test_direct_mode_enforced() -> None:
    """Refused before its line where the CPUID does not offer it; user space may."""
    every = HvFeature((1 << len(HvFeature)) - 1)
    m = guest(hyperv="enforce", hyperv_features=every & ~HvFeature.STIMER_DIRECT)
    v = m.vcpus[0]
    assert v.wrmsr(CONFIG, DIRECT).fault == fx.Fault.GP
    assert timer_lines(m)[0].startswith("kvm_msr: msr_write 400000b0 = 0x1710 (#GP)")
    assert v.wrmsr(CONFIG, SINT2).fault is None
    assert v.set_msr(CONFIG, DIRECT)


# ---------------------------------------------------------------------------------------------------------- the machine


def test_ends_a_halt() -> None:
    """A tick wakes the thread, and the halt is over even where nothing comes in."""
    m = guest()
    v = m.vcpus[0]
    v.wrmsr(COUNT, NOW + 500)
    v.wrmsr(CONFIG, ON | SINT2)
    v.wrmsr(MSR_HV_SINT0 + 2, 1 << 16)
    assert v.exit(fx.VmxExit.HLT).blocked
    ((index, out),) = m.set_time(m.next_timer() or 0)
    assert (index, out.effects) == (0, fx.Effect.WAKE)
    assert v.run()
    assert v.get_mp_state() == fx.MpState.RUNNABLE


def test_order() -> None:
    """Timers of a machine fire by their time, local APIC timers before synthetic ones of the same ns."""
    m = guest(hv_timer=False)
    for v, count in ((m.vcpus[1], 300), (m.vcpus[0], 500)):
        v.wrmsr(COUNT, NOW + count)
        v.wrmsr(CONFIG, ON | DIRECT)
        v.wrmsr(COUNT + 4, NOW + 400)
        v.wrmsr(CONFIG + 4, ON | DIRECT)
    m.vcpus[1].wrmsr(0x83E, 0xB)
    m.vcpus[1].wrmsr(0x832, 0xEC)
    m.vcpus[1].wrmsr(0x838, 40_000)
    m.trace.clear()
    happened = m.set_time((NOW + 500) * 100)
    fired = [line.split("vcpu_id ")[1] for line in m.trace.lines() if "callback" in line]
    assert fired == ["1 timer 0", "0 timer 2", "1 timer 2", "0 timer 0"]
    assert [index for index, _ in happened] == [1, 1, 0, 1, 0]


def test_snapshot_keeps_timers() -> None:
    m = guest()
    m.vcpus[0].wrmsr(COUNT, NOW + 500)
    m.vcpus[0].wrmsr(CONFIG, ON | DIRECT)
    again = fx.Machine.restore(m.snapshot())
    assert again.next_timer() == m.next_timer() == (NOW + 500) * 100
    assert [index for index, _ in pass_time(again, 500)] == [0]


@pytest.mark.parametrize(
    ("kernel", "saturates"),
    [
        ("5.10", False),
        ("6.1.176", False),
        ("6.1", True),
        ("6.6", False),
        ("6.12.95", False),
        ("6.12", True),
        ("6.13", False),
        ("6.18", False),
        ("7.2", True),
        ("7.3", True),
    ],
)
def test_too_far(kernel: str, saturates: bool) -> None:
    """A deadline beyond the host's clock never comes; or it wraps, is past, and fires over and over."""
    m = guest(kernel)
    v = m.vcpus[0]
    v.wrmsr(COUNT, NOW + (1 << 63) // 100 + 1)
    v.wrmsr(CONFIG, ON | DIRECT)
    assert m.next_timer() == (None if saturates else m.time)
    for _ in range(2):
        assert len(m.set_time(m.time)) == (0 if saturates else 1)
        v.wrmsr(0x80B, 0)
    assert config(v) == ON | DIRECT


def test_count_wraps() -> None:
    """Periods that exceed 64 bits with the clock wrap, as KVM's do."""
    m = guest()
    v = m.vcpus[0]
    v.wrmsr(COUNT, L.NONE)
    v.wrmsr(CONFIG, ON | PERIODIC | DIRECT)
    assert "stimer_start_periodic: timer 0 time_now 10000000 exp_time 9999999" in timer_lines(m)
