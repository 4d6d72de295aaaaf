/*
 * Four threads on one machine, each the CPU of a vCPU: IPIs of all sorts between all of them, level-triggered lines of the
 * IOAPIC, timers of all modes on a clock that goes on meanwhile, and storms of INIT and SIPI. Every interrupt is
 * accounted for.
 *
 *     soak EXITS [SEED [PLANTED [LOCK ...]]]
 *
 * A sender marks a vector at its receiver, then sends it, and sends it again only when the receiver has taken it and with
 * it the mark. An interrupt without a mark was invented, or came twice. Every few thousand exits all threads meet: they
 * stop sending, each takes what it has, and then nobody is in a call. A mark that is still there was lost, unless its
 * receiver has had an INIT since the mark was made, which takes away what is pending. There also
 *   - no line may be up: each assertion gave one interrupt, and each EOI with the line up one more;
 *   - no lock may be held: LOCKs are words of the machine, in bytes from its first posted-interrupt descriptor on. One
 *     that was kept longer than by its exit is seen here, whatever exit was the last before the meeting;
 *   - vCPUs that had no INIT have the registers that they were given, and one that had looks at all of its own.
 * Timers do not wait for that, see soak_timers.h. VMX counts them by its preemption timer where SEED is odd, else the host
 * does.
 *
 * A check that cannot fail is none: PLANTED is 1 more than the number of a fault in `faults`.
 */
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <fastexit.h>
#include <stdio.h>
#include <stdlib.h>

enum { VCPUS = 4, INIT_FROM = 2, LINES = 2, MOST_LOCKS = 8 };
enum { LEVEL = 0x21, TICK = 0x2e, FIRST = 0x30, EACH = 48, EVERYBODY = FIRST + VCPUS * EACH };
enum { FIRST_GSI = 16, IOAPIC = 0xfec00000u };
enum { SVR = 0x1ff, MASKED = 0x10000, ONE_SHOT = 0, PERIODIC = 0x20000, DEADLINES = 0x40000, DIVIDE_BY_1 = 0xb };
enum { BETWEEN_MEETINGS = 8192, SILENCE_S = 120 };
enum { APICBASE = 0x1b, DEADLINE = 0x6e0, ID = 0x802, TPR = 0x808, EOI = 0x80b, LDR = 0x80d, MSR_SVR = 0x80f, ISR = 0x810,
       ICR = 0x830, LVTT = 0x832, LVT0 = 0x835, TMICT = 0x838, TDCR = 0x83e };
enum { FIXED = 0, INIT = 5 << 8, STARTUP = 6 << 8, LOGICAL = 1 << 11, ASSERT = 1 << 14, SELF = 1 << 18, ALL_BUT_SELF = 3 << 18 };

static const char *faults[] = { "lost", "invented", "line", "init", "lock", "timer", "late timer", "early timer", "second tick" };
enum { LOST = 1, INVENTED, LINE, RESET, LOCK, TIMER, LATE_TIMER, EARLY_TIMER, SECOND_TICK };

struct line {
    _Alignas(64) atomic_uint up;
    atomic_ullong assertions;
};

/* What is known of a vCPU's timer, by its own thread. */
struct timer {
    uint64_t not_before, at_latest, look_at; /* the next tick */
    uint64_t period;                         /* 0: there is one tick */
    uint32_t lvtt, left;                     /* ticks until a periodic one is stopped */
    int armed;
    unsigned long long started, ticks, voided, periods, periodic_ticks, runs, meanwhile;
};

struct vcpu {
    /* Others write these. An odd epoch: an INIT is on its way, or the vCPU is not up again yet. */
    _Alignas(64) atomic_uint notified, kicked, woken, blocked, epoch, sipi;
    _Alignas(64) atomic_uint marked[256]; /* epoch at the sender's mark + 2, or 0 */
    /* Its own thread's. */
    _Alignas(64) atomic_ullong exits;
    unsigned long long ipis, broadcasts, taken, levels, again, inits, resets, refused, fast;
    unsigned long long random;
    struct timer timer;
    uint64_t base;
    uint32_t index, at;
    pthread_t thread;
};

