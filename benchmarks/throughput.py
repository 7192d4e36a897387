"""How fast a script is on this machine: updates, acting, environment, whole loop, memory; a table or, with --out, JSON.

    python benchmarks/throughput.py dreamer_v3.py                        # all cases, eager
    python benchmarks/throughput.py dreamer_v3.py --compile --case state # the cases whose name contains "state"
    python benchmarks/throughput.py dreamer_v3.py --out benchmarks/results
    python benchmarks/throughput.py planet.py --act-repeats 3 --no-loop

An update is everything between a batch on the device and changed parameters. Times are medians over `--repeats` warm
calls; CPU times are those of the process, so other programs on the machine hardly change them. The update's operations
(matrix products and convolutions, forward and backward) are counted by PyTorch and divided by the rate at which this
machine multiplies large matrices: the share says how far the limit is.
"""

import argparse
import dataclasses
import datetime
import importlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec

import gymnasium as gym
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from curves import read_run

SHORT = "--env-id dmc-walker-walk --time-limit 160"  # so that updates begin soon, as many for a frame as in the preset
CASES = {
    "dreamer_v3": {
        "1m state": "--env-id dmc-walker-walk --obs state --size 1m",
        "12m state": "--env-id dmc-walker-walk --obs state --size 12m",
        "12m pixels": "--env-id dmc-walker-walk --obs pixels --size 12m",
        "200m pixels, needs a GPU": "--env-id dmc-walker-walk --obs pixels --size 200m",
    },
    "planet": {"dmc pixels 50x50": f"{SHORT} --seed-episodes 1 --train-steps 16"},
    "dreamer_v1": {"dmc pixels 50x50": f"{SHORT} --prefill 160 --pretrain 1 --train-every 5 --train-steps 1"},
    "dreamer_v2": {
        "dmc pixels 50x50": f"{SHORT} --prefill 80 --pretrain 1 --batch-size 50",
        "dmc pixels 16x50": f"{SHORT} --prefill 80 --pretrain 1 --batch-size 16",
    },
    "worldmodels_v1": {
        "CarRacing": "--env-id CarRacing-v3 --batch-length 99",
        "CarRacing quick": "--env-id CarRacing-v3 --quick",
        "TakeCover, needs vizdoom": "--env-id VizdoomTakeCover-v1 --batch-length 99",
    },
    "genie": {
        "tiny": "--preset tiny",
        "small, needs a GPU": "--preset small",
        "coinrun, needs a GPU": "--preset coinrun",
    },
}
ENVS = {"planet": (1, 4, 10)}  # environments for which acting is timed, where they are not 1, 4, 16


class CountOperations(TorchDispatchMode):
    """Counts the operations of matrix products and convolutions, forward and backward."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self.total += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def load(path):
    """The script at `path` as a module, which the processes of environments can import too."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    return importlib.import_module(os.path.basename(path).removesuffix(".py"))


def switches(options):
    """What the scripts are told of --compile and --amp."""
    return ["--compile" if options.compile else "--no-compile", "--amp" if options.amp else "--no-amp"]


def clock(function, repeats, device):
    """Median wall and CPU milliseconds of a warm call, and the milliseconds of the first one."""
    times, warm = [], 5 if device.type == "cuda" else 2
    for _ in range(warm + repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3))
    walls, cpus = zip(*times[warm:], strict=True)
    return {"wall_ms": statistics.median(walls), "cpu_ms": statistics.median(cpus), "first_wall_ms": times[0][0]}


def rate(count, function, repeats, device, options):
    """`count` per second of a call; on one thread of a CPU of its CPU time, in which other programs do not count."""
    kind = "cpu_ms" if device.type == "cpu" and options.threads == 1 else "wall_ms"
    return count / clock(function, repeats, device)[kind] * 1e3


