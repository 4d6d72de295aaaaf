"""The stages of a kernel's way from Python's bytecode to LLVM's instructions, each of them numba's, or in its place.

numba has 27 passes, most of them for arrays, closures, exceptions and objects. Kernels compute with unsigned integers
and call each other by declared signatures: bytecode is translated, names are folded, types inferred, instructions
lowered.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numba.core import bytecode, cgutils, ir, types, typing
from numba.core.funcdesc import PythonFunctionDescriptor
from numba.core.interpreter import Interpreter
from numba.core.lowering import Lower
from numba.core.registry import cpu_target
from numba.core.typeinfer import TypeInferer

from .emit import parse


class Made(NamedTuple):
    """A kernel that was compiled: numba's descriptor of it, and its signature."""

    descriptor: Any
    signature: Any


def compile_into(library: Any, target: Any, function: Callable[..., Any], signature: str) -> Made:
    """Put a kernel into a library."""
    args, result = parse(signature)
    identity = bytecode.FunctionIdentity.from_function(function)
    code = _Interpreter(identity).interpret(bytecode.ByteCode(identity))
    _fold(code)
    kinds, calls = _infer(code, target, args, result)
    descriptor = PythonFunctionDescriptor.from_specialized_function(
        code, kinds, result, calls, mangler=_name, inline=False, noalias=False, abi_tags=()
    )
    with target.push_code_library(library):
        _Lower(target, library, descriptor, code).lower()
    return Made(descriptor, typing.signature(result, *args))


def _name(name: str, _args: Any, *, abi_tags: Any = (), uid: int | None = None) -> str:
    """A symbol that is short, for there are thousands of them; ``uid`` tells functions of one name apart."""
    return f"{name}.{uid}"


class _Interpreter(Interpreter):
    """numba's translation of bytecode, without its search for ``with``, ``try``, dictionaries and argument lists."""

    def post_process(self, _peepholes: Any, func_ir: Any) -> Any:
        return func_ir


class _Quiet:
    """In the place of what looks for warnings at each step of type inference."""

    def catch_warnings(self, **_place: Any) -> Any:
        return nullcontext()


def _infer(code: Any, target: Any, args: Any, result: Any) -> tuple[Any, Any]:
    """Types of variables, and signatures of calls and operators. Kernels that are called are compiled on the way."""
    context = cpu_target.typing_context
    inferer = TypeInferer(context, code, _Quiet())
    with context.callstack.register(target.target, inferer, code.func_id, args):
        for index, (name, kind) in enumerate(zip(code.arg_names, args, strict=True)):
            inferer.seed_argument(name, index, kind)
        inferer.seed_return(result)
        inferer.build_constraint()
        inferer.propagate(raise_errors=True)
        kinds, _, calls = inferer.unify(raise_errors=True)
    if any(isinstance(kind, types.Float) for kind in kinds.values()):
        name = f"{code.func_id.modname.rpartition('.')[2]}.{code.func_id.func_qualname}"
        raise TypeError(f"kernel {name} computes with floats: uint64 and a signed integer were mixed")
    return kinds, calls


# -------------------------------------------------------------------------------------------------------- constants


def _fold(code: Any) -> None:
    """Names of modules, constants and expressions of them become values; what nobody uses then is dropped."""
    code.generator_info = None
    assigned: Counter[str] = Counter()
    homes: dict[str, int] = {}
    abroad: set[str] = set()
    for label, block in code.blocks.items():
        used = _fold_block(block)
        for inst in block.body:
            if isinstance(inst, ir.Assign):
                assigned[inst.target.name] += 1
                homes[inst.target.name] = label
        block.used = used
    for label, block in code.blocks.items():
        abroad.update(name for name in block.used if homes.get(name) != label)
    code.stays = {name for name, times in assigned.items() if times == 1 and name[0] == "$"} - abroad


