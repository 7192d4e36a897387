#!/usr/bin/env bash
# Installs the suites of docs/environments.md in a new virtual environment, steps in each and trains for 2,000 frames:
#     bash tests/suites.sh <new folder>, then tensorboard --logdir <new folder>/runs shows what the models dreamt
# Python 3.11 or 3.12, for which Procgen has wheels; about half an hour on two cores.
set -euo pipefail
out=$(realpath -m "$1")
cd "$(dirname "$0")/.."
${PYTHON:-python3} -m venv "$out/venv"
. "$out/venv/bin/activate"
pip install -q -r requirements.txt pytest crafter procgen-mirror "setuptools<81" bsuite memory-maze gym miniworld \
    metaworld==3.1.1 gymnasium-robotics vizdoom
pip check
pip list | grep -Ei "^(crafter|procgen|bsuite|memory|miniworld|metaworld|gymnasium|vizdoom|mujoco|dm_control|numpy) *"
python -m pytest -v -rs --basetemp "$out/runs" tests/test_suites.py
