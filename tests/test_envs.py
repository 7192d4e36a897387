"""Environments: any of them becomes the same kind of record, and each can be brought back to where it was."""

import importlib
import os

import gymnasium as gym
import numpy as np
import pytest
import toy_envs
from conftest import SCRIPTS

importlib.import_module(SCRIPTS[-1]).choose_opengl()  # before dm_control is imported
CONTROL = pytest.importorskip("dm_control.suite").ALL_TASKS


def arguments(script, env_id, **values):
    """Args as the command line gives them, presets included."""
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in values.items()]
    return script.parse_args(["--env-id", env_id, *flags])


def make(script, env_id, **values):
    return script.make_env(arguments(script, env_id, **values))


def check(env, obs):
    """Every value is as its space says; there are only images, vectors and classes."""
    assert obs.keys() == env.observation_space.spaces.keys()
    for key, space in env.observation_space.items():
        value = np.asarray(obs[key])
        assert value.shape == space.shape, key
        if isinstance(space, gym.spaces.Discrete):
            assert 0 <= int(value) < space.n and space.start == 0, key
        else:
            assert value.dtype == space.dtype and space.dtype in (np.uint8, np.float32), key
            assert space.dtype == np.float32 or len(space.shape) == 3, key


def run(env, steps=300, seed=0):
    """Random steps -> how many episodes ended."""
    env.action_space.seed(seed)
    obs, _ = env.reset(seed=seed)
    check(env, obs)
    assert (obs["is_first"], obs["is_last"], obs["is_terminal"]) == (1, 0, 0)
    ends, was_last = 0, False
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        check(env, obs)
        assert not terminated and not truncated and np.isfinite(reward)
        assert obs["is_first"] == was_last and (reward == 0 or not was_last)
        assert obs["is_terminal"] <= obs["is_last"]
        was_last = bool(obs["is_last"])
        ends += was_last
    return ends


@pytest.mark.parametrize("task", CONTROL, ids="-".join)
def test_all_of_the_control_suite_from_state(house, task):
    env = make(house, "dmc-" + "-".join(task), obs="state")
    assert all(space.dtype != np.uint8 for space in env.observation_space.values())
    assert env.action_space.low.min() == -1 and env.action_space.high.max() == 1
    run(env, 5)


@pytest.mark.parametrize("env_id", ["dmc-walker-walk", "dmc-cup-catch"])
def test_the_control_suite_from_pixels(house, env_id):
    env = make(house, env_id)
    assert {k: v.shape for k, v in env.observation_space.items() if k not in house.FLAGS} == {"image": (64, 64, 3)}
    one = env.reset(seed=1)[0]["image"]
    run(env, 5)
    two = env.reset(seed=1)[0]["image"]
    assert one.std() > 5 and np.array_equal(one, two)
    assert not np.array_equal(one, env.reset(seed=2)[0]["image"])


def test_the_control_suite_from_both(house):
    env = make(house, "dmc-walker-walk", obs="both")
    assert {"image", "orientations", "height", "velocity"} <= set(env.observation_space)
    assert env.observation_space["height"].shape == ()


ATARI = {  # arguments -> image, actions
    ("atari-pong",): ((96, 96, 1), 18),
    ("atari100k-pong",): ((64, 64, 3), 6),
    ("atari-ms_pacman",): ((96, 96, 1), 18),
}


@pytest.mark.parametrize("case", ATARI)
def test_atari(house, case):
    pytest.importorskip("ale_py")
    shape, actions = ATARI[case]
    env = make(house, *case)
    assert env.observation_space["image"].shape == shape and env.action_space.n == actions
    run(env, 50)
    sticky = env.unwrapped.ale.getFloat("repeat_action_probability")
    assert sticky == (0.25 if case[0].startswith("atari-") else 0.0)


@pytest.mark.parametrize(
    "env_id, obs, keys",
    [
        ("CartPole-v1", "state", {"vector": (4,)}),
        ("CartPole-v1", "pixels", {"image": (64, 64, 3)}),
        ("CartPole-v1", "both", {"vector": (4,), "image": (64, 64, 3)}),
        ("CarRacing-v3", "pixels", {"image": (64, 64, 3)}),
        ("Pendulum-v1", "state", {"vector": (3,)}),
        ("toy_envs:Vector-v0", "state", {"vector": (3,)}),
        ("toy_envs:Gray-v0", "pixels", {"image": (64, 64, 1)}),
        ("toy_envs:NoRender-v0", "state", {"vector": (3,)}),
        ("toy_envs:Class-v0", "state", {"vector": ()}),
    ],
)
def test_gymnasium(house, env_id, obs, keys):
    env = make(house, env_id, obs=obs)
    assert {k: v.shape for k, v in env.observation_space.items() if k not in house.FLAGS} == keys
    ends = run(env, 120 if env_id != "CarRacing-v3" else 30)
    assert ends > 1 or env_id in ("CarRacing-v3", "Pendulum-v1")


