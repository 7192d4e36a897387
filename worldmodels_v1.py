"""World Models (Ha & Schmidhuber 2018), arXiv:1803.10122v4; shorter at NeurIPS 2018, arXiv:1809.01999.

Authors' code: github.com/hardmaru/WorldModelsExperiments at fd982b9. Where paper and code disagree, the line says so.

    python worldmodels_v1.py --env-id CarRacing-v3 --quick              # all of it within an hour on two cores
    python worldmodels_v1.py --env-id CarRacing-v3                      # the paper's recipe, for a large machine
    python worldmodels_v1.py --env-id VizdoomTakeCover-v1               # the controller evolves in the dream alone
    python worldmodels_v1.py --resume runs/<run>                        # go on exactly where it stopped
    python worldmodels_v1.py --evaluate runs/<run> | --play runs/<run>  # score it | act inside its dream

V, a variational auto-encoder, compresses each frame to z. M, an LSTM with a mixture of Gaussians, predicts the next z.
C, a controller of one layer, sees z and M's state, and CMA-ES evolves it in the environment or in M's dream. They are
trained one after the other, in stages: collect, train_vae, encode, train_rnn, evolve. --iterations repeats them, with
episodes of the controller. A stage whose result is in the run directory is not done again. Names are those of the other
scripts: V is `encoder` and `decoder`, M is `rssm`.

Ours: heads for reward and continuation beside M's mixture, so that any environment can be dreamt (the authors have
one for the end, in TakeCover alone); rewards are normalised for M; one episode in 20 is held out to score M.

Not copied from the authors' code: frames are neither stretched in contrast nor shifted by one modulo 256; at an
episode's start M's state is zero (their graph feeds that of the chunk before); no bonus for large weights (their weight
decay has the wrong sign); M sees the move that TakeCover is sent, not the output behind it; a frame after which nothing
follows is no target of M's; frames for V are drawn with replacement; parameters are not rounded to 1e-4. M is trained
on episodes laid end to end, its state carried on (theirs: 100 whole episodes at a time, from zero), and sees actions in
[-1, 1], gas and brake too; its mixture's biases start at 0; all candidates of a generation get the same tracks; of the
means that were evaluated the best in the environment is kept, also where C evolves in the dream (theirs: in the dream).

Shapes: B batch, T time, N frames, P candidates, R dreams of each, M = P*R, A action, U outputs, S stoch (z), D deter (h
and c), H = D/2, C channels, W parameters of a controller. Arrays are (B, T, ...).
"""

import base64
import contextlib
import csv
import ctypes
import dataclasses
import http.server
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import multiprocessing.connection
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
import warnings
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

    # World Models. Defaults: the paper's and the authors' code for CarRacing
    quick: bool = False
    """the suite's small preset: CarRacing-v3 in an hour on two CPU cores"""
    iterations: int = 1
    """times that all stages are gone through; from the second on, the controller collects"""
    rollouts: int = 10_000
    """collect: episodes in each iteration"""
    policy: Literal["agent", "brown", "held"] = "agent"
    """collect: random agents as the authors' for CarRacing, a random walk, or random actions held for 1 to 10 steps"""
    collect_noise: float = 0.1
    """collect, from the second iteration on: standard deviation of the noise on the controller's outputs"""
    shortest: int = 0
    """collect: steps that an episode must be longer than to be kept"""
    crop: float = 1.0
    """share of the image's rows, from the top, that V sees"""
    stoch: int = 32
    """numbers of the latent z"""
    depth: int = 32
    """V: channels of the first convolution, then times 2, 4, 8"""
    kl_tolerance: float = 0.5
    """V: nats for each of the latent's numbers, below whose sum the KL gives no gradient"""
    vae_updates: int = 1_000_000
    """V: updates; the code's 10 epochs of 10M frames (paper: 1 epoch)"""
    vae_batch_size: int = 100
    """V: frames of a batch"""
    vae_rate: float = 1e-4
    """V: learning rate"""
    vae_decay: float = 1.0
    """V: factor for each update by which the learning rate falls to 1e-5"""
    deter: int = 256
    """M: units of the LSTM"""
    num_mixtures: int = 5
    """M: Gaussians of each number of the latent"""
    layer_norm: bool = False
    """M: layer normalisation in the LSTM"""
    restart_input: bool = False
    """M: sees which step is an episode's first"""
    dropout: float = 0.0
    """M: share of the LSTM's candidates that is dropped while it is trained"""
    done_weight: float = 1.0
    """M: weight of the steps that end an episode in the continue loss"""
    rnn_updates: int = 4000
    """M: updates, as in the authors' code (paper: 20 epochs)"""
    batch_size: int = 100
    """M: sequences of a batch"""
    batch_length: int = 999
    """M: steps of a sequence"""
    rnn_rate: float = 1e-3
    """M: learning rate"""
    rnn_decay: float = 1.0
    """M: factor for each update by which the learning rate falls to 1e-5"""
    clip: float = 1.0
    """M: largest size of each number of the gradient"""
    controller_inputs: Literal["z", "zh", "zch"] = "zh"
    """C: what it sees: the latent, the LSTM's output, its cell"""
    controller_hidden: int = 0
    """C: units of a hidden layer; 0 for none"""
    controller_bias: bool = True
    """C: layers have biases"""
    sample_latent: bool = True
    """C: acts on a sample of V's latent, as in the paper, not on its mean"""
    brake: int | None = None
    """C: the action that is 0 for half of the outputs, clip(tanh u, 0, 1): CarRacing's brake"""
    moves: bool = False
    """C: one output for three actions, above 1/3 action 1, below -1/3 action 2, else 0, as in TakeCover"""
    train_controller_in: Literal["env", "dream"] = "env"
    """evolve: where candidates are scored"""
    generations: int = 1800
    """evolve: generations of CMA-ES in each iteration"""
    population: int = 64
    """evolve: candidates of a generation"""
    candidate_rollouts: int = 16
    """evolve: episodes or dreams whose mean return is a candidate's fitness, the same ones for all of a generation"""
    sigma: float = 0.1
    """evolve: initial standard deviation of CMA-ES"""
    patience: int = 0
    """evolve: steps without positive reward after which an episode is left; 0 for never; evaluation never leaves one"""
    eval_generations: int = 25
    """evolve: generations between evaluations of the distribution's mean; the best is kept; --eval-every 0: none"""
    temperature: float = 1.0
    """dream: divides the mixture's logits, multiplies its variances; TakeCover: 1.15 (code: 1.25)"""
    dream_dropout: float = 0.0
    """dream: share of the LSTM's candidates that is dropped"""
    dream_length: int = 1000
    """dream: steps after which it is cut while the controller evolves"""
    dream_context: int = 0
    """dream: real steps before it, from anywhere in an episode; 0 to start with an episode's first frame"""


CORES = os.cpu_count() or 1
PRESETS = {  # by the first word of --env-id, then by that word and --quick
    "carracing": dict(
        total_timesteps=2_000_000_000, num_envs=CORES, image_size=96, crop=0.875, brake=2, eval_episodes=1024
    ),
    "carracing-quick": dict(
        total_timesteps=2_000_000, action_repeat=4, rollouts=60, policy="brown", vae_updates=1000, vae_batch_size=32,
        vae_rate=1e-3, vae_decay=0.997, deter=64, rnn_updates=400, batch_size=16, batch_length=64, generations=60,
        population=32, candidate_rollouts=1, sample_latent=False, patience=25, eval_generations=10, eval_episodes=10,
        dream_length=250, log_every=100,
    ),
    "vizdoomtakecover": dict(
        total_timesteps=100_000_000, num_envs=CORES, time_limit=2100, image_size=96, crop=5 / 6, policy="held",
        shortest=100, stoch=64, deter=512, restart_input=True, done_weight=10.0, vae_updates=308_000,
        rnn_updates=24_400, batch_length=499, rnn_decay=0.99999, moves=True, controller_inputs="zch",
        controller_bias=False, train_controller_in="dream", temperature=1.15, dream_length=2100, eval_episodes=100,
    ),
}  # fmt: skip
SCRIPT = Args().exp_name
SIDE = 64  # height and width of what V sees
STAGES = ("collect", "train_vae", "encode", "train_rnn", "evolve")
FREE = "exp_name torch_deterministic cuda track wandb_project_name wandb_entity capture_video resume evaluate play "
FREE += "run_dir eval_every eval_episodes log_every save_every compile amp total_timesteps num_envs generations "
FREE += "eval_generations temperature dream_dropout dream_length"  # these can change on --resume
FIXED = [field.name for field in dataclasses.fields(Args) if field.name not in FREE.split()]


