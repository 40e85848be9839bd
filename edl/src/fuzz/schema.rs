//! What a message is, by the syntax tree of `postern.edl` alone: the oracle of the fuzz targets.
//!
//! Shares no code with [`crate::wire`] and the generated calls: it walks whole messages as words and
//! answers what they are, not what is wrong with them.

use postern_edl_gen::ast::{Amount, Attributes, Base, Declaration, Function, Interface, Keyword};
use std::{string::String, vec, vec::Vec};

/// Largest errno that Linux uses.
const MAX_ERRNO: u64 = 4095;

/// All calls, in order.
pub(super) struct Schema(Vec<Call>);

struct Call {
    request: Vec<Item>,
    reply: Vec<Item>,
}

struct Item {
    name: String,
    shape: Shape,
}

enum Shape {
    /// Number of values, whether they are signed, their bits.
    Integers(u64, bool, u32),
    /// Several shapes one after the other.
    All(Vec<Shape>),
    Text,
    /// Bytes or elements; at most what fits so many bits, or what a field of the request says.
    Buffer(Option<Vec<Shape>>, Limit),
}

enum Limit {
    Bits(u32),
    Field(String),
}

/// What a reply is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The call succeeded and the values are well-formed.
    Good,
    /// A refusal with this errno.
    Refused(u32),
    /// Not one of this call.
    None,
}

impl Schema {
    pub(super) fn new() -> Self {
        let parsed = postern_edl_gen::parse("postern.edl", include_str!("../../postern.edl"));
        let interface = parsed.unwrap_or_else(|error| panic!("{error}"));
        // The others make no message.
        let calls = interface.untrusted.iter().filter(|call| !call.transition_using_threads);
        Self(calls.map(|call| self::call(&interface, call)).collect())
    }

    pub(super) fn calls(&self) -> usize {
        self.0.len()
    }

    /// The number (from 0) of the call that `message` is a request of, if it is one.
    pub(super) fn request(&self, message: &[u8]) -> Option<usize> {
        let words = words(message)?;
        let (number, rest) = words.split_first()?;
        let number = usize::try_from(number.checked_sub(1)?).ok()?;
        let call = self.0.get(number)?;
        rest_of(&call.request, rest, &|_| None)?.is_empty().then_some(number)
    }

    /// What `message` is as the reply of call `number` to `request`, which is one of that call.
    pub(super) fn reply(&self, number: usize, request: &[u8], message: &[u8]) -> Answer {
        let Some(words) = words(message) else { return Answer::None };
        let asked = self::words(request).unwrap_or_default();
        let call = &self.0[number];
        match words.split_first() {
            Some((0, rest)) => {
                let field = |name: &str| value_of(&call.request, asked.get(1..)?, name);
                match rest_of(&call.reply, rest, &field) {
                    Some([]) => Answer::Good,
                    _ => Answer::None,
                }
            }
            Some((errno @ 1..=MAX_ERRNO, [])) => {
                Answer::Refused(u32::try_from(*errno).unwrap_or_default())
            }
            _ => Answer::None,
        }
    }

    /// A plain request of call `number`.
    pub(super) fn plain_request(&self, number: usize) -> Vec<u8> {
        message(number as u64 + 1, &self.0[number].request)
    }

    /// A plain reply of call `number`.
    pub(super) fn plain_reply(&self, number: usize) -> Vec<u8> {
        message(0, &self.0[number].reply)
    }
}

fn call(interface: &Interface, function: &Function) -> Call {
    let named = |attributes: &Attributes| match (&attributes.size, &attributes.count) {
        (Some(Amount::Name(name)), _) | (None, Some(Amount::Name(name))) => Some(name.clone()),
        _ => None,
    };
    let (mut request, mut reply) = (Vec::new(), Vec::new());
    for it in &function.parameters {
        let item = |shape| Item { name: it.name.clone(), shape };
        let attributes = &it.attributes;
        if attributes.user_check {
            request.push(item(Shape::Integers(1, false, 64)));
        } else if it.pointers == 0 && it.bounds.is_empty() {
            // The length of what goes in is not written down twice.
            let is_length = function.parameters.iter().any(|buffer| {
                buffer.attributes.input && named(&buffer.attributes).as_ref() == Some(&it.name)
            });
            if !is_length {
                request.push(item(shape(interface, it, 1)));
            }
        } else if attributes.string {
            request.push(item(Shape::Text));
        } else if let Some(length) = named(attributes) {
            let element = || {
                let one = shape(interface, it, 1);
                (!matches!(one, Shape::Integers(1, false, 8))).then(|| vec![one])
            };
            let bits = function.parameters.iter().find(|other| other.name == length);
            let bits = bits.map_or(64, |length| integer(&length.base).map_or(64, |(_, bits)| bits));
            if attributes.input {
                request.push(item(Shape::Buffer(element(), Limit::Bits(bits))));
            }
            if attributes.output {
                let most = if attributes.input { it.name.clone() } else { length };
                reply.push(item(Shape::Buffer(element(), Limit::Field(most))));
            }
        } else {
            let times = match (&attributes.size, &attributes.count) {
                (Some(Amount::Number(n)), _) | (None, Some(Amount::Number(n))) => *n,
                _ => it.bounds.iter().product(),
            };
            if attributes.input {
                request.push(item(shape(interface, it, times)));
            }
            if attributes.output {
                reply.push(item(shape(interface, it, times)));
            }
        }
    }
    Call { request, reply }
}

