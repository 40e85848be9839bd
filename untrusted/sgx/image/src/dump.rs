//! An image as text for people.

use core::fmt;

use crate::{
    bytes::u64_at,
    image::{EXECUTE, Image, PAGE, Page, READ, WRITE},
};

/// Shows what an image consists of: a line for each run of pages of one kind, one for each thread.
#[derive(Clone, Copy, Debug)]
pub struct Dump<'a>(pub &'a Image);

/// What pages of one line have in common.
#[derive(PartialEq, Eq, Clone, Copy)]
struct Kind {
    flags: u64,
    is_tcs: bool,
    measured: u16,
    filled: bool,
}

impl From<&Page> for Kind {
    fn from(page: &Page) -> Self {
        Self {
            flags: page.flags(),
            is_tcs: page.is_tcs(),
            measured: page.measured(),
            // Code and data may hold pages of zeros: they are measured all the same.
            filled: page.data().is_some() || page.measured() != 0,
        }
    }
}

impl fmt::Display for Dump<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let image = self.0;
        writeln!(f, "size       {:#x} ({} MiB)", image.size(), image.size() >> 20)?;
        writeln!(f, "pages      {}", image.pages().len())?;
        writeln!(f, "SSA frame  {} page(s)", image.ssa_frame_pages())?;
        writeln!(f, "{:>12} {:>12} {:>7}  kind  contents", "from", "to", "pages")?;
        let mut pages = image.pages().iter().peekable();
        while let Some(first) = pages.next() {
            let kind = Kind::from(first);
            let (start, mut end) = (first.offset(), first.offset() + PAGE as u64);
            let follows = |next: &&Page, end| {
                next.offset() == end && !kind.is_tcs && Kind::from(*next) == kind
            };
            while pages.next_if(|next| follows(next, end)).is_some() {
                end += PAGE as u64;
            }
            let count = (end - start) / PAGE as u64;
            let letter = |bit, letter| if kind.flags & bit != 0 { letter } else { '-' };
            let permissions: String =
                [letter(READ, 'r'), letter(WRITE, 'w'), letter(EXECUTE, 'x')].iter().collect();
            let name = if kind.is_tcs { "TCS" } else { &permissions };
            let contents = match (kind.filled, kind.measured) {
                (false, _) => "zeros",
                (true, u16::MAX) => "measured",
                (true, 0) => "not measured",
                (true, _) => "measured in part",
            };
            write!(f, "{start:#12x} {end:#12x} {count:>7}  {name}   {contents}")?;
            if let (true, Some(data)) = (kind.is_tcs, first.data()) {
                let field = |at| u64_at(data, at).unwrap_or_default();
                let (entry, save) = (field(32), field(16));
                let (saves, gs) = (field(24) >> 32, field(56));
                write!(f, ": entry {entry:#x}, SSA {save:#x} x {saves}, GS {gs:#x}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
