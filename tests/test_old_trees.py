"""The generations that no package has: where seed, 5.6, 5.7, 5.8 and 5.10 differ, what was read, and who asks for it.

Read are arch/x86/kvm of 5.4.286 (with the patch's text), 5.6.4, 5.7.6, 5.8.18 and 5.10.262. A cell that changes there
without an entry here is a rule that nobody can look up.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from fastexit.profile import PROFILES
from fastexit.traits import Trait

OLD = ("seed-v3", "5.6", "5.7", "5.8", "5.10")
TESTS = Path(__file__).parent

READ: dict[str, tuple[str, str]] = {
    "HOOK_IRQOFF": (
        "vmx_handle_exit_irqoff, svm_handle_exit_irqoff of 5.6.4 and 5.7.6; vmx_vcpu_run, svm_vcpu_run of 5.8.18",
        "test_profiles.py::test_where_the_ipi_leaves",
    ),
    "SKIP_LATE": (
        "vmx_handle_exit of 5.6.4, 5.7.6 (EXIT_FASTPATH_SKIP_EMUL_INS); handle_fastpath_set_msr_irqoff of 5.8.18",
        "test_seed_v3.py::test_defect_7_early_returns_come_after_the_ipi",
    ),
    "GUARD_L2": ("the patch; vmx_handle_exit_irqoff of 5.6.4", "test_profiles.py::test_l2_is_left_alone"),
    "SVM_EXIT_32": ("the patch's svm_handle_exit_irqoff", "test_seed_v3.py::test_defect_1_svm_acts_on_dr0_read"),
    "SVM_NEXT_RIP": (
        "svm_exit_handlers_fastpath of 5.8.18 and 5.10.262",
        "test_profiles.py::test_svm_without_next_rip",
    ),
    "ICR_NO_SHORTHAND": (
        "the patch; handle_fastpath_set_x2apic_icr_irqoff of 5.6.4",
        "test_seed_v3.py::test_defect_4_any_shorthand_with_irqs_off",
    ),
    "ICR_NO_BROADCAST": (
        "handle_fastpath_set_x2apic_icr_irqoff of 5.6.4 and 5.7.6",
        "test_profiles.py::test_who_takes_a_write",
    ),
    "TSCDL_HV_TIMER": ("handle_fastpath_set_tscdeadline of 5.8.18", "test_profiles.py::test_tsc_deadline"),
    "PREEMPTION_TIMER_FAST": (
        "handle_fastpath_preemption_timer of 5.8.18; handle_preemption_timer of 5.7.6",
        "test_exit_table.py::test_generations_with_a_fast_handler",
    ),
    "SELF_IPI_WRITES_ICR": (
        "kvm_lapic_reg_write of 5.4.286, 5.6.4, 5.7.6, 5.8.18 and 5.10.262",
        "test_traps_accept.py::test_trap_11_self_ipi_and_the_icr",
    ),
    "LOWEST_REWRITE_FIRST": (
        "kvm_irq_delivery_to_apic of 5.4.286 and 5.6.4",
        "test_traps_destination.py::test_trap_24_the_map_comes_first_since_5_6",
    ),
    "TIMER_NO_CATCH_UP": (
        "advance_periodic_target_expiration of 5.8.18 and 5.10.262",
        "test_timer_generations.py::test_release_that_skips_periods",
    ),
    "INHIBITS": (
        "kvm_request_apicv_update of 5.6.4; 5.4.286 has none",
        "test_inhibits.py::test_only_the_first_and_the_last_reason_matter",
    ),
    "TRACE_WRITE_FIRST": (
        "handle_fastpath_set_x2apic_icr_irqoff of 5.6.4 (kvm_lapic_reg_write traces first) and 5.7.6",
        "test_trace_order.py::test_fast_order",
    ),
    "TRACE_EXIT_LATE_VMX": ("vmx_handle_exit of 5.7.6, vmx_vcpu_run of 5.8.18", "test_trace_order.py::test_fast_order"),
    "TDCR_MASKED": ("kvm_lapic_reg_write of 5.8.18 and 5.10.262", "test_register_rules.py::test_tdcr"),
    "CR8_KEEPS_TPR_BIT_2": (
        "kvm_lapic_set_tpr of 5.4.286, 5.6.4, 5.7.6, 5.8.18 and 5.10.262",
        "test_register_rules.py::test_bit_2_of_tpr_over_a_cr8_write",
    ),
    "LVTPC_MASKED": (
        "kvm_apic_local_deliver of 5.4.286, 5.6.4, 5.7.6, 5.8.18 and 5.10.262",
        "test_register_rules.py::test_lvtpc_masks_itself",
    ),
    "MAP_DIRTY_BY_SVR": (
        "kvm_apic_set_state of 5.6.4, 5.7.6 and 5.8.18",
        "test_map_by_votes.py::test_a_page_with_a_new_id",
    ),
    "SMI_FOLDED": (
        "kvm_vcpu_ioctl_x86_get_vcpu_events of 5.8.18 and 5.10.262",
        "test_event_rules.py::test_an_smi_that_is_only_requested",
    ),
    "LATCHED_INIT_WITH_SMM": (
        "kvm_vcpu_ioctl_x86_set_vcpu_events of 5.4.286 and 5.6.4",
        "test_event_rules.py::test_init_latched_in_smm",
    ),
    "TMCCT_RESTORED": (
        "kvm_apic_get_state, kvm_apic_set_state of 5.7.6 and 5.8.18",
        "test_timer_generations.py::test_count_of_a_saved_timer",
    ),
    "TICK_POSTED_AT_ONCE": (
        "apic_timer_expired of 5.7.6 and 5.8.18",
        "test_timer_generations.py::test_deadline_in_the_past",
    ),
    "HV_TIMER_CANCELLED_FIRST": (
        "kvm_lapic_expired_hv_timer of 5.8.18 and 5.10.262",
        "test_timer_generations.py::test_who_waits_for_the_preemption_timer",
    ),
    "POSTS_TIMER_ANYWAY": (
        "kvm_can_post_timer_interrupt of 5.8.18 and 5.10.262",
        "test_timer_generations.py::test_posted_timers_of_a_guest_that_exits",
    ),
    "DEADLINE_READ_DISABLED": (
        "kvm_get_lapic_tscdeadline_msr of 5.8.18 and 5.10.262",
        "test_timer_generations.py::test_deadline_of_a_disabled_apic",
    ),
    "DEADLINE_WRITTEN_DISABLED": (
        "kvm_set_lapic_tscdeadline_msr of 5.4.286, 5.6.4, 5.7.6 and 5.8.18",
        "test_timer_generations.py::test_deadline_of_a_disabled_apic",
    ),
    "DEADLINE_WRITTEN_IN_MODE_3": (
        "kvm_set_lapic_tscdeadline_msr of 5.8.18 and 5.10.262",
        "test_timer_generations.py::test_deadline_in_mode_3",
    ),
    "MODE_KEEPS_HV_TIMER": (
        "apic_update_lvtt of 5.4.286 and 5.6.4",
        "test_timer_generations.py::test_change_of_mode_and_the_preemption_timer",
    ),
    "PI_NOTIFIES_SELF": (
        "vmx_deliver_posted_interrupt of 5.8.18 and 5.10.262",
        "test_timer_generations.py::test_tick_of_a_fast_exit_and_who_is_notified",
    ),
    "V_TPR_KEPT_BY_AVIC": (
        "sync_lapic_to_cr8 of 5.8.18 and 5.10.262",
        "test_cr8.py::test_avic_and_what_kvm_writes",
    ),
    "INHIBIT_X2APIC": (
        "svm_cpuid_update of 5.7.6; that of 5.6.4 takes x2APIC from the guest instead",
        "test_avic.py::test_guest_with_x2apic_has_no_avic",
    ),
    "FILTER_RANGES_COUNTED": (
        "kvm_msr_allowed of 5.10.262",
        "test_timer_generations.py::test_ranges_of_the_filter_in_stat_exits",
    ),
    "LAZY_EOI_WHOLE": (
        "ioapic_lazy_update_eoi of 5.6.4, 5.7.6 and 5.8.18; 5.4.286 has none",
        "test_ioapic.py::test_lazy_eoi",
    ),
    "LAZY_EOI_LEVEL": ("ioapic_set_irq of 5.6.4 and 5.7.6", "test_ioapic.py::test_lazy_eoi"),
    "TSC_SYNCED_BY_GUEST": (
        "kvm_set_msr_common of 5.4.286, 5.6.4, 5.7.6, 5.8.18 and 5.10.262",
        "test_tsc.py::test_guests_that_synchronise",
    ),
    "READ_ACROSS_TRACED": (
        "kvm_lapic_reg_read of 5.4.286, 5.6.4, 5.7.6, 5.8.18 and 5.10.262",
        "test_register_rules.py::test_a_read_across_a_registers_end",
    ),
}
"""Trait -> functions and trees that were read, and the test that asks for the behaviour."""


def test_every_rule_that_differs_has_a_source() -> None:
    """What is the same in all five needs none here."""
    rows = [PROFILES[name].traits for name in OLD]
    differing = {trait.name for trait in Trait if len({bool(row & trait) for row in rows}) > 1}
    assert differing == set(READ)


@pytest.mark.parametrize("trait", READ)
def test_the_source_is_a_tree_and_the_test_exists(trait: str) -> None:
    source, asked = READ[trait]
    file, name = asked.split("::")
    made = ast.parse((TESTS / file).read_text()).body
    assert name in {one.name for one in made if isinstance(one, ast.FunctionDef)}
    assert "patch" in source or any(tree in source for tree in ("5.4.286", "5.6.4", "5.7.6", "5.8.18", "5.10.262"))
