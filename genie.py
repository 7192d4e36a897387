"""Genie: Generative Interactive Environments (Bruce et al. 2024), arXiv:2402.15391v1. The authors gave no code.

    python genie.py                                    # record a video, learn from it: --preset tiny, two CPU cores
    python genie.py --env-id dmc-point_mass-easy       # any environment of the siblings, played at random
    python genie.py --preset small --video-dir videos  # your own files
    python genie.py --play runs/<run>                  # act in the world that it learnt, in a browser page
    python genie.py --evaluate runs/<run>              # its metrics on held-out clips
    python genie.py --resume runs/<run>                # go on exactly where it stopped

Video comes without actions. A tokenizer (VQ-VAE) makes frames discrete. A latent action model (LAM, another VQ-VAE with
very few codes) names what happens between two frames, by learning to predict the second from the past and the code.
The dynamics model (MaskGIT) predicts the next frame's tokens from the past and the code. Then you choose the codes. All
three are transformers of blocks that attend over space, then causally over time, then apply one feed-forward layer.

Time on all axes is in frames of video that were trained on; --total-timesteps are those that are recorded, and
--eval-episodes counts clips that were held out: windows of the last tenth of the video.

Where the paper says nothing, chosen here: LayerNorm before each layer, GELU, learned positions, no dropout, queries and
keys normalised in all three models; codes and what is matched to them have length 1, are learned by gradient, and one
that nothing uses is put where an output of the encoder is; the LAM's decoder predicts how its last frame changes, which
is scaled by how much frames change; the dynamics' loss is on masked tokens alone; MaskGIT keeps the likeliest of its
draws, at one temperature; ΔtPSNR starts from all but four frames of a clip. The paper's parameter counts leave next to
no room for feed-forward layers: --ffn 0.5 fits them, 4 is what others use. Not in the paper: --clip, --window-shift,
--clean-context, --corrupt, --lam-change, --lam-centre, --lam-shift, --action-input token, --lam-grad-through-dynamics.

Of the presets, tiny has a tokenizer whose encoder is no transformer: a token says what its own patch shows, so that a
few thousand updates suffice for the dynamics. coinrun has the paper's sizes and schedules, but its environment, from a
package for Python 3.13, draws other levels: to have the paper's (0 to 10,000), record them and give --video-dir.

Shapes: B batch, T time, L = T - 1, N tokens of a frame, P patches of a frame of the LAM, V codes of a token, A latent
actions, C width of a model, D width of a code, E numbers in a patch. Videos are uint8, (B, T, height, width, channels).
"""

import base64
import csv
import ctypes
import dataclasses
import errno
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
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint as rematerialise
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

    # Genie. Defaults: appendix F of the paper (CoinRun), unless said otherwise. Sizes: layers, width, heads, head size
    preset: Literal["tiny", "small", "coinrun", "platformers"] = "tiny"
    """source, sizes and schedules; any flag overrides"""
    video_dir: str | None = None
    """folder of video files to learn from, instead of an environment"""
    fps: float = 10
    """frames per second that are taken from video files"""
    cut: float = 0.25
    """mean change from one frame of a file to the next, of the whole range, from which on it is a cut"""
    image_width: int | None = None
    """width of the frames where it is not --image-size"""
    clip_length: int = 16
    """frames of a clip: what the models see and remember"""
    context: int = 15
    """real frames that a dream starts with, less than --clip-length; paper: also 1"""
    quantizer: Literal["vq", "fsq"] = "vq"
    """nearest code of a codebook, or finite scalar quantization (arXiv:2309.15505)"""
    num_codes: int = 1024
    """V, codes of the tokenizer"""
    num_actions: int = 6
    """A, codes of the LAM: latent actions; paper: 8 but for CoinRun"""
    latent_dim: int = 32
    """numbers in a code of VQ"""
    commitment: float = 0.25
    """scale of the loss that moves the encoder to its code (paper: not given)"""
    code_patience: int = 50
    """updates for which a code may be unused before it restarts; 0: for ever (paper: not given)"""
    patch: int = 4
    """height and width of the tokenizer's patches"""
    lam_patch: int = 16
    """height and width of the LAM's patches"""
    encoder: tuple[int, int, int, int] = (8, 512, 8, 64)
    """size of the tokenizer's encoder"""
    decoder: tuple[int, int, int, int] = (8, 512, 8, 64)
    """size of the tokenizer's decoder"""
    lam_encoder: tuple[int, int, int, int] = (8, 512, 8, 64)
    """size of the LAM's encoder"""
    lam_decoder: tuple[int, int, int, int] = (8, 512, 8, 64)
    """size of the LAM's decoder"""
    dynamics: tuple[int, int, int, int] = (12, 512, 8, 64)
    """size of the dynamics model"""
    ffn: float = 4
    """width of the feed-forward layers, in widths of the model"""
    lam_input: Literal["pixels", "tokens"] = "pixels"
    """what the LAM sees and predicts; tokens are the paper's ablation"""
    lam_change: bool = False
    """show the LAM's encoder only how two frames differ, so that codes cannot name what happened before"""
    lam_centre: bool = False
    """take its batch mean from what is matched to the latent actions, so that they cannot all be the same"""
    lam_shift: int = 0
    """show its encoder each clip shifted by a random multiple of so many pixels, so that codes cannot name places"""
    lam_grad_through_dynamics: bool = False
    """let the dynamics' loss reach the LAM's encoder"""
    action_input: Literal["add", "token"] = "add"
    """how latent actions enter the dynamics: added to all tokens of a frame, or as one token more"""
    window_shift: float = 0.0
    """share of clips that the tokenizer decodes from a later frame on, as in play when the oldest frames are gone"""
    clean_context: float = 0.0
    """share of clips in whose first frames, up to a random one, no token is masked"""
    corrupt: float = 0.0
    """largest share of visible tokens that are replaced by random ones; each clip has a share of its own"""
    tokenizer_steps: int = 300_000
    """updates of the tokenizer, first"""
    tokenizer_batch_size: int = 48
    """clips of a batch then"""
    tokenizer_rate: float = 3e-4
    """learning rate then"""
    tokenizer_warmup: int = 10_000
    """updates over which it rises from 0; it then stays"""
    steps: int = 200_000
    """updates of LAM and dynamics, after that"""
    batch_size: int = 36
    """clips of a batch then"""
    learning_rate: float = 3e-5
    """learning rate then: its highest value"""
    final_rate: float = 3e-6
    """where its cosine ends"""
    warmup: int = 5_000
    """updates over which it rises from 0"""
    weight_decay: float = 1e-4
    """of AdamW, whose betas are 0.9 and 0.9"""
    clip: float = 0.0
    """largest norm of a gradient; 0 for any"""
    maskgit_steps: int = 25
    """steps in which a frame's tokens are decoded"""
    temperature: float = 1.0
    """of the tokens that are sampled (paper: 2 for the largest model)"""
    shard: bool = False
    """shard parameters over the processes of torchrun (FSDP2), instead of copies that average gradients"""
    remat: bool = False
    """compute activations again in the backward pass instead of keeping them"""
    fvd: str | None = None
    """TorchScript file of a network for --evaluate: float videos (B, 3, T, H, W) in [0, 1] -> features (B, any)"""


TINY, SMALL, LARGE = (2, 64, 4, 16), (4, 256, 4, 64), (20, 1024, 16, 64)
PRESETS = {
    "tiny": dict(env_id="Pond-v0", total_timesteps=8000, image_size=32, patch=8, clip_length=8, context=7)
    | dict(num_codes=256, num_actions=8, latent_dim=16, ffn=2, lam_change=True, lam_centre=True, lam_shift=8)
    | dict(encoder=(0, 64, 4, 16), decoder=TINY, lam_encoder=TINY, lam_decoder=TINY, dynamics=(3, 64, 4, 16))
    | dict(tokenizer_steps=1000, tokenizer_batch_size=16, tokenizer_rate=2e-3, tokenizer_warmup=100, window_shift=0.5)
    | dict(steps=4000, batch_size=32, learning_rate=2e-3, final_rate=1e-4, warmup=100, clip=1.0, clean_context=1.0)
    | dict(maskgit_steps=8, log_every=12_800, eval_every=128_000, eval_episodes=64),
    "small": dict(env_id="atari100k-freeway", total_timesteps=400_000, action_repeat=4, num_envs=8)
    | dict(patch=8, num_actions=3, encoder=SMALL, decoder=SMALL, lam_encoder=SMALL, lam_decoder=SMALL)
    | dict(dynamics=(8, 384, 6, 64), tokenizer_steps=6000, tokenizer_batch_size=64, tokenizer_warmup=500)
    | dict(steps=15_000, batch_size=64, learning_rate=3e-4, final_rate=3e-5, warmup=500, clip=1.0, window_shift=0.5)
    | dict(clean_context=0.5, log_every=50_000, eval_every=2_000_000, eval_episodes=256),
    "coinrun": dict(env_id="procgen_gym:procgen_gym/procgen-coinrun-v0", total_timesteps=10_000_000, num_envs=16)
    | dict(log_every=100_000, eval_every=10_000_000, eval_episodes=256),
    "platformers": dict(video_dir="videos", image_size=90, image_width=160, num_actions=8, temperature=2.0)
    | dict(encoder=(12, 512, 8, 64), decoder=LARGE, lam_encoder=LARGE, lam_decoder=LARGE, dynamics=(48, 5120, 36, 128))
    | dict(ffn=0.4, tokenizer_batch_size=64, batch_size=512, steps=125_000, shard=True, remat=True)
    | dict(log_every=1_000_000, eval_every=100_000_000, eval_episodes=512),
}
for name in PRESETS:
    PRESETS[name] = dict(obs="pixels") | PRESETS[name]


