//! Which rows count of a ledger that moved away and came back (D13): those of the earlier copy went with it, wherever they
//! still stand in an index file or a journal file.

use crate::fencing::Row;

/// Where a record lies: journal file, then position. Later records have higher places, also after a copy forward.
pub type Place = (u64, u64);

/// Which rows of a ledger count: none of a ledger that moved away, unless it came back after that (D13).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Validity {
    /// It never moved away.
    All,
    /// It came back: rows in front of this place went with the earlier copy.
    From(Place),
    /// It moved away.
    Nothing,
}

impl Validity {
    /// Whether the row counts.
    #[must_use]
    pub fn admits(self, row: &Row) -> bool {
        match self {
            Self::All => true,
            Self::From(place) => (row.file, row.position) >= place,
            Self::Nothing => false,
        }
    }
}
