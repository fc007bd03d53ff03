"""Settings of every test."""

from hypothesis import settings

# The same examples on every run, so that a failure is of the change at hand; slow machines pass.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
