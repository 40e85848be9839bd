//! System call instructions in machine code that can be replaced by a jump, and the stubs that the
//! jumps lead to.
//!
//! `syscall` has two bytes and a jump five, so an instruction next to it must give way. Two forms
//! are taken:
//!
//! - followed by `cmp rax, -4096` (or -4095, or the same on eax), as the C library tests for an
//!   error: the stub repeats the comparison;
//! - preceded by `mov eax, NUMBER`: the stub repeats that.
//!
//! Holds: only whole instructions of these forms are replaced, only where the number just before is
//! one that is asked for, or (in the C library) cannot be told, and only where no jump near by
//! leads between the two.
//! Does not hold: other forms are not found; a computed jump between the two would be misled, which
//! no compiler makes.

/// `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// How far before the instruction its number is looked for, in bytes.
const LOOK_BACK: usize = 64;
/// Numbers are below this.
const NUMBERS: u32 = 512;
/// Bytes of the jump that replaces a site.
pub const JUMP: usize = 5;
/// Most bytes of one stub.
pub const STUB: usize = 80;

/// A replaceable system call instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// Offset of the first replaced byte.
    pub at: usize,
    /// Replaced bytes, at least [`JUMP`].
    pub length: u8,
    /// Offset of the `syscall` itself, from `at`.
    pub call: u8,
}

/// Length of the comparison at the start of `code`, if it is one that tests for an error.
fn comparison(code: &[u8]) -> Option<u8> {
    match code {
        [0x48, 0x3d, 0x00 | 0x01, 0xf0, 0xff, 0xff, ..] => Some(6),
        [0x3d, 0x00 | 0x01, 0xf0, 0xff, 0xff, ..] => Some(5),
        _ => None,
    }
}

/// Reach of a jump with one byte of distance, and how far away longer ones are looked for.
const SHORT: usize = 130;
const LONG: usize = 1024;

/// Whether what looks like a jump near by leads to `target`. Bytes are taken for jumps that are
/// none: then a site is left out without need.
fn is_jumped_to(code: &[u8], target: usize) -> bool {
    let leads = |end: usize, distance: i64| {
        i64::try_from(end).is_ok_and(|end| end + distance == target as i64)
    };
    let short = |at: usize| match code.get(at..at + 2) {
        Some(&[0xeb | 0x70..=0x7f, distance]) => leads(at + 2, distance.cast_signed().into()),
        _ => false,
    };
    let long = |at: usize| {
        let (from, distance) = match code.get(at..at + 6) {
            Some(&[0xe9, a, b, c, d, _]) => (at + 5, [a, b, c, d]),
            Some(&[0x0f, 0x80..=0x8f, a, b, c, d]) => (at + 6, [a, b, c, d]),
            _ => return false,
        };
        leads(from, i32::from_le_bytes(distance).into())
    };
    (target.saturating_sub(SHORT)..target + SHORT).any(short)
        || (target.saturating_sub(LONG)..target + LONG).any(long)
}

/// The number loaded last before `at`, and whether `mov eax, NUMBER` ends right there.
fn number_before(code: &[u8], at: usize) -> Option<(u32, bool)> {
    let from = at.saturating_sub(LOOK_BACK);
    (from..at).rev().find_map(|place| match code.get(place..at)? {
        [0xb8, a, b, 0, 0, rest @ ..] => {
            let number = u32::from_le_bytes([*a, *b, 0, 0]);
            (number < NUMBERS).then_some((number, rest.is_empty()))
        }
        // xor eax, eax: read.
        [0x31, 0xc0, ..] => Some((0, false)),
        _ => None,
    })
}

/// The sites in `code`. `wanted` tells which numbers; `unknown` takes comparisons whose number
/// cannot be told.
pub fn find(code: &[u8], wanted: impl Fn(u32) -> bool, unknown: bool) -> Vec<Site> {
    let mut found: Vec<Site> = Vec::new();
    for at in memchr::memmem::find_iter(code, &SYSCALL) {
        let number = number_before(code, at);
        if !number.map_or(unknown, |(number, _)| wanted(number)) {
            continue;
        }
        let site = match (comparison(&code[at + 2..]), number) {
            (Some(length), _) => Site { at, length: 2 + length, call: 0 },
            (None, Some((_, true))) => Site { at: at - 5, length: 7, call: 5 },
            _ => continue,
        };
        // The only instruction boundary inside the site.
        let between = if site.call == 0 { at + SYSCALL.len() } else { at };
        let free = !is_jumped_to(code, between)
            && found.last().is_none_or(|last| last.at + usize::from(last.length) <= site.at);
        if free {
            found.push(site);
        }
    }
    found
}

/// What a stub needs to know of its surroundings, as addresses.
#[derive(Clone, Copy, Debug)]
pub struct Around {
    /// Of the byte that tells for each number below 512 whether to go to `catcher` (not 0).
    pub classes: usize,
    /// Of a word with the address of what answers.
    pub catcher: usize,
    /// Of the replaced site.
    pub site: usize,
    /// Of the stub itself.
    pub stub: usize,
}

/// Bytes of a stub as they are put together.
struct Code {
    bytes: [u8; STUB],
    length: usize,
    base: usize,
}

impl Code {
    fn put(&mut self, bytes: &[u8]) -> Option<()> {
        for &byte in bytes {
            *self.bytes.get_mut(self.length)? = byte;
            self.length += 1;
        }
        Some(())
    }

    /// `bytes`, then the distance from behind it to `target`.
    fn put_relative(&mut self, bytes: &[u8], target: usize) -> Option<()> {
        self.put(bytes)?;
        let end = self.base + self.length + 4;
        let distance = i32::try_from(target.wrapping_sub(end).cast_signed()).ok()?;
        self.put(&distance.to_le_bytes())
    }
}

