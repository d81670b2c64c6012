"""Further meta-learners with learn2learn's verbs: CAVIA, sparse-MAML, MetaOptNet, neural fields."""

from l2l_prune.metalearners.cavia import CAVIA, ConcatContext, FiLM
from l2l_prune.metalearners.sparse_maml import SparseMAML

__all__ = ["CAVIA", "ConcatContext", "FiLM", "SparseMAML"]
