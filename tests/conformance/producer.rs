//! A publish stream, frame by frame.

use geminga_proto::v1::{
    Batch, BatchRefused, OpenPublish, PublishFrame, PublishOpened, PublishReply, Receipt, Route,
    publish_frame::Frame, publish_reply::Reply,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use crate::client::{Client, Outgoing, batch, in_time, passing};

pub(crate) struct Producer {
    frames: mpsc::Sender<PublishFrame>,
    replies: Streaming<PublishReply>,
    pub(crate) opened: PublishOpened,
    /// The highest sequence sent.
    pub(crate) last: u64,
}

pub(crate) fn open(topic: &str, producer: &str) -> OpenPublish {
    OpenPublish {
        topic: topic.to_owned(),
        producer_name: producer.to_owned(),
        stream_number: 1,
        ..OpenPublish::default()
    }
}

impl Client {
    /// Opens a stream; tries again while the server asks for it.
    pub(crate) async fn produce(&self, open: OpenPublish) -> Producer {
        in_time("a publish stream opens", async {
            loop {
                match self.try_produce(open.clone()).await {
                    Ok(producer) => return producer,
                    Err(status) if passing(&status) => {
                        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                    }
                    Err(status) => panic!("not opened: {status:?}"),
                }
            }
        })
        .await
    }

    pub(crate) async fn try_produce(&self, mut open: OpenPublish) -> Result<Producer, Status> {
        if open.route() == Route::Unspecified {
            open.route = Route::Relay.into(); // whoever owns the segment, this connection will do
        }
        let (frames, outbound) = mpsc::channel(1_024);
        frames.send(PublishFrame { frame: Some(Frame::Open(open)) }).await.expect("there is room");
        let outbound = ReceiverStream::new(outbound);
        let mut replies =
            in_time("headers", self.publisher().publish_stream(outbound)).await?.into_inner();
        let first = in_time("the open frame is answered", replies.message()).await?;
        let Some(Reply::Opened(opened)) = first.and_then(|reply| reply.reply) else {
            return Err(Status::unavailable("the stream ended before it was opened"));
        };
        let last = opened.last_persisted_sequence;
        Ok(Producer { frames, replies, opened, last })
    }
}

impl Producer {
    /// Sends a batch as it is. An ended stream says so where it is read.
    pub(crate) async fn send_batch(&mut self, batch: Batch) {
        self.last = self.last.max(batch.hi_sequence);
        let _ = self.frames.send(PublishFrame { frame: Some(Frame::Batch(batch)) }).await;
    }

    /// Sends messages with the next sequences.
    pub(crate) async fn send(&mut self, messages: &[Outgoing]) {
        let batch = batch(self.last, messages);
        self.send_batch(batch).await;
    }

    /// The next receipt or refusal.
    pub(crate) async fn outcome(&mut self) -> Result<Result<Receipt, BatchRefused>, Status> {
        in_time("a batch has its outcome", async {
            loop {
                let Some(reply) = self.replies.message().await? else {
                    return Err(Status::unavailable("the stream ended"));
                };
                match reply.reply.expect("a known kind of reply") {
                    Reply::Receipt(receipt) => return Ok(Ok(receipt)),
                    Reply::Refused(refused) => return Ok(Err(refused)),
                    _ => {}
                }
            }
        })
        .await
    }

    /// The next receipt.
    pub(crate) async fn receipt(&mut self) -> Receipt {
        match self.outcome().await {
            Ok(Ok(receipt)) => receipt,
            other => panic!("not a receipt: {other:?}"),
        }
    }

    /// The reason of the next refusal.
    pub(crate) async fn refused(&mut self) -> String {
        match self.outcome().await {
            Ok(Ok(receipt)) => format!("nothing: stored as {receipt:?}"),
            Ok(Err(refused)) => refused.reason,
            Err(status) => format!("the stream ended: {status:?}"),
        }
    }

    /// The reason that another batch is refused for, or that the stream ends for.
    pub(crate) async fn fenced(&mut self) -> String {
        self.send(&[Outgoing::new("of a fenced producer")]).await;
        match self.outcome().await {
            Ok(Ok(receipt)) => format!("nothing: stored as {receipt:?}"),
            Ok(Err(refused)) => refused.reason,
            Err(status) => crate::client::refusal::<()>(Err(status)),
        }
    }
}
