"""What goes wrong ends with one line that says what to do, exit code 2, and a run that can be continued."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from conftest import checkpoint, lines, only_run, run_script, start_script, tiny

pytestmark = pytest.mark.slow
CARTPOLE = ["--env-id", "CartPole-v1"]
NOW = ["--save-every", 0]  # a checkpoint at every step


def go_on(script, run, frames=20):
    """Continues a run for some frames: nothing that it needs was lost, and what it holds is sound."""
    state = checkpoint(run)
    assert all(value.isfinite().all() for value in state["agent"].values() if torch.is_tensor(value))
    repeat = json.loads((run / "args.json").read_text())["action_repeat"]
    total = state["step"] * repeat + frames
    run_script(script, "--resume", run, "--total-timesteps", total, cwd=run.parent.parent)
    assert checkpoint(run)["step"] * repeat >= total
    return state


# From outside


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whole_group", [False, True])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "toy_envs:Image-v0"])
def test_a_signal_saves_and_says_how_to_resume(trainer, env_id, whole_group, number, tmp_path):
    """To the process alone as `kill` sends it, or to the group with its environments as a terminal and `timeout` do."""
    flags = ["--env-id", env_id, "--num-envs", 2, *tiny(trainer)]
    process = start_script(trainer, *flags, cwd=tmp_path)
    os.killpg(process.pid, number) if whole_group else process.send_signal(number)
    out, err = process.communicate(timeout=60)
    run = only_run(tmp_path)
    assert process.returncode == 128 + number, err
    assert f"--resume runs/{run.name}" in out.splitlines()[-1]
    assert not lines(err)
    assert go_on(trainer, run)["updates"] > 0


def test_kill_in_the_middle_of_a_save(trainer, tmp_path):
    patch = """
import os, signal
whole, calls = s.torch.save, []
def half(state, file):
    calls.append(1)
    if len(calls) < 20: return whole(state, file)
    file.write(b"half a checkpoint"); file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
s.torch.save = half
"""
    run_script(trainer, *CARTPOLE, *NOW, *tiny(trainer), cwd=tmp_path, patch=patch, code=-signal.SIGKILL)
    run = only_run(tmp_path)
    assert (run / "checkpoint.pt.tmp").exists()
    assert go_on(trainer, run)["step"] > 10


def test_no_room_for_the_checkpoint(trainer, tmp_path):
    patch = """
import resource
whole, calls = s.save, []
def save(path, state):
    calls.append(1)
    if len(calls) == 20: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    whole(path, state)
s.save = save
"""
    result = run_script(trainer, *CARTPOLE, *NOW, *tiny(trainer), cwd=tmp_path, patch=patch, code=2)
    run = only_run(tmp_path)
    assert len(lines(result.stderr)) == 1 and "checkpoint.pt" in lines(result.stderr)[0], result.stderr
    assert not (run / "checkpoint.pt.tmp").exists()
    assert go_on(trainer, run)["step"] > 10


def test_no_room_for_the_replay(trainer, tmp_path):
    patch = """
import errno, os
s.Replay.reserve.__defaults__ = (64,)
whole, calls = os.posix_fallocate, []
def full(file, start, size):
    calls.append(1)
    if len(calls) > 20: raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    whole(file, start, size)
os.posix_fallocate = full
"""
    result = run_script(trainer, *CARTPOLE, *tiny(trainer), cwd=tmp_path, patch=patch, code=2)
    (line,) = lines(result.stderr)
    assert "No space left" in line and "--resume" in line
    assert go_on(trainer, only_run(tmp_path), 100)["step"] % 64 == 0


def test_no_room_for_the_metrics(trainer, tmp_path):
    patch = """
import errno
whole, calls = s.Log.__init__, []
class Full:
    def __init__(self, file): self.file = file
    def flush(self):
        calls.append(1)
        if len(calls) > 20: raise OSError(errno.ENOSPC, "No space left on device")
        self.file.flush()
def init(self, *args):
    whole(self, *args)
    self.file = Full(self.file)
