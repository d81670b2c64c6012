"""``python -m l2l_prune``."""

from l2l_prune.cli import main

main()
