/*
 * The irqchip as devices and user space reach it: lines, the GSI routing table, irqfds, states of IOAPIC, PICs and PIT.
 */
#include "shim.h"

#define CHIP_BYTES 512 /* struct kvm_irqchip without its number */

/* --------------------------------------------------------------------------------------------------------------- lines */

static int32_t op_irq_line(fx_machine *m, uint32_t gsi, uint32_t level, struct fx_result *out)
{
    uint64_t *words = words_of(m), row;

    if (!words || !out)
        return refuse(m);
    row = take_row(words);
    return sent(m, words, row, table.irq_line(handle(words), gsi, level, 1, FX_HOST + row), 0, out);
}

static int32_t op_irqfd_signal(fx_machine *m, uint32_t gsi, uint32_t resample, struct fx_result *out)
{
    uint64_t *words = words_of(m), row;

    if (!words || !out)
        return refuse(m);
    row = take_row(words);
    return sent(m, words, row, table.irqfd_signal(handle(words), gsi, !!resample, FX_HOST + row), 0, out);
}

/* Words of a GSI's resamplers; NULL where it can have none. */
static uint64_t *resamplers(uint64_t *words, uint32_t gsi)
{
    if (gsi >= FX_MAX_ROUTES || words[FX_H_CONFIG] & FX_CONFIG_SPLIT_IRQCHIP)
        return NULL;
    return words + FX_RESAMPLERS + (uint64_t)gsi * FX_RESAMPLER_STRIDE;
}

/* What an ioctl of the VM has sent, by the host's first row. */
static int32_t end_ioctl(fx_machine *m, const uint64_t *words, uint64_t code)
{
    struct fx_result unseen;

    tell(m, words, FX_HOST, code & CODE_EFFECTS, &unseen);
    return FX_OK;
}

static int32_t op_irqfd_resample(fx_machine *m, uint32_t gsi, uint32_t on)
{
    uint64_t *words = words_of(m), *row;

    if (!words)
        return refuse(m);
    row = resamplers(words, gsi);
    if (!row || (!on && !*row))
        return FX_E_RANGE;
    return end_ioctl(m, words, table.irqfd_resample(handle(words), gsi, !!on, FX_HOST));
}

static int32_t op_irqfd_resampled(fx_machine *m, uint32_t gsi, uint64_t *count)
{
    uint64_t *words = words_of(m), *row;

    if (!words || !count)
        return refuse(m);
    row = resamplers(words, gsi);
    if (!row)
        return FX_E_RANGE;
    *count = __atomic_load_n(&row[FX_RESAMPLER_SIGNALS], __ATOMIC_RELAXED);
    return FX_OK;
}

/* ------------------------------------------------------------------------------------------------------ the routing table */

/* Which of a GSI's chips a route is to, a bit each; what must be a GSI's only route has all of them; 0: no such route. */
static uint32_t chips_of(const uint64_t *words, const struct fx_route *route)
{
    enum { ALONE = 7 };
    int split = !!(words[FX_H_CONFIG] & FX_CONFIG_SPLIT_IRQCHIP);

    switch (route->kind) {
    case FX_ROUTE_IOAPIC:
        return split || route->data || route->address >= FX_IOAPIC_PINS ? 0 : 1;
    case FX_ROUTE_PIC:
        return split || route->data || route->address >= FX_PIC_PINS ? 0 : route->address < FX_PIC_PINS / 2 ? 2 : 4;
    case FX_ROUTE_MSI:
        return words[FX_H_API] & FXP_X2API_32BIT_IDS && route->address >> 32 & 0xff ? 0 : ALONE;
    case FX_ROUTE_HV_SINT:
        return words[FX_H_CONFIG] & FX_CONFIG_KVM_HYPERV && !(route->address >> 32) ? ALONE : 0;
    }
    return 0;
}

/* How many routes each GSI has, behind its number, so that sums are first rows; FX_E_RANGE where KVM says EINVAL. */
static int32_t count_routes(const uint64_t *words, const struct fx_route *routes, uint32_t n, uint16_t *first,
                            uint32_t *gsis)
{
    uint8_t chips[FX_MAX_ROUTES] = { 0 };

    *gsis = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t gsi = routes[i].gsi, chip = chips_of(words, &routes[i]);

        if (gsi >= FX_MAX_ROUTES || !chip || chips[gsi] & chip || routes[i].reserved)
            return FX_E_RANGE;
        chips[gsi] |= (uint8_t)chip;
        first[gsi + 1]++;
        if (gsi >= *gsis)
            *gsis = gsi + 1;
    }
    return FX_OK;
}

