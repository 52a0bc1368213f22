"""Files are opened, named and replaced here, with one kind of error for whatever is wrong with them.

No torch.distributed and no model: paths in, contents out.
"""
