//! What a file may read as, by sectors of 512 bytes. Shares nothing with the volume's code.
//!
//! Each sector has a history of writes with the times of their submission and completion. A write
//! is out of the question when another one was submitted after it had completed, and that one has
//! completed (live) or was synced (after a crash).

use alloc::{vec, vec::Vec};

pub(super) const SECTOR: u64 = 512;

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// What the sector is then: 0 is zeros.
    id: u32,
    submitted: u64,
    /// When it could no more take effect.
    ended: Option<u64>,
    /// It is known to have taken effect.
    done: bool,
    synced: bool,
    /// A death of the guest alone does not undo it.
    published: bool,
}

/// A write (or truncate, punch) of sectors.
pub(super) struct Op {
    pub(super) first: u64,
    pub(super) count: u64,
    id: u32,
    submitted: u64,
}

pub(super) struct Model {
    sectors: Vec<Vec<Entry>>,
    /// Sizes that the file may have after a crash, the last one is what it has now.
    sizes: Vec<u64>,
    /// Sizes forgotten before those.
    forgotten: usize,
    time: u64,
    next: u32,
    /// Since the last check the host has lost nothing that had completed.
    kept: bool,
}

/// What sector `index` holds when write `id` wrote it.
pub(super) fn content(id: u32, index: u64) -> [u8; SECTOR as usize] {
    let mut out = [0; SECTOR as usize];
    if id != 0 {
        for (i, word) in out.chunks_exact_mut(8).enumerate() {
            let n =
                (u64::from(id) << 32 | index << 8 | i as u64).wrapping_mul(0x2545_f491_4f6c_dd1d);
            word.copy_from_slice(&n.to_le_bytes());
        }
        out[..4].copy_from_slice(&id.to_le_bytes());
    }
    out
}

fn id_of(bytes: &[u8], index: u64) -> Option<u32> {
    let mut id = [0; 4];
    id.copy_from_slice(&bytes[..4]);
    let id = u32::from_le_bytes(id);
    (bytes == content(id, index)).then_some(id)
}

impl Model {
    pub(super) fn new(sectors: u64) -> Self {
        let zero = Entry {
            id: 0,
            submitted: 0,
            ended: Some(0),
            done: true,
            synced: true,
            published: true,
        };
        Self {
            sectors: vec![vec![zero]; sectors as usize],
            sizes: vec![sectors * SECTOR],
            forgotten: 0,
            time: 1,
            next: 1,
            kept: true,
        }
    }

    pub(super) fn now(&mut self) -> u64 {
        self.time += 1;
        self.time
    }

    pub(super) fn size(&self) -> u64 {
        *self.sizes.last().unwrap()
    }

    pub(super) fn sectors(&self) -> u64 {
        self.sectors.len() as u64
    }

    /// A write begins; its bytes.
    pub(super) fn write(&mut self, first: u64, count: u64) -> (Op, Vec<u8>) {
        let id = self.next;
        self.next += 1;
        let bytes = (first..first + count).flat_map(|index| content(id, index)).collect();
        (self.begin(first, count, id), bytes)
    }

    /// Something that zeroes sectors begins.
    pub(super) fn zero(&mut self, first: u64, count: u64) -> Op {
        self.begin(first, count, 0)
    }

    fn begin(&mut self, first: u64, count: u64, id: u32) -> Op {
        let submitted = self.now();
        for sector in &mut self.sectors[first as usize..(first + count) as usize] {
            sector.push(Entry {
                id,
                submitted,
                ended: None,
                done: false,
                synced: false,
                published: false,
            });
        }
        Op { first, count, id, submitted }
    }

