//! The reading end of the pipeline: a stream of verified plaintext.

use std::fmt;
use std::fs::File;
use std::io::Read;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use object_store::{GetResult, GetResultPayload};
use tokio::task::JoinHandle;

use super::error::Error;
use super::metadata::{ObjectMetadata, StoredAs};
use super::name::ObjectName;
use super::repository::Repository;
use crate::codec::{Decoder, KeyRing, NamedHash, NamedHasher, PrivateKey, StreamOpener, Summary, is_sealed};
use crate::storage;

/// Plaintext per chunk; three of them are in memory: one with the caller, the one held back and the one
/// being made.
const CHUNK: usize = 512 << 10;
/// Stored bytes per turn of the decoder.
const INPUT: usize = 256 << 10;

/// Reads one object.
pub struct ObjectReader {
    repository: Repository,
    name: ObjectName,
    metadata: ObjectMetadata,
    stream: Option<BoxStream<'static, object_store::Result<Bytes>>>,
    /// Stored bytes gathered from the stream for the decoder's next turn.
    gathered: BytesMut,
    work: Work,
    held: Option<Bytes>,
    summary: Option<Summary>,
}

enum Work {
    Idle(Box<Decoding>),
    Busy(JoinHandle<(Box<Decoding>, Result<Step, Failure>)>),
    Over,
}

impl Work {
    fn turn(mut decoding: Box<Decoding>) -> Self {
        Self::Busy(tokio::task::spawn_blocking(move || {
            let step = decoding.step();
            (decoding, step)
        }))
    }
}

enum Step {
    NeedInput,
    Chunk(Vec<u8>),
    End(Vec<u8>, Summary),
}

enum Failure {
    Codec(crate::codec::Error),
    Io(std::io::Error),
    Short {
        read: u64,
    },
    /// The stored bytes are others than when their hash was taken.
    Altered {
        expected: NamedHash,
        actual: NamedHash,
    },
}

/// The blocking half: a decoder and where its input comes from.
struct Decoding {
    file: Option<File>,
    input: Bytes,
    ended: bool,
    read: u64,
    stored_length: u64,
    expected: ExpectedObject,
    decoder: Option<Decoder>,
    /// Of the stored bytes, where it is known what they must hash to.
    stored_hasher: Option<(NamedHasher, NamedHash)>,
}

/// How the object is to be decoded, and what it must turn out to be.
struct ExpectedObject {
    stored_as: StoredAs,
    key: Option<PrivateKey>,
    /// All there are, for an object that is encrypted without saying so.
    keys: KeyRing,
    /// Of what is sealed with its backup's own key.
    opener: Option<StreamOpener>,
    plaintext: crate::codec::Expected,
    hash: Option<NamedHash>,
    stored_length: Option<u64>,
}

impl ExpectedObject {
    fn of(
        name: ObjectName,
        metadata: &ObjectMetadata,
        keys: &KeyRing,
        opener: Option<StreamOpener>,
    ) -> Result<Self, Error> {
        if metadata.is_sealed && opener.is_none() {
            let why = "it is sealed with the key of its backup".to_owned();
            return Err(Error::Locked { name, why, hint: None });
        }
        if let StoredAs::Unsupported(what) = &metadata.stored_as {
            return Err(Error::Unsupported { name, what: what.clone() });
        }
        let key = metadata.key.as_ref().map(|id| keys.private(id).cloned()).transpose();
        Ok(Self {
            stored_as: metadata.stored_as.clone(),
            key: key.map_err(|error| Error::locked(name, &error))?,
            keys: keys.clone(),
            opener,
            plaintext: metadata.expected(),
            // Our own digest says the same, at a third of the cost.
            hash: metadata.hash.filter(|_| metadata.digest.is_none()),
            stored_length: metadata.stored_length,
        })
    }

