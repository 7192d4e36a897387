"""Genie: Generative Interactive Environments (Bruce et al. 2024), arXiv:2402.15391v1. The authors gave no code.

    python genie.py                                    # record a video, learn from it: --preset tiny, two CPU cores
    python genie.py --preset small --video-dir videos  # learn from your own files
    python genie.py --resume runs/<run>                # continue; --evaluate runs/<run> scores it
    python genie.py --clone runs/<run>                 # a policy from an expert's video, which has no actions
    python play.py runs/<run> --prompt picture.png     # act in the world that it learnt, from a picture of yours

Video comes without actions. A tokenizer (VQ-VAE) makes frames discrete. A latent action model (LAM, another VQ-VAE with
very few codes) names what happens between two frames, by learning to predict the second from the past and the code.
The dynamics model (MaskGIT) predicts the next frame's tokens from the past and the code. Then you choose the codes. All
three are transformers of blocks that attend over space, then causally over time, then apply one feed-forward layer.

Frames on all axes are those of video that was trained on; --total-timesteps are those that are recorded from an
environment, and --eval-episodes counts clips that were held out: windows of the last tenth of the video.

Where the paper says nothing, chosen here: LayerNorm before each layer, GELU, learned positions, no dropout, normalised
queries and keys (paper: in the dynamics); codes and what is matched to them have length 1, are learned by gradient, and
one that nothing uses is put where an output of the encoder is; the LAM's decoder predicts how its last frame changes,
in units of how much it changes; the dynamics' loss is on masked tokens alone; MaskGIT keeps the likeliest of its draws,
at one temperature; ΔtPSNR starts from all but four frames of a clip. The paper's parameter counts leave next to no room
for feed-forward layers: --ffn 0.5 fits them. The tokenizer's encoder of --preset tiny sees each patch by itself.

Shapes: B batch, T time, L = T - 1, N tokens of a frame, P patches of a frame of the LAM, V codes of a token, A latent
actions, C width of a model, D width of a code, E numbers in a patch. Videos are uint8, (B, T, height, width, 3).
"""

import atexit
import ctypes
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import av
import cv2
import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn  # now, since its defaults would keep a process group that exists, beyond its end
import torch.nn.functional as F
import tyro
from PIL import Image, ImageOps
from tensorboardX import SummaryWriter
from torch import nn
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

    # Genie. Defaults: appendix F of the paper (CoinRun), unless said otherwise. Sizes: layers, width, heads, head size
    preset: Literal["tiny", "small", "coinrun", "platformers"] = "tiny"  # source, sizes and schedules
    clone: str | None = None  # run directory whose latent actions teach a policy, from an expert's video
    clone_timesteps: int = 8_000  # frames of that video
    clone_steps: int = 1_000  # updates of that policy
    video_dir: str | None = None  # folder of video files to learn from, instead of an environment
    fps: float = 10  # frames per second that are taken from them
    cut: float = 0.25  # two frames that differ by more than this share of the range, on average, are a cut
    image_width: int | None = None  # width of the frames of files, if it is not --image-size
    clip_length: int = 16  # frames of a clip: what the models see and remember
    context: int = 15  # real frames that a dream starts with, fewer than --clip-length; paper: also one
    num_codes: int = 1024  # V, codes of the tokenizer
    num_actions: int = 6  # A, codes of the LAM: latent actions; paper: 8 but for CoinRun
    latent_dim: int = 32  # D, numbers in a code
    patch: int = 4  # height and width of the tokenizer's patches
    lam_patch: int = 16  # height and width of the LAM's patches
    encoder: tuple[int, int, int, int] = (8, 512, 8, 64)  # size of the tokenizer's encoder
    decoder: tuple[int, int, int, int] = (8, 512, 8, 64)  # size of the tokenizer's decoder
    lam_encoder: tuple[int, int, int, int] = (8, 512, 8, 64)  # size of the LAM's encoder
    lam_decoder: tuple[int, int, int, int] = (8, 512, 8, 64)  # size of the LAM's decoder
    dynamics: tuple[int, int, int, int] = (12, 512, 8, 64)  # size of the dynamics model
    ffn: float = 4  # width of the feed-forward layers, in widths of the model
    tokenizer_steps: int = 300_000  # updates of the tokenizer, first
    tokenizer_batch_size: int = 48  # clips of a batch then
    tokenizer_rate: float = 3e-4  # learning rate then
    tokenizer_warmup: int = 10_000  # updates over which it rises from 0; it then stays
    steps: int = 200_000  # updates of LAM and dynamics, after that
    batch_size: int = 36  # clips of a batch then
    learning_rate: float = 3e-5  # learning rate then: its highest value
    final_rate: float = 3e-6  # where its cosine ends
    warmup: int = 5_000  # updates over which it rises from 0
    weight_decay: float = 1e-4  # of AdamW
    maskgit_steps: int = 25  # steps in which a frame's tokens are decoded
    temperature: float = 1.0  # of the tokens that are sampled; paper: 2 for the largest model

    # Ours, not in the paper; the preset tiny uses them, small the first three
    clip: float = 0.0  # largest norm of a gradient; 0 for any
    window_shift: float = 0.0  # share of clips that are decoded from a later frame on, as in long play
    clean_context: float = 0.0  # share of clips in whose first frames, up to a random one, no token is masked
    lam_change: bool = False  # show the LAM's encoder only how two frames differ, so that codes name no past
    lam_centre: bool = False  # subtract its batch mean from what is matched to latent actions: not all get one code
    lam_shift: int = 0  # shift what its encoder sees by a random multiple of so many pixels: codes name no places


