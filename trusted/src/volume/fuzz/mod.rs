//! Fuzz targets: bytes of any content for every parser of what the host stores.
//!
//! Random bytes do not get past a tag. So each target but `image` takes a volume apart, patches the
//! plaintext of one structure as its input says, and seals it again all the way up to the
//! superblock: it plays a host that had the keys. `image` plays the host that is there: it alters
//! blocks of the host file.
//!
//! Holds, or the target panics: no panic and no endless wait; what reads is what the guest wrote to
//! that block once (or zeros, what it was before), everything else is `EIO`. An input is a list of
//! [`Patch`]es after a first byte or two that say where.
//!
//! `cargo xtask fuzz` runs them under libFuzzer; the tests of this module run the same functions
//! over the checked-in seeds and over mutations of them.

mod base;
mod host;
mod reseal;
#[cfg(test)]
mod tests;

use alloc::{sync::Arc, vec, vec::Vec};
use core::cell::Cell;

#[cfg(test)]
pub(super) use self::base::tiny;
use self::{
    base::{BLOCKS, Base, is_known},
    host::{Host, Image, wait},
    reseal::Tree,
};
use super::{
    OpenOptions, Volume, header, jblock,
    layout::{HEADERS, get64, put},
};
use crate::{
    directory::{BadImage, Table},
    disk::{BLOCK, Block},
    errno::Errno,
    platform::Memory,
};

