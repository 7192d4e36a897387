"""Dreamer: Dream to Control: Learning Behaviors by Latent Imagination (Hafner et al. 2019), arXiv:1912.01603v3.

Authors' code: github.com/danijar/dreamer. Where paper and code disagree, the line concerned says so.

    python dreamer_v1.py --env-id dmc-walker-walk                   # train, from pixels
    python dreamer_v1.py --env-id dmc-walker-walk --obs state       # train, from joint angles, on a CPU
    python dreamer_v1.py --resume runs/<run>                        # go on exactly where it stopped
    python dreamer_v1.py --evaluate runs/<run> | --play runs/<run>  # score it | act inside its dream

The agent learns a world model (encoder, recurrent state-space model, decoder, reward and continue heads) from replayed
sequences, and an actor and a critic from sequences that the model imagines. Hyper-parameters differ by suite: PRESETS.

What changed since planet.py:
 [C1] An actor and a critic, learnt from imagined sequences and λ-returns, instead of a planner.
 [C2] Discrete actions with straight-through gradients; random ones in a share that falls.
 [C3] Free nats apply to the KL's average, not to each step; no scale of the reward loss, no overshooting.
 [C4] RSSM with ELU and a GRU that resets after its matrix product; no variants without recurrent state or noise.
 [C5] Heads and the layers for vectors with ELU and 400 units; reward head with 2 hidden layers, not 3.
 [C6] Images with all their 8 bits and no noise.
 [C7] A continue head if wanted; discounting; tanh rewards.
 [C8] Adam with smaller epsilon, lower rates and tighter clipping, one for each part.
 [C9] Steps, not episodes, until training starts and between updates; action repeat 2 in all tasks; Atari.
[C10] The representation may be learnt from images or rewards alone.
Gone with them: plan, predicted_return, planner, planning_horizon, candidates, iterations, elites [C1]; reward_scale,
overshooting_distance, overshooting_scale [C3]; dynamics, activation [C4]; bits, preprocess, postprocess [C6]; REPEATS,
seed_episodes, total [C9].

Ablations: `--no-critic` no bootstrap, `--imagination-horizon 5`, `--representation-from reward` no decoder.

Not copied from the authors' code: one draw of the latents' noise for all sequences of a batch; sequences never hold an
episode's last step, so that the continue head sees no end; no update just to create variables. Not in the authors'
code: observations that are vectors. Atari as in dreamer_v2.py: grey, an episode is a game, not a life.

Shapes: B batch, T time, H imagination horizon, N = B*T starts of imagination, A action, D deter, S stoch variables,
E embed, F = D + S feat, L = H - 1. Arrays are (B, T, ...). Starts exclude each sequence's last with a continue head.
"""

import base64
import csv
import ctypes
import dataclasses
import http.server
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import sysconfig
import time
import traceback
import urllib.parse
from ctypes.util import find_library
from dataclasses import dataclass
from typing import Literal

import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import Summary
from tqdm import tqdm

# === Arguments ========================================================================================================


@dataclass
class Args:
    # General
    exp_name: str = os.path.basename(__file__).removesuffix(".py")
    """name of the experiment, part of the run directory's name"""
    seed: int = 1
    """seed of parameters, environments and sampling"""
    torch_deterministic: bool = True
    """use PyTorch's deterministic algorithms for convolutions"""
    cuda: bool = True
    """use the GPU if there is one"""
    track: bool = False
    """log to Weights & Biases too (pip install wandb)"""
    wandb_project_name: str = "world-models"
    """Weights & Biases: project"""
    wandb_entity: str | None = None
    """Weights & Biases: team"""
    capture_video: bool = False
    """write mp4 files: of an episode at each evaluation; with --play, of a dream instead of opening the page"""
    resume: str | None = None
    """run directory to continue; other flags given with it override what the run was started with"""
    evaluate: str | None = None
    """run directory whose agent is scored over --eval-episodes episodes"""
    play: str | None = None
    """run directory whose world model is opened in a browser page, where you act"""
    run_dir: str = "runs"
    """where run directories are made"""
    eval_every: int = 50_000
    """frames between evaluations and open-loop videos; 0 for none"""
    eval_episodes: int = 10
    """episodes of one evaluation, all at once in as many environments; 0 for none during training"""
    log_every: int = 1_000
    """frames between two rows of metrics"""
    save_every: float = 10
    """minutes between checkpoints"""
    compile: bool = torch.cuda.is_available()
    """torch.compile the model's parts, which takes a C++ compiler and Python's headers; default: with a GPU"""
    amp: bool = torch.cuda.is_available()
    """bfloat16 for the networks; parameters, losses and distributions stay float32; default: with a GPU"""

    # Environment
    env_id: str = "dmc-walker-walk"
    """dmc-<domain>-<task>, atari-<game>, any Gymnasium id, or <module>:<id> to import the module first"""
    total_timesteps: int = 1_000_000
    """environment frames to train for, frames skipped by action repeat included"""
    num_envs: int = 1
    """environments that are stepped together"""
    action_repeat: int = 1
    """frames for which each action is held; rewards are summed"""
    obs: Literal["pixels", "state", "both"] | None = None
    """what is observed; default: what the environment returns"""
    image_size: int = 64
    """height and width to which images are resized"""
    time_limit: int | None = None
    """frames after which an episode is cut; default: the environment's own limit"""

    # DreamerV1. Defaults: the authors' code for the control suite, unless said otherwise
    deter: int = 200
    """units of the recurrent state"""
    hidden: int = 200
    """units of the layers inside the RSSM"""
    depth: int = 32
    """channels of the convolutions, times 1, 2, 4, 8"""
    units: int = 400
    """[C5] units of all other layers"""
    stoch: int = 30
    """Gaussian variables of the stochastic state"""
    tanh_rewards: bool = False
    """[C7] learn from tanh of the rewards"""
    representation_from: Literal["all", "image", "reward"] = "all"  # [C10]
    """what shapes the representation, besides the KL: all heads, the decoder alone, or the heads but not the decoder"""
    kl_scale: float = 1.0
    """scale of the KL loss"""
    free_nats: float = 3.0
    """[C3] nats below which the average KL gives no gradient"""
    predict_continue: bool = False
    """[C7] learn the end of episodes; else imagined ones have none"""
    continue_scale: float = 10.0
    """[C7] scale of the continue loss"""
    critic: bool = True
    """[C1] returns go on after the horizon by the critic's value; without, they end there"""
    imagination_horizon: int = 15
    """[C1] steps imagined from each state"""
    discount: float = 0.99
    """[C7] of rewards, per step"""
    lmbda: float = 0.95
    """[C1] mixing of n-step returns"""
    action_noise: float = 0.3
    """standard deviation of the noise on continuous actions in training"""
    random_actions: float = 0.4
    """[C2] share of random actions in training, if they are discrete, at first (paper)"""
    random_actions_end: float = 0.1
    """[C2] share that is reached after `random_actions_updates` (paper)"""
    random_actions_updates: int = 200_000
    """[C2] updates over which the share falls (paper)"""
    model_rate: float = 6e-4
    """[C8] learning rate of the world model"""
    actor_rate: float = 8e-5
    """[C8] learning rate of the actor"""
    critic_rate: float = 8e-5
    """[C8] learning rate of the critic"""
    epsilon: float = 1e-7
    """[C8] Adam's, added to the root of the mean square before its correction"""
    clip: float = 100.0
    """[C8] largest norm of the gradient, of each of the three optimizers"""
    batch_size: int = 50
    """sequences of a batch"""
    batch_length: int = 50
    """steps of a sequence"""
    train_every: int = 500  # [C9]
    """steps of the agent, in all environments together, between bursts of updates: with action repeat 2, 1000 frames"""
    train_steps: int = 100
    """[C9] updates of a burst"""
    prefill: int = 2500
    """[C9] steps with random actions at the start"""
    pretrain: int = 100
    """[C9] updates at the end of the prefill"""
    replay_size: int = 10_000_000
    """steps that the replay holds; the authors keep all"""


PRESETS = {  # [C9] by the first word of --env-id, then by that word and --obs; for Atari, of the paper
    "dmc": dict(obs="pixels", action_repeat=2, total_timesteps=5_000_000),
    "atari": dict(total_timesteps=200_000_000, action_repeat=4, eval_every=1_000_000, imagination_horizon=10)
    | dict(tanh_rewards=True, kl_scale=0.1, predict_continue=True),
}


SCRIPT = Args().exp_name
FIXED = ("seed", "env_id", "obs", "image_size", "action_repeat", "num_envs", "replay_size", "batch_length", "stoch")
FIXED += ("deter", "hidden", "depth", "units", "predict_continue")  # [C4], [C6], [C7]


class Failure(Exception):
    """Something that the user has to put right: ends the run with one line and exit code 2."""


class Interrupted(Failure):
    """A failure from outside: what was learnt until then is saved first."""


def parse_args(argv=None):
    """Command line -> Args: defaults, then the run's own or the suite's preset, then the flags that were given.
    Changed from planet.py: [C1], [C3], [C6], [C9]"""
    argv = sys.argv[1:] if argv is None else list(argv)
    presets = "\n".join(f"    {name}: {show(preset)}" for name, preset in PRESETS.items())
    text = f"{__doc__}\nPresets by the first word of --env-id:\n{presets}"
    cli = lambda default: tyro.cli(Args, args=argv, default=default, description=text)  # noqa: E731
    args = cli(Args())
    run = args.resume or args.evaluate or args.play
    if run:
        try:
            with open(os.path.join(run, "args.json")) as file:
                saved = json.load(file)
        except (OSError, ValueError) as error:
            raise Failure(f"{run} is not a run directory: {error}") from None
        known = {field.name for field in dataclasses.fields(Args)}
        if saved.pop("script", None) != SCRIPT or set(saved) - known:
            raise Failure(f"{run} was not made by this version of {SCRIPT}.py")
        args = cli(Args(**saved | dict(resume=None, evaluate=None, play=None)))
        fixed = [name for name in FIXED if getattr(args, name) != saved[name]]
        if args.resume and fixed:
            raise Failure(f"{run} was started with other values of {fixed}: they cannot change on --resume")
    else:
        preset = PRESETS.get(suite(args.env_id), {})
        obs = args.obs or preset.get("obs")
        args = cli(dataclasses.replace(Args(), **preset | PRESETS.get(f"{suite(args.env_id)}-{obs}", {})))
    if args.image_size != 64:
        raise Failure(f"--image-size {args.image_size}: the convolutions are made for 64")
    return args


def show(values):
    return " ".join(f"{name}={value}" for name, value in values.items() if value is not None)


def suite(env_id):
    """`dmc-walker-walk` -> `dmc`, `procgen:CoinRun-v0` -> `procgen`, `CarRacing-v3` -> `carracing`."""
    return re.split(r"[-:/]", env_id.lower())[0]


