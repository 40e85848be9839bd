//! What is accepted and what is refused, one row a rule.
//!
//! The rules are those of the SGX Developer Reference and of `sgx_edger8r`, not of this parser.
#![allow(clippy::unwrap_used)]

use postern_edl_gen::{generate, parse};

/// An untrusted function with these parameters, and a trusted one to name.
fn with(parameters: &str) -> String {
    format!(
        "enclave {{\n struct s {{ int a; }};\n trusted {{ public void t(void); void u(void); }};\n \
         untrusted {{\n  void f({parameters});\n }};\n}};\n"
    )
}

/// The same with a C header, so that unknown names are types of it.
fn with_header(parameters: &str) -> String {
    with(parameters).replacen("enclave {", "enclave { include \"user.h\"", 1)
}

#[track_caller]
fn accepted(source: &str) {
    if let Err(error) = parse("a.edl", source) {
        panic!("refused: {error}\n{source}");
    }
}

#[track_caller]
fn refused(source: &str, why: &str) {
    match parse("a.edl", source) {
        Ok(_) => panic!("accepted, though {why}:\n{source}"),
        Err(error) => {
            assert!(error.what.contains(why), "expected {why:?}, got {error}\n{source}");
            assert!(!error.remedy.is_empty(), "{error}");
        }
    }
}

#[test]
fn parameters_that_the_sdk_accepts_pass() {
    for parameters in [
        "",
        "void",
        "int a, unsigned b, short int c, long long d, long int i, unsigned long e, unsigned char g",
        "float a, double b, long double c, wchar_t d, size_t e, char g",
        "int8_t a, uint8_t b, int16_t c, uint16_t d, int32_t e, uint32_t g, int64_t h, uint64_t i",
        "struct s a, s b",
        "[in] int* p",
        "[out] int* p",
        "[in, out] int* p",
        "[user_check] int* p",
        "[user_check] void** p",
        "[in] int** p",
        "[in] const struct s* p",
        "[in, size=4] void* p",
        "[in, size=n] const void* p, size_t n",
        "size_t n, [out, count=n] int* p",
        "[in, out, size=n, count=4] char* p, uint32_t n",
        "[in, string] const char* p",
        "[in, out, string] char* p",
        "[in, wstring] const wchar_t* p",
        "[in] int a[4]",
        "[out] int a[4][4]",
        "[user_check] int a[4]",
        "[in] int* in, int out, int size, int string",
    ] {
        accepted(&with(parameters));
    }
    for parameters in [
        "FILE a",
        "[in] FILE* p",
        "[in, isptr] handle p",
        "[in, isptr, readonly] handle p",
        "[in, isptr, size=n] handle p, size_t n",
        "[in, isary] array p",
        "[in, out, isary] array p",
        "[user_check, isptr] handle p",
        "[in, isptr, string] text p",
        "[in, size=n] void* p, length_t n",
        "[in] struct stat* p, struct other o, union else_t e, enum kind k",
    ] {
        accepted(&with_header(parameters));
    }
}

