//! A store that fails on demand, for tests.
//!
//! The nastiest fault is the one *after* the effect: the object is stored, and the writer is told that it
//! is not. Every writer of ours has to come out of that with the right answer.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, stream};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};

/// What can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Put,
    /// The start of a multipart upload.
    Start,
    Part,
    Complete,
    Get,
    List,
    Delete,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    /// Nothing is done, and an error returned.
    Before,
    /// It is done, and an error returned.
    After,
    Delay(Duration),
    /// A read ends after this many bytes as if the object were no longer (`Get` only).
    Truncate(u64),
    /// A read breaks with an error after this many bytes (`Get` only).
    Break(u64),
}

/// Which operation meets which fault.
#[derive(Debug)]
pub struct FaultPlan {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    script: VecDeque<(Operation, Fault)>,
    /// State of a random generator, and how many in 256 operations fail.
    random: Option<(u64, u8)>,
    counts: Vec<(Operation, u64)>,
}

impl FaultPlan {
    /// The first operation of each named kind meets the first fault given for that kind, and so on;
    /// everything else succeeds.
    pub fn script(faults: impl IntoIterator<Item = (Operation, Fault)>) -> Arc<Self> {
        let state = State { script: faults.into_iter().collect(), random: None, counts: Vec::new() };
        Arc::new(Self { state: Mutex::new(state) })
    }

    /// Of 256 operations about `rate` fail, before or after their effect, as `seed` decides.
    pub fn seeded(seed: u64, rate: u8) -> Arc<Self> {
        let state = State { script: VecDeque::new(), random: Some((seed, rate)), counts: Vec::new() };
        Arc::new(Self { state: Mutex::new(state) })
    }

    /// Appends to the script.
    pub fn push(&self, operation: Operation, fault: Fault) {
        self.state().script.push_back((operation, fault));
    }

