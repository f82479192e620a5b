//! The clustered form: etcd. Tested with 3.7; 3.5.0 to 3.5.2 lose data when they are killed (T27).
//!
//! ```text
//! call --> endpoints.rs  which member, deadlines, when to go on to the next
//!            |- translate.rs   our words to etcd's and back (pure)
//!            |- fate.rs        what an error says about the request (pure)
//!            `- watch.rs       answers to whole revisions (pure), one stream a watch
//! ```
//! It deliberately does not retry a change (MD3): that is [`crate::commit`]'s work.

mod config;
mod endpoints;
mod fate;
mod translate;
mod watch;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
pub use config::{EtcdConfig, EtcdConfigError, EtcdTls, PREFIX_BYTES_MAX, Secret};
use etcd_client::WatchOptions;

use self::{
    endpoints::{Endpoints, Repeat},
    fate::{Fate, NO_SPACE},
    watch::{Assembler, EtcdWatch},
};
use crate::{
    Key, KeyValue, LeaseId, MetadataStore, Op, Page, RangeRequest, Revision, StoreError, Txn,
    TxnOutcome, Watch,
    state::{check_limits, check_many},
};

/// The most bytes of one answer: 128 values of the largest size.
const ANSWER_BYTES_MAX: usize = 256 << 20;
/// The most bytes of one answer of a watch, or of one page; a page that is longer is asked for in halves.
const PAGE_BYTES_MAX: usize = 64 << 20;

/// A store in etcd. Clones share it.
///
/// Every call ends within [`EtcdConfig::request_deadline`]. Reads are linearizable (MD2). A lease is as long as asked
/// for, rounded up to whole seconds, but at least 1.5 times etcd's election timeout (2 s with etcd's defaults).
///
/// **Space.** When etcd is full it refuses changes, except deletions, and reads go on. It may also carry out the very
/// transaction that fills it *and then* answer that there is no space. So a transaction answered like that counts as
/// `Refused` only after its conditions were seen to hold still; in every other case the answer is `Unknown` (MD3).
#[derive(Clone, Debug)]
pub struct EtcdStore {
    endpoints: Arc<Endpoints>,
}

impl EtcdStore {
    /// Takes the configuration in. etcd need not be there yet: the first call makes the connection.
    ///
    /// # Errors
    /// [`EtcdConfigError`]; never for an etcd that is not there.
    pub async fn connect(config: EtcdConfig) -> Result<Self, EtcdConfigError> {
        config.check()?;
        config.options().await?;
        Ok(Self { endpoints: Arc::new(Endpoints::new(config)) })
    }

    fn prefix(&self) -> &str {
        self.endpoints.prefix()
    }

    /// After "no space": were the changes made all the same? Looks at the conditions once; etcd has answered, so nothing
    /// is under way any more.
    async fn settle_no_space(&self, txn: &Txn) -> StoreError {
        let unknown = || StoreError::Unknown(NO_SPACE.to_owned());
        if !translate::breaks_itself(txn) {
            return unknown();
        }
        let looked = self.endpoints.call(Repeat::Harmless, |client| {
            let conditions = translate::conditions(self.prefix(), txn);
            async move { kv(&client).txn(conditions).await }
        });
        match looked.await {
            Ok(answer) if answer.0.succeeded => StoreError::Refused(NO_SPACE.to_owned()),
            Ok(_) | Err(_) => unknown(),
        }
    }
}

fn kv(client: &etcd_client::Client) -> etcd_client::KvClient {
    client.kv_client().max_decoding_message_size(ANSWER_BYTES_MAX)
}

/// An answer of a wrong shape to a read.
fn odd(odd: translate::Odd) -> StoreError {
    StoreError::Unavailable(odd.to_string())
}

#[async_trait]
impl MetadataStore for EtcdStore {
    async fn get(&self, key: &Key) -> Result<(Revision, Option<KeyValue>), StoreError> {
        let answer = self.endpoints.call(Repeat::Harmless, |client| {
            let full = translate::full(self.prefix(), key);
            async move { kv(&client).get(full, None).await }
        });
        let read_error = |fate: Fate| fate.of_read(Revision(0));
        let mut answer = answer.await.map_err(read_error)?.0;
        let header = self.endpoints.same_cluster(answer.header.take()).map_err(read_error)?;
        let found = translate::first(self.prefix(), answer).map_err(odd)?;
        Ok((Revision(header.revision), found))
    }

    async fn get_many(
        &self,
        keys: &[Key],
    ) -> Result<(Revision, Vec<Option<KeyValue>>), StoreError> {
        check_many(keys)?;
        let answer = self.endpoints.call(Repeat::Harmless, |client| {
            let gets = translate::gets(self.prefix(), keys);
            async move { kv(&client).txn(gets).await }
        });
        let read_error = |fate: Fate| fate.of_read(Revision(0));
        let mut answer = answer.await.map_err(read_error)?.0;
        let header = self.endpoints.same_cluster(answer.header.take()).map_err(read_error)?;
        let found = translate::found(self.prefix(), answer.responses, keys.len()).map_err(odd)?;
        Ok((Revision(header.revision), found))
    }

