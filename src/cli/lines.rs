//! Standard input, a chunk of lines at a time: a slow writer's line is there at once, a fast one's come by the thousand.

use std::{
    io::{self, BufRead, BufReader, Read, Stdin},
    sync::Arc,
};

use geminga_runtime::io::Io;
use parking_lot::Mutex;

/// Longest line, bytes: above the largest message, so that it is the message limit that is met.
const LINE_BYTES_MAX: u64 = 16 * 1024 * 1024;
const CHUNK_LINES_MAX: usize = 1024;
const CHUNK_BYTES_MAX: usize = 1024 * 1024;

/// Reads lines on a thread of its own.
pub(crate) struct Lines {
    io: Io,
    input: Arc<Mutex<BufReader<Stdin>>>,
}

impl Lines {
    pub(crate) fn new() -> Self {
        let input = BufReader::with_capacity(256 * 1024, io::stdin());
        Self { io: Io::thread("stdin"), input: Arc::new(Mutex::new(input)) }
    }

    /// The next lines without their line ends: at least one, unless the input is at its end.
    pub(crate) async fn next(&self) -> io::Result<Vec<Vec<u8>>> {
        let input = Arc::clone(&self.input);
        self.io.run(move || chunk(&mut *input.lock())).await
    }
}

fn chunk<R: Read>(input: &mut BufReader<R>) -> io::Result<Vec<Vec<u8>>> {
    let (mut lines, mut bytes) = (Vec::new(), 0);
    loop {
        let mut line = Vec::new();
        let read = input.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
        if read == 0 {
            return Ok(lines);
        }
        if line.last() == Some(&b'\n') {
            line.pop();
        }
        bytes += line.len();
        lines.push(line);
        let more = input.buffer().contains(&b'\n');
        if !more || lines.len() >= CHUNK_LINES_MAX || bytes >= CHUNK_BYTES_MAX {
            return Ok(lines);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_comes_once_whatever_the_buffer() {
        let text = b"one\n\nthree\nlast without end";
        for capacity in [1, 3, 5, 100] {
            let mut input = BufReader::with_capacity(capacity, &text[..]);
            let mut lines = Vec::new();
            loop {
                let chunk = chunk(&mut input).expect("a slice reads");
                if chunk.is_empty() {
                    break;
                }
                lines.extend(chunk);
            }
            assert_eq!(
                lines,
                [&b"one"[..], b"", b"three", b"last without end"],
                "capacity {capacity}"
            );
        }
    }
}
