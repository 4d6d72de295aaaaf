"""Posted interrupts: the descriptor's 64 bytes, who notifies whom, PIR on its way to IRR, and delivery without it."""

from __future__ import annotations

import os
import struct
from typing import Any

import numpy as np
import pytest

import fastexit as fx
from fastexit import layout as L
from fastexit import regs as r
from fastexit.jit.declare import load
from fastexit.profile import since
from generations import kernels

ICR, TPR = 0x830, 0x808
ON, SN = 1, 2
KICKING = kernels(before="6.1")
INTERPRETED = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")


def booted(kernel: str = "6.18", vendor: str = "vmx", apicv: bool = True, **options: Any) -> fx.Machine:
    m = fx.Machine(vcpus=3, kernel=kernel, vendor=vendor, apicv=apicv, **options)
    m.boot_x2apic()
    return m


def run(v: fx.Vcpu) -> fx.Outcome:
    return v.exit(fx.SvmExit.INTERRUPT if v.machine.vendor == "svm" else fx.VmxExit.EXTERNAL_INTERRUPT)


def blocked(m: fx.Machine, index: int) -> fx.Vcpu:
    """A vCPU that waits for SIPI, its APIC enabled."""
    v = m.vcpus[index]
    run(v)
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=v.vcpu_id, delivery=5))
    assert run(v).blocked
    return v


def send(m: fx.Machine, dest: int, vector: int) -> fx.Outcome:
    return m.vcpus[0].wrmsr(ICR, fx.icr(dest=dest, vector=vector))


def descriptor(v: fx.Vcpu) -> bytes:
    return v.pid.tobytes()


def rvi(v: fx.Vcpu) -> int:
    return v.machine.mem[v.vec + L.VEC_RVI]


def irr(v: fx.Vcpu) -> set[int]:
    """Vectors in IRR, without a sync."""
    words = v.machine.mem[v.vec : v.vec + 4].tolist()
    return {i * 64 + bit for i, word in enumerate(words) for bit in range(64) if word >> bit & 1}


def test_descriptor_at_rest() -> None:
    """After reset: PIR empty, SN set, NV 0xF2, everything else 0; 64 bytes, aligned to 64."""
    m = booted()
    for v in m.vcpus:
        raw = descriptor(v)
        assert len(raw) == 64
        assert raw == bytes(32) + bytes([SN, 0, 0xF2, 0, 0]) + bytes(27)
        assert v.pid.ctypes.data % 64 == 0


