"""How ranks cut factors, and the collectives of a step: Gram matrices, solutions and rows that are cut.

This code knows no engines and no methods. A layout tells which elements a rank holds.
"""
