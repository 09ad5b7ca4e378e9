"""What is told of a block that is stored, leased, pinned, evicted, or never was there."""

from __future__ import annotations

from functools import partial

import pytest

from forebay.kvstore.errors import Forbidden
from forebay.kvstore.eviction.policies import hazard, lru
from forebay.kvstore.explanation import BlockStory
from forebay.kvstore.physics import PhysicsConfig
from support.core import World, chain

OPERATOR = 9


def world(**config: object) -> World:
    made = World(slabs=2, slots=4, physics=PhysicsConfig(prefill_tokens_per_s=1000.0), **config)
    made.open_session(OPERATOR, operator=True)
    made.open(made.store.shard(made.session, made.ns).group.spec, OPERATOR)
    return made


def story(world: World, name: bytes) -> BlockStory:
    told = world.store.explain(OPERATOR, world.ns, name, world.now)
    assert told is not None
    return told


def test_place_users_and_order_of_a_stored_block() -> None:
    made = world(host_policy=partial(hazard))
    a, b = chain("a", 3), chain("b", 2)
    made.write(a)
    made.at(20.0)
    made.write(b)
    made.hits(a[:2])
    made.acquire(a[:2], 20.0)
    made.at(21.0)
    told = story(made, a[1])
    assert (told.stored, told.depth, told.tokens, told.tiers) == (True, 1, 32, ("host",))
    assert (told.leases, told.holds, told.lease_left_s) == (1, 1, 19.0)
    assert told.leaving.startswith("no, it is leased")
    assert told.age_s == 1.0
    assert story(made, a[2]).order == 0
    assert story(made, a[2]).leaving == "yes"
    assert story(made, b[0]).leaving.startswith("not before")
    assert told.policy is not None
    assert "until 200 requests" in told.policy.reason


@pytest.mark.parametrize("policy", [lru, hazard], ids=["lru", "hazard"])
def test_what_hints_made_of_a_block_is_told(policy: object) -> None:
    made = world(host_policy=policy)
    made.commit(made.store.reserve(made.session, made.ns, b"", chain("a", 2), 0.0, priority=2))
    made.write(chain("b", 2))
    assert [story(made, chain(label, 2)[1]).priority for label in "ab"] == [2, 0]
    made.store.done(made.session, made.ns, chain("b", 2))
    assert story(made, chain("b", 2)[1]).leaving == "yes, before all others: its conversation is over"
    assert story(made, chain("a", 2)[1]).leaving == "yes"


def test_the_plan_is_of_the_prompt_that_ends_with_it_and_is_not_counted() -> None:
    made = world()
    made.write(chain("a", 4))
    before = made.store.stats().physics.plans
    told = story(made, chain("a", 4)[2])
    assert told.plan is not None
    assert (told.plan.blocks, [each.blocks for each in told.plan.table][-1]) == (3, 3)
    assert told.plan.recompute_s == pytest.approx(48 / 1000)
    assert made.store.stats().physics.plans == before


def test_of_an_evicted_block_the_policy_remembers_its_class() -> None:
    made = world(host_policy=partial(hazard))
    made.write(chain("a", 2))
    made.write(chain("b", 8))
    told = story(made, chain("a", 2)[1])
    assert (told.stored, told.tiers, told.plan) == (False, (), None)
    assert told.policy is not None


def test_of_an_unknown_block_nothing_is_told_and_only_operators_may_ask() -> None:
    made = world()
    assert made.store.explain(OPERATOR, made.ns, chain("none", 1)[0], 0.0) is None
    with pytest.raises(Forbidden):
        made.store.explain(made.session, made.ns, chain("none", 1)[0], 0.0)


def test_an_expected_block_may_not_leave() -> None:
    made = world()
    made.write(chain("a", 1))
    made.store.expect(made.session, made.ns, chain("a", 1), 5.0, made.now)
    assert story(made, chain("a", 1)[0]).leaving == "no, a client expects to ask for it"


def test_lru_tells_when_a_block_was_asked_for_and_pins_are_told() -> None:
    made = world()
    made.write(chain("a", 1))
    made.store.pin(made.session, made.ns, chain("a", 1))
    made.at(3.0)
    told = story(made, chain("a", 1)[0])
    assert (told.age_s, told.pinned, told.leaving, told.policy) == (3.0, True, "no, it is pinned", None)
