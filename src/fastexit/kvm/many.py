"""Twins with as many vCPUs as there can be: what senders reach among a thousand.

Models: nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from fastexit import regs as r
from fastexit.kvm.host import Host
from fastexit.kvm.operations import Op
from fastexit.kvm.twins import Setup, Twins


class ManyTwins(Twins):
    """A thousand vCPUs with ids up to 4095: broadcasts, all but self, clusters, lowest priority."""

    kind = "many"
    operations_each = 100
    about = (
        "1,000 vCPUs (as many as the host has) with ids up to 4095: all-but-self, broadcast, cluster, lowest priority"
    )

    @classmethod
    def draw(cls, rng: random.Random, host: Host, ids: tuple[int, ...] | None) -> Setup:
        count = min(1000, host.max_vcpus)
        ids = ids or (0, *rng.sample(range(1, min(4096, host.max_vcpu_id) - 1), count - 2), host.max_vcpu_id - 1)
        irqchip = rng.choice(("full", "split"))
        return Setup(apic_ids=ids, irqchip=irqchip, x2apic_api=r.X2API_32BIT_IDS | rng.choice((0, 2)))

    def beginning(self, rng: random.Random) -> Iterator[Op]:
        yield ("boot_x2apic",)

    def draw_op(self, rng: random.Random) -> Op:
        i = rng.randrange(len(self.vcpus))
        vector = rng.randrange(16, 256)
        mode = rng.choices((r.DM_FIXED, r.DM_LOWEST, r.DM_NMI, r.DM_STARTUP), (5, 4, 1, 0.3))[0]
        icr = vector | mode << r.ICR_DM_SHIFT | r.ICR_LEVEL
        target = rng.choice(self.vcpus).id
        form = rng.randrange(6)
        if form == 0:
            icr |= rng.choice((r.SH_ALLBUT, r.SH_ALLINC)) << r.ICR_SHORTHAND_SHIFT
        elif form == 1:
            icr |= rng.choice((r.X2APIC_BROADCAST, r.XAPIC_BROADCAST)) << r.ICR_DEST_SHIFT
        elif form == 2:
            icr |= target << r.ICR_DEST_SHIFT
        elif form == 3:
            return ("signal_msi", 0xFEE0_0000 | (target & 0xFF) << 12 | (target & 0xFFFF_FF00) << 32, vector)
        else:
            icr |= r.ICR_LOGICAL | ((target >> 4) << 16 | rng.getrandbits(16)) << r.ICR_DEST_SHIFT
        return ("set_msr", i, r.MSR_X2APIC_ICR, icr)
