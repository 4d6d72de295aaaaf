"""What an Intel CPU does with a guest's APIC access before KVM sees it, if KVM sees it at all.

Models: virtualised reads and writes of the APIC-access page and of x2APIC MSRs, TPR, PPR, EOI, self-IPI and IPI
virtualisation, delivery of virtual interrupts; with the controls that KVM sets while APICv is active (use TPR shadow,
APIC-register virtualisation, virtual-interrupt delivery, process posted interrupts), its MSR bitmap (reads of every
register that KVM has but TMCCT, before 6.3 of all 256 MSRs but TMCCT, writes of TPR, EOI and SELF_IPI, of ICR with
IPI virtualisation) and its EOI-exit bitmap (the vectors that the IOAPIC wants, and those of SINTs). KVM's half of the
exits is accelerated.py's.
Spec: SDM vol. 3C ch. "APIC Virtualization and Virtual Interrupts".

Without APICv every access to the page exits, by EPT_MISCONFIG: a host without flexpriority. While APICv is inhibited
(INHIBITED_PAGE_UNMAPPED) it is an EPT violation: the APIC-access page has its slot, but KVM maps nothing there. Of the
MSRs TPR does not exit: it has a shadow, which x2APIC virtualisation lets through, and a write below the TPR threshold
exits when it is done. Not modelled: the single-step trap of an instruction that does not exit, accesses of L2 (all
exit), the APIC-access page that shows through as memory in x2APIC mode, and up to 5.10 under an inhibit (EPT_MISCONFIG
here as well).

An access returns ``CODE_HARDWARE``, with CODE_GP or effects, when the CPU has done it; else ``CODE_EXIT``, the exit
reason in bits 47:32 and the exit qualification in bits 31:0. APIC_WRITE and EOI_INDUCED are trap-like: the instruction
is complete, RIP has moved. The others are fault-like and nothing has happened. What was read is in K_MSR_DATA.
"""

from ..jit.declare import kernel, umax
from . import typed as k
from .ipi import ACCEPT
from .lapic import readable
from .lapicreg import reg, set_reg, vector_slot, word
from .pi import hardware_post
from .pid import highest
from .shared import clear_word_bits, hot, or_word, own, tell, vec
from .sint import connected

FAULT = k.CODE_HARDWARE | k.CODE_GP
INSTRUCTION_READ, INSTRUCTION_WRITE = k.ZERO, k.ONE << k.APIC_ACCESS_TYPE_SHIFT
LOWEST_VECTOR = k.U(16)
NOT_SIMPLE = k.ICR_RESERVED | k.ICR_BUSY | k.ICR_TRIGGER | k.ICR_DM | k.ICR_SHORTHAND
SELF = k.SH_SELF << k.ICR_SHORTHAND_SHIFT


@kernel("u8(u8, u8)")
def exit_code(reason, qualification):
    """Code of an access that exits."""
    return k.CODE_EXIT | (reason << k.CODE_EXIT_REASON_SHIFT) | qualification


@kernel("u8(words, u8, u8)")
def virtualized(m, v, x2apic):
    """Whether the CPU virtualises the vCPU's accesses, to MSRs (x2apic = FLAG_X2APIC) or to the page (0)."""
    if m[k.H_CONFIG] & k.CONFIG_SVM:
        return k.ZERO
    wanted = k.FLAG_HW | k.FLAG_APICV | x2apic
    flags = m[hot(m, v) + k.HOT_FLAGS] & (k.FLAG_HW | k.FLAG_APICV | k.FLAG_X2APIC | k.FLAG_L2)
    return k.ONE if flags == wanted else k.ZERO


@kernel("u8(words, u8, u8)")
def retire(m, v, length):
    """The instruction is complete without KVM's help."""
    row = own(m, v)
    m[row + k.K_RIP] = m[row + k.K_RIP] + length
    m[row + k.K_SHADOW] = k.ZERO
    return k.CODE_HARDWARE


