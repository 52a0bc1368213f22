"""Linear algebra on r x r matrices and on whole rows of tall factors; ``kernels/`` has it in Triton.

This code knows no ranks, no engines and no files: everything runs in one process.
"""
