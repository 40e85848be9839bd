//! What a hostile host keeps of blocks: also what lay there before.

use std::collections::BTreeMap;

/// Words in a block.
pub const BLOCK_WORDS: usize = 512;
/// A block as words.
pub type Block = [u64; BLOCK_WORDS];
/// Earlier contents kept of a place.
const KEPT: usize = 3;

/// The host's files, by handle and number of a block.
pub trait Store {
    /// What lies there; zeros where nothing was written.
    fn read(&mut self, handle: u32, block: u64) -> Block;

    /// Puts a block there.
    fn write(&mut self, handle: u32, block: u64, content: &Block);

    /// Something that lay there before: the `which`th of what is kept.
    fn older(&mut self, handle: u32, block: u64, which: usize) -> Option<Block>;

    /// Makes durable what was written.
    fn flush(&mut self, handle: u32);

    /// Whether the host has room for a write of so many bytes.
    fn has_room(&self, bytes: u64) -> bool {
        let _ = bytes;
        true
    }
}

/// Files in memory.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// Contents of each place, the newest last.
    blocks: BTreeMap<(u32, u64), Vec<Box<Block>>>,
}

impl Store for Memory {
    fn read(&mut self, handle: u32, block: u64) -> Block {
        let found = self.blocks.get(&(handle, block)).and_then(|all| all.last());
        found.map_or([0; BLOCK_WORDS], |content| **content)
    }

    fn write(&mut self, handle: u32, block: u64, content: &Block) {
        let all = self.blocks.entry((handle, block)).or_default();
        if all.len() > KEPT {
            let mut oldest = all.remove(0);
            *oldest = *content;
            all.push(oldest);
        } else {
            all.push(Box::new(*content));
        }
    }

    fn older(&mut self, handle: u32, block: u64, which: usize) -> Option<Block> {
        let (_, before) = self.blocks.get(&(handle, block))?.split_last()?;
        before.get(which % before.len().max(1)).map(|content| **content)
    }

    fn flush(&mut self, _: u32) {}
}
