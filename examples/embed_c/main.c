/* Two vCPU threads that answer each other's IPIs, and a third that lets the time go by: timers run out, and nobody stops. */
#include <fastexit_calls.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

enum { ICR = 0x830, EOI = 0x80b, LVTT = 0x832, TMICT = 0x838, TDCR = 0x83e, IPI = 0xfd, TICK = 0xec, IPIS = 20000 };
static fx_machine *m;
static atomic_uint taken[2], ticks;

static void must(int32_t status)
{
    if (status != FX_OK)
        fprintf(stderr, "%s\n", fx_strerror(status)), exit(1);
}

static void *guest(void *given)
{
    uint32_t me = given != NULL, sent = 0;
    uint64_t periodic[][2] = { { LVTT, 1 << 17 | TICK }, { TDCR, 0xb }, { TMICT, 1000000 } }; /* 1 ms */
    struct fx_result result, timers[2];
    struct fx_event event;

    for (int i = 0; i < 3; i++)
        must(fx_wrmsr(m, me, (uint32_t)periodic[i][0], periodic[i][1], &result));
    while (taken[0] < IPIS || taken[1] < IPIS || !ticks) {
        uint64_t count;
        int32_t status;

        if (sent < IPIS && sent == taken[1 - me]) /* the next one when the one before has been taken */
            must(fx_wrmsr(m, me, ICR, (1ull - me) << 32 | IPI, &result)), sent++;
        must(fx_run_timers(m, me, timers, 2, &count));
        while ((status = fx_settle(m, me, &result)) == FX_MORE)
            ; /* an exit, an entry or a window each; result says whom else it was for */
        for (must(status); fx_take(m, me, &event) == FX_OK; must(fx_wrmsr(m, me, EOI, 0, &result)))
            event.vector == IPI ? taken[me]++ : ticks++;
    }
    return NULL;
}

int main(void)
{
    struct fx_config config = { .size = sizeof config, .abi = FX_ABI_VERSION, .vcpus = 2, .flags = FX_BOOT_X2APIC };
    struct fx_cpu cpu;
    pthread_t threads[2];

    if (fx_open(&config, NULL, &m, NULL) != FX_OK)
        return 1; /* it has said why */
    for (uint32_t v = 0; v < 2; v++)
        must(fx_get_cpu(m, v, &cpu)), cpu.rflags |= 0x200, must(fx_set_cpu(m, v, &cpu)); /* IF */
    for (uint64_t v = 0; v < 2; v++)
        pthread_create(&threads[v], NULL, guest, (void *)v);
    for (uint64_t us = 0; taken[0] < IPIS || taken[1] < IPIS || !ticks; us++)
        must(fx_advance(m, us * 1000));
    for (uint32_t v = 0; v < 2; v++)
        pthread_join(threads[v], NULL);
    printf("%u and %u IPIs taken, %u ticks\n", taken[0], taken[1], ticks);
    return fx_close(m);
}