class Failure(Exception):
    """Something that the user has to put right: ends the run with one line and exit code 2."""


class Interrupted(Failure):
    """A failure from outside: what was learnt until then is saved first."""


def parse_args(argv=None):
    """Command line -> Args: defaults, then the run's own or the suite's preset, then the flags that were given."""
    argv = sys.argv[1:] if argv is None else list(argv)
    presets = "\n".join(f"    {name}: {show(preset)}" for name, preset in PRESETS.items())
    text = f"{__doc__}\nPresets by the first word of --env-id, and --quick:\n{presets}"
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
        args.env_id = saved["env_id"] if saved["env_id"].endswith(f":{args.env_id}") else args.env_id
        fixed = [name for name in FIXED if getattr(args, name) != saved[name]]
        if args.resume and fixed:
            raise Failure(f"{run} was started with other values of {fixed}: they cannot change on --resume")
    else:
        name = suite(args.env_id)
        if args.quick and f"{name}-quick" not in PRESETS:
            raise Failure(f"--quick: there is no small preset for {args.env_id}")
        quick = PRESETS.get(f"{name}-quick", {}) if args.quick else {}
        args = cli(dataclasses.replace(Args(), obs="pixels", **PRESETS.get(name, {}) | quick))
    if args.env_id.startswith("Vizdoom"):
        if importlib.util.find_spec("vizdoom") is None:
            raise Failure(f"--env-id {args.env_id}: VizDoom is not installed: pip install vizdoom==1.3.2")
        args.env_id = f"vizdoom.gymnasium_wrapper:{args.env_id}"  # the module that registers it
    if args.obs != "pixels":
        raise Failure(f"--obs {args.obs}: V sees pixels alone")
    if args.temperature <= 0 or not 0 <= args.dream_dropout < 1:
        raise Failure("--temperature must be above 0, --dream-dropout at least 0 and below 1")
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


class Rollouts:
    """Episodes on disk, one after the other, as memory-mapped arrays (capacity, ...) that grow.

    Step t holds observation t, the action that led to it, its reward, its flags and, once V is trained, its latent.
    Failure when the disk is full; nothing that was written before is lost then.
    """

    def __init__(self, folder, spaces, steps):
        self.folder, self.spaces, self.count, self.capacity = folder, spaces, 0, 0
        self.bytes = steps * sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in spaces.values())

    def grow(self, capacity):
        """Room for more steps: NumPy's header leaves room to change the length; the file gets it without writing."""
        self.capacity, self.arrays = capacity, {}
        for key, (shape, dtype) in self.spaces.items():
            path = f"{self.folder}/{key}.npy"
            if not os.path.exists(path):
                np.lib.format.open_memmap(path, "w+", dtype, (1, *shape))
            with open(path, "r+b") as file:
                header = dict(descr=np.lib.format.dtype_to_descr(np.dtype(dtype)), fortran_order=False)
                np.lib.format.write_array_header_1_0(file, header | dict(shape=(capacity, *shape)))
                file.truncate(file.tell() + capacity * int(np.prod(shape)) * np.dtype(dtype).itemsize)
            self.arrays[key] = np.lib.format.open_memmap(path, "r+")

    def add(self, episode):
        """Appends an episode: key -> array (steps, ...)."""
        stop = self.count + len(episode["reward"])
        if stop > self.capacity:
            self.grow(max(stop, 2 * self.capacity))
        for key, array in self.arrays.items():
            size = array[:1].nbytes
            with open(f"{self.folder}/{key}.npy", "r+b") as file:  # a mapped file on a full disk kills the process
                try:
                    if hasattr(os, "posix_fallocate"):
                        os.posix_fallocate(file.fileno(), array.offset + self.count * size, (stop - self.count) * size)
                except OSError as error:
                    raise Interrupted(f"no room for the rollouts in {self.folder} ({error.strerror})") from None
            if key in episode:
                array[self.count : stop] = episode[key]
        self.count = stop

    def episodes(self, held_out=None):
        """First step and number of steps of the episodes: (n, 2); all, those held out (every 20th), or the others."""
        first = np.flatnonzero(self.arrays["is_first"][: self.count])
        both = np.stack([first, np.diff(first, append=self.count)], 1)
        return both if held_out is None else both[(np.arange(len(both)) % 20 == 0) == held_out]

    def streams(self, episodes, batch_size, length):
        """Episodes, one after the other, cut in `batch_size` streams, these in chunks: their steps (n, B, T)."""
        steps = np.concatenate([np.arange(first, first + size) for first, size in episodes])
        chunks = len(steps) // (batch_size * length)
        steps = steps[: chunks * batch_size * length].reshape(batch_size, chunks, length)
        return steps.transpose(1, 0, 2)

    def get(self, steps, keys):
        return {key: self.arrays[key][steps] for key in keys}

    def flush(self):
        for array in self.arrays.values():
            array.flush()

    def load(self, count):
        """Goes back to where it held `count` steps; Failure if what it held is not there, or the disk is too small."""
        gone = [key for key in self.spaces if count and not os.path.exists(f"{self.folder}/{key}.npy")]
        if gone:
            raise Failure(f"{self.folder} lacks {gone}: without its rollouts the run cannot go on")
        os.makedirs(self.folder, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if self.bytes > free + sum(f.stat().st_blocks * 512 for f in os.scandir(self.folder)):
            raise Failure(
                f"the rollouts need {self.bytes / 1e9:.1f} GB in {self.folder}, where {free / 1e9:.1f} GB are free: "
                "make room, or lower --rollouts"
            )
        self.grow(max(count, 1))
        self.count = count


# === Maths ============================================================================================================


def vae_losses(image, recon, mean, logvar, tolerance):
    """Images (N, ...) in [0, 1], latents (N, S) -> squared error summed over the image, KL with its floor: (N,).

    arXiv:1803.10122v4, appendix, Variational Autoencoder; the floor, of the code, holds for the sum over the latent,
    for each example on its own.
    """
    kl = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(-1)
    return (image - recon).square().flatten(1).sum(-1), kl.clamp(min=tolerance * mean.shape[-1])


def mdn_log_prob(logits, mean, log_std, target):
    """Log-density of targets (...) under mixtures of Gaussians (..., K), each number with weights of its own.

    arXiv:1803.10122v4, appendix, Recurrent Neural Network.
    """
    log_weight = logits.log_softmax(-1)
    error = (target.unsqueeze(-1) - mean) * (-log_std).exp()
    return (log_weight - 0.5 * error.square() - log_std - 0.5 * math.log(2 * math.pi)).logsumexp(-1)


def mdn_sample(logits, mean, log_std, uniform, normal, temperature):
    """A sample (...) of mixtures (..., K) from uniform and normal noise (...).

    The temperature divides the logits and multiplies the variance (arXiv:1803.10122v4, appendix, Recurrent Neural
    Network). Written out: softmax over few is slow on a CPU.
    """
    weight = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp().cumsum(-1)
    index = (weight[..., :-1] < uniform.unsqueeze(-1) * weight[..., -1:]).sum(-1, keepdim=True)
    mean, log_std = mean.gather(-1, index).squeeze(-1), log_std.gather(-1, index).squeeze(-1)
    return mean + log_std.exp() * math.sqrt(temperature) * normal


def tanh(x):
    """From the sigmoid, which a CPU computes several times as fast."""
    return 2 * (2 * x).sigmoid() - 1


def decayed(rate, decay, update):
    """Learning rate of an update, which falls to 1e-5."""
    return (rate - 1e-5) * decay**update + 1e-5


# === Networks =========================================================================================================


def initialise(module):
    """Glorot's uniform weights and biases of zero, as TensorFlow 1's layers."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


class Encoder(nn.Module):
    """V's first half: images (..., 64, 64, C) -> mean and log-variance of the latent, side by side (..., 2 S)."""

    def __init__(self, args, channels):
        super().__init__()
        depths = [channels] + [args.depth * m for m in (1, 2, 4, 8)]
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 4, 2) for pair in zip(depths[:-1], depths[1:], strict=True))
        self.mean, self.logvar = (nn.Linear(4 * depths[-1], args.stoch) for _ in range(2))
        initialise(self)

    def forward(self, image):
        x = image.flatten(0, -4).permute(0, 3, 1, 2) / 255
        for conv in self.convs:
            x = F.relu(conv(x))
        x = x.flatten(1)
        return torch.cat([self.mean(x), self.logvar(x)], -1).float().unflatten(0, image.shape[:-3])


