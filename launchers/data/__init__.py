"""Records, their tokenization, and the embedded default model."""
