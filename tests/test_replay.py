"""Replay against lists: what is sampled is what was added, evenly, once fresh, over restarts."""

import collections
import importlib
import itertools
import os
from fcntl import F_GETFL, fcntl

import numpy as np
import pytest
import torch

L, ENVS = 4, 3  # steps of a sequence, environments
LAYOUT = dict(vector=((2,), "float32"), image=((2, 2, 3), "uint8"), action=((1,), "float32"))
LAYOUT |= dict(deter=((2,), "float32"), stoch=((3,), "uint8"), reward=((), "float32"))
LAYOUT |= {key: ((), "bool") for key in ("is_first", "is_last", "is_terminal")}
DTYPE = np.dtype([*((key, dtype, shape) for key, (shape, dtype) in LAYOUT.items()), ("count", "i8")])
CPU = torch.device("cpu")


class Lists:
    """A replay that keeps every step of every environment in a list; `reward` says which step it is."""

    def __init__(self, capacity):
        self.capacity, self.steps, self.fresh, self.restarted = capacity, [], [], True

    def record(self, rng, over):
        """A step of all environments that follows the last one; episodes end where `over` says, and with a restart."""
        step = {key: rng.integers(0, 2 if dtype == "bool" else 256, (ENVS, *shape)).astype(dtype)
                for key, (shape, dtype) in LAYOUT.items()}  # fmt: skip
        first, self.restarted = self.restarted | (self.steps[-1]["is_last"] if self.steps else over), False
        return step | dict(reward=np.arange(ENVS) + 10.0 * len(self.steps), is_first=first, is_last=over)

    def add(self, step):
        self.steps.append({key: np.array(step[key], dtype) for key, (_, dtype) in LAYOUT.items()})
        start = len(self.steps) - L - 1  # windows of L + 1 steps: 1 .. L+1, L+2 .. 2L+2, ...
        if start > 0 and (start - 1) % (L + 1) == 0:
            self.fresh += [(start, env) for env in range(ENVS)]

    def first(self):
        """The first step that is held."""
        return max(0, len(self.steps) - self.capacity)

    def starts(self):
        """All steps at which a sequence can start, the step before it included."""
        return range(self.first(), len(self.steps) - L)

    def sequence(self, start, env):
        """What a sample must hold: L steps, and the latents of the step before them."""
        steps = self.steps[start : start + L + 1]
        data = {key: np.stack([step[key][env] for step in steps[1:]]) for key in LAYOUT}
        data["is_last"][:-1] |= data["is_first"][1:]
        return data | {key: steps[0][key][env] for key in ("deter", "stoch")}


