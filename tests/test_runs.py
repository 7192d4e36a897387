"""Runs: resume, kill, signals, trouble in environments, what is refused, evaluation, several processes."""

import importlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import (
    PORTED,
    ROOT,
    SPACES,
    agent_and_batch,
    calls,
    checkpoint,
    command,
    environment,
    lines,
    metrics,
    only_run,
    read_events,
    run_script,
    scalars,
    spawn,
    tiny,
    train,
)

slow = pytest.mark.slow
TOY = ["--env-id", "toy_envs:Vector-v0"]  # whose rewards count the steps of its episodes of 20
TWO_IMAGES = ["--env-id", "toy_envs:Image-v0", "--num-envs", 2]
CARTPOLES = ["--env-id", "CartPole-v1", "--num-envs", 3]
BALANCE = "--env-id dmc-cartpole-balance --action-repeat 2 --num-envs 1 --obs state --time-limit 40".split()
NOW = ["--save-every", 1]
IN_GROUP = "import atexit; atexit.register(s.os.system, f'grep -hs gloo_ /proc/{s.os.getpid()}/task/*/comm >&2')"


def progress(run):
    """Frames and updates of the last checkpoint."""
    return checkpoint(run)["progress"][-4:][:2]  # planet.py counts its episodes before them


def frames(run):
    return progress(run)[0]


def go_on(script, run, more=40, *flags):
    """Continues a run: nothing that it needs was lost, and what it holds is sound."""
    total = frames(run) + more
    run_script(script, "--resume", run, "--total-timesteps", total, *flags, cwd=run.parent.parent)
    state = checkpoint(run)
    assert frames(run) >= total
    assert all(value.isfinite().all() for value in state["agent"].values())
    steps = stored(run)
    assert all(np.isfinite(steps[key]).all() for key in steps.dtype.names)


def stored(run, rank=0):
    """The steps in a run's replay, from all its environments."""
    envs, fields = checkpoint(run)["replay"]["layout"]
    return np.fromfile(run / f"{rank or '.'}/replay/steps", np.dtype(fields)).reshape(-1, envs)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_for(what, process=None, seconds=60):
    limit = time.time() + seconds
    while not what():
        assert time.time() < limit and (process is None or process.poll() is None)
        time.sleep(0.05)


def start(script, folder, *flags, patch=None):
    """A run in a process group of its own, once it has learnt and saved."""
    process = spawn(script, folder, *flags, "--replay-size", 200, *tiny(script), "--save-every", 20, patch=patch)
    wait_for(lambda: [*folder.glob("runs/*/checkpoint.pt")] and progress(only_run(folder))[1], process)
    return process


