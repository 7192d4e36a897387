"""Kills a small run of DreamerV3 with SIGKILL at random moments and continues it each time; prints what was lost.

python benchmarks/kill.py                # 40 times, a few minutes on a CPU
python benchmarks/kill.py --times 3
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SCRIPT = Path(__file__).resolve().parents[1] / "dreamer_v3.py"
FLAGS = (
    "--env-id CartPole-v1 --total-timesteps 1000000 --replay-size 1000 --save-every 100 --eval-every 0 --no-cuda "
    "--no-compile --no-amp --size 1m --deter 64 --hidden 16 --classes 4 --units 16 --stoch 4 --blocks 4 "
    "--decoder-blocks 4 --batch-size 4 --batch-length 8 --imagination-horizon 3 --train-ratio 8"
)


def frames(run):
    """Frames of the last checkpoint."""
    return torch.load(run / "checkpoint.pt", weights_only=True)["progress"][0] if run else 0


def kill(times, seed):
    """Kills and resumes a run `times` times -> what was lost, by name."""
    rng, run, lost = random.Random(seed), None, []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(times + 1):  # the last start shows that the last kill was survived
            flags = ["--resume", run] if run else FLAGS.split()
            before, shown = frames(run), Path(folder, "shown")
            with open(shown, "wb") as output:
                env = os.environ | {"OMP_NUM_THREADS": "1"}
                process = subprocess.Popen(
                    [sys.executable, SCRIPT, *flags], cwd=folder, stdout=output, stderr=output, env=env
                )
            limit = time.time() + 120
            while frames(run) == before:
                run = run or next((path.parent for path in Path(folder).glob("runs/*/checkpoint.pt")), None)
                if process.poll() is not None or time.time() > limit:
                    process.kill()
                    sys.exit(f"kill {len(lost)} was not survived:\n{shown.read_text()[-2000:]}")
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 2))
            process.kill()
            process.wait()
            lost.append(int(re.findall(r"(\d+)/1000000 \[", shown.read_text())[-1]) - frames(run))
        return dict(kills=times, frames=frames(run), lost_mean=sum(lost) / len(lost), lost_most=max(lost))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=40, help="how often it is killed (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    options = parser.parse_args()
    print(json.dumps(kill(options.times, options.seed)))