SCRIPT = Args().exp_name
FREE = "exp_name cuda track wandb_project_name wandb_entity capture_video resume evaluate play run_dir eval_every"
FREE += " eval_episodes log_every save_every compile amp context maskgit_steps temperature fvd video_dir"


class Failure(Exception):
    """Something that the user has to put right: ends the run with one line and exit code 2."""


class Interrupted(Failure):
    """A failure from outside: what was learnt until then is saved first."""


def parse_args(argv=None):
    """Command line -> Args: defaults, then the run's own or the preset's, then the flags that were given.
    Changed from dreamer_v3.py: presets are named by --preset; all that shapes a run stays on --resume."""
    argv = sys.argv[1:] if argv is None else list(argv)
    presets = "\n".join(f"    {name}: {show(preset)}" for name, preset in PRESETS.items())
    text = f"{__doc__}\nPresets:\n{presets}"
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
        saved = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
        args = cli(Args(**saved | dict(resume=None, evaluate=None, play=None)))
        fixed = [name for name in saved if name not in FREE.split() and getattr(args, name) != saved[name]]
        if args.resume and fixed:
            raise Failure(f"{run} was started with other values of {fixed}: they cannot change on --resume")
    else:
        args = cli(dataclasses.replace(Args(), **PRESETS[args.preset]))
    if args.obs != "pixels":
        raise Failure(f"--obs {args.obs}: Genie learns from pixels")
    if not 0 < args.context < args.clip_length:
        raise Failure(f"--context {args.context} must lie between 0 and --clip-length {args.clip_length}")
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


class Pond(gym.Env):
    """A duck on a pond whose edges meet: it turns and swims right, left, down or up by its size, or stays to dabble.

    A boat passes. The source of --preset tiny: actions show, at once and everywhere, and all else can be predicted.
    """

    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"
    observation_space, action_space = gym.spaces.Box(0, 255, (32, 32, 3), np.uint8), gym.spaces.Discrete(5)
    moves = np.array([(0, 8), (0, -8), (8, 0), (-8, 0), (0, 0)])
    light = cv2.resize(np.random.default_rng(0).random((5, 5)), (32, 32), interpolation=cv2.INTER_CUBIC)[..., None]
    water = (np.array([30, 90, 150]) + np.array([20, 40, 40]) * light.clip(0, 1)).astype(np.uint8)
    right = "...yyy.. ..yykyoo ..yyyyo. y...yy.. yyyyyyy. yygggyy. .yyyyyy. ..yyyy..".split()
    left = [line[::-1] for line in right]
    down = "..yyyy.. .ykyyky. .yyooyy. ..yooy.. .yyyyyy. gyyyyyyg gyyyyyyg ..yyyy..".split()
    up = "..yyyy.. .yyyyyy. .yyyyyy. ..yyyy.. .yyyyyy. ygyyyygy yggyyggy ..yyyy..".split()
    dabble = "........ ........ ...yy... ..yyyy.. ..yggy.. .yggggy. w.w..w.w ........".split()
    boat = "......w..... .....ww..... ....www..... ...wwww..... ......b..... .bbbbbbbbbb. ..bbbbbbbb..".split()
    colours = dict(y=(250, 210, 60), g=(220, 170, 40), o=(240, 120, 30), k=(20,) * 3, w=(245,) * 3, b=(120, 70, 40))

    def __init__(self, render_mode=None):
        self.ducks = self.right, self.left, self.down, self.up, self.dabble

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.place, self.sailed = 0, 8 * self.np_random.integers(4, size=2), self.np_random.integers(32)
        self.duck = self.right
        return self.render(), {}

    def step(self, action):
        self.count, self.place, self.sailed = self.count + 1, self.place + self.moves[action], self.sailed + 1
        self.duck = self.ducks[action]
        return self.render(), 0.0, False, self.count == 200, {}

    def render(self):
        image = self.water.copy()
        for sprite, (top, left) in ((self.boat, (10, self.sailed)), (self.duck, self.place)):
            for row, line in enumerate(sprite, top):
                for column, colour in enumerate(line, left):
                    if colour != ".":
                        image[row % 32, column % 32] = self.colours[colour]
        return image


gym.register("Pond-v0", Pond)


class Clips:
    """Video on disk: frames (count, streams, H, W, C) uint8, whether a clip starts there, and the action before it.

    Actions are there for evaluation: only `true_actions` reads them. `kept` counts frames, files and files left out, up
    to the last point from which recording can go on. Failure when the disk is full; nothing is lost then.
    """

    def __init__(self, folder, shapes, streams, kept):
        self.folder, self.streams, self.kept, self.count = folder, streams, list(kept), kept[0]
        self.types = dict(frames=(np.uint8, shapes["frames"]), starts=(np.bool_, ()))
        self.types["actions"] = np.float32, shapes["actions"]
        self.files, self.left_out = {}, kept[2]
        os.makedirs(folder, exist_ok=True)

    def bytes(self, name):
        """Of one frame of all streams."""
        dtype, shape = self.types[name]
        return np.dtype(dtype).itemsize * math.prod(shape) * self.streams

    def append_from(self, count):
        """Forgets all but the first `count` frames; what is added comes after them."""
        self.flush()
        self.count = count
        for name in self.types:
            if count:
                self.map(name)  # which looks whether it is there
            self.files[name] = self.files.get(name) or open(f"{self.folder}/{name}.bin", "ab", 0)
            self.files[name].truncate(count * self.bytes(name))

    def add(self, frames, starts, actions=0):
        """One frame of each stream: (streams, H, W, C), (streams,), (streams, ...)."""
        try:
            for name, value in dict(frames=frames, starts=starts, actions=actions).items():
                dtype, shape = self.types[name]
                value = np.broadcast_to(np.asarray(value, dtype), (self.streams, *shape))
                if self.files[name].write(np.ascontiguousarray(value)) < self.bytes(name):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise Interrupted(f"no room for the video in {self.folder} ({error.strerror})") from None
        self.count += 1

    def keep(self, files=0):
        """All that was added until now stays."""
        self.kept = [self.count, self.kept[1] + files, self.left_out]

    def flush(self):
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def map(self, name):
        """What is there of frames, starts or actions: (count, streams, ...)."""
        dtype, shape = self.types[name]
        path, shape = f"{self.folder}/{name}.bin", (self.count, self.streams, *shape)
        if not os.path.exists(path) or os.path.getsize(path) < self.count * self.bytes(name):
            raise Failure(f"{path} is missing or too short: without its video the run cannot go on")
        return np.memmap(path, dtype, "r", shape=shape) if math.prod(shape) else np.zeros(shape, dtype)

    def open(self, length, tail=0.1):
        """Finds the clips of `length` frames that cross no start, as (first frame, stream); holds out the tail."""
        self.length, self.frames, age = length, self.map("frames"), np.zeros(self.streams, int)
        ends = np.zeros((self.count, self.streams), bool)
        for t, starts in enumerate(self.map("starts")):
            age = np.where(starts, 1, age + 1)
            ends[t] = age >= length
        first, split = np.argwhere(ends) - [length - 1, 0], int(self.count * (1 - tail))
        self.train, self.held_out = first[first[:, 0] + length <= split], first[first[:, 0] >= split]
        if not len(self.train) or not len(self.held_out):
            raise Failure(f"the video has too few clips of --clip-length {length} in its {self.count:,} frames")

    def get(self, windows):
        """Frames of windows (B, 2): (B, T, H, W, C)."""
        return self.frames[windows[:, :1] + np.arange(self.length), windows[:, 1:]]

    def some_held_out(self, count):
        """Evenly spaced windows of the end: (count, 2)."""
        return self.held_out[np.linspace(0, len(self.held_out) - 1, count).astype(int)]

    def true_actions(self, windows):
        """What happened between the frames of windows, as classes (B, L); None where nobody knows.

        Continuous actions are told apart by thirds of their range, in at most three dimensions.
        """
        shape = self.types["actions"][1]
        if shape == (0,):
            return None
        steps = windows[:, :1] + np.arange(1, self.length)
        actions = self.map("actions")[steps, windows[:, 1:]]
        thirds = np.digitize(actions[..., :3], [-1 / 3, 1 / 3]) if shape else actions[..., None]
        return (thirds.astype(int) * 3 ** np.arange(thirds.shape[-1])).sum(-1)


