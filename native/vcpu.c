/*
 * The guest's CPU, KVM_RUN, and the ioctls of a vCPU.
 */
#include "shim.h"

/* ---------------------------------------------------------------------------------------------------- the guest's CPU */

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
    own = OWN(words, vcpu);
    *cpu = (struct fx_cpu){
        .rip = own[FX_K_RIP],
        .rflags = own[FX_K_RFLAGS],
        .shadow = (uint32_t)own[FX_K_SHADOW],
        .cs = (uint32_t)own[FX_K_CS],
        .mp_state = (uint32_t)own[FX_K_MP_STATE],
        .mode = (uint32_t)__atomic_load_n(&HOT(words, vcpu)[FX_HOT_MODE], __ATOMIC_ACQUIRE),
        .injected = (uint32_t)own[FX_K_INTERRUPT],
        .exited = (uint32_t)own[FX_K_USER_EXIT],
        .nmi_masked = !!own[FX_K_NMI_MASKED],
        .real_mode = !!(own[FX_K_HFLAGS] & FX_HF_REAL_MODE),
        .smm = !!(own[FX_K_HFLAGS] & FX_HF_SMM),
        .cr8 = words[FX_PAGE + (uint64_t)vcpu * FX_PAGE_STRIDE + FXP_APIC_TASKPRI / 8] >> 4 & 0xf,
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
    if (cpu->shadow > 3 || cpu->nmi_masked > 1 || cpu->real_mode > 1)
        return FX_E_RANGE;
    own = OWN(words, vcpu);
    own[FX_K_RIP] = cpu->rip;
    own[FX_K_RFLAGS] = cpu->rflags;
    own[FX_K_SHADOW] = cpu->shadow;
    if (own[FX_K_NMI_MASKED] && !cpu->nmi_masked && (is_svm(words) || own[FX_K_NMI_WINDOW])) /* an IRET: look again */
        __atomic_fetch_or(&HOT(words, vcpu)[FX_HOT_REQUESTS], FXP_REQ_EVENT, __ATOMIC_SEQ_CST);
    own[FX_K_NMI_MASKED] = cpu->nmi_masked;
    own[FX_K_HFLAGS] = (own[FX_K_HFLAGS] & ~(uint64_t)FX_HF_REAL_MODE) | (cpu->real_mode ? FX_HF_REAL_MODE : 0);
    return FX_OK;
}

static int32_t op_enter(fx_machine *m, uint32_t vcpu, struct fx_result *out)
{
    uint64_t *words = words_of(m);

    if (!words || !out)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    return put_exit(m, words, out, table.door_run(handle(words), vcpu), 0, vcpu, 0);
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
    exit = (struct fx_exit){ vcpu, is_svm(words) ? FXP_SVM_INTERRUPT : FXP_VMX_EXTERNAL_INTERRUPT, 0, 0, 0, 0 };
    return one(m, words, &exit, out);
}

/* Whether the guest's CPU takes maskable interrupts now. */
static int takes_interrupts(const uint64_t *own)
{
    return own[FX_K_RFLAGS] & FXP_RFLAGS_IF && !own[FX_K_SHADOW] && !(own[FX_K_HFLAGS] & FX_HF_GIF_CLEAR);
}

static uint64_t *went_in(uint64_t *words, uint32_t vcpu)
{
    return words + FX_IRQ + (uint64_t)vcpu * FX_IRQ_STRIDE + FX_IRQ_WENT_IN;
}

/* What happened between two instructions is told, and there may be more. */
static int32_t more(struct fx_result *out, int32_t status)
{
    return status < 0 || status == FX_UNHANDLED ? status : (out->status = FX_MORE);
}

static int32_t op_settle(fx_machine *m, uint32_t vcpu, struct fx_result *out)
{
    uint64_t *words = words_of(m), *own, mode, code;
    int32_t status;

    if (!words || !out)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    own = OWN(words, vcpu);
    mode = __atomic_load_n(&HOT(words, vcpu)[FX_HOT_MODE], __ATOMIC_ACQUIRE);
    if (*went_in(words, vcpu))
        return put(out, 0, 0, vcpu, FX_NOBODY, 0);
    if (!mode) {
        status = op_enter(m, vcpu, out);
        return status > 0 && !*went_in(words, vcpu) ? status : more(out, status);
    }
    if (mode == 2) /* told to leave */
        return more(out, op_reenter(m, vcpu, out));
    if (own[FX_K_IRQ_WINDOW] && takes_interrupts(own)) {
        code = table.door_window(handle(words), vcpu, 0);
    } else if (own[FX_K_NMI_WINDOW] && !own[FX_K_NMI_MASKED] && !own[FX_K_SHADOW] &&
               !(own[FX_K_HFLAGS] & FX_HF_GIF_CLEAR)) {
        code = table.door_window(handle(words), vcpu, 1);
    } else {
        table.process_notification(handle(words), vcpu);
        return put(out, 0, 0, vcpu, FX_NOBODY, 0);
    }
    if (code == NONE)
        return FX_UNHANDLED;
    return more(out, put_exit(m, words, out, code, 0, vcpu, 0));
}

