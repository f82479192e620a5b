//! Answers to READ (D9): held, the explicit no, or unknown. Nothing that failed is ever called absent.

use std::{collections::BTreeMap, io, sync::Arc};

use bytes::Bytes;
use geminga_bookie_client::{
    bookie_rpc::{EntryAnswer, EntryRange, Unknown},
    entry::Entry,
};
use geminga_proto::ids::{EntryId, LedgerId};

use crate::{
    fencing::Row,
    state::{Core, Indexes, Shared},
    validity::Validity,
};

/// One entry of a read, as far as memory knows.
#[derive(Debug)]
pub(crate) enum Wanted {
    /// From the write cache.
    Recent(Entry),
    /// In a journal file.
    At(EntryId, Row),
    /// Perhaps in an index file.
    Unknown(EntryId),
    /// Neither in memory nor in any index file.
    Missing,
}

/// What the disk made of it.
#[derive(Debug)]
pub(crate) enum Got {
    Held(Entry),
    Missing,
    Unknown(Unknown),
}

/// Collects what memory knows of a range, in order, until `bytes_max` or `entries_max` is reached. At least one.
pub(crate) fn collect(
    core: &Core,
    ledger: LedgerId,
    range: EntryRange,
    bytes_max: usize,
    entries_max: u64,
) -> Vec<Wanted> {
    let last = EntryId(
        range.last.0.min(range.first.0.saturating_add(entries_max.max(1) - 1)).max(range.first.0),
    );
    let rows = core.ledgers.rows(ledger, range.first, last);
    let indexed_max = core.ledgers.indexed_max(ledger);
    let mut wanted = Vec::new();
    let mut bytes = 0;
    for id in (range.first.0..=last.0).map(EntryId) {
        if bytes >= bytes_max && !wanted.is_empty() {
            break;
        }
        wanted.push(match (core.cache.get(ledger, id), rows.get(&id)) {
            (Some(entry), _) => {
                bytes += entry.payload.len();
                Wanted::Recent(entry)
            }
            (None, Some(row)) => {
                bytes += row.length as usize;
                Wanted::At(id, *row)
            }
            (None, None) if indexed_max >= Some(id) => Wanted::Unknown(id),
            (None, None) => Wanted::Missing,
        });
    }
    wanted
}

/// Whether the disk has to be asked.
pub(crate) fn needs_disk(wanted: &[Wanted]) -> bool {
    wanted.iter().any(|wanted| matches!(wanted, Wanted::At(..) | Wanted::Unknown(_)))
}

/// Fetches the rest from the disk. Blocking.
pub(crate) fn fetch(
    shared: &Shared,
    indexes: &Indexes,
    ledger: LedgerId,
    wanted: Vec<Wanted>,
    bytes_max: usize,
) -> Vec<Got> {
    let mut unknown = wanted.iter().filter_map(|wanted| match wanted {
        Wanted::Unknown(id) => Some(*id),
        _ => None,
    });
    let validity = shared.core().ledgers.validity(ledger);
    let indexed = match (unknown.next(), unknown.last()) {
        (None, _) => Ok(BTreeMap::new()),
        (Some(first), last) => look_up(indexes, ledger, first, last.unwrap_or(first), validity),
    };
    let mut bytes = 0;
    let mut got = Vec::with_capacity(wanted.len());
    for wanted in wanted {
        if bytes >= bytes_max && !got.is_empty() {
            break;
        }
        got.push(match wanted {
            Wanted::Recent(entry) => Got::Held(entry),
            Wanted::Missing => Got::Missing,
            Wanted::At(id, row) => read_entry(shared, ledger, id, row),
            Wanted::Unknown(id) => match &indexed {
                Err(error) => Got::Unknown(index_error(shared, ledger, error)),
                Ok(rows) => {
                    rows.get(&id).map_or(Got::Missing, |row| read_entry(shared, ledger, id, *row))
                }
            },
        });
        if let Some(Got::Held(entry)) = got.last() {
            bytes += entry.payload.len();
        }
    }
    got
}

