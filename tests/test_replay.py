"""Replay: what is sampled is what was added, evenly, once fresh, and no more memory is used than the page cache has."""

import collections
import errno
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import environment

L, ENVS = 4, 3  # steps of a sequence, environments
SPACES = {
    "vector": ((2,), "float32"),
    "image": ((2, 2, 3), "uint8"),
    "action": ((1,), "float32"),
    "deter": ((2,), "float32"),
    "stoch": ((3,), "uint8"),
    "reward": ((), "float32"),
    "is_first": ((), "bool"),
    "is_last": ((), "bool"),
    "is_terminal": ((), "bool"),
}


def record(t, env, episode=7):
    """Record `t` of one environment: every value says which it is."""
    number = t * 10 + env
    values = {key: np.full(shape, number % 251, dtype) for key, (shape, dtype) in SPACES.items()}
    values["vector"], values["deter"] = np.full(2, number, np.float32), np.full(2, number + 0.5, np.float32)
    return values | {"reward": np.float32(number), "is_first": t % episode == 0, "is_last": False, "is_terminal": False}


def filled(script, folder, count, capacity=20, **options):
    replay = script.Replay(str(folder), SPACES, ENVS, capacity, L)
    fill(replay, 0, count, **options)
    return replay


def fill(replay, start, stop, **options):
    for t in range(start, stop):
        records = [record(t, env, **options) for env in range(ENVS)]
        replay.add({key: np.stack([r[key] for r in records]) for key in SPACES})


