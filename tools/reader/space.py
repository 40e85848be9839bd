"""The space map, held against what the trees reach: docs/FORMAT.md, section 7.

Holds: the comparison uses nothing but the newest superblock and what it reaches.
"""

import snapshots
from sealing import KIND_SPACE, Damaged, number
from volume import FANOUT, TABLE_FANOUT, Pointer

REGION = 32768
ROOT_LEVEL = 3


def _place(level, index, slot):
    region = index * FANOUT**level
    base = 256 if region == 0 else REGION * region
    return base + 2 * level + slot


def _pages(volume):
    """Region → bitmap, of all regions that have one."""
    pages = {}

    def walk(pointer, level, index):
        word = number(pointer, 0, 8)
        where = Pointer(pointer)
        # The place follows from the node's number; the pointer's own bits say which slot.
        where.place = _place(level, index, word >> 39 & 1)
        node = volume.open(where, KIND_SPACE, level, index, f"space map {level}/{index}")
        if level == 0:
            pages[index] = node
            return
        for entry in range(FANOUT):
            child = node[32 * entry :][:32]
            if any(child):
                walk(child, level - 1, index * FANOUT + entry)

    block = volume.superblock.space
    if block:
        raw = block.word.to_bytes(8, "little") + block.order.to_bytes(8, "little") + block.tag
        walk(raw, ROOT_LEVEL, 0)
    return pages


def _reached(volume):
    """Every place that map, snapshots and tables reach, and those that one tree reaches twice.

    Trees share what did not change between them, so each is counted by itself."""
    found, places_of_table = snapshots.table(volume)
    superblock = volume.superblock
    trees = [(superblock.root, superblock.levels)]
    trees += [(snapshot.root, snapshot.levels) for snapshot in found]
    reached, twice = set(), set()
    for root, levels in trees:
        places = _of_map(volume, root, levels)
        reached |= places.keys()
        twice |= {place for place, times in places.items() if times > 1}
    tables = _of_table(volume) + places_of_table
    twice |= {place for place in tables if place in reached or tables.count(place) > 1}
    return reached | set(tables), twice


def _of_map(volume, root, levels):
    """Every place that a map reaches, with how often."""
    places = {}

    def note(place):
        places[place] = places.get(place, 0) + 1

    def walk_map(pointer, level, index):
        note(pointer.place)
        node = volume.node(pointer, level, index)
        for entry in range(FANOUT):
            child = Pointer(node[32 * entry :][:32])
            if child and level:
                walk_map(child, level - 1, index * FANOUT + entry)
            elif child:
                note(child.place)

    if root:
        walk_map(root, levels - 1, 0)
    return places


def _of_table(volume):
    """The places of the epoch table's nodes."""
    places = []

    def walk_table(pointer, level, index):
        places.append(pointer.place)
        node = volume.table_node(pointer, level, index)
        if node is None:
            raise Damaged(f"epoch table {level}/{index}")
        if level == 0:
            return
        for entry in range(TABLE_FANOUT):
            child = Pointer(node[32 + 32 * entry :][:32])
            if child:
                walk_table(child, level - 1, index * TABLE_FANOUT + entry)

    superblock = volume.superblock
    if superblock.table:
        walk_table(superblock.table, superblock.table_levels - 1, 0)
    return places


def audit(volume):
    """Places in use that nothing reaches, reached places that are free, places reached twice."""
    superblock = volume.superblock
    (reached, twice), used = _reached(volume), set()
    for region, page in _pages(volume).items():
        for at, byte in enumerate(page):
            for bit in range(8) if byte else ():
                place = region * REGION + 8 * at + bit
                # A region's first eight blocks are the space map's own.
                fixed = place < superblock.reserve or place % REGION < 8
                if byte >> bit & 1 and not fixed and place < superblock.host_blocks:
                    used.add(place)
    return {
        "used": len(used),
        "leaked": sorted(used - reached),
        "missing": sorted(reached - used),
        "twice": sorted(twice),
    }