TINY, SMALL, LARGE = (2, 64, 4, 16), (4, 256, 4, 64), (20, 1024, 16, 64)
PRESETS = {  # by --preset
    "tiny": dict(env_id="environments.pond:Pond-v0", total_timesteps=8000, image_size=32, clip_length=8, context=7)
    | dict(patch=8, num_codes=256, num_actions=8, latent_dim=16, ffn=2, lam_change=True, lam_centre=True, lam_shift=8)
    | dict(encoder=(0, 64, 4, 16), decoder=TINY, lam_encoder=TINY, lam_decoder=TINY, dynamics=(3, 64, 4, 16))
    | dict(tokenizer_steps=1000, tokenizer_batch_size=16, tokenizer_rate=2e-3, tokenizer_warmup=100, window_shift=0.5)
    | dict(steps=4000, batch_size=32, learning_rate=2e-3, final_rate=1e-4, warmup=100, clip=1.0, clean_context=1.0)
    | dict(maskgit_steps=8, log_every=12_800, save_every=64_000, eval_every=128_000, eval_episodes=64),
    "small": dict(env_id="atari100k-freeway", total_timesteps=400_000, action_repeat=4, num_envs=8)
    | dict(patch=8, num_actions=3, encoder=SMALL, decoder=SMALL, lam_encoder=SMALL, lam_decoder=SMALL)
    | dict(dynamics=(8, 384, 6, 64), tokenizer_steps=6000, tokenizer_batch_size=64, tokenizer_warmup=500)
    | dict(steps=15_000, batch_size=64, learning_rate=3e-4, final_rate=3e-5, warmup=500, clip=1.0, window_shift=0.5)
    | dict(clean_context=0.5, log_every=50_000, save_every=500_000, eval_every=2_000_000, eval_episodes=256),
    "coinrun": dict(env_id="environments.procgen:coinrun-v0", total_timesteps=10_000_000, num_envs=16)
    | dict(env_kwargs=dict(start_level=0, num_levels=10_000, distribution_mode="hard", native=True))
    | dict(log_every=100_000, save_every=1_000_000, eval_every=10_000_000, eval_episodes=256),
    "platformers": dict(video_dir="videos", image_size=90, image_width=160, num_actions=8, temperature=2.0)
    | dict(encoder=(12, 512, 8, 64), decoder=LARGE, lam_encoder=LARGE, lam_decoder=LARGE, dynamics=(18, 512, 8, 64))
    | dict(ffn=0.5, tokenizer_batch_size=64, batch_size=256)
    | dict(log_every=1_000_000, save_every=10_000_000, eval_every=100_000_000, eval_episodes=512),
}


def parse_args(argv=None):
    """Command line -> Args: defaults, then --preset or what the run was started with, then the flags."""
    text = "\n".join([__doc__, "Presets:", *(f"    {name}: {preset}" for name, preset in PRESETS.items())])
    args = tyro.cli(Args, args=argv, description=text)
    runs = args.resume, args.evaluate, args.clone
    given, run = PRESETS[args.preset], next((run for run in runs if run is not None), None)
    if run is not None:
        path = Path(run, "args.json")
        given = json.loads(path.read_text() if path.exists() else "{}") | dict(resume=None, evaluate=None, clone=None)
        if given.pop("script", None) != Args.exp_name or given.keys() - vars(Args()).keys():
            sys.exit(f"{run} is no run of {Args.exp_name}.py, or of another version")
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    given = given | ({} if args.cuda else dict(compile=False, amp=False))  # flags can still ask for them
    args = tyro.cli(Args, args=argv, default=Args(**{"obs": "pixels"} | given | dict(env_kwargs={})), description=text)
    args.env_kwargs = args.env_kwargs or given.get("env_kwargs", {})  # as a default, tyro would make a flag of each
    fixed = ("video_dir", "num_envs", "image_size", "image_width") if run else ()
    if any(getattr(args, name) != given[name] for name in fixed):
        sys.exit(f"{run} has its video; for other values of {fixed} start a new run")
    may_be_0 = ("seed", "eval_every", "warmup", "tokenizer_warmup", "lam_shift")
    for name, value in vars(args).items():
        least = 0 if type(value) is float or name in may_be_0 else 1
        if type(value) in (int, float) and not least <= value < math.inf:
            sys.exit(f"--{name.replace('_', '-')} {value}: the least is {least}")
    args.image_width = args.image_width or args.image_size
    wide = args.image_width != args.image_size and not args.video_dir
    if args.obs != "pixels" or args.capture_video or args.context >= args.clip_length or wide:
        sys.exit("--obs must be pixels, --context below --clip-length, --image-width with files, no --capture-video")
    if not min(args.temperature, args.fps, args.ffn) > 0:
        sys.exit("--temperature, --fps and --ffn must be above 0")
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


