"""World Models (Ha & Schmidhuber 2018), arXiv:1803.10122v4; shorter at NeurIPS 2018, arXiv:1809.01999.

Authors' code: github.com/hardmaru/WorldModelsExperiments at fd982b9. Where paper and code disagree, the line says so.

    python worldmodels_v1.py --env-id CarRacing-v3 --quick       # all of it within an hour on two cores
    python worldmodels_v1.py --env-id CarRacing-v3               # the paper's recipe, for a large machine
    python worldmodels_v1.py --env-id VizdoomTakeCover-v1        # the controller evolves in the dream alone
    python worldmodels_v1.py --resume runs/<run>                 # continue; --evaluate runs/<run> scores it

V, a variational auto-encoder, compresses each frame to a latent z. M, an LSTM with a mixture of Gaussians, predicts the
next z. C, a controller of one layer, sees z and M's state; CMA-ES evolves it in the environment or in M's dream. The
stages are collect, learn_v, encode, learn_m, evolve; --iterations repeats them, with episodes of the controller. What
is in the run directory is not done again. V is `encoder` and `decoder` here, M is `rssm`, C is `behaviour`.

Ours: heads for reward and continuation beside M's mixture, so that any environment can be dreamt (the authors have one
for the end, in TakeCover alone); rewards are normalised for M; one episode in 20 is held out to score M.

Not copied from the authors' code: frames are neither stretched in contrast nor shifted by one modulo 256; M's state is
zero at an episode's start (their graph feeds that of the chunk before); no bonus for large weights (their weight decay
has the wrong sign); M sees the move that TakeCover is sent, not the output behind it; a terminal frame is no target of
M's; parameters are not rounded. Frames for V are drawn with replacement. M is trained on episodes laid end to end, its
state carried on (theirs: 100 whole episodes, from zero), and sees actions in [-1, 1], gas and brake too; biases start
at 0; all candidates of a generation get the same tracks; of the means that were evaluated the best in the environment
is kept, also where C evolves in the dream (theirs: in the dream).

Shapes: B batch, T time, N frames, P candidates, R dreams of each, Q = P*R, A action, U outputs, S stoch (z), H units of
the LSTM (--deter), D = 2 H deter (h and c), F = D + S deter and stoch, K Gaussians, C channels, W parameters of a
controller. Arrays are (B, T, ...).
"""

import ctypes
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise, product, repeat, takewhile
from multiprocessing.util import Finalize
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tensorboardX import SummaryWriter
from torch import nn
from tqdm import tqdm

# === Arguments ========================================================================================================


@dataclass
class Args:
    # General
    exp_name: str = os.path.basename(__file__).removesuffix(".py")  # part of the run directory's name
    seed: int = 1  # of parameters, environments and sampling
    torch_deterministic: bool = True  # PyTorch's deterministic algorithms for convolutions
    cuda: bool = True  # use the GPU if there is one
    track: bool = False  # log to Weights & Biases too (pip install wandb)
    wandb_project_name: str = "world-models"  # Weights & Biases: project
    wandb_entity: str | None = None  # Weights & Biases: team
    capture_video: bool = False  # write an mp4 of one episode at each evaluation
    resume: str | None = None  # run directory to continue; other flags override what it was started with
    evaluate: str | None = None  # run directory whose agent is scored over --eval-episodes episodes
    run_dir: str = "runs"  # where run directories are made
    eval_every: int = 50_000  # frames between evaluations and open-loop videos; 0 for none
    eval_episodes: int = 10  # of one evaluation, all at once in as many environments
    log_every: int = 1_000  # frames between rows of metrics
    save_every: int = 5_000  # frames between checkpoints
    compile: bool = torch.cuda.is_available()  # torch.compile the model's parts; default: with a GPU
    amp: bool = torch.cuda.is_available()  # networks in bfloat16, all else in float32; default: with a GPU

    # Environment
    env_id: str = "dmc-walker-walk"  # dmc-<domain>-<task>, atari-<game>, a Gymnasium id, or <module>:<id>
    env_kwargs: dict[str, bool | int | float | str] = field(default_factory=dict)  # name value ..., for its constructor
    total_timesteps: int = 1_000_000  # environment frames to train for, those skipped by action repeat included
    num_envs: int = 1  # environments that are stepped together
    action_repeat: int = 1  # frames for which each action is held; rewards are summed
    obs: Literal["pixels", "state", "both"] | None = None  # what is observed; default: all that the environment returns
    image_size: int = 64  # height and width to which images are resized
    time_limit: int | None = None  # frames after which an episode is cut; default: the environment's own limit

    # World Models. Defaults: the paper's and the authors' code for CarRacing
    quick: bool = False  # the suite's small preset: CarRacing-v3 within an hour on two CPU cores
    iterations: int = 1  # times that all stages are gone through; from the second on, the controller collects
    rollouts: int = 10_000  # collect: episodes that are played in each iteration
    policy: Literal["agent", "brown", "held"] = "agent"  # collect: random agents, a random walk, held actions
    collect_patience: int = 0  # collect: steps without positive reward after which an episode is left; 0 for never
    collect_noise: float = 0.1  # collect, from the second iteration on: deviation of noise on the controller's outputs
    whole_episodes: bool = False  # collect: go on after an episode's end, up to its limit, as the authors' CarRacing
    shortest: int = 0  # collect: steps that an episode must be longer than to be kept
    crop: float = 1.0  # share of the image's rows, from the top, that V sees
    stoch: int = 32  # numbers of the latent z
    depth: int = 32  # V: channels of the first convolution, then times 2, 4, 8
    kl_tolerance: float = 0.5  # V: nats for each number of the latent; a KL below their sum gives no gradient
    vae_updates: int = 1_000_000  # V: updates; the code's 10 epochs of 10M frames (paper: 1 epoch)
    vae_batch_size: int = 100  # V: frames of a batch
    vae_rate: float = 1e-4  # V: learning rate
    vae_decay: float = 1.0  # V: factor for each update by which the learning rate falls to 1e-5
    deter: int = 256  # M: units of the LSTM
    num_mixtures: int = 5  # M: Gaussians of each number of the latent
    restart_input: bool = False  # M: sees which step is an episode's first
    done_weight: float = 1.0  # M: weight of the steps that end an episode in the continue loss
    rnn_updates: int = 4000  # M: updates, as in the authors' code (paper: 20 epochs)
    batch_size: int = 100  # M: sequences of a batch
    batch_length: int = 999  # M: steps of a sequence
    rnn_rate: float = 1e-3  # M: learning rate
    rnn_decay: float = 1.0  # M: factor for each update by which the learning rate falls to 1e-5
    clip: float = 1.0  # M: largest size of each number of the gradient
    controller_inputs: Literal["z", "zh", "zch"] = "zh"  # C: sees the latent, the LSTM's output, its cell
    controller_hidden: int = 0  # C: units of a hidden layer; 0 for none
    controller_bias: bool = True  # C: layers have biases
    sample_latent: bool = True  # C: acts on a sample of V's latent, as in the paper, not on its mean
    brake: int | None = None  # C: the action that is 0 for half of the outputs, clip(tanh u, 0, 1): CarRacing's brake
    moves: bool = False  # C: one output for 3 actions, above 1/3 action 1, below -1/3 action 2, else 0, as in TakeCover
    train_controller_in: Literal["env", "dream"] = "env"  # evolve: where candidates are scored
    generations: int = 1800  # evolve: generations of CMA-ES in each iteration
    population: int = 64  # evolve: candidates of a generation
    candidate_rollouts: int = 16  # evolve: episodes or dreams whose mean return is a candidate's fitness
    sigma: float = 0.1  # evolve: initial standard deviation of CMA-ES
    patience: int = 0  # evolve: steps without positive reward after which an episode is left; 0 for never
    eval_generations: int = 25  # evolve: generations between evaluations of the mean, unless --eval-every is 0
    temperature: float = 1.0  # dream: divides the mixture's logits, multiplies its variances
    dream_length: int = 1000  # dream: steps after which it is cut while the controller evolves
    dream_context: int = 0  # dream: real steps before it, from anywhere in an episode; 0 to start with a first frame