@pytest.mark.parametrize("vector", [0, 7, 8, 31, 63, 64, 0x80, 0xEC, 0xFD, 0xFF])
def test_vector_has_its_bit(vector: int) -> None:
    """Vector v is bit v % 8 of byte v / 8; posting sets it and ON, and touches no other byte."""
    m = booted()
    assert send(m, 1, vector).accepted == 1
    expected = bytearray(64)
    expected[vector // 8] = 1 << vector % 8
    expected[32], expected[34] = ON | SN, 0xF2
    assert descriptor(m.vcpus[1]) == bytes(expected)
    assert descriptor(m.vcpus[2])[:33] == bytes(32) + bytes([SN])


def test_one_notification_covers_all() -> None:
    """The first vector notifies; the same again stops at PIR, another one at ON; each is accepted."""
    m = booted()
    run(m.vcpus[1])
    outcomes = [send(m, 1, vector) for vector in (0x41, 0x41, 0x42)]
    assert [out.effects for out in outcomes] == [fx.Effect.NOTIFY, fx.Effect.NONE, fx.Effect.NONE]
    assert [out.accepted for out in outcomes] == [1, 1, 1]
    assert m.vcpus[1].mode == 1, "a notification is no kick"


def test_notification_again_after_the_sync() -> None:
    """Once the target has synced, the next vector notifies anew."""
    m = booted()
    run(m.vcpus[1])
    assert send(m, 1, 0x41).effects == fx.Effect.NOTIFY
    run(m.vcpus[1])
    assert send(m, 1, 0x41).effects == fx.Effect.NOTIFY


@pytest.mark.parametrize("kernel", fx.profiles())
def test_target_in_the_guest_is_notified(kernel: str) -> None:
    """Every generation sends 0xF2 to a target that runs, even if SN were set: SN silences devices only."""
    m = booted(kernel)
    run(m.vcpus[1])
    m.vcpus[1].pid[4] |= np.uint64(SN)
    assert send(m, 1, 0xFD).effects == fx.Effect.NOTIFY
    assert m.vcpus[1].mode == 1


@pytest.mark.parametrize("kernel", fx.profiles())
def test_target_in_user_space_finds_it_itself(kernel: str) -> None:
    """A target outside the guest, awake, needs nothing: it syncs before it enters."""
    m = booted(kernel)
    assert send(m, 1, 0xFD).effects == fx.Effect.NONE
    run(m.vcpus[1])
    assert rvi(m.vcpus[1]) == 0xFD


@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("apicv", [True, False])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_blocked_target_is_woken_once(kernel: str, apicv: bool, vendor: str) -> None:
    """A vCPU whose thread sleeps is woken by the first interrupt; nobody kicks or notifies it."""
    m = booted(kernel, vendor, apicv)
    blocked(m, 1)
    m.vcpus[1].set_msr(0x80F, 0x1FF)
    assert send(m, 1, 0xFD).effects == fx.Effect.WAKE
    assert send(m, 1, 0xFC).effects == fx.Effect.NONE


@pytest.mark.parametrize("kernel", KICKING)
def test_older_kernels_kick_a_target_that_is_leaving(kernel: str) -> None:
    """Older kernels kick a target outside the guest; since only IN_GUEST mode can be kicked, EXITING stays EXITING."""
    m = booted(kernel)
    v = m.vcpus[1]
    run(v)
    assert m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, delivery=4)).effects == fx.Effect.KICK
    assert (v.mode, send(m, 1, 0xFD).effects) == (2, fx.Effect.NONE)
    run(v)
    assert rvi(v) == 0xFD


@pytest.mark.parametrize("kernel", fx.profiles())
def test_self_ipi_needs_no_notification(kernel: str) -> None:
    """An IPI to the sender itself wakes and kicks nobody; before the guest goes on it is in RVI.

    5.10.262 and 5.15.85 notify their own pCPU from the fast path (vmx_deliver_posted_interrupt); 5.8.18 asked who runs.
    """
    m = booted(kernel)
    v = m.vcpus[0]
    run(v)
    out = send(m, 0, 0xFD)
    effect = fx.Effect.NOTIFY if kernel in kernels("5.10", before="6.1") else fx.Effect.NONE
    assert (out.path, out.accepted, out.effects) == (fx.Path.FAST, 1, effect)
    assert v.targets == (((0, effect),) if effect else ())
    assert (v.mode, rvi(v), v.pid[4]) == (1, 0xFD, 0xF20000)
    assert irr(v) == {0xFD}


def test_sync_moves_all_of_pir() -> None:
    """A sync takes every vector to IRR, clears PIR and ON, keeps IRR's old bits and sets RVI to the highest of all."""
    m = booted()
    v = m.vcpus[1]
    send(m, 1, 0xE0)
    run(v)
    assert (irr(v), rvi(v)) == ({0xE0}, 0xE0)
    for vector in (0x20, 0x45, 0x81, 0xC3):
        send(m, 1, vector)
    assert irr(v) == {0xE0}, "posted is not pending yet"
    run(v)
    assert irr(v) == {0x20, 0x45, 0x81, 0xC3, 0xE0}
    assert rvi(v) == 0xE0
    assert descriptor(v) == bytes(32) + bytes([0, 0, 0xF2, 0, 1]) + bytes(27)


def test_sync_happens_where_somebody_looks() -> None:
    """pending() and KVM_GET_LAPIC sync; the posted vector shows there."""
    m = booted()
    send(m, 1, 0x41)
    assert m.vcpus[1].pending() == 0x41
    send(m, 2, 0x41)
    page = m.vcpus[2].get_lapic()
    assert page[0x220] == 2
    assert not m.vcpus[2].pid[:4].any()


