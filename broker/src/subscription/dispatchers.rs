//! The dispatchers of one segment, by subscription. One is started by whoever has something for it, and takes itself out
//! when it has nothing to do.

use std::{collections::BTreeMap, sync::Arc};

use geminga_metadata::Revision;
use geminga_proto::{
    ids::SubscriptionId,
    names::SubscriptionName,
    reason::Reason,
    v1::{ConsumeReply, Delivery, OpenConsume, SegmentExplained, SubscriptionSettings},
};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::{gate::Frames, task::Dispatcher, wanted::SettleWanted};
use crate::{
    catalog::Subscription, context::Shared, dispatcher::Redelivery, errors::Refusal,
    listener::Outbox, ownership::Segment,
};

/// Commands that wait for a dispatcher.
const COMMANDS_MAX: usize = 64;

/// An answer on its way.
pub(crate) type Answer<T> = oneshot::Sender<Result<T, Refusal>>;

/// A consume stream, handed over whole.
pub(crate) struct Attach {
    pub(crate) open: OpenConsume,
    pub(crate) layout_epoch: u64,
    pub(crate) segments: u32,
    pub(crate) frames: Frames,
    pub(crate) outbox: Outbox<ConsumeReply>,
    /// How the stream ended.
    pub(crate) ended: Answer<()>,
}

/// A pull.
#[derive(Clone, Debug)]
pub(crate) struct PullAsked {
    pub(crate) consumer_name: String,
    pub(crate) messages_max: u64,
    pub(crate) bytes_max: u64,
    pub(crate) wait_ms: u64,
    pub(crate) lease_ms: u64,
}

/// A page of what waits for a time.
#[derive(Clone, Debug)]
pub(crate) struct DelayedAsked {
    /// (due, offset) of the last one seen.
    pub(crate) after: (u64, u64),
    pub(crate) most: usize,
}

/// What waits for a time, as a dispatcher knows it.
#[derive(Clone, Debug)]
pub(crate) struct DelayedFound {
    pub(crate) known: Vec<Redelivery>,
    /// Runs whose times are in the log alone.
    pub(crate) in_log: Vec<(u64, u64)>,
}

/// What a dispatcher is asked.
pub(crate) enum Command {
    Attach(Box<Attach>),
    Settle(SettleWanted, Answer<u64>),
    Pull(PullAsked, Answer<Vec<Delivery>>),
    /// Everything below is to count as settled, and nothing above.
    Seek(u64, Answer<u64>),
    Explain(Answer<SegmentExplained>),
    Delayed(DelayedAsked, Answer<DelayedFound>),
    /// What waits for a time, of these runs; and these offsets, which are known to.
    Cancel(Vec<(u64, u64)>, Vec<(u64, u64)>, Answer<u64>),
    /// Write the exact lease table and give nothing more: the segment is about to be closed (L4).
    Stop(oneshot::Sender<()>),
    /// Only there to wake it: it has dead letters to publish.
    Resume,
}

/// What everybody may see of a dispatcher.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// The one that gets the messages.
    pub(crate) consumer: Option<String>,
    pub(crate) consumers: u32,
    pub(crate) dead_letters: u64,
    pub(crate) delayed: u64,
    /// What holds the next message up, as of some seconds ago; none: there is none, or it is on its way.
    pub(crate) blocked: Option<&'static str>,
}

/// Settings, and the revision they were read at.
pub(crate) type SettingsRead = (Revision, SubscriptionSettings);

/// One dispatcher.
#[derive(Clone, Debug)]
struct Entry {
    name: SubscriptionName,
    commands: mpsc::Sender<Command>,
    settings: watch::Sender<SettingsRead>,
    seen: Arc<Mutex<Seen>>,
    deleted: CancellationToken,
}

/// The dispatchers of one segment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Dispatchers {
    entries: Arc<Mutex<BTreeMap<SubscriptionId, Entry>>>,
}

impl Dispatchers {
    /// Hands a command to the subscription's dispatcher; one is started if there is none. Waits while its queue is full.
    ///
    /// # Errors
    /// SUBSCRIPTION_NOT_FOUND when it has no cursor here.
    pub(crate) async fn send(
        &self,
        shared: &Shared,
        segment: &Arc<Segment>,
        subscription: &Subscription,
        mut command: Command,
    ) -> Result<(), Refusal> {
        loop {
            let commands = self.running(shared, segment, subscription)?;
            match commands.send(command).await {
                Ok(()) => return Ok(()),
                // It ended in between.
                Err(mpsc::error::SendError(back)) => command = back,
            }
        }
    }

