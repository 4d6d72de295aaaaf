"""Memory of a machine: one block of 64-bit words, its regions, word indices, dtypes, sizes and ABI version.

Everything a machine is lies in one page-aligned block, so one address names it. Regions have fixed places for MAX_VCPUS
vCPUs; the block is reserved, not filled, so a page that no vCPU uses costs no memory. Vector sets (PIR, IRR, ISR, TMR)
are four words of 64 bits each, the shape of the posted-interrupt descriptor: PIR to IRR is four ORs, and the slotted
form of the register page is made when somebody asks for the page.

Who may write a word is said beside it: *owner* is the thread that runs the vCPU (or, for the header, the one that
configures the machine), *remote* is any thread, with atomics, *remote store* is any thread with a plain store, as in
KVM, because the last value is right whatever came before; *map writer* holds MAP_LOCK.
"""

from __future__ import annotations

import numpy as np

MAGIC = 0x5449_5845_5453_4146  # "FASTEXIT"
ABI_VERSION = 7
MAX_VCPUS = 4096  # no more than bytes in a page: an index fits the low bits of an aligned address
MAX_VCPU_ID = 4095
NONE = (1 << 64) - 1
"""No vector, no vCPU: ISR_CACHE unknown, sender absent."""

# ---------------------------------------------------------------------------------------------------- header, 512 words
H_MAGIC = 0  # owner
H_ABI = 1  # owner
H_WORDS = 2  # owner
H_CONFIG = 3  # owner; CONFIG_* bits
H_TRAITS = 4  # owner; the first 64 bits of traits.Trait
H_API = 5  # owner; KVM_CAP_X2APIC_API flags
H_NVCPUS = 6  # owner; vCPUs that are visible
H_MAP = 7  # map writer (release store); word index of the map in use
H_MAP_LOCK = 8  # remote
H_MAP_DIRTY = 9  # remote; 0 clean, 1 dirty, 2 being rebuilt
H_PROFILE = 10  # owner; Profile.number of the kernel generation
H_MAXPHYADDR = 11  # owner
H_LOST_LOWEST = 12  # remote store; set once lowest-priority hashing chose an empty slot
H_TRACE_HEAD = 13  # remote; records written since the last clear
H_TSC_MOVED = 14  # remote store; 1 once a vCPU's TSC may not be the host's
H_HANDLERS = 15  # owner; 1 when an embedder replaced a handler that the batch kernel has
H_NOW = 16  # owner; the host's monotonic clock, ns
H_TSC_KHZ = 17  # owner; TSC ticks a millisecond, the host's and a new vCPU's, counted from clock 0
H_BUS_NS = 18  # owner; APIC bus cycle, ns (KVM_CAP_X86_APIC_BUS_CYCLES_NS)
H_MIN_PERIOD_NS = 19  # owner; shortest periodic timer
H_TIMER_ADVANCE_NS = 20  # owner; timer_advance_ns of a new vCPU, 0: lapic_timer_advance off
H_INHIBITS = 21  # remote; APICv inhibit reasons, 1 << regs.Inhibit
H_DISABLED_EXITS = 22  # owner; KVM_CAP_X86_DISABLE_EXITS
H_USER_MSR = 23  # owner; KVM_CAP_X86_USER_SPACE_MSR
H_FILTER_RANGES = 24  # owner; number of MSR filter ranges
H_FILTER_DENY = 25  # owner; 1: the filter denies what no range names
H_BSP_ID = 26  # owner; KVM_SET_BOOT_CPU_ID
H_RULES = 27  # owner; the bits of traits.Trait from RULES on
H_RELEASE = 28  # owner; RELEASE_WORDS words: the release that was asked for, ASCII, where it is no generation's name
H_IRQ_WINDOW_VCPUS = 36  # remote; vCPUs with K_AVIC_WINDOW, where a generation counts them
H_NO_ACCESS_PAGE = 40  # remote store; 1: the xAPIC access page is deleted for good (AVIC, a vCPU in x2APIC mode)
H_FAST_MMIO = 41  # owner; number of fast-MMIO ioeventfds
H_GUEST_MEMORY = 42  # owner; address of the guest's memory in this process, 0: it has none; in no snapshot
H_GUEST_BYTES = 43  # owner; its size, whole pages from guest-physical address 0 on; in no snapshot
H_HYPERV_RULES = 44  # owner; the bits of traits.Trait from HYPERV on
H_HV_FEATURES = 45  # owner; regs.HypervFeature: what the Hyper-V leaves of the guest's CPUID offer
H_HV_GUEST_OS_ID = 46  # owner of the vCPU that writes it, as the next two
H_HV_HYPERCALL = 47
H_HV_REFERENCE_TSC = 48
H_HV_AUTO_EOI_VCPUS = 49  # remote; vCPUs with a vector in HV_AUTO_EOI
H_HV_STIMERS = 50  # remote store; 1 once a synthetic timer's hrtimer has been started
H_HV_VP_INDICES = 51  # owner; KVM_MAX_VCPUS, which VP indices have to be below
H_HV_STORED = 52  # owner; HV_STORED words: MSRs from CRASH_P0 to TSC_EMULATION_STATUS, of the VM
HV_STORED = 9
H_HV_TSC_INVARIANT = 61  # owner; the MSR
H_HV_SYNDBG = 62  # owner; 6 words: SYNDBG_CONTROL to PENDING_BUFFER, then OPTIONS
H_HV_EVENTFDS = 69  # owner; number of connections that have an eventfd, user space's and in no snapshot
H_HV_EVENTFD = 72  # 2 words for each of HV_EVENTFDS: owner, the connection; remote, its signals
H_STAGE = 256  # owner; 128 words: the page on its way to and from KVM_GET/SET_LAPIC
H_FAST_MMIO_GPA = 384  # owner; FAST_MMIO words: their guest-physical addresses
FAST_MMIO = 128
HV_EVENTFDS = 64
HV_EVENTFD_SIGNALS = 1
HV_EVENTFD_STRIDE = 2
HEADER_WORDS = 512

