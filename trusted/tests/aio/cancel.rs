//! io_cancel.

use postern_trusted::aio::FileTraits;

use crate::{
    Aio, EFAULT, EINVAL, Postern, agree,
    guest::{Area, Batch, Iocb, NOWHERE, PAGE},
};

#[test]
fn the_key_is_read_first_then_must_be_zero_then_the_context_is_looked_up() {
    agree(&[EFAULT, EFAULT, EFAULT, EFAULT, EFAULT, EINVAL, EINVAL], |aio| {
        let iocb = Area::new(1);
        iocb.put(8, 5);
        let end = Area::new(2);
        end.protect(1, libc::PROT_NONE);
        let places = NOWHERE.into_iter().chain([end.at(PAGE - 8), iocb.at(0)]);
        let mut answers: Vec<i64> = places.map(|place| aio.io_cancel(0, place, 0)).collect();
        iocb.put(8, 0);
        answers.push(aio.io_cancel(0, iocb.at(0), 0));
        answers
    });
}

#[test]
fn nothing_submitted_under_that_address_is_einval_and_the_result_is_not_touched() {
    agree(&[EINVAL, 0], |aio| {
        let ctx = aio.context(1);
        let iocb = Area::new(1);
        let answer = aio.io_cancel(ctx, iocb.at(0), u64::MAX);
        vec![answer, aio.io_destroy(ctx)]
    });
}

#[test]
fn a_read_in_flight_cannot_be_cancelled() {
    let postern = Postern::new();
    let file = postern.process.open_controlled(FileTraits::REGULAR);
    let ctx = postern.context(1);
    let batch = Batch::new(&[Iocb { fd: file.fd(), ..Iocb::default() }]);
    assert_eq!(postern.submit(ctx, &batch), 1);
    assert_eq!(postern.io_cancel(ctx, batch.iocb(0), 0), EINVAL);
    assert_eq!(file.pending(), 1);
    file.complete(Ok(0));
}
