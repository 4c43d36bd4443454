//! Compares what arrived with the server's own backup manifest.
//!
//! Pure. The server lists every file in the order it sent them, with size and CRC-32C of what it read;
//! folding both lists into one digest each compares them in constant memory, however many files there
//! are. The manifest arrives last and is checked against its own SHA-256 on the way.

use std::fmt::Write as _;

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

/// The longest line that is kept together: a path and its fixed fields.
const LINE_LIMIT: usize = 64 << 10;

/// The manifest does not describe what arrived.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    #[error("the server's backup manifest cannot be read: {0}")]
    Syntax(String),
    #[error("the server's backup manifest does not match its own checksum")]
    OwnChecksum,
    #[error("received {received} files, but the server's backup manifest lists {listed}")]
    Count { received: u64, listed: u64 },
    #[error("the files received are not those in the server's backup manifest")]
    Content,
}

/// Folds (path, size, CRC-32C) of files in order.
#[derive(Debug, Default)]
struct FileFold {
    hasher: blake3::Hasher,
    count: u64,
}

impl FileFold {
    fn add(&mut self, path: &[u8], size: u64, crc32c: u32) {
        self.hasher.update(&(path.len() as u64).to_le_bytes());
        self.hasher.update(path);
        self.hasher.update(&size.to_le_bytes());
        self.hasher.update(&crc32c.to_le_bytes());
        self.count += 1;
    }
}

/// Compares the files received with the manifest that follows them.
#[derive(Debug, Default)]
pub struct ManifestCheck {
    received: FileFold,
    listed: FileFold,
    line: Vec<u8>,
    whole: Sha256,
    /// What the manifest's last line says its checksum is.
    checksum: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Line {
    path: Option<String>,
    #[serde(rename = "Encoded-Path")]
    encoded_path: Option<String>,
    size: u64,
    #[serde(rename = "Checksum-Algorithm")]
    algorithm: Option<String>,
    checksum: Option<String>,
}

impl ManifestCheck {
    /// A file has arrived; `path` as in the manifest.
    pub fn file(&mut self, path: &[u8], size: u64, crc32c: u32) {
        self.received.add(path, size, crc32c);
    }

    pub fn manifest(&mut self, mut data: &[u8]) -> Result<(), ManifestError> {
        while let Some(end) = data.iter().position(|byte| *byte == b'\n') {
            self.line.extend_from_slice(&data[..=end]);
            data = &data[end + 1..];
            let line = std::mem::take(&mut self.line);
            self.read_line(&line)?;
        }
        if self.line.len() + data.len() > LINE_LIMIT {
            return Err(ManifestError::Syntax("a line is too long".to_owned()));
        }
        self.line.extend_from_slice(data);
        Ok(())
    }

    /// The manifest is complete.
    pub fn finish(mut self) -> Result<(), ManifestError> {
        if !self.line.is_empty() {
            let line = std::mem::take(&mut self.line);
            self.read_line(&line)?;
        }
        let found = hex(&self.whole.finalize());
        if self.checksum.as_deref() != Some(found.as_str()) {
            return Err(ManifestError::OwnChecksum);
        }
        let (received, listed) = (self.received.count, self.listed.count);
        if received != listed {
            return Err(ManifestError::Count { received, listed });
        }
        if self.received.hasher.finalize() != self.listed.hasher.finalize() {
            return Err(ManifestError::Content);
        }
        Ok(())
    }

