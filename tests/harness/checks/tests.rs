//! Each checker fed with a history that breaks its invariant, so that a green simulation means something.

use super::{Checks, Violation};
use crate::harness::history::{
    AddVerdict, Bytes, CursorShown, Event, LedgerState, LedgerValue, Listed, LogBatch, ReadVerdict,
};

const LEDGER: u64 = 7;
const SEGMENT: (u64, u32) = (1, 0);

/// Feeds events, one microsecond apart; the first violation's invariant. The ledger is listed for repair from the beginning.
fn judge(events: Vec<Event>) -> Option<&'static str> {
    let mut checks = Checks::default();
    checks.observe(0, 0, &listing(true)).expect("nothing is known yet");
    events.iter().enumerate().find_map(|(i, event)| {
        checks
            .observe(i as u64, i as u64, event)
            .err()
            .map(|violation: Violation| violation.invariant)
    })
}

fn listing(listed: bool) -> Event {
    Event::Listing { ledger: LEDGER, listed }
}

fn bytes(entry: u64) -> Bytes {
    Bytes { whole: entry + 1_000, payload: entry + 2_000 }
}

fn put(state: LedgerState, fragments: Vec<(u64, Vec<u32>)>) -> Event {
    let value = LedgerValue { state, ensemble: 3, write: 3, ack: 2, fragments };
    Event::LedgerPut { ledger: LEDGER, revision: 1, value }
}

fn open(slots: [u32; 3]) -> Event {
    put(LedgerState::Open, vec![(0, slots.to_vec())])
}

fn closed(last: i64) -> Event {
    put(LedgerState::Closed { last, length: 0 }, vec![(0, vec![1, 2, 3])])
}

/// One plain add, confirmed; two events.
fn added(at: u32, entry: u64, asked: u64) -> [Event; 2] {
    [ask(at, entry, -1), confirm(at, entry, asked)]
}

fn ask(at: u32, entry: u64, lac: i64) -> Event {
    Event::AddAsked { at, ledger: LEDGER, entry, bytes: bytes(entry), lac, recovery: false }
}

fn confirm(at: u32, entry: u64, asked: u64) -> Event {
    let verdict = AddVerdict::Ok;
    Event::AddAnswered { at, ledger: LEDGER, entry, asked, recovery: false, verdict }
}

fn acknowledged(entry: u64) -> Event {
    Event::Acknowledged { ledger: LEDGER, entry, payload: bytes(entry).payload }
}

fn fenced(at: u32, missing: Vec<u64>) -> Event {
    Event::FenceAnswered { at, ledger: LEDGER, lac: -1, missing }
}

fn read(at: u32, entry: u64, asked: u64, verdict: ReadVerdict) -> Event {
    Event::EntryAnswered { at, ledger: LEDGER, entry, asked, fence: false, verdict }
}

/// Open on 1, 2, 3, entry 0 confirmed by 1 and 2 and acknowledged.
fn one_entry() -> Vec<Event> {
    let mut events = vec![open([1, 2, 3])];
    events.extend(added(1, 0, 1));
    events.extend(added(2, 0, 3));
    events.push(acknowledged(0));
    events
}

fn with(mut events: Vec<Event>, more: impl IntoIterator<Item = Event>) -> Vec<Event> {
    events.extend(more);
    events
}

#[test]
fn a_sound_history_passes() {
    assert_eq!(judge(with(one_entry(), [fenced(1, vec![]), closed(0)])), None);
}

#[test]
fn i1_an_end_below_an_acknowledged_entry_is_found() {
    assert_eq!(judge(with(one_entry(), [closed(-1)])), Some("I1"));
}

#[test]
fn i1_an_acknowledgement_beyond_the_end_is_found() {
    let mut events = vec![open([1, 2, 3])];
    events.extend(added(1, 0, 1));
    events.extend(added(2, 0, 3));
    events.push(closed(-1));
    events.push(acknowledged(0));
    assert_eq!(judge(events), Some("I1"));
}

#[test]
fn i2_an_end_that_moves_is_found() {
    let both = [added(1, 1, 6), added(2, 1, 8)].concat();
    assert_eq!(judge(with(with(one_entry(), both), [closed(0), closed(1)])), Some("I2"));
}

