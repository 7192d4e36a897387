"""dreamer_v3.py against recorded outputs of the authors' code; tests/golden/dreamer_v3/README.md explains them."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import agent_and_batch, all_losses, checkpoint, reached, train
from recordings import DEVICE, GOLDEN, Recorded, close, replaced, tensor

import dreamer_v3 as script

CASES = [path for path in sorted(GOLDEN.rglob("golden_[a-z]_*.npz")) if not path.stem.endswith("_opt")]
FUNCTIONS = sorted(GOLDEN.rglob("golden_functions.npz"))[0]


def sized(size, **options):
    return script.Args(**vars(script.parse_args(["--size", size])) | options)


class Case(Recorded):
    """A recorded model, its batch and its samples."""

    def __init__(self, path):
        self.golden = golden = np.load(path)
        shape = lambda name: golden[f"param/{name}"].shape
        discrete = "param/pol/head/action/logits/kernel" in golden
        blocks, _, per_block = shape("dyn/dynhid0/kernel")
        S, K = golden["post/stoch"].shape[2:]
        sizes = dict(deter=blocks * per_block, hidden=shape("dyn/dynin0/kernel")[1], stoch=S, classes=K, blocks=blocks)
        sizes |= dict(units=shape("rew/mlp/linear0/kernel")[1], bins=shape("rew/head/logits/kernel")[1])
        sizes["depth"] = shape("enc/cnn0/kernel")[-1] // 2 if "param/enc/cnn0/kernel" in golden else 1
        horizon, plain = golden["imag/ret"].shape[1], dict(compile=False, amp=False)
        self.args = script.Args(**sizes, imagination_horizon=horizon, learning_rate=1e-3, warmup=2, **plain)
        reserved = ("reward", "is_first", "is_last", "is_terminal")
        obs = {k[7:]: golden[k] for k in golden.files if k.startswith("in/obs/") and k[7:] not in reserved}
        obs = {k: v if v.ndim > 2 else v[..., None] for k, v in obs.items() if f"dec/mean/{k}" in golden}
        spaces = {}
        for key, value in obs.items():
            if value.dtype == np.uint8:
                spaces[key] = gym.spaces.Box(0, 255, value.shape[2:], np.uint8)
                self.args.image_size = value.shape[2]
            else:
                spaces[key] = gym.spaces.Box(-np.inf, np.inf, value.shape[2:])
        self.B, self.T = golden["in/obs/reward"].shape
        self.actions = shape("pol/head/action/logits/kernel" if discrete else "pol/head/action/mean/kernel")[1]
        space = gym.spaces.Discrete(self.actions) if discrete else gym.spaces.Box(-1, 1, (self.actions,))
        self.agent = script.Agent(self.args, spaces, space, DEVICE)
        self.official_names(discrete)
        self.load("param/")
        action = golden["in/prevact"]
        action = F.one_hot(tensor(action).long(), self.actions).float() if discrete else tensor(action)
        self.data = {key: tensor(value) for key, value in obs.items()}
        self.data |= {key: tensor(golden[f"in/obs/{key}"]) for key in reserved}
        deter, stoch = (tensor(golden[f"in/carry/{name}"]) for name in ("deter", "stoch"))
        stoch = stoch.argmax(-1) if stoch.ndim == 3 else stoch
        self.data |= {"action": action, "deter": deter, "stoch": stoch}
        self.start = self.agent.start(self.data)

    def official_names(self, discrete):
        """Our parameter -> (official name, kind of layout)."""
        self.names, add, agent, wm, bh = {}, self.add, self.agent, "world_model", "behaviour"

        def layer(ours, theirs, norm, kind="dense"):
            add(f"{ours}.0", theirs, kind)
            self.names[f"{ours}.1.weight"] = f"{norm}/scale", "same"

        if agent.world_model.encoder.vectors:
            for i in range(3):
                layer(f"{wm}.encoder.layers.{i}", f"enc/mlp{i}", f"enc/mlp{i}norm")
                kind = "dense" if i else "dense_feat"
                layer(f"{wm}.decoder.layers.{i}", f"dec/mlp/linear{i}", f"dec/mlp/norm{i}", kind)
            for i, key in enumerate(sorted(agent.world_model.encoder.vectors)):
                add(f"{wm}.decoder.heads.{i}", f"dec/vec/{key}/pred")
        if agent.world_model.encoder.images:
            for i in range(4):
                layer(f"{wm}.encoder.convs.{i}", f"enc/cnn{i}", f"enc/cnn{i}norm", "conv")
            add(f"{wm}.decoder.deter_map", "dec/sp0", "same")
            layer(f"{wm}.decoder.stoch_map.0", "dec/sp1", "dec/sp1norm")
            add(f"{wm}.decoder.stoch_map.1", "dec/sp2")
            self.names[f"{wm}.decoder.convs.0.weight"] = "dec/spnorm/scale", "same"
            for i in range(3):
                layer(f"{wm}.decoder.convs.{i + 2}", f"dec/conv{2 - i}", f"dec/conv{2 - i}norm", "conv")
            add(f"{wm}.decoder.convs.5", "dec/imgout", "conv")
        inputs = {"deter_in": "dynin0", "stoch_in": "dynin1", "action_in": "dynin2", "post_net": "obs0"}
        for ours, theirs in inputs.items():
            layer(f"{wm}.rssm.{ours}.0", f"dyn/{theirs}", f"dyn/{theirs}norm")
        add(f"{wm}.rssm.mix", "dyn/dynhid0", "same")
        self.names[f"{wm}.rssm.mix_norm.weight"] = "dyn/dynhid0norm/scale", "same"
        add(f"{wm}.rssm.gates", "dyn/dyngru", "same")
        add(f"{wm}.rssm.post_net.1", "dyn/obslogit")
        for i in range(2):
            layer(f"{wm}.rssm.prior_net.{i}", f"dyn/prior{i}", f"dyn/prior{i}norm")
        add(f"{wm}.rssm.prior_net.2", "dyn/priorlogit")
        heads = [(f"{wm}.reward_head", "rew", 1, "logits"), (f"{wm}.continue_head", "con", 1, "logit")]
        heads += [(f"{bh}.critic", "val", 3, "logits"), (f"{bh}.slow_critic", "slowval", 3, "logits")]
        for ours, theirs, layers, output in heads:
            for i in range(layers):
                layer(f"{ours}.{i}", f"{theirs}/mlp/linear{i}", f"{theirs}/mlp/norm{i}")
            add(f"{ours}.{layers}", f"{theirs}/head/{output}")
        for i in range(3):
            layer(f"{bh}.actor.layers.{i}", f"pol/mlp/linear{i}", f"pol/mlp/norm{i}")
        for i, output in enumerate(["logits"] if discrete else ["mean", "stddev"]):
            add(f"{bh}.actor.outputs.{i}", f"pol/head/action/{output}")

    def load(self, prefix, source=None):
        source = self.golden if source is None else source
        with torch.no_grad():
            for name, parameter in self.agent.named_parameters():
                if prefix + self.names[name][0] in source:
                    value = self.parameter(prefix, name, source)
                    assert value.shape == parameter.shape, name
                    parameter.copy_(value)
        theirs = {self.names[name][0] for name, _ in self.agent.named_parameters()}
        missing = {key[len(prefix) :] for key in source.files if key.startswith(prefix)} - theirs
        assert not {m for m in missing if not m.startswith(("ret", "slowval", "opt"))}, missing

    def samples(self, *parts):
        """Puts the recorded samples in the place of random ones."""
        golden, args = self.golden, self.args
        post, prior = tensor(golden["post/stoch_index"]).long(), tensor(golden["imag/stoch_index"]).long()
        action = tensor(golden["imag/act"])
        if self.agent.discrete:
            action = F.one_hot(action.long(), self.actions).float()
        queue = list(F.one_hot(post, args.classes).float().unbind(1)) if "post" in parts else []
        if "imagined" in parts:
            states = F.one_hot(prior, args.classes).float()[:, 1:].unbind(1)
            pairs = zip(action.unbind(1), states, strict=False)
            queue += [sample for pair in pairs for sample in pair]

        onehot = lambda take, probs: take(probs) + (probs - probs.detach())
        normal = script.Normal, "rsample", lambda take, policy, _: take(policy.mean)
        return replaced(queue, (script, "sample_onehot", onehot), normal)


@pytest.fixture(params=CASES, ids=lambda path: path.stem, scope="module")
def case(request):
    return Case(request.param)


def test_parity_world_model(case):
    golden, model, data = case.golden, case.agent.world_model, case.data
    embed = model.encoder(data)
    close(embed, golden["enc/tokens"])
    with case.samples("post"):
        losses, deter, stoch, feat, stats = model.loss(data, case.start)
    close(deter, golden["post/deter"])
    assert np.array_equal(stoch.detach().argmax(-1).cpu().numpy(), golden["post/stoch_index"])
    with case.samples("post"):
        *_, post = model.rssm.observe(embed, data["action"], data["is_first"], case.start)
    prior = model.rssm.probs(model.rssm.prior_net(deter))
    logits = model.rssm.post_net(torch.cat([deter, embed], -1)), model.rssm.prior_net(deter)
    for name, probs, logit in zip(("post", "prior"), (post, prior), logits, strict=True):
        close(logit.view(probs.shape), golden[f"{name}/logit"])
        close(probs, model.rssm.probs(tensor(golden[f"{name}/logit"]).flatten(-2)).detach().cpu())
    close(script.kl_divergence(post, prior), golden["post/kl_raw"])
    close(stats["posterior_entropy"], golden["metric/rep_ent"])
    close(stats["prior_entropy"], golden["metric/dyn_ent"])
    for key, mean in model.decoder(feat).items():
        close(mean, golden[f"dec/mean/{key}"].reshape(mean.shape))
        close(losses[f"recon_loss_{key}"], golden[f"loss/{key}"])
    close(model.reward_head(feat), golden["head/rew_logits"])
    close(model.reward(feat), golden["head/rew_pred"], atol=1e-4)
    close(model.continue_head(feat).view(golden["head/con_logit"].shape), golden["head/con_logit"])
    close(model.cont(feat), golden["head/con_prob"])
    for ours, theirs in (("reward_loss", "rew"), ("continue_loss", "con"), ("dyn_loss", "dyn"), ("rep_loss", "rep")):
        close(losses[ours], golden[f"loss/{theirs}"])


def test_parity_behaviour(case):
    golden, agent = case.golden, case.agent
    behaviour, model = agent.behaviour, agent.world_model
    behaviour.return_range.copy_(tensor(np.stack([golden["imag/ret_lo_before"], golden["imag/ret_hi_before"]])))
    with torch.no_grad():
        with case.samples("post"):
            _, deter, stoch, feat, _ = model.loss(case.data, case.start)
        policy = behaviour.actor(feat)
        if agent.discrete:
            close(policy.logits, tensor(golden["head/pol_logits"]).log_softmax(-1).cpu())
        else:
            close(policy.mean, golden["head/pol_mean"])
            close(policy.stddev, golden["head/pol_std"])
        close(behaviour.critic(feat), golden["head/val_logits"])
        close(script.twohot_mean(behaviour.critic(feat)), golden["head/val_pred"], atol=1e-4)
        close(script.twohot_mean(behaviour.slow_critic(feat)), golden["head/slowval_pred"], atol=1e-4)
        states = deter.flatten(0, 1), stoch.flatten(0, 1)
        with case.samples("imagined"):
            imag_feat, imag_action = model.rssm.imagine(states, behaviour.actor.sample, case.args.imagination_horizon)
        prior = model.rssm.probs(tensor(golden["imag/prior_logit"]).flatten(-2)).cpu()
        close(model.rssm.probs(model.rssm.prior_net(imag_feat[:, 1:, : case.args.deter])), prior)
        close(imag_feat[..., : case.args.deter], golden["imag/deter"])
        index = imag_feat[..., case.args.deter :].unflatten(-1, (case.args.stoch, case.args.classes)).argmax(-1)
        assert np.array_equal(index.cpu().numpy(), golden["imag/stoch_index"])
        if agent.discrete:
            assert np.array_equal(imag_action.argmax(-1).cpu().numpy(), golden["imag/act"][:, :-1])
        else:
            close(imag_action, golden["imag/act"][:, :-1])
        close(model.reward(imag_feat), golden["imag/rew"], atol=1e-4)
        close(model.cont(imag_feat), golden["imag/con"])
        value = script.twohot_mean(behaviour.critic(imag_feat))
        close(value, golden["imag/val"], atol=1e-4)
        close(script.twohot_mean(behaviour.slow_critic(imag_feat)), golden["imag/slowval"], atol=1e-4)
        policy = behaviour.actor(imag_feat)
        close(behaviour.actor(imag_feat[:, :-1]).log_prob(imag_action), golden["imag/logp"][:, :-1])
        close(policy.entropy(), golden["imag/ent"])
        close(model.cont(imag_feat).cumprod(1), golden["imag/weight"])
        zeros = torch.zeros_like(value)
        reward, cont = model.reward(imag_feat), model.cont(imag_feat)
        returns = script.lambda_return(reward, cont, zeros, value, case.args.lmbda)
        close(returns, golden["imag/ret"], atol=1e-4)
    with case.samples("imagined"):
        losses, stats = behaviour.loss(model, case.data, deter, stoch, feat)
    close(behaviour.return_range[0], golden["imag/ret_lo_after"].reshape(()))
    close(behaviour.return_range[1], golden["imag/ret_hi_after"].reshape(()))
    close(stats["return_scale"], golden["imag/ret_scale"].reshape(()))
    close(losses["actor_loss"], golden["imag/loss_policy"], atol=1e-4)
    close(losses["critic_loss"], golden["imag/loss_value"], atol=1e-4)
    close(losses["actor_loss"].mean(1).view(case.B, case.T), golden["loss/policy"], atol=1e-4)
    close(losses["critic_loss"].mean(1).view(case.B, case.T), golden["loss/value"], atol=1e-4)
    close(losses["replay_critic_loss"], golden["loss/repval"], atol=1e-4)


def gradients(agent, data):
    """An update without its step -> gradients of what is trained, latents, metrics."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent.optimizer, "step", lambda grads: seen.append(grads) or {})
        patch.setattr(agent.args, "slow_critic_rate", 0.0)
        return seen, *agent.update(data)


