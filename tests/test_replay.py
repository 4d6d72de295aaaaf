"""Replay: real traces are predicted line by line, every generation's own trace too, and differences are shown."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import lzma
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import fastexit as fx
from fastexit.profile import as_of
from fastexit.trace import BUNDLED, TraceError
from fastexit.trace import replay as replay_module
from fastexit.trace.generations import Generations
from fastexit.trace.render import render
from fastexit.trace.replay import replay
from fastexit.trace.report import IcrClass, Mismatch, Report
from generations import kernels

TRACES = Path(__file__).parents[1] / "examples" / "traces"
X2APIC = BUNDLED
XAPIC = TRACES / "linux-6.1-4vcpu-xapic.trace.xz"
SYNTHETIC = TRACES / "synthetic-guest-4vcpu.txt.gz"

UNICAST = IcrClass("Fixed", "physical", "none", 1, False)


@pytest.fixture(scope="module")
def reports() -> dict[Path, Report]:
    return {path: replay(path) for path in (X2APIC, XAPIC, SYNTHETIC)}


@pytest.fixture(scope="module")
def linux() -> list[str]:
    with lzma.open(X2APIC, "rt") as source:
        return source.readlines()


@pytest.fixture(scope="module")
def bare() -> list[str]:
    with gzip.open(SYNTHETIC, "rt") as source:
        return source.readlines()


@pytest.fixture
def replayed(tmp_path: Path) -> Callable[..., Report]:
    def run(lines: list[str], **options: object) -> Report:
        path = tmp_path / "trace.txt"
        path.write_text("".join(lines))
        return replay(path, **options)  # type: ignore[arg-type]

    return run


def printed(report: Report) -> str:
    out = Console(file=io.StringIO(), width=160)
    render(report, out)
    return out.file.getvalue()  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------------ the real traces


@pytest.mark.parametrize(
    ("path", "ipis", "accepted"), [(X2APIC, 3664, 4170), (XAPIC, 1980, 2102), (SYNTHETIC, 1459, 2379)]
)
def test_every_line_is_predicted(reports: dict[Path, Report], path: Path, ipis: int, accepted: int) -> None:
    report = reports[path]
    assert report.mismatches == []
    assert report.problems == []
    assert (report.ipi.exact, report.ipi.total) == (ipis, ipis) == (report.ipi.exact, report.events["kvm_apic_ipi"])
    assert (report.accepted.exact, report.accepted.total) == (accepted, accepted)
    others = sum(vm.other_accepts.total() for vm in report.vms)
    assert accepted + others == report.events["kvm_apic_accept_irq"]
    for vm in report.vms:
        assert vm.eoi.exact == vm.eoi.total
        assert vm.reads.exact == vm.reads.total
        assert vm.faults.exact == vm.faults.total
    assert sum(vm.eoi.total for vm in report.vms) == report.events["kvm_eoi"]


def test_what_an_x2apic_linux_sends(reports: dict[Path, Report]) -> None:
    (vm,) = reports[X2APIC].vms
    assert vm.start == "reset"
    assert vm.irqchip == "full"
    assert vm.icr_writes == 3664
    assert vm.classes == {
        UNICAST: 3399,
        IcrClass("Fixed", "physical", "all-but-self", 3, False): 253,
        IcrClass("INIT", "physical", "none", 1, False): 6,
        IcrClass("SIPI", "physical", "none", 1, False): 6,
    }
    assert vm.vectors == {
        (0xFB, "none"): 2765,
        (0xFD, "none"): 518,
        (0xFC, "none"): 116,
        (0xFC, "all-but-self"): 252,
        (0xF8, "all-but-self"): 1,
    }
    assert vm.other_accepts == {"timer": 13_016, "MSI or IOAPIC": 1_740}
    assert vm.host_eois == vm.eoi.total / 2 == 17_210
    assert sum(vm.sent.values()) == 4170
    assert {vector["name"] for vector in vm.as_dict()["vectors"]} == {
        "CALL_FUNCTION_SINGLE",
        "CALL_FUNCTION",
        "RESCHEDULE",
        "REBOOT",
    }


def test_what_an_xapic_linux_sends(reports: dict[Path, Report]) -> None:
    (vm,) = reports[XAPIC].vms
    assert vm.classes[IcrClass("Fixed", "logical", "none", 1, False)] == 1898
    assert vm.classes[IcrClass("Fixed", "logical", "none", 2, False)] == 18
    assert vm.classes[IcrClass("Fixed", "physical", "all-but-self", 3, False)] == 52
    for generation in vm.generations:
        assert (generation.fast, generation.total) == (0, 1980)
        assert generation.refusals == {"write to the xAPIC page: exit has no fast handler": 1980}


def test_what_each_generation_takes(reports: dict[Path, Report]) -> None:
    (vm,) = reports[X2APIC].vms
    shares = {g.kernel: (g.fast, g.refusals) for g in vm.generations}
    assert tuple(shares) == fx.profiles()
    not_fixed, shorthand = "delivery mode is not Fixed", "destination shorthand"
    assert shares["seed-v3"] == (3652, {not_fixed: 12})
    for kernel in kernels("5.6", before="6.18"):
        assert shares[kernel] == (3399, {shorthand: 253, not_fixed: 12})
    for kernel in kernels("6.18"):
        assert shares[kernel] == (3411, {shorthand: 253})
    assert vm.deadlines == 15_061


def test_what_each_generation_takes_of_every_kind(reports: dict[Path, Report]) -> None:
    """One ICR write of each kind per round, so the generations differ in whole rounds of 120, or of 15 for the rare."""
    vm = reports[SYNTHETIC].vms[0]
    taken = {
        "seed-v3": 631,  # what is Fixed and physical, reserved bits and all
        "5.6": 390,  # less 241 shorthands
        "5.7": 270,  # less 120 broadcasts
        "6.1": 255,  # less 15 with reserved bits
        "6.8": 270,  # whose stable series ended without that
        "6.12": 255,
        "6.18": 630,  # with 240 logical, 120 self, 15 NMI
    }
    assert {g.kernel: g.fast for g in vm.generations} == {kernel: as_of(taken, kernel) for kernel in fx.profiles()}
    assert all(g.fast + sum(g.refusals.values()) == g.total == vm.icr_writes == 1006 for g in vm.generations)
    assert vm.faults.total == 15
    assert vm.generations[-1].refusals["reserved ICR bits set"] == 15


def test_no_answer_is_used_where_it_does_not_hold(
    reports: dict[Path, Report], monkeypatch: pytest.MonkeyPatch, linux: list[str], replayed: Callable[..., Report]
) -> None:
    """Asking the model about every single write gives the same."""
    boot = replayed(linux[:4000])
    monkeypatch.setattr(Generations, "_key", lambda self, *write: (next(number),))
    number = itertools.count()
    for report, again in ((boot, replayed(linux[:4000])), (reports[SYNTHETIC], replay(SYNTHETIC))):
        assert [vm.generations for vm in again.vms] == [vm.generations for vm in report.vms]


def test_two_vms_in_one_file(reports: dict[Path, Report]) -> None:
    first, second = reports[SYNTHETIC].vms
    assert (first.icr_writes, second.icr_writes) == (1006, 468)
    assert first.start == "assumed: x2APIC mode on for vCPU 0, 1, 2, 3 before the first line"
    assert second.start == "reset"
    assert list(second.threads.values()) == ["python3-25238", "python3-25239", "python3-25241", "python3-25242"]


def test_svm_of_the_seed_takes_nothing(bare: list[str], replayed: Callable[..., Report]) -> None:
    report = replayed(bare[:2000], vendor="svm")
    seed = report.vms[0].generations[0]
    assert (seed.kernel, seed.fast) == ("seed-v3", 0)
    assert list(seed.refusals) == ["SVM exit code compared with VMX reason 32"]
    assert report.mismatches == []


# ---------------------------------------------------------------------------------------- what a difference looks like


def changed(lines: list[str], number: int, old: str, new: str) -> list[str]:
    """The lines with line ``number`` (from 1) changed."""
    assert old in lines[number - 1]
    return [*lines[: number - 1], lines[number - 1].replace(old, new), *lines[number:]]


def test_a_forged_ipi_line_is_listed(bare: list[str], replayed: Callable[..., Report]) -> None:
    report = replayed(changed(bare[:1000], 21, "dst 1 vec 64", "dst 2 vec 64"))
    rest = "vec 64 (Fixed|physical|de-assert|edge|dst)"
    assert report.mismatches == [Mismatch(21, "kvm_apic_ipi", 1, f"dst 2 {rest}", f"dst 1 {rest}")]
    assert report.ipi.total - report.ipi.exact == 1
    assert not report.exact
    assert "dst 2 vec 64" in printed(report)


def test_a_forged_accept_line_is_listed(bare: list[str], replayed: Callable[..., Report]) -> None:
    report = replayed(changed(bare[:1000], 32, "apicid 1", "apicid 3"))
    found = [m for m in report.mismatches if m.event == "kvm_apic_accept_irq"]
    assert found == [
        Mismatch(32, "kvm_apic_accept_irq", 1, "apicid 3 vec 64 (Fixed|edge)", "apicid 1 vec 64 (Fixed|edge)")
    ]


def test_a_missing_accept_line_is_listed(bare: list[str], replayed: Callable[..., Report]) -> None:
    report = replayed(bare[:32] + bare[33:1000])
    assert [m for m in report.mismatches if m.event == "kvm_apic_accept_irq"] == [
        Mismatch(31, "kvm_apic_accept_irq", 1, "", "apicid 2 vec 64 (Fixed|edge)")
    ]


def test_a_missing_fault_is_listed(bare: list[str], replayed: Callable[..., Report]) -> None:
    number = next(i for i, line in enumerate(bare, 1) if "(#GP)" in line)
    report = replayed(changed(bare[:1000], number, " (#GP)", ""))
    assert (number, "kvm_msr", 1, "no fault", "#GP") in report.mismatches


def test_state_matters(linux: list[str], replayed: Callable[..., Report]) -> None:
    """Without the lines that enable vCPU 0's APIC it takes no interrupt: the prediction is no echo of the trace."""
    number = next(i for i, line in enumerate(linux) if "msr_write 80f = 0x1ff" in line)
    report = replayed(linux[: number - 1] + linux[number + 1 : 3000])
    assert any(m.event == "kvm_eoi" for m in report.mismatches)


