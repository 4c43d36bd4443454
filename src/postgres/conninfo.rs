//! How to reach a server: libpq's connection strings and environment.
//!
//! Pure: the environment is a function. Both forms of connection string are
//! read (`host=db1 user=backup` and `postgres://backup@db1`), with libpq's keywords, quoting and
//! defaults, so that a string that works with `psql` works here. A keyword that is not known is an error
//! and never ignored, because it may be the one that matters for security.

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use crate::secret::Secret;

/// Where to connect, as who, and how. Fields that were not given are `None` until their default is asked
/// for by the method of the same name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnInfo {
    hosts: Vec<String>,
    addresses: Vec<Option<IpAddr>>,
    ports: Vec<u16>,
    user: Option<String>,
    password: Option<Secret>,
    passfile: Option<PathBuf>,
    database: Option<String>,
    ssl_mode: Option<SslMode>,
    ssl_root_cert: Option<RootCert>,
    ssl_cert: Option<PathBuf>,
    ssl_key: Option<PathBuf>,
    ssl_password: Option<Secret>,
    ssl_sni: Option<bool>,
    connect_timeout: Option<u64>,
    application_name: Option<String>,
    options: Option<String>,
    keepalives: Option<bool>,
    keepalives_idle: Option<u32>,
    keepalives_interval: Option<u32>,
    keepalives_count: Option<u32>,
    tcp_user_timeout: Option<u32>,
    target_session: Option<TargetSession>,
    channel_binding: Option<ChannelBindingPolicy>,
    home: Option<PathBuf>,
}

/// One place where a server may listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// A host name, an address, or the directory of a Unix socket.
    pub name: String,
    /// `hostaddr`: connect here without looking `name` up.
    pub address: Option<IpAddr>,
    pub port: u16,
}

impl Host {
    /// The socket's path when this is a Unix socket's directory. `@` begins an abstract one.
    pub fn socket(&self) -> Option<String> {
        let is_socket = self.address.is_none() && self.name.starts_with(['/', '@']);
        is_socket.then(|| format!("{}/.s.PGSQL.{}", self.name.trim_end_matches('/'), self.port))
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.socket(), self.address) {
            (Some(socket), _) => f.write_str(&socket),
            (None, Some(address)) if self.name.is_empty() => write_place(f, &address.to_string(), self.port),
            (None, _) => write_place(f, &self.name, self.port),
        }
    }
}

fn write_place(f: &mut fmt::Formatter<'_>, host: &str, port: u16) -> fmt::Result {
    if host.contains(':') { write!(f, "[{host}]:{port}") } else { write!(f, "{host}:{port}") }
}

/// `sslmode`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SslMode {
    Disable,
    Allow,
    #[default]
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl fmt::Display for SslMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disable => "disable",
            Self::Allow => "allow",
            Self::Prefer => "prefer",
            Self::Require => "require",
            Self::VerifyCa => "verify-ca",
            Self::VerifyFull => "verify-full",
        })
    }
}

/// `sslrootcert`
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RootCert {
    /// Whatever this machine trusts.
    System,
    File(PathBuf),
}

/// `target_session_attrs`: which server of several will do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TargetSession {
    #[default]
    Any,
    ReadWrite,
    ReadOnly,
    Primary,
    Standby,
    PreferStandby,
}

/// `channel_binding`: whether the password exchange must be tied to the TLS session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ChannelBindingPolicy {
    Disable,
    #[default]
    Prefer,
    Require,
}

/// TCP keepalive, each in whole seconds; `None` leaves it to the operating system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    pub idle: Option<Duration>,
    pub interval: Option<Duration>,
    pub count: Option<u32>,
}