def test_parity_gradients(case):
    golden, agent = case.golden, case.agent
    agent.behaviour.return_range.copy_(tensor(np.stack([golden["imag/ret_lo_before"], golden["imag/ret_hi_before"]])))
    with case.samples("post", "imagined"):
        (grads,), latents, metrics = gradients(agent, case.data)
    losses = {key.removeprefix("losses/"): value for key, value in metrics.items() if key.startswith("losses/")}
    scales = dict(rep_loss=0.1, replay_critic_loss=0.3)
    close(sum(scales.get(name, 1.0) * loss for name, loss in losses.items()), golden["lossmean/total"])
    theirs = dict(reward_loss="rew", continue_loss="con", dyn_loss="dyn", rep_loss="rep", actor_loss="policy")
    theirs |= dict(critic_loss="value", replay_critic_loss="repval")
    for name, loss in losses.items():
        close(loss, golden[f"lossmean/{theirs.get(name, name.removeprefix('recon_loss_'))}"])
    close(latents["deter"], golden["writeback/dyn/deter"])
    written = golden["writeback/dyn/stoch"]
    assert np.array_equal(latents["stoch"].cpu(), written.argmax(-1) if written.ndim == 4 else written)
    names = [name for name, parameter in agent.named_parameters() if parameter.requires_grad]
    assert len(names) == sum(key.startswith("grad/") for key in golden.files)
    for name, grad in zip(names, grads, strict=True):
        close(grad, case.parameter("grad/", name).cpu(), rtol=1e-3, atol=3e-5)


