//! What consumers and callers say.

use geminga_proto::{
    reason::Reason,
    v1::{ConsumeFrame, Credit, Settle, consume_frame::Frame, consume_reply::Reply},
};
use tokio::time::Instant;
use tonic::Status;

use super::{
    super::{
        dispatchers::{Command, DelayedFound},
        handle::invalid,
        wanted::SettleWanted,
    },
    Dispatcher, Done,
    carry_out::AnswerTo,
    lives::Ending,
};
use crate::{
    dispatcher::{Decision, Redelivery, SettleRefused},
    errors::{Refusal, unreadable},
};

impl Dispatcher {
    pub(super) fn frame(&mut self, consumer: u64, frame: Option<Result<ConsumeFrame, Status>>) {
        let Some(member) = self.members.get_mut(&consumer) else { return };
        member.life.heard();
        let frame = match frame {
            None => return self.ends(consumer, Ending::HalfClosed),
            Some(Err(status)) => {
                let gone = member.outbox.is_gone();
                self.core.detach(consumer, false);
                self.finish(consumer, if gone { Ok(()) } else { Err(unreadable(&status)) });
                return;
            }
            Some(Ok(frame)) => frame,
        };
        match frame.frame {
            Some(Frame::Credit(Credit { messages, bytes })) => {
                self.core.on_credit(consumer, messages, bytes);
            }
            Some(Frame::Ping(ping)) => member.push(Reply::Pong(ping)),
            Some(Frame::Settle(settle)) => {
                member.settles += 1;
                let to = AnswerTo::Stream { consumer, token: settle.token, began: Instant::now() };
                let wanted = self.parse(settle);
                self.settle(Some(consumer), wanted, to);
                if let Some(member) = self.members.get(&consumer) {
                    member.set_gate(self.shared.config.limits.settles_in_flight_max);
                }
            }
            Some(Frame::Leave(_)) => self.ends(consumer, Ending::Left),
            Some(Frame::Open(_)) => self.out_of_turn(consumer, "the stream is open already"),
            None => self.out_of_turn(consumer, "a frame of an unknown kind"),
        }
    }

    fn parse(&self, settle: Settle) -> Result<SettleWanted, Refusal> {
        SettleWanted::parse(settle, self.shared.config.limits.settle_ranges_max)
    }

    fn out_of_turn(&mut self, consumer: u64, message: &str) {
        self.core.detach(consumer, false);
        self.finish(consumer, Err(Refusal::new(Reason::UnexpectedFrame, message)));
    }

    /// A settle, in its turn behind those before it. On a stream only what that stream was given is settled.
    fn settle(&mut self, of: Option<u64>, wanted: Result<SettleWanted, Refusal>, to: AnswerTo) {
        let decided = wanted.and_then(|wanted| {
            let who = self.signer.check(&wanted.handle, self.id, self.segment.epoch())?;
            if of.is_some_and(|consumer| consumer != who.consumer) {
                return Err(invalid("the handle is of another consumer"));
            }
            self.core.settle(who, wanted.verb).map_err(|refused| refusal(&refused))
        });
        match decided {
            Ok(Decision::Recorded(id)) => {
                self.answers.insert(id, to);
            }
            Ok(Decision::Now) => self.answer_in_turn(to, Ok(self.core.mark_delete())),
            Err(refusal) => self.answer_in_turn(to, Err(refusal)),
        }
    }

    fn answer_in_turn(&mut self, to: AnswerTo, result: Result<u64, Refusal>) {
        self.records.push_back(Box::pin(async move { Done::Answer { to, result } }));
    }

    pub(super) fn command(&mut self, command: Command) {
        match command {
            Command::Attach(attach) => self.attach(*attach),
            Command::Settle(wanted, answer) => {
                self.settle(None, Ok(wanted), AnswerTo::Call(answer, Instant::now()));
            }
            Command::Pull(asked, answer) => self.pull(asked, answer),
            Command::Seek(to, answer) => {
                let id = self.core.reset(to);
                self.answers.insert(id, AnswerTo::Call(answer, Instant::now()));
            }
            Command::Explain(answer) => drop(answer.send(Ok(self.explained()))),
            Command::Delayed(asked, answer) => {
                let found = self.core.delayed(asked.after, asked.most);
                let found = found.into_iter().map(|(due_ms, start, end, attempt)| Redelivery {
                    start,
                    end,
                    attempt,
                    due_ms,
                });
                let in_log = self.core.not_told_apart();
                let _gone = answer.send(Ok(DelayedFound { known: found.collect(), in_log }));
            }
            Command::Cancel(runs, known, answer) => match self.core.cancel_delayed(&runs, &known) {
                (messages, None) => drop(answer.send(Ok(messages))),
                (messages, Some(id)) => {
                    self.answers.insert(id, AnswerTo::Cancel(answer, messages));
                }
            },
            Command::Stop(done) => self.stop(done),
            Command::Resume => {}
        }
    }
}

fn refusal(refused: &SettleRefused) -> Refusal {
    match refused {
        SettleRefused::NotInOrder => Refusal::request(refused.to_string()),
        SettleRefused::TooManyDead => Refusal::new(Reason::Busy, refused.to_string()),
        SettleRefused::Seeking | SettleRefused::NotHeld(_) => invalid(&refused.to_string()),
    }
}