PRESETS = {  # by the first word of --env-id; -quick: with --quick; -dream: with --quick and two --iterations or more
    "carracing": dict(
        env_kwargs=dict(lap_complete_percent=1.0), total_timesteps=2_000_000_000, num_envs=os.cpu_count(),
        image_size=96, crop=0.875, whole_episodes=True, brake=2, eval_episodes=1024, save_every=1000,
    ),
    "carracing-quick": dict(
        total_timesteps=2_000_000, action_repeat=4, rollouts=60, policy="brown", whole_episodes=False, vae_updates=1000,
        vae_batch_size=32, vae_rate=1e-3, vae_decay=0.997, deter=64, rnn_updates=400, batch_size=16, batch_length=64,
        generations=60, population=32, candidate_rollouts=1, sample_latent=False, patience=25, eval_generations=10,
        eval_episodes=10, dream_length=250, log_every=100, save_every=250,
    ),
    "carracing-dream": dict(
        train_controller_in="dream", rollouts=200, collect_patience=25, collect_noise=0.3, rnn_updates=1000,
        candidate_rollouts=16, dream_context=16, dream_length=100,
    ),
    "vizdoomtakecover": dict(
        total_timesteps=100_000_000, num_envs=os.cpu_count(), time_limit=2100, image_size=96, crop=5 / 6, policy="held",
        rollouts=12_800, shortest=100, stoch=64, deter=512, restart_input=True, done_weight=10.0, vae_updates=308_000,
        rnn_updates=24_400, batch_length=499, rnn_decay=0.99999, moves=True, controller_inputs="zch",
        controller_bias=False, train_controller_in="dream", temperature=1.15, dream_length=2100, eval_episodes=100,
        save_every=1000,  # temperature: of the paper; code: 1.25
    ),
}  # fmt: skip
SIDE, CHUNK = 64, 256  # height and width of what V sees; frames that it encodes at once


def parse_args(argv=None):
    """Command line -> Args: defaults, then the suite's preset or what the run was started with, then the flags."""
    text = "\n".join([__doc__, "Presets by suite:", *(f"    {suite}: {preset}" for suite, preset in PRESETS.items())])
    args = tyro.cli(Args, args=argv, description=text)
    suite = re.split("[-/]", args.env_id.rpartition(":")[2])[0].lower()
    given, run = dict(obs="pixels") | PRESETS.get(suite, {}), args.evaluate if args.resume is None else args.resume
    if args.quick and not run:
        if f"{suite}-quick" not in PRESETS:
            sys.exit(f"--quick: there is no small preset for {args.env_id}")
        given |= PRESETS[f"{suite}-quick"] | (PRESETS[f"{suite}-dream"] if args.iterations > 1 else {})
    if run is not None:
        path = Path(run, "args.json")
        given = json.loads(path.read_text() if path.exists() else "{}") | dict(resume=None, evaluate=None)
        if given.pop("script", None) != Args.exp_name or given.keys() - vars(Args()).keys():
            sys.exit(f"{run} is no run of {Args.exp_name}.py, or of another version")
    given |= dict(eval_episodes=100) if args.evaluate else {}  # as in the paper
    given = given | ({} if args.cuda else dict(compile=False, amp=False))  # flags can still ask for them
    args = tyro.cli(Args, args=argv, default=Args(**given | dict(env_kwargs={})), description=text)
    args.env_kwargs = args.env_kwargs or given.get("env_kwargs", {})  # as a default, tyro would make a flag of each
    if args.env_id.startswith("Vizdoom"):
        args.env_id = f"vizdoom.gymnasium_wrapper:{args.env_id}"  # the module that registers it
    zero = "seed eval_every shortest controller_hidden brake patience collect_patience dream_context".split()
    for name, value in vars(args).items():
        least = 0 if type(value) is float or name in zero else 2 if name in ("population", "rollouts") else 1
        if type(value) in (int, float) and not least <= value < math.inf:
            sys.exit(f"--{name.replace('_', '-')} {value}: the least is {least}")
    if not 0 < args.crop <= 1 or 0 in (args.temperature, args.sigma):
        sys.exit("--crop must be above 0 and at most 1, --temperature and --sigma above 0")
    if args.obs != "pixels":
        sys.exit(f"--obs {args.obs}: V sees pixels alone")
    return args


# === Environment ======================================================================================================

FLAGS = ("is_first", "is_last", "is_terminal")
VECTORS = tuple(getattr(gym.spaces, kind) for kind in "Box Discrete MultiBinary MultiDiscrete Tuple Dict".split())


def is_image(space):
    """Whether a space holds pictures: bytes (H, W), (H, W, C) or (C, H, W), with sides of at least 16."""
    picture = isinstance(space, gym.spaces.Box) and len(space.shape) > 1 and sorted(space.shape)[-2] >= 16
    if picture and (len(space.shape) > 3 or len(space.shape) == 3 and space.dtype.kind == "f"):
        raise ValueError(f"no image: {space.shape} of {space.dtype}; return bytes (uint8), and no older frames")
    return picture and space.dtype == np.uint8


class EpisodeLog(gym.Wrapper):
    """Reduces infos to info["log"]: the episode's highest values of success and of the environment's own log."""

    def reset(self, **kwargs):
        self.log = {}
        return super().reset(**kwargs)[0], {}

    def step(self, action):
        *step, info = super().step(action)
        new = {"success": info.get("success", info.get("is_success"))} | (info.get("log") or {})
        self.log |= {key: max(float(x), self.log.get(key, -math.inf)) for key, x in new.items() if x is not None}
        return *step, {"log": self.log}


class DictObservation(gym.ObservationWrapper):
    """A dict of any observations -> images, uint8 (size, size, C), and vectors, float32 (n,)."""

    def __init__(self, env, obs, size):
        super().__init__(env)
        self.keys, spaces = {}, {}
        for key, part in env.observation_space.items():
            name = f"{key}_" if key in ("", "reward", "action", "deter", "stoch", "count", *FLAGS) else str(key)
            self.keys[name] = key
            if not isinstance(part, VECTORS):
                gym.logger.warn("the observation %r is left out, it is no image and no vector: %s", key, part)
            elif is_image(part) and obs != "state":
                spaces[name] = gym.spaces.Box(0, 255, (size, size, min((*part.shape, 1)[:3])), np.uint8)
            elif not is_image(part) and obs != "pixels":
                spaces[name] = gym.spaces.Box(-np.inf, np.inf, (gym.spaces.flatdim(part),))
        self.observation_space = gym.spaces.Dict(spaces)
        if not spaces:
            raise ValueError(f"--obs {obs}, but what is observed is {env.observation_space}")

    def observation(self, obs):
        result = {}
        for name, space in self.observation_space.items():
            value, part = obs[self.keys[name]], self.env.observation_space[self.keys[name]]
            if space.dtype == np.uint8:
                image = np.atleast_3d(value).astype(np.uint8, casting="same_kind", copy=False)  # floats are an error
                image = np.moveaxis(image, np.argmin((*part.shape, 1)[:3]), -1)  # channels are first, last or missing
                result[name] = cv2.resize(image, space.shape[:2], interpolation=cv2.INTER_AREA).reshape(space.shape)
            else:
                result[name] = gym.spaces.flatten(part, value).astype(np.float32)
        return result


