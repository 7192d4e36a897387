"""The Behaviour Suite: `pip install bsuite`, then `--env-id environments.bsuite:catch-v0 --env-kwargs setting 3`.

The ids are the names of its 23 experiments; their settings are counted from 0, as in bsuite's own catch/3.
"""

import bsuite
import gymnasium as gym
from bsuite import sweep
from shimmy.bsuite_compatibility import BSuiteCompatibilityV0


def make(name, setting=0, render_mode=None):
    return BSuiteCompatibilityV0(bsuite.load(name, sweep.SETTINGS[f"{name}/{setting}"]))


for name in {setting.split("/")[0] for setting in sweep.SETTINGS}:
    gym.register(f"{name}-v0", entry_point=make, kwargs={"name": name})
