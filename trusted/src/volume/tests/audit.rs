//! The space map against the trees: exactly what the map and the snapshots reach is in use, each
//! block once in a tree.

use alloc::{
    collections::{BTreeMap, BTreeSet},
    format,
    string::String,
    sync::Arc,
};

use super::disk::SimDisk;
use crate::volume::{
    Volume,
    crypto::Kind,
    layout::{FANOUT, Order, Ptr, REGION, child, node_index},
    space::fresh,
    tree::Miss,
};

/// Everything that a tree reaches: the order of what lies at each place.
async fn walk(
    disk: &SimDisk,
    volume: &Volume,
    (root, levels, capacity): (Ptr, u32, u64),
) -> Result<BTreeMap<u64, Order>, String> {
    let mut reached = BTreeMap::new();
    let mut claim = |ptr: &Ptr, what: &str| match reached.insert(ptr.place(), ptr.order) {
        None => Ok(()),
        Some(_) => Err(format!("place {} is reached twice, as {what}", ptr.place())),
    };
    for level in 0..levels {
        for index in 0..=node_index(capacity - 1, level) {
            let ptr = volume.descend(disk, root, levels, level, index).await;
            let ptr = ptr.map_err(|bad| format!("node {level}/{index}: {bad:?}"))?;
            if ptr.is_null() {
                continue;
            }
            claim(&ptr, "node")?;
            if level == 0 {
                let node = volume.node(disk, &Miss { ptr, level, index }).await;
                let node = node.map_err(|bad| format!("leaf {index}: {bad:?}"))?;
                for slot in 0..FANOUT as usize {
                    let data = child(&node, slot);
                    if !data.is_null() {
                        claim(&data, "data")?;
                    }
                }
            }
        }
    }
    Ok(reached)
}

/// Whether everything that the newest superblock's map names is there and authentic, without the
/// journal: a recovery that finds an uncertain record void falls back to it. `volume` was opened
/// for reading.
pub(super) async fn durable_tree(disk: SimDisk, volume: Arc<Volume>) -> Result<(), String> {
    let (map, geometry) = {
        let core = volume.core.lock();
        (core.map, core.geometry)
    };
    walk(&disk, &volume, (map.root, map.levels, geometry.capacity)).await?;
    for block in 0..geometry.capacity {
        let leaf = volume.descend(&disk, map.root, map.levels, 0, block / FANOUT).await;
        let leaf = leaf.map_err(|bad| format!("leaf {}: {bad:?}", block / FANOUT))?;
        if leaf.is_null() {
            continue;
        }
        let node = volume.node(&disk, &Miss { ptr: leaf, level: 0, index: block / FANOUT }).await;
        let node = node.map_err(|bad| format!("leaf {}: {bad:?}", block / FANOUT))?;
        let ptr = child(&node, (block % FANOUT) as usize);
        if !ptr.is_null() {
            let read = volume.read_sealed(&disk, ptr.place(), &ptr, Kind::Data, 0, block).await;
            read.map_err(|bad| format!("block {block}: {bad:?}"))?;
        }
    }
    Ok(())
}

/// Walks map, snapshots and epoch table of a volume that nobody writes.
pub(super) async fn audit(disk: SimDisk, volume: Arc<Volume>) -> Result<(), String> {
    let (map, geometry, held) = {
        let core = volume.core.lock();
        (core.map, core.geometry, core.held)
    };
    let live = walk(&disk, &volume, (map.root, map.levels, geometry.capacity)).await?;
    let mut all = live.clone();
    let (snapshots, table) =
        volume.table_of_snapshots(&disk).await.map_err(|bad| format!("snapshots: {bad:?}"))?;
    for snapshot in &snapshots {
        let tree = (snapshot.root, snapshot.levels, snapshot.capacity);
        for (place, order) in walk(&disk, &volume, tree).await? {
            if all.insert(place, order).is_some_and(|before| before != order) {
                return Err(format!("place {place} is something else in {}", snapshot.name));
            }
        }
    }
    if (all.len() - live.len()) as u64 != held.blocks {
        return Err(format!("{} blocks held, {} counted", all.len() - live.len(), held.blocks));
    }
    let mut reached: BTreeSet<u64> = all.into_keys().collect();
    let mut claim = |ptr: &Ptr, what: &str| {
        if reached.insert(ptr.place()) {
            Ok(())
        } else {
            Err(format!("place {} is reached twice, as {what}", ptr.place()))
        }
    };
    for place in table {
        claim(&Ptr { word: place, ..Ptr::NULL }, "snapshot table")?;
    }
    for place in volume.table_places(&disk).await.map_err(|bad| format!("table: {bad:?}"))? {
        claim(&Ptr { word: place, ..Ptr::NULL }, "epoch table")?;
    }
    for region in 0..geometry.regions() {
        let root = volume.core.lock().space.root;
        let (_, map) = volume.page(&disk, root, region).await.map_err(|bad| format!("{bad:?}"))?;
        let fixed = fresh(&geometry, region);
        for bit in 0..REGION {
            let place = region * REGION + bit;
            let (word, mask) = ((bit / 64) as usize, 1 << (bit % 64));
            let used = map[word] & mask != 0 && fixed[word] & mask == 0;
            if used != reached.contains(&place) {
                let how = if used { "in use but not reached" } else { "reached but free" };
                return Err(format!("place {place} is {how}"));
            }
        }
    }
    Ok(())
}
