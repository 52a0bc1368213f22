"""Export of checkpoints and adapters to files for other tools: consolidated adapters and merged models.

Everything runs in one process without an engine, and reads only files.
"""
