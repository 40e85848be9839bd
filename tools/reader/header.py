"""The static header with its key slots and keyring: docs/FORMAT.md, section 3.

Holds: no number of the header is believed before the master's MAC was checked, except those that
the key slots need; these are bounded first.
"""

import hashlib
import hmac

from sealing import (
    BLOCK,
    CIPHER,
    ZERO_NONCE,
    Damaged,
    Refused,
    argon2id,
    derive,
    mac,
    number,
    unseal,
)

BYTES = 8 * BLOCK
SLOTS, SLOT_BYTES = 8, 512
KIND_KEY_FILE, KIND_PASSPHRASE = 1, 2


class Header:
    """An authentic header: `uuid`, `master`, the volume keys, and what they derive."""

    def __init__(self, data, master, slot):
        self.master = master
        self.slot = slot
        self.generation = number(data, 16, 8)
        self.uuid = bytes(data[48:64])
        self.keys, self.current = self._keyring(data[8192:12288])

    def _keyring(self, block):
        salt, tag = block[:24], block[24:40]
        key = derive(self.master, salt, b"keyring", self.uuid)
        try:
            opened = unseal(key, ZERO_NONCE, block[64:], tag, self.uuid, "keyring")
        except Damaged:
            raise Refused("the keyring is damaged") from None
        keys = {}
        for at in range(64, 64 + 64 * number(opened, 0, 4), 64):
            keys[number(opened, at, 4)] = opened[at + 8 : at + 40]
        return keys, number(opened, 4, 4)

    def volume_key(self):
        """The current volume key."""
        return self.keys[self.current]

    def superblock_key(self, salt):
        """The key of the superblock with this salt."""
        return derive(self.volume_key(), salt, b"superblock", self.uuid, CIPHER)

    def table_key(self, salt):
        """The key of the epoch table's node with this salt."""
        return derive(self.volume_key(), salt, b"epoch table", self.uuid, CIPHER)

    def snapshot_key(self, salt):
        """The key of the snapshot table's block with this salt."""
        return derive(self.volume_key(), salt, b"snapshot table", self.uuid, CIPHER)

    def epoch_key(self, epoch, salt):
        """The key of an epoch."""
        return derive(
            self.volume_key(), salt, b"epoch", self.uuid, epoch.to_bytes(4, "little"), CIPHER
        )

    def file_key(self, file_id):
        """The key of a file's volume, if this is the header of a directory's index."""
        secret = derive(self.master, b"", b"derivation", self.uuid)
        return derive(secret, file_id, b"directory file")


def read(file, secret):
    """The newest intact copy that `secret` opens. `secret`: (slot kind, bytes)."""
    copies = []
    for at in (0, BYTES):
        file.seek(at)
        data = file.read(BYTES)
        if len(data) < BYTES or data[:8] != b"POSTERNV":
            continue
        if number(data, 8, 4) != 1:
            raise Refused(f"version {number(data, 8, 4)} of the format is unknown")
        if number(data, 40, 8) != 0:
            raise Refused(f"features {number(data, 40, 8):#x} are unknown")
        if hashlib.sha256(data[:32704]).digest() == data[32704:32736]:
            copies.append(data)
    if not copies:
        raise Refused("no intact header")
    copies.sort(key=lambda data: number(data, 16, 8), reverse=True)
    for data in copies:
        found = _unlock(data, secret)
        if found is None:
            continue
        master, slot = found
        key = derive(master, b"", b"header", bytes(data[48:64]))
        if not hmac.compare_digest(mac(key, data[:32736]), data[32736:32768]):
            continue
        if (number(data, 64, 4), number(data, 68, 4), number(data, 72, 4)) != (1, BLOCK, 1):
            raise Refused("cipher, block size or segments are unknown")
        return Header(data, master, slot)
    raise Refused("the key opens no slot")


def _unlock(data, secret):
    kind, given = secret
    uuid = bytes(data[48:64])
    for index in range(SLOTS):
        slot = data[BLOCK + index * SLOT_BYTES :][:SLOT_BYTES]
        if slot[0] != 1 or slot[1] != kind:
            continue
        salt = slot[32:64]
        user = given
        if kind == KIND_PASSPHRASE:
            memory, passes, lanes = (number(slot, at, 4) for at in (4, 8, 12))
            if not (1 <= lanes <= 16 and 1 <= passes <= 64 and 8 * lanes <= memory <= 1 << 20):
                continue
            user = argon2id(given, salt, memory, passes, lanes)
        commitment = mac(derive(user, salt, b"slot commitment", uuid), slot[:112])
        if not hmac.compare_digest(commitment, slot[112:144]):
            continue
        kek = derive(user, salt, b"slot kek", uuid)
        try:
            return unseal(kek, ZERO_NONCE, slot[64:96], slot[96:112], slot[:64] + uuid, ""), index
        except Damaged:
            continue
    return None
