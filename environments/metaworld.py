"""Meta-World: `pip install metaworld==3.1.1`, then `--env-id environments.metaworld:drawer-open-v3`, or any other task.

Each episode draws one of the task's 50 goals, which the state holds, and lasts 500 steps. The picture is that of camera
corner2, as in most papers; `--env-kwargs camera_name corner3` chooses another one.
"""

import gymnasium as gym
import metaworld
import numpy as np


class MetaWorld(gym.Wrapper):
    def __init__(self, camera_name, **options):
        options |= dict(camera_name=camera_name, seed=0, disable_env_checker=True)
        super().__init__(gym.make("Meta-World/MT1", **options))
        self.unwrapped.model.vis.quality.shadowsize = 1024  # not 4096: drawn 1.6 times as fast
        self.turns = 2 if camera_name.startswith("corner") else 0  # those cameras hang upside down

    def reset(self, *, seed=None, options=None):
        if seed is not None:  # the environment's own reset ignores it
            self.unwrapped.seed(seed)
        return super().reset()

    def render(self):
        return np.rot90(super().render(), self.turns)


for name in metaworld.ALL_V3_ENVIRONMENTS:
    defaults = dict(env_name=name, camera_name="corner2", width=64, height=64)
    gym.register(name, entry_point=MetaWorld, kwargs=defaults)
