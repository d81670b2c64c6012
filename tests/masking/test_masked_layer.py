"""Rows of DESIGN's tables that concern plain torch: each breaks with torch.nn.utils.prune alone."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from l2l_prune import DSDSchedule, PrunedReptile, Pruner, Schedule, Segment, dense_state_dict
from l2l_prune.masking.masked_layer import attach, detach, held_tensors, set_mask

SPARSE = Schedule((Segment(5, sparse=True, sparsity=0.5), Segment(5)))


@pytest.fixture
def pruned(net):
    Pruner(net, SPARSE)
    return net


def forward_with_grad(model, batch):
    x, y = batch
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss


def masked_dense_state(model):
    """Oracle for functional_call on a dense twin: weights times masks, by hand."""
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith("_orig"):
            state[name[:-5]] = value * model.state_dict()[name[:-5] + "_mask"]
        elif not name.endswith("_mask"):
            state[name] = value
    return state


def test_identity_and_order_of_parameters(net):
    before = list(net.parameters())
    attach(net.conv1, "weight")
    assert [id(p) for p in net.parameters()] == [id(p) for p in before]
    assert [n for n, _ in net.named_parameters()][:2] == ["conv1.weight_orig", "conv1.bias"]
    detach(net.conv1, "weight")
    assert [id(p) for p in net.parameters()] == [id(p) for p in before]


def test_scripting_says_what_to_do(pruned):
    with pytest.raises(AttributeError, match=r"cannot be scripted: call Pruner\.finalize"):
        torch.jit.script(pruned.fc)


def test_torch_recognises_it(pruned):
    assert prune.is_pruned(pruned)
    assert prune.is_pruned(pruned.conv1)
    assert set(dict(pruned.conv1.named_buffers())) == {"weight_mask"}
    assert isinstance(pruned.conv1, nn.Conv2d)
    assert "Conv" in type(pruned.conv1).__name__


def test_weight_is_orig_times_mask_and_never_stale(pruned, batch):
    conv = pruned.conv1
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
    for _ in range(2):
        forward_with_grad(pruned, batch)
        optimizer.step()
        assert torch.equal(conv.weight, conv.weight_orig * conv.weight_mask)
    pruned.double()
    assert conv.weight.dtype == torch.float64
    pruned.load_state_dict({k: v + 0 for k, v in pruned.state_dict().items()})
    assert torch.equal(conv.weight, conv.weight_orig * conv.weight_mask)
    assert "weight" not in conv.__dict__


def test_attaching_changes_no_output_and_no_gradient(net, batch):
    twin = copy.deepcopy(net)
    for module in (net.conv1, net.conv2, net.fc):
        attach(module, "weight")
    assert torch.equal(forward_with_grad(net, batch), forward_with_grad(twin, batch))
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("after_forward", [False, True])
@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: AveragedModel(m).module,
        lambda m: save_and_load(m),
    ],
    ids=["deepcopy", "pickle", "AveragedModel", "torch.save"],
)
def test_copies_at_any_moment(pruned, batch, copied, after_forward):
    if after_forward:
        forward_with_grad(pruned, batch)
    twin = copied(pruned)
    assert torch.equal(twin(batch[0]), pruned(batch[0]))
    assert prune.is_pruned(twin)
    with torch.no_grad():  # independent of the original
        twin.conv1.weight_orig.add_(1)
        twin.conv1._buffers["weight_mask"].zero_()
    assert pruned.conv1.weight_mask.any()
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in pruned.named_parameters()]


def save_and_load(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_averaged_model_averages_under_the_mask(pruned):
    averaged = AveragedModel(pruned)
    for _ in range(3):
        with torch.no_grad():
            pruned.fc.weight_orig.add_(torch.randn_like(pruned.fc.weight_orig))
        averaged.update_parameters(pruned)
    assert (averaged.module.fc.weight[pruned.fc.weight_mask == 0] == 0).all()
    averaged.update_parameters(pruned)


def test_functional_call_leaks_nothing(pruned, batch):
    dense = copy.deepcopy(pruned)
    oracle = type(dense)()
    state = {**dict(pruned.named_parameters()), **dict(pruned.named_buffers())}
    doubled = {k: v * 2 if k.endswith("_orig") else v for k, v in state.items()}
    before = pruned.conv1.weight.clone()
    out = functional_call(pruned, doubled, (batch[0],))
    expected = {
        k: v * 2 if k in ("conv1.weight", "conv2.weight", "fc.weight") else v
        for k, v in masked_dense_state(dense).items()
    }
    assert torch.allclose(out, functional_call(oracle, expected, (batch[0],)), atol=1e-6)
    assert torch.equal(pruned.conv1.weight, before)
    assert "weight" not in pruned.conv1.__dict__


def test_functional_call_with_dense_names_is_refused_and_leaves_the_model(pruned, batch):
    before = {k: v.clone() for k, v in pruned.state_dict().items()}
    with pytest.raises(
        RuntimeError, match=r"Conv2d.weight is under an l2l_prune mask.*weight_orig"
    ):
        functional_call(pruned, {"conv1.weight": torch.zeros(4, 1, 3, 3)}, (batch[0],))
    after = pruned.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_vmap_over_tasks_matches_a_loop(pruned):
    pruned.eval()
    x, y = torch.randn(3, 8, 1, 6, 6), torch.randint(0, 3, (3, 8))
    parameters, buffers = dict(pruned.named_parameters()), dict(pruned.named_buffers())

    def loss(parameters, x, y):
        return F.cross_entropy(functional_call(pruned, (parameters, buffers), (x,)), y)

    together = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for task in range(3):
        alone = grad(loss)(parameters, x[task], y[task])
        for name in alone:
            assert torch.allclose(together[name][task], alone[name], atol=1e-5)
    assert (together["fc.weight_orig"][:, pruned.fc.weight_mask == 0] == 0).all()
    assert type(pruned.conv1.weight) is torch.Tensor


def test_stack_module_state(pruned, batch):
    pruned.eval()
    models = [pruned, copy.deepcopy(pruned)]
    with torch.no_grad():
        models[1].fc.weight_orig.mul_(3)
    parameters, buffers = stack_module_state(models)
    out = vmap(lambda p, b: functional_call(pruned, (p, b), (batch[0],)))(parameters, buffers)
    for model, row in zip(models, out, strict=True):
        assert torch.allclose(row, model(batch[0]), atol=1e-5)


def test_assignment_and_deletion_are_refused(pruned):
    for value in (torch.zeros(3, 16), nn.Parameter(torch.zeros(3, 16))):
        with pytest.raises((RuntimeError, KeyError), match="weight"):
            pruned.fc.weight = value
    with pytest.raises(RuntimeError, match="under an l2l_prune mask"):
        del pruned.fc.weight


def test_a_new_mask_replaces_the_old_one_and_its_buffer(net):
    attach(net.fc, "weight")
    with torch.no_grad():
        net.fc.weight_orig.copy_(torch.arange(48.0).view(3, 16) + 1)
    first = torch.arange(48).view(3, 16) < 24
    set_mask(net.fc, "weight", first)
    _, buffer = held_tensors(net.fc, "weight")
    set_mask(net.fc, "weight", ~first)
    assert torch.equal(buffer.bool(), first)  # an old clone may still need it
    assert torch.equal(net.fc.weight_mask.bool(), ~first)
    assert (net.fc.weight == 0).all()  # the first half was zeroed, the second is masked now
    assert len(net.fc._forward_pre_hooks) == 1


def test_prune_remove_restores_a_plain_module(pruned):
    weight = pruned.fc.weight.detach().clone()
    parameter = pruned.fc.weight_orig
    prune.remove(pruned.fc, "weight")
    assert type(pruned.fc) is nn.Linear
    assert pruned.fc.weight is parameter
    assert torch.equal(pruned.fc.weight, weight)
    assert list(pruned.fc.state_dict()) == ["weight", "bias"]
    assert not pruned.fc._forward_pre_hooks


def test_prune_remove_on_a_learn2learn_clone_spares_the_original(pruned, batch):
    l2l = pytest.importorskip("learn2learn")
    clone = l2l.clone_module(pruned)
    prune.remove(clone.fc, "weight")
    assert prune.is_pruned(pruned.fc)
    assert (pruned.fc.weight == 0).sum() == 24
    assert (clone.fc.weight == 0).sum() == 24
    clone(batch[0]).sum().backward()
    assert pruned.fc.weight_orig.grad is not None


def test_another_torch_pruning_call_on_top_is_refused(pruned):
    with pytest.raises(RuntimeError, match="under an l2l_prune mask"):
        prune.l1_unstructured(pruned.fc, "weight", amount=0.5)


def test_a_partial_state_dict_leaves_masked_weights_alone(pruned):
    before = pruned.fc.weight_orig.clone()
    missing, unexpected = pruned.load_state_dict({"fc.bias": torch.ones(3)}, strict=False)
    assert "fc.weight_orig" in missing
    assert not unexpected
    assert torch.equal(pruned.fc.weight_orig, before)
    assert torch.equal(pruned.fc.bias, torch.ones(3))


def test_other_parameters_can_still_be_added(pruned):
    pruned.fc.gain = nn.Parameter(torch.ones(3))
    assert list(dict(pruned.fc.named_parameters())) == ["weight_orig", "bias", "gain"]


def test_a_dense_weight_is_taken_where_others_of_its_module_are_missing():
    net = nn.ModuleDict({"rnn": nn.LSTM(2, 3)})
    Pruner(net, DSDSchedule(0.5, pretrain=1, prune=1, retrain=1), only=nn.LSTM)
    given = torch.ones(12, 3)
    _, unexpected = net.load_state_dict({"rnn.weight_hh_l0": given}, strict=False)
    assert not unexpected
    assert torch.equal(net["rnn"].weight_hh_l0, given)


def test_dense_keys_are_those_of_the_model_without_masks(net):
    keys = list(net.state_dict())
    holder = nn.ModuleDict({"net": net})
    pruner = Pruner(
        holder, DSDSchedule(0.5, pretrain=1, prune=2, retrain=1), skip="net.conv1", dense_keys=True
    )
    for _ in range(4):
        state = holder.state_dict()
        assert list(state) == [f"net.{key}" for key in keys]
        plain = type(net)()
        plain.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
        for name, module in plain.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                assert torch.equal(module.weight, net.get_submodule(name).weight)
        pruner.step()
    pruner.finalize()
    assert list(holder.state_dict()) == [f"net.{key}" for key in keys]


def test_dense_keys_are_the_model_s_own_tensors(net):
    """Programs that average models write to ``state_dict()``, as they may in torch."""
    pruner = Pruner(net, SPARSE, dense_keys=True)
    with torch.no_grad():
        net.fc.weight_orig.add_(1)  # an outer step that has not been ended yet
    state = net.state_dict()
    assert (state["fc.weight"][~pruner.masks["fc.weight"]] == 0).all()
    for value in state.values():
        value.copy_(torch.full_like(value, 3))
    assert (net.fc.bias == 3).all()
    assert torch.equal(net.fc.weight, 3.0 * pruner.masks["fc.weight"])
    kept = net.state_dict(keep_vars=True)
    assert kept["fc.weight"] is net.fc.weight_orig


def test_dense_keys_average_as_those_of_a_plain_model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    Pruner(net, SPARSE, dense_keys=True)
    average = copy.deepcopy(net)
    expected = {name: value.clone() for name, value in dense_state_dict(net).items()}
    for _ in range(3):
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.mul_(1.5 if name.endswith("orig") else 0.5)
        for name, value in net.state_dict().items():
            average.state_dict()[name].mul_(0.5).add_(value, alpha=0.5)
            expected[name].mul_(0.5).add_(value, alpha=0.5)
    for name, value in average.state_dict().items():
        assert torch.equal(value, expected[name])
    assert torch.equal(average[0].weight, expected["0.weight"])


def test_dense_and_pruned_state_dicts_do_not_mix_silently(net, pruned, batch):
    fresh = type(net)()
    dense = fresh.state_dict()
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"fc\.weight is a dense weight"):
            pruned.load_state_dict(dense, strict=strict)
    attached = type(net)()
    Pruner(attached, DSDSchedule(0.5, pretrain=1, prune=1, retrain=1))
    attached.load_state_dict(dense)  # all-ones masks: exactly the dense model
    assert torch.equal(attached.eval()(batch[0]), fresh.eval()(batch[0]))
    attached.train().load_state_dict(pruned.state_dict())
    assert torch.equal(attached.eval()(batch[0]), pruned.eval()(batch[0]))
    fresh.load_state_dict(dense_state_dict(pruned))
    assert torch.equal(fresh.eval()(batch[0]), pruned(batch[0]))


def test_dense_state_dict_has_the_keys_and_order_of_a_dense_model(net):
    keys = list(net.state_dict())
    Pruner(net, SPARSE)
    state = dense_state_dict(net)
    assert list(state) == keys
    assert torch.equal(state["fc.weight"], net.fc.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_casting(pruned, dtype):
    pruned.to(dtype)
    assert pruned.fc.weight.dtype == dtype
    assert (pruned.fc.weight == 0).sum() == 24


def test_multihead_attention_out_proj_follows_its_mask():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    oracle = copy.deepcopy(attention)
    pruner = Pruner(attention, SPARSE, only="out_proj")
    x = torch.randn(2, 5, 8)
    for training in (True, False):
        attention.train(training), oracle.train(training)
        with torch.no_grad():
            oracle.out_proj.weight.copy_(
                attention.out_proj.weight_orig * pruner.masks["out_proj.weight"]
            )
            assert torch.allclose(attention(x, x, x)[0], oracle(x, x, x)[0], atol=1e-6)
            attention.out_proj.weight_orig.add_(1)  # no forward of out_proj in between


def dense_attention(values, masks, x, heads):
    """Self-attention as its formula has it, on weights that are masked by hand."""
    weights = {n: v * masks[n] if n in masks else v for n, v in values.items()}
    pairs = zip(weights["in_proj_weight"].chunk(3), weights["in_proj_bias"].chunk(3), strict=True)
    q, k, v = (F.linear(x, w, b).unflatten(-1, (heads, -1)).transpose(1, 2) for w, b in pairs)
    joined = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v
    return F.linear(
        joined.transpose(1, 2).flatten(2), weights["out_proj.weight"], weights["out_proj.bias"]
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fast", [True, False])
def test_multihead_attention_equals_its_formula(training, fast):
    """In its fast path too, which is taken without gradients in evaluation mode."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double().train(training)
    pruner = Pruner(attention, SPARSE)
    assert list(pruner.masks) == ["in_proj_weight", "out_proj.weight"]
    values = {
        n.removesuffix("_orig"): p.detach().clone().requires_grad_()
        for n, p in attention.named_parameters()
    }
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        expected = dense_attention(values, pruner.masks, x, heads=2)
        with torch.no_grad():
            assert torch.allclose(attention(x, x, x, need_weights=False)[0], expected, atol=1e-12)
        out = attention(x, x, x)[0]
        assert torch.allclose(out, expected, atol=1e-12)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    ours = torch.autograd.grad(out.square().sum(), list(attention.parameters()))
    theirs = torch.autograd.grad(expected.square().sum(), list(values.values()))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-11)


