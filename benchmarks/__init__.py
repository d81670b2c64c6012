"""Speed, as ratios to what torch itself needs: ``python -m benchmarks``."""