std::thread_local! {
    static FORGED: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread's volume was sealed by its target: what its structures say of each other
/// may then be wrong.
pub(crate) fn is_forged() -> bool {
    FORGED.get()
}

/// A target: takes bytes of any content, panics if something does not hold.
pub type Target = fn(&[u8]);

/// All targets by name.
pub const TARGETS: [(&str, Target); 9] = [
    ("header", header),
    ("superblock", superblock),
    ("journal", journal),
    ("map", map),
    ("space", space),
    ("epochs", epochs),
    ("snapshots", snapshots),
    ("directory", directory),
    ("image", image),
];

/// One change of a structure's bytes: place (2 bytes), what (1), value (1).
struct Patch {
    at: usize,
    what: u8,
    value: u8,
}

fn patches(data: &[u8]) -> impl Iterator<Item = Patch> {
    data.as_chunks::<4>().0.iter().take(64).map(|[low, high, what, value]| Patch {
        at: usize::from(u16::from_le_bytes([*low, *high])),
        what: *what,
        value: *value,
    })
}

/// Patches `bytes` as `data` says: single bytes, and words at the ends of their range.
fn apply(data: &[u8], bytes: &mut [u8]) {
    for Patch { at, what, value } in patches(data) {
        let at = at % bytes.len();
        let word = (at & !7).min(bytes.len() - 8);
        let number = match what % 8 {
            0 => {
                bytes[at] = value;
                continue;
            }
            1 => {
                bytes[at] ^= value;
                continue;
            }
            2 => 0,
            3 => u64::MAX - u64::from(value),
            4 => u64::from(value),
            5 => 1 << (value % 64),
            6 => get64(bytes, word).wrapping_add(u64::from(value)),
            _ => get64(bytes, word).wrapping_sub(u64::from(value)),
        };
        put(bytes, word, &number.to_le_bytes());
    }
}

/// Reads every block that the guest ever wrote, and a few more.
fn read(host: &Host, volume: &Volume) {
    for block in 0..BLOCKS {
        let buffer = Memory::new(vec![0xee; BLOCK]);
        match wait(volume.read(host, block * BLOCK as u64, &buffer)) {
            Ok(length) => {
                let known = is_known(block, &buffer.into_inner()[..length]);
                assert!(known, "block {block} reads as bytes that nobody wrote there");
            }
            Err(errno) => assert_eq!(errno, Errno::EIO, "block {block}"),
        }
    }
}

/// Opens, reads, writes, closes, opens again.
fn use_volume(image: Image, blocks: u64, options: u8) {
    let host = Host::new(image, blocks, 7);
    let options = OpenOptions {
        read_only: options & 1 != 0,
        accept_loss: options & 2 != 0,
        ..OpenOptions::default()
    };
    let Ok((volume, _)) = wait(Volume::open(&host, &base::key(), &options)) else { return };
    read(&host, &volume);
    if !options.read_only {
        for block in [1, 64, 129] {
            let bytes = Memory::new(base::plain(block, 9));
            // Any errno will do: there may be no room, or no place that can be believed free.
            let _ = wait(volume.write(&host, block * BLOCK as u64, &bytes));
        }
        let _ = wait(volume.sync(&host));
        read(&host, &volume);
        let _ = wait(volume.make_snapshot(&host, "kept", 7));
        let _ = wait(volume.punch(&host, 5000, 70_000));
        for kept in wait(volume.snapshots(&host)).unwrap_or_default() {
            let _ = wait(volume.delete_snapshot(&host, &kept.name));
        }
        let _ = wait(volume.truncate(&host, 100 * BLOCK as u64 + 7));
        let _ = wait(volume.close(&host));
    }
    read(&host, &volume);
    let options = OpenOptions { read_only: true, accept_loss: true, ..OpenOptions::default() };
    if let Ok((volume, _)) = wait(Volume::open(&host, &base::key(), &options)) {
        read(&host, &volume);
    }
}

/// A base volume, chosen by a bit of the first byte, and how to open it.
fn chosen(data: &[u8]) -> Option<(Base, u8, &[u8])> {
    let (first, rest) = data.split_first()?;
    let base = if first & 4 != 0 { Base::closed() } else { Base::synced() };
    Some((base, *first, rest))
}

/// The static header: look, slots, decode. First byte: bit 3, sum and MAC are made good again;
/// bit 4, only one copy is altered.
pub fn header(data: &[u8]) {
    let Some((mut base, first, rest)) = chosen(data) else { return };
    let mut bytes = base.header();
    apply(rest, &mut bytes[..]);
    if first & 8 != 0 {
        base.finish_header(&mut bytes);
    }
    let _ = header::look(&bytes);
    let copies = if first & 16 != 0 { &HEADERS[..1] } else { &HEADERS[..] };
    for copy in copies {
        for (place, block) in (*copy..).zip(bytes.as_chunks::<BLOCK>().0) {
            base.image.insert(place, Arc::new(*block));
        }
    }
    let host = Host::new(base.image.clone(), base.blocks, 7);
    let _ = wait(Volume::slots(&host));
    use_volume(base.image, base.blocks, first);
}

/// The superblock. First byte: bit 3, the host file is as long as can be; bit 4, it says that there
/// are snapshots.
pub fn superblock(data: &[u8]) {
    let Some((mut base, first, rest)) = chosen(data) else { return };
    base.with_superblock(|block| {
        if first & 16 != 0 {
            put(block, 48, &[2, 0, 0, 0, 1, 0, 0, 0]);
        }
        apply(rest, &mut block[64..]);
    });
    let blocks = if first & 8 != 0 { super::layout::MAX_HOST } else { base.blocks };
    use_volume(base.image, blocks, first);
}

/// The journal: second byte, which block; the chain behind it is sealed again. Also the records of
/// an unsealed payload.
pub fn journal(data: &[u8]) {
    let Some((mut base, first, rest)) = chosen(data) else { return };
    let Some((number, rest)) = rest.split_first() else { return };
    let mut block: Block = [0; BLOCK];
    apply(rest, &mut block);
    let _ = jblock::peek(&block, &[0; 16]);
    let _ = jblock::records(&block);
    base.with_journal(usize::from(*number), |block| apply(rest, block));
    use_volume(base.image, base.blocks, first);
}

/// Nodes of the map. Second and third byte: level and which one.
pub fn map(data: &[u8]) {
    tree(data, Tree::Map);
}

/// Nodes and pages of the space map. Second and third byte: level and which one.
pub fn space(data: &[u8]) {
    tree(data, Tree::Space);
}

/// Nodes of the epoch table. Second and third byte: level and which one.
pub fn epochs(data: &[u8]) {
    tree(data, Tree::Epochs);
}

/// The table of snapshots, and what they read as. Patches from the pointer to the next block on.
pub fn snapshots(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else { return };
    let mut base = Base::kept();
    // Entries lie at the beginning: patches beyond them would change nothing.
    base.with_snapshots(|table| apply(rest, &mut table[..32 + 4 * 128]));
    let host = Host::new(base.image.clone(), base.blocks, 7);
    let open = || {
        let options = OpenOptions { read_only: true, ..OpenOptions::default() };
        wait(Volume::open(&host, &base::key(), &options)).ok().map(|(volume, _)| volume)
    };
    let listed = open().and_then(|volume| wait(volume.snapshots(&host)).ok());
    for kept in listed.into_iter().flatten().take(8) {
        let Some(volume) = open() else { continue };
        if let Ok(volume) = wait(volume.at_snapshot(&host, &kept.name)) {
            read(&host, &volume);
        }
    }
    use_volume(base.image, base.blocks, *first);
}

fn tree(data: &[u8], tree: Tree) {
    let Some((mut base, first, rest)) = chosen(data) else { return };
    let Some(([level, which], rest)) = rest.split_first_chunk() else { return };
    base.with_node(tree, *level, *which, |node| apply(rest, node));
    use_volume(base.image, base.blocks, first);
}

/// The image of a directory's name table. First byte: bit 3, the digest is made good again.
pub fn directory(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else { return };
    let mut image = base::table().encode(5);
    // Records lie at the beginning: patches beyond them would change nothing.
    let end = image.len().min(1024);
    apply(rest, &mut image[..end]);
    if first & 8 != 0 {
        base::finish_table(&mut image);
    }
    let _ = Table::image_bytes(&image);
    match Table::decode(&image) {
        Ok((table, sequence)) => {
            let again = table.encode(sequence);
            let (table, back) = Table::decode(&again).unwrap_or_else(|bad| {
                panic!("a table that decodes does not decode when encoded again: {bad}")
            });
            assert_eq!(back, sequence);
            assert!(table.encode(sequence) == again, "a table changes when encoded again");
        }
        Err(BadImage::Empty | BadImage::Torn | BadImage::Inconsistent { .. }) => {}
    }
}

/// The whole host file, altered without a key. A patch's place chooses a block, its value the
/// bytes.
pub fn image(data: &[u8]) {
    let Some((mut base, first, rest)) = chosen(data) else { return };
    let other = if first & 4 != 0 { Base::synced() } else { Base::closed() };
    let places: Vec<u64> = base.image.keys().copied().collect();
    let place = |n: usize| places[n % places.len()];
    for (Patch { at, what, value }, seed) in patches(rest).zip(0_usize..) {
        let to = place(at);
        let mut block = base.image.get(&to).map_or([0; BLOCK], |block| **block);
        match what % 8 {
            0 => block[usize::from(value) * 16 + seed % 16] ^= 1 << (what >> 5),
            1 => block[..usize::from(value) * 16].fill(0),
            2 => block[usize::from(value) * 16..].fill(0),
            3 => block[usize::from(value) * 16 % 512] = what,
            // Another place's block; both are moved, or only one.
            4 | 5 => {
                let from = place(at / 7 + usize::from(value));
                let moved = base.image.get(&from).map_or([0; BLOCK], |block| **block);
                if what % 8 == 4 {
                    base.image.insert(from, Arc::new(block));
                }
                block = moved;
            }
            // What lay there at another time.
            6 => block = other.image.get(&to).map_or([0; BLOCK], |block| **block),
            _ => {
                let first = at as u64 % base.blocks;
                base.image.retain(|place, _| *place < first || *place > first + u64::from(value));
                continue;
            }
        }
        base.image.insert(to, Arc::new(block));
    }
    let blocks = if first & 8 != 0 { base.blocks - 1 } else { base.blocks };
    use_volume(base.image, blocks, first);
}
