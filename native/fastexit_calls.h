/*
 * Each call of struct fx_ops as a symbol of its own, for bindings and for hosts that need no table. fastexit.h says
 * what they do. Generated from it: python -m fastexit.embed.calls
 */
#ifndef FASTEXIT_CALLS_H
#define FASTEXIT_CALLS_H

#include "fastexit.h"

#ifdef __cplusplus
extern "C" {
#endif
#ifdef __GNUC__ /* C++: a function may be called as a struct, which then is always struct fx_exit */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wshadow"
#endif

/* cffi:begin */
int32_t fx_wrmsr(fx_machine *m, uint32_t vcpu, uint32_t msr, uint64_t value, struct fx_result *result);
int32_t fx_rdmsr(fx_machine *m, uint32_t vcpu, uint32_t msr, struct fx_result *result);
int32_t fx_mmio_write(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length, uint32_t value,
                      struct fx_result *result);
int32_t fx_mmio_read(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length, struct fx_result *result);
int32_t fx_exit(fx_machine *m, const struct fx_exit *exit, struct fx_result *result);
int32_t fx_run(fx_machine *m, const struct fx_exit *exits, struct fx_outcome *outcomes, uint64_t n, uint64_t *done);
int32_t fx_inject(fx_machine *m, uint64_t address, uint32_t data, struct fx_result *result);
int32_t fx_notify(fx_machine *m, uint32_t vcpu);
int32_t fx_attention(fx_machine *m, uint32_t first, uint32_t *vcpu, uint32_t *effects);
int32_t fx_pending(fx_machine *m, uint32_t vcpu, uint32_t *vector);
int32_t fx_ack(fx_machine *m, uint32_t vcpu, uint32_t *vector);
int32_t fx_eoi(fx_machine *m, uint32_t vcpu, uint32_t *vector);
int32_t fx_get_cpu(fx_machine *m, uint32_t vcpu, struct fx_cpu *cpu);
int32_t fx_set_cpu(fx_machine *m, uint32_t vcpu, const struct fx_cpu *cpu);
int32_t fx_enter(fx_machine *m, uint32_t vcpu, struct fx_result *result);
int32_t fx_reenter(fx_machine *m, uint32_t vcpu, struct fx_result *result);
int32_t fx_set_msr(fx_machine *m, uint32_t vcpu, uint32_t msr, uint64_t value);
int32_t fx_get_msr(fx_machine *m, uint32_t vcpu, uint32_t msr, uint64_t *value);
int32_t fx_get_lapic(fx_machine *m, uint32_t vcpu, void *page, uint64_t size);
int32_t fx_set_lapic(fx_machine *m, uint32_t vcpu, const void *page, uint64_t size);
int32_t fx_reset(fx_machine *m, uint32_t vcpu, uint32_t kind);
int32_t fx_set_time(fx_machine *m, uint64_t ns, struct fx_result *results, uint64_t room, uint64_t *count);
int32_t fx_next_timer(fx_machine *m, uint64_t *ns);
int32_t fx_snapshot(fx_machine *m, void *buffer, uint64_t size, uint64_t *needed);
int32_t fx_region(fx_machine *m, uint32_t which, struct fx_region *region);
int32_t fx_mem_write(fx_machine *m, uint32_t vcpu, uint64_t gpa, uint32_t length, uint64_t value,
                     struct fx_result *result);
int32_t fx_mem_read(fx_machine *m, uint32_t vcpu, uint64_t gpa, uint32_t length, struct fx_result *result);
int32_t fx_io_write(fx_machine *m, uint32_t vcpu, uint32_t port, uint32_t length, uint32_t value,
                    struct fx_result *result);
int32_t fx_io_read(fx_machine *m, uint32_t vcpu, uint32_t port, uint32_t length, struct fx_result *result);
int32_t fx_targets(fx_machine *m, uint32_t vcpu, struct fx_target *targets, uint64_t room, uint64_t *count);
int32_t fx_set_guest_memory(fx_machine *m, void *memory, uint64_t bytes);
int32_t fx_enable_synic(fx_machine *m, uint32_t vcpu, uint32_t version);
int32_t fx_hv_hypercall(fx_machine *m, uint32_t vcpu, uint64_t control, uint64_t input, uint64_t output,
                        const uint64_t *xmm, struct fx_result *result);
int32_t fx_get_hv_exit(fx_machine *m, uint32_t vcpu, struct fx_hv_exit *exit);
int32_t fx_complete_hypercall(fx_machine *m, uint32_t vcpu, uint64_t value);
int32_t fx_hv_sint_line(fx_machine *m, uint32_t vp_index, uint32_t sint, uint32_t level, struct fx_result *result);
int32_t fx_irq_line(fx_machine *m, uint32_t gsi, uint32_t level, struct fx_result *result);
int32_t fx_set_gsi_routing(fx_machine *m, const struct fx_route *routes, uint32_t n);
int32_t fx_irqfd_signal(fx_machine *m, uint32_t gsi, uint32_t resample, struct fx_result *result);
int32_t fx_irqfd_resample(fx_machine *m, uint32_t gsi, uint32_t on);
int32_t fx_irqfd_resampled(fx_machine *m, uint32_t gsi, uint64_t *count);
int32_t fx_get_irqchip(fx_machine *m, uint32_t chip, void *state, uint64_t size);
int32_t fx_set_irqchip(fx_machine *m, uint32_t chip, const void *state, uint64_t size);
int32_t fx_create_pit(fx_machine *m, uint32_t speaker);
int32_t fx_get_pit(fx_machine *m, void *state, uint64_t size);
int32_t fx_set_pit(fx_machine *m, const void *state, uint64_t size);
int32_t fx_get_ioapic_eoi(fx_machine *m, uint32_t vcpu, uint32_t *vector, uint32_t *level);
int32_t fx_nmi(fx_machine *m, uint32_t vcpu);
int32_t fx_smi(fx_machine *m, uint32_t vcpu);
int32_t fx_interrupt(fx_machine *m, uint32_t vcpu, uint32_t vector);
int32_t fx_rsm(fx_machine *m, uint32_t vcpu);
int32_t fx_hw_wrmsr(fx_machine *m, uint32_t vcpu, uint32_t msr, uint64_t value, struct fx_result *result);
int32_t fx_hw_rdmsr(fx_machine *m, uint32_t vcpu, uint32_t msr, struct fx_result *result);
int32_t fx_hw_mmio_write(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length, uint32_t value,
                         struct fx_result *result);
int32_t fx_hw_mmio_read(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length, struct fx_result *result);
int32_t fx_hw_deliver(fx_machine *m, uint32_t vcpu, uint32_t *vector);
int32_t fx_hw_cr8(fx_machine *m, uint32_t vcpu, uint64_t value, struct fx_result *result);
int32_t fx_settle(fx_machine *m, uint32_t vcpu, struct fx_result *result);
int32_t fx_take(fx_machine *m, uint32_t vcpu, struct fx_event *event);
int32_t fx_advance(fx_machine *m, uint64_t ns);
int32_t fx_run_timers(fx_machine *m, uint32_t vcpu, struct fx_result *results, uint64_t room, uint64_t *count);
int32_t fx_next_timer_of(fx_machine *m, uint32_t vcpu, uint64_t *ns);
int32_t fx_set_costs(fx_machine *m, const char *costs);
int32_t fx_set_trace(fx_machine *m, fx_tracer trace, void *context);
int32_t fx_trace_text(fx_machine *m, const struct fx_trace *record, char *line, uint64_t size);
int32_t fx_run_results(fx_machine *m, const struct fx_exit *exits, struct fx_result *results, uint64_t n,
                       uint64_t *done);
/* cffi:end */

#ifdef __GNUC__
#pragma GCC diagnostic pop
#endif
#ifdef __cplusplus
}
#endif

#endif
