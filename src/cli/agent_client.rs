//! Talks to the agent over HTTP, by hand.
//!
//! PostgreSQL waits for every `wal-fetch`, once per segment of a recovery, so the way through the agent
//! starts no async runtime and reads no configuration: one blocking socket, one request, one answer.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use base64::Engine as _;

use super::http_response::{Head, LONGEST_HEAD, MalformedHead, end_of_head, parse_head};
use crate::postgres::WalFileName;
use crate::secret::Secret;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// An agent may first wait for a place in its queue, then try storage again for a while, then store.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(200);
/// The longest pause within a body, in either direction.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How long to look for an answer after the agent stopped taking our bytes.
const LAST_WORD_TIMEOUT: Duration = Duration::from_secs(2);
/// One read or write: a segment takes some dozens, and the memory stays out of sight.
const BUFFER_BYTES: usize = 256 << 10;
/// As much of an explanation as is shown.
const LONGEST_REASON: u64 = 2 << 10;

/// Where the agent is, and how to log in.
#[derive(Clone, Debug)]
pub struct Agent {
    host: String,
    port: u16,
    authorization: Option<Secret>,
}

/// A URL that does not lead to an agent.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{shown}` is not the URL of an agent, such as `http://127.0.0.1:16000`: {reason}")]
pub struct AgentUrlError {
    shown: String,
    reason: &'static str,
}

/// Why the agent gave no answer that can be acted upon.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("no agent answers at `{address}`: {source}")]
    Unreachable { address: String, source: io::Error },
    #[error("the agent at `{address}` cannot tell now: {reason}")]
    Unavailable { address: String, reason: String },
    #[error("the agent at `{address}` refused: {status} {reason}")]
    Refused { address: String, status: u16, reason: String },
    #[error("what answers at `{address}` is not pgkeep but `{server}` ({status})")]
    Foreign { address: String, server: String, status: u16 },
    #[error("answer from `{address}` is malformed: {source}")]
    Malformed { address: String, source: MalformedHead },
    #[error("connection to `{address}` broke off: {source}")]
    Broken { address: String, source: io::Error },
}

/// The agent's answer to a question for a file.
pub enum Found {
    Body(Body),
    DoesNotExist,
}

/// The agent's answer to a file it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Given {
    Stored,
    AlreadyStored,
    /// The archive holds other bytes under this name.
    Conflict(String),
}

/// The bytes of a file, as they arrive.
pub struct Body {
    address: String,
    length: u64,
    remaining: u64,
    /// Read behind the head already.
    early: Vec<u8>,
    stream: TcpStream,
}