def test_the_logical_map_matters(replayed: Callable[..., Report]) -> None:
    """Without vCPU 2's LDR write, flat logical IPIs of the xAPIC trace miss it."""
    with lzma.open(XAPIC, "rt") as source:
        lines = source.readlines()[:30_000]
    assert replayed(lines).mismatches == []
    gone = [line for line in lines if "0xfee000d0 val 0x4000000" not in line and "APIC_LDR = 0x4000000" not in line]
    assert len(lines) - len(gone) == 2
    report = replayed(gone)
    missed = [m for m in report.mismatches if m.recorded.startswith("apicid 2 vec") and not m.predicted]
    assert len(missed) > 10


# ------------------------------------------------------------------------------------------------ other ways to record


@pytest.mark.parametrize("first", [20_000, 20_001, 20_002, 20_003, 20_011])
def test_a_trace_may_begin_anywhere(linux: list[str], first: int, replayed: Callable[..., Report]) -> None:
    report = replayed(linux[first : first + 8000])
    assert report.mismatches == []
    assert report.ipi.exact == report.ipi.total > 90
    (vm,) = report.vms
    assert vm.start.startswith("assumed: x2APIC mode on for vCPU 0, 1, 2, 3 before the first line")
    assert "already running with SVR 0x1ff" in vm.start


