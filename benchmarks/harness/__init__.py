"""What benchmarks share: models, engines, variants, timing, records."""