class Decoder(nn.Module):
    """V's second half: latents (..., S) -> images (..., 64, 64, C) in [0, 1]."""

    def __init__(self, args, channels):
        super().__init__()
        depths = [args.depth * m for m in (32, 4, 2, 1)] + [channels]
        self.map = nn.Linear(args.stoch, depths[0])
        layers = zip(depths[:-1], depths[1:], (5, 5, 6, 6), strict=True)
        self.convs = nn.ModuleList(nn.ConvTranspose2d(inp, out, kernel, 2) for inp, out, kernel in layers)
        initialise(self)

    def forward(self, stoch):
        x = self.map(stoch.flatten(0, -2))[..., None, None]
        for conv in self.convs[:-1]:
            x = F.relu(conv(x))
        return self.convs[-1](x).float().sigmoid().permute(0, 2, 3, 1).unflatten(0, stoch.shape[:-1])


class LSTM(nn.Module):
    """LSTM with gates in the order i, j, f, o and 1 added to f; layer normalisation as in TensorFlow 1's contrib.

    With it there is no bias, and the normalised cell is the one that is carried on.
    """

    def __init__(self, inp, units, layer_norm):
        super().__init__()
        self.inp, self.units, self.layer_norm = inp, units, layer_norm
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(inp + units, 4 * units)))
        if layer_norm:  # of i, j, f, o and the cell
            self.scale, self.shift = nn.Parameter(torch.ones(5, units)), nn.Parameter(torch.zeros(5, units))
        else:
            self.bias = nn.Parameter(nn.init.uniform_(torch.empty(4 * units), -1, 1) * math.sqrt(3 / (4 * units)))

    def inputs(self, x):
        """The inputs' share, for all steps at once: (..., inp) -> (..., 4 units)."""
        weight = self.weight[: self.inp]
        return x @ weight if self.layer_norm else F.linear(x, weight.T, self.bias)

    def norm(self, x, rows):
        return F.layer_norm(x, x.shape[-1:], eps=1e-12) * self.scale[rows] + self.shift[rows]

    def forward(self, inputs, state, mask=None):
        """The inputs' share, state (B, D) = h, c, what the candidates are multiplied with -> state."""
        h, c = state.chunk(2, -1)
        gates = torch.addmm(inputs, h, self.weight[self.inp :]).to(c.dtype)
        if self.layer_norm:
            gates = self.norm(gates.unflatten(-1, (4, -1)), slice(4)).flatten(-2)
        i, j, f, o = gates.chunk(4, -1)
        j = tanh(j) if mask is None else tanh(j) * mask
        c = (f + 1).sigmoid() * c + i.sigmoid() * j
        c = self.norm(c, 4) if self.layer_norm else c
        return torch.cat([tanh(c) * o.sigmoid(), c], -1)


# === World model ======================================================================================================


class MDNRNN(nn.Module):
    """M: an LSTM whose output is a mixture density of the next latent. A state is deter (B, D) = h, c and stoch (B, S).

    Its deter has seen everything before stoch, but not stoch.
    """

    def __init__(self, args, action_dim):
        super().__init__()
        self.args = args
        inp = args.stoch + (1 if args.moves else action_dim) + args.restart_input
        self.cell = LSTM(inp, args.deter, args.layer_norm)
        self.mixture_head = nn.Linear(args.deter, args.stoch * args.num_mixtures * 3)
        initialise(self)

    def initial(self, batch_size):
        """State of zeros: deter (B, D), stoch (B, S)."""
        zeros = self.cell.weight.new_zeros
        return zeros(batch_size, 2 * self.args.deter), zeros(batch_size, self.args.stoch)

    def kernels(self):
        """What a scan makes once for all its steps: nothing."""

    def inputs(self, deter, stoch, action):
        """The share of latent (..., S) and action (..., A) in the next step; deter (..., D) tells if it is first."""
        x = [stoch, action[..., 1:2] - action[..., 2:3] if self.args.moves else action]
        if self.args.restart_input:
            x.append((deter == 0).all(-1, keepdim=True))  # which it is then alone
        return self.cell.inputs(torch.cat(x, -1))

    def mixture(self, deter):
        """(..., D) -> logits, means, log-deviations of the latent, each (..., S, K)."""
        x = self.mixture_head(deter[..., : self.args.deter]).float()
        return x.unflatten(-1, (self.args.stoch, -1)).chunk(3, -1)

    def core(self, deter, stoch, action, mask=None):
        """deter (B, D), stoch (B, S), action (B, A) -> next deter (B, D)."""
        return self.cell(self.inputs(deter, stoch, action), deter, mask)

    def img_step(self, state, action, noise, kernels):
        """One step of the dream: state, action (B, A), noise of `Agent.latent_noise` -> state."""
        args = self.args
        normal, uniform, drop = noise.split([args.stoch, args.stoch, noise.shape[-1] - 2 * args.stoch], -1)
        mask = (drop >= args.dream_dropout) / (1 - args.dream_dropout) if args.dream_dropout else None
        deter = self.core(*state, action, mask)
        return deter, mdn_sample(*self.mixture(deter), uniform, normal, args.temperature)

    def observe(self, embed, action, is_first, start, noise, mask=None):
        """States along a sequence.

        V's embed (B, T, 2 S), action (B, T, A) that led to each step, is_first (B, T), start state, normal noise
        (B, T, at least S), dropout mask (B, T, H) -> deter (B, T, D), stoch (B, T, S).
        """
        mean, logvar = embed.chunk(2, -1)
        stoch = mean + (logvar / 2).exp() * noise[..., : self.args.stoch]
        before = torch.cat([start[1].unsqueeze(1), stoch[:, :-1]], 1)
        keep = 1 - is_first.float().unsqueeze(-1)
        begun = torch.cat([start[0].abs().amax(-1, keepdim=True).unsqueeze(1), keep[:, :-1]], 1)
        deter, deters = start[0], []
        for t, inputs in enumerate(self.inputs(begun, before, action).unbind(1)):
            deter = self.cell(inputs, deter, None if mask is None else mask[:, t]) * keep[:, t]
            deters.append(deter)
        return torch.stack(deters, 1), stoch