# === Environment ======================================================================================================

FLAGS = ("is_first", "is_last", "is_terminal")
NO_OPENGL = "rendering needs OpenGL, which is not installed: apt-get install libosmesa6 (or train with --obs state)"


def choose_opengl():
    """The OpenGL library that MuJoCo is to render with; must be chosen before dm_control is imported."""
    if "MUJOCO_GL" not in os.environ and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        egl = find_library("EGL") and (find_library("GL") or find_library("OpenGL"))
        os.environ["MUJOCO_GL"] = "egl" if egl else "osmesa" if find_library("OSMesa") else "disable"
    os.environ.setdefault("DISABLE_RENDER_THREAD_OFFLOADING", "1")
    os.environ.setdefault("LP_NUM_THREADS", "0")  # software rendering: one core per environment
    return os.environ.get("MUJOCO_GL") != "disable"


class DeepMindControl(gym.Env):
    """A task of the DeepMind Control Suite, `<domain>-<task>`: observes float32 vectors, `image`, or both.

    Rewards are summed over `action_repeat` control steps; the last is rendered. Failure: unknown task, no OpenGL.
    """

    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(self, name, obs, image_size, action_repeat):
        self.opengl = choose_opengl()
        if obs != "state" and not self.opengl:
            raise Failure(NO_OPENGL)
        try:
            from dm_control import suite as dmc
        except ImportError as error:
            raise Failure(f"cannot import dm_control ({error}): pip install -r requirements.txt") from None
        except AttributeError:  # PyOpenGL, if the library that the user named is not there
            raise Failure(f"MUJOCO_GL={os.environ['MUJOCO_GL']}: {NO_OPENGL}") from None
        domain, _, task = name.replace("cup-", "ball_in_cup-", name.startswith("cup-")).partition("-")
        if (domain, task) not in dmc.ALL_TASKS:
            tasks = " ".join(f"dmc-{d}-{t}" for d, t in dmc.ALL_TASKS)
            raise Failure(f"unknown task dmc-{name}; there are: {tasks}")
        self.env = dmc.load(domain, task)
        self.size, self.action_repeat, self.camera = image_size, action_repeat, 2 if domain == "quadruped" else 0
        visual = self.env.physics.model.vis
        visual.global_.offwidth = visual.global_.offheight = image_size
        visual.quality.shadowsize = 1024  # the same picture as with 2048, in two thirds of the time
        spec = self.env.action_spec()
        self.action_space = gym.spaces.Box(spec.minimum.astype(np.float32), spec.maximum.astype(np.float32))
        spaces = {k: gym.spaces.Box(-np.inf, np.inf, v.shape) for k, v in self.env.observation_spec().items()}
        spaces = {} if obs == "pixels" else spaces
        if obs != "state":
            spaces["image"] = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(spaces)
        try:  # here, where it can be reported, not in a process of its own
            _ = self.render() if obs != "state" else None
        except Exception as error:
            raise Failure(f"{NO_OPENGL}; MuJoCo says: {' '.join(str(error).split())}") from None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.env.task.random.seed(seed)
        return self.observe(self.env.reset()), {}

    def step(self, action):
        reward = 0.0
        for _ in range(self.action_repeat):
            step = self.env.step(action)
            reward += step.reward or 0.0
            if step.last():
                break
        return self.observe(step), reward, step.last() and step.discount == 0, step.last() and step.discount != 0, {}

    def observe(self, step):
        spaces = self.observation_space.spaces
        vectors = {k: np.asarray(v, np.float32) for k, v in step.observation.items() if k in spaces}
        return vectors | ({"image": self.render()} if "image" in spaces else {})

    def render(self):
        if not self.opengl:
            raise Failure(NO_OPENGL)
        return self.env.physics.render(self.size, self.size, camera_id=self.camera)


class Adapter(gym.Wrapper):
    """Any environment -> a dict of images (uint8, H×W×C), vectors (float32), classes (int64); actions in [-1, 1]."""

    def __init__(self, env, obs, image_size, action_repeat):
        super().__init__(env)
        self.size, self.repeat = image_size, action_repeat
        space = env.observation_space
        spaces = dict(space.spaces) if isinstance(space, gym.spaces.Dict) else {"observation": space}
        images = {key for key, value in spaces.items() if value.dtype == np.uint8 and len(value.shape) in (2, 3)}
        self.key = None if isinstance(space, gym.spaces.Dict) else "image" if images else "vector"
        if self.key:
            spaces, images = {self.key: space}, {self.key} if images else set()
        self.rendered = obs in ("pixels", "both") and not images
        if self.rendered:
            if env.render_mode != "rgb_array":
                raise Failure(f"--obs {obs}: {env} returns no images and cannot render any")
            images, spaces["image"] = {"image"}, gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        keep = set(spaces) if obs in (None, "both") else images if obs == "pixels" else set(spaces) - images
        if not keep:
            raise Failure(f"--obs {obs}: the environment observes only {sorted(spaces)}")
        self.images = images & keep
        self.observation_space = gym.spaces.Dict({k: self.space(k, v) for k, v in spaces.items() if k in keep})
        action = env.action_space
        if isinstance(action, gym.spaces.Discrete):
            self.action_space = gym.spaces.Discrete(int(action.n))
        elif isinstance(action, gym.spaces.Box) and np.issubdtype(action.dtype, np.floating):
            self.action_space = gym.spaces.Box(-1, 1, (int(np.prod(action.shape)),))
            finite = np.isfinite(action.low) & np.isfinite(action.high)
            self.low, self.high = np.where(finite, action.low, -1), np.where(finite, action.high, 1)
        else:
            raise Failure(f"unsupported action space {action}; supported are Discrete and Box of floats")

    def space(self, key, space):
        if key in self.images:
            channels = 1 if len(space.shape) == 2 else space.shape[2]
            return gym.spaces.Box(0, 255, (self.size, self.size, channels), np.uint8)
        if isinstance(space, gym.spaces.Box):
            return gym.spaces.Box(-np.inf, np.inf, (int(np.prod(space.shape)),) if space.shape else ())
        if isinstance(space, gym.spaces.Discrete):
            return gym.spaces.Discrete(int(space.n))
        raise Failure(f"unsupported observation {key!r}: {space}; supported are Box, Discrete and a Dict of them")

    def observation(self, obs):
        obs = {self.key: obs} if self.key else dict(obs)
        if self.rendered:
            obs["image"] = self.env.render()
        for key, space in self.observation_space.spaces.items():
            if key in self.images:
                if obs[key].shape[:2] != space.shape[:2]:
                    obs[key] = cv2.resize(obs[key], space.shape[:2], interpolation=cv2.INTER_AREA)
                obs[key] = obs[key].reshape(space.shape)
            elif isinstance(space, gym.spaces.Box):
                obs[key] = np.asarray(obs[key], np.float32).reshape(space.shape)
            else:
                source = self.env.observation_space if self.key else self.env.observation_space[key]
                obs[key] = np.int64(obs[key] - source.start)
        return {key: obs[key] for key in self.observation_space.spaces}

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return self.observation(obs), info

    def step(self, action):
        space, total = self.env.action_space, 0.0
        if isinstance(space, gym.spaces.Discrete):
            action = int(action) + space.start
        else:
            action = np.clip(action, -1, 1).reshape(space.shape)
            action = self.low + (action + 1) / 2 * (self.high - self.low)
            action = np.clip(action, space.low, space.high).astype(space.dtype)
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return self.observation(obs), total, terminated, truncated, info


class Episodes(gym.Wrapper):
    """Next-step autoreset; the flags are observed; each episode has a seed of its own, so that it can be replayed.

    After a last step the next one resets whatever the action; the reset observation comes alone, with `is_first`.
    """

    def __init__(self, env, index):
        super().__init__(env)
        self.index, self.run_seed, self.episode, self.over = index, 0, -1, True
        spaces = env.observation_space.spaces | {k: gym.spaces.Discrete(2) for k in FLAGS}
        self.observation_space = gym.spaces.Dict(spaces)

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.run_seed, self.episode = seed, -1
        self.episode, self.over = self.episode + 1, False
        seed = np.random.SeedSequence([self.run_seed, self.index, self.episode]).generate_state(1)[0] % 2**31
        obs, info = self.env.reset(seed=int(seed))
        return obs | dict(is_first=1, is_last=0, is_terminal=0), info

    def step(self, action):
        if self.over:
            obs, info = self.reset()
            return obs, 0.0, False, False, info
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.over = bool(terminated or truncated)
        return obs | dict(is_first=0, is_last=int(self.over), is_terminal=int(terminated)), reward, False, False, info

    def restore(self, states):
        """Goes back into an episode: index -> (run seed, episode, actions so far); returns the observation there."""
        self.run_seed, episode, actions = states[self.index]
        self.episode = episode - 1
        obs = self.reset()[0]
        for action in actions:
            obs = self.step(action)[0]
        return obs

    def abandon(self, which):
        """Ends the episode of the environments `which`: their next step resets."""
        self.over = self.over or self.index in which


