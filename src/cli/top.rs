//! `geminga top`: what goes in and out of topics and subscriptions, again and again.

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal, Write},
};

use geminga_client::{Admin, Error, TopicName, namespace_name, topic_name};
use geminga_proto::admin::v1::{Subscription, Topic};
use geminga_runtime::units::Period;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::{
    Global,
    exit::{Code, Failure},
    output::{self, Format},
    sub,
};

/// Topics of a namespace that are shown; the others can be named.
const TOPICS_MAX: usize = 1_000;

#[derive(Debug, clap::Args)]
pub(crate) struct TopArgs {
    /// Only these topics. Default: all of the namespace.
    topics: Vec<String>,
    #[arg(long, default_value = "public/default")]
    namespace: String,
    /// The time between two looks; rates are taken over it.
    #[arg(long, default_value = "2s", value_name = "TIME")]
    interval: Period,
    /// Look twice, print once, and stop.
    #[arg(long)]
    once: bool,
}

/// What is counted of a topic or a subscription.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    /// Published, or settled.
    messages: u64,
    backlog: u64,
}

/// One look: rows in order, and the counts that rates are taken of.
struct Look {
    at: Instant,
    counts: BTreeMap<(String, String), Counts>,
    topics: Vec<(Topic, Vec<Subscription>)>,
}

pub(crate) async fn run(args: TopArgs, global: &Global) -> Result<(), Failure> {
    if args.interval.0.is_zero() {
        return Err(Failure::usage("the interval is zero", "top"));
    }
    if !args.once && global.output == Format::Yaml {
        return Err(Failure::usage("-o yaml needs --once", "top"));
    }
    let admin = global.client().await?.admin();
    let names: Vec<TopicName> =
        args.topics.iter().map(|name| topic_name(name)).collect::<Result<_, _>>()?;
    let mut before = look(&admin, &names, &args.namespace).await?;
    loop {
        tokio::select! {
            biased;
            _ = tokio::signal::ctrl_c() => return Ok(()),
            () = sleep(args.interval.0) => {}
        }
        let now = look(&admin, &names, &args.namespace).await?;
        let rows = rows(&before, &now);
        if args.once {
            return print(global.output, &rows);
        }
        match global.output {
            Format::Table => {
                let mut out = io::stdout().lock();
                if out.is_terminal() {
                    out.write_all(b"\x1b[H\x1b[2J")?; // from the top, on an empty screen
                }
                drop(out);
                print(Format::Table, &rows)?;
            }
            format => {
                let mut out = io::stdout().lock();
                for row in &rows {
                    output::element(format, row, &mut out)?;
                }
                out.flush()?;
            }
        }
        before = now;
    }
}

fn print(format: Format, rows: &[Value]) -> Result<(), Failure> {
    let columns = [
        "topic",
        "subscription",
        "type",
        "rate",
        "backlog",
        "consumers",
        "messages",
        "stored_bytes",
    ];
    Ok(output::list(format, &columns, rows)?)
}

async fn look(admin: &Admin, names: &[TopicName], namespace: &str) -> Result<Look, Failure> {
    let names = if names.is_empty() {
        let listed = admin.topics(&namespace_name(namespace)?).await?;
        if listed.len() > TOPICS_MAX {
            let words = format!("{namespace} has {} topics: name those to watch", listed.len());
            return Err(Failure::new(Code::Usage, words, "geminga topic ls"));
        }
        listed.iter().map(|topic| topic_name(&topic.name)).collect::<Result<_, _>>()?
    } else {
        names.to_vec()
    };
    let mut look = Look { at: Instant::now(), counts: BTreeMap::new(), topics: Vec::new() };
    for name in names {
        let topic = match admin.topic(&name).await {
            Ok(topic) => topic,
            Err(error) if is_gone(&error) => continue,
            Err(error) => return Err(error.into()),
        };
        let mut subs = Vec::new();
        for sub in admin.subscriptions(&name).await? {
            let sub_name = geminga_client::SubscriptionName::parse(&sub.name)?;
            match admin.subscription(&name, &sub_name).await {
                Ok(sub) => subs.push(sub),
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let published: u64 = topic.segments.iter().map(|state| state.next_offset).sum();
        let key = (topic.name.clone(), String::new());
        look.counts.insert(key, Counts { messages: published, backlog: 0 });
        for sub in &subs {
            let backlog: u64 = sub.cursors.iter().map(|cursor| cursor.backlog_messages).sum();
            let counts = Counts { messages: published.saturating_sub(backlog), backlog };
            look.counts.insert((topic.name.clone(), sub.name.clone()), counts);
        }
        look.topics.push((topic, subs));
    }
    Ok(look)
}

/// Deleted between two questions.
fn is_gone(error: &Error) -> bool {
    use geminga_client::Reason;
    matches!(error.reason(), Some(Reason::TopicNotFound | Reason::SubscriptionNotFound))
}

fn rows(before: &Look, now: &Look) -> Vec<Value> {
    let seconds = now.at.duration_since(before.at).as_secs_f64().max(0.001);
    let rate = |topic: &str, sub: &str| {
        let key = (topic.to_owned(), sub.to_owned());
        let (old, new) = (before.counts.get(&key), now.counts.get(&key));
        let (Some(old), Some(new)) = (old, new) else { return 0.0 };
        let rate = new.messages.saturating_sub(old.messages) as f64 / seconds;
        (rate * 10.0).round() / 10.0
    };
    let mut rows = Vec::new();
    for (topic, subs) in &now.topics {
        let kept: u64 = topic
            .segments
            .iter()
            .map(|state| state.next_offset.saturating_sub(state.first_offset))
            .sum();
        rows.push(json!({
            "topic": topic.name,
            "rate": rate(&topic.name, ""),
            "messages": kept,
            "stored_bytes": topic.segments.iter().map(|state| state.stored_bytes).sum::<u64>(),
        }));
        for found in subs {
            let key = (topic.name.clone(), found.name.clone());
            let backlog = now.counts.get(&key).copied().unwrap_or_default().backlog;
            let consumers: u64 = found
                .cursors
                .iter()
                .map(|cursor| u64::from(cursor.consumers.max(u32::from(cursor.consumer.is_some()))))
                .max()
                .unwrap_or_default();
            let kind = found.settings.clone().unwrap_or_default().r#type();
            rows.push(json!({
                "topic": topic.name,
                "subscription": found.name,
                "type": sub::kind(kind),
                "rate": rate(&topic.name, &found.name),
                "backlog": backlog,
                "consumers": consumers,
            }));
        }
    }
    rows
}
