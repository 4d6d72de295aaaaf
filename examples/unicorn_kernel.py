"""A multiboot kernel on Unicorn: a serial port, fw_cfg and an exit port besides fastexit's APICs, IOAPIC, PICs and PIT.

    python examples/unicorn_kernel.py smptest.flat 4    # of kvm-unit-tests; its exit code is this one's

Its output is this one's. Exit code 2 for what cannot be run, 3 for a guest that does not come to an end.
"""

import sys
from pathlib import Path

import fastexit as fx
from fastexit.adapters.kvmhost import Memory, multiboot
from fastexit.adapters.kvmhost.firmware import FwCfg, configuration
from fastexit.adapters.kvmhost.ports import Ports
from fastexit.adapters.kvmhost.serial import Serial
from fastexit.adapters.kvmhost.testdevice import LineDevice
from fastexit.adapters.unicorn import Devices, UnicornHost

MEMORY, EXIT, LIMIT = 64 << 20, 0xF4, 2_000_000_000


class Board(Devices):
    """What is at the ports where the machine has nothing."""

    code = None

    def __init__(self, machine, memory):
        self.ports = Ports()
        self.ports.add(FwCfg(configuration(memory, len(machine.vcpus))), 0x510, 2)
        self.ports.add(Serial(self.show, lambda level: machine.irq_line(4, level)), 0x3F8, 8)
        LineDevice(machine.irq_line).connect(self.ports)

    def show(self, data):
        print(data.decode("latin-1"), end="", flush=True)

    def port_read(self, cpu, port, size):
        return self.ports.read(port, size)

    def port_write(self, cpu, port, value, size):
        if port == EXIT:
            self.code = value
        self.ports.write(port, size, value)
        cpu.host.poke()  # whomever a line has reached


def main(image, vcpus="2", *, kernel="6.18", **options):
    machine = fx.Machine(vcpus=int(vcpus), kernel=kernel, dispatcher="compiled", **options)
    machine.create_pit()
    memory = Memory(MEMORY)
    begin = multiboot.load(Path(image).read_bytes(), memory, Path(image).name)
    board = Board(machine, memory)
    host = UnicornHost(machine, MEMORY, devices=board)
    host.load(0, memory.read(0, MEMORY))
    host.cpus[0].start(begin.rip, bits=32)
    host.cpus[0]["rax"], host.cpus[0]["rbx"] = begin.rax, begin.rbx
    host.run(lambda host: board.code is not None, instructions=LIMIT)
    return 3 if board.code is None else board.code


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except (OSError, TypeError, ValueError, ImportError) as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        sys.exit(2)