def make_env(args, index=0):
    """One environment, adapted; Failure with one line for what is unknown, not installed or unsupported."""
    if multiprocessing.parent_process():  # Ctrl-C reaches the whole group, and the main process acts on it
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    name, repeat, limit = args.env_id.partition("-")[2], args.action_repeat, args.time_limit
    try:
        if suite(args.env_id) == "dmc":
            env, repeat = DeepMindControl(name, args.obs, args.image_size, args.action_repeat), 1
        elif suite(args.env_id) in ("atari", "atari100k"):
            import ale_py

            gym.register_envs(ale_py)
            full = suite(args.env_id) == "atari"  # Machado et al. 2018: sticky actions, all 18 actions
            game = "".join(word.capitalize() for word in re.split("[-_]", name))
            options = dict(frameskip=1, repeat_action_probability=0.25 if full else 0.0, full_action_space=full)
            env = gym.make(f"ALE/{game}-v5", render_mode="rgb_array", max_num_frames_per_episode=108_000, **options)
            env = gym.wrappers.AtariPreprocessing(env, 30, repeat, args.image_size, grayscale_obs=full)
            repeat = 1
        else:
            try:
                env = gym.make(args.env_id, render_mode="rgb_array")
            except TypeError:  # it knows no render_mode
                env = gym.make(args.env_id)
    except (gym.error.Error, ImportError) as error:
        hint = "; write dmc-<domain>-<task>, atari-<game>, a Gymnasium id or <module>:<id>"
        raise Failure(f"--env-id {args.env_id}: {' '.join(str(error).split())}{hint}") from None
    if limit:
        env = gym.wrappers.TimeLimit(env, limit // (1 if repeat > 1 else args.action_repeat))
    return Episodes(Adapter(env, args.obs, args.image_size, repeat), index)


def make_envs(args, count, first=0):
    """`count` environments in lock-step: in processes of their own where frames are made, else in this one."""
    thunks = [lambda index=index: make_env(args, index) for index in range(first, first + count)]
    probe = make_env(args)
    pixels = any(space.dtype == np.uint8 for space in probe.observation_space.values())
    probe.close()
    if count == 1 or not pixels:
        return gym.vector.SyncVectorEnv(thunks, autoreset_mode="Disabled")
    # forked from a clean process, which must not inherit this one's OpenGL and CUDA but has the imports that take long
    multiprocessing.set_forkserver_preload(["cv2", "gymnasium", "torch.utils.tensorboard", "tyro"])
    return gym.vector.AsyncVectorEnv(thunks, autoreset_mode="Disabled", context="forkserver")


# === Replay ===========================================================================================================


LATENTS = ()  # what the agent stores with each step


class Replay:
    """Ring of steps on disk, one stream per environment: arrays (capacity, envs, ...) that are memory-mapped.

    Step t holds observation t, the action that led to it, its reward, its flags and what the agent adds to it. All
    streams grow together. Failure when the disk is too small or full; nothing that was written before is lost then.
    Only complete episodes are drawn from.
    """

    def __init__(self, folder, spaces, num_envs, capacity, length):
        self.folder, self.num_envs, self.length = folder, num_envs, length
        self.capacity = capacity
        self.count, self.reserved = 0, 0
        self.begun, self.episodes = [0] * num_envs, np.zeros((0, 3), int)
        if self.capacity < length + 1:
            raise Failure(f"--batch-length {length}: the replay holds only {self.capacity} steps of each environment")
        row = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in spaces.values()) * num_envs
        os.makedirs(folder, exist_ok=True)
        free, on_disk = shutil.disk_usage(folder).free, sum(f.stat().st_blocks * 512 for f in os.scandir(folder))
        self.bytes = row * self.capacity
        if self.bytes > free + on_disk:
            raise Failure(
                f"the replay needs {self.bytes / 1e9:.1f} GB in {folder}, where {free / 1e9:.1f} GB are free: "
                "make room, or lower --replay-size or --total-timesteps"
            )
        self.arrays = {key: self.open(f"{folder}/{key}.npy", *space) for key, space in spaces.items()}
        path = f"{folder}/written.npy"  # steps ever written: when the process was killed, more than were saved
        mode = dict(mode="r+") if os.path.exists(path) else dict(mode="w+", dtype=np.int64, shape=())
        self.written = np.lib.format.open_memmap(path, **mode)

    def open(self, path, shape, dtype):
        shape = (self.capacity, self.num_envs, *shape)
        if os.path.exists(path):  # a run that goes on for longer than it was to: NumPy's header leaves room to grow
            with open(path, "r+b") as file:
                header = dict(descr=np.lib.format.dtype_to_descr(np.dtype(dtype)), fortran_order=False, shape=shape)
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize)
            return np.lib.format.open_memmap(path, "r+")
        return np.lib.format.open_memmap(path, "w+", dtype, shape)

    def reserve(self, rows=1024):
        """Takes disk space for the next rows: writing into a mapped file on a full disk would kill the process."""
        if self.count < self.reserved or self.reserved == self.capacity:
            return
        stop = min(self.reserved + rows, self.capacity)
        for key, array in self.arrays.items():
            size = array[:1].nbytes
            with open(f"{self.folder}/{key}.npy", "r+b") as file:
                try:
                    if hasattr(os, "posix_fallocate"):
                        start = array.offset + self.reserved * size
                        os.posix_fallocate(file.fileno(), start, (stop - self.reserved) * size)
                except OSError as error:
                    raise Interrupted(f"no room for the replay in {self.folder} ({error.strerror})") from None
        self.reserved = stop

    def add(self, step):
        """Appends one step of every environment: key -> array (envs, ...)."""
        self.reserve()
        for key, array in self.arrays.items():
            array[self.count % self.capacity] = step[key]
        self.count += 1
        self.written[...] = max(self.written, self.count)
        self.index(self.count - 1, step["is_first"])

    def index(self, step, is_first):
        """Where a new episode starts, the one before it is complete: first step, number of steps, stream."""
        for env in np.flatnonzero(is_first):
            length = step - self.begun[env]
            if length > self.length:  # the authors' code: as many actions as steps are drawn
                self.episodes = np.concatenate([self.complete(), [[self.begun[env], length, env]]])
            self.begun[env] = step

    def complete(self):
        """Episodes (n, 3) of which nothing has been overwritten."""
        return self.episodes[self.episodes[:, 0] >= self.oldest()]

    def oldest(self):
        """First step that has not been overwritten."""
        return max(0, max(self.count, int(self.written)) - self.capacity)

    def __len__(self):
        """Number of sequences that can be sampled."""
        return int((self.complete()[:, 1] - self.length + 1).sum())

    def draw(self, count, rng):
        """Starts of sequences, uniformly over episodes, then in them: (count, 2), step and stream."""
        episodes = self.complete()
        first, length, env = episodes[rng.integers(len(episodes), size=count)].T
        steps = rng.integers(length - self.length + 1)
        return np.stack([first + steps, env], 1)

    def get(self, starts):
        """Sequences -> key -> array (B, T, ...), each as if it were an episode's start; where they are."""
        index = (starts[:, :1] + np.arange(self.length)) % self.capacity, starts[:, 1:]
        data = {key: array[index] for key, array in self.arrays.items() if key not in LATENTS}
        data["is_first"][:] = np.arange(self.length) == 0
        return data, index

    def sample(self, batch_size, rng):
        """A batch, as `get` returns it."""
        return self.get(self.draw(batch_size, rng))

    def write(self, index, values):
        """Puts newer latents in the place of those that `sample` returned: key -> array (B, T, ...)."""
        for key, value in values.items():
            self.arrays[key][index] = value

    def flush(self):
        for array in self.arrays.values():
            array.flush()

    def state_dict(self):
        return dict(count=self.count)

    def load_state_dict(self, state):
        self.count = state["count"]
        self.reserved = min(self.count, self.capacity)
        steps = np.arange(self.oldest(), self.count)
        is_first = self.arrays["is_first"][steps % self.capacity]
        for row in np.flatnonzero(is_first.any(1)):
            self.index(steps[row], is_first[row])


# === Maths ============================================================================================================


def sample_onehot(probs, noise):
    """Probabilities (..., K) and uniform noise (..., 1) -> a one-hot sample, with straight-through gradient. [C2]"""
    with torch.no_grad():
        index = (probs[..., :-1].cumsum(-1) <= noise).sum(-1)
        onehot = F.one_hot(index, probs.shape[-1]).to(probs.dtype)
    return onehot + (probs - probs.detach()) if probs.requires_grad else onehot


def gaussian(raw):
    """(..., 2 S) -> mean and standard deviation (..., S, 2)."""
    mean, std = raw.chunk(2, -1)
    return torch.stack([mean, F.softplus(std) + 0.1], -1)


def kl_gaussian(p, q):
    """KL of Gaussians, mean and standard deviation (..., S, 2), summed over the variables: (...)."""
    (p_mean, p_std), (q_mean, q_std) = p.unbind(-1), q.unbind(-1)
    ratio = (p_std / q_std).square()
    return ((((p_mean - q_mean) / q_std).square() + ratio - ratio.log() - 1) / 2).sum(-1)


def normal_loss(mean, target):
    """Negative log-likelihood under a normal of unit variance."""
    return ((mean - target).square() + math.log(2 * math.pi)) / 2


# Time table of what the agent has, for a replayed sequence and, with H for T, for an imagined one:
#
#   state     s_0 -- a_1 --> s_1 -- a_2 --> s_2 ... s_T-1       action[t] led to state t
#   reward    r_0            r_1            r_2 ... r_T-1       came with state t
#   continue  c_0            c_1            c_2 ... c_T-1       probability, times the discount, that t is not the end
#   return    R_0            R_1            R_2 ... R_T-2       of state t and what follows it: starts with r_0, at R_0


def lambda_return(reward, cont, next_value, lmbda):
    """λ-returns: (N, T) each -> (N, T); Eq. 6 (arXiv:1912.01603v3).

    R_t = r_t + c_t · ((1 - λ) v_t+1 + λ R_t+1), R_T = v_T.
    [C1]
    """
    interim = reward + cont * (1 - lmbda) * next_value
    returns = [next_value[:, -1]]
    for t in range(reward.shape[1] - 1, -1, -1):
        returns.append(interim[:, t] + cont[:, t] * lmbda * returns[-1])
    return torch.stack(returns[:0:-1], 1)


# === Networks =========================================================================================================


def initialise(weight):
    """Uniform, with limits by fan-in and fan-out (Glorot)."""
    return nn.init.xavier_uniform_(weight)


class Linear(nn.Linear):
    """Fully connected layer (..., inp) -> (..., out)."""

    def __init__(self, inp, out):
        super().__init__(inp, out)
        initialise(self.weight)
        nn.init.zeros_(self.bias)


