"""Traps of Windows guests 35 to 43: synthetic timers, and messages that wait for their slot."""

from __future__ import annotations

import pytest

import fastexit as fx
from apics import interrupted, kinds, vectors
from fastexit import hyperv as h
from fastexit import regs as r
from windowstraps import (
    AUTO,
    CONFIG0,
    COUNT0,
    DIRECT,
    ENABLE,
    ON_SINT2,
    PERIODIC,
    SINT2,
    SLOT2,
    gp,
    lines,
    put,
    rdmsr,
    stimer_lines,
    switch_off,
    windows,
    with_synic,
)

# -------------------------------------------------------------------------------------------------- timers and messages


def expired(m: fx.Machine, v: fx.Vcpu, config: int, count: int = 5) -> list[str]:
    """The guest arms timer 0 and the time comes: the lines of what then happens."""
    assert not gp(v, COUNT0, count)
    assert not gp(v, CONFIG0, config)
    m.set_time(m.time + 100 * count + 100)
    m.trace.clear()
    interrupted(v)
    return lines(m, "kvm_hv_stimer_expiration")


def expiration(direct: int, result: int) -> list[str]:
    return [f"kvm_hv_stimer_expiration: vcpu_id 0 timer 0 direct {direct} send result {result}"]


def test_hv_trap_35_unmasking_delivers_nothing() -> None:
    """A timer whose message is stuck waits for EOM, or for the EOI of its SINT."""
    m, v = with_synic()
    assert expired(m, v, ENABLE | ON_SINT2, 100) == expiration(0, -2)
    put(m, SLOT2, bytes(4))
    assert not gp(v, SINT2, 0x61)
    m.trace.clear()
    interrupted(v)
    assert (stimer_lines(m), vectors(v)) == ([], set())
    v.wrmsr(h.MSR_HV_EOM, 0)
    assert lines(m, "kvm_hv_stimer_expiration") == expiration(0, 0)
    assert vectors(v) == {0x61}


def test_hv_trap_36_a_masked_sint_has_its_message() -> None:
    """It is written, nobody is interrupted, and the retry finds it in the way."""
    m, v = with_synic()
    assert expired(m, v, ENABLE | ON_SINT2, 100) == expiration(0, -2)
    slot = bytes(m.guest_memory[SLOT2 : SLOT2 + 256])
    assert slot[:8] == bytes.fromhex("10000080 18 00 0000")
    assert (slot[8:24], int.from_bytes(slot[24:32], "little"), slot[40:]) == (bytes(16), 100, bytes(216))
    assert int.from_bytes(slot[32:40], "little") >= 100
    assert vectors(v) == set()
    m.trace.clear()
    v.wrmsr(h.MSR_HV_EOM, 0)
    assert lines(m, "kvm_hv_stimer_expiration") == expiration(0, -11)
    assert m.guest_memory[SLOT2 + 5] == h.HV_MESSAGE_PENDING


@pytest.mark.parametrize("periodic", [False, True])
def test_hv_trap_37_only_one_shots_wait_for_the_slot(periodic: bool) -> None:
    """A periodic timer's tick is dropped without a trace in the slot; a one-shot sets its pending flag and waits."""
    m, v = with_synic()
    assert not gp(v, SINT2, 0x61)
    put(m, SLOT2, b"\x01\x00\x00\x00")
    wanted = expiration(0, 0 if periodic else -11)
    assert expired(m, v, ENABLE | ON_SINT2 | (PERIODIC if periodic else 0), 100) == wanted
    assert m.guest_memory[SLOT2 + 5] == (0 if periodic else h.HV_MESSAGE_PENDING)
    assert v.get_msr(CONFIG0) is not None
    assert v.rdmsr(CONFIG0) & ENABLE
    assert vectors(v) == set()
    put(m, SLOT2, bytes(4))
    m.trace.clear()
    v.wrmsr(h.MSR_HV_EOM, 0)
    assert lines(m, "kvm_hv_stimer_expiration") == ([] if periodic else expiration(0, 0))


