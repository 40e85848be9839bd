//! io_setup, and how the other calls find a context.

use std::sync::atomic::Ordering;

use crate::{
    Aio, EAGAIN, EFAULT, EINVAL, ENOMEM, Postern, agree, agree_with_kernel,
    guest::{self, Area, Events, HEAD, ID, MAGIC, NOWHERE, NR, PAGE, TAIL},
    process::Machine,
};

#[test]
fn an_unreadable_place_for_the_id_is_efault_even_for_zero_events() {
    agree(&[EFAULT; 10], |aio| {
        let closed = Area::new(1);
        closed.protect(0, libc::PROT_NONE);
        let places = NOWHERE.iter().copied().chain([closed.at(0)]);
        places.flat_map(|place| [aio.io_setup(0, place), aio.io_setup(1, place)]).collect()
    });
}

#[test]
fn a_place_that_is_not_zero_or_zero_events_are_einval_and_leave_the_place_alone() {
    agree(&[EINVAL, EINVAL, 77, 0], |aio| {
        let place = Area::new(1);
        place.put(0, 77);
        let answers = [aio.io_setup(1, place.at(0)), aio.io_setup(0, place.at(8))];
        answers.into_iter().chain([place.get(0) as i64, place.get(8) as i64]).collect()
    });
}

#[test]
fn too_many_events_are_einval_and_numbers_that_wrap_are_eagain() {
    let tries = [4_194_305, u32::MAX, 1 << 30, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, 4_194_304];
    let expected = [EINVAL, EINVAL, EINVAL, EINVAL, EAGAIN, EAGAIN, EAGAIN];
    agree(&expected, |aio| {
        let place = Area::new(1);
        tries.map(|nr| aio.io_setup(nr, place.at(0))).to_vec()
    });
}

#[test]
fn a_number_that_doubles_to_zero_is_eagain_whatever_the_limit() {
    let postern = Postern::on(Machine { max_nr: u64::MAX, ..Machine::default() });
    let place = Area::new(1);
    assert_eq!(postern.io_setup(1 << 31, place.at(0)), EAGAIN);
}

#[test]
fn more_than_aio_max_nr_is_eagain_before_anything_is_mapped() {
    let postern = Postern::on(Machine { max_nr: 100, ..Machine::default() });
    postern.process.rings_left.store(0, Ordering::Relaxed);
    let place = Area::new(1);
    assert_eq!(postern.io_setup(101, place.at(0)), EAGAIN);
    assert_eq!(postern.io_setup(100, place.at(0)), ENOMEM, "the ring comes before the quota");
}

#[test]
fn the_quota_counts_what_was_asked_for_and_undoes_a_context_that_passes_it() {
    let postern = Postern::on(Machine { max_nr: 100, ..Machine::default() });
    let first = postern.context(60);
    assert_eq!(postern.process.nr.load(Ordering::Relaxed), 60);
    let place = Area::new(1);
    assert_eq!(postern.io_setup(41, place.at(0)), EAGAIN);
    assert_eq!(place.get(0), 0);
    assert_eq!(postern.process.rings.load(Ordering::Relaxed), 1);
    assert_eq!(postern.io_setup(40, place.at(0)), 0);
    assert_eq!(postern.io_destroy(first), 0);
    assert_eq!(postern.process.nr.load(Ordering::Relaxed), 40);
}

#[test]
fn an_id_that_cannot_be_stored_is_efault_and_all_is_undone() {
    agree(&[EFAULT], |aio| {
        let place = Area::new(1);
        place.protect(0, libc::PROT_READ);
        vec![aio.io_setup(5, place.at(0))]
    });
    let postern = Postern::new();
    let place = Area::new(1);
    place.protect(0, libc::PROT_READ);
    assert_eq!(postern.io_setup(5, place.at(0)), EFAULT);
    assert_eq!(postern.process.nr.load(Ordering::Relaxed), 0);
    assert_eq!(postern.process.rings.load(Ordering::Relaxed), 0);
}