def feature(deter, stoch):
    """(..., D), (..., S) -> (..., F). Changed from dreamer_v1.py: here a latent is a number, there a row of them."""
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
        initialise(self.reward_head)
        initialise(self.continue_head)
        self.register_buffer("reward_scale", torch.tensor([0.0, 1.0]))  # mean and deviation of the rewards collected

    def frame(self, obs):
        """Observations (B, ...) -> what V sees, uint8 (B, 64, 64, C): the upper rows of all images, resized."""
        image = torch.cat([obs[key] for key in self.spaces], -1).permute(0, 3, 1, 2)
        image = image[:, :, : round(self.args.crop * image.shape[2])]
        if image.shape[2:] != (SIDE, SIDE):
            image = F.interpolate(image.float(), (SIDE, SIDE), mode="bilinear", antialias=True).round().byte()
        return image.permute(0, 2, 3, 1)

    def vae_loss(self, image, noise):
        """V's losses (N,) by name, from images (N, 64, 64, C) and noise (N, S)."""
        mean, logvar = self.encoder(image).chunk(2, -1)  # (N, S)
        recon = self.decoder(mean + (logvar / 2).exp() * noise)  # (N, 64, 64, C)
        losses = vae_losses(image / 255, recon, mean, logvar, self.args.kl_tolerance)
        return dict(zip(("recon_loss", "kl_loss"), losses, strict=True))

    def loss(self, data, start, noise, mask=None):
        """M's losses (B, T) by name, next start. data: embed (B, T, 2 S), action, reward, is_first, is_terminal.

        What comes out of nothing, an episode's first frame, is not predicted; after a terminal one nothing follows.
        """
        deter, stoch = self.rssm.observe(data["embed"], data["action"], data["is_first"], start, noise, mask)
        output = deter[..., : self.args.deter]  # (B, T, H)
        known = ~data["is_first"]  # (B, T)
        going_on = known & ~data["is_terminal"]  # (B, T)
        log_prob = mdn_log_prob(*self.rssm.mixture(deter), stoch).mean(-1)  # (B, T)
        target = (data["reward"] - self.reward_scale[0]) / self.reward_scale[1]  # (B, T)
        done = F.binary_cross_entropy_with_logits(
            self.continue_head(output).squeeze(-1).float(), 1 - data["is_terminal"].float(), reduction="none"
        )  # (B, T)
        weight = 1 + (self.args.done_weight - 1) * data["is_terminal"]  # (B, T)
        losses = {"latent_loss": -log_prob * going_on / going_on.float().mean().clamp(min=1e-6)}
        losses["reward_loss"] = (self.reward_head(output).squeeze(-1).float() - target).square() * known
        losses["continue_loss"] = weight * done * known
        return losses, (deter[:, -1].detach(), stoch[:, -1].detach())

    def reward(self, feat):
        """(..., F) -> expected reward (...)."""
        mean, scale = self.reward_scale
        return self.reward_head(feat[..., : self.args.deter]).squeeze(-1) * scale + mean

    def cont(self, feat):
        """(..., F) -> probability that the episode goes on (...)."""
        return self.continue_head(feat[..., : self.args.deter]).squeeze(-1).sigmoid()

    def decode(self, feat):
        """(B, T, F) -> observations as the environment gives them, key -> (B, T, ...); black where V sees nothing."""
        size = next(iter(self.spaces.values())).shape[0]
        image = self.decoder(feat[..., 2 * self.args.deter :].flatten(0, 1)).permute(0, 3, 1, 2)
        image = F.interpolate(image, (round(self.args.crop * size), size), mode="bilinear", antialias=True)
        image = F.pad(image, (0, 0, 0, size - image.shape[2])).permute(0, 2, 3, 1).unflatten(0, feat.shape[:2])
        parts = (image * 255).round().byte().split(self.channels, -1)
        return dict(zip(self.spaces, parts, strict=True))


# === Behaviour ========================================================================================================


class Controller(nn.Module):
    """C: one layer, or two, from the latent and M's state; the best parameters that evolution found.

    A layer is tanh(W [z h] + b) (arXiv:1803.10122v4, Controller). Parameters are flat: for each layer biases, then
    weights, input-major.
    """

    def __init__(self, args, action_dim, discrete):
        super().__init__()
        self.args, self.discrete = args, discrete
        if args.moves and not (discrete and action_dim == 3):
            raise Failure("--moves is for three discrete actions")
        sizes = [args.stoch + len(args.controller_inputs[1:]) * args.deter, args.controller_hidden]
        sizes = [size for size in (*sizes, 1 if args.moves else action_dim) if size]
        self.layers = list(zip(sizes[:-1], sizes[1:], strict=True))
        self.outputs = sizes[-1]
        count = sum((inp + args.controller_bias) * out for inp, out in self.layers)
        self.register_buffer("params", torch.zeros(count))

    def forward(self, params, deter, stoch):
        """Parameters (P, W), deter (P, R, D), stoch (P, R, S) -> outputs in [-1, 1] (P, R, U), in the order z, c, h."""
        h, c = deter.chunk(2, -1)
        x = torch.cat([stoch, *{"z": [], "zh": [h], "zch": [c, h]}[self.args.controller_inputs]], -1)
        for inp, out in self.layers:
            biases = out * self.args.controller_bias
            bias, weight, params = params.split([biases, inp * out, params.shape[1] - biases - inp * out], 1)
            x = torch.bmm(x, weight.view(-1, inp, out).mT.contiguous().mT)  # the layout that a CPU multiplies faster
            x = (x + bias.unsqueeze(1) if biases else x).tanh()
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
    """Mean return of each candidate over its dreams, all of them as one batch, until they end or are cut.

    params (P, W); start, the same for all candidates: deter (R, D), stoch (R, S) -> (P,). So is the noise: candidates
    differ by what they do, not by luck. When half of the dreams are over, only the others are carried on.
    """
    model, controller, P, R = agent.world_model, agent.behaviour, len(params), len(start[0])
    dream, owner = torch.arange(R, device=params.device).repeat(P), params
    deter = start[0].repeat(P, 1)  # (M, D)
    stoch = start[1].repeat(P, 1)  # (M, S)
    alive, total = torch.ones(P * R, device=params.device), torch.zeros(P * R, device=params.device)  # (M,)
    place = torch.arange(P * R, device=params.device)  # (M,)
    sums = total.clone()
    for _ in range(length):
        output = controller(owner, *(x.view(len(owner), -1, x.shape[-1]) for x in (deter, stoch))).flatten(0, 1)
        noise = agent.latent_noise(R).index_select(0, dream)
        with agent.autocast():
            deter, stoch = model.rssm.img_step((deter, stoch), controller.action(output), noise, None)
        total += alive * model.reward(deter)
        alive = alive * (model.cont(deter) >= 0.5)
        going_on = int(alive.sum())
        if going_on <= len(alive) / 2:
            sums[place] = total
            keep = alive.bool()
            if not going_on:
                break
            deter, stoch, alive, total, place, dream = (x[keep] for x in (deter, stoch, alive, total, place, dream))
            owner = params[place // R]
    sums[place] = total
    return sums.view(P, R).mean(1)


# === Agent ============================================================================================================


class Agent(nn.Module):
    """World model, controller and the optimizers of V and M: what is trained, what acts, what is saved."""

    def __init__(self, args, spaces, action_space, device="cpu"):
        super().__init__()
        self.args, self.device = args, torch.device(device)
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.action_dim = int(action_space.n) if self.discrete else action_space.shape[0]
        images = {key: space for key, space in sorted(spaces.items()) if space.dtype == np.uint8}
        self.world_model = model = WorldModel(args, images, self.action_dim)
        self.behaviour = Controller(args, self.action_dim, self.discrete)
        self.to(device)
        self.trained = list(self.parameters())
        v = [*model.encoder.parameters(), *model.decoder.parameters()]
        m = [p for part in (model.rssm, model.reward_head, model.continue_head) for p in part.parameters()]
        self.optimizers = {"vae": torch.optim.Adam(v), "rnn": torch.optim.Adam(m)}
        if args.compile:
            if not can_compile():
                raise Failure("--compile needs a compiler: apt-get install g++ python3-dev (or say --no-compile)")
            for part, name in ((model.encoder, "forward"), (model.decoder, "forward"), (model.rssm.cell, "forward")):
                setattr(part, name, torch.compile(getattr(part, name), dynamic=False))
        self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=args.amp)

    def initial(self, num_envs):
        """What acting carries from step to step, at the start of an episode: deter, stoch, action (E, A)."""
        state = self.world_model.rssm.initial(num_envs)
        return *state, torch.zeros(num_envs, self.action_dim, device=self.device)

    @torch.no_grad()
    def act(self, obs, carry, policy=None):
        """Observations with is_first of E environments, what it returned last -> deter, stoch, action (E, A).

        The controller acts, or `policy`, a function of deter and stoch that gives outputs (E, U).
        """
        deter = self.world_model.rssm.core(*carry) * ~obs["is_first"].bool().unsqueeze(-1)
        mean, logvar = self.world_model.encoder(self.world_model.frame(obs)).chunk(2, -1)
        stoch = mean + (logvar / 2).exp() * torch.randn_like(mean) * self.args.sample_latent
        return deter, stoch, self.behaviour.action((policy or self.policy)(deter, stoch))

    def policy(self, deter, stoch, params=None):
        """The controller's outputs (E, U), with its own parameters or others."""
        params = torch.as_tensor(self.behaviour.params if params is None else params)
        return self.behaviour(params.unsqueeze(0), deter.unsqueeze(0), stoch.unsqueeze(0)).squeeze(0)

    def env_action(self, action):
        """Actions (E, A) -> what the environments take: (E,) or (E, A)."""
        return (action.argmax(-1) if self.discrete else action).cpu().numpy()

    def latent_noise(self, *shape, generator=None):
        """What one state's sample takes: (..., 2 S): normal, uniform, and uniform of the LSTM's units for dropout."""
        device, stoch = self.device if generator is None else "cpu", self.args.stoch
        uniform = stoch + self.args.deter * (self.args.dream_dropout > 0)
        normal = torch.randn(*shape, stoch, generator=generator, device=device)
        return torch.cat([normal, torch.rand(*shape, uniform, generator=generator, device=device)], -1).to(self.device)

    def descend(self, name, losses, rate):
        """A step of Adam on the sum of the losses -> metrics by key; gradients are clipped number by number."""
        optimizer = self.optimizers[name]
        metrics = {f"losses/{key}": loss.mean() for key, loss in losses.items()}
        optimizer.zero_grad()
        sum(metrics.values()).backward()
        params = optimizer.param_groups[0]["params"]
        metrics[f"stats/{name}_grad_norm"] = nn.utils.get_total_norm([p.grad for p in params])
        if name == "rnn":
            nn.utils.clip_grad_value_(params, self.args.clip)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        return {key: float(x.detach()) for key, x in metrics.items()}

    def update_vae(self, image, update):
        """One gradient step of V on images (N, 64, 64, C) -> metrics by key."""
        with self.autocast():
            losses = self.world_model.vae_loss(image, torch.randn(len(image), self.args.stoch, device=self.device))
        return self.descend("vae", losses, decayed(self.args.vae_rate, self.args.vae_decay, update))

    def update(self, data, start, update):
        """One gradient step of M on a batch, as for WorldModel.loss -> the next chunk's start, metrics by key."""
        args, shape = self.args, data["reward"].shape
        keep = torch.rand(*shape, args.deter, device=self.device) >= args.dropout if args.dropout else None
        noise = torch.randn(*shape, args.stoch, device=self.device)
        with self.autocast():
            mask = None if keep is None else keep / (1 - args.dropout)
            losses, start = self.world_model.loss(data, start, noise, mask)
        return start, self.descend("rnn", losses, decayed(args.rnn_rate, args.rnn_decay, update))

    def get_extra_state(self):
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def set_extra_state(self, state):
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])


