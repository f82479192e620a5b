//! `geminga cluster check`: messages through the server and back, as proof that it works end to end.
//!
//! ```text
//! connect ─► topic ─► subscription ─► publish ─► consume ─► accept ─► clean up (always, once a subscription was asked for)
//! ```
//! Several checks may run at once on one topic: each has a subscription of its own and looks at its own messages only.

mod judge;

use std::{collections::BTreeMap, future::Future, time::Duration};

use futures::StreamExt;
use geminga_client::{
    Client, Consumer, Error, Message, Reason, Received, Retry, Start, SubscriptionName, TopicName,
    topic_name,
};
use geminga_proto::v1::Policies;
use geminga_runtime::{random::Random, units::Period};
use serde_json::{Value, json};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep, timeout, timeout_at},
};

use self::judge::{Judge, Place};
use super::{
    Global,
    exit::{Code, Failure},
    output::{self, Format},
};

/// The topic of checks that are not told another one.
const TOPIC: &str = "geminga-check";
/// Carries run and number of a message.
const HEADER: &str = "geminga-check";
/// On the check's own topic: what a run that was killed left to its subscription is settled after this.
const TTL_MS: u64 = 3_600_000;
/// On the check's own topic: settled messages are kept no longer.
const RETENTION_MS: u64 = 60_000;
/// One attempt to open something or to ask something.
const ATTEMPT: Duration = Duration::from_secs(10);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(250);
/// How often a step that takes long says so.
const WORD_EVERY: Duration = Duration::from_secs(5);
/// What cleaning up may take, beyond the timeout.
const CLEAN_UP: Duration = Duration::from_secs(10);

const AFTER_HELP: &str = "\
Exit codes: 0 every message came back once and unchanged, 5 not within the timeout, 6 a message was lost, changed or
repeated, 3 and 4 the topic is missing or the server refused";

#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct CheckArgs {
    /// An existing topic to publish to; whoever else consumes it gets these messages too. Default: a topic for checks,
    /// public/default/geminga-check, created if it is missing, whose messages go within the hour.
    #[arg(long)]
    topic: Option<String>,
    /// How many messages go through.
    #[arg(long, default_value_t = 10, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    messages: u32,
    /// How long all of it may take. A cluster that is still starting is asked again until then.
    #[arg(long, default_value = "1m", value_name = "TIME")]
    timeout: Period,
}

pub(crate) async fn run(args: CheckArgs, global: &Global) -> Result<(), Failure> {
    let check = Check::new(&args, global)?;
    let mut steps = Steps::default();
    let mut used = None;
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let outcome = tokio::select! {
        outcome = Box::pin(check.all(&mut steps, &mut used)) => outcome,
        _ = terminate.recv() => Err(interrupted()),
        _ = interrupt.recv() => Err(interrupted()),
    };
    if let Some(client) = used {
        check.clean_up(&client, &mut steps).await;
    }
    report(&check, &steps, outcome.is_ok(), global.output)?;
    outcome?;
    output::note(&format!(
        "healthy: {} messages were published, consumed and accepted, each once",
        check.messages
    ));
    Ok(())
}

fn interrupted() -> Failure {
    Failure::new(Code::Failed, "the check was interrupted", "geminga cluster check")
}

/// What a run does.
struct Check {
    server: String,
    topic: TopicName,
    /// The topic is ours: it may be created, and its messages go by themselves.
    own_topic: bool,
    subscription: SubscriptionName,
    run: String,
    messages: u32,
    timeout: Duration,
    deadline: Instant,
}

impl Check {
    fn new(args: &CheckArgs, global: &Global) -> Result<Self, Failure> {
        let run = format!("{:016x}", Random::from_os().u64());
        let timeout = args.timeout.0;
        let topic = topic_name(args.topic.as_deref().unwrap_or(TOPIC))
            .map_err(|error| Failure::usage(format!("--topic: {error}"), "cluster check"))?;
        Ok(Self {
            server: global.server()?,
            topic,
            own_topic: args.topic.is_none(),
            subscription: SubscriptionName::parse(&format!("check-{run}"))?,
            run,
            messages: args.messages,
            timeout,
            deadline: Instant::now() + timeout,
        })
    }

