//! Messages that wait for a time, listed and cancelled: what the dispatcher knows, and what lies further on in the log.

use std::sync::Arc;

use geminga_managed_ledger::ReadError;
use geminga_proto::{
    admin::v1::{
        CancelDelayedRequest, CancelDelayedResponse, DelayedMessage, ListDelayedRequest,
        ListDelayedResponse,
    },
    ids::Offset,
    internal::v1::segment_request::{CancelDelayed, ListDelayed, Verb},
    v1::OffsetRange,
};

use super::{
    Command, DelayedAsked, DelayedFound,
    calls::{ask, here, subscription_of},
    wanted,
};
use crate::{
    catalog::Subscription, context::Shared, errors::Refusal, ownership::Segment, relay,
    storage_errors,
};

/// Messages on one page.
const DELAYED_MAX: u32 = 1_000;
/// Bytes of one read while they are looked for, and messages looked through for one page.
const LOOK_BYTES: usize = 1 << 20;
const LOOK_MESSAGES_MAX: u64 = 200_000;

/// A page of what waits for a time.
pub(crate) async fn list_delayed(
    shared: &Shared,
    request: ListDelayedRequest,
) -> Result<ListDelayedResponse, Refusal> {
    let (topic, subscription) =
        subscription_of(shared, &request.topic, &request.subscription).await?;
    let id = topic.segment(request.segment)?;
    let verb = Verb::ListDelayed(ListDelayed {
        name: subscription.name.to_string(),
        page_size: request.page_size,
        page_token: request.page_token,
    });
    Ok(relay::ask(shared, id, verb).await?.delayed.unwrap_or_default())
}

/// As [`list_delayed`], on a segment that is here: what the dispatcher knows, the next due first; then what lies further
/// on in the log, by offset.
///
/// # Errors
/// INVALID_REQUEST for a foreign page token; what kept a read.
pub(crate) async fn list_delayed_here(
    shared: &Shared,
    segment: &Arc<Segment>,
    asked: &ListDelayed,
) -> Result<ListDelayedResponse, Refusal> {
    let subscription = here(shared, segment, &asked.name).await?;
    let most = if asked.page_size == 0 { DELAYED_MAX } else { asked.page_size.min(DELAYED_MAX) };
    let token = Token::parse(&asked.page_token)?;
    let mut response = ListDelayedResponse::default();
    let deadline = shared.config.limits.unary_deadline;
    let after = match token {
        Token::Known(due, offset) => (due, offset),
        Token::Unseen(_) => (u64::MAX, u64::MAX),
    };
    // One more than fits says that there is another page.
    let known = DelayedAsked { after, most: most as usize + 1 };
    let command = |answer| Command::Delayed(known, answer);
    let DelayedFound { known: found, in_log } =
        ask(shared, segment, &subscription, command, deadline).await?;
    for run in found {
        for offset in run.start..run.end {
            if after.0 == run.due_ms && offset <= after.1 {
                continue;
            }
            if response.messages.len() as u32 >= most {
                let last = response.messages.last().expect("a page has at least one");
                response.next_page_token = Token::Known(last.due_ms, last.offset).to_string();
                return Ok(response);
            }
            let message = DelayedMessage { offset, due_ms: run.due_ms, attempt: run.attempt };
            response.messages.push(message);
        }
    }
    let from = match token {
        Token::Known(..) => 0,
        Token::Unseen(offset) => offset,
    };
    for (start, end) in in_log {
        let run = (start.max(from), end);
        look_ahead(shared, segment, &subscription, (run, most), &mut response).await?;
        if !response.next_page_token.is_empty() {
            break;
        }
    }
    Ok(response)
}

/// Where a page of delayed messages ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    /// Behind this (due, offset) of what the dispatcher knows.
    Known(u64, u64),
    /// From this offset on.
    Unseen(u64),
}

impl Token {
    fn parse(text: &str) -> Result<Self, Refusal> {
        if text.is_empty() {
            return Ok(Self::Known(0, 0));
        }
        let bad = || Refusal::request("the page token was never given");
        let mut parts = text.split('.');
        let mut number = || parts.next().and_then(|part| part.parse().ok()).ok_or_else(bad);
        Ok(match number()? {
            1 => Self::Known(number()?, number()?),
            2 => Self::Unseen(number()?),
            _ => return Err(bad()),
        })
    }
}

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Known(due, offset) => write!(f, "1.{due}.{offset}"),
            Self::Unseen(offset) => write!(f, "2.{offset}"),
        }
    }
}