def _fold_block(block: ir.Block) -> set[str]:
    """The block without names; the variables that it reads."""
    known: dict[str, Any] = {}
    for inst in block.body:
        if isinstance(inst, ir.Assign) and inst.target.name[0] == "$":
            found = _value(inst.value, known)
            if found is not None:
                known[inst.target.name] = found
                if isinstance(inst.value, ir.Expr):
                    inst.value = ir.Global("value", found, inst.loc)
    used: set[str] = set()
    kept = []
    for inst in reversed(block.body):
        if isinstance(inst, ir.Assign):
            if inst.target.name in known and inst.target.name not in used:
                continue
            _note(inst.value, used)
        else:
            used.update(variable.name for variable in inst.list_vars())
        kept.append(inst)
    block.body = kept[::-1]
    return used


def _note(value: Any, used: set[str]) -> None:
    """Collect the variables of an expression."""
    if isinstance(value, ir.Var):
        used.add(value.name)
    elif isinstance(value, ir.Expr):
        for part in value._kws.values():
            for inner in part if isinstance(part, list | tuple) else (part,):
                _note(inner, used)


def _value(node: Any, known: dict[str, Any]) -> Any:
    """What is known at compile time, or None."""
    if isinstance(node, ir.Global | ir.FreeVar | ir.Const):
        return node.value
    if not isinstance(node, ir.Expr):
        return None
    if node.op == "getattr":
        owner = known.get(node.value.name)
        return getattr(owner, node.attr) if isinstance(owner, ModuleType) else None
    if node.op == "call" and known.get(node.func.name) is np.uint64 and len(node.args) == 1:
        number = known.get(node.args[0].name)
        return np.uint64(number) if isinstance(number, int | np.uint64) and number >= 0 else None
    if node.op == "binop" and node.fn in (operator.or_, operator.and_):
        sides = known.get(node.lhs.name), known.get(node.rhs.name)
        return node.fn(*sides) if all(type(side) is np.uint64 for side in sides) else None
    if node.op == "unary" and node.fn is operator.invert:
        number = known.get(node.value.name)
        return ~number if type(number) is np.uint64 else None
    return None


# ----------------------------------------------------------------------------------------------------- instructions


class _Lower(Lower):
    """numba's lowering without debug information, reference counts and operators that have static operands."""

    def emit_environment_object(self) -> None:
        """Kernels have no need of Python's globals."""

    def _find_singly_assigned_variable(self) -> None:
        self._singly_assigned_vars = self.func_ir.stays
        self._blk_local_varmap = {}

    def pre_block(self, block: ir.Block) -> None:
        self._cur_ir_block = block

    def lower_block(self, block: ir.Block) -> None:
        self.pre_block(block)
        for inst in block.body:
            self.loc = inst.loc
            if isinstance(inst, ir.Assign):
                name = inst.target.name
                self.storevar(self.lower_assign(self.typeof(name), inst), name)
            else:
                self.lower_inst(inst)
        self.post_block(block)

    def storevar(self, value: Any, name: str, argidx: int | None = None) -> None:
        if name in self._singly_assigned_vars:
            self._blk_local_varmap[name] = value
        else:
            self.builder.store(value, self.getvar(name))

    def alloca_lltype(self, name: str, lltype: Any, datamodel: Any = None) -> Any:
        return cgutils.alloca_once(self.builder, lltype, name=name)

    def incref(self, typ: Any, val: Any) -> None:
        """Arrays, which there are where bounds are checked, lie in memory that nobody counts."""

    decref = incref

    def lower_binop(self, resty: Any, expr: ir.Expr, op: Any) -> Any:
        context, signature = self.context, self.fndesc.calltypes[expr]
        sides = [
            context.cast(self.builder, self.loadvar(side.name), self.typeof(side.name), kind)
            for side, kind in zip((expr.lhs, expr.rhs), signature.args, strict=True)
        ]
        implementation = context.get_function(context.typing_context.resolve_value_type(op), signature)
        return context.cast(self.builder, implementation(self.builder, sides), signature.return_type, resty)
