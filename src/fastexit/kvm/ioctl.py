"""KVM's ioctls of x86-64: numbers, structures, one way to call them.

Models: nothing; these are the kernel's binary interface (Documentation/virt/kvm/api.rst), through cffi. A request's
number holds the size of its structure, so a structure that is declared wrong cannot be called.
"""

from __future__ import annotations

import os
from typing import Any

from cffi import FFI

ffi: Any = FFI()
ffi.cdef(
    """
    int ioctl(int fd, unsigned long request, void *argument);

    struct kvm_lapic_state { uint8_t regs[1024]; };
    struct kvm_mp_state { uint32_t mp_state; };
    struct kvm_interrupt { uint32_t irq; };
    struct kvm_msi { uint32_t address_lo, address_hi, data, flags, devid; uint8_t pad[12]; };
    struct kvm_msrs { uint32_t nmsrs, pad; };
    struct one_msr { uint32_t nmsrs, pad, index, reserved; uint64_t data; };
    struct kvm_vcpu_events {
        struct { uint8_t injected, nr, has_error_code, pending; uint32_t error_code; } exception;
        struct { uint8_t injected, nr, soft, shadow; } interrupt;
        struct { uint8_t injected, pending, masked, pad; } nmi;
        uint32_t sipi_vector, flags;
        struct { uint8_t smm, pending, smm_inside_nmi, latched_init; } smi;
        uint8_t rest[36];
    };
    struct kvm_regs {
        uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags;
    };
    struct kvm_segment {
        uint64_t base;
        uint32_t limit;
        uint16_t selector;
        uint8_t type, present, dpl, db, s, l, g, avl, unusable, pad;
    };
    struct kvm_dtable { uint64_t base; uint16_t limit, pad[3]; };
    struct kvm_sregs {
        struct kvm_segment segments[6], tr, ldt;
        struct kvm_dtable gdt, idt;
        uint64_t cr0, cr2, cr3, cr4, cr8, efer, apic_base, interrupt_bitmap[4];
    };
    struct kvm_cpuid_entry2 { uint32_t function, index, flags, eax, ebx, ecx, edx, pad[3]; };
    struct kvm_cpuid2 { uint32_t nent, pad; };
    struct cpuid_table { uint32_t nent, pad; struct kvm_cpuid_entry2 entries[256]; };
    struct kvm_enable_cap { uint32_t cap, flags; uint64_t args[4]; uint8_t pad[64]; };
    struct kvm_userspace_memory_region {
        uint32_t slot, flags;
        uint64_t guest_phys_addr, memory_size, userspace_addr;
    };
    struct kvm_msr_filter_range { uint32_t flags, nmsrs, base; void *bitmap; };
    struct kvm_msr_filter { uint32_t flags; struct kvm_msr_filter_range ranges[16]; };
    struct kvm_irq_routing { uint32_t nr, flags; };
    struct route_to_msi { uint32_t gsi, type, flags, pad, address_lo, address_hi, data, rest[5]; };
    struct routing_table { uint32_t nr, flags; struct route_to_msi entries[24]; };
    struct route_to_sint { uint32_t gsi, type, flags, pad, vcpu, sint, rest[6]; };
    struct sint_routing_table { uint32_t nr, flags; struct route_to_sint entries[64]; };
    struct kvm_hyperv_eventfd { uint32_t conn_id; int32_t fd; uint32_t flags, padding[3]; };
    struct kvm_irq_level { uint32_t irq, level; };
    struct kvm_irqchip { uint32_t chip_id, pad; uint8_t chip[512]; };
    struct kvm_irqfd { uint32_t fd, gsi, flags, resamplefd; uint8_t pad[16]; };
    struct kvm_pit_config { uint32_t flags, pad[15]; };
    struct kvm_pit_state2 { uint8_t channels[72]; uint32_t flags, reserved[9]; };
    struct kvm_reinject_control { uint8_t pit_reinject, reserved[31]; };
    struct kvm_signal_mask { uint32_t len; };
    struct signal_set { uint32_t len; uint8_t signals[8]; };
    struct kvm_device_attr { uint32_t flags, group; uint64_t attr, addr; };
    struct kvm_translation { uint64_t linear_address, physical_address; uint8_t valid, writeable, usermode, pad[5]; };
    struct kvm_debugregs { uint64_t db[4], dr6, dr7, flags, reserved[9]; };
    struct kvm_clock_data { uint64_t clock; uint32_t flags, pad0; uint64_t realtime, host_tsc; uint32_t pad[4]; };
    struct kvm_run {
        uint8_t request_interrupt_window, immediate_exit, padding[6];
        uint32_t exit_reason;
        uint8_t ready_for_interrupt_injection, if_flag;
        uint16_t flags;
        uint64_t cr8, apic_base;
        union {
            struct { uint8_t direction, size; uint16_t port; uint32_t count; uint64_t data_offset; } io;
            struct { uint64_t phys_addr; uint8_t data[8]; uint32_t len; uint8_t is_write; } mmio;
            struct { uint8_t error, pad[7]; uint32_t reason, index; uint64_t data; } msr;
            struct { uint8_t vector; } eoi;
            struct { uint64_t reason; uint32_t cpu; } fail_entry;
            struct { uint32_t suberror, ndata; uint64_t data[16]; } internal;
            struct { uint32_t type, ndata; uint64_t data[16]; } system_event;
            uint8_t whole[256];
        };
        uint64_t kvm_valid_regs, kvm_dirty_regs;
        struct kvm_regs regs;
    };
    """
)
_libc: Any = ffi.dlopen(None)

