/*
 * What the guest's CPU does with its APIC, by itself or by the exit that it makes of it.
 */
#include "shim.h"

/* The numbers of kernels/instruction.py. */
enum { HW_WRMSR, HW_RDMSR, HW_MMIO_WRITE, HW_MMIO_READ, HW_CR8 };

static int32_t executed(fx_machine *m, uint32_t vcpu, uint32_t access, uint64_t where, uint32_t length, uint64_t value,
                        uint32_t vector, struct fx_result *out)
{
    uint64_t *words = words_of(m), code, read = 0;

    if (!words || !out)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    if (length && ((length != 1 && length != 2 && length != 4) || where > 0xfff || value >> 8 * length))
        return FX_E_RANGE;
    code = table.door_access(handle(words), vcpu, access, where, length, value);
    if (code == NONE)
        return FX_UNHANDLED;
    if (access == HW_RDMSR || access == HW_MMIO_READ)
        read = code & CODE_FAULT ? 0 : OWN(words, vcpu)[FX_K_MSR_DATA];
    return put_exit(m, words, out, code, read, vcpu, vector);
}

static int32_t op_hw_wrmsr(fx_machine *m, uint32_t vcpu, uint32_t msr, uint64_t value, struct fx_result *out)
{
    return executed(m, vcpu, HW_WRMSR, msr, 0, value, msr == FXP_MSR_X2APIC_ICR ? value & 0xff : 0, out);
}

static int32_t op_hw_rdmsr(fx_machine *m, uint32_t vcpu, uint32_t msr, struct fx_result *out)
{
    return executed(m, vcpu, HW_RDMSR, msr, 0, 0, 0, out);
}

/* Length 0 is no access to the page, and 8 is too long for it: neither is taken for an MSR. */
static uint32_t page_length(uint32_t length)
{
    return length ? length : UINT32_MAX;
}

static int32_t op_hw_mmio_write(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length, uint32_t value,
                                struct fx_result *out)
{
    return executed(m, vcpu, HW_MMIO_WRITE, offset, page_length(length), value,
                    (offset & ~15u) == FXP_APIC_ICR ? value & 0xff : 0, out);
}

static int32_t op_hw_mmio_read(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length, struct fx_result *out)
{
    return executed(m, vcpu, HW_MMIO_READ, offset, page_length(length), 0, 0, out);
}

/* A vector that a kernel names. */
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

static int32_t op_hw_cr8(fx_machine *m, uint32_t vcpu, uint64_t value, struct fx_result *out)
{
    return executed(m, vcpu, HW_CR8, 0, 0, value, 0, out);
}

static int32_t op_hw_deliver(fx_machine *m, uint32_t vcpu, uint32_t *vector)
{
    return vector_by(table.deliver_pending, m, vcpu, vector);
}
