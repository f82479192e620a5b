//! What the managed ledger answers, as reasons for clients. The other half of [`crate::errors`]: nothing else translates.

use std::time::Duration;

use geminga_managed_ledger::{
    DeleteError, LoadError, ProducerError, PublishError, ReadError, SettleError, TierError,
};
use geminga_proto::reason::Reason;

use crate::errors::Refusal;

/// Pause before a segment that cannot be served now is asked for again.
const LOADING_DELAY: Duration = Duration::from_millis(500);

/// Whether the claim is to be made again before the next load.
pub(crate) fn lost_claim(error: &LoadError) -> bool {
    matches!(error, LoadError::ClaimLost)
}

pub(crate) fn of_load(error: &LoadError) -> Refusal {
    match error {
        LoadError::NotFound => Refusal::new(Reason::TopicNotFound, error.to_string()),
        LoadError::ClaimLost | LoadError::Unavailable(_) => loading(error),
        LoadError::Damaged(_) => Refusal::internal(error),
        LoadError::Stopped => stopping(error),
    }
}

pub(crate) fn of_delete(error: &DeleteError) -> Refusal {
    match error {
        DeleteError::Unavailable(_) => loading(error),
        DeleteError::Damaged(_) => Refusal::internal(error),
        DeleteError::Stopped => stopping(error),
    }
}

pub(crate) fn of_producer(error: &ProducerError) -> Refusal {
    let refuse = |reason| Refusal::new(reason, error.to_string());
    match error {
        ProducerError::StaleStream { current } => {
            refuse(Reason::ProducerFenced).with("stream_number", current)
        }
        ProducerError::UnknownSession => refuse(Reason::ProducerExpired),
        ProducerError::TooManyProducers { limit } => {
            refuse(Reason::TooManyProducers).with("producers_max", limit)
        }
        ProducerError::StaleEpoch { current } => {
            refuse(Reason::ProducerFenced).with("producer_epoch", current)
        }
        ProducerError::Held { .. } | ProducerError::OthersConnected => {
            refuse(Reason::ProducerExists)
        }
        ProducerError::NotNamed => refuse(Reason::InvalidRequest),
        ProducerError::NotEnoughBookies(_) => refuse(Reason::NotEnoughBookies),
        ProducerError::MetadataUnavailable => {
            refuse(Reason::MetadataUnavailable).after(LOADING_DELAY)
        }
        ProducerError::Fenced => refuse(Reason::SegmentFenced),
        ProducerError::Closed => loading(error),
    }
}

pub(crate) fn of_publish(error: &PublishError) -> Refusal {
    let refuse = |reason| Refusal::new(reason, error.to_string());
    match error {
        PublishError::OutOfSequence { pushed } => {
            refuse(Reason::OutOfSequence).with("pushed_sequence", pushed)
        }
        PublishError::SequenceConflict => refuse(Reason::SequenceConflict),
        PublishError::StaleStream | PublishError::ProducerFenced => refuse(Reason::ProducerFenced),
        PublishError::UnexpectedOffset { next } => {
            refuse(Reason::UnexpectedOffset).with("next_offset", next.0)
        }
        PublishError::UnknownProducer => refuse(Reason::ProducerExpired),
        PublishError::Invalid(_) => refuse(Reason::InvalidRequest),
        PublishError::TooLarge { .. } => refuse(Reason::MessageTooLarge),
        PublishError::NotEnoughBookies(_) => refuse(Reason::NotEnoughBookies),
        PublishError::MetadataUnavailable => {
            refuse(Reason::MetadataUnavailable).after(LOADING_DELAY)
        }
        PublishError::Busy => refuse(Reason::Busy),
        PublishError::BacklogQuota { .. } => refuse(Reason::BacklogQuota),
        PublishError::Fenced => refuse(Reason::SegmentFenced),
        PublishError::Closed => loading(error),
    }
}

pub(crate) fn of_read(error: &ReadError) -> Refusal {
    match error {
        ReadError::Trimmed { .. } | ReadError::Unavailable(_) => loading(error),
        ReadError::Damaged(_) => Refusal::new(Reason::ReadDamaged, error.to_string()),
        ReadError::Fenced => Refusal::new(Reason::SegmentFenced, error.to_string()),
    }
}

pub(crate) fn of_settle(error: &SettleError) -> Refusal {
    let refuse = |reason| Refusal::new(reason, error.to_string());
    match error {
        SettleError::UnknownCursor => refuse(Reason::SubscriptionNotFound),
        SettleError::OutOfRange { .. } => refuse(Reason::InvalidHandle),
        SettleError::TooManyHoles { limit } => refuse(Reason::CursorLimit).with("holes_max", limit),
        SettleError::NotEnoughBookies(_) => refuse(Reason::NotEnoughBookies),
        SettleError::MetadataUnavailable => {
            refuse(Reason::MetadataUnavailable).after(LOADING_DELAY)
        }
        SettleError::Busy => refuse(Reason::Busy),
        SettleError::Fenced => refuse(Reason::SegmentFenced),
        SettleError::Closed => loading(error),
    }
}

pub(crate) fn of_tier(error: &TierError) -> Refusal {
    let refuse = |reason| Refusal::new(reason, error.to_string());
    match error {
        TierError::NoColdStorage => refuse(Reason::NoColdStorage),
        TierError::Busy => refuse(Reason::Busy),
        TierError::Fenced => refuse(Reason::SegmentFenced),
    }
}

fn loading(error: &dyn std::error::Error) -> Refusal {
    Refusal::new(Reason::SegmentLoading, error.to_string()).after(LOADING_DELAY)
}

fn stopping(error: &dyn std::error::Error) -> Refusal {
    Refusal::new(Reason::ShuttingDown, error.to_string())
}
