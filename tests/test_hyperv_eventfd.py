"""KVM_HYPERV_EVENTFD and KVM_GET_MSR_INDEX_LIST: what user space has of Hyper-V besides MSRs.

Sources: kvm_vm_ioctl_hv_eventfd and kvm_hvcall_signal_event of arch/x86/kvm/hyperv.c, emulated_msrs_all of x86.c; the
list as kernels 6.1.176, 6.12.95 and 7.2.13 gave it.
"""

from __future__ import annotations

import pytest

import fastexit as fx
from fastexit import hyperv as hv
from fastexit.hyperv import HvCall, HvStatus

FAST = hv.HV_CALL_FAST
KERNELS = ("5.10", "5.15", "6.12", "7.3")


def windows(kernel: str = "6.12") -> fx.Machine:
    m = fx.Machine(1, kernel=kernel, hyperv=True)
    m.boot_x2apic()
    m.vcpus[0].wrmsr(hv.MSR_HV_GUEST_OS_ID, 1)
    return m


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_connection_with_an_eventfd_is_signalled(kernel: str) -> None:
    """No SynIC is needed, and user space is not asked."""
    m = windows(kernel)
    v = m.vcpus[0]
    connection, other = m.hyperv_eventfd(0x1234), m.hyperv_eventfd(0xFF_FFFF)
    assert v.hv_hypercall(HvCall.SIGNAL_EVENT | FAST, 0x1234) == HvStatus.SUCCESS
    m.guest_memory[0x5000:0x5008] = (0x1234).to_bytes(8, "little")
    assert v.hv_hypercall(HvCall.SIGNAL_EVENT, 0x5000) == HvStatus.SUCCESS
    assert (connection.take(), connection.take(), other.take()) == (2, 0, 0)


def test_what_is_no_connection() -> None:
    """A flag number finds nothing, and reserved bits are looked at before the eventfds."""
    m = windows()
    v = m.vcpus[0]
    m.hyperv_eventfd(0)
    for parameter in (1 << 32, 1 << 47, 1 << 24, 1 << 48, 1):
        assert v.hv_hypercall(HvCall.SIGNAL_EVENT | FAST, parameter) == HvStatus.INVALID_HYPERCALL_INPUT
    assert v.hv_hypercall(HvCall.SIGNAL_EVENT | FAST, 0) == HvStatus.SUCCESS


def test_one_that_is_closed_is_user_spaces_again() -> None:
    m = windows()
    v = m.vcpus[0]
    v.enable_synic(2)
    first, second = m.hyperv_eventfd(1), m.hyperv_eventfd(2)
    v.hv_hypercall(HvCall.SIGNAL_EVENT | FAST, 2)
    first.close()
    assert v.hv_hypercall(HvCall.SIGNAL_EVENT | FAST, 2) == HvStatus.SUCCESS
    assert second.take() == 2
    v.hv_hypercall(HvCall.SIGNAL_EVENT | FAST, 1)
    assert v.user_hypercall is not None
    with pytest.raises(ValueError, match=r"connection 0x1 has no eventfd \(ENOENT\)"):
        first.close()


def test_refusals() -> None:
    m = windows()
    for number in range(64):
        m.hyperv_eventfd(number)
    for number, said in ((63, "EEXIST"), (64, "room for 64"), (1 << 24, "out of range"), (-1, "out of range")):
        with pytest.raises(ValueError, match=said):
            m.hyperv_eventfd(number)
    with pytest.raises(ValueError, match="ENOTTY"):
        fx.Machine(1, kvm_hyperv=False).hyperv_eventfd(1)


def test_none_is_in_a_snapshot() -> None:
    """They are user space's, as ioeventfds are."""
    m = windows()
    m.hyperv_eventfd(7)
    again = fx.Machine.restore(m.snapshot())
    assert again.vcpus[0].hv_hypercall(HvCall.SIGNAL_EVENT | FAST, 7) == HvStatus.INVALID_HYPERCALL_INPUT
    again.hyperv_eventfd(7)


def test_msr_index_list() -> None:
    """What is not enumerated can be saved all the same: an asymmetry that a VMM has to know."""
    listed = windows("6.12").msr_index_list
    assert set(listed) - set(range(0x4000_0000, 0x4000_0200)) == {0x10, 0x3B, 0x6E0, 0x4B56_4D04}
    names = {msr - 0x4000_0000 for msr in listed if 0x4000_0000 <= msr < 0x4000_0200}
    wanted = {
        0,
        1,
        2,
        3,
        0x10,
        0x20,
        0x21,
        0x22,
        0x23,
        0x73,
        0x80,
        0xB0,
        0xFF,
        *range(0xF1, 0xF6),
        *range(0x100, 0x109),
    }
    assert names == wanted | {0x118}
    assert hv.MSR_HV_TSC_INVARIANT_CONTROL not in windows("6.1").msr_index_list
    assert fx.Machine(1, kvm_hyperv=False).msr_index_list == (0x10, 0x3B, 0x6E0, 0x4B56_4D04)
    assert hv.MSR_HV_ICR not in listed
    assert windows().vcpus[0].set_msr(hv.MSR_HV_ICR, 0x41)
