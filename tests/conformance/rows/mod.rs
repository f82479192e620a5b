//! The table. A row's function is the scenario; its name, the fact.

mod bad_input;
mod compaction;
mod dead_letter;
mod delays;
mod discovery;
mod durability;
mod exactly_once;
mod explain;
mod failover;
mod handles;
mod key_shared;
mod leases;
mod limits;
mod order;
mod positions;
mod producers;
mod redelivery;
mod rest;
mod shared;
mod streams;

use std::sync::Arc;

use geminga_proto::v1::{RetryPolicy, SubscriptionSettings, SubscriptionType};

use crate::{client::settings, run::Row, world::World};

/// Rows of one promise.
macro_rules! rows {
    ($($promise:literal: $kind:ident $name:literal = $run:path;)*) => {
        vec![$(Row {
            promise: $promise,
            name: $name,
            harm: rows!(@ $kind),
            run: |world: Arc<World>| Box::pin($run(world)),
        }),*]
    };
    (@ calm) => { false };
    (@ harm) => { true };
}

/// Every row.
#[rustfmt::skip]
pub(crate) fn table() -> Vec<Row> {
    rows! {
        "receipt": harm "what has a receipt is there, once and in order, through three kill -9 of the owner (T32)" = durability::receipts_survive_kills;
        "receipt": calm "a receipt says what level it reached" = durability::receipts_name_their_level;
        "order": calm "a second consumer of an exclusive subscription is refused" = order::exclusive_refuses_a_second;
        "order": harm "an exclusive subscription goes on where it was settled, in order, through kill -9 and a planned move (T33)" = order::exclusive_resumes_in_order;
        "order": calm "accept-up-to settles everything at or below" = order::accept_up_to_settles_all_below;
        "failover": calm "one consumer is active; when it leaves the next takes over, with what was not settled" = failover::takes_over;
        "failover": calm "consumers share the segments out, and a membership change moves the minimum" = failover::shares_the_segments_out;
        "failover": calm "a former active consumer keeps what it holds until it settles or loses it" = failover::waits_for_what_is_held;
        "shared": calm "messages spread over the consumers and are settled one by one" = shared::spreads_and_settles_individually;
        "shared": calm "nobody gets more than its credit" = shared::credit_bounds_deliveries;
        "shared": harm "what was accepted out of order never comes again, through kill -9 and a planned move" = shared::holes_survive;
        "redelivery": calm "a counted release is the next attempt, an uncounted one the same" = redelivery::release_counts_or_not;
        "redelivery": calm "a release with a delay comes after it, not before" = redelivery::release_waits_for_its_delay;
        "redelivery": calm "a negative acknowledgement without a delay waits for the backoff, doubled each time" = redelivery::backoff_doubles;
        "redelivery": calm "a lost consumer's messages come again after the grace, as the next attempt" = redelivery::lost_consumers_count;
        "redelivery": calm "a consumer that leaves in good order leaves attempts as they are" = redelivery::clean_leaves_do_not_count;
        "redelivery": harm "attempts are the same after kill -9 of the owner" = redelivery::attempts_survive_kills;
        "redelivery": harm "attempts are the same after planned moves, ten in the standalone and a hundred in the cluster" = redelivery::attempts_survive_moves;
        "dead-letter": calm "reject sends a message to the dead-letter topic with origin, reason and attempts" = dead_letter::reject_goes_there_with_its_origin;
        "dead-letter": calm "the last of n attempts ends in the dead-letter topic, exactly at n" = dead_letter::at_the_maximum_exactly;
        "dead-letter": harm "each rejected message has one copy though the owner is killed in between" = dead_letter::one_copy_through_kills;
        "delay": calm "deliver-at on a shared subscription: none early, none skipped, in order of time" = delays::none_early_none_skipped;
        "delay": calm "exclusive subscriptions keep their order whatever deliver-at says" = delays::exclusive_keeps_order;
        "delay": harm "delays survive kill -9 of the owner: none early, none skipped" = delays::survive_kills;
        "delay": calm "delayed messages can be listed and cancelled" = delays::listed_and_cancelled;
        "lease": calm "a lease that runs out is revoked, and the message is another's next attempt" = leases::expire;
        "lease": calm "an extended lease lasts as long as it was extended" = leases::extend;
        "lease": harm "a consumer that presents its handles after kill -9 goes on with its messages (L4)" = leases::claims_after_a_kill;
        "lease": harm "what nobody claims after kill -9 comes again after the grace, its attempt unchanged (L4)" = leases::unclaimed_after_a_kill;
        "key-order": calm "each key is accepted in order through joins, leaves, releases and expiries (T36)" = key_shared::order_through_changes;
        "key-order": harm "each key is accepted in order through reconnects, kill -9 and moves of the owner (T36)" = key_shared::order_through_kills;
        "key-order": calm "a held key holds up no other key" = key_shared::held_keys_hold_up_no_other;
        "key-order": calm "a released message comes before the later ones of its key, which are revoked" = key_shared::followers_are_revoked;
        "handles": calm "settling twice succeeds once more; late, another's and made-up handles are refused" = handles::twice_late_or_anothers;
        "handles": calm "the same consumer name replaces its earlier stream" = handles::the_same_name_replaces;
        "handles": calm "a settle outside a stream works with the delivery's handle" = handles::unary_settles;
        "seek": calm "seek goes to an offset, a time, the earliest and the latest message" = positions::seek;
        "seek": harm "a seek survives kill -9 of the owner" = positions::seek_survives_a_kill;
        "pull": calm "pull leases messages, waits for some, and is settled by handle" = positions::pull;
        "peek": calm "peek shows messages and leaves no trace" = positions::peek;
        "reader": calm "a reader needs no subscription and leaves none" = positions::reader;
        "explain": calm "explain names every cause that holds messages up, and its counts add up" = explain::names_causes;
        "explain": calm "explain names the consumer that holds a key" = explain::names_the_holder_of_a_key;
        "dedup": calm "repeated, skipped and reordered sequences store nothing twice and lose nothing (T41)" = producers::sequences;
        "dedup": calm "without a name retries on one stream are still deduplicated" = producers::session_producers;
        "access": calm "exclusive producers keep others out, and fencing ends the ones that are there" = producers::access_modes;
        "conditional": calm "a batch with an expected offset is stored there or not at all" = producers::conditional_append;
        "redirect": calm "a stream that insists on the owner is told where it is" = producers::redirect;
        "exactly-once": harm "consume, transform, produce, killed a hundred times, leaves one output per input (TX8)" = exactly_once::one_output_per_input;
        "redelivery": calm "who leaves gives its messages back at once and uncounted; who breaks off may come back, and else failed" = streams::leaving_is_not_breaking;
        "heartbeat": calm "a client that promised signs of life and is frozen loses its streams, and nothing is lost" = streams::frozen_clients_lose_their_streams;
        "heartbeat": calm "a client that gives signs of life keeps its stream, and the server gives them too" = streams::living_ones_keep_them;
        "ttl": calm "a message older than the time to live counts as settled, and none earlier" = limits::ttl_expires;
        "backlog-quota": calm "reject: batches past the quota are refused until there is room" = limits::quota_rejects;
        "backlog-quota": calm "hold: a batch past the quota waits for room" = limits::quota_holds;
        "backlog-quota": calm "evict: the slowest subscription loses the oldest messages and no producer is refused" = limits::quota_evicts;
        "retention": harm "settled messages stay as long as the policy says, and their ledger goes then" = limits::retention_keeps_and_lets_go;
        "policies": calm "a tenant decides for its topics unless namespace or topic do, and says so" = limits::a_tenant_decides_for_its_topics;
        "rate-limit": calm "what is published too fast waits, in order, and is never lost" = limits::publish_rate;
        "rate-limit": calm "what would be delivered too fast waits, and explain says until when" = limits::deliver_rate;
        "counts": calm "producers, consumers, subscriptions and topics past their limits are refused, and room comes back" = limits::counts;
        "compaction": calm "a compacted reader gets the latest message of each key below the horizon, everything behind it, and no tombstone" = compaction::the_table_is_the_same;
        "compaction": harm "compaction goes on through kill -9 of the owner, and the table is the same" = compaction::survives_kills;
        "discovery": calm "topics of a namespace are pushed as they come and go; a name made again is another topic" = discovery::topics_are_pushed;
        "rest": calm "publish, pull and settle by plain HTTP; a repeat with a sequence is stored once" = rest::publish_pull_settle;
        "rest": calm "CloudEvents, alone and in batches, are messages, and come back as events" = rest::cloud_events;
        "bad-input": calm "names of every forbidden kind are refused by every call" = bad_input::names;
        "bad-input": calm "fields of subscriber calls that are out of range are refused, each with its reason" = bad_input::fields;
        "bad-input": calm "a message of exactly the limit is stored, one byte more is refused" = bad_input::sizes;
        "bad-input": calm "a consumer that never reads and one that never settles harm no other" = bad_input::idle_consumers;
    }
}

/// The row's own topic.
pub(crate) fn topic(name: &str) -> String {
    format!("public/default/{name}")
}

pub(crate) fn shared() -> SubscriptionSettings {
    settings(SubscriptionType::Shared)
}

pub(crate) fn key_shared() -> SubscriptionSettings {
    settings(SubscriptionType::KeyShared)
}

pub(crate) fn retry(
    mut settings: SubscriptionSettings,
    retry: RetryPolicy,
) -> SubscriptionSettings {
    settings.retry = Some(retry);
    settings
}

pub(crate) fn lease(mut settings: SubscriptionSettings, lease_ms: u64) -> SubscriptionSettings {
    settings.lease_ms = lease_ms;
    settings
}

/// Offsets of messages.
pub(crate) fn offsets(got: &[crate::consumer::Got]) -> Vec<u64> {
    got.iter().map(|got| got.offset).collect()
}
