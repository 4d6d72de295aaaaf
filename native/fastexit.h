/*
 * The C door of fastexit: KVM's interrupt exits as a library for simulators in C.
 *
 *     struct fx_config config = { .size = sizeof config, .abi = FX_ABI_VERSION, .vcpus = 2, .flags = FX_BOOT_X2APIC };
 *     struct fx_ops fx = { .size = sizeof fx, .abi = FX_ABI_VERSION };
 *     struct fx_result result;
 *     fx_machine *machine;
 *
 *     if (fx_open(&config, NULL, &machine, &fx) != FX_OK)
 *         return 1;
 *     fx.wrmsr(machine, 0, 0x830, 1ull << 32 | 0xfd, &result);
 *     if (result.effects & FX_NOTIFY)
 *         fx.notify(machine, result.target);
 *
 * fx_open and fx_restore start Python and numba inside the process, once, and compile or read the kernels. Behind them
 * nothing but another fx_restore takes the GIL or runs Python.
 *
 * Results are pulled: a call returns, and its result says whom the host has to notify, kick or wake. Hooks, if there
 * are any, are called for the same things before the call returns.
 *
 * Structs. fx_config, fx_hooks and fx_ops say their size and grow at their end: what a host's older header lacks is 0,
 * and a newer one's fields, if any of them is not 0, are FX_E_SIZE, its calls NULL. All others are what they are for an
 * ABI version.
 *
 * Threads. Each function belongs to one of these classes:
 *   [any]    any thread at any time; on a machine with FX_ONE_OWNER, only while no other thread is in a call.
 *   [vcpu]   by one thread at a time for each vCPU, the one that runs it; different vCPUs at the same time, and [any]
 *            calls beside it. FX_ONE_OWNER: as above.
 *   [alone]  while no other thread is in a call of this machine.
 *   [python] takes the GIL and runs Python; any thread, with the GIL or without. Not from atexit() or a destructor.
 * The host keeps a machine open as long as a thread may be in one of its calls. Regions lie in the machine's memory,
 * which fx_close gives back.
 *
 * fork. A child has copies of the machines that are open, and all calls but [python] work there; those are FX_E_PYTHON
 * if this library has started Python before. Python hosts that fork by os.fork may use all of them.
 *
 * What comes back: 0, a positive status that a correct program meets, or a negative one, which is an error of the
 * caller or of the installation; then nothing has happened and no result has been written, but for what a call says of
 * itself.
 *
 * Between the marks, cffi can parse this file. Tests compare it with what Python has, field by field.
 */
#ifndef FASTEXIT_H
#define FASTEXIT_H

#include <stdint.h>
#include "fastexit_layout.h"

