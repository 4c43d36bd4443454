//! A store that tells what is asked of it: for metrics, and for those who want to hear of every object.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt, future};
use object_store::path::Path;
use object_store::{
    Attribute, Attributes, CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};
use tokio::time::Instant;

/// What was asked of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// A whole object, in one request or in parts.
    Put,
    Get,
    Head,
    List,
    Delete,
}

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Done,
    /// There was none, or there was one already: as asked, no failure.
    Otherwise,
    Failed,
}

/// One thing asked of a store and answered.
#[derive(Debug)]
pub struct StoreEvent<'a> {
    pub asked: Asked,
    pub answer: Answer,
    /// The whole key; of a list, what it was asked for.
    pub key: &'a str,
    /// Of content that was sent, or is about to come.
    pub bytes: u64,
    pub elapsed: Duration,
    attributes: Option<&'a Attributes>,
}

impl StoreEvent<'_> {
    /// What is stored with an object that was put.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &str)> {
        self.attributes.into_iter().flatten().filter_map(|(attribute, value)| match attribute {
            Attribute::Metadata(key) => Some((key.as_ref(), value.as_ref())),
            _ => None,
        })
    }
}

/// Who is told. Called within requests, so it must not block.
pub type Observer = Arc<dyn Fn(&StoreEvent<'_>) + Send + Sync>;

pub(super) struct Observed {
    inner: Arc<dyn ObjectStore>,
    observer: Observer,
}

impl Observed {
    pub(super) fn new(inner: Arc<dyn ObjectStore>, observer: Observer) -> Self {
        Self { inner, observer }
    }
}

/// One request under way.
struct Watch<'a> {
    observer: &'a Observer,
    asked: Asked,
    key: &'a str,
    begun: Instant,
}

impl<'a> Watch<'a> {
    fn new(observer: &'a Observer, asked: Asked, key: &'a Path) -> Self {
        Self { observer, asked, key: key.as_ref(), begun: Instant::now() }
    }

    fn answered<T>(&self, result: &Result<T>, bytes: u64, attributes: Option<&Attributes>) {
        let answer = answer(result);
        let bytes = if answer == Answer::Otherwise { 0 } else { bytes };
        (self.observer)(&StoreEvent {
            asked: self.asked,
            answer,
            key: self.key,
            bytes,
            elapsed: self.begun.elapsed(),
            attributes,
        });
    }
}

fn answer<T>(result: &Result<T>) -> Answer {
    use object_store::Error::{AlreadyExists, NotFound, NotModified, Precondition};
    match result {
        Ok(_) => Answer::Done,
        Err(NotFound { .. } | AlreadyExists { .. } | Precondition { .. } | NotModified { .. }) => {
            Answer::Otherwise
        }
        Err(_) => Answer::Failed,
    }
}

