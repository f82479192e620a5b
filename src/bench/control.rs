//! The controls: the same bytes through a bare journal (append + sync) and a bare socket, with nothing of ours between.
//! A figure of the product is worth quoting only beside these, taken in the same run on the same disk.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::Instant,
};

use super::report::{Latencies, Percentiles};

/// What a bare run came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Control {
    pub(crate) elapsed: Duration,
    /// Of one write + sync, or one round trip, of a batch.
    pub(crate) batch_ms: Option<Percentiles>,
}

/// Appends `batches` of `batch_bytes` to one file per copy in `directory`, and syncs after each, one after the other.
///
/// # Errors
/// Any I/O error.
pub(crate) fn journal(
    directory: &Path,
    batch_bytes: usize,
    batches: u64,
    copies: usize,
) -> io::Result<Control> {
    let names: Vec<_> = (0..copies).map(|i| directory.join(format!("control-{i}"))).collect();
    let files = names.iter().map(File::create).collect::<io::Result<Vec<_>>>()?;
    let batch = vec![0xa5u8; batch_bytes];
    let mut latencies = Latencies::new();
    let start = Instant::now();
    for i in 0..batches {
        let begun = Instant::now();
        for file in &files {
            file.write_all_at(&batch, i * batch_bytes as u64)?;
            file.sync_data()?;
        }
        latencies.record(begun.elapsed());
    }
    let elapsed = start.elapsed();
    for name in names {
        std::fs::remove_file(name)?;
    }
    Ok(Control { elapsed, batch_ms: latencies.percentiles() })
}

/// Sends `batches` of `batch_bytes` over one loopback connection, pipelined; the peer answers each with one byte.
///
/// # Errors
/// Any I/O error.
pub(crate) async fn socket(batch_bytes: usize, batches: u64) -> io::Result<Control> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let serve = async {
        let (mut peer, _) = listener.accept().await?;
        peer.set_nodelay(true)?;
        let mut buffer = vec![0u8; batch_bytes];
        for _ in 0..batches {
            peer.read_exact(&mut buffer).await?;
            peer.write_all(&[1]).await?;
        }
        Ok::<_, io::Error>(())
    };
    let send = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (mut from, mut to) = stream.split();
        let batch = vec![0xa5u8; batch_bytes];
        let start = Instant::now();
        let write = async {
            for _ in 0..batches {
                to.write_all(&batch).await?;
            }
            Ok::<_, io::Error>(())
        };
        let read = async {
            let mut answers = vec![0u8; 4096];
            let mut left = batches;
            while left > 0 {
                let got = from.read(&mut answers).await? as u64;
                if got == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                left -= got.min(left);
            }
            Ok(())
        };
        tokio::try_join!(write, read)?;
        Ok(start.elapsed())
    };
    let ((), elapsed) = tokio::try_join!(serve, send)?;
    Ok(Control { elapsed, batch_ms: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journal_control_writes_and_leaves_nothing_behind() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let control = journal(directory.path(), 4096, 8, 3).expect("the disk works");
        assert!(control.elapsed > Duration::ZERO && control.batch_ms.is_some());
        assert_eq!(std::fs::read_dir(directory.path()).expect("readable").count(), 0);
    }

    #[tokio::test]
    async fn the_socket_control_gets_every_answer() {
        let control = socket(65_536, 50).await.expect("loopback works");
        assert!(control.elapsed > Duration::ZERO);
    }
}