def make_env(args, video=None):
    """One environment: observations are dicts, actions Discrete or in [-1, 1]; video: folder for its first episode."""
    if multiprocessing.parent_process():  # out of the group that Ctrl-C reaches: the main process acts on it
        os.setpgrp()
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo asks when it is imported
    os.environ.setdefault("LP_NUM_THREADS", "0")  # rendering in software: one core for each environment
    suite, _, task = args.env_id.partition("-")
    size, repeat, pixels = args.image_size, args.action_repeat, args.obs in ("pixels", "both")
    options = dict(max_episode_steps=args.time_limit, disable_env_checker=True) | args.env_kwargs
    options |= {"render_mode": "rgb_array"} if pixels or args.capture_video else {}
    if suite == "dmc":
        options["render_kwargs"] = dict(width=size, height=size, camera_id=2 if task.startswith("quadruped") else 0)
        env = gym.make(f"shimmy:dm_control/{re.sub('^cup', 'ball_in_cup', task)}-v0", **options)
        vis = env.unwrapped.physics.model.vis  # shadows of half resolution: a third faster, 0.1 % of pixels differ
        vis.quality.shadowsize, vis.global_.offwidth, vis.global_.offheight = 1024, size, size
    elif suite in ("atari", "atari100k"):
        game = f"ale_py:ALE/{re.sub('[-_]', '', task.title() if task.islower() else task)}-v5"
        full = suite == "atari"
        env = gym.make(game, frameskip=1, full_action_space=full, repeat_action_probability=0.25 * full, **options)
        env = gym.wrappers.AtariPreprocessing(env, frame_skip=repeat, screen_size=size, grayscale_obs=full)
    else:
        env = gym.make(re.sub("^ALE/", "ale_py:ALE/", args.env_id), **options)
    env = gym.wrappers.RepeatAction(EpisodeLog(env), 1 if suite in ("atari", "atari100k") else repeat)
    space, action = env.observation_space, env.action_space
    if not isinstance(space, gym.spaces.Dict):
        name = "image" if is_image(space) else "vector"
        env = gym.wrappers.TransformObservation(env, lambda obs: {name: obs}, gym.spaces.Dict({name: space}))
    if pixels and not any(map(is_image, env.observation_space.values())):
        key = "render" if "image" in env.observation_space.keys() else "image"  # MiniGrid's image is no picture
        env = gym.wrappers.AddRenderObservation(env, render_only=False, render_key=key)
    if video:
        env = gym.wrappers.RecordVideo(env, video, episode_trigger=lambda episode: episode == 0)
    if isinstance(action, gym.spaces.Discrete):
        env = gym.wrappers.TransformAction(env, lambda index: index + action.start, gym.spaces.Discrete(action.n))
    elif isinstance(action, gym.spaces.Box) and action.dtype.kind == "f" and np.ptp([action.low, action.high]) < 1e30:
        low, half = action.low, (action.high - action.low) / 2
        scale = lambda x: np.clip(low + half * (1 + x.reshape(low.shape)), low, action.high)
        env = gym.wrappers.TransformAction(env, scale, gym.spaces.Box(-1, 1, (low.size,)))
    else:
        raise ValueError(f"actions are neither Discrete nor a Box of floats with bounds: {action}")
    return gym.wrappers.RecordEpisodeStatistics(DictObservation(env, args.obs, size))


# === Replay ===========================================================================================================


class Rollouts:
    """Episodes on disk, one after the other: memory-mapped arrays (capacity, ...) of full size, one for each key.
    Step t holds image t, the action that led to it, its reward, its flags and, once V has seen it, its embed: `layout`,
    key -> (shape, dtype). `count`: steps of a run that goes on. Exits if the disk is too small or files do not fit."""

    def __init__(self, folder, layout, capacity, count=0):
        self.count, self.arrays = count, {}
        sizes = {key: math.prod(shape) * np.dtype(dtype).itemsize for key, (shape, dtype) in layout.items()}
        held = {key: os.path.getsize(f"{folder}/{key}") for key in layout if os.path.exists(f"{folder}/{key}")}
        if any(held.get(key, 0) < count * sizes[key] for key in sizes):
            sys.exit(f"{folder} is not whole, or not of these observations, actions and sizes: {list(layout)}")
        os.makedirs(folder, exist_ok=True)
        needed, free = capacity * sum(sizes.values()) - sum(held.values()), shutil.disk_usage(folder).free
        if needed > free:
            sys.exit(f"{folder} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free: make room, or lower --rollouts")
        for key, (shape, dtype) in layout.items():
            with open(f"{folder}/{key}", "r+b" if key in held else "wb") as file:
                if hasattr(os, "posix_fallocate"):  # not on macOS, where the memory map makes the file grow
                    os.posix_fallocate(file.fileno(), 0, capacity * sizes[key])
            self.arrays[key] = np.memmap(f"{folder}/{key}", dtype, "r+", shape=(capacity, *shape))

    def add(self, episode):
        """Appends an episode: key -> array (steps, ...)."""
        steps = slice(self.count, self.count + len(episode["reward"]))
        for key, values in episode.items():
            self.arrays[key][steps] = values
        self.count = steps.stop

    def episodes(self, held_out):
        """The steps of each episode, a list of arrays: of those held out, which are every 20th, or of the others."""
        first = np.flatnonzero(self.arrays["is_first"][: self.count])
        both = np.split(np.arange(self.count), first[1:])
        return [steps for number, steps in enumerate(both) if (number % 20 == 0) == held_out]

    def get(self, steps, device, keys=("embed", "action", "reward", *FLAGS)):
        """What these steps (...) hold, key -> tensor (..., shape of the key); by default what M sees."""
        return to_tensors({key: self.arrays[key][steps] for key in keys}, device)


def to_tensors(values, device):
    """Arrays by key -> tensors on the device."""
    tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in values.items()}
    if device.type == "cuda":
        tensors = {key: tensor.pin_memory().to(device, non_blocking=True) for key, tensor in tensors.items()}
    return tensors


# === Maths ============================================================================================================


def sample_latent(embed):
    """Mean and log-variance, side by side (..., 2 S) -> a sample of the latent (..., S)."""
    mean, logvar = embed.chunk(2, -1)
    return mean + (logvar / 2).exp() * torch.randn_like(mean)


def mdn_log_prob(logits, mean, log_std, target):
    """Log-density of targets (...) under mixtures of Gaussians (..., K), each number with weights of its own."""
    error = (target.unsqueeze(-1) - mean) * (-log_std).exp()
    return (logits.log_softmax(-1) - log_std - (error.square() + math.log(2 * math.pi)) / 2).logsumexp(-1)


def mdn_sample(logits, mean, log_std, temperature, normal, uniform):
    """A sample (...) of mixtures (..., K) from normal and uniform noise (...). The temperature divides the logits and
    multiplies the variance (arXiv:1803.10122v4, appendix). Written out: softmax over few is slow on a CPU."""
    weight = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp().cumsum(-1)
    index = (weight[..., :-1] < uniform.unsqueeze(-1) * weight[..., -1:]).sum(-1, keepdim=True)
    mean, log_std = mean.gather(-1, index).squeeze(-1), log_std.gather(-1, index).squeeze(-1)
    return mean + log_std.exp() * math.sqrt(temperature) * normal


# === Networks =========================================================================================================


