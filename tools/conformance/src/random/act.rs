//! Does the steps of a sequence and tells what came of them.

use std::fmt::Write as _;

use super::plan::{BATCH, CONTEXTS, Place, Request, Step, Target, What};
use crate::{
    aio::{self, Context, EVENT, Event, Iocb, flag, op},
    sys::{self, load32, load64, show, store64},
    world::{KERNEL, LONG, World},
};

/// Bytes of a buffer.
const BUFFER: u64 = 24 << 10;

/// A context of the sequence.
#[derive(Clone, Copy)]
struct Slot {
    context: Context,
    /// How many requests it was made for.
    asked: u64,
}

/// One sequence being done.
pub struct Actor<'a> {
    world: &'a World,
    slots: [Option<Slot>; CONTEXTS as usize],
    descriptors: Vec<(Target, i32)>,
    counter: i32,
    /// Iocbs and buffers, one for each place in a batch.
    iocbs: u64,
    buffers: u64,
    events: u64,
    list: u64,
    word: u64,
    now: u64,
    long: u64,
}

impl<'a> Actor<'a> {
    /// Starts with a file as [`World::open`] has it and no context.
    pub fn new(world: &'a World) -> Self {
        let (direct, append) = (libc::O_DIRECT, libc::O_APPEND);
        let (pipe_out, pipe_in) = world.pipe(libc::O_NONBLOCK);
        let counter = world.eventfd(0, libc::EFD_NONBLOCK);
        let descriptors = vec![
            (Target::Cached, world.open(libc::O_RDWR)),
            (Target::Direct, world.open(libc::O_RDWR | direct)),
            (Target::ReadOnly, world.open(libc::O_RDONLY)),
            (Target::WriteOnly, world.open(libc::O_WRONLY)),
            (Target::Appending, world.open(libc::O_RDWR | append)),
            (Target::AppendingDirect, world.open(libc::O_RDWR | append | direct)),
            (Target::PipeOut, pipe_out),
            (Target::PipeIn, pipe_in),
            (Target::Counter, world.eventfd(2, libc::EFD_NONBLOCK)),
            (Target::None, 60_000),
        ];
        Self {
            world,
            slots: [None; CONTEXTS as usize],
            descriptors,
            counter,
            iocbs: world.memory(64 * BATCH),
            buffers: world.memory(BUFFER * BATCH),
            events: world.memory(EVENT * 1024),
            list: world.memory(8 * BATCH),
            word: world.memory(8),
            now: world.time(0, 0),
            long: world.duration(LONG),
        }
    }

    /// Does one step; of a batch only the requests that are `kept`.
    pub fn act(&mut self, step: &Step, kept: &dyn Fn(u32) -> bool) {
        let mut line = format!("{}: ", step.number);
        // Writing into a String cannot fail.
        let _ = match &step.what {
            What::Submit { context, requests } => {
                let kept: Vec<&Request> = requests.iter().filter(|r| kept(r.number)).collect();
                return self.submit(line, *context, &kept);
            }
            What::Setup { context, nr } => {
                write!(line, "setup c{context} nr {nr} = {}", self.setup(*context, *nr))
            }
            What::Destroy { context } => {
                let answer = aio::destroy(self.id(*context));
                self.slots[*context as usize] = None;
                write!(line, "destroy c{context} = {}", show(answer))
            }
            What::SubmitOdd { context, nr } => {
                let answer = aio::submit(self.id(*context), *nr, 8);
                write!(line, "submit c{context} nr {nr} of a bad list = {}", show(answer))
            }
            What::Get { context, min, nr, place, masked } => {
                return self.get(line, *context, (*min, *nr), *place, *masked);
            }
            What::Cancel { context, key } => {
                let at = self.iocbs;
                Iocb { key: *key, ..Iocb::default() }.store(at);
                let answer = aio::cancel(self.id(*context), at, 0);
                write!(line, "cancel c{context} key {key} = {}", show(answer))
            }
            What::MoveHead { context, by } => {
                let Some(slot) = self.slots[*context as usize] else { return };
                let context = slot.context;
                let by = (*by).min(context.ready());
                context.set_word(2, (context.head() + by) % context.slots());
                write!(line, "move the head by {by}")
            }
            What::Scribble { context, word, value } => {
                let Some(slot) = self.slots[*context as usize] else { return };
                // What a program reads of the size of its ring must stay for this program's own use.
                let old = load32(slot.context.0 + 4 * word);
                slot.context.set_word(*word, *value);
                let answer = aio::submit(slot.context.0, 0, 0);
                slot.context.set_word(*word, old);
                write!(line, "scribble word {word} = {}", show(answer))
            }
            What::Truncate { size } => {
                let answer = sys::ftruncate(self.descriptor(Target::Cached), *size);
                write!(line, "ftruncate {size} = {}", show(answer))
            }
            What::Pread { offset, len } => {
                let fd = self.descriptor(Target::Cached);
                let answer = sys::pread(fd, self.buffers, *len, *offset);
                let sum = World::sum(self.buffers, answer.max(0).cast_unsigned());
                write!(line, "pread {len} at {offset} = {} sum {sum:016x}", show(answer))
            }
            What::Pwrite { offset, len } => {
                self.fill(0, step.number);
                let fd = self.descriptor(Target::Cached);
                let answer = sys::pwrite(fd, self.buffers, *len, *offset);
                write!(line, "pwrite {len} at {offset} = {}", show(answer))
            }
            What::Fsync => {
                write!(line, "fsync = {}", show(sys::fsync(self.descriptor(Target::Cached))))
            }
            What::Counter => {
                store64(self.word, 0);
                let read = [sys::word(self.counter), self.word, 8];
                let answer = sys::call(libc::SYS_read, &read);
                write!(line, "eventfd read = {} counted {}", show(answer), load64(self.word))
            }
            What::File => return self.world.see_file(),
        };
        self.world.say(line);
    }