@pytest.mark.parametrize("cut", range(8000, 8040))
def test_a_trace_may_end_anywhere(linux: list[str], cut: int, replayed: Callable[..., Report]) -> None:
    assert replayed(linux[:cut]).mismatches == []


def events_of_model(kernel: str, vendor: str, apicv: bool, x2apic: bool) -> str:
    """ftrace text of a model of that generation that sends all kinds of IPIs."""
    rng = random.Random(f"{kernel} {vendor} {apicv}")
    m = fx.Machine(vcpus=4, kernel=kernel, vendor=vendor, apicv=apicv)
    if x2apic:
        m.boot_x2apic()
    m.trace.enable()
    if not x2apic:
        for i, v in enumerate(m.vcpus):
            v.mmio_write(0xF0, 0x1FF)
            v.mmio_write(0xD0, 1 << 24 + i)
    for _ in range(120):
        v = rng.choice(m.vcpus)
        low = rng.choice([0, 0, 0, 0x100, 0x400]) | rng.choice([0, 0, 0x800]) | rng.choice([0, 0, 0x4000, 0xC000])
        low |= rng.choice([0, 0, 0, 0x40000, 0x80000, 0xC0000]) | rng.randrange(16, 256)
        dest = rng.choice([0, 1, 2, 3, 6, 9, 0xFF])
        kind = rng.randrange(6)
        if kind == 0:
            while v.ack() is not None:
                v.wrmsr(0x80B, 0) if x2apic else v.mmio_write(0xB0, 0)
        elif not x2apic:
            v.mmio_write(0x310, dest << 24)
            v.mmio_write(0x300, low)
        elif kind == 1:
            v.wrmsr(0x83F, rng.randrange(16, 256))
        elif kind == 2:
            v.wrmsr(0x830, low | 0x2000)
        else:
            v.wrmsr(0x830, rng.choice([dest, dest, 0xFFFF_FFFF, 0x1_0001]) << 32 | low)
    return m.trace.text()