def test_parity_updates(case, request, monkeypatch):
    """Parameters after each recorded update, of a loss that has the recorded gradients."""
    opt, agent = np.load(next(iter(GOLDEN.rglob(f"{request.node.callspec.id}_opt.npz")))), case.agent
    case.load("param0/", opt)
    names = {name: parameter for name, parameter in agent.named_parameters() if parameter.requires_grad}
    slow = {name: p for name, p in agent.named_parameters() if not p.requires_grad}
    golden = lambda name, prefix: case.parameter(prefix, name, opt)

    def golden_slow(name, i):
        theirs, kind = case.names[name]
        return case.convert(opt[theirs.replace("slowval/", f"slowval{i}/")], kind)

    with torch.no_grad():
        for name, parameter in slow.items():
            parameter.copy_(golden_slow(name, 0))
    agent.optimizer = script.LaProp(agent.parameters(), case.args)
    monkeypatch.setattr(agent, "start", lambda data: None)
    monkeypatch.setattr(agent.behaviour, "loss", lambda *_: ({}, {}))
    count = len(opt["lr_schedule"])
    for i in range(1, count + 1):
        total = sum((parameter * golden(name, f"grad{i}/")).sum() for name, parameter in names.items())
        state = [torch.zeros(1, 1, 1)] * 3
        monkeypatch.setattr(agent.world_model, "loss", lambda *_, total=total: ({"": total}, *state, {}))  # noqa: B023
        _, metrics = agent.update({})
        assert metrics["stats/learning_rate"].item() == pytest.approx(float(opt["lr_schedule"][i - 1]), rel=1e-5)
        for name, parameter in names.items():
            close(parameter, golden(name, f"param{i}/").cpu(), rtol=1e-5, atol=2e-6)
    for name, parameter in slow.items():
        close(parameter, golden_slow(name, count).cpu(), rtol=1e-5, atol=2e-6)
    case.load("param/")