    /// Ends a sequence: what is in the file counts.
    pub fn end(&self) {
        for slot in self.slots.iter().flatten() {
            let context = slot.context;
            self.world.say(format!("head {} tail {}", context.head(), context.tail()));
        }
        self.world.see_file();
    }

    /// The context's id, or what never is one.
    fn id(&self, context: u64) -> u64 {
        self.slots[context as usize].map_or(0, |slot| slot.context.0)
    }

    fn descriptor(&self, target: Target) -> i32 {
        let found = self.descriptors.iter().find(|(of, _)| *of == target);
        found.map_or(-1, |(_, fd)| *fd)
    }

    fn setup(&mut self, context: u64, nr: u64) -> String {
        if self.slots[context as usize].is_some() {
            store64(self.word, 5);
            return show(aio::setup(nr, self.word));
        }
        store64(self.word, 0);
        let answer = aio::setup(nr, self.word);
        if answer != 0 {
            return show(answer);
        }
        let made = Context(load64(self.word));
        self.slots[context as usize] = Some(Slot { context: made, asked: nr });
        format!("0 header {:x?}", made.words())
    }

    /// Fills the buffer of a place in a batch with something of its own.
    fn fill(&self, place: u64, number: u32) {
        let bytes: Vec<u8> = (0..BUFFER).map(|i| (i as u8).wrapping_add(number as u8)).collect();
        sys::put_bytes(self.buffers + place * BUFFER, &bytes);
    }

    fn get(
        &mut self,
        mut line: String,
        context: u64,
        (min, nr): (i64, i64),
        place: Place,
        masked: bool,
    ) {
        let end = self.events + EVENT * 1024;
        let at = match place {
            Place::Null => 0,
            Place::Kernel => KERNEL,
            Place::HalfThere => end - 16,
            _ => self.events,
        };
        let id = self.id(context);
        let got = if masked {
            aio::get_masked(id, min, nr, at, self.now, 0)
        } else {
            aio::get(id, min, nr, at, self.now)
        };
        let name = if masked { "io_pgetevents" } else { "io_getevents" };
        let _ = write!(line, "{name} c{context} min {min} nr {nr} to {place:?} = {}", show(got));
        self.world.say(line);
        let there = if at == self.events { got.max(0) } else { 0 };
        self.tell_events(there.cast_unsigned(), false);
        if let Some(slot) = self.slots[context as usize] {
            let ring = slot.context;
            self.world.say(format!("    head {} tail {}", ring.head(), ring.tail()));
        }
    }

    fn tell_events(&self, count: u64, sort: bool) -> Vec<Event> {
        let mut events: Vec<Event> =
            (0..count).map(|i| Event::load(self.events + i * EVENT)).collect();
        if sort {
            events.sort_by_key(|event| event.data);
        }
        for event in &events {
            let place = event.obj.wrapping_sub(self.iocbs) / 64;
            self.world.say(format!(
                "    event of {}: iocb {place} res {} res2 {}",
                event.data,
                show(event.res),
                event.res2
            ));
        }
        events
    }

