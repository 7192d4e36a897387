"""dreamer_v1.py against recorded outputs of the authors' code (tests/golden/dreamer_v1/README.md), and its maths."""

import contextlib
import itertools
import json
import os
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import checkpoint, only_run, run_script, scalars, tiny

import dreamer_v1 as script

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
CASES = sorted(GOLDEN.rglob("golden_v1_*.npz"))
FUNCTIONS = next(iter(sorted(GOLDEN.rglob("golden_functions_v1.npz"))), None)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def close(mine, golden, rtol=1e-4, atol=1e-5):
    mine = mine.detach().cpu().numpy() if isinstance(mine, torch.Tensor) else np.asarray(mine)
    golden = np.asarray(golden)
    assert mine.shape == golden.shape, (mine.shape, golden.shape)
    np.testing.assert_allclose(mine, golden, rtol=rtol, atol=atol * max(1.0, float(np.abs(golden).max())))


@contextlib.contextmanager
def draws(**queues):
    """Puts recorded numbers in the place of random ones: name of PyTorch's function -> tensors in order."""
    queues = {name: list(tensors) for name, tensors in queues.items()}

    def take(name, like):
        assert queues[name], "more was drawn than was recorded"
        assert queues[name][0].shape == like.shape, "another order than was recorded"
        return queues[name].pop(0)

    with pytest.MonkeyPatch.context() as patch:
        for name in queues:
            patch.setattr(torch, name, lambda like, name=name: take(name, like))
        normal = lambda shape, **_: take("randn_like", torch.empty(shape))  # noqa: E731, what Normal calls
        patch.setattr(torch.distributions.normal, "_standard_normal", normal)
        yield
    assert not any(queues.values()), "something that was recorded was not drawn"


def tensor(array):
    return torch.as_tensor(np.asarray(array), device=DEVICE)


def gate_order(array):
    """Blocks along the last axis: update, reset, candidate in Keras; reset, candidate, update here."""
    return np.concatenate(np.roll(np.split(array, 3, -1), -1, 0), -1)


