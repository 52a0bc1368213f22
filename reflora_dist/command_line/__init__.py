"""The options of programs: how a dataclass declares them, and the help that is printed from it.

The modules of this room import the standard library alone, since a program prints its help before it imports others.
"""
