"""Exits of the VMX lab's guests that are about the guest's CPU and not its APIC: VMXON, VMXOFF, RSM, MOV to CR0.

Models: handle_vmxon, handle_vmxoff with the checks before them, the emulator's RSM (outside SMM the CPU knows no such
instruction, so KVM gets #UD), a MOV to CR0 that enters protected mode. Each takes the place of a handler of the model,
which leaves these to whoever has a guest's CPU.
"""

from __future__ import annotations

from fastexit import layout as L
from fastexit import regs as R
from fastexit.exits.exit import Exit
from fastexit.jit.declare import load
from fastexit.kvm.lab import vmxcode as C
from fastexit.machine import Machine
from fastexit.reasons import VmxExit
from fastexit.vcpu import Vcpu

FLAG_CF = 1
"""VMfailInvalid: there is no current VMCS that could say more."""
INSN_LEN_VMXON, INSN_LEN_VMXOFF, INSN_LEN_MOV_CR = 8, 3, 3
UD_INFO = R.VECTORING_INFO_VALID | 3 << 8 | R.VECTOR_UD
"""Interruption information of a hardware exception."""


class GuestCpus:
    """What the guest's CPUs are, as far as the model does not know it; its machine's handlers follow it.

    Attributes:
        able: which vCPUs have paging and CR4.VMXE, as VMXON wants. results: what each one's last VMXON or VMXOFF gave:
            what faulted, and flags.
    """

    def __init__(self, machine: Machine, able: bool) -> None:
        self.able: list[bool] = [able] * len(machine.vcpus)
        self.results: list[tuple[int, int, int]] = [(0, 0, 0)] * len(machine.vcpus)
        self._machine = machine
        machine.handlers[VmxExit.VMON] = self._vmxon
        machine.handlers[VmxExit.VMOFF] = self._vmxoff
        machine.handlers[VmxExit.EXCEPTION_NMI] = self._rsm
        machine.handlers[VmxExit.CR_ACCESS] = self._protected_mode

    def _done(self, v: Vcpu, length: int) -> int:
        return load("skip")(self._machine.handle, v.index, length)

    def _undefined(self, v: Vcpu) -> int:
        self.results[v.index] = (C.FAULTED_UD, 0, 0)
        self._machine.mem[v.own + L.K_EXCEPTION] = R.VECTOR_UD + 1
        load("make_request")(self._machine.handle, v.index, R.REQ_EVENT)
        return 0

    def _vmxon(self, v: Vcpu, exit: Exit) -> int:
        if not self.able[v.index]:
            return self._undefined(v)
        self.results[v.index] = (0, FLAG_CF * v.vmxon, 0)
        self._machine.mem[v.own + L.K_HFLAGS] |= L.HF_VMXON
        return self._done(v, INSN_LEN_VMXON)

    def _vmxoff(self, v: Vcpu, exit: Exit) -> int:
        mem = self._machine.mem
        if not v.vmxon:
            return self._undefined(v)
        self.results[v.index] = (0, 0, 0)
        mem[v.own + L.K_HFLAGS] &= ~L.HF_VMXON
        if mem[v.own + L.K_PENDING_EVENTS]:
            load("make_request")(self._machine.handle, v.index, R.REQ_EVENT)
        return self._done(v, INSN_LEN_VMXOFF)

    def _rsm(self, v: Vcpu, exit: Exit) -> None:
        v.rsm()

    def _protected_mode(self, v: Vcpu, exit: Exit) -> int:
        v.real_mode = False
        return self._done(v, INSN_LEN_MOV_CR)