class Video:
    """Recorded frames on disk: image (count, streams, H, W, 3) and the action (count, streams) that led to each, whose
    classes only evaluation and --clone read: -1 where a stream begins anew, 0 where nobody knows."""

    def __init__(self, folder, args):
        os.makedirs(folder, exist_ok=True)
        self.folder, streams = folder, 1 if args.video_dir else args.num_envs
        self.shape, self.length = (streams, args.image_size, args.image_width, 3), args.clip_length
        self.files = {name: open(f"{folder}/{name}", "ab", 0) for name in ("image", "action")}
        self.sizes = {"image": math.prod(self.shape), "action": 8 * streams}
        self.cut(min(file.tell() // self.sizes[name] for name, file in self.files.items()))

    def cut(self, count):
        """Forgets all but the first `count` frames of each stream."""
        self.count = count
        for name, file in self.files.items():
            file.truncate(count * self.sizes[name])

    def add(self, image, action):
        """Appends a frame of each stream: (streams, H, W, 3), (streams,). Exits if the disk is full."""
        try:
            self.files["image"].write(np.ascontiguousarray(image))
            self.files["action"].write(np.asarray(action, np.int64).tobytes())
        except OSError as error:
            sys.exit(f"{self.folder}: {error}")
        self.count += 1

    def index(self):
        """Finds clips in which no stream begins, as (first frame, stream); holds out the last tenth -> itself."""
        self.image = np.memmap(f"{self.folder}/image", np.uint8, "r", shape=(self.count, *self.shape))
        self.action = np.memmap(f"{self.folder}/action", np.int64, "r", shape=(self.count, self.shape[0]))
        time = np.arange(self.count)[:, None]
        begun = np.maximum.accumulate(np.where(self.action < 0, time, 0))
        first = np.argwhere(time - begun >= self.length - 1) - [self.length - 1, 0]
        split = int(self.count * 0.9)
        self.train, self.held_out = first[first[:, 0] + self.length <= split], first[first[:, 0] >= split]
        if not len(self.train) or not len(self.held_out):
            sys.exit(f"{self.folder}: {self.count:,} frames have too few clips of --clip-length {self.length}")
        return self

    def get(self, windows, device):
        """Clips (B, T, H, W, 3), and the actions (B, L) between their frames, of windows (B, 2)."""
        index = windows[:, :1] + np.arange(self.length), windows[:, 1:]
        tensors = [torch.from_numpy(x) for x in (self.image[index], self.action[index][:, 1:])]
        return [x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x for x in tensors]

    def sample(self, count, seed, device):
        """Clips to train on, and their actions, which follow from the seed."""
        return self.get(self.train[np.random.default_rng(seed).integers(len(self.train), size=count)], device)

    def some_held_out(self, count):
        """Evenly spaced windows of the end: (count, 2)."""
        return self.held_out[np.linspace(0, len(self.held_out) - 1, count).astype(int)]


def record(args, folder, stop=(), expert=False):
    """Video of --video-dir or of play, at random or, in nine of ten steps, as the environment's expert() has it."""
    if args.video_dir:
        return record_files(args, folder, stop)
    video, frames = Video(folder, args), args.num_envs * args.action_repeat
    total = args.clone_timesteps if expert else args.total_timesteps
    if video.count * frames >= total:
        return video
    envs, rng = make_envs(args, args.num_envs), np.random.default_rng([args.seed, video.count])
    known = envs.single_action_space.shape == ()  # actions that are no classes are not kept
    envs.action_space.seed(int(rng.integers(2**31)))
    obs, _ = envs.reset(seed=rng.integers(2**32, size=args.num_envs).tolist())
    action, first, over = envs.action_space.sample(), np.ones(args.num_envs, bool), np.zeros(args.num_envs, bool)
    if picture(obs).shape != video.shape:
        sys.exit(f"--env-id {args.env_id}: Genie sees one image, not {list(obs)}")
    bar = tqdm(total=total, initial=video.count * frames, unit="frames", desc="recording")
    while not stop:
        video.add(picture(obs), np.where(first, -1, action if known else 0))
        bar.update(frames)
        if video.count * frames >= total:
            break
        action = envs.action_space.sample()
        if expert:
            action = np.where(rng.random(args.num_envs) < 0.1, action, envs.call("expert"))
        obs, _, terminated, truncated, _ = envs.step(action)
        first, over = over, terminated | truncated
    bar.close()
    envs.close()
    return video


def record_files(args, folder, stop):
    """Appends what the files of --video-dir show -> Video. `done` names those that were read, after the count then."""
    kinds = ".mp4 .webm .mkv .avi .mov .m4v .mpg .mpeg .ts .gif"
    paths = [str(path) for path in Path(args.video_dir).rglob("*.*") if path.suffix.lower() in kinds.split()]
    if not paths and not os.path.exists(folder):
        sys.exit(f"--video-dir {args.video_dir} has no video files: {kinds}")
    video, done = Video(folder, args), Path(folder, "done")
    done.touch()
    lines = [line.split(" ", 1) for line in done.read_text(errors="surrogateescape").split("\n")[:-1]]
    read = {path: int(count) for count, path in lines if int(count) <= video.count}  # of the others the frames are gone
    video.cut(max(read.values(), default=0))
    for path in tqdm(sorted({*paths} - {*read}), unit="files", desc="recording"):
        start, problem = video.count, ""
        try:
            for image, is_first in read_frames(path, args):
                video.add(image, [-int(is_first)])
                if stop:
                    return video
        except (av.FFmpegError, AttributeError, OSError, ValueError, IndexError, MemoryError) as error:
            problem = f": {error}"
        if video.count - start < args.clip_length:
            tqdm.write(f"skipped {path!a}, {video.count - start} frames{problem}")
            video.cut(start)
        with done.open("a", errors="surrogateescape") as file:
            file.write(f"{video.count} {path}\n")
        read[path] = video.count
    if not video.count:
        sys.exit(f"none of the {len(paths)} files in {args.video_dir} can be used")
    print(f"{len({*read.values()} - {0})} of {len(paths)} files are used, {video.count:,} frames")
    return video


def read_frames(path, args):
    """Frames of a file at --fps, upright, (H, W, 3); whether each begins anew: after a cut, damage, a jump in time.
    At each tick of the clock the next frame of the file is shown; a jump is more than a second, on or back."""
    with av.open(path) as file:
        stream, last, before, due, damaged, bad = file.streams.best("video"), None, None, 0.0, False, None
        stream.codec_context.options = {"err_detect": "explode"}  # what is damaged is an error, not a guess
        step = float(1 / (stream.average_rate or 25))
        for packet in file.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                frames, damaged, bad = [], True, packet.pts
            for frame in frames:  # those before the damage can come after the error
                whole = frame.key_frame and (bad is None or frame.pts is None or frame.pts > bad)
                damaged = frame.is_corrupt or damaged and not whole  # until one that needs no other
                if damaged:
                    before = None
                    continue
                now = frame.time if frame.time is not None else (before or 0.0) + step
                if before is None or abs(now - before) > 1:
                    due, last = now, None
                before = now
                if now + 1e-6 < due:
                    continue
                turns = round(frame.rotation / 90)
                size = (args.image_width, args.image_size)[:: -1 if turns % 2 else 1]
                image = np.rot90(frame.reformat(*size, "rgb24", interpolation="AREA").to_ndarray(), turns)
                new = last is None or np.abs(image.astype(np.int16) - last).mean() > 255 * args.cut
                while due <= now + 1e-6:
                    yield image, new
                    last, new, due = image, False, due + 1 / args.fps


# === Maths ============================================================================================================


def patchify(video, size):
    """(B, T, H, W, 3) -> (B, T, N, size² · 3): patches, rows first; the last ones are filled up with zeros."""
    height, width = video.shape[2:4]
    video = F.pad(video, (0, 0, 0, -width % size, 0, -height % size))
    patches = video.unflatten(3, (-1, size)).unflatten(2, (-1, size)).transpose(3, 4)  # rows, columns, size, size
    return patches.flatten(4).flatten(2, 3)


def unpatchify(patches, size, height, width):
    """The inverse of patchify."""
    columns = -(-width // size)
    patches = patches.unflatten(3, (size, size, 3)).unflatten(2, (-1, columns)).transpose(3, 4)
    return patches.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


def num_patches(size, args):
    return -(-args.image_size // size) * -(-args.image_width // size)


def roll(video, unit):
    """Moves each clip (B, T, H, W, 3) by random multiples of `unit` rows and columns; what leaves comes back."""
    clip, places = torch.arange(len(video), device=video.device).view(-1, 1, 1), []
    for size in video.shape[2:4]:
        shift = (torch.rand(len(video), 1, device=video.device) * (size // unit)).long() * unit  # (B, 1)
        places.append((shift + torch.arange(size, device=video.device)) % size)  # (B, H), then (B, W)
    rows, columns = places
    return video[clip, :, rows.unsqueeze(2), columns.unsqueeze(1)].movedim(3, 1)


def psnr(a, b):
    """Peak signal-to-noise ratio in dB of images (..., H, W, 3) in [0, 1]: (...)."""
    return -10 * (a - b).square().mean((-3, -2, -1)).clamp(min=1e-10).log10()


def perplexity(counts):
    """Effective number of classes, from how often each occurred."""
    return torch.special.entr(counts / counts.sum()).sum().exp()


def mutual_information(a, b):
    """Of two tensors of classes, as a share of the mean of their entropies: 0 independent, 1 the same up to names."""
    entropy = lambda x: perplexity(x.flatten().bincount().double()).log().item()
    both = entropy(a) + entropy(b)
    return 2 * (1 - entropy(a * (b.max() + 1) + b) / both) if both > 0 else 0.0


def draw_masks(shape, clean_context, device):
    """Which tokens (B, T, N) the dynamics do not see: a share between 0.5 and 1 of each clip, but for its first frame
    (section 2.1) and, in the share `clean_context` of clips, for all frames up to a random one."""
    B, T, N = shape
    rand = lambda *size: torch.rand(size, device=device)
    masked = rand(B, T, N) < 0.5 + 0.5 * rand(B, 1, 1)
    clean = torch.where(rand(B) < clean_context, (rand(B) * (T - 1)).long(), 0)
    return masked & (torch.arange(T, device=device)[:, None] > clean[:, None, None])


def maskgit_sample(predict, ids, codes, steps, temperature):
    """Decodes a frame's tokens from masked ones, ids (B, N), which are `codes`: predict maps ids to logits (B, N, V).
    Each step draws all masked tokens and keeps the likeliest; how many: a cosine (arXiv:2202.04200, section 3.3)."""
    for step in range(steps):
        masked_after = round(ids.shape[1] * math.cos(math.pi / 2 * (step + 1) / steps))
        probs = (predict(ids) / temperature).softmax(-1)  # (B, N, V)
        drawn = (probs[..., :-1].cumsum(-1) <= torch.rand_like(probs[..., :1])).sum(-1)  # (B, N)
        masked = ids == codes
        confidence = probs.gather(-1, drawn.unsqueeze(-1)).squeeze(-1).masked_fill(~masked, 2.0)
        rank = confidence.argsort(-1).argsort(-1)
        ids = torch.where(rank < masked_after, codes, torch.where(masked, drawn, ids))
    return ids


def average(x):
    """Mean of a tensor over the processes of torchrun, in place."""
    if dist.is_initialized():
        dist.all_reduce(x.div_(dist.get_world_size()))
    return x


# === Networks =========================================================================================================


class Linear(nn.Linear):
    """Fully connected layer (..., inp) -> (..., out); weights start with standard deviation scale / sqrt(inp)."""

    def __init__(self, inp, out, scale=1.0):
        super().__init__(inp, out)
        std = 1.1368 * scale / math.sqrt(inp)  # of a normal that is cut at twice this
        nn.init.trunc_normal_(self.weight, 0.0, std, -2 * std, 2 * std) if std else nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Attention(nn.Module):
    """Self-attention with normalised queries and keys, over the tokens of a frame or over time, causally, at one place.
    Both are views of (B, T, N, C): over time, the places are heads."""

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
        merged = (2, 3) if self.over_time else (0, 1)
        query, key, value = (y.flatten(*merged).transpose(1, 2) for y in (query, key, value))
        if past is not None:
            key, value = (torch.cat(pair, 2) for pair in zip(past, (key, value), strict=True))
        x = F.scaled_dot_product_attention(query, key, value, is_causal=self.over_time and past is None)
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

    def __init__(self, args, size, length, tokens, out, scale=1.0):
        super().__init__()
        layers, width, heads, head_size = size
        self.time = nn.Parameter(0.5 * torch.randn(length, 1, width))
        self.space = nn.Parameter(0.5 * torch.randn(tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads, head_size, args.ffn) for _ in range(layers))
        self.norm, self.out = nn.LayerNorm(width), Linear(width, out, scale)
        for block in self.blocks if args.compile else ():
            block.compile(dynamic=False)

    def forward(self, x, past=None):
        """With the past of all blocks, x is the frame that follows -> output, and the past with it."""
        start = 0 if past is None else past[0][0].shape[2]
        x = x + self.time[start : start + x.shape[1]] + self.space
        pasts = []
        for i, block in enumerate(self.blocks):
            x, kept = block(x, past and past[i])
            pasts.append(kept)
        return self.out(self.norm(x)), pasts


class Reader(nn.Module):
    """Patches (B, T, P, E) -> a vector for each frame (B, T, out), read from one token more."""

    def __init__(self, args, size, length, patch, out):
        super().__init__()
        self.patch_in, self.token = Linear(3 * patch**2, size[1]), nn.Parameter(0.02 * torch.randn(size[1]))
        self.transformer = Transformer(args, size, length, num_patches(patch, args) + 1, out)

    def forward(self, patches):
        x = self.patch_in(patches)
        x = torch.cat([self.token.expand(*x.shape[:2], 1, -1), x], 2)
        return self.transformer(x)[0][:, :, 0]


class VQ(nn.Module):
    """Vector quantization (arXiv:1711.00937): codes and what is matched to them have length 1.
    A code that was unused for 50 updates is put where an output of the encoder is. With `centre` inputs
    lose their mean over the batch, so that they cannot all be alike; after training, a running mean."""

    def __init__(self, args, codes, centre=False):
        super().__init__()
        self.codebook = nn.Parameter(F.normalize(torch.randn(codes, args.latent_dim), dim=-1))
        self.register_buffer("idle", torch.zeros(codes))
        self.register_buffer("mean", torch.zeros(args.latent_dim) if centre else None)

    def codes(self):
        """All codes (V, D)."""
        return F.normalize(self.codebook.float(), dim=-1)

    def forward(self, x):
        """(..., D) -> code (..., D) with straight-through gradient, its index (...), loss, what was matched."""
        x, codes = x.float(), self.codes()
        if self.mean is not None:
            mean = self.mean
            if torch.is_grad_enabled():
                mean = average(x.detach().flatten(0, -2).mean(0))
                self.mean.lerp_(mean, 0.1)
            x = x - mean
        x = F.normalize(x, dim=-1)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would often choose another
            index = (x @ codes.T).argmax(-1)
        code = F.embedding(index, codes)
        loss = (code - x.detach()).square().mean() + 0.25 * (x - code.detach()).square().mean()
        return x + (code - x).detach(), index, loss, x.detach()

    @torch.no_grad()
    def restart(self, x, index):
        """After an update for which x (..., D) was matched to index (...): what is long unused restarts -> stats."""
        used, x = average(F.one_hot(index.flatten(), len(self.idle)).sum(0).float()), x.flatten(0, -2)
        rows = x[torch.randint(len(x), (len(used),), device=x.device)]
        if dist.is_initialized():
            dist.broadcast(rows, 0)
        self.idle.copy_(torch.where(used > 0, 0, self.idle + 1))
        dead = self.idle >= 50
        self.codebook.copy_(torch.where(dead.unsqueeze(-1), rows, self.codebook))
        self.idle.masked_fill_(dead, 0)
        return {"perplexity": perplexity(used), "restarts": dead.sum()}


# === World model ======================================================================================================


class Tokenizer(nn.Module):
    """Video (B, T, H, W, 3) -> tokens (B, T, N) -> video in [0, 1] (section 2.1); a frame sees those before it."""

    def __init__(self, args):
        super().__init__()
        self.args, self.tokens, numbers = args, num_patches(args.patch, args), 3 * args.patch**2
        self.quantizer = VQ(args, args.num_codes)
        self.patch_in = Linear(numbers, args.encoder[1])
        self.encoder = Transformer(args, args.encoder, args.clip_length, self.tokens, args.latent_dim)
        self.code_in = Linear(args.latent_dim, args.decoder[1])
        self.decoder = Transformer(args, args.decoder, args.clip_length, self.tokens, numbers)

    def loss(self, video):
        """VQ-VAE on uint8 video -> losses, stats, what was matched to codes.
        Some clips are decoded without their first frames and filled up at the end, which no frame before sees."""
        B, T = video.shape[:2]
        patches = patchify(video / 255, self.args.patch)  # (B, T, N, E)
        latent = self.encoder(self.patch_in(patches))[0]  # (B, T, N, D)
        code, index, vq_loss, matched = self.quantizer(latent)
        rand = torch.rand(2, B, 1, device=video.device)
        shift = torch.where(rand[0] < self.args.window_shift, (rand[1] * T).long(), 0)  # (B, 1)
        frame = (shift + torch.arange(T, device=video.device)).clamp(max=T - 1)  # (B, T)
        row = torch.arange(B, device=video.device).unsqueeze(1)  # (B, 1)
        error = (self.decode_patches(code[row, frame]) - patches[row, frame]).square().mean()
        losses = {"tokenizer_recon_loss": error, "tokenizer_vq_loss": vq_loss}
        return losses, {"tokenizer_psnr": -10 * error.log10()}, (matched, index)

    def encode(self, video):
        """uint8 video -> tokens (B, T, N)."""
        patches = patchify(video / 255, self.args.patch)  # (B, T, N, E)
        return self.quantizer(self.encoder(self.patch_in(patches))[0])[1]

    def decode(self, index):
        """Tokens (B, T, N) -> video (B, T, H, W, 3) in [0, 1]."""
        patches = self.decode_patches(F.embedding(index, self.quantizer.codes()))  # (B, T, N, E)
        return unpatchify(patches, self.args.patch, self.args.image_size, self.args.image_width)

    def decode_patches(self, code):
        return self.decoder(self.code_in(code))[0].float().sigmoid()


class LatentActionModel(nn.Module):
    """Names what happens between two frames by one of few codes, which predict the second from the past (section 2.1).
    Its encoder sees the video up to the second frame, its decoder up to the first. A decoder that knows place and past
    needs no names that mean the same everywhere: --lam-change and --lam-shift hide both from the encoder."""

    def __init__(self, args):
        super().__init__()
        self.args, length = args, args.clip_length
        numbers, patches = 3 * args.lam_patch**2, num_patches(args.lam_patch, args)
        self.quantizer = VQ(args, args.num_actions, args.lam_centre)
        self.encoder = Reader(args, args.lam_encoder, length, args.lam_patch, args.latent_dim)
        self.past_in = Linear(numbers, args.lam_decoder[1])
        self.code_in = Linear(args.latent_dim, args.lam_decoder[1])
        self.decoder = Transformer(args, args.lam_decoder, length - 1, patches, numbers, scale=0.0)  # copies at first

    def latent(self, video):
        """uint8 video -> before quantization (B, L, D): entry t for what leads from frame t to t + 1."""
        patches = patchify(video / 255, self.args.lam_patch)  # (B, T, P, E)
        if not self.args.lam_change:
            return self.encoder(patches)[:, 1:]
        change = patches[:, 1:] - patches[:, :-1]  # (B, L, P, E)
        return self.encoder(change.flatten(0, 1).unsqueeze(1)).view(*change.shape[:2], -1)

    def loss(self, video):
        """VQ-VAE; its error is a share of that of copying the last frame -> losses, code (B, L, D), what matched."""
        latent = self.latent(roll(video, self.args.lam_shift) if self.args.lam_shift else video)  # (B, L, D)
        patches = patchify(video / 255, self.args.lam_patch)  # (B, T, P, E)
        code, index, vq_loss, matched = self.quantizer(latent)
        past, target = patches[:, :-1], patches[:, 1:]
        change = self.decoder(self.past_in(past) + self.code_in(code).unsqueeze(2))[0]  # (B, L, P, E)
        copy = average((target - past).square().mean()).clamp(min=1e-8)
        losses = {"lam_recon_loss": (past + change - target).square().mean() / copy, "lam_vq_loss": vq_loss}
        return losses, code, (matched, index)

    def encode(self, video):
        """uint8 video -> latent actions as numbers (B, L)."""
        if video.shape[1] == 1:  # nothing happens in one frame
            return video.new_zeros(len(video), 0, dtype=torch.long)
        return self.quantizer(self.latent(video))[1]


class Dynamics(nn.Module):
    """MaskGIT: tokens of a clip, some of them masked, and its latent actions -> logits of all tokens (section 2.1).
    A masked token is predicted at its own place; the paper's text has tokens up to T - 1 in and those from 2 on out."""

    def __init__(self, args):
        super().__init__()
        width, patches = args.dynamics[1], num_patches(args.patch, args)
        self.embed = nn.Parameter(0.5 * torch.randn(args.num_codes + 1, width))  # the last is for masked tokens
        self.code_in = Linear(args.latent_dim, width)
        self.transformer = Transformer(args, args.dynamics, args.clip_length, patches, args.num_codes)

    def forward(self, ids, code, past=None):
        """ids (B, T, N), code (B, T, D) that led to each frame, past of earlier frames -> logits (B, T, N, V), past."""
        logits, past = self.transformer(F.embedding(ids, self.embed) + self.code_in(code).unsqueeze(2), past)
        return logits.float(), past


# === Behaviour ========================================================================================================


class Policy(nn.Module):
    """What to do, of `actions` classes, after up to four frames (appendix E): learnt from video."""

    def __init__(self, args, actions):
        super().__init__()
        self.args, self.length = args, min(4, args.clip_length - 1)
        self.reader = Reader(replace(args, compile=False), args.lam_encoder, self.length, args.patch, actions)

    def forward(self, video):
        """uint8 video (B, T, H, W, 3) -> logits (B, T, A) of what follows each frame."""
        return self.reader(patchify(video / 255, self.args.patch)).float()

    def learn(self, video, device, agent=None):
        """--clone-steps updates on clips of a video, with the latent actions that an agent infers, or the true ones."""
        args, adamw = self.args, torch.optim.AdamW
        optimizer = adamw(self.parameters(), args.learning_rate, (0.9, 0.96), weight_decay=args.weight_decay)
        for i in tqdm(range(args.clone_steps), unit="updates", desc="latent actions" if agent else "true actions"):
            clips, action = video.sample(args.batch_size, [args.seed, i], device)
            target = (agent.infer(clips)[1] if agent else action)[:, : self.length]
            loss = F.cross_entropy(self(clips[:, : self.length]).flatten(0, 1), target.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return self

    @torch.no_grad()
    def play(self, envs, real, device):
        """Returns of an episode in each environment; `real`: actions of theirs that each class may mean."""
        rng, returns, running, frames = np.random.default_rng(0), 0.0, np.ones(envs.num_envs, bool), []
        obs, _ = envs.reset(seed=rng.integers(2**32, size=envs.num_envs).tolist())
        while running.any():
            frames = [*frames, picture(obs)][-self.length :]
            chosen = self(torch.from_numpy(np.stack(frames, 1)).to(device))[:, -1].argmax(-1)
            obs, reward, *over, _ = envs.step(np.array([rng.choice(real[i]) for i in chosen.tolist()]))
            returns = returns + running * reward
            running &= ~np.logical_or(*over)
        return returns


# === Agent ============================================================================================================


class Agent(nn.Module):
    """The three models and their optimizers: what is trained, and what makes the dream."""

    def __init__(self, args, device="cpu"):
        super().__init__()
        self.args, self.device = args, torch.device(device)
        self.tokenizer, self.lam, self.dynamics = Tokenizer(args), LatentActionModel(args), Dynamics(args)
        prompts = 8, args.clip_length - 1, args.image_size, args.image_width, 3  # where dreams start, without the video
        self.register_buffer("prompts", torch.zeros(prompts, dtype=torch.uint8))
        self.register_buffer("updates", torch.zeros(2, dtype=torch.float64))
        self.to(device)
        parts = self.tokenizer, nn.ModuleList([self.lam, self.dynamics])
        options = dict(betas=(0.9, 0.9), weight_decay=args.weight_decay, fused=True)
        options |= dict(lr=torch.zeros((), device=device), capturable=self.device.type == "cuda")
        self.optimizers = [torch.optim.AdamW(part.parameters(), **options) for part in parts]
        self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16, enabled=args.amp)

    def rate(self, stage, updates):
        """Learning rate of a stage: warm-up, then constant or, for LAM and dynamics, half a cosine (appendices)."""
        args = self.args
        if stage == 0:
            return args.tokenizer_rate * ((updates + 1) / max(1, args.tokenizer_warmup)).clamp(max=1)
        share = ((updates - args.warmup) / max(1, args.steps - args.warmup)).clamp(0, 1)
        rate = args.final_rate + (args.learning_rate - args.final_rate) * (1 + (math.pi * share).cos()) / 2
        return rate * ((updates + 1) / max(1, args.warmup)).clamp(max=1)

    def dynamics_loss(self, video):
        """LAM and dynamics, whose gradients do not meet: the dynamics take codes as they are -> as Tokenizer.loss."""
        with torch.no_grad():
            ids = self.tokenizer.encode(video)  # (B, T, N)
        losses, code, used = self.lam.loss(video)
        masked = draw_masks(ids.shape, self.args.clean_context, self.device)  # (B, T, N)
        code = F.pad(code.detach(), (0, 0, 1, 0))  # (B, T, D)
        logits = self.dynamics(ids.masked_fill(masked, self.args.num_codes), code)[0]  # (B, T, N, V)
        loss = F.cross_entropy(logits.flatten(0, 2), ids.flatten(), reduction="none").view_as(ids)  # (B, T, N)
        count = average(masked.sum().float()).clamp(min=1)
        losses["dynamics_loss"] = (loss * masked).sum() / count
        return losses, {"masked_accuracy": ((logits.argmax(-1) == ids) & masked).sum() / count}, used

    def update(self, stage, video):
        """One gradient step of the tokenizer, stage 0, or of LAM and dynamics, 1, on uint8 video -> metrics by key."""
        with self.autocast():
            losses, stats, used = self.dynamics_loss(video) if stage else self.tokenizer.loss(video)
        (group,) = self.optimizers[stage].param_groups
        for p, grad in zip(group["params"], torch.autograd.grad(sum(losses.values()), group["params"]), strict=True):
            p.grad = average(grad.contiguous())  # for NCCL
        norm = nn.utils.clip_grad_norm_(group["params"], self.args.clip or math.inf)
        group["lr"].copy_(self.rate(stage, self.updates[stage]))
        self.optimizers[stage].step()
        self.updates[stage] += 1
        name, part = ("lam", self.lam) if stage else ("tokenizer", self.tokenizer)
        stats |= {"grad_norm": norm, "learning_rate": group["lr"]}
        stats |= {f"{name}_{key}": value for key, value in part.quantizer.restart(*used).items()}
        metrics = {f"losses/{k}": v for k, v in losses.items()} | {f"stats/{k}": v for k, v in stats.items()}
        return {key: value.detach().float() for key, value in metrics.items()}

    @torch.no_grad()
    def infer(self, video):
        """uint8 video -> tokens (B, T, N), latent actions (B, L)."""
        with self.autocast():
            return self.tokenizer.encode(video), self.lam.encode(video)

    @torch.no_grad()
    def generate(self, ids, action):
        """Tokens (B, t, N) of the past, latent actions (B, t) up to the one to come -> the new frame's tokens (B, N).
        The past goes through the model once; only the new frame's tokens go through it in each step."""
        args = self.args
        with self.autocast():
            code = F.pad(F.embedding(action, self.lam.quantizer.codes()), (0, 0, 1, 0))  # (B, t + 1, D)
            past = self.dynamics(ids, code[:, :-1])[1]
            predict = lambda new: self.dynamics(new.unsqueeze(1), code[:, -1:], past)[0].squeeze(1)
            masked = torch.full_like(ids[:, 0], args.num_codes)  # (B, N)
            return maskgit_sample(predict, masked, args.num_codes, args.maskgit_steps, args.temperature)

    def rollout(self, ids, action):
        """Goes on from tokens (B, t, N) by latent actions (B, t - 1 + steps) -> tokens (B, t + steps, N)."""
        for end in range(ids.shape[1], action.shape[1] + 1):
            start = max(0, end - self.args.clip_length + 1)
            ids = torch.cat([ids, self.generate(ids[:, start:], action[:, start:end]).unsqueeze(1)], 1)
        return ids

    @torch.no_grad()
    def show(self, ids):
        """Tokens (B, t, N), any number of frames -> uint8 video, each frame decoded with what is remembered then."""
        T = self.args.clip_length
        with self.autocast():
            frames = self.tokenizer.decode(ids[:, :T])
            later = [self.tokenizer.decode(ids[:, t - T + 1 : t + 1])[:, -1:] for t in range(T, ids.shape[1])]
        return (torch.cat([frames, *later], 1) * 255).round().byte()


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
    """The learned world as a Gymnasium environment whose actions are the latent ones; rewards are 0.
    It starts after `context` real frames of a clip that was held out or, with reset(options={"prompt": path}), after
    a picture; is cut after `length` steps. info["real"] is the last real frame."""

    def __init__(self, agent, prompts, length=500):
        self.agent, self.prompts, self.length = agent, prompts, length
        self.observation_space = gym.spaces.Dict({"image": gym.spaces.Box(0, 255, prompts.shape[2:], np.uint8)})
        self.action_space = gym.spaces.Discrete(agent.args.num_actions)
        self.generate = Graph(agent.generate, agent.device)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        torch.manual_seed(int(self.np_random.integers(2**31)))
        video = self.prompts[self.np_random.integers(len(self.prompts)), -self.agent.args.context :]
        if options and "prompt" in options:
            video = torch.from_numpy(read_picture(options["prompt"], video.shape[1:3]))[None].to(self.agent.device)
        self.ids, self.actions = self.agent.infer(video[None])
        self.steps, self.real = 0, video[-1].cpu().numpy()
        return self.observe(), {"real": {"image": self.real.copy()}}

    def step(self, action):
        remembered = self.agent.args.clip_length - 1
        action = torch.tensor([[int(action)]], device=self.agent.device)
        self.actions = torch.cat([self.actions, action], 1)[:, -remembered:]
        self.ids = self.ids[:, -remembered:]
        full = self.ids.shape[1] == remembered  # before that, shapes grow: no graph
        new = (self.generate if full else self.agent.generate)(self.ids, self.actions)
        self.ids, self.steps = torch.cat([self.ids, new.unsqueeze(1)], 1), self.steps + 1
        return self.observe(), 0.0, False, self.steps >= self.length, {"real": {"image": self.real.copy()}}

    def observe(self):
        return {"image": self.agent.show(self.ids)[0, -1].cpu().numpy()}


def read_picture(path, shape):
    """A picture file of any kind -> (H, W, 3): upright, what is transparent black, 16 bits brought to 8, resized."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode[0] in "IF":  # whole numbers up to 65535, or floats up to 1
        values = np.asarray(image, np.float32) / (65535 if image.mode[0] == "I" else 1)
        image = Image.fromarray((255 * values.clip(0, 1)).astype(np.uint8))
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image).convert("RGB")
    return cv2.resize(np.asarray(image), shape[::-1], interpolation=cv2.INTER_AREA)


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
def action_grid(agent, video, prompts=3, steps=16):
    """Video (t, rows, columns, 3), a row for each prompt (barred): truth, its latent actions played, each code held."""
    args, A = agent.args, agent.args.num_actions
    clips, _ = video.get(video.some_held_out(prompts), agent.device)
    ids, action = agent.infer(clips)
    c = min(args.context, args.clip_length // 2)
    held = torch.arange(A, device=agent.device).view(1, A, 1).expand(prompts, A, steps)
    held = torch.cat([action[:, None, : c - 1].expand(-1, A, -1), held], 2).flatten(0, 1)
    held = agent.show(agent.rollout(ids[:, :c].repeat_interleave(A, 0), held)).unflatten(0, (prompts, A))
    played, end = agent.show(agent.rollout(ids[:, :c], action)), clips.shape[1] - 1
    time = torch.arange(c + steps, device=agent.device).clamp(max=end)
    columns = torch.cat([clips[:, None, time], played[:, None, time], held], 1)  # (prompts, A + 2, t, H, W, 3)
    columns[:, :, :c, :2] = torch.tensor([60, 180, 75], dtype=torch.uint8, device=agent.device)
    return columns.permute(2, 0, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2).cpu().numpy()


# === Run ==============================================================================================================


def setup(args):
    """Device and numerical settings; joins the other processes of `torchrun`."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    cuda = args.cuda and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if args.tokenizer_batch_size % world or args.batch_size % world:
        sys.exit(f"--tokenizer-batch-size and --batch-size must be multiples of the {world} processes")
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=9))  # while the first records
        atexit.register(dist.destroy_process_group)  # or a process may abort where it should exit
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
        for optimizer, saved in zip(agent.optimizers, state.get("optimizers", ()), strict=False):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": saved})
        return state
    except Exception as error:
        sys.exit(f"{run}/checkpoint.pt is missing, not whole, of other sizes or another version: {repr(error)[:99]}")


def load_run(args, run):
    """The agent of a run and the frames that its dreams start from."""
    agent = Agent(replace(args, compile=False), setup(args))  # compiling would take longer than it saves
    load(run, agent)
    return agent, agent.prompts


@torch.no_grad()
def measure(agent, args, video):
    """Metrics on clips that were held out; where true actions are known, how much the latent ones say of them."""
    windows, values, names, counts = np.unique(video.some_held_out(args.eval_episodes), axis=0), [], [], 0
    c = max(1, args.clip_length - 4)
    torch.manual_seed(args.seed)
    for part in np.split(windows, range(args.batch_size, len(windows), args.batch_size)):
        clips, true = video.get(part, agent.device)
        truth, (ids, action) = clips / 255, agent.infer(clips)
        masked = draw_masks(ids.shape, args.clean_context, agent.device)
        with agent.autocast():
            code = F.pad(F.embedding(action, agent.lam.quantizer.codes()), (0, 0, 1, 0))
            logits = agent.dynamics(ids.masked_fill(masked, args.num_codes), code)[0]
            recon = agent.tokenizer.decode(ids)
        copied = torch.cat([ids[:, :1], ids[:, :-1]], 1) == ids
        right = torch.stack([logits.argmax(-1) == ids, copied]) & masked  # (2, B, T, N)
        # section 3, metrics: how much better x_t is predicted with the inferred than with random actions
        other = torch.cat([action[:, : c - 1], torch.randint_like(action[:, c - 1 :], args.num_actions)], 1)
        ends = [psnr(agent.show(agent.rollout(ids[:, :c], a))[:, -1] / 255, truth[:, -1]) for a in (action, other)]
        row = [psnr(recon, truth).mean(1), *right.sum((2, 3)) / masked.sum((1, 2)), ends[0], ends[0] - ends[1]]
        values.append(torch.stack(row).cpu())
        names.append(torch.stack([action, true]).cpu())
        counts = counts + F.one_hot(ids.flatten(), args.num_codes).sum(0)
    values, (names, actions) = torch.cat(values, 1).double(), torch.cat(names, 1)
    keys = "tokenizer_psnr masked_accuracy copy_accuracy rollout_psnr delta_psnr".split()
    result = dict(zip(keys, values.mean(1).tolist(), strict=True))
    result["delta_psnr_error"] = 1.96 * values[-1].std().item() / math.sqrt(len(windows))
    result["tokenizer_perplexity"] = perplexity(counts).item()
    result["lam_perplexity"] = perplexity(names.flatten().bincount()).item()
    if actions.any():
        result["action_information"] = mutual_information(names, actions)
    return {f"eval/{key}": value for key, value in result.items()}


def train(args):
    """Three stages: video, tokenizer, latent actions with dynamics; what a run that goes on has is not done again."""
    device = setup(args)
    if args.track and not find_spec("wandb"):
        sys.exit("--track needs Weights & Biases: pip install wandb")
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    agent, source = Agent(args, device), os.path.basename(os.path.abspath(args.video_dir or args.env_id))
    name = [f"{source}__{args.exp_name}__{args.seed}__{time.time_ns() // 1000}"]
    if world > 1:
        dist.broadcast_object_list(name)
    run = args.resume or f"{args.run_dir}/{name[0]}"
    saved = load(run, agent) if args.resume and os.path.exists(f"{run}/checkpoint.pt") else {}
    frame, updates = saved.get("frame", 0), agent.updates.long().tolist()
    if updates[1] and updates[0] < args.tokenizer_steps:
        sys.exit("--tokenizer-steps cannot grow: the dynamics have learnt the tokens of this tokenizer")
    if rank == 0:
        if not args.resume and not args.video_dir:
            make_envs(args, 1).close()  # exits if that cannot be
        os.makedirs(run, exist_ok=True)
        Path(f"{run}/args.tmp").write_text(json.dumps(asdict(args) | {"script": Args.exp_name}, indent=1))
        os.replace(f"{run}/args.tmp", f"{run}/args.json")
        if args.track:
            import wandb

            names = dict(project=args.wandb_project_name, entity=args.wandb_entity, name=os.path.basename(run))
            wandb.init(**names, config=vars(args), sync_tensorboard=True)
        writer = SummaryWriter(run, purge_step=frame + 1, flush_secs=1)
        print(f"{run}: {sum(p.numel() for p in agent.parameters()):,} parameters, {device}")

    stop = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the first ends in good order, the next at once
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup has it ignored
            signal.signal(number, lambda number, _: os._exit(128 + number) if stop else stop.append(number))

    # Stage 1, by the first process: video
    if rank == 0:
        record(args, f"{run}/video", stop)
    ending = average(torch.tensor(float(len(stop)), device=device)) > 0
    if not ending:
        video = Video(f"{run}/video", args).index()
        agent.prompts.copy_(video.get(video.some_held_out(len(agent.prompts)), device)[0][:, :-1])

    # Stages 2 and 3: the tokenizer, then LAM and dynamics
    plan = (args.tokenizer_steps, args.tokenizer_batch_size), (args.steps, args.batch_size)
    total = args.clip_length * sum(steps * size for steps, size in plan)
    intervals = args.save_every, args.log_every, args.eval_every
    bar = tqdm(total=total, initial=frame, unit="frames", disable=rank > 0, smoothing=0.05)
    for stage, (steps, size) in enumerate(plan):
        update, ahead, totals, counted = Graph(partial(agent.update, stage), device), None, 0.0, updates[stage]
        while updates[stage] < steps and not ending:
            # Learn: what an update draws follows from its number, so that a run which was stopped goes on as if not
            seed = [args.seed, sum(updates), rank]
            torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
            clips, _ = ahead or video.sample(size // world, seed, device)
            metrics = update(clips)
            if device.type == "cuda":  # the next clips are read while the GPU works
                ahead = video.sample(size // world, [args.seed, sum(updates) + 1, rank], device)
            asked = torch.tensor(float(len(stop)), device=device)  # whether to stop, by a signal to any process
            *values, ending = average(torch.stack([*metrics.values(), asked])).tolist()
            bad = [key for key, value in zip(metrics, values, strict=True) if not np.isfinite(value)]
            if bad:
                sys.exit(f"\nnot finite in update {sum(updates) + 1}: {bad}; the last checkpoint is kept")
            totals, updates[stage] = totals + np.array(values), updates[stage] + 1
            before, frame = frame, frame + size * args.clip_length
            save, log, score = (n and frame // n > before // n for n in intervals)

            # Save: the checkpoint is there whole or not at all; the video lies beside it
            done = updates[1] == args.steps
            if rank == 0 and (save or score or ending or done):
                state = dict(agent=agent.state_dict(), frame=frame)
                state["optimizers"] = [optimizer.state_dict()["state"] for optimizer in agent.optimizers]
                with open(f"{run}/checkpoint.tmp", "wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(f"{run}/checkpoint.tmp", f"{run}/checkpoint.pt")
            if rank > 0:
                continue

            # Log
            bar.update(frame - before)
            if log:
                row = dict(zip(metrics, totals / (updates[stage] - counted), strict=True))
                row["charts/SPS"] = (frame - bar.initial) / bar.format_dict["elapsed"]
                row["charts/updates"] = sum(updates)
                for key, value in row.items():
                    writer.add_scalar(key, value, frame)
                totals, counted = 0.0, updates[stage]

            # Evaluate
            if score or args.eval_every and done:
                with torch.compiler.set_stance("force_eager"):  # many shapes, once each
                    for key, value in measure(agent, args, video).items():
                        writer.add_scalar(key, value, frame)
                    grid = action_grid(agent, video)[None]
                    writer.add_video("video/latent_actions", grid, frame, fps=10, dataformats="NTHWC")
    bar.close()
    if rank == 0:
        writer.close()
        print(f"{'stopped' if ending else 'done'} at frame {frame} and saved: --resume {run}")
    if ending:
        sys.exit(128 + (stop or [signal.SIGTERM])[0])


def clone(args):
    """Appendix E: a policy learns the latent actions of an expert's video; then N labelled steps say what they mean.
    Beside it random play, and the same policy learnt from the true actions."""
    agent, _ = load_run(args, args.clone)
    args.video_dir, rng = None, np.random.default_rng(args.seed)
    if not hasattr(make_envs(args, 1).envs[0].unwrapped, "expert"):
        sys.exit(f"--clone: {args.env_id} has no method expert(), whose actions the video is to show")
    video, device = record(args, f"{args.clone}/expert/{args.env_id}", expert=True).index(), agent.device
    envs = gym.vector.SyncVectorEnv([lambda: make_env(args)] * args.eval_episodes)
    count = int(envs.single_action_space.n)
    oracle = Policy(args, count).to(device).learn(video, device)
    policy = Policy(args, args.num_actions).to(device).learn(video, device, agent)
    cases = {"random play": (oracle, [range(count)] * count), "true actions": (oracle, [[i] for i in range(count)])}
    clips, true = video.get(video.train[rng.permutation(len(video.train))[:1000]], device)
    pairs = torch.stack([torch.cat([agent.infer(x)[1][:, 0] for x in clips.split(100)]), true[:, 0]], 1).tolist()
    for labels in (1, 2, 5, 10, 20, 50, 100, 200, 1000):
        meant = [[b for a, b in pairs[:labels] if a == latent] for latent in range(args.num_actions)]
        cases[f"latent actions, {labels} labels"] = policy, [known or range(count) for known in meant]
    for name, (player, real) in cases.items():
        returns = player.play(envs, real, device)
        print(f"{name}: {returns.mean():.1f} ± {1.96 * returns.std() / math.sqrt(len(returns)):.1f}")


def main(argv=None):
    args = parse_args(argv)
    if args.evaluate:
        agent, _ = load_run(args, args.evaluate)
        for key, value in measure(agent, args, record(args, f"{args.evaluate}/video").index()).items():
            print(f"{key} {value:.4f}")
    elif args.clone:
        clone(args)
    else:
        train(args)


if __name__ == "__main__":
    main()
