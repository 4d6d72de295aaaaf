"""The C door: libfastexit, a shared library that hosts Python and hands out compiled kernels.

``native/`` has its C sources: fastexit.h, the one declaration of the C ABI, and the library's own C. build.py
makes the library, host.py is what runs inside it, cabi.py is the ABI as Python sees it.
"""
