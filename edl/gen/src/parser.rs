//! Tokens to a tree, after the grammar of the SGX SDK's `sgx_edger8r`.
//!
//! The grammar has no nesting, so the parser does not recurse: its stack is constant, and each loop
//! takes a token a turn. What the grammar allows and the tool then refuses is in [`crate::check`].

use crate::ast::{
    Attributes, Composite, Declaration, Enumerator, Function, Import, Interface, Keyword,
};
use crate::error::{Fault, Position, refuse};
use crate::lexer::{Kind, Token};

/// Words of the grammar, which cannot be names.
const RESERVED: &[&str] = &[
    "enclave",
    "trusted",
    "untrusted",
    "include",
    "from",
    "import",
    "public",
    "allow",
    "propagate_errno",
    "transition_using_threads",
    "struct",
    "union",
    "enum",
    "const",
    "void",
    "char",
    "short",
    "int",
    "long",
    "unsigned",
    "float",
    "double",
    "size_t",
    "wchar_t",
    "int8_t",
    "int16_t",
    "int32_t",
    "int64_t",
    "uint8_t",
    "uint16_t",
    "uint32_t",
    "uint64_t",
];

pub(crate) struct Parser {
    tokens: Vec<Token>,
    next: usize,
}

pub(crate) type Parsed<T> = Result<T, Fault>;

/// Parses a whole file. `tokens` ends with [`Kind::End`].
pub(crate) fn parse(tokens: Vec<Token>) -> Parsed<Interface> {
    let mut parser = Parser { tokens, next: 0 };
    parser.word("enclave", "begin the file with `enclave {`")?;
    parser.mark('{', "open the enclave with `{`")?;
    let mut interface = Interface::default();
    while !parser.skips('}') {
        parser.item(&mut interface)?;
    }
    parser.mark(';', "end the enclave with `};`")?;
    match parser.peek() {
        Kind::End => Ok(interface),
        other => {
            let what = format!("{} stands after the end of the enclave", other.shown());
            refuse(parser.at(), what, "a file has one `enclave { ... };` and nothing after it")
        }
    }
}

impl Parser {
    pub(crate) fn token(&self) -> &Token {
        // The last token is `End` and `take` never moves past it.
        &self.tokens[self.next]
    }

    pub(crate) fn peek(&self) -> &Kind {
        &self.token().kind
    }

    pub(crate) fn at(&self) -> Position {
        self.token().at
    }

    pub(crate) fn take(&mut self) -> Token {
        let token = self.token().clone();
        if token.kind != Kind::End {
            self.next += 1;
        }
        token
    }

    pub(crate) fn is(&self, mark: char) -> bool {
        *self.peek() == Kind::Mark(mark)
    }

    pub(crate) fn is_word(&self, word: &str) -> bool {
        matches!(self.peek(), Kind::Word(here) if here == word)
    }

    pub(crate) fn skips(&mut self, mark: char) -> bool {
        let here = self.is(mark);
        if here {
            self.take();
        }
        here
    }

    pub(crate) fn skips_word(&mut self, word: &str) -> bool {
        let here = self.is_word(word);
        if here {
            self.take();
        }
        here
    }

    /// The comment after the token taken last, on its line.
    fn comment_behind(&self) -> &str {
        self.next.checked_sub(1).map_or("", |last| &self.tokens[last].after)
    }

    pub(crate) fn expected<T>(&self, wanted: &str, remedy: &str) -> Parsed<T> {
        refuse(self.at(), format!("expected {wanted}, found {}", self.peek().shown()), remedy)
    }

    pub(crate) fn mark(&mut self, mark: char, remedy: &str) -> Parsed<()> {
        if self.skips(mark) { Ok(()) } else { self.expected(&format!("`{mark}`"), remedy) }
    }

    fn word(&mut self, word: &str, remedy: &str) -> Parsed<()> {
        if self.skips_word(word) { Ok(()) } else { self.expected(&format!("`{word}`"), remedy) }
    }

    fn text(&mut self, remedy: &str) -> Parsed<String> {
        match self.peek() {
            Kind::Text(text) if !text.is_empty() => {
                let text = text.clone();
                self.take();
                Ok(text)
            }
            _ => self.expected("a file name in quotes", remedy),
        }
    }

    /// A name of the author's own.
    pub(crate) fn name(&mut self, of: &str) -> Parsed<(String, Position)> {
        let at = self.at();
        match self.peek() {
            Kind::Word(word) if RESERVED.contains(&word.as_str()) => {
                let what = format!("`{word}` is a word of the grammar, not {of}");
                refuse(at, what, "choose another name")
            }
            Kind::Word(word) => {
                let word = word.clone();
                self.take();
                Ok((word, at))
            }
            _ => self.expected(of, "write a name of letters, digits and `_`"),
        }
    }