def initialise(module):
    """Weights uniform, with limits by fan-in and fan-out (Glorot), biases zero, as TensorFlow 1's layers."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Encoder(nn.Module):
    """V's first half: images (N, 64, 64, C), bytes -> embed (N, 2 S), mean and log-variance of the latent."""

    def __init__(self, args, channels):
        super().__init__()
        self.args, depths = args, [channels] + [args.depth * m for m in (1, 2, 4, 8)]
        self.convs = nn.Sequential(*[nn.Sequential(nn.Conv2d(*x, 4, 2), nn.ReLU()) for x in pairwise(depths)])
        self.mean, self.logvar = nn.Linear(4 * depths[-1], args.stoch), nn.Linear(4 * depths[-1], args.stoch)

    def forward(self, image):
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.args.amp):
            x = self.convs(image.permute(0, 3, 1, 2) / 255)
        x = x.flatten(1).to(self.mean.weight.dtype)
        return torch.cat([self.mean(x), self.logvar(x)], -1)


class Decoder(nn.Module):
    """V's second half: latents (N, S) -> images (N, 64, 64, C) in [0, 1]."""

    def __init__(self, args, channels):
        super().__init__()
        self.args, depth = args, args.depth
        self.map = nn.Linear(args.stoch, 32 * depth)
        shapes = (32 * depth, 4 * depth, 5), (4 * depth, 2 * depth, 5), (2 * depth, depth, 6)  # in, out, kernel
        convs = [nn.Sequential(nn.ConvTranspose2d(*shape, 2), nn.ReLU()) for shape in shapes]
        self.convs = nn.Sequential(*convs, nn.ConvTranspose2d(depth, channels, 6, 2))

    def forward(self, stoch):
        with torch.autocast(stoch.device.type, torch.bfloat16, enabled=self.args.amp):
            x = self.convs(self.map(stoch).unflatten(-1, (-1, 1, 1)))
        return x.to(stoch.dtype).sigmoid().permute(0, 2, 3, 1)


# === World model ======================================================================================================


class MDNRNN(nn.Module):
    """M: an LSTM whose output is a mixture density of the next latent. A state is deter (B, D), the LSTM's output h and
    cell c side by side, and stoch (B, S). deter has seen the latents before stoch and the actions that led to it: from
    it M predicts stoch, reward and end of the step; C sees both and chooses the next action."""

    def __init__(self, args, action_dim):
        super().__init__()
        self.args = args
        inp = args.stoch + (1 if args.moves else action_dim) + args.restart_input
        self.gates = nn.Linear(inp + args.deter, 4 * args.deter)
        self.mixture_head = nn.Linear(args.deter, args.stoch * args.num_mixtures * 3)

    def initial(self, batch_size):
        """State of zeros: deter (B, D), stoch (B, S)."""
        zeros, args = self.gates.weight.new_zeros, self.args
        return zeros(batch_size, 2 * args.deter), zeros(batch_size, args.stoch)

    def lstm(self, deter, stoch, action):
        """LSTM with 1 added to the forget gate: deter (B, D), stoch (B, S), action (B, A) -> next deter (B, D)."""
        h, c = deter.chunk(2, -1)
        x = [stoch, action[..., 1:2] - action[..., 2:3] if self.args.moves else action]
        if self.args.restart_input:
            x.append((deter == 0).all(-1, keepdim=True))  # which it is in an episode's first step alone
        with torch.autocast(h.device.type, torch.bfloat16, enabled=self.args.amp):
            gates = self.gates(torch.cat([*x, h], -1))
        i, j, f, o = gates.to(c.dtype).chunk(4, -1)
        c = (f + 1).sigmoid() * c + i.sigmoid() * j.tanh()
        return torch.cat([o.sigmoid() * c.tanh(), c], -1)

    def mixture(self, deter):
        """(..., D) -> logits, means, log-deviations of the latent, each (..., S, K)."""
        x = self.mixture_head(deter[..., : self.args.deter])
        return x.unflatten(-1, (self.args.stoch, -1)).chunk(3, -1)

    def img_step(self, state, action, noise=None):
        """One step of a dream: state, action (B, A), if given normal and uniform noise (B, S) each -> state."""
        noise = noise or (torch.randn_like(state[1]), torch.rand_like(state[1]))
        deter = self.lstm(*state, action)
        return deter, mdn_sample(*self.mixture(deter), self.args.temperature, *noise)

    def observe(self, embed, action, is_first, start):
        """States along a sequence, from a start state on: deter (B, T, D), stoch (B, T, S), a sample of V's.
        embed (B, T, 2 S), action (B, T, A) that led to each step, is_first (B, T)."""
        stoch, keep = sample_latent(embed), ~is_first.unsqueeze(-1)
        state, deters = start, []
        for t in range(stoch.shape[1]):
            state = self.lstm(*state, action[:, t]) * keep[:, t], stoch[:, t]
            deters.append(state[0])
        return torch.stack(deters, 1), stoch


def feature(deter, stoch):
    """(..., D), (..., S) -> (..., F)."""
    return torch.cat([deter, stoch], -1)


class WorldModel(nn.Module):
    """V (encoder and decoder), M (`rssm`), its reward head and its continue head."""

    def __init__(self, args, spaces, action_dim):
        super().__init__()
        self.args, self.spaces = args, spaces
        self.channels = [space.shape[-1] for space in spaces.values()]
        self.encoder, self.decoder = Encoder(args, sum(self.channels)), Decoder(args, sum(self.channels))
        self.rssm = MDNRNN(args, action_dim)
        self.reward_head, self.continue_head = nn.Linear(args.deter, 1), nn.Linear(args.deter, 1)
        self.register_buffer("reward_scale", torch.tensor([0.0, 1.0]))  # mean and deviation of the rewards collected

    def frame(self, obs):
        """Observations (B, ...) -> what V sees, uint8 (B, 64, 64, C): the upper rows of all images, resized."""
        image = torch.cat([obs[key] for key in self.spaces], -1).permute(0, 3, 1, 2)
        image = image[:, :, : round(self.args.crop * image.shape[2])].float()
        image = F.interpolate(image, (SIDE, SIDE), mode="bilinear", antialias=True)
        return image.round().byte().permute(0, 2, 3, 1)

    def vae_loss(self, image):
        """V's losses (N,) by name, from images (N, 64, 64, C); arXiv:1803.10122v4, appendix, Variational Autoencoder.
        The KL's floor, of the code, holds for the sum over the latent, for each example on its own."""
        embed = self.encoder(image)  # (N, 2 S)
        recon = self.decoder(sample_latent(embed))  # (N, 64, 64, C)
        mean, logvar = embed.chunk(2, -1)  # (N, S)
        kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(-1)  # (N,)
        recon_loss = (image / 255 - recon).square().flatten(1).sum(-1)  # (N,)
        return {"recon_loss": recon_loss, "kl_loss": kl.clamp(min=self.args.kl_tolerance * self.args.stoch)}

    def loss(self, data, start):
        """M's losses (B, T) by name, next start. data: embed (B, T, 2 S), action, reward, is_first, is_terminal.
        What comes out of nothing, an episode's first frame, is not predicted, and neither is a terminal one."""
        deter, stoch = self.rssm.observe(data["embed"], data["action"], data["is_first"], start)
        known = ~data["is_first"]  # (B, T)
        going_on = known & ~data["is_terminal"]  # (B, T)
        log_prob = mdn_log_prob(*self.rssm.mixture(deter), stoch).mean(-1)  # (B, T)
        losses = {"latent_loss": -log_prob * going_on / going_on.float().mean().clamp(min=1e-6)}
        error = (self.reward(deter) - data["reward"]) / self.reward_scale[1]  # (B, T)
        losses["reward_loss"] = error.square() * known  # (B, T)
        cont = self.continue_head(deter[..., : self.args.deter]).squeeze(-1)  # (B, T)
        end = data["is_terminal"].to(cont.dtype)  # (B, T)
        cont_loss = F.binary_cross_entropy_with_logits(cont, 1 - end, reduction="none")  # (B, T)
        losses["continue_loss"] = cont_loss * known * (1 + (self.args.done_weight - 1) * end)  # (B, T)
        return losses, tuple(x[:, -1].detach().clone() for x in (deter, stoch))  # no views of all steps

    def reward(self, feat):
        """(..., F), of which h alone is read, or deter (..., D) -> expected reward (...)."""
        mean, scale = self.reward_scale
        return self.reward_head(feat[..., : self.args.deter]).squeeze(-1) * scale + mean

    def cont(self, feat):
        """(..., F), of which h alone is read, or deter (..., D) -> probability that the episode goes on (...)."""
        return self.continue_head(feat[..., : self.args.deter]).squeeze(-1).sigmoid()

    def decode(self, feat):
        """(B, T, F) -> observations as the environment gives them, key -> (B, T, ...); black where V sees nothing."""
        size = self.args.image_size
        image = self.decoder(feat[..., 2 * self.args.deter :].flatten(0, 1)).permute(0, 3, 1, 2)
        image = F.interpolate(image, (round(self.args.crop * size), size), mode="bilinear", antialias=True)
        image = F.pad(image, (0, 0, 0, size - image.shape[2])).permute(0, 2, 3, 1).unflatten(0, feat.shape[:2])
        return dict(zip(self.spaces, (image * 255).round().byte().split(self.channels, -1), strict=True))


