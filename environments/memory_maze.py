"""Memory Maze: `pip install memory-maze gym`, then `--env-id environments.memory_maze:9x9-v0`, or 11x11 to 15x15."""

import gymnasium as gym
from memory_maze import tasks
from shimmy.dm_control_compatibility import DmControlCompatibilityV0


class MemoryMaze(DmControlCompatibilityV0):
    def __init__(self, size, render_mode=None, **options):
        self.make = lambda seed: getattr(tasks, f"memory_maze_{size}")(image_only_obs=True, seed=seed, **options)
        super().__init__(self.make(0), render_mode, render_kwargs=dict(width=256, height=256, camera_id=0))

    def reset(self, *, seed=None, options=None):
        if seed is not None:  # its random mazes are drawn from the seed that it was made with
            self._env = self.make(seed)
        return super().reset()


for size in ("9x9", "11x11", "13x13", "15x15"):
    gym.register(f"{size}-v0", entry_point=MemoryMaze, kwargs={"size": size})