/// A connection string that libpq would refuse too, or a setting that pgkeep does not know.
///
/// Values are shown only where they cannot be a secret.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnInfoError {
    #[error("`{0}` is not a connection parameter")]
    UnknownKeyword(String),
    #[error("connection parameter `{0}` is not supported")]
    Unsupported(String),
    #[error("connection parameter `{keyword}` cannot be `{value}`; it takes {expected}")]
    Value { keyword: &'static str, value: String, expected: &'static str },
    #[error("connection string lacks `=` after `{0}`")]
    NoEquals(String),
    #[error("connection string has an unterminated quote in the value of `{0}`")]
    Quote(String),
    #[error("connection URI has a `%` that is not followed by two hex digits of a byte other than zero")]
    Percent,
    #[error("connection URI has no `]` after its IPv6 address")]
    Bracket,
    #[error("{hosts} hosts do not go with {others} values of `{keyword}`")]
    Count { hosts: usize, others: usize, keyword: &'static str },
}

impl ConnInfo {
    /// Takes libpq's environment variables, and `HOME`, from `lookup`.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, ConnInfoError> {
        const VARIABLES: [(&str, &str); 17] = [
            ("PGHOST", "host"),
            ("PGHOSTADDR", "hostaddr"),
            ("PGPORT", "port"),
            ("PGUSER", "user"),
            ("PGPASSWORD", "password"),
            ("PGPASSFILE", "passfile"),
            ("PGDATABASE", "dbname"),
            ("PGSSLMODE", "sslmode"),
            ("PGSSLROOTCERT", "sslrootcert"),
            ("PGSSLCERT", "sslcert"),
            ("PGSSLKEY", "sslkey"),
            ("PGSSLSNI", "sslsni"),
            ("PGCONNECT_TIMEOUT", "connect_timeout"),
            ("PGAPPNAME", "application_name"),
            ("PGOPTIONS", "options"),
            ("PGTARGETSESSIONATTRS", "target_session_attrs"),
            ("PGCHANNELBINDING", "channel_binding"),
        ];
        let mut info = Self::default();
        for (variable, keyword) in VARIABLES {
            if let Some(value) = lookup(variable) {
                info.set(keyword, &value)?;
            }
        }
        info.home = lookup("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
        info.check()?;
        Ok(info)
    }

    /// Sets one parameter by libpq's name of it. An empty value means "not given", as with libpq.
    ///
    /// This checks the one value only; [`ConnInfo::check`] also compares the counts of hosts and ports.
    pub fn set(&mut self, keyword: &str, value: &str) -> Result<(), ConnInfoError> {
        let given = || (!value.is_empty()).then(|| value.to_owned());
        let path = || given().map(PathBuf::from);
        match keyword {
            "host" => self.hosts = list(value).map(str::to_owned).collect(),
            "hostaddr" => {
                self.addresses = list(value)
                    .map(|address| match address {
                        "" => Ok(None),
                        address => address.parse().map(Some).map_err(|_| ConnInfoError::Value {
                            keyword: "hostaddr",
                            value: address.to_owned(),
                            expected: "IP addresses",
                        }),
                    })
                    .collect::<Result<_, _>>()?;
            }
            "port" => {
                self.ports = list(value)
                    .map(|port| match port {
                        "" => Ok(DEFAULT_PORT),
                        port => {
                            port.trim().parse().ok().filter(|&port| port != 0).ok_or(ConnInfoError::Value {
                                keyword: "port",
                                value: port.to_owned(),
                                expected: "numbers from 1 to 65535",
                            })
                        }
                    })
                    .collect::<Result<_, _>>()?;
            }
            "user" => self.user = given(),
            "password" => self.password = given().map(Secret::new),
            "passfile" => self.passfile = path(),
            "dbname" => self.database = given(),
            "connect_timeout" => self.connect_timeout = number("connect_timeout", value)?,
            "application_name" => self.application_name = given(),
            "fallback_application_name" => {
                if self.application_name.is_none() {
                    self.application_name = given();
                }
            }
            "options" => self.options = given(),
            "keepalives"
            | "keepalives_idle"
            | "keepalives_interval"
            | "keepalives_count"
            | "tcp_user_timeout" => self.set_tcp(keyword, value)?,
            "sslmode" | "sslrootcert" | "sslcert" | "sslkey" | "sslpassword" | "sslsni"
            | "sslnegotiation" | "channel_binding" => self.set_tls(keyword, value)?,
            "target_session_attrs" => {
                self.target_session = choice(
                    "target_session_attrs",
                    value,
                    &TARGET_SESSIONS,
                    "any, read-write, read-only, primary, standby or prefer-standby",
                )?;
            }
            "gssencmode" => {
                choice(
                    "gssencmode",
                    value,
                    &[("disable", ()), ("prefer", ())],
                    "disable or prefer: pgkeep speaks no GSSAPI",
                )?;
            }
            // We set these ourselves, or they mean nothing to a replication connection.
            "replication" | "client_encoding" | "sslcompression" | "krbsrvname" | "gsslib"
            | "gssdelegation" | "load_balance_hosts" => {}
            // Settings that restrict whom to trust: doing without them silently would be a lie.
            "requirepeer"
            | "require_auth"
            | "sslcrl"
            | "sslcrldir"
            | "sslcertmode"
            | "service"
            | "ssl_min_protocol_version"
            | "ssl_max_protocol_version"
            | "scram_client_key"
            | "scram_server_key" => {
                if !value.is_empty() {
                    return Err(ConnInfoError::Unsupported(keyword.to_owned()));
                }
            }
            other => return Err(ConnInfoError::UnknownKeyword(other.to_owned())),
        }
        Ok(())
    }

