//! Headers of the frames, and the way from requests and answers to frames and back. Pure. Field numbers are the format.
//!
//! Deadlines travel as the milliseconds that remain, because clocks of two machines differ. Codes of answers start at 1: a
//! field that got lost must not read as a positive answer or an explicit no; a code that this side does not know is class
//! unknown. Counts inside a header are bounded by its bytes, so that decoding allocates in proportion to what arrived.

use std::time::Duration;

use bytes::Bytes;
use geminga_proto::ids::{EntryId, Incarnation, LedgerId};
use geminga_runtime::telemetry::TraceContext;
use prost::Message;
use tokio::time::Instant;

use super::{
    AddAnswer, AddRequest, EntryRange, FenceAnswer, FenceRequest, LacAnswer, ListAnswer,
    ReadAnswer, ReadRequest, Unknown,
    frame::{Frame, FrameError, Kind, Outbox},
    wire_values::{
        Verdicts, code_of, cut, decode_set, decode_verdicts, encode_set, encode_verdicts, entry_id,
        unknown_of,
    },
};
use crate::entry::Entry;

/// No deadline travels further than this; a bookie gives up by then in any case.
const DEADLINE_MAX: Duration = Duration::from_secs(600);

#[derive(Clone, PartialEq, Message)]
struct AddHeader {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(uint32, tag = "2")]
    to: u32,
    #[prost(uint64, tag = "3")]
    remaining_ms: u64,
    #[prost(bool, tag = "4")]
    recovery: bool,
    /// W3C traceparent; empty: the trace is not recorded.
    #[prost(string, tag = "5")]
    trace: String,
}

#[derive(Clone, PartialEq, Message)]
struct WriteLacHeader {
    #[prost(uint32, tag = "2")]
    to: u32,
    #[prost(uint64, tag = "4")]
    ledger: u64,
    #[prost(uint64, tag = "5")]
    lac: u64,
}

/// FENCE, READ, READ_LAC and LIST; each uses what it needs.
#[derive(Clone, PartialEq, Message)]
struct AskHeader {
    #[prost(uint64, tag = "1")]
    id: u64,
    #[prost(uint32, tag = "2")]
    to: u32,
    #[prost(uint64, tag = "3")]
    remaining_ms: u64,
    #[prost(uint64, tag = "4")]
    ledger: u64,
    /// Both or none.
    #[prost(uint64, optional, tag = "5")]
    first: Option<u64>,
    #[prost(uint64, optional, tag = "6")]
    last: Option<u64>,
    #[prost(bool, tag = "7")]
    fence: bool,
    #[prost(uint64, tag = "8")]
    bytes_max: u64,
}

/// Every answer.
#[derive(Clone, PartialEq, Message)]
struct ReplyHeader {
    #[prost(uint64, tag = "1")]
    id: u64,
    /// See [`code_of`]; 0 in a READ answer, whose verdicts have their own.
    #[prost(uint32, tag = "2")]
    code: u32,
    #[prost(string, tag = "3")]
    text: String,
    #[prost(uint64, optional, tag = "4")]
    lac: Option<u64>,
    /// Runs of an entry set, see [`encode_set`]; absent: no set.
    #[prost(bytes = "bytes", optional, tag = "5")]
    set: Option<Bytes>,
    /// Verdicts of a READ, see [`encode_verdicts`].
    #[prost(bytes = "bytes", tag = "6")]
    verdicts: Bytes,
}

const OK: u32 = 1;
const FENCED: u32 = 2;
const READ_ONLY: u32 = 3;
const NO_SPACE: u32 = 4;
/// A request as it travels.
#[derive(Clone, Debug)]
pub(crate) enum Request {
    Add(AddRequest),
    /// Has no answer.
    WriteLac {
        to: Incarnation,
        ledger: LedgerId,
        lac: EntryId,
    },
    Fence(FenceRequest),
    Read(ReadRequest),
    ReadLac {
        to: Incarnation,
        ledger: LedgerId,
        deadline: Instant,
    },
    List {
        to: Incarnation,
        ledger: LedgerId,
        range: EntryRange,
        deadline: Instant,
    },
}

/// An answer as it travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    Add(AddAnswer),
    Fence(FenceAnswer),
    Read(ReadAnswer),
    ReadLac(LacAnswer),
    List(ListAnswer),
}

