"""Replay: all mismatches are counted, the first by line are kept, and doubt about whose they are is said."""

from __future__ import annotations

import gzip
import io
import itertools
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from fastexit.trace import guest as guest_module
from fastexit.trace.render import render
from fastexit.trace.replay import replay
from fastexit.trace.report import Mismatch, Mismatches, Report

SYNTHETIC = Path(__file__).parents[1] / "examples" / "traces" / "synthetic-guest-4vcpu.txt.gz"


@pytest.fixture(scope="module")
def bare() -> list[str]:
    with gzip.open(SYNTHETIC, "rt") as source:
        return source.readlines()


@pytest.fixture(scope="module")
def forged(bare: list[str]) -> list[str]:
    """Every IPI line of the first VM's beginning names a vector that was not sent."""
    return [re.sub(r"vec \d+", "vec 99", line) if "kvm_apic_ipi" in line else line for line in bare[:4000]]


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


def rows(text: str) -> int:
    """Mismatches in what was printed."""
    return len(re.findall(r"^ +[\d,]+ +\d+ +kvm_\w+ ", text, re.MULTILINE))


def test_the_first_by_line_are_kept() -> None:
    """Whatever the order in which they come, and never more than twice as many."""
    rng = random.Random(1)
    for wanted in (None, 0, 1, 7, 100, 1000):
        found = Mismatches(wanted)
        lines = [max(0, i + rng.randrange(-20, 20)) for i in range(500)]
        for i, line in enumerate(lines):
            found.add(Mismatch(line, str(i), 1, "", ""))
            assert wanted is None or len(found._found) <= 2 * wanted + 1
        expected = sorted(enumerate(lines), key=lambda pair: pair[1])[:wanted]
        assert [(int(m.event), m.line) for m in found.first()] == expected
        assert found.count == 500


@pytest.mark.parametrize("wanted", [0, 1, 20, 10_000, None])
def test_as_many_as_asked_for(forged: list[str], replayed: Callable[..., Report], wanted: int | None) -> None:
    everything = replayed(forged)
    assert everything.mismatched == len(everything.mismatches) > 60
    report = replayed(forged, mismatches=wanted)
    assert report.mismatches == everything.mismatches[:wanted]
    assert report.mismatched == everything.mismatched
    assert not report.exact
    data = report.as_dict()
    assert data["mismatched"] == everything.mismatched
    assert len(data["mismatches"]) == len(report.mismatches)


def test_what_is_left_out_is_said(forged: list[str], replayed: Callable[..., Report]) -> None:
    n = replayed(forged).mismatched
    some = printed(replayed(forged, mismatches=20))
    assert f"{n:,} mismatches, the first 20 of them" in some
    assert f"left out: {n - 20:,} (--mismatches N or all)" in some
    assert rows(some) == 20
    none = printed(replayed(forged, mismatches=0))
    assert f"{n:,} mismatches, none shown (--mismatches N or all)" in none
    assert rows(none) == 0
    everything = printed(replayed(forged))
    assert f"{n:,} mismatches " in everything
    assert rows(everything) == n
    assert "left out" not in everything


def test_a_negative_number_is_refused(bare: list[str], replayed: Callable[..., Report]) -> None:
    with pytest.raises(ValueError, match="number of mismatches -0x1 is out of range"):
        replayed(bare[:100], mismatches=-1)


def test_interrupts_of_no_vm_put_mismatches_in_doubt(bare: list[str], replayed: Callable[..., Report]) -> None:
    """Left out alone, or lines that differ alone, say nothing about which thread belongs where; both together do."""
    stamp = f"     kworker/0:1-99      [000] ..... {bare[-1].split(': ')[0].split()[-1]}"
    stray = [f"{stamp}: kvm_apic_accept_irq: apicid 1 vec 52 (Fixed|edge)\n"] * 3
    wrong = bare[20].replace("dst 1 vec 64", "dst 2 vec 64")
    assert wrong != bare[20]
    forged = [*bare[:20], wrong, *bare[21:]]
    for lines, left_out, mismatched in ((bare + stray, 3, 0), (forged, 0, 1), (forged + stray, 3, 1)):
        report = replayed(lines)
        assert (report.left_out, report.mismatched) == (left_out, mismatched)
        assert report.doubtful == bool(left_out and mismatched) == report.as_dict()["doubtful"]
        doubt = "doubtful: which thread belongs to which VM: 3 interrupts of no VM in particular were left out"
        assert (doubt in printed(report)) == report.doubtful


def test_assumptions_end_somewhere(
    bare: list[str], monkeypatch: pytest.MonkeyPatch, replayed: Callable[..., Report]
) -> None:
    """A vCPU that changes its mode at every line: the first changes are said one by one, the rest is counted."""
    thread = "         python3-25233   [000] .....  1641.1: "
    flip = [
        f"{thread}kvm_msr: msr_write 80f = 0x1ff\n",
        f"{thread}kvm_mmio: mmio write len 4 gpa 0xfee00080 val 0x0\n{thread}kvm_apic: apic_write APIC_TASKPRI = 0x0\n",
    ]
    lines = [*bare[:1000], *itertools.chain(*[flip] * 40)]
    everything = replayed(lines).vms[0].assumptions
    monkeypatch.setattr(guest_module, "MOST_ASSUMPTIONS", 10)
    some = replayed(lines).vms[0].assumptions
    assert some[:10] == everything[:10]
    assert some[10:] == ["69 more things like these, left out here"]