#[test]
fn i2_another_end_told_to_a_caller_is_found() {
    let told = |last| Event::EndTold { ledger: LEDGER, last, length: 0 };
    assert_eq!(judge(with(one_entry(), [closed(0), told(0)])), None);
    assert_eq!(judge(with(one_entry(), [closed(0), told(1)])), Some("I2"));
    assert_eq!(judge(with(one_entry(), [told(0)])), Some("I2"));
}

#[test]
fn i3_an_end_below_a_told_lac_is_found() {
    let events = vec![open([1, 2, 3]), ask(1, 5, 4), closed(-1)];
    assert_eq!(judge(events), Some("I3"));
}

#[test]
fn i3_an_entry_given_to_a_reader_beyond_the_lac_is_found() {
    let early = Event::ReadByCaller { ledger: LEDGER, entry: 0, payload: bytes(0).payload };
    let mut events = vec![open([1, 2, 3])];
    events.extend(added(1, 0, 1));
    events.push(early);
    assert_eq!(judge(events), Some("I3"));
}

#[test]
fn i4_an_acknowledgement_on_too_few_copies_is_found() {
    let mut events = vec![open([1, 2, 3])];
    events.extend(added(1, 0, 1));
    events.push(acknowledged(0));
    assert_eq!(judge(events), Some("I4"));
}

#[test]
fn i4_a_confirmation_of_a_replaced_incarnation_does_not_count() {
    let mut events = vec![open([1, 2, 3])];
    events.extend(added(1, 0, 1));
    events.extend(added(2, 0, 3));
    events.push(open([4, 2, 3]));
    events.push(acknowledged(0));
    assert_eq!(judge(events), Some("I4"));
}

#[test]
fn i4_an_ensemble_that_never_got_an_acknowledged_entry_is_found() {
    assert_eq!(judge(with(one_entry(), [open([1, 4, 5])])), Some("I4"));
}

#[test]
fn i4_copies_missing_on_the_disks_are_found_at_the_end() {
    let mut checks = Checks::default();
    checks.observe(0, 0, &listing(true)).expect("nothing is known yet");
    for (i, event) in with(one_entry(), [closed(0)]).iter().enumerate() {
        checks.observe(i as u64, i as u64, event).expect("a sound history");
    }
    let found = |holders: &[u32], lost: &[u32]| {
        let held = [((LEDGER, 0), holders.iter().copied().collect())].into();
        let lost = lost.iter().copied().collect();
        checks.ledgers.check_copies(&held, &lost).err().map(|violation| violation.invariant)
    };
    assert_eq!(found(&[1, 2], &[]), None);
    assert_eq!(found(&[1], &[2]), None);
    assert_eq!(found(&[1], &[]), Some("I4"));
    assert_eq!(found(&[1, 9], &[]), Some("I4"));
}

#[test]
fn i5_a_short_ledger_that_is_not_listed_is_found() {
    let shown = |at| Event::Shown { at, ledger: LEDGER, runs: vec![(0, 0)] };
    assert_eq!(judge(with(one_entry(), [closed(0)])), None, "it is listed");
    assert_eq!(judge(with(one_entry(), [closed(0), listing(false)])), Some("I5"));
    assert_eq!(judge(with(one_entry(), [listing(false), closed(0)])), Some("I5"));
    assert_eq!(judge(with(one_entry(), [closed(0), shown(3), listing(false)])), None);
    let vacant = put(LedgerState::Closed { last: 0, length: 0 }, vec![(0, vec![1, 2, 0])]);
    assert_eq!(judge(with(one_entry(), [vacant, listing(false)])), Some("I5"));
}

#[test]
fn i5_a_final_fragment_of_an_open_ledger_counts_and_a_lost_incarnation_stands_for_a_listing() {
    let changed = || put(LedgerState::Open, vec![(0, vec![1, 2, 3]), (1, vec![1, 2, 4])]);
    assert_eq!(judge(with(one_entry(), [listing(false), changed()])), Some("I5"));
    let lost = Event::LostKey { at: 3, there: true };
    assert_eq!(judge(with(one_entry(), [lost, listing(false), changed()])), None);
}