def test_parity_symlog(functions):
    close(script.symlog(tensor(functions["symlog/x"])), functions["symlog/y"])
    close(script.symexp(tensor(functions["symexp/x"])), functions["symexp/y"], rtol=1e-5, atol=0)


def test_parity_twohot(functions):
    close(script.twohot_bins(255), functions["twohot/bins"], rtol=1e-5, atol=0)
    logit, target = tensor(functions["twohot/logits"]).requires_grad_(), tensor(functions["twohot/target"])
    loss = script.twohot_loss(logit, target)
    close(loss, functions["twohot/loss"])
    (grad,) = torch.autograd.grad(loss.sum(), logit)
    close(grad, functions["twohot/dloss_dlogits"], atol=3e-5)  # bins differ by an ulp
    mean = script.twohot_mean(tensor(functions["twohot/pred_logits"]))
    assert mean[0] == 0
    np.testing.assert_allclose(mean[7:].cpu(), functions["twohot/pred"][7:], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(mean[1:7].cpu() / 1e8, functions["twohot/pred"][1:7] / 1e8, atol=1e-6)
    close(script.twohot_loss(logit, target, target), 2 * functions["twohot/loss"])


def test_parity_lambda_return(functions):
    reward, boot = tensor(functions["lam/rew"]), tensor(functions["lam/boot"])
    cont = tensor(functions["lam/imag_con"])
    returns = script.lambda_return(reward, cont, torch.zeros_like(cont), boot, 0.95)
    close(returns, functions["lam/imag_ret"])
    last, term = (tensor(functions[f"lam/replay_{x}"]).float() for x in ("last", "term"))
    returns = script.lambda_return(reward, (1 - term) * (1 - 1 / 333), last, boot, 0.95)
    close(returns, functions["lam/replay_ret"])


def test_parity_layers(functions):
    norm = script.MLP(1, functions["rms/x"].shape[-1], 1)[0][1].to(DEVICE)
    block = script.BlockLinear(
        functions["block/x"].shape[-1], functions["block/y"].shape[-1], len(functions["block/kernel"])
    )
    kernel = functions["conv/kernel_hwio"].transpose(3, 2, 0, 1)
    conv, up = script.Conv(*kernel.shape[1::-1]), script.UpsampleConv(*kernel.shape[1::-1])
    norm.weight.data = tensor(functions["rms/scale"])
    block.weight.data, block.bias.data = tensor(functions["block/kernel"]), tensor(functions["block/bias"])
    for layer in (conv, up.to(DEVICE)):
        layer.weight.data, layer.bias.data = tensor(kernel), tensor(functions["conv/bias"])
    close(norm(tensor(functions["rms/x"])), functions["rms/y"])
    close(block(tensor(functions["block/x"])), functions["block/y"])
    x = tensor(functions["conv/x"])
    plain = lambda x: F.conv2d(x, conv.weight, conv.bias, padding=2).permute(0, 2, 3, 1)
    close(plain(x.permute(0, 3, 1, 2)), functions["conv/y"])
    close(conv(x), functions["conv/y_maxpool2"])
    upsampled = F.interpolate(plain(x.permute(0, 3, 1, 2)).permute(0, 3, 1, 2), scale_factor=2).permute(0, 2, 3, 1)
    close(upsampled, functions["conv/y_nearest_up2"])
    close(up(x), plain(F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2)).detach().cpu())


