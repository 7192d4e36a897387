"""What only a GPU shows: captured updates and actions against plain calls, and runs with the default flags.

Run by `python -m pytest tests/test_cuda.py`.
"""

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import SPACES, agent_and_batch, checkpoint, metrics, only_run, run_script, tiny
from torch.utils._pytree import tree_map

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
KINDS = {"plain": "--no-compile --no-amp", "compiled": "--compile --amp"}
GPU = ("--no-cuda", "--no-compile", "--no-amp")  # what the tiny runs switch off


@pytest.fixture(autouse=True)
def precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def equal(plain, mine, kind):
    """Sums are taken in another order in every call, and bfloat16 rounds what they give."""
    rtol, atol = (1e-3, 1e-4) if kind == "plain" else (0.05, 0.02)
    torch.testing.assert_close(mine, plain, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("action", [gym.spaces.Discrete(3), gym.spaces.Box(-1, 1, (2,))], ids=["discrete", "box"])
def test_captured_updates_and_actions_are_the_plain_ones(ported, kind, action, tmp_path):
    if ported.__name__ == "planet" and isinstance(action, gym.spaces.Discrete):
        pytest.skip("PlaNet's actions are continuous")
    args = ported.parse_args([*(flag for flag in tiny(ported) if flag not in GPU), *KINDS[kind].split()])
    args.batch_length = 10  # obs_steps has eight and two
    device, results = ported.setup(args), []
    for name in ("plain", "graph"):
        agent, data = agent_and_batch(ported, args, SPACES, action, tmp_path / name, device)
        update, act, carry, row = agent.update, agent.act, agent.initial(args.batch_size), {}
        if name == "graph":
            update, act = ported.Graph(update, device), ported.Graph(act, device)
        torch.manual_seed(1)
        for i in range(6):  # of which three are plain; the same memory holds other data
            new = {key: value.roll(i, 0) for key, value in data.items()}
            out = update(new)
            row[f"update {i}"] = tree_map(torch.clone, out[1] if isinstance(out, tuple) else out)
            carry = act({key: new[key][:, i] for key in (*SPACES, "is_first")}, carry)
            row[f"action {i}"] = [x.clone() for x in carry]
        results.append(row | {"parameters": agent.state_dict(), "optimizer": agent.optimizer_state()})
    equal(*results, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_genies_captured_updates_are_the_plain_ones(kind):
    import genie

    args = genie.parse_args([*(flag for flag in tiny(genie) if flag not in GPU), *KINDS[kind].split()])
    device, results = genie.setup(args), []
    shape = args.batch_size, args.clip_length, args.image_size, args.image_width, 3
    for graph in (lambda function, _: function, genie.Graph):
        torch.manual_seed(0)
        agent, row = genie.Agent(args, device), {}
        video = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        for stage in (0, 1):
            update = graph(lambda video, agent=agent, stage=stage: agent.update(stage, video), device)
            for i in range(6):
                row[f"stage {stage}, update {i}"] = tree_map(torch.clone, update(video.roll(i, 0)))
        results.append(row | {"parameters": agent.state_dict()})
    equal(*results, kind)


MORE = {"genie": ("--steps", 9), "worldmodels_v1": ("--iterations", 2)}


def test_a_run_with_the_default_flags_goes_on_after_its_end(house, tmp_path):
    env = "Square" if house.__name__ == "genie" else "Image"
    flags = [flag for flag in tiny(house) if flag not in GPU]
    flags += ["--env-id", f"toy_envs:{env}-v0", "--eval-every", 40, "--save-every", 40]
    run_script(house, *flags, "--total-timesteps", 400 if env == "Square" else 120, cwd=tmp_path)
    run = only_run(tmp_path)
    first = checkpoint(run)
    run_script(house, "--resume", run, *MORE.get(house.__name__, ("--total-timesteps", 200)), cwd=tmp_path)
    second = checkpoint(run)
    changed = any(not torch.equal(value, second["agent"][key]) for key, value in first["agent"].items())
    assert changed or first["progress"] != second["progress"]
    assert all(np.isfinite(x) for _, _, x in metrics(run))
    assert run_script(house, "--evaluate", run, "--eval-episodes", 2, cwd=tmp_path).stdout
