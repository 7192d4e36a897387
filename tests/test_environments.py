"""Environments: all that they observe becomes images and vectors, all that they take is scaled or counted from 0."""

import importlib
import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from conftest import PORTED, environment
from PIL import Image

house = importlib.import_module(PORTED[-1])


def arguments(flags):
    return house.parse_args(["--env-id", *flags.split()])


def make(flags):
    return house.make_env(arguments(flags))


def shapes(env):
    return {key: space.shape for key, space in env.observation_space.items()}


def check(env, obs):
    """Observations are as their spaces say: bytes of the asked size, or vectors of finite floats."""
    assert obs.keys() == env.observation_space.spaces.keys()
    for key, space in env.observation_space.items():
        assert (obs[key].shape, obs[key].dtype) == (space.shape, space.dtype), key
        assert (space.dtype, len(space.shape)) in ((np.uint8, 3), (np.float32, 1)), key
        assert np.isfinite(obs[key]).all(), key


def run(env, steps):
    """Random actions -> observations, rewards."""
    env.action_space.seed(0)
    obs, rewards = [env.reset(seed=0)[0]], []
    for _ in range(steps):
        check(env, obs[-1])
        step = env.step(env.action_space.sample())
        obs, rewards = [*obs, step[0]], [*rewards, step[1]]
        if step[2] or step[3]:
            env.reset()
    assert np.isfinite(rewards).all()
    return obs, rewards


make("CartPole-v1")  # chooses MuJoCo's OpenGL, before dm_control is imported
CONTROL = pytest.importorskip("dm_control.suite")

# The DeepMind Control Suite


@pytest.mark.parametrize("task", CONTROL.ALL_TASKS, ids="-".join)
def test_control_from_state(task):
    """All that the task observes, after as many control steps as there are frames, rewards summed."""
    env, plain = make(f"dmc-{'-'.join(task)} --obs state"), CONTROL.load(*task)
    plain.physics.model.jnt_stiffness[:] = env.unwrapped.physics.model.jnt_stiffness  # drawn when lqr is made
    plain.task._random = np.random.RandomState(0)
    plain.reset()
    obs, rewards = run(env, 3)
    env.action_space.seed(0)
    spec = plain.action_spec()
    for given, reward in zip(obs[1:], rewards, strict=True):
        share = (env.action_space.sample() + 1) / 2
        steps = [plain.step(spec.minimum + share * (spec.maximum - spec.minimum)) for _ in range(2)]
        assert reward == pytest.approx(sum(step.reward for step in steps), rel=1e-4, abs=1e-4)
        for key, value in steps[-1].observation.items():
            assert np.linalg.norm(given[key] - np.ravel(value)) < 0.01 * (1 + np.linalg.norm(value)), key
    assert given.keys() == steps[-1].observation.keys()


@pytest.mark.parametrize("task, camera", [("walker-walk", 0), ("quadruped-walk", 2), ("cup-catch", 0)])
def test_control_from_pixels(task, camera):
    """The picture is the one that dm_control renders with the settings of the authors, at the same state."""
    env, plain = make(f"dmc-{task}"), CONTROL.load(*task.replace("cup", "ball_in_cup").split("-"))
    visual = plain.physics.model.vis
    visual.global_.offwidth, visual.global_.offheight, visual.quality.shadowsize = 64, 64, 1024
    obs, _ = run(env, 5)
    with plain.physics.reset_context():
        plain.physics.set_state(env.unwrapped.physics.get_state())
    assert shapes(env) == {"image": (64, 64, 3)} and obs[-1]["image"].std() > 5
    assert env.unwrapped.physics.contexts.mujoco.ptr.offWidth == 64  # nothing larger is drawn on: a tenth faster
    np.testing.assert_array_equal(obs[-1]["image"], plain.physics.render(64, 64, camera_id=camera))


def test_control_from_both():
    expected = dict(height=(1,), image=(64, 64, 3), orientations=(14,), velocity=(9,))
    assert shapes(make("dmc-walker-walk --obs both")) == expected


# Atari


