"""Procgen's 16 games: `pip install -r requirements.txt procgen-mirror "setuptools<81"`, which brings NumPy 1.26, then
`--env-id environments.procgen:coinrun-v0`. `--env-kwargs start_level 0 num_levels 10000` chooses levels (default: all),
`distribution_mode easy` their mode (hard), `native True` the game's own 64×64 picture instead of a resized 512×512 one.
"""

import gymnasium as gym
import numpy as np

try:
    from procgen.env import ENV_NAMES, ProcgenGym3Env
except ImportError as error:
    raise ImportError("Procgen: pip install -r requirements.txt procgen-mirror 'setuptools<81'") from error


class Procgen(gym.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}
    action_space = gym.spaces.Discrete(15)

    def __init__(self, render_mode=None, native=False, **options):
        self.render_mode, self.native = render_mode, native
        self.options = options | dict(num=1, num_threads=0, render_mode=None if native else "rgb_array")
        self.game = ProcgenGym3Env(**self.options)
        self.observation_space = gym.spaces.Box(0, 255, (64, 64, 3) if native else (512, 512, 3), np.uint8)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.game = ProcgenGym3Env(**self.options, rand_seed=seed % 2**31)
        elif not self.game.observe()[2][0]:  # in the middle of an episode: the action -1 starts the next level
            self.game.act(np.array([-1]))
        return self.render(), {}

    def step(self, action):
        last = self.picture
        self.game.act(np.array([action]))
        (reward,), _, (over,) = self.game.observe()
        info = {"success": bool(self.game.get_info()[0]["prev_level_complete"])} if over else {}
        return last if over else self.render(), float(reward), bool(over), False, info  # at the end: the next level

    def render(self):
        self.picture = self.game.observe()[1]["rgb"][0] if self.native else self.game.get_info()[0]["rgb"]
        return self.picture


for name in ENV_NAMES:
    gym.register(f"{name}-v0", entry_point=Procgen, kwargs={"env_name": name})
