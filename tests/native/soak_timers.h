/*
 * The timers of soak.c: TSC deadlines, counts, periodic counts. vCPU 0's thread has the clock go on while all others run
 * exits; each thread runs the timers of its own vCPU.
 *
 * A thread cannot know the clock at an instant, but between which two it is: `clock_promised` is stored before advance(),
 * `clock_reached` behind it. So a tick has a time before which it must not come, and one behind which it must have come
 * once its thread has run its timers and taken what it has:
 *   - a count or a deadline gives one tick, and no other before it is armed again;
 *   - periodic counts give one tick a period at most; those of several periods that are over become one, but one comes;
 *   - none comes behind an INIT, nor once a periodic count was stopped and what had come was taken.
 */
enum { MIN_PERIOD = 200000, STEP = 40000, FAR_STEP = 1000000, LATE_S = 5 };

static _Atomic uint64_t clock_promised, clock_reached;

static void serve(struct vcpu *me);

static void advance(struct vcpu *me)
{
    uint64_t ns = atomic_load(&clock_promised) + 1 + random_below(me, random_below(me, 64) ? STEP : FAR_STEP);
    int32_t status;

    atomic_store(&clock_promised, ns);
    status = fx.advance(machine, ns);
    atomic_store(&clock_reached, ns);
    if (status != FX_OK)
        is_wrong(W_CALLS, me, "advance", (unsigned long long)(long long)status);
}

/* An INIT is on its way, or was carried out: it takes the timer away. */
static int may_be_reset(struct vcpu *me)
{
    return me->blocked || atomic_load(&me->epoch) % 2;
}

static void forget_timer(struct vcpu *me)
{
    me->timer.voided += me->timer.armed && !me->timer.period;
    me->timer.armed = 0;
}

static void take_tick(struct vcpu *me)
{
    struct timer *timer = &me->timer;
    uint64_t now = atomic_load(&clock_promised);

    if (!timer->period && plant(me, TIMER))
        return;
    if (timer->period)
        timer->periodic_ticks++;
    else
        timer->ticks++;
    timer->meanwhile += atomic_load(&arrived) < VCPUS * (meetings + 1);
    if (!timer->armed)
        is_wrong(W_INVENTED, me, "tick", now);
    else if (now < timer->not_before)
        is_wrong(W_INVENTED, me, "tick before", timer->not_before);
    timer->not_before += timer->period;
    timer->at_latest = (now > timer->at_latest ? now : timer->at_latest) + timer->period;
    timer->armed = timer->armed && timer->period;
    timer->left -= timer->left > 0;
}

/* Those of the vCPU that are due; `anyway`: even if none should be. */
static void run_timers(struct vcpu *me, int anyway)
{
    struct timer *timer = &me->timer;
    uint64_t now = atomic_load(&clock_reached), count, next;
    struct fx_result result; /* one at a time: targets() knows the last one's */
    int32_t status;

    if (!anyway && (!timer->armed || now < timer->look_at))
        return;
    timer->runs++;
    do {
        status = fx.run_timers(machine, me->index, &result, 1, &count);
        if (count)
            came_back(me, result.status, &result); /* the preemption timer's exit may find an INIT */
    } while (status == FX_MORE);
    if (status != FX_OK)
        is_wrong(W_CALLS, me, "run_timers", (unsigned long long)(long long)status);
    status = fx.next_timer_of(machine, me->index, &next);
    if (status == FX_OK && next <= now)
        is_wrong(W_TIMERS, me, "next is due since", next);
    timer->look_at = status == FX_OK ? next : UINT64_MAX;
    serve(me);
    /* Who has kicked the vCPU just before may not have come to tell it, and its tick waits for that exit. */
    for (time_t began = time(NULL); timer->armed && timer->at_latest <= now && !may_be_reset(me); serve(me)) {
        if (time(NULL) - began > LATE_S) {
            is_wrong(W_TIMERS, me, "due at the latest at", timer->at_latest);
            timer->at_latest = UINT64_MAX;
        }
        sched_yield();
    }
}

static void stop(struct vcpu *me)
{
    wrmsr(me, TMICT, 0);
    serve(me);
    if (!may_be_reset(me))
        me->timer.armed = 0;
}

/* One exit or two: an INIT that comes with the first has the second be none of the guest's. */
static void start_or_stop(struct vcpu *me)
{
    static const uint32_t modes[] = { ONE_SHOT, PERIODIC, DEADLINES, DEADLINES };
    struct timer *timer = &me->timer;
    uint32_t lvtt = TICK | modes[random_below(me, 4)], count = 1 + random_below(me, 60000);

    if (may_be_reset(me))
        return;
    if (timer->armed) {
        if (timer->period && !timer->left)
            stop(me);
        else if (plant(me, SECOND_TICK))
            wrmsr(me, ICR, SELF | TICK);
        return;
    }
    if (lvtt != timer->lvtt) {
        timer->lvtt = lvtt;
        wrmsr(me, LVTT, lvtt);
        if (may_be_reset(me))
            return;
    }
    timer->period = lvtt & PERIODIC ? MIN_PERIOD + count : 0;
    timer->left = random_below(me, 8);
    timer->not_before = atomic_load(&clock_reached) + (timer->period ? timer->period : count);
    timer->look_at = timer->not_before;
    timer->at_latest = UINT64_MAX;
    timer->armed = 1;
    if (timer->period)
        timer->periods++;
    else
        timer->started++;
    if (lvtt & DEADLINES)
        wrmsr(me, DEADLINE, timer->not_before + plant(me, LATE_TIMER) * 1000000u - plant(me, EARLY_TIMER) * count);
    else
        wrmsr(me, TMICT, timer->period ? timer->period : count);
    timer->at_latest = timer->not_before; /* a deadline; a count began between then and now */
    if (!(lvtt & DEADLINES))
        timer->at_latest = atomic_load(&clock_promised) + (timer->period ? timer->period : count);
}