#[test]
fn parameters_that_the_sdk_refuses_are_refused() {
    for (parameters, why) in [
        // A pointer needs a direction or user_check, not both.
        ("int* p", "without a direction"),
        ("const char* p", "without a direction"),
        ("int a[4]", "without a direction"),
        ("[in, user_check] int* p", "a direction and user_check"),
        ("[user_check, out] int* p", "a direction and user_check"),
        ("[in] int a", "neither a pointer nor an array"),
        ("[user_check] int a", "neither a pointer nor an array"),
        // size, count and string need a direction.
        ("[size=4] void* p", "no direction"),
        ("[count=4] int* p", "no direction"),
        ("[string] char* p", "no direction"),
        ("[wstring] wchar_t* p", "no direction"),
        ("[user_check, size=4] void* p", "no direction"),
        ("[user_check, string] char* p", "no direction"),
        // Strings.
        ("[out, string] char* p", "only out"),
        ("[out, wstring] wchar_t* p", "only out"),
        ("[in, string, wstring] char* p", "both string and wstring"),
        ("[in, string, size=4] char* p", "a string with a size"),
        ("[in, string, count=4] char* p", "a string with a size"),
        ("[in, string] int* p", "not a char*"),
        ("[in, string] char** p", "not a char*"),
        ("[in, string] wchar_t* p", "not a char*"),
        ("[in, wstring] char* p", "not a wchar_t*"),
        // void* with a direction needs size.
        ("[in] void* p", "no size"),
        ("[out, count=4] void* p", "no size"),
        ("void p, int a", "of type void"),
        ("int a, void", "expected a name"),
        // Arrays.
        ("[in] int* a[4]", "array of pointers"),
        ("[in] int a[0]", "no elements"),
        ("[in] int a[]", "without a number"),
        ("[in] int a[n], int n", "expected a number"),
        ("[in, size=4] int a[4]", "array with a size"),
        ("[in, count=4] int a[4]", "array with a size"),
        // Size values are identifiers or numbers, and name an integer beside them.
        ("[in, size=n+1] void* p, int n", "no meaning"),
        ("[in, size=-1] void* p", "no meaning"),
        ("[in, size=sizeof(int)] void* p", "expected"),
        ("[in, size=\"4\"] void* p", "expected a number or a name"),
        ("[in, size] void* p", "expected `=`"),
        ("[in, size=0] void* p", "is 0"),
        ("[in, size=0x10] void* p", "neither a number nor a name"),
        ("[in, size=n] void* p", "names no integer"),
        ("[in, size=p] void* p", "names no integer"),
        ("[in, size=n] void* p, [in] int* n", "names no integer"),
        ("[in, size=n] void* p, double n", "names no integer"),
        ("[in, size=n] void* p, struct s n", "names no integer"),
        ("[in, size=n] void* p, s n", "names no integer"),
        ("[in, size=4, size=8] void* p", "`size` twice"),
        // Attributes.
        ("[in, in] int* p", "`in` twice"),
        ("[] int* p", "empty attributes"),
        ("[in out] int* p", "expected `]`"),
        ("[inout] int* p", "not an attribute"),
        ("[in=1] int* p", "with a value"),
        ("[in, sizefunc=f] void* p", "obsolete"),
        ("[in, isptr] int* p", "`isptr` on"),
        ("[in, isary] int* p", "`isary` on"),
        ("[in, readonly] int* p", "`readonly` on"),
        ("[in, isptr] int p", "`isptr` on"),
        ("[in, isptr] s p", "`isptr` on"),
        // const is the outermost qualifier of a pointer.
        ("const int a", "const and not a pointer"),
        ("[in] int const* p", "behind a type"),
        ("[in] int* const p", "behind a type"),
        ("[out] const int* p", "constant and out"),
        ("[in, out] const int* p", "constant and out"),
        // Types and names.
        ("signed int a", "not in the EDL grammar"),
        ("volatile int a", "not in the EDL grammar"),
        ("unknown a", "not defined"),
        ("struct unknown a", "not defined"),
        ("union s a", "is a struct, not a union"),
        ("struct { int a; } b", "expected the name of a struct"),
        ("struct n { int a; } b", "definition inside a declaration"),
        ("int", "expected a name"),
        ("int allow", "a word of the grammar"),
        ("int 4a", "neither a number nor a name"),
        ("int a, int a", "two parameters"),
        ("int a; int b", "expected `)`"),
        ("int a,", "expected a type"),
        ("int a = 4", "expected `)`"),
        ("...", "no meaning"),
    ] {
        refused(&with(parameters), why);
    }
    for (parameters, why) in [
        ("[in, isptr, isary] handle p", "both isptr and isary"),
        ("[in, isary, readonly] handle p", "readonly and not a pointer"),
        ("[in, isary, size=4] handle p", "isary and a size"),
        ("[user_check, readonly] handle p", "readonly and not a pointer"),
        ("[in, out, isptr, readonly] handle p", "constant and out"),
        ("[in] handle p", "neither a pointer nor an array"),
        ("[isptr] handle p", "without a direction"),
    ] {
        refused(&with_header(parameters), why);
    }
}

#[test]
fn functions_and_their_suffixes_pass_and_fail_as_in_the_sdk() {
    let file = |trusted: &str, untrusted: &str| {
        format!("enclave {{ trusted {{ {trusted} }}; untrusted {{ {untrusted} }}; }};")
    };
    for (trusted, untrusted) in [
        ("", ""),
        ("public void t();", ""),
        ("public void t() transition_using_threads; void u();", "void f() allow(t, u);"),
        ("public int t();", "void f() propagate_errno;"),
        ("public int t();", "void f() allow(t) propagate_errno transition_using_threads;"),
        ("public int t();", "void f() transition_using_threads propagate_errno;"),
        ("public int t();", "void f() allow();"),
        ("public int t();", "[cdecl] void f(); [stdcall, dllimport] void g(); [fastcall] int h();"),
        ("include \"t.h\" public handle t();", "include \"u.h\" FILE* f();"),
        ("public char* t();", "void* f();"),
    ] {
        accepted(&file(trusted, untrusted));
    }
    for (trusted, untrusted, why) in [
        ("void t();", "", "no trusted function is public"),
        ("private void t();", "", "not in the EDL grammar"),
        ("public void t() allow(t);", "", "`allow` on a trusted"),
        ("public void t() propagate_errno;", "", "`propagate_errno` on a trusted"),
        ("[cdecl] void t();", "", "trusted function with attributes"),
        ("public void t(); public void t();", "", "declared twice"),
        ("public void t();", "void t();", "declared twice"),
        ("public void t(); include \"t.h\"", "", "include between functions"),
        ("", "public void f();", "`public` on an untrusted"),
        ("", "void f() allow(t);", "no trusted function"),
        ("public void t();", "void f() allow(t, t);", "allowed twice"),
        ("public void t();", "void f() propagate_errno allow(t);", "`allow` behind"),
        ("public void t();", "void f() allow t;", "expected `(`"),
        ("", "void f() propagate_errno propagate_errno;", "suffix twice"),
        ("", "void f() switchless;", "expected `;`"),
        ("", "[cdecl, stdcall] void f();", "more than one calling convention"),
        ("", "[dllimport, dllimport] void f();", "more than one calling convention"),
        ("", "[pascal] void f();", "not a calling convention"),
        ("", "int[4] f();", "returns an array"),
        ("", "const int f();", "`const` on a returned value"),
        ("public const char* t();", "", "`const` on a returned value"),
        ("", "f();", "expected the name of a function"),
        ("", "void f()", "expected `;`"),
        ("", "unknown f();", "not defined"),
        ("", "struct s { int a; };", "definition inside a declaration"),
    ] {
        refused(&file(trusted, untrusted), why);
    }
}

