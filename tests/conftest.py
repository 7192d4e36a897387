"""What the tests share: the scripts that are there, flags that make them tiny, and how to run one as a user does."""

import contextlib
import importlib
import io
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageSequence

ROOT = Path(__file__).resolve().parents[1]
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(TESTS)]
pytest.register_assert_rewrite("recordings")  # whose assertions then say what differs, as those of tests do
torch.backends.cudnn.allow_tf32 = False  # parity is a matter of float32
torch.set_num_threads(1)  # each of the processes that share the tests has a core

TINY = {
    "planet": "--deter 64 --hidden 16 --units 16 --depth 2 --stoch 4 --batch-size 4 --batch-length 8 --seed-episodes 1 "
    "--train-steps 11 --planning-horizon 3 --candidates 8 --iterations 2 --elites 2 --overshooting-distance 3",
    "dreamer_v1": "--deter 64 --hidden 16 --units 16 --depth 2 --stoch 4 --batch-size 4 --batch-length 8 "
    "--imagination-horizon 3 --prefill 20 --train-every 6 --train-steps 3 --pretrain 2 --model-rate 1e-3",
    "dreamer_v2": "--deter 64 --hidden 16 --classes 4 --units 16 --depth 2 --stoch 4 --batch-size 4 --batch-length 8 "
    "--imagination-horizon 3 --prefill 20 --train-every 2 --pretrain 2 --model-rate 1e-3",
    "dreamer_v3": "--size 1m --deter 64 --hidden 16 --classes 4 --units 16 --depth 2 --stoch 4 --blocks 4 --bins 15 "
    "--decoder-blocks 4 --batch-size 4 --batch-length 8 --imagination-horizon 3 --train-ratio 8 --warmup 10 "
    "--learning-rate 1e-3",
    "worldmodels_v1": "--depth 2 --stoch 4 --deter 16 --rollouts 3 --policy held --vae-updates 6 --vae-batch-size 4 "
    "--rnn-updates 6 --batch-size 2 --batch-length 8 --population 4 --candidate-rollouts 1 --generations 3 "
    "--eval-generations 2",
    "genie": "--image-size 16 --patch 4 --lam-patch 8 --clip-length 4 --context 3 --num-codes 16 --num-actions 5 "
    "--latent-dim 8 --encoder 1 16 2 8 --decoder 1 16 2 8 --lam-encoder 1 16 2 8 --lam-decoder 1 16 2 8 "
    "--dynamics 1 16 2 8 --tokenizer-steps 6 --steps 6 --tokenizer-batch-size 4 --batch-size 4 --eval-episodes 8 "
    "--maskgit-steps 3",
}
PORTED = ("planet", "dreamer_v1", "dreamer_v2", "dreamer_v3")
WORLDS = (*PORTED, "worldmodels_v1")  # which learn in any environment, and dream it with its own actions
HOUSE = (*WORLDS, "genie")  # whose command line and run directories are the same
SPACES = {"vector": gym.spaces.Box(-np.inf, np.inf, (3,)), "image": gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)}
QUIET = "--eval-every 0 --log-every 20 --no-cuda --no-compile --no-amp"  # no evaluation, frequent rows of metrics


def tiny(script):
    """Flags of a run whose model, batch and log interval are tiny."""
    return TINY[script.__name__].split() + QUIET.split()


def command(script, *args, patch=None):
    """Command line that runs a script with `args`; `patch` is code run before, with the script imported as `s`."""
    args = [str(arg) for arg in args]
    if patch is None:
        return [sys.executable, str(ROOT / f"{script.__name__}.py"), *args]
    return [sys.executable, "-c", f"import {script.__name__} as s\n{patch}\ns.main()", *args]


def environment(**env):
    path = os.pathsep.join(filter(None, [str(ROOT), str(TESTS), os.environ.get("PYTHONPATH")]))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | env