    fn item(&mut self, interface: &mut Interface) -> Parsed<()> {
        let at = self.at();
        let Kind::Word(word) = self.peek().clone() else {
            return self.expected(
                "`trusted`, `untrusted`, `struct`, `union`, `enum`, `include`, `from` or `}`",
                "begin a section or a definition here, or close the enclave with `};`",
            );
        };
        match word.as_str() {
            "include" => return self.include(interface),
            "from" => self.import(interface, at)?,
            "struct" | "union" => {
                let composite = self.composite()?;
                interface.composites.push(composite);
            }
            "enum" => {
                let composite = self.enumeration()?;
                interface.composites.push(composite);
            }
            "trusted" => self.section(interface, true)?,
            "untrusted" => self.section(interface, false)?,
            _ => {
                return refuse(
                    at,
                    format!("`{word}` cannot stand here"),
                    "put functions into `trusted { ... };` or `untrusted { ... };`",
                );
            }
        }
        self.mark(';', "end it with `;`")?;
        // A comment behind the closing `;` of a definition belongs to it.
        if matches!(word.as_str(), "struct" | "union" | "enum") {
            let behind = self.comment_behind().to_owned();
            if let Some(definition) = interface.composites.last_mut() {
                join(&mut definition.doc, &behind);
            }
        }
        Ok(())
    }

    fn include(&mut self, interface: &mut Interface) -> Parsed<()> {
        let at = self.take().at;
        let file = self.text("write include \"file.h\"")?;
        interface.includes.push((file, at));
        if self.is(';') {
            let remedy = "take the `;` out: an include ends with the file name";
            return refuse(self.at(), "`;` after an include", remedy);
        }
        Ok(())
    }

    fn import(&mut self, interface: &mut Interface, at: Position) -> Parsed<()> {
        self.take();
        let remedy = "write from \"file.edl\" import name, name; or import *;";
        let file = self.text(remedy)?;
        self.word("import", remedy)?;
        let mut names = Vec::new();
        if !self.skips('*') {
            loop {
                names.push(self.name("the name of a function")?.0);
                if !self.skips(',') {
                    break;
                }
            }
        }
        interface.imports.push(Import { file, names, at });
        Ok(())
    }

    fn composite(&mut self) -> Parsed<Composite> {
        let head = self.take();
        let keyword = if head.kind == Kind::Word("union".to_owned()) {
            Keyword::Union
        } else {
            Keyword::Struct
        };
        let (name, at) = self.name(&format!("the name of the {keyword}"))?;
        self.mark('{', "open the definition with `{`")?;
        let mut members = Vec::new();
        while !self.skips('}') {
            let mut member = self.declaration()?;
            if self.is(',') {
                let remedy = "end it with `;` and declare the next member with a type of its own";
                return refuse(self.at(), "more than one member in a declaration", remedy);
            }
            self.mark(';', "end the member with `;` (bit fields are not in the grammar)")?;
            join(&mut member.doc, self.comment_behind());
            members.push(member);
        }
        let enumerators = Vec::new();
        Ok(Composite { keyword, name: Some(name), members, enumerators, doc: head.before, at })
    }

    fn enumeration(&mut self) -> Parsed<Composite> {
        let head = self.take();
        let (name, at) = if self.is('{') {
            (None, head.at)
        } else {
            let (name, at) = self.name("the name of the enum")?;
            (Some(name), at)
        };
        self.mark('{', "open the definition with `{`")?;
        let mut enumerators = Vec::new();
        while !self.is('}') {
            let mut doc = self.token().before.clone();
            let (name, at) = self.name("the name of an enumerator")?;
            let value = if self.skips('=') { Some(self.amount()?) } else { None };
            join(&mut doc, self.comment_behind());
            if self.skips(',') {
                join(&mut doc, self.comment_behind());
                if self.is('}') {
                    return refuse(self.at(), "`,` before `}`", "take the last `,` out");
                }
            } else if !self.is('}') {
                return self.expected("`,` or `}`", "separate enumerators with `,`");
            }
            enumerators.push(Enumerator { name, value, doc, at });
        }
        self.mark('}', "close the enum with `}`")?;
        let (keyword, members) = (Keyword::Enum, Vec::new());
        Ok(Composite { keyword, name, members, enumerators, doc: head.before, at })
    }

    fn section(&mut self, interface: &mut Interface, trusted: bool) -> Parsed<()> {
        self.take();
        self.mark('{', "open the section with `{`")?;
        let mut begun = false;
        while !self.skips('}') {
            if self.is_word("include") {
                if begun {
                    let remedy = "move it before the first function of the section";
                    return refuse(self.at(), "an include between functions", remedy);
                }
                self.include(interface)?;
                continue;
            }
            begun = true;
            if trusted {
                let function = self.trusted()?;
                interface.trusted.push(function);
            } else {
                let function = self.untrusted()?;
                interface.untrusted.push(function);
            }
        }
        Ok(())
    }

    fn trusted(&mut self) -> Parsed<Function> {
        let doc = self.token().before.clone();
        let public = self.skips_word("public");
        if self.is('[') {
            let remedy = "take it out: calling conventions belong to untrusted functions";
            return refuse(self.at(), "a trusted function with attributes", remedy);
        }
        let mut function = self.function(doc)?;
        function.public = public;
        function.transition_using_threads = self.skips_word("transition_using_threads");
        for word in ["allow", "propagate_errno"] {
            if self.is_word(word) {
                let remedy = "take it out: it belongs to untrusted functions";
                return refuse(self.at(), format!("`{word}` on a trusted function"), remedy);
            }
        }
        self.end_of_function(function)
    }

