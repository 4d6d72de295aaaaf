/*
 * Calls with bad input: null pointers, pointers to nothing, wrong sizes, vCPUs that are not there, a closed machine,
 * random records, damaged snapshots. What is surely bad must get its error code; nothing may crash, and the machine
 * must still be sound afterwards.
 */
#include <limits.h>
#include <string.h>
#include "host.h"

enum { VCPUS = 4, RECORDS = 16, GUEST_BYTES = 0x8000, CANARIES = 0x1000 };

static uint64_t state = 88172645463325252ull;
static uint64_t wrong;

static uint64_t any(void)
{
    return random_of(&state);
}

static uint32_t some(uint32_t n)
{
    return (uint32_t)(any() >> 20) % n;
}

static void expect(int32_t status, int32_t expected, const char *what)
{
    if (status != expected && wrong++ < 10)
        fprintf(stderr, "fuzz: %s: %s, not %s\n", what, fx_strerror(status), fx_strerror(expected));
}

static void known(int32_t status, const char *what)
{
    if ((status < FX_E_MEMORY || status > FX_UNHANDLED) && wrong++ < 10)
        fprintf(stderr, "fuzz: %s returned %d\n", what, status);
}

static uint64_t value(void)
{
    static const uint64_t interesting[] = { 0, 1, 0xfd, 0x1ff, 1ull << 63, UINT64_MAX, 1ull << 32 | 0x41, 3ull << 18 | 0x41 };

    return some(3) ? interesting[some(8)] : any();
}

static uint32_t msr(void)
{
    return some(4) ? 0x800 + some(0x40) : some(2) ? 0x40000000 + some(0x109) : some(2) ? 0x1b : (uint32_t)any();
}

/* An address in the guest's memory, at its end, or beyond, and whether a page there is enabled. */
static uint64_t place(void)
{
    return some(8) ? some(GUEST_BYTES + 0x2000) & ~(some(4) ? 0xffeull : 0) : any();
}

/* A hypercall that KVM knows, mostly. */
static uint64_t control(void)
{
    static const uint16_t codes[] = { 0x2, 0x3, 0x8, 0xb, 0xb, 0x13, 0x14, 0x15, 0x15, 0x5c, 0x5d, 0x8001 };
    uint64_t fast = some(2) << 16, header = some(some(4) ? 3 : 1024) << 17;

    return (some(8) ? codes[some(12)] : any() & 0xffff) | fast | header | (some(8) ? 0 : any() & any() & any());
}

/* Pages enabled, a SINT and a timer that writes messages to them, EOM; or any MSR of Hyper-V's. */
static int32_t windows_msr(fx_machine *m, uint32_t v, struct fx_result *out)
{
    switch (some(8)) {
    case 0: return fx.wrmsr(m, v, 0x40000073, place(), out);
    case 1: return fx.wrmsr(m, v, some(2) ? 0x40000001 : 0x40000082, place(), out);
    case 2: return fx.wrmsr(m, v, 0x40000083, place(), out);
    case 3: return fx.wrmsr(m, v, 0x40000092, 0x61, out);
    case 4: return fx.wrmsr(m, v, 0x400000b0, 2 << 16 | 9, out);
    case 5: return fx.wrmsr(m, v, 0x400000b1, 1 + some(5000), out);
    case 6: return fx.wrmsr(m, v, 0x40000084, 0, out);
    default: return fx.wrmsr(m, v, 0x40000000 + some(0x109), place(), out);
    }
}

/* What a host does that has a CPU of its own. */
static int32_t cpu_call(fx_machine *m, uint32_t v, int null, struct fx_result *out, uint32_t *vector)
{
    struct fx_event event;
    struct fx_result results[2];
    uint64_t count;

    switch (some(13)) {
    case 0: return fx.hw_wrmsr(m, v, msr(), value(), out);
    case 1: return fx.hw_wrmsr(m, v, some(2) ? 0x83f : 0x80b, some(2) ? 0 : some(256), out);
    case 2: return fx.hw_rdmsr(m, v, msr(), out);
    case 3: return fx.hw_mmio_write(m, v, some(0x1000), 1u << some(4), (uint32_t)value(), out);
    case 4: return fx.hw_mmio_read(m, v, some(0x1000), 1u << some(4), out);
    case 5: return fx.hw_cr8(m, v, some(20), out);
    case 6: return fx.hw_deliver(m, v, vector);
    case 7: return fx.settle(m, v, out);
    case 8: return fx.take(m, v, null ? NULL : &event);
    case 9: return null ? FX_E_NULL : fx.nmi(m, v);
    case 10: return null ? FX_E_NULL : some(2) ? fx.smi(m, v) : fx.rsm(m, v);
    case 11: return fx.run_timers(m, v, results, some(3), null ? NULL : &count);
    default: return null ? FX_E_NULL : fx.interrupt(m, v, some(300));
    }
}

