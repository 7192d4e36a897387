"""genie.py: closed forms, masks and stop-gradients of the three models, video of all kinds, runs from end to end."""

import csv
import dataclasses
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, lines, only_run, press_a_key, run_script, served, start_script

import genie as s

SMALL = "--image-size 16 --patch 4 --lam-patch 8 --clip-length 4 --context 3 --num-codes 16 --num-actions 5 "
SMALL += "--latent-dim 8 --encoder 1 16 2 8 --decoder 1 16 2 8 --lam-encoder 1 16 2 8 --lam-decoder 1 16 2 8 "
SMALL += "--dynamics 1 16 2 8 --tokenizer-steps 6 --steps 6 --tokenizer-batch-size 4 --batch-size 4 --log-every 16 "
SMALL += "--eval-every 0 --eval-episodes 8 --maskgit-steps 3 --num-envs 1 --no-cuda --no-compile --no-amp"
SMALL = SMALL.split()
SQUARE = ["--env-id", "toy_envs:Square-v0", "--total-timesteps", "400"]


def make(*flags, seed=0, **values):
    args = s.parse_args([*SMALL, *flags])
    for key, value in values.items():
        setattr(args, key, value)
    torch.manual_seed(seed)
    agent = s.Agent(args, (16, 16, 3))
    for parameter in agent.parameters():  # nothing is to be zero by accident
        parameter.data += 0.1 * torch.randn_like(parameter)
    return agent


def clip(batch=3, length=4, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (batch, length, 16, 16, 3), np.uint8))


# Maths


@pytest.mark.parametrize("shape, size, count", [((64, 64, 3), 4, 256), ((90, 160, 3), 4, 920), ((90, 160, 1), 16, 60)])
def test_patches_and_back(shape, size, count):
    video = torch.rand(2, 3, *shape)
    patches = s.patchify(video, size)
    assert patches.shape == (2, 3, count, size**2 * shape[2]) and s.num_patches(size, shape) == count
    assert torch.equal(s.unpatchify(patches, size, shape), video)
    assert torch.equal(patches[0, 0, 1].view(size, size, -1), video[0, 0, :size, size : 2 * size])


def test_psnr_perplexity_and_mutual_information():
    assert s.psnr(torch.zeros(2, 4, 4, 3), torch.full((2, 4, 4, 3), 0.1)).tolist() == pytest.approx([20, 20])
    assert s.perplexity(torch.tensor([5, 5, 0, 5])).item() == pytest.approx(3, rel=1e-5)
    a = np.repeat([0, 1, 2, 3], 25)
    assert s.mutual_information(a, 3 - a) == pytest.approx(1)
    assert s.mutual_information(a, np.tile([0, 1, 2, 3, 4], 20)) == pytest.approx(0, abs=1e-9)
    assert s.mutual_information(a, a // 2) == pytest.approx(2 * 1 / (2 + 1))  # 1 bit of 2 and 1
    assert s.mutual_information(np.zeros(9, int), np.zeros(9, int)) == 0


def test_frechet_distance_of_gaussians():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(200_000, 2))
    assert s.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert s.frechet_distance(a, 3 * a + 5) == pytest.approx(2 * 25 + 2 * (3 - 1) ** 2, rel=0.02)


def test_the_schedule_is_a_cosine():
    masked = [256, *s.maskgit_schedule(256, 25)]
    revealed = [a - b for a, b in zip(masked[:-1], masked[1:], strict=True)]
    known = [1, 1, 3, 3, 5, 5, 6, 8, 8, 9, 10, 10, 12, 12, 13, 13, 14, 14, 15, 15, 15, 16, 16, 16, 16]
    assert sorted(revealed) == sorted(known) and sum(revealed) == 256
    for tokens, steps in ((64, 8), (1, 25), (920, 25)):
        assert s.maskgit_schedule(tokens, steps)[-1] == 0


def test_learning_rates():
    agent = make(steps=1000, warmup=10, tokenizer_warmup=10)
    rate = lambda stage, n: agent.rate(stage, torch.tensor(float(n))).item()  # noqa: E731
    assert rate("tokenizer", 0) == pytest.approx(2e-4) and rate("tokenizer", 9) == rate("tokenizer", 900)
    assert rate("dynamics", 10) == pytest.approx(2e-3) and rate("dynamics", 1000) == pytest.approx(1e-4)
    assert rate("dynamics", 505) == pytest.approx((2e-3 + 1e-4) / 2)
    assert agent.optimizers["dynamics"].param_groups[0]["betas"] == (0.9, 0.9)


# Masks: nothing sees what comes later


def changes(function, video, t):
    """Frames of function(video) that change when frame t does."""
    other = video.clone()
    other[:, t] = 255 - other[:, t]
    a, b = function(video), function(other)
    return [i for i in range(a.shape[1]) if not torch.allclose(a[:, i], b[:, i], atol=1e-6)]


