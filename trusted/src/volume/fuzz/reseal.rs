//! Taking structures apart and sealing them again, as only someone with the keys can.

use alloc::{boxed::Box, vec::Vec};

use super::base::Base;
use crate::{
    disk::Block,
    volume::{
        crypto::{EpochKey, Kind, SINGLE, Salt, Tag, VolumeKey, aad},
        jblock,
        layout::{FANOUT, Ptr, RING_START, SUPERBLOCKS, get_array, get32, get64, put},
        spacemap,
        superblock::Epoch,
    },
};

/// The trees that a superblock names.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Tree {
    Map,
    Space,
    Epochs,
}

/// The ring of the base volumes.
const RING: core::ops::Range<u64> = RING_START..RING_START + 64;

fn superblock_aad(bytes: &Block, slot: usize) -> [u8; 32] {
    let mut aad = [0; 32];
    aad[..24].copy_from_slice(&bytes[40..64]);
    aad[24] = slot as u8;
    aad
}

/// One step of a way from a root to a node.
struct Step {
    ptr: Ptr,
    level: u32,
    index: u64,
    node: Box<Block>,
    /// Byte of the next step's pointer in this node.
    next: usize,
}

impl Tree {
    /// Byte of the root's pointer in the superblock, and the tree's levels.
    fn root(self, superblock: &Block) -> (usize, u32) {
        match self {
            Self::Map => (176, get32(superblock, 208)),
            Self::Space => (224, 4),
            Self::Epochs => (256, get32(superblock, 212)),
        }
    }

    /// First byte and number of a node's entries.
    const fn entries(self) -> (usize, u64) {
        match self {
            Self::Map | Self::Space => (0, FANOUT),
            Self::Epochs => (32, 127),
        }
    }

    fn place(self, ptr: &Ptr, level: u32, index: u64) -> u64 {
        match self {
            Self::Map | Self::Epochs => ptr.place(),
            Self::Space => spacemap::place(level, index, ptr.word >> 39 & 1),
        }
    }
}

/// The keys that the structures of one volume are sealed with.
struct Keys {
    volume: VolumeKey,
    epochs: Vec<EpochKey>,
}

impl Keys {
    fn epoch(&self, id: u32) -> &EpochKey {
        match self.epochs.iter().find(|key| key.id == id) {
            Some(key) => key,
            None => panic!("the base volume has no epoch {id}"),
        }
    }

    /// Opens, or seals, a node in place.
    fn node(&self, tree: Tree, step: &mut Step, seal: bool) {
        let (level, index) = (step.level as u8, step.index);
        let opened = match tree {
            Tree::Epochs => {
                let salt: Salt = get_array(&step.node[..], 0);
                let key = self.volume.single(b"postern/1 epoch table", &salt);
                let mut aad = aad(Kind::Journal, level, index);
                aad[0] = 5;
                let body = &mut step.node[32..];
                if seal {
                    step.ptr.tag = key.seal(SINGLE, &aad, body);
                    return;
                }
                key.open(SINGLE, &aad, &step.ptr.tag, body)
            }
            Tree::Map | Tree::Space => {
                let kind = if tree == Tree::Map { Kind::Node } else { Kind::Space };
                let (key, order) = (self.epoch(step.ptr.order.epoch()), step.ptr.order);
                let aad = aad(kind, level, index);
                if seal {
                    step.ptr.tag = key.seal(kind, order, &aad, &mut step.node[..]);
                    return;
                }
                key.open(kind, order, &aad, &step.ptr.tag, &mut step.node[..])
            }
        };
        assert!(opened.is_ok(), "a node of the base volume does not open");
    }
}

impl Base {
    /// Slot and plaintext of the newest superblock.
    fn superblock(&self, key: &VolumeKey) -> (usize, Block) {
        let open = |slot: usize| {
            let mut block = self.block(SUPERBLOCKS[slot][0]);
            let single = key.single(b"postern/1 superblock", &get_array(&block, 0));
            let (aad, tag) = (superblock_aad(&block, slot), get_array(&block, 24));
            single.open(SINGLE, &aad, &tag, &mut block[64..]).ok()?;
            Some((slot, block))
        };
        let newest = [0, 1].into_iter().filter_map(open).max_by_key(|(_, block)| get64(block, 64));
        match newest {
            Some(found) => found,
            None => panic!("the base volume has no superblock"),
        }
    }

    fn put_superblock(&mut self, key: &VolumeKey, slot: usize, mut block: Block) {
        super::FORGED.set(true);
        let single = key.single(b"postern/1 superblock", &get_array(&block, 0));
        let aad = superblock_aad(&block, slot);
        let tag = single.seal(SINGLE, &aad, &mut block[64..]);
        put(&mut block, 24, &tag);
        SUPERBLOCKS[slot].into_iter().for_each(|place| self.set(place, block));
    }

    fn keys(&self) -> Keys {
        let volume = self.volume_key();
        let (_, superblock) = self.superblock(&volume);
        let mut epochs: Vec<EpochKey> = (0..get32(&superblock, 404) as usize)
            .map(|n| Epoch::decode(&superblock, 640 + n * Epoch::BYTES))
            .map(|epoch| volume.epoch(epoch.id, &epoch.salt))
            .collect();
        for place in RING {
            if let Some(header) = jblock::peek(&self.block(place), volume.uuid())
                && epochs.iter().all(|key| key.id != header.order.epoch())
            {
                epochs.push(volume.epoch(header.order.epoch(), &header.salt));
            }
        }
        Keys { volume, epochs }
    }

