//! From a directory to a bookie that may serve: lock, cookie, replay, copy forward, first group (D3-D8). In that order.
//!
//! ```text
//! lock -> cookie (format if empty) -> newest readable checkpoint -> scan -> verdict -> limbo bound if damage
//!      -> copy forward + first group, synced -> checkpoint if damage -> serve -> register
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::Arc,
};

use geminga_metadata::{Cluster, ClusterError, StoreError, ensure_cluster, keys};
use geminga_runtime::{
    disk::{OpenMode, SharedDisk},
    tasks::Tasks,
};
use tokio::time::Instant;

use crate::{
    bookie::BookieParts,
    config::BookieConfig,
    cookie::{self, CookieError, Identity, Local, Replace},
    crash_points::{CrashPoint, CrashPoints},
    fencing::{Ledgers, Room, Row},
    journal::{
        files::{Files, Purpose},
        format::{self, Bound, GroupBuilder, Nonce, Record},
        queue::Queue,
        replay::{self, Plan},
        scan::{self, Scanned},
        writer::Current,
    },
    ledger_storage::{
        checkpoint::{self, Checkpoint, FileInfo, Mark},
        index::{self, IndexFile},
        write_cache::WriteCache,
    },
    state::{Core, Kept, LockGuard, Parts, Shared},
};