@torch.no_grad()
def test_no_frame_sees_a_later_one():
    agent = make("--no-lam-change")
    tokenizer, lam = agent.tokenizer, agent.lam
    latent = lambda v: tokenizer.encoder(tokenizer.patch_in(s.patchify(v / 255, 4)))[0]  # noqa: E731
    assert changes(latent, clip(), 2) == [2, 3]
    action = lambda v: lam.latent(lam.patches(v, None))  # noqa: E731
    assert changes(action, clip(), 2) == [1, 2]  # the action that leads to a frame sees it
    assert changes(action, clip(), 0) == [0, 1, 2]
    lam = make("--lam-change").lam
    assert changes(action, clip(), 0) == [0] and changes(action, clip(), 2) == [1, 2]  # sees nothing else
    ids = torch.randint(16, (2, 4, 16))
    other = ids.clone()
    other[:, 2] = (ids[:, 2] + 1) % 16
    for function in (lambda x: tokenizer.decode(x), lambda x: agent.dynamics(x, torch.zeros(2, 4, 8))[0]):
        a, b = function(ids), function(other)
        assert [torch.allclose(a[:, t], b[:, t], atol=1e-6) for t in range(4)] == [True, True, False, False]


@torch.no_grad()
def test_the_decoder_of_the_lam_knows_the_next_frame_by_its_code_alone():
    agent = make()
    lam, patches = agent.lam, agent.lam.patches(clip(), None)
    other = patches.clone()
    other[:, 3] = 1 - other[:, 3]
    code = torch.randn(3, 3, 8)
    predict = lambda x: lam.decoder(lam.past_in(x[:, :-1]) + lam.code_in(code).unsqueeze(2))[0]  # noqa: E731
    assert torch.equal(predict(patches), predict(other))


@torch.no_grad()
@pytest.mark.parametrize("action_input", ["add", "token"])
def test_a_frame_after_its_past_is_a_frame_of_the_whole(action_input):
    agent = make("--action-input", action_input)
    ids, code = torch.randint(16, (2, 4, 16)), torch.randn(2, 4, 8)
    whole = agent.dynamics(ids, code)[0]
    past = agent.dynamics(ids[:, :3], code[:, :3])[1]
    torch.testing.assert_close(agent.dynamics(ids[:, 3:], code[:, 3:], past)[0], whole[:, 3:], rtol=1e-4, atol=1e-5)


def test_attention_against_its_formula():
    layer, x = s.Attention(16, 2, 8, over_time=True), torch.randn(2, 5, 3, 16)
    query, key, value = (f(x).view(2, 5, 3, 2, 8) for f in (layer.query, layer.key, layer.value))
    query, key = layer.query_norm(query), layer.key_norm(key)
    score = torch.einsum("bqnhd,bknhd->bnhqk", query, key) / math.sqrt(8)
    score = score.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), -math.inf)
    expected = layer.out(torch.einsum("bnhqk,bknhd->bqnhd", score.softmax(-1), value).flatten(3))
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_what_is_masked():
    agent = make(clip_length=16, clean_context=0.0)
    masked = agent.noise("dynamics", 400, 0)["masked"]
    assert masked.shape == (400, 16, 16) and not masked[:, 0].any()
    rates = masked[:, 1:].float().mean((1, 2))
    assert 0.4 < rates.min() and rates.max() > 0.97 and rates.mean() == pytest.approx(0.75, abs=0.02)
    assert np.histogram(rates, 5, (0.5, 1))[0].min() > 50  # uniform
    agent = make(clip_length=16, clean_context=1.0, corrupt=0.4)
    noise = agent.noise("dynamics", 400, 0)
    frames = noise["masked"].any(2)
    assert (frames[:, :-1] <= frames[:, 1:]).all() and frames[:, -1].all()  # clean ones come first
    assert len(set(frames.sum(1).tolist())) == 15
    assert noise["corrupt"].float().mean() == pytest.approx(0.2, abs=0.02)
    same = agent.noise("dynamics", 400, 0)
    assert all(torch.equal(noise[key], same[key]) for key in noise)


# Gradients: who gets them from what


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_straight_through(quantizer):
    layer = make("--quantizer", quantizer).tokenizer.quantizer
    x = torch.randn(7, layer.dim, requires_grad=True)
    code, index, _ = layer(x)
    torch.testing.assert_close(code, layer.codes()[index], atol=1e-6, rtol=0)
    weight = torch.randn_like(code)
    (grad,) = torch.autograd.grad((code * weight).sum(), x)
    squashed = torch.nn.functional.normalize(x, dim=-1) if quantizer == "vq" else x.tanh()
    torch.testing.assert_close(grad, torch.autograd.grad((squashed * weight).sum(), x)[0])


