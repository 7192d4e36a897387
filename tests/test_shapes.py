"""The comments that trail assignments, `# (B, T, S, K)`, say the shapes that are there when an update runs."""

import ast
import importlib
import re
import sys
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from conftest import PORTED, SPACES, agent_and_batch

FLAGS = dict(dreamer_v1="--imagination-horizon 7", dreamer_v2="--imagination-horizon 7 --classes 11")
FLAGS |= dict(dreamer_v3=FLAGS["dreamer_v2"] + " --blocks 6 --decoder-blocks 4 --bins 13")
FLAGS |= dict(planet="--planning-horizon 7 --candidates 13 --iterations 4 --elites 6 --overshooting-distance 4")
SIZES = "--batch-size 3 --batch-length 5 --deter 24 --stoch 10 --units 16 --hidden 17 --depth 1"
SYMBOLS = {
    "planet": dict(B=3, T=5, H=7, D=24, S=10, E=48, F=34, N=8, J=13, M=104, K=6),
    "dreamer_v1": dict(B=3, T=5, L=6, H=7, N=15, D=24, S=10, E=48, F=34),
    "dreamer_v2": dict(B=3, T=5, L=6, H=7, P=8, N=15, D=24, S=10, K=11, E=48, F=134),
    "dreamer_v3": dict(B=3, T=5, L=4, H=7, P=8, N=15, D=24, G=6, S=10, K=11, X=13, E=80, F=134),
}
COMMENT = re.compile(r"#.*?\((\w[\w ]*(?:, [\w ]+)*,?)\)\s*$")


def commented(path):
    """Assignments with a shape in the comment at their end: (first line, last line) -> targets, dimensions."""
    source, found = path.read_text(), {}
    text = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            match = COMMENT.search(text[node.end_lineno - 1])
            if match:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                targets = [part for t in targets for part in (t.elts if isinstance(t, ast.Tuple) else [t])]
                names = [name for name in map(ast.unparse, targets) if name != "_"]
                found[node.lineno, node.end_lineno] = names, [d.strip() for d in match[1].split(",") if d.strip()]
    return found


def fits(shape, dimensions, sizes):
    """Whether a shape is what its comment says; `1 or A` allows both."""
    allowed = [{sizes[x] if x in sizes else int(x) for x in dimension.split(" or ")} for dimension in dimensions]
    return len(shape) == len(allowed) and all(size in ok for size, ok in zip(shape, allowed, strict=True))


def watch(script, found, sizes, function):
    """Runs a function; when an assignment with a comment is over, compares -> checked lines, wrong ones."""
    checked, wrong, pending = set(), [], {}
    by_line = {line: span for span in found for line in range(span[0], span[1] + 1)}

    def look(frame):
        span = pending.pop(frame, None)
        if span is None:
            return
        names, dimensions = found[span]
        for name in names:
            value = eval(name, frame.f_globals, frame.f_locals)
            if isinstance(value, torch.Tensor):
                checked.add(span[0])
                if not fits(value.shape, dimensions, sizes):
                    wrong.append(f"line {span[0]}: {name} is {tuple(value.shape)}, not {dimensions}")

    def trace(frame, event, _):
        if frame.f_code.co_filename != script.__file__ or frame.f_code.co_name[0] == "<":
            return None
        if event in ("line", "return"):
            span = by_line.get(frame.f_lineno) if event == "line" else None
            if pending.get(frame) != span or event == "return":
                look(frame)
            if span:
                pending[frame] = span
        return trace

    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(None)
    return checked, wrong


def check(script, sizes, function, least=14):
    """Runs a function of a script: at least so many comments are reached, and all of these are right."""
    found = commented(Path(script.__file__))
    unknown = {d for _, dims in found.values() for dim in dims for d in dim.split(" or ")} - sizes.keys()
    assert all(re.fullmatch(r"\d+|\d+ \w", symbol) for symbol in unknown), unknown
    sizes = sizes | {symbol: int(symbol[:-2]) * sizes[symbol[-1]] for symbol in unknown if " " in symbol}
    checked, wrong = watch(script, found, sizes, function)
    assert not wrong, "\n".join(wrong)
    assert len(checked) >= least, f"only {len(checked)} of {len(found)} were reached"


@pytest.mark.parametrize("action_space", [gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(9)], ids=["Box", "Discrete"])
@pytest.mark.parametrize("name", PORTED)
def test_shape_comments(name, action_space, tmp_path):
    script = importlib.import_module(name)
    sizes = SYMBOLS[name] | {"A": action_space.n if isinstance(action_space, gym.spaces.Discrete) else 2}
    assert len(set(sizes.values())) == len(sizes), "sizes that cannot be told apart"
    args = script.parse_args(["--env-id", "CartPole-v1", *SIZES.split(), *FLAGS[name].split()])
    agent, data = agent_and_batch(script, args, SPACES, action_space, tmp_path)

    def run():
        agent.update(data)
        if "J" in sizes:  # it plans
            agent.policy(*agent.world_model.rssm.initial(sizes["N"]))

    check(script, sizes, run)


def test_a_wrong_comment_is_found(tmp_path):
    path = tmp_path / "wrong.py"
    body = "a = torch.zeros(\n        2, 3)  # (B, T)\n    b = a.T  # (B, T)\n    return b\n"
    path.write_text(f"import torch\n\ndef f():\n    {body}")
    sys.path.insert(0, str(tmp_path))
    import wrong

    found = commented(path)
    checked, errors = watch(wrong, found, dict(B=2, T=3), wrong.f)
    assert checked == {4, 6} and len(errors) == 1 and "line 6: b is (3, 2)" in errors[0]