# === Maths ============================================================================================================


def patchify(video, size):
    """(B, T, H, W, C) -> (B, T, N, size² C): patches, rows first; the last ones are filled up with zeros."""
    height, width, channels = video.shape[2:]
    video = F.pad(video, (0, 0, 0, -width % size, 0, -height % size))
    patches = video.unflatten(3, (-1, size)).unflatten(2, (-1, size)).transpose(3, 4)  # rows, columns, size, size
    return patches.flatten(4).flatten(2, 3)


def unpatchify(patches, size, shape):
    """The inverse of patchify, for frames of a shape (H, W, C)."""
    height, width, channels = shape
    columns = -(-width // size)
    patches = patches.unflatten(3, (size, size, channels)).unflatten(2, (-1, columns)).transpose(3, 4)
    return patches.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


def roll(video, shift):
    """Moves each clip (B, T, H, W, C) by its own number of rows and columns, shift (B, 2); what leaves comes back."""
    place = lambda size, by: (torch.arange(size, device=video.device) + by.unsqueeze(1)) % size  # noqa: E731
    rows, columns = place(video.shape[2], shift[:, 0]), place(video.shape[3], shift[:, 1])
    clip, time = (torch.arange(size, device=video.device) for size in video.shape[:2])
    return video[clip[:, None, None, None], time[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def num_patches(size, shape):
    return -(-shape[0] // size) * -(-shape[1] // size)


def psnr(a, b, dims=(-3, -2, -1)):
    """Peak signal-to-noise ratio in dB of images in [0, 1], over their last three axes."""
    return -10 * (a - b).square().mean(dims).clamp(min=1e-10).log10()


def mutual_information(a, b):
    """Of two arrays of classes, as a share of the mean of their entropies: 0 independent, 1 the same up to names."""
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a.ravel(), b.ravel()), 1 / a.size)
    entropy = lambda p: -(p[p > 0] * np.log(p[p > 0])).sum()  # noqa: E731
    both = entropy(table.sum(1)) + entropy(table.sum(0))
    return 2 * (1 - entropy(table.ravel()) / both) if both > 0 else 0.0


def perplexity(counts):
    """Effective number of classes, from how often each occurred."""
    p = counts / counts.sum()
    return (-(p * p.clamp(min=1e-10).log()).sum()).exp()


def maskgit_schedule(tokens, steps):
    """How many tokens are still masked after each step: cosine (arXiv:2202.04200, section 3.3)."""
    return [round(tokens * math.cos(math.pi / 2 * (step + 1) / steps)) for step in range(steps)]


def maskgit_sample(predict, tokens, codes, steps, temperature, noise):
    """Decodes a frame's tokens from none: predict maps ids (B, N), `codes` where masked, to logits (B, N, V).

    Each step draws all masked tokens by noise (steps, B, N), and keeps the likeliest.
    """
    ids = torch.full(noise.shape[1:], codes, device=noise.device)
    for masked_after, draw in zip(maskgit_schedule(tokens, steps), noise, strict=True):
        probs = (predict(ids).float() / temperature).softmax(-1)
        drawn = (probs.cumsum(-1) <= draw.unsqueeze(-1)).sum(-1).clamp(max=codes - 1)
        masked = ids == codes
        confidence = probs.gather(-1, drawn.unsqueeze(-1)).squeeze(-1).masked_fill(~masked, 2.0)
        rank = confidence.argsort(-1).argsort(-1)
        ids = torch.where(rank < masked_after, codes, torch.where(masked, drawn, ids))
    return ids


def frechet_distance(a, b):
    """Between Gaussians fitted to features (count, dim) of real and of generated videos."""
    covs = [np.cov(x, rowvar=False) for x in (a, b)]
    roots = np.linalg.eigvals(covs[0] @ covs[1]).real.clip(min=0) ** 0.5
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covs[0] + covs[1]) - 2 * roots.sum()


# === Networks =========================================================================================================


def initialise(weight, fan_in, scale=1.0):
    """Truncated normal with standard deviation scale / sqrt(fan_in)."""
    std = 1.1368 * scale / math.sqrt(fan_in)
    return nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std) if scale else nn.init.zeros_(weight)


class Linear(nn.Linear):
    """Fully connected layer (..., inp) -> (..., out)."""

    def __init__(self, inp, out, scale=1.0):
        super().__init__(inp, out)
        initialise(self.weight, inp, scale)
        nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Self-attention with normalised queries and keys, over the tokens of a frame or over time, causally, at one place.

    Both are views of (B, T, N, C): over time, the places are heads.
    """

    def __init__(self, width, heads, head_size, over_time):
        super().__init__()
        self.heads, self.over_time = heads, over_time
        self.query, self.key, self.value = (Linear(width, heads * head_size) for _ in range(3))
        self.query_norm, self.key_norm = nn.LayerNorm(head_size), nn.LayerNorm(head_size)
        self.out = Linear(heads * head_size, width)

    def forward(self, x, past=None):
        """x (B, T, N, C), past keys and values of earlier frames, if T = 1 -> (B, T, N, C), all keys and values."""
        B, T, N, _ = x.shape
        query, key, value = (layer(x).view(B, T, N, self.heads, -1) for layer in (self.query, self.key, self.value))
        query, key = self.query_norm(query), self.key_norm(key)
        if not self.over_time:
            x = F.scaled_dot_product_attention(*(y.flatten(0, 1).transpose(1, 2) for y in (query, key, value)))
            return self.out(x.transpose(1, 2).reshape(B, T, N, -1)), None
        query, key, value = (y.flatten(2, 3).transpose(1, 2) for y in (query, key, value))
        if past is not None:
            key, value = (torch.cat(pair, 2) for pair in zip(past, (key, value), strict=True))
        x = F.scaled_dot_product_attention(query, key, value, is_causal=past is None)
        return self.out(x.transpose(1, 2).reshape(B, T, N, -1)), (key, value)


class Block(nn.Module):
    """Attention over space, attention over time, one feed-forward layer (section 2): (B, T, N, C) -> the same."""

    def __init__(self, width, heads, head_size, ffn):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.space = Attention(width, heads, head_size, over_time=False)
        self.time = Attention(width, heads, head_size, over_time=True)
        self.ffn = nn.Sequential(Linear(width, int(ffn * width)), nn.GELU(), Linear(int(ffn * width), width))

    def forward(self, x, past=None):
        x = x + self.space(self.norms[0](x))[0]
        y, past = self.time(self.norms[1](x), past)
        x = x + y
        return x + self.ffn(self.norms[2](x)), past


class Transformer(nn.Module):
    """Blocks between learned positions and a normalised linear output: (B, T, N, C) -> (B, T, N, out)."""

    def __init__(self, args, size, length, tokens, out, device, scale=1.0):
        super().__init__()
        layers, width, heads, head_size = size
        self.remat = args.remat
        self.time = nn.Parameter(0.5 * torch.randn(length, 1, width))
        self.space = nn.Parameter(0.5 * torch.randn(tokens, width))
        self.blocks = nn.ModuleList()
        for _ in range(layers):  # sharded one by one: no process ever holds a large model whole
            block = Block(width, heads, head_size, args.ffn).to(device)
            if args.compile:
                block.compile(dynamic=False)
            self.blocks.append(shard(block, args, device))
        self.norm, self.out = nn.LayerNorm(width), Linear(width, out, scale)

    def forward(self, x, past=None):
        """With the past of all blocks, x is the frame that follows -> output, and the past with it."""
        start = 0 if past is None else past[0][0].shape[2]
        x = x + self.time[start : start + x.shape[1]] + self.space
        pasts = []
        for i, block in enumerate(self.blocks):
            if self.remat and torch.is_grad_enabled():
                x, kept = rematerialise(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x, kept = block(x, past and past[i])
            pasts.append(kept)
        return self.out(self.norm(x)), pasts


def shard(module, args, device):
    """Leaves each process its share of the parameters, if --shard says so; blocks then compute in bfloat16 on a GPU."""
    if not args.shard or not dist.is_initialized():
        return module
    half = args.amp and torch.device(device).type == "cuda" and isinstance(module, Block)
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    return fully_shard(module, mp_policy=policy)


class VQ(nn.Module):
    """Vector quantization (arXiv:1711.00937): codes and what is matched to them have length 1.

    A code that was not used for `patience` updates is put where an output of the encoder is. With `centre` inputs lose
    their mean over the batch, so that they cannot all be alike; a clip alone loses a running mean.
    """

    def __init__(self, codes, dim, commitment, patience, centre=False):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim) if centre else None)
        self.dim, self.commitment, self.patience = dim, commitment, patience
        self.codebook = nn.Parameter(F.normalize(torch.randn(codes, dim), dim=-1))
        self.register_buffer("idle", torch.zeros(codes))

    def codes(self):
        """All codes (V, D)."""
        return F.normalize(self.codebook.float(), dim=-1)

    def forward(self, x):
        """(..., D) -> code (..., D) with straight-through gradient, its index (...), loss."""
        x, codes = F.normalize(self.centred(x.float()), dim=-1), self.codes()
        with torch.autocast("cuda" if x.is_cuda else "cpu", enabled=False):  # bfloat16 would often choose another
            index = (x @ codes.T).argmax(-1)
        code = F.embedding(index, codes)
        loss = (code - x.detach()).square().mean() + self.commitment * (x - code.detach()).square().mean()
        return x + (code - x).detach(), index, loss

    def centred(self, x):
        if self.mean is None:
            return x
        return x - (average([x.detach().flatten(0, -2).mean(0)])[0] if len(x) > 1 else self.mean)

    @torch.no_grad()
    def restart(self, x, index, noise):
        """After an update on x (..., D): noise (V,) chooses the rows that replace codes which have been idle."""
        used = F.one_hot(index.flatten(), len(self.idle)).sum(0).float()
        if self.mean is not None:
            self.mean.lerp_(average([x.float().flatten(0, -2).mean(0)])[0], 0.1)
        x = F.normalize(self.centred(x.float()), dim=-1).flatten(0, -2)
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        row = (noise * len(x) * world).long() - rank * len(x)
        mine = (row >= 0) & (row < len(x))
        rows = torch.where(mine.unsqueeze(-1), x[row.clamp(0, len(x) - 1)], 0)
        if world > 1:
            dist.all_reduce(used)
            dist.all_reduce(rows)
        self.idle.copy_(torch.where(used > 0, 0, self.idle + 1))
        dead = self.idle >= (self.patience or math.inf)
        new = like(torch.where(dead.unsqueeze(-1), rows, whole(self.codebook)), self.codebook)
        self.codebook.copy_(new)
        self.idle.masked_fill_(dead, 0)
        return {"perplexity": perplexity(used), "restarts": dead.sum()}


class FSQ(nn.Module):
    """Finite scalar quantization (arXiv:2309.15505): each number is rounded to one of 2 to 5 levels."""

    def __init__(self, codes):
        super().__init__()
        levels, rest = [], codes
        for level in (5, 4, 3, 2):
            while rest % level == 0:
                levels, rest = [*levels, level], rest // level
        if rest > 1:
            raise Failure(f"--quantizer fsq: {codes} codes are no product of 2, 3, 4 and 5")
        self.count, self.dim = codes, len(levels)
        base = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("base", torch.tensor(base), persistent=False)

    def codes(self):
        """All codes (V, D)."""
        index = torch.arange(self.count, device=self.levels.device).unsqueeze(-1)
        return 2 * (index // self.base % self.levels) / (self.levels - 1) - 1

    def forward(self, x):
        """(..., D) -> code (..., D) in [-1, 1] with straight-through gradient, its index (...), no loss."""
        x = x.float().tanh()
        digits = ((x + 1) / 2 * (self.levels - 1)).round()
        code = 2 * digits / (self.levels - 1) - 1
        return x + (code - x).detach(), (digits.long() * self.base).sum(-1), x.new_zeros(())

    @torch.no_grad()
    def restart(self, x, index, noise):
        """Nothing to restart; counts."""
        used = F.one_hot(index.flatten(), len(noise)).sum(0).float()
        if dist.is_initialized():
            dist.all_reduce(used)
        return {"perplexity": perplexity(used), "restarts": used.new_zeros(())}


def make_quantizer(args, codes, centre=False):
    options = args.latent_dim, args.commitment, args.code_patience, centre
    return FSQ(codes) if args.quantizer == "fsq" else VQ(codes, *options)


def whole(x):
    """A tensor that processes hold shares of, as one."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(x, model):
    """The share of a whole tensor that this process holds, if it holds but a share of `model`."""
    return distribute_tensor(x, model.device_mesh, model.placements) if isinstance(model, DTensor) else x