def test_codebook_and_encoder_move_towards_each_other():
    layer, x = s.VQ(5, 8, 0.25, 50), torch.randn(7, 8, requires_grad=True)
    code, _, loss = layer(x)
    book, mine = torch.autograd.grad(loss, [layer.codebook, x])
    code, index, _ = layer(x)
    e = torch.nn.functional.normalize(x, dim=-1)
    chosen = layer.codes()[index]
    expected = [(chosen - e.detach()).square().mean(), 0.25 * (e - chosen.detach()).square().mean()]
    torch.testing.assert_close(book, torch.autograd.grad(expected[0], layer.codebook, retain_graph=True)[0])
    torch.testing.assert_close(mine, torch.autograd.grad(expected[1], x)[0])


@pytest.mark.parametrize("through", [False, True])
def test_the_dynamics_give_the_lam_no_gradient(through):
    agent = make(*["--lam-grad-through-dynamics"] * through)
    agent.step = lambda stage, losses: found.append(losses) or {}
    found = []
    agent.update_dynamics(clip(), agent.noise("dynamics", 3, 0))
    loss = found[0]["dynamics_loss"]
    lam = torch.autograd.grad(loss, list(agent.lam.parameters()), allow_unused=True, retain_graph=True)
    assert any(g is not None and g.abs().sum() > 0 for g in lam) == through
    others = torch.autograd.grad(loss, list(agent.dynamics.parameters()), retain_graph=True)
    assert all(g.abs().sum() > 0 for g in others)
    tokenizer = torch.autograd.grad(sum(found[0].values()), list(agent.tokenizer.parameters()), allow_unused=True)
    assert all(g is None for g in tokenizer)


def test_each_stage_changes_its_own_models():
    agent = make("--no-lam-change")  # with it the LAM's encoder has no time to attend over
    state = lambda: {k: v.clone() for k, v in agent.named_parameters()}  # noqa: E731
    first = state()
    agent.update_tokenizer(clip(), agent.noise("tokenizer", 3, 0))
    second = state()
    agent.update_dynamics(clip(), agent.noise("dynamics", 3, 0))
    third = state()
    for key in first:
        assert torch.equal(first[key], second[key]) != key.startswith("tokenizer"), key
        assert torch.equal(second[key], third[key]) == key.startswith("tokenizer"), key


# Codes


def test_dead_codes_restart_where_the_encoder_is():
    layer = s.VQ(8, 4, 0.25, 3)
    x, book = torch.randn(100, 4), layer.codebook.detach().clone()
    index = torch.arange(100) % 2  # only two are used
    for update in range(3):
        assert torch.equal(layer.codebook, book), update
        stats = layer.restart(x, index, torch.linspace(0, 0.99, 8))
    assert stats["restarts"] == 6 and stats["perplexity"].item() == pytest.approx(2, rel=1e-5)
    assert torch.equal(layer.codebook[:2], book[:2]) and not layer.idle.any()
    near = torch.nn.functional.normalize(x, dim=-1) @ layer.codes()[2:].T
    assert near.max(0).values.tolist() == pytest.approx([1] * 6, abs=1e-5)
    layer = s.VQ(8, 4, 0.25, 0)
    for _ in range(100):
        layer.restart(x, index, torch.rand(8))
    assert layer.idle.max() == 100  # 0: for ever


