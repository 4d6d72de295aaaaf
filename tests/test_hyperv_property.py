"""Windows guests against the oracle: the same random life on both, and everything compared that either side can see.

After each operation: what it returned, the guest's memory, the lines of Hyper-V's tracepoints. Now and then, as looking
takes vCPUs out of their guests: pages and MSRs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

import fastexit as fx
import oracle_hvmsrs as msrs
import oracle_hyperv as oh
import strategies as s
from fastexit import hyperv as h
from fastexit import regs as r
from fastexit.kvm.operations import Op, describe
from fastexit.kvm.values import chance
from generations import DRAWN
from oracle_run import Result
from pair import SETTLE, Pair, spelt

EXAMPLES = 2
OPS = 120 if s.JIT else 60
MEMORY = 16 * 4096
LINES = ("kvm_hv_", "kvm_eoi", "kvm_pv_eoi", "kvm_set_irq", "kvm_apic_accept_irq")
MSRS = sorted(set(msrs.NEEDS) - {h.MSR_HV_EOI, h.MSR_HV_RESET, h.MSR_HV_EOM, h.MSR_HV_TPR, h.MSR_HV_TIME_REF_COUNT})
"""Those that are looked at; a read of TPR is an access to the APIC with a line of its own."""

profile = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=EXAMPLES,
    suppress_health_check=list(HealthCheck),
)

Life = tuple[s.Config, dict[str, Any]]


class HypervPair(Pair):
    """A Pair whose guest runs on Hyper-V."""

    def __init__(self, life: Life, *, close: bool, threads: bool = False) -> None:
        self.config, options = life
        self.model = self.config.build(partial(oh.Machine, **options))
        self.machine = self.config.build(partial(fx.Machine, threads=threads, **options))
        self.model.memory = bytearray(MEMORY)
        self.machine.guest_memory = bytearray(MEMORY)
        self.close = close
        self.history = []
        self.machine.trace.enable()

    def step(self, op: Op) -> None:
        self.model.trace.clear()
        self.machine.trace.clear()
        if op[0] in OWN:
            self.history.append(op)
            self.model.told.clear()
            want, got = OWN[op[0]](self, *op[1:])
            self.same(got, want, describe(op))
            if self.close:
                self.look()
        else:
            super().step(op)
        self.same(hyperv_lines(self.machine.trace.lines()), hyperv_lines(self.model.trace), f"lines of {describe(op)}")
        got, want = bytes(self.machine.guest_memory), bytes(self.model.memory)
        if got != want:
            at = next(i for i, pair in enumerate(zip(got, want, strict=True)) if pair[0] != pair[1])
            self.same(got[at : at + 48].hex(" "), want[at : at + 48].hex(" "), f"memory from {at:#x} on")

    def look(self) -> None:
        super().look()
        for i, (model, vcpu) in enumerate(zip(self.model.vcpus, self.machine.vcpus, strict=True)):
            for msr in MSRS:
                self.same(vcpu.get_msr(msr), model.get_msr(msr), f"vCPU {i} MSR {msr:#x}")
        if self.machine.apicv:
            self.same(self.machine.inhibits, self.model.inhibits, "inhibits")

    def hv_hypercall(self, i: int, real_mode: bool, *registers: Any) -> tuple[Any, Any]:
        if not self.model.takes_hypercalls():
            raise ValueError("a call of KVM's own")
        model, vcpu = self.model.vcpus[i], self.machine.vcpus[i]
        model.real_mode = vcpu.real_mode = real_mode
        self.model.running = model
        result, status = model.hv_hypercall(*registers)
        want = hypercall_words(result, status)
        try:
            got_status = vcpu.hv_hypercall(*registers)
            left = vcpu.exit_reason is not None and not vcpu.mode
            got = "to user space" if model.hypercall_asked and left else got_status
        except fx.InvalidOpcode:
            got = "#UD"
        told = [(target, effect.name) for target, effect in vcpu.targets]
        self.same(told, self.model.told, f"targets of the hypercall {registers[0]:#x} of vCPU {i}")
        return want, got

    def complete_hypercall(self, i: int, status: int) -> tuple[Any, Any]:
        model, vcpu = self.model.vcpus[i], self.machine.vcpus[i]
        self.model.running = model
        vcpu.complete_hypercall(status)
        model.complete_hypercall(status)
        return (model.run() == "guest", model.rip), (vcpu.run(), vcpu.rip)

    def irq_line(self, gsi: int, level: int) -> tuple[int, int]:
        self.model.running = None
        return self.model.irq_line(gsi, level), self.machine.irq_line(gsi, level)

    def routes(self) -> tuple[None, None]:
        table = [("hv_sint", 40 + 17 * vp + sint, vp, sint) for vp in range(5) for sint in range(17)]
        for side in (self.model, self.machine):
            side.set_gsi_routing(table)
        return None, None

    def enable_synic(self, i: int, version: int) -> tuple[None, None]:
        self.model.running = self.model.vcpus[i]
        for side in (self.model, self.machine):
            side.vcpus[i].enable_synic(version)
        return None, None

    def poke(self, gpa: int, text: str) -> tuple[None, None]:
        """The guest writes its memory."""
        data = bytes.fromhex(text)
        self.model.memory[gpa : gpa + len(data)] = data
        self.machine.guest_memory[gpa : gpa + len(data)] = data
        return None, None


OWN: dict[str, Callable[..., tuple[Any, Any]]] = {
    name: getattr(HypervPair, name)
    for name in ("hv_hypercall", "complete_hypercall", "irq_line", "routes", "enable_synic", "poke")
}


def hypercall_words(result: Result, status: int | None) -> Any:
    return "#UD" if result.fault else "to user space" if status is None else int(status)


def hyperv_lines(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith(LINES) and not line.startswith("kvm_hv_timer_state")]


# ---------------------------------------------------------------------------------------------------------- operations

PAGES = (0x3000, 0x4000, 0x5000, 0xF000)
NO_PAGES = (MEMORY, 1 << 40, (1 << 64) - 4096)


def page(rng: random.Random) -> int:
    """What enables a page, mostly one that is there."""
    frame = rng.choice(PAGES) if chance(rng, 0.9) else rng.choice(NO_PAGES)
    return frame | (1 if chance(rng, 0.9) else 0) | (rng.randrange(0x800) << 1 if chance(rng, 0.2) else 0)


def sint_value(rng: random.Random) -> int:
    value = rng.choice((*[rng.randrange(0x40, 0x60)] * 5, rng.randrange(256), rng.randrange(16)))
    if chance(rng, 0.08):
        return 0
    for bit, often in ((h.HV_SINT_MASKED, 0.15), (h.HV_SINT_AUTO_EOI, 0.4), (h.HV_SINT_POLLING, 0.2), (1 << 40, 0.05)):
        value |= bit if chance(rng, often) else 0
    return value


def stimer_config(rng: random.Random) -> int:
    value = rng.choice((1, 1, 3, 9, 11, rng.randrange(16)))
    if chance(rng, 0.4):
        return value | h.HV_STIMER_DIRECT | rng.choice((rng.randrange(0x40, 0x60), rng.randrange(256))) << 4
    return value | rng.randrange(4) << h.HV_STIMER_SINT_SHIFT


def stimer_count(rng: random.Random, now: int) -> int:
    return rng.choice((0, 7, now, now + 1, now + 50, now + 300, now + 3_000, 200, 500, 20_000, 1 << 30))


def value_of(rng: random.Random, model: oh.Machine, sender: oh.Vcpu, msr: int) -> int:
    """A value that matters for one of the MSRs."""
    if msr in msrs.SINT_MSRS:
        return sint_value(rng)
    if msr in msrs.STIMER_MSRS:
        return stimer_count(rng, model.reference()) if msr & 1 else stimer_config(rng)
    if msr == h.MSR_HV_ICR:
        vector = rng.randrange(0x40, 0x60)
        target = rng.choice(model.vcpus).id
        if chance(rng, 0.3):
            return s.icr(rng, model)
        shift = (32 if sender.x2apic else 56) if chance(rng, 0.8) else rng.choice((32, 56))
        return (target << shift & (1 << 64) - 1) | vector | (1 << 12 if chance(rng, 0.2) else 0)
    if msr == h.MSR_HV_TPR:
        return rng.choice((0, 0, 0x20, 0x4F, 0x1F0, 1 << 32))
    if msr == h.MSR_HV_EOI:
        return rng.choice((0, 0, 0, 5, 1 << 32))
    if msr in (h.MSR_HV_VP_ASSIST_PAGE, h.MSR_HV_SIMP, h.MSR_HV_SIEFP, h.MSR_HV_HYPERCALL):
        return page(rng)
    if msr == h.MSR_HV_VP_INDEX:
        return rng.choice((*range(5), 63, 64, 65, 130, 4096, 1 << 32 | 3, 0xFFFF_FFFF))
    if msr == h.MSR_HV_GUEST_OS_ID:
        return rng.choice((0, 1, 1, 1))
    if msr == h.MSR_HV_REFERENCE_TSC:
        return rng.choice((0, 0x6000))
    return rng.choice((0, 1, rng.getrandbits(64)))


WEIGHTS = {
    h.MSR_HV_EOI: 14,
    h.MSR_HV_ICR: 10,
    h.MSR_HV_TPR: 3,
    h.MSR_HV_VP_ASSIST_PAGE: 4,
    h.MSR_HV_EOM: 5,
    h.MSR_HV_SIMP: 2,
    **dict.fromkeys(list(msrs.SINT_MSRS)[:4], 3),
    **dict.fromkeys(list(msrs.STIMER_MSRS)[:4], 5),
}
"""Of the rest each has 0.3: most of them are dull, or leave little to do afterwards."""


def msr_op(rng: random.Random, model: oh.Machine) -> Op:
    """A read or write by the guest or by user space."""
    i = rng.randrange(len(model.vcpus))
    known = sorted(msrs.NEEDS)
    msr = rng.choices(known, [WEIGHTS.get(msr, 0.3) for msr in known])[0]
    by_guest = chance(rng, 0.7)
    if chance(rng, 0.15):
        return ("guest_rdmsr" if by_guest else "get_msr", i, msr)
    return ("guest_wrmsr" if by_guest else "set_msr", i, msr, value_of(rng, model, model.vcpus[i], msr))


def control_word(rng: random.Random, code: int, banks: int) -> int:
    word = code | (h.HV_CALL_FAST if chance(rng, 0.5) else 0)
    counted = banks if chance(rng, 0.85) else rng.choice((banks + 1, banks ^ 1, rng.randrange(14)))
    word |= counted << h.HV_CALL_VAR_COUNT_SHIFT
    if chance(rng, 0.1):
        word |= rng.choice((1 << 32, 1 << 48, 1 << 27, 1 << 31, 1 << 47, 1 << 63))
    return word


def hypercall_op(rng: random.Random, model: oh.Machine) -> Op:
    """An IPI to some virtual processors, or another call; the input in registers and in memory alike."""
    i = rng.randrange(len(model.vcpus))
    code = rng.choice((h.HvCall.SEND_IPI,) * 4 + (h.HvCall.SEND_IPI_EX,) * 5 + (8, 8, 0x5C, 0x5D, 0x77, 0x8001, 0x8042))
    odd = (0x0F, 0x10, 0xFF, 0x100, 0x151, rng.randrange(256), rng.getrandbits(33))
    vector = rng.randrange(0x40, 0x60) if chance(rng, 0.7) else rng.choice(odd)
    vps = {rng.choice(model.vcpus).vp_index for _ in range(rng.choice((0, 1, 2, 4)))}
    gpa = rng.choice((0x6000, 0x6000, 0x6003, 0x6FF8, MEMORY - 16, MEMORY - 24, MEMORY - 32, MEMORY, (1 << 64) - 8))
    if code == h.HvCall.SEND_IPI:
        mask = sum(1 << vp for vp in vps if vp < 64) | (1 << 60 if chance(rng, 0.2) else 0)
        control = control_word(rng, code, 0)
        block = vector & 0xFFFF_FFFF | rng.choice((0, 0, 7)) << 32, mask
        fast = vector, mask, ()
    elif code == h.HvCall.SEND_IPI_EX:
        present = sorted({vp // 64 for vp in vps} | set(rng.sample(range(64), rng.choice((0, 0, 1, 2, 10, 11, 12)))))
        banks = [sum(1 << vp % 64 for vp in vps if vp // 64 == bank) for bank in present]
        if chance(rng, 0.25):
            present, banks = [], []
            vector = rng.choice(odd)
        valid = sum(1 << bank for bank in present)
        form = rng.choice((0, 0, 1, 1, 2, 1 << 32))
        control = control_word(rng, code, len(present))
        block = vector & 0xFFFF_FFFF, form, valid, *banks
        fast = rng.choice((0, 0, 7)) << 32 | vector & 0xFFFF_FFFF, form, tuple([valid, *banks][:12])
    else:
        control = control_word(rng, code, 0)
        block, fast = (0, 0), (rng.choice((0, 1 << 40)), 0, ())
    if code == 0x5D:
        control |= h.HV_CALL_FAST
    real_mode = chance(rng, 0.05)
    if control & h.HV_CALL_FAST:
        return ("hv_hypercall", i, real_mode, control, *fast)
    call = ("hv_hypercall", i, real_mode, control, gpa, 0, ())
    if gpa >= MEMORY:
        return call
    model.next_op = call
    return ("poke", gpa, b"".join(word.to_bytes(8, "little") for word in block)[: MEMORY - gpa].hex())


def poke_op(rng: random.Random, model: oh.Machine) -> Op:
    """The guest empties a message slot, fills one, or takes PV EOI."""
    offered = [vcpu for vcpu in model.vcpus if vcpu.pv_eoi_offered]
    vcpu = rng.choice(offered or model.vcpus)
    if offered and chance(rng, 0.8):
        return ("poke", vcpu.pv_eoi_msr & ~1, "00")
    base = vcpu.simp // 4096 * 4096
    base = base if 0 < base < MEMORY else rng.choice(PAGES)
    slot = base + rng.randrange(4) * h.HV_MESSAGE_BYTES
    return ("poke", slot, ("00" if chance(rng, 0.8) else "01") + "00" * 7)


def line_op(rng: random.Random, model: oh.Machine) -> Op:
    used = 40 + 17 * rng.randrange(len(model.vcpus)) + rng.randrange(4)
    return ("irq_line", used if chance(rng, 0.85) else rng.choice((7, rng.randrange(40, 125))), int(chance(rng, 0.95)))


def time_op(rng: random.Random, model: oh.Machine) -> Op:
    """The clock goes on, mostly to where a timer is due; and the vCPU whose it is may come out of its guest."""
    clocks = [(when, v.index) for v in model.vcpus for when, _ in v.clocks() if when < model.now + 10_000_000_000]
    if not clocks or chance(rng, 0.3):
        return ("set_time", model.now + rng.choice((50, 100, 5_000, 100_000, 3_000_000)))
    when, i = min(clocks)
    if chance(rng, 0.6):
        model.next_op = ("host_interrupt", i)
    return ("set_time", max(model.now, when + rng.choice((0, 0, 1, 40_000, 250_000))))


def interrupts_op(rng: random.Random, model: oh.Machine) -> Op:
    """The guest takes interrupts or not; where APICv does that, it is not asked for."""
    i = rng.randrange(len(model.vcpus))
    return ("host_interrupt", i) if model.apicv else ("interrupts", i, chance(rng, 0.85))


OPS_OF_A_LIFE: dict[str, tuple[float, Callable[[random.Random, oh.Machine], Op]]] = {
    "MSRs": (8, msr_op),
    "hypercalls": (4, hypercall_op),
    "memory": (3, poke_op),
    "lines": (2, line_op),
    "time": (3, time_op),
    "interrupts": (1, interrupts_op),
    "exits": (3, s.exit_op),
    "IPIs": (1, s.ipi_op),
    "registers": (0.4, s.guest_op),
    "runs": (0.4, s.run_op),
    "switches": (0.2, s.switch_op),
}


@s.unchanged
def next_op(rng: random.Random, model: oh.Machine) -> Op:
    if model.next_op is not None:
        op, model.next_op = model.next_op, None
    elif any(vcpu.pv_eoi_offered for vcpu in model.vcpus) and chance(rng, 0.25):
        op = poke_op(rng, model)
    else:
        draws = list(OPS_OF_A_LIFE.values())
        op = rng.choices(draws, [weight for weight, _ in draws])[0][1](rng, model)
    if op[0] in (*s.GUEST_OPS, "hv_hypercall", "run"):
        vcpu = model.vcpus[op[1]]
        if vcpu.hypercall_asked:
            return ("complete_hypercall", op[1], rng.choice((0, 3, 1 << 32)))
        if op[0] != "run" and vcpu.mp_state != r.MP_RUNNABLE:
            return s.run_of(model, op[1]) if chance(rng, 0.5) else ("set_mp_state", op[1], r.MP_RUNNABLE)
        if op[0] == "hv_hypercall" and not model.takes_hypercalls():
            return ("set_msr", op[1], h.MSR_HV_GUEST_OS_ID, 1)
    return op


def boot(rng: random.Random, model: oh.Machine) -> list[Op]:
    """What most guests do before they live: APICs on, SynIC and its pages, the assist page, interrupts on."""
    ops = [("boot_x2apic",)] if model.x2apic and chance(rng, 0.7) else list(s.setup_ops(rng, model))
    ops += [("routes",), ("set_msr", 0, h.MSR_HV_GUEST_OS_ID, 1)]
    indices = rng.sample((0, 1, 2, 3, 5, 64), len(model.vcpus)) if chance(rng, 0.3) else range(len(model.vcpus))
    for i, index in enumerate(indices):
        ops.append(("set_msr", i, h.MSR_HV_VP_INDEX, index))
        if chance(rng, 0.5):
            ops.append(("set_msr", i, h.MSR_HV_VP_ASSIST_PAGE, PAGES[i] | 1))
        if chance(rng, 0.9):
            ops.append(("enable_synic", i, rng.choice((1, 2))))
            ops.append(("set_msr", i, h.MSR_HV_SIMP, rng.choice(PAGES) | 1))
            ops += [("set_msr", i, h.MSR_HV_SINT0 + sint, sint_value(rng)) for sint in range(4)]
        if not (model.x2apic or model.vcpus[i].x2apic) and chance(rng, 0.8):
            ops.append(("mmio_write", i, r.APIC_SPIV, 0x1FF, 4))
        if not model.apicv and chance(rng, 0.8):
            ops.append(("interrupts", i, True))
    return ops


def settle(pair: HypervPair) -> None:
    """Everybody's calls are answered, then all is looked at."""
    for vcpu in pair.model.vcpus:
        if vcpu.hypercall_asked:
            pair.step(("complete_hypercall", vcpu.index, 0))
    pair.step(SETTLE)


