"""Real x86 code on Unicorn, with fastexit as the local APICs of its CPUs."""

from fastexit.adapters.unicorn.host import Counters, Devices, Ended, GuestError, Stop, UnicornCpu, UnicornHost, idt

__all__ = ["Counters", "Devices", "Ended", "GuestError", "Stop", "UnicornCpu", "UnicornHost", "idt"]
