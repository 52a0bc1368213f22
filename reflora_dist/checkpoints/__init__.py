"""What a run keeps on disk: adapter files as PEFT writes them, and training states of every engine.

No mathematics; how an engine saves its state is asked of the engine.
"""