class Decoder(nn.Module):
    """Self-attention in a layer of torch's own, then attention to something else."""

    def __init__(self, kdim):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=kdim, vdim=kdim, batch_first=True)

    def forward(self, x, memory):
        return self.cross(self.encoder(x), memory, memory)[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kdim", [None, 6])
def test_transformer_layers_equal_a_functional_call(training, kdim):
    torch.manual_seed(0)
    block = Decoder(kdim).double().train(training)
    dense = copy.deepcopy(block)
    pruner = Pruner(block, SPARSE)
    assert "encoder.self_attn.in_proj_weight" in pruner.masks
    assert ("cross.k_proj_weight" in pruner.masks) == (kdim is not None)
    values = {n: p.detach().clone().requires_grad_() for n, p in dense.named_parameters()}
    weights = {n: v * pruner.masks[n] if n in pruner.masks else v for n, v in values.items()}
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    memory = torch.randn(3, 4, kdim or 8, dtype=torch.float64)
    expected = functional_call(dense, weights, (x, memory))
    theirs = torch.autograd.grad(expected.square().sum(), list(values.values()))
    copies = (block, copy.deepcopy(block), pickle.loads(pickle.dumps(block)))
    for module in copies:
        with torch.no_grad():
            assert torch.allclose(module(x, memory), expected, atol=1e-12)
        out = module(x, memory)
        ours = torch.autograd.grad(out.square().sum(), list(module.parameters()))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-11)