    fn set_tcp(&mut self, keyword: &str, value: &str) -> Result<(), ConnInfoError> {
        match keyword {
            "keepalives" => self.keepalives = choice("keepalives", value, &SWITCH, "0 or 1")?,
            "keepalives_idle" => self.keepalives_idle = number("keepalives_idle", value)?,
            "keepalives_interval" => self.keepalives_interval = number("keepalives_interval", value)?,
            "keepalives_count" => self.keepalives_count = number("keepalives_count", value)?,
            "tcp_user_timeout" => self.tcp_user_timeout = number("tcp_user_timeout", value)?,
            other => return Err(ConnInfoError::UnknownKeyword(other.to_owned())),
        }
        Ok(())
    }

    fn set_tls(&mut self, keyword: &str, value: &str) -> Result<(), ConnInfoError> {
        let given = || (!value.is_empty()).then(|| value.to_owned());
        let path = || given().map(PathBuf::from);
        match keyword {
            "sslmode" => {
                self.ssl_mode = choice(
                    "sslmode",
                    value,
                    &SSL_MODES,
                    "disable, allow, prefer, require, verify-ca or verify-full",
                )?;
            }
            "sslrootcert" => {
                self.ssl_root_cert = match value {
                    "" => None,
                    "system" => Some(RootCert::System),
                    file => Some(RootCert::File(file.into())),
                }
            }
            "sslcert" => self.ssl_cert = path(),
            "sslkey" => self.ssl_key = path(),
            "sslpassword" => self.ssl_password = given().map(Secret::new),
            "sslsni" => self.ssl_sni = choice("sslsni", value, &SWITCH, "0 or 1")?,
            "channel_binding" => {
                self.channel_binding =
                    choice("channel_binding", value, &CHANNEL_BINDINGS, "disable, prefer or require")?;
            }
            "sslnegotiation" => {
                choice("sslnegotiation", value, &[("postgres", ())], "postgres only")?;
            }
            other => return Err(ConnInfoError::UnknownKeyword(other.to_owned())),
        }
        Ok(())
    }

