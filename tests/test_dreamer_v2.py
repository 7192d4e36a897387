"""dreamer_v2.py against recorded outputs of the authors' code (tests/golden/dreamer_v2/README.md), and its maths."""

import contextlib
import json
import os
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dreamer_v2 as script

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
CASES = sorted(GOLDEN.rglob("golden_v2_*.npz"))
FUNCTIONS = next(iter(sorted(GOLDEN.rglob("golden_functions_v2.npz"))), None)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def close(mine, golden, rtol=1e-4, atol=1e-5):
    mine = mine.detach().cpu().numpy() if isinstance(mine, torch.Tensor) else np.asarray(mine)
    golden = np.asarray(golden)
    assert mine.shape == golden.shape, (mine.shape, golden.shape)
    np.testing.assert_allclose(mine, golden, rtol=rtol, atol=atol * max(1.0, float(np.abs(golden).max())))


def tensor(array):
    return torch.as_tensor(np.asarray(array), device=DEVICE)


class Case:
    """One recorded model case: an agent with its sizes and weights, and its batch."""

    def __init__(self, path):
        self.golden = golden = np.load(path)
        config = json.loads(str(golden["config_json"]))
        official = config["official"]
        self.gaussian = not config["classes"]
        self.args = script.Args(
            compile=False,
            amp=False,
            deter=config["deter"],
            hidden=config["hidden"],
            stoch=config["stoch"],
            classes=config["classes"] or 1,
            units=config["units"],
            depth=config["depth"],
            imagination_horizon=config["horizon"],
            tanh_rewards=official["clip_rewards"] == "tanh",
            kl_scale=official["loss_scales.kl"],
            kl_balance=official["kl.balance"],
            free_nats=official["kl.free"],
            predict_continue=official["pred_discount"],
            continue_scale=official["loss_scales.discount"],
            actor_gradient=official["actor_grad"],
            actor_gradient_mix=float(official["actor_grad_mix"]),
            slow_critic_every=config["slow_every"],
            entropy_scale=float(official["actor_ent"]),
            discount=official["discount"],
            lmbda=official["discount_lambda"],
            model_rate=official["model_opt.lr"],
            actor_rate=official["actor_opt.lr"],
            critic_rate=official["critic_opt.lr"],
            epsilon=official["model_opt.eps"],
            weight_decay=official["model_opt.wd"],
            clip=official["model_opt.clip"],
        )
        self.discrete, self.actions = config["discrete_actions"], config["A"]
        space = gym.spaces.Discrete(self.actions) if self.discrete else gym.spaces.Box(-1, 1, (self.actions,))
        spaces = {"image": gym.spaces.Box(0, 255, golden["in/image_uint8"].shape[2:], np.uint8)}
        self.agent = script.Agent(self.args, spaces, space, DEVICE)
        self.names = self.official_names()
        self.load("params0/")
        self.data = {"image": tensor(golden["in/image_uint8"]), "reward": tensor(golden["in/reward_raw"])}
        self.data |= {key: tensor(golden[f"in/{key}"]) for key in ("action", "is_first", "is_terminal")}
        self.B, self.T = golden["in/reward_raw"].shape

    def official_names(self):
        """Our parameter -> (official name, kind of layout)."""
        names, wm, bh = {}, "world_model", "behaviour"

        def add(ours, theirs, kind="dense"):
            names[f"{ours}.weight"] = f"{theirs}/kernel", kind
            names[f"{ours}.bias"] = f"{theirs}/bias", "same"

        for i in range(4):
            add(f"{wm}.encoder.convs.{i}.0", f"encoder/conv{i}", "conv")
            add(f"{wm}.decoder.convs.{i}.0" if i < 3 else f"{wm}.decoder.convs.3", f"decoder/conv{i}", "conv")
        add(f"{wm}.decoder.map", "decoder/convin", "dense_feat")
        layers = ("inputs.0.0", "img_in"), ("gates", "cell/dense"), ("post_in.0.0", "obs_out"), ("post_out", "obs_dist")
        for ours, theirs in (*layers, ("prior_net.0.0", "img_out_0"), ("prior_net.1", "img_dist_0")):
            add(f"{wm}.rssm.{ours}", f"rssm/{theirs}")
        names[f"{wm}.rssm.gates_norm.weight"] = "rssm/cell/norm/gamma", "same"
        names[f"{wm}.rssm.gates_norm.bias"] = "rssm/cell/norm/beta", "same"
        heads = [(f"{wm}.reward_head", "reward"), (f"{wm}.continue_head", "discount")]
        heads += [(f"{bh}.critic", "critic"), (f"{bh}.slow_critic", "target_critic"), (f"{bh}.actor.layers", "actor")]
        for ours, theirs in heads:
            for i in range(4):
                add(f"{ours}.{i}.0", f"{theirs}/dense{i}", "dense" if i else "dense_feat")
            if theirs != "actor":
                add(f"{ours}.4", f"{theirs}/out")
        for i, output in enumerate(["out"] if self.discrete else ["out", "out_std"]):
            add(f"{bh}.actor.outputs.{i}", f"actor/{output}")
        return names

    def parameter(self, prefix, name):
        """An official array in our layout."""
        theirs, kind = self.names[name]
        array = self.golden[prefix + theirs]
        if kind == "conv":
            return tensor(array.transpose(3, 2, 0, 1))
        if kind == "dense_feat":  # features: stoch first there, deter first here
            size = self.args.stoch * self.args.classes
            array = np.concatenate([array[size:], array[:size]])
        return tensor(array.T) if kind.startswith("dense") else tensor(array)

    def load(self, prefix):
        used = set()
        with torch.no_grad():
            for name, parameter in self.agent.named_parameters():
                value = self.parameter(prefix, name)
                assert value.shape == parameter.shape, name
                parameter.copy_(value)
                used.add(prefix + self.names[name][0])
        assert used == {key for key in self.golden.files if key.startswith(prefix)}

    def recorded(self, step, *parts):
        """Recorded random numbers of an update, in the order in which they are drawn."""
        read = lambda name: tensor(self.golden[f"step{step}/noise/{name}"])  # noqa: E731
        queue = list(read("post").unbind(1)) if "post" in parts else []
        if "imagined" in parts:
            actions = read("imag_action" if self.discrete else "imag_action_u")
            queue += [x for pair in zip(actions, read("imag_state"), strict=True) for x in pair]
            queue.append(actions[0])  # the last one does not matter
        return queue

    @contextlib.contextmanager
    def samples(self, queue):
        """Puts recorded numbers in the place of random ones: one by one, and nothing but them."""

        def take(like):
            assert queue, "more samples than were recorded"
            assert queue[0].shape == like.shape, "another order than was recorded"
            return queue.pop(0)

        def onehot(probs):
            return F.one_hot(take(probs).argmax(-1), probs.shape[-1]).float() + (probs - probs.detach())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(script, "sample_onehot", onehot)
            patch.setattr(torch, "randn_like", lambda like: take(like[..., 0]).unsqueeze(-1))
            patch.setattr(torch, "rand_like", take)
            yield
        assert not queue, f"{len(queue)} recorded samples are left"

    def feat(self, golden):
        """Recorded features in our order."""
        size = self.args.stoch * self.args.classes
        return np.concatenate([golden[..., size:], golden[..., :size]], -1)

    def stats(self, prefix):
        """Recorded distribution of latents: logits, or mean and standard deviation."""
        golden = self.golden
        if self.gaussian:
            return np.stack([golden[f"{prefix}mean"], golden[f"{prefix}std"]], -1)
        return golden[f"{prefix}logit"]

    def stoch(self, array):
        return array[..., None] if self.gaussian else array


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
    with case.samples(case.recorded(1, "post")):
        deter, stoch, post = model.rssm.observe(embed, data["action"], data["is_first"], start)
    prior = model.rssm.prior(deter)
    close(deter, golden["step1/wm/post_deter"])
    close(deter, golden["step1/wm/prior_deter"])
    close(stoch, case.stoch(golden["step1/wm/post_stoch"]))
    close(post, case.stats("step1/wm/post_"))
    close(prior, case.stats("step1/wm/prior_"))
    with case.samples([tensor(golden["step1/noise/prior"])]):
        close(model.rssm.sample(prior), case.stoch(golden["step1/wm/prior_stoch"]))
    close(model.rssm.kl(post, prior), golden["step1/wm/kl"])
    close(script.balance_kl(model.rssm.kl, post, prior, args.kl_balance, args.free_nats), golden["step1/wm/kl_loss"])
    with case.samples(case.recorded(1, "post")):
        losses, *_, feat, stats = model.loss(data, start)
    close(feat, case.feat(golden["step1/wm/feat"]))
    close(stats["kl"], golden["step1/wm/kl"].mean())
    close(model.decoder(feat)["image"], golden["step1/wm/image_mean"])
    close(losses["recon_loss_image"], -golden["step1/wm/image_logprob"])
    close(model.reward(feat), golden["step1/wm/reward_mean"])
    close(losses["reward_loss"], -golden["step1/wm/reward_logprob"])
    parts = {"recon_loss_image": "image_loss", "reward_loss": "reward_loss", "kl_loss": "kl_loss"}
    if args.predict_continue:
        close(model.continue_head(feat).squeeze(-1), golden["step1/wm/discount_logit"])
        close(losses["continue_loss"], -golden["step1/wm/discount_logprob"])
        parts["continue_loss"] = "discount_loss"
    assert set(losses) == set(parts)
    for ours, theirs in parts.items():
        close(losses[ours].mean(), golden[f"step1/loss_part/{theirs}"])
    behaviour = case.agent.behaviour
    policy = behaviour.actor(feat)
    if case.discrete:
        close(policy.logits, tensor(golden["step1/wm/actor_logits"]).log_softmax(-1).cpu())
    else:
        close(policy.mode, golden["step1/wm/actor_loc"])
        close(policy.base_dist.scale, golden["step1/wm/actor_scale"])
    close(behaviour.critic(feat).squeeze(-1), golden["step1/wm/critic_mean"])
    close(behaviour.slow_critic(feat).squeeze(-1), golden["step1/wm/target_critic_mean"])


