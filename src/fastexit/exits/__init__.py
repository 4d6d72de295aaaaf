"""The exits of a vCPU: the run loop in Python, what differs between vendors, handlers, and the CPU's own part."""
