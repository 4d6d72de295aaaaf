/*
 * What C sees of a machine's memory: the records of the batch door, and where a machine keeps the words that a
 * simulator shares with it. A test compares every line with src/fastexit/layout.py, field by field.
 *
 * A machine is one block of 64-bit words. FX_HOT is the first word of the hot rows, FX_HOT_STRIDE words per vCPU; a row
 * begins with the posted-interrupt descriptor in hardware layout, 64 bytes on a 64-byte border.
 */
#ifndef FASTEXIT_LAYOUT_H
#define FASTEXIT_LAYOUT_H

#include <stdint.h>

/* cffi:begin */
enum {
    FX_ABI_VERSION = 7,
    FX_MAX_VCPUS = 4096,
    FX_HOT = 12288,
    FX_HOT_STRIDE = 16
};

/* Where the rest of a machine is, in words from its first one. */
enum {
    FX_H_CONFIG = 3,   /* owner */
    FX_H_API = 5,      /* owner */
    FX_H_NVCPUS = 6,   /* owner */
    FX_H_TRACE_HEAD = 13, /* remote */
    FX_H_NOW = 16,     /* owner */
    FX_H_TSC_KHZ = 17, /* owner */
    FX_H_GUEST_MEMORY = 42, /* owner; in no snapshot, as the next */
    FX_H_GUEST_BYTES = 43,  /* owner */
    FX_H_STAGE = 256,  /* owner, 128 words */
    FX_MAP_SCRATCH = 2640,
    FX_FILTER = 3704,
    FX_PID_TABLE = 7168,
    FX_AVIC_PHYSICAL = 11264,
    FX_AVIC_PHYSICAL_ENTRIES = 512,
    FX_AVIC_LOGICAL = 11776,
    FX_AVIC_LOGICAL_ENTRIES = 1024,
    FX_TABLES_END = 12288,
    FX_VEC = 77824,
    FX_VEC_STRIDE = 8,
    FX_PAGE = 110592,
    FX_PAGE_STRIDE = 128,
    FX_KVM = 634880,
    FX_KVM_STRIDE = 96,
    FX_K_APIC_BASE = 1,
    FX_K_MP_STATE = 6,
    FX_K_RIP = 8,
    FX_K_RFLAGS = 9,
    FX_K_SHADOW = 11,
    FX_K_TARGETS = 13,
    FX_K_NMI_MASKED = 19,
    FX_K_IRQ_WINDOW = 28,
    FX_K_WAITED = 49,
    FX_K_NMI_WINDOW = 65,
    FX_K_INTERRUPT = 39,
    FX_K_CS = 26,
    FX_K_MSR_DATA = 27,
    FX_K_IN_RUN = 46,
    FX_K_IOAPIC_EOI = 58,
    FX_K_IOAPIC_EOIS = 59,
    FX_K_HFLAGS = 53,
    FX_K_USER_EXIT = 80,
    FX_K_ISR = 88,
    FX_TRACE = 1034240,
    FX_TRACE_STRIDE = 8,
    FX_TRACE_CAPACITY = 131072,
    FX_TARGETS = 2082816, /* a sender's own row */
    FX_TARGETS_STRIDE = 1024,
    FX_HOST = 4096, /* behind the vCPUs' rows: the host's, when it sends itself */
    FX_HOSTS = 64,
    FX_HOST_BUSY = 6342656, /* remote */
    FX_HV = 6343168,
    FX_HV_STRIDE = 64,
    FX_HV_EXIT_TYPE = 51,
    FX_HV_EXIT_MSR = 52,
    FX_HV_EXIT_CONTROL = 53,
    FX_HV_EXIT_EVT_PAGE = 54,
    FX_HV_EXIT_MSG_PAGE = 55,
    FX_HV_CALL_LENGTH = 56,
    FX_HV_SYSTEM_EVENT = 62,
    FX_XMM = 6605312,
    FX_XMM_STRIDE = 16,
    FX_XMM_WORDS = 12,
    FX_IOAPIC = 6670848, /* from here to FX_ROUTES the chips: a lock of the library's guards them */
    FX_PIT_PRESENT = 6671152,
    FX_ROUTES = 6671168,
    FX_MAX_ROUTES = 4096,
    FX_ROUTE_STRIDE = 4,
    FX_ROUTE_KIND = 0, /* with the GSI from FX_ROUTE_GSI_SHIFT on */
    FX_ROUTE_A = 1,
    FX_ROUTE_B = 2,
    FX_ROUTE_GSI_SHIFT = 8,
    FX_ROUTE_FIRST = 6687552,
    FX_ROUTE_GSIS = 6691649,
    FX_ROUTE_OF_PIN = 6691650,
    FX_IOAPIC_PINS = 24,
    FX_PIC_PINS = 16, /* of both */
    FX_RESAMPLERS = 6691698,
    FX_RESAMPLER_STRIDE = 2,
    FX_RESAMPLER_SIGNALS = 1, /* remote */
    FX_IRQ = 6699890,
    FX_IRQ_STRIDE = 4,
    FX_IRQ_WENT_IN = 3,
    FX_TSC = 6716274,
    FX_TSC_STRIDE = 4,
    FX_TSC_LAST_NSEC = 6732658,
    FX_TSC_WORDS = 8,
    FX_HOST_TIMERS = 8,
    FX_HOST_WORK_PIT = 9,
    FX_PRICES = 6732800, /* from here on in no snapshot */
    FX_PRICE_GHZ = 63,
    FX_METER = 6732864,
    FX_METER_STRIDE = 16,
    FX_METER_SPENT = 0,
    FX_METER_IPI = 1,
    FX_METER_WAITED = 2,
    FX_WORDS = 6798848
};