@pytest.mark.parametrize("kernel", fx.profiles())
@pytest.mark.parametrize("vendor", ["vmx", "svm"])
@pytest.mark.parametrize("x2apic", [True, False])
def test_the_trace_of_every_generation(kernel: str, vendor: str, x2apic: bool, replayed: Callable[..., Report]) -> None:
    """Each prints its lines in its own order: writes first or last, accept lines before or behind the IPI."""
    for apicv in (False, True):
        text = events_of_model(kernel, vendor, apicv, x2apic)
        report = replayed(text.splitlines(keepends=True), kernel=kernel, vendor=vendor, apicv=apicv)
        assert report.mismatches == []
        assert report.ipi.exact == report.ipi.total == text.count(" kvm_apic_ipi:") > 50
        assert report.accepted.exact == report.accepted.total == text.count(" kvm_apic_accept_irq:")
        assert not report.vms[0].other_accepts


@pytest.mark.parametrize(
    "without", ["kvm_msr:", "kvm_apic:", "kvm_mmio:", "kvm_eoi: apicid 9", "kvm_halt_poll_ns", "kvm_vcpu_wakeup"]
)
def test_some_events_may_be_off(bare: list[str], without: str, replayed: Callable[..., Report]) -> None:
    report = replayed([line for line in bare if without not in line])
    assert report.mismatches == []
    assert report.ipi.exact == report.ipi.total == 1459
    assert report.accepted.exact == report.accepted.total == 2379


def test_values_taken_back_from_ipi_lines_are_confessed(bare: list[str], replayed: Callable[..., Report]) -> None:
    kept = "kvm_apic_ipi", "kvm_apic_accept_irq", "kvm_eoi"
    report = replayed([line for line in bare if any(name in line for name in kept)])
    assert report.mismatches == []
    assert [vm.taken_back for vm in report.vms] == [991, 468]
    assert "agree by construction" in printed(report)


def test_interrupts_from_elsewhere_are_named(bare: list[str], replayed: Callable[..., Report]) -> None:
    stamp = "         python3-25233   [000] .....  1641.1"
    device = "     kworker/0:1-99      [000] .....  1641.2"
    accept = "kvm_apic_accept_irq: apicid {} vec {} ({}|edge)\n"
    lines = [
        *bare[:1000],
        f"{stamp}: kvm_msi_set_irq: dst 2 vec 50 (Fixed|physical|edge)\n",
        f"{stamp}: {accept.format(2, 50, 'Fixed')}",
        f"{stamp}: kvm_userspace_exit: reason restart (4)\n",
        f"{stamp}: {accept.format(0, 236, 'Fixed')}",
        f"{stamp}: kvm_userspace_exit: reason restart (4)\n",
        f"{stamp}: {accept.format(3, 51, 'Fixed')}",
        f"{stamp}: {accept.format(1, 0, 'NMI')}",
        f"{stamp}: kvm_hypercall: nr 0xa a0 0x6 a1 0x0 a2 0x0 a3 0xfd\n",
        f"{stamp}: {accept.format(1, 253, 'Fixed')}",
        f"{device}: {accept.format(1, 52, 'Fixed')}",
        f"{device}: {accept.format(1, 53, 'Fixed')}",
        f"{device}: kvm_ioapic_set_irq: pin 4 dst 1 vec 53 (Fixed|physical|edge)\n",
    ]
    report = replayed(lines)
    assert report.mismatches == []
    assert report.vms[0].other_accepts == {
        "MSI": 1,
        "timer": 1,
        "MSI or IOAPIC": 1,
        "NMI from outside": 1,
        "hypercall": 1,
        "device thread": 1,
        "IOAPIC": 1,
    }


def test_without_accept_lines_the_model_says_who_got_it(bare: list[str], replayed: Callable[..., Report]) -> None:
    report = replayed([line for line in bare if "kvm_apic_accept_irq" not in line])
    assert report.mismatches == []
    assert report.accepted.total == 0
    assert sum(vm.sent.total() for vm in report.vms) == 2379
    assert any("no kvm_apic_accept_irq line" in note for note in report.notes)


def test_the_host_may_change_the_mode(bare: list[str], replayed: Callable[..., Report]) -> None:
    """The second VM's lines as those of the first VM's threads: its APICs were put back into xAPIC mode."""
    pids = {25238: 25233, 25239: 25234, 25241: 25236, 25242: 25237}
    lines = [re.sub(r"python3-(\d+)", lambda m: f"python3-{pids.get(int(m[1]), int(m[1]))}", line) for line in bare]
    report = replayed(lines)
    (vm,) = report.vms
    assert sum("the host has put vCPU" in sentence for sentence in vm.assumptions) == 4
    assert report.ipi.exact == report.ipi.total == 1459