#ifdef __cplusplus
extern "C" {
#endif

/* cffi:begin */
typedef struct fx_machine fx_machine;

enum {
    FX_OK = 0,
    FX_GP = 1,        /* #GP(0) for the guest, whose RIP did not move; of hv_hypercall() #UD: fx_result.fault */
    FX_USER = 2,      /* KVM_RUN would return: fx_result.user is KVM_EXIT_* + 1 */
    FX_BLOCKED = 3,   /* the vCPU waits (HLT, INIT, SIPI) and is not in the guest: enter() once it is to be woken */
    FX_NOTHING = 4,   /* there is none: no vector, no timer, no vCPU; or the CPU did not take the notification */
    FX_MORE = 5,      /* the buffer is full: call again */
    FX_UNHANDLED = 6, /* no compiled handler for that exit, or the vCPU runs L2; nothing has happened */
    FX_E_NULL = -1,
    FX_E_SIZE = -2,     /* size of a struct or buffer */
    FX_E_ABI = -3,      /* abi of a struct, or library and Python package differ */
    FX_E_MACHINE = -4,  /* no machine, or a closed one */
    FX_E_VCPU = -5,     /* the machine has no such vCPU */
    FX_E_RANGE = -6,    /* another argument is out of range; KVM would say EINVAL */
    FX_E_SNAPSHOT = -7, /* bytes that are no sound snapshot */
    FX_E_PYTHON = -8,   /* Python, numba or fastexit cannot be used: fx_last_error() */
    FX_E_MEMORY = -9    /* no memory, or too many open machines */
};

enum { FX_VMX = 0, FX_SVM = 1 };

/* The generation to be like. 0: the newest. Each has its number for good, so they are not in order of age. */
enum {
    FX_KERNEL_DEFAULT = 0,
    FX_KERNEL_SEED_V3 = 1,
    FX_KERNEL_5_6 = 2,
    FX_KERNEL_5_7 = 3,
    FX_KERNEL_5_8 = 4,
    FX_KERNEL_6_1 = 5,
    FX_KERNEL_6_12 = 6,
    FX_KERNEL_6_18 = 7,
    FX_KERNEL_5_10 = 8,
    FX_KERNEL_5_15 = 9,
    FX_KERNEL_6_6 = 10,
    FX_KERNEL_6_8 = 11,
    FX_KERNEL_7_3 = 12,
    FX_KERNEL_SDM = 256 /* the manual's rules, no kernel: reserved bits fault, errors are logged */
};

/* fx_config.flags */
enum {
    FX_BOOT_X2APIC = 1 << 0,      /* every vCPU as a booted x2APIC guest has it: APICBASE EN and EXTD, SVR 0x1ff */
    FX_ONE_OWNER = 1 << 1,        /* one thread at a time: plain words in the place of atomics */
    FX_NO_APICV = 1 << 2,         /* no posted interrupts or AVIC */
    FX_SPLIT_IRQCHIP = 1 << 3,    /* IOAPIC, PICs and PIT are user space's */
    FX_NO_X2APIC = 1 << 4,        /* CPUID does not offer it */
    FX_NO_TSC_DEADLINE = 1 << 5,  /* CPUID does not offer it */
    FX_NO_VECTOR_HASHING = 1 << 6,
    FX_CMCI = 1 << 7,
    FX_SMM = 1 << 8,              /* the default */
    FX_NO_NRIPS = 1 << 9,
    FX_NO_HV_TIMER = 1 << 10,     /* VMX without its preemption timer */
    FX_IPIV = 1 << 11,            /* VMX: IPI virtualisation */
    FX_NO_IPIV = 1 << 12,         /* SVM: AVIC without IsRunning */
    FX_VTD_PI = 1 << 13,
    FX_X2AVIC = 1 << 14,
    FX_PI_INJECT_TIMER = 1 << 15,
    FX_NO_RETPOLINE = 1 << 16,
    FX_QUIET = 1 << 17,           /* errors are not printed; fx_last_error() has them */
    FX_NO_SMM = 1 << 18,          /* no CONFIG_KVM_SMM, which up to 6.1 every kernel has */
    FX_NO_KVM_HYPERV = 1 << 19,   /* no CONFIG_KVM_HYPERV, which up to 6.6 every kernel has */
    FX_HYPERV = 1 << 20,          /* the guest's CPUID says "Hv#1" */
    FX_HYPERV_ENFORCE = 1 << 21   /* and KVM_CAP_HYPERV_ENFORCE_CPUID is on */
};

/* What a machine is made of. size and abi first; 0 in any other field is the default. */
struct fx_config {
    uint32_t size; /* sizeof(struct fx_config) */
    uint32_t abi;  /* FX_ABI_VERSION */
    uint32_t vcpus;
    uint32_t vendor;
    uint32_t kernel;
    uint32_t flags;
    const uint32_t *apic_ids; /* one for each vCPU, at most 4095; NULL: 0, 1, 2, ... */
    uint32_t x2apic_api;      /* KVM_CAP_X2APIC_API flags */
    uint32_t maxphyaddr;      /* bits; 0: 48 */
    uint32_t tsc_khz;         /* guest TSC ticks a millisecond; 0: 1000000 */
    uint32_t bus_cycle_ns;    /* 0: 1 */
    uint32_t min_timer_period_us; /* 0: 200 */
    uint32_t timer_advance_ns;
    uint32_t disable_exits;  /* KVM_CAP_X86_DISABLE_EXITS */
    uint32_t disable_quirks; /* KVM_CAP_DISABLE_QUIRKS */
    uint32_t boot_cpu_id;
    uint32_t hv_features; /* FX_HVF_*: the guest's CPUID, which FX_HYPERV_ENFORCE enforces; 0: all of them */
    const char *costs;    /* a cost profile's name, or the path of one's TOML file; NULL: no modelled time */
};

/* Enlightenments in the Hyper-V leaves of the guest's CPUID. */
enum {
    FX_HVF_VP_RUNTIME = 1 << 0,
    FX_HVF_TIME_REF_COUNT = 1 << 1,
    FX_HVF_SYNIC = 1 << 2,
    FX_HVF_STIMER = 1 << 3,
    FX_HVF_APIC_ACCESS = 1 << 4,
    FX_HVF_HYPERCALL = 1 << 5,
    FX_HVF_VP_INDEX = 1 << 6,
    FX_HVF_RESET = 1 << 7,
    FX_HVF_REFERENCE_TSC = 1 << 8,
    FX_HVF_FREQUENCIES = 1 << 9,
    FX_HVF_REENLIGHTENMENT = 1 << 10,
    FX_HVF_TSC_INVARIANT = 1 << 11,
    FX_HVF_POST_MESSAGES = 1 << 12,
    FX_HVF_SIGNAL_EVENTS = 1 << 13,
    FX_HVF_XMM_INPUT = 1 << 14,
    FX_HVF_CRASH = 1 << 15,
    FX_HVF_STIMER_DIRECT = 1 << 16,
    FX_HVF_REMOTE_TLB_FLUSH = 1 << 17,
    FX_HVF_APIC_ACCESS_RECOMMENDED = 1 << 18,
    FX_HVF_AUTO_EOI_DEPRECATED = 1 << 19,
    FX_HVF_CLUSTER_IPI = 1 << 20,
    FX_HVF_EX_PROCESSOR_MASKS = 1 << 21,
    FX_HVF_SPIN_WAIT = 1 << 22,
    FX_HVF_EXTENDED_HYPERCALLS = 1 << 23,
    FX_HVF_NONE = 1 << 30 /* alone: none of them */
};

/* fx_result.effects: what the host has to do for fx_result.target. */
enum {
    FX_NOTIFY = 1,  /* vector 0xf2 for its pCPU: notify() is what the CPU does with it */
    FX_WAKE = 2,    /* its thread sleeps: enter() */
    FX_KICK = 4,    /* it has to leave the guest: reenter() once it has */
    FX_DOORBELL = 8 /* AVIC doorbell for its pCPU: the CPU takes up what is pending */
};

/* fx_result.path and fx_result.completion */
enum { FX_SLOW = 0, FX_FAST = 1, FX_HARDWARE = 2 };
enum {
    FX_COMPLETION_NONE = 0,
    FX_COMPLETION_REENTER_GUEST = 1,
    FX_COMPLETION_EXIT_HANDLED = 2,
    FX_COMPLETION_EXIT_USERSPACE = 3,
    FX_COMPLETION_SKIP_EMUL_INS = 4
};

/* fx_result.target where it is no index */
#define FX_NOBODY 0xFFFFFFFFu  /* nothing to do for anybody */
#define FX_SEVERAL 0xFFFFFFFEu /* more than one vCPU: targets() has them, each with its effects */

/* fx_result.cycles and its like where there are none */
#define FX_NO_CYCLES 0xFFFFFFFFFFFFFFFFull

/* What one exit, message or timer came to. */
struct fx_result {
    uint8_t completion; /* how far the fast handler got */
    uint8_t path;
    uint8_t fault;   /* vector of the exception for the guest, or 0 */
    uint8_t refusal; /* why the fast path declined; fastexit.Refusal */
    int16_t accepted; /* APICs that accepted, -1: nobody matched in the slow scan */
    uint8_t user;    /* KVM_EXIT_* + 1, or 0 */
    uint8_t effects; /* FX_NOTIFY | ..., united over all targets */
    uint64_t value;  /* what a read returned, or RAX behind a hypercall; else 0 */
    int32_t status;  /* what the function returned for it */
    uint32_t vcpu;   /* whose exit or timer it was; FX_NOBODY for a message, a line, a chip's work */
    uint32_t target;
    uint32_t vector; /* that the ICR or the message named, sent or not; else 0 */
    /* Modelled time of an exit, an hw_ access or enter(), under fx_config.costs; FX_NO_CYCLES without, and of all else */
    uint64_t cycles_ipi;   /* until the IPI has left to its last target; FX_NO_CYCLES without one that anybody accepted */
    uint64_t cycles;       /* until the guest runs again; FX_NO_CYCLES when it waits, or is back in user space */
    uint64_t cycles_spent; /* what was charged, whatever came of it */
};

/* What KVM_EXIT_HYPERV is about. */
enum {
    FX_HV_EXIT_SYNIC = 1, /* the guest has written SCONTROL, SIEFP or SIMP; there is nothing to complete */
    FX_HV_EXIT_HCALL = 2  /* a hypercall is the host's: complete_hypercall() */
};

/* run->hyperv, and run->system_event.type for KVM_EXIT_SYSTEM_EVENT. */
struct fx_hv_exit {
    uint32_t type;         /* FX_HV_EXIT_* */
    uint32_t msr;          /* of SYNIC: which the guest wrote */
    uint64_t control;      /* SCONTROL; or the hypercall's control word */
    uint64_t params[2];    /* SIEFP and SIMP; or the hypercall's other two registers */
    uint32_t system_event; /* KVM_SYSTEM_EVENT_* of the last KVM_EXIT_SYSTEM_EVENT: 2 reset, 3 crash; 0: none */
    uint32_t reserved;
};

/* What goes into a guest's CPU. */
enum {
    FX_EVENT_INTERRUPT = 1, /* of the local APIC */
    FX_EVENT_EXTINT = 2,    /* of the PIC, or by interrupt(): the APIC has no part in it, and gets no EOI */
    FX_EVENT_NMI = 3,       /* until the guest's IRET, which clears fx_cpu.nmi_masked, the next one waits */
    FX_EVENT_SMI = 4,       /* the CPU enters SMM; rsm() is the way back */
    FX_EVENT_INIT = 5,
    FX_EVENT_SIPI = 6       /* real mode at vector times 0x1000 */
};

struct fx_event {
    uint32_t kind; /* FX_EVENT_* */
    uint32_t vector;
};

/* fx_trace.context: what its vCPU's thread may not be interrupted by. */
enum {
    FX_IRQS_OFF = 1,
    FX_PREEMPT_OFF = 2
};

/* One tracepoint of KVM's, with its fields. */
struct fx_trace {
    uint32_t event;   /* FX_TP_* */
    uint32_t vcpu;    /* FX_NOBODY: the host's */
    uint32_t context; /* FX_IRQS_OFF | ... */
    uint32_t reserved;
    uint64_t args[7]; /* in the event's order; trace_text() prints them */
};

/* Called with each record, in order, by the thread whose call has made it; set_trace() says when. */
typedef void (*fx_tracer)(void *context, const struct fx_trace *record);

/* A vCPU, and what the host has to do for it. */
struct fx_target {
    uint32_t vcpu;
    uint32_t effects; /* FX_NOTIFY | ... */
};

/* Where a GSI leads. */
enum {
    FX_ROUTE_IOAPIC = 1,
    FX_ROUTE_PIC = 2,
    FX_ROUTE_MSI = 3,
    FX_ROUTE_HV_SINT = 4
};

/* An entry of the GSI routing table. */
struct fx_route {
    uint32_t gsi;
    uint32_t kind;    /* FX_ROUTE_* */
    uint64_t address; /* of an MSI; a pin of the IOAPIC, or 0 to 15 of the PICs, the slave's from 8 on; a VP index */
    uint32_t data;    /* of an MSI; a SINT; else 0 */
    uint32_t reserved;
};

/*
 * Every hook may be NULL. Called by the thread that is in the call, behind the exit, when the result has been written.
 * In it are allowed calls of [any], and of [vcpu] for vCPUs that this thread runs; with a result of their own.
 */
struct fx_hooks {
    uint32_t size; /* sizeof(struct fx_hooks) */
    uint32_t abi;  /* FX_ABI_VERSION */
    void *context;
    void (*notify)(void *context, uint32_t vcpu);
    void (*wake)(void *context, uint32_t vcpu);
    void (*kick)(void *context, uint32_t vcpu);
    void (*doorbell)(void *context, uint32_t vcpu);
};

/* Memory that machine and host share. Rows have a vCPU each, in index order. */
enum {
    FX_REGION_PID = 0,    /* struct fx_pid in hardware layout; words FX_HOT_* follow in the row. Remote: atomics only */
    FX_REGION_APIC = 1,   /* registers at their places in the 4 KiB page, of which they are the first 1024 bytes; but
                             ISR, TMR and IRR (0x100-0x27f), which are sets elsewhere and 0 here, the current count
                             of the timer, which is not kept, and in x2APIC mode ID, which has 32 bits at 0x20.
                             get_lapic() makes the page that KVM_GET_LAPIC gives */
    FX_REGION_IRR = 2, /* words 0-3: bit n of word w is vector 64 w + n; word 4 RVI, word 5 irr_pending */
    FX_REGION_ISR = 3, /* words 0-3, as IRR */
    FX_REGION_PID_TABLE = 4,     /* IPI virtualisation's PID-pointer table, a word a vCPU id */
    FX_REGION_AVIC_PHYSICAL = 5, /* AVIC's physical APIC id table, a word a vCPU id */
    FX_REGION_AVIC_LOGICAL = 6   /* AVIC's logical APIC id table, 32 bits an entry */
};

struct fx_region {
    void *base;
    uint64_t rows;
    uint64_t row_bytes; /* that the region's contract covers */
    uint64_t stride;    /* bytes from row to row */
};

/* reset()'s kind */
enum {
    FX_RESET_INIT = 0, /* INIT: mode, id and APICBASE stay; a vCPU that is no boot CPU waits for SIPI */
    FX_RESET_POWER = 1 /* as the vCPU was created, with APICBASE's EN, out of x2APIC mode */
};

#define FX_ALL 0xFFFFFFFFu

/* What the library knows of the guest's CPU. */
struct fx_cpu {
    uint64_t rip;
    uint64_t rflags;   /* IF is 0 at first: ack() delivers. With IF set an entry injects, and a halt can end */
    uint32_t shadow;   /* interrupt shadow: bit 0 STI, bit 1 MOV SS */
    uint32_t cs;       /* selector; read only, as all that follows */
    uint32_t mp_state; /* KVM_MP_STATE_* */
    uint32_t mode;     /* 0 outside the guest, 1 in it, 2 told to leave it */
    uint32_t injected; /* vector + 1 of the interrupt that an entry injected last, or 0 */
    uint32_t exited;   /* KVM_EXIT_* + 1 of the last return of KVM_RUN, 0 while it runs */
    uint32_t nmi_masked; /* set, too: 1 from an NMI's delivery to its IRET */
    uint32_t real_mode;  /* set, too: CR0.PE is clear, so exceptions have no error code; FX_BOOT_X2APIC clears it */
    uint32_t smm;        /* 1 in SMM */
    uint32_t cr8;        /* TPR[7:4]; hw_cr8() is how the guest writes it */
};

/* The calls. Set size and abi; fx_open fills in the rest, as far as size goes. */
struct fx_ops {
    uint32_t size; /* sizeof(struct fx_ops) */
    uint32_t abi;  /* FX_ABI_VERSION */

    /* Guest exits, each until the vCPU is in the guest again, waits or leaves to user space: FX_OK, FX_GP, FX_USER,
     * FX_BLOCKED or FX_UNHANDLED. [vcpu] */
    int32_t (*wrmsr)(fx_machine *m, uint32_t vcpu, uint32_t msr, uint64_t value, struct fx_result *result);
    int32_t (*rdmsr)(fx_machine *m, uint32_t vcpu, uint32_t msr, struct fx_result *result);
    /* The xAPIC page, wherever the vCPU's APICBASE has it: 1, 2 or 4 bytes. */
    int32_t (*mmio_write)(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length, uint32_t value,
                          struct fx_result *result);
    int32_t (*mmio_read)(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length, struct fx_result *result);
    /* Any exit that the batch door knows. */
    int32_t (*exit)(fx_machine *m, const struct fx_exit *exit, struct fx_result *result);
    /* n exits of any vCPUs, in order: FX_OK, or FX_UNHANDLED at exits[*done]. FX_E_VCPU and FX_E_RANGE say the same of a
     * bad one, and none has run; FX_E_SIZE: no array has so many. The arrays do not overlap. Hooks are not called;
     * fx_outcome.value says whom effects are for, and targets() has all of them for the last exit of each vCPU. [vcpu]
     * for all vCPUs it names. Exits need not be trusted: they may change while they run, which undoes no check. */
    int32_t (*run)(fx_machine *m, const struct fx_exit *exits, struct fx_outcome *outcomes, uint64_t n,
                   uint64_t *done);

    /* A message of a device: KVM_SIGNAL_MSI. FX_E_RANGE where KVM says EINVAL. [any] */
    int32_t (*inject)(fx_machine *m, uint64_t address, uint32_t data, struct fx_result *result);
    /* 0xf2 reaches the pCPU of a vCPU: FX_OK when its CPU took PIR to IRR, else FX_NOTHING. [vcpu] */
    int32_t (*notify)(fx_machine *m, uint32_t vcpu);
    /* The next vCPU, from index first on, for which something is to be done: FX_OK or FX_NOTHING. What a thread is
     * about to do already may be told once more, which does no harm. [any] */
    int32_t (*attention)(fx_machine *m, uint32_t first, uint32_t *vcpu, uint32_t *effects);

    /* The guest's CPU: deliverable vector; IRR to ISR; end of interrupt. FX_OK and the vector, or FX_NOTHING. [vcpu] */
    int32_t (*pending)(fx_machine *m, uint32_t vcpu, uint32_t *vector);
    int32_t (*ack)(fx_machine *m, uint32_t vcpu, uint32_t *vector);
    int32_t (*eoi)(fx_machine *m, uint32_t vcpu, uint32_t *vector);

    /* RIP, RFLAGS, interrupt shadow, NMI mask and real mode are set, all fields read. FX_E_RANGE: a shadow that is none,
     * a mask or mode that is neither 0 nor 1. [vcpu] */
    int32_t (*get_cpu)(fx_machine *m, uint32_t vcpu, struct fx_cpu *cpu);
    int32_t (*set_cpu)(fx_machine *m, uint32_t vcpu, const struct fx_cpu *cpu);

    /* KVM_RUN, or a sleeper that goes on: FX_OK in the guest, FX_BLOCKED, or FX_USER. The answer to FX_WAKE. [vcpu] */
    int32_t (*enter)(fx_machine *m, uint32_t vcpu, struct fx_result *result);
    /* A kicked vCPU leaves the guest by an external interrupt and enters again. The answer to FX_KICK; FX_NOTHING when it
     * is not in the guest. [vcpu] */
    int32_t (*reenter)(fx_machine *m, uint32_t vcpu, struct fx_result *result);

    /* User space's ioctls: KVM_SET_MSRS, KVM_GET_MSRS, FX_E_RANGE where they stop; KVM_GET_LAPIC and KVM_SET_LAPIC of
     * 1024 bytes (FX_E_SIZE), FX_E_RANGE for EINVAL. They take the vCPU out of the guest, FX_E_RANGE too: enter() or its
     * next exit. Of a page that set_lapic refuses, SVR has been applied even so, as in KVM. What they ask of other
     * vCPUs targets() tells. [alone] */
    int32_t (*set_msr)(fx_machine *m, uint32_t vcpu, uint32_t msr, uint64_t value);
    int32_t (*get_msr)(fx_machine *m, uint32_t vcpu, uint32_t msr, uint64_t *value);
    int32_t (*get_lapic)(fx_machine *m, uint32_t vcpu, void *page, uint64_t size);
    int32_t (*set_lapic)(fx_machine *m, uint32_t vcpu, const void *page, uint64_t size);
    /* FX_RESET_*, of one vCPU or FX_ALL; otherwise as the ioctls. [alone] */
    int32_t (*reset)(fx_machine *m, uint32_t vcpu, uint32_t kind);

    /* Move the clock to ns, never back, nor beyond 63 bits of ns or of guest TSC (FX_E_RANGE); results of the timers
     * that are due by then, in order. FX_MORE: room was not enough, call again with the same ns for the rest. *count is
     * how many were written. The preemption timer of a vCPU that runs L2 is left alone. FX_E_RANGE sets *count to 0.
     * What is no vCPU's, a tick of the PIT or the IOAPIC's delayed work, has FX_NOBODY in vcpu and in target as inject()
     * has it; targets() of FX_NOBODY has those of the last one only, attention() has all. [alone] */
    int32_t (*set_time)(fx_machine *m, uint64_t ns, struct fx_result *results, uint64_t room, uint64_t *count);
    /* When the next timer is due: FX_OK or FX_NOTHING. [alone] */
    int32_t (*next_timer)(fx_machine *m, uint64_t *ns);

    /* The whole machine as bytes, the same as Python's Machine.snapshot(). *needed is set for FX_OK and for FX_E_SIZE,
     * when size is less. buffer NULL and size 0 only ask. [alone] */
    int32_t (*snapshot)(fx_machine *m, void *buffer, uint64_t size, uint64_t *needed);
    /* A new machine from such bytes: fx_restore. [python] */
    int32_t (*restore)(const void *snapshot, uint64_t size, const struct fx_hooks *hooks, fx_machine **machine,
                       struct fx_ops *ops);

    /* Where the machine keeps what hardware would have in memory. [any] */
    int32_t (*region)(fx_machine *m, uint32_t which, struct fx_region *region);

    int32_t (*close)(fx_machine *m); /* fx_close */

    /* Guest exits, too: an access to a device by guest-physical address, of 1, 2, 4 or 8 bytes, and to a port, of 1, 2
     * or 4. FX_USER where no device of the machine claims it: fx_result.user is KVM_EXIT_MMIO + 1 or KVM_EXIT_IO + 1,
     * the access is the host's to do, and the vCPU's next exit or enter() says that it has. FX_E_RANGE: a length, a
     * value longer than it, a port, an address beyond maxphyaddr. [vcpu] */
    int32_t (*mem_write)(fx_machine *m, uint32_t vcpu, uint64_t gpa, uint32_t length, uint64_t value,
                         struct fx_result *result);
    int32_t (*mem_read)(fx_machine *m, uint32_t vcpu, uint64_t gpa, uint32_t length, struct fx_result *result);
    int32_t (*io_write)(fx_machine *m, uint32_t vcpu, uint32_t port, uint32_t length, uint32_t value,
                        struct fx_result *result);
    int32_t (*io_read)(fx_machine *m, uint32_t vcpu, uint32_t port, uint32_t length, struct fx_result *result);

    /* Whom the effects of a vCPU's last exit, enter() or ioctl are for, or with FX_NOBODY those of this thread's last
     * inject(), irq_line() or other call of no vCPU to this machine, in the order of sending: *count of them, the first ones, as far as there is room, in
     * targets. FX_MORE: there are more than room. A vCPU that accepted and needs nothing is not among them. NULL in a
     * library that is older. [vcpu] */
    int32_t (*targets)(fx_machine *m, uint32_t vcpu, struct fx_target *targets, uint64_t room, uint64_t *count);

    /* The guest's memory from guest-physical address 0 on, for what KVM itself reads and writes there: assist pages, SynIC
     * messages, hypercalls' input. Whole pages count. It is the host's, and stays as long as the machine or until the
     * next such call; NULL and 0 bytes: there is none, as at first, and KVM meets an address without a memory slot. In
     * no snapshot, which leaves it where it is. FX_E_SIZE: less than a page, or beyond the end of addresses. [alone] */
    int32_t (*set_guest_memory)(fx_machine *m, void *memory, uint64_t bytes);
    /* KVM_CAP_HYPERV_SYNIC or, version 2, KVM_CAP_HYPERV_SYNIC2: FX_E_RANGE for EINVAL. It takes the vCPU out of the guest;
     * targets() tells whom an inhibit of APICv kicks. [alone] */
    int32_t (*enable_synic)(fx_machine *m, uint32_t vcpu, uint32_t version);
    /* VMCALL or VMMCALL of a 64-bit guest: RCX, RDX and R8, of a 32-bit one EDX:EAX, EBX:ECX and EDI:ESI; and 12 words of
     * XMM0 to XMM5, the low half of each first, NULL for zeroes. fx_result.value is RAX (EDX:EAX), an HV_STATUS. FX_USER: it
     * is the host's, and nothing is in value. While the guest OS id is 0, it is a call of KVM's own whose number is 0.
     * [vcpu] */
    int32_t (*hv_hypercall)(fx_machine *m, uint32_t vcpu, uint64_t control, uint64_t input, uint64_t output,
                            const uint64_t *xmm, struct fx_result *result);
    /* Behind fx_result.user KVM_EXIT_HYPERV + 1 or KVM_EXIT_SYSTEM_EVENT + 1: what it is about. FX_NOTHING: there was
     * none, or its hypercall has been completed. [vcpu] */
    int32_t (*get_hv_exit)(fx_machine *m, uint32_t vcpu, struct fx_hv_exit *exit);
    /* The result of a hypercall that was the host's, which the vCPU's next exit or enter() ends. FX_NOTHING: none waits.
     * [vcpu] */
    int32_t (*complete_hypercall)(fx_machine *m, uint32_t vcpu, uint64_t value);
    /* KVM_IRQ_LINE of a GSI that user space has routed to a SINT; the routes are the host's. fx_result.accepted is what
     * KVM_IRQ_LINE_STATUS says: -1 for a level of 0, a vp_index or a SINT that there is not, a masked one, a SynIC that is
     * off. [any] */
    int32_t (*hv_sint_line)(fx_machine *m, uint32_t vp_index, uint32_t sint, uint32_t level, struct fx_result *result);

    /* KVM_IRQ_LINE_STATUS: fx_result.accepted is the sum of what the GSI's routes say, -1 without any; targets() of
     * FX_NOBODY tells whom effects are for. [any] */
    int32_t (*irq_line)(fx_machine *m, uint32_t gsi, uint32_t level, struct fx_result *result);
    /* KVM_SET_GSI_ROUTING: the whole table anew. FX_E_RANGE where KVM says EINVAL; the old one stays then. A new machine
     * has KVM's default table, with FX_SPLIT_IRQCHIP none. [alone] */
    int32_t (*set_gsi_routing)(fx_machine *m, const struct fx_route *routes, uint32_t n);
    /* An eventfd that KVM_IRQFD has tied to a GSI was written to; the eventfds are the host's. With resample it is one of
     * KVM_IRQFD_FLAG_RESAMPLE, and the line stays up until a guest acknowledges. [any] */
    int32_t (*irqfd_signal)(fx_machine *m, uint32_t gsi, uint32_t resample, struct fx_result *result);
    /* A GSI below FX_MAX_ROUTES has one resampling irqfd more, or with on 0 one less, which lowers the line with the last.
     * FX_E_RANGE for another GSI, with FX_SPLIT_IRQCHIP, and where there is none to take away. [alone] */
    int32_t (*irqfd_resample)(fx_machine *m, uint32_t gsi, uint32_t on);
    /* How often the resamplefds of a GSI were signalled since the machine was made. [any] */
    int32_t (*irqfd_resampled)(fx_machine *m, uint32_t gsi, uint64_t *count);
    /* KVM_GET_IRQCHIP and KVM_SET_IRQCHIP: 0 the master PIC, 1 the slave, 2 the IOAPIC; 512 bytes (FX_E_SIZE), in which
     * nothing is checked. FX_E_RANGE for another chip and with FX_SPLIT_IRQCHIP. targets() of FX_NOBODY tells whom a set
     * wakes or kicks. [alone] */
    int32_t (*get_irqchip)(fx_machine *m, uint32_t chip, void *state, uint64_t size);
    int32_t (*set_irqchip)(fx_machine *m, uint32_t chip, const void *state, uint64_t size);
    /* KVM_CREATE_PIT2, FX_E_RANGE for a second one and with FX_SPLIT_IRQCHIP; KVM_GET_PIT2, and KVM_SET_PIT2 of 112 bytes
     * or KVM_SET_PIT of 72 (FX_E_SIZE), FX_NOTHING where there is no PIT. It ticks in set_time(). [alone] */
    int32_t (*create_pit)(fx_machine *m, uint32_t speaker);
    int32_t (*get_pit)(fx_machine *m, void *state, uint64_t size);
    int32_t (*set_pit)(fx_machine *m, const void *state, uint64_t size);
    /* The last EOI of a vCPU that went to the IOAPIC: its vector, and whether TMR called it level. Behind fx_result.user
     * KVM_EXIT_IOAPIC_EOI + 1 the vector is run->eoi.vector, and level means nothing. FX_NOTHING: there was none. [vcpu] */
    int32_t (*get_ioapic_eoi)(fx_machine *m, uint32_t vcpu, uint32_t *vector, uint32_t *level);

    /* User space's events, each behind a way out of the guest, as ioctls have it: enter() or the next exit. KVM_NMI.
     * KVM_SMI, FX_E_RANGE where the kernel has no SMM. KVM_INTERRUPT of FX_SPLIT_IRQCHIP, FX_E_RANGE for ENXIO (the PIC is
     * KVM's) and EEXIST (one waits still). [vcpu] */
    int32_t (*nmi)(fx_machine *m, uint32_t vcpu);
    int32_t (*smi)(fx_machine *m, uint32_t vcpu);
    int32_t (*interrupt)(fx_machine *m, uint32_t vcpu, uint32_t vector);
    /* The guest leaves SMM. FX_NOTHING outside it, where RSM is #UD. [vcpu] */
    int32_t (*rsm)(fx_machine *m, uint32_t vcpu);

    /* An access to the APIC as the guest's CPU executes it: fx_result.path is FX_HARDWARE where it virtualises that, with
     * effects of IPIs that it sends itself; else the exit which the access causes, APIC_ACCESS, APIC_WRITE, EOI_INDUCED,
     * AVIC's or a plain one, as by wrmsr() and mmio_write(). FX_GP with FX_HARDWARE: the CPU's own #GP. [vcpu] */
    int32_t (*hw_wrmsr)(fx_machine *m, uint32_t vcpu, uint32_t msr, uint64_t value, struct fx_result *result);
    int32_t (*hw_rdmsr)(fx_machine *m, uint32_t vcpu, uint32_t msr, struct fx_result *result);
    int32_t (*hw_mmio_write)(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length, uint32_t value,
                             struct fx_result *result);
    int32_t (*hw_mmio_read)(fx_machine *m, uint32_t vcpu, uint32_t offset, uint32_t length, struct fx_result *result);
    /* Virtual-interrupt delivery by the CPU (VMX with APICv), if the guest runs and takes any: FX_OK and the vector, or
     * FX_NOTHING. [vcpu] */
    int32_t (*hw_deliver)(fx_machine *m, uint32_t vcpu, uint32_t *vector);
    /* MOV to CR8, as the other accesses. FX_GP for more than 15. [vcpu] */
    int32_t (*hw_cr8)(fx_machine *m, uint32_t vcpu, uint64_t value, struct fx_result *result);

    /* For a host that has a CPU of its own, and keeps RFLAGS, shadow and NMI mask by set_cpu():
     *     while ((status = fx.settle(m, v, &result)) == FX_MORE) whom result.effects are for is told;
     *     status FX_OK: while (fx.take(m, v, &event) == FX_OK) the CPU takes it; then it runs.
     * settle() does one thing that happens between two guest instructions: KVM_RUN where the vCPU is outside, the exit of
     * a kick, of an interrupt or NMI window that is open. FX_MORE: it did, and result says what came of it. FX_OK: nothing
     * is left, notifications have been taken. FX_BLOCKED, FX_USER: as enter(). [vcpu] */
    int32_t (*settle)(fx_machine *m, uint32_t vcpu, struct fx_result *result);
    /* What goes into the guest's CPU next, once: what entries have injected, in order (five are remembered), then what
     * virtual-interrupt delivery or AVIC delivers, if the guest takes interrupts now. FX_NOTHING: no more. [vcpu] */
    int32_t (*take)(fx_machine *m, uint32_t vcpu, struct fx_event *event);

    /* A clock that goes on by itself, in the place of set_time(): it is at ns, or later where another thread has said so.
     * FX_E_RANGE: beyond 63 bits, as there. [any] */
    int32_t (*advance)(fx_machine *m, uint64_t ns);
    /* Timers that are due, results as of set_time(): those of a vCPU, by its thread [vcpu], or with FX_NOBODY what is no
     * vCPU's, the PIT's ticks and the IOAPIC's delayed work, of which only what has effects has a result [any]. */
    int32_t (*run_timers)(fx_machine *m, uint32_t vcpu, struct fx_result *results, uint64_t room, uint64_t *count);
    /* When run_timers() has something to do next: FX_OK or FX_NOTHING. [vcpu], FX_NOBODY [any] */
    int32_t (*next_timer_of)(fx_machine *m, uint32_t vcpu, uint64_t *ns);

    /* Modelled time from now on, see fx_config.costs; NULL: none. FX_E_RANGE and fx_last_error() say what is wrong with a
     * table. No snapshot has it, so a restored machine begins without. [alone] [python] */
    int32_t (*set_costs)(fx_machine *m, const char *costs);

    /* Each tracepoint of every call goes to trace, before the call returns and before its hooks are called; NULL: tracing
     * ends. Calls of this machine then wait for each other, so trace makes none, but for trace_text(). Of a call that has
     * more than FX_TRACE_CAPACITY records, the rest is lost. Costs nothing while off. In no snapshot. [alone] */
    int32_t (*set_trace)(fx_machine *m, fx_tracer trace, void *context);
    /* A record as ftrace prints it after the time stamp, in the text of the machine's kernel: Python's m.trace.lines().
     * FX_NOTHING: that kernel has no such line. FX_E_SIZE: it does not fit. [any] [python] */
    int32_t (*trace_text)(fx_machine *m, const struct fx_trace *record, char *line, uint64_t size);

    /* run() with what exit() says of each, its cycles and its target among it, and with hooks. [vcpu] for all vCPUs that
     * it names. */
    int32_t (*run_results)(fx_machine *m, const struct fx_exit *exits, struct fx_result *results, uint64_t n,
                           uint64_t *done);
};

/* A new machine, with the vCPUs that config names. hooks may be NULL, ops too once they have been had. [python] */
int32_t fx_open(const struct fx_config *config, const struct fx_hooks *hooks, fx_machine **machine,
                struct fx_ops *ops);
/* A machine from a snapshot; quiet, FX_E_SNAPSHOT and fx_last_error() say what is wrong with the bytes. [python] */
int32_t fx_restore(const void *snapshot, uint64_t size, const struct fx_hooks *hooks, fx_machine **machine,
                   struct fx_ops *ops);
/* The machine's memory goes; every later call with it is FX_E_MACHINE, until its place is used again, which is as late as
 * the other free ones of 4096 places allow. Closed by several threads at once, one of them does it. [alone] */
int32_t fx_close(fx_machine *machine);
/* A few words for a status. [any] */
const char *fx_strerror(int32_t status);
/* The line that told of this thread's last failed open or restore; "" without one. [any] */
const char *fx_last_error(void);
/* fastexit's version, as "0.1.0"; the ABI version of the library. [any] */
const char *fx_version(void);
uint32_t fx_abi_version(void);
/* cffi:end */

/* Structs are the same for every compiler. */
#if defined(__cplusplus)
#define FX_SAME_SIZE(type, bytes) static_assert(sizeof(struct type) == (bytes), #type)
#else
#define FX_SAME_SIZE(type, bytes) _Static_assert(sizeof(struct type) == (bytes), #type)
#endif
FX_SAME_SIZE(fx_pid, 64);
FX_SAME_SIZE(fx_exit, 32);
FX_SAME_SIZE(fx_outcome, 16);
FX_SAME_SIZE(fx_config, 80);
FX_SAME_SIZE(fx_result, 56);
FX_SAME_SIZE(fx_hv_exit, 40);
FX_SAME_SIZE(fx_target, 8);
FX_SAME_SIZE(fx_route, 24);
FX_SAME_SIZE(fx_event, 8);
FX_SAME_SIZE(fx_trace, 72);
FX_SAME_SIZE(fx_cpu, 56);
#undef FX_SAME_SIZE

#ifdef __cplusplus
}
#endif

#endif
