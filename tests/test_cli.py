"""The command line: help, presets, args.json, and a README that explains every key that is logged."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys

import pytest
from conftest import EVERY, ROOT, STAGED, environment, only_run, run_script, tiny


@pytest.fixture(params=EVERY)
def script(request):
    return importlib.import_module(request.param)


def test_help_shows_every_field(script, tmp_path):
    out = run_script(script, "--help", cwd=tmp_path).stdout
    for field in dataclasses.fields(script.Args):
        assert re.search(rf"--(no-)?{field.name.strip('_').replace('_', '-')}(?![a-z])", out), field.name
    for suite in script.PRESETS:
        assert f"{suite}: " in re.sub(r"\s+", " ", out), suite
    assert not any(tmp_path.iterdir())


def test_import_runs_nothing(script, tmp_path):
    command = [sys.executable, "-c", f"import {script.__name__}", "--no-such-flag"]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "") and not any(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--no-such-flag", "--num-envs two", "--obs sound"])
def test_unknown_flags_and_values_are_refused(script, flag, capsys):
    with pytest.raises(SystemExit) as error:
        script.main(["--env-id", "CartPole-v1", *flag.split()])
    assert error.value.code == 2 and flag.split()[0] in capsys.readouterr().err.replace("\n", " ")


def test_presets_by_suite_and_flags_over_them(script):
    for suite, preset in script.PRESETS.items():
        env_id = suite.removesuffix("-state").removesuffix("-quick")
        more = ["--obs", "state"] * suite.endswith("-state") + ["--quick"] * suite.endswith("-quick")
        args = script.parse_args(["--env-id", f"{env_id}-some-thing", *more])
        assert {key: getattr(args, key) for key in preset} == preset, suite
        args = script.parse_args(
            ["--env-id", f"{env_id}-some-thing", *more, "--num-envs", "3", "--total-timesteps", "77"]
        )
        assert (args.num_envs, args.total_timesteps) == (3, 77)
        others = {key: value for key, value in preset.items() if key not in ("num_envs", "total_timesteps")}
        assert {key: getattr(args, key) for key in others} == others, suite
    plain, default = script.parse_args(["--env-id", "CartPole-v1"]), script.Args()
    assert (plain.num_envs, plain.action_repeat) == (default.num_envs, default.action_repeat)
    assert plain.obs == (None if script.__name__ not in STAGED else "pixels")


def test_arguments_are_saved_and_come_back(script, tmp_path):
    flags = [
        "--env-id",
        "CartPole-v1",
        "--total-timesteps",
        60,
        "--exp-name",
        "mine",
        "--seed",
        5,
        "--run-dir",
        "elsewhere",
    ]
    run_script(script, *flags, *tiny(script), cwd=tmp_path)
    (run,) = (tmp_path / "elsewhere").iterdir()
    assert re.fullmatch(r"CartPole-v1__mine__5__\d+", run.name)
    given = script.parse_args([*map(str, flags), *tiny(script)])
    for option in ("resume", "evaluate", "play"):
        again = script.parse_args([f"--{option}", str(run)])
        assert getattr(again, option) == str(run)
        assert dataclasses.replace(again, **{option: None}) == given
    saved = json.loads((run / "args.json").read_text())
    assert {key: saved[key] for key in dataclasses.asdict(given)} == dataclasses.asdict(given)
    assert script.parse_args(["--resume", str(run), "--log-every", "7"]).log_every == 7


def test_the_docs_explain_every_key(script, tmp_path):
    readme = ROOT / f"docs/{script.__name__}.md"
    documented = re.findall(
        r"`((?:charts|losses|stats|eval|video)/[^`]+)`", readme.read_text() if readme.exists() else ""
    )
    if not documented:
        pytest.skip("no table of keys")
    flags = ["--total-timesteps", 120, *tiny(script), "--eval-every", 60, "--eval-episodes", 1, "--capture-video"]
    run_script(script, "--env-id", "toy_envs:Mixed-v0", *flags, cwd=tmp_path)
    run = only_run(tmp_path)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run)).Reload().Tags()
    keys = set(events["scalars"]) | set(events["images"])
    rows = {line.split(",")[1] for line in (run / "metrics.csv").read_text().splitlines()[1:]}
    assert rows == set(events["scalars"]), "metrics.csv and TensorBoard differ"
    assert {"video/open_loop", "video/eval"} <= set(events["images"]) and list((run / "videos").glob("*.mp4"))
    patterns = [re.sub(r"<\w+>", r"\\w+", re.sub(r"([.])", r"\\\1", key)) for key in documented]
    missing = [key for key in sorted(keys) if not any(re.fullmatch(pattern, key) for pattern in patterns)]
    assert not missing, missing
