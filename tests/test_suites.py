"""The suites of docs/environments.md, where they are installed; `bash tests/suites.sh` installs them and runs this."""

import importlib
import importlib.util

import gymnasium as gym
import numpy as np
import pytest
from conftest import PORTED, ROOT, run_script, scalars
from gymnasium.utils.env_checker import check_env
from test_environments import check, make, shapes

house = importlib.import_module(PORTED[-1])
SUITES = {  # --env-id: what is observed, the number of actions
    "environments.crafter:Crafter-v1": (dict(image=(64, 64, 3)), 17),
    "environments.procgen:coinrun-v0": (dict(image=(96, 96, 3)), 15),
    "environments.bsuite:catch-v0": (dict(vector=(50,)), 3),
    "environments.memory_maze:9x9-v0": (dict(image=(64, 64, 3)), 6),
    "environments.miniworld:MiniWorld-Hallway-v0": (dict(image=(64, 64, 3)), 3),
    "environments.metaworld:drawer-open-v3 --obs pixels": (dict(image=(64, 64, 3)), 4),
    "environments.metaworld:drawer-open-v3 --obs state": (dict(vector=(39,)), 4),
    "gymnasium_robotics:FetchReach-v4": (dict(achieved_goal=(3,), desired_goal=(3,), observation=(10,)), 4),
    "vizdoom.gymnasium_wrapper:VizdoomTakeCover-v1": (dict(screen=(64, 64, 3), gamevariables=(1,)), 3),
}


def need(package):
    if not importlib.util.find_spec(package):  # not imported: MiniWorld must be told first that there is no display
        pytest.skip(f"{package} is not installed")


def adapter(name):
    need(name)
    return importlib.import_module(f"environments.{name}")


def need_suite(flags):
    module = flags.split(":")[0].split(".")
    need(module[1] if module[0] == "environments" else module[0])


def record(env, seed, steps):
    """Observations and rewards of random actions, over the ends of episodes."""
    env.action_space.seed(0)
    rows = [(env.reset(seed=seed)[0], 0.0)]
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        rows.append((obs, reward))
        if terminated or truncated:
            rows.append((env.reset()[0], 0.0))
    return rows


def equal(first, second):
    pairs = [*zip(first, second, strict=False)]
    same = all(np.array_equal(a[0][key], b[0][key]) for a, b in pairs for key in a[0])
    return same and len(first) == len(second) and all(a[1] == b[1] for a, b in pairs)


@pytest.mark.parametrize("flags", SUITES)
def test_a_suite(flags):
    """Observations change and are as their spaces say. The seed of a reset decides all that follows, whatever came
    before, and another seed gives other episodes."""
    need_suite(flags)
    (observed, actions), env, other = SUITES[flags], make(flags), make(flags)
    assert shapes(env) == observed and gym.spaces.flatdim(env.action_space) == actions
    other.reset(seed=9)
    rows, again, different = record(env, 3, 100), record(other, 3, 100), record(env, 4, 100)
    for obs, reward in rows:
        check(env, obs)
        assert np.isfinite(reward)
    assert equal(rows, again) and not equal(rows, different) and not equal(rows[:1], rows[20:21])


@pytest.mark.slow
@pytest.mark.parametrize("flags", SUITES)
def test_training_in_a_suite(flags, tmp_path):
    """2,000 frames with a small model. Its dream is in the events, to be looked at; success and scores are, too."""
    need_suite(flags)
    sizes = "--size 1m --batch-size 8 --batch-length 32 --learning-rate 1e-3 --warmup 20 --train-ratio 16 --num-envs 2"
    frames = "--total-timesteps 2100 --eval-every 2000 --eval-episodes 1 --log-every 500"
    run_script(house, *f"{sizes} {frames} --env-id {flags}".split(), cwd=tmp_path, timeout=1800, fresh=True)
    (run,) = (tmp_path / "runs").iterdir()
    keys = {"eval/episodic_return", "charts/episodic_return", "charts/updates"}
    if any(name in flags for name in ("procgen", "metaworld", "robotics")):
        keys |= {"eval/success", "charts/success"}
    if "crafter" in flags:
        keys |= {"charts/score", "charts/achievement/collect_diamond"}
    curves = scalars(run)
    assert keys <= curves.keys() and all(np.isfinite(value) for row in curves.values() for _, value in row)
    assert b"video/open_loop" in next(run.glob("events*")).read_bytes()


