"""The APIC map (kvm_apic_map): physical and logical ids to vCPUs, rebuilt whenever an id, mode or enable bit changes.

Models: kvm_recalculate_apic_map with every rule that drops the map or its logical half, and how a destination is looked
up in it, for IPIs, messages and remapping entries alike (kvm_apic_map_get_dest_lapic). Spec: SDM vol. 3A 10.6.2,
10.12.10. What is wrong with a map also inhibits APICv (inhibit.py). Not modelled: RCU grace periods.

Differs by generation (MAP_BY_VOTES): up to 6.1 no map is ever dropped and no alias is looked for.

A map is built in a scratch area, then copied word by word over the idle one of two copies, unchanged words left alone,
and published with one store. A reader that two rebuilds overtake so finds
in each word what the map said before or says now, never an emptied slot: vCPUs that nobody touched stay reachable.
"""

from ..jit.atomics import compare_exchange, exchange, load_acquire, store_release
from ..jit.declare import ctz, inlined, kernel, popcount, umax, umin
from . import typed as k
from .inhibit import id_modified, map_rebuilt
from .lapicreg import reg
from .match import is_broadcast, lowest_priority
from .shared import ask_all, clear_words, hot, own, renew_words, replace_if

CLEAN, DIRTY, IN_PROGRESS = k.ZERO, k.ONE, k.U(2)
UNRESOLVED = k.NONE
MEMBER_BITS = k.U(32)
VOTE_X2APIC, VOTE_FLAT, VOTE_CLUSTER = k.ONE, k.U(2), k.U(4)


@kernel("u8(words, u8, u8)")
def slot(m, base, i):
    """vCPU index + 1 in slot i of the map at base, 0 when empty."""
    return (m[base + k.MAP_SLOTS + (i >> k.U(2))] >> ((i & k.U(3)) << k.U(4))) & k.U(0xFFFF)


@kernel("u8(words, u8, u8, u8)")
def set_slot(m, base, i, value):
    at = base + k.MAP_SLOTS + (i >> k.U(2))
    shift = (i & k.U(3)) << k.U(4)
    m[at] = (m[at] & ~(k.U(0xFFFF) << shift)) | (value << shift)
    return k.ZERO


@kernel("u8(words, u8, u8)")
def phys(m, base, apic_id):
    """vCPU index + 1 of a physical id, 0 when there is none; ids above the map's maximum are nobody's."""
    if apic_id > m[base + k.MAP_MAX_ID]:
        return k.ZERO
    return slot(m, base, k.MAP_PHYS_SLOT + apic_id)


@kernel("u8(u8, u8)")
def nth_bit(bits, n):
    """Position of the n-th set bit, counted from 0."""
    position = k.ZERO
    while True:
        if (bits >> position) & k.ONE:
            if n == k.ZERO:
                return position
            n = n - k.ONE
        position = position + k.ONE


@kernel("u8(words, u8, u8, u8)")
def _lowest(m, base, first, bits):
    """Vector hashing off: which of these slots has the smallest arb_prio, the first on a tie; NONE if all are empty."""
    best = k.NONE
    least = k.ZERO
    while bits:
        i = ctz(bits)
        bits = bits & (bits - k.ONE)
        found = slot(m, base, first + i)
        if found and (best == k.NONE or m[own(m, found - k.ONE) + k.K_ARB_PRIO] < least):
            best = i
            least = m[own(m, found - k.ONE) + k.K_ARB_PRIO]
    return best


@kernel("u8(words, u8, u8)")
def _logical(m, base, dest):
    """kvm_apic_map_get_logical_dest: slots as members() has them, or UNRESOLVED."""
    mode = m[base + k.MAP_LOGICAL]
    if mode == k.LOGICAL_DISABLED:
        return UNRESOLVED
    if mode == k.LOGICAL_SW_DISABLED:
        return k.ZERO
    if mode == k.LOGICAL_X2APIC:
        cluster = (dest >> k.U(16)) << k.U(4)
        if cluster > m[base + k.MAP_MAX_ID]:
            return k.ZERO
        size = umin(m[base + k.MAP_MAX_ID] - cluster + k.ONE, k.U(16))
        return k.MAP_PHYS_SLOT + cluster | (dest & ((k.ONE << size) - k.ONE)) << MEMBER_BITS
    if mode == k.LOGICAL_FLAT:
        return k.MAP_FLAT_SLOT | (dest & k.U(0xFF)) << MEMBER_BITS
    first = k.MAP_CLUSTER_SLOT + (((dest >> k.U(4)) & k.U(0xF)) << k.U(2))
    return first | (dest & k.U(0xF)) << MEMBER_BITS


