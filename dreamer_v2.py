"""DreamerV2: Mastering Atari with Discrete World Models (Hafner et al. 2020), arXiv:2010.02193v4.

Authors' code: github.com/danijar/dreamerv2 at 07d906e. Where paper and code disagree, the line concerned says so.

    python dreamer_v2.py --env-id atari-pong                        # train, from pixels
    python dreamer_v2.py --env-id dmc-walker-walk --obs state       # train on a CPU, from joint angles
    python dreamer_v2.py --resume runs/<run>                        # continue; --evaluate runs/<run> scores it

A world model (encoder, recurrent state-space model, decoder, reward and continue heads) learns from replayed sequences,
an actor and a critic from sequences that it imagines. Hyper-parameters differ by suite: PRESETS.

What changed since dreamer_v1.py:
 [C1] 32 categorical variables of 32 classes with straight-through gradients, not 30 Gaussian ones; these are an option:
      kl_divergence, gaussian, RSSM, feature, Decoder, WorldModel, Behaviour, stoch, classes.
 [C2] KL balancing: 0.8 of it moves the prior, 0.2 the posterior: balance_kl, WorldModel.loss, kl_balance, free_nats.
 [C3] GRU with layer normalisation, update gate biased by -1; is_first resets the action: RSSM, initialise, Agent.act.
 [C4] ELU and 48 channels in convolutions, 4 layers in all heads: Encoder, Decoder, WorldModel, Behaviour, depth, units.
 [C5] Imagination starts from all states, by the updated model, and keeps the start, whose end is known from the data:
      RSSM.imagine, lambda_return, Behaviour, Agent.update, open_loop.
 [C6] Actor gradient by REINFORCE (discrete actions), through the dynamics (continuous) or both; entropy bonus: Actor,
      Behaviour, actor_gradient, actor_gradient_mix, entropy_scale, behaviour_from.
 [C7] Returns from a slow critic, which is the baseline too: Behaviour, Agent, slow_critic_every.
 [C8] Truncated normal, undisturbed actions: TruncatedNormal, Tanh, Actor, Agent, action_noise, random_actions*.
 [C9] Adam with weight decay, larger epsilon, other rates: Adam, epsilon, model_rate, critic_rate, weight_decay.
[C10] An update every few steps, not 100 at once; smaller batches; prefill by suite, which can cut an episode: train,
      train_every, train_steps, batch_size, prefill, pretrain.
[C11] The last sequence of an episode is drawn more often; 2M steps are kept: Replay, prioritise_ends, replay_size.
[C12] Made for games, the control suite is a preset: tanh_rewards, predict_continue, continue_scale, deter, hidden.

Not copied from the authors' code: the episode cut by the prefill's end joined with the next; initial weights of its own
for the slow critic; an update to create variables; some games' fewer actions (paper: 18); scalars left out.

Shapes: B batch, T time, H imagination horizon, N = B*T starts of imagination, A action, D deter, S stoch variables,
K classes of each, E embed, F = D + S*K feat, P = H + 1, L = H - 1. Arrays are (B, T, ...). Gaussian variables: K = 1.
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
import time
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Literal

import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
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

    # DreamerV2. Defaults: the authors' configs.yaml, unless said otherwise
    deter: int = 1024  # units of the recurrent state
    hidden: int = 1024  # units of the layers inside the RSSM
    classes: int = 32  # classes of each stochastic variable; 1 for Gaussian variables
    depth: int = 48  # channels of the convolutions, times 1, 2, 4, 8
    units: int = 400  # units of all other layers
    stoch: int = 32  # variables of the stochastic state
    tanh_rewards: bool = True  # learn from tanh of the rewards
    representation_from: Literal["all", "image", "reward"] = "all"  # what shapes it: all heads, the decoder, the others
    kl_scale: float = 1.0  # of the KL loss
    kl_balance: float = 0.8  # share of the KL loss that moves the prior to the posterior; 0.5: no balancing
    free_nats: float = 0.0  # nats below which the average KL gives no gradient
    predict_continue: bool = True  # learn the end of episodes; else imagined ones have none
    continue_scale: float = 1.0  # of the continue loss
    behaviour_from: Literal["imagination", "replay"] = "imagination"  # what actor and critic learn from
    actor_gradient: Literal["auto", "reinforce", "dynamics", "both"] = "auto"  # auto: by the actions; replay: reinforce
    actor_gradient_mix: float = 0.1  # share of dynamics in both
    critic: bool = True  # returns go on after the horizon by the critic's value; without, they end there
    slow_critic_every: int = 100  # updates between copies of the critic to the slow critic; 1: no slow critic
    entropy_scale: float = 2e-3  # of the actor's entropy bonus
    imagination_horizon: int = 15  # steps imagined from each state
    discount: float = 0.99  # of rewards, per step
    lmbda: float = 0.95  # mixing of n-step returns
    model_rate: float = 1e-4  # learning rate of the world model
    actor_rate: float = 8e-5  # learning rate of the actor
    critic_rate: float = 2e-4  # learning rate of the critic
    epsilon: float = 1e-5  # Adam's, added to the root of the mean square before its correction
    weight_decay: float = 1e-6  # share by which all parameters shrink in an update, whatever the learning rate
    clip: float = 100.0  # largest norm of the gradient, of each of the three optimizers
    batch_size: int = 16  # sequences of a batch; paper: 50
    batch_length: int = 50  # steps of a sequence
    train_every: int = 5  # steps of the agent, in all environments together, for each update
    prefill: int = 10_000  # steps with random actions at the start, and until an episode can be learned from
    pretrain: int = 1  # updates at the end of the prefill
    prioritise_ends: bool = True  # draw the last sequence of an episode more often
    replay_size: int = 2_000_000  # steps that the replay holds


ATARI = dict(action_repeat=4, deter=600, hidden=600, kl_scale=0.1, continue_scale=5.0, entropy_scale=1e-3)
ATARI |= dict(model_rate=2e-4, actor_rate=4e-5, critic_rate=1e-4, discount=0.999)  # discount of the paper: 0.995
PRESETS = {  # by the first word of --env-id
    "dmc": dict(obs="pixels", action_repeat=2, total_timesteps=2_000_000, eval_every=20_000, prefill=1000, pretrain=100)
    | dict(deter=200, hidden=200, tanh_rewards=False, free_nats=1.0, predict_continue=False, prioritise_ends=False)
    | dict(model_rate=3e-4, critic_rate=8e-5, entropy_scale=1e-4),
    "atari": dict(total_timesteps=200_000_000, eval_every=1_000_000, save_every=250_000, prefill=50_000, **ATARI)
    | dict(train_every=16),  # paper: 4
    "atari100k": dict(total_timesteps=400_000, **ATARI),  # not the authors'
}


def parse_args(argv=None):
    """Command line -> Args: defaults, then the suite's preset or what the run was started with, then the flags."""
    text = "\n".join([__doc__, "Presets by suite:", *(f"    {suite}: {preset}" for suite, preset in PRESETS.items())])
    args = tyro.cli(Args, args=argv, description=text)
    suite = re.split("[-:/]", args.env_id)[0].rpartition(".")[2].lower()
    given, run = PRESETS.get(suite, {}), args.evaluate if args.resume is None else args.resume
    if run is not None:
        path = Path(run, "args.json")
        given = json.loads(path.read_text() if path.exists() else "{}") | dict(resume=None, evaluate=None)
        if given.pop("script", None) != Args.exp_name or given.keys() - vars(Args()).keys():
            sys.exit(f"{run} is no run of {Args.exp_name}.py, or of another version")
    given = given | ({} if args.cuda else dict(compile=False, amp=False))  # flags can still ask for them
    args = tyro.cli(Args, args=argv, default=Args(**given | dict(env_kwargs={})), description=text)
    args.env_kwargs = args.env_kwargs or given.get("env_kwargs", {})  # as a default, tyro would make a flag of each
    for name, value in vars(args).items():
        least = 0 if type(value) is float or name in ("seed", "eval_every", "prefill", "pretrain") else 1
        least = 2 if name in ("imagination_horizon", "batch_length") else least
        if type(value) in (int, float) and not least <= value < math.inf:
            sys.exit(f"--{name.replace('_', '-')} {value}: the least is {least}")
    if args.image_size != 64:
        sys.exit(f"--image-size {args.image_size}: the convolutions are made for 64")
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
    Step t holds observation t, the action that led to it, its reward, its flags, and t. Only complete episodes are
    drawn from. `saved`: state of a run that goes on. Exits if the disk is too small or the file does not fit."""

    def __init__(self, path, dtype, num_envs, capacity, length, saved=None, ends=False):
        self.num_envs, self.length, self.capacity, self.count, self.ends = num_envs, length, capacity, 0, ends
        self.begun, self.episodes = np.zeros(num_envs, int), np.zeros((0, 3), int)  # first step, steps, environment
        self.layout, size = (num_envs, dtype.descr), num_envs * dtype.itemsize
        held = os.path.getsize(path) if os.path.exists(path) else 0
        if saved:
            if saved.get("layout") != self.layout or held < saved["capacity"] * size:
                sys.exit(f"{path} is not whole, or not of these observations, environments and sizes: {dtype.names}")
            self.count, self.episodes = saved["count"], np.array(saved["episodes"], int).reshape(-1, 3)
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
        begun, lengths, env = self.episodes.T  # without those overwritten after the checkpoint, or too short by now
        self.episodes = self.episodes[(self.steps["count"][begun % self.capacity, env] == begun) & (lengths >= length)]

    def add(self, step):
        """Appends one step of every environment: key -> array (envs, ...)."""
        for key in step:
            self.steps[key][self.count % self.capacity] = step[key]
        self.steps["count"][self.count % self.capacity] = self.count
        self.begun[step["is_first"]] = self.count
        self.count += 1
        lengths = self.count - self.begun
        whole = step["is_last"] & (lengths > self.length)  # the authors' code: the reset does not count
        ended = np.stack([self.begun, lengths, np.arange(self.num_envs)], 1)[whole]
        episodes = np.concatenate([self.episodes, ended])
        self.episodes = episodes[episodes[:, 0] >= self.count - self.capacity]  # of which nothing is overwritten

    def __len__(self):
        """Number of sequences that can be sampled."""
        return int((self.episodes[:, 1] - self.length + 1).sum())

    def sample(self, batch_size, rng, device):
        """Sequences, key -> tensor (B, T, ...), each as if it were an episode's start.
        Episodes are drawn uniformly, then steps where a sequence can begin; with `ends`, the last step more often."""
        begun, lengths, env = self.episodes[rng.integers(len(self.episodes), size=batch_size)].T
        last = lengths - self.length
        begun = begun + np.minimum(rng.integers(last + 1 + self.ends * self.length), last)
        rows = (begun[:, None] + np.arange(self.length)) % self.capacity
        data = {key: self.steps[key][rows, env[:, None]] for key in self.steps.dtype.names}
        data["is_first"][:] = np.arange(self.length) == 0
        return to_tensors(data, device)

    def state_dict(self):
        return dict(capacity=self.capacity, layout=self.layout, count=self.count, episodes=self.episodes.tolist())


def to_tensors(values, device):
    """Arrays by key -> tensors on the device."""
    tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in values.items()}
    if device.type == "cuda":
        tensors = {key: tensor.pin_memory().to(device, non_blocking=True) for key, tensor in tensors.items()}
    return tensors


# === Maths ============================================================================================================


def gaussian(raw):
    """(..., 2 S) -> mean and standard deviation (..., S, 2)."""
    mean, std = raw.chunk(2, -1)
    return torch.stack([mean, 2 * torch.sigmoid(std / 2) + 0.1], -1)


def kl_gaussian(p, q):
    """KL of Gaussians, mean and standard deviation (..., S, 2), summed over the variables: (...)."""
    p, q = (Normal(*x.unbind(-1), validate_args=False) for x in (p, q))  # the checks wait for the GPU
    return torch.distributions.kl_divergence(p, q).sum(-1)


def normal_loss(mean, target):
    """Negative log-likelihood under a normal of unit variance."""
    return ((mean - target).square() + math.log(2 * math.pi)) / 2


def sample_onehot(probs):
    """Probabilities (..., K) -> a one-hot sample, with the gradient of the probabilities (straight-through)."""
    index = (probs.detach()[..., :-1].cumsum(-1) <= torch.rand_like(probs[..., :1])).sum(-1)
    return F.one_hot(index, probs.shape[-1]) + (probs - probs.detach())


def kl_divergence(p, q):
    """KL of categorical logits (..., S, K), summed over the variables: (...)."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum((-2, -1))


