"""worldmodels_v1.py against recordings of the authors' code (tests/golden/worldmodels/README.md), and its stages."""

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import time
import types
import unittest.mock
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint, lines, metrics, only_run, run_script, scalars, spawn, tiny
from test_runs import same
from test_shapes import check

import worldmodels_v1 as script

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
FILES = sorted(GOLDEN.rglob("golden_wm*.npz"))
IMAGE = {"image": gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)}


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request):
    return np.load(request.param)


@pytest.fixture(autouse=True)
def double(request):
    """Recordings are in double precision: compared in double, so that a tolerance is a statement about the formula."""
    torch.set_default_dtype(torch.float64 if "parity" in request.node.name else torch.float32)
    yield
    torch.set_default_dtype(torch.float32)


def tensors(golden, *keys):
    return [torch.as_tensor(golden[key]).double() for key in keys]


FLOAT = dict(rtol=2e-5, atol=1e-6)  # of what leaves a network, which is float32


def close(mine, golden, rtol=1e-9, atol=1e-9):
    np.testing.assert_allclose(mine.detach().numpy(), golden, rtol=rtol, atol=atol)


# Maths


def test_parity_mdn_likelihood_and_its_gradients(golden):
    keys = ("mdn_logits", "mdn_mean", "mdn_logstd")
    inputs = [x.requires_grad_() for x in tensors(golden, *keys)]
    log_prob = script.mdn_log_prob(*inputs, *tensors(golden, "mdn_target"))
    close(log_prob, golden["mdn_loglik"])
    loss = -log_prob.mean()
    close(loss, golden["mdn_loss"])
    close(-log_prob[1:].mean(), golden["mdn_loss_tame"])
    for key, grad in zip(("logits", "mean", "logstd"), torch.autograd.grad(loss, inputs), strict=True):
        close(grad, golden[f"mdn_grad_{key}"])


def test_parity_mdn_sampling_at_all_temperatures(golden):
    mixture, noise = tensors(golden, "samp_logpi", "samp_mean", "samp_logstd"), tensors(golden, "samp_eps", "samp_u")
    for tau, z, index in zip(golden["samp_tau"], golden["samp_z"], golden["samp_idx"], strict=True):
        close(script.mdn_sample(*mixture, tau, *noise), z)
        single = script.mdn_sample(*(x.float() for x in mixture), tau, *(x.float() for x in noise))
        close(single, z, rtol=1e-5, atol=1e-5)
        numbers = torch.arange(mixture[0].shape[-1]).double().expand_as(mixture[0])
        deviation = torch.full_like(mixture[0], -torch.inf)
        close(script.mdn_sample(mixture[0], numbers, deviation, tau, *noise), index)