def test_centred_codes_do_not_collapse():
    layer = s.VQ(4, 8, 0.25, 50, centre=True)
    x = torch.randn(64, 3, 8) * 0.01 + torch.randn(8)  # nearly all the same
    assert s.VQ(4, 8, 0.25, 50)(x)[1].unique().numel() <= 3
    assert layer(x)[1].unique().numel() == 4
    for _ in range(200):
        layer.restart(x, layer(x)[1], torch.rand(4))
    torch.testing.assert_close(layer.mean, x.mean((0, 1)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("codes, levels", [(1024, [5, 4, 3]), (6, [3, 2]), (8, [4, 2]), (1000, [5, 5, 5, 4, 2])])
def test_finite_scalar_quantization_has_all_codes(codes, levels):
    layer = s.FSQ(codes)
    assert layer.codes().shape[0] == codes == math.prod(layer.levels.tolist())
    code, index, loss = layer(torch.atanh(layer.codes() * 0.999))
    assert torch.equal(index, torch.arange(codes)) and loss == 0
    assert codes == 1024 or layer.levels.tolist() == levels
    with pytest.raises(s.Failure, match="fsq"):
        s.FSQ(7)


# Sampling


def test_a_perfect_model_reproduces_the_clip():
    truth = torch.randint(16, (2, 16))
    seen = []

    def predict(ids):
        seen.append(ids.clone())
        return 50 * torch.nn.functional.one_hot(truth, 16).float()

    out = s.maskgit_sample(predict, 16, 16, 5, 1.0, torch.rand(5, 2, 16))
    assert torch.equal(out, truth)
    masked = [(ids == 16).sum(1).tolist() for ids in seen]
    assert masked == [[n, n] for n in [16, *s.maskgit_schedule(16, 5)[:-1]]]
    for before, after in zip(seen[:-1], seen[1:], strict=True):
        kept = before != 16
        assert torch.equal(before[kept], after[kept])


def test_samples_follow_the_probabilities_and_the_temperature():
    logit = torch.tensor([0.2, 0.3, 0.5]).log()
    for temperature in (1.0, 2.0):
        out = s.maskgit_sample(lambda ids: logit.expand(*ids.shape, 3), 1, 3, 1, temperature, torch.rand(1, 50_000, 1))
        expected = (logit / temperature).softmax(0)
        torch.testing.assert_close(out.flatten().bincount() / 50_000, expected, atol=0.01, rtol=0)


def test_rollouts_repeat_and_depend_on_actions():
    agent = make()
    ids, action = agent.infer(clip())
    run = lambda a, seed: agent.rollout(ids[:, :2], a, torch.Generator().manual_seed(seed))  # noqa: E731
    longer = torch.cat([action, action, action], 1)
    one = run(longer, 0)
    assert one.shape == (3, 2 + 9 - 1, 16) and torch.equal(one[:, :2], ids[:, :2]) and one.max() < 16
    assert torch.equal(one, run(longer, 0)) and not torch.equal(one, run(longer, 1))
    assert not torch.equal(one, run((longer + 1) % 5, 0))
    assert agent.show(one).shape == (3, 10, 16, 16, 3)


@pytest.mark.parametrize(
    "flags", ["--lam-input tokens", "--action-input token", "--quantizer fsq --num-codes 64", "--remat"]
)
def test_variants_update(flags):
    agent = make(*flags.split(), *("--num-actions 6" if "fsq" in flags else "").split())
    first = agent.update_tokenizer(clip(), agent.noise("tokenizer", 3, 0))
    second = agent.update_dynamics(clip(), agent.noise("dynamics", 3, 0))
    assert all(math.isfinite(value) for value in (first | second).values())


def test_rematerialising_changes_nothing():
    one, two = make(), make("--remat")
    for agent in (one, two):
        agent.update_dynamics(clip(), agent.noise("dynamics", 3, 0))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_shift_is_a_roll():
    video = clip(2)
    out = s.roll(video, torch.tensor([[3, 0], [-2, 5]]))
    assert torch.equal(out[0], video[0].roll(-3, 1)) and torch.equal(out[1], video[1].roll((2, -5), (1, 2)))


# Presets


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "preset, flags, shape, sizes",
    [  # millions of tokenizer, LAM, dynamics
        ("coinrun", "", (64, 64, 3), (67, 67, 51)),
        ("coinrun", "--ffn 0.5", (64, 64, 3), (38, 38, 29)),
        ("small", "", (64, 64, 3), (8.4, 8.4, 19.7)),
        ("platformers", "", (90, 160, 3), (200, 336, 10_100)),  # LAM: 336 with attention alone; paper: 300
    ],
)
def test_parameter_counts_of_presets(preset, flags, shape, sizes):
    args = s.parse_args(["--preset", preset, *flags.split()])
    with torch.device("meta"):
        tokenizer = s.Tokenizer(args, shape, "meta")
        lam = s.LatentActionModel(args, shape, tokenizer, "meta")
        dynamics = s.Dynamics(args, tokenizer.tokens, lam.quantizer.dim, "meta")
        video = torch.zeros(1, args.clip_length, *shape, dtype=torch.uint8)
        ids, code = tokenizer.encode(video)
        action = lam.encode(lam.patches(video, code))
        logits = dynamics(ids, torch.zeros(1, args.clip_length, lam.quantizer.dim))[0]
        assert tokenizer.decode(ids).shape == video.shape
    tokens = {"coinrun": 256, "small": 64, "platformers": 920}[preset]
    assert ids.shape == (1, 16, tokens) and action.shape == (1, 15) and logits.shape == (1, 16, tokens, 1024)
    tolerance = 0.15 if preset == "platformers" else 0.1
    for module, size in zip((tokenizer, lam, dynamics), sizes, strict=True):
        assert count(module) / 1e6 == pytest.approx(size, rel=tolerance), type(module).__name__
    if preset == "platformers":
        assert count(dynamics) / 1e9 == pytest.approx(10.1, rel=0.01)


def test_the_coinrun_preset_is_appendix_f():
    args = s.parse_args(["--preset", "coinrun"])
    paper = dict(image_size=64, clip_length=16, num_codes=1024, num_actions=6, latent_dim=32, patch=4, lam_patch=16)
    paper |= dict(encoder=(8, 512, 8, 64), decoder=(8, 512, 8, 64), lam_encoder=(8, 512, 8, 64))
    paper |= dict(lam_decoder=(8, 512, 8, 64), dynamics=(12, 512, 8, 64), total_timesteps=10_000_000)
    paper |= dict(tokenizer_steps=300_000, tokenizer_batch_size=48, tokenizer_rate=3e-4, tokenizer_warmup=10_000)
    paper |= dict(steps=200_000, batch_size=36, learning_rate=3e-5, final_rate=3e-6, warmup=5_000, weight_decay=1e-4)
    paper |= dict(maskgit_steps=25, temperature=1.0, action_repeat=1, lam_input="pixels", action_input="add")
    assert {key: getattr(args, key) for key in paper} == paper
    assert not (args.window_shift or args.clean_context or args.corrupt or args.clip or args.lam_shift)


# Video


def test_the_pond():
    """Each action turns the duck and moves it by its size around the pond, and no other thing; the boat sails on."""
    env = s.gym.make("Pond-v0").unwrapped
    env.reset(seed=0)
    ducks = [np.array([list(line) for line in sprite]) for sprite in env.ducks]
    for action, move in enumerate([(0, 8), (0, -8), (8, 0), (-8, 0), (0, 0)] * 4):
        place, sailed, image = env.place + move, env.sailed, env.step(action % 5)[0]
        yellow = (image == env.colours["y"]).all(-1).nonzero()
        expected = (np.argwhere(ducks[action % 5] == "y") + place) % 32
        assert set(map(tuple, expected)) == set(zip(*yellow, strict=True)) and env.sailed == sailed + 1
    assert len({duck.tobytes() for duck in ducks}) == 5
    assert not any(env.step(0)[3] for _ in range(179)) and env.step(0)[3]


def windows_of(starts, length, tail=0.1, tmp=None):
    starts = np.array(starts, bool)
    clips = s.Clips(str(tmp), dict(frames=(2, 2, 3), actions=()), starts.shape[1], [0, 0, 0])
    clips.append_from(0)
    for t, row in enumerate(starts):
        clips.add(np.full((starts.shape[1], 2, 2, 3), t), row, np.full(starts.shape[1], t))
    clips.keep()
    clips.flush()
    clips.open(length, tail)
    return clips


def test_clips_cross_no_start_and_the_tail_is_held_out(tmp_path):
    rng = np.random.default_rng(0)
    starts = rng.random((300, 3)) < 0.1
    starts[0] = True
    clips = windows_of(starts, 5, tmp=tmp_path)
    whole = {(t, e) for t in range(296) for e in range(3) if not starts[t + 1 : t + 5, e].any()}
    assert {tuple(w) for w in clips.train} == {(t, e) for t, e in whole if t + 5 <= 270}
    assert {tuple(w) for w in clips.held_out} == {(t, e) for t, e in whole if t >= 270}
    frames = clips.get(clips.train[:7])
    assert frames.shape == (7, 5, 2, 2, 3)
    assert (frames[:, :, 0, 0, 0] == (clips.train[:7, :1] + np.arange(5)) % 256).all()
    assert (clips.true_actions(clips.train[:7]) == clips.train[:7, :1] + np.arange(1, 5)).all()


def test_too_short_a_video_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "too few clips" in refused(s, *SMALL, "--env-id", "toy_envs:Square-v0", "--total-timesteps", "8")


def write_video(path, frames, fps=20):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        file.mux(stream.encode())


def record_videos(folder, run, **values):
    args = s.parse_args([*SMALL, "--video-dir", str(folder)])
    for key, value in values.items():
        setattr(args, key, value)
    clips = s.Clips(str(run), s.source_shapes(args), 1, [0, 0, 0])
    clips.append_from(0)
    for _ in s.record_files(args, clips):
        pass
    clips.flush()
    return clips


def test_video_files(tmp_path, capsys):
    """Resampled, resized, cut; what is corrupt, empty or short is named and left out."""
    folder = tmp_path / "videos"
    (folder / "deeper").mkdir(parents=True)
    dark, bright = np.full((48, 64, 3), 20, np.uint8), np.full((48, 64, 3), 220, np.uint8)
    write_video(folder / "a.mp4", [dark] * 40 + [bright] * 40)  # 4 s at 20 frames/s
    write_video(folder / "deeper/b.mp4", [bright] * 30, fps=10)
    write_video(folder / "short.mp4", [dark] * 3, fps=10)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "noise.mkv").write_bytes(np.random.default_rng(0).bytes(5000))
    whole = (folder / "a.mp4").read_bytes()
    (folder / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("no video")
    clips = record_videos(folder, tmp_path / "run")
    assert clips.kept == [70, 6, 4]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 5 and all("left out" in line for line in told) and told[-1].startswith("4 of 6 files")
    for name in ("short", "empty", "noise", "half"):
        assert any(name in line for line in told)
    clips.open(4)
    assert np.flatnonzero(clips.map("starts")[:, 0]).tolist() == [0, 20, 40]
    assert abs(int(clips.frames[0].mean()) - 20) < 8 and abs(int(clips.frames[69].mean()) - 220) < 8
    assert clips.true_actions(clips.train) is None
    none = record_videos(folder, tmp_path / "none", cut=1.0)
    assert np.flatnonzero(none.map("starts")[:, 0]).tolist() == [0, 40]


def test_a_folder_without_video_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    assert "no video files" in refused(s, *SMALL, "--video-dir", "a")
    (tmp_path / "a/b.mp4").write_bytes(b"nothing")
    with pytest.raises(SystemExit) as error:
        s.main([*SMALL, "--video-dir", "a"])
    assert error.value.code == 2


# Runs


def metrics(run):
    with open(run / "metrics.csv", newline="") as file:
        return [row for row in csv.reader(file) if row[1] != "charts/SPS"]


def checkpoint(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def same(a, b, path="checkpoint"):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}.{key}")
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("genie")
    flags = [*SQUARE, *SMALL, "--eval-every", "96"]
    result = run_script(s, *flags, cwd=folder)
    assert not lines(result.stderr)
    return only_run(folder)


def test_help_shows_every_field(tmp_path):
    out = run_script(s, "--help", cwd=tmp_path).stdout
    for field in dataclasses.fields(s.Args):
        assert re.search(rf"--(no-)?{field.name.replace('_', '-')}(?![a-z])", out), field.name
    assert all(f"{preset}: " in re.sub(r"\s+", " ", out) for preset in s.PRESETS)


def test_import_runs_nothing(tmp_path):
    command = [sys.executable, "-c", "import genie", "--no-such-flag"]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "") and not any(tmp_path.iterdir())