class Case:
    """One recorded model case: an agent with its sizes and weights, and its batch."""

    def __init__(self, path):
        self.golden = golden = np.load(path)
        config = json.loads(str(golden["config_json"]))
        self.args = script.Args(
            compile=False,
            amp=False,
            deter=config["deter_size"],
            hidden=golden["params0/dynamics/img2/bias"].shape[0],
            stoch=config["stoch_size"],
            units=config["num_units"],
            depth=config["cnn_depth"],
            imagination_horizon=config["horizon"],
            tanh_rewards=config["clip_rewards"] == "tanh",
            kl_scale=config["kl_scale"],
            free_nats=config["free_nats"],
            predict_continue=config["pcont"],
            continue_scale=config["pcont_scale"],
            action_noise=config["expl_amount"],
            discount=config["discount"],
            lmbda=config["disclam"],
            model_rate=config["model_lr"],
            actor_rate=config["actor_lr"],
            critic_rate=config["value_lr"],
            epsilon=config["adam_eps"],
            clip=config["grad_clip"],
        )
        spaces = {"image": gym.spaces.Box(0, 255, golden["in/image_uint8"].shape[2:], np.uint8)}
        self.agent = script.Agent(self.args, spaces, gym.spaces.Box(-1, 1, (config["A"],)), DEVICE)
        self.names = self.official_names()
        self.load("params0/")
        self.B, self.T = golden["in/reward_raw"].shape
        self.data = {"image": tensor(golden["in/image_uint8"]), "reward": tensor(golden["in/reward_raw"])}
        self.data |= {"action": tensor(golden["in/action"]), "is_terminal": tensor(golden["in/discount"] == 0)}
        self.data["is_first"] = (torch.arange(self.T, device=DEVICE) == 0).expand(self.B, self.T)

    def official_names(self):
        """Our parameter -> (official name, kind of layout)."""
        names, wm, bh = {}, "world_model", "behaviour"

        def add(ours, theirs, kind="dense"):
            names[f"{ours}.weight"] = f"{theirs}/kernel", kind
            names[f"{ours}.bias"] = f"{theirs}/bias", "same"

        for i in range(4):
            add(f"{wm}.encoder.convs.{i}.0", f"encoder/h{i + 1}", "conv")
            add(f"{wm}.decoder.convs.{i}.0" if i < 3 else f"{wm}.decoder.convs.3", f"decoder/h{i + 2}", "conv")
        add(f"{wm}.decoder.map", "decoder/h1", "dense_feat")
        layers = ("inputs.0.0", "img1"), ("post_in.0.0", "obs1"), ("post_out", "obs2")
        for ours, theirs in (*layers, ("prior_net.0.0", "img2"), ("prior_net.1", "img3")):
            add(f"{wm}.rssm.{ours}", f"dynamics/{theirs}")
        for i, (ours, theirs) in enumerate([("gates", "kernel"), ("recurrent_gates", "recurrent_kernel")]):
            names[f"{wm}.rssm.{ours}.weight"] = f"dynamics/cell/{theirs}", "gates"
            names[f"{wm}.rssm.{ours}.bias"] = "dynamics/cell/bias", i
        heads = [(f"{wm}.reward_head", "reward", 2), (f"{bh}.critic", "value", 3), (f"{bh}.actor.layers", "actor", 4)]
        for ours, theirs, layers in [*heads, (f"{wm}.continue_head", "pcont", 3)]:
            for i in range(layers):
                add(f"{ours}.{i}.0", f"{theirs}/h{i}", "dense" if i else "dense_feat")
            if theirs == "actor":  # one layer in the recording
                for half in range(2):
                    add(f"{bh}.actor.outputs.{half}", f"{theirs}/hout", ("half", half))
                    names[f"{bh}.actor.outputs.{half}.bias"] = f"{theirs}/hout/bias", ("half", half)
            else:
                add(f"{ours}.{layers}", f"{theirs}/hout")
        return names

    def parameter(self, prefix, name):
        """An official array in our layout."""
        theirs, kind = self.names[name]
        array = self.golden[prefix + theirs]
        if isinstance(kind, tuple):  # mean or deviation
            return tensor(np.split(array, 2, -1)[kind[1]].T)
        if isinstance(kind, int):  # biases of the two halves of a gate
            return tensor(gate_order(array[kind]))
        if kind == "conv":
            return tensor(array.transpose(3, 2, 0, 1))
        if kind == "gates":
            array = gate_order(array)
        if kind == "dense_feat":  # features: stoch first there, deter first here
            array = np.concatenate([array[self.args.stoch :], array[: self.args.stoch]])
        return tensor(array) if kind == "same" else tensor(array.T)

    def load(self, prefix):
        used = set()
        with torch.no_grad():
            for name, parameter in self.agent.named_parameters():
                value = self.parameter(prefix, name)
                assert value.shape == parameter.shape, name
                parameter.copy_(value)
                used.add(prefix + self.names[name][0])
        assert used == {key for key in self.golden.files if key.startswith(prefix)}

    def samples(self, *parts, step=1):
        """Draws the noise of a recorded update: of the posterior, of actions and states that are imagined."""
        read = lambda name: tensor(self.golden[f"step{step}/noise/{name}"])  # noqa: E731
        noise = list(read("post").unbind(1)) if "post" in parts else []
        if "imagined" in parts:
            noise += [x for pair in zip(read("imag_action"), read("imag_state"), strict=True) for x in pair]
        return draws(randn_like=noise)

    def feat(self, golden):
        """Recorded features in our order."""
        return np.concatenate([golden[..., self.args.stoch :], golden[..., : self.args.stoch]], -1)

    def moments(self, prefix):
        """Recorded mean and standard deviation of latents."""
        return np.stack([self.golden[f"{prefix}mean"], self.golden[f"{prefix}std"]], -1)


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def case(request):
    return Case(request.param)


def learnt(case):
    """The batch as the losses see it."""
    reward = case.data["reward"]
    return case.data | {"reward": reward.tanh() if case.args.tanh_rewards else reward}


def test_golden_data_is_there():
    assert len(CASES) >= 1 and FUNCTIONS, GOLDEN


