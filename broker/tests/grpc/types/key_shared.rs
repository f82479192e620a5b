//! Key-shared subscriptions: order per key.

use std::{collections::BTreeSet, time::Duration};

use geminga_proto::v1::{
    Delivery, HeldBy, Settle, SubscriptionType, consume_frame::Frame, consume_reply::Reply,
};
use tokio::time::timeout;

use super::{
    accept, consumer, delivery, explain, held, keyed, offsets, publish_batch, release, settings,
    settle, started,
};

#[tokio::test]
async fn key_shared_keeps_each_key_with_one_consumer_through_joins_and_releases() {
    let (_cluster, client) = started().await;
    let by_key = settings(SubscriptionType::KeyShared);
    let mut one = consumer(&client, "one", &by_key).await;
    let keys: Vec<u32> = (0..8).map(|n| n * 0x2000_0000 + 5).collect();
    publish_batch(&client, keyed(&keys)).await;
    let first = delivery(&mut one).await;
    assert_eq!(offsets(&first), (0..8).collect::<Vec<_>>(), "alone it has every key");
    let mut two = consumer(&client, "two", &by_key).await;
    // The table is in force once the new one gets messages of keys that nobody holds.
    for n in 1.. {
        let others: Vec<u32> = keys.iter().map(|key| key + n).collect();
        publish_batch(&client, keyed(&others)).await;
        if !two.quiet().await {
            break; // what it got is not looked at: none of it is of `keys`
        }
    }
    let base = publish_batch(&client, keyed(&keys)).await;
    // Nothing of a key goes to the new one while the former holds an earlier message of it.
    while let Ok(got) = timeout(Duration::from_millis(200), delivery(&mut two)).await {
        assert!(offsets(&got).iter().all(|offset| *offset < base));
    }
    settle(&mut one, accept(&first)).await.expect("settled");
    let (mut of_one, mut of_two) = (BTreeSet::new(), BTreeSet::new());
    while of_one.len() + of_two.len() < 8 {
        tokio::select! {
            got = delivery(&mut one) => of_one.extend(offsets(&got)),
            got = delivery(&mut two) => of_two.extend(offsets(&got)),
        }
        of_one.retain(|offset| *offset >= base);
        of_two.retain(|offset| *offset >= base);
    }
    assert_eq!((of_one.len(), of_two.len()), (4, 4), "half of the hashes moved");
}

#[tokio::test]
async fn a_released_message_of_a_key_takes_the_later_ones_of_its_key_with_it() {
    let (_cluster, client) = started().await;
    let by_key = settings(SubscriptionType::KeyShared);
    let mut one = consumer(&client, "one", &by_key).await;
    publish_batch(&client, keyed(&[7, 8, 7, 8])).await;
    let first = delivery(&mut one).await;
    assert_eq!(offsets(&first), [0, 1, 2, 3]);
    let of_0 = Delivery { deliver: crate::types::one(0), ..first.clone() };
    one.send(Frame::Settle(Settle { token: 1, verb: Some(release(&of_0, true, Some(200))) })).await;
    let (mut revoked, mut settled) = (Vec::new(), false);
    while revoked.is_empty() || !settled {
        match one.reply().await.expect("no refusal") {
            Some(Reply::Revoked(told)) => revoked.extend(told.ranges),
            Some(Reply::Settled(_)) => settled = true,
            other => panic!("neither: {other:?}"),
        }
    }
    assert_eq!(revoked, crate::types::one(2));
    let explained = explain(&client).await;
    assert_eq!(
        (held(&explained, HeldBy::Delay), held(&explained, HeldBy::Key)),
        (1, 1),
        "{explained:?}"
    );
    let again = delivery(&mut one).await;
    assert_eq!((offsets(&again), again.attempt), (vec![0], 2));
    let after = delivery(&mut one).await;
    assert_eq!((offsets(&after), after.attempt), (vec![2], 1));
}
