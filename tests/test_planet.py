"""planet.py against recorded outputs of the authors' code (tests/golden/planet/README.md), and its maths."""

import ast
import os
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

import planet as script

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
FILES = sorted(GOLDEN.rglob("golden_planet*.npz"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = {"rssm": {}, "rssm_det": dict(dynamics="rnn"), "ssm": dict(dynamics="ssm"), "rssm_elu": dict(activation="elu")}


def close(mine, golden, rtol=1e-4, atol=1e-5):
    mine = mine.detach().cpu().numpy() if isinstance(mine, torch.Tensor) else np.asarray(mine)
    golden = np.asarray(golden)
    assert mine.shape == golden.shape, (mine.shape, golden.shape)
    np.testing.assert_allclose(mine, golden, rtol=rtol, atol=atol * max(1.0, float(np.abs(golden).max())))


def tensor(array):
    array = torch.as_tensor(np.asarray(array), device=DEVICE)
    return array.float() if array.dtype == torch.float64 else array


class GivenEncoder(nn.Module):
    """Takes embed from the batch."""

    images = ()

    def forward(self, data):
        return data["embed"]


class VectorDecoder(nn.Module):
    """The recorded models' picture is a vector."""

    def __init__(self, feat_dim, sizes, units):
        super().__init__()
        self.feat_dim, self.head = feat_dim, script.MLP(feat_dim, sizes, 1, units)

    def forward(self, feat):
        return {"vector": self.head(feat[..., -self.feat_dim :])}


class Case:
    """A recorded model: an agent with its sizes and weights, and its batch."""

    def __init__(self, path, kind, **options):
        self.golden, self.kind = np.load(path), kind
        self.config = c = ast.literal_eval(str(self.golden["cfg"]))
        sizes = dict(stoch=c["S"], deter=c["H"], hidden=c["U"], units=c["units"], free_nats=c["free"], amp=False)
        self.args = args = script.Args(**sizes | KINDS[kind] | options)
        action = gym.spaces.Box(-1, 1, (c["A"],))
        self.agent = script.Agent(args, {"vector": gym.spaces.Box(-1, 1, (c["V"],))}, action, DEVICE)
        self.model = model = self.agent.world_model
        self.feat_dim = model.decoder.feat_dim
        model.encoder, model.decoder = GivenEncoder(), VectorDecoder(self.feat_dim, c["V"], c["units"])
        model.rssm = script.RSSM(args, c["E"], c["A"])
        self.agent.to(DEVICE)
        self.agent.optimizers = {"world_model": script.Adam(model.parameters(), args.model_rate, args)}
        self.names = self.official_names()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                value = self.parameter("param", name)
                assert value.shape == parameter.shape, name
                parameter.copy_(value)
        read = lambda name: tensor(self.golden[f"{kind}/in/{name}"])  # noqa: E731
        self.data = {name: read(name) for name in ("embed", "action", "reward")} | {"vector": read("image")}
        self.data["is_first"] = torch.arange(c["T"], device=DEVICE).expand(c["B"], -1) == 0
        mean_only = f"{kind}/in/eps_post" not in self.golden
        self.noise = torch.zeros(c["B"], c["T"], c["S"], device=DEVICE) if mean_only else read("eps_post")

    def official_names(self):
        """Our parameter -> official names, whose arrays lie side by side in ours, and the layout."""
        names = {}
        step, cell = f"rnn/{'ssm' if self.kind == 'ssm' else 'rssm'}", "rssm" if self.kind != "ssm" else "ssm"

        def add(ours, *theirs, kind="dense"):
            names[f"{ours}.weight"] = [f"{name}/kernel" for name in theirs], kind
            names[f"{ours}.bias"] = [f"{name}/bias" for name in theirs], "same"

        t, p = f"{step}/transition", f"{step}/posterior"
        add("rssm.inputs.0", f"{t}/dense")
        add("rssm.post_in.0", f"{p}/dense")
        add("rssm.post_out", f"{p}/dense_1", f"{p}/dense_2")
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
        if kind == "feat" and self.kind != "ssm":  # features: sample first there, deter first here
            array = np.concatenate([array[self.args.stoch :], array[: self.args.stoch]])
        return tensor(array if kind == "same" else array.T)

    def gradients(self, loss):
        named = dict(self.model.named_parameters())
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        zero = [torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), grads, strict=True)]
        return dict(zip(named, zero, strict=True))

    def check_gradients(self, grads, prefix):
        for name, grad in grads.items():
            theirs = self.parameter(prefix, name).cpu()
            scale = max(float(theirs.abs().max()), 1e-3)
            np.testing.assert_allclose(grad.cpu(), theirs, rtol=1e-3, atol=1e-4 * scale, err_msg=name)