# ---------------------------------------------------------------------------------------------- registers by themselves


@kernel("u8(words, u8)")
def ppr_virtualization(m, v):
    """VPPR from VTPR and SVI. VM entry does this too: for the guest VPPR always is what these two say."""
    tpr = reg(m, v, k.APIC_TASKPRI)
    svi = m[own(m, v) + k.K_SVI]
    ppr = tpr & k.U(0xFF) if tpr & k.U(0xF0) >= svi & k.U(0xF0) else svi & k.U(0xF0)
    set_reg(m, v, k.APIC_PROCPRI, ppr)
    return ppr


@kernel("u8(words, u8, u8)")
def tpr_virtualization(m, v, tpr):
    """A write to the TPR: VTPR, then VPPR."""
    set_reg(m, v, k.APIC_TASKPRI, tpr & k.U(0xFF))
    return ppr_virtualization(m, v)


@kernel("u8(words, u8)")
def eoi_virtualization(m, v):
    """A write to EOI: SVI leaves service; the exit's code if the EOI-exit bitmap has its vector, else CODE_HARDWARE.

    The bitmap has what the IOAPIC wants and what a SINT has (vcpu_load_eoi_exitmap), though nobody tells the SINT then.
    """
    row = own(m, v)
    isr = own(m, v) + k.K_ISR
    vector = m[row + k.K_SVI] & k.ICR_VECTOR
    set_reg(m, v, k.APIC_EOI, k.ZERO)
    bit = k.ONE << (vector & k.U(63))
    m[isr + (vector >> k.U(6))] = m[isr + (vector >> k.U(6))] & ~bit
    top = highest(m, isr)
    m[row + k.K_SVI] = k.ZERO if top == k.NONE else top
    ppr_virtualization(m, v)
    if m[row + k.K_IOAPIC_HANDLED + (vector >> k.U(6))] & bit or connected(m, v, vector):
        return exit_code(k.VMX_EOI_INDUCED, vector)
    return k.CODE_HARDWARE


@kernel("u8(words, u8, u8)")
def self_ipi_virtualization(m, v, vector):
    """The vector goes to VIRR at once; neither TMR nor the descriptor knows of it."""
    or_word(m, vec(m, v) + k.VEC_IRR + (vector >> k.U(6)), k.ONE << (vector & k.U(63)))
    rvi = vec(m, v) + k.VEC_RVI
    m[rvi] = umax(m[rvi], vector)
    return k.CODE_HARDWARE | ACCEPT


@kernel("u8(words, u8, u8, u8)")
def ipi_virtualization(m, v, vector, target):
    """Post to the descriptor that the PID-pointer table has for this APIC id: the code, or 0 where the CPU exits.

    The table's entries are addresses, so each is checked to name a descriptor of this machine.
    """
    if vector < LOWEST_VECTOR or target > k.MAX_VCPU_ID:
        return k.ZERO
    entry = m[k.PID_TABLE + target]
    if entry & k.U(63) != k.PID_POINTER_VALID:
        return k.ZERO
    at = (entry >> k.U(3)) - k.HOT
    if at >= k.MAX_VCPUS * k.HOT_STRIDE or at % k.HOT_STRIDE:
        return k.ZERO
    found = at // k.HOT_STRIDE
    effects = k.EFFECT_NOTIFY_CODE if hardware_post(m, found, vector) else k.ZERO
    return tell(m, v, found, k.CODE_HARDWARE | ACCEPT | effects)


