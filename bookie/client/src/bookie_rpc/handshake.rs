//! The first words on a connection, the same in every version: who is there, and do both speak alike.
//!
//! ```text
//! asker:   "GMNGBOOK" | version min u16 le | version max u16 le | length u16 le | cluster id
//! bookie:  "GMNGBOOK" | verdict u8         | version u16 le     | length u16 le | reason, for a human
//! ```
//! Verdicts: 1 welcome, in `version`; 2 another cluster; 3 no version in common; 4 no room. A member of another cluster is
//! refused before any request of it is read: its incarnation numbers mean something else (section 2).

use std::io;

use bytes::{Buf, BufMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::frame::FRAME_VERSION;

const MAGIC: &[u8; 8] = b"GMNGBOOK";
/// Versions of the protocol that this code speaks.
pub const VERSIONS: (u16, u16) = (FRAME_VERSION as u16, FRAME_VERSION as u16);
/// The longest cluster id and the longest reason, bytes.
const TEXT_BYTES_MAX: usize = 512;

const WELCOME: u8 = 1;
const OTHER_CLUSTER: u8 = 2;
const OTHER_VERSION: u8 = 3;
const NO_ROOM: u8 = 4;

/// Why two did not come to terms.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The connection broke, or the peer fell silent.
    #[error("the connection broke during the handshake: {0}")]
    Io(#[from] io::Error),
    /// Whatever is there, it does not speak this protocol.
    #[error("the peer does not speak the bookie protocol")]
    NotAPeer,
    /// Another cluster; connecting again does not help.
    #[error("the peer is of another cluster: {0}")]
    OtherCluster(String),
    /// No version in common; one of the two has to be upgraded.
    #[error("no protocol version in common: {0}")]
    OtherVersion(String),
    /// It has as many connections as it may; try later.
    #[error("the peer takes no more connections: {0}")]
    NoRoom(String),
}

/// The asker's part: returns the agreed version. The caller sets the deadline.
///
/// # Errors
/// [`HandshakeError`].
pub async fn ask<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    cluster: &str,
) -> Result<u16, HandshakeError> {
    let mut hello = MAGIC.to_vec();
    hello.put_u16_le(VERSIONS.0);
    hello.put_u16_le(VERSIONS.1);
    put_text(&mut hello, cluster);
    stream.write_all(&hello).await?;
    let mut head = [0u8; 13];
    stream.read_exact(&mut head).await?;
    let mut head = &head[..];
    check_magic(&mut head)?;
    let (verdict, version) = (head.get_u8(), head.get_u16_le());
    let reason = read_text(stream, head.get_u16_le()).await?;
    match verdict {
        WELCOME if (VERSIONS.0..=VERSIONS.1).contains(&version) => Ok(version),
        OTHER_CLUSTER => Err(HandshakeError::OtherCluster(reason)),
        OTHER_VERSION => Err(HandshakeError::OtherVersion(reason)),
        NO_ROOM => Err(HandshakeError::NoRoom(reason)),
        _ => Err(HandshakeError::NotAPeer),
    }
}

/// The bookie's part: welcomes the peer, or tells it why not. The caller sets the deadline.
///
/// # Errors
/// [`HandshakeError`]: the connection is to be closed.
pub async fn answer<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    cluster: &str,
    has_room: bool,
) -> Result<u16, HandshakeError> {
    let mut head = [0u8; 14];
    stream.read_exact(&mut head).await?;
    let mut head = &head[..];
    check_magic(&mut head)?;
    let (min, max) = (head.get_u16_le(), head.get_u16_le());
    let theirs = read_text(stream, head.get_u16_le()).await?;
    let version = max.min(VERSIONS.1);
    let refused = if version < min.max(VERSIONS.0) {
        let (low, high) = VERSIONS;
        let reason = format!("this bookie speaks {low} to {high}, asked for {min} to {max}");
        Some((OTHER_VERSION, HandshakeError::OtherVersion(reason.clone()), reason))
    } else if theirs != cluster {
        let reason = format!("this bookie is of cluster {cluster}, asked for {theirs}");
        Some((OTHER_CLUSTER, HandshakeError::OtherCluster(reason.clone()), reason))
    } else if !has_room {
        let reason = "this bookie has as many connections as it may".to_owned();
        Some((NO_ROOM, HandshakeError::NoRoom(reason.clone()), reason))
    } else {
        None
    };
    let (verdict, reason) = match &refused {
        None => (WELCOME, ""),
        Some((verdict, _, reason)) => (*verdict, reason.as_str()),
    };
    let mut welcome = MAGIC.to_vec();
    welcome.put_u8(verdict);
    welcome.put_u16_le(version);
    put_text(&mut welcome, reason);
    stream.write_all(&welcome).await?;
    match refused {
        None => Ok(version),
        Some((_, error, _)) => {
            stream.shutdown().await?;
            Err(error)
        }
    }
}