/// Why a bookie did not start. Nothing was served.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another process, or another bookie of this one, holds the directory: stop it first.
    #[error("the bookie's directory is in use by another process")]
    Locked,
    /// Directory and store do not fit together: an operator decides (D7).
    #[error(transparent)]
    Cookie(#[from] CookieError),
    /// Both checkpoints are unreadable: flags and sets are lost, and with them the incarnation (D5(c)). Start with
    /// `take_new_incarnation` to go on as a new one.
    #[error("no readable checkpoint is left: the incarnation is lost")]
    IncarnationLost,
    /// The metadata store did not answer in time: try again.
    #[error("the metadata store is needed to start: {0}")]
    Store(String),
    /// No room for the first group of this start: free some space, and start again.
    #[error("no space for the first journal group")]
    NoSpace,
    /// The disk failed; see D3.
    #[error("disk: {0}")]
    Io(#[from] io::Error),
}

impl From<StoreError> for StartError {
    fn from(error: StoreError) -> Self {
        Self::Store(error.to_string())
    }
}

/// A bookie that has not served yet.
pub(crate) struct Started {
    pub(crate) shared: Arc<Shared>,
    pub(crate) current: Current,
    pub(crate) next: u64,
    /// A checkpoint must stand before anything is served, so that the next start does not judge the same damage again.
    pub(crate) checkpoint_first: bool,
    pub(crate) cluster: Cluster,
}

/// Carries out a start up to the point of serving.
pub(crate) async fn start(parts: BookieParts) -> Result<Started, StartError> {
    let deadline = Instant::now() + parts.config.start_timeout;
    let lock = lock(&parts, deadline).await?;
    let cluster = cluster(&parts, deadline).await?;
    let identity = identify(&parts, &cluster, deadline).await?;
    let (disk, crash, config) =
        (parts.disk.clone(), parts.crash_points.clone(), parts.config.clone());
    let nonce = identity.nonce;
    let loaded = parts.read_io.run(move || load(&disk, &crash, &config, &nonce)).await?;
    let mut loaded = loaded;
    let judged = judge(&parts, &mut loaded, &cluster, deadline).await?;
    let nonce = identity.nonce;
    let crash = parts.crash_points.clone();
    let (loaded, core_parts) = parts
        .journal_io
        .run(move || take_over(&mut loaded, &crash, &nonce).map(|taken| (loaded, taken)))
        .await
        .map_err(|error: io::Error| match error.kind() {
            io::ErrorKind::StorageFull => StartError::NoSpace,
            _ => StartError::Io(error),
        })?;
    Ok(assemble(parts, cluster, identity, lock, loaded, core_parts, judged))
}

async fn lock(parts: &BookieParts, deadline: Instant) -> Result<Arc<LockGuard>, StartError> {
    // A killed predecessor in this process lets go when its last disk call ends.
    const PATIENCE: std::time::Duration = std::time::Duration::from_millis(500);
    let deadline = deadline.min(Instant::now() + PATIENCE);
    loop {
        let disk = parts.disk.clone();
        match parts.read_io.run(move || disk.lock(cookie::LOCK)).await {
            Ok(lock) => return Ok(Arc::new(LockGuard(lock))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if Instant::now() >= deadline {
                    return Err(StartError::Locked);
                }
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

async fn cluster(parts: &BookieParts, deadline: Instant) -> Result<Cluster, StartError> {
    loop {
        match ensure_cluster(&parts.store, &parts.random, parts.clock.now(), parts.config.bundles)
            .await
        {
            Ok(cluster) => return Ok(cluster),
            Err(ClusterError::Store(StoreError::Unavailable(_) | StoreError::Unknown(_))) => {
                pause(deadline, "the cluster record").await?;
            }
            Err(error) => return Err(StartError::Store(error.to_string())),
        }
    }
}

/// Waits before another try at the store, until the deadline.
async fn pause(deadline: Instant, what: &str) -> Result<(), StartError> {
    if Instant::now() >= deadline {
        return Err(StartError::Store(format!("{what} could not be read in time")));
    }
    tracing::info!(what, "waiting for the metadata store");
    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    Ok(())
}

/// Repeats a store call while the store does not answer.
async fn patiently<T, F: Future<Output = Result<T, StoreError>>>(
    deadline: Instant,
    what: &str,
    mut call: impl FnMut() -> F,
) -> Result<T, StartError> {
    loop {
        match call().await {
            Ok(value) => return Ok(value),
            Err(StoreError::Unavailable(_) | StoreError::Unknown(_)) => {
                pause(deadline, what).await?
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Who this directory is (D7); formats it if it is new.
async fn identify(
    parts: &BookieParts,
    cluster: &Cluster,
    deadline: Instant,
) -> Result<Identity, StartError> {
    let id = parts.config.id.clone();
    let (disk, wanted, name) = (parts.disk.clone(), cluster.clone(), id.clone());
    let mut local = parts.read_io.run(move || cookie::read_local(&*disk, &wanted, &name)).await?;
    let in_store =
        patiently(deadline, "the cookie", || cookie::read_store(&parts.store, &id)).await?;
    let repair = parts.config.take_new_incarnation;
    if let Ok(Local::Known(identity)) = &local {
        let fits = match &in_store {
            None => {
                let absent = patiently(deadline, "the drain", || cookie::absent(&parts.store, &id));
                Err(absent.await?)
            }
            Some(found) => found.check(identity),
        };
        let disk = parts.disk.clone();
        let lost = repair
            && parts
                .read_io
                .run(move || checkpoint::read_all(&disk))
                .await?
                .iter()
                .all(|c| c.1.is_none());
        match fits {
            Ok(()) if !lost => return Ok(identity.clone()),
            Ok(()) => {}
            Err(error) => local = Err(error),
        }
    }
    let (identity, replace) = match (local, repair) {
        (Ok(Local::Empty), _) => {
            if let (Some(found), false) = (&in_store, repair) {
                let incarnation = geminga_proto::ids::Incarnation(found.cookie.incarnation);
                return Err(CookieError::EmptyVolume { bookie: id, incarnation }.into());
            }
            let replace = if repair { Replace::Revoke } else { Replace::Nobody };
            (cookie::mint(&parts.random), replace)
        }
        (Ok(Local::Unfinished(identity)), _) => {
            // Whether to revoke was decided before the provisional cookie was written; only the operator can renew it.
            (identity, if repair { Replace::Revoke } else { Replace::Nobody })
        }
        (Ok(Local::Known(_)) | Err(_), true) => (cookie::mint(&parts.random), Replace::Revoke),
        (Err(error), false) => return Err(error.into()),
        (Ok(Local::Known(identity)), false) => return Ok(identity),
    };
    let stored = in_store.is_some_and(|found| *found.cookie.incarnation_uuid == identity.uuid);
    if !stored {
        let (disk, crash, config) =
            (parts.disk.clone(), parts.crash_points.clone(), parts.config.clone());
        let (cluster, identity) = (cluster.clone(), identity.clone());
        let formatted = parts
            .read_io
            .run(move || format_directory(&disk, &crash, &config, &cluster, &identity));
        formatted.await?;
    }
    let identity = patiently(deadline, "the cookie", || {
        cookie::intern(
            &parts.store,
            &parts.clock,
            cluster,
            &id,
            &identity,
            replace,
            parts.config.start_timeout,
        )
    })
    .await??;
    let (disk, crash) = (parts.disk.clone(), parts.crash_points.clone());
    let (cluster, named) = (cluster.clone(), identity.clone());
    let work = move || {
        crash.pass(CrashPoint::CookieStored)?;
        cookie::write_final(&*disk, &crash, &cluster, &id, &named)
    };
    parts.read_io.run(work).await?;
    tracing::info!(
        bookie_id = parts.config.id,
        incarnation = identity.incarnation.0,
        "directory formatted"
    );
    Ok(identity)
}

/// Writes what a directory needs before its cookie counts: provisional cookie, first journal file, checkpoint, reserve.
fn format_directory(
    disk: &SharedDisk,
    crash: &CrashPoints,
    config: &BookieConfig,
    cluster: &Cluster,
    identity: &Identity,
) -> io::Result<()> {
    cookie::write_provisional(&**disk, crash, cluster, &config.id, identity)?;
    let files =
        Files::open(disk.clone(), crash.clone(), config.journal_file_bytes, config.free_files_max)?;
    let (number, file) = files.take(Purpose::Normal)?;
    let group = GroupBuilder::new(Vec::new()).finish(&identity.nonce, number, 1, 1);
    file.write_all_at(&group, 0)?;
    file.sync()?;
    crash.pass(CrashPoint::FormatJournalSynced)?;
    let info = FileInfo { first: 1, last: 1, ..FileInfo::default() };
    let first = Checkpoint {
        sequence: 1,
        mark: Mark { number: 1, file: number, position: 0 },
        files: vec![(number, info)],
        ..Checkpoint::default()
    };
    checkpoint::write(disk, crash, &first)?;
    crash.pass(CrashPoint::FormatCheckpointDone)?;
    files.fill_reserve()
}

/// What the directory says.
struct Loaded {
    files: Files,
    checkpoint: Checkpoint,
    /// Kept beside it; the older one, unless it was the newest that could not be read.
    older: Option<Kept>,
    sequence_max: u64,
    indexes: Vec<Arc<IndexFile>>,
    /// Rows rebuilt from journal files, since an index file was damaged.
    rebuilt: Option<Vec<(Record, Mark)>>,
    scanned: BTreeMap<u64, Vec<Scanned>>,
    plan: Plan,
    /// Reasons for limbo beyond the plan's.
    lost: Vec<String>,
    /// Journal files that rows name and the directory does not have. The rows stand: reads of them are unknown, never
    /// absent (D9).
    missing: Vec<u64>,
    bound: Option<Bound>,
}

/// Reads checkpoint, index files and journal tail. Blocking.
fn load(
    disk: &SharedDisk,
    crash: &CrashPoints,
    config: &BookieConfig,
    nonce: &Nonce,
) -> Result<Loaded, StartError> {
    let mut checkpoints = checkpoint::read_all(disk)?;
    let sequence_max = checkpoints.iter().map(|(sequence, _)| *sequence).max().unwrap_or(0);
    checkpoints.retain(|(_, content)| content.is_some());
    let mut readable = checkpoints.into_iter().filter_map(|(_, content)| content);
    let mut checkpoint = readable.next().ok_or(StartError::IncarnationLost)?;
    let older = readable.next().map(|older| kept(&older));
    let files =
        Files::open(disk.clone(), crash.clone(), config.journal_file_bytes, config.free_files_max)?;
    let mut scanned = BTreeMap::new();
    let mut unreadable = Vec::new();
    for (number, file) in files.all() {
        let mark = checkpoint.mark;
        if number < mark.file {
            continue;
        }
        let from = if number == mark.file { mark.position } else { 0 };
        let found = scan::scan(&*file, number, from, nonce)?;
        if found.unreadable {
            unreadable.push(number);
        }
        scanned.insert(number, found.groups);
    }
    let found: Vec<_> = scanned.values().flatten().map(|group| group.found).collect();
    let plan = replay::plan(checkpoint.mark.number, &found, &unreadable);
    let mut lost = Vec::new();
    let indexes = match open_indexes(disk, &checkpoint.indexes) {
        Ok(indexes) => Some(indexes),
        Err(error) => {
            tracing::error!(bookie_id = config.id, %error, "index file is damaged: rows are rebuilt from journal files");
            None
        }
    };
    let rebuilt = match &indexes {
        Some(_) => None,
        None => {
            for ledger in &mut checkpoint.ledgers {
                (ledger.indexed_max, ledger.bytes) = (None, 0);
            }
            Some(rebuild(&files, &checkpoint, nonce, &mut lost)?)
        }
    };
    let needed = checkpoint.files.iter().filter(|(number, info)| {
        files.get(*number).is_none() && info.dead_at.is_none() && !info.ledgers.runs().is_empty()
    });
    let missing = needed.map(|(number, _)| *number).collect();
    let indexes = indexes.unwrap_or_default();
    Ok(Loaded {
        files,
        checkpoint,
        older,
        sequence_max,
        indexes,
        rebuilt,
        scanned,
        plan,
        lost,
        missing,
        bound: None,
    })
}

fn kept(checkpoint: &Checkpoint) -> Kept {
    Kept {
        sequence: checkpoint.sequence,
        mark: checkpoint.mark.number,
        indexes: checkpoint.indexes.clone(),
    }
}

fn open_indexes(disk: &SharedDisk, sequences: &[u64]) -> io::Result<Vec<Arc<IndexFile>>> {
    let open = |sequence: &u64| {
        let file = disk.open(&index::index_name(*sequence), OpenMode::Read)?;
        let index = IndexFile::open(*sequence, file)?;
        index.verify()?;
        Ok(Arc::new(index))
    };
    sequences.iter().map(open).collect()
}

/// Reads every row up to the mark out of the journal files again (D5(c)). What cannot be read is a reason for limbo.
fn rebuild(
    files: &Files,
    checkpoint: &Checkpoint,
    nonce: &Nonce,
    lost: &mut Vec<String>,
) -> io::Result<Vec<(Record, Mark)>> {
    let mut rows: BTreeMap<(u64, u64), Vec<(Record, Mark)>> = BTreeMap::new();
    for (number, info) in &checkpoint.files {
        if info.dead_at.is_some() || info.ledgers.runs().is_empty() {
            continue;
        }
        let Some(file) = files.get(*number) else {
            lost.push(format!("journal file {number} is missing and its index damaged"));
            continue;
        };
        let found = scan::scan(&*file, *number, 0, nonce)?;
        let mut present = BTreeSet::new();
        for group in found.groups {
            let header = group.found.header;
            if header.number > checkpoint.mark.number {
                continue;
            }
            present.insert(header.number);
            let place =
                Mark { number: header.number, file: *number, position: group.found.position };
            let adds =
                group.records.into_iter().filter(|record| matches!(record, Record::Add { .. }));
            rows.insert((header.number, *number), adds.map(|record| (record, place)).collect());
        }
        let last = info.last.min(checkpoint.mark.number);
        if found.unreadable || (info.first..=last).any(|number| !present.contains(&number)) {
            lost.push(format!("journal file {number} is damaged, and so is the index of its rows"));
        }
    }
    Ok(rows.into_values().flatten().collect())
}

/// Takes a limbo bound if anything may have been lost in silence (D8). True if so, or if rows had to be rebuilt.
async fn judge(
    parts: &BookieParts,
    loaded: &mut Loaded,
    cluster: &Cluster,
    deadline: Instant,
) -> Result<bool, StartError> {
    for file in &loaded.missing {
        parts.metrics.damage_found.inc();
        tracing::error!(bookie_id = parts.config.id, file, "journal file is missing");
    }
    for damage in &loaded.plan.damage {
        parts.metrics.damage_found.inc();
        tracing::error!(
            bookie_id = parts.config.id,
            ?damage,
            "journal is damaged: everything here goes to limbo"
        );
    }
    for reason in &loaded.lost {
        parts.metrics.damage_found.inc();
        tracing::error!(
            bookie_id = parts.config.id,
            reason,
            "rows are lost: everything here goes to limbo"
        );
    }
    if loaded.plan.damage.is_empty() && loaded.lost.is_empty() {
        return Ok(loaded.rebuilt.is_some());
    }
    let key = keys::cluster();
    let (revision, _) =
        patiently(deadline, "the store's revision", || parts.store.get(&key)).await?;
    loaded.bound = Some(Bound { generation: cluster.generation, revision: revision.0 });
    Ok(true)
}

/// What taking over the journal came to.
struct Taken {
    current: Current,
    ledgers: Ledgers,
    files: BTreeMap<u64, FileInfo>,
    last: Mark,
}

/// Copies the tail forward, writes the first group, and applies what the journal says (D3, D4). Blocking.
fn take_over(loaded: &mut Loaded, crash: &CrashPoints, nonce: &Nonce) -> io::Result<Taken> {
    if !loaded.files.has_spare() {
        for number in &loaded.plan.superseded {
            loaded.files.release(*number)?; // all of it was copied forward: D10's overwriting of such a file
        }
    }
    let first_try = write_tail(loaded, crash, nonce, Purpose::Normal);
    let (current, places) = match first_try {
        Err((error, taken)) if error.kind() == io::ErrorKind::StorageFull => {
            if let Some(number) = taken {
                loaded.files.discard(number)?;
            }
            match write_tail(loaded, crash, nonce, Purpose::Reserve) {
                Err((error, Some(number))) if error.kind() == io::ErrorKind::StorageFull => {
                    loaded.files.release(number)?; // nothing in it counts; a reserve again for the next start
                    return Err(error);
                }
                written => written.map_err(|(error, _)| error)?,
            }
        }
        written => written.map_err(|(error, _)| error)?,
    };
    Ok(apply(loaded, current, &places))
}

/// Where the groups of the plan lie now.
type Places = Vec<Mark>;

fn write_tail(
    loaded: &Loaded,
    crash: &CrashPoints,
    nonce: &Nonce,
    purpose: Purpose,
) -> Result<(Current, Places), (io::Error, Option<u64>)> {
    let (number, file) = loaded.files.take(purpose).map_err(|error| (error, None))?;
    let plan = &loaded.plan;
    let write = || {
        let mut places = Vec::with_capacity(plan.take.len());
        let mut position = 0;
        for (at, group) in plan.take.iter().enumerate() {
            let header = group.header;
            if at < plan.copy_from {
                places.push(Mark {
                    number: header.number,
                    file: header.file,
                    position: group.position,
                });
                continue;
            }
            let source = loaded
                .files
                .get(header.file)
                .ok_or_else(|| io::Error::other("journal file vanished"))?;
            let mut bytes = vec![0u8; header.disk_bytes() as usize];
            let content = format::GROUP_HEADER_BYTES + header.length as usize;
            let got = source.read_at(&mut bytes, group.position)?;
            if got < content || !format::crc_fits(&bytes, &header) {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "a journal group changed between two reads",
                ));
            }
            bytes[content..].fill(0);
            format::rehome(&mut bytes, nonce, &header, number, plan.next);
            file.write_all_at(&bytes, position)?;
            places.push(Mark { number: header.number, file: number, position });
            position += bytes.len() as u64;
        }
        if position > 0 {
            crash.pass(CrashPoint::CopyWritten)?;
            file.sync()?;
            crash.pass(CrashPoint::CopySynced)?;
        }
        let mut first = GroupBuilder::new(Vec::new());
        if let Some(bound) = loaded.bound {
            first.limbo(bound);
        }
        let bytes = first.finish(nonce, number, plan.next, plan.next);
        file.write_all_at(&bytes, position)?;
        crash.pass(CrashPoint::StartGroupWritten)?;
        file.sync()?;
        crash.pass(CrashPoint::StartGroupSynced)?;
        places.push(Mark { number: plan.next, file: number, position });
        Ok((position + bytes.len() as u64, places))
    };
    let (position, places) = write().map_err(|error| (error, Some(number)))?;
    let reserve = purpose == Purpose::Reserve;
    let file = Arc::clone(&file);
    Ok((Current { number, file, position, first_live: plan.next, reserve }, places))
}

/// The state after replay: checkpoint, then every group after its mark, in order (D5(a)).
fn apply(loaded: &mut Loaded, current: Current, places: &[Mark]) -> Taken {
    let checkpoint = &loaded.checkpoint;
    let mut ledgers = Ledgers::restore(
        &checkpoint.ledgers,
        checkpoint.tombstones.clone(),
        checkpoint.moved_away.clone(),
        checkpoint.limbo,
    );
    let mut files: BTreeMap<u64, FileInfo> = checkpoint.files.iter().cloned().collect();
    for (record, place) in loaded.rebuilt.take().unwrap_or_default() {
        if counts(&ledgers, &record, place) {
            replay_record(&mut ledgers, &mut files, &record, place);
        }
    }
    for (number, groups) in &loaded.scanned {
        let info = files.entry(*number).or_default();
        for group in groups {
            let number = group.found.header.number;
            info.first = if info.first == 0 { number } else { info.first.min(number) };
            info.last = info.last.max(number);
        }
    }
    let mut records: BTreeMap<(u64, u64), &Vec<Record>> = BTreeMap::new();
    for group in loaded.scanned.values().flatten() {
        records.insert((group.found.header.file, group.found.header.number), &group.records);
    }
    for (group, place) in loaded.plan.take.iter().zip(places) {
        let info = files.entry(place.file).or_default();
        info.first = if info.first == 0 { place.number } else { info.first.min(place.number) };
        info.last = info.last.max(place.number);
        for record in
            records.get(&(group.header.file, group.header.number)).into_iter().copied().flatten()
        {
            replay_record(&mut ledgers, &mut files, record, *place);
        }
    }
    if let Some(bound) = loaded.bound {
        ledgers.set_limbo(bound);
    }
    let last = places.last().copied().unwrap_or(checkpoint.mark);
    let info = files.entry(current.number).or_default();
    info.first = if info.first == 0 { last.number } else { info.first };
    info.last = last.number;
    Taken { current, ledgers, files, last }
}

/// Whether a row in front of the mark counts: the copy it was of may have moved away since (D13).
fn counts(ledgers: &Ledgers, record: &Record, place: Mark) -> bool {
    match *record {
        Record::Add { ledger, position, length, digest, .. } => {
            let position = place.position + u64::from(position);
            ledgers.validity(ledger).admits(&Row { file: place.file, position, length, digest })
        }
        _ => true,
    }
}

fn replay_record(
    ledgers: &mut Ledgers,
    files: &mut BTreeMap<u64, FileInfo>,
    record: &Record,
    place: Mark,
) {
    match *record {
        Record::Add { ledger, entry, lac, position, length, digest } => {
            let position = place.position + u64::from(position);
            ledgers.on_synced(
                ledger,
                entry,
                lac,
                Row { file: place.file, position, length, digest },
            );
            files.entry(place.file).or_default().ledgers.insert(ledger);
        }
        Record::Fence(ledger) => ledgers.on_fence_synced(ledger),
        Record::Tombstone(ledger) => ledgers.drop_deleted(ledger),
        Record::MovedAway(ledger) => ledgers.drop_moved_away(ledger),
        Record::Limbo(bound) => ledgers.set_limbo(bound),
    }
}

fn assemble(
    parts: BookieParts,
    cluster: Cluster,
    identity: Identity,
    lock: Arc<LockGuard>,
    loaded: Loaded,
    taken: Taken,
    checkpoint_first: bool,
) -> Started {
    let config = parts.config;
    let core = Core {
        ledgers: taken.ledgers,
        cache: WriteCache::new(config.write_cache_bytes),
        queue: Queue::new(config.queue_bytes_max, config.queue_requests_max),
        next_ticket: 0,
        room: Room::Writable,
        ran_full: false,
        files: taken.files,
        indexes: Arc::new(loaded.indexes),
        last: taken.last,
        kept: (kept(&loaded.checkpoint), loaded.older),
        sequence_max: loaded.sequence_max,
        closed: false,
        ended: false,
        space: (0, 0),
    };
    let tasks: Tasks = Tasks::new(format!("bookie {}", config.id));
    let parts = Parts {
        config,
        disk: parts.disk,
        files: loaded.files,
        crash: parts.crash_points,
        journal_io: parts.journal_io,
        read_io: parts.read_io,
        store: parts.store,
        metrics: parts.metrics,
        tasks,
        identity,
    };
    let shared = Shared::new(parts, lock, core);
    Started {
        shared,
        current: taken.current,
        next: loaded.plan.next + 1,
        checkpoint_first,
        cluster,
    }
}