def product_rate(device, dtype):
    """Operations per second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    timing = clock(lambda: a @ a, 9, device)
    return 2 * size**3 / (timing["wall_ms" if device.type == "cuda" else "cpu_ms"] / 1e3)


def pace(args):
    """Frames before the first update, then frames between updates, and how many these are on average."""
    if hasattr(args, "train_ratio"):  # DreamerV3
        steps = args.batch_size * args.batch_length
        begin = (steps + args.num_envs * args.batch_length) * args.action_repeat
        return begin, args.num_envs * args.action_repeat, args.num_envs * args.train_ratio / steps
    if hasattr(args, "seed_episodes"):  # PlaNet
        return args.seed_episodes * args.time_limit, args.time_limit, args.train_steps
    if hasattr(args, "train_steps"):  # DreamerV1
        return args.prefill, args.train_every, args.train_steps
    return args.prefill * args.action_repeat, args.train_every * args.action_repeat, 1


def walker_spaces(args):
    """What dmc-walker-walk observes and takes, without making it."""
    vectors = {"height": (1,), "orientations": (14,), "velocity": (9,)}
    spaces = {key: gym.spaces.Box(-np.inf, np.inf, shape) for key, shape in vectors.items()}
    if args.obs == "pixels":
        spaces = {"image": gym.spaces.Box(0, 255, (args.image_size, args.image_size, 3), np.uint8)}
    return spaces, gym.spaces.Box(-1, 1, (6,))


def batch(script, args, agent, spaces):
    """A batch from a replay that was filled with random steps."""
    rng = np.random.default_rng(0)
    stored = agent.layout()
    steps = 4 * args.batch_length
    with tempfile.TemporaryDirectory() as folder:
        replay = script.Replay(f"{folder}/0", stored, args.batch_size, steps, args.batch_length)
        for t in range(steps):
            step = {}
            for key in stored.names:
                shape = (args.batch_size, *stored[key].shape)
                whole = np.issubdtype(stored[key].base, np.integer)
                step[key] = rng.integers(0, 2, shape) if whole else rng.standard_normal(shape)
            for key, space in spaces.items():
                if space.dtype == np.uint8:
                    step[key] = rng.integers(0, 256, (args.batch_size, *space.shape))
            place = t % (args.batch_length + 1)
            flags = dict(is_first=place == 0, is_last=place == args.batch_length, is_terminal=False)
            replay.add(step | {key: np.full(args.batch_size, flag) for key, flag in flags.items()})
        batch = replay.sample(args.batch_size, rng, agent.device)
        return batch[0] if isinstance(batch, tuple) else batch  # DreamerV3 says where they were drawn, too


def measure(script, flags, options):
    """All figures of one case."""
    args = script.parse_args(flags.split() + switches(options))
    device = script.setup(args)
    spaces, action_space = walker_spaces(args)
    agent = script.Agent(args, spaces, action_space, device)
    size = sum(p.numel() for p in agent.parameters() if p.requires_grad)
    row = {"parameters": size, "batch": [args.batch_size, args.batch_length]}
    data = batch(script, args, agent, spaces)
    if not options.compile:
        with CountOperations() as counter:
            agent.update(data)
        row["update_gflop"] = counter.total / 1e9
    update = script.Graph(agent.update, device)
    row["update"] = clock(lambda: update(data), options.repeats, device)
    if device.type == "cuda":  # what the captured graph saves, and how many kernels it has
        row["update_not_captured"] = clock(lambda: agent.update(data), 3, device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            update(data)
            torch.cuda.synchronize()
        row["update_kernels"] = sum(event.count for event in profile.key_averages() if event.device_time_total > 0)
    dtype = torch.bfloat16 if args.amp else torch.float32
    kind = "wall_ms" if device.type == "cuda" else "cpu_ms"
    if "update_gflop" in row:
        rate = product_rate(device, dtype)
        seconds = row["update"][kind] / 1e3
        row |= {"product_gflops": rate / 1e9, "share_of_product_rate": row["update_gflop"] * 1e9 / rate / seconds}
    row["act"] = {}
    for envs in ENVS.get(script.__name__, (1, 4, 16)):
        obs = {key: np.stack([space.sample() for _ in range(envs)]) for key, space in spaces.items()}
        obs = script.to_tensors(obs, device)
        obs |= {key: torch.zeros(envs, dtype=torch.bool, device=device) for key in script.FLAGS}
        act, carry = script.Graph(agent.act, device), agent.initial(envs)
        call = lambda act=act, obs=obs, carry=carry: act(obs, carry)
        timing = row["act"][envs] = clock(call, options.act_repeats, device)
        if "update_gflop" in row:
            with CountOperations() as counter:
                agent.act(obs, carry)
            share = counter.total / rate / (timing[kind] / 1e3)
            timing |= {"gflop": counter.total / 1e9, "share_of_product_rate": share}
    row["peak_rss_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if device.type == "cuda":
        row["peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if not options.no_loop:
        row |= loop(script, args, flags, options)
    return row


def loop(script, args, flags, options):
    """Frames per second of the environments alone and of the whole loop, from the moment updates begin."""
    envs = script.make_envs(args, args.num_envs)
    envs.reset(seed=[0] * args.num_envs)
    action = np.stack([envs.single_action_space.sample() for _ in range(args.num_envs)])
    timing = clock(lambda: envs.step(action), 40, torch.device("cpu"))
    envs.close()
    frames = args.num_envs * args.action_repeat
    row = {"env_frames_per_s": frames / timing["wall_ms"] * 1e3, "num_envs": args.num_envs}
    begin, between, count = pace(args)
    window = between * math.ceil(options.loop_updates / count)
    total = math.ceil(begin / window) * window + 2 * window
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, script.__file__, *flags.split(), *switches(options), "--run-dir", folder]
        command += ["--eval-every", "0", "--total-timesteps", str(total), "--log-every", str(window)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        _, points = read_run(f"{folder}/{os.listdir(folder)[0]}")
        (a, a_rate), (b, b_rate) = points["charts/SPS"][-2:]  # rates are from the start on, most of it without updates
        row["loop_frames_per_s"] = (b - a) / (b / b_rate - a / a_rate)
    return row


class Still(gym.Env):
    """Nothing happens: what stands behind a dream that is to be timed alone."""

    def __init__(self, spaces, action_space):
        self.observation_space, self.action_space = gym.spaces.Dict(spaces), action_space
        self.obs = {key: np.zeros(space.shape, space.dtype) for key, space in spaces.items()}

    def reset(self, *, seed=None, options=None):
        return self.obs, {}

    def step(self, action):
        return self.obs, 0.0, True, False, {}


def measure_stages(script, flags, options):
    """Figures of World Models: V, M, dreams all at once and one by one, rollouts of the environment per core."""
    args = script.parse_args(flags.split() + switches(options))
    device = script.setup(args)
    moves = gym.spaces.Discrete(3) if args.moves else gym.spaces.Box(-1, 1, (3,))
    spaces = {"image": gym.spaces.Box(0, 255, (args.image_size, args.image_size, 3), np.uint8)}
    agent, row = script.Agent(args, spaces, moves, device), {}
    model = agent.world_model

    def add(name, count, function, repeats=options.repeats):
        row[name] = rate(count, function, repeats, device, options)

    side, shape = script.SIDE, (args.batch_size, args.batch_length)
    image = torch.randint(0, 256, (args.vae_batch_size, side, side, 3), dtype=torch.uint8, device=device)
    add("vae_frames_per_s", len(image), lambda: agent.update(model.vae_loss(image), args.vae_rate, 1.0))
    data = dict(embed=torch.zeros(*shape, 2 * args.stoch), action=torch.zeros(*shape, agent.action_dim))
    data |= dict(reward=torch.zeros(shape), is_first=torch.zeros(shape) > 0, is_terminal=torch.zeros(shape) > 0)
    data, start = {key: value.to(device) for key, value in data.items()}, model.rssm.initial(shape[0])
    learn_m = lambda: agent.update(model.loss(data, start)[0], args.rnn_rate, 1.0, args.clip)
    add("rnn_frames_per_s", data["reward"].numel(), learn_m)

    torch.nn.init.constant_(model.continue_head.bias, 1e3)  # no dream ends
    P, R, steps = args.population, args.candidate_rollouts, 20
    params = 0.1 * torch.randn(P, agent.behaviour.params.numel(), device=device)
    for name, p, r in (("", P, R), ("_one_by_one", 1, 1)):
        if p == 1 and device.type == "cpu":
            args.amp = False  # one dream is faster in float32
        start = model.rssm.initial(r)
        dreams = lambda p=p, start=start: script.dream_returns(agent, params[:p], start, steps)
        add(f"dream_steps_per_s{name}", p * r * steps, dreams)
    row["times_as_fast_as_one_by_one"] = row["dream_steps_per_s"] / row["dream_steps_per_s_one_by_one"]
    dream = script.Dream(agent, Still(spaces, moves))
    dream.reset(seed=0)
    add("dream_steps_per_s_gymnasium", 1, lambda: dream.step(dream.policy()), 20)
    dream.observe = dict  # no frames, which the controller does not look at
    add("dream_steps_per_s_gymnasium_undrawn", 1, lambda: dream.step(dream.policy()), 200)
    row["times_as_fast_as_gymnasium_undrawn"] = row["dream_steps_per_s"] / row["dream_steps_per_s_gymnasium_undrawn"]
    if not options.no_loop:
        with script.Workers(dataclasses.replace(args, num_envs=1), agent) as workers:
            workers.submit(script.rollout, 0).result()  # by then the process has started
            (process,) = workers._processes
            spent = lambda: time.clock_gettime(~process << 3 | 2)  # CPU time of a process, on Linux
            before = spent()
            frames = sum(steps * args.action_repeat for _, steps, *_ in workers.map(script.rollout, (1, 2, 3)))
            row["env_frames_per_s_per_core"] = frames / (spent() - before)
    return row | {"population": P, "candidate_rollouts": R}


def measure_video(script, flags, options):
    """Frames that the two stages of Genie train on in a second, and frames of play, as the flags have it (suffix none)
    and in plain float32: not compiled, no graphs. On one thread of a CPU these are seconds of CPU time."""
    kinds = {"": switches(options)}
    if options.compile or options.amp:
        kinds["_plain"] = ["--no-compile", "--no-amp"]
    row = {}
    for suffix, more in kinds.items():
        args = script.parse_args(flags.split() + more)
        device = script.setup(args)
        agent, graph = script.Agent(args, device), script.Graph if not suffix else lambda function, _: function
        row |= {"parameters": sum(p.numel() for p in agent.parameters()), "clip_length": args.clip_length}
        sizes = dict(tokenizer=args.tokenizer_batch_size, dynamics=args.batch_size)
        for stage, (name, size) in enumerate(sizes.items()):
            shape = size, args.clip_length, args.image_size, args.image_width, 3
            video = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
            update = graph(partial(agent.update, stage), device)
            call = lambda update=update, video=video: update(video)
            frames = size * args.clip_length
            row[f"{name}_frames_per_s{suffix}"] = rate(frames, call, options.repeats, device, options)
        dream = script.Dream(agent, agent.prompts)
        dream.generate = graph(agent.generate, device)
        dream.reset(seed=0)
        step = lambda dream=dream: dream.step(0)
        row[f"play_frames_per_s{suffix}"] = rate(1, step, options.act_repeats, device, options)
    return row


def machine(options):
    """What the figures were measured on."""
    name = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(__file__)))
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "cpu": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
        "compile": options.compile,
        "amp": options.amp,
        "load": os.getloadavg(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="path of the script")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--repeats", type=int, default=10, help="warm updates that are timed (default: 10)")
    parser.add_argument("--act-repeats", type=int, default=20, help="warm actions that are timed (default: 20)")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    amp = argparse.BooleanOptionalAction
    parser.add_argument("--amp", action=amp, default=torch.cuda.is_available(), help="bfloat16 (default: on a GPU)")
    parser.add_argument("--no-loop", action="store_true", help="leave out environment and whole loop")
    parser.add_argument("--loop-updates", type=int, default=32, help="updates of the timed loop (default: 32)")
    parser.add_argument("--out", help="folder for the JSON file")
    options = parser.parse_args()
    name = os.path.basename(options.script).removesuffix(".py")
    if name not in CASES or not os.path.exists(options.script):
        parser.error(f"{options.script}: no file, or none of which CASES says what to measure: {', '.join(CASES)}")
    cases = {case: flags for case, flags in CASES[name].items() if options.case in case}
    if not cases:
        parser.error(f"--case {options.case}: in none of {', '.join(CASES[name])}")
    if options.out:
        os.makedirs(options.out, exist_ok=True)
    torch.set_num_threads(options.threads)
    script = load(options.script)
    result = {"script": script.__name__, "machine": machine(options), "cases": {}}
    print(" ".join(f"{key}={value}" for key, value in result["machine"].items()))
    device = (result["machine"]["gpu"] or "cpu").lower().replace(" ", "-")
    kind = "compiled" if options.compile else "eager"
    if device == "cpu":
        kind += "_bf16" * options.amp + f"_{options.threads}threads" * (options.threads > 1)
    path = f"{options.out}/throughput_{script.__name__}_{device}_{kind}_{result['machine']['date']}.json"
    figures = measure_video if hasattr(script, "Video") else measure
    figures = measure_stages if hasattr(script, "dream_returns") else figures
    if figures == measure:
        acting = f"act ms: {', '.join(map(str, ENVS.get(script.__name__, (1, 4, 16))))} envs"
        print(f"{'case':22}update ms   cpu ms  first s   GFLOP  share  {acting:25} env f/s loop f/s  GB")
    there = {"": True, "a GPU": torch.cuda.is_available(), "vizdoom": find_spec("vizdoom")}
    for name, flags in cases.items():
        if not there[name.partition("needs ")[2]]:
            print(f"{name}: left out")
            continue
        torch.compiler.reset()  # shapes of other cases count against its limit
        row = result["cases"][name] = figures(script, flags, options)
        if options.out:  # after every case, so that nothing is lost
            with open(path, "w") as file:
                json.dump(result, file, indent=1)
        if figures != measure:
            print(f"{name:20}", " ".join(f"{key}={value:.0f}" for key, value in row.items()), flush=True)
            continue
        update, none = row["update"], float("nan")
        print(f"{name:20} {update['wall_ms']:10.1f} {update['cpu_ms']:8.1f}", end=" ")
        print(f"{update['first_wall_ms'] / 1e3:8.1f}", end=" ")
        print(f"{row.get('update_gflop', none):8.1f} {row.get('share_of_product_rate', none):6.2f} ", end=" ")
        print(" ".join(f"{timing['wall_ms']:7.2f}" for timing in row["act"].values()), end=" ")
        print(f"{row.get('env_frames_per_s', none):10.0f} {row.get('loop_frames_per_s', none):9.1f}", end=" ")
        print(f"{row['peak_rss_gb']:4.1f}", flush=True)
        for envs, timing in row["act"].items():
            if timing.get("gflop", 0) > 50:  # it plans
                text = f"{timing['cpu_ms']:.0f} ms CPU, {timing['gflop']:.1f} GFLOP"
                print(f"    a decision of {envs}: {text}, share {timing['share_of_product_rate']:.2f}", flush=True)
    if options.out:
        print(path)


if __name__ == "__main__":
    main()
