"""dreamer_v1.py against recorded outputs of the authors' code (tests/golden/dreamer_v1/README.md), and its maths."""

import itertools
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import all_losses, calls, checkpoint, only_run, reached, run_script, scalars, small, tiny, train
from recordings import DEVICE, GOLDEN, Recorded, close, draws, gradients, tensor

import dreamer_v1 as script

CASES = sorted(GOLDEN.rglob("golden_v1_*.npz"))
FUNCTIONS = next(GOLDEN.rglob("golden_functions_v1.npz"), None)


def gate_order(array):
    """Blocks along the last axis: update, reset, candidate in Keras; reset, candidate, update here."""
    return np.concatenate(np.roll(np.split(array, 3, -1), -1, 0), -1)


class Case(Recorded):
    """A recorded model, and its batch."""

    parts, critic, returns = {}, "value", "returns"  # as they are called there

    def __init__(self, path):
        self.golden = golden = np.load(path)
        config = json.loads(str(golden["config_json"]))
        names = dict(deter="deter_size", stoch="stoch_size", units="num_units", depth="cnn_depth", discount="discount")
        names |= dict(imagination_horizon="horizon", kl_scale="kl_scale", free_nats="free_nats", lmbda="disclam")
        names |= dict(predict_continue="pcont", continue_scale="pcont_scale", action_noise="expl_amount")
        names |= dict(model_rate="model_lr", actor_rate="actor_lr", critic_rate="value_lr", epsilon="adam_eps")
        sizes = {ours: config[theirs] for ours, theirs in (names | dict(clip="grad_clip")).items()}
        sizes |= dict(
            hidden=golden["params0/dynamics/img2/bias"].shape[0], tanh_rewards=config["clip_rewards"] == "tanh"
        )
        self.args = script.Args(compile=False, amp=False, **sizes)
        spaces = {"image": gym.spaces.Box(0, 255, golden["in/image_uint8"].shape[2:], np.uint8)}
        self.agent = script.Agent(self.args, spaces, gym.spaces.Box(-1, 1, (config["A"],)), DEVICE)
        self.official_names()
        self.load("params0/")
        self.data = {"image": tensor(golden["in/image_uint8"]), "reward": tensor(golden["in/reward_raw"])}
        self.data |= {"action": tensor(golden["in/action"]), "is_terminal": tensor(golden["in/discount"] == 0)}
        B, T = golden["in/reward_raw"].shape
        self.data["is_first"] = (torch.arange(T, device=DEVICE) == 0).expand(B, T)

    def official_names(self):
        """Our parameter -> (official name, kind of layout)."""
        self.names, add, wm, bh = {}, self.add, "world_model", "behaviour"
        for i in range(4):
            add(f"{wm}.encoder.convs.{i}.0", f"encoder/h{i + 1}", "conv")
            add(f"{wm}.decoder.convs.{i}.0" if i < 3 else f"{wm}.decoder.convs.3", f"decoder/h{i + 2}", "conv")
        add(f"{wm}.decoder.map", "decoder/h1", "dense_feat")
        layers = ("inputs.0.0", "img1"), ("post_net.0.0", "obs1"), ("post_net.1", "obs2")
        for ours, theirs in (*layers, ("prior_net.0.0", "img2"), ("prior_net.1", "img3")):
            add(f"{wm}.rssm.{ours}", f"dynamics/{theirs}")
        for i, (ours, theirs) in enumerate([("gates", "kernel"), ("recurrent_gates", "recurrent_kernel")]):
            self.names[f"{wm}.rssm.{ours}.weight"] = f"dynamics/cell/{theirs}", "gates"
            self.names[f"{wm}.rssm.{ours}.bias"] = "dynamics/cell/bias", i
        heads = [(f"{wm}.reward_head", "reward", 2), (f"{bh}.critic", "value", 3), (f"{bh}.actor.layers", "actor", 4)]
        for ours, theirs, layers in [*heads, (f"{wm}.continue_head", "pcont", 3)]:
            for i in range(layers):
                add(f"{ours}.{i}.0", f"{theirs}/h{i}", "dense" if i else "dense_feat")
            if theirs == "actor":  # one layer in the recording
                for half in range(2):
                    add(f"{bh}.actor.outputs.{half}", f"{theirs}/hout", ("half", half))
                    self.names[f"{bh}.actor.outputs.{half}.bias"] = f"{theirs}/hout/bias", ("half", half)
            else:
                add(f"{ours}.{layers}", f"{theirs}/hout")

    def parameter(self, prefix, name):
        """An official array in our layout."""
        theirs, kind = self.names[name]
        array = self.golden[prefix + theirs]
        if isinstance(kind, tuple):  # mean or deviation
            return tensor(np.split(array, 2, -1)[kind[1]].T)
        if isinstance(kind, int):  # biases of the two halves of a gate
            return tensor(gate_order(array[kind]))
        return self.convert(gate_order(array), "dense") if kind == "gates" else self.convert(array, kind)

    def noise(self, step, *parts):
        """What a recorded update drew: noise of the posterior, of actions and states that are imagined."""
        read = lambda name: tensor(self.golden[f"step{step}/noise/{name}"])
        noise = list(read("post").unbind(1)) if "post" in parts else []
        if "imagined" in parts:
            noise += [x for pair in zip(read("imag_action"), read("imag_state"), strict=True) for x in pair]
        return noise

    def samples(self, noise):
        return draws(randn_like=noise)

    def acting(self, mode, step, read):
        """is_first of a recorded step, and what it drew."""
        shape = (1, -1) if mode == "train" else (100, 1, self.agent.action_dim)
        names = ["noise_action", "noise_expl"] if mode == "train" else ["noise_action"]
        noise = [tensor(read(name)).view(shape) for name in names]
        return torch.tensor([step == 0], device=DEVICE), [tensor(read("noise_post")), *noise]

    def stoch(self, golden):
        return golden

    def moments(self, prefix):
        """Recorded mean and standard deviation of latents."""
        return np.stack([self.golden[f"{prefix}mean"], self.golden[f"{prefix}std"]], -1)


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request):
    return Case(request.param)