class Conv(nn.Conv2d):
    """4×4 convolution of images (B, H, W, C) with stride 2, to half the size."""

    def __init__(self, inp, out):
        super().__init__(inp, out, 4, 2)
        initialise(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Deconv(nn.ConvTranspose2d):
    """Transposed convolution of images (B, H, W, C) with stride 2, to twice the size."""

    def __init__(self, inp, out, kernel):
        super().__init__(inp, out, kernel, 2)
        initialise(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        if x.shape[1] == 1:  # of a 1×1 image it is a matrix product, which takes a CPU a sixth of the time
            weight, size = self.weight.permute(0, 2, 3, 1).flatten(1), self.kernel_size
            return torch.addmm(self.bias.repeat(size[0] ** 2), x.flatten(1), weight).unflatten(1, (*size, -1))
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Layer(nn.Sequential):
    """Linear, ELU. Changed from planet.py: [C4], [C5]"""

    def __init__(self, inp, units):
        super().__init__(Linear(inp, units), nn.ELU())


class MLP(nn.Sequential):
    """`layers` layers and a linear output, in float32: (..., inp) -> (..., out). Changed from planet.py: [C5]"""

    def __init__(self, inp, out, layers, units):
        super().__init__(*[Layer(units if i else inp, units) for i in range(layers)], Linear(units, out))

    def forward(self, x):
        return super().forward(x).float()


class Encoder(nn.Module):
    """Observations (B, T, ...) -> embed (B, T, E): vectors through an MLP, images through convolutions.
    Changed from planet.py: [C5], [C6]"""

    def __init__(self, spaces, args):
        super().__init__()
        self.spaces = spaces
        self.vectors, self.images, self.embed_dim = *split_keys(spaces), 0
        if self.vectors:
            inp = sum(vector_size(spaces[key]) for key in self.vectors)
            self.layers = nn.Sequential(*[Layer(args.units if i else inp, args.units) for i in range(4)])
            self.embed_dim += args.units
        if self.images:
            depths = [sum(spaces[key].shape[-1] for key in self.images)] + [args.depth * m for m in (1, 2, 4, 8)]
            self.convs = nn.ModuleList(Conv(*pair) for pair in zip(depths[:-1], depths[1:], strict=True))
            self.embed_dim += 4 * depths[-1]

    def forward(self, obs):
        embed = []
        if self.vectors:
            vectors = [vector_input(obs[key], self.spaces[key]) for key in self.vectors]
            embed.append(self.layers(torch.cat(vectors, -1)))
        if self.images:
            image = torch.cat([obs[key] for key in self.images], -1)
            x = image.flatten(0, 1) / 255 - 0.5
            for conv in self.convs:
                x = F.relu(conv(x))
            embed.append(x.reshape(*image.shape[:2], -1))
        return torch.cat(embed, -1)


class Decoder(nn.Module):
    """Features (B, T, F) -> key -> means: vectors, images in [-0.5, 0.5], logits of classes.
    Changed from planet.py: [C5]"""

    def __init__(self, spaces, args):
        super().__init__()
        self.spaces = spaces
        self.vectors, self.images = split_keys(spaces)
        feat_dim = args.deter + args.stoch
        if self.vectors:
            self.layers = nn.Sequential(*[Layer(args.units if i else feat_dim, args.units) for i in range(4)])
            self.heads = nn.ModuleDict({key: Linear(args.units, vector_size(spaces[key])) for key in self.vectors})
        if self.images:
            self.map = Linear(feat_dim, 32 * args.depth)
            depths = [32 * args.depth] + [args.depth * m for m in (4, 2, 1)]
            convs = zip(depths[:-1], depths[1:], (5, 5, 6), strict=True)
            self.convs = nn.ModuleList(Deconv(*sizes) for sizes in convs)
            self.output = Deconv(depths[-1], sum(spaces[key].shape[-1] for key in self.images), 6)

    def forward(self, feat):
        means = {}
        if self.vectors:
            x = self.layers(feat)
            for key in self.vectors:
                means[key] = self.heads[key](x).float().reshape(*x.shape[:2], *vector_shape(self.spaces[key]))
        if self.images:
            x = self.map(feat.flatten(0, 1)).unflatten(-1, (1, 1, -1))
            for conv in self.convs:
                x = F.relu(conv(x))
            image = self.output(x).float().unflatten(0, feat.shape[:2])
            parts = image.split([self.spaces[key].shape[-1] for key in self.images], -1)
            means |= zip(self.images, parts, strict=True)
        return means


def split_keys(spaces):
    """Keys of the vectors and of the images, sorted."""
    images = [key for key in sorted(spaces) if spaces[key].dtype == np.uint8]
    return [key for key in sorted(spaces) if key not in images], images


def vector_size(space):
    """Numbers that a vector, a scalar or a class becomes as an input."""
    return int(space.n) if isinstance(space, gym.spaces.Discrete) else int(np.prod(space.shape))


def vector_shape(space):
    return (int(space.n),) if isinstance(space, gym.spaces.Discrete) else space.shape


def vector_input(value, space):
    """(B, T, ...) -> (B, T, vector_size): vectors as they are, one-hot of classes."""
    if isinstance(space, gym.spaces.Discrete):
        return F.one_hot(value, int(space.n)).float()
    return value.flatten(2) if value.ndim > 2 else value.unsqueeze(-1)


# === World model ======================================================================================================


class RSSM(nn.Module):
    """Recurrent state-space model, Eq. 1 (arXiv:1912.01603v3): a state is deter (B, D) and stoch (B, S).
    Changed from planet.py: [C4]"""

    def __init__(self, args, embed_dim, action_dim):
        super().__init__()
        self.args = args
        self.inputs = Layer(args.stoch + action_dim, args.hidden)
        self.gates = Linear(args.hidden, 3 * args.deter)
        self.recurrent_gates = Linear(args.deter, 3 * args.deter)
        nn.init.orthogonal_(self.recurrent_gates.weight)
        self.post_in = Layer(args.deter + embed_dim, args.hidden)
        self.post_out = Linear(args.hidden, 2 * args.stoch)
        self.prior_net = MLP(args.deter, 2 * args.stoch, 1, args.hidden)

    def initial(self, batch_size):
        """State of zeros: deter (B, D), stoch (B, S). Changed from planet.py: [C4]"""
        zeros, args = self.post_out.weight.new_zeros, self.args
        return zeros(batch_size, args.deter), zeros(batch_size, args.stoch)

    def kernels(self):
        """What a scan uses at every step, made once: parts of the input layer and of the posterior's.
        Changed from planet.py: [C4]"""
        args = self.args
        stoch, action = self.inputs[0].weight.T.split([args.stoch, self.inputs[0].in_features - args.stoch])
        post, embed = self.post_in[0].weight.T.split([args.deter, self.post_in[0].in_features - args.deter])
        kernels = dict(stoch=stoch, action=action, post=post, embed=embed)
        half = torch.is_autocast_enabled(post.device.type)
        return tree_map(lambda kernel: kernel.bfloat16(), kernels) if half else kernels

    def action_input(self, action, kernels):
        """The action's share of the input layer, for all steps at once: (..., A) -> (..., hidden)."""
        return action @ kernels["action"] + self.inputs[0].bias

    def core(self, deter, stoch, action_input, kernels):
        """GRU: deter (B, D), stoch (B, S), the action's share -> next deter (B, D). Changed from planet.py: [C4]"""
        _, activation = self.inputs
        x = activation(stoch @ kernels["stoch"] + action_input)
        x_reset, x_cand, x_update = self.gates(x).chunk(3, -1)
        h_reset, h_cand, h_update = self.recurrent_gates(deter).chunk(3, -1)
        update = torch.sigmoid(x_update + h_update)  # (B or N, D)
        cand = torch.tanh(x_cand + torch.sigmoid(x_reset + h_reset) * h_cand)  # (B or N, D)
        return torch.lerp(cand.float(), deter, update.float())

    def sample(self, moments, noise):
        """Mean and deviation (..., S, 2), normal noise (..., S) -> stoch (..., S). Changed from planet.py: [C4]"""
        return moments[..., 0] + moments[..., 1] * noise

    def entropy(self, moments):
        """Entropy of a distribution, summed over the variables: (...)."""
        return (moments[..., 1].log() + (1 + math.log(2 * math.pi)) / 2).sum(-1)

    def prior(self, deter):
        """Mean and deviation of stoch before the observation: (..., D) -> (..., S, 2). Changed from planet.py: [C4]"""
        return gaussian(self.prior_net(deter))

    def obs_step(self, state, action_input, embed_input, mask, noise, kernels):
        """One step with an observation -> state, posterior's mean and deviation (B, S, 2)."""
        deter = self.core(state[0] * mask, state[1] * mask, action_input, kernels)  # (B, D)
        _, activation = self.post_in
        moments = gaussian(self.post_out(activation(deter @ kernels["post"] + embed_input)).float())  # (B, S, 2)
        return (deter, self.sample(moments, noise)), moments

    def img_step(self, state, action, noise, kernels):
        """One step without: state, action (B, A), noise (B, S) -> state."""
        deter = self.core(*state, self.action_input(action, kernels), kernels)
        return deter, self.sample(self.prior(deter), noise)

    def observe(self, embed, action, is_first, start, noise):
        """Posterior states along a sequence.

        embed (B, T, E), action (B, T, A) that led to each step, is_first (B, T), start state, noise (B, T, S)
        -> deter (B, T, D), stoch (B, T, S), mean and deviation (B, T, S, 2).
        """
        kernels = self.kernels()
        mask = 1 - is_first.float().unsqueeze(-1)
        embed = embed @ kernels["embed"] + self.post_in[0].bias
        inputs = self.action_input(action, kernels), embed, mask, noise
        state, steps = start, []
        for step in zip(*(x.unbind(1) for x in inputs), strict=True):
            state, moments = self.obs_step(state, *step, kernels)
            steps.append((*state, moments))
        return tuple(torch.stack(x, 1) for x in zip(*steps, strict=True))

    def imagine(self, start, policy, noise):
        """States that follow the start under a policy, feat (N, F), step -> action (N, A); noise (N, H, S).

        -> feat (N, H, F) and action (N, H, A) that led to it.
        """
        kernels = self.kernels()
        state, feats, actions = start, [], []
        for t, step_noise in enumerate(noise.unbind(1)):
            actions.append(policy(feature(*state), t))
            state = self.img_step(state, actions[t], step_noise, kernels)
            feats.append(feature(*state))
        return torch.stack(feats, 1), torch.stack(actions, 1)


def feature(deter, stoch):
    """(..., D), (..., S) -> (..., F)."""
    return torch.cat([deter, stoch], -1)


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward head and continue head. Changed from planet.py: [C5], [C7]"""

    def __init__(self, args, spaces, action_dim):
        super().__init__()
        self.args, self.spaces = args, spaces
        feat_dim = args.deter + args.stoch
        self.encoder = Encoder(spaces, args)
        self.rssm = RSSM(args, self.encoder.embed_dim, action_dim)
        self.decoder = Decoder(spaces, args)
        self.reward_head = MLP(feat_dim, 1, 2, args.units)
        self.continue_head = MLP(feat_dim, 1, 3, args.units) if args.predict_continue else None

    def loss(self, data, start, noise):
        """Eq. 10 (arXiv:1912.01603v3) -> losses (B, T) by name, that of the KL an average; deter, stoch, feat; stats.

        data: observations (B, T, ...), action, reward, is_first, is_last, is_terminal; noise (B, T, S).
        Changed from planet.py: [C3], [C7], [C10]
        """
        args = self.args
        embed = self.encoder(data)  # (B, T, E)
        deter, stoch, post = self.rssm.observe(embed, data["action"], data["is_first"], start, noise)
        feat = feature(deter, stoch)  # (B, T, F)
        prior = self.rssm.prior(deter)  # (B, T, S, 2)
        image_feat = feat.detach() if args.representation_from == "reward" else feat  # (B, T, F)
        means = self.decoder(image_feat)
        losses = {f"recon_loss_{key}": self.recon_loss(key, mean, data[key]) for key, mean in means.items()}
        head_feat = feat.detach() if args.representation_from == "image" else feat  # (B, T, F)
        losses["reward_loss"] = normal_loss(self.reward(head_feat), data["reward"])  # (B, T)
        if args.predict_continue:
            # the head learns the discount too; paper: it learns the end alone
            target = (1 - data["is_terminal"].float()) * args.discount  # (B, T)
            losses["continue_loss"] = F.binary_cross_entropy_with_logits(
                self.continue_head(head_feat).squeeze(-1), target, reduction="none"
            )
        kl = kl_gaussian(post, prior)  # (B, T)
        losses["kl_loss"] = kl.mean().clamp(min=args.free_nats)
        stats = {
            "posterior_entropy": self.rssm.entropy(post).mean(),
            "prior_entropy": self.rssm.entropy(prior).mean(),
            "kl": kl.mean(),
        }
        return losses, deter, stoch, feat, stats

    def recon_loss(self, key, mean, target):
        """Negative log-likelihood of images in [-0.5, 0.5] and vectors, cross entropy of classes: (B, T).
        Changed from planet.py: [C6]"""
        space = self.spaces[key]
        if isinstance(space, gym.spaces.Discrete):
            return F.cross_entropy(mean.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
        target = target / 255 - 0.5 if target.dtype == torch.uint8 else target
        return normal_loss(mean, target).flatten(2).sum(-1) if mean.ndim > 2 else normal_loss(mean, target)

    def reward(self, feat):
        """(..., F) -> expected reward (...). Changed from planet.py: [C4]"""
        return self.reward_head(feat).squeeze(-1)

    def cont(self, feat):
        """(..., F) -> probability, times the discount, that the episode goes on (...). Changed from planet.py: [C7]"""
        if self.continue_head is None:
            return feat.new_full(feat.shape[:-1], self.args.discount, dtype=torch.float32)
        return self.continue_head(feat).squeeze(-1).sigmoid()

    def decode(self, feat):
        """(B, T, F) -> observations as the environment gives them, key -> (B, T, ...). Changed from planet.py: [C6]"""
        obs = {}
        for key, mean in self.decoder(feat).items():
            if isinstance(self.spaces[key], gym.spaces.Discrete):
                obs[key] = mean.argmax(-1)
            else:
                image = self.spaces[key].dtype == np.uint8
                obs[key] = ((mean + 0.5) * 255).clamp(0, 255).round().byte() if image else mean
        return obs


# === Behaviour ========================================================================================================


class Actor(nn.Module):
    """Policy over one-hot actions (categorical) or actions in [-1, 1]^A (tanh of a normal). [C1], [C2]"""

    def __init__(self, args, feat_dim, action_dim, discrete):
        super().__init__()
        self.discrete = discrete
        self.layers = nn.Sequential(*[Layer(args.units if i else feat_dim, args.units) for i in range(4)])
        self.output = Linear(args.units, action_dim if discrete else 2 * action_dim)

    def forward(self, feat):
        """(..., F) -> log-probabilities (..., A), or mean and deviation of the normal (..., A)."""
        output = self.output(self.layers(feat)).float()
        if self.discrete:
            return (output.log_softmax(-1),)
        mean, std = output.chunk(2, -1)
        return 5 * torch.tanh(mean / 5), F.softplus(std + math.log(math.exp(5) - 1)) + 1e-4

    def sample(self, policy, noise):
        """Noise, uniform (..., 1) or normal (..., A) -> action (..., A); Eq. 3 (arXiv:1912.01603v3)."""
        if self.discrete:
            return sample_onehot(policy[0].exp(), noise)
        return torch.tanh(policy[0] + policy[1] * noise)

    def mode(self, policy, noise):
        """The likeliest of 100 samples, noise (100, ..., A), as in the authors' code; of discrete actions the mode."""
        if self.discrete:
            return F.one_hot(policy[0].argmax(-1), policy[0].shape[-1]).float()
        action = self.sample(policy, noise)
        best = self.log_prob(policy, action).argmax(0)
        return action.gather(0, best[None, ..., None].expand_as(action[:1])).squeeze(0)

    def log_prob(self, policy, action):
        if self.discrete:
            return (policy[0] * action).sum(-1)
        mean, std = policy
        x = torch.atanh(action.clamp(-1 + 2**-24, 1 - 2**-24))  # as in the authors' code: 1 has an inverse too
        normal = ((x - mean) / std).square() / 2 + std.log() + math.log(2 * math.pi) / 2
        return -(normal + 2 * (math.log(2) - x - F.softplus(-2 * x))).sum(-1)


class Behaviour(nn.Module):
    """Actor and critic. [C1]"""

    def __init__(self, args, action_dim, discrete):
        super().__init__()
        self.args = args
        feat_dim = args.deter + args.stoch
        self.actor = Actor(args, feat_dim, action_dim, discrete)
        self.critic = MLP(feat_dim, 1, 3, args.units)

    def sequences(self, world_model, deter, stoch, noise):
        """What they learn from: feat (N, H, F), action (N, H, A) that led to it, reward and continue (N, H) there."""
        if self.args.predict_continue:  # the authors' code: the last may be the end
            deter, stoch = deter[:, :-1], stoch[:, :-1]
        start = deter.detach().flatten(0, 1), stoch.detach().flatten(0, 1)
        policy = lambda feat, t: self.actor.sample(self.actor(feat.detach()), noise["action"][:, t])  # noqa: E731
        imag_feat, imag_action = world_model.rssm.imagine(start, policy, noise["prior"])
        cont = world_model.cont(imag_feat)  # (N, H)
        return imag_feat, imag_action, world_model.reward(imag_feat), cont

    def loss(self, world_model, deter, stoch, noise):
        """Losses of actor and critic (N, L) by name; stats.

        Eq. 7 and 8 (arXiv:1912.01603v3); deter (B, T, D), stoch (B, T, S); noise: prior (N, H, S), action
        (N, H, 1 or A).
        """
        args = self.args
        imag_feat, imag_action, reward, cont = self.sequences(world_model, deter, stoch, noise)
        value = self.critic(imag_feat).squeeze(-1) if args.critic else torch.zeros_like(reward)  # (N, H)
        lmbda = args.lmbda if args.critic else 1.0
        returns = lambda_return(reward[:, :-1], cont[:, :-1], value[:, 1:], lmbda)  # (N, L)
        imag_feat = imag_feat.detach()  # (N, H, F)
        first = torch.ones_like(cont[:, :1])  # (N, 1)
        weight = torch.cat([first, cont[:, :-1].detach()], 1).cumprod(1)  # (N, H)
        losses = {"actor_loss": -weight[:, :-1] * returns}
        value = self.critic(imag_feat[:, :-1]).squeeze(-1)  # (N, L)
        losses["critic_loss"] = weight[:, :-1] * normal_loss(value, returns.detach())  # (N, L)
        with torch.no_grad():
            entropy = -self.actor.log_prob(self.actor(imag_feat[:, 0]), imag_action[:, 1])  # (N,)
        stats = {
            "actor_entropy": entropy.mean(),
            "value_mean": value.mean(),
            "return_mean": returns.mean(),
            "imagined_reward": reward.mean(),
            "imagined_continue": cont.mean(),
        }
        return losses, stats


# === Agent ============================================================================================================


class Adam:
    """Clipping by the global norm, then Adam as Keras has it."""

    def __init__(self, params, learning_rate, args):
        self.params, self.learning_rate, self.args = list(params), learning_rate, args
        self.square = [torch.zeros_like(p) for p in self.params]
        self.momentum = [torch.zeros_like(p) for p in self.params]
        self.updates = torch.zeros((), dtype=torch.float64, device=self.params[0].device)

    @torch.no_grad()
    def step(self, grads):
        """One update from gradients in the order of the parameters -> their norm."""
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        grads = torch._foreach_mul(grads, self.args.clip / norm.clamp(min=self.args.clip))
        self.updates += 1
        torch._foreach_lerp_(self.momentum, grads, 0.1)
        torch._foreach_mul_(self.square, 0.999)
        torch._foreach_addcmul_(self.square, grads, grads, 0.001)
        rms = torch._foreach_sqrt(self.square)
        torch._foreach_add_(rms, self.args.epsilon)  # PyTorch: after the correction, so that it is smaller at first
        rate = self.learning_rate * (1 - 0.999**self.updates).sqrt() / (1 - 0.9**self.updates)
        torch._foreach_sub_(self.params, torch._foreach_mul(torch._foreach_div(self.momentum, rms), rate))
        return norm

    def state_dict(self):
        return dict(square=self.square, momentum=self.momentum, updates=self.updates)

    def load_state_dict(self, state):
        for mine, saved in zip(self.square + self.momentum, state["square"] + state["momentum"], strict=True):
            mine.copy_(saved)
        self.updates.copy_(state["updates"])


class Agent(nn.Module):
    """World model, behaviour and optimizers: what is trained, what acts, what is saved.
    Changed from planet.py: [C1], [C8]"""

    def __init__(self, args, spaces, action_space, device="cpu"):
        super().__init__()
        self.args, self.device = args, torch.device(device)
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.action_dim = int(action_space.n) if self.discrete else action_space.shape[0]
        self.world_model = WorldModel(args, spaces, self.action_dim)
        self.behaviour = Behaviour(args, self.action_dim, self.discrete)
        self.to(device)
        self.trained = [p for p in self.parameters() if p.requires_grad]
        self.optimizers = {
            "world_model": Adam(self.world_model.parameters(), args.model_rate, args),
            "actor": Adam(self.behaviour.actor.parameters(), args.actor_rate, args),
            "critic": Adam(self.behaviour.critic.parameters(), args.critic_rate, args),
        }
        if args.compile:
            if not can_compile():
                raise Failure("--compile needs a compiler: apt-get install g++ python3-dev (or say --no-compile)")
            model, actor = self.world_model, self.behaviour.actor
            for part, name in ((model.rssm, "obs_step"), (model.rssm, "img_step"), (actor, "forward")):
                setattr(part, name, torch.compile(getattr(part, name), dynamic=False))
        self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=args.amp)

    def replay_spaces(self):
        """What the agent adds to each step of the replay: key -> (shape, dtype)."""
        return {"action": ((self.action_dim,), "float32")}

    def replay_values(self, carry):
        """What it adds, from what acting carries."""
        return {}

    def initial(self, num_envs):
        """What acting carries from step to step, at the start of an episode: deter, stoch, action (E, A)."""
        state = self.world_model.rssm.initial(num_envs)
        return *state, torch.zeros(num_envs, self.action_dim, device=self.device)

    @torch.no_grad()
    def act(self, obs, carry, training=True):
        """Observations with is_first of E environments, what it returned last -> deter, stoch, action (E, A).

        In evaluation, the action is the mode; in training, the sampled one is disturbed.
        Changed from planet.py: [C1]
        """
        deter, stoch, action = carry
        action = action * (1 - obs["is_first"].float().unsqueeze(-1))
        actor = self.behaviour.actor
        with self.autocast():
            embed = self.world_model.encoder({key: value.unsqueeze(1) for key, value in obs.items()})
            steps = action.unsqueeze(1), obs["is_first"].unsqueeze(1), (deter, stoch), self.latent_noise(len(action), 1)
            deter, stoch, _ = (x.squeeze(1) for x in self.world_model.rssm.observe(embed, *steps))
            policy = actor(feature(deter, stoch))
            if training:
                action = self.explore(actor.sample(policy, self.action_noise(len(action))))
            else:
                action = actor.mode(policy, self.action_noise(100, len(action)))
            return deter, stoch, action

    def explore(self, action):
        """Actions (E, A) with noise, in the paper on their mode; of discrete ones, some are replaced by random ones.
        Changed from planet.py: [C2]"""
        args = self.args
        if not self.discrete:
            return (action + args.action_noise * torch.randn_like(action)).clamp(-1, 1)
        progress = (self.optimizers["actor"].updates / args.random_actions_updates).clamp(max=1)
        share = args.random_actions + progress * (args.random_actions_end - args.random_actions)
        replaced = torch.rand(len(action), 1, device=self.device) < share
        return torch.where(replaced, self.random_action(len(action)), action)

    def random_action(self, num_envs):
        """Uniform actions (E, A) for the prefill."""
        if self.discrete:
            action = torch.randint(self.action_dim, (num_envs,), device=self.device)
            return F.one_hot(action, self.action_dim).float()
        return 2 * torch.rand(num_envs, self.action_dim, device=self.device) - 1

    def env_action(self, action):
        """Actions (E, A) -> what the environments take: (E,) or (E, A)."""
        return (action.argmax(-1) if self.discrete else action).cpu().numpy()

    def latent_noise(self, *shape, generator=None):
        """What one state's sample takes: normal (..., S)."""
        device = self.device if generator is None else "cpu"
        return torch.randn(*shape, self.args.stoch, generator=generator, device=device).to(self.device)

    def action_noise(self, *shape):
        """What one action's sample takes: uniform (..., 1) or normal (..., A). [C1]"""
        if self.discrete:
            return torch.rand(*shape, 1, device=self.device)
        return torch.randn(*shape, self.action_dim, device=self.device)

    def noise(self, B, T):
        """All random numbers of one update: post (B, T, S), prior (N, H, S), action (N, H, 1 or A).
        Changed from planet.py: [C1], [C3], [C6]"""
        N, H = B * (T - self.args.predict_continue), self.args.imagination_horizon
        return {"post": self.latent_noise(B, T), "prior": self.latent_noise(N, H), "action": self.action_noise(N, H)}

    def start(self, data):
        """The state before a sequence: zeros."""
        return self.world_model.rssm.initial(len(data["reward"]))

    def update(self, data, noise=None):
        """One step of each optimizer on a batch from the replay -> {}, metrics by key; never waits for the GPU.

        data: observations (B, T, ...), action (B, T, A), reward, is_first, is_last, is_terminal (B, T). With several
        processes each has its share of the batch.
        Changed from planet.py: [C1], [C3], [C6]
        """
        args = self.args
        noise = noise or self.noise(*data["reward"].shape)
        if args.tanh_rewards:
            data = data | {"reward": data["reward"].tanh()}
        with self.autocast():
            losses, deter, stoch, feat, stats = self.world_model.loss(data, self.start(data), noise["post"])
            more, more_stats = self.behaviour.loss(self.world_model, deter, stoch, noise)
        losses = {name: loss.mean() for name, loss in losses.items()}
        more = {name: loss.mean() for name, loss in more.items()}
        scales = {"kl_loss": args.kl_scale, "continue_loss": args.continue_scale}
        total = sum(scales.get(name, 1.0) * loss for name, loss in losses.items())
        self.descend(stats, world_model=total, actor=more["actor_loss"], critic=more["critic_loss"])
        losses, stats = losses | more, stats | more_stats
        metrics = {f"losses/{k}": v for k, v in losses.items()} | {f"stats/{k}": v for k, v in stats.items()}
        return {}, {key: value.detach().float() for key, value in metrics.items()}

    def descend(self, stats, **losses):
        """One step on each loss, by the optimizer's name; all gradients come before the first step."""
        grads = {name: torch.autograd.grad(loss, self.optimizers[name].params) for name, loss in losses.items()}
        for name, grad in grads.items():
            stats[f"{name}_grad_norm"] = self.optimizers[name].step(average(grad))

    def get_extra_state(self):
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def set_extra_state(self, state):
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


def can_compile():
    """Whether torch.compile finds what it needs."""
    headers = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
    return headers and any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


def average(tensors):
    """Means over all processes; the tensors themselves if there is one."""
    if not dist.is_initialized():
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors]) / dist.get_world_size()
    dist.all_reduce(flat)
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