def starts(data):
    """(step, environment) of the step before each sequence."""
    return [(int(r[0]) // 10 - 1, int(r[0]) % 10) for r in data["reward"]]


def compare(lists, replay, rng, size=5):
    """Samples a batch: the fresh sequences that are still held first, then any others; writes new latents."""
    queue = [start for start in lists.fresh[:size] if start[0] in lists.starts()]
    lists.fresh = lists.fresh[size:]
    data, index = replay.sample(size, rng, CPU)
    where = starts(data)
    assert where[: len(queue)] == queue and all(start in lists.starts() for start, _ in where)
    for b, (start, env) in enumerate(where):
        for key, value in lists.sequence(start, env).items():
            assert data[key].dtype == getattr(torch, LAYOUT[key][1])
            np.testing.assert_array_equal(data[key][b], value, err_msg=f"{key} {start} {env}")
    latents = {"deter": torch.randn(size, L, 2), "stoch": torch.randint(0, 9, (size, L, 3), dtype=torch.uint8)}
    if len({(start + i, env) for start, env in where for i in range(1, L + 1)}) == size * L:  # no step twice
        for key, value in latents.items():
            replay.steps[key][index] = value
        for (b, (start, env)), i in itertools.product(enumerate(where), range(L)):
            for key, value in latents.items():
                lists.steps[start + i + 1][key][env] = value[b, i]


def compare_episodes(lists, replay, rng):
    """The same for a script that draws from whole episodes: each sequence is a part of one that is held."""
    data = replay.sample(50, rng, CPU)
    for b, (before, env) in enumerate(starts(data)):
        steps = lists.steps[before + 1 : before + L + 1]
        assert not any(step["is_first"][env] for step in steps[1:]) and before + 1 >= lists.first()
        rest = itertools.takewhile(lambda step: not step["is_first"][env], lists.steps[before + 2 :])  # noqa: B023
        assert any(step["is_last"][env] for step in [steps[0], *rest])
        for key in set(LAYOUT) - {"is_first"}:
            np.testing.assert_array_equal(data[key][b], [step[key][env] for step in steps], err_msg=key)
        assert data["is_first"][b].tolist() == [True] + [False] * (L - 1)


def filled(script, folder, count, capacity=20):
    replay, lists = script.Replay(f"{folder}/0", DTYPE, ENVS, capacity, L), Lists(capacity)
    fill(lists, replay, count, np.random.default_rng(0))
    return lists, replay


def fill(lists, replay, count, rng):
    for _ in range(count):
        step = lists.record(rng, rng.random(ENVS) < 0.1)
        lists.add(step)
        replay.add(step)
        if hasattr(replay, "fresh") and len(lists.steps) >= lists.capacity:  # the step that is overwritten next
            lists.steps[lists.first()]["is_first"][:] = True


@pytest.fixture
def windows(ported):
    """A script that draws windows over the ends of episodes, with latents that are written back."""
    if ported.__name__ != "dreamer_v3":
        pytest.skip("draws from whole episodes")
    return ported


@pytest.mark.parametrize("capacity", [L + 2, 53, 3000])
def test_it_holds_what_lists_hold(ported, tmp_path, capacity):
    """2,000 steps with samples, write-backs and restarts in between; then all that is held, and nothing else."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    lists, replay = filled(ported, tmp_path, 0, capacity)
    for _ in range(2000):
        fill(lists, replay, 1, rng)
        if len(replay) and rng.random() < 0.2:
            (compare if ported.__name__ == "dreamer_v3" else compare_episodes)(lists, replay, rng)
        if rng.random() < 0.02:
            state = replay.state_dict()
            replay.steps.flush()
            replay, lists.restarted = ported.Replay(f"{tmp_path}/0", DTYPE, ENVS, capacity, L, state), True
    for key, step in itertools.product(LAYOUT, range(lists.first(), 2000)):
        held = replay.steps[key][step % capacity]
        np.testing.assert_array_equal(held, lists.steps[step][key], err_msg=f"{key} {step}")


@pytest.mark.parametrize("count", [9, 33])
def test_all_starts_are_drawn_equally_often(windows, tmp_path, count):
    lists, replay = filled(windows, tmp_path, count)
    assert len(replay) == len(lists.starts()) * ENVS
    replay.fresh, draws = [], 400 * len(replay)
    counts = collections.Counter(starts(replay.sample(draws, np.random.default_rng(0), CPU)[0]))
    assert set(counts) == set(itertools.product(lists.starts(), range(ENVS)))
    assert all(abs(n - 400) < 6 * 20 for n in counts.values()), counts  # six standard deviations


def test_fresh_sequences_come_first_and_once(windows, tmp_path):
    """Each step but the very first is in one of them; those that were overwritten are forgotten."""
    _, replay = filled(windows, tmp_path, 31)  # 20 are held: 11 .. 30
    rng = np.random.default_rng(0)
    drawn = [start for _ in range(6) for start in starts(replay.sample(3, rng, CPU)[0])]
    queue = [(start, env) for start in (1, 6, 11, 16, 21, 26) for env in range(ENVS)]
    assert drawn[6:] == queue[6:] and not replay.fresh
    assert all(start >= 11 for start, _ in drawn[:6])


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_longer_run_goes_on_with_what_is_held(windows, tmp_path, wrapped):
    """A run that is continued for more steps asks for a larger replay, whether the ring has come round or not."""
    rng = np.random.default_rng(0)
    lists, replay = filled(windows, tmp_path, 33 if wrapped else 17)
    replay = windows.Replay(f"{tmp_path}/0", DTYPE, ENVS, 200, L, replay.state_dict())
    lists.capacity = replay.capacity
    for _ in range(100):
        compare(lists, replay, rng)
        fill(lists, replay, 1, rng)


def add_episode(replay, steps, whole=True):
    """One whose steps hold their own number; it is over if it is whole."""
    for i in range(steps):
        step = {"number": replay.count, "is_first": i == 0, "is_last": whole and i == steps - 1, "is_terminal": False}
        replay.add({key: np.array([value]) for key, value in step.items()})


def a_replay(script, folder, lengths, capacity=1000, **options):
    """One stream of episodes of these lengths, the last one not over."""
    dtype = np.dtype([("number", "i8"), *((key, "?") for key in script.FLAGS), ("count", "i8")])
    replay = script.Replay(f"{folder}/0", dtype, 1, capacity, 5, **options)
    for number, steps in enumerate(lengths, 1):
        add_episode(replay, steps, number < len(lengths))
    return replay


def drawn(replay, count):
    """First steps of sequences."""
    return replay.sample(count, np.random.default_rng(0), CPU)["number"][:, 0].numpy()


@pytest.mark.parametrize("name", ["planet", "dreamer_v1", "dreamer_v2"])
def test_complete_episodes_are_drawn_equally_often_then_their_sequences(name, tmp_path):
    """Dreamer's sequences are shorter than their episode. Of the others one is too short, and one is not complete."""
    replay = a_replay(importlib.import_module(name), tmp_path, [6, 5, 3, 20, 9])
    episodes = [range(0, 2), range(6, 7), range(14, 30)] if name == "planet" else [range(0, 2), range(14, 30)]
    starts = drawn(replay, 4000)
    assert len(replay) == sum(map(len, episodes)) and set(starts) == set(itertools.chain(*episodes))
    for episode in episodes:
        assert np.isin(starts, episode).mean() == pytest.approx(1 / len(episodes), abs=0.03)
    data = replay.sample(20, np.random.default_rng(0), CPU)
    assert (data["number"] == data["number"][:, :1] + torch.arange(5)).all()
    assert (data["is_first"] == (torch.arange(5) == 0)).all()


@pytest.mark.parametrize("name", ["planet", "dreamer_v1", "dreamer_v2"])
@pytest.mark.parametrize("steps, whole", [(0, {10, 20}), (6, {10, 20}), (7, {20}), (21, set())])
def test_what_was_overwritten_after_the_checkpoint_is_not_drawn_after_a_kill(name, steps, whole, tmp_path):
    """The ring holds 36 steps: the first episode, the oldest, is gone with the 7th step after the 40th."""
    script = importlib.import_module(name)
    replay = a_replay(script, tmp_path, [10, 10, 10, 10], capacity=36)
    state = replay.state_dict()
    add_episode(replay, steps, whole=False)
    again = a_replay(script, tmp_path, [], capacity=36, saved=state)
    assert set(again.episodes[:, 0]) == whole and again.count == 40


def held(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("what", ["missing", "cut", "other sizes", "other environments", "older", "disk", "length"])
def test_what_does_not_fit_is_refused_and_nothing_changed(ported, tmp_path, monkeypatch, what):
    _, replay = filled(ported, tmp_path, 30)
    state, dtype, envs, capacity, length = replay.state_dict(), DTYPE, ENVS, 20, L
    del replay
    if what == "missing":
        (tmp_path / "0").unlink()
    elif what == "cut":
        os.truncate(tmp_path / "0", (tmp_path / "0").stat().st_size - 1)
    elif what == "other sizes":
        dtype = np.dtype([("more", "f4"), *dtype.descr])
    elif what == "other environments":
        envs = 2
    elif what == "older":  # of a version that kept other things
        del state["layout"]
    elif what == "disk":
        monkeypatch.setattr(ported.shutil, "disk_usage", lambda _: collections.namedtuple("Usage", "free")(10**6))
        capacity, state = 10**6, None
    else:
        length, state = 20, None
    before = held(tmp_path)
    with pytest.raises(SystemExit) as error:
        ported.Replay(f"{tmp_path}/0", dtype, envs, capacity, length, state)
    word = {"disk": "GB", "length": "--batch-length 20"}.get(what, str(tmp_path))
    assert word in error.value.code and "\n" not in error.value.code
    assert held(tmp_path) == before


def test_file_systems_that_cannot_reserve_space(ported, tmp_path, monkeypatch):
    """Where the system writes zeros instead, it refuses files that are open for appending."""
    modes, reserve = [], os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", lambda file, *x: modes.append(fcntl(file, F_GETFL)) or reserve(file, *x))
    _, replay = filled(ported, tmp_path, 30)
    ported.Replay(f"{tmp_path}/0", DTYPE, ENVS, 40, L, replay.state_dict())
    assert len(modes) == 2 and not any(mode & os.O_APPEND for mode in modes)