impl Agent {
    /// Takes `http://[user:password@]host[:port]`; `credentials` count where the URL has none.
    pub fn parse(text: &str, credentials: Option<(String, Secret)>) -> Result<Self, AgentUrlError> {
        let error = |reason| AgentUrlError { shown: without_credentials(text), reason };
        let url = url::Url::parse(text).map_err(|_| error("not a URL"))?;
        if url.scheme() != "http" {
            return Err(error("only `http` is spoken"));
        }
        if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
            return Err(error("nothing may follow the port"));
        }
        let host = url.host_str().filter(|host| !host.is_empty()).ok_or_else(|| error("no host"))?;
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let in_url = (!url.username().is_empty()).then(|| {
            let password = decode(url.password().unwrap_or_default());
            (decode(url.username()), Secret::new(password))
        });
        let authorization = in_url.or(credentials).map(|(username, password)| {
            let plain = format!("{username}:{}", password.reveal());
            Secret::new(format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(plain)))
        });
        let port = url.port_or_known_default().ok_or_else(|| error("no port"))?;
        Ok(Self { host, port, authorization })
    }

    /// Asks for `file` of `site` (`-` for the only one).
    pub fn fetch(&self, site: &str, file: WalFileName) -> Result<Found, AgentError> {
        let mut stream = self.connect()?;
        let request = self.request("GET", site, file, "");
        stream.write_all(request.as_bytes()).map_err(|source| self.broken(source))?;
        let (head, body) = self.answer(stream, ANSWER_TIMEOUT)?;
        match head.status {
            200 => Ok(Found::Body(body)),
            404 => Ok(Found::DoesNotExist),
            status => Err(self.refused(status, body)),
        }
    }

    /// The agent's status, when one answers.
    pub fn status(&self) -> Result<serde_json::Value, AgentError> {
        let mut stream = self.connect()?;
        let request = self.request_for("GET", "/status", "");
        stream.write_all(request.as_bytes()).map_err(|source| self.broken(source))?;
        let (head, body) = self.answer(stream, STALL_TIMEOUT)?;
        if head.status != 200 {
            return Err(self.refused(head.status, body));
        }
        let mut text = Vec::new();
        let copied = body.copy_to(|bytes| text.write_all(bytes)).map_err(|source| self.broken(source))?;
        copied?;
        serde_json::from_slice(&text).map_err(|error| self.broken(error.into()))
    }

    /// Gives the agent `file`, whose bytes are the next `length` of `content`.
    ///
    /// # Errors
    /// The outer error is one of reading `content`.
    pub fn store(
        &self,
        site: &str,
        file: WalFileName,
        length: u64,
        content: &mut impl Read,
    ) -> io::Result<Result<Given, AgentError>> {
        let mut stream = match self.connect() {
            Ok(stream) => stream,
            Err(error) => return Ok(Err(error)),
        };
        let request = self.request("PUT", site, file, &format!("content-length: {length}\r\n"));
        let mut patience = ANSWER_TIMEOUT;
        let mut write = |stream: &mut TcpStream, bytes: &[u8]| -> Option<io::Error> {
            let error = stream.write_all(bytes).err();
            if error.is_some() {
                // It may have said why before it hung up.
                patience = LAST_WORD_TIMEOUT;
            }
            error
        };
        let mut failed = write(&mut stream, request.as_bytes());
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut remaining = length;
        while remaining > 0 && failed.is_none() {
            let room = usize::try_from(remaining).unwrap_or(usize::MAX).min(buffer.len());
            match content.read(&mut buffer[..room])? {
                0 => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file became shorter")),
                count => {
                    failed = write(&mut stream, &buffer[..count]);
                    remaining -= count as u64;
                }
            }
        }
        Ok(match (self.answer(stream, patience), failed) {
            (Ok((head, body)), _) => self.given(head.status, body),
            (Err(_), Some(source)) => Err(self.broken(source)),
            (Err(error), None) => Err(error),
        })
    }

    fn given(&self, status: u16, body: Body) -> Result<Given, AgentError> {
        match status {
            200 => Ok(Given::AlreadyStored),
            201 => Ok(Given::Stored),
            409 => Ok(Given::Conflict(body.reason())),
            status => Err(self.refused(status, body)),
        }
    }

    pub(super) fn connect(&self) -> Result<TcpStream, AgentError> {
        let unreachable = |source| AgentError::Unreachable { address: self.address(), source };
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
        for address in (self.host.as_str(), self.port).to_socket_addrs().map_err(unreachable)? {
            match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                Ok(stream) => {
                    stream
                        .set_nodelay(true)
                        .and_then(|()| stream.set_write_timeout(Some(STALL_TIMEOUT)))
                        .map_err(unreachable)?;
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        Err(unreachable(last))
    }

    fn request(&self, method: &str, site: &str, file: WalFileName, fields: &str) -> String {
        self.request_for(method, &format!("/{}/archive/{file}", encode(site)), fields)
    }

    pub(super) fn request_for(&self, method: &str, path: &str, fields: &str) -> String {
        let authorization = self
            .authorization
            .as_ref()
            .map_or_else(String::new, |value| format!("authorization: {}\r\n", value.reveal()));
        format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n{authorization}{fields}\r\n",
            self.address(),
        )
    }

    /// Reads the head of an answer, and the beginning of its body that came with it.
    pub(super) fn read_head(
        &self,
        stream: &mut TcpStream,
        patience: Duration,
    ) -> Result<(Head, Vec<u8>), AgentError> {
        let deadline = Instant::now() + patience;
        let mut bytes = Vec::with_capacity(4 << 10);
        let mut buffer = vec![0; LONGEST_HEAD];
        let end = loop {
            if let Some(end) = end_of_head(&bytes) {
                break end;
            }
            if bytes.len() >= LONGEST_HEAD {
                return Err(self.malformed(MalformedHead::Field));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.broken(io::ErrorKind::TimedOut.into()));
            }
            match stream.set_read_timeout(Some(left)).and_then(|()| stream.read(&mut buffer)) {
                Ok(0) => return Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => bytes.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(self.broken(source)),
            }
        };
        let head = parse_head(&bytes[..end]).map_err(|source| self.malformed(source))?;
        stream.set_read_timeout(Some(STALL_TIMEOUT)).map_err(|source| self.broken(source))?;
        Ok((head, bytes.split_off(end)))
    }

    /// Reads the head of the answer and makes sure that an agent gave it.
    fn answer(&self, mut stream: TcpStream, patience: Duration) -> Result<(Head, Body), AgentError> {
        let (head, early) = self.read_head(&mut stream, patience)?;
        if !head.is_from_agent() {
            let server = head.server.unwrap_or_else(|| "an unnamed server".to_owned());
            let server = printable(server.as_bytes());
            return Err(AgentError::Foreign { address: self.address(), server, status: head.status });
        }
        let length =
            head.content_length.ok_or_else(|| self.malformed(MalformedHead::Value("content-length")))?;
        let body = Body { address: self.address(), length, remaining: length, early, stream };
        Ok((head, body))
    }

    fn refused(&self, status: u16, body: Body) -> AgentError {
        let reason = body.reason();
        match status {
            503 => AgentError::Unavailable { address: self.address(), reason },
            status => AgentError::Refused { address: self.address(), status, reason },
        }
    }

    pub(super) fn broken(&self, source: io::Error) -> AgentError {
        broken(self.address(), source)
    }

    fn malformed(&self, source: MalformedHead) -> AgentError {
        AgentError::Malformed { address: self.address(), source }
    }

    fn address(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl AgentError {
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unreachable { .. } => Some(
                "start the agent (`pgkeep run`), name its place with `--url`, or give `--config` to reach storage without one"
                    .to_owned(),
            ),
            Self::Refused { status: 401, .. } => {
                Some("set `PGKEEP_HTTP_USERNAME` and `PGKEEP_HTTP_PASSWORD`".to_owned())
            }
            Self::Foreign { .. } => Some("name the agent's place with `--url`".to_owned()),
            _ => None,
        }
    }
}

