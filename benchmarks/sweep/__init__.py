"""Parts of the convergence benchmark: data, runs and statistics."""