def test_a_run_from_end_to_end(finished):
    keys = {row[1] for row in metrics(finished)}
    assert {"losses/tokenizer_recon_loss", "losses/lam_recon_loss", "losses/dynamics_loss"} <= keys
    assert {"eval/tokenizer_psnr", "eval/action_information", "eval/delta_psnr", "eval/masked_accuracy"} <= keys
    assert checkpoint(finished)["updates"] == 12 and checkpoint(finished)["kept"] == [400, 0, 0]


@pytest.mark.slow
def test_evaluate_and_videos(finished):
    one, two = (run_script(s, "--evaluate", finished, "--capture-video", cwd=finished).stdout for _ in range(2))
    assert one == two and "eval/inverse_information" in one
    assert "latent_actions.mp4" in one and (finished / "videos/latent_actions.mp4").stat().st_size > 1000
    run_script(s, "--play", finished, "--capture-video", cwd=finished)
    assert (finished / "videos/dream.mp4").stat().st_size > 1000


def test_readme_explains_every_key(finished):
    readme = (ROOT / "docs/genie.md").read_text()
    keys = {row[1] for row in metrics(finished)[1:]} | {"video/latent_actions", "eval/inverse_accuracy"}
    patterns = [re.sub(r"<\w+>", r"\\w+", key) for key in re.findall(r"`(\w+/[^`]+)`", readme)]
    assert not [key for key in keys if not any(re.fullmatch(pattern, key) for pattern in patterns)]


