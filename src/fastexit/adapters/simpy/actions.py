"""What a guest does, as something that has to be run: an action that was made and dropped is told from one that ran.

Forgetting ``yield from`` is the mistake that everybody makes once, and Python lets it pass without a word.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Generator
from functools import wraps
from types import FrameType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

if TYPE_CHECKING:
    from fastexit.adapters.simpy.interrupts import Interruptible

Guest = Generator[Any, Any, Any]
_Cpu = TypeVar("_Cpu", bound="Interruptible")
_P = ParamSpec("_P")


class GuestError(RuntimeError):
    """A guest has made a mistake that a simulation with ``strict`` does not let pass."""


class Action(Generator[Any, Any, Any]):
    """One act of a guest, such as ``cpu.ipi(...)``, to be run with ``yield from``."""

    __slots__ = ("_begun", "_cpu", "_line", "_name", "_path", "_work")

    def __init__(self, cpu: Interruptible, name: str, work: Guest, frame: FrameType) -> None:
        self._cpu = cpu
        self._name = name
        self._work = work
        self._path: str = frame.f_code.co_filename
        self._line: int = frame.f_lineno
        self._begun: bool = False

    def __iter__(self) -> Guest:
        """The generator itself, which ``yield from`` runs at full speed."""
        self._begin()
        return self._work

    def _begin(self) -> None:
        self._begun = True
        self._cpu.check()

    def send(self, value: Any) -> Any:
        """Generator.send, for whoever makes a process of it."""
        self._begin()
        return self._work.send(value)

    def throw(self, *error: Any) -> Any:
        """Generator.throw."""
        self._begun = True
        return self._work.throw(*error)

    @property
    def gi_frame(self) -> FrameType | None:
        """Of the generator: SimPy shows it in its errors."""
        return getattr(self._work, "gi_frame", None)

    @property
    def callbacks(self) -> Any:
        """What SimPy asks an event for that a guest has yielded: this is none, and ``from`` is missing."""
        self._begun = True
        raise GuestError(
            f"vCPU {self._cpu.index}: cpu.{self._name}(...) is no event to wait for: "
            f"yield from cpu.{self._name}(...); {self._where()}"
        )

    def __repr__(self) -> str:
        return f"<cpu.{self._name}(...) of vCPU {self._cpu.index}, to be run with yield from: {self._where()}>"

    def _where(self) -> str:
        source = linecache.getline(self._path, self._line).strip()
        return f"{self._path}:{self._line}" + (f": {source}" if source else "")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name} of what has not run: out = yield from cpu.{self._name}(...); {self._where()}")

    def __del__(self) -> None:
        if not self._begun:
            self._cpu.forgotten = (
                f"vCPU {self._cpu.index}: cpu.{self._name}(...) was made and never run: "
                f"yield from cpu.{self._name}(...); {self._where()}"
            )


def action(act: Callable[Concatenate[_Cpu, _P], Guest]) -> Callable[Concatenate[_Cpu, _P], Guest]:
    """A method that a guest is to run with ``yield from``; with ``strict`` it gives an Action."""

    @wraps(act)
    def begin(cpu: _Cpu, /, *args: _P.args, **named: _P.kwargs) -> Guest:
        work = act(cpu, *args, **named)
        return Action(cpu, act.__name__, work, sys._getframe(1)) if cpu.sim.strict else work

    return begin
