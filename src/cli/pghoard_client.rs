//! Asks a server that speaks PGHoard's HTTP: an agent of ours, or PGHoard's own daemon.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::agent_client::{Agent, AgentError, AgentUrlError, encode};
use super::http_response::Head;
use crate::config::HttpConfig;
use crate::secret::Secret;

/// PGHoard answers within half a minute, and tries three times before that.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(200);
/// A list of base backups is the longest text: a kilobyte each.
const LONGEST_BODY: u64 = 16 << 20;
/// What PGHoard says of a site it does not know, and we too: it must not be taken for a missing file.
const UNKNOWN_SITE: &[u8] = b"Site: ";

/// A server, and the credentials it wants.
pub struct Hoard(Agent);

/// What a server said.
#[derive(Clone, Debug)]
pub struct Answer {
    pub head: Head,
    pub body: Vec<u8>,
}

impl Answer {
    /// Whether a server that knows what it says has said that the file does not exist.
    pub fn says_missing(&self) -> bool {
        self.head.status == 404 && self.is_known() && !self.body.starts_with(UNKNOWN_SITE)
    }

    /// Whether the answer comes from pgkeep or PGHoard, and not from whatever else listens there.
    pub fn is_known(&self) -> bool {
        let of_pghoard = |server: &str| server.starts_with("pghoard/");
        self.head.is_from_agent() || self.head.server.as_deref().is_some_and(of_pghoard)
    }

    /// The value of a header field, whose name is in lower case.
    pub fn field(&self, name: &str) -> Option<&str> {
        self.head.others.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

impl Hoard {
    pub fn at(host: &str, port: u16, credentials: Option<(String, Secret)>) -> Result<Self, AgentUrlError> {
        let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        Agent::parse(&format!("http://{host}:{port}"), credentials).map(Self)
    }

    /// The server of a configuration, which runs on this machine.
    pub fn of(http: &HttpConfig) -> Result<Self, AgentUrlError> {
        let host = match http.address.as_str() {
            "" | "0.0.0.0" => "127.0.0.1",
            "::" => "::1",
            address => address,
        };
        let credentials = http.credentials.clone().map(|given| (given.username, given.password));
        Self::at(host, http.port, credentials)
    }

    pub fn ask(&self, method: &str, path: &[&str], fields: &str) -> Result<Answer, AgentError> {
        let parts: Vec<String> = path.iter().map(|part| encode(part)).collect();
        let path = format!("/{}", parts.join("/"));
        let mut stream = self.0.connect()?;
        let request = self.0.request_for(method, &path, fields);
        stream.write_all(request.as_bytes()).map_err(|source| self.0.broken(source))?;
        let (head, early) = self.0.read_head(&mut stream, ANSWER_TIMEOUT)?;
        let body = if method == "HEAD" {
            Vec::new()
        } else {
            body(&stream, &head, early).map_err(|source| self.0.broken(source))?
        };
        Ok(Answer { head, body })
    }
}

/// A body that is shorter than announced is an error; PGHoard announces no length when it refuses a password.
fn body(mut stream: &TcpStream, head: &Head, mut text: Vec<u8>) -> io::Result<Vec<u8>> {
    let length = head.content_length.map_or(LONGEST_BODY, |length| length.min(LONGEST_BODY));
    (&mut stream).take(length.saturating_sub(text.len() as u64)).read_to_end(&mut text)?;
    if head.content_length.is_some_and(|announced| announced != text.len() as u64) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::http_response::parse_head;

    fn answer(status: u16, server: &str, body: &[u8]) -> Answer {
        let head = format!("HTTP/1.0 {status} x\r\nServer: {server}\r\nMetadata-Hash: ab\r\n\r\n");
        Answer { head: parse_head(head.as_bytes()).unwrap(), body: body.to_vec() }
    }

    #[test]
    fn only_a_server_that_knows_can_say_that_a_file_is_missing() {
        assert!(answer(404, "pgkeep/0.1.0", b"`x` does not exist").says_missing());
        assert!(answer(404, "pghoard/2.7.0 Python/3.11.2", b"").says_missing());
        assert!(!answer(404, "nginx", b"").says_missing());
        assert!(!answer(404, "pghoard/2.7.0", b"Site: 'x' not found for path ['x']").says_missing());
        assert!(!answer(503, "pgkeep/0.1.0", b"").says_missing());
        assert_eq!(answer(200, "x", b"").field("metadata-hash"), Some("ab"));
    }
}