def test_fvd_by_the_users_network(finished, tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, video):
            return video.mean((3, 4)).flatten(1)[:, :3]

    torch.jit.script(Mean()).save(tmp_path / "network.pt")
    agent, clips = s.load_run(args := s.parse_args(["--evaluate", str(finished)]), str(finished))
    assert "eval/fvd" not in s.evaluate(agent, args, clips)
    args.fvd = str(tmp_path / "network.pt")
    assert s.evaluate(agent, args, clips)["eval/fvd"] > 0


def test_dreams_are_reproducible(finished):
    from gymnasium.utils.env_checker import check_env

    args = s.parse_args(["--play", str(finished)])
    dream = s.Dream(*s.load_run(args, args.play))

    def frames(seed, shift=0):
        first, info = dream.reset(seed=seed)
        return [first["image"], info["real"]["image"]] + [dream.step((t + shift) % 5)[0]["image"] for t in range(6)]

    one, two, other = frames(3), frames(3), frames(4)
    assert all(map(np.array_equal, one, two)) and not all(map(np.array_equal, one, other))
    check_env(dream)


def test_training_never_reads_the_actions(tmp_path):
    """The file is gone as soon as training starts, and the run is the same."""
    (tmp_path / "with").mkdir(), (tmp_path / "without").mkdir()
    run_script(s, *SQUARE, *SMALL, cwd=tmp_path / "with")
    patch = """
import os
whole = s.Clips.open
def open_(self, *args):
    os.remove(f"{self.folder}/actions.bin")
    return whole(self, *args)
s.Clips.open = open_
"""
    run_script(s, *SQUARE, *SMALL, cwd=tmp_path / "without", patch=patch)
    runs = [only_run(tmp_path / name) for name in ("with", "without")]
    same(checkpoint(runs[0])["agent"], checkpoint(runs[1])["agent"])
    assert metrics(runs[0]) == metrics(runs[1]) and not (runs[1] / "video/actions.bin").exists()


