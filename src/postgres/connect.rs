//! From a [`ConnInfo`] to a [`Connection`]: which host, which address, with or without TLS.
//!
//! Shell. [`Connector`] is the seam: [`Network`] opens real byte streams, a test opens pipes. What is
//! tried in which order, and when a failure means "try the next", is the same for both and follows libpq.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::BytesMut;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream, lookup_host};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use super::auth::Authenticator;
use super::connection::{Connection, Login, Mode};
use super::conninfo::{ConnInfo, DEFAULT_SOCKET_DIRECTORIES, Host, SslMode, TargetSession};
use super::error::{Error, Knock};
use super::passfile::password_for;
use super::tls;
use super::wire::frontend;
use crate::secret::Secret;

/// A byte stream to a server, whatever it is made of.
pub type ByteStream = Box<dyn Duplex>;

/// What a byte stream must be able to do.
pub trait Duplex: AsyncRead + AsyncWrite + Send + Sync + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Sync + Unpin> Duplex for T {}

/// An open byte stream to one host.
pub struct Link {
    pub stream: ByteStream,
    /// Our own address; `None` on a Unix socket.
    pub local: Option<IpAddr>,
    pub is_encrypted: bool,
    /// The channel binding `tls-server-end-point` of the server's certificate.
    pub end_point: Option<Vec<u8>>,
}

/// Whether to encrypt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encryption {
    Off,
    /// If the server can.
    Offered,
    Required,
}

/// Opens byte streams.
#[async_trait]
pub trait Connector: Send + Sync {
    /// Opens a stream to one host and finishes the TLS handshake, but says nothing of PostgreSQL's startup.
    ///
    /// # Errors
    /// [`Error::Unreachable`], [`Error::TlsRefused`], [`Error::Tls`].
    async fn open(&self, info: &ConnInfo, host: &Host, encryption: Encryption) -> Result<Link, Error>;
}

/// TCP, Unix sockets and TLS.
#[derive(Clone, Copy, Debug, Default)]
pub struct Network;

#[async_trait]
impl Connector for Network {
    async fn open(&self, info: &ConnInfo, host: &Host, encryption: Encryption) -> Result<Link, Error> {
        let unreachable = |source| Error::Unreachable { place: host.to_string(), source };
        if let Some(path) = host.socket() {
            let stream = match path.strip_prefix('@') {
                None => UnixStream::connect(&path).await,
                // Tokio takes a leading zero byte for an abstract name.
                Some(name) => UnixStream::connect(format!("\0{name}")).await,
            };
            let stream: ByteStream = Box::new(stream.map_err(unreachable)?);
            return Ok(Link { stream, local: None, is_encrypted: false, end_point: None });
        }
        let stream = open_tcp(host).await.map_err(unreachable)?;
        tune(&stream, info).map_err(unreachable)?;
        let local = stream.local_addr().ok().map(|address| address.ip().to_canonical());
        if encryption == Encryption::Off {
            return Ok(Link { stream: Box::new(stream), local, is_encrypted: false, end_point: None });
        }
        encrypt(stream, info, host, encryption, local).await
    }
}