static struct fx_ops fx = { .size = sizeof fx, .abi = FX_ABI_VERSION };
static fx_machine *machine;
static struct vcpu vcpus[VCPUS];
static struct line lines[LINES];
static _Atomic uint64_t *locks[MOST_LOCKS];
static int lock_count, planted;
static atomic_int over;
static atomic_ullong wrong[8];
static const char *wrongs[8] = { "lost", "invented", "lines lost", "timers lost", "registers wrong", "locks held",
                                 "accepted wrongly", "calls refused" };
enum { W_LOST, W_INVENTED, W_LINES, W_TIMERS, W_REGISTERS, W_LOCKS, W_ACCEPTED, W_CALLS };
static unsigned long long wanted, meetings, voided;
static atomic_ullong arrived;
static pthread_barrier_t meeting;

static void is_wrong(int what, const struct vcpu *me, const char *text, unsigned long long value)
{
    if (atomic_fetch_add(&wrong[what], 1) < 8)
        fprintf(stderr, "soak: vCPU %u: %s: %s %#llx, epoch %u\n", me->index, wrongs[what], text, value,
                atomic_load(&me->epoch));
}

static unsigned random_below(struct vcpu *me, unsigned n)
{
    me->random ^= me->random << 13;
    me->random ^= me->random >> 7;
    me->random ^= me->random << 17;
    return (unsigned)(me->random >> 33) % n;
}

static int plant(struct vcpu *me, int fault)
{
    static atomic_int done;

    return planted == fault && meetings > 2 && me->random % 64 == 0 && !atomic_exchange(&done, 1);
}

/* ----------------------------------------------------------------------------------------------------- what a host does */

static void tell(uint32_t vcpu, uint32_t effects)
{
    if (effects & (FX_NOTIFY | FX_DOORBELL))
        atomic_store_explicit(&vcpus[vcpu].notified, 1, memory_order_release);
    if (effects & FX_KICK)
        atomic_store_explicit(&vcpus[vcpu].kicked, 1, memory_order_release);
    if (effects & FX_WAKE)
        atomic_store_explicit(&vcpus[vcpu].woken, 1, memory_order_release);
}

/* Whom the last call is for; `from`: a vCPU, or FX_NOBODY behind a call of none. */
static void tell_listed(uint32_t from)
{
    struct fx_target targets[8 * VCPUS]; /* one is told of again for another reason */
    uint64_t count;

    if (fx.targets(machine, from, targets, 8 * VCPUS, &count) != FX_OK)
        is_wrong(W_CALLS, &vcpus[0], "targets", count);
    for (uint64_t i = 0; i < count && i < 8 * VCPUS; i++)
        tell(targets[i].vcpu, targets[i].effects);
}

static void tell_all(uint32_t from, const struct fx_result *result)
{
    if (result->target == FX_SEVERAL)
        tell_listed(from);
    else if (result->effects)
        tell(result->target, result->effects);
}

static int came_back(struct vcpu *me, int32_t status, const struct fx_result *result)
{
    atomic_store_explicit(&me->exits, atomic_load_explicit(&me->exits, memory_order_relaxed) + 1, memory_order_relaxed);
    tell_all(me->index, result);
    if (status == FX_BLOCKED)
        me->blocked = 1;
    else if (status != FX_OK)
        is_wrong(W_CALLS, me, "status", (unsigned long long)(long long)status);
    return status;
}

static struct fx_result wrmsr(struct vcpu *me, uint32_t msr, uint64_t value)
{
    struct fx_result result = { .accepted = 0 };

    came_back(me, fx.wrmsr(machine, me->index, msr, value, &result), &result);
    return result;
}

static uint64_t rdmsr(struct vcpu *me, uint32_t msr)
{
    struct fx_result result = { .value = 0 };

    came_back(me, fx.rdmsr(machine, me->index, msr, &result), &result);
    return result.value;
}