    fn submit(&mut self, mut line: String, context: u64, requests: &[&Request]) {
        let slot = self.slots[context as usize];
        // More than was asked for may fit, but nobody says how much.
        let before = slot.map_or(0, |slot| u64::from(slot.context.ready()));
        let room = slot.map_or(BATCH, |slot| slot.asked.saturating_sub(before));
        let requests = &requests[..requests.len().min(room as usize)];
        let _ = write!(line, "submit c{context} of {}", requests.len());
        let mut late = false;
        for (place, request) in (0..).zip(requests) {
            let iocb = self.iocb(place, request);
            iocb.store(self.iocbs + place * 64);
            let at = if request.lost { 8 } else { self.iocbs + place * 64 };
            store64(self.list + place * 8, at);
            late |= matches!(request.target, Target::Direct | Target::AppendingDirect);
            late |= matches!(request.opcode, op::FSYNC | op::FDSYNC);
            line.push_str(&tell(request));
        }
        let answer = aio::submit(self.id(context), requests.len() as i64, self.list);
        let _ = write!(line, "\n    = {}", show(answer));
        self.world.say(line);
        let Some(slot) = slot.filter(|_| answer > 0) else { return };
        let events = if late {
            self.reap_all(slot.context, before, answer.cast_unsigned())
        } else {
            let ring = slot.context;
            self.world.say(format!("    head {} tail {}", ring.head(), ring.tail()));
            Vec::new()
        };
        for (place, request) in (0..).zip(requests) {
            // How far a read with O_DIRECT came that failed depends on where the disk has the file.
            let failed = |event: &Event| event.data == request.number.into() && event.res < 0;
            let known = !events.iter().any(failed);
            if known && matches!(request.opcode, op::PREAD | op::PREADV) {
                let sum = World::sum(self.buffers + place * BUFFER, BUFFER);
                self.world.say(format!("    memory of {}: {sum:016x}", request.number));
            }
        }
    }

    /// Reaps the `before` events that were there and `count` new ones; answers them all.
    fn reap_all(&self, ring: Context, before: u64, count: u64) -> Vec<Event> {
        let all = (before + count) as i64;
        let got = aio::get(ring.0, all, all, self.events, self.long);
        self.world.say(format!("    reap {all} = {}", show(got)));
        self.tell_events(got.max(0).cast_unsigned(), true)
    }

    fn iocb(&self, place: u64, request: &Request) -> Iocb {
        self.fill(place, request.number);
        let buffer = self.buffers + place * BUFFER;
        let at = match request.place {
            Place::There | Place::HalfThere => buffer,
            Place::Shifted(bytes) => buffer + bytes,
            Place::Null => 0,
            Place::Kernel => KERNEL,
        };
        let fd = self.descriptor(request.target);
        let vectored = matches!(request.opcode, op::PREADV | op::PWRITEV);
        let (buf, nbytes) = if vectored && request.place != Place::Null {
            let half = request.len.min(BUFFER) / 2 / 512 * 512;
            let rest = request.len.min(BUFFER) - half;
            (self.world.vector(&[(at, half), (at.wrapping_add(half), rest)]), 2)
        } else {
            (at, request.len)
        };
        let iocb = Iocb {
            data: request.number.into(),
            key: 7,
            rw_flags: request.rw_flags,
            reqprio: request.priority,
            reserved2: request.reserved,
            flags: request.flags,
            ..Iocb::new(request.opcode, fd, buf, nbytes, request.offset)
        };
        if request.signals && request.flags & flag::RESFD == 0 {
            iocb.signalling(self.counter)
        } else {
            iocb
        }
    }
}

/// A request in words.
fn tell(request: &Request) -> String {
    let kind = match request.opcode {
        op::PREAD => "pread",
        op::PWRITE => "pwrite",
        op::PREADV => "preadv",
        op::PWRITEV => "pwritev",
        op::FSYNC => "fsync",
        op::FDSYNC => "fdsync",
        _ => "noop",
    };
    let mut text = format!("\n    [{}] {kind} {:?}", request.number, request.target);
    let _ = write!(text, " {} bytes at {} ({:?})", request.len, request.offset, request.place);
    for (name, value) in [
        ("rw_flags", u64::from(request.rw_flags)),
        ("flags", request.flags.into()),
        ("priority", request.priority.into()),
        ("reserved", request.reserved),
    ] {
        if value != 0 {
            let _ = write!(text, " {name} {value:#x}");
        }
    }
    if request.signals {
        text.push_str(" signals");
    }
    if request.lost {
        text.push_str(" iocb at 8");
    }
    text
}
