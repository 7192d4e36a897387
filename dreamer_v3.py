"""DreamerV3: Mastering Diverse Domains through World Models (Hafner et al. 2023; Nature 2025), arXiv:2301.04104v2.

Authors' code: github.com/danijar/dreamerv3 at e3f0224. Where paper and code disagree, the line concerned says so.

    python dreamer_v3.py --env-id dmc-walker-walk                        # train, from pixels
    python dreamer_v3.py --env-id dmc-walker-walk --obs state --size 1m  # train on a CPU, from joint angles
    python dreamer_v3.py --resume runs/<run>                             # continue; --evaluate runs/<run> scores it

A world model (encoder, recurrent state-space model, decoder, reward and continue heads) learns from replayed sequences,
an actor and a critic from sequences that it imagines. One set of hyper-parameters for all tasks.

What changed since dreamer_v2.py:
 [C1] Vectors are squashed by symlog; reward and value are categorical over exponentially spaced bins (two-hot): symlog,
      symexp, twohot_*, bins, Encoder, Decoder, WorldModel, Behaviour.
 [C2] Block-diagonal GRU with an input layer for each of deter, stoch and action; RMSNorm, SiLU, normal initialisation:
      BlockLinear, RMSNorm, MLP, RSSM, initialise, deter, hidden, units, stoch, classes, blocks.
 [C3] 1 % of every latent's probability is uniform; no Gaussian latents: unimix, kl_divergence, RSSM.
 [C4] KL split in a dynamics and a representation loss, each with a free nat per step: free_nats, dyn_scale, rep_scale.
 [C5] Max-pooling and upsampling between convolutions, block-wise first map: Conv, UpsampleConv, depth, decoder_blocks.
 [C6] REINFORCE for all actions, returns scaled by their 5th to 95th percentile, bounded normal, evaluation samples:
      Actor, Behaviour.scale, return_rate, entropy_scale, Agent.act, evaluate.
 [C7] Returns from the online critic, which learns on replay too; the slow one regularises it: Behaviour.loss,
      slow_critic_rate, replay_critic_scale.
 [C8] The continue head learns the discount and judges the start of imagination too; returns start with the next reward:
      WorldModel.loss, lambda_return, discount_horizon.
 [C9] One optimizer: adaptive gradient clipping, LaProp, warm-up: LaProp, learning_rate, warmup, clip, Agent.
[C10] Sequences of one step more that start from stored latents, refreshed after each update; new ones first: Replay.
[C11] Train ratio instead of a schedule, no random prefill; sizes; several processes; Atari's pictures: train, size,
      train_ratio, replay_size, batch_*, parse_args, setup, make_env.

Not copied from their code: cross entropy for observations of classes (here: squared error), DMC drawn from state, Atari
games that start without a no-op (theirs: 0 to 30, here 1 to 30) and whose time limit counts as terminal.

Shapes: B batch, T time, H imagination horizon, N = B*T starts of imagination, A action, D deter, S stoch variables,
K classes of each, E embed, F = D + S*K feat, G blocks, X bins, L = T - 1, P = H + 1. Arrays are (B, T, ...).
"""

import atexit
import ctypes
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Literal

import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # now, since its defaults would keep a process group that exists, beyond its end
import torch.nn.functional as F
import tyro
from PIL import Image
from tensorboardX import SummaryWriter
from torch import nn
from torch.distributions import Distribution, Independent, Normal, OneHotCategorical
from torch.utils._pytree import tree_map
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

    # DreamerV3. Defaults: the authors' configs.yaml, unless said otherwise
    size: Literal["1m", "12m", "25m", "50m", "100m", "200m", "400m"] = "200m"  # the five that follow, unless given
    deter: int | None = None  # units of the recurrent state
    hidden: int | None = None  # units of the layers inside the RSSM
    classes: int | None = None  # classes of each stochastic variable
    depth: int | None = None  # channels of the convolutions, times 2, 3, 4, 4
    units: int | None = None  # units of all other layers
    stoch: int = 32  # categorical variables of the stochastic state
    blocks: int = 8  # blocks of the GRU's block-diagonal layers; divides --deter
    decoder_blocks: int = 8  # blocks of the layer from deter to the decoder's first map; divides --deter, 4 · --depth
    unimix: float = 0.01  # uniform share of the latents' probabilities
    bins: int = 255  # of reward and value; odd, 3 or more
    dyn_scale: float = 1.0  # of the dynamics loss, which moves the prior to the posterior
    rep_scale: float = 0.1  # of the representation loss, which moves the posterior to the prior
    free_nats: float = 1.0  # nats below which a step's KL gives no gradient
    replay_critic_scale: float = 0.3  # of the critic's loss on replayed sequences
    slow_critic_rate: float = 0.02  # of the critic's slow average, per update
    return_rate: float = 0.01  # of the return percentiles' average, per update
    entropy_scale: float = 3e-4  # of the actor's entropy bonus
    imagination_horizon: int = 15  # steps imagined from each state
    discount_horizon: int = 333  # steps; the discount is 1 - 1 / this
    lmbda: float = 0.95  # mixing of n-step returns
    learning_rate: float = 4e-5  # of the one optimizer
    warmup: int = 1000  # updates over which the learning rate rises from 0
    clip: float = 0.3  # largest ratio of a gradient's norm to its parameter's
    batch_size: int = 16  # sequences of a batch
    batch_length: int = 64  # steps of a sequence
    train_ratio: float = 32  # replayed steps per step of the agent
    replay_size: int = 5_000_000  # steps that the replay holds


# Table 3 (arXiv:2301.04104v2), and size1m of the authors' configs.yaml
WIDTHS = {"1m": 64, "12m": 256, "25m": 384, "50m": 512, "100m": 768, "200m": 1024, "400m": 1536}
LARGE = dict(num_envs=16, eval_every=1_000_000, save_every=250_000)
DMC = dict(obs="pixels", action_repeat=2, num_envs=8, size="12m", train_ratio=512)
PRESETS = {  # by the first word of --env-id, then by that word and --obs
    "dmc": DMC,  # as for the published curves; configs.yaml: 16 environments, repeat 1, 200m, ratio 256
    "dmc-state": dict(total_timesteps=500_000),  # configs.yaml: 16 environments, repeat 1, 1m, ratio 1024
    "atari": dict(total_timesteps=200_000_000, action_repeat=4, image_size=96, **LARGE),
    "atari100k": dict(total_timesteps=400_000, action_repeat=4, train_ratio=256),
    "metaworld": DMC,  # not the authors'
    "crafter": dict(train_ratio=512),
    "procgen": dict(total_timesteps=100_000_000, image_size=96, train_ratio=64, **LARGE),
    "bsuite": dict(total_timesteps=10_000_000, train_ratio=1024, eval_every=1_000_000, save_every=250_000),
}


