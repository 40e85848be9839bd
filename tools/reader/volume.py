"""Superblocks, map and data of a volume: docs/FORMAT.md, sections 4, 6 and 8.

Holds: every byte that `Volume.block` returns was authenticated along the whole way from the
superblock or from the journal; what does not authenticate raises `Damaged`.
"""

import header
import journal
from sealing import (
    BLOCK,
    KIND_DATA,
    KIND_NODE,
    ZERO_NONCE,
    COUNTER_BITS,
    Damaged,
    Refused,
    associated_data,
    nonce_of,
    number,
    unseal,
)

FANOUT = 128
TABLE_FANOUT = 127
SUPERBLOCKS = ((16, 48), (32, 64))
FEATURE_SNAPSHOTS = 1
MAX_BIRTH = 1 << 24


def signed(data, offset):
    """A signed number of 8 bytes."""
    return int.from_bytes(data[offset : offset + 8], "little", signed=True)


class Pointer:
    """A block pointer: place, birth, order, tag. False if it points to nothing."""

    def __init__(self, data):
        self.word = number(data, 0, 8)
        self.place = self.word & ((1 << 40) - 1)
        self.birth = self.word >> 40
        self.order = number(data, 8, 8)
        self.tag = bytes(data[16:32])

    def __bool__(self):
        return bool(self.word or self.order)


class Superblock:
    """An authentic superblock; the fields are those of the document."""

    def __init__(self, data, slot, raw):
        def at(offset, size=8):
            return number(data, offset, size)

        self.slot, self.raw = slot, raw
        self.version, self.features = at(48, 4), at(52, 4)
        if self.version not in (1, 2):
            raise Refused(f"version {self.version} of the superblock is unknown")
        if self.features & ~FEATURE_SNAPSHOTS:
            raise Refused(f"features {self.features:#x} of the superblock are unknown")
        self.generation = at(64)
        self.clean = bool(at(76, 4) & 1)
        self.sessions, self.size, self.size_order, self.capacity = at(80), at(88), at(96), at(104)
        self.host_blocks = at(112)
        self.ring, self.ring_blocks = at(120), at(128)
        self.reserve, self.reserve_blocks = at(136), at(144)
        self.homes, self.stride = at(152), at(160)
        self.root, self.levels, self.table_levels = Pointer(data[176:208]), at(208, 4), at(212, 4)
        self.cut = at(216)
        self.space, self.table = Pointer(data[224:256]), Pointer(data[256:288])
        self.snapshots, self.newest = Pointer(data[288:320]), at(328, 4)
        self.birth = at(400, 4)
        self.replay, self.before = at(368), bytes(data[376:392])
        self.durable = at(392)
        flags = at(448)
        self.bound = bool(flags & 1)
        self.records = [
            bytes(data[place:][:40]) if flags & bit else None for place, bit in ((408, 2), (4056, 4))
        ]
        self.times = [signed(data, 464 + 8 * n) for n in range(3)]
        self.epochs = {}
        for index in range(min(at(404, 4), 32)):
            entry = data[640 + 32 * index :][:32]
            self.epochs[number(entry, 24, 4)] = (bytes(entry[:24]), number(entry, 28, 2))
        self._bound(at(72, 4))

    def _bound(self, written_to):
        levels = 1
        while FANOUT**levels < self.capacity:
            levels += 1
        sound = (
            written_to == self.slot
            and self.ring == 512
            and 64 <= self.ring_blocks <= 32256
            and self.reserve == self.ring + self.ring_blocks
            and self.homes == self.reserve + self.reserve_blocks
            and 128 <= self.stride <= 256
            and self.homes < self.host_blocks
            and self.size <= self.capacity * BLOCK
            and self.levels == levels
            and bool(self.snapshots) == bool(self.newest) == bool(self.features & FEATURE_SNAPSHOTS)
            and self.newest < MAX_BIRTH
            and self.birth < MAX_BIRTH
        )
        if not sound:
            raise Refused("the superblock has impossible numbers")


