"""What a trace's columns say: who exits, why, for how long, and what other kernels would have done."""