def picture(frames, size, grey):
    """As the authors make it: maximum of two frames, Pillow's bilinear resize, then weights for grey."""
    image = Image.fromarray(np.max(frames[-2:], 0)).resize((size, size), Image.Resampling.BILINEAR)
    weights = np.array([0.299, 0.587, 1 - (0.299 + 0.587)])
    return (np.asarray(image) * weights).sum(-1).astype(np.uint8) if grey else np.asarray(image)


@pytest.mark.parametrize("suite, actions, sticky, size", [("atari", 18, 0.25, 96), ("atari100k", 6, 0.0, 64)])
def test_atari(suite, actions, sticky, size):
    pytest.importorskip("ale_py")
    env = make(f"{suite}-space_invaders")
    ale, grey, frames, taken, rewards, noops = env.unwrapped.ale, suite == "atari", [], [], [], set()
    assert env.action_space.n == actions and ale.getFloat("repeat_action_probability") == sticky
    step = env.unwrapped.step

    def watched(action):
        result = step(action)
        frames.append(ale.getScreenRGB())
        taken.append(action)
        rewards.append(result[1])
        return result

    env.unwrapped.step, total = watched, 0.0
    for seed in range(25):
        taken.clear()
        env.reset(seed=seed)
        assert set(taken) <= {0}
        noops.add(len(taken))
    assert min(noops) < 6 and 24 < max(noops) <= 30 and len(noops) > 10
    rng = np.random.default_rng(0)
    for turn in range(200):
        for record in (frames, taken, rewards):
            record.clear()
        action = int(rng.integers(actions))
        obs, reward, *_ = env.step(action)
        assert taken == [action] * 4 and reward == sum(rewards)
        total += reward
        truth = picture(frames, size, grey).reshape(size, size, -1) if turn < 50 else obs["image"]
        np.testing.assert_array_equal(obs["image"], truth)
    assert total > 0


@pytest.mark.parametrize("env_id", ["ALE/MsPacman-v5", "atari100k-MsPacman", "atari100k-ms-pacman"])
def test_atari_by_other_names(env_id):
    pytest.importorskip("ale_py")
    env = make(env_id)
    assert shapes(env) == {"image": (64, 64, 3)} and env.action_space.n == 9
    run(env, 5)


# Any Gymnasium environment

VECTORS = dict(Grid=147, Ram=128, Tuple=6, Binary=4, Classes=7, Class=4, NoRender=3)
IMAGES = dict(Gray=1, High=3, Flat=1, Stack=4, Deep=6)
OBSERVED = {f"toy_envs:{name}-v0": {"vector": (size,)} for name, size in VECTORS.items()}
OBSERVED |= {f"toy_envs:{name}-v0": {"image": (64, 64, channels)} for name, channels in IMAGES.items()}
OBSERVED |= {"CartPole-v1": {"vector": (4,)}, "CartPole-v1 --obs pixels": {"image": (64, 64, 3)}}
OBSERVED |= {"CartPole-v1 --obs both": {"vector": (4,), "image": (64, 64, 3)}, "CarRacing-v3": {"image": (64, 64, 3)}}
PICTURES, NUMBERS = dict(front=(64, 64, 3), back=(64, 64, 1)), dict(arm=(3,), legs=(4,), height=(1,), mode=(3,))
OBSERVED |= {"toy_envs:Mixed-v0 --obs pixels": PICTURES, "toy_envs:Mixed-v0 --obs state": NUMBERS}
OBSERVED |= {"toy_envs:Image-v0 --obs both --image-size 32": {"image": (32, 32, 3)}}
OBSERVED |= {"toy_envs:Mixed-v0": PICTURES | NUMBERS, "Pendulum-v1": {"vector": (3,)}}


@pytest.mark.parametrize("flags, expected", OBSERVED.items())
def test_observations(flags, expected):
    env = make(flags)
    assert shapes(env) == expected
    obs, _ = run(env, 30)
    assert any(not np.array_equal(obs[0][key], obs[5][key]) for key in expected)