def can_compile():
    """Whether torch.compile finds what it needs."""
    headers = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
    return headers and any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))


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
    """Video (T, 64, B·3·64, 3): truth, V's reconstruction and dream side by side.

    The dream sees `context` steps (framed), then only the actions. data: embed, action, is_first, image (B, T, ...).
    """
    model = agent.world_model
    noise = agent.latent_noise(*data["is_first"].shape, generator=torch.Generator().manual_seed(0))
    steps = data["embed"], data["action"], data["is_first"]
    deter, stoch = model.rssm.observe(*steps, model.rssm.initial(len(noise)), noise)
    state, latents = (deter[:, context - 1], stoch[:, context - 1]), [stoch[:, :context]]
    for t in range(context, noise.shape[1]):
        state = model.rssm.img_step(state, data["action"][:, t], noise[:, t], None)
        latents.append(state[1].unsqueeze(1))
    recon, dream = ((model.decoder(x) * 255).round().byte() for x in (stoch, torch.cat(latents, 1)))
    video = []
    for t in range(noise.shape[1]):
        row = []
        for b in range(noise.shape[0]):
            for frames in (data["image"], recon, dream):
                frame = picture({"image": frames[b, t].cpu().numpy()})
                if t < context and frames is dream:
                    frame[:2], frame[-2:], frame[:, :2], frame[:, -2:] = [[60, 180, 75]] * 4
                row.append(frame)
        video.append(np.concatenate(row, 1))
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


class Undrawn(gym.Wrapper):
    """Action repeat for CarRacing, which draws a frame at each step, 98 % of the time: only those that are seen."""

    def __init__(self, env, repeat):
        super().__init__(env)
        self.repeat = repeat

    def step(self, action):
        game, total = self.unwrapped, 0.0
        game._render = lambda mode: game.state.copy()
        for left in range(self.repeat, 0, -1):
            if left == 1:
                del game._render
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        if vars(game).pop("_render", None):
            obs = game._render("state_pixels")
        return obs, total, terminated, truncated, info


def rollout(env, agent, job, left):
    """An episode in a worker process -> return, decisions, and what `job` asks for: steps to keep, pictures.

    job: seed, policy ("agent", "brown", "held" or "controller"); params, noise, patience, keep, film if they differ.
    `left` tells whether the main process waits no longer.
    """
    rng, size = np.random.default_rng(job["seed"]), agent.behaviour.outputs
    torch.manual_seed(job["seed"])
    params, noise, t, hold, output = job.get("params"), job.get("noise", 0.0), 0, 1, torch.zeros(1, size)
    if job["policy"] == "agent":
        scale = rng.uniform(0, 0.01)
        params = scale * torch.empty_like(agent.behaviour.params).cauchy_()
        for weight in agent.world_model.parameters():
            weight.data.cauchy_().mul_(scale)

    def policy(deter, stoch):
        nonlocal output, hold
        if job["policy"] == "brown":
            output = (output + math.sqrt(1 / 50) * torch.randn(1, size)).clamp(-1, 1)
        elif job["policy"] == "held":
            if t % hold == 0:  # the authors' test, so that actions are not held for just that long
                output, hold = 2 * torch.rand(1, size) - 1, int(rng.integers(1, 11))
        else:
            output = agent.policy(deter, stoch, params).nan_to_num()
            output = (output + noise * torch.randn(1, size)).clamp(-1, 1) if noise else output
        return output

    obs, carry, reward, total, idle, steps, film = env.reset(seed=job["seed"])[0], agent.initial(1), 0.0, 0.0, 0, [], []
    while True:
        tensors = to_tensors({key: np.asarray(value)[None] for key, value in obs.items()}, agent.device)
        if job.get("film"):
            film.append(picture({key: obs[key] for key in agent.world_model.spaces}))
        if job.get("keep"):
            step = dict(image=agent.world_model.frame(tensors)[0].numpy(), action=carry[2][0].numpy(), reward=reward)
            steps.append(step | {key: bool(obs[key]) for key in FLAGS})
        if obs["is_last"] or idle >= (job.get("patience") or math.inf) or left():
            break
        carry = agent.act(tensors, carry, policy)
        obs, reward, *_ = env.step(agent.env_action(carry[2])[0])
        if not math.isfinite(reward):
            raise Interrupted(f"an environment gave the reward {reward}")
        t, total, idle = t + 1, total + reward, 0 if reward > 0 else idle + 1
    steps = {key: np.stack([step[key] for step in steps]) for key in (steps[0] if steps else ())}
    return dict(total=total, length=t, steps=steps, film=film)


