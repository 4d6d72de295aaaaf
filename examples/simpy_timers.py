"""Two vCPUs in SimPy: one ticks, reads a device and wakes the other, which sleeps; what it all took."""

import fastexit as fx
from fastexit.adapters.simpy import Simulation

RESCHEDULE, TICK, DEVICE, PIN = 0xFD, 0xEC, 0x41, 17
IOAPIC = 0xFEC0_0000


def boots(cpu):
    for index, value in ((0x11 + 2 * PIN, 1 << 24), (0x10 + 2 * PIN, 0x8000 | DEVICE)):  # level, for vCPU 1
        yield from cpu.mem_write(IOAPIC, index)
        yield from cpu.mem_write(IOAPIC + 0x10, value)
    yield from cpu.set_timer(us=500, vector=TICK, periodic=True)
    while cpu.sim.env.now < 10_000_000:
        yield from cpu.compute(100_000)
    yield from cpu.stop_timer()
    yield from cpu.ipi(dest=1, vector=RESCHEDULE)  # the last one ends the sleeper


def tick(cpu, vector):
    yield from cpu.ipi(dest=1, vector=RESCHEDULE)


def sleeps(cpu):
    while cpu.sim.env.now < 10_000_000:
        yield from cpu.halt()


def serve(cpu, vector):
    yield from cpu.compute(2_000)
    device.down()  # what the driver's access to it does


def arrives(sim):
    while sim.env.now < 9_000_000:
        yield sim.env.timeout(sim.random.expovariate(1 / 700_000))
        device.up()


sim = Simulation(fx.Machine(vcpus=2, kernel="6.18", costs="skylake-retpoline"), jitter=0.1, seed=1)
device = sim.line(PIN)
sim.cpus[0].start(boots, {TICK: tick})
sim.cpus[1].start(sleeps, {RESCHEDULE: lambda cpu, vector: cpu.compute(800), DEVICE: serve})
sim.env.process(arrives(sim))
sim.run()
print(sim.stats())
