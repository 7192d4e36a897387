"""planet.py against recorded outputs of the authors' code (tests/golden/planet/README.md), and its maths."""

import ast
import re
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import checkpoint, reached, run_script, scalars, small, train
from recordings import DEVICE, GOLDEN, Recorded, close, draws, tensor
from torch import nn

import planet as script

FILES = sorted(GOLDEN.rglob("golden_planet*.npz"))
PIXELS = {"image": gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)}
PLAIN = dict(compile=False, amp=False)
small = partial(small, script, device=DEVICE)
KINDS = {"rssm": {}, "rssm_det": dict(dynamics="rnn"), "ssm": dict(dynamics="ssm"), "rssm_elu": dict(activation="elu")}


class GivenEncoder(nn.Module):
    """Takes embed from the batch."""

    images = ()

    def forward(self, data):
        return data["embed"]


class VectorDecoder(nn.Module):
    """The recorded models' picture is a vector."""

    images = ()

    def __init__(self, feat_dim, sizes, units):
        super().__init__()
        self.feat_dim, self.head = feat_dim, script.MLP(feat_dim, units, 1, sizes)

    def forward(self, feat):
        return {"vector": self.head(feat[..., -self.feat_dim :])}


class Case(Recorded):
    """A recorded model, and its batch."""

    def __init__(self, path, kind, **options):
        self.golden, self.kind = np.load(path), kind
        self.config = c = ast.literal_eval(str(self.golden["cfg"]))
        sizes = dict(stoch=c["S"], deter=c["H"], hidden=c["U"], units=c["units"], free_nats=c["free"], **PLAIN)
        self.args = args = script.Args(**sizes | KINDS[kind] | options)
        action = gym.spaces.Box(-1, 1, (c["A"],))
        self.agent = script.Agent(args, {"vector": gym.spaces.Box(-1, 1, (c["V"],))}, action, DEVICE)
        self.model = model = self.agent.world_model
        self.feat_dim = model.decoder.feat_dim
        model.encoder, model.decoder = GivenEncoder(), VectorDecoder(self.feat_dim, c["V"], c["units"])
        model.rssm = script.RSSM(args, c["E"], c["A"])
        model.reward_head = script.MLP(self.feat_dim, c["units"], 3, 1)  # recorded with ReLU in all cases
        self.agent.to(DEVICE)
        self.names = self.official_names()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                value = self.parameter("param", name)
                assert value.shape == parameter.shape, name
                parameter.copy_(value)
        read = lambda name: tensor(self.golden[f"{kind}/in/{name}"])
        self.data = {name: read(name) for name in ("embed", "action", "reward")} | {"vector": read("image")}
        self.data["is_first"] = torch.arange(c["T"], device=DEVICE).expand(c["B"], -1) == 0
        mean_only = f"{kind}/in/eps_post" not in self.golden
        self.noise = [] if mean_only else read("eps_post").unbind(1)
        self.start = self.agent.start(self.data)

    def official_names(self):
        """Our parameter -> official names, whose arrays lie side by side in ours, and the layout."""
        names, cell = {}, "ssm" if self.kind == "ssm" else "rssm"

        def add(ours, *theirs, kind="dense"):
            names[f"{ours}.weight"] = [f"{name}/kernel" for name in theirs], kind
            names[f"{ours}.bias"] = [f"{name}/bias" for name in theirs], "same"

        t, p = f"rnn/{cell}/transition", f"rnn/{cell}/posterior"
        add("rssm.inputs.0.0", f"{t}/dense")
        add("rssm.post_net.0.0", f"{p}/dense")
        add("rssm.post_net.1", f"{p}/dense_1", f"{p}/dense_2")
        if cell == "ssm":
            add("rssm.prior_net.0", f"{t}/dense_1", f"{t}/dense_2")
        else:
            add("rssm.prior_net.0.0", f"{t}/dense_1")
            add("rssm.prior_net.1", f"{t}/dense_2", f"{t}/dense_3")
            for ours, theirs in (("gates", "ru"), ("cand", "c")):
                names[f"rssm.{ours}.weight"] = [f"{t}/gru_cell/w_{theirs}"], "dense"
                names[f"rssm.{ours}.bias"] = [f"{t}/gru_cell/b_{theirs}"], "same"
        for ours, theirs, count in (("decoder.head", "head_image", 1), ("reward_head", "head_reward", 3)):
            for i in range(count + 1):
                kind, layer = "dense" if i else "feat", f"{ours}.{i}.0" if i < count else f"{ours}.{i}"
                add(layer, f"{theirs}/dense_{i}" if i else f"{theirs}/dense", kind=kind)
        return names

    def parameter(self, prefix, name):
        """Official arrays in our layout; zeros for gradients that are none."""
        theirs, kind = self.names[name]
        arrays = []
        for key in theirs:
            shape = self.golden[f"{self.kind}/param/{key}"].shape
            path = f"{self.kind}/{prefix}/{key}"
            arrays.append(self.golden[path] if path in self.golden else np.zeros(shape))
        array = np.concatenate(arrays, -1)
        if name == "rssm.gates.bias" and prefix == "param":  # the gates' offset of 1 stands in our formula
            array = array - 1
        if kind == "feat" and self.kind != "ssm":  # features: sample first there, deter first here
            array = self.feat(array.T).T
        return tensor(array if kind == "same" else array.T)

    def check_gradients(self, loss, prefix):
        parameters = dict(self.model.named_parameters())
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for (name, parameter), grad in zip(parameters.items(), grads, strict=True):
            mine, theirs = torch.zeros_like(parameter) if grad is None else grad, self.parameter(prefix, name).cpu()
            scale = max(float(theirs.abs().max()), 1e-3)
            np.testing.assert_allclose(mine.cpu(), theirs, rtol=1e-3, atol=1e-4 * scale, err_msg=name)