def balance_kl(kl, post, prior, balance, free_nats):
    """The KL loss with its gradient divided between prior and posterior (Algorithm 2); balance 0.5 is the plain KL.
    Free nats are those of the batch average; in the authors' code, for the plain KL, those of each step."""
    if balance == 0.5:
        return kl(post, prior).clamp(min=free_nats).mean()
    dyn_loss, rep_loss = kl(post.detach(), prior).mean(), kl(post, prior.detach()).mean()
    return balance * dyn_loss.clamp(min=free_nats) + (1 - balance) * rep_loss.clamp(min=free_nats)


class TruncatedNormal(Normal):
    """Normal that is cut at -1 and 1."""

    def __init__(self, loc, scale):
        super().__init__(loc, scale)
        self.mass = self.cdf(1) - self.cdf(-1)

    def rsample(self, sample_shape=()):
        """Its gradient is that of loc + scale · z for a constant z, as in the authors' code; the exact one, of the
        inverse distribution function, is several times smaller."""
        with torch.no_grad():
            action = self.icdf((self.cdf(-1) + torch.rand_like(self.loc) * self.mass).clamp(2**-24, 1 - 2**-24))
            z = (action.clamp(1e-6 - 1, 1 - 1e-6) - self.loc) / self.scale
        return self.loc + self.scale * z

    def log_prob(self, action):
        return super().log_prob(action) - self.mass.log()

    def entropy(self):
        low, high = ((bound - self.loc) * Normal.log_prob(self, bound).exp() for bound in (-1, 1))
        return super().entropy() + self.mass.log() + (low - high) / (2 * self.mass)


