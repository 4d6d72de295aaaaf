/* What the parts of the host share. */
#ifndef HOST_H
#define HOST_H

#include <fastexit.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define MSR_X2APIC_ICR 0x830
#define MSR_X2APIC_TPR 0x808

extern struct fx_ops fx;

/* A machine whose guest has booted into x2APIC mode, each vCPU inside the guest; the program ends without one. */
fx_machine *machine(uint32_t vcpus, uint32_t flags);

int check(const char *path, uint64_t ipis); /* a stream on two threads, written down for judge.py */
int storm(uint64_t ipis, uint64_t plant);   /* two threads at full speed: nothing lost, nothing invented */
int timing(double limit);                   /* the C door against the lower bound, in its multiples */
int fuzz(uint64_t calls);                   /* bad input */

static inline uint64_t random_of(uint64_t *state)
{
    uint64_t x = *state;

    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

static inline double now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static inline uint64_t icr(uint32_t dest, uint32_t vector)
{
    return (uint64_t)dest << 32 | vector;
}

#define MUST(call)                                                                          \
    do {                                                                                    \
        int32_t got_ = (call);                                                              \
        if (got_ != FX_OK) {                                                                \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, fx_strerror(got_)); \
            exit(1);                                                                        \
        }                                                                                   \
    } while (0)

#endif
