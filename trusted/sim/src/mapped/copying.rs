//! Bytes between the volume and the memory file, in both directions.

use core::{future::poll_fn, ops::Range, task::Poll};

use postern_trusted::{errno::Errno, platform::Memory, port::LaneFile, volume::Volume};

use super::{
    content::{PIECE, STEP},
    memory::{PAGE, Window},
};
use crate::guest::GuestBuffer;

/// Reads a part of the volume into the memory file. Holes stay holes.
///
/// # Errors
/// `EIO`, `ENOMEM`.
pub async fn fill(
    (volume, disk): (&Volume, &LaneFile),
    fd: i32,
    range: &Range<u64>,
) -> Result<(), Errno> {
    let mut at = range.start;
    while at < range.end {
        let end = (at + STEP).min(range.end);
        if !volume.is_hole(at, end - at) {
            let window = Window::new(fd, &(at..end.next_multiple_of(PAGE)))?;
            let mut done = 0;
            while done < end - at {
                let room = GuestBuffer::single(window.address() + done, end - at - done)?;
                match volume.read(disk, at + done, &room).await? {
                    0 => break,
                    length => done += length as u64,
                }
            }
        }
        at = end;
    }
    Ok(())
}

/// Writes the blocks of a piece that differ from the shadow, which follows; answers whether there
/// were any.
///
/// # Errors
/// As [`Volume::write`]; `ENOSPC` for one that is cut short.
pub async fn write_runs(
    (volume, disk): (&Volume, &LaneFile),
    piece: u64,
    bytes: &[u8],
    shadow: &mut Option<Box<[u8]>>,
) -> Result<bool, Errno> {
    const BLOCK: usize = 4096;
    if shadow.is_none() && bytes.iter().all(|byte| *byte == 0) {
        return Ok(false);
    }
    let shadow = shadow.get_or_insert_with(|| vec![0; PIECE as usize].into_boxed_slice());
    let differs = |shadow: &[u8], at: usize, end: usize| shadow[at..end] != bytes[at..end];
    let (mut at, mut changed) = (0, false);
    while at < bytes.len() {
        let end = (at + BLOCK).min(bytes.len());
        if !differs(shadow, at, end) {
            at = end;
            continue;
        }
        let mut to = end;
        while to < bytes.len() && differs(shadow, to, (to + BLOCK).min(bytes.len())) {
            to = (to + BLOCK).min(bytes.len());
        }
        let run = Memory::new(bytes[at..to].to_vec());
        let written = volume.write(disk, piece * PIECE + at as u64, &run).await?;
        if written < to - at {
            return Err(Errno::ENOSPC);
        }
        shadow[at..to].copy_from_slice(&bytes[at..to]);
        changed = true;
        at = to;
    }
    Ok(changed)
}

/// Goes on after what else is ready.
pub async fn let_others_run() {
    let mut again = false;
    poll_fn(|context| {
        if core::mem::replace(&mut again, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