@pytest.mark.parametrize("obs, keys", [("", 6), ("pixels", 2), ("state", 4), ("both", 6)])
def test_a_dict_of_images_vectors_and_classes(house, obs, keys):
    env = make(house, "toy_envs:Mixed-v0", **({"obs": obs} if obs else {}))
    shapes = {"front": (64, 64, 3), "back": (64, 64, 1), "arm": (3,), "legs": (4,), "height": (), "mode": ()}
    spaces = {k: v for k, v in env.observation_space.items() if k not in house.FLAGS}
    assert len(spaces) == keys and all(space.shape == shapes[key] for key, space in spaces.items())
    if "mode" in spaces:
        assert spaces["mode"] == gym.spaces.Discrete(3)
        assert [env.reset(seed=0)[0]["mode"], env.step(0)[0]["mode"], env.step(0)[0]["mode"]] == [0, 1, 2]
    run(env, 50)


def test_a_module_of_its_own(house, tmp_path, monkeypatch):
    (tmp_path / "my_package.py").write_text(
        "import gymnasium as gym\nfrom toy_envs import Toy\ngym.register('MyEnv-v0', entry_point=Toy)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    run(make(house, "my_package:MyEnv-v0"), 50)


def test_images_are_resized_by_area_and_not_touched_at_their_size(house):
    env = make(house, "toy_envs:Image-v0", image_size=16)
    obs, raw = env.reset(seed=0)[0]["image"], env.unwrapped
    assert np.array_equal(obs, raw.value(raw.observation_space))
    env = make(house, "toy_envs:Image-v0", image_size=32)
    assert np.array_equal(env.reset(seed=0)[0]["image"], obs.repeat(2, 0).repeat(2, 1))


def test_box_actions_are_rescaled(house):
    env = make(house, "toy_envs:Bounds-v0")
    assert env.action_space == gym.spaces.Box(-1, 1, (3,))
    env.reset(seed=0)
    for action, expected in (
        ([-1, -1, -1], [-2, 0, -1]),
        ([1, 1, 1], [2, 10, 1]),
        ([0, 0.5, 0.5], [0, 7.5, 0.5]),
        ([-3, 9, 9], [-2, 10, 1]),
    ):
        env.step(np.array(action, np.float32))
        given = env.unwrapped.actions[-1]
        np.testing.assert_array_equal(given, np.array(expected, np.float32))
        assert env.unwrapped.action_space.contains(given)


@pytest.mark.parametrize("env_id", ["CarRacing-v3", "Pendulum-v1"])
def test_rescaled_actions_lie_in_the_space(house, env_id):
    env = make(house, env_id)
    inner, given = env.unwrapped, []
    step = inner.step
    env.reset(seed=0)
    inner.step = lambda action: given.append(action) or step(action)
    for sign in (-1, 1):
        env.step(np.full(env.action_space.shape, sign, np.float32))
    np.testing.assert_array_equal(given, [inner.action_space.low, inner.action_space.high])
    assert all(inner.action_space.contains(action) for action in given)


def test_discrete_actions_that_do_not_start_at_zero(house):
    env = make(house, "toy_envs:Start-v0")
    assert env.action_space == gym.spaces.Discrete(3)
    env.reset(seed=0)
    for action in range(3):
        env.step(action)
    assert env.unwrapped.actions == [5, 6, 7]


@pytest.mark.parametrize("env_id, terminal", [("toy_envs:Vector-v0", 1), ("toy_envs:Cut-v0", 0)])
def test_episodes(house, env_id, terminal):
    """The end comes with its last observation; the reset comes alone in the step after, whatever the action."""
    env = make(house, env_id)
    env.reset(seed=0)
    records = [env.step(1) for _ in range(42)]
    flags = [(obs["is_first"], obs["is_last"], obs["is_terminal"]) for obs, *_ in records]
    assert flags[:20] == 19 * [(0, 0, 0)] + [(0, 1, terminal)]
    assert flags[20] == (1, 0, 0) and records[20][1] == 0.0 and env.unwrapped.actions[:20] == 20 * [1]
    assert [reward for _, reward, *_ in records[:20]] == list(range(1, 21))
    assert flags[21:41] == flags[:20] and flags[41] == (1, 0, 0)
    assert len(env.unwrapped.actions) == 40


def test_episodes_differ_by_seed_and_environment(house):
    args = arguments(house, "toy_envs:Vector-v0")
    first = lambda index, seed: house.make_env(args, index).reset(seed=seed)[0]["vector"][0]  # noqa: E731
    assert first(0, 1) == first(0, 1)
    assert len({first(0, 1), first(1, 1), first(0, 2), first(1, 2)}) == 4


@pytest.mark.parametrize("repeat", [1, 3])
def test_action_repeat_sums_rewards_and_stops_at_the_end(house, repeat):
    env = make(house, "toy_envs:Vector-v0", action_repeat=repeat)
    env.reset(seed=0)
    rewards, over = [], False
    while not over:
        obs, reward, *_ = env.step(0)
        rewards.append(reward)
        over = obs["is_last"]
    frames = np.arange(1, 21)
    assert rewards == [frames[i : i + repeat].sum() for i in range(0, 20, repeat)]


@pytest.mark.parametrize(
    "env_id, repeat, limit, steps",
    [
        ("toy_envs:Vector-v0", 1, 12, 12),
        ("toy_envs:Vector-v0", 3, 12, 4),
        ("dmc-cartpole-balance --obs state", 2, 12, 6),
        ("dmc-cartpole-balance --obs state", 2, None, 500),
        ("atari-pong", 4, 40, 10),
    ],
)
def test_time_limits_are_in_frames_and_no_terminations(house, env_id, repeat, limit, steps):
    env_id, *flags = env_id.split()
    flags += ["--time-limit", str(limit)] if limit else []
    env = house.make_env(house.parse_args(["--env-id", env_id, "--action-repeat", str(repeat), *flags]))
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape, env.action_space.dtype)
    for step in range(1, steps + 1):
        obs = env.step(action)[0]
        assert obs["is_last"] == (step == steps) and not obs["is_terminal"]


