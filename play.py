"""Act in the world that a run has learnt: `python play.py runs/<run>` serves a page, with --video it writes an mp4.

The script that made the run gives the model: parse_args, load_run, Dream and picture. A fork works too, here or beside
this file. If its Dream has policy(), the trained actor's action, the page can let the actor play.
"""

import base64
import contextlib
import http.server
import importlib
import json
import os
import signal
import sys
from dataclasses import dataclass

import cv2
import gymnasium as gym
import numpy as np
import tyro
from moviepy import ImageSequenceClip
from PIL import Image

# Keys that act, in the order in which they are given out, and the row and column of their buttons: as on a keyboard.
KEYS = dict(ArrowRight="2/3", ArrowLeft="2/1", ArrowUp="1/2", ArrowDown="2/2", d="2/7", a="2/5", w="1/6", s="2/6")
KEYS |= dict(l="2/11", j="2/9", i="1/10", k="2/10") | {f"{digit % 10}": f"3/{digit}" for digit in range(1, 11)}
PLACES = KEYS | {" ": "2/13", "r": "2/14", ".": "2/15"}  # the actor at the wheel, a new dream, a step without action
PAGE = """<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<title>TITLE</title><link rel=icon href="data:,"><meta name=color-scheme content="light dark"><style>
body { max-width: 125vh; margin: auto; padding: 1rem; font: 1rem/1.4 system-ui; font-variant-numeric: tabular-nums }
main { display: grid; grid-template-columns: 1fr 1fr; gap: .25rem 1.25rem; align-items: center }
img { width: 100%; border-radius: .5rem; image-rendering: pixelated } .over #dream { opacity: .4 }
svg, #line { width: 100%; height: 2rem; fill: none; stroke: #3874e8; vector-effect: non-scaling-stroke }
#keys { display: grid; gap: .375rem; justify-content: start; user-select: none; -webkit-user-select: none }
button { min-width: 4rem; padding: .375rem; border: 1px solid #8886; border-bottom-width: 3px; border-radius: .5rem;
  font: .75rem/1.5 system-ui; white-space: pre-line; overflow-wrap: anywhere; background: #8881; touch-action: none }
button::first-line { font-size: 1rem; font-weight: 600 } button.on, button:active { background: #3874e8; color: #fff }
</style>
<h3>TITLE</h3><main><b>dream</b><b>BESIDE</b><img id=dream><img id=real>
<p id=text></p><svg viewBox="0 -1.1 1 1.2" preserveAspectRatio=none><polyline id=line /></svg></main>
<div id=keys></div><script>
const buttons = {}, held = new Set(), tapped = new Set(["r"])
const signs = {ArrowRight: "→", ArrowLeft: "←", ArrowUp: "↑", ArrowDown: "↓", " ": "space"}
let busy = false, over = false
for (const [key, name, place] of KEYS) {
  const button = buttons[key] = keys.appendChild(document.createElement("button"))
  button.textContent = (signs[key] || key) + "\\n" + name
  button.style.gridArea = place
  button.onpointerdown = () => press(key)
  button.onpointerup = button.onpointerleave = () => release(key)
  button.onmousedown = button.oncontextmenu = event => event.preventDefault()
}
function press(key) {
  if (key == " " && held.delete(key)) return
  if (key != "r") held.add(key)
  tapped.add(key)
}
function release(key) { if (key != " ") held.delete(key) }
onkeydown = event => {
  if (!buttons[event.key] || event.ctrlKey || event.metaKey || event.altKey) return
  event.preventDefault()
  if (!event.repeat) press(event.key)
}
onkeyup = event => release(event.key)
onblur = () => held.forEach(release)
setInterval(async () => {
  for (const key in buttons) buttons[key].classList.toggle("on", held.has(key))
  const pressed = [...held, ...tapped]
  if (busy || !pressed.length || over && !tapped.has("r")) return
  busy = true  // one request at a time
  tapped.clear()
  const reply = await fetch("/act", {method: "POST", body: pressed.join("\\n")}).finally(() => busy = false)
  const state = await reply.json(), rewards = state.rewards
  dream.src = state.dream
  real.src = state.real
  text.textContent = state.text
  document.body.className = (over = state.over) ? "over" : ""
  const low = Math.min(0, ...rewards), range = Math.max(0, ...rewards) - low || 1, width = Math.max(60, rewards.length)
  line.setAttribute("points", rewards.map((reward, step) => [step / width, (low - reward) / range]).join(" "))
}, 1000 / 15)
</script>"""


def controls(dream):
    """What each key does, {key: name}, and a function from the keys that are held to an action."""
    space, env = dream.action_space, getattr(dream, "env", dream).unwrapped
    if isinstance(space, gym.spaces.Discrete):
        names = getattr(env, "get_action_meanings", lambda: [f"action {i}" for i in range(space.n)])()
        arrows = [f"Arrow{name.title()}" for name in names]  # a meaning may be a direction
        first = ["."] if hasattr(dream, "env") else []  # no latent action is known to do nothing
        others = iter([key for key in [*first, *KEYS] if key not in arrows])
        keys = [arrow if arrow in KEYS else next(others, "") for arrow in arrows]
        return dict(zip(keys, names, strict=True)), lambda held: space.start + np.argmax([key in held for key in keys])
    low, high = env.action_space.low.ravel(), env.action_space.high.ravel()
    rest = np.nan_to_num(2 * (np.clip(0, low, high) - low) / (high - low) - 1)  # does nothing: gas goes from 0 to 1
    moves = dict(zip(KEYS, [(i, sign) for i in range(len(rest)) for sign in (1, -1) if sign != rest[i]], strict=False))
    names = {key: f"a[{i}] = {sign:+d}" for key, (i, sign) in moves.items()} | {".": "no action"}
    change = {key: np.eye(len(rest))[i] * (sign - rest[i]) for key, (i, sign) in moves.items()}
    return names, lambda held: np.clip(rest + sum(change.get(key, 0) for key in {*held}), -1, 1).astype(np.float32)


