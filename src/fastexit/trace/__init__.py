"""KVM traces as input: text is read, replayed through the model, and compared with it line by line.

files.py opens what there is (packed.py unpacks, recorders.py has trace-cmd and perf print), text.py makes canonical
lines of it by shapes/ and notes what stands beside them (beside.py), reader.py reads these, events.py parses lines,
threads.py tells VMs and vCPUs apart, accesses.py puts lines together, guest.py and guestvcpu.py feed a Machine and
compare, hypercall.py and hypervlines.py do so for what Windows alone does, doors.py names the ways to the APIC,
generations.py asks each kernel generation, replay.py runs it all; report.py is what comes out, render.py prints it,
heatmap.py draws it.

>>> from fastexit.trace.replay import replay
>>> report = replay(BUNDLED)  # doctest: +SKIP
>>> report.ipi.exact, report.ipi.total  # doctest: +SKIP
(3664, 3664)
"""

from fastexit.trace.files import BUNDLED, TraceError

__all__ = ["BUNDLED", "TraceError"]
