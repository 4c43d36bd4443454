//! Answers requests.
//!
//! Shell. Everything a client can hold on to is limited: connections, headers, time, decoders.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use bytes::Bytes;
use futures_util::{Stream, stream};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{
    ALLOW, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue, SERVER, WWW_AUTHENTICATE,
};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::archive::{ArchiveError, archive};
use super::backups;
use super::fetch::{FetchError, Fetched, Unknown, fetch};
use super::place::{PlaceError, write_file};
use super::prefetched::take_ready;
use super::read_ahead::{Asked, ReadAhead};
use super::route::{ALLOWED, Refusal, Route, SiteChoice, route};
use super::stall::Stalling;
use super::target::{TargetError, open_wal_file, resolve, wal_directory};
use crate::postgres::{Expected, SegmentSize, WalFileName};
use crate::repository::{ObjectName, Outcome, Repository};
use crate::secret::Secret;

/// How long a request waits for a decoder or an upload before it is told to come again.
const QUEUE_TIMEOUT: Duration = Duration::from_mins(1);
/// After a cancel, for answers that are under way.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// One connection's read buffer: a head must fit, and a body passes through it.
const CONNECTION_BUFFER_BYTES: usize = 64 << 10;
const MOST_FIELDS: usize = 64;
/// A refused body is still read up to here, so that the client reads the refusal and not a reset.
const DRAINED_BODY_BYTES: u64 = 64 << 20;
const FILE_CHUNK_BYTES: usize = 256 << 10;
/// Decoded chunks that wait to be sent: one of at most 512 KiB, beside the one being sent and the one being made.
const CHUNKS_AHEAD: usize = 1;

/// One cluster whose WAL is served.
pub struct Site {
    pub name: String,
    /// Stands before every key of the site.
    pub prefix: String,
    /// The archive; `None` until its storage has been reached.
    pub repository: watch::Receiver<Option<Repository>>,
    /// The server's data directory on this machine, if it is on this machine.
    pub data_directory: Option<PathBuf>,
    /// What is known of the cluster so far; files that contradict it are neither served nor stored.
    pub expected: watch::Receiver<Expected>,
    /// Has a base backup taken soon; `Err` tells why none will be.
    pub request_backup: Arc<dyn Fn() -> Result<(), String> + Send + Sync>,
    /// How many segments to fetch ahead into the WAL directory for PGHoard's clients.
    pub read_ahead: usize,
}

impl Site {
    /// A site of which nothing is known but its archive, on another machine than its server.
    pub fn new(name: &str, repository: watch::Receiver<Option<Repository>>) -> Self {
        Self {
            name: name.to_owned(),
            prefix: name.to_owned(),
            repository,
            data_directory: None,
            expected: watch::channel(Expected::default()).1,
            request_backup: Arc::new(|| Err("no base backups are taken here".to_owned())),
            read_ahead: 0,
        }
    }

    pub(super) fn archive(&self) -> Result<Repository, Refusal> {
        self.repository.borrow().clone().ok_or_else(|| {
            let reason = format!("the storage of site `{}` has not been reached yet; see /status", self.name);
            Refusal { status: StatusCode::SERVICE_UNAVAILABLE, reason }
        })
    }
}

/// What may be going on at once, and for how long.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub connections: usize,
    /// Files being decoded, each with its decoder's window and four chunks of 512 KiB at most.
    pub fetches: usize,
    /// Files being stored, each with up to a whole encoded segment of 16 MiB, which must go in one put.
    pub uploads: usize,
    /// For a whole request head to arrive, and for the next request on an open connection.
    pub head_timeout: Duration,
    /// The longest pause within a body, in either direction.
    pub stall_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 64,
            fetches: 4,
            uploads: 1,
            head_timeout: Duration::from_secs(15),
            stall_timeout: Duration::from_secs(30),
        }
    }
}

