"""What lines of a thread say together: each door, each source of an interrupt, each order that kernels print."""

from __future__ import annotations

import numpy as np
import pytest

from answered import answered, guest, recorded, split
from fastexit import regs as R
from fastexit.answers import facts
from fastexit.answers.analyse import Analysis
from fastexit.answers.facts import DOORS, FACT, Follower, class_of
from fastexit.answers.follow import words as F
from fastexit.answers.places import Where
from fastexit.records.columns import NO_TIME, RECORD, Event, Rows
from fastexit.trace.doors import Door
from fastexit.trace.report import NOT_RECORDED

X2APIC = """
    0 10 kvm_exit: vcpu 0 reason MSR_WRITE rip 0x1 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0
    0 12 kvm_apic_ipi: dst 1 vec 253 (Fixed|physical|de-assert|edge|dst)
    0 13 kvm_apic_accept_irq: apicid 1 vec 253 (Fixed|edge)
    0 14 kvm_apic: apic_write APIC_ICR = 0x1000000fd
    0 15 kvm_msr: msr_write 830 = 0x1000000fd
    0 16 kvm_entry: vcpu 0, rip 0x1
"""
FAST_PATH = """
    0 10 kvm_exit: vcpu 0 reason MSR_WRITE rip 0x1 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0
    0 12 kvm_apic_accept_irq: apicid 1 vec 253 (Fixed|edge)
    0 13 kvm_apic_ipi: dst 1 vec 253 (Fixed|physical|de-assert|edge|dst)
    0 14 kvm_apic: apic_write APIC_ICR = 0x1000000fd
    0 15 kvm_msr: msr_write 830 = 0x1000000fd
    0 16 kvm_entry: vcpu 0, rip 0x1
"""
HALVES = """
    0 10 kvm_exit: reason MSR_WRITE rip 0x1 info 0 0
    0 11 kvm_apic: apic_write APIC_ICR2 = 0x1
    0 11 kvm_apic: apic_write APIC_ICR = 0xfd
    0 12 kvm_apic_ipi: dst 1 vec 253 (Fixed|physical|de-assert|edge|dst)
    0 13 kvm_apic_accept_irq: apicid 1 vec 253 (Fixed|edge)
    0 15 kvm_msr: msr_write 830 = 0x1000000fd
    0 16 kvm_entry: vcpu 0
"""
PAGE = """
    0 10 kvm_exit: vcpu 0 reason EPT_MISCONFIG rip 0x1 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0
    0 11 kvm_mmio: mmio write len 4 gpa 0xfee00310 val 0x1000000
    0 11 kvm_apic: apic_write APIC_ICR2 = 0x1000000
    0 12 kvm_mmio: mmio write len 4 gpa 0xfee00300 val 0xfd
    0 12 kvm_apic: apic_write APIC_ICR = 0xfd
    0 12 kvm_apic_ipi: dst 1 vec 253 (Fixed|physical|de-assert|edge|dst)
    0 13 kvm_apic_accept_irq: apicid 1 vec 253 (Fixed|edge)
    0 16 kvm_entry: vcpu 0, rip 0x1
"""
SYNTHETIC = X2APIC.replace("msr_write 830", "msr_write 40000071")
TRAP = """
    0 10 kvm_exit: vcpu 0 reason APIC_WRITE rip 0x1 info1 0x300 info2 0x0 intr_info 0x0 error_code 0x0
    0 12 kvm_apic: apic_write APIC_ICR = 0xfd
    0 12 kvm_apic_ipi: dst 1 vec 253 (Fixed|physical|de-assert|edge|dst)
    0 13 kvm_apic_accept_irq: apicid 1 vec 253 (Fixed|edge)
    0 16 kvm_entry: vcpu 0, rip 0x1
"""
AVIC = TRAP.replace("APIC_WRITE", "avic_incomplete_ipi")
HYPERCALL = """
    0 10 kvm_exit: vcpu 0 reason VMCALL rip 0x1 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0
    0 12 kvm_hv_hypercall: code 0xb fast var_cnt 0x0 rep_cnt 0x0 idx 0x0 in 0xfd out 0x2
    0 12 kvm_hv_send_ipi: vector fd processor_mask 0x2
    0 13 kvm_apic_accept_irq: apicid 1 vec 253 (Fixed|edge)
    0 16 kvm_entry: vcpu 0, rip 0x1
"""
KVM_CALL = """
    0 10 kvm_exit: vcpu 0 reason VMCALL rip 0x1 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0
    0 12 kvm_hypercall: nr 0xa a0 0x2 a1 0x0 a2 0x0 a3 0xfd
    0 13 kvm_apic_accept_irq: apicid 1 vec 253 (Fixed|edge)
    0 16 kvm_entry: vcpu 0, rip 0x1
"""


