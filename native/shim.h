/*
 * What the parts of libfastexit's own C share: the kernels' table, an open machine, the front of every call.
 *
 * Kernels check indices and believe everything else, so everything else is checked here, before one is called.
 */
#ifndef FASTEXIT_SHIM_H
#define FASTEXIT_SHIM_H

#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include "fastexit.h"

/* cffi:begin */
enum {
    FXP_MSR_X2APIC_ICR = 0x830,
    FXP_MSR_HV_ICR = 0x40000071,
    FXP_APIC_ICR = 0x300,
    FXP_APIC_TASKPRI = 0x80,
    FXP_RFLAGS_IF = 0x200,
    FXP_REQ_EVENT = 0x4000,
    FXP_LAPIC_PAGE_BYTES = 0x400,
    FXP_APIC_PAGE_BYTES = 0x1000,
    FXP_PIT_STATE_BYTES = 72,
    FXP_PIT_STATE2_BYTES = 112,
    FXP_X2API_32BIT_IDS = 1,
    FXP_VMX_EXTERNAL_INTERRUPT = 1,
    FXP_VMX_VMCALL = 18,
    FXP_VMX_IO_INSTRUCTION = 30,
    FXP_VMX_MSR_READ = 31,
    FXP_VMX_MSR_WRITE = 32,
    FXP_VMX_EPT_MISCONFIG = 49,
    FXP_VMX_PREEMPTION_TIMER = 52,
    FXP_SVM_INTERRUPT = 0x60,
    FXP_SVM_IO = 0x7b,
    FXP_SVM_MSR = 0x7c,
    FXP_SVM_VMMCALL = 0x81,
    FXP_SVM_NPF = 0x400
};

/* Addresses of kernel entries; each takes 64-bit integers and returns one. */
struct fxp_table {
    uint32_t size;
    uint32_t abi;
    uint64_t (*door_ipi)(uint64_t handle_and_vcpu, uint64_t icr);
    uint64_t (*run)(uint64_t handle, uint64_t exits, uint64_t outcomes, uint64_t first, uint64_t n);
    uint64_t (*first_bad)(uint64_t handle, uint64_t exits, uint64_t n);
    uint64_t (*signal_msi)(uint64_t handle, uint64_t address, uint64_t data, uint64_t sender);
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
    uint64_t (*door_hypercall)(uint64_t handle, uint64_t v, uint64_t control, uint64_t given, uint64_t output);
    uint64_t (*enable_synic)(uint64_t handle, uint64_t v, uint64_t keeps);
    uint64_t (*hv_sint_line)(uint64_t handle, uint64_t gsi, uint64_t level, uint64_t vp_index, uint64_t sint,
                             uint64_t sender);
    uint64_t (*irq_line)(uint64_t handle, uint64_t gsi, uint64_t level, uint64_t line_status, uint64_t sender);
    uint64_t (*rerouted)(uint64_t handle, uint64_t sender);
    uint64_t (*irqfd_signal)(uint64_t handle, uint64_t gsi, uint64_t resample, uint64_t sender);
    uint64_t (*irqfd_resample)(uint64_t handle, uint64_t gsi, uint64_t on, uint64_t sender);
    uint64_t (*get_irqchip)(uint64_t handle, uint64_t chip);
    uint64_t (*set_irqchip)(uint64_t handle, uint64_t chip, uint64_t sender);
    uint64_t (*create_pit)(uint64_t handle, uint64_t speaker);
    uint64_t (*get_pit)(uint64_t handle);
    uint64_t (*set_pit)(uint64_t handle, uint64_t with_flags);
    uint64_t (*queue_nmi)(uint64_t handle, uint64_t v);
    uint64_t (*door_smi)(uint64_t handle, uint64_t v);
    uint64_t (*door_interrupt)(uint64_t handle, uint64_t v, uint64_t vector);
    uint64_t (*door_rsm)(uint64_t handle, uint64_t v);
    uint64_t (*door_access)(uint64_t handle, uint64_t v, uint64_t access, uint64_t where, uint64_t length,
                            uint64_t value);
    uint64_t (*deliver_pending)(uint64_t handle, uint64_t v);
    uint64_t (*door_window)(uint64_t handle, uint64_t v, uint64_t nmi);
    uint64_t (*take_event)(uint64_t handle, uint64_t v);
    uint64_t (*advance_clock)(uint64_t handle, uint64_t ns);
    uint64_t (*due_timer_of)(uint64_t handle, uint64_t v);
    uint64_t (*hv_timer_exits)(uint64_t handle, uint64_t v);
    uint64_t (*next_timer_of)(uint64_t handle, uint64_t v);
    uint64_t (*run_machine_timer)(uint64_t handle, uint64_t sender);
    uint64_t (*next_machine_timer)(uint64_t handle);
};
/* cffi:end */

