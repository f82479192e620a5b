//! How a process confirms its claims (O3), as a broker does: one read after the other, timed from when each was sent.

use std::{sync::Arc, time::Duration};

use geminga_metadata::{MetadataStore, StandingSetter, keys};
use geminga_proto::ids::Bundle;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{
    coverage::Seen,
    world::{ClientNode, World},
};

/// The length of a claim's lease.
const TTL: Duration = Duration::from_secs(5);

/// Goes on for ever.
pub(crate) async fn confirm(world: Arc<World>, node: ClientNode, setter: StandingSetter) {
    let claim = keys::owner(Bundle(0));
    let mut confirmed = Instant::now();
    loop {
        let sent = Instant::now();
        if matches!(timeout(TTL / 3, node.store.get(&claim)).await, Ok(Ok(_))) {
            confirmed = sent;
        }
        let stands = confirmed.elapsed() < TTL * 4 / 5;
        if stands != node.standing.confirmed() {
            world.history.saw_if(!stands, Seen::Provisional);
            world.history.note(format!("claims of client {} are confirmed: {stands}", node.number));
            setter.set(stands);
        }
        if stands {
            sleep_until(sent + TTL / 3).await;
        }
        sleep(Duration::from_millis(200)).await;
    }
}