    /// Whether the lists of hosts, addresses and ports go together.
    pub fn check(&self) -> Result<(), ConnInfoError> {
        let count = self.hosts.len().max(self.addresses.len()).max(1);
        if !self.hosts.is_empty() && !self.addresses.is_empty() && self.hosts.len() != self.addresses.len() {
            let (hosts, others) = (self.hosts.len(), self.addresses.len());
            return Err(ConnInfoError::Count { hosts, others, keyword: "hostaddr" });
        }
        if self.ports.len() > 1 && self.ports.len() != count {
            return Err(ConnInfoError::Count { hosts: count, others: self.ports.len(), keyword: "port" });
        }
        Ok(())
    }

    /// Fills what is not given here from `fallback`.
    ///
    /// Ports from the fallback are dropped when their number does not go with the hosts given here.
    #[must_use]
    pub fn or(self, fallback: Self) -> Self {
        let list = |given: Vec<_>, other: Vec<_>| if given.is_empty() { other } else { given };
        let own_place = !self.hosts.is_empty() || !self.addresses.is_empty();
        let (hosts, addresses) =
            if own_place { (self.hosts, self.addresses) } else { (fallback.hosts, fallback.addresses) };
        let mut merged = Self {
            hosts,
            addresses,
            ports: list(self.ports, fallback.ports),
            user: self.user.or(fallback.user),
            password: self.password.or(fallback.password),
            passfile: self.passfile.or(fallback.passfile),
            database: self.database.or(fallback.database),
            ssl_mode: self.ssl_mode.or(fallback.ssl_mode),
            ssl_root_cert: self.ssl_root_cert.or(fallback.ssl_root_cert),
            ssl_cert: self.ssl_cert.or(fallback.ssl_cert),
            ssl_key: self.ssl_key.or(fallback.ssl_key),
            ssl_password: self.ssl_password.or(fallback.ssl_password),
            ssl_sni: self.ssl_sni.or(fallback.ssl_sni),
            connect_timeout: self.connect_timeout.or(fallback.connect_timeout),
            application_name: self.application_name.or(fallback.application_name),
            options: self.options.or(fallback.options),
            keepalives: self.keepalives.or(fallback.keepalives),
            keepalives_idle: self.keepalives_idle.or(fallback.keepalives_idle),
            keepalives_interval: self.keepalives_interval.or(fallback.keepalives_interval),
            keepalives_count: self.keepalives_count.or(fallback.keepalives_count),
            tcp_user_timeout: self.tcp_user_timeout.or(fallback.tcp_user_timeout),
            target_session: self.target_session.or(fallback.target_session),
            channel_binding: self.channel_binding.or(fallback.channel_binding),
            home: self.home.or(fallback.home),
        };
        if merged.check().is_err() {
            merged.ports.clear();
        }
        merged
    }

    /// The places to try, in order. Empty when no host was given: then libpq's default applies, a socket
    /// in the usual socket directories and else `localhost`, at [`ConnInfo::default_port`].
    pub fn hosts(&self) -> Vec<Host> {
        let count = self.hosts.len().max(self.addresses.len());
        (0..count)
            .map(|index| Host {
                name: self.hosts.get(index).cloned().unwrap_or_default(),
                address: self.addresses.get(index).copied().flatten(),
                port: self.ports.get(index).copied().unwrap_or_else(|| self.default_port()),
            })
            .collect()
    }

    /// The one port given, or 5432.
    pub fn default_port(&self) -> u16 {
        self.ports.first().copied().unwrap_or(DEFAULT_PORT)
    }

    /// `None`: the name of the operating system's user.
    pub fn user(&self) -> Option<&str> {
        self.user.as_deref()
    }

    pub fn password(&self) -> Option<&Secret> {
        self.password.as_ref()
    }

    /// The password file: as given, else `~/.pgpass`.
    pub fn passfile(&self) -> Option<PathBuf> {
        self.passfile.clone().or_else(|| Some(self.home.as_ref()?.join(".pgpass")))
    }

    pub fn database(&self) -> Option<&str> {
        self.database.as_deref()
    }