def parse_args(argv=None):
    """Command line -> Args: defaults, then the suite's preset or what the run was started with, then the flags."""
    text = "\n".join([__doc__, "Presets by suite:", *(f"    {suite}: {preset}" for suite, preset in PRESETS.items())])
    args = tyro.cli(Args, args=argv, description=text)
    suite = re.split("[-:/]", args.env_id)[0].rpartition(".")[2].lower()
    given, run = PRESETS.get(suite, {}), args.evaluate if args.resume is None else args.resume
    given = given | PRESETS.get(f"{suite}-{args.obs or given.get('obs')}", {})
    if run is not None:
        path = Path(run, "args.json")
        given = json.loads(path.read_text() if path.exists() else "{}") | dict(resume=None, evaluate=None)
        if given.pop("script", None) != Args.exp_name or given.keys() - vars(Args()).keys():
            sys.exit(f"{run} is no run of {Args.exp_name}.py, or of another version")
    given = given | ({} if args.cuda else dict(compile=False, amp=False))  # flags can still ask for them
    args = tyro.cli(Args, args=argv, default=Args(**given | dict(env_kwargs={})), description=text)
    args.env_kwargs = args.env_kwargs or given.get("env_kwargs", {})  # as a default, tyro would make a flag of each
    width = WIDTHS[args.size]
    widths = dict(deter=8 * width, hidden=width, classes=width // 16, depth=width // 16, units=width)
    other = run is not None and args.size != given["size"]  # than the run has: it will be refused
    vars(args).update({name: value for name, value in widths.items() if other or getattr(args, name) is None})
    for name, value in vars(args).items():
        least = dict(seed=0, eval_every=0, warmup=0, batch_length=2, bins=3).get(name, 0 if type(value) is float else 1)
        if type(value) in (int, float) and not least <= value < math.inf:
            sys.exit(f"--{name.replace('_', '-')} {value}: the least is {least}")
    if args.deter % args.blocks or args.deter % args.decoder_blocks or 4 * args.depth % args.decoder_blocks:
        sys.exit("--blocks must divide --deter, and --decoder-blocks both --deter and four times --depth")
    if args.image_size % 16 or args.bins % 2 == 0:
        sys.exit("--image-size must be a multiple of 16, and --bins odd")
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
        env = gym.wrappers.AtariPreprocessing(env, frame_skip=repeat, screen_size=(160, 210), grayscale_obs=False)
        shrink = lambda x: np.asarray(Image.fromarray(x).resize((size, size), Image.BILINEAR))
        grey = lambda x: (shrink(x) * [0.299, 0.587, 1 - (0.299 + 0.587)]).sum(-1)[..., None].astype("u1")
        space = gym.spaces.Box(0, 255, (size, size, 1 if full else 3), np.uint8)
        env = gym.wrappers.TransformObservation(env, grey if full else shrink, space)
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


def make_envs(args, count, video=None):
    """Environments in lock-step, in processes of their own if they draw; the step after an episode's last resets."""
    makers = [lambda: make_env(args)] * (count - 1) + [lambda: make_env(args, video)]
    try:
        with make_env(args) as probe:
            drawn = any(space.dtype == np.uint8 for space in probe.observation_space.values())
    except Exception as error:
        sys.exit(f"--env-id {args.env_id}: {type(error).__name__}: {' '.join(str(error).split())}")
    if count == 1 or not drawn:
        return gym.vector.SyncVectorEnv(makers)
    # forked from a clean process, which must not inherit this one's OpenGL and CUDA but has the imports that take long
    multiprocessing.set_forkserver_preload(["cv2", "gymnasium", "tensorboardX", "torch", "tyro"])
    return gym.vector.AsyncVectorEnv(makers, context="forkserver")


# === Replay ===========================================================================================================


class Replay:
    """Ring of steps on disk, one stream for each environment: a memory-mapped array (capacity, envs) of full size.
    Step t holds observation t, the action that led to it, its reward, its flags and the agent's latents: `dtype`.
    `saved`: state of a run that goes on. Exits if the disk is too small or the file does not fit."""

    def __init__(self, path, dtype, num_envs, capacity, length, saved=None):
        self.num_envs, self.length, self.capacity, self.count, self.fresh = num_envs, length, capacity, 0, []
        self.layout, size = (num_envs, dtype.descr), num_envs * dtype.itemsize
        held = os.path.getsize(path) if os.path.exists(path) else 0
        if saved:
            if saved.get("layout") != self.layout or held < saved["capacity"] * size:
                sys.exit(f"{path} is not whole, or not of these observations, environments and sizes: {dtype.names}")
            self.count, self.fresh = saved["count"], saved["fresh"]
            self.capacity = saved["capacity"] if self.count > saved["capacity"] else max(capacity, saved["capacity"])
        if self.capacity < length + 1:
            sys.exit(f"--batch-length {length}: the replay holds only {self.capacity} steps of each environment")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        needed, free = self.capacity * size - held, shutil.disk_usage(os.path.dirname(path)).free
        if needed > free:
            sys.exit(f"{path} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free: make room, lower --replay-size")
        with open(path, "r+b" if held else "wb") as file:
            if hasattr(os, "posix_fallocate"):  # not on macOS, where the memory map makes the file grow
                os.posix_fallocate(file.fileno(), 0, self.capacity * size)
        self.steps = np.memmap(path, dtype, "r+", shape=(self.capacity, num_envs))

    def add(self, step):
        """Appends one step of every environment: key -> array (envs, ...)."""
        for key in step:
            self.steps[key][self.count % self.capacity] = step[key]
        self.count += 1
        if self.count >= self.capacity:  # the oldest follows the newest, also after a kill: it begins an episode
            self.steps["is_first"][self.count % self.capacity] = True
        # each stretch of length + 1 steps is trained on once soon after it came: the online queue
        if self.count > 1 and (self.count - 1) % (self.length + 1) == 0:
            self.fresh += [[self.count - self.length - 1, env] for env in range(self.num_envs)]

    def __len__(self):
        """Number of sequences that can be sampled."""
        return max(0, min(self.count, self.capacity) - self.length) * self.num_envs

    def sample(self, batch_size, rng, device):
        """Sequences, key -> tensor (B, T, ...), with the latents (B, ...) of the step before them; where they are.
        Fresh sequences come first, then uniformly drawn ones, over the ends of episodes."""
        first, last = max(0, self.count - self.capacity), self.count - self.length
        fresh, self.fresh = [x for x in self.fresh[:batch_size] if first <= x[0] < last], self.fresh[batch_size:]
        drawn = rng.integers((first, 0), (last, self.num_envs), (batch_size - len(fresh), 2)).tolist()
        start, env = np.array(fresh + drawn).T  # the step before a sequence, its environment
        rows = (start[:, None] + np.arange(self.length + 1)) % self.capacity
        index, before = (rows[:, 1:], env[:, None]), (rows[:, 0], env)
        data = {key: self.steps[key][before if key in ("deter", "stoch") else index] for key in self.steps.dtype.names}
        data["is_last"][:, :-1] |= data["is_first"][:, 1:]  # an episode that was left
        return to_tensors(data, device), index

    def state_dict(self):
        return dict(capacity=self.capacity, layout=self.layout, count=self.count, fresh=self.fresh)


def to_tensors(values, device):
    """Arrays by key -> tensors on the device."""
    tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in values.items()}
    if device.type == "cuda":
        tensors = {key: tensor.pin_memory().to(device, non_blocking=True) for key, tensor in tensors.items()}
    return tensors


