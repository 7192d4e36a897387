"""The diff between two neighbours is the paper between them: same name, same code, or a line that says what changed.

Every line of a script belongs to one unit: a function, a method, the rest of a class, a field of Args, a constant. What
`diff` shows between two neighbours therefore lies in units that differ, and each of those names the item [Cn] of the
module's list "What changed since ..." that changed it:

- same name, other code: "Changed from <neighbour>.py: [Cn]" in the docstring, for methods that have none in that of the
  class; for fields and constants "[Cn]" in the docstring or comment;
- a new name: "[Cn]" there or, for methods, in the docstring of the class;
- a name that is gone: named in the list itself, or in the docstring of its class that something has changed.
"""

import ast
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAMILY = ["planet", "dreamer_v1", "dreamer_v2", "dreamer_v3"]  # each is derived from the one before
ALL = ["worldmodels_v1", *FAMILY, "genie"]
SCRIPTS = [name for name in ALL if (ROOT / f"{name}.py").exists()]
NEIGHBOURS = [pair for pair in itertools.pairwise(FAMILY) if set(pair) <= set(SCRIPTS)]
MARK = r"\[C\d+\]"


class Script:
    """A script taken apart: name of unit -> its lines, its docstring."""

    def __init__(self, name):
        self.name, self.text = name, (ROOT / f"{name}.py").read_text()
        self.lines, self.units, self.docs = self.text.split("\n"), {}, {}
        tree = ast.parse(self.text)
        self.doc = ast.get_docstring(tree)
        self.items = set(re.findall(rf"^ *({MARK})", self.doc, re.M))
        self.banners = [line for line in self.lines if line.startswith("# === ")]
        body = [node for node in tree.body if node.lineno > self.lines.index(self.banners[0])]
        self.end = self.lines.index(self.banners[0])  # last line that belongs to a unit so far
        for node in body:
            self.take_apart(node)
        self.leftover = [line for line in self.lines[self.end :] if line]

    def add(self, name, last, doc=""):
        """Lines up to `last` become a unit; comments belong to what follows them."""
        name = name if name not in self.units else f"{name} again"  # FIXED = ...; FIXED += ...
        heading = lambda line: line in self.banners or re.match(r"    # \w+\. Defaults: ", line)  # noqa: E731
        self.units[name] = [line for line in self.lines[self.end : last] if line.strip() and not heading(line)]
        self.docs[name], self.end = doc or "", last

    def take_apart(self, node):
        if isinstance(node, ast.FunctionDef):
            self.add(node.name, node.end_lineno, ast.get_docstring(node))
        elif isinstance(node, ast.ClassDef) and node.name == "Args":
            first = node.body[0]
            self.add("Args", first.lineno - 1 - self.comments_before(first.lineno))
            for field, doc in zip(node.body[::2], node.body[1::2], strict=True):
                self.add(f"--{field.target.id}", doc.end_lineno, "\n".join(self.lines[self.end : doc.end_lineno]))
        elif isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            starts = [min([m.lineno, *(d.lineno for d in m.decorator_list)]) for m in methods]
            doc, rest = ast.get_docstring(node), 0
            for method, start in zip(methods, starts, strict=True):
                if not rest:
                    self.add(node.name, start - 1, doc)
                rest = self.add(f"{node.name}.{method.name}", method.end_lineno, ast.get_docstring(method)) or 1
            if not rest:
                self.add(node.name, node.end_lineno, doc)
            assert not methods or node.end_lineno == self.end, f"{self.name}.{node.name}: statements after its methods"
        else:
            names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
            last = node.end_lineno
            self.add(names[0] if names else ast.unparse(node)[:40], last, "\n".join(self.lines[self.end : last]))

    def comments_before(self, lineno):
        count = 0
        while self.lines[lineno - 2 - count].strip().startswith("#"):
            count += 1
        return count

    def code(self, name):
        """A unit without its marks."""
        text = re.sub(r"\s*Changed from \w+\.py: [^\n]*?(?=\"\"\"|$)", "", "\n".join(self.units[name]), flags=re.M)
        text = re.sub(rf" *(# )?({MARK},? ?)+", "", text)
        return [line.rstrip() for line in text.split("\n") if line.strip()]

    def owner(self, name):
        return name.split(".")[0] if "." in name and not name.startswith("--") else None


