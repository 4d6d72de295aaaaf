/*
 * A machine's beginning and end: the structs that the host gives, its place and memory, fx_open, fx_restore, fx_close.
 */
#include <stdio.h>
#include <sys/mman.h>
#include "shim.h"

static const struct fx_ops calls; /* calls.c */

/* ------------------------------------------------------------------------------------------------ structs that grow */

/* What size and abi say that a struct of the host's has, from its first version on. */
static int32_t check_head(const char *what, uint32_t size, uint32_t abi, uint32_t least, int quiet)
{
    if (size < least || size > 4096)
        return fail(FX_E_SIZE, quiet, "%s.size is %u: set it to sizeof(struct %s), here %u", what, size, what, least);
    if (abi != FX_ABI_VERSION)
        return fail(FX_E_ABI, quiet, "%s.abi is %u, this library has %u: build the host with its own fastexit.h", what,
                    abi, (unsigned)FX_ABI_VERSION);
    return FX_OK;
}

/* The host's struct as this library knows it: what an older header lacks is 0, what only a newer one has must be 0. */
static int32_t take_struct(const char *what, void *ours, uint32_t known, const void *given, uint32_t least, int quiet)
{
    const unsigned char *bytes = given;
    uint32_t head[2];
    int32_t status;

    memcpy(head, given, sizeof head);
    status = check_head(what, head[0], head[1], least, quiet);
    if (status != FX_OK)
        return status;
    for (uint32_t i = known; i < head[0]; i++)
        if (bytes[i])
            return fail(FX_E_SIZE, quiet, "%s has a field that this library does not know, behind byte %u", what, known);
    memset(ours, 0, known);
    memcpy(ours, given, head[0] < known ? head[0] : known);
    return FX_OK;
}

/* The first versions end with these. */
enum {
    LEAST_CONFIG = offsetof(struct fx_config, hv_features) + sizeof(uint32_t),
    LEAST_HOOKS = offsetof(struct fx_hooks, doorbell) + sizeof(void *),
    LEAST_OPS = offsetof(struct fx_ops, close) + sizeof(void *)
};

/* What fx_open and fx_restore have in common, before there is a machine. */
static int32_t take_common(const struct fx_hooks *hooks, struct fx_hooks *ours, fx_machine **machine,
                           const struct fx_ops *ops, int quiet)
{
    int32_t status = FX_OK;

    if (!machine)
        return fail(FX_E_NULL, quiet, "no place for the machine");
    memset(ours, 0, sizeof *ours);
    if (hooks)
        status = take_struct("fx_hooks", ours, sizeof *ours, hooks, LEAST_HOOKS, quiet);
    if (status == FX_OK && ops)
        status = check_head("fx_ops", ops->size, ops->abi, LEAST_OPS, quiet);
    return status;
}

/* The calls as far as the host has room for them; those that only its header knows are NULL. */
static void give_calls(struct fx_ops *ops)
{
    uint32_t size = ops->size, known = size < sizeof calls ? size : sizeof calls;

    memcpy(ops, &calls, known);
    ops->size = size;
    memset((unsigned char *)ops + known, 0, size - known);
}

/* ----------------------------------------------------------------------------------------------------- place and memory */

/* A free place, by an atomic exchange: no lock, so a fork or a finalizer finds none held. Used again as late as possible. */
static fx_machine *take_place(void)
{
    static uint32_t next;

    for (uint32_t i = 0; i < MOST_MACHINES; i++) {
        fx_machine *m = &machines[__atomic_fetch_add(&next, 1, __ATOMIC_RELAXED) % MOST_MACHINES];

        if (!__atomic_exchange_n(&m->taken, 1, __ATOMIC_ACQUIRE))
            return m;
    }
    return NULL;
}

static void give_back(fx_machine *m, uint64_t *words)
{
    set_tracer(m, NULL, NULL);
    if (words)
        munmap(words, BYTES);
    __atomic_store_n(&m->taken, 0, __ATOMIC_RELEASE);
}

static int32_t boot_x2apic(uint64_t *words)
{
    for (uint32_t v = 0; v < words[FX_H_NVCPUS]; v++) {
        if (set_msr(words, v, 0x1b, OWN(words, v)[FX_K_APIC_BASE] | 0xc00) || set_msr(words, v, 0x80f, 0x1ff))
            return FX_E_RANGE;
        OWN(words, v)[FX_K_HFLAGS] &= ~(uint64_t)FX_HF_REAL_MODE;
    }
    return FX_OK;
}

static int32_t create(const struct fx_config *config, uint64_t *words, char *why, uint32_t room)
{
    int32_t status = fxp_header(config, words, why, room);

    for (uint32_t i = 0; status == FX_OK && i < config->vcpus; i++)
        if (table.create_vcpu(handle(words), config->apic_ids ? config->apic_ids[i] : i) == NONE)
            status = FX_E_RANGE;
    if (status == FX_OK && config->flags & FX_BOOT_X2APIC && boot_x2apic(words)) {
        snprintf(why, room, "x2APIC cannot be enabled: the guest's CPUID does not offer it (FX_NO_X2APIC)");
        status = FX_E_RANGE;
    }
    return status;
}

