"""Shared by all benchmarks: models, engines, variants, timing, records."""