static void line_to(struct vcpu *me, uint32_t line, uint32_t level)
{
    struct fx_result result;
    int32_t status = fx.irq_line(machine, FIRST_GSI + line, level, &result);

    if (status != FX_OK)
        is_wrong(W_CALLS, me, "irq_line", (unsigned long long)(long long)status);
    else if (level && result.accepted != 1)
        is_wrong(W_ACCEPTED, me, "line's", (unsigned long long)(long long)result.accepted);
    tell_all(FX_NOBODY, &result);
}

/* ------------------------------------------------------------------------------------------------------ a vCPU's program */

static void set_up(struct vcpu *me)
{
    wrmsr(me, TPR, 0);
    wrmsr(me, MSR_SVR, SVR);
    wrmsr(me, TDCR, DIVIDE_BY_1);
    wrmsr(me, LVTT, me->timer.lvtt);
}

#include "soak_timers.h"

static void expect(struct vcpu *me, const char *name, uint32_t msr, uint64_t value)
{
    uint64_t found = rdmsr(me, msr);

    if (found != value)
        is_wrong(W_REGISTERS, me, name, found);
}

/* Registers that neither others' INITs nor a reset of its own change. */
static void expect_identity(struct vcpu *me)
{
    expect(me, "ID", ID, me->index);
    expect(me, "LDR", LDR, 1u << me->index);
    expect(me, "APICBASE", APICBASE, me->base);
}

static void is_up(struct vcpu *me)
{
    if (plant(me, RESET))
        wrmsr(me, TPR, 0x10);
    expect_identity(me);
    expect(me, "SVR behind INIT", MSR_SVR, 0xff);
    expect(me, "TPR behind INIT", TPR, 0);
    expect(me, "LVTT behind INIT", LVTT, MASKED);
    expect(me, "LVT0 behind INIT", LVT0, MASKED);
    expect(me, "TMICT behind INIT", TMICT, 0);
    expect(me, "TDCR behind INIT", TDCR, 0);
    expect(me, "deadline behind INIT", DEADLINE, 0);
    for (uint32_t n = 0; n < 8; n++)
        expect(me, "ISR behind INIT", ISR + n, 0);
    wrmsr(me, TMICT, 0); /* INIT leaves the preemption timer to itself, and LVTT is masked still */
    forget_timer(me);
    me->resets++;
    set_up(me);
    atomic_fetch_add(&me->epoch, 1);
}

/* A SIPI's vector tells the INIT that it came behind: each has another one. */
static void look_for_reset(struct vcpu *me)
{
    struct fx_cpu cpu;

    if (atomic_load(&me->epoch) % 2 == 0 || me->blocked || fx.get_cpu(machine, me->index, &cpu) != FX_OK)
        return;
    if (cpu.mp_state == 0 && cpu.cs == atomic_load(&me->sipi) << 8)
        is_up(me);
}

static void take_level(struct vcpu *me)
{
    struct line *line = &lines[me->index];
    int lowers = random_below(me, 2), forgets = plant(me, LINE);
    uint32_t vector = 0;

    me->levels++;
    if (me->index >= LINES || !atomic_load(&line->up)) {
        is_wrong(W_INVENTED, me, "level", LEVEL + me->index);
        return;
    }
    if (lowers)
        line_to(me, me->index, 0);
    else
        me->again++;
    if (forgets)
        return;
    if (random_below(me, 2)) {
        wrmsr(me, EOI, 0);
    } else {
        fx.eoi(machine, me->index, &vector);
        atomic_store(&me->kicked, 1); /* an EOI that the IOAPIC waits for is an exit */
    }
    if (lowers)
        atomic_store_explicit(&line->up, 0, memory_order_release);
}