def stats(golden, prefix):
    return np.stack([golden[f"{prefix}mean"], golden[f"{prefix}stddev"]], -1)


def objective(agent, data):
    """What an update descends on."""
    totals = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent, "descend", lambda world_model: totals.append(world_model) or {})
        agent.update(data)
    return totals[0]


@pytest.fixture(params=[(f, k) for f in FILES for k in KINDS], ids=lambda param: f"{param[0].stem}-{param[1]}")
def case(request):
    return Case(*request.param)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_parity_world_model(case):
    golden, kind, model, data = case.golden, case.kind, case.model, case.data
    with draws(randn_like=case.noise):
        deter, stoch, post = model.rssm.observe(data["embed"], data["action"], data["is_first"], case.start)
    prior = model.rssm.prior(deter)
    close(post, stats(golden, f"{kind}/out/post_"))
    close(prior, stats(golden, f"{kind}/out/prior_"))
    close(stoch, golden[f"{kind}/out/post_sample"])
    with draws(randn_like=[tensor(golden[f"{kind}/in/eps_prior"])] if case.noise else []):
        close(model.rssm.sample(prior), golden[f"{kind}/out/prior_sample"])
    if kind != "ssm":
        close(deter, golden[f"{kind}/out/post_belief"])
        close(deter, golden[f"{kind}/out/prior_belief"])
    with draws(randn_like=case.noise):
        losses, values = model.loss(data, case.start)
    close(script.kl_gaussian(post, prior), golden[f"{kind}/out/kl"])
    close(values["kl"], golden[f"{kind}/out/kl"].mean())
    close(losses["recon_loss_vector"], -golden[f"{kind}/out/logprob_image"])
    close(losses["reward_loss"], -golden[f"{kind}/out/logprob_reward"])
    if f"{kind}/out/objective_divergence" in golden:
        close(losses["kl_loss"].mean(), golden[f"{kind}/out/objective_divergence"])
    with draws(randn_like=case.noise):
        total = objective(case.agent, data)
    close(total, golden[f"{kind}/out/total_loss"])
    case.check_gradients(total, "grad")


def test_parity_overshooting(path):
    case = Case(path, "rssm")
    golden, model, data, args = case.golden, case.model, case.data, case.args
    distance, T = case.config["D"], case.config["T"]
    with draws(randn_like=case.noise):
        deter, stoch, post = model.rssm.observe(data["embed"], data["action"], data["is_first"], case.start)
    noise = [tensor(golden["rssm/os/in_eps"])[:, : T - k, k] for k in range(distance)]
    with draws(randn_like=noise):
        kl = model.rssm.overshoot(deter, stoch, post, data["action"], distance)
    close(kl, golden["rssm/os/kl_cols_1_to_Dm1"])
    loss = (kl - args.free_nats).clamp(min=0).mean()
    close(loss, golden["rssm/os/loss_masked_mean"])
    case.check_gradients(loss, "os/grad")
    case = Case(path, "rssm", overshooting_distance=distance)
    with draws(randn_like=[*case.noise, *noise]):
        losses, _ = case.model.loss(data, case.start)
    close(losses["overshooting_loss"].mean(), golden["rssm/os/loss_masked_mean"])