def test_parity_behaviour(case):
    golden, agent, args, data = case.golden, case.agent, case.args, learnt(case)
    with case.samples(case.recorded(1, "post")):
        losses, deter, stoch, feat, _ = agent.world_model.loss(data, agent.start(data))
    scales = {"kl_loss": args.kl_scale, "continue_loss": args.continue_scale}
    total = sum(scales.get(name, 1.0) * loss.mean() for name, loss in losses.items())
    close(total, golden["step1/loss/model"])
    agent.descend({}, world_model=total)
    behaviour, read = agent.behaviour, lambda name: np.moveaxis(golden[f"step1/imag/{name}"], 0, 1)
    with torch.no_grad():
        with case.samples(case.recorded(1, "imagined")):
            imag_feat, imag_action, reward, cont = behaviour.sequences(agent.world_model, data, deter, stoch, feat)
        close(imag_feat, case.feat(read("feat")))
        close(imag_action[:, :-1], read("action")[:, 1:])  # ours: taken at a state, theirs: that led to it
        close(reward[:, :-1], read("lr_reward"))
        close(cont, read("discount"))
        value = behaviour.slow_critic(imag_feat).squeeze(-1)
        close(value[:, :-1], read("lr_value"))
        close(value[:, -1], golden["step1/imag/bootstrap"])
        returns = script.lambda_return(reward[:, :-1], cont[:, :-1], value[:, 1:], args.lmbda)
        close(returns, read("target"))
        close(torch.cat([torch.ones_like(cont[:, :1]), cont[:, :-1]], 1).cumprod(1), read("weight"))
        close(value[:, :-2], read("baseline"))
        policy = behaviour.actor(imag_feat[:, :-2])
        if case.discrete:
            close(policy.logits, tensor(read("policy_logits")).log_softmax(-1).cpu())
        else:
            close(policy.mode, read("policy_loc"))
            close(policy.base_dist.scale, read("policy_scale"))
        close(policy.entropy(), read("entropy"))
        close(policy.log_prob(imag_action[:, :-2]), read("logprob"), atol=1e-4)
    with case.samples(case.recorded(1, "imagined")):
        losses, stats = behaviour.loss(agent.world_model, data, deter, stoch, feat)
    close(losses["actor_loss"].mean(), golden["step1/loss/actor"])
    close(losses["critic_loss"].mean(), golden["step1/loss/critic"])
    close(stats["return_mean"], read("target").mean())


