"""Convergence: data, runs and statistics."""
