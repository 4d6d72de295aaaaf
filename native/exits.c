/*
 * Guest exits, messages, and what they come to: a result, and whom it asks the host to notify, kick or wake. The kernels
 * have written that down, target by target.
 */
#include "shim.h"

/* ------------------------------------------------------------------------------------------------------------ results */

/* Whom a result is for, by the head of its sender's list. */
static inline uint32_t target_of(uint64_t code, uint64_t head)
{
    if (!(code & CODE_EFFECTS))
        return FX_NOBODY;
    return head >> TARGETS_COUNT_SHIFT == 1 ? (uint32_t)(head & TARGETS_VCPU) : FX_SEVERAL;
}

/* A sender's list of targets, none of them believed: a place each in 16 bits, the first one in its head. */
static uint32_t list_of(const uint64_t *words, uint64_t sender, uint64_t head, uint16_t *list)
{
    uint64_t n = head >> TARGETS_COUNT_SHIFT;

    if (n > FX_MAX_VCPUS)
        n = FX_MAX_VCPUS;
    if (n)
        memcpy(list, words + FX_TARGETS + sender * FX_TARGETS_STRIDE, n * sizeof *list);
    list[0] = (uint16_t)head;
    return (uint32_t)n;
}

/* Of the last message of this thread, which shares the host's rows with other threads. */
static _Thread_local struct {
    fx_machine *machine;
    uint32_t n;
    uint16_t list[FX_MAX_VCPUS];
} told;

static inline int32_t status_of(uint64_t code)
{
    if (!(code & (CODE_FAULT | CODE_USER | CODE_BLOCKED)))
        return FX_OK;
    return code & CODE_FAULT ? FX_GP : code & CODE_USER ? FX_USER : FX_BLOCKED;
}

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

/*
 * The hooks for a vCPU's exit, or for this thread's last message where words is NULL. The list is copied first: in a hook
 * there may be another exit, another message, or the end of the machine.
 */
static __attribute__((noinline, cold)) void call_hooks(fx_machine *m, const uint64_t *words, uint64_t vcpu, uint64_t head)
{
    struct fx_hooks hooks = m->hooks;
    uint16_t list[FX_MAX_VCPUS];
    uint32_t n = words ? list_of(words, vcpu, head, list) : told.n;
    int paused;

    if (!words)
        memcpy(list, told.list, n * sizeof *list);
    paused = pause_trace(m);
    for (uint32_t i = 0; i < n; i++)
        call_each(&hooks, list[i] >> TARGETS_EFFECT_SHIFT, list[i] & TARGETS_VCPU);
    if (paused)
        resume_trace(m);
}

static inline int32_t put(struct fx_result *out, uint64_t code, uint64_t value, uint32_t vcpu, uint32_t target,
                          uint32_t vector)
{
    uint64_t fields = code & (CODE_EFFECTS | ((1ull << EFFECTS_SHIFT) - 1));

    memcpy(out, &fields, sizeof fields);
    out->value = value;
    out->vcpu = vcpu;
    out->target = target;
    out->vector = vector;
    out->cycles_ipi = out->cycles = out->cycles_spent = FX_NO_CYCLES;
    return out->status = status_of(code);
}

/* Modelled time of a vCPU's last exit, access or KVM_RUN. What an entry waited is counted in ns. */
static __attribute__((noinline, cold)) void put_cycles(const uint64_t *words, struct fx_result *out, uint32_t vcpu)
{
    const uint64_t *row = METER(words, vcpu);
    uint64_t ns = OWN(words, vcpu)[FX_K_WAITED] - row[FX_METER_WAITED];
    unsigned __int128 cycles = (unsigned __int128)ns * words[FX_PRICES + FX_PRICE_GHZ];
    uint32_t rest = (uint32_t)cycles;
    uint64_t waited = (uint64_t)(cycles >> 32);

    waited += rest > 1u << 31 || (rest == 1u << 31 && waited & 1);
    out->cycles_ipi = row[FX_METER_IPI];
    out->cycles_spent = row[FX_METER_SPENT] + waited;
    if (__atomic_load_n(&HOT(words, vcpu)[FX_HOT_MODE], __ATOMIC_ACQUIRE))
        out->cycles = out->cycles_spent;
}

static int32_t op_irq_line(fx_machine *m, uint32_t gsi, uint32_t level, struct fx_result *out);

