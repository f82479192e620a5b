//! What was delivered on the present stream and the application has not seen yet. Pure: deliveries and a count come in.

use std::collections::VecDeque;

/// The deliveries of one stream, in the order in which they are handed out.
#[derive(Debug, Default)]
pub(super) struct Unseen {
    /// Inclusive ranges of offsets; bounded by the credit.
    queue: VecDeque<(u64, u64)>,
    delivered: u64,
    seen: u64,
}

impl Unseen {
    /// These messages were given to the application's side.
    pub(super) fn on_delivered(&mut self, ranges: &[(u64, u64)]) {
        self.delivered += ranges.iter().map(|(first, last)| last - first + 1).sum::<u64>();
        self.queue.extend(ranges);
    }

    /// Messages delivered on this stream.
    pub(super) fn delivered(&self) -> u64 {
        self.delivered
    }

    /// The application has seen so many messages of this stream, in total; returns those it saw since the last call.
    pub(super) fn on_seen(&mut self, total: u64) -> Vec<(u64, u64)> {
        let mut news: Vec<(u64, u64)> = Vec::new();
        while self.seen < total {
            let Some((first, last)) = self.queue.front_mut() else { break };
            let upto = (*last).min(*first + (total - self.seen - 1));
            self.seen += upto - *first + 1;
            match news.last_mut() {
                Some(range) if range.1.checked_add(1) == Some(*first) => range.1 = upto,
                _ => news.push((*first, upto)),
            }
            if upto == *last {
                self.queue.pop_front();
            } else {
                *first = upto + 1;
            }
        }
        news
    }

    /// The stream is left: what was not seen, in order.
    pub(super) fn end(&mut self) -> Vec<(u64, u64)> {
        std::mem::take(self).queue.into()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_delivered_message_is_seen_once_in_order_or_left(
            steps in prop::collection::vec((0u64..50, 1u64..9, 0u64..12), 1..60),
        ) {
            let mut unseen = Unseen::default();
            let (mut delivered, mut seen) = (Vec::new(), Vec::new());
            for (first, count, see) in steps {
                unseen.on_delivered(&[(first, first + count - 1)]);
                delivered.extend(first..first + count);
                let total = (seen.len() as u64 + see).min(delivered.len() as u64);
                seen.extend(unseen.on_seen(total).into_iter().flat_map(|(first, last)| first..=last));
                prop_assert_eq!(seen.len() as u64, total);
            }
            prop_assert_eq!(unseen.delivered(), delivered.len() as u64);
            seen.extend(unseen.end().into_iter().flat_map(|(first, last)| first..=last));
            prop_assert_eq!(seen, delivered);
        }
    }
}
