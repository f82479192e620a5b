//! A .tar.gz that is written file by file, with a bound on what goes into it.

use std::io::{self, Write};

use flate2::{Compression, write::GzEncoder};

/// Size of a header, and what files are filled up to.
const BLOCK: usize = 512;

/// An archive under one directory.
pub(super) struct Archive<W: Write> {
    out: GzEncoder<W>,
    directory: &'static str,
    /// Seconds since the Unix epoch, of every file.
    time_s: u64,
    bytes_left: u64,
    files: u64,
}

/// A file that has no place in the archive.
#[derive(Debug, thiserror::Error)]
pub(super) enum PutError {
    #[error("left out: the report is full")]
    Full,
    #[error("left out: its name is too long")]
    Name,
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl<W: Write> Archive<W> {
    /// Takes `bytes_max` bytes of content in all.
    pub(super) fn new(to: W, directory: &'static str, time_s: u64, bytes_max: u64) -> Self {
        let out = GzEncoder::new(to, Compression::default());
        Self { out, directory, time_s, bytes_left: bytes_max, files: 0 }
    }

    /// Files in it.
    pub(super) fn files(&self) -> u64 {
        self.files
    }

    /// Adds a file.
    pub(super) fn put(&mut self, name: &str, content: &[u8]) -> Result<(), PutError> {
        let size = content.len() as u64;
        if size > self.bytes_left {
            return Err(PutError::Full);
        }
        self.write(name, content)?;
        self.bytes_left -= size;
        Ok(())
    }

    /// Adds a last file, whatever the bound, and ends the archive.
    pub(super) fn finish(mut self, name: &str, content: &[u8]) -> Result<W, PutError> {
        self.write(name, content)?;
        self.out.write_all(&[0; 2 * BLOCK])?;
        Ok(self.out.finish()?)
    }

    fn write(&mut self, name: &str, content: &[u8]) -> Result<(), PutError> {
        let path = format!("{}/{name}", self.directory);
        let header = header(&path, content.len() as u64, self.time_s).ok_or(PutError::Name)?;
        self.out.write_all(&header)?;
        self.out.write_all(content)?;
        let rest = content.len() % BLOCK;
        if rest > 0 {
            self.out.write_all(&[0; BLOCK][rest..])?;
        }
        self.files += 1;
        Ok(())
    }
}

/// A ustar header of a plain file; none if the path does not fit.
fn header(path: &str, size: u64, time_s: u64) -> Option<[u8; BLOCK]> {
    let (prefix, name) = split(path)?;
    let mut header = [0; BLOCK];
    let mut field = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
    field(0, name.as_bytes());
    field(100, b"0000644\0");
    field(108, b"0000000\0");
    field(116, b"0000000\0");
    field(124, format!("{size:011o}\0").as_bytes());
    field(136, format!("{time_s:011o}\0").as_bytes());
    field(148, b"        "); // the checksum counts as spaces
    field(156, b"0");
    field(257, b"ustar\x0000");
    field(345, prefix.as_bytes());
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Some(header)
}

/// At most 155 and 100 bytes around a slash.
fn split(path: &str) -> Option<(&str, &str)> {
    if path.len() <= 100 {
        return Some(("", path));
    }
    let cuts = path.match_indices('/').map(|(at, _)| (&path[..at], &path[at + 1..]));
    cuts.into_iter().find(|(prefix, name)| prefix.len() <= 155 && name.len() <= 100)
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    /// What tar makes of it, by file.
    fn listed(archive: &[u8], args: &[&str]) -> String {
        let mut tar = Command::new("tar")
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("tar runs");
        tar.stdin.take().expect("piped").write_all(archive).expect("written");
        let output = tar.wait_with_output().expect("it ends");
        assert!(output.status.success(), "tar understands it");
        String::from_utf8(output.stdout).expect("text")
    }

    #[test]
    fn tar_reads_what_was_put_and_long_paths_are_cut_at_a_slash() {
        let long = format!("{}/{}.log", "p".repeat(120), "c".repeat(63));
        let mut archive = Archive::new(Vec::new(), "report", 1_000_000, 1_000);
        archive.put("a.txt", b"hello\n").expect("room");
        archive.put(&long, &[b'x'; 512]).expect("room");
        let bytes = archive.finish("errors.txt", b"").expect("written");
        let names = listed(&bytes, &["-tzf", "-"]);
        let expected = format!("report/a.txt\nreport/{long}\nreport/errors.txt\n");
        assert_eq!(names, expected);
        assert_eq!(listed(&bytes, &["-xzOf", "-", "report/a.txt"]), "hello\n");
        assert_eq!(listed(&bytes, &["-xzOf", "-", &format!("report/{long}")]), "x".repeat(512));
    }

    #[test]
    fn what_has_no_room_and_what_has_no_name_is_left_out_and_the_rest_stays_whole() {
        let mut archive = Archive::new(Vec::new(), "report", 0, 10);
        assert!(matches!(archive.put("large", &[0; 11]), Err(PutError::Full)));
        archive.put("small", &[b's'; 10]).expect("room");
        assert!(matches!(archive.put("one more", b"x"), Err(PutError::Full)));
        assert!(matches!(archive.put(&"n".repeat(300), b""), Err(PutError::Name)));
        assert_eq!(archive.files(), 1);
        let bytes = archive.finish("errors.txt", b"too large").expect("always");
        assert_eq!(listed(&bytes, &["-tzf", "-"]), "report/small\nreport/errors.txt\n");
    }
}
