"""What every tier promises (tiers/base.py), as tests to inherit: a subclass provides the fixture `tier`.

The fixture's tier has four closed slabs, is not started, and has a `view(slab)` of its bytes.
"""

from __future__ import annotations

from typing import Any

import pytest

SLABS = 4


class TierContract:
    def test_describes_a_whole_number_of_slabs(self, tier: Any) -> None:
        info = tier.describe()
        assert info.tier == tier.name
        assert info.slabs == SLABS
        assert info.capacity_bytes == SLABS * info.slab_bytes
        assert info.up
        assert not info.reason

    def test_opened_slab_reads_as_zeros(self, tier: Any) -> None:
        tier.open_slab(0)
        view = tier.view(0)
        assert len(view) == tier.describe().slab_bytes
        assert view == bytes(len(view))

    def test_reopened_slab_shows_nothing_of_its_previous_owner(self, tier: Any) -> None:
        tier.open_slab(1)
        tier.view(1)[:6] = b"secret"
        tier.close_slab(1)
        tier.open_slab(1)
        assert tier.view(1)[:6] == bytes(6)

    def test_view_kept_over_close_slab_reads_zeros(self, tier: Any) -> None:
        tier.open_slab(1)
        old = tier.view(1)
        old[:6] = b"secret"
        tier.close_slab(1)
        assert old[:6] == bytes(6)

    def test_write_through_an_old_view_does_not_reach_the_next_owner(self, tier: Any) -> None:
        tier.open_slab(1)
        old = tier.view(1)
        tier.close_slab(1)
        tier.open_slab(1)
        old[:4] = b"late"
        assert tier.view(1)[:4] == bytes(4)

    def test_slabs_do_not_share_bytes(self, tier: Any) -> None:
        for slab in range(SLABS):
            tier.open_slab(slab)
            tier.view(slab)[0] = slab + 1
        assert [tier.view(slab)[0] for slab in range(SLABS)] == [1, 2, 3, 4]

    @pytest.mark.parametrize("slab", [-1, SLABS])
    def test_slab_that_does_not_exist_cannot_be_opened(self, tier: Any, slab: int) -> None:
        with pytest.raises(ValueError, match=f"slab {slab}"):
            tier.open_slab(slab)

    def test_open_slab_cannot_be_opened_again(self, tier: Any) -> None:
        tier.open_slab(0)
        with pytest.raises(ValueError, match="slab 0"):
            tier.open_slab(0)

    def test_closed_slab_cannot_be_closed(self, tier: Any) -> None:
        with pytest.raises(ValueError, match="slab 2"):
            tier.close_slab(2)

    def test_every_slab_can_be_open_and_come_back(self, tier: Any) -> None:
        tier.start()
        for _ in range(3):
            for slab in range(SLABS):
                tier.open_slab(slab)
            for slab in range(SLABS):
                tier.close_slab(slab)

    def test_closed_tier_is_down_and_opens_nothing(self, tier: Any) -> None:
        tier.start()
        tier.open_slab(0)
        tier.close(5.0)
        tier.close(5.0)
        assert not tier.describe().up
        assert tier.describe().reason
        with pytest.raises(OSError):  # noqa: PT011 - any errno
            tier.open_slab(1)
