"""Crafter: `pip install crafter`, then `--env-id environments.crafter:Crafter-v1`, or CrafterNoReward-v1.

At an episode's end, info["log"] says which of the 22 achievements it unlocked, and gives the score of Crafter's paper,
arXiv:2109.06780: the geometric mean of their success rates in %, over the episodes of this environment so far.
"""

import crafter
import gymnasium as gym
import numpy as np


class World(crafter.Env):
    def _balance_object(self, chunk, objs, *rest):  # objs is a set, whose order differs between runs of one seed
        super()._balance_object(chunk, sorted(objs, key=lambda obj: tuple(obj.pos)), *rest)


class Crafter(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gym.spaces.Discrete(17)

    def __init__(self, render_mode=None, **options):
        self.render_mode, self.options, self.episodes = render_mode, options, []
        self.world = World(**options)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.world = World(**self.options, seed=seed)
        return self.world.reset(), {}

    def step(self, action):
        image, reward, over, info = self.world.step(action)
        dead, log = info["discount"] == 0, {}
        if over:
            unlocked = {f"achievement/{name}": count > 0 for name, count in info["achievements"].items()}
            self.episodes.append([*unlocked.values()])
            log = unlocked | {"score": np.expm1(np.log1p(100 * np.mean(self.episodes, 0)).mean())}
        return image, reward, dead, over and not dead, {"log": log}

    def render(self):
        return self.world.render((512, 512))

    def get_action_meanings(self):
        return self.world.action_names


gym.register("Crafter-v1", entry_point=Crafter)
gym.register("CrafterNoReward-v1", entry_point=Crafter, kwargs={"reward": False})
