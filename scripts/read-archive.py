#!/usr/bin/env python3
"""Reads an archive of pgkeep in a local directory without pgkeep: docs/format.md as a program.

    scripts/read-archive.py DIRECTORY list
    scripts/read-archive.py DIRECTORY file BACKUP PATH > FILE
    scripts/read-archive.py DIRECTORY wal SEGMENT > FILE

DIRECTORY is the site's: the storage directory with the site's prefix. Needs Python 3.10 and the command line
tool `zstd`. Checks CRC-32C and lengths; BLAKE3 digests, too, where the Python package `blake3` is installed.
Does not read objects compressed with snappy. Of an encrypted archive it needs the private key, in the file that
the environment variable PRIVATE_KEY names, and the Python package `cryptography`.
"""

import base64
import hmac
import json
import lzma
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

try:
    from blake3 import blake3
except ImportError:
    blake3 = None

try:
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import padding
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError:
    serialization = None

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


def decompress(data, compression):
    check(compression in (None, "none", "zstd", "lzma"), f"data is compressed with {compression}")
    if compression == "zstd":
        return unzstd(data)
    return lzma.decompress(data) if compression == "lzma" else data


def unwrap(wrapped, algorithm, label=None):
    """The secret that is wrapped for the private key."""
    check(serialization and "PRIVATE_KEY" in os.environ, "this is encrypted: see above for what that needs")
    key = serialization.load_pem_private_key(Path(os.environ["PRIVATE_KEY"]).read_bytes(), password=None)
    return key.decrypt(wrapped, padding.OAEP(mgf=padding.MGF1(algorithm), algorithm=algorithm, label=label))


def open_envelope(stored):
    """The content of a PGHoard envelope."""
    if not stored:
        return stored
    check(stored[:6] == b"pghoa1", "this is no envelope")
    length = int.from_bytes(stored[6:8], "big")
    wrapped, content, code = stored[8:8 + length], stored[8 + length:-32], stored[-32:]
    secrets = unwrap(wrapped, hashes.SHA1())
    check(hmac.digest(secrets[32:], content, "sha256") == code, "the authentication code does not match")
    return Cipher(algorithms.AES(secrets[:16]), modes.CTR(secrets[16:32])).decryptor().update(content)


class BackupKey:
    """The keys that an encrypted backup was sealed with."""

    def __init__(self, backup, wrapped):
        self.context = f"pgkeep backup {backup}".encode()
        self.secret = unwrap(base64.b64decode(wrapped), hashes.SHA256(), self.context)

    def derive(self, purpose):
        return HKDF(hashes.SHA256(), 32, salt=b"pgkeep backup", info=purpose).derive(self.secret)

    def open_frame(self, pack, offset, sealed):
        nonce = pack.to_bytes(4, "big") + offset.to_bytes(8, "big")
        return AESGCM(self.derive(b"frames")).decrypt(nonce, sealed, self.context)

    def open_list(self, sealed):
        content, number, is_last, at = b"", 0, 0, 0
        while not is_last:
            head, = struct.unpack_from(">I", sealed, at)
            is_last, length = head >> 31, head & 0x7FFFFFFF
            nonce = number.to_bytes(8, "big") + bytes((0, 0, 0, is_last))
            piece = sealed[at + 4:at + 4 + length + 16]
            content += AESGCM(self.derive(b"list")).decrypt(nonce, piece, self.context)
            number, at = number + 1, at + 4 + length + 16
        check(at == len(sealed), "the file list goes on behind its end")
        return content

    def check_record(self, line, proof):
        if blake3 is not None:
            code = hmac.digest(self.derive(b"record"), blake3(line).digest(), "sha256")
            check(code.hex() == json.loads(proof)["proof"], "the record has another proof")


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


def read_object(site, key, backup_key=None):
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
    if metadata.get("encryption-key-id") or (not metadata and stored.startswith(b"pghoa1")):
        stored = open_envelope(stored)
    elif backup_key:
        stored = backup_key.open_list(stored)
    compression = metadata.get("compression-algorithm")
    if not metadata:
        compression = "zstd" if stored.startswith(ZSTD_MAGIC) else None
        check(not stored.startswith(SNAPPY_START), f"{key} is compressed with snappy")
    data = decompress(stored, compression)
    if "original-file-size" in metadata:
        check(len(data) == int(metadata["original-file-size"]), f"{key} has another length")
    check_digest(data, metadata.get("pgkeep-blake3"), key)
    return data


def read_record(site, name):
    text = read_object(site, f"backup/{name}/record") or fail(f"no backup {name}")
    record = json.loads(text.splitlines()[0])
    check(record["format"] in (1, 2), f"the record of {name} has format {record['format']}")
    return record


def read_keys(site, name):
    """By backup, the keys that are needed to read this one."""
    keys = {key["backup"]: BackupKey(key["backup"], key["wrapped"]) for key in read_record(site, name).get("keys", [])}
    if name in keys:
        keys[name].check_record(*read_object(site, f"backup/{name}/record").splitlines())
    return keys


def list_backups(site):
    for record in sorted(site.glob("backup/*/record")):
        backup = read_record(site, record.parent.name)
        print(backup["name"], backup["timeline"], backup["start_lsn"], backup["stop_lsn"],
              backup["plaintext_bytes"], backup["file_count"])


def entries(site, name, keys):
    record = read_record(site, name)
    text = read_object(site, f"backup/{name}/files", keys.get(name))
    check(len(text) == record["files"]["plaintext_length"], "the file list has another length")
    check_digest(text, record["files"]["digest"], "the file list")
    head, *lines, end = map(json.loads, text.splitlines())
    check(head == {"format": 1, "backup": name}, "this is another file list")
    check(end == {"end": True, "entries": len(lines)}, "the file list is cut")
    return lines


def read_extent(site, name, keys, extent):
    pack, offset, stored_length, raw_length, compression, digest, *part = extent
    backup, number = (name, pack) if isinstance(pack, int) else pack.split("/")
    with open(site / f"backup/{backup}/pack/{int(number):06}", "rb") as file:
        file.seek(offset)
        stored = file.read(stored_length)
    check(len(stored) == stored_length, "a pack is cut")
    if backup in keys:
        stored = keys[backup].open_frame(int(number), offset, stored)
    raw = decompress(stored, compression)
    check(len(raw) == raw_length, "a frame has another length")
    check_digest(raw, digest, "a frame")
    skip, take = part or (0, raw_length)
    return raw[skip:skip + take]


def read_file(site, name, path):
    keys = read_keys(site, name)
    entry = next((entry for entry in entries(site, name, keys) if entry.get("path") == path), None)
    check(entry and entry["type"] == "file", f"no file {path}")
    data = b"".join(read_extent(site, name, keys, extent) for extent in entry["extents"])
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
