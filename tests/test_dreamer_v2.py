"""dreamer_v2.py against recorded outputs of the authors' code (tests/golden/dreamer_v2/README.md), and its maths."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import all_losses, calls, reached, run_script, small, train
from recordings import DEVICE, GOLDEN, Recorded, close, gradients, replaced, tensor
from test_replay import a_replay, add_episode, drawn

import dreamer_v2 as script

CASES = sorted(GOLDEN.rglob("golden_v2_*.npz"))
FUNCTIONS = next(GOLDEN.rglob("golden_functions_v2.npz"), None)


class Case(Recorded):
    """A recorded model, and its batch."""

    critic, returns = "critic", "target"  # as they are called there

    def __init__(self, path):
        self.golden = golden = np.load(path)
        config = json.loads(str(golden["config_json"]))
        official = config["official"]
        self.gaussian = not config["classes"]
        names = dict(kl_scale="loss_scales.kl", kl_balance="kl.balance", free_nats="kl.free", lmbda="discount_lambda")
        names |= dict(predict_continue="pred_discount", continue_scale="loss_scales.discount", discount="discount")
        names |= dict(actor_gradient="actor_grad", actor_gradient_mix="actor_grad_mix", entropy_scale="actor_ent")
        names |= dict(model_rate="model_opt.lr", actor_rate="actor_opt.lr", critic_rate="critic_opt.lr")
        names |= dict(epsilon="model_opt.eps", weight_decay="model_opt.wd", clip="model_opt.clip")
        sizes = {name: config[name] for name in ("deter", "hidden", "stoch", "units", "depth")}
        sizes |= {ours: official[theirs] for ours, theirs in names.items()}
        sizes |= {name: float(sizes[name]) for name in ("actor_gradient_mix", "entropy_scale")}
        sizes |= dict(imagination_horizon=config["horizon"], slow_critic_every=config["slow_every"])
        sizes |= dict(classes=config["classes"] or 1, tanh_rewards=official["clip_rewards"] == "tanh")
        self.args = script.Args(compile=False, amp=False, **sizes)
        self.discrete, self.actions = config["discrete_actions"], config["A"]
        space = gym.spaces.Discrete(self.actions) if self.discrete else gym.spaces.Box(-1, 1, (self.actions,))
        spaces = {"image": gym.spaces.Box(0, 255, golden["in/image_uint8"].shape[2:], np.uint8)}
        self.agent = script.Agent(self.args, spaces, space, DEVICE)
        self.official_names()
        self.load("params0/")
        self.data = {"image": tensor(golden["in/image_uint8"]), "reward": tensor(golden["in/reward_raw"])}
        self.data |= {key: tensor(golden[f"in/{key}"]) for key in ("action", "is_first", "is_terminal")}
        self.parts = {"recon_loss_image": "image_loss", "reward_loss": "reward_loss", "kl_loss": "kl_loss"}
        self.parts |= {"continue_loss": "discount_loss"} if self.args.predict_continue else {}

    def official_names(self):
        """Our parameter -> (official name, kind of layout)."""
        self.names, add, wm, bh = {}, self.add, "world_model", "behaviour"
        for i in range(4):
            add(f"{wm}.encoder.convs.{i}.0", f"encoder/conv{i}", "conv")
            add(f"{wm}.decoder.convs.{i}.0" if i < 3 else f"{wm}.decoder.convs.3", f"decoder/conv{i}", "conv")
        add(f"{wm}.decoder.map", "decoder/convin", "dense_feat")
        layers = ("inputs.0.0", "img_in"), ("gates", "cell/dense"), ("prior_net.0.0", "img_out_0")
        layers += ("prior_net.1", "img_dist_0"), ("post_net.0.0", "obs_out"), ("post_net.1", "obs_dist")
        for ours, theirs in layers:
            add(f"{wm}.rssm.{ours}", f"rssm/{theirs}")
        self.names[f"{wm}.rssm.gates_norm.weight"] = "rssm/cell/norm/gamma", "same"
        self.names[f"{wm}.rssm.gates_norm.bias"] = "rssm/cell/norm/beta", "same"
        heads = [(f"{wm}.reward_head", "reward"), (f"{wm}.continue_head", "discount")]
        heads += [(f"{bh}.critic", "critic"), (f"{bh}.slow_critic", "target_critic"), (f"{bh}.actor.layers", "actor")]
        for ours, theirs in heads:
            for i in range(4):
                add(f"{ours}.{i}.0", f"{theirs}/dense{i}", "dense" if i else "dense_feat")
            if theirs != "actor":
                add(f"{ours}.4", f"{theirs}/out")
        for i, output in enumerate(["out"] if self.discrete else ["out", "out_std"]):
            add(f"{bh}.actor.outputs.{i}", f"actor/{output}")

    def noise(self, step, *parts):
        """What a recorded update drew: of the posterior, of actions and states that are imagined."""
        read = lambda name: tensor(self.golden[f"step{step}/noise/{name}"])
        queue = list(read("post").unbind(1)) if "post" in parts else []
        if "imagined" in parts:
            actions = read("imag_action" if self.discrete else "imag_action_u")
            queue += [x for pair in zip(actions, read("imag_state"), strict=True) for x in pair]
        return queue

    def samples(self, noise):
        def onehot(take, probs):
            return F.one_hot(take(probs).argmax(-1), probs.shape[-1]).float() + (probs - probs.detach())

        normal = lambda take, like: take(like[..., 0]).unsqueeze(-1)
        uniform = torch, "rand_like", lambda take, like: take(like)
        return replaced(noise, (script, "sample_onehot", onehot), (torch, "randn_like", normal), uniform)

    def acting(self, mode, step, read):
        """is_first of a recorded step, and what it drew."""
        action = "noise_action" if self.discrete else "noise_action_u"
        names = ["noise_post", action] if mode == "train" else ["noise_post"]
        return tensor(read("is_first")), [tensor(read(name)) for name in names]

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


def test_parity_world_model(case):
    golden, model, args, data = case.golden, case.agent.world_model, case.args, case.learnt()
    close(data["reward"], golden["in/reward"])
    start = case.agent.start(data)
    embed = model.encoder(data)
    close(embed, golden["step1/wm/embed"])
    with case.samples(case.noise(1, "post")):
        deter, stoch, post = model.rssm.observe(embed, data["action"], data["is_first"], start)
    prior = model.rssm.logit(model.rssm.prior_net(deter))
    close(deter, golden["step1/wm/post_deter"])
    close(deter, golden["step1/wm/prior_deter"])
    close(stoch, case.stoch(golden["step1/wm/post_stoch"]))
    close(post, case.stats("step1/wm/post_"))
    close(prior, case.stats("step1/wm/prior_"))
    with case.samples([tensor(golden["step1/noise/prior"])]):
        close(model.rssm.sample(prior), case.stoch(golden["step1/wm/prior_stoch"]))
    close(model.rssm.kl(post, prior), golden["step1/wm/kl"])
    close(script.balance_kl(model.rssm.kl, post, prior, args.kl_balance, args.free_nats), golden["step1/wm/kl_loss"])
    with case.samples(case.noise(1, "post")):
        losses, *_, feat, stats = model.loss(data, start)
    close(feat, case.feat(golden["step1/wm/feat"]))
    close(stats["kl"], golden["step1/wm/kl"].mean())
    close(model.decoder(feat)["image"], golden["step1/wm/image_mean"])
    close(losses["recon_loss_image"], -golden["step1/wm/image_logprob"])
    close(model.reward(feat), golden["step1/wm/reward_mean"])
    close(losses["reward_loss"], -golden["step1/wm/reward_logprob"])
    if args.predict_continue:
        close(model.continue_head(feat).squeeze(-1), golden["step1/wm/discount_logit"])
        close(losses["continue_loss"], -golden["step1/wm/discount_logprob"])
    assert set(losses) == set(case.parts)
    for ours, theirs in case.parts.items():
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
    golden, agent, args, data = case.golden, case.agent, case.args, case.learnt()
    with case.samples(case.noise(1, "post")):
        losses, deter, stoch, feat, _ = agent.world_model.loss(data, agent.start(data))
    scales = {"kl_loss": args.kl_scale, "continue_loss": args.continue_scale}
    total = sum(scales.get(name, 1.0) * loss.mean() for name, loss in losses.items())
    close(total, golden["step1/loss/model"])
    agent.descend(world_model=total)
    behaviour, read = agent.behaviour, lambda name: np.moveaxis(golden[f"step1/imag/{name}"], 0, 1)
    imagine, compute = calls(agent.world_model.rssm, "imagine"), calls(script, "lambda_return")
    with case.samples(case.noise(1, "imagined")), imagine as imagined, compute as computed:
        losses, stats = behaviour.loss(agent.world_model, data, deter, stoch, feat)
    ((_, (imag_feat, imag_action)),), (((reward, cont, value, _), returns),) = imagined, computed
    close(imag_feat, case.feat(read("feat")))
    close(imag_action, read("action")[:, 1:])  # ours: taken at a state, theirs: that led to it
    close(reward[:, :-1], read("lr_reward"))
    close(cont, read("discount"))
    close(value[:, :-1], read("lr_value"))
    close(value[:, :-2], read("baseline"))
    close(value[:, -1], golden["step1/imag/bootstrap"])
    close(returns, read("target"))
    close(torch.cat([torch.ones_like(cont[:, :1]), cont[:, :-1]], 1).cumprod(1), read("weight"))
    policy = behaviour.actor(imag_feat[:, :-2])
    if case.discrete:
        close(policy.logits, tensor(read("policy_logits")).log_softmax(-1).cpu())
    else:
        close(policy.mode, read("policy_loc"))
        close(policy.base_dist.scale, read("policy_scale"))
    close(policy.entropy(), read("entropy"))
    close(policy.log_prob(imag_action[:, :-1]), read("logprob"), atol=1e-4)
    close(losses["actor_loss"].mean(), golden["step1/loss/actor"])
    close(losses["critic_loss"].mean(), golden["step1/loss/critic"])
    close(stats["return_mean"], read("target").mean())


def test_parity_kl(functions):
    read = lambda name: tensor(functions[name])
    close(script.kl_divergence(read("kl_onehot/logits_p"), read("kl_onehot/logits_q")), functions["kl_onehot/kl"])
    post, prior = (read(f"kl_balance/{name}_logit").requires_grad_() for name in ("post", "prior"))
    checked = 0
    for key in sorted(key for key in functions.files if key.endswith("free_freeavg_forward_balance")):
        free, average, forward, balance = functions[key].tolist()
        if forward or not average:  # options that no preset uses
            continue
        loss, case = script.balance_kl(script.kl_divergence, post, prior, balance, free), key.rpartition("/")[0]
        close(loss, functions[f"{case}/loss"])
        for grad, name in zip(gradients(loss, (post, prior)), ("post", "prior"), strict=True):
            close(grad, functions[f"{case}/grad_{name}"])
        checked += 1
    assert checked


def truncated_normal(loc, scale):
    """A policy over actions (..., A)."""
    script.Distribution.set_default_validate_args(False)  # as the actor does
    return script.Independent(script.TruncatedNormal(loc, scale), 1)


def test_parity_truncated_normal(functions, monkeypatch):
    read = lambda name: tensor(functions[f"trunc_normal/{name}"])
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


def test_parity_gru(functions):
    read = lambda name: tensor(functions[f"ln_gru/{name}"])
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


# Maths


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("source", ["reinforce", "dynamics", "both", "replay"])
def test_who_moves_the_actor(source, discrete):
    options = dict(behaviour_from="replay") if source == "replay" else dict(actor_gradient=source)
    agent, data = small(script, discrete, entropy_scale=0.0, **options)
    model, behaviour, (losses, _) = agent.world_model, agent.behaviour, all_losses(script, agent, data)
    actor, critic = losses["actor_loss"].mean(), losses["critic_loss"].mean()
    assert reached(actor, behaviour.actor) and reached(critic, behaviour.critic)
    assert not reached(actor, behaviour.critic) and not reached(critic, behaviour.actor)
    assert not reached(critic, model)
    assert reached(actor, model.rssm) == (source in ("dynamics", "both"))  # through it, though it is not moved
    assert not reached(actor, model.encoder)
    size = (2, 3) if source == "replay" else (10, 3)
    assert losses["actor_loss"].shape == size and losses["critic_loss"].shape == (size[0], size[1] + 1)


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


def test_extreme_policies_stay_finite(monkeypatch):
    policy = torch.tensor([[1.0, -1.0, 1.0]], requires_grad=True), torch.tensor([[0.1, 0.1, 2.1]], requires_grad=True)
    for noise in (0.0, 0.5, 1.0):
        monkeypatch.setattr(torch, "rand_like", lambda x, noise=noise: torch.full_like(x, noise))
        dist = truncated_normal(*policy)
        action = dist.rsample()
        loss = action.sum() + dist.entropy().sum() + dist.log_prob(action.detach()).sum()
        assert all(grad.isfinite().all() for grad in gradients(loss, policy)) and action.abs().max() < 1


def test_the_slow_critic_is_copied_at_its_interval():
    agent, data = small(script, True, slow_critic_every=3, critic_rate=0.1)
    same = []
    for _ in range(7):
        agent.update(data)
        pairs = zip(agent.behaviour.critic.parameters(), agent.behaviour.slow_critic.parameters(), strict=True)
        same.append(all(torch.equal(a, b) for a, b in pairs))
    assert same == [True, False, False, True, False, False, True]


# Replay and schedule


def test_an_episode_that_was_left_is_not_drawn(tmp_path):
    replay = a_replay(script, tmp_path, [8])
    add_episode(replay, 7)
    assert set(drawn(replay, 100)) == {8, 9, 10}


def test_ends_are_prioritised(tmp_path):
    counts = np.bincount(drawn(a_replay(script, tmp_path, [20, 1], ends=True), 21_000))
    assert len(counts) == 16
    assert counts[15] == pytest.approx(6000, rel=0.1) and counts[0] == pytest.approx(1000, rel=0.2)


def test_episodes_that_are_overwritten_are_gone(tmp_path):
    replay = a_replay(script, tmp_path, [10, 10, 10, 10], capacity=25)
    assert set(drawn(replay, 100)) == set(range(20, 26))
    again = a_replay(script, tmp_path, [], capacity=25, saved=replay.state_dict())
    assert set(drawn(again, 100)) == set(range(20, 26)) and again.count == replay.count
    assert len(a_replay(script, tmp_path / "long", [10, 40, 1], capacity=25)) == 0


def test_schedule(tmp_path, events):
    """After a prefill of whole episodes all starts anew: pretraining, an update at the next step, one every 5 steps."""
    seen, flags = events(script), "--prefill 10 --pretrain 3 --train-every 5 --batch-length 4 --env-kwargs length 14"
    run = train(script, tmp_path, "--env-id", "toy_envs:Vector-v0", *flags.split(), "--action-repeat", 2, frames=48)
    run_script(script, "--resume", run, "--total-timesteps", 68, cwd=tmp_path)  # which has no prefill
    # 7 steps, one that resets, 3 of an episode that is left; two episodes of 7 steps, between them one that resets
    assert "".join(seen) == 11 * "r" + "uuu" + "fuaaaaaua" + "a" + "faaauaaa" + "fauaaaaaua" + "faa"
