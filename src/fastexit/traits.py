"""What differs between kernel generations: one bit a behaviour.

profile.py says which generation has which. A kernel tests bits and never a version.
"""

from __future__ import annotations

from enum import IntFlag, unique

OLDEST = "seed-v3"
"""The first generation: what holds "from the beginning" holds from it on."""

RULES = 64
"""Number of the first bit that the header keeps in H_RULES."""

HYPERV = 128
"""Number of the first bit that the header keeps in H_HYPERV_RULES."""


@unique
class Trait(IntFlag):
    """A behaviour that differs between generations.

    Traits are grouped by subject, and each has a fixed bit: a new one stands in its group and takes the lowest bit that
    no other has. The machine's header keeps them in three words, each with room for 64: H_TRAITS, which a fast exit
    looks at, H_RULES, and H_HYPERV_RULES for what Windows guests see. Kernels know the bits of the first one as
    ``k.T_...``, those of the second one, from RULES on, as ``k.R_...``, those from HYPERV on as ``k.HVR_...``.
    """

    # -- where the fast handler runs
    HOOK_IRQOFF = 1 << 0
    """handle_exit_irqoff, with mode OUTSIDE_GUEST_MODE already; otherwise the vendor's run function, IN_GUEST_MODE."""
    SKIP_LATE = 1 << 1
    """The instruction is skipped in handle_exit (SKIP_EMUL_INS), not by the fast handler."""
    SKIP_AFTER_TRACE = 1 << 2
    """The handler traces kvm_msr first and skips then; otherwise it skips first."""
    SKIP_HONOURED = 1 << 3
    """A skip that asks for user space (KVM_EXIT_DEBUG) is honoured; before, it was lost."""
    ICR_REENTERS = 1 << 4
    """A fast ICR write re-enters the guest; otherwise it is EXIT_HANDLED (or SKIP_EMUL_INS)."""
    GUARD_L2 = 1 << 5
    """The handler declines while the vCPU runs L2."""
    SRCU_IN_FASTPATH = 1 << 6
    """SRCU is taken around the fast WRMSR handler."""
    SVM_EXIT_32 = 1 << 7
    """SVM compares its exit code with VMX's 32, which is a DR0 read there."""
    SVM_NEXT_RIP = 1 << 8
    """SVM needs NRIPS and a next RIP: without SRCU nothing may be decoded."""

    # -- what is fast
    ICR_ANY_RESOLVED = 1 << 9
    """Whatever the map-based resolver can finish, traced behind the delivery; otherwise physical and Fixed only."""
    ICR_NO_SHORTHAND = 1 << 10
    ICR_NO_BROADCAST = 1 << 11
    ICR_NO_RESERVED = 1 << 12
    TSCDL_HV_TIMER = 1 << 13
    """TSC_DEADLINE is fast when the VMX preemption timer can be used."""
    TSCDL_ALWAYS = 1 << 14
    PREEMPTION_TIMER_FAST = 1 << 15
    """The VMX preemption timer's exit is handled in the vendor's run function."""
    FORCED_EXIT_HANDLED = 1 << 16
    """An exit that KVM forced by the preemption timer is EXIT_HANDLED there; before, its generic handler ate it."""
    HLT_FAST = 1 << 17
    INVD_FAST = 1 << 18
    MSR_IMM = 1 << 19
    """WRMSR and RDMSR with an immediate are known; the write is fast."""

    # -- what a register write does
    ICR_RESERVED_GP = 1 << 20
    """Reserved ICR bits fault in x2APIC mode."""
    MSR_UPPER_GP = 1 << 21
    """Bits 63:32 of an x2APIC register other than the ICR fault."""
    SELF_IPI_WRITES_ICR = 1 << 22
    ICR_SPLIT = 1 << 23
    """x2APIC ICR stored as 0x300/0x310 on every vendor."""
    ICR_SPLIT_SVM = 1 << 24
    """x2APIC ICR stored as 0x300/0x310 on SVM only; else 64 bits at 0x300."""
    LOWEST_REWRITE_FIRST = 1 << 25
    """Lowest priority to physical 0xFF becomes Fixed before the resolver, not after it."""

    TIMER_NO_CATCH_UP = 1 << 26
    """A periodic timer that is late by more than a period goes on from now."""

    # -- posted interrupts
    PI_KICK = 1 << 27
    """A target that is not in guest mode is kicked; later kernels only wake it."""
    PI_EMPTY_LOSES_RVI = 1 << 28
    """ON with an empty PIR reports no pending vector, so RVI becomes 0."""
    PIR_WHILE_ACTIVE = 1 << 45
    """Nobody looks into PIR while APICv is inhibited, so what was posted before waits until it is active again."""

    # -- APICv inhibits
    INHIBITS = 1 << 29
    """APICv can be inhibited for a whole machine, by user space's reasons and by SVM's interrupt windows."""
    INHIBIT_ID_BASE = 1 << 30
    """A modified xAPIC id or a moved APIC page inhibits APICv; every change of an inhibit is traced, not only the ones
    that switch APICv."""
    INHIBIT_MAP = 1 << 31
    """The APIC map inhibits APICv, for as long as it is dropped or useless; a change of the APIC's mode requests an
    update instead of making it at once."""

    INHIBITED_PAGE_UNMAPPED = 1 << 39
    """VMX: an access to the xAPIC page while APICv is inhibited is an EPT violation, each time, and emulated; before,
    the page stayed mapped."""

    # -- order of tracepoints
    TRACE_ICR2_FIRST = 1 << 32
    """Generic x2APIC path writes ICR2, then ICR, and traces both before the IPI."""
    TRACE_WRITE_FIRST = 1 << 33
    """Fast path traces the raw ICR write before the IPI."""
    TRACE_EXIT_LATE_VMX = 1 << 34
    """kvm_exit comes from handle_exit, after the fast handler."""
    TRACE_EXIT_LATE_SVM = 1 << 35
    TRACE_REENTRY = 1 << 36
    """kvm_entry comes from the vendor's run function, so that every re-entry has its line."""
    TRACE_DOORBELL = 1 << 37
    """AVIC's doorbells and its scan for an IPI's targets have tracepoints."""

    MMIO_NOT_VECTORING = 1 << 38
    """An access to a device during the delivery of an event is an error on both vendors, whichever exit it takes."""

    # -- the manual's rules, which no kernel has: SDM vol. 3A, chapter 10
    RESERVED_BITS_GP = 1 << 40
    """A reserved bit faults in any x2APIC register, so does anything but 0 to EOI (SDM 10.12.1.2, 10.12.1.3). In xAPIC
    mode such bits of SVR and ICR read as 0 (10.6.1, 10.9)."""
    STATUS_READ_ONLY = 1 << 41
    """Delivery status and remote IRR of LVT entries are what the APIC says, 0, whatever is written (SDM 10.5.1)."""
    ERRORS_LOGGED = 1 << 42
    """Vectors below 16 that are sent or received, which are not delivered, and registers of the xAPIC page that there
    are not, are errors: the next write of ESR shows them, and the first one behind a write is LVTERR's interrupt (SDM
    10.5.2, 10.5.3)."""
    MASKED_TICK_LOST = 1 << 44
    """A timer that runs out while its LVT entry is masked, or the APIC off, interrupts nobody (SDM 10.5.1)."""
    ENABLED_RESET = 1 << 43
    """An APIC that APICBASE enables anew begins as after a reset, but for its id (SDM 10.12.5.1)."""

    # -- rules of registers
    TDCR_MASKED = 1 << 64
    """TDCR keeps its three bits alone; before, whatever was written read back."""
    CR8_KEEPS_TPR_BIT_2 = 1 << 65
    """CR8 writes, KVM_SET_SREGS among them, leave bit 2 of the old TPR standing (kvm_lapic_set_tpr)."""
    LVTPC_MASKED = 1 << 66
    """A performance interrupt masks LVTPC when it is delivered."""
    LVTPC_KEPT_ON_AMD = 1 << 67
    """Where LVTPC_MASKED holds: for guests whose CPUID is Intel-compatible alone."""
    X2APIC_READS_UNCHECKED = 1 << 68
    """x2APIC virtualisation lets reads of all 256 MSRs through, those of no register as well: no exit and no fault."""

    # -- the APIC map and ids
    MAP_BY_VOTES = 1 << 69
    """The map has no logical half unless the APICs that are enabled agree on one mode, and aliases do not drop it."""
    ID_FROM_PAGE = 1 << 70
    """KVM_SET_LAPIC in x2APIC mode takes the id from the page; otherwise it is always the vCPU's."""
    ID_KEPT_ON_LEAVING = 1 << 71
    """A host that takes x2APIC mode away leaves the 32-bit id in the register."""
    MAP_DIRTY_BY_SVR = 1 << 72
    """KVM_SET_LAPIC rebuilds the map only if SVR's enable bit changed."""

    # -- events and states
    NMI_COUNTED = 1 << 74
    """KVM_GET_VCPU_EVENTS shows how many NMIs wait, and KVM_SET_VCPU_EVENTS queues its number, to be limited; before,
    the one showed a bit, and the other's number was pending as it was."""
    SMI_FOLDED = 1 << 75
    """KVM_GET_VCPU_EVENTS shows an SMI that is only requested."""
    NMI_MASK_OVER_INIT = 1 << 76
    """SVM: NMIs that are masked stay masked over an INIT."""
    MP_STATE_CHECKED_IN_RUN = 1 << 77
    """KVM_SET_MP_STATE and KVM_SET_VCPU_EVENTS take an INIT_RECEIVED that is blocked; KVM_RUN refuses it."""
    SMI_ALWAYS = 1 << 78
    """There is no CONFIG_KVM_SMM yet: every kernel has SMM."""
    UNHALT_KEPT = 1 << 107
    """A PV kick waits until a halt uses it up; later, whatever makes a vCPU run uses it up."""
    BLOCKED_INIT_WAKES = 1 << 108
    """An INIT that is blocked ends a halt all the same."""
    LATCHED_INIT_WITH_SMM = 1 << 79
    """KVM_SET_VCPU_EVENTS reads latched_init only together with smm, and leaving SMM keeps a latched INIT."""
    INHIBIT_REQUESTS_EVENT = 1 << 96
    """APICv that goes off requests an EVENT, so that IRR is looked at."""
    APICV_AT_ENTRY = 1 << 97
    """A change of inhibits is a request to every vCPU; before, a running one changed at once."""

    # -- timers
    TMCCT_RESTORED = 1 << 80
    """KVM_GET_LAPIC computes TMCCT, and KVM_SET_LAPIC goes on from it; before, from TMICT."""
    ONE_SHOT_RESTORES_EXPIRED = 1 << 81
    """KVM_SET_LAPIC of a one-shot timer with TMCCT 0 ticks at once; before, the whole period began again."""
    TICK_POSTED_AT_ONCE = 1 << 82
    """With APICv a timer that runs out posts its vector where it runs out; before, in the loop's tail."""
    TICK_ONLY_IN_RUN = 1 << 83
    """A timer that runs out during an ioctl stays pending, APICv or not."""
    HV_TIMER_CANCELLED = 1 << 84
    """TMICT and KVM_SET_LAPIC stop a preemption timer that runs, and a change to or from deadline mode drops a tick
    that waits; before, only the hrtimer was cancelled (cancel_apic_timer)."""
    HV_TIMER_CANCELLED_FIRST = 1 << 85
    """The preemption timer is given up before its tick, so that no entry waits for one that TMICT counted."""
    WAIT_TRACED_LATE = 1 << 86
    """kvm_wait_lapic_expire is traced behind the exit, once for all entries of an iteration; before the wait, now."""
    POSTS_TIMER_ANYWAY = 1 << 87
    """pi_inject_timer posts timers also of vCPUs whose MWAIT and HLT exits are there."""
    DEADLINE_READ_DISABLED = 1 << 88
    """TSC_DEADLINE reads its value with the APIC disabled."""
    DEADLINE_WRITTEN_DISABLED = 1 << 89
    """TSC_DEADLINE is written with the APIC disabled."""
    DEADLINE_WRITTEN_IN_MODE_3 = 1 << 105
    """TSC_DEADLINE is written where LVTT has the reserved mode; the preemption timer then counts down to it."""
    WAKE_RESTARTS_TIMER = 1 << 73
    """Where there is a preemption timer, a sleeper's wake-up starts its timer anew whatever counted; later, only if the
    preemption timer had counted."""
    MODE_KEEPS_HV_TIMER = 1 << 90
    """A change of LVTT to deadline mode leaves the preemption timer of a one-shot running."""

    # -- KVM_SET_LAPIC
    SET_LAPIC_STORES_BASE = 1 << 91
    """KVM_SET_LAPIC stores APICBASE once more."""
    SET_LAPIC_KEEPS_WAIT = 1 << 111
    """KVM_SET_LAPIC leaves the deadline for which the next entry has to wait."""
    RESTORE_CLEARS_PIR_LAST = 1 << 92
    """KVM_SET_LAPIC and reset clear PIR and ON at their end, with what was posted meanwhile; what went to IRR before,
    because PPR fell, stays there."""

    # -- descriptors
    SN_ON_EVERY_PUT = 1 << 93
    """vCPUs that are put and do not block have SN set; before, only those whose thread was preempted."""
    NV_BEFORE_BLOCKING = 1 << 94
    """The wake-up vector is set before the thread blocks, where devices post, and taken back when it wakes; later, by
    put and load."""
    NV_WHATEVER_IF = 1 << 124
    """The wake-up vector is set whether or not the guest would take an interrupt; one that is posted ends its halt."""
    PI_NOTIFIES_SELF = 1 << 95
    """A vCPU that posts to itself notifies its own pCPU."""

    # -- SVM
    CR8_WITH_PPR = 1 << 98
    """The intercept of CR8 writes follows every update of PPR; before, KVM_SET_LAPIC, KVM_SET_SREGS and entries."""
    CR8_FOLLOWS_AVIC = 1 << 120
    """CR8 writes are intercepted when AVIC goes off and free when it comes; before, they stayed as they were."""
    V_TPR_KEPT_BY_AVIC = 1 << 121
    """An entry with AVIC active does not load V_TPR, so a TPR that KVM has written is lost at the next exit."""
    AVIC_MANY_SCANNED = 1 << 99
    """An incomplete IPI to several logical targets goes to the scan of all vCPUs. In x2APIC mode any logical one does,
    but for those to cluster 0, which reach nobody."""
    AVIC_OLD = 1 << 100
    """AVIC of the first kernels: doorbells go by the table's IsRunning bit; incomplete IPIs wake targets that do not
    run, and are lost where a target does not exist; entries move with an xAPIC id."""
    AVIC_LDR_LOOSE = 1 << 122
    """An LDR's lowest bit is its logical id; one without an entry ends KVM_RUN. RRR is written like any register."""
    INHIBIT_X2APIC = 1 << 123
    """A guest whose CPUID offers x2APIC mode has no AVIC."""
    X2AVIC_WRITES_EXIT = 1 << 101
    """x2AVIC lets writes of TPR, EOI, SELF_IPI and ICR through, and reads of all registers but TMCCT; the rest exits as
    MSR accesses."""
    AVIC_ID_REFUSED = 1 << 102
    """A vCPU whose id is beyond AVIC's table cannot be made; otherwise it inhibits AVIC."""

    # -- the guest's TSC
    TSC_SYNCED_BY_GUEST = 1 << 119
    """A guest's write of IA32_TSC within a second of the other vCPUs' TSC gives it theirs; later only user space's."""
    TSC_FIRST_WRITE_KEPT = 1 << 125
    """User space's first write of IA32_TSC in a VM is taken as it is, near to the TSC that vCPUs began with or not."""

    # -- PIT
    PIT_SPEAKER_APART = 1 << 117
    """The speaker's bit of port 0x61 is no flag of KVM_GET_PIT2, nor one that KVM_SET_PIT2 sets."""
    PIT_ANYWHERE = 1 << 118
    """KVM_CREATE_PIT2 succeeds without an in-kernel PIC; the PIT counts nothing then, but its ports are there."""

    # -- counters, windows, traces
    REENTRY_COUNTED = 1 << 103
    """stat.exits counts fast re-entries."""
    FILTER_RANGES_COUNTED = 1 << 112
    """stat.exits counts each range of the MSR filter that does not decide: its increment went astray in a backport."""
    IRQWIN_COUNTED = 1 << 104
    """Interrupt windows that inhibit APICv are counted for the whole VM."""
    READ_ACROSS_TRACED = 1 << 106
    """A read of the xAPIC page over a register's end has its kvm_apic line all the same."""

    # -- PIC pair
    PIC_POLL_BARE = 1 << 116
    """A poll answers the pin alone; later bit 7 says that there is one."""
    PIC_WAKES_ANYWAY = 1 << 126
    """Whenever the pair's output is looked at anew and was low, the first vCPU that takes its interrupts is woken."""
    # -- IOAPIC
    SCAN_STALE = 1 << 109
    """The EOI of a vector that a vCPU has from an entry that now means others makes it scan again."""
    SCAN_SPLIT_PENDING = 1 << 110
    """Split irqchip: a vCPU's handled vectors have those that it is still to end, whomever their messages mean now."""
    SCAN_SPLIT_SYNCS = 1 << 46
    """Split irqchip: a scan empties PIR into IRR first, as one of the irqchip's own IOAPIC always did."""
    SCAN_OLD_MODE = 1 << 127
    """Who scans behind a write of an entry: whom its old destination meant in its old mode; before, in the new one."""
    RESAMPLER_ASKED = 1 << 113
    """A pin that is unmasked while it waits asks its resampling irqfds; before, it delivered."""
    LAZY_EOI_WHOLE = 1 << 114
    """Where APICv swallows EOIs, a line that rises makes up for all that the last one would have done."""
    LAZY_EOI_LEVEL = 1 << 115
    """It does so for level pins, too."""

    # -- Hyper-V
    GATED = 1 << 128
    """A guest may use Hyper-V's MSRs and hypercalls if its CPUID says "Hv#1"; before, any guest may."""
    SYNIC_INHIBITS = 1 << 129
    """KVM_CAP_HYPERV_SYNIC inhibits APICv for good; later auto-EOI does, while it is in use."""
    PV_EOI_ALWAYS_CLEARED = 1 << 130
    """PV EOI's cell is 0 behind an exit; later a cell that the guest has cleared is left as it is, all eight bits."""
    PV_EOI_STORED_FIRST = 1 << 131
    """MSR_KVM_PV_EOI_EN keeps the address of a cell that is not there, although the write faults."""
    EMULATION_STATUS_CLEARED = 1 << 132
    """A guest may only clear TSC_EMULATION_STATUS; before, it wrote what it liked."""
    TSC_INVARIANT = 1 << 133
    """There is TSC_INVARIANT_CONTROL."""

    # -- Hyper-V: hypercalls
    CALL_XMM = 1 << 140
    """Fast hypercalls whose input exceeds two registers take the rest from XMM0 to XMM5; before, they were invalid."""
    CALL_VAR_COUNT = 1 << 141
    """The size of a variable header is looked at, as are reserved bits; before, the set's own mask told its size."""
    CALL_EXTENDED = 1 << 142
    """Extended hypercalls, from 0x8001 on, are user space's."""
    CALL_FLUSH_LIST = 1 << 143
    """The list of a TLB flush is read, so it has to be there; before, all was flushed in any case."""
    SIGNAL_PARAMETER = 1 << 144
    """User space is told what SIGNAL_EVENT says, not where it says so."""

    # -- Hyper-V: synthetic timers
    STIMER_SATURATES = 1 << 145
    """A deadline that is too far for the host's clock never comes; before, it wrapped."""
