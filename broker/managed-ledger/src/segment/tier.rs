//! The owner's work on old ledgers: each arrow of an offload (section 13) and each trim (M3) is one list change, least
//! urgent of all; the upload itself runs beside the owner.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures::FutureExt;
use geminga_bookie_client::bookie_rpc::EntryRange;
use geminga_proto::ids::{LedgerId, Offset};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::Instant,
};

use super::{
    jobs::{Done, Job, PREEMPTED},
    owner::Owner,
};
use crate::{
    change::{ChangeError, Current},
    cursor_log::Fold,
    list::{Listed, ListedState},
    offload::{
        Object, Stage, TierPolicy,
        plan::{self, Plan, Situation},
        upload::{Upload, UploadError, upload_memory_bytes},
    },
    types::TierProgress,
};

/// Longest pause after failed uploads.
const RETRY_MAX: Duration = Duration::from_secs(30);

/// What the owner knows of its old ledgers, besides the list.
pub(super) struct Tier {
    policy: watch::Receiver<Option<TierPolicy>>,
    /// Something may be due.
    pub(super) due: bool,
    upload: Option<Running>,
    /// Read back whole, and not listed as such yet.
    ended: Option<(LedgerId, [u8; 16], Vec<Object>)>,
    failures: u32,
    not_before: Option<Instant>,
    forced: Forced,
    pub(super) dedup: DedupMark,
}

/// Why the last steps failed; empty for those that did not.
#[derive(Debug, Default)]
pub(super) struct TierErrors {
    pub(super) upload: String,
    /// Of a trim or a deletion.
    pub(super) change: String,
    pub(super) compaction: String,
}

/// An upload beside the owner; it ends with its owner.
struct Running {
    ledger: LedgerId,
    uuid: [u8; 16],
    begun: Instant,
    task: JoinHandle<Result<Vec<Object>, UploadError>>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What somebody wants uploaded now.
#[derive(Default)]
struct Forced {
    ledgers: BTreeSet<LedgerId>,
    /// First this one is closed.
    after_roll: Option<LedgerId>,
    watchers: Vec<mpsc::Sender<TierProgress>>,
    bytes_done: u64,
    bytes_total: u64,
}

/// From where a load would replay (DD2), and what has to be readable for that (C4).
#[derive(Debug)]
pub(super) struct DedupMark {
    next: Offset,
    /// None: in the list value itself, or read when the segment was loaded.
    at: Option<(LedgerId, EntryRange)>,
}

impl DedupMark {
    /// A record of it is acknowledged.
    pub(super) fn logged(&mut self, next: Offset, ledger: LedgerId, range: EntryRange) {
        (self.next, self.at) = (next, Some((ledger, range)));
    }

    /// It went into the list value.
    pub(super) fn inline(&mut self, next: Offset) {
        (self.next, self.at) = (next, None);
    }
}

pub(super) enum TierEvent {
    PolicySet,
    UploadEnded(UploadOutcome),
}

pub(super) struct UploadOutcome {
    ledger: LedgerId,
    uuid: [u8; 16],
    begun: Instant,
    result: Result<Vec<Object>, String>,
}

/// A list change about old ledgers has an end.
pub(super) enum TierDone {
    Began(LedgerId, [u8; 16], Result<Current, ChangeError>),
    Uploaded(LedgerId, Result<Current, ChangeError>),
    Deleted(Vec<LedgerId>, Result<Current, ChangeError>),
    Trimmed(usize, Result<Current, ChangeError>),
}

impl Tier {
    pub(super) fn new(policy: watch::Receiver<Option<TierPolicy>>, dedup_next: Offset) -> Self {
        Self {
            policy,
            due: true,
            upload: None,
            ended: None,
            failures: 0,
            not_before: None,
            forced: Forced::default(),
            dedup: DedupMark { next: dedup_next, at: None },
        }
    }

