"""A replay is the store itself: tiny traces by hand, the published rates on the recorded ones."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest

from forebay.bench.replay_policies import NAMES, policy_maker
from forebay.bench.replay_run import Drive, Result, replay
from forebay.bench.trace import Request, Trace, read_trace
from forebay.kvstore.admission import DAY_S, WriteTerms
from forebay.kvstore.shapes import SHAPES

TRACES = Path(__file__).resolve().parents[2] / ".." / "shared" / "traces"


def trace_of(*chains: str) -> Trace:
    """One request a second; each letter is a block of 512 tokens, named by the letters up to it."""
    requests = tuple(
        Request(float(at), 512 * len(chain), tuple(chain[: end + 1].encode().ljust(16) for end in range(len(chain))))
        for at, chain in enumerate(chains)
    )
    return Trace("tiny", requests, len({name for request in requests for name in request.names}))


def run(
    trace: Trace, policy: str, blocks: int, nvme_blocks: int = 0, warm_up: float = 0.0, hints: float = 0.0
) -> Result:
    shape = SHAPES["llama-3-70b"]
    maker = policy_maker(policy, trace, shape)
    drive = Drive(nvme_blocks) if nvme_blocks else None
    return replay(trace, policy, maker, blocks, drive=drive, shape=shape, warm_up=warm_up, hints=hints)


def recorded(name: str) -> Trace:
    path = TRACES / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in {TRACES}: the recorded traces are not part of the repository")
    return read_trace(path)


def test_lru_of_a_tiny_trace_is_what_one_counts_by_hand() -> None:
    """Room for 4: "xyz" takes the 1 that is free and gives up c and b; "ab" then finds a alone, and takes z's place."""
    result = run(trace_of("abc", "xyz", "ab", "ab"), "lru", 4)
    assert result.token_hit_percent == pytest.approx(100 * (0 + 0 + 1 + 2) / 10)
    assert result.evictions == {"lost": 3, "unwritten": 0, "demoted": 0, "bypassed": 0, "declined": 0}
    assert (result.capacity_blocks, result.capacity_percent, result.occupancy_mean) == (4, 66.667, 1.0)


@pytest.mark.parametrize("policy", ["lru", "belady"])
def test_answers_are_stored_and_found_by_the_next_turn(policy: str) -> None:
    names = tuple(b"abcd"[: end + 1].ljust(16) for end in range(4))
    turns = Request(0.0, 512 * 2, names[:2], answer=names[2:3]), Request(1.0, 512 * 4, names)
    assert run(Trace("talk", turns, 4), policy, 4).token_hit_percent == pytest.approx(100 * 3 / 6)


def test_belady_does_not_store_what_never_comes_back() -> None:
    result = run(trace_of("abc", "xyz", "ab", "ab"), "belady", 4)
    assert result.token_hit_percent == pytest.approx(100 * (0 + 0 + 2 + 2) / 10)
    assert result.evictions == {"lost": 0, "unwritten": 0, "demoted": 0, "bypassed": 2, "declined": 0}


def test_saved_work_weighs_deep_tokens_more() -> None:
    """Attention makes the second half of a prompt dearer than the first."""
    result = run(trace_of("abcd", "abxy"), "lru", 100)
    assert result.token_hit_percent == pytest.approx(25.0)
    assert 24.0 < result.flops_saved_percent < 25.0


def test_blocks_that_are_said_to_be_over_make_room_for_those_that_are_not() -> None:
    """Room for 4: without hints "vw" takes the places of "ab", with them those of "xy"."""
    trace = trace_of("ab", "xy", "vw", "ab")
    assert [run(trace, "lru", 4, hints=share).token_hit_percent for share in (0.0, 1.0)] == [0.0, 25.0]


@pytest.mark.parametrize(("policy", "least"), [("lru", (12.0, 24.5)), ("hazard", (15.9, 24.5))], ids=["lru", "hazard"])
def test_hints_of_the_end_are_worth_what_they_should_be_on_recorded_conversations(
    policy: str, least: tuple[float, float]
) -> None:
    """A release of all that is dead is worth 17 points to LRU, of half of it 4.5."""
    trace = recorded("conversation")
    blocks = trace.unique_blocks * 2 // 100
    found = [run(trace, policy, blocks, hints=share).token_hit_percent for share in (0.5, 1.0)]
    print(f"{policy}: token hits with half of the ends told, and with all: {found}")
    assert found[0] >= least[0]
    assert found[1] >= least[1]


@pytest.mark.parametrize("policy", NAMES)
def test_every_policy_fills_its_room_and_keeps_the_books(policy: str) -> None:
    """And none beats the bound; with all in memory all are the same."""
    trace = trace_of(*(f"s{letter}{'abcdefgh'[: at % 6]}" for at, letter in enumerate("abcabdaebafc" * 4)))
    bound = run(trace, "belady", 8).token_hit_percent
    result = run(trace, policy, 8)
    assert 0 < result.token_hit_percent <= bound + 1e-9
    assert result.occupancy_mean > 0.9
    assert run(trace, policy, 1000).token_hit_percent == run(trace, "lru", 1000).token_hit_percent


def test_what_leaves_memory_is_found_on_the_drive() -> None:
    """Two tiers hold what one of both sizes does, and what was written is counted."""
    trace = trace_of(*(["abcdef", "ghijkl", "mnopqr"] * 6))
    alone, both = run(trace, "lru", 6), run(trace, "hazard", 6, nvme_blocks=40)
    assert alone.token_hit_percent == 0
    assert both.token_hit_percent > 60
    assert 0 < both.nvme_writes_per_new_block <= 1
    assert both.evictions["demoted"] > 0