def plan(evaluate, noise, elites):
    """The planner's result with normal noise (I, N, J, H, A)."""
    with draws(randn=noise):
        return script.plan(evaluate, noise.shape[1:], len(noise), elites, DEVICE)


def planned(monkeypatch, evaluate, noise, elites):
    """The planner's result, and what it saw and chose in each iteration: returns, mean, deviation."""
    seen, original = [], torch.var_mean
    returns = []

    def recorded(candidates):
        returns.append(evaluate(candidates))
        return returns[-1]

    def var_mean(*args, **options):
        var, mean = original(*args, **options)
        seen.append((mean.squeeze(1), (var + 1e-6).sqrt().squeeze(1)))
        return var, mean

    monkeypatch.setattr(torch, "var_mean", var_mean)
    result = plan(recorded, noise, elites)
    monkeypatch.undo()
    return result, torch.stack(returns), *(torch.stack(x) for x in zip(*seen, strict=True))


def toy(golden, envs=slice(None)):
    """The recorded system: x' = 0.9 x + 0.5 a + 0.1 sin 3x, which is to follow a target."""
    x0, target = tensor(golden["cem_toy/in/x0"])[envs], tensor(golden["cem_toy/in/target"])

    def evaluate(candidates):
        x, returns = x0.unsqueeze(1), 0.0
        for t in range(candidates.shape[2]):
            x = 0.9 * x + 0.5 * candidates[:, :, t] + 0.1 * (3 * x).sin()
            returns = returns - (x - target[t]).square().sum(-1)
        return returns

    return evaluate


def test_parity_planner(path, monkeypatch):
    golden = np.load(path)
    _, elites, *_ = golden["cem/JKIH"]
    noise = tensor(golden["cem_toy/in/eps_action"])
    result, *parts = planned(monkeypatch, toy(golden), noise, int(elites))
    close(result, golden["cem_toy/out/mean"])
    for part, name in zip(parts, ("returns", "mean_per_iter", "std_per_iter"), strict=True):
        close(part, golden[f"cem_toy/out/{name}"])


def model_planner(case, rows):
    """The model's evaluation of candidates from the recorded last states of some rows, with recorded noise."""
    golden, read = case.golden, lambda name: tensor(case.golden[f"rssm/out/post_{name}"])[rows, -1]
    state, step = (read("belief"), read("sample")), iter(tensor(golden["cem_rssm/in/eps_latent"])[:, rows])

    def evaluate(candidates):  # the recording's order of noise: (N, H, J, S)
        with draws(randn_like=[noise.flatten(0, 1) for noise in next(step).unbind(1)]):
            return script.predicted_return(case.model, state, candidates)

    return evaluate


def test_parity_planner_in_the_model(path, monkeypatch):
    case = Case(path, "rssm")
    golden = case.golden
    _, elites, *_ = golden["cem/JKIH"]
    noise = tensor(golden["cem_rssm/in/eps_action"])
    rows = slice(0, noise.shape[1])
    with torch.no_grad():
        result, *parts = planned(monkeypatch, model_planner(case, rows), noise, int(elites))
        close(result, golden["cem_rssm/out/mean"])
        for part, name in zip(parts, ("returns", "mean_per_iter", "std_per_iter"), strict=True):
            close(part, golden[f"cem_rssm/out/{name}"])
        for row in range(rows.stop):  # each alone
            one = slice(row, row + 1)
            alone = plan(model_planner(case, one), noise[:, one], int(elites))
            close(alone, golden["cem_rssm/out/mean"][one])


def test_parity_preprocessing(path):
    golden = np.load(path)
    image = tensor(golden["pre/in/image"])
    for bits in (5, 8):
        with draws(rand=[tensor(golden[f"pre/in/noise_bits{bits}"] * 2**bits)]):
            x = script.preprocess(image, bits)
        close(x, golden[f"pre/out/x_bits{bits}"])
        assert script.preprocess(x, bits) is x
        exact = torch.as_tensor(golden[f"pre/out/x_bits{bits}"])
        assert (script.postprocess(exact, bits).numpy() == golden[f"pre/out/post_uint8_bits{bits}"]).all()


