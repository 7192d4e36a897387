"""Small environments for the tests: `--env-id toy_envs:<id>`."""

import os
import time

import gymnasium as gym
import numpy as np
from gymnasium import spaces

IMAGE = spaces.Box(0, 255, (16, 16, 3), np.uint8)
VECTOR = spaces.Box(-1, 1, (3,), np.float32)


class Mission(gym.Space):
    """A space that Gymnasium does not know, like the sentence that MiniGrid's environments observe."""

    def sample(self, mask=None, probability=None):
        return "go there"

    def contains(self, x):
        return isinstance(x, str)


class Toy(gym.Env):
    """Counts its steps; its episodes end after `length` of them; observation and action spaces as given."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, render_mode=None, observation=VECTOR, action=None, length=20, trouble=None, truncate=False):
        self.render_mode, self.length, self.trouble, self.truncate = render_mode, length, trouble, truncate
        self.observation_space, self.action_space = observation, action or spaces.Discrete(2)
        self.actions, self.resets = [], 0

    def value(self, space):
        """An observation that follows from seed, step and action."""
        if isinstance(space, spaces.Dict):
            return {key: self.value(part) for key, part in space.items()}
        if isinstance(space, spaces.Discrete):
            return space.start + self.count % space.n
        if isinstance(space, spaces.Text):
            return "text"
        if isinstance(space, (Mission, spaces.Tuple, spaces.MultiBinary, spaces.MultiDiscrete)):
            space.seed(self.number + self.count)
            return space.sample()
        number = self.number + self.count + self.last
        if space.dtype == np.uint8:
            return np.random.default_rng(number).integers(0, 256, space.shape, np.uint8)
        return np.full(space.shape, abs(np.sin(number)), space.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.last, self.number = 0, 0, int(self.np_random.integers(100))
        if self.trouble == "short":
            self.length = 5 + self.number % 10
        self.resets += 1
        if self.trouble == "reset" and self.resets == 2 and os.path.exists("go"):
            raise OSError("the simulator does not answer")
        if self.trouble == "random":
            self.number = int.from_bytes(os.urandom(4), "big")
        return self.value(self.observation_space), {}

    def step(self, action):
        self.count += 1
        self.actions.append(action)
        self.last = int(np.sum(action))
        reward, over = float(self.count), self.count >= self.length
        info = {"ragged": np.zeros(self.number + self.count), "log": None}
        if self.trouble == "success":
            log = {"steps/taken": self.count, "low": -self.count, "odd": self.number % 2 or None}  # None: no value
            info |= {"is_success": self.count == 7, "log": log}
        if os.path.exists("go") and self.count == 10:
            if self.trouble == "exit":
                os._exit(1)
            if self.trouble == "raise":
                raise ValueError("the robot fell\nover")
            if self.trouble == "nan":
                reward = float("nan")
            if self.trouble == "hang":
                time.sleep(1000)
        return self.value(self.observation_space), reward, over and not self.truncate, over and self.truncate, info

    def render(self):
        return np.full((24, 32, 3), self.count, np.uint8)


class NoRender(Toy):
    """Knows nothing of rendering, as older environments do."""

    metadata = {}

    def __init__(self):
        super().__init__()


MIXED = dict(front=IMAGE, back=spaces.Box(0, 255, (20, 24), np.uint8), arm=VECTOR, mode=spaces.Discrete(3, start=1))
MIXED |= dict(legs=spaces.Box(-np.inf, np.inf, (2, 2), np.float64), height=spaces.Box(-np.inf, np.inf, (), np.float32))
LOW, HIGH = np.array([-2, 0, -1], np.float32), np.array([2, 10, 1], np.float32)


def register(name, entry="toy_envs:Toy", **options):
    gym.register(name, entry_point=entry, kwargs=options, disable_env_checker=True)


register("Vector-v0")
register("NoRender-v0", "toy_envs:NoRender")
register("Cut-v0", truncate=True)
register("Mixed-v0", observation=spaces.Dict(MIXED))
register("Gray-v0", observation=spaces.Box(0, 255, (20, 24), np.uint8))
register("Image-v0", observation=IMAGE)
register("Class-v0", observation=spaces.Discrete(4, start=2))
register("Bounds-v0", action=spaces.Box(LOW, HIGH))
register("Start-v0", action=spaces.Discrete(3, start=5))
register("BadAction-v0", action=spaces.MultiDiscrete([2, 2]))
register("Half-v0", action=spaces.Box(5, np.inf, (2,)))
register("Huge-v0", action=spaces.Box(-3e38, 3e38, (2, 2)))
BYTES = dict(High=(3, 20, 24), Flat=(1, 20, 24), Stack=(4, 84, 84), Deep=(20, 24, 6), Frames=(4, 20, 24, 3))
BYTES |= dict(Grid=(7, 7, 3), Ram=(128,))
OBSERVATIONS = {name: spaces.Box(0, 255, shape, np.uint8) for name, shape in BYTES.items()} | {
    "Floats": spaces.Box(0, 1, (20, 24, 3), np.float32),
    "Tuple": spaces.Tuple([VECTOR, spaces.Discrete(3)]),
    "Binary": spaces.MultiBinary(4),
    "Classes": spaces.MultiDiscrete([3, 4]),
    "Mission": spaces.Dict(image=spaces.Box(0, 255, (7, 7, 3), "u1"), mission=Mission(), t=spaces.Text(9, charset="%")),
    "Keys": spaces.Dict({key: VECTOR for key in ["", 0, *"reward action stoch count is_first a.b a/b keys".split()]}),
}
for name, space in OBSERVATIONS.items():
    register(f"{name}-v0", observation=space)
for trouble in ("success", "reset", "exit", "raise", "nan", "random", "hang"):
    register(f"{trouble.capitalize()}-v0", trouble=trouble)
    register(f"{trouble.capitalize()}Image-v0", trouble=trouble, observation=IMAGE)


class Catch(gym.Env):
    """A ball falls through 6 rows of 5 columns, a paddle at the bottom moves left, stays or moves right.

    Reward at the end of the 5 steps: 1 if the paddle is under the ball, else -1. Perfect play: 1; random: about -0.6.
    """

    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"
    observation_space = spaces.Box(0, 255, (16, 16, 1), np.uint8)
    action_space = spaces.Discrete(3)

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
        image[12:14, round(3 * self.paddle) : round(3 * self.paddle) + 3] = 128
        return image


gym.register("Catch-v0", Catch)


class Glide(Catch):
    """The same with a paddle that moves by up to half a column; the last reward is 1 less the distance in columns.

    Perfect play: 1; random: about -0.3; staying: -0.2.
    """

    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def step(self, action):
        self.row += 1
        self.paddle = float(np.clip(self.paddle + action[0] / 2, 0, 4))
        over = self.row == 5
        return self.render(), 1.0 - abs(self.ball - self.paddle) if over else 0.0, over, False, {}


gym.register("Glide-v0", Glide)


class Follow(gym.Env):
    """Above, a white bar in one of 5 places; below, a black one that moves left, stays or moves right, for 10 steps.

    Each step with one below the other is worth 1. Perfect play: about 9.2; random: about 2; only staying: 2.
    """

    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"
    observation_space = spaces.Box(0, 255, (16, 16, 1), np.uint8)
    action_space = spaces.Discrete(3)

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, (self.goal, self.place) = 0, self.np_random.integers(5, size=2)
        return self.render(), {}

    def step(self, action):
        self.count += 1
        self.place = int(np.clip(self.place + action - 1, 0, 4))
        return self.render(), float(self.place == self.goal), False, self.count == 10, {}

    def render(self):
        image = np.full((16, 16, 1), 128, np.uint8)
        image[:8, 3 * self.goal : 3 * self.goal + 3] = 255
        image[8:, 3 * self.place : 3 * self.place + 3] = 0
        return image


gym.register("Follow-v0", Follow)


class Square(gym.Env):
    """A square on a ring of 4×4 places, in front of a fixed picture: goes right, left, down, up, or stays."""

    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"
    observation_space = spaces.Box(0, 255, (16, 16, 3), np.uint8)
    action_space = spaces.Discrete(5)
    moves = np.array([(0, 1), (0, -1), (1, 0), (-1, 0), (0, 0)])
    background = np.random.default_rng(0).integers(0, 100, (16, 16, 3), np.uint8)

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.count = self.np_random.integers(0, 4, 2), 0
        return self.render(), {}

    def step(self, action):
        self.place, self.count = (self.place + self.moves[action]) % 4, self.count + 1
        return self.render(), 0.0, False, self.count == 100, {}

    def render(self):
        image, (row, column) = self.background.copy(), 4 * self.place
        image[row : row + 4, column : column + 4] = (250, 200, 50)
        return image


gym.register("Square-v0", Square)