def test_same_trace_has_the_same_result() -> None:
    trace = trace_of(*(f"s{letter}{'abcdefgh'[: at % 6]}" for at, letter in enumerate("abcabdaebafc" * 40)))
    assert run(trace, "hazard", 9) == run(trace, "hazard", 9)


@pytest.mark.parametrize(
    ("name", "percent", "goal", "lru"),
    [("synthetic", 1, 3.9, 3.88), ("synthetic", 20, 42.0, 40.03), ("agentA", 1, 28.0, 12.88)],
)
def test_hazard_reaches_its_goals_on_recorded_traces(name: str, percent: int, goal: float, lru: float) -> None:
    """Corners of the table of docs/replay.md; the whole of it takes minutes."""
    trace = recorded(name)
    result = run(trace, "hazard", percent * trace.unique_blocks // 100)
    print(f"{name} {percent} %: {result.token_hit_percent:.2f} % (goal {goal}, LRU {lru})")
    assert result.token_hit_percent >= goal


@pytest.mark.parametrize(
    ("name", "host", "nvme", "chance", "goal", "writes"),
    [
        ("synthetic", 3, 30, 0.30, 51.5, 0.70),
        ("conversation", 3, 30, 0.19, 32.5, 0.73),
        ("conversation", 1, 10, 0.27, 24.8, 0.40),
    ],
)
def test_writing_what_is_likely_to_return_reaches_its_goals(
    name: str, host: int, nvme: int, chance: float, goal: float, writes: float
) -> None:
    """Token hits of at least the goal, with no more writes for each new block."""
    trace = recorded(name)
    shape, share = SHAPES["llama-3-70b"], trace.unique_blocks / 100
    drive = Drive(int(nvme * share), terms=WriteTerms(least_chance=chance))
    result = replay(trace, "hazard", policy_maker("hazard", trace, shape), int(host * share), drive=drive, shape=shape)
    print(
        f"{name} {host} % + {nvme} %: {result.token_hit_percent:.2f} %, {result.nvme_writes_per_new_block:.3f} writes"
    )
    assert result.token_hit_percent >= goal
    assert result.nvme_writes_per_new_block <= writes


def day_of_conversations() -> Trace:
    """A request every 20 seconds, of one to twelve blocks more than what it goes on with; half of them go on."""
    dice = random.Random(7)
    requests: list[Request] = []
    for at in range(0, int(DAY_S), 20):
        before = requests[-dice.randint(1, min(40, at // 20))].names if at and dice.random() < 0.5 else ()
        new = tuple(b"%d.%d".ljust(16) % (at, number) for number in range(dice.randint(1, 12)))
        names = before[:40] + new
        requests.append(Request(float(at), 512 * len(names), names))
    return Trace("day", tuple(requests), len({name for request in requests for name in request.names}))


def test_budget_is_what_is_written_in_a_day() -> None:
    """Within 5 %, where more would be worth it."""
    trace, shape = day_of_conversations(), SHAPES["llama-3-70b"]
    wanted = run(trace, "hazard", 300, nvme_blocks=3000)
    assert wanted.nvme_writes_per_new_block > 0.9
    for share in (0.2, 0.6):
        drive = Drive(3000, budget_blocks_per_day=share * trace.unique_blocks)
        result = replay(trace, "hazard", policy_maker("hazard", trace, shape), 300, drive=drive, shape=shape)
        print(
            f"{share:.0%} of {trace.unique_blocks} blocks a day: {result.budget_used_percent:.1f} % of it written, "
            f"hits {result.token_hit_percent:.1f} % (without a budget {wanted.token_hit_percent:.1f} %)"
        )
        assert 95 <= result.budget_used_percent <= 105


def test_weighing_by_cost_saves_more_work_than_lru() -> None:
    trace = recorded("synthetic")
    assert run(trace, "hazard-cost", 5 * trace.unique_blocks // 100).flops_saved_percent >= 18.0


@pytest.mark.timeout(900)  # the other simulator, in plain Python, takes its time
@pytest.mark.parametrize("name", ["conversation", "synthetic"])
def test_lru_and_belady_agree_with_another_simulator(name: str) -> None:
    """Of Mooncake's authors; to three decimals, in blocks."""
    if importlib.util.find_spec("kvcache_sim") is None:
        pytest.skip("kvcache-simulator (PyPI, 0.1.3 was tried) is not installed: nothing to compare with")
    from kvcache_sim.plan import build_execution_plan
    from kvcache_sim.policies import simulate_policy
    from kvcache_sim.trace import parse_trace_file

    trace = recorded(name)
    plan = build_execution_plan(parse_trace_file(TRACES / f"{name}.jsonl.gz", block_size=512), warmup_fraction=0.5)
    for ours, theirs in (("lru", "lru"), ("belady", "optimal")):
        for percent in (1, 10):
            blocks = percent * trace.unique_blocks // 100
            expected = 100 * simulate_policy(plan, theirs, blocks).hitRate
            found = run(trace, ours, blocks, warm_up=0.5).token_hit_percent
            print(f"{name} {percent} % {ours}: {found:.3f}, kvcache-simulator {expected:.3f}")
            assert found == pytest.approx(expected, abs=0.0005)
