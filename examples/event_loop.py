"""16 vCPUs in an event loop of one's own: a heap of events, IPIs round a ring, a timer on each vCPU. No SimPy."""

import heapq
from itertools import count

import fastexit as fx

IPI, TICK, END = 0xFD, 0xEC, 1_000_000
m = fx.Machine(vcpus=16, kernel="6.18", costs="skylake-retpoline")
m.boot_x2apic()
events, tie, taken = [], count(), []  # of (ns, tie, act, arguments); of (ns, vCPU, vector)


def at(ns, act, *args):
    heapq.heappush(events, (ns, next(tie), act, args))


def wrmsr(now, v, msr, value):  # of a guest; each target hears of it a flight after it was told
    for vcpu, _effect, cycles in v.hw_wrmsr(msr, value).sent:
        at(now + m.costs.ns(cycles + m.costs["flight"]), arrive, m.vcpus[vcpu])


def arrive(now, v):  # a kick, a notification, a wake-up, a timer: settle deals with it, take says what goes in
    while v.settle() and (event := v.take()):
        taken.append((now, v.index, event.vector))
        wrmsr(now, v, 0x80B, 0)  # EOI
        if event.vector == IPI:
            at(now + 500, wrmsr, v, 0x830, fx.icr(dest=(v.index + 1) % 16, vector=IPI))  # it goes on, after 500 ns


def start(now, v):
    v.rflags |= 0x200  # IF: the guest takes interrupts
    v.settle()  # KVM_RUN: it is in the guest now
    for msr, value in ((0x832, 0x20000 | TICK), (0x83E, 0xB), (0x838, 250_000)):
        wrmsr(now, v, msr, value)  # LVTT periodic, divided by 1, every 250 us


for v in m.vcpus:
    at(1_000 * v.index, start, v)
at(20_000, wrmsr, m.vcpus[0], 0x830, fx.icr(dest=1, vector=IPI))
while (now := min(events[0][0] if events else END, m.next_timer() or END)) < END:
    for index, _outcome in m.set_time(int(now)):  # timers that are due
        arrive(now, m.vcpus[index])
    while events and events[0][0] <= now:
        _, _, act, args = heapq.heappop(events)
        act(now, *args)
ipis = [ns for ns, _, vector in taken if vector == IPI]
print(f"{len(ipis)} IPIs, one every {(ipis[-1] - ipis[0]) / (len(ipis) - 1):.0f} ns; {len(taken) - len(ipis)} ticks")
