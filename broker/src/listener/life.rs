//! How a stream that stands goes on: heartbeats both ways, and an end in bounded time. Pure: time is handed in.
//!
//! ```text
//! opened ── beats ── heard nothing for 3 intervals: STREAM_SILENT
//!    └── its age is over: GoAway ── drain_by ── what was accepted is answered: the end
//! ```

use std::time::Duration;

use geminga_proto::reason::Reason;
use tokio::time::Instant;

use crate::errors::Refusal;

/// Shortest interval that a client may ask for, milliseconds.
const HEARTBEAT_MS_MIN: u32 = 1_000;
/// From one beat to the next, of an interval. What is said right after a beat, and what is said at the second one after it, are
/// less than an interval apart.
const BEATS: (u32, u32) = (2, 5);
/// Beats without a sign of life: more than three intervals, less than four.
const QUIET_MAX: u32 = 8;

/// What an open frame may ask for.
///
/// # Errors
/// INVALID_REQUEST for an interval below a second that is not 0.
pub(crate) fn check_heartbeat(heartbeat_ms: u32) -> Result<(), Refusal> {
    if heartbeat_ms > 0 && heartbeat_ms < HEARTBEAT_MS_MIN {
        let message = format!("heartbeat_ms is {heartbeat_ms}, at least {HEARTBEAT_MS_MIN} or 0");
        return Err(Refusal::request(message).with("heartbeat_ms_min", HEARTBEAT_MS_MIN));
    }
    Ok(())
}

/// Whether the stream listens to its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hearing {
    Listens,
    /// It does not, for a reason of its own, or has heard the last word.
    Deaf,
    /// Its client does not read what it was sent.
    Full,
}

/// What was put into the outgoing buffer, and taken out of it, as totals.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Traffic {
    pub(crate) pushed: u64,
    pub(crate) taken: u64,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    /// Say something.
    Say,
    /// The client has said nothing for too long.
    Silent,
    /// Tell the client to go, by this time.
    Go(Instant),
    /// It had until now.
    Leave,
}

/// The life of one stream.
#[derive(Clone, Debug)]
pub(crate) struct Life {
    beat: Option<Duration>,
    beat_at: Option<Instant>,
    heard: bool,
    quiet: u32,
    before: Traffic,
    go_at: Option<Instant>,
    leave_at: Option<Instant>,
    drain: Duration,
}

impl Life {
    /// From now on, with this heartbeat (0: none), until it is so old; then it has `drain` to leave.
    pub(crate) fn new(now: Instant, heartbeat_ms: u32, age: Duration, drain: Duration) -> Self {
        let interval = Duration::from_millis(u64::from(heartbeat_ms));
        let beat = (heartbeat_ms > 0).then(|| interval * BEATS.0 / BEATS.1);
        Self {
            beat,
            beat_at: beat.map(|beat| now + beat),
            heard: true,
            quiet: 0,
            before: Traffic::default(),
            go_at: now.checked_add(age),
            leave_at: None,
            drain,
        }
    }

    /// A frame came.
    pub(crate) fn heard(&mut self) {
        self.heard = true;
    }

    /// When to look next; none: never.
    pub(crate) fn next(&self) -> Option<Instant> {
        [self.beat_at, self.go_at, self.leave_at].into_iter().flatten().min()
    }

    /// Resolves when it is time to look. Cancel-safe.
    pub(crate) async fn due(&self) {
        match self.next() {
            Some(at) => tokio::time::sleep_until(at).await,
            None => std::future::pending().await,
        }
    }

    /// What is due by now; call until there is nothing.
    pub(crate) fn look(&mut self, now: Instant, traffic: Traffic, hearing: Hearing) -> Option<Due> {
        let reached = |at: &mut Option<Instant>| at.take_if(|at| *at <= now).is_some();
        if reached(&mut self.leave_at) {
            return Some(Due::Leave);
        }
        if reached(&mut self.go_at) {
            let by = now + self.drain;
            self.leave_at = Some(by);
            return Some(Due::Go(by));
        }
        if reached(&mut self.beat_at) {
            self.beat_at = self.beat.map(|beat| now + beat);
            return self.beat(traffic, hearing);
        }
        None
    }

    fn beat(&mut self, traffic: Traffic, hearing: Hearing) -> Option<Due> {
        let before = std::mem::replace(&mut self.before, traffic);
        let alive = match hearing {
            Hearing::Listens => self.heard,
            Hearing::Deaf => true,
            Hearing::Full => self.heard || traffic.taken > before.taken,
        };
        self.heard = false;
        self.quiet = if alive { 0 } else { self.quiet + 1 };
        if self.quiet >= QUIET_MAX {
            return Some(Due::Silent);
        }
        // What lies in a full buffer is not heard any sooner for more of it.
        let says = traffic.pushed == before.pushed && hearing != Hearing::Full;
        says.then_some(Due::Say)
    }
}