class Fixed(torch.nn.Module):
    """A network with a recorded output."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, _):
        return self.output


def make_agent(flags="", space=None, spaces=IMAGE):
    torch.manual_seed(0)
    args = script.parse_args(["--env-id", "toy_envs:Image-v0", *tiny(script), *flags.split()])
    agent = script.Agent(args, spaces, gym.spaces.Box(-1, 1, (2,)) if space is None else space)
    for parameter in agent.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # dreams that differ and end
    return agent


def test_parity_vae_loss_and_its_gradients(golden):
    x, y, mean, logvar = tensors(golden, "vae_x", "vae_y", "vae_mu", "vae_logvar")
    y, mean, logvar = (t.requires_grad_() for t in (y, mean, logvar))
    model = make_agent(f"--stoch {mean.shape[-1]} --kl-tolerance {golden['vae_kl_tolerance']}").world_model
    model.encoder, model.decoder = Fixed(torch.cat([mean, logvar], -1)), Fixed(y)
    losses = model.vae_loss(x * 255)
    close(losses["recon_loss"], golden["vae_recon"])
    close(losses["kl_loss"], golden["vae_kl_floored"])
    close(losses["recon_loss"].mean() + losses["kl_loss"].mean(), golden["vae_loss"])
    grads = torch.autograd.grad(losses["kl_loss"].mean(), [mean, logvar], retain_graph=True)
    for grad, key in zip(grads, ("mu", "logvar"), strict=True):
        close(grad, golden[f"vae_grad_{key}_kl"])
    close(torch.autograd.grad(losses["recon_loss"].mean(), y)[0], golden["vae_grad_y"])
    model.args.kl_tolerance = 0.0
    close(model.vae_loss(x * 255)["kl_loss"], golden["vae_kl_raw"])


def test_parity_learning_rates_and_clipping(golden):
    agent = make_agent()
    weight = agent.world_model.reward_head.weight
    gradient = torch.as_tensor(np.resize(golden["clip_in"], weight.shape))
    for decay, key in ((0.99999, "lr_doom"), (1.0, "lr_car")):
        for step, rate in zip(golden["lr_steps"].tolist(), golden[key], strict=True):
            agent.update({"loss": (weight * gradient).sum()}, 1e-3, decay**step, 1.0)
            assert agent.optimizer.param_groups[0]["lr"] == pytest.approx(rate, rel=1e-9)
    close(weight.grad, np.resize(golden["clip_out"], weight.shape))
    assert len(agent.optimizer.state) == 1  # what has no gradient is not touched


# M


def make_cell(golden, restart_input=True):
    args = script.Args(
        stoch=golden["lstm_z"].shape[-1], deter=golden["lstm_h0"].shape[-1], restart_input=restart_input, depth=1,
        num_mixtures=golden["head_logpi"].shape[-1], done_weight=float(golden["loss_restart_factor"]),
        compile=False,
    )  # fmt: skip
    agent = script.Agent(args, IMAGE, gym.spaces.Box(-1, 1, (golden["lstm_action"].shape[-1] + (not restart_input),)))
    gates = agent.world_model.rssm.gates
    gates.weight.data = torch.as_tensor(golden["lstm_kernel"].T.copy())
    gates.bias.data = torch.as_tensor(golden["lstm_bias"])
    return agent


@pytest.mark.parametrize("name, reset", [("lstm0", True), ("lstm", True), ("lstm_noreset", False)])
def test_parity_lstm(golden, name, reset):
    """Step by step, from zero or from a recorded state; a restart zeroes the state before the step, and is an input."""
    rssm = make_cell(golden, restart_input=False).world_model.rssm
    z, action, restart = tensors(golden, "lstm_z", "lstm_action", "lstm_restart")
    state = torch.cat(tensors(golden, "lstm_h0", "lstm_c0"), -1) * (name != "lstm0")
    for t in range(z.shape[1] - 1):
        flag = restart[:, t, None]
        state = rssm.lstm(state * (1 - flag) if reset else state, z[:, t], torch.cat([action[:, t], flag], -1))
        for mine, key in zip(state.chunk(2, -1), "hc", strict=True):
            close(mine, golden[f"{name}_{key}"][:, t])


def test_parity_states_along_sequences_with_restarts(golden):
    """`observe` and the single steps of acting are the authors' recurrence, in which a restart zeroes the state before
    the step; ours is zero after it."""
    rssm = make_cell(golden).world_model.rssm
    z, action, restart = tensors(golden, "lstm_z", "lstm_action", "lstm_restart")
    embed, first = torch.cat([z, torch.full_like(z, -1e4)], -1), restart.bool()  # no variance
    deter = torch.where(first[:, :1], 0, 1e-30) * torch.ones_like(rssm.initial(len(z))[0])  # only a start is exactly 0
    deters, stoch = rssm.observe(embed[:, 1:], action[:, :-1], first[:, 1:], (deter, z[:, 0]))
    close(stoch, golden["lstm_z"][:, 1:])
    keep = 1 - golden["lstm_restart"][:, 1:, None]
    for mine, key in zip(deters.chunk(2, -1), "hc", strict=True):
        close(mine, golden[f"lstm0_{key}"] * keep)
    for t in range(z.shape[1] - 1):
        deter = rssm.lstm(deter, z[:, t], action[:, t]) * ~first[:, t + 1, None]
        close(deter, deters[:, t].detach())


def test_parity_heads_and_loss(golden):
    agent = make_cell(golden)
    weight, bias = (torch.as_tensor(golden[key]) for key in ("head_w", "head_b"))
    model = agent.world_model
    with torch.no_grad():  # ours predicts that the episode goes on, theirs that it restarts
        model.continue_head.weight.copy_(-weight[:, :1].T)
        model.continue_head.bias.copy_(-bias[:1])
        model.rssm.mixture_head.weight.copy_(weight[:, 1:].T)
        model.rssm.mixture_head.bias.copy_(bias[1:])
    state = torch.cat(tensors(golden, "lstm0_h", "lstm0_c"), -1)
    logits, mean, log_std = model.rssm.mixture(state)
    close(logits.log_softmax(-1), golden["head_logpi"], **FLOAT)
    close(mean, golden["head_mean"], **FLOAT)
    close(log_std, golden["head_logstd"], **FLOAT)
    close(model.cont(state), 1 / (1 + np.exp(golden["head_restart_logit"])), **FLOAT)
    np.testing.assert_array_equal((model.cont(state) < 0.5).numpy(), golden["dream_done"])
    z, restart = tensors(golden, "lstm_z", "lstm_restart")
    close(-script.mdn_log_prob(logits, mean, log_std, z[:, 1:]).mean(), golden["loss_z"], **FLOAT)

    # the whole loss: `observe` replaced by the recorded states, with a restart as the end, and nothing left out
    model.rssm.observe = lambda *_: (state, z[:, 1:])
    B, T = restart[:, 1:].shape
    data = dict(embed=None, action=None, reward=torch.zeros(B, T), is_first=torch.zeros(B, T, dtype=torch.bool))
    losses, _ = model.loss(data | dict(is_terminal=restart[:, 1:].bool()), None)
    close(losses["continue_loss"].mean(), golden["loss_restart"], **FLOAT)
    losses, _ = model.loss(data | dict(is_terminal=data["is_first"]), None)
    close(losses["latent_loss"].mean(), golden["loss_z"], **FLOAT)


def test_parity_reward_and_end_of_the_dream(golden):
    """Errors of the heads; the return counts rewards up to and with that of the first end."""
    reward, predicted, done, logit = tensors(golden, "rd_reward", "rd_reward_pred", "rd_done", "rd_done_logit")
    args = script.Args(stoch=2, deter=2, depth=1)
    agent = script.Agent(args, IMAGE, gym.spaces.Box(-1, 1, (1,)))
    model, (B, T) = agent.world_model, reward.shape
    with torch.no_grad():  # an output of the LSTM is the reward, the other the logit
        for head, row in ((model.reward_head, [1.0, 0.0]), (model.continue_head, [0.0, -1.0])):
            head.weight.copy_(torch.tensor([row]))
    output = torch.stack([predicted, logit, torch.zeros(B, T), torch.zeros(B, T)], -1)
    model.rssm.observe = lambda *_: (output, torch.zeros(B, T, 2))
    never = torch.zeros(B, T, dtype=torch.bool)
    data = dict(embed=None, action=None, reward=reward, is_first=never, is_terminal=done.bool())
    losses, _ = model.loss(data, None)
    close(losses["reward_loss"].mean(), golden["rd_mse"], **FLOAT)
    close(losses["continue_loss"].mean(), golden["rd_bce"], **FLOAT)
    model.reward_scale.copy_(torch.tensor([1.0, 2.0]))  # rewards are normalised: neither mean nor size matters
    close(model.loss(data | {"reward": 2 * reward + 1}, None)[0]["reward_loss"].mean(), golden["rd_mse"], **FLOAT)
    model.reward_scale.copy_(torch.tensor([0.0, 1.0]))
    for b in range(B):  # a dream whose states are the recording
        steps = iter(range(T))
        model.rssm.img_step = lambda state, *_, b=b, steps=steps: (
            output[b, next(steps)].expand(len(state[0]), -1), state[1]
        )  # fmt: skip
        start = torch.zeros(2, 4), torch.zeros(2, 2)
        returns = script.dream_returns(agent, agent.behaviour.params.expand(3, -1), start, T)
        close(returns, np.full(3, golden["rd_return"][b]), **FLOAT)


# V


def weights(layer, fan, shape):
    t = np.arange(1, np.prod(shape) + 1, dtype=np.float64).reshape(shape)
    v = np.sin(12.9898 * t + 78.233 * (layer + 1)) * 43758.5453
    return (2 * (v - np.floor(v)) - 1) * (np.sqrt(3 / fan) * 1.2 if fan else 0.05)


def test_parity_whole_vae(golden, monkeypatch):
    """At full size, with weights from a formula: encoder, latent, decoder, loss, number of parameters."""
    stoch = golden["fullvae_mu"].shape[-1]
    agent = script.Agent(script.Args(stoch=stoch, compile=False), IMAGE, gym.spaces.Box(-1, 1, (3,)))
    model = agent.world_model
    encoder, decoder = model.encoder, model.decoder
    layers = [*(x[0] for x in encoder.convs), encoder.mean, encoder.logvar, decoder.map]
    layers += [*(x[0] for x in decoder.convs[:-1]), decoder.convs[-1]]
    checksum = golden["fullvae_weight_checksum"]
    with torch.no_grad():
        for i, layer in enumerate(layers):
            shape = layer.weight.shape
            if isinstance(layer, torch.nn.Conv2d):  # (out, in, k, k) from (k, k, in, out)
                values = weights(i, shape[1] * shape[2] ** 2, (shape[2], shape[3], shape[1], shape[0]))
                mine = values.transpose(3, 2, 0, 1)
            elif isinstance(layer, torch.nn.ConvTranspose2d):  # (in, out, k, k) from (k, k, in, out)
                values = weights(i, shape[0] * shape[2] ** 2 / 4, (shape[2], shape[3], shape[0], shape[1]))
                mine = values.transpose(2, 3, 0, 1)
            else:  # (out, in) from (in, out)
                values = weights(i, shape[1], (shape[1], shape[0]))
                mine = values.T
                if i in (4, 5):  # flattened as H, W, C there, as C, H, W here
                    mine = mine.reshape(shape[0], 2, 2, -1).transpose(0, 3, 1, 2).reshape(shape)
            assert np.isclose(values.sum(), checksum[i], rtol=1e-6) or np.isclose(np.abs(values).sum(), checksum[i])
            layer.weight.copy_(torch.as_tensor(np.ascontiguousarray(mine)))
            layer.bias.copy_(torch.as_tensor(weights(i + 100, 0, layer.bias.shape)))
    assert sum(p.numel() for part in (encoder, decoder) for p in part.parameters()) == golden["fullvae_nparams"]
    image, noise = torch.as_tensor(golden["fullvae_img"]), torch.as_tensor(golden["fullvae_eps"])
    mean, logvar = encoder(image).double().chunk(2, -1)
    close(mean, golden["fullvae_mu"], 1e-5, 1e-5)
    close(logvar, golden["fullvae_logvar"], 1e-5, 1e-5)
    z = mean + (logvar / 2).exp() * noise
    close(z, golden["fullvae_z"], 1e-5, 1e-5)
    close(decoder(z).double(), golden["fullvae_y"], 0, 5e-6)
    monkeypatch.setattr(script.torch, "randn_like", lambda x: noise)
    losses = model.vae_loss(image)
    close(losses["recon_loss"], golden["fullvae_recon"], 1e-5)


# C


def controller(inputs, params, actions, **options):
    space = gym.spaces.Discrete(3) if options.get("moves") else gym.spaces.Box(-1, 1, (actions,))
    sizes = dict(stoch=inputs["z"].shape[-1], deter=inputs.get("h", np.zeros((1, 256))).shape[-1], depth=1)
    c = script.Controller(script.Args(**sizes, **options), actions, isinstance(space, gym.spaces.Discrete))
    assert c.params.numel() == params.shape[1]
    zeros = np.zeros((*inputs["z"].shape[:2], sizes["deter"]))
    state = torch.as_tensor(np.concatenate([inputs.get("h", zeros), inputs.get("c", zeros)], -1))
    return c, c(state, torch.as_tensor(inputs["z"]), torch.as_tensor(params))


def test_parity_controllers_of_car_racing(golden):
    inputs = dict(z=golden["ctrl_z"], h=golden["ctrl_h"])
    _, output = controller(inputs, golden["ctrl_params"], 3, brake=2)
    close(output, np.tanh(golden["ctrl_raw"]))
    for name, options in (("ctrl", {}), ("ctrlhid", dict(controller_inputs="z", controller_hidden=40))):
        c, output = controller(inputs, golden[f"{name}_params"], 3, brake=2, **options)
        action = c.action(output)  # the environment's are -1 to 1, 0 to 1, 0 to 1: the adapter scales
        adapted = torch.stack([action[..., 0], (action[..., 1] + 1) / 2, (action[..., 2] + 1) / 2], -1)
        close(adapted, golden[f"{name}_action"])


def test_parity_controller_of_take_cover(golden):
    inputs = {key: golden[f"doom_{key}"] for key in "zch"}
    options = dict(moves=True, controller_inputs="zch", controller_bias=False)
    c, output = controller(inputs, golden["doom_params"], 3, **options)
    close(output[..., 0], golden["doom_action"])
    action = c.action(output)
    np.testing.assert_array_equal((action[..., 1] - action[..., 2]).numpy(), golden["doom_move"])
    assert (action.sum(-1) == 1).all()


def count(module):
    return sum(p.numel() for p in module.parameters())


SIZES = [("CarRacing-v3", gym.spaces.Box(-1, 1, (3,)), 4_348_547, 422_368, 867)]
DOOM = gym.spaces.Discrete(3), 4_446_915, 1_678_785 - 513, 1088
SIZES += [(f"{module}VizdoomTakeCover-v1", *DOOM) for module in ("", "vizdoom.gymnasium_wrapper:")]


@pytest.mark.parametrize("env_id, space, vae, rnn, controller", SIZES)
def test_parity_number_of_parameters(env_id, space, vae, rnn, controller):
    """Of the paper's appendix. TakeCover's M there includes the head for the end, 513; reward heads are ours."""
    agent = script.Agent(script.parse_args(["--env-id", env_id]), IMAGE, space)
    model = agent.world_model
    assert (count(model.encoder) + count(model.decoder), count(model.rssm)) == (vae, rnn)
    assert agent.behaviour.params.numel() == controller
    assert count(model.continue_head) == count(model.reward_head) == agent.args.deter + 1


@pytest.mark.parametrize(
    "flags, size",
    [("--controller-inputs z", 99), ("--controller-inputs z --controller-hidden 40", 1443),
     ("--controller-inputs zch", 1635), ("", 867), ("--quick", 291), ("--quick --controller-hidden 10", 1003)],
)  # fmt: skip
def test_parity_sizes_of_other_controllers(flags, size):
    args = script.parse_args(["--env-id", "CarRacing-v3", *flags.split()])
    assert script.Controller(args, 3, False).params.numel() == size


# The dream


@pytest.mark.parametrize("flags", ["", "--temperature 0.5", "--controller-inputs zch --restart-input"])
def test_all_dreams_at_once_equal_one_candidate_at_a_time(flags):
    agent = make_agent(flags, gym.spaces.Discrete(3))
    P, R, length = 7, 5, 30
    params = torch.randn(P, agent.behaviour.params.numel())
    start = torch.randn(R, 2 * agent.args.deter) / 2, torch.randn(R, agent.args.stoch)

    def returns(params):
        torch.manual_seed(3)
        return script.dream_returns(agent, params, start, length)

    whole = returns(params)
    assert whole.std() > 0.01
    close(whole, torch.cat([returns(x[None]) for x in params]).numpy(), 1e-4, 1e-4)
    close(whole[[4, 1]], returns(params[[4, 1]]).numpy(), 1e-4, 1e-4)


def test_dreams_in_bfloat16_return_nearly_the_same():
    returns = []
    for flag in ("--no-amp", "--amp"):
        torch.manual_seed(3)
        agent = make_agent(flag, gym.spaces.Discrete(3))
        params = torch.randn(40, agent.behaviour.params.numel())
        start = torch.randn(8, 2 * agent.args.deter) / 2, torch.randn(8, agent.args.stoch)
        returns.append(script.dream_returns(agent, params, start, 5))
    assert not torch.equal(*returns)
    assert torch.corrcoef(torch.stack(returns))[0, 1] > 0.99


def test_a_batched_dream_is_the_gymnasium_dream():
    """One dream, in both: same states, same rewards, same end."""
    agent = make_agent("", gym.spaces.Discrete(2))
    dream, total, over = script.Dream(agent, script.make_env(agent.args), length=40), 0.0, False
    dream.reset(seed=5)
    start, random = dream.state, torch.get_rng_state()
    while not over:
        _, reward, terminated, truncated, _ = dream.step(dream.policy())
        total, over = total + reward, terminated or truncated
    torch.set_rng_state(random)
    (batched,) = script.dream_returns(agent, agent.behaviour.params[None], start, 40)
    assert batched.item() == pytest.approx(total, rel=1e-4)


def sequences(B=3, T=5, S=6):
    """A batch for M."""
    data = dict(embed=torch.randn(B, T, 2 * S), action=torch.rand(B, T, 2), reward=torch.randn(B, T))
    return data | {key: torch.rand(B, T) < 0.2 for key in ("is_first", "is_terminal")}


def test_what_m_does_not_predict_and_its_state_between_chunks():
    """The first frame, its reward and its end; of a terminal frame the latent alone. The state is no view of all steps,
    or every checkpoint would hold them."""
    data, agent = sequences(), make_agent("--stoch 6 --deter 7 --depth 1")
    data["is_first"], data["is_terminal"] = (torch.arange(5).expand(3, 5) == t for t in (0, 4))
    losses, state = agent.world_model.loss(data, agent.world_model.rssm.initial(3))
    counted = {name: (loss != 0).all(0).int().tolist() for name, loss in losses.items()}
    assert counted == dict(latent_loss=[0, 1, 1, 1, 0], reward_loss=[0, 1, 1, 1, 1], continue_loss=[0, 1, 1, 1, 1])
    assert all(x.untyped_storage().nbytes() == 4 * x.numel() for x in state)


@pytest.mark.parametrize("flags", ["", "--controller-inputs zch --controller-hidden 9"])
def test_shape_comments(flags):
    sizes = dict(B=3, T=5, N=15, P=10, R=4, Q=40, A=2, S=6, H=7, D=14, C=3)
    agent = make_agent(flags + " --stoch 6 --deter 7 --depth 1")
    sizes["W"] = agent.behaviour.params.numel()

    def run():
        agent.world_model.vae_loss(torch.randint(0, 256, (15, 64, 64, 3), dtype=torch.uint8))
        agent.world_model.loss(sequences(), agent.world_model.rssm.initial(3))
        script.dream_returns(agent, torch.zeros(10, sizes["W"]), agent.world_model.rssm.initial(4), 3)

    agent.world_model.continue_head.bias.data += 100
    check(script, sizes, run)


def test_the_evolution_climbs_and_keeps_the_mean_that_scored_best(monkeypatch):
    """Returns are greatest for parameters of 1; those of evaluations, which get a place for a film, are noisy too."""
    workers = contextlib.nullcontext(types.SimpleNamespace(map=map))
    play = lambda seed, params, *film, **_: (-np.square(params - 1).mean() + len(film) * 9 * (seed % 7), 1, {}, {})
    for name, value in dict(Workers=workers, dream_starts=0, dream_returns=torch.zeros(1)).items():
        monkeypatch.setattr(script, name, lambda *_, value=value: value)
    monkeypatch.setattr(script, "rollout", play)
    agent = make_agent("--eval-every 1 --eval-generations 1 --controller-inputs z --sigma 0.5 --candidate-rollouts 2")
    at, kept = types.SimpleNamespace(memory={}, frames=0, stop=[], rng=np.random.default_rng(0), iteration=0), []
    at.folder, at.done, evolution = "", 0, script.evolve(agent.args, agent, None, at)
    for at.done in range(46):
        row, _ = next(evolution)
        kept.append((row["eval/episodic_return"], agent.behaviour.params.tolist()))
    best = max(range(46), key=lambda t: kept[t][0])
    assert row["charts/fitness_mean"] > -0.1 and 0 < best < 40
    assert [params == kept[-1][1] for _, params in kept] == [t >= best for t in range(46)]


# CarRacing


def car_racing(*flags):
    pytest.importorskip("Box2D")
    return script.parse_args(["--env-id", "CarRacing-v3", "--no-cuda", "--no-amp", "--no-compile", *flags])


def test_frames_that_are_not_drawn_change_nothing():
    args = car_racing("--quick")
    plain, fast = script.make_env(args), script.make_env(args)
    script.draw_seldom(fast.unwrapped, args.action_repeat)
    for seed in (4, 5):
        first = [env.reset(seed=seed)[0]["image"] for env in (plain, fast)]
        assert np.array_equal(*first)
        for t in range(12):
            action = np.array([np.sin(t), 0.5, -1.0], np.float32)
            (a, reward, *_), (b, other, *_) = (env.step(action) for env in (plain, fast))
            assert np.array_equal(a["image"], b["image"]) and reward == pytest.approx(other)


@pytest.mark.parametrize("flags, seldom", [("--quick", True), ("--quick --whole-episodes", False)])
def test_all_frames_are_drawn_where_single_steps_follow_an_end(flags, seldom, monkeypatch):
    monkeypatch.setattr(script.threading, "Thread", unittest.mock.Mock())  # it waits for the main process
    monkeypatch.setattr(script, "WORKER", {})
    args = car_racing(*flags.split())
    env = script.make_env(args)
    agent = script.Agent(args, env.observation_space.spaces, env.action_space)
    script.start_worker(args, {key: value.numpy() for key, value in agent.state_dict().items()})
    assert ("_render" in vars(script.WORKER["env"].unwrapped)) == seldom


def test_what_v_sees_of_car_racing_has_no_score_in_it():
    spaces = {"image": gym.spaces.Box(0, 255, (96, 96, 3), np.uint8)}
    model = script.Agent(car_racing(), spaces, gym.spaces.Box(-1, 1, (3,))).world_model
    image = torch.zeros(1, 96, 96, 3, dtype=torch.uint8)
    image[:, 84:] = 255
    assert model.frame({"image": image}).shape == (1, 64, 64, 3) and not model.frame({"image": image}).any()
    image[:, 80] = 255
    assert model.frame({"image": image}).any()
    decoded = model.decode(torch.randn(1, 2, 2 * 256 + 32))["image"]
    assert decoded.shape == (1, 2, 96, 96, 3) and decoded[:, :, :84].all() and not decoded[:, :, 84:].any()


def test_laps_do_not_end_as_in_the_first_version_of_car_racing():
    env = script.make_env(car_racing()).unwrapped
    assert env.lap_complete_percent == 1.0
    args = car_racing("--quick", "--env-kwargs", "lap_complete_percent", "0.95")
    assert script.make_env(args).unwrapped.lap_complete_percent == 0.95
    assert (car_racing().whole_episodes, car_racing("--quick").whole_episodes) == (True, False)


# Rollouts


@pytest.fixture
def play(monkeypatch):
    """A rollout in this process."""

    def call(flags, **job):
        args = script.parse_args([*f"--env-id {flags}".split(), *tiny(script)])
        env = script.make_env(args)
        agent = script.Agent(args, env.observation_space.spaces, env.action_space)
        monkeypatch.setattr(script, "WORKER", dict(agent=agent, env=env))
        return script.rollout(**job)[:3], agent

    return call


@pytest.mark.parametrize("policy", ["agent", "brown", "held", "controller"])
def test_a_rollout_keeps_what_happened(play, policy):
    (total, steps, kept), agent = play("toy_envs:Image-v0", seed=3, policy=policy, keep=True)
    assert (total, steps) == (210, 20) and kept["reward"].tolist() == list(range(21))
    for key, where in (("is_first", 0), ("is_last", 20), ("is_terminal", 20)):
        assert np.flatnonzero(kept[key]).tolist() == [where]
    assert not kept["action"][0].any() and (kept["action"][1:].sum(1) == 1).all()
    obs, _ = script.WORKER["env"].reset(seed=3)
    seen = [obs["image"], *(script.WORKER["env"].step(action.argmax())[0]["image"] for action in kept["action"][1:])]
    frames = agent.world_model.frame({"image": torch.as_tensor(np.array(seen))}).numpy()
    assert np.array_equal(kept["image"], frames)


def test_random_agents_act_on_noise(play):
    """V and M are nearly zero in the authors' agents, so that z is normal, and most C turn it into many actions."""
    flags, means, varied = "toy_envs:Image-v0 --stoch 32 --deter 256", [], []
    for seed in range(10):
        (_, _, kept), agent = play(flags, seed=seed, policy="agent", keep=True)
        white = agent.world_model.frame({"image": torch.full((1, 64, 64, 3), 255, dtype=torch.uint8)})
        means.append(agent.world_model.encoder(white).abs().max().item())
        varied.append(kept["action"][1:].std(0).any())
    assert max(means) < 0.1 and sum(varied) > 5