s.Log.__init__ = init
"""
    result = run_script(trainer, *CARTPOLE, *tiny(trainer), cwd=tmp_path, patch=patch, code=2)
    assert len(lines(result.stderr)) == 1 and "No space left" in lines(result.stderr)[0], result.stderr
    go_on(trainer, only_run(tmp_path))


def test_a_disk_that_is_too_small_is_refused_at_the_start(trainer, tmp_path):
    patch = "import collections, shutil\nshutil.disk_usage = lambda _: collections.namedtuple('Usage', 'free')(10**6)"
    flags = ["--env-id", "toy_envs:Image-v0", "--total-timesteps", 10**5]
    result = run_script(trainer, *flags, *tiny(trainer), cwd=tmp_path, patch=patch, code=2)
    assert len(lines(result.stderr)) == 1 and "GB" in lines(result.stderr)[0], result.stderr


# Environments


@pytest.mark.parametrize("trouble, words", [("Raise", "the robot fell"), ("Nan", "nan"), ("Exit", "died")])
@pytest.mark.parametrize("kind, num_envs", [("", 1), ("Image", 2)])
def test_trouble_in_an_environment(trainer, trouble, words, kind, num_envs, tmp_path):
    if (trouble, num_envs) == ("Exit", 1):
        pytest.skip("one environment lives in the main process")
    flags = ["--env-id", f"toy_envs:{trouble}{kind}-v0", "--num-envs", num_envs, *tiny(trainer)]
    process = start_script(trainer, *flags, cwd=tmp_path)
    (tmp_path / "go").touch()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    *before, line = lines(err)
    assert trouble == "Raise" or not before, err  # whose traceback the user needs
    assert line.startswith(f"{trainer.__name__}.py: ") and words in line and "--resume" in line
    (tmp_path / "go").unlink()
    assert go_on(trainer, only_run(tmp_path))["updates"] > 0


def test_a_killed_environment_process(trainer, tmp_path):
    process = start_script(trainer, "--env-id", "toy_envs:Image-v0", "--num-envs", 2, *tiny(trainer), cwd=tmp_path)
    os.kill(environment_processes(process.pid)[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2, err
    (line,) = lines(err)
    assert "died" in line and "--resume" in line
    assert go_on(trainer, only_run(tmp_path))["updates"] > 0


def environment_processes(group):
    """Processes of a group that were forked by its fork server."""
    stats = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            stats[int(pid)] = int(fields[1])
    return sorted(pid for pid, parent in stats.items() if parent in stats and parent != group)


def test_nothing_is_left_running(trainer, tmp_path):
    process = start_script(trainer, "--env-id", "toy_envs:Image-v0", "--num-envs", 2, *tiny(trainer), cwd=tmp_path)
    children = environment_processes(process.pid)
    assert len(children) == 2
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    deadline = time.time() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in children):
        assert time.time() < deadline
        time.sleep(0.1)


# The model


def test_a_loss_that_is_not_finite(trainer, tmp_path):
    """The last checkpoint is kept, and nothing of the broken model gets into the replay."""
    patch = """
whole, calls = s.Agent.update, []
def broken(self, *args):
    calls.append(1)
    if len(calls) == 12:
        next(self.parameters()).data.fill_(float("nan"))
    return whole(self, *args)
