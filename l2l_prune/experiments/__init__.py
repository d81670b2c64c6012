"""Experiments of the paper: runs, the demo, their files and pictures."""
