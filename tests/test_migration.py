"""Checkpoints of other packages, converted: training goes on as it would have there.

Their own package takes the steps before the conversion and, on a copy, those after it. All is in
float64, where roundings are far below what a wrong formula, a moment that was not converted or a
sync in another step would make of the parameters. BOUND is that of tests/test_papers.py.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from torch.nn import Parameter

from helpers import give_gradients
from optimizer_infos import same, snapshot
from ranger_cuda import Lookahead, RAdam, Ranger, convert_checkpoint
from ranger_of_2019 import RangerOf2019

BOUND = 1e-12
SHAPES = ((), (7,), (5, 4))
BEFORE, AFTER = 15, 25  # 15: in the middle of a cycle of 6


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES]


def train(optimizer, params, steps, scale=1.0):
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        grads = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]
        give_gradients([scale * g for g in grads], params)
        optimizer.step()
    return optimizer


def distance(a, b):
    """The largest difference of two sets of parameters, relative to the parameter's norm."""
    return max(((p - q).norm() / q.norm()).item() for p, q in zip(a, b, strict=True))


def goes_on_as(theirs, ours, before=BEFORE, after=AFTER):
    """How far apart theirs and ours are after as many steps from the same checkpoint."""
    a = parameters()
    optimizer = train(theirs(a), a, range(before))
    b = [Parameter(p.detach().clone()) for p in a]
    new = ours(b)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    new.load_state_dict(convert_checkpoint(saved, new))
    assert same(saved, kept)
    train(optimizer, a, range(before, before + after))
    train(new, b, range(before, before + after))
    return distance(b, a)


def torch_radam(p, **options):
    return torch.optim.RAdam(p, lr=0.01, **options)


def pytorch_optimizer(name, **options):
    module = pytest.importorskip("pytorch_optimizer")
    return lambda p: getattr(module, name)(p, lr=0.01, **options)


def pytorch_optimizer_lookahead(base, **options):
    module = pytest.importorskip("pytorch_optimizer")
    return lambda p: module.Lookahead(base(p), **options)


def optimi(name, **options):
    module = pytest.importorskip("optimi")
    return lambda p: getattr(module, name)(p, lr=0.01, triton=False, **options)


def timm_lookahead(base, **options):
    package = importlib.util.find_spec("timm")
    if package is None:
        pytest.skip("timm is not installed")
    # Its file alone: to import the package would take torchvision.
    file = Path(package.origin).parent / "optim" / "lookahead.py"
    spec = importlib.util.spec_from_file_location("timm_lookahead", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda p: module.Lookahead(base(p), **options)


def torch_adamw(p):
    return torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)


def lookahead_radam(p, **options):
    return Lookahead(RAdam(p), **options)


# Of theirs the options, and what ours has to be told that a checkpoint does not say.
AGREEING = {
    "torch RAdam": lambda: (torch_radam, RAdam),
    "torch RAdam, coupled": lambda: (lambda p: torch_radam(p, weight_decay=0.1), RAdam),
    "torch RAdam, decoupled": lambda: (
        lambda p: torch_radam(p, weight_decay=0.1, decoupled_weight_decay=True),
        RAdam,
    ),
    "lessw2020 Ranger": lambda: (lambda p: RangerOf2019(p, weight_decay=0.1), Ranger),
    "lessw2020 Ranger, threshold 4": lambda: (lambda p: RangerOf2019(p, threshold=4, k=5), Ranger),
    "lessw2020 Ranger in Lookahead": lambda: (
        lambda p: RangerOf2019(p, alpha=0.8),
        lookahead_radam,
    ),
    "pytorch-optimizer Ranger": lambda: (
        pytorch_optimizer("Ranger", use_gc=False, weight_decay=0.1, k=4, alpha=0.3),
        Ranger,
    ),
    "pytorch-optimizer Ranger, centralizing": lambda: (
        pytorch_optimizer("Ranger", weight_decay=0.1),
        lambda p: Ranger(p, centralize="all"),
    ),
    "pytorch-optimizer Ranger, coupled": lambda: (
        pytorch_optimizer("Ranger", use_gc=False, weight_decay=0.1, weight_decouple=False),
        Ranger,
    ),
    "pytorch-optimizer RAdam": lambda: (pytorch_optimizer("RAdam", weight_decay=0.1), RAdam),
    "pytorch-optimizer Lookahead(AdamW)": lambda: (
        pytorch_optimizer_lookahead(torch_adamw, k=7, alpha=0.3),
        lambda p: Lookahead(torch_adamw(p), k=7, alpha=0.3),
    ),
    "pytorch-optimizer Lookahead(torch RAdam)": lambda: (
        pytorch_optimizer_lookahead(torch_radam, k=6),
        lambda p: Ranger(p, k=6),
    ),
    # Epsilon, which optimi adds after the bias correction, is too small to matter.
    "optimi Ranger": lambda: (optimi("Ranger", eps=1e-14, weight_decay=0.1, alpha=0.3), Ranger),
    "optimi Ranger, coupled": lambda: (
        optimi("Ranger", eps=1e-14, weight_decay=0.1, decouple_wd=False),
        Ranger,
    ),
    "optimi Ranger, fully decoupled": lambda: (
        optimi("Ranger", eps=1e-14, weight_decay=1e-4, decouple_lr=True, max_lr=0.02),
        Ranger,
    ),
    "optimi RAdam": lambda: (optimi("RAdam", eps=1e-14), RAdam),
    "timm Lookahead(AdamW)": lambda: (
        timm_lookahead(torch_adamw, k=4, alpha=0.3),
        lambda p: Lookahead(torch_adamw(p)),
    ),
    "timm Lookahead(torch RAdam)": lambda: (timm_lookahead(torch_radam, k=4), Ranger),
}