    /// One line as `backup_manifest.c` writes it: the checksum of the whole covers all lines but the
    /// last, and each file stands on a line of its own.
    fn read_line(&mut self, line: &[u8]) -> Result<(), ManifestError> {
        let text = std::str::from_utf8(line).map_err(|error| ManifestError::Syntax(error.to_string()))?;
        if let Some(rest) = text.trim_start().strip_prefix("\"Manifest-Checksum\":") {
            self.checksum = rest.split('"').nth(1).map(str::to_owned);
            return Ok(());
        }
        self.whole.update(line);
        // The first file stands on the line after `"Files": [`, the last one lacks a comma.
        let text = text.trim().trim_end_matches(',');
        if !(text.starts_with("{ \"Path\"") || text.starts_with("{ \"Encoded-Path\"")) {
            return Ok(());
        }
        let text = text.trim_end_matches("],").trim_end();
        let syntax = |what: &str| ManifestError::Syntax(format!("{what} in `{text}`"));
        let file: Line = serde_json::from_str(text).map_err(|error| syntax(&error.to_string()))?;
        let path = match (file.path, file.encoded_path) {
            (Some(path), None) => path.into_bytes(),
            (None, Some(hex)) => unhex(&hex).ok_or_else(|| syntax("no hex path"))?,
            _ => return Err(syntax("not one path")),
        };
        if file.algorithm.as_deref() != Some("CRC32C") {
            return Err(syntax("no CRC32C checksum"));
        }
        let checksum = file.checksum.and_then(|hex| unhex(&hex)).and_then(|bytes| bytes.try_into().ok());
        // "CRC32C's 4 bytes are in native byte order": little-endian on every server we can read.
        let crc32c = u32::from_le_bytes(checksum.ok_or_else(|| syntax("no CRC32C checksum"))?);
        self.listed.add(&path, file.size, crc32c);
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) {
        return None;
    }
    text.as_bytes()
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(files: &[(&str, u64, u32)]) -> String {
        let mut text =
            "{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": 7,\n\"Files\": ["
                .to_owned();
        for (at, (path, size, crc)) in files.iter().enumerate() {
            let comma = if at == 0 { "\n" } else { ",\n" };
            let crc = format!("{:08x}", crc.swap_bytes());
            write!(
                text,
                "{comma}{{ \"Path\": \"{path}\", \"Size\": {size}, \"Last-Modified\": \"x\", \
                 \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"{crc}\" }}"
            )
            .unwrap();
        }
        text.push_str("\n],\n\"WAL-Ranges\": [\n{ \"Timeline\": 1 }\n],\n");
        let sum = hex(&Sha256::digest(text.as_bytes()));
        writeln!(text, "\"Manifest-Checksum\": \"{sum}\"}}").unwrap();
        text
    }

    fn compare(received: &[(&str, u64, u32)], manifest: &str, cut: usize) -> Result<(), ManifestError> {
        let mut check = ManifestCheck::default();
        for (path, size, crc) in received {
            check.file(path.as_bytes(), *size, *crc);
        }
        for part in manifest.as_bytes().chunks(cut) {
            check.manifest(part)?;
        }
        check.finish()
    }

    #[test]
    fn accepts_what_the_server_sent_however_it_was_cut() {
        let listed = [("backup_label", 200, 5), (r#"base/1/2 \"x"#, 8192, 0xDEAD_BEEF)];
        let received = [("backup_label", 200, 5), ("base/1/2 \"x", 8192, 0xDEAD_BEEF)];
        for cut in [1, 7, 64, 100_000] {
            assert_eq!(compare(&received, &manifest(&listed), cut), Ok(()));
        }
    }

    #[test]
    fn notices_other_content_a_missing_file_and_a_damaged_manifest() {
        let sent = [("backup_label", 200, 5), ("base/1/2", 8192, 7)];
        let good = manifest(&sent);
        assert_eq!(compare(&sent, &good, 64), Ok(()));
        let other = [sent[0], ("base/1/2", 8192, 8)];
        assert_eq!(compare(&other, &good, 64), Err(ManifestError::Content));
        assert_eq!(compare(&sent[..1], &good, 64), Err(ManifestError::Count { received: 1, listed: 2 }));
        let damaged = good.replace("\"x\"", "\"y\"");
        assert_eq!(compare(&sent, &damaged, 64), Err(ManifestError::OwnChecksum));
        assert!(compare(&sent, &good[..good.len() - 80], 64).is_err());
    }
}