MOST_ROUNDS = 1000
"""Tries of vcpu_run to enter of which each cancels itself, as KVM's can for ever: then a signal comes."""

CONFIG_SVM = 1 << 0
CONFIG_APICV = 1 << 1
CONFIG_THREADS = 1 << 2
CONFIG_SPLIT_IRQCHIP = 1 << 3
CONFIG_X2APIC_CPUID = 1 << 4
CONFIG_DEADLINE_CPUID = 1 << 5
CONFIG_VECTOR_HASHING = 1 << 6
CONFIG_CMCI = 1 << 7
CONFIG_FASTPATH = 1 << 8
CONFIG_NRIPS = 1 << 9
CONFIG_HV_TIMER = 1 << 10
CONFIG_TRACE = 1 << 11
CONFIG_SMM = 1 << 12
CONFIG_LINT0_REENABLED = 1 << 13
CONFIG_IPIV = 1 << 14
CONFIG_VTD_PI = 1 << 15
CONFIG_X2AVIC = 1 << 16
CONFIG_MMIO_HOLE = 1 << 17
CONFIG_PI_INJECT_TIMER = 1 << 18
CONFIG_RETPOLINE = 1 << 19
CONFIG_KVM_HYPERV = 1 << 20
CONFIG_HYPERV = 1 << 21
CONFIG_HYPERV_ENFORCE = 1 << 22
CONFIG_COSTS = 1 << 23  # the compiled loop adds up prices; in no snapshot

# ------------------------------------------------------------------ APIC map: two copies, the writer fills the idle one
MAP_PRESENT = 0  # 0: the map was dropped, every delivery takes the slow scan
MAP_MAX_ID = 1
MAP_LOGICAL = 2  # regs.LOGICAL_*
MAP_SLOTS = 8  # 16-bit slots, four a word, vCPU index + 1: 8 flat, then 16 x 4 cluster
MAP_FLAT_SLOT = 0
MAP_CLUSTER_SLOT = 8
MAP_PHYS_SLOT = 128  # slot of physical id 0; ids to MAX_VCPU_ID
MAP_WORDS = MAP_SLOTS + (MAP_PHYS_SLOT + MAX_VCPU_ID + 1) // 4
MAP0 = HEADER_WORDS
MAP1 = MAP0 + MAP_WORDS

MAP_SCRATCH = MAP1 + MAP_WORDS

# --------------------------------------------------------------- MSR filter (KVM_X86_SET_MSR_FILTER), written by owner
FILTER = MAP_SCRATCH + MAP_WORDS
FILTER_RANGES = 16
FILTER_FLAGS = 0
FILTER_BASE = 1
FILTER_COUNT = 2
FILTER_BITMAP = 3
FILTER_BITMAP_BYTES = 0x600
FILTER_STRIDE = FILTER_BITMAP + FILTER_BITMAP_BYTES // 8

