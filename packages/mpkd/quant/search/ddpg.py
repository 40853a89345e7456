"""A small DDPG agent: states in [0, 1]^d, one action in [0, 1], truncated normal noise.

Source: Lillicrap et al. 2015, arXiv:1509.02971; sizes and rates are those of HAQ (Wang et al. 2019,
    arXiv:1811.08886, section 4).
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HIDDEN = 300
ACTOR_RATE, CRITIC_RATE = 1e-4, 1e-3
BATCH = 64
TAU = 0.01  # share of the new weights that goes into the targets each update
NOISE, NOISE_DECAY = 0.5, 0.99
MEMORY = 2000  # transitions
REWARD_DECAY = 0.95  # of the moving average that rewards are measured from


class Mlp(nn.Module):
    """Two hidden layers of 300, one output."""

    def __init__(self, inputs: int, *, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(inputs, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 1)]
        )
        with torch.no_grad():
            for index, layer in enumerate(self.layers):
                # Small last weights: the first answers are near 0, the middle of the sigmoid.
                reach = 3e-3 if index == 2 else 1 / math.sqrt(layer.in_features)
                for parameter in layer.parameters():
                    parameter.uniform_(-reach, reach, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, inputs)`` to ``(N,)``."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)[:, 0]


def truncated_normal(rng: np.random.Generator, mean: float, deviation: float) -> float:
    """One draw of a normal distribution cut to [0, 1] (drawn again until it lies there).

    Args:
        mean: in ``[0, 1]``, so that at least every second draw of a narrow one lies there.
        deviation: above 0; the wider the more draws, about three at 1.
    """
    while True:
        value = float(rng.normal(mean, deviation))
        if 0 <= value <= 1:
            return value


class Agent:
    """Actor, critic, their slow copies, a memory, and the noise.

    Args:
        state_size: numbers in a state.
        warm_up: episodes of uniform random actions.
        seed: of everything that is random here; no global generator is touched.
    """

    def __init__(self, state_size: int, *, warm_up: int = 20, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        self.warm_up = warm_up
        self.actor = Mlp(state_size, generator=generator)
        self.critic = Mlp(state_size + 1, generator=generator)
        self.slow_actor = Mlp(state_size, generator=generator)
        self.slow_critic = Mlp(state_size + 1, generator=generator)
        self.slow_actor.load_state_dict(self.actor.state_dict())
        self.slow_critic.load_state_dict(self.critic.state_dict())
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=ACTOR_RATE)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=CRITIC_RATE)
        self.memory: list[tuple[np.ndarray, float, float, np.ndarray, bool]] = []
        self.average_reward: float | None = None

    @torch.no_grad()
    def policy(self, state: np.ndarray) -> float:
        """The actor's own action, in ``(0, 1)``."""
        return float(torch.sigmoid(self.actor(_batch(state[None])))[0])

    def act(self, state: np.ndarray, episode: int) -> float:
        """The action to try: random while warming up, then the actor's with falling noise."""
        if episode < self.warm_up:
            return float(self.rng.uniform())
        deviation = NOISE * NOISE_DECAY ** (episode - self.warm_up)
        return truncated_normal(self.rng, self.policy(state), max(deviation, 1e-6))

    def observe(self, states: np.ndarray, actions: list[float], reward: float) -> None:
        """Remember an episode; every step of it has the episode's reward.

        Args:
            states: ``(steps, state_size)``.
            actions: as they were carried out.
        """
        for index, action in enumerate(actions):
            last = index == len(actions) - 1
            following = states[index if last else index + 1]
            self.memory.append((states[index], action, reward, following, last))
        del self.memory[:-MEMORY]
        before = reward if self.average_reward is None else self.average_reward
        self.average_reward = REWARD_DECAY * before + (1 - REWARD_DECAY) * reward

    def learn(self) -> tuple[float, float]:
        """One update of critic and actor from a batch of memories; their losses."""
        index = self.rng.integers(len(self.memory), size=min(BATCH, len(self.memory)))
        rows = [self.memory[i] for i in index]
        states, following = _batch([r[0] for r in rows]), _batch([r[3] for r in rows])
        actions, rewards = _batch([r[1] for r in rows]), _batch([r[2] for r in rows])
        going_on = 1 - _batch([float(r[4]) for r in rows])
        rewards = rewards - (self.average_reward or 0.0)
        with torch.no_grad():
            next_actions = torch.sigmoid(self.slow_actor(following))
            future = self.slow_critic(torch.cat([following, next_actions[:, None]], dim=1))
            target = rewards + going_on * future  # discount 1
        value = self.critic(torch.cat([states, actions[:, None]], dim=1))
        critic_loss = F.mse_loss(value, target)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()
        chosen = torch.sigmoid(self.actor(states))
        actor_loss = -self.critic(torch.cat([states, chosen[:, None]], dim=1)).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()
        _follow(self.slow_actor, self.actor)
        _follow(self.slow_critic, self.critic)
        return float(critic_loss.detach()), float(actor_loss.detach())


def _batch(values: object) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float32))


@torch.no_grad()
def _follow(slow: nn.Module, fast: nn.Module) -> None:
    for old, new in zip(slow.parameters(), fast.parameters(), strict=True):
        old.lerp_(new, TAU)