# Time table of what the agent has. Replayed, action[t] led to state t; imagined, action[t] is taken in state t:
#
#   replayed  s_0 -- a_1 --> s_1 -- a_2 --> s_2 ... s_T-1       T states
#   imagined  s_0 -- a_0 --> s_1 -- a_1 --> s_2 ... s_H         H + 1 states, the first one replayed
#   reward    r_0            r_1            r_2 ... r_H         predicted in state t
#   continue  c_0            c_1            c_2 ... c_H         probability, times the discount, that t is not the end
#   return    R_0            R_1            R_2 ... R_H-1       of state t and what follows it: starts with r_0, at R_0


def lambda_return(reward, cont, value, lmbda):
    """λ-returns: (N, T) each -> (N, T - 1); Eq. 4 (arXiv:2010.02193v4).
    R_t = r_t + c_t · ((1 - λ) v_t+1 + λ R_t+1), R_T-1 = v_T-1."""
    returns = [value[:, -1]]
    for t in reversed(range(value.shape[1] - 1)):
        returns.append(reward[:, t] + cont[:, t] * ((1 - lmbda) * value[:, t + 1] + lmbda * returns[-1]))
    return torch.stack(returns[1:][::-1], 1)


# === Networks =========================================================================================================


def initialise(module):
    """Weights uniform, with limits by fan-in and fan-out (Glorot), biases zero."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Output(nn.Linear):
    """The last layer of a head: in float32, also where the networks are in bfloat16."""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Deconv(nn.ConvTranspose2d):
    """Transposed convolution of images (B, C, H, W)."""

    def forward(self, x):
        if x.shape[2] == 1:  # of a 1×1 image it is a matrix product, which takes a CPU a sixth of the time
            return (torch.einsum("bihw,iokl->bklo", x, self.weight) + self.bias).permute(0, 3, 1, 2)
        return super().forward(x)


class MLP(nn.Sequential):
    """`count` times Linear and ELU and, if `out` is given, an output: (..., inp) -> (..., units or out)."""

    def __init__(self, inp, units, count, out=None):
        layers = [nn.Sequential(nn.Linear(*x), nn.ELU()) for x in pairwise([inp] + [units] * count)]
        super().__init__(*layers, *([Output(units, out)] if out else []))


class Encoder(nn.Module):
    """Observations (B or B, T, ...) -> embed (..., E): vectors through an MLP, images through convolutions."""

    def __init__(self, spaces, args):
        super().__init__()
        self.vectors = {key: space.shape[0] for key, space in sorted(spaces.items()) if space.dtype != np.uint8}
        self.images = {key: space.shape[-1] for key, space in sorted(spaces.items()) if space.dtype == np.uint8}
        self.embed_dim = (args.units if self.vectors else 0) + (32 * args.depth if self.images else 0)
        if self.vectors:
            self.layers = MLP(sum(self.vectors.values()), args.units, 4)
        if self.images:
            depths = [sum(self.images.values())] + [args.depth * m for m in (1, 2, 4, 8)]
            self.convs = nn.Sequential(*[nn.Sequential(nn.Conv2d(*x, 4, 2), nn.ELU()) for x in pairwise(depths)])

    def forward(self, obs):
        embed = []
        if self.vectors:
            embed.append(self.layers(torch.cat([obs[key] for key in self.vectors], -1)))
        if self.images:
            image = torch.cat([obs[key] for key in self.images], -1)
            x = self.convs(image.flatten(0, -4).permute(0, 3, 1, 2) / 255 - 0.5)
            embed.append(x.permute(0, 2, 3, 1).reshape(*image.shape[:-3], -1))
        return torch.cat(embed, -1)


class Decoder(nn.Module):
    """Features (B, T, F) -> key -> means (B, T, ...): vectors, images in [-0.5, 0.5]."""

    def __init__(self, encoder, args):
        super().__init__()
        self.vectors, self.images = encoder.vectors, encoder.images
        feat_dim = args.deter + args.stoch * args.classes
        if self.vectors:
            self.layers = MLP(feat_dim, args.units, 4)
            self.heads = nn.ModuleList(Output(args.units, size) for size in self.vectors.values())
        if self.images:
            depth = args.depth
            self.map = nn.Linear(feat_dim, 32 * depth)
            shapes = (32 * depth, 4 * depth, 5), (4 * depth, 2 * depth, 5), (2 * depth, depth, 6)  # in, out, kernel
            convs = [nn.Sequential(Deconv(*shape, 2), nn.ELU()) for shape in shapes]
            self.convs = nn.Sequential(*convs, Deconv(depth, sum(self.images.values()), 6, 2))

    def forward(self, feat):
        means = {}
        if self.vectors:
            x = self.layers(feat)
            means |= {key: head(x) for key, head in zip(self.vectors, self.heads, strict=True)}
        if self.images:
            image = self.convs(self.map(feat.flatten(0, 1)).unflatten(-1, (-1, 1, 1)))
            image = image.float().permute(0, 2, 3, 1).unflatten(0, feat.shape[:2])
            means |= zip(self.images, image.split([*self.images.values()], -1), strict=True)
        return means


# === World model ======================================================================================================


class RSSM(nn.Module):
    """Recurrent state-space model, Eq. 1 (arXiv:2010.02193v4): a state is deter (B, D) and stoch (B, S, K)."""

    def __init__(self, args, embed_dim, action_dim):
        super().__init__()
        self.args, stoch_dim = args, args.stoch * args.classes
        out_dim = 2 * args.stoch if args.classes == 1 else stoch_dim
        self.inputs = MLP(stoch_dim + action_dim, args.hidden, 1)
        self.gates = nn.Linear(args.hidden + args.deter, 3 * args.deter)
        self.gates_norm = nn.LayerNorm(3 * args.deter, eps=1e-3)
        self.post_net = MLP(args.deter + embed_dim, args.hidden, 1, out_dim)
        self.prior_net = MLP(args.deter, args.hidden, 1, out_dim)
        self.kl = kl_gaussian if args.classes == 1 else kl_divergence

    def initial(self, batch_size):
        """State of zeros: deter (B, D), stoch (B, S, K)."""
        zeros, args = self.post_net[-1].weight.new_zeros, self.args
        return zeros(batch_size, args.deter), zeros(batch_size, args.stoch, args.classes)

    def gru(self, deter, stoch, action):
        """GRU with layer normalisation, h_t = f(h_t-1, z_t-1, a_t-1): deter (B, D), ... -> next deter (B, D)."""
        x = self.inputs(torch.cat([stoch.flatten(1), action], -1))
        gates = self.gates(torch.cat([x, deter], -1)).float()
        reset, cand, update = self.gates_norm(gates).chunk(3, -1)
        reset = torch.sigmoid(reset)
        cand = torch.tanh(reset * cand)
        update = torch.sigmoid(update - 1)
        return update * cand + (1 - update) * deter

    def logit(self, x):
        """(..., S*K) -> logits (..., S, K); of Gaussian variables (..., 2 S) -> mean and deviation (..., S, 2)."""
        return gaussian(x) if self.args.classes == 1 else x.unflatten(-1, (self.args.stoch, self.args.classes))

    def sample(self, logit):
        """Logits (..., S, K) or mean and deviation (..., S, 2) -> stoch (..., S, K)."""
        if self.args.classes == 1:
            return logit[..., :1] + logit[..., 1:] * torch.randn_like(logit[..., 1:])
        return sample_onehot(logit.softmax(-1))

    def entropy(self, logit):
        """Entropy of a distribution, summed over the variables: (...)."""
        kind = Normal(*logit.unbind(-1)) if self.args.classes == 1 else OneHotCategorical(logits=logit)
        return kind.entropy().sum(-1)

    def obs_step(self, state, action, embed, is_first):
        """One step with an observation; where is_first (B,), all before is forgotten -> state, posterior (B, S, K)."""
        deter, stoch = state
        mask = 1 - is_first.float().unsqueeze(-1)
        deter = self.gru(deter * mask, stoch * mask.unsqueeze(-1), action * mask)
        post = self.logit(self.post_net(torch.cat([deter, embed], -1)))
        return (deter, self.sample(post)), post

    def img_step(self, state, action):
        """One step without: state, action (B, A) -> state."""
        deter = self.gru(*state, action)
        return deter, self.sample(self.logit(self.prior_net(deter)))

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
        self.reward_head = MLP(feat_dim, args.units, 4, 1)
        self.continue_head = MLP(feat_dim, args.units, 4, 1) if args.predict_continue else None

    def loss(self, data, start):
        """Eq. 2 (arXiv:2010.02193v4) -> losses (B, T) by name, that of the KL an average; deter, stoch, feat; stats.
        data: observations (B, T, ...), action, reward, is_first, is_last, is_terminal."""
        args = self.args
        embed = self.encoder(data)  # (B, T, E)
        deter, stoch, post = self.rssm.observe(embed, data["action"], data["is_first"], start)
        prior = self.rssm.logit(self.rssm.prior_net(deter))  # (B, T, S, K)
        feat = feature(deter, stoch)  # (B, T, F)
        losses = {}
        image_feat = feat.detach() if args.representation_from == "reward" else feat  # (B, T, F)
        for key, mean in self.decoder(image_feat).items():
            target = data[key] / 255 - 0.5 if key in self.decoder.images else data[key]
            losses[f"recon_loss_{key}"] = normal_loss(mean, target).flatten(2).sum(-1)  # (B, T)
        head_feat = feat.detach() if args.representation_from == "image" else feat  # (B, T, F)
        losses["reward_loss"] = normal_loss(self.reward(head_feat), data["reward"])  # (B, T)
        if args.predict_continue:
            target = (1 - data["is_terminal"].float()) * args.discount  # (B, T); paper: without the discount
            logit = self.continue_head(head_feat).squeeze(-1)  # (B, T)
            losses["continue_loss"] = F.binary_cross_entropy_with_logits(logit, target, reduction="none")  # (B, T)
        losses["kl_loss"] = balance_kl(self.rssm.kl, post, prior, args.kl_balance, args.free_nats)
        entropies = [self.rssm.entropy(logit).mean() for logit in (post, prior)]
        stats = dict(posterior_entropy=entropies[0], prior_entropy=entropies[1], kl=self.rssm.kl(post, prior).mean())
        return losses, deter, stoch, feat, stats

    def reward(self, feat):
        """(..., F) -> expected reward (...)."""
        return self.reward_head(feat).squeeze(-1)

    def cont(self, feat):
        """(..., F) -> probability, times the discount, that the episode goes on (...)."""
        if self.continue_head is None:
            return feat.new_full(feat.shape[:-1], self.args.discount)
        return self.continue_head(feat).squeeze(-1).sigmoid()

    def decode(self, feat):
        """(B, T, F) -> observations as the environment gives them, key -> (B, T, ...)."""
        means = self.decoder(feat).items()
        return {k: ((v + 0.5) * 255).clamp(0, 255).round().byte() if k in self.decoder.images else v for k, v in means}


# === Behaviour ========================================================================================================


class Actor(nn.Module):
    """Policy over one-hot actions (categorical) or actions in [-1, 1]^A (truncated normal)."""

    def __init__(self, args, feat_dim, action_dim, discrete):
        super().__init__()
        self.discrete = discrete
        Distribution.set_default_validate_args(False)  # checks that wait for the GPU
        self.layers = MLP(feat_dim, args.units, 4)
        self.outputs = nn.ModuleList(Output(args.units, action_dim) for _ in range(1 if discrete else 2))

    def forward(self, feat):
        """(..., F) -> distribution of actions (..., A)."""
        x = self.layers(feat)
        outputs = [output(x) for output in self.outputs]
        if self.discrete:
            return OneHotCategorical(logits=outputs[0])
        std = 2 * torch.sigmoid(outputs[1] / 2) + 0.1
        return Independent(TruncatedNormal(outputs[0].tanh(), std), 1)

    def sample(self, feat):
        """(..., F) -> action (..., A), drawn from the policy."""
        return sample_onehot(self(feat).probs) if self.discrete else self(feat).rsample()


class Behaviour(nn.Module):
    """Actor, critic and the critic's slow copy."""

    def __init__(self, args, action_dim, discrete):
        super().__init__()
        self.args, feat_dim = args, args.deter + args.stoch * args.classes
        self.actor = Actor(args, feat_dim, action_dim, discrete)
        self.critic = MLP(feat_dim, args.units, 4, 1)
        self.slow_critic = MLP(feat_dim, args.units, 4, 1).requires_grad_(False)
        gradient = "reinforce" if args.behaviour_from == "replay" else args.actor_gradient  # no dynamics in a replay
        automatic = "reinforce" if discrete else "dynamics"
        self.actor_gradient = automatic if gradient == "auto" else gradient

    def loss(self, world_model, data, deter, stoch, feat):
        """Eq. 4 to 6 (arXiv:2010.02193v4): losses of actor (N, L) and critic (N, H) by name; stats.
        data as for the world model; deter (B, T, D), stoch (B, T, S, K), feat (B, T, F)."""
        args, actor = self.args, self.actor
        going_on = (1 - data["is_terminal"].float()) * args.discount  # (B, T)
        with torch.set_grad_enabled(self.actor_gradient != "reinforce"):
            if args.behaviour_from == "replay":
                imag_feat, imag_action, reward, cont = feat.detach(), data["action"][:, 1:], data["reward"], going_on
            else:
                start = deter.detach().flatten(0, 1), stoch.detach().flatten(0, 1)
                policy = lambda feat: actor.sample(feat.detach())
                imag_feat, imag_action = world_model.rssm.imagine(start, policy, args.imagination_horizon)
                reward = world_model.reward(imag_feat)  # (N, P)
                cont = world_model.cont(imag_feat)  # (N, P)
                if args.predict_continue:
                    cont = torch.cat([going_on.view(-1, 1), cont[:, 1:]], 1)  # (N, P)
            slow_value = self.slow_critic(imag_feat).squeeze(-1) if args.critic else torch.zeros_like(reward)  # (N, P)
            lmbda = args.lmbda if args.critic else 1.0
            returns = lambda_return(reward, cont, slow_value, lmbda)  # (N, H)
        torch.clear_autocast_cache()  # which holds copies of the actor's weights that were made without gradient
        weight = F.pad(cont[:, :-1].detach(), (1, 0), value=1.0).cumprod(1)  # (N, P)
        # Eq. 6: the action at t earns what follows it: the return of t + 1, which starts with the reward of t + 1
        policy = actor(imag_feat[:, :-2].detach())
        entropy = policy.entropy()  # (N, L)
        advantage = (returns[:, 1:] - slow_value[:, :-2]).detach()  # (N, L)
        mix = {"reinforce": 0.0, "dynamics": 1.0, "both": args.actor_gradient_mix}[self.actor_gradient]  # paper: 1 - ρ
        # both: a continuous action has a gradient in log_prob too, as in the authors' code
        objective = mix * returns[:, 1:] + (1 - mix) * policy.log_prob(imag_action[:, :-1]) * advantage  # (N, L)
        losses = {"actor_loss": -weight[:, :-2] * (objective + args.entropy_scale * entropy)}
        value = self.critic(imag_feat[:, :-1].detach()).squeeze(-1)  # (N, H)
        losses["critic_loss"] = weight[:, :-1] * normal_loss(value, returns.detach())  # (N, H)
        stats = dict(actor_entropy=entropy.mean(), advantage_std=advantage.std(), value_mean=value.mean())
        stats |= dict(return_mean=returns.mean())
        return losses, stats | dict(imagined_reward=reward.mean(), imagined_continue=cont.mean())


