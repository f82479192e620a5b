//! Consume, transform, publish: each input's outputs are stored exactly once (TX8).
//!
//! ```text
//! input segment 3: offset 41 -> f -> output 0, output 1      sequence = offset * 2^14 + index + 1, which rises
//!    outputs: named producer "<subscription>~<id of the input topic>~3", to segments that depend on the input only
//!    all stored -> accept up to 41                            a crash in between: 41 comes again, its outputs are known
//! ```
//! The guarantee: every accepted input has each of its outputs in the output topic once, whatever crashes, moves and
//! repeats in between. Its conditions:
//! - The subscription is exclusive or failover, and only processors with one output topic use it: an input that somebody
//!   released with a delay would come behind later ones, and its outputs would pass for stored.
//! - The function gives the same outputs for the same input, in the same order, at most [`OUTPUTS_MAX`].
//! - The layout of the output topic does not change meanwhile; an output's segment follows from its key, or from the key
//!   or place of its input.
//! - Two jobs with one input and one output topic have subscriptions of different names, or different
//!   [`ProcessorBuilder::producer_name`]s. Different inputs never meet: not even a topic that was deleted and created again.
//! - Readers of the output topic see an output as soon as it is stored, before its input is accepted.

use std::{collections::BTreeMap, future::Future, time::Duration};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesOrdered};
use geminga_proto::{
    key_hash::key_hash,
    names::{ConsumerName, ProducerName, SubscriptionName, TopicName},
    reason::{Reason, Retry},
    v1::{SubscriptionSettings, SubscriptionType},
};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::{
    backoff::Backoff,
    builder::Client,
    consumer::{Consumer, Received, Start},
    error::Error,
    message::{Message, MessageId, topic_name},
    producer::{Pending, Producer},
};

/// Most outputs of one input.
pub const OUTPUTS_MAX: usize = 1 << OUTPUT_BITS;
const OUTPUT_BITS: u32 = 14;
/// Inputs whose outputs are on their way; the producer's budget bounds their bytes.
const INPUTS_IN_FLIGHT_MAX: usize = 1_000;
/// Credit for inputs: what waits is processed by this instance, so it is not much.
const WINDOW: (u64, u64) = (2_000, 8 << 20);

/// The sequence of an output: rises with the input's offset, then with its index.
///
/// None beyond 2^47 messages a segment, or [`OUTPUTS_MAX`] outputs.
fn sequence(offset: u64, index: usize) -> Option<u64> {
    let fits = offset < 1 << (61 - OUTPUT_BITS) && index < OUTPUTS_MAX;
    fits.then(|| (offset << OUTPUT_BITS | index as u64) + 1)
}

/// The producer of the outputs of one input segment. The topic's id tells it from those of all other inputs that there ever
/// were: their offsets say nothing of this one's.
fn producer_name(prefix: &str, input: u64, segment: u32) -> String {
    format!("{prefix}~{input}~{segment}")
}

/// How often a run takes its place back from a consumer of its name: an open of an earlier run of this instance may reach
/// the server late. Another instance of the same name, which is a mistake, ends one of the two.
const REPLACED_MAX: u32 = 3;

/// What places an output: its own key, else its input's, else its input's place.
fn hash(output: &Message, input: &Received) -> u32 {
    match output.key.as_deref().or(input.key.as_deref()) {
        Some(key) => key_hash(key),
        None => key_hash(input.id.to_string().as_bytes()),
    }
}

/// Settings of a processor.
#[derive(Clone, Debug)]
pub struct ProcessorBuilder {
    client: Client,
    input: String,
    subscription: String,
    output: String,
    name: Option<String>,
    producer_name: Option<String>,
    create_at: Option<Start>,
    stop: CancellationToken,
}

/// What a processor did until it ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Processed {
    /// Inputs accepted, each with all its outputs stored.
    pub inputs: u64,
    /// Outputs stored, or found to be stored before.
    pub outputs: u64,
    /// Times that it began again after a break or a takeover by another instance.
    pub restarts: u64,
}

impl ProcessorBuilder {
    pub(crate) fn new(client: Client, input: String, subscription: String, output: String) -> Self {
        Self {
            client,
            input,
            subscription,
            output,
            name: None,
            producer_name: None,
            create_at: None,
            stop: CancellationToken::new(),
        }
    }

    /// A name for the consumer of this instance; by default a random one. Instances of a failover subscription share the
    /// input segments out by these names.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// What the named producers begin with, followed by `~`, the id of the input topic, `~` and the input segment. All
    /// instances of one job must agree on it, and no other job with these topics may have it. Default: the subscription.
    #[must_use]
    pub fn producer_name(mut self, name: impl Into<String>) -> Self {
        self.producer_name = Some(name.into());
        self
    }

    /// Creates the subscription here, failover, when it is missing.
    #[must_use]
    pub fn start(mut self, start: Start) -> Self {
        self.create_at = Some(start);
        self
    }