def test_parity_world_model(case):
    golden, model, args, data = case.golden, case.agent.world_model, case.args, learnt(case)
    close(data["reward"], golden["in/reward"])
    start = case.agent.start(data)
    embed = model.encoder(data)
    close(embed, golden["step1/wm/embed"])
    with case.samples("post"):
        deter, stoch, post = model.rssm.observe(embed, data["action"], data["is_first"], start)
    prior = model.rssm.prior(deter)
    close(deter, golden["step1/wm/post_deter"])
    close(deter, golden["step1/wm/prior_deter"])
    close(stoch, golden["step1/wm/post_stoch"])
    close(post, case.moments("step1/wm/post_"))
    close(prior, case.moments("step1/wm/prior_"))
    with draws(randn_like=[tensor(golden["step1/noise/prior"])]):
        close(model.rssm.sample(prior), golden["step1/wm/prior_stoch"])
    close(script.kl_gaussian(post, prior), golden["step1/wm/kl"])
    with case.samples("post"):
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
    golden, agent, args, data = case.golden, case.agent, case.args, learnt(case)
    with case.samples("post"):
        losses, deter, stoch, _, _ = agent.world_model.loss(data, agent.start(data))
    scales = {"kl_loss": args.kl_scale, "continue_loss": args.continue_scale}
    close(sum(scales.get(name, 1.0) * loss.mean() for name, loss in losses.items()), golden["step1/loss/model"])
    behaviour, read = agent.behaviour, lambda name: np.moveaxis(golden[f"step1/imag/{name}"], 0, 1)
    with case.samples("imagined"):
        imag_feat, imag_action, reward, cont = behaviour.sequences(agent.world_model, deter, stoch)
    close(imag_feat, case.feat(read("feat")))
    close(imag_action, read("action"))
    close(reward[:, :-1], read("reward"))
    close(cont[:, :-1], read("pcont"))
    value = behaviour.critic(imag_feat).squeeze(-1)
    close(value[:, :-1], read("value"))
    close(value[:, -1], golden["step1/imag/bootstrap"])
    close(script.lambda_return(reward[:, :-1], cont[:, :-1], value[:, 1:], args.lmbda), read("returns"))
    close(torch.cat([torch.ones_like(cont[:, :1]), cont[:, :-2]], 1).cumprod(1), read("weight"))
    with case.samples("imagined"):
        losses, stats = behaviour.loss(agent.world_model, deter, stoch)
    close(losses["actor_loss"].mean(), golden["step1/loss/actor"])
    close(losses["critic_loss"].mean(), golden["step1/loss/value"])
    close(stats["return_mean"], read("returns").mean())


