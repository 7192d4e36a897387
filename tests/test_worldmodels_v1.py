"""worldmodels_v1.py against recordings of the authors' code (tests/golden/worldmodels/README.md), and its stages."""

import base64
import faulthandler
import io
import json
import multiprocessing
import os
import signal
import subprocess
import time
import types
import urllib.request
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, checkpoint, environment, metrics, only_run, press_a_key, run_script, served, tiny
from gymnasium.utils.env_checker import check_env
from PIL import Image
from test_runs import same
from test_shapes import commented, watch

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


def test_there_are_recordings():
    assert FILES


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
    inputs = tensors(golden, "samp_logpi", "samp_mean", "samp_logstd", "samp_u", "samp_eps")
    for tau, z, index in zip(golden["samp_tau"], golden["samp_z"], golden["samp_idx"], strict=True):
        close(script.mdn_sample(*inputs, tau), z)
        single = script.mdn_sample(*(x.float() for x in inputs), tau)
        close(single, z, rtol=1e-5, atol=1e-5)
        numbers = torch.arange(inputs[0].shape[-1]).double().expand_as(inputs[0])
        deviation = torch.full_like(inputs[0], -torch.inf)
        close(script.mdn_sample(inputs[0], numbers, deviation, *inputs[3:], tau), index)


def test_parity_vae_loss_and_its_gradients(golden):
    x, y, mean, logvar = tensors(golden, "vae_x", "vae_y", "vae_mu", "vae_logvar")
    y, mean, logvar = (t.requires_grad_() for t in (y, mean, logvar))
    tolerance = float(golden["vae_kl_tolerance"])
    recon, kl = script.vae_losses(x, y, mean, logvar, tolerance)
    close(recon, golden["vae_recon"])
    close(kl, golden["vae_kl_floored"])
    close(script.vae_losses(x, y, mean, logvar, -1e9)[1], golden["vae_kl_raw"])
    close(recon.mean() + kl.mean(), golden["vae_loss"])
    grads = torch.autograd.grad(kl.mean(), [mean, logvar])
    for grad, key in zip(grads, ("mu", "logvar"), strict=True):
        close(grad, golden[f"vae_grad_{key}_kl"])
    close(torch.autograd.grad(recon.mean(), y)[0], golden["vae_grad_y"])


def test_parity_learning_rates_and_clipping(golden):
    for decay, key in ((0.99999, "lr_doom"), (1.0, "lr_car")):
        rates = [script.decayed(1e-3, decay, int(step)) for step in golden["lr_steps"]]
        np.testing.assert_allclose(rates, golden[key], rtol=1e-9)
    args = script.parse_args(["--depth", "1"])
    agent = script.Agent(args, IMAGE, gym.spaces.Discrete(2))
    weight = agent.world_model.reward_head.weight
    gradient = torch.as_tensor(np.resize(golden["clip_in"], weight.shape))
    agent.descend("rnn", {"loss": sum((p * 0).sum() for p in agent.optimizers["rnn"].param_groups[0]["params"])
                          + (weight * gradient).sum()}, 1e-3)  # fmt: skip
    close(weight.grad, np.resize(golden["clip_out"], weight.shape))


# M


def make_cell(golden, layer_norm):
    z, action = golden["lstm_z"].shape[-1], golden["lstm_action"].shape[-1]
    args = script.Args(
        stoch=z, deter=golden["lstm_h0"].shape[-1], layer_norm=layer_norm, restart_input=True,
        num_mixtures=golden["head_logpi"].shape[-1], depth=1, done_weight=float(golden["loss_restart_factor"]),
    )  # fmt: skip
    agent = script.Agent(args, IMAGE, gym.spaces.Box(-1, 1, (action,)))
    rssm = agent.world_model.rssm
    with torch.no_grad():
        rssm.cell.weight.copy_(torch.as_tensor(golden["lstm_kernel"]))
        if layer_norm:
            rssm.cell.scale.copy_(torch.as_tensor(golden["lstm_ln_gamma"]))
            rssm.cell.shift.copy_(torch.as_tensor(golden["lstm_ln_beta"]))
        else:
            rssm.cell.bias.copy_(torch.as_tensor(golden["lstm_bias"]))
    return agent, rssm.cell