static void take(struct vcpu *me, uint32_t vector)
{
    uint32_t ended = 0;

    if (vector == LEVEL + me->index) {
        take_level(me);
        return;
    }
    if (vector == TICK) {
        take_tick(me);
    } else if (plant(me, LOST)) {
        me->taken++;
    } else {
        me->taken++;
        if (!atomic_exchange_explicit(&me->marked[vector], 0, memory_order_acq_rel))
            is_wrong(W_INVENTED, me, "vector", vector);
    }
    fx.eoi(machine, me->index, &ended);

    if (ended != vector)
        is_wrong(W_REGISTERS, me, "ended", ended);
}

static void serve(struct vcpu *me)
{
    struct fx_result result;
    uint32_t vector;
    int32_t status;

    if (atomic_exchange_explicit(&me->kicked, 0, memory_order_acquire)) {
        status = fx.reenter(machine, me->index, &result);
        if (status != FX_NOTHING)
            came_back(me, status, &result);
    }
    if (me->blocked) {
        if (!atomic_exchange_explicit(&me->woken, 0, memory_order_acquire))
            return;
        me->blocked = 0;
        came_back(me, fx.enter(machine, me->index, &result), &result);
        tell_listed(me->index); /* KVM_RUN has no outcome, only targets */
        if (me->blocked)
            return;
    }
    look_for_reset(me);
    if (atomic_exchange_explicit(&me->notified, 0, memory_order_acquire))
        fx.notify(machine, me->index);
    while (!me->blocked && fx.ack(machine, me->index, &vector) == FX_OK)
        take(me, vector);
}

/* One IPI to one vCPU, in one of the ways that there are; none while the one sent last is on its way. */
static void send(struct vcpu *me)
{
    struct vcpu *to = &vcpus[random_below(me, VCPUS)];
    uint32_t vector = FIRST + me->index * EACH + me->at++ % EACH;
    uint64_t icr = (uint64_t)to->index << 32 | FIXED | vector;
    unsigned before = atomic_load(&to->epoch);
    struct fx_result result;

    if (to == me && before % 2)
        return;
    if (atomic_load_explicit(&to->marked[vector], memory_order_acquire))
        return;
    if (random_below(me, 8) == 0)
        icr = 1ull << (32 + to->index) | LOGICAL | vector;
    atomic_store_explicit(&to->marked[vector], before + 2, memory_order_release);
    me->ipis++;
    result = wrmsr(me, ICR, icr);
    me->fast += result.path == FX_FAST;
    if (result.accepted == 1)
        return;
    if (result.accepted == 0 && (before % 2 || atomic_load(&to->epoch) != before))
        me->refused++; /* it is not up: the mark stays until all meet */
    else
        is_wrong(W_ACCEPTED, me, "an IPI's", (unsigned long long)(long long)result.accepted);
}

static void send_to_everybody(struct vcpu *me)
{
    uint32_t vector = EVERYBODY + me->index;

    for (int v = 0; v < VCPUS; v++)
        if (atomic_load(&vcpus[v].marked[vector]))
            return;
    for (int v = 0; v < VCPUS; v++)
        if (v != (int)me->index)
            atomic_store_explicit(&vcpus[v].marked[vector], atomic_load(&vcpus[v].epoch) + 2, memory_order_release);
    me->broadcasts++;
    wrmsr(me, ICR, ALL_BUT_SELF | vector);
}

static int waits_for_sipi(struct vcpu *one)
{
    return atomic_load(&one->blocked) && !atomic_load(&one->woken) && !atomic_load(&one->kicked);
}

/* INITs, then SIPIs, for a vCPU that is up; it is the only one who sends it any.
 *
 * A SIPI may come while the INIT before it is still pending. But of an INIT, an INIT and a SIPI KVM can take the SIPI with
 * the first, for which the second then has the vCPU wait for another: so behind several it has to wait already.
 */
