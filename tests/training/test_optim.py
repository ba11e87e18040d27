import copy
import dataclasses
import functools
import itertools
import math

import pytest
import torch

from model import Transformer
from tests import helpers
from training.optim import LRSchedule, load_optimizer, lr_at_step, make_optimizer

random_model = functools.partial(helpers.random_model, helpers.CHECKPOINT_MODEL, None)
COSINE = LRSchedule("cosine", 5e-4, 5e-5, warmup_steps=1000, total_steps=100_000)


def rates_of(schedule: LRSchedule, steps) -> list[float]:
    return [lr_at_step(step, schedule) for step in steps]


@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 5e-4 / 1000),  # nanoGPT #443: the first step had rate 0 and learned nothing
        (499, 5e-4 / 2),
        (999, 5e-4),
        (1000, 5e-4),
        (50_500, (5e-4 + 5e-5) / 2),
        (100_000, 5e-5),
        (200_000, 5e-5),
    ],
)
def test_cosine_learning_rate_at_key_steps(step, expected):
    assert lr_at_step(step, COSINE) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("min_lr", [0.0, 5e-5, 5e-4])
def test_learning_rate_rises_then_falls_to_its_minimum(min_lr):
    rates = rates_of(LRSchedule("cosine", 5e-4, min_lr, 10, 100), range(101))
    assert rates[:10] == sorted(set(rates[:10]))
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[9] == 5e-4 and rates[100] == min_lr
    assert min(rates[10:]) >= min_lr and rates[0] > 0


def test_constant_learning_rate_stays_at_its_peak():
    schedule = dataclasses.replace(COSINE, name="constant")
    assert rates_of(schedule, (999, 1000, 50_000, 100_000, 10**9)) == [5e-4] * 5


@pytest.mark.parametrize("total_steps", [1, 2, 100])
def test_learning_rate_without_warmup_starts_at_its_peak(total_steps):
    schedule = LRSchedule("cosine", 5e-4, 0.0, 0, total_steps)
    assert rates_of(schedule, (0, total_steps)) == [5e-4, 0]


def test_warmup_longer_than_the_run_only_rises():
    rates = rates_of(LRSchedule("cosine", 1.0, 0.0, 1000, 10), range(10))
    assert rates == pytest.approx([(step + 1) / 1000 for step in range(10)])


@pytest.mark.parametrize("min_lr", [0.0, 5e-5])
def test_wsd_is_constant_and_decays_in_the_last_fifth(min_lr):
    schedule = LRSchedule("wsd", 5e-4, min_lr, 10, 100)
    rates = rates_of(schedule, range(101))
    assert rates[9:81] == [5e-4] * 72
    assert rates[80:] == sorted(set(rates[80:]), reverse=True)
    assert rates[85] == pytest.approx(min_lr + (5e-4 - min_lr) * (1 - math.sqrt(5 / 20)))
    assert rates[100] == min_lr
    assert lr_at_step(150, schedule) == min_lr


def test_warmup_into_the_decay_of_wsd_shortens_the_decay():
    rates = rates_of(LRSchedule("wsd", 1.0, 0.0, 90, 100), range(101))
    assert rates[89] == rates[90] == 1.0 and rates[100] == 0.0
    assert rates[95] == pytest.approx(1 - math.sqrt(0.5))


def optimizer_of(model, learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1, name="adamw"):
    return make_optimizer(model, name, learning_rate, betas, weight_decay)


def take_step(model, optimizer, seed: int):
    tokens = torch.randint(19, (4, 7), generator=torch.Generator().manual_seed(seed))
    model(tokens[:, :-1], tokens[:, 1:])[1].backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_without_gradients_matrices_decay_and_norms_do_not(tied):
    model = random_model(tie_embeddings=tied)
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer_of(model, learning_rate=0.1, weight_decay=0.5).step()
    for name, weight in model.state_dict().items():
        kept = 1.0 if "norm" in name else 1 - 0.1 * 0.5
        torch.testing.assert_close(weight, before[name] * kept, msg=name)


def names_in_llama2c_order(model: Transformer) -> list[str]:
    parameters = list(model.named_parameters())
    return [name for name, p in parameters if p.dim() >= 2] + [
        name for name, p in parameters if p.dim() < 2
    ]


