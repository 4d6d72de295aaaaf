"""The library against the oracle as a hypothesis state machine: rules a person would name, shrunk by hypothesis.

test_property.py covers more ground per second with random lives; here hypothesis draws each step, so that a failure
shrinks to the simplest values as well as to the fewest steps.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import fastexit as fx
import strategies as s
from fastexit import offers
from fastexit import regs as r
from pair import Pair

VECTORS = st.integers(0, 255)
IDS = st.sampled_from((0, 1, 2, 15, 16, 17, 31, 255, 256, 300, 4095))
DESTINATIONS = st.one_of(IDS, st.sampled_from((0xFF, 0xFFFF_FFFF, 0x10001, 0x1_0003)), st.integers(0, 0xFFFF_FFFF))
REGISTERS = st.sampled_from(
    (r.APIC_ID, r.APIC_TASKPRI, r.APIC_LDR, r.APIC_DFR, r.APIC_SPIV, r.APIC_ESR, r.APIC_LVTT, r.APIC_LVT0, r.APIC_LVT1)
    + (r.APIC_LVTERR, r.APIC_LVTPC, r.APIC_ICR2, r.APIC_TDCR, r.APIC_EOI)
)
VALUES = st.one_of(st.sampled_from((0, 0xFF, 0x1FF, 0x10000, 0x0100_0000, 0xFFFF_FFFF)), st.integers(0, 0xFFFF_FFFF))


class ApicLife(RuleBasedStateMachine):
    """A few vCPUs, and what guests and user space do to their APICs."""

    @initialize(
        ids=st.lists(IDS, min_size=2, max_size=5, unique=True),
        kernel=st.sampled_from(fx.profiles()),
        vendor=st.sampled_from(("vmx", "svm")),
        apicv=st.booleans(),
        irqchip=st.sampled_from(("full", "split")),
        api=st.integers(0, 3),
        booted=st.booleans(),
    )
    def create(
        self, ids: list[int], kernel: str, vendor: str, apicv: bool, irqchip: str, api: int, booted: bool
    ) -> None:
        config = s.Config(tuple(ids), kernel=kernel, vendor=vendor, apicv=apicv, irqchip=irqchip, x2apic_api=api)
        self.pair = Pair(config, config.build(fx.Machine))
        if booted:
            for i, vcpu in enumerate(self.pair.model.vcpus):
                self.step("set_msr", i, r.MSR_APICBASE, vcpu.apic_base | r.APICBASE_EXTD)
                self.step("set_msr", i, r.MSR_X2APIC_BASE + (r.APIC_SPIV >> 4), 0x1FF)

    def step(self, name: str, *arguments: object) -> None:
        self.pair.step((name, *arguments))

    def vcpu(self, number: int) -> int:
        return number % len(self.pair.model.vcpus)

    def value(
        self, dest: int, vector: int, mode: int, logical: bool, level: bool, trigger: bool, shorthand: int, odd: int
    ) -> int:
        icr = fx.icr(
            dest, vector, delivery=mode, logical=logical, level=level, trigger_level=trigger, shorthand=shorthand
        )
        return icr | odd

    @rule(
        who=st.integers(0, 7),
        dest=DESTINATIONS,
        vector=VECTORS,
        mode=st.sampled_from((0, 0, 0, 1, 1, 2, 3, 4, 7)),
        logical=st.booleans(),
        level=st.booleans(),
        trigger=st.booleans(),
        shorthand=st.sampled_from((0, 0, 0, 1, 2, 3)),
        odd=st.sampled_from((0, 0, 0, r.ICR_BUSY, 1 << 13, 1 << 31)),
        guest=st.booleans(),
    )
    def send(
        self,
        who: int,
        dest: int,
        vector: int,
        mode: int,
        logical: bool,
        level: bool,
        trigger: bool,
        shorthand: int,
        odd: int,
        guest: bool,
    ) -> None:
        """An IPI by the ICR: x2APIC MSR from guest or host, or the two xAPIC registers."""
        who = self.vcpu(who)
        icr = self.value(dest, vector, mode, logical, level, trigger, shorthand, odd)
        if self.pair.model.vcpus[who].x2apic:
            self.step("guest_wrmsr" if guest else "set_msr", who, r.MSR_X2APIC_ICR, icr)
        else:
            self.step("mmio_write", who, r.APIC_ICR2, (dest & 0xFF) << 24, 4)
            self.step("mmio_write", who, r.APIC_ICR, icr & 0xFFFF_FFFF, 4)

    @rule(who=st.integers(0, 7), vector=VECTORS, sipi=st.booleans())
    def start_up(self, who: int, vector: int, sipi: bool) -> None:
        """INIT or SIPI to everybody else, as firmware starts processors."""
        mode = fx.DeliveryMode.SIPI if sipi else fx.DeliveryMode.INIT
        icr = fx.icr(vector=vector if sipi else 0, delivery=mode, level=True, shorthand=fx.Shorthand.ALL_BUT_SELF)
        who = self.vcpu(who)
        if self.pair.model.vcpus[who].x2apic:
            self.step("set_msr", who, r.MSR_X2APIC_ICR, icr)
        else:
            self.step("mmio_write", who, r.APIC_ICR, icr, 4)

    @rule(who=st.integers(0, 7), offset=REGISTERS, value=VALUES)
    def registers(self, who: int, offset: int, value: int) -> None:
        self.write_register(who, offset, value)

    def write_register(self, who: int, offset: int, value: int) -> None:
        who = self.vcpu(who)
        if self.pair.model.vcpus[who].x2apic:
            self.step("guest_wrmsr", who, r.MSR_X2APIC_BASE + (offset >> 4), value)
        else:
            self.step("mmio_write", who, offset, value, 4)

    @rule(
        who=st.integers(0, 7),
        bits=st.sampled_from((0, r.APICBASE_EN, r.APICBASE_EN | r.APICBASE_EXTD)),
        host=st.booleans(),
    )
    def switch_mode(self, who: int, bits: int, host: bool) -> None:
        who = self.vcpu(who)
        base = self.pair.model.vcpus[who].apic_base & ~(r.APICBASE_EN | r.APICBASE_EXTD) | bits
        self.step("set_msr" if host else "guest_wrmsr", who, r.MSR_APICBASE, base)

    @rule(
        dest=st.integers(0, 255), high=st.sampled_from((0, 0, 1)), flags=st.integers(0, 3), data=st.integers(0, 0xFFFF)
    )
    def message(self, dest: int, high: int, flags: int, data: int) -> None:
        self.step("signal_msi", 0xFEE0_0000 | dest << 12 | flags << 2 | high << 40, data)

    @rule(who=st.integers(0, 7), finish=st.booleans())
    def take_interrupt(self, who: int, finish: bool) -> None:
        self.step("ack", self.vcpu(who))
        if finish:
            self.step("eoi", self.vcpu(who))

    @rule(who=st.integers(0, 7), offset=st.sampled_from((r.APIC_ISR, r.APIC_IRR, r.APIC_TMR)), bits=VALUES)
    def restore_page(self, who: int, offset: int, bits: int) -> None:
        """KVM_SET_LAPIC of the page with other pending bits."""
        page = bytearray(self.pair.model.vcpus[self.vcpu(who)].get_lapic())
        page[offset + 0x20 : offset + 0x24] = bits.to_bytes(4, "little")
        self.step("set_lapic", self.vcpu(who), bytes(page))

    @precondition(lambda self: len(self.pair.model.vcpus) < 7)
    @rule(vcpu_id=IDS)
    def hot_plug(self, vcpu_id: int) -> None:
        known = [vcpu.vcpu_id for vcpu in self.pair.machine.vcpus]
        if vcpu_id not in known and vcpu_id < offers.room(self.pair.machine.kernel).ids:
            self.step("add_vcpu", vcpu_id)

    @rule(
        who=st.integers(0, 7),
        mode=st.sampled_from((r.TIMER_ONE_SHOT, r.TIMER_PERIODIC, r.TIMER_DEADLINE)),
        vector=st.integers(16, 255),
        masked=st.booleans(),
        count=st.sampled_from((0, 1, 1000, 300_000, 0xFFFF_FFFF)),
    )
    def start_timer(self, who: int, mode: int, vector: int, masked: bool, count: int) -> None:
        """As an operating system sets up its tick: LVTT first, then how long."""
        who = self.vcpu(who)
        self.write_register(who, r.APIC_LVTT, mode | vector | r.LVT_MASKED * masked)
        if mode == r.TIMER_DEADLINE:
            self.step("guest_wrmsr", who, r.MSR_TSC_DEADLINE, self.pair.model.tsc() + count)
        else:
            self.write_register(who, r.APIC_TMICT, count)

    @rule(ns=st.one_of(st.sampled_from((0, 1, 999, 1000, 200_000, 600_000, 3_000_000)), st.integers(0, 10**7)))
    def time_passes(self, ns: int) -> None:
        self.step("set_time", self.pair.model.now + ns)

    @rule(who=st.integers(0, 7), sleeps=st.booleans())
    def idle(self, who: int, sleeps: bool) -> None:
        """HLT where the guest runs; a sleeper's thread looks around."""
        who = self.vcpu(who)
        runs = self.pair.model.vcpus[who].mp_state == r.MP_RUNNABLE
        self.step("hlt" if sleeps and runs else "run", who)

    @rule(who=st.integers(0, 7))
    def look(self, who: int) -> None:
        self.step("get_mp_state", self.vcpu(who))

    @invariant()
    def nobody_waits_for_something_else(self) -> None:
        if hasattr(self, "pair"):
            self.pair.at_rest()


ApicLife.TestCase.settings = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=150 if s.JIT else 25,
    stateful_step_count=30 if s.JIT else 15,
    suppress_health_check=list(HealthCheck),
)
TestApicLife = ApicLife.TestCase