def test_parity_updates(case, monkeypatch):
    """Losses, gradients and parameters of each recorded update; the whole of it as training does it."""
    golden, agent, args = case.golden, case.agent, case.args
    grads, names = {}, {id(p): name for name, p in agent.named_parameters()}
    for optimizer in agent.optimizers.values():

        def step(values, optimizer=optimizer, original=optimizer.step):
            grads.update((names[id(p)], value.clone()) for p, value in zip(optimizer.params, values, strict=True))
            return original(values)

        monkeypatch.setattr(optimizer, "step", step)
    rates = {"world_model.": args.model_rate, "behaviour.actor": args.actor_rate, "behaviour.critic": args.critic_rate}
    scales = {"losses/kl_loss": args.kl_scale, "losses/continue_loss": args.continue_scale}
    steps = sorted({int(key[6]) for key in golden.files if key.startswith("params") and key[6] != "0"})
    assert steps
    before = {name: parameter.detach().clone() for name, parameter in agent.named_parameters()}
    for step in steps:
        with case.samples("post", "imagined", step=step):
            metrics = agent.update(case.data)
        close(metrics["losses/actor_loss"], golden[f"step{step}/loss/actor"], rtol=1e-3)
        close(metrics["losses/critic_loss"], golden[f"step{step}/loss/value"], rtol=1e-3)
        model = [key for key in metrics if key.startswith("losses/") and "actor" not in key and "critic" not in key]
        close(sum(scales.get(key, 1.0) * metrics[key] for key in model), golden[f"step{step}/loss/model"])
        for ours, theirs in (("world_model", "model"), ("actor", "actor"), ("critic", "value")):
            close(metrics[f"stats/{ours}_grad_norm"], golden[f"step{step}/gradnorm/{theirs}"], rtol=1e-3)
        close(metrics["stats/return_mean"], golden[f"step{step}/imag/returns"].mean(), rtol=1e-3)
        if step == 1:
            recorded = {key for key in golden.files if key.startswith("step1/grad/")}
            assert recorded == {f"step1/grad/{case.names[name][0]}" for name in grads}
            for name, grad in grads.items():
                theirs = case.parameter("step1/grad/", name).cpu()
                np.testing.assert_allclose(grad.cpu(), theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
        for name, parameter in agent.named_parameters():
            rate = next(rate for prefix, rate in rates.items() if name.startswith(prefix))
            mine, theirs = parameter - before[name], case.parameter(f"params{step}/", name) - before[name]
            assert (mine - theirs).abs().max() < 0.02 * rate * step + 1e-7 * parameter.abs().max(), name


def test_parity_acting(case):
    golden, agent = case.golden, case.agent
    for mode in ("train", "eval"):
        carry, step = agent.initial(1), 0
        while f"policy_{mode}/{step}/action" in golden:
            read = lambda name: tensor(golden[f"policy_{mode}/{step}/{name}"])  # noqa: B023, E731
            is_first = torch.tensor([step == 0], device=DEVICE)
            obs = {"image": tensor(golden["in/image_uint8"][:1, step]), "is_first": is_first}
            shape = (1, -1) if mode == "train" else (100, 1, agent.action_dim)
            noise = [read("noise_post"), read("noise_action").view(shape)]
            noise += [read("noise_expl").view(shape)] if mode == "train" else []
            with draws(randn_like=noise):
                deter, stoch, action = carry = agent.act(obs, carry, training=mode == "train")
            close(deter, read("post_deter").cpu())
            close(stoch, read("post_stoch").cpu())
            close(action, read("action").cpu())
            step += 1
        assert step > 1


@pytest.fixture(scope="module")
def functions():
    return np.load(FUNCTIONS)


def gradients(value, inputs, upstream=None):
    upstream = torch.ones_like(value) if upstream is None else tensor(upstream)
    return torch.autograd.grad(value, inputs, upstream, retain_graph=True)


def test_parity_lambda_return(functions):
    read = lambda name: np.moveaxis(functions[f"lambda_return/{name}"], 0, -1)  # noqa: E731
    for lmbda in ("0.0", "0.95", "1.0"):
        inputs = [tensor(read(name)).requires_grad_() for name in ("reward", "pcont", "value", "bootstrap")]
        reward, cont, value, bootstrap = inputs
        next_value = torch.cat([value[:, 1:], bootstrap.unsqueeze(1)], 1)
        returns = script.lambda_return(reward, cont, next_value, float(lmbda))
        close(returns, read(f"out_{lmbda}"))
        for grad, name in zip(
            gradients(returns, inputs, read("upstream")), ("reward", "pcont", "value", "bootstrap"), strict=True
        ):
            close(grad, read(f"grad_{name}_{lmbda}"))


def test_parity_latents(functions):
    stats = [tensor(functions[f"kl_normal/{name}"]).requires_grad_() for name in ("mean_p", "std_p", "mean_q", "std_q")]
    kl = script.kl_gaussian(torch.stack(stats[:2], -1), torch.stack(stats[2:], -1))
    close(kl, functions["kl_normal/kl"])
    for grad, name in zip(gradients(kl, stats), ("mean_p", "std_p", "mean_q", "std_q"), strict=True):
        close(grad, functions[f"kl_normal/grad_{name}"])
    x = tensor(functions["act/x"])
    moments = script.gaussian(torch.stack([x, x], -1)).squeeze(-2)
    close(moments, np.stack([functions["act/x"], functions["act/softplus"] + 0.1], -1))
    close(script.normal_loss(x, torch.zeros_like(x)), (functions["act/x"] ** 2 + np.log(2 * np.pi)) / 2)


def an_actor(discrete, units=4):
    return script.Actor(script.Args(units=units), 3, 3, discrete).to(DEVICE)


def tanh_normal(mean, std):
    """A policy over actions (..., A)."""
    return script.Independent(script.TransformedDistribution(script.Normal(mean, std), script.Tanh()), 1)


def test_parity_one_hot_actions(functions):
    actor, logit = an_actor(discrete=True), tensor(functions["onehot/logits"]).requires_grad_()
    policy = script.OneHotCategorical(logits=logit)
    probs, index = policy.probs, tensor(functions["onehot/sample"]).argmax(-1, keepdim=True)
    noise = (probs.cumsum(-1).gather(-1, index) - probs.gather(-1, index) / 2).detach()
    with draws(rand_like=[noise]):
        sample = actor.sample(policy)
    close(sample, functions["onehot/sample"])
    close(gradients(sample, logit, functions["onehot/upstream"])[0], functions["onehot/grad_logits"])
    close(policy.log_prob(sample.detach()), functions["onehot/log_prob"])
    close(actor.mode(policy), functions["onehot/mode"])


def test_parity_tanh_normal(functions):
    read, actor = lambda name: tensor(functions[f"tanh_normal/{name}"]), an_actor(discrete=False)  # noqa: E731
    policy = tanh_normal(read("mean"), read("std"))
    with draws(randn_like=[read("eps")]):
        close(actor.sample(policy), functions["tanh_normal/sample"])
    close(policy.log_prob(read("external_action")), functions["tanh_normal/log_prob_external"], rtol=1e-3)
    one = tanh_normal(read("mean")[:1], read("std")[:1])
    with draws(randn_like=[read("mode_eps")]):
        close(actor.mode(one), functions["tanh_normal/mode_row0"])
    x = tensor(functions["act/x"]).unsqueeze(-1)
    actor.layers, actor.outputs = torch.nn.Identity(), torch.nn.ModuleList([torch.nn.Identity()] * 2)
    normal = actor(x).base_dist.base_dist
    close(normal.loc.squeeze(-1), functions["act/mean5tanh"])
    close(normal.scale.squeeze(-1) - 1e-4, functions["act/softplus_raw5"])


def test_parity_layers(functions):
    kernel = functions["conv/kernel"].transpose(3, 2, 0, 1)
    conv = torch.nn.Conv2d(*kernel.shape[1::-1], 4, 2).to(DEVICE)
    up_kernel = functions["deconv/kernel"].transpose(3, 2, 0, 1)
    up = script.Deconv(*up_kernel.shape[:2], up_kernel.shape[2], 2).to(DEVICE)
    for layer, weight, name in ((conv, kernel, "conv"), (up, up_kernel, "deconv")):
        layer.weight.data, layer.bias.data = tensor(weight), tensor(functions[f"{name}/bias"])
        image = tensor(functions[f"{name}/in"]).permute(0, 3, 1, 2)
        close(layer(image).permute(0, 2, 3, 1), functions[f"{name}/out"])
    layer = script.MLP(2, 2, 1)[0]
    close(layer[1](tensor(functions["act/x"])), functions["act/elu"])


def test_parity_gru(functions):
    read = lambda name: tensor(functions[f"keras_gru/{name}"])  # noqa: E731
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


def test_parity_adam(functions):
    config = json.loads(str(functions["config_json"]))["adam"]
    weight = torch.nn.Parameter(tensor(functions["adam/w0"]))
    optimizer = script.Adam([weight], config["lr"], script.Args(epsilon=config["eps"], clip=config["clip"]))
    for step, grad in enumerate(functions["adam/grads"], 1):
        norm = optimizer.step([tensor(grad)])
        close(norm, functions[f"adam/norm{step}"])
        close(weight, functions[f"adam/w{step}"], rtol=1e-5, atol=1e-6)


# Sizes


def test_parameter_counts():
    """Those of the authors' code, counted by running it."""
    spaces, action = {"image": gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)}, gym.spaces.Box(-1, 1, (6,))
    args = script.Args(**script.PRESETS["dmc"], compile=False)
    size = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    agent = script.Agent(args, spaces, action)
    model, behaviour = agent.world_model, agent.behaviour
    counts = {name: size(getattr(model, name)) for name in ("encoder", "rssm", "decoder", "reward_head")}
    counts |= {"total": size(model), "actor": size(behaviour.actor), "critic": size(behaviour.critic)}
    assert counts == dict(
        encoder=690_144, rssm=557_920, decoder=3_795_555, reward_head=253_201, total=5_296_820, actor=578_412,
        critic=413_601,
    )  # fmt: skip
    args.predict_continue = True
    assert size(script.Agent(args, spaces, action).world_model.continue_head) == 413_601