static void storm_inits(struct vcpu *me)
{
    struct vcpu *to = &vcpus[me->index + INIT_FROM];
    unsigned several = 1 + random_below(me, 4);

    if (atomic_load(&to->epoch) % 2)
        return;
    atomic_store(&to->sipi, 1 + me->inits % 250);
    atomic_fetch_add(&to->epoch, 1);
    for (unsigned n = several; n; n--, serve(me))
        wrmsr(me, ICR, (uint64_t)to->index << 32 | INIT | ASSERT);
    for (time_t began = time(NULL); several > 1 && !waits_for_sipi(to) && time(NULL) - began < SILENCE_S; sched_yield())
        serve(me);
    for (unsigned n = 1 + random_below(me, 2); n; n--)
        wrmsr(me, ICR, (uint64_t)to->index << 32 | STARTUP | ASSERT | atomic_load(&to->sipi));
    me->inits++;
}

static void raise(struct vcpu *me)
{
    struct line *line = &lines[me->index % LINES];

    if (me->index < LINES || atomic_load_explicit(&line->up, memory_order_acquire))
        return;
    atomic_store(&line->up, 1);
    atomic_fetch_add(&line->assertions, 1);
    line_to(me, me->index % LINES, 1);
}

static void work(struct vcpu *me)
{
    unsigned kind = random_below(me, 256);

    serve(me);
    run_timers(me, kind % 32 == 4);
    if (!me->index && kind % 64 == 5)
        advance(me);
    if (me->blocked)
        sched_yield();
    else if (kind == 0 && me->index < INIT_FROM)
        storm_inits(me);
    else if (kind == 1)
        send_to_everybody(me);
    else if (kind == 2)
        start_or_stop(me);
    else if (kind < 16)
        raise(me);
    else
        send(me);
}

/* -------------------------------------------------------------------------------------------------------------- meetings */

static void check_vcpu(struct vcpu *me)
{
    unsigned epoch = atomic_load(&me->epoch);

    for (int vector = 0; vector < 256; vector++) {
        unsigned mark = atomic_exchange(&me->marked[vector], 0);

        if (!mark)
            continue;
        if (mark - 2 == epoch)
            is_wrong(W_LOST, me, "vector", (unsigned)vector);
        else
            voided++;
    }
}

/* By one thread, while no other is in a call and none has anything left to take. */
static void check(void)
{
    unsigned long long exits = 0, levels = 0, due = 0;

    if (planted == LOCK && meetings > 2)
        atomic_store(locks[0], 1);
    for (int n = 0; n < lock_count; n++)
        if (atomic_load(locks[n]))
            is_wrong(W_LOCKS, &vcpus[0], "number", (unsigned)n);
    if (planted == LOCK && meetings > 2)
        atomic_store(locks[0], 0);
    for (int v = 0; v < VCPUS; v++) {
        check_vcpu(&vcpus[v]);
        exits += atomic_load(&vcpus[v].exits);
        levels += vcpus[v].levels;
        due += vcpus[v].again;
    }
    for (int n = 0; n < LINES; n++) {
        due += atomic_load(&lines[n].assertions);
        if (atomic_load(&lines[n].up))
            is_wrong(W_LINES, &vcpus[n], "up", (unsigned)n);
    }
    if (levels != due)
        is_wrong(W_LINES, &vcpus[0], "taken too few or many", levels - due);
    if (planted == INVENTED && meetings == 3) {
        struct fx_result result;

        fx.inject(machine, 0xfee00000, FIRST, &result);
        tell_all(FX_NOBODY, &result);
    }
    meetings++;
    for (int n = 0; n < 8; n++)
        if (atomic_load(&wrong[n]))
            atomic_store(&over, 1);
    if (exits >= wanted)
        atomic_store(&over, 1);
}