/* What Python does: 0, or a status with a line that says why. */
CFFI_DLLEXPORT int32_t fxp_start(struct fxp_table *table, char *line, uint32_t room);
CFFI_DLLEXPORT int32_t fxp_header(const struct fx_config *config, uint64_t *words, char *line, uint32_t room);
CFFI_DLLEXPORT int32_t fxp_unpack(const void *data, uint64_t size, uint64_t *words, char *line, uint32_t room);
CFFI_DLLEXPORT int32_t fxp_costs(uint64_t *words, const char *costs, char *line, uint32_t room);
CFFI_DLLEXPORT int32_t fxp_text(uint64_t *words, const struct fx_trace *record, char *line, uint32_t room);

#define NONE UINT64_MAX
#define MMIO_WRITE (1u << 31)
#define VMX_IO_IN (1u << 3) /* of the exit qualification: bits 2:0 length - 1, 31:16 port */
#define SVM_IO_IN (1u << 0) /* of EXITINFO1: bits 6:4 length, 31:16 port */
#define BYTES ((size_t)FX_WORDS * 8)
#define MOST_MACHINES 4096

#define CODE_FAULT 0x0000000000ff0000ull
#define CODE_USER 0x00ff000000000000ull
#define CODE_EFFECTS 0x0f00000000000000ull
#define CODE_BLOCKED 0x4000000000000000ull
#define EFFECTS_SHIFT 56

/* outcome.TARGETS: what a sender's list begins with; the low 16 bits are a target in the rest of it, too. */
#define TARGETS_VCPU 0xfffu
#define TARGETS_EFFECT_SHIFT 12
#define TARGETS_COUNT_SHIFT 32

#define HOT(words, v) ((words) + FX_HOT + (uint64_t)(v)*FX_HOT_STRIDE)
#define OWN(words, v) ((words) + FX_KVM + (uint64_t)(v)*FX_KVM_STRIDE)
#define METER(words, v) ((words) + FX_METER + (uint64_t)(v)*FX_METER_STRIDE)
#define HV(words, v) ((words) + FX_HV + (uint64_t)(v)*FX_HV_STRIDE)

struct fx_machine {
    uint64_t *words; /* atomic; NULL: closed, or not yet open */
    struct fx_hooks hooks;
    uint32_t hooked;
    uint32_t taken; /* atomic; 1 from before its memory is there until that has gone */
} __attribute__((aligned(64)));
_Static_assert(sizeof(struct fx_machine) == 64, "words_of() shifts by 6");

#define MAGIC "FXSNAP\0"

/* What a snapshot begins with; the words of the machine's parts follow. */
struct head {
    char magic[8];
    uint32_t abi, vcpus, crc, bytes;
};

static struct fx_machine machines[MOST_MACHINES];
static struct fxp_table table;

/* Memory of an open machine; NULL for everything else, of which nothing is read. */
static inline uint64_t *words_of(const struct fx_machine *m)
{
    uint64_t at = (uint64_t)((uintptr_t)m - (uintptr_t)machines);

    if ((at >> 6 | at << 58) >= MOST_MACHINES) /* bits of a wrong alignment are the highest ones now */
        return NULL;
    return __atomic_load_n(&m->words, __ATOMIC_ACQUIRE);
}

/* Why a call with a machine and a pointer of the host's cannot be done. */
static __attribute__((noinline, cold)) int32_t refuse(const struct fx_machine *m)
{
    return m && !words_of(m) ? FX_E_MACHINE : FX_E_NULL;
}

static inline uint64_t handle(const void *memory)
{
    return (uint64_t)(uintptr_t)memory;
}

/* Guest-physical address of a vCPU's xAPIC page. */
static inline uint64_t page_of(const uint64_t *words, uint64_t v)
{
    return OWN(words, v)[FX_K_APIC_BASE] & ~0xfffull;
}

static inline int is_svm(const uint64_t *words)
{
    return words[FX_H_CONFIG] & FX_CONFIG_SVM;
}

/* User space may write an MSR of any vCPU, which leaves the guest for it. */
static inline int32_t set_msr(uint64_t *words, uint32_t vcpu, uint32_t msr, uint64_t value)
{
    table.door_leave(handle(words), vcpu);
    return table.set_msr(handle(words), vcpu, msr, value) & CODE_FAULT ? FX_E_RANGE : FX_OK;
}

#endif