/* The result of a vCPU's exit. */
static inline int32_t put_exit(fx_machine *m, const uint64_t *words, struct fx_result *out, uint64_t code, uint64_t value,
                               uint32_t vcpu, uint32_t vector)
{
    uint64_t head = OWN(words, vcpu)[FX_K_TARGETS];
    int32_t status = put(out, code, value, vcpu, target_of(code, head), vector);

    if (__builtin_expect(words[FX_H_CONFIG] & FX_CONFIG_COSTS, 0))
        put_cycles(words, out, vcpu);
    if (__builtin_expect(m->hooked && code & CODE_EFFECTS, 0)) /* last: a hook may use this result */
        call_hooks(m, words, vcpu, head);
    return status;
}

/* ------------------------------------------------------------------------------------------------------- guest exits */

/* The vector of an exit that writes the ICR, else 0. */
static inline uint32_t vector_of(const uint64_t *words, const struct fx_exit *exit, int svm)
{
    int sends = 0;

    if (exit->reason == (svm ? FXP_SVM_MSR : FXP_VMX_MSR_WRITE))
        sends = (exit->msr == FXP_MSR_X2APIC_ICR ||
                 (exit->msr == FXP_MSR_HV_ICR && words[FX_H_CONFIG] & FX_CONFIG_KVM_HYPERV)) &&
                (!svm || exit->info);
    else if (exit->reason == (svm ? FXP_SVM_NPF : FXP_VMX_EPT_MISCONFIG))
        sends = exit->info & MMIO_WRITE && ((exit->gpa - page_of(words, exit->vcpu)) & ~15ull) == FXP_APIC_ICR;
    return sends ? exit->value & 0xff : 0;
}

/* What an exit that reads nothing has in its outcome's second word is no value, but what K_TARGETS says. */
static inline int reads(const struct fx_exit *exit, int svm)
{
    if (exit->reason == (svm ? FXP_SVM_NPF : FXP_VMX_EPT_MISCONFIG))
        return !(exit->info & MMIO_WRITE);
    if (exit->reason == (svm ? FXP_SVM_IO : FXP_VMX_IO_INSTRUCTION))
        return !!(exit->info & (svm ? SVM_IO_IN : VMX_IO_IN));
    return exit->reason == (svm ? FXP_SVM_MSR : FXP_VMX_MSR_READ) && (!svm || !exit->info);
}

/* RAX behind a hypercall that has a result. */
static inline uint64_t rax_of(const uint64_t *words, uint32_t vcpu, uint64_t code)
{
    return code & (CODE_FAULT | CODE_USER) ? 0 : OWN(words, vcpu)[FX_K_MSR_DATA];
}

/* One record of the batch door that has been checked. */
static __attribute__((noinline)) int32_t one(fx_machine *m, uint64_t *words, const struct fx_exit *exit,
                                             struct fx_result *out)
{
    struct fx_outcome outcome;
    uint64_t code;
    int svm = !!is_svm(words);

    if (table.run(handle(words), handle(exit), handle(&outcome), 0, 1) != 1)
        return FX_UNHANDLED;
    memcpy(&code, &outcome, sizeof code);
    if (exit->reason == FX_NOTIFICATION) /* no exit */
        return put(out, code, 0, exit->vcpu, FX_NOBODY, 0);
    if (exit->reason == (svm ? FXP_SVM_VMMCALL : FXP_VMX_VMCALL))
        return put_exit(m, words, out, code, rax_of(words, exit->vcpu, code), exit->vcpu, 0);
    return put_exit(m, words, out, code, reads(exit, svm) ? outcome.value : 0, exit->vcpu, vector_of(words, exit, svm));
}

static __attribute__((noinline)) int32_t any_wrmsr(fx_machine *m, uint64_t *words, uint32_t vcpu, uint32_t msr,
                                                   uint64_t value, struct fx_result *out)
{
    struct fx_exit exit = { vcpu, FXP_VMX_MSR_WRITE, msr, 0, value, 0 };

    if (is_svm(words))
        exit.reason = FXP_SVM_MSR, exit.info = 1;
    return one(m, words, &exit, out);
}

static int32_t op_wrmsr(fx_machine *m, uint32_t vcpu, uint32_t msr, uint64_t value, struct fx_result *out)
{
    uint64_t *words = words_of(m), code;

    if (!words || !out)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    if (msr != FXP_MSR_X2APIC_ICR)
        return any_wrmsr(m, words, vcpu, msr, value, out);
    code = table.door_ipi(handle(words) | vcpu, value);
    if (!code)
        return any_wrmsr(m, words, vcpu, msr, value, out);
    return put_exit(m, words, out, code, 0, vcpu, value & 0xff);
}

static int32_t op_rdmsr(fx_machine *m, uint32_t vcpu, uint32_t msr, struct fx_result *out)
{
    uint64_t *words = words_of(m);
    struct fx_exit exit;

    if (!words || !out)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    exit = (struct fx_exit){ vcpu, is_svm(words) ? FXP_SVM_MSR : FXP_VMX_MSR_READ, msr, 0, 0, 0 };
    return one(m, words, &exit, out);
}

