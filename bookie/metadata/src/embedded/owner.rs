//! The owner task: carries commands out ahead of the disk, makes them durable group by group, then answers.

use std::{sync::Arc, time::Duration};

use geminga_runtime::io::Io;
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{Answer, Command, Owner, Shared, disk::EmbeddedDisk};
use crate::{StoreError, state::State};

/// Commands of one group.
const GROUP_MAX: usize = 64;

/// The owner of the state.
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) disk: Arc<EmbeddedDisk>,
    pub(super) io: Io,
    pub(super) state: State,
    pub(super) start: Instant,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.owner.send_replace(Owner::Ended);
    }
}

/// An answer that waits until everything before it is durable: told whether it is.
type Held = Box<dyn FnOnce(bool) + Send>;

impl Worker {
    pub(super) async fn run(
        mut self,
        mut queue: mpsc::Receiver<Command>,
        shutdown: CancellationToken,
    ) {
        let mut group = Vec::with_capacity(GROUP_MAX);
        let mut closing = None;
        while closing.is_none() {
            let deadline = self.state.next_deadline().map(|deadline| self.start + deadline);
            let lease_due = async {
                match deadline {
                    Some(deadline) => tokio::time::sleep_until(deadline).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                () = lease_due => {}
                received = queue.recv_many(&mut group, GROUP_MAX) => if received == 0 { break },
            }
            let now = self.start.elapsed();
            self.state.expire(now);
            let mut held = Vec::with_capacity(group.len());
            for command in group.drain(..) {
                match command {
                    Command::Close(answer) => closing = Some(answer),
                    command => held.push(self.carry_out(command, now)),
                }
            }
            let durable = self.settle().await;
            for answer in held {
                answer(durable);
            }
            if !durable {
                break;
            }
        }
        let Self { disk, io, .. } = &self;
        let (disk, io) = (Arc::clone(disk), io.clone());
        drop(self);
        io.run(move || drop(disk)).await;
        if let Some(answer) = closing {
            drop(answer.send(Ok(())));
        }
    }

    fn carry_out(&mut self, command: Command, now: Duration) -> Held {
        match command {
            Command::Txn(txn, answer) => hold(self.state.txn(&txn), answer),
            Command::Grant(ttl, answer) => hold(Ok(self.state.grant(now, ttl)), answer),
            Command::KeepAlive(lease, answer) => hold(self.state.keep_alive(now, lease), answer),
            Command::Revoke(lease, answer) | Command::Expire(lease, answer) => {
                hold(self.state.revoke(lease), answer)
            }
            Command::Compact(revision, answer) => {
                // What is not visible yet cannot be compacted; the files follow with the next commit.
                self.shared.visible.write().compact(revision);
                hold(Ok(()), answer)
            }
            Command::Close(_) => unreachable!("the loop keeps it"),
        }
    }

    /// Makes durable, then visible, what happened since the last call. False: the disk failed.
    async fn settle(&mut self) -> bool {
        let fresh = self.state.take_fresh();
        if fresh.is_empty() {
            return true;
        }
        let compacted = self.shared.visible.read().compacted();
        let (disk, batch) = (Arc::clone(&self.disk), fresh.clone());
        let committed = self.io.run(move || disk.commit(&batch, compacted, None)).await;
        #[cfg(test)]
        let committed = if self.shared.disk_fails.load(std::sync::atomic::Ordering::SeqCst) {
            Err(redb::Error::PreviousIo)
        } else {
            committed
        };
        if let Err(error) = committed {
            tracing::error!(%error, "embedded metadata store failed and ends");
            return false;
        }
        let mut visible = self.shared.visible.write();
        for applied in fresh {
            visible.apply(applied);
        }
        drop(visible);
        self.shared.owner.send_modify(|_| ());
        true
    }
}

/// The result as it is once everything before it is durable; else it is unknown, whatever it was: even a conflict was
/// found against changes that may be lost.
fn hold<T: Send + 'static>(result: Result<T, StoreError>, answer: Answer<T>) -> Held {
    Box::new(move |durable| {
        let failed = || StoreError::Unknown("the embedded store's disk failed".to_owned());
        // A caller that went away is no concern of ours.
        drop(answer.send(if durable { result } else { Err(failed()) }));
    })
}
