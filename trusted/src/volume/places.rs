//! Places of the host file that a checkpoint gives out or takes back: two bytes each, by region of
//! the space map, which is how the map wants them.

use alloc::{collections::BTreeMap, vec::Vec};

use super::layout::REGION;

/// Some places, in no order within a region.
#[derive(Default)]
pub(crate) struct Places(BTreeMap<u64, Vec<u16>>);

const _: () = assert!(REGION <= 1 << 16);

impl Places {
    /// Adds a place.
    pub(crate) fn push(&mut self, place: u64) {
        // Below REGION, see above.
        self.0.entry(place / REGION).or_default().push((place % REGION) as u16);
    }

    /// Takes a place out; answers whether it was there.
    pub(crate) fn take(&mut self, place: u64) -> bool {
        let Some(offsets) = self.0.get_mut(&(place / REGION)) else { return false };
        let at = offsets.iter().position(|offset| u64::from(*offset) == place % REGION);
        if let Some(at) = at {
            offsets.swap_remove(at);
            if offsets.is_empty() {
                self.0.remove(&(place / REGION));
            }
        }
        at.is_some()
    }

    /// Drops the places for which `stays` does not hold.
    pub(crate) fn retain(&mut self, mut stays: impl FnMut(u64) -> bool) {
        self.0.retain(|region, offsets| {
            offsets.retain(|offset| stays(region * REGION + u64::from(*offset)));
            !offsets.is_empty()
        });
    }

    /// The first region from `region` on that has any.
    pub(crate) fn next_region(&self, region: u64) -> Option<u64> {
        self.0.range(region..).next().map(|(region, _)| *region)
    }

    /// The places of a region, as distances from its beginning.
    pub(crate) fn of(&self, region: u64) -> &[u16] {
        self.0.get(&region).map_or(&[], Vec::as_slice)
    }

    /// All places.
    pub(crate) fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.0.iter().flat_map(|(region, offsets)| {
            offsets.iter().map(move |offset| region * REGION + u64::from(*offset))
        })
    }
}

impl Extend<u64> for Places {
    fn extend<T: IntoIterator<Item = u64>>(&mut self, places: T) {
        places.into_iter().for_each(|place| self.push(place));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_found_by_region_and_taken_out_once() {
        let all = [3, REGION - 1, REGION, 5 * REGION + 7, 3 + REGION, 40_000_000_000];
        let mut places = Places::default();
        places.extend(all);
        let mut sorted: Vec<u64> = places.iter().collect();
        sorted.sort_unstable();
        let mut expected = all.to_vec();
        expected.sort_unstable();
        assert_eq!(sorted, expected);
        assert_eq!((places.next_region(0), places.next_region(2)), (Some(0), Some(5)));
        assert_eq!((places.of(1), places.of(2)), (&[0, 3][..], &[][..]));
        assert!(places.take(5 * REGION + 7) && !places.take(5 * REGION + 7) && !places.take(9));
        assert_eq!(places.next_region(2), Some(40_000_000_000 / REGION));
        places.retain(|place| place < REGION);
        assert_eq!((places.iter().count(), places.next_region(1)), (2, None));
    }
}