def live(life: Life, rng: random.Random, *, close: bool, threads: bool) -> None:
    """A life of both; the shortest story of a difference."""
    pair = HypervPair(life, close=close, threads=threads)
    pair.model.next_op = None
    try:
        for op in boot(rng, pair.model):
            pair.step(op)
        for _ in range(OPS):
            pair.step(next_op(rng, pair.model))
            if not close and chance(rng, 0.04):
                settle(pair)
        settle(pair)
    except AssertionError:
        raise AssertionError(shortest(life, pair.history, close=close, threads=threads)) from None


def difference(life: Life, ops: list[Op], **how: Any) -> str | None:
    """What a new pair says about these operations."""
    pair = HypervPair(life, **how)
    try:
        for op in ops:
            if op[0] != "set_time" or op[1] >= pair.model.now:
                pair.step(op)
        pair.look()
    except AssertionError as found:
        return str(found)
    except (IndexError, ValueError):
        pass
    return None


def shortest(life: Life, ops: list[Op], **how: Any) -> str:
    size = len(ops)
    while size := size // 2:
        at = 0
        while at < len(ops):
            rest = ops[:at] + ops[at + size :]
            if difference(life, rest, **how) is None:
                at += size
            else:
                ops = rest
    return f"{difference(life, ops, **how) or 'the difference does not show again on replay'}\n{life[1]}"