def test_parity_optimizer(functions):
    names = sorted(key.removeprefix("laprop/param0/") for key in functions.files if key.startswith("laprop/param0/"))
    params = [torch.nn.Parameter(tensor(functions[f"laprop/param0/{name}"])) for name in names]
    args = script.Args(learning_rate=float(functions["laprop/lr"]), warmup=int(functions["laprop/warmup"]))
    optimizer, step = script.LaProp(params, args), 1
    while f"laprop/param{step}/{names[0]}" in functions:
        optimizer.step([tensor(functions[f"laprop/grad{step}/{name}"]) for name in names])
        for name, param in zip(names, params, strict=True):
            close(param, functions[f"laprop/param{step}/{name}"], rtol=2e-4, atol=2e-6)
        step += 1
    assert step > 2
    optimizer = script.LaProp(params, script.Args())
    for n, rate in zip(functions["lrsched/n"], functions["lrsched/lr"], strict=True):
        optimizer.updates.fill_(int(n))
        stats = optimizer.step([torch.zeros_like(param) for param in params])
        assert stats["learning_rate"].item() == pytest.approx(float(rate), rel=1e-5)


def test_parity_return_scale(functions):
    behaviour = script.Behaviour(sized("1m"), 3, True).to(DEVICE)
    for x, lo, scale in zip(functions["retnorm/x"], functions["retnorm/lo"], functions["retnorm/scale"], strict=True):
        mine = behaviour.scale(tensor(x))
        close(behaviour.return_range[0], lo)
        close(mine, scale)


def test_parity_distributions(functions):
    actor = script.Actor(sized("1m"), 8, 3, False).to(DEVICE)
    actor.layers, (mean, std) = torch.nn.Identity(), actor.outputs
    for i, output in enumerate((mean, std)):
        output.weight.data = torch.eye(3, 6, device=DEVICE).roll(3 * i, 1)
        output.bias.data.zero_()
    raw = torch.cat([tensor(functions["bnormal/raw_mean"]), tensor(functions["bnormal/raw_std"])], -1)
    policy = actor(raw)
    close(policy.mean, functions["bnormal/mean"])
    close(policy.stddev, functions["bnormal/std"])
    close(policy.log_prob(tensor(functions["bnormal/event"])), functions["bnormal/logp"])
    close(policy.entropy(), functions["bnormal/entropy"])
    logit = tensor(functions["cat/logits"])
    actor = script.Actor(sized("1m"), 8, logit.shape[-1], True).to(DEVICE)
    actor.layers, actor.outputs = torch.nn.Identity(), torch.nn.ModuleList([torch.nn.Identity()])
    policy = actor(logit)
    close(policy.log_prob(F.one_hot(tensor(functions["cat/action"]), logit.shape[-1]).float()), functions["cat/logp"])
    close(policy.entropy(), functions["cat/entropy"])


def test_parity_unimix(functions, monkeypatch):
    logits = [tensor(functions[f"unimix/logits{i}"]).requires_grad_() for i in (1, 2)]
    sizes = SimpleNamespace(args=SimpleNamespace(stoch=logits[0].shape[-2], classes=logits[0].shape[-1], unimix=0.01))
    p, q = (script.RSSM.probs(sizes, logit.flatten(-2)) for logit in logits)
    close(p.log(), functions["unimix/logp1"])
    kl = script.kl_divergence(p, q)
    close(kl, functions["unimix/kl12"])
    close(-(p * p.log()).sum((-2, -1)), functions["unimix/entropy1"])
    grads = torch.autograd.grad(kl.sum(), logits, retain_graph=True)
    close(grads[0], functions["unimix/dkl_dlogits1"])
    close(grads[1], functions["unimix/dkl_dlogits2"])
    index = tensor(functions["unimix/index"]).unsqueeze(-1)
    noise = (p.cumsum(-1).gather(-1, index) - p.gather(-1, index) / 2).detach()
    monkeypatch.setattr(torch, "rand_like", lambda x: noise.view(x.shape))
    sample = script.sample_onehot(p)
    assert torch.equal(sample.argmax(-1), index.squeeze(-1))
    close((p.log() * sample.detach()).sum((-2, -1)), functions["unimix/logp_event"])
    grad = torch.autograd.grad(sample, logits[0], tensor(functions["unimix/st_cotangent"]))[0]
    close(grad, functions["unimix/st_grad_logits"])