@kernel("u8(words, u8)")
def deliver_pending(m, v):
    """Virtual-interrupt delivery: RVI goes into service if the guest can take it now; the vector, or NONE.

    The CPU's counterpart of kvm_apic_ack_interrupt, between two instructions of the guest.
    """
    row = own(m, v)
    flags = m[hot(m, v) + k.HOT_FLAGS] & (k.FLAG_APICV | k.FLAG_L2)
    if m[k.H_CONFIG] & k.CONFIG_SVM or flags != k.FLAG_APICV:
        return k.NONE
    if m[hot(m, v) + k.HOT_MODE] == k.OUTSIDE_GUEST_MODE or m[row + k.K_IRQ_WINDOW]:
        return k.NONE
    if not m[row + k.K_RFLAGS] & k.RFLAGS_IF or m[row + k.K_SHADOW]:
        return k.NONE
    vector = m[vec(m, v) + k.VEC_RVI] & k.ICR_VECTOR
    if vector >> k.U(4) <= ppr_virtualization(m, v) >> k.U(4):
        return k.NONE
    w = vector >> k.U(6)
    bit = k.ONE << (vector & k.U(63))
    base = vec(m, v)
    m[row + k.K_ISR + w] = m[row + k.K_ISR + w] | bit
    m[row + k.K_SVI] = vector
    set_reg(m, v, k.APIC_PROCPRI, vector & k.U(0xF0))
    clear_word_bits(m, base + k.VEC_IRR + w, bit)
    top = highest(m, base + k.VEC_IRR)
    m[vec(m, v) + k.VEC_RVI] = k.ZERO if top == k.NONE else top
    return vector


@kernel("u8(words, u8, u8, u8)")
def _write_tpr_alone(m, v, tpr, length):
    """A write of the TPR's shadow. PPR is KVM's business: it looks at TPR when it needs it."""
    if tpr >> k.U(8):
        return FAULT
    set_reg(m, v, k.APIC_TASKPRI, tpr)
    code = retire(m, v, length)
    below = tpr >> k.U(4) < m[own(m, v) + k.K_TPR_THRESHOLD]
    return exit_code(k.VMX_TPR_BELOW_THRESHOLD, k.ZERO) if below else code


@kernel("u8(words, u8, u8)")
def move_to_cr8(m, v, value):
    """MOV to CR8 as the guest executes it: KVM sets "use TPR shadow" and no CR8-load exiting, whatever APICv does.

    An L1 asks for what it likes, so L2's exits.
    """
    flags = m[hot(m, v) + k.HOT_FLAGS] & (k.FLAG_APICV | k.FLAG_L2)
    if flags & k.FLAG_L2:
        return exit_code(k.VMX_CR_ACCESS, k.ZERO)
    if value > k.U(0xF):
        return FAULT
    if flags:
        tpr_virtualization(m, v, value << k.U(4))
        return retire(m, v, k.INSN_LEN_MOV_CR)
    return _write_tpr_alone(m, v, value << k.U(4), k.INSN_LEN_MOV_CR)


# ---------------------------------------------------------------------------------------------------------- x2APIC MSRs


@kernel("u8(words, u8, u8)")
def _tpr_alone(m, v, msr):
    """Whether the access is to the TPR's shadow: in x2APIC mode without APICv (vmx_update_msr_bitmap_x2apic)."""
    if m[k.H_CONFIG] & k.CONFIG_SVM or msr != k.MSR_X2APIC_TPR:
        return k.ZERO
    flags = m[hot(m, v) + k.HOT_FLAGS] & (k.FLAG_HW | k.FLAG_APICV | k.FLAG_X2APIC | k.FLAG_L2)
    return k.ONE if flags == k.FLAG_HW | k.FLAG_X2APIC else k.ZERO


@kernel("u8(words, u8, u8)")
def page_word(m, v, offset):
    """Eight bytes of the virtual-APIC page at an aligned offset: of the ICR both halves, wherever KVM keeps them.

    KVM has registers in the page's first KiB alone.
    """
    if offset > k.APIC_SELF_IPI:
        return k.ZERO
    if offset >= k.APIC_ISR and offset < k.APIC_ESR:
        return vector_slot(m, v, offset)
    if offset == k.APIC_PROCPRI:
        return ppr_virtualization(m, v)
    return m[word(m, v, offset)]


