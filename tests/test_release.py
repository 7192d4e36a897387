"""A run made small for the repository: it can be evaluated and played, and says that it cannot be resumed."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, only_run, run_script, tiny

sys.path.append(str(ROOT / "benchmarks"))
import release

SHIPPED = sorted(path.parent.name for path in (ROOT / "benchmarks/results").glob("*/checkpoint.pt"))


def test_a_released_run_is_evaluated_but_not_resumed(house, tmp_path, refused, monkeypatch, capsys):
    flags = ["--env-id", "CartPole-v1", "--total-timesteps", 60, *tiny(house)]
    run_script(house, *flags, cwd=tmp_path)
    run, small = only_run(tmp_path), tmp_path / "small"
    monkeypatch.setattr(sys, "argv", ["release.py", str(run), str(small)])
    release.main()
    assert (small / "checkpoint.pt").stat().st_size < (run / "checkpoint.pt").stat().st_size / 4
    capsys.readouterr()
    house.main(["--evaluate", str(small), "--eval-episodes", "2"])
    assert "over 2 episodes" in capsys.readouterr().out
    assert "without its optimizer" in refused(house, "--resume", small)


@pytest.mark.parametrize("name", [name for name in SHIPPED if not name.startswith("genie")])
def test_what_is_shipped_can_be_played(name):
    folder = ROOT / "benchmarks/results" / name
    assert (folder / "checkpoint.pt").stat().st_size < 2e6
    script = __import__(json.loads((folder / "args.json").read_text())["script"])
    args = script.parse_args(["--play", str(folder), "--no-cuda"])
    agent, env = script.load_run(args, str(folder))
    dream = script.Dream(agent, env)
    obs, info = dream.reset(seed=0)
    errors = []
    for _ in range(20):
        obs, reward, *_, info = dream.step(dream.action_space.sample())
        assert np.isfinite(reward)
        errors.append(np.abs(dream.render().astype(float) - script.picture(info["real"])).mean())
    assert np.mean(errors) < 20  # of 255: an untrained model is grey
    assert all(torch.isfinite(p).all() for p in agent.parameters())