# === World model ======================================================================================================


class Tokenizer(nn.Module):
    """Video (B, T, H, W, C) -> tokens (B, T, N) -> video in [0, 1] (section 2.1); a frame sees those before it."""

    def __init__(self, args, shape, device):
        super().__init__()
        self.args, self.shape, self.tokens = args, shape, num_patches(args.patch, shape)
        numbers, length = args.patch**2 * shape[2], args.clip_length
        self.quantizer = make_quantizer(args, args.num_codes)
        self.patch_in = Linear(numbers, args.encoder[1])
        self.encoder = Transformer(args, args.encoder, length, self.tokens, self.quantizer.dim, device)
        self.code_in = Linear(self.quantizer.dim, args.decoder[1])
        self.decoder = Transformer(args, args.decoder, length, self.tokens, numbers, device)

    def forward(self, video, shift):
        """Loss, VQ-VAE: video uint8, shift (B,) frames that the decoder does not get -> losses, stats, what restarts.

        Without its first frames a clip is filled up with copies of the last one, which no frame before sees.
        """
        patches = patchify(video / 255, self.args.patch)  # (B, T, N, E)
        latent = self.encoder(self.patch_in(patches))[0]  # (B, T, N, D)
        code, index, vq_loss = self.quantizer(latent)
        frame = (shift.unsqueeze(1) + torch.arange(video.shape[1], device=video.device)).clamp(max=video.shape[1] - 1)
        row = torch.arange(len(video), device=video.device).unsqueeze(1)
        error = (self.decode_patches(code[row, frame]) - patches[row, frame]).square().mean()
        losses = {"tokenizer_recon_loss": error, "tokenizer_vq_loss": vq_loss}
        return losses, {"tokenizer_psnr": -10 * error.detach().log10()}, (latent, index)

    def encode(self, video):
        """uint8 video -> tokens (B, T, N), their codes (B, T, N, D)."""
        patches = patchify(video / 255, self.args.patch)  # (B, T, N, E)
        code, index, _ = self.quantizer(self.encoder(self.patch_in(patches))[0])
        return index, code

    def decode(self, index):
        """Tokens (B, T, N) -> video (B, T, H, W, C) in [0, 1]."""
        patches = self.decode_patches(F.embedding(index, self.quantizer.codes()))
        return unpatchify(patches, self.args.patch, self.shape)

    def decode_patches(self, code):
        return self.decoder(self.code_in(code))[0].float().sigmoid()


class LatentActionModel(nn.Module):
    """Names what happens between two frames by one of few codes, which predict the second from the past (section 2.1).

    Its encoder sees the video up to the second frame, through one token more in each frame; its decoder the video up to
    the first. Sees patches (B, T, P, E) of pixels or, with --lam-input tokens, codes of the tokenizer. A decoder that
    knows place and past needs no names that mean the same everywhere: --lam-change and --lam-shift hide both from the
    encoder, and a patch in which a whole move fits makes moves easier to read than places.
    """

    def __init__(self, args, shape, tokenizer, device):
        super().__init__()
        self.args = args
        numbers, patches = args.lam_patch**2 * shape[2], num_patches(args.lam_patch, shape)
        if args.lam_input == "tokens":
            numbers, patches = tokenizer.quantizer.dim, tokenizer.tokens
        length = args.clip_length
        self.quantizer = make_quantizer(args, args.num_actions, args.lam_centre)
        self.patch_in = Linear(numbers, args.lam_encoder[1])
        self.token = nn.Parameter(0.02 * torch.randn(args.lam_encoder[1]))
        self.encoder = Transformer(args, args.lam_encoder, length, patches + 1, self.quantizer.dim, device)
        self.past_in = Linear(numbers, args.lam_decoder[1])
        self.code_in = Linear(self.quantizer.dim, args.lam_decoder[1])
        self.decoder = Transformer(
            args, args.lam_decoder, length - 1, patches, numbers, device, scale=0.0
        )  # copies at first

    def patches(self, video, code):
        """What it sees of uint8 video and the tokenizer's codes: (B, T, P, E)."""
        return code if self.args.lam_input == "tokens" else patchify(video / 255, self.args.lam_patch)

    def latent(self, patches):
        """(B, T, P, E) -> before quantization (B, L, D): entry t for what leads from frame t to t + 1."""
        change = patches[:, 1:] - patches[:, :-1]
        x = self.patch_in(change.flatten(0, 1).unsqueeze(1) if self.args.lam_change else patches)
        x = self.encoder(torch.cat([self.token.expand(*x.shape[:2], 1, -1), x], 2))[0][:, :, 0]
        return x.view(*change.shape[:2], -1) if self.args.lam_change else x[:, 1:]

    def forward(self, patches, seen):
        """Loss, VQ-VAE, its error as a share of that of copying the last frame -> losses, code (B, L, D), restarts.

        What its encoder gets, `seen`, may be shifted.
        """
        latent = self.latent(seen)  # (B, L, D)
        code, index, vq_loss = self.quantizer(latent)
        past, target = patches[:, :-1], patches[:, 1:]
        change = self.decoder(self.past_in(past) + self.code_in(code).unsqueeze(2))[0]  # (B, L, P, E)
        copy = average([(target - past).square().mean()])[0].clamp(min=1e-8)
        losses = {"lam_recon_loss": (past + change - target).square().mean() / copy, "lam_vq_loss": vq_loss}
        return losses, code, (latent, index)

    def encode(self, patches):
        """Latent actions as numbers (B, L)."""
        if patches.shape[1] == 1:  # nothing happens in one frame
            return torch.zeros(len(patches), 0, dtype=torch.long, device=patches.device)
        return self.quantizer(self.latent(patches))[1]

    def lookup(self, index):
        """(..., ) -> codes (..., D)."""
        return F.embedding(index, self.quantizer.codes())


