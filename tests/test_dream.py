"""Dream and open loop: the learned model as a Gymnasium environment and as a video."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import agent_and_batch, last_video, scalars, tiny, train
from gymnasium.utils.env_checker import check_env


def make_dream(script, env_id, **options):
    args = script.parse_args(["--env-id", env_id, *tiny(script)])
    env = script.make_env(args)
    torch.manual_seed(1)
    return script.Dream(script.Agent(args, env.observation_space.spaces, env.action_space), env, **options)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "toy_envs:Mixed-v0", "toy_envs:Image-v0", "toy_envs:Bounds-v0"])
@pytest.mark.filterwarnings("ignore")
def test_a_dream_is_a_gymnasium_environment(world, env_id):
    dream = make_dream(world, env_id)
    check_env(dream)
    frame = world.picture(dream.reset(seed=0)[0])
    assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3
    action = dream.policy()
    assert dream.action_space.contains(action) or isinstance(dream.action_space, gym.spaces.Discrete)
    dream.step(action)
    if not isinstance(dream.action_space, gym.spaces.Discrete):  # and 7 is as much as 1
        rewards = [(dream.reset(seed=1), dream.step(np.full(3, x, np.float32)))[1][1] for x in (1, 7)]
        assert rewards[0] == rewards[1]


def test_dreams_are_reproducible(world):
    dream = make_dream(world, "toy_envs:Image-v0")

    def frames(seed):
        first, info = dream.reset(seed=seed)
        steps = [dream.step(np.uint8(t % 2)) for t in range(8)]
        return [first["image"], info["real"]["image"]] + [step[0]["image"] for step in steps], [s[1] for s in steps]

    one, two, other = frames(3), frames(3), frames(4)
    assert all(map(np.array_equal, one[0], two[0])) and one[1] == two[1]
    assert not all(map(np.array_equal, one[0], other[0]))


def test_a_dream_is_cut_and_the_real_episode_may_end_before(world):
    dream = make_dream(world, "toy_envs:Vector-v0", length=30)  # its episodes have 20 steps
    dream.reset(seed=0)
    steps = [dream.step(1) for _ in range(30)]
    assert [truncated for *_, truncated, _ in steps] == 29 * [False] + [True]
    real = [next(iter(step[4]["real"].values())) for step in steps]
    assert not np.array_equal(real[18], real[19]) and all(np.array_equal(real[19], later) for later in real[20:])


def test_open_loop_sees_only_the_context(ported, tmp_path):
    args = ported.parse_args(["--env-id", "CartPole-v1", *tiny(ported)])
    spaces = {"image": gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)}
    agent, data = agent_and_batch(ported, args, spaces, gym.spaces.Discrete(3), tmp_path)
    for parameter in agent.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)  # outputs that differ visibly
    B, T = data["reward"].shape
    data["is_first"][:, 1:] = False

    def dreamt(seed=0, **changes):
        torch.manual_seed(seed)
        video = ported.open_loop(agent, data | changes, context=3)
        assert video.shape == (T, 3 * 64, B * 64, 3) and video.dtype == np.uint8
        return video[:, 64:128]

    whole, image, action = dreamt(), data["image"], data["action"]
    truth = ported.open_loop(agent, data, context=3)[:, :64]
    np.testing.assert_array_equal(truth, torch.cat(list(image.unbind(0)), 2).numpy())
    later, earlier, moved = image.clone(), image.clone(), action.clone()
    later[:, 3:] = 255 - later[:, 3:]
    np.testing.assert_array_equal(dreamt(image=later), whole)
    earlier[:, 2] = 0
    pairs = [(dreamt(seed), dreamt(seed, image=earlier)) for seed in range(30)]  # not each makes another sample
    assert all(np.array_equal(one[:2], two[:2]) for one, two in pairs)
    assert any((one[2:] != two[2:]).any() for one, two in pairs), "the context is not seen"
    moved[:, 5] = moved[:, 5].roll(1, -1)
    changed = dreamt(action=moved)
    np.testing.assert_array_equal(changed[:5], whole[:5])
    assert (changed[5] != whole[5]).any(), "actions have no effect"


def test_a_sequence_is_its_steps_one_after_another(ported):
    rssm, T = ported.RSSM(ported.parse_args(tiny(ported)), 6, 2).apply(ported.initialise), 19
    embed, action, first = torch.randn(3, T, 6), torch.randn(3, T, 2, requires_grad=True), torch.zeros(3, T)
    torch.manual_seed(1)
    whole, state = rssm.observe(embed, action, first, rssm.initial(3)), rssm.initial(3)
    torch.manual_seed(1)
    for inputs in zip(action.unbind(1), embed.unbind(1), first.unbind(1), strict=True):
        state, _ = rssm.obs_step(state, *inputs)
    assert all(torch.equal(a[:, -1], b) for a, b in zip(whole[:2], state, strict=True))
    assert torch.autograd.grad(whole[0][:, -1].sum(), action)[0][:, 0].all()


def test_acting_forgets_what_was_before_an_episode(world):
    dream = make_dream(world, "CartPole-v1")
    carry, (obs, _), results = dream.agent.initial(1), dream.env.reset(seed=1), []
    obs = world.to_tensors({key: x[None] for key, x in obs.items()} | {"is_first": np.ones(1, bool)}, carry[0].device)
    for before in (carry, tuple(x + 1 for x in carry)):
        torch.manual_seed(0)
        results.append(dream.agent.act(obs, before)[:2])
    assert all(map(torch.equal, *results))


def test_the_video_is_in_the_log(ported, tmp_path):
    run = train(ported, tmp_path, "--env-id", "toy_envs:Image-v0", "--eval-every", 50, frames=100)
    video = last_video(run, "video/open_loop")
    assert video.shape == (8, 3 * 64, 4 * 64, 3)
    green = np.abs(video[:, 64:66] - np.array([60.0, 180, 75])).max((1, 2, 3)) < 16  # a GIF has few colours
    assert green[:5].all() and not green[5:].any()  # a bar where the model sees


def test_sequences_too_short_for_a_video(ported, tmp_path):
    flags = "--env-id toy_envs:Image-v0 --batch-length 5 --eval-every 50".split()
    assert "eval/episodic_return" in scalars(train(ported, tmp_path, *flags, frames=100))
