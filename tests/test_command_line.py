"""The command line: help, presets, what is refused and with which line, args.json, --evaluate."""

import dataclasses
import importlib.util
import json
import re

import pytest
import torch
from conftest import ROOT, lines, run_script, tiny, train


def comments(ported):
    """Fields of Args with the comment that stands on their line."""
    source = (ROOT / f"{ported.__name__}.py").read_text()
    source = source[source.index("class Args") : source.index("\n\n\n", source.index("class Args"))]
    return dict(re.findall(r"^    (\w+): .*  # (.*)$", source, re.MULTILINE))


def test_help_shows_every_field_with_its_comment_and_the_presets(house, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = re.sub(r"[\s│]+", " ", run_script(house, "--help", cwd=tmp_path).stdout)
    fields = comments(house)
    assert list(fields) == [field.name for field in dataclasses.fields(house.Args)]
    for name, comment in fields.items():
        assert re.search(rf"--(no-)?{name.replace('_', '-')}(?![a-z-])", out), name
        assert comment.replace("`", "") in out.replace("`", ""), name
    for suite, preset in house.PRESETS.items():
        assert f"{suite}: {preset}" in out, suite
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("env_id", ["{}-some-thing", "environments.{}:Some-v1", "{}:{}-easy-v0", "{}/some-v1"])
def test_presets_by_suite_and_flags_over_them(ported, env_id):
    for suite, preset in ported.PRESETS.items():
        word, _, obs = suite.partition("-")
        if obs not in ("", "state"):
            continue  # a preset of one task
        flags = ["--env-id", env_id.format(word, word), *(["--obs", obs] if obs else [])]
        assert vars(ported.parse_args(flags)).items() >= preset.items(), suite
        args = ported.parse_args([*flags, "--num-envs", "3", "--total-timesteps", "77"])
        assert (args.num_envs, args.total_timesteps) == (3, 77)
    plain, default = ported.parse_args(["--env-id", "CartPole-v1"]), ported.Args()
    assert (plain.num_envs, plain.action_repeat, plain.obs) == (default.num_envs, default.action_repeat, None)


def test_a_flag_beats_a_preset_even_with_its_default_value(ported):
    for name, value in ported.PRESETS["dmc"].items():
        default = getattr(ported.Args(), name)
        if default is not None and default != value:
            flag = f"{'no-' * (default is False)}{name.replace('_', '-')}"
            value = [] if isinstance(default, bool) else [str(default)]
            args = ported.parse_args(["--env-id", "dmc-walker-walk", f"--{flag}", *value])
            assert getattr(args, name) == default, name


def test_without_the_gpu_nothing_is_compiled_or_rounded_unless_asked_for(house, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    spec = importlib.util.spec_from_file_location(house.__name__, house.__file__)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    (tmp_path / "args.json").write_text(
        json.dumps(dataclasses.asdict(script.parse_args([])) | {"script": house.__name__})
    )
    for flags, expected in [("", (1, 1)), ("--no-cuda", (0, 0)), ("--no-cuda --amp", (0, 1)), ("--no-amp", (1, 0))]:
        for run in ([], ["--resume", str(tmp_path)], ["--evaluate", str(tmp_path)]):
            args = script.parse_args([*flags.split(), *run])
            assert (args.compile, args.amp) == expected, (flags, run)


def test_the_commands_of_readme_and_docs_are_valid(house):
    """Every training command, as it stands; what takes a run stands in other tests, benchmarks/ is run by hand."""
    text = "\n".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    flags = re.findall(rf"python {house.__name__}\.py\b([^`#]*?)(?:$|`| #)", text.replace("\\\n", ""), re.MULTILINE)
    flags = [line.split() for line in flags if not re.search("<|…", line)]
    assert flags
    for line in flags:
        house.parse_args(line)


ZERO = (
    "seed eval_every warmup prefill pretrain overshooting_distance tokenizer_warmup lam_shift "
    "shortest controller_hidden brake collect_patience patience dream_context".split()
)  # 0 has a meaning


def test_numbers_out_of_range_and_a_missing_wandb_are_refused(house, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    types = {field.name: field.type for field in dataclasses.fields(house.Args)}
    whole, reals = ([name for name, type in types.items() if type in kinds] for kinds in ((int, int | None), (float,)))
    assert len(whole) > 15 and len(reals) > 8
    values = [(name, value) for name in whole for value in ("-1", "0") if value == "-1" or name not in ZERO]
    for name, value in values + [(name, value) for name in reals for value in ("-1", "nan", "inf")]:
        flag = "--" + name.replace("_", "-")
        line = refused(house, "--env-id", "CartPole-v1", *tiny(house), flag, value)
        assert flag in line, (flag, value, line)
    monkeypatch.setitem(house.sys.modules, "wandb", None)  # as if it was not installed
    assert "pip install wandb" in refused(house, "--env-id", "CartPole-v1", *tiny(house), "--track")
    assert not any(tmp_path.iterdir())


REFUSED = {"--image-size 60": "--image-size", "--decoder-blocks 16": "--depth", "--seed 1 --evaluate=": "is no run"}
REFUSED |= {"--batch-length 100 --total-timesteps 50": "--batch-length 100", "--replay-size 8": "--batch-length 8"}
REFUSED |= {"--env-id dmc-walker-fly": "walker-fly", "--env-id atari-pongg": "ongg", "--bins 14": "--bins"}
REFUSED |= {"--env-id NoSuchThing-v0": "NoSuchThing", "--env-id toy_envs:BadAction-v0": "MultiDiscrete"}
REFUSED |= {"--env-id toy_envs:NoRender-v0 --capture-video": "render_mode", "--resume nowhere": "nowhere is no run"}


@pytest.mark.parametrize("flags, word", REFUSED.items())
def test_what_cannot_be_is_refused_in_one_line(ported, refused, flags, word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if not hasattr(ported.Args(), flags.split()[0][2:].replace("-", "_")):
        pytest.skip("not a flag of this script")
    flags = ["--env-id", "CartPole-v1", "--total-timesteps", 60, *tiny(ported), *flags.split()]
    assert word in refused(ported, *flags)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_without_opengl(ported, tmp_path):
    flags = "--env-id dmc-cartpole-swingup --num-envs 1 --action-repeat 2 --total-timesteps 60".split()
    flags, settings = [*flags, *tiny(ported)], dict(cwd=tmp_path, MUJOCO_GL="disable")
    for obs in ("pixels", "both"):
        result = run_script(ported, *flags, "--obs", obs, **settings, code=1)
        assert "OpenGL" in lines(result.stderr)[-1] and "Traceback" not in result.stderr
    run_script(ported, *flags, "--obs", "state", **settings)


def test_arguments_are_saved_and_come_back(ported, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = "--env-id toy_envs:Vector-v0 --total-timesteps 60 --exp-name mine --seed 5 --run-dir elsewhere "
    flags = [*(flags + "--time-limit 15 --env-kwargs length 12 truncate True").split(), *tiny(ported)]
    run_script(ported, *flags, cwd=tmp_path)
    (run,) = (tmp_path / "elsewhere").iterdir()
    assert re.fullmatch(r"toy_envs:Vector-v0__mine__5__\d+", run.name)
    given = ported.parse_args(flags)
    for option in ("resume", "evaluate"):
        again = ported.parse_args([f"--{option}", str(run)])
        assert dataclasses.replace(again, **{option: None}) == given and getattr(again, option) == str(run)
    again = ported.parse_args(["--resume", str(run), "--log-every", "7", "--env-kwargs", "length", "9"])
    assert (again.log_every, again.env_kwargs) == (7, {"length": 9})
    assert "no_such_module" in refused(ported, "--evaluate", run, "--env-id", "no_such_module:Thing-v0")


@pytest.mark.parametrize("env_id", ["toy_envs:Image-v0", "toy_envs:Vector-v0"])
def test_evaluate(world, env_id, tmp_path):
    """Scores a run without changing it; the same again gives the same; --capture-video leaves a film of one episode."""
    av = pytest.importorskip("av")
    run = train(world, tmp_path, "--env-id", env_id)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    flags = ["--evaluate", run, "--eval-episodes", 3]
    one, two = (run_script(world, *flags, *more, cwd=tmp_path).stdout for more in ([], ["--capture-video"]))
    assert f"{env_id}: 210.00 ± 0.00 over 3 episodes" in one  # 1 + 2 + ... + 20
    assert one.splitlines()[-1] in two
    assert before == {path: path.read_bytes() for path in before}
    (film,) = run.rglob("*.mp4")
    with av.open(str(film)) as file:
        assert len(list(file.decode(video=0))) in (20, 21)


def test_an_evaluation_counts_each_episode_once(new_house, tmp_path):
    run = train(new_house, tmp_path, "--env-id", "toy_envs:Vector-v0", "--env-kwargs", "trouble", "short")
    args = new_house.parse_args(["--evaluate", str(run)])
    returns = new_house.evaluate(new_house.load_run(args, args.evaluate)[0], args, 0, tmp_path)["episodic_return"]
    assert len(set(returns)) > 3 and set(returns) <= {n * (n + 1) / 2 for n in range(5, 15)}


def test_an_evaluation_of_what_does_not_end(ported, tmp_path):
    run = train(ported, tmp_path, "--env-id", "toy_envs:Vector-v0")
    endless = ["--env-kwargs", "length", 10**9, "--action-repeat", 2000]
    out = run_script(ported, "--evaluate", run, "--eval-episodes", 1, *endless, cwd=tmp_path).stdout
    assert f"{108_000 * 108_001 / 2:.2f} ± 0.00" in out


@pytest.mark.slow
def test_evaluations_and_films_during_training(ported, tmp_path):
    flags = ["--env-id", "toy_envs:Image-v0", "--eval-every", 30, "--eval-episodes", 2, "--capture-video"]
    run = train(ported, tmp_path, *flags, frames=90, fresh=True, TQDM_DISABLE="1")
    assert len(list(run.rglob("videos/*/*.mp4"))) == 3