def same(a, b, path="checkpoint"):
    """Checks that two nested structures are equal to the bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)), path
    elif isinstance(a, dict | list | tuple):
        assert len(a) == len(b), path
        for key in a if isinstance(a, dict) else range(len(a)):
            same(a[key], b[key], f"{path}.{key}")
    else:
        assert a == b, path


@pytest.fixture
def batches(new_house, monkeypatch):
    """All that a run in this process samples from a toy; its steps must follow one another, with cuts marked."""
    whole, seen = new_house.Replay.sample, []

    def sample(self, *args):
        data, index = whole(self, *args)
        reward, first, last = (data[key].numpy() for key in ("reward", "is_first", "is_last"))
        assert ((reward[:, 1:] == reward[:, :-1] + 1) | first[:, 1:]).all(), reward
        assert (last[:, :-1] >= first[:, 1:]).all()
        seen.append(data)
        return data, index

    monkeypatch.setattr(new_house.Replay, "sample", sample)
    return seen


# Resume


@pytest.mark.parametrize(
    "flags", [TOY, CARTPOLES, pytest.param([*TWO_IMAGES, "--amp"], marks=slow), pytest.param(BALANCE, marks=slow)]
)
def test_two_resumes_of_one_run_are_the_same_to_the_bit(ported, flags, tmp_path):
    first = train(ported, tmp_path, *flags)
    state, (frame, updates) = checkpoint(first), progress(first)
    runs = [tmp_path / name / "runs" / first.name for name in "ab"]
    time.sleep(1.1)  # TensorBoard reads files in the order of their names, which hold the second, then the process
    for run in runs:
        shutil.copytree(first, run)
        go_on(ported, run, 100)
    same(*map(checkpoint, runs))
    assert metrics(runs[0]) == metrics(runs[1]) and max(row[0] for row in metrics(runs[0])) > frame
    one, two = ({path.name: data for path, data in contents(run / "replay").items()} for run in runs)
    assert one == two and one
    assert checkpoint(runs[0])["optimizer"][-1] == progress(runs[0])[1] > updates
    later = checkpoint(runs[0])["agent"].items()
    assert any(not torch.equal(value, state["agent"][key]) for key, value in later)


def test_an_episode_that_was_cut_is_marked(new_house, batches, tmp_path):
    run = train(new_house, tmp_path, *TOY, frames=50)  # in the middle of an episode of 20
    batches.clear()
    go_on(new_house, run)
    cut = [data for data in batches if (data["is_last"] & (data["reward"] != 20)).any()]
    assert cut and not any((data["is_terminal"] & (data["reward"] != 20)).any() for data in cut)


EXTENDED = [([], [], True), ([], ["--batch-length", 16], True), ([], ["--batch-length", 4], True)]
EXTENDED += [(["--replay-size", 45], more, False) for more in ([], ["--replay-size", 120])]  # it has come round


@pytest.mark.parametrize("before, after, grows", EXTENDED)
def test_a_finished_run_is_extended(new_house, batches, before, after, grows, tmp_path):
    """The replay goes on where it was and grows, unless it has come round; it may be read in other lengths."""
    run = train(new_house, tmp_path, *TOY, "--env-kwargs", "length", 70, *before, frames=100)
    seen, size = len(batches), checkpoint(run)["replay"]["capacity"]
    go_on(new_house, run, 100, *after)
    assert len(batches) > seen > 0 and frames(run) == 200
    assert checkpoint(run)["replay"]["capacity"] > size + 90 if grows else size == 45
    run_script(new_house, "--resume", run, cwd=tmp_path)  # it remembers the new total: nothing left to do
    assert frames(run) == 200


def test_keys_of_any_name_train_and_come_back(ported, tmp_path):
    run = train(ported, tmp_path, "--env-id", "toy_envs:Keys-v0")
    go_on(ported, run)
    assert len(stored(run).dtype) == 10 + (7 if ported.__name__ == "dreamer_v3" else 6)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that ended well."""
    return train(importlib.import_module(PORTED[-1]), tmp_path_factory.mktemp("finished"), *TOY)


BROKEN = {
    "cut replay": lambda run: os.truncate(run / "replay/steps", 100),
    "lost replay": lambda run: (run / "replay/steps").unlink(),
    "cut checkpoint": lambda run: os.truncate(run / "checkpoint.pt", 10_000),
    "empty checkpoint": lambda run: os.truncate(run / "checkpoint.pt", 0),
    "lost checkpoint": lambda run: (run / "checkpoint.pt").unlink(),
    "another script's": lambda run: (run / "args.json").write_text('{"script": "planet"}'),
    "another version's": lambda run: (run / "args.json").write_text('{"script": "dreamer_v3", "gone": 1}'),
    "no run": lambda run: (run / "args.json").unlink(),
}


@pytest.mark.parametrize(
    "change", [*BROKEN, "--env-id Acrobot-v1", "--num-envs 2", "--size 25m", "--stoch 8", "--env-id toy_envs:Bounds-v0"]
)
def test_a_refused_resume_changes_nothing(new_house, finished, refused, change, tmp_path):
    run = tmp_path / finished.name
    shutil.copytree(finished, run)
    if change in BROKEN:
        BROKEN[change](run)
    before = contents(run)
    refused(new_house, "--resume", run, "--total-timesteps", 100, *(change.split() if change[0] == "-" else []))
    assert contents(run) == before


def test_two_runs_of_one_second_have_folders_of_their_own(new_house, tmp_path):
    for _ in range(3):
        run_script(new_house, *TOY, "--total-timesteps", 9, *tiny(new_house), cwd=tmp_path)
    assert len(list((tmp_path / "runs").iterdir())) == 3


# Kills and signals


@slow
def test_kill_in_the_middle_of_a_save(new_house, tmp_path):
    patch = """
import os, signal, time
whole, calls = s.torch.save, []
def half(state, file):
    calls.append(1)
    if len(calls) < 45: return whole(state, file)
    file.write(b"half a checkpoint"); file.flush(); time.sleep(2)
    os.kill(os.getpid(), signal.SIGKILL)
s.torch.save = half
"""
    run = train(new_house, tmp_path, *TOY, *NOW, patch=patch, code=-signal.SIGKILL)
    assert min(frames(run), metrics(run)[-1][0]) >= 40  # the log is on the disk too
    go_on(new_house, run)


