"""``python -m l2l_prune``."""

from l2l_prune.experiments.cli import main

main()
