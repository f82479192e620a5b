//! Values inside the headers of answers: codes, sets of entries, verdicts. Pure; the numbers are the format.

use bytes::{Buf, Bytes};
use geminga_proto::ids::EntryId;
use prost::encoding::{decode_varint, encode_varint};

use super::{
    EntryAnswer, EntrySet, ReadAnswer, Unknown,
    frame::{FRAME_BYTES_MAX, FrameError, HEADER_BYTES_MAX},
};
use crate::entry::{ENTRY_HEADER_BYTES, Entry};

/// The most verdicts of one READ answer.
const VERDICTS_MAX: usize = 16_384;
/// Texts of answers are cut to this, bytes.
const TEXT_BYTES_MAX: usize = 1_024;
/// Room that a READ answer leaves for prelude and header, bytes.
const READ_HEADROOM: usize = 64 * 1024;

const ABSENT: u32 = 5;
/// Codes of the class unknown are from here on; see [`code_of`].
const UNKNOWN: u32 = 16;
/// A verdict from here on is an entry of `verdict - HELD` encoded bytes.
const HELD: u64 = 64;

/// Ids are dense from 0 and never come near this; refusing them keeps every `id + 1` further on from overflowing.
pub(super) fn entry_id(id: u64) -> Result<EntryId, FrameError> {
    let fits = id <= i64::MAX as u64;
    fits.then_some(EntryId(id)).ok_or(FrameError::Malformed("entry id"))
}

/// The code of an unknown, from [`UNKNOWN`] on, and its text.
pub(super) fn code_of(why: &Unknown) -> (u32, &str) {
    let (code, text) = match why {
        Unknown::Timeout => (1, ""),
        Unknown::Disconnected => (2, ""),
        Unknown::WrongIncarnation => (3, ""),
        Unknown::Busy => (4, ""),
        Unknown::Limbo => (5, ""),
        Unknown::Dropped => (6, ""),
        Unknown::Damaged => (7, ""),
        Unknown::Io(text) => (8, text.as_str()),
        Unknown::Refused(text) => (9, text.as_str()),
    };
    (UNKNOWN + code, text)
}

pub(super) fn unknown_of(code: u32, text: String) -> Unknown {
    match code.wrapping_sub(UNKNOWN) {
        1 => Unknown::Timeout,
        2 => Unknown::Disconnected,
        3 => Unknown::WrongIncarnation,
        4 => Unknown::Busy,
        5 => Unknown::Limbo,
        6 => Unknown::Dropped,
        7 => Unknown::Damaged,
        8 => Unknown::Io(text),
        9 => Unknown::Refused(text),
        _ => Unknown::Io(format!("answer code {code} is not known here")),
    }
}

pub(super) fn cut(text: &str) -> String {
    let mut end = text.len().min(TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

/// Per run the gap to the run before and its length less one, as varints; none if that is more than a header holds.
pub(super) fn encode_set(set: &EntrySet) -> Option<Bytes> {
    let mut runs = Vec::new();
    let mut end = 0;
    for (first, last) in set.runs() {
        encode_varint(first.0 - end, &mut runs);
        encode_varint(last.0 - first.0, &mut runs);
        end = last.0;
        if runs.len() > HEADER_BYTES_MAX / 2 {
            return None;
        }
    }
    Some(runs.into())
}

pub(super) fn decode_set(mut runs: Bytes) -> Result<EntrySet, FrameError> {
    const BAD: FrameError = FrameError::Malformed("runs of entries");
    let mut set = EntrySet::default();
    let mut end = 0u64;
    while runs.has_remaining() {
        let gap = decode_varint(&mut runs).map_err(|_| BAD)?;
        let more = decode_varint(&mut runs).map_err(|_| BAD)?;
        let first = end.checked_add(gap).ok_or(BAD)?;
        end = first.checked_add(more).ok_or(BAD)?;
        if !set.push_run(entry_id(first)?, entry_id(end)?) {
            return Err(BAD);
        }
    }
    Ok(set)
}

/// The verdicts of a READ answer, and the entries whose bytes follow in the payload.
pub(super) struct Verdicts<'a> {
    pub(super) bytes: Bytes,
    pub(super) held: Vec<&'a Entry>,
    pub(super) held_bytes: usize,
}

/// Verdicts as varints: a code, with length and text after one that has a text; or [`HELD`] and more for an entry, whose
/// bytes lie in the payload. Ends early when the frame is full, never before the first verdict.
pub(super) fn encode_verdicts(answer: &ReadAnswer) -> Verdicts<'_> {
    let mut verdicts = Vec::new();
    let mut held = Vec::new();
    let mut bytes = 0;
    for entry in answer.entries.iter().take(VERDICTS_MAX) {
        if let EntryAnswer::Held(entry) = entry {
            let full = bytes + entry.encoded_len() > FRAME_BYTES_MAX - HEADER_BYTES_MAX;
            if full && !held.is_empty() {
                break;
            }
            bytes += entry.encoded_len();
            encode_varint(HELD + entry.encoded_len() as u64, &mut verdicts);
            held.push(entry);
        } else if let EntryAnswer::Unknown(why) = entry {
            let (code, text) = code_of(why);
            encode_varint(u64::from(code), &mut verdicts);
            if has_text(code) {
                let text = cut(text);
                encode_varint(text.len() as u64, &mut verdicts);
                verdicts.extend_from_slice(text.as_bytes());
            }
        } else {
            encode_varint(u64::from(ABSENT), &mut verdicts);
        }
        if verdicts.len() > HEADER_BYTES_MAX - READ_HEADROOM {
            break;
        }
    }
    Verdicts { bytes: verdicts.into(), held, held_bytes: bytes }
}

fn has_text(code: u32) -> bool {
    matches!(code.wrapping_sub(UNKNOWN), 8 | 9)
}

/// The answer that [`encode_verdicts`] was given, as far as it fitted.
pub(super) fn decode_verdicts(
    mut verdicts: Bytes,
    mut payload: Bytes,
) -> Result<ReadAnswer, FrameError> {
    const BAD: FrameError = FrameError::Malformed("verdicts");
    let mut entries = Vec::new();
    while verdicts.has_remaining() {
        if entries.len() == VERDICTS_MAX {
            return Err(FrameError::Malformed("too many verdicts"));
        }
        let verdict = decode_varint(&mut verdicts).map_err(|_| BAD)?;
        if let Some(length) = verdict.checked_sub(HELD) {
            let length = usize::try_from(length).map_err(|_| BAD)?;
            if length < ENTRY_HEADER_BYTES || length > payload.len() {
                return Err(BAD);
            }
            let entry = Entry::parse(payload.split_to(length)).map_err(|_| BAD)?;
            entry_id(entry.id.0)?;
            entries.push(EntryAnswer::Held(entry));
            continue;
        }
        let code = verdict as u32; // below HELD
        entries.push(match code {
            0 => return Err(BAD),
            ABSENT => EntryAnswer::Absent,
            _ if has_text(code) => {
                let length = decode_varint(&mut verdicts).map_err(|_| BAD)?;
                let length = usize::try_from(length).map_err(|_| BAD)?;
                if length > verdicts.len() {
                    return Err(BAD);
                }
                let text = String::from_utf8_lossy(&verdicts.split_to(length)).into_owned();
                EntryAnswer::Unknown(unknown_of(code, text))
            }
            _ => EntryAnswer::Unknown(unknown_of(code, String::new())),
        });
    }
    if entries.is_empty() || !payload.is_empty() {
        return Err(BAD);
    }
    Ok(ReadAnswer { entries })
}
