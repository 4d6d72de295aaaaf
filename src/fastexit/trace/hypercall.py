"""An IPI hypercall of a Windows guest as its lines show it: what they demand of the lines behind them.

KVM prints kvm_hv_hypercall with the registers, kvm_hv_send_ipi or kvm_hv_send_ipi_ex with the decoded input, an accept
line per target, and kvm_hv_hypercall_done with the result. Targets are VP indices, taken here as the order of vCPUs.

Spec: TLFS, HvCallSendSyntheticClusterIpi and HvCallSendSyntheticClusterIpiEx; KVM: kvm_hv_send_ipi.
"""

from __future__ import annotations

from fastexit.hyperv import HV_LOWEST_VECTOR, HvCall, HvStatus
from fastexit.trace.events import Event

_ALL = 1
"""HV_GENERIC_SET_ALL; any other format is sparse banks, whose contents no line shows."""
_U32 = 0xFFFF_FFFF


class Hypercall:
    """``call`` is its kvm_hv_hypercall line, ``send`` its kvm_hv_send_ipi(_ex) line; one of the two may be missing.

    Attributes:
        vector: 32 bits of it, as the guest gave them.
        to_all: the set is all VPs.
        by_decimal: the send line has the call's vector, in decimal.
    """

    def __init__(self, call: Event | None, send: Event | None) -> None:
        self._fast = call is not None and call.text == "fast"
        self._call = call
        self._send = send
        self._ex = send.a >= 0 if send is not None else call is not None and call.a == HvCall.SEND_IPI_EX
        self.by_decimal: bool = False
        self.vector: int = send.c if send is not None else call.b & _U32 if call is not None and self._fast else 0
        if self._fast and call is not None and send is not None and send.c != call.b & _U32:
            digits = f"{send.c:x}"
            self.by_decimal = digits.isdecimal() and int(digits) == call.b & _U32
            if self.by_decimal:
                self.vector = call.b & _U32
        self.to_all: bool = send is not None and self._ex and send.a == _ALL

    def send_text(self) -> str:
        """What a fast call's kvm_hv_send_ipi line must say; "" where its input is in memory or in XMM registers."""
        if not self._fast or self._ex or self._call is None:
            return ""
        return f"vector {self._call.b & _U32:x} processor_mask 0x{self._call.c:x}"

    def _valid(self) -> bool:
        return HV_LOWEST_VECTOR <= self.vector <= 0xFF

    def targets(self, vcpus: list[int]) -> list[int] | None:
        """The ids of the vCPUs that it reaches, of those in order of VP index; None where no line shows the set."""
        if self._send is not None:
            if self.to_all:
                return vcpus if self._valid() else []
            if self._ex:
                return None if self._send.b else []
            mask = self._send.b
        elif self._fast and not self._ex and self._call is not None:
            mask = self._call.c
        else:
            return None
        return [vcpu for vp, vcpu in enumerate(vcpus) if vp < 64 and mask >> vp & 1] if self._valid() else []

    def status(self) -> int | None:
        """The result; None where it depends on what no line shows."""
        if self._send is None or self._ex:
            return None
        return int(HvStatus.SUCCESS if self._valid() else HvStatus.INVALID_HYPERCALL_INPUT)
