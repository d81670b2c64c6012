"""The laboratory: the ``l2l-prune`` command, its runs and reports."""