@pytest.mark.parametrize("name", ["Image", "Gray", "High", "Flat", "Deep"])
def test_images_keep_their_pixels(name):
    """Resized by area with channels last: the mean stays; at its own size an image is not touched."""
    env = make(f"toy_envs:{name}-v0")
    obs, raw = env.reset(seed=0)[0]["image"], env.unwrapped.value(env.unwrapped.observation_space)
    raw = raw.transpose(1, 2, 0) if name in ("High", "Flat") else raw
    raw = raw.reshape(*raw.shape[:2], -1)
    np.testing.assert_allclose(obs.mean((0, 1)), raw.mean((0, 1)), atol=4)
    np.testing.assert_allclose(obs[0, 0], raw[0, 0], atol=1)
    if name == "Image":
        assert np.array_equal(make("toy_envs:Image-v0 --image-size 16").reset(seed=0)[0]["image"], raw)


@pytest.mark.parametrize("image", [np.zeros((20, 24, 3), np.uint8), np.zeros((3, 20, 24))])
def test_an_image_unlike_its_space_is_an_error(image):
    env = make("toy_envs:High-v0")
    env.unwrapped.value = lambda _: image  # another order of axes, floats
    with pytest.raises((TypeError, ValueError), match="cannot reshape|Cannot cast"):
        env.reset()


@pytest.mark.parametrize("obs, expected", [("pixels", {"render": (64, 64, 3)}), ("state", {"image": (147,)})])
def test_an_unknown_space_is_left_out_with_a_line(obs, expected):
    with pytest.warns(UserWarning, match="'mission' is left out"):
        env = make(f"toy_envs:Mission-v0 --obs {obs}")
    assert shapes(env) == expected
    run(env, 5)


def test_no_key_of_an_observation_gets_lost():
    env, kept = make("toy_envs:Keys-v0"), {"reward", "action", "deter", "stoch", "count", *house.FLAGS}  # by the replay
    assert len(env.observation_space) == 10 and not set(env.observation_space) & kept
    run(env, 5)


