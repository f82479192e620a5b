//! Which slot is slow, as the time to its answers tells (EC1): its p99 is more than five times that of every peer, second
//! after second, for ten of them. Pure; time comes with each answer.
//!
//! One slow second, a pause that all share, or a slot with few answers tells nothing: a change costs a metadata write and a
//! publish stop (T43).

use std::time::Duration;

use tokio::time::Instant;

/// A slot is slow when its p99 is more than this many times its slowest peer's.
const FACTOR: u32 = 5;
/// In so many windows in a row.
const WINDOWS: u32 = 10;
const WINDOW: Duration = Duration::from_secs(1);
/// Below this nobody is slow.
const P99_MIN: Duration = Duration::from_millis(20);
/// Answers that a window must have for a p99.
const ANSWERS_MIN: u32 = 20;
/// Four steps an octave of microseconds, up to about a minute.
const STEPS: usize = 104;

/// Answers of one window by their time, in logarithmic steps.
#[derive(Clone, Debug)]
struct Window {
    counts: [u32; STEPS],
    answers: u32,
}

impl Window {
    const EMPTY: Self = Self { counts: [0; STEPS], answers: 0 };

    fn note(&mut self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX).max(4);
        let octave = micros.ilog2();
        let quarter = (micros >> (octave - 2)) & 3;
        let step = octave as usize * 4 + quarter as usize;
        self.counts[step.min(STEPS - 1)] += 1;
        self.answers += 1;
    }

    /// The lower end of the step that holds the p99; none with too few answers.
    fn p99(&self) -> Option<Duration> {
        if self.answers < ANSWERS_MIN {
            return None;
        }
        let mut beyond = self.answers / 100;
        let step = (0..STEPS).rev().find(|step| {
            let found = self.counts[*step] > beyond;
            beyond = beyond.saturating_sub(self.counts[*step]);
            found
        })?;
        let (octave, quarter) = (step / 4, step as u64 % 4);
        Some(Duration::from_micros((4 + quarter) << octave >> 2))
    }
}

/// See the module's text.
#[derive(Clone, Debug)]
pub(super) struct Slowness {
    slots: Vec<(Window, u32)>,
    ends: Instant,
}

impl Slowness {
    pub(super) fn new(slots: usize, now: Instant) -> Self {
        Self { slots: vec![(Window::EMPTY, 0); slots], ends: now + WINDOW }
    }

    /// Another incarnation holds the slot: nothing is known of it.
    pub(super) fn reset(&mut self, slot: usize) {
        self.slots[slot] = (Window::EMPTY, 0);
    }

    /// An add was answered after `time`. Returns the slot that turned slow by now, if one did.
    pub(super) fn on_answer(&mut self, slot: usize, time: Duration, now: Instant) -> Option<usize> {
        let turned = if now >= self.ends { self.judge(now) } else { None };
        self.slots[slot].0.note(time);
        turned
    }

    fn judge(&mut self, now: Instant) -> Option<usize> {
        let p99: Vec<Option<Duration>> =
            self.slots.iter().map(|(window, _)| window.p99()).collect();
        self.ends = now + WINDOW;
        let mut turned = None;
        for (slot, (window, times)) in self.slots.iter_mut().enumerate() {
            *window = Window::EMPTY;
            let peers = p99.iter().enumerate().filter(|(peer, _)| *peer != slot);
            let slowest_peer = peers.filter_map(|(_, p99)| *p99).max();
            let slow = match (p99[slot], slowest_peer) {
                (Some(own), Some(peer)) => own >= P99_MIN && own > peer * FACTOR,
                _ => false,
            };
            *times = if slow { *times + 1 } else { 0 };
            if *times == WINDOWS {
                turned = Some(slot);
            }
        }
        turned
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers of three slots for so many seconds, each with its own time; the second after which a slot turned slow.
    fn turned(seconds: u32, time: impl Fn(u32, usize) -> Duration) -> Option<(usize, u32)> {
        let start = Instant::now();
        let mut slowness = Slowness::new(3, start);
        for second in 0..seconds {
            for n in 0..100 {
                let now = start + WINDOW * second + Duration::from_millis(10 * n);
                for slot in 0..3 {
                    if let Some(slot) = slowness.on_answer(slot, time(second, slot), now) {
                        return Some((slot, second));
                    }
                }
            }
        }
        None
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_slot_much_slower_than_every_peer_for_ten_seconds_is_slow() {
        assert_eq!(turned(20, |_, slot| ms(if slot == 1 { 100 } else { 2 })), Some((1, 10)));
    }

    #[test]
    fn what_all_share_one_good_second_and_small_times_make_nobody_slow() {
        assert_eq!(turned(40, |_, _| ms(500)), None);
        assert_eq!(
            turned(40, |_, slot| ms(if slot == 0 { 2 } else { 100 })),
            None,
            "two are alike"
        );
        let now_and_then =
            |second: u32, slot| ms(if slot == 1 && !second.is_multiple_of(9) { 100 } else { 2 });
        assert_eq!(turned(40, now_and_then), None);
        assert_eq!(turned(40, |_, slot| ms(if slot == 1 { 15 } else { 1 })), None);
        assert_eq!(
            turned(40, |_, slot| ms(if slot == 1 { 90 } else { 20 })),
            None,
            "below five times"
        );
    }

    #[test]
    fn the_p99_is_the_step_of_the_slowest_but_one_in_a_hundred() {
        let mut window = Window::EMPTY;
        for _ in 0..199 {
            window.note(ms(1));
        }
        window.note(ms(1_000));
        let p99 = window.p99().expect("enough answers");
        assert!(p99 > Duration::from_micros(800) && p99 <= ms(1), "{p99:?}");
        for _ in 0..5 {
            window.note(ms(1_000));
        }
        assert!(window.p99().expect("enough answers") > ms(800));
        assert_eq!(Window::EMPTY.p99(), None);
    }
}