def unroll(cell, golden, state, reset, masks=None):
    """States along the recording, step by step."""
    x = torch.cat(tensors(golden, "lstm_z", "lstm_action") + [tensors(golden, "lstm_restart")[0].unsqueeze(-1)], -1)
    states = []
    for t in range(x.shape[1] - 1):
        state = state * (1 - x[:, t, -1:]) if reset else state
        state = cell(cell.inputs(x[:, t]), state, None if masks is None else masks[:, t])
        states.append(state)
    return torch.stack(states, 1).chunk(2, -1)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_parity_lstm(golden, layer_norm):
    _, cell = make_cell(golden, layer_norm)
    start = torch.cat(tensors(golden, "lstm_h0", "lstm_c0"), -1)
    zero, kind = torch.zeros_like(start), "_ln" if layer_norm else ""
    cases = [(f"lstm0{kind}", zero, True, None), (f"lstm{kind}", start, True, None)]
    if not layer_norm:
        keep = tensors(golden, "lstm_dropmask")[0] / float(golden["lstm_keep"])
        cases += [("lstm_noreset", start, False, None), ("lstm_drop", start, True, keep)]
    for name, state, reset, masks in cases:
        for mine, key in zip(unroll(cell, golden, state, reset, masks), "hc", strict=True):
            close(mine, golden[f"{name}_{key}"])


@pytest.mark.parametrize("layer_norm", [False, True])
def test_parity_states_along_sequences_with_restarts(golden, layer_norm):
    """`observe` and the single steps of acting are the authors' recurrence, in which a restart zeroes the state before
    the step; ours is zero after it."""
    agent, _ = make_cell(golden, layer_norm)
    z, action, restart = tensors(golden, "lstm_z", "lstm_action", "lstm_restart")
    embed, first, rssm = torch.cat([z, torch.zeros_like(z)], -1), restart.bool(), agent.world_model.rssm
    deter = torch.where(first[:, :1], 0, 1e-30) * torch.ones_like(rssm.initial(len(z))[0])  # only a start is exactly 0
    seen = embed[:, 1:], action[:, :-1], first[:, 1:]
    deters, stoch = rssm.observe(*seen, (deter, z[:, 0]), torch.zeros_like(z[:, 1:]))
    close(stoch, golden["lstm_z"][:, 1:])
    keep, kind = 1 - golden["lstm_restart"][:, 1:, None], "_ln" if layer_norm else ""
    for mine, key in zip(deters.chunk(2, -1), "hc", strict=True):
        close(mine, golden[f"lstm0{kind}_{key}"] * keep)
    for t in range(z.shape[1] - 1):
        deter = rssm.core(deter, z[:, t], action[:, t]) * ~first[:, t + 1, None]
        close(deter, deters[:, t].detach())


def set_heads(golden, agent):
    weight, bias = (torch.as_tensor(golden[key]) for key in ("head_w", "head_b"))
    model = agent.world_model
    with torch.no_grad():  # ours predicts that the episode goes on, theirs that it restarts
        model.continue_head.weight.copy_(-weight[:, :1].T)
        model.continue_head.bias.copy_(-bias[:1])
        model.rssm.mixture_head.weight.copy_(weight[:, 1:].T)
        model.rssm.mixture_head.bias.copy_(bias[1:])


def test_parity_heads_and_loss(golden):
    agent, _ = make_cell(golden, False)
    set_heads(golden, agent)
    model = agent.world_model
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
    losses, _ = model.loss(data | dict(is_terminal=restart[:, 1:].bool()), None, None)
    close(losses["continue_loss"].mean(), golden["loss_restart"], **FLOAT)
    losses, _ = model.loss(data | dict(is_terminal=data["is_first"]), None, None)
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
    losses, _ = model.loss(data, None, None)
    close(losses["reward_loss"].mean(), golden["rd_mse"], **FLOAT)
    close(losses["continue_loss"].mean(), golden["rd_bce"], **FLOAT)
    for b in range(B):  # a dream whose states are the recording
        steps = iter(range(T))
        model.rssm.img_step = lambda state, *_, b=b, steps=steps: (
            output[b, next(steps)].expand(len(state[0]), -1), state[1]
        )  # fmt: skip
        start = torch.zeros(2, 4), torch.zeros(2, 2)
        returns = script.dream_returns(agent, agent.behaviour.params.expand(3, -1), start, T)
        close(returns, np.full(3, golden["rd_return"][b]), **FLOAT)