    /// What happens next here. Cancel-safe; pending for ever if nothing can.
    pub(super) async fn next(&mut self) -> TierEvent {
        let Self { policy, upload, .. } = self;
        let ended = async {
            match upload {
                Some(running) => (&mut running.task).await,
                None => std::future::pending().await,
            }
        };
        let result = tokio::select! {
            biased;
            Ok(()) = policy.changed() => return TierEvent::PolicySet,
            result = ended => result,
            else => std::future::pending().await,
        };
        let result = match result {
            Ok(Ok(objects)) => Ok(objects),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("the upload's task ended".to_owned()),
        };
        let Some(running) = upload.take() else { return std::future::pending().await };
        let (ledger, uuid, begun) = (running.ledger, running.uuid, running.begun);
        TierEvent::UploadEnded(UploadOutcome { ledger, uuid, begun, result })
    }
}

impl Owner {
    /// The next list change about old ledgers, if one is due.
    pub(super) fn next_tier_job(&mut self) -> Option<Job> {
        // O3: nothing is started while the claim is provisional.
        let standing = self.ledgers.parts().client.standing().confirmed();
        if self.closing.is_some() || !standing {
            return None;
        }
        if let Some((ledger, uuid, objects)) = self.tier.ended.take() {
            return Some(self.list_upload(ledger, uuid, objects));
        }
        self.note_roll();
        if !std::mem::take(&mut self.tier.due) {
            return None;
        }
        let Plan { trim, delete, upload } = self.plan_tier();
        if trim > 0 {
            return Some(self.trim_data(trim));
        }
        if !delete.is_empty() {
            return Some(self.delete_offloaded(delete));
        }
        let may = self.tier.upload.is_none()
            && self.tier.not_before.is_none_or(|at| Instant::now() >= at);
        self.begin_upload(upload.filter(|_| may)?)
    }

    fn plan_tier(&self) -> Plan {
        let policy = self.tier.policy.borrow().clone();
        plan::plan(&Situation {
            list: &self.current.list,
            now_ms: self.now_ms(),
            policy: policy.as_ref(),
            slowest: self.slowest_cursor(),
            dedup_next: self.tier.dedup.next,
            compacting: self.compact.is_running(),
            open_bytes: self.shared.view.open_bytes(),
            forced: &self.tier.forced.ledgers,
        })
    }

    // ---- trim (M3) ----

    /// From here until it has an end the prefix counts as gone.
    fn trim_data(&mut self, count: usize) -> Job {
        let preempt = self.preemptible();
        let end = self.current.list.data[count - 1].end();
        self.shared.view.set_floor(end);
        let (changer, current) = (self.changer(), self.current.clone());
        let (shared, mark) = (Arc::clone(&self.shared), self.tier.dedup.at);
        let open_log = self.log.writer().cloned();
        async move {
            // C4: what a load would replay from must be readable before older entries go.
            if let Some((ledger, range)) = mark {
                let listed = current.list.cursor_log.iter().find(|listed| listed.id == ledger);
                let read = async {
                    match (open_log.filter(|writer| writer.id() == ledger), listed) {
                        (Some(writer), _) => shared.view.read_back(&writer, range).await,
                        (None, Some(listed)) => shared.view.read_back_closed(listed, range).await,
                        (None, None) => Ok(Vec::new()),
                    }
                };
                let Some(read) = preempt.run_until_cancelled(read).await else {
                    let why = PREEMPTED.to_owned();
                    return Done::Tier(TierDone::Trimmed(count, Err(ChangeError::NotNow(why))));
                };
                let entries = read.unwrap_or_default();
                let mut fold = Fold::default();
                let whole =
                    entries.iter().all(|entry| fold.apply(&entry.payload.to_bytes()).is_ok());
                if entries.is_empty() || !whole {
                    let why = "the deduplication snapshot cannot be read back".to_owned();
                    return Done::Tier(TierDone::Trimmed(count, Err(ChangeError::NotNow(why))));
                }
            }
            Done::Tier(TierDone::Trimmed(count, changer.trim(current, count).await))
        }
        .boxed()
    }

    // ---- offload ----

    /// X1: the list names the upload before its first object is written.
    fn begin_upload(&mut self, ledger: LedgerId) -> Option<Job> {
        let listed = self.current.list.data.iter().find(|listed| listed.id == ledger)?;
        let Some(cold) = self.ledgers.cold() else {
            self.upload_failed(ledger, "no cold storage is set up".to_owned());
            return None;
        };
        let objects = (listed.counts.bytes / cold.config().object_bytes.max(1)) as usize + 2;
        let uuid = self.ledgers.parts().random.uuid();
        let (changer, current, at_ms) = (self.changer(), self.current.clone(), self.now_ms());
        let begin = async move {
            let began = changer.begin_upload(current, ledger, uuid, at_ms, objects).await;
            Done::Tier(TierDone::Began(ledger, uuid, began))
        };
        Some(begin.boxed())
    }

