//! The checks on a submission descriptor. Every field is the enclave's and hostile until it passed.

use postern_edl::port::{Geometry, MAX_DISCARD_BYTES, MAX_REQUEST_BYTES, Submission, op};

/// Why a descriptor is refused. Its id was good, so the enclave gets an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// A field is out of range: `EINVAL`.
    Invalid,
    /// The handle names no open file, or a file that is only read: `EBADF`.
    BadFile,
}

impl Refusal {
    /// The result the enclave gets.
    #[must_use]
    pub const fn result(self) -> i64 {
        match self {
            Self::Invalid => -(libc::EINVAL as i64),
            Self::BadFile => -(libc::EBADF as i64),
        }
    }
}

/// The request index of an id, if it is below `entries`.
#[must_use]
pub fn index_of(id: u64, entries: usize) -> Option<usize> {
    let index = (id & 0xffff_ffff) as usize;
    (index < entries).then_some(index)
}

/// Checks operation, offset, length and data of a descriptor. Its id, its handle and whether its
/// operation was agreed on are checked by those who know what is in flight and what is open.
///
/// # Errors
/// [`Refusal::Invalid`].
pub fn check(submission: &Submission, geometry: &Geometry) -> Result<(), Refusal> {
    let Submission { op, offset, length, data, .. } = *submission;
    let aligned = (offset | length | data) & 4095 == 0;
    // The kernel's offsets are signed.
    let in_file = offset.checked_add(length).is_some_and(|end| end <= i64::MAX as u64);
    match u64::from(op) {
        op::READ | op::WRITE => {
            let sized = length != 0 && length <= MAX_REQUEST_BYTES;
            let start = geometry.data_offset as u64;
            let in_area = data >= start
                && data
                    .checked_add(length)
                    .is_some_and(|end| end <= geometry.region_bytes() as u64);
            if aligned && sized && in_file && in_area { Ok(()) } else { Err(Refusal::Invalid) }
        }
        op::DISCARD if aligned && in_file && data == 0 => {
            let sized = length != 0 && length <= MAX_DISCARD_BYTES;
            if sized { Ok(()) } else { Err(Refusal::Invalid) }
        }
        op::FLUSH if offset == 0 && length == 0 && data == 0 => Ok(()),
        _ => Err(Refusal::Invalid),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn geometry() -> Geometry {
        Geometry::new(64, 8 << 20).unwrap()
    }

    fn good() -> Submission {
        Submission {
            id: 3,
            op: 1,
            handle: 1,
            offset: 4096,
            length: 8192,
            data: geometry().data_offset as u64,
            ..Submission::default()
        }
    }

    #[test]
    fn good_descriptors_pass_up_to_the_very_limits() {
        let g = geometry();
        let end = g.region_bytes() as u64;
        let good = good();
        assert_eq!(check(&good, &g), Ok(()));
        assert_eq!(check(&Submission { op: 2, ..good }, &g), Ok(()));
        assert_eq!(check(&Submission { data: end - 8192, ..good }, &g), Ok(()));
        assert_eq!(check(&Submission { length: MAX_REQUEST_BYTES, ..good }, &g), Ok(()));
        let last = (i64::MAX as u64) / 4096 * 4096 - 8192;
        assert_eq!(check(&Submission { offset: last, ..good }, &g), Ok(()));
        let flush = Submission { op: 3, offset: 0, length: 0, data: 0, ..good };
        assert_eq!(check(&flush, &g), Ok(()));
        let discard = Submission { op: 4, length: MAX_DISCARD_BYTES, data: 0, ..good };
        assert_eq!(check(&discard, &g), Ok(()));
    }

    #[test]
    fn every_field_out_of_range_is_refused() {
        let g = geometry();
        let end = g.region_bytes() as u64;
        let good = good();
        let table = [
            Submission { op: 0, ..good },
            Submission { op: 5, ..good },
            Submission { op: 4, ..good },
            Submission { op: 4, data: 0, length: 0, ..good },
            Submission { op: 4, data: 0, length: 512, ..good },
            Submission { op: 4, data: 0, length: MAX_DISCARD_BYTES + 4096, ..good },
            Submission { op: 4, data: 0, length: u64::MAX - 4095, ..good },
            Submission { op: 4, data: 0, offset: 1, ..good },
            Submission { op: 4, data: 0, offset: i64::MAX as u64 - 4095, ..good },
            Submission { op: 4, data: 0, offset: 1 << 63, ..good },
            Submission { op: u32::MAX, ..good },
            Submission { offset: 1, ..good },
            Submission { offset: 512, ..good },
            Submission { offset: u64::MAX - 4095, ..good },
            Submission { offset: i64::MAX as u64 - 4095, ..good },
            Submission { offset: 1 << 63, ..good },
            Submission { length: 0, ..good },
            Submission { length: 4095, ..good },
            Submission { length: MAX_REQUEST_BYTES + 4096, ..good },
            Submission { length: u64::MAX - 4095, ..good },
            Submission { data: 0, ..good },
            Submission { data: 4096, ..good },
            Submission { data: g.data_offset as u64 - 4096, ..good },
            Submission { data: g.data_offset as u64 + 8, ..good },
            Submission { data: end, ..good },
            Submission { data: end - 4096, ..good },
            Submission { data: u64::MAX - 4095, ..good },
            Submission { op: 3, offset: 4096, length: 0, data: 0, ..good },
            Submission { op: 3, offset: 0, length: 4096, data: 0, ..good },
            Submission { op: 3, offset: 0, length: 0, data: 4096, ..good },
        ];
        for hostile in table {
            assert_eq!(check(&hostile, &g), Err(Refusal::Invalid), "{hostile:?}");
        }
    }

    #[test]
    fn an_index_is_below_the_number_of_entries() {
        assert_eq!(index_of(63, 64), Some(63));
        assert_eq!(index_of(9 << 32 | 5, 64), Some(5));
        assert_eq!(index_of(64, 64), None);
        assert_eq!(index_of(u64::MAX, 4096), None);
    }
}
