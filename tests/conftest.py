"""Settings of every test."""

from hypothesis import settings

# The same examples on every run: a failure is then of the change at hand. Slow machines are no fault.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
