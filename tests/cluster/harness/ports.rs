//! Ports that nobody else uses now.

use std::{collections::BTreeSet, net::TcpListener, sync::Mutex};

use geminga_runtime::random::Random;

static TAKEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());

/// Below the ports that the kernel gives to outgoing connections: none of them takes one between its choice and its use.
const FIRST: u16 = 20_000;
const COUNT: u16 = 10_000;

/// A free port of this machine; never the same one twice in this process.
pub(crate) fn free() -> u16 {
    let random = Random::from_os();
    let mut taken = TAKEN.lock().expect("nobody panics with it");
    loop {
        let offset = u16::try_from(random.below(u64::from(COUNT))).expect("below a u16");
        let port = FIRST + offset;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() && taken.insert(port) {
            return port;
        }
    }
}
