//! Text to tokens. Comments become the documentation of the token they stand at.
//!
//! Every step consumes at least one character, so it ends on any input; it indexes nothing by
//! byte, so any text is safe.
//! Follows the lexical rules of the SGX SDK's `sgx_edger8r`: `//` and `/* */` comments that do not
//! nest, decimal numbers, no preprocessor, no escapes in file names; blanks are spaces, tabs and ends
//! of lines, and a line comment ends with its line, not with the file.

use crate::error::{Fault, Position, refuse};

/// What a token is. Keywords are words too: the parser tells them apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Word(String),
    Number(u64),
    Text(String),
    Mark(char),
    End,
}

impl Kind {
    /// The token as a reader of the file would name it.
    pub fn shown(&self) -> String {
        match self {
            Self::Word(word) => format!("`{word}`"),
            Self::Number(number) => format!("`{number}`"),
            Self::Text(text) => format!("\"{text}\""),
            Self::Mark(mark) => format!("`{mark}`"),
            Self::End => "the end of the file".to_owned(),
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Token {
    pub kind: Kind,
    pub at: Position,
    /// Comments right above or before the token.
    pub before: String,
    /// Comments after the token on its own line.
    pub after: String,
}

/// Numbers above this do not fit the integers of `sgx_edger8r`.
const LARGEST_NUMBER: u64 = (1 << 62) - 1;

struct Scanner<'a> {
    rest: core::iter::Peekable<core::str::Chars<'a>>,
    at: Position,
}

impl Scanner<'_> {
    fn peek(&mut self) -> Option<char> {
        self.rest.peek().copied()
    }

    fn take(&mut self) -> Option<char> {
        let c = self.rest.next()?;
        if c == '\n' {
            self.at = Position { line: self.at.line.saturating_add(1), column: 1 };
        } else {
            self.at.column = self.at.column.saturating_add(1);
        }
        Some(c)
    }

    /// Skips spaces, tabs and ends of lines: `\n` or `\r\n`.
    fn skip_blanks(&mut self) {
        loop {
            let mut ahead = self.rest.clone();
            match (ahead.next(), ahead.next()) {
                (Some(' ' | '\t' | '\n'), _) | (Some('\r'), Some('\n')) => self.take(),
                _ => return,
            };
        }
    }

    fn take_while(&mut self, mut wanted: impl FnMut(char) -> bool) -> String {
        let mut taken = String::new();
        while let Some(c) = self.peek().filter(|c| wanted(*c)) {
            taken.push(c);
            self.take();
        }
        taken
    }
}

/// Splits `source` into tokens; the last one is always [`Kind::End`].
pub(crate) fn tokens(source: &str) -> Result<Vec<Token>, Fault> {
    let mut scanner =
        Scanner { rest: source.chars().peekable(), at: Position { line: 1, column: 1 } };
    let mut tokens: Vec<Token> = Vec::new();
    let mut before = String::new();
    // The last line that the token or comment before this place reaches.
    let mut last_line = 0;
    loop {
        scanner.skip_blanks();
        let at = scanner.at;
        let Some(c) = scanner.peek() else {
            tokens.push(Token { kind: Kind::End, at, before, after: String::new() });
            return Ok(tokens);
        };
        if c == '/' {
            let text = comment(&mut scanner, at)?;
            match tokens.last_mut().filter(|token| token.at.line == at.line && before.is_empty()) {
                Some(token) => add(&mut token.after, &text),
                None => {
                    if at.line > last_line + 1 {
                        before.clear(); // A blank line: the comment above is not about this.
                    }
                    add(&mut before, &text);
                }
            }
            last_line = scanner.at.line;
            continue;
        }
        if at.line > last_line + 1 {
            before.clear();
        }
        let kind = token(&mut scanner, c, at)?;
        tokens.push(Token { kind, at, before: core::mem::take(&mut before), after: String::new() });
        last_line = scanner.at.line;
    }
}

fn add(doc: &mut String, text: &str) {
    if !text.is_empty() {
        if !doc.is_empty() {
            doc.push('\n');
        }
        doc.push_str(text);
    }
}

fn token(scanner: &mut Scanner<'_>, first: char, at: Position) -> Result<Kind, Fault> {
    if first.is_ascii_alphabetic() || first == '_' {
        return Ok(Kind::Word(scanner.take_while(|c| c.is_ascii_alphanumeric() || c == '_')));
    }
    if first.is_ascii_digit() {
        let digits = scanner.take_while(|c| c.is_ascii_alphanumeric() || c == '_');
        return match digits.parse::<u64>() {
            Ok(number) if number <= LARGEST_NUMBER => Ok(Kind::Number(number)),
            Ok(_) => refuse(at, format!("number {digits} is too large"), "write one below 2^62"),
            Err(_) => refuse(
                at,
                format!("`{digits}` is neither a number nor a name"),
                "write numbers in decimal digits only, and begin names with a letter or `_`",
            ),
        };
    }
    if first == '"' {
        scanner.take();
        let text = scanner.take_while(|c| c != '"' && c != '\n');
        return match scanner.take() {
            Some('"') => Ok(Kind::Text(text)),
            _ => refuse(at, "the text has no end", "close it with `\"` on the same line"),
        };
    }
    match first {
        '{' | '}' | '(' | ')' | '[' | ']' | '*' | ',' | ';' | '=' => {
            scanner.take();
            Ok(Kind::Mark(first))
        }
        '#' => refuse(
            at,
            "the EDL grammar has no preprocessor",
            "take the line out; write numbers as numbers and put definitions into a C header",
        ),
        _ => refuse(
            at,
            format!("character {first:?} has no meaning here"),
            "take it out; outside comments EDL is plain ASCII",
        ),
    }
}

/// Takes one comment and gives its text without the marks.
fn comment(scanner: &mut Scanner<'_>, at: Position) -> Result<String, Fault> {
    scanner.take();
    match scanner.peek() {
        Some('/') => {
            let line = scanner.take_while(|c| c != '\n');
            if scanner.peek().is_none() {
                let remedy = "end its line: write a newline at the end of the file";
                return refuse(at, "the file ends in a line comment", remedy);
            }
            Ok(line.trim_start_matches('/').trim().to_owned())
        }
        Some('*') => {
            scanner.take();
            let mut text = String::new();
            loop {
                let here = scanner.at;
                let Some(c) = scanner.take() else {
                    return refuse(at, "the comment has no end", "close it with `*/`");
                };
                match (c, scanner.peek()) {
                    ('*', Some('/')) => {
                        scanner.take();
                        return Ok(plain(&text));
                    }
                    ('/', Some('*')) => {
                        return refuse(
                            here,
                            "a comment begins inside a comment",
                            "close the first one before; EDL comments do not nest",
                        );
                    }
                    _ => text.push(c),
                }
            }
        }
        _ => refuse(at, "`/` has no meaning here", "begin a comment with `//` or `/*`"),
    }
}

/// A block comment's lines without the column of stars in front.
fn plain(text: &str) -> String {
    let lines: Vec<&str> = text
        .lines()
        .map(|line| {
            let line = line.trim();
            line.strip_prefix('*').map_or(line, str::trim_start)
        })
        .collect();
    lines.join("\n").trim().to_owned()
}
