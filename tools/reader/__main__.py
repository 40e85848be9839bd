"""Reads sealed volumes and protected directories without any code of Postern.

    python3 tools/reader VOLUME... --key-file KEY [--content FILE] [--audit]
    python3 tools/reader DIRECTORY --key-file KEY [--content DIRECTORY]

Written from docs/FORMAT.md alone, so that the document stays sufficient for a second
implementation. Opens nothing for writing but `--content`. Prints a line of JSON for each volume.
Exit codes: 0 everything read, 1 some blocks are damaged (they are named), 2 refused (and why).
Needs the Python package `cryptography`; for passphrases `argon2-cffi`, or `cryptography` from 44.
"""

import argparse
import hashlib
import json
import os
import sys

import directory
import snapshots
import space
from header import KIND_KEY_FILE, KIND_PASSPHRASE
from sealing import BLOCK, Damaged, Refused, WrongKey, argon2id
from volume import Volume


def key_of(path):
    """The 32 bytes of a key file: as they are, or as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        data = file.read()
    if len(data) != 32:
        try:
            data = bytes.fromhex(data.decode("ascii"))
        except ValueError:
            data = b""
    if len(data) != 32:
        raise Refused(f"{path} is no key: 32 bytes, or 64 hexadecimal digits")
    return data


def content(volume, target):
    """Writes the file's content to `target` (if given); returns its SHA-256 and the damaged
    blocks as [first, count]. Damaged blocks are zeros in the content."""
    damaged, digest, at = [], hashlib.sha256(), 0
    out = open(target, "wb") if target else None

    def zeros(count):
        for step in range(0, count, 1 << 20):
            digest.update(bytes(min(1 << 20, count - step)))

    for block in volume.blocks():
        try:
            data = volume.block(block)
        except Damaged:
            if damaged and sum(damaged[-1]) == block:
                damaged[-1][1] += 1
            else:
                damaged.append([block, 1])
            continue
        if data is None:
            continue
        data = data[: volume.size - block * BLOCK]
        zeros(block * BLOCK - at)
        digest.update(data)
        at = block * BLOCK + len(data)
        if out:
            out.seek(block * BLOCK)
            out.write(data)
    zeros(volume.size - at)
    if out:
        out.truncate(volume.size)
        out.close()
    return digest.hexdigest(), damaged


def report(volume, target, audit):
    """What is to say of one volume."""
    superblock, tail = volume.superblock, volume.tail
    digest, damaged = content(volume, target)
    said = {
        "uuid": volume.header.uuid.hex(),
        "slot": volume.header.slot,
        "bytes": volume.size,
        "capacity": superblock.capacity * BLOCK,
        "generation": superblock.generation,
        "sessions": superblock.sessions,
        "clean": superblock.clean,
        "times": tail.times,
        "host_blocks": superblock.host_blocks,
        "ring_blocks": superblock.ring_blocks,
        "reserve_blocks": superblock.reserve_blocks,
        "homes": superblock.homes,
        "stride": superblock.stride,
        "map_levels": superblock.levels,
        "table_levels": superblock.table_levels,
        "epochs": sorted(superblock.epochs),
        "journal": {
            "first": tail.first,
            "last": tail.last,
            "certain": tail.certain,
            "entries": len(tail.entries),
            "skipped": tail.skipped,
        },
        "sha256": digest,
        "damaged": damaged,
    }
    said["snapshots"] = kept = []
    for snapshot in snapshots.table(volume)[0]:
        digest, bad = content(snapshot, None)
        entry = {"name": snapshot.name, "bytes": snapshot.size, "sha256": digest, "damaged": bad}
        kept.append(entry)
    if audit:
        said["space"] = space.audit(volume)
    return said


def read_volume(path, secret, target, audit, check=None):
    """The report on the volume in the host file `path`, if it passes the check."""
    with open(path, "rb") as file:
        return report(Volume(file, secret, check), target, audit)


def read_directory(path, secret, target, audit):
    """The reports on all files of the protected directory in the host directory `path`."""
    with open(os.path.join(path, "index"), "rb") as file:
        index = Volume(file, secret)
        names = directory.paths(index)
    said, damaged = {}, []
    for name, record in names.items():
        out = target and os.path.join(os.fsencode(target), name[1:])
        if out:
            os.makedirs(out if record.kind == directory.DIRECTORY else os.path.dirname(out), exist_ok=True)
        said[os.fsdecode(name)] = entry = {"inode": record.inode, "mode": record.mode}
        if record.kind == directory.FILE:
            keys = index.header.file_keys(record.id)
            file = os.path.join(path, record.id.hex())

            def check(volume, chain, state=record.state):
                return directory.check_state(volume, chain, state)

            for key in keys:
                try:
                    said_of_it = read_volume(file, (KIND_KEY_FILE, key), out, audit, check)
                    break
                except WrongKey:
                    if key is keys[-1]:
                        raise
            entry.update(said_of_it)
            damaged += entry["damaged"]
    return {"files": said, "damaged": damaged}


def main():
    words = argparse.ArgumentParser(prog="reader", description="Reads sealed volumes.")
    words.add_argument("--check", action="store_true", help="only say whether it can run here")
    words.add_argument("volume", nargs="*", help="host file of a volume, or host directory")
    secret = words.add_mutually_exclusive_group()
    secret.add_argument("--key-file", help="32 bytes, or 64 hexadecimal digits")
    secret.add_argument("--passphrase-file", help="the passphrase, without a line end")
    words.add_argument("--content", help="write the (last) content here")
    words.add_argument("--audit", action="store_true", help="compare the space map with the trees")
    given = words.parse_args()
    if given.check:
        argon2id(b"passphrase", bytes(16), 8, 1, 1)
        return 0
    if not given.volume or not (given.key_file or given.passphrase_file):
        words.error("a volume and a key file or a passphrase file are needed")
    if given.key_file:
        secret = (KIND_KEY_FILE, key_of(given.key_file))
    else:
        with open(given.passphrase_file, "rb") as file:
            secret = (KIND_PASSPHRASE, file.read())
    code = 0
    for path in given.volume:
        read = read_directory if os.path.isdir(path) else read_volume
        try:
            said = read(path, secret, given.content, given.audit)
        except (Refused, Damaged, OSError) as error:
            said = {"refused": str(error)}
        print(json.dumps(said))
        damaged = "damaged" in said and [said, *said.get("snapshots", [])]
        damaged = damaged and any(part["damaged"] for part in damaged)
        code = max(code, 2 if "refused" in said else 1 if damaged else 0)
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (Refused, OSError) as error:
        print(f"reader: {error}", file=sys.stderr)
        sys.exit(2)
