"""The batch door: many exits of any vCPUs in one compiled call, with the outcomes that single exits would have.

Each exit goes through loop.py. What has no compiled handler (or one that an embedder replaced) stops the batch at that
exit, and the caller hands it to the Python dispatcher.
"""

from ..jit.atomics import prefetch
from ..jit.declare import inlined, kernel
from . import bus, routes, unicast
from . import typed as k
from .hostrow import give_row, take_row
from .loop import behind_unicast, find_row, handles, run_exit
from .pi import process_notification
from .shared import clear_words, own, vec

NEAR = k.U(1536)
"""So many vCPUs leave enough of a second-level cache of 1 MiB; to ask for their lines ahead would not pay."""
AHEAD = k.U(12)
"""Records between a prefetch and its use: a few IPIs, some 100 ns."""


VMX_ACCESSES = (k.ONE << k.VMX_EPT_MISCONFIG) | (k.ONE << k.VMX_EPT_VIOLATION) | (k.ONE << k.VMX_IO_INSTRUCTION)
SVM_ACCESSES = (k.ONE << (k.SVM_NPF & k.U(63))) | (k.ONE << (k.SVM_IO & k.U(63)))
"""Exits that name an address or a port, a bit for the low six bits of their numbers."""


@kernel("u8(words, words, u8)")
def _looks_bad(m, exits, n):
    """0 when no record names a vCPU outside the machine, an address or a port: what first_bad looks at one by one.

    A few others look bad as well, for each record costs only what a vector unit does at once.
    """
    accesses = SVM_ACCESSES if m[k.H_CONFIG] & k.CONFIG_SVM else VMX_ACCESSES
    last = m[k.H_NVCPUS] - k.ONE
    beyond = k.ZERO
    found = k.ZERO
    for i in range(n):
        word = exits[k.U(i) * k.EXIT_WORDS]
        beyond = beyond | (last - (word & k.LOW32))
        found = found | (accesses >> ((word >> k.U(32)) & k.U(63)))
    return (beyond >> k.U(63)) | (found & k.ONE)


@kernel("u8(words, u8, u8, u8)")
def outside(m, reason, info, gpa):
    """Tell whether an exit is an access that no CPU makes: of a wrong length, or beyond MAXPHYADDR."""
    svm = m[k.H_CONFIG] & k.CONFIG_SVM
    if reason == (k.SVM_IO if svm else k.VMX_IO_INSTRUCTION):
        return k.ZERO if bus.io_length(m, info) else k.ONE
    if reason != k.SVM_NPF if svm else reason != k.VMX_EPT_MISCONFIG and reason != k.VMX_EPT_VIOLATION:
        return k.ZERO
    length = info & ~k.MMIO_WRITE
    known = length == k.ONE or length == k.U(2) or length == k.U(4) or length == k.U(8)
    return k.ZERO if known and not gpa >> m[k.H_MAXPHYADDR] else k.ONE


@kernel("u8(words, words, u8)")
def first_bad(m, exits, n):
    """Index of the first exit that names a vCPU or an access outside the machine, or n."""
    if not _looks_bad(m, exits, n):
        return n
    for i in range(n):
        at = k.U(i) * k.EXIT_WORDS
        if exits[at] & k.LOW32 >= m[k.H_NVCPUS]:
            return k.U(i)
        if outside(m, exits[at] >> k.U(32), exits[at + k.ONE] >> k.U(32), exits[at + k.U(3)]):
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
        elif reason == k.IRQ_LINE:
            me = take_row(m)
            outcomes[out] = routes.irq_line(m, msr, info, k.ONE, me)
            outcomes[out + k.ONE] = m[own(m, me) + k.K_TARGETS]
            give_row(m, me)
        else:
            row = find_row(m, reason, info)
            op = row & k.ROW_OPERATION
            if not handles(m, v, row):
                return i
            where = exits[at + k.U(3)] if op == k.OP_MMIO_WRITE or op == k.OP_MMIO_READ else msr
            if op == k.OP_HYPERCALL:
                where, info = exits[at + k.U(3)], exits[at + k.ONE]
                clear_words(m, k.XMM + v * k.XMM_STRIDE, k.XMM_WORDS)
            outcomes[out] = run_exit(m, v, row, reason, where, exits[at + k.U(2)], info)
            reads = op == k.OP_RDMSR or op == k.OP_MMIO_READ or op == k.OP_IO_READ
            outcomes[out + k.ONE] = m[own(m, v) + (k.K_MSR_DATA if reads else k.K_TARGETS)]
        i = i + k.ONE