class Dynamics(nn.Module):
    """MaskGIT: tokens of a clip, some of them masked, and its latent actions -> logits of all tokens (section 2.1)."""

    def __init__(self, args, tokens, code_dim, device):
        super().__init__()
        width = args.dynamics[1]
        self.separate = args.action_input == "token"
        self.embed = nn.Parameter(0.5 * torch.randn(args.num_codes + 1, width))  # the last is for masked tokens
        self.code_in = Linear(code_dim, width)
        self.transformer = Transformer(
            args, args.dynamics, args.clip_length, tokens + self.separate, args.num_codes, device
        )

    def forward(self, ids, code, past=None):
        """ids (B, T, N), code (B, T, D) that led to each frame, past of earlier frames -> logits (B, T, N, V), past."""
        x, action = F.embedding(ids, self.embed), self.code_in(code).unsqueeze(2)
        x = torch.cat([action, x], 2) if self.separate else x + action
        logits, past = self.transformer(x, past)
        return logits[:, :, int(self.separate) :].float(), past


# === Behaviour ========================================================================================================

# None: whoever plays chooses the latent actions.

# === Agent ============================================================================================================


STAGES = ("tokenizer", "dynamics")  # trained one after the other; the LAM goes with the dynamics


class Agent(nn.Module):
    """The three models and their optimizers: what is trained, what is saved.
    Changed from dreamer_v3.py: it does not act."""

    def __init__(self, args, shape, device="cpu"):
        super().__init__()
        self.args, self.shape, self.device = args, shape, torch.device(device)
        if args.compile and not can_compile():
            raise Failure("--compile needs a compiler: apt-get install g++ python3-dev (or say --no-compile)")
        self.tokenizer = Tokenizer(args, shape, device)
        self.lam = LatentActionModel(args, shape, self.tokenizer, device)
        self.dynamics = Dynamics(args, self.tokenizer.tokens, self.lam.quantizer.dim, device)
        self.register_buffer("updates", torch.zeros(len(STAGES), dtype=torch.float64))
        self.to(device)
        for part, methods in ((self.tokenizer, "encode decode"), (self.lam, "encode lookup"), (self.dynamics, "")):
            shard(part, args, device)
            for method in methods.split() * (args.shard and dist.is_initialized()):
                register_fsdp_forward_method(part, method)
        self.trained = list(self.parameters())
        second = [*self.lam.parameters(), *self.dynamics.parameters()]
        self.params = {"tokenizer": list(self.tokenizer.parameters()), "dynamics": second}
        options = dict(betas=(0.9, 0.9), weight_decay=args.weight_decay, capturable=self.device.type == "cuda")
        self.optimizers = {
            name: torch.optim.AdamW(params, torch.zeros((), device=device), fused=True, **options)
            for name, params in self.params.items()
        }
        self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=args.amp)

    def noise(self, stage, batch_size, seed):
        """All random numbers of an update, the same in all processes: for the tokenizer shift (B,), for the dynamics
        masked (B, T, N), corrupt (B, T, N), ids (B, T, N) that replace corrupt ones, shift (B, 2); restart (codes,)."""
        args, device = self.args, self.device
        generator = torch.Generator(device).manual_seed(seed)
        rand = lambda *shape: torch.rand(*shape, generator=generator, device=device)  # noqa: E731
        B, T, N = batch_size, args.clip_length, self.tokenizer.tokens
        if stage == "tokenizer":
            shift = torch.where(rand(B) < args.window_shift, (rand(B) * T).long(), 0)
            return {"shift": shift, "restart": rand(args.num_codes)}
        masked = rand(B, T, N) < 0.5 + 0.5 * rand(B, 1, 1)  # section 2.1: a rate between 0.5 and 1
        clean = torch.where(rand(B) < args.clean_context, (rand(B) * (T - 1)).long(), 0)
        masked &= torch.arange(T, device=device)[:, None] > clean[:, None, None]  # the first frame never
        corrupt = rand(B, T, N) < args.corrupt * rand(B, 1, 1)
        ids = (rand(B, T, N) * args.num_codes).long()
        places = torch.tensor(self.shape[:2], device=device) // max(1, args.lam_shift)
        shift = (rand(B, 2) * places).long() * args.lam_shift
        return {"masked": masked, "corrupt": corrupt, "ids": ids, "shift": shift, "restart": rand(args.num_actions)}

    def update_tokenizer(self, video, noise):
        """One gradient step of the tokenizer on uint8 video (B, T, H, W, C) -> metrics by key."""
        with self.autocast():
            losses, stats, used = self.tokenizer(video, noise["shift"])
        stats |= self.step("tokenizer", losses)
        stats |= {f"tokenizer_{k}": v for k, v in self.tokenizer.quantizer.restart(*used, noise["restart"]).items()}
        return self.metrics(losses, stats)

    def update_dynamics(self, video, noise):
        """One gradient step of LAM and dynamics, whose gradients do not meet: the dynamics take codes as they are."""
        with self.autocast():
            with torch.no_grad():
                ids, token_code = self.tokenizer.encode(video)  # (B, T, N)
                patches = self.lam.patches(video, token_code)  # (B, T, P, E)
            seen = patches if self.args.lam_input == "tokens" else self.lam.patches(roll(video, noise["shift"]), None)
            losses, code, used = self.lam(patches, seen)
            code = F.pad(code if self.args.lam_grad_through_dynamics else code.detach(), (0, 0, 1, 0))  # (B, T, D)
            masked, seen = noise["masked"], torch.where(noise["corrupt"], noise["ids"], ids)  # (B, T, N)
            seen = seen.masked_fill(masked, self.args.num_codes)  # (B, T, N)
            logits = self.dynamics(seen, code)[0]  # (B, T, N, V)
        loss = F.cross_entropy(logits.flatten(0, 2), ids.flatten(), reduction="none").view_as(ids)  # (B, T, N)
        count = average([masked.sum().float()])[0].clamp(min=1)
        losses["dynamics_loss"] = (loss * masked).sum() / count
        stats = {"masked_accuracy": ((logits.argmax(-1) == ids) & masked).sum() / count}
        stats |= self.step("dynamics", losses)
        stats |= {f"lam_{k}": v for k, v in self.lam.quantizer.restart(*used, noise["restart"]).items()}
        return self.metrics(losses, stats)

    def step(self, stage, losses):
        """Clipping, AdamW, schedule -> stats."""
        args, params, optimizer = self.args, self.params[stage], self.optimizers[stage]
        optimizer.zero_grad()
        sum(losses.values()).backward()
        if not isinstance(params[0], DTensor):
            for p, grad in zip(params, average([p.grad for p in params]), strict=True):
                p.grad = grad
        norm = nn.utils.clip_grad_norm_(params, args.clip or math.inf)
        rate = optimizer.param_groups[0]["lr"]
        rate.copy_(self.rate(stage, self.updates[STAGES.index(stage)]))
        optimizer.step()
        self.updates[STAGES.index(stage)] += 1
        return {f"{stage}_grad_norm": whole(norm), f"{stage}_rate": rate}

    def rate(self, stage, updates):
        """Learning rate after so many updates: warm-up, then constant or half a cosine (appendices)."""
        args = self.args
        if stage == "tokenizer":
            return args.tokenizer_rate * ((updates + 1) / max(1, args.tokenizer_warmup)).clamp(max=1)
        share = ((updates - args.warmup) / max(1, args.steps - args.warmup)).clamp(0, 1)
        rate = args.final_rate + (args.learning_rate - args.final_rate) * (1 + (math.pi * share).cos()) / 2
        return rate * ((updates + 1) / max(1, args.warmup)).clamp(max=1)

    def metrics(self, losses, stats):
        values = {f"losses/{k}": v for k, v in losses.items()} | {f"stats/{k}": v for k, v in stats.items()}
        return {key: value.detach().float().clone() for key, value in values.items()}

    @torch.no_grad()
    def generate(self, ids, action, noise):
        """Tokens (B, t, N) of the past, latent actions (B, t) up to the one to come, noise (steps, B, N) -> (B, N).

        The past goes through the model once; only the new frame's tokens go through it in each step.
        """
        args = self.args
        with self.autocast():
            code = F.pad(self.lam.lookup(action), (0, 0, 1, 0))
            past = self.dynamics(ids, code[:, :-1])[1]
            predict = lambda new: self.dynamics(new.unsqueeze(1), code[:, -1:], past)[0].squeeze(1)  # noqa: E731
            return maskgit_sample(predict, ids.shape[2], args.num_codes, args.maskgit_steps, args.temperature, noise)

    def rollout(self, ids, action, generator):
        """Goes on from tokens (B, t, N) by latent actions (B, t - 1 + steps) -> tokens (B, t + steps, N)."""
        B, t, N = ids.shape
        for end in range(t, action.shape[1] + 1):
            start = max(0, end - self.args.clip_length + 1)
            noise = torch.rand(self.args.maskgit_steps, B, N, generator=generator).to(self.device)
            new = self.generate(ids[:, start:], action[:, start:end], noise)
            ids = torch.cat([ids, new.unsqueeze(1)], 1)
        return ids

    @torch.no_grad()
    def infer(self, video):
        """uint8 video -> tokens (B, T, N), latent actions (B, L)."""
        with self.autocast():
            ids, code = self.tokenizer.encode(video)
            return ids, self.lam.encode(self.lam.patches(video, code))

    @torch.no_grad()
    def show(self, ids):
        """Tokens (B, t, N), any number of frames -> uint8 video, each frame decoded with what is remembered then."""
        T = self.args.clip_length
        with self.autocast():
            frames = self.tokenizer.decode(ids[:, :T])
            later = [self.tokenizer.decode(ids[:, t - T + 1 : t + 1])[:, -1:] for t in range(T, ids.shape[1])]
        return (torch.cat([frames, *later], 1) * 255).round().byte()

    def get_extra_state(self):
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def set_extra_state(self, state):
        for name, saved in state.items():  # none where a run was published to be played
            for p, values in zip(self.params[name], saved["state"].values(), strict=False):
                values |= {key: like(value, p) for key, value in values.items() if value.shape == p.shape}
            for group in saved["param_groups"]:
                group |= dict(lr=group["lr"].to(self.device), capturable=self.device.type == "cuda")
            self.optimizers[name].load_state_dict(saved)

    def load_state_dict(self, state, **options):
        own = dict(self.named_parameters())
        return super().load_state_dict({k: like(v, own.get(k)) for k, v in state.items()}, **options)


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
    """The learned world as a Gymnasium environment whose actions are the latent ones; rewards are 0.

    It starts after `context` real frames of the clips that were held out, and is cut after `length` steps. info["real"]
    is the last real frame.
    Changed from dreamer_v3.py: there is no environment behind it.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    render_mode = "rgb_array"

    def __init__(self, agent, clips, length=500):
        self.agent, self.clips, self.length = agent, clips, length
        self.observation_space = gym.spaces.Dict({"image": gym.spaces.Box(0, 255, agent.shape, np.uint8)})
        self.action_space = gym.spaces.Discrete(agent.args.num_actions)
        self.graph = Graph(agent.generate, agent.device)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.generator = torch.Generator().manual_seed(int(self.np_random.integers(2**31)))
        window = self.clips.held_out[self.np_random.integers(len(self.clips.held_out))]
        video = torch.from_numpy(self.clips.get(window[None])[:, : self.agent.args.context]).to(self.agent.device)
        self.ids, self.actions = self.agent.infer(video)
        self.steps, self.real = 0, video[0, -1].cpu().numpy()
        return self.observation(), {"real": {"image": self.real.copy()}}

    def step(self, action):
        agent, T = self.agent, self.agent.args.clip_length
        action = torch.tensor([[int(action)]], device=agent.device)
        self.actions = torch.cat([self.actions, action], 1)[:, 1 - T :]
        noise = torch.rand(agent.args.maskgit_steps, 1, self.ids.shape[2], generator=self.generator).to(agent.device)
        inputs = self.ids[:, 1 - T :], self.actions, noise
        new = self.graph(*inputs) if inputs[0].shape[1] == T - 1 else agent.generate(*inputs)
        self.ids = torch.cat([inputs[0], new.unsqueeze(1)], 1)
        self.steps += 1
        return self.observation(), 0.0, False, self.steps >= self.length, {"real": {"image": self.real.copy()}}

    def observation(self):
        self.obs = {"image": self.agent.show(self.ids)[0, -1].cpu().numpy()}
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
def action_grid(agent, clips, prompts=3, steps=16):
    """Video (t, rows, columns, 3), a row for each prompt: the truth, its own latent actions played, each code held.

    What is given is framed.
    """
    args, A = agent.args, agent.args.num_actions
    data = torch.from_numpy(clips.get(clips.some_held_out(prompts))).to(agent.device)
    ids, action = agent.infer(data)
    c = min(args.context, args.clip_length // 2)
    held = torch.arange(A, device=agent.device).view(1, A, 1).expand(prompts, A, steps)
    held = torch.cat([action[:, None, : c - 1].expand(-1, A, -1), held], 2).flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    played = agent.show(agent.rollout(ids[:, :c], action, generator))
    held = agent.show(agent.rollout(ids[:, :c].repeat_interleave(A, 0), held, generator)).unflatten(0, (prompts, A))
    video = []
    for t in range(c + steps):
        rows = []
        for row in range(prompts):
            last = min(t, data.shape[1] - 1)
            frames = [data[row, last], played[row, last], *held[row, :, t]]
            frames = [picture({"image": frame.cpu().numpy()}).copy() for frame in frames]
            for frame in frames if t < c else []:
                frame[:2], frame[-2:], frame[:, :2], frame[:, -2:] = [[60, 180, 75]] * 4
            rows.append(np.concatenate(frames, 1))
        video.append(np.concatenate(rows))
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


VIDEOS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".gif")


def record_env(args, clips):
    """Plays at random and appends what is seen to the clips, going on from their end; yields after each step.

    An environment is brought back by its episode's seed and actions; if it is not deterministic, a new episode starts.
    """
    size = args.total_timesteps // args.action_repeat * sum(map(clips.bytes, clips.types)) // clips.streams
    free, there = shutil.disk_usage(clips.folder).free, clips.count * sum(map(clips.bytes, clips.types))
    if size > free + there:
        raise Failure(
            f"the video needs {size / 1e9:.1f} GB in {clips.folder}, where {free / 1e9:.1f} GB are free: "
            "make room, or lower --total-timesteps"
        )
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    envs = make_envs(args, args.num_envs)
    try:
        space, images = envs.single_action_space, image_keys(envs.single_observation_space)
        obs = envs.reset(seed=[args.seed] * args.num_envs)[0]
        if not clips.count:
            clips.add(obs[images[0]], True)
        else:
            frames, starts, actions = (clips.map(name) for name in ("frames", "starts", "actions"))
            states = {}
            for env in range(args.num_envs):
                first = np.flatnonzero(starts[:, env])
                taken = actions[first[-1] + 1 :, env].astype(space.dtype)
                states[env] = args.seed, len(first) - 1, taken
            back = enumerate(envs.call("restore", states))
            lost = [env for env, obs in back if not np.array_equal(obs[images[0]], frames[-1, env])]
            if lost:
                print(f"environments {lost} are not deterministic: fresh episodes start there", file=sys.stderr)
                envs.call("abandon", lost)
        while clips.count * args.num_envs * args.action_repeat < args.total_timesteps:
            rng = np.random.default_rng([args.seed, clips.count])
            if isinstance(space, gym.spaces.Discrete):
                action = rng.integers(space.n, size=args.num_envs)
            else:
                action = rng.uniform(-1, 1, (args.num_envs, *space.shape)).astype(np.float32)
            obs = envs.step(action)[0]
            clips.add(obs[images[0]], obs["is_first"] > 0, action)
            clips.keep()
            yield
    except (EOFError, ConnectionError):
        raise Interrupted("the process of an environment died") from None
    finally:
        gym.logger.min_level = 50  # it warns when a step is pending
        try:
            envs.close()
        except (EOFError, ConnectionError):
            envs.closed = True


def image_keys(space):
    return [key for key, value in space.items() if value.dtype == np.uint8]


def record_files(args, clips):
    """Decodes the files of --video-dir and appends them to the clips, from the first that is not there yet.

    Frames are taken at --fps; a new clip starts at a cut. What cannot be decoded, or is shorter than a clip, is left
    out, named and counted. Yields after each frame; only whole files are kept.
    """
    import av

    paths = sorted(os.path.join(folder, name) for folder, _, names in os.walk(args.video_dir) for name in names)
    paths = [path for path in paths if path.lower().endswith(VIDEOS)]
    if not paths:
        raise Failure(f"--video-dir {args.video_dir} has no video files ({' '.join(VIDEOS)})")
    height, width, _ = clips.types["frames"][1]
    for path in paths[clips.kept[1] :]:
        try:
            last, due, start = None, 0.0, clips.count
            with av.open(path) as file:
                stream = file.streams.video[0]
                for number, frame in enumerate(file.decode(stream)):
                    now = frame.time if frame.time is not None else number / float(stream.average_rate or 25)
                    if now + 1e-6 < due:
                        continue
                    due = (due if now < due + 1 / args.fps else now) + 1 / args.fps
                    image = frame.reformat(width, height, "rgb24").to_ndarray()
                    cut = last is None or np.abs(image.astype(np.int16) - last).mean() > 255 * args.cut
                    clips.add(image, cut)
                    last = image
                    yield
            if clips.count - start < args.clip_length:
                raise ValueError(f"only {clips.count - start} frames")
        except (av.FFmpegError, IndexError, ValueError, MemoryError) as error:
            clips.append_from(start)
            clips.left_out += 1
            print(f"{path} is left out: {' '.join(str(error).split())}", file=sys.stderr)
        clips.keep(files=1)
    if clips.left_out:
        print(f"{clips.left_out} of {len(paths)} files are left out", file=sys.stderr)
    if not clips.count:
        raise Failure(f"none of the {len(paths)} files in {args.video_dir} can be used")


def start_log(args, run, frame, agent, clips):
    """Writes and prints what runs, opens the log.
    Changed from dreamer_v3.py: frames of video instead of a replay."""
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
    parts = dict(tokenizer=agent.tokenizer, lam=agent.lam, dynamics=agent.dynamics)
    sizes = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in parts.items())
    print(f"{run}: parameters: {sizes}; {agent.device}")
    if not args.video_dir:
        room = args.total_timesteps // args.action_repeat * sum(map(clips.bytes, clips.types)) // clips.streams
        frames = f"{args.total_timesteps:,} frames of the environment, {args.action_repeat} for each action"
        print(f"{frames}: {room / 1e9:.1f} GB of video")
    return log


@torch.no_grad()
def evaluate(agent, args, clips):
    """Metrics on clips that were held out; where true actions are known, whether the latent ones are them.
    Changed from dreamer_v3.py: there are no returns."""
    windows, generator = clips.some_held_out(args.eval_episodes), torch.Generator().manual_seed(0)
    sums, names, delta, videos = {}, [], [], []
    c, t = max(1, args.clip_length - 4), min(4, args.clip_length - 1)
    for start in range(0, len(windows), args.batch_size):
        video = torch.from_numpy(clips.get(windows[start : start + args.batch_size])).to(agent.device)
        B, truth = len(video), video / 255
        ids, action = agent.infer(video)
        names.append(action.cpu())
        noise = agent.noise("dynamics", B, start)
        with agent.autocast():
            code = F.pad(agent.lam.lookup(action), (0, 0, 1, 0))
            logits = agent.dynamics(ids.masked_fill(noise["masked"], args.num_codes), code)[0]
            recon = agent.tokenizer.decode(ids)
        values = {
            "tokenizer_psnr": psnr(recon, truth).mean(1),
            "masked_accuracy": accuracy(logits.argmax(-1) == ids, noise["masked"]),
            "copy_accuracy": accuracy(torch.cat([ids[:, :1], ids[:, :-1]], 1) == ids, noise["masked"]),
        }
        # section 3, metrics: how much better x_t is predicted with the inferred than with random actions
        other = torch.randint(args.num_actions, (B, t), generator=generator).to(action)
        other = torch.cat([action[:, : c - 1], other], 1)
        ends = [agent.rollout(ids[:, :c], a[:, : c - 1 + t], generator) for a in (action, other)]
        ends = [psnr(agent.show(end)[:, -1] / 255, truth[:, c + t - 1]) for end in ends]
        delta.append((ends[0] - ends[1]).cpu())
        values["rollout_psnr"] = ends[0]
        if args.fvd:
            videos.append((video, agent.show(agent.rollout(ids[:, :1], action, generator))))
        for key, value in values.items():
            sums[key] = sums.get(key, 0.0) + value.double().sum().item() / len(windows)
        counts = F.one_hot(ids.flatten(), args.num_codes).sum(0)
        sums["counts"] = sums.get("counts", 0) + counts
    names, delta = torch.cat(names), torch.cat(delta)
    row = {f"eval/{key}": value for key, value in sums.items() if key != "counts"}
    row["eval/tokenizer_perplexity"] = perplexity(sums["counts"]).item()
    row["eval/lam_perplexity"] = perplexity(names.flatten().bincount()).item()
    row["eval/delta_psnr"] = delta.mean().item()
    row["eval/delta_psnr_error"] = 1.96 * delta.std().item() / math.sqrt(len(delta))
    truth = clips.true_actions(windows)
    if truth is not None:
        row["eval/action_information"] = mutual_information(names.numpy(), truth)
    if args.fvd:
        network = torch.jit.load(args.fvd, map_location=agent.device)
        features = [
            torch.cat([network(x.permute(0, 4, 1, 2, 3).float() / 255).flatten(1) for x in each]).double().cpu().numpy()
            for each in zip(*videos, strict=True)
        ]
        row["eval/fvd"] = frechet_distance(*features)
    return row


def accuracy(right, masked):
    """(B, T, N) -> (B,), of masked tokens."""
    return (right & masked).sum((1, 2)) / masked.sum((1, 2)).clamp(min=1)


def train(args):
    """Records, then trains the tokenizer, then LAM and dynamics, from the start or a checkpoint -> the run directory.
    Changed from dreamer_v3.py: three stages, one after the other."""
    device, rank, world = setup(dataclasses.replace(args, num_envs=0))  # one process records
    if args.tokenizer_batch_size % world:
        raise Failure(f"--tokenizer-batch-size {args.tokenizer_batch_size} must be a multiple of {world}")
    source = os.path.basename(os.path.abspath(args.video_dir)) if args.video_dir else args.env_id.replace("/", "-")
    names = [args.resume or f"{args.run_dir}/{source}__{args.exp_name}__{args.seed}__{int(time.time())}"]
    if world > 1:
        dist.broadcast_object_list(names)
    run = names[0]
    state = load(run, "cpu" if args.shard else device, resume=True) if args.resume else {}
    shapes = state.get("shapes") or source_shapes(args)
    agent = Agent(args, shapes["frames"], device)
    if state:
        load_agent(agent, state)
    clips = Clips(f"{run}/video", shapes, 1 if args.video_dir else args.num_envs, state.get("kept", [0, 0, 0]))
    updates, sums = state.get("updates", 0), state.get("sums", {})

    def frames_seen():
        parts = min(updates, args.tokenizer_steps), max(0, updates - args.tokenizer_steps)
        return args.clip_length * (parts[0] * args.tokenizer_batch_size + parts[1] * args.batch_size)

    def checkpoint():
        """Everything, so that the run goes on as if it had not stopped."""
        models = tree_map(whole, agent.state_dict())
        if rank == 0:
            clips.flush()
            save(
                f"{run}/checkpoint.pt",
                dict(script=SCRIPT, agent=models, updates=updates, sums=sums, kept=clips.kept, shapes=shapes),
            )

    def stop_if_asked():
        if agree(bool(signals), device):
            checkpoint()
            if rank == 0:
                print(f"stopped at update {updates} and saved: --resume {run} continues")
            sys.exit(128 + (signals[0] if signals else signal.SIGTERM))

    signals, saved_at, frame = [], time.time(), frames_seen()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    log = start_log(args, run, frame, agent, clips) if rank == 0 else None
    bar = None
    try:
        if not updates:
            for _ in record_video(args, clips, rank, device):
                stop_if_asked()
                if agree(time.time() - saved_at > args.save_every * 60, device):
                    checkpoint()
                    saved_at = time.time()
        clips.open(args.clip_length)
        functions = {name: getattr(agent, f"update_{name}") for name in STAGES}
        if not args.shard:  # gathering shares cannot be captured
            functions = {name: Graph(function, device) for name, function in functions.items()}
        total = args.clip_length * (args.tokenizer_steps * args.tokenizer_batch_size + args.steps * args.batch_size)
        bar = tqdm(total=total, initial=frame, unit="frames", disable=rank > 0, smoothing=0.05)
        row_at, batch = (time.time(), frame), None

        def fetch(update):
            """What an update takes follows from its number; each process takes its share of the clips."""
            stage = STAGES[update >= args.tokenizer_steps]
            size = args.tokenizer_batch_size if stage == "tokenizer" else args.batch_size
            rng = np.random.default_rng([args.seed, update])
            windows = clips.train[rng.integers(len(clips.train), size=size)]
            noise = agent.noise(stage, size, int(rng.integers(2**31)))
            share = slice(rank * size // world, (rank + 1) * size // world)
            noise = {key: value if key == "restart" else value[share] for key, value in noise.items()}
            return stage, to_tensors({"video": clips.get(windows[share])}, device)["video"], noise

        while updates < args.tokenizer_steps + args.steps:
            stop_if_asked()
            started = time.time()
            stage, video, noise = batch or fetch(updates)
            metrics = functions[stage](video, noise)
            ahead = device.type == "cuda" and updates + 1 < args.tokenizer_steps + args.steps
            batch = fetch(updates + 1) if ahead else None  # while the GPU works
            values = average([torch.stack(list(metrics.values()))])[0].tolist()
            for key, value in zip(metrics, values, strict=True):
                if not math.isfinite(value):
                    raise Failure(f"{key} is {value}, update {updates}, frame {frame}: the last checkpoint is kept")
                sums.setdefault(key, []).append(value)
            updates += 1
            before, frame = frame, frames_seen()
            first = updates - args.tokenizer_steps * (stage != "tokenizer") == 3
            if first and device.type == "cpu" and rank == 0:
                left = args.tokenizer_steps if stage == "tokenizer" else args.steps
                tell_cost(time.time() - started, left - 3, stage)
            bar.update(frame - before)
            done = updates == args.tokenizer_steps + args.steps
            if frame // args.log_every > before // args.log_every and rank == 0:
                row = {key: sum(value) / len(value) for key, value in sums.items()}
                row |= {"charts/SPS": (frame - row_at[1]) / (time.time() - row_at[0]), "charts/updates": updates}
                log.scalars(frame, row)
            if frame // args.log_every > before // args.log_every:
                sums, row_at = {}, (time.time(), frame)
            if (
                args.eval_every
                and args.eval_episodes
                and (done or frame // args.eval_every > before // args.eval_every)
            ):
                with torch.compiler.set_stance("force_eager"):  # their many shapes would fill the compiler's cache
                    row, video = evaluate(agent, args, clips), action_grid(agent, clips)
                if rank == 0:
                    log.scalars(frame, row)
                    log.video(frame, "video/latent_actions", video, fps=5)
                    if args.capture_video:
                        write_mp4(f"{run}/videos/eval_{frame}.mp4", list(video), fps=5)
            if agree(time.time() - saved_at > args.save_every * 60, device):
                checkpoint()
                saved_at = time.time()
        checkpoint()
    except Interrupted as error:
        checkpoint()
        raise Failure(f"{error}; saved: --resume {run} continues") from None
    finally:
        functions = {}  # their graphs hold operations of the group of processes
        if bar:
            bar.close()
    return run


def source_shapes(args):
    """Shapes of frames and of actions, as the clips hold them."""
    if args.video_dir:
        return dict(frames=(args.image_size, args.image_width or args.image_size, 3), actions=(0,))
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # games that draw with SDL are to open no window
    env = make_env(args)
    images = image_keys(env.observation_space)
    if len(images) != 1:
        raise Failure(f"--env-id {args.env_id}: Genie sees one image, not {images}")
    discrete = isinstance(env.action_space, gym.spaces.Discrete)
    env.close()
    return dict(frames=env.observation_space[images[0]].shape, actions=() if discrete else env.action_space.shape)


def record_video(args, clips, rank, device):
    """Records in the first process, for which the others wait: yields in all of them now and then, until it is done."""
    recorder, since = record_files(args, clips) if args.video_dir else record_env(args, clips), time.time()
    if rank == 0:
        clips.append_from(clips.count)
        total, repeat = None if args.video_dir else args.total_timesteps, 1 if args.video_dir else args.action_repeat
        with tqdm(total=total, initial=clips.count * clips.streams * repeat, unit="frames", desc="recording") as bar:
            for _ in recorder:
                bar.update(clips.streams * repeat)
                if time.time() - since > 1:
                    agree(False, device)
                    yield
                    since = time.time()
        clips.flush()
    while not agree(rank == 0, device):
        yield
    kept = [clips.kept]
    if dist.is_initialized():
        dist.broadcast_object_list(kept)
    clips.kept, clips.count = kept[0], kept[0][0]


def tell_cost(seconds, updates, stage):
    """Without a GPU, nobody should find out at hour nine. Changed from dreamer_v3.py: for each stage."""
    hours = seconds * updates / 3600
    hint = "; --preset tiny makes it minutes" if hours > 24 else ""
    tqdm.write(
        f"an update of the {stage} takes {seconds:.2f} s on this CPU, the {updates:,} to come {hours:.1f} hours{hint}"
    )


def load_run(args, run):
    """The agent of a run and its clips; an environment is recorded again where they are not there.
    Changed from dreamer_v3.py: clips instead of an environment."""
    device, *_ = setup(args)
    state = load(run, device)
    agent = Agent(args, state["shapes"]["frames"], device)
    load_agent(agent, state)
    again = not (args.video_dir or os.path.exists(f"{run}/video/frames.bin"))
    kept = [0, 0, 0] if again else state["kept"]
    clips = Clips(f"{run}/video", state["shapes"], 1 if args.video_dir else args.num_envs, kept)
    for _ in record_video(args, clips, 0, device) if again else ():
        pass
    clips.open(args.clip_length)
    return agent, clips


def inverse_model(agent, args, clips, steps=1000, seed=0):
    """What a model like the LAM's encoder reads of the true actions from the video if it is told them in training.

    -> mutual information on the clips of the evaluation, and the share of actions that it gets right.
    """
    held_out = clips.some_held_out(args.eval_episodes)
    truth = clips.true_actions(held_out)
    classes = int(clips.true_actions(clips.train[:: len(clips.train) // 1000 + 1]).max() + 1)
    torch.manual_seed(seed)
    model = LatentActionModel(args, agent.shape, agent.tokenizer, agent.device).to(agent.device)
    head = Linear(model.quantizer.dim, classes).to(agent.device)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], args.learning_rate)
    rng = np.random.default_rng(seed)

    def logits(windows):
        with agent.autocast():
            video = torch.from_numpy(clips.get(windows)).to(agent.device)
            with torch.no_grad():
                patches = model.patches(video, agent.tokenizer.encode(video)[1] if args.lam_input == "tokens" else None)
            return head(model.latent(patches)).float()

    for _ in range(steps):
        windows = clips.train[rng.integers(len(clips.train), size=args.batch_size)]
        target = torch.from_numpy(clips.true_actions(windows)).to(agent.device)
        loss = F.cross_entropy(logits(windows).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        read = torch.cat([logits(part).argmax(-1) for part in np.array_split(held_out, len(held_out) // 16 + 1)])
    read = read.cpu().numpy()
    return mutual_information(read, truth), (read == truth).mean()


def score(args):
    """--evaluate: prints the metrics on held-out clips; with --capture-video writes the grid of latent actions as mp4.
    Changed from dreamer_v3.py: there are no returns."""
    agent, clips = load_run(args, args.evaluate)
    row = evaluate(agent, args, clips)
    if "eval/action_information" in row:
        both = inverse_model(agent, args, clips)
        row |= zip(("eval/inverse_information", "eval/inverse_accuracy"), both, strict=True)
    for key, value in row.items():
        print(f"{key} {value:.4f}")
    if args.capture_video:
        write_mp4(f"{args.evaluate}/videos/latent_actions.mp4", list(action_grid(agent, clips)), fps=5)


PAGE = """<!doctype html><meta charset=utf-8><title>Dream</title>
<style>body{font:16px sans-serif;margin:2em;background:#111;color:#ddd}
img{height:320px;image-rendering:pixelated}</style>
<h3>You act, the model dreams: <span id=text></span></h3>
<img id=dream> <img id=real>
<p>Left the dream; right the last real frame before it.</p>
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
    """Keys held -> latent action, None for other keys. Changed from dreamer_v3.py: no action is known to do nothing."""
    return next((action for action, key in enumerate(KEYS[: int(space.n)]) if key in keys), None)


def png(frame):
    """(H, W, 3) -> PNG in base64."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def play(args):
    """--play: a page on 127.0.0.1 where you act in the dream; with --capture-video an mp4 of each latent action.
    Changed from dreamer_v3.py: there is no actor."""
    agent, clips = load_run(args, args.play)
    dream = Dream(agent, clips)
    obs, info = dream.reset(seed=args.seed)
    if args.capture_video:
        return write_mp4(f"{args.play}/videos/dream.mp4", list(action_grid(agent, clips)), fps=5)
    used, text = int(dream.action_space.n), ""
    if used > len(KEYS):
        raise Failure(f"--play: {used} latent actions are more than the {len(KEYS)} keys")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            nonlocal obs, info, text
            url = urllib.parse.urlparse(self.path)
            if url.path == "/":
                return self.reply("text/html", PAGE)
            if url.path == "/reset":
                (obs, info), text = dream.reset(), "a new dream"
            elif url.path == "/step":
                action = key_action(urllib.parse.parse_qs(url.query).get("key", []), dream.action_space)
                if action is not None:
                    obs, _, _, truncated, info = dream.step(action)
                    text = f"step {dream.steps}" + ", the end" * truncated
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