@inlined
@kernel("u8(words, u8, u8, u8, u8, u8)")
def members(m, base, src, icr, dest, hint):
    """kvm_apic_map_get_dest_lapic without shorthands: the slots of a destination, or UNRESOLVED: the map cannot tell.

    Slots are their first one in bits 31:0 and, from MEMBER_BITS on, a bit for each of up to 16 from there; member()
    looks into one, which may be empty. Lowest priority leaves at most one of them. No bit: nobody is meant.
    """
    if not m[base + k.MAP_PRESENT] or is_broadcast(m, base, src, dest):
        return UNRESOLVED
    if not icr & k.ICR_LOGICAL:
        return k.MAP_PHYS_SLOT + dest | k.ONE << MEMBER_BITS if dest <= m[base + k.MAP_MAX_ID] else k.ZERO
    found = _logical(m, base, dest)
    bits = found >> MEMBER_BITS
    if found == UNRESOLVED or not bits or not lowest_priority(icr, hint):
        return found
    if m[k.H_CONFIG] & k.CONFIG_VECTOR_HASHING:
        # Empty slots count: the hash may choose one, and then the interrupt is dropped.
        chosen = nth_bit(bits, (icr & k.ICR_VECTOR) % popcount(bits))
        if not member(m, base, found, chosen):
            m[k.H_LOST_LOWEST] = k.ONE
    else:
        chosen = _lowest(m, base, found & k.LOW32, bits)
    return found & k.LOW32 | k.ONE << MEMBER_BITS + chosen if chosen != k.NONE else k.ZERO


@kernel("u8(words, u8, u8, u8)")
def member(m, base, found, i):
    """vCPU index + 1 in one of the slots that members() found, 0 when it is empty."""
    return slot(m, base, (found & k.LOW32) + i)


@kernel("u8(words)")
def mark_dirty(m):
    """The map no longer shows the vCPUs. After the change itself: a rebuild that sees the mark must see the change."""
    return exchange(m, k.H_MAP_DIRTY, DIRTY)


@kernel("u8(words, u8, u8)")
def _enter_physical(m, base, v):
    """kvm_recalculate_phys_map for one vCPU: 1 when the whole map has to go.

    With 32-bit ids, and always up to 6.1, x2APIC ids come before xAPIC ids, of which the first one counts.
    """
    vcpu_id = m[own(m, v) + k.K_VCPU_ID]
    x2apic = m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_X2APIC
    xapic_id = reg(m, v, k.APIC_ID) >> k.U(24)
    if m[k.H_API] & k.X2API_32BIT_IDS or m[k.H_RULES] & k.R_MAP_BY_VOTES:
        if x2apic or vcpu_id > k.XAPIC_BROADCAST:
            set_slot(m, base, k.MAP_PHYS_SLOT + vcpu_id, v + k.ONE)
        if not x2apic and slot(m, base, k.MAP_PHYS_SLOT + xapic_id) == k.ZERO:
            set_slot(m, base, k.MAP_PHYS_SLOT + xapic_id, v + k.ONE)
        return k.ZERO
    apic_id = vcpu_id if x2apic else xapic_id
    if slot(m, base, k.MAP_PHYS_SLOT + apic_id):
        return k.ONE
    set_slot(m, base, k.MAP_PHYS_SLOT + apic_id, v + k.ONE)
    return k.ZERO


@kernel("u8(words, u8, u8)")
def _enter_logical(m, base, v):
    """kvm_recalculate_logical_map for one vCPU: votes on the mode, then takes its slot."""
    if m[base + k.MAP_LOGICAL] == k.LOGICAL_DISABLED:
        return k.ZERO
    flags = m[hot(m, v) + k.HOT_FLAGS]
    ldr = reg(m, v, k.APIC_LDR)
    if not flags & k.FLAG_SW or ldr == k.ZERO:
        return k.ZERO
    if flags & k.FLAG_X2APIC:
        vote = k.LOGICAL_X2APIC
    elif reg(m, v, k.APIC_DFR) == k.DFR_FLAT:
        vote = k.LOGICAL_FLAT
    else:
        vote = k.LOGICAL_CLUSTER
    mode = m[base + k.MAP_LOGICAL]
    if mode != k.LOGICAL_SW_DISABLED and mode != vote:
        m[base + k.MAP_LOGICAL] = k.LOGICAL_DISABLED
        return k.ZERO
    m[base + k.MAP_LOGICAL] = vote
    if vote == k.LOGICAL_X2APIC:
        return k.ZERO
    logical_id = ldr >> k.U(24)
    first = k.MAP_FLAT_SLOT
    bits = logical_id
    if vote == k.LOGICAL_CLUSTER:
        first = k.MAP_CLUSTER_SLOT + ((logical_id >> k.U(4)) << k.U(2))
        bits = logical_id & k.U(0xF)
    if bits == k.ZERO:
        return k.ZERO
    at = first + ctz(bits)
    if popcount(bits) != k.ONE or slot(m, base, at):
        m[base + k.MAP_LOGICAL] = k.LOGICAL_DISABLED
        return k.ZERO
    set_slot(m, base, at, v + k.ONE)
    return k.ZERO


