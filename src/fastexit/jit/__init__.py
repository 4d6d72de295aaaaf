"""How kernels are declared, compiled, kept on disk and called. Nothing of KVM is here."""
