"""What user space reads and sets of NMIs, SMIs, INIT and mp_state, generation by generation."""

from __future__ import annotations

import pytest

import fastexit as fx
from apics import INIT, NMI, SMI, machine, msi
from fastexit import layout as L
from fastexit import regs as r
from fastexit.traits import Trait
from generations import kernels

KERNELS = fx.profiles()
VENDORS = ("vmx", "svm")
DISPATCHERS = ("python", "compiled")
COUNTED = kernels("6.6")
IN_RUN = kernels("6.18")
INIT_RECEIVED, SIPI_RECEIVED = r.MpState.INIT_RECEIVED, r.MpState.SIPI_RECEIVED


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_nmis(kernel: str) -> None:
    """KVM_GET_VCPU_EVENTS of 6.1 shows whether one waits (seen on 5.10.262, 6.1.192); later it counts. Both wait."""
    m = machine(0, kernel=kernel)
    v = m.vcpus[0]
    for _ in range(3):
        msi(m, 0, 0, NMI)
    assert v.events().nmi_pending == (2 if kernel in COUNTED else 1)
    assert v.run()
    assert v.nmi_masked
    assert v.events().nmi_pending == 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_number_of_nmis_is_set(kernel: str) -> None:
    """6.1.192 kvm_vcpu_ioctl_x86_set_vcpu_events stores the number and asks for no NMI; later it is queued: limited."""
    m = machine(0, kernel=kernel)
    v = m.vcpus[0]
    v.set_events(nmi_pending=5)
    assert bool(v.requests & r.REQ_NMI) is (kernel in COUNTED)
    for left in (4, 3) if kernel not in COUNTED else (1, 0):
        assert v.run()
        assert m.mem[v.own + L.K_NMI_PENDING] == left
        v.get_msr(r.MSR_APICBASE)
        v.nmi_masked = False
    v.set_events(nmi_pending=5)
    v.events()
    assert m.mem[v.own + L.K_NMI_PENDING] == 2, "whoever looks at them limits them"


@pytest.mark.parametrize("kernel", KERNELS)
def test_looking_asks_for_an_event(kernel: str) -> None:
    """process_nmi of 6.1 makes a request even where no NMI waits."""
    m = machine(0, kernel=kernel)
    v = m.vcpus[0]
    v.run()
    v.events()
    assert bool(v.requests & r.REQ_EVENT) is (kernel not in COUNTED)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_smi_that_is_only_requested(kernel: str) -> None:
    """It is always accepted before there is CONFIG_KVM_SMM, and not shown up to 5.8, where it stays a request."""
    m = machine(0, kernel=kernel, smm=False)
    accepted = msi(m, 0, 0, SMI)
    assert accepted == (0 if kernel in COUNTED else 1)
    shown = accepted and kernel not in kernels(before="5.10")
    v = m.vcpus[0]
    assert v.events().smi_pending is bool(shown)
    v.run()
    assert v.smm is bool(accepted)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_old_kernel_has_smm(kernel: str) -> None:
    """KVM_SET_VCPU_EVENTS takes the SMM fields then, whatever Machine's smm says, which is on unless it is told not."""
    fx.Machine(vcpus=1, kernel=kernel).vcpus[0].set_events(smm=True)
    v = fx.Machine(vcpus=1, kernel=kernel, smm=False).vcpus[0]
    if kernel in COUNTED:
        with pytest.raises(ValueError, match="CONFIG_KVM_SMM"):
            v.set_events(smm=True)
    else:
        v.set_events(smm=True)
        assert v.events().smm


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("vendor", VENDORS)
def test_masked_nmis_over_an_init(kernel: str, vendor: str) -> None:
    """SVM's mask outlives INIT since it is no flag among others any more: seen from 6.12.118 on, not on 6.1.192."""
    m = machine(0, 1, kernel=kernel, vendor=vendor)
    v = m.vcpus[1]
    v.set_events(nmi_masked=True)
    msi(m, 1, 0, INIT)
    assert v.get_mp_state() == INIT_RECEIVED
    assert v.events().nmi_masked is (vendor == "svm" and kernel in COUNTED)