# V


def formula(count, layer, fan, shape):
    t = np.arange(1, count + 1, dtype=np.float64)
    v = np.sin(12.9898 * t + 78.233 * (layer + 1)) * 43758.5453
    return (2 * (v - np.floor(v)) - 1) * (np.sqrt(3 / fan) * 1.2 if fan else 0.05), shape


def weights(layer, fan, shape):
    values, shape = formula(int(np.prod(shape)), layer, fan, shape)
    return values.reshape(shape)


def test_parity_whole_vae(golden):
    """At full size, with weights from a formula: encoder, latent, decoder, loss, number of parameters."""
    stoch = golden["fullvae_mu"].shape[-1]
    agent = script.Agent(script.Args(stoch=stoch), IMAGE, gym.spaces.Box(-1, 1, (3,)))
    model = agent.world_model
    encoder, decoder = model.encoder, model.decoder
    layers = [*encoder.convs, encoder.mean, encoder.logvar, decoder.map, *decoder.convs]
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
    losses = model.vae_loss(image, noise)
    close(losses["recon_loss"], golden["fullvae_recon"], 1e-5)


# C


def controller(inputs, params, actions, **options):
    space = gym.spaces.Discrete(3) if options.get("moves") else gym.spaces.Box(-1, 1, (actions,))
    sizes = dict(stoch=inputs["z"].shape[-1], deter=inputs.get("h", np.zeros((1, 256))).shape[-1], depth=1)
    c = script.Controller(script.Args(**sizes, **options), actions, isinstance(space, gym.spaces.Discrete))
    assert c.params.numel() == params.shape[1]
    zeros = np.zeros((*inputs["z"].shape[:2], sizes["deter"]))
    state = torch.as_tensor(np.concatenate([inputs.get("h", zeros), inputs.get("c", zeros)], -1))
    return c, c(torch.as_tensor(params), state, torch.as_tensor(inputs["z"]))


def test_parity_controllers_of_car_racing(golden):
    inputs = dict(z=golden["ctrl_z"], h=golden["ctrl_h"])
    c, output = controller(inputs, golden["ctrl_params"], 3, brake=2)
    close(output, np.tanh(golden["ctrl_raw"]))
    action = c.action(output)  # the environment's are -1 to 1, 0 to 1, 0 to 1: the adapter scales
    adapted = torch.stack([action[..., 0], (action[..., 1] + 1) / 2, (action[..., 2] + 1) / 2], -1)
    close(adapted, golden["ctrl_action"])
    options = dict(brake=2, controller_inputs="z", controller_hidden=40)
    c, output = controller(dict(z=golden["ctrl_z"]), golden["ctrlhid_params"], 3, **options)
    action = c.action(output)
    adapted = torch.stack([action[..., 0], (action[..., 1] + 1) / 2, (action[..., 2] + 1) / 2], -1)
    close(adapted, golden["ctrlhid_action"])


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


@pytest.mark.parametrize(
    "env_id, space, vae, rnn, controller",
    [
        ("CarRacing-v3", gym.spaces.Box(-1, 1, (3,)), 4_348_547, 422_368, 867),
        ("VizdoomTakeCover-v1", gym.spaces.Discrete(3), 4_446_915, 1_678_785 - 513, 1088),
    ],
)
def test_parity_number_of_parameters(env_id, space, vae, rnn, controller, monkeypatch):
    """Of the paper's appendix. TakeCover's M there includes the head for the end, 513; reward heads are ours."""
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: True)
    agent = script.Agent(script.parse_args(["--env-id", env_id]), IMAGE, space)
    model = agent.world_model
    assert (count(model.encoder) + count(model.decoder), count(model.rssm)) == (vae, rnn)
    assert agent.behaviour.params.numel() == controller
    assert count(model.continue_head) == count(model.reward_head) == agent.args.deter + 1