# === Maths ============================================================================================================


def symlog(x):
    """Squashes large values, keeps small ones; Eq. 9 (arXiv:2301.04104v2)."""
    return x.sign() * x.abs().log1p()


def symexp(x):
    """Inverse of symlog; Eq. 9 (arXiv:2301.04104v2)."""
    return x.sign() * x.abs().expm1()


def twohot_bins(bins, device=None):
    """Bins of reward and value: symexp of (bins,) even steps from -20 to 20, exactly antisymmetric; Eq. 10."""
    half = symexp(torch.linspace(-20, 0, bins // 2 + 1, device=device))
    return torch.cat([half, -half[:-1].flip(0)])


def twohot_mean(logit):
    """Expected value of symexp two-hot logits (..., X) -> (...); uniform logits give exactly 0; Eq. 10.
    The bins reach 4.9e8: they are summed in symmetric pairs, or the mean would drown in rounding errors."""
    bins, half = twohot_bins(logit.shape[-1], logit.device), logit.shape[-1] // 2
    probs = logit.softmax(-1)
    return ((probs[..., half + 1 :] - probs[..., :half].flip(-1)) * bins[half + 1 :]).sum(-1)  # @ would be bfloat16


def twohot_loss(logit, *targets):
    """Sum over the targets (...) of the cross entropy of logits (..., X) with the two-hot target; Eq. 11.
    The two bins around the target share the weight by their distance to it, in the space of the target itself."""
    bins, log_probs = twohot_bins(logit.shape[-1], logit.device), logit.log_softmax(-1)
    target = torch.stack(targets, -1)
    above = torch.bucketize(target, bins, right=True).clamp(1, len(bins) - 1)
    low, high = bins[above - 1], bins[above]
    weight = ((target - low) / (high - low)).clamp(0, 1)
    return -torch.lerp(log_probs.gather(-1, above - 1), log_probs.gather(-1, above), weight).sum(-1)


def sample_onehot(probs):
    """Probabilities (..., K) -> a one-hot sample, with the gradient of the probabilities (straight-through)."""
    index = (probs.detach()[..., :-1].cumsum(-1) <= torch.rand_like(probs[..., :1])).sum(-1)
    return F.one_hot(index, probs.shape[-1]) + (probs - probs.detach())


def kl_divergence(p, q):
    """KL of categorical probabilities (..., S, K), summed over the variables: (...)."""
    return (p * (p.log() - q.log())).sum((-2, -1))


# Time table of what the agent has, for a replayed sequence and, with P for T, for an imagined one:
#
#   state     s_0 -- a_1 --> s_1 -- a_2 --> s_2 ... s_T-1       replayed, a_t is action[t]; imagined, imag_action[t - 1]
#   reward    r_0            r_1            r_2 ... r_T-1       came with state t
#   continue  c_0            c_1            c_2 ... c_T-1       probability, times the discount, that t is not the end
#   return    R_0            R_1            R_2 ... R_T-2       of what follows state t: starts with r_1, at R_0


def lambda_return(reward, cont, last, value, lmbda):
    """λ-returns: (N, T) each -> (N, T - 1); Eq. 5 (arXiv:2301.04104v2), over episode ends as in the authors' code.
    R_t = r_t+1 + c_t+1 · ((1 - λ_t+1) v_t+1 + λ_t+1 R_t+1), λ_t = λ (1 - last_t), R_T-1 = v_T-1."""
    lmbda = lmbda * (1 - last)
    interim = reward + cont * (1 - lmbda) * value
    returns = [value[:, -1]]
    for t in range(reward.shape[1] - 1, 0, -1):
        returns.append(interim[:, t] + cont[:, t] * lmbda[:, t] * returns[-1])
    return torch.stack(returns[1:][::-1], 1)


# === Networks =========================================================================================================


def initialise(module):
    """Weights from a truncated normal with standard deviation 1 / sqrt(fan_in), biases zero."""
    if isinstance(module, (nn.Linear, nn.Conv2d, BlockLinear)):
        weight = module.weight[..., 0] if isinstance(module, BlockLinear) else module.weight[0]  # all inputs of blocks
        std = 1.1368 / math.sqrt(weight.numel())  # the cut at two deviations leaves 1 / 1.1368 of one
        nn.init.trunc_normal_(module.weight, 0.0, std, -2 * std, 2 * std)
        nn.init.zeros_(module.bias)


class Output(nn.Linear):
    """The last layer of a head: in float32, also where the networks are in bfloat16."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class BlockLinear(nn.Module):
    """`blocks` layers side by side, each from its part of the input to its part of the output: (B, inp) -> (B, out)."""

    def __init__(self, inp, out, blocks):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, inp // blocks, out // blocks))
        self.bias = nn.Parameter(torch.empty(out))

    def forward(self, x):
        x = x.unflatten(-1, (len(self.weight), -1)).transpose(0, 1)  # (G, B, inp / G)
        x = torch.baddbmm(self.bias.view(len(x), 1, -1), x, self.weight)  # (G, B, out / G)
        return x.transpose(0, 1).flatten(1)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) · weight over the last axis, in float32."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class Conv(nn.Conv2d):
    """5×5 convolution of images (B, H, W, C), then max-pooling to half their size."""

    def __init__(self, inp, out):
        super().__init__(inp, out, 5, padding=2)

    def forward(self, x):
        return F.max_pool2d(super().forward(x.permute(0, 3, 1, 2)), 2).permute(0, 2, 3, 1)


class UpsampleConv(Conv):
    """Nearest upsampling to twice the size, then a 5×5 convolution, without the multiplications by equal values.
    Of the five rows that an output row sees, an even one has the input rows -1 -1 0 0 1, an odd one -1 0 0 1 1: kernel
    rows that meet the same input row are summed first, which leaves a 3×3 kernel for each of the four places."""

    def forward(self, x):
        places = (0, 1, 0, 1), (1, 0, 0, 1), (0, 1, 1, 0), (1, 0, 1, 0)  # of zeros: left, right, top, bottom
        kernels = [F.avg_pool2d(F.pad(self.weight, place), 2, divisor_override=1) for place in places]  # sums
        weight = torch.stack(kernels, 1).flatten(0, 1)
        x = F.conv2d(x.permute(0, 3, 1, 2), weight, self.bias.repeat_interleave(4), padding=1)
        return F.pixel_shuffle(x, 2).permute(0, 2, 3, 1)


def layers(kind, sizes):
    """A layer of this kind, RMSNorm and SiLU from each size to the next."""
    return [nn.Sequential(kind(inp, out), RMSNorm(out, 1e-4), nn.SiLU()) for inp, out in pairwise(sizes)]


class MLP(nn.Sequential):
    """`count` times Linear, RMSNorm and SiLU and, if `out` is given, an output: (..., inp) -> (..., units or out)."""

    def __init__(self, inp, units, count, out=None):
        super().__init__(*layers(nn.Linear, [inp] + [units] * count), *([Output(units, out)] if out else []))


class Encoder(nn.Module):
    """Observations (B or B, T, ...) -> embed (..., E): vectors through an MLP, images through convolutions."""

    def __init__(self, spaces, args):
        super().__init__()
        self.vectors = {key: space.shape[0] for key, space in sorted(spaces.items()) if space.dtype != np.uint8}
        self.images = {key: space.shape[-1] for key, space in sorted(spaces.items()) if space.dtype == np.uint8}
        side = args.image_size // 16  # of the last map
        self.embed_dim = (args.units if self.vectors else 0) + (side**2 * 4 * args.depth if self.images else 0)
        if self.vectors:
            self.layers = MLP(sum(self.vectors.values()), args.units, 3)
        if self.images:
            depths = [sum(self.images.values())] + [args.depth * m for m in (2, 3, 4, 4)]
            self.convs = nn.Sequential(*layers(Conv, depths))

    def forward(self, obs):
        embed = []
        if self.vectors:
            embed.append(self.layers(symlog(torch.cat([obs[key] for key in self.vectors], -1))))
        if self.images:
            image = torch.cat([obs[key] for key in self.images], -1)
            embed.append(self.convs(image.flatten(0, -4) / 255 - 0.5).reshape(*image.shape[:-3], -1))
        return torch.cat(embed, -1)


class Decoder(nn.Module):
    """Features (B, T, F) -> key -> means (B, T, ...): symlog of vectors, images in [0, 1]."""

    def __init__(self, encoder, args):
        super().__init__()
        self.vectors, self.images = encoder.vectors, encoder.images
        feat_dim = args.deter + args.stoch * args.classes
        if self.vectors:
            self.layers = MLP(feat_dim, args.units, 3)
            self.heads = nn.ModuleList(Output(args.units, size) for size in self.vectors.values())
        if self.images:
            self.side, self.deter, depth = args.image_size // 16, args.deter, args.depth * 4
            size = self.side**2 * depth
            self.deter_map = BlockLinear(args.deter, size, args.decoder_blocks)
            self.stoch_map = MLP(feat_dim - args.deter, 2 * args.units, 1, size)
            convs = layers(UpsampleConv, [depth] + [args.depth * m for m in (4, 3, 2)])
            output = UpsampleConv(2 * args.depth, sum(self.images.values()))
            self.convs = nn.Sequential(RMSNorm(depth, 1e-4), nn.SiLU(), *convs, output)

    def forward(self, feat):
        means = {}
        if self.vectors:
            x = self.layers(feat)
            means |= {key: head(x) for key, head in zip(self.vectors, self.heads, strict=True)}
        if self.images:
            deter, stoch = feat.flatten(0, 1).tensor_split([self.deter], -1)
            # a block of deter makes all places of its share of the channels
            x = self.deter_map(deter).unflatten(-1, (len(self.deter_map.weight), self.side, self.side, -1))
            x = x.movedim(1, 3).flatten(3) + self.stoch_map(stoch).unflatten(-1, (self.side, self.side, -1))
            image = self.convs(x).float().sigmoid().unflatten(0, feat.shape[:2])
            means |= zip(self.images, image.split([*self.images.values()], -1), strict=True)
        return means


# === World model ======================================================================================================


class RSSM(nn.Module):
    """Recurrent state-space model, Eq. 1 (arXiv:2301.04104v2): a state is deter (B, D) and stoch (B, S, K)."""

    def __init__(self, args, embed_dim, action_dim):
        super().__init__()
        self.args, stoch_dim = args, args.stoch * args.classes
        self.deter_in = MLP(args.deter, args.hidden, 1)
        self.stoch_in = MLP(stoch_dim, args.hidden, 1)
        self.action_in = MLP(action_dim, args.hidden, 1)
        # every block sees its own part of deter and all of the three inputs
        self.mix = BlockLinear(args.deter + args.blocks * 3 * args.hidden, args.deter, args.blocks)
        self.mix_norm = RMSNorm(args.deter, 1e-4)
        self.gates = BlockLinear(args.deter, 3 * args.deter, args.blocks)
        self.post_net = MLP(args.deter + embed_dim, args.hidden, 1, stoch_dim)
        self.prior_net = MLP(args.deter, args.hidden, 2, stoch_dim)

    def initial(self, batch_size):
        """State of zeros: deter (B, D), stoch (B, S, K)."""
        zeros, args = self.post_net[-1].weight.new_zeros, self.args
        return zeros(batch_size, args.deter), zeros(batch_size, args.stoch, args.classes)

    def gru(self, deter, stoch, action):
        """Block GRU, the sequence model h_t = f(h_t-1, z_t-1, a_t-1): deter (B, D), ... -> next deter (B, D)."""
        action = action / action.detach().abs().clamp(min=1)  # to [-1, 1], as in the authors' code
        x = torch.cat([self.deter_in(deter), self.stoch_in(stoch.flatten(1)), self.action_in(action)], -1)
        blocks = deter.to(x.dtype).unflatten(-1, (self.args.blocks, -1))
        x = torch.cat([blocks, x.unsqueeze(1).expand(-1, self.args.blocks, -1)], -1)
        x = F.silu(self.mix_norm(self.mix(x.flatten(1))))  # (B or N, D)
        gates = self.gates(x).unflatten(-1, (self.args.blocks, 3, -1))
        reset, cand, update = (gate.flatten(1).float() for gate in gates.unbind(2))  # (B or N, D)
        reset = torch.sigmoid(reset)
        cand = torch.tanh(reset * cand)
        update = torch.sigmoid(update - 1)
        return update * cand + (1 - update) * deter

    def probs(self, logit):
        """Logits (..., S*K) -> probabilities (..., S, K) with a uniform share (p. 5)."""
        probs = logit.unflatten(-1, (self.args.stoch, self.args.classes)).softmax(-1)
        return (1 - self.args.unimix) * probs + self.args.unimix / self.args.classes

    def obs_step(self, state, action, embed, is_first):
        """One step with an observation; where is_first (B,), all before is forgotten -> state, posterior (B, S, K)."""
        deter, stoch = state
        mask = 1 - is_first.float().unsqueeze(-1)
        deter = self.gru(deter * mask, stoch * mask.unsqueeze(-1), action * mask)
        post = self.probs(self.post_net(torch.cat([deter, embed], -1)))
        return (deter, sample_onehot(post)), post

    def img_step(self, state, action):
        """One step without: state, action (B, A) -> state."""
        deter = self.gru(*state, action)
        return deter, sample_onehot(self.probs(self.prior_net(deter)))

    def observe(self, embed, action, is_first, start):
        """Embed (B, T, E), action (B, T, A) that led to each step, is_first (B, T), state before -> posterior states:
        deter (B, T, D), stoch (B, T, S, K), post (B, T, S, K)."""
        steps = []
        for inputs in zip(*(x.split(8, 1) for x in (action, embed, is_first)), strict=True):  # more compile slowly
            steps += self.obs_steps(steps[-1][:2] if steps else start, *inputs)
        return tuple(torch.stack(x, 1) for x in zip(*steps, strict=True))

    def obs_steps(self, state, action, embed, is_first):
        """A few calls of obs_step, compiled as one function: inputs (B, T, ...) -> [(deter, stoch, post), ...]."""
        steps = []
        for inputs in zip(action.unbind(1), embed.unbind(1), is_first.unbind(1), strict=True):
            state, post = self.obs_step(state, *inputs)
            steps.append((*state, post))
        return steps

    def imagine(self, start, policy, horizon):
        """What follows a state under a policy, feat (N, F) -> action (N, A): feat (N, P, F), action (N, H, A)."""
        state, feats, actions = start, [feature(*start)], []
        for _ in range(horizon):
            actions.append(policy(feats[-1]))
            state = self.img_step(state, actions[-1])
            feats.append(feature(*state))
        return torch.stack(feats, 1), torch.stack(actions, 1)


def feature(deter, stoch):
    """(..., D), (..., S, K) -> (..., F)."""
    return torch.cat([deter, stoch.flatten(-2)], -1)


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward head and continue head."""

    def __init__(self, args, spaces, action_dim):
        super().__init__()
        self.args, feat_dim = args, args.deter + args.stoch * args.classes
        self.encoder = Encoder(spaces, args)
        self.rssm = RSSM(args, self.encoder.embed_dim, action_dim)
        self.decoder = Decoder(self.encoder, args)
        self.reward_head = MLP(feat_dim, args.units, 1, args.bins)
        self.continue_head = MLP(feat_dim, args.units, 1, 1)

    def loss(self, data, start):
        """Eq. 2 and 3 (arXiv:2301.04104v2) -> losses (B, T) by name, deter, stoch, feat; stats.
        data: observations (B, T, ...), action, reward, is_first, is_last, is_terminal."""
        args = self.args
        embed = self.encoder(data)  # (B, T, E)
        deter, stoch, post = self.rssm.observe(embed, data["action"], data["is_first"], start)
        prior = self.rssm.probs(self.rssm.prior_net(deter))  # (B, T, S, K)
        feat = feature(deter, stoch)  # (B, T, F)
        losses = {}
        for key, mean in self.decoder(feat).items():
            target = data[key] / 255 if key in self.decoder.images else symlog(data[key])
            losses[f"recon_loss_{key}"] = (mean - target).square().flatten(2).sum(-1)  # (B, T)
        losses["reward_loss"] = twohot_loss(self.reward_head(feat), data["reward"])  # (B, T)
        # the head learns the discount too; paper: it learns the end alone, and returns are discounted outside
        target = (1 - data["is_terminal"].float()) * (1 - 1 / args.discount_horizon)  # (B, T)
        logit = self.continue_head(feat).squeeze(-1)  # (B, T)
        losses["continue_loss"] = F.binary_cross_entropy_with_logits(logit, target, reduction="none")  # (B, T)
        losses["dyn_loss"] = kl_divergence(post.detach(), prior).clamp(min=args.free_nats)  # (B, T)
        losses["rep_loss"] = kl_divergence(post, prior.detach()).clamp(min=args.free_nats)  # (B, T)
        entropies = [torch.special.entr(probs).sum((-2, -1)).mean() for probs in (post, prior)]
        stats = dict(posterior_entropy=entropies[0], prior_entropy=entropies[1], kl=kl_divergence(post, prior).mean())
        return losses, deter, stoch, feat, stats

    def reward(self, feat):
        """(..., F) -> expected reward (...)."""
        return twohot_mean(self.reward_head(feat))

    def cont(self, feat):
        """(..., F) -> probability, times the discount, that the episode goes on (...)."""
        return self.continue_head(feat).squeeze(-1).sigmoid()

    def decode(self, feat):
        """(B, T, F) -> observations as the environment gives them, key -> (B, T, ...)."""
        means = self.decoder(feat).items()
        return {k: (v * 255).round().byte() if k in self.decoder.images else symexp(v) for k, v in means}


# === Behaviour ========================================================================================================


class Actor(nn.Module):
    """Policy over one-hot actions (categorical; their code of 2024: 1 % uniform) or in [-1, 1]^A (bounded normal)."""

    def __init__(self, args, feat_dim, action_dim, discrete):
        super().__init__()
        self.discrete = discrete
        Distribution.set_default_validate_args(False)  # checks that wait for the GPU
        self.layers = MLP(feat_dim, args.units, 3)
        self.outputs = nn.ModuleList(Output(args.units, action_dim) for _ in range(1 if discrete else 2))

    def forward(self, feat):
        """(..., F) -> distribution of actions (..., A)."""
        x = self.layers(feat)
        outputs = [output(x) for output in self.outputs]
        if self.discrete:
            return OneHotCategorical(logits=outputs[0])
        std = 0.9 * torch.sigmoid(outputs[1] + 2) + 0.1
        return Independent(Normal(outputs[0].tanh(), std), 1)

    def sample(self, feat):
        """(..., F) -> action (..., A), drawn from the policy."""
        return sample_onehot(self(feat).probs) if self.discrete else self(feat).rsample()


class Behaviour(nn.Module):
    """Actor, critic, the critic's slow average and the range of returns."""

    def __init__(self, args, action_dim, discrete):
        super().__init__()
        self.args, feat_dim = args, args.deter + args.stoch * args.classes
        self.actor = Actor(args, feat_dim, action_dim, discrete)
        self.critic = MLP(feat_dim, args.units, 3, args.bins)
        self.slow_critic = MLP(feat_dim, args.units, 3, args.bins).requires_grad_(False)
        self.register_buffer("return_range", torch.zeros(2))  # averages of two percentiles

    def loss(self, world_model, data, deter, stoch, feat):
        """Eq. 5 to 7 (arXiv:2301.04104v2): losses of actor and critic by name, (N, H) and, on replay, (B, L); stats.
        data as for the world model; deter (B, T, D), stoch (B, T, S, K), feat (B, T, F)."""
        args, actor = self.args, self.actor
        with torch.no_grad():
            start = deter.flatten(0, 1), stoch.flatten(0, 1)
            imag_feat, imag_action = world_model.rssm.imagine(start, actor.sample, args.imagination_horizon)
            reward = world_model.reward(imag_feat)  # (N, P)
            cont = world_model.cont(imag_feat)  # (N, P)
            slow_value = twohot_mean(self.slow_critic(imag_feat))  # (N, P)
            weight = cont.cumprod(1)[:, :-1]  # (N, H)
        torch.clear_autocast_cache()  # which holds copies of the actor's weights that were made without gradient
        critic_logit = self.critic(imag_feat)  # (N, P, X)
        value = twohot_mean(critic_logit.detach())  # (N, P)
        returns = lambda_return(reward, cont, torch.zeros_like(cont), value, args.lmbda)  # (N, H)
        scale = self.scale(returns)
        advantage = (returns - value[:, :-1]) / scale  # (N, H)
        policy = actor(imag_feat[:, :-1])
        log_prob, entropy = policy.log_prob(imag_action), policy.entropy()  # (N, H)
        losses = {"actor_loss": -weight * (log_prob * advantage + args.entropy_scale * entropy)}
        losses["critic_loss"] = weight * twohot_loss(critic_logit[:, :-1], returns, slow_value[:, :-1])  # (N, H)

        # on the replayed sequences, from the imagined returns; its gradient reaches the world model
        boot = returns[:, 0].view(data["reward"].shape)  # (B, T)
        last = data["is_last"].float()  # (B, T)
        going_on = (1 - data["is_terminal"].float()) * (1 - 1 / args.discount_horizon)  # (B, T)
        replay_returns = lambda_return(data["reward"], going_on, last, boot, args.lmbda)  # (B, L)
        slow_start = slow_value[:, 0].view(boot.shape)[:, :-1]  # (B, L)
        replay_loss = twohot_loss(self.critic(feat[:, :-1]), replay_returns, slow_start)  # (B, L)
        losses["replay_critic_loss"] = (1 - last[:, :-1]) * replay_loss
        stats = dict(actor_entropy=entropy.mean(), advantage_std=advantage.std(), value_mean=value.mean())
        stats |= dict(return_mean=returns.mean(), return_scale=scale)
        return losses, stats | dict(imagined_reward=reward.mean(), imagined_continue=cont.mean())

    def scale(self, returns):
        """What advantages are divided by: max(1, range of returns, 5th to 95th percentile), Eq. 7; updates it."""
        if dist.is_initialized():  # the returns of all processes
            mine, returns = returns.contiguous(), returns.repeat(dist.get_world_size(), 1)
            dist.all_gather(list(returns.chunk(dist.get_world_size())), mine)
        self.return_range.lerp_(torch.stack([returns.quantile(q) for q in (0.05, 0.95)]), self.args.return_rate)
        return (self.return_range[1] - self.return_range[0]).clamp(min=1)


# === Agent ============================================================================================================


class LaProp:
    """Adaptive gradient clipping, then RMS scaling, then momentum, then a warmed-up learning rate (p. 8)."""

    def __init__(self, params, args):
        self.params, self.args = [p for p in params if p.requires_grad], args
        self.square, self.momentum = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.updates = torch.zeros((), dtype=torch.float64, device=self.params[0].device)

    @torch.no_grad()
    def step(self, grads):
        """One update from gradients in the order of the parameters -> stats."""
        grad_norm = torch.stack(torch._foreach_norm(grads))
        limit = self.args.clip * torch.stack(torch._foreach_norm(self.params)).clamp(min=1e-3)
        grads = torch._foreach_mul(grads, (limit / grad_norm).clamp(max=1).unbind())
        rate = self.args.learning_rate * (self.updates / max(1, self.args.warmup)).clamp(max=1)
        self.updates += 1
        torch._foreach_lerp_(self.square, torch._foreach_mul(grads, grads), 0.001)
        square_sum, momentum_sum = ((1 - beta**self.updates).float() for beta in (0.999, 0.9))  # bias correction
        rms = torch._foreach_add(torch._foreach_sqrt(torch._foreach_div(self.square, square_sum)), 1e-20)
        torch._foreach_lerp_(self.momentum, torch._foreach_div(grads, rms), 0.1)
        torch._foreach_sub_(self.params, torch._foreach_mul(self.momentum, rate.float() / momentum_sum))
        return {"grad_norm": grad_norm.norm(), "learning_rate": rate}


class Agent(nn.Module):
    """All networks and their optimizers: what is trained and what acts."""

    def __init__(self, args, spaces, action_space, device="cpu"):
        super().__init__()
        self.args, self.spaces, self.device = args, spaces, torch.device(device)
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.action_dim = int(action_space.n) if self.discrete else action_space.shape[0]
        self.world_model = WorldModel(args, spaces, self.action_dim)
        self.behaviour = Behaviour(args, self.action_dim, self.discrete)
        self.apply(initialise).to(device)
        nn.init.zeros_(self.world_model.reward_head[-1].weight)
        nn.init.zeros_(self.behaviour.critic[-1].weight)
        torch._foreach_mul_([output.weight.data for output in self.behaviour.actor.outputs], 0.01)
        self.behaviour.slow_critic.load_state_dict(self.behaviour.critic.state_dict())
        self.optimizer = LaProp(self.parameters(), args)
        if args.compile:  # but a decoder whose first map is one pixel would fail on a GPU: PyTorch issue 171622
            model, rssm, actor = self.world_model, self.world_model.rssm, self.behaviour.actor
            more = [model.encoder.forward] + ([model.decoder.forward] if args.image_size > 16 else [])
            for method in (rssm.obs_step, rssm.obs_steps, rssm.img_step, actor.sample, actor.layers.forward, *more):
                setattr(method.__self__, method.__name__, torch.compile(method, dynamic=False))
        self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=args.amp)

    def layout(self):
        """What the replay holds of each step, as a NumPy type."""
        fields = [(key, space.dtype, space.shape) for key, space in self.spaces.items()] + [(key, "?") for key in FLAGS]
        fields += [("deter", "f4", (self.args.deter,)), ("stoch", "i2", (self.args.stoch,))]
        return np.dtype([*fields, ("reward", "f4"), ("action", "f4", (self.action_dim,))])

    def initial(self, num_envs):
        """What acting carries from step to step, at the start: deter, stoch, action (num_envs, A)."""
        return *self.world_model.rssm.initial(num_envs), torch.zeros(num_envs, self.action_dim, device=self.device)

    @torch.no_grad()
    def act(self, obs, carry):
        """Observations (num_envs, ...) with is_first, what it returned last -> deter, stoch, a sample of the action."""
        deter, stoch, action = carry
        with self.autocast():
            embed = self.world_model.encoder(obs)
            (deter, stoch), _ = self.world_model.rssm.obs_step((deter, stoch), action, embed, obs["is_first"])
            return deter, stoch, self.policy(deter, stoch)

    def policy(self, deter, stoch):
        """A sample of the actor's action in a state: (num_envs, A)."""
        return self.behaviour.actor.sample(feature(deter, stoch))

    def env_action(self, action):
        """Actions (num_envs, A) -> what the environments take: (num_envs,) or (num_envs, A)."""
        return (action.argmax(-1) if self.discrete else action.clamp(-1, 1)).cpu().numpy()

    def start(self, data):
        """The state before a sequence, from the latents that the replay holds."""
        return data["deter"], F.one_hot(data["stoch"].long(), self.args.classes).float()

    def update(self, data):
        """One gradient step on a batch from the replay -> the new latents, metrics by key; never waits for the GPU."""
        args = self.args
        with self.autocast():
            losses, deter, stoch, feat, stats = self.world_model.loss(data, self.start(data))
            more, more_stats = self.behaviour.loss(self.world_model, data, deter, stoch, feat)
        losses = {name: loss.mean() for name, loss in (losses | more).items()}
        scales = dict(dyn_loss=args.dyn_scale, rep_loss=args.rep_scale, replay_critic_loss=args.replay_critic_scale)
        total = sum(scales.get(name, 1.0) * loss for name, loss in losses.items())
        # in one layout, for NCCL and so that the optimizer's operations run as one kernel each
        grads = [grad.contiguous() for grad in torch.autograd.grad(total, self.optimizer.params)]
        if dist.is_initialized():
            for grad in grads:
                dist.all_reduce(grad.div_(dist.get_world_size()))
        stats |= more_stats | self.optimizer.step(grads)
        slow, fast = self.behaviour.slow_critic.parameters(), self.behaviour.critic.parameters()
        with torch.no_grad():
            torch._foreach_lerp_(list(slow), list(fast), args.slow_critic_rate)
        metrics = {f"losses/{k}": v for k, v in losses.items()} | {f"stats/{k}": v for k, v in stats.items()}
        latents = {"deter": deter.detach(), "stoch": stoch.detach().argmax(-1).to(torch.int16)}
        return latents, {key: value.detach().float() for key, value in metrics.items()}

    def optimizer_state(self):
        """All that the optimizer depends on besides parameters and gradients, as a list of tensors."""
        return [*self.optimizer.square, *self.optimizer.momentum, self.optimizer.updates]


class Graph:
    """A function of tensors as a CUDA graph: three plain calls, which initialise and compile what they need, then it is
    captured and from then on replayed. The next call overwrites the outputs. On a CPU it is the function itself."""

    def __init__(self, function, device):
        self.function, self.graph, self.plain = function, None, 3 if device.type == "cuda" else math.inf

    def __call__(self, *inputs):
        if self.plain > 0:
            self.plain -= 1
            return self.function(*tree_map(torch.clone, inputs))  # clones have the layout that is captured
        if not self.graph:
            self.inputs, self.graph = tree_map(torch.clone, inputs), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.function(*self.inputs)
        tree_map(lambda mine, new: mine.copy_(new, non_blocking=True), self.inputs, inputs)
        self.graph.replay()
        return self.outputs


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


@torch.no_grad()
def open_loop(agent, data, context=5):
    """Video (T, 3·H, B·W, 3): truth, model, error; the model sees `context` steps (barred), then only the actions."""
    model, action, T = agent.world_model, data["action"], data["action"].shape[1]
    seen = [x[:, :context] for x in (model.encoder(data), action, data["is_first"])]
    deter, stoch, _ = model.rssm.observe(*seen, agent.start(data))
    rest = iter(action[:, context:].unbind(1))
    dream, _ = model.rssm.imagine((deter[:, -1], stoch[:, -1]), lambda _: next(rest), T - context)
    decoded = model.decode(torch.cat([feature(deter, stoch), dream[:, 1:]], 1))
    truth, dream = [picture({key: obs[key].cpu().numpy() for key in decoded}) for obs in (data, decoded)]
    error = ((dream.astype(np.int16) - truth + 255) // 2).astype(np.uint8)
    dream[:, :context, :2] = (60, 180, 75)
    video = np.concatenate([truth, dream, error], 2)  # (B, T, 3·H, W, 3)
    return np.concatenate(video, 2)  # side by side


# === Run ==============================================================================================================


def setup(args):
    """Device and numerical settings; joins the other processes of `torchrun`."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    cuda = args.cuda and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if args.num_envs % world or args.batch_size % world:
        sys.exit(f"--num-envs {args.num_envs} and --batch-size {args.batch_size} must be multiples of {world}")
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=9))  # while the first evaluates
        atexit.register(dist.destroy_process_group)  # or a process may abort where it should exit
        sys.stdout = sys.stdout if dist.get_rank() == 0 else open(os.devnull, "w")  # the first prints
    if cuda:
        torch.cuda.set_device(device)
    elif sys.platform == "linux":  # glibc is to keep freed memory, or page faults cost an eighth of an update
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
        torch._foreach_copy_(agent.optimizer_state(), state.get("optimizer", agent.optimizer_state()))
        return state
    except Exception as error:
        sys.exit(f"{run}/checkpoint.pt is missing, not whole, of other sizes or another version: {repr(error)[:99]}")


def load_run(args, run):
    """The agent of a run and one of its environments."""
    env, args.compile = make_envs(args, 1).envs[0], False  # compiling would take longer than it saves
    agent = Agent(args, env.observation_space.spaces, env.action_space, setup(args))
    load(run, agent)
    return agent, env


def evaluate(agent, args, seed, folder, stop=()):
    """Scores of `eval_episodes` episodes, one in each of as many environments; --capture-video: an mp4 in `folder`."""
    envs = make_envs(args, args.eval_episodes, folder if args.capture_video else None)
    obs, _ = envs.reset(seed=np.random.SeedSequence(seed).generate_state(envs.num_envs).tolist())
    carry, running, scores = agent.initial(envs.num_envs), np.ones(envs.num_envs, bool), {"episodic_return": 0.0}
    for _ in range(0, 108_000, args.action_repeat):  # frames, if an episode does not end
        if stop or not running.any():
            break
        carry = agent.act(to_tensors(obs | {"is_first": ~running}, agent.device), carry)
        obs, reward, terminated, truncated, info = envs.step(agent.env_action(carry[2]))
        scores["episodic_return"] += np.where(running, reward, 0)
        if "success" in info.get("log", {}):
            scores["success"] = np.where(running, info["log"]["success"], scores.get("success", 0.0))
        running &= ~(terminated | truncated)
    envs.close()
    return {} if stop else scores


def train(args):
    """Trains until `total_timesteps` frames, from the start or from a checkpoint."""
    device = setup(args)
    if args.track and not find_spec("wandb"):
        sys.exit("--track needs Weights & Biases: pip install wandb")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    envs = make_envs(args, args.num_envs // world)
    overlap = isinstance(envs, gym.vector.AsyncVectorEnv)
    agent = Agent(args, envs.single_observation_space.spaces, envs.single_action_space, device)
    name = [f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{time.time_ns() // 1000}"]
    if world > 1:
        dist.broadcast_object_list(name)
    saved = load(args.resume, agent) if args.resume else {}
    run = (args.resume or f"{args.run_dir}/{name[0]}") + (f"/{rank}" if rank else "")  # each has a replay and a log
    frame, updates, budget = saved.get("progress", (0, 0, 1.0))
    records = int(1.02 * args.total_timesteps / args.action_repeat) + args.num_envs  # those of resets among them
    steps = envs.num_envs, min(args.replay_size, records) // args.num_envs, args.batch_length
    replay = Replay(f"{run}/replay/steps", agent.layout(), *steps, saved.get("replay"))
    Path(f"{run}/args.tmp").write_text(json.dumps(asdict(args) | {"script": Args.exp_name}, indent=1))
    os.replace(f"{run}/args.tmp", f"{run}/args.json")
    if args.track and rank == 0:
        import wandb

        names = dict(project=args.wandb_project_name, entity=args.wandb_entity, name=os.path.basename(run))
        wandb.init(**names, config=vars(args), sync_tensorboard=True)
    writer = SummaryWriter(run, purge_step=frame + 1, flush_secs=1)
    print(f"{run}: {sum(p.numel() for p in agent.parameters() if p.requires_grad):,} parameters, {device}")

    stop = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the first ends in good order, the next at once
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, lambda number, _: os._exit(128 + number) if stop else stop.append(number))
    act, update = Graph(agent.act, device), Graph(agent.update, device)
    rng = np.random.default_rng([0, args.seed, frame, rank])
    torch.manual_seed(int(rng.integers(2**63)))
    obs, _ = envs.reset(seed=rng.integers(2**32, size=envs.num_envs).tolist())
    zeros, carry, data, ahead, late = np.zeros(envs.num_envs, bool), agent.initial(envs.num_envs), None, None, []
    record = obs | dict(reward=np.zeros(envs.num_envs), is_first=~zeros, is_last=zeros, is_terminal=zeros)
    bar = tqdm(total=args.total_timesteps, initial=frame, unit="frames", disable=rank > 0, smoothing=0.05)
    totals, counted, ending = 0.0, updates, False
    while frame < args.total_timesteps and not ending:
        # Act, and add the step to the replay
        led_here = carry[2].cpu()  # before act overwrites it
        carry = act(to_tensors(record, device), carry)
        replay.add(record | dict(action=led_here, deter=carry[0].cpu(), stoch=carry[1].argmax(-1).cpu()))
        action = agent.env_action(carry[2])
        if overlap:  # the environments run while the model learns
            envs.step_async(action)

        # Learn: one update when the replay is full or has as many sequences as a batch has steps, then by `train_ratio`
        ready = replay.count >= replay.capacity or len(replay) * world >= args.batch_size * args.batch_length
        while ready and budget >= 1 and not (stop and world == 1):
            data, index = ahead or replay.sample(args.batch_size // world, rng, device)
            latents, metrics = update(data)
            for key, value, place in late:  # the latents of the update before, as in the authors' code
                replay.steps[key][place] = value
            late = [(key, value.to("cpu", non_blocking=True), index) for key, value in latents.items()]
            if device.type == "cuda":  # the next batch is read while the GPU works
                ahead = replay.sample(args.batch_size // world, rng, device)
            values = torch.stack(list(metrics.values())).cpu().numpy()
            bad = [key for key, value in zip(metrics, values, strict=True) if not np.isfinite(value)]
            if bad:
                sys.exit(f"\nnot finite in update {updates + 1}, frame {frame}: {bad}; the last checkpoint is kept")
            totals, updates, budget = totals + values, updates + 1, budget - 1
        budget += ready * args.num_envs * args.train_ratio / (args.batch_size * args.batch_length)

        # Step: the first step after an episode's last one resets, and is no frame
        obs, reward, ended, cut, info = envs.step_wait() if overlap else envs.step(action)
        record = obs | dict(reward=reward, is_first=record["is_last"], is_last=ended | cut, is_terminal=ended)
        bad = [key for key, value in record.items() if not np.isfinite(value).all()]
        if bad:
            sys.exit(f"\nnot finite, from an environment, frame {frame}: {bad}; the last checkpoint is kept")
        taken, ending = int((~record["is_first"]).sum()), bool(stop)
        if world > 1:  # all processes count the same frames and end together
            both = torch.tensor([taken, ending], device=device)
            dist.all_reduce(both)
            taken, ending = both.tolist()
        before, frame = frame, frame + taken * args.action_repeat
        save, log, score = (n and frame // n > before // n for n in (args.save_every, args.log_every, args.eval_every))

        # Save: the checkpoint is there whole or not at all; the replay that belongs to it lies beside it
        save = save or score or ending or frame >= args.total_timesteps
        if save:
            replay.steps.flush()
        if save and rank == 0:
            state = dict(agent=agent.state_dict(), optimizer=agent.optimizer_state(), replay=replay.state_dict())
            with open(f"{run}/checkpoint.tmp", "wb") as file:
                torch.save(state | {"progress": (frame, updates, budget)}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{run}/checkpoint.tmp", f"{run}/checkpoint.pt")

        # Log
        bar.update(frame - before)
        for env in np.flatnonzero(record["is_last"]):  # info["log"]["_key"] says which environments gave `key`
            scores = {key: x[env] for key, x in info["log"].items() if key[0] != "_" and info["log"]["_" + key][env]}
            scores["episodic_length"] = info["episode"]["l"][env] * args.action_repeat
            scores["episodic_return"] = info["episode"]["r"][env]
            for key, value in scores.items():
                writer.add_scalar(f"charts/{key}", value, frame)
            bar.set_postfix_str(f"return {scores['episodic_return']:.1f}, updates {updates}", refresh=False)
        if log and updates > counted and rank == 0:
            row = dict(zip(metrics, totals / (updates - counted), strict=True)) | {"charts/updates": updates}
            row["charts/SPS"] = (frame - bar.initial) / bar.format_dict["elapsed"]
            for key, value in row.items():
                writer.add_scalar(key, value, frame)
            totals, counted = 0.0, updates

        # Evaluate
        if score and rank == 0:
            with torch.compiler.set_stance("force_eager"):  # many shapes, once each
                if data and args.batch_length > 5:  # of which it sees 5
                    video = open_loop(agent, {key: value[:4] for key, value in data.items()})
                    writer.add_video("video/open_loop", video[None], frame, fps=15, dataformats="NTHWC")
                scores = evaluate(agent, args, [1, args.seed, frame], f"{run}/videos/{frame}", stop)
            for key, value in scores.items():
                writer.add_scalar(f"eval/{key}", value.mean(), frame)
                writer.add_scalar(f"eval/{key}_std", value.std(), frame)
    envs.close()
    bar.close()
    writer.close()
    print(f"{'stopped' if stop or ending else 'done'} at frame {frame} after {updates} updates, saved: --resume {run}")
    if stop:
        sys.exit(128 + stop[0])


def main(argv=None):
    args = parse_args(argv)
    if args.evaluate:
        agent, _ = load_run(args, args.evaluate)
        returns = evaluate(agent, args, [1, args.seed], f"{args.evaluate}/videos")["episodic_return"]
        print(f"{args.env_id}: {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes")
    else:
        train(args)


if __name__ == "__main__":
    main()