@pytest.mark.parametrize("kernel", KERNELS)
def test_init_latched_in_smm(kernel: str) -> None:
    """5.4.286 reads latched_init only of a vCPU that goes into SMM, so leaving it keeps the INIT; 5.6.4 clears it."""
    m = machine(0, 1, kernel=kernel)
    v = m.vcpus[1]
    v.set_mp_state(r.MpState.RUNNABLE)
    v.set_events(smm=True, latched_init=True)
    assert v.events().latched_init
    v.set_events(smm=False)
    assert v.get_mp_state() == (INIT_RECEIVED if kernel == "seed-v3" else r.MpState.RUNNABLE)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("state", [INIT_RECEIVED, SIPI_RECEIVED])
def test_a_state_that_init_blocks(kernel: str, state: r.MpState, dispatcher: str) -> None:
    """KVM_SET_MP_STATE refuses it up to 6.16; 6.17.13 takes it, and KVM_RUN fails with EINVAL."""
    m = machine(0, 1, kernel=kernel, dispatcher=dispatcher)
    v = m.vcpus[1]
    v.set_events(smm=True)
    if kernel not in IN_RUN:
        with pytest.raises(ValueError, match="EINVAL"):
            v.set_mp_state(state)
        return
    v.set_mp_state(state)
    m.trace.enable()
    with pytest.raises(ValueError, match=r"KVM_RUN: .* \(EINVAL\)"):
        v.run()
    assert m.trace.lines()[-1] == "kvm_userspace_exit: reason error (22)"
    assert (v.mode, v.exit_reason) == (r.OUTSIDE_GUEST_MODE, fx.KvmExit.UNKNOWN)
    v.rsm()
    assert v.run() is (state == SIPI_RECEIVED)


@pytest.mark.parametrize("kernel", KERNELS)
def test_smm_of_a_vcpu_that_waits_for_sipi(kernel: str) -> None:
    """The same the other way round: KVM_SET_VCPU_EVENTS with smm, or with an SMI, of a vCPU in INIT_RECEIVED."""
    v = machine(0, 1, kernel=kernel).vcpus[1]
    v.set_mp_state(INIT_RECEIVED)
    for smm in (False, True):
        if kernel in IN_RUN:
            v.set_events(smm=smm, smi_pending=True)
        else:
            with pytest.raises(ValueError, match="EINVAL"):
                v.set_events(smm=smm, smi_pending=True)
    if kernel in IN_RUN:
        with pytest.raises(ValueError, match="EINVAL"):
            v.run()


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_a_sleeper_is_not_asked_again(dispatcher: str) -> None:
    """It waits inside KVM_RUN, whose check is over, when VMX operation begins to block INIT."""
    m = machine(0, 1, dispatcher=dispatcher)
    v = m.vcpus[1]
    v.set_mp_state(INIT_RECEIVED)
    assert not v.run()
    v.vmxon = True
    assert not v.run()
    assert v.exit_reason is None


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("vendor", VENDORS)
def test_a_halt_with_an_init_that_is_blocked(kernel: str, vendor: str) -> None:
    """5.10.262 kvm_vcpu_has_events looks at pending events alone; 6.1.192 asks whether they can be taken."""
    m = machine(0, 1, kernel=kernel, vendor=vendor)
    v = m.vcpus[1]
    v.run()
    v.vmxon, v.gif = True, vendor == "vmx"
    msi(m, 1, 0, INIT)
    out = v.exit(fx.VmxExit.HLT if vendor == "vmx" else fx.SvmExit.HLT)
    assert out.blocked is (kernel in kernels("6.1"))
    assert v.events().latched_init


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kick_of_a_running_vcpu(kernel: str) -> None:
    """Up to 6.12 the next halt uses it up, KVM_SET_MP_STATE(RUNNABLE) does not (6.12.118, 5.10.262); later it does."""
    m = machine(0, 1, kernel=kernel)
    sender, v = m.vcpus
    v.run()
    sender.hypercall(r.HC_KICK_CPU, 0, 1)
    v.set_mp_state(r.MpState.RUNNABLE)
    kept = kernel in kernels(before="6.18")
    assert (Trait.UNHALT_KEPT in m.profile.traits) is kept
    hlt = fx.VmxExit.HLT
    assert v.exit(hlt).blocked is not kept
    if kept:
        assert v.exit(hlt).blocked, "used up"