    /// A decoder for an object that begins with `start`.
    fn decoder(&mut self, start: &[u8]) -> Decoder {
        let mut decoder = match self.stored_as {
            StoredAs::Declared(compression) => Decoder::new(compression, self.plaintext),
            _ => Decoder::detecting(self.plaintext),
        };
        if let Some(opener) = self.opener.take() {
            decoder = decoder.sealed(opener);
        } else if let Some(key) = &self.key {
            decoder = decoder.encrypted([key]);
        } else if self.stored_as == StoredAs::Undeclared && is_sealed(start) {
            decoder = decoder.encrypted(self.keys.privates());
        }
        match self.hash {
            Some(hash) => decoder.hashed(hash),
            None => decoder,
        }
    }
}

impl ObjectReader {
    pub(super) fn new(
        repository: Repository,
        name: ObjectName,
        metadata: ObjectMetadata,
        result: GetResult,
        opener: Option<StreamOpener>,
    ) -> Result<Self, Error> {
        let expected = ExpectedObject::of(name, &metadata, &repository.settings().keys, opener)?;
        let stored_length = result.meta.size;
        if let Some(announced) = expected.stored_length.filter(|&announced| announced != stored_length) {
            let why = format!("it has {stored_length} stored bytes instead of {announced}");
            return Err(Error::Damaged { name, why });
        }
        let (file, stream) = match result.payload {
            GetResultPayload::File(file, _) => (Some(file), None),
            GetResultPayload::Stream(stream) => (None, Some(stream)),
        };
        let decoding = Decoding {
            file,
            input: Bytes::new(),
            ended: false,
            read: 0,
            stored_length,
            expected,
            decoder: None,
            stored_hasher: metadata.stored_hash.map(|hash| (NamedHasher::new(hash.algorithm()), hash)),
        };
        Ok(Self {
            repository,
            name,
            metadata,
            stream,
            gathered: BytesMut::new(),
            work: Work::Idle(Box::new(decoding)),
            held: None,
            summary: None,
        })
    }

    pub const fn metadata(&self) -> &ObjectMetadata {
        &self.metadata
    }

    /// Bytes of plaintext, where the metadata tells.
    pub const fn plaintext_length(&self) -> Option<u64> {
        self.metadata.plaintext_length
    }

    /// The next plaintext. The last chunk is given out only when length and digest have been compared, so
    /// a caller that gets `None` has seen the whole object, and nothing but what was stored.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            match self.step().await? {
                Some(Step::NeedInput) => self.gather().await?,
                Some(Step::Chunk(chunk)) => {
                    if let Some(held) = self.held.replace(chunk.into()) {
                        return Ok(Some(held));
                    }
                }
                Some(Step::End(chunk, summary)) => {
                    self.summary = Some(summary);
                    let last = if chunk.is_empty() { None } else { Some(chunk.into()) };
                    if let Some(held) = std::mem::replace(&mut self.held, last) {
                        return Ok(Some(held));
                    }
                }
                None => return Ok(self.held.take()),
            }
        }
    }

    /// One turn of the decoder; none after its end. The next turn begins while the caller deals with the
    /// chunk that this one made.
    async fn step(&mut self) -> Result<Option<Step>, Error> {
        if let Work::Idle(_) = self.work
            && let Work::Idle(decoding) = std::mem::replace(&mut self.work, Work::Over)
        {
            self.work = Work::turn(decoding);
        }
        let Work::Busy(job) = &mut self.work else {
            return if self.summary.is_some() { Ok(None) } else { Err(self.gone()) };
        };
        let (decoding, step) = job.await.expect("the decoder does not panic");
        self.work = Work::Over;
        match step {
            Ok(step) => {
                self.work = match step {
                    Step::NeedInput => Work::Idle(decoding),
                    Step::Chunk(_) => Work::turn(decoding),
                    Step::End(..) => Work::Over,
                };
                Ok(Some(step))
            }
            Err(Failure::Codec(error)) => Err(Error::of_content(self.name, &error)),
            Err(Failure::Altered { expected, actual }) => {
                let why = format!("its stored bytes have the SHA-256 {actual} instead of {expected}");
                Err(Error::Damaged { name: self.name, why })
            }
            Err(Failure::Io(error)) => {
                let store = self.repository.store().description();
                let cause = storage::Error::from_io(store, "read an object", error);
                Err(Error::of_store(self.subject(), cause))
            }
            Err(Failure::Short { read }) => {
                Err(self
                    .unavailable(format!("the read ended after {read} of {} bytes", decoding.stored_length)))
            }
        }
    }

    /// Awaits stored bytes for the decoder's next turn.
    async fn gather(&mut self) -> Result<(), Error> {
        let mut ended = self.stream.is_none();
        while let Some(stream) = &mut self.stream
            && self.gathered.len() < INPUT
        {
            match stream.next().await {
                Some(Ok(bytes)) => self.gathered.extend_from_slice(&bytes),
                Some(Err(error)) => {
                    self.work = Work::Over;
                    let cause = self.repository.store().error("read an object", &error);
                    return Err(Error::of_store(self.subject(), cause));
                }
                None => {
                    self.stream = None;
                    ended = true;
                }
            }
        }
        if let Work::Idle(decoding) = &mut self.work {
            decoding.input = self.gathered.split().freeze();
            decoding.read += decoding.input.len() as u64;
            decoding.ended = ended;
        }
        Ok(())
    }

    /// Reads to the end and tells what it was.
    pub(super) async fn drain(mut self) -> Result<Summary, Error> {
        while self.next().await?.is_some() {}
        self.summary.ok_or_else(|| self.gone())
    }

    /// After an error there is nothing more to be had.
    fn gone(&self) -> Error {
        self.unavailable("an earlier read of this object failed".to_owned())
    }

    fn unavailable(&self, detail: String) -> Error {
        let store = self.repository.store().description().to_owned();
        Error::of_store(
            self.subject(),
            storage::Error::Unavailable { store, operation: "read an object", detail },
        )
    }

    fn subject(&self) -> String {
        format!("object `{}`", self.name)
    }
}