fn check_magic(head: &mut &[u8]) -> Result<(), HandshakeError> {
    let fits = head.starts_with(MAGIC);
    head.advance(MAGIC.len());
    if fits { Ok(()) } else { Err(HandshakeError::NotAPeer) }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    let bytes = &text.as_bytes()[..text.len().min(TEXT_BYTES_MAX)];
    out.put_u16_le(bytes.len() as u16);
    out.put_slice(bytes);
}

async fn read_text<S: AsyncRead + Unpin>(
    stream: &mut S,
    length: u16,
) -> Result<String, HandshakeError> {
    let length = usize::from(length);
    if length > TEXT_BYTES_MAX {
        return Err(HandshakeError::NotAPeer);
    }
    let mut text = vec![0u8; length];
    stream.read_exact(&mut text).await?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    async fn meet(
        asker: &str,
        bookie: &str,
        has_room: bool,
    ) -> (Result<u16, HandshakeError>, bool) {
        let (mut near, mut far) = duplex(64);
        let (asked, answered) =
            tokio::join!(ask(&mut near, asker), answer(&mut far, bookie, has_room));
        (asked, answered.is_ok())
    }

    #[tokio::test]
    async fn a_member_of_the_same_cluster_is_welcome() {
        assert!(matches!(meet("c1", "c1", true).await, (Ok(1), true)));
    }

    #[tokio::test]
    async fn who_is_refused_learns_why() {
        let (asked, welcomed) = meet("c1", "c2", true).await;
        let Err(HandshakeError::OtherCluster(reason)) = asked else { panic!("{asked:?}") };
        assert!(reason.contains("c1") && reason.contains("c2") && !welcomed, "{reason}");
        let (asked, welcomed) = meet("c1", "c1", false).await;
        assert!(matches!(asked, Err(HandshakeError::NoRoom(_))) && !welcomed, "{asked:?}");
    }

    #[tokio::test]
    async fn an_unknown_version_is_told_what_is_known() {
        let (mut near, mut far) = duplex(1_024);
        let mut hello = MAGIC.to_vec();
        hello.put_u16_le(7);
        hello.put_u16_le(9);
        put_text(&mut hello, "c1");
        near.write_all(&hello).await.expect("room");
        let answered = answer(&mut far, "c1", true).await;
        assert!(matches!(answered, Err(HandshakeError::OtherVersion(_))), "{answered:?}");
        let mut told = Vec::new();
        near.read_to_end(&mut told).await.expect("readable");
        assert_eq!(told[8], OTHER_VERSION);
        assert!(String::from_utf8_lossy(&told).contains("speaks 1 to 1, asked for 7 to 9"));
    }

    #[tokio::test]
    async fn something_else_behind_the_port_is_told_apart() {
        let (mut near, mut far) = duplex(64);
        near.write_all(b"GET / HTTP/1.1\r\n\r\n").await.expect("room");
        assert!(matches!(answer(&mut far, "c1", true).await, Err(HandshakeError::NotAPeer)));
        let (mut near, mut far) = duplex(64);
        far.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.expect("room");
        assert!(matches!(ask(&mut near, "c1").await, Err(HandshakeError::NotAPeer)));
    }
}