@pytest.mark.parametrize(
    "flags, size",
    [("--controller-inputs z", 99), ("--controller-inputs z --controller-hidden 40", 1443),
     ("--controller-inputs zch", 1635), ("", 867)],
)  # fmt: skip
def test_parity_sizes_of_other_controllers(flags, size):
    args = script.parse_args(["--env-id", "CarRacing-v3", *flags.split()])
    assert script.Controller(args, 3, False).params.numel() == size


# The dream


def make_agent(flags="", space=None, spaces=IMAGE):
    torch.manual_seed(0)
    args = script.parse_args(["--env-id", "toy_envs:Image-v0", *tiny(script), *flags.split()])
    agent = script.Agent(args, spaces, gym.spaces.Box(-1, 1, (2,)) if space is None else space)
    for parameter in agent.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # dreams that differ and end
    return agent


@pytest.mark.parametrize(
    "flags", ["", "--dream-dropout 0.2 --temperature 0.5", "--controller-inputs zch --restart-input"]
)
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
    agent = make_agent("--dream-context 0", gym.spaces.Discrete(2))
    env = script.make_env(agent.args)
    dream = script.Dream(agent, env, context=2, length=40)
    dream.reset(seed=5)
    start, generator, total, over = dream.state[:2], dream.generator.get_state(), 0.0, False
    while not over:
        action = agent.behaviour.action(agent.policy(*dream.state[:2]))
        _, reward, terminated, truncated, _ = dream.step(agent.env_action(action)[0])
        total, over = total + reward, terminated or truncated
    generator = torch.Generator().set_state(generator)
    noise = agent.latent_noise
    agent.latent_noise = lambda *shape: noise(*shape, generator=generator)
    (batched,) = script.dream_returns(agent, agent.behaviour.params[None], start, 40)
    assert batched.item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "toy_envs:Mixed-v0", "toy_envs:Image-v0", "toy_envs:Gray-v0"])
@pytest.mark.parametrize("flags", ["", "--crop 0.7 --image-size 48 --dream-dropout 0.1"])
@pytest.mark.filterwarnings("ignore")
def test_a_dream_is_a_gymnasium_environment(env_id, flags):
    args = script.parse_args(["--env-id", env_id, *tiny(script), *flags.split()])
    env = script.make_env(args)
    dream = script.Dream(script.Agent(args, env.observation_space.spaces, env.action_space), env)
    state = torch.get_rng_state()
    check_env(dream)
    one, two = ([dream.reset(seed=3)[0], *(dream.step(t % 2)[0] for t in range(4))] for _ in range(2))
    assert all(np.array_equal(a[key], b[key]) for a, b in zip(one, two, strict=True) for key in a)
    assert torch.equal(state, torch.get_rng_state()), "a dream draws from the generator of training"


def test_open_loop_sees_only_the_context():
    agent = make_agent()
    B, T, S = 2, 9, agent.args.stoch
    data = dict(image=torch.randint(0, 256, (B, T, 64, 64, 3), dtype=torch.uint8), embed=torch.randn(B, T, 2 * S))
    data |= dict(action=torch.rand(B, T, 2), is_first=torch.zeros(B, T, dtype=torch.bool))

    def video(**changes):
        frames = script.open_loop(agent, data | changes, context=3).reshape(T, 64, B, 3, 64, 3).swapaxes(1, 3)
        return frames[:, 0], frames[:, 1], frames[:, 2]

    truth, recon, dream = video()
    np.testing.assert_array_equal(truth, data["image"].transpose(0, 1).numpy())
    later = data["embed"].clone()
    later[:, 3:] += 3
    changed = video(embed=later)
    assert np.array_equal(changed[2], dream) and not np.array_equal(changed[1][3:], recon[3:])
    earlier = data["embed"].clone()
    earlier[:, 2] += 3
    assert not np.array_equal(video(embed=earlier)[2][3:], dream[3:]), "the context is not seen"
    assert not np.array_equal(video(action=-data["action"])[2][3:], dream[3:]), "actions have no effect"


