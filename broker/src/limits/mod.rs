//! What policies limit on a segment: rates and counts.
//!
//! - `bucket`: the token bucket (pure), and the pair of messages and bytes;
//! - `segment`: what holds on one segment, as the policy keeper tells it; `publish`: producers wait for their turn;
//! - `producers`: how many there are.
//!
//! Nothing is refused for a rate on a stream: it waits. What a dispatcher gives is limited in its core.

mod bucket;
mod producers;
mod publish;
mod segment;

pub use bucket::{Bucket, Rate, Rates, Throttle};
pub(crate) use producers::{ProducerSlot, Producers};
pub(crate) use publish::PublishRate;
pub(crate) use segment::{SegmentLimits, limits_of};