# === Dream ============================================================================================================


class Dream(gym.Env):
    """The learned world model as a Gymnasium environment, for any agent and for `gymnasium.utils.play`.

    It starts in the model's state after `context` steps of the real environment; every step from there is imagined.
    Observations are decoded; info["real"] is what the real environment shows after the same actions, while its episode
    lasts. The dream ends where the continue head says so, or is cut after `length` steps.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}
    render_mode = "rgb_array"

    def __init__(self, agent, env, context=5, length=500):
        self.agent, self.env, self.context, self.length = agent, env, context, length
        self.observation_space = gym.spaces.Dict({k: v for k, v in env.observation_space.items() if k not in FLAGS})
        self.action_space = env.action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.generator = torch.Generator().manual_seed(int(self.np_random.integers(2**31)))
        with torch.random.fork_rng():
            torch.manual_seed(self.generator.initial_seed())
            self.real, self.state = self.env.reset(seed=int(self.np_random.integers(2**31)))[0], self.agent.initial(1)
            for step in range(self.context + 1):
                obs = {key: np.asarray(value)[None] for key, value in self.real.items()}
                self.state = self.agent.act(to_tensors(obs, self.agent.device), self.state)
                if step < self.context:
                    self.real = self.env.step(self.agent.env_action(self.state[2])[0])[0]
        self.steps = 0
        return self.observation(), {"real": self.real}

    @torch.no_grad()
    def step(self, action):
        """An action of the environment's action space."""
        model, agent = self.agent.world_model, self.agent
        action = torch.as_tensor(np.asarray(action), device=agent.device)
        action = (F.one_hot(action, agent.action_dim) if agent.discrete else action).float().unsqueeze(0)
        noise = agent.latent_noise(1, generator=self.generator)
        self.state = *model.rssm.img_step(self.state[:2], action, noise, model.rssm.kernels()), action
        if not self.real["is_last"]:
            self.real = self.env.step(agent.env_action(action)[0])[0]
        self.steps += 1
        feat = feature(*self.state[:2])
        over = bool(model.cont(feat) < 0.5), self.steps >= self.length
        return self.observation(), model.reward(feat).item(), *over, {"real": self.real}

    @torch.no_grad()
    def observation(self):
        feat = feature(*self.state[:2]).unsqueeze(1)
        decoded = self.agent.world_model.decode(feat)
        self.obs = {key: value[0, 0].cpu().numpy()[()] for key, value in decoded.items()}
        return self.obs

    def render(self):
        return picture(self.obs)