@kernel("u8(words, u8, u8)")
def _write_icr(m, v, icr):
    """WRMSR 0x830 under IPI virtualisation: the CPU checks reserved bits and stores; self-IPIs are not its business."""
    if icr & k.ICR_RESERVED:
        return FAULT
    m[word(m, v, k.APIC_ICR)] = icr
    retire(m, v, k.INSN_LEN_WRMSR)
    code = k.ZERO
    if not icr & (NOT_SIMPLE | k.ICR_LOGICAL):
        code = ipi_virtualization(m, v, icr & k.ICR_VECTOR, icr >> k.ICR_DEST_SHIFT)
    return code if code else exit_code(k.VMX_APIC_WRITE, k.APIC_ICR)


@kernel("u8(words, u8, u8, u8)")
def wrmsr(m, v, msr, value):
    """WRMSR as the guest executes it."""
    if virtualized(m, v, k.FLAG_X2APIC):
        if msr == k.MSR_X2APIC_TPR:
            if value >> k.U(8):
                return FAULT
            tpr_virtualization(m, v, value)
            return retire(m, v, k.INSN_LEN_WRMSR)
        if msr == k.MSR_X2APIC_EOI:
            if value:
                return FAULT
            retire(m, v, k.INSN_LEN_WRMSR)
            return eoi_virtualization(m, v)
        if msr == k.MSR_X2APIC_SELF_IPI:
            if value >> k.U(8):
                return FAULT
            set_reg(m, v, k.APIC_SELF_IPI, value)
            retire(m, v, k.INSN_LEN_WRMSR)
            if value < LOWEST_VECTOR:
                return exit_code(k.VMX_APIC_WRITE, k.APIC_SELF_IPI)
            return self_ipi_virtualization(m, v, value)
        if msr == k.MSR_X2APIC_ICR and m[k.H_CONFIG] & k.CONFIG_IPIV:
            return _write_icr(m, v, value)
    if _tpr_alone(m, v, msr):
        return _write_tpr_alone(m, v, value, k.INSN_LEN_WRMSR)
    return exit_code(k.VMX_MSR_WRITE, k.ZERO)


@kernel("u8(words, u8, u8)")
def rdmsr(m, v, msr):
    """RDMSR as the guest executes it."""
    if virtualized(m, v, k.FLAG_X2APIC) and msr >= k.MSR_X2APIC_BASE and msr <= k.MSR_X2APIC_END:
        offset = (msr - k.MSR_X2APIC_BASE) << k.U(4)
        anything = m[k.H_RULES] & k.R_X2APIC_READS_UNCHECKED
        if offset != k.APIC_TMCCT and (anything or readable(m, v, offset)):
            m[own(m, v) + k.K_MSR_DATA] = page_word(m, v, offset)
            return retire(m, v, k.INSN_LEN_WRMSR)
    if _tpr_alone(m, v, msr):
        m[own(m, v) + k.K_MSR_DATA] = reg(m, v, k.APIC_TASKPRI)
        return retire(m, v, k.INSN_LEN_WRMSR)
    return exit_code(k.VMX_MSR_READ, k.ZERO)


# ----------------------------------------------------------------------------------------------------------- xAPIC page


@kernel("u8(u8)")
def page_writable(offset):
    """Whether the CPU virtualises writes to the register at this aligned offset."""
    if offset >= k.APIC_LVTT and offset <= k.APIC_TMICT:
        return k.ONE
    if offset == k.APIC_ID or offset == k.APIC_TASKPRI or offset == k.APIC_EOI or offset == k.APIC_LDR:
        return k.ONE
    if offset == k.APIC_DFR or offset == k.APIC_SPIV or offset == k.APIC_ESR or offset == k.APIC_TDCR:
        return k.ONE
    return k.ONE if offset == k.APIC_ICR or offset == k.APIC_ICR2 else k.ZERO


@kernel("u8(u8)")
def page_readable(offset):
    """The same of reads: EOI among them, PPR, APR, TMCCT and CMCI not."""
    if offset >= k.APIC_ISR and offset < k.APIC_ESR or offset == k.APIC_LVR:
        return k.ONE
    return page_writable(offset)