CLOSED = -1
"""For a file descriptor that was closed: its number may be another VM's by now."""
_KVM = 0xAE


def _request(number: int, structure: str | None = None, *, reads: bool = False, writes: bool = False) -> int:
    """_IO, _IOR, _IOW or _IOWR: ``writes`` is what user space hands in, ``reads`` what it gets."""
    size = ffi.sizeof(f"struct {structure}") if structure else 0
    return reads << 31 | writes << 30 | size << 16 | _KVM << 8 | number


CREATE_VM = _request(0x01)
CHECK_EXTENSION = _request(0x03)
GET_VCPU_MMAP_SIZE = _request(0x04)
GET_SUPPORTED_CPUID = _request(0x05, "kvm_cpuid2", reads=True, writes=True)
CREATE_VCPU = _request(0x41)
SET_USER_MEMORY_REGION = _request(0x46, "kvm_userspace_memory_region", writes=True)
SET_TSS_ADDR = _request(0x47)
CREATE_IRQCHIP = _request(0x60)
IRQ_LINE = _request(0x61, "kvm_irq_level", writes=True)
GET_IRQCHIP = _request(0x62, "kvm_irqchip", reads=True, writes=True)
SET_IRQCHIP = _request(0x63, "kvm_irqchip", reads=True)
IRQ_LINE_STATUS = _request(0x67, "kvm_irq_level", reads=True, writes=True)
SET_GSI_ROUTING = _request(0x6A, "kvm_irq_routing", writes=True)
REINJECT_CONTROL = _request(0x71)
IRQFD = _request(0x76, "kvm_irqfd", writes=True)
CREATE_PIT2 = _request(0x77, "kvm_pit_config", writes=True)
SET_CLOCK = _request(0x7B, "kvm_clock_data", writes=True)
SET_BOOT_CPU_ID = _request(0x78)
RUN = _request(0x80)
GET_REGS = _request(0x81, "kvm_regs", reads=True)
SET_REGS = _request(0x82, "kvm_regs", writes=True)
GET_SREGS = _request(0x83, "kvm_sregs", reads=True)
SET_SREGS = _request(0x84, "kvm_sregs", writes=True)
TRANSLATE = _request(0x85, "kvm_translation", reads=True, writes=True)
INTERRUPT = _request(0x86, "kvm_interrupt", writes=True)
GET_MSRS = _request(0x88, "kvm_msrs", reads=True, writes=True)
SET_MSRS = _request(0x89, "kvm_msrs", writes=True)
SET_SIGNAL_MASK = _request(0x8B, "kvm_signal_mask", writes=True)
GET_LAPIC = _request(0x8E, "kvm_lapic_state", reads=True)
SET_LAPIC = _request(0x8F, "kvm_lapic_state", writes=True)
SET_CPUID2 = _request(0x90, "kvm_cpuid2", writes=True)
GET_MP_STATE = _request(0x98, "kvm_mp_state", reads=True)
SET_MP_STATE = _request(0x99, "kvm_mp_state", writes=True)
NMI = _request(0x9A)
X86_SETUP_MCE = 1 << 30 | 8 << 16 | _KVM << 8 | 0x9C
X86_GET_MCE_CAP_SUPPORTED = 1 << 31 | 8 << 16 | _KVM << 8 | 0x9D
GET_PIT2 = _request(0x9F, "kvm_pit_state2", reads=True)
SET_PIT2 = _request(0xA0, "kvm_pit_state2", writes=True)
GET_VCPU_EVENTS = _request(0x9F, "kvm_vcpu_events", reads=True)
SET_VCPU_EVENTS = _request(0xA0, "kvm_vcpu_events", writes=True)
ENABLE_CAP = _request(0xA3, "kvm_enable_cap", writes=True)
SET_DEVICE_ATTR = _request(0xE1, "kvm_device_attr", writes=True)
GET_DEVICE_ATTR = _request(0xE2, "kvm_device_attr", writes=True)
SET_DEBUGREGS = _request(0xA2, "kvm_debugregs", writes=True)
SET_TSC_KHZ = _request(0xA2)
GET_TSC_KHZ = _request(0xA3)
SIGNAL_MSI = _request(0xA5, "kvm_msi", writes=True)
SMI = _request(0xB7)
HYPERV_EVENTFD = _request(0xBD, "kvm_hyperv_eventfd", writes=True)
X86_SET_MSR_FILTER = _request(0xC6, "kvm_msr_filter", writes=True)

