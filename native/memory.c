/*
 * A machine's memory as the host gets it: bytes of all of it, and regions that it shares.
 */
#include "shim.h"

/* ----------------------------------------------------------------------------------------------------------- snapshot */

struct rows {
    uint64_t first, words;
};

static uint32_t crc_table[256];

/* Before any machine is open. */
static void make_crc_table(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;

        for (int bit = 0; bit < 8; bit++)
            c = c >> 1 ^ (c & 1 ? 0xedb88320u : 0);
        crc_table[i] = c;
    }
}

/* CRC-32 as zlib has it. */
static uint32_t crc32_of(const unsigned char *bytes, uint64_t n)
{
    uint32_t crc = ~0u;

    for (; n; n--)
        crc = crc >> 8 ^ crc_table[(crc ^ *bytes++) & 0xff];
    return ~crc;
}

static int32_t op_snapshot(fx_machine *m, void *buffer, uint64_t size, uint64_t *needed)
{
    uint64_t *words = words_of(m), n, bytes = 0, config;
    struct head head = { MAGIC, FX_ABI_VERSION, 0, 0, 0 };
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
        { FX_HV, n * FX_HV_STRIDE },
        { FX_IOAPIC, FX_ROUTES - FX_IOAPIC },
        { FX_ROUTE_GSIS, FX_RESAMPLERS - FX_ROUTE_GSIS },
        { FX_IRQ, n * FX_IRQ_STRIDE },
        { FX_TSC, n * FX_TSC_STRIDE },
        { FX_TSC_LAST_NSEC, FX_TSC_WORDS },
        { FX_ROUTE_FIRST, words[FX_ROUTE_GSIS] + 1 }, /* and of the routes as many as it says */
        { FX_ROUTES, words[FX_ROUTE_FIRST + words[FX_ROUTE_GSIS]] * FX_ROUTE_STRIDE },
    };
    enum { PARTS = sizeof rows / sizeof *rows, OWN_WORDS = 5 };

    for (unsigned i = 0; i < PARTS; i++)
        bytes += rows[i].words * 8;
    *needed = sizeof head + bytes;
    if (!buffer)
        return FX_OK;
    if (size < *needed)
        return FX_E_SIZE;
    at += sizeof head;
    for (unsigned i = 0; i < PARTS; i++) {
        memcpy(at, words + rows[i].first, rows[i].words * 8);
        for (uint64_t v = 0; i == OWN_WORDS && v < n; v++) /* lists of targets are in no snapshot */
            memset(at + (v * FX_KVM_STRIDE + FX_K_TARGETS) * 8, 0, 8);
        at += rows[i].words * 8;
    }
    at = (unsigned char *)buffer + sizeof head; /* nor is the guest's memory */
    memcpy(&config, at + FX_H_CONFIG * 8, 8); /* nor prices, nor the tracer */
    config &= ~(uint64_t)(FX_CONFIG_COSTS | (tracers[m - machines].call ? FX_CONFIG_TRACE : 0));
    memcpy(at + FX_H_CONFIG * 8, &config, 8);
    memset(at + FX_H_GUEST_MEMORY * 8, 0, 8);
    memset(at + FX_H_GUEST_BYTES * 8, 0, 8);
    head.vcpus = (uint32_t)n;
    head.bytes = (uint32_t)bytes;
    head.crc = crc32_of((unsigned char *)buffer + sizeof head, bytes);
    memcpy(buffer, &head, sizeof head);
    return FX_OK;
}

static int32_t op_set_guest_memory(fx_machine *m, void *memory, uint64_t bytes)
{
    uint64_t *words = words_of(m);

    if (!words || (!memory && bytes))
        return refuse(m);
    if (memory && (bytes < FXP_APIC_PAGE_BYTES || handle(memory) + bytes < bytes))
        return FX_E_SIZE;
    words[FX_H_GUEST_MEMORY] = handle(memory);
    words[FX_H_GUEST_BYTES] = bytes / FXP_APIC_PAGE_BYTES * FXP_APIC_PAGE_BYTES;
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

