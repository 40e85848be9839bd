"""Keys and sealed messages: docs/FORMAT.md, section 2.

Holds: a message that was altered is never returned; `unseal` raises `Damaged` instead.
"""

import hashlib
import hmac

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

BLOCK = 4096
ZERO_NONCE = bytes(12)
CIPHER = (1).to_bytes(4, "little")
KIND_DATA, KIND_NODE, KIND_SPACE, KIND_JOURNAL = 1, 2, 3, 4
COUNTER_BITS = 36


class Refused(Exception):
    """The volume cannot be opened: wrong key, unknown version, or damage."""


class WrongKey(Refused):
    """No slot of the header opens with the key."""


class Damaged(Exception):
    """A sealed message does not authenticate."""


def number(data, at, size):
    """The unsigned little-endian number of `size` bytes at `at`."""
    return int.from_bytes(data[at : at + size], "little")


def derive(secret, salt, label, *context):
    """HKDF-SHA256 with 32 bytes of output; the info is the label and what follows it."""
    info = b"postern/1 " + label + b"".join(context)
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=info).derive(secret)


def mac(key, data):
    """HMAC-SHA256."""
    return hmac.new(key, data, hashlib.sha256).digest()


def unseal(key, nonce, sealed, tag, associated, what):
    """Opens a message of AES-256-GCM; raises `Damaged` naming `what`."""
    try:
        return AESGCM(key).decrypt(nonce, bytes(sealed) + bytes(tag), bytes(associated))
    except InvalidTag:
        raise Damaged(what) from None


def nonce_of(kind, order):
    """The nonce of the message that `order` (epoch and counter) stands for."""
    epoch, counter = order >> COUNTER_BITS, order & ((1 << COUNTER_BITS) - 1)
    return bytes([kind]) + epoch.to_bytes(4, "little") + counter.to_bytes(7, "little")


def associated_data(kind, level, index):
    """Associated data of a block in a tree."""
    return bytes([kind, level]) + bytes(6) + index.to_bytes(8, "little")


def argon2id(passphrase, salt, memory_kib, passes, lanes):
    """Argon2id, version 0x13, 32 bytes; from whichever of two packages is there."""
    try:
        from argon2.low_level import Type, hash_secret_raw

        return hash_secret_raw(
            passphrase, salt, passes, memory_kib, lanes, 32, Type.ID, version=0x13
        )
    except ImportError:
        from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

        return Argon2id(
            salt=salt, length=32, iterations=passes, lanes=lanes, memory_cost=memory_kib
        ).derive(passphrase)