@slow
def test_kills_at_random_moments():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    kill = importlib.import_module("kill")
    figures = kill.kill(times=3, seed=0)  # exits if one is not survived
    assert figures["kills"] == 3 and figures["frames"] >= 400 and figures["lost_most"] < 400


@slow
def test_steps_that_came_after_the_last_save_are_lost(new_house, batches, tmp_path):
    """Also if the replay has come round: they lie where the oldest steps were, which are gone."""
    process = start(new_house, tmp_path, *TOY, "--total-timesteps", 10**6)
    run = only_run(tmp_path)
    wait_for(lambda: frames(run) > 250, process)
    process.kill()
    process.communicate()
    state = checkpoint(run)  # as if the last save was 30 frames ago
    state["progress"] = (state["progress"][0] - 30, *state["progress"][1:])
    state["replay"]["count"] -= 30
    state["replay"]["fresh"] = []
    torch.save(state, run / "checkpoint.pt")
    go_on(new_house, run, 60)


@slow
@pytest.mark.parametrize("number, group", [("INT", True), ("TERM", True), ("TERM", False), ("HUP", False)])
@pytest.mark.parametrize("flags", [[*TOY, "--num-envs", 2], TWO_IMAGES], ids=["state", "pixels"])
def test_a_signal_saves_and_says_how_to_resume(new_house, flags, number, group, tmp_path):
    """To the process alone as `kill` sends it, or to the group with its environments as a terminal does."""
    process, number = start(new_house, tmp_path, *flags), getattr(signal, f"SIG{number}")
    run, before = only_run(tmp_path), frames(only_run(tmp_path))
    os.killpg(process.pid, number) if group else process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert any(f"--resume runs/{run.name}" in told[-1] for told in (out.splitlines(), lines(err)) if told)
    assert frames(run) >= before
    wait_for(lambda: subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True).returncode, seconds=20)
    go_on(new_house, run)


def test_nohup(new_house, tmp_path):
    """A terminal that is closed stops no run that was started with it."""
    patch = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)"
    process = start(new_house, tmp_path, *TOY, "--total-timesteps", 10**6, patch=patch)
    process.send_signal(signal.SIGHUP)
    before = frames(only_run(tmp_path))
    wait_for(lambda: frames(only_run(tmp_path)) > before + 40, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM


@slow
def test_a_second_signal_leaves_an_evaluation_that_never_ends(new_house, tmp_path):
    patch = """
import pathlib
whole = s.evaluate
def evaluate(*args, **kwargs):
    pathlib.Path("go").touch()
    return whole(*args, **kwargs)
s.evaluate = evaluate
"""
    flags = ["--env-id", "toy_envs:Hang-v0", *tiny(new_house), "--eval-every", 50, "--eval-episodes", 1]
    process = spawn(new_house, tmp_path, *flags, "--total-timesteps", 1000, patch=patch)
    wait_for((tmp_path / "go").exists, process)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None and frames(only_run(tmp_path)) == 50
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)
    (tmp_path / "go").unlink()
    go_on(new_house, only_run(tmp_path), 40, "--eval-every", 0)


