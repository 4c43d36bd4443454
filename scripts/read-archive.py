#!/usr/bin/env python3
"""Reads an archive of pgkeep in a local directory without pgkeep: docs/format.md as a program.

    scripts/read-archive.py DIRECTORY list
    scripts/read-archive.py DIRECTORY file BACKUP PATH > FILE
    scripts/read-archive.py DIRECTORY wal SEGMENT > FILE

DIRECTORY is the site's: the storage directory with the site's prefix. Needs Python 3.10 and the command line
tool `zstd`. Checks CRC-32C and lengths; BLAKE3 digests, too, where the Python package `blake3` is installed.
Does not read objects compressed with snappy.
"""

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

try:
    from blake3 import blake3
except ImportError:
    blake3 = None

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
SNAPPY_START = b"\xff\x06\x00\x00sNaPpY"


def fail(why):
    sys.exit(f"read-archive: {why}")


def check(holds, why):
    if not holds:
        fail(why)


def unzstd(stored):
    done = subprocess.run(["zstd", "-d", "-c", "-q"], input=stored, stdout=subprocess.PIPE)
    check(done.returncode == 0, "zstd refuses the data")
    return done.stdout


def check_digest(data, digest, what):
    if blake3 is not None and digest is not None:
        check(blake3(data).hexdigest() == digest, f"{what} has another digest")


def crc32c_table():
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        yield value


TABLE = list(crc32c_table())


def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def read_object(site, key):
    """An object's plaintext, or None when there is none of that name."""
    try:
        stored = (site / key).read_bytes()
    except FileNotFoundError:
        return None
    try:
        metadata = json.loads((site / f"{key}.metadata").read_text())
    except FileNotFoundError:
        metadata = {}
    metadata = {name.lower().replace("_", "-"): value for name, value in metadata.items()}
    check(not metadata.get("encryption-key-id"), f"{key} is encrypted")
    compression = metadata.get("compression-algorithm")
    if not metadata:
        compression = "zstd" if stored.startswith(ZSTD_MAGIC) else None
        check(not stored.startswith(SNAPPY_START), f"{key} is compressed with snappy")
    check(compression in (None, "zstd"), f"{key} is compressed with {compression}")
    data = unzstd(stored) if compression else stored
    if "original-file-size" in metadata:
        check(len(data) == int(metadata["original-file-size"]), f"{key} has another length")
    check_digest(data, metadata.get("pgkeep-blake3"), key)
    return data


def list_backups(site):
    for record in sorted(site.glob("backup/*/record")):
        backup = json.loads(read_object(site, f"backup/{record.parent.name}/record"))
        check(backup["format"] == 1, f"{record} has format {backup['format']}")
        print(backup["name"], backup["timeline"], backup["start_lsn"], backup["stop_lsn"],
              backup["plaintext_bytes"], backup["file_count"])


def entries(site, name):
    record = json.loads(read_object(site, f"backup/{name}/record") or fail(f"no backup {name}"))
    text = read_object(site, f"backup/{name}/files")
    check(len(text) == record["files"]["plaintext_length"], "the file list has another length")
    check_digest(text, record["files"]["digest"], "the file list")
    head, *lines, end = map(json.loads, text.splitlines())
    check(head == {"format": 1, "backup": name}, "this is another file list")
    check(end == {"end": True, "entries": len(lines)}, "the file list is cut")
    return lines


def read_extent(site, name, extent):
    pack, offset, stored_length, raw_length, compression, digest, *part = extent
    backup, number = (name, pack) if isinstance(pack, int) else pack.split("/")
    with open(site / f"backup/{backup}/pack/{int(number):06}", "rb") as file:
        file.seek(offset)
        stored = file.read(stored_length)
    check(len(stored) == stored_length, "a pack is cut")
    check(compression in ("none", "zstd"), f"a frame is compressed with {compression}")
    raw = unzstd(stored) if compression == "zstd" else stored
    check(len(raw) == raw_length, "a frame has another length")
    check_digest(raw, digest, "a frame")
    skip, take = part or (0, raw_length)
    return raw[skip:skip + take]


def read_file(site, name, path):
    entry = next((entry for entry in entries(site, name) if entry.get("path") == path), None)
    check(entry and entry["type"] == "file", f"no file {path}")
    data = b"".join(read_extent(site, name, extent) for extent in entry["extents"])
    check(len(data) == entry["size"], f"{path} has another length")
    check(crc32c(data) == int(entry["crc32c"], 16), f"{path} has another CRC-32C")
    return data


def read_wal(site, segment):
    whole = read_object(site, f"xlog/{segment}")
    if whole is not None:
        return whole
    joined = b""
    pieces = (re.fullmatch(r"([0-9A-F]{8})-([0-9A-F]{8})", file.name)
              for file in site.glob(f"xlog_partial/{segment}/*"))
    for start, end in sorted((int(piece[1], 16), int(piece[2], 16)) for piece in pieces if piece):
        if start <= len(joined) < end:
            piece = read_object(site, f"xlog_partial/{segment}/{start:08X}-{end:08X}")
            check(piece is not None and len(piece) == end - start, "a piece is gone or cut; run this again")
            joined += piece[len(joined) - start:]
    check(joined, f"no segment {segment}")
    # The long header of the segment's first page says how large a segment is.
    segment_size, = struct.unpack_from("=I", joined, 32)
    return joined.ljust(segment_size, b"\0")


def main(arguments):
    match arguments:
        case [site, "list"]:
            list_backups(Path(site))
        case [site, "file", backup, path]:
            sys.stdout.buffer.write(read_file(Path(site), backup, path))
        case [site, "wal", segment]:
            sys.stdout.buffer.write(read_wal(Path(site), segment))
        case _:
            sys.exit(__doc__)


main(sys.argv[1:])
