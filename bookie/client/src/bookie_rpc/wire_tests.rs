use bytes::{Buf, BytesMut};
use proptest::prelude::*;

use super::*;
use crate::{
    bookie_rpc::{
        EntryAnswer, EntrySet,
        frame::{FRAME_BYTES_MAX, HEADER_BYTES_MAX, Inbox},
    },
    entry::Payload,
};

fn bytes_of(out: &mut Outbox) -> Vec<u8> {
    let mut bytes = vec![0u8; out.remaining()];
    out.copy_to_slice(&mut bytes);
    bytes
}

/// Through the buffers as through a socket, in pieces of `piece` bytes.
fn through(out: &mut Outbox, piece: usize) -> Result<Vec<Frame>, FrameError> {
    let bytes = bytes_of(out);
    arrive(&bytes, piece)
}

fn arrive(bytes: &[u8], piece: usize) -> Result<Vec<Frame>, FrameError> {
    let mut inbox = Inbox::default();
    let mut frames = Vec::new();
    for part in bytes.chunks(piece.max(1)) {
        inbox.room().extend_from_slice(part);
        while let Some(frame) = inbox.next_frame()? {
            frames.push(frame);
        }
    }
    Ok(frames)
}

fn any_id() -> impl Strategy<Value = u64> {
    prop_oneof![0..50u64, Just(i64::MAX as u64), any::<u64>().prop_map(|id| id >> 1)]
}

fn any_entry() -> impl Strategy<Value = Entry> {
    let sizes = prop_oneof![0usize..40, 400..700usize];
    let part = || sizes.clone().prop_map(|size| Bytes::from(vec![7u8; size]));
    let lac = prop::option::of(any_id());
    (any::<u64>(), any_id(), lac, any::<u64>(), part(), part(), any::<bool>()).prop_map(
        |(ledger, id, lac, acc_length, head, body, damaged)| {
            let payload = Payload { head, body, trace: None };
            let lac = lac.map(EntryId);
            let mut entry = Entry::seal(LedgerId(ledger), EntryId(id), lac, acc_length, payload);
            entry.digest ^= u32::from(damaged); // is the bookie's to find
            entry
        },
    )
}

fn any_range() -> impl Strategy<Value = EntryRange> {
    (any_id(), any_id())
        .prop_map(|(a, b)| EntryRange { first: EntryId(a.min(b)), last: EntryId(a.max(b)) })
}

fn any_unknown() -> impl Strategy<Value = Unknown> {
    prop_oneof![
        Just(Unknown::Timeout),
        Just(Unknown::Disconnected),
        Just(Unknown::WrongIncarnation),
        Just(Unknown::Busy),
        Just(Unknown::Limbo),
        Just(Unknown::Dropped),
        Just(Unknown::Damaged),
        ".{0,40}".prop_map(Unknown::Io),
        ".{0,40}".prop_map(Unknown::Refused),
    ]
}

fn any_set() -> impl Strategy<Value = EntrySet> {
    prop::collection::vec((0u64..5, 0u64..1 << 40), 0..20).prop_map(|runs| {
        let (mut set, mut next) = (EntrySet::default(), 0);
        for (gap, more) in runs {
            let (first, last) = (EntryId(next + gap), EntryId(next + gap + more));
            assert!(set.push_run(first, last));
            next = last.0 + 2;
        }
        set
    })
}

fn any_request(now: Instant) -> impl Strategy<Value = Request> {
    let to = || any::<u32>().prop_map(Incarnation);
    let ledger = || any::<u64>().prop_map(LedgerId);
    let deadline = move || (0u64..600_000).prop_map(move |ms| now + Duration::from_millis(ms));
    prop_oneof![
        (to(), any_entry(), any::<bool>(), deadline()).prop_map(
            |(to, entry, recovery, deadline)| {
                Request::Add(AddRequest { to, entry, recovery, deadline })
            }
        ),
        (to(), ledger(), any_id().prop_map(EntryId))
            .prop_map(|(to, ledger, lac)| Request::WriteLac { to, ledger, lac }),
        (to(), ledger(), prop::option::of(any_range()), deadline()).prop_map(
            |(to, ledger, list, deadline)| {
                Request::Fence(FenceRequest { to, ledger, list, deadline })
            }
        ),
        (to(), ledger(), any_range(), any::<bool>(), any::<usize>(), deadline()).prop_map(
            |(to, ledger, range, fence, bytes_max, deadline)| {
                Request::Read(ReadRequest { to, ledger, range, fence, bytes_max, deadline })
            }
        ),
        (to(), ledger(), deadline()).prop_map(|(to, ledger, deadline)| Request::ReadLac {
            to,
            ledger,
            deadline
        }),
        (to(), ledger(), any_range(), deadline()).prop_map(|(to, ledger, range, deadline)| {
            Request::List { to, ledger, range, deadline }
        }),
    ]
}

