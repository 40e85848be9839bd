"""Protected directories: docs/FORMAT.md, section 9.

Holds: a name is believed only from a whole image in an authentic index.
"""

import hashlib

from sealing import BLOCK, Damaged, Refused, number

SLOT = 1 << 24
HEAD = 72
FILE, DIRECTORY, RECORDED = 2, 1, 3


class Record:
    """One file or directory."""

    def __init__(self, data):
        self.inode, self.parent = number(data, 0, 8), number(data, 8, 8)
        self.id = bytes(data[16:32])
        self.owner, self.group = number(data, 32, 4), number(data, 36, 4)
        self.times = tuple(int.from_bytes(data[at : at + 8], "little", signed=True) for at in (40, 48, 56))
        self.mode, self.kind = number(data, 64, 2), data[66]
        self.name = bytes(data[68 : 68 + data[67]])
        self.length = 68 + len(self.name)
        self.state = None
        if self.kind == RECORDED:
            self.kind, self.state = FILE, bytes(data[self.length : self.length + 40])
            self.length += 40


def _image(index, slot):
    """(sequence number, records' bytes, number of records) of a slot; `None` if never written."""

    def read(first, length):
        out = bytearray()
        for block in range(first // BLOCK, -(-(first + length) // BLOCK)):
            out += index.block(block) or bytes(BLOCK)
        return bytes(out[first % BLOCK :][:length])

    start = slot * SLOT
    head = read(start, HEAD)
    if not any(head):
        return None
    count, length = number(head, 24, 8), number(head, 32, 8)
    if head[:8] != b"PSTNDIR1" or length > SLOT - HEAD:
        raise Damaged("image")
    body = read(start + HEAD, length)
    whole = head[:40] + bytes(32) + body
    if hashlib.sha256(whole).digest() != head[40:72]:
        raise Damaged("image")
    return number(head, 8, 8), body, count


def paths(index):
    """Path (bytes) → record, of all that the index names."""
    images, damaged = [], 0
    for slot in (0, 1):
        try:
            image = _image(index, slot)
        except Damaged:
            damaged += 1
            continue
        if image is not None:
            images.append(image)
    if not images:
        if damaged == 2:
            raise Refused("no image of the name table is whole")
        return {}
    _, body, count = max(images)
    known, found, at = {}, {}, 0
    for _ in range(count):
        record = Record(body[at:])
        at += record.length
        if record.inode == 1:
            known[1] = b""
            continue
        path = known[record.parent] + b"/" + record.name
        known[record.inode] = path
        found[path] = record
    if at != len(body):
        raise Refused("the name table has impossible records")
    return found


def check_state(volume, chain, state):
    """The journal block up to which the recorded state vouches for a file's volume. Raises
    `Refused` unless the volume is in that state, or in a newer one."""
    superblock = volume.superblock
    bound, known = superblock.bound, superblock.records
    base = superblock.replay - 1
    if state is None and (not bound or known[0] is None):
        return base
    if state is not None and bound:
        if state in known:
            return base
        name = hashlib.sha256(superblock.raw).digest()
        for seq, tag in [(base, superblock.before)] + [(block.seq, block.tag) for block in chain]:
            point = volume.header.uuid + name + seq.to_bytes(8, "little") + tag + bytes(8)
            if hashlib.sha256(b"postern/1 point\0" + point).digest() == state[8:]:
                return seq
    raise Refused("this is not the state of the file that the index records")
