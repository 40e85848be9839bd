//! Which places may be given out now: the allocator, in memory.
//!
//! A place is free when the durable space map says so and nothing named it since. Holds (rule R1):
//! what an interval released is given out again only when the checkpoint after it is durable, so
//! everything that a recovery could still reach is intact. Pages of the map are brought in by
//! [`super::spacemap`]; a place whose page is not here is not given out.

use alloc::{
    boxed::Box,
    collections::{BTreeMap, BTreeSet},
    vec::Vec,
};

use super::layout::{FANOUT, Geometry, Ptr, REGION};

/// One bit per block of a region; set: in use.
pub(crate) type Bitmap = [u64; (REGION / 64) as usize];

/// Regions kept in memory: 256 × at most 16 KiB = 4 MiB.
pub(crate) const MAX_LOADED: usize = 256;
/// From this many blocks on a write looks for one contiguous run.
const RUN: u64 = 16;

/// A contiguous piece of the host file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) place: u64,
    pub(crate) count: u64,
}

/// Why nothing could be given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    /// The page of this region must be brought in first.
    Page(u64),
    /// No page in memory has a free place: bring in any that has.
    More,
}

#[derive(Default)]
struct Region {
    /// As of the durable superblock; `None` when the page must be read again.
    durable: Option<Box<Bitmap>>,
    /// Given out since the cut.
    active: Option<Box<Bitmap>>,
    /// Given out in the interval that a running checkpoint writes down.
    frozen: Option<Box<Bitmap>>,
    free: u64,
}

fn empty() -> Box<Bitmap> {
    Box::new([0; (REGION / 64) as usize])
}

fn ones(map: &Bitmap) -> u64 {
    map.iter().map(|word| u64::from(word.count_ones())).sum()
}

impl Region {
    fn used(&self, word: usize) -> u64 {
        let bits = |map: &Option<Box<Bitmap>>| map.as_ref().map_or(0, |m| m[word]);
        self.durable.as_ref().map_or(u64::MAX, |m| m[word])
            | bits(&self.active)
            | bits(&self.frozen)
    }

    fn recount(&mut self) {
        self.free =
            (0..(REGION / 64) as usize).map(|w| u64::from(self.used(w).count_zeros())).sum();
    }

    /// First free run in bits `from..to`, at most `max` long.
    fn first_run(&self, from: u64, to: u64, max: u64) -> Option<(u64, u64)> {
        let start = self.next(from, to, false)?;
        let end = self.next(start, to.min(start + max), true).unwrap_or(to.min(start + max));
        Some((start, end - start))
    }

