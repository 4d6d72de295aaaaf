"""The oracle's hypercalls: IPIs to virtual processors, and calls that are user space's, as a vCPU's thread makes them.

Models: kvm_hv_hypercall, hv_check_hypercall_access, kvm_hv_send_ipi. TLB flushes and eventfds are not modelled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import oracle
from fastexit import hyperv as h
from fastexit import regs as r
from fastexit.reasons import KvmExit
from oracle_hvmsrs import NEEDS
from oracle_run import INSN_LEN, Result, RunLoop

if TYPE_CHECKING:
    from oracle_hyperv import Machine, Vcpu

UD = 6
CALL_NEEDS = {
    h.HvCall.NOTIFY_LONG_SPIN_WAIT: h.HvFeature.SPIN_WAIT,
    h.HvCall.SEND_IPI: h.HvFeature.CLUSTER_IPI,
    h.HvCall.SEND_IPI_EX: h.HvFeature.CLUSTER_IPI | h.HvFeature.EX_PROCESSOR_MASKS,
    h.HvCall.POST_MESSAGE: h.HvFeature.POST_MESSAGES,
    h.HvCall.SIGNAL_EVENT: h.HvFeature.SIGNAL_EVENTS,
}


class HypervLoop(RunLoop):
    """The thread of one vCPU of a Windows guest."""

    v: Vcpu
    m: Machine

    def rdmsr(self, msr: int) -> tuple[Result, int | None]:
        if msr not in NEEDS:
            return super().rdmsr(msr)
        self.out()
        why = r.MSR_EXIT_FILTER if self.m.filtered(msr, write=False) else 0
        value = None if why else self.v.read_msr(msr, host=False)
        if value is None and not why:
            why = r.MSR_EXIT_INVAL
        return self._finish(self._msr_outcome(Result(), why, KvmExit.X86_RDMSR)), value

    def hv_hypercall(self, control: int, input: int, output: int, xmm: tuple[int, ...]) -> tuple[Result, int | None]:
        """The status that the guest finds, None where it finds an exception or where user space is asked."""
        self.out()
        if self.v.real_mode:
            self.v.queue_exception(UD)
            return self._finish(Result(fault=True)), None
        call = Call(control, input, output, [*xmm, *[0] * 12][:12], self.m)
        self.m.log(call.line())
        status = self._status(call)
        if status is None:
            if call.to_user:
                self.v.hypercall_asked = True
                self.v.hyperv_exit = (h.HvExit.HCALL, control, input, output)
                return self._finish(Result(user=KvmExit.HYPERV)), None
            self.v.queue_exception(UD)
            return self._finish(Result(fault=True)), None
        self.m.log_done(status)
        self.skip(INSN_LEN["vmcall"])
        return self._finish(Result()), status

    def _status(self, call: Call) -> int | None:
        needed = CALL_NEEDS.get(call.code, h.HvFeature(0))
        if h.HvCall.EXT_CALL_QUERY_CAPABILITIES <= call.code <= h.HvCall.EXT_CALL_LAST and self.m.extended_calls:
            needed = h.HvFeature.EXTENDED_HYPERCALLS
        if self.v.denies(needed):
            return h.HvStatus.ACCESS_DENIED
        if self.m.checks_call_words and call.control & h.HV_CALL_RESERVED:
            return h.HvStatus.INVALID_HYPERCALL_INPUT
        if call.fast and call.code == h.HvCall.SEND_IPI_EX and self.v.denies(h.HvFeature.XMM_INPUT):
            return None
        bad = call.repeated or (self.m.checks_call_words and call.variable_words > 0)
        if call.code == h.HvCall.NOTIFY_LONG_SPIN_WAIT:
            return h.HvStatus.INVALID_HYPERCALL_INPUT if bad else h.HvStatus.SUCCESS
        if call.code == h.HvCall.SEND_IPI:
            return h.HvStatus.INVALID_HYPERCALL_INPUT if bad else self._send_ipi(call)
        if call.code == h.HvCall.SEND_IPI_EX:
            if call.repeated or (call.fast and not self.m.xmm_input):
                return h.HvStatus.INVALID_HYPERCALL_INPUT
            return self._send_ipi_ex(call)
        if call.code in (h.HvCall.SIGNAL_EVENT, h.HvCall.POST_MESSAGE):
            if bad or not self.v.synic:
                return h.HvStatus.INVALID_HYPERCALL_INPUT
            call.to_user = True
            return None
        if h.HvCall.EXT_CALL_QUERY_CAPABILITIES <= call.code <= h.HvCall.EXT_CALL_LAST and self.m.extended_calls:
            if call.fast:
                return h.HvStatus.INVALID_PARAMETER
            call.to_user = True
            return None
        return h.HvStatus.INVALID_HYPERCALL_CODE

    def _send_ipi(self, call: Call) -> int:
        if call.fast:
            vector, mask = call.input, call.output
            if vector >> 32:
                return h.HvStatus.INVALID_HYPERCALL_INPUT
        else:
            block = self.m.read(call.input, 16)
            if block is None:
                return h.HvStatus.INVALID_HYPERCALL_INPUT
            vector, mask = number(block[:4]), number(block[8:])
        self.m.log(f"kvm_hv_send_ipi: vector {vector:x} processor_mask {mask:#x}")
        if not 0x10 <= vector <= 0xFF:
            return h.HvStatus.INVALID_HYPERCALL_INPUT
        self.m.send_to_vps(vector, set(oracle.bits_of(mask)))
        return h.HvStatus.SUCCESS

    def _send_ipi_ex(self, call: Call) -> int:
        bad = h.HvStatus.INVALID_HYPERCALL_INPUT
        if call.fast:
            vector, form, valid, *banks = call.input & 0xFFFF_FFFF, call.output, *call.xmm
        else:
            block = self.m.read(call.input, 24)
            if block is None:
                return bad
            vector, form, valid, banks = number(block[:4]), number(block[8:16]), number(block[16:]), []
        self.m.log(f"kvm_hv_send_ipi_ex: vector {vector:x} format {form:x} valid_bank_mask {valid:#x}")
        present = oracle.bits_of(valid)
        if self.m.checks_call_words and call.variable_words != len(present):
            return bad
        wanted = None
        if form != 1:
            if not present:
                return h.HvStatus.SUCCESS
            if not call.fast:
                block = self.m.read(call.input + 24, 8 * len(present))
                if block is None:
                    return bad
                banks = [number(block[i : i + 8]) for i in range(0, len(block), 8)]
            if len(present) > len(banks):
                return bad
            wanted = {64 * bank + bit for bank, word in zip(present, banks) for bit in oracle.bits_of(word)}
        if not 0x10 <= vector <= 0xFF:
            return bad
        self.m.send_to_vps(vector, wanted)
        return h.HvStatus.SUCCESS


class Call:
    """A hypercall's registers: XMM0 to XMM5 as twelve halves, low ones first."""

    def __init__(self, control: int, input: int, output: int, xmm: list[int], machine: Machine) -> None:
        self.control, self.input, self.output, self.xmm = control, input, output, xmm
        self.code = control & 0xFFFF
        self.fast = bool(control >> 16 & 1)
        self.variable_words = control >> 17 & 0x3FF
        self.count = control >> 32 & 0xFFF
        self.start = control >> 48 & 0xFFF
        self.repeated = self.count > 0 or self.start > 0
        self.to_user = False
        self.knows_variable_words = machine.checks_call_words

    def line(self) -> str:
        kind = "fast" if self.fast else "slow"
        counts = f"cnt {self.count:#x}"
        if self.knows_variable_words:
            counts = f"var_cnt {self.variable_words:#x} rep_cnt {self.count:#x}"
        return (
            f"kvm_hv_hypercall: code {self.code:#x} {kind} {counts} idx {self.start:#x} "
            f"in {self.input:#x} out {self.output:#x}"
        )


def number(data: bytes) -> int:
    return int.from_bytes(data, "little")
