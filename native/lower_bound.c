/*
 * The lower bound of the batch door: one IPI in plain C, on records of the batch door and with its outcomes.
 *
 * Per ICR write: the record and its bounds, sender in guest mode and x2APIC mode, reserved bits, what the fast path
 * takes (here: physical, Fixed, no shorthand), APIC map present, broadcast, range and slot, target enabled, its TMR bit,
 * PIR and ON test-and-set, the target's mode (notify or wake), the ICR store, RIP, shadow and TF of the skip, the
 * sender's own ON and requests before it enters again, the exit count, the outcome. Per notification: the target takes
 * its interrupts: ON cleared, PIR to IRR, RVI.
 *
 * Left out: every choice that is settled when the machine is made (generation, vendor, APICv, tracing, handlers of the
 * embedder, the broadcast quirk), because a program written for one machine would not ask; every exit but these two;
 * logical and multicast destinations, other delivery modes, a target to be kicked, a level interrupt. Such a record
 * ends the run, and its index is returned. State is packed for this and nothing else: two cache lines and half of a
 * third for each target, one for each sender.
 *
 * Above 1536 vCPUs it asks for the lines of the record that comes twelve records later, as the library does.
 *
 * fx_bound_locked uses the same locked instructions that a machine shared by threads needs; fx_bound_plain is for a
 * machine of one owner.
 */
#include <stdint.h>
#include "fastexit_layout.h"

/* cffi:begin */
struct fx_bound_hot {
    uint64_t pir[4];
    uint64_t control;
    uint64_t reserved[3];
    uint64_t tmr[4];
    uint64_t mode;
    uint64_t requests;
    uint64_t flags;
    uint64_t rvi;
};

struct fx_bound_sender {
    uint64_t icr, rip, rflags, shadow, exits, spare[3];
};

struct fx_bound {
    struct fx_bound_hot *hot;
    uint64_t (*irr)[4];
    struct fx_bound_sender *sender;
    uint16_t *slots;
    uint64_t present, max_id, vcpus;
};

uint64_t fx_bound_locked(struct fx_bound *b, struct fx_exit *exits, struct fx_outcome *outcomes, uint64_t n);
uint64_t fx_bound_plain(struct fx_bound *b, struct fx_exit *exits, struct fx_outcome *outcomes, uint64_t n);
/* cffi:end */

enum { OUTSIDE = 0, IN_GUEST = 1 };
enum { HW = 1, X2APIC = 2, SW = 4, APICV = 8 };
enum { WRMSR = 32, MSR_ICR = 0x830 };
enum { NEAR = 1536, AHEAD = 12, MAX_VCPU_ID = FX_MAX_VCPUS - 1 };

#define ICR_RESERVED 0xfff32000ull
#define ICR_BUSY 0x1000ull
#define ICR_DECLINED 0xc8f00ull /* shorthand, logical, any mode but Fixed, and the trigger bit */
#define ICR_TRIGGER 0x8000ull
#define TF 0x100ull

#define CODE_REENTER 1ull
#define CODE_FAST (1ull << 8)
#define CODE_HARDWARE (2ull << 8)
#define CODE_ACCEPTED (1ull << 32)
#define CODE_NOTIFY (1ull << 56)

static inline int test_and_set(uint64_t *word, uint64_t bit, int locked)
{
    int was;

    if (locked) {
        __asm__ volatile("lock btsq %2, %0" : "+m"(*word), "=@ccc"(was) : "Jr"(bit) : "memory");
        return was;
    }
    was = *word >> bit & 1;
    *word |= 1ull << bit;
    return was;
}

static inline uint64_t take(uint64_t *word, int locked)
{
    uint64_t was;

    if (locked)
        return __atomic_exchange_n(word, 0, __ATOMIC_SEQ_CST);
    was = *word;
    *word = 0;
    return was;
}

/*
 * A guess: the id need not be in the map, so the address need not be a vCPU's. Always inlined, or gcc takes a function
 * that only prefetches for one without effect and drops the call.
 */
static inline __attribute__((always_inline)) void look_ahead(const struct fx_exit *e, uint64_t hot, uint64_t (*irr)[4],
                                                             const uint16_t *slots)
{
    if (e->reason == FX_NOTIFICATION) {
        __builtin_prefetch((void *)((uint64_t)irr + e->vcpu * sizeof *irr));
    } else if (e->msr == MSR_ICR) {
        uint64_t at = hot + (slots[e->value >> 32 & MAX_VCPU_ID] - 1ull) * sizeof(struct fx_bound_hot);

        __builtin_prefetch((void *)at);
        __builtin_prefetch((void *)(at + 64));
    }
}