def write_video(script, dream, run, seed, start):
    """Writes the actor's dream beside the truth as mp4; without an actor, each key is held in turn."""
    policy, (names, action), path = getattr(dream, "policy", None), controls(dream), f"{run}/videos/dream.mp4"
    if not policy:
        print("no actor in this dream: each key is held in turn,", ", ".join(names.values()))
    obs, info = dream.reset(seed=seed, **start)
    frames, over = [], False
    while not over and len(frames) < 200:
        frame = np.concatenate([script.picture(obs), script.picture(info["real"])], 1)
        scale = 2 * -(-128 // len(frame))  # sizes are even, and at least 256 lines
        frames.append(frame.repeat(scale, 0).repeat(scale, 1))
        key = [*names][len(frames) * len(names) // 201]
        obs, _, terminated, truncated, info = dream.step(policy() if policy else action([key]))
        over = terminated or truncated
    os.makedirs(f"{run}/videos", exist_ok=True)
    ImageSequenceClip(frames, fps=15).write_videofile(path, logger=None)
    print(path)


def serve(script, dream, run, seed, start, port):
    """Serves the page and answers its requests, one after the other."""
    policy, latent, (names, action) = getattr(dream, "policy", None), not hasattr(dream, "env"), controls(dream)
    names |= {"r": "new dream"} | ({" ": "actor"} if policy else {})
    page = PAGE.replace("KEYS", json.dumps([(key, name, PLACES[key]) for key, name in names.items() if key in PLACES]))
    page = page.replace("BESIDE", "the last real frame" if latent else "reality")
    page = page.replace("TITLE", os.path.basename(os.path.abspath(run)).replace("__", " · ").replace("<", "&lt;"))
    state = {}

    def act(held):
        """A step with these keys, or a new dream, and what the page then shows."""
        if "r" in held or not state:
            obs, info = dream.reset(seed=None if state else seed, **start)
            state.update(rewards=[], over=False, text="a new dream: hold a key, or its button, to go on")
        else:
            obs, reward, ended, cut, info = dream.step(policy() if policy and {*held} == {" "} else action(held))
            state.update(over=bool(ended or cut), text=f"step {dream.steps}")
            if not latent:
                state["rewards"].append(round(float(np.nan_to_num(reward)), 4))
                state["text"] += f" · reward {reward:.2f} · return {sum(state['rewards']):.1f}"
            state["text"] += " · the end: r for a new dream" * state["over"]
        for name, seen in ("dream", obs), ("real", info["real"]):
            png = cv2.imencode(".png", script.picture(seen)[..., ::-1])[1]
            state[name] = "data:image/png;base64," + base64.b64encode(png).decode()
        return json.dumps(state)

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 1  # seconds: a browser may open a connection ahead and leave it idle

        def do_GET(self):
            if self.headers["Host"] not in (f"127.0.0.1:{port}", f"localhost:{port}"):
                return self.send_error(403)  # a page of another site, whose name was made to lead here
            if self.command + self.path not in ("GET/", "POST/act"):
                return self.send_error(404)
            keys = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode().split("\n")
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # a page that was closed while it waited
                self.wfile.write((page if self.command == "GET" else act(keys)).encode())

        do_POST = do_GET
        log_message = lambda *_: None

    server = http.server.HTTPServer(("127.0.0.1", port), Handler)
    port = server.server_port
    print(f"http://127.0.0.1:{port} (on a remote machine: ssh -L {port}:127.0.0.1:{port} <host>)", flush=True)
    server.serve_forever()


@dataclass
class Args:
    run: tyro.conf.Positional[str]  # the run directory
    video: bool = False  # write <run>/videos/dream.mp4 instead of serving a page
    prompt: str | None = None  # picture that a world of genie.py starts from
    seed: int = 1  # of the dreams
    port: int = 0  # of the page; 0 is any that is free
    cuda: bool = True  # use the GPU if there is one


def main(run, video, prompt, seed, port, cuda):
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit(0))
    sys.path.append(os.getcwd())
    try:
        start = {"options": {"prompt": Image.open(prompt).convert("RGB") and prompt}} if prompt else {}  # or exits
        with open(f"{run}/args.json") as file, open(f"{run}/checkpoint.pt"):
            script = importlib.import_module(json.load(file)["script"])
    except (OSError, ValueError, KeyError, TypeError, ImportError, SyntaxError, Image.DecompressionBombError) as error:
        sys.exit(f"play.py: {run}{f' from {prompt}' if prompt else ''} cannot be played: {error}")
    args = script.parse_args(["--evaluate", run, "--cuda" if cuda else "--no-cuda"])
    dream = script.Dream(*script.load_run(args, run))
    if prompt and hasattr(dream, "env"):
        sys.exit("--prompt is for worlds of genie.py, which see nothing but pictures")
    return write_video(script, dream, run, seed, start) if video else serve(script, dream, run, seed, start, port)


if __name__ == "__main__":
    main(**vars(tyro.cli(Args, description=__doc__)))
