"""Runs: one, many side by side, and their files."""
