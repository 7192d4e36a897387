"""genie.py: closed forms, masks and stop-gradients of the three models, video of all kinds, runs from end to end."""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, checkpoint, environment, last_video, lines, metrics, only_run, run_script, scalars, tiny
from gymnasium.utils.env_checker import check_env
from PIL import Image
from test_runs import IN_GROUP, calls, same, undocumented
from test_shapes import check
from toy_envs import Square

import genie as s
from environments.pond import Pond

slow = pytest.mark.slow
SQUARE = ["--env-id", "toy_envs:Square-v0", "--total-timesteps", "400"]


def make(*flags, seed=0, **values):
    args = s.parse_args([*tiny(s), *flags])
    for key, value in values.items():
        setattr(args, key, value)
    torch.manual_seed(seed)
    agent = s.Agent(args)
    for parameter in agent.parameters():  # nothing is to be zero by accident
        parameter.data += 0.1 * torch.randn_like(parameter)
    return agent


def clip(batch=3, length=4, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (batch, length, 16, 16, 3), np.uint8))


# Maths


@pytest.mark.parametrize("height, width, size, count", [(64, 64, 4, 256), (90, 160, 4, 920), (90, 160, 16, 60)])
def test_patches_and_back(height, width, size, count):
    video, args = torch.rand(2, 3, height, width, 3), s.Args(image_size=height, image_width=width)
    patches = s.patchify(video, size)
    assert patches.shape == (2, 3, count, size**2 * 3) and s.num_patches(size, args) == count
    assert torch.equal(s.unpatchify(patches, size, height, width), video)
    assert torch.equal(patches[0, 0, 1].view(size, size, -1), video[0, 0, :size, size : 2 * size])


