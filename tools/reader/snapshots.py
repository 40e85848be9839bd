"""Snapshots: docs/FORMAT.md, section 8a.

Holds: a snapshot is read by its own map alone; the journal has no part in it.
"""

from sealing import BLOCK, ZERO_NONCE, Damaged, Refused, associated_data, number, unseal
from volume import FANOUT, MAX_BIRTH, Pointer

ENTRIES, ENTRY, MOST_BLOCKS = 31, 128, 32


class Snapshot:
    """An entry of the table. Reads as a volume does: `size`, `blocks` and `block`."""

    def __init__(self, volume, data):
        self.volume = volume
        self.root = Pointer(data[:32])
        self.size, self.capacity = number(data, 32, 8), number(data, 40, 8)
        self.number, self.levels = number(data, 48, 4), number(data, 52, 4)
        self.created = number(data, 56, 8)
        length = data[64]
        name = bytes(data[72 : 72 + length])
        levels = 1
        while FANOUT**levels < self.capacity:
            levels += 1
        sound = (
            1 <= length <= 48
            and all(0x21 <= byte <= 0x7E for byte in name)
            and 0 < self.number < MAX_BIRTH
            and self.size <= self.capacity * BLOCK
            and self.levels == levels
        )
        if not sound:
            raise Refused("the snapshot table has an impossible entry")
        self.name = name.decode("ascii")

    def block(self, block):
        """As `Volume.block`."""
        pointer = self.volume.mapped(block, self.root, self.levels)
        return self.volume.data(pointer, block) if pointer else None

    def blocks(self):
        """As `Volume.blocks`."""
        end = -(-self.size // BLOCK)
        found = self.volume.mapped_blocks(self.root, self.levels, end)
        return sorted(block for block in found if block < end)


def table(volume):
    """The snapshots, oldest first, and the places of the blocks of their table."""
    pointer, found, places = volume.superblock.snapshots, [], []
    while pointer:
        index = len(places)
        if index == MOST_BLOCKS or pointer.place >= volume.superblock.host_blocks:
            raise Refused("the snapshot table has an impossible chain")
        block = volume.place(pointer.place)
        key = volume.header.snapshot_key(block[:24])
        associated = associated_data(6, 0, index)
        what = f"snapshot table, block {index}"
        body = bytes(32) + unseal(key, ZERO_NONCE, block[32:], pointer.tag, associated, what)
        places.append(pointer.place)
        for at in range(64, 64 + ENTRIES * ENTRY, ENTRY):
            if body[at + 64]:
                found.append(Snapshot(volume, body[at : at + ENTRY]))
        pointer = Pointer(body[32:64])
    numbers = [snapshot.number for snapshot in found]
    if numbers != sorted(set(numbers)) or volume.superblock.newest != max(numbers, default=0):
        raise Damaged("the snapshot table is not the superblock's")
    return found, places
