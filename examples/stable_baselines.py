"""Stable-Baselines3: PPO with one trunk for policy and value, on harmonized gradients.

Run it with `python -m examples.stable_baselines`. The policy makes its optimizer itself,
from a class and options. `PPO.train` is one block, so it stands here anew, with
`backward` in place of `loss.backward()`, and without what is off by default there:
`target_kl` and `clip_range_vf`. A2C takes the same change.

The entropy bonus is opposed to the return by design: with the policy loss it is one task,
and only this task and the value are harmonized. Without a trunk there is nothing to
harmonize: the networks of `MlpPolicy` share no parameter, unless told to.
"""

from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn
from torch.optim import Adam

from ghopt import HarmonizedFromParams, HarmonizedOptimizer


class Trunk(BaseFeaturesExtractor):
    """A layer of features, for policy and value."""

    def __init__(self, observation_space: spaces.Box, features_dim: int = 64) -> None:
        super().__init__(observation_space, features_dim)
        self.layer = nn.Linear(observation_space.shape[0], features_dim)

    def forward(self, observations: Tensor) -> Tensor:
        """Give the features."""
        features: Tensor = self.layer(observations).tanh()
        return features


class HarmonizedPPO(PPO):
    """PPO that harmonizes policy and value."""

    def train(self) -> None:
        """Do what PPO does, but with one backward pass per task."""
        if self.target_kl is not None or self.clip_range_vf is not None:
            raise ValueError("target_kl and clip_range_vf are not written down here")
        self.policy.set_training_mode(True)
        optimizer = self.policy.optimizer
        assert isinstance(optimizer, HarmonizedOptimizer)
        self._update_learning_rate(optimizer)
        for _ in range(self.n_epochs):
            for rollout in self.rollout_buffer.get(self.batch_size):
                losses = self.losses(rollout)
                optimizer.zero_grad()
                optimizer.backward(losses)
                nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
                optimizer.step()
            self._n_updates += 1
        policy_loss, entropy_loss = losses["policy"]  # of the last minibatch
        self.logger.record("train/policy_gradient_loss", policy_loss.item())
        self.logger.record("train/entropy_loss", entropy_loss.item())
        self.logger.record("train/value_loss", losses["value"].item())
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def losses(self, rollout: Any) -> dict[str, Any]:
        """Give the losses of both tasks, with their coefficients."""
        actions = rollout.actions
        if isinstance(self.action_space, spaces.Discrete):
            actions = actions.long().flatten()
        values, log_prob, entropy = self.policy.evaluate_actions(
            rollout.observations, actions
        )
        advantages = rollout.advantages
        if self.normalize_advantage and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        ratio = (log_prob - rollout.old_log_prob).exp()
        assert callable(self.clip_range)  # PPO makes a schedule of a number
        reach = self.clip_range(self._current_progress_remaining)
        clipped = ratio.clamp(1 - reach, 1 + reach)
        gain = torch.min(advantages * ratio, advantages * clipped).mean()
        bonus = (-log_prob if entropy is None else entropy).mean()
        error = nn.functional.mse_loss(rollout.returns, values.flatten())
        return {
            "policy": [-gain, -self.ent_coef * bonus],
            "value": self.vf_coef * error,
        }


def make_agent(**options: Any) -> HarmonizedPPO:
    """Give an agent for CartPole; options are those of ``PPO``."""
    policy_kwargs: dict[str, Any] = {
        "features_extractor_class": Trunk,
        "net_arch": [],  # all layers but the last ones are in the trunk
        "optimizer_class": HarmonizedFromParams,
        # What PPO gives to Adam, unless the class is given.
        "optimizer_kwargs": {"base_class": Adam, "eps": 1e-5},
    }
    defaults: dict[str, Any] = {
        "ent_coef": 0.01,
        "policy_kwargs": policy_kwargs,
        "device": "cpu",
    }
    return HarmonizedPPO("MlpPolicy", "CartPole-v1", **(defaults | options))


def main() -> None:
    """Train for a few hundred steps."""
    torch.manual_seed(0)
    agent = make_agent(seed=0, verbose=1, n_steps=128, batch_size=32, n_epochs=4)
    agent.learn(512, log_interval=1)


if __name__ == "__main__":
    main()