impl Body {
    /// How many bytes the whole body has.
    pub const fn length(&self) -> u64 {
        self.length
    }

    /// Passes the whole body to `write`, in pieces.
    ///
    /// # Errors
    /// The outer error is one of `write`.
    pub fn copy_to(
        mut self,
        mut write: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<Result<(), AgentError>> {
        if self.early.len() as u64 > self.remaining {
            let source = io::Error::new(io::ErrorKind::InvalidData, "more bytes than announced");
            return Ok(Err(broken(self.address, source)));
        }
        write(&self.early)?;
        self.remaining -= self.early.len() as u64;
        let mut buffer = vec![0; BUFFER_BYTES];
        while self.remaining > 0 {
            let room = usize::try_from(self.remaining).unwrap_or(usize::MAX).min(buffer.len());
            match self.stream.read(&mut buffer[..room]) {
                Ok(0) => return Ok(Err(broken(self.address, io::ErrorKind::UnexpectedEof.into()))),
                Ok(count) => {
                    write(&buffer[..count])?;
                    self.remaining -= count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Ok(Err(broken(self.address, source))),
            }
        }
        Ok(Ok(()))
    }

    /// The body as a text for people, cut to a decent length.
    fn reason(self) -> String {
        let mut text = self.early;
        let length = self.remaining.min(LONGEST_REASON);
        let missing = length.saturating_sub(text.len() as u64);
        // Half an explanation is better than none.
        let _ = self.stream.take(missing).read_to_end(&mut text);
        text.truncate(usize::try_from(length).unwrap_or(usize::MAX));
        printable(&text)
    }
}

fn broken(address: String, source: io::Error) -> AgentError {
    // A socket's own word for a passed time limit is "Resource temporarily unavailable".
    let source =
        if source.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { source };
    AgentError::Broken { address, source }
}

/// Text from elsewhere, safe to show on a terminal.
fn printable(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// A URL as it may be shown.
fn without_credentials(text: &str) -> String {
    match (text.find("://"), text.rfind('@')) {
        (Some(scheme), Some(at)) if scheme + 3 <= at => format!("{}://…{}", &text[..scheme], &text[at..]),
        (None, Some(at)) => format!("…{}", &text[at..]),
        _ => text.to_owned(),
    }
}

pub(super) fn encode(segment: &str) -> String {
    use std::fmt::Write as _;
    let mut encoded = String::with_capacity(segment.len());
    for byte in segment.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            write!(encoded, "%{byte:02X}").expect("a String takes any text");
        }
    }
    encoded
}

fn decode(text: &str) -> String {
    // `Url` has checked nothing here, so a `%` that begins no byte stands for itself.
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let escaped =
            (byte == b'%').then(|| tail.split_first_chunk::<2>()).flatten().and_then(|(digits, tail)| {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                Some((u8::try_from(digit(digits[0])? * 16 + digit(digits[1])?).ok()?, tail))
            });
        let (value, next) = escaped.unwrap_or((byte, tail));
        decoded.push(value);
        rest = next;
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::TcpListener;
    use std::thread;

    const FILE: &str = "00000002.history";

    /// Answers one request with `answer` and hangs up; returns what was asked.
    fn server(answer: Vec<u8>) -> (Agent, thread::JoinHandle<Vec<u8>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let agent = Agent::parse(&format!("http://u%40:p@{}", listener.local_addr().unwrap()), None).unwrap();
        let thread = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = vec![0; 4096];
            let count = stream.read(&mut request).unwrap();
            request.truncate(count);
            let _ = stream.write_all(&answer);
            request
        });
        (agent, thread)
    }

    fn fetch(answer: impl Into<Vec<u8>>) -> Result<Option<Vec<u8>>, AgentError> {
        let (agent, thread) = server(answer.into());
        let found = agent.fetch("a site", FILE.parse().unwrap());
        let request = String::from_utf8(thread.join().unwrap()).unwrap();
        assert!(request.starts_with("GET /a%20site/archive/00000002.history HTTP/1.1\r\n"), "{request}");
        assert!(request.contains("\r\nauthorization: Basic dUA6cA==\r\n"), "{request}");
        match found? {
            Found::DoesNotExist => Ok(None),
            Found::Body(body) => {
                let mut bytes = Vec::new();
                body.copy_to(|part| {
                    bytes.extend_from_slice(part);
                    Ok(())
                })
                .unwrap()?;
                Ok(Some(bytes))
            }
        }
    }

    #[test]
    fn believes_an_agent() {
        let answer = "HTTP/1.1 200 OK\r\nserver: pgkeep/0\r\ncontent-length: 3\r\n\r\nabc";
        assert_eq!(fetch(answer).unwrap().unwrap(), b"abc");
        let answer = "HTTP/1.1 404 Not Found\r\nserver: pgkeep/0\r\ncontent-length: 0\r\n\r\n";
        assert_eq!(fetch(answer).unwrap(), None);
    }

    #[test]
    fn believes_nobody_else() {
        for server in ["", "server: nginx\r\n", "server: pghoard/2 Python/3\r\n", "x-server: pgkeep/0\r\n"] {
            let answer = format!("HTTP/1.1 404 Not Found\r\n{server}content-length: 0\r\n\r\n");
            assert!(matches!(fetch(answer), Err(AgentError::Foreign { status: 404, .. })), "{server}");
        }
    }

    #[test]
    fn a_cut_or_overlong_body_is_no_file() {
        for body in ["ab", "abcd"] {
            let answer = format!("HTTP/1.1 200 OK\r\nserver: pgkeep/0\r\ncontent-length: 3\r\n\r\n{body}");
            assert!(matches!(fetch(answer), Err(AgentError::Broken { .. })), "{body}");
        }
    }

    #[test]
    fn the_reason_is_passed_on_in_plain_text() {
        let answer = "HTTP/1.1 503 x\r\nserver: pgkeep/0\r\ncontent-length: 8\r\n\r\nbusy\x1b[1m";
        let error = fetch(answer).unwrap_err().to_string();
        assert!(error.ends_with("cannot tell now: busy [1m"), "{error}");
        let answer = "HTTP/1.1 400 x\r\nserver: pgkeep/0\r\ncontent-length: 100\r\n\r\nhalf a";
        assert!(fetch(answer).unwrap_err().to_string().ends_with("refused: 400 half a"));
    }

    #[test]
    fn refuses_urls_that_lead_elsewhere_and_shows_no_password() {
        for url in ["https://h", "ftp://h", "h:16000", "http://h/path", "http://h?x", ""] {
            assert!(Agent::parse(url, None).is_err(), "{url}");
        }
        let error = Agent::parse("https://me:hunter2@h", None).unwrap_err().to_string();
        assert!(!error.contains("hunter2"), "{error}");
        assert_eq!(Agent::parse("http://[::1]:16000/", None).unwrap().address(), "[::1]:16000");
        assert_eq!(Agent::parse("http://h", None).unwrap().port, 80);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn no_garbage_is_taken_for_an_answer(answer: Vec<u8>) {
            prop_assert!(fetch(answer).is_err());
        }

        #[test]
        fn an_answer_cut_anywhere_is_no_answer(cut in 0_usize..64) {
            let answer = b"HTTP/1.1 200 OK\r\nserver: pgkeep/0\r\ncontent-length: 3\r\n\r\nabc";
            prop_assume!(cut < answer.len());
            prop_assert!(fetch(&answer[..cut]).is_err());
        }

        #[test]
        fn what_is_encoded_is_decoded(text in "\\PC{0,20}") {
            prop_assert_eq!(decode(&encode(&text)), text);
        }
    }
}