/* An access to a device, whose length and value are looked at here, whose address by the kernel. */
static int32_t device(fx_machine *m, uint64_t *words, struct fx_exit exit, uint32_t length, struct fx_result *out)
{
    if (length < 8 && exit.value >> 8 * length)
        return FX_E_RANGE;
    if (!table.first_bad(handle(words), handle(&exit), 1))
        return FX_E_RANGE;
    return one(m, words, &exit, out);
}

static int32_t memory(fx_machine *m, uint32_t vcpu, uint64_t gpa, uint32_t length, uint32_t write, uint64_t value,
                      struct fx_result *out)
{
    uint64_t *words = words_of(m);

    if (!words || !out)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    if (length > 8)
        return FX_E_RANGE;
    return device(m, words,
                  (struct fx_exit){ vcpu, is_svm(words) ? FXP_SVM_NPF : FXP_VMX_EPT_MISCONFIG, 0, length | write, value,
                                    gpa },
                  length, out);
}

static int32_t page(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length, uint32_t write, uint32_t value,
                    struct fx_result *out)
{
    uint64_t *words = words_of(m);

    if (!words || !out)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    if (offset > 0xfff || length > 4)
        return FX_E_RANGE;
    return memory(m, vcpu, page_of(words, vcpu) + offset, length, write, value, out);
}

static int32_t port(fx_machine *m, uint32_t vcpu, uint32_t number, uint32_t length, int write, uint32_t value,
                    struct fx_result *out)
{
    uint64_t *words = words_of(m);
    struct fx_exit exit = { vcpu, FXP_VMX_IO_INSTRUCTION, 0, 0, value, 0 };

    if (!words || !out)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    if (number > 0xffff || (length != 1 && length != 2 && length != 4))
        return FX_E_RANGE;
    exit.info = number << 16 | (length - 1) | (write ? 0 : VMX_IO_IN);
    if (is_svm(words))
        exit.reason = FXP_SVM_IO, exit.info = number << 16 | length << 4 | (write ? 0 : SVM_IO_IN);
    return device(m, words, exit, length, out);
}

static int32_t op_mmio_write(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length, uint32_t value,
                             struct fx_result *out)
{
    return page(m, vcpu, offset, length, MMIO_WRITE, value, out);
}

static int32_t op_mmio_read(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length, struct fx_result *out)
{
    return page(m, vcpu, offset, length, 0, 0, out);
}

static int32_t op_mem_write(fx_machine *m, uint32_t vcpu, uint64_t gpa, uint32_t length, uint64_t value,
                            struct fx_result *out)
{
    return memory(m, vcpu, gpa, length, MMIO_WRITE, value, out);
}

static int32_t op_mem_read(fx_machine *m, uint32_t vcpu, uint64_t gpa, uint32_t length, struct fx_result *out)
{
    return memory(m, vcpu, gpa, length, 0, 0, out);
}

static int32_t op_io_write(fx_machine *m, uint32_t vcpu, uint32_t number, uint32_t length, uint32_t value,
                           struct fx_result *out)
{
    return port(m, vcpu, number, length, 1, value, out);
}

static int32_t op_io_read(fx_machine *m, uint32_t vcpu, uint32_t number, uint32_t length, struct fx_result *out)
{
    return port(m, vcpu, number, length, 0, 0, out);
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
    if (copy.reason == FX_IRQ_LINE)
        return op_irq_line(m, copy.msr, copy.info, out);
    if (!table.first_bad(handle(words), handle(&copy), 1))
        return FX_E_RANGE;
    return one(m, words, &copy, out);
}

