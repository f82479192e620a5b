//! The faulty form of cold storage: it may refuse, do the work and then time out, answer short, wrong or late.

use std::{
    collections::VecDeque,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures::{FutureExt, StreamExt, stream::BoxStream};
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload,
    ObjectMeta, ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
    UploadPart, path::Path,
};
use parking_lot::Mutex;
use tokio::time::sleep;

/// What happens to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ObjectFault {
    /// Refused by the server (a 5xx) before anything is done.
    Refused,
    /// Done, and the answer is lost.
    DoneThenLost,
    /// Answered after this long.
    Slow(Duration),
    /// A read is answered with half of its bytes.
    Truncated,
    /// A read is answered with a bit flipped in the middle.
    Flipped,
}

/// A store with faults on demand. Clones share them.
#[derive(Clone, Debug)]
pub struct FaultyObjects {
    inner: Arc<dyn ObjectStore>,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    writes: Mutex<VecDeque<ObjectFault>>,
    reads: Mutex<VecDeque<ObjectFault>>,
    down: AtomicBool,
    requests: AtomicU64,
}

impl FaultyObjects {
    /// No faults yet.
    #[must_use]
    pub fn new(inner: Arc<dyn ObjectStore>) -> Self {
        Self { inner, state: Arc::default() }
    }

    /// The next writes (objects, parts, completions) fare like this, one after the other.
    pub fn fail_writes(&self, faults: impl IntoIterator<Item = ObjectFault>) {
        self.state.writes.lock().extend(faults);
    }

    /// The next reads fare like this.
    pub fn fail_reads(&self, faults: impl IntoIterator<Item = ObjectFault>) {
        self.state.reads.lock().extend(faults);
    }

    /// While it is down every request is refused.
    pub fn set_down(&self, down: bool) {
        self.state.down.store(down, Ordering::SeqCst);
    }

    /// Requests so far.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.state.requests.load(Ordering::SeqCst)
    }
}

fn unavailable(why: &'static str) -> Error {
    Error::Generic { store: "faulty", source: why.into() }
}

impl State {
    fn arrive(&self) -> Result<()> {
        self.requests.fetch_add(1, Ordering::SeqCst);
        match self.down.load(Ordering::SeqCst) {
            true => Err(unavailable("503 down")),
            false => Ok(()),
        }
    }

    /// Lets a write happen as its fault says.
    async fn write<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.arrive()?;
        let fault = self.writes.lock().pop_front();
        match fault {
            Some(ObjectFault::Refused) => Err(unavailable("503 slow down")),
            Some(ObjectFault::DoneThenLost) => {
                work.await?;
                Err(unavailable("the answer was lost"))
            }
            Some(ObjectFault::Slow(pause)) => {
                sleep(pause).await;
                work.await
            }
            _ => work.await,
        }
    }
}

impl fmt::Display for FaultyObjects {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "faulty {}", self.inner)
    }
}

#[async_trait]
impl ObjectStore for FaultyObjects {
    async fn put_opts(
        &self,
        location: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        self.state.write(self.inner.put_opts(location, payload, options)).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.state.arrive()?;
        let inner = self.inner.put_multipart_opts(location, options).await?;
        Ok(Box::new(FaultyUpload { inner, state: Arc::clone(&self.state) }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.state.arrive()?;
        let fault = match options.head {
            true => None,
            false => self.state.reads.lock().pop_front(),
        };
        match fault {
            Some(ObjectFault::Refused | ObjectFault::DoneThenLost) => {
                return Err(unavailable("503 slow down"));
            }
            Some(ObjectFault::Slow(pause)) => sleep(pause).await,
            Some(ObjectFault::Truncated | ObjectFault::Flipped) | None => {}
        }
        let result = self.inner.get_opts(location, options).await?;
        if !matches!(fault, Some(ObjectFault::Truncated | ObjectFault::Flipped)) {
            return Ok(result);
        }
        let (meta, range) = (result.meta.clone(), result.range.clone());
        let (attributes, extensions) = (result.attributes.clone(), result.extensions.clone());
        let mut bytes = result.bytes().await?.to_vec();
        let middle = bytes.len() / 2;
        match fault {
            Some(ObjectFault::Truncated) => bytes.truncate(middle),
            _ => bytes.iter_mut().skip(middle).take(1).for_each(|byte| *byte ^= 1),
        }
        let payload =
            GetResultPayload::Stream(futures::stream::iter([Ok(Bytes::from(bytes))]).boxed());
        Ok(GetResult { payload, meta, range, attributes, extensions })
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        match self.state.arrive() {
            Ok(()) => self.inner.delete_stream(locations),
            Err(error) => futures::stream::iter([Err(error)]).boxed(),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.state.arrive() {
            Ok(()) => self.inner.list(prefix),
            Err(error) => futures::stream::iter([Err(error)]).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.state.arrive()?;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.state.write(self.inner.copy_opts(from, to, options)).await
    }
}

#[derive(Debug)]
struct FaultyUpload {
    inner: Box<dyn MultipartUpload>,
    state: Arc<State>,
}

#[async_trait]
impl MultipartUpload for FaultyUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (part, state) = (self.inner.put_part(data), Arc::clone(&self.state));
        async move { state.write(part).await }.boxed()
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let state = Arc::clone(&self.state);
        state.write(self.inner.complete()).await
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}