# Maths


SMALL = dict(
    deter=8, hidden=8, stoch=3, units=8, depth=1, imagination_horizon=4, batch_size=2, batch_length=5, compile=False
) | dict(amp=False)


def small(discrete=False, **options):
    """A small agent that sees vectors, and a batch."""
    torch.manual_seed(0)
    args = script.Args(**SMALL | dict(predict_continue=True, free_nats=0.0) | options)
    space = gym.spaces.Discrete(3) if discrete else gym.spaces.Box(-1, 1, (2,))
    agent = script.Agent(args, {"vector": gym.spaces.Box(-1, 1, (6,))}, space)
    B, T = args.batch_size, args.batch_length
    action = F.one_hot(torch.randint(3, (B, T)), 3).float() if discrete else torch.rand(B, T, 2) * 2 - 1
    data = {"vector": torch.randn(B, T, 6), "action": action, "reward": torch.randn(B, T)}
    data |= {name: torch.zeros(B, T, dtype=torch.bool) for name in script.FLAGS}
    data["is_first"][:, 0] = True
    data["is_terminal"][0, -1] = True
    return agent, data


def reached(loss, module):
    """Whether a loss gives the module's parameters a gradient."""
    grads = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    return any(grad is not None and grad.abs().max() > 0 for grad in grads)


