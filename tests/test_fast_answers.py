"""What other kernels would do with a trace's exits: asked of the model, held against replay and what is known."""

from __future__ import annotations

import lzma
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from fastexit import regs as R
from fastexit.answers import fast, switches
from fastexit.answers.ask import report
from fastexit.answers.questions import ASLEEP, UNTOLD, Asked, Host, Question, icr_value
from fastexit.answers.report import Clue, DoorRow, ExitRow, Halts, VmReport
from fastexit.answers.savings import saved
from fastexit.costs.profile import Cost, CostProfile, cost_profile
from fastexit.jit import declare
from fastexit.profile import profiles
from fastexit.trace import BUNDLED
from fastexit.trace.doors import Door
from fastexit.trace.replay import replay

LOGICAL, ALL_BUT_SELF, NMI = R.ICR_LOGICAL, 3 << R.ICR_SHORTHAND_SHIFT, R.DM_NMI << R.ICR_DM_SHIFT
ICR = Question("ipi", Door.X2APIC)


@pytest.mark.skipif(not declare.JIT, reason="replays a part of a trace; interpreted that takes a minute")
def test_shares_are_those_of_replay(tmp_path: Path) -> None:
    trace = tmp_path / "part.trace"
    with lzma.open(BUNDLED, "rt") as whole:
        trace.write_text("".join(islice(whole, 40_000)))
    mine = {row.kernel: row for row in report(trace).vms[0].fast if row.what == fast.ICR_WRITE}
    theirs = replay(trace).vms[0].generations
    assert len(theirs) == len(profiles())
    for generation in theirs:
        row = mine[generation.kernel]
        assert (row.fast, row.total, row.refusals) == (generation.fast, generation.total, generation.refusals)


@pytest.mark.parametrize(
    ("question", "kernels"),
    [
        (ICR, profiles()),
        (Question("ipi", Door.X2APIC, targets=0), profiles()),
        (Question("ipi", Door.X2APIC, icr=LOGICAL, targets=3), ("6.18", "7.3")),
        (Question("ipi", Door.X2APIC, icr=NMI), ("6.18", "7.3")),
        (Question("ipi", Door.X2APIC, icr=ALL_BUT_SELF, targets=7), ("seed-v3",)),
        (Question("ipi", Door.X2APIC, broadcast=True, targets=8), ("seed-v3", "5.6")),
        (Question("ipi", Door.X2APIC, nested=True), ("seed-v3",)),
        (Question("ipi", Door.X2APIC, self_ipi=True), ()),
        (Question("ipi", Door.SYNTHETIC), ()),
        (Question("ipi", Door.HYPERCALL), ()),
        (Question("ipi", Door.PAGE), ()),
        (Question("ipi", Door.TRAP), ()),
        (Question("deadline"), profiles()[profiles().index("5.8") :]),
        (Question("HLT"), ("6.12", "6.18", "7.3")),
        (Question("INVD"), ("6.18", "7.3")),
        (Question("VMCALL"), ()),
    ],
)
def test_who_takes_what_fast_on_vmx(question: Question, kernels: tuple[str, ...]) -> None:
    taken = [kernel for kernel in profiles() if not fast.asked(kernel, Host(), None).answer(question).refusal]
    assert taken == list(kernels)


def test_the_first_patch_is_no_fast_path_on_svm() -> None:
    assert fast.asked("seed-v3", Host("svm"), None).answer(ICR).refusal
    assert not fast.asked("6.18", Host("svm"), None).answer(ICR).refusal


def test_a_deadline_needs_the_preemption_timer_until_it_does_not() -> None:
    without = Host(hv_timer=False)
    taken = [
        kernel for kernel in profiles() if not fast.asked(kernel, without, None).answer(Question("deadline")).refusal
    ]
    with_it = [
        kernel for kernel in profiles() if not fast.asked(kernel, Host(), None).answer(Question("deadline")).refusal
    ]
    assert set(taken) < set(with_it)
    assert "6.18" in taken


def test_an_answer_depends_on_no_question_before_it() -> None:
    machine, fresh = Asked("6.18", Host()), Asked("6.18", Host())
    for question in (
        Question("ipi", Door.X2APIC, icr=R.DM_INIT << R.ICR_DM_SHIFT),
        Question("HLT"),
        Question("deadline"),
    ):
        machine.answer(question)
    for targets in (0, 1):
        question = Question("ipi", Door.X2APIC, targets=targets)
        assert machine.answer(question) == fresh.answer(question)


