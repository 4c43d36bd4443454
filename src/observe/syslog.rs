//! The log as syslog datagrams, beside standard error: RFC 3164, to a Unix socket or by UDP.
//!
//! Shell. A syslog daemon that is away, restarts or does not read loses lines and nothing else: a socket
//! that would block is not waited for.

use std::fmt::{self, Write as _};
use std::io;
use std::net::UdpSocket;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use jiff::Zoned;
use jiff::tz::TimeZone;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;

use crate::runtime::{Clock, SystemClock};

/// UDP port of syslog.
const PORT: u16 = 514;
/// A datagram longer than this is cut: daemons take 2048 bytes at least (RFC 5424, section 6.1).
const LONGEST: usize = 2048;

/// Where syslog listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SyslogAddress {
    Socket(PathBuf),
    Host { host: String, port: u16 },
}

/// An address that names neither a socket nor a host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected the path of a socket, or `host:port`")]
pub struct SyslogAddressError;

impl FromStr for SyslogAddress {
    type Err = SyslogAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.starts_with('/') {
            return Ok(Self::Socket(text.into()));
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) => (host, port.parse().map_err(|_| SyslogAddressError)?),
            None => (text, PORT),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() || port == 0 || host.contains('/') {
            return Err(SyslogAddressError);
        }
        Ok(Self::Host { host: host.to_owned(), port })
    }
}

/// A syslog facility.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facility(u8);

/// Python's names for them, which are everybody's.
const FACILITIES: &[(&str, u8)] = &[
    ("kern", 0),
    ("user", 1),
    ("mail", 2),
    ("daemon", 3),
    ("auth", 4),
    ("security", 4),
    ("syslog", 5),
    ("lpr", 6),
    ("news", 7),
    ("uucp", 8),
    ("cron", 9),
    ("authpriv", 10),
    ("ftp", 11),
    ("ntp", 12),
    ("console", 14),
    ("local0", 16),
    ("local1", 17),
    ("local2", 18),
    ("local3", 19),
    ("local4", 20),
    ("local5", 21),
    ("local6", 22),
    ("local7", 23),
];

/// A word that is no facility.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "unknown syslog facility `{0}`; expected `daemon`, `user`, `local0` to `local7` or another of syslog's"
)]
pub struct UnknownFacility(String);

impl FromStr for Facility {
    type Err = UnknownFacility;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = FACILITIES.iter().find(|(name, _)| name.eq_ignore_ascii_case(text));
        found.map(|(_, code)| Self(*code)).ok_or_else(|| UnknownFacility(text.to_owned()))
    }
}

/// Where log lines go to beside standard error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyslogTarget {
    pub address: SyslogAddress,
    pub facility: Facility,
}

/// A process has one log, so this is one value of the process.
static SENDER: Mutex<Option<Sender>> = Mutex::new(None);

/// Sends log lines to `target` from now on; `None` ends it.
pub fn set_syslog(target: Option<SyslogTarget>) {
    let mut sender = SENDER.lock().unwrap_or_else(PoisonError::into_inner);
    if sender.as_ref().map(|sender| &sender.target) != target.as_ref() {
        *sender = target.map(|target| Sender { target, socket: None });
    }
}

#[derive(Debug)]
struct Sender {
    target: SyslogTarget,
    socket: Option<Socket>,
}

#[derive(Debug)]
enum Socket {
    Unix(UnixDatagram),
    Udp(UdpSocket),
}

impl Sender {
    fn send(&mut self, level: Level, text: &str) {
        let host = matches!(self.target.address, SyslogAddress::Host { .. })
            .then(|| rustix::system::uname().nodename().to_string_lossy().into_owned());
        let now = SystemClock.now().to_zoned(TimeZone::system());
        let process = std::process::id();
        let line = datagram(self.target.facility, level, &now, host.as_deref(), process, text);
        // Once more with a new socket: the daemon may have been started again.
        for _ in 0..2 {
            if self.socket.is_none() {
                let Ok(socket) = Socket::open(&self.target.address) else { return };
                self.socket = Some(socket);
            }
            match self.socket.as_ref().map(|socket| socket.send(line.as_bytes())) {
                Some(Err(error)) if error.kind() != io::ErrorKind::WouldBlock => self.socket = None,
                _ => return,
            }
        }
    }
}

