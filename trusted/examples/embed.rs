//! The trusted side in a program of one's own: Linux AIO on a sealed volume in a plain file.
//! `cargo run -p postern-trusted --example embed -- FILE` makes the file. docs/INTEGRATION.md says
//! what a LibOS puts in each place.

#![allow(clippy::unwrap_used, reason = "an example fails by panicking")]

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::{fs::File, io, os::unix::fs::FileExt as _, ptr::NonNull, sync::Arc};

use postern_trusted::aio::{
    AioContexts, AioFile, AioHost, Completion, Descriptor, EventCounter, FileTraits, KernelContext,
    Op, Request, RingMapping, Wait, WaitEnd, WaitKey,
};
use postern_trusted::disk::{BLOCK, Block, Disk, HostError, Transfer};
use postern_trusted::platform::{Buffer as _, Fault, GuestMemory, NoEntropy, Platform};
use postern_trusted::volume::{FormatOptions, OpenOptions, SlotKey, Volume};
use postern_trusted::{errno::Errno, exec::run_to_end};

/// What lies outside the enclave: a file that answers at once.
struct Host(File);
struct Sealed(File, Vec<Block>);

fn answer(done: io::Result<()>) -> Result<(), HostError> {
    done.map_err(|error| HostError::Errno(error.raw_os_error().unwrap_or(Errno::EIO.0)))
}

impl Platform for Host {
    fn now_ns(&self) -> u64 {
        0
    }
    fn random(&self, out: &mut [u8]) -> Result<(), NoEntropy> {
        // SAFETY: `out` is writable for its length.
        let got = unsafe { libc::getrandom(out.as_mut_ptr().cast(), out.len(), 0) };
        (usize::try_from(got) == Ok(out.len())).then_some(()).ok_or(NoEntropy)
    }
}

impl Disk for Host {
    type Transfer = Sealed;
    const MAX_BLOCKS: usize = 64;
    async fn transfer(&self, blocks: usize) -> Result<Sealed, HostError> {
        self.try_transfer(blocks).ok_or(HostError::Gone)
    }
    fn try_transfer(&self, blocks: usize) -> Option<Sealed> {
        Some(Sealed(self.0.try_clone().ok()?, vec![[0; BLOCK]; blocks]))
    }
    async fn flush(&self) -> Result<(), HostError> {
        answer(self.0.sync_data())
    }
    fn host_blocks(&self) -> u64 {
        self.0.metadata().map_or(0, |file| file.len() / BLOCK as u64)
    }
}

impl Transfer for Sealed {
    fn blocks(&self) -> usize {
        self.1.len()
    }
    fn put(&mut self, index: usize, block: &Block) {
        self.1[index] = *block;
    }
    fn get(&self, index: usize, block: &mut Block) {
        *block = self.1[index];
    }
    async fn read(&mut self, place: u64) -> Result<(), HostError> {
        answer(self.0.read_exact_at(self.1.as_flattened_mut(), place * BLOCK as u64))
    }
    async fn write(&mut self, place: u64, blocks: usize) -> Result<(), HostError> {
        answer(self.0.write_all_at(self.1[..blocks].as_flattened(), place * BLOCK as u64))
    }
}