class FastLinear(nn.Linear):
    """A layer as CloserLookFewShot's: the adapted weight is an attribute of the stored one."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.weight.fast = self.bias.fast = None

    def forward(self, x):
        if self.weight.fast is None:
            return super().forward(x)
        return F.linear(x, self.weight.fast, self.bias.fast)


def adapt_fast(model, x, steps):
    parameters = fast = list(model.parameters())
    for parameter in parameters:
        parameter.fast = None
    for _ in range(steps):
        gradients = torch.autograd.grad(model(x).square().mean(), fast, create_graph=True)
        fast = [w - 0.1 * g for w, g in zip(fast, gradients, strict=True)]
        for parameter, value in zip(parameters, fast, strict=True):
            parameter.fast = value


def test_adapted_weights_kept_as_fast_are_masked():
    """Second-order MAML of three steps against a functional call."""
    torch.manual_seed(0)
    model = nn.Sequential(FastLinear(5, 6), nn.Tanh(), FastLinear(6, 3)).double()
    for layer in (model[0], model[2]):  # a cast makes new parameters
        layer.weight.fast = layer.bias.fast = None
    dense = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    dense.load_state_dict(model.state_dict())
    pruner = Pruner(model, SPARSE)
    values = {n: p.detach().clone().requires_grad_() for n, p in dense.named_parameters()}
    masks = pruner.masks
    xs, xq = torch.randn(2, 4, 5, dtype=torch.float64)

    def run(weights, x):
        masked = {n: w * masks[n] if n in masks else w for n, w in weights.items()}
        return functional_call(dense, masked, x)

    adapted = values
    for _ in range(3):
        gradients = torch.autograd.grad(
            run(adapted, xs).square().mean(), list(adapted.values()), create_graph=True
        )
        adapted = {n: w - 0.1 * g for (n, w), g in zip(adapted.items(), gradients, strict=True)}
    expected = run(adapted, xq)
    theirs = torch.autograd.grad(expected.square().sum(), list(values.values()))

    adapt_fast(model, xs, 3)
    out = model(xq)
    assert torch.allclose(out, expected, atol=1e-13)
    ours = torch.autograd.grad(out.square().sum(), list(model.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-12)
    with torch.no_grad():
        model[0].weight_orig.fast += 1  # whatever a loop puts there
    assert (model[0].weight.fast[~masks["0.weight"]] == 0).all()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_see_the_mask(kind):
    lstm = kind(3, 4, num_layers=2, bidirectional=True)
    oracle = copy.deepcopy(lstm)
    Pruner(lstm, SPARSE, only=kind)
    x = torch.randn(5, 2, 3)
    for model in (lstm, copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        oracle.load_state_dict(dense_state_dict(model))
        assert torch.equal(model(x)[0], oracle(x)[0])
    lstm.double()
    assert lstm(x.double())[0].dtype == torch.float64
    lstm(x.double())[0].sum().backward()
    for name, p in lstm.named_parameters():
        if name.endswith("_orig"):
            assert (p.grad[getattr(lstm, name[:-5] + "_mask") == 0] == 0).all()


def test_recurrent_layers_are_plain_again_after_finalize():
    lstm = nn.LSTM(3, 4)
    Pruner(lstm, SPARSE, only=nn.LSTM).finalize()
    optimizer = torch.optim.SGD(lstm.parameters(), lr=0.5)
    before = lstm(torch.ones(1, 1, 3))[0].detach()
    lstm(torch.ones(1, 1, 3))[0].sum().backward()
    optimizer.step()
    assert not torch.equal(lstm(torch.ones(1, 1, 3))[0], before)
    assert all(a is b for a, b in zip(lstm._flat_weights, lstm.parameters(), strict=True))


def test_two_tensors_of_one_module(net):
    pruner = Pruner(net, SPARSE, only=["fc.weight", "fc.bias"])
    assert set(pruner.masks) == {"fc.weight", "fc.bias"}
    assert (net.fc.bias == 0).sum() == 2
    prune.remove(net.fc, "weight")
    assert (net.fc.bias == 0).sum() == 2
    prune.remove(net.fc, "bias")
    assert type(net.fc) is nn.Linear


class OwnReduce(nn.Linear):
    def __reduce__(self):
        return OwnReduce, (2, 2)


def test_a_class_with_its_own_pickling_is_refused_loudly():
    layer = OwnReduce(2, 2)
    Pruner(layer, SPARSE)
    with pytest.raises(TypeError, match="own way of pickling"):
        pickle.dumps(layer)


def test_compiled_model_follows_the_masks(net, batch):
    pruner = Pruner(net, Schedule((Segment(1), Segment(1, sparse=True, sparsity=0.5), Segment(1))))
    compiled = torch.compile(net, backend="aot_eager")
    for _ in range(3):
        net.zero_grad()
        assert torch.allclose(compiled(batch[0]), net(batch[0]), atol=1e-5)
        compiled(batch[0]).sum().backward()
        for name, mask in pruner.masks.items():
            assert (dict(net.named_parameters())[name + "_orig"].grad[~mask] == 0).all()
        pruner.step()


def test_compiled_model_under_open_masks(net, batch):
    pruner = Pruner(net, SPARSE)
    compiled = torch.compile(net, backend="aot_eager")
    found = []
    for model in (net, compiled):
        net.zero_grad()
        with pruner.opened_masks():
            F.cross_entropy(model(batch[0]), batch[1]).backward()
        found.append(net.fc.weight_orig.grad.clone())
    assert (found[0][net.fc.weight_mask == 0] != 0).any()
    torch.testing.assert_close(found[1], found[0])


def test_data_parallel_wrapping(net, batch):
    """Without GPUs DataParallel calls the module itself; names and masks go through it."""
    pruner = Pruner(nn.DataParallel(net), SPARSE)
    assert set(pruner.masks) == {"module.conv1.weight", "module.conv2.weight", "module.fc.weight"}
    wrapped = nn.DataParallel(net)
    wrapped(batch[0]).sum().backward()
    assert (net.fc.weight_orig.grad[~pruner.masks["module.fc.weight"]] == 0).all()
    assert (net.fc.weight == 0).sum() == 24


def test_replicas_of_data_parallel_keep_the_mask(net, batch):
    """What DataParallel makes of a module on each device (here by its own replica method)."""
    Pruner(net, SPARSE)
    replica = net.fc._replicate_for_data_parallel()
    for name, tensor in (*net.fc.named_parameters(), *net.fc.named_buffers()):
        setattr(replica, name, tensor + 0)  # replicas hold non-leaf tensors
    x = torch.randn(2, 16)
    assert torch.equal(replica(x), net.fc(x))
    replica(x).sum().backward()
    assert (net.fc.weight_orig.grad[net.fc.weight_mask == 0] == 0).all()


def test_replicas_of_data_parallel_keep_an_open_mask(net):
    pruner = Pruner(net, SPARSE)
    with pruner.opened_masks():
        replica = net.fc._replicate_for_data_parallel()
        for name, tensor in (*net.fc.named_parameters(), *net.fc.named_buffers()):
            setattr(replica, name, tensor + 0)
        x = torch.randn(2, 16)
        assert torch.equal(replica(x), net.fc(x))
        replica(x).sum().backward()
    plain = nn.Linear(16, 3)
    plain.load_state_dict({"weight": net.fc.weight.detach(), "bias": net.fc.bias.detach()})
    plain(x).sum().backward()
    assert torch.equal(net.fc.weight_orig.grad, plain.weight.grad)  # pruned entries too


def test_batch_norm_scales_can_be_pruned_by_name(net, batch):
    pruner = Pruner(net, SPARSE, only="norm.weight")
    assert int(pruner.masks["norm.weight"].sum()) == 2
    assert pruner.masks["norm.weight"].tolist() == [True, True, False, False]  # ties: lower index
    net(batch[0]).sum().backward()
    assert (net.norm.weight_orig.grad[2:] == 0).all()


def test_masks_have_the_memory_format_of_their_weights():
    """Products of two formats are several times slower."""
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    pruner = Pruner(conv, Schedule((Segment(2, sparse=True, sparsity=0.5),)))
    state = pruner.state_dict()
    assert conv.weight_mask.stride() == conv.weight_orig.stride() == conv.weight.stride()
    pruner.load_state_dict(state)
    assert conv.weight_mask.stride() == conv.weight_orig.stride()
    learner = PrunedReptile(pruner.finalize(), pruner.schedule).clone()
    assert learner.workspace.masks["weight"].stride() == learner.module.weight.stride()


# ---- masks that somebody averaged -----------------------------------------------------------


def first_updates(kind):
    """Ways to average a model with its buffers, as an update of an average by a model."""
    if kind == "lerp":  # from the first update on, without a copy before

        def update(average, model):
            with torch.no_grad():
                for mine, theirs in zip(
                    [*average.parameters(), *average.buffers()],
                    [*model.parameters(), *model.buffers()],
                    strict=True,
                ):
                    if mine.is_floating_point():
                        mine.lerp_(theirs, 0.3)

        return copy.deepcopy, update
    options = {"use_buffers": True}
    if kind == "ema":
        options["multi_avg_fn"] = torch.optim.swa_utils.get_ema_multi_avg_fn(0.7)
    return (lambda m: AveragedModel(m, **options)), lambda a, m: a.update_parameters(m)


@pytest.mark.parametrize("read_between", [False, True])
@pytest.mark.parametrize("kind", ["swa", "ema", "lerp"])
def test_an_average_of_buffers_too_is_the_average_of_the_masked_weights(kind, read_between):
    """Oracle: the same average of plain modules that hold the masked weights."""
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    pruner = Pruner(net, Schedule((Segment(2), Segment(9, sparse=True, sparsity=0.5))))

    def plain():
        twin = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
        twin.load_state_dict(dense_state_dict(net))
        return twin

    make, update = first_updates(kind)
    average, oracle, x = make(net), make(plain()), torch.randn(7, 6)
    for _ in range(5):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        pruner.step()
        update(average, net)
        update(oracle, plain())
        if read_between:
            torch.testing.assert_close(average(x), oracle(x))
    torch.testing.assert_close(average(x), oracle(x))
    inner = getattr(average, "module", average)
    expected = getattr(oracle, "module", oracle).state_dict()
    for key, value in dense_state_dict(inner).items():
        torch.testing.assert_close(value, expected[key])
    fresh = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    Pruner(fresh, SPARSE)
    fresh.load_state_dict(inner.state_dict())  # fractions in the file
    assert all(set(m.unique().tolist()) <= {0, 1} for m in fresh.buffers())
    torch.testing.assert_close(fresh(x), oracle(x))
    for layer in (inner[0], inner[2]):
        prune.remove(layer, "weight")
    torch.testing.assert_close(average(x), oracle(x))


def test_a_compiled_average_is_that_of_the_masked_weights():
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2))
    pruner = Pruner(net, Schedule((Segment(2), Segment(9, sparse=True, sparsity=0.5))))
    average = AveragedModel(net, use_buffers=True)
    for _ in range(5):
        pruner.step()
        average.update_parameters(net)
    fractions = average.module[0].weight_mask
    assert ((fractions > 0) & (fractions < 1)).any()
    stored, x = average.module[0].weight_orig, torch.randn(7, 6)
    compiled = torch.compile(average.module, backend="eager")
    hidden = torch.tanh(F.linear(x, stored, average.module[0].bias))
    last = average.module[2]
    expected = F.linear(hidden, last.weight_orig, last.bias)
    torch.testing.assert_close(compiled(x), expected)


def where_a_mask_is_read(kind, net, x):
    if kind == "inference mode":
        with torch.inference_mode():
            net(x)
        return
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters):
        return functional_call(net, parameters, (x,)).square().mean()

    if kind == "grad":
        grad(loss)(parameters)
    else:
        stacked = {name: torch.stack([p, p]) for name, p in parameters.items()}
        vmap(grad(loss))(stacked)


@pytest.mark.parametrize("kind", ["inference mode", "grad", "vmap of grad"])
@pytest.mark.parametrize("written", ["loaded", "cast"])
def test_a_mask_read_first_in_another_mode_is_an_ordinary_tensor(net, batch, kind, written):
    Pruner(net, SPARSE)
    if written == "loaded":
        net.load_state_dict(net.state_dict())
    else:
        net.double()
    x = batch[0].to(net.fc.bias.dtype)
    net.eval()  # torch's batch normalisation refuses vmap in training
    where_a_mask_is_read(kind, net, x)
    for mask in (net.fc.weight_mask, net.conv1.weight_mask):
        assert not mask.is_inference()
        assert not torch._C._functorch.is_functorch_wrapped_tensor(mask)
    net(x).sum().backward()
    copy.deepcopy(net)
    assert (net.fc.weight_orig.grad[net.fc.weight_mask == 0] == 0).all()


def test_an_averaged_mask_in_the_model_itself_loses_no_weight(net):
    pruner = Pruner(net, SPARSE)
    stored = net.fc.weight_orig.detach().clone()
    with torch.no_grad():
        net.fc.weight_mask.mul_(0.72)
    pruner.project()
    pruner.step()
    assert torch.equal(net.fc.weight_orig, stored)
    assert torch.equal(net.fc.weight, stored)
    pruner.finalize()
    assert torch.equal(net.fc.weight, stored)


# ---- writing to a weight in place -----------------------------------------------------------


def by_a_formula(module):
    if isinstance(module, nn.Linear):
        nn.init.constant_(module.weight, 3.0)
        module.bias.data.copy_(torch.ones_like(module.bias))
    elif isinstance(module, nn.Conv2d):
        module.weight.data.fill_(3.0)


def test_apply_reaches_masked_weights(pruned):
    parameters = list(pruned.parameters())
    assert pruned.apply(by_a_formula) is pruned
    for layer in (pruned.conv1, pruned.conv2, pruned.fc):
        assert torch.equal(layer.weight_orig, 3.0 * layer.weight_mask)
        assert torch.equal(layer.weight, layer.weight_orig)
    assert all(a is b for a, b in zip(pruned.parameters(), parameters, strict=True))
    assert (pruned.fc.bias == 1).all()


def test_apply_on_a_held_module_itself_and_its_children():
    """Each module once, and those that are under a mask give their stored weights."""
    seen = []
    attention = nn.MultiheadAttention(4, 2)
    attach(attention, "in_proj_weight")
    attach(attention.out_proj, "weight")
    attention.apply(lambda m: seen.append(m))
    assert seen == [attention.out_proj, attention]
    attention.apply(lambda m: (m.in_proj_weight if m is attention else m.weight).data.fill_(2.0))
    assert (attention.in_proj_weight == 2).all()
    assert (attention.out_proj.weight == 2).all()


def test_masks_can_be_taken_off_within_apply(pruned):
    pruned.apply(lambda m: prune.remove(m, "weight") if hasattr(m, "weight_mask") else None)
    assert type(pruned.fc) is nn.Linear
    assert (pruned.fc.weight == 0).sum() == 24


def test_copies_within_apply_are_pruned_ones(pruned, batch):
    copies = []
    pruned.apply(lambda m: copies.append(copy.deepcopy(m)))
    twin = copies[-1]
    assert type(twin.fc) is type(pruned.fc)
    assert torch.equal(twin(batch[0]), pruned(batch[0]))


def test_an_error_within_apply_leaves_the_masks_on(pruned):
    def fail(module):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pruned.apply(fail)
    for layer in (pruned.conv1, pruned.conv2, pruned.fc):
        assert torch.equal(layer.weight, layer.weight_orig * layer.weight_mask)
        assert type(layer).__name__.startswith("Pruned")


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(6, 5),
        lambda: nn.Conv2d(3, 4, 3),
        lambda: nn.ConvTranspose1d(3, 4, 3),
        lambda: nn.Bilinear(3, 4, 5),
        lambda: nn.Embedding(5, 4),
        lambda: nn.LSTM(3, 4),
        lambda: nn.BatchNorm1d(8),
    ],
)
def test_reset_parameters_is_that_of_a_plain_module_under_the_mask(make):
    module, plain = make(), make()
    names = [name for name, p in module.named_parameters() if "bias" not in name]
    pruner = Pruner(module, SPARSE, only=names)
    torch.manual_seed(5)
    module.reset_parameters()
    torch.manual_seed(5)
    plain.reset_parameters()
    for name, mask in pruner.masks.items():
        assert torch.equal(getattr(module, name), getattr(plain, name).detach() * mask)
        assert torch.equal(getattr(module, f"{name}_orig"), getattr(module, name))
    for name, parameter in plain.named_parameters():
        if name not in pruner.masks:
            assert torch.equal(getattr(module, name), parameter)
