"""The pond that genie.py's first run learns from, drawn here: `--env-id environments.pond:Pond-v0`.

An environment of one's own needs no more than this; `expert()` is for `genie.py --clone`, and optional.
"""

import cv2
import gymnasium as gym
import numpy as np


class Pond(gym.Env):
    """A duck on a pond whose edges meet: it turns and swims right, left, down or up by its size, or stays to dabble.
    A boat passes; the reward is 1 where the duck is at its middle. All that happens shows at once and everywhere."""

    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"
    observation_space, action_space = gym.spaces.Box(0, 255, (32, 32, 3), np.uint8), gym.spaces.Discrete(5)
    moves = np.array([(0, 8), (0, -8), (8, 0), (-8, 0), (0, 0)])
    light = cv2.resize(np.random.default_rng(0).random((5, 5)), (32, 32), interpolation=cv2.INTER_CUBIC)[..., None]
    water = (np.array([30, 90, 150]) + np.array([20, 40, 40]) * light.clip(0, 1)).astype(np.uint8)
    right = "...yyy.. ..yykyoo ..yyyyo. y...yy.. yyyyyyy. yygggyy. .yyyyyy. ..yyyy..".split()
    left = [line[::-1] for line in right]
    down = "..yyyy.. .ykyyky. .yyooyy. ..yooy.. .yyyyyy. gyyyyyyg gyyyyyyg ..yyyy..".split()
    up = "..yyyy.. .yyyyyy. .yyyyyy. ..yyyy.. .yyyyyy. ygyyyygy yggyyggy ..yyyy..".split()
    dabble = "........ ........ ...yy... ..yyyy.. ..yggy.. .yggggy. w.w..w.w ........".split()
    boat = "......w..... .....ww..... ....www..... ...wwww..... ......b..... .bbbbbbbbbb. ..bbbbbbbb..".split()
    colours = dict(y=(250, 210, 60), g=(220, 170, 40), o=(240, 120, 30), k=(20,) * 3, w=(245,) * 3, b=(120, 70, 40))

    def __init__(self, render_mode=None):
        self.ducks = self.right, self.left, self.down, self.up, self.dabble

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.place, self.sailed = 0, 8 * self.np_random.integers(4, size=2), self.np_random.integers(32)
        self.duck = self.right
        return self.render(), {}

    def step(self, action):
        self.count, self.place, self.sailed = self.count + 1, self.place + self.moves[action], self.sailed + 1
        self.duck = self.ducks[action]
        return self.render(), float(not self.way(self.sailed).any()), False, self.count == 200, {}

    def way(self, sailed):
        """Rows and columns of places, from -1 to 2, from the duck to the middle of a boat that has sailed so far."""
        return (np.array([1, (sailed + 6) // 8]) - self.place // 8 + 1) % 4 - 1

    def expert(self):
        """The action of one who goes where the boat will be: what --clone learns from."""
        row, column = np.sign(self.way(self.sailed + 1))
        return [4, 2, 3][row] if row else [4, 0, 1][column]

    def render(self):
        image = self.water.copy()
        for sprite, (top, left) in ((self.boat, (10, self.sailed)), (self.duck, self.place)):
            for row, line in enumerate(sprite, top):
                for column, colour in enumerate(line, left):
                    if colour != ".":
                        image[row % 32, column % 32] = self.colours[colour]
        return image


gym.register("Pond-v0", Pond)
