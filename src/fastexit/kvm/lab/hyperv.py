"""Windows guests on both sides: synthetic MSRs, SynIC, synthetic timers, hypercalls, EOIs without exits.

Models: nothing. The model goes first: it carries out a whole story, and what it came to is noted. The kernel gets the
story in one batch, on a machine whose clock counts instructions, and is compared operation by operation: results, exits
to user space, pages, synthetic MSRs, events, states, and what was written to the guest's memory.
"""

from __future__ import annotations

import random
import re
import struct
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

from fastexit import hyperv as hv
from fastexit import layout as L
from fastexit import regs as r
from fastexit.connections import Connection
from fastexit.kvm import ioctl as K
from fastexit.kvm.host import Host
from fastexit.kvm.judge import Judge
from fastexit.kvm.lab import hvdraw as D
from fastexit.kvm.lab import hvguest as G
from fastexit.kvm.lab import hvstories as S
from fastexit.kvm.lab.device import LabDevice, ioctl_record
from fastexit.kvm.lab.hvmodel import ASLEEP, NO_SUCH_CALL, WindowsProgram
from fastexit.kvm.lab.hvsurvey import SURVEYED, Eyes, Sight, unlike
from fastexit.kvm.lab.trace import LabTrace
from fastexit.kvm.lab.traces import plain, same
from fastexit.kvm.lab.wire import ANEW, Answer, Ask, Record
from fastexit.kvm.operations import Op, apply, describe
from fastexit.kvm.tracefs import TraceLost
from fastexit.kvm.twins import Setup, Twins, random_ids
from fastexit.kvm.values import differences, masked
from fastexit.machine import Machine
from fastexit.vcpu import Vcpu

BEGIN_NS = 1_000_000_000_000
"""The clock of both sides at the beginning of a story: KVM_SET_CLOCK says so to the kernel."""
STEP_NS = 150_000
"""What an operation takes on the model; about what it takes in the lab."""
PROGRAMS = frozenset("run_through take halt window test_clear wrmsr rdmsr mmio_write mmio_read hypercall".split())
ASSISTED = frozenset(("take", "window", "halt", "test_clear"))
"""Programs whose last argument says where they test an assist bit, 0: not at all."""
CLOCKS = frozenset((hv.MSR_HV_VP_RUNTIME, hv.MSR_HV_TIME_REF_COUNT, hv.MSR_HV_TSC_FREQUENCY, hv.MSR_HV_APIC_FREQUENCY))
"""MSRs whose values depend on the time of day or on the machine: whether they can be read is compared."""
HEADER = slice(L.H_HYPERV_RULES, L.H_HV_SYNDBG + 7)
"""The VM's words among those that synthetic MSRs are made of."""
MOST_LINES = 1 << 20
STACK_IN_FLAGS = frozenset(("5.4", "5.6", "5.8", "5.10"))
"""Generations whose kernels are built without zeroes for what a function has not set: so are Debian's up to 5.10."""
IGNORED_EVENTS = frozenset(("kvm_msi_set_irq", "kvm_wait_lapic_expire"))
_TIMES = re.compile(
    r"(kvm_hv_stimer_start_(?:periodic|one_shot): vcpu_id \d+ timer \d+) time_now \d+(?: exp_time \d+)?"
)
_CLOCK = re.compile(r"(kvm_msr: msr_read 400000(?:10|20|22|23) = )0x[0-9a-f]+(?! \(#GP)")
INTERRUPTED = "kvm_userspace_exit: reason restart"
"""What ends a wait for a guest that sleeps."""
_OPENING = threading.Lock()


@dataclass(frozen=True)
class Step:
    """One operation on the model."""

    op: Op
    readied: bool
    """The vCPU was made ready for the program first: an INIT had taken it away."""
    result: Any
    exits: tuple[tuple[int, ...], ...]
    sight: Sight
    lines: tuple[str, ...]


