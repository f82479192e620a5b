//! `geminga sub explain`: what holds messages up.

use geminga_proto::v1::{HeldBy, SegmentExplained};
use serde_json::{Value, json};

use super::{Failure, Global, output};

pub(super) fn print(segments: &[SegmentExplained], global: &Global) -> Result<(), Failure> {
    if global.output != output::Format::Table {
        let all: Vec<Value> = segments.iter().map(explained).collect();
        return Ok(output::document(global.output, &all)?);
    }
    let held = |segment: &SegmentExplained| {
        let rows = segment.held.iter().map(|held| {
            json!({
                "segment": segment.segment,
                "held_by": held_by(held.by()),
                "messages": held.messages,
                "first_offset": held.first_offset,
                "consumer": held.consumer,
                "until": output::time_or_none(held.until_ms),
            })
        });
        rows.collect::<Vec<Value>>()
    };
    let rows: Vec<Value> = segments.iter().flat_map(held).collect();
    let columns = ["segment", "held_by", "messages", "first_offset", "consumer", "until"];
    output::list(global.output, &columns, &rows)?;
    for segment in segments {
        let backlog: u64 = segment.held.iter().map(|held| held.messages).sum();
        let words = match segment.summary.as_str() {
            "" if backlog == 0 => "everything is settled",
            "" => "nothing stands in the way",
            summary => summary,
        };
        let connected = segment.consumers.iter().filter(|consumer| consumer.connected).count();
        let broker =
            if segment.broker.is_empty() { "nobody (it is moving)" } else { &segment.broker };
        output::note(&format!(
            "segment {}: {words}; backlog {backlog}, {connected} consumers connected, served by {broker}",
            segment.segment
        ));
    }
    Ok(())
}

fn explained(segment: &SegmentExplained) -> Value {
    let held: Vec<Value> = segment
        .held
        .iter()
        .map(|held| {
            json!({
                "by": held_by(held.by()),
                "messages": held.messages,
                "first_offset": held.first_offset,
                "consumer": held.consumer,
                "until": output::time_or_none(held.until_ms),
            })
        })
        .collect();
    let consumers: Vec<Value> = segment
        .consumers
        .iter()
        .map(|consumer| {
            json!({
                "name": consumer.name,
                "active": consumer.active,
                "connected": consumer.connected,
                "credit_messages": consumer.credit_messages,
                "credit_bytes": consumer.credit_bytes,
                "held_messages": consumer.held_messages,
            })
        })
        .collect();
    json!({
        "segment": segment.segment,
        "broker": segment.broker,
        "first_offset": segment.first_offset,
        "mark_delete_next": segment.mark_delete_next,
        "next_offset": segment.next_offset,
        "summary": segment.summary,
        "held": held,
        "consumers": consumers,
    })
}

/// `HELD_BY_NO_CREDIT` is `no credit`.
fn held_by(by: HeldBy) -> String {
    by.as_str_name().trim_start_matches("HELD_BY_").to_lowercase().replace('_', " ")
}
