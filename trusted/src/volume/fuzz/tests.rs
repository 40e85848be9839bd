//! Every target over its checked-in seeds, and over mutations of them that a fixed generator draws:
//! what runs where there is no libFuzzer (`postern_hostile::inputs`).

use std::vec::Vec;

use postern_hostile::inputs;

use super::TARGETS;

#[test]
fn no_bytes_of_any_structure_give_a_panic_or_a_wrong_byte() {
    // Each on its own thread: they share nothing, and the nonce table is a thread's own.
    std::thread::scope(|scope| {
        let running: Vec<_> = TARGETS
            .iter()
            .map(|(name, target)| (name, scope.spawn(|| inputs::run(name, *target, None))))
            .collect();
        let failed: Vec<_> = running
            .into_iter()
            .filter_map(|(name, thread)| thread.join().is_err().then_some(name))
            .collect();
        assert!(failed.is_empty(), "targets that found something: {failed:?}");
    });
}

/// The control: the targets reach behind the tags, and their model of what is right is sharp.
#[test]
fn a_changed_structure_is_sealed_so_that_it_opens() {
    use super::{super::VolumeError, base::*, host::*, *};
    let open = |base: &Base| {
        let host = Host::new(base.image.clone(), base.blocks, 7);
        wait(Volume::open(&host, &key(), &OpenOptions::default())).map(|(volume, report)| {
            let holes = wait(volume.verify(&host, |_, _| ()));
            (volume.size(), report.records_applied, holes.holes, holes.damaged.len())
        })
    };
    let (closed, synced) = (Base::closed(), Base::synced());
    let before = [open(&closed).unwrap(), open(&synced).unwrap()];
    assert!(before[0].1 == 0 && before[1].1 > 0 && before[0].3 == 0, "{before:?}");

    let mut changed = Base::closed();
    changed.with_superblock(|block| block[88..96].copy_from_slice(&8192_u64.to_le_bytes()));
    assert_eq!(open(&changed).unwrap().0, 8192);

    let mut changed = Base::closed();
    changed.with_superblock(|block| {
        block[48..56].copy_from_slice(&[2, 0, 0, 0, 1, 0, 0, 0]);
        (block[288], block[328]) = (0x60, 1);
    });
    let host = Host::new(changed.image.clone(), changed.blocks, 7);
    let (volume, _) = wait(Volume::open(&host, &key(), &OpenOptions::default())).unwrap();
    assert_eq!(wait(volume.snapshots(&host)), Err(VolumeError::DamagedSnapshots));

    let names = |base: &Base| {
        let host = Host::new(base.image.clone(), base.blocks, 7);
        let (volume, _) = wait(Volume::open(&host, &key(), &OpenOptions::default())).unwrap();
        let listed = wait(volume.snapshots(&host)).unwrap();
        listed.into_iter().map(|kept| kept.name).collect::<Vec<_>>()
    };
    assert_eq!(names(&Base::kept()), ["before", "after"]);
    let mut changed = Base::kept();
    changed.with_snapshots(|table| table[32 + 72] = b'B');
    assert_eq!(names(&changed), ["Before", "after"]);

    let mut changed = Base::synced();
    changed.with_journal(1, |block| block[112..].fill(0));
    assert!(open(&changed).unwrap().1 < before[1].1);

    let mut changed = Base::closed();
    changed.with_node(Tree::Map, 1, 0, |node| node.fill(0));
    assert!(open(&changed).unwrap().2 > before[0].2);

    let mut changed = Base::closed();
    changed.with_node(Tree::Epochs, 0, 0, |node| node.fill(0));
    assert!(open(&changed).is_ok());

    let mut changed = Base::closed();
    changed.with_node(Tree::Space, 3, 0, |node| node.fill(0));
    assert!(open(&changed).is_ok());

    assert!(is_known(7, &plain(7, 2)) && is_known(7, &[0; BLOCK]));
    assert!(!is_known(7, &plain(8, 2)) && !is_known(7, &plain(7, 4)));
}