/* A call whose machine, vCPU and pointers are as given. */
static int32_t call(fx_machine *m, uint32_t v, int null)
{
    static unsigned char page[1024];
    struct fx_result result, *out = null ? NULL : &result;
    struct fx_cpu cpu = { .rflags = any(), .shadow = some(4), .nmi_masked = some(2), .real_mode = !some(8) };
    uint32_t word, *vector = null ? NULL : &word;
    struct fx_hv_exit told;
    uint64_t count, xmm[12];

    switch (some(24)) {
    case 0: return fx.wrmsr(m, v, msr(), value(), out);
    case 1: return fx.wrmsr(m, v, MSR_X2APIC_ICR, value(), out);
    case 2: return fx.rdmsr(m, v, msr(), out);
    case 3: return fx.mmio_write(m, v, some(0x1000), 4, (uint32_t)value(), out);
    case 4: return fx.mmio_read(m, v, some(0x1000), 1u << some(3), out);
    case 5: return fx.pending(m, v, vector);
    case 6: return fx.ack(m, v, vector);
    case 7: return fx.eoi(m, v, vector);
    case 8: return null ? FX_E_NULL : fx.notify(m, v);
    case 9: return fx.enter(m, v, out);
    case 10: return fx.reenter(m, v, out);
    case 11: return null ? FX_E_NULL : fx.set_msr(m, v, msr(), value());
    case 12: return fx.get_msr(m, v, msr(), null ? NULL : &count);
    case 13: return some(2) ? fx.get_lapic(m, v, null ? NULL : page, sizeof page)
                            : fx.set_lapic(m, v, null ? NULL : page, sizeof page);
    case 14: return null ? FX_E_NULL : fx.enable_synic(m, v, some(4));
    case 15: return null ? FX_E_NULL : fx.complete_hypercall(m, v, value());
    case 16: return fx.get_hv_exit(m, v, null ? NULL : &told);
    case 17:
        for (int i = 0; i < 12; i++)
            xmm[i] = value();
        return fx.hv_hypercall(m, v, control(), place(), place(), some(4) ? xmm : NULL, out);
    case 18: return windows_msr(m, v, out);
    case 19:
    case 20:
    case 21:
    case 22: return cpu_call(m, v, null, out, vector);
    default:
        if (some(2))
            return fx.get_cpu(m, v, null ? NULL : &cpu);
        return fx.set_cpu(m, v, null ? NULL : &cpu);
    }
}

static void batch(fx_machine *m)
{
    struct fx_exit exits[RECORDS];
    struct fx_outcome outcomes[RECORDS];
    struct fx_result result;
    uint64_t done;

    for (int i = 0; i < RECORDS; i++) {
        exits[i] = (struct fx_exit){ some(VCPUS), 32, msr(), 0, value(), 0 };
        if (!some(4))
            exits[i].reason = some(80);
        if (!some(200))
            exits[i].vcpu = (uint32_t)any();
        if (!some(20))
            exits[i].info = (uint32_t)any();
    }
    known(fx.run(m, exits, outcomes, some(RECORDS + 1), &done), "run");
    known(fx.exit(m, &exits[0], &result), "exit");
    expect(fx.run(m, NULL, outcomes, 3, &done), FX_E_NULL, "run of nothing");
    expect(fx.run(m, exits, outcomes, UINT64_MAX, &done), FX_E_SIZE, "run of everything");
}

static void open_badly(fx_machine *closed)
{
    struct fx_config config = { .size = sizeof config, .abi = FX_ABI_VERSION, .vcpus = 1, .flags = FX_QUIET };
    struct fx_hooks hooks = { .size = sizeof hooks, .abi = FX_ABI_VERSION };
    fx_machine *m = closed;

    switch (some(9)) {
    case 0: config.vcpus = some(2) ? 0 : 4097 + some(UINT_MAX - 4097); break;
    case 1: config.vendor = 2 + some(1000); break;
    case 2: config.kernel = 1u << 16 | some(1000); break;
    case 3: config.flags |= 1u << (22 + some(10)); break;
    case 4: config.boot_cpu_id = 4096 + some(1000000); break;
    case 5: config.maxphyaddr = 53 + some(1000); break;
    case 6: config.hv_features = 1u << (24 + some(6)) | some(2); break;
    case 7: expect(fx_open(&config, NULL, NULL, NULL), FX_E_NULL, "open into nothing"); return;
    default:
        hooks.size = some(8);
        expect(fx_open(&config, &hooks, &m, NULL), FX_E_SIZE, "open with short hooks");
        return;
    }
    expect(fx_open(&config, NULL, &m, NULL), FX_E_RANGE, "open");
    if (m && wrong++ < 10)
        fprintf(stderr, "fuzz: a machine came of a refused open\n");
}