/*
 * Exits and outcomes are arrays of their own; the words of the machine may be anybody's and are not restricted. What *b
 * says is read where it is used: in copies made before the loop it took 3 to 6 more instructions an IPI, for registers
 * that are wanted elsewhere, and the plain form was a seventh slower.
 */
static inline __attribute__((always_inline)) uint64_t run(const struct fx_bound *b, const struct fx_exit *restrict exits,
                                                          struct fx_outcome *restrict outcomes, uint64_t n, int locked,
                                                          int far)
{
    for (uint64_t i = 0; i < n; i++) {
        const struct fx_exit *e = &exits[i];
        uint64_t *out = (uint64_t *)&outcomes[i];
        uint64_t v = e->vcpu, icr = e->value, code = 0;
        struct fx_bound_hot *me = &b->hot[v];

        if (v >= b->vcpus)
            return i;
        if (far && i + AHEAD < n)
            look_ahead(&exits[i + AHEAD], (uint64_t)b->hot, b->irr, b->slots);
        if (e->reason == FX_NOTIFICATION) {
            if (!(me->flags & APICV) || me->mode == OUTSIDE)
                return i;
            if (locked)
                __asm__ volatile("lock btrq $0, %0" : "+m"(me->control) : : "memory");
            else
                me->control &= ~1ull;
            unsigned words = 0;

            /* A branch for each word would be mispredicted, one vector load would wait for the sender's store. */
            for (unsigned w = 0; w < 4; w++)
                words |= (unsigned)!!__atomic_load_n(&me->pir[w], __ATOMIC_RELAXED) << w;
            while (words) {
                uint64_t w = __builtin_ctz(words), bits, top;

                words &= words - 1;
                bits = take(&me->pir[w], locked);
                top = w << 6 | (63 - __builtin_clzll(bits));
                if (locked)
                    __atomic_fetch_or(&b->irr[v][w], bits, __ATOMIC_SEQ_CST);
                else
                    b->irr[v][w] |= bits;
                me->rvi = top > me->rvi ? top : me->rvi;
            }
            out[0] = CODE_HARDWARE;
            out[1] = 0;
            continue;
        }
        if (e->reason != WRMSR || e->msr != MSR_ICR)
            return i;
        if (me->mode != IN_GUEST || !(me->flags & X2APIC) || icr & (ICR_RESERVED | ICR_DECLINED))
            return i;

        struct fx_bound_sender *sender = &b->sender[v];
        uint64_t dest = icr >> 32, vector = icr & 0xff, word = vector >> 6, bit = vector & 63;

        if (!b->present || dest == 0xffffffff || sender->rflags & TF)
            return i;
        if (dest <= b->max_id && b->slots[dest]) {
            struct fx_bound_hot *target = &b->hot[b->slots[dest] - 1];

            if ((target->flags & (HW | SW)) == (HW | SW)) {
                if (target->tmr[word] >> bit & 1)
                    return i;
                code = CODE_ACCEPTED;
                if (!test_and_set(&target->pir[word], bit, locked) && !test_and_set(&target->control, 0, locked)) {
                    if (target->mode != IN_GUEST)
                        return i;
                    if (target != me)
                        code |= CODE_NOTIFY;
                }
            }
        }
        sender->icr = icr & ~ICR_BUSY;
        sender->rip += 2;
        sender->shadow = 0;
        if (me->control & 1 || me->requests)
            return i;
        sender->exits++;
        out[0] = code | CODE_FAST | CODE_REENTER;
        out[1] = 0;
    }
    return n;
}

uint64_t fx_bound_locked(struct fx_bound *b, struct fx_exit *exits, struct fx_outcome *outcomes, uint64_t n)
{
    return b->vcpus > NEAR ? run(b, exits, outcomes, n, 1, 1) : run(b, exits, outcomes, n, 1, 0);
}

uint64_t fx_bound_plain(struct fx_bound *b, struct fx_exit *exits, struct fx_outcome *outcomes, uint64_t n)
{
    return b->vcpus > NEAR ? run(b, exits, outcomes, n, 0, 1) : run(b, exits, outcomes, n, 0, 0);
}