def without(text: str, *names: str) -> str:
    return "\n".join(line for line in text.splitlines() if not any(name in line for name in names))


SENT = {
    "generic path": (X2APIC, Door.X2APIC),
    "fast path of 6.18": (FAST_PATH, Door.X2APIC),
    "two halves before 6.1": (HALVES, Door.X2APIC),
    "no kvm_apic and no kvm_apic_ipi": (without(FAST_PATH, "kvm_apic:", "kvm_apic_ipi"), Door.X2APIC),
    "no kvm_msr": (without(X2APIC, "kvm_msr"), Door.X2APIC),
    "page": (PAGE, Door.PAGE),
    "synthetic": (SYNTHETIC, Door.SYNTHETIC),
    "Windows without kvm_msr": (
        without(X2APIC, "kvm_msr").replace("rip 0x1 ", "rip 0xfffff80612345678 "),
        Door.UNTOLD,
    ),
    "trap": (TRAP, Door.TRAP),
    "AVIC": (AVIC, Door.AVIC),
    "Hyper-V's hypercall": (HYPERCALL, Door.HYPERCALL),
    "KVM's hypercall": (KVM_CALL, Door.HYPERCALL),
}  # fmt: skip


@pytest.mark.parametrize("case", SENT)
def test_one_ipi_by_each_door(case: str) -> None:
    text, door = SENT[case]
    analysis = Analysis(recorded(text))
    [(icr, n)] = analysis.icrs().items()
    assert (icr.door, icr.targets, icr.nested, icr.faulted, n) == (door, 1, False, False, 1)
    report = analysis.report(1)
    assert [(row.vector, row.source, row.accepted) for row in report.vectors] == [(253, f"IPI ({door.value})", 1)]
    assert [(row.sender, row.target, row.interrupts) for row in report.sent] == [(0, 1, 1)]
    assert [(row.doing, row.door, row.count) for row in report.doors] == [("IPI", door.value, 1)]
    [latency] = [row for row in report.latency if row.what == "exit to accept"]
    assert latency.time.maximum == (2000 if case == "fast path of 6.18" or case.startswith("no kvm_apic") else 3000)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_facts_do_not_depend_on_blocks(size: int) -> None:
    text = "\n".join(text for text, _ in SENT.values())
    whole, parts = (Analysis(recorded(text, n)).report(1) for n in (0, size))
    assert whole == parts


@pytest.mark.parametrize("size", [97, 1024])
def test_a_real_guest_does_not_depend_on_blocks(size: int) -> None:
    whole = guest("windows/kvm-6.12-xapic.trace.xz")
    reports = [Analysis(split(whole, n)).report(1) for n in (0, size)]
    assert reports[0] == reports[1]


def test_an_all_but_self_ipi_has_its_targets_and_not_anothers_interrupt() -> None:
    text = """
        0 12 kvm_apic_accept_irq: apicid 0 vec 236 (Fixed|edge)
        0 13 kvm_apic_accept_irq: apicid 1 vec 252 (Fixed|edge)
        1 13 kvm_apic_accept_irq: apicid 1 vec 236 (Fixed|edge)
        0 13 kvm_apic_accept_irq: apicid 2 vec 252 (Fixed|edge)
        0 14 kvm_apic_ipi: dst 0 vec 252 (Fixed|physical|de-assert|edge|all-but-self)
        0 15 kvm_apic: apic_write APIC_ICR = 0xc00fc
        0 15 kvm_msr: msr_write 830 = 0xc00fc
        1 16 kvm_msr: msr_write 6e0 = 0x1
    """
    analysis = Analysis(recorded(text))
    [icr] = analysis.icrs()
    assert (icr.icr, icr.targets, icr.words) == (0xC0000, 2, "Fixed all-but-self, 2 targets")
    rows = {(row.vector, row.source): row.accepted for row in analysis.report(1).vectors}
    assert rows == {(236, "timer"): 2, (252, "IPI (x2APIC MSR)"): 2}


