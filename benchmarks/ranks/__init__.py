"""Scripts that a benchmark starts on every rank."""