def starts(data):
    """(record, environment) of the first step of each sequence, the context step before it not counted."""
    return [(int(r[0]) // 10, int(r[0]) % 10) for r in data["reward"]]


def uniform(replay, count, rng):
    """Sequences drawn uniformly, the fresh ones left alone."""
    return replay.get(replay.draw(count, rng))


@pytest.fixture
def windows(script):
    """A script that draws windows over the ends of episodes; the others' draws are tested with them."""
    if not script.LATENTS:
        pytest.skip("draws from whole episodes")
    return script


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("count", [5, 19, 20, 21, 53])
def test_samples_are_what_was_added(windows, tmp_path, rng, count):
    replay = filled(windows, tmp_path, count)
    data, _ = uniform(replay, 300, rng)
    assert data["image"].shape == (300, L, 2, 2, 3) and data["image"].dtype == np.uint8
    for b, (t, env) in enumerate(starts(data)):
        assert max(0, count - 20) <= t - 1 and t + L <= count  # held, and not over the seam of the ring
        for i in range(L):
            expected = record(t + i, env)
            expected["is_last"] = i < L - 1 and (t + i + 1) % 7 == 0  # left before the next one's start
            for key in set(SPACES) - set(windows.LATENTS):
                np.testing.assert_array_equal(data[key][b, i], expected[key], err_msg=key)
        for key in windows.LATENTS:
            np.testing.assert_array_equal(data[key][b], record(t - 1, env)[key], err_msg=key)


@pytest.mark.parametrize("count", [9, 33])
def test_all_starts_are_drawn_equally_often(windows, tmp_path, rng, count):
    replay = filled(windows, tmp_path, count)
    assert len(replay) == (min(count, 20) - L) * ENVS
    draws = 400 * len(replay)
    counts = collections.Counter(starts(uniform(replay, draws, rng)[0]))
    assert len(counts) == len(replay)
    assert all(abs(n - 400) < 6 * 20 for n in counts.values()), counts  # six standard deviations


def test_too_short_for_a_sequence(windows, tmp_path):
    assert len(filled(windows, tmp_path / "a", L)) == 0
    assert len(filled(windows, tmp_path / "b", L + 1)) == ENVS


def test_fresh_windows_come_first_and_once(windows, tmp_path, rng):
    """Windows of L + 1 records, [1..L+1], [L+2..], ..., the first of each only for its latents."""
    replay = filled(windows, tmp_path, L + 1, capacity=100)
    assert replay.fresh == []
    fill(replay, L + 1, 3 * (L + 1) + 1)
    windows = [(1 + k * (L + 1) + 1, env) for k in range(3) for env in range(ENVS)]
    drawn = starts(replay.sample(4, rng)[0]) + starts(replay.sample(4, rng)[0])
    assert drawn == windows[:8]
    assert starts(uniform(replay, 1, rng)[0]) and len(replay.fresh) == 1  # a look leaves the queue alone
    assert starts(replay.sample(4, rng)[0])[0] == windows[8]
    assert replay.fresh == []


def test_fresh_windows_that_were_overwritten_are_forgotten(windows, tmp_path, rng):
    replay = filled(windows, tmp_path, 31)  # 20 are held: 11..30; windows start at 1, 6, 11, ..., 26
    replay.draw = lambda count, rng: np.zeros((0, 2), int)  # fresh ones only
    drawn = [start for _ in range(5) for start in starts(replay.sample(4, rng)[0])]
    assert drawn == [(t + 1, env) for t in (11, 16, 21, 26) for env in range(ENVS)]
    assert replay.fresh == []


@pytest.mark.parametrize("count", [18, 47])
def test_latents_are_written_back_to_their_places_only(windows, tmp_path, rng, count):
    replay = filled(windows, tmp_path, count)
    before = {key: array.copy() for key, array in replay.arrays.items()}
    data, index = uniform(replay, 5, rng)
    new = {"deter": -data["reward"][..., None].repeat(2, -1), "stoch": np.full((5, L, 3), 255, np.uint8)}
    replay.write(index, new)
    written = {((t + i) % 20, env) for t, env in starts(data) for i in range(L)}
    for key, array in replay.arrays.items():
        for row in range(20):
            for env in range(ENVS):
                old = before[key][row, env]
                if (row, env) in written and key in new:
                    old = np.full(2, -before["reward"][row, env]) if key == "deter" else np.full(3, 255)
                np.testing.assert_array_equal(array[row, env], old, err_msg=f"{key} {row} {env}")


def reopened(script, folder, state, capacity):
    replay = script.Replay(str(folder), SPACES, ENVS, capacity, L)
    replay.load_state_dict(state)
    return replay


def test_reopened_it_goes_on(windows, tmp_path):
    replay = filled(windows, tmp_path, 33)
    again = reopened(windows, tmp_path, replay.state_dict(), 20)
    fill(replay, 33, 36)
    one = starts(replay.sample(50, np.random.default_rng(1))[0])
    again.count, again.fresh = 36, [[26, env] for env in range(ENVS)]
    assert len(one) == 50 and again.arrays["reward"].tolist() == replay.arrays["reward"].tolist()


def test_what_was_overwritten_before_a_kill_is_not_drawn(script, tmp_path, rng):
    """The ring has wrapped, and steps that no checkpoint knows of have replaced the oldest ones."""
    replay = filled(script, tmp_path, 40)
    state = replay.state_dict()
    fill(replay, 40, 45)
    replay = reopened(script, tmp_path, state, 20)
    data, _ = uniform(replay, 300, rng)
    for (t, env), rewards in zip(starts(data), data["reward"], strict=True):
        assert rewards.tolist() == [(t + i) * 10 + env for i in range(L)] and 25 <= t <= 40 - L


def test_it_grows_for_a_longer_run(windows, tmp_path, rng):
    replay = filled(windows, tmp_path, 17)
    replay.flush()
    state = replay.state_dict()
    del replay
    replay = reopened(windows, tmp_path, state, 200)
    fill(replay, 17, 150)
    for (t, env), reward in zip(starts(s := uniform(replay, 100, rng)[0]), s["reward"], strict=True):
        assert reward.tolist() == [(t + i) * 10 + env for i in range(L)]


def test_a_disk_too_small_is_refused_and_leaves_nothing(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script.shutil, "disk_usage", lambda _: collections.namedtuple("Usage", "free")(10**6))
    with pytest.raises(script.Failure, match="GB"):
        filled(script, tmp_path, 0, capacity=10**6)
    assert not any(tmp_path.iterdir())


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="needs posix_fallocate")
def test_a_disk_that_fills_up_stops_before_anything_is_written(script, tmp_path, monkeypatch):
    replay = filled(script, tmp_path, 10, capacity=3000)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(script.Interrupted, match="No space left"):
        fill(replay, 10, 3000)
    assert replay.count == replay.reserved == 1024
    monkeypatch.undo()
    fill(replay, 1024, 1030)
    assert replay.arrays["reward"][:1030, 1].tolist() == [t * 10 + 1 for t in range(1030)]


def test_a_batch_longer_than_the_replay_is_refused(script, tmp_path):
    with pytest.raises(script.Failure, match="--batch-length 4"):
        script.Replay(str(tmp_path), SPACES, ENVS, L, L)


FILL = """
import sys, numpy as np, {script} as s
def resident(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024
spaces = dict(image=((64, 64, 3), "uint8"), reward=((), "float32"), deter=((512,), "float32"), stoch=((32,), "uint8"),
              **{{key: ((), "bool") for key in s.FLAGS}})
frames, folder = int(sys.argv[1]), sys.argv[2]
frame = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
step = {{key: np.zeros((1, *shape), dtype) for key, (shape, dtype) in spaces.items()}} | dict(image=frame)
replay, rng = s.Replay(folder, spaces, 1, frames, 64), np.random.default_rng(0)
def add(t):
    step["is_first"][:] = t % 100 == 0
    replay.add(step)
for t in range(1000): add(t)
replay.sample(16, rng)
before = resident("RssAnon")
for t in range(frames - 1000):
    add(t)
    if t % 100 == 0: replay.sample(16, rng)
print(resident("RssAnon") - before, resident("RssAnon"), resident("VmRSS"))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_large_replay(script, tmp_path):
    """100,000 frames of 64×64×3 are 1.2 GB on disk; the process itself does not grow with them."""
    command = [sys.executable, "-c", FILL.format(script=script.__name__), "100000", str(tmp_path)]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    grown, *_ = map(float, result.stdout.split())
    assert grown < 200, f"{grown} MB"
    for path in tmp_path.iterdir():
        path.unlink()
