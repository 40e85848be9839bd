//! What a seed stands for.

use crate::aio::{flag, op, rwf};

/// Steps of one sequence, at most.
const STEPS: u64 = 48;
/// Contexts that a sequence names.
pub const CONTEXTS: u64 = 4;
/// Requests of one batch, at most; each has a part of the file of its own.
pub const BATCH: u64 = 8;
/// Bytes of such a part.
pub const PART: u64 = 64 << 10;

/// Numbers that follow from a seed (SplitMix64).
struct Dice(u64);

impl Dice {
    fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.word() % end
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}

/// A descriptor that requests name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Cached,
    Direct,
    ReadOnly,
    WriteOnly,
    Appending,
    AppendingDirect,
    /// A pipe that does not block, its reading end.
    PipeOut,
    /// Its writing end.
    PipeIn,
    Counter,
    None,
}

/// Where a buffer or an array lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    There,
    /// So many bytes behind a page's start.
    Shifted(u64),
    Null,
    Kernel,
    /// Ends with its page; what follows is missing.
    HalfThere,
}

/// One request.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub number: u32,
    pub opcode: u16,
    pub target: Target,
    pub place: Place,
    pub len: u64,
    pub offset: i64,
    pub rw_flags: u32,
    pub flags: u32,
    pub priority: u16,
    pub reserved: u64,
    /// Signals the eventfd.
    pub signals: bool,
    /// The iocb's own address is bad.
    pub lost: bool,
}

/// One step.
#[derive(Clone, Debug)]
pub struct Step {
    pub number: u32,
    pub what: What,
}

#[derive(Clone, Debug)]
pub enum What {
    Setup {
        context: u64,
        nr: u64,
    },
    Destroy {
        context: u64,
    },
    Submit {
        context: u64,
        requests: Vec<Request>,
    },
    /// A negative or a larger number than the list has.
    SubmitOdd {
        context: u64,
        nr: i64,
    },
    Get {
        context: u64,
        min: i64,
        nr: i64,
        place: Place,
        masked: bool,
    },
    Cancel {
        context: u64,
        key: u32,
    },
    MoveHead {
        context: u64,
        by: u32,
    },
    Scribble {
        context: u64,
        word: u64,
        value: u32,
    },
    Truncate {
        size: i64,
    },
    Pread {
        offset: i64,
        len: u64,
    },
    Pwrite {
        offset: i64,
        len: u64,
    },
    Fsync,
    Counter,
    File,
}

/// What a seed stands for.
pub struct Plan {
    pub steps: Vec<Step>,
    /// Steps and requests together.
    pub size: u32,
}

/// The sequence of a seed.
pub fn plan(seed: u64) -> Plan {
    let mut dice = Dice(seed.wrapping_mul(0xd134_2543_de82_ef95));
    let mut numbers = 0..;
    let mut number = move || numbers.next().unwrap_or(u32::MAX);
    let mut steps = vec![Step { number: number(), what: What::Setup { context: 0, nr: 16 } }];
    for _ in 0..8 + dice.below(STEPS - 8) {
        let own = number();
        let what = step(&mut dice, &mut number);
        steps.push(Step { number: own, what });
    }
    let size = number();
    Plan { steps, size }
}

fn step(dice: &mut Dice, number: &mut impl FnMut() -> u32) -> What {
    let context = if dice.one_in(3) { dice.below(CONTEXTS) } else { 0 };
    match dice.below(40) {
        0..=2 => What::Setup { context, nr: dice.of(&[0, 1, 2, 4, 8, 16, 64, 100, 256, 1000]) },
        3 => What::Destroy { context },
        4 => What::SubmitOdd { context, nr: dice.of(&[-1, i64::MIN, 0, 1, i64::MAX]) },
        5..=14 => get(dice, context),
        15 => What::Cancel { context, key: dice.of(&[0, 0, 1, u32::MAX]) },
        16 | 17 => What::MoveHead { context, by: 1 + dice.below(4) as u32 },
        18 => {
            What::Scribble { context, word: dice.of(&[1, 4, 5, 6, 7]), value: dice.word() as u32 }
        }
        19 => What::Truncate { size: size(dice) },
        20 | 21 => What::Pread { offset: size(dice), len: dice.of(&[1, 512, 4096, 10_000]) },
        22 | 23 => What::Pwrite { offset: size(dice), len: dice.of(&[1, 512, 4096, 10_000]) },
        24 => What::Fsync,
        25 => What::Counter,
        26 => What::File,
        _ => {
            let count = 1 + dice.below(BATCH);
            let requests = (0..count).map(|part| request(dice, number(), part)).collect();
            What::Submit { context, requests }
        }
    }
}