static void meet(struct vcpu *me)
{
    time_t began = time(NULL);

    atomic_fetch_add(&arrived, 1);
    while (atomic_load(&arrived) < VCPUS * (meetings + 1)) { /* others may still send, and wait for an answer */
        serve(me);
        sched_yield();
    }
    do {
        serve(me);
        if (time(NULL) - began > SILENCE_S) {
            struct fx_cpu cpu = { 0 };

            fx.get_cpu(machine, me->index, &cpu);
            fprintf(stderr, "soak: vCPU %u: blocked %u, cs %#x, mp_state %u, mode %u, KVM_RUN returned %u, told %u %u %u\n",
                    me->index, me->blocked, cpu.cs, cpu.mp_state, cpu.mode, cpu.exited, atomic_load(&me->notified),
                    atomic_load(&me->kicked), atomic_load(&me->woken));
            is_wrong(W_LOST, me, "INIT or SIPI", atomic_load(&me->sipi));
            break;
        }
    } while (atomic_load(&me->epoch) % 2 || atomic_load(&me->notified) || atomic_load(&me->kicked));
    expect_identity(me);
    expect(me, "SVR", MSR_SVR, SVR);
    expect(me, "TPR", TPR, 0);
    expect(me, "LVTT", LVTT, me->timer.lvtt);
    run_timers(me, 1);
    serve(me);
    pthread_barrier_wait(&meeting);
    if (!me->index)
        check();
    pthread_barrier_wait(&meeting);
}

static void *run(void *given)
{
    struct vcpu *me = given;

    while (!atomic_load(&over)) {
        unsigned long long first = atomic_load(&me->exits);

        for (unsigned n = 0; n < BETWEEN_MEETINGS && atomic_load(&me->exits) - first < BETWEEN_MEETINGS; n++)
            work(me);
        meet(me);
    }
    return NULL;
}

/* ------------------------------------------------------------------------------------------------------------- beginning */

static void begin(uint64_t seed)
{
    struct fx_config config = { .size = sizeof config, .abi = FX_ABI_VERSION, .vcpus = VCPUS, .flags = FX_BOOT_X2APIC };
    struct fx_result result;

    config.flags |= seed % 2 ? 0 : FX_NO_HV_TIMER;
    if (fx_open(&config, NULL, &machine, &fx) != FX_OK)
        exit(2); /* it has said why */
    for (uint32_t v = 0; v < VCPUS; v++) {
        struct vcpu *one = &vcpus[v];

        one->index = v;
        one->timer.lvtt = DEADLINES | TICK;
        one->random = (seed + v) * 0x9e3779b97f4a7c15ull | 1;
        set_up(one);
        one->base = rdmsr(one, APICBASE);
    }
    for (uint32_t n = 0; n < LINES; n++) {
        uint32_t words[] = { (LEVEL + n) | 1u << 15, n << 24 }; /* an EOI is for all pins that have its vector */

        for (uint32_t half = 0; half < 2; half++) {
            fx.mem_write(machine, 0, IOAPIC, 4, 0x10 + 2 * (FIRST_GSI + n) + 1 - half, &result);
            fx.mem_write(machine, 0, IOAPIC + 0x10, 4, words[1 - half], &result);
            tell_all(0, &result); /* who does not scan the new entry ends its interrupts in vain */
        }
    }
}

static void *watch(void *nothing)
{
    unsigned long long last = 0, exits;
    double began = (double)time(NULL);
    int still = 0;

    while (!atomic_load(&over)) {
        for (int second = 0; second < 10 && !atomic_load(&over); second++)
            sleep(1);
        exits = 0;
        for (int v = 0; v < VCPUS; v++)
            exits += atomic_load(&vcpus[v].exits);
        if (exits != last)
            still = 0;
        else if (!atomic_load(&over) && ++still >= SILENCE_S / 10) {
            fprintf(stderr, "soak: no exit has ended for %d s: somebody waits for a lock or an interrupt\n", SILENCE_S);
            exit(1);
        }
        last = exits;
        fprintf(stderr, "soak: %llu exits, %.0f s\n", exits, (double)time(NULL) - began);
    }
    return nothing;
}

