"""The lab of real kernels: a generation's own kernel, booted in an emulated machine, as a judge of the model.

kernels.py gets kernels from distributions' packages, initramfs.py and init.c make what they boot, qemu.py starts and
ends the machine, wire.py carries records over memory that both sides share, device.py makes that the /dev/kvm of
`fastexit.kvm.Oracle`.
"""