def picture(obs):
    """An observation as a picture (H, W, 3): its images side by side or, if there are none, its vectors as bars."""
    images = [obs[key] for key in sorted(obs) if np.ndim(obs[key]) == 3]
    if images:
        return np.concatenate([x[..., :3] if x.shape[-1] >= 3 else np.repeat(x[..., :1], 3, -1) for x in images], 1)
    values = np.concatenate([np.ravel(obs[key]).astype(np.float32) for key in sorted(obs) if key not in FLAGS])
    canvas = np.full((64, max(64, 4 * len(values)), 3), 255, np.uint8)
    for i, height in enumerate(np.rint(31 * np.tanh(values / 2)).astype(int)):
        canvas[32 - max(height, 0) : 33 - min(height, 0), 4 * i : 4 * i + 3] = (60, 90, 160)
    return canvas


@torch.no_grad()
def open_loop(agent, data, context=5):
    """Video (T, 3·H, W, 3): truth, model, error; the model sees `context` steps (framed), then only the actions."""
    model = agent.world_model
    noise = agent.latent_noise(*data["reward"].shape, generator=torch.Generator().manual_seed(0))
    seen = model.encoder(data), data["action"], data["is_first"]
    seen = model.rssm.observe(*(x[:, :context] for x in seen), agent.start(data), noise[:, :context])
    state, feats = (seen[0][:, -1], seen[1][:, -1]), [feature(*seen[:2])]
    for t in range(context, noise.shape[1]):
        state = model.rssm.img_step(state, data["action"][:, t], noise[:, t], model.rssm.kernels())
        feats.append(feature(*state).unsqueeze(1))
    dream = {key: value.cpu().numpy() for key, value in model.decode(torch.cat(feats, 1)).items()}
    truth = {key: data[key].cpu().numpy() for key in dream}
    video = []
    for t in range(noise.shape[1]):
        columns = []
        for b in range(noise.shape[0]):
            true, dreamt = (picture({key: value[b, t] for key, value in obs.items()}) for obs in (truth, dream))
            error = ((dreamt.astype(np.int16) - true + 255) // 2).astype(np.uint8)
            if t < context:
                for frame in (true, dreamt):
                    frame[:2], frame[-2:], frame[:, :2], frame[:, -2:] = [[60, 180, 75]] * 4
            columns.append(np.concatenate([true, dreamt, error]))
        video.append(np.concatenate(columns, 1))
    return np.stack(video)


# === Run ==============================================================================================================


class Log:
    """Scalars and videos -> TensorBoard and metrics.csv (frame, key, value); later rows than `frame` are dropped."""

    def __init__(self, run, frame):
        self.writer = SummaryWriter(run, purge_step=frame + 1)
        path, rows = f"{run}/metrics.csv", [["frame", "key", "value"]]
        if os.path.exists(path):
            with open(path, newline="") as file:
                rows += [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit() and int(row[0]) <= frame]
        self.file = open(path, "w", newline="")
        self.csv = csv.writer(self.file)
        self.csv.writerows(rows)
        self.file.flush()

    def scalars(self, frame, values):
        try:
            for key, value in values.items():
                self.writer.add_scalar(key, value, frame)
                self.csv.writerow([frame, key, float(value)])
            self.file.flush()
        except OSError as error:
            raise Interrupted(f"cannot write the metrics ({error})") from None

    def video(self, frame, key, frames, fps=15):
        """(T, H, W, 3), which TensorBoard shows as an animated GIF."""
        buffer, images = io.BytesIO(), [Image.fromarray(x).quantize(256, dither=Image.Dither.NONE) for x in frames]
        images[0].save(buffer, "GIF", save_all=True, append_images=images[1:], duration=1000 // fps, loop=0)
        size = dict(height=frames.shape[1], width=frames.shape[2], colorspace=3)
        image = Summary.Image(**size, encoded_image_string=buffer.getvalue())
        self.writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=key, image=image)]), frame)