/// The stub for `site`, whose replaced bytes are `old`, and its length. `None` if something is too
/// far away for a 32-bit distance.
#[must_use]
pub fn stub(site: Site, old: &[u8], around: Around) -> Option<([u8; STUB], usize)> {
    let mut code = Code { bytes: [0xcc; STUB], length: 0, base: around.stub };
    let (call, end) = (usize::from(site.call), usize::from(site.length));
    code.put(old.get(..call)?)?;
    code.put(&[0x89, 0xc1])?; // mov ecx, eax
    code.put(&[0x81, 0xf9, 0x00, 0x02, 0x00, 0x00])?; // cmp ecx, 512
    code.put(&[0x73, 14])?; // jae to the system call
    code.put_relative(&[0x4c, 0x8d, 0x1d], around.classes)?; // lea r11, [classes]
    code.put(&[0x41, 0x80, 0x3c, 0x0b, 0x00])?; // cmp byte ptr [r11 + rcx], 0
    let rest = old.get(call + SYSCALL.len()..end)?;
    let skip = SYSCALL.len() + rest.len() + JUMP;
    code.put(&[0x75, u8::try_from(skip).ok()?])?; // jne past it
    code.put(&SYSCALL)?;
    let go_on = code.base + code.length;
    code.put(rest)?;
    code.put_relative(&[0xe9], around.site + end)?; // jmp back
    code.put(&[0x48, 0x83, 0xc4, 0x80])?; // add rsp, -128: past the red zone
    // For unwinders: the instruction behind the system call.
    code.put_relative(&[0x48, 0x8d, 0x0d], around.site + call + SYSCALL.len())?; // lea rcx
    code.put(&[0x51])?; // push rcx
    code.put_relative(&[0x48, 0x8d, 0x0d], go_on)?;
    code.put(&[0x51])?;
    code.put_relative(&[0xff, 0x25], around.catcher)?; // jmp [catcher]
    Some((code.bytes, code.length))
}

/// The jump from `site` to `stub`, filled up with traps. `None` if it is too far.
#[must_use]
pub fn jump(site: Site, from: usize, stub: usize) -> Option<[u8; 16]> {
    let mut code = Code { bytes: [0xcc; STUB], length: 0, base: from };
    code.put_relative(&[0xe9], stub)?;
    let mut bytes = [0xcc; 16];
    let end = usize::from(site.length);
    for (to, byte) in bytes.iter_mut().zip(code.bytes).take(end.min(16)) {
        *to = byte;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ERROR_TEST: [u8; 6] = [0x48, 0x3d, 0x00, 0xf0, 0xff, 0xff];

    fn code(parts: &[&[u8]]) -> Vec<u8> {
        parts.concat()
    }

    #[test]
    fn a_call_followed_by_the_error_test_or_preceded_by_its_number_is_a_site() {
        let openat = [0xb8, 0x01, 0x01, 0, 0];
        let bytes = code(&[&[0x90; 3], &openat, &[0x90], &SYSCALL, &ERROR_TEST, &[0x77, 0x05]]);
        let only = |n| n == 257;
        assert_eq!(find(&bytes, only, false), [Site { at: 9, length: 8, call: 0 }]);
        let bytes = code(&[&[0x90; 3], &openat, &SYSCALL, &[0x48, 0x89, 0xc3]]);
        assert_eq!(find(&bytes, only, false), [Site { at: 3, length: 7, call: 5 }]);
        assert_eq!(find(&bytes, |_| false, true), []);
    }

    #[test]
    fn a_call_whose_number_cannot_be_told_is_a_site_only_where_that_is_wanted() {
        let bytes = code(&[&[0x90; 80], &SYSCALL, &ERROR_TEST]);
        assert_eq!(find(&bytes, |_| true, false), []);
        assert_eq!(find(&bytes, |_| false, true), [Site { at: 80, length: 8, call: 0 }]);
        let read = code(&[&[0x31, 0xc0], &SYSCALL, &[0x3d, 0x01, 0xf0, 0xff, 0xff]]);
        assert_eq!(find(&read, |n| n == 0, false), [Site { at: 2, length: 7, call: 0 }]);
    }

    #[test]
    fn a_site_that_a_jump_leads_into_is_left_alone() {
        let openat = [0xb8, 0x01, 0x01, 0, 0];
        for jump in [&[0xeb, 7][..], &[0xe9, 7, 0, 0, 0], &[0x0f, 0x84, 7, 0, 0, 0], &[0x75, 7]] {
            // Over `mov` and `syscall`, to the comparison.
            let bytes = code(&[jump, &openat, &SYSCALL, &ERROR_TEST]);
            assert_eq!(find(&bytes, |_| true, true), [], "{jump:x?}");
            // Over one byte more: into no instruction of the site.
            let past = code(&[jump, &[0x90], &openat, &SYSCALL, &ERROR_TEST]);
            assert_eq!(find(&past, |_| true, true).len(), 1, "{jump:x?}");
        }
    }

    #[test]
    fn no_bytes_at_all_make_the_search_or_the_stub_fail() {
        assert_eq!(find(&[], |_| true, true), []);
        assert_eq!(find(&SYSCALL, |_| true, true), []);
        assert_eq!(find(&[0x0f], |_| true, true), []);
        let around = Around { classes: 0, catcher: 8, site: usize::MAX / 2, stub: 16 };
        assert!(stub(Site { at: 0, length: 8, call: 0 }, &[0; 8], around).is_none());
        assert!(stub(Site { at: 0, length: 8, call: 0 }, &[], around).is_none());
    }
}
