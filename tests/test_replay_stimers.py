"""Synthetic timers in traces: what of their lines follows from what, and which lines nothing leads to."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fastexit.trace.report import Report
from framed import exit_line, recorded

__all__ = ["recorded"]
Recorded = Callable[..., Report]
MSRS = {"set_config": 0x4000_00B0, "set_count": 0x4000_00B1}


def write(what: str, value: int, timer: int = 0) -> list[tuple[int, str]]:
    """A guest's write of CONFIG or COUNT, with all that it prints."""
    shown = f"config 0x{value:x}" if what == "set_config" else f"count {value}"
    return [
        exit_line("MSR_WRITE"),
        stimer(what, shown + " host 0", timer),
        stimer("cleanup", "", timer),
        (0, f"kvm_msr: msr_write {MSRS[what] + 2 * timer:x} = 0x{value:x}"),
    ]


def stimer(what: str, rest: str = "", timer: int = 0, thread: int = 0) -> tuple[int, str]:
    return thread, f"kvm_hv_stimer_{what}: vcpu_id 0 timer {timer} {rest}".rstrip()


ACCESS = [exit_line("MSR_WRITE"), (0, "kvm_apic: apic_write APIC_EOI = 0x0")]
ACCESS += [(0, "kvm_eoi: apicid 0 vector -1"), (0, "kvm_msr: msr_write 40000070 = 0x0")]
"""Without any access to an APIC there would be nothing to replay."""
ENTRY = (0, "kvm_entry: vcpu 0, rip 0x1")
SCONTROL = [exit_line("MSR_WRITE"), (0, "kvm_hv_synic_set_msr: vcpu_id 0 msr 0x40000080 data 0x1 host 0")]
SCONTROL += [(0, "kvm_msr: msr_write 40000080 = 0x1")]
PERIODIC = [*SCONTROL, *write("set_config", 0x3_0002), *write("set_count", 100), *write("set_config", 0x3_0003)]
ONE_SHOT = [*SCONTROL, *write("set_config", 0x3_0008), *write("set_count", 5000)]
SENT = stimer("expiration", "direct 0 send result 0")


def first(report: Report) -> tuple[str, str, str]:
    found = min(report.mismatches)
    return found.event.removeprefix("kvm_hv_stimer_"), found.recorded, found.predicted


def test_a_periodic_timer(recorded: Recorded) -> None:
    """It keeps its phase, and ticks that were missed are skipped."""
    report = recorded(
        *ACCESS,
        *PERIODIC,
        stimer("start_periodic", "time_now 1000 exp_time 1100"),
        ENTRY,
        stimer("callback", thread=-1),
        SENT,
        stimer("start_periodic", "time_now 1130 exp_time 1200"),
        stimer("callback", thread=1),
        SENT,
        stimer("start_periodic", "time_now 1450 exp_time 1500"),
        ENTRY,
    )
    assert report.exact, report.mismatches
    timers = report.vms[0].hv_timers
    assert (timers.exact, timers.total) == (10, 10)


def test_a_one_shot(recorded: Recorded) -> None:
    """It is over once its message is sent; a message that finds its slot taken leaves it enabled."""
    report = recorded(
        *ACCESS,
        *ONE_SHOT,
        stimer("start_one_shot", "time_now 1000 count 5000"),
        ENTRY,
        stimer("callback"),
        stimer("expiration", "direct 0 send result -11"),
        ENTRY,
        SENT,
        stimer("cleanup"),
        ENTRY,
    )
    assert report.exact, report.mismatches


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (
            [*PERIODIC, stimer("start_periodic", "time_now 1000 exp_time 1101")],
            ("start_periodic", "vcpu_id 0 timer 0 time_now 1000 exp_time 1101", "time_now 1000 exp_time 1100"),
        ),
        ([*PERIODIC, stimer("start_one_shot", "time_now 10 count 100")], ("start_one_shot", "count 100", "")),
        (
            [*ONE_SHOT, stimer("start_one_shot", "time_now 10 count 50")],
            ("start_one_shot", "count 50", "time_now 10 count 5000"),
        ),
        ([*ONE_SHOT, stimer("start_one_shot", "time_now 5000 count 5000")], ("start_one_shot", "count 5000", "")),
        ([*ONE_SHOT, stimer("callback")], ("callback", "vcpu_id 0 timer 0", "")),
        ([*ONE_SHOT, SENT, SENT], ("expiration", "send result 0", "")),
        (
            [*ONE_SHOT, stimer("expiration", "direct 1 send result 0")],
            ("expiration", "direct 1 send result 0", "vcpu_id 0 timer 0 direct 0 send result 0"),
        ),
        (
            [*ONE_SHOT, stimer("expiration", "direct 0 send result 1")],
            ("expiration", "send result 1", "direct 0 send result 0"),
        ),
        ([*ONE_SHOT, stimer("cleanup")], ("cleanup", "vcpu_id 0 timer 0", "")),
    ],
)
def test_what_does_not_follow_is_listed(
    recorded: Recorded, lines: list[tuple[int, str]], found: tuple[str, str, str]
) -> None:
    event, said, predicted = first(recorded(*ACCESS, *lines, ENTRY))
    assert event == found[0]
    assert said.endswith(found[1])
    assert predicted.endswith(found[2])
    assert bool(predicted) is bool(found[2])


def test_a_timer_of_before_is_learned(recorded: Recorded) -> None:
    """What it was set to before the first line nobody knows: nothing is predicted until it is written."""
    report = recorded(
        *ACCESS,
        ENTRY,
        stimer("callback"),
        stimer("start_periodic", "time_now 77 exp_time 99"),
        stimer("callback"),
        ENTRY,
    )
    assert report.exact, report.mismatches
    assert report.vms[0].hv_timers.total == 1, "the second callback, for its start was seen"