/// The client has been silent for too long.
pub(crate) fn silent() -> Refusal {
    let message = "nothing came on the stream for three of the intervals that it promised";
    Refusal::new(Reason::StreamSilent, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3_600);
    const DRAIN: Duration = Duration::from_secs(2);
    const QUIET: Traffic = Traffic { pushed: 0, taken: 0 };

    fn life() -> (Instant, Life) {
        let now = Instant::now();
        (now, Life::new(now, 1_000, HOUR, DRAIN))
    }

    /// What is due over so many milliseconds, with when.
    fn over(
        (began, life): (Instant, &mut Life),
        (from, until): (u64, u64),
        mut traffic: impl FnMut(&mut Life, u64) -> (Traffic, Hearing),
    ) -> Vec<(u64, Due)> {
        let mut all = Vec::new();
        for ms in from..until {
            let (traffic, hearing) = traffic(life, ms);
            while let Some(due) = life.look(began + Duration::from_millis(ms), traffic, hearing) {
                all.push((ms, due));
            }
        }
        all
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_client_is_found_out_between_three_and_four_intervals_after_its_last_frame() {
        for last in [0, 1, 399, 400, 401, 1_000] {
            let (began, mut life) = life();
            let due = over((began, &mut life), (0, 6_000), |life, ms| {
                if ms == last {
                    life.heard();
                }
                (Traffic { pushed: ms, taken: ms }, Hearing::Listens)
            });
            let (at, _) = due.iter().find(|(_, due)| *due == Due::Silent).expect("found out");
            assert!((last + 3_000..=last + 4_000).contains(at), "{last}: {at}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_speaks_now_and_then_stays_and_so_does_one_that_is_not_listened_to() {
        let (began, mut one) = life();
        let due = over((began, &mut one), (0, 60_000), |life, ms| {
            if ms % 2_900 == 0 {
                life.heard();
            }
            (Traffic { pushed: ms, taken: ms }, Hearing::Listens)
        });
        assert_eq!(due, []);
        let (began, mut one) = life();
        let busy = |_: &mut Life, ms| (Traffic { pushed: ms, taken: ms }, Hearing::Deaf);
        assert_eq!(over((began, &mut one), (0, 60_000), busy), []);
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_reads_slowly_stays_and_one_that_reads_nothing_does_not() {
        let (began, mut slow) = life();
        let reads = |_: &mut Life, ms| (Traffic { pushed: 9, taken: ms / 2_500 }, Hearing::Full);
        assert_eq!(over((began, &mut slow), (0, 60_000), reads), []);
        let (began, mut stuck) = life();
        let stands = |_: &mut Life, _| (Traffic { pushed: 9, taken: 3 }, Hearing::Full);
        let due = over((began, &mut stuck), (0, 6_000), stands);
        assert_eq!(due.first().map(|(_, due)| *due), Some(Due::Silent));
    }

    #[tokio::test(start_paused = true)]
    async fn something_is_said_in_every_interval() {
        let (began, mut life) = life();
        let (mut said, mut pushed) = (vec![0], 0);
        for ms in 0..20_000 {
            life.heard();
            if ms % 1_700 == 0 {
                pushed += 1; // a delivery
                said.push(ms);
            }
            let traffic = Traffic { pushed, taken: pushed };
            if let Some(due) =
                life.look(began + Duration::from_millis(ms), traffic, Hearing::Listens)
            {
                assert_eq!(due, Due::Say);
                pushed += 1;
                said.push(ms);
            }
        }
        assert!(said.windows(2).all(|two| two[1] - two[0] <= 1_000), "{said:?}");
        assert!(said.len() < 60, "and not all the time");
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_heartbeat_nothing_is_said_and_the_end_comes_all_the_same() {
        let began = Instant::now();
        let mut life = Life::new(began, 0, Duration::from_secs(10), DRAIN);
        let listens = |_: &mut Life, _| (QUIET, Hearing::Listens);
        let due = over((began, &mut life), (0, 60_000), listens);
        assert_eq!(due, [(10_000, Due::Go(began + Duration::from_secs(12))), (12_000, Due::Leave)]);
        assert_eq!(life.next(), None);
    }

    #[test]
    fn an_interval_below_a_second_is_refused() {
        assert!([0, 1_000, u32::MAX].into_iter().all(|ms| check_heartbeat(ms).is_ok()));
        assert!([1, 999].into_iter().all(|ms| check_heartbeat(ms).is_err()));
    }
}
