"""Small environments of the tests, registered with Gymnasium: `--env-id tiny_envs:Catch-v0`."""

import gymnasium as gym
import numpy as np


class Catch(gym.Env):
    """A ball falls through 6 rows of 5 columns, a paddle at the bottom moves left, stays or moves right.

    Reward at the end of the 5 steps: 1 if the paddle is under the ball, else -1. Perfect play: 1; random: about -0.6.
    """

    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"
    observation_space = gym.spaces.Box(0, 255, (16, 16, 1), np.uint8)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.row, self.ball, self.paddle = 0, int(self.np_random.integers(5)), 2
        return self.render(), {}

    def step(self, action):
        self.row += 1
        self.paddle = int(np.clip(self.paddle + action - 1, 0, 4))
        over = self.row == 5
        return self.render(), (1.0 if self.ball == self.paddle else -1.0) if over else 0.0, over, False, {}

    def render(self):
        image = np.zeros((16, 16, 1), np.uint8)
        image[2 * self.row : 2 * self.row + 2, 3 * self.ball : 3 * self.ball + 3] = 255
        image[12:14, 3 * self.paddle : 3 * self.paddle + 3] = 128
        return image


gym.register("Catch-v0", Catch)
