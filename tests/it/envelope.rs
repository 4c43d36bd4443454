//! Objects exchanged with PGHoard's own library: what it wrote is read, and what we write it reads.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use pgkeep::codec::{Compression, Decoder, Encoder, Error, Expected, KeyId, KeyRing};
use pgkeep::secret::Secret;

use crate::process::{Scratch, cache};

/// Made by `make.py` there.
fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/envelope")
}

fn fixture(name: &str) -> Vec<u8> {
    fs::read(fixtures().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn ring() -> KeyRing {
    let text = |name| String::from_utf8(fixture(name)).unwrap();
    let id = KeyId::new("main").unwrap();
    let mut ring = KeyRing::default();
    ring.add(&id, Some(&text("public.pem")), Some(&Secret::new(text("private.pem")))).unwrap();
    ring.write_with(id).unwrap();
    ring
}

/// What `make.py` compressed.
fn plaintext() -> Vec<u8> {
    let line = |n| format!("line {n} of what was written by PGHoard's library\n");
    (0..2000).map(line).collect::<String>().into_bytes()
}

const COMPRESSIONS: [Compression; 3] = [Compression::Snappy, Compression::Lzma, Compression::Zstd];

fn decode(mut decoder: Decoder, stored: &[u8]) -> Result<Vec<u8>, Error> {
    let mut plaintext = Vec::new();
    for mut chunk in stored.chunks(777) {
        while !chunk.is_empty() || decoder.has_more() {
            decoder.push(&mut chunk, 4096, &mut plaintext)?;
        }
    }
    decoder.finish().map(|_| plaintext)
}

#[test]
fn what_pghoards_library_wrote_is_read() {
    let ring = ring();
    for compression in COMPRESSIONS {
        for (name, expected) in [("text", plaintext()), ("empty", Vec::new())] {
            let decoder = || Decoder::new(compression, Expected::default());
            let plain = decode(decoder(), &fixture(&format!("{name}.{compression}")));
            assert!(plain.unwrap() == expected, "{name} {compression}");
            let stored = fixture(&format!("{name}.{compression}.encrypted"));
            let opened = decode(decoder().encrypted(ring.privates()), &stored);
            assert!(opened.unwrap() == expected, "{name} {compression} encrypted");
            let detected = Decoder::detecting(Expected::default()).encrypted(ring.privates());
            assert!(decode(detected, &stored).unwrap() == expected, "{name} {compression} detected");
        }
    }
}

#[test]
fn what_pghoards_library_wrote_and_somebody_changed_is_refused() {
    let (ring, whole) = (ring(), plaintext());
    for compression in COMPRESSIONS {
        let stored = fixture(&format!("text.{compression}.encrypted"));
        let attempt = |bytes: &[u8]| {
            decode(Decoder::new(compression, Expected::default()).encrypted(ring.privates()), bytes)
        };
        for at in (0..stored.len()).step_by(101).chain([
            392,
            stored.len() - 33,
            stored.len() - 32,
            stored.len() - 1,
        ]) {
            let mut changed = stored.clone();
            changed[at] ^= 0x40;
            assert!(attempt(&changed).is_err(), "{compression} byte {at}");
        }
        // Where PGHoard restores without a word: the code cut off, and more.
        for cut in [1, 32, 33, 100] {
            assert!(attempt(&stored[..stored.len() - cut]).is_err(), "{compression} cut by {cut}");
        }
        assert!(attempt(&stored).unwrap() == whole);
    }
}

#[test]
fn pghoards_library_reads_what_we_write() {
    const READER: &str = "
import io, sys
from rohmu import rohmufile
directory = sys.argv[1]
private = open(directory + '/private.pem').read()
for name in sys.argv[2:]:
    algorithm = name.split('.')[1]
    output = io.BytesIO()
    rohmufile.read_file(
        input_obj=open(directory + '/' + name, 'rb'), output_obj=output,
        metadata={'compression-algorithm': algorithm, 'encryption-key-id': 'main'},
        key_lookup=lambda key_id: private, log_func=None)
    open(directory + '/' + name + '.read', 'wb').write(output.getvalue())
";
    let (ring, scratch) = (ring(), Scratch::new());
    scratch.write("private.pem", fixture("private.pem"));
    let contents = [("text", plaintext()), ("byte", vec![7]), ("block", vec![9; 3 << 20])];
    let mut names = Vec::new();
    for compression in COMPRESSIONS {
        for (name, content) in &contents {
            let mut encoder = Encoder::new(compression, 0).encrypted(ring.writing().unwrap());
            let mut stored = Vec::new();
            content.chunks(100_000).for_each(|chunk| encoder.push(chunk, &mut stored));
            encoder.finish(&mut stored);
            let name = format!("{name}.{compression}");
            scratch.write(&name, stored);
            names.push(name);
        }
    }
    let python = cache().join("pghoard/bin/python");
    assert!(python.exists(), "`{}` is missing: scripts/install-test-deps puts it there", python.display());
    let output = Command::new(python).args(["-c", READER]).arg(scratch.path()).args(&names).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for name in names {
        let content = contents.iter().find(|(start, _)| name.starts_with(start)).unwrap();
        let read = fs::read(scratch.path().join(format!("{name}.read"))).unwrap();
        assert!(read == content.1, "{name}");
    }
}