enum {
    FX_CONFIG_SVM = 1,
    FX_CONFIG_APICV = 2,
    FX_CONFIG_THREADS = 4,
    FX_CONFIG_SPLIT_IRQCHIP = 8,
    FX_CONFIG_TRACE = 2048,
    FX_CONFIG_KVM_HYPERV = 1048576,
    FX_CONFIG_COSTS = 8388608,
    FX_FLAG_X2APIC = 2,
    FX_FLAG_APICV = 8,
    FX_HF_SMM = 1, /* of FX_K_HFLAGS */
    FX_HF_GIF_CLEAR = 8,
    FX_HF_REAL_MODE = 16
};

/* fx_trace.event: KVM's tracepoints. Numbers never change. */
enum {
    FX_TP_ENTRY = 1,
    FX_TP_EXIT = 2,
    FX_TP_MSR_READ = 3,
    FX_TP_MSR_WRITE = 4,
    FX_TP_APIC_READ = 5,
    FX_TP_APIC_WRITE = 6,
    FX_TP_APIC_IPI = 7,
    FX_TP_ACCEPT_IRQ = 8,
    FX_TP_APICV_ACCEPT_IRQ = 9,
    FX_TP_EOI = 10,
    FX_TP_MSI_SET_IRQ = 11,
    FX_TP_INJ_VIRQ = 12,
    FX_TP_PV_EOI = 13,
    FX_TP_FAST_MMIO = 14,
    FX_TP_HV_TIMER_STATE = 15,
    FX_TP_WAIT_LAPIC_EXPIRE = 16,
    FX_TP_APICV_INHIBIT_CHANGED = 17,
    FX_TP_AVIC_INCOMPLETE_IPI = 18,
    FX_TP_AVIC_DOORBELL = 19,
    FX_TP_AVIC_KICK_VCPU_SLOWPATH = 20,
    FX_TP_USERSPACE_EXIT = 21,
    FX_TP_PI_IRTE_UPDATE = 22,
    FX_TP_INJ_EXCEPTION = 23,
    FX_TP_HV_HYPERCALL = 24,
    FX_TP_HV_HYPERCALL_DONE = 25,
    FX_TP_HV_SEND_IPI = 26,
    FX_TP_HV_SEND_IPI_EX = 27,
    FX_TP_HV_FLUSH_TLB = 28,
    FX_TP_HV_FLUSH_TLB_EX = 29,
    FX_TP_HV_NOTIFY_ACKED_SINT = 30,
    FX_TP_HV_SYNIC_SET_IRQ = 31,
    FX_TP_HV_SYNIC_SEND_EOI = 32,
    FX_TP_HV_SYNIC_SET_MSR = 33,
    FX_TP_HV_STIMER_SET_CONFIG = 34,
    FX_TP_HV_STIMER_SET_COUNT = 35,
    FX_TP_HV_STIMER_START_PERIODIC = 36,
    FX_TP_HV_STIMER_START_ONE_SHOT = 37,
    FX_TP_HV_STIMER_CALLBACK = 38,
    FX_TP_HV_STIMER_CLEANUP = 39,
    FX_TP_HV_STIMER_EXPIRATION = 40,
    FX_TP_SET_IRQ = 41,
    FX_TP_HYPERCALL = 42,
    FX_TP_IOAPIC_SET_IRQ = 43,
    FX_TP_IOAPIC_DELAYED_EOI_INJ = 44,
    FX_TP_PIC_SET_IRQ = 45,
    FX_TP_ACK_IRQ = 46,
    FX_TP_PIO = 47
};

/* Words of a hot row behind the descriptor. Remote: any thread may write it, with atomics only. */
enum {
    FX_HOT_TMR = 8,       /* remote, 4 words */
    FX_HOT_MODE = 12,     /* remote: vcpu->mode */
    FX_HOT_REQUESTS = 13, /* remote: KVM_REQ_* mask */
    FX_HOT_FLAGS = 14,    /* owner */
    FX_HOT_BLOCKED = 15   /* remote: 1 while the vCPU's thread sleeps */
};

/* A record's reason that is no exit: 0xF2 reaches the vCPU's pCPU. */
#define FX_NOTIFICATION 0xF00000F2u
/* Another one: a device sets the line of the GSI in msr to the level in info; accepted is KVM_IRQ_LINE_STATUS's. */
#define FX_IRQ_LINE 0xF000AE67u

/* The descriptor: SDM vol. 3C, "Posted-Interrupt Processing". */
struct fx_pid {
    uint64_t pir[4];
    uint64_t control; /* bit 0 ON, bit 1 SN, bits 23:16 NV, bits 63:32 NDST */
    uint64_t reserved[3];
};

/* One exit for the batch door. */
struct fx_exit {
    uint32_t vcpu;
    uint32_t reason; /* VMX exit reason or SVM exit code */
    uint32_t msr;    /* ECX of an MSR access */
    uint32_t info;   /* exit qualification or EXITINFO1; of an access to memory its length, bit 31 for a write */
    uint64_t value;  /* EDX:EAX, or the data written */
    uint64_t gpa;    /* guest-physical address of an access to memory */
};

/*
 * One result; code overlays the bytes from completion to flags. value is what a read returned; of any other exit it says
 * whom the effects in flags are for: value >> 32 targets, the first is vCPU value & 0xfff with value >> 12 & 15.
 */
struct fx_outcome {
    uint8_t completion;
    uint8_t path;
    uint8_t fault;
    uint8_t refusal;
    int16_t accepted;
    uint8_t user; /* KVM_EXIT_* + 1, or 0 */
    uint8_t flags;
    uint64_t value;
};
/* cffi:end */

#endif
