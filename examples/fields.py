"""Meta-learnt neural fields of glyphs, pruned to a tenth in the rounds of Meta-SparseINR.

The lines marked l2l_prune are all that pruning adds to the loop.
"""

import sys

import torch

from l2l_prune import Pruner  # l2l_prune
from l2l_prune.fewshot import Glyphs
from l2l_prune.metalearners.field_files import export_field
from l2l_prune.metalearners.fields import FieldMAML, ImageSignals, Siren, psnr
from l2l_prune.schedules import metasparse  # l2l_prune

ITERATIONS = int(sys.argv[1]) if len(sys.argv) > 1 else 500


def main():
    torch.manual_seed(0)
    signals = ImageSignals(Glyphs("train").images)
    unseen = ImageSignals(Glyphs("test").images[::300])
    x = signals.coordinates
    maml = FieldMAML(Siren(width=32), lr=0.01, steps=2)
    opt = torch.optim.Adam(maml.parameters(), 1e-3)
    rounds = metasparse(0.9, pretrain=ITERATIONS // 2, interval=ITERATIONS // 22 + 1)  # l2l_prune
    pruner = Pruner(maml, rounds, optimizer=opt, allocation="global")  # l2l_prune
    for iteration in range(ITERATIONS):
        opt.zero_grad()
        loss = maml.loss(x, signals.sample(4))
        loss.backward()
        opt.step()
        pruner.step()  # l2l_prune
        if iteration % 50 == 0:
            print(f"{iteration:4d}  loss {loss:.4f}")
    fitted = maml.fit(x, unseen.values, steps=100, lr=3e-3)
    quality = psnr(maml(x, fitted), unseen.values).mean()
    size = len(export_field(maml.field(fitted, 0)))
    print(f"unseen signals after 100 steps: {quality:.1f} dB, {size} bytes each")


if __name__ == "__main__":
    main()
