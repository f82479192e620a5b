//! Subscriptions in service: one dispatcher task per subscription of a segment, and the gRPC service around them.
//!
//! - `dispatchers`: a segment's tasks; started when first asked for, ended when there is nothing to do; `settings`: they learn
//!   of changed ones;
//! - `task`: the owner of the pure core and of the consumers; `gate`: what it listens to; `durable`: core and cursor log;
//! - `wanted`: what clients ask for, checked; `handle`: what a delivery carries;
//! - `dead_letters`: the copies; `service`, `calls`, `delayed`, `reader` (with its `pace`): the RPCs.

mod calls;
mod dead_letters;
mod delayed;
mod dispatchers;
pub mod durable;
mod gate;
mod handle;
mod pace;
mod reader;
mod service;
mod settings;
mod task;
mod wanted;

pub use handle::{Handle, Signer};

pub(crate) use calls::{explain_here, seek_here};
pub(crate) use dead_letters::{decided as dead_letters, resume as resume_dead_letters};
pub(crate) use delayed::{cancel_delayed, cancel_delayed_here, list_delayed, list_delayed_here};
pub(crate) use dispatchers::{Attach, Command, DelayedAsked, DelayedFound, Dispatchers, PullAsked};
pub(crate) use service::SubscriberService;
pub(crate) use settings::{keep as keep_settings, reread as reread_settings};
pub(crate) use wanted::{settings, start_of};