#[test]
fn a3_a_ledger_with_an_owner_that_is_fenced_for_repair_is_found() {
    let begun = |epoch| Event::RecoveryBegun { ledger: LEDGER, epoch };
    let claim = |there| Event::Claim { there };
    assert_eq!(judge(vec![claim(true), open([1, 2, 3]), begun(0)]), Some("A3"));
    assert_eq!(judge(vec![claim(true), open([1, 2, 3]), begun(1)]), None, "its owner");
    assert_eq!(judge(vec![claim(true), open([1, 2, 3]), claim(false), begun(0)]), None);
}

#[test]
fn dc1_a_cookie_that_goes_too_early_and_a_ledger_that_comes_too_late_are_found() {
    let cookie = || Event::CookiePut { bookie: "b".to_owned(), at: 3 };
    let gone = || Event::CookieGone { bookie: "b".to_owned() };
    assert_eq!(judge(vec![cookie(), open([1, 2, 3]), gone()]), Some("DC1"));
    assert_eq!(judge(vec![cookie(), open([1, 2, 4]), gone()]), None);
    assert_eq!(judge(vec![cookie(), gone(), open([1, 2, 3])]), Some("DC1"));
}

#[test]
fn i6_other_bytes_under_one_entry_are_found() {
    let other = Bytes { whole: 1, payload: 1 };
    let verdict = ReadVerdict::Held { bytes: other, lac: -1 };
    assert_eq!(judge(with(one_entry(), [read(1, 0, 6, verdict)])), Some("I6"));
}

#[test]
fn i6_other_bytes_to_a_caller_are_found() {
    let wrong = Event::ReadByCaller { ledger: LEDGER, entry: 0, payload: 1 };
    assert_eq!(judge(with(one_entry(), [wrong])), Some("I6"));
}

#[test]
fn i7_a_plain_add_asked_and_confirmed_after_the_fence_is_found() {
    let events = vec![open([1, 2, 3]), fenced(1, vec![]), ask(1, 0, -1), confirm(1, 0, 2)];
    assert_eq!(judge(events), Some("I7"));
}

#[test]
fn i7_a_plain_add_confirmed_later_than_the_fence_is_found() {
    let events = vec![open([1, 2, 3]), ask(1, 0, -1), fenced(1, vec![]), confirm(1, 0, 1)];
    assert_eq!(judge(events), Some("I7"));
}

#[test]
fn i7_a_recovery_add_passes_the_fence() {
    let verdict = AddVerdict::Ok;
    let recovered =
        Event::AddAnswered { at: 1, ledger: LEDGER, entry: 0, asked: 2, recovery: true, verdict };
    assert_eq!(judge(vec![open([1, 2, 3]), fenced(1, vec![]), ask(1, 0, -1), recovered]), None);
}

#[test]
fn i7_a_confirmation_of_what_was_denied_to_a_recoverer_is_found_in_the_same_instant() {
    let mut checks = Checks::default();
    let events = [open([1, 2, 3]), ask(1, 0, -1), fenced(1, vec![0]), confirm(1, 0, 1)];
    let verdicts = events.iter().enumerate().map(|(i, event)| checks.observe(i as u64, 5, event));
    assert_eq!(verdicts.last().and_then(Result::err).map(|v| v.invariant), Some("I7"));
}

#[test]
fn i8_a_denial_of_a_confirmed_entry_is_found() {
    assert_eq!(judge(with(one_entry(), [read(1, 0, 6, ReadVerdict::Absent)])), Some("I8"));
    assert_eq!(judge(with(one_entry(), [read(3, 0, 6, ReadVerdict::Absent)])), None);
    assert_eq!(judge(with(one_entry(), [read(1, 0, 1, ReadVerdict::Absent)])), None);
}

#[test]
fn i9_fragments_that_do_not_rise_are_found() {
    let fragments = vec![(0, vec![1, 2, 3]), (0, vec![1, 2, 4])];
    assert_eq!(judge(vec![put(LedgerState::Open, fragments)]), Some("I9"));
}

#[test]
fn i9_an_incarnation_named_twice_is_found() {
    assert_eq!(judge(vec![open([1, 1, 2])]), Some("I9"));
}

#[test]
fn i9_too_many_vacant_slots_are_found() {
    assert_eq!(judge(vec![open([1, 2, 0])]), None);
    assert_eq!(judge(vec![open([1, 0, 0])]), Some("I9"));
}

