"""Replay of the scripts that draw from whole episodes; tests/test_replay.py is about the others."""

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
def rng():
    return np.random.default_rng(0)


def reopened(script, folder, state, capacity):
    replay = script.Replay(str(folder), SPACES, ENVS, capacity, L)
    replay.load_state_dict(state)
    return replay


def test_what_was_overwritten_before_a_kill_is_not_drawn(script, tmp_path, rng):
    """The ring has wrapped, and steps that no checkpoint knows of have replaced the oldest ones."""
    replay = filled(script, tmp_path, 40)
    state = replay.state_dict()
    fill(replay, 40, 45)
    replay = reopened(script, tmp_path, state, 20)
    data, _ = uniform(replay, 300, rng)
    for (t, env), rewards in zip(starts(data), data["reward"], strict=True):
        assert rewards.tolist() == [(t + i) * 10 + env for i in range(L)] and 25 <= t <= 40 - L


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