class HypervTwins(Twins):
    """Synthetic MSRs by ioctl and by guests, SynIC, SINT lines, synthetic timers, hypercalls, assist pages.

    ("take", i, at) is a guest with interrupts on whose handler tests and clears the assist byte at ``at`` (0: not),
    ("window", i, at) one that comes with STI, ("halt", i, interrupts, at) one that halts, ("test_clear", i, at) the
    test alone. ("hypercall", i, control, input, output, xmm, narrow, answer) is VMMCALL, ``narrow`` by 32-bit code;
    ``answer`` is user space's where it is asked. ("memory", at, bytes) writes the guest's memory, ("sint_routes",
    ((gsi, VP index, SINT), ...)) and ("irq_line", gsi, level) are the lines of SINTs, ("rest", ns) is time that passes.
    ("connect", n, connection), ("disconnect", n, connection) and ("signals", n, 0) are KVM_HYPERV_EVENTFD with the n-th
    eventfd. ("ready", i) unblocks NMIs and lets a vCPU run programs again, as is done before a program behind an INIT,
    ("fault", i, exception) queues a fault for it.
    """

    kind = "hyperv"
    operations_each = 300
    states = True
    deferred: ClassVar[bool] = True
    flushes: ClassVar[tuple[int, ...]] = (
        hv.HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE,
        hv.HvCall.FLUSH_VIRTUAL_ADDRESS_LIST,
        hv.HvCall.FLUSH_VIRTUAL_ADDRESS_SPACE_EX,
        hv.HvCall.FLUSH_VIRTUAL_ADDRESS_LIST_EX,
    )
    """Hypercalls that flush TLBs."""
    about: ClassVar[str] = (
        "synthetic MSRs by KVM_SET_MSRS, KVM_GET_MSRS, WRMSR and RDMSR, KVM_CAP_HYPERV_SYNIC, SINT lines, synthetic "
        "timers, hypercalls, KVM_HYPERV_EVENTFD, NMI, INIT and SIPI, EOIs by all doors and by the assist page, CPUID "
        "enforcement; pages, MSRs, messages, exits"
    )

    def __init__(self, setup: Setup, witness: Any = None, judge: Judge | None = None) -> None:
        super().__init__(setup, None, judge)
        self.witness = witness
        self.events: frozenset[str] = self.model.trace.events - IGNORED_EVENTS
        self.memory: bytearray = bytearray(G.MEMORY_BYTES)
        self.model.guest_memory = self.memory
        self.pools: D.Pools = D.Pools(random.Random(repr(setup)))
        self.routes: tuple[int, ...] = ()
        self.steps: list[Step] = []
        self._memory_seen = b""
        """The data as they were seen last, kept once for all looks that saw them."""
        self._astray: set[int] = set()
        """vCPUs that have had an INIT since they were made ready for programs."""
        self._eventfds: list[int] = [
            answer.result for answer in self.real.device.ask(*[(Ask.EVENTFD, 0, b"")] * D.EVENTFDS)
        ]
        self.connections: dict[int, Connection] = {}
        """By their numbers, those that have an eventfd."""
        self._fd_of: dict[int, int] = {}
        self._signals: list[int] = [0] * D.EVENTFDS
        """What the model has counted of eventfds whose connections were taken from them."""
        self._drawn: Iterator[Op] = iter(())
        self._ticked = False
        self._read: dict[int, tuple[Any, tuple[int, ...]]] = {}
        """By vCPU the words that its MSRs are made of, and what they said when they were read."""
        self._device: LabDevice = self.real.device
        self._fds: list[int] = [vcpu.fd for vcpu in self.real.vcpus]
        self._guest: G.WindowsGuest | None = None
        if witness is not None:
            self.model.fastpath = self.host.fastpath
        try:
            self._open_trace()
            self._guest = G.WindowsGuest(self._device, self.real.fd, self._fds, self.real.run_bytes)
        except BaseException:
            self.close()
            raise
        self.model.set_time(BEGIN_NS)
        for vcpu in self.model.vcpus:
            self._ready(vcpu)
        self._see()

    def _open_trace(self) -> None:
        """The tracepoints of this machine's kernel, which is not the one that the witness is of."""
        if self.witness is not None:
            with _OPENING:
                if self._device.pipe is None:
                    LabTrace(self._device)

    def close(self) -> None:
        """Closes the real VM and what runs its guests."""
        super().close()
        guest: G.WindowsGuest | None = getattr(self, "_guest", None)
        if guest is not None:
            guest.close()
            self._guest = None
        for fd in getattr(self, "_eventfds", ()):
            self._device.close(fd)
        self._eventfds = []

    @classmethod
    def draw(cls, rng: random.Random, host: Host, ids: tuple[int, ...] | None) -> Setup:
        """1 to 4 vCPUs, or with these ids, any irqchip; a guest's CPUID of Hyper-V's, enforced or not, or none."""
        ids = ids or random_ids(rng, 1, 4, host.max_vcpu_id)
        features = int(hv.ALL_FEATURES)
        kind = rng.random()
        hyperv: bool | str = kind >= 0.05
        if kind >= 0.75 and host.enforces_hyperv:
            hyperv = "enforce"
            likely = rng.choice((0.5, 0.9))
            features = sum(int(one) for one in hv.HvFeature if rng.random() < likely)
        api = rng.choice((0, 0, 3))
        return Setup(
            apic_ids=ids,
            irqchip=rng.choice(("full", "split")),
            x2apic_api=api,
            hyperv=hyperv,
            hyperv_features=features,
        )

    # ------------------------------------------------------------------------------------------------- what is drawn

    def beginning(self, rng: random.Random) -> Iterator[Op]:
        yield from D.beginning(rng, self)

    def draw_op(self, rng: random.Random) -> Op:
        while (op := next(self._drawn, None)) is None:
            self._drawn = S.draw(rng, self)
        return op

    # ------------------------------------------------------------------------------------------------- what is done

    def step(self, op: Op) -> None:
        """One operation on the model; what it came to is noted."""
        self.history.append(op)
        model = self.model
        advance(model, model.time + (op[1] if op[0] == "rest" else STEP_NS))
        exits: list[tuple[int, ...]] = []
        readied = op[0] in PROGRAMS and op[1] in self._astray
        if readied:
            self._ready(model.vcpus[op[1]])
        if self.witness is not None:
            model.trace.clear()
            model.trace.enable()
        try:
            result = self._on_model(op, exits)
        finally:
            if self.witness is not None:
                model.trace.disable()
        lines = tuple(model.trace.lines()) if self.witness is not None else ()
        self.steps.append(Step(op, readied, result, tuple(exits), self._see(), lines))

    def _ready(self, vcpu: Vcpu) -> None:
        """Lets a vCPU run programs, as LabDevice's record READY does."""
        apply(self.model, ("ready", vcpu.index))
        vcpu.real_mode = False
        self._astray.discard(vcpu.index)

    def _on_model(self, op: Op, exits: list[tuple[int, ...]]) -> Any:
        name, *arguments = op
        model = self.model
        if name == "rest":
            return None
        if name == "memory":
            at, data = arguments
            self.memory[at : at + len(data)] = data
            return None
        if name == "sint_routes":
            self.routes = tuple(gsi for gsi, _, _ in arguments[0])
            return self._route(arguments[0])
        if name == "fault":
            return model.vcpus[arguments[0]].set_events(exception=arguments[1])
        if name == "ready":
            return self._ready(model.vcpus[arguments[0]])
        if name in ("connect", "disconnect", "signals"):
            return self._on_connection(*op)
        if name == "irq_line":
            return model.irq_line(arguments[0], int(arguments[1]))
        if name == "enable_synic":
            model.vcpus[arguments[0]].enable_synic(arguments[1])
            return None
        if name in PROGRAMS:
            program = WindowsProgram(model.vcpus[arguments[0]], self.memory)
            program.exits = exits
            result = program.run(op)
            return "a clock" if name == "rdmsr" and arguments[1] in CLOCKS and isinstance(result, int) else result
        result = apply(model, op)
        return "a clock" if name == "get_msr" and arguments[1] in CLOCKS and result is not None else result

    def _on_connection(self, name: str, n: int, number: int) -> Any:
        """KVM_HYPERV_EVENTFD with the n-th eventfd, or what that has been signalled since it was read last."""
        if name == "signals":
            here = [one for one in self.connections.values() if self._fd_of[one.number] == n]
            signals, self._signals[n] = self._signals[n], 0
            return signals + sum(one.take() for one in here)
        if name == "connect":
            try:
                self.connections[number] = self.model.hyperv_eventfd(number)
            except ValueError:
                return "EINVAL"
            self._fd_of[number] = n
            return None
        one = self.connections.pop(number, None)
        if one is None:
            return "EINVAL"
        self._signals[self._fd_of.pop(number)] += one.take()
        one.close()
        return None

    def _route(self, pairs: tuple[tuple[int, int, int], ...]) -> None:
        self.model.set_gsi_routing([("hv_sint", gsi, vp, sint) for gsi, vp, sint in pairs])

    def _see(self) -> Sight:
        """What the model looks like; views for drawing are made anew."""
        vcpus = self.model.vcpus
        pages = tuple(vcpu.get_lapic() for vcpu in vcpus)
        states = tuple(tuple(self._state(vcpu)) for vcpu in vcpus)
        for view, page, vcpu in zip(self.vcpus, pages, vcpus, strict=True):
            view.page, view.apic_base = page, vcpu.apic_base
        memory = bytes(self.memory[G.DATA_AT :])
        if memory == self._memory_seen:
            memory = self._memory_seen
        self._memory_seen = memory
        return Sight(
            pages,
            states,
            tuple(self._msrs(vcpu) for vcpu in vcpus),
            memory,
        )

    def _state(self, vcpu: Vcpu) -> Iterator[int]:
        """KVM_GET_VCPU_EVENTS and then KVM_GET_MP_STATE, which carries out an INIT."""
        events = vcpu.events()
        yield events.nmi_pending
        yield int(events.nmi_masked)
        yield int(events.latched_init)
        yield int(vcpu.get_mp_state())
        if events.latched_init:
            self._astray.add(vcpu.index)

    def _msrs(self, vcpu: Any) -> tuple[int, ...]:
        """The synthetic MSRs that can be read, asked for anew where a word that they are made of has changed."""
        mem = self.model.mem
        words = mem[L.H_CONFIG], mem[HEADER].tobytes(), mem[L.HV + L.HV_STRIDE * vcpu.index :][: L.HV_STRIDE].tobytes()
        known = self._read.get(vcpu.index)
        if known is None or known[0] != words:
            known = self._read[vcpu.index] = words, tuple(self._read_msrs(vcpu))
        return known[1]

    def _read_msrs(self, vcpu: Any) -> Iterator[int]:
        for msr in SURVEYED:
            value = vcpu.get_msr(msr)
            if value is None:
                return
            yield value

    def may_be_late(self) -> bool:
        """Whether the kernel's tick came into a program that tests its assist bit: it withdraws the offer of an EOI."""
        return self._ticked

    def look(self) -> None:
        """Nothing to see before the end."""

    def settle(self) -> None:
        """The end of a story."""
        self.finish()

    # ---------------------------------------------------------------------------------------------- what is compared

    def finish(self) -> None:
        """Carries the story over to the kernel; Divergence at the first difference."""
        guest = self._guest
        assert guest is not None
        survey = self._survey()
        clock = K.ffi.new("struct kvm_clock_data *", {"clock": BEGIN_NS})
        begin = [guest.touch(i) for i in range(len(self._fds))]
        begin += [ioctl_record(self.real.fd, K.SET_CLOCK, clock), (Ask.SURVEY, ANEW, survey[2])]
        if self._traced:
            while len(self._device.read(self._device.pipe or 0, MOST_LINES)) == MOST_LINES:
                pass  # what other stories printed
            begin.insert(-1, (Ask.READ, 0, struct.pack("<II", self._device.pipe, MOST_LINES)))
        records: list[Record] = list(begin)
        reads: list[Record] = [(Ask.READ, 0, struct.pack("<II", self._device.pipe, 1 << 16))] if self._traced else []
        clock_record: Record = (Ask.CLOCK, 0, b"")
        for step in self.steps:
            if step.readied:
                records.append(guest.ready(step.op[1]))
            if step.op[0] == "hypercall":
                records.append(guest.store(G.XMM_AT, step.op[5]))
            records += [*reads, self._record(step.op), *reads, survey, clock_record]
        answers = iter(self._device.turnstile.trip(records, 300.0))
        for record in begin[:-1]:
            self._came_through(next(answers), record)
        eyes = Eyes(len(self._fds))
        eyes.see(next(answers))
        for number, step in enumerate(self.steps, 1):
            for _ in range(step.readied + len(reads) + (step.op[0] == "hypercall")):
                self._came_through(next(answers), (Ask.MAKE_READY, 0, b""))
            answer = next(answers)
            lines = next(answers).data.decode(errors="replace").splitlines() if reads else []
            seen = eyes.see(next(answers))
            next(answers)
            self._compare(number, step, answer, seen, lines)
            self.pages: int = self.pages + len(self._fds)

    @property
    def _traced(self) -> bool:
        return self.witness is not None

    def _came_through(self, answer: Answer, record: Record) -> None:
        if answer.result < 0:
            raise OSError(-answer.result, f"record {record[0].name} failed")

    def _survey(self) -> Record:
        assert self._guest is not None
        slots = self._device.vcpu_slots(self.real.fd)
        head = struct.pack("<5I", self._guest.memory, G.DATA_AT, G.DATA_BYTES, len(slots), len(SURVEYED))
        return (Ask.SURVEY, 0, head + struct.pack(f"<{len(slots) + len(SURVEYED)}I", *slots, *SURVEYED))

    def _record(self, op: Op) -> Record:
        """An operation for the lab's machine."""
        name, *arguments = op
        guest = self._guest
        assert guest is not None
        if name == "rest":
            return (Ask.SLEEP, 0, struct.pack("<Q", arguments[0]))
        if name == "memory":
            return guest.store(*arguments)
        if name == "sint_routes":
            return ioctl_record(self.real.fd, K.SET_GSI_ROUTING, sint_routes(arguments[0]))
        if name == "irq_line":
            line = K.ffi.new("struct kvm_irq_level *", {"irq": arguments[0], "level": arguments[1]})
            return ioctl_record(self.real.fd, K.IRQ_LINE_STATUS, line)
        if name in ("connect", "disconnect"):
            n, number = arguments
            flags = K.HYPERV_EVENTFD_DEASSIGN if name == "disconnect" else 0
            eventfd = K.ffi.new(
                "struct kvm_hyperv_eventfd *", {"conn_id": number, "fd": self._eventfds[n], "flags": flags}
            )
            return ioctl_record(self.real.fd, K.HYPERV_EVENTFD, eventfd)
        if name == "signals":
            return (Ask.READ, 0, struct.pack("<II", self._eventfds[arguments[0]], 8))
        if name == "signal_msi":
            address, data = arguments
            message = {"address_lo": address & 0xFFFF_FFFF, "address_hi": address >> 32, "data": data}
            return ioctl_record(self.real.fd, K.SIGNAL_MSI, K.ffi.new("struct kvm_msi *", message))
        i, *rest = arguments
        if name in PROGRAMS:
            return self._program(guest, name, i, *rest)
        fd = self._fds[i]
        if name == "ready":
            return guest.ready(i)
        if name == "fault":
            events = K.ffi.new("struct kvm_vcpu_events *", {"exception": {"injected": 1, "nr": rest[0]}})
            return ioctl_record(fd, K.SET_VCPU_EVENTS, events)
        if name == "enable_synic":
            cap = K.CAP_HYPERV_SYNIC if rest[0] == 1 else K.CAP_HYPERV_SYNIC2
            return ioctl_record(fd, K.ENABLE_CAP, K.ffi.new("struct kvm_enable_cap *", {"cap": cap}))
        if name == "set_lapic":
            page = K.ffi.new("struct kvm_lapic_state *")
            K.ffi.buffer(page)[:] = rest[0]
            return ioctl_record(fd, K.SET_LAPIC, page)
        one = K.ffi.new("struct one_msr *", {"nmsrs": 1, "index": rest[0]})
        if name == "set_msr":
            one.data = rest[1]
        return ioctl_record(fd, K.SET_MSRS if name == "set_msr" else K.GET_MSRS, one)

    def _program(self, guest: G.WindowsGuest, name: str, i: int, *rest: Any) -> Record:
        program = guest.program
        if name == "run_through":
            return program(i, "nothing")
        if name == "take":
            return program(i, "nothing", interrupts=True, r15=rest[0])
        if name in ("window", "test_clear"):
            return program(i, name, r15=rest[0])
        if name == "halt":
            return program(i, "halt", interrupts=rest[0], r15=rest[1], ns=G.HALT_NS)
        if name == "rdmsr":
            return program(i, "rdmsr", rcx=rest[0])
        if name == "wrmsr":
            return program(i, "wrmsr", rcx=rest[0], rax=rest[1] & 0xFFFF_FFFF, rdx=rest[1] >> 32)
        if name == "mmio_write":
            return program(i, "store", rdi=r.APIC_DEFAULT_PHYS_BASE + rest[0], rax=rest[1])
        if name == "mmio_read":
            return program(i, "load", rdi=r.APIC_DEFAULT_PHYS_BASE + rest[0])
        control, given, output, xmm, narrow, answer = rest
        if narrow:
            registers = {
                "rdx": control >> 32,
                "rax": control & 0xFFFF_FFFF,
                "rbx": given >> 32,
                "rcx": given & 0xFFFF_FFFF,
                "rdi": output >> 32,
                "rsi": output & 0xFFFF_FFFF,
            }
            return program(i, "hypercall32", answer=answer, r11=G.XMM_AT, **registers)
        return program(i, "hypercall", answer=answer, rax=NO_SUCH_CALL, rcx=control, rdx=given, r8=output, r11=G.XMM_AT)

    def _compare(self, number: int, step: Step, answer: Answer, seen: Sight, lines: list[str]) -> None:
        told = describe(step.op)
        result, exits = self._result(step.op, answer)
        self._same(number, told, step.result, result)
        self._same(number, f"exits to user space of {told}", step.exits, exits)
        expected = step.sight
        for i, (page, other) in enumerate(zip(expected.pages, seen.pages, strict=True)):
            if masked(page) != masked(other):
                raise self._at(number, f"{told}: vCPU {i}: {differences(masked(page), masked(other))}")
        for i, (state, other_state) in enumerate(zip(expected.states, seen.states, strict=True)):
            self._same(number, f"{told}: vCPU {i} NMIs pending, blocked, INIT pending, mp_state", state, other_state)
        for i, (msrs, others) in enumerate(zip(expected.msrs, seen.msrs, strict=True)):
            for msr, value, other_value in zip_longest(SURVEYED, msrs, others):
                if value != other_value:
                    raise self._at(
                        number, f"{told}: vCPU {i} MSR {msr:#x}: expected {shown(value)}, KVM says {shown(other_value)}"
                    )
        if expected.memory != seen.memory:
            where = unlike(expected.memory, seen.memory, self.host.kernel in STACK_IN_FLAGS)
            if where is not None:
                one, two = (memory[where : where + 8].hex() for memory in (expected.memory, seen.memory))
                raise self._at(number, f"{told}: memory at {G.DATA_AT + where:#x}: expected {one}, KVM has {two}")
        self._same_trace(number, step, lines)

    def _same_trace(self, number: int, step: Step, lines: list[str]) -> None:
        """Compares what was printed."""
        if not self._traced:
            return
        for line in lines:
            if line.startswith("CPU:") and "LOST" in line:
                raise TraceLost(line)
        expected, got = (self._comparable(some) for some in (step.lines, lines))
        self.trace_lines: int = self.trace_lines + len(got)
        for n, (line, other) in enumerate(zip_longest(expected, got, fillvalue="nothing")):
            if not same(line, other):
                text = f"{describe(step.op)}, trace line {n}: expected {line}, KVM prints {other}"
                raise self._at(number, text)

    def _comparable(self, lines: Iterable[str]) -> list[str]:
        """Lines without times of day, and without the signal that ends a wait for a guest that sleeps."""
        kept = (line for line in plain(lines, self.events) if not line.startswith(INTERRUPTED))
        return [_CLOCK.sub(r"\1", _TIMES.sub(r"\1", line)) for line in kept]

    def _result(self, op: Op, answer: Answer) -> tuple[Any, tuple[tuple[int, ...], ...]]:
        """What the kernel's answer means, in the words of the model's side."""
        name, result = op[0], answer.result
        if name in PROGRAMS:
            if result < 0:
                raise OSError(-result, f"{describe(op)} failed")
            return self._came(op, G.came(answer.data))
        if name == "signal_msi":
            return ("EINVAL" if result == -22 else -1 if result == -1 else result), ()
        if name == "irq_line":
            return (struct.unpack_from("<i", answer.data)[0] if result >= 0 else "refused"), ()
        if result < 0:
            return "EINVAL", ()
        if name == "signals":
            return int.from_bytes(answer.data, "little"), ()
        if name == "set_msr":
            return result == 1, ()
        if name == "get_msr":
            value = struct.unpack_from("<Q", answer.data, 16)[0] if result == 1 else None
            return ("a clock" if value is not None and op[2] in CLOCKS else value), ()
        return None, ()

    def _came(self, op: Op, came: G.Came) -> tuple[Any, tuple[tuple[int, ...], ...]]:
        name, regs = op[0], came.regs
        if came.ticked and name in ASSISTED and op[-1]:
            self._ticked = True
        result: Any = None
        if came.late:
            if name != "halt":
                raise TimeoutError("the guest did not come back")
            result = ASLEEP
        elif came.vector in (G.VECTOR_GP, G.VECTOR_UD):
            result = "#GP" if came.vector == G.VECTOR_GP else "#UD"
        elif came.vector is not None:  # an NMI's handler, too, in any program
            result = came.vector, bool(regs["r14"] & 1)
        elif name == "test_clear":
            result = bool(regs["r14"] & 1)
        elif name == "rdmsr":
            result = (regs["rdx"] & 0xFFFF_FFFF) << 32 | regs["rax"] & 0xFFFF_FFFF
            result = "a clock" if op[2] in CLOCKS else result
        elif name == "mmio_read":
            result = regs["rax"] & 0xFFFF_FFFF
        elif name == "hypercall":
            narrow = op[6]
            result = (regs["rdx"] & 0xFFFF_FFFF) << 32 | regs["rax"] & 0xFFFF_FFFF if narrow else regs["rax"]
        return result, came.exits

    def _same(self, number: int, what: str, expected: Any, got: Any) -> None:
        if expected != got:
            raise self._at(number, f"{what}: expected {shown(expected)}, KVM says {shown(got)}")

    def _at(self, number: int, text: str) -> Any:
        """The difference that shows behind so many operations."""
        found = self.divergence(text)
        found.history = found.history[:number]
        return found


def sint_routes(pairs: tuple[tuple[int, int, int], ...]) -> Any:
    """KVM_SET_GSI_ROUTING of lines of SINTs: (gsi, VP index, SINT) of each."""
    table = K.ffi.new("struct sint_routing_table *", {"nr": len(pairs)})
    for entry, (gsi, vp, sint) in zip(table.entries, pairs, strict=False):
        entry.gsi, entry.type, entry.vcpu, entry.sint = gsi, K.ROUTE_HV_SINT, vp, sint
    return table


def shown(value: Any) -> str:
    """A result in a few words."""
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value))})"
    return f"{value:#x}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def advance(model: Machine, until: int) -> None:
    """Moves a model's clock, from one timer to the next."""
    while (due := model.next_timer()) is not None and due < until:
        model.set_time(max(due, model.time))
    model.set_time(until)