impl Request {
    /// Puts it into the outbox as the request `id`.
    ///
    /// # Errors
    /// [`FrameError::TooLarge`] for an entry beyond the limits; then nothing was put.
    pub(crate) fn encode(&self, id: u64, now: Instant, out: &mut Outbox) -> Result<(), FrameError> {
        match self {
            Self::Add(AddRequest { to, entry, recovery, deadline }) => {
                let remaining_ms = remaining_ms(*deadline, now);
                let trace = entry.payload.trace.map(|trace| trace.to_string()).unwrap_or_default();
                let header = AddHeader { id, to: to.0, remaining_ms, recovery: *recovery, trace };
                out.begin(Kind::Add, &header, entry.encoded_len())?;
                put_entry(entry, out);
                Ok(())
            }
            Self::WriteLac { to, ledger, lac } => {
                let header = WriteLacHeader { to: to.0, ledger: ledger.0, lac: lac.0 };
                out.begin(Kind::WriteLac, &header, 0)
            }
            Self::Fence(FenceRequest { to, ledger, list, deadline }) => {
                let header = ask(id, *to, *ledger, *deadline, now, *list);
                out.begin(Kind::Fence, &header, 0)
            }
            Self::Read(ReadRequest { to, ledger, range, fence, bytes_max, deadline }) => {
                let header = AskHeader {
                    fence: *fence,
                    bytes_max: *bytes_max as u64,
                    ..ask(id, *to, *ledger, *deadline, now, Some(*range))
                };
                out.begin(Kind::Read, &header, 0)
            }
            Self::ReadLac { to, ledger, deadline } => {
                out.begin(Kind::ReadLac, &ask(id, *to, *ledger, *deadline, now, None), 0)
            }
            Self::List { to, ledger, range, deadline } => {
                out.begin(Kind::List, &ask(id, *to, *ledger, *deadline, now, Some(*range)), 0)
            }
        }
    }

    /// Reads a request; `None` for the id of one that has no answer. Digests of entries are left to the bookie.
    ///
    /// # Errors
    /// [`FrameError::Malformed`], also for a frame that is no request.
    pub(crate) fn decode(frame: Frame, now: Instant) -> Result<(Option<u64>, Self), FrameError> {
        let Frame { kind, header, payload } = frame;
        if kind == Kind::Add {
            let header: AddHeader = message(header)?;
            let mut entry =
                Entry::parse(payload).map_err(|_| FrameError::Malformed("entry length"))?;
            entry.payload.trace = TraceContext::parse(&header.trace).ok();
            entry_id(entry.id.0)?;
            let (to, deadline) = (Incarnation(header.to), deadline(header.remaining_ms, now));
            let add = AddRequest { to, entry, recovery: header.recovery, deadline };
            return Ok((Some(header.id), Self::Add(add)));
        }
        if !payload.is_empty() {
            return Err(FrameError::Malformed("a payload where none belongs"));
        }
        if kind == Kind::WriteLac {
            let header: WriteLacHeader = message(header)?;
            let (to, ledger) = (Incarnation(header.to), LedgerId(header.ledger));
            return Ok((None, Self::WriteLac { to, ledger, lac: entry_id(header.lac)? }));
        }
        let header: AskHeader = message(header)?;
        let (to, ledger) = (Incarnation(header.to), LedgerId(header.ledger));
        let deadline = deadline(header.remaining_ms, now);
        let list = range(header.first, header.last)?;
        let needed = list.ok_or(FrameError::Malformed("no range"));
        let request = match kind {
            Kind::Fence => Self::Fence(FenceRequest { to, ledger, list, deadline }),
            Kind::Read => {
                let (range, fence) = (needed?, header.fence);
                let bytes_max = usize::try_from(header.bytes_max).unwrap_or(usize::MAX);
                Self::Read(ReadRequest { to, ledger, range, fence, bytes_max, deadline })
            }
            Kind::ReadLac => Self::ReadLac { to, ledger, deadline },
            Kind::List => Self::List { to, ledger, range: needed?, deadline },
            _ => return Err(FrameError::Malformed("no request")),
        };
        Ok((Some(header.id), request))
    }
}

impl Reply {
    /// Puts it into the outbox as the answer to request `id`. A READ answer that is too long ends early; a LIST that does
    /// not fit is class unknown, and missing in a FENCE answer (which then proves no copy complete, R8).
    ///
    /// # Errors
    /// [`FrameError::TooLarge`], which nothing within the limits of entries gives.
    pub(crate) fn encode(&self, id: u64, out: &mut Outbox) -> Result<(), FrameError> {
        let plain = |code: u32, text: &str| ReplyHeader {
            id,
            code,
            text: cut(text),
            ..ReplyHeader::default()
        };
        let unknown = |why: &Unknown| {
            let (code, text) = code_of(why);
            plain(code, text)
        };
        match self {
            Self::Add(answer) => {
                let header = match answer {
                    AddAnswer::Ok => plain(OK, ""),
                    AddAnswer::Fenced => plain(FENCED, ""),
                    AddAnswer::ReadOnly => plain(READ_ONLY, ""),
                    AddAnswer::NoSpace => plain(NO_SPACE, ""),
                    AddAnswer::Unknown(why) => unknown(why),
                };
                out.begin(Kind::AddReply, &header, 0)
            }
            Self::Fence(answer) => {
                let header = match answer {
                    FenceAnswer::Fenced { lac, held } => {
                        let set = held.as_ref().and_then(encode_set);
                        ReplyHeader { lac: lac.map(|lac| lac.0), set, ..plain(FENCED, "") }
                    }
                    FenceAnswer::Unknown(why) => unknown(why),
                };
                out.begin(Kind::FenceReply, &header, 0)
            }
            Self::Read(answer) => encode_read(id, answer, out),
            Self::ReadLac(answer) => {
                let header = match answer {
                    LacAnswer::Known(lac) => {
                        ReplyHeader { lac: lac.map(|lac| lac.0), ..plain(OK, "") }
                    }
                    LacAnswer::Unknown(why) => unknown(why),
                };
                out.begin(Kind::ReadLacReply, &header, 0)
            }
            Self::List(answer) => {
                let header = match answer {
                    ListAnswer::Held(held) => match encode_set(held) {
                        Some(set) => ReplyHeader { set: Some(set), ..plain(OK, "") },
                        None => unknown(&Unknown::Refused("the list is too long".to_owned())),
                    },
                    ListAnswer::Unknown(why) => unknown(why),
                };
                out.begin(Kind::ListReply, &header, 0)
            }
        }
    }