    /// Ends the run when it is cancelled: what is on its way is finished.
    #[must_use]
    pub fn stop(mut self, stop: CancellationToken) -> Self {
        self.stop = stop;
        self
    }

    /// Runs until it is stopped. `transform` gives the outputs of an input; it is called again for the same input after a
    /// break, a takeover or a crash, and must give the same ones then.
    ///
    /// Cancel-safe: dropped, inputs that were not accepted come again, and outputs that were stored are known.
    ///
    /// # Errors
    /// What `transform` gave: it ends the run, and the input comes again in the next one. A refusal: names, a missing
    /// topic, a subscription that is shared, more outputs than [`OUTPUTS_MAX`].
    pub async fn run<F, R>(self, mut transform: F) -> Result<Processed, Error>
    where
        F: FnMut(Received) -> R,
        R: Future<Output = Result<Vec<Message>, Error>>,
    {
        let input = topic_name(&self.input)?;
        let output = topic_name(&self.output)?;
        let subscription = SubscriptionName::parse(&self.subscription)?;
        let prefix = self.producer_name.clone().unwrap_or_else(|| subscription.to_string());
        ProducerName::parse(&producer_name(&prefix, u64::MAX, u32::MAX))?;
        let random = self.client.random();
        let name = match &self.name {
            Some(name) => ConsumerName::parse(name)?,
            None => ConsumerName::parse(&format!("processor-{:016x}", random.u64()))?,
        };
        let mut backoff = Backoff::new(random);
        let (mut done, mut replaced) = (Processed::default(), 0);
        loop {
            let mut run = Run {
                builder: &self,
                output: &output,
                prefix: &prefix,
                input_id: 0,
                producers: BTreeMap::new(),
                last: BTreeMap::new(),
                done: &mut done,
            };
            let before = run.done.inputs;
            let error = match run.begin(&input, &subscription, &name).await {
                Ok(consumer) => match run.process(consumer, &mut transform).await {
                    Ok(()) => return Ok(done),
                    Err(End::ByTransform(error)) => return Err(error),
                    Err(End::Broken(error)) => error,
                },
                Err(error) => error,
            };
            let is_replaced = error.reason() == Some(Reason::ConsumerReplaced);
            replaced += u32::from(is_replaced);
            if !(begins_again(&error) || is_replaced && replaced <= REPLACED_MAX) {
                return Err(error);
            }
            if done.inputs > before {
                backoff.reset();
            }
            done.restarts += 1;
            tracing::debug!(topic = %input, %subscription, %error, "processor begins again");
            tokio::select! {
                biased;
                () = self.stop.cancelled() => return Ok(done),
                () = sleep(backoff.pause(error.retry_after())) => {}
            }
        }
    }
}

/// After a break, a takeover, or an input that came out of its order, everything is read again from what is accepted.
fn begins_again(error: &Error) -> bool {
    match error {
        Error::NotHeld(_) | Error::Indeterminate(_) => true,
        _ => {
            matches!(error.reason(), Some(Reason::ProducerFenced)) || error.retry() != Retry::Never
        }
    }
}

enum End {
    Broken(Error),
    ByTransform(Error),
}

impl From<Error> for End {
    fn from(error: Error) -> Self {
        Self::Broken(error)
    }
}

/// One life of a processor: a consumer, and the producers of the segments it got something from.
struct Run<'a> {
    builder: &'a ProcessorBuilder,
    output: &'a TopicName,
    prefix: &'a str,
    /// The topic that it reads, which may not be the only one that ever had its name.
    input_id: u64,
    producers: BTreeMap<u32, Producer>,
    /// The last input of each segment.
    last: BTreeMap<u32, u64>,
    done: &'a mut Processed,
}

