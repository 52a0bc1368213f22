"""Questions, generation, and the rules that read an answer."""
