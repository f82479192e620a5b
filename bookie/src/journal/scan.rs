//! Reads the groups of one journal file past the page cache (D3). Blocking; runs on an I/O thread.

use std::io;

use geminga_runtime::disk::DiskFile;

use super::{
    format::{self, BLOCK_BYTES, Nonce, Record},
    replay::Found,
};

/// A valid group with its records.
#[derive(Debug)]
pub(crate) struct Scanned {
    pub(crate) found: Found,
    pub(crate) records: Vec<Record>,
}

/// What a file holds from a position on.
#[derive(Debug, Default)]
pub(crate) struct FileScan {
    pub(crate) groups: Vec<Scanned>,
    /// Some bytes could not be read.
    pub(crate) unreadable: bool,
}

/// Bytes read at once while looking for the next group.
const WINDOW_BYTES: usize = 1 << 20;

/// Finds all valid groups of file `number` from `from` on. After bytes that are no group it goes on block by block, so
/// that a hole is told from the end (T46).
pub(crate) fn scan(
    file: &dyn DiskFile,
    number: u64,
    from: u64,
    nonce: &Nonce,
) -> io::Result<FileScan> {
    file.evict()?;
    let length = file.len()?;
    let mut scan = FileScan::default();
    let mut window = Window { file, start: 0, bytes: Vec::new() };
    let mut position = from;
    while position < length {
        let step = match window.slice(position, BLOCK_BYTES.min((length - position) as usize)) {
            Err(error) => {
                tracing::error!(file = number, position, %error, "journal file cannot be read");
                scan.unreadable = true;
                BLOCK_BYTES as u64
            }
            Ok(block) => match format::peek(block, nonce, number) {
                None => BLOCK_BYTES as u64,
                Some(header) => {
                    let bytes = format::GROUP_HEADER_BYTES + header.length as usize;
                    match window.slice(position, bytes) {
                        Ok(group) if format::crc_fits(group, &header) => {
                            match format::records(group, &header) {
                                Some(records) => {
                                    let limbo = records.iter().find_map(|record| match record {
                                        Record::Limbo(bound) => Some(*bound),
                                        _ => None,
                                    });
                                    scan.groups.push(Scanned {
                                        found: Found { header, position, limbo },
                                        records,
                                    });
                                    header.disk_bytes()
                                }
                                None => BLOCK_BYTES as u64,
                            }
                        }
                        // Torn or damaged: the numbers tell which. Unreadable: the read of its own blocks will tell.
                        Ok(_) | Err(_) => BLOCK_BYTES as u64,
                    }
                }
            },
        };
        position += step;
    }
    Ok(scan)
}

struct Window<'a> {
    file: &'a dyn DiskFile,
    start: u64,
    bytes: Vec<u8>,
}

impl Window<'_> {
    /// `length` bytes at `position`, fewer at the end of the file.
    fn slice(&mut self, position: u64, length: usize) -> io::Result<&[u8]> {
        let held = position >= self.start
            && position + length as u64 <= self.start + self.bytes.len() as u64;
        if !held {
            self.bytes.resize(length.max(WINDOW_BYTES), 0);
            let got = match self.file.read_at(&mut self.bytes, position) {
                Ok(got) => got,
                Err(_) => {
                    // One bad block must not hide its neighbours.
                    self.bytes.resize(length, 0);
                    let read = self.file.read_at(&mut self.bytes, position);
                    if read.is_err() {
                        self.bytes.clear();
                    }
                    read?
                }
            };
            self.bytes.truncate(got);
            self.start = position;
        }
        let at = (position - self.start) as usize;
        Ok(&self.bytes[at..(at + length).min(self.bytes.len())])
    }
}
