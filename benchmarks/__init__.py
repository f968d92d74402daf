"""Timed comparisons, as ratios measured in one run: ``python -m benchmarks`` (README.md beside this file)."""
