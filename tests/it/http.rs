//! The smallest HTTP client that can talk to an agent.

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// An answer; header names are in lower case.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(each, _)| each == name).map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

pub fn get(address: SocketAddr, path: &str) -> io::Result<Response> {
    request(address, "GET", path, &[], &[])
}

pub fn head(address: SocketAddr, path: &str) -> io::Result<Response> {
    request(address, "HEAD", path, &[], &[])
}

pub fn put(address: SocketAddr, path: &str, body: &[u8]) -> io::Result<Response> {
    request(address, "PUT", path, &[], body)
}

/// One request on a connection of its own. `path` goes out as it is, so that malformed ones can be tried.
pub fn request(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> io::Result<Response> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n");
    for (name, value) in headers {
        write!(head, "{name}: {value}\r\n").expect("write to a string");
    }
    if !body.is_empty() || method == "PUT" {
        write!(head, "content-length: {}\r\n", body.len()).expect("write to a string");
    }
    head += "\r\n";
    let mut stream = connect(address)?;
    stream.write_all(head.as_bytes())?;
    // A server that refuses the request may close before it has read the body; its answer still counts.
    let sent = stream.write_all(body);
    read_response(stream, method == "HEAD").map_err(|error| sent.err().unwrap_or(error))
}

/// Sends `bytes` as they are and reads what comes until the end: for requests that no client would make.
pub fn raw(address: SocketAddr, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = connect(address)?;
    stream.write_all(bytes)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_mins(1)))?;
    stream.set_write_timeout(Some(Duration::from_mins(1)))?;
    Ok(stream)
}

fn read_response(stream: impl Read, bodiless: bool) -> io::Result<Response> {
    let mut reader = BufReader::new(stream);
    let status_line = read_line(&mut reader)?;
    let status = status_line.split(' ').nth(1).and_then(|code| code.parse().ok());
    let status = status.ok_or_else(|| malformed(&status_line))?;
    let mut headers = Vec::new();
    loop {
        let line = read_line(&mut reader)?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':').ok_or_else(|| malformed(&line))?;
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut response = Response { status, headers, body: Vec::new() };
    if bodiless || status == 204 || status == 304 {
        return Ok(response);
    }
    if response.header("transfer-encoding") == Some("chunked") {
        loop {
            let line = read_line(&mut reader)?;
            let length = usize::from_str_radix(&line, 16).map_err(|_| malformed(&line))?;
            let begin = response.body.len();
            response.body.resize(begin + length, 0);
            reader.read_exact(&mut response.body[begin..])?;
            read_line(&mut reader)?;
            if length == 0 {
                return Ok(response);
            }
        }
    }
    if let Some(length) = response.header("content-length").and_then(|length| length.parse().ok()) {
        response.body.resize(length, 0);
        reader.read_exact(&mut response.body)?;
    } else {
        reader.read_to_end(&mut response.body)?;
    }
    Ok(response)
}

fn read_line(reader: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

fn malformed(line: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("malformed answer: {line:?}"))
}

#[test]
fn bodies_are_read_by_length_by_chunks_and_to_the_end() {
    for answer in [
        "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nServer: x\r\n\r\nhello",
    ] {
        let response = read_response(answer.as_bytes(), false).unwrap();
        assert_eq!((response.status, response.text().as_str()), (200, "hello"));
    }
    let cut = read_response(&b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello"[..], false);
    assert_eq!(cut.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    let head = read_response(&b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\n"[..], true).unwrap();
    assert_eq!((head.status, head.header("content-length")), (404, Some("9")));
}
