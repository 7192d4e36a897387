"""Dream, evaluation and play: the learned model as an environment, as a video and as a page."""

import base64
import io
import json
import re
import urllib.error
import urllib.request

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import agent_and_batch, only_run, press_a_key, run_script, served, tiny
from gymnasium.utils.env_checker import check_env
from PIL import Image


def make_dream(script, env_id, *flags, **options):
    args = script.parse_args(["--env-id", env_id, *flags, *tiny(script)])
    env = script.make_env(args)
    torch.manual_seed(1)
    spaces = {key: space for key, space in env.observation_space.items() if key not in script.FLAGS}
    return script.Dream(script.Agent(args, spaces, env.action_space), env, **options)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "toy_envs:Mixed-v0", "toy_envs:Image-v0", "toy_envs:Bounds-v0"])
@pytest.mark.filterwarnings("ignore")
def test_a_dream_is_a_gymnasium_environment(script, env_id):
    dream = make_dream(script, env_id)
    check_env(dream)
    dream.reset(seed=0)
    frame = dream.render()
    assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3


def test_dreams_are_reproducible(script):
    dream = make_dream(script, "toy_envs:Image-v0")

    def frames(seed):
        first, info = dream.reset(seed=seed)
        steps = [dream.step(t % 2) for t in range(8)]
        return [first["image"], info["real"]["image"]] + [step[0]["image"] for step in steps], [s[1] for s in steps]

    state = torch.get_rng_state()
    one, two, other = frames(3), frames(3), frames(4)
    assert torch.equal(state, torch.get_rng_state()), "a dream draws from the generator of training"
    assert all(map(np.array_equal, one[0], two[0])) and one[1] == two[1]
    assert not all(map(np.array_equal, one[0], other[0]))


def test_a_dream_is_cut_and_the_real_episode_may_end_before(script):
    dream = make_dream(script, "toy_envs:Vector-v0", length=30)  # its episodes have 20 steps, 5 of them seen before
    dream.reset(seed=0)
    steps = [dream.step(1) for _ in range(30)]
    assert [truncated for *_, truncated, _ in steps] == 29 * [False] + [True]
    assert [step[4]["real"]["is_last"] for step in steps] == 14 * [0] + 16 * [1]


def test_open_loop_sees_only_the_context(script, tmp_path):
    args = script.parse_args(["--env-id", "CartPole-v1", *tiny(script)])
    spaces = {"image": gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)}
    agent, data = agent_and_batch(script, args, spaces, gym.spaces.Discrete(3), tmp_path)
    for parameter in agent.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # outputs that differ visibly
    B, T = data["reward"].shape

    def dreamt(**changes):
        video = script.open_loop(agent, data | changes, context=3)
        assert video.shape == (T, 3 * 64, B * 64, 3) and video.dtype == np.uint8
        return video[:, 64:128]

    whole, image, action = dreamt(), data["image"], data["action"]
    truth = script.open_loop(agent, data, context=3)[3:, :64]
    np.testing.assert_array_equal(truth, torch.cat(list(image.unbind(0)), 2)[3:].numpy())
    later, earlier, moved = image.clone(), image.clone(), action.clone()
    later[:, 3:] = 255 - later[:, 3:]
    np.testing.assert_array_equal(dreamt(image=later), whole)
    earlier[:, 2] = 255 - earlier[:, 2]
    changed = dreamt(image=earlier)
    np.testing.assert_array_equal(changed[:2], whole[:2])
    assert all((changed[t] != whole[t]).any() for t in range(2, T)), "the context is not seen"
    moved[:, 5] = moved[:, 5].roll(1, -1)
    changed = dreamt(action=moved)
    np.testing.assert_array_equal(changed[:5], whole[:5])
    assert (changed[5] != whole[5]).any(), "actions have no effect"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run directories by script and environment, made when first asked for."""
    runs = {}

    def get(script, env_id="toy_envs:Image-v0"):
        if (script, env_id) not in runs:
            folder = tmp_path_factory.mktemp(script.__name__)
            run_script(script, "--env-id", env_id, "--total-timesteps", 60, *tiny(script), cwd=folder)
            runs[script, env_id] = only_run(folder)
        return runs[script, env_id]

    return get


def frames_of(path):
    av = pytest.importorskip("av")
    with av.open(str(path)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


@pytest.mark.parametrize("env_id", ["toy_envs:Image-v0", "CartPole-v1"])
def test_evaluate(script, trained, env_id):
    run = trained(script, env_id)
    flags = ["--evaluate", run, "--eval-episodes", 3]
    one, two = (run_script(script, *flags, *more, cwd=run).stdout for more in ([], ["--capture-video"]))
    mean, std = map(float, re.search(rf"{env_id}: (\d+\.\d+) ± (\d+\.\d+) over 3 episodes", one).groups())
    assert re.search(r"± .* over 3", two)[0] in one  # the same seed, the same episodes
    if env_id == "toy_envs:Image-v0":
        assert (mean, std) == (210, 0)  # 1 + 2 + ... + 20
    (video,) = (run / "videos").glob("eval*.mp4")
    frames = frames_of(video)
    assert len(frames) > 8 and frames[0].shape[0] >= 256 and str(video.name) in two


def test_play_writes_a_video(script, trained):
    run = trained(script)
    out = run_script(script, "--play", run, "--capture-video", cwd=run).stdout
    frames = frames_of(run / "videos/dream.mp4")
    assert "dream.mp4" in out and len(frames) >= 1
    assert frames[0].shape[1] == 2 * frames[0].shape[0]  # the dream, and beside it what is real


@pytest.fixture
def page(script, trained):
    """Address of the page that --play serves."""
    with served(script, trained(script)) as url:
        yield url


def ask(url):
    with urllib.request.urlopen(url, timeout=20) as reply:
        return reply.read()


def test_the_page(page):
    assert b"<title>Dream</title>" in ask(page)
    state = json.loads(ask(f"{page}/reset"))
    frames = [state["dream"]]
    for path in ("/step?key=ArrowRight", "/step", "/step?key=x&key=ArrowLeft"):
        state = json.loads(ask(page + path))
        frames.append(state["dream"])
    assert "step 3" in state["text"] and "reward" in state["text"] and state["keys"]
    for frame in (*frames, state["real"]):
        image = Image.open(io.BytesIO(base64.b64decode(frame)))
        assert image.size == (64, 64) and image.mode == "RGB"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask(f"{page}/nothing")


@pytest.mark.slow
def test_the_page_in_a_browser(page, tmp_path):
    press_a_key(page, tmp_path)