def test_a_module_of_its_own(tmp_path, monkeypatch):
    text = "import gymnasium as gym\nfrom toy_envs import Toy\ngym.register('MyEnv-v0', entry_point=Toy)\n"
    (tmp_path / "my_package.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    run(make("my_package:MyEnv-v0"), 50)


REFUSED = {"toy_envs:NoSuchThing-v0": "NoSuchThing", "toy_envs:Half-v0": "bounds", "toy_envs:Huge-v0": "bounds"}
REFUSED |= {"toy_envs:Floats-v0": "uint8", "toy_envs:Frames-v0": "no older", "atari-pong --obs state": "--obs state"}
REFUSED |= {"toy_envs:Vector-v0 --env-kwargs no_such 1": "no_such", "toy_envs:NoRender-v0 --obs pixels": "render"}


@pytest.mark.parametrize("flags, word", REFUSED.items())
def test_what_is_not_supported_is_refused_in_one_line(flags, word):
    with pytest.raises(SystemExit) as error:
        house.make_envs(arguments(flags), 1)
    assert word in error.value.code and "\n" not in error.value.code


# Actions, rewards, episodes

RANGES = [("toy_envs:Bounds-v0", [-2, 0, -1], [0, 5, 0], [2, 10, 1]), ("Pendulum-v1", [-2], [0], [2])]
RANGES += [("CarRacing-v3", [-1, 0, 0], [0, 0.5, 0.5], [1, 1, 1])]


@pytest.mark.parametrize("name, low, middle, high", RANGES)
def test_actions_are_scaled(name, low, middle, high):
    env, given = make(name), []
    inner = env.unwrapped
    step = inner.step
    env.reset(seed=0)
    inner.step = lambda action: given.append(action) or step(action)
    assert env.action_space == gym.spaces.Box(-1, 1, (np.size(low),))
    for value in (-1, 0, 1, -9, 9):
        env.step(np.full(env.action_space.shape, value, np.float32))
    np.testing.assert_array_equal(given, np.array([low, middle, high, low, high], np.float32))
    assert all(inner.action_space.contains(action) for action in given)


def test_discrete_actions_that_do_not_start_at_zero():
    env = make("toy_envs:Start-v0")
    assert env.action_space == gym.spaces.Discrete(3)
    env.reset(seed=0)
    for action in range(3):
        env.step(np.int64(action))
    assert env.unwrapped.actions == [5, 6, 7]


@pytest.mark.parametrize("repeat", [1, 3])
def test_action_repeat_sums_rewards_and_stops_at_the_end(repeat):
    env = make(f"toy_envs:Vector-v0 --action-repeat {repeat}")
    env.reset(seed=0)
    rewards, over = [], False
    while not over:
        _, reward, over, _, _ = env.step(0)
        rewards.append(reward)
    frames = np.arange(1, 21)
    assert rewards == [frames[i : i + repeat].sum() for i in range(0, 20, repeat)]


LIMITS = {"toy_envs:Vector-v0 --time-limit 12": 12, "toy_envs:Vector-v0 --env-kwargs max_episode_steps 12": 12}
LIMITS |= {"toy_envs:Vector-v0 --action-repeat 3 --time-limit 12": 4, "toy_envs:Cut-v0": 20}
LIMITS |= {"dmc-cartpole-balance --obs state --time-limit 12": 6, "dmc-cartpole-balance --obs state": 500}


@pytest.mark.parametrize("flags, steps", LIMITS.items())
def test_time_limits_are_in_frames_and_no_terminations(flags, steps):
    env = make(flags)
    env.reset(seed=0)
    ends = [env.step(np.zeros(env.action_space.shape, env.action_space.dtype))[2:4] for _ in range(steps)]
    assert ends == [(False, False)] * (steps - 1) + [(False, True)]


# Several environments


def test_processes_give_the_same_records_as_one():
    """Environments that draw live in processes of their own; the records do not depend on that, and the next step
    after an episode's end resets. Their infos may hold anything."""
    args = arguments("toy_envs:Image-v0")
    envs, plain = house.make_envs(args, 2), house.make_envs(args, 1)
    assert isinstance(envs, gym.vector.AsyncVectorEnv) and isinstance(plain, gym.vector.SyncVectorEnv)
    assert isinstance(house.make_envs(arguments("toy_envs:Vector-v0"), 2), gym.vector.SyncVectorEnv)
    first, same = envs.reset(seed=[3, 4])[0]["image"], plain.reset(seed=[3])[0]["image"]
    assert np.array_equal(first[0], same[0]) and not np.array_equal(*first)
    ends = []
    for t in range(45):
        (obs, reward, over, _, info), (one, number, *_) = envs.step(np.array([t % 2, 1])), plain.step(np.array([t % 2]))
        assert np.array_equal(obs["image"][0], one["image"][0]) and reward[0] == number[0]
        ends.append(over[0])
        if over[0]:
            assert info["episode"]["r"][0] == 210 and info["episode"]["l"][0] == 20
    envs.close()
    assert np.flatnonzero(ends).tolist() == [19, 40]  # one step of each episode resets


# Rendering


def test_mujoco_draws_with_egl_where_there_is_no_display(monkeypatch):
    for settings, choice in (({}, "egl"), ({"MUJOCO_GL": "glfw"}, "glfw"), ({"DISPLAY": ":0"}, None)):
        for name in ("MUJOCO_GL", "DISPLAY"):
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        make("toy_envs:Vector-v0")
        assert os.environ.get("MUJOCO_GL") == choice


@pytest.mark.slow
def test_mujoco_renders_without_a_display():
    code = f"""
import {house.__name__} as s
if __name__ == "__main__":
    envs = s.make_envs(s.parse_args(["--env-id", "Ant-v5", "--obs", "pixels"]), 2)
    obs, _ = envs.reset(seed=0)
    print(obs["image"].shape, obs["image"].std() > 5)
    envs.close()
"""
    env = {key: value for key, value in environment().items() if key not in ("DISPLAY", "MUJOCO_GL")}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert result.stdout == "(2, 64, 64, 3) True\n", result.stderr
