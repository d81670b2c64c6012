"""Adapters to hosts; each module imports its host only."""
