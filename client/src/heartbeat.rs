//! Signs of life on a stream, both ways. Pure: the time comes in.
//!
//! With a heartbeat both sides promise a frame at least every interval, and each ends the stream after three without one.
//! Ours goes a little early. Without a heartbeat nothing is promised; a server that says nothing is asked for a word, and
//! given up when it does not answer.

use std::time::Duration;

use tokio::time::Instant;

/// The shortest interval that servers accept.
const INTERVAL_MIN: Duration = Duration::from_secs(1);
/// The longest one: what the frame can say is more than anybody means.
const INTERVAL_MAX: Duration = Duration::from_secs(24 * 3600);
/// Without a heartbeat: silence after which the server is asked, and after which it is given up.
const ASK_AFTER: Duration = Duration::from_secs(15);

/// How often both sides of a client's streams give a sign of life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Interval(Option<Duration>);

impl Default for Interval {
    fn default() -> Self {
        Self(Some(Duration::from_secs(10)))
    }
}

impl Interval {
    /// Zero is none; any other time is held between a second and a day.
    pub(crate) fn new(interval: Duration) -> Self {
        Self((!interval.is_zero()).then(|| interval.clamp(INTERVAL_MIN, INTERVAL_MAX)))
    }

    /// As the open frame says it: milliseconds, 0 for none.
    pub(crate) fn on_the_wire(self) -> u32 {
        self.0.map_or(0, |interval| u32::try_from(interval.as_millis()).unwrap_or(u32::MAX))
    }
}

/// When one open stream heard and said something last.
#[derive(Debug)]
pub(crate) struct Heartbeat {
    interval: Interval,
    heard_at: Instant,
    said_at: Instant,
    /// The first ping since something was heard.
    asked_at: Option<Instant>,
}

/// What silence asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    Nothing,
    /// A ping.
    Ping,
    /// The server is silent though it was asked: the stream is over.
    GiveUp,
}

impl Heartbeat {
    /// Of a stream that was opened now.
    pub(crate) fn new(interval: Interval, now: Instant) -> Self {
        Self { interval, heard_at: now, said_at: now, asked_at: None }
    }

    /// Any frame of the server.
    pub(crate) fn on_heard(&mut self, now: Instant) {
        self.heard_at = now;
        self.asked_at = None;
    }

    /// Any frame of ours.
    pub(crate) fn on_said(&mut self, now: Instant) {
        self.said_at = now;
    }

    /// A ping of ours, whether or not the connection took it: one that takes nothing will not be heard from either.
    pub(crate) fn on_pinged(&mut self, now: Instant) {
        self.said_at = now;
        self.asked_at.get_or_insert(now);
    }

    /// When our next ping is due.
    fn ping_at(&self) -> Instant {
        match (self.interval.0, self.asked_at) {
            (Some(interval), Some(_)) => self.said_at + interval * 3 / 4,
            // One that says much and hears nothing asks all the same.
            (Some(interval), None) => {
                (self.said_at + interval * 3 / 4).min(self.heard_at + interval)
            }
            (None, None) => self.heard_at + ASK_AFTER,
            (None, Some(_)) => self.give_up_at().unwrap_or(self.heard_at + 2 * ASK_AFTER),
        }
    }

    /// When the server is given up unless it is heard. Not before it was asked: a process that was stopped for a while has
    /// perhaps not yet looked at what came.
    fn give_up_at(&self) -> Option<Instant> {
        let asked_at = self.asked_at?;
        Some(match self.interval.0 {
            Some(interval) => (self.heard_at + 3 * interval).max(asked_at + interval),
            None => (self.heard_at + 2 * ASK_AFTER).max(asked_at),
        })
    }

    pub(crate) fn due(&self, now: Instant) -> Due {
        if self.give_up_at().is_some_and(|at| now >= at) {
            Due::GiveUp
        } else if now >= self.ping_at() {
            Due::Ping
        } else {
            Due::Nothing
        }
    }