def stats(golden, prefix):
    return np.stack([golden[f"{prefix}mean"], golden[f"{prefix}stddev"]], -1)


@pytest.fixture(params=[(f, k) for f in FILES for k in KINDS], ids=lambda param: f"{param[0].stem}-{param[1]}")
def case(request):
    return Case(*request.param)


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def path(request):
    return request.param


def test_golden_data_is_there():
    assert FILES, GOLDEN


def test_parity_world_model(case, monkeypatch):
    golden, kind, model, data = case.golden, case.kind, case.model, case.data
    start = case.agent.start(data)
    deter, stoch, post = model.rssm.observe(data["embed"], data["action"], data["is_first"], start, case.noise)
    prior = model.rssm.prior(deter)
    close(post, stats(golden, f"{kind}/out/post_"))
    close(prior, stats(golden, f"{kind}/out/prior_"))
    close(stoch, golden[f"{kind}/out/post_sample"])
    eps = f"{kind}/in/eps_prior"
    noise = tensor(golden[eps]) if eps in golden else case.noise
    close(model.rssm.sample(prior, noise), golden[f"{kind}/out/prior_sample"])
    if kind != "ssm":
        close(deter, golden[f"{kind}/out/post_belief"])
        close(deter, golden[f"{kind}/out/prior_belief"])
    losses, values = model.loss(data, start, {"post": case.noise})
    close(script.kl_gaussian(post, prior), golden[f"{kind}/out/kl"])
    close(values["kl"], golden[f"{kind}/out/kl"].mean())
    close(losses["recon_loss_vector"], -golden[f"{kind}/out/logprob_image"])
    close(losses["reward_loss"], -golden[f"{kind}/out/logprob_reward"])
    if f"{kind}/out/objective_divergence" in golden:
        close(losses["kl_loss"].mean(), golden[f"{kind}/out/objective_divergence"])
    totals = []
    monkeypatch.setattr(case.agent, "descend", lambda stats, world_model: totals.append(world_model))
    case.agent.update(data, {"post": case.noise})
    close(totals[0], golden[f"{kind}/out/total_loss"])
    case.check_gradients(case.gradients(totals[0]), "grad")


def test_parity_overshooting(path):
    case = Case(path, "rssm")
    golden, model, data, args = case.golden, case.model, case.data, case.args
    distance = case.config["D"]
    start = case.agent.start(data)
    deter, stoch, post = model.rssm.observe(data["embed"], data["action"], data["is_first"], start, case.noise)
    noise = tensor(golden["rssm/os/in_eps"])[:, :, :distance]
    kl = model.rssm.overshoot(deter, stoch, post, data["action"], noise)
    close(kl, golden["rssm/os/kl_cols_1_to_Dm1"])
    loss = (kl - args.free_nats).clamp(min=0).mean()
    close(loss, golden["rssm/os/loss_masked_mean"])
    case.check_gradients(case.gradients(loss), "os/grad")
    case = Case(path, "rssm", overshooting_distance=distance)
    losses, _ = case.model.loss(data, start, {"post": case.noise, "overshoot": noise})
    close(losses["overshooting_loss"].mean(), golden["rssm/os/loss_masked_mean"])


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
    result = script.plan(recorded, noise, elites)
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

    def evaluate(candidates):  # the recording's order of noise: (E, H, J, S)
        return script.predicted_return(case.model, state, candidates, next(step).transpose(1, 2))

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
            alone = script.plan(model_planner(case, one), noise[:, one], int(elites))
            close(alone, golden["cem_rssm/out/mean"][one])


def test_parity_preprocessing(path):
    golden = np.load(path)
    image = tensor(golden["pre/in/image"])
    for bits in (5, 8):
        x = script.preprocess(image, bits, tensor(golden[f"pre/in/noise_bits{bits}"] * 2**bits))
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


def pixel_agent(**options):
    spaces = {"image": gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)}
    return script.Agent(script.Args(amp=False, **options), spaces, gym.spaces.Box(-1, 1, (6,)), DEVICE)