def work(pipe, args, weights):
    """A worker process: an environment, an agent and one thread; it ends once the main process has closed the pipe.

    Signals, which the whole group gets, are for the main process. Environments may have processes of their own, as
    VizDoom's has, which closing ends.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    args = dataclasses.replace(args, compile=False)
    env = make_env(args)
    if suite(args.env_id) == "carracing" and args.action_repeat > 1:
        env.env.env, env.env.repeat = Undrawn(env.env.env, args.action_repeat), 1
    agent = Agent(args, env.observation_space.spaces, env.action_space)
    agent.load_state_dict(weights, strict=False)
    with contextlib.suppress(EOFError, OSError), contextlib.closing(env):
        while True:
            job = pipe.recv()
            try:
                result = rollout(env, agent, job, pipe.poll)
            except Failure as failure:
                result = failure
            except Exception as error:
                traceback.print_exc()
                text = " ".join(str(error).split())
                result = Interrupted(f"an environment raised {type(error).__name__}: {text}")
            pipe.send(result)


class Workers:
    """`num_envs` worker processes that act with the agent as it is now; a signal ends the wait for them.

    Each has a pipe of its own, so that one that dies, at whatever moment, leaves nothing locked or half read.
    """

    def __init__(self, args, agent, signals=()):
        self.signals, self.processes = signals, {}
        weights = {key: value.cpu() for key, value in agent.state_dict().items() if torch.is_tensor(value)}
        # forked from a clean process, which has the imports that take long
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["cv2", "gymnasium", "torch._dynamo", "torch.utils.tensorboard", "tyro"])
        for _ in range(args.num_envs):
            pipe, theirs = context.Pipe()
            self.processes[pipe] = context.Process(target=work, args=(theirs, args, weights))
            self.processes[pipe].start()
            theirs.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pipe in self.processes:
            pipe.close()
        for process in self.processes.values():
            process.join(10)
            process.kill()

    def results(self, jobs):
        """What the rollouts of the jobs return, in order."""
        jobs, idle, busy, done = enumerate(jobs), list(self.processes), {}, {}
        for turn in itertools.count():
            while turn not in done:
                try:
                    while idle and (job := next(jobs, None)):
                        busy[idle[-1]] = job[0]
                        idle.pop().send(job[1])
                    if not busy:
                        return
                    for pipe in multiprocessing.connection.wait(busy, timeout=0.5):
                        done[busy[pipe]] = pipe.recv()
                        idle.append(pipe)
                        del busy[pipe]
                except (EOFError, OSError):
                    raise Interrupted("the process of an environment died") from None
                if self.signals:
                    raise KeyboardInterrupt
            if isinstance(done[turn], Failure):
                raise done[turn]
            yield done.pop(turn)

    def evaluate(self, seeds, params=None, film=False):
        """Returns of whole episodes with these seeds, and the pictures of the first."""
        job = dict(policy="controller", params=params)
        done = list(self.results(job | dict(seed=seed, film=film and not i) for i, seed in enumerate(seeds)))
        return np.array([episode["total"] for episode in done]), done[0]["film"]


class Run:
    """What the stages share, how far they are, and the log.

    The x-axis, `tick`, counts environment frames and, where none are made, updates, encoded chunks and generations.
    """

    def __init__(self, args):
        self.args, (self.device, _, world) = args, setup(args)
        if world > 1:
            raise Failure("the stages run in one process with --num-envs workers, not under torchrun")
        name = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{int(time.time())}"
        self.folder = args.resume or f"{args.run_dir}/{name}"
        state = load(self.folder, self.device, resume=True) if args.resume else None
        env = make_env(args)
        try:
            env.reset(seed=args.seed)
        except Exception as error:
            raise Failure(f"the environment does not start: {error}") from error
        images = [space for space in env.observation_space.spaces.values() if space.dtype == np.uint8]
        self.agent = Agent(args, env.observation_space.spaces, env.action_space, self.device)
        stored = dict(image=((SIDE, SIDE, sum(space.shape[-1] for space in images)), "uint8"))
        stored |= dict(action=((self.agent.action_dim,), "float32"), reward=((), "float32"))
        stored |= {key: ((), "bool") for key in FLAGS} | dict(embed=((2 * args.stoch,), "float16"))
        limit = args.time_limit or getattr(env.spec, "max_episode_steps", None) or 1000 * args.action_repeat
        steps = args.iterations * args.rollouts * (limit // args.action_repeat + 1)
        steps = min(steps, args.total_timesteps // args.action_repeat)
        self.rollouts = Rollouts(f"{self.folder}/replay", stored, steps)
        env.close()
        self.rng = np.random.default_rng(args.seed)
        self.at = dict(iteration=0, stage=0, done=0, tick=0, frames=0)  # how far it is
        self.memory, self.sums = {}, {}  # what a stage keeps while it lasts; metrics since the last row
        if state:
            load_agent(self.agent, state)
            self.at, self.memory, self.sums = state["at"], state["memory"], state["sums"]
            set_random_states(state["random"], self.rng, self.device)
        self.rollouts.load(state["count"] if state else 0)
        self.log = start_log(args, self.folder, self.at["tick"], self.agent, self.rollouts)
        self.signals, self.saved_at, self.row_at = [], time.time(), (time.time(), self.at["frames"])
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: self.signals.append(number))

    def seeds(self, *key, count=1):
        """Seeds of episodes, which depend on the run's seed and on what they are for."""
        return np.random.SeedSequence([self.args.seed, *key]).generate_state(count).tolist()

    def stage(self, total, most=math.inf):
        """Counts the units of a stage from where it is up to `total`, with a bar, or until there are `most` frames."""
        name = STAGES[self.at["stage"]]
        with tqdm(total=total, initial=self.at["done"], desc=name, smoothing=0.05) as self.bar:
            while self.at["done"] < total and self.at["frames"] < most:
                yield self.at["done"]

    def advance(self, row=None, means=None, frames=0, text=""):
        """A unit is done: counts it, logs a row now or means of what comes until --log-every, saves, heeds signals."""
        before = self.at["tick"]
        self.at |= dict(done=self.at["done"] + 1, tick=before + max(1, frames), frames=self.at["frames"] + frames)
        for key, value in {**(row or {}), **(means or {})}.items():
            if not math.isfinite(value):
                where = f"{STAGES[self.at['stage']]} {self.at['done'] - 1}"
                raise Failure(f"{key} is {value}, {where}: the last checkpoint is kept")
        for key, value in (means | {"count": 1} if means else {}).items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        if self.sums and self.at["tick"] // self.args.log_every > before // self.args.log_every:
            row = {k: value / self.sums["count"] for k, value in self.sums.items() if k != "count"} | (row or {})
            self.sums = {}
        if row:
            now = time.time()
            if frames:
                row |= {"charts/SPS": (self.at["frames"] - self.row_at[1]) / (now - self.row_at[0])}
                row |= {"charts/frames": self.at["frames"]}
            self.log.scalars(self.at["tick"], row)
            self.row_at = now, self.at["frames"]
        self.bar.update()
        self.bar.set_postfix_str(text, refresh=False)
        if time.time() - self.saved_at > self.args.save_every * 60:
            self.checkpoint()
        if self.signals:
            raise KeyboardInterrupt

    def batch(self, steps):
        """What M sees of steps (B, T)."""
        data = to_tensors(self.rollouts.get(steps, ("embed", "action", *FLAGS, "reward")), self.device)
        return data | dict(embed=data["embed"].float())

    def checkpoint(self):
        """Everything, so that the run goes on as if it had not stopped."""
        self.rollouts.flush()
        state = dict(script=SCRIPT, agent=self.agent.state_dict(), at=self.at, memory=self.memory, sums=self.sums)
        state |= dict(count=self.rollouts.count, random=random_states(self.rng, self.device))
        save(f"{self.folder}/checkpoint.pt", state)
        self.saved_at = time.time()


