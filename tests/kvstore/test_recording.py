"""What a recording keeps, what it drops, and when it ends."""

from __future__ import annotations

import pytest

from forebay.kvstore import recording
from forebay.kvstore.errors import Busy, Forbidden, NotLeased
from forebay.kvstore.recording import QUEUE_REQUESTS_MAX
from support.core import World, chain, spec

OPERATOR = 9


@pytest.fixture
def world() -> World:
    """One whose operator records for 10 s, 100 requests at most."""
    world = World(slabs=4, slots=4)
    world.open_session(OPERATOR, operator=True)
    world.open(world.store.shard(world.session, world.ns).group.spec, OPERATOR)
    world.store.record(OPERATOR, world.ns, 10.0, 100, world.now)
    return world


def taken(world: World, blocks_max: int = 1000) -> list[tuple[float, list[bytes]]]:
    found, _, _ = world.store.recorded(OPERATOR, blocks_max, world.now)
    assert len({each.number for each in found}) == len(found), "nothing but requests"
    return [(each.after_s, list(each.hashes)) for each in found]


def test_each_request_is_kept_once_with_its_time(world: World) -> None:
    """A lookup is one; the lease that follows it is none, and one without a lookup is."""
    world.write(chain("a", 3))
    world.at(1.0)
    world.hits(chain("a", 3))
    world.acquire(chain("a", 3))
    world.at(2.5)
    world.acquire(chain("b", 2))
    assert taken(world) == [(1.0, chain("a", 3)), (2.5, chain("b", 2))]
    assert taken(world) == []


def test_a_chain_that_continues_another_is_kept_whole(world: World) -> None:
    world.write(chain("a", 4))
    world.hits(chain("a", 4)[2:])
    assert taken(world) == [(0.0, chain("a", 4))]


def items(world: World) -> list[tuple[int, list[bytes]]]:
    found, _, _ = world.store.recorded(OPERATOR, 1000, world.now)
    return [(each.number, list(each.hashes)) for each in found]


def test_what_is_stored_beyond_a_prompt_is_its_answer(world: World) -> None:
    """Whether stored whole or behind the block that it continues, and as it grows; each block once."""
    talk = chain("a", 7)
    world.hits(talk[:3])
    world.write(talk[:3])
    world.write(talk[:4])
    world.write(talk[:4])
    world.store.reserve(world.session, world.ns, talk[3], talk[4:6], world.now)
    world.write(chain("b", 2))
    assert items(world) == [(1, talk[:3]), (1, talk[3:4]), (1, talk[4:6])]


def test_same_answer_to_the_same_prompt_is_told_again(world: World) -> None:
    """Although its blocks are there."""
    talk = chain("a", 4)
    for _ in range(2):
        world.hits(talk[:2])
        world.write(talk)
    assert items(world) == [(1, talk[:2]), (1, talk[2:]), (2, talk[:2]), (2, talk[2:])]


def test_next_turns_prompt_is_not_the_last_ones_answer(world: World) -> None:
    """Stored in parts, as an engine does that computes a long prompt in several steps."""
    talk = chain("a", 8)
    world.hits(talk[:2])
    world.write(talk[:2])
    world.hits(talk[:6])
    world.write(talk[:4])
    world.write(talk[:6])
    world.write(talk[:7])
    assert items(world) == [(1, talk[:2]), (2, talk[:6]), (2, talk[6:7])]


def test_answers_of_requests_beyond_the_last_few_thousand_are_not_known(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "OPEN_REQUESTS_MAX", 1)
    for label in "ab":
        world.hits(chain(label, 1))
    for label in "ab":
        world.write(chain(label, 2))
    assert items(world) == [(1, chain("a", 1)), (2, chain("b", 1)), (2, chain("b", 2)[1:])]


def test_what_is_taken_is_bounded_but_by_one_request(world: World) -> None:
    for label in "abc":
        world.hits(chain(label, 10))
    assert [len(taken(world, 20)), len(taken(world, 5))] == [2, 1]


def test_a_slow_recorder_loses_requests_and_is_told(world: World) -> None:
    world.store.record(OPERATOR, world.ns, 10.0, 1 << 20, world.now)
    for number in range(QUEUE_REQUESTS_MAX + 7):
        world.hits(chain(f"{number}", 1))
    found, dropped, ended = world.store.recorded(OPERATOR, 1 << 20, world.now)
    assert (len(found), dropped, ended) == (QUEUE_REQUESTS_MAX, 7, False)


@pytest.mark.parametrize(("late_s", "most"), [(11.0, 100), (1.0, 2)])
def test_it_ends_by_time_and_by_number(world: World, late_s: float, most: int) -> None:
    world.store.record(OPERATOR, world.ns, 10.0, most, world.now)
    for label in "ab":
        world.hits(chain(label, 1))
    world.at(late_s)
    world.hits(chain("c", 1))
    assert [names for _, names in taken(world)] == [chain("a", 1), chain("b", 1)]
    assert world.store.recorded(OPERATOR, 10, world.now) == ([], 0, True)


def test_it_ends_with_its_session(world: World) -> None:
    world.store.close_session(OPERATOR)
    assert world.store.physics.recording is None


def test_only_one_operator_records(world: World) -> None:
    with pytest.raises(Forbidden):
        world.store.record(world.session, world.ns, 1.0, 1, world.now)
    with pytest.raises(NotLeased):
        world.store.recorded(world.session, 1, world.now)
    other = world.open_session(10, operator=True)
    world.open(world.store.shard(world.session, world.ns).group.spec, other)
    with pytest.raises(Busy):
        world.store.record(other, world.ns, 1.0, 1, world.now)
    world.at(20.0)
    world.store.record(other, world.ns, 1.0, 1, world.now)


def test_other_namespaces_are_not_kept(world: World) -> None:

    other = world.open(spec("other"))
    world.store.lookup(world.session, other, chain("a", 2), world.now)
    assert taken(world) == []
