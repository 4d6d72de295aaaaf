"""KVM's tracepoints, written: the ring of records, and their text as each generation prints it."""