def run_script(script, *args, cwd, code=0, timeout=120, patch=None, fresh=False, **env):
    """Runs a script as a user does and checks its exit code -> completed process.

    In this process, which has the imports that take long; in a fresh one if asked to, or if something is patched.
    """
    if fresh or patch or env:
        options = dict(cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=timeout)
        result = subprocess.run(command(script, *args, patch=patch), **options)
    else:
        result = run_here(script, [str(arg) for arg in args], cwd)
    assert result.returncode == code, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def spawn(script, folder, *args, patch=None, **env):
    """A script as a process, with a process group of its own."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also under nohup
    return subprocess.Popen(command(script, *args, patch=patch), cwd=folder, env=environment(**env), **pipes)


def train(script, folder, *flags, frames=60, **options):
    """A tiny run in this process, unless asked otherwise -> its directory."""
    run_script(script, *tiny(script), "--total-timesteps", frames, *flags, cwd=folder, **options)
    return only_run(folder)


def run_here(script, args, cwd):
    """Calls a script's main with random states as unknown as a new process's, and leaves nothing behind."""
    code, folder, precision = 0, os.getcwd(), torch.get_float32_matmul_precision()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    out, err = (io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2))
    torch.seed()
    random.seed()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            script.main(args)
    except SystemExit as error:
        code = error.code or 0
        if isinstance(code, str):  # as the interpreter does
            code = err.write(f"{code}\n") and 1
    finally:
        os.chdir(folder)
        torch.set_float32_matmul_precision(precision)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(args, code, *(pipe.buffer.getvalue().decode() for pipe in (out, err)))


def only_run(folder):
    """The one run directory under `folder`."""
    (run,) = Path(folder, "runs").iterdir()
    return run


def checkpoint(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def read_events(run):
    """TensorBoard's events of a run, all of them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run), {"scalars": 0, "images": 0}).Reload()


def scalars(run):
    """Key -> [(frame, value), ...]."""
    events = read_events(run)
    return {key: [(e.step, e.value) for e in events.Scalars(key)] for key in events.Tags()["scalars"]}


def last_video(run, key):
    """Frames (T, H, W, 3) of the last video with this key."""
    gif = Image.open(io.BytesIO(read_events(run).Images(key)[-1].encoded_image_string))
    return np.stack([frame.convert("RGB") for frame in ImageSequence.Iterator(gif)])


def metrics(run):
    """Rows (frame, key, value) of a run's events but for speed."""
    return sorted((t, key, x) for key, row in scalars(run).items() for t, x in row if key != "charts/SPS")


def lines(stderr):
    """Lines on stderr without those of the progress bar and of the Atari emulator's banner."""
    parts = [line.strip() for part in stderr.split("\n") for line in part.split("\r")]
    noise = ("frames/s", "s/frames", "?frames", "it/s", "s/it", "A.L.E: Arcade", "[Powered by Stella]")
    return [line for line in parts if line and not any(word in line for word in noise)]


def agent_and_batch(script, args, spaces, action_space, folder, device="cpu"):
    """An agent and a batch of random data as the replay gives them."""
    torch.manual_seed(0)
    rng, agent = np.random.default_rng(0), script.Agent(args, spaces, action_space, device)
    stored = agent.layout()
    replay = script.Replay(f"{folder}/0", stored, 2, 60, args.batch_length)
    for _ in range(60):
        step = {}
        for key, (dtype, shape) in ((key, (stored[key].base, stored[key].shape)) for key in stored.names):
            space, shape = spaces.get(key), (2, *shape)
            if key == "action" and agent.discrete:
                step[key] = np.eye(shape[-1], dtype=dtype)[rng.integers(shape[-1], size=2)]
            elif np.dtype(dtype).kind == "f":
                step[key] = rng.normal(size=shape)
            elif np.dtype(dtype) == bool:
                step[key] = rng.random(shape) < 0.1
            else:
                top = space.n if isinstance(space, gym.spaces.Discrete) else args.classes if key == "stoch" else 256
                step[key] = rng.integers(0, top, shape)
        replay.add(step)
    data = replay.sample(args.batch_size, rng, agent.device)
    return agent, data[0] if isinstance(data, tuple) else data  # and where it is, if latents are written back


