"""Exit reasons: why hardware left the guest (VMX, SVM), and why KVM_RUN left for user space.

Numbers and names only, as in regs. Sources: SDM vol. 3D appendix C, APM vol. 2 appendix C, the KVM API.
"""

from __future__ import annotations

from enum import IntEnum


class KvmExit(IntEnum):
    """Reasons for which KVM_RUN returns to user space, by KVM's names without the ``KVM_EXIT_`` prefix."""

    UNKNOWN = 0
    EXCEPTION = 1
    IO = 2
    HYPERCALL = 3
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    TPR_ACCESS = 12
    NMI = 16
    INTERNAL_ERROR = 17
    SYSTEM_EVENT = 24
    IOAPIC_EOI = 26
    HYPERV = 27
    X86_RDMSR = 29
    X86_WRMSR = 30
    X86_BUS_LOCK = 33


class VmxExit(IntEnum):
    """VMX basic exit reasons (SDM appendix C), by the names that kvm_exit prints."""

    EXCEPTION_NMI = 0
    EXTERNAL_INTERRUPT = 1
    TRIPLE_FAULT = 2
    INIT_SIGNAL = 3
    SIPI_SIGNAL = 4
    OTHER_SMI = 6
    INTERRUPT_WINDOW = 7
    NMI_WINDOW = 8
    TASK_SWITCH = 9
    CPUID = 10
    HLT = 12
    INVD = 13
    INVLPG = 14
    RDPMC = 15
    RDTSC = 16
    VMCALL = 18
    VMCLEAR = 19
    VMLAUNCH = 20
    VMPTRLD = 21
    VMPTRST = 22
    VMREAD = 23
    VMRESUME = 24
    VMWRITE = 25
    VMOFF = 26
    VMON = 27
    CR_ACCESS = 28
    DR_ACCESS = 29
    IO_INSTRUCTION = 30
    MSR_READ = 31
    MSR_WRITE = 32
    INVALID_STATE = 33
    MSR_LOAD_FAIL = 34
    MWAIT_INSTRUCTION = 36
    MONITOR_TRAP_FLAG = 37
    MONITOR_INSTRUCTION = 39
    PAUSE_INSTRUCTION = 40
    MCE_DURING_VMENTRY = 41
    TPR_BELOW_THRESHOLD = 43
    APIC_ACCESS = 44
    EOI_INDUCED = 45
    GDTR_IDTR = 46
    LDTR_TR = 47
    EPT_VIOLATION = 48
    EPT_MISCONFIG = 49
    INVEPT = 50
    RDTSCP = 51
    PREEMPTION_TIMER = 52
    INVVPID = 53
    WBINVD = 54
    XSETBV = 55
    APIC_WRITE = 56
    RDRAND = 57
    INVPCID = 58
    VMFUNC = 59
    ENCLS = 60
    RDSEED = 61
    PML_FULL = 62
    XSAVES = 63
    XRSTORS = 64
    UMWAIT = 67
    TPAUSE = 68
    BUS_LOCK = 74
    NOTIFY = 75
    MSR_READ_IMM = 84
    MSR_WRITE_IMM = 85


VMX_FAILED_VMENTRY = 1 << 31


class SvmExit(IntEnum):
    """SVM exit codes (APM vol. 2 appendix C), by the names that kvm_exit prints, in upper case."""

    READ_CR0 = 0x000
    READ_CR2 = 0x002
    READ_CR3 = 0x003
    READ_CR4 = 0x004
    READ_CR8 = 0x008
    WRITE_CR0 = 0x010
    WRITE_CR2 = 0x012
    WRITE_CR3 = 0x013
    WRITE_CR4 = 0x014
    WRITE_CR8 = 0x018
    READ_DR0 = 0x020
    READ_DR1 = 0x021
    READ_DR2 = 0x022
    READ_DR3 = 0x023
    READ_DR4 = 0x024
    READ_DR5 = 0x025
    READ_DR6 = 0x026
    READ_DR7 = 0x027
    WRITE_DR0 = 0x030
    WRITE_DR1 = 0x031
    WRITE_DR2 = 0x032
    WRITE_DR3 = 0x033
    WRITE_DR4 = 0x034
    WRITE_DR5 = 0x035
    WRITE_DR6 = 0x036
    WRITE_DR7 = 0x037
    INTERRUPT = 0x060
    NMI = 0x061
    SMI = 0x062
    INIT = 0x063
    VINTR = 0x064
    CR0_SEL_WRITE = 0x065
    READ_IDTR = 0x066
    READ_GDTR = 0x067
    READ_LDTR = 0x068
    READ_TR = 0x069
    WRITE_IDTR = 0x06A
    WRITE_GDTR = 0x06B
    WRITE_LDTR = 0x06C
    WRITE_TR = 0x06D
    RDTSC = 0x06E
    RDPMC = 0x06F
    PUSHF = 0x070
    POPF = 0x071
    CPUID = 0x072
    RSM = 0x073
    IRET = 0x074
    SWINT = 0x075
    INVD = 0x076
    PAUSE = 0x077
    HLT = 0x078
    INVLPG = 0x079
    INVLPGA = 0x07A
    IO = 0x07B
    MSR = 0x07C
    TASK_SWITCH = 0x07D
    FERR_FREEZE = 0x07E
    SHUTDOWN = 0x07F
    VMRUN = 0x080
    VMMCALL = 0x081
    VMLOAD = 0x082
    VMSAVE = 0x083
    STGI = 0x084
    CLGI = 0x085
    SKINIT = 0x086
    RDTSCP = 0x087
    ICEBP = 0x088
    WBINVD = 0x089
    MONITOR = 0x08A
    MWAIT = 0x08B
    XSETBV = 0x08D
    WRITE_EFER_TRAP = 0x08F
    WRITE_CR0_TRAP = 0x090
    WRITE_CR4_TRAP = 0x094
    WRITE_CR8_TRAP = 0x098
    INVPCID = 0x0A2
    IDLE_HLT = 0x0A6
    NPF = 0x400
    AVIC_INCOMPLETE_IPI = 0x401
    AVIC_UNACCELERATED_ACCESS = 0x402
    VMGEXIT = 0x403
    ERR = 0xFFFF_FFFF