STOP = "whole = s.{0}\ndef f(self, *a):\n  if {1}: os.kill(os.getpid(), 15)\n  return whole(self, *a)\ns.{0} = f"
STOPS = {  # code that stops a run in each of its stages
    "recording": STOP.format("Clips.add", "self.count == 150"),
    "tokenizer": STOP.format("Agent.update_tokenizer", "self.updates[0] == 3"),
    "dynamics": STOP.format("Agent.update_dynamics", "self.updates[1] == 3"),
}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STOPS)
def test_resume_is_exact_in_each_stage(stage, finished, tmp_path):
    flags = [*SQUARE, *SMALL, "--eval-every", "96"]
    patch = "import os\nwait, ticks = s.time.time, iter(range(10**9))\ns.time.time = lambda: wait() + 2 * next(ticks)\n"
    result = run_script(s, *flags, cwd=tmp_path, patch=patch + STOPS[stage], code=128 + signal.SIGTERM)
    run = only_run(tmp_path)
    assert f"--resume runs/{run.name}" in result.stdout.splitlines()[-1]
    state = checkpoint(run)
    assert (state["kept"][0] < 400) == (stage == "recording") and state["updates"] < 12
    assert (state["updates"] > 6) == (stage == "dynamics")
    run_script(s, "--resume", run, cwd=tmp_path)
    same(checkpoint(finished)["agent"], checkpoint(run)["agent"])
    assert metrics(finished) == metrics(run)
    for name in ("frames", "starts", "actions"):
        assert (finished / f"video/{name}.bin").read_bytes() == (run / f"video/{name}.bin").read_bytes(), name


def test_killed_after_a_save(finished, tmp_path):
    flags = [*SQUARE, *SMALL, "--eval-every", "96", "--save-every", "0"]
    process = start_script(s, *flags, cwd=tmp_path)
    run = only_run(tmp_path)
    while not (run / "checkpoint.pt").exists():
        assert process.poll() is None
    process.kill()
    process.communicate()
    run_script(s, "--resume", run, cwd=tmp_path)
    same(checkpoint(finished)["agent"], checkpoint(run)["agent"])
    assert metrics(finished) == metrics(run)


def test_no_room_for_the_video(tmp_path):
    """One line, and when there is room again the recording goes on."""
    patch = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, -1))\n"
    flags = [*SQUARE, *SMALL, "--total-timesteps", "4000"]
    result = run_script(s, *flags, cwd=tmp_path, patch=patch, code=2)
    assert "no room for the video" in result.stderr.splitlines()[-1] and "--resume" in result.stderr.splitlines()[-1]
    run = only_run(tmp_path)
    assert 0 < checkpoint(run)["kept"][0] * 768 <= 2_000_000
    run_script(s, "--resume", run, cwd=tmp_path)
    assert checkpoint(run)["kept"][0] == 4000


def test_video_that_is_gone_is_recorded_again(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("video"))
    s.load_run(s.parse_args(["--play", str(run)]), str(run))
    for name in ("frames", "starts", "actions"):
        assert (finished / f"video/{name}.bin").read_bytes() == (run / f"video/{name}.bin").read_bytes(), name


