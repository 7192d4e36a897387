"""The same small tasks for PlaNet, DreamerV1, V2 and V3, over several seeds: a CSV, and a figure (takes matplotlib).

    nohup python benchmarks/compare.py --jobs 2 &         # run what is missing of the whole grid, then draw all
    python benchmarks/compare.py --panels glide catch     # run a part of it, then draw all
    python benchmarks/compare.py --jobs 0                 # draw docs/compare.png from the CSV

Runs that are finished in runs/compare/<game>/<label>/<seed> are skipped, and so are those that the CSV has; runs that
were cut are resumed. To run a cell again, delete its rows from the CSV and its folder. The CSV has the means of
training episodes (they explore) over a tenth of the frames, and at the end the evaluation.
"""

import argparse
import collections
import csv
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from curves import pyplot, read_run, window

ROOT = Path(__file__).resolve().parents[1]
CSV = ROOT / "benchmarks/results/compare/curves.csv"
SEEDS = (11, 12, 13)
SMALL = "--deter 64 --hidden 64 --units 64 --depth 4 --num-envs 4 --batch-size 16 --batch-length 5"
PLANET = f"planet.py {SMALL} --stoch 16 --free-nats 0 --seed-episodes 60 --train-steps 3 --candidates 100 --elites 10"
RATES = "--train-every 2 --prefill 300 --pretrain 50 --model-rate 1e-3 --actor-rate 4e-4 --critic-rate 1e-3"
ACTOR = f"{SMALL} {RATES} --imagination-horizon 6"
V1 = f"dreamer_v1.py {ACTOR} --stoch 16 --train-steps 1 --predict-continue --free-nats 0"
V2 = f"dreamer_v2.py {ACTOR} --stoch 8 --classes 8 --entropy-scale 0.01"
V3 = "dreamer_v3.py --size 1m --deter 128 --image-size 16 --num-envs 4 --train-ratio 512"
FOUR = {"PlaNet": f"{PLANET} --planning-horizon 5", "DreamerV1": V1, "DreamerV2": V2, "DreamerV3": V3}
HORIZONS = {str(horizon): f"{PLANET} --planning-horizon {horizon}" for horizon in (1, 3, 6, 12, 20, 30)}
ABLATIONS = {"DreamerV2": V2, "no imagination": f"{V2} --behaviour-from replay", "no critic": f"{V2} --no-critic"}
ABLATIONS |= {"Gaussian latents": f"{V2} --classes 1 --stoch 16", "horizon 5": f"{V2} --imagination-horizon 5"}
WIDE = "--deter 128 --hidden 64 --units 64 --model-rate 1e-3"  # from state: no convolutions
BATCH = "--batch-size 16 --batch-length 25 --kl-scale 0.1 --actor-rate 2e-4"
CONTROL = {
    "PlaNet": f"planet.py {WIDE} --candidates 200 --iterations 5 --elites 20 --batch-size 32 --batch-length 20",
    "DreamerV1": f"dreamer_v1.py {WIDE} {BATCH} --prefill 1000 --train-every 6 --train-steps 1 --free-nats 1"
    " --critic-rate 2e-4",
    "DreamerV2": f"dreamer_v2.py {WIDE} {BATCH} --train-every 3 --stoch 16 --classes 8",
    "DreamerV3": "dreamer_v3.py --size 1m --deter 128 --num-envs 1 --train-ratio 128",
}
PRESET = {"DreamerV3, train ratio 512": "dreamer_v3.py --size 1m --deter 128 --num-envs 1"}
PLAIN = "--no-cuda --no-amp --no-compile"
TASK = f"--total-timesteps 3000 --eval-every 0 --eval-episodes 40 --save-every 500 {PLAIN}"
STATE = f"--total-timesteps 30000 --eval-every 0 --eval-episodes 10 --save-every 2000 {PLAIN} --obs state"
GRID = {  # panel: title, flags of the task, label -> script and flags, what random play returns
    "glide": ("Glide from pixels", f"{TASK} --env-id toy_envs:Glide-v0", FOUR, -0.3),
    "catch": ("Catch from pixels", f"{TASK} --env-id toy_envs:Catch-v0", FOUR, -0.6),
    "cartpole": ("Cartpole swing-up from state", f"{STATE} --env-id dmc-cartpole-swingup", CONTROL | PRESET, 49),
    "reacher": ("Reacher (easy) from state", f"{STATE} --env-id dmc-reacher-easy", CONTROL, 54),
    "horizon": ("PlaNet on Glide, by planning horizon", f"{TASK} --env-id toy_envs:Glide-v0", HORIZONS, -0.3),
    "ablations": ("DreamerV2 on Catch, ablations", f"{TASK} --env-id toy_envs:Catch-v0", ABLATIONS, -0.6),
}
CELLS = [(panel, seed, label) for panel in GRID for seed in SEEDS for label in GRID[panel][2]]
GAME = {panel: flags.split()[-1].split(":")[-1] for panel, (_, flags, *_) in GRID.items()}
FOLDER = {(panel, seed, label): ROOT / f"runs/compare/{GAME[panel]}/{label}/{seed}" for panel, seed, label in CELLS}
MEASURED = collections.defaultdict(list)  # cell -> rows of the CSV
for row in csv.reader(CSV.read_text().splitlines()[1:]):
    MEASURED[row[0], int(row[2]), row[1]].append(row)


