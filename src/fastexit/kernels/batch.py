"""The batch door: many exits of any vCPUs in one compiled call, with the outcomes that single exits would have.

Each exit goes through loop.py. What has no compiled handler (or one that an embedder replaced) stops the batch at that
exit, and the caller hands it to the Python dispatcher.
"""

from ..jit.atomics import prefetch
from ..jit.declare import inlined, kernel
from . import typed as k
from . import unicast
from .loop import behind_unicast, find_row, run_exit
from .pi import process_notification
from .shared import hot, own, vec

NEAR = k.U(1536)
"""So many vCPUs leave enough of a second-level cache of 1 MiB; to ask for their lines ahead would not pay."""
AHEAD = k.U(12)
"""Records between a prefetch and its use: a few IPIs, some 100 ns."""


@kernel("u8(words, words, u8)")
def _looks_bad(m, exits, n):
    """0 when no record names a vCPU outside the machine or the xAPIC page: what first_bad has to look at one by one."""
    vcpus = m[k.H_NVCPUS]
    page = k.SVM_NPF if m[k.H_CONFIG] & k.CONFIG_SVM else k.VMX_EPT_MISCONFIG
    found = k.ZERO
    for i in range(n):
        word = exits[k.U(i) * k.EXIT_WORDS]
        found = found | k.U(word & k.LOW32 >= vcpus) | k.U(word >> k.U(32) == page)
    return found


@kernel("u8(words, words, u8)")
def first_bad(m, exits, n):
    """Index of the first exit that names a vCPU or an access outside the machine, or n."""
    if not _looks_bad(m, exits, n):
        return n
    for i in range(n):
        at = k.U(i) * k.EXIT_WORDS
        if exits[at] & k.LOW32 >= m[k.H_NVCPUS]:
            return k.U(i)
        info = exits[at + k.ONE] >> k.U(32)
        op = find_row(m, exits[at] >> k.U(32), info) & k.ROW_OPERATION
        if op == k.OP_MMIO_WRITE or op == k.OP_MMIO_READ:
            length = info & ~k.MMIO_WRITE
            if exits[at + k.ONE] & k.LOW32 > k.U(0xFFF) or (length != k.ONE and length != k.U(2) and length != k.U(4)):
                return k.U(i)
    return n


@inlined
@kernel("u8(words, words, words, u8, u8, u8)")
def _run_unicasts(m, exits, outcomes, first, n, far):
    """As many of the exits first..n-1 as are plain IPIs or notifications; the index of the first other one, or n.

    ``far``: the vCPUs' lines are far away, so what an exit will touch is asked for some exits before.
    """
    i = first
    while i < n:
        at = i * k.EXIT_WORDS
        out = i * k.OUTCOME_WORDS
        v = exits[at] & k.LOW32
        reason = exits[at] >> k.U(32)
        value = exits[at + k.U(2)]
        if v >= m[k.H_NVCPUS]:
            return i
        if far and i + AHEAD < n:
            _look_ahead(m, exits, (i + AHEAD) * k.EXIT_WORDS)
        if reason == k.NOTIFICATION:
            code = k.CODE_HARDWARE if process_notification(m, v) else k.ZERO
            outcomes[out + k.ONE] = k.ZERO
        elif reason == k.VMX_MSR_WRITE and exits[at + k.ONE] & k.LOW32 == k.MSR_X2APIC_ICR:
            code = unicast.send(m, v, value)
            if not code:
                return i
            if not unicast.again(m, v):
                code = behind_unicast(m, v, code, value)
            outcomes[out + k.ONE] = m[own(m, v) + k.K_TARGETS]
        else:
            return i
        outcomes[out] = code
        i = i + k.ONE
    return n


@inlined
@kernel("u8(words, words, u8)")
def _look_ahead(m, exits, at):
    """Prefetch for the exit whose record begins at a word."""
    if exits[at] >> k.U(32) == k.NOTIFICATION:
        prefetch(m, vec(m, exits[at] & k.LOW32))
    elif exits[at + k.ONE] & k.LOW32 == k.MSR_X2APIC_ICR:
        unicast.look_ahead(m, exits[at + k.U(2)] >> k.ICR_DEST_SHIFT)
    return k.ZERO


@kernel("u8(words, words, words, u8, u8)")
def run(m, exits, outcomes, first, n):
    """Exits first..n-1; the index of the first one that needs the Python dispatcher, or n.

    Every vCPU index is checked again here: the array may belong to another thread that changes it.
    """
    if first >= n:
        return n
    plain = unicast.possible(m) and not m[k.H_HANDLERS]
    i = first
    while True:
        if plain:
            i = _run_unicasts(m, exits, outcomes, i, n, m[k.H_NVCPUS] > NEAR)
        if i >= n:
            return n
        at = i * k.EXIT_WORDS
        out = i * k.OUTCOME_WORDS
        v = exits[at] & k.LOW32
        reason = exits[at] >> k.U(32)
        msr = exits[at + k.ONE] & k.LOW32
        info = exits[at + k.ONE] >> k.U(32)
        if v >= m[k.H_NVCPUS]:
            return i
        if reason == k.NOTIFICATION:
            outcomes[out + k.ONE] = k.ZERO
            outcomes[out] = k.CODE_HARDWARE if process_notification(m, v) else k.ZERO
        else:
            row = find_row(m, reason, info)
            op = row & k.ROW_OPERATION
            if op == k.OP_NONE or m[k.H_HANDLERS] or m[hot(m, v) + k.HOT_FLAGS] & k.FLAG_L2:
                return i
            outcomes[out] = run_exit(m, v, row, reason, msr, exits[at + k.U(2)], info)
            reads = op == k.OP_RDMSR or op == k.OP_MMIO_READ
            outcomes[out + k.ONE] = m[own(m, v) + (k.K_MSR_DATA if reads else k.K_TARGETS)]
        i = i + k.ONE