# Sizes

COUNTS = {  # case -> size, encoder, rssm, decoder, reward, continue, actor, critic, all that is trained
    "image64_cont6": [
        ("1m", 14_304, 376_704, 80_595, 57_663, 41_153, 50_316, 66_111, 686_846),
        ("12m", 220_416, 5_979_648, 1_272_003, 721_407, 656_129, 791_052, 853_503, 10_494_158),
        ("25m", 493_824, 13_442_304, 2_857_635, 1_573_503, 1_475_713, 1_776_396, 1_869_951, 23_489_326),
        ("50m", 876_032, 23_886_848, 5_076_355, 2_753_279, 2_622_977, 3_154_956, 3_279_615, 41_650_062),
        ("100m", 1_966_848, 53_721_600, 11_413_059, 6_095_871, 5_900_545, 7_091_724, 7_278_591, 93_468_238),
        ("200m", 3_492_864, 95_483_904, 20_282_115, 10_749_183, 10_488_833, 12_601_356, 12_850_431, 165_948_686),
        ("400m", 7_850_496, 214_791_168, 45_617_283, 23_987_967, 23_597_569, 28_339_212, 28_712_703, 372_896_398),
    ],
    "vector24_cont6": [
        ("1m", 10_112, 364_416, 51_096, 57_663, 41_153, 50_316, 66_111, 640_867),
        ("12m", 138_752, 5_783_040, 794_136, 721_407, 656_129, 791_052, 853_503, 9_738_019),
        ("25m", 306_432, 12_999_936, 1_781_016, 1_573_503, 1_475_713, 1_776_396, 1_869_951, 21_782_947),
        ("50m", 539_648, 23_100_416, 3_161_112, 2_753_279, 2_622_977, 3_154_956, 3_279_615, 38_612_003),
        ("100m", 1_202_688, 51_952_128, 7_100_952, 6_095_871, 5_900_545, 7_091_724, 7_278_591, 86_622_499),
        ("200m", 2_127_872, 92_338_176, 12_613_656, 10_749_183, 10_488_833, 12_601_356, 12_850_431, 153_769_507),
        ("400m", 4_764_672, 207_713_280, 28_357_656, 23_987_967, 23_597_569, 28_339_212, 28_712_703, 345_473_059),
    ],
    "image64_disc18": [
        ("1m", 14_304, 377_472, 80_595, 57_663, 41_153, 50_706, 66_111, 688_004),
        ("12m", 220_416, 5_982_720, 1_272_003, 721_407, 656_129, 792_594, 853_503, 10_498_772),
        ("25m", 493_824, 13_446_912, 2_857_635, 1_573_503, 1_475_713, 1_778_706, 1_869_951, 23_496_244),
        ("50m", 876_032, 23_892_992, 5_076_355, 2_753_279, 2_622_977, 3_158_034, 3_279_615, 41_659_284),
        ("100m", 1_966_848, 53_730_816, 11_413_059, 6_095_871, 5_900_545, 7_096_338, 7_278_591, 93_482_068),
        ("200m", 3_492_864, 95_496_192, 20_282_115, 10_749_183, 10_488_833, 12_607_506, 12_850_431, 165_967_124),
        ("400m", 7_850_496, 214_809_600, 45_617_283, 23_987_967, 23_597_569, 28_348_434, 28_712_703, 372_924_052),
    ],
    "image96x1_disc18": [
        ("200m", 3_486_464, 100_739_072, 36_014_593, 10_749_183, 10_488_833, 12_607_506, 12_850_431, 186_936_082),
    ],
}
VECTORS = {"height": (1,), "orientations": (14,), "velocity": (9,)}


@pytest.mark.parametrize("case, row", [(case, row) for case, rows in COUNTS.items() for row in rows])
def test_parameter_counts(case, row):
    """Those of the authors' code, module by module, from its shapes."""
    args = sized(row[0], image_size=96 if "96" in case else 64)
    spaces = {key: gym.spaces.Box(-np.inf, np.inf, shape) for key, shape in VECTORS.items()}
    if "image" in case:
        shape = (args.image_size, args.image_size, 1 if "x1" in case else 3)
        spaces = {"image": gym.spaces.Box(0, 255, shape, np.uint8)}
    action = gym.spaces.Discrete(18) if "disc" in case else gym.spaces.Box(-1, 1, (6,))
    with torch.device("meta"):
        agent = script.Agent(args, spaces, action, "meta")
    names = "encoder", "rssm", "decoder", "reward_head", "continue_head"
    parts = [getattr(agent.world_model, name) for name in names] + [agent.behaviour.actor, agent.behaviour.critic]
    params = [*map(torch.nn.Module.parameters, parts), agent.optimizer.params]
    assert tuple(sum(p.numel() for p in part) for part in params) == row[1:]


