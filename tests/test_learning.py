"""Learning from pixels, in minutes of CPU: games that random and broken agents lose, and correct ones win."""

import re

import pytest
from conftest import metrics, only_run, run_script

LEARN = {  # game, what is to be reached, flags
    "dreamer_v1": ("Glide", 0.45, "--deter 64 --hidden 64 --stoch 16 --units 64 --depth 4 --num-envs 4 --batch-size 16 "
    "--batch-length 5 --imagination-horizon 6 --train-every 2 --train-steps 1 --prefill 300 --pretrain 50 "
    "--model-rate 1e-3 --actor-rate 4e-4 --critic-rate 1e-3 --predict-continue --free-nats 0 --total-timesteps 3000"),
    "dreamer_v2": ("Catch", 0.5, "--deter 64 --hidden 64 --classes 8 --stoch 8 --units 64 --depth 4 --num-envs 4 "
    "--batch-size 16 --batch-length 5 --imagination-horizon 6 --train-every 2 --prefill 300 --pretrain 50 "
    "--model-rate 1e-3 --actor-rate 4e-4 --critic-rate 1e-3 --entropy-scale 0.01 --total-timesteps 3000"),
    "dreamer_v3": ("Catch", 0.5, "--image-size 16 --size 1m --deter 128 --hidden 32 --classes 8 --stoch 8 --units 32 "
    "--depth 8 --num-envs 4 --batch-size 16 --batch-length 6 --imagination-horizon 5 --train-ratio 48 "
    "--learning-rate 2e-3 --warmup 100 --entropy-scale 0.03 --total-timesteps 3000"),
}  # fmt: skip
STAGES = (
    "--rollouts 600 --policy held --depth 8 --stoch 8 --kl-tolerance 2 --vae-updates 1000 --vae-batch-size 32 "
    "--vae-rate 1e-3 --vae-decay 0.997 --deter 64 --rnn-updates 2500 --rnn-decay 0.998 --batch-size 16 "
    "--batch-length 12 --train-controller-in dream --temperature 0.7 --dream-length 10 --controller-hidden 16 "
    "--population 32 --candidate-rollouts 32 --sigma 0.3 --no-sample-latent"
)


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARN)
def test_learns_a_game(name, tmp_path):
    """Perfect play returns 1, random play -0.6 in Catch, whose actions are discrete, and -0.3 in Glide.

    Broken versions of dreamer_v1.py (no actions for the model; rewards a step late; no gradient for the actor)
    got -0.1, -0.4 and 0.05 in Glide after 2,300 frames, the right one 0.67 after 2,000 and 0.85 after 3,000.

    DreamerV1 has Glide: in Catch, without entropy bonus, its actor may be sure of a wrong action too early.
    """
    script, (game, wanted, flags) = __import__(name), LEARN[name]
    flags = f"--env-id toy_envs:{game}-v0 --eval-every 0 --no-cuda --no-amp {flags}"
    run_script(script, *flags.split(), cwd=tmp_path, timeout=3000)
    result = run_script(script, "--evaluate", only_run(tmp_path), "--eval-episodes", "40", cwd=tmp_path, timeout=600)
    mean = float(re.search(r": (-?[\d.]+) ±", result.stdout).group(1))
    assert mean > wanted, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--generations 100 --eval-episodes 40", "--generations 1 --num-mixtures 1"])
def test_learns_to_follow_in_its_dream(flags, tmp_path):
    """C is trained in the dream alone, and M predicts what it has not seen. Perfect play returns 9.2, random play 2."""
    script = __import__("worldmodels_v1")
    flags = f"--env-id toy_envs:Follow-v0 --no-cuda --no-amp {STAGES} {flags}"
    run_script(script, *flags.split(), cwd=tmp_path, timeout=3000)
    values = {key: float(value) for _, key, value in metrics(only_run(tmp_path)) if key.startswith("eval/")}
    assert values["eval/latent_loss"] < values["eval/latent_loss_copy"] - 0.1
    assert values["eval/latent_loss"] < values["eval/latent_loss_untrained"] - 0.3
    if "--num-mixtures" not in flags:
        result = run_script(script, "--evaluate", only_run(tmp_path), "--eval-episodes", 100, cwd=tmp_path, timeout=600)
        mean = float(re.search(r": (-?[\d.]+) ±", result.stdout).group(1))
        assert mean > 5, result.stdout
