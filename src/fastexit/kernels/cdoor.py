"""What the C door needs besides the loop and the entries that Python calls: its hottest exit, RESET, events."""

from ..jit.declare import kernel
from . import typed as k
from .events import leave_smm, reset_vcpu_init
from .halt import set_mp_state
from .lapicstate import reset
from .loop import behind_unicast, find_row, handles, leave_guest, run_exit
from .shared import clear_word_bits, make_request, own
from .unicast import again, possible, send


@kernel("u8(words, u8, u8)")
def ipi(m, v, icr):
    """An x2APIC ICR write up to the guest again: its outcome code, or 0 with nothing touched."""
    if not possible(m):
        return k.ZERO
    code = send(m, v, icr)
    if not code or again(m, v):
        return code
    return behind_unicast(m, v, code, icr)


@kernel("u8(words, u8, u8, u8, u8)")
def hypercall(m, v, control, given, output):
    """A 64-bit guest's VMCALL or VMMCALL with what layout.XMM has: its outcome code, or NONE with nothing touched."""
    reason = k.SVM_VMMCALL if m[k.H_CONFIG] & k.CONFIG_SVM else k.VMX_VMCALL
    row = find_row(m, reason, k.ZERO)
    if not handles(m, v, row):
        return k.NONE
    return run_exit(m, v, row, reason, output, given, control)


@kernel("u8(words, u8, u8)")
def reset_vcpu(m, v, power):
    """INIT by user space, at once and whatever blocks it; with ``power`` the vCPU is as KVM_CREATE_VCPU left it."""
    leave_guest(m, v)
    row = own(m, v)
    reset_vcpu_init(m, v)
    m[row + k.K_SENT] = k.ZERO  # there is no outcome, only targets
    clear_word_bits(m, row + k.K_PENDING_EVENTS, k.PENDING_INIT | k.PENDING_SIPI)
    if not power:
        state = k.MP_RUNNABLE if m[row + k.K_APIC_BASE] & k.APICBASE_BSP else k.MP_INIT_RECEIVED
        return set_mp_state(m, v, state)
    m[row + k.K_NMI_MASKED] = k.ZERO
    m[row + k.K_PV_UNHALTED] = k.ZERO
    m[row + k.K_EXTINT] = k.ZERO
    m[row + k.K_TSC_DEADLINE] = k.ZERO
    m[row + k.K_HV_DEADLINE] = k.NONE
    reset(m, v, k.ZERO)
    return set_mp_state(m, v, k.MP_RUNNABLE if m[row + k.K_VCPU_ID] == m[k.H_BSP_ID] else k.MP_UNINITIALIZED)


@kernel("u8(words, u8)")
def smi(m, v):
    """KVM_SMI; CODE_GP, with nothing touched, where the kernel has no SMM."""
    if not m[k.H_CONFIG] & k.CONFIG_SMM and not m[k.H_RULES] & k.R_SMI_ALWAYS:
        return k.CODE_GP
    leave_guest(m, v)
    make_request(m, v, k.REQ_SMI)
    return k.ZERO


@kernel("u8(words, u8, u8)")
def interrupt(m, v, vector):
    """KVM_INTERRUPT; CODE_GP for an in-kernel PIC (ENXIO), and where a vector waits (EEXIST)."""
    leave_guest(m, v)
    row = own(m, v)
    if not m[k.H_CONFIG] & k.CONFIG_SPLIT_IRQCHIP or m[row + k.K_EXTINT]:
        return k.CODE_GP
    m[row + k.K_EXTINT] = (vector & k.ICR_VECTOR) + k.ONE
    make_request(m, v, k.REQ_EVENT)
    return k.ZERO


@kernel("u8(words, u8)")
def rsm(m, v):
    """RSM; CODE_GP outside SMM, where it is #UD."""
    if not m[own(m, v) + k.K_HFLAGS] & k.HF_SMM:
        return k.CODE_GP
    leave_smm(m, v)
    return k.ZERO
