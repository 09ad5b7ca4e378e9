"""Hypothesis profiles: the default repeats itself and is quick; `--hypothesis-profile=long` searches for minutes."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("long", max_examples=3000, deadline=None, print_blob=True)
