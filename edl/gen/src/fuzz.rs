//! A fuzz target: any text for the parser, its rules and the generator.
//!
//! Holds, or the target panics: an end; a refusal lies inside the file and says what to do; what is
//! accepted has a normal form that is accepted, is the same interface to the last attribute, and
//! gives the same code; neither is longer than a fixed multiple of the text.
//!
//! An input is a byte that says where the text stands and then the text, a byte a piece: below 80h
//! the character of that number, from 80h on a word of the grammar. Or it patches a good file.

use crate::ast::{Declaration, Interface};
use crate::{Error, Position, fingerprint, generate, parse};

/// What bytes from 80h on stand for, in turn.
const WORDS: &str = "enclave trusted untrusted include from import public allow struct union enum \
    const void char int long short unsigned float size_t wchar_t int8_t uint8_t uint16_t uint32_t \
    uint64_t propagate_errno transition_using_threads in out user_check string wstring size count \
    isptr isary readonly cdecl stdcall dllimport { } ( ) [ ] * , ; = /* */ // . 0 4 16 \"a.h\" f g s \
    n p \u{e9}";

/// Files that are good.
const GOOD: [&str; 2] =
    [include_str!("../tests/golden/small.edl"), include_str!("../../postern.edl")];

/// Most bytes of the normal form for each byte of the text: `s` becomes `struct s`, and what is
/// left out in between takes a blank at least.
const NORMAL: usize = 8;
/// Most bytes of code for each byte of the text, and however little there is.
const CODE: (usize, usize) = (512, 8192);

/// Any text. The module's header says how an input is one.
pub fn edl(data: &[u8]) {
    let Some((place, rest)) = data.split_first() else { return };
    let source = match place % 5 {
        0 => text(rest),
        1 => format!("enclave {{ {} }};", text(rest)),
        2 => format!("enclave {{ struct s {{ int a; }}; untrusted {{ {} }}; }};", text(rest)),
        3 => format!("enclave {{ untrusted {{ uint32_t f({}); }}; }};", text(rest)),
        _ => patched(GOOD[usize::from(place / 5) % 2], rest),
    };
    check(&source);
}

fn word(number: u8) -> &'static str {
    WORDS.split(' ').cycle().nth(usize::from(number)).unwrap_or_default()
}

fn text(data: &[u8]) -> String {
    let mut text = String::new();
    for byte in data {
        match byte.checked_sub(0x80) {
            None => text.push(char::from(*byte)),
            Some(number) => text.extend([" ", word(number), " "]),
        }
    }
    text
}

/// `file` with pieces cut out, doubled, or replaced by a word: two bytes say where, one what and
/// how long, one which word.
fn patched(file: &str, data: &[u8]) -> String {
    let mut text: Vec<char> = file.chars().collect();
    for [low, high, what, number] in data.as_chunks::<4>().0.iter().take(64) {
        if text.is_empty() {
            break;
        }
        let from = usize::from(u16::from_le_bytes([*low, *high])) % text.len();
        let to = (from + usize::from(what / 4)).min(text.len());
        let piece = text[from..to].to_vec();
        match what % 4 {
            0 => drop(text.drain(from..to)),
            1 => drop(text.splice(from..from, piece)),
            _ => drop(text.splice(from..to, word(*number).chars())),
        }
    }
    text.into_iter().collect()
}

fn check(source: &str) {
    let interface = match parse("text.edl", source) {
        Ok(interface) => interface,
        Err(error) => return inside(&error, source),
    };
    let normal = interface.to_string();
    let most = 64 + NORMAL * source.len();
    assert!(normal.len() <= most, "the normal form grows to {} of {source}", normal.len());
    let again = parse("normal.edl", &normal)
        .unwrap_or_else(|error| panic!("the normal form is refused, {error}: {normal}"));
    assert_eq!(bare(interface.clone()), bare(again.clone()), "another interface: {normal}");
    assert_eq!(fingerprint(&interface), fingerprint(&again));
    match (generate("a.edl", source), generate("a.edl", &normal)) {
        (Ok(one), Ok(other)) => {
            let most = CODE.1 + CODE.0 * source.len();
            assert!(one.len() <= most, "the code grows to {} of {source}", one.len());
            assert!(code(&one).eq(code(&other)), "other code of {normal}");
            // Such a one in a comment of the code would be an error to the compiler.
            let control = one.chars().find(|c| c.is_control() && *c != '\n');
            assert!(control.is_none(), "{control:?} in the code of {source:?}");
        }
        (Err(one), Err(other)) => {
            assert_eq!(one.what, other.what, "another refusal of {normal}");
            inside(&one, source);
        }
        (one, other) => panic!("{one:?} of {source}, {other:?} of {normal}"),
    }
}

/// A refusal names a place in the text and says something.
fn inside(error: &Error, source: &str) {
    let line = source.split('\n').nth((error.at.line as usize).wrapping_sub(1));
    let line = line.unwrap_or_else(|| panic!("a line that is not there: {error}: {source}"));
    let columns = 1..=line.chars().count() + 1;
    assert!(columns.contains(&(error.at.column as usize)), "beside the line: {error}: {source}");
    assert!(!error.what.is_empty() && !error.remedy.is_empty(), "{error}");
}

/// An interface without places and comments.
fn bare(mut interface: Interface) -> Interface {
    fn declared(it: &mut Declaration) {
        it.doc.clear();
        it.at = Position::default();
        it.attributes.at = it.attributes.at.map(|_| Position::default());
    }
    interface.includes.iter_mut().for_each(|(_, at)| *at = Position::default());
    interface.imports.iter_mut().for_each(|import| import.at = Position::default());
    for composite in &mut interface.composites {
        (composite.at, composite.doc) = (Position::default(), String::new());
        composite.members.iter_mut().for_each(declared);
        for enumerator in &mut composite.enumerators {
            (enumerator.at, enumerator.doc) = (Position::default(), String::new());
        }
    }
    for function in interface.trusted.iter_mut().chain(&mut interface.untrusted) {
        (function.at, function.doc) = (Position::default(), String::new());
        function.allow.iter_mut().for_each(|(_, at)| *at = Position::default());
        declared(&mut function.returns);
        function.parameters.iter_mut().for_each(declared);
    }
    interface
}

/// The lines that are no comments.
fn code(generated: &str) -> impl Iterator<Item = &str> {
    generated.lines().filter(|line| !line.trim_start().starts_with("//"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_makes_the_parser_panic_or_accept_what_it_writes_otherwise() {
        postern_hostile::inputs::run("edl", edl, Some(400));
    }

    /// The control: inputs say what they are meant to, and some are accepted.
    #[test]
    fn an_input_is_the_text_that_its_bytes_say() {
        assert_eq!(text(b"a\n\x80{\x83"), "a\n enclave { include ");
        assert_eq!(patched("abcdef", &[1, 0, 2 << 2, 0]), "adef");
        assert_eq!(patched("abcdef", &[1, 0, 2 << 2 | 1, 0]), "abcbcdef");
        assert_eq!(patched("abcdef", &[7, 0, 2 << 2 | 2, 0x0b]), "aconstdef");
        for good in GOOD {
            assert!(generate("good.edl", good).is_ok());
            assert_eq!(patched(good, &[]), good);
        }
    }
}
