"""What is fast, what a fast exit leaves out, and in which order it traces: traps 48, 62-66; 53 is with the timer."""

from __future__ import annotations

import pytest

import fastexit as fx
from apics import ICR, INIT, LOWEST, NMI, REMOTE_READ, SIPI, alias, interrupted, kinds, machine, to_x2apic, vectors
from fastexit import layout as L
from fastexit import regs as r
from fastexit.profile import as_of, since
from generations import kernels

KERNELS = fx.profiles()
FAST, SLOW = fx.Path.FAST, fx.Path.SLOW
VENDORS = ("vmx", "svm")


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", kernels("6.12"))
def test_trap_48_accept_comes_before_ipi_in_6_18s_fast_path(kernel: str, vendor: str) -> None:
    """6.18 resolves first and traces the IPI when it knows that it was fast; its slow path and older ones do not."""
    m = machine(kernel=kernel, vendor=vendor)
    m.trace.enable()
    order = {}
    for path in (FAST, SLOW):
        m.fastpath = path is FAST
        m.trace.clear()
        assert m.vcpus[0].wrmsr(ICR, fx.icr(dest=1, vector=0x41)).path is path
        order[path] = [kind for kind in kinds(m) if kind in ("kvm_apic_ipi", "kvm_apic_accept_irq", "kvm_apic")]
    generic = ["kvm_apic_ipi", "kvm_apic_accept_irq", "kvm_apic"]
    assert order[SLOW] == generic
    assert order[FAST] == (["kvm_apic_accept_irq", "kvm_apic_ipi", "kvm_apic"] if since(kernel, "6.18") else generic)


def test_trap_48_an_exit_that_declines_is_traced_once() -> None:
    """A broadcast that the resolver cannot finish leaves no line of the try."""
    m = machine()
    m.trace.enable()
    assert m.vcpus[0].wrmsr(ICR, fx.icr(dest=0xFFFF_FFFF, vector=0x41)).path is SLOW
    lines = [kind for kind in kinds(m) if kind in ("kvm_apic_ipi", "kvm_apic_accept_irq")]
    assert lines == ["kvm_apic_ipi"] + ["kvm_apic_accept_irq"] * 3


@pytest.mark.parametrize("kernel", kernels("6.12"))
def test_trap_62_a_posted_self_ipi_reenters(kernel: str) -> None:
    """APICv: PIR and ON, no notification to the own CPU; the loop syncs PIR, RVI has it, the guest goes on."""
    m = fx.Machine(vcpus=2, kernel=kernel, apicv=True)
    m.boot_x2apic()
    v = m.vcpus[0]
    interrupted(v)
    out = v.wrmsr(ICR, fx.icr(dest=0, vector=0x41))
    assert (out.path, out.completion, out.effects) == (FAST, fx.Fastpath.REENTER_GUEST, fx.Effect.NONE)
    assert (m.mem[v.vec + L.VEC_RVI], int(v.pid[4]) & r.PID_ON, v.mode) == (0x41, 0, r.IN_GUEST_MODE)


@pytest.mark.parametrize("kernel", kernels("6.12"))
@pytest.mark.parametrize("vendor", VENDORS)
def test_trap_62_without_apicv_a_self_ipi_ends_the_loop(kernel: str, vendor: str) -> None:
    """IRR and an EVENT request: REENTER_GUEST becomes EXIT_HANDLED, and the whole next entry injects it."""
    m = machine(kernel=kernel, vendor=vendor)
    v = m.vcpus[0]
    v.rflags |= r.RFLAGS_IF
    interrupted(v)
    assert v.wrmsr(ICR, fx.icr(dest=1, vector=0x41)).completion is fx.Fastpath.REENTER_GUEST
    out = v.wrmsr(ICR, fx.icr(dest=0, vector=0x41))
    assert (out.path, out.completion, out.effects) == (FAST, fx.Fastpath.EXIT_HANDLED, fx.Effect.NONE)
    assert v.injected == 0x41


