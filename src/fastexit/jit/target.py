"""What kernels are compiled for: numba's CPU target, with a convention for calls of its own, and answers remembered."""

from __future__ import annotations

from contextlib import ExitStack
from copy import copy
from typing import Any

import numpy as np
from llvmlite import ir as llvm
from numba.core import compiler, types
from numba.core.callconv import CPUCallConv, create_error_model
from numba.core.cpu import CPUContext
from numba.core.registry import cpu_target
from numba.core.targetconfig import ConfigStack

from . import declare


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


class _Target(CPUContext):
    """numba's target as it is when a compilation begins. Where bounds are checked, kernels may raise as numba's do."""

    implementations: dict[tuple[Any, Any], Any]

    @property
    def call_conv(self) -> Any:
        return CPUCallConv(self) if declare.BOUNDSCHECK else _Direct(self)

    def refresh(self) -> None:
        """Nothing new is registered while kernels are compiled."""

    def get_function(self, fn: Any, sig: Any, _firstcall: bool = True) -> Any:
        """numba looks at the signature of what it finds, each time anew."""
        key = fn, sig
        if key not in self.implementations:
            self.implementations[key] = super().get_function(fn, sig, False)
        return self.implementations[key]


def new_target() -> Any:
    """A target for one compilation."""
    numbas = cpu_target.target_context
    numbas.refresh()  # imports much of numba
    target = copy(numbas)
    target.__class__ = _Target
    target.cached_internal_func = {}
    target.implementations = {}
    target.enable_boundscheck = declare.BOUNDSCHECK
    target.error_model = create_error_model("numpy", target)
    return target


class Memory(ExitStack):
    """While kernels are compiled, the typing context remembers what an operator or a constant is."""

    def __enter__(self) -> Memory:
        super().__enter__()
        context = cpu_target.typing_context
        operators: dict[tuple[Any, ...], Any] = {}
        values: dict[tuple[type, Any], Any] = {}
        resolve, type_of = context.resolve_function_type, context.resolve_value_type

        def function_type(function: Any, args: Any, keywords: Any) -> Any:
            if keywords:
                return resolve(function, args, keywords)
            key = function, tuple(args)
            if key not in operators:
                operators[key] = resolve(function, args, keywords)
            return operators[key]

        def value_type(value: Any) -> Any:
            kind = type(value)
            if kind is np.uint64:
                return types.uint64
            if kind is np.ndarray:
                return type_of(value)
            if (kind, value) not in values:
                values[kind, value] = type_of(value)
            return values[kind, value]

        self._replace(context, "resolve_function_type", function_type)
        self._replace(context, "resolve_value_type", value_type)
        self._replace(context, "refresh", lambda: None)
        flags = compiler.Flags()
        cpu_target.options.parse_as_flags(flags, {"nopython": True, "error_model": "numpy"})
        flags.enable_ssa = flags.debuginfo = False
        flags.boundscheck = declare.BOUNDSCHECK
        self.enter_context(ConfigStack().enter(flags))
        return self

    def _replace(self, context: Any, name: str, function: Any) -> None:
        setattr(context, name, function)
        self.callback(delattr, context, name)
