"""The methods of the dispatcher that a whole exit runs through, in their order; every one can be replaced."""

from __future__ import annotations

STEPS = (
    "vendor_run",
    "after_run",
    "leave_and_handle",
    "guest_mode_outside",
    "handle_exit_irqoff",
    "irq_window",
    "guest_time_stop",
    "srcu_lock",
    "sync_from_vapic",
    "handle_exit",
    "generic",
    "loop_tail",
    "vcpu_run",
    "vcpu_enter_guest",
    "service_requests",
    "inject_events",
    "preempt_disable",
    "irqs_off",
    "enter",
    "guest_time_start",
    "vm_entry",
    "exit_at_once",
)
