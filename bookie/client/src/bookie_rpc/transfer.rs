//! Moves bytes both ways between a connection and its buffers.

use std::{
    future::{Future as _, poll_fn},
    io,
    pin::pin,
    task::Poll,
};

use bytes::Buf;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::frame::{FrameError, Inbox, Kind, Outbox};

/// What one turn moved.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Moved {
    /// None: nothing was there to read. 0: the peer will send nothing more.
    pub(super) read: Option<usize>,
    pub(super) written: usize,
}

/// Waits until something can be read (unless `inbox` is none) or written (unless the outbox is empty), and does whatever
/// of the two can be done then: neither way starves the other. Cancel-safe.
pub(super) async fn transfer(
    reader: &mut (impl AsyncRead + Unpin),
    inbox: Option<&mut Inbox>,
    writer: &mut (impl AsyncWrite + Unpin),
    outbox: &mut Outbox,
) -> io::Result<Moved> {
    let writes = outbox.has_remaining();
    let reads = inbox.is_some();
    let mut write = pin!(async {
        if writes { writer.write_buf(outbox).await } else { std::future::pending().await }
    });
    let mut read = pin!(async {
        match inbox {
            Some(inbox) => reader.read_buf(inbox.room()).await,
            None => std::future::pending().await,
        }
    });
    poll_fn(|context| {
        let written = if writes { write.as_mut().poll(context) } else { Poll::Pending };
        let read = if reads { read.as_mut().poll(context) } else { Poll::Pending };
        let mut moved = Moved::default();
        match (&written, &read) {
            (Poll::Pending, Poll::Pending) => return Poll::Pending,
            (Poll::Ready(Ok(0)), _) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            _ => {}
        }
        if let Poll::Ready(written) = written {
            match written {
                Ok(count) => moved.written = count,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        if let Poll::Ready(read) = read {
            match read {
                Ok(count) => moved.read = Some(count),
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(moved))
    })
    .await
}

/// Puts a frame that says only that its sender lives.
pub(super) fn ping(kind: Kind, outbox: &mut Outbox) -> Result<(), FrameError> {
    outbox.begin(kind, &(), 0)
}
