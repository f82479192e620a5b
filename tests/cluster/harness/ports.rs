//! Ports that nobody else uses now.

use std::{collections::BTreeSet, net::TcpListener, sync::Mutex};

static TAKEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());

/// A free port of this machine; never the same one twice in this process.
pub(crate) fn free() -> u16 {
    let mut taken = TAKEN.lock().expect("nobody panics with it");
    loop {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        if taken.insert(port) {
            return port;
        }
    }
}