#[test]
fn definitions_and_files_pass_and_fail_as_in_the_sdk() {
    for inside in [
        "",
        "include \"a.h\" include \"b.h\"",
        "from \"other.edl\" import *;",
        "from \"other.edl\" import f, g; untrusted { void h() allow(f); };",
        "struct s { int a; char b[4][4]; };",
        "struct s { [size=n] void* p; size_t n; [count=2] int* q; int* r; };",
        "struct s { char* text; };",
        "\r\n\tstruct s {\r\n int a; };\r\n",
        "union u { int a; float b; }; struct s { union u u; u v; };",
        "enum e { A, B = 4, C = B, D }; struct s { enum e e; };",
        "enum { A = 1 };",
        "untrusted { void f(); }; untrusted { void g(); };",
        "// line /* not a block\n/* block // not a line */",
    ] {
        accepted(&format!("enclave {{ {inside} }};"));
    }
    for (inside, why) in [
        ("include \"a.h\";", "`;` after an include"),
        ("include <a.h>", "no meaning"),
        ("include \"\"", "a file name in quotes"),
        ("include \"a.h\n\"", "no end"),
        ("from \"other.edl\" import ;", "expected the name of a function"),
        ("from \"other.edl\" import f", "expected `;`"),
        ("#define N 4", "no preprocessor"),
        ("/* a /* b */ */", "comment begins inside a comment"),
        ("/* a", "has no end"),
        ("struct s { };", "nothing in it"),
        ("enum e { };", "nothing in it"),
        ("struct s { int a, b; };", "more than one member"),
        ("struct s { int a : 3; };", "no meaning"),
        ("struct s { int a; int a; };", "stands twice"),
        ("struct s { int a[0]; };", "no elements"),
        ("struct s { int a[]; };", "without a number"),
        ("struct s { int* a[4]; };", "array of pointers"),
        ("struct s { void a; };", "of type void"),
        ("struct s { const char* a; };", "`a` is const"),
        ("union u { const char* a; };", "`a` is const"),
        ("struct s { long long int a; };", "`int` behind `long long`"),
        ("struct s { unsigned long long int a; };", "`int` behind `long long`"),
        // Blanks that are none to the tool: a form feed, a bare carriage return, a wide blank.
        ("struct s\u{c}{ int a; };", "has no meaning"),
        ("struct s\r{ int a; };", "has no meaning"),
        ("struct s\u{a0}{ int a; };", "has no meaning"),
        ("struct s { [in] int* a; };", "attribute of parameters"),
        ("struct s { [user_check] int* a; };", "attribute of parameters"),
        ("struct s { [size=4] int a; };", "`size` or `count` on member"),
        ("union u { [size=4] int* a; };", "`size` or `count` on member"),
        ("struct s { [size=n] int* a; };", "names no integer"),
        ("struct s { struct t { int a; } t; };", "definition inside a declaration"),
        ("struct s { int a; } t;", "expected `;`"),
        ("struct s { int a; }", "expected `;`"),
        ("struct { int a; };", "expected the name of the struct"),
        ("struct s { int a; }; struct s { int b; };", "defined twice"),
        ("struct s { int a; }; enum s { A };", "defined twice"),
        ("enum e { A, A };", "defined twice"),
        ("enum e { A }; enum g { A };", "defined twice"),
        ("enum e { A, };", "`,` before `}`"),
        ("enum e { A B };", "expected `,` or `}`"),
        ("enum e { A = B };", "no earlier enumerator"),
        ("enum e { A = 4611686018427387904 };", "too large"),
        ("typedef int a;", "cannot stand here"),
        ("void f();", "cannot stand here"),
        ("enclave { };", "cannot stand here"),
        ("caf\u{e9}", "no meaning"),
        ("trusted { }", "expected `;`"),
    ] {
        refused(&format!("enclave {{ {inside} }};"), why);
    }
    for (file, why) in [
        ("", "expected `enclave`"),
        ("trusted { };", "expected `enclave`"),
        ("enclave { }", "expected `;`"),
        ("enclave { ", "expected"),
        ("enclave { }; enclave { };", "after the end"),
        ("enclave { }; // no end of line", "ends in a line comment"),
        ("enclave { };\n//", "ends in a line comment"),
    ] {
        refused(file, why);
    }
}