@kernel("u8(words, u8, u8)")
def _page_exit(m, v, access):
    """The exit of an access that the CPU does not virtualise; ``access`` is the bit of a violation's qualification."""
    unmapped = m[k.H_INHIBITS] and m[k.H_CONFIG] & k.CONFIG_APICV and m[k.H_TRAITS] & k.T_INHIBITED_PAGE_UNMAPPED
    if not unmapped or m[own(m, v) + k.K_APIC_BASE] & ~k.U(0xFFF) != k.APIC_DEFAULT_PHYS_BASE:
        return exit_code(k.VMX_EPT_MISCONFIG, k.ZERO)
    return exit_code(k.VMX_EPT_VIOLATION, k.EPT_VIOLATION_LINEAR | access)


@kernel("u8(words, u8, u8, u8)")
def mmio_read(m, v, offset, length):
    """A read of the page as the guest executes it."""
    if not virtualized(m, v, k.ZERO):
        return _page_exit(m, v, k.EPT_VIOLATION_READ)
    aligned = offset & k.U(0xFF0)
    if (offset & k.U(0xF)) + length > k.U(4) or not page_readable(aligned):
        return exit_code(k.VMX_APIC_ACCESS, offset | INSTRUCTION_READ)
    mask = (k.ONE << (length << k.U(3))) - k.ONE
    m[own(m, v) + k.K_MSR_DATA] = (page_word(m, v, aligned) >> ((offset & k.U(3)) << k.U(3))) & mask
    return retire(m, v, k.ZERO)


@kernel("u8(words, u8)")
def _send_from_page(m, v):
    """APIC-write emulation of ICR low: self-IPI or IPI virtualisation if the value is plain enough, else the exit."""
    icr = reg(m, v, k.APIC_ICR)
    vector = icr & k.ICR_VECTOR
    code = k.ZERO
    if icr & NOT_SIMPLE == SELF and vector >= LOWEST_VECTOR:
        code = self_ipi_virtualization(m, v, vector)
    elif m[k.H_CONFIG] & k.CONFIG_IPIV and not icr & (NOT_SIMPLE | k.ICR_LOGICAL):
        code = ipi_virtualization(m, v, vector, reg(m, v, k.APIC_ICR2) >> k.XAPIC_DEST_SHIFT)
    return code if code else exit_code(k.VMX_APIC_WRITE, k.APIC_ICR)


@kernel("u8(words, u8, u8, u8, u8)")
def mmio_write(m, v, offset, length, value):
    """A write to the page as the guest executes it: the page takes the bytes as they are, whatever KVM will make of it.

    What follows goes by the exact offset; a write into the middle of a register only ever exits, except in ICR high.
    """
    if not virtualized(m, v, k.ZERO):
        return _page_exit(m, v, k.EPT_VIOLATION_WRITE)
    aligned = offset & k.U(0xFF0)
    if (offset & k.U(0xF)) + length > k.U(4) or not page_writable(aligned):
        return exit_code(k.VMX_APIC_ACCESS, offset | INSTRUCTION_WRITE)
    retire(m, v, k.ZERO)
    shift = (offset & k.U(3)) << k.U(3)
    mask = ((k.ONE << (length << k.U(3))) - k.ONE) << shift
    new = (reg(m, v, aligned) & ~mask) | ((value << shift) & mask)
    set_reg(m, v, aligned, new)
    if aligned == k.APIC_ICR2:
        set_reg(m, v, aligned, new & k.U(0xFF00_0000))
        return k.CODE_HARDWARE
    if offset == k.APIC_TASKPRI:
        tpr_virtualization(m, v, new)
        return k.CODE_HARDWARE
    if offset == k.APIC_EOI:
        return eoi_virtualization(m, v)
    if offset == k.APIC_ICR:
        return _send_from_page(m, v)
    return exit_code(k.VMX_APIC_WRITE, offset)