    fn running(
        &self,
        shared: &Shared,
        segment: &Arc<Segment>,
        subscription: &Subscription,
    ) -> Result<mpsc::Sender<Command>, Refusal> {
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.get(&subscription.id)
            && !entry.commands.is_closed()
        {
            return Ok(entry.commands.clone());
        }
        let (commands, received) = mpsc::channel(COMMANDS_MAX);
        let seen: Arc<Mutex<Seen>> = Arc::default();
        let deleted = CancellationToken::new();
        let read = (subscription.revision, subscription.settings.clone());
        let (settings, told) = watch::channel(read);
        let dispatcher = Dispatcher::new(
            shared.clone(),
            Arc::clone(segment),
            subscription,
            (Arc::clone(&seen), deleted.clone(), told),
        )?;
        let (name, entered) = (subscription.name.clone(), commands.clone());
        let entry = Entry { name: name.clone(), commands: entered, settings, seen, deleted };
        entries.insert(subscription.id, entry);
        // From here on it is told of changes; one that came before is known to the mirror.
        shared.hub.has_settings_of((segment.id().topic, name), subscription.revision);
        let (dispatchers, id) = (self.clone(), subscription.id);
        shared.streams.spawn("dispatcher", async move {
            dispatcher.run(received, |commands| dispatchers.leave(id, commands)).await;
        });
        Ok(commands)
    }

    /// The dispatcher has nothing to do: it is out, unless a command came meanwhile.
    fn leave(&self, id: SubscriptionId, commands: &mut mpsc::Receiver<Command>) -> bool {
        let mut entries = self.entries.lock();
        if !commands.is_empty() {
            return false;
        }
        commands.close();
        remove_closed(&mut entries, id);
        true
    }

    /// A dispatcher has ended.
    pub(super) fn forget(&self, id: SubscriptionId) {
        remove_closed(&mut self.entries.lock(), id);
    }

    /// Those that run, with the revision of the settings they have.
    pub(super) fn running_settings(&self) -> Vec<(SubscriptionName, Revision)> {
        let entries = self.entries.lock();
        entries.values().map(|entry| (entry.name.clone(), entry.settings.borrow().0)).collect()
    }

    /// A subscription as it was read: its dispatcher, if it runs, goes by these settings, unless it has later ones.
    pub(super) fn tell_settings(&self, subscription: &Subscription) {
        let Some(entry) = self.entries.lock().get(&subscription.id).cloned() else { return };
        entry.settings.send_if_modified(|told| {
            let later = subscription.revision > told.0;
            if later {
                *told = (subscription.revision, subscription.settings.clone());
            }
            later
        });
    }

    /// What everybody may see of the subscription's dispatcher.
    pub(crate) fn seen(&self, id: SubscriptionId) -> Option<Seen> {
        self.entries.lock().get(&id).map(|entry| entry.seen.lock().clone())
    }

    /// All that run.
    pub(crate) fn all_seen(&self) -> Vec<Seen> {
        self.entries.lock().values().map(|entry| entry.seen.lock().clone()).collect()
    }

    /// The subscription is deleted: its dispatcher ends, with its consumers.
    pub(crate) fn end(&self, id: SubscriptionId) {
        if let Some(entry) = self.entries.lock().remove(&id) {
            entry.deleted.cancel();
        }
    }

    /// L4: every dispatcher writes its exact lease table and gives nothing more.
    pub(crate) async fn stop(&self) {
        let all: Vec<Entry> = self.entries.lock().values().cloned().collect();
        let stops = all.into_iter().map(|entry| async move {
            let (done, stopped) = oneshot::channel();
            if entry.commands.send(Command::Stop(done)).await.is_ok() {
                let _ended_meanwhile = stopped.await;
            }
        });
        futures::future::join_all(stops).await;
    }
}

/// Its successor may be there already: that one stays.
fn remove_closed(entries: &mut BTreeMap<SubscriptionId, Entry>, id: SubscriptionId) {
    if entries.get(&id).is_some_and(|entry| entry.commands.is_closed()) {
        entries.remove(&id);
    }
}

/// The subscription was deleted.
pub(crate) fn deleted() -> Refusal {
    Refusal::new(Reason::SubscriptionNotFound, "the subscription was deleted")
}
