"""What a CUDA graph captures, on the meta device: its tensors have no values, and do not mix with those of a CPU.

A GPU may not be there, but whatever would wait for one (`.item()`, shapes that depend on values) fails here.
"""

import contextlib
from functools import partial
from types import SimpleNamespace

import gymnasium as gym
import pytest
import torch
from conftest import SPACES, agent_and_batch, checkpoint, metrics, tiny, train
from torch.utils._pytree import tree_map


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # has no meta device


@pytest.mark.parametrize("actions", [gym.spaces.Discrete(3), gym.spaces.Box(-1, 1, (2,))], ids=["discrete", "box"])
def test_acting_and_updates_wait_for_no_value(ported, actions, tmp_path):
    args = ported.parse_args(tiny(ported))
    agent, data = agent_and_batch(ported, args, SPACES, actions, tmp_path, "meta")
    data = {key: value.to("meta") for key, value in data.items()}
    agent.update(data)
    carry = agent.initial(args.batch_size)
    for _ in range(2):
        carry = agent.act({key: data[key][:, 0] for key in (*SPACES, "is_first")}, carry)
    assert {x.device.type for x in carry} == {"meta"}


def test_genies_updates_and_frames_wait_for_no_value(monkeypatch):
    import genie

    def fixed(params, lr, **_):  # PyTorch's own has checks of numbers when it is made
        return SimpleNamespace(param_groups=[{"params": list(params), "lr": lr}], step=lambda: None)

    monkeypatch.setattr(torch.optim, "AdamW", fixed)
    args = genie.parse_args(tiny(genie))
    agent = genie.Agent(args, "meta")
    shape = args.batch_size, args.clip_length, args.image_size, args.image_width, 3
    video = torch.zeros(shape, dtype=torch.uint8, device="meta")
    agent.update(0, video)
    agent.update(1, video)
    ids, action = agent.infer(video)
    assert agent.generate(ids[:, :-1], action[:, : ids.shape[1] - 1]).shape == ids[:, 0].shape


def test_plain_calls_compile_all_that_is_captured(ported, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    args = ported.parse_args([*tiny(ported), "--compile", "--batch-length", "10"])
    agent, data = agent_and_batch(ported, args, SPACES, gym.spaces.Box(-1, 1, (2,)), tmp_path)
    obs = {key: data[key][:, 0] for key in (*SPACES, "is_first")}
    for function, inputs in (agent.act, (obs, agent.initial(args.batch_size))), (agent.update, (data,)):
        graph = ported.Graph(function, agent.device)
        for _ in range(3):
            graph(*inputs)
        with torch.compiler.set_stance("fail_on_recompile"):  # which would end the capture
            function(*tree_map(torch.clone, inputs))


class InPlace:
    """What `Graph` is with a GPU, but for the capture: inputs and outputs are always in the same memory."""

    def __init__(self, function, device):
        self.function, self.inputs, self.outputs = function, None, None

    def __call__(self, *inputs):
        put = lambda mine, new: tree_map(torch.Tensor.copy_, mine, new) if mine else tree_map(torch.clone, new)
        self.inputs = put(self.inputs, inputs)
        self.outputs = put(self.outputs, self.function(*self.inputs))
        return self.outputs


def copied(move):
    """A tensor's method that moves it: copies where it would return the tensor itself."""

    def call(self, *args, **kwargs):
        moved = move(self, *args, **kwargs)
        return moved.clone() if moved is self else moved

    return call


def test_a_run_is_the_same_where_graphs_overwrite_their_outputs(ported, monkeypatch, tmp_path):
    flags, runs = "--env-id toy_envs:Image-v0 --num-envs 2 --eval-every 60 --eval-episodes 2".split(), []
    for name in ("plain", "in_place"):
        (tmp_path / name).mkdir()
        runs.append(train(ported, tmp_path / name, *flags, frames=120))
        monkeypatch.setattr(ported, "Graph", InPlace)
        for name in ("cpu", "to"):  # a copy, as from a GPU
            monkeypatch.setattr(torch.Tensor, name, copied(getattr(torch.Tensor, name)))
    one, two = map(checkpoint, runs)
    assert one["progress"] == two["progress"] and metrics(runs[0]) == metrics(runs[1])
    assert all(torch.equal(value, two["agent"][key]) for key, value in one["agent"].items())
    assert (runs[0] / "replay/steps").read_bytes() == (runs[1] / "replay/steps").read_bytes()