@pytest.mark.parametrize("name", AGREEING)
def test_training_goes_on_as_it_would_have_there(name):
    theirs, ours = AGREEING[name]()
    assert goes_on_as(theirs, ours) < BOUND


@pytest.mark.parametrize("before", [1, 3, 6, 12])
def test_a_checkpoint_of_the_first_steps_goes_on(before):
    """Before rectification starts, and at the end of a cycle; moments are debiased by much."""
    assert goes_on_as(torch_radam, RAdam, before) < BOUND
    assert goes_on_as(RangerOf2019, Ranger, before) < BOUND
    assert goes_on_as(optimi("Ranger", eps=1e-14), Ranger, before) < BOUND


def from_the_start(theirs, ours, steps, scale=1.0):
    """The largest difference after so many steps, relative to the way that theirs went."""
    a, b = parameters(), parameters()
    first = [p.detach().clone() for p in a]
    for optimizer, params in ((theirs(a), a), (ours(b), b)):
        train(optimizer, params, range(steps), scale)
    ways = ((p - q).norm() / (p - s).norm() for p, q, s in zip(a, b, first, strict=True))
    return max(ways).item()


def test_optimi_s_epsilon_after_bias_correction_is_what_differs():
    """In proportion to epsilon and to the inverse of the gradients' size, and less with every
    step: docs/migration.md has these."""
    build = optimi("Ranger", eps=1e-5, betas=(0.95, 0.999))

    def ours(p):
        return Ranger(p, lr=0.01, eps=1e-5, rho_threshold=5.0)

    found = [from_the_start(build, ours, steps, scale=1e-3) for steps in (12, 50, 200)]
    assert found == pytest.approx([0.096, 0.051, 0.022], rel=0.05)
    assert from_the_start(build, ours, 50) == pytest.approx(2.6e-5, rel=0.05)


def test_lessw2020_s_ranger_is_ours_with_a_threshold_of_5():
    def theirs(p):
        return RangerOf2019(p, lr=0.01, weight_decay=0.1)

    def ours(threshold):
        return lambda p: Ranger(p, lr=0.01, weight_decay=0.1, rho_threshold=threshold)

    assert from_the_start(theirs, ours(5.0), 200) < BOUND
    assert 1e-3 < from_the_start(theirs, ours(4.0), 200) < 0.1


def test_pytorch_optimizer_s_first_steps_go_up():
    """Where they cannot be rectified its Ranger multiplies by -1; ours goes down."""
    a, b = parameters(), parameters()
    start = [p.detach().clone() for p in a]
    train(pytorch_optimizer("Ranger", use_gc=False, betas=(0.95, 0.999))(a), a, [0])
    train(Ranger(b, lr=0.01), b, [0])
    for p, q, s in zip(a, b, start, strict=True):
        torch.testing.assert_close(p - s, s - q)
        assert ((s - q) * q.grad >= 0).all()


@pytest.mark.parametrize("cls", [RAdam, Ranger])
@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_adam_s_state_is_taken_over_and_amsgrad_s_maximum_left_out(cls, kind):
    a, b = parameters(), parameters()
    build = getattr(torch.optim, kind)
    theirs = train(build(a, lr=0.02, weight_decay=0.3, amsgrad=True), a, range(8))
    ours = cls(b)
    ours.load_state_dict(convert_checkpoint(theirs.state_dict(), ours))
    for p, q in zip(a, b, strict=True):
        assert ours.state[q].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in ours.state[q].items():
            assert torch.equal(value, theirs.state[p][name])
    group = ours.param_groups[0]
    assert "amsgrad" not in group
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.02, 0.3, (0.9, 0.999))
    assert group["decoupled_weight_decay"] is (kind == "AdamW")
    assert group["rho_threshold"] == 4.0  # Adam has none: the optimizer's own


@pytest.mark.parametrize("build", [RAdam, Ranger, lookahead_radam])
def test_a_checkpoint_of_ours_is_returned_as_it_is(build):
    a = parameters(torch.bfloat16)
    saved = train(build(a), a, range(8)).state_dict()
    found = convert_checkpoint(saved, build(parameters(torch.bfloat16)))
    assert same(found, saved)
    assert found is not saved