@pytest.mark.parametrize("flags", ["", "--controller-inputs zch --controller-hidden 9"])
def test_shape_comments(flags):
    sizes = dict(B=3, T=5, N=15, P=10, R=4, M=40, A=2, S=6, H=7, D=14, C=3)
    flags += " --stoch 6 --deter 7 --depth 1 --vae-batch-size 15"
    agent = make_agent(flags)
    sizes["W"] = agent.behaviour.params.numel()
    found = commented(ROOT / "worldmodels_v1.py")
    unknown = {d for _, dims in found.values() for dim in dims for d in dim.split(" or ")} - sizes.keys()
    assert all(symbol.isdigit() for symbol in unknown), unknown
    B, T, S = 3, 5, 6
    data = dict(embed=torch.randn(B, T, 2 * S), action=torch.rand(B, T, 2), reward=torch.randn(B, T))
    data |= {key: torch.rand(B, T) < 0.2 for key in ("is_first", "is_terminal")}

    def run():
        agent.update_vae(torch.randint(0, 256, (15, 64, 64, 3), dtype=torch.uint8), 0)
        agent.update(data, agent.world_model.rssm.initial(B), 0)
        start = agent.world_model.rssm.initial(4)
        agent.world_model.continue_head.bias.data += 100
        script.dream_returns(agent, torch.zeros(10, sizes["W"]), start, 3)

    checked, wrong = watch(script, found, sizes, run)
    assert not wrong, "\n".join(wrong)
    assert len(checked) == len(found) >= 10


# Environments and rollouts


def test_frames_that_are_not_drawn_change_nothing():
    pytest.importorskip("Box2D")
    args = script.parse_args("--env-id CarRacing-v3 --quick --no-cuda --no-amp".split())
    plain, fast = script.make_env(args), script.make_env(args)
    fast.env.env, fast.env.repeat = script.Undrawn(fast.env.env, args.action_repeat), 1
    first = [env.reset(seed=4)[0] for env in (plain, fast)]
    assert np.array_equal(*(obs["image"] for obs in first))
    for t in range(12):
        action = np.array([np.sin(t), 0.5, -1.0], np.float32)
        (a, reward, *_), (b, other, *_) = (env.step(action) for env in (plain, fast))
        assert np.array_equal(a["image"], b["image"]) and reward == pytest.approx(other)


def test_what_v_sees_of_car_racing_has_no_score_in_it():
    args = script.parse_args(["--env-id", "CarRacing-v3"])
    spaces = {"image": gym.spaces.Box(0, 255, (96, 96, 3), np.uint8)}
    model = script.Agent(args, spaces, gym.spaces.Box(-1, 1, (3,))).world_model
    image = torch.zeros(1, 96, 96, 3, dtype=torch.uint8)
    image[:, 84:] = 255
    assert model.frame({"image": image}).shape == (1, 64, 64, 3) and not model.frame({"image": image}).any()
    image[:, 80] = 255
    assert model.frame({"image": image}).any()


def test_keys_of_car_racing():
    space = gym.spaces.Box(-1, 1, (3,))
    action = lambda *keys: script.key_action(keys, space, brake=2).tolist()  # noqa: E731
    assert action() == [0, -1, -1]  # no gas, no brake
    assert action("ArrowUp", "ArrowLeft") == [-1, 1, -1]
    assert action("ArrowDown", "ArrowRight") == [1, -1, 1]


# Runs


DREAMT = "--train-controller-in dream --dream-length 8 --dream-context 2"


RUN = ["--env-id", "toy_envs:Image-v0", "--num-envs", 2, "--iterations", 2, *tiny(script), "--log-every", 5]
EVALUATED = ("--eval-every", 1, "--eval-episodes", 2)


