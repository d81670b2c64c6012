"""MAML and ANIL in plain PyTorch: torch.func's functional_call, grad and vmap over the tasks.

python torch_func_maml.py [ITERATIONS] [maml | anil] [compile]

The lines marked l2l_prune are all that pruning adds to the loop.
"""

import sys

import torch
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, vmap
from torch.nn import functional as F

from l2l_prune import DSDSchedule, Pruner  # l2l_prune
from l2l_prune.fewshot import Conv4, EpisodeSampler, Glyphs

WAYS, SHOTS, QUERIES, TASKS = 5, 1, 1, 4
INNER_LR, INNER_STEPS = 0.5, 1


def adapt(model, params, part, x, y):
    """The task's own weights; only those whose names begin with ``part`` are adapted."""

    def loss(adapted):
        return F.cross_entropy(functional_call(model, params | adapted, (x,)), y)

    adapted = {name: value for name, value in params.items() if name.startswith(part)}
    for _ in range(INNER_STEPS):
        slopes = grad(loss)(adapted)
        adapted = {name: value - INNER_LR * slopes[name] for name, value in adapted.items()}
    return params | adapted


def meta_gradient(model, params, part, episodes):
    """The gradient of the mean query loss and the mean accuracy, for all tasks at once."""

    def task(params, xs, ys, xq, yq):
        scores = functional_call(model, adapt(model, params, part, xs, ys), (xq,))
        return F.cross_entropy(scores, yq), (scores.argmax(1) == yq).float().mean()

    def objective(params):
        losses, accuracies = vmap(task, in_dims=(None, 0, 0, 0, 0))(params, *episodes)
        return losses.mean(), accuracies.mean()

    return grad(objective, has_aux=True)(params)


def main():
    iterations = int(sys.argv[1]) if len(sys.argv) > 1 else 60
    part = "classifier." if "anil" in sys.argv else ""  # ANIL adapts the head, MAML everything
    torch.manual_seed(0)
    glyphs = Glyphs("train")
    tasks = EpisodeSampler(
        glyphs.images, glyphs.labels, ways=WAYS, shots=SHOTS, queries=QUERIES, seed=0
    )
    model = replace_all_batch_norm_modules_(Conv4(WAYS, channels=32))
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = DSDSchedule.from_fractions(0.3, iterations)  # l2l_prune
    pruner = Pruner(model, schedule, optimizer=opt)  # l2l_prune
    step = torch.compile(meta_gradient) if "compile" in sys.argv else meta_gradient
    params = dict(model.named_parameters())
    for iteration in range(iterations):
        episodes = zip(*(tasks.sample() for _ in range(TASKS)), strict=True)
        gradients, accuracy = step(model, params, part, [torch.stack(parts) for parts in episodes])
        for name, value in params.items():
            value.grad = gradients[name]
        opt.step()
        pruner.step()  # l2l_prune
        if iteration % 10 == 0:
            print(f"{iteration:4d}  accuracy {float(accuracy):.2f}")
    pruner.finalize()  # l2l_prune


if __name__ == "__main__":
    main()