@kernel("u8(u8)")
def _elected(votes):
    """The logical mode that all votes are for. No vote elects none either: then only the scan can tell."""
    if votes == VOTE_X2APIC:
        return k.LOGICAL_X2APIC
    if votes == VOTE_FLAT:
        return k.LOGICAL_FLAT
    return k.LOGICAL_CLUSTER if votes == VOTE_CLUSTER else k.LOGICAL_DISABLED


@kernel("u8(words, u8, u8, u8)")
def _vote(m, base, v, votes):
    """The logical half up to 6.1, for one vCPU: all votes with its own.

    It takes the slot of its lowest LDR bit from whoever had it, by the mode that the votes so far elect: in x2APIC mode
    that is a physical slot, so an LDR that is not the id's (a page from KVM_SET_LAPIC) hides another vCPU. An LDR of 0
    is a vote in x2APIC mode alone.
    """
    flags = m[hot(m, v) + k.HOT_FLAGS]
    if not flags & k.FLAG_SW:
        return votes
    ldr = reg(m, v, k.APIC_LDR)
    if flags & k.FLAG_X2APIC:
        votes = votes | VOTE_X2APIC
    elif ldr:
        ldr = ldr >> k.U(24)
        votes = votes | (VOTE_FLAT if reg(m, v, k.APIC_DFR) == k.DFR_FLAT else VOTE_CLUSTER)
    m[base + k.MAP_LOGICAL] = _elected(votes)
    found = _logical(m, base, ldr)
    if found != UNRESOLVED and found >> MEMBER_BITS:
        set_slot(m, base, (found & k.LOW32) + ctz(found >> MEMBER_BITS), v + k.ONE)
    return votes


@kernel("u8(words, u8)")
def _build(m, base):
    """A map of what the vCPUs are now, at base; MAP_PRESENT only if no rule drops it. 1 when an xAPIC id was modified,
    as far as it looked.
    """
    clear_words(m, base, k.MAP_WORDS)
    n = m[k.H_NVCPUS]
    top = k.XAPIC_BROADCAST
    for i in range(n):
        v = k.U(i)
        if m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_HW:
            top = umax(top, m[own(m, v) + k.K_VCPU_ID])
    m[base + k.MAP_MAX_ID] = top
    by_votes = m[k.H_RULES] & k.R_MAP_BY_VOTES
    m[base + k.MAP_LOGICAL] = k.LOGICAL_DISABLED if by_votes else k.LOGICAL_SW_DISABLED
    modified = k.ZERO
    votes = k.ZERO
    for i in range(n):
        v = k.U(i)
        if not m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_HW:
            continue
        modified = modified | id_modified(m, v)
        if _enter_physical(m, base, v):
            return modified
        if by_votes:
            votes = _vote(m, base, v, votes)
        else:
            _enter_logical(m, base, v)
    m[base + k.MAP_PRESENT] = k.ONE
    return modified


@kernel("u8(words, u8)")
def recalculate(m, me):
    """kvm_recalculate_apic_map: rebuild if something marked the map dirty. Effect code: inhibits may change, and every
    vCPU is asked which EOIs the IOAPIC wants of it now.

    ``me`` is told whom to kick for that, as in ipi.py.
    """
    if load_acquire(m, k.H_MAP_DIRTY) == CLEAN:
        return k.ZERO
    while replace_if(m, k.H_MAP_LOCK, k.ZERO, k.ONE):
        pass
    if load_acquire(m, k.H_MAP_DIRTY) == CLEAN:
        # Another thread, which held the lock, has built from what this one changed.
        store_release(m, k.H_MAP_LOCK, k.ZERO)
        return k.ZERO
    # Not yet clean: whoever changes a vCPU now and looks must wait for the lock. Marks that come during the build say
    # DIRTY again, so the exchange at the end fails and their own callers build once more.
    exchange(m, k.H_MAP_DIRTY, IN_PROGRESS)
    modified = _build(m, k.MAP_SCRATCH)
    present = m[k.MAP_SCRATCH + k.MAP_PRESENT]
    effects = map_rebuilt(m, me, present, m[k.MAP_SCRATCH + k.MAP_LOGICAL], modified)
    idle = k.MAP1 if m[k.H_MAP] == k.MAP0 else k.MAP0
    renew_words(m, idle, k.MAP_SCRATCH, k.MAP_WORDS)
    store_release(m, k.H_MAP, idle)
    compare_exchange(m, k.H_MAP_DIRTY, IN_PROGRESS, CLEAN)
    store_release(m, k.H_MAP_LOCK, k.ZERO)
    return effects | ask_all(m, k.REQ_SCAN_IOAPIC, me)
