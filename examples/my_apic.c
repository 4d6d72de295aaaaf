/* x2APIC mode by docs/apic-protocol.md: cc -o my_apic my_apic.c && fastexit verify --against ./my_apic --well-formed */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BASE = 0x1B, ID = 2, TPR = 8, PPR = 0xA, EOI, LDR = 0xD, DFR, SVR, ISR, IRR = 0x20, ICR = 0x30, SELF = 0x3F };
static const uint64_t kept[64] = {[TPR] = 0xFF, [SVR] = 0x1FF, [ICR] = ~0ull, [0x38] = ~0u, [0x3E] = 0xB, /* writable */
                                  [0x32] = 0x700FF, 0x107FF, 0x107FF, 0x1A7FF, 0x1A7FF, 0x100FF};
typedef struct { uint64_t id, base, reg[64]; } apic;
static apic cpu[64], *end = cpu;

static int top(const apic *a, int set) { /* the highest vector of ISR or IRR, or -1 */
    for (int v = 255;; v--)
        if (v < 0 || a->reg[set + v / 32] >> v % 32 & 1) return v;
}
static void flip(apic *a, int set, int v) { a->reg[set + v / 32] ^= 1u << v % 32; }
static uint64_t shown(const apic *a, int at) { /* a register as it reads */
    uint64_t x2apic = a->base >> 10 & 1, serving = top(a, ISR) < 0 ? 0 : top(a, ISR) & 0xF0;
    if (at == PPR) return a->reg[TPR] >> 4 >= serving >> 4 ? a->reg[TPR] : serving;
    if (at == LDR) return x2apic * ((a->id >> 4) << 16 | 1u << (a->id & 15));
    return at == ID ? a->id << 24 * !x2apic & 0xFFFFFFFF : a->reg[at];
}
static void send(const apic *from, uint64_t icr) {
    for (apic *a = cpu; a < end; a++) {
        uint64_t dest = icr >> 32, ldr = shown(a, LDR), logical = dest >> 16 == ldr >> 16 && dest & ldr & 0xFFFF;
        int hit[] = {dest == 0xFFFFFFFF || (icr >> 11 & 1 ? logical : dest == a->id), a == from, 1, a != from};
        int fixed = !(icr >> 8 & 7), there = a->reg[IRR + (icr & 0xFF) / 32] >> icr % 32 & 1;
        if (hit[icr >> 18 & 3] && a->reg[SVR] & 0x100 && fixed && !there) flip(a, IRR, icr & 0xFF);
    }
}
static void put(apic *a, int at, uint64_t value) {
    if (at == EOI && top(a, ISR) >= 0) flip(a, ISR, top(a, ISR));
    if (at == ICR || at == SELF) send(a, at == ICR ? value : value | 1 << 18);
    if (kept[at]) a->reg[at] = value & kept[at];
    for (int lvt = 0x32; lvt < 0x38 && !(a->reg[SVR] & 0x100); lvt++) a->reg[lvt] |= 0x10000;
}
static void machine(char *ids) {
    for (end = cpu; *ids && end < cpu + 64; end++, ids += *ids == ',') {
        *end = (apic){.id = strtoul(ids, &ids, 10), .reg = {[3] = 0x1050014, [DFR] = 0xFFFFFFFF}};
        end->base = 0xFEE00800 | (end->id == 0) << 8, put(end, SVR, 0xFF);
    }
}

int main(void) {
    char line[8192], *word, *field;
    for (; fgets(line, sizeof line, stdin) && (word = strtok(line, " \n")); puts(""), fflush(stdout)) {
        uint64_t n[3] = {0}; /* vCPU, MSR, value; of a message address, data */
        if ((field = strtok(NULL, " \n")) && !strcmp(word, "machine")) machine(field);
        for (int i = 0; i < 3 && field; i++, field = strtok(NULL, " \n")) n[i] = strtoull(field, NULL, 0);
        apic *a = &cpu[n[0] % 64];
        int at = n[1] & 63, next = top(a, IRR) >> 4 > (int)shown(a, PPR) >> 4 ? top(a, IRR) : -1;
        if (!strcmp(word, "ack") && next >= 0) flip(a, IRR, next), flip(a, ISR, next);
        if (!strcmp(word, "msi")) send(NULL, n[1] | ((n[0] >> 12 & 0xFF) | (n[0] >> 32 & ~0xFFull)) << 32);
        if (!strcmp(word, "wrmsr")) n[1] == BASE ? (void)(a->base = n[2]) : put(a, at, n[2]);
        printf(!strcmp(word, "hello") ? "ok 1 my_apic.c wrmsr rdmsr lapic msi pending ack" : "ok ");
        if (!strcmp(word, "rdmsr")) printf("%" PRIu64, n[1] == BASE ? a->base : shown(a, at));
        if (!strcmp(word, "ack") || !strcmp(word, "pending")) next < 0 ? printf("none") : printf("%d", next);
        for (int i = 0; !strcmp(word, "lapic") && i < 1024; i++) /* 16 bytes a register */
            printf("%02x", i % 16 < 8 ? (unsigned)(shown(a, i / 16) >> i % 16 * 8) & 0xFF : 0);
    }
}
