"""Kills a small run with SIGKILL at random moments and continues it each time; prints what was lost.

python benchmarks/kill.py                # 40 times, a few minutes on a CPU
python benchmarks/kill.py --times 3
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {
    "dreamer_v3": "--size 1m --deter 64 --hidden 16 --classes 4 --units 16 --stoch 4 --blocks 4 --decoder-blocks 4 "
    "--batch-size 4 --batch-length 8 --imagination-horizon 3 --train-ratio 8",
}
RUN = "--env-id CartPole-v1 --total-timesteps 1000000 --replay-size 1000 --save-every 100 --eval-every 0 --no-cuda"


@dataclass
class Args:
    script: str = "dreamer_v3"  # flags for another one go into FLAGS
    times: int = 40  # how often it is killed
    seed: int = 0  # of the moments


def frames(run):
    """Frames of the last checkpoint."""
    return torch.load(run / "checkpoint.pt", weights_only=True)["progress"][0] if run else 0


def kill(args):
    """Kills and resumes a run `times` times -> what was lost, by name."""
    rng, run, lost, worked = random.Random(args.seed), None, [], 0
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.times + 1):  # the last start shows that the last kill was survived
            flags = f"--resume {run}" if run else f"{RUN} --no-compile --no-amp {FLAGS[args.script]}"
            before, shown = frames(run), Path(folder, "shown")
            with open(shown, "wb") as output:
                command = [sys.executable, str(ROOT / f"{args.script}.py"), *flags.split()]
                env = os.environ | {"OMP_NUM_THREADS": "1"}
                process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=env)
            limit = time.time() + 120
            while frames(run) == before:
                run = run or next((path.parent for path in Path(folder).glob("runs/*/checkpoint.pt")), None)
                if process.poll() is not None or time.time() > limit:
                    process.kill()
                    raise SystemExit(f"kill {len(lost)} was not survived:\n{shown.read_text()[-2000:]}")
                time.sleep(0.02)
            worked += bool(lost)
            time.sleep(rng.uniform(0, 2))
            process.send_signal(signal.SIGKILL)
            process.wait()
            lost.append(int(re.findall(r"(\d+)/1000000 \[", shown.read_text())[-1]) - frames(run))
        total = frames(run)
    return dict(kills=args.times, resumed=worked, frames=total, lost_mean=sum(lost) / len(lost), lost_most=max(lost))


if __name__ == "__main__":
    print(json.dumps(kill(tyro.cli(Args, description=__doc__))))