# ----------------------------------------------------------------------- tables that hardware walks, one page aligned
TABLES = -(-(FILTER + FILTER_RANGES * FILTER_STRIDE) // 512) * 512
PID_TABLE = TABLES  # IPI virtualisation's PID-pointer table: one word a vCPU id
AVIC_PHYSICAL = PID_TABLE + MAX_VCPU_ID + 1  # remote; one word a vCPU id
AVIC_PHYSICAL_ENTRIES = 512
AVIC_LOGICAL = AVIC_PHYSICAL + AVIC_PHYSICAL_ENTRIES  # owner of the vCPU that an entry names; two 32-bit entries a word
AVIC_LOGICAL_ENTRIES = 1024
TABLES_END = AVIC_LOGICAL + AVIC_LOGICAL_ENTRIES // 2

# ---------------------------------- what an IPI touches in its target: two cache lines, packed densely; 16 words a vCPU
HOT = -(-TABLES_END // 512) * 512
HOT_STRIDE = 16
PID_PIR = 0  # remote; 4 words
PID_CONTROL_WORD = 4  # remote; regs.PID_CONTROL
HOT_TMR = 8  # remote; 4 words
HOT_MODE = 12  # remote; vcpu->mode
HOT_REQUESTS = 13  # remote; KVM_REQ_* mask
HOT_FLAGS = 14  # owner; FLAG_*
HOT_BLOCKED = 15  # remote; 1 while the vCPU's thread sleeps

FLAG_HW = 1 << 0  # APICBASE.EN
FLAG_X2APIC = 1 << 1  # APICBASE.EXTD
FLAG_SW = 1 << 2  # SVR bit 8
FLAG_APICV = 1 << 3  # APICv active on this vCPU
FLAG_L2 = 1 << 4  # in guest mode of a nested guest
FLAG_CR8_FREE = 1 << 5  # SVM: CR8 writes are not intercepted, so every exit writes V_TPR back to TPR

HF_SMM = 1 << 0  # in system management mode
HF_SMM_INSIDE_NMI = 1 << 1  # NMIs were masked already when the SMI came
HF_VMXON = 1 << 2  # in VMX root operation (VMX): INIT is blocked outside L2
HF_GIF_CLEAR = 1 << 3  # global interrupt flag clear (SVM): INIT, NMI and interrupts are blocked
HF_REAL_MODE = 1 << 4  # CR0.PE is clear: exceptions have no error code
HF_SMM_INSIDE_REAL = 1 << 5  # CR0.PE was clear already when the SMI came

# ------------------------------------------ what a target takes its interrupts to: a cache line a vCPU, packed densely
VEC = HOT + MAX_VCPUS * HOT_STRIDE
VEC_STRIDE = 8
VEC_IRR = 0  # remote without APICv, owner with it; 4 words
VEC_RVI = 4  # owner; requesting virtual interrupt (VMX guest interrupt status)
VEC_IRR_PENDING = 5  # remote store

# ------------------------- register page in KVM_GET_LAPIC's layout, 128 words; IRR, ISR and TMR have words of their own
PAGE = VEC + MAX_VCPUS * VEC_STRIDE
PAGE_STRIDE = 128

# ------------------------------------------------------------------------------------- KVM's own words, 96 words a vCPU
KVM = PAGE + MAX_VCPUS * PAGE_STRIDE
KVM_STRIDE = 96
K_VCPU_ID = 0  # owner
K_APIC_BASE = 1  # owner
K_PENDING_DB = 2  # owner; DR6 bits of a queued #DB
K_ISR_COUNT = 3  # owner
K_ISR_CACHE = 4  # owner; vector or NONE
K_ARB_PRIO = 5  # remote
K_MP_STATE = 6  # owner
K_PENDING_EVENTS = 7  # remote (INIT by store: it discards a SIPI); regs.PENDING_*
K_RIP = 8  # owner
K_RFLAGS = 9  # owner
K_GUEST_DEBUG = 10  # owner; KVM_GUESTDBG_*
K_SHADOW = 11  # owner; interrupt shadow
K_EXITS = 12  # owner; stat.exits
K_TARGETS = 13  # owner; whom its last exit or ioctl was for: outcome.TARGETS
K_EXCEPTION = 14  # owner; vector + 1 of the exception to inject
K_EXPIRED_DEADLINE = 15  # owner; expired_tscdeadline, 0: none to wait for
K_SIPI_VECTOR = 16  # remote store; written before the SIPI bit
K_NMI_QUEUED = 17  # remote
K_NMI_PENDING = 18  # owner
K_NMI_MASKED = 19  # owner
K_SENT = 20  # owner; effects of what its entry has sent, until an outcome takes them
K_SVI = 21  # owner; servicing virtual interrupt
K_TSC_DEADLINE = 22  # owner
K_TIMER_MODE = 23  # owner; LVTT bits 18:17 in force
K_TIMER_PENDING = 24  # owner
K_PV_UNHALTED = 25  # remote store
K_CS = 26  # owner; selector after SIPI
K_MSR_DATA = 27  # owner; result of the last read
K_IRQ_WINDOW = 28  # owner; interrupt window requested
K_LINT0_NMI = 29  # owner; LINT0 counted as NMI watchdog
K_PERIOD = 30  # owner; the timer's period, ns
K_L1_WANTS_EXIT = 31  # owner; L1 intercepts, so an exit of L2 is reflected
K_NESTED_EXITS = 32  # owner; exits reflected to L1
K_SMI_PENDING = 33  # owner
K_ENTRY_INFO = 34  # owner; VM-entry interruption info (EVENTINJ) of the next entry; without bit 31 an older one's (VMX)
K_DR0 = 35  # owner
K_DIVIDE = 36  # owner; divide_count of TDCR
K_HRTIMER = 37  # owner; when the hrtimer fires, ns, or NONE
K_HV_DEADLINE = 38  # owner; host TSC at which the VMX preemption timer exits, or NONE: hv timer not in use
K_INTERRUPT = 39  # owner; vector + 1 of the interrupt injected last

# Host-side bookkeeping of the run loop, the work that a fast exit avoids. Not guest-visible.
K_IRQS_OFF = 40  # owner
K_SRCU = 41  # owner; 1 while the read lock is held
K_SRCU_LOCKS = 42  # owner; how often it was taken
K_IRQ_WINDOWS = 43  # owner; how often host interrupts were let in after an exit
K_PREEMPT_OFF = 44  # owner
K_GUEST_TIME = 45  # owner; 1 while time is accounted to the guest
K_IN_RUN = 46  # owner; 1 between the entry and the return of KVM_RUN
K_INDIRECT_CALLS = 47  # owner; exits whose handler was reached through the table

K_TIMER_ADVANCE = 48  # owner; timer_advance_ns
K_WAITED = 49  # owner; ns that entries busy-waited for a deadline
K_CPU = 50  # owner; pCPU it was loaded on last
K_LOADED = 51  # owner; 1 between vcpu_load and vcpu_put
K_WAKEUP_CPU = 52  # owner; pCPU + 1 whose wake-up list it is linked on, 0: none
K_HFLAGS = 53  # owner; HF_*
K_IOAPIC_HANDLED = 54  # owner; 4 words, vectors whose EOI the IOAPIC wants
K_IOAPIC_EOI = 58  # owner; vector of the last EOI that went there, bit 8: its trigger mode was level
K_IOAPIC_EOIS = 59  # owner; how many
K_REINJECT = 60  # owner; interruption information of an event whose delivery was cut short, bit 31 valid
K_FORCE_EXIT = 61  # owner; the next entry exits at once (req_immediate_exit)
K_IMMEDIATE = 62  # owner; the last entry was forced to exit at once
K_EXTINT = 63  # owner; vector + 1 of KVM_INTERRUPT (pending_external_vector)
K_USER_WINDOW = 64  # owner; user space asked for an interrupt window
K_NMI_WINDOW = 65  # owner; NMI window requested
K_MSR_INDEX = 66  # owner; MSR of the last KVM_EXIT_X86_RDMSR/WRMSR
K_MSR_REASON = 67  # owner; its KVM_MSR_EXIT_REASON_*, 0 once completed
K_PV_EOI_MSR = 68  # owner; MSR_KVM_PV_EOI_EN
K_PV_EOI_FLAG = 69  # remote; the guest's memory: 1 while it may skip an EOI; with a memory of its own, PV_EOI_LOST or 0
PV_EOI_LOST = 2  # KVM's way to the cell leads nowhere since a cell was asked for that is not there
K_ATTENTION = 70  # owner; apic_attention
K_TPR_REPORT = 71  # owner; tpr_access_reporting
K_SMI_COUNT = 72  # owner
K_SMM_RIP = 73  # owner; saved by the SMI
K_SMM_RFLAGS = 74  # owner
K_AVIC_PLACE = 75  # owner; index + 1 of its AVIC physical entry where that has moved, 0: it is its id
K_TPR_THRESHOLD = 76  # owner; TPR threshold of the VMCS
K_AVIC_LDR = 77  # owner; LDR that the AVIC logical table holds for it
K_V_TPR = 78  # owner; the VMCB's V_TPR + 1 where entries with AVIC do not load it, 0: it is TPR[7:4]
K_PREEMPTED = 79  # owner; sched_out found it runnable
K_USER_EXIT = 80  # owner; run->exit_reason + 1 of the last return from KVM_RUN, 0: it runs
K_HV_EXITED = 81  # owner; clock + 1 at which the preemption timer exited last
K_AVIC_DFR = 82  # owner; DFR by which the AVIC logical table holds K_AVIC_LDR
K_AVIC_ENTRY = 83  # owner; KVM's copy of its AVIC physical entry, GA_LOG and a true IsRunning included
K_TARGET = 84  # owner; the timer's target_expiration, ns
K_MSR_LENGTH = 85  # owner; length of the instruction that K_MSR_INDEX belongs to
K_AVIC_WINDOW = 86  # owner; its interrupt window keeps AVIC off (avic_irq_window)
K_WAIT_DELTA = 87  # owner; advance_expire_delta that is still to be traced, less 2**63; 0: none
K_ISR = 88  # owner; 4 words
K_ACCESS_ADDRESS = 92  # owner; guest-physical address or port of the last KVM_EXIT_MMIO or KVM_EXIT_IO
K_ACCESS_DATA = 93  # owner; what it writes
K_ACCESS_INFO = 94  # owner; ACCESS_*, 0 once completed
K_DR_CLEARED = 95  # owner; K_IRQ_WINDOWS + 1 of the exit that cleared the intercepts of debug registers (SVM)

ACCESS_LENGTH = 0xFF  # in bytes
ACCESS_WRITE = 1 << 8
ACCESS_PORT = 1 << 9
ACCESS_INSN_SHIFT = 16  # length of the instruction that completes it
ACCESS_INSN = 0xF << ACCESS_INSN_SHIFT

RELEASE_WORDS = 8
"""Room for a release's text in the header."""

HOST = MAX_VCPUS
"""Behind the vCPUs' rows: a row for what the host itself sends, of which K_TARGETS alone is used. Calls that go on at
the same time take one of HOSTS each."""
HOSTS = 64
SENDERS = HOST + HOSTS

HOST_TIMERS = 8
"""Timers and work by number, above a vCPU's index: 0 is a local APIC timer, 1 to STIMERS are synthetic ones, those from
here on are the machine's own, and the row of HOST has whom their effects are for."""
HOST_TIMER_PIT = 8
HOST_WORK_PIT = 9
HOST_WORK_IOAPIC = 10

# ----------------------------------------------------------------------------------------- trace ring, 8 words a record
TRACE = KVM + SENDERS * KVM_STRIDE
TRACE_STRIDE = 8
TRACE_CAPACITY = 1 << 17

TP_ENTRY = 1
TP_EXIT = 2
TP_MSR_READ = 3
TP_MSR_WRITE = 4
TP_APIC_READ = 5
TP_APIC_WRITE = 6
TP_APIC_IPI = 7
TP_ACCEPT_IRQ = 8
TP_APICV_ACCEPT_IRQ = 9
TP_EOI = 10
TP_MSI_SET_IRQ = 11
TP_INJ_VIRQ = 12
TP_PV_EOI = 13
TP_FAST_MMIO = 14
TP_HV_TIMER_STATE = 15
TP_WAIT_LAPIC_EXPIRE = 16
TP_APICV_INHIBIT_CHANGED = 17
TP_AVIC_INCOMPLETE_IPI = 18
TP_AVIC_DOORBELL = 19
TP_AVIC_KICK_VCPU_SLOWPATH = 20
TP_USERSPACE_EXIT = 21
TP_PI_IRTE_UPDATE = 22
TP_INJ_EXCEPTION = 23
TP_HV_HYPERCALL = 24
TP_HV_HYPERCALL_DONE = 25
TP_HV_SEND_IPI = 26
TP_HV_SEND_IPI_EX = 27
TP_HV_FLUSH_TLB = 28
TP_HV_FLUSH_TLB_EX = 29
TP_HV_NOTIFY_ACKED_SINT = 30
TP_HV_SYNIC_SET_IRQ = 31
TP_HV_SYNIC_SEND_EOI = 32
TP_HV_SYNIC_SET_MSR = 33
TP_HV_STIMER_SET_CONFIG = 34
TP_HV_STIMER_SET_COUNT = 35
TP_HV_STIMER_START_PERIODIC = 36
TP_HV_STIMER_START_ONE_SHOT = 37
TP_HV_STIMER_CALLBACK = 38
TP_HV_STIMER_CLEANUP = 39
TP_HV_STIMER_EXPIRATION = 40
TP_SET_IRQ = 41  # GSI, level as given (an int), source id
TP_HYPERCALL = 42
TP_IOAPIC_SET_IRQ = 43  # redirection entry as it was before, pin, 1: result was 0
TP_IOAPIC_DELAYED_EOI_INJ = 44  # redirection entry
TP_PIC_SET_IRQ = 45  # pin of the chip, 0..7 | chip << 8 | TRACE_COALESCED; ELCR and IMR of the chip, as they are after
TP_ACK_IRQ = 46  # chip: 0 master, 1 slave, 2 IOAPIC; pin, of the slave 8..15
TP_PIO = 47  # port | TRACE_PIO_WRITE; length | count << 8; first value
"""Record: word 0 event | vCPU index + 1 << 8 | TRACE_*, words 1-7 the event's arguments (tracepoints/text.py prints
them)."""
TRACE_CONTEXT_SHIFT = 40
TRACE_IRQS_OFF = 1 << TRACE_CONTEXT_SHIFT  # host interrupts were off on the vCPU's pCPU
TRACE_PREEMPT_OFF = 1 << TRACE_CONTEXT_SHIFT + 1  # its thread could not be preempted
TRACE_COALESCED = 1 << 16  # in an argument: the result was 0
TRACE_PIO_WRITE = 1 << 16  # in an argument

# ------------------------------------- whom an exit or a message was for, from its second target on; in no snapshot
TARGETS = TRACE + TRACE_CAPACITY * TRACE_STRIDE
"""A row for each sender, which alone writes it: the vCPUs, then HOST and those behind it. Target i is in the 16 bits
from 16 * (i % 4) on of word i / 4, as the low 16 bits of outcome.TARGETS have it; target 0 is in K_TARGETS."""
TARGETS_STRIDE = MAX_VCPUS // 4
HOST_BUSY = TARGETS + SENDERS * TARGETS_STRIDE  # remote; which of the host's rows are taken, in bits from 0 on

# ------------------- Hyper-V's words, for Windows guests; 0 is how each begins, so other guests' rows take no memory
HV = HOST_BUSY + 512
HV_STRIDE = 64
HV_VP_INDEX = 0  # owner; exclusive or with the vCPU's index
HV_SYNIC = 1  # owner; SYNIC_*
HV_VP_ASSIST_PAGE = 2  # owner; the MSR
HV_SCONTROL = 3  # owner
HV_SVERSION = 4  # owner; exclusive or with 1
HV_SIEFP = 5  # owner
HV_SIMP = 6  # owner
HV_AUTO_EOI = 8  # owner; 4 words, vectors of unmasked SINTs with auto-EOI
HV_CONNECTED = 12  # owner; 4 words, vectors of unmasked SINTs
HV_SINT = 16  # owner; 16 words, exclusive or with HV_SINT_MASKED
HV_STIMER = 32  # owner; 4 timers of STIMER_STRIDE words
HV_STIMER_PENDING = 48  # remote; timers that wait for service, in bits
HV_STIMER_STUCK = 49  # owner; timers whose message did not go out (msg_pending), in bits
HV_RUNTIME_OFFSET = 50  # owner; of VP_RUNTIME, 100 ns
HV_EXIT_TYPE = 51  # owner; KVM_EXIT_HYPERV: KVM_EXIT_HYPERV_* of the last or the requested one
HV_EXIT_MSR = 52  # owner; of SynIC: the MSR; of a hypercall: its control word
HV_EXIT_CONTROL = 53  # owner; SCONTROL; of a hypercall: its result, by user space, until then what was here
HV_EXIT_EVT_PAGE = 54  # owner; SIEFP; of a hypercall: params[0]
HV_EXIT_MSG_PAGE = 55  # owner; SIMP; of a hypercall: params[1]
HV_CALL_LENGTH = 56  # owner; length of the hypercall instruction that user space completes, 0: none
HV_SYSTEM_EVENT = 62  # owner; regs.SystemEvent of the last KVM_EXIT_SYSTEM_EVENT

SYNIC_ACTIVE = 1 << 0
SYNIC_KEEPS_PAGES = 1 << 1  # KVM_CAP_HYPERV_SYNIC2: a message or event page is not zeroed when it is enabled
STIMER_STRIDE = 4
STIMER_CONFIG = 0
STIMER_COUNT = 1
STIMER_EXPIRATION = 2  # 100 ns of TIME_REF_COUNT
STIMER_DEADLINE = 3  # when its hrtimer fires, ns of the machine's clock, + 1; 0: not
STIMERS = 4
SINTS = 16

# ----------------------------- XMM registers, of which KVM reads some for a fast hypercall; in no snapshot
XMM = HV + MAX_VCPUS * HV_STRIDE
"""A row a vCPU: XMM0 to XMM5 as the exit has them that reads them, two words each, the low one first."""
XMM_STRIDE = 16
XMM_WORDS = 12
CALL_LENGTH = 0xF  # how a hypercall is made, for kernels: length of its instruction
CALL_BITS64 = 1 << 8  # all 64 bits of registers count
CALL_CPL = 3 << 9

# --------------------------- the irqchip of a VM: IOAPIC, PIC pair, PIT, routes; 0 is how each begins, but where said
IOAPIC = XMM + MAX_VCPUS * XMM_STRIDE
"""Words of kvm_ioapic. KVM guards them by a lock (IRQ_LOCK); so does a machine with threads."""
IOAPIC_BASE = 0  # base_address; created as regs.IOAPIC_DEFAULT_BASE
IOAPIC_IOREGSEL = 1
IOAPIC_ID = 2
IOAPIC_IRR = 3
IOAPIC_PAD = 4
IOAPIC_IRR_DELIVERED = 5
IOAPIC_RTC_PENDING = 6  # rtc_status.pending_eoi, as 64 bits with sign
IOAPIC_DELAYED = 7  # when the delayed re-delivery runs, ns of the machine's clock, + 1; 0: not
IOAPIC_REDIRTBL = 8  # 24 words; created masked
IOAPIC_SOURCES = 32  # 24 words, the source ids that hold a pin up, in bits
IOAPIC_EOIS = 56  # 24 words, irq_eoi: EOIs in a row that found the line up
IOAPIC_PINS = 24
IOAPIC_WORDS = 128

PIC = IOAPIC + IOAPIC_WORDS
"""Master, then slave; a word for each field of kvm_pic_state in its order, then the pins' source ids."""
PIC_STRIDE = 32
PIC_LAST_IRR = 0
PIC_IRR = 1
PIC_IMR = 2
PIC_ISR = 3
PIC_PRIORITY_ADD = 4
PIC_IRQ_BASE = 5
PIC_READ_REG_SELECT = 6
PIC_POLL = 7
PIC_SPECIAL_MASK = 8
PIC_INIT_STATE = 9
PIC_AUTO_EOI = 10
PIC_ROTATE_ON_AUTO_EOI = 11
PIC_SPECIAL_FULLY_NESTED = 12
PIC_INIT4 = 13
PIC_ELCR = 14
PIC_ELCR_MASK = 15  # created as regs.PIC_ELCR_MASKS
PIC_FIELDS = 16
PIC_SOURCES = 16  # 8 words, the source ids that hold a pin up, in bits
PIC_PINS = 16  # of both
PIC_OUTPUT = PIC + 2 * PIC_STRIDE  # the pair's INTR line
IRQ_LOCK = PIC_OUTPUT + 1  # remote; taken around every change of chips and routes
IRQ_DEPTH = PIC_OUTPUT + 2

PIT = PIC + 128
"""kvm_kpit_state: three channels, then what they share."""
PIT_STRIDE = 16
PIT_COUNT = 0
PIT_LATCHED_COUNT = 1
PIT_COUNT_LATCHED = 2
PIT_STATUS_LATCHED = 3
PIT_STATUS = 4
PIT_READ_STATE = 5
PIT_WRITE_STATE = 6
PIT_WRITE_LATCH = 7
PIT_RW_MODE = 8
PIT_MODE = 9
PIT_BCD = 10
PIT_GATE = 11
PIT_LOADED = 12  # count_load_time, ns of the machine's clock
PIT_CHANNELS = 3
PIT_PRESENT = PIT + 48  # bit 0: there is one, bit 1: with the speaker port
PIT_FLAGS = PIT + 49
PIT_REINJECT = PIT + 50
PIT_PENDING = PIT + 51  # remote; ticks that no guest has acknowledged
PIT_IRQ_ACK = PIT + 52  # remote; the last tick was acknowledged
PIT_DEADLINE = PIT + 53  # when channel 0's hrtimer fires, ns of the machine's clock, + 1; 0: not
PIT_PERIOD = PIT + 54  # ns
PIT_EXPIRES = PIT + 55  # what that hrtimer was set to last, ns; kept when it has fired or was cancelled
PIT_PERIODIC = PIT + 56  # is_periodic
PIT_WORK = PIT + 57  # remote; 1 while the worker is queued
PIT_SPEAKER = PIT + 58  # speaker_data_on, where it is no flag
PIT_WORDS = 64

ROUTES = PIT + PIT_WORDS
"""The GSI routing table. MAX_ROUTES rows in the order in which a GSI's routes are worked, all of a GSI together."""
MAX_ROUTES = 4096
ROUTE_STRIDE = 4
ROUTE_KIND = 0  # ROUTE_*, in ROUTE_KINDS; the GSI from bit 8 on
ROUTE_A = 1  # pin of a chip (PIC: 0..15 of the pair), address of an MSI, VP index
ROUTE_B = 2  # data of an MSI, SINT
ROUTE_KINDS = 7
ROUTE_GSI_SHIFT = 8
ROUTE_IOAPIC = 1
ROUTE_PIC = 2
ROUTE_MSI = 3
ROUTE_HV_SINT = 4
ROUTE_FIRST = ROUTES + MAX_ROUTES * ROUTE_STRIDE  # MAX_ROUTES + 1 words: a GSI's first row; the next's ends it
ROUTE_GSIS = ROUTE_FIRST + MAX_ROUTES + 1  # size of the table: largest GSI + 1
ROUTE_OF_PIN = ROUTE_GSIS + 1  # 40 words: GSI + 1 of the IOAPIC's pins, then of the PICs', 0: none
ROUTE_RESERVED = ROUTE_OF_PIN + 40  # GSIs that are pins of user space's IOAPIC (nr_reserved_ioapic_pins)
RESAMPLERS = ROUTE_OF_PIN + 48
"""A row a GSI: how many resampling irqfds it has, and how often their resamplefds were signalled."""
RESAMPLER_STRIDE = 2
RESAMPLER_FDS = 0
RESAMPLER_SIGNALS = 1  # remote

IRQ = RESAMPLERS + MAX_ROUTES * RESAMPLER_STRIDE
"""A row a vCPU: what the chips keep about it, and what the embedder takes."""
IRQ_STRIDE = 4
IRQ_RTC_VECTOR = 0  # dest_map: vector + 1 of the RTC's pin that it has not ended yet, 0: none
IRQ_STALE = 1  # highest_stale_pending_ioapic_eoi + 1, 0: none
IRQ_GIVEN = 2  # 1: K_IOAPIC_HANDLED is what the embedder says, and no scan changes it
IRQ_WENT_IN = 3  # owner; what has gone into the guest's CPU and was not taken: WENT_IN_BITS each, the newest lowest

WENT_IN_BITS = 12  # kind, vector; the word holds five, and a sixth pushes the oldest out
WENT_IN_VECTOR = 0xFF
WENT_IN_INTERRUPT = 1 << 8
WENT_IN_EXTINT = 2 << 8
WENT_IN_NMI = 3 << 8
WENT_IN_SMI = 4 << 8
WENT_IN_INIT = 5 << 8
WENT_IN_SIPI = 6 << 8
WENT_IN_MOST = (1 << 5 * WENT_IN_BITS) - 1

# ------------------------------------------- guests' TSCs; 0 is how each word begins in a machine whose clock is at 0
TSC = IRQ + MAX_VCPUS * IRQ_STRIDE
"""A row a vCPU. Frequencies are those of H_TSC_KHZ XOR the word."""
TSC_STRIDE = 4
TSC_OFFSET = 0  # owner; l1_tsc_offset
TSC_KHZ = 1  # owner; virtual_tsc_khz
TSC_RATE = 2  # owner; what it really runs at, l1_tsc_scaling_ratio as a frequency
TSC_ADJUST = 3  # owner; ia32_tsc_adjust_msr
TSC_LAST_NSEC = TSC + MAX_VCPUS * TSC_STRIDE  # tsc_write_lock; clock at the last write that user space or KVM made
TSC_LAST_WRITE = TSC_LAST_NSEC + 1  # what it wrote
TSC_LAST_KHZ = TSC_LAST_NSEC + 2  # that vCPU's frequency, as TSC_KHZ
TSC_CURRENT = TSC_LAST_NSEC + 3  # cur_tsc_offset, the offset of those that are synchronised
TSC_USER = TSC_LAST_NSEC + 4  # user_set_tsc
TSC_WORDS = 8

# ------------------------- modelled time of the compiled loop; in no snapshot, and nothing without CONFIG_COSTS
PRICES = -(-(TSC_LAST_NSEC + TSC_WORDS) // 512) * 512
"""Cycles of what the loop charges in one piece: a stage of a cost profile or several, calls through pointers included.
"""
P_EXIT = 0
P_FAST_CHECK = 1
P_SRCU_LOCK = 2
P_SRCU_UNLOCK = 3
P_REENTER = 4
P_LEAVE = 5
P_HOST_IRQ = 6
P_BACK = 7
P_EXIT_CHECKS = 8
P_SKIP = 9
P_DISPATCH_DIRECT = 10
P_DISPATCH_INDIRECT = 11
P_LOOP_TAIL = 12
P_REQUESTS = 13
P_EVENT_CHECK = 14
P_CR8_INTERCEPT = 15
P_INJECT = 16
P_SWITCH = 17
P_SYNC_PIR = 18
P_ENTRY = 19
P_BLOCK = 20
P_USER_EXIT = 21
P_MSR_ACCESS = 22
P_LAPIC_ACCESS = 23
P_DEVICE = 24
P_IOAPIC_EOI = 25
P_ICR = 26
P_ACCEPT = 27
P_TIMER = 28
P_PREEMPTION_TIMER = 29
P_HRTIMER = 30
P_EMULATOR = 31
P_HALT = 32
P_HYPERCALL = 33
P_HV_HYPERCALL = 34
P_HV_TARGET = 35
P_GUEST_MEMORY = 36
P_NOTIFY = 37
P_KICK = 38
P_WAKE = 39
P_DOORBELL = 40
P_HW_ACCESS = 41
P_HW_IPI = 42
P_OTHER_EXIT = 43
PRICE_GHZ = 63  # cycles a nanosecond, times 2**32
PRICE_WORDS = 64

METER = PRICES + PRICE_WORDS
"""A row a vCPU, which its thread alone writes: what its exit has cost so far, and what a handler has done."""
METER_STRIDE = 16
METER_SPENT = 0
METER_IPI = 1  # cycles until its IPI had left to the last target, or NONE
METER_WAITED = 2  # K_WAITED as it was in front of the exit
METER_ACCEPTED = 3  # calls of __apic_accept_irq
METER_NEEDY = 4  # those after which the host had something to do
METER_EFFECTS = 5  # what that cost
METER_AVIC = 6  # 3 words, the same of targets that AVIC's hardware had reached
METER_EOIS = 9  # 3 words, K_IOAPIC_EOIS, K_HV_DEADLINE and K_HRTIMER as they were
METER_STIMERS = 12  # 4 words, deadlines of the synthetic timers as they were

WORDS = -(-(METER + MAX_VCPUS * METER_STRIDE) // 512) * 512
BYTES = WORDS * 8

VCPU_BYTES = 8 * (HOT_STRIDE + VEC_STRIDE + PAGE_STRIDE + KVM_STRIDE)
"""Memory that one vCPU occupies; one of a Windows guest has its row of HV_STRIDE words beside it."""

# -------------------------------------------------------------------------------------------------------- batch records

EXIT = np.dtype(
    [("vcpu", "<u4"), ("reason", "<u4"), ("msr", "<u4"), ("info", "<u4"), ("value", "<u8"), ("gpa", "<u8")],
    align=True,
)
"""One exit for Machine.run.

``reason`` is the vendor's exit number (VmxExit or SvmExit). ``value`` is EDX:EAX, or the data that is written.

MSR accesses: ``msr`` is ECX; ``info`` is EXITINFO1 of SVM's MSR exit (1 write, 0 read).
Memory accesses (VMX EPT_MISCONFIG and EPT_VIOLATION, SVM NPF): ``gpa`` is the guest-physical address, ``info`` the
length, 1, 2, 4 or 8 bytes, plus MMIO_WRITE for a write.
Port accesses (VMX IO_INSTRUCTION, SVM IO): ``info`` is what the CPU says of the instruction, the port in bits 31:16
among it: the exit qualification, regs.VMX_IO, or EXITINFO1, regs.SVM_IO; Machine.io_info makes it.
Hypercalls (VMX VMCALL, SVM VMMCALL), of which a record has a 64-bit guest's RCX (its low half in ``msr``, the high one
in ``info``), RDX (``value``) and R8 (``gpa``): all that Hyper-V's have but for XMM registers, which are 0, as is every
other register. KVM's own take their number from RAX, so a record's is number 0.
All others: ``info`` is the exit qualification or EXITINFO1.

A reason of NOTIFICATION is no exit: vector 0xF2 reaches the pCPU of ``vcpu``, as Vcpu.hw_notify has it. Its outcome is
Path.HARDWARE when the CPU moved something from PIR to IRR, and nothing but Path.SLOW when it did not.
A reason of IRQ_LINE is none either: a device sets the line of the GSI in ``msr`` to the level in ``info``, as
Machine.irq_line does, whatever ``vcpu`` is; ``accepted`` of its outcome is the status.
"""
MMIO_WRITE = 1 << 31
NOTIFICATION = 0xF000_00F2  # among the exit codes that the APM leaves to hosts; no VMX exit has such a number
IRQ_LINE = 0xF000_AE67

OUTCOME = np.dtype(
    {
        "names": ["code", "completion", "path", "fault", "refusal", "accepted", "user", "flags", "value"],
        "formats": ["<u8", "u1", "u1", "u1", "u1", "<i2", "u1", "u1", "<u8"],
        "offsets": [0, 0, 1, 2, 3, 4, 6, 7, 8],
        "itemsize": 16,
    }
)
"""One result of Machine.run: ``code`` is outcome.CODE, the next seven fields are its bytes (``flags`` holds the
effects in bits 3:0, blocked in bit 6). ``value`` is what a read returned; of any other exit it says whom the effects
are for: ``value >> 32`` targets, of which the first is vCPU ``value & 0xFFF`` with the Effect ``value >> 12 & 15``
(outcome.TARGETS). The others are in Vcpu.targets until the same vCPU's next exit."""

EXIT_WORDS = EXIT.itemsize // 8
OUTCOME_WORDS = OUTCOME.itemsize // 8