def random_life(rng: random.Random, **fixed: Any) -> Life:
    """A machine of up to four vCPUs; most guests are told that they run on Hyper-V, some with a CPUID that counts."""
    config = s.random_config(
        rng, **({"least": 1, "most": 4, "disable_quirks": 0, "tsc_khz": rng.choice((1_000_000, 2_500_000))} | fixed)
    )
    options: dict[str, Any] = {"hyperv": rng.random() < 0.9}
    if options["hyperv"] and chance(rng, 0.2) and oh.Machine.at(config.kernel) >= (5, 15):
        options = {"hyperv": "enforce", "hyperv_features": h.HvFeature(rng.getrandbits(24) | rng.getrandbits(24))}
    return config, options


@pytest.mark.parametrize("close", [True, False], ids=["looked at", "left alone"])
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("kernel", DRAWN)
@profile
@given(seed=s.seeds)
def test_windows_guests(kernel: str, vendor: str, close: bool, seed: int) -> None:
    """Everything that Hyper-V's part has, on every generation."""
    rng = random.Random(seed)
    life = random_life(rng, kernel=kernel, vendor=vendor, apicv=False)
    live(life, rng, close=close, threads=chance(rng, 0.5))


@pytest.mark.parametrize("kernel", [kernel for kernel in DRAWN if oh.Machine.at(kernel) >= (5, 10)])
@profile
@given(seed=s.seeds)
def test_with_apicv(kernel: str, seed: int) -> None:
    """SINTs with auto-EOI switch APICv off and on."""
    rng = random.Random(seed)
    life = random_life(rng, kernel=kernel, vendor=rng.choice(("vmx", "svm")), apicv=True)
    live(life, rng, close=chance(rng, 0.5), threads=chance(rng, 0.5))


def test_results_are_spelt() -> None:
    """What a hypercall came to is said in words that differ."""
    assert hypercall_words(Result(fault=True), None) != hypercall_words(Result(), None) != hypercall_words(Result(), 3)
    assert spelt(Result(completion="none")) == "none, accepted 0"
