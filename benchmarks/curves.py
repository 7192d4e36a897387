"""Our learning curves over the published ones: a table, and a figure for each script, which takes matplotlib.

    python benchmarks/curves.py runs/<run> [...]     # these runs -> curves_<script>.png
    python benchmarks/curves.py --out docs           # the runs in benchmarks/results -> docs/curves_<script>.png

Published points (benchmarks/published) are means over seeds of the mean episode return in a window of frames that ends
at the point; ours are computed in the same windows from `charts/episodic_return`, and not smoothed otherwise. A run is
read from its metrics.csv (frame, key, value), which is made from its TensorBoard events, where it has some. A run lies
inside if it is within two standard deviations of the published mean. Genie has no returns: of its runs the metrics on
held-out clips are drawn.
"""

import argparse
import collections
import csv
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
METRICS = "eval/masked_accuracy", "eval/action_information", "eval/delta_psnr"  # Genie's


def write_csv(folder):
    """TensorBoard events of a run -> metrics.csv."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(folder, {"scalars": 0}).Reload()
    keys = events.Tags()["scalars"]
    rows = [(event.step, key, event.value) for key in keys for event in events.Scalars(key)]
    with open(f"{folder}/metrics.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["frame", "key", "value"])
        writer.writerows(sorted(rows, key=lambda row: row[:2]))


def read_run(folder):
    """A run directory -> its arguments and the (frame, value) points of each key."""
    with open(f"{folder}/args.json") as file:
        args = json.load(file) | {"name": os.path.basename(os.path.normpath(folder)).split("__", 2)[-1]}
    if any(Path(folder).glob("events.out.*")):
        write_csv(folder)
    points = collections.defaultdict(list)
    with open(f"{folder}/metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            points[row["key"]].append((int(row["frame"]), float(row["value"])))
    return args, points


def published(args):
    """Frame -> (mean, standard deviation, seeds) of the authors, for the run's task; empty if there is none."""
    path = HERE / f"published/{args['script']}.json"
    if not path.exists():
        return {}
    data, (suite, _, task) = json.loads(path.read_text()), args["env_id"].partition("-")
    vision = "dmc_vision", "curves"
    kinds = dict(dmc=("dmc_proprio",) if args["obs"] == "state" else vision, atari=("atari_all11", "atari57"))
    curves = [data.get(kind, {}) for kind in kinds.get(suite, (suite,))]
    name = f"{suite.removesuffix('100k')}_{task.replace('-', '_')}"
    return {int(frame): values for curve in curves for frame, values in curve.get(name, {}).items()}


def window(points, frame, width):
    """Mean return of the episodes that ended in the `width` frames up to `frame`; None if there was none."""
    values = [value for x, value in points if frame - width < x <= frame]
    return sum(values) / len(values) if values else None


def compare(points, curve):
    """Rows (frame, ours, mean, standard deviation, seeds) at the published frames that the run reached."""
    rows, before = [], 0
    for frame, (mean, std, seeds) in sorted(curve.items()):
        ours = window(points, frame, frame - before)
        if ours is not None and points[-1][0] >= frame - (frame - before) // 10:
            rows.append((frame, ours, mean, std, seeds))
        before = frame
    return rows


def pyplot():
    """matplotlib.pyplot, which draws into files alone."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("figures need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def start_figure(script, panels):
    rows, columns = -(-panels // 2), min(panels, 2)
    figure, axes = pyplot().subplots(rows, columns, figsize=(5 * columns, 3.5 * rows), squeeze=False)
    figure.suptitle(script)
    for axis in axes.flat[panels:]:
        axis.remove()
    return figure, axes.flat[:panels]


def save_figure(figure, path):
    for panel in figure.axes:
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=min(0, panel.get_ylim()[0]))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    print(path)


def draw_returns(script, runs, path):
    """One panel for each task: published mean and deviation, our training episodes and evaluations."""
    tasks = sorted({(args["env_id"], args["obs"]) for args, *_ in runs}, key=str)
    figure, panels = start_figure(script, len(tasks))
    for panel, task in zip(panels, tasks, strict=True):
        runs_of_task = [run for run in runs if (run[0]["env_id"], run[0]["obs"]) == task]
        end = max(frame for _, points in runs_of_task for frame, _ in points["charts/episodic_return"])
        curve = {frame: values for frame, values in published(runs_of_task[0][0]).items() if frame <= 2 * end}
        if curve:
            frames = sorted(curve)
            means, stds = ([curve[frame][i] for frame in frames] for i in (0, 1))
            lower, upper = ([m + s * d for m, d in zip(means, stds, strict=True)] for s in (-2, 2))
            panel.fill_between(frames, lower, upper, color="0.85")
            panel.plot(frames, means, color="0.5", label="published, mean ± 2 std")
        for args, points in runs_of_task:
            training, evaluation = points["charts/episodic_return"], points["eval/episodic_return"]
            (dots,) = panel.plot(*zip(*training, strict=True), ".", markersize=3, alpha=0.5, label=args["name"])
            if evaluation:
                panel.plot(*zip(*evaluation, strict=True), "o-", color=dots.get_color())
        panel.set_title(f"{task[0]} ({task[1] or 'as it is'})")
        panel.set_xlabel("environment frames")
        panel.set_ylabel("return (dots: training; line: evaluation)")
        panel.legend(fontsize=7, loc="upper left")
    save_figure(figure, path)


def draw_metrics(script, runs, path):
    """One panel for each metric that runs without returns have."""
    keys = [key for key in METRICS if any(points[key] for _, points in runs)]
    figure, panels = start_figure(script, len(keys))
    for panel, key in zip(panels, keys, strict=True):
        for args, points in runs:
            if points[key]:
                panel.plot(*zip(*points[key], strict=True), "o-", label=args["name"])
        panel.set_title(key)
        panel.set_xlabel("frames of video")
        panel.legend(fontsize=7)
    save_figure(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="run directories (default: those in benchmarks/results)")
    parser.add_argument("--out", default=".", help="folder of the figures")
    options = parser.parse_args()
    figures = collections.defaultdict(list)
    for folder in options.runs or sorted(path.parent for path in HERE.glob("results/*/args.json")):
        if not os.path.exists(f"{folder}/args.json"):
            sys.exit(f"{folder}: no run, it has no args.json")
        args, points = read_run(folder)
        training, evaluation = points["charts/episodic_return"], points["eval/episodic_return"]
        print(f"{args['script']} {args['env_id']} seed {args['seed']} ({folder})")
        for frame, ours, mean, std, seeds in compare(training, published(args)):
            verdict = "inside" if abs(ours - mean) <= 2 * std else "above" if ours > mean else "below"
            print(f"  {frame:>9,} frames: {ours:7.1f}   published {mean:7.1f} ± {std:5.1f} ({seeds} seeds)  {verdict}")
        for frame, value in evaluation:
            print(f"  {frame:>9,} frames: {value:7.1f}   evaluation")
        if training:
            figures[args["script"], draw_returns].append((args, points))
        elif any(points[key] for key in METRICS):
            figures[args["script"], draw_metrics].append((args, points))
        else:
            print("  nothing to draw yet")
    os.makedirs(options.out, exist_ok=True)
    for (script, draw), runs in figures.items():
        draw(script, runs, os.path.join(options.out, f"curves_{script}.png"))


if __name__ == "__main__":
    main()