def test_targets_are_not_invented_where_accept_lines_were_not_recorded() -> None:
    analysis = Analysis(recorded("0 10 kvm_msr: msr_write 830 = 0x2000000fd\n2 11 kvm_msr: msr_write 830 = 0xfd"))
    [(icr, n)] = analysis.icrs().items()
    assert (icr.targets, n) == (NOT_RECORDED, 2)
    report = analysis.report(1)
    assert report.msrs[0].classes == [("Fixed physical, targets not recorded", 2)]
    assert report.sent == report.vectors == []


def test_avic_tells_no_targets() -> None:
    text = """
        0 10 kvm_exit: vcpu 0 reason avic_incomplete_ipi rip 0x1 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0
        0 11 kvm_avic_incomplete_ipi: vcpu=0, icrh:icrl=0x01000000:0x000000fd, id=1, index=1
        0 12 kvm_entry: vcpu 0, rip 0x1
        1 13 kvm_apic_accept_irq: apicid 1 vec 236 (Fixed|edge)
    """
    [icr] = Analysis(recorded(text)).icrs()
    assert (icr.door, icr.icr, icr.targets) == (Door.AVIC, 0, NOT_RECORDED)


def test_a_fault_is_no_ipi() -> None:
    analysis = Analysis(
        recorded(
            """
            0 10 kvm_apic_accept_irq: apicid 0 vec 236 (Fixed|edge)
            0 11 kvm_msr: msr_write 830 = 0x1000ec (#GP)
            """
        )
    )
    [icr] = analysis.icrs()
    assert icr.faulted
    assert icr.targets == 0
    assert [row.source for row in analysis.report(1).vectors] == ["timer"]


def test_a_nested_guests_exit_is_known_by_the_line_behind_it() -> None:
    nested = X2APIC.replace("    0 12", "    0 11 kvm_nested_vmexit: vcpu 0 reason MSR_WRITE rip 0x1\n    0 12", 1)
    late = X2APIC.replace("    0 16", "    0 15 kvm_nested_vmexit_inject: reason MSR_WRITE info1 0\n    0 16")
    assert [icr.nested for text in (nested, late) for icr in Analysis(recorded(text)).icrs()] == [True, False]
    assert answered(nested).exits[0].nested == 1


def test_devices_are_known_by_lines_before_and_behind() -> None:
    text = """
        kworker 10 kvm_set_irq: gsi 24 level 1 source 0
        kworker 11 kvm_msi_set_irq: dst 0 vec 40 (Fixed|physical|edge)
        kworker 12 kvm_apic_accept_irq: apicid 0 vec 40 (Fixed|edge)
        kworker 20 kvm_set_irq: gsi 4 level 1 source 0
        kworker 21 kvm_pic_set_irq: chip 0 pin 4 (edge|masked)
        kworker 21 kvm_apic_accept_irq: apicid 0 vec 33 (Fixed|edge)
        kworker 22 kvm_ioapic_set_irq: pin 4 dst 0 vec 33 (Fixed|physical|edge)
        kworker 23 kvm_set_irq: gsi 4 level 0 source 0
        kworker 24 kvm_ioapic_set_irq: pin 4 dst 0 vec 33 (Fixed|physical|edge)
        kworker 30 kvm_set_irq: gsi 26 level 1 source 0
        kworker 32 kvm_apic_accept_irq: apicid 0 vec 41 (Fixed|edge)
        kworker 40 kvm_set_irq: gsi 0 level 1 source 0
        0 50 kvm_apic: apic_write APIC_LVTT = 0x400ec
        kworker 51 kvm_apic_accept_irq: apicid 0 vec 236 (Fixed|edge)
        0 52 kvm_apic_accept_irq: apicid 0 vec 99 (Fixed|edge)
        0 53 kvm_hv_synic_set_irq: vcpu_id 0 sint 2 vec 99 auto_eoi 0 masked 0 ret 0
        0 54 kvm_apic_accept_irq: apicid 0 vec 98 (Fixed|edge)
        0 55 kvm_msr: msr_write 6e0 = 0x1
        0 56 kvm_apic_accept_irq: apicid 0 vec 0 (NMI|edge)
    """
    rows = {(row.vector, row.name): row.source for row in answered(text).vectors}
    assert rows == {
        (40, ""): "MSI gsi 24",
        (33, ""): "IOAPIC gsi 4",
        (41, ""): "line of gsi 26",
        (236, "LOCAL_TIMER"): "line of gsi 0",
        (99, ""): "SynIC",
        (98, ""): "not told",
        (0, "NMI"): "not told",
    }


