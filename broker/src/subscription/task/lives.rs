//! Heartbeats of consumers' streams, and how they end: well, by leaving or by closing their half and hearing the last word; or
//! broken, with a grace to come back in.

use geminga_proto::v1::{Ping, consume_reply::Reply};
use tokio::time::Instant;

use super::{Dispatcher, members::Member};
use crate::listener::{Due, Hearing, silent};

/// Why a stream takes no more frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// The client closed its half. Whether it is still there to hear the last word tells a good end from a broken stream.
    HalfClosed,
    /// It said that it leaves.
    Left,
    /// It was told to go, and its time is over: it may come back.
    TimeOver,
}

impl Member {
    fn hearing(&self, settles_max: usize) -> Hearing {
        match self.ending {
            Some(_) => Hearing::Deaf,
            None if !self.outbox.is_open() => Hearing::Full,
            None if self.settles >= settles_max => Hearing::Deaf,
            None => Hearing::Listens,
        }
    }
}

impl Dispatcher {
    /// Heartbeats and ages that are due.
    pub(super) fn look_at_lives(&mut self) {
        let now = Instant::now();
        while let Some((_, consumer)) = self.lives.first().copied().filter(|(at, _)| *at <= now) {
            self.lives.pop_first();
            self.look_at_life(consumer, now);
            if let Some(next) = self.members.get(&consumer).and_then(|member| member.life.next()) {
                self.lives.insert((next, consumer));
            }
        }
    }

    fn look_at_life(&mut self, consumer: u64, now: Instant) {
        let settles_max = self.shared.config.limits.settles_in_flight_max;
        while let Some(member) = self.members.get_mut(&consumer) {
            let (traffic, hearing) = (member.outbox.traffic(), member.hearing(settles_max));
            match member.life.look(now, traffic, hearing) {
                None => return,
                Some(Due::Say) => member.push(Reply::Pong(Ping { token: 0 })),
                Some(Due::Silent) => {
                    self.core.detach(consumer, false);
                    self.finish(consumer, Err(silent()));
                }
                Some(Due::Go(by)) => {
                    member.push(Reply::GoAway(self.shared.rotate(&self.segment, by)));
                }
                Some(Due::Leave) => self.ends(consumer, Ending::TimeOver),
            }
        }
    }

    /// The stream ends once its settles are answered. The first reason stands; but who closed its half and never reads the end is
    /// ended when its time is over.
    pub(super) fn ends(&mut self, consumer: u64, ending: Ending) {
        let Some(member) = self.members.get_mut(&consumer) else { return };
        match (member.ending, ending) {
            (None, _) | (Some(Ending::HalfClosed), Ending::TimeOver) => {
                member.ending = Some(ending);
            }
            (Some(_), _) => {}
        }
        member.set_gate(self.shared.config.limits.settles_in_flight_max);
        self.core.set_credit(consumer, 0, 0);
        if ending == Ending::Left {
            // What it holds is free at once, with its attempt unchanged.
            self.core.detach(consumer, true);
        }
    }

    /// Streams that end, and have every answer.
    pub(super) fn let_leavers_go(&mut self) {
        let done = |member: &Member| member.ending.filter(|_| member.settles == 0);
        let leavers: Vec<(u64, Ending)> = self
            .members
            .iter()
            .filter_map(|(consumer, member)| Some((*consumer, done(member)?)))
            .collect();
        for (consumer, ending) in leavers {
            let Some(member) = self.members.get(&consumer) else { continue };
            let clean = match ending {
                Ending::HalfClosed if member.outbox.has_ended() => true,
                Ending::HalfClosed => {
                    member.outbox.close();
                    continue;
                }
                Ending::Left => true,
                Ending::TimeOver => false,
            };
            self.core.detach(consumer, clean);
            self.finish(consumer, Ok(()));
        }
    }
}