s.Agent.update = broken
"""
    result = run_script(trainer, *CARTPOLE, *NOW, *tiny(trainer), cwd=tmp_path, patch=patch, code=2)
    (line,) = lines(result.stderr)
    assert "losses/" in line and "update 11" in line
    run = only_run(tmp_path)
    for path in (run / "replay").glob("*.npy"):
        array = np.load(path, mmap_mode="r")
        assert array.dtype.kind != "f" or np.isfinite(array).all(), path.name
    assert go_on(trainer, run, 100)["updates"] == 11


# The command line and what it names


@pytest.mark.parametrize(
    "env_id, word",
    [
        ("dmc-walker-fly", "dmc-walker-walk"),
        ("atari-pongg", "Pongg"),
        ("NoSuchThing-v0", "NoSuchThing"),
        ("no_such_module:Thing-v0", "no_such_module"),
        ("toy_envs:NoSuchThing-v0", "NoSuchThing"),
        ("toy_envs:BadAction-v0", "MultiDiscrete"),
        ("toy_envs:BadObservation-v0", "Text"),
        ("toy_envs:BadPart-v0", "Text"),
        ("atari-pong --obs state", "image"),
        ("toy_envs:NoRender-v0 --obs pixels", "render"),
        ("CartPole-v1 --batch-length 100", "--batch-length 100"),
        ("CartPole-v1 --replay-size 8", "--batch-length 8"),
        ("toy_envs:Image-v0 --image-size 60", "--image-size"),
        ("CartPole-v1 --deter 65", "--deter"),
        ("CartPole-v1 --bins 14", "--bins"),
    ],
)
def test_what_cannot_be_is_refused(script, refused, env_id, word, tmp_path, monkeypatch):
    if script.__name__ != "dreamer_v3" and word in ("--deter", "--bins"):
        pytest.skip("blocks and bins are DreamerV3's")
    monkeypatch.chdir(tmp_path)
    flags = tiny(script) + ["--total-timesteps", 50, "--num-envs", 1, "--env-id", *env_id.split()]
    assert word in refused(script, *flags)


def test_without_opengl(script, tmp_path):
    env = {key: "" for key in ("DISPLAY",)}
    patch = "import os\nos.environ.pop('MUJOCO_GL', None)\ns.find_library = lambda name: None"
    for flags in ("--obs pixels", "--obs both"):
        flags = ["--env-id", "dmc-cartpole-swingup", *flags.split(), *tiny(script)]
        result = run_script(script, *flags, cwd=tmp_path, patch=patch, code=2, **env)
        (line,) = lines(result.stderr)
        assert "apt-get install libosmesa6" in line and "--obs state" in line
    flags = [
        "--env-id",
        "dmc-cartpole-swingup",
        "--obs",
        "state",
        "--num-envs",
        1,
        "--total-timesteps",
        100,
        *tiny(script),
    ]
    run_script(script, *flags, cwd=tmp_path, patch=patch, **env)


# Run directories


@pytest.fixture
def run(script, tmp_path):
    """A run that ended well."""
    run_script(script, *CARTPOLE, "--total-timesteps", 60, *tiny(script), cwd=tmp_path)
    return only_run(tmp_path)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_run_directories_that_do_not_fit(script, run, refused, tmp_path):
    """Each is refused by whatever opens a run."""

    def refusals():
        lines = [refused(script, option, run) for option in ("--resume", "--evaluate", "--play")]
        return " ".join(lines) if len(set(lines)) > 1 else lines[0]

    saved, args = (run / "checkpoint.pt").read_bytes(), (run / "args.json").read_text()
    assert "is not a run directory" in refused(script, "--resume", tmp_path / "nothing")
    assert "is not a run directory" in refused(script, "--resume", tmp_path)

    (run / "checkpoint.pt").write_bytes(saved[: len(saved) // 2])
    assert "checkpoint.pt cannot be read" in refusals()
    (run / "checkpoint.pt").write_bytes(b"")
    assert "checkpoint.pt cannot be read" in refusals()
    (run / "checkpoint.pt").unlink()
    assert "has no checkpoint.pt" in refusals()
    torch.save({"script": "another", "agent": {}}, run / "checkpoint.pt")
    assert "not a checkpoint of" in refusals()
    (run / "checkpoint.pt").write_bytes(saved)

    change(run / "args.json", script="another")
    assert "was not made by" in refusals()
    (run / "args.json").write_text(args)
    change(run / "args.json", no_such_field=1)
    assert "was not made by" in refusals()
    (run / "args.json").write_text(args[:-20])
    assert "is not a run directory" in refusals()
    (run / "args.json").write_text(args)
    change(run / "args.json", units=24)
    assert "of another size" in refusals()
    (run / "args.json").write_text(args)
    assert (run / "checkpoint.pt").read_bytes() == saved
    go_on(script, run)


def test_a_replay_that_is_gone_is_refused(script, run, refused):
    saved = (run / "replay/reward.npy").read_bytes()
    (run / "replay/reward.npy").unlink()
    assert "replay" in refused(script, "--resume", run)
    (run / "replay/reward.npy").write_bytes(saved)
    go_on(script, run)
