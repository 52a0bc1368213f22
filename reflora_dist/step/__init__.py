"""The optimizer step: ``attach``, its handle, and one step class per kind of method.

This package joins methods, collectives and engines. It adds no mathematics.
"""
