//! Just enough of a reader for the kernel's type information (BTF) to find where members lie.
//!
//! The bytes come from the kernel, but nothing here trusts their shape: every access is checked, a
//! type that makes no sense is a type that is not found.
//! Follows the kernel's Documentation/bpf/btf.rst.

use std::path::Path;

const MAGIC: u16 = 0xeb9f;

const KIND_INT: u32 = 1;
const KIND_PTR: u32 = 2;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;

/// How deep anonymous members and chains of typedefs are followed.
const MOST_DEPTH: u32 = 16;

/// Type information of the running kernel.
pub struct KernelTypes {
    bytes: Vec<u8>,
    strings: usize,
    /// Byte offset of each type, by number; number 0 is `void`.
    types: Vec<usize>,
}

impl KernelTypes {
    /// Reads the running kernel's own.
    ///
    /// # Errors
    /// The file can not be read, or is no BTF.
    pub fn of_this_kernel() -> std::io::Result<Self> {
        let bytes = std::fs::read(Path::new("/sys/kernel/btf/vmlinux"))?;
        Self::parse(bytes).ok_or_else(|| std::io::Error::other("not understood"))
    }

    fn parse(bytes: Vec<u8>) -> Option<Self> {
        let word = |at: usize| word_at(&bytes, at).and_then(|w| usize::try_from(w).ok());
        if u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?) != MAGIC {
            return None;
        }
        let header = word(4)?;
        let first = header.checked_add(word(8)?)?;
        let end = first.checked_add(word(12)?)?;
        let strings = header.checked_add(word(16)?)?;
        if end > bytes.len() || strings > bytes.len() {
            return None;
        }
        let mut types = vec![first];
        let mut at = first;
        while at < end {
            types.push(at);
            let info = word_at(&bytes, at + 4)?;
            let members = usize::try_from(info & 0xffff).ok()?;
            at += 12
                + match info >> 24 & 0x1f {
                    KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
                    KIND_ARRAY => 12,
                    KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => members * 12,
                    KIND_ENUM | KIND_FUNC_PROTO => members * 8,
                    _ => 0,
                };
        }
        Some(Self { bytes, strings, types })
    }

    fn word(&self, at: usize) -> Option<u32> {
        word_at(&self.bytes, at)
    }

    fn at(&self, number: u32) -> Option<usize> {
        self.types.get(usize::try_from(number).ok()?).copied()
    }

    fn kind(&self, at: usize) -> Option<u32> {
        Some(self.word(at + 4)? >> 24 & 0x1f)
    }

    fn name_is(&self, at: usize, name: &str) -> bool {
        let start = self.word(at).and_then(|w| usize::try_from(w).ok()).map(|w| self.strings + w);
        start
            .and_then(|start| self.bytes.get(start..start + name.len() + 1))
            .is_some_and(|found| found.split_last() == Some((&0, name.as_bytes())))
    }

    fn find(&self, kind: u32, name: &str) -> Option<usize> {
        let mut types = self.types.iter().skip(1).copied();
        types.find(|at| self.kind(*at) == Some(kind) && self.name_is(*at, name))
    }

    /// Byte offset of `member` in `struct name`; members of anonymous structs and unions inside it
    /// count as its own. `None` if there is none, or if it is a bit field.
    pub fn offset(&self, name: &str, member: &str) -> Option<u64> {
        self.find(KIND_STRUCT, name).and_then(|at| self.member(at, member, MOST_DEPTH))
    }

    fn member(&self, at: usize, name: &str, depth: u32) -> Option<u64> {
        let info = self.word(at + 4)?;
        for i in 0..usize::try_from(info & 0xffff).ok()? {
            let member = at + 12 + i * 12;
            let place = self.word(member + 8)?;
            // With the flag set, the upper byte is the width of a bit field.
            let (bits, width) =
                if info >> 31 == 1 { (place & 0xff_ffff, place >> 24) } else { (place, 0) };
            let bytes = u64::from(bits / 8);
            if self.name_is(member, name) {
                return (width == 0 && bits % 8 == 0).then_some(bytes);
            }
            if self.word(member)? == 0 && depth > 0 {
                let inner = self.plain(self.word(member + 4)?)?;
                if matches!(self.kind(inner)?, KIND_STRUCT | KIND_UNION)
                    && let Some(offset) = self.member(inner, name, depth - 1)
                {
                    return Some(bytes + offset);
                }
            }
        }
        None
    }

    /// The type `number` without typedefs and qualifiers.
    fn plain(&self, mut number: u32) -> Option<usize> {
        for _ in 0..MOST_DEPTH {
            let at = self.at(number)?;
            match self.kind(at)? {
                KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG => {
                    number = self.word(at + 8)?;
                }
                _ => return Some(at),
            }
        }
        None
    }

    /// Whether the tracepoint `name` exists and its argument `n` is a pointer to `struct pointee`.
    pub fn tracepoint_takes(&self, name: &str, n: usize, pointee: &str) -> bool {
        self.argument(name, n)
            .is_some_and(|at| self.kind(at) == Some(KIND_STRUCT) && self.name_is(at, pointee))
    }

    fn argument(&self, tracepoint: &str, n: usize) -> Option<usize> {
        let typedef = self.find(KIND_TYPEDEF, &format!("btf_trace_{tracepoint}"))?;
        let pointer = self.plain(self.word(typedef + 8)?)?;
        let proto = self.plain(self.word(pointer + 8)?)?;
        let members = usize::try_from(self.word(proto + 4)? & 0xffff).ok()?;
        // The first parameter is the tracepoint's own.
        if self.kind(proto)? != KIND_FUNC_PROTO || n + 1 >= members {
            return None;
        }
        let argument = self.plain(self.word(proto + 12 + (n + 1) * 8 + 4)?)?;
        (self.kind(argument)? == KIND_PTR).then(|| self.plain(self.word(argument + 8)?)).flatten()
    }
}

