/*
 * Two vCPU threads in C that interrupt each other through fastexit's C door, counted and compared.
 *
 *     embed_c check FILE [IPIS]   a stream of IPIs, each answered by the other thread; results and memory go to FILE,
 *                                 which judge.py compares with the Python door, bit by bit
 *     embed_c storm [IPIS [N]]    both at full speed: 0 lost, 0 invented; or N of each, which must be noticed
 *     embed_c time [LIMIT]        nanoseconds an IPI, against the lower bound; 1 above LIMIT times as much
 *     embed_c fuzz [CALLS]        bad input gets error codes
 */
#include <pthread.h>
#include <string.h>
#include "host.h"

struct fx_ops fx = { .size = sizeof fx, .abi = FX_ABI_VERSION };

fx_machine *machine(uint32_t vcpus, uint32_t flags)
{
    struct fx_config config = { .size = sizeof config, .abi = FX_ABI_VERSION, .vcpus = vcpus,
                                .flags = FX_BOOT_X2APIC | flags };
    struct fx_result result;
    fx_machine *m;

    if (fx_open(&config, NULL, &m, &fx) != FX_OK)
        exit(1); /* it has said why */
    for (uint32_t v = 0; v < vcpus; v++)
        MUST(fx.wrmsr(m, v, MSR_X2APIC_TPR, 0, &result)); /* the first exit of each: now it is in the guest */
    return m;
}

/* ------------------------------------------------------------------------------------------------------------- check */

struct record {
    uint64_t value;
    struct fx_result result;
    uint32_t taken, vector, ended;
};

struct turn {
    fx_machine *m;
    struct record *records;
    uint64_t ipis, next; /* whose turn it is: next IPI's parity */
    pthread_mutex_t lock;
    pthread_cond_t moved;
};

struct side {
    struct turn *turn;
    uint32_t vcpu;
    pthread_t thread;
};

/* What the sender of IPI number i writes: mostly plain ones, some that take the generic path or fault. */
static uint64_t stream(uint64_t i)
{
    uint64_t state = i * 0x9e3779b97f4a7c15ull + 1, to = 1 - i % 2;

    random_of(&state);
    switch (random_of(&state) % 16) {
    case 0: return icr((uint32_t)to, 0x20 + state % 200) | 0x800;   /* logical: nobody, or the other one */
    case 1: return 3ull << 18 | (0x20 + state % 200);              /* all but self */
    case 2: return icr((uint32_t)to, 0x20) | 1ull << 20;           /* reserved bit: #GP */
    case 3: return icr((uint32_t)to, state % 16);                  /* illegal vector */
    case 4: return icr(7, 0x40);                                   /* nobody there */
    default: return icr((uint32_t)to, 0x20 + state % 200);
    }
}

static void *take_turns(void *given)
{
    struct side *me = given;
    struct turn *turn = me->turn;

    for (;;) {
        struct record *record;
        uint64_t i;

        pthread_mutex_lock(&turn->lock);
        while (turn->next < turn->ipis && turn->next % 2 != me->vcpu)
            pthread_cond_wait(&turn->moved, &turn->lock);
        i = turn->next;
        pthread_mutex_unlock(&turn->lock);
        if (i >= turn->ipis)
            return NULL;

        /* Take what the other one sent, as the CPU does; then send. */
        if (i) {
            record = &turn->records[i - 1];
            record->taken = (uint32_t)fx.notify(turn->m, me->vcpu);
            record->vector = record->ended = FX_NOBODY;
            fx.ack(turn->m, me->vcpu, &record->vector);
            fx.eoi(turn->m, me->vcpu, &record->ended);
        }
        record = &turn->records[i];
        record->value = stream(i);
        fx.wrmsr(turn->m, me->vcpu, MSR_X2APIC_ICR, record->value, &record->result);

        pthread_mutex_lock(&turn->lock);
        turn->next = i + 1;
        pthread_cond_broadcast(&turn->moved);
        pthread_mutex_unlock(&turn->lock);
    }
}

int check(const char *path, uint64_t ipis)
{
    struct turn turn = { machine(2, 0), calloc(ipis, sizeof *turn.records), ipis, 0, PTHREAD_MUTEX_INITIALIZER,
                         PTHREAD_COND_INITIALIZER };
    struct side sides[2] = { { &turn, 0, 0 }, { &turn, 1, 0 } };
    FILE *file = fopen(path, "wb");
    unsigned char page[1024];
    uint64_t needed;
    void *bytes;

    if (!file || !turn.records) {
        perror(path);
        return 1;
    }
    for (int i = 0; i < 2; i++)
        pthread_create(&sides[i].thread, NULL, take_turns, &sides[i]);
    for (int i = 0; i < 2; i++)
        pthread_join(sides[i].thread, NULL);
    fwrite(&ipis, sizeof ipis, 1, file);
    fwrite(turn.records, sizeof *turn.records, ipis, file);
    MUST(fx.snapshot(turn.m, NULL, 0, &needed));
    bytes = malloc(needed);
    MUST(fx.snapshot(turn.m, bytes, needed, &needed));
    fwrite(&needed, sizeof needed, 1, file);
    fwrite(bytes, 1, needed, file);
    for (uint32_t v = 0; v < 2; v++) {
        MUST(fx.get_lapic(turn.m, v, page, sizeof page));
        fwrite(page, 1, sizeof page, file);
    }
    MUST(fx.close(turn.m));
    free(bytes);
    free(turn.records);
    if (fclose(file)) {
        perror(path);
        return 1;
    }
    printf("check: %llu IPIs between two threads, written to %s\n", (unsigned long long)ipis, path);
    return 0;
}

int main(int argc, char **argv)
{
    const char *mode = argc > 1 ? argv[1] : "";

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (!strcmp(mode, "check") && argc > 2)
        return check(argv[2], argc > 3 ? strtoull(argv[3], NULL, 0) : 20000);
    if (!strcmp(mode, "storm"))
        return storm(argc > 2 ? strtoull(argv[2], NULL, 0) : 2000000, argc > 3 ? strtoull(argv[3], NULL, 0) : 0);
    if (!strcmp(mode, "time"))
        return timing(argc > 2 ? strtod(argv[2], NULL) : 1e9);
    if (!strcmp(mode, "fuzz"))
        return fuzz(argc > 2 ? strtoull(argv[2], NULL, 0) : 1000000);
    fprintf(stderr, "usage: %s check FILE [IPIS] | storm [IPIS [N]] | time [LIMIT] | fuzz [CALLS]\n", argv[0]);
    return 2;
}
