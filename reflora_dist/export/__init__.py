"""From checkpoints and adapters to files that others read: consolidated adapters, merged models.

One process, no engine: everything is read from disk.
"""
