/*
 * Guest exits, messages, and what they come to: a result, and whom it asks the host to notify, kick or wake.
 */
#include "shim.h"

#define ICR_VECTOR 0xffull
#define ICR_MODE 0x700ull
#define ICR_LOWEST 0x100ull
#define ICR_LOGICAL 0x800ull
#define ICR_SHORTHAND 0xc0000ull
#define XAPIC_BROADCAST 0xff

/* ------------------------------------------------------------------------------------------------------------ results */

static inline uint64_t map_of(const uint64_t *words)
{
    return __atomic_load_n(&words[FX_H_MAP], __ATOMIC_ACQUIRE);
}

/*
 * The vCPU that a physical destination names, by the map that was in use when the kernel began. Another map may give the
 * id to another vCPU, and then nobody knows which of them the kernel has looked at.
 */
static inline uint32_t named(const uint64_t *words, uint64_t at, uint64_t dest)
{
    const uint64_t *map = words + at;
    const uint16_t *slots = (const uint16_t *)(map + FX_MAP_SLOTS);

    if (at != map_of(words) || !map[FX_MAP_PRESENT] || dest > map[FX_MAP_MAX_ID])
        return FX_SEVERAL;
    return slots[FX_MAP_PHYS_SLOT + dest] ? slots[FX_MAP_PHYS_SLOT + dest] - 1u : FX_SEVERAL;
}

/* 0xff of an xAPIC or a message is everybody, and no vCPU that has this id. */
static inline uint64_t no_broadcast(uint64_t dest)
{
    return dest == XAPIC_BROADCAST ? NONE : dest;
}

/* Whom the effects of an interrupt are for. */
static uint32_t target_of(const uint64_t *words, uint64_t map, uint64_t code, uint64_t icr, uint64_t dest)
{
    if (!(code & CODE_EFFECTS))
        return FX_NOBODY;
    if (icr & (ICR_LOGICAL | ICR_SHORTHAND) || (icr & ICR_MODE) == ICR_LOWEST || (code & CODE_ACCEPTED) != 1ull << 32)
        return FX_SEVERAL;
    return named(words, map, dest);
}

static inline int32_t status_of(uint64_t code)
{
    if (!(code & (CODE_FAULT | CODE_USER | CODE_BLOCKED)))
        return FX_OK;
    return code & CODE_FAULT ? FX_GP : code & CODE_USER ? FX_USER : FX_BLOCKED;
}

static int32_t op_attention(fx_machine *m, uint32_t first, uint32_t *vcpu, uint32_t *effects);

static void call_each(const struct fx_hooks *hooks, uint32_t effects, uint32_t vcpu)
{
    if (effects & FX_NOTIFY && hooks->notify)
        hooks->notify(hooks->context, vcpu);
    if (effects & FX_WAKE && hooks->wake)
        hooks->wake(hooks->context, vcpu);
    if (effects & FX_KICK && hooks->kick)
        hooks->kick(hooks->context, vcpu);
    if (effects & FX_DOORBELL && hooks->doorbell)
        hooks->doorbell(hooks->context, vcpu);
}

static __attribute__((noinline, cold)) void call_hooks(fx_machine *m, uint32_t effects, uint32_t target)
{
    struct fx_hooks hooks = m->hooks; /* a hook may close the machine */
    uint32_t vcpu, each;

    if (target != FX_SEVERAL) {
        call_each(&hooks, effects, target);
        return;
    }
    for (uint32_t first = 0; op_attention(m, first, &vcpu, &each) == FX_OK; first = vcpu + 1)
        call_each(&hooks, each & effects, vcpu);
}

static inline int32_t put(fx_machine *m, struct fx_result *out, uint64_t code, uint64_t value, uint32_t vcpu,
                          uint32_t target, uint32_t vector)
{
    uint64_t fields = code & (CODE_EFFECTS | ((1ull << EFFECTS_SHIFT) - 1));
    int32_t status = status_of(code);

    memcpy(out, &fields, sizeof fields);
    out->value = value;
    out->status = status;
    out->vcpu = vcpu;
    out->target = target;
    out->vector = vector;
    if (__builtin_expect(m->hooked && code & CODE_EFFECTS, 0)) /* last: a hook may use this result, and close */
        call_hooks(m, (uint32_t)(code >> EFFECTS_SHIFT & 15), target);
    return status;
}

/* ------------------------------------------------------------------------------------------------------- guest exits */

