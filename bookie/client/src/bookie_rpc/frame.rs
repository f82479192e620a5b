//! Frames of the data plane, and the two buffers they pass through. Pure: no socket here.
//!
//! ```text
//! 0        4          8         9      10       12       16
//! | length | headers  | version | kind | zero   | crc    | header ... | payload ...
//! | u32 le | u32 le   | u8      | u8   | u16    | u32 le |  `headers`   `length` bytes together
//! ```
//! `length` counts header and payload; the header is prost, the payload is raw entry bytes and carries its own digests.
//! `crc` is CRC32C over bytes 0..12 and the header: an answer that changed on its way must not pass for an answer.

use std::{collections::VecDeque, io::IoSlice};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message;

/// Bytes in front of the header.
pub const PRELUDE_BYTES: usize = 16;
/// The largest frame with its prelude, bytes. Checked before anything is allocated for it.
pub const FRAME_BYTES_MAX: usize = 16 * 1024 * 1024;
/// The largest header, bytes: a LIST answer of about two million runs.
pub const HEADER_BYTES_MAX: usize = 4 * 1024 * 1024;
/// The version of the frames that this code speaks.
pub const FRAME_VERSION: u8 = 1;

/// Payload parts below this are copied next to their headers: cheaper than a vector element of their own, bytes.
const COPIED_BELOW: usize = 512;
/// A read from the socket asks for this much, bytes.
const READ_CHUNK: usize = 64 * 1024;
/// The buffer for a large frame grows by at most this, or by what has arrived of it, so that a peer that promises much
/// and sends little holds little, bytes.
const GROWTH: usize = 1024 * 1024;

/// What a frame is. Numbers are the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Add = 1,
    WriteLac = 2,
    Fence = 3,
    Read = 4,
    ReadLac = 5,
    List = 6,
    AddReply = 17,
    FenceReply = 19,
    ReadReply = 20,
    ReadLacReply = 21,
    ListReply = 22,
    Ping = 32,
    Pong = 33,
}

impl Kind {
    const ALL: [Self; 13] = [
        Self::Add,
        Self::WriteLac,
        Self::Fence,
        Self::Read,
        Self::ReadLac,
        Self::List,
        Self::AddReply,
        Self::FenceReply,
        Self::ReadReply,
        Self::ReadLacReply,
        Self::ListReply,
        Self::Ping,
        Self::Pong,
    ];

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// Bytes of a peer that are no frame. The connection they came by is of no use any more; other connections are.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// More than the limits allow.
    #[error("a frame of {length} bytes with a header of {header} bytes is beyond the limits")]
    TooLarge { length: usize, header: usize },
    /// Frames of a version that the handshake did not agree on.
    #[error("frame version {0}, only {FRAME_VERSION} was agreed on")]
    Version(u8),
    /// No kind has this number.
    #[error("unknown frame kind {0}")]
    Kind(u8),
    /// The header changed on its way.
    #[error("a frame's header fails its checksum")]
    Checksum,
    /// The header or the payload does not say what its kind should.
    #[error("malformed frame: {0}")]
    Malformed(&'static str),
}

/// One frame as it arrived; both parts are slices of the receive buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: Kind,
    pub header: Bytes,
    pub payload: Bytes,
}

/// What has arrived and is not yet taken.
#[derive(Debug, Default)]
pub struct Inbox {
    buffer: BytesMut,
    /// Bytes of the frame that is arriving, with its prelude; 0 if that is not known yet.
    awaited: usize,
}

impl Inbox {
    /// The next whole frame; none if more bytes have to come.
    ///
    /// # Errors
    /// [`FrameError`]: the rest of the stream cannot be understood.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        if self.buffer.len() < PRELUDE_BYTES {
            return Ok(None);
        }
        let mut prelude = &self.buffer[..PRELUDE_BYTES];
        let (length, header) = (prelude.get_u32_le() as usize, prelude.get_u32_le() as usize);
        let (version, kind, zero) = (prelude.get_u8(), prelude.get_u8(), prelude.get_u16_le());
        let crc = prelude.get_u32_le();
        if version != FRAME_VERSION {
            return Err(FrameError::Version(version));
        }
        check_lengths(length, header)?;
        let kind = Kind::from_byte(kind).ok_or(FrameError::Kind(kind))?;
        if zero != 0 {
            return Err(FrameError::Malformed("reserved bytes are set"));
        }
        self.awaited = PRELUDE_BYTES + length;
        if self.buffer.len() < self.awaited {
            return Ok(None);
        }
        let head = &self.buffer[..PRELUDE_BYTES + header];
        if checksum(&head[..12], &head[PRELUDE_BYTES..]) != crc {
            return Err(FrameError::Checksum);
        }
        self.awaited = 0;
        self.buffer.advance(PRELUDE_BYTES);
        let header_bytes = self.buffer.split_to(header).freeze();
        let payload = self.buffer.split_to(length - header).freeze();
        Ok(Some(Frame { kind, header: header_bytes, payload }))
    }

    /// Where the next bytes go; has room.
    pub fn room(&mut self) -> &mut BytesMut {
        let missing = self.awaited.saturating_sub(self.buffer.len());
        let wanted = missing.clamp(READ_CHUNK, self.buffer.len().max(GROWTH));
        let spare = self.buffer.capacity() - self.buffer.len();
        if spare < wanted && spare < READ_CHUNK / 4 {
            self.buffer.reserve(wanted);
        }
        &mut self.buffer
    }

    /// Bytes it keeps memory for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.buffer.capacity()
    }
}