def write_mp4(path, frames, fps=30):
    """Pictures (H, W, 3) -> mp4 file, enlarged to at least 256 lines."""
    import av

    os.makedirs(os.path.dirname(path), exist_ok=True)
    zoom = -(-256 // frames[0].shape[0])
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=fps)
        stream.height, stream.width = (zoom * size // 2 * 2 for size in frames[0].shape[:2])
        for frame in frames:
            frame = frame.repeat(zoom, 0).repeat(zoom, 1)[: stream.height, : stream.width]
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        file.mux(stream.encode())
    print(path)


def to_tensors(values, device):
    """Arrays by key -> tensors on the device."""
    tensors = {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in values.items()}
    if device.type == "cuda":
        tensors = {key: tensor.pin_memory().to(device, non_blocking=True) for key, tensor in tensors.items()}
    return tensors


class Graph:
    """A function of tensors as a CUDA graph: three calls run as they are, then it is captured once and replayed.

    Outputs are overwritten by the next call. On a CPU it is the function itself.
    """

    def __init__(self, function, device):
        self.function, self.device, self.calls = function, device, 0

    def __call__(self, *inputs):
        if self.device.type != "cuda":
            return self.function(*inputs)
        self.calls += 1
        if self.calls <= 3:  # what is initialised or compiled at first use, on a side stream as capturing asks
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(stream)
            return outputs
        if self.calls == 4:
            self.inputs, self.graph = tree_map(torch.clone, inputs), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = self.function(*self.inputs)
        tree_map(lambda mine, new: mine.copy_(new, non_blocking=True), self.inputs, inputs)
        self.graph.replay()
        return self.outputs


def save(path, state):
    """A checkpoint is there whole or not at all: temporary file, fsync, rename. Failure if it cannot be written."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:
        if os.path.exists(f"{path}.tmp"):
            os.remove(f"{path}.tmp")
        raise Failure(f"cannot write {path} ({error}): make room; the checkpoint before it is kept") from None


def load(run, device, resume=False):
    """The checkpoint of a run. Failure if it is missing, cut short, not of this script, or not meant to be resumed."""
    try:
        state = torch.load(f"{run}/checkpoint.pt", map_location=device, weights_only=True)
    except FileNotFoundError:
        raise Failure(f"{run} has no checkpoint.pt: it was stopped before its first save") from None
    except Exception as error:
        raise Failure(f"{run}/checkpoint.pt cannot be read, it is not whole ({type(error).__name__})") from None
    if not isinstance(state, dict) or state.get("script") != SCRIPT:
        raise Failure(f"{run}/checkpoint.pt is not a checkpoint of {SCRIPT}.py")
    if resume and "_extra_state" not in state["agent"]:
        raise Failure(f"{run} can be played and evaluated, but not resumed: it was released without its optimizer")
    return state


def load_agent(agent, state):
    try:
        agent.load_state_dict({"_extra_state": agent.get_extra_state()} | state["agent"])
    except RuntimeError as error:
        raise Failure(f"the checkpoint is of another size: {str(error).splitlines()[-1].strip()}") from None


def random_states(rng, device):
    """States of all random number generators, as a checkpoint can hold them."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return dict(python=random.getstate(), sampling=rng.bit_generator.state, torch=torch.get_rng_state(), cuda=cuda)


def set_random_states(states, rng, device):
    random.setstate(states["python"])
    rng.bit_generator.state = states["sampling"]
    torch.set_rng_state(states["torch"].cpu())
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)


def restore_envs(envs, replay, agent, first, seed, episodes, lengths):
    """Brings the environments to where the replay ends, by their episodes' seeds and the actions taken since then.

    One that does not come back to the observation it had is not deterministic: it starts a fresh episode.
    """
    last, states, lost = (replay.count - 1) % replay.capacity, {}, []
    for env, (episode, length) in enumerate(zip(episodes.tolist(), lengths, strict=True)):
        rows = np.arange(replay.count - length, replay.count) % replay.capacity
        states[first + env] = seed, episode, agent.env_action(torch.from_numpy(replay.arrays["action"][rows, env]))
    for env, obs in enumerate(envs.call("restore", states)):
        if any(not np.array_equal(replay.arrays[key][last, env], value) for key, value in obs.items()):
            lost.append(first + env)
    if lost:
        print(f"environments {lost} are not deterministic: fresh episodes start there", file=sys.stderr)
        envs.call("abandon", lost)


def setup(args):
    """Device and numerical settings, joining the other processes of `torchrun` -> device, rank, number of processes."""
    cuda = args.cuda and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if args.num_envs % world or args.batch_size % world:
        raise Failure(f"--num-envs {args.num_envs} and --batch-size {args.batch_size} must be multiples of {world}")
    torch.backends.cudnn.deterministic = args.torch_deterministic
    torch.set_float32_matmul_precision("high")
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    if not cuda and sys.platform == "linux":  # glibc is to keep freed memory: 40,000 page faults less in an update
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-4, 0)
            libc.mallopt(-1, 2**31 - 1)
    return device, rank, world


def agree(flag, device):
    """Whether the flag is up in any process."""
    if not dist.is_initialized():
        return flag
    flag = torch.tensor(float(flag), device=device)
    dist.all_reduce(flag)
    return bool(flag > 0)


def start_log(args, run, frame, agent, replay):
    """Writes and prints what runs, opens the log."""
    saved = dataclasses.asdict(args) | {"script": SCRIPT}
    with open(f"{run}/args.json", "w") as file:
        json.dump(saved, file, indent=1)
    if args.track:
        import wandb

        name = os.path.basename(run)
        wandb.init(
            project=args.wandb_project_name, entity=args.wandb_entity, name=name, config=saved, sync_tensorboard=True
        )
    log = Log(run, frame)
    log.writer.add_text("args", show(saved))
    print(show(saved))
    print(
        f"{run}: {sum(p.numel() for p in agent.trained):,} parameters, {agent.device}; {args.total_timesteps:,} frames"
        f" of the environment, {args.action_repeat} for each action; at most {replay.bytes / 1e9:.1f} GB of replay"
    )
    return log


def evaluate(agent, args, seed, frames=None):
    """Returns of `eval_episodes` episodes, one in each of as many environments; `frames` gets pictures of the first."""
    envs = make_envs(args, args.eval_episodes)
    obs = envs.reset(seed=[seed] * envs.num_envs)[0]
    carry, returns, over = agent.initial(envs.num_envs), np.zeros(envs.num_envs), np.zeros(envs.num_envs, bool)
    while not over.all():
        if frames is not None and not over[0]:
            first = {key: value[0] for key, value in obs.items()}
            pixels = any(np.ndim(value) == 3 for value in first.values())
            frames.append(picture(first) if pixels else np.array(envs.call("render")[0]))
        carry = agent.act(to_tensors(obs, agent.device), carry, training=False)
        obs, reward, *_ = envs.step(agent.env_action(carry[2]))
        returns += np.where(over, 0, reward)
        over |= obs["is_last"] > 0
    envs.close()
    return returns


def record(agent, args, replay, log, run, frame):
    """Open-loop video and evaluation in the middle of training."""
    if len(replay):
        data, _ = replay.get(replay.draw(4, np.random.default_rng(frame)))
        log.video(frame, "video/open_loop", open_loop(agent, to_tensors(data, agent.device)))
    if args.eval_episodes:
        frames = [] if args.capture_video else None
        returns = evaluate(agent, args, args.seed + frame, frames)
        log.scalars(frame, {"eval/episodic_return": returns.mean(), "eval/episodic_return_std": returns.std()})
        if frames:
            log.video(frame, "video/eval", np.stack(frames[::2]))
            write_mp4(f"{run}/videos/eval_{frame}.mp4", frames)