# Maths


SMALL = dict(
    deter=8, hidden=8, stoch=3, classes=4, units=8, depth=1, blocks=2, decoder_blocks=2, bins=15, imagination_horizon=4,
    batch_size=2, batch_length=5, free_nats=0.0, compile=False, amp=False,
)  # fmt: skip


@pytest.fixture
def small(tmp_path):
    """A small agent whose heads are not at zero, and a batch."""
    args = script.Args(**SMALL)
    spaces = {"vector": gym.spaces.Box(-np.inf, np.inf, (6,)), "image": gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)}
    agent, data = agent_and_batch(script, args, spaces, gym.spaces.Box(-1, 1, (2,)), tmp_path)
    with torch.no_grad():
        for parameter in agent.optimizer.params:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return agent, data


def test_who_learns_from_what(small):
    agent, data = small
    losses, _ = all_losses(script, agent, data)
    parts = dict(agent.world_model.named_children()) | dict(agent.behaviour.named_children())
    del parts["slow_critic"]
    model = {"encoder", "rssm"}
    learners = {"reward_loss": model | {"reward_head"}, "continue_loss": model | {"continue_head"}}
    learners |= {"recon_loss_image": model | {"decoder"}, "recon_loss_vector": model | {"decoder"}}
    learners |= {"actor_loss": {"actor"}, "critic_loss": {"critic"}}
    learners |= {"dyn_loss": model, "rep_loss": model, "replay_critic_loss": model | {"critic"}}
    reach = lambda loss: {name for name, part in parts.items() if reached(loss, part)}
    assert {name: reach(loss.mean()) for name, loss in losses.items()} == learners


def test_the_kl_is_split(small):
    """The dynamics loss moves the prior alone, the representation loss the posterior; none below a free nat."""
    agent, data = small
    one = {key: value[:, :1] if key not in ("deter", "stoch") else value for key, value in data.items()}
    rssm = agent.world_model.rssm
    ends = [rssm.prior_net[-1].weight, rssm.post_net[-1].weight]
    for free_nats, expected in ((0.0, {"dyn_loss": [True, False], "rep_loss": [False, True]}), (1e6, {})):
        agent.args.free_nats = free_nats
        losses, *_ = agent.world_model.loss(one, agent.start(one))
        for name in ("dyn_loss", "rep_loss"):
            grads = torch.autograd.grad(losses[name].sum(), ends, allow_unused=True, retain_graph=True)
            moved = [grad is not None and bool(grad.any()) for grad in grads]
            assert moved == expected.get(name, [False, False]), name


def test_losses_see_no_episode_through_its_end(small):
    """A reset inside a sequence cuts the state: what came before changes nothing after it."""
    agent, data = small
    data["is_first"][:] = False
    data["is_first"][:, 3] = True
    other = {key: torch.cat([-data[key][:, :3], data[key][:, 3:]], 1) for key in ("image", "vector", "action")}
    states = []
    for inputs in (data, data | other):
        torch.manual_seed(0)
        embed = agent.world_model.encoder(inputs)
        states.append(agent.world_model.rssm.observe(embed, inputs["action"], data["is_first"], agent.start(data)))
    assert not torch.equal(states[0][0][:, :3], states[1][0][:, :3])
    assert all(torch.equal(a[:, 3:], b[:, 3:]) for a, b in zip(*states, strict=True))


def test_means_and_losses_are_float32_under_autocast():
    logit, target = torch.randn(50, 255), torch.randn(50)
    exact = script.twohot_mean(logit), script.twohot_loss(logit, target)
    with torch.autocast("cpu", torch.bfloat16):
        half = script.twohot_mean(logit), script.twohot_loss(logit, target)
    assert all(torch.equal(a, b) for a, b in zip(exact, half, strict=True))


def test_actions_are_sampled_without_a_check_of_values(small, monkeypatch):
    """torch.normal reads the smallest deviation from the GPU, which a captured graph cannot, and raises on NaN."""
    monkeypatch.setattr(torch, "normal", None)
    agent, data = small
    agent.update(data)
    agent.act({key: value[:, 0] for key, value in data.items()}, agent.initial(len(data["reward"])))


def test_heads_are_precise_under_autocast(small):
    """Last layers are float32: two bins near 150 share the probability, and 16 bits would give six values in all."""
    spaces, args = small[0].spaces, sized("1m", compile=False, amp=True)
    agent = script.Agent(args, spaces, gym.spaces.Discrete(3))
    critic, bins = agent.behaviour.critic, script.twohot_bins(args.bins)
    with torch.no_grad():
        critic[-1].weight.normal_(std=0.005)
        critic[-1].bias.copy_(torch.where((bins - 150).abs() < 30, 20.0, -20.0))
    feat = torch.randn(2000, args.deter + args.stoch * args.classes)
    exact = script.twohot_mean(critic(feat))
    model = agent.world_model
    with agent.autocast(), torch.no_grad():
        value = script.twohot_mean(critic(feat))
        outputs = [agent.behaviour.actor(feat).logits, model.reward_head(feat), model.continue_head(feat)]
        outputs += [*model.decoder(feat[:4, None]).values(), model.rssm.prior_net(feat[:, : args.deter])]
    assert exact.mean().item() == pytest.approx(150, abs=10)
    assert len(value.unique()) > 1000 and (value - exact).square().mean().sqrt() < 0.05
    assert {output.dtype for output in outputs} == {torch.float32}