    /// First bit in `from..to` that is set (`used`) or clear.
    fn next(&self, from: u64, to: u64, used: bool) -> Option<u64> {
        let mut at = from;
        while at < to {
            let word = self.used((at / 64) as usize);
            let word = if used { word } else { !word } >> (at % 64);
            if word != 0 {
                let found = at + u64::from(word.trailing_zeros());
                return (found < to).then_some(found);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }
}

fn set(map: &mut Bitmap, from: u64, count: u64, value: bool) {
    for bit in from..from + count {
        let mask = 1 << (bit % 64);
        if value {
            map[(bit / 64) as usize] |= mask;
        } else {
            map[(bit / 64) as usize] &= !mask;
        }
    }
}

/// The allocator's state.
pub(crate) struct Space {
    geometry: Geometry,
    regions: BTreeMap<u64, Region>,
    /// Places named by a replayed journal whose pages are not here: (active, frozen).
    named: (BTreeMap<u64, Vec<u16>>, BTreeMap<u64, Vec<u16>>),
    /// Free blocks of the durable map.
    free_durable: u64,
    busy_active: u64,
    busy_frozen: u64,
    /// Root of the durable space map.
    pub(crate) root: Ptr,
    /// Regions whose page could not be had: nothing is given out there, nothing is written down.
    pub(crate) bad: BTreeSet<u64>,
    /// How often the host failed on the page of a region.
    failures: BTreeMap<u64, u32>,
    /// Counts up when `root` changes.
    pub(crate) version: u64,
    /// Where the search for places away from home goes on.
    cursor: u64,
    /// Places from here on are not given out: the end of the host file, or where a shrink will
    /// cut it off.
    limit: u64,
    /// Blocks from `limit` on that could hold something: not counted as available.
    fenced: u64,
    /// No run longer than this is free in the pages in memory: spares searching all of them
    /// again and again on a fragmented volume. Only a checkpoint or another page can make one.
    longest: u64,
}

impl Space {
    pub(crate) fn new(geometry: Geometry, root: Ptr, free_durable: u64) -> Self {
        let homes = geometry.capacity.div_ceil(FANOUT) * geometry.home_stride;
        Self {
            geometry,
            regions: BTreeMap::new(),
            named: Default::default(),
            free_durable,
            busy_active: 0,
            busy_frozen: 0,
            root,
            bad: BTreeSet::new(),
            failures: BTreeMap::new(),
            version: 0,
            cursor: geometry.home_start + homes,
            limit: geometry.host_blocks,
            fenced: 0,
            longest: REGION,
        }
    }

    /// Blocks that can be given out, pages in memory or not.
    pub(crate) fn available(&self) -> u64 {
        self.free_durable.saturating_sub(self.busy_active + self.busy_frozen + self.fenced)
    }

    /// Gives out nothing from `limit` on any more. What is free there is no longer counted, and
    /// neither is as much again as is still in use there.
    pub(crate) fn fence(&mut self, limit: u64) {
        self.limit = limit;
        self.fenced =
            self.geometry.general() - Geometry { host_blocks: limit, ..self.geometry }.general();
        self.longest = REGION;
    }

    /// Regions that places are given out of.
    pub(crate) const fn regions(&self) -> u64 {
        self.limit.div_ceil(REGION)
    }

    /// Blocks given out that the durable map does not know.
    pub(crate) fn busy(&self) -> u64 {
        self.busy_active + self.busy_frozen
    }

    pub(crate) fn is_loaded(&self, region: u64) -> bool {
        self.regions.get(&region).is_some_and(|r| r.durable.is_some())
    }

    /// Whether a region's places were given out since the last durable checkpoint.
    pub(crate) fn is_touched(&self, region: u64) -> bool {
        self.regions.get(&region).is_some_and(|r| r.active.is_some() || r.frozen.is_some())
    }

    /// Counts that the host failed on the page of `region`; how often it did.
    pub(crate) fn fails(&mut self, region: u64) -> u32 {
        let count = self.failures.entry(region).or_default();
        *count += 1;
        *count
    }

    /// A copy of the durable bitmap of a region in memory.
    pub(crate) fn durable(&self, region: u64) -> Option<Box<Bitmap>> {
        self.regions.get(&region)?.durable.clone()
    }

    /// Takes in the durable page of a region.
    pub(crate) fn load(&mut self, number: u64, durable: Box<Bitmap>) {
        if self.regions.len() >= MAX_LOADED && !self.regions.contains_key(&number) {
            let clean = self
                .regions
                .iter()
                .filter(|(_, r)| r.active.is_none() && r.frozen.is_none())
                .min_by_key(|(_, r)| r.free)
                .map(|(number, _)| *number);
            if let Some(clean) = clean {
                self.regions.remove(&clean);
            }
        }
        let region = self.regions.entry(number).or_default();
        for (bits, named, busy) in [
            (&mut region.active, &mut self.named.0, &mut self.busy_active),
            (&mut region.frozen, &mut self.named.1, &mut self.busy_frozen),
        ] {
            // Bits the durable map has now were counted as busy until here.
            if let Some(bits) = bits {
                let before = ones(bits);
                bits.iter_mut().zip(durable.iter()).for_each(|(a, d)| *a &= !d);
                *busy = busy.saturating_sub(before - ones(bits));
            }
            if let Some(named) = named.remove(&number) {
                let bits = bits.get_or_insert_with(empty);
                let before = ones(bits);
                for &bit in &named {
                    set(bits, u64::from(bit), 1, true);
                }
                bits.iter_mut().zip(durable.iter()).for_each(|(a, d)| *a &= !d);
                *busy = (*busy + ones(bits)).saturating_sub(before + named.len() as u64);
            }
        }
        region.durable = Some(durable);
        region.recount();
        self.longest = REGION;
    }

    /// Declares places that a replayed journal names: not to be given out in this interval.
    pub(crate) fn name(&mut self, place: u64) {
        if self.geometry.is_general(place) {
            let named = self.named.0.entry(place / REGION).or_default();
            let bit = (place % REGION) as u16;
            if !named.contains(&bit) {
                named.push(bit);
                self.busy_active += 1;
            }
        }
    }

    /// Keeps a place of the interval that is written down from being released with it.
    pub(crate) fn keep(&mut self, place: u64) {
        match self.regions.get_mut(&(place / REGION)) {
            Some(region) => {
                set(region.active.get_or_insert_with(empty), place % REGION, 1, true);
                self.busy_active += 1;
            }
            None => self.name(place),
        }
    }

    fn take(&mut self, run: Run) -> Run {
        if let Some(region) = self.regions.get_mut(&(run.place / REGION)) {
            let bits = region.active.get_or_insert_with(empty);
            set(bits, run.place % REGION, run.count, true);
            region.free -= run.count;
            self.busy_active += run.count;
        }
        run
    }

    /// Gives back places that were never named in a journal block or node.
    pub(crate) fn give_back(&mut self, run: Run) {
        if let Some(region) = self.regions.get_mut(&(run.place / REGION))
            && let Some(bits) = region.active.as_mut()
        {
            set(bits, run.place % REGION, run.count, false);
            region.free += run.count;
            self.busy_active -= run.count;
            self.longest = REGION;
        }
    }

    /// First free run of exactly `least..=most` blocks in places `from..to` of pages in memory.
    fn search(&self, from: u64, to: u64, least: u64, most: u64) -> Result<Option<Run>, u64> {
        let mut at = from;
        while at < to {
            let number = at / REGION;
            let end = to.min((number + 1) * REGION);
            let base = number * REGION;
            let region = match self.regions.get(&number) {
                Some(region) if region.durable.is_some() => region,
                _ => return Err(number),
            };
            let mut bit = at - base;
            while region.free >= least
                && let Some((start, count)) = region.first_run(bit, end - base, most)
            {
                if count >= least {
                    return Ok(Some(Run { place: base + start, count }));
                }
                bit = start + count;
            }
            at = end;
        }
        Ok(None)
    }

    /// Gives out a free run of `least..=most` blocks in `from..to`, to be given back: not to hold
    /// anything.
    pub(crate) fn claim(&mut self, from: u64, to: u64, least: u64, most: u64) -> Option<Run> {
        let run = self.search(from, to.min(self.limit), least, most).ok().flatten()?;
        Some(self.take(run))
    }

    /// Searches all pages in memory, from the cursor on, around.
    fn anywhere(&mut self, least: u64, most: u64) -> Option<Run> {
        if least > self.longest {
            return None;
        }
        let found = self.search_around(least, most);
        if found.is_none() {
            self.longest = least - 1;
        }
        found
    }

    fn search_around(&mut self, least: u64, most: u64) -> Option<Run> {
        let (low, high) = (self.geometry.home_start, self.limit);
        let here = self.cursor.clamp(low, high - 1);
        let first = here / REGION;
        let numbers: [_; 2] = [first..self.regions(), 0..first + 1];
        for number in numbers.into_iter().flatten() {
            let from = (number * REGION).max(if number == first { here } else { low }).max(low);
            let to = ((number + 1) * REGION).min(high);
            if !self.regions.contains_key(&number) {
                continue;
            }
            if let Ok(Some(run)) = self.search(from, to, least, most) {
                self.cursor = run.place + run.count;
                return Some(self.take(run));
            }
        }
        // The part of the first region before the cursor.
        let found = self.search((first * REGION).max(low), here, least, most);
        let run = found.ok().flatten()?;
        self.cursor = run.place + run.count;
        Some(self.take(run))
    }

    /// Gives out up to `count` contiguous places for guest blocks from `block` on: at home, where
    /// they were first written, if there is room; else anywhere.
    pub(crate) fn data(&mut self, block: u64, count: u64) -> Result<Run, Want> {
        let g = &self.geometry;
        let home = g.home(block);
        let at_home = count.min(FANOUT - block % FANOUT);
        let wanted = home + block % FANOUT;
        let near = [
            (wanted, wanted + at_home, at_home),
            (home, home + g.home_stride, count),
            (home, home + g.home_stride, 1),
            (home + g.home_stride, home + 2 * g.home_stride, count),
            (home.saturating_sub(g.home_stride).max(g.home_start), home, count),
        ];
        let end = self.limit;
        for (step, (from, to, least)) in near.into_iter().enumerate() {
            if step > 0 && count >= RUN {
                break;
            }
            match self.search(from, to.min(end), least, count) {
                Ok(Some(run)) => return Ok(self.take(run)),
                Err(region) if self.regions.len() < MAX_LOADED => return Err(Want::Page(region)),
                _ => {}
            }
        }
        self.anywhere(count, count)
            .or_else(|| self.anywhere(count.min(RUN / 2), count))
            .or_else(|| self.anywhere(1, count))
            .ok_or(Want::More)
    }

    /// Gives out up to `count` contiguous places for nodes of a checkpoint: from the places that
    /// were written at format, else anywhere.
    pub(crate) fn nodes(&mut self, count: u64) -> Result<Run, Want> {
        let (from, to) = (self.geometry.reserve_start, self.geometry.home_start);
        match self.search(from, to, 1, count) {
            Ok(Some(run)) => Ok(self.take(run)),
            Err(region) if self.regions.len() < MAX_LOADED => Err(Want::Page(region)),
            _ => self.anywhere(1, count).ok_or(Want::More),
        }
    }

    /// The cut of a checkpoint: everything given out until now belongs to the interval that is
    /// written down, except what is `in_flight`.
    pub(crate) fn cut(&mut self, in_flight: impl Iterator<Item = Run>) {
        for region in self.regions.values_mut() {
            region.frozen = region.active.take();
        }
        self.named.1 = core::mem::take(&mut self.named.0);
        self.busy_frozen = core::mem::take(&mut self.busy_active);
        for run in in_flight {
            if let Some(region) = self.regions.get_mut(&(run.place / REGION))
                && let Some(frozen) = region.frozen.as_mut()
            {
                set(frozen, run.place % REGION, run.count, false);
                set(region.active.get_or_insert_with(empty), run.place % REGION, run.count, true);
                self.busy_frozen -= run.count;
                self.busy_active += run.count;
            }
        }
    }

    /// The checkpoint is durable: its pages are the map now, and what its interval released is
    /// free. `changed` has all regions whose page changed, with the page where it was kept.
    pub(crate) fn complete(
        &mut self,
        changed: BTreeMap<u64, Option<Box<Bitmap>>>,
        root: Ptr,
        free_durable: u64,
    ) {
        for region in self.regions.values_mut() {
            region.frozen = None;
        }
        self.named.1.clear();
        self.busy_frozen = 0;
        for (number, page) in changed {
            if let Some(region) = self.regions.get_mut(&number) {
                region.durable = page;
            }
        }
        let mut busy = self.named.0.values().map(|bits| bits.len() as u64).sum();
        self.regions.retain(|_, region| {
            if let (Some(durable), Some(active)) = (&region.durable, &mut region.active) {
                active.iter_mut().zip(durable.iter()).for_each(|(a, d)| *a &= !d);
            }
            region.active = region.active.take().filter(|active| {
                let count = ones(active);
                busy += count;
                count > 0
            });
            region.recount();
            region.durable.is_some() || region.active.is_some()
        });
        self.busy_active = busy;
        self.free_durable = free_durable;
        self.root = root;
        self.version += 1;
        self.longest = REGION;
    }

    /// Runs of places that were given out in the interval that was written down, and that the map
    /// does not name after it: overwritten before it was written. `changed` as for
    /// [`Self::complete`], which comes next.
    pub(crate) fn unnamed(&self, changed: &BTreeMap<u64, Option<Box<Bitmap>>>) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (number, region) in &self.regions {
            let durable = match changed.get(number) {
                Some(page) => page.as_ref(),
                None => region.durable.as_ref(),
            };
            let (Some(durable), Some(frozen)) = (durable, &region.frozen) else { continue };
            for (n, (frozen, durable)) in (0..).zip(frozen.iter().zip(durable.iter())) {
                let active = region.active.as_ref().map_or(0, |active| active[n as usize]);
                let mut bits = frozen & !durable & !active;
                let base = number * REGION + n * 64;
                while bits != 0 {
                    let start = u64::from(bits.trailing_zeros());
                    let count = u64::from((bits >> start).trailing_ones());
                    bits &= u64::MAX.checked_shl((start + count) as u32).unwrap_or(0);
                    match runs.last_mut() {
                        Some((_, end)) if *end == base + start => *end += count,
                        _ => runs.push((base + start, base + start + count)),
                    }
                }
            }
        }
        runs.retain(|(start, _)| *start >= self.geometry.home_start);
        runs
    }

    /// The checkpoint was given up: its interval goes on.
    pub(crate) fn abort(&mut self) {
        for region in self.regions.values_mut() {
            if let Some(frozen) = region.frozen.take() {
                let active = region.active.get_or_insert_with(empty);
                active.iter_mut().zip(frozen.iter()).for_each(|(a, f)| *a |= f);
            }
        }
        for (number, bits) in core::mem::take(&mut self.named.1) {
            self.named.0.entry(number).or_default().extend(bits);
        }
        self.busy_active += core::mem::take(&mut self.busy_frozen);
    }

    /// A canary for the tests: blocks become free as soon as they are superseded.
    #[cfg(test)]
    pub(crate) fn forget(&mut self, place: u64) {
        if let Some(region) = self.regions.get_mut(&(place / REGION)) {
            let maps = [&mut region.durable, &mut region.active, &mut region.frozen];
            maps.into_iter().flatten().for_each(|bits| set(bits, place % REGION, 1, false));
            self.longest = REGION;
            region.recount();
        }
    }
}

/// The bitmap of a region from which nothing was ever given out.
pub(crate) fn fresh(geometry: &Geometry, region: u64) -> Box<Bitmap> {
    let mut map = Box::new([u64::MAX; (REGION / 64) as usize]);
    let general = geometry.general_in(region);
    let start = region * REGION;
    let first = (start..start + REGION).find(|place| geometry.is_general(*place));
    if let Some(first) = first {
        set(&mut map, first - start, general, false);
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> Space {
        let geometry = Geometry::for_size(1 << 26).unwrap();
        let mut space = Space::new(geometry, Ptr::NULL, geometry.general());
        for region in 0..geometry.regions() {
            space.load(region, fresh(&geometry, region));
        }
        space
    }

    #[test]
    fn fresh_pages_have_as_many_free_blocks_as_the_geometry_says() {
        for size in [1_u64 << 16, 1 << 26, 1 << 33] {
            let geometry = Geometry::for_size(size).unwrap();
            for region in 0..geometry.regions() {
                let free = REGION - ones(&fresh(&geometry, region));
                assert_eq!(free, geometry.general_in(region), "size {size} region {region}");
            }
        }
    }

    #[test]
    fn a_first_sequential_write_is_laid_out_contiguously_in_its_home() {
        let mut space = space();
        let geometry = space.geometry;
        assert_eq!(space.data(0, 32), Ok(Run { place: geometry.home_start, count: 32 }));
        assert_eq!(space.data(32, 1), Ok(Run { place: geometry.home_start + 32, count: 1 }));
        assert_eq!(space.data(130, 4).unwrap().place, geometry.home_start + 160 + 2);
    }

    #[test]
    fn a_place_is_given_out_again_only_after_its_checkpoint_is_durable() {
        let mut space = space();
        let before = space.available();
        let run = space.data(5, 1).unwrap();
        let in_flight = space.data(6, 1).unwrap();
        space.cut(core::iter::once(in_flight));
        for _ in 0..300 {
            let other = space.data(5, 1).unwrap();
            assert!(other != run && other != in_flight);
        }
        space.complete(BTreeMap::new(), Ptr::NULL, before);
        assert_eq!(space.available(), before - 301);
        // Free again, and the first choice of its block.
        assert_eq!(space.data(5, 1), Ok(run));
        assert_ne!(space.data(6, 1), Ok(in_flight));
    }

    #[test]
    fn places_overwritten_before_their_checkpoint_are_unnamed_after_it() {
        let mut space = space();
        let home = space.geometry.home_start;
        let run = space.data(0, 100).unwrap();
        assert_eq!(run, Run { place: home, count: 100 });
        let in_flight = space.data(110, 1).unwrap();
        space.cut(core::iter::once(in_flight));
        let region = home / REGION;
        let mut page = space.durable(region).unwrap();
        // The checkpoint names 20 of them.
        set(&mut page, home % REGION + 30, 20, true);
        let changed = BTreeMap::from([(region, Some(page))]);
        assert_eq!(space.unnamed(&changed), [(home, home + 30), (home + 50, home + 100)]);
    }

    #[test]
    fn an_aborted_checkpoint_frees_nothing() {
        let mut space = space();
        let run = space.data(5, 1).unwrap();
        let available = space.available();
        space.cut(core::iter::empty());
        space.abort();
        assert_eq!(space.available(), available);
        assert_ne!(space.data(5, 1), Ok(run));
    }
}