def test_lost_events_do_not_spoil_ipis(bare: list[str], replayed: Callable[..., Report]) -> None:
    report = replayed([*bare[:3000], "CPU:1 [LOST 234 EVENTS]\n", *bare[3234:]])
    assert report.ipi.exact == report.ipi.total == 1443
    assert "234 events" in report.problems[0]
    assert not report.exact


def test_long_files_are_read_twice_with_the_same_result(
    reports: dict[Path, Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_module, "KEPT_LINES", 1000)
    again = replay(SYNTHETIC).as_dict()
    first = reports[SYNTHETIC].as_dict()
    assert {**again, "seconds": 0} == {**first, "seconds": 0}


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["hello\n", "world\n"], "not ftrace text: 'hello'"),
        (["\n"], "no ftrace text in 1 lines"),
        (["   bash-1 [000] d..3. 17.993652: sched_switch: prev_comm=a\n"], "1 events, but none of kvm"),
        (["   qemu-1 [000] d..3. 17.993652: kvm_page_fault: vcpu 0 rip 0x1\n"], "no local APIC access"),
    ],
)
def test_nothing_to_replay(lines: list[str], said: str, replayed: Callable[..., Report]) -> None:
    with pytest.raises(TraceError) as error:
        replayed(lines)
    message = str(error.value)
    assert said in message
    assert "trace.txt" in message
    assert "\n" not in message


@pytest.mark.parametrize("size", [10, 100])
def test_a_file_cut_before_its_first_event(tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.xz"
    path.write_bytes(X2APIC.read_bytes()[:size])
    with pytest.raises(TraceError, match="cut short: no event could be read"):
        replay(path)


def test_a_cut_file_is_replayed_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "cut.xz"
    path.write_bytes(X2APIC.read_bytes()[:50_000])
    report = replay(path)
    assert report.mismatches == []
    assert report.ipi.exact == report.ipi.total == 232
    assert "cut short" in report.problems[0]
    assert "cut short" in printed(report)


def test_wrong_options_are_refused(bare: list[str], replayed: Callable[..., Report]) -> None:
    with pytest.raises(ValueError, match="kernel 4.4 is too old"):
        replayed(bare[:100], kernel="4.4")
    with pytest.raises(ValueError, match="unknown vendor"):
        replayed(bare[:100], vendor="arm")


# -------------------------------------------------------------------------------------------------------- what is shown


def test_progress_ends_at_the_total(bare: list[str], tmp_path: Path) -> None:
    path = tmp_path / "trace.txt"
    path.write_text("".join(bare))
    told: list[tuple[int, int]] = []
    replay(path, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_the_report_is_json(reports: dict[Path, Report]) -> None:
    for report in reports.values():
        data = json.loads(json.dumps(report.as_dict()))
        assert data["kvm_apic_ipi"]["total"] == report.ipi.total
        assert sum(c["writes"] for vm in data["vms"] for c in vm["classes"]) == sum(vm.icr_writes for vm in report.vms)


def test_the_report_prints(reports: dict[Path, Report]) -> None:
    text = printed(reports[X2APIC])
    for word in (
        "CALL_FUNCTION_SINGLE",
        "92.8 %",
        "253 destination shorthand",
        "recorded host's own EOI at injection",
        "caused by: timer",
        "no mismatch",
    ):
        assert word in text
    assert "VM 2" in printed(reports[SYNTHETIC])


def test_the_picture(reports: dict[Path, Report], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from fastexit.trace import heatmap

    counts = heatmap.matrix(reports[X2APIC].vms[0])
    assert counts.shape == (4, 4)
    assert (counts[0, 1], counts[3, 0], counts[2, 2], counts.sum()) == (1092, 378, 0, 4170)
    png, svg = heatmap.save(reports[SYNTHETIC], tmp_path / "ipis")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()
    before = svg.read_bytes()
    (again,) = heatmap.save(reports[SYNTHETIC], svg)
    assert again.read_bytes() == before


def test_no_picture_without_ipis(linux: list[str], replayed: Callable[..., Report]) -> None:
    pytest.importorskip("matplotlib")
    from fastexit.trace import heatmap

    with pytest.raises(ValueError, match="nothing to draw"):
        heatmap.draw(replayed(linux[:300]))
