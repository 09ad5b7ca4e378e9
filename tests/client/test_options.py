"""How long a client waits for a daemon that did not answer."""

from __future__ import annotations

import pytest

from forebay.client.options import ClientOptions


@pytest.mark.parametrize(("fair_s", "ms"), [(0.001, 5.0), (0.05, 50.0), (2.0, 200.0)])
def test_probes_wait_as_long_as_is_fair_between_the_budget_and_the_time_out(fair_s: float, ms: float) -> None:
    assert ClientOptions(budget_ms=5.0, timeout_ms=200.0).probe_ms(fair_s) == ms