def test_an_icr_of_a_class_reaches_as_many_as_it_says() -> None:
    machine = Asked("6.18", Host())
    for question in (
        ICR,
        Question("ipi", Door.X2APIC, targets=0),
        Question("ipi", Door.X2APIC, icr=LOGICAL, targets=0),
        Question("ipi", Door.X2APIC, icr=LOGICAL, targets=5),
        Question("ipi", Door.X2APIC, icr=ALL_BUT_SELF, targets=7),
        Question("ipi", Door.X2APIC, broadcast=True, targets=8),
    ):
        assert machine.fresh().wrmsr(R.MSR_X2APIC_ICR, icr_value(question)).accepted == question.targets


def test_a_logical_icr_whose_targets_were_not_recorded_has_one() -> None:
    """As a trace of kvm_msr alone has it: no line says who took the IPI."""
    question = Question("ipi", Door.X2APIC, icr=LOGICAL, targets=-1)
    assert Asked("6.18", Host()).fresh().wrmsr(R.MSR_X2APIC_ICR, icr_value(question)).accepted == 1
    icr = fast.Icr(1, Door.X2APIC, R.APIC_ICR, LOGICAL, False, -1, False, False)
    assert switches.rows(VmReport("t", 1), [(icr, 30)], Host()) == []  # hardware sends to physical destinations alone


def exits(**counts: int) -> list[ExitRow]:
    return [ExitRow(reason, n, 0.0, None, None) for reason, n in counts.items()]


def test_rows_count_what_the_trace_has() -> None:
    vm = VmReport("t", 1, {"vendor": Clue("vmx", "trace")}, exits=exits(HLT=7, CPUID=3))
    vm.exits[0].nested = 2
    rows = {(r.kernel, r.what): r for r in fast.rows(fast.classes([], (4, 0), vm), Host(), 2.0, ["5.8", "6.18"])}
    assert set(rows) == {(kernel, what) for kernel in ("5.8", "6.18") for what in ("TSC_DEADLINE write", "HLT")}
    assert (rows["6.18", "HLT"].fast, rows["6.18", "HLT"].total) == (0, 7)
    assert rows["6.18", "HLT"].refusals == {"vCPU runs L2": 2, UNTOLD: 5}
    assert rows["5.8", "HLT"].fast == 0
    assert rows["6.18", "TSC_DEADLINE write"].fast == 4


def test_a_halt_is_fast_where_the_vcpu_need_not_sleep() -> None:
    vm = VmReport("t", 1, exits=exits(HLT=10), halts=Halts(10, 6, 1, None))
    costs = cost_profile("skylake-retpoline")
    old, new = fast.rows(fast.classes([], (0, 0), vm), Host(), 1.0, ["6.8", "6.18"], costs)
    assert (new.fast, new.refusals) == (3, {ASLEEP: 7})
    assert (old.fast, old.refusals) == (0, {"exit has no fast handler": 10})
    assert new.saved
    assert new.saved[0] > 0


def test_a_reason_of_the_other_vendor_is_not_asked() -> None:
    vm = VmReport("t", 1, {"vendor": Clue("svm", "trace")}, exits=exits(PREEMPTION_TIMER=7, hlt=5, EXIT_INVD=1))
    assert list(fast.classes([], (0, 0), vm)) == ["hlt", "EXIT_INVD"]


@pytest.mark.parametrize(
    ("told", "host"),
    [
        ({}, Host()),
        ({"vendor": "svm"}, Host("svm")),
        ({"apicv": "on"}, Host(apicv=True)),
        ({"apicv": "at times"}, Host(apicv=True)),
        ({"apicv": "off", "irqchip": "split", "hv_timer": "off"}, Host(irqchip="split", hv_timer=False)),
    ],
)
def test_clues_make_a_host(told: dict[str, str], host: Host) -> None:
    assert fast.host_of({name: Clue(value, "trace") for name, value in told.items()}) == host