def test_psnr_perplexity_and_mutual_information():
    assert s.psnr(torch.zeros(2, 4, 4, 3), torch.full((2, 4, 4, 3), 0.1)).tolist() == pytest.approx([20, 20])
    assert s.perplexity(torch.tensor([5, 5, 0, 5])).item() == pytest.approx(3, rel=1e-5)
    a = torch.arange(4).repeat_interleave(25)
    assert s.mutual_information(a, 3 - a) == pytest.approx(1)
    assert s.mutual_information(a, torch.arange(5).repeat(20)) == pytest.approx(0, abs=1e-9)
    assert s.mutual_information(a, a // 2) == pytest.approx(2 * 1 / (2 + 1))  # 1 bit of 2 and 1
    assert s.mutual_information(torch.zeros(9).long(), torch.zeros(9).long()) == 0


def test_learning_rates():
    agent = make(steps=1000, warmup=10, tokenizer_warmup=10, learning_rate=2e-3, final_rate=1e-4, tokenizer_rate=2e-3)
    rate = lambda stage, n: agent.rate(stage, torch.tensor(float(n))).item()
    assert [rate(0, 0), rate(1, 0)] == pytest.approx([2e-4, 2e-4]) and rate(0, 9) == rate(0, 900)
    assert rate(1, 10) == pytest.approx(2e-3) and rate(1, 1000) == pytest.approx(1e-4)
    assert rate(1, 505) == pytest.approx((2e-3 + 1e-4) / 2)


def test_a_shift_is_a_roll():
    place = torch.cartesian_prod(torch.arange(12), torch.arange(16)).view(1, 1, 12, 16, 2).expand(99, 3, -1, -1, -1)
    corner = (out := s.roll(place, 6))[:, :1, :1, :1]  # where it came from
    assert torch.equal(out, (place + corner) % torch.tensor([12, 16])) and {*corner.flatten().tolist()} == {0, 6}
    with calls(s, "roll") as moved, calls(s.LatentActionModel, "latent") as seen:
        make("--lam-shift", "8").lam.loss(clip())
    assert seen[0][0][1] is moved[0][1]  # what the encoder sees


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
    latent = lambda v: tokenizer.encoder(tokenizer.patch_in(s.patchify(v / 255, 4)))[0]
    assert changes(latent, clip(), 2) == [2, 3]
    assert changes(lam.latent, clip(), 2) == [1, 2]  # the action that leads to a frame sees it
    assert changes(lam.latent, clip(), 0) == [0, 1, 2]
    lam = make("--lam-change").lam
    assert changes(lam.latent, clip(), 0) == [0] and changes(lam.latent, clip(), 2) == [1, 2]  # sees nothing else
    policy = s.Policy(make("--clip-length", "5").args, 5)
    assert changes(policy, clip(), 2) == [2, 3]
    ids = torch.randint(16, (2, 4, 16))
    other = ids.clone()
    other[:, 2] = (ids[:, 2] + 1) % 16
    for function in (lambda x: tokenizer.decode(x), lambda x: agent.dynamics(x, torch.zeros(2, 4, 8))[0]):
        a, b = function(ids), function(other)
        assert [torch.allclose(a[:, t], b[:, t], atol=1e-6) for t in range(4)] == [True, True, False, False]


@torch.no_grad()
def test_the_decoder_of_the_lam_knows_the_next_frame_by_its_code_alone():
    lam, patches = make().lam, s.patchify(clip() / 255, 8)
    other = patches.clone()
    other[:, 3] = 1 - other[:, 3]
    code = torch.randn(3, 3, 8)
    predict = lambda x: lam.decoder(lam.past_in(x[:, :-1]) + lam.code_in(code).unsqueeze(2))[0]
    assert torch.equal(predict(patches), predict(other))
    assert s.LatentActionModel(lam.args).loss(clip())[0]["lam_recon_loss"].item() == pytest.approx(1)  # copies at first


@torch.no_grad()
def test_a_frame_after_its_past_is_a_frame_of_the_whole():
    agent = make()
    ids, code = torch.randint(16, (2, 4, 16)), torch.randn(2, 4, 8)
    whole = agent.dynamics(ids, code)[0]
    past = agent.dynamics(ids[:, :3], code[:, :3])[1]
    torch.testing.assert_close(agent.dynamics(ids[:, 3:], code[:, 3:], past)[0], whole[:, 3:], rtol=1e-4, atol=1e-5)


def test_what_is_masked():
    torch.manual_seed(0)
    masked = s.draw_masks((400, 16, 16), 0.0, "cpu")
    assert masked.shape == (400, 16, 16) and not masked[:, 0].any()
    rates = masked[:, 1:].float().mean((1, 2))
    assert 0.4 < rates.min() and rates.max() > 0.97 and rates.mean() == pytest.approx(0.75, abs=0.02)
    assert np.histogram(rates, 5, (0.5, 1))[0].min() > 50  # uniform
    frames = s.draw_masks((400, 16, 16), 1.0, "cpu").any(2)
    assert (frames[:, :-1] <= frames[:, 1:]).all() and frames[:, -1].all()  # clean ones come first
    assert len(set(frames.sum(1).tolist())) == 15


# Gradients: who gets them from what; codes


def test_straight_through_and_codes_that_move_towards_the_encoder():
    layer, x = s.VQ(make().args, 5), torch.randn(7, 8, requires_grad=True)
    code, index, loss, matched = layer(x)
    torch.testing.assert_close(code, layer.codes()[index], atol=1e-6, rtol=0)
    e = torch.nn.functional.normalize(x, dim=-1)
    torch.testing.assert_close(matched, e.detach())
    weight = torch.randn_like(code)
    (grad,) = torch.autograd.grad((code * weight).sum(), x, retain_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad((e * weight).sum(), x, retain_graph=True)[0])
    book, mine = torch.autograd.grad(loss, [layer.codebook, x])
    chosen = layer.codes()[index]
    expected = [(chosen - e.detach()).square().mean(), 0.25 * (e - chosen.detach()).square().mean()]
    torch.testing.assert_close(book, torch.autograd.grad(expected[0], layer.codebook, retain_graph=True)[0])
    torch.testing.assert_close(mine, torch.autograd.grad(expected[1], x)[0])


def test_without_window_shift_the_error_is_that_of_decoding():
    tokenizer, video = make("--window-shift", "0").tokenizer, clip()
    error = (tokenizer.decode(tokenizer.encode(video)) - video / 255).square().mean()
    torch.testing.assert_close(tokenizer.loss(video)[0]["tokenizer_recon_loss"], error)


def test_the_dynamics_give_the_lam_no_gradient(monkeypatch):
    agent = make()
    loss = agent.dynamics_loss(clip())[0]
    lam = [*agent.lam.parameters(), *agent.tokenizer.parameters()]
    grads = torch.autograd.grad(loss["dynamics_loss"], lam, allow_unused=True, retain_graph=True)
    assert all(g is None for g in grads)
    others = torch.autograd.grad(loss["dynamics_loss"], list(agent.dynamics.parameters()), retain_graph=True)
    assert all(g.abs().sum() > 0 for g in others)
    own = torch.autograd.grad(sum(loss.values()), list(agent.tokenizer.parameters()), allow_unused=True)
    assert all(g is None for g in own)
    monkeypatch.setattr(s, "draw_masks", lambda shape, *_: torch.zeros(shape, dtype=torch.bool))
    assert agent.dynamics_loss(clip())[0]["dynamics_loss"] == 0  # tokens that are seen are no targets


def test_each_stage_changes_its_own_models():
    agent = make("--no-lam-change", "--clip", "0.01")  # with lam_change the LAM's encoder has no time to attend over
    state = lambda: {k: v.clone() for k, v in agent.named_parameters()}
    first = state()
    agent.update(0, clip())
    second = state()
    agent.update(1, clip())
    third = state()
    for key in first:
        assert torch.equal(first[key], second[key]) != key.startswith("tokenizer"), key
        assert torch.equal(second[key], third[key]) == key.startswith("tokenizer"), key
    assert agent.updates.tolist() == [1, 1]
    for group in [optimizer.param_groups[0] for optimizer in agent.optimizers]:
        norm = torch.nn.utils.get_total_norm([p.grad for p in group["params"]])
        assert norm.item() == pytest.approx(0.01, rel=1e-3) and group["betas"] == (0.9, 0.9)


def test_shape_comments():
    sizes = dict(B=3, T=5, L=4, N=35, P=35, V=37, A=7, C=16, D=10, E=48, H=20, W=28)
    flags = "--video-dir none --image-size 20 --image-width 28 --patch 4 --lam-patch 4 --clip-length 5 --num-codes 37 "
    agent = make(*f"{flags} --num-actions 7 --latent-dim 10".split())
    video = torch.randint(256, (3, 5, 20, 28, 3), dtype=torch.uint8)

    def run():
        agent.update(0, video)
        agent.update(1, video)
        agent.show(agent.infer(video)[0])

    check(s, sizes, run, least=18)


def test_dead_codes_restart_where_the_encoder_is():
    args = make(latent_dim=4).args
    layer, x = s.VQ(args, 8), torch.nn.functional.normalize(torch.randn(100, 4), dim=-1)
    book, index = layer.codebook.detach().clone(), torch.arange(100) % 2  # only two are used
    for update in range(50):
        assert torch.equal(layer.codebook, book), update
        stats = layer.restart(x, index)
    assert stats["restarts"] == 6 and stats["perplexity"].item() == pytest.approx(2, rel=1e-5)
    assert torch.equal(layer.codebook[:2], book[:2]) and not layer.idle.any()
    assert (x @ layer.codes()[2:].T).max(0).values.tolist() == pytest.approx([1] * 6, abs=1e-5)


def test_centred_codes_do_not_collapse():
    args = make().args
    layer, x = s.VQ(args, 4, centre=True), torch.randn(64, 3, 8) * 0.01 + torch.randn(8)  # nearly all the same
    assert s.VQ(args, 4)(x)[1].unique().numel() <= 3
    for _ in range(200):
        index = layer(x)[1]
    assert index.unique().numel() == 4
    torch.testing.assert_close(layer.mean, x.mean((0, 1)), atol=1e-4, rtol=0)
    with torch.no_grad():
        assert torch.equal(layer(x[:1])[1], index[:1])  # a clip alone


# Sampling


def test_a_perfect_model_reproduces_the_clip_along_a_cosine():
    truth, seen = torch.randint(16, (2, 256)), []

    def predict(ids):
        seen.append(ids.clone())
        return 50 * torch.nn.functional.one_hot(truth, 16).float()

    out = s.maskgit_sample(predict, torch.full((2, 256), 16), 16, 25, 1.0)
    assert torch.equal(out, truth)
    masked = [(ids == 16).sum(1).tolist() for ids in [*seen, out]]
    revealed = [a[0] - b[0] for a, b in zip(masked[:-1], masked[1:], strict=True)]
    known = [1, 1, 3, 3, 5, 5, 6, 8, 8, 9, 10, 10, 12, 12, 13, 13, 14, 14, 15, 15, 15, 16, 16, 16, 16]
    assert sorted(revealed) == known and all(a == b for a, b in masked)
    for before, after in zip(seen[:-1], seen[1:], strict=True):
        kept = before != 16
        assert torch.equal(before[kept], after[kept])


def test_samples_follow_the_probabilities_and_the_temperature():
    torch.manual_seed(0)
    logit = torch.tensor([0.2, 0.3, 0.5]).log()
    for temperature in (1.0, 2.0):
        out = s.maskgit_sample(lambda ids: logit.expand(*ids.shape, 3), torch.full((50_000, 1), 3), 3, 1, temperature)
        expected = (logit / temperature).softmax(0)
        torch.testing.assert_close(out.flatten().bincount() / 50_000, expected, atol=0.01, rtol=0)


def test_rollouts_repeat_and_depend_on_actions():
    agent = make()
    ids, action = agent.infer(clip())

    def run(action, seed):
        torch.manual_seed(seed)
        return agent.rollout(ids[:, :2], action)

    longer = torch.cat([action, action, action], 1)
    one = run(longer, 0)
    assert one.shape == (3, 2 + 9 - 1, 16) and torch.equal(one[:, :2], ids[:, :2]) and one.max() < 16
    assert torch.equal(one, run(longer, 0)) and not torch.equal(one, run(longer, 1))
    assert not torch.equal(one, run((longer + 1) % 5, 0))
    assert agent.show(one).shape == (3, 10, 16, 16, 3)
    agent.args.maskgit_steps, agent.args.temperature = 1, 1e-6  # the likeliest tokens, all at once
    one = agent.rollout(ids[:, :2], longer)
    for end in range(2, 10):  # each frame follows from the three before and the actions between all four
        code = agent.lam.quantizer.codes()[longer[:, max(0, end - 3) : end]]
        shown = torch.cat([one[:, max(0, end - 3) : end], torch.full_like(one[:, :1], 16)], 1)
        logits, _ = agent.dynamics(shown, torch.nn.functional.pad(code, (0, 0, 1, 0)))
        assert torch.equal(one[:, end], logits[:, -1].argmax(-1))


# Presets


SIZES = [("coinrun", "", (67, 67, 51)), ("small", "", (8.4, 8.4, 19.7))]  # millions of tokenizer, LAM, dynamics
SIZES += [("platformers", "", (200, 336, 41))]  # LAM: 336 with attention alone; paper: 300
SIZES += [("platformers", "--ffn 0.4 --dynamics 48 5120 36 128", (200, 336, 10_100))]


@pytest.mark.parametrize("preset, flags, sizes", SIZES)
def test_parameter_counts_of_presets(preset, flags, sizes):
    args = s.parse_args(["--preset", preset, *flags.split()])
    with torch.device("meta"):
        parts = s.Tokenizer(args), s.LatentActionModel(args), s.Dynamics(args)
    for part, size in zip(parts, sizes, strict=True):
        count = sum(p.numel() for p in part.parameters())
        assert count / 1e6 == pytest.approx(size, rel=0.17 if preset == "platformers" else 0.1), type(part).__name__


def test_the_coinrun_preset_is_appendix_f():
    args = s.parse_args(["--preset", "coinrun"])
    paper = dict(image_size=64, clip_length=16, num_codes=1024, num_actions=6, latent_dim=32, patch=4, lam_patch=16)
    paper |= dict(encoder=(8, 512, 8, 64), decoder=(8, 512, 8, 64), lam_encoder=(8, 512, 8, 64))
    paper |= dict(lam_decoder=(8, 512, 8, 64), dynamics=(12, 512, 8, 64), total_timesteps=10_000_000)
    paper |= dict(tokenizer_steps=300_000, tokenizer_batch_size=48, tokenizer_rate=3e-4, tokenizer_warmup=10_000)
    paper |= dict(steps=200_000, batch_size=36, learning_rate=3e-5, final_rate=3e-6, warmup=5_000, weight_decay=1e-4)
    paper |= dict(maskgit_steps=25, temperature=1.0, action_repeat=1, env_id="environments.procgen:coinrun-v0")
    assert {key: getattr(args, key) for key in paper} == paper
    assert args.env_kwargs == dict(start_level=0, num_levels=10_000, distribution_mode="hard", native=True)
    assert not any((args.window_shift, args.clean_context, args.clip, args.lam_shift, args.lam_change, args.lam_centre))


# Video


def test_the_pond():
    """Each action turns the duck and moves it by its size around the pond, and no other thing; the boat sails on."""
    env = gym.make("environments.pond:Pond-v0").unwrapped
    env.reset(seed=0)
    ducks = [np.array([list(line) for line in sprite]) for sprite in env.ducks]
    for action, move in enumerate([(0, 8), (0, -8), (8, 0), (-8, 0), (0, 0)] * 4):
        place, sailed, image = env.place + move, env.sailed, env.step(action % 5)[0]
        yellow = (image == env.colours["y"]).all(-1).nonzero()
        expected = (np.argwhere(ducks[action % 5] == "y") + place) % 32
        assert set(map(tuple, expected)) == set(zip(*yellow, strict=True)) and env.sailed == sailed + 1
    assert len({duck.tobytes() for duck in ducks}) == 5
    assert not any(env.step(0)[3] for _ in range(179)) and env.step(0)[3]
    env.reset(seed=1)
    assert sum(env.step(env.expert())[1] for _ in range(200)) >= 196  # at most four steps away


def test_clips_cross_no_start_and_the_tail_is_held_out(tmp_path):
    starts = np.random.default_rng(0).random((300, 3)) < 0.1
    starts[0] = True
    args = make(num_envs=3, clip_length=5, image_size=2, image_width=2).args
    video = s.Video(str(tmp_path), args)
    for t, row in enumerate(starts):
        video.add(np.full((3, 2, 2, 3), t % 256, np.uint8), np.where(row, -1, t))
    video.index()
    whole = {(t, e) for t in range(296) for e in range(3) if not starts[t + 1 : t + 5, e].any()}
    assert {tuple(w) for w in video.train} == {(t, e) for t, e in whole if t + 5 <= 270}
    assert {tuple(w) for w in video.held_out} == {(t, e) for t, e in whole if t >= 270}
    frames, action = video.get(video.train[:7], torch.device("cpu"))
    assert frames.shape == (7, 5, 2, 2, 3)
    assert (frames[:, :, 0, 0, 0].numpy() == (video.train[:7, :1] + np.arange(5)) % 256).all()
    assert (action.numpy() == video.train[:7, :1] + np.arange(1, 5)).all()
    os.truncate(tmp_path / "image", 36 * 200 + 5)  # what a kill leaves
    again = s.Video(str(tmp_path), args)
    assert again.count == 200 and os.path.getsize(tmp_path / "action") == 200 * 24


def write_video(path, levels, fps=20, size=(48, 64), codec="libx264", pixels="yuv420p", times=None, left=None, g="250"):
    """A file of frames of these levels of grey; `times`: of each, in seconds; `left`: level of the left half."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=fps)
        (stream.height, stream.width), stream.pix_fmt, stream.options = size, pixels, {"g": g}
        for i, level in enumerate(levels):
            image = np.full((*size, 3), level, np.uint8)
            if left is not None:
                image[:, : size[1] // 2] = left
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            if times is not None:
                frame.pts = round(times[i] * fps)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def read(path, **values):
    """Levels of grey of the frames that are read, and where a clip begins."""
    args = make("--image-size", "16", **values).args
    images, starts = zip(*s.read_frames(str(path), args), strict=True)
    assert all(image.shape == (args.image_size, args.image_width, 3) for image in images)
    return np.array([image.mean() for image in images]), [t for t, first in enumerate(starts) if first], images


RAMP = np.linspace(20, 220, 40).astype(int)


@pytest.mark.parametrize("fps, expected", [(10, RAMP), (20, RAMP[::2]), (30, RAMP[::3]), (5, np.repeat(RAMP, 2)[1:])])
def test_files_of_any_rate(fps, expected, tmp_path):
    write_video(tmp_path / "a.mp4", RAMP, fps)
    levels, starts, _ = read(tmp_path / "a.mp4")
    assert len(levels) == len(expected) and np.abs(levels - expected).max() < 6 and starts == [0]


def test_files_of_a_variable_rate_and_with_a_clock_that_jumps(tmp_path):
    times = np.cumsum(np.resize([0.05, 0.3, 0.1, 0.05], 40))
    write_video(tmp_path / "a.mkv", RAMP, 20, times=times)
    levels, starts, _ = read(tmp_path / "a.mkv")
    ticks = times[0] + np.arange(len(levels)) / 10
    assert np.abs(levels - RAMP[np.searchsorted(times, ticks - 1e-3)]).max() < 6 and starts == [0]
    write_video(tmp_path / "b.mkv", RAMP, 20, times=np.arange(40) / 20 + 100 * (np.arange(40) >= 20))
    levels, starts, _ = read(tmp_path / "b.mkv")
    assert len(levels) == 20 and starts == [0, 10]  # nothing stands still for 100 seconds
    for name, ramp in ("c", RAMP), ("d", RAMP[::-1]):
        write_video(tmp_path / f"{name}.ts", ramp, 20)
    joined = (tmp_path / "c.ts").read_bytes() + (tmp_path / "d.ts").read_bytes()
    (tmp_path / "joined.ts").write_bytes(joined)
    levels, starts, _ = read(tmp_path / "joined.ts", cut=1.0)
    assert len(levels) in (39, 40) and len(starts) == 2, (len(levels), starts)  # the second one's clock starts anew


def test_files_of_other_sizes_pixels_and_directions(tmp_path):
    write_video(tmp_path / "odd.mkv", RAMP, 10, size=(33, 47), codec="ffv1", pixels="bgr0")
    write_video(tmp_path / "grey.mkv", RAMP, 10, codec="ffv1", pixels="gray")
    write_video(tmp_path / "alpha.mov", RAMP, 10, codec="png", pixels="rgba")
    first, *others = (Image.new("L", (20, 20), int(level)) for level in RAMP)
    first.save(tmp_path / "a.gif", save_all=True, duration=100, append_images=others)
    for name in ("odd.mkv", "grey.mkv", "alpha.mov", "a.gif"):
        levels, starts, _ = read(tmp_path / name)
        assert len(levels) == 40 and np.abs(levels - RAMP).max() < 6 and starts == [0], name
    ffmpeg = [pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe(), "-loglevel", "error"]
    write_video(tmp_path / "wide.mp4", [200] * 40, 10, left=30)
    for turn in ("0", "90", "180", "270"):
        path = str(tmp_path / f"turned_{turn}.mp4")
        command = [*ffmpeg, "-display_rotation", turn, "-i", str(tmp_path / "wide.mp4"), "-c", "copy", path]
        subprocess.run(command, check=True)
        command = [*ffmpeg, "-i", path, "-s", "16x16", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        shown = subprocess.run(command, capture_output=True, check=True).stdout  # upright, as players show it
        shown = np.frombuffer(shown, np.uint8).reshape(-1, 16, 16, 3)[5]
        assert np.abs(read(path)[2][5].astype(int) - shown).mean() < 12, turn


@pytest.mark.parametrize("damaged", ["middle", 18, 19, 22, 25])
def test_damaged_files(damaged, tmp_path):
    """What is damaged, some bytes or a packet, is left out, and a clip begins after it. A key frame from before it that
    the decoder gives after the error does not end it."""
    rng = np.random.default_rng(0)
    good = np.resize(RAMP, 400) if damaged == "middle" else rng.integers(20, 220, 400)
    write_video(tmp_path / "a.mp4", good, 10, g="20", size=(240, 320))
    whole = bytearray((tmp_path / "a.mp4").read_bytes())
    with pytest.importorskip("av").open(str(tmp_path / "a.mp4")) as file:
        packets = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]
    place, size = (len(whole) // 2, 60) if damaged == "middle" else packets[damaged]
    whole[place + 4 : place + size] = rng.bytes(size - 4) if damaged == "middle" else bytes(size - 4)
    (tmp_path / "b.mp4").write_bytes(whole)
    levels, starts, _ = read(tmp_path / "b.mp4", cut=1.0)
    assert 300 < len(levels) < 400 and len(starts) == 2
    assert np.abs(levels[: starts[1]] - good[: starts[1]]).max() < 6
    assert np.abs(levels[starts[1] :] - good[starts[1] - len(levels) :]).max() < 6


def test_a_disk_that_is_full(tmp_path):
    """What was recorded before is not taken for all that a file shows."""
    video = s.Video(str(tmp_path), make("--image-size", "16").args)
    with open("/dev/full", "ab", 0) as video.files["image"], pytest.raises(SystemExit, match="No space"):
        video.add(np.zeros(video.shape, np.uint8), [0])


def test_a_folder_of_files(tmp_path, capsys):
    """Resized, cut; what is empty, short or no video is named and left out; what is new is added later."""
    folder = tmp_path / "videos"
    (folder / "deeper").mkdir(parents=True)
    write_video(folder / "a.mp4", [20] * 40 + [220] * 40)  # 4 s at 20 frames/s
    write_video(folder / "deeper/b.mp4", [220] * 30, fps=10)
    write_video(folder / "short.mp4", [20] * 3, fps=10)
    write_video(folder / "one.mp4", [20], fps=10)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "noise.mkv").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "empty.gif").write_bytes(b"")
    shutil.copy(folder / "empty.gif", os.fsencode(folder) + b"/\xe9t\xe9.avi")  # no UTF-8
    (folder / "notes.txt").write_text("no video")
    args = make("--video-dir", str(folder)).args
    video = s.record(args, str(tmp_path / "run")).index()
    out = capsys.readouterr()
    told = [line for line in lines((out.out + out.err).replace("\r", "\n")) if "skipped" in line or "used" in line]
    assert told[-1] == "2 of 8 files are used, 70 frames" and len(told) == 7
    for name in ("short", "one", "empty.mp4", "noise", "empty.gif", ".avi"):
        assert any(name in line for line in told)
    assert np.flatnonzero(video.action[:, 0] < 0).tolist() == [0, 20, 40]
    assert abs(int(video.image[0].mean()) - 20) < 8 and abs(int(video.image[69].mean()) - 220) < 8
    before = (tmp_path / "run/image").read_bytes()
    write_video(folder / "aa.mp4", [100] * 30, fps=10)
    video = s.record(args, str(tmp_path / "run")).index()
    assert video.count == 100 and (tmp_path / "run/image").read_bytes()[: len(before)] == before
    os.truncate(tmp_path / "run/image", len(before) + 5 * 768)  # what a copy may lack is read again
    video = s.record(args, str(tmp_path / "run")).index()
    assert video.count == 100 and abs(int(video.image[99].mean()) - 100) < 8
    shutil.rmtree(folder)
    assert s.record(args, str(tmp_path / "run")).count == 100


# Runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("genie")
    result = run_script(s, *SQUARE, *tiny(s), "--eval-every", "96", cwd=folder)
    assert not [line for line in lines(result.stderr) if "recording" not in line]
    return only_run(folder)


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "runs" / finished.name)


def load(run):
    args = s.parse_args(["--evaluate", str(run), "--no-cuda"])
    return s.load_run(args, str(run)), args


def test_a_run_from_end_to_end(finished):
    rows = scalars(finished)
    assert {"losses/tokenizer_recon_loss", "losses/lam_recon_loss", "losses/dynamics_loss"} <= rows.keys()
    assert {"eval/tokenizer_psnr", "eval/action_information", "eval/delta_psnr", "eval/masked_accuracy"} <= rows.keys()
    assert checkpoint(finished)["agent"]["updates"].tolist() == [6, 6] and checkpoint(finished)["frame"] == 12 * 4 * 4
    video = s.Video(finished / "video", load(finished)[1]).index()
    action, known = video.action[:, 0], video.action[1:, 0] >= 0
    assert np.flatnonzero(action < 0).tolist() == [0, 101, 202, 303] and {*action} == {-1, 0, 1, 2, 3, 4}
    place = np.array([np.argwhere((image == (250, 200, 50)).all(-1))[0] // 4 for image in video.image[:, 0]])
    assert len(place) == 400 and not ((np.diff(place, axis=0) - Square.moves[action[1:]])[known] % 4).any()
    height, width = np.array(last_video(finished, "video/latent_actions").shape[1:3]) // 16
    assert (height, width) == (3, 2 + 5)  # prompts; the truth, its actions, each of the five codes
    assert not undocumented(s, finished)


def test_an_evaluation_counts_each_clip_once_and_compares(finished, monkeypatch):
    (agent, _), args = load(finished)
    video, results = s.Video(f"{finished}/video", args).index(), []
    for args.eval_episodes in (len(video.held_out), 999):
        results.append(s.measure(agent, args, video))
    assert results[0] == results[1]
    infer, seen = agent.infer, []
    agent.infer = lambda clips: seen.append((clips, *infer(clips))) or seen[-1][1:]
    agent.rollout = lambda ids, action: action
    agent.show = lambda action: seen[-1][0] * (action is seen[-1][2])  # perfect with these actions, black with others
    monkeypatch.setattr(s, "draw_masks", lambda shape, *_: torch.arange(shape[1])[:, None].expand(shape) > 0)
    result, ids = s.measure(agent, args, video), torch.cat([ids for _, ids, _ in seen])
    assert result["eval/rollout_psnr"] == pytest.approx(100) and 50 < result["eval/delta_psnr"] < 100
    same_place = (ids[:, 1:] == ids[:, :-1]).float().mean().item()
    assert result["eval/copy_accuracy"] == pytest.approx(same_place, abs=1e-6) and 0.1 < same_place < 1


def test_evaluate_repeats_and_records_again_what_is_gone(copy):
    one, two = (run_script(s, "--evaluate", copy, cwd=copy).stdout for _ in range(2))
    before = {path.name: path.read_bytes() for path in (copy / "video").iterdir()}
    shutil.rmtree(copy / "video")
    again = run_script(s, "--evaluate", copy, cwd=copy).stdout
    assert one == two == again and "eval/action_information" in one
    assert before == {path.name: path.read_bytes() for path in (copy / "video").iterdir()}


def test_dreams_are_reproducible_and_need_no_video(copy):
    shutil.rmtree(copy / "video")
    dream = s.Dream(*load(copy)[0])

    def frames(seed, shift=0):
        first, info = dream.reset(seed=seed)
        return [first["image"], info["real"]["image"]] + [dream.step((t + shift) % 5)[0]["image"] for t in range(6)]

    one, two, other = frames(3), frames(3), frames(4)
    assert all(map(np.array_equal, one, two)) and not all(map(np.array_equal, one, other))
    check_env(dream)
    dream.agent.args.maskgit_steps, dream.agent.args.temperature = 1, 1e-6  # the likeliest tokens, all at once
    dream.reset(seed=3)
    ids, played = dream.agent.rollout(dream.ids, torch.cat([dream.actions, torch.tensor([[4, 2, 0, 3]])], 1)), []
    for action in (4, 2, 0, 3):
        dream.step(action)
        played.append(dream.ids[:, -1])
    assert torch.equal(torch.stack(played, 1), ids[:, -4:])
    assert not (copy / "video").exists()


@pytest.mark.parametrize(
    "kind", "L.png LA.png P.gif RGB.jpg RGBA.webp 1.png CMYK.tiff I;16.png F.tiff turned.png".split()
)
def test_a_dream_starts_from_any_picture(finished, kind, tmp_path):
    """The left half of the picture is dark, the right one bright: of any mode, size and, by its tag, direction."""
    (mode, _), path, grey = kind.split("."), tmp_path / kind, np.full((61, 90), 240, np.uint8)
    grey[:, :45] = 0
    image, tag = Image.fromarray(grey), Image.Exif()
    if mode == "turned":
        image, tag[0x0112] = Image.fromarray(np.rot90(grey)), 6  # to be turned by a quarter to the right
    elif mode in ("I;16", "F"):
        image = Image.fromarray(grey.astype(np.uint16) * 257 if mode == "I;16" else grey.astype(np.float32) / 255)
    else:
        image = image.convert(mode)
    image.save(path, **dict(exif=tag) if tag else {})
    dream = s.Dream(*load(finished)[0])
    real = dream.reset(seed=0, options={"prompt": str(path)})[1]["real"]["image"]
    assert real.shape == (16, 16, 3) and real[:, :7].mean() < 10 and real[:, 9:].mean() > 220
    assert dream.ids.shape[1] == 1 and [dream.step(1)[0]["image"].shape for _ in range(5)] == [(16, 16, 3)] * 5


def test_play_with_a_prompt(copy, tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    flags = [copy, "--no-cuda", "--video", "--prompt", tmp_path / "red.png"]
    command = [sys.executable, str(ROOT / "play.py"), *map(str, flags)]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    video = pytest.importorskip("imageio.v3").imread(copy / "videos/dream.mp4")
    beside = video[7, :, 300:]  # what it started from
    assert len(video) in (199, 200) and np.abs(beside.mean((0, 1)) - [255, 0, 0]).max() < 30


def test_training_never_reads_the_actions(finished, tmp_path):
    """They are gone as soon as training starts, and the run is the same."""
    patch = """
whole = s.Video.index
def index(self):
    actions = s.np.fromfile(f"{self.folder}/action", s.np.int64)
    s.np.minimum(actions, 0).tofile(f"{self.folder}/action")
    return whole(self)
s.Video.index = index
"""
    run_script(s, *SQUARE, *tiny(s), cwd=tmp_path, patch=patch)
    same(checkpoint(finished)["agent"], checkpoint(only_run(tmp_path))["agent"])
    assert not np.fromfile(only_run(tmp_path) / "video/action", np.int64).max()


STOP = """
import os
whole = s.Agent.update
def update(self, stage, video):
    if (stage, self.updates[stage]) == ({}, 3): os.kill(os.getpid(), {})
    return whole(self, stage, video)
s.Agent.update = update
"""


@slow
@pytest.mark.parametrize("stage, number", [(0, signal.SIGTERM), (1, signal.SIGINT), (1, signal.SIGKILL)])
def test_resume_is_exact(stage, number, finished, tmp_path):
    """What an update draws follows from its number: a run that was stopped ends as one that was not."""
    flags = [*SQUARE, *tiny(s), "--eval-every", "96", "--save-every", 16]
    killed = number == signal.SIGKILL
    patch = STOP.format(stage, int(number))
    result = run_script(s, *flags, cwd=tmp_path, patch=patch, code=-number if killed else 128 + number)
    run = only_run(tmp_path)
    assert killed or f"--resume runs/{run.name}" in result.stdout.splitlines()[-1]
    updates = [3 + (not killed), 0] if stage == 0 else [6, 3 + (not killed)]
    assert checkpoint(run)["agent"]["updates"].tolist() == updates
    time.sleep(1.1)  # TensorBoard reads files in the order of their names, which hold the second
    run_script(s, "--resume", run, cwd=tmp_path)
    same(checkpoint(finished), checkpoint(run))
    evaluations = [[row for row in metrics(x) if row[1].startswith("eval/")] for x in (finished, run)]
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) > 9


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_recording_that_was_stopped_goes_on(number, tmp_path):
    patch = "import os\nwhole = s.Video.add\ndef add(self, *a):\n  whole(self, *a)\n"
    patch += f"  if self.count == 150: os.kill(os.getpid(), {int(number)})\ns.Video.add = add"
    code = -number if number == signal.SIGKILL else 128 + number
    run_script(s, *SQUARE, *tiny(s), cwd=tmp_path, patch=patch, code=code)
    run = only_run(tmp_path)
    first = (run / "video/image").read_bytes()
    assert len(first) == 150 * 768 and not (run / "checkpoint.pt").exists()
    run_script(s, "--resume", run, cwd=tmp_path)
    actions = np.fromfile(run / "video/action", np.int64)
    assert len(actions) == 400 and actions[150] == -1 and (actions[1:99] != actions[151:249]).any()  # a new episode
    assert (run / "video/image").read_bytes()[: len(first)] == first
    assert checkpoint(run)["agent"]["updates"].tolist() == [6, 6]


def test_a_finished_run_is_extended(copy, tmp_path):
    run_script(s, "--resume", copy, "--steps", 9, cwd=tmp_path)
    assert checkpoint(copy)["agent"]["updates"].tolist() == [6, 9]
    run_script(s, "--resume", copy, "--tokenizer-steps", 5, "--steps", 10, cwd=tmp_path)  # of which it has more
    assert checkpoint(copy)["agent"]["updates"].tolist() == [6, 10]
    assert os.path.getsize(copy / "video/action") == 400 * 8


def test_the_published_run_can_be_played(tmp_path):
    """In half precision, without optimizers and video: each code is a move of the duck, and each move has a code."""
    published = ROOT / "benchmarks/results/genie__Pond-v0__tiny__seed1"
    assert sum(path.stat().st_size for path in published.glob("*.*")) < 2e6
    dream, moves = s.Dream(*load(published)[0]), set()

    def place(image):
        yellow = np.abs(image["image"].astype(int) - Pond.colours["y"]).max(-1) < 60
        return np.divmod(yellow.reshape(4, 8, 4, 8).sum((1, 3)).argmax(), 4)

    for action in range(dream.action_space.n):
        places = [place(dream.reset(seed=1)[0])] + [place(dream.step(action)[0]) for _ in range(20)]
        steps = (np.diff(places, axis=0) + 1) % 4 - 1
        found, counts = np.unique(steps, axis=0, return_counts=True)
        assert counts.max() >= 14, steps
        moves.add(tuple(found[counts.argmax()]))
    assert moves == {tuple(move) for move in Pond.moves // 8}


def test_clone(copy, capsys):
    """The table has a row for each number of labels, random play returns what it should."""
    flags = "--env-id environments.pond:Pond-v0 --clone-timesteps 1500 --clone-steps 5 --eval-episodes 4".split()
    out = run_script(s, "--clone", copy, *flags, cwd=copy).stdout
    rows = dict(re.findall(r"^(.+): (-?[\d.]+) ± [\d.]+$", out, re.MULTILINE))
    assert len(rows) == 11 and 2 < float(rows["random play"]) < 35  # 12.5 expected
    actions = np.fromfile(copy / "expert/environments.pond:Pond-v0/action", np.int64)
    assert len(actions) == 1500 and set(actions) == {-1, 0, 1, 2, 3, 4}


def test_what_does_not_fit_is_refused(copy, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    for flag in ("--num-envs 2", "--image-size 32", "--video-dir videos"):
        assert "has its video" in refused(s, "--resume", copy, *flag.split())
    assert "has its video" in refused(s, "--evaluate", copy, "--video-dir", "videos")
    assert "other sizes" in refused(s, "--resume", copy, "--num-codes", "32")
    assert "no video files" in refused(s, *tiny(s), "--video-dir", "videos")
    (tmp_path / "videos/a.mp4").write_bytes(b"nothing")
    assert "can be used" in run_script(s, *tiny(s), "--video-dir", "videos", cwd=tmp_path, code=1).stderr
    assert "--obs" in refused(s, *tiny(s), "--env-id", "CartPole-v1", "--obs", "state")
    assert "--context" in refused(s, *tiny(s), "--context", "4")
    assert "--image-width" in refused(s, *tiny(s), "--image-width", "32")
    assert "--steps 0" in refused(s, *tiny(s), "--steps", "0")
    assert "above 0" in refused(s, *tiny(s), "--temperature", "0")
    assert "no --capture-video" in refused(s, *tiny(s), "--capture-video")
    assert "--tokenizer-steps cannot grow" in refused(s, "--resume", copy, "--tokenizer-steps", "99")
    assert "one image" in refused(s, *tiny(s), "--env-id", "toy_envs:Mixed-v0", "--total-timesteps", 50)
    assert "no_such" in refused(s, *tiny(s), "--env-id", "no_such:Thing-v0")
    assert "too few clips" in refused(s, *tiny(s), *SQUARE[:2], "--total-timesteps", "8")
    for env, word in ("toy_envs:Image-v0", "expert()"), ("no_such:Thing-v0", "no_such"):
        assert word in refused(s, "--clone", copy, "--env-id", env)
    assert "no run of genie" in refused(s, "--evaluate", tmp_path)
    os.truncate(copy / "checkpoint.pt", 1000)
    assert "not whole" in refused(s, "--evaluate", copy)


def test_a_loss_that_is_not_finite(tmp_path):
    patch = "whole = s.Agent.dynamics_loss\ndef f(self, *a):\n  self.dynamics.embed.data.fill_(float('nan'))\n"
    patch += "  return whole(self, *a)\ns.Agent.dynamics_loss = f"
    result = run_script(s, *SQUARE, *tiny(s), cwd=tmp_path, patch=patch, code=1)
    line = next(line for line in result.stderr.splitlines() if "not finite" in line)
    assert "losses/dynamics_loss" in line and "update 7" in line and "Traceback" not in result.stderr


# Several processes


def updates(rank, world, folder):
    """Updates of both stages of one process with its share of the batch, without chance; leaves gradients and agent."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    s.draw_masks = lambda shape, *_: torch.arange(math.prod(shape)).view(shape) % math.prod(shape[1:]) % 3 > 0
    agent, grads = make("--lam-shift", "0", "--window-shift", "0"), []
    for step in range(60):  # codes restart
        for stage in (0, 1):
            agent.update(stage, clip(4, seed=step).chunk(world)[rank])
            if step == 0:
                grads += [p.grad.clone() for p in agent.optimizers[stage].param_groups[0]["params"]]
    torch.save(dict(agent=agent.state_dict(), grads=grads), f"{folder}/{world}_{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


@slow
def test_two_processes_update_as_one(tmp_path):
    for world in (1, 2):
        torch.multiprocessing.spawn(updates, (world, str(tmp_path)), world)
    one, *two = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    for a, b in zip(one["grads"], two[0]["grads"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item() + 1e-7)
    same(two[0]["agent"], two[1]["agent"])  # the processes stay together


@slow
def test_torchrun_trains_stops_and_resumes(tmp_path):
    def launch(*args):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, "--no-python"]
        command = [sys.executable, *torchrun, sys.executable, "-c", f"import genie as s\n{IN_GROUP}\ns.main()", *args]
        result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300)
        assert result.returncode == 0 and "gloo_" not in result.stderr, result.stderr

    launch(*SQUARE, *tiny(s), "--eval-every", "96")
    run = only_run(tmp_path)
    assert checkpoint(run)["agent"]["updates"].tolist() == [6, 6] and "eval/delta_psnr" in scalars(run)
    launch("--resume", str(run), "--steps", "9")
    assert checkpoint(run)["agent"]["updates"].tolist() == [6, 9]


# Learning


@slow
def test_learns_the_actions_of_a_world(tmp_path):
    """Codes say which of five moves a square makes: mutual information above 0.8 of its maximum, the moves' entropy."""
    # two moves with one code leave 0.83; seeds 1 to 4 have 0.93 to 0.997, without gradient for the LAM 0.39
    flags = "--env-id toy_envs:Square-v0 --total-timesteps 6000 --image-size 16 --patch 4 --lam-patch 8 "
    flags += "--clip-length 4 --context 3 --num-codes 32 --num-actions 16 --latent-dim 16 --lam-encoder 2 64 4 16 "
    flags += "--lam-decoder 2 64 4 16 --encoder 1 32 2 16 --decoder 1 32 2 16 --dynamics 1 32 2 16 --lam-change "
    flags += "--lam-centre --lam-shift 1 --tokenizer-steps 100 --steps 1500 --tokenizer-batch-size 16 --batch-size 32 "
    flags += "--ffn 4 --learning-rate 1e-3 --final-rate 1e-5 --eval-every 100000000 --eval-episodes 128 "
    flags += "--no-cuda --no-amp"
    run_script(s, *flags.split(), cwd=tmp_path, timeout=3000)
    values = {key: row[-1][1] for key, row in scalars(only_run(tmp_path)).items()}
    moves, codes = math.log(5), math.log(values["eval/lam_perplexity"])  # entropies: the information is in their mean
    assert values["eval/action_information"] * (moves + codes) / 2 / moves > 0.8, json.dumps(values)
