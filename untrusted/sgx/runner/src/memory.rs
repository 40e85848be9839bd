//! User memory: what lies outside the enclave and was allocated for it.
//!
//! Holds: bytes are read and written here only inside of one allocation that is alive while it is
//! done. The enclave may change them at any moment, so they are copied before anything is decided.

use core::ptr::NonNull;
use std::{
    alloc::{Layout, alloc_zeroed, dealloc},
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

/// The most bytes that one enclave gets.
const LIMIT: usize = 1 << 32;

/// One allocation.
struct Block {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the memory is nobody's in particular: it is touched by volatile copies alone.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and nobody has the block any more.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// Everything that is allocated for an enclave.
#[derive(Default)]
pub struct Memory {
    blocks: Mutex<Blocks>,
}

#[derive(Default)]
struct Blocks {
    /// By first address.
    by_start: BTreeMap<u64, Arc<Block>>,
    bytes: usize,
}

/// Memory that cannot be had, or is not the enclave's to name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotYours;

impl Memory {
    /// Allocates `size` zeroed bytes; answers the address.
    ///
    /// # Errors
    /// No such size or alignment, or too much.
    pub fn allocate(&self, size: usize, alignment: usize) -> Result<u64, NotYours> {
        if !alignment.is_power_of_two() {
            return Err(NotYours);
        }
        // What an enclave copies to and from is whole aligned words.
        let layout = Layout::from_size_align(size.max(1), alignment.max(8))
            .map_err(|_| NotYours)?
            .pad_to_align();
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        if layout.size() > LIMIT.saturating_sub(blocks.bytes) {
            return Err(NotYours);
        }
        // SAFETY: the layout has at least one byte.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(NotYours)?;
        blocks.bytes += layout.size();
        let address = start.as_ptr() as u64;
        blocks.by_start.insert(address, Arc::new(Block { start, layout }));
        Ok(address)
    }

    /// Gives an allocation back.
    ///
    /// # Errors
    /// It is none.
    pub fn free(&self, address: u64) -> Result<(), NotYours> {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let block = blocks.by_start.remove(&address).ok_or(NotYours)?;
        blocks.bytes -= block.layout.size();
        Ok(())
    }

    /// The allocation that these bytes lie in, and where in it they begin.
    fn find(&self, address: u64, length: usize) -> Result<(Arc<Block>, usize), NotYours> {
        let blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        let (start, block) = blocks.by_start.range(..=address).next_back().ok_or(NotYours)?;
        let at = usize::try_from(address - start).map_err(|_| NotYours)?;
        if block.layout.size().checked_sub(at).is_none_or(|room| room < length) {
            return Err(NotYours);
        }
        Ok((block.clone(), at))
    }

    /// Copies `length` bytes from there.
    ///
    /// # Errors
    /// They do not lie in one allocation.
    pub fn read(&self, address: u64, length: usize) -> Result<Vec<u8>, NotYours> {
        if length == 0 {
            return Ok(Vec::new());
        }
        let (block, at) = self.find(address, length)?;
        let mut bytes = vec![0; length];
        // SAFETY: the block has these bytes and lives until `block` goes. The enclave may write them
        // meanwhile, from code that the compiler does not know; what is copied is then any bytes.
        unsafe {
            block.start.add(at).copy_to_nonoverlapping(NonNull::from(&mut bytes[..]).cast(), length)
        };
        Ok(bytes)
    }

    /// Copies `bytes` to there.
    ///
    /// # Errors
    /// There is no room in one allocation.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<(), NotYours> {
        if bytes.is_empty() {
            return Ok(());
        }
        let (block, at) = self.find(address, bytes.len())?;
        // SAFETY: as in `read`.
        unsafe {
            block.start.add(at).copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len())
        };
        Ok(())
    }

    /// Whether these bytes lie in one allocation.
    ///
    /// # Errors
    /// They do not.
    pub fn check(&self, address: u64, length: usize) -> Result<(), NotYours> {
        if length == 0 { Ok(()) } else { self.find(address, length).map(|_| ()) }
    }

    /// Allocates room for `bytes` and writes a descriptor of it (address, length) to `descriptor`.
    ///
    /// # Errors
    /// The descriptor is not in memory of the enclave's, or there is no more.
    pub fn give(&self, descriptor: u64, bytes: &[u8]) -> Result<(), NotYours> {
        self.check(descriptor, 16)?;
        let address = self.allocate(bytes.len(), 1)?;
        self.write(address, bytes)?;
        self.write(descriptor, &address.to_le_bytes())?;
        self.write(descriptor + 8, &(bytes.len() as u64).to_le_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_allocated_can_be_read_and_written() {
        let memory = Memory::default();
        let address = memory.allocate(100, 1).unwrap();
        memory.write(address + 90, b"0123456789").unwrap();
        assert_eq!(memory.read(address + 95, 5), Ok(b"56789".to_vec()));
        assert_eq!(memory.read(address, 200), Err(NotYours));
        assert_eq!(memory.read(address - 1, 1), Err(NotYours));
        assert_eq!(memory.read(u64::MAX, 1), Err(NotYours));
        assert_eq!(memory.write(8, b"x"), Err(NotYours));
        assert_eq!(memory.free(address + 1), Err(NotYours));
        assert_eq!(memory.free(address), Ok(()));
        assert_eq!(memory.free(address), Err(NotYours));
        assert_eq!(memory.read(address, 1), Err(NotYours));
    }

    #[test]
    fn sizes_that_nothing_has_are_refused() {
        let memory = Memory::default();
        assert_eq!(memory.allocate(usize::MAX, 1), Err(NotYours));
        assert_eq!(memory.allocate(1, 3), Err(NotYours));
        assert_eq!(memory.allocate(LIMIT + 8, 8), Err(NotYours));
    }
}