/* One record of the batch door that has been checked. */
static __attribute__((noinline)) int32_t one(fx_machine *m, uint64_t *words, const struct fx_exit *exit,
                                             struct fx_result *out)
{
    /* Read first: an INIT that the vCPU takes on its way back clears ICR2. */
    uint32_t icr2 = ((const uint32_t *)(words + FX_PAGE + (uint64_t)exit->vcpu * FX_PAGE_STRIDE))[FXP_APIC_ICR2 / 4];
    uint64_t map = map_of(words), code, icr = 0, dest = 0;
    struct fx_outcome outcome;
    int svm = !!is_svm(words), sent = 0;

    if (table.run(handle(words), handle(exit), handle(&outcome), 0, 1) != 1)
        return FX_UNHANDLED;
    memcpy(&code, &outcome, sizeof code);
    if (exit->reason == (svm ? FXP_SVM_MSR : FXP_VMX_MSR_WRITE) && (!svm || exit->info)) {
        sent = exit->msr == FXP_MSR_X2APIC_ICR;
        icr = exit->value;
        dest = icr >> 32;
    } else if (exit->reason == (svm ? FXP_SVM_NPF : FXP_VMX_EPT_MISCONFIG)) {
        sent = exit->info & MMIO_WRITE && (exit->msr & ~15u) == FXP_APIC_ICR;
        icr = exit->value;
        dest = no_broadcast(icr2 >> 24);
    }
    return put(m, out, code, outcome.value, exit->vcpu,
               sent ? target_of(words, map, code, icr, dest) : code & CODE_EFFECTS ? FX_SEVERAL : FX_NOBODY,
               sent ? icr & ICR_VECTOR : 0);
}

static __attribute__((noinline)) int32_t any_wrmsr(fx_machine *m, uint64_t *words, uint32_t vcpu, uint32_t msr,
                                                   uint64_t value, struct fx_result *out)
{
    struct fx_exit exit = { vcpu, FXP_VMX_MSR_WRITE, msr, 0, value };

    if (is_svm(words))
        exit.reason = FXP_SVM_MSR, exit.info = 1;
    return one(m, words, &exit, out);
}

static int32_t op_wrmsr(fx_machine *m, uint32_t vcpu, uint32_t msr, uint64_t value, struct fx_result *out)
{
    uint64_t *words = words_of(m), code, map;
    uint32_t target = FX_NOBODY;

    if (!words || !out)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    if (msr != FXP_MSR_X2APIC_ICR)
        return any_wrmsr(m, words, vcpu, msr, value, out);
    map = map_of(words);
    code = table.door_ipi(handle(words) | vcpu, value);
    if (!code)
        return any_wrmsr(m, words, vcpu, msr, value, out);
    if (code & CODE_EFFECTS) /* it takes on physical destinations only */
        target = code & 1ull << 32 ? named(words, map, value >> 32) : FX_SEVERAL;
    return put(m, out, code, 0, vcpu, target, value & ICR_VECTOR);
}

static int32_t op_rdmsr(fx_machine *m, uint32_t vcpu, uint32_t msr, struct fx_result *out)
{
    uint64_t *words = words_of(m);
    struct fx_exit exit;

    if (!words || !out)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    exit = (struct fx_exit){ vcpu, is_svm(words) ? FXP_SVM_MSR : FXP_VMX_MSR_READ, msr, 0, 0 };
    return one(m, words, &exit, out);
}

static int32_t mmio(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length, uint32_t write, uint32_t value,
                    struct fx_result *out)
{
    uint64_t *words = words_of(m);
    struct fx_exit exit;

    if (!words || !out)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    if (offset > 0xfff || (length != 1 && length != 2 && length != 4) || (length < 4 && value >> 8 * length))
        return FX_E_RANGE;
    exit = (struct fx_exit){ vcpu, is_svm(words) ? FXP_SVM_NPF : FXP_VMX_EPT_MISCONFIG, offset, length | write, value };
    return one(m, words, &exit, out);
}

static int32_t op_mmio_write(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length, uint32_t value,
                             struct fx_result *out)
{
    return mmio(m, vcpu, offset, length, MMIO_WRITE, value, out);
}

static int32_t op_mmio_read(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length, struct fx_result *out)
{
    return mmio(m, vcpu, offset, length, 0, 0, out);
}