/// The rows of a range in the index files that count; the newest file wins.
pub(crate) fn look_up(
    indexes: &Indexes,
    ledger: LedgerId,
    first: EntryId,
    last: EntryId,
    validity: Validity,
) -> io::Result<BTreeMap<EntryId, Row>> {
    let mut rows = BTreeMap::new();
    for index in indexes.iter().rev() {
        rows.extend(index.range(ledger, first, last)?);
    }
    rows.retain(|_, row| validity.admits(row));
    Ok(rows)
}

/// Reads one entry and checks that it is the one the row promises.
pub(crate) fn read_entry(shared: &Shared, ledger: LedgerId, id: EntryId, row: Row) -> Got {
    match read_bytes(shared, row).map(Entry::decode) {
        Ok(Ok(entry)) if (entry.ledger, entry.id, entry.digest) == (ledger, id, row.digest) => {
            Got::Held(entry)
        }
        Ok(result) => {
            shared.metrics.damage_found.inc();
            let reason = result
                .err()
                .map_or_else(|| "bytes of another entry".to_owned(), |damage| damage.to_string());
            tracing::error!(
                bookie_id = shared.config.id,
                ledger_id = ledger.0,
                entry_id = id.0,
                file = row.file,
                position = row.position,
                reason,
                "stored entry is damaged"
            );
            shared.core().ledgers.note_damaged(ledger, id, row);
            Got::Unknown(Unknown::Damaged)
        }
        // Its file may have been released since the row was looked up.
        Err(_) if shared.core().ledgers.is_dropped(ledger) => Got::Unknown(Unknown::Dropped),
        Err(error) => {
            shared.metrics.damage_found.inc();
            let file = row.file;
            tracing::error!(bookie_id = shared.config.id, ledger_id = ledger.0, entry_id = id.0, file, %error, "stored entry cannot be read");
            Got::Unknown(Unknown::Io(error.to_string()))
        }
    }
}

fn read_bytes(shared: &Shared, row: Row) -> io::Result<Bytes> {
    let file =
        shared.files.get(row.file).ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    let mut bytes = vec![0u8; row.length as usize];
    let got = file.read_at(&mut bytes, row.position)?;
    bytes.truncate(got);
    Ok(Bytes::from(bytes))
}

/// Counts and logs a look-up in the index files that failed; what was asked for is unknown (D9).
pub(crate) fn index_error(shared: &Shared, ledger: LedgerId, error: &io::Error) -> Unknown {
    shared.metrics.damage_found.inc();
    tracing::error!(bookie_id = shared.config.id, ledger_id = ledger.0, %error, "index look-up failed");
    match error.kind() {
        io::ErrorKind::InvalidData => Unknown::Damaged,
        _ => Unknown::Io(error.to_string()),
    }
}

/// LIST: the rows of held and synced entries of a range. Blocking.
pub(crate) fn list(
    shared: &Shared,
    indexes: &Indexes,
    ledger: LedgerId,
    range: EntryRange,
    in_memory: BTreeMap<EntryId, Row>,
    validity: Validity,
) -> Result<BTreeMap<EntryId, Row>, Unknown> {
    let mut rows = look_up(indexes, ledger, range.first, range.last, validity)
        .map_err(|e| index_error(shared, ledger, &e))?;
    rows.extend(in_memory);
    Ok(rows)
}

/// Turns what is missing into the verdict that the caller got for this ledger.
pub(crate) fn answers(got: Vec<Got>, missing: &EntryAnswer) -> Vec<EntryAnswer> {
    got.into_iter()
        .map(|got| match got {
            Got::Held(entry) => EntryAnswer::Held(entry),
            Got::Missing => missing.clone(),
            Got::Unknown(why) => EntryAnswer::Unknown(why),
        })
        .collect()
}

/// A snapshot of the index files that fits the memory tables at this moment.
pub(crate) fn indexes(core: &Core) -> Indexes {
    Arc::clone(&core.indexes)
}