    /// Every step up to the last accept. `used` is set once there is something to clean up.
    async fn all(&self, steps: &mut Steps, used: &mut Option<Client>) -> Result<(), Failure> {
        let client = steps.take("connect", self.connect()).await?;
        steps.take("topic", self.topic(&client)).await?;
        *used = Some(client.clone());
        steps.take("subscription", self.subscribe(&client)).await?;
        let mut judge = steps.take("publish", self.publish(&client)).await?;
        let (consumer, last) = steps.take("consume", self.consume(&client, &mut judge)).await?;
        steps.take("accept", self.accept(&client, consumer, last)).await
    }

    async fn connect(&self) -> Done<Client> {
        let attempt = ATTEMPT.min(self.timeout);
        let client = Client::builder().server(&self.server).open_timeout(attempt).build().await?;
        let admin = client.admin();
        let cluster = self
            .again(async || admin.cluster().await)
            .await
            .map_err(|failure| next(failure, "geminga cluster wait"))?;
        let what = format!(
            "{}: {} brokers, {} writable bookies",
            self.server, cluster.brokers, cluster.bookies_writable
        );
        Ok((client, what))
    }

    async fn topic(&self, client: &Client) -> Done<()> {
        let admin = client.admin();
        let found = self.again(async || admin.topic(&self.topic).await).await;
        let (found, created) = match found {
            Err(failure) if self.own_topic && failure.code == Code::NotFound => {
                // Created twice at once is no error.
                (self.again(async || admin.create_topic(&self.topic, 1).await).await?, true)
            }
            found => (found?, false),
        };
        if self.own_topic {
            self.limit(client).await?;
        }
        let segments = found.layout.map_or(0, |layout| layout.segments.len());
        let how = if created { "created" } else { "found" };
        Ok(((), format!("{} {how}, segments: {segments}", self.topic)))
    }

    /// What checks publish goes by itself.
    async fn limit(&self, client: &Client) -> Result<(), Failure> {
        let (admin, scope) = (client.admin(), self.topic.to_string());
        let known = self.again(async || admin.policies(&scope).await).await?;
        if known.own.is_some_and(|own| own.ttl_ms.is_some() && own.retention_ms.is_some()) {
            return Ok(());
        }
        let policies = Policies {
            ttl_ms: Some(TTL_MS),
            retention_ms: Some(RETENTION_MS),
            ..Policies::default()
        };
        self.again(async || admin.set_policies(&scope, policies, Vec::new()).await).await.map(drop)
    }

    async fn subscribe(&self, client: &Client) -> Done<()> {
        let admin = client.admin();
        let (topic, name) = (&self.topic, &self.subscription);
        self.again(async || admin.create_subscription(topic, name, Start::Latest).await).await?;
        Ok(((), name.to_string()))
    }

    async fn publish(&self, client: &Client) -> Done<Judge> {
        let topic = self.topic.to_string();
        let left = || self.deadline.saturating_duration_since(Instant::now());
        let producer = self
            .again(async || client.producer(&topic).message_timeout(left()).build().await)
            .await?;
        let mut judge = Judge::default();
        let mut waiting = Vec::new();
        let sent = async {
            for number in 0..self.messages {
                let message = Message::new(self.value(number))
                    .with_header(HEADER, format!("{}/{number}", self.run));
                waiting.push(producer.send(message).await?);
            }
            for pending in waiting {
                let receipt = pending.await?;
                judge.sent(receipt.id.map(|id| (receipt.segment, id.offset)));
            }
            producer.close().await?;
            Ok::<_, Failure>(())
        };
        self.in_time(sent).await?.map_err(|failure| next(failure, "geminga bookie ls"))?;
        // Up to here whatever was stored must be handed out: also a message that was stored twice.
        let admin = client.admin();
        let stored = self.again(async || admin.topic(&self.topic).await).await?;
        judge.ends_at(stored.segments.iter().map(|state| (state.segment, state.next_offset)));
        Ok((judge, format!("{} messages, each with its receipt", self.messages)))
    }