/// Whether a type is signed, and its bits.
fn integer(base: &Base) -> Option<(bool, u32)> {
    let Base::Plain(name) = base else { return None };
    Some(match *name {
        "char" | "void" | "unsigned char" | "uint8_t" => (false, 8),
        "unsigned short" | "uint16_t" => (false, 16),
        "unsigned int" | "uint32_t" => (false, 32),
        "unsigned long" | "unsigned long long" | "uint64_t" | "size_t" => (false, 64),
        "int8_t" => (true, 8),
        "short" | "int16_t" => (true, 16),
        "int" | "int32_t" => (true, 32),
        _ => (true, 64),
    })
}

/// `times` values of a declaration's type.
fn shape(interface: &Interface, it: &Declaration, times: u64) -> Shape {
    if let Some((signed, bits)) = integer(&it.base) {
        return Shape::Integers(times, signed, bits);
    }
    let (Base::Tagged(_, tag) | Base::Named(tag)) = &it.base else {
        panic!("{} has no shape", it.name)
    };
    let of = interface.composites.iter().find(|one| one.name.as_ref() == Some(tag));
    let of = of.unwrap_or_else(|| panic!("{tag} is not defined"));
    assert!(of.keyword == Keyword::Struct, "only structs are looked at, not {tag}");
    let one = || {
        let members = of.members.iter();
        Shape::All(members.map(|it| shape(interface, it, it.bounds.iter().product())).collect())
    };
    Shape::All((0..times).map(|_| one()).collect())
}

fn words(message: &[u8]) -> Option<Vec<u64>> {
    let (words, rest) = message.as_chunks::<8>();
    rest.is_empty().then(|| words.iter().map(|word| u64::from_le_bytes(*word)).collect())
}

/// What follows the values of `items` in `words`; `None` if they are not there.
fn rest_of<'a>(
    items: &[Item],
    words: &'a [u64],
    field: &dyn Fn(&str) -> Option<u64>,
) -> Option<&'a [u64]> {
    items.iter().try_fold(words, |words, item| rest(&item.shape, words, field))
}

fn rest<'a>(
    shape: &Shape,
    words: &'a [u64],
    field: &dyn Fn(&str) -> Option<u64>,
) -> Option<&'a [u64]> {
    match shape {
        Shape::Integers(times, signed, bits) => {
            let (values, rest) = words.split_at_checked(usize::try_from(*times).ok()?)?;
            let fits = |word: &u64| {
                if *signed {
                    let most = 1_i128 << (bits - 1);
                    (-most..most).contains(&i128::from(word.cast_signed()))
                } else {
                    u128::from(*word) < 1 << bits
                }
            };
            values.iter().all(fits).then_some(rest)
        }
        Shape::All(shapes) => {
            shapes.iter().try_fold(words, |words, shape| rest(shape, words, field))
        }
        Shape::Text => {
            let (text, rest) = packed(words)?;
            let text = String::from_utf8(text).ok()?;
            (!text.contains('\0')).then_some(rest)
        }
        Shape::Buffer(element, limit) => {
            let most = match limit {
                Limit::Bits(64) => u64::MAX,
                Limit::Bits(bits) => (1 << bits) - 1,
                Limit::Field(name) => field(name)?,
            };
            let (length, behind) = words.split_first()?;
            if *length > most {
                return None;
            }
            match element {
                None => packed(words).map(|(_, rest)| rest),
                Some(element) => (0..*length).try_fold(behind, |words, _| {
                    element.iter().try_fold(words, |words, shape| rest(shape, words, field))
                }),
            }
        }
    }
}

/// The bytes of a packed buffer, and what follows it.
fn packed(words: &[u64]) -> Option<(Vec<u8>, &[u64])> {
    let (length, rest) = words.split_first()?;
    let length = usize::try_from(*length).ok()?;
    let (held, rest) = rest.split_at_checked(length.div_ceil(8))?;
    let mut bytes: Vec<u8> = held.iter().flat_map(|word| word.to_le_bytes()).collect();
    let padding = bytes.split_off(length);
    padding.iter().all(|byte| *byte == 0).then_some((bytes, rest))
}

/// The value or the length of the field `name` of a request with these words behind its number.
fn value_of(items: &[Item], words: &[u64], name: &str) -> Option<u64> {
    let at = items.iter().position(|item| item.name == name)?;
    rest_of(&items[..at], words, &|_| None)?.first().copied()
}

fn message(first: u64, items: &[Item]) -> Vec<u8> {
    let mut words = vec![first];
    items.iter().for_each(|item| plain(&item.shape, &mut words));
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A small value of a shape: numbers are 3, texts and buffers have 3 elements.
fn plain(shape: &Shape, words: &mut Vec<u64>) {
    match shape {
        Shape::Integers(times, ..) => words.extend((0..*times).map(|_| 3)),
        Shape::All(shapes) => shapes.iter().for_each(|shape| plain(shape, words)),
        Shape::Text | Shape::Buffer(None, _) => words.extend([3, 0x61_2f_61]),
        Shape::Buffer(Some(element), _) => {
            words.push(3);
            (0..3).for_each(|_| element.iter().for_each(|shape| plain(shape, words)));
        }
    }
}
