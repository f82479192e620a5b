//! Writing one object in order, with one part in memory: a small one in one request, a large one in parts.

use bytes::{Bytes, BytesMut};
use object_store::{MultipartUpload, ObjectStore, PutMultipartOptions};
use tokio::time::timeout;

use super::{ColdError, ColdStorage, Failed};

/// An object on its way. Dropped before [`Self::finish`] there is no object; parts of it may be left behind, which the
/// bucket's rule for unfinished uploads removes.
pub(crate) struct ObjectWrite {
    cold: ColdStorage,
    name: String,
    buffer: BytesMut,
    parts: Option<Box<dyn MultipartUpload>>,
}

impl ObjectWrite {
    pub(crate) fn new(cold: &ColdStorage, name: String) -> Self {
        Self { cold: cold.clone(), name, buffer: BytesMut::new(), parts: None }
    }

    /// The next bytes. An error ends the object: what was sent is never named by anything.
    pub(crate) async fn write(&mut self, bytes: Bytes) -> Result<(), ColdError> {
        self.buffer.extend_from_slice(&bytes);
        // The last part may be of any size, also an empty object's; all others are of the same.
        while self.buffer.len() > self.cold.config.part_bytes {
            let part = self.buffer.split_to(self.cold.config.part_bytes).freeze();
            self.send(part).await?;
        }
        Ok(())
    }

    async fn send(&mut self, part: Bytes) -> Result<(), ColdError> {
        if self.parts.is_none() {
            let path = self.cold.path(&self.name);
            let begin =
                || self.cold.store.put_multipart_opts(&path, PutMultipartOptions::default());
            let begun = self.cold.retry(&self.name, begin).await;
            self.parts = Some(begun.map_err(|failed| failed.into_error(&self.name))?);
        }
        let Some(parts) = &mut self.parts else { return Ok(()) };
        // A part cannot be sent twice in its place: the upload as a whole is repeated, under a new name.
        let sent = timeout(self.cold.config.request_timeout, parts.put_part(part.into())).await;
        let failed = match sent {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => Failed::of(&error),
            Err(_) => Failed::Later("no answer in time".to_owned()),
        };
        self.abandon().await;
        Err(failed.into_error(&self.name))
    }

    /// The object is there, whole; or nobody knows (an error).
    pub(crate) async fn finish(mut self) -> Result<(), ColdError> {
        let rest = self.buffer.split().freeze();
        if self.parts.is_none() {
            return self.cold.put(&self.name, rest).await;
        }
        self.send(rest).await?;
        let Some(mut parts) = self.parts.take() else { return Ok(()) };
        let limit = self.cold.config.request_timeout;
        match timeout(limit, parts.complete()).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(Failed::of(&error).into_error(&self.name)),
            Err(_) => Err(Failed::Later("no answer in time".to_owned()).into_error(&self.name)),
        }
    }

    /// Best effort: the store may keep the parts of an upload that nobody ends.
    async fn abandon(&mut self) {
        if let Some(mut parts) = self.parts.take() {
            let _ = timeout(self.cold.config.request_timeout, parts.abort()).await;
        }
    }
}