fn word_at(bytes: &[u8], at: usize) -> Option<u32> {
    let four = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(four.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Builds BTF by hand, after the kernel's description of the format.
    #[derive(Default)]
    struct Builder {
        types: Vec<u32>,
        strings: Vec<u8>,
        count: u32,
    }

    impl Builder {
        fn name(&mut self, text: &str) -> u32 {
            if self.strings.is_empty() {
                self.strings.push(0);
            }
            if text.is_empty() {
                return 0;
            }
            let at = u32::try_from(self.strings.len()).unwrap();
            self.strings.extend(text.as_bytes());
            self.strings.push(0);
            at
        }

        fn add(&mut self, name: &str, kind: u32, flag: bool, members: u32, rest: &[u32]) -> u32 {
            let name = self.name(name);
            self.types.extend([name, u32::from(flag) << 31 | kind << 24 | members]);
            self.types.extend(rest);
            self.count += 1;
            self.count
        }

        fn build(&self) -> Vec<u8> {
            let mut bytes = Vec::new();
            bytes.extend(MAGIC.to_ne_bytes());
            bytes.extend([1, 0]);
            let length = u32::try_from(self.types.len() * 4).unwrap();
            let strings = u32::try_from(self.strings.len()).unwrap();
            for word in [24, 0, length, length, strings].iter().chain(&self.types) {
                bytes.extend(word.to_ne_bytes());
            }
            bytes.extend(&self.strings);
            bytes
        }
    }

    /// `struct outer { int a; union { int b; struct { int pad; int c; }; }; int flag : 3; }`
    fn sample() -> Builder {
        let mut b = Builder::default();
        let int = b.add("int", KIND_INT, false, 0, &[4, 32]);
        let (pad, c) = (b.name("pad"), b.name("c"));
        let inner = b.add("", KIND_STRUCT, false, 2, &[8, pad, int, 0, c, int, 32]);
        let name = b.name("b");
        let union = b.add("", KIND_UNION, false, 2, &[8, name, int, 0, 0, inner, 0]);
        let (a, flag) = (b.name("a"), b.name("flag"));
        let members = [16, a, int, 0, 0, union, 64, flag, int, 3 << 24 | 128];
        let outer = b.add("outer", KIND_STRUCT, true, 3, &members);
        let constant = b.add("", KIND_CONST, false, 0, &[outer]);
        let pointer = b.add("", KIND_PTR, false, 0, &[constant]);
        let void = b.add("", KIND_PTR, false, 0, &[0]);
        let proto = b.add("", KIND_FUNC_PROTO, false, 3, &[0, 0, void, 0, pointer, 0, int]);
        let function = b.add("", KIND_PTR, false, 0, &[proto]);
        b.add("btf_trace_thing", KIND_TYPEDEF, false, 0, &[function]);
        b
    }

    #[test]
    fn members_of_anonymous_parts_are_found_at_their_place_in_the_whole() {
        let types = KernelTypes::parse(sample().build()).unwrap();
        assert_eq!(types.offset("outer", "a"), Some(0));
        assert_eq!(types.offset("outer", "b"), Some(8));
        assert_eq!(types.offset("outer", "c"), Some(12));
        assert_eq!(types.offset("outer", "flag"), None, "a bit field has no byte offset");
        assert_eq!(types.offset("outer", "d"), None);
        assert_eq!(types.offset("oute", "a"), None);
    }

    #[test]
    fn arguments_of_a_tracepoint_are_checked_by_type_and_place() {
        let types = KernelTypes::parse(sample().build()).unwrap();
        assert!(types.tracepoint_takes("thing", 0, "outer"));
        assert!(!types.tracepoint_takes("thing", 1, "outer"), "an int");
        assert!(!types.tracepoint_takes("thing", 2, "outer"), "there is no third");
        assert!(!types.tracepoint_takes("thing", usize::MAX - 1, "outer"));
        assert!(!types.tracepoint_takes("other", 0, "outer"));
    }

    #[test]
    fn damaged_bytes_are_refused_and_never_read_out_of_bounds() {
        let good = sample().build();
        for cut in 0..good.len() {
            let _ = KernelTypes::parse(good[..cut].to_vec()).map(|t| t.offset("outer", "c"));
        }
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] = 0xff;
            if let Some(types) = KernelTypes::parse(bad) {
                let _ = types.offset("outer", "c");
                let _ = types.tracepoint_takes("thing", 0, "outer");
            }
        }
        assert!(KernelTypes::parse(b"\x7fELF".to_vec()).is_none());
    }
}