def test_parity_world_model(case):
    golden, model, args, data = case.golden, case.agent.world_model, case.args, case.learnt()
    close(data["reward"], golden["in/reward"])
    start = case.agent.start(data)
    embed = model.encoder(data)
    close(embed, golden["step1/wm/embed"])
    with case.samples(case.noise(1, "post")):
        deter, stoch, post = model.rssm.observe(embed, data["action"], data["is_first"], start)
    prior = script.gaussian(model.rssm.prior_net(deter))
    close(deter, golden["step1/wm/post_deter"])
    close(deter, golden["step1/wm/prior_deter"])
    close(stoch, golden["step1/wm/post_stoch"])
    close(post, case.moments("step1/wm/post_"))
    close(prior, case.moments("step1/wm/prior_"))
    with draws(randn_like=[tensor(golden["step1/noise/prior"])]):
        close(model.rssm.sample(prior), golden["step1/wm/prior_stoch"])
    close(script.kl_gaussian(post, prior), golden["step1/wm/kl"])
    with case.samples(case.noise(1, "post")):
        losses, *_, feat, stats = model.loss(data, start)
    close(feat, case.feat(golden["step1/wm/feat"]))
    close(stats["kl"], golden["step1/wm/kl_mean"])
    close(losses["kl_loss"], golden["step1/wm/kl_clamped"])
    close(model.decoder(feat)["image"], golden["step1/wm/image_mean"])
    close(losses["recon_loss_image"], -golden["step1/wm/image_logprob"])
    close(model.reward(feat), golden["step1/wm/reward_mean"])
    close(losses["reward_loss"], -golden["step1/wm/reward_logprob"])
    if args.predict_continue:
        close(model.continue_head(feat).squeeze(-1), golden["step1/wm/pcont_logit"])
        close(losses["continue_loss"], -golden["step1/wm/pcont_logprob"])
    expected = {"recon_loss_image", "reward_loss", "kl_loss"} | ({"continue_loss"} if args.predict_continue else set())
    assert set(losses) == expected
    policy = case.agent.behaviour.actor(feat).base_dist.base_dist
    close(policy.loc, golden["step1/wm/actor_normal_mean"])
    close(policy.scale, golden["step1/wm/actor_normal_std"])
    close(case.agent.behaviour.critic(feat).squeeze(-1), golden["step1/wm/value_mean"])


