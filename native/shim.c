/*
 * libfastexit's own C: checks of what comes from outside, and the way from a checked call into compiled kernels.
 *
 * A machine's memory is mapped here and lies in one block, whose address is all that a kernel takes. Python starts in
 * fx_open, fills the table of kernel addresses once, writes the header of each new machine, and is not needed again.
 * Kernels check indices and believe everything else, so everything else is checked here.
 *
 * Builds define FXP_PYTHON, FXP_PYTHON_VERSION, FXP_LIBPYTHON, FXP_PATHS and FXP_VERSION.
 */
#include <errno.h>
#include <dlfcn.h>
#include <pthread.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include "fastexit.h"

/* cffi:begin */
enum {
    FXP_MSR_X2APIC_ICR = 0x830,
    FXP_APIC_ICR = 0x300,
    FXP_APIC_ICR2 = 0x310,
    FXP_LAPIC_PAGE_BYTES = 0x400,
    FXP_VMX_EXTERNAL_INTERRUPT = 1,
    FXP_VMX_MSR_READ = 31,
    FXP_VMX_MSR_WRITE = 32,
    FXP_VMX_EPT_MISCONFIG = 49,
    FXP_VMX_PREEMPTION_TIMER = 52,
    FXP_SVM_INTERRUPT = 0x60,
    FXP_SVM_MSR = 0x7c,
    FXP_SVM_NPF = 0x400
};

/* Addresses of kernel entries; each takes 64-bit integers and returns one. */
struct fxp_table {
    uint32_t size;
    uint32_t abi;
    uint64_t (*door_ipi)(uint64_t handle_and_vcpu, uint64_t icr);
    uint64_t (*run)(uint64_t handle, uint64_t exits, uint64_t outcomes, uint64_t first, uint64_t n);
    uint64_t (*first_bad)(uint64_t handle, uint64_t exits, uint64_t n);
    uint64_t (*signal_msi)(uint64_t handle, uint64_t address, uint64_t data);
    uint64_t (*process_notification)(uint64_t handle, uint64_t v);
    uint64_t (*pending)(uint64_t handle, uint64_t v);
    uint64_t (*ack)(uint64_t handle, uint64_t v);
    uint64_t (*eoi)(uint64_t handle, uint64_t v);
    uint64_t (*door_run)(uint64_t handle, uint64_t v);
    uint64_t (*door_leave)(uint64_t handle, uint64_t v);
    uint64_t (*door_reset)(uint64_t handle, uint64_t v, uint64_t power);
    uint64_t (*set_msr)(uint64_t handle, uint64_t v, uint64_t msr, uint64_t value);
    uint64_t (*get_msr)(uint64_t handle, uint64_t v, uint64_t msr);
    uint64_t (*get_state)(uint64_t handle, uint64_t v);
    uint64_t (*set_state)(uint64_t handle, uint64_t v);
    uint64_t (*due_timer)(uint64_t handle);
    uint64_t (*fire_timer)(uint64_t handle, uint64_t v);
    uint64_t (*hv_timer_exit)(uint64_t handle, uint64_t first);
    uint64_t (*next_timer)(uint64_t handle);
    uint64_t (*create_vcpu)(uint64_t handle, uint64_t vcpu_id);
};
/* cffi:end */

/* What Python does: 0, or a status with a line that says why. */
CFFI_DLLEXPORT int32_t fxp_start(struct fxp_table *table, char *line, uint32_t room);
CFFI_DLLEXPORT int32_t fxp_header(const struct fx_config *config, uint64_t *words, char *line, uint32_t room);
CFFI_DLLEXPORT int32_t fxp_unpack(const void *data, uint64_t size, uint64_t *words, char *line, uint32_t room);

#define NONE UINT64_MAX
#define MMIO_WRITE (1u << 31)
#define BYTES ((size_t)FX_WORDS * 8)
#define MOST_MACHINES 4096

#define CODE_FAULT 0x0000000000ff0000ull
#define CODE_ACCEPTED 0x0000ffff00000000ull
#define CODE_USER 0x00ff000000000000ull
#define CODE_EFFECTS 0x0f00000000000000ull
#define CODE_BLOCKED 0x4000000000000000ull
#define EFFECTS_SHIFT 56

#define ICR_VECTOR 0xffull
#define ICR_MODE 0x700ull
#define ICR_LOWEST 0x100ull
#define ICR_LOGICAL 0x800ull
#define ICR_SHORTHAND 0xc0000ull

#define HOT(words, v) ((words) + FX_HOT + (uint64_t)(v)*FX_HOT_STRIDE)

struct fx_machine {
    uint64_t *words; /* NULL: closed */
    struct fx_hooks hooks;
    uint32_t hooked;
} __attribute__((aligned(64)));

