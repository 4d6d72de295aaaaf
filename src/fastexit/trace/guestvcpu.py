"""One vCPU of a replayed VM: its thread's accesses in, predictions compared with what KVM printed.

Accesses go through the model's host doors, whose tracepoints are those of KVM's generic path; a guest's APICBASE write
goes through its own door, because the host may do what a guest may not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastexit import hyperv as HV
from fastexit import layout as L
from fastexit import regs as R
from fastexit.trace.accesses import Access, Lane, Via
from fastexit.trace.arrivals import Injections, irr_bit, not_pending, vectored
from fastexit.trace.doors import DOING_OF_REGISTER, REGISTER_OF_SYNTHETIC, Doing, Door, doing_of_synthetic
from fastexit.trace.events import ACTED, TIMED, Event
from fastexit.trace.hypercall import Hypercall
from fastexit.trace.hypervlines import HypervLines
from fastexit.trace.report import FAULTED, call_class, icr_class
from fastexit.tracepoints.text import accept_text, ipi_text
from fastexit.vcpu import Vcpu

if TYPE_CHECKING:
    from fastexit.trace.guest import Guest

TIMER = "timer"
"""Cause of an accept line: the vCPU's own timer."""
UNTOLD = "MSI or IOAPIC"
"""Cause of an accept line of a vCPU's thread that nothing else explains."""

_RUNS_BY_ITSELF = frozenset((R.APIC_TMCCT, R.APIC_TMICT))
_IPI_BITS = R.ICR_VECTOR | R.ICR_DM | R.ICR_LOGICAL | R.ICR_LEVEL | R.ICR_TRIGGER | R.ICR_SHORTHAND
_ACCEPT_BITS = R.ICR_VECTOR | R.ICR_DM | R.ICR_TRIGGER
_LINUX_TIMER = next(vector for vector, name in R.LINUX_VECTORS.items() if name == "LOCAL_TIMER")
_TRACING = L.CONFIG_TRACE
_SYNTHETIC = {register: msr for msr, register in REGISTER_OF_SYNTHETIC.items()}

Printed = tuple[int, int]
"""A kvm_apic_ipi line as (destination, ICR bits), a kvm_apic_accept_irq line as (vCPU id, ICR bits)."""