def test_parity_updates(case, monkeypatch):
    """Losses, gradients and parameters of each recorded update; the whole of it as training does it."""
    golden, agent = case.golden, case.agent
    grads, names = {}, {id(p): name for name, p in agent.named_parameters()}
    for optimizer in agent.optimizers.values():

        def step(values, optimizer=optimizer, original=optimizer.step):
            grads.update((names[id(p)], value.clone()) for p, value in zip(optimizer.params, values, strict=True))
            return original(values)

        monkeypatch.setattr(optimizer, "step", step)
    rates = {"world_model.": case.args.model_rate, "behaviour.actor": case.args.actor_rate}
    rates |= {"behaviour.critic": case.args.critic_rate, "behaviour.slow": case.args.critic_rate}
    steps = sorted({int(key[6]) for key in golden.files if key.startswith("params") and key[6] != "0"})
    assert steps
    before = {name: parameter.detach().clone() for name, parameter in agent.named_parameters()}
    for step in steps:
        with case.samples(case.recorded(step, "post", "imagined")):
            metrics = agent.update(case.data)
        parts = {"recon_loss_image": "image_loss", "reward_loss": "reward_loss", "kl_loss": "kl_loss"}
        for ours, theirs in (parts | {"continue_loss": "discount_loss"}).items():
            if f"step{step}/loss_part/{theirs}" in golden:
                close(metrics[f"losses/{ours}"], golden[f"step{step}/loss_part/{theirs}"])
        for ours, theirs in (("world_model", "model"), ("actor", "actor"), ("critic", "critic")):
            close(metrics[f"stats/{ours}_grad_norm"], golden[f"step{step}/gradnorm/{theirs}"], rtol=1e-3)
            if ours != "world_model" and f"step{step}/loss/{theirs}" in golden:
                close(metrics[f"losses/{ours}_loss"], golden[f"step{step}/loss/{theirs}"], rtol=1e-3)
        if f"step{step}/imag/target" in golden:
            close(metrics["stats/return_mean"], golden[f"step{step}/imag/target"].mean(), rtol=1e-3)
        if step == 1:
            recorded = [key for key in golden.files if key.startswith("step1/grad/")]
            assert len(recorded) == len(grads)
            for name, grad in grads.items():
                theirs = case.parameter("step1/grad/", name).cpu()
                np.testing.assert_allclose(grad.cpu(), theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
        for name, parameter in agent.named_parameters():
            rate = next(rate for prefix, rate in rates.items() if name.startswith(prefix))
            mine, theirs = parameter - before[name], case.parameter(f"params{step}/", name) - before[name]
            slow = name.startswith("behaviour.slow")
            assert (mine - theirs).abs().max() < 0.02 * rate * step + 1e-7 * parameter.abs().max() + (
                1e-6 if slow else 0
            )


def test_parity_acting(case):
    golden, agent = case.golden, case.agent
    for mode in ("train", "eval"):
        carry, step = agent.initial(len(golden[f"policy_{mode}/0/is_first"])), 0
        while f"policy_{mode}/{step}/action" in golden:
            read = lambda name: golden[f"policy_{mode}/{step}/{name}"]  # noqa: B023, E731
            count = len(read("is_first"))
            obs = {"image": tensor(golden["in/image_uint8"][:count, step]), "is_first": tensor(read("is_first"))}
            action = "noise_action" if case.discrete else "noise_action_u"
            names = ["noise_post", action] if mode == "train" else ["noise_post"]
            with case.samples([tensor(read(name)) for name in names]):
                deter, stoch, action = carry = agent.act(obs, carry, training=mode == "train")
            close(deter, read("post_deter"))
            close(stoch, case.stoch(read("post_stoch")))
            close(action, read("action"))
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


def test_parity_kl(functions):
    read = lambda name: tensor(functions[name])  # noqa: E731
    stats = [read(f"kl_normal/{name}").requires_grad_() for name in ("mean_p", "std_p", "mean_q", "std_q")]
    kl = script.kl_gaussian(torch.stack(stats[:2], -1), torch.stack(stats[2:], -1))
    close(kl, functions["kl_normal/kl"])
    for grad, name in zip(gradients(kl, stats), ("mean_p", "std_p", "mean_q", "std_q"), strict=True):
        close(grad, functions[f"kl_normal/grad_{name}"])
    close(script.kl_divergence(read("kl_onehot/logits_p"), read("kl_onehot/logits_q")), functions["kl_onehot/kl"])
    post, prior = (read(f"kl_balance/{name}_logit").requires_grad_() for name in ("post", "prior"))
    checked = 0
    for key in sorted(key for key in functions.files if key.endswith("free_freeavg_forward_balance")):
        free, average, forward, balance = functions[key]
        if forward or not average:  # options that no preset uses
            continue
        loss, case = (
            script.balance_kl(script.kl_divergence, post, prior, float(balance), float(free)),
            key.rpartition("/")[0],
        )
        close(loss, functions[f"{case}/loss"])
        for grad, name in zip(gradients(loss, (post, prior)), ("post", "prior"), strict=True):
            close(grad, functions[f"{case}/grad_{name}"])
        checked += 1
    assert checked


def test_parity_latents(functions, monkeypatch):
    logit = tensor(functions["onehot/logits"]).requires_grad_()
    index = tensor(functions["onehot/sample"]).argmax(-1, keepdim=True)
    probs = logit.softmax(-1)
    noise = (probs.cumsum(-1).gather(-1, index) - probs.gather(-1, index) / 2).detach()
    monkeypatch.setattr(torch, "rand_like", lambda _: noise)
    sample = script.sample_onehot(probs)
    close(sample, functions["onehot/sample"])
    close(gradients(sample, logit, functions["onehot/upstream"])[0], functions["onehot/grad_logits"])
    policy = script.OneHotCategorical(logits=logit)
    close(policy.log_prob(sample.detach()), functions["onehot/log_prob"])
    close(policy.entropy(), functions["onehot/entropy"])
    close(policy.mode, functions["onehot/mode"])
    x = tensor(functions["act/x"])
    close(
        script.gaussian(torch.stack([x, x], -1))[..., 0, :].T,
        np.stack([functions["act/x"], functions["act/sigmoid2"] + 0.1]),
    )


def truncated_normal(loc, scale):
    """A policy over actions (..., A)."""
    script.Distribution.set_default_validate_args(False)  # as the actor does
    return script.Independent(script.TruncatedNormal(loc, scale), 1)


def test_parity_truncated_normal(functions, monkeypatch):
    read = lambda name: tensor(functions[f"trunc_normal/{name}"])  # noqa: E731
    parameters = read("loc").requires_grad_(), read("scale").requires_grad_()
    policy = truncated_normal(*parameters)
    monkeypatch.setattr(torch, "rand_like", lambda _: read("sample_cdf_u"))
    sample = policy.rsample()
    close(sample, functions["trunc_normal/sample"], atol=3e-5)
    values = dict(sample=sample, logprob=policy.log_prob(read("x")), entropy=policy.entropy())
    close(values["logprob"], functions["trunc_normal/log_prob"])
    close(values["entropy"], functions["trunc_normal/entropy"])
    close(policy.mode, functions["trunc_normal/mode"])
    for name, value in values.items():
        grads = gradients(value, parameters, functions["trunc_normal/upstream"] if name == "sample" else None)
        for grad, parameter in zip(grads, ("loc", "scale"), strict=True):
            close(grad, functions[f"trunc_normal/grad_{parameter}_{name}"], rtol=1e-3, atol=1e-4)


def test_parity_layers(functions):
    kernel = functions["conv/kernel"].transpose(3, 2, 0, 1)
    conv = torch.nn.Conv2d(*kernel.shape[1::-1], 4, 2).to(DEVICE)
    up_kernel = functions["deconv/kernel"].transpose(3, 2, 0, 1)
    up = script.Deconv(*up_kernel.shape[:2], up_kernel.shape[2], 2).to(DEVICE)
    for layer, weight, name in ((conv, kernel, "conv"), (up, up_kernel, "deconv")):
        layer.weight.data, layer.bias.data = tensor(weight), tensor(functions[f"{name}/bias"])
        image = tensor(functions[f"{name}/in"]).permute(0, 3, 1, 2)
        close(layer(image).permute(0, 2, 3, 1), functions[f"{name}/out"])
    layer = script.MLP(2, 2, 1)
    close(layer[0][1](tensor(functions["act/x"])), functions["act/elu"])
    logit, target = tensor(functions["act/x"]), None
    close(logit.sigmoid(), functions["bernoulli/mean"])
    assert target is None


def test_parity_gru(functions):
    read = lambda name: tensor(functions[f"ln_gru/{name}"])  # noqa: E731
    x, h = read("x").requires_grad_(), read("h").requires_grad_()
    inp, deter = x.shape[1], h.shape[1]
    args = script.Args(deter=deter, hidden=inp, stoch=1, classes=inp)
    rssm = script.RSSM(args, 1, 1).to(DEVICE)
    rssm.inputs = torch.nn.Identity()
    rssm.gates.weight.data, rssm.gates.bias.data = read("dense/kernel").T.contiguous(), read("dense/bias")
    rssm.gates_norm.weight.data, rssm.gates_norm.bias.data = read("norm/gamma"), read("norm/beta")
    out = rssm.gru(h, x.unsqueeze(1), x[:, :0])
    close(out, functions["ln_gru/out"])
    inputs = {"x": x, "h": h, "dense/kernel": rssm.gates.weight, "dense/bias": rssm.gates.bias}
    inputs |= {"norm/gamma": rssm.gates_norm.weight, "norm/beta": rssm.gates_norm.bias}
    for name, grad in zip(inputs, gradients(out, list(inputs.values()), functions["ln_gru/upstream"]), strict=True):
        close(grad.T if "kernel" in name else grad, functions[f"ln_gru/grad_{name}"], rtol=1e-3)


def test_parity_adam(functions):
    config = json.loads(str(functions["config_json"]))["adam"]
    args = script.Args(epsilon=config["eps"], clip=config["clip"], weight_decay=config["wd"])
    weight = torch.nn.Parameter(tensor(functions["adam/w0"]))
    optimizer = script.Adam([weight], config["lr"], args)
    for step, grad in enumerate(functions["adam/grads"], 1):
        norm = optimizer.step([tensor(grad)])
        close(norm, functions[f"adam/norm{step}"])
        close(weight, functions[f"adam/w{step}"], rtol=1e-5, atol=1e-6)


# Sizes


def preset(suite, **options):
    return script.Args(**script.PRESETS[suite] | options)


@pytest.mark.parametrize(
    "args, channels, action, counts",
    [
        (
            preset("atari"), 1, gym.spaces.Discrete(18),
            dict(encoder=1_549_776, rssm=5_664_848, decoder=10_497_553, reward_head=1_131_601, continue_head=1_131_601,
                 total=19_975_379, actor=1_138_418, critic=1_131_601, slow_critic=1_131_601),
        ),
        (
            preset("dmc"), 3, gym.spaces.Box(-1, 1, (6,)),
            dict(encoder=1_551_312, rssm=1_247_248, decoder=9_886_611, reward_head=971_601, total=13_656_772,
                 actor=976_012, critic=971_601, slow_critic=971_601),
        ),
    ],
    ids=["atari", "dmc"],
)  # fmt: skip
def test_parameter_counts(args, channels, action, counts):
    """Those of the authors' code, counted by running it."""
    spaces = {"image": gym.spaces.Box(0, 255, (64, 64, channels), np.uint8)}
    agent = script.Agent(args, spaces, action)
    model, behaviour = agent.world_model, agent.behaviour
    parts = {name: getattr(model, name) for name in ("encoder", "rssm", "decoder", "reward_head", "continue_head")}
    parts |= {"total": model} | {name: getattr(behaviour, name) for name in ("actor", "critic", "slow_critic")}
    size = lambda module: sum(p.numel() for p in module.parameters()) if module else None  # noqa: E731
    assert {name: size(part) for name, part in parts.items() if part is not None} == counts


# Maths


SMALL = dict(
    deter=8, hidden=8, stoch=3, classes=4, units=8, depth=1, imagination_horizon=4, batch_size=2, batch_length=5,
    compile=False, amp=False,
)  # fmt: skip


def small(discrete=True, **options):
    """A small agent that sees vectors, and a batch."""
    torch.manual_seed(0)
    args = script.Args(**SMALL | options)
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


@pytest.mark.parametrize("source", ["all", "image", "reward"])
def test_who_shapes_the_representation(source):
    agent, data = small(representation_from=source)
    model = agent.world_model
    losses = model.loss(data, agent.start(data))[0]
    assert reached(losses["recon_loss_vector"].mean(), model.encoder) == (source != "reward")
    assert reached(losses["reward_loss"].mean(), model.encoder) == (source != "image")
    assert reached(losses["continue_loss"].mean(), model.encoder) == (source != "image")
    assert reached(losses["reward_loss"].mean(), model.reward_head) and reached(losses["kl_loss"], model.encoder)
    assert reached(losses["recon_loss_vector"].mean(), model.decoder)


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("source", ["reinforce", "dynamics", "both", "replay"])
def test_who_moves_the_actor(source, discrete):
    options = dict(behaviour_from="replay") if source == "replay" else dict(actor_gradient=source)
    agent, data = small(discrete, **options)
    model, behaviour = agent.world_model, agent.behaviour
    _, deter, stoch, feat, _ = model.loss(data, agent.start(data))
    losses, _ = behaviour.loss(model, data, deter, stoch, feat)
    actor, critic = losses["actor_loss"].mean(), losses["critic_loss"].mean()
    assert reached(actor, behaviour.actor) and reached(critic, behaviour.critic)
    assert not reached(actor, behaviour.critic) and not reached(critic, behaviour.actor)
    assert not reached(critic, model)
    assert reached(actor, model.rssm) == (source in ("dynamics", "both"))  # through it, though it is not moved
    assert not reached(actor, model.encoder)
    size = (2, 3) if source == "replay" else (10, 3)
    assert losses["actor_loss"].shape == size and losses["critic_loss"].shape == (size[0], size[1] + 1)


def test_only_its_own_optimizer_moves_a_part():
    agent, data = small()
    parts = {"world_model": agent.world_model, "actor": agent.behaviour.actor, "critic": agent.behaviour.critic}
    _, deter, stoch, feat, _ = agent.world_model.loss(data, agent.start(data))
    losses, _ = agent.behaviour.loss(agent.world_model, data, deter, stoch, feat)
    before = {name: [p.clone() for p in part.parameters()] for name, part in parts.items()}
    agent.descend({}, critic=losses["critic_loss"].mean())
    moved = {
        name: any(not torch.equal(a, b) for a, b in zip(before[name], part.parameters(), strict=True))
        for name, part in parts.items()
    }
    assert moved == {"world_model": False, "actor": False, "critic": True}


def test_kl_balance_is_the_prior_s_share():
    post, prior = torch.randn(4, 3, 5).requires_grad_(), torch.randn(4, 3, 5).requires_grad_()
    plain = gradients(script.balance_kl(script.kl_divergence, post, prior, 0.5, 0.0), (post, prior))
    balanced = gradients(script.balance_kl(script.kl_divergence, post, prior, 0.8, 0.0), (post, prior))
    torch.testing.assert_close(balanced[0], 0.2 * plain[0])
    torch.testing.assert_close(balanced[1], 0.8 * plain[1])
    for grad in gradients(script.balance_kl(script.kl_divergence, post, prior, 0.8, 1e3), (post, prior)):
        assert not grad.any()


def test_a_kl_of_unlikely_classes_is_finite():
    logit = torch.tensor([[[200.0, 0.0], [0.0, 200.0]]]).requires_grad_()
    loss = script.kl_divergence(logit, torch.zeros_like(logit)).sum()
    assert loss.isfinite() and gradients(loss, logit)[0].isfinite().all()
    assert script.kl_divergence(logit, logit).item() == 0


def test_the_truncated_normal_against_numbers():
    policy = torch.tensor([[0.3, -0.9, 0.0]]), torch.tensor([[0.5, 0.1, 2.0]])
    samples = truncated_normal(*(p.expand(200_000, 3).to(DEVICE) for p in policy)).rsample()
    assert samples.abs().max() < 1
    grid = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    policy = tuple(p.double().to(DEVICE) for p in policy)
    for i in range(3):
        one = truncated_normal(*(p[:, i : i + 1] for p in policy))
        density = one.log_prob(grid.unsqueeze(1).to(DEVICE)).exp()
        assert torch.trapezoid(density, grid.to(DEVICE)).item() == pytest.approx(1, abs=1e-6)
        mean = torch.trapezoid(density * grid.to(DEVICE), grid.to(DEVICE))
        assert samples[:, i].mean().item() == pytest.approx(mean.item(), abs=0.01)
        entropy = -torch.trapezoid(density * density.log(), grid.to(DEVICE))
        assert one.entropy().item() == pytest.approx(entropy.item(), abs=1e-5)


def test_extreme_policies_stay_finite(monkeypatch):
    policy = torch.tensor([[1.0, -1.0, 1.0]], requires_grad=True), torch.tensor([[0.1, 0.1, 2.1]], requires_grad=True)
    for noise in (0.0, 0.5, 1.0):
        monkeypatch.setattr(torch, "rand_like", lambda x, noise=noise: torch.full_like(x, noise))
        dist = truncated_normal(*policy)
        action = dist.rsample()
        loss = action.sum() + dist.entropy().sum() + dist.log_prob(action.detach()).sum()
        assert all(grad.isfinite().all() for grad in gradients(loss, policy)) and action.abs().max() < 1


def test_the_slow_critic_is_copied_at_its_interval():
    agent, data = small(slow_critic_every=3, critic_rate=0.1)
    same = []
    for _ in range(7):
        agent.update(data)
        pairs = zip(agent.behaviour.critic.parameters(), agent.behaviour.slow_critic.parameters(), strict=True)
        same.append(all(torch.equal(a, b) for a, b in pairs))
    assert same == [True, False, False, True, False, False, True]


ABLATIONS = [dict(critic=False), dict(slow_critic_every=1), dict(kl_balance=0.5), dict(classes=1)]
ABLATIONS += [dict(predict_continue=False), dict(behaviour_from="replay")]


@pytest.mark.parametrize("option", ABLATIONS, ids=str)
@pytest.mark.parametrize("discrete", [True, False])
def test_ablations_learn(option, discrete):
    agent, data = small(discrete, model_rate=1e-2, **option)
    before = {name: parameter.clone() for name, parameter in agent.named_parameters()}
    metrics = [agent.update(data) for _ in range(30)]
    assert all(value.isfinite() for step in metrics for value in step.values())
    assert metrics[-1]["losses/recon_loss_vector"] < metrics[0]["losses/recon_loss_vector"]
    still = [name for name, parameter in agent.named_parameters() if torch.equal(parameter, before[name])]
    assert not still, still


def test_without_a_critic_returns_are_sums_of_rewards():
    agent, data = small(critic=False, predict_continue=False)
    _, deter, stoch, feat, _ = agent.world_model.loss(data, agent.start(data))
    torch.manual_seed(1)
    _, stats = agent.behaviour.loss(agent.world_model, data, deter, stoch, feat)
    torch.manual_seed(1)
    _, _, reward, cont = agent.behaviour.sequences(agent.world_model, data, deter, stoch, feat)
    totals = [torch.zeros(len(reward))]
    for t in reversed(range(reward.shape[1] - 1)):
        totals.append(reward[:, t] + cont[:, t] * totals[-1])
    close(stats["return_mean"], torch.stack(totals[1:]).mean().item())


# Replay and schedule


def a_replay(folder, lengths, capacity=1000, length=5, ends=False):
    """One stream of episodes of these lengths, the last one not over; each step holds its own number."""
    dtype = np.dtype([("number", "i8"), ("is_first", "?"), ("is_last", "?")])
    replay = script.Replay(f"{folder}/0", dtype, 1, capacity, length, ends=ends)
    for episode, steps in enumerate(lengths, 1):
        for i in range(steps):
            last = i == steps - 1 and episode < len(lengths)
            step = {"number": replay.count, "is_first": i == 0, "is_last": last}
            replay.add({key: np.array([value]) for key, value in step.items()})
    return replay


def starts(replay, count):
    return replay.sample(count, np.random.default_rng(0), torch.device("cpu"))["number"][:, 0].numpy()


def test_only_complete_episodes_are_drawn_uniformly(tmp_path):
    replay = a_replay(tmp_path, [6, 5, 3, 20, 9])  # too short (2), and one that is not complete
    assert len(replay) == 2 + 16
    drawn = starts(replay, 4000)
    assert set(drawn) == {0, 1, *range(14, 30)}
    assert np.mean(drawn < 14) == pytest.approx(0.5, abs=0.03)
    data = replay.sample(20, np.random.default_rng(0), torch.device("cpu"))
    assert (data["number"] == data["number"][:, :1] + torch.arange(5)).all()
    assert (data["is_first"] == (torch.arange(5) == 0)).all()


def test_an_episode_that_was_left_is_not_drawn(tmp_path):
    replay = a_replay(tmp_path, [8])
    for number, i in enumerate([0, 1, 2, 3, 4, 5, 6], 8):
        step = {"number": number, "is_first": i == 0, "is_last": i == 6}
        replay.add({key: np.array([value]) for key, value in step.items()})
    assert set(starts(replay, 100)) == {8, 9, 10}


def test_ends_are_prioritised(tmp_path):
    counts = np.bincount(starts(a_replay(tmp_path, [20, 1], ends=True), 21_000))
    assert len(counts) == 16
    assert counts[15] == pytest.approx(6000, rel=0.1) and counts[0] == pytest.approx(1000, rel=0.2)


def test_episodes_that_are_overwritten_are_gone(tmp_path):
    replay = a_replay(tmp_path, [10, 10, 10, 10], capacity=25)
    assert set(starts(replay, 100)) == set(range(20, 26))
    again = script.Replay(f"{tmp_path}/0", replay.steps.dtype, 1, 25, 5, replay.state_dict())
    assert set(starts(again, 100)) == set(range(20, 26)) and again.count == replay.count
    assert len(a_replay(tmp_path / "long", [10, 40, 1], capacity=25)) == 0


class Episode(gym.Env):
    """Ends after 7 steps; counts the updates that were made before each action."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        LOG.append("reset")
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        LOG.append("step")
        return np.zeros(2, np.float32), 1.0, self.steps == 7, False, {}


LOG = []


def test_schedule(tmp_path, monkeypatch):
    """After a prefill of whole episodes all starts anew: pretraining, an update at the next step, one every 5 steps."""
    monkeypatch.setitem(gym.registry, "Seven-v0", gym.envs.registration.EnvSpec("Seven-v0", entry_point=Episode))
    original = script.Agent.update
    monkeypatch.setattr(script.Agent, "update", lambda self, data: LOG.append("update") or original(self, data))
    flags = "--env-id Seven-v0 --deter 8 --hidden 8 --stoch 2 --classes 2 --units 8 --batch-size 2 --batch-length 4 "
    flags += "--imagination-horizon 3 --prefill 10 --pretrain 3 --total-timesteps 24 --eval-every 0 --no-cuda"
    LOG.clear()
    script.main([*flags.split(), "--run-dir", str(tmp_path)])
    log = LOG[LOG.index("step") - 1 :]
    first = log.index("update")
    assert log[:first] == ["reset", *["step"] * 7, "reset", *["step"] * 3, "reset"]  # the reset amid the second episode
    left = "".join({"step": "s", "update": "u", "reset": "r"}[x] for x in log[first:])
    done, counts = 0, []
    for entry in left:
        done += entry == "u"
        if entry == "s":
            counts.append(done)  # updates before each step
    assert counts == [3, 4, 4, 4, 4, 4, 5, 5, 5, 5, 5, 6, 6, 6]
