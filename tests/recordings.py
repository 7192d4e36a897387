"""Tests against recordings: where they lie, how numbers are compared, what is put in the place of random ones."""

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))  # outputs of the authors' code
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def close(mine, golden, rtol=1e-4, atol=1e-5):
    mine, golden = (x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in (mine, golden))
    assert mine.shape == golden.shape, (mine.shape, golden.shape)
    np.testing.assert_allclose(mine, golden, rtol=rtol, atol=atol * max(1.0, float(np.abs(golden).max())))


def tensor(array):
    array = torch.as_tensor(np.asarray(array), device=DEVICE)
    return array.float() if array.dtype == torch.float64 else array


def gradients(value, inputs, upstream=None):
    upstream = torch.ones_like(value) if upstream is None else tensor(upstream)
    return torch.autograd.grad(value, inputs, upstream, retain_graph=True)


@contextlib.contextmanager
def replaced(queue, *places):
    """Puts recorded tensors in the place of random ones: in order, all of them and nothing else.

    A place is an object, the name of its function, and what is called instead: with `take`, then the same arguments.
    """
    queue = list(queue)

    def take(like):
        assert queue, "more was drawn than was recorded"
        shape = like.shape if isinstance(like, torch.Tensor) else torch.Size(like)
        assert queue[0].shape == shape, "another order than was recorded"
        return queue.pop(0)

    with pytest.MonkeyPatch.context() as patch:
        for place, name, function in places:
            patch.setattr(place, name, lambda *inputs, function=function, **_: function(take, *inputs))
        yield
    assert not queue, f"{len(queue)} recorded tensors were not drawn"


def draws(**queue):
    """The same for one of PyTorch's functions, `draws(randn_like=noise)`, and for what its distributions draw."""
    ((name, noise),) = queue.items()
    plain, normal = lambda take, like, *_: take(like), torch.distributions.normal
    return replaced(noise, (torch, name, plain), (normal, "_standard_normal", plain))


class Recorded:
    """A recorded model: `agent` with its sizes and weights, `golden` with what it computed, and official `names`."""

    def add(self, ours, theirs, kind="dense"):
        """Notes the official names of a layer's weight and bias, and how the weight is laid out."""
        self.names[f"{ours}.weight"] = f"{theirs}/kernel", kind
        self.names[f"{ours}.bias"] = f"{theirs}/bias", "same"

    def feat(self, golden):
        """Recorded features in our order: stoch first there, deter first here."""
        return np.roll(golden, -self.args.stoch * getattr(self.args, "classes", 1), -1)

    def learnt(self):
        """The batch as the losses see it."""
        reward = self.data["reward"]
        return self.data | {"reward": reward.tanh() if self.args.tanh_rewards else reward}

    def convert(self, array, kind):
        """An official array in our layout."""
        if kind == "conv":
            return tensor(array.transpose(3, 2, 0, 1))
        array = self.feat(array.T).T if kind == "dense_feat" else array
        return tensor(array.T) if kind.startswith("dense") else tensor(array)

    def parameter(self, prefix, name, source=None):
        theirs, kind = self.names[name]
        return self.convert((self.golden if source is None else source)[prefix + theirs], kind)

    def load(self, prefix):
        used = set()
        with torch.no_grad():
            for name, parameter in self.agent.named_parameters():
                value = self.parameter(prefix, name)
                assert value.shape == parameter.shape, name
                parameter.copy_(value)
                used.add(prefix + self.names[name][0])
        assert used == {key for key in self.golden.files if key.startswith(prefix)}
