"""What a simulation knows of the blocks on a simulated NVMe tier: the owner's part, played by a few dictionaries.

It keeps two things apart: what its owner believes lies where (and would load), and what was ever written where, which
is what a restart may bring back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from forebay.tiers.nvme_jobs import RestoredBlock, SlabOwner

Place = tuple[int, int]
"""(slab, slot)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A namespace shard: how large its blocks are and how many fit a slab."""

    owner: SlabOwner
    payload_bytes: int
    slots_per_slab: int

    @property
    def slot_bytes(self) -> int:
        return self.owner.slot_bytes


@dataclass(frozen=True, slots=True)
class Block:
    """A block as it was handed to the tier once."""

    hash: bytes = field(repr=False)
    parent: bytes = field(repr=False)
    depth: int
    generation: int
    shape: Shape = field(repr=False)


@dataclass(slots=True)
class Model:
    """Places are exclusive: `busy` ones have a job under way and are left alone until it is done."""

    slabs: dict[int, Shape] = field(default_factory=dict)
    believed: dict[Place, Block] = field(default_factory=dict)
    durable: set[Place] = field(default_factory=set)
    """Of the believed, those whose write was reported OK and that nobody has touched since."""
    latest: dict[Place, Block] = field(default_factory=dict)
    """What was handed to the tier last for a place, whatever became of it."""
    history: dict[Place, dict[int, Block]] = field(default_factory=dict)
    """All that was ever handed to the tier for a place, by generation."""
    busy: set[Place] = field(default_factory=set)

    def assign(self, slab: int, shape: Shape) -> None:
        self.slabs[slab] = shape

    def retire(self, slab: int) -> None:
        del self.slabs[slab]
        self.drop([place for place in self.believed if place[0] == slab])

    def drop(self, places: list[Place]) -> None:
        """Believe nothing of these any more."""
        for place in places:
            self.believed.pop(place, None)
            self.durable.discard(place)

    def write(self, place: Place, block: Block) -> None:
        self.drop([place])
        self.busy.add(place)
        self.latest[place] = block
        self.history.setdefault(place, {})[block.generation] = block

    def written(self, place: Place, ok: bool) -> None:
        self.busy.discard(place)
        if ok:
            self.believed[place] = self.latest[place]
            self.durable.add(place)

    def idle_slabs(self) -> list[int]:
        busy = {slab for slab, _ in self.busy}
        return [slab for slab in self.slabs if slab not in busy]

    def places(self, shape: Shape) -> list[Place]:
        """All places of the shape that no job is at."""
        slabs = [slab for slab, its_shape in self.slabs.items() if its_shape == shape]
        places = [(slab, slot) for slab in slabs for slot in range(shape.slots_per_slab)]
        return [place for place in places if place not in self.busy]

    def restored(self, slabs: dict[int, Shape], blocks: list[RestoredBlock]) -> tuple[list[RestoredBlock], set[Place]]:
        """Believe what a restart told, and only that; returns what cannot be true and the durable places not told."""
        was_durable = {place: self.believed[place] for place in self.durable}
        self.slabs, self.busy = dict(slabs), set()
        self.believed.clear()
        self.durable.clear()
        phantoms = []
        for told in blocks:
            slab, slot, block_hash, parent, depth, generation = told
            block = self.history.get((slab, slot), {}).get(generation)
            wanted = block and (block.hash, block.parent, block.depth, block.shape)
            if wanted != (block_hash, parent, depth, slabs.get(slab)):
                phantoms.append(told)
            elif block is not None:
                self.believed[slab, slot] = block
        self.durable = {place for place, block in was_durable.items() if self.believed.get(place) == block}
        return phantoms, set(was_durable) - self.durable