impl Socket {
    fn open(address: &SyslogAddress) -> io::Result<Self> {
        match address {
            SyslogAddress::Socket(path) => {
                let socket = UnixDatagram::unbound()?;
                socket.connect(path)?;
                socket.set_nonblocking(true)?;
                Ok(Self::Unix(socket))
            }
            SyslogAddress::Host { host, port } => {
                let any = if host.contains(':') { "[::]:0" } else { "0.0.0.0:0" };
                let socket = UdpSocket::bind(any)?;
                socket.connect((host.as_str(), *port))?;
                socket.set_nonblocking(true)?;
                Ok(Self::Udp(socket))
            }
        }
    }

    fn send(&self, line: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(socket) => socket.send(line),
            Self::Udp(socket) => socket.send(line),
        }
    }
}

/// `<PRI>Mmm dd hh:mm:ss HOST pgkeep[PID]: LEVEL text`; a local socket's daemon knows the host by itself.
fn datagram(
    facility: Facility,
    level: Level,
    now: &Zoned,
    host: Option<&str>,
    process: u32,
    text: &str,
) -> String {
    let severity = match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    };
    let priority = facility.0 * 8 + severity;
    let time = now.strftime("%b %e %H:%M:%S");
    let host = host.map(|host| format!("{host} ")).unwrap_or_default();
    let mut line = format!("<{priority}>{time} {host}pgkeep[{process}]: {level} {text}");
    line.truncate(line.floor_char_boundary(LONGEST));
    line
}

/// The part of the log that goes to syslog, when it is switched on.
#[derive(Debug)]
pub(super) struct SyslogLayer;

impl<S: Subscriber> Layer<S> for SyslogLayer {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        // Nothing below logs, so this thread cannot hold it already.
        let mut sender = SENDER.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(sender) = sender.as_mut() else { return };
        let mut text = Text::default();
        event.record(&mut text);
        sender.send(*event.metadata().level(), &format!("{}{}", text.message, text.fields));
    }
}

/// An event as one line: the message, then its fields.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let value = format!("{value:?}").replace(['\n', '\r'], " ");
        if field.name() == "message" {
            self.message = value;
        } else {
            let _ = write!(self.fields, " {}={value}", field.name());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(host: Option<&str>, level: Level, text: &str) -> String {
        let now = "2026-11-05T07:08:09+00:00[UTC]".parse().unwrap();
        datagram("local2".parse().unwrap(), level, &now, host, 42, text)
    }

    #[test]
    fn a_datagram_is_what_rfc_3164_says() {
        assert_eq!(
            line(None, Level::INFO, "pgkeep runs"),
            "<150>Nov  5 07:08:09 pgkeep[42]: INFO pgkeep runs"
        );
        assert_eq!(line(Some("db1"), Level::ERROR, "x"), "<147>Nov  5 07:08:09 db1 pgkeep[42]: ERROR x");
        // Cut between letters, never within one.
        assert_eq!(line(None, Level::WARN, &"ü".repeat(5000)).len(), LONGEST);
        assert_eq!(line(None, Level::WARN, &format!("u{}", "ü".repeat(5000))).len(), LONGEST - 1);
    }

    #[test]
    fn addresses_are_sockets_or_hosts() {
        let host = |host: &str, port| Ok(SyslogAddress::Host { host: host.to_owned(), port });
        assert_eq!("/dev/log".parse(), Ok(SyslogAddress::Socket("/dev/log".into())));
        assert_eq!("logs:5514".parse(), host("logs", 5514));
        assert_eq!("logs".parse(), host("logs", 514));
        assert_eq!("[::1]:514".parse(), host("::1", 514));
        for wrong in ["", ":514", "logs:x", "logs:0", "run/log"] {
            assert_eq!(wrong.parse::<SyslogAddress>(), Err(SyslogAddressError), "{wrong}");
        }
    }

    #[test]
    fn facilities_are_known_by_their_names() {
        assert_eq!("LOCAL2".parse(), Ok(Facility(18)));
        assert!("local8".parse::<Facility>().is_err());
    }
}