static void restore_badly(unsigned char *bytes, uint64_t size)
{
    uint64_t at = any() % size, length = some(4) ? size : any() % size;
    fx_machine *m;
    int32_t status;

    bytes[at] ^= 0x55;
    status = fx_restore(bytes, length, NULL, &m, NULL);
    bytes[at] ^= 0x55;
    expect(status, FX_E_SNAPSHOT, "restore");
}

int fuzz(uint64_t calls)
{
    fx_machine *m = machine(VCPUS, FX_HYPERV), *closed = machine(1, 0), *copy;
    unsigned char *guest = malloc(GUEST_BYTES + 2 * CANARIES);
    struct fx_result result, results[2];
    uint64_t size, needed, clock = 0;
    unsigned char *bytes;

    MUST(fx.close(closed));
    memset(guest, 0xa5, GUEST_BYTES + 2 * CANARIES);
    MUST(fx.set_guest_memory(m, guest + CANARIES, GUEST_BYTES));
    MUST(fx.set_msr(m, 0, 0x40000000, 1)); /* the guest OS id: hypercalls are Hyper-V's */
    MUST(fx.snapshot(m, NULL, 0, &size));
    bytes = malloc(size);
    MUST(fx.snapshot(m, bytes, size, &size));
    for (uint64_t i = 0; i < calls; i++) {
        switch (some(16)) {
        case 0: expect(call(NULL, some(VCPUS), 0), FX_E_NULL, "no machine"); break;
        case 1: expect(call(closed, 0, 0), FX_E_MACHINE, "a closed machine"); break;
        case 2: expect(call((fx_machine *)(uintptr_t)((any() >> some(40) & ~63ull) | 64), 0, 0), FX_E_MACHINE, "a wild machine"); break;
        case 3: expect(call(m, VCPUS + some(UINT_MAX - VCPUS - 2), 0), FX_E_VCPU, "a vCPU that is not there"); break;
        case 4: expect(call(m, some(VCPUS), 1), FX_E_NULL, "no place for a result"); break;
        case 5:
            expect(fx.mmio_write(m, some(VCPUS), 0x1000 + some(1000), 4, 0, &result), FX_E_RANGE, "beyond the page");
            expect(fx.mmio_read(m, some(VCPUS), some(0x1000), 5 + some(1000), &result), FX_E_RANGE, "a length");
            expect(fx.get_lapic(m, 0, bytes, some(1024)), FX_E_SIZE, "a short page");
            MUST(fx.snapshot(m, NULL, 0, &size));
            expect(fx.snapshot(m, bytes, some((uint32_t)size), &needed), FX_E_SIZE, "a short snapshot");
            MUST(fx.snapshot(m, bytes, size, &size));
            break;
        case 6: batch(m); break;
        case 7:
            clock += some(3) ? some(5000) : 0;
            known(fx.set_time(m, clock, results, some(3), &needed), "set_time");
            if (clock)
                expect(fx.set_time(m, clock - 1, results, 2, &needed), FX_E_RANGE, "time that goes back");
            break;
        case 8:
            if (!some(100))
                open_badly(closed);
            else if (!some(100))
                restore_badly(bytes, size);
            expect(fx_close(closed), FX_E_MACHINE, "closed twice");
            break;
        case 9: known(fx.inject(m, value(), (uint32_t)value(), &result), "inject"); break;
        case 11:
            known(fx.hv_sint_line(m, some(VCPUS + 1), some(17), some(2), &result), "hv_sint_line");
            expect(fx.set_guest_memory(m, guest, some(4096)), FX_E_SIZE, "less than a page");
            expect(fx.set_guest_memory(m, NULL, 1 + some(4096)), FX_E_NULL, "no memory of some bytes");
            MUST(fx.set_guest_memory(m, guest + CANARIES, some(2) ? GUEST_BYTES : 0x1000 * (1 + some(GUEST_BYTES / 0x1000))));
            break;
        case 10: known(fx.reset(m, some(3) ? some(VCPUS) : FX_ALL, some(3)), "reset"); break;
        default: known(call(m, some(VCPUS), 0), "a good call"); break;
        }
    }
    MUST(fx.snapshot(m, bytes, size, &size));
    MUST(fx_restore(bytes, size, NULL, &copy, NULL)); /* every word is still what it may be */
    MUST(fx.close(copy));
    MUST(fx.close(m));
    for (int i = 0; i < CANARIES; i++)
        if ((guest[i] != 0xa5 || guest[CANARIES + GUEST_BYTES + i] != 0xa5) && wrong++ < 10)
            fprintf(stderr, "fuzz: a byte outside the guest's memory was written\n");
    free(guest);
    free(bytes);
    printf("fuzz: %llu calls, %llu with another answer than expected\n", (unsigned long long)calls,
           (unsigned long long)wrong);
    return wrong != 0;
}
