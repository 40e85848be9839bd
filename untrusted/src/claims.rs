//! What enclaves claim of their volumes: damage that they found, journal and checkpoints, space.
//!
//! Holds whatever an enclave tells: memory is bounded by the volumes that the daemon tells apart and
//! the files that are open; numbers do not wrap; a claim touches its own volume's numbers alone, and
//! nothing is decided on it. Does not hold: that it is true.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use postern_edl::{CLAIMS, COUNTED_CLAIMS};

/// One claim for each of [`CLAIMS`].
pub type Claim = [u64; CLAIMS.len()];

/// The claims of all enclaves, by number of the volume.
#[derive(Debug, Default)]
pub struct Claims(Mutex<BTreeMap<u64, Claim>>);

impl Claims {
    /// What was claimed of each volume since the daemon started; levels are those of the files that
    /// are open, together.
    #[must_use]
    pub fn all(&self) -> BTreeMap<u64, Claim> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, volume: u64, mut how: impl FnMut(usize, u64) -> u64) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let claim = all.entry(volume).or_default();
        for (at, value) in claim.iter_mut().enumerate() {
            *value = how(at, *value);
        }
    }
}

/// What was told of one open file. Dropped, its levels go; its counts stay.
#[derive(Debug)]
pub struct Told {
    claims: Arc<Claims>,
    volume: u64,
    last: Claim,
}

impl Told {
    /// Nothing yet, of a file of the volume with this number.
    #[must_use]
    pub const fn new(claims: Arc<Claims>, volume: u64) -> Self {
        Self { claims, volume, last: [0; CLAIMS.len()] }
    }

    /// Takes a claim in the place of the last one.
    pub fn tell(&mut self, claim: Claim) {
        let last = std::mem::replace(&mut self.last, claim);
        self.claims.change(self.volume, |at, total| {
            let (now, before) = (claim[at], last[at]);
            if at >= COUNTED_CLAIMS {
                total.saturating_sub(before).saturating_add(now)
            } else if now < before {
                // Opened anew under the same handle: it counts from nothing.
                total.saturating_add(now)
            } else {
                total.saturating_add(now - before)
            }
        });
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        let last = self.last;
        self.claims.change(self.volume, |at, total| {
            if at < COUNTED_CLAIMS { total } else { total.saturating_sub(last[at]) }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(count: u64, level: u64) -> Claim {
        std::array::from_fn(|at| if at < COUNTED_CLAIMS { count } else { level })
    }

    #[test]
    fn counts_add_up_over_openings_and_levels_are_those_of_what_is_open() {
        let claims = Arc::new(Claims::default());
        let of = |claims: &Claims| claims.all()[&3];
        let mut one = Told::new(Arc::clone(&claims), 3);
        one.tell(claim(5, 100));
        one.tell(claim(7, 90));
        let mut two = Told::new(Arc::clone(&claims), 3);
        two.tell(claim(1, 10));
        assert_eq!(of(&claims), claim(8, 100));
        drop(one);
        assert_eq!(of(&claims), claim(8, 10));
        // Another opening of the same file.
        two.tell(claim(0, 20));
        two.tell(claim(2, 20));
        assert_eq!(of(&claims), claim(10, 20));
        drop(two);
        assert_eq!(of(&claims), claim(10, 0));
    }

    #[test]
    fn an_enclave_that_claims_anything_neither_wraps_a_number_nor_touches_another_volume() {
        let claims = Arc::new(Claims::default());
        let mut honest = Told::new(Arc::clone(&claims), 1);
        honest.tell(claim(4, 4));
        let mut hostile = Told::new(Arc::clone(&claims), 2);
        for value in [u64::MAX, 0, u64::MAX, 1, u64::MAX] {
            hostile.tell(claim(value, value));
        }
        assert_eq!(claims.all()[&2], claim(u64::MAX, u64::MAX));
        drop(hostile);
        assert_eq!(claims.all()[&2], claim(u64::MAX, 0));
        assert_eq!(claims.all()[&1], claim(4, 4));
    }
}