    fn start_upload(&mut self, ledger: LedgerId, uuid: [u8; 16]) {
        let listed = self.current.list.data.iter().find(|listed| listed.id == ledger).cloned();
        let (Some(listed), Some(cold)) = (listed, self.ledgers.cold()) else { return };
        let forced = &self.tier.forced;
        let watched = forced.ledgers.contains(&ledger);
        let upload = Upload {
            view: Arc::clone(&self.shared.view),
            cold,
            segment: self.shared.segment,
            listed,
            uuid,
            watchers: if watched { forced.watchers.clone() } else { Vec::new() },
            bytes_before: forced.bytes_done,
            bytes_total: forced.bytes_total,
        };
        let budget = self.ledgers.offload_bytes().clone();
        let run = async move {
            // One upload more than the budget allows waits its turn; one alone always fits.
            let bytes = upload_memory_bytes(&upload.cold).min(budget.total());
            let _permit = budget.acquire(bytes).await;
            upload.run().await
        };
        let task = self.ledgers.parts().tasks.spawn_returning("offload", run);
        self.tier.upload = Some(Running { ledger, uuid, begun: Instant::now(), task });
    }

    pub(super) fn upload_ended(&mut self, outcome: UploadOutcome) {
        let UploadOutcome { ledger, uuid, begun, result } = outcome;
        let metrics = &self.ledgers.parts().metrics;
        match result {
            Ok(objects) => {
                metrics.upload_duration.observe(begun.elapsed().as_secs_f64());
                self.tier.ended = Some((ledger, uuid, objects));
            }
            Err(why) => {
                metrics.upload_failures.inc();
                self.upload_failed(ledger, why);
            }
        }
    }

    /// It stays listed as uploading, and is begun again under another uuid after a pause (X1, X4).
    fn upload_failed(&mut self, ledger: LedgerId, why: String) {
        tracing::warn!(
            topic = self.shared.segment.topic.0,
            segment = self.shared.segment.segment,
            ledger = ledger.0,
            why,
            "ledger not offloaded"
        );
        let pause = self.ledgers.parts().config.offload_retry;
        let pause = pause.saturating_mul(1 << self.tier.failures.min(12)).min(RETRY_MAX);
        self.tier.failures += 1;
        self.tier.not_before = Some(Instant::now() + pause);
        self.tier.forced.ended(ledger, 0, &why);
        self.shared.tier_errors.lock().upload = why;
        // What else is forced need not wait for a tick.
        if !self.tier.forced.ledgers.is_empty() {
            (self.tier.due, self.tier.not_before) = (true, None);
        }
    }

    /// X2: they were read back.
    fn list_upload(&mut self, ledger: LedgerId, uuid: [u8; 16], objects: Vec<Object>) -> Job {
        let (changer, current, at_ms) = (self.changer(), self.current.clone(), self.now_ms());
        async move {
            let listed = changer.uploaded(current, ledger, uuid, at_ms, &objects).await;
            Done::Tier(TierDone::Uploaded(ledger, listed))
        }
        .boxed()
    }

    /// X3: the lag is over; the objects are the only copy from now on.
    fn delete_offloaded(&mut self, ledgers: Vec<LedgerId>) -> Job {
        let (changer, current, at_ms) = (self.changer(), self.current.clone(), self.now_ms());
        async move {
            let deleted = changer.delete_offloaded(current, &ledgers, at_ms).await;
            Done::Tier(TierDone::Deleted(ledgers, deleted))
        }
        .boxed()
    }

    pub(super) fn tier_done(&mut self, done: TierDone) {
        let (ledger, result) = match &done {
            TierDone::Began(ledger, _, result) | TierDone::Uploaded(ledger, result) => {
                (Some(*ledger), result)
            }
            TierDone::Deleted(_, result) | TierDone::Trimmed(_, result) => (None, result),
        };
        match result {
            Ok(current) => {
                self.current = current.clone();
                self.show();
                self.tier.due = true;
                self.note_tier_step(done);
            }
            Err(ChangeError::Fenced(why)) => self.fence(&why.clone()),
            // Nothing happened, and nothing depends on it: the next tick plans anew.
            Err(ChangeError::NotNow(why)) => match ledger {
                Some(ledger) => self.upload_failed(ledger, why.clone()),
                None => {
                    tracing::info!(topic = self.shared.segment.topic.0, why, "nothing trimmed");
                    self.shared.tier_errors.lock().change.clone_from(why);
                }
            },
        }
        // The list shows by now what is gone; after a refusal nothing is.
        self.shared.view.set_floor(Offset(0));
    }