    /// When [`Self::due`] is to be asked next.
    pub(crate) fn next(&self) -> Instant {
        self.give_up_at().map_or(self.ping_at(), |at| at.min(self.ping_at()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn an_interval_is_none_or_one_that_servers_accept() {
        assert_eq!(Interval::default().on_the_wire(), 10_000);
        assert_eq!(Interval::new(Duration::ZERO).on_the_wire(), 0);
        assert_eq!(Interval::new(Duration::from_millis(1)).on_the_wire(), 1_000);
        assert_eq!(Interval::new(Duration::MAX).on_the_wire(), 24 * 3_600_000);
    }

    #[test]
    fn a_server_that_does_not_answer_a_ping_is_given_up_after_three_intervals() {
        let start = Instant::now();
        let mut beat = Heartbeat::new(Interval::new(10 * SECOND), start);
        assert_eq!(beat.due(start + 7 * SECOND), Due::Nothing);
        assert_eq!(beat.due(start + 8 * SECOND), Due::Ping);
        beat.on_pinged(start + 8 * SECOND);
        assert_eq!(beat.due(start + 9 * SECOND), Due::Nothing, "it was done");
        beat.on_pinged(start + 29 * SECOND);
        assert_eq!(beat.due(start + 29 * SECOND), Due::Nothing);
        assert_eq!(beat.due(start + 30 * SECOND), Due::GiveUp);
        beat.on_heard(start + 29 * SECOND);
        assert_eq!(beat.due(start + 30 * SECOND), Due::Nothing);
    }

    #[test]
    fn one_that_says_much_and_hears_nothing_asks_and_gives_up() {
        let start = Instant::now();
        let mut beat = Heartbeat::new(Interval::new(10 * SECOND), start);
        for second in 1..10 {
            beat.on_said(start + second * SECOND);
            assert_eq!(beat.due(start + second * SECOND), Due::Nothing);
        }
        assert_eq!(beat.due(start + 10 * SECOND), Due::Ping);
        beat.on_pinged(start + 10 * SECOND);
        beat.on_said(start + 29 * SECOND);
        assert_eq!(beat.due(start + 30 * SECOND), Due::GiveUp);
    }

    #[test]
    fn one_that_was_stopped_asks_before_it_gives_up() {
        let start = Instant::now();
        let mut beat = Heartbeat::new(Interval::new(10 * SECOND), start);
        assert_eq!(beat.due(start + 3_600 * SECOND), Due::Ping);
        beat.on_pinged(start + 3_600 * SECOND);
        assert_eq!(beat.due(start + 3_609 * SECOND), Due::Ping, "the promise is kept meanwhile");
        beat.on_pinged(start + 3_609 * SECOND);
        assert_eq!(beat.due(start + 3_610 * SECOND), Due::GiveUp);
    }

    #[test]
    fn without_a_heartbeat_only_silence_makes_us_speak() {
        let start = Instant::now();
        let mut beat = Heartbeat::new(Interval::new(Duration::ZERO), start);
        for second in 1..100 {
            beat.on_heard(start + second * SECOND);
            assert_eq!(beat.due(start + second * SECOND), Due::Nothing);
        }
        assert_eq!(beat.due(start + 114 * SECOND), Due::Ping);
        beat.on_pinged(start + 114 * SECOND);
        assert_eq!(beat.due(start + 128 * SECOND), Due::Nothing, "asked once");
        assert_eq!(beat.due(start + 129 * SECOND), Due::GiveUp);
    }

    proptest! {
        /// Whatever is heard and said in between: who follows the timer says something within every interval, and gives up
        /// when three are over, never a server that was heard within them.
        #[test]
        fn the_timer_keeps_the_promise(
            seconds in 1u64..60,
            steps in prop::collection::vec((0u64..20_000, any::<bool>()), 1..80),
        ) {
            let interval = Duration::from_secs(seconds);
            let mut now = Instant::now();
            let mut beat = Heartbeat::new(Interval::new(interval), now);
            let (mut heard, mut said) = (now, now);
            for (pause_ms, hear) in steps {
                let next = now + Duration::from_millis(pause_ms);
                while beat.next() <= next {
                    now = beat.next();
                    match beat.due(now) {
                        Due::Ping => {
                            prop_assert!(now - said <= interval);
                            beat.on_pinged(now);
                            said = now;
                        }
                        Due::GiveUp => {
                            prop_assert!(now - heard >= 3 * interval && now - heard <= 4 * interval);
                            return Ok(());
                        }
                        Due::Nothing => prop_assert!(false, "the timer is for something"),
                    }
                }
                now = next;
                if hear {
                    beat.on_heard(now);
                    heard = now;
                } else {
                    beat.on_said(now);
                    said = now;
                }
            }
        }
    }
}
