/*
 * The calls as symbols, and the table of them. Generated from fastexit.h: python -m fastexit.embed.calls
 */
#include "fastexit_calls.h"
#include "shim.h"

CFFI_DLLEXPORT int32_t fx_wrmsr(fx_machine *m, uint32_t vcpu, uint32_t msr, uint64_t value, struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_wrmsr(m, vcpu, msr, value, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_rdmsr(fx_machine *m, uint32_t vcpu, uint32_t msr, struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_rdmsr(m, vcpu, msr, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_mmio_write(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length, uint32_t value,
                                     struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_mmio_write(m, vcpu, offset, length, value, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_mmio_read(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length,
                                    struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_mmio_read(m, vcpu, offset, length, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_exit(fx_machine *m, const struct fx_exit *exit, struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_exit(m, exit, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_run(fx_machine *m, const struct fx_exit *exits, struct fx_outcome *outcomes, uint64_t n,
                              uint64_t *done)
{
    int held = hold(m);
    int32_t status = op_run(m, exits, outcomes, n, done);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_inject(fx_machine *m, uint64_t address, uint32_t data, struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_inject(m, address, data, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_notify(fx_machine *m, uint32_t vcpu)
{
    int held = hold(m);
    int32_t status = op_notify(m, vcpu);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_attention(fx_machine *m, uint32_t first, uint32_t *vcpu, uint32_t *effects)
{
    int held = hold(m);
    int32_t status = op_attention(m, first, vcpu, effects);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_pending(fx_machine *m, uint32_t vcpu, uint32_t *vector)
{
    int held = hold(m);
    int32_t status = op_pending(m, vcpu, vector);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_ack(fx_machine *m, uint32_t vcpu, uint32_t *vector)
{
    int held = hold(m);
    int32_t status = op_ack(m, vcpu, vector);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_eoi(fx_machine *m, uint32_t vcpu, uint32_t *vector)
{
    int held = hold(m);
    int32_t status = op_eoi(m, vcpu, vector);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_get_cpu(fx_machine *m, uint32_t vcpu, struct fx_cpu *cpu)
{
    int held = hold(m);
    int32_t status = op_get_cpu(m, vcpu, cpu);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_set_cpu(fx_machine *m, uint32_t vcpu, const struct fx_cpu *cpu)
{
    int held = hold(m);
    int32_t status = op_set_cpu(m, vcpu, cpu);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_enter(fx_machine *m, uint32_t vcpu, struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_enter(m, vcpu, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_reenter(fx_machine *m, uint32_t vcpu, struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_reenter(m, vcpu, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_set_msr(fx_machine *m, uint32_t vcpu, uint32_t msr, uint64_t value)
{
    int held = hold(m);
    int32_t status = op_set_msr(m, vcpu, msr, value);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_get_msr(fx_machine *m, uint32_t vcpu, uint32_t msr, uint64_t *value)
{
    int held = hold(m);
    int32_t status = op_get_msr(m, vcpu, msr, value);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_get_lapic(fx_machine *m, uint32_t vcpu, void *page, uint64_t size)
{
    int held = hold(m);
    int32_t status = op_get_lapic(m, vcpu, page, size);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_set_lapic(fx_machine *m, uint32_t vcpu, const void *page, uint64_t size)
{
    int held = hold(m);
    int32_t status = op_set_lapic(m, vcpu, page, size);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_reset(fx_machine *m, uint32_t vcpu, uint32_t kind)
{
    int held = hold(m);
    int32_t status = op_reset(m, vcpu, kind);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_set_time(fx_machine *m, uint64_t ns, struct fx_result *results, uint64_t room,
                                   uint64_t *count)
{
    int held = hold(m);
    int32_t status = op_set_time(m, ns, results, room, count);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_next_timer(fx_machine *m, uint64_t *ns)
{
    int held = hold(m);
    int32_t status = op_next_timer(m, ns);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_snapshot(fx_machine *m, void *buffer, uint64_t size, uint64_t *needed)
{
    int held = hold(m);
    int32_t status = op_snapshot(m, buffer, size, needed);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_region(fx_machine *m, uint32_t which, struct fx_region *region)
{
    int held = hold(m);
    int32_t status = op_region(m, which, region);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_mem_write(fx_machine *m, uint32_t vcpu, uint64_t gpa, uint32_t length, uint64_t value,
                                    struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_mem_write(m, vcpu, gpa, length, value, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_mem_read(fx_machine *m, uint32_t vcpu, uint64_t gpa, uint32_t length,
                                   struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_mem_read(m, vcpu, gpa, length, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_io_write(fx_machine *m, uint32_t vcpu, uint32_t port, uint32_t length, uint32_t value,
                                   struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_io_write(m, vcpu, port, length, value, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_io_read(fx_machine *m, uint32_t vcpu, uint32_t port, uint32_t length,
                                  struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_io_read(m, vcpu, port, length, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_targets(fx_machine *m, uint32_t vcpu, struct fx_target *targets, uint64_t room,
                                  uint64_t *count)
{
    int held = hold(m);
    int32_t status = op_targets(m, vcpu, targets, room, count);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_set_guest_memory(fx_machine *m, void *memory, uint64_t bytes)
{
    int held = hold(m);
    int32_t status = op_set_guest_memory(m, memory, bytes);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_enable_synic(fx_machine *m, uint32_t vcpu, uint32_t version)
{
    int held = hold(m);
    int32_t status = op_enable_synic(m, vcpu, version);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_hv_hypercall(fx_machine *m, uint32_t vcpu, uint64_t control, uint64_t input,
                                       uint64_t output, const uint64_t *xmm, struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_hv_hypercall(m, vcpu, control, input, output, xmm, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_get_hv_exit(fx_machine *m, uint32_t vcpu, struct fx_hv_exit *exit)
{
    int held = hold(m);
    int32_t status = op_get_hv_exit(m, vcpu, exit);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_complete_hypercall(fx_machine *m, uint32_t vcpu, uint64_t value)
{
    int held = hold(m);
    int32_t status = op_complete_hypercall(m, vcpu, value);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_hv_sint_line(fx_machine *m, uint32_t vp_index, uint32_t sint, uint32_t level,
                                       struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_hv_sint_line(m, vp_index, sint, level, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_irq_line(fx_machine *m, uint32_t gsi, uint32_t level, struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_irq_line(m, gsi, level, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_set_gsi_routing(fx_machine *m, const struct fx_route *routes, uint32_t n)
{
    int held = hold(m);
    int32_t status = op_set_gsi_routing(m, routes, n);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_irqfd_signal(fx_machine *m, uint32_t gsi, uint32_t resample, struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_irqfd_signal(m, gsi, resample, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_irqfd_resample(fx_machine *m, uint32_t gsi, uint32_t on)
{
    int held = hold(m);
    int32_t status = op_irqfd_resample(m, gsi, on);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_irqfd_resampled(fx_machine *m, uint32_t gsi, uint64_t *count)
{
    int held = hold(m);
    int32_t status = op_irqfd_resampled(m, gsi, count);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_get_irqchip(fx_machine *m, uint32_t chip, void *state, uint64_t size)
{
    int held = hold(m);
    int32_t status = op_get_irqchip(m, chip, state, size);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_set_irqchip(fx_machine *m, uint32_t chip, const void *state, uint64_t size)
{
    int held = hold(m);
    int32_t status = op_set_irqchip(m, chip, state, size);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_create_pit(fx_machine *m, uint32_t speaker)
{
    int held = hold(m);
    int32_t status = op_create_pit(m, speaker);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_get_pit(fx_machine *m, void *state, uint64_t size)
{
    int held = hold(m);
    int32_t status = op_get_pit(m, state, size);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_set_pit(fx_machine *m, const void *state, uint64_t size)
{
    int held = hold(m);
    int32_t status = op_set_pit(m, state, size);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_get_ioapic_eoi(fx_machine *m, uint32_t vcpu, uint32_t *vector, uint32_t *level)
{
    int held = hold(m);
    int32_t status = op_get_ioapic_eoi(m, vcpu, vector, level);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_nmi(fx_machine *m, uint32_t vcpu)
{
    int held = hold(m);
    int32_t status = op_nmi(m, vcpu);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_smi(fx_machine *m, uint32_t vcpu)
{
    int held = hold(m);
    int32_t status = op_smi(m, vcpu);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_interrupt(fx_machine *m, uint32_t vcpu, uint32_t vector)
{
    int held = hold(m);
    int32_t status = op_interrupt(m, vcpu, vector);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_rsm(fx_machine *m, uint32_t vcpu)
{
    int held = hold(m);
    int32_t status = op_rsm(m, vcpu);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_hw_wrmsr(fx_machine *m, uint32_t vcpu, uint32_t msr, uint64_t value,
                                   struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_hw_wrmsr(m, vcpu, msr, value, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_hw_rdmsr(fx_machine *m, uint32_t vcpu, uint32_t msr, struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_hw_rdmsr(m, vcpu, msr, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_hw_mmio_write(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length,
                                        uint32_t value, struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_hw_mmio_write(m, vcpu, offset, length, value, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_hw_mmio_read(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length,
                                       struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_hw_mmio_read(m, vcpu, offset, length, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_hw_deliver(fx_machine *m, uint32_t vcpu, uint32_t *vector)
{
    int held = hold(m);
    int32_t status = op_hw_deliver(m, vcpu, vector);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_hw_cr8(fx_machine *m, uint32_t vcpu, uint64_t value, struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_hw_cr8(m, vcpu, value, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_settle(fx_machine *m, uint32_t vcpu, struct fx_result *result)
{
    int held = hold(m);
    int32_t status = op_settle(m, vcpu, result);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_take(fx_machine *m, uint32_t vcpu, struct fx_event *event)
{
    int held = hold(m);
    int32_t status = op_take(m, vcpu, event);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_advance(fx_machine *m, uint64_t ns)
{
    int held = hold(m);
    int32_t status = op_advance(m, ns);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_run_timers(fx_machine *m, uint32_t vcpu, struct fx_result *results, uint64_t room,
                                     uint64_t *count)
{
    int held = hold(m);
    int32_t status = op_run_timers(m, vcpu, results, room, count);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_next_timer_of(fx_machine *m, uint32_t vcpu, uint64_t *ns)
{
    int held = hold(m);
    int32_t status = op_next_timer_of(m, vcpu, ns);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_set_costs(fx_machine *m, const char *costs)
{
    int held = hold(m);
    int32_t status = op_set_costs(m, costs);

    if (held)
        let_go(m);
    return status;
}

CFFI_DLLEXPORT int32_t fx_set_trace(fx_machine *m, fx_tracer trace, void *context)
{
    return op_set_trace(m, trace, context);
}

CFFI_DLLEXPORT int32_t fx_trace_text(fx_machine *m, const struct fx_trace *record, char *line, uint64_t size)
{
    return op_trace_text(m, record, line, size);
}

CFFI_DLLEXPORT int32_t fx_run_results(fx_machine *m, const struct fx_exit *exits, struct fx_result *results,
                                      uint64_t n, uint64_t *done)
{
    int held = hold(m);
    int32_t status = op_run_results(m, exits, results, n, done);

    if (held)
        let_go(m);
    return status;
}

static const struct fx_ops calls = {
    .size = sizeof(struct fx_ops),
    .abi = FX_ABI_VERSION,
    .wrmsr = fx_wrmsr,
    .rdmsr = fx_rdmsr,
    .mmio_write = fx_mmio_write,
    .mmio_read = fx_mmio_read,
    .exit = fx_exit,
    .run = fx_run,
    .inject = fx_inject,
    .notify = fx_notify,
    .attention = fx_attention,
    .pending = fx_pending,
    .ack = fx_ack,
    .eoi = fx_eoi,
    .get_cpu = fx_get_cpu,
    .set_cpu = fx_set_cpu,
    .enter = fx_enter,
    .reenter = fx_reenter,
    .set_msr = fx_set_msr,
    .get_msr = fx_get_msr,
    .get_lapic = fx_get_lapic,
    .set_lapic = fx_set_lapic,
    .reset = fx_reset,
    .set_time = fx_set_time,
    .next_timer = fx_next_timer,
    .snapshot = fx_snapshot,
    .restore = fx_restore,
    .region = fx_region,
    .close = fx_close,
    .mem_write = fx_mem_write,
    .mem_read = fx_mem_read,
    .io_write = fx_io_write,
    .io_read = fx_io_read,
    .targets = fx_targets,
    .set_guest_memory = fx_set_guest_memory,
    .enable_synic = fx_enable_synic,
    .hv_hypercall = fx_hv_hypercall,
    .get_hv_exit = fx_get_hv_exit,
    .complete_hypercall = fx_complete_hypercall,
    .hv_sint_line = fx_hv_sint_line,
    .irq_line = fx_irq_line,
    .set_gsi_routing = fx_set_gsi_routing,
    .irqfd_signal = fx_irqfd_signal,
    .irqfd_resample = fx_irqfd_resample,
    .irqfd_resampled = fx_irqfd_resampled,
    .get_irqchip = fx_get_irqchip,
    .set_irqchip = fx_set_irqchip,
    .create_pit = fx_create_pit,
    .get_pit = fx_get_pit,
    .set_pit = fx_set_pit,
    .get_ioapic_eoi = fx_get_ioapic_eoi,
    .nmi = fx_nmi,
    .smi = fx_smi,
    .interrupt = fx_interrupt,
    .rsm = fx_rsm,
    .hw_wrmsr = fx_hw_wrmsr,
    .hw_rdmsr = fx_hw_rdmsr,
    .hw_mmio_write = fx_hw_mmio_write,
    .hw_mmio_read = fx_hw_mmio_read,
    .hw_deliver = fx_hw_deliver,
    .hw_cr8 = fx_hw_cr8,
    .settle = fx_settle,
    .take = fx_take,
    .advance = fx_advance,
    .run_timers = fx_run_timers,
    .next_timer_of = fx_next_timer_of,
    .set_costs = fx_set_costs,
    .set_trace = fx_set_trace,
    .trace_text = fx_trace_text,
    .run_results = fx_run_results,
};
