/*
 * Tracepoints to the host. A machine that is traced has its calls come one at a time: each holds a lock until its records
 * have gone to the host, but for the time in which hooks run. Untraced ones pay for a look at one word.
 */
#include <pthread.h>
#include <stdio.h>
#include "shim.h"

static struct tracer {
    pthread_mutex_t lock;
    fx_tracer call; /* NULL: not traced */
    void *context;
} tracers[MOST_MACHINES]; /* zeros are locks that are open */

static uint32_t traced; /* atomic; machines with a tracer */

/* Arguments that an event has, where that are not three; tracepoints/text.py. */
static const uint8_t arguments[] = {
    [FX_TP_EXIT] = 7, [FX_TP_APIC_READ] = 2, [FX_TP_APIC_WRITE] = 2, [FX_TP_APIC_IPI] = 2, [FX_TP_ACCEPT_IRQ] = 2,
    [FX_TP_APICV_ACCEPT_IRQ] = 2, [FX_TP_EOI] = 1, [FX_TP_PV_EOI] = 1, [FX_TP_FAST_MMIO] = 1,
    [FX_TP_HV_TIMER_STATE] = 1, [FX_TP_WAIT_LAPIC_EXPIRE] = 1, [FX_TP_AVIC_DOORBELL] = 2,
    [FX_TP_AVIC_KICK_VCPU_SLOWPATH] = 2, [FX_TP_USERSPACE_EXIT] = 2, [FX_TP_HV_HYPERCALL_DONE] = 1,
    [FX_TP_HV_SEND_IPI] = 2, [FX_TP_HV_FLUSH_TLB_EX] = 4, [FX_TP_HV_NOTIFY_ACKED_SINT] = 1,
    [FX_TP_HV_SYNIC_SEND_EOI] = 1, [FX_TP_HV_STIMER_CALLBACK] = 1, [FX_TP_HV_STIMER_CLEANUP] = 1,
    [FX_TP_HYPERCALL] = 6, [FX_TP_IOAPIC_DELAYED_EOI_INJ] = 1, [FX_TP_ACK_IRQ] = 2,
};

static __attribute__((noinline, cold)) int hold_traced(fx_machine *m)
{
    struct tracer *t;

    if (!words_of(m))
        return 0;
    t = &tracers[m - machines];
    if (!__atomic_load_n(&t->call, __ATOMIC_ACQUIRE))
        return 0;
    pthread_mutex_lock(&t->lock);
    return 1;
}

/* In front of a call: whether let_go() has to follow. */
static inline int hold(fx_machine *m)
{
    return __builtin_expect(__atomic_load_n(&traced, __ATOMIC_RELAXED), 0) ? hold_traced(m) : 0;
}

/* Every record of the ring to the host, which is empty then. */
static void drain(const struct tracer *t, uint64_t *words)
{
    uint64_t n = words[FX_H_TRACE_HEAD];

    for (uint64_t i = 0; i < n && i < FX_TRACE_CAPACITY; i++) {
        const uint64_t *from = words + FX_TRACE + i * FX_TRACE_STRIDE;
        uint32_t event = from[0] & 0xff, vcpu = (uint32_t)(from[0] >> 8);
        uint32_t known = event < sizeof arguments && arguments[event] ? arguments[event] : 3;
        struct fx_trace record = { event, vcpu - 1, from[0] >> 40 & (FX_IRQS_OFF | FX_PREEMPT_OFF), 0, { 0 } };

        memcpy(record.args, from + 1, known * sizeof *from);
        t->call(t->context, &record);
    }
    words[FX_H_TRACE_HEAD] = 0;
}

static __attribute__((noinline, cold)) void let_go(fx_machine *m)
{
    struct tracer *t = &tracers[m - machines];
    uint64_t *words = words_of(m);

    if (words && t->call)
        drain(t, words);
    pthread_mutex_unlock(&t->lock);
}

/* Around hooks, which may make calls of their own: whether resume() has to follow. */
static int pause_trace(fx_machine *m)
{
    if (!__atomic_load_n(&traced, __ATOMIC_RELAXED) || !__atomic_load_n(&tracers[m - machines].call, __ATOMIC_ACQUIRE))
        return 0;
    let_go(m);
    return 1;
}

static void resume_trace(fx_machine *m)
{
    pthread_mutex_lock(&tracers[m - machines].lock);
}

/* The tracer of a machine's place: another one, or none. */
static void set_tracer(fx_machine *m, fx_tracer call, void *context)
{
    struct tracer *t = &tracers[m - machines];
    int had = !!t->call;

    t->context = context;
    __atomic_store_n(&t->call, call, __ATOMIC_RELEASE);
    if (call && !had)
        __atomic_fetch_add(&traced, 1, __ATOMIC_RELAXED);
    if (!call && had)
        __atomic_fetch_sub(&traced, 1, __ATOMIC_RELAXED);
}

static int32_t op_set_trace(fx_machine *m, fx_tracer call, void *context)
{
    uint64_t *words = words_of(m);

    if (!words)
        return refuse(m);
    words[FX_H_TRACE_HEAD] = 0;
    words[FX_H_CONFIG] &= ~(uint64_t)FX_CONFIG_TRACE;
    if (call)
        words[FX_H_CONFIG] |= FX_CONFIG_TRACE;
    set_tracer(m, call, context);
    return FX_OK;
}

static int32_t op_trace_text(fx_machine *m, const struct fx_trace *record, char *line, uint64_t size)
{
    uint64_t *words = words_of(m);
    int32_t status;

    if (!words || !record || !line)
        return refuse(m);
    status = start(1);
    if (status != FX_OK)
        return status;
    return fxp_text(words, record, line, size > UINT32_MAX ? UINT32_MAX : (uint32_t)size);
}
