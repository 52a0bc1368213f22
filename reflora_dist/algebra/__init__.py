"""Mathematics of r x r matrices and of whole rows of tall factors, with the Triton kernels below it.

No rank, no engine, no file: everything in here runs in one process.
"""