# === Behaviour ========================================================================================================


class Controller(nn.Module):
    """C: one layer, or two, of tanh(W [z h] + b) (arXiv:1803.10122v4, Controller), with the best parameters that were
    found. They are flat: for each layer biases, then weights, input-major."""

    def __init__(self, args, action_dim, discrete):
        super().__init__()
        self.args, self.discrete = args, discrete
        if args.moves and not (discrete and action_dim == 3):
            sys.exit("--moves is for three discrete actions")
        self.outputs = 1 if args.moves else action_dim
        sizes = args.stoch + len(args.controller_inputs[1:]) * args.deter, args.controller_hidden, self.outputs
        self.layers = list(pairwise(filter(None, sizes)))  # a hidden layer of no units is none
        count = sum((inp + args.controller_bias) * out for inp, out in self.layers)
        self.register_buffer("params", torch.zeros(count))

    def forward(self, deter, stoch, params=None):
        """deter (..., D), stoch (..., S) -> outputs in [-1, 1] (..., U) with its own parameters.
        With those of several controllers, (P, W), states are (P, R, ...)."""
        params = self.params if params is None else params
        h, c = deter.chunk(2, -1)
        x = torch.cat([{"z": stoch, "c": c, "h": h}[name] for name in self.args.controller_inputs], -1)
        for inp, out in self.layers:
            biases = out * self.args.controller_bias
            bias, weight, params = params.tensor_split([biases, biases + inp * out], -1)
            x = x @ weight.unflatten(-1, (inp, out))
            x = (x + bias.unsqueeze(-2) if biases else x).tanh()
        return x

    def action(self, output):
        """Outputs (..., U) -> actions as M and the environment see them (..., A): one-hot, or in [-1, 1]."""
        if self.args.moves:
            right, left = output > 1 / 3, output < -1 / 3
            return torch.cat([~(right | left), right, left], -1).float()
        if self.discrete:
            return F.one_hot(output.argmax(-1), output.shape[-1]).float()
        if self.args.brake is None:
            return output
        off = torch.arange(output.shape[-1], device=output.device) == self.args.brake
        return torch.where(off, 2 * output.clamp(min=0) - 1, output)


