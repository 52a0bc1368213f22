"""Training engines: a model's pairs, this rank's pieces of their factors, and the gathering of whole parameters.

This package has no mathematics and no schedule: an engine does not know what a step does to a piece.
"""