def test_the_example_of_the_docs(tmp_path, monkeypatch):
    """docs/environments.md: the example keeps Gymnasium's rules, and is pushed into the ring by whoever sees it."""
    page = (ROOT / "docs/environments.md").read_text()
    (tmp_path / "reach.py").write_text(page.split("```")[1].removeprefix("python"))
    monkeypatch.syspath_prepend(tmp_path)
    env = make("reach:Reach-v0 --env-kwargs radius 0.3")
    check_env(env.unwrapped, skip_render_check=True)
    assert shapes(env) == dict(camera=(64, 64, 3), velocity=(2,)) and env.unwrapped.radius == 0.3
    env.reset(seed=0)
    total, over, inner = 0, False, env.unwrapped
    while not over:
        _, reward, terminated, over, info = env.step(np.clip(3 * (inner.goal - inner.dot) - 2 * inner.velocity, -1, 1))
        total += reward
        assert not terminated
    assert 150 < total <= 200 and info["log"]["success"] == 1


def test_crafter_repeats_exactly():
    """The same animals come and go, although the game holds them in sets, whose order is that of their addresses."""
    adapter("crafter")
    first, second = (record(make("environments.crafter:Crafter-v1"), 5, 1500) for _ in range(2))
    assert equal(first, second)


def test_crafter_scores():
    """The score of its paper, arXiv:2109.06780: exp(mean over achievements of ln(1 + success rate in %)) - 1."""
    adapter("crafter")
    env, logs = gym.make("Crafter-v1"), []
    env.action_space.seed(0)
    env.reset(seed=1)
    while len(logs) < 4:
        _, _, terminated, truncated, info = env.step(env.action_space.sample())
        assert bool(info["log"]) == (terminated or truncated)
        if info["log"]:
            logs.append(info["log"])
            env.reset()
    for count in range(1, 5):
        rates = [100 * np.mean([log[key] for log in logs[:count]]) for key in logs[0] if key != "score"]
        assert len(rates) == 22 and max(rates) > 0
        assert logs[count - 1]["score"] == pytest.approx(np.prod(np.add(1, rates)) ** (1 / 22) - 1)


@pytest.mark.parametrize("native", [True, False])
def test_procgen_does_not_show_the_next_level_at_the_end(native):
    """The game's last observation is the next level's first; the picture before stands in. It tells solved levels."""
    adapter("procgen")
    env = gym.make("coinrun-v0", native=native, distribution_mode="easy", num_levels=1)
    obs, solved, rng = env.reset(seed=0)[0], 0, np.random.default_rng(0)
    for _ in range(2000):
        before = obs
        obs, reward, over, _, info = env.step(rng.choice([7, 8]))
        if over:
            assert np.array_equal(obs, before) and info["success"] == (reward > 0)
            solved += info["success"]
            assert not np.array_equal(env.reset()[0], obs)
    assert solved > 3


def test_procgen_chooses_levels():
    adapter("procgen")
    for levels, count in ((3, 3), (0, 30)):
        env = gym.make("coinrun-v0", native=True, num_levels=levels)
        assert len({env.reset(seed=seed)[0].tobytes() for seed in range(30)}) == count


def test_bsuite_has_all_settings():
    adapter("bsuite")
    for setting, size in enumerate((10, 12, 14)):
        assert gym.make("deep_sea-v0", setting=setting).observation_space.shape[0] == size


def test_metaworld_succeeds_and_ends_after_500_steps():
    """Its own scripted policy opens the drawer in all of the goals that are drawn."""
    adapter("metaworld")
    policies = importlib.import_module("metaworld.policies")
    env, policy, goals = gym.make("drawer-open-v3"), policies.SawyerDrawerOpenV3Policy(), set()
    for seed in range(3):
        (obs, _), success, steps, over = env.reset(seed=seed), 0, 0, False
        goals.add(tuple(obs[36:]))
        while not over:
            obs, _, terminated, over, info = env.step(np.clip(policy.get_action(obs), -1, 1))
            assert not terminated
            success, steps = max(success, info["success"]), steps + 1
        assert success == 1 and steps == 500
    assert len(goals) == 3


def test_metaworld_pictures_are_upright():
    """The table stands below and the sky is above."""
    adapter("metaworld")
    env = gym.make("drawer-open-v3", render_mode="rgb_array")
    env.reset(seed=0)
    picture = env.render().astype(int)
    brown = picture[..., 0] - picture[..., 2] > 25
    assert picture.shape == (64, 64, 3) and brown[32:].mean() > 2 * brown[:20].mean()