def test_whole_episodes_go_on_after_their_end(play):
    """Up to their limit; what comes after the end is worth nothing, and the end stays marked."""
    flags = "toy_envs:Image-v0 --time-limit 30"
    (total, steps, kept), _ = play(f"{flags} --whole-episodes", seed=3, policy="held", keep=True)
    assert (total, steps) == (210, 30) and not kept["reward"][21:].any()
    assert np.flatnonzero(kept["is_terminal"]).tolist() == [20] and np.flatnonzero(kept["is_last"]).tolist() == [30]
    (total, steps, _), _ = play(f"{flags} --whole-episodes", seed=3)  # a candidate's ends
    assert (total, steps) == (210, 20)


def test_whole_episodes_fit_the_replay_where_actions_are_repeated(tmp_path):
    flags = "--env-id toy_envs:Image-v0 --time-limit 30 --whole-episodes --action-repeat 2 --generations 1".split()
    run_script(script, *flags, *tiny(script), "--rnn-decay", "0.5", cwd=tmp_path)
    rate = checkpoint(only_run(tmp_path))["optimizer"]["param_groups"][0]["lr"]
    assert rate == pytest.approx((1e-3 - 1e-5) * 0.5**5 + 1e-5)  # of the last of six updates
    assert checkpoint(only_run(tmp_path))["count"] == 3 * (10 + 10 + 1)  # 20 frames in 10 steps, then one in each
    curves = scalars(only_run(tmp_path))  # each stage logs its last rows, which a stop before the next would lose
    assert curves["losses/recon_loss"][-1][0] < curves["losses/latent_loss"][-1][0] < curves["charts/generation"][0][0]