def test_trap_63_exit_userspace_skips_handle_exit() -> None:
    """A debugger's stop leaves right behind the loop: what handle_exit would have found wrong is not looked at."""
    vectoring = r.VECTORING_INFO_VALID | 0x41
    info = {"rcx": ICR, "rax": 0x51, "rdx": 1, "info2": vectoring}
    m = machine()
    out = m.vcpus[0].exit(fx.VmxExit.MSR_WRITE, **info)
    assert (out.path, out.user) == (FAST, fx.KvmExit.INTERNAL_ERROR)

    v = machine().vcpus[0]
    v.singlestep = True
    out = v.exit(fx.VmxExit.MSR_WRITE, **info)
    assert (out.path, out.completion, out.user) == (FAST, fx.Fastpath.EXIT_USERSPACE, fx.KvmExit.DEBUG)
    assert v.exit_reason is fx.KvmExit.DEBUG


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_trap_64_a_debuggers_stop_on_fast_wrmsr(kernel: str, vendor: str) -> None:
    """Single-stepping over a fast ICR write stops from 6.12 on; before, the fast path lost the stop, the slow never."""
    m = machine(kernel=kernel, vendor=vendor)
    v = m.vcpus[0]
    v.singlestep = True
    out = v.wrmsr(ICR, fx.icr(dest=1, vector=0x41))
    fast = since(kernel, "5.6") or vendor == "vmx"
    assert (out.path is FAST) is fast
    lost = fast and not since(kernel, "6.12")
    assert out.user is (None if lost else fx.KvmExit.DEBUG)
    m.fastpath = False
    assert v.wrmsr(ICR, fx.icr(dest=1, vector=0x42)).user is fx.KvmExit.DEBUG
    assert vectors(m.vcpus[1]) == {0x41, 0x42}


FIXED_KINDS = {
    "unicast": {"dest": 1},
    "absent": {"dest": 9},
    "broadcast": {"dest": 0xFFFF_FFFF},
    "all": {"shorthand": 2},
    "all but self": {"shorthand": 3},
    "self": {"shorthand": 1},
    "logical": {"dest": 2, "logical": True},
}
OTHER_KINDS = {
    "lowest": {"dest": 1, "delivery": LOWEST},
    "NMI": {"dest": 1, "delivery": NMI},
    "INIT": {"dest": 1, "delivery": INIT},
    "SIPI": {"dest": 1, "delivery": SIPI},
    "unhalt": {"dest": 1, "delivery": REMOTE_READ},
}
TAKEN = {
    "seed-v3": {"unicast", "absent", "broadcast", "all", "all but self", "self"},
    "5.6": {"unicast", "absent", "broadcast"},
    "5.7": {"unicast", "absent"},
    "6.18": {"unicast", "absent", "self", "logical", *OTHER_KINDS},
}
"""What is fast from which generation on."""


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_trap_65_multicast_is_never_fast(kernel: str, vendor: str) -> None:
    """All, all-but-self and broadcast are slow even in 6.18, where self, logical, NMI, INIT and SIPI are fast."""
    m = machine(kernel=kernel, vendor=vendor)
    v = m.vcpus[0]
    taken = set()
    for name, fields in (FIXED_KINDS | OTHER_KINDS).items():
        if v.wrmsr(ICR, fx.icr(vector=0x41, **fields)).path is FAST:
            taken.add(name)
    assert taken == (as_of(TAKEN, kernel) if since(kernel, "5.6") or vendor == "vmx" else set())


def test_trap_65_nmi_by_shorthand_is_slow_too() -> None:
    """The shorthand decides, not the delivery mode; NMI to self is fast."""
    v = machine().vcpus[0]
    paths = [v.wrmsr(ICR, fx.icr(delivery=NMI, shorthand=shorthand)).path for shorthand in (1, 2, 3)]
    assert paths == [FAST, SLOW, SLOW]


@pytest.mark.parametrize("kernel", KERNELS)
def test_trap_66_an_ipi_to_nobody_is_handled_fast(kernel: str) -> None:
    """An absent physical id is resolved, to nobody: taken, no fault, and the ICR holds the command."""
    m = machine(kernel=kernel)
    v = m.vcpus[0]
    icr = fx.icr(dest=77, vector=0x41)
    rip = v.rip
    out = v.wrmsr(ICR, icr)
    assert (out.path, out.accepted, out.fault, v.rip - rip) == (FAST, 0, None, 2)
    assert v.rdmsr(ICR) == icr
    assert v.wrmsr(ICR, fx.icr(dest=77 << 16, vector=0x41, logical=True)).path is (
        FAST if since(kernel, "6.18") else SLOW
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_trap_66_without_a_map_nobody_is_not_known_early(kernel: str) -> None:
    """6.18 leaves an unmapped machine to the slow path; from 6.6 on the fast one scanned; up to 6.1 a map is there."""
    m = machine(0, 1, 2, x2apic=False, kernel=kernel)
    to_x2apic(m.vcpus[0])
    alias(m, 2, 1)
    out = m.vcpus[0].wrmsr(ICR, fx.icr(dest=77, vector=0x41))
    assert (out.path, out.accepted) == (SLOW if since(kernel, "6.18") else FAST, -1 if since(kernel, "6.6") else 0)