    /// `verify-full` when the machine's own roots are asked for, else `prefer`, unless given.
    pub fn ssl_mode(&self) -> SslMode {
        match (self.ssl_mode, &self.ssl_root_cert) {
            (Some(mode), _) => mode,
            (None, Some(RootCert::System)) => SslMode::VerifyFull,
            (None, _) => SslMode::default(),
        }
    }

    pub fn ssl_root_cert(&self) -> Option<&RootCert> {
        self.ssl_root_cert.as_ref()
    }

    /// The client's certificate, if given.
    pub fn ssl_cert(&self) -> Option<&Path> {
        self.ssl_cert.as_deref()
    }

    /// The client's key, if given.
    pub fn ssl_key(&self) -> Option<&Path> {
        self.ssl_key.as_deref()
    }

    pub fn ssl_password(&self) -> Option<&Secret> {
        self.ssl_password.as_ref()
    }

    /// Whether to tell the server during the TLS handshake which name we connect to.
    pub fn ssl_sni(&self) -> bool {
        self.ssl_sni.unwrap_or(true)
    }

    /// A file in libpq's own directory, `~/.postgresql`.
    pub fn in_postgresql_directory(&self, file: &str) -> Option<PathBuf> {
        Some(self.home.as_ref()?.join(".postgresql").join(file))
    }

    /// How long one host may take, name lookup to "ready". libpq waits for ever unless told otherwise; a
    /// daemon must not, so that the default here is 30 s. `0` waits for ever.
    pub fn connect_timeout(&self) -> Option<Duration> {
        match self.connect_timeout.unwrap_or(30) {
            0 => None,
            // libpq's own lower bound.
            seconds => Some(Duration::from_secs(seconds.max(2))),
        }
    }

    pub fn application_name(&self) -> &str {
        self.application_name.as_deref().unwrap_or("pgkeep")
    }

    pub fn options(&self) -> Option<&str> {
        self.options.as_deref()
    }

    /// `None` when keepalive is switched off. Unless told otherwise a silent peer is given up after about
    /// a minute and a half, sooner than Linux's two hours.
    pub fn keepalive(&self) -> Option<Keepalive> {
        self.keepalives.unwrap_or(true).then(|| Keepalive {
            idle: seconds(self.keepalives_idle.unwrap_or(30)),
            interval: seconds(self.keepalives_interval.unwrap_or(10)),
            count: Some(self.keepalives_count.unwrap_or(6)).filter(|&count| count > 0),
        })
    }

    /// How long sent bytes may stay unacknowledged; `None` leaves it to the operating system.
    pub fn tcp_user_timeout(&self) -> Option<Duration> {
        let milliseconds = self.tcp_user_timeout.unwrap_or(90_000);
        (milliseconds > 0).then(|| Duration::from_millis(milliseconds.into()))
    }

    pub fn target_session(&self) -> TargetSession {
        self.target_session.unwrap_or_default()
    }

    pub fn channel_binding(&self) -> ChannelBindingPolicy {
        self.channel_binding.unwrap_or_default()
    }
}

/// Where libpq of Debian, and the one built from source, look for a server's socket.
pub const DEFAULT_SOCKET_DIRECTORIES: [&str; 2] = ["/var/run/postgresql", "/tmp"];

const DEFAULT_PORT: u16 = 5432;

const SSL_MODES: [(&str, SslMode); 6] = [
    ("disable", SslMode::Disable),
    ("allow", SslMode::Allow),
    ("prefer", SslMode::Prefer),
    ("require", SslMode::Require),
    ("verify-ca", SslMode::VerifyCa),
    ("verify-full", SslMode::VerifyFull),
];

const TARGET_SESSIONS: [(&str, TargetSession); 6] = [
    ("any", TargetSession::Any),
    ("read-write", TargetSession::ReadWrite),
    ("read-only", TargetSession::ReadOnly),
    ("primary", TargetSession::Primary),
    ("standby", TargetSession::Standby),
    ("prefer-standby", TargetSession::PreferStandby),
];

