"""Is the loss right on this machine, and how fast: what `wit-trl check`, the tests and the benchmarks share."""
