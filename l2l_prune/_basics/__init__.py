"""_basics."""