fn any_reply() -> impl Strategy<Value = Reply> {
    let verdict = prop_oneof![
        any_entry().prop_map(EntryAnswer::Held),
        Just(EntryAnswer::Absent),
        any_unknown().prop_map(EntryAnswer::Unknown),
    ];
    let lac = || prop::option::of(any_id().prop_map(EntryId));
    prop_oneof![
        prop_oneof![
            Just(AddAnswer::Ok),
            Just(AddAnswer::Fenced),
            Just(AddAnswer::ReadOnly),
            Just(AddAnswer::NoSpace),
            any_unknown().prop_map(AddAnswer::Unknown),
        ]
        .prop_map(Reply::Add),
        (lac(), prop::option::of(any_set()))
            .prop_map(|(lac, held)| Reply::Fence(FenceAnswer::Fenced { lac, held })),
        any_unknown().prop_map(|why| Reply::Fence(FenceAnswer::Unknown(why))),
        prop::collection::vec(verdict, 1..12)
            .prop_map(|entries| Reply::Read(ReadAnswer { entries })),
        lac().prop_map(|lac| Reply::ReadLac(LacAnswer::Known(lac))),
        any_unknown().prop_map(|why| Reply::ReadLac(LacAnswer::Unknown(why))),
        any_set().prop_map(|set| Reply::List(ListAnswer::Held(set))),
        any_unknown().prop_map(|why| Reply::List(ListAnswer::Unknown(why))),
    ]
}