static double seconds(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
    struct vcpu all = { .index = 0 };
    struct fx_region pids;
    unsigned long long exits = 0, assertions = 0, bad = 0;
    pthread_t watcher;
    double began;

    if (argc < 2) {
        fprintf(stderr, "usage: %s EXITS [SEED [PLANTED [LOCK ...]]]\n", argv[0]);
        return 2;
    }
    wanted = strtoull(argv[1], NULL, 0);
    planted = argc > 3 ? atoi(argv[3]) : 0;
    if (planted)
        fprintf(stderr, "soak: planted: %s\n", faults[planted - 1]);
    begin(argc > 2 ? strtoull(argv[2], NULL, 0) : 1);
    if (fx.region(machine, FX_REGION_PID, &pids) != FX_OK)
        return 2;
    for (int n = 4; n < argc && lock_count < MOST_LOCKS; n++)
        locks[lock_count++] = (_Atomic uint64_t *)((char *)pids.base + strtoll(argv[n], NULL, 0));
    pthread_barrier_init(&meeting, NULL, VCPUS);
    began = seconds();
    for (int v = 0; v < VCPUS; v++)
        pthread_create(&vcpus[v].thread, NULL, run, &vcpus[v]);
    pthread_create(&watcher, NULL, watch, NULL);
    for (int v = 0; v < VCPUS; v++)
        pthread_join(vcpus[v].thread, NULL);
    pthread_join(watcher, NULL);
    for (int v = 0; v < VCPUS; v++) {
        struct vcpu *one = &vcpus[v];

        exits += atomic_load(&one->exits);
        all.ipis += one->ipis;
        all.broadcasts += one->broadcasts;
        all.taken += one->taken;
        all.levels += one->levels;
        all.again += one->again;
        all.timer.started += one->timer.started;
        all.timer.ticks += one->timer.ticks;
        all.timer.voided += one->timer.voided;
        all.timer.periods += one->timer.periods;
        all.timer.periodic_ticks += one->timer.periodic_ticks;
        all.timer.runs += one->timer.runs;
        all.timer.meanwhile += one->timer.meanwhile;
        all.inits += one->inits;
        all.resets += one->resets;
        all.refused += one->refused;
        all.fast += one->fast;
        all.timer.armed += one->timer.armed && !one->timer.period;
    }
    for (int n = 0; n < LINES; n++)
        assertions += atomic_load(&lines[n].assertions);
    if (all.ipis + (VCPUS - 1) * all.broadcasts != all.taken + voided)
        is_wrong(W_LOST, &vcpus[0], "sum", all.ipis + (VCPUS - 1) * all.broadcasts - all.taken - voided);
    if (all.timer.started != all.timer.ticks + all.timer.voided + (unsigned)all.timer.armed)
        is_wrong(W_TIMERS, &vcpus[0], "sum", all.timer.started - all.timer.ticks - all.timer.voided);
    if (all.inits != all.resets)
        is_wrong(W_LOST, &vcpus[0], "INIT storms", all.inits - all.resets);
    for (int n = 0; n < 8; n++)
        bad += atomic_load(&wrong[n]);
    printf("{\"exits\": %llu, \"seconds\": %.1f, \"meetings\": %llu, \"ipis\": %llu, \"fast\": %llu, \"broadcasts\": %llu, "
           "\"taken\": %llu, \"gone_by_init\": %llu, \"not_accepted\": %llu, \"assertions\": %llu, \"again\": %llu, "
           "\"levels\": %llu, \"timers\": %llu, \"ticks\": %llu, \"timers_gone_by_init\": %llu, \"periodic\": %llu, "
           "\"periodic_ticks\": %llu, \"timer_runs\": %llu, \"meanwhile\": %llu, \"clock_ns\": %llu, "
           "\"init_storms\": %llu, \"resets\": %llu",
           exits, seconds() - began, meetings, all.ipis, all.fast, all.broadcasts, all.taken, voided, all.refused,
           assertions, all.again, all.levels, all.timer.started, all.timer.ticks, all.timer.voided, all.timer.periods,
           all.timer.periodic_ticks, all.timer.runs, all.timer.meanwhile, (unsigned long long)atomic_load(&clock_reached),
           all.inits, all.resets);
    for (int n = 0; n < 8; n++)
        printf(", \"%s\": %llu", wrongs[n], atomic_load(&wrong[n]));
    printf("}\n");
    return bad != 0;
}