def test_parity_adam(path):
    golden = np.load(path)
    count = len([key for key in golden.files if key.startswith("adam/out/norm")])
    args = script.Args(clip=2.0)
    params = [nn.Parameter(tensor(golden[f"adam/in/p{i}"]).clone()) for i in range(2)]
    optimizer = script.Adam(params, args.model_rate, args)
    for step in range(count):
        norm = optimizer.step([tensor(golden[f"adam/in/g{i}_{step}"]) for i in range(2)])
        close(norm, golden[f"adam/out/norm{step}"])
        for i, parameter in enumerate(params):
            close(parameter, golden[f"adam/out/p{i}_after{step}"], rtol=1e-6, atol=1e-7)


def test_parity_full_size(path):
    """The recorded network has our parameters; its losses follow from its outputs as ours do."""
    golden = np.load(path)
    recorded = [tuple(map(int, shape.split(","))) for shape in golden["full/param_shapes"]]
    actions = golden["full/in/action"].shape[-1]
    agent = script.Agent(script.Args(**PLAIN), PIXELS, gym.spaces.Box(-1, 1, (actions,)), DEVICE)
    size = sum(parameter.numel() for parameter in agent.parameters())
    assert size == sum(int(np.prod(shape)) for shape in recorded)
    read = lambda name: tensor(golden[f"full/{name}"])
    post, prior = (tensor(stats(golden, f"full/out/{name}_")) for name in ("post", "prior"))
    kl = script.kl_gaussian(post, prior)
    close(kl, golden["full/out/kl"])
    kl_loss = (kl - agent.args.free_nats).clamp(min=0).mean()
    close(kl_loss, golden["full/out/objective_divergence"])
    reward_loss = script.normal_loss(read("out/reward_mean"), read("in/reward")).mean()
    close(-reward_loss, golden["full/out/objective_reward"])
    total = kl_loss + agent.args.reward_scale * reward_loss - read("out/objective_image")
    close(total, golden["full/out/total_loss"])


# Planner


def follow(target):
    """A known system, x' = x + a from x = 0, whose state is to follow a target (N, H, A)."""
    target = target.unsqueeze(1)
    return lambda action: -(action.cumsum(2) - target).square().sum((2, 3))


def test_the_planner_finds_the_optimum_of_a_known_system():
    torch.manual_seed(0)
    best = (torch.rand(3, 6, 2) * 1.6 - 0.8).to(DEVICE)
    noise = torch.randn(40, 3, 1000, 6, 2).to(DEVICE)
    close(plan(follow(best.cumsum(1)), noise, 100), best.cpu(), atol=0.06)
    far = torch.tensor([5.0, -5.0], device=DEVICE) * torch.arange(1, 7, device=DEVICE).unsqueeze(1)
    result = plan(follow(far.expand(3, 6, 2)), noise, 100)  # out of reach: as far as actions go
    close(result, torch.tensor([1.0, -1.0]).expand(3, 6, 2), atol=0.02)


def test_environments_are_planned_for_as_if_alone():
    torch.manual_seed(0)
    target, noise = torch.randn(4, 5, 2, device=DEVICE), torch.randn(3, 4, 50, 5, 2, device=DEVICE)
    together = plan(follow(target), noise, 7)
    for env in range(4):
        one = slice(env, env + 1)
        close(plan(follow(target[one]), noise[:, one], 7), together[one].cpu(), atol=1e-6)
    shifted = plan(lambda action: follow(target)(action) + 7.0, noise, 7)
    close(shifted, together.cpu(), atol=1e-6)


def test_random_shooting_takes_the_best_candidate(monkeypatch):
    agent = small(planner="random-shooting", candidates=20, planning_horizon=4)[0]
    seen = []

    def evaluate(model, state, action):
        seen.append(action)
        return action.sum((2, 3))

    monkeypatch.setattr(script, "predicted_return", evaluate)
    action = agent.policy(*agent.world_model.rssm.initial(3))
    (candidates,) = seen
    assert candidates.shape == (3, 20, 4, 2) and candidates.abs().max() <= 1
    close(action, candidates[torch.arange(3), candidates.sum((2, 3)).argmax(1), 0].cpu())


def test_discrete_actions_are_planned(monkeypatch):
    agent = small(True, candidates=100, elites=10, iterations=5)[0]
    wanted = torch.tensor([2, 0], device=DEVICE)

    def evaluate(model, state, action):
        assert (action.sum(-1) == 1).all() and (action.amax(-1) == 1).all()
        return action[:, :, 0].gather(-1, wanted[:, None, None].expand(-1, 100, 1)).squeeze(-1)

    monkeypatch.setattr(script, "predicted_return", evaluate)
    assert agent.policy(*agent.world_model.rssm.initial(2)).argmax(-1).tolist() == [2, 0]


