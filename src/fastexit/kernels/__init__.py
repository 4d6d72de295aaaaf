"""The compiled core: the only code that numba sees."""