    async fn consume(
        &self,
        client: &Client,
        judge: &mut Judge,
    ) -> Done<(Consumer, BTreeMap<u32, Received>)> {
        let (topic, name) = (self.topic.to_string(), self.subscription.to_string());
        let mut consumer =
            self.again(async || client.consumer(&topic, &name).build().await).await?;
        let mut last = BTreeMap::new();
        while !judge.is_complete() {
            let Ok(item) = timeout_at(self.deadline, consumer.next()).await else { break };
            let Some(received) = item.transpose()? else { break };
            let place: Place = (received.id.segment, received.id.offset);
            judge.handed_out(place);
            let mark = received.headers.get(HEADER).and_then(|mark| mark.split_once('/'));
            if let Some((run, number)) = mark
                && run == self.run
            {
                let number = number.parse().unwrap_or(u32::MAX);
                judge.seen(number, place, received.value == self.value(number));
            }
            last.insert(place.0, received);
        }
        let verdict = judge.verdict();
        let peek = format!("geminga topic peek {topic} --from latest");
        if verdict.is_wrong() {
            return Err(Failure::new(Code::ProofFailed, verdict.to_string(), peek));
        }
        if verdict.missing > 0 {
            let words = format!("{verdict} within {}", Period(self.timeout));
            return Err(Failure::new(Code::Unavailable, words, peek));
        }
        Ok(((consumer, last), format!("{} messages, each once and unchanged", self.messages)))
    }

    /// Accepts what was consumed, and looks whether the server's cursor stands behind it.
    async fn accept(
        &self,
        client: &Client,
        consumer: Consumer,
        last: BTreeMap<u32, Received>,
    ) -> Done<()> {
        let accepted = async {
            for received in last.values() {
                received.accept_up_to().await?;
            }
            consumer.close().await?;
            Ok::<_, Failure>(())
        };
        let bookies = "geminga bookie ls";
        self.in_time(accepted).await?.map_err(|failure| next(failure, bookies))?;
        let (admin, name) = (client.admin(), &self.subscription);
        let stands = self.again(async || admin.subscription(&self.topic, name).await).await?;
        for (segment, received) in &last {
            let cursor = stands.cursors.iter().find(|cursor| cursor.segment == *segment);
            let next = cursor.map_or(0, |cursor| cursor.mark_delete_next);
            if next <= received.id.offset {
                let words = format!(
                    "segment {segment} was accepted up to offset {}, but its cursor stands at {next}",
                    received.id.offset
                );
                return Err(Failure::new(Code::ProofFailed, words, bookies));
            }
        }
        Ok(((), "durable on the server".into()))
    }

    /// Deletes the subscription. One that stays is told, and is no reason to call the cluster unhealthy.
    async fn clean_up(&self, client: &Client, steps: &mut Steps) {
        let (topic, name) = (&self.topic, &self.subscription);
        let admin = client.admin();
        let deleted = async {
            match admin.delete_subscription(topic, name).await {
                Ok(()) => Ok(((), format!("{name} deleted"))),
                Err(error) if error.reason() == Some(Reason::SubscriptionNotFound) => {
                    Ok(((), "nothing to delete".into()))
                }
                Err(error) => Err(Failure::from(error)),
            }
        };
        let deleted = timeout(CLEAN_UP, steps.take("clean up", deleted)).await;
        if !matches!(deleted, Ok(Ok(()))) {
            output::note(&format!(
                "the subscription stays; delete it: geminga sub delete {topic} {name}"
            ));
        }
    }

