"""Settings of every test."""

import os

from hypothesis import settings

# Processes instead of threads: as fast, and the last bit of a sum is the same on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The same examples on every run, so that a failure is of the change at hand; slow machines pass.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