def test_the_published_run_can_be_played(tmp_path):
    """In half precision, without optimizers and video: each code is a move of the duck, and each move has a code."""
    published = ROOT / "benchmarks/results/genie__Pond-v0__tiny__seed1"
    assert sum(path.stat().st_size for path in published.glob("*.*")) < 2e6
    run = shutil.copytree(published, tmp_path / "run", ignore=shutil.ignore_patterns("video"))
    args = s.parse_args(["--play", str(run), "--no-cuda"])
    dream = s.Dream(*s.load_run(args, args.play))

    def place(image):
        yellow = np.abs(image.astype(int) - s.Pond.colours["y"]).max(-1) < 60
        return np.divmod(yellow.reshape(4, 8, 4, 8).sum((1, 3)).argmax(), 4)

    moves = set()
    for action in range(dream.action_space.n):
        places = [place(dream.reset(seed=1)[0]["image"])]
        places += [place(dream.step(action)[0]["image"]) for _ in range(20)]
        steps = (np.diff(places, axis=0) + 1) % 4 - 1
        (move, count) = max(zip(*np.unique(steps, axis=0, return_counts=True), strict=True), key=lambda pair: pair[1])
        assert count >= 15, steps
        moves.add(tuple(move))
    assert moves == {tuple(move) for move in s.Pond.moves // 8}


def test_the_page(finished):
    """Other keys than those of the latent actions change nothing."""
    with served(s, finished) as url:
        states = []
        for path in ("/reset", "/step?key=ArrowLeft", "/step?key=x", "/step?key=d"):
            with urllib.request.urlopen(url + path, timeout=20) as reply:
                states.append(json.loads(reply.read()))
    assert [state["text"] for state in states] == ["a new dream", "step 1", "step 1", "step 2"]
    assert states[1]["dream"] == states[2]["dream"] and len(states[0]["keys"].split()) == 5


def test_the_page_in_a_browser(finished, tmp_path):
    with served(s, finished) as url:
        press_a_key(url, tmp_path)


def test_what_does_not_fit_is_refused(finished, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = (finished / "checkpoint.pt").read_bytes()
    for flag in ("--num-codes 32", "--clip-length 8", "--env-id CartPole-v1", "--steps 9"):
        assert "cannot change" in refused(s, "--resume", finished, *flag.split())
    assert "pixels" in refused(s, *SMALL, "--env-id", "CartPole-v1", "--obs", "state")
    assert "--context" in refused(s, *SMALL, "--context", "4")
    assert "fsq" in refused(s, *SQUARE, *SMALL, "--quantizer", "fsq", "--num-actions", "7")
    assert "GB are free" in refused(s, *SMALL, *SQUARE[:2], "--total-timesteps", 10**13)
    assert "one image" in refused(s, *SMALL, "--env-id", "toy_envs:Mixed-v0")
    assert "not a run directory" in refused(s, "--play", tmp_path)
    (finished / "checkpoint.pt").write_bytes(saved[:1000])
    try:
        assert "cannot be read" in refused(s, "--play", finished)
    finally:
        (finished / "checkpoint.pt").write_bytes(saved)


def test_a_loss_that_is_not_finite(tmp_path):
    patch = "whole = s.Agent.update_dynamics\ndef f(self, *a):\n  self.dynamics.embed.data.fill_(float('nan'))\n"
    patch += "  return whole(self, *a)\ns.Agent.update_dynamics = f"
    result = run_script(s, *SQUARE, *SMALL, cwd=tmp_path, patch=patch, code=2)
    (line,) = lines(result.stderr)
    assert "losses/dynamics_loss is nan" in line and "update 6" in line


# Several processes


def torchrun(*args, cwd):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command = [sys.executable, *launch, str(ROOT / "genie.py"), *map(str, args)]
    result = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_train_as_one(finished, shard, tmp_path):
    """The whole run, with copies that average gradients and with sharded parameters (FSDP2): the same losses."""
    flags = [*SQUARE, *SMALL, "--eval-every", "96", "--num-envs", "2", "--total-timesteps", "800"]
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    run_script(s, *flags, cwd=tmp_path / "one")
    torchrun(*flags, *["--shard"] * shard, cwd=tmp_path / "two")
    one, two = (metrics(only_run(tmp_path / name)) for name in ("one", "two"))
    losses = [(a, b) for a, b in zip(one, two, strict=True) if a[1].startswith("losses/")]
    assert len(losses) > 20
    for a, b in losses:
        assert a[:2] == b[:2] and float(a[2]) == pytest.approx(float(b[2]), rel=2e-3, abs=1e-5), (a, b)
    torchrun("--resume", only_run(tmp_path / "two"), cwd=tmp_path / "two")  # loads, and has nothing left to do


# Learning


@pytest.mark.slow
def test_learns_the_actions_of_a_world(tmp_path):
    """Codes say which of five moves a square makes: mutual information above 0.9 of its maximum, the moves' entropy."""
    flags = "--env-id toy_envs:Square-v0 --total-timesteps 6000 --num-envs 1 --image-size 16 --patch 4 --lam-patch 8 "
    flags += "--clip-length 4 --context 3 --num-codes 32 --num-actions 8 --latent-dim 16 --lam-encoder 2 64 4 16 "
    flags += "--lam-decoder 2 64 4 16 --encoder 1 32 2 16 --decoder 1 32 2 16 --dynamics 1 32 2 16 --lam-change "
    flags += "--lam-centre --lam-shift 1 --tokenizer-steps 100 --steps 1500 --tokenizer-batch-size 16 --batch-size 32 "
    flags += "--ffn 4 --learning-rate 2e-3 --final-rate 2e-5 --eval-every 100000000 --eval-episodes 128 "
    flags += "--no-cuda --no-amp"
    run_script(s, *flags.split(), cwd=tmp_path, timeout=3000)
    values = {row[1]: float(row[2]) for row in metrics(only_run(tmp_path)) if row[1].startswith("eval/")}
    moves, codes = math.log(5), math.log(values["eval/lam_perplexity"])  # entropies: the information is in their mean
    assert values["eval/action_information"] * (moves + codes) / 2 / moves > 0.9, values
