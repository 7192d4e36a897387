"""Data parallelism: several processes with a share of the batch each do what one does with all of it."""

import importlib
import socket
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, agent_and_batch, checkpoint, environment, lines, metrics, only_run, tiny

pytestmark = pytest.mark.slow
SPACES = {"vector": gym.spaces.Box(-np.inf, np.inf, (3,)), "image": gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)}
UPDATES = 3  # the learning rate of the first is 0


def update(rank, world, name, folder):
    """Some updates of one process with its share of batch and noise; leaves its agent and metrics in `folder`."""
    torch.set_num_threads(1)
    script = importlib.import_module(name)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    args = script.parse_args(["--env-id", "CartPole-v1", *tiny(script)])
    agent, data = agent_and_batch(script, args, SPACES, gym.spaces.Discrete(4), f"{folder}/replay_{world}_{rank}")
    first = {key: value.clone() for key, value in agent.state_dict().items() if torch.is_tensor(value)}
    share = lambda x: x.chunk(world)[rank]  # noqa: E731
    for _ in range(UPDATES):
        noise = agent.noise(*data["reward"].shape)  # the same in all processes
        mine = [{key: share(value) for key, value in values.items()} for values in (data, noise)]
        _, values = agent.update(*mine)
    torch.save(dict(agent=agent.state_dict(), first=first, metrics=values), f"{folder}/{world}_{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def test_two_processes_update_as_one(script, tmp_path):
    torch.multiprocessing.spawn(update, (1, script.__name__, str(tmp_path)), 1)
    torch.multiprocessing.spawn(update, (2, script.__name__, str(tmp_path)), 2)
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    moved = 0
    for key, first in one["first"].items():
        a, b, c, first = (value.double() for value in (*(state["agent"][key] for state in (one, *two)), first))
        assert torch.equal(b, c), key  # the processes stay together
        moved += not torch.equal(a, first)
        assert (a - b).norm() <= 1e-3 * (a - first).norm() + 1e-7, key
    assert moved > len(one["first"]) / 2
    for key, value in one["metrics"].items():
        if key.startswith("losses/"):
            both = (two[0]["metrics"][key] + two[1]["metrics"][key]) / 2
            torch.testing.assert_close(value, both, rtol=1e-4, atol=1e-5)


def test_torchrun_trains_saves_and_resumes(script, tmp_path):
    def torchrun(*args):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
        command = [sys.executable, *launch, str(ROOT / f"{script.__name__}.py"), *map(str, args)]
        result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200)
        assert result.returncode == 0, result.stderr
        assert not lines(result.stderr), result.stderr

    torchrun("--env-id", "CartPole-v1", "--num-envs", 2, "--total-timesteps", 200, *tiny(script))
    run = only_run(tmp_path)
    state = checkpoint(run)
    assert state["step"] == 200 and state["updates"] > 10 and len(state["processes"]) == 2
    assert {path.name for path in (run / "replay").iterdir()} == {"0", "1"}
    vectors = [np.load(run / f"replay/{rank}/vector.npy")[:50] for rank in (0, 1)]
    assert not np.array_equal(*vectors)  # each has environments of its own
    torchrun("--resume", run, "--total-timesteps", 300)
    assert checkpoint(run)["step"] == 300 and checkpoint(run)["updates"] > state["updates"]
    assert int(metrics(run)[-1][0]) > 200