def all_losses(agent, data):
    """Losses of world model and behaviour, by name."""
    losses, deter, stoch, *_ = agent.world_model.loss(data, agent.start(data))
    return losses | agent.behaviour.loss(agent.world_model, deter, stoch)[0]


@pytest.mark.parametrize("source", ["all", "image", "reward"])
def test_who_shapes_the_representation(source):
    agent, data = small(representation_from=source)
    model, losses = agent.world_model, all_losses(agent, data)
    assert reached(losses["recon_loss_vector"].mean(), model.encoder) == (source != "reward")
    assert reached(losses["reward_loss"].mean(), model.encoder) == (source != "image")
    assert reached(losses["continue_loss"].mean(), model.encoder) == (source != "image")
    assert reached(losses["reward_loss"].mean(), model.reward_head) and reached(losses["kl_loss"], model.encoder)
    assert reached(losses["recon_loss_vector"].mean(), model.decoder)


@pytest.mark.parametrize("discrete", [True, False])
def test_the_actor_learns_through_the_dynamics(discrete):
    agent, data = small(discrete)
    model, behaviour, losses = agent.world_model, agent.behaviour, all_losses(agent, data)
    actor, critic = losses["actor_loss"].mean(), losses["critic_loss"].mean()
    assert losses["actor_loss"].shape == losses["critic_loss"].shape == (2 * 4, 3)  # not from a sequence's last state
    assert reached(actor, behaviour.actor) and reached(critic, behaviour.critic)
    assert reached(actor, model.rssm) and reached(actor, model.reward_head) and reached(actor, behaviour.critic)
    assert not reached(actor, model.encoder)  # imagination starts from constants
    assert not reached(critic, behaviour.actor) and not reached(critic, model)


def test_a_discrete_action_has_the_gradient_of_its_probabilities():
    actor = an_actor(discrete=True)
    policy = actor(torch.randn(50, 3, device=DEVICE))
    action = actor.sample(policy)
    assert set(action.detach().cpu().unique().tolist()) == {0.0, 1.0}
    weight = torch.randn_like(action)
    for mine, theirs in zip(
        gradients((action * weight).sum(), list(actor.parameters())),
        gradients((policy.probs * weight).sum(), list(actor.parameters())),
        strict=True,
    ):
        close(mine, theirs.cpu())


def test_only_its_own_optimizer_moves_a_part():
    agent, data = small()
    parts = {"world_model": agent.world_model, "actor": agent.behaviour.actor, "critic": agent.behaviour.critic}
    losses = all_losses(agent, data)
    for trained in ("actor", "critic"):
        before = {name: [p.clone() for p in part.parameters()] for name, part in parts.items()}
        agent.descend({}, **{trained: losses[f"{trained}_loss"].mean()})
        losses = all_losses(agent, data)
        for name, part in parts.items():
            moved = any(not torch.equal(a, b) for a, b in zip(before[name], part.parameters(), strict=True))
            assert moved == (name == trained)


def test_all_gradients_come_before_the_first_step():
    """Unlike later Dreamers: the behaviour learns from the world model as it was when the sequences were encoded."""
    agent, data = small()
    torch.manual_seed(1)
    expected = gradients_by_name(agent, data)
    taken = {}
    for name, optimizer in agent.optimizers.items():
        original = optimizer.step
        optimizer.step = lambda grads, name=name, original=original: (taken.update({name: grads}), original(grads))[1]
    torch.manual_seed(1)
    agent.update(data)
    for name, grads in expected.items():
        for mine, theirs in zip(taken[name], grads, strict=True):
            close(mine, theirs)


def gradients_by_name(agent, data):
    """What each optimizer is to get, each computed alone."""
    losses = all_losses(agent, data)
    scales = {"continue_loss": agent.args.continue_scale}
    model = [name for name in losses if name not in ("actor_loss", "critic_loss")]
    total = sum(scales.get(name, 1.0) * losses[name].mean() for name in model)
    totals = {"world_model": total, "actor": losses["actor_loss"].mean(), "critic": losses["critic_loss"].mean()}
    return {name: gradients(loss, agent.optimizers[name].params) for name, loss in totals.items()}


