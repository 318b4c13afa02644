"""Stable-Baselines3: the recipe against SB3 itself and against a literal loop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from stable_baselines3 import PPO
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.testing import assert_close

from examples.stable_baselines import HarmonizedPPO, Trunk, make_agent
from ghopt import HarmonizedFromParams, HarmonizedOptimizer, Weighting, gh, plain_sum
from tests.examples.oracle import theorem_1, weights
from tests.literal import literal_gradients

N_STEPS = 16
SHORT: dict[str, Any] = {
    "seed": 0,
    "n_steps": N_STEPS,
    "batch_size": N_STEPS // 2,
    "n_epochs": 2,
    "learning_rate": 0.1,
}


def kwargs(optimizer_class: Any, **options: Any) -> dict[str, Any]:
    return {
        "features_extractor_class": Trunk,
        "net_arch": [],
        # SB3 starts with an action layer so small that the trunk hardly sees the policy.
        "ortho_init": False,
        "optimizer_class": optimizer_class,
        "optimizer_kwargs": options,
    }


def harmonized(weighting: Weighting = gh, **options: Any) -> HarmonizedPPO:
    """Give an agent on plain SGD, in which rounding does not grow."""
    policy_kwargs = kwargs(HarmonizedFromParams, base_class=SGD, weighting=weighting)
    options = SHORT | options
    return make_agent(policy_kwargs=policy_kwargs, **options)


class LiteralPPO(PPO):
    """PPO whose gradients are harmonized by hand, between its backward and its step."""

    conflicts = 0

    def train(self) -> None:
        for _ in range(self.n_epochs):
            for rollout in self.rollout_buffer.get(self.batch_size):
                self.step_on(rollout)

    def step_on(self, rollout: Any) -> None:
        actions = rollout.actions.long().flatten()
        values, log_prob, entropy = self.policy.evaluate_actions(
            rollout.observations, actions
        )
        assert entropy is not None
        gains = rollout.advantages
        gains = (gains - gains.mean()) / (gains.std() + 1e-8)
        ratio = torch.exp(log_prob - rollout.old_log_prob)
        policy = -torch.min(gains * ratio, gains * ratio.clamp(0.8, 1.2)).mean()
        policy = policy - self.ent_coef * entropy.mean()
        value = (rollout.returns - values.flatten()).square().mean() * self.vf_coef
        parameters = list(self.policy.parameters())
        first, second = literal_gradients([policy, value], parameters).double()
        tau = theorem_1(first, second)
        self.conflicts += tau != (1, 1)
        update = (tau[0] * first + tau[1] * second).float()
        sizes = [parameter.numel() for parameter in parameters]
        for parameter, part in zip(parameters, update.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)
        nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.policy.optimizer.step()


def ppo(agent: type[PPO], **options: Any) -> PPO:
    options = SHORT | options
    return agent(
        "MlpPolicy",
        "CartPole-v1",
        ent_coef=0.01,
        policy_kwargs=kwargs(SGD),
        device="cpu",
        **options,
    )


def learned(agent: PPO, steps: int = 6 * N_STEPS) -> list[Tensor]:
    return weights(agent.learn(steps).policy)


def test_policy_and_value_train_as_in_a_literal_loop() -> None:
    literal = ppo(LiteralPPO)
    expected = learned(literal)
    assert isinstance(literal, LiteralPPO)
    assert literal.conflicts > 4
    assert_close(learned(harmonized()), expected, rtol=1e-4, atol=1e-5)
    plain = learned(ppo(PPO))
    assert max((a - b).abs().max() for a, b in zip(plain, expected, strict=True)) > 1e-3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalize_advantage": False},
        {"clip_range": lambda left: 0.1 + 0.2 * left},
        {"learning_rate": lambda left: 0.1 * left},
    ],
    ids=["default", "not normalized", "decaying range", "decaying rate"],
)
def test_with_weights_of_one_it_is_ppo_itself(options: dict[str, Any]) -> None:
    expected = learned(ppo(PPO, **options))
    actual = learned(harmonized(plain_sum, **options))
    assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_optimizer_is_what_ppo_makes_by_default() -> None:
    optimizer = make_agent().policy.optimizer
    assert isinstance(optimizer, HarmonizedOptimizer)
    assert isinstance(optimizer.base_optimizer, Adam)
    own = PPO("MlpPolicy", "CartPole-v1", device="cpu").policy.optimizer
    assert optimizer.defaults == own.defaults


def test_entropy_and_policy_are_one_task() -> None:
    agent = harmonized()
    agent.learn(N_STEPS)
    optimizer = agent.policy.optimizer
    assert isinstance(optimizer, HarmonizedOptimizer)
    assert optimizer.last is not None
    assert optimizer.last.names == ("policy", "value")


@pytest.mark.parametrize("given", ["nothing", "policy_kwargs"])
def test_a_saved_agent_goes_on_where_it_was_saved(tmp_path: Path, given: str) -> None:
    agent = harmonized()
    agent.learn(2 * N_STEPS)
    agent.save(tmp_path / "agent")
    # SB3 refuses those that are not equal to what was saved.
    options: dict[str, Any] = {"env": agent.get_env()}
    if given == "policy_kwargs":
        options["policy_kwargs"] = agent.policy_kwargs
    loaded = HarmonizedPPO.load(tmp_path / "agent", **options)
    agent.set_random_seed(1)
    expected = learned(agent)
    loaded.set_random_seed(1)
    assert_close(learned(loaded), expected, rtol=0, atol=0)


def test_a_saved_policy_comes_back_with_its_optimizer(tmp_path: Path) -> None:
    agent = harmonized()
    agent.policy.save(str(tmp_path / "policy"))
    loaded = type(agent.policy).load(str(tmp_path / "policy"))
    assert isinstance(loaded.optimizer, HarmonizedOptimizer)
    assert isinstance(loaded.optimizer.base_optimizer, SGD)


def test_a_plain_ppo_with_the_class_is_warned() -> None:
    policy_kwargs = kwargs(HarmonizedFromParams, base_class=SGD)
    agent = PPO("MlpPolicy", "CartPole-v1", policy_kwargs=policy_kwargs, device="cpu")
    with pytest.warns(UserWarning, match="nothing is harmonized"):
        agent.learn(5)


@pytest.mark.parametrize("option", ["target_kl", "clip_range_vf"])
def test_what_is_not_written_down_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=option):
        make_agent(n_steps=N_STEPS, batch_size=N_STEPS, **{option: 0.1}).learn(N_STEPS)


def test_networks_that_share_nothing_are_not_in_conflict() -> None:
    agent = make_agent(
        policy_kwargs={
            "optimizer_class": HarmonizedFromParams,
            "optimizer_kwargs": {"base_class": SGD},
        },
        seed=0,
    )
    agent.learn(5)
    optimizer = agent.policy.optimizer
    assert isinstance(optimizer, HarmonizedOptimizer)
    assert optimizer.last is not None
    assert_close(optimizer.last.weights, torch.ones(2, dtype=torch.float64))
    assert optimizer.last.gramian[0, 1] == 0