static int32_t op_hv_hypercall(fx_machine *m, uint32_t vcpu, uint64_t control, uint64_t input, uint64_t output,
                               const uint64_t *xmm, struct fx_result *out)
{
    uint64_t *words = words_of(m), code;

    if (!words || !out)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    if (xmm)
        memcpy(words + FX_XMM + (uint64_t)vcpu * FX_XMM_STRIDE, xmm, FX_XMM_WORDS * sizeof *xmm);
    else
        memset(words + FX_XMM + (uint64_t)vcpu * FX_XMM_STRIDE, 0, FX_XMM_WORDS * sizeof *xmm);
    code = table.door_hypercall(handle(words), vcpu, control, input, output);
    if (code == NONE)
        return FX_UNHANDLED;
    return put_exit(m, words, out, code, rax_of(words, vcpu, code), vcpu, 0);
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

static int32_t op_run_results(fx_machine *m, const struct fx_exit *exits, struct fx_result *results, uint64_t n,
                              uint64_t *done)
{
    uint64_t *words = words_of(m);
    int32_t status;

    if (!words || !done || (n && (!exits || !results)))
        return refuse(m);
    *done = 0;
    if (!n)
        return FX_OK;
    if (n > PTRDIFF_MAX / sizeof *results)
        return FX_E_SIZE;
    *done = table.first_bad(handle(words), handle(exits), n);
    if (*done < n)
        return exits[*done].vcpu >= words[FX_H_NVCPUS] ? FX_E_VCPU : FX_E_RANGE;
    for (*done = 0; *done < n; ++*done) {
        status = op_exit(m, exits + *done, results + *done);
        if (status == FX_UNHANDLED || status < 0)
            return status;
    }
    return FX_OK;
}

/* --------------------------------------------------------------------------------------------- the world outside vCPUs */

/* A row of the host's that no other thread uses; a machine of one owner needs no more than one. */
static uint64_t take_row(uint64_t *words)
{
    if (!(words[FX_H_CONFIG] & FX_CONFIG_THREADS))
        return 0;
    for (uint64_t row = 0;; row = (row + 1) % FX_HOSTS)
        if (!(__atomic_fetch_or(&words[FX_HOST_BUSY], 1ull << row, __ATOMIC_ACQUIRE) >> row & 1))
            return row;
}

static void give_row_back(uint64_t *words, uint64_t row)
{
    if (words[FX_H_CONFIG] & FX_CONFIG_THREADS)
        __atomic_fetch_and(&words[FX_HOST_BUSY], ~(1ull << row), __ATOMIC_RELEASE);
}

/* Whom effects of no vCPU's are for: the list of a row of the host's, which targets() has from now on. */
static uint64_t learn(fx_machine *m, const uint64_t *words, uint64_t row)
{
    uint64_t head = OWN(words, row)[FX_K_TARGETS];

    told.machine = m;
    told.n = list_of(words, row, head, told.list);
    return head;
}

/* The result of what a row of the host's has sent, and the hooks. */
static void tell(fx_machine *m, const uint64_t *words, uint64_t row, uint64_t code, struct fx_result *out)
{
    put(out, code, 0, FX_NOBODY, target_of(code, learn(m, words, row)), 0);
    if (m->hooked && code & CODE_EFFECTS)
        call_hooks(m, NULL, FX_NOBODY, 0);
}

/* The end of a message, by which the host's row is free again. */
static int32_t sent(fx_machine *m, uint64_t *words, uint64_t row, uint64_t code, uint32_t vector, struct fx_result *out)
{
    int32_t status = FX_E_RANGE;

    if (!(code & CODE_FAULT))
        status = put(out, code, 0, FX_NOBODY, target_of(code, learn(m, words, FX_HOST + row)), vector);
    give_row_back(words, row);
    if (status == FX_OK && m->hooked && code & CODE_EFFECTS)
        call_hooks(m, NULL, FX_NOBODY, 0);
    return status;
}

static int32_t op_inject(fx_machine *m, uint64_t address, uint32_t data, struct fx_result *out)
{
    uint64_t *words = words_of(m), row;

    if (!words || !out)
        return refuse(m);
    row = take_row(words);
    return sent(m, words, row, table.signal_msi(handle(words), address, data, FX_HOST + row), data & 0xff, out);
}

static int32_t op_hv_sint_line(fx_machine *m, uint32_t vp_index, uint32_t sint, uint32_t level, struct fx_result *out)
{
    uint64_t *words = words_of(m), row;

    if (!words || !out)
        return refuse(m);
    row = take_row(words);
    return sent(m, words, row, table.hv_sint_line(handle(words), 0, level, vp_index, sint, FX_HOST + row), 0, out);
}

static int32_t op_targets(fx_machine *m, uint32_t vcpu, struct fx_target *targets, uint64_t room, uint64_t *count)
{
    uint64_t *words = words_of(m);
    uint16_t list[FX_MAX_VCPUS], *from = list;

    if (!words || !count || (room && !targets))
        return refuse(m);
    if (vcpu == FX_NOBODY)
        *count = told.machine == m ? told.n : 0, from = told.list;
    else if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    else
        *count = list_of(words, vcpu, OWN(words, vcpu)[FX_K_TARGETS], list);
    for (uint64_t i = 0; i < *count && i < room; i++)
        targets[i] = (struct fx_target){ from[i] & TARGETS_VCPU, from[i] >> TARGETS_EFFECT_SHIFT };
    return *count > room ? FX_MORE : FX_OK;
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