/// What no dispatcher has looked at yet, or tells apart, of a run: read, and listed by offset.
async fn look_ahead(
    shared: &Shared,
    segment: &Segment,
    subscription: &Subscription,
    ((from, end), most): ((u64, u64), u32),
    response: &mut ListDelayedResponse,
) -> Result<(), Refusal> {
    if !wanted::policy(&subscription.settings).kind.is_shared() {
        return Ok(());
    }
    let ledger = segment.ledger();
    let Some(cursor) = ledger.cursor(subscription.id) else { return Ok(()) };
    let settled = |offset: u64| {
        offset < cursor.mark_delete_next.0
            || cursor.holes.iter().any(|(first, last)| first.0 <= offset && offset <= last.0)
    };
    let (now, end) = (shared.catalog.now_ms(), ledger.end().borrow().0.min(end));
    let (mut at, mut looked) = (from, 0);
    while at < end {
        if looked >= LOOK_MESSAGES_MAX {
            response.next_page_token = Token::Unseen(at).to_string();
            return Ok(());
        }
        let read = ledger.read(Offset(at), LOOK_BYTES, usize::MAX).await;
        let batches = match read {
            Ok(batches) => batches,
            Err(ReadError::Trimmed { first }) => {
                at = first.0.max(at + 1);
                continue;
            }
            Err(error) => return Err(storage_errors::of_read(&error)),
        };
        if batches.is_empty() {
            return Ok(());
        }
        for batch in batches {
            let base = batch.base_offset.0;
            looked += u64::from(batch.header.count);
            let dues = batch.header.index.as_ref().map_or(&[][..], |index| &index.deliver_at_ms);
            for (offset, due_ms) in (base..).zip(dues) {
                if offset < at || offset >= end || *due_ms <= now || settled(offset) {
                    continue;
                }
                if response.messages.len() as u32 >= most {
                    response.next_page_token = Token::Unseen(offset).to_string();
                    return Ok(());
                }
                response.messages.push(DelayedMessage { offset, due_ms: *due_ms, attempt: 1 });
            }
            at = at.max(base + u64::from(batch.header.count));
        }
    }
    Ok(())
}

/// Settles what waits for a time.
pub(crate) async fn cancel_delayed(
    shared: &Shared,
    request: CancelDelayedRequest,
) -> Result<CancelDelayedResponse, Refusal> {
    wanted::runs(&request.ranges, shared.config.limits.settle_ranges_max)?;
    let (topic, subscription) =
        subscription_of(shared, &request.topic, &request.subscription).await?;
    let id = topic.segment(request.segment)?;
    let name = subscription.name.to_string();
    let verb = Verb::CancelDelayed(CancelDelayed { name, ranges: request.ranges });
    let cancelled = relay::ask(shared, id, verb).await?.cancelled;
    Ok(CancelDelayedResponse { cancelled })
}

/// As [`cancel_delayed`], on a segment that is here.
///
/// # Errors
/// INVALID_REQUEST; what kept the record.
pub(crate) async fn cancel_delayed_here(
    shared: &Shared,
    segment: &Arc<Segment>,
    name: &str,
    ranges: &[OffsetRange],
) -> Result<u64, Refusal> {
    let runs = wanted::runs(ranges, shared.config.limits.settle_ranges_max)?;
    let subscription = here(shared, segment, name).await?;
    let unseen = unseen_delays(shared, segment, &subscription, &runs).await?;
    let deadline = shared.config.limits.unary_deadline;
    let command = |answer| Command::Cancel(runs, unseen, answer);
    ask(shared, segment, &subscription, command, deadline).await
}

/// Of these runs, what is stored with a time that has not come.
async fn unseen_delays(
    shared: &Shared,
    segment: &Segment,
    subscription: &Subscription,
    runs: &[(u64, u64)],
) -> Result<Vec<(u64, u64)>, Refusal> {
    let mut unseen = Vec::new();
    for (start, end) in runs {
        let mut page = ListDelayedResponse::default();
        look_ahead(shared, segment, subscription, ((*start, *end), DELAYED_MAX), &mut page).await?;
        unseen.extend(page.messages.iter().map(|message| (message.offset, message.offset + 1)));
    }
    Ok(unseen)
}