def collect(run):
    """Episodes of random agents or, from the second iteration on, of the controller with noise."""
    args, iteration = run.args, run.at["iteration"]
    job = dict(policy=args.policy) if iteration == 0 else dict(policy="controller", noise=args.collect_noise)
    tried = run.memory.get("tried", 0)
    seeds = (run.seeds(0, iteration, number)[0] for number in itertools.count(tried))
    with Workers(args, run.agent, run.signals) as workers:
        episodes = workers.results(job | dict(seed=seed, keep=True) for seed in seeds)
        for _ in run.stage(args.rollouts, args.total_timesteps):
            frames, length = 0, 0
            while length <= args.shortest:
                episode, tried = next(episodes), tried + 1
                length = episode["length"]
                frames += length * args.action_repeat
                if tried > 100 * args.rollouts:
                    raise Failure(f"--shortest {args.shortest}: hardly any episode is longer")
            run.rollouts.add(episode["steps"])
            run.memory["tried"] = tried
            row = {"charts/episodic_return": episode["total"], "charts/episodic_length": length * args.action_repeat}
            run.advance(row, frames=frames, text=f"return {episode['total']:.1f}")
    if args.train_controller_in == "env" and run.at["frames"] >= args.total_timesteps:
        raise Interrupted(
            f"--total-timesteps {args.total_timesteps} are spent, and none are left to evolve the controller in: "
            "raise it, or start with fewer --rollouts"
        )


def train_vae(run):
    """V, on frames of the episodes that are not held out."""
    args, episodes = run.args, run.rollouts.episodes(False)
    if not len(episodes):
        raise Failure("one episode is held out and none is left to train on: start with more --rollouts")
    steps = np.concatenate([np.arange(first, first + size) for first, size in episodes])
    for update in run.stage(args.vae_updates):
        image = run.rollouts.get(steps[run.rng.integers(len(steps), size=args.vae_batch_size)], ["image"])
        metrics = run.agent.update_vae(to_tensors(image, run.device)["image"], update)
        run.advance(means=metrics, text=f"recon {metrics['losses/recon_loss']:.1f}")