static int32_t op_exit(fx_machine *m, const struct fx_exit *exit, struct fx_result *out)
{
    uint64_t *words = words_of(m);
    struct fx_exit copy;

    if (!words || !exit || !out)
        return refuse(m);
    copy = *exit;
    if (copy.vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    if (!table.first_bad(handle(words), handle(&copy), 1))
        return FX_E_RANGE;
    return one(m, words, &copy, out);
}

static int32_t op_run(fx_machine *m, const struct fx_exit *exits, struct fx_outcome *outcomes, uint64_t n, uint64_t *done)
{
    uint64_t *words = words_of(m), stopped;

    if (!words || !done || (n && (!exits || !outcomes)))
        return refuse(m);
    *done = 0;
    if (!n)
        return FX_OK;
    if (n > PTRDIFF_MAX / sizeof *exits) /* no array has so many */
        return FX_E_SIZE;
    stopped = table.run(handle(words), handle(exits), handle(outcomes), 0, n);
    if (stopped <= n) {
        *done = stopped;
        return stopped < n ? FX_UNHANDLED : FX_OK;
    }
    *done = ~stopped;
    return exits[~stopped].vcpu >= words[FX_H_NVCPUS] ? FX_E_VCPU : FX_E_RANGE;
}

/* --------------------------------------------------------------------------------------------- the world outside vCPUs */

static int32_t op_inject(fx_machine *m, uint64_t address, uint32_t data, struct fx_result *out)
{
    uint64_t *words = words_of(m), map, code, icr, dest;

    if (!words || !out)
        return refuse(m);
    map = map_of(words);
    code = table.signal_msi(handle(words), address, data);
    if (code & CODE_FAULT)
        return FX_E_RANGE;
    icr = (data & (ICR_VECTOR | ICR_MODE)) | (address & 4 ? ICR_LOGICAL : 0);
    dest = address >> 12 & 0xff;
    if (words[FX_H_API] & 1) /* KVM_X2APIC_API_USE_32BIT_IDS */
        dest |= address >> 32 & 0xffffff00;
    dest = no_broadcast(dest);
    return put(m, out, code, 0, FX_NOBODY, target_of(words, map, code, icr, dest), data & ICR_VECTOR);
}

static int32_t op_notify(fx_machine *m, uint32_t vcpu)
{
    uint64_t *words = words_of(m);

    if (!words)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    return table.process_notification(handle(words), vcpu) ? FX_OK : FX_NOTHING;
}

/* What a vCPU's words ask of the host now. */
static uint32_t wanted(const uint64_t *words, uint64_t v)
{
    enum { OUTSIDE = 0, IN_GUEST = 1, EXITING = 2, ASLEEP = 2 };
    const uint64_t *row = HOT(words, v), *irr = words + FX_VEC + v * FX_VEC_STRIDE;
    uint64_t mode = __atomic_load_n(&row[FX_HOT_MODE], __ATOMIC_ACQUIRE);
    uint64_t apicv = __atomic_load_n(&row[FX_HOT_FLAGS], __ATOMIC_RELAXED) & FX_FLAG_APICV;
    uint64_t waiting = 0;

    if (mode == EXITING)
        return FX_KICK;
    if (mode == OUTSIDE) {
        uint64_t in_run = __atomic_load_n(&OWN(words, v)[FX_K_IN_RUN], __ATOMIC_RELAXED);

        return in_run >= ASLEEP && !__atomic_load_n(&row[FX_HOT_BLOCKED], __ATOMIC_ACQUIRE) ? FX_WAKE : 0;
    }
    if (!apicv)
        return 0;
    if (!is_svm(words))
        return __atomic_load_n(&row[4], __ATOMIC_ACQUIRE) & 1 ? FX_NOTIFY : 0; /* ON */
    for (int w = 0; w < 4; w++)
        waiting |= __atomic_load_n(&irr[w], __ATOMIC_RELAXED);
    return waiting ? FX_DOORBELL : 0;
}

static int32_t op_attention(fx_machine *m, uint32_t first, uint32_t *vcpu, uint32_t *effects)
{
    uint64_t *words = words_of(m);

    if (!words || !vcpu || !effects)
        return refuse(m);
    for (uint64_t v = first; v < words[FX_H_NVCPUS]; v++) {
        uint32_t asks = wanted(words, v);

        if (asks) {
            *vcpu = (uint32_t)v;
            *effects = asks;
            return FX_OK;
        }
    }
    return FX_NOTHING;
}

