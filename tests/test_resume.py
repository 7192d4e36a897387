"""--resume goes on exactly: N frames, a stop, and N more leave the same bits as 2N frames in one go."""

import signal

import numpy as np
import pytest
import torch
from conftest import checkpoint, lines, metrics, only_run, run_script, start_script, tiny

TASKS = {
    "CartPole-v1": "--total-timesteps {}".format,
    "dmc-cartpole-balance": lambda n: f"--obs state --action-repeat 2 --time-limit 40 --total-timesteps {2 * n}",
    "atari-pong": lambda n: f"--image-size 64 --action-repeat 4 --time-limit 80 --total-timesteps {4 * n}",
}
N = 120


def same(a, b, path="checkpoint"):
    """Checks that two nested structures are equal to the bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8)), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def same_runs(one, two):
    same(checkpoint(one), checkpoint(two))
    assert metrics(one) == metrics(two) and len(metrics(one)) > 30
    files = sorted(path.name for path in (one / "replay").iterdir())
    assert files and files == sorted(path.name for path in (two / "replay").iterdir())
    for name in files:
        assert (one / "replay" / name).read_bytes() == (two / "replay" / name).read_bytes(), name


@pytest.mark.parametrize("more", ["--num-envs 1", "--num-envs 4", "--num-envs 1 --amp"])
@pytest.mark.parametrize("env_id", [pytest.param(x, marks=[pytest.mark.slow] * (x != "CartPole-v1")) for x in TASKS])
def test_two_halves_equal_the_whole(script, env_id, more, tmp_path):
    flags = ["--env-id", env_id, *tiny(script), *more.split()]
    for name in ("whole", "halves"):
        (tmp_path / name).mkdir()
    run_script(script, *flags, *TASKS[env_id](2 * N).split(), cwd=tmp_path / "whole")
    run_script(script, *flags, *TASKS[env_id](N).split(), cwd=tmp_path / "halves")
    run = only_run(tmp_path / "halves")
    frames, agent = metrics(run)[-1][0], checkpoint(run)["agent"]
    total = TASKS[env_id](2 * N).split()[-1]
    result = run_script(script, "--resume", run, "--total-timesteps", total, cwd=tmp_path / "halves")
    assert not lines(result.stderr)
    assert int(metrics(run)[-1][0]) > int(frames)
    same_runs(only_run(tmp_path / "whole"), run)
    changed = [k for k, v in checkpoint(run)["agent"].items() if torch.is_tensor(v) and not torch.equal(v, agent[k])]
    assert changed, "nothing was learnt after the stop"


def test_a_replay_that_has_wrapped_around(script, tmp_path):
    flags = ["--env-id", "CartPole-v1", "--replay-size", 100, *tiny(script)]
    for name in ("whole", "halves"):
        (tmp_path / name).mkdir()
    run_script(script, *flags, "--total-timesteps", 2 * N, cwd=tmp_path / "whole")
    run_script(script, *flags, "--total-timesteps", N, cwd=tmp_path / "halves")
    run = only_run(tmp_path / "halves")
    run_script(script, "--resume", run, "--total-timesteps", 2 * N, cwd=tmp_path / "halves")
    same_runs(only_run(tmp_path / "whole"), run)


@pytest.mark.slow
def test_stopped_by_a_signal_in_the_middle(script, tmp_path):
    flags = ["--env-id", "CartPole-v1", "--num-envs", 2, "--total-timesteps", 600, *tiny(script)]
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    run_script(script, *flags, cwd=tmp_path / "whole")
    process = start_script(script, *flags, cwd=tmp_path / "stopped")
    process.send_signal(signal.SIGTERM)
    assert "--resume" in process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGTERM
    run = only_run(tmp_path / "stopped")
    assert 0 < checkpoint(run)["step"] < 600
    run_script(script, "--resume", run, cwd=tmp_path / "stopped")
    same_runs(only_run(tmp_path / "whole"), run)


@pytest.mark.slow
def test_killed_after_a_save(script, tmp_path):
    """What came after the last save is lost and done again, nothing else."""
    flags = ["--env-id", "CartPole-v1", "--total-timesteps", 600, "--save-every", 0.01, *tiny(script)]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    run_script(script, *flags, cwd=tmp_path / "whole")
    process = start_script(script, *flags, cwd=tmp_path / "killed")
    run = only_run(tmp_path / "killed")
    while not (run / "checkpoint.pt").exists():
        assert process.poll() is None
    process.kill()
    process.communicate()
    run_script(script, "--resume", run, cwd=tmp_path / "killed")
    if script.LATENTS:  # those in the replay are newer than the checkpoint: it goes on, but not to the same bits
        assert checkpoint(run)["step"] == 600 and metrics(run)[-1][0] == "600"
    else:
        assert metrics(only_run(tmp_path / "whole")) == metrics(run)
        same(checkpoint(only_run(tmp_path / "whole"))["agent"], checkpoint(run)["agent"])


@pytest.mark.parametrize("env_id", ["toy_envs:Random-v0", "toy_envs:RandomImage-v0"])
def test_an_environment_that_is_not_deterministic_starts_a_fresh_episode(script, env_id, tmp_path):
    flags = ["--env-id", env_id, "--num-envs", 2, "--image-size", 64, *tiny(script)]
    run_script(script, *flags, "--total-timesteps", 100, cwd=tmp_path)
    run = only_run(tmp_path)
    count = checkpoint(run)["processes"][0]["replay"]["count"]
    result = run_script(script, "--resume", run, "--total-timesteps", 200, cwd=tmp_path)
    (warning,) = lines(result.stderr)
    assert "[0, 1] are not deterministic" in warning
    assert np.load(run / "replay/is_first.npy", mmap_mode="r")[count].all()
    assert np.load(run / "replay/reward.npy", mmap_mode="r")[count].tolist() == [0, 0]


def test_a_longer_run_and_other_intervals_may_be_asked_for(script, tmp_path):
    run_script(script, "--env-id", "CartPole-v1", "--total-timesteps", 100, *tiny(script), cwd=tmp_path)
    run = only_run(tmp_path)
    run_script(script, "--resume", run, "--total-timesteps", 140, "--log-every", 10, cwd=tmp_path)
    assert checkpoint(run)["step"] == 140
    run_script(script, "--resume", run, cwd=tmp_path)  # remembers the new total: nothing left to do
    assert checkpoint(run)["step"] == 140


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run directories by script, made when first asked for."""
    runs = {}

    def get(script):
        if script not in runs:
            folder = tmp_path_factory.mktemp(script.__name__)
            run_script(script, "--env-id", "CartPole-v1", "--total-timesteps", 60, *tiny(script), cwd=folder)
            runs[script] = only_run(folder)
        return runs[script]

    return get


@pytest.mark.parametrize(
    "flag",
    [
        "--env-id Acrobot-v1",
        "--num-envs 2",
        "--action-repeat 2",
        "--image-size 32",
        "--obs pixels",
        "--stoch 8",
        "--units 8",
    ],
)
def test_what_cannot_change_is_refused(script, finished, refused, flag):
    run = finished(script)
    before = (run / "checkpoint.pt").read_bytes(), (run / "args.json").read_bytes()
    line = refused(script, "--resume", run, "--total-timesteps", 60, *flag.split())
    assert flag.split()[0][2:].replace("-", "_") in line and "cannot change" in line
    assert before == ((run / "checkpoint.pt").read_bytes(), (run / "args.json").read_bytes())