def test_free_nats_apply_to_the_average():
    """Below them the KL gives no gradient; above them all of it, also that of steps below."""
    agent, data = small()
    for free_nats, some in ((0.0, True), (1e3, False)):
        agent.args.free_nats = free_nats
        loss = all_losses(agent, data)["kl_loss"]
        assert loss.shape == () and reached(loss, agent.world_model.rssm) == some
    assert loss == 1e3


def test_rows_of_a_batch_have_noise_of_their_own():
    agent, data = small()
    data = {key: value[:1].expand(2, *value.shape[1:]) for key, value in data.items()}
    _, deter, stoch, *_ = agent.world_model.loss(data, agent.start(data))
    assert not torch.isclose(stoch[0], stoch[1]).any()
    same = (x[:1, :1].expand(2, 5, -1) for x in (deter, stoch))
    imag_feat, imag_action, *_ = agent.behaviour.sequences(agent.world_model, *same)
    assert imag_feat[..., agent.args.deter :].std(0).min() > 0.01 and imag_action.std(0).min() > 0.01


def test_a_sequence_starts_from_zeros_but_with_its_action():
    agent, data = small()
    rssm = agent.world_model.rssm
    rssm.sample = lambda moments: moments[..., 0]
    embed = agent.world_model.encoder(data)
    inputs = embed, data["action"], data["is_first"]
    whole = rssm.observe(*inputs, rssm.initial(2))
    other = rssm.observe(*inputs, tuple(torch.ones_like(x) for x in rssm.initial(2)))
    assert all(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    changed = rssm.observe(embed, data["action"] + 1, data["is_first"], rssm.initial(2))
    assert not torch.isclose(whole[0][:, 0], changed[0][:, 0]).all()


def test_without_a_critic_returns_are_sums_of_rewards():
    agent, data = small(critic=False)
    _, deter, stoch, *_ = agent.world_model.loss(data, agent.start(data))
    sequences = agent.behaviour.sequences(agent.world_model, deter, stoch)
    agent.behaviour.sequences = lambda *_: sequences
    losses, stats = agent.behaviour.loss(agent.world_model, deter, stoch)
    _, _, reward, cont = sequences
    totals = [torch.zeros(len(reward))]
    for t in reversed(range(reward.shape[1] - 1)):
        totals.append(reward[:, t] + cont[:, t] * totals[-1])
    close(stats["return_mean"], torch.stack(totals[1:]).mean().item())
    assert not reached(losses["actor_loss"].mean(), agent.behaviour.critic)


def test_the_density_of_the_tanh_normal():
    grid = torch.linspace(-1, 1, 40_001, dtype=torch.float64, device=DEVICE)[1:-1]
    for mean, std in ((0.3, 0.5), (-1.0, 0.2), (0.0, 0.8)):
        policy = tanh_normal(*torch.tensor([[mean], [std]], dtype=torch.float64, device=DEVICE))
        density = policy.log_prob(grid.unsqueeze(1)).exp()
        assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-4)
        samples = policy.sample((200_000,))
        assert samples.mean().item() == pytest.approx(torch.trapezoid(density * grid, grid).item(), abs=0.01)


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
    agent, _ = small()
    action = torch.full((20_000, 2), 0.5)
    noisy = agent.explore(action)
    assert noisy.abs().max() <= 1 and (noisy == 1).any()
    inside = agent.explore(torch.zeros(20_000, 2))
    assert inside.std().item() == pytest.approx(0.3, abs=0.01)
    agent, _ = small(discrete=True)
    action = F.one_hot(torch.zeros(30_000, dtype=torch.int64), 3).float()
    for updates, share in ((0, 0.4), (100_000, 0.25), (200_000, 0.1), (10**7, 0.1)):
        agent.optimizers["actor"].updates.fill_(updates)
        explored = agent.explore(action)
        assert torch.equal(explored.sum(-1), torch.ones(30_000))
        assert (explored != action).any(-1).float().mean().item() == pytest.approx(share * 2 / 3, abs=0.02)


