"""What a compiled kernel makes of the plain functions of ``atomics`` and ``declare``: machine code, as LLVM has it.

Only a compilation imports this file: it needs numba, which a process that finds its kernels on disk does without.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir as llvm
from numba.core import cgutils, sigutils, types
from numba.extending import lower_builtin, type_callable
from numba.np.arrayobj import populate_array

from . import atomics, bytesaddressed, declare

WORDS: Any = types.uint64[::1] if declare.BOUNDSCHECK else types.CPointer(types.uint64)
"""What ``words`` stands for in a signature: a bare pointer, which crosses a call in one register and is never counted;
an array, which knows its size, where bounds are checked."""

X86_64: bool = llvmlite.binding.get_process_triple().startswith("x86_64")
ORDER = "seq_cst"


def parse(signature: str) -> tuple[tuple[Any, ...], Any]:
    """Argument types and result of a signature, in which ``words`` is a block of 64-bit words."""
    return sigutils.normalize_signature(eval(signature, {"words": WORDS, **vars(types)}))


def lowers(function: Callable[..., Any], signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Say what a kernel's call of a plain function becomes: ``@lowers(msb, "u8(u8)")`` above an emitter of LLVM code.

    The emitter takes ``(context, builder, *values)``. Called from Python the function stays what it is.
    """
    args, result = parse(signature)

    def declare(emit: Callable[..., Any]) -> Callable[..., Any]:
        @type_callable(function)
        def typing(_context: Any) -> Callable[..., Any]:
            def typer(*_given: Any) -> Any:
                return result(*args)

            typer.__signature__ = inspect.signature(function)
            return typer

        @lower_builtin(function, *args)
        def lowering(context: Any, builder: Any, _sig: Any, values: Any) -> Any:
            return emit(context, builder, *values)

        return emit

    return declare


# ---------------------------------------------------------------------------------------------------- memory by address


@lowers(declare.open_words, "words(u8, u8)")
def _open_words(context, builder, handle, n):
    if isinstance(WORDS, types.CPointer):
        return builder.inttoptr(handle, context.get_value_type(WORDS))
    words = context.make_array(WORDS)(context, builder)
    itemsize = context.get_constant(types.intp, 8)
    data = builder.inttoptr(handle, words.data.type)
    populate_array(words, data=data, shape=[n], strides=[itemsize], itemsize=itemsize, meminfo=None)
    return words._getvalue()


def _pointer(context, builder, words, i):
    """Address of word i, which has to lie in the array when bounds are checked."""
    if isinstance(WORDS, types.CPointer):
        return builder.gep(words, [i])
    array = context.make_array(WORDS)(context, builder, words)
    check = context.enable_boundscheck
    return cgutils.get_item_pointer(context, builder, WORDS, array, [i], wraparound=False, boundscheck=check)


def _byte(builder, address):
    return builder.inttoptr(address, llvm.IntType(8).as_pointer())


@lowers(bytesaddressed.load_byte, "u8(u8)")
def _load_byte(context, builder, address):
    return builder.zext(builder.load(_byte(builder, address)), llvm.IntType(64))


@lowers(bytesaddressed.load_word, "u8(u8)")
def _load_word(context, builder, address):
    word = builder.load(builder.inttoptr(address, llvm.IntType(64).as_pointer()), align=1)
    return word if sys.byteorder == "little" else builder.bswap(word)


@lowers(bytesaddressed.store_byte, "void(u8, u8)")
def _store_byte(context, builder, address, value):
    builder.store(builder.trunc(value, llvm.IntType(8)), _byte(builder, address))
    return context.get_dummy_value()


# ---------------------------------------------------------------------------------------------------------------- bits


@lowers(declare.msb, "u8(u8)")
def _msb(context, builder, x):
    return builder.xor(builder.ctlz(x, cgutils.true_bit), x.type(63))


@lowers(declare.ctz, "u8(u8)")
def _ctz(context, builder, x):
    return builder.cttz(x, cgutils.true_bit)


@lowers(declare.popcount, "u8(u8)")
def _popcount(context, builder, x):
    return builder.ctpop(x)


@lowers(declare.umax, "u8(u8, u8)")
def _umax(context, builder, a, b):
    return builder.select(builder.icmp_unsigned(">", a, b), a, b)


