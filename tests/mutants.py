"""Single faults in the model, each of which `fastexit.kvm.verify` must find: one line a fault, by number of its trap.

The numbers are those of the list that test_traps.py goes by. ``file`` lies below src/fastexit and has ``before`` exactly
once. What no kernel shows at all (what only APICv, SMM, nesting or another generation does) is not here.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """What is wrong, and how it becomes wrong."""

    trap: int
    what: str
    file: str
    before: str
    after: str

    def applied(self, source: str) -> str:
        """The file's text with the fault; ValueError unless there is one place for it."""
        if source.count(self.before) != 1:
            raise ValueError(f"{self.file}: {source.count(self.before)} places for {self.what!r}")
        return source.replace(self.before, self.after)


LAPIC = "kernels/lapic.py"
LAPICREG = "kernels/lapicreg.py"
STATE = "kernels/lapicstate.py"
IPI = "kernels/ipi.py"
MAP = "kernels/apicmap.py"
MATCH = "kernels/match.py"
IRQ = "kernels/irq.py"
MSR = "kernels/msr.py"
MSI = "kernels/msi.py"
EVENTS = "kernels/events.py"
TIMER = "kernels/timer.py"
VCPU = "kernels/vcpu.py"
IOCTLS = "ioctls.py"

_MASK_ALL = "set_reg(m, v, offset, reg(m, v, offset) | k.LVT_MASKED)"
_ENTER_X2APIC = "            set_reg(m, v, k.APIC_LDR, x2apic_ldr(m, v))\n            mark_dirty(m)\n"
_LEAVE_X2APIC = "        elif value & k.APICBASE_EN:\n            _set_xapic_id(m, v)\n"
_HASH = "            chosen = nth_bit(bits, (icr & k.ICR_VECTOR) % popcount(bits))\n"
_NOBODY_FAST = "    if not target:\n        return k.ZERO\n    return accept(m, target - k.ONE, icr, me)\n\n\n@kernel("
_SW_VOTE = "if not flags & k.FLAG_SW or ldr == k.ZERO:"
_DISAGREE = (
    "        m[base + k.MAP_LOGICAL] = k.LOGICAL_DISABLED\n        return k.ZERO\n    m[base + k.MAP_LOGICAL] = vote\n"
)
_REWRITE = "dest == k.XAPIC_BROADCAST and lowest_priority(icr, hint):"
_SIPI = "        if m[row + k.K_MP_STATE] == k.MP_INIT_RECEIVED:\n            m[row + k.K_CS]"
_SVR_OF_PAGE = "    set_spiv(m, v, m[k.H_STAGE + (k.APIC_SPIV >> k.U(3))] & k.LOW32)\n"
_FIX_UP = "    if in_x2apic_mode(m, v) and _fix_up_stage(m, v):\n        return k.CODE_GP | effects | recalculate(m)\n"
_ID_OF_PAGE = "    m[at] = (m[at] & k.HIGH32) | m[row + k.K_VCPU_ID]\n"
_PPR_OF_PAGE = "    compute_ppr(m, v)\n    row = own(m, v)\n    cancel(m, v)\n"
_VERSION_OF_PAGE = "    set_reg(m, v, k.APIC_LVR, version(m, v))\n    compute_ppr(m, v)\n"

