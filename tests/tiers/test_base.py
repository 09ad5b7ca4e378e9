"""The contract of tiers/base.py holds for the in-memory fake that other tests build on."""

from __future__ import annotations

import pytest
from tests.tiers.contract import SLABS, TierContract
from tests.tiers.fakes import FakeTier

from forebay.tiers.base import Tier


class TestFakeTier(TierContract):
    @pytest.fixture
    def tier(self) -> FakeTier:
        return FakeTier(SLABS * 4096, 4096)


def test_fake_is_a_tier_to_the_type_checker() -> None:
    tier: Tier = FakeTier(4096, 4096)
    assert tier.name == "fake"