def test_a_rollout_is_left_when_patience_is_over(play):
    (_, steps, kept), _ = play("toy_envs:Follow-v0", seed=3, patience=2, keep=True)
    assert 2 <= steps < 10 and kept["is_last"][-1] and not kept["is_terminal"].any()
    (_, steps, kept), _ = play("toy_envs:Image-v0", seed=3, patience=2, noise=0.3, keep=True)
    assert steps == 20 and kept["action"][1:].std(0).any()  # each step is rewarded; a controller of zeros acts by noise


@pytest.mark.parametrize("patience, shortest", [(0, 10), (2, 2)])
def test_episodes_are_collected_with_patience(patience, shortest, tmp_path):
    flags = ["--env-id", "toy_envs:Follow-v0", "--collect-patience", patience, "--generations", 1]
    run_script(script, *tiny(script), *flags, "--rollouts", 8, "--batch-length", 4, cwd=tmp_path)
    assert min(length for _, length in scalars(only_run(tmp_path))["charts/episodic_length"]) == shortest


# Runs

DREAMT = "--train-controller-in dream --dream-length 8 --dream-context 2"
RUN = ["--env-id", "toy_envs:Image-v0", "--time-limit", 30, "--num-envs", 2, "--iterations", 2, *tiny(script)]
RUN += ["--log-every", 5, "--eval-every", 1, "--eval-episodes", 2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped, for each place where the controller is trained; with evaluations."""
    runs = {}

    def get(flags=""):
        if flags not in runs:
            folder = tmp_path_factory.mktemp("whole")
            run_script(script, *RUN, *flags.split(), cwd=folder)
            runs[flags] = only_run(folder)
        return runs[flags]

    return get


def same_runs(one, two):
    states = [checkpoint(run) for run in (one, two)]
    same(*states)
    layout, count = script.load_run(script.parse_args(["--evaluate", str(one)]), one)[0].layout(), states[0]["count"]
    assert {path.name for path in (one / "replay").iterdir()} == layout.keys()
    for name, (shape, dtype) in layout.items():
        size = count * int(np.prod(shape))
        assert np.array_equal(*(np.fromfile(run / "replay" / name, dtype, size) for run in (one, two))), name


def stopping(stage, iteration, done, number):
    """A stage in which a signal comes when so many of its units are done."""

    @functools.wraps(stage)
    def wrapped(args, agent, rollouts, at):
        for unit in stage(args, agent, rollouts, at):
            yield unit
            if (at.iteration, at.done) == (iteration, done):
                os.kill(os.getpid(), number)

    return wrapped


STAGES = ["collect", "learn_v", "encode", "learn_m", "evolve"]
STOPS = [((0, "collect", 1), signal.SIGTERM, ""), ((0, "learn_v", 2), signal.SIGINT, "")]
STOPS += [((0, "learn_m", 3), signal.SIGHUP, ""), ((0, "evolve", 1), signal.SIGTERM, "")]


@pytest.mark.parametrize("at, number, flags", [*STOPS, ((1, "evolve", 1), signal.SIGTERM, DREAMT)])
def test_a_run_that_was_stopped_goes_on_exactly(whole, tmp_path, monkeypatch, at, number, flags):
    whole(flags)
    iteration, stage, done = at
    monkeypatch.setattr(script, stage, stopping(getattr(script, stage), iteration, done, number))
    out = run_script(script, *RUN, *flags.split(), cwd=tmp_path, code=128 + number).stdout
    run = only_run(tmp_path)
    assert f"--resume runs/{run.name}" in out.splitlines()[-1]
    assert checkpoint(run)["progress"][0] in [([iteration, STAGES.index(stage)], done + more) for more in (0, 1)]
    monkeypatch.undo()
    fewer = tmp_path / "fewer"
    shutil.copytree(run, fewer)
    run_script(script, "--resume", run, cwd=tmp_path)
    same_runs(whole(flags), run)
    flags = "--iterations 1 --rollouts 2 --batch-size 1 --population 5".split()
    run_script(script, "--resume", fewer, *flags, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("iteration, stage, done", [(0, "learn_m", 4), (1, "collect", 2), (1, "evolve", 2)])
def test_kill(whole, tmp_path, iteration, stage, done):
    """What came since the last save is done again; no worker stays behind."""
    patch = f"import test_worldmodels_v1 as t\ns.{stage} = t.stopping(s.{stage}, {iteration}, {done}, 9)"
    process = spawn(script, tmp_path, *RUN, "--save-every", 1, patch=patch)
    assert process.wait(300) == -signal.SIGKILL
    limit = time.time() + 60
    while subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True).stdout:
        assert time.time() < limit, "worker processes outlive the main process"
        time.sleep(0.1)
    run_script(script, "--resume", only_run(tmp_path), cwd=tmp_path)
    same_runs(whole(), only_run(tmp_path))


def test_every_key_is_documented(whole):
    """And the logs of both kinds of runs have what is documented."""
    page = (ROOT / "docs/worldmodels_v1.md").read_text()
    documented = set(re.findall(r"`((?:charts|losses|stats|eval|video)/[^`]+)`", page))
    assert set(scalars(whole())) == set(scalars(whole(DREAMT))) == documented


def test_what_is_there_is_not_done_again_and_more_can_be_asked_for(whole, tmp_path):
    run = tmp_path / "runs/run"
    shutil.copytree(whole(), run)
    before, rows = checkpoint(run), len(metrics(run))
    run_script(script, "--resume", run, cwd=tmp_path)
    same(before, checkpoint(run))
    assert len(metrics(run)) == rows
    run_script(script, "--resume", run, "--generations", 5, cwd=tmp_path)
    after = checkpoint(run)
    assert after["progress"][0] == ([1, 4], 5)
    assert all(torch.equal(value, after["agent"][key]) for key, value in before["agent"].items() if "encoder" in key)
    run_script(script, "--resume", run, "--iterations", 3, cwd=tmp_path)
    assert checkpoint(run)["progress"][0] == ([2, 4], 5) and checkpoint(run)["count"] == 9 * 21


def test_evaluation_plays_100_episodes_if_not_told_otherwise(whole):
    assert script.parse_args(["--evaluate", str(whole())]).eval_episodes == 100
    assert script.parse_args(["--resume", str(whole())]).eval_episodes == 2


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["Raise", "Nan", "Exit"])
def test_trouble_in_an_environment(trouble, tmp_path):
    (tmp_path / "go").touch()
    flags = ["--env-id", f"toy_envs:{trouble}Image-v0", *tiny(script), "--time-limit", 20]
    words = dict(Raise="the robot fell", Nan="not finite", Exit="terminated abruptly")[trouble]
    assert words in run_script(script, *flags, cwd=tmp_path, code=1, fresh=True).stderr
    (tmp_path / "go").unlink()
    run_script(script, *flags, cwd=tmp_path)


def test_frames_that_are_spent(tmp_path):
    """None are left for the controller; more can be given."""
    run_script(script, *RUN, "--total-timesteps", 21, "--iterations", 1, cwd=tmp_path)
    run = only_run(tmp_path)
    assert checkpoint(run)["progress"] == (([0, 4], 0), checkpoint(run)["progress"][1], 40)
    run_script(script, "--resume", run, "--total-timesteps", 100_000, cwd=tmp_path)
    assert checkpoint(run)["progress"][0] == ([0, 4], 3)


def test_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    whole = script.WorldModel.vae_loss
    calls = []

    def broken(self, image):
        calls.append(1)
        return {key: loss * (torch.nan if len(calls) == 4 else 1) for key, loss in whole(self, image).items()}

    monkeypatch.setattr(script.WorldModel, "vae_loss", broken)
    result = run_script(script, *RUN, "--save-every", 1, cwd=tmp_path, code=1)
    assert "losses/" in lines(result.stderr)[-1] and "learn_v 3" in lines(result.stderr)[-1]
    state = checkpoint(only_run(tmp_path))
    assert state["progress"][0] == ([0, 1], 3) and all(x.isfinite().all() for x in state["agent"].values())


REFUSED = {"--obs state": "V sees pixels", "--moves": "three discrete actions", "--shortest 99": "no episode"}
REFUSED |= {"--env-id VizdoomTakeCover-v1": "vizdoom", "--crop 1.5": "--crop", "--temperature 0": "--temperature"}
REFUSED |= {"--quick": "--quick", "--sigma 0": "--sigma", "--population 1": "--population 1", "--batch-length 99": "99"}
REFUSED |= {"--rollouts 1": "--rollouts 1"}


@pytest.mark.parametrize("flags, word", REFUSED.items())
def test_what_cannot_be_is_refused(tmp_path, monkeypatch, flags, word):
    monkeypatch.setitem(script.sys.modules, "vizdoom", None)  # as if it was not installed
    results = [run_script(script, *RUN, *flags.split(), cwd=tmp_path, code=1)]
    results += [run_script(script, "--resume", run, cwd=tmp_path, code=1) for run in tmp_path.glob("runs/*")]
    for result in results:
        assert word in lines(result.stderr)[-1] and "Traceback" not in result.stderr


@pytest.mark.parametrize("kwargs, words", [("length 1", ""), ("length 999999", "names no time limit")])
def test_episodes_of_one_step_and_without_end(kwargs, words, tmp_path):
    flags = ["--env-id", "toy_envs:Image-v0", "--env-kwargs", *kwargs.split(), *tiny(script), "--eval-every", 1]
    flags += ["--batch-length", 2, "--rollouts", 6, "--generations", 1, "--eval-episodes", 2, "--policy", "brown"]
    assert words in run_script(script, *flags, cwd=tmp_path).stdout
    run = only_run(tmp_path)
    assert checkpoint(run)["progress"][0] == ([0, 4], 1)
    length = 1 if kwargs == "length 1" else 1000
    assert {value for _, value in scalars(run)["charts/episodic_length"]} == {length}


def test_a_replay_that_does_not_fit(whole, refused, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole(), run)
    assert "other sizes" in refused(script, "--resume", run, "--stoch", 8)
    assert "no_such_module" in refused(script, "--evaluate", run, "--env-id", "no_such_module:Thing-v0")
    (run / "replay/reward").unlink()
    assert "not whole" in refused(script, "--resume", run)
    (run / "checkpoint.pt").write_bytes(b"")
    for option in ("--resume", "--evaluate"):
        assert "not whole" in refused(script, option, run)


@pytest.mark.slow
def test_take_cover(tmp_path):
    """Collected, dreamt in and evaluated in the real game."""
    pytest.importorskip("vizdoom")
    flags = "--env-id VizdoomTakeCover-v1 --num-envs 2 --shortest 0 --time-limit 100 --dream-length 20 --eval-every 1"
    run_script(script, *flags.split(), *tiny(script), "--eval-every", 1, "--eval-episodes", 2, cwd=tmp_path)
    values = {key: value for _, key, value in metrics(only_run(tmp_path))}
    assert 30 < values["eval/episodic_return"] <= 100 and 0 < values["charts/dream_return"] < 25
