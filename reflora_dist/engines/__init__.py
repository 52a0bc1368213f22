"""The pairs of a model, the pieces of them that this rank holds, and how an engine gathers, saves and loads parameters.

No mathematics and no schedule: an engine does not know what a step does to a piece.
"""