CAP_HYPERV = 44
CAP_TSC_CONTROL = 60
CAP_GET_TSC_KHZ = 61
CAP_MAX_VCPUS = 66
CAP_SYNC_REGS = 74
CAP_DISABLE_QUIRKS = 116
CAP_X86_SMM = 117
CAP_SPLIT_IRQCHIP = 121
CAP_MAX_VCPU_ID = 128
CAP_X2APIC_API = 129
CAP_HYPERV_SYNIC = 123
CAP_HYPERV_SYNIC2 = 148
CAP_IMMEDIATE_EXIT = 136
CAP_X86_USER_SPACE_MSR = 188
CAP_X86_MSR_FILTER = 189
CAP_HYPERV_ENFORCE_CPUID = 199
CAP_DISABLE_QUIRKS2 = 213
CAP_X86_APIC_BUS_CYCLES_NS = 237

ROUTE_IRQCHIP, ROUTE_MSI, ROUTE_HV_SINT = 1, 2, 4
HYPERV_EVENTFD_DEASSIGN = 1
IRQFD_DEASSIGN, IRQFD_RESAMPLE = 1, 2
PIT_SPEAKER = 1
EVENTS_NMI_PENDING, EVENTS_SIPI_VECTOR, EVENTS_SHADOW, EVENTS_SMM = 1, 2, 4, 8
MCG_CMCI_P = 1 << 10


def call(fd: int, request: int, argument: Any = None) -> int:
    """One ioctl: what it returns; OSError with the kernel's errno.

    ``argument`` is a cffi pointer, an integer that the request takes in a pointer's place, or None.
    """
    if argument is None:
        argument = ffi.NULL
    elif type(argument) is int:
        argument = ffi.cast("void *", argument)
    result: int = _libc.ioctl(fd, request, argument)
    if result < 0:
        error = ffi.errno
        raise OSError(error, os.strerror(error))
    return result


def enable_cap(fd: int, cap: int, argument: int) -> None:
    """KVM_ENABLE_CAP of a VM with one argument."""
    enable = ffi.new("struct kvm_enable_cap *", {"cap": cap, "args": [argument]})
    call(fd, ENABLE_CAP, enable)
