"""MiniWorld: `pip install miniworld`, then `--env-id environments.miniworld:MiniWorld-Hallway-v0`, or another id.

It draws without a display, by EGL, if that is said before the import.
"""

import pyglet

pyglet.options["headless"] = True

import miniworld  # noqa: E402, F401, registers the environments