#[test]
fn the_ring_s_header_is_the_kernel_s_for_every_size() {
    // Both sides of every change of size up to four pages, and some beyond.
    let sizes = [1, 7, 8, 9, 31, 32, 62, 63, 64, 126, 127, 190, 191, 254, 255, 512, 1000, 4096];
    for nr in sizes {
        agree_with_kernel(|aio| {
            let ctx = aio.context(nr);
            let header: Vec<u32> = (NR..8).map(|word| guest::ring_word(ctx, word)).collect();
            let aligned = ctx % PAGE as u64;
            assert_eq!(aio.io_destroy(ctx), 0);
            (header, aligned)
        });
    }
}

#[test]
fn on_two_cpus_the_ring_sizes_are_those_of_the_table() {
    let table = [
        (1, 127),
        (31, 127),
        (62, 127),
        (63, 255),
        (126, 255),
        (127, 383),
        (128, 383),
        (256, 639),
        (512, 1151),
        (1000, 2047),
        (1024, 2175),
        (4096, 8319),
    ];
    let postern = Postern::on(Machine { cpus: 2, ..Machine::default() });
    for (nr, slots) in table {
        let ctx = postern.context(nr);
        let words: Vec<u32> = (0..8).map(|word| guest::ring_word(ctx, word)).collect();
        assert_eq!(words, [0, slots, 0, 0, 0xa10a_10a1, 1, 0, 32], "io_setup({nr})");
        assert_eq!(postern.io_destroy(ctx), 0);
    }
}

#[test]
fn ids_count_up_and_the_lowest_free_one_is_used_again() {
    let postern = Postern::new();
    let contexts = [0, 1, 2].map(|_| postern.context(1));
    assert_eq!(contexts.map(|ctx| guest::ring_word(ctx, ID)), [0, 1, 2]);
    assert_eq!(postern.io_destroy(contexts[1]), 0);
    assert_eq!(postern.io_destroy(contexts[0]), 0);
    assert_eq!(guest::ring_word(postern.context(1), ID), 0);
    assert_eq!(guest::ring_word(postern.context(1), ID), 1);
    assert_eq!(guest::ring_word(postern.context(1), ID), 3);
}

/// What every call says of a context id.
fn calls(aio: &dyn Aio, ctx: u64) -> [i64; 4] {
    let events = Events::new(1);
    let iocb = Area::new(1);
    [
        aio.io_submit(ctx, 0, 0),
        aio.io_getevents(ctx, 0, 1, events.at(), 0),
        aio.io_cancel(ctx, iocb.at(0), 0),
        aio.io_destroy(ctx),
    ]
}

#[test]
fn whatever_is_not_the_address_of_a_living_ring_is_einval_to_every_call() {
    agree(&[EINVAL; 4 * 8], |aio| {
        let page = Area::new(1);
        let ctx = aio.context(1);
        let gone = aio.context(1);
        assert_eq!(aio.io_destroy(gone), 0);
        // Gone, with something inaccessible in its place: in a hole, memory of another test could
        // come to lie.
        let unmapped = aio.context(1);
        let cover = Area::new(1);
        cover.protect(0, libc::PROT_NONE);
        guest::remap_over(cover.at(0), unmapped, PAGE);
        std::mem::forget(cover);
        let mut answers = Vec::new();
        for id in NOWHERE.into_iter().chain([ctx + 8, page.at(0), gone, unmapped]) {
            answers.extend(calls(aio, id));
        }
        assert_eq!(aio.io_destroy(ctx), 0);
        answers
    });
}

#[test]
fn a_ring_that_cannot_be_read_or_names_another_context_is_einval_until_it_is_mended() {
    agree(&[EINVAL, EINVAL, EINVAL, EINVAL, 0], |aio| {
        let (ctx, other) = (aio.context(1), aio.context(1));
        let id = guest::ring_word(ctx, ID);
        let mut answers = Vec::new();
        guest::protect(ctx, PAGE, libc::PROT_NONE);
        answers.push(aio.io_submit(ctx, 0, 0));
        guest::protect(ctx, PAGE, libc::PROT_READ | libc::PROT_WRITE);
        for wrong in [u32::MAX, 100_000, guest::ring_word(other, ID)] {
            guest::set_ring_word(ctx, ID, wrong);
            answers.push(aio.io_submit(ctx, 0, 0));
        }
        guest::set_ring_word(ctx, ID, id);
        answers.push(aio.io_submit(ctx, 0, 0));
        assert_eq!((aio.io_destroy(ctx), aio.io_destroy(other)), (0, 0));
        answers
    });
}

