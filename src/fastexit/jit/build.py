"""The compilation itself: numba's stages that a kernel needs, each once, into one LLVM module, which is optimised once.

numba compiles a function alone: 27 passes, most of them for arrays, closures, exceptions and objects, then a module
of its own, optimised before it is linked and again afterwards. Kernels compute with unsigned integers, call each other
by declared signatures and raise nothing, so six stages are enough. Where bounds are checked, kernels can raise; calls
then hand errors on as numba's do.
"""

from __future__ import annotations

import gc
import operator
from collections import Counter
from copy import copy
from types import ModuleType
from typing import TYPE_CHECKING, Any

import llvmlite.binding as ll
import numba
import numpy as np
from llvmlite import ir as llvm
from numba.core import cgutils, compiler, ir, typed_passes, types, untyped_passes
from numba.core.callconv import CPUCallConv
from numba.core.codegen import JITCodeLibrary
from numba.core.cpu import CPUContext
from numba.core.imputils import lower_constant
from numba.core.lowering import Lower
from numba.core.registry import cpu_target
from numba.core.targetconfig import ConfigStack
from numba.extending import models, register_model, typeof_impl

from . import declare, door
from .cache import Code
from .emit import parse
from .load import PYTHON_API

if TYPE_CHECKING:
    from .declare import Kernel

ll.initialize_native_asmparser()  # for inline assembly

OUTSIDE = {*PYTHON_API, "memcpy", "memmove", "memset"}
"""What machine code may call that is not its own."""
SPEED = min(2, int(numba.config.OPT))
"""LLVM's optimisation level. With 3 LLVM takes a third longer, and the code is no faster."""


class _Library(JITCodeLibrary):
    """Many kernels, which share one module from the start, on their way to an object file."""

    def __init__(self, name: str) -> None:
        super().__init__(cpu_target.target_context.codegen(), name)
        self.shared = super().create_ir_module(name)
        self._others: list[Any] = []

    def create_ir_module(self, name: str) -> Any:
        return self.shared

    def add_ir_module(self, module: Any) -> None:
        if module is not self.shared:
            self._others.append(module)

    def optimized(self) -> Any:
        """The whole, linked, and optimised once: numba's first, cheap round is there for reference counts."""
        whole = self._final_module
        for module in self.shared, *self._others:
            code = ll.parse_assembly(cgutils.normalize_ir_text(str(module)))
            code.data_layout = self._codegen._data_layout
            code.verify()
            whole.link_in(code)
        tuning = ll.create_pipeline_tuning_options(speed_level=SPEED)
        tuning.loop_vectorization = tuning.slp_vectorization = False
        builder = ll.create_pass_builder(self._codegen._tm, tuning)
        builder.getModulePassManager().run(whole, builder)
        missing = [f.name for f in whole.functions if f.is_declaration and not f.name.startswith("llvm.")]
        if not OUTSIDE.issuperset(missing):
            raise TypeError(f"kernels call what no process has: {', '.join(sorted({*missing} - OUTSIDE))}")
        return whole


class _Direct(CPUCallConv):
    """A kernel takes words and returns one, all in registers.

    numba's own functions return a status, and their result by way of memory, since they may raise.
    """

    def get_function_type(self, restype: Any, argtypes: Any) -> llvm.FunctionType:
        result = self.context.data_model_manager[restype].get_return_type()
        return llvm.FunctionType(result, list(self._get_arg_packer(argtypes).argument_types))

    def decorate_function(self, fn: Any, args: Any, fe_argtypes: Any, noalias: bool = False) -> None:
        self._get_arg_packer(fe_argtypes).assign_names(fn.args, [f"arg.{name}" for name in args])

    def get_arguments(self, func: Any) -> Any:
        return func.args

    def return_value(self, builder: Any, retval: Any) -> None:
        builder.ret(retval)

    def return_user_exc(self, builder: Any, *_error: Any, **_more: Any) -> None:
        """What numba's ``range`` has for a step of 0, which LLVM sees to be none."""
        trap = builder.module.declare_intrinsic("llvm.trap", (), llvm.FunctionType(llvm.VoidType(), []))
        builder.call(trap, [])
        builder.unreachable()

    def call_function(self, *_call: Any) -> Any:
        raise TypeError("kernels call kernels, and nothing of numba's that may raise")


class _Context(CPUContext):
    """numba's, where kernels are called by a convention of their own."""

    @property
    def call_conv(self) -> Any:
        return _Direct(self)


def _target() -> Any:
    """What kernels are compiled for: numba's own target, whose functions may raise, where bounds are checked."""
    if declare.BOUNDSCHECK:
        return cpu_target.target_context
    context = copy(cpu_target.target_context)
    context.__class__ = _Context
    context.cached_internal_func = {}
    return context


