//! C names to Rust names.

/// `postern_file_t` to `PosternFile`: the tag's words, each with a capital, without `_t`.
pub(crate) fn camel(name: &str) -> String {
    let stem = name.strip_suffix("_t").filter(|stem| !stem.is_empty()).unwrap_or(name);
    let shouted = !stem.chars().any(|c| c.is_ascii_lowercase());
    let mut camel = String::new();
    for word in stem.split('_') {
        let mut letters = word.chars();
        camel.extend(letters.next().map(|first| first.to_ascii_uppercase()));
        camel.extend(letters.map(|c| if shouted { c.to_ascii_lowercase() } else { c }));
    }
    camel
}

/// Words that `r#` makes into names.
const RAW: &[&str] = &[
    "abstract", "as", "async", "await", "become", "box", "break", "const", "continue", "do", "dyn",
    "else", "enum", "extern", "false", "final", "fn", "for", "gen", "if", "impl", "in", "let",
    "loop", "macro", "match", "mod", "move", "mut", "override", "priv", "pub", "ref", "return",
    "static", "struct", "trait", "true", "try", "type", "typeof", "unsafe", "unsized", "use",
    "virtual", "where", "while", "yield",
];

/// `name` as a field or method; `None` if Rust has no way to write it.
pub(crate) fn field(name: &str) -> Option<String> {
    match name {
        "self" | "Self" | "super" | "crate" | "_" => None,
        _ if RAW.contains(&name) => Some(format!("r#{name}")),
        _ => Some(name.to_owned()),
    }
}

/// Names the generated code uses itself, so no type of the interface may take them.
const TAKEN: &[&str] = &[
    "CallError",
    "Carrier",
    "Clone",
    "Copy",
    "Debug",
    "Default",
    "Enclave",
    "Eq",
    "Err",
    "Future",
    "Host",
    "Malformed",
    "None",
    "Ok",
    "Option",
    "PartialEq",
    "Reader",
    "Request",
    "Result",
    "Self",
    "Send",
    "Some",
    "String",
    "Vec",
    "Wire",
    "Writer",
];

/// Whether `name` can be a type of the interface.
pub(crate) fn free_type(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_uppercase()) && !TAKEN.contains(&name)
}

/// An EDL comment as rustdoc text: outside code, brackets, angles and stars are plain characters.
pub(crate) fn rustdoc(comment: &str) -> String {
    let mut text = String::new();
    let mut code = false;
    for c in comment.chars() {
        match c {
            '`' => code = !code,
            '[' | ']' | '<' | '>' | '*' if !code => text.push('\\'),
            _ => {}
        }
        // A bare carriage return or a mark that turns the direction of writing is an error in Rust.
        let turns = matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        let plain = c == '\n' || !(c.is_control() || turns);
        text.push(if plain { c } else { ' ' });
    }
    text
}
