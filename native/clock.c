/*
 * The host's clock, and the timers that go by it.
 */
#include "shim.h"

/* config.latest_clock: (2^63 - 1) * 10^6 / khz, at most 2^63 - 1. */
static uint64_t latest_clock(uint64_t khz)
{
    uint64_t most = INT64_MAX, million = 1000000;

    return khz <= million ? most : most / khz * million + most % khz * million / khz;
}

/* An hrtimer of a vCPU has fired: what it did is for its own vCPU, and in no list. */
static void ticked(fx_machine *m, uint32_t vcpu, uint64_t code, struct fx_result *out)
{
    put(out, code, 0, vcpu, code & CODE_EFFECTS ? vcpu : FX_NOBODY, 0);
    if (m->hooked && out->effects) {
        struct fx_hooks hooks = m->hooks;
        int paused = pause_trace(m);

        call_each(&hooks, out->effects, vcpu);
        if (paused)
            resume_trace(m);
    }
}

static int32_t op_set_time(fx_machine *m, uint64_t ns, struct fx_result *results, uint64_t room, uint64_t *count)
{
    uint64_t *words = words_of(m), v;
    struct fx_exit exit = { 0, FXP_VMX_PREEMPTION_TIMER, 0, 0, 0, 0 };

    if (!words || !count || (room && !results))
        return refuse(m);
    *count = 0;
    if (ns < words[FX_H_NOW] || ns > latest_clock(words[FX_H_TSC_KHZ]))
        return FX_E_RANGE;
    words[FX_H_NOW] = ns;
    while ((v = table.due_timer(handle(words))) != NONE) {
        uint64_t code, number = v / FX_MAX_VCPUS;

        if (*count == room)
            return FX_MORE;
        code = table.fire_timer(handle(words), v);
        if (number >= FX_HOST_TIMERS) {
            if (number >= FX_HOST_WORK_PIT)
                tell(m, words, FX_HOST, code, &results[(*count)++]);
            continue;
        }
        v &= FX_MAX_VCPUS - 1; /* above is which of its timers it was */
        ticked(m, (uint32_t)v, code, &results[(*count)++]);
    }
    for (v = 0; (v = table.hv_timer_exit(handle(words), v)) != NONE;) {
        if (*count == room)
            return FX_MORE;
        exit.vcpu = (uint32_t)v;
        if (one(m, words, &exit, &results[*count]) == FX_UNHANDLED)
            v++; /* in L2, which the compiled handlers leave alone */
        else
            ++*count;
    }
    return FX_OK;
}

static int32_t op_next_timer(fx_machine *m, uint64_t *ns)
{
    uint64_t *words = words_of(m), when;

    if (!words || !ns)
        return refuse(m);
    when = table.next_timer(handle(words));
    if (when == NONE)
        return FX_NOTHING;
    *ns = when;
    return FX_OK;
}


static int32_t op_advance(fx_machine *m, uint64_t ns)
{
    uint64_t *words = words_of(m);

    if (!words)
        return refuse(m);
    if (ns > latest_clock(words[FX_H_TSC_KHZ]))
        return FX_E_RANGE;
    table.advance_clock(handle(words), ns);
    return FX_OK;
}

/* What is due and is no vCPU's. */
static int32_t run_host_timers(fx_machine *m, uint64_t *words, struct fx_result *results, uint64_t room, uint64_t *count)
{
    uint64_t row = take_row(words), code;
    int32_t status = FX_OK;

    for (;;) {
        if (*count == room) {
            status = FX_MORE;
            break;
        }
        code = table.run_machine_timer(handle(words), FX_HOST + row);
        if (code == NONE)
            break;
        if (code & CODE_EFFECTS)
            tell(m, words, FX_HOST + row, code, &results[(*count)++]);
    }
    give_row_back(words, row);
    return status;
}

static int32_t op_run_timers(fx_machine *m, uint32_t vcpu, struct fx_result *results, uint64_t room, uint64_t *count)
{
    uint64_t *words = words_of(m), which;
    struct fx_exit exit = { vcpu, FXP_VMX_PREEMPTION_TIMER, 0, 0, 0, 0 };

    if (!words || !count || (room && !results))
        return refuse(m);
    *count = 0;
    if (vcpu == FX_NOBODY)
        return run_host_timers(m, words, results, room, count);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    while ((which = table.due_timer_of(handle(words), vcpu)) != NONE) {
        if (*count == room)
            return FX_MORE;
        ticked(m, vcpu, table.fire_timer(handle(words), which), &results[*count]);
        ++*count;
    }
    while (table.hv_timer_exits(handle(words), vcpu)) {
        if (*count == room)
            return FX_MORE;
        if (one(m, words, &exit, &results[*count]) == FX_UNHANDLED)
            return FX_OK; /* in L2, which the compiled handlers leave alone */
        ++*count;
    }
    return FX_OK;
}

static int32_t op_next_timer_of(fx_machine *m, uint32_t vcpu, uint64_t *ns)
{
    uint64_t *words = words_of(m), when;

    if (!words || !ns)
        return refuse(m);
    if (vcpu != FX_NOBODY && vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    when = vcpu == FX_NOBODY ? table.next_machine_timer(handle(words)) : table.next_timer_of(handle(words), vcpu);
    if (when == NONE)
        return FX_NOTHING;
    *ns = when;
    return FX_OK;
}