proptest! {
    #[test]
    fn decode_gives_back_the_request_that_encode_took(
        request in any_request(Instant::now()), id: u64, piece in 1usize..900,
    ) {
        let now = Instant::now();
        let mut out = Outbox::default();
        request.encode(id, now, &mut out).expect("within the limits");
        let mut frames = through(&mut out, piece).expect("whole frames");
        prop_assert_eq!(frames.len(), 1);
        let (back, mut decoded) = Request::decode(frames.remove(0), now).expect("decodes");
        let answered = !matches!(request, Request::WriteLac { .. });
        prop_assert_eq!(back, answered.then_some(id));
        // Deadlines travel in whole milliseconds: at most one less.
        let mut request = request;
        if let (Some(sent), Some(got)) = (deadline_of(&mut request), deadline_of(&mut decoded)) {
            let lost = sent.saturating_duration_since(now).as_millis();
            prop_assert_eq!(lost, got.saturating_duration_since(now).as_millis());
            *got = *sent;
        }
        prop_assert_eq!(format!("{request:?}").len(), format!("{decoded:?}").len());
        prop_assert!(same(&request, &decoded), "{:?} became {:?}", request, decoded);
    }

    #[test]
    fn decode_gives_back_the_answers_that_encode_took(
        replies in prop::collection::vec((any::<u64>(), any_reply()), 1..6), piece in 1usize..2_000,
    ) {
        let mut out = Outbox::default();
        for (id, reply) in &replies {
            reply.encode(*id, &mut out).expect("within the limits");
        }
        let frames = through(&mut out, piece).expect("whole frames");
        let back: Result<Vec<_>, _> = frames.into_iter().map(Reply::decode).collect();
        prop_assert_eq!(back.expect("decodes"), replies);
    }

    #[test]
    fn any_bytes_are_an_error_or_wait_for_more(bytes: Vec<u8>, piece in 1usize..50) {
        let _ = arrive(&bytes, piece);
    }

    /// The header is anything, in a frame that is whole: neither side panics, nor takes it for a positive by luck alone.
    #[test]
    fn any_header_and_payload_are_an_error_or_a_message(
        kind in 0usize..13, header: Vec<u8>, payload: Vec<u8>,
    ) {
        const KINDS: [Kind; 13] = [
            Kind::Add, Kind::WriteLac, Kind::Fence, Kind::Read, Kind::ReadLac, Kind::List,
            Kind::AddReply, Kind::FenceReply, Kind::ReadReply, Kind::ReadLacReply,
            Kind::ListReply, Kind::Ping, Kind::Pong,
        ];
        let (header, payload) = (Bytes::from(header), Bytes::from(payload));
        let frame = Frame { kind: KINDS[kind], header, payload };
        let _ = Request::decode(frame.clone(), Instant::now());
        let _ = Reply::decode(frame);
    }

    #[test]
    fn any_verdicts_and_runs_are_an_error_or_a_message(inner: Vec<u8>, payload: Vec<u8>) {
        let _ = decode_verdicts(inner.clone().into(), payload.into());
        if let Ok(set) = decode_set(inner.into()) {
            let again = encode_set(&set).expect("short");
            prop_assert_eq!(decode_set(again), Ok(set));
        }
    }

    #[test]
    fn a_flipped_bit_in_prelude_or_header_never_gives_another_message(
        id: u64, reply in any_reply(), bit in 0usize..10_000,
    ) {
        let mut out = Outbox::default();
        reply.encode(id, &mut out).expect("within the limits");
        let mut bytes = bytes_of(&mut out);
        let headers = u32::from_le_bytes(bytes[4..8].try_into().expect("four bytes")) as usize;
        let bit = bit % ((16 + headers) * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        if let Ok(frames) = arrive(&bytes, usize::MAX) {
            prop_assert!(frames.is_empty(), "at most it waits for bytes that never come");
        }
    }
}

fn deadline_of(request: &mut Request) -> Option<&mut Instant> {
    match request {
        Request::Add(add) => Some(&mut add.deadline),
        Request::Fence(fence) => Some(&mut fence.deadline),
        Request::Read(read) => Some(&mut read.deadline),
        Request::ReadLac { deadline, .. } | Request::List { deadline, .. } => Some(deadline),
        Request::WriteLac { .. } => None,
    }
}

/// Payloads may be cut into other parts; all else is the same.
fn same(a: &Request, b: &Request) -> bool {
    match (a, b) {
        (Request::Add(a), Request::Add(b)) => {
            a.to == b.to && a.entry == b.entry && a.recovery == b.recovery
        }
        _ => format!("{a:?}") == format!("{b:?}"),
    }
}

#[test]
fn lengths_are_checked_before_anything_is_allocated() {
    for (length, header) in [
        (u32::MAX, 0),
        (FRAME_BYTES_MAX as u32, 10),
        (100, 101),
        (1 << 23, HEADER_BYTES_MAX as u32 + 1),
    ] {
        let mut inbox = Inbox::default();
        let room = inbox.room();
        room.extend_from_slice(&length.to_le_bytes());
        room.extend_from_slice(&header.to_le_bytes());
        room.extend_from_slice(&[1, Kind::Add as u8, 0, 0, 0, 0, 0, 0]);
        let capacity = inbox.capacity();
        assert!(
            matches!(inbox.next_frame(), Err(FrameError::TooLarge { .. })),
            "{length} {header}"
        );
        assert_eq!(inbox.capacity(), capacity);
    }
}

#[test]
fn a_promise_of_much_costs_little_until_it_arrives() {
    let mut inbox = Inbox::default();
    let room = inbox.room();
    room.extend_from_slice(&(15u32 << 20).to_le_bytes());
    room.extend_from_slice(&0u32.to_le_bytes());
    room.extend_from_slice(&[1, Kind::Add as u8, 0, 0, 0, 0, 0, 0]);
    for _ in 0..1_000 {
        assert_eq!(inbox.next_frame(), Ok(None));
        inbox.room().extend_from_slice(&[0]);
    }
    assert!(inbox.capacity() < 3 << 20, "{}", inbox.capacity());
}

#[test]
fn other_versions_and_kinds_are_told_apart() {
    let frame = |version: u8, kind: u8| {
        let mut bytes = BytesMut::zeroed(16);
        (bytes[8], bytes[9]) = (version, kind);
        arrive(&bytes, usize::MAX)
    };
    assert_eq!(frame(2, 1), Err(FrameError::Version(2)));
    assert_eq!(frame(1, 99), Err(FrameError::Kind(99)));
}

#[test]
fn ids_that_would_overflow_and_reversed_ranges_are_malformed() {
    assert!(entry_id(u64::MAX).is_err());
    assert!(range(Some(2), Some(1)).is_err());
    assert!(range(Some(2), None).is_err());
    assert!(range(Some(0), Some(u64::MAX)).is_err());
}

#[test]
fn a_missing_code_is_neither_positive_nor_a_no() {
    let frame = |kind| Frame { kind, header: Bytes::new(), payload: Bytes::new() };
    let decoded = |kind| Reply::decode(frame(kind));
    assert!(matches!(decoded(Kind::AddReply), Ok((0, Reply::Add(AddAnswer::Unknown(_))))));
    assert!(matches!(decoded(Kind::FenceReply), Ok((0, Reply::Fence(FenceAnswer::Unknown(_))))));
    assert!(decoded(Kind::ReadReply).is_err());
    assert!(matches!(decoded(Kind::ReadLacReply), Ok((0, Reply::ReadLac(LacAnswer::Unknown(_))))));
    assert!(matches!(decoded(Kind::ListReply), Ok((0, Reply::List(ListAnswer::Unknown(_))))));
}

#[test]
fn a_read_answer_beyond_a_frame_ends_early() {
    let payload = Payload::from(Bytes::from(vec![1u8; 5 << 20]));
    let entry = |id| Entry::seal(LedgerId(1), EntryId(id), None, 0, payload.clone());
    let entries = (0..4).map(|id| EntryAnswer::Held(entry(id))).collect();
    let mut out = Outbox::default();
    Reply::Read(ReadAnswer { entries }).encode(9, &mut out).expect("cut to what fits");
    let frames = through(&mut out, 1 << 20).expect("a whole frame");
    let (9, Reply::Read(answer)) = Reply::decode(frames[0].clone()).expect("decodes") else {
        panic!("a read answer");
    };
    assert_eq!(answer.entries, [EntryAnswer::Held(entry(0)), EntryAnswer::Held(entry(1))]);
}
