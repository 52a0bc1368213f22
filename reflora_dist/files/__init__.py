"""Functions that open, check, replace and fetch files; a file that cannot be used is a ValueError that names it.

This code uses no torch.distributed and builds no model to train: it takes paths and returns contents.
"""
