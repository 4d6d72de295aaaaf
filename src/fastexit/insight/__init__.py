"""Questions to the model: one exit step by step, and the fast path timed beside the generic one."""