static struct fx_machine machines[MOST_MACHINES];
static uint32_t next_machine;
static struct fxp_table table;
static int started;
static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local char last_error[512];

/* ---------------------------------------------------------------------------------------------------------- statuses */

static int32_t fail(int32_t status, int quiet, const char *format, ...)
{
    va_list values;

    va_start(values, format);
    vsnprintf(last_error, sizeof last_error, format, values);
    va_end(values);
    if (!quiet)
        fprintf(stderr, "fastexit: %s\n", last_error);
    return status;
}

CFFI_DLLEXPORT const char *fx_last_error(void)
{
    return last_error;
}

CFFI_DLLEXPORT const char *fx_version(void)
{
    return FXP_VERSION;
}

CFFI_DLLEXPORT uint32_t fx_abi_version(void)
{
    return FX_ABI_VERSION;
}

CFFI_DLLEXPORT const char *fx_strerror(int32_t status)
{
    switch (status) {
    case FX_OK: return "done";
    case FX_GP: return "#GP(0) for the guest";
    case FX_USER: return "KVM_RUN returns to user space";
    case FX_BLOCKED: return "the vCPU waits";
    case FX_NOTHING: return "there is none";
    case FX_MORE: return "the buffer is full, call again";
    case FX_UNHANDLED: return "no compiled handler for this exit";
    case FX_E_NULL: return "a null pointer";
    case FX_E_SIZE: return "wrong size of a struct or buffer";
    case FX_E_ABI: return "another ABI version";
    case FX_E_MACHINE: return "no machine, or a closed one";
    case FX_E_VCPU: return "no such vCPU";
    case FX_E_RANGE: return "an argument is out of range";
    case FX_E_SNAPSHOT: return "not a sound snapshot";
    case FX_E_PYTHON: return "Python, numba or fastexit cannot be used";
    case FX_E_MEMORY: return "no memory, or too many open machines";
    }
    return "unknown status";
}

/* ----------------------------------------------------------------------------------------------------- a call's front */

/* Memory of an open machine; NULL for everything else, of which nothing is read. */
static inline uint64_t *words_of(const struct fx_machine *m)
{
    uintptr_t at = (uintptr_t)m - (uintptr_t)machines;

    if (at >= sizeof machines || at & (sizeof *m - 1))
        return NULL;
    return m->words;
}

/* Why a call with a machine and a pointer of the host's cannot be done. */
static __attribute__((noinline, cold)) int32_t refuse(const struct fx_machine *m)
{
    return m && !words_of(m) ? FX_E_MACHINE : FX_E_NULL;
}

static inline uint64_t handle(const uint64_t *words)
{
    return (uint64_t)(uintptr_t)words;
}

static inline int is_svm(const uint64_t *words)
{
    return words[FX_H_CONFIG] & FX_CONFIG_SVM;
}

/* ------------------------------------------------------------------------------------------------------------ results */

/* The vCPU that a physical destination names, by the map in use. */
static inline uint32_t named(const uint64_t *words, uint64_t dest)
{
    const uint64_t *map = words + __atomic_load_n(&words[FX_H_MAP], __ATOMIC_ACQUIRE);
    const uint16_t *slots = (const uint16_t *)(map + FX_MAP_SLOTS);

    if (!map[FX_MAP_PRESENT] || dest > map[FX_MAP_MAX_ID])
        return FX_SEVERAL;
    return slots[FX_MAP_PHYS_SLOT + dest] ? slots[FX_MAP_PHYS_SLOT + dest] - 1u : FX_SEVERAL;
}

/* Whom the effects of an interrupt are for. */
static inline uint32_t target_of(const uint64_t *words, uint64_t code, uint64_t icr, uint64_t dest)
{
    if (!(code & CODE_EFFECTS))
        return FX_NOBODY;
    if (icr & (ICR_LOGICAL | ICR_SHORTHAND) || (icr & ICR_MODE) == ICR_LOWEST || (code & CODE_ACCEPTED) != 1ull << 32)
        return FX_SEVERAL;
    return named(words, dest);
}

static inline int32_t status_of(uint64_t code)
{
    if (!(code & (CODE_FAULT | CODE_USER | CODE_BLOCKED)))
        return FX_OK;
    return code & CODE_FAULT ? FX_GP : code & CODE_USER ? FX_USER : FX_BLOCKED;
}

static int32_t attention(fx_machine *m, uint32_t first, uint32_t *vcpu, uint32_t *effects);

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
    for (uint32_t first = 0; attention(m, first, &vcpu, &each) == FX_OK; first = vcpu + 1)
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
    if (__builtin_expect(m->hooked && code & CODE_EFFECTS, 0))
        call_hooks(m, (uint32_t)(code >> EFFECTS_SHIFT & 15), target);
    return status;
}

/* ------------------------------------------------------------------------------------------------------- guest exits */