    fn untrusted(&mut self) -> Parsed<Function> {
        let doc = self.token().before.clone();
        if self.is_word("public") {
            let remedy = "take it out: only trusted functions are public or not";
            return refuse(self.at(), "`public` on an untrusted function", remedy);
        }
        let (convention, dllimport) = self.convention()?;
        let mut function = self.function(doc)?;
        (function.convention, function.dllimport) = (convention, dllimport);
        if self.skips_word("allow") {
            self.allow(&mut function)?;
        }
        loop {
            let at = self.at();
            let twice = if self.skips_word("propagate_errno") {
                core::mem::replace(&mut function.propagate_errno, true)
            } else if self.skips_word("transition_using_threads") {
                core::mem::replace(&mut function.transition_using_threads, true)
            } else {
                break;
            };
            if twice {
                return refuse(at, "the same suffix twice", "take one out");
            }
        }
        if self.is_word("allow") {
            let remedy = "move `allow(...)` right behind the parameters";
            return refuse(self.at(), "`allow` behind another suffix", remedy);
        }
        self.end_of_function(function)
    }

    fn end_of_function(&mut self, mut function: Function) -> Parsed<Function> {
        self.mark(';', "end the function with `;`, or check the spelling of its suffixes")?;
        join(&mut function.doc, self.comment_behind());
        Ok(function)
    }

    fn allow(&mut self, function: &mut Function) -> Parsed<()> {
        self.mark('(', "write allow(name, name)")?;
        if self.skips(')') {
            return Ok(());
        }
        loop {
            let allowed = self.name("the name of a trusted function")?;
            function.allow.push(allowed);
            if !self.skips(',') {
                return self.mark(')', "close the list with `)`");
            }
        }
    }

    fn convention(&mut self) -> Parsed<(Option<&'static str>, bool)> {
        let (mut convention, mut dllimport) = (None, false);
        if !self.skips('[') {
            return Ok((None, false));
        }
        loop {
            let at = self.at();
            let (word, _) = self.name("a calling convention")?;
            let known = ["cdecl", "stdcall", "fastcall"].into_iter().find(|known| *known == word);
            if known.is_none() && word != "dllimport" {
                let remedy = "before a function only cdecl, stdcall, fastcall and dllimport stand";
                return refuse(at, format!("`{word}` is not a calling convention"), remedy);
            }
            let twice = match known {
                Some(known) => convention.replace(known).is_some(),
                None => core::mem::replace(&mut dllimport, true),
            };
            if twice {
                return refuse(at, "more than one calling convention", "keep one");
            }
            if !self.skips(',') {
                self.mark(']', "close the attributes with `]`")?;
                return Ok((convention, dllimport));
            }
        }
    }

    fn function(&mut self, doc: String) -> Parsed<Function> {
        let at = self.at();
        if self.is_word("const") {
            let remedy = "take it out: the grammar has `const` for parameters only";
            return refuse(at, "`const` on a returned value", remedy);
        }
        let base = self.base()?;
        let pointers = self.pointers()?;
        if self.is('[') {
            let remedy = "return a number and hand the array over by an `[out]` parameter";
            return refuse(self.at(), "a function that returns an array", remedy);
        }
        let returns = Declaration {
            attributes: Attributes::default(),
            constant: false,
            base,
            pointers,
            name: String::new(),
            bounds: Vec::new(),
            doc: String::new(),
            at,
        };
        let (name, at) = self.name("the name of a function")?;
        let parameters = self.parameters()?;
        Ok(Function {
            returns,
            name,
            parameters,
            public: false,
            allow: Vec::new(),
            propagate_errno: false,
            transition_using_threads: false,
            convention: None,
            dllimport: false,
            doc,
            at,
        })
    }

    fn parameters(&mut self) -> Parsed<Vec<Declaration>> {
        let mut parameters = Vec::new();
        self.mark('(', "open the parameters with `(`")?;
        if self.skips(')') {
            return Ok(parameters);
        }
        let lone_void = self.is_word("void")
            && self.tokens.get(self.next + 1).is_some_and(|next| next.kind == Kind::Mark(')'));
        if lone_void {
            self.take();
            self.take();
            return Ok(parameters);
        }
        loop {
            let mut parameter = self.declaration()?;
            join(&mut parameter.doc, self.comment_behind());
            let more = self.skips(',');
            if more {
                join(&mut parameter.doc, self.comment_behind());
            }
            parameters.push(parameter);
            if !more {
                self.mark(')', "separate parameters with `,` and close them with `)`")?;
                return Ok(parameters);
            }
        }
    }
}

pub(crate) fn join(doc: &mut String, more: &str) {
    if !more.is_empty() && !doc.ends_with(more) {
        if !doc.is_empty() {
            doc.push('\n');
        }
        doc.push_str(more);
    }
}