MUTANTS = (
    # --------------------------------------------------------------------------------------------- registers, traps 1-3
    Mutant(
        1,
        "an EOI that is not 0 ends nothing",
        LAPIC,
        "        eoi(m, v)\n    elif",
        "        if value == k.ZERO:\n            eoi(m, v)\n    elif",
    ),
    Mutant(
        1,
        "x2APIC registers take bits 63:32",
        LAPIC,
        "if value >> k.U(32) and m[k.H_TRAITS] & k.T_MSR_UPPER_GP:",
        "if k.ZERO:",
    ),
    Mutant(
        2,
        "TPR keeps its reserved bits",
        LAPIC,
        "set_reg(m, v, offset, value & k.U(0xFF))",
        "set_reg(m, v, offset, value)",
    ),
    Mutant(2, "TDCR keeps its reserved bits", TIMER, "k.APIC_TDCR, value & k.TDCR_WRITABLE)", "k.APIC_TDCR, value)"),
    Mutant(
        2,
        "LVTT's reserved bits fault",
        LAPIC,
        "    if offset == k.APIC_LVTT:\n",
        "    if offset == k.APIC_LVTT:\n        if value >> k.U(19):\n            return k.CODE_GP\n",
    ),
    Mutant(
        3, "ESR takes any value in x2APIC mode", LAPIC, "if in_x2apic_mode(m, v) and value != k.ZERO:", "if k.ZERO:"
    ),
    Mutant(
        3,
        "a write clears ESR",
        LAPIC,
        "    elif offset == k.APIC_ESR:\n",
        "    elif offset == k.APIC_ESR:\n        set_reg(m, v, offset, k.ZERO)\n",
    ),
    # ----------------------------------------------------------------------------------------- acceptance, traps 4-11
    Mutant(
        4,
        "vectors below 16 are not accepted",
        IPI,
        "    vector = icr & k.ICR_VECTOR\n    tmr",
        "    vector = icr & k.ICR_VECTOR\n    if vector < k.U(16):\n        return k.ZERO\n    tmr",
    ),
    Mutant(5, "an edge interrupt leaves TMR alone", IPI, "elif is_level and not trigger:", "elif k.ZERO:"),
    Mutant(6, "a level interrupt needs no assert", IPI, "if trigger and not icr & k.ICR_LEVEL:", "if k.ZERO:"),
    Mutant(
        7,
        "an edge interrupt needs an assert",
        IPI,
        "if trigger and not icr & k.ICR_LEVEL:",
        "if not icr & k.ICR_LEVEL:",
    ),
    Mutant(
        7, "INIT needs an assert", IPI, "if icr & k.ICR_TRIGGER and not icr & k.ICR_LEVEL:", "if not icr & k.ICR_LEVEL:"
    ),
    Mutant(6, "INIT de-assert is an INIT", IPI, "if icr & k.ICR_TRIGGER and not icr & k.ICR_LEVEL:", "if k.ZERO:"),
    Mutant(
        8,
        "a software-disabled APIC takes Fixed",
        IPI,
        "    enabled = k.FLAG_HW | k.FLAG_SW\n",
        "    enabled = k.FLAG_HW\n",
    ),
    Mutant(
        8,
        "a software-disabled APIC takes no NMI",
        IPI,
        "    if mode == k.DM_NMI:\n",
        "    if mode == k.DM_NMI and m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_SW:\n",
    ),
    Mutant(
        8,
        "a software-disabled APIC takes no INIT",
        IPI,
        "    if mode == k.DM_INIT:\n",
        "    if mode == k.DM_INIT and m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_SW:\n",
    ),
    Mutant(
        8,
        "the scan reaches hardware-disabled APICs",
        IPI,
        "if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_HW and matches(",
        "if matches(",
    ),
    Mutant(
        9,
        "INIT leaves a pending SIPI",
        IPI,
        "m[row + k.K_PENDING_EVENTS] = k.PENDING_INIT",
        "or_word(m, row + k.K_PENDING_EVENTS, k.PENDING_INIT)",
    ),
    Mutant(
        9,
        "SIPI starts a vCPU that does not wait for it",
        EVENTS,
        _SIPI,
        _SIPI.replace("m[row + k.K_MP_STATE] == k.MP_INIT_RECEIVED", "k.ONE"),
    ),
    Mutant(
        9,
        "a SIPI to a vCPU that does not wait stays pending",
        EVENTS,
        "    if clear_word_bits(m, row + k.K_PENDING_EVENTS, k.PENDING_SIPI) & k.PENDING_SIPI:\n        if m[row + k.K_MP_STATE] == k.MP_INIT_RECEIVED:\n            m[row",
        "    if m[row + k.K_PENDING_EVENTS] & k.PENDING_SIPI:\n        if m[row + k.K_MP_STATE] == k.MP_INIT_RECEIVED:\n            clear_word_bits(m, row + k.K_PENDING_EVENTS, k.PENDING_SIPI)\n            m[row",
    ),
    Mutant(10, "Remote Read reaches nobody", IPI, "    if mode == k.DM_REMRD:\n", "    if k.ZERO:\n"),
    Mutant(
        10, "Remote Read unhalts nobody", IPI, "m[row + k.K_PV_UNHALTED] = k.ONE", "m[row + k.K_PV_UNHALTED] = k.ZERO"
    ),
    Mutant(11, "SELF_IPI rewrites ICR", LAPIC, "if m[k.H_TRAITS] & k.T_SELF_IPI_WRITES_ICR:", "if k.ONE:"),
    # ------------------------------------------------------------------------------------------------- ICR, traps 12-14
    Mutant(
        12,
        "ICR's busy bit is kept",
        LAPIC,
        "    value = value & ~k.ICR_BUSY\n    code = send(m, v, value)\n",
        "    code = send(m, v, value)\n",
    ),
    Mutant(
        12,
        "ICR's reserved bits do not fault",
        LAPIC,
        "if traits & k.T_ICR_RESERVED_GP and value & k.ICR_RESERVED:",
        "if k.ZERO:",
    ),
    Mutant(
        12,
        "an xAPIC's ICR drops its reserved bits",
        LAPIC,
        "    set_reg(m, v, k.APIC_ICR, value)\n    return code\n",
        "    set_reg(m, v, k.APIC_ICR, value & ~k.ICR_RESERVED)\n    return code\n",
    ),
    Mutant(14, "an xAPIC sender's destination has 32 bits", IPI, "return dest >> k.XAPIC_DEST_SHIFT", "return dest"),
    Mutant(
        14,
        "matching goes by the sender's mode",
        MATCH,
        "    x2apic = m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_X2APIC\n",
        "    x2apic = m[hot(m, v if src == k.NONE else src) + k.HOT_FLAGS] & k.FLAG_X2APIC\n",
    ),
    # ----------------------------------------------------------------------------------------- destinations, traps 15-26
    Mutant(
        15,
        "an xAPIC's 0xFF reaches x2APIC targets",
        MATCH,
        "if mda == (k.X2APIC_BROADCAST if x2apic else k.XAPIC_BROADCAST):",
        "if mda == k.X2APIC_BROADCAST or mda == k.XAPIC_BROADCAST:",
    ),
    Mutant(
        15,
        "0xFF of an x2APIC sender is a broadcast",
        MATCH,
        "        broadcast = k.X2APIC_BROADCAST\n    return k.ONE if dest == broadcast else k.ZERO",
        "        broadcast = k.X2APIC_BROADCAST\n    return k.ONE if dest == broadcast or dest == k.XAPIC_BROADCAST else k.ZERO",
    ),
    Mutant(
        16,
        "an MSI's 0xFF does not reach x2APIC targets",
        MATCH,
        "if quirk and src == k.NONE and dest",
        "if k.ZERO and dest",
    ),
    Mutant(
        16,
        "the broadcast quirk cannot be disabled",
        MATCH,
        "quirk = not m[k.H_API] & k.X2API_NO_BROADCAST_QUIRK",
        "quirk = k.ONE",
    ),
    Mutant(
        17,
        "without the quirk 0xFF is no broadcast to the map",
        MATCH,
        "if dest == k.XAPIC_BROADCAST and m[base + k.MAP_LOGICAL] != k.LOGICAL_X2APIC:",
        "if k.ZERO:",
    ),
    Mutant(
        18,
        "the scan knows an xAPIC by its xAPIC id alone",
        MATCH,
        "if x2apic or mda > k.XAPIC_BROADCAST:",
        "if x2apic:",
    ),
    Mutant(
        18,
        "the map knows an xAPIC by its xAPIC id alone",
        MAP,
        "if x2apic or vcpu_id > k.XAPIC_BROADCAST:",
        "if x2apic:",
    ),
    Mutant(
        19,
        "an alias takes the slot instead of dropping the map",
        MAP,
        "    if slot(m, base, k.MAP_PHYS_SLOT + apic_id):\n        return k.ONE\n",
        "",
    ),
    Mutant(
        19,
        "with 32-bit ids the last xAPIC wins",
        MAP,
        "if not x2apic and slot(m, base, k.MAP_PHYS_SLOT + xapic_id) == k.ZERO:",
        "if not x2apic:",
    ),
    Mutant(19, "an alias drops the map with 32-bit ids, too", MAP, "if m[k.H_API] & k.X2API_32BIT_IDS:", "if k.ZERO:"),
    Mutant(20, "software-disabled APICs vote", MAP, _SW_VOTE, "if ldr == k.ZERO:"),
    Mutant(20, "APICs with LDR 0 vote", MAP, _SW_VOTE, "if not flags & k.FLAG_SW:"),
    Mutant(
        20,
        "a vote that disagrees is overruled",
        MAP,
        _DISAGREE,
        _DISAGREE.replace("        m[base + k.MAP_LOGICAL] = k.LOGICAL_DISABLED\n", ""),
    ),
    Mutant(
        20,
        "two flat ids in one APIC do not matter",
        MAP,
        "if popcount(bits) != k.ONE or slot(m, base, at):",
        "if slot(m, base, at):",
    ),
    Mutant(
        21,
        "x2APIC logical reaches x2APIC targets alone",
        IPI,
        "            if target:\n                code =",
        "            wanted = k.FLAG_X2APIC if mode == k.LOGICAL_X2APIC else k.ZERO\n"
        "            if target and m[hot(m, target - k.ONE) + k.HOT_FLAGS] & wanted == wanted:\n                code =",
    ),
    Mutant(
        22,
        "hashing leaves out empty slots of the map",
        IPI,
        _HASH,
        "            for i in range(16):\n                if not slot(m, base, first + k.U(i)):\n                    bits = bits & ~(k.ONE << k.U(i))\n"
        "            if not bits:\n                return k.ZERO\n" + _HASH,
    ),
    Mutant(
        22,
        "the scan hashes over software-disabled APICs",
        IPI,
        "if not flags & k.FLAG_HW or not flags & k.FLAG_SW:",
        "if not flags & k.FLAG_HW:",
    ),
    Mutant(
        23,
        "lowest priority to a physical id goes by the scan",
        IPI,
        "    target = phys(m, base, dest)\n",
        "    if lowest_priority(icr, hint):\n        return UNRESOLVED\n    target = phys(m, base, dest)\n",
    ),
    Mutant(
        24, "lowest priority to all is not rewritten", IPI, "        return icr & ~k.ICR_DM\n", "        return icr\n"
    ),
    Mutant(
        24,
        "the redirection hint to all keeps its mode",
        IPI,
        _REWRITE,
        _REWRITE.replace("lowest_priority(icr, hint)", "delivery_mode(icr) == k.DM_LOWEST"),
    ),
    Mutant(25, "nobody in the scan is 0", IPI, "    code = NOBODY\n", "    code = k.ZERO\n"),
    Mutant(25, "nobody in the map is -1", IPI, _NOBODY_FAST, _NOBODY_FAST.replace("k.ZERO", "NOBODY")),
    Mutant(
        26,
        "a new vCPU is in the map at once",
        VCPU,
        "    reset(m, v, k.ZERO)\n    store_release(m, k.H_NVCPUS, v + k.ONE)\n",
        "    store_release(m, k.H_NVCPUS, v + k.ONE)\n    reset(m, v, k.ZERO)\n",
    ),
    Mutant(
        27,
        "SMI is accepted where there is no SMM, and only there",
        IPI,
        "if mode == k.DM_SMI and m[k.H_CONFIG] & k.CONFIG_SMM:",
        "if mode == k.DM_SMI and not m[k.H_CONFIG] & k.CONFIG_SMM:",
    ),
    # ------------------------------------------------------------------------------------- ID, LDR and DFR, traps 28-30
    Mutant(
        28,
        "DFR keeps what was written",
        LAPIC,
        "set_reg(m, v, offset, value | k.DFR_CLUSTER)",
        "set_reg(m, v, offset, value)",
    ),
    Mutant(28, "to the scan any DFR but flat is cluster", MATCH, "elif dfr == k.DFR_CLUSTER:", "else:"),
    Mutant(
        28,
        "to the map DFR's top bits decide",
        MAP,
        "elif reg(m, v, k.APIC_DFR) == k.DFR_FLAT:",
        "elif reg(m, v, k.APIC_DFR) >> k.U(28) == k.U(15):",
    ),
    Mutant(
        29, "ID and LDR keep all bits", LAPIC, "set_reg(m, v, offset, value & top_byte)", "set_reg(m, v, offset, value)"
    ),
    Mutant(
        29,
        "a written ID outlives hardware-disable",
        STATE,
        "            _set_xapic_id(m, v)\n        mark_dirty(m)\n",
        "            pass\n        mark_dirty(m)\n",
    ),
    Mutant(29, "leaving x2APIC keeps the ID register", STATE, _LEAVE_X2APIC, ""),
    Mutant(
        30,
        "leaving x2APIC clears LDR",
        STATE,
        _LEAVE_X2APIC,
        _LEAVE_X2APIC + "            set_reg(m, v, k.APIC_LDR, k.ZERO)\n",
    ),
    # ------------------------------------------------------------------------- APICBASE, SVR, LVTs and INIT, traps 31-40
    Mutant(
        32,
        "a guest may leave x2APIC for xAPIC",
        STATE,
        "if old & mode == mode and value & mode == k.APICBASE_EN:",
        "if k.ZERO:",
    ),
    Mutant(
        32,
        "a guest may go from off to x2APIC",
        STATE,
        "if old & mode == k.ZERO and value & mode == mode:",
        "if k.ZERO:",
    ),
    Mutant(32, "transitions fault for the host as well", STATE, "    if not host:\n", "    if k.ONE:\n"),
    Mutant(
        33,
        "hardware-disable resets SVR",
        STATE,
        "            _set_xapic_id(m, v)\n        mark_dirty(m)\n",
        "            _set_xapic_id(m, v)\n        else:\n            set_spiv(m, v, k.U(0xFF))\n        mark_dirty(m)\n",
    ),
    Mutant(34, "software-disable masks no LVT", LAPIC, _MASK_ALL, "pass"),
    Mutant(
        34,
        "a software-disabled APIC unmasks its LVTs",
        LAPIC,
        "        value = value | k.LVT_MASKED\n",
        "        pass\n",
    ),
    Mutant(
        34,
        "software-disable empties IRR",
        LAPIC,
        "    update_lvtt(m, v)\n    m[own(m, v) + k.K_TIMER_PENDING] = k.ZERO\n",
        "    update_lvtt(m, v)\n    for i in range(4):\n        m[k.VEC + v * k.VEC_STRIDE + k.VEC_IRR + k.U(i)] = k.ZERO\n    m[own(m, v) + k.K_TIMER_PENDING] = k.ZERO\n",
    ),
    Mutant(
        35,
        "remote IRR of LINT is read-only",
        LAPIC,
        "value, k.LVT_WRITABLE_LINT)",
        "value, k.LVT_WRITABLE_LINT & ~k.U(1 << 14))",
    ),
    Mutant(
        35,
        "delivery status of LVTERR is read-only",
        LAPIC,
        "value, k.LVT_WRITABLE_ERROR)",
        "value, k.LVT_WRITABLE_ERROR & ~k.U(1 << 12))",
    ),
    Mutant(
        35,
        "LVTT takes deadline mode without CPUID",
        TIMER,
        "    if m[k.H_CONFIG] & k.CONFIG_DEADLINE_CPUID:\n",
        "    if k.ONE:\n",
    ),
    Mutant(
        36,
        "LINT0 of the boot vCPU is masked",
        STATE,
        "if m[row + k.K_VCPU_ID] == m[k.H_BSP_ID] and m[k.H_CONFIG] & k.CONFIG_LINT0_REENABLED:",
        "if k.ZERO:",
    ),
    Mutant(
        36,
        "LINT0 of the boot vCPU ignores the quirk",
        STATE,
        "m[row + k.K_VCPU_ID] == m[k.H_BSP_ID] and m[k.H_CONFIG] & k.CONFIG_LINT0_REENABLED:",
        "m[row + k.K_VCPU_ID] == m[k.H_BSP_ID]:",
    ),
    Mutant(
        37,
        "INIT clears LDR in x2APIC mode",
        STATE,
        "    if not in_x2apic_mode(m, v):\n        set_reg(m, v, k.APIC_LDR, k.ZERO)\n",
        "    set_reg(m, v, k.APIC_LDR, k.ZERO)\n    if not in_x2apic_mode(m, v):\n",
    ),
    Mutant(
        37,
        "INIT resets an xAPIC's id",
        STATE,
        "    set_reg(m, v, k.APIC_LVR, version(m, v))\n    for i",
        "    if not in_x2apic_mode(m, v):\n        _set_xapic_id(m, v)\n    set_reg(m, v, k.APIC_LVR, version(m, v))\n    for i",
    ),
    Mutant(
        37,
        "INIT leaves DFR alone",
        STATE,
        "    set_reg(m, v, k.APIC_DFR, k.DFR_FLAT)\n",
        "    if not init:\n        set_reg(m, v, k.APIC_DFR, k.DFR_FLAT)\n",
    ),
    Mutant(
        38,
        "KVM_GET_LAPIC refreshes PPR",
        STATE,
        "    sync_pir_to_irr(m, v)\n",
        "    sync_pir_to_irr(m, v)\n    compute_ppr(m, v)\n",
    ),
    Mutant(39, "KVM_SET_LAPIC counts ISR before PPR", STATE, _PPR_OF_PAGE, "    recount(m, v)\n" + _PPR_OF_PAGE),
    Mutant(40, "PPR drops TPR's low nibble", IRQ, "ppr = tpr & k.U(0xFF)", "ppr = tpr & k.U(0xF0)"),
    Mutant(40, "PPR keeps the low nibble of ISR", IRQ, "        ppr = isr & k.U(0xF0)\n", "        ppr = isr\n"),
    # --------------------------------------------------------------------------------------- KVM_SET_LAPIC, traps 41-44
    Mutant(41, "SVR of a page that is refused is not applied", STATE, _SVR_OF_PAGE + _FIX_UP, _FIX_UP + _SVR_OF_PAGE),
    Mutant(
        41,
        "KVM_SET_LAPIC clears ESR",
        STATE,
        _VERSION_OF_PAGE,
        "    set_reg(m, v, k.APIC_ESR, k.ZERO)\n" + _VERSION_OF_PAGE,
    ),
    Mutant(42, "KVM_SET_LAPIC sets VERSION", STATE, _VERSION_OF_PAGE, "    compute_ppr(m, v)\n"),
    Mutant(
        43,
        "an x2APIC's id is always shown with 32 bits",
        STATE,
        "        if not m[k.H_API] & k.X2API_32BIT_IDS:\n",
        "        if k.ZERO:\n",
    ),
    Mutant(
        43,
        "KVM_SET_LAPIC wants the id without 32-bit ids, too",
        STATE,
        "if m[k.H_API] & k.X2API_32BIT_IDS and m[at]",
        "if m[at]",
    ),
    Mutant(43, "KVM_SET_LAPIC sets an x2APIC's id", STATE, _ID_OF_PAGE, ""),
    Mutant(43, "KVM_SET_LAPIC sets an x2APIC's LDR", STATE, "    m[at] = (m[at] & k.HIGH32) | x2apic_ldr(m, v)\n", ""),
    Mutant(
        44,
        "a write to ICR's low half clears 0x304",
        LAPICREG,
        "    m[i] = (m[i] & k.HIGH32) | (value & k.LOW32)\n",
        "    m[i] = value & k.LOW32\n",
    ),
    Mutant(
        44,
        "entering x2APIC clears 0x304",
        STATE,
        _ENTER_X2APIC,
        _ENTER_X2APIC + "            m[word(m, v, k.APIC_ICR)] = reg(m, v, k.APIC_ICR)\n",
    ),
    # ---------------------------------------------------------------------------------- MMIO and user space, traps 45-52
    Mutant(
        45,
        "a store beside a register hits it",
        LAPIC,
        "if length != k.U(4) or offset & k.U(0xF):",
        "if length != k.U(4):",
    ),
    Mutant(
        45,
        "a short store hits its register",
        LAPIC,
        "if length != k.U(4) or offset & k.U(0xF):",
        "if offset & k.U(0xF):",
    ),
    Mutant(
        45,
        "a short load gets the register's first bytes",
        LAPIC,
        "m[out] = (value >> ((offset & k.U(0xF)) << k.U(3))) & mask",
        "m[out] = value & mask",
    ),
    Mutant(
        45,
        "DFR can be read in x2APIC mode",
        LAPIC,
        "        return k.ZERO if in_x2apic_mode(m, v) else k.ONE\n",
        "        return k.ONE\n",
    ),
    Mutant(
        49,
        "CR8 keeps TPR's low nibble",
        MSR,
        "set_reg(m, v, k.APIC_TASKPRI, value << k.U(4))",
        "set_reg(m, v, k.APIC_TASKPRI, value << k.U(4) | reg(m, v, k.APIC_TASKPRI) & k.U(0xF))",
    ),
    Mutant(
        50,
        "KVM_GET_MP_STATE leaves INIT and SIPI pending",
        IOCTLS,
        '        _jit.load("accept_events")(self._handle, self.index)\n        state = self',
        "        state = self",
    ),
    Mutant(
        51,
        "the host's EOI is not carried out",
        MSR,
        "    if msr >= k.MSR_X2APIC_BASE and msr <= k.MSR_X2APIC_END:\n        return x2apic_msr_write(",
        "    if host and msr == k.U(0x80B):\n        return k.ZERO\n    if msr >= k.MSR_X2APIC_BASE and msr <= k.MSR_X2APIC_END:\n        return x2apic_msr_write(",
    ),
    Mutant(
        52,
        "TSC_DEADLINE counts in every timer mode",
        TIMER,
        "k.FLAG_HW and m[own(m, v) + k.K_TIMER_MODE] == k.TIMER_DEADLINE:",
        "k.FLAG_HW:",
    ),
    Mutant(
        57,
        "a change between one-shot and periodic clears TMICT",
        TIMER,
        "if mode == k.TIMER_DEADLINE or old == k.TIMER_DEADLINE:",
        "if k.ONE:",
    ),
    Mutant(
        57,
        "a change to deadline mode keeps TMICT",
        TIMER,
        "if mode == k.TIMER_DEADLINE or old == k.TIMER_DEADLINE:",
        "if old == k.TIMER_DEADLINE:",
    ),
    # -------------------------------------------------------------------------------------- service and EOI, traps 65-70
    Mutant(
        68,
        "SVR takes bit 12 without directed EOI",
        LAPIC,
        "if reg(m, v, k.APIC_LVR) & k.LVR_DIRECTED_EOI:",
        "if k.ONE:",
    ),
    Mutant(
        68,
        "SVR drops bit 9",
        LAPIC,
        "    writable = k.SVR_WRITABLE\n",
        "    writable = k.SVR_WRITABLE & ~k.U(1 << 9)\n",
    ),
    Mutant(
        69,
        "KVM_SET_LAPIC does not count ISR",
        STATE,
        "    recount(m, v)\n    restore(m, v)\n    m[row + k.K_ARB_PRIO]",
        "    restore(m, v)\n    m[row + k.K_ARB_PRIO]",
    ),
)