SMALL = dict(planet=dict(planning_horizon=3, candidates=6, iterations=2, elites=2))
SMALL |= dict(dreamer_v1=dict(imagination_horizon=4, predict_continue=True, free_nats=0.0))
SMALL |= dict(dreamer_v2=dict(imagination_horizon=4, classes=4))


def small(script, discrete=False, device="cpu", **options):
    """A small agent that sees vectors, and a batch of two sequences of five steps, of which one ends."""
    torch.manual_seed(0)
    sizes = dict(deter=8, hidden=8, stoch=3, units=8, depth=1, batch_size=2, batch_length=5, compile=False, amp=False)
    args = script.Args(**sizes | SMALL[script.__name__] | options)
    space = gym.spaces.Discrete(3) if discrete else gym.spaces.Box(-1, 1, (2,))
    agent = script.Agent(args, {"vector": gym.spaces.Box(-1, 1, (6,))}, space, device)
    action = F.one_hot(torch.randint(3, (2, 5)), 3).float() if discrete else torch.rand(2, 5, 2) * 2 - 1
    data = {"vector": torch.randn(2, 5, 6), "action": action, "reward": torch.randn(2, 5)}
    data |= {name: torch.zeros(2, 5, dtype=torch.bool) for name in script.FLAGS}
    data["is_first"][:, 0] = True
    data["is_terminal"][0, -1] = True
    return agent, {key: value.to(device) for key, value in data.items()}


def reached(loss, module):
    """Whether a loss gives the module's parameters a gradient."""
    grads = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    return any(grad is not None and grad.abs().max() > 0 for grad in grads)


@contextlib.contextmanager
def calls(place, name):
    """Notes calls of a function: a list of what it was given and what it returned."""
    whole, seen = getattr(place, name), []

    def noted(*inputs):
        seen.append((inputs, whole(*inputs)))
        return seen[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, noted)
        yield seen


def all_losses(script, agent, data):
    """Losses of world model and behaviour, and the statistics of what was imagined, by name."""
    losses, deter, stoch, feat, _ = agent.world_model.loss(data, agent.start(data))
    inputs = (deter, stoch) if script.__name__ == "dreamer_v1" else (data, deter, stoch, feat)
    more, stats = agent.behaviour.loss(agent.world_model, *inputs)
    return losses | more, stats


@pytest.fixture
def refused(capsys):
    """Calls a script's main in this process -> the one line with which it exits."""

    def call(script, *args):
        with pytest.raises(SystemExit) as error:
            script.main([str(arg) for arg in args])
        line = error.value.code
        assert isinstance(line, str) and "\n" not in line and not lines(capsys.readouterr().err)
        return line

    return call


@pytest.fixture
def functions(request):
    """Recorded functions of the authors' code, for a test file that says where they are."""
    return np.load(request.module.FUNCTIONS)


@pytest.fixture
def events(monkeypatch):
    """Notes what runs of a script do: r(andom action), a(ction of the agent), f (the first in an episode), u(pdate)."""

    def watch(script):
        seen = []
        for letter, name in dict(r="random_action", a="act", u="update").items():
            whole = getattr(script.Agent, name)

            def noted(agent, *inputs, letter=letter, whole=whole):
                seen.append("f" if letter == "a" and inputs[0]["is_first"].all() else letter)
                return whole(agent, *inputs)

            monkeypatch.setattr(script.Agent, name, noted)
        return seen

    return watch


@pytest.fixture(params=PORTED)
def ported(request):
    """Each script of the new house, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture(params=WORLDS)
def world(request):
    """Each script that learns in an environment, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture(params=HOUSE)
def house(request):
    """Each script with the same command line, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture
def new_house():
    """One of them, for code that is the same in all."""
    return importlib.import_module(PORTED[-1])