def test_an_msi_to_many_and_one_without_a_gsi() -> None:
    text = """
        kworker 10 kvm_set_irq: gsi 24 level 1 source 0
        kworker 11 kvm_msi_set_irq: dst 3 vec 40 (Fixed|logical|edge)
        kworker 12 kvm_apic_accept_irq: apicid 0 vec 40 (Fixed|edge)
        kworker 13 kvm_apic_accept_irq: apicid 1 vec 40 (Fixed|edge)
        kworker 14 kvm_msi_set_irq: dst 0 vec 41 (Fixed|physical|edge)
        kworker 15 kvm_apic_accept_irq: apicid 0 vec 41 (Fixed|edge)
        0 16 kvm_entry: vcpu 0
        1 16 kvm_entry: vcpu 1
    """
    rows = {(row.vector, row.source): row.accepted for row in answered(text).vectors}
    assert rows == {(40, "MSI gsi 24"): 2, (41, "MSI"): 1}


def test_a_timers_interrupt_may_come_from_another_thread() -> None:
    text = """
        0 50 kvm_apic: apic_write APIC_LVTT = 0x400ec
        swapper 51 kvm_apic_accept_irq: apicid 0 vec 236 (Fixed|edge)
        swapper 52 kvm_apic_accept_irq: apicid 0 vec 99 (Fixed|edge)
    """
    assert [(row.vector, row.source) for row in answered(text).vectors] == [(99, "not told"), (236, "timer")]


def test_pic() -> None:
    text = """
        0 10 kvm_pic_set_irq: chip 0 pin 0 (edge)
        0 11 kvm_inj_virq: IRQ 0x30
        0 12 kvm_apic_accept_irq: apicid 0 vec 236 (Fixed|edge)
        0 13 kvm_inj_virq: IRQ 0xec
    """
    rows = {row.vector: (row.source, row.accepted) for row in answered(text).vectors}
    assert rows == {236: ("timer", 1), 48: ("PIC", 1)}


EOIS = {
    "x2APIC MSR": "0 11 kvm_apic: apic_write APIC_EOI = 0x0\n0 12 kvm_eoi: apicid 0 vector 236\n"
    "0 13 kvm_msr: msr_write 80b = 0x0",
    "synthetic MSR": "0 11 kvm_apic: apic_write APIC_EOI = 0x0\n0 12 kvm_eoi: apicid 0 vector 236\n"
    "0 13 kvm_msr: msr_write 40000070 = 0x0",
    "xAPIC page": "0 11 kvm_mmio: mmio write len 4 gpa 0xfee000b0 val 0x0\n0 11 kvm_apic: apic_write APIC_EOI = 0x0\n"
    "0 12 kvm_eoi: apicid 0 vector 236",
    "AVIC exit": "0 10 kvm_exit: reason avic_unaccelerated_access rip 0x1 info b0 0\n"
    "0 11 kvm_apic: apic_write APIC_EOI = 0x0\n0 12 kvm_eoi: apicid 0 vector 236",
    "EOI_INDUCED": "0 10 kvm_exit: reason EOI_INDUCED rip 0x1 info ec 0\n0 12 kvm_eoi: apicid 0 vector 236",
    "EOI assist": "0 12 kvm_eoi: apicid 0 vector 236\n0 13 kvm_pv_eoi: apicid 0 vector 236",
}


@pytest.mark.parametrize("door", EOIS)
def test_one_eoi_by_each_door(door: str) -> None:
    report = answered(f"0 1 kvm_apic_accept_irq: apicid 0 vec 236 (Fixed|edge)\n{EOIS[door]}\n0 20 kvm_entry: vcpu 0")
    assert [(row.doing, row.door, row.count) for row in report.doors] == [("EOI", door, 1)]
    assert report.vectors[0].eois == 1


def test_kvms_own_eoi_is_no_access_of_the_guest() -> None:
    assert answered("0 11 kvm_apic: apic_write APIC_EOI = 0x0\n0 12 kvm_eoi: apicid 0 vector 236").doors == []