def train(args):
    """Trains until `total_timesteps`, from the start or from a checkpoint; returns the run directory.
    Changed from planet.py: [C9]"""
    device, rank, world = setup(args)
    name = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{int(time.time())}"
    names = [args.resume or f"{args.run_dir}/{name}"]
    if world > 1:
        dist.broadcast_object_list(names)
    run, state, own = names[0], None, {}
    if args.resume:
        state = load(run, device, resume=True)
        if len(state["processes"]) != world:
            raise Failure(f"{run} was trained by {len(state['processes'])} processes: resume it with as many")
        own = state["processes"][rank]
    num_envs, batch_size = args.num_envs // world, args.batch_size // world
    envs = make_envs(args, num_envs, rank * num_envs)
    parallel = isinstance(envs, gym.vector.AsyncVectorEnv)
    spaces = {key: space for key, space in envs.single_observation_space.items() if key not in FLAGS}
    agent = Agent(args, spaces, envs.single_action_space, device)
    stored = {key: (space.shape, space.dtype) for key, space in spaces.items()} | {key: ((), "bool") for key in FLAGS}
    stored |= {"reward": ((), "float32")} | agent.replay_spaces()
    size = min(args.replay_size, args.total_timesteps // args.action_repeat + args.num_envs) // args.num_envs
    folder = f"{run}/replay/{rank}" if world > 1 else f"{run}/replay"
    gone = [key for key in stored if state and not os.path.exists(f"{folder}/{key}.npy")]
    if gone:
        raise Failure(f"{folder} lacks {gone}: without its replay the run cannot go on")
    replay = Replay(folder, stored, num_envs, max(size, own.get("capacity", 0)), args.batch_length)
    rng = np.random.default_rng([args.seed, rank])
    torch.manual_seed(args.seed + rank)
    step, updates, due, due_from, sums = 0, 0, 0, None, {}
    episode, episode_return, episode_length = (np.zeros(num_envs, dtype) for dtype in (np.int64, np.float64, np.int64))
    if state:
        load_agent(agent, state)
        replay.load_state_dict(own["replay"])
        step, updates, due, due_from = (state[key] for key in ("step", "updates", "due", "due_from"))
        carry, sums = own["carry"], own["sums"]
        episode, episode_return, episode_length = (x.cpu().numpy() for x in own["episodes"])
        restore_envs(envs, replay, agent, rank * num_envs, args.seed, episode, episode_length)
        set_random_states(own["random"], rng, device)
        state = True  # what it held is in place
    frame = step * args.action_repeat
    log = start_log(args, run, frame, agent, replay) if rank == 0 else None
    act, update, batch = Graph(agent.act, device), Graph(agent.update, device), None

    def fetch():
        data, index = replay.sample(batch_size, rng)
        return to_tensors(data, device), index

    def take(obs, reward, carry):
        """Lets the agent see a step and act, and puts the step in the replay -> what acting carries on."""
        obs = {key: value.astype(bool) if key in FLAGS else value for key, value in obs.items()}
        tensors = to_tensors(obs, device)
        action = torch.where(tensors["is_first"].unsqueeze(-1), 0, carry[2])
        carry = tuple(x.clone() for x in act(tensors, carry))
        if step < args.prefill:
            carry = *carry[:2], agent.random_action(num_envs)
        replay.add(obs | {"reward": reward, "action": action.cpu()} | agent.replay_values(carry))
        return carry

    def checkpoint():
        """Everything, so that the run goes on as if it had not stopped."""
        replay.flush()
        mine = dict(replay=replay.state_dict(), capacity=replay.capacity, carry=carry, sums=sums)
        episodes = [torch.from_numpy(x) for x in (episode, episode_return, episode_length)]
        mine |= dict(episodes=episodes, random=random_states(rng, device))
        everyone = [mine] * world
        if world > 1:
            dist.gather_object(mine, everyone if rank == 0 else None)
        if rank == 0:
            whole = dict(script=SCRIPT, agent=agent.state_dict(), step=step, updates=updates, due_from=due_from)
            save(f"{run}/checkpoint.pt", whole | dict(due=due, processes=everyone))

    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    if not state:
        try:
            obs = envs.reset(seed=[args.seed] * num_envs)[0]
        except Exception as error:
            raise Failure(f"the environment does not start: {error}") from error
        carry = take(obs, np.zeros(num_envs), agent.initial(num_envs))
        step, frame = args.num_envs, args.num_envs * args.action_repeat
    saved_at, row_at = time.time(), (time.time(), frame)
    bar = tqdm(total=args.total_timesteps, initial=frame, unit="frames", disable=rank > 0, smoothing=0.05)
    try:
        while frame < args.total_timesteps and not agree(bool(signals), device):
            replay.reserve()
            action = agent.env_action(carry[2])
            if parallel:
                envs.step_async(action)  # the environments run while the model learns
            burst, due_from = updates_due(args, step, due_from, not agree(not len(replay), device))
            due += burst
            while due:
                started = time.time()
                data, index = batch or fetch()
                latents, metrics = update(data)
                batch = fetch() if device.type == "cuda" else None  # while the GPU works
                values = torch.stack(list(metrics.values())).tolist()
                for key, value in zip([*metrics, "count"], [*values, 1], strict=True):
                    if not math.isfinite(value):
                        raise Failure(f"{key} is {value}, update {updates}, frame {frame}: the last checkpoint is kept")
                    sums[key] = sums.get(key, 0.0) + value
                replay.write(index, {key: value.cpu().numpy() for key, value in latents.items()})
                updates, due = updates + 1, due - 1
                if updates == 3 and device.type == "cpu" and rank == 0:
                    left = (args.total_timesteps - frame) / args.action_repeat * updates_per_step(args)
                    tell_cost(time.time() - started, left)
                if due and agree(bool(signals), device):
                    break
            if due:  # a signal came in a burst of updates: --resume begins with the rest
                break
            try:
                obs, reward, *_ = envs.step_wait() if parallel else envs.step(action)
            except (EOFError, ConnectionError):
                raise
            except Exception as error:
                traceback.print_exc()
                text = " ".join(str(error).split())
                raise Interrupted(f"an environment raised {type(error).__name__}: {text}, frame {frame}") from None
            if not np.isfinite(reward).all():
                raise Interrupted(f"an environment gave the reward {reward[~np.isfinite(reward)][0]} at frame {frame}")
            carry = take(obs, reward, carry)
            step += args.num_envs
            before, frame = frame, step * args.action_repeat
            passed = [every and frame // every > before // every for every in (args.log_every, args.eval_every)]
            episode = episode + obs["is_first"]
            episode_return = np.where(obs["is_first"], 0, episode_return + reward.astype(np.float32))
            episode_length = np.where(obs["is_first"], 0, episode_length + 1)
            if rank == 0:
                bar.update(frame - before)
                for env in np.flatnonzero(obs["is_last"]):
                    log.scalars(frame, {"charts/episodic_return": episode_return[env]})
                    log.scalars(frame, {"charts/episodic_length": episode_length[env] * args.action_repeat})
                    bar.set_postfix_str(f"return {episode_return[env]:.1f}, updates {updates}")
                if passed[0] and sums:
                    row = {key: value / sums["count"] for key, value in sums.items() if key != "count"}
                    row |= {"charts/SPS": (frame - row_at[1]) / (time.time() - row_at[0]), "charts/updates": updates}
                    log.scalars(frame, row)
                    sums, row_at = {}, (time.time(), frame)
                if passed[1]:
                    record(agent, args, replay, log, run, frame)
            if agree(time.time() - saved_at > args.save_every * 60, device):
                checkpoint()
                saved_at = time.time()
        checkpoint()
    except Interrupted as error:
        checkpoint()
        raise Failure(f"{error}; saved: --resume {run} continues") from None
    except (EOFError, ConnectionError):  # of a process of an environment; a signal may have been for the whole group
        for process in getattr(envs, "processes", []):
            process.kill()
        envs.closed = True
        checkpoint()
        if not signals:
            raise Failure(f"the process of an environment died at frame {frame}; --resume {run} continues") from None
    finally:
        act = update = None  # their graphs hold operations of the group of processes
        bar.close()
        gym.logger.min_level = 50  # it warns when a step is pending
        try:
            envs.close()
        except (EOFError, ConnectionError):
            envs.closed = True
    if signals:
        print(f"stopped at frame {frame} and saved: --resume {run} continues")
        sys.exit(128 + signals[0])
    return run


def updates_per_step(args):
    """Updates for each step of an environment. Changed from planet.py: [C9]"""
    return args.train_steps / args.train_every


def updates_due(args, step, due_from, ready):
    """Updates to do now, and the step up to which all are done then; None before the replay holds a first batch.
    Changed from planet.py: [C9]"""
    if due_from is None and step > args.prefill + 100_000:
        raise Interrupted(f"no complete episode of more than {args.batch_length} steps: lower --batch-length")
    if not ready or step < args.prefill:
        return 0, due_from
    if due_from is None:
        return args.pretrain, step
    due = (step - due_from) // args.train_every
    return due * args.train_steps, due_from + due * args.train_every


def tell_cost(seconds, updates):
    """Without a GPU, nobody should find out at hour nine."""
    hours = seconds * updates / 3600
    hint = "; with --obs state, where there is one, they take a fraction" if hours > 24 else ""
    tqdm.write(f"an update takes {seconds:.2f} s on this CPU, the {updates:,.0f} to come {hours:.1f} hours{hint}")


def load_run(args, run):
    """The agent of a run and one of its environments."""
    device, *_ = setup(args)
    env = make_env(args)
    spaces = {key: space for key, space in env.observation_space.items() if key not in FLAGS}
    agent = Agent(args, spaces, env.action_space, device)
    load_agent(agent, load(run, device))
    return agent, env


def score(args):
    """--evaluate: prints mean and standard deviation over episodes; with --capture-video writes the first as mp4."""
    agent, _ = load_run(args, args.evaluate)
    frames = [] if args.capture_video else None
    returns = evaluate(agent, args, args.seed, frames)
    print(f"{args.env_id}: {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes")
    if frames:
        write_mp4(f"{args.evaluate}/videos/evaluate.mp4", frames)


PAGE = """<!doctype html><meta charset=utf-8><title>Dream</title>
<style>body{font:16px sans-serif;margin:2em;background:#111;color:#ddd}
img{height:320px;image-rendering:pixelated}</style>
<h3>You act, the model dreams: <span id=text></span></h3>
<img id=dream> <img id=real>
<p>Left the dream; right what the real environment shows after the same actions.</p>
<p>Keys: <span id=keys></span>; r starts a new dream; hold a key to go on.</p>
<script>
const held = new Set(); let busy = false
async function ask(path) {
  busy = true; const state = await (await fetch(path)).json(); busy = false
  for (const id of ["dream", "real"]) {
    const image = document.getElementById(id); image.hidden = !state[id]
    if (state[id]) image.src = "data:image/png;base64," + state[id]
  }
  for (const id of ["text", "keys"]) document.getElementById(id).textContent = state[id]
}
onkeydown = event => { event.preventDefault(); held.add(event.key); if (event.key == "r") ask("/reset") }
onkeyup = event => held.delete(event.key)
setInterval(() => {
  if (!busy && held.size && !held.has("r")) ask("/step?" + new URLSearchParams([...held].map(key => ["key", key])))
}, 60)
ask("/reset")
</script>"""
KEYS = ["ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown", "d", "a", "w", "s", "l", "j", "i", "k", *"1234567890"]


def key_action(keys, space):
    """Keys held -> action: a key for each discrete action but the first, or two for each dimension, plus and minus."""
    down = [key in keys for key in KEYS]
    if isinstance(space, gym.spaces.Discrete):
        return down.index(True) + 1 if True in down[: int(space.n) - 1] else 0
    signs = [float(plus) - float(minus) for plus, minus in zip(down[::2], down[1::2], strict=True)]
    return np.array((signs + [0.0] * space.shape[0])[: space.shape[0]], np.float32)


def png(frame):
    """(H, W, 3) -> PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def play(args):
    """--play: a page on 127.0.0.1 where you act in the dream; with --capture-video an mp4 of the actor in it.
    Changed from planet.py: [C1]"""
    agent, env = load_run(args, args.play)
    dream = Dream(agent, env)
    obs, info = dream.reset(seed=args.seed)
    if args.capture_video:
        frames, over = [], False
        while not over and len(frames) < 200:
            frames.append(np.concatenate([picture(obs), picture(info["real"])], 1))
            with torch.no_grad():
                policy = agent.behaviour.actor(feature(*dream.state[:2]))
                action = agent.behaviour.actor.sample(policy, agent.action_noise(1))
            obs, _, terminated, truncated, info = dream.step(agent.env_action(action)[0])
            over = terminated or truncated
        return write_mp4(f"{args.play}/videos/dream.mp4", frames, fps=15)
    used = int(dream.action_space.n) - 1 if agent.discrete else 2 * agent.action_dim
    total = 0.0

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            nonlocal total
            url = urllib.parse.urlparse(self.path)
            if url.path == "/":
                return self.reply("text/html", PAGE)
            if url.path == "/reset":
                (obs, info), total, text = dream.reset(), 0.0, "a new dream"
            elif url.path == "/step":
                keys = urllib.parse.parse_qs(url.query).get("key", [])
                obs, reward, terminated, truncated, info = dream.step(key_action(keys, dream.action_space))
                total += reward
                text = f"step {dream.steps}, reward {reward:.2f}, return {total:.1f}"
                text += ", the end" * (terminated or truncated)
            else:
                return self.send_error(404)
            frames = dict(dream=png(picture(obs)), real=png(picture(info["real"])))
            self.reply("application/json", json.dumps(frames | dict(text=text, keys=" ".join(KEYS[:used]))))

        def reply(self, kind, body):
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    port = server.server_port
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        print(f"http://127.0.0.1:{port} (on a remote machine: ssh -L {port}:127.0.0.1:{port} <host>)", flush=True)
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


def main(argv=None):
    sys.stdout.reconfigure(line_buffering=True)
    try:
        args = parse_args(argv)
        return score(args) if args.evaluate else play(args) if args.play else train(args)
    except Failure as failure:
        print(f"{SCRIPT}.py: {failure}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
