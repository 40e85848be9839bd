//! Whatever the text: an end, no panic, and a place inside the file.
#![allow(clippy::unwrap_used)]

use postern_edl_gen::{generate, parse};
use proptest::prelude::*;

const FILES: [&str; 2] = [include_str!("golden/small.edl"), include_str!("../../postern.edl")];

const WORDS: &[&str] = &[
    "enclave",
    "trusted",
    "untrusted",
    "include",
    "from",
    "import",
    "public",
    "allow",
    "struct",
    "union",
    "enum",
    "const",
    "void",
    "char",
    "int",
    "long",
    "unsigned",
    "size_t",
    "uint32_t",
    "propagate_errno",
    "transition_using_threads",
    "{",
    "}",
    "(",
    ")",
    "[",
    "]",
    "*",
    ",",
    ";",
    "=",
    "in",
    "out",
    "user_check",
    "string",
    "size",
    "count",
    "isptr",
    "f",
    "a",
    "s",
    "n",
    "4",
    "0",
    "\"x\"",
    "/*",
    "*/",
    "//",
    "\n",
];

fn survives(source: &str) -> Result<(), TestCaseError> {
    if let Err(error) = generate("a.edl", source) {
        let lines = source.split('\n').count();
        prop_assert!((1..=lines).contains(&(error.at.line as usize)), "{error}");
        prop_assert!(error.at.column >= 1, "{error}");
        prop_assert!(!error.what.is_empty() && !error.remedy.is_empty());
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn no_text_makes_the_parser_panic_or_loop(source in "\\PC*|(.|\n){0,200}") {
        survives(&source)?;
        survives(&format!("enclave {{{source}}};"))?;
    }

    #[test]
    fn no_order_of_words_makes_the_parser_panic_or_loop(
        words in prop::collection::vec(prop::sample::select(WORDS), 0..60),
    ) {
        let text = words.join(" ");
        survives(&text)?;
        survives(&format!("enclave {{ untrusted {{ uint32_t f({text}); }}; }};"))?;
        survives(&format!("enclave {{ {text} }};"))?;
    }

    /// A good file with a piece cut out, doubled, or replaced by a word.
    #[test]
    fn no_damage_to_a_good_file_makes_the_parser_panic_or_loop(
        file in prop::sample::select(&FILES[..]),
        edits in prop::collection::vec((any::<prop::sample::Index>(), 0..40_usize, 0..3_u8,
            prop::sample::select(WORDS)), 1..5),
    ) {
        let mut text: Vec<char> = file.chars().collect();
        for (place, length, kind, word) in edits {
            if text.is_empty() {
                break;
            }
            let from = place.index(text.len());
            let to = (from + length).min(text.len());
            let piece: Vec<char> = text[from..to].to_vec();
            match kind {
                0 => drop(text.drain(from..to)),
                1 => drop(text.splice(from..from, piece)),
                _ => drop(text.splice(from..to, word.chars())),
            }
        }
        survives(&text.iter().collect::<String>())?;
    }

    /// What is accepted has a normal form that is accepted and means the same.
    #[test]
    fn an_accepted_text_survives_its_normal_form(
        words in prop::collection::vec(prop::sample::select(&[
            "int a,", "[in] int* p,", "[out, count=n] uint64_t* q,", "size_t n,",
            "[in, string] const char* t,", "[user_check] void* v,", "[in] char x[4],",
            "unsigned long long w,", "[in, size=16] const void* z,", "s y,",
        ][..]), 0..6),
    ) {
        let list = words.concat();
        let source = format!(
            "enclave {{ struct s {{ int a; }}; untrusted {{ uint32_t f({}); }}; }};",
            list.trim_end_matches(',')
        );
        if let Ok(interface) = parse("a.edl", &source) {
            let normal = interface.to_string();
            prop_assert_eq!(parse("n.edl", &normal).unwrap().to_string(), normal.clone());
            prop_assert_eq!(generate("a.edl", &source).is_ok(), generate("a.edl", &normal).is_ok());
        }
    }
}

#[test]
fn long_runs_of_one_mark_end_without_deep_recursion() {
    for mark in ["*", "[", "(", "{", "/*", "//", "\"", "a", "1", "[1]", "enum e {"] {
        let run = mark.repeat(100_000);
        for source in [
            run.clone(),
            format!("enclave {{ {run}"),
            format!("enclave {{ struct s {{ int a{run}; }}; }};"),
            format!("enclave {{ untrusted {{ void f([in] int{run} p); }}; }};"),
        ] {
            let _ = generate("a.edl", &source);
        }
    }
}