def test_an_evaluation_that_was_stopped_is_no_result(new_house, tmp_path, monkeypatch):
    whole = new_house.evaluate

    def stopped(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(*args)

    monkeypatch.setattr(new_house, "evaluate", stopped)
    run = train(new_house, tmp_path, *TOY, "--eval-every", 50, frames=1000, code=128 + signal.SIGTERM)
    assert metrics(run) and not any(key.startswith("eval/") for _, key, _ in metrics(run))


def undocumented(script, run):
    """Keys in the log of a run that the script's page does not explain."""
    keys = {*re.findall(r"`(\w+/[^`]+)`", (ROOT / f"docs/{script.__name__}.md").read_text())} - {"charts/<name>"}
    patterns = "|".join(re.sub(r"<\w+>", ".+", key) for key in keys)
    tags = read_events(run).Tags()
    return [key for key in tags["scalars"] + tags["images"] if not re.fullmatch(patterns, key)]


@pytest.mark.parametrize("kind", ["", "Image"])
def test_success_and_what_an_environment_logs(ported, kind, tmp_path):
    """The largest of each episode, also of frames that action repeat hides, and the success of evaluations."""
    flags = ["--env-id", f"toy_envs:Success{kind}-v0", "--num-envs", 2, "--eval-every", 60, "--action-repeat", 2]
    run = train(ported, tmp_path, *flags, frames=80)
    rows = metrics(run)
    seen = {key: {value for _, name, value in rows if name == key} for _, key, _ in rows}
    assert seen["charts/success"] == seen["eval/success"] == {1.0}
    assert (seen["charts/steps/taken"], seen["charts/low"], seen["charts/odd"]) == ({20.0}, {-1.0}, {1.0})
    assert set(undocumented(ported, run)) == {"charts/steps/taken", "charts/low", "charts/odd"}  # no masks


def test_lengths_rows_of_metrics_and_the_actions_that_led_to_each_step(ported, tmp_path):
    with calls(ported.Agent, "update") as seen:
        run = train(ported, tmp_path, *TOY, "--action-repeat", 2, frames=120)
    rows, learnt = scalars(run), [(result[1] if type(result) is tuple else result) for _, result in seen]
    assert {length for _, length in rows["charts/episodic_length"]} == {20.0}
    before, after = [int(count) for _, count in rows["charts/updates"][-2:]]
    mean = np.mean([step["losses/reward_loss"].item() for step in learnt[before:after]])
    assert rows["losses/reward_loss"][-1][1] == pytest.approx(mean, rel=1e-5)
    steps = np.roll(stored(run)[:, 0], -checkpoint(run)["replay"]["count"])  # the oldest first: it has come round
    assert np.array_equal(steps["is_first"][1:], steps["is_last"][:-1])
    assert ported.__name__ == "dreamer_v3" or not steps["action"][steps["is_first"]].any()  # whose RSSM forgets them
    for episode in np.split(steps, np.flatnonzero(steps["is_last"]) + 1):  # what the toy shows
        number = (episode["reward"] + 1) // 2 + episode["action"][:, 1] * ~episode["is_first"]
        shown = np.abs(np.sin(np.arange(100)[:, None] + number)) - episode["vector"][:, 0]
        assert (np.abs(shown) < 1e-4).all(1).any()


# Trouble


@slow
@pytest.mark.parametrize(
    "trouble, kind", [("Raise", ""), ("Nan", ""), ("Reset", ""), ("Raise", "Image"), ("Exit", "Image")]
)
def test_trouble_in_an_environment_keeps_the_last_checkpoint(ported, trouble, kind, tmp_path):
    (tmp_path / "go").touch()
    flags = ["--env-id", f"toy_envs:{trouble}{kind}-v0", "--num-envs", 2 if kind else 1, "--save-every", 4]
    run = train(ported, tmp_path, *flags, fresh=True, code=1)
    assert frames(run) == (20 if trouble == "Reset" else 8) * (2 if kind else 1)
    (tmp_path / "go").unlink()
    go_on(ported, run, 60)


@slow
@pytest.mark.parametrize("trouble", ["Raise", "Nan"])
def test_trouble_in_an_evaluation_loses_nothing(new_house, trouble, tmp_path):
    patch = "import pathlib\nwhole = s.evaluate\ns.evaluate = lambda *a: pathlib.Path('go').touch() or whole(*a)"
    flags = ["--env-id", f"toy_envs:{trouble}-v0", *tiny(new_house), "--eval-every", 50, "--total-timesteps", 60]
    result = subprocess.run(
        command(new_house, *flags, patch=patch), cwd=tmp_path, env=environment(), timeout=60, capture_output=True
    )
    run = only_run(tmp_path)
    assert frames(run) >= 50, result.stderr
    (tmp_path / "go").unlink()
    go_on(new_house, run, 40, "--eval-every", 0)


@slow
def test_an_environment_process_that_is_killed(new_house, tmp_path):
    process = start(new_house, tmp_path, *TWO_IMAGES)
    newest = subprocess.run(["pgrep", "--newest", "--session", str(process.pid)], capture_output=True, text=True)
    os.kill(int(newest.stdout), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == 1
    go_on(new_house, only_run(tmp_path))


@slow
@pytest.mark.parametrize("flags", [TOY, TWO_IMAGES], ids=["state", "pixels"])
def test_a_loss_that_is_not_finite(new_house, flags, tmp_path):
    """It is named, the last checkpoint is kept, and nothing of the broken model gets into the replay."""
    patch = """
whole, calls = s.Agent.update, []
def broken(self, *args):
    calls.append(1)
    if len(calls) == 12:
        next(self.parameters()).data.fill_(float("nan"))
    return whole(self, *args)
s.Agent.update = broken
"""
    flags = [*flags, *tiny(new_house), *NOW, "--total-timesteps", 200]
    result = run_script(new_house, *flags, cwd=tmp_path, patch=patch, code=1, timeout=60)
    line = next(line for line in lines(result.stderr) if "not finite" in line)
    assert "losses/" in line and "update 12" in line and "Traceback" not in result.stderr
    run = only_run(tmp_path)
    assert progress(run)[1] == 11
    go_on(new_house, run, 100)


def test_a_disk_that_is_too_small_is_refused(world, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), dict(free=10**4)))
    line = refused(world, *TWO_IMAGES, "--total-timesteps", 60, *tiny(world))
    assert "GB" in line and not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_evaluation_uses_seeds_that_training_never_saw(new_house, tmp_path, monkeypatch):
    seeds, evaluating, reset, evaluate = {True: [], False: []}, [], gym.vector.SyncVectorEnv.reset, new_house.evaluate

    def watched(self, *, seed=None, options=None):
        seeds[bool(evaluating)].extend(seed)
        return reset(self, seed=seed, options=options)

    def evaluated(*args):
        evaluating.append(1)
        returns = evaluate(*args)
        evaluating.clear()
        return returns

    monkeypatch.setattr(gym.vector.SyncVectorEnv, "reset", watched)
    monkeypatch.setattr(new_house, "evaluate", evaluated)
    flags = [*TOY, "--num-envs", 3, "--eval-every", 30, "--eval-episodes", 4]
    go_on(new_house, train(new_house, tmp_path, *flags, frames=90), 60)
    assert len(seeds[False]) == 6 and len(seeds[True]) == 20
    assert len(set(seeds[True] + seeds[False])) == 26


