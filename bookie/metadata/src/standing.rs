//! Whether the claims of this process were confirmed a short while ago (O3).

use std::sync::Arc;

use tokio::sync::watch;

/// Read side: asked before a metadata change is *started*. Clones share it.
#[derive(Clone, Debug)]
pub struct Standing {
    confirmed: watch::Receiver<bool>,
    /// Keeps the channel of [`Standing::always`] open.
    _fixed: Option<Arc<watch::Sender<bool>>>,
}

/// Write side: whoever confirms the claims. Clones are the same side; when all are dropped, the last word stands.
#[derive(Clone, Debug)]
pub struct StandingSetter(watch::Sender<bool>);

impl Standing {
    /// Confirmed, for ever: for processes that claim nothing, and for an embedded store, which never goes away alone.
    #[must_use]
    pub fn always() -> Self {
        let (sender, confirmed) = watch::channel(true);
        Self { confirmed, _fixed: Some(Arc::new(sender)) }
    }

    /// Confirmed until the setter says otherwise.
    #[must_use]
    pub fn new() -> (StandingSetter, Self) {
        let (sender, confirmed) = watch::channel(true);
        (StandingSetter(sender), Self { confirmed, _fixed: None })
    }

    /// False: provisional. No roll, ensemble change, creation, load or takeover is started now.
    #[must_use]
    pub fn confirmed(&self) -> bool {
        *self.confirmed.borrow()
    }

    /// Waits until it is confirmed (again). For ever if the setter was dropped while it was not. Cancel-safe.
    pub async fn until_confirmed(&self) {
        let mut confirmed = self.confirmed.clone();
        if confirmed.wait_for(|confirmed| *confirmed).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Waits until it is provisional; for ever if that never comes. Cancel-safe.
    pub async fn until_provisional(&self) {
        let mut confirmed = self.confirmed.clone();
        if confirmed.wait_for(|confirmed| !*confirmed).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl Default for Standing {
    fn default() -> Self {
        Self::always()
    }
}

impl StandingSetter {
    /// Tells whether the claims are confirmed.
    pub fn set(&self, confirmed: bool) {
        self.0.send_if_modified(|now| std::mem::replace(now, confirmed) != confirmed);
    }
}