def test_bfloat16_gives_the_same_gradients(small):
    """Autocast, as on a GPU, against float32."""
    agent, data = small
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        agent.autocast = lambda dtype=dtype: torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16)
        agent.behaviour.return_range.zero_()
        torch.manual_seed(0)
        grads.append(gradients(agent, data)[0][0])
    exact, half = (torch.cat([grad.flatten() for grad in part]) for part in grads)
    names = [name for name, p in agent.named_parameters() if p.requires_grad]
    assert not [name for name, grad in zip(names, grads[1], strict=True) if not grad.any()]
    assert F.cosine_similarity(exact, half, 0) > 0.95


def test_samples_follow_the_probabilities(monkeypatch):
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3])
    torch.manual_seed(0)
    sample = script.sample_onehot(probs.expand(100_000, 4))
    assert (sample.sum(-1) == 1).all()
    torch.testing.assert_close(sample.mean(0), probs, atol=0.01, rtol=0)
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.tensor([[0.0], [1 - 2**-24]]))
    assert script.sample_onehot(probs.expand(2, 4)).argmax(-1).tolist() == [0, 3]


def test_a_new_agent_predicts_zero_reward_and_value(small, tmp_path):
    args = sized("1m", compile=False)
    agent = script.Agent(args, small[0].spaces, gym.spaces.Discrete(3))
    feat = torch.randn(7, args.deter + args.stoch * args.classes)
    assert not agent.world_model.reward(feat).any() and not script.twohot_mean(agent.behaviour.critic(feat)).any()
    slow, fast = (getattr(agent.behaviour, name).state_dict() for name in ("slow_critic", "critic"))
    assert all(torch.equal(slow[key], fast[key]) for key in fast)
    rssm, actor = agent.world_model.rssm, agent.behaviour.actor
    scales = {rssm.deter_in[0][0]: 512**-0.5, rssm.gates: 512**-0.5}  # the blocks' too by the whole input
    scales |= {agent.world_model.encoder.convs[1][0]: (25 * 8) ** -0.5, actor.layers[1][0]: 64**-0.5}
    for layer, std in scales.items():
        assert layer.weight.std().item() == pytest.approx(std, rel=0.03) and not layer.bias.any()
        assert layer.weight.abs().max() < 2.3 * std
    assert 0 < actor.outputs[0].weight.abs().max() < 2.3 * 0.01 * 64**-0.5


@pytest.mark.parametrize("envs, ratio", [(1, 8), (1, 48), (2, 5)])
def test_updates_follow_the_train_ratio(envs, ratio, tmp_path):
    """One when there is a batch, then `train_ratio` steps a record: those of resets count too, but are no frame."""
    flags = ["--env-id", "toy_envs:Vector-v0", "--num-envs", envs, "--train-ratio", ratio]
    state = checkpoint(train(script, tmp_path, *flags, frames=100 * envs))
    (frame, updates, _), records = state["progress"], state["replay"]["count"] * envs
    assert (records, frame) == (104 * envs, 100 * envs)  # five episodes of 20 steps; all but one have a reset
    start = next(count for count in range(0, records, envs) if count - 8 * envs >= 4 * 8)  # a first batch is there
    assert updates == 1 + (records - start) * ratio // (4 * 8) > 8


def test_latents_are_written_back_an_update_late(tmp_path, monkeypatch):
    """As in the authors' code: when the last of n updates has ended, those of the one before it are in the replay."""
    update, updates = script.Agent.update, []

    def numbered(self, data):
        latents, metrics = update(self, data)
        updates.append(len(updates) + 2.0)  # what acts is at most 1
        return latents | {"deter": torch.full_like(latents["deter"], updates[-1])}, metrics

    monkeypatch.setattr(script.Agent, "update", numbered)
    monkeypatch.setattr(script.Agent, "act", torch.no_grad()(lambda self, obs, carry: carry))  # does nothing
    run = train(script, tmp_path, "--env-id", "toy_envs:Vector-v0", frames=100)
    args, path = script.parse_args(["--resume", str(run)]), run / "replay/steps"
    env = script.make_env(args)
    layout = script.Agent(args, env.observation_space.spaces, env.action_space).layout()
    assert len(updates) > 8 and np.memmap(path, layout, "r")["deter"].max() == updates[-2]


def test_a_replay_that_holds_less_than_a_first_batch_is_learnt_from_when_it_is_full(tmp_path):
    run = train(script, tmp_path, "--env-id", "toy_envs:Vector-v0", "--replay-size", 30, frames=60)
    assert checkpoint(run)["progress"][1] > 5