@torch.no_grad()
def encode(run, chunk=256):
    """Means and log-variances of all frames, from which M's latents are drawn anew in each batch."""
    embed = run.rollouts.arrays["embed"][: run.rollouts.count]
    for number in run.stage(-(-len(embed) // chunk)):
        steps = slice(number * chunk, min((number + 1) * chunk, len(embed)))
        image = to_tensors(run.rollouts.get(steps, ["image"]), run.device)["image"]
        embed[steps] = run.agent.world_model.encoder(image).cpu().numpy()
        run.advance()


def train_rnn(run):
    """M, on the episodes that are not held out, one after the other; its state goes on from chunk to chunk."""
    args, agent, episodes, order = run.args, run.agent, run.rollouts.episodes(False), None
    steps = np.concatenate([np.arange(first, first + size) for first, size in episodes])
    chunks = len(steps) // (args.batch_size * args.batch_length)
    if not chunks:
        size = f"--batch-size {args.batch_size} times --batch-length {args.batch_length}"
        raise Failure(f"{size} is more than the {len(steps)} steps that were collected")
    reward = run.rollouts.arrays["reward"][steps][~run.rollouts.arrays["is_first"][steps]]
    scale = [reward.mean(), reward.std() if reward.std() > 1e-6 else 1.0]
    agent.world_model.reward_scale.copy_(torch.tensor(scale))
    for update in run.stage(args.rnn_updates):
        row = {"eval/latent_loss_untrained": held_out(run)["eval/latent_loss"]} if update == 0 else {}
        if order is None or update % chunks == 0:
            rng = np.random.default_rng([args.seed, run.at["iteration"], update // chunks])
            order = run.rollouts.streams(rng.permutation(episodes), args.batch_size, args.batch_length)
        data = run.batch(order[update % chunks])
        if update % chunks == 0:
            run.memory["start"] = agent.world_model.rssm.initial(args.batch_size)
            data["is_first"][:, 0] = True
        run.memory["start"], metrics = agent.update(data, run.memory["start"], update)
        row |= held_out(run) if update == args.rnn_updates - 1 else {}
        run.advance(row, metrics, text=f"latent {metrics['losses/latent_loss']:.3f}")
    if args.eval_every:
        first, size = run.rollouts.episodes(True).T
        length = min(60, size.max())
        if length > 5:
            steps = first[size >= length][:4, None] + np.arange(length)
            data = run.batch(steps) | to_tensors(run.rollouts.get(steps, ["image"]), run.device)
            run.log.video(run.at["tick"], "video/open_loop", open_loop(agent, data))


@torch.no_grad()
def held_out(run, most=20):
    """Scores on episodes that are held out, means over steps.

    Negative log-likelihood of the next latent in nats for each number: M's, and that of a Gaussian around the latent
    before, with the deviations seen in other episodes; M's squared error of the normalised reward.
    """
    model, device = run.agent.world_model, run.device

    def episodes(held):
        found = run.rollouts.episodes(held)
        for first, size in found[found[:, 1] > 2][:most]:
            data = run.batch(np.arange(first, first + size)[None])
            yield data, torch.randn(1, size, run.args.stoch, device=device)

    def differences(data, noise):
        mean, logvar = data["embed"].chunk(2, -1)
        return (mean + (logvar / 2).exp() * noise)[0].diff(dim=0)[~data["is_terminal"][0, 1:]].square()

    sums = torch.zeros(4)
    with torch.random.fork_rng():
        torch.manual_seed(run.args.seed)
        variance = torch.cat([differences(*episode) for episode in episodes(False)]).mean(0)
        for data, noise in episodes(True):
            losses, _ = model.loss(data, model.rssm.initial(1), noise)
            copy = (differences(data, noise) / variance + variance.log() + math.log(2 * math.pi)).mean() / 2
            values = torch.stack([losses["latent_loss"].mean(), copy, losses["reward_loss"].mean(), copy.new_ones(())])
            sums += values.cpu() * noise.shape[1]
    values = (sums[:3] / sums[3]).tolist()
    return dict(zip(("eval/latent_loss", "eval/latent_loss_copy", "eval/reward_loss"), values, strict=True))


@torch.no_grad()
def dream_starts(run, count):
    """States that dreams start from, of what was collected: deter (R, D), stoch (R, S)."""
    model, args, arrays = run.agent.world_model, run.args, run.rollouts.arrays
    anywhere = np.flatnonzero(~arrays["is_last"][: run.rollouts.count])
    last = anywhere if args.dream_context else run.rollouts.episodes()[:, 0]
    last = last[torch.randint(len(last), (count, 1)).numpy()]
    steps = np.maximum(last + np.arange(-args.dream_context, 1), 0)
    data, noise = run.batch(steps), torch.randn(*steps.shape, args.stoch, device=run.device)
    data["is_first"][:, 0] = True
    seen = model.rssm.observe(data["embed"], data["action"], data["is_first"], model.rssm.initial(count), noise)
    return tuple(x[:, -1] for x in seen)


def evolve(run):
    """C: CMA-ES on the mean return of each candidate, in the environment or in the dream.

    It is brought back by telling it again what it was told. Kept is the distribution's mean that scored best in the
    environment or, without evaluations, the last one.
    """
    args, agent, at, memory = run.args, run.agent, run.at, run.memory
    most = args.total_timesteps if args.train_controller_in == "env" else math.inf
    warnings.filterwarnings("ignore", "Could not import matplotlib")  # which cma misses at once, and we never
    import cma

    start = memory.setdefault("mean", agent.behaviour.params.clone())
    costs = memory.setdefault("costs", [])
    memory.setdefault("best", -math.inf)
    rng = np.random.RandomState(args.seed % 2**32)
    options = dict(popsize=args.population, seed=float("nan"), randn=lambda *shape: rng.standard_normal(shape))
    es = cma.CMAEvolutionStrategy(start.cpu().numpy(), args.sigma, options | dict(verbose=-9))
    for cost in costs:
        es.tell(es.ask(), cost)
    with Workers(args, agent, run.signals) as workers:
        for generation in run.stage(args.generations, most):
            candidates, frames = es.ask(), 0
            seed, *seeds = run.seeds(1, at["iteration"], generation, count=1 + args.candidate_rollouts)
            torch.manual_seed(seed)  # so that a generation that was cut short can be done again
            params = np.array(candidates, np.float32)
            if args.train_controller_in == "dream":
                params, starts = torch.as_tensor(params, device=run.device), dream_starts(run, args.candidate_rollouts)
                fitness = dream_returns(agent, params, starts, args.dream_length).cpu().numpy()
            else:
                jobs = [
                    dict(policy="controller", seed=seed, params=x, patience=args.patience)
                    for x in params for seed in seeds
                ]  # fmt: skip
                done = list(workers.results(jobs))
                fitness = np.array([x["total"] for x in done]).reshape(len(params), -1).mean(1)
                frames = sum(x["length"] for x in done) * args.action_repeat
            es.tell(candidates, (-fitness).tolist())
            mean = torch.tensor(es.result.xfavorite, dtype=torch.float32, device=run.device)
            row = {"charts/generation": generation + 1, "charts/fitness_mean": fitness.mean()}
            row |= {"charts/fitness_best": fitness.max(), "stats/sigma": es.sigma}
            again = dream_returns(agent, mean[None], dream_starts(run, 64), args.dream_length)
            row |= {"charts/dream_return": again.item()}
            last = generation + 1 == args.generations or at["frames"] + frames >= most
            if args.eval_every and args.eval_episodes and ((generation + 1) % args.eval_generations == 0 or last):
                seeds = run.seeds(2, at["iteration"], generation, count=args.eval_episodes)
                returns, film = workers.evaluate(seeds, mean.cpu().numpy(), args.capture_video)
                row |= {"eval/episodic_return": returns.mean(), "eval/episodic_return_std": returns.std()}
                if returns.mean() > memory["best"]:
                    memory["best"] = float(returns.mean())
                    agent.behaviour.params.copy_(mean)
                if film:
                    tick = at["tick"] + max(1, frames)
                    run.log.video(tick, "video/eval", np.stack(film[::2]))
                    write_mp4(f"{run.folder}/videos/eval_{tick}.mp4", film)
            elif memory["best"] == -math.inf:
                agent.behaviour.params.copy_(mean)
            costs.append((-fitness).tolist())
            run.advance(row, frames=frames, text=f"fitness {fitness.mean():.1f} best {fitness.max():.1f}")


def train(args):
    """All stages, from the start or from a checkpoint; returns the run directory."""
    run, stages = Run(args), (collect, train_vae, encode, train_rnn, evolve)
    try:
        while run.at["iteration"] < args.iterations:
            stages[run.at["stage"]](run)
            spent = args.train_controller_in == "env" and run.at["frames"] >= args.total_timesteps
            if run.at["stage"] == len(STAGES) - 1 and (spent or run.at["iteration"] == args.iterations - 1):
                break  # more of them, or more --generations, can be asked for on --resume
            run.at |= dict(stage=(run.at["stage"] + 1) % len(STAGES), done=0)
            run.at["iteration"] += run.at["stage"] == 0
            run.memory, run.sums = {}, {}
            run.checkpoint()  # before a stage writes over what the last checkpoint needs
        run.checkpoint()
    except Interrupted as error:
        if not run.signals:
            run.checkpoint()
            raise Failure(f"{error}; saved: --resume {run.folder} continues") from None
    except KeyboardInterrupt:
        pass
    if run.signals:
        run.checkpoint()
        print(f"stopped at {STAGES[run.at['stage']]} {run.at['done']} and saved: --resume {run.folder} continues")
        sys.exit(128 + run.signals[0])
    return run.folder


def load_run(args, run):
    """The agent of a run and one of its environments."""
    device, *_ = setup(args)
    env = make_env(args)
    spaces = {key: space for key, space in env.observation_space.items() if key not in FLAGS}
    agent = Agent(args, spaces, env.action_space, device)
    load_agent(agent, load(run, device))
    return agent, env


def score(args):
    """--evaluate: prints mean, deviation and a 90 % interval of the mean; with --capture-video writes an mp4."""
    if not args.eval_episodes:
        raise Failure("--evaluate takes at least one of --eval-episodes")
    agent, _ = load_run(args, args.evaluate)
    seeds = np.random.SeedSequence([args.seed, 3]).generate_state(args.eval_episodes).tolist()
    with Workers(args, agent) as workers:
        returns, film = workers.evaluate(seeds, film=args.capture_video)
    means = np.random.default_rng(0).choice(returns, (10_000, len(returns))).mean(1)  # bootstrap
    low, high = np.percentile(means, [5, 95])
    print(
        f"{args.env_id}: {returns.mean():.2f} ± {returns.std():.2f} over {len(returns)} episodes, "
        f"90 % interval of the mean {low:.2f} to {high:.2f}"
    )
    if film:
        write_mp4(f"{args.evaluate}/videos/evaluate.mp4", film)


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


def key_action(keys, space, brake=None):
    """Keys held -> action: a key for each discrete action but the first, or two for each dimension, plus and minus.

    Changed from dreamer_v1.py: with a brake, the key that is minus for the action before it brakes; no key, no gas.
    """
    down = [key in keys for key in KEYS]
    if isinstance(space, gym.spaces.Discrete):
        return down.index(True) + 1 if True in down[: int(space.n) - 1] else 0
    signs = [float(plus) - float(minus) for plus, minus in zip(down[::2], down[1::2], strict=True)]
    if brake is not None:
        gas = signs[brake - 1]
        signs[brake - 1], signs[brake] = 2 * max(gas, 0) - 1, 2 * max(-gas, 0) - 1
    return np.array((signs + [0.0] * space.shape[0])[: space.shape[0]], np.float32)


def png(frame):
    """(H, W, 3) -> PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def play(args):
    """--play: a page on 127.0.0.1 where you act in the dream; with --capture-video an mp4 of the actor in it."""
    agent, env = load_run(args, args.play)
    dream = Dream(agent, env)
    obs, info = dream.reset(seed=args.seed)
    if args.capture_video:
        frames, over = [], False
        while not over and len(frames) < 200:
            frames.append(np.concatenate([picture(obs), picture(info["real"])], 1))
            action = agent.behaviour.action(agent.policy(*dream.state[:2]))
            obs, _, terminated, truncated, info = dream.step(agent.env_action(action)[0])
            over = terminated or truncated
        return write_mp4(f"{args.play}/videos/dream.mp4", frames, fps=15)
    used = int(dream.action_space.n) - 1 if agent.discrete else 2 * agent.action_dim
    used = 4 if args.brake is not None else used
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
                obs, reward, terminated, truncated, info = dream.step(key_action(keys, dream.action_space, args.brake))
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