@lowers(declare.umin, "u8(u8, u8)")
def _umin(context, builder, a, b):
    return builder.select(builder.icmp_unsigned("<", a, b), a, b)


# -------------------------------------------------------------------------------------------------------------- atomics


@lowers(atomics.fetch_or, "u8(words, u8, u8)")
def _fetch_or(context, builder, m, i, value):
    return builder.atomic_rmw("or", _pointer(context, builder, m, i), value, ORDER)


@lowers(atomics.fetch_and, "u8(words, u8, u8)")
def _fetch_and(context, builder, m, i, value):
    return builder.atomic_rmw("and", _pointer(context, builder, m, i), value, ORDER)


@lowers(atomics.fetch_add, "u8(words, u8, u8)")
def _fetch_add(context, builder, m, i, value):
    return builder.atomic_rmw("add", _pointer(context, builder, m, i), value, ORDER)


@lowers(atomics.exchange, "u8(words, u8, u8)")
def _exchange(context, builder, m, i, value):
    return builder.atomic_rmw("xchg", _pointer(context, builder, m, i), value, ORDER)


@lowers(atomics.compare_exchange, "u8(words, u8, u8, u8)")
def _compare_exchange(context, builder, m, i, old, new):
    return builder.extract_value(builder.cmpxchg(_pointer(context, builder, m, i), old, new, ORDER, ORDER), 0)


@lowers(atomics.test_and_set_bit, "u8(words, u8, u8)")
def _test_and_set_bit(context, builder, m, i, bit):
    return _bit_operation("bts", builder, _pointer(context, builder, m, i), bit)


@lowers(atomics.test_and_clear_bit, "u8(words, u8, u8)")
def _test_and_clear_bit(context, builder, m, i, bit):
    return _bit_operation("btr", builder, _pointer(context, builder, m, i), bit)


@lowers(atomics.load_acquire, "u8(words, u8)")
def _load_acquire(context, builder, m, i):
    return builder.load_atomic(_pointer(context, builder, m, i), "acquire", 8, typ=llvm.IntType(64))


@lowers(atomics.store_release, "void(words, u8, u8)")
def _store_release(context, builder, m, i, value):
    builder.store_atomic(value, _pointer(context, builder, m, i), "release", 8)
    return context.get_dummy_value()


@lowers(atomics.prefetch, "void(words, u8)")
def _prefetch(context, builder, m, i):
    if isinstance(WORDS, types.CPointer):
        i32 = llvm.IntType(32)
        line = builder.bitcast(builder.gep(m, [i]), llvm.IntType(8).as_pointer())
        kind = llvm.FunctionType(llvm.VoidType(), [line.type, i32, i32, i32])
        intrinsic = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(intrinsic, [line, i32(0), i32(3), i32(1)])
    return context.get_dummy_value()


@lowers(atomics.fence_after_atomic, "void()")
def _fence_after_atomic(context, builder):
    if X86_64:
        builder.asm(llvm.FunctionType(llvm.VoidType(), []), "", "~{memory}", [], side_effect=True)
    else:
        builder.fence(ORDER)
    return context.get_dummy_value()


@lowers(atomics.fence, "void()")
def _fence(context, builder):
    builder.fence(ORDER)
    return context.get_dummy_value()


def _bit_operation(operation, builder, pointer, bit):
    """One locked bts or btr on x86-64. LLVM itself would make a loop of it, once the old bit is used as a number."""
    word = bit.type
    bit = builder.and_(bit, word(63))
    if X86_64:
        kind = llvm.FunctionType(word, [pointer.type, word])
        code, effects = f"lock {operation}q $2, ($1)", "~{memory},~{flags},~{dirflag},~{fpsr}"
        return builder.asm(kind, code, "={@ccc},r,Jr," + effects, [pointer, bit], side_effect=True)
    mask = builder.shl(word(1), bit)
    if operation == "bts":
        old = builder.atomic_rmw("or", pointer, mask, ORDER)
    else:
        old = builder.atomic_rmw("and", pointer, builder.not_(mask), ORDER)
    return builder.and_(builder.lshr(old, bit), word(1))
