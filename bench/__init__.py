"""Benchmarks: what the figures in README.md and docs/performance.md come from. `python -m bench --help`."""