def test_processes_give_the_same_records_as_one(house):
    """AsyncVectorEnv for pixels, SyncVectorEnv otherwise; the records do not depend on which it is."""
    args = arguments(house, "toy_envs:Image-v0")
    both = [house.make_envs(args, 2), gym.vector.SyncVectorEnv([lambda i=i: house.make_env(args, i) for i in range(2)])]
    assert isinstance(both[0], gym.vector.AsyncVectorEnv)
    assert isinstance(house.make_envs(arguments(house, "toy_envs:Vector-v0"), 2), gym.vector.SyncVectorEnv)
    records = [[envs.reset(seed=[3, 3])[0] for envs in both]]
    rewards = []
    for t in range(45):
        steps = [envs.step(np.array([t % 2, 1 - t % 2])) for envs in both]
        records.append([step[0] for step in steps])
        rewards.append([step[1] for step in steps])
    for one, two in records:
        for key in one:
            np.testing.assert_array_equal(one[key], two[key])
    np.testing.assert_array_equal(*zip(*rewards, strict=True))
    assert sum(one["is_first"].sum() for one, _ in records) == 6
    for envs in both:
        envs.close()


@pytest.mark.parametrize(
    "env_id, flags",
    [
        ("dmc-walker-walk", "--obs state --time-limit 30"),
        ("dmc-walker-walk", "--time-limit 12"),
        ("atari-pong", "--time-limit 60"),
        ("atari100k-breakout", "--time-limit 60"),
        ("CartPole-v1", ""),
        ("CarRacing-v3", "--time-limit 15"),
    ],
)
@pytest.mark.parametrize("at", ["middle", "end", "start"])
def test_restore_goes_back_into_an_episode(house, env_id, flags, at):
    args = house.parse_args(["--env-id", env_id, *flags.split()])
    env = house.make_env(args, 1)
    env.action_space.seed(5)
    obs, actions, episode = env.reset(seed=7)[0], [], 0
    while True:  # into the second episode
        if obs["is_first"]:
            actions = []
        if episode and {"start": obs["is_first"], "middle": len(actions) == 4, "end": obs["is_last"]}[at]:
            break
        episode += obs["is_last"]
        actions.append(env.action_space.sample())
        obs = env.step(actions[-1])[0]
    again = house.make_env(args, 1)
    records = [(obs, 0.0), (again.restore({1: (7, episode, actions)}), 0.0)]
    for action in [env.action_space.sample() for _ in range(12)]:
        for key in obs:
            np.testing.assert_array_equal(records[0][0][key], records[1][0][key], err_msg=key)
        assert records[0][1] == records[1][1]
        records = [each.step(action)[:2] for each in (env, again)]


@pytest.mark.parametrize(
    "env_id, word",
    [
        ("dmc-walker-fly", "dmc-walker-walk"),
        ("atari-nosuchgame", "Nosuchgame"),
        ("NoSuchThing-v0", "NoSuchThing"),
        ("no_such_module:Thing-v0", "no_such_module"),
        ("toy_envs:BadAction-v0", "MultiDiscrete"),
        ("toy_envs:BadObservation-v0", "Text"),
        ("toy_envs:BadPart-v0", "'b'"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(house, env_id, word):
    with pytest.raises(house.Failure) as error:
        make(house, env_id)
    assert word in str(error.value) and "\n" not in str(error.value)


def test_the_opengl_library_is_chosen_by_what_is_there(house, monkeypatch):
    for libraries, choice in (({"EGL", "GL"}, "egl"), ({"EGL"}, "disable"), ({"OSMesa"}, "osmesa"), (set(), "disable")):
        monkeypatch.delenv("MUJOCO_GL", raising=False)
        monkeypatch.delenv("DISPLAY", raising=False)
        monkeypatch.setattr(
            house, "find_library", lambda name, libraries=libraries: name if name in libraries else None
        )
        assert house.choose_opengl() == (choice != "disable") and os.environ["MUJOCO_GL"] == choice
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert house.choose_opengl() and os.environ["MUJOCO_GL"] == "glfw"


def test_the_toys_are_in_their_spaces():
    for name in ("Vector-v0", "Mixed-v0", "Gray-v0", "Class-v0"):
        env = gym.make(name)
        assert env.observation_space.contains(env.reset(seed=0)[0]), (name, toy_envs)
