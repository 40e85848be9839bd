//! A change in an EDL file or in the generator shows as a change in a file of this repository.
//!
//! `POSTERN_UPDATE_GOLDEN=1 cargo test -p postern-edl-gen --test golden` writes the files anew. The
//! boundary crate's tests compile the small one and run it.
#![allow(clippy::unwrap_used)]

use postern_edl_gen::{fingerprint, generate, parse};

const SMALL: &str = include_str!("golden/small.edl");
const POSTERN: &str = include_str!("../../postern.edl");
const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

fn compare(edl: &str, source: &str, golden: &str) {
    const RENEW: &str = "if this is meant, POSTERN_UPDATE_GOLDEN=1 cargo test -p postern-edl-gen \
                         --test golden writes the file anew: commit it with the change";
    let code = generate(edl, source).unwrap_or_else(|error| panic!("{error}"));
    let path = format!("{GOLDEN}/{golden}");
    if std::env::var_os("POSTERN_UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &code).unwrap();
        println!("wrote {path}");
    }
    let was = std::fs::read_to_string(&path).unwrap();
    for (n, (is, was)) in code.lines().zip(was.lines()).enumerate() {
        assert_eq!(is, was, "{edl} gives another line {} than {golden} has; {RENEW}", n + 1);
    }
    assert_eq!(code.len(), was.len(), "{edl} gives more or fewer lines than {golden} has; {RENEW}");
}

#[test]
fn generated_code_changes_only_with_the_golden_file() {
    compare("small.edl", SMALL, "small.rs");
}

/// What the boundary of this version is, as code: a change in postern.edl stands beside it.
#[test]
fn the_boundary_changes_only_with_its_golden_file() {
    compare("postern.edl", POSTERN, "postern.rs");
}

#[test]
fn one_more_member_changes_the_code_and_the_fingerprint() {
    let more = SMALL.replace("size_t total;", "size_t total; uint32_t tax;");
    assert_ne!(more, SMALL);
    assert_ne!(generate("small.edl", &more).unwrap(), generate("small.edl", SMALL).unwrap());
    let (more, less) = (parse("a", &more).unwrap(), parse("a", SMALL).unwrap());
    assert_ne!(fingerprint(&more), fingerprint(&less));
}

#[test]
fn comments_blanks_and_spellings_of_a_type_do_not_change_the_fingerprint() {
    let one = "enclave { struct s { short int a; uint8_t b[2]; }; untrusted { \
               uint32_t f([in] const struct s* p, unsigned q); }; };";
    let other = "/* x */ enclave {\n struct s {\n short a; // a\n uint8_t b [ 2 ]; };\n\
                 untrusted { /* f */ uint32_t f([in] const s *p, unsigned int q); };\n};\n";
    let (one, other) = (parse("a", one).unwrap(), parse("a", other).unwrap());
    assert_eq!(one.to_string(), other.to_string());
    assert_eq!(fingerprint(&one), fingerprint(&other));
}

#[test]
fn normal_form_is_itself_accepted_and_its_own_normal_form() {
    for source in [SMALL, POSTERN] {
        let interface = parse("a", source).unwrap();
        let normal = interface.to_string();
        assert_eq!(parse("normal", &normal).unwrap().to_string(), normal);
    }
}

#[test]
fn comments_of_the_edl_stand_in_the_code() {
    let code = generate("small.edl", SMALL).unwrap();
    for line in [
        "/// How urgent an order is.\n",
        "    /// It can wait.\n    #[default]\n    Calm = 0,",
        "    /// Below zero in the cellar.\n    pub row: i16,",
        "/// A list \\<with\\> \\[brackets\\] and \\*stars\\*.\n/// Ordered by row.\n",
        "    /// Nothing in, nothing out.\n    fn ping(",
    ] {
        assert!(code.contains(line), "{line:?} is not in\n{code}");
    }
    assert!(!code.contains("uses everything"), "the file's header belongs to no item");
}

/// What Rust refuses inside a comment: a carriage return alone, marks of the writing's direction.
#[test]
fn comments_carry_no_character_that_rust_refuses_in_them() {
    let source = "enclave { untrusted { uint32_t f(); // a\rb\u{202e}c\0d\n }; };";
    let code = generate("a.edl", source).unwrap();
    assert!(code.contains("    /// a b c d\n    fn f("), "{code}");
}

/// The 64-bit FNV-1a test vectors of its authors' reference.
#[test]
fn fingerprint_is_the_published_fnv_1a_of_the_normal_form() {
    fn fnv(text: &str) -> u64 {
        let mut hash = 14_695_981_039_346_656_037_u64;
        for byte in text.bytes() {
            hash = (hash ^ u64::from(byte)).wrapping_mul(1_099_511_628_211);
        }
        hash
    }
    assert_eq!(fnv("foobar"), 0x8594_4171_f739_67e8);
    let interface = parse("a", SMALL).unwrap();
    assert_eq!(fingerprint(&interface), fnv(&interface.to_string()));
}

/// The doorbells reach no daemon: a message of theirs would be a call that it must serve.
#[test]
fn switchless_calls_make_a_trait_and_no_message() {
    let source = |suffix: &str| {
        format!(
            "enclave {{ untrusted {{ uint32_t f(uint8_t n, [user_check] void* p) {suffix}; }}; }};"
        )
    };
    let message = generate("a.edl", &source("")).unwrap();
    assert!(message.contains("FRequest") && !message.contains("Switchless"));
    let code = generate("a.edl", &source("transition_using_threads")).unwrap();
    assert!(!code.contains("FRequest") && code.contains("pub trait Switchless {"), "{code}");
    let method =
        "    fn f(\n        &self,\n        n: u8,\n        p: u64,\n    ) -> Result<(), u32>;";
    assert!(code.contains(method), "{code}");
}

/// A pointer that nobody copies for the callee is the port's and no other.
#[test]
fn only_the_port_is_handed_over_unchecked() {
    let interface = parse("postern.edl", POSTERN).unwrap();
    let unchecked = |function: &postern_edl_gen::ast::Function| {
        let parameters = function.parameters.iter().filter(|it| it.attributes.user_check);
        parameters.map(|it| format!("{}.{}", function.name, it.name)).collect::<Vec<_>>()
    };
    let all: Vec<String> = interface.untrusted.iter().flat_map(unchecked).collect();
    let port = ["postern_attach.port", "postern_wake.port", "postern_sleep.port"];
    assert_eq!(all, port);
    assert!(interface.trusted.is_empty(), "the host calls nothing in the enclave");
}