    /// Reads an answer, with the id of its request. Digests of entries are left to whoever asked (RD4).
    ///
    /// # Errors
    /// [`FrameError::Malformed`], also for a frame that is no answer.
    pub(crate) fn decode(frame: Frame) -> Result<(u64, Self), FrameError> {
        let Frame { kind, header, payload } = frame;
        let header: ReplyHeader = message(header)?;
        let id = header.id;
        if kind == Kind::ReadReply {
            return Ok((id, Self::Read(decode_verdicts(header.verdicts, payload)?)));
        }
        if !payload.is_empty() {
            return Err(FrameError::Malformed("a payload where none belongs"));
        }
        let lac = header.lac.map(entry_id).transpose()?;
        let set = header.set.map(decode_set).transpose()?;
        let unknown = || unknown_of(header.code, header.text.clone());
        let reply = match kind {
            Kind::AddReply => Self::Add(match header.code {
                OK => AddAnswer::Ok,
                FENCED => AddAnswer::Fenced,
                READ_ONLY => AddAnswer::ReadOnly,
                NO_SPACE => AddAnswer::NoSpace,
                _ => AddAnswer::Unknown(unknown()),
            }),
            Kind::FenceReply => Self::Fence(match header.code {
                FENCED => FenceAnswer::Fenced { lac, held: set },
                _ => FenceAnswer::Unknown(unknown()),
            }),
            Kind::ReadLacReply => Self::ReadLac(match header.code {
                OK => LacAnswer::Known(lac),
                _ => LacAnswer::Unknown(unknown()),
            }),
            Kind::ListReply => Self::List(match (header.code, set) {
                (OK, Some(set)) => ListAnswer::Held(set),
                (OK, None) => return Err(FrameError::Malformed("a list without its runs")),
                _ => ListAnswer::Unknown(unknown()),
            }),
            _ => return Err(FrameError::Malformed("no answer")),
        };
        Ok((id, reply))
    }
}

fn ask(
    id: u64,
    to: Incarnation,
    ledger: LedgerId,
    deadline: Instant,
    now: Instant,
    range: Option<EntryRange>,
) -> AskHeader {
    AskHeader {
        id,
        to: to.0,
        remaining_ms: remaining_ms(deadline, now),
        ledger: ledger.0,
        first: range.map(|range| range.first.0),
        last: range.map(|range| range.last.0),
        ..AskHeader::default()
    }
}

fn remaining_ms(deadline: Instant, now: Instant) -> u64 {
    deadline.saturating_duration_since(now).min(DEADLINE_MAX).as_millis() as u64
}

fn deadline(remaining_ms: u64, now: Instant) -> Instant {
    now + Duration::from_millis(remaining_ms).min(DEADLINE_MAX)
}

fn message<M: Message + Default>(header: Bytes) -> Result<M, FrameError> {
    M::decode(header).map_err(|_| FrameError::Malformed("header"))
}

fn range(first: Option<u64>, last: Option<u64>) -> Result<Option<EntryRange>, FrameError> {
    match (first, last) {
        (None, None) => Ok(None),
        (Some(first), Some(last)) if first <= last => {
            Ok(Some(EntryRange { first: entry_id(first)?, last: entry_id(last)? }))
        }
        _ => Err(FrameError::Malformed("range")),
    }
}

fn put_entry(entry: &Entry, out: &mut Outbox) {
    out.put_slice(&entry.header());
    out.put(&entry.payload.head);
    out.put(&entry.payload.body);
}

fn encode_read(id: u64, answer: &ReadAnswer, out: &mut Outbox) -> Result<(), FrameError> {
    let Verdicts { bytes, held, held_bytes } = encode_verdicts(answer);
    let header = ReplyHeader { id, verdicts: bytes, ..ReplyHeader::default() };
    out.begin(Kind::ReadReply, &header, held_bytes)?;
    for entry in held {
        put_entry(entry, out);
    }
    Ok(())
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
