"""Who holds which part of a factor, and what ranks send to each other: Grams, solutions, cut rows.

No engine and no method: a layout says what is held, and sizes say what is sent.
"""