const CHANNEL_BINDINGS: [(&str, ChannelBindingPolicy); 3] = [
    ("disable", ChannelBindingPolicy::Disable),
    ("prefer", ChannelBindingPolicy::Prefer),
    ("require", ChannelBindingPolicy::Require),
];

const SWITCH: [(&str, bool); 2] = [("0", false), ("1", true)];

fn list(value: &str) -> impl Iterator<Item = &str> {
    let some = !value.is_empty();
    value.split(',').map(str::trim).filter(move |_| some)
}

fn seconds(count: u32) -> Option<Duration> {
    (count > 0).then(|| Duration::from_secs(count.into()))
}

fn choice<T: Copy>(
    keyword: &'static str,
    value: &str,
    choices: &[(&str, T)],
    expected: &'static str,
) -> Result<Option<T>, ConnInfoError> {
    if value.is_empty() {
        return Ok(None);
    }
    match choices.iter().find(|(name, _)| *name == value) {
        Some((_, choice)) => Ok(Some(*choice)),
        None => Err(ConnInfoError::Value { keyword, value: value.to_owned(), expected }),
    }
}

fn number<T: FromStr>(keyword: &'static str, value: &str) -> Result<Option<T>, ConnInfoError> {
    // libpq takes a negative number for zero.
    let text = value.trim();
    let text = if text.starts_with('-') && text[1..].parse::<u64>().is_ok() { "0" } else { text };
    match text {
        "" => Ok(None),
        text => text.parse().map(Some).map_err(|_| ConnInfoError::Value {
            keyword,
            value: value.to_owned(),
            expected: "a whole number",
        }),
    }
}

impl FromStr for ConnInfo {
    type Err = ConnInfoError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut info = Self::default();
        match ["postgresql://", "postgres://"].iter().find_map(|scheme| text.strip_prefix(scheme)) {
            Some(rest) => info.read_uri(rest)?,
            None => info.read_keywords(text)?,
        }
        info.check()?;
        Ok(info)
    }
}

impl ConnInfo {
    fn read_keywords(&mut self, text: &str) -> Result<(), ConnInfoError> {
        let mut rest = text.trim_start();
        while !rest.is_empty() {
            let end = rest.find(|c: char| c == '=' || c.is_whitespace()).unwrap_or(rest.len());
            let keyword = &rest[..end];
            let Some(after) = rest[end..].trim_start().strip_prefix('=') else {
                return Err(ConnInfoError::NoEquals(keyword.to_owned()));
            };
            let (value, after) =
                keyword_value(after.trim_start()).ok_or_else(|| ConnInfoError::Quote(keyword.to_owned()))?;
            self.set(keyword, &value)?;
            rest = after.trim_start();
        }
        Ok(())
    }

    /// `[user[:password]@][host[:port],…][/dbname][?keyword=value&…]`
    fn read_uri(&mut self, rest: &str) -> Result<(), ConnInfoError> {
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
        let hosts = match authority.rsplit_once('@') {
            None => authority,
            Some((login, hosts)) => {
                let (user, password) = login.split_once(':').unwrap_or((login, ""));
                self.set("user", &percent_decode(user)?)?;
                self.set("password", &percent_decode(password)?)?;
                hosts
            }
        };
        let mut names = Vec::new();
        let mut ports = Vec::new();
        for place in hosts.split(',') {
            let (name, port) = match place.strip_prefix('[') {
                Some(place) => {
                    let (name, rest) = place.split_once(']').ok_or(ConnInfoError::Bracket)?;
                    (name, rest.strip_prefix(':').unwrap_or(rest))
                }
                None => place.split_once(':').unwrap_or((place, "")),
            };
            names.push(percent_decode(name)?);
            ports.push(percent_decode(port)?);
        }
        self.set("host", &names.join(","))?;
        if ports.iter().any(|port| !port.is_empty()) {
            self.set("port", &ports.join(","))?;
        }
        self.set("dbname", &percent_decode(database)?)?;
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (keyword, value) =
                pair.split_once('=').ok_or_else(|| ConnInfoError::NoEquals(pair.to_owned()))?;
            let (keyword, value) = (percent_decode(keyword)?, percent_decode(value)?);
            // JDBC's spelling, which libpq takes as well.
            match (keyword.as_str(), value.as_str()) {
                ("ssl", "true") => self.set("sslmode", "require")?,
                _ => self.set(&keyword, &value)?,
            }
        }
        Ok(())
    }
}

