"""play.py on a world made for the test by a fork: over HTTP, in a browser and as a video; a video of a script's run."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
from urllib.request import Request, urlopen

import gymnasium as gym
import imageio.v3 as iio
import numpy as np
import pytest
from conftest import ROOT, environment, lines, train

import dreamer_v3
import play

MINE = """import gymnasium as gym, numpy as np
class World(gym.Env):
    action_space = gym.spaces.Discrete(3)
    get_action_meanings = lambda self: ["NOOP", "FIRE", "LEFT"]
class Dream:  # its reward is the action; a red bar is as far right as the sum of the actions
    action_space, policy = World.action_space, lambda self: 2
    def __init__(self, agent, env):
        self.env = env
    def reset(self, seed=None):
        self.steps = self.x = 0
        return self.x, {"real": 50}
    def step(self, action):
        self.steps, self.x = self.steps + 1, self.x + action
        return self.x, float(action or "nan"), self.x > 90, False, {"real": 50}
picture = lambda x: np.uint8([[[255 * (x == i), 0, 0] for i in range(100)]] * 20)
parse_args, load_run = lambda argv: None, lambda args, run: (None, World())
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a script `mine.py` that lies in the current directory."""
    path = tmp_path_factory.mktemp("mine") / "a__run"
    path.mkdir()
    (path.parent / "mine.py").write_text(MINE)
    (path / "args.json").write_text('{"script": "mine"}')
    (path / "checkpoint.pt").touch()
    return path


def start(run, *flags):
    pipes = dict(cwd=run.parent, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, ROOT / "play.py", run.name, "--no-cuda", *flags], **pipes)


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM])
def page(run, request):
    """Address of the page; a signal ends it without a word."""
    process = start(run)
    yield re.search(r"http://127\.0\.0\.1:\d+(?=.*ssh -L)", process.stdout.readline())[0]
    process.send_signal(request.param)
    assert process.communicate(timeout=20)[1] == "" and process.returncode == 0


def ask(url, *keys, **headers):
    return urlopen(Request(url, "\n".join(keys).encode() if keys else None, headers), timeout=20).read().decode()


def act(page, *keys):
    """-> what the page is told, and where the bars of dream and reality are."""
    state = json.loads(ask(f"{page}/act", *keys), parse_constant=pytest.fail)
    return state, *(iio.imread(urlopen(state[name]).read())[0, :, 0].argmax() for name in ("dream", "real"))


def test_the_page(page):
    assert all(text in ask(page) for text in ("<title>a · run</title>", '["ArrowLeft", "LEFT"', '[" ", "actor"'))
    assert act(page, "r")[0]["text"].startswith("a new dream")
    states = [act(page, *keys) for keys in (["ArrowLeft"], ["."], ["ArrowRight"], [" "], [" ", "ArrowRight"])]
    assert [state[1:] for state in states] == [(2, 50), (2, 50), (3, 50), (5, 50), (6, 50)]  # keys overrule the actor
    assert states[-1][0]["rewards"] == [2, 0, 1, 2, 1] and "step 5 · reward 1.00 · return 6.0" in states[-1][0]["text"]
    assert act(page, "r")[1] == 0 and "return 2.0" in act(page, " ")[0]["text"]
    here, away = page[7:].replace("127.0.0.1", "localhost"), page[7:].replace("127.0.0.1", "example.com")
    for code, path, key, host in (403, "/act", "r", away), (404, "/act", "", here), (404, "/nothing", "r", here):
        with pytest.raises(urllib.error.HTTPError, match=str(code)):
            ask(page + path, *key, Host=host)


def test_keys_of_a_continuous_world():
    dream = gym.Env()
    dream.env, dream.action_space = gym.Env(), gym.spaces.Box(-1, 1, (4,))
    low, high = np.float32([[-2, 0], [0, -1]]), np.float32([[2, 1], [1, 1]])  # steer, gas, brake; of any shape
    dream.env.action_space = gym.spaces.Box(low, high)
    names, action = play.controls(dream)
    assert [*names] == ["ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown", "d", "a", "."]
    assert action(["."]).tolist() == [0, -1, -1, 0] and action(["ArrowLeft", "ArrowUp", "d"]).tolist() == [-1, 1, -1, 1]
    assert action(["ArrowLeft", "ArrowLeft", "ArrowRight"]) in dream.action_space and not action(["d", "a", "a"])[3]


@pytest.mark.parametrize("missing", ["args.json", "checkpoint.pt", "mine"])
def test_what_is_no_run_gets_one_line(run, missing, tmp_path):
    process = start(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns(missing)))
    (line,) = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 1 and line.startswith("play.py: run ") and missing in line


@pytest.mark.parametrize(
    "prompt, word", [("docs/compare.png", "genie.py"), ("README.md", "identify"), ("a.png", "a.png"), ("bad", "broken")]
)
def test_what_is_no_start_for_a_dream_gets_one_line(run, prompt, word, tmp_path):
    (tmp_path / "bad").write_bytes(b"?DAT".join((ROOT / "docs/compare.png").read_bytes().rsplit(b"IDAT", 1)))
    process = start(run, "--prompt", tmp_path / prompt if prompt == "bad" else ROOT / prompt)
    (line,) = process.communicate(timeout=60)[1].splitlines()
    assert word in line and process.returncode == 1


def test_the_video(run, tmp_path):
    trained = train(dreamer_v3, tmp_path, "--env-id", "toy_envs:Image-v0")
    for path, size in (trained, (256, 512, 3)), (run, (280, 2800, 3)):
        out, err = start(path, "--video").communicate(timeout=120)
        assert not lines(err) and out.endswith("videos/dream.mp4\n"), err
        video = iio.imread(path / "videos/dream.mp4")
        assert video.shape[1:] == size, video.shape
    assert len(video) in (45, 46) and sorted(video[20, 0, 7::14, 0].argsort()[-2:]) == [40, 150]  # 2 a step, to 90


@pytest.mark.slow
@pytest.mark.parametrize("page", [signal.SIGINT], indirect=True)
def test_the_page_in_a_browser(page, tmp_path):
    webdriver, program = pytest.importorskip("selenium.webdriver"), shutil.which("chromedriver")
    if not program:
        pytest.skip("no chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    for flag in ("headless", "no-sandbox", "disable-gpu", f"user-data-dir={tmp_path}/browser"):
        options.add_argument(f"--{flag}")
    with webdriver.Chrome(options, webdriver.ChromeService(program)) as driver:

        def do(action, *what, says, lit=""):
            """A hand's action -> what the page says, once it has `says` in it and the button `lit` alone is lit."""
            getattr(webdriver.ActionChains(driver), action)(*what).perform()
            for _ in range(100):
                time.sleep(0.2)
                text = driver.find_element("id", "text").text
                on = [button.text.split()[-1] for button in driver.find_elements("css selector", "button.on")]
                if says in text and on == lit.split():
                    return text
            pytest.fail(f"{text}, lit: {on}")

        driver.get(page)
        do("pause", 0.1, says="a new dream")
        do("key_down", webdriver.Keys.ARROW_LEFT, says="step", lit="LEFT")
        text = do("key_up", webdriver.Keys.ARROW_LEFT, says="step")
        assert do("pause", 0.1, says="step") == text and driver.execute_script("return dream.naturalWidth") == 100
        *_, left, _, actor = driver.find_elements("tag name", "button")
        do("click_and_hold", left, says="step", lit="LEFT")
        assert do("release", says="step") != text
        text = do("click", actor, says="the end: r for a new dream", lit="actor")
        assert do("pause", 0.3, says="the end", lit="actor") == text
        do("send_keys", " ", says="the end")
        do("key_down", "r", says="a new dream")
