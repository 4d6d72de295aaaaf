"""The tracepoints of a lab's kernel: what each change of a VM printed, brought along with its answer.

Models: nothing. The lab's tracefs is its own, so the root instance is used.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fastexit.kvm.lab.device import LabDevice
from fastexit.kvm.tracefs import EVENTS, TraceLost, TraceUnavailable, lines_of_interest

ROOT = "/tracing"
BUFFER_KIB = 16_384
_LOST = re.compile(r"CPU:\d+ \[LOST (?:(\d+) )?EVENTS\]")


class LabTrace:
    """Tracepoints of the lab's kernel while this is open; a context manager. `of` gives what one machine sees.

    All events that KVM has are on; ``events`` are those of EVENTS among them.
    """

    def __init__(self, device: LabDevice) -> None:
        self._device = device
        self.events: tuple[str, ...] = tuple(
            name for name in EVENTS if device.exists(Path(f"{ROOT}/events/kvm/{name}"))
        )
        if not self.events:
            raise TraceUnavailable(0, f"{device.name}: no KVM tracepoints")
        for name, value in (
            ("trace_clock", "counter"),
            ("trace_options", "nocontext-info"),
            ("buffer_size_kb", BUFFER_KIB),
            ("set_event_pid", 1),
            ("events/kvm/enable", 1),
        ):
            self._write(name, value)
        device.pipe = device.open(f"{ROOT}/trace_pipe", os.O_RDONLY | os.O_NONBLOCK)

    def _write(self, name: str, value: str | int) -> None:
        fd = self._device.open(f"{ROOT}/{name}", os.O_WRONLY)
        try:
            self._device.write(fd, str(value).encode())
        finally:
            self._device.close(fd)

    def of(self, machine: Any) -> MachineTrace:
        """What a machine's own changes print."""
        return MachineTrace(self._device, machine.fd, self.events)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Switches events off; twice does no harm."""
        if self._device.pipe is not None and not self._device.wire.closed:
            self._write("events/kvm/enable", 0)
            self._device.close(self._device.pipe)
        self._device.pipe = None


class MachineTrace:
    """Lines of one machine, with the face of `fastexit.kvm.KernelTrace` as far as twins need it."""

    def __init__(self, device: LabDevice, vm: int, events: tuple[str, ...]) -> None:
        self.events = events
        self._vm = device.trace(vm)

    def clear(self) -> None:
        """Forgets what was not read yet."""
        self._vm.lines = []

    def read(self) -> list[str]:
        """``event: payload`` of ``events`` since the last read; TraceLost when lines are missing."""
        return lines_of_interest(self.read_all(), self.events)

    def read_all(self) -> list[str]:
        """As `read`, of every event."""
        lines, self._vm.lines = self._vm.lines or [], []
        for line in lines:
            if line.startswith("CPU:") and (lost := _LOST.fullmatch(line)):
                raise TraceLost(f"lost {lost[1] or 'some'} events")
        return lines
