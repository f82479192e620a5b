//! Who gets which message when: one pure core per consumer of a subscription's segment, and the ranges it counts with.
//!
//! ```text
//!  mark-delete      next_deliver          next_read          end
//!      |  settled / outstanding |  queue (read ahead) |  not read  |
//! ```
//! The policy is exclusive: one consumer gets everything in order. Other policies come as other choices of the consumer
//! for the next batch, not as other dispatchers.

mod core;
mod ranges;

pub use self::core::{Action, Batch, Blocked, Core, CoreLimits, Delivery};
pub use ranges::RangeSet;