# Several processes


PARALLEL = [name for name in PORTED if name in ("dreamer_v3", "genie")]


def updates(rank, world, name, folder):
    """20 updates of one process with its share of the batch, without chance; leaves its agent in `folder`."""
    torch.set_num_threads(1)
    script = importlib.import_module(name)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    script.sample_onehot = lambda probs: F.one_hot(probs.argmax(-1), probs.shape[-1]) + probs - probs.detach()
    args = script.parse_args(["--env-id", "CartPole-v1", *tiny(script)])
    agent, data = agent_and_batch(script, args, SPACES, gym.spaces.Discrete(4), f"{folder}/replay_{world}_{rank}")
    first = {key: value.clone() for key, value in agent.state_dict().items()}
    for _ in range(20):
        agent.update({key: value.chunk(world)[rank] for key, value in data.items()})
    torch.save(dict(agent=agent.state_dict(), first=first), f"{folder}/{world}_{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


@slow
@pytest.mark.parametrize("ported", PARALLEL, indirect=True)
def test_two_processes_update_as_one(ported, tmp_path):
    for world in (1, 2):
        torch.multiprocessing.spawn(updates, (world, ported.__name__, str(tmp_path)), world)
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    moved = 0
    for key, first in one["first"].items():
        a, b, c = (state["agent"][key].double() for state in (one, *two))
        assert torch.equal(b, c), key  # the processes stay together
        moved += not torch.equal(a, first)
        assert (a - b).norm() <= 1e-2 * (a - first).norm() + 1e-6, key
    assert moved > len(one["first"]) / 2


@slow
@pytest.mark.parametrize("ported", PARALLEL, indirect=True)
def test_torchrun_trains_stops_and_resumes(ported, tmp_path):
    """A signal that reaches one process alone ends both, after the same update."""

    def launch(*args):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
        return [spawn(ported, tmp_path, *args, patch=IN_GROUP, **env, RANK=str(rank)) for rank in (0, 1)]

    def end(processes):
        results = [process.communicate(timeout=120) for process in processes]
        assert not any("Traceback" in err or "gloo_" in err for _, err in results), results
        return [process.returncode for process in processes]

    flags = [*TOY, "--num-envs", 2, *tiny(ported), "--train-ratio", 64, "--save-every", 20, "--eval-every", 90]
    assert end(launch(*flags, "--total-timesteps", 100)) == [0, 0]
    run = only_run(tmp_path)
    updates = progress(run)[1]
    assert frames(run) == 100 and updates > 10 and metrics(run)
    assert not np.array_equal(*(stored(run, rank)["vector"][:30] for rank in (0, 1)))  # each has its own environments
    for sent_to in (0, 1):
        before = frames(run)
        processes = launch("--resume", run, "--total-timesteps", 10**4)
        wait_for(lambda before=before: frames(run) > before + 40, processes[0])
        processes[sent_to].send_signal(signal.SIGTERM)
        assert end(processes)[:: 1 - 2 * sent_to] == [128 + signal.SIGTERM, 0]
        assert before < frames(run) < 10**4 and progress(run)[1] > updates