/// What the server answers from.
pub struct Deps {
    pub sites: Vec<Site>,
    pub status: Arc<dyn Fn() -> serde_json::Value + Send + Sync>,
    /// What Prometheus scrapes.
    pub metrics: Arc<dyn Fn() -> String + Send + Sync>,
    /// `Err` tells why the agent is not ready.
    pub ready: Arc<dyn Fn() -> Result<(), String> + Send + Sync>,
    /// User and password that every request but a probe must give.
    pub credentials: Option<(String, Secret)>,
    pub limits: Limits,
}

struct Server {
    deps: Deps,
    /// Digest of the `Authorization` value expected; digests are compared in constant time.
    authorization: Option<blake3::Hash>,
    fetches: Arc<Semaphore>,
    uploads: Arc<Semaphore>,
    /// In the order of the sites.
    ahead: Vec<Arc<ReadAhead>>,
}

pub(super) type Body = UnsyncBoxBody<Bytes, Unknown>;

/// Serves until `cancel`; answers that are under way are then finished for a few seconds.
///
/// # Errors
/// When the listener itself fails for good.
pub async fn run(listener: TcpListener, deps: Deps, cancel: CancellationToken) -> io::Result<()> {
    let most = deps.limits.connections;
    let server = Arc::new(Server::new(deps));
    let mut connections = JoinSet::new();
    let mut reading = JoinSet::new();
    for ahead in &server.ahead {
        let (ahead, cancel) = (Arc::clone(ahead), cancel.clone());
        reading.spawn(async move { ahead.run(cancel).await });
    }
    loop {
        tokio::select! { biased;
            () = cancel.cancelled() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            // Further clients wait in the listener's queue, which the system bounds.
            accepted = listener.accept(), if connections.len() < most => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(serve_connection(stream, server.clone(), cancel.clone()));
                }
                Err(error) if is_passing(&error) => {
                    tracing::warn!(%error, "connection not accepted");
                    // Out of file descriptors, say: at once it would only fail again.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(error) => return Err(error),
            },
        }
    }
    let drained = timeout(DRAIN_TIMEOUT, async { while connections.join_next().await.is_some() {} }).await;
    if drained.is_err() {
        tracing::warn!(connections = connections.len(), "connections cut off, their answers took too long");
        connections.shutdown().await;
    }
    while reading.join_next().await.is_some() {}
    Ok(())
}

/// Whether accepting may work again: everything but a listener that is none.
fn is_passing(error: &io::Error) -> bool {
    !matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::NotConnected)
}