def test_parity_behaviour(case):
    golden, agent, args, data = case.golden, case.agent, case.args, case.learnt()
    with case.samples(case.noise(1, "post")):
        losses, deter, stoch, _, _ = agent.world_model.loss(data, agent.start(data))
    scales = {"kl_loss": args.kl_scale, "continue_loss": args.continue_scale}
    close(sum(scales.get(name, 1.0) * loss.mean() for name, loss in losses.items()), golden["step1/loss/model"])
    behaviour, read = agent.behaviour, lambda name: np.moveaxis(golden[f"step1/imag/{name}"], 0, 1)
    imagine, compute = calls(agent.world_model.rssm, "imagine"), calls(script, "lambda_return")
    with case.samples(case.noise(1, "imagined")), imagine as imagined, compute as computed:
        losses, stats = behaviour.loss(agent.world_model, deter, stoch)
    ((_, (imag_feat, imag_action)),), (((reward, cont, value, _), returns),) = imagined, computed
    close(imag_feat, case.feat(read("feat")))
    close(imag_action, read("action"))
    close(reward[:, :-1], read("reward"))
    close(cont[:, :-1], read("pcont"))
    close(value[:, :-1], read("value"))
    close(value[:, -1], golden["step1/imag/bootstrap"])
    close(returns, read("returns"))
    close(torch.cat([torch.ones_like(cont[:, :1]), cont[:, :-2]], 1).cumprod(1), read("weight"))
    close(losses["actor_loss"].mean(), golden["step1/loss/actor"])
    close(losses["critic_loss"].mean(), golden["step1/loss/value"])
    close(stats["return_mean"], read("returns").mean())


def an_actor(discrete, units=4):
    return script.Actor(script.Args(units=units), 3, 3, discrete).to(DEVICE)


def tanh_normal(mean, std):
    """A policy over actions (..., A)."""
    return script.Independent(script.TransformedDistribution(script.Normal(mean, std), script.Tanh()), 1)


def test_parity_tanh_normal(functions):
    read, actor = lambda name: tensor(functions[f"tanh_normal/{name}"]), an_actor(discrete=False)
    policy = tanh_normal(read("mean"), read("std"))
    with draws(randn_like=[read("eps")]):
        close(policy.rsample(), functions["tanh_normal/sample"])
    close(policy.log_prob(read("external_action")), functions["tanh_normal/log_prob_external"], rtol=1e-3)
    one = tanh_normal(read("mean")[:1], read("std")[:1])
    with draws(randn_like=[read("mode_eps")]):
        close(actor.mode(one), functions["tanh_normal/mode_row0"])
    x = tensor(functions["act/x"]).unsqueeze(-1)
    actor.layers, actor.outputs = torch.nn.Identity(), torch.nn.ModuleList([torch.nn.Identity()] * 2)
    normal = actor(x).base_dist.base_dist
    close(normal.loc.squeeze(-1), functions["act/mean5tanh"])
    close(normal.scale.squeeze(-1) - 1e-4, functions["act/softplus_raw5"])


def test_parity_gru(functions):
    read = lambda name: tensor(functions[f"keras_gru/{name}"])
    x, h = read("x").requires_grad_(), read("h").requires_grad_()
    inp, deter = x.shape[1], h.shape[1]
    rssm = script.RSSM(script.Args(deter=deter, hidden=inp, stoch=inp), 1, 1).to(DEVICE)
    rssm.inputs = torch.nn.Identity()
    layers = {"kernel": rssm.gates, "recurrent_kernel": rssm.recurrent_gates}
    for i, (name, layer) in enumerate(layers.items()):
        layer.weight.data = tensor(gate_order(functions[f"keras_gru/{name}"]).T.copy())
        layer.bias.data = tensor(gate_order(functions["keras_gru/bias"][i]))
    out = rssm.gru(h, x, x[:, :0])
    close(out, functions["keras_gru/out"])
    inputs = [x, h, rssm.gates.weight, rssm.recurrent_gates.weight, rssm.gates.bias, rssm.recurrent_gates.bias]
    grad_x, grad_h, *grads = gradients(out, inputs, functions["keras_gru/upstream"])
    close(grad_x, functions["keras_gru/grad_x"])
    close(grad_h, functions["keras_gru/grad_h"])
    for grad, name in zip(grads, layers, strict=False):
        close(grad.T, gate_order(functions[f"keras_gru/grad_{name}"]))
    close(torch.stack(grads[2:]), gate_order(functions["keras_gru/grad_bias"]))


# Maths