class GuestVcpu:
    """One vCPU of a Guest, as a sink for its thread's accesses."""

    def __init__(self, guest: Guest, v: Vcpu) -> None:
        self.v = v
        self.x2apic: bool = False
        self.lane: Lane = Lane(self, v.vcpu_id, guest.lanes)
        self._guest = guest
        self._report = guest.report
        self._eois = guest.report.eoi
        self._mem = guest.machine.mem
        self._seen = False
        self._host_ends = False
        self._injections = Injections(guest, v, self.lane.arriving)
        self._timer = _LINUX_TIMER
        self._hyperv = HypervLines(guest, v) if guest.report.hyperv else None
        self._running = False  # before the first line, and no interrupt of this trace has come through yet

    # --------------------------------------------------------------------------------------------------- first state

    def put_into_mode(self, x2apic: bool) -> None:
        """What a VMM does with KVM_SET_MSRS or KVM_SET_SREGS."""
        base = self.v.apic_base | R.APICBASE_EN
        self.v.set_msr(R.MSR_APICBASE, base | R.APICBASE_EXTD if x2apic else base & ~R.APICBASE_EXTD)
        self.x2apic = x2apic

    def load(self, read: dict[int, int], enabled: bool) -> None:
        """Loads what a running guest must have, and over it what the guest read before it wrote."""
        self._running = enabled
        page = bytearray(self.v.get_lapic())
        if enabled:
            _put(page, R.APIC_SPIV, 0x1FF)
            if not self.x2apic and self.v.index < 8:
                _put(page, R.APIC_LDR, 1 << 24 + self.v.index)
        learned = []
        for offset, value in read.items():
            was = int.from_bytes(page[offset : offset + 4], "little")
            if was == value & 0xFFFF_FFFF or (self.x2apic and offset == R.APIC_LDR):
                continue
            _put(page, offset, value & 0xFFFF_FFFF)
            if offset == R.APIC_ICR:
                _put(page, R.APIC_ICR2, value >> 32)
            learned.append(f"{R.REGISTER_NAMES[offset]} {value:#x} instead of {was:#x}")
        self.v.set_lapic(bytes(page))
        if learned:
            self._guest.assume(f"vCPU {self.v.vcpu_id} from the start as its first reads say: {', '.join(learned)}")
        self._timer = read.get(R.APIC_LVTT, 0) & R.ICR_VECTOR or _LINUX_TIMER  # until LVTT is written

    def _check_mode(self, access: Access) -> None:
        """An access that its APIC's mode rules out shows that the host changed the mode (reset, migration)."""
        by_msr = access.via == Via.MSR
        if access.via == Via.SYNTHETIC:  # works in either mode
            return
        if by_msr == self.x2apic or access.fault or not access.via or (not by_msr and not access.traced):
            return
        self.put_into_mode(by_msr)
        self._guest.assume(
            f"line {access.line}: the host has put vCPU {self.v.vcpu_id} into {'x2APIC' if by_msr else 'xAPIC'} mode; "
            "its registers were kept"
        )

    # --------------------------------------------------------------------------------------------- everything but IPIs

    def accept(self, line: int, event: Event, source: str) -> None:
        own = event.a == self.v.vcpu_id and event.b == self._timer
        self._guest.accept(line, event, source or (TIMER if own else UNTOLD))

    def eoi(self, line: int, vector: int, induced: bool) -> None:
        """The interrupt of a kvm_eoi line leaves service.

        Where nothing shows its injection (the recorded host ends interrupts itself when it injects them, or
        kvm_inj_virq was not recorded), it is taken out of IRR here and now.
        """
        v, eois = self.v, self._eois
        self._seen = True
        eois.total += 1
        if self._hyperv is not None:
            self._hyperv.begin()
        if self._host_ends and vector >= 0:
            ended = self._deliver(vector)
        else:
            ended = v.eoi()
            if ended is None and vector >= 0:
                ended = self._deliver(vector)
                self._host_ends = ended == vector
        if self._hyperv is not None:
            self._hyperv.ended(line, -1 if induced else vector)
        if ended == (None if vector < 0 else vector):
            eois.exact += 1
            self._running = self._running and vector < 0
        elif ended is None and self._running:
            self._guest.assume(f"line {line}: vector {vector} was pending before the first line")
            eois.exact += 1
        else:
            text = f"apicid {v.vcpu_id:x} vector "
            self._guest.differs(line, "kvm_eoi", f"{text}{vector}", f"{text}{-1 if ended is None else ended}")

    def silent_eoi(self) -> None:
        if self.v.eoi() is None and self.v.ack() is not None:
            self.v.eoi()

    def _deliver(self, vector: int) -> int | None:
        """From IRR through ISR and out: the vector that the model says.

        If the trace says another one, the model follows it: what it has above that is dropped, what it has below stays.
        """
        v = self.v
        first = found = self._ack()
        if found == vector:
            return v.eoi()
        while found is not None:
            v.eoi()
            if found < vector:
                self._guest.raise_irq(v.vcpu_id, found)
            if found <= vector:
                break
            found = self._ack()
        return first

    def _ack(self) -> int | None:
        """The next interrupt that goes into service; those that end by themselves never show an EOI."""
        found = self.v.ack()
        while found is not None and self._hyperv is not None and self._hyperv.ends_itself(found):
            found = self.v.ack()
        return found

    def inject(self, line: int, since: int, vector: int) -> None:
        """What goes into service; what the APIC does not have, and a pin of the PICs fits, comes from them."""
        word, bit = irr_bit(self.v, vector)
        if not self._mem[word] & bit and vector not in self.lane.arriving:
            if any(pin & 7 == vector & 7 for pin in self._guest.pic_pins):
                self._report.pic_interrupts += 1
                return
        self._injections.inject(line, since, vector)

    def ran(self) -> None:
        self.v.get_mp_state()

    def reached(self, *events: Event) -> None:
        """Targets that accept an IPI after others went on: what they took since was not this interrupt."""
        for event in events:
            if vectored(event):
                self._guest.raise_irq(event.a, event.b)

    def deadline(self) -> None:
        self._report.deadlines += 1

    def count(self, doing: Doing, door: Door) -> None:
        self._report.doors[doing, door] += 1

    def pic(self, pin: int) -> None:
        self._guest.pic_pins.add(pin)

    def raised(self, vector: int, source: str, since: int) -> None:
        """Not for a vCPU's own thread: its accept lines wait for this one."""

    def synthetic(self, line: int, msr: int, value: int, fault: bool) -> None:
        doing = doing_of_synthetic(msr)
        if doing is not None:
            self._report.doors[doing, Door.SYNTHETIC] += 1
        if self._hyperv is not None:
            self._hyperv.written(line, msr, value, fault)

    def hyperv(self, line: int, event: Event) -> None:
        if event.name in TIMED:
            self._guest.stimers.seen(line, event)
        if self._hyperv is not None and event.name in ACTED:
            self._hyperv.seen(line, event)

    def apicbase(self, line: int, value: int, fault: bool) -> None:
        faulted = self.v.wrmsr(R.MSR_APICBASE, value).fault is not None
        self.x2apic = bool(self.v.apic_base & R.APICBASE_EXTD)
        self._compare_fault(line, fault, faulted)

    def read(self, line: int, reg: int, value: int) -> None:
        if reg in _RUNS_BY_ITSELF:
            return
        found = self.v.get_msr(R.MSR_X2APIC_BASE + (reg >> 4)) if self.x2apic else self.v.mmio_read(reg & ~0xF)
        self._report.reads.add(found == value)
        if found != value:
            name = R.REGISTER_NAMES.get(reg, f"0x{reg:x}")
            predicted = "#GP" if found is None else f"apic_read {name} = 0x{found:x}"
            self._guest.differs(line, "kvm_apic", f"apic_read {name} = 0x{value:x}", predicted)

    def write(self, access: Access) -> None:
        reg, value = access.reg, access.value
        if reg == R.APIC_ICR or reg == R.APIC_SELF_IPI:
            self._send(access)
            return
        self._check_mode(access)
        self._seen = True
        if reg in DOING_OF_REGISTER:
            self._report.doors[DOING_OF_REGISTER[reg], self._door(access)] += 1
        if access.via == Via.SYNTHETIC:
            self._compare_fault(access.line, access.fault, not self.v.set_msr(_SYNTHETIC[reg], value))
        elif not self.x2apic:
            self.v.mmio_write(reg, value & 0xFFFF_FFFF, access.length)
        elif reg != R.APIC_ICR2 or access.via:  # up to 5.10 an x2APIC ICR write shows ICR2 as a write of its own
            faulted = not self.v.set_msr(R.MSR_X2APIC_BASE + (reg >> 4), value)
            if access.via:
                self._compare_fault(access.line, access.fault, faulted)
        if reg == R.APIC_LVTT:
            self._timer = value & R.ICR_VECTOR

    def _compare_fault(self, line: int, recorded: bool, predicted: bool) -> None:
        if recorded:
            self._report.faults.add(predicted)
        if recorded != predicted:
            text = {True: "#GP", False: "no fault"}
            self._guest.differs(line, "kvm_msr", text[recorded], text[predicted])

    def _door(self, access: Access) -> Door:
        """How the access came: what its lines say, else its exit, else its APIC's mode."""
        if access.via == Via.MSR:
            return Door.X2APIC
        if access.via == Via.MMIO:
            return Door.PAGE
        if access.door is not None:
            return access.door
        if not self.x2apic:
            return Door.SYNTHETIC if access.traced and access.value >> 32 else Door.PAGE
        return Door.UNTOLD if self._guest.windows and not self._guest.recorded.msrs else Door.X2APIC

    # ------------------------------------------------------------------------------------------------------------ IPIs

    def call(self, access: Access) -> None:
        """An IPI hypercall: its lines against what the first of them demand, its targets against the set of VPs."""
        guest, report = self._guest, self._report
        self._seen = True
        report.hypercalls += 1
        report.doors[Doing.IPI, Door.HYPERCALL] += 1
        guest.generations.count_door(Door.HYPERCALL)
        made = Hypercall(access.call, access.ipi)
        if access.ipi is not None and (predicted := made.send_text()):
            exact = predicted == access.ipi.text
            if not exact and made.by_decimal:
                guest.by_decimal += 1
                exact = True
            report.hv_sends.add(exact)
            if not exact:
                guest.differs(access.ipi_line, access.ipi.name, access.ipi.text, predicted)
        targets = made.targets([v.vcpu_id for v in guest.machine.vcpus])
        if targets is None:  # in the guest's memory: taken as recorded
            for _, event in access.accepts:
                report.accepted.add(True)
                if event not in access.later:
                    guest.raise_irq(event.a, event.b)
        else:
            self._compare_accepts(access, [(vcpu, made.vector) for vcpu in targets])
            later = [event.a for event in access.later]
            for vcpu in targets:
                if vcpu not in later:
                    guest.raise_irq(vcpu, made.vector)
        if access.result is not None and (status := made.status()) is not None:
            exact = access.result.b == status
            report.hv_results.add(exact)
            if not exact:
                guest.differs(access.line, access.result.name, f"result 0x{access.result.b:x}", f"result 0x{status:x}")
        sent = [event.a for _, event in access.accepts] if guest.recorded.accepts or targets is None else targets
        report.classes[call_class(made.to_all, len(sent))] += 1
        if sent:
            report.vectors[made.vector, "none"] += 1
        for target in sent:
            report.sent[self.v.vcpu_id, target] += 1

    def _send(self, access: Access) -> None:
        """A write of ICR or SELF_IPI: what KVM printed against what the model prints."""
        ipi = access.ipi
        if not access.via and not access.traced and ipi is not None:
            # Neither kvm_msr nor kvm_apic was recorded: the value is taken back from the kvm_apic_ipi line.
            self._report.taken_back += 1
            access.value = ipi.b | ipi.a << 32
            if not self.x2apic:
                self.v.mmio_write(R.APIC_ICR2, ipi.a << R.XAPIC_DEST_SHIFT & 0xFFFF_FFFF)
        door = self._door(access)
        self._check_mode(access)
        if not self.x2apic and door in (Door.TRAP, Door.AVIC) and ipi is not None:
            self._guest.trapped += 1
            self.v.mmio_write(R.APIC_ICR2, ipi.a << R.XAPIC_DEST_SHIFT & 0xFFFF_FFFF)
        self._report.doors[Doing.IPI, door] += 1
        began_before, self._seen = not self._seen and ipi is None, True
        sent, accepted = self._predict(access, door)
        self._count(sent, accepted, access)
        if began_before and sent and not access.cut:
            self._guest.assume(f"line {access.line}: this write began before the first line of the trace: not compared")
            return
        self._compare_ipi(access, sent)
        self._compare_accepts(access, accepted)

    def _predict(self, access: Access, door: Door) -> tuple[Printed | None, list[Printed]]:
        """Does the write in the model: the kvm_apic_ipi line and the kvm_apic_accept_irq lines that it prints."""
        mem, v = self._mem, self.v
        value = access.value
        mem[L.H_CONFIG] |= _TRACING
        mem[L.H_TRACE_HEAD] = 0
        self._ask_generations(access, door)
        early = not_pending(self._guest, access.later) if access.later else ()
        if self.x2apic or door is Door.SYNTHETIC:
            msr = HV.MSR_HV_ICR if door is Door.SYNTHETIC else R.MSR_X2APIC_BASE + (access.reg >> 4)
            faulted = not v.set_msr(msr, value)
            if access.via:
                self._compare_fault(access.line, access.fault, faulted)
        else:
            v.mmio_write(access.reg, value & 0xFFFF_FFFF, access.length)
        mem[L.H_CONFIG] &= ~_TRACING
        for word, bit in early:
            mem[word] &= ~bit
        sent: Printed | None = None
        accepted: list[Printed] = []
        end = L.TRACE + min(mem[L.H_TRACE_HEAD], L.TRACE_CAPACITY) * L.TRACE_STRIDE
        for at in range(L.TRACE, end, L.TRACE_STRIDE):
            event = mem[at] & 0xFF
            if event == L.TP_ACCEPT_IRQ:
                accepted.append((mem[at + 1], mem[at + 2] & _ACCEPT_BITS))
            elif event == L.TP_APIC_IPI:
                sent = mem[at + 2], mem[at + 1] & _IPI_BITS
        return sent, accepted

    def _ask_generations(self, access: Access, door: Door) -> None:
        """Who takes this write fast, before it is done."""
        if door is Door.X2APIC:
            self._guest.generations.count(self.v.index, R.MSR_X2APIC_BASE + (access.reg >> 4), access.value)
        elif door is Door.PAGE:
            self._guest.generations.count_mmio(self.v.index, access.value & 0xFFFF_FFFF)
        else:
            self._guest.generations.count_door(door)

    def _count(self, sent: Printed | None, accepted: list[Printed], access: Access) -> None:
        report = self._report
        report.icr_writes += 1
        if sent is None:
            report.classes[FAULTED] += 1
            return
        if self._guest.recorded.accepts:
            targets = [event.a for _, event in access.accepts]
        else:
            targets = [vcpu for vcpu, _ in accepted]
        dest, icr = sent
        kind = icr_class(icr, dest, len(targets))
        report.classes[kind] += 1
        if icr & R.ICR_DM <= R.DM_LOWEST << R.ICR_DM_SHIFT:
            report.vectors[icr & R.ICR_VECTOR, kind.shorthand] += 1
        for target in targets:
            report.sent[self.v.vcpu_id, target] += 1

    def _compare_ipi(self, access: Access, sent: Printed | None) -> None:
        ipi = access.ipi
        if ipi is not None:
            exact = sent == (ipi.a, ipi.b)
            self._report.ipi.add(exact)
            if not exact:
                predicted = ipi_text(sent[1], sent[0]) if sent else ""
                self._guest.differs(access.ipi_line, "kvm_apic_ipi", ipi.text, predicted)
        elif sent and self._guest.recorded.ipis and not access.cut:
            self._guest.differs(access.line, "kvm_apic_ipi", "", ipi_text(sent[1], sent[0]))

    def _compare_accepts(self, access: Access, accepted: list[Printed]) -> None:
        """Line by line, in order. Of an access that the file cuts off, missing lines at the end are no difference."""
        recorded = access.accepts
        for i, (line, event) in enumerate(recorded):
            predicted = accepted[i] if i < len(accepted) else None
            exact = predicted == (event.a, event.b)
            self._report.accepted.add(exact)
            if not exact:
                text = accept_text(*predicted) if predicted else ""
                self._guest.differs(line, "kvm_apic_accept_irq", event.text, text)
        if self._guest.recorded.accepts and not access.cut:
            for predicted in accepted[len(recorded) :]:
                self._guest.differs(access.ipi_line or access.line, "kvm_apic_accept_irq", "", accept_text(*predicted))


def _put(page: bytearray, offset: int, value: int) -> None:
    """Stores a register in a KVM_GET_LAPIC page."""
    page[offset : offset + 4] = value.to_bytes(4, "little")