def start(args, folder, patch):
    """A process that runs the script as a user does, but for the imports, which the process it is forked from has."""
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    faulthandler.dump_traceback_later(280)
    exec(patch or "", dict(s=script))
    script.main([str(arg) for arg in args])


@pytest.fixture(scope="session")
def forkserver():
    """The process that runs and their workers are forked from."""
    before, context = os.environ.copy(), multiprocessing.get_context("forkserver")
    os.environ |= environment()
    context.set_forkserver_preload([__name__, "cma", "torch._dynamo"])
    multiprocessing.forkserver.ensure_running()
    os.environ.clear()
    os.environ |= before
    return context


@pytest.fixture(scope="session")
def run_forked(forkserver):
    """`run_script` without the time that imports take."""

    def call(*args, cwd, code=0, patch=None):
        process = forkserver.Process(target=start, args=(args, cwd, patch))
        process.start()
        process.join(300)
        process.kill()
        process.join()
        out, err = (Path(cwd, name).read_text() for name in ("stdout", "stderr"))
        assert process.exitcode == code, f"exit code {process.exitcode}\n{out}\n{err}"
        return types.SimpleNamespace(stdout=out, stderr=err)

    return call


@pytest.fixture(scope="module")
def whole(run_forked, tmp_path_factory):
    """A run that was never stopped, for each place where the controller is trained; with evaluations."""
    runs = {}

    def get(*flags):
        if flags not in runs:
            folder = tmp_path_factory.mktemp("whole")
            if flags:
                run_forked(*RUN, *EVALUATED, *flags, cwd=folder)
            else:
                result = run_script(script, *RUN, *EVALUATED, cwd=folder, timeout=400)
                assert "Warning" not in result.stderr
            runs[flags] = only_run(folder)
        return runs[flags]

    return get


