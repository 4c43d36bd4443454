//! What can go wrong between us and a server, by consequence.
//!
//! Pure. Decided by SQLSTATE wherever there is one, because servers translate their texts.

use std::io;
use std::net::IpAddr;

use super::auth::AuthError;
use super::conninfo::{ConnInfoError, SslMode};
use super::replication::SlotName;
use super::wire::{ServerError, WireError};

/// Oldest major version of PostgreSQL that pgkeep works with.
pub const OLDEST_MAJOR: u32 = 13;

/// A failed connection or command. [`Error::is_transient`] says whether the same may work later,
/// [`Error::hint`] what an operator can do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("connection parameters are wrong")]
    ConnInfo(#[from] ConnInfoError),
    /// Name lookup, routing, nothing listening.
    #[error("cannot reach PostgreSQL at `{place}`")]
    Unreachable { place: String, source: io::Error },
    #[error("PostgreSQL at `{place}` did not let us in within {seconds} s")]
    ConnectTimeout { place: String, seconds: u64 },
    #[error("PostgreSQL at `{place}` does not offer TLS, which `sslmode={mode}` demands")]
    TlsRefused { place: String, mode: SslMode },
    /// Certificates, keys and the handshake.
    #[error("TLS with PostgreSQL at `{place}` failed (`sslmode={mode}`): {reason}")]
    Tls { place: String, mode: SslMode, reason: String },

    /// 28P01
    #[error("PostgreSQL at `{place}` refuses the password of user `{user}`")]
    Password { place: String, user: String, source: Box<ServerError> },
    /// No line of `pg_hba.conf` lets us in; `line` is the one that would.
    #[error("PostgreSQL at `{place}` has no `pg_hba.conf` line that lets user `{user}` in")]
    NoPgHba { place: String, user: String, line: String, source: Box<ServerError> },
    #[error("user `{user}` of PostgreSQL at `{place}` lacks the REPLICATION attribute")]
    NotReplicationRole { place: String, user: String, source: Box<ServerError> },
    /// Any other refusal of the server before it let us in: starting up, shutting down, full.
    #[error("PostgreSQL at `{place}` does not let user `{user}` in")]
    Refused { place: String, user: String, source: Box<ServerError> },
    /// No agreement on how to identify ourselves.
    #[error("authentication of user `{user}` at `{place}` failed")]
    Auth { place: String, user: String, source: AuthError },
    #[error("PostgreSQL {version} at `{place}` is too old; pgkeep needs {OLDEST_MAJOR} or later")]
    TooOld { place: String, version: String },
    /// `target_session_attrs` asks for another kind of server.
    #[error("PostgreSQL at `{place}` is not what `target_session_attrs` asks for")]
    OtherSession { place: String },

    /// The server has recycled the WAL that we asked for: there is a gap.
    #[error("server has already removed the WAL asked for")]
    WalRemoved(#[source] Box<ServerError>),
    /// We hold WAL that the server does not have (yet, or any more).
    #[error("server has not written the WAL asked for yet")]
    AheadOfServer(#[source] Box<ServerError>),
    /// The server's past does not contain the position we asked for.
    #[error("position asked for is not in the history of this server")]
    NotInHistory(#[source] Box<ServerError>),
    #[error("replication slot `{0}` is in use by another connection")]
    SlotInUse(SlotName, #[source] Box<ServerError>),
    #[error("replication slot `{0}` does not exist")]
    SlotMissing(SlotName, #[source] Box<ServerError>),
    #[error("replication slot `{0}` exists already")]
    SlotExists(SlotName, #[source] Box<ServerError>),
    /// The slot has let WAL go and cannot be used any more.
    #[error("replication slot `{0}` was invalidated by the server")]
    SlotInvalidated(SlotName, #[source] Box<ServerError>),

    /// Anything else the server refuses.
    #[error("PostgreSQL refused `{command}`")]
    Server { command: String, source: Box<ServerError> },
    #[error("connection to PostgreSQL broke")]
    Io(#[source] io::Error),
    /// The end of the stream where more was due: a crash, a `wal_sender_timeout`, a proxy.
    #[error("PostgreSQL closed the connection")]
    Closed,
    #[error("answer of PostgreSQL is malformed")]
    Wire(#[from] WireError),
    #[error("unexpected answer of PostgreSQL: {0}")]
    Protocol(String),
}

impl Error {
    /// Whether the same attempt may succeed later without anybody's help.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. }
            | Self::ConnectTimeout { .. }
            | Self::OtherSession { .. }
            | Self::AheadOfServer(_)
            | Self::SlotInUse(..)
            | Self::Io(_)
            | Self::Closed => true,
            Self::Refused { source, .. } | Self::Server { source, .. } => is_transient_code(&source.code),
            _ => false,
        }
    }

    /// What the server itself said, if it did.
    pub fn server_error(&self) -> Option<&ServerError> {
        match self {
            Self::Password { source, .. }
            | Self::NoPgHba { source, .. }
            | Self::NotReplicationRole { source, .. }
            | Self::Refused { source, .. }
            | Self::WalRemoved(source)
            | Self::AheadOfServer(source)
            | Self::NotInHistory(source)
            | Self::SlotInUse(_, source)
            | Self::SlotMissing(_, source)
            | Self::SlotExists(_, source)
            | Self::SlotInvalidated(_, source)
            | Self::Server { source, .. } => Some(source),
            _ => None,
        }
    }

    /// The SQLSTATE, if the server gave one.
    pub fn code(&self) -> Option<&str> {
        self.server_error().map(|error| error.code.as_str())
    }

    /// The operator's next step, where there is an obvious one.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unreachable { place, source } => Some(match source.kind() {
                io::ErrorKind::ConnectionRefused if place.starts_with('/') => {
                    "no server listens on this socket; is PostgreSQL running, and is this its \
                     `unix_socket_directories` and port?"
                        .to_owned()
                }
                io::ErrorKind::ConnectionRefused => {
                    "no server listens there; is PostgreSQL running, do `listen_addresses` and the port fit?"
                        .to_owned()
                }
                io::ErrorKind::NotFound => {
                    "the socket does not exist; check PostgreSQL's `unix_socket_directories` and port".to_owned()
                }
                _ if is_lookup_failure(source) => {
                    "check `host`: this machine finds no address for that name".to_owned()
                }
                _ => return None,
            }),
            Self::SlotInUse(..) => Some(
                "another agent, or pg_receivewal, streams from it: one agent per site; `pg_stat_replication` on \
                 the server tells whose it is"
                    .to_owned(),
            ),
            Self::TlsRefused { .. } => {
                Some("set `ssl = on` on the server, or use another `sslmode`".to_owned())
            }
            Self::Tls { mode: SslMode::VerifyCa | SslMode::VerifyFull, .. } => {
                Some("`sslrootcert` names the certificates to trust; `system` takes this machine's".to_owned())
            }
            Self::Password { .. } | Self::Auth { source: AuthError::NoPassword, .. } => Some(
                "check `password`, `PGPASSWORD` and the password file (whose database field is `replication`)"
                    .to_owned(),
            ),
            Self::NoPgHba { line, .. } => {
                Some(format!("add to the server's `pg_hba.conf` and reload it: {line}"))
            }
            Self::NotReplicationRole { user, .. } => {
                Some(format!("ALTER ROLE {} REPLICATION", quote_identifier(user)))
            }
            Self::Refused { source, .. } if source.code == "53300" => {
                Some("raise `max_wal_senders` or `max_connections` on the server".to_owned())
            }
            Self::Server { source, .. } if source.code == "53400" => {
                Some("raise `max_replication_slots` on the server".to_owned())
            }
            _ => self.server_error().and_then(|error| error.hint.clone()),
        }
    }
}

/// The system's resolver has no error number for us, only its text.
fn is_lookup_failure(error: &io::Error) -> bool {
    error.raw_os_error().is_none() && error.to_string().contains("lookup address")
}

/// Shutting down or starting up (57P01 to 57P03), out of resources (53), broken connections (08), and
/// transactions that were in each other's way (40).
fn is_transient_code(code: &str) -> bool {
    matches!(code, "57P01" | "57P02" | "57P03")
        || ["53", "08", "40"].iter().any(|class| code.starts_with(class))
}

/// Who knocked where, to say so when the door stays shut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Knock {
    pub place: String,
    pub user: String,
    /// The database field of the `pg_hba.conf` line: `replication` or a database's name.
    pub database: String,
    /// Our own address; `None` on a Unix socket.
    pub local: Option<IpAddr>,
}

impl Knock {
    /// Sorts what the server said before it let us in.
    pub fn refused(&self, error: ServerError) -> Error {
        let (place, user) = (self.place.clone(), self.user.clone());
        let source = Box::new(error);
        match source.code.as_str() {
            "28P01" => Error::Password { place, user, source },
            // The file's name stands in the text of every language.
            "28000" if source.message.contains("pg_hba.conf") => {
                Error::NoPgHba { place, user, line: self.pg_hba_line(&source.message), source }
            }
            "42501" => Error::NotReplicationRole { place, user, source },
            _ => Error::Refused { place, user, source },
        }
    }

    /// The `pg_hba.conf` line that would let us in. The server's message quotes our address as the server
    /// sees it, behind any address translation; our own is the second choice.
    fn pg_hba_line(&self, message: &str) -> String {
        let seen = message.split(['"', '«', '»', '„', '“', '”', '\'']).find_map(|part| part.parse().ok());
        let (database, user) = (&self.database, quote_identifier(&self.user));
        match seen.or(self.local) {
            Some(address) => {
                let address: IpAddr = address;
                let bits = if address.is_ipv4() { 32 } else { 128 };
                format!("host {database} {user} {address}/{bits} scram-sha-256")
            }
            None => format!("local {database} {user} scram-sha-256"),
        }
    }
}

/// A name as SQL and `pg_hba.conf` take it: bare where possible.
pub(super) fn quote_identifier(name: &str) -> String {
    let plain = name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
    if plain { name.to_owned() } else { format!("\"{}\"", name.replace('"', "\"\"")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(code: &str, message: &str) -> ServerError {
        ServerError { code: code.into(), message: message.into(), ..ServerError::default() }
    }

    fn knock(local: Option<&str>) -> Knock {
        Knock {
            place: "db1:5432".into(),
            user: "backup".into(),
            database: "replication".into(),
            local: local.map(|address| address.parse().unwrap()),
        }
    }

    #[test]
    fn the_missing_pg_hba_line_is_spelled_out() {
        let message = "no pg_hba.conf entry for replication connection from host \"10.0.0.5\", user \"backup\", no encryption";
        let hint = knock(Some("192.168.1.1")).refused(server("28000", message)).hint().unwrap();
        assert!(hint.ends_with("host replication backup 10.0.0.5/32 scram-sha-256"), "{hint}");
        let hint = knock(Some("fd00::1")).refused(server("28000", "pg_hba.conf …")).hint().unwrap();
        assert!(hint.ends_with("host replication backup fd00::1/128 scram-sha-256"), "{hint}");
        let hint = knock(None).refused(server("28000", "… \"[local]\" pg_hba.conf")).hint().unwrap();
        assert!(hint.ends_with("local replication backup scram-sha-256"), "{hint}");
    }

    #[test]
    fn refusals_are_told_apart() {
        let refused = |code, message| knock(None).refused(server(code, message));
        assert!(matches!(refused("28P01", "x"), Error::Password { .. }));
        let role = refused("42501", "permission denied to start WAL sender");
        assert_eq!(role.hint().unwrap(), "ALTER ROLE backup REPLICATION");
        assert!(!role.is_transient());
        assert!(refused("57P03", "the database system is starting up").is_transient());
        assert!(refused("53300", "too many").is_transient());
        assert!(!refused("28000", "role \"backup\" does not exist").is_transient());
    }

    #[test]
    fn names_are_quoted_only_where_needed() {
        assert_eq!(quote_identifier("backup_1"), "backup_1");
        assert_eq!(quote_identifier("Back\"up"), "\"Back\"\"up\"");
        assert_eq!(quote_identifier(""), "\"\"");
    }
}