@torch.inference_mode()
def dream_returns(agent, params, start, length):
    """Mean return of each candidate over its dreams, all of them as one batch, until they end or are cut: (P,).
    params (P, W); start, the same for all candidates: deter (R, D), stoch (R, S). So is the noise: candidates differ by
    what they do, not by luck. Only dreams that go on are carried on."""
    model, controller, P, R = agent.world_model, agent.behaviour, len(params), len(start[0])
    deter = start[0].repeat(P, 1)  # (Q, D)
    stoch = start[1].repeat(P, 1)  # (Q, S)
    total = torch.zeros(P * R, device=params.device)  # (Q,)
    place, owner = torch.arange(P * R, device=params.device), params
    for _ in range(length):
        output = controller(*(x.view(len(owner), -1, x.shape[-1]) for x in (deter, stoch)), owner).flatten(0, 1)
        noise = [draw(start[1])[place % R] for draw in (torch.randn_like, torch.rand_like)]
        deter, stoch = model.rssm.img_step((deter, stoch), controller.action(output), noise)
        total[place] += model.reward(deter)
        going_on = model.cont(deter) >= 0.5
        if not going_on.all():
            deter, stoch, place = (x[going_on] for x in (deter, stoch, place))
            owner = params[place // R]
        if not len(place):
            break
    return total.view(P, R).mean(1)


# === Agent ============================================================================================================


class Agent(nn.Module):
    """World model, controller and the optimizer of V and M: what is trained and what acts."""

    def __init__(self, args, spaces, action_space, device="cpu"):
        super().__init__()
        self.args, self.device = args, torch.device(device)
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.action_dim = int(action_space.n) if self.discrete else action_space.shape[0]
        self.world_model = WorldModel(args, spaces, self.action_dim)
        self.behaviour = Controller(args, self.action_dim, self.discrete)
        self.apply(initialise).to(device)
        self.trained = list(self.parameters())
        self.optimizer = torch.optim.Adam(self.trained)  # of V and M; what has no gradient is left alone
        if args.compile:
            model = self.world_model
            for part, name in ((model.encoder, "forward"), (model.rssm, "lstm")):  # no decoder: PyTorch issue 171622
                setattr(part, name, torch.compile(getattr(part, name)))  # for any size, since dreams end

    def layout(self):
        """What the rollouts hold of each step: key -> (shape, dtype)."""
        layout = dict(image=((SIDE, SIDE, sum(self.world_model.channels)), "uint8"), reward=((), "float32"))
        layout |= dict(action=((self.action_dim,), "float32"), embed=((2 * self.args.stoch,), "float32"))
        return layout | {key: ((), "bool") for key in FLAGS}

    def initial(self, num_envs):
        """What acting carries from step to step, at the start: deter, stoch, action (num_envs, A)."""
        state = self.world_model.rssm.initial(num_envs)
        return *state, torch.zeros(num_envs, self.action_dim, device=self.device)

    @torch.no_grad()
    def act(self, obs, carry):
        """Observations (num_envs, ...) with is_first, what it returned last -> deter, stoch, action (num_envs, A)."""
        deter = self.world_model.rssm.lstm(*carry) * ~obs["is_first"].unsqueeze(-1)  # it has not seen the observation
        embed = self.world_model.encoder(self.world_model.frame(obs))
        stoch = sample_latent(embed) if self.args.sample_latent else embed.chunk(2, -1)[0]
        return deter, stoch, self.policy(deter, stoch)

    def policy(self, deter, stoch):
        """The controller's action in a state: (num_envs, A)."""
        return self.behaviour.action(self.behaviour(deter, stoch))

    def env_action(self, action):
        """Actions (num_envs, A) -> what the environments take: (num_envs,) or (num_envs, A)."""
        return (action.argmax(-1) if self.discrete else action.clamp(-1, 1)).cpu().numpy()

    def update(self, losses, rate, decay, clip=math.inf):
        """A step of Adam on the sum of the losses (...) by name -> metrics by key. `decay`: what is left of the rate
        above 1e-5. Each number of the gradient is clipped."""
        metrics = {f"losses/{key}": loss.mean() for key, loss in losses.items()}
        self.optimizer.zero_grad()
        sum(metrics.values()).backward()
        metrics["stats/grad_norm"] = nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        nn.utils.clip_grad_value_(self.trained, clip)
        self.optimizer.param_groups[0]["lr"] = (rate - 1e-5) * decay + 1e-5
        self.optimizer.step()
        return {key: value.item() for key, value in metrics.items()}


WORKER = {}  # of a worker process: its agent and its environment


def start_worker(args, weights):
    """Makes agent and environment of a worker process, which ends when the main process does."""
    env, parent = make_env(args), multiprocessing.parent_process()
    Finalize(None, env.close, exitpriority=1)  # it may have processes of its own, as VizDoom's has
    threading.Thread(target=lambda: parent.join() or env.close() or os._exit(1), daemon=True).start()
    torch.set_num_threads(1)
    if "CarRacing" in args.env_id and not args.whole_episodes:  # after whose end all steps are seen
        draw_seldom(env.unwrapped, args.action_repeat)
    agent = Agent(replace(args, compile=False, amp=False), env.observation_space.spaces, env.action_space)
    agent.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    WORKER.update(agent=agent, env=env)


def draw_seldom(game, repeat):
    """CarRacing draws a frame at each step, 98 % of the time: now only the last of a repeated action, which is seen."""
    draw, rate = game._render, game.metadata["render_fps"]
    unseen = lambda mode: mode == "state_pixels" and (round(game.t * rate) - 1) % repeat
    game._render = lambda mode: game.state if unseen(mode) else draw(mode)


class Workers(ProcessPoolExecutor):
    """`num_envs` processes, to play with the agent as it is now."""

    def __init__(self, args, agent):
        context = multiprocessing.get_context("forkserver")  # from a clean process that has imported what takes long
        context.set_forkserver_preload(["cv2", "gymnasium", "torch._dynamo", "tensorboardX", "tyro"])
        weights = {key: value.cpu().numpy() for key, value in agent.state_dict().items()}
        super().__init__(args.num_envs, context, start_worker, (args, weights))

    def __exit__(self, *_):
        self.shutdown(cancel_futures=True)


@torch.no_grad()
def rollout(seed, params=None, video=None, policy="controller", noise=0.0, patience=math.inf, keep=False):
    """An episode in a worker process, as in the paper's listing -> return, steps, arrays (steps + 1, ...) by key, log.
    policy: "controller", with these parameters and noise on its outputs, or one of --policy. The episode is left after
    `patience` steps without positive reward. To keep, it may go on after its end. `video`: folder for an mp4."""
    agent = WORKER["agent"]
    env = make_env(agent.args, video) if video else WORKER["env"]
    model, behaviour, rng = agent.world_model, agent.behaviour, np.random.default_rng(seed)
    torch.manual_seed(seed)
    if policy == "agent":  # as the authors': V, M and C are drawn anew, from Cauchy distributions of a random width
        scale = rng.uniform(0, 0.01)
        params = scale * torch.empty_like(behaviour.params).cauchy_()
        for weight in model.parameters():  # V and M are so small, by their set_model_params, that z is noise
            weight.data.cauchy_().mul_(scale / 10_000)
    if params is not None:
        behaviour.params.copy_(torch.as_tensor(params))
    obs, _ = env.reset(seed=seed)
    carry, output, kept = agent.initial(1), torch.zeros(1, behaviour.outputs), []
    total, reward, steps, idle, hold = 0.0, 0.0, 0, 0, 1
    terminated = ended = over = False
    while True:
        obs = to_tensors({key: value[None] for key, value in obs.items()}, agent.device)
        if keep:
            step = dict(image=model.frame(obs)[0].numpy(), action=carry[2][0].numpy(), reward=reward)
            kept.append(step | dict(is_first=steps == 0, is_last=over, is_terminal=terminated))
        if over:
            break
        if policy == "brown":
            output = (output + math.sqrt(1 / 50) * torch.randn_like(output)).clamp(-1, 1)
        elif policy == "held":
            if steps % hold == 0:  # the authors' test, so that actions are not held for just that long
                output, hold = 2 * torch.rand_like(output) - 1, int(rng.integers(1, 11))
        else:
            carry = agent.act(obs | {"is_first": torch.tensor([steps == 0])}, carry)
            output = behaviour(*carry[:2]).nan_to_num()
            output = (output + noise * torch.randn_like(output)).clamp(-1, 1)
        carry = *carry[:2], behaviour.action(output)
        obs, reward, terminated, truncated, info = env.step(agent.env_action(carry[2])[0])
        reward, terminated = (0.0, False) if ended else (float(reward), terminated)  # after an end nothing counts
        total, steps, idle = total + reward, steps + 1, 0 if reward > 0 else idle + 1
        ended = ended or terminated
        over = truncated or idle >= patience or (ended and not (keep and agent.args.whole_episodes))
    if video:
        env.close()
    kept = {key: np.stack([step[key] for step in kept]) for key in (kept[0] if kept else ())}
    return total, steps, kept, info["log"]


# The stages, as generators: each yields the numbers of a unit that is done, and the frames that it took. `at` says how
# far the run is (iteration, units done, frames), and holds what a stage remembers, and random numbers for each unit


def collect(args, agent, rollouts, at):
    """Episodes of random agents or, from the second iteration on, of the controller with noise on its outputs."""
    how = dict(policy=args.policy) if at.iteration == 0 else dict(noise=args.collect_noise)
    play = partial(rollout, keep=True, patience=args.collect_patience or math.inf, **how)
    seeds = np.random.SeedSequence([0, args.seed, at.iteration]).generate_state(args.rollouts) // 2
    with Workers(args, agent) as workers:
        for total, steps, kept, log in workers.map(play, seeds[at.done :].tolist()):
            if at.frames >= args.total_timesteps:
                return
            if steps > args.shortest:
                rollouts.add(kept)
            frames, log = steps * args.action_repeat, {f"charts/{key}": value for key, value in log.items()}
            yield {"charts/episodic_return": total, "charts/episodic_length": frames} | log, frames


def learn_v(args, agent, rollouts, at):
    """V, from frames of the episodes that are not held out."""
    episodes = rollouts.episodes(held_out=False)
    if not episodes:
        sys.exit("no episode was kept but for the one that scores M: --resume with more --rollouts, or --shortest less")
    steps = np.concatenate(episodes)
    steps = steps[~rollouts.arrays["is_terminal"][steps]]  # ViZDoom's are black
    while True:
        chosen = steps[at.rng.integers(len(steps), size=args.vae_batch_size)]
        losses = agent.world_model.vae_loss(rollouts.get(chosen, agent.device, ["image"])["image"])
        yield agent.update(losses, args.vae_rate, args.vae_decay**at.done), 0


@torch.no_grad()
def encode(args, agent, rollouts, at):
    """Means and log-variances of all frames, from which M's latents are drawn anew in each batch."""
    while True:
        steps = np.arange(at.done * CHUNK, min((at.done + 1) * CHUNK, rollouts.count))
        image = rollouts.get(steps, agent.device, ["image"])["image"]
        rollouts.arrays["embed"][steps] = agent.world_model.encoder(image).cpu().numpy()
        yield {}, 0


def learn_m(args, agent, rollouts, at):
    """M, from the episodes that are not held out, one after the other; its state goes on from chunk to chunk."""
    shape, episodes, order = (args.batch_size, args.batch_length), rollouts.episodes(held_out=False), None
    steps = np.concatenate(episodes)
    chunks = len(steps) // math.prod(shape)
    if not chunks:
        sys.exit(f"--batch-size and --batch-length {shape}: of {len(steps)} steps that is no batch; --resume with less")
    reward = rollouts.arrays["reward"][steps][~rollouts.arrays["is_first"][steps]]
    agent.world_model.reward_scale.copy_(torch.tensor([reward.mean(), reward.std() if reward.std() > 1e-6 else 1.0]))
    while True:
        row = {"eval/latent_loss_untrained": score_m(agent, rollouts)["eval/latent_loss"]} if at.done == 0 else {}
        epoch, chunk = divmod(at.done, chunks)
        if order is None or chunk == 0:  # episodes in random order, cut into streams (B), these into chunks (T)
            order = np.random.default_rng([0, args.seed, at.iteration, epoch]).permutation(len(episodes))
            order = np.concatenate([episodes[i] for i in order])[: chunks * math.prod(shape)]
            order = order.reshape(shape[0], chunks, shape[1])
        data = rollouts.get(order[:, chunk], agent.device)
        if chunk == 0 or len(at.memory["state"][0]) != shape[0]:
            at.memory["state"] = agent.world_model.rssm.initial(shape[0])
            data["is_first"][:, 0] = True
        losses, at.memory["state"] = agent.world_model.loss(data, [x.to(agent.device) for x in at.memory["state"]])
        row |= agent.update(losses, args.rnn_rate, args.rnn_decay**at.done, args.clip)
        yield row | (score_m(agent, rollouts) if at.done == args.rnn_updates - 1 else {}), 0


@torch.no_grad()
def score_m(agent, rollouts):
    """M's losses on 20 held-out episodes: the latent's in nats for each of its numbers and, to compare, that of a
    Gaussian around the latent of the step before, with the deviations that these episodes have."""
    model, steps = agent.world_model, np.concatenate(rollouts.episodes(held_out=True)[:20])
    data = rollouts.get(steps[None], agent.device)
    losses, _ = model.loss(data, model.rssm.initial(1))
    changes = sample_latent(data["embed"])[0].diff(dim=0)[~(data["is_first"] | data["is_terminal"])[0, 1:]]
    copy = (changes.square().mean(0).log() + 1 + math.log(2 * math.pi)) / 2
    scores = {"latent_loss": losses["latent_loss"], "reward_loss": losses["reward_loss"], "latent_loss_copy": copy}
    return {f"eval/{key}": score.mean().nan_to_num().item() for key, score in scores.items()}


def evolve(args, agent, rollouts, at):
    """C: CMA-ES (arXiv:1604.00772) on the mean return of each candidate, in the environment or in the dream.
    Kept is the distribution's mean that scored best in the environment or, without evaluations, the last one."""
    warnings.filterwarnings("ignore", "Could not import matplotlib")  # which cma misses at once, and we never
    import cma

    in_dream = args.train_controller_in == "dream"
    options = dict(popsize=args.population, seed=args.seed + 1, verbose=-9)
    begin = dict(start=agent.behaviour.params.clone(), sigma=args.sigma, options=options, costs=[], best=-math.inf)
    at.memory = memory = begin | at.memory
    es = cma.CMAEvolutionStrategy(memory["start"].cpu().numpy(), memory["sigma"], memory["options"])
    for costs in memory["costs"]:  # told again, they bring it back
        es.tell(es.ask(), costs)
    tensor = partial(torch.as_tensor, dtype=torch.float32, device=agent.device)
    play = partial(rollout, patience=args.patience or math.inf)
    with Workers(args, agent) as workers:
        while in_dream or at.frames < args.total_timesteps:
            candidates, frames, score = es.ask(), 0, -math.inf
            params = np.array(candidates, np.float32)  # (P, W)
            if in_dream:
                start = dream_starts(agent, rollouts, args.candidate_rollouts)
                fitness = dream_returns(agent, tensor(params), start, args.dream_length)
            else:
                seeds = at.rng.integers(2**31, size=args.candidate_rollouts).tolist()  # all get the same tracks
                results = workers.map(play, seeds * len(params), np.repeat(params, len(seeds), 0))
                results = list(takewhile(lambda _: not at.stop, results))
                if at.stop:
                    return
                totals, steps, *_ = zip(*results, strict=True)
                fitness, frames = torch.tensor(totals).view(len(params), -1).mean(1), sum(steps) * args.action_repeat
            costs = (-fitness).tolist()
            es.tell(candidates, costs)
            mean = es.result.xfavorite.astype(np.float32)
            dreamt = dream_returns(agent, tensor(mean)[None], dream_starts(agent, rollouts, 64), args.dream_length)
            row = {"charts/fitness_mean": fitness.mean().item(), "charts/fitness_best": fitness.max().item()}
            row |= {"charts/dream_return": dreamt.item(), "charts/generation": at.done + 1, "stats/sigma": es.sigma}
            if args.eval_every and (at.done + 1 == args.generations or (at.done + 1) % args.eval_generations == 0):
                video = f"{at.folder}/videos/{at.iteration}_{at.done + 1}" if args.capture_video else None
                results = evaluate(workers, args, [1, args.seed, at.iteration, at.done], mean, video)
                returns = np.array([total for total, *_ in takewhile(lambda _: not at.stop, results)])
                if at.stop:
                    return
                score = float(returns.mean())
                row |= {"eval/episodic_return": score, "eval/episodic_return_std": returns.std()}
            if score > memory["best"] or memory["best"] == -math.inf:
                agent.behaviour.params.copy_(tensor(mean))
            memory |= dict(best=max(memory["best"], score), costs=[*memory["costs"], costs])
            yield row, frames


@torch.no_grad()
def dream_starts(agent, rollouts, count):
    """States that `count` dreams start from, drawn from what was collected: deter (R, D), stoch (R, S)."""
    rssm, context = agent.world_model.rssm, agent.args.dream_context
    flag = ~rollouts.arrays["is_last"] if context else rollouts.arrays["is_first"]
    last = np.flatnonzero(flag[: rollouts.count])
    last = last[torch.randint(len(last), (count, 1)).numpy()]
    data = rollouts.get(np.maximum(last + np.arange(-context, 1), 0), agent.device)
    data["is_first"][:, 0] = True
    deter, stoch = rssm.observe(data["embed"], data["action"], data["is_first"], rssm.initial(count))
    return deter[:, -1], stoch[:, -1]


# === Dream ============================================================================================================


class Dream(gym.Env):
    """The learned world model as a Gymnasium environment: it sees an episode's first observation, imagines the rest.
    info["real"] is what the real environment shows after the same actions, while its episode lasts. A dream ends where
    the model says so, or is cut after `length` steps."""

    def __init__(self, agent, env, length=500):
        self.agent, self.env, self.length = agent, env, length
        self.observation_space, self.action_space = env.observation_space, env.action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        torch.manual_seed(int(self.np_random.integers(2**31)))
        self.real, self.over, self.steps = self.env.reset(seed=seed)[0], False, 0
        obs = {key: value[None] for key, value in self.real.items()} | {"is_first": np.ones(1, bool)}
        *self.state, _ = self.agent.act(to_tensors(obs, self.agent.device), self.agent.initial(1))
        return self.observe(), {"real": self.real}

    @torch.no_grad()
    def observe(self):
        decoded = self.agent.world_model.decode(feature(*self.state).unsqueeze(1))
        return {key: value[0, 0].cpu().numpy() for key, value in decoded.items()}

    @torch.no_grad()
    def step(self, action):
        agent, model = self.agent, self.agent.world_model
        if not self.over:
            self.real, _, terminated, truncated, _ = self.env.step(action)
            self.over = terminated or truncated
        action = torch.as_tensor(np.array([action]), device=agent.device)
        action = F.one_hot(action.long(), agent.action_dim).float() if agent.discrete else action.float().clamp(-1, 1)
        self.state, self.steps = model.rssm.img_step(self.state, action), self.steps + 1
        feat = feature(*self.state)
        reward, ended, cut = model.reward(feat).item(), model.cont(feat).item() < 0.5, self.steps >= self.length
        return self.observe(), reward, ended, cut, {"real": self.real}

    @torch.no_grad()
    def policy(self):
        """What the agent does here, as an action of the environment's action space."""
        return self.agent.env_action(self.agent.policy(*self.state))[0]


def picture(obs):
    """Observations (..., H, W, C) or (..., n) as pictures (..., H, W, 3): images side by side, or vectors as bars."""
    images = [obs[key] for key in sorted(obs) if obs[key].dtype == np.uint8]
    if images:
        return np.concatenate([x[..., :3] if x.shape[-1] >= 3 else x[..., :1].repeat(3, -1) for x in images], -2)
    bars = np.tanh(np.concatenate([obs[key] for key in sorted(obs)], -1) / 2)[..., None, :]  # (..., 1, n)
    level = np.linspace(1, -1, 64)[:, None]
    inside = (level <= bars.clip(min=0)) & (level >= bars.clip(max=0))  # (..., 64, n)
    return np.where(inside.repeat(8, -1)[..., None], [60, 90, 160], 255).astype(np.uint8)


# === Run ==============================================================================================================


def setup(args):
    """Device and numerical settings."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and sys.platform == "linux":  # glibc is to keep freed memory, or page faults cost time
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    return device


def load(run, agent):
    """Fills an agent from the checkpoint of a run -> the checkpoint."""
    try:
        state = torch.load(f"{run}/checkpoint.pt", map_location="cpu", weights_only=True)
        agent.load_state_dict(state["agent"])
        agent.optimizer.load_state_dict(state.get("optimizer", agent.optimizer.state_dict()))
        return state
    except Exception as error:
        sys.exit(f"{run}/checkpoint.pt is missing, not whole, of other sizes or another version: {repr(error)[:99]}")


def make_agent(args):
    """An agent without learning and one of its environments; exits if that cannot be made."""
    try:
        env = make_env(args)
    except Exception as error:
        sys.exit(f"--env-id {args.env_id}: {type(error).__name__}: {' '.join(str(error).split())}")
    return Agent(args, env.observation_space.spaces, env.action_space, setup(args)), env


def load_run(args, run):
    """The agent of a run and one of its environments."""
    args.compile = False  # it would take longer than it saves
    agent, env = make_agent(args)
    load(run, agent)
    return agent, env


def evaluate(workers, args, seed, params=None, video=None):
    """Rollouts of `eval_episodes` episodes that training does not see; `video`: folder for an mp4 of the first."""
    seeds = np.random.SeedSequence(seed).generate_state(args.eval_episodes) // 2
    return workers.map(rollout, seeds.tolist(), repeat(params), [video] + [None] * (len(seeds) - 1))


def train(args):
    """All stages, one after the other, `iterations` times, from the start or from a checkpoint."""
    if args.track and not find_spec("wandb"):
        sys.exit("--track needs Weights & Biases: pip install wandb")
    agent, env = make_agent(args)
    limit = args.time_limit or env.spec.max_episode_steps
    env.close()
    if not limit:
        limit = args.time_limit = 1000 * args.action_repeat
        print(f"{args.env_id} names no time limit: --time-limit {limit} is taken")
    name = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{time.time_ns() // 1000}"
    folder, saved = args.resume or f"{args.run_dir}/{name}", load(args.resume, agent) if args.resume else {}
    (begun, done), tick, frames = saved.get("progress", ([[0, 0], 0], 0, 0))  # iteration and stage, units of it
    longest = limit if args.whole_episodes else -(-limit // args.action_repeat)  # after an end, no action is repeated
    played = begun[0] * args.rollouts + (args.rollouts if begun[1] else min(args.rollouts, done))
    capacity = saved.get("count", 0) + max(0, args.iterations * args.rollouts - played) * (longest + 1)
    rollouts = Rollouts(f"{folder}/replay", agent.layout(), max(1, capacity), saved.get("count", 0))
    Path(f"{folder}/args.tmp").write_text(json.dumps(asdict(args) | {"script": Args.exp_name}, indent=1))
    os.replace(f"{folder}/args.tmp", f"{folder}/args.json")
    if args.track:
        import wandb

        names = dict(project=args.wandb_project_name, entity=args.wandb_entity, name=os.path.basename(folder))
        wandb.init(**names, config=vars(args), sync_tensorboard=True)
    writer = SummaryWriter(folder, purge_step=tick + 1, flush_secs=1)
    print(f"{folder}: {sum(p.numel() for p in agent.trained):,} parameters, {agent.device}")

    stop, rows = [], []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the first ends in good order, the next at once
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, lambda number, _: os._exit(128 + number) if stop else stop.append(number))
    at = SimpleNamespace(folder=folder, stop=stop, frames=frames)
    stages = (collect, learn_v, encode, learn_m, evolve)
    for iteration, (number, stage) in product(range(args.iterations), enumerate(stages)):
        at.iteration, place = iteration, [iteration, number]
        if stop or place < begun:  # its result is there
            continue
        at.done, at.memory = (done, saved.get("memory", {})) if place == begun else (0, {})
        units = (args.rollouts, args.vae_updates, -(-rollouts.count // CHUNK), args.rnn_updates, args.generations)
        results, total, ending = stage(args, agent, rollouts, at), units[number], at.done >= units[number]
        with tqdm(total=total, initial=at.done, desc=stage.__name__) as bar:
            while not ending:
                # One unit, with random numbers of its own, so that a run that was stopped goes on as if it had not been
                at.rng, before, clock = np.random.default_rng([0, args.seed, *place, at.done]), tick, time.time()
                torch.manual_seed(int(at.rng.integers(2**63)))
                row, taken = next(results, ({}, None))
                bad = [key for key, value in row.items() if not math.isfinite(value)]
                if bad:
                    sys.exit(f"\nnot finite in {stage.__name__} {at.done}: {bad}; the last checkpoint is kept")
                if taken is not None:
                    tick, at.done, at.frames = tick + max(1, taken), at.done + 1, at.frames + taken
                ending = taken is None or at.done == total or bool(stop)

                # Save: the checkpoint is there whole or not at all; the rollouts that belong to it lie beside it
                if ending or tick // args.save_every > before // args.save_every:
                    for array in rollouts.arrays.values():
                        array.flush()
                    state = dict(agent=agent.state_dict(), optimizer=agent.optimizer.state_dict(), count=rollouts.count)
                    with open(f"{folder}/checkpoint.tmp", "wb") as file:
                        torch.save(state | dict(progress=((place, at.done), tick, at.frames), memory=at.memory), file)
                        file.flush()
                        os.fsync(file.fileno())
                    os.replace(f"{folder}/checkpoint.tmp", f"{folder}/checkpoint.pt")

                # Log: means of what came since the last row
                bar.update(at.done - bar.n)
                bar.set_postfix({key.split("/")[1]: row[key] for key in [*row][:2]}, refresh=False)
                if taken:
                    row["charts/SPS"] = taken / (time.time() - clock)
                rows.append(row | {"charts/frames": at.frames})
                every = args.log_every if stage in stages[1:4] else 1
                if ending or tick // every > before // every:
                    for key in dict.fromkeys(key for row in rows for key in row):
                        writer.add_scalar(key, np.mean([row[key] for row in rows if key in row]), tick)
                    rows = []
        results.close()
    writer.close()
    print(f"{'stopped' if stop else 'done'} at frame {at.frames} and saved: --resume {folder}")
    if stop:
        sys.exit(128 + stop[0])


def main(argv=None):
    args = parse_args(argv)
    if args.evaluate:
        agent, _ = load_run(args, args.evaluate)
        video = f"{args.evaluate}/videos" if args.capture_video else None
        with Workers(args, agent) as workers:
            results = tqdm(evaluate(workers, args, [1, args.seed], video=video), total=args.eval_episodes)
            returns = np.array([total for total, *_ in results])
        print(f"{args.env_id}: {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes")
    else:
        train(args)


if __name__ == "__main__":
    main()
