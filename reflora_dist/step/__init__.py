"""What happens at an optimizer step: ``attach``, its handle, and one step class per kind of method.

It joins methods, collectives and engines, and adds no mathematics of its own.
"""
