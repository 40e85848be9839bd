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
    WrongKey,
    argon2id,
    derive,
    mac,
    number,
    unseal,
)

BYTES = 8 * BLOCK
SLOTS, SLOT_BYTES = 8, 512
KIND_KEY_FILE, KIND_PASSPHRASE = 1, 2
# States of an entry of the keyring.
KEY, RETIRING, DERIVATION = 0, 1, 2
FEATURE_REKEY = 1 << 8


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
        keys, current = {}, number(opened, 4, 4)
        self.former = None
        for at in range(64, 64 + 64 * number(opened, 0, 4), 64):
            version, state, secret = number(opened, at, 4), number(opened, at + 4, 4), opened[at + 8 : at + 40]
            if state in (KEY, RETIRING):
                keys[version] = secret
            elif state == DERIVATION:
                self.former = secret
        if current not in keys:
            raise Refused("the keyring has no volume key")
        return keys, current

    def versions(self):
        """The versions of the volume keys in use, the one that seals first."""
        return [self.current] + [version for version in self.keys if version != self.current]

    def superblock_key(self, salt, version):
        """The key of the superblock with this salt."""
        return derive(self.keys[version], salt, b"superblock", self.uuid, CIPHER)

    def table_key(self, salt, version):
        """The key of the epoch table's node with this salt."""
        return derive(self.keys[version], salt, b"epoch table", self.uuid, CIPHER)

    def snapshot_key(self, salt):
        """The key of the snapshot table's block with this salt; there is none during a rekey."""
        return derive(self.keys[self.current], salt, b"snapshot table", self.uuid, CIPHER)

    def epoch_key(self, epoch, salt, version):
        """The key of an epoch."""
        if version not in self.keys:
            raise Damaged(f"epoch {epoch} is of a key that is gone")
        return derive(self.keys[version], salt, b"epoch", self.uuid, epoch.to_bytes(4, "little"), CIPHER)

    def file_keys(self, file_id):
        """What opens a file's volume, if this is the header of a directory's index: its key, and
        during a rekey of the directory the one before."""
        secrets = [derive(self.master, b"", b"derivation", self.uuid)]
        secrets += [self.former] if self.former else []
        return [derive(secret, file_id, b"directory file") for secret in secrets]


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
        if number(data, 40, 8) & ~FEATURE_REKEY:
            raise Refused(f"features {number(data, 40, 8):#x} are unknown")
        if hashlib.sha256(data[:32704]).digest() == data[32704:32736]:
            copies.append(data)
    if not copies:
        raise Refused("no intact header")
    copies.sort(key=lambda data: number(data, 16, 8), reverse=True)
    for data in copies:
        found = _unlock(data, secret)
        if found is None:
            # Not the older copy instead: a change of the keys has happened.
            break
        master, slot = found
        key = derive(master, b"", b"header", bytes(data[48:64]))
        if not hmac.compare_digest(mac(key, data[:32736]), data[32736:32768]):
            continue
        if (number(data, 64, 4), number(data, 68, 4), number(data, 72, 4)) != (1, BLOCK, 1):
            raise Refused("cipher, block size or segments are unknown")
        return Header(data, master, slot)
    raise WrongKey("the key opens no slot")


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