def test_what_is_saved_is_a_range_where_a_stage_is_assumed() -> None:
    base = cost_profile("skylake-mitigations-off")
    costs = CostProfile(
        "two", "", 1.0, "", base.costs | {"icr": Cost(10, "assumed"), "skip": Cost(10, "measured: here")}
    )
    assert saved(costs, {"icr": 100, "skip": 30}, {"icr": 100, "skip": 10}) == (20, 20)
    assert saved(costs, {"icr": 100, "skip": 30}, {"skip": 10}) == (70, 170)
    assert saved(costs, {}, {"icr": 100}) == (-150, -50)


def test_cycles_follow_from_the_stages_that_a_fast_exit_leaves_out() -> None:
    costs = cost_profile("skylake-retpoline")
    rows = fast.rows(
        {fast.DEADLINE: fast.classes([], (10, 0), VmReport("t", 1))[fast.DEADLINE]}, Host(), 5.0, ["6.18"], costs
    )
    (row,) = rows
    assert row.saved
    assert row.saved_total
    assert 0 < row.saved[0] < row.saved[1]
    assert row.saved_total == pytest.approx([10 * ends for ends in row.saved])
    assert row.saved_per_second == pytest.approx([2 * ends for ends in row.saved])


def test_switches_tell_what_the_cpu_would_do_by_itself() -> None:
    vm = VmReport("t", 1, exits=exits(MSR_WRITE=100, INTERRUPT_WINDOW=5), doors=[DoorRow("EOI", "x2APIC MSR", 40)])
    icr = fast.Icr(1, Door.X2APIC, R.APIC_ICR, 0, False, 1, False, False)
    rows = {row.switch: row for row in switches.rows(vm, [(icr, 30)], Host())}
    assert rows[switches.POSTED].gone == {"EOI writes (x2APIC MSR)": 40, "INTERRUPT_WINDOW": 5}
    assert rows[switches.IPIV].gone["ICR writes (x2APIC MSR)"] == 30
    assert (rows[switches.IPIV].exits_before, rows[switches.IPIV].exits_after) == (105, 30)


def test_a_windows_guest_without_hv_vapic_has_fast_ipis() -> None:
    vm = VmReport("t", 1, exits=exits(MSR_WRITE=9), doors=[DoorRow("IPI", Door.SYNTHETIC.value, 9)])
    icr = fast.Icr(1, Door.SYNTHETIC, R.APIC_ICR, 0, False, 1, False, False)
    (row,) = [row for row in switches.rows(vm, [(icr, 9)], Host(), cost_profile("skylake-retpoline"))]
    assert row.switch == switches.NO_VAPIC
    assert row.exits_before == row.exits_after == 9
    assert row.saved_total
    assert 0 < row.saved_total[0] < row.saved_total[1]


def test_each_vcpu_saves_by_what_it_sent() -> None:
    costs = cost_profile("skylake-retpoline")
    one = fast.Icr(1, Door.X2APIC, R.APIC_ICR, 0, False, 1, False, False)
    refused = one._replace(icr=ALL_BUT_SELF)
    counts = fast.classes([(one, 30), (refused, 5)], (0, 1), VmReport("t", 1))
    found = fast.rows(counts, Host(), None, ["6.18"], costs)
    fast.by_vcpu(
        found, {0: Counter({one: 10}), 3: Counter({one: 20, refused: 5}), 4: Counter({refused: 1})}, Host(), costs
    )
    row, deadline = found
    assert row.saved
    assert row.saved_by_vcpu[0] == pytest.approx([10 * ends for ends in row.saved])
    assert row.saved_by_vcpu[3] == pytest.approx([20 * ends for ends in row.saved])
    assert list(row.saved_by_vcpu) == [0, 3]
    assert deadline.refusals == {"vCPU runs L2": 1}


HISTOGRAM = """\
Samples: 2K of event 'kvm:kvm_msr', 1 Hz, Event count (approx.): 2000 lost: 0/0 drop: 0/0
Overhead  Trace output
  60.00%  msr_write 830 = 0x1000000fb
   3.00%  msr_write 830 = 0xc00fb
   1.00%  msr_write 6e0 = 0x94ba753656c
"""


def test_a_histogram_of_msr_writes_has_classes(tmp_path: Path) -> None:
    trace = tmp_path / "top.txt"
    trace.write_text(HISTOGRAM)
    icr, deadline = report(trace, kernels=["6.18"]).vms[0].fast
    assert (icr.fast, icr.total, icr.refusals) == (1200, 1260, {"destination shorthand": 60})
    assert (deadline.fast, deadline.total) == (20, 20)