    async fn range(&self, request: RangeRequest) -> Result<Page, StoreError> {
        let mut limit = if request.limit == 0 { 1_000 } else { request.limit };
        let read_error = |fate: Fate| fate.of_read(request.at.unwrap_or_default());
        let mut answer = loop {
            let answer = self.endpoints.call(Repeat::Harmless, |client| {
                let (start, options) = translate::range(self.prefix(), &request, limit);
                let mut client = client.kv_client().max_decoding_message_size(PAGE_BYTES_MAX);
                async move { client.get(start, Some(options)).await }
            });
            match answer.await {
                Ok(answer) => break answer.0,
                Err(Fate::TooLarge) if limit > 1 => limit /= 2,
                Err(fate) => return Err(read_error(fate)),
            }
        };
        let header = self.endpoints.same_cluster(answer.header.take()).map_err(read_error)?;
        let items = answer.kvs.into_iter().map(|found| translate::key_value(self.prefix(), found));
        Ok(Page {
            revision: request.at.unwrap_or(Revision(header.revision)),
            items: items.collect::<Result<_, _>>().map_err(odd)?,
            more: answer.more,
        })
    }

    async fn txn(&self, txn: Txn) -> Result<TxnOutcome, StoreError> {
        check_limits(&txn)?;
        let answer = self.endpoints.call(Repeat::Never, |client| {
            let request = translate::txn(self.prefix(), &txn);
            async move { kv(&client).txn(request).await }
        });
        let lease = txn.changes.iter().find_map(|change| match change {
            Op::Put { lease, .. } => *lease,
            Op::Delete(_) => None,
        });
        let write_error = |fate: Fate| fate.of_write(lease.unwrap_or(LeaseId(0)));
        let mut answer = match answer.await {
            Ok(answer) => answer.0,
            Err(Fate::NoSpace) => return Err(self.settle_no_space(&txn).await),
            Err(fate) => return Err(write_error(fate)),
        };
        let header = self.endpoints.same_cluster(answer.header.take()).map_err(write_error)?;
        let outcome = translate::outcome(self.prefix(), &txn, &header, answer);
        outcome.map_err(|odd| StoreError::Unknown(odd.to_string()))
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, StoreError> {
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let seconds = i64::try_from(seconds.max(1)).unwrap_or(i64::MAX);
        let answer = self.endpoints.call(Repeat::Never, |client| async move {
            client.lease_client().grant(seconds, None).await
        });
        match answer.await {
            Ok(answer) if answer.0.id != 0 => Ok(LeaseId(answer.0.id)),
            Ok(answer) => Err(StoreError::Unknown(answer.0.error)),
            Err(fate) => Err(fate.of_write(LeaseId(0))),
        }
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), StoreError> {
        // A stream for each renewal: none is left behind that renews a lease nobody believes in.
        let answer = self.endpoints.call(Repeat::Harmless, |client| async move {
            client.lease_client().keep_alive(lease.0).await.map(drop)
        });
        answer.await.map_err(|fate| fate.of_write(lease))
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<(), StoreError> {
        let answer = self.endpoints.call(Repeat::Never, |client| async move {
            client.lease_client().revoke(lease.0).await.map(drop)
        });
        answer.await.map_err(|fate| fate.of_write(lease))
    }

    async fn watch(&self, prefix: &Key, from: Revision) -> Result<Box<dyn Watch>, StoreError> {
        let from = from.max(Revision(1)); // 0 would mean "now" to etcd
        let made = self.endpoints.call(Repeat::Harmless, |client| {
            let options =
                WatchOptions::new().with_prefix().with_start_revision(from.0).with_fragment();
            let mut watches = client.watch_client().max_decoding_message_size(PAGE_BYTES_MAX);
            let full = translate::full(self.prefix(), prefix);
            async move {
                let mut stream = watches.watch(full, Some(options)).await?;
                let made = stream.message().await?; // in the same call, so that it has a deadline
                Ok((stream, made, client))
            }
        });
        let (stream, made, client) = made.await.map_err(|fate| fate.of_read(from))?;
        let unavailable = |reason: &str| StoreError::Unavailable(reason.to_owned());
        let made = made.ok_or_else(|| unavailable("a watch ended at once"))?.0;
        self.endpoints.same_cluster(made.header).map_err(|fate| fate.of_read(from))?;
        if made.compact_revision != 0 {
            return Err(StoreError::Compacted(Revision(made.compact_revision)));
        }
        if !made.created || made.canceled {
            return Err(unavailable(&made.cancel_reason));
        }
        let assembler = Assembler::new(self.prefix().to_owned(), from);
        Ok(Box::new(EtcdWatch::new(stream, assembler, client)))
    }
}
