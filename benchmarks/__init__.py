"""Benchmarks of every op against every public peer. See docs/benchmarks.md."""
