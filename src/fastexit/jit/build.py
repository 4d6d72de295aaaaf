"""The compilation itself: kernels become one LLVM module, which is optimised once.

numba compiles a function alone, into a module of its own, optimised before it is linked and again afterwards. Where
bounds are checked, kernels can raise; calls then hand errors on as numba's do.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import llvmlite.binding as ll
import numba
from numba.core import cgutils, types
from numba.core.codegen import JITCodeLibrary
from numba.core.imputils import lower_constant
from numba.core.registry import cpu_target
from numba.extending import models, register_model, typeof_impl

from . import declare, door
from .cache import Code
from .load import PYTHON_API
from .stages import Made, compile_into
from .target import Memory, new_target

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


class Build:
    """One compilation: every kernel that is added becomes a function of the same library."""

    def __init__(self) -> None:
        self.made: dict[Kernel, Made] = {}
        self._collecting = gc.isenabled()
        self._memory = Memory()

    def __enter__(self) -> Build:
        """No garbage collection, which would walk numba's graphs again and again."""
        gc.disable()
        try:
            self._target = new_target()
            self._library = _Library("fastexit")
            self._memory.__enter__()
        except BaseException:
            self._collect()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self._memory.close()
        for declared in self.made:
            cpu_target.target_context.remove_user_function(declared.function)
        self._collect()

    def _collect(self) -> None:
        if self._collecting:
            gc.enable()

    def add(self, declared: Kernel) -> None:
        """Put a kernel into the library. What it calls is added on the way, when its calls are typed."""
        made = compile_into(self._library, self._target, declared.python, declared.signature)
        self._teach(declared.function, made.descriptor)
        self.made[declared] = made

    def _teach(self, function: Any, descriptor: Any) -> None:
        """Say what a call of a compiled kernel becomes in others: no error comes back, unless bounds are checked."""
        if declare.BOUNDSCHECK:
            cpu_target.target_context.insert_user_function(function, descriptor)
            return
        kernel = self._library.shared.get_global(descriptor.llvm_func_name)

        def call(_context: Any, builder: Any, _sig: Any, args: Any, loc: Any = None) -> Any:
            return builder.call(kernel, args)

        call.signature, call.libs = descriptor.argtypes, ()
        cpu_target.target_context._defns[function].append(call, call.signature)

    def finish(self, entries: dict[str, Kernel]) -> Code:
        """The machine code; what is no entry is private to the library, so that LLVM may inline it away."""
        module = self._library.shared
        exported = set(entries.values())
        for declared, made in self.made.items():
            if declared in exported:
                self._export(made, declared.nogil)
            else:
                function = module.get_global(made.descriptor.llvm_func_name)
                function.linkage = "internal"
                if declared.function.inline:
                    function.attributes.add("alwaysinline")
                if declared.function.apart:
                    function.attributes.add("noinline")
                    function.attributes.add("cold")
        symbols = {name: _symbols(self.made[declared]) for name, declared in entries.items()}
        return Code(_machine_code(cpu_target.target_context.codegen()._tm, self._library.optimized()), symbols)

    def _export(self, made: Made, nogil: bool) -> None:
        """Add what Python and C call."""
        module, (python, c) = self._library.shared, _symbols(made)
        kernel = module.get_global(made.descriptor.llvm_func_name)
        door.emit_c(module, c, kernel, declare.BOUNDSCHECK)
        door.emit_python(module, python, kernel, declare.BOUNDSCHECK, nogil)


def _symbols(made: Made) -> tuple[str, str]:
    """What Python calls, and C."""
    name = made.descriptor.llvm_func_name
    return f"{name}.python", f"{name}.c"


def _machine_code(machine: Any, module: Any) -> bytes:
    """An object file; a test asks for text instead."""
    return machine.emit_object(module)


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