fn size(dice: &mut Dice) -> i64 {
    let near = dice.of(&[0, 1, -1, 512, 4096, -4096, 100]);
    ((dice.below(BATCH * PART / 4096) * 4096).cast_signed() + near).max(0)
}

fn get(dice: &mut Dice, context: u64) -> What {
    let nr = dice.of(&[0, 1, 1, 2, 3, 8, 100, -1, i64::MAX]);
    let min = dice.of(&[0, 0, 1, 2, nr, -1]);
    let place = match dice.below(12) {
        0 => Place::Null,
        1 => Place::Kernel,
        2 => Place::HalfThere,
        _ => Place::There,
    };
    What::Get { context, min, nr, place, masked: dice.one_in(4) }
}

/// A request of which most are well formed.
fn request(dice: &mut Dice, number: u32, part: u64) -> Request {
    let opcode = dice.of(&[
        op::PREAD,
        op::PREAD,
        op::PREAD,
        op::PWRITE,
        op::PWRITE,
        op::PWRITE,
        op::PREADV,
        op::PWRITEV,
        op::FSYNC,
        op::FDSYNC,
        6,
    ]);
    let target = match dice.below(20) {
        0..=6 => Target::Cached,
        7..=12 => Target::Direct,
        13 => Target::ReadOnly,
        14 => Target::WriteOnly,
        15 => Target::Appending,
        16 => Target::AppendingDirect,
        17 => dice.of(&[Target::PipeIn, Target::PipeOut]),
        18 => Target::Counter,
        _ => Target::None,
    };
    let sync = matches!(opcode, op::FSYNC | op::FDSYNC);
    let direct = matches!(target, Target::Direct | Target::AppendingDirect);
    let aligned = direct && !dice.one_in(8);
    let len = if sync && !dice.one_in(6) {
        0
    } else if aligned {
        512 * (1 + dice.below(40))
    } else {
        dice.of(&[0, 1, 7, 100, 512, 4095, 4096, 4097, 8192, 20_000])
    };
    let inside = dice.below(PART - 20_480) / 512 * 512;
    let offset = if sync && !dice.one_in(6) {
        0
    } else {
        let odd = if aligned { 0 } else { dice.of(&[0, 0, 1, 511]) };
        (part * PART + inside + odd).cast_signed()
    };
    let place = match dice.below(16) {
        0 => Place::Null,
        1 => Place::Kernel,
        _ if aligned => Place::There,
        2..=4 => Place::Shifted(dice.of(&[1, 4, 512])),
        _ => Place::There,
    };
    let rw_flags = match dice.below(10) {
        0 => dice.of(&[rwf::DSYNC, rwf::SYNC, rwf::APPEND, rwf::NOAPPEND, rwf::NOSIGNAL, 1]),
        1 if dice.one_in(2) => dice.of(&[rwf::APPEND | rwf::NOAPPEND, 1 << 20, 1 << 31]),
        _ => 0,
    };
    let mut request = Request {
        number,
        opcode,
        target,
        place: if sync { Place::Null } else { place },
        len,
        offset,
        rw_flags,
        flags: 0,
        priority: 0,
        reserved: 0,
        signals: dice.one_in(4),
        lost: false,
    };
    // A write with O_DIRECT whose end is odd may be done up to an extent's end before that is seen:
    // where those are is for the disk to say. One that begins oddly is refused at once.
    // And one without memory may leave zeros where there was a hole, before it fails.
    if direct && opcode == op::PWRITE && place == Place::Null {
        request.place = Place::There;
    }
    let one_block = request.offset.cast_unsigned() % 4096 + len <= 4096;
    if direct && !sync && !len.is_multiple_of(512) && !one_block {
        request.offset |= 1;
    }
    match dice.below(60) {
        0 => request.reserved = 1,
        1 => request.lost = true,
        2 => request.offset = -1,
        3 => request.len = 1 << 63,
        4 => (request.flags, request.priority) = (flag::IOPRIO, dice.of(&[0, 3, 0x4003, 0xffff])),
        5 => request.flags = 1 << (2 + dice.below(30)),
        _ => {}
    }
    request
}