def test_other_accesses_by_door() -> None:
    report = answered(
        """
        0 10 kvm_msr: msr_write 808 = 0x10
        0 11 kvm_msr: msr_write 40000072 = 0x10
        0 12 kvm_cr: cr_write 8 = 0x1
        0 13 kvm_msr: msr_write 838 = 0x1000
        0 14 kvm_msr: msr_write 400000b1 = 0x1000
        0 15 kvm_mmio: mmio write len 4 gpa 0xfee00380 val 0x1000
        0 16 kvm_msr: msr_write 808 = 0x100000000 (#GP)
        0 17 kvm_mmio: mmio write len 4 gpa 0xfec00000 val 0x80
        """
    )
    assert {(row.doing, row.door): row.count for row in report.doors} == {
        ("TPR", "x2APIC MSR"): 1,
        ("TPR", "synthetic MSR"): 1,
        ("TPR", "CR8"): 1,
        ("timer", "x2APIC MSR"): 1,
        ("timer", "synthetic MSR"): 1,
        ("timer", "xAPIC page"): 1,
    }


LATENCY = """
    0 10 kvm_exit: vcpu 0 reason MSR_WRITE rip 0x1 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0
    0 12 kvm_apic_ipi: dst 1 vec 253 (Fixed|physical|de-assert|edge|dst)
    0 13 kvm_apic_accept_irq: apicid 1 vec 253 (Fixed|edge)
    1 14 kvm_exit: vcpu 1 reason EXTERNAL_INTERRUPT rip 0x1 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0
    1 17 kvm_inj_virq: IRQ 0xfd
    1 18 kvm_entry: vcpu 1, rip 0x1
    0 19 kvm_apic: apic_write APIC_ICR = 0x1000000fd
    0 20 kvm_msr: msr_write 830 = 0x1000000fd
    1 25 kvm_eoi: apicid 1 vector 253
"""


def latency(text: str) -> dict[str, float]:
    return {row.what: row.time.maximum / 1000 for row in answered(text).latency}


def test_latency_of_an_ipi_through_its_target() -> None:
    expected = {"exit to accept": 3, "accept to entry": 5, "exit to entry": 8, "entry to EOI": 7, "accept to EOI": 12}
    assert latency(LATENCY) == expected


def test_an_entry_that_brings_another_vector_is_not_the_ipis() -> None:
    first = "    1 15 kvm_inj_virq: IRQ 0xec\n    1 16 kvm_entry: vcpu 1\n    1 17 kvm_inj_virq"
    assert latency(LATENCY.replace("    1 17 kvm_inj_virq", first))["accept to entry"] == 5


def test_a_posted_interrupt_needs_no_entry() -> None:
    posted = """
        1 1 kvm_entry: vcpu 1
        0 12 kvm_apic_ipi: dst 1 vec 253 (Fixed|physical|de-assert|edge|dst)
        0 13 kvm_apic_accept_irq: apicid 1 vec 253 (Fixed|edge)
        0 13 kvm_apicv_accept_irq: apicid 1 vec 253 (Fixed|edge)
        0 20 kvm_msr: msr_write 830 = 0x1000000fd
        1 900 kvm_exit: vcpu 1 reason HLT rip 0x1 info1 0x0 info2 0x0 intr_info 0x0 error_code 0x0
        1 950 kvm_entry: vcpu 1
    """
    again = posted + posted.replace("        1 1 kvm_entry: vcpu 1\n", "")
    assert "accept to entry" in latency(posted)  # by its first such line alone nobody knows
    report = answered(again)
    [row] = [row for row in report.latency if row.what == "accept to entry"]
    assert row.time.count == 1


def test_doors_have_the_numbers_of_words() -> None:
    names = {F.DOOR_X2APIC: Door.X2APIC, F.DOOR_SYNTHETIC: Door.SYNTHETIC, F.DOOR_HYPERCALL: Door.HYPERCALL}
    names |= {F.DOOR_PAGE: Door.PAGE, F.DOOR_TRAP: Door.TRAP, F.DOOR_AVIC: Door.AVIC, F.DOOR_ASSIST: Door.ASSIST}
    names |= {F.DOOR_INDUCED: Door.INDUCED, F.DOOR_CR8: Door.CR8, F.DOOR_UNTOLD: Door.UNTOLD}
    assert all(DOORS[int(number)] is door for number, door in names.items())


def test_events_have_the_numbers_of_columns() -> None:
    for name in vars(F):
        if name.startswith("E_"):
            assert int(getattr(F, name)) == Event[name.removeprefix("E_")], name
    left = [event for event in Event if int(F.BESIDE) >> event & 1]
    followed = {int(getattr(F, name)) for name in vars(F) if name.startswith("E_")}
    assert not followed & set(left)