@pytest.mark.parametrize("discrete", [True, False])
def test_the_actor_learns_through_the_dynamics(discrete):
    agent, data = small(script, discrete)
    model, behaviour, (losses, _) = agent.world_model, agent.behaviour, all_losses(script, agent, data)
    actor, critic = losses["actor_loss"].mean(), losses["critic_loss"].mean()
    assert losses["actor_loss"].shape == losses["critic_loss"].shape == (2 * 4, 3)  # not from a sequence's last state
    assert reached(actor, behaviour.actor) and reached(critic, behaviour.critic)
    assert reached(actor, model.rssm) and reached(actor, model.reward_head) and reached(actor, behaviour.critic)
    assert not reached(actor, model.encoder)  # imagination starts from constants
    assert not reached(critic, behaviour.actor) and not reached(critic, model)


def test_a_discrete_action_has_the_gradient_of_its_probabilities():
    actor = an_actor(discrete=True)
    feat = torch.randn(50, 3, device=DEVICE)
    action = actor.sample(feat)
    assert set(action.detach().cpu().unique().tolist()) == {0.0, 1.0}
    weight = torch.randn_like(action)
    for mine, theirs in zip(
        gradients((action * weight).sum(), list(actor.parameters())),
        gradients((actor(feat).probs * weight).sum(), list(actor.parameters())),
        strict=True,
    ):
        close(mine, theirs.cpu())


def test_all_gradients_come_before_the_first_step():
    """Unlike later Dreamers: the behaviour learns from the world model as it was when the sequences were encoded."""
    agent, data = small(script)
    torch.manual_seed(1)
    losses, _ = all_losses(script, agent, data)
    model = [name for name in losses if name not in ("actor_loss", "critic_loss")]
    total = sum({"continue_loss": agent.args.continue_scale}.get(name, 1.0) * losses[name].mean() for name in model)
    totals = {"world_model": total, "actor": losses["actor_loss"].mean(), "critic": losses["critic_loss"].mean()}
    expected, taken = {name: gradients(loss, agent.optimizers[name].params) for name, loss in totals.items()}, {}
    for name, optimizer in agent.optimizers.items():
        original = optimizer.step
        optimizer.step = lambda grads, name=name, original=original: (taken.update({name: grads}), original(grads))[1]
    torch.manual_seed(1)
    agent.update(data)
    for name, grads in expected.items():
        for mine, theirs in zip(taken[name], grads, strict=True):
            close(mine, theirs)


def test_free_nats_apply_to_the_average():
    """Below them the KL gives no gradient; above them all of it, also that of steps below."""
    agent, data = small(script)
    for free_nats, some in ((0.0, True), (1e3, False)):
        agent.args.free_nats = free_nats
        loss = all_losses(script, agent, data)[0]["kl_loss"]
        assert loss.shape == () and reached(loss, agent.world_model.rssm) == some
    assert loss == 1e3


def test_rows_of_a_batch_have_noise_of_their_own():
    agent, data = small(script)
    data = {key: value[:1].expand(2, *value.shape[1:]) for key, value in data.items()}
    _, deter, stoch, *_ = agent.world_model.loss(data, agent.start(data))
    assert not torch.isclose(stoch[0], stoch[1]).any()
    with calls(agent.world_model.rssm, "imagine") as imagined:
        agent.behaviour.loss(agent.world_model, *(x[:1, :1].expand(2, 5, -1) for x in (deter, stoch)))
    ((_, (imag_feat, imag_action)),) = imagined
    assert imag_feat[..., agent.args.deter :].std(0).min() > 0.01 and imag_action.std(0).min() > 0.01