def test_the_state_is_in_the_order_of_llama2c():
    model = random_model()
    optimizer, names = optimizer_of(model), names_in_llama2c_order(model)
    mark = {name: float(number) for number, name in enumerate(names, 1)}
    for name, parameter in model.named_parameters():
        parameter.grad = torch.full_like(parameter, mark[name])
    optimizer.step()
    state = optimizer.state_dict()
    matrices, norms = (group["params"] for group in state["param_groups"])
    assert matrices + norms == list(range(len(names)))
    assert names[0] == "tok_embeddings.weight" and "output.weight" not in names
    assert names[len(matrices)] == "layers.0.attention_norm.weight"
    assert [group["weight_decay"] for group in state["param_groups"]] == [0.1, 0.0]
    for index, name in enumerate(names):
        moment, parameter = state["state"][index]["exp_avg"], model.get_parameter(name)
        torch.testing.assert_close(moment, torch.full_like(parameter, 0.1 * mark[name]), msg=name)


def llama2c_optimizer(model):
    """As llama2.c's configure_optimizers makes it."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    no_decay = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))


@pytest.mark.parametrize("make", [optimizer_of, llama2c_optimizer])
def test_a_loaded_state_goes_on_as_if_never_saved(make):
    model = random_model()
    optimizer = make(model)
    for seed in range(3):
        take_step(model, optimizer, seed)
    resumed = copy.deepcopy(model)
    fresh = optimizer_of(resumed)
    load_optimizer(fresh, copy.deepcopy(optimizer.state_dict()), "ckpt.pt")
    for seed in range(3, 6):
        take_step(model, optimizer, seed)
        take_step(resumed, fresh, seed)
    exact = dict(atol=0, rtol=0) if make is optimizer_of else dict(atol=1e-6, rtol=1e-5)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, **exact, msg=name)


def test_loading_keeps_our_own_settings():
    model = random_model()
    theirs, ours = optimizer_of(model), optimizer_of(model, 3e-4, (0.8, 0.99), 0.2)
    take_step(model, theirs, 0)
    load_optimizer(ours, theirs.state_dict(), "ckpt.pt")
    for group, weight_decay in zip(ours.param_groups, (0.2, 0.0), strict=True):
        assert (group["lr"], group["betas"], group["weight_decay"]) == (
            1e-2,  # of the last step, until the next one
            (0.8, 0.99),
            weight_decay,
        )
        assert group["fused"]


def test_the_state_of_an_optimizer_that_has_not_stepped_loads():
    load_optimizer(
        optimizer_of(random_model()), optimizer_of(random_model()).state_dict(), "ckpt.pt"
    )


def state_of(**overrides) -> dict:
    model = random_model(**overrides)
    optimizer = optimizer_of(model)
    take_step(model, optimizer, 0)
    return optimizer.state_dict()


def one_group() -> dict:
    model = random_model()
    optimizer = torch.optim.AdamW(model.parameters())
    take_step(model, optimizer, 0)
    return optimizer.state_dict()


def second_moment_of_another_shape() -> dict:
    state = state_of()
    state["state"][0]["exp_avg_sq"] = torch.zeros(3, 3)
    return state


def plain_gradient_descent() -> dict:
    model = random_model()
    optimizer = torch.optim.SGD(llama2c_optimizer(model).param_groups, lr=0.1, momentum=0.9)
    take_step(model, optimizer, 0)
    return optimizer.state_dict()


@pytest.mark.parametrize(
    "foreign",
    [
        lambda: state_of(dim=32),
        lambda: state_of(n_layers=3),
        lambda: state_of(n_layers=1),
        lambda: state_of(tie_embeddings=False),
        lambda: state_of(hidden_dim=56),
        one_group,
        second_moment_of_another_shape,
        plain_gradient_descent,
        dict,
        lambda: None,
        lambda: [1, 2],
        lambda: {"state": {}, "param_groups": []},
        lambda: state_of() | {"state": {0: {"exp_avg": 3}}},
    ],
    ids=[
        "wider",
        "deeper",
        "shallower",
        "untied",
        "hidden_dim",
        "one group",
        "second moment",
        "no AdamW",
        "empty",
        "None",
        "list",
        "no groups",
        "no tensors",
    ],
)
def test_a_state_that_is_not_this_models_is_refused(foreign):
    optimizer = optimizer_of(random_model())
    with pytest.raises(ValueError, match=r"ckpt\.pt: its optimizer state does not fit the model"):
        load_optimizer(optimizer, foreign(), "ckpt.pt")
    assert not optimizer.state
    assert all(math.isfinite(group["lr"]) for group in optimizer.param_groups)


def muon_of(model, learning_rate=1e-2):
    return optimizer_of(model, learning_rate, name="muon")


def is_hidden_matrix(name: str) -> bool:
    return name.startswith("layers.") and "norm" not in name


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_muon_takes_block_matrices_and_adamw_the_rest(tied):
    model = random_model(tie_embeddings=tied)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = muon_of(model).param_groups
    members = [[names[parameter] for parameter in group["params"]] for group in groups]
    assert sorted(itertools.chain(*members)) == sorted(names.values())
    of_muon, of_adamw = members[0], members[1] + members[2]
    assert (
        of_muon and all(map(is_hidden_matrix, of_muon)) and not any(map(is_hidden_matrix, of_adamw))
    )
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]


def test_muon_steps_by_orthogonal_matrices_of_adamws_size():
    """Its update has singular values near 1, times 0.2 * sqrt(longer side) (arXiv 2502.16982)."""
    model = random_model(dim=32, n_layers=1, n_heads=4)
    before = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer_of(model, 1e-2, weight_decay=0.0, name="muon").step()
    for name, weight in model.state_dict().items():
        if is_hidden_matrix(name):
            update = (before[name] - weight).double() / (1e-2 * 0.2 * math.sqrt(max(weight.shape)))
            values = torch.linalg.svdvals(update)
            assert values.median().item() == pytest.approx(1, abs=0.35), name


def test_adamw_steps_what_muon_does_not_as_it_would_alone():
    both, alone = random_model(), random_model()
    take_step(both, muon_of(both), 0)
    take_step(alone, optimizer_of(alone), 0)
    for (name, mine), expected in zip(both.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, expected) != is_hidden_matrix(name), name


def test_a_loaded_muon_goes_on_as_if_never_saved():
    model = random_model()
    optimizer = muon_of(model)
    for seed in range(3):
        take_step(model, optimizer, seed)
    resumed = random_model()
    resumed.load_state_dict(model.state_dict())
    loaded = muon_of(resumed)
    load_optimizer(loaded, copy.deepcopy(optimizer.state_dict()), "ckpt.pt")
    for seed in range(3, 6):
        take_step(model, optimizer, seed)
        take_step(resumed, loaded, seed)
    for mine, expected in zip(resumed.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, expected)
    assert str(loaded.state_dict()) == str(optimizer.state_dict())


def test_muon_with_grad_scaler_skips_overflow_steps_only():
    plain, scaled = random_model(), random_model()
    alone, optimizer = muon_of(plain), muon_of(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    tokens = torch.randint(19, (4, 7), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        take_step(plain, alone, 0)
        scaler.scale(scaled(tokens[:, :-1], tokens[:, 1:])[1]).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert all(map(torch.equal, plain.parameters(), scaled.parameters()))
    for parameter in scaled.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, plain.parameters(), scaled.parameters()))
    assert scaler.get_scale() == 2.0**15


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_state_that_lacks_some_moments_is_refused(name):
    model = random_model()
    optimizer = optimizer_of(model, name=name)
    take_step(model, optimizer, 0)
    state = optimizer.state_dict()
    del state["state"][0]
    with pytest.raises(ValueError, match="no moments for some of the parameters"):
        load_optimizer(optimizer_of(model, name=name), state, "ckpt.pt")


@pytest.mark.parametrize("saved, ours", [("adamw", "muon"), ("muon", "adamw")])
def test_moments_of_the_other_optimizer_are_refused(saved, ours):
    model = random_model()
    optimizer = optimizer_of(model, name=saved)
    take_step(model, optimizer, 0)
    with pytest.raises(ValueError, match=r"ckpt\.pt: its optimizer state does not fit the model"):
        load_optimizer(optimizer_of(model, name=ours), optimizer.state_dict(), "ckpt.pt")


def test_muon_moments_of_another_shape_are_refused():
    small, large = random_model(), random_model(hidden_dim=24)
    optimizer = muon_of(small)
    take_step(small, optimizer, 0)
    with pytest.raises(ValueError, match=r"a moment is .*, not"):
        load_optimizer(muon_of(large), optimizer.state_dict(), "ckpt.pt")