def test_software_disabled_target_keeps_its_descriptor_clean() -> None:
    """A vector to a software-disabled APIC is not posted; one that is posted all the same stays there over an entry.

    The first entry has a new APIC map to scan for, and looks at what was posted before.
    """
    m = booted()
    v = m.vcpus[1]
    send(m, 1, 0x41)
    v.set_msr(0x80F, 0xFF)
    assert send(m, 1, 0x42).accepted == 0
    run(v)
    assert irr(v) == {0x41}
    load("hardware_post")(m.handle, 1, 0x43)
    run(v)
    assert irr(v) == {0x41}
    assert descriptor(v)[0x43 // 8] == 1 << 0x43 % 8


@pytest.mark.parametrize("kernel", [*fx.profiles(), "6.18.26"])
def test_on_with_an_empty_pir(kernel: str) -> None:
    """ON without a vector: some kernels report none and zero RVI though IRR has one; the others look at IRR."""
    m = booted(kernel)
    v = m.vcpus[1]
    send(m, 1, 0x41)
    run(v)
    assert rvi(v) == 0x41
    v.pid[4] |= np.uint64(ON)
    run(v)
    assert rvi(v) == (0 if kernel == "6.18.26" else 0x41)
    assert irr(v) == {0x41}
    assert v.pending() == 0x41, "without ON the next look goes to IRR in every kernel"


def test_set_lapic_and_init_empty_the_descriptor() -> None:
    """KVM_SET_LAPIC and INIT throw away what was posted; SN, NV and NDST stay."""
    m = booted()
    page = m.vcpus[1].get_lapic()
    at_rest = descriptor(m.vcpus[1])
    send(m, 1, 0x41)
    m.vcpus[1].set_lapic(page)
    assert descriptor(m.vcpus[1]) == at_rest
    assert m.vcpus[1].pending() is None

    send(m, 2, 0x41)
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=2, delivery=5))
    m.vcpus[2].get_mp_state()
    assert descriptor(m.vcpus[2]) == at_rest


def test_trigger_mode_is_written_at_once() -> None:
    """TMR follows the trigger of the newest interrupt while the vector itself is still in PIR."""
    m = booted()
    v = m.vcpus[1]
    tmr = v.hot + L.HOT_TMR + 1
    m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0x41, level=True, trigger_level=True))
    assert (m.mem[tmr], irr(v)) == (1 << 1, set())
    send(m, 1, 0x41)
    assert m.mem[tmr] == 0


@pytest.mark.parametrize("kernel", fx.profiles())
def test_without_apicv_irr_is_set_directly(kernel: str) -> None:
    """Without APICv: IRR at once, EVENT requested, a running target kicked; the descriptor stays out of it."""
    m = booted(kernel, apicv=False)
    v = m.vcpus[1]
    run(v)
    out = send(m, 1, 0x41)
    assert (out.accepted, out.effects) == (1, fx.Effect.KICK)
    assert (irr(v), v.mode, v.requests) == ({0x41}, 2, r.REQ_EVENT)
    assert not v.pid[:4].any()
    assert not v.pid[4] & np.uint64(ON)


def test_avic_rings_the_doorbell() -> None:
    """AVIC: IRR at once, no request; a doorbell for a running target, nothing for oneself or one in user space."""
    m = booted(vendor="svm")
    v = m.vcpus[1]
    assert send(m, 1, 0x31).effects == fx.Effect.NONE
    run(v)
    out = send(m, 1, 0x41)
    assert (out.accepted, out.effects) == (1, fx.Effect.DOORBELL)
    assert (irr(v), v.mode, v.requests) == ({0x31, 0x41}, 1, 0)
    assert send(m, 1, 0x41).effects == fx.Effect.DOORBELL, "AVIC has no ON that could tell"
    assert send(m, 0, 0x41).effects == fx.Effect.NONE
    assert not v.pid[:4].any()


def test_effects_of_a_multicast_unite() -> None:
    """One target runs, one sleeps: the outcome carries both effects."""
    m = booted()
    blocked(m, 2)
    m.vcpus[2].set_msr(0x80F, 0x1FF)
    run(m.vcpus[1])
    out = m.vcpus[0].wrmsr(ICR, fx.icr(vector=0xFD, shorthand=3))
    assert (out.accepted, out.effects) == (2, fx.Effect.NOTIFY | fx.Effect.WAKE)