/* One record of the batch door that has been checked. */
static __attribute__((noinline)) int32_t one(fx_machine *m, uint64_t *words, const struct fx_exit *exit,
                                             struct fx_result *out)
{
    struct fx_outcome outcome;
    uint64_t code, icr = 0, dest = 0;
    int svm = !!is_svm(words), sent = 0;

    if (!table.run(handle(words), handle((const uint64_t *)exit), handle((const uint64_t *)&outcome), 0, 1))
        return FX_UNHANDLED;
    memcpy(&code, &outcome, sizeof code);
    if (exit->reason == (svm ? FXP_SVM_MSR : FXP_VMX_MSR_WRITE) && (!svm || exit->info)) {
        sent = exit->msr == FXP_MSR_X2APIC_ICR;
        icr = exit->value;
        dest = icr >> 32;
    } else if (exit->reason == (svm ? FXP_SVM_NPF : FXP_VMX_EPT_MISCONFIG)) {
        const uint32_t *page = (const uint32_t *)(words + FX_PAGE + (uint64_t)exit->vcpu * FX_PAGE_STRIDE);

        sent = exit->info & MMIO_WRITE && (exit->msr & ~15u) == FXP_APIC_ICR;
        icr = exit->value;
        dest = page[FXP_APIC_ICR2 / 4] >> 24;
    }
    return put(m, out, code, outcome.value, exit->vcpu,
               sent ? target_of(words, code, icr, dest) : code & CODE_EFFECTS ? FX_SEVERAL : FX_NOBODY,
               sent ? icr & ICR_VECTOR : 0);
}

static int32_t op_wrmsr(fx_machine *m, uint32_t vcpu, uint32_t msr, uint64_t value, struct fx_result *out)
{
    uint64_t *words = words_of(m), code;
    struct fx_exit exit;

    if (!words || !out)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    if (msr == FXP_MSR_X2APIC_ICR) {
        code = table.door_ipi(handle(words) | vcpu, value);
        if (code)
            return put(m, out, code, 0, vcpu, target_of(words, code, value, value >> 32), value & ICR_VECTOR);
    }
    exit = (struct fx_exit){ vcpu, FXP_VMX_MSR_WRITE, msr, 0, value };
    if (is_svm(words))
        exit.reason = FXP_SVM_MSR, exit.info = 1;
    return one(m, words, &exit, out);
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
    if (!table.first_bad(handle(words), handle((uint64_t *)&copy), 1))
        return FX_E_RANGE;
    return one(m, words, &copy, out);
}

static int32_t op_run(fx_machine *m, const struct fx_exit *exits, struct fx_outcome *outcomes, uint64_t n, uint64_t *done)
{
    uint64_t *words = words_of(m), bad;

    if (!words || !done || (n && (!exits || !outcomes)))
        return refuse(m);
    *done = 0;
    if (n > UINT64_MAX / sizeof *exits)
        return FX_E_RANGE;
    bad = n ? table.first_bad(handle(words), handle((const uint64_t *)exits), n) : 0;
    if (bad < n) {
        *done = bad;
        return exits[bad].vcpu >= words[FX_H_NVCPUS] ? FX_E_VCPU : FX_E_RANGE;
    }
    *done = table.run(handle(words), handle((const uint64_t *)exits), handle((uint64_t *)outcomes), 0, n);
    return *done < n ? FX_UNHANDLED : FX_OK;
}

/* --------------------------------------------------------------------------------------------- the world outside vCPUs */