def test_a_sequence_starts_from_zeros_but_with_its_action():
    agent, data = small(script)
    rssm = agent.world_model.rssm
    rssm.sample = lambda moments: moments[..., 0]
    embed = agent.world_model.encoder(data)
    inputs = embed, data["action"], data["is_first"]
    whole = rssm.observe(*inputs, rssm.initial(2))
    other = rssm.observe(*inputs, tuple(torch.ones_like(x) for x in rssm.initial(2)))
    assert all(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    changed = rssm.observe(embed, data["action"] + 1, data["is_first"], rssm.initial(2))
    assert not torch.isclose(whole[0][:, 0], changed[0][:, 0]).all()


def test_the_mode_of_each_environment_is_its_own():
    actor = an_actor(discrete=False)
    policy = torch.tensor([[2.0, -2.0, 0.0], [-2.0, 2.0, 0.0]], device=DEVICE), torch.full((2, 3), 0.1, device=DEVICE)
    noise = torch.randn(100, 2, 3, device=DEVICE)
    with draws(randn_like=[noise]):
        mode = actor.mode(tanh_normal(*policy))
    for env in range(2):
        one = tanh_normal(*(p[env : env + 1] for p in policy))
        with draws(randn_like=[noise[:, env : env + 1]]):
            samples = one.rsample((100,))
        close(mode[env], samples[one.log_prob(samples).argmax(0)].flatten().cpu())


def test_exploration():
    agent, _ = small(script)
    action = torch.full((20_000, 2), 0.5)
    noisy = agent.explore(action)
    assert noisy.abs().max() <= 1 and (noisy == 1).any()
    inside = agent.explore(torch.zeros(20_000, 2))
    assert inside.std().item() == pytest.approx(0.3, abs=0.01)
    agent, _ = small(script, discrete=True)
    action = F.one_hot(torch.zeros(30_000, dtype=torch.int64), 3).float()
    for updates, share in ((0, 0.4), (100_000, 0.25), (200_000, 0.1), (10**7, 0.1)):
        agent.optimizers["actor"].updates.fill_(updates)
        explored = agent.explore(action)
        assert torch.equal(explored.sum(-1), torch.ones(30_000))
        assert (explored != action).any(-1).float().mean().item() == pytest.approx(share * 2 / 3, abs=0.02)


def test_heads_are_exact_where_networks_are_in_bfloat16():
    agent, data = small(script, units=64, amp=True)
    feat = torch.randn(2000, 11)
    with agent.autocast():
        values = agent.behaviour.critic(feat), agent.world_model.reward_head(feat)
        policy = agent.behaviour.actor(feat).base_dist.base_dist
        values = *values, policy.loc, policy.scale
    assert all(x.dtype == torch.float32 and len(x[:, 0].unique()) > 1900 for x in values)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in agent.update(data).values())


# Replay and schedule


def test_schedule(tmp_path, monkeypatch, events):
    """Of frames: episodes of 10 steps at action repeat 2, prefill of 90, three updates every 30, resets not counted."""
    monkeypatch.setattr(script.Agent, "explore", lambda self, action: action)
    flags = "--env-id toy_envs:Vector-v0 --action-repeat 2 --prefill 90 --train-every 30".split()
    seen = events(script)
    run = train(script, tmp_path, *flags, frames=200)
    groups = [(letter, len(list(group))) for letter, group in itertools.groupby("".join(seen).replace("f", "a"))]
    # five episodes, of which four are followed by a reset; then train, then act
    prefill, training = [("r", 5 * 10 + 4), ("u", 2)], [("a", 16), ("u", 3), ("a", 16), ("u", 3), ("a", 17), ("u", 3)]
    assert groups == [*prefill, *training, ("a", 5)]
    frames = [frame for frame, _ in scalars(run)["charts/episodic_return"]]
    assert frames == list(range(20, 201, 20))


def test_a_stop_in_a_burst_of_updates(tmp_path):
    """A signal does not wait for the burst's end, and --resume goes on with its rest."""
    flags = ["--env-id", "toy_envs:Vector-v0", "--total-timesteps", 100, *tiny(script), "--train-every", 20]
    patch = """
import os, signal
whole, calls = s.Agent.update, []
def stopping(self, *args):
    calls.append(1)
    if len(calls) == 15:
        os.kill(os.getpid(), signal.SIGTERM)
    return whole(self, *args)
s.Agent.update = stopping
"""
    run_script(script, *flags, "--train-steps", 9, cwd=tmp_path, patch=patch, code=128 + 15)
    run = only_run(tmp_path)
    _, updates, budget, _ = checkpoint(run)["progress"]
    assert (updates, budget) == (15, 5)  # of 2 at frame 20, 9 at 40, 9 at 60
    run_script(script, "--resume", run, cwd=tmp_path)
    assert checkpoint(run)["progress"][:3] == (100, 2 + 3 * 9, 0)


def test_presets_count_frames():
    """Prefill and bursts are counted in frames, as by the authors, whatever the action repeat is."""
    for env_id in ("dmc-walker-walk", "atari-pong", "atari100k-pong"):
        args = script.parse_args(["--env-id", env_id])
        assert (args.prefill, args.train_every, args.train_steps, args.pretrain) == (5000, 1000, 100, 100)
    assert args.total_timesteps == 400_000 and args.action_repeat == 4 and args.tanh_rewards and args.predict_continue