def test_hv_trap_38_result_1_is_no_success() -> None:
    """A direct timer whose APIC is off: not accepted, still enabled, and stuck."""
    m, v = with_synic()
    assert expired(m, v, ENABLE | DIRECT | 0x51 << 4, 100) == expiration(1, 0)
    assert not v.rdmsr(CONFIG0) & ENABLE
    switch_off(v)
    assert expired(m, v, ENABLE | DIRECT | 0x51 << 4, 200) == expiration(1, 1)
    assert v.rdmsr(CONFIG0) & ENABLE
    m.set_time(m.time + 100_000)
    m.trace.clear()
    interrupted(v)
    v.wrmsr(h.MSR_HV_EOM, 0)
    assert stimer_lines(m) == []


def test_hv_trap_39_the_hosts_count_does_not_switch() -> None:
    """0 disables when the guest writes it, and a count enables an auto-enabled timer then; not when the host does."""
    _, v = with_synic()
    stopped, running = AUTO | ON_SINT2, ENABLE | AUTO | ON_SINT2
    assert v.set_msr(CONFIG0, stopped)
    assert v.set_msr(COUNT0, 1 << 40)
    assert v.get_msr(CONFIG0) == stopped
    assert not gp(v, COUNT0, 1 << 40)
    assert v.get_msr(CONFIG0) == running
    assert v.set_msr(COUNT0, 0)
    assert v.get_msr(CONFIG0) == running
    assert not gp(v, COUNT0, 0)
    assert v.get_msr(CONFIG0) == stopped


def test_hv_trap_40_enabled_with_sint_0() -> None:
    """Only the write that follows an enabled configuration loses its enable bit; a direct one never."""
    _, v = with_synic()
    for value, kept in (
        (ENABLE | AUTO, ENABLE | AUTO),
        (ENABLE, 0),
        (ENABLE, ENABLE),
        (ENABLE | DIRECT, ENABLE | DIRECT),
    ):
        assert not gp(v, CONFIG0, value)
        assert v.rdmsr(CONFIG0) == kept


def test_hv_trap_41_an_entry_serves_timers() -> None:
    """The host's timer marks and kicks; the interrupt is made, and taken, at the next entry."""
    m, v = with_synic()
    interrupted(v)
    m.trace.clear()
    v.wrmsr(CONFIG0, ENABLE | DIRECT | 0x51 << 4)
    v.wrmsr(COUNT0, 100)
    armed = [kind.removeprefix("kvm_hv_stimer_") for kind in kinds(m) if kind == "kvm_msr" or "_stimer_" in kind]
    assert armed == ["set_config", "cleanup", "kvm_msr", "cleanup", "set_count", "cleanup", "kvm_msr", "start_one_shot"]
    v.rflags |= r.RFLAGS_IF
    m.trace.clear()
    m.set_time(10_000)
    assert stimer_lines(m) == ["callback"]
    assert "kvm_apic_accept_irq" not in kinds(m)
    interrupted(v)
    assert stimer_lines(m) == ["callback", "expiration", "cleanup"]
    assert v.injected == 0x51


def test_hv_trap_42_a_one_shot_of_the_past() -> None:
    """It is never started: it runs out in one more round of the entry."""
    m, v = with_synic()
    m.set_time(100_000)
    v.wrmsr(CONFIG0, ENABLE | DIRECT | 0x51 << 4)
    m.trace.clear()
    v.wrmsr(COUNT0, 7)
    assert stimer_lines(m) == ["set_count", "cleanup", "expiration", "cleanup"]
    assert vectors(v) == {0x51}


def test_hv_trap_43_timers_are_read_without_synic() -> None:
    """And written with it alone, even 0."""
    v = windows().vcpus[0]
    assert [rdmsr(v, msr) for msr in range(CONFIG0, CONFIG0 + 8)] == [0] * 8
    assert [gp(v, msr, 0) for msr in range(CONFIG0, CONFIG0 + 8)] == [True] * 8
    assert (v.set_msr(CONFIG0, 0), v.set_msr(CONFIG0, 1), v.set_msr(COUNT0, 1)) == (True, False, False)
    assert rdmsr(v, h.MSR_HV_SCONTROL) is None
    v.enable_synic()
    assert not gp(v, CONFIG0, 0)