@pytest.mark.parametrize("dynamics", ["rssm", "ssm", "rnn"])
def test_predicted_returns_are_those_of_single_steps(dynamics):
    agent, _ = small(dynamics=dynamics)
    model, noise = agent.world_model, torch.randn(2, 3, 4, 3, device=DEVICE)
    given = lambda noise: draws(randn_like=[] if dynamics == "rnn" else noise)
    state = tuple(torch.randn_like(x) for x in model.rssm.initial(2))
    action = torch.rand(2, 3, 4, 2, device=DEVICE) * 2 - 1
    with torch.no_grad():
        with given(noise.flatten(0, 1).unbind(1)):
            returns = script.predicted_return(model, state, action)
        for env in range(2):
            for candidate in range(3):
                one, total = tuple(x[env : env + 1] for x in state), 0.0
                for t in range(4):
                    with given([noise[env, candidate, t][None]]):
                        one = model.rssm.img_step(one, action[env, candidate, t][None])
                    total += model.reward(script.feature(*one)).item()
                assert returns[env, candidate].item() == pytest.approx(total, abs=1e-4)


def test_acting_disturbs_the_plan_in_training_only(monkeypatch):
    agent, data = small(action_noise=0.3)
    planned = torch.full((2, 2), 0.9, device=DEVICE)
    monkeypatch.setattr(agent, "policy", lambda deter, stoch: planned)
    obs = {"vector": data["vector"][:, 0], "is_first": data["is_first"][:, 0]}
    *_, action = agent.act(obs, agent.initial(2), training=False)
    assert torch.equal(action, planned)
    actions = torch.stack([agent.act(obs, agent.initial(2))[2] for _ in range(500)])
    assert actions.max() == 1 and actions.min() < 0.5
    assert (actions < 1).float().mean().item() == pytest.approx(0.63, abs=0.06)  # P(0.9 + 0.3 z < 1)


# Model and objective


def test_free_nats_apply_to_each_step():
    agent, data = small()
    noise = torch.randn(5, 2, 3, device=DEVICE)
    with draws(randn_like=noise):
        kl = agent.world_model.loss(data, agent.start(data))[1]["kl"].item()
    for free_nats in (0.0, 0.5 * kl, 1e3):
        agent, _ = small(free_nats=free_nats)
        model = agent.world_model
        with draws(randn_like=[*noise, *noise]):
            seen = model.encoder(data), data["action"], data["is_first"]
            deter, _, post = model.rssm.observe(*seen, agent.start(data))
            losses, _ = model.loss(data, agent.start(data))
        each = script.kl_gaussian(post, model.rssm.prior(deter)) - free_nats
        close(losses["kl_loss"], each.clamp(min=0).detach().cpu())
        assert reached(losses["kl_loss"].mean(), model) == (free_nats < 1e3)


@pytest.mark.parametrize("dynamics", ["rssm", "ssm"])
def test_overshooting_is_open_loop_prediction(dynamics):
    """Against one start at a time; the posterior that is the target gets no gradient; nothing lies beyond the end."""
    agent, data = small(dynamics=dynamics)
    rssm, distance = agent.world_model.rssm, 4
    deter, stoch, post = (torch.rand(2, 5, *size, device=DEVICE) for size in ((rssm.args.deter,), (3,), (3, 2)))
    noise = torch.randn(2, 5, distance, 3, device=DEVICE)
    post.requires_grad_()
    with draws(randn_like=[noise[:, : 5 - k, k] for k in range(distance)]):
        kl = rssm.overshoot(deter, stoch, post, data["action"], distance)
    assert kl.shape == (2, 5, distance - 1) and kl.requires_grad
    assert torch.autograd.grad(kl.sum(), post, allow_unused=True, retain_graph=True) == (None,)
    for start in range(5):
        state = (deter[:, start - 1], stoch[:, start - 1]) if start else rssm.initial(2)
        for k in range(distance):
            if start + k > 4:
                assert not kl[:, start, k - 1].any()
                continue
            with draws(randn_like=[noise[:, start, k]]):
                state = rssm.img_step(state, data["action"][:, start + k])
            if k:
                prior = rssm.prior(state[0])
                close(kl[:, start, k - 1], script.kl_gaussian(post[:, start + k], prior).detach().cpu(), atol=1e-4)