async fn serve_connection(stream: TcpStream, server: Arc<Server>, cancel: CancellationToken) {
    // Without it, a small answer may wait for the acknowledgement of its head.
    let _ = stream.set_nodelay(true);
    let limits = server.deps.limits;
    let io = TokioIo::new(Stalling::new(stream, limits.stall_timeout));
    let service = service_fn(move |request| {
        let server = server.clone();
        async move { Ok::<_, Infallible>(server.answer(request).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_timeout)
        .max_headers(MOST_FIELDS)
        .max_buf_size(CONNECTION_BUFFER_BYTES)
        .serve_connection(io, service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! { biased;
        () = cancel.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
        ended = connection.as_mut() => ended,
    };
    if let Err(error) = ended {
        // The client's doing, or logged already with its reason.
        tracing::debug!(%error, "connection ended early");
    }
}

impl Server {
    fn new(deps: Deps) -> Self {
        let authorization = deps.credentials.as_ref().map(|(username, password)| {
            let plain = format!("{username}:{}", password.reveal());
            blake3::hash(base64::engine::general_purpose::STANDARD.encode(plain).as_bytes())
        });
        let fetches = Arc::new(Semaphore::new(deps.limits.fetches));
        let uploads = Arc::new(Semaphore::new(deps.limits.uploads));
        let ahead = deps.sites.iter().map(|site| Arc::new(ReadAhead::new(site.read_ahead))).collect();
        for directory in deps.sites.iter().filter_map(|site| site.data_directory.as_deref()) {
            super::prefetched::clean(&wal_directory(directory));
        }
        Self { deps, authorization, fetches, uploads, ahead }
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let mut response = match self.dispatch(&parts.method, parts.uri.path(), &parts.headers, body).await {
            Ok(response) => response,
            Err(refusal) => {
                tracing::debug!(status = refusal.status.as_u16(), reason = refusal.reason, "request refused");
                refused(&refusal)
            }
        };
        let headers = response.headers_mut();
        // Clients believe "does not exist" only from a server of this name.
        headers.insert(SERVER, HeaderValue::from_static(concat!("pgkeep/", env!("CARGO_PKG_VERSION"))));
        response
    }

    async fn dispatch(
        &self,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
        body: Incoming,
    ) -> Result<Response<Body>, Refusal> {
        let route = route(method, path, headers);
        // Probes cannot log in, and learn nothing.
        if !matches!(route, Ok(Route::Health | Route::Ready)) {
            self.check_authorization(headers)?;
        }
        match route? {
            Route::Fetch { site, file, target: None } => Ok(self.send(self.site(&site)?, file, true).await),
            Route::Probe { site, file } => self.probe(self.pghoard_site(&site, path)?, file).await,
            Route::Fetch { site, file, target: Some(target) } => {
                self.place(self.pghoard_site(&site, path)?, file, target).await
            }
            Route::Archive { site, file } => {
                // PGHoard's clients send no body, ours do.
                let site = match announced_length(headers)? {
                    None => self.pghoard_site(&site, path)?,
                    Some(_) => self.site(&site)?,
                };
                self.store(site, file, headers, body).await
            }
            Route::ListBackups { site } => backups::list(self.pghoard_site(&site, path)?).await,
            Route::RequestBackup { site } => backups::request(self.pghoard_site(&site, path)?),
            Route::SiteStatus { site } => {
                self.pghoard_site(&site, path)?;
                let reason = "not implemented; see /status".to_owned();
                Err(Refusal { status: StatusCode::NOT_IMPLEMENTED, reason })
            }
            Route::Status => {
                let status = serde_json::to_string_pretty(&(self.deps.status)()).map_err(|error| {
                    Refusal { status: StatusCode::INTERNAL_SERVER_ERROR, reason: error.to_string() }
                })?;
                Ok(full(StatusCode::OK, "application/json", status + "\n"))
            }
            Route::Metrics => {
                Ok(full(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", (self.deps.metrics)()))
            }
            Route::Health => Ok(full(StatusCode::OK, "application/json", "{\"status\":\"ok\"}\n")),
            Route::Ready => Ok(match (self.deps.ready)() {
                Ok(()) => full(StatusCode::OK, "application/json", "{\"status\":\"ok\"}\n"),
                Err(reason) => text(StatusCode::SERVICE_UNAVAILABLE, reason),
            }),
            Route::Home => Ok(text(StatusCode::OK, "pgkeep keeps PostgreSQL safe; see /status")),
        }
    }

    fn check_authorization(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let Some(expected) = self.authorization else { return Ok(()) };
        let given = headers.get(AUTHORIZATION).and_then(|value| {
            let (scheme, given) = value.as_bytes().split_at_checked(6)?;
            scheme.eq_ignore_ascii_case(b"basic ").then(|| blake3::hash(given.trim_ascii()))
        });
        if given == Some(expected) {
            return Ok(());
        }
        Err(Refusal { status: StatusCode::UNAUTHORIZED, reason: "Authentication required".to_owned() })
    }

    /// An unknown site is a client's mistake, never "does not exist".
    fn site(&self, choice: &SiteChoice) -> Result<&Site, Refusal> {
        let sites = &self.deps.sites;
        match choice {
            SiteChoice::Named(name) => sites
                .iter()
                .find(|site| site.name == *name)
                .ok_or_else(|| Refusal::bad_request(format!("this agent has no site `{name}`"))),
            SiteChoice::Only => match sites.as_slice() {
                [site] => Ok(site),
                _ => Err(Refusal::bad_request("this agent has several sites; name one in place of `-`")),
            },
        }
    }

    /// As [`Self::site`], for requests that PGHoard's clients make: they are told what PGHoard tells them.
    /// Its answer is 404, which must not be mistaken for that of a missing file: ours has no such text.
    fn pghoard_site(&self, choice: &SiteChoice, path: &str) -> Result<&Site, Refusal> {
        match choice {
            SiteChoice::Named(name) if !self.deps.sites.iter().any(|site| site.name == *name) => {
                let reason = format!("Site: '{name}' not found for path '{path}'");
                Err(Refusal { status: StatusCode::NOT_FOUND, reason })
            }
            _ => self.site(choice),
        }
    }

    /// Looks for a file, with a decoder set aside for it.
    async fn open(
        &self,
        site: &Site,
        file: WalFileName,
    ) -> Result<(Fetched, OwnedSemaphorePermit), Response<Body>> {
        let permit = permit(&self.fetches, "other files are being read").await?;
        let expected = *site.expected.borrow();
        let repository = site.archive().map_err(|refusal| refused(&refusal))?;
        match fetch(&repository, &expected, file).await {
            Ok(fetched) => Ok((fetched, permit)),
            Err(error @ FetchError::NotFound(_)) => {
                tracing::debug!(site = site.name, %file, "WAL file asked for does not exist");
                Err(text(StatusCode::NOT_FOUND, error.to_string()))
            }
            Err(FetchError::Unknown(error)) => {
                log_unknown(&site.name, file, &error);
                Err(text(StatusCode::SERVICE_UNAVAILABLE, with_hint(&error.to_string(), error.hint())))
            }
        }
    }

    async fn send(&self, site: &Site, file: WalFileName, with_body: bool) -> Response<Body> {
        let (fetched, permit) = match self.open(site, file).await {
            Ok(opened) => opened,
            Err(answer) => return answer,
        };
        let length = fetched.length();
        let body = if with_body {
            let chunks = chunks(fetched, file, site.name.clone(), permit);
            BodyExt::boxed_unsync(StreamBody::new(chunks))
        } else {
            empty()
        };
        let mut response = Response::new(body);
        response.headers_mut().insert(CONTENT_LENGTH, length.into());
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        response
    }

    /// Says whether a file is there, and what PGHoard's checksum of it is when it has one.
    async fn probe(&self, site: &Site, file: WalFileName) -> Result<Response<Body>, Refusal> {
        let mut response = self.send(site, file, false).await;
        if response.status() == StatusCode::OK
            && let Ok(stored) = site.archive()?.head(ObjectName::Wal(file)).await
            && let Some(hash) = stored.metadata.hash
            && let Ok(hex) = HeaderValue::try_from(hash.to_string())
        {
            response.headers_mut().insert("metadata-hash", hex);
            let algorithm = HeaderValue::from_static(hash.algorithm().name());
            response.headers_mut().insert("metadata-hash-algorithm", algorithm);
        }
        Ok(response)
    }

    /// Writes a file where a client on this machine wants it.
    async fn place(
        &self,
        site: &Site,
        file: WalFileName,
        target: PathBuf,
    ) -> Result<Response<Body>, Refusal> {
        let target =
            resolve(site.data_directory.as_deref(), &target).map_err(|error| refused_target(&error))?;
        if self.take_ready(site, file, &target).await {
            return Ok(empty_answer(StatusCode::CREATED));
        }
        let (fetched, _permit) = match self.open(site, file).await {
            Ok(opened) => opened,
            Err(answer) => return Ok(answer),
        };
        let length = fetched.length();
        match write_file(fetched, target.clone()).await {
            Ok(()) => {
                self.follow(site, file, &target, length);
                Ok(empty_answer(StatusCode::CREATED))
            }
            Err(PlaceError::Unknown(error)) => {
                log_unknown(&site.name, file, &error);
                let reason = with_hint(&error.to_string(), error.hint());
                Ok(text(StatusCode::SERVICE_UNAVAILABLE, reason))
            }
            Err(error @ PlaceError::Target(_)) => {
                tracing::error!(site = site.name, %file, %error, "WAL file not written to its target");
                Ok(text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))
            }
        }
    }

    /// Gives the client a file that lies ready in the WAL directory, if there is one and it is right.
    async fn take_ready(&self, site: &Site, file: WalFileName, target: &Path) -> bool {
        let Some(directory) = site.data_directory.as_deref().map(wal_directory) else { return false };
        if let (WalFileName::Segment(segment), Some(ahead)) = (file, self.ahead_of(site)) {
            ahead.settled(segment).await;
        }
        let Ok(repository) = site.archive() else { return false };
        let expected = *site.expected.borrow();
        match take_ready(&directory, file, &expected, &repository, target).await {
            Some(length) => {
                self.follow(site, file, target, length);
                true
            }
            None => false,
        }
    }

    fn ahead_of(&self, site: &Site) -> Option<&ReadAhead> {
        let at = self.deps.sites.iter().position(|each| each.name == site.name)?;
        self.ahead.get(at).map(Arc::as_ref)
    }

    /// Has the next segments fetched, when the client is one that looks for them in the WAL directory.
    fn follow(&self, site: &Site, file: WalFileName, target: &Path, length: u64) {
        let (WalFileName::Segment(segment), Some(ahead)) = (file, self.ahead_of(site)) else { return };
        let directory = site.data_directory.as_deref().map(wal_directory);
        let directory = directory.and_then(|directory| directory.canonicalize().ok());
        let (Some(directory), Ok(size), Ok(repository)) =
            (directory, SegmentSize::try_from(length), site.archive())
        else {
            return;
        };
        if target.parent() == Some(&directory) {
            let expected = *site.expected.borrow();
            ahead.follow(Asked { segment, size, directory, repository, expected });
        }
    }

    async fn store(
        &self,
        site: &Site,
        file: WalFileName,
        headers: &HeaderMap,
        body: Incoming,
    ) -> Result<Response<Body>, Refusal> {
        let announced = announced_length(headers)?;
        let _permit = match permit(&self.uploads, "another file is being stored").await {
            Ok(permit) => permit,
            Err(answer) => return Ok(answer),
        };
        let expected = *site.expected.borrow();
        let repository = site.archive()?;
        let stored = if let Some(length) = announced {
            let mut body = IncomingChunks { body, stall_timeout: self.deps.limits.stall_timeout, taken: 0 };
            let stored = archive(&repository, &expected, file, length, Box::pin(body.stream())).await;
            if stored.is_err() {
                body.drain(length).await;
            }
            stored
        } else {
            let (opened, length) = open_wal_file(site.data_directory.as_deref(), file)
                .map_err(|error| refused_target(&error))?;
            archive(&repository, &expected, file, length, Box::pin(file_chunks(opened))).await
        };
        Ok(match stored {
            Ok(stored) => {
                tracing::info!(site = site.name, %file, length = stored.plaintext_length, "WAL file archived");
                match stored.outcome {
                    // PGHoard's clients know success as 201 only.
                    Outcome::AlreadySame if announced.is_some() => {
                        text(StatusCode::OK, "already stored with the same content")
                    }
                    Outcome::Created | Outcome::AlreadySame => empty_answer(StatusCode::CREATED),
                }
            }
            // A file of the server's own with a wrong length is one that is not what its name says.
            Err(error @ ArchiveError::Length { .. }) if announced.is_none() => {
                let mut answer = not_stored(site, file, &error);
                *answer.status_mut() = StatusCode::PRECONDITION_FAILED;
                answer
            }
            Err(error) => not_stored(site, file, &error),
        })
    }
}

fn not_stored(site: &Site, file: WalFileName, error: &ArchiveError) -> Response<Body> {
    let status = match error {
        ArchiveError::Length { .. } | ArchiveError::Cut { .. } => StatusCode::BAD_REQUEST,
        ArchiveError::Mismatch { .. } | ArchiveError::History { .. } => StatusCode::PRECONDITION_FAILED,
        ArchiveError::Storage(_) if error.is_conflict() => StatusCode::CONFLICT,
        ArchiveError::Storage(_) => StatusCode::SERVICE_UNAVAILABLE,
    };
    let site = &site.name;
    if error.is_conflict() {
        tracing::error!(site, %file, %error, "WAL file REFUSED: other content is archived under its name");
    } else {
        tracing::warn!(site, %file, %error, "WAL file not archived");
    }
    text(status, with_hint(&error.to_string(), error.hint()))
}

/// `None`: no body, the file is to be read from the server's WAL directory.
fn announced_length(headers: &HeaderMap) -> Result<Option<u64>, Refusal> {
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let length = match (lengths.next(), lengths.next()) {
        (None, _) if headers.contains_key(hyper::header::TRANSFER_ENCODING) => {
            let reason = "a body needs a `Content-Length`".to_owned();
            return Err(Refusal { status: StatusCode::LENGTH_REQUIRED, reason });
        }
        (None, _) => return Ok(None),
        (Some(length), None) => length.to_str().ok().and_then(|length| length.parse::<u64>().ok()),
        (Some(_), Some(_)) => None,
    };
    match length {
        // No WAL file is empty.
        Some(0) => Ok(None),
        Some(length) => Ok(Some(length)),
        None => Err(Refusal::bad_request("malformed `Content-Length`")),
    }
}

async fn permit(
    semaphore: &Arc<Semaphore>,
    busy: &'static str,
) -> Result<OwnedSemaphorePermit, Response<Body>> {
    match timeout(QUEUE_TIMEOUT, semaphore.clone().acquire_owned()).await {
        Ok(Ok(permit)) => Ok(permit),
        Ok(Err(_)) | Err(_) => Err(text(StatusCode::SERVICE_UNAVAILABLE, busy)),
    }
}

/// A file's bytes as body frames. An error breaks the connection off, so that the client cannot take what
/// it has for the whole file.
///
/// The next chunk is decoded while one is being sent: a socket takes little more than the client has read,
/// and the two would otherwise wait for each other.
fn chunks(
    mut fetched: Fetched,
    file: WalFileName,
    site: String,
    permit: OwnedSemaphorePermit,
) -> impl Stream<Item = Result<Frame<Bytes>, Unknown>> + Send {
    let (sender, receiver) = mpsc::channel(CHUNKS_AHEAD);
    // Owned by the stream, so that a client that hangs up ends it.
    let mut decoding = JoinSet::new();
    decoding.spawn(async move {
        let _permit = permit;
        loop {
            let frame = match fetched.next().await {
                Ok(Some(chunk)) => Ok(Frame::data(chunk)),
                Ok(None) => return,
                Err(error) => {
                    log_unknown(&site, file, &error);
                    Err(error)
                }
            };
            let over = frame.is_err();
            if sender.send(frame).await.is_err() || over {
                return;
            }
        }
    });
    // Should the task end early, the body is shorter than announced, and the connection breaks off as well.
    stream::unfold((receiver, decoding), async |(mut receiver, decoding)| {
        let frame = receiver.recv().await?;
        Some((frame, (receiver, decoding)))
    })
}

/// A request's body, chunk by chunk.
struct IncomingChunks {
    body: Incoming,
    stall_timeout: Duration,
    taken: u64,
}

impl IncomingChunks {
    async fn next(&mut self) -> Option<io::Result<Bytes>> {
        loop {
            let frame = match timeout(self.stall_timeout, self.body.frame()).await {
                Ok(frame) => frame?,
                Err(_) => return Some(Err(io::ErrorKind::TimedOut.into())),
            };
            match frame.map(Frame::into_data) {
                Ok(Ok(chunk)) => {
                    self.taken += chunk.len() as u64;
                    return Some(Ok(chunk));
                }
                // Trailers say nothing about a file.
                Ok(Err(_)) => {}
                Err(error) => return Some(Err(io::Error::other(error))),
            }
        }
    }

    fn stream(&mut self) -> impl Stream<Item = io::Result<Bytes>> + Send {
        stream::unfold(self, async |body| body.next().await.map(|chunk| (chunk, body)))
    }

    /// Reads what is left of a refused body, within limits.
    async fn drain(&mut self, length: u64) {
        if length <= DRAINED_BODY_BYTES {
            while self.taken < length && matches!(self.next().await, Some(Ok(_))) {}
        }
    }
}

/// A file's bytes, read off the async threads.
fn file_chunks(file: File) -> impl Stream<Item = io::Result<Bytes>> + Send {
    stream::unfold(Some(file), |file| async {
        let mut file = file?;
        let read = tokio::task::spawn_blocking(move || {
            let mut chunk = Vec::with_capacity(FILE_CHUNK_BYTES);
            let read = (&mut file).take(FILE_CHUNK_BYTES as u64).read_to_end(&mut chunk);
            read.map(|_| (Bytes::from(chunk), file))
        });
        match read.await.map_err(io::Error::other).flatten() {
            Ok((chunk, _)) if chunk.is_empty() => None,
            Ok((chunk, file)) => Some((Ok(chunk), Some(file))),
            Err(error) => Some((Err(error), None)),
        }
    })
}

fn log_unknown(site: &str, file: WalFileName, error: &Unknown) {
    if error.is_damage() {
        tracing::error!(site, %file, %error, "WAL file NOT SERVED: the archive is damaged");
    } else {
        tracing::warn!(site, %file, %error, "WAL file not served");
    }
}

fn refused_target(error: &TargetError) -> Refusal {
    let status = match error {
        TargetError::NoDirectory { .. } => StatusCode::CONFLICT,
        TargetError::NoSuchFile(_) => StatusCode::NOT_FOUND,
        TargetError::Unreadable { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        TargetError::NoDataDirectory | TargetError::Outside(_) => StatusCode::BAD_REQUEST,
    };
    Refusal { status, reason: error.to_string() }
}

fn refused(refusal: &Refusal) -> Response<Body> {
    let mut response = text(refusal.status, refusal.reason.clone());
    match refusal.status {
        StatusCode::UNAUTHORIZED => {
            let value = HeaderValue::from_static("Basic realm=\"pghoard\"");
            response.headers_mut().insert(WWW_AUTHENTICATE, value);
        }
        StatusCode::METHOD_NOT_ALLOWED => {
            response.headers_mut().insert(ALLOW, HeaderValue::from_static(ALLOWED));
        }
        _ => {}
    }
    response
}

fn with_hint(reason: &str, hint: Option<String>) -> String {
    hint.map_or_else(|| reason.to_owned(), |hint| format!("{reason}\nhint: {hint}"))
}

fn text(status: StatusCode, reason: impl Into<String>) -> Response<Body> {
    full(status, "text/plain; charset=utf-8", reason.into() + "\n")
}

pub(super) fn empty_answer(status: StatusCode) -> Response<Body> {
    full(status, "application/octet-stream", "")
}

pub(super) fn full(status: StatusCode, kind: &'static str, content: impl Into<Bytes>) -> Response<Body> {
    let content = content.into();
    let length = content.len();
    let body = Full::new(content).map_err(|never: Infallible| match never {}).boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response.headers_mut().insert(CONTENT_LENGTH, length.into());
    response
}

fn empty() -> Body {
    Full::default().map_err(|never: Infallible| match never {}).boxed_unsync()
}
