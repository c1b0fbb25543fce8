"""Benchmarks; each is run as a module: `python -m benchmarks.storage --quick`."""
