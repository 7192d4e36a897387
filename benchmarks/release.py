"""A trained run, made small: parameters in half precision and no optimizer, enough to play and to evaluate it.

python benchmarks/release.py runs/<run> benchmarks/results/<name>
"""

import argparse
import json
import os
import shutil
import sys

import torch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run directory")
    parser.add_argument("folder", help="where to put args.json, checkpoint.pt and, if there is one, metrics.csv")
    options = parser.parse_args()
    if os.path.realpath(options.run) == os.path.realpath(options.folder):
        parser.error("this would overwrite the run")
    try:
        state = torch.load(f"{options.run}/checkpoint.pt", map_location="cpu", weights_only=True)
        with open(f"{options.run}/args.json") as file:
            args = json.load(file)
    except FileNotFoundError as error:
        sys.exit(f"no run, or none that is saved: {error}")
    os.makedirs(options.folder, exist_ok=True)
    if os.path.exists(f"{options.run}/metrics.csv"):
        shutil.copy(f"{options.run}/metrics.csv", options.folder)
    with open(f"{options.folder}/args.json", "w") as file:
        json.dump(args | dict(run_dir="runs", resume=None), file, indent=1)  # without paths of this machine
    path = f"{options.folder}/checkpoint.pt"
    agent = {key: value.half() if value.dtype == torch.float32 else value for key, value in state["agent"].items()}
    kept = {key: state[key] for key in state if key == "progress"}  # so that a resume finds the run done
    torch.save(kept | {"agent": agent}, path)
    print(f"{path}: {os.path.getsize(path) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