def test_images_are_reduced_and_dithered(monkeypatch):
    image = torch.arange(256, dtype=torch.uint8)
    x = script.preprocess(image, 5)
    assert -0.5 <= x.min() and x.max() < 0.5
    assert ((x + 0.5) * 32).floor().tolist() == [value // 8 for value in range(256)]
    assert script.postprocess(x, 5).tolist() == [value // 8 * 8 for value in range(256)]
    assert (script.postprocess(script.preprocess(image, 8), 8) == image).all()
    assert script.preprocess(x, 5) is x
    agent = script.Agent(script.Args(**PLAIN, depth=1), PIXELS, gym.spaces.Box(-1, 1, (6,)), DEVICE)
    data = {"image": image.view(1, 1, 16, 16, 1).expand(1, 4, 16, 16, 3).repeat(1, 1, 4, 4, 1).to(DEVICE)}
    data |= {"action": torch.zeros(1, 4, 6, device=DEVICE), "reward": torch.zeros(1, 4, device=DEVICE)}
    data["is_first"] = torch.zeros(1, 4, dtype=torch.bool, device=DEVICE)
    seen, originals = [], (script.preprocess, agent.world_model.encoder.forward)
    monkeypatch.setattr(script, "normal_loss", lambda mean, target: seen.append(target) or (mean - target).square())
    encode = lambda obs: seen.append(obs["image"]) or originals[1](obs)
    monkeypatch.setattr(agent.world_model.encoder, "forward", encode)
    for _ in range(2):
        agent.world_model.loss(data, agent.start(data))
    (one, target, _), (two, _, _) = seen[:3], seen[3:]
    assert one is target and not torch.equal(one, two) and (one - two).abs().max() < 1 / 32


def test_the_activation_is_that_of_the_rssm_and_the_reward_head():
    for name, kind in (("relu", nn.ReLU), ("elu", nn.ELU)):
        model = small(activation=name)[0].world_model
        modules = [*model.rssm.modules(), *model.reward_head.modules()]
        assert [type(m) for m in modules if isinstance(m, (nn.ReLU, nn.ELU))] == 6 * [kind]


def test_the_planner_ranks_in_float32(monkeypatch):
    """Under --amp, the returns of candidates have all their digits."""
    agent, data = small(amp=True)
    obs = {"vector": data["vector"][:, 0], "is_first": data["is_first"][:, 0]}
    seen, original = [], script.predicted_return
    monkeypatch.setattr(script, "predicted_return", lambda *inputs: seen.append(original(*inputs)) or seen[-1])
    agent.act(obs, agent.initial(2))
    assert seen and all(x.dtype == torch.float32 and not torch.equal(x, x.bfloat16().float()) for x in seen)


# Replay and schedule


def test_it_trains_first_and_then_collects_whole_episodes(tmp_path, events):
    """One update more than `train_steps` before the first planned episode, `train_steps` before each later one."""
    flags = "--env-id toy_envs:Bounds-v0 --seed-episodes 3 --train-steps 4 --batch-length 9"
    seen = events(script)
    run = train(script, tmp_path, *flags.split(), frames=110)
    text = "".join(seen)
    assert re.fullmatch("r+u{5}fa+u{4}(afa+u{4})?afa+", text), text  # the action after an episode's end is not used
    ends = [frame for frame, _ in scalars(run)["charts/episodic_length"]]
    assert text.index("u") == ends[2] + 2  # the seed episodes are whole; a record that resets is no frame
    assert checkpoint(run)["progress"][1] == 110
    seen.clear()
    run_script(script, "--resume", run, "--total-timesteps", 140, cwd=tmp_path)
    assert "r" not in seen and seen.count("u") == 4  # no prefill


REPEATS = [("cartpole-swingup", 8), ("cup-catch", 4), ("ball_in_cup-catch", 4), ("walker-walk", 2), ("fish-swim", 2)]


@pytest.mark.parametrize("task, repeat", REPEATS)
def test_action_repeats(task, repeat):
    assert script.parse_args(["--env-id", f"dmc-{task}"]).action_repeat == repeat
    assert script.parse_args(["--env-id", f"dmc-{task}", "--action-repeat", "6"]).action_repeat == 6


@pytest.mark.parametrize("flags", ["--bits 9", "--candidates 10 --elites 11", "--overshooting-distance 51"])
def test_settings_that_make_no_sense_are_refused(flags):
    with pytest.raises(SystemExit, match=flags.split()[-2]):
        script.parse_args(flags.split())