@pytest.mark.parametrize("option", [{}, dict(critic=False), dict(predict_continue=False)], ids=str)
@pytest.mark.parametrize("discrete", [True, False])
def test_it_learns(option, discrete):
    agent, data = small(discrete, model_rate=1e-2, **option)
    before = {name: parameter.clone() for name, parameter in agent.named_parameters()}
    metrics = [agent.update(data) for _ in range(30)]
    assert all(value.isfinite() for step in metrics for value in step.values())
    assert metrics[-1]["losses/recon_loss_vector"] < metrics[0]["losses/recon_loss_vector"]
    still = [name for name, parameter in agent.named_parameters() if torch.equal(parameter, before[name])]
    assert not still, still


def test_heads_are_exact_where_networks_are_in_bfloat16():
    agent, data = small(units=64, amp=True)
    feat = torch.randn(2000, 11)
    with agent.autocast():
        values = agent.behaviour.critic(feat), agent.world_model.reward_head(feat)
        policy = agent.behaviour.actor(feat).base_dist.base_dist
        values = *values, policy.loc, policy.scale
    assert all(x.dtype == torch.float32 and len(x[:, 0].unique()) > 1900 for x in values)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in agent.update(data).values())


# Replay and schedule


def test_complete_episodes_are_drawn_uniformly_with_their_last_step(tmp_path):
    dtype = np.dtype([("number", "i8"), *((key, "?") for key in script.FLAGS)])
    replay = script.Replay(f"{tmp_path}/0", dtype, 1, 1000, 5)
    for steps in [6, 5, 3, 20, 9]:  # too short (2), and one that is not complete
        for i in range(steps):
            flags = dict(is_first=i == 0, is_last=i == steps - 1 and steps != 9, is_terminal=False)
            replay.add({"number": replay.count} | {key: np.array([value]) for key, value in flags.items()})
    assert len(replay) == 2 + 16
    data = replay.sample(4000, np.random.default_rng(0), torch.device("cpu"))
    starts = data["number"][:, 0].numpy()
    assert torch.equal(data["number"] - data["number"][:, :1], torch.arange(5).expand(4000, 5))
    assert torch.equal(data["is_first"], (torch.arange(5) == 0).expand(4000, 5))
    assert set(starts) == {0, 1, *range(14, 30)}
    assert np.mean(starts < 14) == pytest.approx(0.5, abs=0.03)


def test_schedule(tmp_path, monkeypatch):
    """Of frames: episodes of 10 steps at action repeat 2, prefill of 90, three updates every 30, resets not counted."""
    events = ""

    def record(letter, name):
        original = getattr(script.Agent, name)

        def call(*args):
            nonlocal events
            events += letter
            return original(*args)

        monkeypatch.setattr(script.Agent, name, call)

    for letter, name in (("r", "random_action"), ("a", "act"), ("u", "update")):
        record(letter, name)
    flags = ["--env-id", "toy_envs:Vector-v0", "--action-repeat", 2, *tiny(script)]
    flags += ["--prefill", 90, "--train-every", 30]
    monkeypatch.setattr(script.Agent, "explore", lambda self, action: action)
    run_script(script, *flags, "--total-timesteps", 200, cwd=tmp_path)
    groups = [(letter, len(list(group))) for letter, group in itertools.groupby(events)]
    # five episodes, of which four are followed by a reset; then train, then act
    prefill, training = [("r", 5 * 10 + 4), ("u", 2)], [("a", 16), ("u", 3), ("a", 16), ("u", 3), ("a", 17), ("u", 3)]
    assert groups == [*prefill, *training, ("a", 5)]
    frames = [frame for frame, _ in scalars(only_run(tmp_path))["charts/episodic_return"]]
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


@pytest.mark.parametrize("flags", [["--batch-length", 30], ["--prefill", 1000]], ids=str)
def test_a_run_without_an_update_says_why(tmp_path, flags):
    flags = ["--env-id", "toy_envs:Vector-v0", "--total-timesteps", 60, *tiny(script), *flags]
    result = run_script(script, *flags, cwd=tmp_path)
    assert "no update: " in result.stdout


def test_presets_count_frames():
    """Prefill and bursts are counted in frames, as by the authors, whatever the action repeat is."""
    for env_id in ("dmc-walker-walk", "atari-pong", "atari100k-pong"):
        args = script.parse_args(["--env-id", env_id])
        assert (args.prefill, args.train_every, args.train_steps, args.pretrain) == (5000, 1000, 100, 100)
    assert args.total_timesteps == 400_000 and args.action_repeat == 4 and args.tanh_rewards and args.predict_continue
