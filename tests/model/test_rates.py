"""An optimizer that does not follow ``shadow_lr_multiplier`` is warned about: nothing else would tell."""

import gc
import warnings
import weakref

import pytest
import torch

from models import tiny_base, tiny_config, tokens
from shadowpeft import get_shadow_model
from shadowpeft.model import rates
from shadowpeft.train import parameter_groups

SAID = r"asks for 0\.5 times that \(shadow_lr_multiplier\).*ShadowTrainer.*parameter_groups.*shadow_lr_multiplier=1\.0"


def adapted(**config):
    return get_shadow_model(tiny_base(), tiny_config(**config)).train()


def one_rate(model):
    return torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)


def train_a_step(model, optimizer):
    model(tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_one_rate_for_all_is_said_once_and_no_step_is_lost_by_it():
    model = adapted(shadow_lr_multiplier=0.5)
    before = [weight.clone() for weight in model.network().backbone.parameters()]
    optimizer = one_rate(model)
    with pytest.warns(UserWarning, match=SAID):
        train_a_step(model, optimizer)
    assert not all(map(torch.equal, before, model.network().backbone.parameters()))
    train_a_step(model, optimizer)  # warnings are errors here


def test_groups_with_the_shadows_own_rate_are_fine():
    model = adapted(shadow_lr_multiplier=0.5)
    train_a_step(model, torch.optim.AdamW(parameter_groups(model, learning_rate=1e-2)))
    assert model.network() not in rates._watched


def test_an_adapter_that_asks_for_one_rate_is_not_watched():
    model = adapted()
    assert model.network() not in rates._watched
    train_a_step(model, one_rate(model))


def test_another_models_optimizer_says_nothing_and_settles_nothing():
    model = adapted(shadow_lr_multiplier=0.5)
    other = torch.nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    with pytest.warns(UserWarning, match=SAID):
        train_a_step(model, one_rate(model))


def test_each_adapter_of_a_model_is_looked_at_when_it_is_trained():
    model = adapted()
    model.add_adapter("second", tiny_config(shadow_lr_multiplier=0.5))
    train_a_step(model, one_rate(model))
    model.set_adapter("second")
    with pytest.warns(UserWarning, match=SAID):
        train_a_step(model, one_rate(model))


def test_a_compiled_step_is_left_alone():
    model = adapted(shadow_lr_multiplier=0.5)
    optimizer = one_rate(model)
    model(tokens(), labels=tokens()).loss.backward()
    with warnings.catch_warnings(record=True) as said:  # of torch's own too
        warnings.simplefilter("always")
        torch.compile(optimizer.step, backend="eager")()
    assert not [each for each in said if "shadow_lr_multiplier" in str(each.message)]


def test_a_watched_model_is_freed():
    model = adapted(shadow_lr_multiplier=0.5)
    network = weakref.ref(model.network())
    del model
    gc.collect()
    assert network() is None
