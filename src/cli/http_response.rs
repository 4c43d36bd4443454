//! Reads the head of an HTTP/1 answer.
//!
//! Pure. Strict, because a misread status or length would tell PostgreSQL something untrue: what is not
//! plainly right is malformed, and malformed means "unknown".

/// Longest head that is read; the agent's own is below 300 bytes.
pub const LONGEST_HEAD: usize = 16 << 10;

const MOST_FIELDS: usize = 64;

/// What matters of an answer's head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    pub status: u16,
    pub server: Option<String>,
    pub content_length: Option<u64>,
    /// All other fields; names in lower case.
    pub others: Vec<(String, String)>,
}

impl Head {
    /// Whether the answer says it comes from a pgkeep agent. Only such a one is believed when it says that
    /// a file does not exist or is stored.
    pub fn is_from_agent(&self) -> bool {
        self.server.as_deref().is_some_and(|server| server.starts_with("pgkeep/"))
    }
}

/// A head that is not understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MalformedHead {
    #[error("not an HTTP/1 status line")]
    StatusLine,
    #[error("malformed header field")]
    Field,
    #[error("more than {MOST_FIELDS} header fields")]
    TooMany,
    #[error("`{0}` is repeated or has no acceptable value")]
    Value(&'static str),
}

/// Where the head ends in `bytes`: the index after the empty line. `None` when it is not all there yet.
pub fn end_of_head(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|window| window == b"\r\n\r\n").map(|at| at + 4)
}

/// Reads a head, its closing empty line included.
pub fn parse_head(bytes: &[u8]) -> Result<Head, MalformedHead> {
    let text = bytes.strip_suffix(b"\n\r\n").ok_or(MalformedHead::Field)?;
    // Every line has its CR; one more would be part of a value.
    let mut lines = text.split(|&byte| byte == b'\n').map(|line| line.strip_suffix(b"\r"));
    let status = lines.next().flatten().and_then(parse_status_line).ok_or(MalformedHead::StatusLine)?;
    let mut head = Head { status, server: None, content_length: None, others: Vec::new() };
    for (index, line) in lines.enumerate() {
        if index == MOST_FIELDS {
            return Err(MalformedHead::TooMany);
        }
        let (name, value) = line.and_then(parse_field).ok_or(MalformedHead::Field)?;
        match name.to_ascii_lowercase().as_str() {
            "content-length" => {
                let length = parse_length(value).filter(|_| head.content_length.is_none());
                head.content_length = Some(length.ok_or(MalformedHead::Value("content-length"))?);
            }
            "server" if head.server.is_some() => return Err(MalformedHead::Value("server")),
            "server" => head.server = Some(value.to_owned()),
            // The agent announces every length; a body of another form is not its work.
            "transfer-encoding" => return Err(MalformedHead::Value("transfer-encoding")),
            name => head.others.push((name.to_owned(), value.to_owned())),
        }
    }
    Ok(head)
}

fn parse_status_line(line: &[u8]) -> Option<u16> {
    let rest = line.strip_prefix(b"HTTP/1.1 ").or_else(|| line.strip_prefix(b"HTTP/1.0 "))?;
    let (digits, reason) = rest.split_first_chunk::<3>()?;
    if !digits.iter().all(u8::is_ascii_digit) || !matches!(reason.first(), None | Some(b' ')) {
        return None;
    }
    if !is_field_text(reason) {
        return None;
    }
    let status = digits.iter().fold(0, |status, digit| status * 10 + u16::from(digit - b'0'));
    (100..600).contains(&status).then_some(status)
}

fn parse_field(line: &[u8]) -> Option<(&str, &str)> {
    let colon = line.iter().position(|&byte| byte == b':')?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    let is_token = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte);
    if name.is_empty() || !name.iter().all(is_token) || !is_field_text(value) {
        return None;
    }
    Some((std::str::from_utf8(name).ok()?, std::str::from_utf8(value).ok()?.trim_matches([' ', '\t'])))
}

fn is_field_text(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == b'\t' || (byte >= b' ' && byte != 0x7F))
}

fn parse_length(value: &str) -> Option<u64> {
    let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| value.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<Head, MalformedHead> {
        parse_head(text.as_bytes())
    }

    #[test]
    fn reads_the_agents_answer() {
        let text = "HTTP/1.1 200 OK\r\nserver: pgkeep/0.1.0\r\nContent-Length:  16777216 \r\ndate: x\r\n\r\n";
        let head = parse(text).unwrap();
        assert_eq!((head.status, head.content_length), (200, Some(16 << 20)));
        assert!(head.is_from_agent());
        let text = "HTTP/1.0 404 Not Found\r\nServer: nginx\r\nX: pgkeep/0.1.0\r\n\r\n";
        let head = parse(text).unwrap();
        assert_eq!((head.status, head.is_from_agent()), (404, false));
        assert_eq!(parse("HTTP/1.1 503\r\n\r\n").unwrap().status, 503);
    }

    #[test]
    fn what_is_not_plainly_right_is_malformed() {
        for text in [
            "",
            "\r\n\r\n",
            "HTTP/1.1 200 OK\r\nContent-Length: 819\r\r\n\r\n",
            "HTTP/1.1 200 OK\nContent-Length: 8192\r\n\r\n",
            "HTTP/2 200 OK\r\n\r\n",
            "HTTP/1.1 20 OK\r\n\r\n",
            "HTTP/1.1 2000\r\n\r\n",
            "HTTP/1.1 +20 OK\r\n\r\n",
            "HTTP/1.1 999 OK\r\n\r\n",
            "HTTP/1.1  200 OK\r\n\r\n",
            "http/1.1 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\n\n",
            "HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
            "HTTP/1.1 200 OK\r\n: empty\r\n\r\n",
            "HTTP/1.1 200 OK\r\na b: c\r\n\r\n",
            "HTTP/1.1 200 OK\r\na: b\r\n folded\r\n\r\n",
            "HTTP/1.1 200 OK\r\na: \0\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: +1\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 0x10\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 1, 1\r\n\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
            "HTTP/1.1 200 OK\r\nserver: pgkeep/1\r\nserver: x\r\n\r\n",
        ] {
            assert!(parse(text).is_err(), "{text:?}");
        }
        let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "a: b\r\n".repeat(65));
        assert_eq!(parse(&many), Err(MalformedHead::TooMany));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_panic(bytes: Vec<u8>) {
            let _ = parse_head(&bytes);
            let mut whole = bytes;
            whole.extend(b"\r\n\r\n");
            let _ = parse_head(&whole[..end_of_head(&whole).unwrap()]);
        }

        #[test]
        fn one_changed_byte_never_makes_another_status_or_length(
            at in any::<prop::sample::Index>(), byte: u8,
        ) {
            let good = b"HTTP/1.1 200 OK\r\nserver: pgkeep/0.1.0\r\ncontent-length: 8192\r\n\r\n";
            let mut bytes = good.to_vec();
            let at = at.index(bytes.len());
            // One more digit, another one, or white space for one makes another number, rightly read.
            prop_assume!(!byte.is_ascii_digit() && !matches!(byte, b' ' | b'\t'));
            bytes[at] = byte;
            if let Ok(head) = parse_head(&bytes) {
                prop_assert_eq!(head.status, 200);
                prop_assert!(matches!(head.content_length, Some(8192) | None));
            }
        }
    }
}