def test_rows_and_facts_are_eight_words() -> None:
    assert RECORD.itemsize == FACT.itemsize == 64
    row = np.zeros(1, RECORD)
    row["line"], row["thread"], row["name"], row["cpu"], row["vcpu"], row["event"], row["flags"] = 1, 2, 3, 4, 5, 6, 7
    assert row.view(np.uint64)[5:].tolist() == [1 | 2 << 32, 3 | 4 << 32 | 5 << 48, 6 | 7 << 8]
    assert class_of("EXIT_REASON_MSR_WRITE") == class_of("EXIT_MSR") == int(F.CLASS_MSR)


def test_more_accept_lines_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts.F, "POOL", 4) if not facts.JIT else None
    n = F.POOL + 10
    text = "\n".join(f"kworker {i} kvm_apic_accept_irq: apicid {i % 4} vec 40 (Fixed|edge)" for i in range(n))
    rows = {(row.vector, row.source): row.accepted for row in answered(text + X2APIC).vectors}
    assert rows == {(40, "not told"): n, (253, "IPI (x2APIC MSR)"): 1}


def test_numbers_that_no_kernel_prints() -> None:
    rows = np.zeros(64, RECORD)
    rng = np.random.default_rng(1)
    for event in Event:
        for name in "time", "a", "b", "c", "d":
            rows[name] = rng.integers(0, 1 << 63, 64, np.uint64).view(np.int64)
        rows["event"] = event
        rows["thread"] = rng.integers(-1, 9, 64)
        recording = recorded("0 1 kvm_entry: vcpu 0\n1 2 kvm_entry: vcpu 1")
        rows["time"][::7] = NO_TIME
        recording.blocks = [rows, rows]
        where = Where(np.array([1, 2, 0], np.int32), np.array([0, 32767, -1], np.int32))
        for vm in (analysis := Analysis(recording, where)).vms:
            analysis.report(vm)


def test_a_thread_of_no_vm_belongs_to_the_only_one() -> None:
    recording = recorded("0 1 kvm_entry: vcpu 0\nkworker 2 kvm_apic_accept_irq: apicid 0 vec 40 (Fixed|edge)")
    assert Analysis(recording).vms == [1]
    two = Where(np.array([1, 0, 0], np.int32), np.array([0, -1, -1], np.int32))
    assert Analysis(recording, two).vms == [1]
    follower = Follower(recording, two)
    assert sum(len(block.facts) for block in follower) == 2
    assert R.APIC_ICR == 0x300


ODD = np.array(
    [0, 1, 2, 3, 255, 256, 0x300, 0x830, 0x40000071, 0xFEE00300, 0xFEE000B0, 4095, 4096, 2**64 - 1], np.uint64
)


def spoilt(rows: Rows, rng: np.random.Generator) -> Rows:
    """Some lines of a trace, with fields, threads, events and times that belong elsewhere."""
    size = int(rng.integers(1, 400))
    first = int(rng.integers(0, len(rows) - size))
    made = rows[first : first + size].copy() if rng.random() < 0.5 else rows[rng.integers(0, len(rows), size)].copy()
    for field, values in {
        **dict.fromkeys("abcd", ODD),
        "event": np.arange(70),
        "thread": np.arange(-1, 9),
        "name": np.arange(-1, 9),
        "time": rng.integers(0, 1 << 44, 9),
    }.items():
        here = rng.random(size) < rng.choice([0, 0.1])
        made[field][here] = rng.choice(values, int(here.sum()))
    return made


@pytest.mark.parametrize("seed", range(12))
def test_spoilt_traces_are_answered_alike_whatever_their_blocks(seed: int) -> None:
    recording = guest("windows/kvm-7.3-x2apic.trace.xz")
    rng = np.random.default_rng(seed)
    rows = spoilt(next(iter(recording.blocks)), rng)
    threads = len(recording.threads) + 1
    where = Where(rng.integers(0, 3, threads).astype(np.int32), rng.integers(-1, 4, threads).astype(np.int32))
    reports = []
    for size in (0, int(rng.integers(1, 200))):
        recording.blocks = [rows]
        analysis = Analysis(split(recording, size), where)
        reports.append([analysis.report(vm) for vm in analysis.vms])
    assert reports[0] == reports[1]
