"""What PlaNet, DreamerV1 and DreamerV2 share: recorded updates and functions, sizes, who learns from what."""

import importlib
import json

import gymnasium as gym
import numpy as np
import pytest
import test_dreamer_v1
import test_dreamer_v2
import torch
from conftest import all_losses, calls, checkpoint, reached, run_script, small, tiny, train
from recordings import DEVICE, GOLDEN, close, draws, gradients, tensor

DREAMERS = {"dreamer_v1": test_dreamer_v1, "dreamer_v2": test_dreamer_v2}


@pytest.fixture(params=[(tests, path) for tests in DREAMERS.values() for path in tests.CASES], ids=lambda x: x[1].stem)
def case(request):
    tests, path = request.param
    return tests.Case(path)


@pytest.fixture(params=DREAMERS)
def dreamer(request):
    return importlib.import_module(request.param)


@pytest.fixture
def functions(dreamer):
    return np.load(next(GOLDEN.rglob(f"golden_functions_{dreamer.__name__[-2:]}.npz")))


def test_golden_data_is_there():
    for name in "planet* v1_* functions_v1 v2_* functions_v2 [a-z]_* [a-z]_*_opt functions wm*".split():
        assert [*GOLDEN.rglob(f"golden_{name}.npz")], name


def test_parity_updates(case, monkeypatch):
    """Losses, gradients and parameters of each recorded update; the whole of it as training does it."""
    golden, agent, args = case.golden, case.agent, case.args
    grads, names = {}, {id(p): name for name, p in agent.named_parameters()}
    for optimizer in agent.optimizers.values():

        def step(values, optimizer=optimizer, original=optimizer.step):
            grads.update((names[id(p)], value.clone()) for p, value in zip(optimizer.params, values, strict=True))
            return original(values)

        monkeypatch.setattr(optimizer, "step", step)
    rates = {"world_model.": args.model_rate, "behaviour.actor": args.actor_rate}
    rates |= {"behaviour.critic": args.critic_rate, "behaviour.slow": args.critic_rate}
    scales = {"losses/kl_loss": args.kl_scale, "losses/continue_loss": args.continue_scale}
    steps = sorted({int(key[6]) for key in golden.files if key.startswith("params") and key[6] != "0"})
    assert steps
    before = {name: parameter.detach().clone() for name, parameter in agent.named_parameters()}
    for step in steps:
        read = lambda name: golden[f"step{step}/{name}"]  # noqa: B023
        with case.samples(case.noise(step, "post", "imagined")):
            metrics = agent.update(case.data)
        model = [key for key in metrics if key.startswith("losses/") and "actor" not in key and "critic" not in key]
        close(sum(scales.get(key, 1.0) * metrics[key] for key in model), read("loss/model"))
        for ours, theirs in case.parts.items():
            close(metrics[f"losses/{ours}"], read(f"loss_part/{theirs}"))
        for ours, theirs in (("actor", "actor"), ("critic", case.critic)):
            close(metrics[f"losses/{ours}_loss"], read(f"loss/{theirs}"), rtol=1e-3)
        for ours, theirs in (("world_model", "model"), ("actor", "actor"), ("critic", case.critic)):
            close(metrics[f"stats/{ours}_grad_norm"], read(f"gradnorm/{theirs}"), rtol=1e-3)
        close(metrics["stats/return_mean"], read(f"imag/{case.returns}").mean(), rtol=1e-3)
        if step == 1:
            recorded = {key for key in golden.files if key.startswith("step1/grad/")}
            assert recorded == {f"step1/grad/{case.names[name][0]}" for name in grads}
            for name, grad in grads.items():
                theirs = case.parameter("step1/grad/", name).cpu()
                np.testing.assert_allclose(grad.cpu(), theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
        for name, parameter in agent.named_parameters():
            rate = next(rate for prefix, rate in rates.items() if name.startswith(prefix))
            mine, theirs = parameter - before[name], case.parameter(f"params{step}/", name) - before[name]
            most = 0.02 * rate * step + 1e-7 * parameter.abs().max() + 1e-6 * ("slow" in name)
            assert (mine - theirs).abs().max() < most, name


def test_parity_acting(case):
    golden, agent = case.golden, case.agent
    for mode in ("train", "eval"):
        carry, step = None, 0
        while f"policy_{mode}/{step}/action" in golden:
            read = lambda name: golden[f"policy_{mode}/{step}/{name}"]  # noqa: B023
            is_first, noise = case.acting(mode, step, read)
            obs = {"image": tensor(golden["in/image_uint8"][: len(is_first), step]), "is_first": is_first}
            carry = agent.initial(len(is_first)) if carry is None else carry
            with case.samples(noise):
                carry = agent.act(obs, carry, training=mode == "train")
            for mine, theirs in zip(carry, ("post_deter", "post_stoch", "action"), strict=True):
                close(mine, case.stoch(read(theirs)) if theirs == "post_stoch" else read(theirs))
            step += 1
        assert step > 1


def test_parity_lambda_return(dreamer, functions):
    names, read = ("reward", "pcont", "value", "bootstrap"), lambda name: functions[f"lambda_return/{name}"].T
    for lmbda in ("0.0", "0.95", "1.0"):
        inputs = [tensor(read(name)).requires_grad_() for name in names]
        reward, cont, value, bootstrap = inputs
        value = torch.cat([value, bootstrap.unsqueeze(1)], 1)
        returns = dreamer.lambda_return(reward, cont, value, float(lmbda))
        close(returns, read(f"out_{lmbda}"))
        for grad, name in zip(gradients(returns, inputs, read("upstream")), names, strict=True):
            close(grad, read(f"grad_{name}_{lmbda}"))


def test_parity_gaussian_latents(dreamer, functions):
    names = "mean_p", "std_p", "mean_q", "std_q"
    stats = [tensor(functions[f"kl_normal/{name}"]).requires_grad_() for name in names]
    kl = dreamer.kl_gaussian(torch.stack(stats[:2], -1), torch.stack(stats[2:], -1))
    close(kl, functions["kl_normal/kl"])
    for grad, name in zip(gradients(kl, stats), names, strict=True):
        close(grad, functions[f"kl_normal/grad_{name}"])
    x, deviation = functions["act/x"], "softplus" if dreamer.__name__ == "dreamer_v1" else "sigmoid2"
    moments = dreamer.gaussian(tensor(x).unsqueeze(-1).expand(-1, 2))[..., 0, :]
    close(moments, np.stack([x, functions[f"act/{deviation}"] + 0.1], -1))
    close(dreamer.normal_loss(tensor(x), torch.zeros(x.shape, device=DEVICE)), (x**2 + np.log(2 * np.pi)) / 2)


def test_parity_one_hot_actions(dreamer, functions):
    actor = dreamer.Actor(dreamer.Args(units=4), 3, 3, True).to(DEVICE)
    logit = tensor(functions["onehot/logits"]).requires_grad_()
    policy = dreamer.OneHotCategorical(logits=logit)
    probs, index = policy.probs, tensor(functions["onehot/sample"]).argmax(-1, keepdim=True)
    noise = (probs.cumsum(-1).gather(-1, index) - probs.gather(-1, index) / 2).detach()
    with draws(rand_like=[noise]):
        sample = dreamer.sample_onehot(policy.probs)
    close(sample, functions["onehot/sample"])
    close(gradients(sample, logit, functions["onehot/upstream"])[0], functions["onehot/grad_logits"])
    close(policy.log_prob(sample.detach()), functions["onehot/log_prob"])
    close(policy.entropy(), functions["onehot/entropy"])
    close(actor.mode(policy) if hasattr(actor, "mode") else policy.mode, functions["onehot/mode"])


def test_parity_layers(dreamer, functions):
    kernel, up_kernel = (functions[f"{name}/kernel"].transpose(3, 2, 0, 1) for name in ("conv", "deconv"))
    conv = torch.nn.Conv2d(*kernel.shape[1::-1], 4, 2).to(DEVICE)
    up = dreamer.Deconv(*up_kernel.shape[:2], up_kernel.shape[2], 2).to(DEVICE)
    for layer, weight, name in ((conv, kernel, "conv"), (up, up_kernel, "deconv")):
        layer.weight.data, layer.bias.data = tensor(weight), tensor(functions[f"{name}/bias"])
        image = tensor(functions[f"{name}/in"]).permute(0, 3, 1, 2)
        close(layer(image).permute(0, 2, 3, 1), functions[f"{name}/out"])
    close(dreamer.MLP(2, 2, 1)[0][1](tensor(functions["act/x"])), functions["act/elu"])


def test_parity_adam(dreamer, functions):
    config = json.loads(str(functions["config_json"]))["adam"]
    decay = dict(weight_decay=config["wd"]) if "wd" in config else {}
    args, weight = dreamer.Args(epsilon=config["eps"], clip=config["clip"], **decay), tensor(functions["adam/w0"])
    optimizer = dreamer.Adam([torch.nn.Parameter(weight, trained) for trained in (True, False)], config["lr"], args)
    for step, grad in enumerate(functions["adam/grads"], 1):
        norm = optimizer.step([tensor(grad)])
        close(norm, functions[f"adam/norm{step}"])
        close(optimizer.params[0], functions[f"adam/w{step}"], rtol=1e-5, atol=1e-6)


BOX, RNN = gym.spaces.Box(-1, 1, (6,)), dict(encoder=690_144, rssm=557_320, decoder=3_795_555, reward_head=250_201)
SSM = dict(encoder=690_144, rssm=19_460 + 229_060, decoder=3_795_555 - 200 * 1024, reward_head=190_201)
V1 = dict(encoder=690_144, rssm=557_920, decoder=3_795_555, reward_head=253_201, actor=578_412, critic=413_601)
V2 = dict(encoder=1_551_312, rssm=1_247_248, decoder=9_886_611, reward_head=971_601, actor=976_012, critic=971_601)
ATARI = dict(encoder=1_549_776, rssm=5_664_848, decoder=10_497_553, reward_head=1_131_601, continue_head=1_131_601)
ATARI |= dict(actor=1_138_418, critic=1_131_601, slow_critic=1_131_601)


COUNTS = [("planet", dict(dynamics=kind), 3, BOX, 5_293_220, RNN) for kind in ("rssm", "rnn")]
COUNTS += [("planet", dict(dynamics="ssm"), 3, BOX, sum(SSM.values()), SSM)]
COUNTS += [("dreamer_v1", "dmc", 3, BOX, 5_296_820, V1)]
ENDS = V1 | dict(continue_head=413_601)
COUNTS += [("dreamer_v1", dict(predict_continue=True), 3, BOX, 5_296_820 + 413_601, ENDS)]
COUNTS += [("dreamer_v2", "dmc", 3, BOX, 13_656_772, V2 | dict(slow_critic=971_601))]
COUNTS += [("dreamer_v2", "atari", 1, gym.spaces.Discrete(18), 19_975_379, ATARI)]


@pytest.mark.parametrize("name, options, channels, action, total, counts", COUNTS)
def test_parameter_counts(name, options, channels, action, total, counts):
    """Those of the authors' code, counted by running it; PlaNet's heads see 200 numbers less without recurrence."""
    script = importlib.import_module(name)
    args = script.Args(**(script.PRESETS[options] if isinstance(options, str) else options))
    agent = script.Agent(args, {"image": gym.spaces.Box(0, 255, (64, 64, channels), np.uint8)}, action)
    count = lambda module: sum(p.numel() for p in module.parameters())
    modules = [agent.world_model, getattr(agent, "behaviour", torch.nn.Module())]
    assert {name: count(part) for module in modules for name, part in module.named_children()} == counts
    assert count(agent.world_model) == total


@pytest.mark.parametrize("source", ["all", "image", "reward"])
@pytest.mark.parametrize("discrete", [True, False])
def test_who_shapes_the_representation(dreamer, discrete, source):
    agent, data = small(dreamer, discrete, representation_from=source)
    model, (losses, _) = agent.world_model, all_losses(dreamer, agent, data)
    assert reached(losses["recon_loss_vector"].mean(), model.encoder) == (source != "reward")
    assert reached(losses["reward_loss"].mean(), model.encoder) == (source != "image")
    assert reached(losses["continue_loss"].mean(), model.encoder) == (source != "image")
    assert reached(losses["reward_loss"].mean(), model.reward_head) and reached(losses["kl_loss"], model.encoder)
    assert reached(losses["recon_loss_vector"].mean(), model.decoder)


@pytest.mark.parametrize("discrete", [True, False])
def test_only_its_own_optimizer_moves_a_part(dreamer, discrete):
    agent, data = small(dreamer, discrete)
    parts = {"world_model": agent.world_model, "actor": agent.behaviour.actor, "critic": agent.behaviour.critic}
    for trained in ("actor", "critic"):
        before = {name: [p.clone() for p in part.parameters()] for name, part in parts.items()}
        losses, _ = all_losses(dreamer, agent, data)
        agent.descend(**{trained: losses[f"{trained}_loss"].mean()})
        for name, part in parts.items():
            moved = any(not torch.equal(a, b) for a, b in zip(before[name], part.parameters(), strict=True))
            assert moved == (name == trained)


@pytest.mark.parametrize("discrete", [True, False])
def test_without_a_critic_returns_are_sums_of_rewards(dreamer, discrete):
    agent, data = small(dreamer, discrete, critic=False)
    with calls(dreamer, "lambda_return") as computed:
        losses, stats = all_losses(dreamer, agent, data)
    (((reward, cont, *_), _),) = computed
    totals = [torch.zeros(len(reward))]
    for t in reversed(range(reward.shape[1] - 1)):
        totals.append(reward[:, t] + cont[:, t] * totals[-1])
    close(stats["return_mean"], torch.stack(totals[1:]).mean())
    assert not reached(losses["actor_loss"].mean(), agent.behaviour.critic)


ABLATIONS = {
    "planet": [{}, dict(dynamics="ssm"), dict(dynamics="rnn"), dict(activation="elu"), dict(overshooting_distance=4)],
    "dreamer_v1": [{}, dict(critic=False), dict(predict_continue=False)],
    "dreamer_v2": [dict(critic=False), dict(slow_critic_every=1), dict(kl_balance=0.5), dict(classes=1)]
    + [dict(predict_continue=False), dict(behaviour_from="replay")],
}


@pytest.mark.parametrize("name, option", [(name, option) for name in ABLATIONS for option in ABLATIONS[name]], ids=str)
@pytest.mark.parametrize("discrete", [True, False])
def test_ablations_learn(name, option, discrete):
    """All losses stay finite, those of the model fall, and all parameters move but the prior of a model without KL."""
    agent, data = small(importlib.import_module(name), discrete, model_rate=1e-2, free_nats=0.0, **option)
    before, metrics = {name: parameter.clone() for name, parameter in agent.named_parameters()}, []
    for _ in range(30):
        torch.manual_seed(0)
        metrics.append(agent.update(data))
    assert all(value.isfinite() for step in metrics for value in step.values())
    assert ("losses/overshooting_loss" in metrics[0]) == ("overshooting_distance" in option)
    for key in ("losses/recon_loss_vector", "losses/reward_loss"):
        assert metrics[-1][key] < metrics[0][key]
    still = {name for name, parameter in agent.named_parameters() if torch.equal(parameter, before[name])}
    assert still == {name for name in before if "prior_net" in name and option.get("dynamics") == "rnn"}


TOO_SHORT = [("planet", "--batch-length", 100), ("dreamer_v1", "--batch-length", 30), ("dreamer_v1", "--prefill", 1000)]


@pytest.mark.parametrize("name, flag, value", TOO_SHORT)
def test_a_run_without_an_update_says_why(name, flag, value, tmp_path):
    script, frames = importlib.import_module(name), 300 if name == "planet" else 60
    flags = ["--env-id", "toy_envs:Vector-v0", *tiny(script), flag, value, "--total-timesteps", frames]
    assert "no update: " in run_script(script, *flags, cwd=tmp_path).stdout


@pytest.mark.parametrize("name", ["planet", *DREAMERS])
def test_a_run_goes_on_with_longer_sequences_than_some_episodes(name, tmp_path):
    script = importlib.import_module(name)
    run = train(script, tmp_path, "--env-id", "toy_envs:Vector-v0", "--env-kwargs", "trouble", "short")
    run_script(script, "--resume", run, "--batch-length", 13, "--total-timesteps", 300, cwd=tmp_path)
    after = checkpoint(run)["replay"]["episodes"]
    assert min(steps for _, steps, _ in after) >= 13  # the environment's have 5 to 15


@pytest.mark.parametrize("name", [*DREAMERS, "dreamer_v3"])
def test_sequences_take_two_steps_at_least(name):
    for flag in ("--batch-length", "--imagination-horizon")[: 1 + (name in DREAMERS)]:
        with pytest.raises(SystemExit, match=f"{flag} 1: the least is 2"):
            importlib.import_module(name).parse_args([flag, "1"])