    /// How often `operation` was asked for.
    pub fn count(&self, operation: Operation) -> u64 {
        let state = self.state();
        state.counts.iter().find(|(kind, _)| *kind == operation).map_or(0, |(_, count)| *count)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self, operation: Operation) -> Fault {
        let mut state = self.state();
        match state.counts.iter_mut().find(|(kind, _)| *kind == operation) {
            Some((_, count)) => *count += 1,
            None => state.counts.push((operation, 1)),
        }
        if let Some(at) = state.script.iter().position(|(kind, _)| *kind == operation) {
            return state.script.remove(at).map_or(Fault::None, |(_, fault)| fault);
        }
        let Some((random, rate)) = &mut state.random else { return Fault::None };
        // SplitMix64, because a schedule has to be the same on every version of every library.
        *random = random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut value = *random;
        value = (value ^ value >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        value = (value ^ value >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        value ^= value >> 31;
        let [chance, kind, ..] = value.to_le_bytes();
        match chance < *rate {
            false => Fault::None,
            true if kind < 128 => Fault::Before,
            true => Fault::After,
        }
    }
}

/// The decorator.
#[derive(Clone, Debug)]
pub struct Faulty {
    inner: Arc<dyn ObjectStore>,
    plan: Arc<FaultPlan>,
}

impl Faulty {
    pub fn new(inner: Arc<dyn ObjectStore>, plan: Arc<FaultPlan>) -> Self {
        Self { inner, plan }
    }

    async fn apply<T>(
        plan: &FaultPlan,
        operation: Operation,
        work: impl Future<Output = Result<T>> + Send,
    ) -> Result<T> {
        match plan.next(operation) {
            Fault::Before => Err(injected()),
            Fault::After => {
                work.await?;
                Err(injected())
            }
            Fault::Delay(time) => {
                tokio::time::sleep(time).await;
                work.await
            }
            Fault::None | Fault::Truncate(_) | Fault::Break(_) => work.await,
        }
    }
}

fn injected() -> object_store::Error {
    object_store::Error::Generic { store: "faulty", source: "injected fault".into() }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        Self::apply(&self.plan, Operation::Put, self.inner.put_opts(location, payload, opts)).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        opts: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        let start = self.inner.put_multipart_opts(location, opts);
        let inner = Self::apply(&self.plan, Operation::Start, start).await?;
        Ok(Box::new(FaultyUpload { inner, plan: Arc::clone(&self.plan) }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let fault = self.plan.next(Operation::Get);
        match fault {
            Fault::Before | Fault::After => return Err(injected()),
            Fault::Delay(time) => tokio::time::sleep(time).await,
            Fault::None | Fault::Truncate(_) | Fault::Break(_) => {}
        }
        let result = self.inner.get_opts(location, options).await?;
        let (limit, end) = match fault {
            Fault::Truncate(limit) => (limit, None),
            Fault::Break(limit) => (limit, Some(Err(injected()))),
            _ => return Ok(result),
        };
        let range = result.range.clone();
        let (meta, attributes, extensions) =
            (result.meta.clone(), result.attributes.clone(), result.extensions.clone());
        let mut left = usize::try_from(limit).unwrap_or(usize::MAX);
        let cut = result.into_stream().map(move |chunk| {
            let chunk = chunk?;
            let now = chunk.len().min(left);
            left -= now;
            Ok(chunk.slice(..now))
        });
        let payload = GetResultPayload::Stream(cut.chain(stream::iter(end)).boxed());
        Ok(GetResult { payload, meta, range, attributes, extensions })
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        Self::apply(&self.plan, Operation::Get, self.inner.get_ranges(location, ranges)).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let plan = Arc::clone(&self.plan);
        let inner = Arc::clone(&self.inner);
        locations
            .then(move |location| {
                let (plan, inner) = (Arc::clone(&plan), Arc::clone(&inner));
                async move {
                    let location = location?;
                    let mut one = inner.delete_stream(stream::iter([Ok(location.clone())]).boxed());
                    let delete = async { one.next().await.unwrap_or(Ok(location)) };
                    Self::apply(&plan, Operation::Delete, delete).await
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        faulty_list(self.plan.next(Operation::List), self.inner.list(prefix))
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        faulty_list(self.plan.next(Operation::List), self.inner.list_with_offset(prefix, offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        Self::apply(&self.plan, Operation::List, self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        Self::apply(&self.plan, Operation::Put, self.inner.copy_opts(from, to, options)).await
    }
}

fn faulty_list(
    fault: Fault,
    inner: BoxStream<'static, Result<ObjectMeta>>,
) -> BoxStream<'static, Result<ObjectMeta>> {
    match fault {
        Fault::Before => stream::iter([Err(injected())]).boxed(),
        Fault::After => inner.chain(stream::iter([Err(injected())])).boxed(),
        Fault::Delay(time) => {
            stream::once(tokio::time::sleep(time)).flat_map(|()| stream::empty()).chain(inner).boxed()
        }
        Fault::None | Fault::Truncate(_) | Fault::Break(_) => inner,
    }
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Faulty({})", self.inner)
    }
}

#[derive(Debug)]
struct FaultyUpload {
    inner: Box<dyn MultipartUpload>,
    plan: Arc<FaultPlan>,
}

#[async_trait]
impl MultipartUpload for FaultyUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (part, plan) = (self.inner.put_part(data), Arc::clone(&self.plan));
        Box::pin(async move { Faulty::apply(&plan, Operation::Part, part).await })
    }

    async fn complete(&mut self) -> Result<PutResult> {
        Faulty::apply(&self.plan, Operation::Complete, self.inner.complete()).await
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::ObjectStoreExt;
    use object_store::memory::InMemory;

    #[tokio::test]
    async fn a_script_is_followed_by_kind() {
        let plan = FaultPlan::script([
            (Operation::Get, Fault::Truncate(2)),
            (Operation::Put, Fault::Before),
            (Operation::Put, Fault::After),
        ]);
        let store = Faulty::new(Arc::new(InMemory::new()), Arc::clone(&plan));
        let (a, b) = (Path::from("a"), Path::from("b"));
        assert!(store.put(&a, "abc".into()).await.is_err());
        assert!(store.put(&b, "abc".into()).await.is_err());
        let bytes = store.get(&b).await.unwrap().bytes().await.unwrap();
        assert_eq!(&bytes[..], b"ab");
        assert!(matches!(store.get(&a).await, Err(object_store::Error::NotFound { .. })));
        assert_eq!(plan.count(Operation::Put), 2);
    }

    #[test]
    fn a_seed_is_a_schedule() {
        let faults = |seed| {
            let plan = FaultPlan::seeded(seed, 64);
            (0..200).map(|_| plan.next(Operation::Put)).collect::<Vec<_>>()
        };
        assert_eq!(faults(1), faults(1));
        assert_ne!(faults(1), faults(2));
        let failed = faults(3).iter().filter(|fault| **fault != Fault::None).count();
        assert!((20..80).contains(&failed), "{failed}");
    }
}
