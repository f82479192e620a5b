//! Walks through a segment's objects and checks every byte of them, for an operator who wants to know.

use std::sync::Arc;

use bytes::Bytes;
use geminga_proto::ids::SegmentId;
use tokio::sync::mpsc;

use super::{
    Stage, format,
    object::{ColdReader, ObjectLedger, read_error},
    upload::read_back,
};
use crate::{error::ReadError, list::List, types::TierProgress};

/// Tells progress after each ledger and each damage; ends early when nobody listens. Changes nothing.
pub(crate) async fn verify(
    reader: Arc<ColdReader>,
    segment: SegmentId,
    list: Arc<List>,
    watcher: mpsc::Sender<TierProgress>,
) {
    let offloaded = list.data.iter().filter(|listed| listed.stage() >= Some(Stage::Uploaded));
    let ledgers: Vec<ObjectLedger> = offloaded
        .filter_map(|listed| {
            let offload = listed.offload.clone()?;
            Some(ObjectLedger { segment, ledger: listed.id, offload })
        })
        .collect();
    let bytes_total = ledgers.iter().map(|ledger| ledger.offload.object_bytes()).sum();
    let mut bytes_done = 0;
    for ledger in ledgers {
        for (part, object) in ledger.offload.objects.iter().enumerate() {
            let problem = verify_object(&reader, &ledger, part).await.err();
            bytes_done += object.bytes;
            let told = TierProgress {
                ledger: ledger.ledger,
                bytes_done,
                bytes_total,
                problem: problem.map(|error| error.to_string()).unwrap_or_default(),
            };
            if watcher.send(told).await.is_err() {
                return;
            }
        }
    }
}

async fn verify_object(
    reader: &ColdReader,
    ledger: &ObjectLedger,
    part: usize,
) -> Result<(), ReadError> {
    let id = ledger.id(part);
    let object = ledger.offload.objects[part];
    read_back(&reader.cold, &id.name(), &object)
        .await
        .map_err(|error| ReadError::Damaged(format!("ledger {}: {error}", ledger.ledger)))?;
    for row in reader.index(ledger, part).await?.iter() {
        let range = row.position..row.position + u64::from(row.length);
        let bytes: Bytes = reader
            .cold
            .read(&id.name(), range)
            .await
            .map_err(|error| read_error(ledger.ledger, &error))?;
        format::decode_block(&id, row, bytes)?;
    }
    Ok(())
}
