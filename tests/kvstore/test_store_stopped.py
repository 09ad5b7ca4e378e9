"""How answers stop tells whose conversations go on soon: learned, it is worth hits; untold, nothing changes."""

from __future__ import annotations

import random
from collections.abc import Callable

from forebay.kvstore.eviction.policies import hazard, lru
from forebay.kvstore.outcome import StopReason
from support.core import World, chain

AGENTS, STEPS, STEP_S = 10, 6, 20.0


def serve(world: World, tell: Callable[[list[bytes], StopReason], object], seconds: float) -> float:
    """Share of the blocks asked for that were there.

    Agents call a tool after each step but the last, and come back with a longer prompt; people ask once. Both begin
    alike: without a hint nothing tells the one from the other at first.
    """
    dice = random.Random(3)
    asked = hit = number = 0
    agents = [(dice.uniform(0, STEP_S), 0, f"agent{at}") for at in range(AGENTS)]
    now = 0.0
    while now < seconds:
        now, step, label = min(agents)
        agents.remove((now, step, label))
        world.now = now
        number += 1
        names = chain(f"person{number}", 4)
        asked, hit = asked + 4, hit + world.hits(names)
        store(world, names)
        tell(names, StopReason.STOP)
        names = chain(label, 4 * (step + 1))
        asked, hit = asked + len(names), hit + world.hits(names)
        store(world, names)
        over = step + 1 == STEPS
        tell(names, StopReason.STOP if over else StopReason.TOOL_CALL)
        agents.append((now + STEP_S, 0, f"agent{number}") if over else (now + STEP_S, step + 1, label))
    world.check()
    return hit / asked


def store(world: World, names: list[bytes]) -> None:
    reserved = world.reserve(names)
    if reserved.reservation_id:
        world.commit(reserved)


def rate(policy: object, *, told: bool) -> float:
    world = World(slabs=4, slots=10, host_policy=policy)
    if not told:
        return serve(world, lambda names, reason: None, 4000.0)
    return serve(world, lambda names, reason: world.store.stopped(1, world.ns, names, reason), 4000.0)


def test_knowing_of_tool_calls_is_worth_hits() -> None:
    plain, told = rate(hazard, told=False), rate(hazard, told=True)
    print(f"hits: {plain:.3f} without stop reasons, {told:.3f} with them")
    assert told > plain + 0.015


def test_recency_takes_no_notice_of_it() -> None:
    assert rate(lru, told=True) == rate(lru, told=False)


def test_hints_are_counted_whether_anything_is_known_of_the_blocks_or_not() -> None:
    world = World(host_policy=hazard)
    world.write(chain("a", 3))
    assert world.store.stopped(1, world.ns, chain("a", 3), StopReason.TOOL_CALL) == 3
    assert world.store.stopped(1, world.ns, chain("b", 3), StopReason.TOOL_CALL) == 0
    assert world.store.stats().counters.stopped_hints == 2