    /// Changes the newest superblock.
    pub(super) fn with_superblock(&mut self, change: impl FnOnce(&mut Block)) {
        let key = self.volume_key();
        let (slot, mut block) = self.superblock(&key);
        change(&mut block);
        self.put_superblock(&key, slot, block);
    }

    /// Changes header or payload of one block of the chain, from the sequence number on, and seals
    /// it and all that follow.
    pub(super) fn with_journal(&mut self, number: usize, change: impl FnOnce(&mut [u8])) {
        let keys = self.keys();
        let (_, superblock) = self.superblock(&keys.volume);
        let replay = get64(&superblock, 368);
        let mut chain: Vec<(u64, jblock::Header)> = RING
            .filter_map(|place| {
                let header = jblock::peek(&self.block(place), keys.volume.uuid())?;
                (header.seq >= replay).then_some((place, header))
            })
            .collect();
        chain.sort_unstable_by_key(|(_, header)| header.seq);
        if chain.is_empty() {
            return;
        }
        let first = number % chain.len();
        let (mut change, mut before) = (Some(change), None::<Tag>);
        super::FORGED.set(true);
        for (place, header) in &chain[first..] {
            let mut block = self.block(*place);
            let key = keys.epoch(header.order.epoch());
            let opened = jblock::open(&mut block, key, header);
            assert!(opened.is_ok(), "a journal block of the base volume does not open");
            if let Some(before) = before {
                put(&mut block, 80, &before);
            }
            if let Some(change) = change.take() {
                change(&mut block[16..]);
            }
            // Sealed as its own header now says, unless that names an epoch of no key.
            let Some(header) = jblock::peek(&block, keys.volume.uuid()) else { return };
            let Some(key) = keys.epochs.iter().find(|key| key.id == header.order.epoch()) else {
                return;
            };
            let (clear, payload) = block.split_at_mut(128);
            let tag = key.seal(Kind::Journal, header.order, &clear[..112], payload);
            put(clear, 112, &tag);
            before = Some(tag);
            self.set(*place, block);
        }
    }

    /// Changes the first block of the snapshot table, from its first entry on.
    pub(super) fn with_snapshots(&mut self, change: impl FnOnce(&mut [u8])) {
        let key = self.volume_key();
        let (slot, mut superblock) = self.superblock(&key);
        let mut ptr = Ptr::decode(&superblock, 288);
        let mut block = self.block(ptr.place());
        let single = key.single(b"postern/1 snapshot table", &get_array(&block, 0));
        let mut aad = [0; 16];
        aad[0] = 6;
        let opened = single.open(SINGLE, &aad, &ptr.tag, &mut block[32..]);
        assert!(opened.is_ok(), "the snapshots of the base volume do not open");
        change(&mut block[32..]);
        ptr.tag = single.seal(SINGLE, &aad, &mut block[32..]);
        self.set(ptr.place(), block);
        ptr.encode(&mut superblock, 288);
        self.put_superblock(&key, slot, superblock);
    }

    /// Changes a node of `tree`, `depth` levels below its root, and seals the way up.
    pub(super) fn with_node(
        &mut self,
        tree: Tree,
        depth: u8,
        which: u8,
        change: impl FnOnce(&mut [u8]),
    ) {
        let keys = self.keys();
        let (slot, mut superblock) = self.superblock(&keys.volume);
        let (root, levels) = tree.root(&superblock);
        let (first, entries) = tree.entries();
        let mut way: Vec<Step> = Vec::new();
        let mut ptr = Ptr::decode(&superblock, root);
        let (mut level, mut index) = (levels, 0);
        while level > 0 && !(ptr.word == 0 && ptr.order.0 == 0) {
            level -= 1;
            let node = Box::new(self.block(tree.place(&ptr, level, index)));
            let mut step = Step { ptr, level, index, node, next: 0 };
            keys.node(tree, &mut step, false);
            // The entry with number `which` of those that are not empty.
            let used: Vec<u64> = (0..entries)
                .filter(|n| {
                    !Ptr::decode(&step.node[..], first + *n as usize * Ptr::BYTES).is_null()
                })
                .collect();
            let child = used.get(usize::from(which) % used.len().max(1)).copied().unwrap_or(0);
            step.next = first + child as usize * Ptr::BYTES;
            ptr = Ptr::decode(&step.node[..], step.next);
            index = index * entries + child;
            way.push(step);
        }
        way.truncate(usize::from(depth) % way.len().max(1) + 1);
        let Some(last) = way.last_mut() else { return };
        let salt = if tree == Tree::Epochs { 32 } else { 0 };
        change(&mut last.node[salt..]);
        let mut below: Option<Ptr> = None;
        while let Some(mut step) = way.pop() {
            if let Some(below) = below {
                below.encode(&mut step.node[..], step.next);
            }
            keys.node(tree, &mut step, true);
            self.set(tree.place(&step.ptr, step.level, step.index), *step.node);
            below = Some(step.ptr);
        }
        if let Some(ptr) = below {
            ptr.encode(&mut superblock, root);
        }
        self.put_superblock(&keys.volume, slot, superblock);
    }
}