    fn note_tier_step(&mut self, done: TierDone) {
        let segment = self.shared.segment;
        let metrics = &self.ledgers.parts().metrics;
        match done {
            TierDone::Began(ledger, uuid, _) => self.start_upload(ledger, uuid),
            TierDone::Uploaded(ledger, _) => {
                self.shared.tier_errors.lock().upload.clear();
                let listed = self.current.list.data.iter().find(|listed| listed.id == ledger);
                let (bytes, object_bytes) = listed.map_or((0, 0), |listed| {
                    let offload = listed.offload.as_ref();
                    (listed.counts.bytes, offload.map_or(0, |offload| offload.object_bytes()))
                });
                metrics.uploads.inc();
                metrics.upload_bytes.inc_by(object_bytes);
                (self.tier.failures, self.tier.not_before) = (0, None);
                self.tier.forced.ended(ledger, bytes, "");
                tracing::info!(
                    topic = segment.topic.0,
                    segment = segment.segment,
                    ledger = ledger.0,
                    bytes,
                    object_bytes,
                    "ledger offloaded"
                );
            }
            TierDone::Deleted(ledgers, _) => {
                self.shared.tier_errors.lock().change.clear();
                metrics.offloaded_deletes.inc_by(ledgers.len() as u64);
                tracing::info!(
                    topic = segment.topic.0,
                    segment = segment.segment,
                    ledgers = ledgers.len(),
                    "offloaded ledgers deleted on bookies"
                );
            }
            TierDone::Trimmed(count, _) => {
                self.shared.tier_errors.lock().change.clear();
                metrics.trimmed_ledgers.inc_by(count as u64);
                // An upload of what is gone is of no use (its objects are the janitor's).
                let listed = &self.current.list.data;
                let gone = |ledger: LedgerId| listed.iter().all(|one| one.id != ledger);
                self.tier.upload.take_if(|running| gone(running.ledger));
                self.tier.ended.take_if(|(ledger, ..)| gone(*ledger));
                let forced: Vec<LedgerId> =
                    self.tier.forced.ledgers.iter().copied().filter(|l| gone(*l)).collect();
                for ledger in forced {
                    self.tier.forced.ended(ledger, 0, "");
                }
                tracing::info!(
                    topic = segment.topic.0,
                    segment = segment.segment,
                    ledgers = count,
                    first_offset = self.current.list.first_offset.0,
                    "ledgers trimmed"
                );
            }
        }
    }

    // ---- on demand ----

    /// Every closed ledger goes to cold storage now; with `roll` the open one is closed first.
    pub(super) fn begin_offload(&mut self, roll: bool, watcher: mpsc::Sender<TierProgress>) {
        let open = self.data.writer().map(|writer| writer.id());
        let has_some = self.data_ledger.counts.entries > 0 || !self.data.is_empty();
        if roll && has_some && self.closing.is_none() {
            self.want.roll_data |= self.data.is_open();
            self.tier.forced.after_roll = open;
        }
        self.tier.forced.watchers.push(watcher);
        let listed: Vec<Listed> = self.current.list.data.clone();
        self.force(&listed);
    }

    /// The ledger that was to be closed first is closed.
    fn note_roll(&mut self) {
        let Some(id) = self.tier.forced.after_roll else { return };
        let listed = self.current.list.data.iter().find(|listed| listed.id == id).cloned();
        match listed {
            Some(listed) if listed.state != ListedState::Closed => {}
            listed => {
                self.tier.forced.after_roll = None;
                self.force(listed.as_slice());
            }
        }
    }

    fn force(&mut self, listed: &[Listed]) {
        let forced = &mut self.tier.forced;
        for one in listed {
            let waits = one.state == ListedState::Closed
                && one.counts.entries > 0
                && one.stage() <= Some(Stage::Uploading);
            if waits && forced.ledgers.insert(one.id) {
                forced.bytes_total += one.counts.bytes;
            }
        }
        forced.settle();
        (self.tier.due, self.tier.not_before) = (true, None);
    }
}

impl Forced {
    /// One ledger has an end, good or bad.
    fn ended(&mut self, ledger: LedgerId, bytes: u64, problem: &str) {
        if !self.ledgers.remove(&ledger) {
            return;
        }
        self.bytes_done += bytes;
        for watcher in &self.watchers {
            let _ = watcher.try_send(TierProgress {
                ledger,
                bytes_done: self.bytes_done,
                bytes_total: self.bytes_total,
                problem: problem.to_owned(),
            });
        }
        self.settle();
    }

    /// Once nothing is left those who listen are let go.
    fn settle(&mut self) {
        if self.ledgers.is_empty() && self.after_roll.is_none() {
            *self = Self::default();
        }
    }
}