#[test]
fn md4_a_repair_that_touches_more_than_one_slot_of_what_is_final_is_found() {
    let to =
        |slots: [u32; 3]| put(LedgerState::Closed { last: -1, length: 0 }, vec![(0, slots.into())]);
    assert_eq!(judge(vec![open([1, 2, 3]), closed(-1), to([1, 2, 4])]), None);
    assert_eq!(judge(vec![open([1, 2, 3]), closed(-1), to([1, 5, 4])]), Some("MD4"));
    assert_eq!(judge(vec![open([1, 2, 3]), closed(-1), to([1, 2, 0])]), Some("MD4"));
    let two = |first: [u32; 3], second: [u32; 3]| {
        put(LedgerState::Open, vec![(0, first.into()), (1, second.into())])
    };
    let events = |next| {
        let all = [added(1, 0, 1), added(2, 0, 3), added(4, 0, 5)].concat();
        [vec![open([1, 2, 3])], all, vec![two([1, 2, 3], [1, 2, 5]), next]].concat()
    };
    assert_eq!(judge(events(two([1, 2, 4], [1, 2, 5]))), None);
    assert_eq!(judge(events(two([1, 2, 4], [1, 2, 6]))), Some("MD4"));
}

#[test]
fn md4_illegal_steps_are_found() {
    assert_eq!(judge(vec![closed(-1)]), Some("MD4"));
    assert_eq!(judge(vec![open([1, 2, 3]), closed(-1), open([1, 2, 3])]), Some("MD4"));
    let changed = put(LedgerState::InRecovery, vec![(0, vec![1, 2, 4])]);
    assert_eq!(judge(vec![open([1, 2, 3]), changed]), Some("MD4"));
    let removed = Event::LedgerRemoved { ledger: LEDGER, revision: 2 };
    assert_eq!(judge(vec![open([1, 2, 3]), removed]), Some("MD4"));
}

fn published(epoch: u64, owner: u32, high: u64, offset: u64, duplicate: bool) -> Event {
    Event::Published {
        segment: SEGMENT,
        epoch,
        owner,
        producer: "p".into(),
        high,
        offset: Some(offset),
        duplicate,
        payload: high,
    }
}

fn batch(offset: u64, high: u64) -> LogBatch {
    LogBatch { offset, count: 1, producer: "p".into(), low: high, high, payload: high }
}

fn log(batches: Vec<LogBatch>) -> Event {
    Event::LogRead { segment: SEGMENT, first: 0, end: batches.len() as u64, batches }
}

#[test]
fn i10_two_owners_of_one_epoch_are_found() {
    assert_eq!(
        judge(vec![published(1, 1, 1, 0, false), published(1, 2, 2, 1, false)]),
        Some("I10")
    );
    assert_eq!(judge(vec![published(1, 1, 1, 0, false), published(2, 2, 2, 1, false)]), None);
}

#[test]
fn i10_an_epoch_that_falls_or_is_shared_is_found() {
    let list = |epoch, nonce| Event::ListPut {
        segment: SEGMENT,
        revision: 1,
        epoch,
        nonce,
        data: vec![],
        log: vec![],
    };
    assert_eq!(judge(vec![list(2, 1), list(1, 2)]), Some("I10"));
    assert_eq!(judge(vec![list(2, 1), list(2, 2)]), Some("I10"));
    assert_eq!(judge(vec![list(2, 1), list(2, 1), list(3, 2)]), None);
}

#[test]
fn i11_gaps_and_a_broken_order_are_found() {
    assert_eq!(judge(vec![log(vec![batch(0, 1), batch(1, 2)])]), None);
    assert_eq!(judge(vec![log(vec![batch(0, 1), batch(2, 2)])]), Some("I11"));
    assert_eq!(judge(vec![log(vec![batch(0, 2), batch(1, 1)])]), Some("I11"));
}

#[test]
fn i11_a_receipt_for_another_offset_is_found() {
    assert_eq!(judge(vec![published(1, 1, 1, 4, false), log(vec![batch(0, 1)])]), Some("I11"));
}

#[test]
fn i11_a_batch_that_reads_differently_later_is_found() {
    let seen = Event::BatchRead { segment: SEGMENT, batch: batch(0, 3) };
    assert_eq!(judge(vec![seen, log(vec![batch(0, 1)])]), Some("I11"));
}