STOP = """
import multiprocessing, os, signal
whole = s.Run.advance
def advance(self, *args, **more):
    at = self.at["iteration"], s.STAGES[self.at["stage"]], self.at["done"]
    whole(self, *args, **more)
    if at == {at}:
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.{signal})
s.Run.advance = advance
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "at, number, flags",
    [
        ((0, "collect", 1), "SIGTERM", ""),
        ((0, "train_vae", 2), "SIGINT", ""),
        ((1, "encode", 0), "SIGKILL", DREAMT),
        ((0, "train_rnn", 1), "SIGTERM", ""),
        ((0, "train_rnn", 2), "SIGKILL", DREAMT),
        ((0, "evolve", 1), "SIGTERM", ""),
        ((0, "evolve", 0), "SIGKILL", DREAMT),
        ((1, "collect", 0), "SIGKILL", ""),
        ((1, "evolve", 1), "SIGTERM", DREAMT),
    ],
)
def test_a_stage_that_was_stopped_goes_on_exactly(whole, run_forked, tmp_path, at, number, flags):
    killed, flags = number == "SIGKILL", flags.split()
    code = -signal.SIGKILL if killed else 128 + getattr(signal, number)
    more = ["--save-every", 0] * (killed and at[1] != "encode")  # there the save between stages has to do
    patch = STOP.format(at=at, signal=number)
    *_, workers, line = run_forked(*RUN, *EVALUATED, *flags, *more, cwd=tmp_path, code=code, patch=patch)\
        .stdout.splitlines() + [""] * killed  # fmt: skip
    run = only_run(tmp_path)
    assert killed or f"--resume runs/{run.name}" in line
    assert len(workers.split()) == 2 * (at[1] in ("collect", "evolve"))
    limit = time.time() + 60
    while any(runs(pid) for pid in workers.split()):
        assert time.time() < limit, "worker processes outlive the main process"
        time.sleep(0.01)
    state = checkpoint(run)["at"]
    assert (state["iteration"], script.STAGES[state["stage"]]) == at[:2]
    run_forked("--resume", run, cwd=tmp_path)
    same_runs(whole(*flags), run)


@pytest.mark.slow
def test_workers_can_be_left_at_any_moment(forkserver):
    """Also while they write what nobody reads any more."""
    args = script.parse_args([str(arg) for arg in RUN])
    env = script.make_env(args)
    agent = script.Agent(args, env.observation_space.spaces, env.action_space)

    def late(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    for trial in range(8):
        signal.alarm(60)
        with script.Workers(args, agent) as workers:
            results = workers.results(dict(policy="held", seed=seed, keep=True) for seed in range(99))
            assert [next(results)["total"] for _ in range(2)] == [210, 210]
            time.sleep(trial / 200)
        signal.alarm(0)
        assert all(process.exitcode == 0 for process in workers.processes.values())


def runs(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()  # nor a zombie, whose parent was killed
    except OSError:
        return False


def same_runs(one, two):
    same(checkpoint(one), checkpoint(two))
    assert metrics(one) == metrics(two) and len(metrics(one)) > 50
    files = sorted(path.name for path in (one / "replay").iterdir())
    assert files == sorted(path.name for path in (two / "replay").iterdir())
    for name in files:
        count = checkpoint(one)["count"]
        a, b = (np.load(run / "replay" / name, mmap_mode="r")[:count] for run in (one, two))
        assert np.array_equal(a, b), name


@pytest.mark.slow
def test_what_is_there_is_not_done_again_and_generations_can_be_added(whole, run_forked, tmp_path):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", whole(), run], check=True)
    before, rows = checkpoint(run), len(metrics(run))
    run_forked("--resume", run, cwd=tmp_path)
    same(before, checkpoint(run))
    assert len(metrics(run)) == rows
    run_forked("--resume", run, "--generations", 5, cwd=tmp_path)
    after = checkpoint(run)
    assert after["at"]["done"] == 5 and after["at"]["iteration"] == 1
    assert all(torch.equal(value, after["agent"][key]) for key, value in before["agent"].items() if "encoder" in key)


@pytest.mark.slow
def test_take_cover(run_forked, tmp_path):
    """Collected, dreamt in and evaluated in the real game."""
    pytest.importorskip("vizdoom")
    flags = "--env-id VizdoomTakeCover-v1 --num-envs 2 --shortest 0 --time-limit 100 --dream-length 20"
    run_forked(*flags.split(), *tiny(script), *EVALUATED, cwd=tmp_path)
    values = {key: float(value) for _, key, value in metrics(only_run(tmp_path))[1:]}
    assert 30 < values["eval/episodic_return"] <= 100 and 0 < values["charts/dream_return"] < 25


@pytest.mark.slow
@pytest.mark.parametrize("trouble, words", [("Raise", "the robot fell"), ("Nan", "reward nan"), ("Exit", "died")])
def test_trouble_in_an_environment(trouble, words, run_forked, tmp_path):
    (tmp_path / "go").touch()
    flags = ["--env-id", f"toy_envs:{trouble}Image-v0", *tiny(script)]
    result = run_forked(*flags, cwd=tmp_path, code=2)
    line = [x for x in result.stderr.splitlines() if x.startswith("worldmodels_v1.py: ")][-1]
    assert words in line and "--resume" in line
    (tmp_path / "go").unlink()
    run_forked("--resume", only_run(tmp_path), cwd=tmp_path)
    assert checkpoint(only_run(tmp_path))["at"]["done"] == 3


@pytest.mark.slow
def test_frames_that_are_spent(run_forked, tmp_path):
    """None are left for the controller: a line says so, and more can be given."""
    result = run_forked(*RUN, "--total-timesteps", 1, cwd=tmp_path, code=2)
    assert "--total-timesteps 1" in result.stderr and "--resume" in result.stderr
    run_forked("--resume", only_run(tmp_path), "--total-timesteps", 100_000, cwd=tmp_path)
    assert checkpoint(only_run(tmp_path))["at"]["stage"] == len(script.STAGES) - 1


def test_a_loss_that_is_not_finite(run_forked, tmp_path):
    patch = """
whole = s.Agent.update_vae
def broken(self, image, update):
    if update == 3: next(self.parameters()).data.fill_(float("nan"))
    return whole(self, image, update)