/* A machine by its config or, without one, from a snapshot; others see it when it is whole. */
static int32_t make(const struct fx_config *config, const void *snapshot, uint64_t size, const struct fx_hooks *hooks,
                    fx_machine **machine, int quiet)
{
    int32_t status = start(quiet);
    char why[400] = "";
    uint64_t *words;
    fx_machine *m;

    if (status != FX_OK)
        return status;
    m = take_place();
    if (!m)
        return fail(FX_E_MEMORY, quiet, "%d machines are open, and there can be no more", MOST_MACHINES);
    words = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (words == MAP_FAILED) {
        give_back(m, NULL);
        return fail(FX_E_MEMORY, quiet, "no memory for a machine");
    }
    status = config ? create(config, words, why, sizeof why) : fxp_unpack(snapshot, size, words, why, sizeof why);
    if (status != FX_OK) {
        give_back(m, words);
        return fail(status, quiet, "%s", *why ? why : fx_strerror(status));
    }
    words[FX_H_CONFIG] &= ~(uint64_t)FX_CONFIG_TRACE; /* which Python had on; here nobody would read it */
    m->hooks = *hooks;
    m->hooked = hooks->notify || hooks->wake || hooks->kick || hooks->doorbell;
    __atomic_store_n(&m->words, words, __ATOMIC_RELEASE);
    *machine = m;
    return FX_OK;
}

/* ------------------------------------------------------------------------------------------------------ open and close */

CFFI_DLLEXPORT int32_t fx_open(const struct fx_config *config, const struct fx_hooks *hooks, fx_machine **machine,
                               struct fx_ops *ops)
{
    struct fx_config ours;
    struct fx_hooks called;
    int32_t status;
    int quiet;

    last_error[0] = 0;
    if (machine)
        *machine = NULL;
    if (!config)
        return fail(FX_E_NULL, 0, "no config");
    status = take_struct("fx_config", &ours, sizeof ours, config, LEAST_CONFIG, 0);
    if (status != FX_OK)
        return status;
    quiet = !!(ours.flags & FX_QUIET);
    status = take_common(hooks, &called, machine, ops, quiet);
    if (status == FX_OK)
        status = make(&ours, NULL, 0, &called, machine, quiet);
    if (status == FX_OK && ops)
        give_calls(ops);
    return status;
}

static int32_t op_set_costs(fx_machine *m, const char *costs)
{
    uint64_t *words = words_of(m);
    char why[400] = "";
    int32_t status;

    last_error[0] = 0;
    if (!words)
        return refuse(m);
    status = start(1);
    if (status == FX_OK)
        status = fxp_costs(words, costs, why, sizeof why);
    return status == FX_OK ? FX_OK : fail(status, 1, "%s", *why ? why : fx_strerror(status));
}

/* Python copies as many bytes as the host says; no more may be read than the snapshot itself says that it has. */
static int32_t check_length(const void *snapshot, uint64_t size)
{
    struct head head;

    if (size < sizeof head)
        return FX_OK; /* truncated, which Python says */
    memcpy(&head, snapshot, sizeof head);
    if (memcmp(head.magic, MAGIC, sizeof head.magic))
        return fail(FX_E_SNAPSHOT, 1, "not a fastexit snapshot");
    if (size - sizeof head > head.bytes || head.bytes > BYTES)
        return fail(FX_E_SNAPSHOT, 1, "snapshot is too long: %llu bytes behind its head, which says %u",
                    (unsigned long long)(size - sizeof head), head.bytes);
    return FX_OK;
}

CFFI_DLLEXPORT int32_t fx_restore(const void *snapshot, uint64_t size, const struct fx_hooks *hooks,
                                  fx_machine **machine, struct fx_ops *ops)
{
    struct fx_hooks called;
    int32_t status;

    last_error[0] = 0;
    if (machine)
        *machine = NULL;
    if (!snapshot)
        return fail(FX_E_NULL, 1, "no snapshot");
    status = take_common(hooks, &called, machine, ops, 1);
    if (status == FX_OK)
        status = check_length(snapshot, size);
    if (status == FX_OK)
        status = make(NULL, snapshot, size, &called, machine, 1);
    if (status == FX_OK && ops)
        give_calls(ops);
    return status;
}

CFFI_DLLEXPORT int32_t fx_close(fx_machine *machine)
{
    uint64_t *words;

    if (!machine)
        return FX_E_NULL;
    if (!words_of(machine))
        return FX_E_MACHINE;
    words = __atomic_exchange_n(&machine->words, NULL, __ATOMIC_ACQ_REL);
    if (!words) /* another thread has closed it in between */
        return FX_E_MACHINE;
    give_back(machine, words);
    return FX_OK;
}