#[test]
fn i12_an_acknowledged_batch_that_is_gone_is_found() {
    assert_eq!(judge(vec![published(1, 1, 1, 0, false), log(vec![])]), Some("I12"));
}

#[test]
fn i13_a_batch_stored_twice_is_found() {
    assert_eq!(judge(vec![log(vec![batch(0, 1), batch(1, 1)])]), Some("I13"));
}

#[test]
fn i13_a_duplicate_of_what_is_not_stored_is_found() {
    assert_eq!(judge(vec![published(1, 1, 1, 0, true), log(vec![])]), Some("I13"));
}

const SUBSCRIPTION: u64 = 9;

/// Asked as event `asked`, confirmed at once.
fn settle(asked: u64, first: u64, last: u64, next: u64) -> [Event; 2] {
    let (segment, subscription) = (SEGMENT, SUBSCRIPTION);
    [
        Event::SettleAsked { segment, subscription, first, last },
        Event::Settled { segment, epoch: 1, owner: 1, subscription, asked, first, last, next },
    ]
}

/// An owner loads and shows the cursor.
fn shown(next: u64, holes: Vec<(u64, u64)>) -> [Event; 2] {
    let (segment, owner, subscription) = (SEGMENT, 2, SUBSCRIPTION);
    let shown = Some(CursorShown { next, holes });
    [
        Event::LoadBegun { segment, owner },
        Event::CursorSeen { segment, epoch: 2, owner, subscription, shown },
    ]
}

#[test]
fn i14_a_mark_delete_that_falls_is_found() {
    assert_eq!(judge([settle(0, 0, 3, 4), shown(4, vec![])].concat()), None);
    assert_eq!(judge([settle(0, 0, 3, 4), shown(3, vec![])].concat()), Some("I14"));
    assert_eq!(judge([settle(0, 0, 3, 4), settle(2, 0, 1, 2)].concat()), Some("I14"));
}

#[test]
fn i14_what_was_settled_and_is_open_again_is_found() {
    assert_eq!(judge([settle(0, 5, 6, 0), shown(0, vec![(5, 6)])].concat()), None);
    assert_eq!(judge([settle(0, 5, 6, 0), shown(0, vec![(5, 5)])].concat()), Some("I14"));
}

#[test]
fn i14_a_cursor_that_is_gone_is_found() {
    let (segment, owner, subscription) = (SEGMENT, 2, SUBSCRIPTION);
    let events = vec![
        Event::CursorMade { segment, subscription },
        Event::LoadBegun { segment, owner },
        Event::CursorSeen { segment, epoch: 2, owner, subscription, shown: None },
    ];
    assert_eq!(judge(events), Some("I14"));
}

#[test]
fn i12_what_nobody_settled_and_is_skipped_is_found() {
    assert_eq!(judge([settle(0, 0, 3, 4), shown(5, vec![])].concat()), Some("I12"));
    assert_eq!(judge([settle(0, 0, 3, 4), shown(4, vec![(6, 6)])].concat()), Some("I12"));
}

#[test]
fn i12_an_owner_that_does_not_know_what_was_acknowledged_before_it_loaded_is_found() {
    let opened = |persisted| {
        let (segment, owner) = (SEGMENT, 2);
        vec![
            published(1, 1, 3, 0, false),
            Event::LoadBegun { segment, owner },
            Event::ProducerOpened { segment, owner, producer: "p".into(), persisted },
        ]
    };
    assert_eq!(judge(opened(3)), None);
    assert_eq!(judge(opened(2)), Some("I12"));
}

#[test]
fn m2_a_list_that_is_ahead_of_its_ledgers_is_found() {
    let list = |closed, next: Option<u64>| {
        let mut data = vec![Listed { ledger: LEDGER, closed }];
        data.extend(next.map(|ledger| Listed { ledger, closed: false }));
        Event::ListPut { segment: SEGMENT, revision: 1, epoch: 1, nonce: 1, data, log: vec![] }
    };
    assert_eq!(judge(vec![open([1, 2, 3]), list(false, None)]), None);
    assert_eq!(judge(vec![open([1, 2, 3]), list(true, None)]), Some("M2"));
    assert_eq!(judge(vec![open([1, 2, 3]), list(false, Some(8))]), Some("M2"));
    assert_eq!(judge(vec![open([1, 2, 3]), closed(-1), list(true, Some(8))]), None);
}
