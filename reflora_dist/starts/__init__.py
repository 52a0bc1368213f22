"""Initializations of the factors that change the base (PiSSA, OLoRA, LoRA-GA, the RefLoRA restart), and their replay.

Nothing here runs during a step.
"""