def test_what_bullet_keeps_loads_as_a_state_dict():
    """docs/migration.md: its arrays under our names. Slow weights that started from zero are taken
    as they are."""
    a = parameters()
    ours = Ranger(a, betas=(0.99, 0.999), weight_decay=0.01, rho_threshold=5.0)
    momentum, velocity, slow = ([torch.full_like(p, x) for p in a] for x in (0.5, 0.25, 0.0))
    state = {
        i: {"step": 6, "exp_avg": m, "exp_avg_sq": v, "slow_param": s}
        for i, (m, v, s) in enumerate(zip(momentum, velocity, slow, strict=True))
    }
    ours.load_state_dict({"state": state, "param_groups": ours.state_dict()["param_groups"]})
    before = [p.detach().clone() for p in a]
    train(ours, a, range(6))
    for p, start in zip(a, before, strict=True):
        assert ((p - start / 2).abs() < 0.01).all()  # the first sync halves the model


# --- refusing -------------------------------------------------------------------------------------


def nadam():
    return torch.optim.NAdam(parameters())


def sgd():
    return torch.optim.SGD(parameters(), momentum=0.9)


def adamax():
    return torch.optim.Adamax(parameters())


def fixed_decay():
    return pytorch_optimizer("Ranger", weight_decay=0.1, fixed_decay=True)(parameters())


def adanorm():
    return pytorch_optimizer("RAdam", adanorm=True)(parameters())


def lamb():
    return pytorch_optimizer("Lamb")(parameters())


def pullback():
    return pytorch_optimizer_lookahead(torch_adamw, pullback_momentum="pullback")(parameters())


def swapped_in():
    optimizer = pytorch_optimizer_lookahead(torch_adamw)(parameters())
    optimizer.backup_and_load_cache()
    return optimizer


def lion():
    return optimi("Lion")(parameters())


REFUSED = {
    nadam: "'momentum_decay'.*no optimizer's that is known.*RAdam, Adam and AdamW",
    sgd: "'momentum'.*no optimizer's that is known",
    adamax: "the state of parameter 0 has 'exp_avg', 'exp_inf', 'step'",
    fixed_decay: "fixed_decay=True.*divided by the learning rate",
    adanorm: "adanorm=True",
    lamb: "an optimizer of pytorch-optimizer with",
    pullback: "pullback_momentum='pullback'",
    swapped_in: "the slow weights swapped in",
    lion: "'beta1', 'beta2'.*no optimizer's that is known",
}


@pytest.mark.parametrize("build", REFUSED, ids=lambda build: build.__name__)
@pytest.mark.parametrize("ours", [RAdam, Ranger, lookahead_radam])
def test_what_is_not_known_is_refused_and_changes_nothing(ours, build):
    theirs = build()
    params = [p for group in theirs.param_groups for p in group["params"]]
    saved = train(theirs, params, range(3)).state_dict()
    kept = copy.deepcopy(saved)
    optimizer = ours(parameters())
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=rf"checkpoint.*{REFUSED[build]}"):
        convert_checkpoint(saved, optimizer)
    assert same(saved, kept)
    assert same(snapshot(optimizer), before)


def test_a_ranger_s_state_is_refused_around_another_package_s_optimizer():
    a = parameters()
    saved = train(RangerOf2019(a), a, range(3)).state_dict()
    with pytest.raises(ValueError, match=r"'slow_buffer': a Ranger's.*around ranger_cuda.RAdam"):
        convert_checkpoint(saved, Lookahead(torch_adamw(parameters())))


def test_a_cycle_that_ranger_cannot_have_is_refused():
    """Wrapped in Lookahead after two steps: its cycles are two steps behind."""
    build = pytorch_optimizer_lookahead(lambda optimizer: optimizer, k=6)
    a = parameters()
    inner = train(torch_radam(a), a, range(2))
    theirs = train(build(inner), a, range(2, 5))
    with pytest.raises(ValueError, match=r"counted 3 steps.*counted 5.*Lookahead around"):
        convert_checkpoint(theirs.state_dict(), Ranger(parameters()))
    b = [Parameter(p.detach().clone()) for p in a]
    ours = lookahead_radam(b)
    ours.load_state_dict(convert_checkpoint(theirs.state_dict(), ours))
    train(theirs, a, range(5, 30))
    train(ours, b, range(5, 30))
    assert distance(b, a) < BOUND


def test_other_targets_and_other_models_are_refused():
    saved = torch_radam(parameters()).state_dict()
    with pytest.raises(TypeError, match=r"Ranger, RAdam and Lookahead.*not for AdamW"):
        convert_checkpoint(saved, torch_adamw(parameters()))
    with pytest.raises(ValueError, match="3 parameters, but the optimizer's has 2"):
        convert_checkpoint(saved, Ranger(parameters()[:2]))
    with pytest.raises(ValueError, match="'param_groups' is None"):
        convert_checkpoint({"state": {}}, Ranger(parameters()))
    a = parameters()
    saved = train(RangerOf2019(a), a, [0]).state_dict()
    saved["state"][1]["step"] = 1.5
    with pytest.raises(ValueError, match=r"'step' of parameter 1 is 1\.5"):
        convert_checkpoint(saved, Ranger(parameters()))