/// Tries every address of the host in the resolver's order.
async fn open_tcp(host: &Host) -> io::Result<TcpStream> {
    let addresses: Vec<_> = match host.address {
        Some(address) => vec![(address, host.port).into()],
        None => lookup_host((host.name.as_str(), host.port)).await?.collect(),
    };
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in addresses {
        match TcpStream::connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// Makes sure that a peer which vanished is noticed.
fn tune(stream: &TcpStream, info: &ConnInfo) -> io::Result<()> {
    stream.set_nodelay(true)?;
    if let Some(keepalive) = info.keepalive() {
        sockopt::set_socket_keepalive(stream, true)?;
        if let Some(idle) = keepalive.idle {
            sockopt::set_tcp_keepidle(stream, idle)?;
        }
        if let Some(interval) = keepalive.interval {
            sockopt::set_tcp_keepintvl(stream, interval)?;
        }
        if let Some(count) = keepalive.count {
            sockopt::set_tcp_keepcnt(stream, count)?;
        }
    }
    if let Some(timeout) = info.tcp_user_timeout() {
        let milliseconds = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        sockopt::set_tcp_user_timeout(stream, milliseconds)?;
    }
    Ok(())
}

async fn encrypt(
    mut stream: TcpStream,
    info: &ConnInfo,
    host: &Host,
    encryption: Encryption,
    local: Option<IpAddr>,
) -> Result<Link, Error> {
    let place = host.to_string();
    let mode = info.ssl_mode();
    let broke = |source| Error::Unreachable { place: host.to_string(), source };
    let failed = |reason: String| Error::Tls { place: host.to_string(), mode, reason };
    let config = tls::client_config(info).map_err(failed)?;
    let mut request = BytesMut::new();
    frontend::tls_request(&mut request);
    stream.write_all(&request).await.map_err(broke)?;
    // Exactly one byte, unbuffered: anything an attacker put after it goes into the handshake and fails.
    match stream.read_u8().await.map_err(broke)? {
        b'S' => {}
        b'N' if encryption == Encryption::Offered => {
            return Ok(Link { stream: Box::new(stream), local, is_encrypted: false, end_point: None });
        }
        b'N' => return Err(Error::TlsRefused { place, mode }),
        other => return Err(failed(format!("answer `{}` to the request", char::from(other)))),
    }
    let peer = stream.peer_addr().map_err(broke)?.ip();
    let name = if host.name.is_empty() {
        ServerName::from(peer)
    } else {
        // A name that cannot be in a certificate matters to `verify-full` only, which then fails.
        ServerName::try_from(host.name.clone()).unwrap_or_else(|_| ServerName::from(peer))
    };
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(|error| {
        match error.kind() {
            io::ErrorKind::InvalidData => failed(error.to_string()),
            // The network's fault, not that of keys and certificates.
            _ => broke(error),
        }
    })?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let end_point = certificate.and_then(|certificate| tls::server_end_point(certificate));
    Ok(Link { stream: Box::new(stream), local, is_encrypted: true, end_point })
}

impl Connection {
    /// Connects and authenticates: the hosts in order, each with the encryption its `sslmode` allows,
    /// until one lets us in and is what `target_session_attrs` asks for.
    ///
    /// # Errors
    /// That of the last host tried.
    pub async fn open(connector: &dyn Connector, info: &ConnInfo, mode: Mode) -> Result<Self, Error> {
        let hosts = match info.hosts() {
            hosts if hosts.is_empty() => vec![default_host(info)],
            hosts => hosts,
        };
        let wanted = info.target_session();
        // `prefer-standby` takes anything on its second round.
        let rounds = match wanted {
            TargetSession::PreferStandby => &[TargetSession::Standby, TargetSession::Any][..],
            ref wanted => std::slice::from_ref(wanted),
        };
        let mut failure = None;
        let attempts: Vec<(TargetSession, &Host)> =
            rounds.iter().flat_map(|round| hosts.iter().map(|host| (*round, host))).collect();
        for (round, host) in attempts {
            let connection = match open_host(connector, info, host, mode).await {
                Ok(connection) => connection,
                // The same name and password would be refused elsewhere too, and lock an account.
                Err(error @ (Error::Password { .. } | Error::Auth { .. })) => return Err(error),
                Err(error) => {
                    failure = Some(error);
                    continue;
                }
            };
            match suited(connection, round, host).await {
                Ok(connection) => return Ok(connection),
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.unwrap_or_else(|| Error::Protocol("no host to connect to".to_owned())))
    }
}

/// The connection, if the server is what is wanted.
async fn suited(mut connection: Connection, wanted: TargetSession, host: &Host) -> Result<Connection, Error> {
    let suits = match wanted {
        TargetSession::Any => true,
        TargetSession::Primary => !connection.is_standby().await?,
        TargetSession::Standby | TargetSession::PreferStandby => connection.is_standby().await?,
        TargetSession::ReadWrite => connection.show("transaction_read_only").await? == "off",
        TargetSession::ReadOnly => connection.show("transaction_read_only").await? == "on",
    };
    if suits { Ok(connection) } else { Err(Error::OtherSession { place: host.to_string() }) }
}

/// The first default directory that has the socket, else this machine over TCP.
fn default_host(info: &ConnInfo) -> Host {
    let host = |name: &str| Host { name: name.to_owned(), address: None, port: info.default_port() };
    DEFAULT_SOCKET_DIRECTORIES
        .iter()
        .map(|directory| host(directory))
        .find(|host| host.socket().is_some_and(|path| Path::new(&path).exists()))
        .unwrap_or_else(|| host("localhost"))
}

async fn open_host(
    connector: &dyn Connector,
    info: &ConnInfo,
    host: &Host,
    mode: Mode,
) -> Result<Connection, Error> {
    let first = match info.ssl_mode() {
        _ if host.socket().is_some() => Encryption::Off,
        SslMode::Disable | SslMode::Allow => Encryption::Off,
        SslMode::Prefer => Encryption::Offered,
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => Encryption::Required,
    };
    match attempt(connector, info, host, mode, first).await {
        // `pg_hba.conf` may want it the other way round (`hostssl`, `hostnossl`); so does libpq.
        Err(Error::NoPgHba { .. }) if info.ssl_mode() == SslMode::Allow && host.socket().is_none() => {
            attempt(connector, info, host, mode, Encryption::Required).await
        }
        Err(Error::NoPgHba { .. } | Error::Tls { .. }) if first == Encryption::Offered => {
            attempt(connector, info, host, mode, Encryption::Off).await
        }
        outcome => outcome,
    }
}

async fn attempt(
    connector: &dyn Connector,
    info: &ConnInfo,
    host: &Host,
    mode: Mode,
    encryption: Encryption,
) -> Result<Connection, Error> {
    let attempt = async {
        let link = connector.open(info, host, encryption).await?;
        let user = info.user().map_or_else(os_user, str::to_owned);
        let database = match (mode, info.database()) {
            (Mode::Physical, _) => "replication",
            // PGHoard's examples name the keyword of `pg_hba.conf` here; no database is called that.
            (Mode::Database, None | Some("replication")) => "postgres",
            (Mode::Database, Some(database)) => database,
        };
        let knock = Knock { place: host.to_string(), user, database: database.to_owned(), local: link.local };
        let password = match info.password() {
            Some(password) => Some(password.clone()),
            None => info.passfile().and_then(|file| from_passfile(&file, host, &knock)),
        };
        let authenticator = Authenticator::new(
            &knock.user,
            password,
            info.channel_binding(),
            link.is_encrypted,
            link.end_point,
        );
        let login = Login {
            knock: &knock,
            mode,
            application_name: info.application_name(),
            options: info.options(),
            authenticator,
        };
        Connection::start(link.stream, login).await
    };
    match info.connect_timeout() {
        None => attempt.await,
        Some(limit) => {
            tokio::time::timeout(limit, attempt).await.unwrap_or_else(|_| Err(timed_out(host, limit)))
        }
    }
}

fn timed_out(host: &Host, limit: Duration) -> Error {
    Error::ConnectTimeout { place: host.to_string(), seconds: limit.as_secs() }
}

/// A password from a password file, which is ignored, as libpq does, when others may read it.
fn from_passfile(file: &Path, host: &Host, knock: &Knock) -> Option<Secret> {
    let metadata = fs::metadata(file).ok().filter(fs::Metadata::is_file)?;
    if metadata.permissions().mode() & 0o077 != 0 {
        tracing::warn!(file = %file.display(), "password file ignored: others may read it, chmod it to 0600");
        return None;
    }
    password_for(&fs::read_to_string(file).ok()?, host, &knock.database, &knock.user)
}

/// The name of the user this process runs as, libpq's default; its number when it has none.
fn os_user() -> String {
    let number = rustix::process::getuid().as_raw().to_string();
    let accounts = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let name = accounts.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == number).then(|| name.to_owned())
    });
    name.unwrap_or(number)
}