/// The guest: its memory, with addresses from 0, and one open file, descriptor 3.
struct Guest(&'static [AtomicU64], Arc<Opened>);
struct Opened(Volume, Host);

const MEMORY: usize = 1 << 20;
/// Where the ring lies in it.
const RING: u64 = 4096;

impl GuestMemory for Guest {
    fn read(&self, from: u64, out: &mut [u8]) -> Result<(), Fault> {
        for (at, byte) in (from..).zip(out) {
            let word = self.0.get((at / 8) as usize).ok_or(Fault)?;
            *byte = word.load(Relaxed).to_le_bytes()[(at % 8) as usize];
        }
        Ok(())
    }
    fn write(&self, to: u64, data: &[u8]) -> Result<(), Fault> {
        for (at, byte) in (to..).zip(data) {
            let word = self.0.get((at / 8) as usize).ok_or(Fault)?;
            let mut bytes = word.load(Relaxed).to_le_bytes();
            bytes[(at % 8) as usize] = *byte;
            word.store(u64::from_le_bytes(bytes), Relaxed);
        }
        Ok(())
    }
}

#[rustfmt::skip]
impl AioHost for Guest {
    fn map_ring(&self, bytes: usize) -> Result<RingMapping, Errno> {
        let room = self.0.get(RING as usize / 8..(RING as usize + bytes) / 8).ok_or(Errno::ENOMEM)?;
        // SAFETY: the memory is `bytes` long, lives for ever, and is atomics: nobody's alone.
        Ok(unsafe { RingMapping::new(RING, NonNull::from(room).cast(), bytes) })
    }
    fn unmap_ring(&self, _: RingMapping) {}
    fn file(&self, fd: i32) -> Result<Descriptor, Errno> {
        if fd == 3 { Ok(Descriptor::Served(self.1.clone())) } else { Err(Errno::EBADF) }
    }
    fn kernel_context(&self, _: u32) -> Result<Arc<dyn KernelContext>, Errno> { Err(Errno::ENOSYS) }
    fn event_counter(&self, _: i32) -> Result<Arc<dyn EventCounter>, Errno> { Err(Errno::EBADF) }
    fn possible_cpus(&self) -> u32 { 1 }
    fn aio_max_nr(&self) -> u64 { 65_536 }
    fn charge(&self, _: u32) -> Result<(), Errno> { Ok(()) }
    fn uncharge(&self, _: u32) {}
    fn may_use_realtime_io(&self) -> bool { false }
    fn now_ns(&self) -> u64 { 0 }
    fn drive(&self) {}
    fn wait(&self, _: Wait<'_>) -> WaitEnd { WaitEnd::TimedOut }
    fn wake(&self, _: WaitKey, _: u32) {}
    fn reaps_in_user_space(&self) {}
}

#[rustfmt::skip]
impl AioFile for Opened {
    fn traits(&self) -> FileTraits { FileTraits::REGULAR }
    fn completes_in_submit(&self, _: &Request) -> bool { true }
    fn submit(self: Arc<Self>, request: Request, done: Completion) {
        let (volume, host, at, buffer) = (&self.0, &self.1, request.offset, &request.buffer);
        done.finish(match request.op {
            Op::Read => run_to_end(volume.read(host, at, buffer)),
            Op::Write => run_to_end(volume.write(host, at, buffer)),
            Op::Fsync | Op::Fdatasync => run_to_end(volume.sync(host)).map(|()| buffer.len()),
        });
    }
}

/// Makes a volume and has a guest write, sync and read by io_submit; answers what it has read.
fn work(file: File) -> Vec<u8> {
    let (size, key, text) = (1 << 24, SlotKey::new([7; 32]), b"sealed by AIO");
    file.set_len(Volume::host_blocks(size) * BLOCK as u64).unwrap();
    let host = Host(file);
    run_to_end(Volume::format(&host, &key, &FormatOptions { size })).unwrap();
    let (volume, _) = run_to_end(Volume::open(&host, &key, &OpenOptions::default())).unwrap();
    let opened = Arc::new(Opened(volume, host));
    let memory = Vec::leak((0..MEMORY / 8).map(|_| AtomicU64::new(0)).collect());
    let guest = Arc::new(Guest(memory, opened.clone()));
    let aio = AioContexts::new(guest.clone());
    aio.io_setup(8, 0).unwrap();
    let (from, to) = (1 << 19, (1 << 19) + 8192);
    guest.write(from, text).unwrap();
    guest.write(8, &64_u64.to_le_bytes()).unwrap();
    // struct iocb at 64: data; key; opcode, descriptor; buffer; bytes; offset; reserved; flags.
    for (opcode, buffer, bytes) in [(1_u64, from, 4096), (2, 0, 0), (0, to, 4096)] {
        let iocb = [9, 0, opcode | 3 << 32, buffer, bytes, 0, 0, 0];
        guest.write(64, &iocb.map(u64::to_le_bytes).concat()).unwrap();
        assert_eq!(aio.io_submit(RING, 1, 8), Ok(1));
        assert_eq!(aio.io_getevents(RING, 1, 1, 256, 0), Ok(1));
    }
    aio.io_destroy(RING).unwrap();
    run_to_end(opened.0.close(&opened.1)).unwrap();
    let mut read = vec![0; text.len()];
    guest.read(to, &mut read).unwrap();
    read
}

fn main() {
    let path = std::env::args_os().nth(1).expect("usage: embed FILE, a new one");
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    println!("{}", String::from_utf8_lossy(&work(file)));
}

#[test]
fn what_a_guest_writes_by_aio_is_read_back_and_is_not_in_the_host_file() {
    let path = std::env::temp_dir().join(format!("embed-{}", std::process::id()));
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(work(file.try_clone().unwrap()), b"sealed by AIO");
    let mut host = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut host, 0).unwrap();
    assert!(!host.windows(6).any(|window| window == b"sealed"));
}
