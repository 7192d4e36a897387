"""Empty stand-in for labmaze, which has no wheel from Python 3.13 on: dm_control requires it, its suite does not."""