#[test]
fn an_error_names_file_line_and_column_and_says_what_to_do() {
    let source = "enclave {\n  untrusted {\n\tuint32_t f(int a,\n     int* p);\n  };\n};\n";
    let error = parse("edl/a.edl", source).unwrap_err();
    assert_eq!(
        error.to_string(),
        "edl/a.edl:4:11: `p` is a pointer without a direction; \
         add `in`, `out`, both, or `user_check`"
    );
    let error = parse("a.edl", "enclave {\n /* \u{e9}\u{e9} */ # };").unwrap_err();
    assert_eq!((error.at.line, error.at.column), (2, 11));
}

#[test]
fn what_the_generator_does_not_carry_is_refused_by_name() {
    let functions = |text: &str| format!("enclave {{ untrusted {{ {text} }}; }};");
    let call = |parameters: &str| functions(&format!("uint32_t f({parameters});"));
    let long = "uint32_t f([in, size=n] void* p, [out, size=n] void* q, size_t n);";
    for (source, why) in [
        ("enclave { include \"a.h\" };".to_owned(), "headers are not read"),
        ("enclave { from \"a.edl\" import *; };".to_owned(), "other files are not read"),
        ("enclave { trusted { public void t(); }; };".to_owned(), "into the enclave"),
        ("enclave { union u { int a; }; };".to_owned(), "`union u` is not carried"),
        ("enclave { enum { A }; };".to_owned(), "without a name"),
        ("enclave { enum e { A = 2147483648 }; };".to_owned(), "does not fit an int"),
        ("enclave { enum e { A, B = A }; };".to_owned(), "name or value that is taken"),
        ("enclave { enum e { SELF }; };".to_owned(), "name or value that is taken"),
        ("enclave { struct s { int* p; }; };".to_owned(), "is a pointer"),
        ("enclave { struct s { int a[33]; }; };".to_owned(), "more than 32 elements"),
        ("enclave { struct s { int a[2][2]; }; };".to_owned(), "more than one array bound"),
        ("enclave { struct s { struct s s; }; };".to_owned(), "before its definition"),
        ("enclave { struct a { struct b b; }; struct b { int a; }; };".to_owned(), "before its"),
        ("enclave { struct s { int self; }; };".to_owned(), "cannot be a name in Rust"),
        ("enclave { struct vec_t { int a; }; };".to_owned(), "`Vec` in Rust"),
        ("enclave { struct a_b { int a; }; struct a_b_t { int a; }; };".to_owned(), "`AB` in Rust"),
        ("enclave { struct _1 { int a; }; };".to_owned(), "`1` in Rust"),
        (functions("void f();"), "does not return uint32_t"),
        (functions("uint32_t f() propagate_errno;"), "propagate_errno"),
        (functions("uint32_t f_a(); uint32_t f__a();"), "`FARequest` in Rust"),
        (functions("uint32_t _2();"), "in Rust"),
        (call("float a"), "of type float"),
        (call("[in] int** p"), "pointer to a pointer"),
        (call("[in, out, string] char* p"), "string in and out"),
        (call("[in, size=8] uint32_t* p"), "elements that are wider"),
        (call("[in, size=2, count=2] char* p"), "both size and count"),
        (call("[in, size=n] void* p, int n"), "not unsigned"),
        (call("[out, size=n] void* p, int n"), "not unsigned"),
        (functions(long), "length of two buffers"),
        (call("[in, wstring] wchar_t* p"), "wchar_t"),
        (functions("uint32_t f([in] int* p) transition_using_threads;"), "makes no message"),
        (functions("uint32_t f(int p[4]) transition_using_threads;"), "without a direction"),
        (functions("void f() transition_using_threads;"), "does not return uint32_t"),
    ] {
        match generate("a.edl", &source) {
            Ok(code) => panic!("carried, though {why}: {source}\n{code}"),
            Err(error) => assert!(error.what.contains(why), "expected {why:?}, got {error}"),
        }
    }
}
