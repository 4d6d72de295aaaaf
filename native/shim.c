/*
 * libfastexit's own C: checks of what comes from outside, and the way from a checked call into compiled kernels.
 *
 * A machine's memory is mapped here and lies in one block, whose address is all that a kernel takes. Python starts in
 * fx_open, fills the table of kernel addresses once, writes the header of each new machine, and is not needed again.
 *
 * The parts are one unit for the compiler: they are included at the end, because cffi writes one C file around them.
 * Builds define FXP_VERSION and what python.c names.
 */
#include <stdarg.h>
#include <stdio.h>
#include "shim.h"

static _Thread_local char last_error[512];

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

static int32_t start(int quiet);

#include "trace.c"
#include "exits.c"
#include "hardware.c"
#include "vcpu.c"
#include "clock.c"
#include "chips.c"
#include "memory.c"
#include "python.c"
#include "open.c"
#include "calls.c"
