/*
 * Two threads interrupt each other as fast as they can, and every single IPI is accounted for.
 *
 * A sender marks a vector, then sends it, and does not send it again before the other thread has taken it and removed
 * the mark. So an interrupt that arrives without its mark was invented (or came twice), and a mark that stays for
 * seconds, or after both have come to rest, was lost. 192 vectors each way keep many IPIs under way.
 *
 * A storm that is to be noticed plants faults: a receiver overlooks an IPI, and a message comes that nobody marked.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include "host.h"

enum { FIRST = 48, VECTORS = 192 };

/* One direction. Lines of their own: threads are to meet in the machine, not here. */
struct way {
    _Alignas(64) atomic_uchar marked[256];
    _Alignas(64) atomic_int notified; /* the notification IPI that is under way */
    _Alignas(64) atomic_int rests;    /* its sender has sent everything */
};

struct side {
    fx_machine *m;
    struct way *out, *in;
    uint64_t ipis, plant, sent, taken, lost, invented, notices, fast;
    double patience;
    uint32_t vcpu;
    pthread_t thread;
};

static void take(struct side *me)
{
    uint32_t vector;

    if (atomic_exchange_explicit(&me->in->notified, 0, memory_order_acquire)) {
        fx.notify(me->m, me->vcpu);
        me->notices++;
    }
    while (fx.ack(me->m, me->vcpu, &vector) == FX_OK) {
        me->taken++;
        if (me->plant && vector == FIRST) { /* overlooked */
            me->plant--;
        } else if (!atomic_exchange_explicit(&me->in->marked[vector], 0, memory_order_acq_rel)) {
            me->invented++;
        }
        fx.eoi(me->m, me->vcpu, &vector);
    }
}

/* Until the other thread has taken the vector sent last time, or it must be lost. */
static void wait_for(struct side *me, uint32_t vector)
{
    double began = 0;

    for (uint64_t turns = 0; atomic_load_explicit(&me->out->marked[vector], memory_order_acquire); turns++) {
        take(me);
        if (turns % 1024)
            continue;
        if (!turns)
            began = now_ns();
        else
            sched_yield(); /* the other thread may have no CPU */
        if (now_ns() - began > me->patience) {
            me->lost++;
            return;
        }
    }
}

static void *run(void *given)
{
    struct side *me = given;
    struct fx_result result;

    while (me->sent < me->ipis) {
        uint32_t vector = FIRST + (uint32_t)(me->sent % VECTORS);

        wait_for(me, vector);
        atomic_store_explicit(&me->out->marked[vector], 1, memory_order_release);
        MUST(fx.wrmsr(me->m, me->vcpu, MSR_X2APIC_ICR, icr(1 - me->vcpu, vector), &result));
        if (result.effects & FX_NOTIFY)
            atomic_store_explicit(&me->out->notified, 1, memory_order_release);
        if (result.accepted != 1 || result.effects & ~FX_NOTIFY) {
            fprintf(stderr, "storm: accepted by %d, effects %d\n", result.accepted, result.effects);
            exit(1);
        }
        me->fast += result.path == FX_FAST;
        me->sent++;
        take(me);
    }
    atomic_store(&me->out->rests, 1);
    while (!atomic_load(&me->in->rests)) {
        take(me);
        sched_yield();
    }
    take(me);
    return NULL;
}

int storm(uint64_t ipis, uint64_t plant)
{
    fx_machine *m = machine(2, 0);
    static struct way ways[2];
    struct side sides[2];
    uint64_t lost = 0, invented = 0, taken = 0, sent = 0, late = 0;
    double began = now_ns(), spent;

    memset(ways, 0, sizeof ways);
    for (uint32_t v = 0; v < 2; v++) {
        sides[v] = (struct side){ .m = m, .out = &ways[v], .in = &ways[1 - v], .ipis = ipis / 2, .vcpu = v,
                                 .plant = plant, .patience = plant ? 2e8 : 1e10 };
        for (uint64_t i = 0; i < plant; i++) { /* one vector each that nobody sends */
            struct fx_result result;

            MUST(fx.inject(m, 0xfee00000 | (uint64_t)v << 12, (uint32_t)(FIRST + VECTORS + i % 8), &result));
            MUST(fx.notify(m, v));
        }
    }
    for (uint32_t v = 0; v < 2; v++)
        pthread_create(&sides[v].thread, NULL, run, &sides[v]);
    for (int v = 0; v < 2; v++)
        pthread_join(sides[v].thread, NULL);
    spent = now_ns() - began;
    for (int v = 0; v < 2; v++) {
        uint32_t vector;

        for (int i = 0; i < 256; i++)
            lost += atomic_load(&ways[v].marked[i]);
        late += fx.pending(m, (uint32_t)v, &vector) == FX_OK; /* nothing may come after the end */
        lost += sides[v].lost;
        invented += sides[v].invented;
        taken += sides[v].taken;
        sent += sides[v].sent;
        printf("storm: vCPU %d sent %llu, %llu on the fast path, took %llu after %llu notifications\n", v,
               (unsigned long long)sides[v].sent, (unsigned long long)sides[v].fast,
               (unsigned long long)sides[v].taken, (unsigned long long)sides[v].notices);
    }
    invented += late;
    printf("storm: %llu IPIs in %.1f s, %.0f ns each; %llu lost, %llu invented\n", (unsigned long long)sent, spent / 1e9,
           spent / (double)(sent ? sent : 1), (unsigned long long)lost, (unsigned long long)invented);
    MUST(fx.close(m));
    return lost || invented || taken != sent;
}
