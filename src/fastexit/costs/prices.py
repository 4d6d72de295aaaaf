"""A cost profile as the compiled loop has it: prices of what it charges in one piece, calls through pointers included.

The words are layout.PRICES; kernels/meter.py adds them up. The Python loop charges stage by stage instead, which shows
what an exit's time is made of.
"""

from __future__ import annotations

from typing import NamedTuple

from fastexit import layout as L
from fastexit.costs.meter import pointer_calls
from fastexit.costs.profile import CostProfile


class Price(NamedTuple):
    """Stages that are charged together, stages that are reached without a call, and what only makes calls."""

    stages: tuple[str, ...] = ()
    direct: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()


_ALONE = (
    *("fast_check", "srcu_lock", "srcu_unlock", "host_irq", "exit_checks", "skip", "dispatch_direct"),
    *("dispatch_indirect", "loop_tail", "requests", "event_check", "inject", "block", "user_exit", "msr_access"),
    *("lapic_access", "device", "ioapic_eoi", "icr", "accept", "timer", "preemption_timer", "hrtimer", "emulator"),
    *("halt", "hypercall", "hv_hypercall", "hv_target", "guest_memory", "notify", "kick", "wake", "doorbell"),
    *("hw_access", "hw_ipi", "other_exit"),
)
PRICES: dict[int, Price] = {getattr(L, f"P_{stage.upper()}"): Price((stage,)) for stage in _ALONE} | {
    L.P_EXIT: Price(("vm_exit", "mitigation_exit", "exit_info")),
    L.P_REENTER: Price(direct=("reenter", "mitigation_entry", "vm_entry")),
    L.P_LEAVE: Price(("guest_mode_outside", "irqoff_handler")),
    L.P_BACK: Price(("irq_window", "guest_time_stop", "srcu_lock", "vapic_sync")),
    L.P_SWITCH: Price(("prepare_switch", "irqs_off", "enter_mode", "srcu_unlock")),
    L.P_ENTRY: Price(("guest_state", "mitigation_entry", "vm_entry")),
    L.P_SYNC_PIR: Price(calls=("sync_pir",)),
    L.P_CR8_INTERCEPT: Price(calls=("cr8_intercept",)),
}
"""What each price is made of."""


def price_words(profile: CostProfile, kernel: str) -> dict[int, int]:
    """Give the words of a machine that has these costs: word -> value."""
    calls = pointer_calls(kernel)
    words = {L.PRICES + L.PRICE_GHZ: round(profile.ghz * (1 << 32))}
    for index, price in PRICES.items():
        made = sum(calls.get(what, 0) for what in (*price.stages, *price.calls))
        stages = sum(profile[stage] for stage in (*price.stages, *price.direct))
        words[L.PRICES + index] = stages + made * profile["vendor_call"]
    return words