    /// It has ended; the first `done` sectors are known to have been changed.
    pub(super) fn end(&mut self, op: &Op, done: u64) {
        let now = self.now();
        for (n, index) in (op.first..op.first + op.count).enumerate() {
            let sector = &mut self.sectors[index as usize];
            for entry in sector.iter_mut() {
                if entry.submitted == op.submitted && entry.id == op.id {
                    entry.ended = Some(now);
                    entry.done = (n as u64) < done;
                }
            }
            // What can never be seen again, not even by a read under way, is forgotten.
            if sector.len() > 40 {
                let all = sector.clone();
                let long_ago = |o: &Entry| o.ended.is_some_and(|ended| ended + 500 < now);
                sector.retain(|e| {
                    !all.iter().any(|o| o.synced && o.done && after(o, e) && long_ago(o))
                });
            }
        }
    }

    /// The size may change to `size`.
    pub(super) fn resizing(&mut self, size: u64) {
        let now = self.size();
        self.sizes.push(size);
        self.sizes.push(now);
    }

    /// It has changed.
    pub(super) fn resized(&mut self, size: u64) {
        self.sizes.push(size);
    }

    /// Everything that had completed at `at` is synced; so is the size as it was then.
    pub(super) fn synced(&mut self, at: u64, sizes: usize) {
        for sector in &mut self.sectors {
            for entry in sector.iter_mut() {
                if entry.done && entry.ended.is_some_and(|ended| ended < at) {
                    entry.synced = true;
                }
            }
        }
        let settled = sizes.saturating_sub(self.forgotten + 1);
        self.sizes.drain(..settled);
        self.forgotten += settled;
    }

    /// Everything that has completed is in the journal on the host.
    pub(super) fn published(&mut self) {
        for entry in self.sectors.iter_mut().flatten() {
            entry.published |= entry.done;
        }
    }

    /// What the host had not made durable may be gone.
    pub(super) fn power_lost(&mut self) {
        self.kept = false;
    }

    /// For [`Self::synced`]: the time, and how many sizes there were.
    pub(super) fn sync_point(&mut self) -> (u64, usize) {
        (self.now(), self.forgotten + self.sizes.len())
    }

    /// Checks what a read that began at `began` and has just ended gave.
    pub(super) fn check_read(&mut self, began: u64, first: u64, bytes: &[u8]) {
        let now = self.now();
        for (n, data) in bytes.chunks_exact(SECTOR as usize).enumerate() {
            let index = first + n as u64;
            let sector = &self.sectors[index as usize];
            let id = id_of(data, index)
                .unwrap_or_else(|| panic!("sector {index} reads as bytes nobody wrote"));
            let allowed = sector.iter().any(|e| {
                e.id == id
                    && e.submitted < now
                    && !sector
                        .iter()
                        .any(|o| o.done && after(o, e) && o.ended.is_some_and(|t| t < began))
            });
            assert!(allowed, "sector {index} reads as write {id}, history {sector:?}");
        }
    }

    /// Checks what the file is after a crash, and takes it for what it is from now on.
    pub(super) fn check_crash(&mut self, size: u64, bytes: &[u8]) {
        assert!(self.sizes.contains(&size), "size {size} after a crash, may be {:?}", self.sizes);
        for (index, sector) in (0_u64..).zip(&mut self.sectors) {
            let at = (index * SECTOR) as usize;
            let id = if (at as u64) < size {
                let data = &bytes[at..at + SECTOR as usize];
                let id = id_of(data, index)
                    .unwrap_or_else(|| panic!("sector {index} reads as bytes nobody wrote"));
                let kept = self.kept;
                let holds = |o: &Entry| o.synced || kept && o.done && o.published;
                let allowed = sector
                    .iter()
                    .any(|e| e.id == id && !sector.iter().any(|o| holds(o) && after(o, e)));
                assert!(allowed, "sector {index} reads as write {id} after a crash: {sector:?}");
                id
            } else {
                0
            };
            let settled = Entry {
                id,
                submitted: 0,
                ended: Some(0),
                done: true,
                synced: true,
                published: true,
            };
            *sector = vec![settled];
        }
        self.sizes = vec![size];
        self.forgotten = 0;
        self.kept = true;
    }
}

/// Whether `o` began after `e` had ended.
fn after(o: &Entry, e: &Entry) -> bool {
    e.ended.is_some_and(|ended| o.submitted > ended)
}