def score(cell):
    """The evaluation after a cell's last frame; None if it is not there yet."""
    path = FOLDER[cell] / "output.txt"
    found = re.search(r": (-?[\d.]+) ± .* episodes", path.read_text()) if path.exists() else None
    return found and float(found.group(1))


def run(cell):
    """One cell of the grid, from its start or from its last checkpoint, then its evaluation."""
    (panel, seed, label), path = cell, FOLDER[cell]
    script, *flags = f"{GRID[panel][2][label]} {GRID[panel][1]} --seed {seed}".split()
    path.mkdir(parents=True, exist_ok=True)
    train = [*flags, "--run-dir", path]
    for checkpoint in path.glob("*/checkpoint.pt"):
        train = ["--resume", checkpoint.parent]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    with open(path / "output.txt", "a") as file:
        options = dict(cwd=ROOT, env=environment, stdout=file, stderr=file)
        if subprocess.run([sys.executable, script, *train], **options).returncode == 0:
            trained = next(path.glob("*/checkpoint.pt")).parent
            subprocess.run([sys.executable, script, "--evaluate", trained], **options)
    print(f"{cell}: {score(cell)} (output: {path}/output.txt)", flush=True)


def collect():
    """Evaluated runs -> panel, label -> frame -> returns of the seeds, the evaluations at "end"; all in a CSV too."""
    for cell in (cell for cell in CELLS if cell not in MEASURED and score(cell) is not None):
        panel, seed, label = cell
        points = read_run(str(next(FOLDER[cell].glob("*/checkpoint.pt")).parent))[1]["charts/episodic_return"]
        total = int(GRID[panel][1].split()[1])
        means = {frame: window(points, frame, total // 10) for frame in range(total // 10, total + 1, total // 10)}
        values = means | {"end": score(cell)}
        MEASURED[cell] = [[panel, label, seed, str(frame), f"{value:.3f}"] for frame, value in values.items()]
        MEASURED[cell][-1].append(f"{GRID[panel][2][label]} {GRID[panel][1]}")
    rows = [row for cell in CELLS for row in MEASURED.get(cell, [])]
    with open(CSV, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(["panel label seed frame return command".split(), *rows])
    curves = collections.defaultdict(lambda: collections.defaultdict(list))
    for panel, label, _, frame, value, *_ in rows:
        curves[panel, label][frame].append(float(value))
    return curves


def draw(curves):
    """A panel each: training over frames, then evaluation; mean over seeds, and range; dotted: random play."""
    panels = sorted({panel for panel, _ in curves}, key=list(GRID).index)
    rows = -(-len(panels) // 2)
    figure, axes = pyplot().subplots(rows, 2, figsize=(10, 4 * rows), squeeze=False, layout="tight")
    for axis, panel in zip(axes.flat, panels, strict=False):
        title, _, methods, random = GRID[panel]
        axis.axhline(random, color="0.4", linestyle=":")
        for i, label in enumerate(label for label in methods if (panel, label) in curves):
            frames, values = zip(*curves[panel, label].items(), strict=True)
            frames = [int(frame) for frame in frames[:-1]]
            mean, low, high = ([f(value) for value in values] for f in (statistics.fmean, min, max))
            print(f"{panel}, {label}: {mean[-1]:.2f} ({low[-1]:.2f} to {high[-1]:.2f}), {len(values[-1])} seeds")
            (line,) = axis.plot(frames, mean[:-1], label=label)
            axis.fill_between(frames, low[:-1], high[:-1], color=line.get_color(), alpha=0.15)
            place = [frames[-1] * (1.05 + 0.03 * i)] * 3
            axis.plot(place, [low[-1], mean[-1], high[-1]], "o-", markersize=3, color=line.get_color())
        limits = dict(xlim=(0, None), ylim=(min(0, axis.get_ylim()[0]), None))
        axis.set(title=title, xlabel="environment frames", ylabel="return", **limits)
        axis.legend(fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.savefig(ROOT / "docs/compare.png", dpi=120, facecolor="white")  # on a dark page too


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on one core; 0: only draw")
    parser.add_argument("--panels", nargs="+", default=list(GRID), choices=GRID, help="parts of the grid to run")
    options = parser.parse_args()
    pyplot()  # before the runs, that it is there after them
    cells = [cell for cell in CELLS if cell[0] in options.panels and cell not in MEASURED and score(cell) is None]
    if options.jobs > 0:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(run, {FOLDER[cell]: cell for cell in cells}.values()))  # two panels may share a run
    draw(collect())


if __name__ == "__main__":
    main()