s.Agent.update_vae = broken
"""
    result = run_forked(*RUN, "--save-every", 0, cwd=tmp_path, code=2, patch=patch)
    line = [x for x in result.stderr.splitlines() if x.startswith("worldmodels_v1.py: ")][-1]
    assert "losses/" in line and "train_vae 3" in line
    state = checkpoint(only_run(tmp_path))
    assert state["at"]["done"] == 3 and all(x.isfinite().all() for x in state["agent"].values() if torch.is_tensor(x))


@pytest.mark.parametrize(
    "patch, word",
    [
        ("import collections, shutil\n"
         "shutil.disk_usage = lambda _: collections.namedtuple('Usage', 'free')(10**5)", "GB"),
        ("import os\ndef full(*_): raise OSError(28, 'No space left')\nos.posix_fallocate = full", "No space"),
    ],
)  # fmt: skip
def test_no_room(patch, word, run_forked, tmp_path):
    line = run_forked(*RUN, cwd=tmp_path, code=2, patch=patch).stderr.splitlines()[-1]
    assert line.startswith("worldmodels_v1.py: ") and word in line


@pytest.mark.parametrize(
    "flags, word",
    [
        ("--env-id CartPole-v1 --obs state", "V sees pixels"),
        ("--env-id CartPole-v1 --quick", "--quick"),
        ("--env-id CartPole-v1 --moves", "three discrete actions"),
        ("--env-id VizdoomTakeCover-v1", "pip install vizdoom"),
        ("--env-id toy_envs:BadAction-v0", "MultiDiscrete"),
        ("--env-id toy_envs:NoRender-v0", "render"),
    ],
)
def test_what_cannot_be_is_refused(refused, monkeypatch, tmp_path, flags, word):
    monkeypatch.chdir(tmp_path)
    find = script.importlib.util.find_spec
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None if name == "vizdoom" else find(name))
    assert word in refused(script, *tiny(script), *flags.split())


def test_too_few_steps_for_a_batch(run_forked, tmp_path):
    line = run_forked(*RUN, "--batch-length", 99, cwd=tmp_path, code=2).stderr.splitlines()[-1]
    assert "--batch-length 99" in line


def test_run_directories_that_do_not_fit(whole, refused, tmp_path):
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", whole(), run], check=True)
    for flag in ("--stoch 8", "--iterations 3", "--env-id CartPole-v1", "--sigma 1"):
        assert "cannot change" in refused(script, "--resume", run, *flag.split())
    (run / "replay/reward.npy").unlink()
    assert "lacks ['reward']" in refused(script, "--resume", run)
    args = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(args | dict(stoch=9)))
    assert "of another size" in refused(script, "--evaluate", run)
    (run / "checkpoint.pt").write_bytes(b"")
    for option in ("--resume", "--evaluate", "--play"):
        assert "cannot be read" in refused(script, option, run)


def test_evaluate(whole, run_forked):
    run = whole()
    out = run_script(script, "--evaluate", run, "--eval-episodes", 3, "--capture-video", cwd=run).stdout
    assert "toy_envs:Image-v0: 210.00 ± 0.00 over 3 episodes, 90 % interval of the mean 210.00 to 210.00" in out
    assert (run / "videos/evaluate.mp4").exists()  # 1 + 2 + ... + 20
    run_forked("--play", run, "--capture-video", cwd=run)
    assert (run / "videos/dream.mp4").exists()


def test_the_page(whole):
    with served(script, whole()) as url:

        def ask(path):
            with urllib.request.urlopen(url + path, timeout=20) as reply:
                return reply.read()

        assert b"<title>Dream</title>" in ask("/")
        ask("/reset")
        for key in ("ArrowRight", "x"):
            state = json.loads(ask(f"/step?key={key}"))
            for kind in ("dream", "real"):
                assert Image.open(io.BytesIO(base64.b64decode(state[kind]))).size == (64, 64)
        assert "step 2" in state["text"] and state["keys"] == "ArrowRight"


def test_the_page_in_a_browser(whole, tmp_path):
    with served(script, whole()) as url:
        press_a_key(url, tmp_path)