static int32_t op_set_gsi_routing(fx_machine *m, const struct fx_route *routes, uint32_t n)
{
    uint64_t *words = words_of(m);
    uint16_t first[FX_MAX_ROUTES + 1] = { 0 };
    uint32_t gsis;

    if (!words || (n && !routes))
        return refuse(m);
    if (n > FX_MAX_ROUTES || count_routes(words, routes, n, first, &gsis) != FX_OK)
        return FX_E_RANGE;
    for (uint32_t gsi = 0; gsi < gsis; gsi++)
        first[gsi + 1] = (uint16_t)(first[gsi + 1] + first[gsi]);
    for (uint32_t gsi = 0; gsi <= gsis; gsi++)
        words[FX_ROUTE_FIRST + gsi] = first[gsi];
    words[FX_ROUTE_GSIS] = gsis;
    memset(words + FX_ROUTE_OF_PIN, 0, (FX_IOAPIC_PINS + FX_PIC_PINS) * 8);
    for (uint32_t i = 0; i < n; i++) {
        uint64_t *row = words + FX_ROUTES + (uint64_t)first[routes[i].gsi]++ * FX_ROUTE_STRIDE;

        row[FX_ROUTE_KIND] = routes[i].kind | (uint64_t)routes[i].gsi << FX_ROUTE_GSI_SHIFT;
        row[FX_ROUTE_A] = routes[i].address;
        row[FX_ROUTE_B] = routes[i].data;
        if (routes[i].kind == FX_ROUTE_IOAPIC || routes[i].kind == FX_ROUTE_PIC)
            words[FX_ROUTE_OF_PIN + (routes[i].kind == FX_ROUTE_PIC ? FX_IOAPIC_PINS : 0) + routes[i].address] =
                routes[i].gsi + 1;
    }
    return end_ioctl(m, words, table.rerouted(handle(words), FX_HOST));
}

/* --------------------------------------------------------------------------------------------------------- their states */

/* What an ioctl of a chip's state can be refused for. */
static int32_t check_chip(fx_machine *m, const uint64_t *words, uint32_t chip, const void *state, uint64_t size)
{
    if (!words || !state)
        return refuse(m);
    if (chip > 2 || words[FX_H_CONFIG] & FX_CONFIG_SPLIT_IRQCHIP)
        return FX_E_RANGE;
    return size == CHIP_BYTES ? FX_OK : FX_E_SIZE;
}

static int32_t op_get_irqchip(fx_machine *m, uint32_t chip, void *state, uint64_t size)
{
    enum { PIC_BYTES = 16, IOAPIC_BYTES = 216 };
    uint64_t *words = words_of(m);
    int32_t status = check_chip(m, words, chip, state, size);

    if (status != FX_OK)
        return status;
    table.get_irqchip(handle(words), chip);
    memset(state, 0, size);
    memcpy(state, words + FX_H_STAGE, chip == 2 ? IOAPIC_BYTES : PIC_BYTES);
    return FX_OK;
}

static int32_t op_set_irqchip(fx_machine *m, uint32_t chip, const void *state, uint64_t size)
{
    uint64_t *words = words_of(m);
    int32_t status = check_chip(m, words, chip, state, size);

    if (status != FX_OK)
        return status;
    memcpy(words + FX_H_STAGE, state, size);
    return end_ioctl(m, words, table.set_irqchip(handle(words), chip, FX_HOST));
}

static int32_t op_create_pit(fx_machine *m, uint32_t speaker)
{
    uint64_t *words = words_of(m);

    if (!words)
        return refuse(m);
    if (words[FX_PIT_PRESENT] || words[FX_H_CONFIG] & FX_CONFIG_SPLIT_IRQCHIP)
        return FX_E_RANGE;
    return end_ioctl(m, words, table.create_pit(handle(words), !!speaker));
}

static int32_t op_get_pit(fx_machine *m, void *state, uint64_t size)
{
    uint64_t *words = words_of(m);

    if (!words || !state)
        return refuse(m);
    if (size != FXP_PIT_STATE2_BYTES)
        return FX_E_SIZE;
    if (!words[FX_PIT_PRESENT])
        return FX_NOTHING;
    table.get_pit(handle(words));
    memcpy(state, words + FX_H_STAGE, size);
    return FX_OK;
}

static int32_t op_set_pit(fx_machine *m, const void *state, uint64_t size)
{
    uint64_t *words = words_of(m);

    if (!words || !state)
        return refuse(m);
    if (size != FXP_PIT_STATE2_BYTES && size != FXP_PIT_STATE_BYTES)
        return FX_E_SIZE;
    if (!words[FX_PIT_PRESENT])
        return FX_NOTHING;
    memcpy(words + FX_H_STAGE, state, size);
    return end_ioctl(m, words, table.set_pit(handle(words), size == FXP_PIT_STATE2_BYTES));
}

static int32_t op_get_ioapic_eoi(fx_machine *m, uint32_t vcpu, uint32_t *vector, uint32_t *level)
{
    uint64_t *words = words_of(m), *own;

    if (!words || !vector || !level)
        return refuse(m);
    if (vcpu >= words[FX_H_NVCPUS])
        return FX_E_VCPU;
    own = OWN(words, vcpu);
    if (!own[FX_K_IOAPIC_EOIS] && !(words[FX_H_CONFIG] & FX_CONFIG_SPLIT_IRQCHIP))
        return FX_NOTHING;
    *vector = own[FX_K_IOAPIC_EOI] & 0xff;
    *level = own[FX_K_IOAPIC_EOI] >> 8 & 1;
    return FX_OK;
}