    fn value(&self, number: u32) -> String {
        format!("message {number} of check {}", self.run)
    }

    /// Asks until there is an answer that another attempt would not change, or the time is over.
    async fn again<T>(&self, ask: impl AsyncFn() -> Result<T, Error>) -> Result<T, Failure> {
        let mut told = String::new();
        loop {
            let error = match timeout_at(self.deadline, ask()).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) if error.retry() == Retry::Never => return Err(error.into()),
                Ok(Err(error)) => error,
                Err(_) => return Err(self.late(&told)),
            };
            let words = error.to_string();
            if Instant::now() + PAUSE >= self.deadline {
                return Err(self.late(&words));
            }
            if words != told {
                output::note(&format!("not yet, asking again: {words}"));
                told = words;
            }
            sleep(PAUSE).await;
        }
    }

    async fn in_time<T>(&self, work: impl Future<Output = T>) -> Result<T, Failure> {
        timeout_at(self.deadline, work).await.map_err(|_| self.late(""))
    }

    fn late(&self, last: &str) -> Failure {
        let mut words = format!("not done within {}", Period(self.timeout));
        if !last.is_empty() {
            words = format!("{words}: {last}");
        }
        Failure::new(Code::Unavailable, words, "geminga cluster status")
    }
}

fn next(mut failure: Failure, next: &str) -> Failure {
    failure.next = next.to_owned();
    failure
}

/// What a step gives, and what it did in words.
type Done<T> = Result<(T, String), Failure>;

/// The steps so far.
#[derive(Default)]
struct Steps(Vec<Step>);

struct Step {
    name: &'static str,
    took: Duration,
    outcome: Result<String, String>,
}

impl Steps {
    /// Takes a step: its time and its outcome are kept, its failure is named after it.
    async fn take<T>(
        &mut self,
        name: &'static str,
        step: impl Future<Output = Done<T>>,
    ) -> Result<T, Failure> {
        let begun = Instant::now();
        let mut step = std::pin::pin!(step);
        let done = loop {
            match timeout(WORD_EVERY, &mut step).await {
                Ok(done) => break done,
                Err(_) => output::note(&format!("{name}: {} s so far", begun.elapsed().as_secs())),
            }
        };
        let (value, outcome) = match done {
            Ok((value, what)) => (Ok(value), Ok(what)),
            Err(mut failure) => {
                let words = failure.message.clone();
                failure.message = format!("{name}: {words}");
                (Err(failure), Err(words))
            }
        };
        self.0.push(Step { name, took: begun.elapsed(), outcome });
        value
    }
}

fn report(check: &Check, steps: &Steps, healthy: bool, format: Format) -> Result<(), Failure> {
    if format == Format::Table {
        let row = |step: &Step| {
            let result = match &step.outcome {
                Ok(what) => what.clone(),
                Err(_) => "failed".to_owned(),
            };
            json!({"step": step.name, "took": shown(step.took), "result": result})
        };
        let rows: Vec<Value> = steps.0.iter().map(row).collect();
        return Ok(output::list(format, &["step", "took", "result"], &rows)?);
    }
    let row = |step: &Step| {
        let mut row = json!({"step": step.name, "took_ms": millis(step.took)});
        match &step.outcome {
            Ok(what) => row["result"] = json!(what),
            Err(why) => row["error"] = json!(why),
        }
        row
    };
    let took = steps.0.iter().map(|step| step.took).sum();
    let document = json!({
        "healthy": healthy,
        "server": check.server,
        "topic": check.topic.to_string(),
        "subscription": check.subscription.to_string(),
        "messages": check.messages,
        "took_ms": millis(took),
        "steps": steps.0.iter().map(row).collect::<Vec<Value>>(),
    });
    Ok(output::document(format, &document)?)
}

/// With a tenth of a millisecond.
fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 10_000.0).round() / 10.0
}

fn shown(time: Duration) -> String {
    format!("{:.1} ms", millis(time))
}