#[async_trait]
impl ObjectStore for Observed {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let watch = Watch::new(&self.observer, Asked::Put, location);
        let (bytes, attributes) = (payload.content_length() as u64, opts.attributes.clone());
        let result = self.inner.put_opts(location, payload, opts).await;
        watch.answered(&result, bytes, Some(&attributes));
        result
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let watch = Watch::new(&self.observer, Asked::Put, location);
        let attributes = opts.attributes.clone();
        let result = self.inner.put_multipart_opts(location, opts).await;
        if result.is_err() {
            watch.answered(&result, 0, Some(&attributes));
        }
        let (begun, observer) = (watch.begun, Arc::clone(&self.observer));
        let upload = ObservedUpload {
            inner: result?,
            observer,
            location: location.clone(),
            begun,
            bytes: 0,
            attributes,
        };
        Ok(Box::new(upload))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let asked = if options.head { Asked::Head } else { Asked::Get };
        let watch = Watch::new(&self.observer, asked, location);
        let result = self.inner.get_opts(location, options).await;
        let content = result.as_ref().ok().filter(|_| asked == Asked::Get);
        let bytes = content.map_or(0, |found| found.range.end - found.range.start);
        watch.answered(&result, bytes, None);
        result
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let watch = Watch::new(&self.observer, Asked::Get, location);
        let result = self.inner.get_ranges(location, ranges).await;
        watch.answered(&result, ranges.iter().map(|range| range.end - range.start).sum(), None);
        result
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let observer = Arc::clone(&self.observer);
        let mut begun = Instant::now();
        let deleted = self.inner.delete_stream(locations).inspect(move |result| {
            let none = Path::default();
            let key = result.as_ref().unwrap_or(&none);
            Watch { observer: &observer, asked: Asked::Delete, key: key.as_ref(), begun }
                .answered(result, 0, None);
            begun = Instant::now();
        });
        deleted.boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        listed(&self.observer, prefix, self.inner.list(prefix))
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        listed(&self.observer, prefix, self.inner.list_with_offset(prefix, offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let key = prefix.cloned().unwrap_or_default();
        let watch = Watch::new(&self.observer, Asked::List, &key);
        let result = self.inner.list_with_delimiter(prefix).await;
        watch.answered(&result, 0, None);
        result
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// Tells of a failure where it happens, and of success at the end of the list.
fn listed(
    observer: &Observer,
    prefix: Option<&Path>,
    entries: BoxStream<'static, Result<ObjectMeta>>,
) -> BoxStream<'static, Result<ObjectMeta>> {
    let (key, begun) = (prefix.cloned().unwrap_or_default(), Instant::now());
    let tell = {
        let observer = Arc::clone(observer);
        Arc::new(move |result: &Result<()>| {
            let watch = Watch { observer: &observer, asked: Asked::List, key: key.as_ref(), begun };
            watch.answered(result, 0, None);
        })
    };
    let failed = Arc::clone(&tell);
    let mut failures = 0_u32;
    let entries = entries.map(move |entry| {
        entry.inspect_err(|_| {
            failures += 1;
            if failures == 1 {
                let generic = object_store::Error::Generic { store: "listed", source: "failed".into() };
                failed(&Err(generic));
            }
        })
    });
    let end = stream::once(future::lazy(move |_| tell(&Ok(())))).filter_map(|()| future::ready(None));
    entries.chain(end).boxed()
}

impl fmt::Debug for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Observed").field(&self.inner).finish()
    }
}

impl fmt::Display for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.inner)
    }
}

struct ObservedUpload {
    inner: Box<dyn MultipartUpload>,
    observer: Observer,
    location: Path,
    begun: Instant,
    bytes: u64,
    attributes: Attributes,
}

#[async_trait]
impl MultipartUpload for ObservedUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        self.bytes += data.content_length() as u64;
        self.inner.put_part(data)
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let result = self.inner.complete().await;
        let (asked, key, begun) = (Asked::Put, self.location.as_ref(), self.begun);
        let watch = Watch { observer: &self.observer, asked, key, begun };
        watch.answered(&result, self.bytes, Some(&self.attributes));
        result
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}

impl fmt::Debug for ObservedUpload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObservedUpload").field("location", &self.location).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, PoisonError};

    use object_store::memory::InMemory;
    use object_store::{ObjectStoreExt, PutMode};

    use super::*;

    #[tokio::test]
    async fn everything_is_told_once() {
        let told: Arc<Mutex<Vec<String>>> = Arc::default();
        let ear = Arc::clone(&told);
        let observer: Observer = Arc::new(move |event| {
            let metadata: Vec<_> = event.metadata().map(|(key, value)| format!(" {key}={value}")).collect();
            let line = format!(
                "{:?} {:?} {} {}{}",
                event.asked,
                event.answer,
                event.key,
                event.bytes,
                metadata.concat()
            );
            ear.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        });
        let store = Observed::new(Arc::new(InMemory::new()), observer);
        let (a, b) = (Path::from("a"), Path::from("b"));
        let attributes: Attributes = [(Attribute::Metadata("host".into()), "h")].into_iter().collect();
        let options = PutOptions { mode: PutMode::Create, attributes, ..PutOptions::default() };
        store.put_opts(&a, "abc".into(), options.clone()).await.unwrap();
        store.put_opts(&a, "abc".into(), options).await.unwrap_err();
        store.get(&a).await.unwrap();
        store.head(&a).await.unwrap();
        store.get(&b).await.unwrap_err();
        let mut upload = store.put_multipart(&b).await.unwrap();
        upload.put_part("abcdef".into()).await.unwrap();
        upload.complete().await.unwrap();
        assert_eq!(store.list(None).count().await, 2);
        store.delete(&a).await.unwrap();
        assert_eq!(
            *told.lock().unwrap(),
            [
                "Put Done a 3 host=h",
                "Put Otherwise a 0 host=h",
                "Get Done a 3",
                "Head Done a 0",
                "Get Otherwise b 0",
                "Put Done b 6",
                "List Done  0",
                "Delete Done a 0",
            ]
        );
    }
}
