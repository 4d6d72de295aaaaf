"""Atomic access to 64-bit words, sequentially consistent, for words that another thread may write.

Each takes the word array and an index; those that change a word return what stood there before. Compiled, each is one
hardware atomic (a compare-exchange loop where the CPU has no such instruction) and takes no lock, so it also meets what
C code does to the same words. Interpreted, they are plain Python and atomic towards nobody. Bounds are checked under
``NUMBA_BOUNDSCHECK=1``.
"""

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils

from ._jit import WORDS, lowers

X86_64 = llvmlite.binding.get_process_triple().startswith("x86_64")
if X86_64:
    llvmlite.binding.initialize_native_asmparser()

ORDER = "seq_cst"


def _pointer(context, builder, words, i):
    """Address of word i, which has to lie in the array when bounds are checked."""
    if isinstance(WORDS, numba.types.CPointer):
        return builder.gep(words, [i])
    array = context.make_array(WORDS)(context, builder, words)
    check = context.enable_boundscheck
    return cgutils.get_item_pointer(context, builder, WORDS, array, [i], wraparound=False, boundscheck=check)


def fetch_or(m, i, value):
    """Set the bits of value."""
    old = m[i]
    m[i] = old | value
    return old


@lowers(fetch_or, "u8(words, u8, u8)")
def _fetch_or(context, builder, m, i, value):
    return builder.atomic_rmw("or", _pointer(context, builder, m, i), value, ORDER)


def fetch_and(m, i, value):
    """Keep the bits of value only."""
    old = m[i]
    m[i] = old & value
    return old


@lowers(fetch_and, "u8(words, u8, u8)")
def _fetch_and(context, builder, m, i, value):
    return builder.atomic_rmw("and", _pointer(context, builder, m, i), value, ORDER)


def fetch_add(m, i, value):
    """Add value, modulo 2**64."""
    old = m[i]
    m[i] = np.uint64((int(old) + int(value)) & 0xFFFF_FFFF_FFFF_FFFF)
    return old


@lowers(fetch_add, "u8(words, u8, u8)")
def _fetch_add(context, builder, m, i, value):
    return builder.atomic_rmw("add", _pointer(context, builder, m, i), value, ORDER)


def exchange(m, i, value):
    """Replace the word."""
    old = m[i]
    m[i] = value
    return old


@lowers(exchange, "u8(words, u8, u8)")
def _exchange(context, builder, m, i, value):
    return builder.atomic_rmw("xchg", _pointer(context, builder, m, i), value, ORDER)


def compare_exchange(m, i, old, new):
    """Replace the word by new if it is old. It happened if and only if the result equals old."""
    was = m[i]
    if was == old:
        m[i] = new
    return was


@lowers(compare_exchange, "u8(words, u8, u8, u8)")
def _compare_exchange(context, builder, m, i, old, new):
    return builder.extract_value(builder.cmpxchg(_pointer(context, builder, m, i), old, new, ORDER, ORDER), 0)


def test_and_set_bit(m, i, bit):
    """Set bit 0..63 (taken modulo 64); 1 if it was set already, else 0."""
    bit = bit & np.uint64(63)
    return (fetch_or(m, i, np.uint64(1) << bit) >> bit) & np.uint64(1)


@lowers(test_and_set_bit, "u8(words, u8, u8)")
def _test_and_set_bit(context, builder, m, i, bit):
    return _bit_operation("bts", builder, _pointer(context, builder, m, i), bit)


def test_and_clear_bit(m, i, bit):
    """Clear bit 0..63 (taken modulo 64); 1 if it was set, else 0."""
    bit = bit & np.uint64(63)
    return (fetch_and(m, i, ~(np.uint64(1) << bit)) >> bit) & np.uint64(1)


@lowers(test_and_clear_bit, "u8(words, u8, u8)")
def _test_and_clear_bit(context, builder, m, i, bit):
    return _bit_operation("btr", builder, _pointer(context, builder, m, i), bit)


test_and_set_bit.__test__ = test_and_clear_bit.__test__ = False  # their names are KVM's, not pytest's


def _bit_operation(operation, builder, pointer, bit):
    """One locked bts or btr on x86-64. LLVM itself would make a loop of it, once the old bit is used as a number."""
    word = bit.type
    bit = builder.and_(bit, word(63))
    if X86_64:
        kind = ir.FunctionType(word, [pointer.type, word])
        code, effects = f"lock {operation}q $2, ($1)", "~{memory},~{flags},~{dirflag},~{fpsr}"
        return builder.asm(kind, code, "={@ccc},r,Jr," + effects, [pointer, bit], side_effect=True)
    mask = builder.shl(word(1), bit)
    if operation == "bts":
        old = builder.atomic_rmw("or", pointer, mask, ORDER)
    else:
        old = builder.atomic_rmw("and", pointer, builder.not_(mask), ORDER)
    return builder.and_(builder.lshr(old, bit), word(1))


def load_acquire(m, i):
    """Read the word; nothing that follows moves before the read."""
    return m[i]


@lowers(load_acquire, "u8(words, u8)")
def _load_acquire(context, builder, m, i):
    return builder.load_atomic(_pointer(context, builder, m, i), "acquire", 8, typ=ir.IntType(64))


def store_release(m, i, value):
    """Write the word; nothing that precedes moves behind the write."""
    m[i] = value


@lowers(store_release, "void(words, u8, u8)")
def _store_release(context, builder, m, i, value):
    builder.store_atomic(value, _pointer(context, builder, m, i), "release", 8)
    return context.get_dummy_value()


def prefetch(m, i):
    """Ask for the cache line of word i, which need not lie in the array: nothing is read and nothing can fault."""


@lowers(prefetch, "void(words, u8)")
def _prefetch(context, builder, m, i):
    if isinstance(WORDS, numba.types.CPointer):
        i32 = ir.IntType(32)
        line = builder.bitcast(builder.gep(m, [i]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [line.type, i32, i32, i32])
        intrinsic = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(intrinsic, [line, i32(0), i32(3), i32(1)])
    return context.get_dummy_value()


def fence_after_atomic():
    """Full barrier behind one of the atomics above that change a word; on x86-64 they are one already."""


@lowers(fence_after_atomic, "void()")
def _fence_after_atomic(context, builder):
    if X86_64:
        builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)
    else:
        builder.fence(ORDER)
    return context.get_dummy_value()


def fence():
    """Full barrier: every access before it is seen before every access behind it."""


@lowers(fence, "void()")
def _fence(context, builder):
    builder.fence(ORDER)
    return context.get_dummy_value()
