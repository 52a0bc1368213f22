"""Files of a run: adapter files in PEFT's format, and training states of every engine.

This package has no mathematics. Engines define how their state is saved.
"""