# === Agent ============================================================================================================


class Adam:
    """Clipping by the global norm, weight decay that the learning rate does not scale, then Adam as Keras has it."""

    def __init__(self, params, learning_rate, args):
        self.params, self.learning_rate, self.args = [p for p in params if p.requires_grad], learning_rate, args
        self.square, self.momentum = ([torch.zeros_like(p) for p in self.params] for _ in range(2))
        self.updates = torch.zeros((), dtype=torch.float64, device=self.params[0].device)

    @torch.no_grad()
    def step(self, grads):
        """One update from gradients in the order of the parameters -> their norm."""
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        grads = [grad.contiguous() for grad in grads]  # foreach runs as one kernel if layouts and types agree
        grads = torch._foreach_mul(grads, self.args.clip / norm.clamp(min=self.args.clip))
        self.updates += 1
        torch._foreach_lerp_(self.square, torch._foreach_mul(grads, grads), 0.001)
        torch._foreach_lerp_(self.momentum, grads, 0.1)
        rms = torch._foreach_add(torch._foreach_sqrt(self.square), self.args.epsilon)  # PyTorch: after the correction
        rate = self.learning_rate * ((1 - 0.999**self.updates).sqrt() / (1 - 0.9**self.updates)).float()
        torch._foreach_mul_(self.params, 1 - self.args.weight_decay)
        torch._foreach_sub_(self.params, torch._foreach_mul(torch._foreach_div(self.momentum, rms), rate))
        return norm


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
        self.behaviour.slow_critic.load_state_dict(self.behaviour.critic.state_dict())
        self.optimizers = {
            "world_model": Adam(self.world_model.parameters(), args.model_rate, args),
            "actor": Adam(self.behaviour.actor.parameters(), args.actor_rate, args),
            "critic": Adam(self.behaviour.critic.parameters(), args.critic_rate, args),
        }
        if args.compile:
            rssm, actor = self.world_model.rssm, self.behaviour.actor
            for method in (rssm.obs_step, rssm.obs_steps, rssm.img_step, actor.sample, actor.layers.forward):
                setattr(method.__self__, method.__name__, torch.compile(method, dynamic=False))
        self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=args.amp)

    def layout(self):
        """What the replay holds of each step, as a NumPy type."""
        fields = [(key, space.dtype, space.shape) for key, space in self.spaces.items()] + [(key, "?") for key in FLAGS]
        return np.dtype([*fields, ("reward", "f4"), ("action", "f4", (self.action_dim,)), ("count", "i8")])

    def initial(self, num_envs):
        """What acting carries from step to step, at the start: deter, stoch, action (num_envs, A)."""
        return *self.world_model.rssm.initial(num_envs), torch.zeros(num_envs, self.action_dim, device=self.device)

    @torch.no_grad()
    def act(self, obs, carry, training=True):
        """Observations (num_envs, ...) with is_first, what it returned last -> deter, stoch, action: sample or mode."""
        deter, stoch, action = carry
        with self.autocast():
            embed = self.world_model.encoder(obs)
            (deter, stoch), _ = self.world_model.rssm.obs_step((deter, stoch), action, embed, obs["is_first"])
            return deter, stoch, self.policy(deter, stoch, training)

    def policy(self, deter, stoch, training=True):
        """A sample of the actor's action in a state, or its mode: (num_envs, A)."""
        actor, feat = self.behaviour.actor, feature(deter, stoch)
        return actor.sample(feat) if training else actor(feat).mode

    def random_action(self, num_envs):
        """Uniform actions (num_envs, A) for the prefill."""
        action = 2 * torch.rand(num_envs, self.action_dim, device=self.device) - 1
        return F.one_hot(action.argmax(-1), self.action_dim).float() if self.discrete else action

    def env_action(self, action):
        """Actions (num_envs, A) -> what the environments take: (num_envs,) or (num_envs, A)."""
        return (action.argmax(-1) if self.discrete else action.clamp(-1, 1)).cpu().numpy()

    def start(self, data):
        """The state before a sequence: zeros."""
        return self.world_model.rssm.initial(len(data["reward"]))

    def update(self, data):
        """One step of each optimizer on a batch from the replay -> metrics by key; never waits for the GPU."""
        args = self.args
        if args.tanh_rewards:
            data = data | {"reward": data["reward"].tanh()}
        with self.autocast():
            losses, deter, stoch, feat, stats = self.world_model.loss(data, self.start(data))
        scales = {"kl_loss": args.kl_scale, "continue_loss": args.continue_scale}
        total = sum(scales.get(name, 1.0) * loss.mean() for name, loss in losses.items())
        stats |= self.descend(world_model=total)
        with self.autocast():  # imagination takes the updated model
            more, more_stats = self.behaviour.loss(self.world_model, data, deter, stoch, feat)
        losses = {name: loss.mean() for name, loss in (losses | more).items()}
        stats |= self.descend(actor=losses["actor_loss"], critic=losses["critic_loss"]) | more_stats
        slow, fast = self.behaviour.slow_critic.parameters(), self.behaviour.critic.parameters()
        with torch.no_grad():  # a copy at the first update and every `slow_critic_every` after it
            now = (self.optimizers["critic"].updates - 1) % args.slow_critic_every == 0
            for old, new in zip(slow, fast, strict=True):
                old.copy_(torch.where(now, new, old))
        metrics = {f"losses/{k}": v for k, v in losses.items()} | {f"stats/{k}": v for k, v in stats.items()}
        return {key: value.detach().float() for key, value in metrics.items()}

    def descend(self, **losses):
        """One step on each loss, by the optimizer's name -> norms; all gradients come before the first step."""
        grads = {name: torch.autograd.grad(loss, self.optimizers[name].params) for name, loss in losses.items()}
        return {f"{name}_grad_norm": self.optimizers[name].step(grad) for name, grad in grads.items()}

    def optimizer_state(self):
        """All that the optimizers depend on besides parameters and gradients, as a list of tensors."""
        return [x for adam in self.optimizers.values() for x in (*adam.square, *adam.momentum, adam.updates)]


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
        carry = agent.act(to_tensors(obs | {"is_first": ~running}, agent.device), carry, training=False)
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
    envs = make_envs(args, args.num_envs)
    agent = Agent(args, envs.single_observation_space.spaces, envs.single_action_space, device)
    name = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{time.time_ns() // 1000}"
    run, saved = args.resume or f"{args.run_dir}/{name}", load(args.resume, agent) if args.resume else {}
    frame, updates, budget, due = saved.get("progress", (0, 0, 0, math.inf))
    records = int(1.02 * args.total_timesteps / args.action_repeat) + args.num_envs  # those of resets among them
    steps = envs.num_envs, min(args.replay_size, records) // args.num_envs, args.batch_length
    replay = Replay(f"{run}/replay/steps", agent.layout(), *steps, saved.get("replay"), args.prioritise_ends)
    Path(f"{run}/args.tmp").write_text(json.dumps(asdict(args) | {"script": Args.exp_name}, indent=1))
    os.replace(f"{run}/args.tmp", f"{run}/args.json")
    if args.track:
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
    rng = np.random.default_rng([0, args.seed, frame])
    torch.manual_seed(int(rng.integers(2**63)))
    seeds, zeros = rng.integers(2**32, size=envs.num_envs).tolist(), np.zeros(envs.num_envs, bool)
    record, carry, data, ahead = None, agent.initial(envs.num_envs), None, None
    bar = tqdm(total=args.total_timesteps, initial=frame, unit="frames", disable=False, smoothing=0.05)
    totals, counted, ending = 0.0, updates, False
    while frame < args.total_timesteps and not ending:
        # Start all environments, at first and once more after the prefill
        if record is None:
            obs, _ = envs.reset(seed=seeds)
            record = obs | dict(reward=np.zeros(envs.num_envs), is_first=~zeros, is_last=zeros, is_terminal=zeros)
            replay.add(record | {"action": 0})

        # Learn: `pretrain` updates after the prefill, one at the next step, then one every `train_every` steps
        while frame >= due:
            budget, due = budget + 1, due + args.train_every * args.action_repeat
        while budget >= 1 and len(replay) and not stop:
            data = ahead or replay.sample(args.batch_size, rng, device)
            metrics = update(data)
            if device.type == "cuda":  # the next batch is read while the GPU works
                ahead = replay.sample(args.batch_size, rng, device)
            values = torch.stack(list(metrics.values())).cpu().numpy()
            bad = [key for key, value in zip(metrics, values, strict=True) if not np.isfinite(value)]
            if bad:
                sys.exit(f"\nnot finite in update {updates + 1}, frame {frame}: {bad}; the last checkpoint is kept")
            totals, updates, budget = totals + values, updates + 1, budget - 1

        # Act, at random during the prefill
        if due == math.inf:
            carry = *carry[:2], agent.random_action(envs.num_envs)
        else:
            carry = act(to_tensors(record, device), carry)

        # Step, and add it to the replay: the first step after an episode's last one resets, and is no frame
        obs, reward, ended, cut, info = envs.step(agent.env_action(carry[2]))
        record = obs | dict(reward=reward, is_first=record["is_last"], is_last=ended | cut, is_terminal=ended)
        bad = [key for key, value in record.items() if not np.isfinite(value).all()]
        if bad:
            sys.exit(f"\nnot finite, from an environment, frame {frame}: {bad}; the last checkpoint is kept")
        replay.add(record | {"action": carry[2].cpu().numpy() * ~record["is_first"][:, None]})
        ending, taken = bool(stop), int((~record["is_first"]).sum())
        before, frame = frame, frame + taken * args.action_repeat
        save, log, score = (n and frame // n > before // n for n in (args.save_every, args.log_every, args.eval_every))

        # Save: the checkpoint is there whole or not at all; the replay that belongs to it lies beside it
        if save or score or ending or frame >= args.total_timesteps:
            replay.steps.flush()
            state = dict(agent=agent.state_dict(), optimizer=agent.optimizer_state(), replay=replay.state_dict())
            with open(f"{run}/checkpoint.tmp", "wb") as file:
                torch.save(state | {"progress": (frame, updates, budget, due)}, file)
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
        if log and updates > counted:
            row = dict(zip(metrics, totals / (updates - counted), strict=True)) | {"charts/updates": updates}
            row["charts/SPS"] = (frame - bar.initial) / bar.format_dict["elapsed"]
            for key, value in row.items():
                writer.add_scalar(key, value, frame)
            totals, counted = 0.0, updates

        # Evaluate
        if score:
            with torch.compiler.set_stance("force_eager"):  # many shapes, once each
                if data and args.batch_length > 5:  # of which it sees 5
                    video = open_loop(agent, {key: value[:4] for key, value in data.items()})
                    writer.add_video("video/open_loop", video[None], frame, fps=15, dataformats="NTHWC")
                scores = evaluate(agent, args, [1, args.seed, frame], f"{run}/videos/{frame}", stop)
            for key, value in scores.items():
                writer.add_scalar(f"eval/{key}", value.mean(), frame)
                writer.add_scalar(f"eval/{key}_std", value.std(), frame)

        # The prefill is over: all environments start anew, with random numbers that go on
        if due == math.inf and frame >= args.prefill * args.action_repeat and len(replay):
            budget, due, seeds, record = args.pretrain, frame + args.action_repeat, None, None
    envs.close()
    bar.close()
    writer.close()
    print(f"{'stopped' if stop else 'done'} at frame {frame} after {updates} updates, saved: --resume {run}")
    if not updates:
        print(f"no update: fewer than {args.prefill} steps, or no episode of {args.batch_length} steps")
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