/// One value of the keyword form, and what follows it. `None`: a quote is not closed.
fn keyword_value(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let quoted = text.starts_with('\'');
    let mut chars = text.char_indices().skip(usize::from(quoted));
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return Some((value, &text[at + 1..])),
            c if !quoted && c.is_whitespace() => return Some((value, &text[at..])),
            c => value.push(c),
        }
    }
    (!quoted).then_some((value, ""))
}

fn percent_decode(text: &str) -> Result<String, ConnInfoError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let byte = rest
            .get(..2)
            .filter(|digits| digits.iter().all(u8::is_ascii_hexdigit))
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok())
            .filter(|&byte| byte != 0)
            .ok_or(ConnInfoError::Percent)?;
        bytes.push(byte);
        rest = &rest[2..];
    }
    String::from_utf8(bytes).map_err(|_| ConnInfoError::Percent)
}

/// Shows `user@host:port,…`, and never a password.
impl fmt::Display for ConnInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(user) = &self.user {
            write!(f, "{user}@")?;
        }
        let hosts = self.hosts();
        if hosts.is_empty() {
            return write!(f, "local:{}", self.default_port());
        }
        for (index, host) in hosts.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{host}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> ConnInfo {
        text.parse().unwrap()
    }

    #[test]
    fn both_forms_say_the_same() {
        let keywords = parse(
            r"host=db1,db2 port = 5433,5434 user='back\'up' password=p\ w dbname=postgres sslmode=verify-full",
        );
        let uri = parse("postgresql://back%27up:p%20w@db1:5433,db2:5434/postgres?sslmode=verify-full");
        assert_eq!(keywords, uri);
        assert_eq!(keywords.password().unwrap().reveal(), "p w");
        assert_eq!(keywords.to_string(), "back'up@db1:5433,db2:5434");
        assert!(!format!("{keywords:?}").contains("p w"));
    }

    #[test]
    fn one_port_serves_all_hosts_and_counts_must_agree() {
        let ports: Vec<_> = parse("host=a,b port=6000").hosts().iter().map(|host| host.port).collect();
        assert_eq!(ports, [6000, 6000]);
        assert!(matches!(
            "host=a,b port=1,2,3".parse::<ConnInfo>(),
            Err(ConnInfoError::Count { hosts: 2, others: 3, keyword: "port" })
        ));
        assert!("host=a hostaddr=1.1.1.1,2.2.2.2".parse::<ConnInfo>().is_err());
    }

    #[test]
    fn uris_of_sockets_and_ipv6() {
        let socket = &parse("postgres://%2Fvar%2Frun%2Fpostgresql/postgres").hosts()[0];
        assert_eq!(socket.socket().unwrap(), "/var/run/postgresql/.s.PGSQL.5432");
        let six = parse("postgres://u@[::1]:6000");
        assert_eq!(six.to_string(), "u@[::1]:6000");
        assert_eq!(parse("postgres:///x?host=/tmp").hosts()[0].name, "/tmp");
        assert_eq!(parse("postgres://").hosts(), []);
        assert_eq!(parse("").to_string(), "local:5432");
        assert_eq!("postgres://[::1".parse::<ConnInfo>(), Err(ConnInfoError::Bracket));
        for text in ["postgres://a%", "postgres://a%0", "postgres://a%zz", "postgres://a%00"] {
            assert_eq!(text.parse::<ConnInfo>(), Err(ConnInfoError::Percent), "{text}");
        }
    }

    #[test]
    fn an_unknown_keyword_is_named() {
        assert_eq!(
            "host=a hots=b".parse::<ConnInfo>().unwrap_err().to_string(),
            "`hots` is not a connection parameter"
        );
        assert!("sslcrl=/x".parse::<ConnInfo>().is_err());
        assert!("host=a user".parse::<ConnInfo>().is_err());
        assert!("password='abc".parse::<ConnInfo>().is_err());
        assert_eq!(parse("host=a replication=true gssencmode=disable"), parse("host=a"));
    }

    #[test]
    fn empty_is_not_given() {
        let info = parse("host='' user='' password='' port= ");
        assert_eq!(info, ConnInfo::default());
    }

    #[test]
    fn the_environment_fills_what_the_string_leaves_open() {
        let env = ConnInfo::from_env(|name| {
            let value = match name {
                "PGHOST" => "other",
                "PGPORT" => "1,2",
                "PGUSER" => "envuser",
                "PGPASSWORD" => "secret",
                "PGSSLMODE" => "require",
                "HOME" => "/home/x",
                _ => return None,
            };
            Some(value.to_owned())
        });
        assert!(env.is_err(), "two ports, one host");
        let env = ConnInfo::from_env(|name| match name {
            "PGHOST" => Some("a,b".into()),
            "PGPORT" => Some("1,2".into()),
            "PGUSER" => Some("envuser".into()),
            "HOME" => Some("/home/x".into()),
            _ => None,
        })
        .unwrap();
        let info = parse("host=db1").or(env);
        assert_eq!(info.to_string(), "envuser@db1:5432");
        assert_eq!(info.passfile().unwrap(), Path::new("/home/x/.pgpass"));
        assert_eq!(
            info.in_postgresql_directory("root.crt").unwrap(),
            Path::new("/home/x/.postgresql/root.crt")
        );
    }

    #[test]
    fn the_machines_roots_mean_full_verification() {
        assert_eq!(parse("sslrootcert=system").ssl_mode(), SslMode::VerifyFull);
        assert_eq!(parse("sslrootcert=/x").ssl_mode(), SslMode::Prefer);
    }

    #[test]
    fn a_daemon_does_not_wait_for_ever_unless_told() {
        assert_eq!(parse("").connect_timeout(), Some(Duration::from_secs(30)));
        assert_eq!(parse("connect_timeout=0").connect_timeout(), None);
        assert_eq!(parse("connect_timeout=-1").connect_timeout(), None);
        assert_eq!(parse("connect_timeout=1").connect_timeout(), Some(Duration::from_secs(2)));
        assert_eq!(parse("keepalives=0").keepalive(), None);
    }

    proptest! {
        #[test]
        fn any_value_survives_quoting(value in "[^\0]{1,30}") {
            let quoted = value.replace('\\', r"\\").replace('\'', r"\'");
            let info = parse(&format!("user=a password='{quoted}'host=h"));
            prop_assert_eq!(info.password().unwrap().reveal(), &value);
            prop_assert_eq!(info.to_string(), "a@h:5432");
        }

        #[test]
        fn any_value_survives_percent_encoding(value in "[^\0]{1,30}") {
            let encoded = value.bytes().fold(String::new(), |text, byte| text + &format!("%{byte:02x}"));
            let info = parse(&format!("postgres://{encoded}:{encoded}@h/{encoded}?application_name={encoded}"));
            prop_assert_eq!(info.user().unwrap(), &value);
            prop_assert_eq!(info.password().unwrap().reveal(), &value);
            prop_assert_eq!(info.application_name(), &value);
        }

        #[test]
        fn no_text_panics(text in ".{0,60}", uri in "[%@:/?&=,a-z\\[\\]]{0,40}") {
            let _ = text.parse::<ConnInfo>();
            let _ = format!("postgres://{uri}").parse::<ConnInfo>();
        }
    }
}
