"""The journal and its replay: docs/FORMAT.md, section 5.

Holds: nothing is written; the decisions of a replay live in memory only.
"""

from sealing import (
    BLOCK,
    COUNTER_BITS,
    KIND_DATA,
    KIND_JOURNAL,
    Damaged,
    Refused,
    nonce_of,
    number,
    unseal,
)

HEAD = 128
MAP, EXTENT, ZERO, SIZE, VOID = 1, 2, 3, 4, 5


class Entry:
    """What the journal says of one block: its order, its pointer, and the "newer" bit."""

    def __init__(self, order, pointer, newer):
        self.order, self.pointer, self.newer = order, pointer, newer


class Tail:
    """The outcome of a replay."""

    def __init__(self):
        self.entries = {}
        self.holes = []
        self.size = 0
        self.first = self.last = self.certain = 0
        self.skipped = 0

    def hole_order(self, block):
        """The highest order of a ZERO over `block`, if there is one."""
        orders = [order for first, count, order in self.holes if first <= block < first + count]
        return max(orders, default=None)


class Jblock:
    """An authentic journal block."""

    def __init__(self, block, payload, version):
        self.version = version
        self.seq, self.durable, self.generation = (number(block, at, 8) for at in (16, 24, 32))
        self.epoch, self.used = number(block, 40, 4), number(block, 44, 4)
        self.salt, self.before, self.tag = (
            bytes(block[56:80]),
            bytes(block[80:96]),
            bytes(block[112:128]),
        )
        self.payload = payload
        told = int.from_bytes(payload[-8:], "little", signed=True)
        self.modified = told if self.used <= len(payload) - 8 else 0

    def records(self):
        """(type, count, block, bit 40 of the first word, the record's bytes), in order."""
        at, end = 0, min(self.used, len(self.payload))
        while at + 40 <= end:
            word = number(self.payload, at, 8)
            kind, count, block = word >> 56, (word >> 40) & 0xFFFF, word & ((1 << 40) - 1)
            length = 24 + 16 * count if kind == EXTENT else 40
            if kind not in (MAP, EXTENT, ZERO, SIZE, VOID) or at + length > end or block >= 1 << 34:
                return
            yield kind, count, word & ((1 << 40) - 1), self.payload[at : at + length]
            at += length


def _read(volume):
    superblock, found, unreadable = volume.superblock, {}, set()
    for index in range(superblock.ring_blocks):
        try:
            block = volume.place(superblock.ring + index)
        except OSError:
            unreadable.add(index)
            continue
        seq = number(block, 16, 8)
        if (
            block[:8] != b"PSTNJRN1"
            or block[8:16] != volume.header.uuid[:8]
            or seq < superblock.replay
            or seq % superblock.ring_blocks != index
        ):
            continue
        epoch, counter = number(block, 40, 4), number(block, 48, 8)
        nonce = nonce_of(KIND_JOURNAL, epoch << COUNTER_BITS | counter)
        for version in volume.header.versions():
            key = volume.header.epoch_key(epoch, bytes(block[56:80]), version)
            try:
                payload = unseal(key, nonce, block[HEAD:BLOCK], block[112:128], block[:112], "")
            except Damaged:
                continue
            found[seq] = Jblock(block, payload, version)
            break
    return found, unreadable


def _chain(volume, found):
    chain, tag, seq = [], volume.superblock.before, volume.superblock.replay
    while seq in found and found[seq].before == tag:
        chain.append(found[seq])
        tag, seq = found[seq].tag, seq + 1
    return chain


def replay(volume):
    """Reads the ring and decides what each record means. Raises `Refused` where the evidence
    says that this is damage or rollback and no crash."""
    from volume import Pointer

    superblock, tail = volume.superblock, Tail()
    found, unreadable = _read(volume)
    chain = _chain(volume, found)
    tail.first = superblock.replay
    tail.last = superblock.replay + len(chain) - 1
    tail.certain = max([superblock.durable] + [block.durable for block in found.values()])
    newest = max([superblock.generation] + [block.generation for block in found.values()])
    if volume.check:
        tail.certain = max(tail.certain, volume.check(volume, chain))
    if tail.last < tail.certain:
        raise Refused(f"the journal ends at {tail.last}, but {tail.certain} was durable")
    if newest > superblock.generation:
        raise Refused(f"generation {newest} was durable, found {superblock.generation}")
    if (tail.last + 1) % superblock.ring_blocks in unreadable:
        raise Refused("the host fails to read the place where the journal ends")
    for block in chain:
        volume.salts.setdefault(block.epoch, (block.salt, block.version))

    tail.times = list(superblock.times)
    told = [block.modified for block in chain if block.modified]
    if told and told[-1] != tail.times[1]:
        tail.times[1:] = told[-1], max(tail.times[2], told[-1])
    versions, voids, sizes = {}, [], [(superblock.size_order, superblock.size)]
    for jblock in chain:
        for kind, count, block, record in jblock.records():
            if kind == MAP:
                pointer = Pointer(record[8:40])
                entry = (pointer.order, jblock.seq, Entry(pointer.order, pointer, bool(count & 1)))
                versions.setdefault(block, []).append(entry)
            elif kind == EXTENT:
                word, order = number(record, 8, 8), number(record, 16, 8)
                for step in range(count):
                    data = (word + step).to_bytes(8, "little")
                    data += (order + step).to_bytes(8, "little")
                    data += record[24 + 16 * step :][:16]
                    pointer = Pointer(data)
                    entry = (order + step, jblock.seq, Entry(order + step, pointer, False))
                    versions.setdefault(block + step, []).append(entry)
            elif kind == ZERO:
                tail.holes.append((block, number(record, 8, 8), number(record, 16, 8)))
            elif kind == SIZE:
                sizes.append((number(record, 16, 8), number(record, 8, 8)))
            elif kind == VOID:
                voids.append((number(record, 16, 8), number(record, 8, 8)))
    tail.size = max(sizes)[1]
    if tail.size > superblock.capacity * BLOCK:
        raise Refused("the journal has an impossible size")
    _settle(volume, tail, versions, voids)
    return tail


def _settle(volume, tail, versions, voids):
    """For each block the version that counts."""
    from volume import Pointer

    for block, candidates in versions.items():
        # Stable: of equal orders the later one stands behind.
        candidates.sort(key=lambda candidate: candidate[0])
        hole = tail.hole_order(block)
        for order, seq, entry in reversed(candidates):
            if any(first <= order < first + count for first, count in voids):
                continue
            if hole is not None and hole > order:
                tail.entries[block] = Entry(hole, Pointer(bytes(32)), False)
                break
            if seq > tail.certain:
                try:
                    volume.open(entry.pointer, KIND_DATA, 0, block, "")
                except Damaged:
                    tail.skipped += 1
                    continue
            tail.entries[block] = entry
            break