/// What is to be sent: a queue of byte slices, written by as few vectored writes as the socket takes.
#[derive(Debug, Default)]
pub struct Outbox {
    whole: VecDeque<Bytes>,
    /// The tail, still growing.
    tail: BytesMut,
    remaining: usize,
}

impl Outbox {
    /// Begins a frame whose payload, `payload` bytes of it, follows by [`Self::put`] and [`Self::put_slice`].
    ///
    /// # Errors
    /// [`FrameError::TooLarge`]; then nothing was put.
    pub fn begin(
        &mut self,
        kind: Kind,
        header: &impl Message,
        payload: usize,
    ) -> Result<(), FrameError> {
        let headers = header.encoded_len();
        let length = headers.saturating_add(payload);
        check_lengths(length, headers)?;
        let mut prelude = [0u8; 12];
        let mut out = &mut prelude[..];
        out.put_u32_le(length as u32);
        out.put_u32_le(headers as u32);
        out.put_u8(FRAME_VERSION);
        out.put_u8(kind as u8);
        self.tail.reserve(PRELUDE_BYTES + headers);
        self.tail.put_slice(&prelude);
        let crc_at = self.tail.len();
        self.tail.put_u32_le(0);
        header.encode_raw(&mut self.tail);
        let crc = checksum(&prelude, &self.tail[crc_at + 4..]);
        self.tail[crc_at..crc_at + 4].copy_from_slice(&crc.to_le_bytes());
        self.remaining += PRELUDE_BYTES + headers;
        Ok(())
    }

    /// A part of the payload; not copied unless it is small.
    pub fn put(&mut self, part: &Bytes) {
        if part.len() < COPIED_BELOW {
            return self.put_slice(part);
        }
        if !self.tail.is_empty() {
            self.whole.push_back(self.tail.split().freeze());
        }
        self.whole.push_back(part.clone());
        self.remaining += part.len();
    }

    /// A small part of the payload, copied.
    pub fn put_slice(&mut self, part: &[u8]) {
        self.tail.put_slice(part);
        self.remaining += part.len();
    }
}

impl Buf for Outbox {
    fn remaining(&self) -> usize {
        self.remaining
    }

    fn chunk(&self) -> &[u8] {
        self.whole.front().map_or(&self.tail, |first| first)
    }

    fn chunks_vectored<'a>(&'a self, into: &mut [IoSlice<'a>]) -> usize {
        let tail = Some(&self.tail[..]).filter(|tail| !tail.is_empty());
        let parts = self.whole.iter().map(|part| &part[..]).chain(tail);
        let mut filled = 0;
        for (slice, part) in into.iter_mut().zip(parts) {
            *slice = IoSlice::new(part);
            filled += 1;
        }
        filled
    }

    fn advance(&mut self, mut count: usize) {
        self.remaining -= count;
        while let Some(first) = self.whole.front_mut() {
            if first.len() > count {
                return first.advance(count);
            }
            count -= first.len();
            self.whole.pop_front();
        }
        self.tail.advance(count);
    }
}

fn check_lengths(length: usize, header: usize) -> Result<(), FrameError> {
    if length > FRAME_BYTES_MAX - PRELUDE_BYTES || header > HEADER_BYTES_MAX || header > length {
        return Err(FrameError::TooLarge { length, header });
    }
    Ok(())
}

fn checksum(prelude: &[u8], header: &[u8]) -> u32 {
    let mut crc = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    crc.update(prelude);
    crc.update(header);
    crc.finalize() as u32
}