class Volume:
    """A volume opened for reading, its journal replayed in memory."""

    def __init__(self, file, secret, check=None):
        """`file`: open for reading in binary. `secret`: (slot kind, key or passphrase). `check`
        refuses what is not the newest state, or says up to which journal block it vouches."""
        self.file, self.check = file, check
        self.header = header.read(file, secret)
        self.keys = {}
        self.nodes = {}
        self.superblock = self._superblock()
        self.salts = dict(self.superblock.epochs)
        file.seek(0, 2)
        if file.tell() < self.superblock.host_blocks * BLOCK:
            raise Refused("the host file is shorter than recorded")
        self.tail = journal.replay(self)
        self.size = self.tail.size

    def place(self, place):
        """The block of the host file at `place`."""
        self.file.seek(place * BLOCK)
        return self.file.read(BLOCK)

    def _superblock(self):
        found = []
        for slot, places in enumerate(SUPERBLOCKS):
            for place in places:
                block = self.place(place)
                if block[40:48] != b"PSTRNSUP":
                    continue
                associated = block[40:64] + bytes([slot]) + bytes(7)
                for version in self.header.versions():
                    key = self.header.superblock_key(block[:24], version)
                    try:
                        body = unseal(key, ZERO_NONCE, block[64:], block[24:40], associated, "")
                    except Damaged:
                        continue
                    found.append(Superblock(block[:64] + body, slot, block))
        if not found:
            raise Refused("no authentic superblock")
        return max(found, key=lambda superblock: superblock.generation)

    def epoch_key(self, epoch):
        """The key of an epoch, by the epoch list, the journal or the table."""
        if epoch not in self.keys:
            salt, version = self.salts.get(epoch) or self._salt_in_table(epoch)
            self.keys[epoch] = self.header.epoch_key(epoch, salt, version)
        return self.keys[epoch]

    def _salt_in_table(self, epoch):
        pointer = self.superblock.table
        for level in reversed(range(self.superblock.table_levels)):
            if not pointer:
                break
            index = epoch // TABLE_FANOUT ** (level + 1)
            node = self.table_node(pointer, level, index)
            if node is None:
                raise Damaged(f"epoch table, level {level}, node {index}")
            entry = node[32 + 32 * (epoch // TABLE_FANOUT**level % TABLE_FANOUT) :][:32]
            if level == 0 and number(entry, 24, 4) == epoch:
                self.salts[epoch] = (bytes(entry[:24]), number(entry, 28, 2))
                return self.salts[epoch]
            pointer = Pointer(entry)
        raise Damaged(f"epoch {epoch} has no salt")

    def table_node(self, pointer, level, index):
        """A node of the epoch table, or nothing if it is damaged."""
        block = self.place(pointer.place)
        associated = associated_data(5, level, index)
        for version in self.header.versions():
            key = self.header.table_key(block[:24], version)
            try:
                return block[:32] + unseal(key, ZERO_NONCE, block[32:], pointer.tag, associated, "")
            except Damaged:
                continue
        return None

    def open(self, pointer, kind, level, index, what):
        """Reads and opens the block that `pointer` names."""
        if not 0 < pointer.place < self.superblock.host_blocks:
            raise Damaged(what)
        key = self.epoch_key(pointer.order >> COUNTER_BITS)
        return unseal(
            key,
            nonce_of(kind, pointer.order),
            self.place(pointer.place),
            pointer.tag,
            associated_data(kind, level, index),
            what,
        )

    def node(self, pointer, level, index):
        """The map's node of this level and index."""
        name = (level, index, pointer.place, pointer.order)
        if name not in self.nodes:
            what = f"map node, level {level}, index {index}"
            try:
                self.nodes[name] = self.open(pointer, KIND_NODE, level, index, what)
            except Damaged as damage:
                self.nodes[name] = damage
        if isinstance(self.nodes[name], Damaged):
            raise self.nodes[name]
        return self.nodes[name]

    def mapped(self, block, root=None, levels=None):
        """The pointer of a block of the file in the map, or in another one of these levels."""
        if root is None:
            root, levels = self.superblock.root, self.superblock.levels
        pointer = root
        for level in reversed(range(levels)):
            if not pointer:
                return pointer
            node = self.node(pointer, level, block // FANOUT ** (level + 1))
            pointer = Pointer(node[32 * (block // FANOUT**level % FANOUT) :][:32])
        return pointer

    def pointer(self, block):
        """The pointer of a block of the file, journal and map together; a false one is a hole."""
        entry = self.tail.entries.get(block)
        if entry is None:
            hole = self.tail.hole_order(block)
            if hole is None:
                return self.mapped(block)
            entry = journal.Entry(hole, Pointer(bytes(32)), False)
        if entry.order >= self.superblock.cut or entry.newer:
            return entry.pointer
        old = self.mapped(block)
        return old if old and old.order > entry.order else entry.pointer

    def block(self, block):
        """The content of a block of the file; `None` is a hole."""
        pointer = self.pointer(block)
        if not pointer:
            return None
        return self.data(pointer, block)

    def data(self, pointer, block):
        """What `pointer` names, as this block of the file."""
        return self.open(pointer, KIND_DATA, 0, block, f"block {block}")

    def blocks(self):
        """The numbers of all blocks of the file that may hold something, upwards. Below a damaged
        map node these are all: `block` tells of each what it is."""
        end = -(-self.size // BLOCK)
        found = self.mapped_blocks(self.superblock.root, self.superblock.levels, end)
        return sorted(block for block in found | set(self.tail.entries) if block < end)

    def mapped_blocks(self, root, levels, end):
        """The numbers of blocks below `end` that a map has."""
        found = set()

        def walk(pointer, level, index):
            try:
                node = self.node(pointer, level, index)
            except Damaged:
                span = FANOUT ** (level + 1)
                found.update(range(index * span, min((index + 1) * span, end)))
                return
            for entry in range(FANOUT):
                child = Pointer(node[32 * entry :][:32])
                if child and level:
                    walk(child, level - 1, index * FANOUT + entry)
                elif child:
                    found.add(index * FANOUT + entry)

        if root:
            walk(root, levels - 1, 0)
        return found