READ = {name: Script(name) for name in SCRIPTS}


@pytest.fixture(params=NEIGHBOURS, ids=lambda pair: "-".join(pair))
def pair(request):
    return [READ[name] for name in request.param]


def marks(script, name, kind=MARK):
    """What a unit says: the marks in its own docstring, or else in its class's."""
    owner = script.owner(name)
    docs = [script.docs[name]] + ([script.docs[owner]] if owner and not script.docs[name] else [])
    found = [re.findall(MARK, line) for doc in docs for line in re.findall(rf"{kind}.*", doc)]
    return {mark for line in found for mark in line}


@pytest.mark.parametrize("name", SCRIPTS)
def test_same_banners_in_the_same_order(name):
    words = [re.fullmatch(r"# === ([A-Z][a-z]+( [a-z]+)?) =+", line) for line in READ[name].banners]
    assert all(words) and all(len(line) == 120 for line in READ[name].banners)
    assert [word[1] for word in words] == (
        "Arguments|Environment|Replay|Maths|Networks|World model|Behaviour|Agent|Dream|Run".split("|")
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_line_belongs_to_a_unit(name):
    assert not READ[name].leftover


def test_same_name_same_code(pair):
    old, new = pair
    silent = [
        name
        for name in new.units
        if name in old.units and old.code(name) != new.code(name)
        and not marks(new, name, MARK if re.match("--|[A-Z]+( |$)", name) else rf"Changed from {old.name}\.py: {MARK}")
    ]  # fmt: skip
    assert not silent, f"differ from {old.name}.py, and do not say why: {silent}"


def test_what_is_new_says_why(pair):
    old, new = pair
    silent = [
        name
        for name in new.units
        if name not in old.units and not marks(new, name) and not (new.owner(name) and marks(new, new.owner(name)))
    ]
    assert not silent, f"not in {old.name}.py, and do not say why: {silent}"


def test_what_is_gone_is_named(pair):
    old, new = pair
    words = set(re.findall(r"\w+", new.doc))
    silent = []
    for name in set(old.units) - set(new.units):
        owner = old.owner(name)
        changed = owner in new.units and marks(new, owner)
        if not changed and (owner or name.removeprefix("--").removesuffix(" again")) not in words:
            silent.append(name)
    assert not silent, f"in {old.name}.py only, and not named in the list: {sorted(silent)}"


def test_every_item_is_somewhere_and_every_mark_in_the_list(pair):
    old, new = pair
    used = {mark for name in new.units for mark in re.findall(MARK, "\n".join(new.units[name]))}
    assert used == new.items
    assert new.items == {f"[C{i}]" for i in range(1, len(new.items) + 1)}
    assert not [line for line in new.lines if re.search(rf"Changed from (?!{old.name})", line)]


def test_same_order(pair):
    old, new = pair
    common = [name for name in new.units if name in old.units]
    assert common == [name for name in old.units if name in new.units]


def part(script, start, stop):
    return script.text[script.text.index(start) : script.text.index(stop, script.text.index(start))]


@pytest.mark.parametrize("name", SCRIPTS[:-1])
def test_the_house_is_the_same(name):
    """Byte by byte in all scripts: general and environment arguments, the whole of Environment, what runs share."""
    old, new = READ[name], READ[SCRIPTS[-1]]
    assert (
        part(old, "    # General", ". Defaults").rpartition("\n")[0]
        == (part(new, "    # General", ". Defaults").rpartition("\n")[0])
    )
    assert part(old, "# === Environment =", "\n\n\n# === ") == part(new, "# === Environment =", "\n\n\n# === ")
    shared = (
        "Failure Interrupted show suite can_compile picture write_mp4 to_tensors save load load_agent setup png main"
    )
    assert not [unit for unit in shared.split() if old.units[unit] != new.units[unit]]
    assert [old.units[unit] for unit in old.units if unit.startswith("Log")] == (
        [new.units[unit] for unit in new.units if unit.startswith("Log")]
    )


def test_dreams_are_the_same(pair):
    old, new = pair
    assert part(old, "# === Dream =", "\n\n\n# === ") == part(new, "# === Dream =", "\n\n\n# === ")