class Watched:
    """A machine's words that note every access to the named ones, in order."""

    def __init__(self, words: np.ndarray, names: dict[int, str]) -> None:
        self.words = words
        self.names = names
        self.log: list[str] = []

    def _note(self, verb: str, i: Any) -> None:
        if not isinstance(i, slice) and int(i) in self.names:
            self.log.append(f"{verb} {self.names[int(i)]}")

    def __getitem__(self, i: Any) -> Any:
        self._note("read", i)
        return self.words[i]

    def __setitem__(self, i: Any, value: Any) -> None:
        self._note("write", i)
        self.words[i] = value


def watched(m: fx.Machine, v: fx.Vcpu) -> Watched:
    names = {v.hot + i: f"PIR{i}" for i in range(4)}
    return Watched(m.words, names | {v.hot + 4: "control", v.hot + L.HOT_MODE: "mode"})


@pytest.mark.skipif(not INTERPRETED, reason="the order of memory accesses can be watched with interpreted kernels only")
def test_order_of_a_post() -> None:
    """The sender sets PIR, then ON, and only then looks whether the target runs."""
    from fastexit.kernels.pid import post

    m = booted()
    words = watched(m, m.vcpus[1])
    post(words, np.uint64(1), np.uint64(0x41), np.uint64(0))
    assert words.log == ["read PIR1", "write PIR1", "read control", "write control", "read mode"]


@pytest.mark.skipif(not INTERPRETED, reason="the order of memory accesses can be watched with interpreted kernels only")
def test_order_of_a_sync() -> None:
    """The target clears ON before it looks at any PIR word, and sets IN_GUEST mode before it looks at ON."""
    from fastexit.kernels.steps import enter

    m = booted()
    send(m, 1, 0x41)
    words = watched(m, m.vcpus[1])
    enter(words, np.uint64(1))
    assert words.log.index("write mode") < words.log.index("read control")
    assert words.log.index("write control") < min(i for i, entry in enumerate(words.log) if "PIR" in entry)
    assert irr(m.vcpus[1]) == {0x41}


@pytest.mark.parametrize("fell", [False, True], ids=["PPR stays", "PPR falls"])
@pytest.mark.parametrize("restore", ["INIT", "KVM_SET_LAPIC"])
@pytest.mark.parametrize("kernel", fx.profiles())
def test_what_was_posted_before_a_restore(kernel: str, restore: str, fell: bool) -> None:
    """A PPR that falls has apic_update_ppr look for interrupts, so PIR is in IRR before 5.4 to 5.15 empty it.

    Asked of the kvm_intel of 5.10.262 and 6.1.192, with APICv: 0x46 is left by the first alone, and if PPR falls.
    """
    m = booted(kernel, x2apic_api=1)
    v = m.vcpus[1]
    page = bytearray(v.get_lapic())
    struct.pack_into("<I", page, r.APIC_PROCPRI, 0xF0 if fell else 0)
    if fell:
        v.set_msr(TPR, 0x50)
    assert m.signal_msi(0xFEE0_1000, 0x46) == 1
    if restore == "INIT":
        assert m.signal_msi(0xFEE0_1000, r.DM_INIT << 8) == 1
        assert v.get_mp_state() == r.MP_INIT_RECEIVED
    else:
        v.set_lapic(bytes(page))
    assert v.pending() == (0x46 if fell and not since(kernel, "6.1") else None)


@pytest.mark.parametrize("kernel", kernels("5.6"))
def test_what_was_posted_before_an_inhibit(kernel: str) -> None:
    """The kvm_intel of 5.10.262 loses it where SynIC inhibits APICv; 5.15.89 looks into PIR all the same."""
    m = booted(kernel)
    v = m.vcpus[1]
    run(v)
    v.get_lapic()
    assert send(m, 1, 0x46).accepted == 1
    m.set_inhibit(r.Inhibit.DISABLED, True)
    run(v)
    assert not v.apicv
    assert v.pending() == (0x46 if since(kernel, "5.15") else None)
    m.set_inhibit(r.Inhibit.DISABLED, False)
    run(v)
    assert v.apicv
    assert v.pending() == 0x46