class Build:
    """One compilation: every kernel that is added becomes a function of the same library."""

    def __init__(self) -> None:
        self.made: dict[Kernel, Any] = {}
        self._library = _Library("fastexit")
        self._target = _target()
        self._collecting = gc.isenabled()

    def __enter__(self) -> Build:
        """No garbage collection, which would walk numba's graphs again and again; each operator is resolved once."""
        context = cpu_target.typing_context
        resolve = context.resolve_function_type
        known: dict[tuple, Any] = {}

        def remember(function: Any, args: Any, keywords: Any) -> Any:
            if keywords:
                return resolve(function, args, keywords)
            key = function, tuple(args)
            if key not in known:
                known[key] = resolve(function, args, keywords)
            return known[key]

        gc.disable()
        try:
            context.refresh()  # imports much of numba
        except BaseException:
            self._collect()
            raise
        context.resolve_function_type = remember
        return self

    def __exit__(self, *_error: object) -> None:
        del cpu_target.typing_context.resolve_function_type
        for declared in self.made:
            cpu_target.target_context.remove_user_function(declared.function)
        self._collect()

    def _collect(self) -> None:
        if self._collecting:
            gc.enable()

    def add(self, declared: Kernel) -> None:
        """Put a kernel into the library. What it calls is added on the way, when its calls are typed."""
        args, result = parse(declared.signature)
        flags = compiler.Flags()
        cpu_target.options.parse_as_flags(flags, {"nopython": True, "error_model": "numpy"})
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        flags.enable_ssa = flags.debuginfo = False
        flags.boundscheck = declare.BOUNDSCHECK
        contexts = cpu_target.typing_context, self._target
        made = compiler.compile_extra(
            *contexts, declared.python, args, result, flags, {}, library=self._library, pipeline_class=_Stages
        )
        if any(isinstance(kind, types.Float) for kind in made.fndesc.typemap.values()):
            raise TypeError(f"kernel {declared.name} computes with floats: uint64 and a signed integer were mixed")
        _teach(declared.function, made)
        self.made[declared] = made

    def finish(self, entries: dict[str, Kernel]) -> Code:
        """The machine code; what is no entry is private to the library, so that LLVM may inline it away."""
        module = self._library.shared
        exported = set(entries.values())
        for declared, made in self.made.items():
            if declared in exported:
                self._export(made, declared.nogil)
            else:
                function = module.get_global(made.fndesc.llvm_func_name)
                function.linkage = module.get_global(made.environment.env_name).linkage = "internal"
                if declared.function.inline:
                    function.attributes.add("alwaysinline")
                if declared.function.apart:
                    function.attributes.add("noinline")
                    function.attributes.add("cold")
        faces = {name: self.made[declared].fndesc for name, declared in entries.items()}
        symbols = {name: (face.llvm_cpython_wrapper_name, face.llvm_cfunc_wrapper_name) for name, face in faces.items()}
        return Code(_machine_code(cpu_target.target_context.codegen()._tm, self._library.optimized()), symbols)

    def _export(self, made: Any, nogil: bool) -> None:
        """Add what Python and C call."""
        face, module = made.fndesc, self._library.shared
        kernel = module.get_global(face.llvm_func_name)
        door.emit_c(module, face.llvm_cfunc_wrapper_name, kernel, declare.BOUNDSCHECK)
        door.emit_python(module, face.llvm_cpython_wrapper_name, kernel, declare.BOUNDSCHECK, nogil)


def _machine_code(machine: Any, module: Any) -> bytes:
    """An object file; a test asks for text instead."""
    return machine.emit_object(module)


def _teach(function: Any, made: Any) -> None:
    """What a call of a compiled kernel becomes in others: no error comes back, unless bounds are checked."""
    descriptor = made.fndesc
    if declare.BOUNDSCHECK:
        cpu_target.target_context.insert_user_function(function, descriptor)
        return

    def call(context: Any, builder: Any, _sig: Any, args: Any) -> Any:
        _, result = door.call(builder, context.declare_function(builder.module, descriptor), args)
        return result

    call.signature, call.libs = descriptor.argtypes, ()
    cpu_target.target_context._defns[function].append(call, call.signature)


class _Callee(types.Callable):
    """The type of a kernel in another one: it has the declared signature, whatever the arguments."""

    def __init__(self, callee: declare.Callee) -> None:
        self.callee = callee
        super().__init__(f"kernel({id(callee):#x})")

    def get_call_type(self, _context: Any, args: Any, keywords: Any) -> Any:
        signature = declare.called(self.callee)
        if keywords or len(args) != len(signature.args):
            raise numba.errors.TypingError(f"kernel {self.callee.__name__} takes {len(signature.args)} arguments")
        return signature

    def get_call_signatures(self) -> tuple:
        return (), False

    def get_impl_key(self, _signature: Any) -> Any:
        return self.callee


@typeof_impl.register(declare.Callee)
def _type_of_callee(callee: declare.Callee, _context: Any) -> _Callee:
    return _Callee(callee)


register_model(_Callee)(models.OpaqueModel)


@lower_constant(_Callee)
def _no_value(context: Any, _builder: Any, _kind: Any, _value: Any) -> Any:
    return context.get_dummy_value()


# --------------------------------------------------------------------------------------------------------------- stages
class _Stages(compiler.CompilerBase):
    def _compile_core(self) -> Any:
        self.state.type_annotation = None
        with ConfigStack().enter(self.state.flags.copy()):
            for stage in _STAGES:
                stage.run_pass(self.state)
        return self.state.cr


class _Fold:
    """Names of modules, constants and expressions of them become values; what nobody uses then is dropped."""

    def run_pass(self, state: Any) -> None:
        code = state.func_ir
        code.generator_info = None
        assigned: Counter[str] = Counter()
        homes: dict[str, int] = {}
        abroad: set[str] = set()
        for label, block in code.blocks.items():
            used = self._fold(block)
            for inst in block.body:
                if isinstance(inst, ir.Assign):
                    assigned[inst.target.name] += 1
                    homes[inst.target.name] = label
            block.used = used
        for label, block in code.blocks.items():
            abroad.update(name for name in block.used if homes.get(name) != label)
        code.stays = {name for name, times in assigned.items() if times == 1 and name[0] == "$"} - abroad

    def _fold(self, block: ir.Block) -> set[str]:
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


class _Lower(Lower):
    """numba's lowering without debug information, reference counts and operators that have static operands."""

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


class _Lowering(typed_passes.NativeLowering):
    lowering_class = _Lower


_STAGES = (
    untyped_passes.TranslateByteCode(),
    untyped_passes.FixupArgs(),
    _Fold(),
    typed_passes.NopythonTypeInference(),
    _Lowering(),
    typed_passes.NoPythonBackend(),
)