static int32_t op_take(fx_machine *m, uint32_t vcpu, struct fx_event *event)
{
    uint64_t *words = words_of(m), word, *own;

    if (!words || !event)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    own = OWN(words, vcpu);
    word = table.take_event(handle(words), vcpu);
    if (!word) {
        uint64_t runs = __atomic_load_n(&HOT(words, vcpu)[FX_HOT_MODE], __ATOMIC_ACQUIRE);

        if (!runs || !(HOT(words, vcpu)[FX_HOT_FLAGS] & FX_FLAG_APICV) || !takes_interrupts(own))
            return FX_NOTHING;
        word = (is_svm(words) ? table.ack : table.deliver_pending)(handle(words), vcpu);
        if (word == NONE)
            return FX_NOTHING;
        word |= FX_EVENT_INTERRUPT << 8;
    }
    *event = (struct fx_event){ (uint32_t)(word >> 8), word & 0xff };
    return FX_OK;
}

/* ------------------------------------------------------------------------------------------------- user space's ioctls */

static int32_t op_set_msr(fx_machine *m, uint32_t vcpu, uint32_t msr, uint64_t value)
{
    uint64_t *words = words_of(m);

    if (!words)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    return set_msr(words, vcpu, msr, value);
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
    *value = OWN(words, vcpu)[FX_K_MSR_DATA];
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
    if (table.get_state(handle(words), vcpu) & CODE_FAULT)
        return FX_E_RANGE;
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

static int32_t op_nmi(fx_machine *m, uint32_t vcpu)
{
    uint64_t *words = words_of(m);

    if (!words)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    table.door_leave(handle(words), vcpu);
    table.queue_nmi(handle(words), vcpu);
    return FX_OK;
}

static int32_t op_smi(fx_machine *m, uint32_t vcpu)
{
    uint64_t *words = words_of(m);

    if (!words)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    return table.door_smi(handle(words), vcpu) & CODE_FAULT ? FX_E_RANGE : FX_OK;
}

static int32_t op_interrupt(fx_machine *m, uint32_t vcpu, uint32_t vector)
{
    uint64_t *words = words_of(m);

    if (!words)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    if (vector > 0xff)
        return FX_E_RANGE;
    return table.door_interrupt(handle(words), vcpu, vector) & CODE_FAULT ? FX_E_RANGE : FX_OK;
}

static int32_t op_rsm(fx_machine *m, uint32_t vcpu)
{
    uint64_t *words = words_of(m);

    if (!words)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    return table.door_rsm(handle(words), vcpu) & CODE_FAULT ? FX_NOTHING : FX_OK;
}

static int32_t op_enable_synic(fx_machine *m, uint32_t vcpu, uint32_t version)
{
    uint64_t *words = words_of(m);

    if (!words)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    if (version < 1 || version > 2 || !(words[FX_H_CONFIG] & FX_CONFIG_KVM_HYPERV))
        return FX_E_RANGE;
    table.door_leave(handle(words), vcpu);
    table.enable_synic(handle(words), vcpu, version == 2);
    return FX_OK;
}

/* Whether the last KVM_EXIT_HYPERV is still there to be looked at. */
static int asks(const uint64_t *hv)
{
    return hv[FX_HV_EXIT_TYPE] == FX_HV_EXIT_HCALL ? !!hv[FX_HV_CALL_LENGTH] : hv[FX_HV_EXIT_TYPE] == FX_HV_EXIT_SYNIC;
}

static int32_t op_get_hv_exit(fx_machine *m, uint32_t vcpu, struct fx_hv_exit *exit)
{
    uint64_t *words = words_of(m), *hv;

    if (!words || !exit)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    hv = HV(words, vcpu);
    memset(exit, 0, sizeof *exit);
    exit->system_event = (uint32_t)hv[FX_HV_SYSTEM_EVENT];
    if (!asks(hv))
        return exit->system_event ? FX_OK : FX_NOTHING;
    exit->type = (uint32_t)hv[FX_HV_EXIT_TYPE];
    exit->msr = exit->type == FX_HV_EXIT_SYNIC ? (uint32_t)hv[FX_HV_EXIT_MSR] : 0;
    exit->control = hv[exit->type == FX_HV_EXIT_SYNIC ? FX_HV_EXIT_CONTROL : FX_HV_EXIT_MSR];
    exit->params[0] = hv[FX_HV_EXIT_EVT_PAGE];
    exit->params[1] = hv[FX_HV_EXIT_MSG_PAGE];
    return FX_OK;
}

static int32_t op_complete_hypercall(fx_machine *m, uint32_t vcpu, uint64_t value)
{
    uint64_t *words = words_of(m);

    if (!words)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    if (!HV(words, vcpu)[FX_HV_CALL_LENGTH])
        return FX_NOTHING;
    HV(words, vcpu)[FX_HV_EXIT_CONTROL] = value;
    return FX_OK;
}
