"""A run made small for the repository: it can be evaluated and played."""

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, WORLDS, train

sys.path.append(str(ROOT / "benchmarks"))
import release

SHIPPED = sorted(path.parent.name for path in (ROOT / "benchmarks/results").glob("*/checkpoint.pt"))


def dream_errors(script, folder):
    """Acts in the dream of a run -> mean difference of its pictures from the real ones, of 255."""
    agent, env = script.load_run(script.parse_args(["--evaluate", str(folder), "--no-cuda"]), str(folder))
    assert all(torch.isfinite(p).all() for p in agent.parameters())
    dream = script.Dream(agent, env)
    dream.reset(seed=0)
    errors = []
    for _ in range(20):
        obs, reward, *_, info = dream.step(dream.action_space.sample())
        assert np.isfinite(reward)
        errors.append(np.abs(script.picture(obs).astype(float) - script.picture(info["real"])).mean())
    return np.mean(errors)


@pytest.mark.parametrize("name", WORLDS)
def test_a_released_run_is_evaluated_and_played(name, tmp_path, monkeypatch, capsys):
    script = importlib.import_module(name)
    run, small = train(script, tmp_path, "--env-id", "CartPole-v1"), tmp_path / "small"
    monkeypatch.setattr(sys, "argv", ["release.py", str(run), str(small)])
    release.main()
    files = {"args.json", "checkpoint.pt", "metrics.csv"} & {path.name for path in run.iterdir()}
    assert {path.name for path in small.iterdir()} == files
    assert (small / "checkpoint.pt").stat().st_size < (run / "checkpoint.pt").stat().st_size / 4
    capsys.readouterr()
    script.main(["--evaluate", str(small), "--eval-episodes", "2"])
    assert "over 2 episodes" in capsys.readouterr().out
    dream_errors(script, small)


@pytest.mark.parametrize("name", [name for name in SHIPPED if not name.startswith("genie")])
def test_what_is_shipped_can_be_played(name):
    folder = ROOT / "benchmarks/results" / name
    assert (folder / "checkpoint.pt").stat().st_size < 2e6
    script = importlib.import_module(json.loads((folder / "args.json").read_text())["script"])
    assert dream_errors(script, folder) < 20  # an untrained model is grey