static int32_t op_inject(fx_machine *m, uint64_t address, uint32_t data, struct fx_result *out)
{
    uint64_t *words = words_of(m), code, icr, dest;

    if (!words || !out)
        return refuse(m);
    code = table.signal_msi(handle(words), address, data);
    if (code & CODE_FAULT)
        return FX_E_RANGE;
    icr = (data & (ICR_VECTOR | ICR_MODE)) | (address & 4 ? ICR_LOGICAL : 0);
    dest = address >> 12 & 0xff;
    if (words[FX_H_API] & 1) /* KVM_X2APIC_API_USE_32BIT_IDS */
        dest |= address >> 32 & 0xffffff00;
    return put(m, out, code, 0, FX_NOBODY, target_of(words, code, icr, dest), data & ICR_VECTOR);
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
        uint64_t in_run = __atomic_load_n(&words[FX_KVM + v * FX_KVM_STRIDE + FX_K_IN_RUN], __ATOMIC_RELAXED);

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

static int32_t attention(fx_machine *m, uint32_t first, uint32_t *vcpu, uint32_t *effects)
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

/* ---------------------------------------------------------------------------------------------------- the guest's CPU */

static inline int32_t vector_by(uint64_t (*kernel)(uint64_t, uint64_t), fx_machine *m, uint32_t vcpu, uint32_t *vector)
{
    uint64_t *words = words_of(m), found;

    if (!words || !vector)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    found = kernel(handle(words), vcpu);
    if (found == NONE)
        return FX_NOTHING;
    *vector = (uint32_t)found;
    return FX_OK;
}

static int32_t op_pending(fx_machine *m, uint32_t vcpu, uint32_t *vector)
{
    return vector_by(table.pending, m, vcpu, vector);
}

static int32_t op_ack(fx_machine *m, uint32_t vcpu, uint32_t *vector)
{
    return vector_by(table.ack, m, vcpu, vector);
}

static int32_t op_eoi(fx_machine *m, uint32_t vcpu, uint32_t *vector)
{
    return vector_by(table.eoi, m, vcpu, vector);
}

static int32_t op_get_cpu(fx_machine *m, uint32_t vcpu, struct fx_cpu *cpu)
{
    uint64_t *words = words_of(m), *own;

    if (!words || !cpu)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    own = words + FX_KVM + (uint64_t)vcpu * FX_KVM_STRIDE;
    *cpu = (struct fx_cpu){
        .rip = own[FX_K_RIP],
        .rflags = own[FX_K_RFLAGS],
        .shadow = (uint32_t)own[FX_K_SHADOW],
        .cs = (uint32_t)own[FX_K_CS],
        .mp_state = (uint32_t)own[FX_K_MP_STATE],
        .mode = (uint32_t)__atomic_load_n(&HOT(words, vcpu)[FX_HOT_MODE], __ATOMIC_ACQUIRE),
        .injected = (uint32_t)own[FX_K_INTERRUPT],
        .exited = (uint32_t)own[FX_K_USER_EXIT],
    };
    return FX_OK;
}

static int32_t op_set_cpu(fx_machine *m, uint32_t vcpu, const struct fx_cpu *cpu)
{
    uint64_t *words = words_of(m), *own;

    if (!words || !cpu)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    if (cpu->shadow > 3)
        return FX_E_RANGE;
    own = words + FX_KVM + (uint64_t)vcpu * FX_KVM_STRIDE;
    own[FX_K_RIP] = cpu->rip;
    own[FX_K_RFLAGS] = cpu->rflags;
    own[FX_K_SHADOW] = cpu->shadow;
    return FX_OK;
}

static int32_t op_enter(fx_machine *m, uint32_t vcpu, struct fx_result *out)
{
    uint64_t *words = words_of(m);

    if (!words || !out)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    return put(m, out, table.door_run(handle(words), vcpu), 0, vcpu, FX_NOBODY, 0);
}

static int32_t op_reenter(fx_machine *m, uint32_t vcpu, struct fx_result *out)
{
    uint64_t *words = words_of(m);
    struct fx_exit exit;

    if (!words || !out)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    if (!__atomic_load_n(&HOT(words, vcpu)[FX_HOT_MODE], __ATOMIC_ACQUIRE))
        return FX_NOTHING;
    exit = (struct fx_exit){ vcpu, is_svm(words) ? FXP_SVM_INTERRUPT : FXP_VMX_EXTERNAL_INTERRUPT, 0, 0, 0 };
    return one(m, words, &exit, out);
}

/* ------------------------------------------------------------------------------------------------- user space's ioctls */

static int32_t op_set_msr(fx_machine *m, uint32_t vcpu, uint32_t msr, uint64_t value)
{
    uint64_t *words = words_of(m);

    if (!words)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    table.door_leave(handle(words), vcpu);
    return table.set_msr(handle(words), vcpu, msr, value) & CODE_FAULT ? FX_E_RANGE : FX_OK;
}

static int32_t op_get_msr(fx_machine *m, uint32_t vcpu, uint32_t msr, uint64_t *value)
{
    uint64_t *words = words_of(m);

    if (!words || !value)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    table.door_leave(handle(words), vcpu);
    if (table.get_msr(handle(words), vcpu, msr) & CODE_FAULT)
        return FX_E_RANGE;
    *value = words[FX_KVM + (uint64_t)vcpu * FX_KVM_STRIDE + FX_K_MSR_DATA];
    return FX_OK;
}

static int32_t op_get_lapic(fx_machine *m, uint32_t vcpu, void *page, uint64_t size)
{
    uint64_t *words = words_of(m);

    if (!words || !page)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    if (size != FXP_LAPIC_PAGE_BYTES)
        return FX_E_SIZE;
    table.door_leave(handle(words), vcpu);
    table.get_state(handle(words), vcpu);
    memcpy(page, words + FX_H_STAGE, size);
    return FX_OK;
}

static int32_t op_set_lapic(fx_machine *m, uint32_t vcpu, const void *page, uint64_t size)
{
    uint64_t *words = words_of(m);

    if (!words || !page)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    if (size != FXP_LAPIC_PAGE_BYTES)
        return FX_E_SIZE;
    table.door_leave(handle(words), vcpu);
    memcpy(words + FX_H_STAGE, page, size);
    return table.set_state(handle(words), vcpu) & CODE_FAULT ? FX_E_RANGE : FX_OK;
}

static int32_t op_reset(fx_machine *m, uint32_t vcpu, uint32_t kind)
{
    uint64_t *words = words_of(m), first = vcpu, end = (uint64_t)vcpu + 1;

    if (!words)
        return refuse(m);
    if (kind > FX_RESET_POWER)
        return FX_E_RANGE;
    if (vcpu == FX_ALL)
        first = 0, end = words[FX_H_NVCPUS];
    else if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    for (; first < end; first++)
        table.door_reset(handle(words), first, kind);
    return FX_OK;
}

/* --------------------------------------------------------------------------------------------------------------- time */

static int32_t op_set_time(fx_machine *m, uint64_t ns, struct fx_result *results, uint64_t room, uint64_t *count)
{
    uint64_t *words = words_of(m), v;
    struct fx_exit exit = { 0, FXP_VMX_PREEMPTION_TIMER, 0, 0, 0 };

    if (!words || !count || (room && !results))
        return refuse(m);
    *count = 0;
    if (ns < words[FX_H_NOW] || ns > INT64_MAX)
        return FX_E_RANGE;
    words[FX_H_NOW] = ns;
    while ((v = table.due_timer(handle(words))) != NONE) {
        uint64_t code;

        if (*count == room)
            return FX_MORE;
        code = table.fire_timer(handle(words), v);
        put(m, &results[(*count)++], code, 0, (uint32_t)v, code & CODE_EFFECTS ? (uint32_t)v : FX_NOBODY, 0);
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

/* ----------------------------------------------------------------------------------------------------------- snapshot */

struct rows {
    uint64_t first, words;
};

struct head {
    char magic[8];
    uint32_t abi, vcpus, crc, bytes;
};

static uint32_t crc32_of(uint32_t crc, const unsigned char *bytes, uint64_t n)
{
    static uint32_t known[256];
    static pthread_mutex_t making = PTHREAD_MUTEX_INITIALIZER;

    pthread_mutex_lock(&making);
    for (uint32_t i = 0; !known[255] && i < 256; i++) {
        uint32_t c = i;

        for (int bit = 0; bit < 8; bit++)
            c = c >> 1 ^ (c & 1 ? 0xedb88320u : 0);
        known[i] = c;
    }
    pthread_mutex_unlock(&making);
    for (crc = ~crc; n; n--)
        crc = crc >> 8 ^ known[(crc ^ *bytes++) & 0xff];
    return ~crc;
}

static int32_t op_snapshot(fx_machine *m, void *buffer, uint64_t size, uint64_t *needed)
{
    uint64_t *words = words_of(m), n, bytes = 0;
    struct head head = { "FXSNAP", FX_ABI_VERSION, 0, 0, 0 };
    unsigned char *at = buffer;

    if (!words || !needed || (!buffer && size))
        return refuse(m);
    n = words[FX_H_NVCPUS];
    struct rows rows[] = {
        { 0, FX_MAP_SCRATCH },
        { FX_FILTER, FX_TABLES_END - FX_FILTER },
        { FX_HOT, n * FX_HOT_STRIDE },
        { FX_VEC, n * FX_VEC_STRIDE },
        { FX_PAGE, n * FX_PAGE_STRIDE },
        { FX_KVM, n * FX_KVM_STRIDE },
    };
    const unsigned parts = sizeof rows / sizeof *rows;

    for (unsigned i = 0; i < parts; i++)
        bytes += rows[i].words * 8;
    *needed = sizeof head + bytes;
    if (!buffer)
        return FX_OK;
    if (size < *needed)
        return FX_E_SIZE;
    at += sizeof head;
    for (unsigned i = 0; i < parts; i++) {
        memcpy(at, words + rows[i].first, rows[i].words * 8);
        at += rows[i].words * 8;
    }
    head.vcpus = (uint32_t)n;
    head.bytes = (uint32_t)bytes;
    head.crc = crc32_of(0, (unsigned char *)buffer + sizeof head, bytes);
    memcpy(buffer, &head, sizeof head);
    return FX_OK;
}

static int32_t op_region(fx_machine *m, uint32_t which, struct fx_region *region)
{
    uint64_t *words = words_of(m), n;

    if (!words || !region)
        return refuse(m);
    n = words[FX_H_NVCPUS];
    switch (which) {
    case FX_REGION_PID:
        *region = (struct fx_region){ words + FX_HOT, n, sizeof(struct fx_pid), FX_HOT_STRIDE * 8 };
        return FX_OK;
    case FX_REGION_APIC:
        *region = (struct fx_region){ words + FX_PAGE, n, FXP_LAPIC_PAGE_BYTES, FX_PAGE_STRIDE * 8 };
        return FX_OK;
    case FX_REGION_IRR:
        *region = (struct fx_region){ words + FX_VEC, n, 48, FX_VEC_STRIDE * 8 };
        return FX_OK;
    case FX_REGION_ISR:
        *region = (struct fx_region){ words + FX_KVM + FX_K_ISR, n, 32, FX_KVM_STRIDE * 8 };
        return FX_OK;
    case FX_REGION_PID_TABLE:
        *region = (struct fx_region){ words + FX_PID_TABLE, FX_AVIC_PHYSICAL - FX_PID_TABLE, 8, 8 };
        return FX_OK;
    case FX_REGION_AVIC_PHYSICAL:
        *region = (struct fx_region){ words + FX_AVIC_PHYSICAL, FX_AVIC_PHYSICAL_ENTRIES, 8, 8 };
        return FX_OK;
    case FX_REGION_AVIC_LOGICAL:
        *region = (struct fx_region){ words + FX_AVIC_LOGICAL, FX_AVIC_LOGICAL_ENTRIES, 4, 4 };
        return FX_OK;
    }
    return FX_E_RANGE;
}

/* ------------------------------------------------------------------------------------------------------ open and close */

static const struct fx_ops calls = {
    .size = sizeof(struct fx_ops),
    .abi = FX_ABI_VERSION,
    .wrmsr = op_wrmsr,
    .rdmsr = op_rdmsr,
    .mmio_write = op_mmio_write,
    .mmio_read = op_mmio_read,
    .exit = op_exit,
    .run = op_run,
    .inject = op_inject,
    .notify = op_notify,
    .attention = attention,
    .pending = op_pending,
    .ack = op_ack,
    .eoi = op_eoi,
    .get_cpu = op_get_cpu,
    .set_cpu = op_set_cpu,
    .enter = op_enter,
    .reenter = op_reenter,
    .set_msr = op_set_msr,
    .get_msr = op_get_msr,
    .get_lapic = op_get_lapic,
    .set_lapic = op_set_lapic,
    .reset = op_reset,
    .set_time = op_set_time,
    .next_timer = op_next_timer,
    .snapshot = op_snapshot,
    .restore = fx_restore,
    .region = op_region,
    .close = fx_close,
};

/* size and abi of a struct that the host gave, which must hold that much at least. */
static int32_t check_head(const char *what, uint32_t size, uint32_t abi, uint32_t least, int quiet)
{
    if (size < least || size > 4096)
        return fail(FX_E_SIZE, quiet, "%s.size is %u: set it to sizeof(struct %s), here %u", what, size, what, least);
    if (abi != FX_ABI_VERSION)
        return fail(FX_E_ABI, quiet, "%s.abi is %u, this library has %u: build the host with its own fastexit.h", what,
                    abi, (unsigned)FX_ABI_VERSION);
    return FX_OK;
}

extern char **environ;

/* "3.11" of an interpreter, or "" when it does not run. */
static void ask_version(const char *python, char *answer, size_t room)
{
    static const char code[] = "import sys; print('%d.%d' % sys.version_info[:2])";
    char *const argv[] = { (char *)python, "-I", "-S", "-c", (char *)code, NULL };
    posix_spawn_file_actions_t actions;
    int ends[2], state;
    size_t have = 0;
    ssize_t got;
    pid_t child;

    answer[0] = 0;
    if (pipe(ends))
        return;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addclose(&actions, ends[0]);
    posix_spawn_file_actions_adddup2(&actions, ends[1], 1);
    posix_spawn_file_actions_addopen(&actions, 2, "/dev/null", 1, 0);
    if (!posix_spawn(&child, python, &actions, NULL, argv, environ)) {
        close(ends[1]);
        while (have + 1 < room && (got = read(ends[0], answer + have, room - 1 - have)) != 0) {
            if (got < 0 && errno != EINTR)
                break;
            have += got > 0 ? (size_t)got : 0;
        }
        answer[have] = 0;
        answer[strcspn(answer, "\n")] = 0;
        while (waitpid(child, &state, 0) < 0 && errno == EINTR)
            ;
    } else {
        close(ends[1]);
    }
    close(ends[0]);
    posix_spawn_file_actions_destroy(&actions);
}

/* An interpreter of this process, the one that the library was built with or FASTEXIT_PYTHON. */
static int32_t start_interpreter(int quiet)
{
    const char *named = getenv("FASTEXIT_PYTHON"), *python = named && *named ? named : FXP_PYTHON;
    const char *cure = python == named ? "set FASTEXIT_PYTHON to the python that fastexit is installed for"
                                       : "set FASTEXIT_PYTHON, or build again: fastexit embed build";
    char version[64];
    PyConfig config;
    PyStatus status;

    if (access(python, X_OK))
        return fail(FX_E_PYTHON, quiet, "no Python at %s: %s", python, cure);
    ask_version(python, version, sizeof version);
    if (strcmp(version, FXP_PYTHON_VERSION))
        return fail(FX_E_PYTHON, quiet, "%s is %s%s, this library needs Python %s: %s", python,
                    *version ? "Python " : "no Python that runs", version, FXP_PYTHON_VERSION, cure);
    /* Isolated: the host's PYTHONHOME and PYTHONPATH are for other programs, and a wrong one would end the process. */
    PyConfig_InitIsolatedConfig(&config);
    config.pathconfig_warnings = 0;
    status = PyConfig_SetBytesString(&config, &config.program_name, python);
    if (!PyStatus_Exception(status))
        status = Py_InitializeFromConfig(&config);
    PyConfig_Clear(&config);
    if (PyStatus_Exception(status))
        return fail(FX_E_PYTHON, quiet, "Python does not start from %s: %s", python,
                    status.err_msg ? status.err_msg : "no reason given");
    PyEval_SaveThread();
    return FX_OK;
}

/* The line of the exception that is set; it is cleared. */
static void describe_exception(char *line, size_t room)
{
    PyObject *type, *value, *trace, *text = NULL;
    const char *words = NULL;

    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    if (value)
        text = PyObject_Str(value);
    if (text)
        words = PyUnicode_AsUTF8(text);
    snprintf(line, room, "%s", words ? words : "unknown error");
    line[strcspn(line, "\n")] = 0;
    Py_XDECREF(text);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    PyErr_Clear();
}

/* The packages that the first call into Python needs: missing ones are an answer here and a traceback there. */
static int32_t import_packages(int quiet)
{
    static const char *const paths[] = { FXP_PATHS NULL };
    static const char *const needed[] = { "_cffi_backend", "fastexit.embed.host", NULL };
    const char *named = getenv("FASTEXIT_PYTHON");
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject *path = PySys_GetObject("path");
    int32_t status = FX_OK;
    char why[256];

    for (int i = 0; !(named && *named) && path && paths[i]; i++) {
        PyObject *entry = PyUnicode_DecodeFSDefault(paths[i]);

        if (entry && PySequence_Contains(path, entry) == 0)
            PyList_Insert(path, i, entry);
        Py_XDECREF(entry);
        PyErr_Clear();
    }
    for (int i = 0; needed[i]; i++) {
        PyObject *module = PyImport_ImportModule(needed[i]);

        Py_XDECREF(module);
        if (!module) {
            describe_exception(why, sizeof why);
            status = fail(FX_E_PYTHON, quiet,
                          "fastexit cannot be imported by %s: %s; set FASTEXIT_PYTHON to the python it is installed for",
                          named && *named ? named : FXP_PYTHON, why);
            break;
        }
    }
    PyGILState_Release(gil);
    return status;
}

/* Python, kernels and all, once. */
static int32_t start(int quiet)
{
    struct fxp_table fresh = { .size = sizeof fresh, .abi = FX_ABI_VERSION };
    char why[400] = "";
    int32_t status;

    if (started)
        return FX_OK;
    /* Extension modules look for Python's symbols among the global ones, wherever this library was loaded. */
    if (!dlopen(FXP_LIBPYTHON, RTLD_LAZY | RTLD_GLOBAL))
        return fail(FX_E_PYTHON, quiet, "%s cannot be loaded: %s", FXP_LIBPYTHON, dlerror());
    status = Py_IsInitialized() ? FX_OK : start_interpreter(quiet);
    if (status == FX_OK)
        status = import_packages(quiet);
    if (status != FX_OK)
        return status;
    if (cffi_start_python())
        return fail(FX_E_PYTHON, quiet, "Python does not take up libfastexit: build it again: fastexit embed build");
    status = fxp_start(&fresh, why, sizeof why);
    if (status != FX_OK)
        return fail(status, quiet, "%s", why);
    table = fresh;
    started = 1;
    return FX_OK;
}

/* A free place for a machine, whose memory is mapped. Places are used again as late as possible. */
static fx_machine *new_machine(void)
{
    for (uint32_t i = 0; i < MOST_MACHINES; i++) {
        fx_machine *m = &machines[next_machine++ % MOST_MACHINES];
        void *words;

        if (m->words)
            continue;
        words = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (words == MAP_FAILED)
            return NULL;
        *m = (fx_machine){ .words = words };
        return m;
    }
    return NULL;
}

static void discard(fx_machine *m)
{
    munmap(m->words, BYTES);
    m->words = NULL;
}

/* What fx_open and fx_restore have in common, before there is a machine. */
static int32_t check_common(const struct fx_hooks *hooks, fx_machine **machine, const struct fx_ops *ops, int quiet)
{
    int32_t status = FX_OK;

    if (!machine)
        return fail(FX_E_NULL, quiet, "no place for the machine");
    *machine = NULL;
    if (hooks)
        status = check_head("fx_hooks", hooks->size, hooks->abi, sizeof *hooks, quiet);
    if (status == FX_OK && ops)
        status = check_head("fx_ops", ops->size, ops->abi, sizeof *ops, quiet);
    return status;
}

static void hand_out(fx_machine *m, const struct fx_hooks *hooks, fx_machine **machine, struct fx_ops *ops)
{
    if (hooks) {
        m->hooks = *hooks;
        m->hooked = hooks->notify || hooks->wake || hooks->kick || hooks->doorbell;
    }
    if (ops) {
        uint32_t size = ops->size;

        *ops = calls;
        ops->size = size;
    }
    *machine = m;
}

static int32_t boot_x2apic(fx_machine *m, uint64_t *words)
{
    for (uint32_t v = 0; v < words[FX_H_NVCPUS]; v++) {
        uint64_t base = words[FX_KVM + (uint64_t)v * FX_KVM_STRIDE + FX_K_APIC_BASE];

        if (op_set_msr(m, v, 0x1b, base | 0xc00) || op_set_msr(m, v, 0x80f, 0x1ff))
            return FX_E_RANGE;
    }
    return FX_OK;
}

static int32_t open_locked(const struct fx_config *config, fx_machine **made, int quiet)
{
    int32_t status = start(quiet);
    char why[400] = "";
    fx_machine *m;

    if (status != FX_OK)
        return status;
    m = new_machine();
    if (!m)
        return fail(FX_E_MEMORY, quiet, "no memory for a machine, or %d are open", MOST_MACHINES);
    status = fxp_header(config, m->words, why, sizeof why);
    for (uint32_t i = 0; status == FX_OK && i < config->vcpus; i++)
        if (table.create_vcpu(handle(m->words), config->apic_ids ? config->apic_ids[i] : i) == NONE)
            status = FX_E_RANGE;
    if (status == FX_OK && config->flags & FX_BOOT_X2APIC && boot_x2apic(m, m->words)) {
        snprintf(why, sizeof why, "x2APIC cannot be enabled: the guest's CPUID does not offer it (FX_NO_X2APIC)");
        status = FX_E_RANGE;
    }
    if (status != FX_OK) {
        discard(m);
        return fail(status, quiet, "%s", *why ? why : fx_strerror(status));
    }
    *made = m;
    return FX_OK;
}

CFFI_DLLEXPORT int32_t fx_open(const struct fx_config *config, const struct fx_hooks *hooks, fx_machine **machine,
                               struct fx_ops *ops)
{
    int32_t status;
    fx_machine *m;
    int quiet;

    last_error[0] = 0;
    if (machine)
        *machine = NULL;
    if (!config)
        return fail(FX_E_NULL, 0, "no config");
    status = check_head("fx_config", config->size, config->abi, sizeof *config, 0);
    if (status != FX_OK)
        return status;
    quiet = !!(config->flags & FX_QUIET);
    status = check_common(hooks, machine, ops, quiet);
    if (status != FX_OK)
        return status;
    pthread_mutex_lock(&opening);
    status = open_locked(config, &m, quiet);
    if (status == FX_OK)
        hand_out(m, hooks, machine, ops);
    pthread_mutex_unlock(&opening);
    return status;
}

CFFI_DLLEXPORT int32_t fx_restore(const void *snapshot, uint64_t size, const struct fx_hooks *hooks,
                                  fx_machine **machine, struct fx_ops *ops)
{
    char why[400] = "";
    fx_machine *m = NULL;
    int32_t status;

    last_error[0] = 0;
    if (machine)
        *machine = NULL;
    if (!snapshot)
        return fail(FX_E_NULL, 1, "no snapshot");
    status = check_common(hooks, machine, ops, 1);
    if (status != FX_OK)
        return status;
    pthread_mutex_lock(&opening);
    status = start(1);
    if (status == FX_OK) {
        m = new_machine();
        status = m ? fxp_unpack(snapshot, size, m->words, why, sizeof why) : FX_E_MEMORY;
        if (status != FX_OK)
            fail(status, 1, "%s", *why ? why : fx_strerror(status));
    }
    if (status == FX_OK)
        hand_out(m, hooks, machine, ops);
    else if (m)
        discard(m);
    pthread_mutex_unlock(&opening);
    return status;
}

CFFI_DLLEXPORT int32_t fx_close(fx_machine *machine)
{
    int32_t status = FX_E_MACHINE;

    pthread_mutex_lock(&opening);
    if (!machine)
        status = FX_E_NULL;
    else if (words_of(machine)) {
        discard(machine);
        status = FX_OK;
    }
    pthread_mutex_unlock(&opening);
    return status;
}