impl Run<'_> {
    async fn begin(
        &mut self,
        input: &TopicName,
        subscription: &SubscriptionName,
        name: &ConsumerName,
    ) -> Result<Consumer, Error> {
        let missing = |error: &Error| {
            let reason = error.reason();
            matches!(reason, Some(Reason::SubscriptionNotFound | Reason::TopicNotFound))
        };
        let consumer = || {
            let client = &self.builder.client;
            let consumer = client.consumer(input.to_string(), subscription.to_string());
            consumer.name(name.to_string()).window(WINDOW.0, WINDOW.1)
        };
        let opened = match (consumer().build().await, self.builder.create_at) {
            (Err(error), Some(start)) if missing(&error) => {
                let r#type = SubscriptionType::Failover.into();
                let settings = SubscriptionSettings { r#type, ..Default::default() };
                consumer().create_topic(true).start(start).settings(settings).build().await?
            }
            (opened, _) => opened?,
        };
        self.input_id = opened.topic_id();
        let kind = opened.settings().r#type();
        if matches!(kind, SubscriptionType::Shared | SubscriptionType::KeyShared) {
            let words = "exactly once needs inputs in their order: an exclusive or failover subscription (TX8)";
            return Err(Error::refused(Reason::InvalidRequest, words));
        }
        Ok(opened)
    }

    async fn process<F, R>(&mut self, mut consumer: Consumer, transform: &mut F) -> Result<(), End>
    where
        F: FnMut(Received) -> R,
        R: Future<Output = Result<Vec<Message>, Error>>,
    {
        let mut in_flight: FuturesOrdered<BoxFuture<'static, Stored>> = FuturesOrdered::new();
        let stop = self.builder.stop.clone();
        let ended = loop {
            let room = in_flight.len() < INPUTS_IN_FLIGHT_MAX;
            tokio::select! {
                biased;
                Some(stored) = in_flight.next(), if !in_flight.is_empty() => {
                    match stored {
                        Ok((id, outputs)) => self.accept(&consumer, id, outputs),
                        Err(error) => {
                            // Nothing behind it is accepted: that would accept this one too.
                            in_flight = FuturesOrdered::new();
                            break Err(End::Broken(error));
                        }
                    }
                }
                () = stop.cancelled() => break Ok(()),
                input = consumer.next(), if room => match input {
                    None => break Ok(()),
                    Some(Err(error)) => break Err(End::Broken(error)),
                    Some(Ok(_)) if consumer.topic_id() != self.input_id => {
                        let words = "the input topic was deleted and created again";
                        break Err(End::Broken(Error::Indeterminate(words.into())));
                    }
                    Some(Ok(input)) => {
                        let pending = match self.outputs(&input, transform).await {
                            Ok(pending) => pending,
                            Err(end) => break Err(end),
                        };
                        in_flight.push_back(all_stored(input.id, pending).boxed());
                    }
                },
            }
        };
        // What was sent is finished: its inputs need not come again.
        let finished = loop {
            match in_flight.next().await {
                Some(Ok((id, outputs))) => self.accept(&consumer, id, outputs),
                Some(Err(error)) => break Err(End::Broken(error)),
                None => break Ok(()),
            }
        };
        let closed = consumer.close().await;
        ended?;
        finished?;
        Ok(closed?)
    }

    /// Asked for at once; an accept that fails makes the input come again, and its outputs are known then.
    fn accept(&mut self, consumer: &Consumer, id: MessageId, outputs: u64) {
        drop(consumer.accept_up_to(id)); // close() waits for its confirmation
        self.done.inputs += 1;
        self.done.outputs += outputs;
    }

    /// Sends the outputs of one input.
    async fn outputs<F, R>(
        &mut self,
        input: &Received,
        transform: &mut F,
    ) -> Result<Vec<Pending>, End>
    where
        F: FnMut(Received) -> R,
        R: Future<Output = Result<Vec<Message>, Error>>,
    {
        let id = input.id;
        if self.last.insert(id.segment, id.offset).is_some_and(|last| id.offset <= last) {
            let words = format!("{id} came again: read from what is accepted");
            return Err(End::Broken(Error::Indeterminate(words)));
        }
        let outputs = transform(input.clone()).await.map_err(End::ByTransform)?;
        let mut pending = Vec::with_capacity(outputs.len());
        for (index, output) in outputs.into_iter().enumerate() {
            let Some(sequence) = sequence(id.offset, index) else {
                let words = format!("{id} has more than {OUTPUTS_MAX} outputs");
                return Err(End::ByTransform(Error::refused(Reason::InvalidRequest, words)));
            };
            let hash = hash(&output, input);
            let producer = self.producer(id.segment).await?;
            pending.push(producer.send_at(output, sequence, hash).await?);
        }
        Ok(pending)
    }

    async fn producer(&mut self, segment: u32) -> Result<&Producer, Error> {
        if !self.producers.contains_key(&segment) {
            let name = producer_name(self.prefix, self.input_id, segment);
            let builder = self.builder.client.producer(self.output.to_string()).name(name);
            let producer = builder.message_timeout(Duration::from_secs(60)).build().await?;
            self.producers.insert(segment, producer);
        }
        Ok(&self.producers[&segment])
    }
}

/// An input whose outputs are stored, and how many they are.
type Stored = Result<(MessageId, u64), Error>;

async fn all_stored(id: MessageId, pending: Vec<Pending>) -> Stored {
    let outputs = pending.len() as u64;
    for pending in pending {
        pending.await?;
    }
    Ok((id, outputs))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sequences_rise_with_the_input_and_then_with_the_output(
            a in (0u64..1 << 47, 0usize..OUTPUTS_MAX),
            b in (0u64..1 << 47, 0usize..OUTPUTS_MAX),
        ) {
            let (of_a, of_b) = (sequence(a.0, a.1).expect("fits"), sequence(b.0, b.1).expect("fits"));
            prop_assert_eq!(a.cmp(&b), of_a.cmp(&of_b));
            prop_assert!((1..1 << 62).contains(&of_a));
        }
    }

    #[test]
    fn what_does_not_fit_has_no_sequence() {
        assert_eq!(sequence(0, OUTPUTS_MAX), None);
        assert_eq!(sequence(u64::MAX, 0), None);
        assert_eq!(sequence(1 << 47, 0), None);
    }
}