impl Decoding {
    fn step(&mut self) -> Result<Step, Failure> {
        let mut plaintext = Vec::new();
        loop {
            if self.input.is_empty() && !self.ended && !self.has_more() {
                if self.file.is_none() {
                    // What there is goes out first; the next turn asks again.
                    return Ok(if plaintext.is_empty() { Step::NeedInput } else { Step::Chunk(plaintext) });
                }
                self.fill().map_err(Failure::Io)?;
            }
            let decoder = self.decoder.get_or_insert_with(|| self.expected.decoder(&self.input));
            let mut input = &self.input[..];
            decoder.push(&mut input, CHUNK - plaintext.len(), &mut plaintext).map_err(Failure::Codec)?;
            let taken = self.input.len() - input.len();
            let taken = self.input.split_to(taken);
            if let Some((hasher, _)) = &mut self.stored_hasher {
                hasher.update(&taken);
            }
            if plaintext.len() >= CHUNK {
                return Ok(Step::Chunk(plaintext));
            }
            if self.ended && self.input.is_empty() && !self.has_more() {
                // A connection that ends early is no damage of the object.
                if self.read != self.stored_length {
                    return Err(Failure::Short { read: self.read });
                }
                if let Some((hasher, expected)) = self.stored_hasher.take() {
                    let actual = hasher.finish();
                    if actual != expected {
                        return Err(Failure::Altered { expected, actual });
                    }
                }
                let decoder = self.decoder.take().expect("it was made above");
                let summary = decoder.finish().map_err(Failure::Codec)?;
                return Ok(Step::End(plaintext, summary));
            }
        }
    }

    fn has_more(&self) -> bool {
        self.decoder.as_ref().is_some_and(Decoder::has_more)
    }

    fn fill(&mut self) -> std::io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut buffer = Vec::with_capacity(INPUT);
        let read = file.take(INPUT as u64).read_to_end(&mut buffer)?;
        self.read += read as u64;
        self.ended = read < INPUT;
        self.input = buffer.into();
        Ok(())
    }
}

impl fmt::Debug for ObjectReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObjectReader").field("name", &self.name).finish_non_exhaustive()
    }
}
