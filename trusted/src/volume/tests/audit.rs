//! The space map against the tree: exactly what the tree reaches is in use, each block once.

use alloc::{collections::BTreeSet, format, string::String, sync::Arc};

use super::disk::SimDisk;
use crate::volume::{
    Volume,
    layout::{FANOUT, Ptr, REGION, child, node_index},
    space::fresh,
    tree::Miss,
};

/// Walks map and epoch table of a volume that nobody writes.
pub(super) async fn audit(disk: SimDisk, volume: Arc<Volume>) -> Result<(), String> {
    let (map, geometry) = {
        let core = volume.core.lock();
        (core.map, core.geometry)
    };
    let mut reached = BTreeSet::new();
    let mut claim = |ptr: &Ptr, what: &str| {
        if reached.insert(ptr.place()) {
            Ok(())
        } else {
            Err(format!("place {} is reached twice, as {what}", ptr.place()))
        }
    };
    for level in 0..map.levels {
        for index in 0..=node_index(geometry.capacity - 1, level) {
            let ptr = volume.descend(&disk, map.root, map.levels, level, index).await;
            let ptr = ptr.map_err(|bad| format!("node {level}/{index}: {bad:?}"))?;
            if ptr.is_null() {
                continue;
            }
            claim(&ptr, "node")?;
            if level == 0 {
                let node = volume.node(&disk, &Miss { ptr, level, index }).await;
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