#[test]
fn a_ring_follows_mremap_with_its_unread_events() {
    agree(&[1, EINVAL, 1, 42, 0], |aio| {
        let file = crate::submit::scratch();
        let ctx = aio.context(1);
        let batch = crate::submit::reads(&file, &[42]);
        let mut answers = vec![aio.submit(ctx, &batch)];
        let moved = guest::remap(ctx, PAGE);
        aio.moved(ctx, moved);
        // An ordinary page lies where the ring was.
        let events = Events::new(1);
        answers.push(aio.io_submit(ctx, 0, 0));
        answers.push(aio.reap(moved, 8, &events));
        answers.push(events.data(0).cast_signed());
        answers.push(aio.io_destroy(moved));
        answers
    });
}

#[test]
fn the_guest_s_writes_to_size_and_magic_are_ignored_and_its_head_is_reduced() {
    agree(&[2, 1, 11, 1, 0, 2, 0xdead], |aio| {
        let file = crate::submit::scratch();
        let ctx = aio.context(1);
        let slots = guest::ring_word(ctx, NR);
        guest::set_ring_word(ctx, NR, 3);
        guest::set_ring_word(ctx, MAGIC, 0xdead);
        let batch = crate::submit::reads(&file, &[10, 11]);
        let mut answers = vec![aio.submit(ctx, &batch)];
        let events = Events::new(8);
        // One event is skipped, and a multiple of the size added.
        guest::set_ring_word(ctx, HEAD, 5 * slots + 1);
        answers.push(aio.reap(ctx, 8, &events));
        answers.push(events.data(0).cast_signed());
        // Equal only when reduced: no event, but the head is written back.
        guest::set_ring_word(ctx, HEAD, slots + 2);
        answers.push(i64::from(guest::ring_word(ctx, HEAD) == slots + 2));
        answers.push(aio.reap(ctx, 8, &events));
        answers.push(i64::from(guest::ring_word(ctx, HEAD)));
        answers.push(i64::from(guest::ring_word(ctx, MAGIC)));
        assert_eq!(aio.io_destroy(ctx), 0);
        answers
    });
}

#[test]
fn a_reader_believes_the_guest_s_tail_and_a_completion_does_not() {
    agree(&[1, 3, 5, 0, 0, 1, 2], |aio| {
        let file = crate::submit::scratch();
        let ctx = aio.context(1);
        let one = |data| crate::submit::reads(&file, &[data]);
        let mut answers = vec![aio.submit(ctx, &one(5))];
        guest::set_ring_word(ctx, TAIL, 3);
        let events = Events::new(8);
        answers.push(aio.reap(ctx, 8, &events));
        answers.extend([0, 1, 2].map(|index| events.data(index).cast_signed()));
        answers.push(aio.submit(ctx, &one(6)));
        answers.push(i64::from(guest::ring_word(ctx, TAIL)));
        assert_eq!(aio.io_destroy(ctx), 0);
        answers
    });
}

#[test]
fn a_page_with_a_copied_header_over_the_ring_passes_for_it_but_sees_no_tail() {
    agree(&[1, 0, 0], |aio| {
        let file = crate::submit::scratch();
        let ctx = aio.context(1);
        let mut header = [0; 32];
        guest::read(ctx, &mut header).unwrap();
        let cover = Area::new(1);
        cover.put_bytes(0, &header);
        guest::remap_over(cover.at(0), ctx, PAGE);
        let answer = aio.submit(ctx, &crate::submit::reads(&file, &[1]));
        let tail = i64::from(guest::ring_word(ctx, TAIL));
        std::mem::forget(cover);
        vec![answer, tail, aio.io_destroy(ctx)]
    });
}

#[test]
fn a_ring_that_may_only_be_read_still_works() {
    agree(&[1, 1, 9, 0], |aio| {
        let file = crate::submit::scratch();
        let ctx = aio.context(1);
        guest::protect(ctx, PAGE, libc::PROT_READ);
        let events = Events::new(1);
        vec![
            aio.submit(ctx, &crate::submit::reads(&file, &[9])),
            aio.reap(ctx, 1, &events),
            events.data(0).cast_signed(),
            aio.io_destroy(ctx),
        ]
    });
}
